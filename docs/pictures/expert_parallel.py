"""Pictures of expert parallelism, drawn from what the reference computes."""

import torch
from moe_reference.config import ExpertsConfig
from moe_reference.dispatch import inverse_permutation
from moe_reference.domain_transforms import enter_slices, leave_slices
from moe_reference.expert_parallel import (
    exchange_counts,
    expert_major,
    expert_places,
    held_experts,
    rows_to_send,
)
from moe_reference.ranks import ListOfRanks

from pictures.svg import LABEL, ROW, box, figure, label

FILLED, CELL = 0.5, 66
E, R = 4, 2
IDS = (torch.tensor([[3, 0], [0, 1], [1, 0]]), torch.tensor([[0, 3], [1, 2]]))
NAMES = ("a", "b")


def _sent():
    """For both ranks: the names of their pairs in the order of experts, and their counts."""
    held = held_experts(E, R)
    names, counts = [], []
    for rank, ids in enumerate(IDS):
        x, weights = torch.zeros(len(ids), 1), torch.ones(ids.shape)
        places = expert_places(ids, E, held)
        _, counts_E, slots, _ = rows_to_send(x, weights, places, held, ExpertsConfig())
        names.append(
            [(rank, slot // 2, int(ids.flatten()[slot])) for slot in slots.tolist()]
        )  # fmt: skip
        counts.append(counts_E)
    return held, names, counts


def _steps():
    """Every step of the exchange on names instead of rows."""
    held, sent, counts = _sent()
    ranks = ListOfRanks(R)
    came = exchange_counts(counts, held, ranks)
    send = [[int(counts_E[ids].sum()) for ids in held] for counts_E in counts]
    receive = [counts_RE.sum(dim=1).tolist() for counts_RE in came]
    arrived = ranks.all_to_all([torch.tensor(names) for names in sent], send, receive)
    orders = [expert_major(counts_RE) for counts_RE in came]
    sorted_ = [names[order] for names, order in zip(arrived, orders, strict=True)]
    undone = [
        names[inverse_permutation(order)] for names, order in zip(sorted_, orders, strict=True)
    ]
    returned = ranks.all_to_all(undone, send=receive, receive=send)
    assert [names.tolist() for names in returned] == [[list(n) for n in names] for names in sent]
    return sent, arrived, sorted_, returned, send, receive


def there_and_back() -> str:
    """The rows of two ranks on their way to the experts and back."""
    sent, arrived, sorted_, returned, _, _ = _steps()
    stages = [
        ("sorted, to send", sent),
        ("as they arrive", arrived),
        ("sorted by expert", sorted_),
        ("sent back", returned),
    ]
    parts, y = [], 0.0
    for name, of_ranks in stages:
        for rank, rows in enumerate(of_ranks):
            parts.append(label(y, f"{name}, rank {rank}"))
            for place, (owner, token, expert) in enumerate(torch.as_tensor(rows).tolist()):
                text = f"{NAMES[owner]}{token} → {expert}"
                parts.append(box(place, y, 1, text, FILLED, colour=owner, cell=CELL))
            y += ROW
        y += 0.4 * ROW
    held = held_experts(E, R)
    reading = (
        f"Tokens a0 to a{len(IDS[0]) - 1} are rank 0's, b0 to b{len(IDS[1]) - 1} rank 1's; each "
        f"goes to two experts. Rank 0 holds experts {_and(held[0])}, rank 1 experts "
        f"{_and(held[1])}. Rows arrive rank by rank, so that those of one expert are apart until "
        "they are sorted. At the end every row stands where it left from."
    )
    return figure(y - 0.4 * ROW, "".join(parts), reading)


def splits() -> str:
    """Counts of two ranks, what they learn from each other, and the splits of both ways."""
    held, _, counts = _sent()
    came = exchange_counts(counts, held, ListOfRanks(R))
    _, _, _, _, send, receive = _steps()
    assert send != receive
    parts, y = [label(0, "expert", "italic")], ROW
    parts += [box(e, 0, 1, str(e), 0.0, framed=False, cell=CELL) for e in range(E)]
    for rank, counts_E in enumerate(counts):
        parts.append(label(y, f"rank {rank} sends"))
        for e, count in enumerate(counts_E.tolist()):
            holder = next(r for r, ids in enumerate(held) if e in ids)
            parts.append(box(e, y, 1, str(count), FILLED, colour=holder, cell=CELL))
        parts.append(_note(E, y, f"sends {_and(send[rank])}"))
        y += ROW
    y += 0.4 * ROW
    for rank, counts_RE in enumerate(came):
        parts.append(label(y, f"rank {rank} gets"))
        for source, row in enumerate(counts_RE.tolist()):
            for e, count in zip(held[rank], row, strict=True):
                place = source * len(held[rank]) + e - held[rank][0]
                text = f"{count} to {e}"
                parts.append(box(place, y, 1, text, FILLED, colour=rank, cell=CELL))
        parts.append(_note(E, y, f"sends back {_and(receive[rank])}"))
        y += ROW
    reading = (
        "Counts of rows, coloured by the rank that holds the expert. Each rank tells the others "
        "how many rows come to each of their experts; below stands what they learn, first from "
        "rank 0, then from rank 1. Sums of these counts are the splits. A rank sends back as many "
        "as it got from each, which is not what it sent."
    )
    return figure(y, "".join(parts), reading)


def slices() -> str:
    """Five tokens of a group of two ranks: padded, sliced, gathered and trimmed."""
    tokens, ids = torch.arange(5), torch.tensor([3, 0, 1, 2, 0])
    group = ListOfRanks(2)
    cut, cut_ids = enter_slices([tokens] * 2, group), enter_slices([ids] * 2, group, value=-1)
    back = leave_slices(cut, [len(tokens)] * 2, group)
    parts = [label(0, "token, both ranks")]
    parts += [box(t, 0, 1, f"t{t}", FILLED, colour=3, cell=CELL) for t in tokens.tolist()]
    y = 1.4 * ROW
    for name, rows in (("slice", cut), ("expert ids", cut_ids)):
        for rank, values in enumerate(rows):
            parts.append(label(y, f"{name} of rank {rank}"))
            for place, value in enumerate(values.tolist()):
                padding = cut_ids[rank][place] < 0
                text = str(value) if name == "expert ids" else "zeros" if padding else f"t{value}"
                column = place + rank * len(values)
                parts.append(
                    box(column, y, 1, text, 0.0 if padding else FILLED, struck=bool(padding),
                        colour=None if padding else rank, cell=CELL)
                )  # fmt: skip
            y += ROW
    y += 0.4 * ROW
    parts.append(label(y, "back, both ranks"))
    parts += [box(t, y, 1, f"t{t}", FILLED, colour=3, cell=CELL) for t in back[1].tolist()]
    reading = (
        f"{len(tokens)} tokens that two ranks both have. One row of padding, and each takes half; "
        "ids are cut in the same places, and the id of padding is -1, so that it goes nowhere. "
        "Afterwards the group gathers and cuts the padding off."
    )
    return figure(y + ROW, "".join(parts), reading)


def _and(values) -> str:
    return " and ".join(map(str, values))


def _note(column: float, y: float, text: str) -> str:
    x = LABEL + (column + 0.2) * CELL
    return f'<text x="{x}" y="{y + 22}" fill="currentColor">{text}</text>'
