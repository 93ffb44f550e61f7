"""Mixtral."""

from __future__ import annotations

from typing import ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import Choice


class Mixtral(TransformersTarget):
    """transformers/models/mixtral/modeling_mixtral.py."""

    family = "mixtral"
    config_class = "MixtralConfig"
    router_class = "MixtralTopKRouter"
    experts_class = "MixtralExperts"
    block_class = "MixtralSparseMoeBlock"
    routing: ClassVar[list[Choice]] = [
        {
            "score": ("softmax",),
            "order": ("score_then_topk",),
            # `MixtralTopKRouter.forward` always divides by the plain sum, for K = 1 as well.
            "renormalize": (True,),
            "renormalize_single": (True,),
            "norm": ("sum",),
            "epsilon": (0.0,),
            # It has no scale, groups, selection bias or table.
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        }
    ]
