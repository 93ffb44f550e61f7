"""What the adapters for transformers do with tensors, modules and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertWeights


def call(module: torch.nn.Module, parameters: Mapping[str, torch.Tensor], *inputs: Any) -> Any:
    """The module on the inputs, with these tensors in the place of all its parameters."""
    from torch.func import functional_call

    return functional_call(module, dict(parameters), inputs, strict=True)


def widen(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Routing weights in float32, or float64 where the inputs are."""
    return weights.double() if like.element_size() == 8 else weights.float()


def interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """Gate and up rows in turn, along dimension 1."""
    import torch

    return torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)


def shared_expert(
    prefix: str, shared: ExpertWeights | None, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A shared expert as the three linear layers that it is in the library; none has no width."""
    if shared is None:
        gate = up = x.new_zeros(0, x.shape[-1])
        down = x.new_zeros(x.shape[-1], 0)
    else:
        gate, up = shared.gate_up[0].chunk(2)
        down = shared.down[0]
    # A linear layer's width is that of the given weights.
    return {
        f"{prefix}.gate_proj.weight": gate.contiguous(),
        f"{prefix}.up_proj.weight": up.contiguous(),
        f"{prefix}.down_proj.weight": down.contiguous(),
    }
