"""Bringing tokens to their experts and their results back, without one Python loop.

Stages, and what each gains:

1. `dispatch_torch`: one stable sort of the T·K ids gives the order of the rows, one gather moves
   them. Its backward adds a token's K gradients up in float32, whatever the dtype of the rows.
2. `combine_torch`: packed rows times their weights are added to their tokens in float32.
3. `dispatch_triton`: the order comes from the tile table's kernel, which needs no sort. A kernel
   copies the rows, writes the zeros past the last one, and multiplies by the routing weights where
   rows leave with them, so that neither takes a pass of its own.
4. `combine_triton`: one kernel gathers the K rows of a token and adds them up in registers. No
   atomics, so the same bits every time, and no weighted copy of the rows.

`drop_to_capacity` ranks all slots at once, where the reference takes one expert after the other.

Dimension key: T tokens, H hidden size, E experts, K experts per token, S rows that go somewhere.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from moe_reference.checks import FLOATS, IDS, check_count, check_tensor

from moe_optimized.alignment import local_ids, sort_slots, tile_table
from moe_optimized.autograd import once
from moe_optimized.compiling import opaque
from moe_optimized.interpreter import (
    INTERPRETED,
    KERNEL_DTYPES,
    has_kernels,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)

Policy = Literal["position", "first_choice", "probs"]


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
    run = dispatch_triton if has_kernels(x) else dispatch_torch
    return run(x, expert_ids, num_experts)


def dispatch_torch(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dispatch`, in whole-tensor torch operations."""
    _check_dispatch(x, expert_ids, num_experts)
    counts, slots = sort_pairs_torch(expert_ids, num_experts)
    return spread_torch(x, slots, expert_ids.shape[1]), counts, slots


