r"""Placement: more copies of the busy experts, and the shared expert on ranks of its own.

A *physical* expert is a copy of a logical one on some rank. The router chooses logical experts;
`physical_ids` then chooses a copy for each pair. Every copy computes the same, so that a placement
changes where the work is done and no output. What it is for is the greatest load of a rank,

$$
\max_r \sum_{p \, \text{on} \, r} \frac{\mathrm{load}_{e(p)}}{\mathrm{copies}_{e(p)}}
$$

Dimension key: T tokens, K experts per token, E experts, R ranks, P physical experts, X copies of
one expert at most, S shared ranks.
"""

import math
from collections.abc import Sequence

import torch

from moe_reference.alignment import local_ids
from moe_reference.checks import FLOATS, IDS, check_count, check_ranks, check_tensor
from moe_reference.config import Placement
from moe_reference.expert_slicing import assign_experts


def place_experts(load: torch.Tensor, num_physical: int, num_ranks: int) -> Placement:
    r"""Copies for the busy experts, and all of them on ranks with equally many slots.

    Every expert has one copy. Each further one goes to the expert with the greatest load per copy,
    $\arg\max_e \, \mathrm{load}_e / \mathrm{copies}_e$, the lowest id on a tie. Then the copies,
    those with the greatest load first, go one by one to the rank with the least load that has a
    free slot. Two copies of one expert may meet on a rank.

    Args:
        load: [E], any float or int dtype, finite and not negative: tokens, or their moving average.
        num_physical: P, at least E, and a multiple of R.
        num_ranks: R, at least 1.

    Returns:
        A placement on the device of `load`; rank r holds the physical experts from r · P / R on, in
        ascending order of their ids.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or is outside its range.

    Source: DeepSeek's EPLB without its node groups.

    >>> place_experts(torch.tensor([90, 30, 30]), num_physical=4, num_ranks=2).physical_to_logical
    tensor([0, 1, 0, 2])
    """
    check_tensor("load", load, ("E",), (*FLOATS, *IDS))
    check_count("num_ranks", num_ranks, 1)
    check_count("num_physical", num_physical, len(load))
    if num_physical % num_ranks != 0 or (num_physical > 0 and len(load) == 0):
        raise ValueError(
            f"num_physical: expected copies of {len(load)} experts, as many on each of {num_ranks} "
            f"ranks, got {num_physical}"
        )
    load_E = load.tolist()
    if not all(0 <= each < math.inf for each in load_E):
        raise ValueError(f"load: expected finite numbers >= 0, got {load_E}")

    copies_E = [1] * len(load_E)
    for _ in range(num_physical - len(load_E)):
        busiest = max(range(len(load_E)), key=lambda e: load_E[e] / copies_E[e])
        copies_E[busiest] += 1

    share_E = [each / copies for each, copies in zip(load_E, copies_E, strict=True)]
    held_R: list[list[int]] = [[] for _ in range(num_ranks)]
    load_R = [0.0] * num_ranks
    for e in sorted(range(len(share_E)), key=lambda e: -share_E[e]):
        for _ in range(copies_E[e]):
            free = [r for r in range(num_ranks) if len(held_R[r]) < num_physical // num_ranks]
            least = min(free, key=load_R.__getitem__)
            held_R[least].append(e)
            load_R[least] += share_E[e]
    placed = [e for held in held_R for e in sorted(held)]
    on = torch.tensor(placed, dtype=torch.int64, device=load.device)
    return make_placement(on, len(load_E), num_ranks)


def make_placement(
    physical_to_logical: torch.Tensor, num_experts: int, num_ranks: int
) -> Placement:
    """A placement from which copies there are, in the order of the ranks.

    Args:
        physical_to_logical: [P], int32 or int64: every expert at least once; P a multiple of R.
        num_experts: E.
        num_ranks: R, at least 1.

    Returns:
        Tensors of int64 on the same device, the copies of an expert in ascending order.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or an expert is missing or unknown.

    >>> make_placement(torch.tensor([0, 1, 0, 2]), 3, 2).logical_to_physical.tolist()
    [[0, 2], [1, -1], [3, -1]]
    """
    check_tensor("physical_to_logical", physical_to_logical, ("P",), IDS)
    check_count("num_experts", num_experts)
    check_count("num_ranks", num_ranks, 1)
    logical_P, P = physical_to_logical.tolist(), len(physical_to_logical)
    if P % num_ranks != 0 or set(logical_P) != set(range(num_experts)):
        raise ValueError(
            f"physical_to_logical: expected each of {num_experts} experts at least once, as many "
            f"on each of {num_ranks} ranks, got {logical_P}"
        )
    copies_E = [[p for p in range(P) if logical_P[p] == e] for e in range(num_experts)]
    most = max(map(len, copies_E), default=0)
    padded_E = [copies + [-1] * (most - len(copies)) for copies in copies_E]

    def ids(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=physical_to_logical.device)

    return Placement(
        ids(logical_P),
        ids(padded_E).view(num_experts, most),
        ids([len(copies) for copies in copies_E]),
        ids([p * num_ranks // P for p in range(P)]),
    )


def physical_ids(expert_ids: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Choose a copy for every pair: the j-th pair of an expert, by slot, takes copy j mod X_e.

    The choice follows from the ids alone, so that ranks that see the same tokens choose alike, and
    the copies of an expert differ by one pair at most.

    Args:
        expert_ids: [T, K], int32 or int64.
        placement: X_e copies of expert e.

    Returns:
        [T, K], the dtype given: physical experts, -1 where an expert is not here.

    Raises:
        TypeError: an argument has the wrong dtype.

    >>> placement = make_placement(torch.tensor([0, 1, 0, 2]), 3, 2)
    >>> physical_ids(torch.tensor([[0, 1], [0, 9], [0, 2]]), placement).tolist()
    [[0, 1], [2, -1], [0, 3]]
    """
    ids_S = local_ids(expert_ids, len(placement.replica_count)).flatten()
    copies_EX = placement.logical_to_physical.to(ids_S)
    chosen_S = torch.full_like(ids_S, -1)
    for e, count in enumerate(placement.replica_count.tolist()):
        slots = (ids_S == e).nonzero()[:, 0]
        turn = torch.arange(len(slots), device=slots.device) % count
        chosen_S[slots] = copies_EX[e, turn]
    return chosen_S.view(expert_ids.shape).to(expert_ids.dtype)


def logical_ids(physical: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The inverse of `physical_ids`: what each physical expert is a copy of, -1 where not here.

    >>> logical_ids(torch.tensor([2, 3, -1]), make_placement(torch.tensor([0, 1, 0, 2]), 3, 2))
    tensor([ 0,  2, -1])
    """
    logical_P = placement.physical_to_logical
    rows = local_ids(physical, len(logical_P))
    ids = torch.full_like(rows, -1)
    ids[rows >= 0] = logical_P.to(rows)[rows[rows >= 0]]
    return ids.to(physical.dtype)


def assign_external_shared(
    num_experts: int, num_shared_ranks: int, world_size: int, rank: int
) -> range:
    """The share of a rank where the first S ranks hold the shared expert and nothing else.

    The shared expert counts as S more experts, E to E + S - 1, all of them the same; the routed
    ones are shared out among the other ranks. `add_shared_column` sends the tokens there.

    Args:
        num_experts: E, the routed experts.
        num_shared_ranks: S, from 0 to R; less than R where there are routed experts.
        world_size: R.
        rank: from 0 to R - 1.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its range, or no rank is left for routed experts.

    Source: TensorCast, which divides by zero where no rank is left.

    >>> [list(assign_external_shared(4, 1, 3, rank)) for rank in range(3)]
    [[4], [0, 1], [2, 3]]
    """
    check_ranks(num_experts, world_size, rank)
    check_count("num_shared_ranks", num_shared_ranks)
    routed_ranks = world_size - num_shared_ranks
    if routed_ranks < (1 if num_experts > 0 else 0):
        raise ValueError(
            f"num_shared_ranks: expected a rank of {world_size} to be left for {num_experts} "
            f"experts, got {num_shared_ranks}"
        )
    if rank < num_shared_ranks:
        return range(num_experts + rank, num_experts + rank + 1)
    start, count = assign_experts(num_experts, routed_ranks, rank - num_shared_ranks)
    return range(start, start + count)


def add_shared_column(
    weights: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, num_shared_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send every token to the shared expert too, in a further column, with a weight of one.

    Token t goes to the copy t mod S. An id that was not here stays so: one of E or more, which now
    would be a shared expert, becomes -1.

    Args:
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        num_experts: E.
        num_shared_ranks: S, at least 1.

    Returns:
        weights and expert_ids, both [T, K + 1], of the dtypes given.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape.

    Source: TensorCast, whose column of floats turns all ids into floats.

    >>> add_shared_column(torch.tensor([[0.5], [0.5]]), torch.tensor([[1], [3]]), 3, 1)[1].tolist()
    [[1, 3], [-1, 3]]
    """
    check_tensor("weights", weights, ("T", "K"))
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_count("num_shared_ranks", num_shared_ranks, 1)
    copies_T = torch.arange(len(expert_ids), device=expert_ids.device) % num_shared_ranks
    routed_TK = local_ids(expert_ids, num_experts)
    ids = torch.cat([routed_TK, num_experts + copies_T[:, None]], dim=1)
    return torch.cat([weights, weights.new_ones(len(weights), 1)], dim=1), ids.to(expert_ids.dtype)
