"""Pictures of slices and placements, drawn from what the reference computes."""

import torch
from moe_reference.activations import feed_forward, one_by_one
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.expert_slicing import (
    assign_experts,
    assign_round_robin,
    make_expert_map,
    slice_tensor_parallel,
)
from moe_reference.placement import (
    add_shared_column,
    assign_external_shared,
    make_placement,
    physical_ids,
    place_experts,
)

from pictures.svg import LABEL, ROW, box, figure, label

FILLED = 0.5
LOAD = torch.tensor([90, 20, 30, 20, 10, 10])
RANKS, PHYSICAL = 3, 9
IDS = torch.tensor([[0, 2], [1, 0], [0, 5], [0, 1], [3, 0]])
CONFIG = ExpertsConfig("relu")


def shares() -> str:
    """Seven experts on three ranks, contiguous and in turn, and the map of one rank."""
    E, R, shown = 7, 3, 1
    parts = [label(0, "expert", "italic")]
    parts += [box(e, 0, 1, str(e), 0.0, framed=False) for e in range(E)]
    held_by = {}
    for rank in range(R):
        start, count = assign_experts(E, R, rank)
        held_by[rank] = (range(start, start + count), assign_round_robin(E, R, rank))
    for line, name in enumerate(("assign_experts", "assign_round_robin")):
        y = (1 + 2.2 * line) * ROW
        parts.append(label(y, name))
        parts.append(label(y + ROW, f"map of rank {shown}"))
        for rank, held in held_by.items():
            for e in held[line]:
                parts.append(box(e, y, 1, f"rank {rank}", FILLED, colour=rank))
        for e, row in enumerate(make_expert_map(E, held_by[shown][line]).tolist()):
            here = row >= 0
            parts.append(
                box(e, y + ROW, 1, str(row), FILLED * here, struck=not here,
                    colour=shown if here else None)
            )  # fmt: skip
    sizes = ", ".join(str(len(held[0])) for held in held_by.values())
    reading = (
        f"{E} experts on {R} ranks: {sizes} of them, the first ranks one more. The map of a rank "
        "gives the row of an expert among those that the rank holds, and -1 for the others."
    )
    return figure(5.3 * ROW, "".join(parts), reading)


