"""Expert parallelism: rows travel in chunks, and what is computed hides most of the way.

Stages, and what each gains:

1. Pairs are sorted once, by chunk, rank and expert, so that each chunk of each rank is one piece of
   the rows, and its experts' weights are views of this rank's.
2. Counts are on their way while the rows are copied into that order. The host has to know them, as
   all-to-alls take lengths in its memory: it waits once, for one copy. It waits again for an order
   of experts that is new, for a placement whose maps are on a GPU, and for products in float64,
   which are for comparisons. What would need no wait is `torch.ops.symm_mem.all_to_all_vdev`, which
   reads lengths on the GPU; it could not be run here.
3. Arrived rows are not sorted: they are tokens with one expert and a weight of one, and the fast
   experts give them back in the order in which they came. So there is nothing to undo.
4. `expert_parallel_pipeline`: the next chunk travels while one is computed, the shared expert is
   computed while the first one does, forward and backward.

A chunk is some experts of every rank. So what does not overlap is one hot expert: its rows are all
in one chunk, however many chunks there are. With one rank nothing travels, is counted or waited
for: it is `experts`.

Dimension key: T tokens of a rank, H hidden size, K experts per token, E experts (of one rank in the
shape [R, E]), P physical experts, R ranks, C chunks, S rows that leave a rank or come to it.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from moe_reference.checks import FLOATS, check_count, check_experts, check_routing, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement

from moe_optimized.alignment import TileTable
from moe_optimized.dispatch import (
    accumulation_dtype,
    sort_pairs_torch,
    sort_pairs_triton,
    spread_torch,
    spread_triton,
    weighted_sum_torch,
    weighted_sum_triton,
)
from moe_optimized.expert_parallel_order import (
    choose_copies,
    held_experts,
    lengths_of,
    order_of_experts,
    own_shards,
    tell_counts,
)
from moe_optimized.expert_parallel_pipeline import Kept, Plan, depart, through_experts
from moe_optimized.experts import sum_of_experts, sum_of_experts_triton
from moe_optimized.experts_backward import Needs, run_backward
from moe_optimized.experts_cpu import backward_on_cpu, forward_on_cpu
from moe_optimized.experts_torch import backward_grouped, forward_grouped
from moe_optimized.experts_triton import run_forward
from moe_optimized.interpreter import KERNEL_DTYPES, has_kernels


def _not_compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.compiler.disable` where somebody compiles: it imports the compiler, for seconds."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return run


@_not_compiled
def expert_parallel(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    num_experts: int,
    config: ExpertsConfig,
    group: dist.ProcessGroup | None,
    placement: Placement | None = None,
    *,
    chunks: int = 2,
    shared: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The routed part of a layer whose experts are spread over a process group.

    Every rank calls it, and its backward, with tokens of its own, as many as it has: none, too.
    Gradients are this rank's slice of what one rank would get for the sum of all losses, zero and
    not None where nothing was routed. They can be taken once: a gradient of theirs raises
    RuntimeError. A compiled function is interrupted here.

    Args:
        x: [T, H], any float dtype and strides, the same H and dtype on every rank.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64, of all E experts; an id that is not here contributes
            nothing.
        local: the experts of this rank: the first E mod R ranks have one more; with a placement
            its physical experts, ascending. Weights may be DTensors, Shard(0) on a mesh of one
            dimension with the same ranks, where the shares are the same.
        num_experts: E.
        config: how an expert computes.
        group: gloo or NCCL; None takes all ranks.
        placement: copies of experts on ranks; the same on every rank, best in CPU memory.
        chunks: how many parts the rows travel in, as far as the rank with the most experts has as
            many; the same on every rank.
        shared: computes what is added before the one rounding, [T, H], any float dtype: the shared
            expert's output, while rows travel.

    Returns:
        [T, H], x's dtype; differentiable in x, weights, local, and what `shared` has used.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape; on every rank, where shares of a DTensor are
            not those of the ranks. Both before anything is exchanged, but for what `shared`
            returns. A rank that raises alone leaves the others waiting.
    """
    run = expert_parallel_triton if has_kernels(x) else expert_parallel_torch
    return run(
        x, weights, expert_ids, local, num_experts, config, group, placement,
        chunks=chunks, shared=shared,
    )  # fmt: skip


