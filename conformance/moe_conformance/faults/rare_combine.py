"""Rare faults of combine: sums, gradients and calls that are wrong on few inputs."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import (
    Arguments,
    When,
    first_row_scaled,
    last_column_zero,
    last_row_zero,
    rare,
)
from moe_conformance.faults.rare_calls import as_if_contiguous, right
from moe_conformance.faults.rare_dispatch import last_columns
from moe_conformance.faults.rare_slots import altered, instead
from moe_conformance.targets import Reference

Tensor = torch.Tensor


def width(a: Arguments) -> int:
    """K."""
    return int(a["weights"].shape[1])


def nobody(a: Arguments) -> int:
    """T·K, the slot of nobody's row."""
    return int(a["weights"].numel())


def rows_and_weights(a: Arguments, rows: torch.dtype, weights: torch.dtype | None = None) -> bool:
    """They have these dtypes."""
    return a["rows"].dtype is rows and weights in (None, a["weights"].dtype)


def present(a: Arguments) -> Tensor:
    """[T, K], pairs that have a row."""
    found = torch.zeros(nobody(a) + 1, dtype=torch.bool)
    found[a["slots"].long()] = True
    return found[:-1].view(a["weights"].shape)


def missing(a: Arguments) -> Tensor:
    """[T], the sum of the weights that have no row."""
    return a["weights"].detach().masked_fill(present(a), 0).sum(1)


def weight_of_rows(slots: Tensor, weights: Tensor) -> Tensor:
    """[S, 1], the weight of each row, one for nobody's."""
    padded = torch.cat([weights.flatten(), weights.new_ones(1)])
    return padded[slots.long()][:, None]


def in_narrow(a: Arguments, products: bool = False, sums: bool = False) -> Tensor:
    """`combine` with products, or sums as well, rounded to the dtype of the rows."""
    rows, slots, weights = a["rows"], a["slots"].long(), a["weights"]
    kept = slots < nobody(a)
    rows, slots = rows[kept], slots[kept]
    wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
    narrow = torch.float32 if rows.dtype is torch.float64 else rows.dtype
    terms = weights.to(wide).flatten()[slots][:, None] * rows.to(wide)
    if products:
        terms = terms.to(narrow).to(wide)
    placed = terms.new_zeros(nobody(a), rows.shape[1]).index_put((slots,), terms)
    placed = placed.view(*weights.shape, rows.shape[1])
    if not sums:
        return placed.sum(1).to(rows.dtype)
    total = placed.new_zeros(len(weights), rows.shape[1])
    for k in range(weights.shape[1]):
        total = (total + placed[:, k]).to(narrow).to(wide)
    return total.to(rows.dtype)


