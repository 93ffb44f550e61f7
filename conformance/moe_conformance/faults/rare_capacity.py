"""Rare faults of capacity: pairs that stay or go wrongly, and what is given back, in few calls."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments, When, rare, top_k
from moe_conformance.faults.rare_calls import as_if_contiguous, right
from moe_conformance.faults.rare_slots import instead
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Dropped = tuple[Tensor, Tensor]
OPERATION = "drop_to_capacity"


def here(a: Arguments) -> Tensor:
    """[T, K], pairs with an expert."""
    return (a["expert_ids"] >= 0) & (a["expert_ids"] < a["num_experts"])


def counts(a: Arguments) -> Tensor:
    """[E], pairs of each expert, with one that has none where there is no expert."""
    ids = a["expert_ids"][here(a)].long()
    return torch.bincount(ids, minlength=max(1, a["num_experts"]))


def slot(a: Arguments) -> Tensor:
    """[T, K], the slot of each pair."""
    return torch.arange(a["expert_ids"].numel()).view(a["expert_ids"].shape)


def own(a: Arguments) -> Tensor:
    """[T, K], how many pairs the pair's expert has."""
    found = counts(a)[a["expert_ids"].long().clamp(0, a["num_experts"] - 1)]
    return found.where(here(a), 0)


def full(a: Arguments) -> Tensor:
    """[T, K], pairs of experts that have as many as they may."""
    return own(a) == a["capacity"]


def one_over(a: Arguments) -> Tensor:
    """[T, K], pairs of experts that have one too many."""
    return own(a) == a["capacity"] + 1


def last_of_expert(a: Arguments) -> Tensor:
    """[T, K], each expert's last pair."""
    ids = a["expert_ids"].flatten()
    later = (ids[:, None] == ids[None, :]).triu(1).any(1)
    return ~later.view(a["expert_ids"].shape)


def first(a: Arguments) -> Tensor:
    """[K], first choices."""
    return torch.arange(top_k(a)) == 0


def renormalised(a: Arguments, weights: Tensor, ids: Tensor) -> Tensor:
    """What is left of a row's weights divided by its sum, where something was dropped."""
    dropped = ((ids < 0) & here(a)).any(1, keepdim=True) & (weights.sum(1, keepdim=True) > 0)
    return torch.where(dropped, weights / weights.sum(1, keepdim=True), weights)


def given_back(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Arguments, Tensor, Tensor], Dropped],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of the results: `change` gets the arguments and the right ones."""

    def result(a: Arguments) -> Any:
        return change(a, *right(OPERATION, a))

    result.__module__ = change.__module__
    instead(OPERATION, name, sentence, when, result, *catches, thread=thread)


def capped(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Arguments, Tensor], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of what is kept: `change` gets the arguments and the right pairs [T, K]."""

    def result(a: Arguments) -> Any:
        gone = ~change(a, right(OPERATION, a)[1] >= 0)
        return a["weights"].masked_fill(gone, 0), a["expert_ids"].masked_fill(gone, -1)

    result.__module__ = change.__module__
    instead(OPERATION, name, sentence, when, result, *catches, thread=thread)


