"""MiniMax-M2."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import COMMON_LAYER, Choice

if TYPE_CHECKING:
    import torch
    from moe_reference.config import LayerWeights, RoutingConfig


class MiniMaxM2(TransformersTarget):
    """transformers/models/minimax_m2/modeling_minimax_m2.py."""

    family = "minimax_m2"
    config_class = "MiniMaxM2Config"
    router_class = "MiniMaxM2TopKRouter"
    experts_class = "MiniMaxM2Experts"
    block_class = "MiniMaxM2SparseMoeBlock"
    routing: ClassVar[list[Choice]] = [
        {
            "score": ("sigmoid",),
            "order": ("score_then_topk",),
            # `MiniMaxM2TopKRouter.forward` always divides by the plain sum, for K = 1 as well.
            "renormalize": (True,),
            "renormalize_single": (True,),
            "norm": ("sum",),
            "epsilon": (0.0,),
            # It has no scale, groups or table.
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False, True),
            "hash_table": (False,),
        }
    ]
    layer_choice: ClassVar[Choice | list[Choice]] = {
        **COMMON_LAYER,
        # `hidden_states.to(self.weight.dtype)`: the product is in the dtype of the router's weight.
        "router_dtype": (None, "float32", "bfloat16", "float64"),
    }

    def _router_dtype(self, given: torch.dtype | None, x: torch.Tensor) -> torch.dtype | None:
        # With float64 inputs everything is float64.
        return x.dtype if x.element_size() == 8 else given or x.dtype

    def _router_inputs(
        self,
        config: RoutingConfig,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor | None,
        like: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # The block has the bias and gives it to the router.
        return (_buffer(bias, like.shape[-1], like),)

    def _block_parameters(
        self, parameters: LayerWeights, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        bias = _buffer(parameters.selection_bias, parameters.router.shape[0], x)
        return {"e_score_correction_bias": bias}


def _buffer(bias: torch.Tensor | None, num_experts: int, like: torch.Tensor) -> torch.Tensor:
    """In float32: `nn.Buffer(torch.zeros(config.num_local_experts))`."""
    return (like.new_zeros(num_experts) if bias is None else bias).float()
