"""Values as they are with gradients as they are not."""

from __future__ import annotations

from collections.abc import Callable

import torch


def with_gradient(
    value: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The same values with another gradient."""
    if not value.requires_grad:
        return value
    same = value.view_as(value)
    same.register_hook(change)
    return same
