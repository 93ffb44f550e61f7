r"""Dispatch and combine: rows to their experts, and back to their tokens.

For ids $e_{tk}$, weights $w_{tk}$ and a function $f_e$ per expert the layer's routed part is

$$
y_t = \sum_{k=1}^{K} w_{tk} \, f_{e_{tk}}(x_t)
$$

Dispatch copies each token once per pair, so that all rows of one expert stand together; combine
is the weighted sum. In between stands whatever the experts do.

Dimension key: T tokens, H hidden size, K experts per token, E experts, S rows in expert order
(pairs that are here), C rows of a batched expert (capacity).

The slot of token t's k-th pair is t · K + k. An id below 0, or at or above E, means *not here*:
no row is made for it, and combine adds nothing, whatever its weight.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import torch

from moe_reference.alignment import check_counts, local_ids
from moe_reference.checks import IDS, FLOATS, check_count, check_tensor

Policy = Literal["position", "first_choice", "probs"]


def dispatch(
    x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token once per expert it is sent to, in expert order.

    Args:
        x: [T, H], any float dtype and strides.
        expert_ids: [T, K], int32 or int64.
        num_experts: E.

    Returns:
        rows [S, H], x's dtype, differentiable in x: row s is the token of slot s.
        tokens_per_expert [E], int64, adding up to S.
        slots [S], int64: ascending inside an expert, experts ascending.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Source: the stable sort of torchtitan and transformers; Megatron's permutation agrees.

    >>> x, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0], [1, -1]])
    >>> rows, tokens_per_expert, slots = dispatch(x, ids, num_experts=2)
    >>> rows[:, 0].tolist(), tokens_per_expert.tolist(), slots.tolist()
    ([1.0, 1.0, 2.0], [1, 2], [1, 0, 2])
    """
    check_tensor("x", x, ("T", "H"))
    check_tensor("expert_ids", expert_ids, (len(x), "K"), IDS)
    check_count("num_experts", num_experts)

    ids = local_ids(expert_ids, num_experts).flatten()
    order = ids.argsort(stable=True)
    slots_S = order[ids[order] >= 0]
    tokens_S = slots_S // max(expert_ids.shape[1], 1)
    # In the wide dtype a token's gradient is summed over its K rows before it is rounded.
    rows_SH = x.to(accumulation_dtype(x))[tokens_S].to(x.dtype)
    return rows_SH, count_tokens(expert_ids, num_experts), slots_S