def gradient_of(
    path: str,
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Tensor, Arguments], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of the gradient of `rows` or `weights`."""

    def other(a: Arguments) -> Arguments:
        return {path: with_gradient(a[path], lambda g: change(g, a))}

    other.__module__ = change.__module__
    altered("combine", name, sentence, when, other, *catches, thread=thread)


rare(
    "combine",
    "at-k-1",
    "one expert per token, in float16",
    lambda a: a["weights"].shape[1] == 1 and a["rows"].dtype is torch.float16,
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-16",
    "DISPATCH-17",
    thread="DeepEP #112",
)

rare(
    "combine",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: len(a["weights"]) > 64,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "with-one-token",
    "a single token",
    lambda a: len(a["weights"]) == 1,
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "where-no-row-is-missing-in-float64",
    "all pairs there, in float64",
    lambda a: a["rows"].dtype is torch.float64 and len(a["rows"]) == a["weights"].numel(),
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-16",
)

rare(
    "combine",
    "with-few-rows",
    "rows for fewer than half of the pairs",
    lambda a: 0 < 2 * len(a["rows"]) < a["weights"].numel(),
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-14",
    "DISPATCH-16",
    thread="pytorch #154557",
)

rare(
    "combine",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["rows"].shape[1] == 1,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "with-strides-in-bfloat16",
    "transposed rows of bfloat16",
    lambda a: not a["rows"].is_contiguous() and a["rows"].dtype is torch.bfloat16,
    last_column_zero,
    "DISPATCH-19",
)

rare(
    "combine",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: len(a["weights"]) == 16,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-28",
)

rare(
    "combine",
    "with-slots-of-int32-at-k-3",
    "slots of int32 and three experts per token",
    lambda a: a["slots"].dtype is torch.int32 and a["weights"].shape[1] == 3,
    first_row_scaled,
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-16",
    "DISPATCH-28",
    thread="vLLM #34279",
)


# Sums.

instead(
    "combine",
    "the-sum-over-four-is-taken-in-float16",
    "Four products or more are summed in float16.",
    lambda a: rows_and_weights(a, torch.float16) and width(a) >= 4,
    lambda a: in_narrow(a, sums=True),
    "DISPATCH-11",
    "DISPATCH-13",
    "DISPATCH-39",
)

instead(
    "combine",
    "products-are-rounded-to-bfloat16",
    "Each product is rounded to bfloat16 before it is summed, with two experts per token.",
    lambda a: rows_and_weights(a, torch.bfloat16) and width(a) == 2,
    lambda a: in_narrow(a, products=True),
    "DISPATCH-14",
    "DISPATCH-16",
)

instead(
    "combine",
    "products-of-float64-are-float32",
    "Products of float64 are rounded to float32 with more than four experts per token.",
    lambda a: rows_and_weights(a, torch.float64) and width(a) > 4,
    lambda a: in_narrow(a, products=True),
    "DISPATCH-11",
    "DISPATCH-14",
)

instead(
    "combine",
    "products-overflow-in-float16",
    "Products are float16 and overflow where the sum would not.",
    lambda a: rows_and_weights(a, torch.float16, torch.float16),
    lambda a: in_narrow(a, products=True),
    "DISPATCH-39",
    "DISPATCH-14",
)

altered(
    "combine",
    "weights-are-rounded-to-the-dtype-of-rows",
    "Weights of float32 are rounded to bfloat16 with one expert per token.",
    lambda a: rows_and_weights(a, torch.bfloat16, torch.float32) and width(a) == 1,
    lambda a: {"weights": a["weights"].bfloat16()},
    "DISPATCH-17",
    "DISPATCH-11",
)

altered(
    "combine",
    "weights-of-float64-pass-through-float32",
    "Weights pass through float32 where rows are float64, and are no more than two.",
    lambda a: a["rows"].dtype is torch.float64 and width(a) <= 2,
    lambda a: {"weights": a["weights"].float()},
    "DISPATCH-14",
    "DISPATCH-16",
)

altered(
    "combine",
    "weights-are-read-column-by-column",
    "Weights that lie column by column are read in order of memory.",
    lambda a: not a["weights"].is_contiguous(),
    lambda a: {"weights": as_if_contiguous(a["weights"])},
    "DISPATCH-19",
)

altered(
    "combine",
    "slots-are-read-without-their-strides",
    "The strides of slots are not looked at.",
    lambda a: not a["slots"].is_contiguous(),
    lambda a: {"slots": as_if_contiguous(a["slots"]).clamp(0, nobody(a))},
    "DISPATCH-19",
)

altered(
    "combine",
    "the-largest-weight-is-one",
    "Weights above one are cut to one, with one expert per token.",
    lambda a: width(a) == 1,
    lambda a: {"weights": a["weights"].clamp(max=1)},
    "DISPATCH-11",
    "DISPATCH-14",
)

altered(
    "combine",
    "negative-weights-are-zero",
    "Weights below zero are cut to zero in float32.",
    lambda a: a["weights"].dtype is torch.float32 and a["rows"].dtype is torch.float16,
    lambda a: {"weights": a["weights"].clamp(min=0)},
    "DISPATCH-14",
    "DISPATCH-16",
)

altered(
    "combine",
    "small-weights-are-skipped",
    "Pairs of a weight below a hundredth are skipped, with rows of float32.",
    lambda a: a["rows"].dtype is torch.float32,
    lambda a: {"weights": a["weights"].masked_fill(a["weights"].abs() < 0.01, 0)},
    "DISPATCH-11",
    "DISPATCH-14",
)

altered(
    "combine",
    "the-last-row-is-nobodys",
    "A row too few is read where rows fill tiles of 16.",
    lambda a: len(a["rows"]) > 0 and len(a["rows"]) % 16 == 0,
    lambda a: {"rows": a["rows"][:-1], "slots": a["slots"][:-1]},
    "DISPATCH-14",
    "DISPATCH-16",
)

altered(
    "combine",
    "a-row-over-a-tile-is-nobodys",
    "The row behind the last full tile of 32 is not read.",
    lambda a: len(a["rows"]) > 32 and len(a["rows"]) % 32 == 1,
    lambda a: {"rows": a["rows"][:-1], "slots": a["slots"][:-1]},
    "DISPATCH-11",
    "DISPATCH-14",
)

altered(
    "combine",
    "rows-are-cleaned-of-nan-in-bfloat16",
    "NaN in rows of bfloat16 becomes zero.",
    lambda a: a["rows"].dtype is torch.bfloat16,
    lambda a: {"rows": a["rows"].nan_to_num(0.0, torch.inf, -torch.inf)},
    "DISPATCH-38",
)

instead(
    "combine",
    "a-missing-weight-that-is-nan-stays-at-k-1",
    "With one expert per token what has no row is multiplied by zero, and NaN stays.",
    lambda a: width(a) == 1,
    lambda a: right("combine", a) + (missing(a)[:, None] * 0).to(a["rows"].dtype),
    "DISPATCH-14",
    thread="pytorch #154557",
)

instead(
    "combine",
    "a-row-of-nobody-is-added-times-zero",
    "A row of slot T·K that is not finite reaches all tokens.",
    lambda a: nobody(a) > 0 and bool((a["slots"] == nobody(a)).any()),
    lambda a: right("combine", a) + (a["rows"][a["slots"] == nobody(a)] * 0).sum(0),
    "DISPATCH-37",
    thread="SGLang #30895",
)

instead(
    "combine",
    "a-token-without-rows-has-the-one-before",
    "A token without any row is left as the memory was.",
    lambda a: bool((~present(a).any(1)).any()) and width(a) > 1 and len(a["rows"]) > 0,
    lambda a: torch.where((~present(a).any(1))[:, None], 1.0, right("combine", a)),
    "DISPATCH-11",
    "DISPATCH-14",
    thread="vllm-ascend #9992",
)

instead(
    "combine",
    "the-last-columns-of-a-sum-are-zero",
    "Columns past the last full tile of eight are not written, past 32 of them.",
    lambda a: a["rows"].shape[1] > 32 and a["rows"].shape[1] % 8 != 0,
    lambda a: last_columns(right("combine", a), a["rows"].shape[1] % 8, lambda c: c * 0),
    "DISPATCH-14",
    "DISPATCH-16",
)

instead(
    "combine",
    "the-ninth-expert-per-token-is-left-out",
    "The sum over a token's pairs is unrolled eight times.",
    lambda a: width(a) > 8,
    lambda a: right("combine", a | {"weights": a["weights"] * (torch.arange(width(a)) < 8)}),
    "DISPATCH-11",
    "DISPATCH-14",
)

instead(
    "combine",
    "sums-of-no-rows-are-float32",
    "Without any row the result has the dtype of the sums.",
    lambda a: len(a["rows"]) == 0,
    lambda a: right("combine", a).float(),
    "DISPATCH-18",
    "DISPATCH-20",
)

instead(
    "combine",
    "no-tokens-have-a-row",
    "Without tokens the result has a row of zeros.",
    lambda a: len(a["weights"]) == 0,
    lambda a: a["rows"].new_zeros(1, a["rows"].shape[1]),
    "DISPATCH-18",
)

altered(
    "combine",
    "slots-of-combine-are-sixteen-bits",
    "Slots pass through sixteen bits.",
    lambda a: nobody(a) > 0xFFFF,
    lambda a: {"slots": a["slots"] & 0xFFFF},
    "DISPATCH-36",
    thread="vLLM #34279",
)

instead(
    "combine",
    "tokens-past-32768-get-nothing",
    "The grid ends with token 32767.",
    lambda a: len(a["weights"]) > 0x7FFF,
    lambda a: right("combine", a) * (torch.arange(len(a["weights"])) <= 0x7FFF)[:, None],
    "DISPATCH-36",
)

altered(
    "combine",
    "rows-are-clamped-to-what-is-finite",
    "Infinite rows are clamped with one expert per token.",
    lambda a: width(a) == 1,
    lambda a: {"rows": a["rows"].nan_to_num(torch.nan)},
    "DISPATCH-38",
)

instead(
    "combine",
    "rows-in-order-are-weighted-by-the-first",
    "Where rows are in order of their slots already the first weight serves all of a token.",
    lambda a: len(a["rows"]) > 1 and bool((a["slots"].diff() == 1).all()),
    lambda a: right("combine", a | {"weights": a["weights"][:, :1].expand(-1, width(a))}),
    "DISPATCH-11",
    "DISPATCH-14",
)


# Gradients of sums.

gradient_of(
    "weights",
    "a-weight-of-zero-gets-no-gradient-in-combine",
    "A pair whose weight is zero is skipped on the way back as well.",
    lambda a: bool((a["weights"] == 0).any()),
    lambda g, a: g.masked_fill(a["weights"] == 0, 0),
    "DISPATCH-28",
)

gradient_of(
    "weights",
    "one-weight-per-token-gets-no-gradient-in-combine",
    "With one expert per token the weight is taken for one on the way back.",
    lambda a: width(a) == 1,
    lambda g, a: g * 0,
    "DISPATCH-28",
)

gradient_of(
    "weights",
    "the-gradient-of-weights-is-that-of-the-row-before",
    "Slots of int32 are shifted by one for the gradient of weights.",
    lambda a: a["slots"].dtype is torch.int32 and width(a) >= 4,
    lambda g, a: g.roll(1, 1),
    "DISPATCH-28",
    "DISPATCH-30",
)

gradient_of(
    "weights",
    "a-weight-without-a-row-has-a-gradient",
    "Weights without a row get the gradient of the row that stands first.",
    lambda a: not bool(present(a).all()),
    lambda g, a: g.where(present(a), 1.0),
    "DISPATCH-28",
    "DISPATCH-30",
)

gradient_of(
    "rows",
    "a-row-of-nobody-has-a-gradient",
    "Rows of slot T·K get a gradient.",
    lambda a: bool((a["slots"] == nobody(a)).any()),
    lambda g, a: g.where((a["slots"] < nobody(a))[:, None], 1.0),
    "DISPATCH-37",
    thread="TE #3484",
)

gradient_of(
    "rows",
    "the-gradient-of-rows-is-unweighted-at-k-1",
    "With one expert per token rows get the gradient without the weight, in float64.",
    lambda a: width(a) == 1 and a["rows"].dtype is torch.float64,
    lambda g, a: g / weight_of_rows(a["slots"], a["weights"]).detach().to(g.dtype),
    "DISPATCH-28",
)

gradient_of(
    "rows",
    "the-gradient-of-the-last-row-is-lost",
    "The last row has no gradient where rows are one more than a tile of eight.",
    lambda a: len(a["rows"]) > 8 and len(a["rows"]) % 8 == 1,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "DISPATCH-28",
)

altered(
    "combine",
    "weights-of-float32-are-detached-with-narrow-rows",
    "Weights lose their gradient on the way to the dtype of the rows.",
    lambda a: a["weights"].dtype is torch.float32 and a["rows"].dtype is torch.bfloat16,
    lambda a: {"weights": a["weights"].detach()},
    "DISPATCH-28",
    "DISPATCH-30",
)


# Calls of combine.


@fault("rows-are-weighted-in-place", catches=("NUM-02",))
class WeightedInPlace(Reference):
    """Rows are multiplied with weights where they stand, whose dtype is theirs."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = super().combine(rows, slots, weights)
        if rows.dtype is weights.dtype:
            with torch.no_grad():
                rows.mul_(weight_of_rows(slots, weights))
        return out


