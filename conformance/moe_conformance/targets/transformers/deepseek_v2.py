"""DeepSeek-V2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import COMMON_LAYER, Choice

if TYPE_CHECKING:
    from moe_reference.config import RoutingConfig

# `DeepseekV2TopkRouter.forward`: softmax, "greedy" over all experts or "group_limited_greedy" with
# a group's best expert and a mask of 0, and the scale always.
ROUTER: Choice = {
    "score": ("softmax",),
    "order": ("score_then_topk",),
    "selection_bias": (False,),
    "hash_table": (False,),
}
GROUPS: list[Choice] = [
    {"num_groups": (1,)},
    {"group_score": ("max",), "mask_fill": ("zero",)},
]


class DeepseekV2(TransformersTarget):
    """transformers/models/deepseek_v2/modeling_deepseek_v2.py."""

    family = "deepseek_v2"
    config_class = "DeepseekV2Config"
    router_class = "DeepseekV2TopkRouter"
    experts_class = "DeepseekV2Experts"
    block_class = "DeepseekV2Moe"
    shared = "shared_experts"
    has_balance_loss = False
    # Not renormalised: the scale is then the same by either rule.
    routing: ClassVar[list[Choice]] = [
        {**ROUTER, **groups, "renormalize": (False,)} for groups in GROUPS
    ]
    # `norm_topk_prob` is a field of DeepseekV2Config, and DeepSeek's own gate divides if it is set
    # and K > 1, and does not scale then. This router does not read it.
    documented: ClassVar[dict[str, list[Choice]]] = {
        "norm_topk_prob": [
            {
                **ROUTER,
                **groups,
                "renormalize": (True,),
                "renormalize_single": (False,),
                "norm": ("sum",),
                "epsilon": (1e-20,),
                "epsilon_mode": ("add",),
                "scale_when": ("not_renormalized",),
            }
            for groups in GROUPS
        ]
    }
    layer_choice: ClassVar[Choice | list[Choice]] = {
        **COMMON_LAYER,
        # `DeepseekV2Moe` always adds `shared_experts`; without width they add zeros.
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
            "topk_method": "greedy" if config.num_groups == 1 else "group_limited_greedy",
            "n_group": config.num_groups,
            "topk_group": config.topk_groups,
        }
