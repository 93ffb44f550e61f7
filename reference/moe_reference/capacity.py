r"""Capacity: how many pairs an expert takes, and which ones are dropped beyond that.

Dimension key: T tokens, K experts per token, E experts, C pairs per expert (capacity).

The slot of token t's k-th pair is t · K + k. An id below 0, or at or above E, means *not here*: the
pair takes no capacity.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import torch

from moe_reference.alignment import local_ids
from moe_reference.checks import IDS, check_count, check_tensor

Policy = Literal["position", "first_choice", "probs"]


def expert_capacity(
    num_tokens: int, top_k: int, num_experts: int, factor: float, minimum: int = 0
) -> int:
    r"""Rows that an expert may take: its even share times a factor.

    $$ C = \min(T, \max(C_{\min}, \lceil \mathrm{factor} \cdot T K / E \rceil)) $$

    Taken exactly, the factor as the decimal that is written: 1.1 · 100 is 110, where the product of
    floats is a little more and its ceiling 111.

    Args:
        num_tokens: T.
        top_k: K.
        num_experts: E, at least 1.
        factor: capacity factor, finite and at least 0; 1 is the even share.
        minimum: least capacity; T is not exceeded for its sake.

    Raises:
        ValueError: a number is too small or not finite.

    Source: Megatron-LM's ceiling; DeepSpeed's minimum and limit of T. Megablocks and st-moe round
    down instead.

    >>> expert_capacity(1000, 1, 10, factor=1.1), expert_capacity(3, 2, 2, factor=4)
    (110, 3)
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
