"""The order in which rows leave for the experts of other ranks, and the counts that cut it.

Everybody has to cut the experts into the same chunks without asking. So the order follows from what
is known everywhere: the number of experts, the ranks, the placement.

Dimension key: T tokens of a rank, K experts per token, E experts (of one rank in the shape [R, E]),
P physical experts, R ranks, C chunks, S rows or pairs.
"""

import functools
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from moe_reference.checks import check_count
from moe_reference.config import ExpertWeights, Placement

from moe_optimized.alignment import local_ids, sort_slots
from moe_optimized.expert_parallel_pipeline import Posted, post

Held = tuple[tuple[int, ...], ...]
"""The experts of each rank, in the order of its weights; physical ones with a placement."""


def held_experts(num_experts: int, size: int, placement: Placement | None) -> Held:
    """The experts of each rank.

    Args:
        num_experts: E.
        size: R.
        placement: where there are copies.

    Raises:
        TypeError: E is not an int.
        ValueError: the placement is of other experts, or names a rank that there is not.
    """
    check_count("num_experts", num_experts)
    if placement is None:
        share, rest = divmod(num_experts, size)
        bounds = [rank * share + min(rank, rest) for rank in range(size + 1)]
        return tuple(tuple(range(*each)) for each in pairwise(bounds))
    on = placement.rank_of_physical.tolist()
    if len(placement.replica_count) != num_experts or set(on) - set(range(size)):
        raise ValueError(
            f"placement: expected copies of {num_experts} experts on ranks below {size}, got "
            f"{len(placement.replica_count)} experts on ranks {sorted(set(on))}"
        )
    held: list[list[int]] = [[] for _ in range(size)]
    for p, rank in enumerate(on):
        held[rank].append(p)
    return tuple(map(tuple, held))


def own_shards(local: ExpertWeights, held: Held, group: dist.ProcessGroup | None) -> ExpertWeights:
    """What this rank holds of weights that are DTensors; others as they are.

    All that is looked at is known on every rank, so that they all raise or none does.

    Args:
        local: weights, DTensors or not.
        held: the experts of each rank.
        group: its ranks.

    Raises:
        ValueError: a DTensor is placed otherwise than the experts are. DTensor gives every rank
            the ceiling of E / R, as long as there are any: that is not always what it holds here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(local, ExpertWeights):
        # Importing it takes seconds, and without it nobody has a DTensor.
        return local
    ranks, sizes = dist.get_process_group_ranks(group), [len(each) for each in held]
    found = {}
    for name, tensor in vars(local).items():
        if isinstance(tensor, module.DTensor):
            _check_shards(f"local.{name}", tensor, (module.Shard(0),), ranks, sizes)
            tensor = tensor.to_local()
        found[name] = tensor
    return ExpertWeights(**found)


def _check_shards(
    name: str, tensor: Any, placements: tuple[Any], ranks: list[int], sizes: list[int]
) -> None:
    mesh = tensor.device_mesh
    if tuple(tensor.placements) != placements or mesh.mesh.tolist() != ranks:
        raise ValueError(
            f"{name}: expected placements {placements} on the ranks {ranks}, got "
            f"{tuple(tensor.placements)} on {mesh.mesh.tolist()}"
        )
    share = -(-tensor.shape[0] // len(ranks))
    theirs = [max(0, min(share, tensor.shape[0] - rank * share)) for rank in range(len(ranks))]
    if theirs != sizes:
        raise ValueError(f"{name}: expected shares of {sizes} experts, got a DTensor's {theirs}")


def choose_copies(expert_ids: torch.Tensor, placement: Placement) -> torch.Tensor:
    """A copy for every pair: the j-th pair of an expert, by slot, takes copy j mod its number.

    Args:
        expert_ids: [T, K], int32 or int64.
        placement: the copies.

    Returns:
        [T, K], int64: physical experts, -1 where an expert is not here. No look at any value.
    """
    num_experts = len(placement.replica_count)
    ids_S = local_ids(expert_ids, num_experts).flatten()
    if num_experts == 0:
        return ids_S.view(expert_ids.shape)
    order_S, ends_E = sort_slots(ids_S, num_experts)
    # The last one starts those of nobody.
    starts = torch.cat([ends_E.new_zeros(1), ends_E])
    sorted_S = ids_S[order_S]
    turn_S = torch.arange(len(order_S), device=order_S.device) - starts[sorted_S]
    known_S = sorted_S.clamp(min=0)
    # Never kept: a server that moves its copies rewrites the maps in place.
    counts_E = placement.replica_count.to(ids_S)
    physical_EC = placement.logical_to_physical.to(ids_S)
    physical_S = physical_EC[known_S, turn_S % counts_E[known_S]]
    chosen_S = torch.empty_like(ids_S)
    chosen_S[order_S] = torch.where(sorted_S < 0, -1, physical_S)
    return chosen_S.view(expert_ids.shape)


class Order(NamedTuple):
    """The order in which rows leave: by chunk, then by rank, then by expert.

    Attributes:
        place: [P], int64, the place of each expert in that order.
        by_rank: [P], int64, the same places by rank, and in it as its weights are.
        bounds: C·R + 1 places, where in that order the experts of each chunk and rank begin.
        shares: R, how many experts each rank has.
        experts: C, which of this rank's experts are in each chunk.
    """

    place: torch.Tensor
    by_rank: torch.Tensor
    bounds: list[int]
    shares: list[int]
    experts: list[slice]

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the expert of each id, int64, -1 where it is not here."""
        return local_ids(ids, len(self.place), self.place)


