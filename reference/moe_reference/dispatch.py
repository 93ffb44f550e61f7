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

import torch

from moe_reference.alignment import local_ids
from moe_reference.capacity import Policy as Policy
from moe_reference.capacity import drop_to_capacity as drop_to_capacity
from moe_reference.capacity import expert_capacity as expert_capacity
from moe_reference.checks import IDS, check_count, check_counts, check_tensor


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
    """The permutation that undoes `permutation` [S], int32 or int64: where each element went.

    Raises:
        TypeError: not a tensor of ids.
        ValueError: not every number from 0 to S - 1 once.

    >>> inverse_permutation(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    check_tensor("permutation", permutation, ("S",), IDS)
    places = torch.arange(len(permutation), device=permutation.device)
    if not torch.equal(permutation.long().sort().values, places):
        raise ValueError(
            f"permutation: expected each number from 0 to {len(places) - 1} once, got "
            f"{permutation.tolist()}"
        )
    return torch.empty_like(places).scatter(0, permutation.long(), places)


def batch_rows(rows: torch.Tensor, tokens_per_expert: torch.Tensor, capacity: int) -> torch.Tensor:
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
    """True for the rows of a batch that hold a token.

    Args:
        tokens_per_expert: [E], int32 or int64.
        capacity: C.

    Returns:
        [E, C], bool.

    >>> rows_in_use(torch.tensor([0, 2]), 3).tolist()
    [[False, False, False], [True, True, False]]
    """
    rows_C = torch.arange(capacity, device=tokens_per_expert.device)
    return rows_C < tokens_per_expert[:, None]


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over x are computed in: float64 for float64, float32 for anything narrower.

    Args:
        x: any shape and float dtype.

    >>> accumulation_dtype(torch.ones(1, dtype=torch.float16))
    torch.float32
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    wrong = slots[(slots < 0) | (slots > num_slots)]
    if wrong.numel() > 0:
        raise ValueError(f"slots: expected slots from 0 to {num_slots}, got {wrong[0].item()}")


def _check_total(rows: torch.Tensor, tokens_per_expert: torch.Tensor) -> None:
    total = int(tokens_per_expert.sum())
    if total != len(rows):
        raise ValueError(f"tokens_per_expert: expected a sum of {len(rows)}, got {total}")
