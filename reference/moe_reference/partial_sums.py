r"""Partial sums: ranks that see the same tokens, compute a part each, and add up.

Where every rank has all tokens, no rows travel. Each rank computes what it can with the experts, or
the slices of experts, that it holds. Its output is then one of two things, and must be known as one
of them:

- *partial*: the outputs of the ranks add up to the term, $y = \sum_r y^r$. It has to be summed.
- *whole*: every rank has all of it, $y = y^r$. Summed over the ranks it would be R times too much.

$$
y = \sum_{r} \sum_{i \in \text{partial}} y_i^r + \sum_{i \in \text{whole}} y_i
$$

So all partial terms are added on each rank first, reduced in one go, and the whole ones added
after. Sums are in float32, or float64 for float64 x, and rounded to x's dtype once.

Gradients: the loss is the sum of the ranks' own. Here all ranks have the same output, so the loss
of one of them counts, or 1 / R of each; counted on all of them, every gradient is R times too much.
A tensor that all ranks hold, as x, has the sum of its copies' gradients.

Dimension key: T tokens, H hidden size, K experts per token, E experts, R ranks.
"""

from collections.abc import Sequence

import torch

from moe_reference.activations import feed_forward, one_by_one
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import accumulation_dtype
from moe_reference.experts import check_experts, experts
from moe_reference.parallel_steps import Held, expert_places, held_experts
from moe_reference.ranks import Ranks, all_reduce

Tensors = Sequence[torch.Tensor]


def reduce_once(
    partial: Sequence[Tensors], whole: Sequence[Tensors], ranks: Ranks
) -> list[torch.Tensor]:
    """Add up terms, each one summed over the ranks exactly once: one all-reduce for all.

    Args:
        partial: terms, at least one; each has a tensor for each rank here, any shape, in the wide
            dtype.
        whole: terms that every rank has already; any shape and dtype that the partial ones have.
        ranks: who exchanges.

    Source: the bugs of shared experts that were reduced twice, or not at all.

    >>> from moe_reference.ranks import ListOfRanks
    >>> routed, shared = [torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([5.0])] * 2
    >>> reduce_once([routed], [shared], ListOfRanks(2))
    [tensor([8.]), tensor([8.])]
    """
    reduced = all_reduce([_add_up(terms) for terms in zip(*partial, strict=True)], ranks)
    return [_add_up(terms) for terms in zip(reduced, *whole, strict=True)]


def partial_of_held_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    held: Held,
    rank: int,
    config: ExpertsConfig,
    placement: Placement | None = None,
) -> torch.Tensor:
    """What the experts of one rank make of all tokens: [T, H], in the wide dtype, partial.

    The pairs of other ranks' experts are *not here*.

    Args:
        x: [T, H], the same on every rank; and so are the next two.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64, of all E experts.
        local: the experts of this rank.
        held: the experts of each rank, from `held_experts`.
        rank: this rank.
        config: how an expert computes.
        placement: copies of experts.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> config, ids = ExpertsConfig("relu", gated=False), torch.tensor([[0], [1]])
    >>> partial_of_held_experts(torch.ones(2, 1), torch.ones(2, 1), ids, one, [[0], [1]], 1, config)
    tensor([[0.],
            [1.]])
    """
    check_experts(local, x, config, len(held[rank]), "local")
    places_TK = expert_places(expert_ids, _num_experts(held, placement), held, placement)
    start = sum(map(len, held[:rank]))
    rows_TK = places_TK.where(places_TK >= start, -1) - start
    return experts(x.to(accumulation_dtype(x)), local, weights, rows_TK, config)


def replicated_experts(
    xs: Tensors,
    weights: Tensors,
    expert_ids: Tensors,
    locals: Sequence[ExpertWeights],
    num_experts: int,
    config: ExpertsConfig,
    ranks: Ranks,
    placement: Placement | None = None,
) -> list[torch.Tensor]:
    """Expert parallelism without all-to-all: tokens on all ranks, a share of the experts on each.

    Arguments and result are those of `expert_parallel.over_ranks`, but that x, weights and ids are
    the same on every rank. So has to be the choice among the copies of an expert: two ranks that
    choose differently compute a pair twice, or leave it out. `physical_ids` chooses by the ids
    alone, so that they agree.

    Source: DeepSeek-V3 inference code; transformers; vLLM without all-to-all.

    >>> from moe_reference.ranks import ListOfRanks
    >>> one, ids = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), torch.tensor([[0, 1]])
    >>> xs, weights = [torch.ones(1, 1)] * 2, [torch.ones(1, 2)] * 2
    >>> config = ExpertsConfig("relu", gated=False)
    >>> replicated_experts(xs, weights, [ids] * 2, [one] * 2, 2, config, ListOfRanks(2))
    [tensor([[2.]]), tensor([[2.]])]
    """
    held = held_experts(num_experts, ranks.size, placement)
    partial = [
        partial_of_held_experts(x, w, ids, local, held, rank, config, placement)
        for x, w, ids, local, rank in zip(xs, weights, expert_ids, locals, ranks.here, strict=True)
    ]
    return [y.to(x.dtype) for y, x in zip(reduce_once([partial], [], ranks), xs, strict=True)]


