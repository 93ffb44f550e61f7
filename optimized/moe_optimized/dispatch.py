"""Bringing tokens to their experts and their results back, without one Python loop.

Stages, and what each gains:

1. `dispatch_torch`: one stable sort of the T·K ids gives the order of the rows, one gather moves
   them. Its backward adds a token's K gradients up in float32, whatever the dtype of the rows.
2. `combine_torch`: packed rows times their weights are added to their tokens in float32.
3. `dispatch_triton`: the order comes from the tile table's kernel, which needs no sort.
4. `combine_triton`: one kernel gathers the K rows of a token and adds them up in registers. No
   atomics, so the same bits every time, and no weighted copy of the rows.

Dimension key: T tokens, H hidden size, E experts, K experts per token, S rows that go somewhere.
"""

from typing import Any

import torch
from moe_reference.checks import FLOATS, IDS, check_count, check_tensor
from torch.autograd.function import once_differentiable

from moe_optimized.alignment import local_ids, sort_slots, tile_table
from moe_optimized.interpreter import (
    COMPILED,
    INTERPRETED,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)


def dispatch(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token to its experts, in expert order.

    Args:
        x: [T, H], any float dtype.
        expert_ids: [T, K], int32 or int64; ids outside [0, E) go nowhere.
        num_experts: E.

    Returns:
        rows: [S, H], x's dtype. On a GPU the host never learns S: there are T·K rows, and those
            past S are zero and have slot T·K.
        tokens_per_expert: [E], int64.
        slots: [S], int64, ascending inside an expert.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    run = dispatch_triton if COMPILED and x.is_cuda else dispatch_torch
    return run(x, expert_ids, num_experts)


def dispatch_torch(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dispatch`, in whole-tensor torch operations."""
    check_dispatch(x, expert_ids, num_experts)
    order, ends = sort_slots(local_ids(expert_ids, num_experts), num_experts)
    return _move(x, expert_ids, order, ends)


def dispatch_triton(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dispatch`, with the order from the tile table's kernel; torch moves the rows."""
    check_dispatch(x, expert_ids, num_experts)
    if num_experts == 0:
        return dispatch_torch(x, expert_ids, num_experts)
    place = tile_table(expert_ids, 1, num_experts).place.long()
    here = place >= 0
    order = place.new_full((place.numel() + 1,), place.numel())
    slots = torch.arange(place.numel(), device=place.device)
    order.scatter_(0, torch.where(here, place, place.numel()), torch.where(here, slots, -1))
    return _move(x, expert_ids, order[:-1], num_experts)


def _move(
def combine(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Add each token's weighted rows up in float32 (float64 for float64 rows).

    Args:
        rows: [S, H], any float dtype.
        slots: [S], int32 or int64, each at most once; rows of slot T·K belong to nobody.
        weights: [T, K], any float dtype; a weight without a row counts for nothing, NaN too.

    Returns:
        [T, H], rows' dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape. Slots are checked on a CPU
            only; on a GPU those outside [0, T·K] belong to nobody.
    """
    return combine_torch(rows, slots, weights)


def combine_torch(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `combine`, in whole-tensor torch operations."""
    check_combine(rows, slots, weights)
    T, K = weights.shape
    wide = accumulation_dtype(rows)
    somebodys = (slots >= 0) & (slots < T * K)
    if not bool(somebodys.all()):
        rows, slots = rows[somebodys], slots[somebodys]
    slots = slots.long()
    weighted = rows.to(wide) * weights.to(wide).flatten()[slots][:, None]
    return gather_sum(weighted, slots, T, K).to(rows.dtype)


def check_combine(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise on arguments that `combine` cannot take."""
    check_tensor("rows", rows, ("S", "H"), FLOATS)
    check_tensor("slots", slots, (rows.shape[0],), IDS)
    check_tensor("weights", weights, ("T", "K"), FLOATS)
    if slots.device.type == "cpu" and slots.numel():
        low, high = (int(bound) for bound in slots.aminmax())
        if low < 0 or high > weights.numel():
            raise ValueError(
                f"slots: expected slots from 0 to {weights.numel()}, got {low if low < 0 else high}"
            )


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over `x` are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def gather_sum(rows: torch.Tensor, slots: torch.Tensor, T: int, K: int) -> torch.Tensor:
    """The sum of each token's rows, [T, H] from [S, H], in the dtype of the rows."""
    out = rows.new_zeros(T, rows.shape[1])
    return out.index_add(0, slots // max(K, 1), rows)


def spread(x: torch.Tensor, slots: torch.Tensor, K: int) -> torch.Tensor:
    """The token of each slot, [S, H] from x [T, H]; gradients are added up in float32."""
    return _Spread.apply(x, slots, K)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, K: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.T, ctx.K = x.shape[0], K
        return x.index_select(0, slots // max(K, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        total = gather_sum(grad.to(accumulation_dtype(grad)), slots, ctx.T, ctx.K)
        return total.to(grad.dtype), None, None
