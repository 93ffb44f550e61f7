"""Between ids [T, K] and the dense [T, E] matrix with a map that several libraries route with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_conformance.target import Unsupported

if TYPE_CHECKING:
    import torch


def to_dense(
    values: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, E] with 0 where nothing is routed, and the map [T, E], bool.

    Ids that mean *not here* have no column, and are left out.

    Raises:
        ValueError: there is not one value for each id.
        Unsupported: a row names an expert twice, which a map of bools cannot say.
    """
    if values.shape != expert_ids.shape:
        raise ValueError(
            f"weights: expected {list(expert_ids.shape)}, one for each id, got {list(values.shape)}"
        )
    here = (expert_ids >= 0) & (expert_ids < num_experts)
    # One column more takes what is not here, and is cut off.
    columns = expert_ids.long().where(here, num_experts)
    shape = (len(expert_ids), num_experts + 1)
    marks = columns.new_zeros(shape).scatter_add(1, columns, here.long())[:, :-1]
    if bool((marks > 1).any()):
        raise Unsupported("a row names an expert twice: a routing map has one bool for each")
    dense = values.new_zeros(shape).scatter(1, columns, values)[:, :-1]
    return dense, marks.bool()


def from_dense(
    dense: torch.Tensor, routing_map: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the marked places and their columns, [T, K] each, by column.

    Raises:
        RuntimeError: the map does not mark K places in each row.
    """
    columns = routing_map.nonzero()[:, 1].view(len(routing_map), top_k)
    return dense.gather(1, columns), columns


def at_ids(
    dense: torch.Tensor, routing_map: torch.Tensor, expert_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values at the places that these ids have, and the ids, -1 where nothing is marked."""
    num_experts = dense.shape[1]
    here = (expert_ids >= 0) & (expert_ids < num_experts)
    if num_experts == 0:
        return dense.new_zeros(expert_ids.shape), expert_ids.new_full(expert_ids.shape, -1)
    columns = expert_ids.long().where(here, 0)
    kept = here & routing_map.gather(1, columns)
    return dense.gather(1, columns).where(kept, 0.0), expert_ids.where(kept, -1)


def slots_like(expert_ids: torch.Tensor) -> torch.Tensor:
    """The slot of each pair, [T, K]."""
    import torch

    slots = torch.arange(expert_ids.numel(), device=expert_ids.device)
    return slots.view(expert_ids.shape)


def token_places(weights: torch.Tensor) -> tuple[int, int]:
    """T and K of routing weights.

    Raises:
        ValueError: they are not [T, K].
    """
    if weights.ndim != 2:
        raise ValueError(f"weights: expected [T, K], got {list(weights.shape)}")
    return weights.shape[0], weights.shape[1]


def by_place(
    rows: torch.Tensor, slots: torch.Tensor, tokens: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of rows by their place among a token's K, then by token; which places have one.

    Raises:
        TypeError: slots are no integers.
        ValueError: rows are not [S, H], or there is not one slot for each.
        Unsupported: a row's slot is T·K.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows: expected [S, H], got {list(rows.shape)}")
    if slots.is_floating_point():
        raise TypeError(f"slots: expected integers, got {slots.dtype}")
    if slots.shape != rows.shape[:1]:
        raise ValueError(f"slots: expected one for each row, got {list(slots.shape)}")
    if bool((slots >= tokens * top_k).any()):
        raise Unsupported("a row belongs to no pair: a map has no place for it")
    slots = slots.long()
    order = (slots % top_k * tokens + slots // top_k).argsort()
    present = slots.new_zeros(tokens * top_k).scatter(0, slots, 1)
    return order, present.bool().view(tokens, top_k)


def capacity_factor(capacity: int, pairs: int, num_experts: int) -> float:
    """What gives this capacity where it is the mean, pairs / E, times a factor, rounded up.

    Raises:
        ValueError: the capacity is negative.
    """
    if capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")
    # Half a pair below, so that no rounding of the factor reaches the next integer.
    return max(capacity - 0.5, 0.0) * num_experts / max(pairs, 1)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16 and float16 as float32."""
    return tensor if tensor.element_size() > 2 else tensor.float()
