"""Rare faults of dispatch: rows, counts, slots and gradients that are wrong in few calls."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, When, rare, tokens, top_k
from moe_conformance.faults.rare_calls import (
    as_if_contiguous,
    passed_through,
    right,
)
from moe_conformance.faults.rare_slots import altered, instead
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Dispatched = tuple[Tensor, Tensor, Tensor]


def here(a: Arguments) -> Tensor:
    """[T, K], pairs with an expert."""
    return (a["expert_ids"] >= 0) & (a["expert_ids"] < a["num_experts"])


def counts(a: Arguments) -> Tensor:
    """[E], rows of each expert, with one that has none where there is no expert."""
    ids = a["expert_ids"][here(a)].long()
    return torch.bincount(ids, minlength=max(1, a["num_experts"]))


def pairs(a: Arguments) -> int:
    """S."""
    return int(here(a).sum())


def slots_of(a: Arguments) -> Tensor:
    """[S], the slot of each row."""
    found: Tensor = right("dispatch", a)[2]
    return found


def nobodys(a: Arguments) -> Tensor:
    """[T], tokens without any expert."""
    return ~here(a).any(1)


def equal_pair(a: Arguments) -> Tensor:
    """[T], tokens whose first and last id are the same."""
    return here(a).all(1) & (a["expert_ids"][:, 0] == a["expert_ids"][:, -1])


def first_equal(a: Arguments) -> Tensor:
    """[T·K], the slot of the first of equal ids in a row."""
    ids = a["expert_ids"]
    first = (ids[:, :, None] == ids[:, None, :]).int().argmax(2)
    return (first + torch.arange(len(ids))[:, None] * ids.shape[1]).flatten()


def pair_exchanged(rows: Tensor, a: Arguments) -> Tensor:
    """The rows with those of the first expert that has two in each other's place."""
    ends = counts(a).cumsum(0)
    end = int(ends[(counts(a) == 2).nonzero()[0, 0]])
    order = torch.arange(len(rows))
    order[end - 2 : end] = order[end - 2 : end].flip(0)
    return rows[order]


def last_columns(value: Tensor, number: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The last columns changed."""
    return torch.cat([value[:, :-number], change(value[:, -number:])], 1)


def dispatched(
    part: int,
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Tensor, Arguments], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of one of the three results of `dispatch`: rows, counts or slots."""

    def result(a: Arguments) -> Any:
        parts = list(right("dispatch", a))
        parts[part] = change(parts[part], a)
        return tuple(parts)

    result.__module__ = change.__module__
    instead("dispatch", name, sentence, when, result, *catches, thread=thread)


def x_gradient(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Tensor, Arguments], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of the gradient of x."""

    def other(a: Arguments) -> Arguments:
        return {"x": with_gradient(a["x"], lambda g: change(g, a))}

    other.__module__ = change.__module__
    altered("dispatch", name, sentence, when, other, *catches, thread=thread)


class Narrow(torch.autograd.Function):
    """Rows of tokens whose gradients are summed in their own dtype, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens_S: Tensor) -> Tensor:
        ctx.tokens, ctx.number = tokens_S, len(x)
        return x[tokens_S]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        summed = grad.new_zeros(ctx.number, grad.shape[1])
        for token, row in zip(ctx.tokens.tolist(), grad, strict=True):
            summed[token] += row
        return summed, None


def row_moved(out: Any, a: Arguments) -> Any:
    """The last two rows stand in each other's place."""
    rows, number, slots = out
    order = torch.arange(len(rows))
    order[-2:] = order[-2:].flip(0)
    return rows[order], number, slots


def count_grown(out: Any, a: Arguments) -> Any:
    """The last expert counts one row too many."""
    rows, number, slots = out
    changed = number.clone()
    changed[-1:] += 1
    return rows, changed, slots


rare(
    "dispatch",
    "at-k-1-in-float16",
    "one expert per token in float16",
    lambda a: top_k(a) == 1 and a["x"].dtype is torch.float16,
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    "DISPATCH-27",
)

rare(
    "dispatch",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: tokens(a) > 64,
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    "DISPATCH-27",
    thread="aiter #4041",
)