@_not_compiled
def expert_parallel_torch(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    num_experts: int,
    config: ExpertsConfig,
    group: dist.ProcessGroup | None,
    placement: Placement | None = None,
    *,
    chunks: int = 2,
    shared: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `expert_parallel`, in products of torch."""
    given = x, weights, expert_ids, local, num_experts, config, group, placement, chunks, shared
    return _run(*given, _TORCH)


@_not_compiled
def expert_parallel_triton(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    num_experts: int,
    config: ExpertsConfig,
    group: dist.ProcessGroup | None,
    placement: Placement | None = None,
    *,
    chunks: int = 2,
    shared: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `expert_parallel`, in Triton kernels; float64 is not supported."""
    check_tensor("x", x, ("T", "H"), KERNEL_DTYPES)
    given = x, weights, expert_ids, local, num_experts, config, group, placement, chunks, shared
    return _run(*given, _TRITON)


class _Means(NamedTuple):
    """The parts of one way to compute it; each is described where it stands."""

    sort_pairs: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    spread: Callable[..., torch.Tensor]
    forward: Callable[..., tuple[torch.Tensor, Kept]]
    backward: Callable[..., tuple[torch.Tensor | None, ...]]
    weighted_sum: Callable[..., torch.Tensor]
    experts: Callable[..., torch.Tensor]


def _forward_torch(
    x: torch.Tensor, experts: ExpertWeights, ids: torch.Tensor, config: ExpertsConfig, keep: bool
) -> tuple[torch.Tensor, Kept]:
    run = forward_on_cpu if x.device.type == "cpu" else forward_grouped
    out, pre = run(x, experts, _ones(x), ids, config, None, x.dtype, keep)
    return out, (pre,)


def _backward_torch(
    grad: torch.Tensor,
    x: torch.Tensor,
    kept: Kept,
    experts: ExpertWeights,
    ids: torch.Tensor,
    config: ExpertsConfig,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    run = backward_on_cpu if x.device.type == "cpu" else backward_grouped
    return run(grad, x, kept[0], experts, _ones(x), ids, config, None, needs)


def _forward_triton(
    x: torch.Tensor, experts: ExpertWeights, ids: torch.Tensor, config: ExpertsConfig, keep: bool
) -> tuple[torch.Tensor, Kept]:
    given = x, experts, _ones(x), ids, config, None, None, x.dtype, keep
    out, pre, tiles = run_forward(*given)
    return out, (pre, *vars(tiles).values())


def _backward_triton(
    grad: torch.Tensor,
    x: torch.Tensor,
    kept: Kept,
    experts: ExpertWeights,
    ids: torch.Tensor,
    config: ExpertsConfig,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    pre, *tiles = kept
    return run_backward(grad, x, pre, experts, _ones(x), TileTable(*tiles), config, None, needs)


def _ones(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[0], 1, dtype=accumulation_dtype(x), device=x.device)


_TORCH = _Means(
    sort_pairs_torch,
    spread_torch,
    _forward_torch,
    _backward_torch,
    weighted_sum_torch,
    sum_of_experts,
)
_TRITON = _Means(
    sort_pairs_triton,
    partial(spread_triton, caller="expert_parallel_triton"),
    _forward_triton,
    _backward_triton,
    partial(weighted_sum_triton, caller="expert_parallel_triton"),
    sum_of_experts_triton,
)


def _run(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    num_experts: int,
    config: ExpertsConfig,
    group: dist.ProcessGroup | None,
    placement: Placement | None,
    chunks: int,
    shared: Callable[[], torch.Tensor] | None,
    means: _Means,
) -> torch.Tensor:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    check_count("chunks", chunks, 1)
    held = held_experts(num_experts, size, placement)
    local = own_shards(local, held, group)
    check_routing(x, weights, expert_ids)
    check_experts(local, x, config, len(held[rank]), "local")

    ids = expert_ids if placement is None else choose_copies(expert_ids, placement)
    # Two outputs are added before they are rounded.
    dtype = x.dtype if shared is None else accumulation_dtype(x)
    if size == 1:
        extra = _output_of(shared, x)
        total = means.experts(x, local, weights, ids, config, dtype=dtype)
        return total if extra is None else (total + extra).to(x.dtype)

    order = order_of_experts(held, chunks, rank, ids.device)
    counts_P, slots_S = means.sort_pairs(order.places(ids), len(order.place))
    came_RE, told = tell_counts(counts_P, order, group)
    on_input, wide_TK = config.weight_on == "input", weights.to(accumulation_dtype(x))
    rows_SH = means.spread(x, slots_S, ids.shape[1], wide_TK if on_input else None)
    told.wait()
    send, receive, rows_of = lengths_of(counts_P, came_RE, order)
    plan = Plan(
        group,
        means.forward,
        means.backward,
        config,
        send,
        receive,
        order.experts,
        rows_of,
        torch.is_grad_enabled(),
    )
    anchor = torch.zeros((), requires_grad=plan.keep)
    rows_SH = depart(rows_SH, anchor, plan)
    extra = _output_of(shared, x)
    out_SH = through_experts(rows_SH, anchor, local, plan)
    multiply_TK = torch.ones_like(wide_TK) if on_input else wide_TK
    total = means.weighted_sum(out_SH, slots_S, multiply_TK, dtype)
    return total if extra is None else (total + extra).to(x.dtype)


def _output_of(shared: Callable[[], torch.Tensor] | None, x: torch.Tensor) -> torch.Tensor | None:
    if shared is None:
        return None
    extra = shared()
    check_tensor("shared()", extra, tuple(x.shape), FLOATS)
    return extra.to(accumulation_dtype(x))