def combine(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Add up each token's rows times their weights.

    Args:
        rows: [S, H], any float dtype and strides.
        slots: [S], int32 or int64, from 0 to T · K: the pair that a row belongs to. A row of slot
            T · K belongs to nobody and is left out, whatever it holds.
        weights: [T, K], any float dtype. A weight without a row counts for nothing, NaN too.

    Returns:
        [T, H], rows' dtype, differentiable in rows and weights. Multiplied and summed over K in
        float32 (float64 for float64 rows), then rounded once.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a slot is outside [0, T · K].

    >>> rows, slots = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([1, 0, 2])
    >>> combine(rows, slots, torch.tensor([[0.5, 2.0], [0.1, float("nan")]])).tolist()
    [[7.0], [10.0]]
    """
    check_tensor("rows", rows, ("S", "H"))
    check_tensor("slots", slots, (len(rows),), IDS)
    check_tensor("weights", weights, ("T", "K"))
    T, K = weights.shape
    _check_slots(slots, T * K)

    wide = accumulation_dtype(rows)
    somebodys = slots < T * K
    slots_S = slots[somebodys].long()
    weights_S = weights.to(wide).flatten()[slots_S]
    weighted_SH = weights_S[:, None] * rows.to(wide)[somebodys]
    pairs_SH = weighted_SH.new_zeros(T * K, rows.shape[1]).index_add(0, slots_S, weighted_SH)
    return pairs_SH.view(T, K, rows.shape[1]).sum(dim=1).to(rows.dtype)


def count_tokens(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many pairs each expert has: [E], int64. Two equal ids in a row count twice.

    Args:
        expert_ids: int32 or int64, any shape.
        num_experts: E.

    >>> count_tokens(torch.tensor([[0, 2], [2, 5]]), 3).tolist()
    [1, 0, 2]
    """
    ids = local_ids(expert_ids, num_experts)
    return torch.bincount(ids[ids >= 0], minlength=num_experts)


def inclusive_offsets(tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows end: the whole cumulative sum [E], int32, as grouped products take.

    Args:
        tokens_per_expert: [E], int32 or int64.

    Raises:
        ValueError: there are more rows than int32 can count.

    >>> inclusive_offsets(torch.tensor([2, 0, 3])).tolist()
    [2, 2, 5]
    """
    check_tensor("tokens_per_expert", tokens_per_expert, ("E",), IDS)
    ends_E = tokens_per_expert.long().cumsum(0)
    if len(ends_E) > 0 and ends_E[-1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"tokens_per_expert: expected at most 2^31 - 1 rows, got {ends_E[-1]}")
    return ends_E.to(torch.int32)


def inverse_permutation(permutation: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `permutation` [S]: where each element went.

    >>> inverse_permutation(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    check_tensor("permutation", permutation, ("S",), IDS)
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(places).scatter(0, permutation.long(), places)


def batch_rows(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, capacity: int
) -> torch.Tensor:
    """Give every expert the same number of rows: [S, H] to [E, C, H], zeros past the count.

    Args:
        rows: [S, H] in expert order, any float dtype.
        tokens_per_expert: [E], int32 or int64, from 0 to C each, adding up to S.
        capacity: C.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, a count is outside [0, C], or the counts do
            not add up to S.

    >>> batch_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2]), 2)[..., 0].tolist()
    [[1.0, 0.0], [2.0, 3.0]]
    """
    check_tensor("rows", rows, ("S", "H"))
    check_count("capacity", capacity)
    check_tensor("tokens_per_expert", tokens_per_expert, ("E",), IDS)
    check_counts(tokens_per_expert, capacity)
    _check_total(rows, tokens_per_expert)
    in_use_EC = rows_in_use(tokens_per_expert, capacity)
    batched_ECH = rows.new_zeros(*in_use_EC.shape, rows.shape[1])
    return batched_ECH.index_put((in_use_EC,), rows)


def unbatch_rows(rows: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """The inverse of `batch_rows`: the rows in use of [E, C, H], as [S, H] in expert order.

    Args:
        rows: [E, C, H], any float dtype.
        tokens_per_expert: [E], int32 or int64, from 0 to C each.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a count is outside [0, C].

    >>> unbatch_rows(torch.tensor([[[1.0], [0.0]], [[2.0], [3.0]]]), torch.tensor([1, 2])).tolist()
    [[1.0], [2.0], [3.0]]
    """
    check_tensor("rows", rows, ("E", "C", "H"))
    check_tensor("tokens_per_expert", tokens_per_expert, (len(rows),), IDS)
    check_counts(tokens_per_expert, rows.shape[1])
    return rows[rows_in_use(tokens_per_expert, rows.shape[1])]


def rows_in_use(tokens_per_expert: torch.Tensor, capacity: int) -> torch.Tensor:
    """True for the rows of a batch that hold a token: [E, C] from the counts [E].

    >>> rows_in_use(torch.tensor([0, 2]), 3).tolist()
    [[False, False, False], [True, True, False]]
    """
    rows_C = torch.arange(capacity, device=tokens_per_expert.device)
    return rows_C < tokens_per_expert[:, None]


def expert_capacity(
    num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int = 0
) -> int:
    r"""Rows that an expert may take: its even share times a factor.

    $$ C = \min(T, \max(C_{\min}, \lceil \mathrm{factor} \cdot T K / E \rceil)) $$

    Taken exactly, the factor as the decimal that is written: 1.1 · 10 is 11, where a product of
    floats lies above 11 and its ceiling is 12.

    Args:
        num_tokens: T.
        top_k: K.
        num_experts: E, at least 1.
        factor: capacity factor, finite and at least 0; 1 is the even share.
        minimum: least capacity; T is not exceeded for its sake.

    Raises:
        ValueError: a number is too small or not finite.

    Source: Megatron-LM's ceiling and DeepSpeed's minimum and limit of T. Megablocks and st-moe round
    down instead.

    >>> expert_capacity(100, 1, 10, 1.1), expert_capacity(8, 2, 4, 1.25), expert_capacity(3, 2, 2, 4)
    (11, 5, 3)
    """
    for name, value in (("num_tokens", num_tokens), ("top_k", top_k), ("minimum", minimum)):
        check_count(name, value)
    check_count("num_experts", num_experts, 1)
    if not 0 <= factor < math.inf:
        raise ValueError(f"factor: expected a finite number >= 0, got {factor}")
    share = Fraction(str(factor)) * num_tokens * top_k / num_experts
    return min(num_tokens, max(minimum, math.ceil(share)))


def drop_to_capacity(
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    capacity: int,
    policy: Policy = "position",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep at most C pairs of each expert.

    `position` keeps the lowest slots: tokens in order, a token's pairs in order. `first_choice`
    keeps all first choices before any second choice, tokens in order: by k, then t. `probs` keeps
    the highest weights, on a tie the lowest slot; a NaN weight is the lowest of all.

    Args:
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        num_experts: E.
        capacity: C, at least 0. Nothing is kept with 0.
        policy: which pairs are kept.

    Returns:
        weights [T, K], differentiable, and expert_ids [T, K], of the dtypes given. Where a pair
        was dropped or not here before, the id is -1 and the weight 0; the others are as they
        were, and are not normalised again.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or the policy is unknown.

    Source: Megatron-LM (`probs`, `position`); GShard (arXiv 2006.16668) for first choices first.

    >>> ids, weights = torch.tensor([[0], [0], [0]]), torch.tensor([[0.2], [0.9], [0.5]])
    >>> drop_to_capacity(weights, ids, 1, 2, "position")[1].tolist()
    [[0], [0], [-1]]
    >>> drop_to_capacity(weights, ids, 1, 2, "probs")[1].tolist()
    [[-1], [0], [0]]
    """
    check_tensor("weights", weights, ("T", "K"))
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_count("num_experts", num_experts)
    check_count("capacity", capacity)
    if policy not in get_args(Policy):
        raise ValueError(f"policy: expected one of {get_args(Policy)}, got {policy!r}")

    ids = local_ids(expert_ids, num_experts).flatten()
    by_priority = _priority(weights.detach(), policy)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for expert in range(num_experts):
        contenders = by_priority[ids[by_priority] == expert]
        kept[contenders[:capacity]] = True
    dropped_TK = ~kept.view(expert_ids.shape)
    return weights.masked_fill(dropped_TK, 0.0), expert_ids.masked_fill(dropped_TK, -1)


def _priority(weights_TK: torch.Tensor, policy: Policy) -> torch.Tensor:
    """All slots, the ones to keep first."""
    T, K = weights_TK.shape
    slots_TK = torch.arange(T * K, device=weights_TK.device).view(T, K)
    if policy == "position":
        return slots_TK.flatten()
    if policy == "first_choice":
        return slots_TK.T.flatten()
    known = weights_TK.masked_fill(weights_TK.isnan(), -torch.inf).flatten()
    return known.argsort(descending=True, stable=True)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over x are computed in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    wrong = slots[(slots < 0) | (slots > num_slots)]
    if wrong.numel() > 0:
        raise ValueError(f"slots: expected slots from 0 to {num_slots}, got {wrong[0].item()}")


def _check_total(rows: torch.Tensor, tokens_per_expert: torch.Tensor) -> None:
    total = int(tokens_per_expert.sum())
    if total != len(rows):
        raise ValueError(f"tokens_per_expert: expected a sum of {len(rows)}, got {total}")