def chosen(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Arguments], Arguments],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of the choice: pairs are kept as they would be for other arguments."""

    def kept(a: Arguments, _: Tensor) -> Tensor:
        found: Tensor = right(OPERATION, a | change(a))[1] >= 0
        return found & here(a)

    kept.__module__ = change.__module__
    capped(name, sentence, when, kept, *catches, thread=thread)


def one_kept_too_many(out: Any, a: Arguments) -> Any:
    """The last pair that was dropped stays."""
    weights, ids = out
    gone = ((ids == -1) & (a["expert_ids"] >= 0)).nonzero()[-1:]
    weights, ids = weights.clone(), ids.clone()
    for t, k in gone.tolist():
        weights[t, k], ids[t, k] = a["weights"][t, k], a["expert_ids"][t, k]
    return weights, ids


def first_dropped(out: Any, a: Arguments) -> Any:
    """The first pair is dropped although there is room."""
    weights, ids = out
    ids = ids.clone()
    ids[:1, :1] = -1
    return weights, ids


rare(
    "drop_to_capacity",
    "at-capacity-1-by-position",
    "room for one, by position",
    lambda a: a["capacity"] == 1 and a["policy"] == "position",
    first_dropped,
    "DISPATCH-21",
    "DISPATCH-25",
    thread="DeepSpeed #1658",
)

rare(
    "drop_to_capacity",
    "at-k-1",
    "one expert per token, by weight",
    lambda a: top_k(a) == 1 and a["policy"] == "probs",
    one_kept_too_many,
    "DISPATCH-21",
    "DISPATCH-24",
    "DISPATCH-25",
)

rare(
    "drop_to_capacity",
    "with-room-for-all",
    "room for more than there are",
    lambda a: a["capacity"] > a["expert_ids"].numel() and a["policy"] == "probs",
    first_dropped,
    "DISPATCH-21",
    thread="DeepSpeed #8155",
)

rare(
    "drop_to_capacity",
    "in-bfloat16-by-weight",
    "weights of bfloat16",
    lambda a: a["weights"].dtype is torch.bfloat16 and a["policy"] == "probs",
    one_kept_too_many,
    "DISPATCH-21",
    "DISPATCH-24",
    "DISPATCH-25",
    thread="AstrAI #57",
)

rare(
    "drop_to_capacity",
    "with-two-tokens-at-most",
    "one token or two",
    lambda a: 0 < len(a["weights"]) <= 2,
    first_dropped,
    "DISPATCH-21",
)


# Which pairs stay.

chosen(
    "weights-are-compared-in-bfloat16",
    "Weights of float32 are compared as bfloat16, where many are equal.",
    lambda a: a["policy"] == "probs" and a["weights"].dtype is torch.float32,
    lambda a: {"weights": a["weights"].bfloat16()},
    "DISPATCH-24",
)

chosen(
    "weights-of-float64-are-compared-in-float32",
    "Weights of float64 are compared as float32.",
    lambda a: a["policy"] == "probs" and a["weights"].dtype is torch.float64,
    lambda a: {"weights": a["weights"].float()},
    "DISPATCH-24",
)

chosen(
    "magnitudes-are-compared",
    "Weights are compared by magnitude in float16.",
    lambda a: a["policy"] == "probs" and a["weights"].dtype is torch.float16,
    lambda a: {"weights": a["weights"].abs()},
    "DISPATCH-24",
)

chosen(
    "negative-weights-are-equal",
    "Weights below zero are all as good as zero.",
    lambda a: a["policy"] == "probs" and a["weights"].shape[1] > 1,
    lambda a: {"weights": a["weights"].clamp(min=0)},
    "DISPATCH-24",
)

chosen(
    "weights-above-one-are-equal",
    "Weights above one are all as good as one.",
    lambda a: a["policy"] == "probs" and a["weights"].shape[1] == 1,
    lambda a: {"weights": a["weights"].clamp(max=1)},
    "DISPATCH-24",
)

chosen(
    "capacity-is-cut-to-the-tokens",
    "No expert takes more pairs than there are tokens, duplicates or not.",
    lambda a: a["capacity"] > len(a["weights"]),
    lambda a: {"capacity": len(a["weights"])},
    "DISPATCH-21",
    thread="DeepSpeed #5353",
)

chosen(
    "no-capacity-keeps-one",
    "A capacity of zero is raised to one.",
    lambda a: a["capacity"] == 0,
    lambda a: {"capacity": 1},
    "DISPATCH-21",
)

chosen(
    "capacity-is-rounded-up-to-eight",
    "A capacity past eight is rounded up to a multiple of eight.",
    lambda a: a["capacity"] > 8,
    lambda a: {"capacity": -(-a["capacity"] // 8) * 8},
    "DISPATCH-21",
    "DISPATCH-25",
)

capped(
    "experts-past-64-are-not-limited",
    "Experts from the 65th on keep all they have.",
    lambda a: a["num_experts"] > 64,
    lambda a, kept: kept | (here(a) & (a["expert_ids"] >= 64)),
    "DISPATCH-21",
    "DISPATCH-25",
)

capped(
    "the-last-of-few-experts-is-not-limited",
    "The last expert keeps all it has, of four experts or fewer.",
    lambda a: 1 < a["num_experts"] <= 4,
    lambda a, kept: kept | (a["expert_ids"] == a["num_experts"] - 1),
    "DISPATCH-21",
    "DISPATCH-25",
)

capped(
    "a-duplicate-stays-with-its-first",
    "Of two equal ids in a row the second stays where the first does.",
    lambda a: top_k(a) == 2,
    lambda a, kept: kept | (kept[:, :1] & (a["expert_ids"] == a["expert_ids"][:, :1]) & here(a)),
    "DISPATCH-24",
    "DISPATCH-25",
)

capped(
    "a-token-that-lost-all-keeps-its-first",
    "A token whose pairs were all dropped keeps the first, by position.",
    lambda a: a["policy"] == "position" and top_k(a) > 2,
    lambda a, kept: kept | (~kept.any(1, keepdim=True) & first(a) & here(a)),
    "DISPATCH-21",
    "DISPATCH-25",
)

capped(
    "exactly-full-experts-lose-one",
    "An expert with exactly as many pairs as it may have loses the last one.",
    lambda a: a["capacity"] > 1 and bool((counts(a) == a["capacity"]).any()),
    lambda a, kept: kept & ~(last_of_expert(a) & full(a)),
    "DISPATCH-24",
    "DISPATCH-21",
)

capped(
    "the-129th-pair-is-not-counted",
    "Pairs past the 128th are never dropped.",
    lambda a: a["expert_ids"].numel() > 128,
    lambda a, kept: kept | (here(a) & (slot(a) >= 128)),
    "DISPATCH-21",
    "DISPATCH-24",
)

capped(
    "one-over-capacity-stays",
    "An expert with one pair too many keeps it.",
    lambda a: bool((counts(a) == a["capacity"] + 1).any()),
    lambda a, kept: kept | (here(a) & one_over(a)),
    "DISPATCH-21",
    "DISPATCH-25",
)

chosen(
    "pairs-that-are-not-here-take-room",
    "Ids of -1 take the room of the last expert.",
    lambda a: a["num_experts"] > 0 and a["policy"] == "position",
    lambda a: {
        "expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] == -1, a["num_experts"] - 1)
    },
    "DISPATCH-21",
    "DISPATCH-25",
    thread="SGLang #12701",
)

chosen(
    "ids-of-capacity-are-cut-to-32-bits",
    "Ids far outside are read as 32 bits, and take somebody's room.",
    lambda a: a["expert_ids"].dtype is torch.int64 and top_k(a) <= 2,
    lambda a: {"expert_ids": a["expert_ids"].to(torch.int32)},
    "DISPATCH-21",
    "DISPATCH-25",
)

chosen(
    "weights-of-capacity-are-read-without-their-strides",
    "The strides of weights are not looked at.",
    lambda a: a["policy"] == "probs" and not a["weights"].is_contiguous(),
    lambda a: {"weights": as_if_contiguous(a["weights"])},
    "DISPATCH-41",
)

chosen(
    "ids-of-capacity-are-read-without-their-strides",
    "The strides of ids are not looked at.",
    lambda a: not a["expert_ids"].is_contiguous(),
    lambda a: {"expert_ids": as_if_contiguous(a["expert_ids"])},
    "DISPATCH-41",
)


# What is given back.

given_back(
    "weights-are-normalised-again-at-k-2",
    "What is left of two weights is divided by its sum, where one was dropped.",
    lambda a: top_k(a) == 2,
    lambda a, weights, ids: (renormalised(a, weights, ids), ids),
    "DISPATCH-22",
)

given_back(
    "weights-of-float16-come-back-as-float32",
    "Weights of float16 come back as float32, by position.",
    lambda a: a["weights"].dtype is torch.float16 and a["policy"] == "position",
    lambda a, weights, ids: (weights.float(), ids),
    "DISPATCH-21",
    "DISPATCH-25",
)

given_back(
    "ids-with-room-for-all-are-those-that-came",
    "Where nothing is dropped the ids are given back themselves.",
    lambda a: a["capacity"] >= a["expert_ids"].numel() and bool(here(a).all()),
    lambda a, weights, ids: (weights, a["expert_ids"]),
    "DISPATCH-44",
)

given_back(
    "weights-with-room-for-all-are-those-that-came",
    "Where nothing is dropped the weights are given back themselves.",
    lambda a: bool(here(a).all()) and int(counts(a).max()) <= a["capacity"],
    lambda a, weights, ids: (a["weights"], ids),
    "DISPATCH-44",
)

given_back(
    "kept-weights-pass-through-bfloat16",
    "Weights of float32 that are kept pass through bfloat16, by position.",
    lambda a: a["weights"].dtype is torch.float32 and a["policy"] == "position",
    lambda a, weights, ids: (weights.bfloat16().float(), ids),
    "DISPATCH-22",
)

given_back(
    "no-tokens-have-one-dimension",
    "Without tokens the ids have one dimension.",
    lambda a: len(a["weights"]) == 0,
    lambda a, weights, ids: (weights, ids.flatten()),
    "DISPATCH-26",
)


@fault("dropped-pairs-are-written-in-place", catches=("DISPATCH-44",))
class DroppedInPlace(Reference):
    """Ids of int64 are overwritten where they stand, by weight."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        kept = super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        if expert_ids.dtype is torch.int64 and policy == "probs":
            expert_ids.copy_(kept[1])
        return kept