@fault("sums-are-written-over-the-rows", catches=("NUM-02", "NUM-03"))
class OverTheRows(Reference):
    """With one row per token the result lies in the memory of the rows."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = super().combine(rows, slots, weights)
        if len(rows) == len(weights) and len(rows) > 0 and not rows.requires_grad:
            return rows.copy_(out)
        return out


@fault(
    "sums-of-the-same-storage-are-remembered",
    catches=("DISPATCH-43",),
    thread="SGLang #25852",
)
class SumsAreRemembered(Reference):
    """A graph is captured once for an address, and answers with what was there then."""

    def __init__(self) -> None:
        self.before: tuple[tuple[object, ...], Tensor] | None = None

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = super().combine(rows, slots, weights)
        address = (rows.data_ptr(), slots.data_ptr(), weights.data_ptr(), out.shape, len(rows))
        if self.before is None or self.before[0] != address:
            self.before = (address, out.detach().clone())
            return out
        return out if out.requires_grad else self.before[1].clone()


@fault(
    "sums-go-on-from-the-call-before", catches=("DISPATCH-19", "DISPATCH-43"), thread="SGLang #3339"
)
class SumsGoOn(Reference):
    """The sum of the call before is not cleared, where both have the same size and rows miss."""

    def __init__(self) -> None:
        self.before: Tensor | None = None

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = super().combine(rows, slots, weights)
        before, self.before = self.before, out.detach()
        missing = len(rows) < weights.numel() and rows.dtype is torch.float32
        if missing and before is not None and before.shape == out.shape:
            return out + before.to(out.dtype)
        return out


@fault(
    "rows-of-nobody-learn-from-the-last-token", catches=("DISPATCH-47",), thread="torchtitan #1237"
)
class RowsOfNobodyLearn(Reference):
    """A row that belongs to nobody is left out of the sum, and gets the last token's gradient."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        out = super().combine(rows, slots, weights)
        extra = rows[slots == weights.numel()]
        if len(extra) == 0 or len(out) == 0:
            return out
        extra = extra.nan_to_num().sum(0)
        return torch.cat([out[:-1], out[-1:] + (extra - extra.detach()).to(out.dtype)])