def halves() -> str:
    """The rows of gate_up on two ranks, cut per half and cut as one tensor."""
    I, R = 4, 2
    rows = torch.arange(2.0 * I).view(1, 2 * I, 1)
    weights = ExpertWeights(rows, torch.zeros(1, 1, I))
    parts, cell = [label(0, "gate_up", "italic")], 60
    names = [f"{half}{i}" for half in "gu" for i in range(I)]
    for row, name in enumerate(names):
        parts.append(box(row, 0, 1, name, FILLED, colour=row // I, cell=cell))
    for rank in range(R):
        right = slice_tensor_parallel(weights, R, rank).gate_up.flatten().int().tolist()
        wrong = rows.flatten().int().chunk(R)[rank].tolist()
        for line, (cut, held) in enumerate((("each half", right), ("as one tensor", wrong))):
            y = (1.3 + line * 2.3 + rank) * ROW
            parts.append(label(y, f"{cut}, rank {rank}"))
            for place, row in enumerate(held):
                parts.append(
                    box(place, y, 1, names[row], FILLED, struck=line == 1, colour=row // I,
                        cell=cell)
                )  # fmt: skip
            gates = sum(row < I for row in held)
            told = "the same rows of both" if 2 * gates == len(held) else f"{gates} rows of gate"
            parts.append(_note(len(held) + 0.2, y, cell, told))
    reading = (
        f"The rows of gate_up, I = {I}, for two ranks; g is the gate, u is up. A rank needs the "
        "same rows of both. Dashed: cut as one tensor, one rank gets nothing but gates. The shapes "
        "are right, and what should be up is taken from the gate."
    )
    return figure(5.8 * ROW, "".join(parts), reading)


def partial_sums() -> str:
    """Outputs of two ranks that hold slices, and of two that hold everything."""
    weights = ExpertWeights(
        gate_up=torch.tensor([[[1.0], [2.0], [3.0], [1.0]]]),
        down=torch.tensor([[[1.0, 2.0]]]),
        down_bias=torch.tensor([[5.0]]),
    )
    x, R, unit = torch.ones(1, 1), 2, 22.0
    whole = _outputs([weights], x)
    sliced = _outputs([slice_tensor_parallel(weights, R, rank) for rank in range(R)], x)
    lines = [
        ("one rank", whole, ["whole"]),
        ("slices, summed", sliced, ["rank 0, bias too", "rank 1"]),
        ("no slices, summed", whole * R, ["rank 0", "rank 1"]),
    ]
    parts = []
    for line, (name, outputs, texts) in enumerate(lines):
        parts.append(label(line * ROW, name))
        start = 0.0
        for rank, (output, text) in enumerate(zip(outputs, texts, strict=True)):
            parts.append(
                box(start, line * ROW, output, f"{text}: {output:g}", FILLED, colour=rank,
                    struck=line == 2, cell=unit)
            )  # fmt: skip
            start += output
        parts.append(_note(start + 0.6, line * ROW, unit, f"= {start:g}"))
    assert sum(sliced) == sum(whole)
    reading = (
        f"The output of one expert for one token, by rank. Two slices add up to the whole, "
        f"{sum(sliced):g}; the bias of down is in one of them. Two ranks that were given the whole "
        f"weights and are summed all the same make {R * sum(whole):g}."
    )
    return figure(len(lines) * ROW, "".join(parts), reading)


def placement() -> str:
    """Six experts with their load, copies for the busiest, and the ranks' loads."""
    found = place_experts(LOAD, PHYSICAL, RANKS)
    each = (LOAD / found.replica_count).tolist()
    parts, unit = [label(0, "expert", "italic"), label(ROW, "load"), label(2 * ROW, "copies")], 64
    parts.append(label(3 * ROW, "load of each copy"))
    for e, load in enumerate(LOAD.tolist()):
        parts.append(box(e, 0, 1, str(e), 0.0, framed=False, cell=unit))
        parts.append(box(e, ROW, 1, str(load), 0.75 * load / max(LOAD.tolist()), cell=unit))
        copies = int(found.replica_count[e])
        parts.append(box(e, 2 * ROW, 1, str(copies), 0.0, marked=copies > 1, cell=unit))
        parts.append(
            box(e, 3 * ROW, 1, f"{each[e]:g}", 0.75 * each[e] / max(LOAD.tolist()), cell=unit)
        )
    logical, ranks = found.physical_to_logical.tolist(), found.rank_of_physical.tolist()
    alone = [sum(LOAD[e].item() for e in share) for share in _contiguous()]
    loads = [
        sum(each[e] for e, on in zip(logical, ranks, strict=True) if on == rank)
        for rank in range(RANKS)
    ]
    scale = 520 / max(alone + loads)
    y = 4.5 * ROW
    for title, held, totals, weight in [
        ("one copy each", _contiguous(), alone, LOAD.tolist()),
        ("placed", [[e for e, on in zip(logical, ranks, strict=True) if on == r]
                    for r in range(RANKS)], loads, each),
    ]:  # fmt: skip
        for rank, experts in enumerate(held):
            parts.append(label(y, f"{title}, rank {rank}"))
            start = 0.0
            for e in experts:
                parts.append(box(start, y, weight[e], str(e), FILLED, colour=rank, cell=scale))
                start += weight[e]
            parts.append(_note(start + 6 / scale, y, scale, f"{totals[rank]:g}"))
            y += ROW
        y += 0.4 * ROW
    reading = (
        f"{len(LOAD)} experts, {PHYSICAL} physical ones on {RANKS} ranks; a box is as wide as its "
        f"load, and the number in it is the expert. With one copy each, in order, a rank has "
        f"{max(alone):g} at most; placed, {max(loads):g}. The mean is "
        f"{sum(LOAD.tolist()) / RANKS:g}."
    )
    return figure(y, "".join(parts), reading)


def copies() -> str:
    """Logical ids and the copies that the pairs take."""
    found = make_placement(torch.tensor([0, 1, 0, 2, 3, 0, 4, 5]), 6, 4)
    chosen = physical_ids(IDS, found).flatten().tolist()
    T, K = IDS.shape
    cell = 56
    parts = [label(0, "physical expert", "italic"), label(ROW, "is a copy of")]
    for p, e in enumerate(found.physical_to_logical.tolist()):
        parts.append(box(p, 0, 1, str(p), 0.0, framed=False, cell=cell))
        colour = 0 if e == 0 else None
        parts.append(box(p, ROW, 1, str(e), FILLED * (e == 0), colour=colour, cell=cell))
    y = 2.4 * ROW
    for row, name in enumerate(("token", "expert id", "physical id")):
        parts.append(label(y + row * ROW, name))
    parts += [box(K * t, y, K, str(t), 0.0, cell=cell) for t in range(T)]
    for slot, (e, p) in enumerate(zip(IDS.flatten().tolist(), chosen, strict=True)):
        colour = 0 if e == 0 else None
        for row, number in ((1, e), (2, p)):
            parts.append(
                box(slot, y + row * ROW, 1, str(number), FILLED * (e == 0), colour=colour,
                    marked=row == 2 and e == 0, cell=cell)
            )  # fmt: skip
    taken = ", ".join(str(p) for e, p in zip(IDS.flatten().tolist(), chosen, strict=True) if e == 0)
    reading = (
        f"Expert 0 has {int(found.replica_count[0])} copies, and its pairs take them in turn: "
        f"{taken}. The turn follows from the ids alone, so every rank that sees these tokens "
        "chooses alike."
    )
    return figure(y + 3 * ROW, "".join(parts), reading)


def external_shared() -> str:
    """Two ranks with the shared expert, two with the routed ones, and the column of ids."""
    E, S, R = 4, 2, 4
    ids = torch.tensor([[1, 0], [3, 2], [0, -1]])
    weights = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
    more, wide = add_shared_column(weights, ids, E, S)
    parts = [label(0, "expert", "italic"), label(ROW, "held by")]
    for rank in range(R):
        for e in assign_external_shared(E, S, R, rank):
            shared = e >= E
            text = f"{e}: shared" if shared else str(e)
            parts.append(box(e, 0, 1, text, 0.0, framed=False, cell=90))
            parts.append(box(e, ROW, 1, f"rank {rank}", FILLED, colour=1 if shared else 0, cell=90))
    y = 2.4 * ROW
    for t, (row, weighed) in enumerate(zip(wide.tolist(), more.tolist(), strict=True)):
        parts.append(label(y, f"token {t}: id, weight"))
        for k, (e, weight) in enumerate(zip(row, weighed, strict=True)):
            colour = None if e < 0 else int(e >= E)
            text = f"{e}, {weight:.1f}"
            parts.append(
                box(k, y, 1, text, FILLED * (e >= 0), struck=e < 0, marked=e >= E,
                    colour=colour, cell=90)
            )  # fmt: skip
        y += ROW
    reading = (
        f"{E} routed experts on {R - S} ranks, the shared one on {S} more, as experts {E} to "
        f"{E + S - 1}. A third column sends every token to one of its copies, in turn, with a "
        "weight of 1."
    )
    return figure(y, "".join(parts), reading)


def _outputs(parts, x):
    return [float(feed_forward(x, one_by_one(part)[0], CONFIG)) for part in parts]


def _contiguous():
    shares = [assign_experts(len(LOAD), RANKS, rank) for rank in range(RANKS)]
    return [list(range(start, start + count)) for start, count in shares]


def _note(column, y, cell, text):
    return f'<text x="{LABEL + column * cell}" y="{y + 22}" fill="currentColor">{text}</text>'
