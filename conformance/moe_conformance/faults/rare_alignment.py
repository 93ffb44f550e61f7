"""Rare faults of alignment, whose sorted slots or rows, blocks or length are wrong in few calls."""

# The class says what goes wrong; its methods are those of the reference.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_conformance.faults.rare import Arguments, When, rare, top_k
from moe_conformance.faults.rare_calls import as_if_contiguous, right
from moe_conformance.faults.rare_slots import altered, instead

Tensor = torch.Tensor
Aligned = tuple[Tensor, Tensor, Tensor]


def counts(a: Arguments) -> Tensor:
    """[E], slots or rows of each expert, those that are not here left out."""
    if "tokens_per_expert" in a:
        return a["tokens_per_expert"].long()
    ids = a["expert_ids"].flatten().long()
    number = a["num_experts"]
    return torch.bincount(ids[(ids >= 0) & (ids < number)], minlength=number)


def nobody(a: Arguments) -> int:
    """What stands for nobody: T·K, or E·C."""
    if "tokens_per_expert" in a:
        return len(a["tokens_per_expert"]) * int(a["max_tokens"])
    return int(a["expert_ids"].numel())


def blocks(a: Arguments) -> Tensor:
    """[E], blocks of each expert."""
    return -(-counts(a) // a["block_size"])


def mapped(a: Arguments) -> bool:
    """There is an expert map."""
    return a.get("expert_map") is not None


def foreign(a: Arguments) -> bool:
    """Ids that are none of the experts."""
    ids = a["expert_ids"]
    return bool(((ids < 0) | (ids >= a["num_experts"])).any())


def changed(
    operation: str,
    part: int,
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Tensor, Arguments, int], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of one of the three results.

    Args:
        operation: `align` or `align_batched`.
        part: 0 slots or rows, 1 experts of blocks, 2 the length.
        name: what goes wrong.
        sentence: the same in words.
        when: in which calls.
        change: from that result, the arguments and the padded length to the wrong result.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """

    def result(a: Arguments) -> Any:
        parts = list(right(operation, a))
        length = int(parts[2])
        parts[part] = change(parts[part].clone(), a, length)
        return tuple(parts)

    result.__module__ = change.__module__
    instead(operation, name, sentence, when, result, *catches, thread=thread)


def without(slots: Tensor, a: Arguments, lost: Callable[[Tensor], Tensor]) -> Tensor:
    """The slots with those in whose place nobody stands."""
    here = slots < nobody(a)
    slots[here] = slots[here].where(~lost(slots[here].long()), nobody(a))
    return slots


def owners(slots: Tensor, a: Arguments) -> Tensor:
    """The expert of each slot or row."""
    if "tokens_per_expert" in a:
        return slots // a["max_tokens"]
    return a["expert_ids"].flatten()[slots].long()


def lasts(slots: Tensor, a: Arguments) -> Tensor:
    """Which of these slots are their expert's last."""
    own = owners(slots, a)
    last = torch.full((len(counts(a)),), -1).scatter_reduce(0, own, slots, "amax")
    return slots == last[own]


def loses_last(
    when: Callable[[Arguments], Tensor],
) -> tuple[When, Callable[[Tensor, Arguments, int], Tensor]]:
    """Experts [E] for which it holds lose their last slot."""

    def change(slots: Tensor, a: Arguments, length: int) -> Tensor:
        return without(slots, a, lambda s: when(a)[owners(s, a)] & lasts(s, a))

    return lambda a: bool(when(a).any()), change


def later_blocks_descend(slots: Tensor, a: Arguments) -> Tensor:
    """The slots behind each expert's first block, last ones first."""
    size = a["block_size"]
    start = 0
    for count in counts(a).tolist():
        slots[start + size : start + count] = slots[start + size : start + count].flip(0)
        start += -(-count // size) * size
    return slots


def second_blocks(experts: Tensor, a: Arguments, length: int) -> Tensor:
    """The experts of blocks, one too high in an expert's second block."""
    used = experts[: length // a["block_size"]]
    second = (used == used.roll(1)) & (used != used.roll(2)) & (used >= 0)
    second[:1] = False
    used[second] += 1
    return experts


def once(ids: Tensor) -> Tensor:
    """Ids with -1 for those that stand before them in the row."""
    before = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    return ids.masked_fill(before, -1)


def two_empty(a: Arguments) -> Tensor:
    """[E], experts behind two empty ones in a row."""
    empty = counts(a) == 0
    pair = empty & empty.roll(1)
    pair[:1] = False
    return (pair.cumsum(0) > 0) & ~empty


def buffer(a: Arguments) -> int:
    """Entries of the buffer of `align`."""
    return len(right("align", a)[0])


def slot_lost(out: Any, a: Arguments) -> Any:
    """The last slot before the padded length is not there."""
    slots, experts, length = out
    sentinel = a["expert_ids"].numel()
    kept = slots.clone()
    here = (kept[: int(length)] < sentinel).nonzero()[:, 0]
    kept[here[-1:]] = sentinel
    return kept, experts, length


def slots_exchanged(out: Any, a: Arguments) -> Any:
    """The first and the last slot stand in each other's place."""
    slots, experts, length = out
    here = (slots[: int(length)] < a["expert_ids"].numel()).nonzero()[:, 0]
    kept = slots.clone()
    if len(here) > 1:
        kept[here[[0, -1]]] = slots[here[[-1, 0]]]
    return kept, experts, length


def block_of_another(out: Any, a: Arguments) -> Any:
    """The last block carries the expert of the first."""
    slots, experts, length = out
    last = int(length) // a["block_size"] - 1
    changed = experts.clone()
    if last >= 0:
        changed[last] = experts[0]
    return slots, changed, length


def length_grown(out: Any, a: Arguments) -> Any:
    """The padded length counts a block too many."""
    return out[0], out[1], out[2] + a["block_size"]


rare(
    "align",
    "at-block-size-1",
    "blocks of one slot",
    lambda a: a["block_size"] == 1,
    slots_exchanged,
    "ALIGN-05",
    "ALIGN-07",
    "ALIGN-09",
    "ALIGN-10",
)

rare(
    "align",
    "beyond-256-experts",
    "more than 256 experts",
    lambda a: a["num_experts"] > 256,
    slot_lost,
    "ALIGN-01",
    "ALIGN-10",
    "ALIGN-11",
    "ALIGN-13",
    thread="aiter #2359",
)

rare(
    "align",
    "with-one-expert",
    "a single expert",
    lambda a: a["num_experts"] == 1,
    slot_lost,
    "ALIGN-01",
    "ALIGN-16",
)

rare(
    "align",
    "with-one-token",
    "a single token",
    lambda a: len(a["expert_ids"]) == 1,
    length_grown,
    "ALIGN-03",
    "ALIGN-16",
)

rare(
    "align",
    "where-blocks-are-all-full",
    "experts whose slots all fill their blocks",
    lambda a: bool((counts(a) % a["block_size"] == 0).all()) and int(counts(a).sum()) > 0,
    length_grown,
    "ALIGN-03",
    "ALIGN-11",
    "ALIGN-16",
    thread="LightLLM #1369",
)

rare(
    "align",
    "with-a-map-and-one-block",
    "an expert map, and all slots in one block",
    lambda a: a.get("expert_map") is not None and a["expert_ids"].numel() <= a["block_size"],
    block_of_another,
    "ALIGN-09",
    thread="aiter #2447",
)

rare(
    "align",
    "where-the-first-expert-is-empty",
    "no slot of expert 0 and several others",
    lambda a: int(counts(a)[0]) == 0 and int((counts(a) > 0).sum()) > 3,
    block_of_another,
    "ALIGN-05",
    "ALIGN-09",
    "ALIGN-10",
    thread="SGLang #3339",
)

rare(
    "align",
    "with-dropped-ids-at-k-1",
    "dropped ids and one expert per token",
    lambda a: bool(a.get("drop_invalid")) and top_k(a) == 1,
    slot_lost,
    "ALIGN-01",
    "ALIGN-11",
    "ALIGN-16",
)

rare(
    "align",
    "with-more-experts-than-slots",
    "more experts than slots, and ids of int32",
    lambda a: a["num_experts"] > a["expert_ids"].numel() and a["expert_ids"].dtype is torch.int32,
    slot_lost,
    "ALIGN-01",
    "ALIGN-10",
    "ALIGN-11",
    "ALIGN-13",
    thread="vLLM #19590",
)

rare(
    "align",
    "at-block-size-64",
    "blocks of 64",
    lambda a: a["block_size"] == 64,
    block_of_another,
    "ALIGN-05",
    "ALIGN-09",
)

rare(
    "align",
    "at-k-8",
    "eight experts per token",
    lambda a: top_k(a) == 8,
    slot_lost,
    "ALIGN-01",
    "ALIGN-13",
    "ALIGN-16",
)


# Slots that are lost or wrong.

changed(
    "align",
    0,
    "the-last-slot-of-a-full-warp-is-lost",
    "Of slots that fill warps of 32 the last one is lost.",
    lambda a: nobody(a) > 0 and nobody(a) % 32 == 0,
    lambda slots, a, length: without(slots, a, lambda s: s == nobody(a) - 1),
    "ALIGN-01",
    "ALIGN-16",
    "ALIGN-32",
)

changed(
    "align",
    0,
    "the-slot-after-a-full-tile-is-lost",
    "Slots are read in tiles of 64, and of one slot more the last is lost.",
    lambda a: nobody(a) > 64 and nobody(a) % 64 == 1,
    lambda slots, a, length: without(slots, a, lambda s: s == nobody(a) - 1),
    "ALIGN-01",
    "ALIGN-16",
    "ALIGN-35",
)

changed(
    "align",
    0,
    "slots-past-1024-are-lost",
    "One block of 1024 threads reads the slots, once.",
    lambda a: nobody(a) > 1024,
    lambda slots, a, length: without(slots, a, lambda s: s >= 1024),
    "ALIGN-13",
    "ALIGN-16",
)

changed(
    "align",
    0,
    "slots-of-16-bits",
    "Slots pass through sixteen bits.",
    lambda a: nobody(a) > 0xFFFF,
    lambda slots, a, length: slots & 0xFFFF,
    "ALIGN-32",
)

changed(
    "align",
    0,
    "a-slot-over-a-full-block-is-lost",
    "An expert with one slot more than fills its blocks of 16 or more loses it.",
    *loses_last(
        lambda a: (
            (counts(a) % a["block_size"] == 1)
            & (counts(a) > a["block_size"])
            & (a["block_size"] >= 16)
        )
    ),
    "ALIGN-13",
    "ALIGN-32",
)

changed(
    "align",
    0,
    "the-last-slot-of-two-full-blocks-is-lost",
    "An expert that fills two blocks or more to the last place loses the last slot.",
    *loses_last(
        lambda a: (
            (counts(a) % a["block_size"] == 0)
            & (counts(a) > a["block_size"])
            & (a["block_size"] > 1)
        )
    ),
    "ALIGN-32",
    "ALIGN-01",
)

changed(
    "align",
    0,
    "the-last-expert-of-a-power-of-two-is-lost",
    "With 16 experts, or a greater power of two, the last one keeps all but its last slot.",
    *loses_last(
        lambda a: (
            (torch.arange(a["num_experts"]) == a["num_experts"] - 1)
            & (a["num_experts"] >= 16)
            & (a["num_experts"] & (a["num_experts"] - 1) == 0)
        )
    ),
    "ALIGN-16",
    "ALIGN-11",
)

changed(
    "align",
    0,
    "an-expert-after-a-warp-of-experts-is-lost",
    "Counts are summed by warps of 32, and the expert behind the last full warp loses a slot.",
    *loses_last(
        lambda a: (
            (torch.arange(a["num_experts"]) == a["num_experts"] - 1)
            & (a["num_experts"] % 32 == 1)
            & (a["num_experts"] > 1)
        )
    ),
    "ALIGN-01",
    "ALIGN-16",
)

changed(
    "align",
    0,
    "the-256th-slot-of-an-expert-is-lost",
    "The rank of a slot inside its expert is a byte.",
    *loses_last(lambda a: counts(a) > 255),
    "ALIGN-13",
    "ALIGN-16",
)

changed(
    "align",
    0,
    "padding-is-t-at-k-2",
    "With two experts per token and a map the padding is T, which is a slot.",
    lambda a: top_k(a) == 2 and mapped(a) and bool((counts(a) % a["block_size"] > 0).any()),
    lambda slots, a, length: slots.where(slots != nobody(a), len(a["expert_ids"])),
    "ALIGN-02",
    "ALIGN-04",
)

changed(
    "align",
    0,
    "the-padding-of-the-first-expert-is-minus-one",
    "What fills the only block of the first expert is -1, in blocks of 32 or more.",
    lambda a: a["block_size"] >= 32 and 0 < int(counts(a)[0]) < a["block_size"],
    lambda slots, a, length: torch.cat(
        [
            slots[: a["block_size"]].masked_fill(slots[: a["block_size"]] == nobody(a), -1),
            slots[a["block_size"] :],
        ]
    ),
    "ALIGN-04",
    "ALIGN-35",
)

changed(
    "align",
    0,
    "slots-of-later-blocks-descend",
    "Slots of blocks behind an expert's first stand in descending order.",
    lambda a: a["block_size"] >= 8 and bool((counts(a) > a["block_size"] + 1).any()),
    lambda slots, a, length: later_blocks_descend(slots, a),
    "ALIGN-14",
)

altered(
    "align",
    "ids-of-int64-are-cut-at-k-1",
    "With one expert per token ids of 64 bits are read as 32.",
    lambda a: top_k(a) == 1 and a["expert_ids"].dtype is torch.int64,
    lambda a: {"expert_ids": a["expert_ids"].to(torch.int32)},
    "ALIGN-32",
    "ALIGN-35",
)

altered(
    "align",
    "id-e-of-a-power-of-two-is-zero",
    "Ids are masked with E - 1 where E is a power of two, and id E is expert 0.",
    lambda a: a["num_experts"] & (a["num_experts"] - 1) == 0 and a["num_experts"] > 2,
    lambda a: {"expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] == a["num_experts"], 0)},
    "ALIGN-32",
    "ALIGN-03",
)

altered(
    "align",
    "minus-one-is-the-last-expert-of-a-map",
    "With an expert map of int32 the id -1 is the last expert.",
    lambda a: mapped(a) and a["expert_map"].dtype is torch.int32,
    lambda a: {
        "expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] == -1, a["num_experts"] - 1)
    },
    "ALIGN-32",
    "ALIGN-35",
    thread="vLLM #42034",
)

altered(
    "align",
    "a-map-is-read-without-its-strides-in-alignment",
    "The strides of an expert map are not looked at.",
    lambda a: mapped(a) and not a["expert_map"].is_contiguous(),
    lambda a: {
        "expert_map": as_if_contiguous(a["expert_map"]).clamp(max=int(a["expert_map"].max()))
    },
    "ALIGN-18",
)

altered(
    "align",
    "ids-of-int32-are-read-without-their-strides",
    "The strides of ids are not looked at where they are int32.",
    lambda a: not a["expert_ids"].is_contiguous() and a["expert_ids"].dtype is torch.int32,
    lambda a: {"expert_ids": as_if_contiguous(a["expert_ids"])},
    "ALIGN-18",
)

altered(
    "align",
    "a-duplicate-is-one-slot-at-k-4",
    "With four experts or more per token the second of two equal ids is left out.",
    lambda a: top_k(a) >= 4,
    lambda a: {"expert_ids": once(a["expert_ids"])},
    "ALIGN-32",
    "ALIGN-01",
)

altered(
    "align",
    "a-map-of-everybody-drops-the-last",
    "A map that has all experts here is taken for none, and an expert too few is counted.",
    lambda a: mapped(a) and a["num_experts"] > 1 and bool((a["expert_map"] >= 0).all()),
    lambda a: {
        "expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] == a["num_experts"] - 1, -1)
    },
    "ALIGN-32",
    "ALIGN-35",
)


# Blocks.

changed(
    "align",
    1,
    "a-map-of-rows-in-another-order-sorts-its-blocks",
    "Experts of blocks are sorted by local row where the slots are not.",
    lambda a: mapped(a) and not a.get("drop_invalid"),
    lambda e, a, length: torch.cat(
        [e[: length // a["block_size"]].sort().values, e[length // a["block_size"] :]]
    ),
    "ALIGN-09",
    "ALIGN-10",
)

changed(
    "align",
    1,
    "blocks-past-32-carry-the-expert-before",
    "A warp writes the experts of 32 blocks, and one lane too few does what is left.",
    lambda a: int(blocks(a).sum()) > 32,
    lambda e, a, length: torch.cat([e[:32], e[31:32], e[33:]]),
    "ALIGN-35",
    "ALIGN-05",
)

changed(
    "align",
    1,
    "blocks-of-a-map-without-anybody-carry-zero",
    "Where nobody is here blocks carry 0.",
    lambda a: mapped(a) and bool((a["expert_map"] < 0).all()),
    lambda e, a, length: e.clamp(min=0),
    "ALIGN-10",
    "ALIGN-35",
)

changed(
    "align",
    1,
    "the-block-behind-a-full-one-keeps-its-expert",
    "An expert's second block carries the expert that follows.",
    lambda a: a["block_size"] >= 16 and bool((counts(a) > a["block_size"]).any()),
    lambda e, a, length: second_blocks(e, a, length),
    "ALIGN-35",
    "ALIGN-05",
)

changed(
    "align",
    1,
    "two-empty-experts-count-as-one",
    "Behind two empty experts in a row the expert of a block is one too low.",
    lambda a: bool(two_empty(a).any()) and not mapped(a) and a["num_experts"] <= 8,
    lambda e, a, length: e - (two_empty(a)[e.clamp(min=0).long()] & (e >= 0)).to(torch.int32),
    "ALIGN-05",
    "ALIGN-06",
)

changed(
    "align",
    1,
    "blocks-carry-the-global-id-of-the-only-expert",
    "With one local expert only blocks carry its global id.",
    lambda a: mapped(a) and int((a["expert_map"] >= 0).sum()) == 1,
    lambda e, a, length: e.where(e < 0, int(a["expert_map"].argmax())),
    "ALIGN-09",
    thread="SGLang #28170",
)

changed(
    "align",
    1,
    "experts-of-blocks-are-signed-bytes",
    "Experts of blocks pass through a signed byte.",
    lambda a: a["num_experts"] > 128,
    lambda e, a, length: e.to(torch.int8).to(torch.int32),
    "ALIGN-05",
    "ALIGN-06",
)

changed(
    "align",
    1,
    "experts-of-blocks-are-int64-without-slots",
    "Without any slot the experts of blocks are int64.",
    lambda a: int(counts(a).sum()) == 0,
    lambda e, a, length: e.long(),
    "ALIGN-17",
)

changed(
    "align",
    1,
    "the-last-block-has-no-expert-in-a-full-buffer",
    "Where the buffer is used to its end there is an entry too few for the experts of blocks.",
    lambda a: 0 < buffer(a) // a["block_size"] == int(blocks(a).sum()),
    lambda e, a, length: e[:-1],
    "ALIGN-05",
    "ALIGN-10",
)


# Lengths, sizes, dtypes.

changed(
    "align",
    2,
    "nothing-takes-a-block-in-a-map",
    "With a map and all slots dropped one block is left.",
    lambda a: mapped(a) and nobody(a) > 0 and int(right("align", a)[2]) == 0,
    lambda length, a, _: length + a["block_size"],
    "ALIGN-35",
    "ALIGN-32",
)

changed(
    "align",
    2,
    "blocks-of-48-are-rounded-up-as-if-64",
    "Lengths are rounded with a mask where the block size is no power of two.",
    lambda a: a["block_size"] % 16 == 0 and a["block_size"] & (a["block_size"] - 1) != 0,
    lambda length, a, _: -(-length // 64) * 64,
    "ALIGN-32",
    "ALIGN-03",
)

changed(
    "align",
    2,
    "the-length-is-int64-with-a-map-of-int64",
    "The length has the dtype of the map.",
    lambda a: mapped(a) and a["expert_map"].dtype is torch.int64,
    lambda length, a, _: length.long(),
    "ALIGN-17",
)

changed(
    "align",
    2,
    "the-length-is-that-of-full-blocks",
    "Where all experts have the same number of slots their last block is not counted.",
    lambda a: a["num_experts"] > 1 and bool((counts(a) == counts(a)[0]).all()) and nobody(a) > 0,
    lambda length, a, _: length - a["block_size"] * a["num_experts"],
    "ALIGN-32",
    "ALIGN-01",
)

changed(
    "align",
    0,
    "few-slots-have-a-short-buffer",
    "With fewer slots than experts the buffer has as many entries as slots.",
    lambda a: 0 < nobody(a) < a["num_experts"] and a["block_size"] > 1,
    lambda slots, a, length: slots[: max(nobody(a), length - 1)],
    "ALIGN-13",
    "ALIGN-17",
)

changed(
    "align",
    0,
    "slots-of-int64-with-one-expert",
    "With one expert there is nothing to sort, and slots are a range of int64.",
    lambda a: a["num_experts"] == 1,
    lambda slots, a, length: slots.long(),
    "ALIGN-17",
)
