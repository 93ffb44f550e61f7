"""Pictures of experts, activations and layouts, drawn from what the reference computes."""

import torch
from moe_reference.activations import ELEMENTWISE, activate
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import combine, dispatch, inclusive_offsets
from moe_reference.experts import experts, grouped_product
from moe_reference.layouts import LAYOUTS, Layout, to_layout

from pictures.svg import COLOURS, ROW, box, figure, label, numbers

FILLED = 0.5
LOW, HIGH = -4.0, 2.5
E = 3
X = torch.tensor([[1.0], [2.0], [3.0]])
IDS = torch.tensor([[2, 0], [1, 2], [0, -1]])
WEIGHTS = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, torch.nan]])
ONES = ExpertWeights(
    gate_up=torch.tensor([[[1.0], [2.0]], [[-1.0], [3.0]], [[2.0], [1.0]]]),
    down=torch.tensor([[[1.0]], [[1.0]], [[10.0]]]),
)
PLAIN = ExpertsConfig("relu")
PAIRS = torch.tensor([[-9.0, 1], [-1, 2], [1, 2], [2, 1], [9, 1], [1, 9], [1, -9]])
WEIGHED = ExpertWeights(
    gate_up=torch.tensor([[[2.0], [1.0]]]),
    down=torch.tensor([[[1.0]]]),
    down_bias=torch.tensor([[1.0]]),
)


def stages() -> str:
    """Three tokens of one number, three experts, the stages one under the other."""
    T, K = IDS.shape
    rows, counts, slots = dispatch(X, IDS, E)
    ends = inclusive_offsets(counts)
    pre = grouped_product(rows, ONES.gate_up, None, ends)
    activated = activate(pre, PLAIN)
    done = grouped_product(activated, ONES.down, None, ends)
    y_TH = combine(done, slots, WEIGHTS)
    assert torch.equal(y_TH, experts(X, ONES, WEIGHTS, IDS, PLAIN))
    parts = [label(0, "token")]
    parts += [box(K * t, 0, K, f"{t}: x = {X[t, 0]:g}", 0.0) for t in range(T)]
    parts += [label(ROW, "expert id"), label(2 * ROW, "weight")]
    for slot, expert in enumerate(IDS.flatten().tolist()):
        here = expert >= 0
        colour = expert if here else None
        text = numbers(WEIGHTS.flatten())[slot]
        parts.append(box(slot, ROW, 1, str(expert), FILLED * here, struck=not here, colour=colour))
        parts.append(box(slot, 2 * ROW, 1, text, 0.0, struck=not here))
    y = 3.4 * ROW
    of_rows = [
        ("x, sorted by expert", rows[:, 0]),
        ("gate", pre[:, 0]),
        ("up", pre[:, 1]),
        ("relu(gate) · up", activated[:, 0]),
        ("· down", done[:, 0]),
    ]
    owners = IDS.flatten()[slots].tolist()
    for name, values in of_rows:
        parts.append(label(y, name))
        for s, owner in enumerate(owners):
            parts.append(box(s, y, 1, f"{values[s]:g}", FILLED, colour=owner))
        y += ROW
    y += 0.4 * ROW
    parts.append(label(y, "weighted sum"))
    parts += [box(K * t, y, K, f"{y_TH[t, 0]:g}", 0.0, marked=True) for t in range(T)]
    at = [slots.tolist().index(k) for k in range(K)]
    sums = " + ".join(f"{WEIGHTS[0, k]:g} · {done[at[k], 0]:g}" for k in range(K))
    reading = (
        f"{T} tokens of one number each, {E} experts with one row of gate, up and down; a colour "
        f"is an expert. Token 0 gets {sums} = {y_TH[0, 0]:g}. Expert 1 has a negative gate, and "
        "relu closes it. The pair whose id is -1 has no row."
    )
    return figure(y + ROW, "".join(parts), reading)


