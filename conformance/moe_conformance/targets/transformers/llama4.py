"""Llama 4, whose experts have no switch: every expert computes every token, weighted or with 0.

`dense.py` names the two translations that this takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.choices import (
    COMMON_EXPERTS,
    COMMON_LAYER,
    Choice,
)
from moe_conformance.targets.transformers.dense import DenseBlock

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertWeights, LayerOutput


class Llama4(DenseBlock):
    """transformers/models/llama4/modeling_llama4.py."""

    family = "llama4"
    backends = ("dense",)
    config_class = "Llama4TextConfig"
    router_class = "Llama4Router"
    experts_class = "Llama4TextExperts"
    block_class = "Llama4TextMoe"
    gate = "router"
    shared = "shared_expert"
    has_balance_loss = False
    strides = True  # `Llama4TextMoe.forward` begins with a reshape.
    routing: ClassVar[list[Choice]] = [
        {
            # `Llama4Router.forward`: the sigmoid of the K chosen logits, and of -inf elsewhere.
            "score": ("sigmoid",),
            "order": ("topk_then_score",),
            "renormalize": (False,),
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        }
    ]
    experts_choice: ClassVar[Choice] = {
        **COMMON_EXPERTS,
        "weight_on": ("input",),
        # Llama4TextConfig has no plan for expert parallelism, and says so.
        "expert_map": (False,),
        "invalid_ids": (False,),
    }
    # `Llama4TextMoe` always adds a shared expert; one without width adds zeros.
    layer_choice: ClassVar[Choice | list[Choice]] = {**COMMON_LAYER, "shared": (False, True)}
    # `.to(router_scores.dtype)` behind the sigmoid.
    router_rounding = ("router_logits", "router_weights")
    experts_rounding = (
        "expert_input",
        "pre_activation",
        "gate_activation",
        "activation",
        "expert_output",
    )
    layer_rounding = ("shared_output",)

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        # Both matrices are transposed: [E, H, 2I] and [E, I, H].
        return {
            "gate_up_proj": experts.gate_up.transpose(1, 2).contiguous(),
            "down_proj": experts.down.transpose(1, 2).contiguous(),
        }

    def layer(self, x: torch.Tensor, *given: Any, **named: Any) -> LayerOutput:
        """The family's whole block; the decoder layer gives its output back the shape of x."""
        result = super().layer(x, *given, **named)
        return replace(result, output=result.output.view(x.shape))