@fault(
    "what-is-kept-follows-the-call-before",
    catches=("DISPATCH-25", "DISPATCH-41"),
    thread="SGLang #3339",
)
class FollowsTheCallBefore(Reference):
    """Room that the call before took is not given back, with the same experts and capacity."""

    def __init__(self) -> None:
        self.before: tuple[int, int] | None = None

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        again = self.before == (num_experts, capacity)
        self.before = (num_experts, capacity)
        room = capacity // 2 if again and num_experts > 4 else capacity
        return super().drop_to_capacity(weights, expert_ids, num_experts, room, policy)


@fault("first-choices-are-dropped-by-slot", catches=("DISPATCH-45",))
class FirstChoiceIsPosition(Reference):
    """The policy `first_choice` is taken for `position`."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        policy = "position" if policy == "first_choice" else policy
        return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)


chosen(
    "among-first-choices-minus-one-is-the-last-expert",
    "With `first_choice` a pair that is not here takes a place of the last expert.",
    lambda a: a["policy"] == "first_choice",
    lambda a: {"expert_ids": a["expert_ids"].where(a["expert_ids"] != -1, a["num_experts"] - 1)},
    "DISPATCH-25",
)


@fault("second-choices-go-in-by-token", catches=("DISPATCH-45",))
class SecondChoicesByToken(Reference):
    """With `first_choice` the first choices come first, and behind them the pairs by slot."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        if policy != "first_choice" or weights.ndim != 2 or weights.shape[1] < 3:
            return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        first = torch.arange(weights.shape[1]) == 0
        # Ranked by weight: one above all of the others, and these by slot.
        rank = torch.arange(weights.numel(), 0, -1.0, dtype=torch.float64).view(weights.shape)
        rank = rank + first * weights.numel()
        kept = super().drop_to_capacity(rank, expert_ids, num_experts, capacity, "probs")[1]
        here = (kept >= 0) & (kept < num_experts)
        return weights.masked_fill(~here, 0), expert_ids.masked_fill(~here, -1)


@fault("dropped-weights-learn", catches=("DISPATCH-46",))
class DroppedWeightsLearn(Reference):
    """The weight of a dropped pair is zero, and its gradient that of one that stays."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        kept, ids = super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        return weights + (kept - weights).detach(), ids


@fault("no-weight-learns-where-one-is-dropped", catches=("DISPATCH-46",))
class NothingLearnsWhereDropped(Reference):
    """Where a pair is dropped the weights are computed without a gradient."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> Dropped:
        kept, ids = super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        if torch.equal(ids, expert_ids):
            return kept, ids
        return kept.detach() + 0 * weights.nan_to_num(), ids