def weight_on() -> str:
    """One expert with an output bias, weighed after and before."""
    x, weight = 2.0, 0.5
    heads = ["into it", "gate", "up", "silu(gate) · up", "+ down bias", "out of it"]
    spans = [1, 1, 1, 1.5, 1.35, 1.2]
    starts = [sum(spans[:i]) for i in range(len(spans))]
    parts = [label(0, f"x = {x:g}, weight {weight:g}", "italic")]
    parts += [
        box(start, 0, span, head, 0.0, framed=False, cell=82)
        for start, span, head in zip(starts, spans, heads, strict=True)
    ]
    found = {}
    for line, where in enumerate(("output", "input"), 1):
        config = ExpertsConfig(weight_on=where)
        into = torch.tensor([[x * weight if where == "input" else x]])
        ends = torch.tensor([1])
        pre = grouped_product(into, WEIGHED.gate_up, None, ends)
        activated = activate(pre, config)
        done = grouped_product(activated, WEIGHED.down, WEIGHED.down_bias, ends)
        weights, ids = torch.tensor([[weight]]), torch.tensor([[0]])
        out = experts(torch.tensor([[x]]), WEIGHED, weights, ids, config)
        found[where] = float(out)
        values = [into, pre[:, :1], pre[:, 1:], activated, done, out]
        parts.append(label(line * ROW, f"weight_on = {where}"))
        for place, value in enumerate(values):
            weighed = place == (0 if where == "input" else len(values) - 1)
            parts.append(
                box(starts[place], line * ROW, spans[place], f"{float(value):.3f}",
                    FILLED * weighed, marked=weighed, cell=82)
            )  # fmt: skip
    reading = (
        f"One expert, the weight on its output and on its input. The filled box is where the "
        f"weight of {weight:g} comes in. On the output it halves everything, the bias too: "
        f"{found['output']:.3f}. On the input it goes through the activation, and the bias stays "
        f"whole: {found['input']:.3f}."
    )
    return figure(3 * ROW, "".join(parts), reading)


def curves() -> str:
    """The elementwise activations, and what tells the two gelus apart."""
    at = torch.linspace(LOW, HIGH, 261, dtype=torch.float64)
    left, width, zero, unit = 30, 320, 180, 58
    parts = [_axes(left, width, zero, "activation(x)")]
    for colour, (name, until, dash, shift) in enumerate(
        [("relu", 2.5, "", -10), ("silu", 2.5, "7 3", 17), ("gelu", 2.5, "2 3", 4),
         ("relu2", 1.55, "", 4)]
    ):  # fmt: skip
        x = at[at <= until]
        points = _points(x, ELEMENTWISE[name](x), left, width, zero, unit)
        parts.append(_line(points, colour, dash))
        anchor = "end" if name == "relu2" else "start"
        aside = -8 if name == "relu2" else 8
        parts.append(_text(points[-1][0] + aside, points[-1][1] + shift, name, anchor))
    gap = ELEMENTWISE["gelu_tanh"](at) - ELEMENTWISE["gelu"](at)
    most = int(gap.abs().argmax())
    largest = abs(float(gap[most]))
    left, width, zero = 450, 280, 130
    parts.append(_axes(left, width, zero, "gelu_tanh(x) - gelu(x)"))
    points = _points(at, gap, left, width, zero, 70 / largest)
    parts.append(_line(points, 2, "2 3"))
    above = float(gap[most]) > 0
    x, y = points[most]
    parts.append(_text(x, y + (-8 if above else 18), f"{float(gap[most]):+.5f}", "middle"))
    reading = (
        "Left: activations of one number. Right, much enlarged: what the tanh approximation adds "
        f"to gelu, {largest:.5f} at most between {LOW:g} and {HIGH:g}. That is little, and still "
        f"{largest / torch.finfo(torch.float32).eps:,.0f} times what float32 resolves at 1."
    )
    return figure(212, "".join(parts), reading)