def tensor_parallel_experts(
    xs: Tensors,
    weights: Tensors,
    expert_ids: Tensors,
    parts: Sequence[ExpertWeights],
    config: ExpertsConfig,
    ranks: Ranks,
) -> list[torch.Tensor]:
    r"""A slice of every expert on each rank, and one reduction: $y = \sum_r \sum_k w_k f^r_{e_k}$.

    Args:
        xs: [T, H] for each rank here, the same on every rank; and so are the next two.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        parts: for each rank here its `slice_tensor_parallel`. The output bias is on one rank. The
            zeros of the others have gradients, too, and have to stay zero: do not train them.
        config: how an expert computes.
        ranks: who exchanges.

    Source: Megatron-LM (arXiv 1909.08053, section 3).

    >>> from moe_reference.ranks import ListOfRanks
    >>> half, ids = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), torch.tensor([[0]])
    >>> xs, weights, config = [torch.ones(1, 1)] * 2, [torch.ones(1, 1)] * 2, ExpertsConfig(
    ...     "relu", gated=False)
    >>> tensor_parallel_experts(xs, weights, [ids] * 2, [half] * 2, config, ListOfRanks(2))
    [tensor([[2.]]), tensor([[2.]])]
    """
    partial = [
        experts(x.to(accumulation_dtype(x)), part, w, ids, config)
        for x, part, w, ids in zip(xs, parts, weights, expert_ids, strict=True)
    ]
    return [y.to(x.dtype) for y, x in zip(reduce_once([partial], [], ranks), xs, strict=True)]


def partial_shared(
    x: torch.Tensor,
    part: ExpertWeights,
    config: ExpertsConfig,
    shared_gate: torch.Tensor | None = None,
    shared_scale: float = 1.0,
) -> torch.Tensor:
    r"""What a slice of the shared expert makes of all tokens: [T, H], in the wide dtype.

    $$ c \, \sigma(x \cdot v) \, f^r_{\text{shared}}(x) $$

    It is partial where `part` is a slice, and whole where it is the whole expert: the caller knows.
    The gate is whole on every rank. It is one factor for all partial outputs, so it may be applied
    before they are summed.

    Args:
        x: [T, H], the same on every rank.
        part: one expert, or its `slice_tensor_parallel`.
        config: how an expert computes.
        shared_gate: v, [1, H], or None.
        shared_scale: c.

    >>> one, config = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), ExpertsConfig(
    ...     "relu", gated=False)
    >>> partial_shared(torch.tensor([[3.0]]), one, config, shared_gate=torch.zeros(1, 1))
    tensor([[1.5000]])
    """
    check_experts(part, x, config, 1, "part")
    x_TH = x.to(accumulation_dtype(x))
    [shared] = one_by_one(part)
    y_TH = feed_forward(x_TH, shared, config)
    if shared_gate is not None:
        y_TH = y_TH * torch.sigmoid(x_TH @ shared_gate.to(x_TH).T)
    return y_TH * shared_scale


def shared_tensor_parallel(
    xs: Tensors,
    parts: Sequence[ExpertWeights],
    config: ExpertsConfig,
    ranks: Ranks,
    shared_gate: Tensors | None = None,
    shared_scale: float = 1.0,
) -> list[torch.Tensor]:
    """The shared expert, a slice on each rank, reduced once: [T, H] on every rank, x's dtype.

    Beside routed experts whose output is whole, as after the all-to-all, this is its only
    reduction. Beside partial ones, `reduce_once` takes both in one.

    Args:
        xs: [T, H] for each rank here, the same on every rank.
        parts: for each rank here its `slice_tensor_parallel` of the one expert.
        config: how an expert computes.
        ranks: who exchanges.
        shared_gate: [1, H] for each rank here, or None.
        shared_scale: the factor of the term.

    Source: TensorCast; Megatron-LM.

    >>> from moe_reference.ranks import ListOfRanks
    >>> half, config = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), ExpertsConfig(
    ...     "relu", gated=False)
    >>> shared_tensor_parallel([torch.tensor([[3.0]])] * 2, [half] * 2, config, ListOfRanks(2))
    [tensor([[6.]]), tensor([[6.]])]
    """
    gates = [None] * len(xs) if shared_gate is None else shared_gate
    partial = [
        partial_shared(x, part, config, gate, shared_scale)
        for x, part, gate in zip(xs, parts, gates, strict=True)
    ]
    return [y.to(x.dtype) for y, x in zip(reduce_once([partial], [], ranks), xs, strict=True)]


def _add_up(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).sum(dim=0)


def _num_experts(held: Held, placement: Placement | None) -> int:
    return sum(map(len, held)) if placement is None else len(placement.replica_count)
