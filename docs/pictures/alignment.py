"""Pictures of alignment, drawn from what the reference computes."""

import torch
from moe_reference.alignment import align, align_batched, buffer_size

from pictures.svg import ROW, box, figure, label

IDS = torch.tensor([[0, 2], [2, 3], [0, 2], [3, 2], [2, 0]])
E, B, CELL, FILLED = 4, 4, 36, 0.5


def blocks() -> str:
    """Ten slots, four experts of which one is empty, blocks of four."""
    T, K = IDS.shape
    sorted_slots, block_experts, length = (each.tolist() for each in align(IDS, B, E))
    parts, y = _slots(IDS)
    y += ROW / 2
    parts += _blocks(y, sorted_slots, block_experts, length[0], IDS.flatten().tolist())
    y += 2 * ROW
    entries = buffer_size(T * K, B, E)
    reading = (
        f"{T * K} slots in blocks of {B}. Expert 1 has no slot and takes no block; expert 2 has "
        f"five and takes two. Dashed entries are padding and hold the sentinel {T * K}. The padded "
        f"length is {length[0]}; the buffer has {entries} entries, enough for any ids, and what "
        "stands in the rest means nothing."
    )
    return figure(y, "".join(parts), reading)


def elsewhere() -> str:
    """A rank with two of the four experts, with and without the blocks of the others."""
    ids = IDS.clone()
    ids[2] = torch.tensor([0, -1])
    expert_map = torch.tensor([1, -1, -1, 0])
    parts, y = _slots(ids)
    rows = ["-" if i < 0 else str(expert_map[i].item()) for i in ids.flatten().tolist()]
    parts.append(label(y, "expert_map gives"))
    parts += [box(s, y, 1, text, 0.0, framed=False, cell=CELL) for s, text in enumerate(rows)]
    y += 1.5 * ROW
    lengths = []
    for drop_invalid in (False, True):
        found = [each.tolist() for each in align(ids, B, E, expert_map, drop_invalid)]
        lengths.append(found[2][0])
        parts.append(label(y, f"drop_invalid={drop_invalid}", "italic"))
        y += ROW * 0.8
        parts += _blocks(y, *found[:2], lengths[-1], ids.flatten().tolist(), carried="carries ")
        y += 2.3 * ROW
    reading = (
        "Experts 3 and 0 live here, in rows 0 and 1 of the weights. By default the other experts "
        "keep their blocks, which carry -1, and experts are in order of their global id. With "
        f"drop_invalid their slots are in no block, the padded length is {lengths[1]} instead of "
        f"{lengths[0]}, and experts are in order of their local row. The slot whose id is -1 is in "
        "no block either way."
    )
    return figure(y, "".join(parts), reading)


def batched() -> str:
    """A batch [E, C] with rows in use, and its blocks."""
    counts, C = torch.tensor([2, 0, 5]), 6
    sorted_rows, block_experts, length = (each.tolist() for each in align_batched(counts, C, B))
    parts, y = [], 0
    for expert, count in enumerate(counts.tolist()):
        parts.append(label(y, f"expert {expert}: {count} in use"))
        for i in range(C):
            used = i < count
            parts.append(
                box(i, y, 1, str(expert * C + i), FILLED * used, struck=not used,
                    colour=expert, cell=CELL)
            )  # fmt: skip
        y += ROW
    y += ROW / 2
    owners = [row // C for row in range(len(counts) * C)]
    parts += _blocks(y, sorted_rows, block_experts, length[0], owners, name="sorted_rows")
    y += 2 * ROW
    reading = (
        f"A batch of {len(counts)} experts with {C} rows each, blocks of {B}. A row's id counts "
        f"all {C} rows of the experts before it, in use or not. The sentinel is {len(owners)}. The "
        "block size need not divide the rows."
    )
    return figure(y, "".join(parts), reading)


def _slots(ids):
    """Rows of slots, tokens and ids; where they end."""
    T, K = ids.shape
    parts = [label(0, "slot", "italic"), label(ROW, "token"), label(2 * ROW, "expert id")]
    parts += [box(s, 0, 1, str(s), 0.0, framed=False, cell=CELL) for s in range(T * K)]
    parts += [box(K * t, ROW, K, str(t), 0.0, cell=CELL) for t in range(T)]
    for s, expert in enumerate(ids.flatten().tolist()):
        here = expert >= 0
        parts.append(
            box(s, 2 * ROW, 1, str(expert), FILLED * here, struck=not here,
                colour=expert if here else None, cell=CELL)
        )  # fmt: skip
    return parts, 3 * ROW


def _blocks(y, entries, carried_by, length, owners, name="sorted_slots", carried="expert "):
    """The entries before the padded length, coloured by expert, and what their blocks carry."""
    parts = [label(y, name), label(y + ROW, "block_experts")]
    for place, entry in enumerate(entries[:length]):
        real = entry < len(owners)
        parts.append(
            box(place, y, 1, str(entry), FILLED * real, struck=not real,
                colour=owners[entry] if real else None, cell=CELL)
        )  # fmt: skip
    for block, row in enumerate(carried_by[: length // B]):
        parts.append(box(block * B, y + ROW, B, f"{carried}{row}", 0.0, marked=True, cell=CELL))
    return parts