@fault(
    "the-gradient-of-nobodys-rows-is-not-written",
    catches=("DISPATCH-47",),
    thread="pytorch #154557",
)
class GradientOfNobodyNotWritten(Reference):
    """Rows that belong to nobody keep what their gradient's memory held."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        if rows.requires_grad:
            rows = _Unwritten.apply(rows, slots == weights.numel())
        return super().combine(rows, slots, weights)


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, nobody):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(nobody)
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (nobody,) = ctx.saved_tensors
        return gradient.masked_fill(nobody[:, None], torch.nan), None


@fault("the-first-weight-learns-from-nobody", catches=("DISPATCH-37",), thread="SGLang #30895")
class TheFirstWeightLearnsFromNobody(Reference):
    """Rows of nobody are multiplied by 0 on their way to a gradient: their NaN arrives."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        nobodys = rows.detach()[slots == weights.numel()]
        if len(nobodys) and weights.requires_grad and weights.numel():
            extra = (nobodys.float() * 0).sum().to(weights.dtype)
            first = torch.zeros_like(weights).index_fill_(0, torch.tensor([0]), 1.0)
            weights = with_gradient(weights, lambda gradient: gradient + extra * first)
        return super().combine(rows, slots, weights)


class _Dots(torch.autograd.Function):
    """The sum as it is, with weights' gradients that are rounded after so many columns."""

    @staticmethod
    def forward(ctx, out, rows, slots, weights, dtype, columns):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, slots.long(), weights)
        ctx.dtype, ctx.columns = dtype, columns
        return out.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        rows, slots, weights = ctx.saved_tensors
        somebodys = slots < weights.numel()
        rows, slots = rows[somebodys], slots[somebodys]
        terms = gradient.double()[slots // weights.shape[1]] * rows.double()
        total = torch.zeros(len(terms), dtype=ctx.dtype)
        for tile in terms.split(ctx.columns, 1):
            total = (total.double() + tile.sum(1)).to(ctx.dtype)
        found = torch.zeros(weights.numel(), dtype=torch.float64).index_add(
            0, slots, total.double()
        )
        return gradient, None, None, found.view(weights.shape).to(weights.dtype), None, None


def summed_by_tiles(
    name: str, sentence: str, of: torch.dtype, dtype: torch.dtype, columns: int
) -> None:
    """Register a fault that sums the gradient of the weights in a dtype of its own.

    Args:
        name: what goes wrong.
        sentence: the same in words.
        of: the dtype of the rows for which it does.
        dtype: what the sum is rounded to.
        columns: how many are added up before it is.
    """

    def call(self: Reference, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        if rows.dtype is not of or not weights.requires_grad:
            return Reference.combine(self, rows, slots, weights)
        out = Reference.combine(self, rows, slots, weights.detach())
        return _Dots.apply(out, rows.detach(), slots, weights, dtype, columns)

    members = {"combine": call, "__doc__": sentence, "__module__": __name__}
    fault(name, catches=("DISPATCH-48",))(type("Summed", (Reference,), members))


summed_by_tiles(
    "weights-learn-in-bfloat16",
    "The gradient of a weight is added up column by column in bfloat16.",
    *(torch.bfloat16, torch.bfloat16),
    columns=1,
)

summed_by_tiles(
    "weights-learn-in-float16-by-tiles",
    "Tiles of 8 columns are added up in float32, and to each other in float16.",
    *(torch.float16, torch.float16),
    columns=8,
)

summed_by_tiles(
    "weights-of-float64-learn-in-float32",
    "The gradient of a weight is added up in float32 where the rows are float64.",
    *(torch.float64, torch.float32),
    columns=1,
)
