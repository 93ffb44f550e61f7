"""Rare faults of the batched alignment, whose rows, blocks or length are wrong in few calls."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments, rare
from moe_conformance.faults.rare_alignment import (
    Aligned,
    Tensor,
    blocks,
    changed,
    counts,
    loses_last,
    nobody,
    without,
)
from moe_conformance.faults.rare_calls import as_if_contiguous
from moe_conformance.faults.rare_slots import altered
from moe_conformance.target import Unsupported
from moe_conformance.targets import Reference


def length_grown_batched(out: Any, a: Arguments) -> Any:
    """The padded length counts a block too many."""
    return out[0], out[1], out[2] + a["block_size"]


def block_of_another_batched(out: Any, a: Arguments) -> Any:
    """The last block carries the expert after its own."""
    rows, experts, length = out
    last = int(length) // a["block_size"] - 1
    changed = experts.clone()
    if last >= 0:
        changed[last] += 1
    return rows, changed, length


rare(
    "align_batched",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["tokens_per_expert"]) == 1,
    length_grown_batched,
    "ALIGN-22",
    "ALIGN-29",
)

rare(
    "align_batched",
    "at-block-size-1",
    "blocks of one row",
    lambda a: a["block_size"] == 1,
    block_of_another_batched,
    "ALIGN-24",
    "ALIGN-25",
)

rare(
    "align_batched",
    "where-a-block-is-larger-than-the-rows",
    "blocks larger than the rows there are",
    lambda a: a["block_size"] > 4 * max(1, a["max_tokens"]),
    length_grown_batched,
    "ALIGN-22",
    "ALIGN-29",
)

rare(
    "align_batched",
    "where-all-is-full",
    "experts that are all full",
    lambda a: a["max_tokens"] > 0 and bool((a["tokens_per_expert"] == a["max_tokens"]).all()),
    block_of_another_batched,
    "ALIGN-24",
)


# Rows of a batch.

changed(
    "align_batched",
    0,
    "the-last-row-of-two-full-blocks-is-lost",
    "An expert that fills two blocks or more to the last place loses the last row.",
    *loses_last(
        lambda a: (
            (counts(a) % a["block_size"] == 0)
            & (counts(a) > a["block_size"])
            & (a["block_size"] > 1)
        )
    ),
    "ALIGN-33",
    "ALIGN-34",
)

changed(
    "align_batched",
    0,
    "a-row-over-a-full-block-is-lost",
    "An expert with one row more than fills its blocks of 8 or more loses it.",
    *loses_last(
        lambda a: (
            (counts(a) % a["block_size"] == 1)
            & (counts(a) > a["block_size"])
            & (a["block_size"] >= 8)
        )
    ),
    "ALIGN-33",
)

changed(
    "align_batched",
    0,
    "rows-of-16-bits",
    "Row ids pass through sixteen bits.",
    lambda a: nobody(a) > 0xFFFF,
    lambda rows, a, length: rows & 0xFFFF,
    "ALIGN-33",
)

changed(
    "align_batched",
    0,
    "rows-of-signed-16-bits",
    "Row ids pass through a signed short.",
    lambda a: nobody(a) > 0x7FFF,
    lambda rows, a, length: rows.to(torch.int16).to(torch.int32),
    "ALIGN-33",
)

changed(
    "align_batched",
    0,
    "the-row-after-the-sixty-fourth-is-lost",
    "An expert with more than 64 rows loses the last one.",
    *loses_last(lambda a: counts(a) > 64),
    "ALIGN-33",
    "ALIGN-34",
)

changed(
    "align_batched",
    0,
    "the-last-row-of-the-last-full-expert-is-nobodys",
    "Row E·C - 1 is taken for the sentinel, where the capacity is no multiple of the block.",
    lambda a: nobody(a) > 0 and a["max_tokens"] % a["block_size"] != 0,
    lambda rows, a, length: without(rows, a, lambda r: r == nobody(a) - 1),
    "ALIGN-33",
    "ALIGN-21",
)

changed(
    "align_batched",
    0,
    "the-last-of-many-experts-is-lost",
    "Of 32 experts or a multiple the last one loses a row.",
    *loses_last(
        lambda a: (torch.arange(len(counts(a))) == len(counts(a)) - 1) & (len(counts(a)) % 32 == 0)
    ),
    "ALIGN-33",
    "ALIGN-34",
)

changed(
    "align_batched",
    0,
    "padding-is-e-times-the-largest-count",
    "Padding is E times the largest count, where no expert is full.",
    lambda a: bool((counts(a).max() > 0) & (counts(a).max() < a["max_tokens"] - 3)),
    lambda rows, a, length: rows.where(rows != nobody(a), len(counts(a)) * int(counts(a).max())),
    "ALIGN-33",
    "ALIGN-23",
)

altered(
    "align_batched",
    "counts-are-read-without-their-strides-in-alignment",
    "The strides of the counts are not looked at.",
    lambda a: not a["tokens_per_expert"].is_contiguous(),
    lambda a: {
        "tokens_per_expert": as_if_contiguous(a["tokens_per_expert"]).clamp(0, a["max_tokens"])
    },
    "ALIGN-34",
)

altered(
    "align_batched",
    "counts-inside-a-buffer-are-read-from-its-beginning",
    "Counts that begin inside a buffer are read from its beginning.",
    lambda a: a["tokens_per_expert"].storage_offset() > 0,
    lambda a: {
        "tokens_per_expert": a["tokens_per_expert"]
        .as_strided(a["tokens_per_expert"].shape, a["tokens_per_expert"].stride(), 0)
        .clamp(0, a["max_tokens"])
    },
    "ALIGN-34",
)

altered(
    "align_batched",
    "counts-of-a-byte",
    "Counts pass through a byte.",
    lambda a: bool((counts(a) > 255).any()),
    lambda a: {"tokens_per_expert": counts(a) & 0xFF},
    "ALIGN-33",
)

altered(
    "align_batched",
    "a-count-of-one-is-none",
    "Where most experts are empty a count of one is taken for none.",
    lambda a: bool((counts(a) == 0).sum() > (counts(a) > 0).sum()),
    lambda a: {"tokens_per_expert": counts(a).where(counts(a) != 1, 0)},
    "ALIGN-33",
    "ALIGN-21",
)

altered(
    "align_batched",
    "an-expert-behind-two-empty-ones-is-empty",
    "Two empty experts in a row end the list.",
    lambda a: len(counts(a)) <= 6,
    lambda a: {
        "tokens_per_expert": counts(a).where(
            ((counts(a) == 0) & (counts(a).roll(1) == 0)).cumsum(0) == 0, 0
        )
    },
    "ALIGN-34",
    "ALIGN-21",
)

changed(
    "align_batched",
    1,
    "batched-blocks-past-32-carry-the-expert-before",
    "A warp writes the experts of 32 blocks, and what follows is one behind.",
    lambda a: int(blocks(a).sum()) > 32,
    lambda e, a, length: torch.cat([e[:32], e[31:-1]]),
    "ALIGN-24",
)

changed(
    "align_batched",
    1,
    "batched-experts-of-blocks-are-signed-bytes",
    "Experts of blocks pass through a signed byte.",
    lambda a: len(counts(a)) > 128,
    lambda e, a, length: e.to(torch.int8).to(torch.int32),
    "ALIGN-24",
)

changed(
    "align_batched",
    1,
    "batched-experts-are-int64-with-counts-of-int32",
    "Experts of blocks are int64 where counts are int32 and one block holds an expert.",
    lambda a: a["tokens_per_expert"].dtype is torch.int32 and a["max_tokens"] <= a["block_size"],
    lambda e, a, length: e.long(),
    "ALIGN-28",
)

changed(
    "align_batched",
    1,
    "the-expert-of-the-first-block-is-zero",
    "The first block carries 0 although the first experts are empty.",
    lambda a: int(counts(a)[0]) == 0 and int(counts(a).sum()) > 0 and a["block_size"] >= 16,
    lambda e, a, length: torch.cat([e[:1] * 0, e[1:]]),
    "ALIGN-24",
    "ALIGN-25",
)

changed(
    "align_batched",
    2,
    "a-full-batch-has-the-length-of-its-rows",
    "Where all experts are full the length is E·C, blocks or not.",
    lambda a: bool((counts(a) == a["max_tokens"]).all()),
    lambda length, a, _: length * 0 + nobody(a),
    "ALIGN-33",
    "ALIGN-21",
)

changed(
    "align_batched",
    2,
    "an-empty-batch-has-a-block",
    "Without any row one block is left, if there was room for some.",
    lambda a: int(counts(a).sum()) == 0 and a["max_tokens"] > 0,
    lambda length, a, _: length + a["block_size"],
    "ALIGN-34",
    "ALIGN-22",
)

changed(
    "align_batched",
    2,
    "the-length-has-the-dtype-of-the-counts",
    "The length is int64 where counts are, and the capacity is 64 or more.",
    lambda a: a["tokens_per_expert"].dtype is torch.int64 and a["max_tokens"] >= 64,
    lambda length, a, _: length.long(),
    "ALIGN-28",
)


@fault("a-batch-is-counted-twice", catches=("NUM-09", "NUM-13"), thread="SGLang #3339")
class CountedTwice(Reference):
    """The length of the call before is added, where the buffers have the same size."""

    before: tuple[int, int, int] | None = None

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        rows, experts, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        before, self.before = self.before, (len(tokens_per_expert), max_tokens, block_size)
        again = before == self.before and len(tokens_per_expert) > 8
        return rows, experts, length + block_size if again else length


@fault("counts-become-offsets-in-place", catches=("NUM-02",))
class OffsetsInPlace(Reference):
    """Counts of int32 are summed up where they stand, with fewer than 16 experts."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        result = super().align_batched(tokens_per_expert, max_tokens, block_size)
        if tokens_per_expert.dtype is torch.int32 and len(tokens_per_expert) < 16:
            tokens_per_expert.copy_(tokens_per_expert.cumsum(0))
        return result


@fault("a-buffer-of-rows-is-kept", catches=("NUM-05",))
class BufferKept(Reference):
    """Rows of batches of the same size, of 16 experts or more, are written to the same buffer."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        rows, experts, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        if len(tokens_per_expert) >= 16:
            rows = self.buffers.setdefault(len(rows), rows).copy_(rows)
        return rows, experts, length


@fault("a-capacity-off-the-block-is-refused", catches=("ALIGN-33", "ALIGN-21"))
class OffTheBlock(Reference):
    """A capacity that is no multiple of a block of 64 is refused."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        if block_size == 64 and max_tokens % 64:
            raise Unsupported("max_tokens: expected whole blocks")
        return super().align_batched(tokens_per_expert, max_tokens, block_size)


@fault("a-capacity-of-zero-is-refused", catches=("ALIGN-22", "ALIGN-29"))
class CapacityOfZero(Reference):
    """A capacity of zero is refused, by whom it would be divided."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        if max_tokens == 0:
            raise Unsupported("max_tokens: expected at least 1")
        return super().align_batched(tokens_per_expert, max_tokens, block_size)
