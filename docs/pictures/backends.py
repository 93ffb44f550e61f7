"""Pictures of backends, drawn from what the reference computes."""

from typing import get_args

import torch
from moe_reference.backends import (
    DUTIES,
    ActivationFormat,
    Device,
    Quantization,
    choose_backend,
    workspace_shapes,
)
from moe_reference.config import ExpertsConfig
from moe_reference.dispatch import dispatch
from moe_reference.experts import experts
from moe_reference.initialization import init_experts
from moe_reference.routes import ROUTES

from pictures.svg import ROW, box, figure, label

FILLED = 0.5
IDS = torch.tensor([[2, 0], [2, 1], [0, 2]])
COLOUR_OF = {"fused": 0, "gather": 1, "loop": 3}
FEW, MANY = {"num_tokens": 1, "top_k": 2}, {"num_tokens": 1024, "top_k": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 48}


def routes() -> str:
    """Six pairs and three experts: the products that each route makes."""
    T, K = IDS.shape
    E = int(IDS.max()) + 1
    generator = torch.Generator().manual_seed(0)
    weights = init_experts(E, 4, 3, generator=generator)
    x = torch.rand(T, 4, generator=generator)
    shares = torch.rand(T, K, generator=generator)
    expected = experts(x, weights, shares, IDS, ExpertsConfig())
    for run in ROUTES.values():
        torch.testing.assert_close(run(x, weights, shares, IDS, ExpertsConfig()), expected)

    _, counts, slots = dispatch(x, IDS, E)
    flat = IDS.flatten().tolist()
    sorted_ids = [flat[slot] for slot in slots.tolist()]
    cell = 92
    parts = [label(0, "slot: expert", "italic")]
    for slot, e in enumerate(flat):
        parts.append(box(slot, 0, 1, f"{slot}: expert {e}", FILLED, colour=e, cell=cell))
    y = 1.5 * ROW
    parts.append(label(y, "fused: rows"))
    for place, e in enumerate(sorted_ids):
        parts.append(box(place, y, 1, f"slot {slots[place]}", FILLED, colour=e, cell=cell))
    y += ROW
    parts.append(label(y, "one product"))
    parts.append(box(0, y, len(flat), f"rows of {E} experts at once", 0.0, marked=True, cell=cell))
    y += 1.5 * ROW
    parts.append(label(y, "gather: matrices"))
    for slot, e in enumerate(flat):
        parts.append(box(slot, y, 1, f"copy of {e}", FILLED, colour=e, cell=cell))
    y += ROW
    parts.append(label(y, "one product"))
    parts.append(box(0, y, len(flat), f"a batch of {len(flat)} pairs", 0.0, marked=True, cell=cell))
    y += 1.5 * ROW
    start = 0
    parts.append(label(y, f"loop: {E} products"))
    for e, count in enumerate(counts.tolist()):
        text = f"{e}: {count} row{'s' * (count > 1)}"
        parts.append(box(start, y, count, text, FILLED, colour=e, marked=True, cell=cell))
        start += count
    reading = (
        f"{T} tokens, K = {K}, {E} experts; a colour is an expert, a thick frame is one product. "
        f"Fused and loop read each matrix once. Gather copies {len(flat)} of them, one for each "
        "pair. All three give the same output."
    )
    return figure(y + ROW, "".join(parts), reading)


