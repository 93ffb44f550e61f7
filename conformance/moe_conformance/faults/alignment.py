"""Seeded faults of `align` and `align_batched`."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Aligned = tuple[Tensor, Tensor, Tensor]


@dataclass
class Share:
    """The slots of one expert.

    Attributes:
        expert: its id.
        carried: what its blocks carry.
        slots: ascending.
    """

    expert: int
    carried: int
    slots: list[int]


@dataclass(frozen=True)
class Call:
    """The arguments of `align`."""

    expert_ids: Tensor
    block_size: int
    num_experts: int
    expert_map: Tensor | None
    drop_invalid: bool


class Arranged(Reference):
    """Both operations from one arrangement of shares: right, until a subclass slips."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        """As the reference does it."""
        super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
        rows = list(range(num_experts)) if expert_map is None else expert_map.tolist()
        shares = [Share(expert, rows[expert], []) for expert in range(num_experts)]
        for slot, expert in enumerate(expert_ids.flatten().tolist()):
            if 0 <= expert < num_experts:
                shares[expert].slots.append(slot)
        if drop_invalid:
            shares = sorted((s for s in shares if s.carried >= 0), key=lambda s: s.carried)
        return self.arrange(shares, block_size, expert_ids.numel())

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        """As the reference does it."""
        super().align_batched(tokens_per_expert, max_tokens, block_size)
        counts = tokens_per_expert.tolist()
        shares = [
            Share(expert, expert, [expert * max_tokens + i for i in range(count)])
            for expert, count in enumerate(counts)
        ]
        return self.arrange(shares, block_size, len(counts) * max_tokens)

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        """Each share from the start of a block."""
        entries: list[int] = []
        carried: list[int] = []
        for share in shares:
            blocks = self.blocks(len(share.slots), block_size)
            entries += self.lay(share.slots, blocks * block_size, block_size, sentinel)
            carried += [share.carried] * blocks
        return self.result(entries, carried)

    def blocks(self, count: int, block_size: int) -> int:
        """How many blocks so many slots take."""
        return -(-count // block_size)

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        """One share and its padding."""
        return slots + [sentinel] * (room - len(slots))

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        """As tensors."""
        return (
            torch.tensor(entries, dtype=torch.int32),
            torch.tensor(carried, dtype=torch.int32),
            torch.tensor([len(entries)], dtype=torch.int32),
        )


class Around(Reference):
    """`align` of the reference, with its arguments or its answer changed."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        given = self.before(Call(expert_ids, block_size, num_experts, expert_map, drop_invalid))
        return self.after(self.right(given), given)

    def right(self, given: Call) -> Aligned:
        """What the reference answers."""
        return super().align(
            given.expert_ids,
            given.block_size,
            given.num_experts,
            given.expert_map,
            given.drop_invalid,
        )

    def before(self, given: Call) -> Call:
        """The arguments as this target takes them."""
        return given

    def after(self, aligned: Aligned, given: Call) -> Aligned:
        """What this target makes of the right answer."""
        return aligned


class Ids(Around):
    """`align` of the reference for other ids, where the call is one that it takes."""

    def before(self, given: Call) -> Call:
        self.right(given)
        return replace(given, expert_ids=self.read(given.expert_ids, given))

    def read(self, ids: Tensor, given: Call) -> Tensor:
        """The ids as this target sees them."""
        return ids


@fault("slots-beyond-a-warp-lost", catches=("ALIGN-01", "ALIGN-21"))
class SlotsBeyondAWarpLost(Arranged):
    """Only the first 32 slots of an expert are written, as a warp has no more threads."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        return super().lay(slots[:32], room, block_size, sentinel)


@fault("last-tile-of-slots-unread", catches=("ALIGN-01", "ALIGN-21"), thread="aiter #4041")
class LastTileOfSlotsUnread(Arranged):
    """Slots are read in tiles of 16, and the last tile only where it is full."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        read = [slot for slot in slots if slot < sentinel // 16 * 16]
        return super().lay(read, room, block_size, sentinel)


