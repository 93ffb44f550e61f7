"""The steps of expert parallelism that happen on one rank, and the exchange of counts.

`expert_parallel` puts them together. Experts are *in a row* when those of rank 0 come first, then
those of rank 1, and so on: the order in which rows are sent.

Dimension key: T tokens of a rank, H hidden size, K experts per token, E experts (of one rank in the
shape [R, E]), P physical experts, R ranks, S rows that leave a rank or come to it.
"""

from collections.abc import Sequence

import torch

from moe_reference.activations import feed_forward, one_by_one
from moe_reference.alignment import local_ids
from moe_reference.checks import check_count
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import accumulation_dtype, dispatch, inverse_permutation
from moe_reference.expert_slicing import assign_experts
from moe_reference.placement import physical_ids
from moe_reference.ranks import Ranks

Held = Sequence[Sequence[int]]
"""The experts of each rank, in the order of its rows; physical ones with a placement."""


def held_experts(
    num_experts: int, world_size: int, placement: Placement | None = None
) -> list[list[int]]:
    """The experts of each rank in the order of its rows; physical ones with a placement.

    Args:
        num_experts: E.
        world_size: R.
        placement: without one, the shares are those of `assign_experts`.

    Raises:
        TypeError: not ints.
        ValueError: the placement is of other experts, or names a rank that there is not.

    >>> held_experts(3, 2)
    [[0, 1], [2]]
    """
    check_count("num_experts", num_experts)
    if placement is None:
        shares = [assign_experts(num_experts, world_size, rank) for rank in range(world_size)]
        return [list(range(start, start + count)) for start, count in shares]
    rank_P = placement.rank_of_physical.tolist()
    if len(placement.replica_count) != num_experts or set(rank_P) - set(range(world_size)):
        raise ValueError(
            f"placement: expected copies of {num_experts} experts on ranks below {world_size}, got "
            f"{len(placement.replica_count)} experts on ranks {sorted(set(rank_P))}"
        )
    return [[p for p, held_by in enumerate(rank_P) if held_by == r] for r in range(world_size)]


def expert_places(
    expert_ids: torch.Tensor,
    num_experts: int,
    held: Held,
    placement: Placement | None = None,
) -> torch.Tensor:
    """Where the expert of each pair stands among the experts of all ranks in a row.

    Copies are chosen by `physical_ids`, from this rank's ids alone: where rows travel, ranks need
    not agree, since each row comes back to who sent it.

    Args:
        expert_ids: [T, K], int32 or int64.
        num_experts: E.
        held: the experts of each rank.
        placement: the copies of the experts, where there are.

    Returns:
        [T, K], int64, from 0 to P - 1; -1 where the expert is not here.

    Raises:
        TypeError: ids of another dtype.

    >>> expert_places(torch.tensor([[0, 2, 9]]), 3, [[2], [0, 1]]).tolist()
    [[1, 0, -1]]
    """
    chosen = expert_ids if placement is None else physical_ids(expert_ids, placement)
    in_a_row = torch.tensor([e for ids in held for e in ids], dtype=torch.int64)
    return local_ids(chosen, len(in_a_row), inverse_permutation(in_a_row).to(chosen.device))


def rows_to_send(
    x: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor,
    held: Held,
    config: ExpertsConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 1: sort the pairs by expert, and multiply by weights that belong on the input.

    Args:
        x: [T, H], any float dtype.
        weights: [T, K], any float dtype.
        places: [T, K], int64, of `expert_places`.
        held: the experts of each rank.
        config: `weight_on`.

    Returns:
        rows [S, H] in x's dtype; counts [P]; slots [S]; and the weights [T, K] that are left for
        the way back, which are ones where the rows are multiplied already.

    >>> x, weights, places = torch.tensor([[4.0]]), torch.tensor([[0.5]]), torch.tensor([[1]])
    >>> rows_to_send(x, weights, places, [[0], [1]], ExpertsConfig(weight_on="input"))[:2]
    (tensor([[2.]]), tensor([0, 1]))
    """
    weights_TK = weights.to(accumulation_dtype(x))
    rows_SH, counts_P, slots_S = dispatch(x, places, sum(map(len, held)))
    if config.weight_on == "input":
        rows_SH = (rows_SH * weights_TK.flatten()[slots_S, None]).to(x.dtype)
        weights_TK = torch.ones_like(weights_TK)
    return rows_SH, counts_P, slots_S, weights_TK


def exchange_counts(counts: Sequence[torch.Tensor], held: Held, ranks: Ranks) -> list[torch.Tensor]:
    """Step 2: tell every rank what comes to its experts.

    Args:
        counts: [P], int64, for each rank here: the rows that it sends to each expert in a row.
        held: the experts of each rank.
        ranks: who exchanges.

    Returns:
        [R, E], int64, for each rank here: how many rows each rank sends to each of its experts.

    >>> from moe_reference.ranks import ListOfRanks
    >>> sent = [torch.tensor([5, 1, 0]), torch.tensor([0, 2, 7])]
    >>> exchange_counts(sent, [[0, 1], [2]], ListOfRanks(2))[0].tolist()
    [[5, 1], [0, 2]]
    """
    send = [[len(ids) for ids in held] for _ in ranks.here]
    receive = [[len(held[rank])] * ranks.size for rank in ranks.here]
    came = ranks.all_to_all(counts, send, receive)
    return [
        flat.view(ranks.size, len(held[rank])) for flat, rank in zip(came, ranks.here, strict=True)
    ]


def expert_major(counts: torch.Tensor) -> torch.Tensor:
    """Step 4: the order that takes rows from rank by rank to expert by expert.

    Args:
        counts: [R, E], int64, rows of each rank for each expert.

    Returns:
        [S]: row s of the new order is row `order[s]` of the old one. Ranks ascend in each expert.

    >>> expert_major(torch.tensor([[1, 2], [1, 0]])).tolist()
    [0, 3, 1, 2]
    """
    R, E = counts.shape
    experts_RE = torch.arange(E, device=counts.device).expand(R, E)
    return experts_RE.flatten().repeat_interleave(counts.flatten()).argsort(stable=True)


def experts_on_rows(
    rows: torch.Tensor, counts: torch.Tensor, local: ExpertWeights, config: ExpertsConfig
) -> torch.Tensor:
    """Step 4: each expert on its own rows, unweighted.

    Args:
        rows: [S, H], any float dtype, in the order of the experts.
        counts: [E], int64, adding up to S.
        local: the experts of this rank.
        config: how an expert computes.

    Returns:
        [S, H], computed in float32 or float64 and rounded to the rows' dtype.

    >>> two = ExpertWeights(torch.ones(2, 1, 1), down=torch.tensor([[[1.0]], [[10.0]]]))
    >>> rows, config = torch.tensor([[1.0], [2.0]]), ExpertsConfig("relu", gated=False)
    >>> experts_on_rows(rows, torch.tensor([1, 1]), two, config).tolist()
    [[1.0], [20.0]]
    """
    chunks = rows.to(accumulation_dtype(rows)).split(counts.tolist())
    outputs = [feed_forward(*each, config) for each in zip(chunks, one_by_one(local), strict=True)]
    # Where there is nothing to compute, the output still depends on all that came: gradients are
    # zero instead of None, and the backward of the rows' way here is not left out on this rank.
    nothing = sum(each[:0].sum() for each in (rows, *vars(local).values()) if each is not None)
    return (torch.cat([rows.new_zeros(0, rows.shape[1]), *outputs]) + nothing).to(rows.dtype)
