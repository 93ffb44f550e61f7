"""Qwen2-MoE and Qwen3-MoE, and OLMoE, whose router is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import COMMON_LAYER, Choice
from moe_conformance.targets.transformers.mixtral import Mixtral

if TYPE_CHECKING:
    import torch
    from moe_reference.config import LayerWeights, RoutingConfig


class Qwen3Moe(TransformersTarget):
    """transformers/models/qwen3_moe/modeling_qwen3_moe.py."""

    family = "qwen3_moe"
    config_class = "Qwen3MoeConfig"
    router_class = "Qwen3MoeTopKRouter"
    experts_class = "Qwen3MoeExperts"
    block_class = "Qwen3MoeSparseMoeBlock"
    # `Qwen3MoeTopKRouter.forward` is Mixtral's with `norm_topk_prob` as a switch.
    routing: ClassVar[list[Choice]] = [
        Mixtral.routing[0],
        {
            "score": ("softmax",),
            "order": ("score_then_topk",),
            "renormalize": (False,),
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        },
    ]
    # `router_top_value.to(router_logits.dtype)` at its end.
    router_rounding = ("router_logits", "router_weights")

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "num_experts": num_experts,
            "moe_intermediate_size": intermediate,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        return {"num_experts_per_tok": config.top_k, "norm_topk_prob": config.renormalize}


class Qwen2Moe(Qwen3Moe):
    """transformers/models/qwen2_moe/modeling_qwen2_moe.py."""

    family = "qwen2_moe"
    config_class = "Qwen2MoeConfig"
    router_class = "Qwen2MoeTopKRouter"
    experts_class = "Qwen2MoeExperts"
    block_class = "Qwen2MoeSparseMoeBlock"
    shared = "shared_expert"
    # `Qwen2MoeSparseMoeBlock` always has a shared expert, which is always gated; one without width
    # adds zeros.
    layer_choice: ClassVar[Choice | list[Choice]] = [
        COMMON_LAYER,
        {**COMMON_LAYER, "shared": (True,), "shared_gate": (True,)},
    ]
    layer_rounding = ("shared_output",)

    def _block_parameters(
        self, parameters: LayerWeights, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        gate = parameters.shared_gate
        return {
            **super()._block_parameters(parameters, x),
            "shared_expert_gate.weight": x.new_zeros(1, x.shape[-1]) if gate is None else gate,
        }


class Olmoe(Qwen3Moe):
    """transformers/models/olmoe/modeling_olmoe.py."""

    family = "olmoe"
    config_class = "OlmoeConfig"
    router_class = "OlmoeTopKRouter"
    experts_class = "OlmoeExperts"
    block_class = "OlmoeSparseMoeBlock"

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "num_experts": num_experts,
            "intermediate_size": intermediate,
        }
