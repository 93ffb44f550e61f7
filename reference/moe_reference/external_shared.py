r"""The shared expert on ranks of its own: one exchange takes tokens to it and to routed experts.

Every token sees the shared expert, so that the ranks that hold nothing else are busy with it while
the others compute what was routed to them. To the exchange it is S experts more, all of them the
same, and every token has one pair more:

$$
y_t = \sum_{k=1}^{K} w_{tk} \, f_{e_{tk}}(x_t)
    + c \, \sigma(x_t \cdot v) \, f_{E + t \bmod S}(x_t)
$$

Dimension key: T tokens, H hidden size, K experts per token, E routed experts, R ranks, S ranks with
the shared expert.
"""

from collections.abc import Sequence

import torch

from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import accumulation_dtype, inverse_permutation
from moe_reference.expert_parallel import over_ranks
from moe_reference.placement import add_shared_column, assign_external_shared
from moe_reference.ranks import Ranks

Tensors = Sequence[torch.Tensor]


def external_shared_placement(
    num_experts: int, num_shared_ranks: int, world_size: int
) -> Placement:
    """The shared expert on the first S ranks, the routed ones on the others, as one placement.

    Of E + S experts, each in one copy: the routed ones, and the shared one S times.

    Args:
        num_experts: E.
        num_shared_ranks: S.
        world_size: R.

    Raises:
        TypeError, ValueError: as `assign_external_shared`.

    >>> external_shared_placement(4, 1, 3).physical_to_logical.tolist()
    [4, 0, 1, 2, 3]
    """
    shares = [
        assign_external_shared(num_experts, num_shared_ranks, world_size, rank)
        for rank in range(world_size)
    ]
    order = torch.tensor([e for share in shares for e in share], dtype=torch.int64)
    rank_of = [rank for rank, share in enumerate(shares) for _ in share]
    return Placement(
        order,
        inverse_permutation(order)[:, None],
        torch.ones_like(order),
        torch.tensor(rank_of, dtype=torch.int64),
    )


def external_shared_parallel(
    xs: Tensors,
    weights: Tensors,
    expert_ids: Tensors,
    locals: Sequence[ExpertWeights],
    num_experts: int,
    num_shared_ranks: int,
    config: ExpertsConfig,
    ranks: Ranks,
    shared_gate: Tensors | None = None,
    shared_scale: float = 1.0,
) -> list[torch.Tensor]:
    r"""Expert parallelism with the shared expert on ranks of its own: one exchange for both.

    Every token has one pair more, with the weight $c \, \sigma(x \cdot v)$, so that the shared
    expert's gate and scale stay with the token. The shared expert may be as wide as it likes.

    Args:
        xs: [T, H] for each rank here.
        weights: [T, K] for each rank here.
        expert_ids: [T, K] for each rank here, of the routed experts.
        locals: for each rank here the shared expert, or its share of the routed ones.
        num_experts: E, the routed ones.
        num_shared_ranks: S, at least 1.
        config: how an expert computes.
        ranks: who exchanges.
        shared_gate: v, [1, H] for each rank here, or None.
        shared_scale: c.

    Raises:
        ValueError: a gate or a scale with weights on the input, where it would enter the expert.

    Source: TensorCast.

    >>> from moe_reference.ranks import ListOfRanks
    >>> experts = [ExpertWeights(torch.ones(1, 1, 1), torch.full((1, 1, 1), n)) for n in (5.0, 1.0)]
    >>> xs, ids = [torch.ones(1, 1), torch.ones(0, 1)], torch.zeros(1, 1, dtype=torch.int64)
    >>> weights, config = [torch.ones(1, 1), torch.ones(0, 1)], ExpertsConfig("relu", gated=False)
    >>> external_shared_parallel(
    ...     xs, weights, [ids, ids[:0]], experts, 1, 1, config, ListOfRanks(2))[0]
    tensor([[6.]])
    """
    if config.weight_on == "input" and not (shared_gate is None and shared_scale == 1.0):
        raise ValueError("shared_gate: expected None and a scale of 1 with weights on the input")
    placement = external_shared_placement(num_experts, num_shared_ranks, ranks.size)
    more_weights, more_ids = [], []
    for i, (x, w, ids) in enumerate(zip(xs, weights, expert_ids, strict=True)):
        w, ids = add_shared_column(w.to(accumulation_dtype(x)), ids, num_experts, num_shared_ranks)
        gate_T1 = shared_scale * torch.ones_like(w[:, -1:])
        if shared_gate is not None:
            gate_T1 = gate_T1 * torch.sigmoid(x.to(w) @ shared_gate[i].to(w).T)
        more_weights.append(torch.cat([w[:, :-1], gate_T1], dim=1))
        more_ids.append(ids)
    E = num_experts + num_shared_ranks
    return over_ranks(xs, more_weights, more_ids, locals, E, config, ranks, placement)
