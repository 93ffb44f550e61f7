"""DeepSeek-V4: layers that choose by score, and layers that look the experts up by token id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import (
    COMMON_EXPERTS,
    COMMON_LAYER,
    Choice,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, RoutingConfig

# `forward` of both routers: the score function is named by config.scoring_func, (+ 1e-20) in the
# denominator, for K = 1 as well, and the scale always.
ROUTER: Choice = {
    "score": ("sqrtsoftplus", "sigmoid"),
    "order": ("score_then_topk",),
    "renormalize": (True,),
    "renormalize_single": (True,),
    "norm": ("sum",),
    "epsilon": (1e-20,),
    "epsilon_mode": ("add",),
    "scale_when": ("always",),
    "num_groups": (1,),
    "selection_bias": (False, True),
    "hash_table": (False, True),
}


class DeepseekV4(TransformersTarget):
    """transformers/models/deepseek_v4/modeling_deepseek_v4.py."""

    family = "deepseek_v4"
    config_class = "DeepseekV4Config"
    router_class = "DeepseekV4TopKRouter"
    other_classes = ("DeepseekV4HashRouter",)
    experts_class = "DeepseekV4Experts"
    block_class = "DeepseekV4SparseMoeBlock"
    shared = "shared_experts"
    routing: ClassVar[list[Choice]] = [ROUTER]
    documented: ClassVar[dict[str, list[Choice]]] = {
        # DeepseekV4Config lists softmax for scoring_func, and `ACT2FN` has no such entry.
        "softmax": [{**ROUTER, "score": ("softmax",)}],
        # `norm_topk_prob` is a field of DeepseekV4Config that the routers do not read.
        "norm_topk_prob": [{**ROUTER, "renormalize": (False,)}],
    }
    experts_choice: ClassVar[Choice] = {
        **COMMON_EXPERTS,
        # `DeepseekV4Experts._apply_gate` always clamps, with config.swiglu_limit.
        "activation": ("swiglu_limit",),
    }
    # `DeepseekV4SparseMoeBlock` always adds `shared_experts`; without width they add zeros.
    layer_choice: ClassVar[Choice | list[Choice]] = {**COMMON_LAYER, "shared": (False, True)}
    # `self.score_fn(logits)`: scores and weights stay in the logits' dtype.
    router_dtype = None
    router_rounding = ("router_logits", "router_scores")
    layer_rounding = ("shared_output",)

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "n_routed_experts": num_experts,
            "moe_intermediate_size": intermediate,
            "num_hidden_layers": 1,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        fields = {
            "num_experts_per_tok": config.top_k,
            "norm_topk_prob": config.renormalize,
            "routed_scaling_factor": float(config.scale),
            "scoring_func": config.score,
            # How many of the one layer choose by the table: `config.mlp_layer_types`.
            "num_hash_layers": int(config.hash_table is not None),
        }
        if config.hash_table is not None:
            fields["vocab_size"] = len(config.hash_table)
        return fields

    def _experts_fields(self, config: ExpertsConfig) -> dict[str, Any]:
        return {"swiglu_limit": float(config.limit)}

    def _router(self, config: RoutingConfig) -> str:
        return self.router_class if config.hash_table is None else "DeepseekV4HashRouter"

    def _router_inputs(
        self,
        config: RoutingConfig,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor | None,
        like: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        return self._block_inputs(config, token_ids)

    def _router_parameters(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        selection_bias: torch.Tensor | None,
        config: RoutingConfig,
    ) -> dict[str, torch.Tensor]:
        if config.hash_table is not None:
            return {"weight": weight, "tid2eid": config.hash_table}
        if selection_bias is None:
            selection_bias = weight.new_zeros(weight.shape[0])
        # The buffer is float32, as DeepSeek-V3's.
        return {"weight": weight, "e_score_correction_bias": selection_bias.float()}

    def _block_arguments(self) -> tuple[Any, ...]:
        return (0,)

    def _block_inputs(
        self, config: RoutingConfig, token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        return () if config.hash_table is None or token_ids is None else (token_ids,)