@fault("local-row-0-dropped", catches=("ALIGN-11",))
class LocalRow0Dropped(Around):
    """With `drop_invalid` a slot is kept where its local row is > 0 instead of >= 0."""

    def before(self, given: Call) -> Call:
        if given.expert_map is None or not given.drop_invalid:
            return given
        return replace(given, expert_map=given.expert_map.where(given.expert_map > 0, -1))


@fault("padding-at-the-end-only", catches=("ALIGN-02", "ALIGN-24"))
class PaddingAtTheEndOnly(Arranged):
    """Slots are sorted but not padded by expert; the padding follows after the last of them."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        room = sum(self.blocks(len(share.slots), block_size) for share in shares) * block_size
        entries = [slot for share in shares for slot in share.slots]
        owners = [share.carried for share in shares for _ in share.slots]
        padding = room - len(entries)
        owners += owners[-1:] * padding
        return self.result(entries + [sentinel] * padding, owners[::block_size])


@fault("a-lone-slot-shares-a-block", catches=("ALIGN-02", "ALIGN-24"))
class ALoneSlotSharesABlock(Arranged):
    """An expert's only slot is written into the padding of the expert before it."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        sorted_, carried, length = super().arrange(shares, block_size, sentinel)
        entries, start = sorted_.tolist(), 0
        for share in shares:
            room = self.blocks(len(share.slots), block_size) * block_size
            if len(share.slots) == 1 and start > 0 and entries[start - 1] == sentinel:
                entries[start - 1], entries[start] = entries[start], sentinel
            start += room
        return torch.tensor(entries, dtype=torch.int32), carried, length


@fault("one-padded-block-too-many", catches=("ALIGN-03", "ALIGN-22"))
class OnePaddedBlockTooMany(Arranged):
    """The padded length is the index of the last block plus two."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        sorted_, carried, length = super().arrange(shares, block_size, sentinel)
        more = sorted_.new_full((block_size,), sentinel)
        expert = carried[-1:] if len(carried) else carried.new_zeros(1)
        return torch.cat([sorted_, more]), torch.cat([carried, expert]), length + block_size


@fault("full-blocks-get-another", catches=("ALIGN-03", "ALIGN-22"))
class FullBlocksGetAnother(Arranged):
    """Blocks are counted as count // B + 1, one too many where the last one is full."""

    def blocks(self, count: int, block_size: int) -> int:
        return count // block_size + 1 if count else 0


