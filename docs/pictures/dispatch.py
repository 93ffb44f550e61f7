"""Pictures of dispatch, combine and capacity, drawn from what the reference computes."""

from typing import get_args

import torch
from moe_reference.capacity import Policy, drop_to_capacity, expert_capacity
from moe_reference.dispatch import batch_rows, combine, dispatch

from pictures.svg import ROW, box, figure, label, numbers

E, FILLED = 3, 0.5
X = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
IDS = torch.tensor([[2, 0], [1, 2], [2, -1], [0, 1]])
WEIGHTS = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, torch.nan], [0.75, 0.25]])
FACTORS = (1.0, 10.0, 100.0)
CROWDED = torch.tensor([[0, 1], [2, 0], [0, 1], [1, 0], [0, 2], [0, 1]])
CROWDED_WEIGHTS = torch.tensor(
    [[0.6, 0.4], [0.7, 0.3], [0.55, 0.45], [0.5, 0.5], [0.8, 0.2], [0.9, 0.1]]
)


def there_and_back() -> str:
    """Four tokens to three experts that multiply by 1, 10 and 100, and back."""
    T, K = IDS.shape
    rows, counts, slots = dispatch(X, IDS, E)
    owners = IDS.flatten()[slots].tolist()
    done = rows * torch.tensor(FACTORS)[owners, None]
    y_TH = combine(done, slots, WEIGHTS)
    parts, y = _pairs(IDS, WEIGHTS, X, cell=72)
    y += ROW / 2
    parts += [label(y, "slots"), label(y + ROW, "rows"), label(y + 2 * ROW, "tokens_per_expert")]
    parts.append(label(y + 3 * ROW, "after the experts"))
    for s, owner in enumerate(owners):
        parts.append(box(s, y, 1, str(slots[s].item()), 0.0, framed=False))
        parts.append(box(s, y + ROW, 1, f"{rows[s, 0]:g}", FILLED, colour=owner))
        parts.append(box(s, y + 3 * ROW, 1, f"{done[s, 0]:g}", FILLED, colour=owner))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        parts.append(box(start, y + 2 * ROW, count, f"expert {expert}: {count}", 0.0))
        start += count
    y += 4.5 * ROW
    parts.append(label(y, "combined"))
    parts += [box(K * t, y, K, f"{y_TH[t, 0]:g}", 0.0, marked=True) for t in range(T)]
    first = [f"{WEIGHTS[0, k]:g} · {X[0, 0] * FACTORS[IDS[0, k]]:g}" for k in range(K)]
    reading = (
        f"{T} tokens of one number each, {E} experts that multiply by 1, 10 and 100. Dispatch "
        "puts the rows of one expert side by side; slots say where each came from. Combine gives "
        f"{' + '.join(first)} = {y_TH[0, 0]:g} for token 0. The pair whose id is -1 gets no row, "
        "and its weight, NaN, does no harm."
    )
    return figure(y + ROW, "".join(parts), reading)


def batched() -> str:
    """The rows of the first picture in the format [E, C, H]."""
    rows, counts, _ = dispatch(X, IDS, E)
    C = 4
    batch = batch_rows(rows, counts, C)
    parts = [label(0, "row", "italic")]
    parts += [box(i, 0, 1, str(i), 0.0, framed=False) for i in range(C)]
    for expert, count in enumerate(counts.tolist()):
        y = (expert + 1) * ROW
        parts.append(label(y, f"expert {expert}: {count}"))
        for i in range(C):
            used = i < count
            text = f"{batch[expert, i, 0]:g}"
            parts.append(box(i, y, 1, text, FILLED * used, struck=not used, colour=expert))
    reading = (
        f"The same rows in the batched format, {C} rows for each expert. Dashed rows are past the "
        "expert's count and zero."
    )
    return figure((E + 1) * ROW, "".join(parts), reading)


def capacity() -> str:
    """Twelve pairs, a capacity of three, and what each policy keeps."""
    T, K = CROWDED.shape
    C = expert_capacity(T, K, E, factor=0.75)
    parts, y = _pairs(CROWDED, CROWDED_WEIGHTS, None, cell=48)
    y += ROW / 2
    kept = {}
    for policy in get_args(Policy):
        ids = drop_to_capacity(CROWDED_WEIGHTS, CROWDED, E, C, policy)[1].flatten().tolist()
        kept[policy] = [slot for slot, expert in enumerate(ids) if expert == 0]
        parts.append(label(y, policy))
        for slot, expert in enumerate(ids):
            stays = expert >= 0
            parts.append(
                box(slot, y, 1, str(expert), FILLED * stays, struck=not stays,
                    colour=expert if stays else None, cell=48)
            )  # fmt: skip
        y += ROW
    told = "; ".join(f"{', '.join(map(str, kept[policy]))} by {policy}" for policy in kept)
    reading = (
        f"{T * K} pairs, {E} experts, capacity {C}: the even share is {T * K // E}, the factor "
        f"0.75. Slots that expert 0 keeps: {told}. Dropped pairs have the id -1."
    )
    return figure(y, "".join(parts), reading)


def _pairs(ids, weights, x, cell):
    """Rows of slots, tokens, ids and weights; where they end."""
    T, K = ids.shape
    parts = [label(0, "slot", "italic"), label(ROW, "token")]
    parts += [box(s, 0, 1, str(s), 0.0, framed=False, cell=cell) for s in range(T * K)]
    for t in range(T):
        text = str(t) if x is None else f"{t}: x = {x[t, 0]:g}"
        parts.append(box(K * t, ROW, K, text, 0.0, cell=cell))
    parts += [label(2 * ROW, "expert id"), label(3 * ROW, "weight")]
    texts = numbers(weights.flatten())
    for s, expert in enumerate(ids.flatten().tolist()):
        here = expert >= 0
        colour = expert if here else None
        parts.append(
            box(s, 2 * ROW, 1, str(expert), FILLED * here, struck=not here, colour=colour,
                cell=cell)
        )  # fmt: skip
        parts.append(box(s, 3 * ROW, 1, texts[s], 0.0, struck=not here, cell=cell))
    return parts, 4 * ROW