rare(
    "dispatch",
    "with-one-token",
    "a single token",
    lambda a: tokens(a) == 1,
    count_grown,
    "DISPATCH-02",
)

rare(
    "dispatch",
    "where-the-last-expert-is-alone",
    "all rows at the last expert",
    lambda a: a["num_experts"] > 1 and int(counts(a)[:-1].sum()) == 0 and int(counts(a).sum()) > 0,
    count_grown,
    "DISPATCH-02",
    "DISPATCH-42",
)

rare(
    "dispatch",
    "with-one-expert",
    "a single expert",
    lambda a: a["num_experts"] == 1,
    count_grown,
    "DISPATCH-02",
    "DISPATCH-09",
)

rare(
    "dispatch",
    "with-strides-in-bfloat16",
    "a transposed x of bfloat16",
    lambda a: not a["x"].is_contiguous() and a["x"].dtype is torch.bfloat16,
    row_moved,
    "DISPATCH-10",
    thread="SGLang #15432",
)

rare(
    "dispatch",
    "with-a-duplicate-at-k-2",
    "two equal ids in a row of two",
    lambda a: (
        top_k(a) == 2
        and len(a["expert_ids"]) > 0
        and bool((a["expert_ids"][:, 0] == a["expert_ids"][:, -1]).any())
    ),
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    thread="DeepSeek moe_infer scatter_",
)

rare(
    "dispatch",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[1] == 1,
    count_grown,
    "DISPATCH-02",
    "DISPATCH-07",
    "DISPATCH-09",
)


# Rows.

dispatched(
    0,
    "the-last-columns-of-odd-widths-are-zero",
    "Rows are copied four values at a time, and what is left of a row is not.",
    lambda a: a["x"].shape[1] % 4 == 3,
    lambda rows, a: last_columns(rows, 3, lambda c: c * 0),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "the-column-after-a-tile-is-zero",
    "A row with one value more than a tile of 16 or its multiples lacks the last one.",
    lambda a: a["x"].shape[1] > 16 and a["x"].shape[1] % 16 == 1,
    lambda rows, a: last_columns(rows, 1, lambda c: c * 0),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "columns-past-64-are-those-before",
    "Values of a row past the 64th are read from its beginning.",
    lambda a: a["x"].shape[1] > 64,
    lambda rows, a: torch.cat([rows[:, :64], rows[:, : rows.shape[1] - 64]], 1),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "rows-of-float64-pass-through-float32",
    "Rows of float64 pass through float32 with one expert per token.",
    lambda a: a["x"].dtype is torch.float64 and top_k(a) == 1,
    lambda rows, a: rows.float().double(),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "subnormals-of-float16-are-zero",
    "Subnormal numbers of float16 are flushed.",
    lambda a: a["x"].dtype is torch.float16,
    lambda rows, a: rows.masked_fill(rows.abs() < torch.finfo(torch.float16).tiny, 0),
    "DISPATCH-01",
    "DISPATCH-27",
)

dispatched(
    0,
    "zeros-lose-their-sign",
    "Minus zero becomes zero in bfloat16.",
    lambda a: a["x"].dtype is torch.bfloat16,
    lambda rows, a: rows.masked_fill(rows == 0, 0.0),
    "DISPATCH-01",
    "DISPATCH-27",
)

dispatched(
    0,
    "infinity-becomes-the-largest-in-bfloat16",
    "Rows are clamped to what is finite in bfloat16.",
    lambda a: a["x"].dtype is torch.bfloat16,
    lambda rows, a: rows.clamp(torch.finfo(torch.bfloat16).min, torch.finfo(torch.bfloat16).max),
    "DISPATCH-01",
)

