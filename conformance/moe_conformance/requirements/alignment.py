"""Requirements on `align` and `align_batched`: slots in blocks of one expert each.

Dimension key: T tokens, K experts per token, E experts, B block size, C rows of a batched expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moe_conformance.case import Case, must_raise
from moe_conformance.inputs.given import Given, Scope, deterministic
from moe_conformance.inputs.slots import ANY_BLOCK, batched, slots
from moe_conformance.judge import Violation
from moe_conformance.registry import MAY, MUST, requirement

Impostors = Iterable[tuple[str, Any]]
NOTHING = -(2**31)
"""Stands where a buffer ends before its padded length."""


@dataclass(frozen=True)
class Blocks:
    """The part of an answer that counts: what stands before the padded length.

    Attributes:
        slots: [blocks, B] int64; what a buffer lacks is `NOTHING`.
        carried: [blocks] int64, what `block_experts` says of each block.
        length: the padded length.
    """

    slots: torch.Tensor
    carried: torch.Tensor
    length: int

    @property
    def outputs(self) -> list[Any]:
        """As an implementation gives it."""
        return [self.slots.flatten().int(), self.carried.int(), self.length]

    def changed(self, places: torch.Tensor, value: int | torch.Tensor) -> list[Any]:
        """The answer with other slots at the marked places."""
        return Blocks(
            torch.where(places, torch.as_tensor(value), self.slots), self.carried, self.length
        ).outputs

    def carrying(self, places: torch.Tensor, value: int | torch.Tensor) -> list[Any]:
        """The answer with other experts at the marked blocks."""
        return Blocks(
            self.slots, torch.where(places, torch.as_tensor(value), self.carried), self.length
        ).outputs


@dataclass(frozen=True)
class Task:
    """What was asked, as all rules need it.

    Attributes:
        operation: `align` or `align_batched`.
        owner: [slots] int64, the expert of each slot; -1 where none is to stand in a block.
        carried: [E] int64, what the blocks of an expert carry.
        block_size: B.
    """

    operation: str
    owner: torch.Tensor
    carried: torch.Tensor
    block_size: int

    @property
    def sentinel(self) -> int:
        """What padding holds."""
        return len(self.owner)

    @property
    def counts(self) -> torch.Tensor:
        """[E] int64, slots per expert."""
        return torch.bincount(self.owner[self.owner >= 0], minlength=len(self.carried))

    @property
    def padded(self) -> int:
        """The padded length: whole blocks for each expert."""
        return int(((self.counts + self.block_size - 1) // self.block_size).sum()) * self.block_size

    def read(self, outputs: Any) -> Blocks:
        """What stands before the padded length, also of a buffer that is too short for it."""
        slots_, carried, length = _three(self.operation, outputs)
        blocks = -(-length // self.block_size)
        return Blocks(
            _first(slots_[:length], blocks * self.block_size, NOTHING).reshape(-1, self.block_size),
            _first(carried, blocks, NOTHING),
            length,
        )

    def owners(self, blocks: Blocks) -> torch.Tensor:
        """[blocks, B] the expert of each entry; -1 for padding and for slots that do not count."""
        known = (blocks.slots >= 0) & (blocks.slots < len(self.owner))
        if len(self.owner) == 0:
            return torch.full_like(blocks.slots, -1)
        return self.owner[blocks.slots.where(known, 0)].where(known, -1)


def _three(operation: str, outputs: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    if not isinstance(outputs, list) or len(outputs) != 3:
        came = f"{len(outputs)} of them" if isinstance(outputs, list) else type(outputs).__name__
        raise Violation(f"{operation}: expected 3 results, got {came}")
    slots_, carried, length = outputs
    for name, value in (("sorted slots", slots_), ("block_experts", carried)):
        if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.is_floating_point():
            raise Violation(f"{name}: expected one dimension of integers, got {_form(value)}")
    if isinstance(length, torch.Tensor):
        if length.numel() != 1:
            raise Violation(f"padded_length: expected one element, got {_form(length)}")
        length = int(length)
    if not isinstance(length, int):
        raise Violation(f"padded_length: expected an integer, got {type(length).__name__}")
    if not 0 <= length <= 2**24:
        raise Violation(f"padded_length: expected a length, got {length}")
    return slots_.long(), carried.long(), length


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _first(values: torch.Tensor, count: int, filling: int) -> torch.Tensor:
    missing = max(0, count - len(values))
    return torch.cat([values[:count], values.new_full((missing,), filling)])


def _aligned(case: Case, **changed: Any) -> tuple[Any, Task]:
    """Call `align`; what it gave, and what was asked."""
    names = ("expert_ids", "block_size", "num_experts", "expert_map", "drop_invalid")
    given = {name: case[name] for name in names} | changed
    answer = case.call("align", **given)
    task = _task(given)
    _note(case, task)
    ids = given["expert_ids"]
    case.note("invalid ids", bool(((ids < 0) | (ids >= given["num_experts"])).any()))
    return answer.outputs, task


def _task(given: dict[str, Any]) -> Task:
    """What these arguments of `align` ask for."""
    ids, experts = given["expert_ids"].flatten().long(), given["num_experts"]
    rows = torch.arange(experts) if given["expert_map"] is None else given["expert_map"].long()
    valid = (ids >= 0) & (ids < experts)
    if given["drop_invalid"]:
        valid &= rows[ids.where(valid, 0)] >= 0
    return Task("align", ids.where(valid, -1), rows, given["block_size"])


def _aligned_batched(case: Case) -> tuple[Any, Task]:
    """Call `align_batched`; what it gave, and what was asked."""
    given = {name: case[name] for name in ("tokens_per_expert", "max_tokens", "block_size")}
    answer = case.call("align_batched", **given)
    counts, largest = given["tokens_per_expert"].long(), given["max_tokens"]
    experts = torch.arange(len(counts))
    there = torch.arange(largest) < counts[:, None]
    owner = experts[:, None].where(there, -1).flatten()
    task = Task("align_batched", owner, experts, given["block_size"])
    _note(case, task)
    case.note("a buffer that is no multiple of the block size", largest % task.block_size != 0)
    return answer.outputs, task


def _note(case: Case, task: Task) -> None:
    counts = task.counts
    case.note("an empty expert", bool((counts == 0).any()))
    case.note("full blocks only", bool((counts % task.block_size == 0).all()))
    case.note("no slot at all", int(counts.sum()) == 0)


Rule = Callable[[Task, Blocks], None]


def _judge(
    case: Case, called: tuple[Any, Task], rule: Rule, wrong: Callable[[Task, Blocks], Impostors]
) -> None:
    """Hold an answer against a rule on its blocks, then wrong ones made from it."""
    outputs, task = called

    def impostors() -> Impostors:
        # The answer has passed the rule by now: what differs from it in the rule's matter is wrong.
        yield from wrong(task, task.read(outputs))

    case.judge(lambda answer: rule(task, task.read(answer)), outputs, impostors())


def _once(task: Task, blocks: Blocks) -> None:
    there = task.owners(blocks) >= 0
    found = torch.bincount(blocks.slots[there], minlength=len(task.owner))
    wrong = (task.owner >= 0) & (found != 1)
    if bool(wrong.any()):
        slot = int(wrong.nonzero()[0])
        raise Violation(
            f"slot {slot} (expert {int(task.owner[slot])}): expected once before the padded length "
            f"{blocks.length}, got {int(found[slot])} times; {int(wrong.sum())} slots are wrong",
            None,
            blocks.slots,
        )


def _not_once(task: Task, blocks: Blocks) -> Impostors:
    there = task.owners(blocks) >= 0
    if not bool(there.any()):
        return
    first = torch.zeros_like(there)
    first[tuple(there.nonzero()[0])] = True
    yield "a slot lost", blocks.changed(first, task.sentinel)
    if int(there.sum()) > 1:
        yield "a slot twice", blocks.changed(first, blocks.slots[there][-1])


def _single(task: Task, blocks: Blocks) -> None:
    owners = task.owners(blocks)
    last = owners.amax(-1)
    least = owners.where(owners >= 0, last[:, None]).amin(-1)
    mixed = least != last
    if bool(mixed.any()):
        block = int(mixed.nonzero()[0])
        raise Violation(
            f"block {block}: expected slots of one expert, got those of experts "
            f"{int(least[block])} and {int(last[block])}: {blocks.slots[block].tolist()}",
            None,
            blocks.slots,
        )


def _mixed(task: Task, blocks: Blocks) -> Impostors:
    owners = task.owners(blocks)
    block = int((owners >= 0).any(-1).int().argmax()) if len(owners) else 0
    foreign = (task.owner >= 0) & (task.owner != owners[block : block + 1].amax(-1, keepdim=True))
    if task.block_size > 1 and bool(foreign.any()):
        place = torch.zeros_like(blocks.slots, dtype=torch.bool)
        # The last entry: an expert's only slot stands in the first.
        place[block, -1] = True
        yield "another expert's slot", blocks.changed(place, int(foreign.nonzero()[0, -1]))


def _all_present(task: Task, blocks: Blocks) -> None:
    owners = task.owners(blocks)
    found = torch.bincount(owners[owners >= 0], minlength=len(task.carried))
    missed = (task.counts > 0) & (found == 0)
    if bool(missed.any()):
        expert = int(missed.nonzero()[0])
        raise Violation(
            f"expert {expert}: expected a block for its {int(task.counts[expert])} slots, got none",
            None,
            blocks.slots,
        )


def _exact_length(task: Task, blocks: Blocks) -> None:
    if blocks.length != task.padded:
        raise Violation(
            f"padded_length: expected {task.padded}, the sum over experts of ceil(count / "
            f"{task.block_size}) times {task.block_size}, got {blocks.length}",
            task.padded,
            blocks.length,
        )


def _other_lengths(task: Task, blocks: Blocks) -> Impostors:
    more = blocks.length + task.block_size
    yield "one block more", [*blocks.outputs[:2], more]
    if blocks.length:
        yield "one block less", [*blocks.outputs[:2], blocks.length - task.block_size]
    if int(task.counts.sum()) != blocks.length:
        yield "no padding", [*blocks.outputs[:2], int(task.counts.sum())]


def _padding(task: Task, blocks: Blocks) -> None:
    known = (blocks.slots >= 0) & (blocks.slots < task.sentinel)
    # A buffer that ends too early is the business of another requirement.
    wrong = ~known & (blocks.slots != task.sentinel) & (blocks.slots != NOTHING)
    if bool(wrong.any()):
        block, place = (int(i) for i in wrong.nonzero()[0])
        raise Violation(
            f"sorted entry {block * task.block_size + place}: expected a slot or the padding "
            f"{task.sentinel}, got {int(blocks.slots[block, place])}",
            None,
            blocks.slots,
        )
    # A slot's number is no padding either: it stands there once more than it should. Slots that
    # should not stand there at all are the business of another requirement, too.
    slots_ = int((task.owner >= 0).sum() + (known & (task.owners(blocks) < 0)).sum())
    free = blocks.slots.numel() - slots_
    padded = int((blocks.slots == task.sentinel).sum() + (blocks.slots == NOTHING).sum())
    if padded < free:
        raise Violation(
            f"padding: expected {free} entries that are {task.sentinel}, got {padded}",
            None,
            blocks.slots,
        )


def _other_padding(task: Task, blocks: Blocks) -> Impostors:
    pads = blocks.slots == task.sentinel
    if bool(pads.any()):
        yield "-1", blocks.changed(pads, -1)
        yield "one more", blocks.changed(pads, task.sentinel + 1)
        if int(task.owner[-1]) >= 0:
            yield "one less", blocks.changed(pads, task.sentinel - 1)


def _carried(task: Task, blocks: Blocks) -> None:
    owners = task.owners(blocks)
    expected = task.carried[owners.clamp_min(0)]
    wrong = ((owners >= 0) & (expected != blocks.carried[:, None])).any(-1)
    fits = ((owners >= 0) & (expected == blocks.carried[:, None])).any(-1)
    # A block that holds slots of two experts is the business of another requirement.
    wrong &= ~fits
    if bool(wrong.any()):
        block = int(wrong.nonzero()[0])
        place = int((owners[block] >= 0).nonzero()[0])
        raise Violation(
            f"block_experts[{block}]: expected {int(expected[block, place])} for slots of expert "
            f"{int(owners[block, place])}, got {_said(blocks.carried[block])}; "
            f"{int(wrong.sum())} of {len(wrong)} blocks are wrong",
            None,
            blocks.carried,
        )


def _said(value: torch.Tensor) -> str:
    return "nothing" if int(value) == NOTHING else str(int(value))


def _other_experts(task: Task, blocks: Blocks) -> Impostors:
    filled = (task.owners(blocks) >= 0).any(-1).nonzero()[:, 0].tolist()
    if filled:
        every = torch.ones_like(blocks.carried, dtype=torch.bool)
        yield "one expert further", blocks.carrying(every, blocks.carried + 1)
        cut = blocks.carried[: filled[-1]].int()
        yield "the last block's cut off", [blocks.outputs[0], cut, blocks.length]


def _no_empty(task: Task, blocks: Blocks) -> None:
    empty = task.carried[task.counts == 0]
    wrong = torch.isin(blocks.carried, empty[empty >= 0])
    if bool(wrong.any()):
        block = int(wrong.nonzero()[0])
        raise Violation(
            f"block_experts[{block}]: expected an expert that has slots, got "
            f"{int(blocks.carried[block])}, which has none",
            None,
            blocks.carried,
        )


def _with_empty(task: Task, blocks: Blocks) -> Impostors:
    empty = (task.counts == 0).nonzero()
    if len(empty):
        more = torch.cat([blocks.carried, task.carried[empty[0]]]).int()
        filled = torch.full((task.block_size,), task.sentinel, dtype=torch.int32)
        yield (
            "a block for an empty expert",
            [
                torch.cat([blocks.outputs[0], filled]),
                more,
                blocks.length + task.block_size,
            ],
        )


def _starts(task: Task, blocks: Blocks) -> torch.Tensor:
    """[E] where each expert's first slot stands, -1 for an expert without any."""
    owners = task.owners(blocks).flatten()
    places = torch.arange(len(owners))
    first = torch.full((len(task.carried),), len(owners))
    first.scatter_reduce_(0, owners.clamp_min(0), places.where(owners >= 0, len(owners)), "amin")
    return first.where(first < len(owners), -1)