@functools.lru_cache(maxsize=64)
def order_of_experts(held: Held, chunks: int, rank: int, device: torch.device) -> Order:
    """Chunks of experts, cut alike on every rank. Remembered: a copy to a GPU makes the host wait.

    Args:
        held: the experts of each rank.
        chunks: how many there may be; there are no more than a rank has experts.
        rank: this one.
        device: of the ids.

    Returns:
        The order. A rank with fewer experts than chunks has chunks without any.
    """
    C = max(1, min(chunks, max(map(len, held))))
    cuts = [[len(each) * c // C for c in range(C + 1)] for each in held]
    parts = [
        each[cut[c] : cut[c + 1]] for c in range(C) for each, cut in zip(held, cuts, strict=True)
    ]
    place = {expert: i for i, expert in enumerate(e for part in parts for e in part)}

    def ids(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Order(
        ids([place[expert] for expert in range(len(place))]),
        ids([place[expert] for each in held for expert in each]),
        [0, *accumulate(map(len, parts))],
        [len(each) for each in held],
        [slice(*each) for each in pairwise(cuts[rank])],
    )


def tell_counts(
    counts: torch.Tensor, order: Order, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, Posted]:
    """Start to tell every rank how many rows its experts get.

    Args:
        counts: [P], int64, the rows of each expert, in the order in which they leave.
        order: that order.
        group: who takes part.

    Returns:
        What comes, [R, E], int64, the rows that each rank has for each expert of this one; and what
        to wait for before it is read.
    """
    R, E = len(order.shares), order.experts[-1].stop
    came = counts.new_empty(R * E)
    told = post(counts[order.by_rank], came, order.shares, [E] * R, group)
    return came.view(R, E), told


def lengths_of(
    counts: torch.Tensor, came: torch.Tensor, order: Order
) -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    """How the rows are cut, which the host has to know.

    Args:
        counts: [P], what this rank has told.
        came: [R, E], what it was told.
        order: the order in which rows leave.

    Returns:
        Of each chunk how many rows go to each rank, [C][R]; how many come from each, [C][R]; and
        [S, 1], int64, the expert of each row that comes, counted in the chunk.
    """
    (P,), (R, E) = counts.shape, came.shape
    known = _on_host(torch.cat([counts, came.flatten()]))
    ends = [0, *accumulate(known[:P])]
    leaving = [ends[stop] - ends[start] for start, stop in pairwise(order.bounds)]
    send = [leaving[start : start + R] for start in range(0, len(leaving), R)]
    arriving = [known[P + rank * E : P + (rank + 1) * E] for rank in range(R)]
    receive = [[sum(of_rank[part]) for of_rank in arriving] for part in order.experts]
    rows_of = []
    for part, lengths in zip(order.experts, receive, strict=True):
        experts = torch.arange(part.stop - part.start, device=came.device).repeat(R)
        # Rank by rank, and the rows of one rank by expert.
        rows = experts.repeat_interleave(came[:, part].flatten(), output_size=sum(lengths))
        rows_of.append(rows[:, None])
    return send, receive, rows_of


def _on_host(counts: torch.Tensor) -> list[int]:
    """The one time that the host waits for the GPU."""
    if not counts.is_cuda:
        return counts.tolist()
    copy = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    copy.copy_(counts, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    return copy.tolist()