dispatched(
    0,
    "a-token-of-nobody-leaves-its-rows-to-the-next",
    "Where a token has no expert at all the last row is the one before it.",
    lambda a: bool(nobodys(a).any()) and pairs(a) > 1,
    lambda rows, a: torch.cat([rows[:-1], rows[-2:-1]]),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "rows-past-an-even-count-are-exchanged",
    "Two rows of one expert, its only ones, stand in each other's place.",
    lambda a: bool((counts(a) == 2).any()) and top_k(a) <= 2,
    lambda rows, a: pair_exchanged(rows, a),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "rows-of-nine-experts-per-token-repeat-the-first",
    "Rows of pairs past a token's eighth are those of the token after it.",
    lambda a: top_k(a) > 8 and tokens(a) > 1,
    lambda rows, a: (
        a["x"]
        .roll(-1, 0)[slots_of(a) // top_k(a)]
        .where((slots_of(a) % top_k(a) >= 8)[:, None], rows)
    ),
    "DISPATCH-01",
    "DISPATCH-17",
)

dispatched(
    0,
    "rows-are-x-where-nothing-moves",
    "Ids that are in order already make the rows x itself.",
    lambda a: top_k(a) == 1 and torch.equal(slots_of(a), torch.arange(tokens(a))),
    lambda rows, a: a["x"],
    "NUM-03",
)

dispatched(
    0,
    "rows-of-float16-are-float32-with-one-expert",
    "With one expert rows are left in the dtype of the sums.",
    lambda a: a["num_experts"] == 1 and a["x"].dtype is torch.float16,
    lambda rows, a: rows.float(),
    "DISPATCH-08",
)

dispatched(
    0,
    "no-rows-have-no-columns",
    "Without any pair the rows are a tensor of no dimension but one.",
    lambda a: pairs(a) == 0 and tokens(a) > 0,
    lambda rows, a: rows.new_zeros(0),
    "DISPATCH-01",
    "DISPATCH-17",
    thread="DeepSeek moe_infer empty batch",
)


# Counts and slots.

dispatched(
    1,
    "counts-beyond-1024-experts-are-not-written",
    "A block of 1024 threads counts, one for each expert, and the rest stay zero.",
    lambda a: a["num_experts"] > 1024,
    lambda number, a: number * (torch.arange(len(number)) < 1024),
    "DISPATCH-02",
)

dispatched(
    1,
    "counts-of-dispatch-are-bytes",
    "Counts pass through a byte.",
    lambda a: bool((counts(a) > 255).any()),
    lambda number, a: number & 0xFF,
    "DISPATCH-02",
    "DISPATCH-07",
)

dispatched(
    1,
    "counts-of-dispatch-are-signed-bytes",
    "Counts pass through a signed byte.",
    lambda a: bool((counts(a) > 127).any()),
    lambda number, a: number.to(torch.int8).long(),
    "DISPATCH-02",
    "DISPATCH-07",
)

dispatched(
    1,
    "counts-past-a-warp-of-experts-are-exchanged",
    "Counts of the 32nd and the 33rd expert stand in each other's place.",
    lambda a: a["num_experts"] > 32,
    lambda number, a: torch.cat([number[:31], number[31:33].flip(0), number[33:]]),
    "DISPATCH-02",
    "DISPATCH-42",
)

dispatched(
    1,
    "an-id-of-e-counts-for-the-last",
    "The counts, and not the rows, hold ids of E.",
    lambda a: a["num_experts"] > 0 and top_k(a) == 1,
    lambda number, a: torch.cat(
        [number[:-1], number[-1:] + (a["expert_ids"] == a["num_experts"]).sum()]
    ),
    "DISPATCH-02",
    "DISPATCH-35",
)

dispatched(
    1,
    "counts-are-those-of-float16",
    "Counts pass through float16 whose whole numbers end at 2048.",
    lambda a: bool((counts(a) > 2048).any()),
    lambda number, a: number.half().long(),
    "DISPATCH-35",
)

dispatched(
    1,
    "counts-of-no-tokens-are-empty",
    "Without tokens there are no counts.",
    lambda a: tokens(a) == 0 and a["num_experts"] > 1,
    lambda number, a: number[:0],
    "DISPATCH-09",
)

dispatched(
    2,
    "slots-have-the-wrong-k-with-duplicates",
    "Where a token has an expert twice its second slot is its first one.",
    lambda a: top_k(a) >= 4,
    lambda slots, a: first_equal(a)[slots],
    "DISPATCH-17",
    "DISPATCH-07",
)

dispatched(
    2,
    "slots-of-dispatch-are-signed-bytes",
    "Slots pass through a signed byte.",
    lambda a: a["expert_ids"].numel() > 128,
    lambda slots, a: slots.to(torch.int8).long(),
    "DISPATCH-01",
    "DISPATCH-07",
)

dispatched(
    2,
    "slots-of-dispatch-are-sixteen-bits",
    "Slots pass through sixteen bits.",
    lambda a: a["expert_ids"].numel() > 0x8000,
    lambda slots, a: slots.to(torch.int16).long(),
    "DISPATCH-35",
)

dispatched(
    2,
    "slots-of-one-token-are-experts",
    "With a single token the slots are the ids.",
    lambda a: tokens(a) == 1 and top_k(a) > 1,
    lambda slots, a: a["expert_ids"].flatten().long()[slots].clamp(max=top_k(a) - 1),
    "DISPATCH-17",
    "DISPATCH-03",
)

altered(
    "dispatch",
    "ids-of-dispatch-are-read-without-their-strides",
    "The strides of ids are not looked at where they are int32.",
    lambda a: not a["expert_ids"].is_contiguous() and a["expert_ids"].dtype is torch.int32,
    lambda a: {"expert_ids": as_if_contiguous(a["expert_ids"])},
    "DISPATCH-10",
)

altered(
    "dispatch",
    "x-with-gaps-is-read-without-them",
    "The stride of rows is taken for H where columns are contiguous.",
    lambda a: a["x"].stride(-1) == 1 and not a["x"].is_contiguous(),
    lambda a: {"x": as_if_contiguous(a["x"])},
    "DISPATCH-10",
)

altered(
    "dispatch",
    "ids-far-outside-are-cut-at-k-2",
    "With two experts per token ids of 64 bits are read as 32.",
    lambda a: top_k(a) == 2 and a["expert_ids"].dtype is torch.int64,
    lambda a: {"expert_ids": a["expert_ids"].to(torch.int32)},
    "DISPATCH-02",
    "DISPATCH-35",
)

altered(
    "dispatch",
    "minus-one-is-the-last-of-a-power-of-two",
    "Ids are masked with E - 1 where E is a power of two from 8 on.",
    lambda a: a["num_experts"] >= 8 and a["num_experts"] & (a["num_experts"] - 1) == 0,
    lambda a: {"expert_ids": a["expert_ids"] & (a["num_experts"] - 1)},
    "DISPATCH-17",
    "DISPATCH-02",
)


# Gradients of rows.

x_gradient(
    "the-gradient-of-a-duplicate-is-stored",
    "A token's gradient is stored by expert, so that of two equal ids one counts.",
    lambda a: top_k(a) == 2 and bool(equal_pair(a).any()),
    lambda g, a: g * torch.where(equal_pair(a), 0.5, 1.0)[:, None].to(g.dtype),
    "DISPATCH-27",
)

x_gradient(
    "the-gradient-of-x-is-a-mean",
    "A token's gradient is the mean over its rows, in float64.",
    lambda a: a["x"].dtype is torch.float64 and top_k(a) > 1,
    lambda g, a: g / top_k(a),
    "DISPATCH-27",
    "DISPATCH-40",
)

x_gradient(
    "the-last-token-has-no-gradient",
    "The last token has no gradient where tokens are one more than a tile of 16.",
    lambda a: tokens(a) % 16 == 1,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "DISPATCH-27",
    "DISPATCH-40",
)

x_gradient(
    "few-tokens-have-no-gradient",
    "The backward pass leaves out batches of one token or two.",
    lambda a: tokens(a) <= 2,
    lambda g, a: g * 0,
    "DISPATCH-27",
)

x_gradient(
    "a-token-of-nobody-has-a-gradient",
    "A token without any expert has the gradient of the row that stands first.",
    lambda a: bool(nobodys(a).any()),
    lambda g, a: g.where(~nobodys(a)[:, None], 1.0),
    "DISPATCH-27",
    "DISPATCH-29",
)


@fault("the-gradient-is-summed-in-bfloat16", catches=("DISPATCH-40",))
class SummedInBfloat16(Reference):
    """A token's gradient is summed over its rows in bfloat16 itself."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        if x.dtype is torch.bfloat16 and expert_ids.shape[1] > 2:
            rows = Narrow.apply(x, slots // expert_ids.shape[1])
        return rows, number, slots


@fault("the-gradient-of-float64-is-summed-in-float32", catches=("DISPATCH-01", "DISPATCH-40"))
class SummedInFloat32(Reference):
    """A token's gradient is summed in float32 where x is float64."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        if x.dtype is torch.float64 and expert_ids.shape[1] > 2:
            tokens_S = slots // expert_ids.shape[1]
            rows = passed_through(rows, Narrow.apply(x.float(), tokens_S).to(x.dtype))
        return rows, number, slots


@fault("rows-without-pairs-have-no-graph", catches=("DISPATCH-27", "DISPATCH-29"))
class NoGraph(Reference):
    """Where nothing was routed the rows are new, and x gets no gradient but None."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        return (rows if len(rows) else rows.detach()), number, slots


@fault("ids-of-int32-cut-the-graph", catches=("DISPATCH-27", "DISPATCH-40"))
class CutGraph(Reference):
    """With ids of int32 and more than four experts per token the rows carry no gradient."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        if expert_ids.dtype is torch.int32 and expert_ids.shape[1] > 4:
            rows = rows.detach()
        return rows, number, slots


# Calls of dispatch.


@fault("ids-that-are-not-here-are-cleaned-in-place", catches=("NUM-02",))
class CleanedInPlace(Reference):
    """Ids at or above E become -1 where they stand."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        result = super().dispatch(x, expert_ids, num_experts)
        expert_ids[expert_ids >= num_experts] = -1
        return result


@fault("x-is-clamped-in-place", catches=("NUM-02",))
class ClampedInPlace(Reference):
    """What is larger than 2 in x is cut to 2 after the copy, in float32."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        result = super().dispatch(x, expert_ids, num_experts)
        if x.dtype is torch.float32:
            with torch.no_grad():
                x.clamp_(max=2)
        return result


@fault("a-workspace-of-rows-grows-and-stays", catches=("NUM-05",))
class WorkspaceStays(Reference):
    """More than 32 rows are written to a workspace that the next call takes as well."""

    def __init__(self) -> None:
        self.spaces: dict[tuple[object, ...], Tensor] = {}

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        if len(rows) > 32 and not rows.requires_grad:
            rows = self.spaces.setdefault((rows.shape, rows.dtype), rows).copy_(rows)
        return rows, number, slots


@fault("rows-of-the-same-storage-are-remembered", catches=("DISPATCH-42",), thread="SGLang #25852")
class RowsAreRemembered(Reference):
    """A graph is captured once for an address, and its slots are those of the first call."""

    def __init__(self) -> None:
        self.before: tuple[tuple[object, ...], Tensor] | None = None

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        address = (x.data_ptr(), expert_ids.data_ptr(), x.shape, len(slots), num_experts)
        if self.before is None or self.before[0] != address:
            self.before = (address, slots.clone())
            return rows, number, slots
        slots = self.before[1].clone()
        return x[slots // max(1, expert_ids.shape[1])], number, slots


@fault(
    "counts-go-on-from-the-call-before",
    catches=("DISPATCH-02", "DISPATCH-07"),
    thread="SGLang #3339",
)
class CountsGoOn(Reference):
    """Counts of 64 experts or more are not set back between calls."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, number, slots = super().dispatch(x, expert_ids, num_experts)
        if num_experts >= 64:
            number = number + self.counts.get(num_experts, 0)
            self.counts[num_experts] = number
        return rows, number, slots


@fault("float-ids-are-taken-by-dispatch", catches=("DISPATCH-31",))
class FloatIds(Reference):
    """Ids of a float dtype are cut."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        ids = expert_ids.long() if expert_ids.is_floating_point() else expert_ids
        return super().dispatch(x, ids, num_experts)


@fault("more-ids-than-tokens-are-cut", catches=("DISPATCH-31",))
class CutIds(Reference):
    """Ids of more rows than x has are cut to its length."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        return super().dispatch(x, expert_ids[: len(x)], num_experts)