def _ascending(task: Task, blocks: Blocks) -> None:
    starts = _starts(task, blocks)
    present = (starts >= 0).nonzero()[:, 0]
    descends = (starts[present].diff() < 0).nonzero()
    if len(descends):
        first, second = present[int(descends[0]) : int(descends[0]) + 2].tolist()
        raise Violation(
            f"experts {first} and {second}: expected in ascending order, got their first slots at "
            f"{int(starts[first])} and {int(starts[second])}",
            None,
            blocks.slots,
        )


def _descending(task: Task, blocks: Blocks) -> Impostors:
    if int((_starts(task, blocks) >= 0).sum()) > 1:
        turned = blocks.slots.flip(0).flatten().int()
        yield "descending experts", [turned, blocks.carried.flip(0).int(), blocks.length]


def _together(task: Task, blocks: Blocks) -> None:
    owners = task.owners(blocks).flatten()
    starts = _starts(task, blocks)
    counts = torch.bincount(owners[owners >= 0], minlength=len(starts))
    places = torch.arange(len(owners))
    own = owners.clamp_min(0)
    outside = (owners >= 0) & (places >= starts[own] + counts[own])
    late = (starts >= 0) & (starts % task.block_size != 0)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        expert = int(owners[place])
        raise Violation(
            f"expert {expert}: expected its {int(counts[expert])} slots one after the other from "
            f"entry {int(starts[expert])} on, got one at entry {place}",
            None,
            blocks.slots,
        )
    if bool(late.any()):
        expert = int(late.nonzero()[0])
        raise Violation(
            f"expert {expert}: expected its first slot at the beginning of a block of "
            f"{task.block_size}, got it at entry {int(starts[expert])}",
            None,
            blocks.slots,
        )