def gate_and_up() -> str:
    """Seven pairs of gate and up, and what each gated activation makes of them."""
    rows = [
        ("gate", PAIRS[:, 0], 0),
        ("up", PAIRS[:, 1], 0),
        ("silu", activate(PAIRS, ExpertsConfig("silu")), 3),
        ("silu, halves swapped", activate(PAIRS.flip(1), ExpertsConfig("silu")), 3),
        ("swiglu_limit", activate(PAIRS, ExpertsConfig("swiglu_limit")), 3),
        ("swigluoai", activate(PAIRS, ExpertsConfig("swigluoai")), 3),
    ]
    parts = []
    for line, (name, values, digits) in enumerate(rows):
        parts.append(label(line * ROW, name))
        for column, value in enumerate(values.squeeze(-1).tolist()):
            clamped = "swiglu" in name and (PAIRS[column, 0] > 7 or abs(PAIRS[column, 1]) > 7)
            parts.append(
                box(column, line * ROW, 1, f"{value:.{digits}f}", FILLED * (digits == 0),
                    marked=bool(clamped), cell=80)
            )  # fmt: skip
    y = len(rows) * ROW
    reading = (
        f"Pairs of gate and up and what comes of them, limit 7 and alpha {PLAIN.alpha:g}. A thick "
        "frame: something was clamped. In the first column nothing was, for the gate has no lower "
        "limit. Swapped halves give other numbers wherever gate and up differ, and no error."
    )
    return figure(y, "".join(parts), reading)


def layouts() -> str:
    """The rows of gate_up in five layouts, I = 4."""
    I = 4
    rows = torch.arange(2.0 * I).view(1, 2 * I, 1)
    weights = ExpertWeights(rows, torch.zeros(1, 1, I))
    named = [
        ("canonical, transformers", LAYOUTS["transformers"]),
        ("flashinfer-cutlass", LAYOUTS["flashinfer-cutlass"]),
        ("gpt-oss", LAYOUTS["gpt-oss"]),
        ("Layout(interleave=2)", Layout(interleave=2)),
    ]
    parts = [label(0, "row of gate_up", "italic")]
    parts += [box(row, 0, 1, str(row), 0.0, framed=False, cell=60) for row in range(2 * I)]
    for line, (name, layout) in enumerate(named, 1):
        parts.append(label(line * ROW, name))
        for place, row in enumerate(to_layout(layout, weights)[0].flatten().int().tolist()):
            half, index = divmod(row, I)
            parts.append(
                box(place, line * ROW, 1, f"{'gu'[half]}{index}", FILLED, colour=half, cell=60)
            )
    reading = (
        f"The {2 * I} rows of gate_up with I = {I}: g is a row of the gate, u one of up. The shape "
        "is the same in all of them, so that it cannot tell which one it is."
    )
    return figure((len(named) + 1) * ROW, "".join(parts), reading)


def _line(points, colour, dash=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    colour_of = f"rgb(var(--picture-fill-{colour % COLOURS}))"
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour_of}" stroke-width="2.2"{dashes}/>'
    )


def _text(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{text}</text>'


def _points(x, y, left, width, zero, unit):
    """Where the points of a curve lie, `unit` units of height for a difference of one."""
    across = (x - LOW) / (HIGH - LOW) * width + left
    return list(zip(across.tolist(), (zero - unit * y).tolist(), strict=True))


def _axes(left, width, zero, title):
    """A horizontal axis at `zero`, a vertical one at x = 0, and the ends of the range."""
    at = left - LOW / (HIGH - LOW) * width
    return (
        f'<path d="M{left} {zero}H{left + width}M{at:.1f} {zero + 20}V30" fill="none" '
        'stroke="var(--picture-line)"/>'
        + _text(left, 20, title)
        + _text(left, zero + 24, f"{LOW:g}")
        + _text(left + width, zero + 24, f"{HIGH:g}", "end")
    )
