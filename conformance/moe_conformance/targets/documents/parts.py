"""What the texts call and do not show, taken from `moe_reference`, so that it is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from moe_reference.activations import feed_forward, one_by_one
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import accumulation_dtype

Tensor = torch.Tensor
Expert = Callable[[Tensor], Tensor]


def experts_of(weights: ExpertWeights, config: ExpertsConfig) -> list[Expert]:
    """Each expert as a module that takes rows and gives rows of the same dtype, rounded once."""

    def expert(one: int, rows: Tensor) -> Tensor:
        wide = rows.to(accumulation_dtype(rows))
        return feed_forward(wide, listed[one], config).to(rows.dtype)

    listed = one_by_one(weights)
    return [lambda rows, one=e: expert(one, rows) for e in range(len(listed))]  # type: ignore[misc]


def all_to_all(
    rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Rows sent to the ranks of a group in chunks, and what came in chunks from each."""
    came = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), receive, send, group=group)
    return came