def _apart(task: Task, blocks: Blocks) -> Impostors:
    there = task.owners(blocks) >= 0
    if bool((there.any(-1) & ~there.all(-1)).any()):
        yield (
            "padding in front",
            [
                blocks.slots.flip(1).flatten().int(),
                blocks.carried.int(),
                blocks.length,
            ],
        )
    several = (task.counts > task.block_size).nonzero()
    if len(several) and int((task.counts > 0).sum()) > 1:
        first = int(_starts(task, blocks)[several[0]]) // task.block_size
        order = torch.arange(len(blocks.slots)).roll(-first - 1)
        yield (
            "an expert's blocks apart",
            [
                blocks.slots[order].flatten().int(),
                blocks.carried[order].int(),
                blocks.length,
            ],
        )


def _ordered(task: Task, blocks: Blocks) -> None:
    owners = task.owners(blocks).flatten()
    there = owners >= 0
    slots_, owners = blocks.slots.flatten()[there], owners[there]
    by_expert = owners.argsort(stable=True)
    slots_, owners = slots_[by_expert], owners[by_expert]
    wrong = (slots_.diff() < 0) & (owners.diff() == 0)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise Violation(
            f"expert {int(owners[place])}: expected its slots in ascending order, got "
            f"{int(slots_[place])} before {int(slots_[place + 1])}",
            None,
            blocks.slots,
        )


def _disordered(task: Task, blocks: Blocks) -> Impostors:
    if int(task.counts.max()) > 1:
        turned = blocks.slots.flatten().flip(0).int()
        yield "the other way around", [turned, blocks.carried.flip(0).int(), blocks.length]


