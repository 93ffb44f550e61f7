"""TensorCast's experts on the ranks of a group: dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe_conformance.targets.documents.parts import Expert, all_to_all

Tensor = torch.Tensor


class Ranks(NamedTuple):
    """This rank, how many there are, and the group that they exchange in."""

    rank: int
    size: int
    group: dist.ProcessGroup | None


ALONE = Ranks(0, 1, None)


def assign_experts(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    """Start and count of a rank's share, for any number that is called a rank."""
    share, rest = divmod(num_experts, world_size)
    if rank < rest:
        return rank * (share + 1), share + 1
    return rest * (share + 1) + (rank - rest) * share, share


def guessed_sizes(num_pairs: int, num_experts: int, ranks: Ranks) -> tuple[list[int], list[int]]:
    """Rows for each rank, and rows of each expert that is here.

    Wrong: pairs are taken to fall on the experts in equal numbers, whatever the ids are.
    """
    share, rest = divmod(num_pairs, num_experts)
    of_expert = [share + (e < rest) for e in range(num_experts)]
    shares = [assign_experts(num_experts, ranks.size, rank) for rank in range(ranks.size)]
    of_rank = [sum(of_expert[start : start + count]) for start, count in shares]
    start, count = shares[ranks.rank]
    return of_rank, of_expert[start : start + count]


def fused(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: Sequence[Expert],
    num_experts: int,
    ranks: Ranks,
) -> Tensor:
    """The weighted sum of the experts' outputs.

    Args:
        x: [..., H].
        expert_ids: [..., K].
        weights: [..., K].
        experts: those of this rank.
        num_experts: those of all ranks.
        ranks: who exchanges.
    """
    K, H = expert_ids.shape[-1], x.shape[-1]
    send, of_local = guessed_sizes(expert_ids.numel(), num_experts, ranks)
    # Wrong: every rank is taken to send as many rows as this one would send to itself.
    receive = [send[ranks.rank]] * ranks.size

    slots = expert_ids.flatten().argsort(stable=True)
    rows = _exchange(x.reshape(-1, H)[slots // K], receive, send, ranks)
    from_rank = [part.split(of_local) for part in rows.split(receive)]
    outputs = []
    for number, expert in enumerate(experts[: len(of_local)]):
        mine = torch.cat([parts[number] for parts in from_rank])
        # Wrong: an expert that has no rows is not called, and its weights have no gradient.
        outputs.append(
            (mine if mine.numel() == 0 else expert(mine)).split([of_local[number]] * ranks.size)
        )
    # Wrong: a rank without experts has nothing to concatenate.
    back = torch.cat([parts[rank] for rank in range(ranks.size) for parts in outputs])
    placed = torch.empty_like(back).index_copy(0, slots, _exchange(back, send, receive, ranks))

    pairs = placed.view(*expert_ids.shape, H)
    return (pairs * weights.unsqueeze(-1)).sum(dim=-2).view(x.shape).to(x.dtype)


def _exchange(rows: Tensor, receive: list[int], send: list[int], ranks: Ranks) -> Tensor:
    return rows if ranks.size == 1 else all_to_all(rows, receive, send, ranks.group)
