"""DeepSeek-V3, and GLM-4-MoE (GLM-4.5), whose router and block are DeepSeek-V3's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import COMMON_LAYER, Choice

if TYPE_CHECKING:
    import torch
    from moe_reference.config import RoutingConfig


class DeepseekV3(TransformersTarget):
    """transformers/models/deepseek_v3/modeling_deepseek_v3.py."""

    family = "deepseek_v3"
    config_class = "DeepseekV3Config"
    router_class = "DeepseekV3TopkRouter"
    experts_class = "DeepseekV3Experts"
    block_class = "DeepseekV3MoE"
    shared = "shared_experts"
    has_balance_loss = False
    # `.topk(2, dim=-1)` over each group's scores in `DeepseekV3TopkRouter.forward`, with one group
    # as with several.
    min_experts = 2
    # `DeepseekV3TopkRouter.forward`: sigmoid, a group's score is always the sum of its best two,
    # masked with -inf, (+ 1e-20) in the denominator, for K = 1 as well, and the scale always.
    routing: ClassVar[list[Choice]] = [
        {
            "score": ("sigmoid",),
            "order": ("score_then_topk",),
            "selection_bias": (False, True),
            "hash_table": (False,),
            **groups,
            **renormalisation,
        }
        for groups in (
            {"num_groups": (1,)},
            {"group_score": ("top2_sum",), "mask_fill": ("-inf",)},
        )
        for renormalisation in (
            {"renormalize": (False,)},
            {
                "renormalize": (True,),
                "renormalize_single": (True,),
                "norm": ("sum",),
                "epsilon": (1e-20,),
                "epsilon_mode": ("add",),
                "scale_when": ("always",),
            },
        )
    ]
    layer_choice: ClassVar[Choice | list[Choice]] = {
        **COMMON_LAYER,
        # `DeepseekV3MoE` always adds `shared_experts`; without width they add zeros.
        "shared": (False, True),
        # `hidden_states.type(torch.float32)` in the router, for float64 as well.
        "router_dtype": ("float32",),
    }
    router_rounding = ()
    layer_rounding = ("shared_output",)

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "n_routed_experts": num_experts,
            "moe_intermediate_size": intermediate,
            # hidden_size must be a multiple of it, and 1 divides everything.
            "num_attention_heads": 1,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        return {
            "num_experts_per_tok": config.top_k,
            "norm_topk_prob": config.renormalize,
            "routed_scaling_factor": float(config.scale),
            "n_group": config.num_groups,
            "topk_group": config.topk_groups,
        }

    def _router_parameters(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        selection_bias: torch.Tensor | None,
        config: RoutingConfig,
    ) -> dict[str, torch.Tensor]:
        if selection_bias is None:
            selection_bias = weight.new_zeros(weight.shape[0])
        # The buffer is float32: `nn.Buffer(torch.zeros(self.num_experts))`.
        return {"weight": weight, "e_score_correction_bias": selection_bias.float()}


class Glm4Moe(DeepseekV3):
    """transformers/models/glm4_moe/modeling_glm4_moe.py."""

    family = "glm4_moe"
    config_class = "Glm4MoeConfig"
    router_class = "Glm4MoeTopkRouter"
    experts_class = "Glm4MoeExperts"
    block_class = "Glm4MoeMoE"
