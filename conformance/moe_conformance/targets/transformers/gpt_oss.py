"""gpt-oss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import (
    COMMON_EXPERTS,
    COMMON_LAYER,
    Choice,
)
from moe_conformance.targets.transformers.tensors import interleave

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig


class GptOss(TransformersTarget):
    """transformers/models/gpt_oss/modeling_gpt_oss.py."""

    family = "gpt_oss"
    config_class = "GptOssConfig"
    router_class = "GptOssTopKRouter"
    experts_class = "GptOssExperts"
    block_class = "GptOssMLP"
    gate = "router"
    strides = True  # `GptOssMLP.forward` begins with a reshape.
    routing: ClassVar[list[Choice]] = [
        {
            # `GptOssTopKRouter.forward`: softmax over the K chosen logits, which then sum to 1.
            "score": ("softmax",),
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
        # `GptOssExperts._apply_gate` has its activation built in; alpha and limit are read from
        # config.swiglu_alpha and config.swiglu_limit. Its biases always exist: none means zeros.
        "activation": ("swigluoai",),
        "bias": (False, True),
    }
    layer_choice: ClassVar[Choice | list[Choice]] = {**COMMON_LAYER, "router_bias": (False, True)}
    # `softmax(router_top_value, dtype=router_top_value.dtype)`: float64 stays float64.
    router_dtype = None
    router_rounding = ("router_logits", "router_scores")
    # `current_state @ gate_up_proj + bias`, and `_apply_gate` in five steps, each a tensor of x's
    # dtype.
    experts_rounding = ("product", "activation_steps", *TransformersTarget.experts_rounding)

    def _experts_fields(self, config: ExpertsConfig) -> dict[str, Any]:
        return {"swiglu_alpha": float(config.alpha), "swiglu_limit": float(config.limit)}

    def _router_parameters(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        selection_bias: torch.Tensor | None,
        config: RoutingConfig,
    ) -> dict[str, torch.Tensor]:
        return {
            "weight": weight,
            "bias": weight.new_zeros(weight.shape[0]) if bias is None else bias,
        }

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
        if gate_up_bias is None:
            gate_up_bias = experts.gate_up.new_zeros(experts.gate_up.shape[:2])
        if down_bias is None:
            down_bias = experts.down.new_zeros(experts.down.shape[:2])
        # gate and up rows alternate, and both matrices are transposed: [E, H, 2I] and [E, I, H].
        return {
            "gate_up_proj": interleave(experts.gate_up).transpose(1, 2).contiguous(),
            "gate_up_proj_bias": interleave(gate_up_bias),
            "down_proj": experts.down.transpose(1, 2).contiguous(),
            "down_proj_bias": down_bias.contiguous(),
        }