def choices() -> str:
    """What is chosen for weights that are not quantised, by device, dtype and batch."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cell, E = 92, 64
    parts = [label(0, "dtype", "italic"), label(ROW, "pairs", "italic")]
    for column, dtype in enumerate(dtypes):
        name = str(dtype).removeprefix("torch.")
        parts.append(box(2 * column, 0, 2, name, 0.0, framed=False, cell=cell))
        for half, text in enumerate(("few", "many")):
            parts.append(box(2 * column + half, ROW, 1, text, 0.0, framed=False, cell=cell))
    for line, device in enumerate(get_args(Device), 2):
        parts.append(label(line * ROW, device))
        for column, dtype in enumerate(dtypes):
            for half, batch in enumerate((FEW, MANY)):
                found = choose_backend(device, dtype, num_experts=E, **batch)
                parts.append(
                    box(2 * column + half, line * ROW, 1, found.route, FILLED,
                        colour=COLOUR_OF[found.route], marked=found.verified, cell=cell)
                )  # fmt: skip
    y = (len(get_args(Device)) + 2) * ROW
    pairs = [batch["num_tokens"] * batch["top_k"] for batch in (FEW, MANY)]
    reading = (
        f"The route for plain weights and {E} experts; few is {pairs[0]} pairs, many {pairs[1]:,}. "
        "A thick frame: the tests of this project run it on such a device."
    )
    return figure(y, "".join(parts), reading)


def packed() -> str:
    """What is chosen for quantised weights, by device and format."""
    formats, cell = get_args(Quantization), 72
    parts = [label(0, "format", "italic")]
    for column, name in enumerate(formats):
        parts.append(box(column, 0, 1, name, 0.0, framed=False, cell=cell))
    for line, device in enumerate(get_args(Device), 1):
        parts.append(label(line * ROW, device))
        for column, name in enumerate(formats):
            routes = [
                choose_backend(
                    device, torch.bfloat16, num_experts=64, quantization=name, **batch
                ).route
                for batch in (FEW, MANY)
            ]
            same = routes[0] == routes[1]
            for half, route in enumerate(routes[: 1 if same else 2]):
                width = 1 if same else 0.5
                parts.append(
                    box(column + half * width, line * ROW, width, route if same else route[0],
                        FILLED, colour=COLOUR_OF[route], cell=cell)
                )  # fmt: skip
    reading = (
        "The route for packed weights and bfloat16. Two boxes: few pairs and many; g is gather, f "
        "is fused. Where no published kernel reads a format, experts are unpacked one after the "
        "other."
    )
    return figure((len(get_args(Device)) + 1) * ROW, "".join(parts), reading)


def duties() -> str:
    """Who multiplies, where, and who adds up, for each format."""
    cell = 150
    parts = [label(0, "format, weight on", "italic")]
    for column, name in enumerate(("multiplies, before", "multiplies, after", "adds up")):
        parts.append(box(column, 0, 1, name, 0.0, framed=False, cell=cell))
    for line, ((name, weight_on, delegated), duty) in enumerate(DUTIES.items(), 1):
        y = line * ROW
        parts.append(label(y, f"{name}, {weight_on}"))
        place = ("before", "after").index(duty.where)
        for column, who in ((place, duty.multiplies), (2, duty.adds_up)):
            parts.append(box(column, y, 1, who, FILLED, colour=int(who == "caller"), cell=cell))
        if delegated and name == "standard":
            parts.append(box(3, y, 0.7, "delegated", 0.0, framed=False, cell=cell))
    reading = (
        "One multiplication, before the first product or after the second, and one sum in each "
        "line; who does it is the experts or their caller. Experts "
        "in the batched format know nothing of tokens, so their caller always adds up; in the "
        "standard format they may leave it to the caller, which is called delegated here."
    )
    return figure((len(DUTIES) + 1) * ROW, "".join(parts), reading)


def workspace() -> str:
    """The memory between dispatch and combine, in both formats."""
    rows_of = {"standard": (16, 2), "batched": (4, 24)}
    letters = {"standard": "T = {}, K = {}", "batched": "E = {}, C = {}"}
    shares = {"standard": 1, "batched": 0}
    parts, cell, y = [], 150, 0
    parts.append(label(0, ", ".join(f"{n[0].upper()} = {size}" for n, size in SIZES.items())))
    for column, name in enumerate(("products", "activated", "output")):
        parts.append(box(column, y, 1, name, 0.0, framed=False, cell=cell))
    y += ROW
    for name in get_args(ActivationFormat):
        shapes = workspace_shapes(name, rows_of[name], **SIZES)
        parts.append(label(y, f"{name}: {letters[name].format(*rows_of[name])}"))
        pieces = (shapes.products, shapes.activated, shapes.output)
        for shape, column, colour in zip(pieces, range(3), (0, 1, shares[name]), strict=True):
            text = f"[{', '.join(map(str, shape))}]"
            parts.append(box(column, y, 1, text, FILLED, colour=colour, cell=cell))
        y += ROW
    width = workspace_shapes("standard", rows_of["standard"], **SIZES).products[1]
    reading = (
        f"Shapes of the three pieces. Products holds the first product and later the second, and "
        f"is as wide as the wider of both, {width}. The output has the colour of the piece whose "
        "memory it may take: activated in the standard format, for the sum over K still reads "
        "products; products in the batched one, where it is the second product and reads activated."
    )
    return figure(y, "".join(parts), reading)