@opaque
def dispatch_triton(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dispatch`, with the order and the rows from kernels; float64 is not supported."""
    _check_dispatch(x, expert_ids, num_experts, KERNEL_DTYPES)
    counts, slots = sort_pairs_triton(expert_ids, num_experts)
    return spread_triton(x, slots, expert_ids.shape[1]), counts, slots


def _check_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    check_tensor("x", x, ("T", "H"), dtypes)
    check_tensor("expert_ids", expert_ids, (x.shape[0], "K"), IDS)
    check_count("num_experts", num_experts)


def sort_pairs_torch(
    expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `dispatch`, where each row comes from: its counts [E] and its slots [S]."""
    return _counts_and_slots(*sort_slots(local_ids(expert_ids, num_experts), num_experts))


def sort_pairs_triton(
    expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sort_pairs_torch`, from the tile table's kernel."""
    # Tiles of one row: the table's experts are those of the rows.
    table = tile_table(expert_ids, 1, num_experts)
    keys = torch.where(table.experts < 0, num_experts, table.experts)
    experts = torch.arange(num_experts, dtype=torch.int32, device=keys.device)
    ends = torch.searchsorted(keys, experts, right=True)
    return _counts_and_slots(table.order.long(), ends)


def _counts_and_slots(order: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = ends.diff(prepend=ends.new_zeros(1))
    if not order.is_cuda:
        return counts, order[: int(counts.sum())].clone()
    here = torch.arange(order.numel(), device=order.device) < counts.sum()
    return counts, torch.where(here, order, order.numel())


def spread_torch(
    x: torch.Tensor, slots: torch.Tensor, K: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The second half of `dispatch`: the token of each slot, times its weight where there are any.

    Args:
        x: [T, H], any float dtype.
        slots: [S], int64; on a GPU those of T·K give rows of zeros.
        K: experts per token.
        weights: [T, K], any float dtype; multiplied in float32 (float64 for float64 x).

    Returns:
        [S, H], x's dtype.
    """
    rows = spread(x, slots, K)
    if slots.is_cuda:
        rows = torch.where((slots < x.shape[0] * K)[:, None], rows, 0.0)
    if weights is None:
        return rows
    return (rows * factors_of(weights, slots, accumulation_dtype(x))[:, None]).to(x.dtype)


def spread_triton(
    x: torch.Tensor,
    slots: torch.Tensor,
    K: int,
    weights: torch.Tensor | None = None,
    caller: str = "dispatch_triton",
) -> torch.Tensor:
    """As `spread_torch`, in one Triton kernel; float64 is not supported.

    Slots of T·K give zeros on any device. Gradients can be taken once: a gradient of theirs raises
    RuntimeError, in the name of the caller.
    """
    return _SpreadRows.apply(x, slots, K, weights, caller)


@opaque
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
    run = combine_triton if has_kernels(rows) else combine_torch
    return run(rows, slots, weights)


@opaque
def combine_torch(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `combine`, in whole-tensor torch operations."""
    _check_combine(rows, slots, weights)
    return weighted_sum_torch(rows, slots, weights, rows.dtype)


def weighted_sum_torch(
    rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`combine_torch` on checked arguments, in the dtype that the caller goes on with."""
    T, K = weights.shape
    wide = accumulation_dtype(rows)
    slots = known_slots(slots, T * K).long()
    here = slots < T * K
    if T * K == 0:
        rows, slots = rows[:0], slots[:0]
    elif slots.device.type != "cpu":
        # To leave them out the host would have to wait for their number.
        rows = torch.where(here[:, None], rows, 0.0)
    elif not bool(here.all()):
        rows, slots = rows[here], slots[here]
    weighted = rows.to(wide) * factors_of(weights, slots, wide)[:, None]
    return gather_sum(weighted, slots, T, K).to(dtype)


@opaque
def combine_triton(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `combine`, in one Triton kernel; float64 is not supported.

    The gradient is computed by torch operations: a gather of the output's gradient, no sums over
    more than a row.
    """
    _check_combine(rows, slots, weights, KERNEL_DTYPES)
    return weighted_sum_triton(rows, slots, weights, rows.dtype)


def weighted_sum_triton(
    rows: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
    caller: str = "combine_triton",
) -> torch.Tensor:
    """`combine_triton` on checked arguments, in the dtype that the caller goes on with."""
    return _Combine.apply(rows, slots.long(), weights, dtype, caller)


def drop_to_capacity(
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    capacity: int,
    policy: Policy = "position",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep at most `capacity` pairs of each expert.

    Args:
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        num_experts: E.
        capacity: pairs per expert.
        policy: keep the lowest slots, all first choices before any second, or the highest weights
            (a NaN is the lowest; ties go to the lowest slot).

    Returns:
        weights: [T, K], 0 where a pair was dropped or not here.
        expert_ids: [T, K], -1 there.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or an unknown policy.
    """
    check_tensor("weights", weights, ("T", "K"), FLOATS)
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_count("num_experts", num_experts)
    check_count("capacity", capacity)
    if policy not in get_args(Policy):
        raise ValueError(f"policy: expected one of {get_args(Policy)}, got {policy!r}")
    T, K = weights.shape
    local = local_ids(expert_ids, num_experts)
    slots = torch.arange(T * K, device=local.device)
    priority = slots
    if policy == "first_choice":
        priority = slots.view(T, K).T.flatten()
    elif policy == "probs":
        known = weights.detach().masked_fill(weights.isnan(), -torch.inf).flatten()
        priority = known.argsort(descending=True, stable=True)

    contenders = local.flatten()[priority]
    order, ends = sort_slots(contenders, num_experts)
    starts = torch.cat([ends.new_zeros(1), ends])
    rank = slots - starts[contenders[order]]
    kept = (contenders[order] >= 0) & (rank < capacity)
    dropped = torch.ones_like(kept).scatter_(0, priority[order], ~kept).view(T, K)
    return weights.masked_fill(dropped, 0.0), expert_ids.masked_fill(dropped, -1)


def count_tokens(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many pairs each expert has, [E] int64, without the host's help."""
    groups = local_ids(expert_ids, num_experts).flatten()
    counts = groups.new_zeros(num_experts + 1)
    # Integers add up to the same whatever the order; the last bin holds what is not here.
    counts.scatter_add_(0, torch.where(groups < 0, num_experts, groups), torch.ones_like(groups))
    return counts[:-1]


def _check_combine(
    rows: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    check_tensor("rows", rows, ("S", "H"), dtypes)
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


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """For products: autocast of x's device would round their factors."""
    if x.device.type == "meta":
        # It has none, and refuses to be asked.
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def known_slots(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The slots, with `num_slots` for all that there are not: those of nobody."""
    return torch.where((slots >= 0) & (slots < num_slots), slots, num_slots)


def factors_of(weights: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight of each slot, [S] from [T, K], and 0 for slots of T·K."""
    return torch.cat([weights.to(dtype).flatten(), weights.new_zeros(1, dtype=dtype)])[slots]


def spread(x: torch.Tensor, slots: torch.Tensor, K: int) -> torch.Tensor:
    """The token of each slot, [S, H] from x [T, H]; gradients are added up in float32.

    Slots of T·K have some token's row, and no gradient.
    """
    return _Spread.apply(x, slots, K)


def gather_sum(rows: torch.Tensor, slots: torch.Tensor, T: int, K: int) -> torch.Tensor:
    """The sum of each token's rows, [T, H] from [S, H], in the dtype of the rows.

    Rows of slot T·K are left out; what is said to be their gradient is that of some token.
    """
    return _GatherSum.apply(rows, slots, T, K)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, K: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.T, ctx.K = x.shape[0], K
        return x.index_select(0, _tokens_of(slots, ctx.T, K))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        total = gather_sum(grad.to(accumulation_dtype(grad)), slots, ctx.T, ctx.K)
        return total.to(grad.dtype), None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slots: torch.Tensor, T: int, K: int) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.K = K
        return _sum_rows(rows, slots, T, K)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return spread(grad, slots, ctx.K), None, None, None


def _tokens_of(slots: torch.Tensor, T: int, K: int) -> torch.Tensor:
    """The token of each slot, and any for those of T·K."""
    return (slots // max(K, 1)).clamp(max=T - 1)


def _sum_rows(rows: torch.Tensor, slots: torch.Tensor, T: int, K: int) -> torch.Tensor:
    # index_add is atomic on a GPU: its sums change from run to run.
    if has_kernels(rows):
        return sum_places(rows, places_of(slots, T * K), None, T, K, rows.dtype)
    if rows.is_cuda:
        return _sum_places_torch(rows, places_of(slots, T * K), T, K)
    # The last row is for those of nobody.
    return rows.new_zeros(T + 1, rows.shape[1]).index_add_(0, slots // max(K, 1), rows)[:T]


def _sum_places_torch(rows: torch.Tensor, places: torch.Tensor, T: int, K: int) -> torch.Tensor:
    """`sum_places` without weights, by way of a [T, K, H] copy of the rows."""
    if rows.shape[0] == 0:
        return rows.new_zeros(T, rows.shape[1])
    picked = rows.index_select(0, places.clamp(min=0).long())
    return torch.where(places[:, None] >= 0, picked, 0.0).view(T, K, rows.shape[1]).sum(1)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype,
        caller: str,
    ) -> torch.Tensor:
        # Only the gradient of the weights is made of the rows.
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, slots, weights)
        ctx.dtype, ctx.caller = rows.dtype, caller
        T, K = weights.shape
        return sum_places(rows, places_of(slots, T * K), weights, T, K, dtype)

    @staticmethod
    @once()
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, slots, weights = ctx.saved_tensors
        T, K = weights.shape
        if T * K == 0:
            to_rows = grad.new_zeros((len(slots), grad.shape[1]), dtype=ctx.dtype)
            return to_rows, None, torch.zeros_like(weights), None, None
        to_rows = to_weights = None
        known = known_slots(slots, T * K)
        if ctx.needs_input_grad[0]:
            to_rows = spread_rows(grad, known, K, weights).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_tokens = grad.index_select(0, _tokens_of(known, T, K))
            to_weights = _dots_of_slots(of_tokens, rows, known, weights)
        return to_rows, None, to_weights, None, None


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        slots: torch.Tensor,
        K: int,
        weights: torch.Tensor | None,
        caller: str,
    ) -> torch.Tensor:
        # Only the gradient of the weights is made of x.
        ctx.save_for_backward(slots, weights, x if ctx.needs_input_grad[3] else None)
        ctx.T, ctx.K, ctx.caller = x.shape[0], K, caller
        return spread_rows(x, slots, K, weights)

    @staticmethod
    @once()
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots, weights, x = ctx.saved_tensors
        T, K = ctx.T, ctx.K
        to_x = to_weights = None
        if ctx.needs_input_grad[0]:
            to_x = sum_places(grad, places_of(slots, T * K), weights, T, K, grad.dtype)
        if ctx.needs_input_grad[3]:
            of_tokens = x.index_select(0, _tokens_of(slots, T, K))
            to_weights = _dots_of_slots(of_tokens, grad, slots, weights)
        return to_x, None, None, to_weights, None


def _dots_of_slots(
    left: torch.Tensor, right: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The gradient of the weights: each slot's product of two rows, 0 where it has none."""
    num_slots = weights.numel()
    found = weights.new_zeros(num_slots + 1, dtype=torch.float32)
    index = known_slots(slots, num_slots)
    found.scatter_(0, index, (left.float() * right.float()).sum(1))
    return found[:-1].view(weights.shape).to(weights.dtype)


def places_of(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Where each slot's row stands, [T·K] int32, -1 for a slot that has none."""
    places = slots.new_full((num_slots + 1,), -1, dtype=torch.int32)
    rows = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
    places.scatter_(0, known_slots(slots, num_slots), rows)
    return places[:-1]


def sum_places(
    rows: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor | None,
    T: int,
    K: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The kernel of `combine`.

    Args:
        rows: [S, H].
        places: [T·K], int32, the row of each slot or -1.
        weights: [T, K], or None for a plain sum.
        T: tokens.
        K: rows of a token.
        dtype: of the result.

    Returns:
        [T, H].
    """
    H = rows.shape[1]
    out = rows.new_empty((T, H), dtype=dtype)
    if INTERPRETED:
        block_t, block_h = min(power_of_two(T), 64), min(power_of_two(H), 1024)
    else:
        block_t, block_h = 1, min(power_of_two(H, least=128), 1024)
    launch(
        combine_rows_kernel,
        (-(-T // block_t), -(-H // block_h)),
        rows,
        places,
        places if weights is None else weights.contiguous(),
        out,
        T,
        H,
        K,
        rows.stride(0),
        rows.stride(1),
        WEIGH=weights is not None,
        ROUND_BITS=needs_widening(dtype),
        BLOCK_T=block_t,
        BLOCK_H=block_h,
    )
    return out


def spread_rows(
    x: torch.Tensor, slots: torch.Tensor, K: int, weights: torch.Tensor | None
) -> torch.Tensor:
    """The kernel of `spread_triton`, whose arguments and result these are."""
    (T, H), S = x.shape, slots.numel()
    out = x.new_empty(S, H)
    if INTERPRETED:
        block_s, block_h = min(power_of_two(S), 64), min(power_of_two(H), 1024)
    else:
        block_s, block_h = 1, min(power_of_two(H, least=128), 1024)
    launch(
        spread_rows_kernel,
        (-(-S // block_s), -(-H // block_h)),
        x,
        slots.contiguous(),
        x if weights is None else weights.contiguous(),
        out,
        S,
        T * K,
        H,
        max(K, 1),
        x.stride(0),
        x.stride(1),
        WEIGH=weights is not None,
        ROUND_BITS=needs_widening(x.dtype),
        BLOCK_S=block_s,
        BLOCK_H=block_h,
    )
    return out


@jit
def combine_rows_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    num_tokens,
    width,
    top_k,
    stride_rs,
    stride_rh,
    WEIGH: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The weighted sum of the rows of BLOCK_T tokens, BLOCK_H columns of them."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_tokens = tokens < num_tokens
    in_columns = (columns < width)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in range(0, top_k):
        places = tl.load(places_ptr + tokens * top_k + k, mask=in_tokens, other=-1).to(tl.int64)
        here = places >= 0
        offsets = places[:, None] * stride_rs + columns.to(tl.int64)[None, :] * stride_rh
        rows = tl.load(rows_ptr + offsets, mask=here[:, None] & in_columns, other=0.0)
        rows = rows.to(tl.float32)
        if WEIGH:
            weights = tl.load(weights_ptr + tokens * top_k + k, mask=here, other=0.0)
            rows = rows * weights.to(tl.float32)[:, None]
        total += rows
    out = out_ptr + tokens[:, None] * width + columns[None, :]
    total = narrow(total, out_ptr.dtype.element_ty, ROUND_BITS)
    tl.store(out, total, mask=in_tokens[:, None] & in_columns)


@jit
def spread_rows_kernel(
    x_ptr,
    slots_ptr,
    weights_ptr,
    out_ptr,
    num_rows,
    num_slots,
    width,
    top_k,
    stride_xt,
    stride_xh,
    WEIGH: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The tokens of BLOCK_S slots, BLOCK_H columns of them; zeros for a slot of nobody."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_rows = rows < num_rows
    in_columns = (columns < width)[None, :]
    slots = tl.load(slots_ptr + rows, mask=in_rows, other=num_slots)
    here = slots < num_slots
    offsets = (slots // top_k)[:, None] * stride_xt + columns.to(tl.int64)[None, :] * stride_xh
    values = tl.load(x_ptr + offsets, mask=here[:, None] & in_columns, other=0.0)
    if WEIGH:
        weights = tl.load(weights_ptr + slots, mask=here, other=0.0).to(tl.float32)
        values = values.to(tl.float32) * weights[:, None]
        values = narrow(values, out_ptr.dtype.element_ty, ROUND_BITS)
    out = out_ptr + rows[:, None] * width + columns[None, :]
    tl.store(out, values, mask=in_rows[:, None] & in_columns)