@fault("ceil-by-bit-mask", catches=("ALIGN-03",))
class CeilByBitMask(Arranged):
    """Counts are rounded up with a bit mask, which takes a power of two for the block size."""

    def blocks(self, count: int, block_size: int) -> int:
        power = 1 << (block_size - 1).bit_length()
        return -(-(-(-count // power) * power) // block_size)


@fault("elsewhere-counted-in-the-length", catches=("ALIGN-03",))
class ElsewhereCountedInTheLength(Around):
    """With `drop_invalid` the length is still the one of all experts."""

    def after(self, aligned: Aligned, given: Call) -> Aligned:
        sorted_, carried, _ = aligned
        length = self.right(replace(given, drop_invalid=False))[2]
        # The blocks that are too many carry an expert, so that their number alone is wrong.
        used = carried[carried >= 0]
        experts = carried.where(carried >= 0, used[-1]) if len(used) else carried
        return sorted_, experts if given.drop_invalid else carried, length


@fault("padding-is-minus-one", catches=("ALIGN-04", "ALIGN-23"))
class PaddingIsMinusOne(Arranged):
    """Padding is -1."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        return super().lay(slots, room, block_size, -1)


@fault("padding-is-the-number-of-tokens", catches=("ALIGN-04",))
class PaddingIsTheNumberOfTokens(Around):
    """Padding is T instead of T·K."""

    def after(self, aligned: Aligned, given: Call) -> Aligned:
        sorted_, carried, length = aligned
        ids = given.expert_ids
        return sorted_.where(sorted_ != ids.numel(), len(ids)), carried, length


@fault("padding-counts-valid-slots-only", catches=("ALIGN-04",))
class PaddingCountsValidSlotsOnly(Arranged):
    """Padding is the number of slots that were sorted, which is less where some were left out."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        return super().arrange(shares, block_size, sum(len(share.slots) for share in shares))


@fault("padding-is-the-capacity", catches=("ALIGN-23",))
class PaddingIsTheCapacity(Reference):
    """Padding of the batched form is C instead of E·C, the first row of the second expert."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        sorted_, carried, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        padding = len(tokens_per_expert) * max_tokens
        return sorted_.where(sorted_ != padding, max_tokens), carried, length


@fault("block-experts-skip-empty-ones", catches=("ALIGN-05", "ALIGN-24"))
class BlockExpertsSkipEmptyOnes(Arranged):
    """Experts in `block_experts` are numbered among those that have slots."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        filled = [share for share in shares if share.slots]
        for number, share in enumerate(filled):
            share.carried = number if share.carried >= 0 else -1
        return super().arrange(filled, block_size, sentinel)


@fault("one-byte-for-an-expert", catches=("ALIGN-05",))
class OneByteForAnExpert(Arranged):
    """`block_experts` passes through an unsigned byte."""

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        return super().result(entries, [e % 256 if e >= 0 else e for e in carried])


@fault("a-table-of-512-experts", catches=("ALIGN-01", "ALIGN-03"))
class ATableOf512Experts(Reference):
    """Counts stand in a table of 512 experts: slots of those beyond it are left out."""

    def align(self, expert_ids: Tensor, *rest: Any, **named: Any) -> Aligned:
        return super().align(expert_ids.masked_fill(expert_ids >= 512, -1), *rest, **named)


@fault("first-of-equal-starts", catches=("ALIGN-05", "ALIGN-06", "ALIGN-25"))
class FirstOfEqualStarts(Arranged):
    """A block's expert is searched among the starts, and the first of equal ones is empty."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        sorted_, carried, length = super().arrange(shares, block_size, sentinel)
        experts, block, first = carried.tolist(), 0, None
        for share in shares:
            first = share.carried if first is None else first
            if share.slots:
                experts[block] = first
                block += self.blocks(len(share.slots), block_size)
                first = None
        return sorted_, torch.tensor(experts, dtype=torch.int32), length


@fault("empty-experts-take-a-block", catches=("ALIGN-06", "ALIGN-25", "ALIGN-03"))
class EmptyExpertsTakeABlock(Arranged):
    """Every expert gets at least one block."""

    def blocks(self, count: int, block_size: int) -> int:
        return max(1, super().blocks(count, block_size))


@fault("experts-in-order-of-arrival", catches=("ALIGN-07",))
class ExpertsInOrderOfArrival(Arranged):
    """Experts stand in the order in which their first slot came."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        arrived = sorted(shares, key=lambda share: share.slots[:1] or [sentinel])
        return super().arrange(arrived, block_size, sentinel)


@fault("radix-digits-exchanged", catches=("ALIGN-07", "ALIGN-27"))
class RadixDigitsExchanged(Arranged):
    """Experts are sorted by their low six bits last: wrong from the 65th expert on."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        ranked = sorted(range(len(shares)), key=lambda i: (i % 64, i // 64))
        return super().arrange([shares[i] for i in ranked], block_size, sentinel)


@fault("padding-in-front", catches=("ALIGN-08", "ALIGN-27"))
class PaddingInFront(Arranged):
    """An expert's slots end with its last block, and the padding stands in front of them."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        return [sentinel] * (room - len(slots)) + slots


@fault("blocks-filled-evenly", catches=("ALIGN-08",))
class BlocksFilledEvenly(Arranged):
    """The slots of an expert that needs several blocks are spread over them evenly."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        laid: list[int] = []
        blocks = room // block_size
        for block in range(blocks):
            own = slots[len(slots) * block // blocks : len(slots) * (block + 1) // blocks]
            laid += own + [sentinel] * (block_size - len(own))
        return laid


@fault("global-experts-in-blocks", catches=("ALIGN-09",), thread="SGLang #28170")
class GlobalExpertsInBlocks(Arranged):
    """Blocks of local experts carry the global id."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        for share in shares:
            share.carried = share.expert if share.carried >= 0 else -1
        return super().arrange(shares, block_size, sentinel)


@fault("local-rows-by-counting", catches=("ALIGN-09",))
class LocalRowsByCounting(Arranged):
    """An expert's local row is taken for the number of local experts before it."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        local = sorted(share.expert for share in shares if share.carried >= 0)
        for share in shares:
            share.carried = local.index(share.expert) if share.carried >= 0 else -1
        return super().arrange(shares, block_size, sentinel)


@fault("blocks-of-others-carry-0", catches=("ALIGN-10",))
class BlocksOfOthersCarry0(Arranged):
    """Blocks of experts that live elsewhere carry 0, which is a row."""

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        return super().result(entries, [max(expert, 0) for expert in carried])


@fault("blocks-of-others-carry-the-last-expert", catches=("ALIGN-10",), thread="aiter #2447")
class BlocksOfOthersCarryTheLastExpert(Arranged):
    """A block of an expert that lives elsewhere keeps the expert of the block before it."""

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        kept: list[int] = []
        for expert in carried:
            kept.append(kept[-1] if expert < 0 and kept else expert)
        return super().result(entries, kept)


@fault("others-always-dropped", catches=("ALIGN-10",), thread="vLLM #29642")
class OthersAlwaysDropped(Around):
    """Slots of experts that live elsewhere are dropped without being asked to."""

    def before(self, given: Call) -> Call:
        return replace(given, drop_invalid=True)


@fault("drop-invalid-ignored", catches=("ALIGN-11", "ALIGN-03"), thread="vLLM #19590")
class DropInvalidIgnored(Around):
    """`drop_invalid` is taken and never looked at."""

    def before(self, given: Call) -> Call:
        return replace(given, drop_invalid=False)


@fault("local-experts-taken-for-a-range", catches=("ALIGN-11",))
class LocalExpertsTakenForARange(Around):
    """Dropped is what lies before the first local expert or behind the last, nothing between."""

    def before(self, given: Call) -> Call:
        if given.expert_map is None or not given.drop_invalid:
            return given
        local = (given.expert_map >= 0).nonzero()[:, 0].tolist() or [given.num_experts]
        inside = (given.expert_ids >= local[0]) & (given.expert_ids <= local[-1])
        ids = given.expert_ids.where(inside, -1)
        return replace(given, expert_ids=ids, drop_invalid=False)


@fault("minus-one-is-the-last-expert", catches=("ALIGN-12",), thread="SGLang #12701")
class MinusOneIsTheLastExpert(Ids):
    """Negative ids count from the end, as indices do in Python."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        experts = given.num_experts
        return ids.where((ids >= 0) | (ids < -experts), ids + experts)


@fault("id-e-is-the-last-expert", catches=("ALIGN-12",), thread="transformers #48653")
class IdEIsTheLastExpert(Ids):
    """The sentinel E is cut down to the last expert."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        return ids.where(ids != given.num_experts, given.num_experts - 1)


@fault("ids-cut-to-32-bits", catches=("ALIGN-12",))
class IdsCutTo32Bits(Ids):
    """Ids are cast to int32 before they are checked."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        return ids.int()


@fault("map-read-at-minus-one", catches=("ALIGN-12",), thread="vLLM #42034")
class MapReadAtMinusOne(Ids):
    """The map is read at -1, which is the last global expert's local row."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        return ids if given.expert_map is None else ids.where(ids != -1, given.num_experts - 1)


@fault("a-mask-holds-one-of-two", catches=("ALIGN-13",))
class AMaskHoldsOneOfTwo(Ids):
    """Slots are found in a mask of tokens and experts, which holds a repeated id once."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        seen = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
        return ids.where(~seen, -1)


@fault("equal-neighbours-merged", catches=("ALIGN-13",))
class EqualNeighboursMerged(Ids):
    """An id equal to the one before it in the row is left out."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        merged = ids.clone()
        merged[:, 1:] = ids[:, 1:].where(ids[:, 1:] != ids[:, :-1], -1)
        return merged


@fault("slots-in-order-of-atomics", catches=("ALIGN-14", "ALIGN-30"), thread="FlagGems #6492")
class SlotsInOrderOfAtomics(Arranged):
    """The last thread wins the first place."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        return super().lay(slots[::-1], room, block_size, sentinel)


@fault("chunks-in-order-of-finish", catches=("ALIGN-14", "ALIGN-30"), thread="vLLM #53440")
class ChunksInOrderOfFinish(Arranged):
    """Experts with more than 32 slots are written by two programs, the second one first."""

    def lay(self, slots: list[int], room: int, block_size: int, sentinel: int) -> list[int]:
        return super().lay(slots[32:] + slots[:32], room, block_size, sentinel)


@fault("nothing-still-takes-a-block", catches=("ALIGN-15", "ALIGN-29"))
class NothingStillTakesABlock(Arranged):
    """A batch without slots is padded to one block, so that there is something to launch."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        if any(share.slots for share in shares):
            return super().arrange(shares, block_size, sentinel)
        return self.result([sentinel] * block_size, [0])


@fault("a-length-of-nothing-is-one", catches=("ALIGN-15", "ALIGN-29"))
class ALengthOfNothingIsOne(Arranged):
    """The length is the last index that was written plus one, and index 0 where none was."""

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        sorted_, experts, length = super().result(entries, carried)
        return sorted_, experts, length.clamp_min(1)


@fault("smallest-block-is-two", catches=("ALIGN-16", "ALIGN-03"))
class SmallestBlockIsTwo(Arranged):
    """With block size 1 every expert is padded to an even number of slots."""

    def blocks(self, count: int, block_size: int) -> int:
        return count + count % 2 if block_size == 1 else super().blocks(count, block_size)


@fault("one-block-per-token", catches=("ALIGN-16",))
class OneBlockPerToken(Around):
    """With block size 1 there is one block for each token: the other K - 1 slots are lost."""

    def after(self, aligned: Aligned, given: Call) -> Aligned:
        sorted_, carried, length = aligned
        tokens = len(given.expert_ids)
        return sorted_, carried, length.clamp_max(tokens) if given.block_size == 1 else length


@fault("slots-as-int64", catches=("ALIGN-17", "ALIGN-28"))
class SlotsAsInt64(Arranged):
    """Sorted slots keep the dtype of the sort."""

    def result(self, entries: list[int], carried: list[int]) -> Aligned:
        sorted_, experts, length = super().result(entries, carried)
        return sorted_.long(), experts, length


@fault("buffers-for-the-slots-alone", catches=("ALIGN-17", "ALIGN-28"))
class BuffersForTheSlotsAlone(Arranged):
    """The buffer has room for every slot, and for the padding only where experts are not full."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        sorted_, carried, length = super().arrange(shares, block_size, sentinel)
        return sorted_[:sentinel], carried, length


@fault("a-block-of-experts-too-few", catches=("ALIGN-17", "ALIGN-28"))
class ABlockOfExpertsTooFew(Arranged):
    """`block_experts` has T·K divided by B entries, padding not counted."""

    def arrange(self, shares: list[Share], block_size: int, sentinel: int) -> Aligned:
        sorted_, carried, length = super().arrange(shares, block_size, sentinel)
        return sorted_, carried[: -(-sentinel // block_size)], length


@fault("ids-read-as-one-piece", catches=("ALIGN-18",))
class IdsReadAsOnePiece(Ids):
    """Ids are read from their first address on, whatever the strides are."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        return ids.as_strided(ids.shape, (ids.shape[1], 1))


@fault("ids-read-in-order-of-memory", catches=("ALIGN-18",))
class IdsReadInOrderOfMemory(Ids):
    """Ids that lie column by column are numbered column by column."""

    def read(self, ids: Tensor, given: Call) -> Tensor:
        by_column = not ids.is_contiguous() and ids.stride(0) == 1
        return ids.t().reshape(ids.shape) if by_column else ids


def _nothing() -> Aligned:
    none = torch.zeros(0, dtype=torch.int32)
    return none, none, torch.zeros(1, dtype=torch.int32)


@fault("nothing-is-checked", catches=("ALIGN-19", "ALIGN-31"))
class NothingIsChecked(Reference):
    """What does not fit is answered with nothing."""

    def align(self, *arguments: Any, **named: Any) -> Aligned:
        try:
            return super().align(*arguments, **named)
        except (TypeError, ValueError):
            return _nothing()

    def align_batched(self, *arguments: Any, **named: Any) -> Aligned:
        try:
            return super().align_batched(*arguments, **named)
        except (TypeError, ValueError):
            return _nothing()


@fault("block-size-0-is-1", catches=("ALIGN-19", "ALIGN-31"))
class BlockSize0Is1(Around):
    """A block size below 1 is raised to 1."""

    def before(self, given: Call) -> Call:
        return replace(given, block_size=max(given.block_size, 1))

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        return super().align_batched(tokens_per_expert, max_tokens, max(block_size, 1))


@fault("a-long-map-is-cut", catches=("ALIGN-19",))
class ALongMapIsCut(Around):
    """A map with too many entries is cut to the number of experts."""

    def before(self, given: Call) -> Call:
        rows = given.expert_map
        return replace(given, expert_map=None if rows is None else rows[: given.num_experts])


@fault("rows-numbered-by-padded-capacity", catches=("ALIGN-21",))
class RowsNumberedByPaddedCapacity(Reference):
    """Row e·C + i is numbered with C rounded up to the block size."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        sorted_, carried, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        total = len(tokens_per_expert) * max_tokens
        skipped = -max_tokens % block_size
        moved = sorted_ + sorted_ // max(max_tokens, 1) * skipped
        return sorted_.where(sorted_ == total, moved), carried, length


@fault("length-of-the-whole-buffer", catches=("ALIGN-22",))
class LengthOfTheWholeBuffer(Reference):
    """The padded length is that of a full buffer."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        sorted_, carried, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        return sorted_, carried, torch.full_like(length, len(sorted_))


@fault("experts-as-if-all-were-full", catches=("ALIGN-24",))
class ExpertsAsIfAllWereFull(Reference):
    """A block's expert is its number divided by the blocks of a full expert."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        sorted_, carried, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        each = max(-(-max_tokens // block_size), 1)
        return sorted_, (torch.arange(len(carried)) // each).int(), length


@fault("padding-goes-on-counting", catches=("ALIGN-26",))
class PaddingGoesOnCounting(Arranged):
    """The rest of a block is filled with the row ids that follow, as far as there are any."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        sorted_, carried, length = super().align_batched(tokens_per_expert, max_tokens, block_size)
        entries = sorted_.tolist()
        total = len(tokens_per_expert) * max_tokens
        for place in range(1, len(entries)):
            following = entries[place - 1] + 1
            if entries[place] == total and following % max_tokens != 0 and following < total:
                entries[place] = following
        return torch.tensor(entries, dtype=torch.int32), carried, length


@fault("the-count-is-the-last-row", catches=("ALIGN-26",))
class TheCountIsTheLastRow(Reference):
    """Rows up to and with the count are taken, where the buffer has one more."""

    def align_batched(self, tokens_per_expert: Tensor, max_tokens: int, block_size: int) -> Aligned:
        inclusive = tokens_per_expert + (tokens_per_expert > 0)
        return super().align_batched(inclusive.clamp_max(max_tokens), max_tokens, block_size)