def _absent(task: Task, blocks: Blocks) -> None:
    known = (blocks.slots >= 0) & (blocks.slots < task.sentinel)
    wrong = known & (task.owners(blocks) < 0)
    if bool(wrong.any()):
        block, place = (int(i) for i in wrong.nonzero()[0])
        raise Violation(
            f"sorted entry {block * task.block_size + place}: slot "
            f"{int(blocks.slots[block, place])} has no expert here and is not expected in a block",
            None,
            blocks.slots,
        )


def _present(task: Task, blocks: Blocks) -> Impostors:
    gone = (task.owner < 0).nonzero()
    if len(gone):
        filled = torch.full((task.block_size,), task.sentinel, dtype=torch.int32)
        filled[0] = int(gone[0])
        yield (
            "a block with such a slot",
            [
                torch.cat([blocks.outputs[0], filled]),
                torch.cat([blocks.carried, torch.tensor([0])]).int(),
                blocks.length + task.block_size,
            ],
        )


def _has_forms(task: Task, outputs: Any) -> None:
    _three(task.operation, outputs)
    for name, value in zip(
        ("sorted slots", "block_experts", "padded_length"), outputs, strict=True
    ):
        if isinstance(value, torch.Tensor) and value.dtype is not torch.int32:
            raise Violation(f"{name}: expected int32, got {_form(value)}")
    needed = (task.padded, task.padded // task.block_size)
    for name, value, least in zip(("sorted slots", "block_experts"), outputs, needed, strict=False):
        if len(value) < least:
            raise Violation(f"{name}: expected {least} entries at least, got {len(value)}")


def _judge_forms(case: Case, called: tuple[Any, Task]) -> None:
    outputs, task = called

    def impostors() -> Impostors:
        blocks = task.read(outputs)
        yield "int64", [blocks.slots.flatten(), blocks.carried, blocks.length]
        if task.padded:
            yield "slots cut off", [blocks.outputs[0][: task.padded - 1], *blocks.outputs[1:]]
            yield "no block_experts", [blocks.outputs[0], blocks.outputs[1][:0], blocks.length]

    case.judge(lambda answer: _has_forms(task, answer), outputs, impostors())


LARGER = (2, ANY_BLOCK[1])
"""Block sizes that can leave room for padding."""

SEVERAL = ("uniform", "skewed", "half empty", "duplicates", "full blocks")
"""Loads in which more than one expert has slots."""

VLLM = "vLLM moe_align_block_size"
VLLM_BATCHED = "vLLM batched_moe_align_block_size"
ALIGN = ("alignment.align",)
BATCHED = ("alignment.align_batched",)


@requirement(
    "ALIGN-01",
    MUST,
    "align",
    "Every slot whose expert counts MUST stand exactly once before `padded_length`.",
    reason="A slot that is lost is a token-expert pair that is never computed; one that stands "
    "twice is added twice or overwritten.",
    sources=(
        VLLM,
        "aiter #4451",
        "aiter #4041",
    ),
    given=slots(),
    references=ALIGN,
)
def every_slot_stands_exactly_once(case: Case) -> None:
    """The slots of experts that count, each of them once."""
    _judge(case, _aligned(case), _once, _not_once)


@requirement(
    "ALIGN-02",
    MUST,
    "align",
    "A block MUST hold slots of one expert only.",
    reason="The kernel multiplies a whole block with one expert's weights.",
    sources=(VLLM,),
    given=slots(blocks=LARGER, least_experts=2, loads=SEVERAL),
    references=ALIGN,
)
def a_block_belongs_to_one_expert(case: Case) -> None:
    """The ids of a block's slots are all the same."""
    _judge(case, _aligned(case), _single, _mixed)


@requirement(
    "ALIGN-03",
    MUST,
    "align",
    "`padded_length` MUST be exactly the sum over experts of ceil(count / B) times B.",
    reason="The kernel runs one program for each block before it; one too many reads a block that "
    "nobody filled, one too few loses an expert's last rows.",
    sources=(
        VLLM,
        "vLLM #55896",
        "aiter #2447",
    ),
    given=slots(),
    references=ALIGN,
)
def the_padded_length_is_exact(case: Case) -> None:
    """The length against the counts of the ids."""
    _judge(case, _aligned(case), _exact_length, _other_lengths)


@requirement(
    "ALIGN-04",
    MUST,
    "align",
    "What is no slot before `padded_length` MUST be T·K, the number of all slots.",
    reason="Kernels mask their loads by comparing with the number of slots; -1 would pass.",
    sources=(VLLM,),
    given=slots(blocks=LARGER, loads=("uniform", "skewed", "half empty")),
    references=ALIGN,
)
def padding_is_the_number_of_slots(case: Case) -> None:
    """As many entries as there is room to fill, all T·K."""
    _judge(case, _aligned(case), _padding, _other_padding)


@requirement(
    "ALIGN-05",
    MUST,
    "align",
    "`block_experts` MUST name the expert of each block before `padded_length`.",
    reason="It selects the weights; one block off computes good rows with a wrong expert.",
    sources=(
        VLLM,
        "vLLM #55896",
    ),
    given=slots(mapped=False),
    references=ALIGN,
)
def each_block_names_its_expert(case: Case) -> None:
    """The expert of each block against the ids of its slots."""
    _judge(case, _aligned(case), _carried, _other_experts)


@requirement(
    "ALIGN-06",
    MUST,
    "align",
    "An expert without slots MUST take no block.",
    reason="With hundreds of experts and few tokens most are empty, and their weights would be "
    "read for nothing.",
    sources=(VLLM,),
    given=slots(
        mapped=False, least_experts=2, loads=("half empty", "one expert", "skewed", "full blocks")
    ),
    references=ALIGN,
)
def an_empty_expert_takes_no_block(case: Case) -> None:
    """No block before the padded length names an expert that has no slots."""
    _judge(case, _aligned(case), _no_empty, _with_empty)


@requirement(
    "ALIGN-07",
    MUST,
    "align",
    "Experts MUST follow each other in ascending order.",
    reason="Consumers find an expert's rows by the running sum of the counts.",
    sources=(VLLM,),
    given=slots(least_experts=2, invalid=False, mapped=False, loads=SEVERAL),
    references=ALIGN,
)
def experts_follow_in_ascending_order(case: Case) -> None:
    """The first slots of the experts, without a map: with one, both numbers are legal orders."""
    _judge(case, _aligned(case), _ascending, _descending)


@requirement(
    "ALIGN-08",
    MUST,
    "align",
    "An expert's slots MUST stand one after the other from the beginning of a block, its padding "
    "behind them.",
    reason="Consumers stop at an expert's first padding, or take its first slot for its offset.",
    sources=(VLLM,),
    given=slots(blocks=LARGER),
    references=ALIGN,
)
def padding_follows_the_slots(case: Case) -> None:
    """First slot, number of slots, last slot: nothing in between."""
    _judge(case, _aligned(case), _together, _apart)


@requirement(
    "ALIGN-09",
    MUST,
    "align",
    "With an `expert_map` blocks of local experts MUST carry the map's local row.",
    reason="The weights of a rank hold its own experts only; a global id reads past them.",
    sources=(VLLM, "SGLang #28170", "flashinfer #1469", "aiter #2447"),
    given=slots(mapped=True, invalid=False, least_experts=2, loads=SEVERAL),
    references=ALIGN,
    kinds=2,
)
def blocks_carry_local_rows(case: Case) -> None:
    """Blocks whose slots are local, against a map that permutes."""
    outputs, task = _aligned(case)
    local = Task(task.operation, task.owner.clone(), task.carried, task.block_size)
    elsewhere = (task.owner >= 0) & (task.carried[task.owner.clamp_min(0)] < 0)
    local.owner[elsewhere] = -1
    _judge(case, (outputs, local), _carried, _other_local)


def _other_local(task: Task, blocks: Blocks) -> Impostors:
    local = (task.owners(blocks) >= 0).any(-1)
    if bool(local.any()):
        yield "one row further", blocks.carrying(local, blocks.carried + 1)
        yield "-1", blocks.carrying(local, -1)


@requirement(
    "ALIGN-10",
    MUST,
    "align",
    "Without `drop_invalid` blocks of experts that live elsewhere MUST be there and carry -1.",
    reason="Their rows have to be skipped or written as zeros; any other number is an address.",
    sources=(VLLM, "aiter #2447", "vLLM #19590", "vLLM #29642"),
    given=slots(mapped=True, dropped=False, least_experts=2),
    references=ALIGN,
)
def blocks_of_other_ranks_carry_minus_one(case: Case) -> None:
    """Every one of them that has slots has a block, and the block carries -1."""
    outputs, task = _aligned(case)
    elsewhere = (task.owner >= 0) & (task.carried[task.owner.clamp_min(0)] < 0)
    other = Task(task.operation, task.owner.where(elsewhere, -1), task.carried, task.block_size)

    def rule(task: Task, blocks: Blocks) -> None:
        _all_present(task, blocks)
        _carried(task, blocks)

    def wrong(task: Task, blocks: Blocks) -> Impostors:
        theirs = (task.owners(blocks) >= 0).any(-1)
        if bool(theirs.any()):
            yield "0", blocks.carrying(theirs, 0)
            yield (
                "no such blocks",
                [
                    blocks.slots[~theirs].flatten().int(),
                    blocks.carried[~theirs].int(),
                    int((~theirs).sum()) * task.block_size,
                ],
            )

    _judge(case, (outputs, other), rule, wrong)


@requirement(
    "ALIGN-11",
    MUST,
    "align",
    "With `drop_invalid` the slots of local experts and no others MUST be in blocks, and no block "
    "before `padded_length` carries -1.",
    reason="The kernel then needs no test for -1, and reads before the first expert if there is "
    "one.",
    sources=(VLLM, "vLLM #19590", "aiter #2447", "SGLang #28170"),
    given=slots(mapped=True, dropped=True, invalid=False, least_experts=2),
    references=ALIGN,
)
def local_slots_alone_are_in_blocks(case: Case) -> None:
    """A block for every local expert that has slots, no slot that is not local, and no -1."""

    def rule(task: Task, blocks: Blocks) -> None:
        _all_present(task, blocks)
        _absent(task, blocks)
        negative = (blocks.carried < 0) & (blocks.carried != NOTHING)
        if bool(negative.any()):
            block = int(negative.nonzero()[0])
            raise Violation(
                f"block_experts[{block}]: expected a local row, got {int(blocks.carried[block])}"
            )

    def wrong(task: Task, blocks: Blocks) -> Impostors:
        yield from _present(task, blocks)
        if len(blocks.carried):
            yield "-1", blocks.carrying(torch.ones_like(blocks.carried, dtype=torch.bool), -1)

    _judge(case, _aligned(case), rule, wrong)


@requirement(
    "ALIGN-12",
    MUST,
    "align",
    "Ids below 0 and from E on MUST be ignored: their slots are in no block.",
    reason="As an index -1 is the last expert in Python and an access out of bounds elsewhere.",
    sources=(VLLM, "vLLM #42034", "aiter #4636", "SGLang #12701", "transformers #48653"),
    given=slots(invalid=True),
    references=ALIGN,
)
def invalid_ids_are_ignored(case: Case) -> None:
    """-1, E, and ids far outside of either end."""
    outputs, task = _aligned(case)
    ids = case["expert_ids"].flatten().long()
    owner = ids.where((ids >= 0) & (ids < len(task.carried)), -1)
    in_range = Task("align", owner, task.carried, task.block_size)
    _judge(case, (outputs, in_range), _absent, _present)


@requirement(
    "ALIGN-13",
    MUST,
    "align",
    "Equal ids in a row MUST each have their slot in a block.",
    reason="A boolean map of tokens and experts holds one of them only.",
    sources=(
        "docs/spec/operations.md",
        "DeepSeek moe_infer",
    ),
    given=slots(loads=("duplicates",), invalid=False, mapped=False, least_k=2),
    references=ALIGN,
)
def equal_ids_in_a_row_are_both_sorted(case: Case) -> None:
    """As ALIGN-01, with experts that repeat within a row."""
    case.note("duplicates")
    _judge(case, _aligned(case), _once, _not_once)


@requirement(
    "ALIGN-14",
    MUST,
    "align",
    "Where the target is declared deterministic, an expert's slots MUST ascend.",
    reason="Atomic counters order them differently from run to run, and sums over them with them.",
    sources=("vLLM #53440", "FlagGems #6492", "transformers #43362"),
    given=deterministic(
        slots(loads=("skewed", "one expert", "duplicates", "full blocks"), least_experts=2)
    ),
    references=ALIGN,
)
def slots_of_an_expert_ascend(case: Case) -> None:
    """The slots of each expert, read from left to right."""
    _judge(case, _aligned(case), _ordered, _disordered)


@requirement(
    "ALIGN-15",
    MUST,
    "align",
    "Zero tokens MUST give a `padded_length` of 0.",
    reason="A rank without tokens is an ordinary batch.",
    sources=(
        "torchtitan #1166",
        "vLLM #43547",
        "DeepSpeed #5066",
    ),
    given=slots(),
    references=ALIGN,
)
def zero_tokens_need_no_block(case: Case) -> None:
    """The same call with the tokens cut away."""
    called = _aligned(case, expert_ids=case["expert_ids"][:0])
    _judge(case, called, _exact_length, _other_lengths)


@requirement(
    "ALIGN-16",
    MUST,
    "align",
    "With block size 1 there MUST be one block for each slot and no padding.",
    reason="Decoding with a token or two runs at the smallest block size.",
    sources=(VLLM, "aiter #4041"),
    given=slots(blocks=(1, 1), mapped=False, invalid=False),
    references=ALIGN,
)
def block_size_one_has_no_padding(case: Case) -> None:
    """padded_length is the number of slots, and none of the entries before it is T·K."""

    def rule(task: Task, blocks: Blocks) -> None:
        _exact_length(task, blocks)
        padding = (blocks.slots == task.sentinel).nonzero()
        if len(padding):
            raise Violation(
                f"sorted entry {int(padding[0, 0])}: expected a slot, got the padding "
                f"{task.sentinel}",
                None,
                blocks.slots,
            )

    def wrong(task: Task, blocks: Blocks) -> Impostors:
        yield from _other_lengths(task, blocks)
        yield "a slot lost", blocks.changed(blocks.slots == blocks.slots[0], task.sentinel)

    _judge(case, _aligned(case), rule, wrong)


@requirement(
    "ALIGN-17",
    MUST,
    "align",
    "Slots and `block_experts` MUST be int32 and long enough for `padded_length`, which is an int "
    "or an int32 of one element.",
    reason="Kernels read them by pointer: another width or a short buffer is an access out of "
    "bounds.",
    sources=(
        VLLM,
        "SGLang #3339",
    ),
    given=slots(),
    references=ALIGN,
    kinds=2,
)
def buffers_are_int32_and_long_enough(case: Case) -> None:
    """Dtypes and lengths against the counts of the ids."""
    _judge_forms(case, _aligned(case))


@requirement(
    "ALIGN-18",
    MUST,
    "align",
    "Ids and map MUST be read by their strides.",
    reason="A router's ids are often a slice or a transposed view; read as one piece of memory "
    "they are other ids.",
    sources=(
        "docs/spec/operations.md",
        "hyper_parallel router",
    ),
    given=slots(moved=True, invalid=False),
    references=ALIGN,
)
def ids_are_read_by_their_strides(case: Case) -> None:
    """Transposed, strided and offset ids and maps against the same ones in one piece."""
    outputs, task = _aligned(case)
    case.note("a map", case["expert_map"] is not None)
    plain = _placed(task.read(_aligned(case, layouts={})[0]))

    def rule(task: Task, blocks: Blocks) -> None:
        found = _placed(blocks)
        if not torch.equal(found, plain):
            raise Violation(
                f"expected the blocks of the same ids in one piece, {len(plain)} entries, got "
                f"{len(found)} entries, or others",
                plain,
                found,
            )

    def wrong(task: Task, blocks: Blocks) -> Impostors:
        yield from _not_once(task, blocks)
        yield from _other_experts(task, blocks)

    _judge(case, (outputs, task), rule, wrong)


def _placed(blocks: Blocks) -> torch.Tensor:
    """Each entry with what its block carries, in an order that is the same for every legal one."""
    pairs = blocks.slots * 2**20 + blocks.carried[:, None]
    return pairs.flatten().sort().values


def _undeclared(given: Given) -> Given:
    """The same inputs, for targets whose declaration sets `align` no limits."""

    def plans(scope: Scope) -> Any:
        free = scope.capabilities.alternatives("align") == [{}]
        return given.plans(scope) if free and scope.capabilities.block_sizes is None else None

    return Given(plans, given.build)


@requirement(
    "ALIGN-19",
    MUST,
    "align",
    "A block size below 1, ids that are no [T, K] integers and a map that has not one entry for "
    "each expert MUST raise.",
    reason="A block size of 0 divides by zero on the device, a short map is read out of bounds.",
    sources=(
        "docs/spec/operations.md",
        "vLLM #29642",
    ),
    given=_undeclared(slots(invalid=False)),
    references=ALIGN,
)
def what_cannot_be_aligned_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    ids, experts = case["expert_ids"], case["num_experts"]
    good = {
        "expert_ids": ids,
        "block_size": case["block_size"],
        "num_experts": experts,
        "expert_map": None,
        "drop_invalid": case["drop_invalid"],
    }
    must_raise(
        case,
        "align",
        good,
        {
            "block_size 0": good | {"block_size": 0},
            "a negative block_size": good | {"block_size": -case["block_size"]},
            "ids with one dimension": good | {"expert_ids": ids.flatten()},
            "ids that are floats": good | {"expert_ids": ids.float()},
            "a map that is too short": good | {"expert_map": torch.zeros(experts - 1).int()},
            "a map that is too long": good | {"expert_map": torch.zeros(experts + 1).int()},
        },
    )


@requirement(
    "ALIGN-20",
    MAY,
    "align",
    "What stands past `padded_length` MAY be anything, and nobody reads it.",
    reason="Kernels have filled it with 0 and with -1, and both were right.",
    sources=(
        VLLM,
        "SGLang #3339",
    ),
    given=slots(),
    references=ALIGN,
)
def the_tail_is_nobodys_business(case: Case) -> None:
    """What is found there is counted and never judged."""
    outputs, task = _aligned(case)
    sorted_, carried, length = _three("align", outputs)
    tail = sorted_[length:]
    case.note("slots without a tail", len(tail) == 0)
    case.note("slots with a tail of T·K", len(tail) > 0 and bool((tail == task.sentinel).all()))
    carried = carried[length // task.block_size :]
    case.note("blocks without a tail", len(carried) == 0)
    for value in (-1, 0):
        case.note(f"blocks with a tail of {value}", _only(carried, value))


def _only(values: torch.Tensor, value: int) -> bool:
    return len(values) > 0 and bool((values == value).all())


@requirement(
    "ALIGN-21",
    MUST,
    "align_batched",
    "Row e·C + i MUST stand exactly once before `padded_length` for every i below the count of "
    "expert e.",
    reason="A row that is lost is never computed; its place in the buffer keeps what was there.",
    sources=(VLLM_BATCHED,),
    given=batched(),
    references=BATCHED,
)
def every_filled_row_stands_exactly_once(case: Case) -> None:
    """As ALIGN-01, for the rows of a batched buffer."""
    _judge(case, _aligned_batched(case), _once, _not_once)


@requirement(
    "ALIGN-22",
    MUST,
    "align_batched",
    "`padded_length` MUST be exactly the sum over experts of ceil(count / B) times B, whether or "
    "not the block size divides the buffer.",
    reason="Padding the buffer instead of the count computes rows that nobody filled.",
    sources=(VLLM_BATCHED, "vLLM #55896"),
    given=batched(least_tokens=0),
    references=BATCHED,
)
def the_batched_length_is_exact(case: Case) -> None:
    """As ALIGN-03; a capacity of 96 with blocks of 64 is among what is drawn."""
    _judge(case, _aligned_batched(case), _exact_length, _other_lengths)


@requirement(
    "ALIGN-23",
    MUST,
    "align_batched",
    "What is no row before `padded_length` MUST be E·C, the number of rows of the buffer.",
    reason="Kernels mask their loads by comparing with it.",
    sources=(VLLM_BATCHED,),
    given=batched(blocks=LARGER, loads=("uniform", "half empty", "full")),
    references=BATCHED,
)
def batched_padding_is_the_number_of_rows(case: Case) -> None:
    """As ALIGN-04."""
    _judge(case, _aligned_batched(case), _padding, _other_padding)


@requirement(
    "ALIGN-24",
    MUST,
    "align_batched",
    "A block MUST hold rows of one expert, and `block_experts` MUST name it.",
    reason="It selects the weights that the block is multiplied with.",
    sources=(VLLM_BATCHED, "vLLM #55896"),
    given=batched(),
    references=BATCHED,
)
def each_batched_block_names_its_expert(case: Case) -> None:
    """As ALIGN-02 and ALIGN-05."""

    def rule(task: Task, blocks: Blocks) -> None:
        _single(task, blocks)
        _carried(task, blocks)

    _judge(case, _aligned_batched(case), rule, _other_experts)


@requirement(
    "ALIGN-25",
    MUST,
    "align_batched",
    "An expert without rows MUST take no block.",
    reason="In a batched buffer most experts are empty while decoding.",
    sources=(VLLM_BATCHED,),
    given=batched(loads=("half empty", "one expert")),
    references=BATCHED,
)
def an_empty_batch_takes_no_block(case: Case) -> None:
    """As ALIGN-06."""
    _judge(case, _aligned_batched(case), _no_empty, _with_empty)


@requirement(
    "ALIGN-26",
    MUST,
    "align_batched",
    "Rows from the count on MUST be in no block.",
    reason="What they hold is left from an earlier call, or was never written.",
    sources=("SGLang #3339", "pytorch #154557", "SGLang #30895"),
    given=batched(loads=("uniform", "half empty", "one expert", "full blocks")),
    references=BATCHED,
)
def rows_past_the_count_are_in_no_block(case: Case) -> None:
    """Before the padded length there is no row that was not filled."""
    _judge(case, _aligned_batched(case), _absent, _present)


@requirement(
    "ALIGN-27",
    MUST,
    "align_batched",
    "Experts MUST ascend, each one's rows one after the other from the beginning of a block with "
    "the padding behind them.",
    reason="Consumers find an expert's blocks by the running sum of the counts.",
    sources=(VLLM_BATCHED,),
    given=batched(loads=("uniform", "half empty", "full")),
    references=BATCHED,
)
def batched_rows_stand_together(case: Case) -> None:
    """As ALIGN-07 and ALIGN-08."""

    def rule(task: Task, blocks: Blocks) -> None:
        _ascending(task, blocks)
        _together(task, blocks)

    def wrong(task: Task, blocks: Blocks) -> Impostors:
        yield from _descending(task, blocks)
        yield from _apart(task, blocks)

    _judge(case, _aligned_batched(case), rule, wrong)


@requirement(
    "ALIGN-28",
    MUST,
    "align_batched",
    "Rows and `block_experts` MUST be int32 and long enough for `padded_length`, which is an int "
    "or an int32 of one element.",
    reason="A buffer of E times the capacity is too short where the block size does not divide it.",
    sources=(
        VLLM_BATCHED,
        "SGLang #3339",
    ),
    given=batched(loads=("full", "uniform", "full blocks")),
    references=BATCHED,
)
def batched_buffers_are_long_enough(case: Case) -> None:
    """As ALIGN-17."""
    _judge_forms(case, _aligned_batched(case))


@requirement(
    "ALIGN-29",
    MUST,
    "align_batched",
    "Counts that are all zero MUST give a `padded_length` of 0.",
    reason="A rank that received nothing is an ordinary batch.",
    sources=(
        "torchtitan #1166",
        "vLLM #43547",
        "DeepSpeed #5066",
    ),
    given=batched(least_tokens=0),
    references=BATCHED,
)
def an_empty_buffer_needs_no_block(case: Case) -> None:
    """The same call with every count set to zero."""
    case.inputs["tokens_per_expert"] = torch.zeros_like(case["tokens_per_expert"])
    _judge(case, _aligned_batched(case), _exact_length, _other_lengths)


@requirement(
    "ALIGN-30",
    MUST,
    "align_batched",
    "Where the target is declared deterministic, an expert's rows MUST ascend.",
    reason="Atomic counters order them differently from run to run.",
    sources=("vLLM #53440", "FlagGems #6492"),
    given=deterministic(batched(loads=("uniform", "full"), least_tokens=3)),
    references=BATCHED,
)
def batched_rows_ascend(case: Case) -> None:
    """As ALIGN-14."""
    _judge(case, _aligned_batched(case), _ordered, _disordered)


@requirement(
    "ALIGN-31",
    MUST,
    "align_batched",
    "A block size below 1, a negative capacity and counts that are no [E] integers MUST raise.",
    reason="They divide by zero or count backwards on the device.",
    sources=(
        "docs/spec/operations.md",
        VLLM_BATCHED,
    ),
    given=_undeclared(batched()),
    references=BATCHED,
)
def what_cannot_be_aligned_in_batches_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    counts = case["tokens_per_expert"]
    good = {
        "tokens_per_expert": counts,
        "max_tokens": case["max_tokens"],
        "block_size": case["block_size"],
    }
    must_raise(
        case,
        "align_batched",
        good,
        {
            "block_size 0": good | {"block_size": 0},
            "a negative block_size": good | {"block_size": -case["block_size"]},
            "a negative max_tokens": good | {"max_tokens": -1},
            "counts with two dimensions": good | {"tokens_per_expert": counts[None]},
            "counts that are floats": good | {"tokens_per_expert": counts.float()},
        },
    )


@requirement(
    "ALIGN-32",
    MUST,
    "align",
    "More slots than sixteen bits hold MUST each stand exactly once before `padded_length`.",
    reason="A prompt of 8000 tokens with eight experts each is beyond them; a slot or a count that "
    "wraps around is another token's.",
    sources=("vLLM #34279", "vLLM #34507", "SGLang #4727", "Liger #1248"),
    given=slots(long=True),
    references=ALIGN,
)
def slots_beyond_sixteen_bits_stand_once(case: Case) -> None:
    """As ALIGN-01, ALIGN-03 and ALIGN-04, just beyond 2^15 and 2^16 slots."""
    case.note("beyond 2^16", case["expert_ids"].numel() >= 2**16)
    _judge(case, _aligned(case), _complete, _not_once)


def _complete(task: Task, blocks: Blocks) -> None:
    _exact_length(task, blocks)
    _once(task, blocks)
    _padding(task, blocks)


@requirement(
    "ALIGN-33",
    MUST,
    "align_batched",
    "More rows than sixteen bits hold MUST each stand exactly once before `padded_length`.",
    reason="256 experts with room for 256 rows each are as many; a row id that wraps around is "
    "another expert's row.",
    sources=("vLLM #34279", "vLLM #34507", "SGLang #4727", "Liger #1248"),
    given=batched(long=True),
    references=BATCHED,
)
def rows_beyond_sixteen_bits_stand_once(case: Case) -> None:
    """As ALIGN-32."""
    case.note("beyond 2^16", len(case["tokens_per_expert"]) * case["max_tokens"] >= 2**16)
    _judge(case, _aligned_batched(case), _complete, _not_once)


@requirement(
    "ALIGN-34",
    MUST,
    "align_batched",
    "Counts MUST be read by their strides.",
    reason="They are often a column of a table of ranks and experts.",
    sources=("docs/spec/operations.md", "hyper_parallel router"),
    given=batched(moved=True),
    references=BATCHED,
)
def counts_are_read_by_their_strides(case: Case) -> None:
    """As ALIGN-21 and ALIGN-22, with counts that lie apart or begin inside a buffer."""
    _judge(case, _aligned_batched(case), _complete, _other_lengths)


@requirement(
    "ALIGN-35",
    MUST,
    "align",
    "A call on the same storage with other data MUST give the answer to the other data.",
    reason="Counters that are not set back, a map that is kept, or a captured graph answer the "
    "first call once more.",
    sources=("SGLang #3339", "SGLang #25852"),
    given=slots(least_experts=2),
    references=ALIGN,
)
def the_same_ids_storage_with_other_ids(case: Case) -> None:
    """The second call's ids and map are written over the first one's."""
    names = ("expert_ids", "block_size", "num_experts", "expert_map", "drop_invalid")
    given = {name: case[name] for name in names}
    ids, experts, rows = given["expert_ids"], given["num_experts"], given["expert_map"]
    # Every valid id moves by one expert, every expert by one local row.
    here = (ids >= 0) & (ids < experts)
    changed = {
        "expert_ids": torch.where(here, (ids + 1) % experts, ids),
        "expert_map": None if rows is None else rows.flip(0),
    }
    first = case.planned("align", **given)
    second = case.planned("align", **given | changed, reuse=0)
    answer = case.session([first, second])[1]
    _judge(case, (answer.outputs, _task(given | changed)), _whole, _other_lengths)


def _whole(task: Task, blocks: Blocks) -> None:
    _complete(task, blocks)
    _single(task, blocks)
    _carried(task, blocks)
