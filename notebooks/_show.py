"""What notebooks share: device, pictures, walks, checks, a stopwatch.

The pictures need matplotlib and nothing else. They are drawn without a
background and in the colour of the page's text, so that they read on a light
page and on a dark one. Values use cividis, which also reads in grey and for
eyes that confuse red and green. Experts have a colour each, and always carry
their number, too; what is chosen is framed, what is padding is hatched.
"""

import ast
import html
import inspect
import io
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, display
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

MARK = "#d95f02"
QUIET = "#9aa0a6"
# What is drawn in this colour takes that of the page's text.
INK = "#010203"
DARK = "#1a1a1a"
# For lines and bars: each stands out on white and on black.
LINES = ("#4477cc", "#d95f02", "#1b9e77", "#9a6bc4", "#8a8f98")
# One for each of four experts; texts on them are dark.
TINTS = ("#a9b4e6", "#f3cd7d", "#86c9c4", "#dcaed2")
STRONG = ("#5468c4", "#c98a00", "#1b8f86", "#b0569c")
plt.rcParams.update({
    "figure.dpi": 110,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "image.cmap": "cividis",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "hatch.linewidth": 0.8,
})  # fmt: skip


def _finish(figure: plt.Figure, alt: str) -> None:
    """Show a figure as SVG in the page, with words for who cannot see it."""
    # Only this form of output keeps the words when a page is made of it.
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        bbox_inches="tight",
        dpi=200,
        metadata={"Date": None, "Creator": None},
    )
    plt.close(figure)
    svg = file.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    words = html.escape(" ".join(alt.split()), quote=True)
    style = "max-width: 100%; height: auto"
    svg = svg.replace(
        "<svg", f'<svg role="img" aria-label="{words}" style="{style}"', 1
    )
    display(HTML(svg.replace(INK, "currentColor")))


def find_device() -> torch.device:
    """The GPU where there is one, otherwise the CPU; says which."""
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}; sizes of a real model.")
        return torch.device("cuda")
    print("No GPU: small sizes, and the fast versions are torch operations.")
    return torch.device("cpu")


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    return np.asarray(values)


def heat_map(
    values: torch.Tensor,
    chosen: torch.Tensor | None = None,
    title: str = "",
    num_groups: int = 1,
    closed: torch.Tensor | None = None,
    xlabel: str = "expert",
    tokens: int = 12,
) -> None:
    """Values [T, E] of the first tokens.

    Chosen experts [T, K] are framed, closed ones [T, E] are hatched. Cells
    carry their numbers where there are at most 8 experts.
    """
    shown = _array(values)[:tokens]
    T, E = shown.shape
    figure, axes = plt.subplots(figsize=(9.5, 0.26 * T + 1.4))
    image = axes.imshow(shown, aspect="auto", interpolation="nearest")
    frame = 2.2 if E <= 64 else 0.9
    figure.colorbar(image, ax=axes, pad=0.02)
    if closed is not None:
        for t, e in np.argwhere(_array(closed)[:tokens] > 0):
            axes.add_patch(
                Rectangle(
                    (e - 0.5, t - 0.5),
                    1,
                    1,
                    fill=False,
                    hatch="////",
                    lw=0,
                    ec="white",
                )
            )
    if chosen is not None:
        for t, experts in enumerate(_array(chosen)[:tokens].astype(int)):
            for e in experts:
                axes.add_patch(
                    Rectangle(
                        (e - 0.5, t - 0.5),
                        1,
                        1,
                        fill=False,
                        lw=frame,
                        ec=MARK,
                        clip_on=False,
                    )
                )
    if E <= 8:
        middle = (shown.max() + shown.min()) / 2
        for (t, e), value in np.ndenumerate(shown):
            colour = "black" if value > middle else "white"
            axes.text(
                e,
                t,
                f"{value:.2f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    for group in range(1, num_groups):
        axes.axvline(group * E / num_groups - 0.5, color="white", lw=2.5)
    axes.set(title=title, xlabel=xlabel, ylabel="token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, f"Heat map of {T} tokens by {E} columns: {title}.")


def curves(
    x: torch.Tensor,
    lines: dict[str, torch.Tensor],
    title: str,
    xlabel: str,
    ylabel: str = "",
    log: bool = False,
) -> None:
    """One line per name over x, told apart by dashes as well as by colour."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (name, y), style, colour in zip(
        lines.items(),
        ("-", "--", ":", "-.") * len(lines),
        LINES * len(lines),
        strict=False,
    ):
        axes.plot(_array(x), _array(y), style, label=name, color=colour, lw=2)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if not x.is_floating_point():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(_array(x), [f"{value:g}" for value in _array(x)])
        axes.minorticks_off()
    if len(lines) > 1:
        axes.legend(frameon=False)
    _finish(figure, f"Line plot over {xlabel}: {title}.")


def load_bars(loads: dict[str, torch.Tensor], title: str) -> None:
    """Tokens per expert [E], one panel per name, and their extremes."""
    figure, panels = plt.subplots(
        1,
        len(loads),
        figsize=(9.5, 2.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, load) in zip(panels[0], loads.items(), strict=True):
        counts = _array(load)
        axes.bar(
            range(len(counts)),
            counts,
            width=0.85,
            color=LINES[0],
        )
        axes.axhline(counts.mean(), color=MARK, lw=1.5, ls="--", label="mean")
        axes.set(title=name, xlabel="expert")
    panels[0][0].set_ylabel("tokens")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title)
    _finish(figure, f"Bars, {title}: {', '.join(loads)}.")
    rows = []
    for name, load in loads.items():
        counts = _array(load)
        ratio = f"{counts.max() / counts.mean():.2f}"
        rows.append((name, int(counts.min()), int(counts.max()), ratio))
    table(("tokens per expert", "least", "most", "most / mean"), rows)


def groups_touched(
    routings: dict[str, torch.Tensor], num_experts: int, num_groups: int
) -> None:
    """How many groups the experts [T, K] of a token lie in, by routing."""
    rows = []
    for name, expert_ids in routings.items():
        groups = expert_ids // (num_experts // num_groups)
        counts = [len(row.unique()) for row in groups.cpu()]
        rows.append((name, f"{np.mean(counts):.2f}", max(counts)))
    table(("groups a token is sent to", "mean", "most"), rows)


def scatter(
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    xlabel: str,
    ylabel: str,
) -> None:
    """Two ways to compute the same weights, one panel per name."""
    top = max(float(each.max()) for pair in pairs.values() for each in pair)
    figure, panels = plt.subplots(
        1,
        len(pairs),
        figsize=(9, 3.6),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes, (name, (x, y)) in zip(panels[0], pairs.items(), strict=True):
        axes.plot([0, top], [0, top], color=QUIET, lw=1, ls="--")
        axes.scatter(
            _array(x),
            _array(y),
            s=9,
            color=LINES[0],
            alpha=0.6,
        )
        axes.set(title=name, xlabel=xlabel, aspect="equal")
    panels[0][0].set_ylabel(ylabel)
    _finish(figure, f"{ylabel} over {xlabel}: {', '.join(pairs)}.")


def points(
    places: dict[str, tuple[float, float]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """A named point (x, y) each; y is drawn by its logarithm."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    xs, ys = (np.array(each) for each in zip(*places.values(), strict=True))
    axes.scatter(xs, ys, s=26, color=LINES[0])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.margins(x=0.14, y=0.12)
    # A name stands right of its point, or left where another one does.
    spread = np.ptp(xs) or 1.0, np.ptp(np.log(ys)) or 1.0
    for n, (name, (x, y)) in enumerate(places.items()):
        ahead = (xs - x) / spread[0]
        level = np.abs(np.log(ys / y)) / spread[1] < 0.07
        crowded = level & (ahead >= 0) & (ahead < 0.12)
        crowded[: n + 1] &= ahead[: n + 1] > 0
        right = not crowded.any()
        axes.annotate(
            name,
            (x, y),
            (6 if right else -6, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=9,
        )
    told = "; ".join(
        f"{name}: {x:.3g}, {y:.2g}" for name, (x, y) in places.items()
    )
    _finish(figure, f"{ylabel} over {xlabel}, {title}. {told}.")


def grid(
    values: torch.Tensor,
    rows: Sequence[str],
    title: str,
    columns: Sequence[str] | None = None,
    xlabel: str = "expert",
    signed: bool = False,
) -> None:
    """A small table [rows, columns] as coloured cells with their numbers.

    `signed` colours below zero unlike above it.
    """
    shown = _array(values)
    figure, axes = plt.subplots(
        figsize=(1.6 + 0.8 * shown.shape[1], 0.9 + 0.36 * len(rows))
    )
    most = float(np.abs(shown).max()) or 1.0
    if signed:
        axes.imshow(
            shown, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto"
        )
    else:
        axes.imshow(shown, vmin=min(0.0, shown.min()), aspect="auto")
    whole = bool((shown == shown.round()).all())
    for (row, column), value in np.ndenumerate(shown):
        strong = abs(value) > 0.6 * most
        light = strong if signed else not strong
        axes.text(
            column,
            row,
            f"{value:.0f}"
            if whole or value == 0
            else f"{value:{'+' if signed else ''}.3f}",
            ha="center",
            va="center",
            color="white" if light else DARK,
            fontsize=9,
        )
    axes.set(title=title, xlabel=xlabel)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(shown.shape[1]), columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    told = "; ".join(
        f"{row}: {' '.join(f'{value:.3g}' for value in line)}"
        for row, line in zip(rows, shown, strict=True)
    )
    _finish(figure, f"Table, {title}. {told}.")


@dataclass(frozen=True)
class Box:
    """One box of a strip.

    Attributes:
        text: what stands in it.
        expert: whose colour it has; None has none.
        width: in boxes.
        padding: hatched.
    """

    text: object = ""
    expert: int | None = None
    width: float = 1
    padding: bool = False


def _draw(axes: plt.Axes, box: Box, x: float, y: float, width: float) -> None:
    tinted = box.expert is not None and box.expert >= 0
    fill = TINTS[box.expert % len(TINTS)] if tinted else "none"
    for hatch, edge in (("///", QUIET), (None, INK)):
        if hatch is None or box.padding:
            axes.add_patch(
                Rectangle(
                    (x, y),
                    width,
                    0.8,
                    fc=fill if hatch is None and not box.padding else "none",
                    ec=edge,
                    hatch=hatch,
                    lw=0.7 if hatch is None else 0,
                )
            )
    axes.text(
        x + width / 2,
        y + 0.4,
        str(box.text),
        ha="center",
        va="center",
        fontsize=9,
        color=DARK if tinted and not box.padding else INK,
    )


def strips(rows: Sequence[tuple[str, Sequence[Box]]], title: str) -> None:
    """Rows of boxes under each other, each with its name on the left."""
    wide = max(sum(box.width for box in boxes) for _, boxes in rows)
    figure = plt.figure(figsize=(0.62 * wide, 0.36 * len(rows)))
    # The boxes fill the figure, so that a box has one size in all of them;
    # names and title stand around it.
    axes = figure.add_axes((0, 0, 1, 1))
    told = []
    for row, (name, boxes) in enumerate(rows):
        axes.text(-0.25, row + 0.4, name, ha="right", va="center", fontsize=9)
        x = 0.0
        for box in boxes:
            _draw(axes, box, x + 0.03, row, box.width - 0.06)
            x += box.width
        texts = (
            f"({box.text})" if box.padding else str(box.text) for box in boxes
        )
        told.append(f"{name}: {' '.join(texts)}")
    axes.set(xlim=(0, wide), ylim=(len(rows), -0.06))
    axes.set_title(title, loc="left")
    axes.axis("off")
    _finish(figure, f"Boxes, {title}. {'; '.join(told)}.")


def slot_map(expert_ids: torch.Tensor, title: str = "every slot") -> None:
    """The slots of ids [T, K]: number, token, expert."""
    T, K = expert_ids.shape
    ids = expert_ids.flatten().tolist()
    strips(
        [
            ("slot", [Box(slot) for slot in range(T * K)]),
            ("token", [Box(token, width=K) for token in range(T)]),
            ("expert id", [Box(e, e, padding=e < 0) for e in ids]),
        ],
        title,
    )


def block_map(
    aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_size: int,
    owners: Sequence[int],
    title: str,
) -> None:
    """One row per block: what it carries and its entries, padding hatched.

    `aligned` is what `align` gave; `owners` has the expert of each slot.
    """
    entries, carried, length = (each.tolist() for each in aligned)
    rows = []
    for block in range(length[0] // block_size):
        part = entries[block * block_size : (block + 1) * block_size]
        rows.append(
            (
                f"block {block} carries {carried[block]}",
                [
                    Box(slot, owners[slot])
                    if slot < len(owners)
                    else Box(slot, padding=True)
                    for slot in part
                ],
            )
        )
    strips(rows, title)


def blocks_at_size(
    aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_size: int,
    num_slots: int,
    title: str,
    first: int = 64,
) -> None:
    """The first blocks side by side: a column each, padding hatched."""
    entries, carried, length = (each.tolist() for each in aligned)
    count = min(first, length[0] // block_size)
    figure, axes = plt.subplots(figsize=(9.5, 2.6))
    order = {expert: n for n, expert in enumerate(dict.fromkeys(carried))}
    for block in range(count):
        part = entries[block * block_size : (block + 1) * block_size]
        real = sum(slot < num_slots for slot in part)
        axes.add_patch(
            Rectangle(
                (block, 0),
                0.94,
                real,
                fc=TINTS[order[carried[block]] % len(TINTS)],
                lw=0,
            )
        )
        axes.add_patch(
            Rectangle(
                (block, real),
                0.94,
                block_size - real,
                fill=False,
                hatch="////",
                ec=QUIET,
                lw=0.3,
            )
        )
    axes.set(
        xlim=(0, count),
        ylim=(0, block_size),
        title=title,
        xlabel="block",
        ylabel="row in the block",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, f"The first {count} blocks, filled from below: {title}.")


Row = tuple[str, int | None]


def moves(
    left: Sequence[Row],
    right: Sequence[Row],
    links: Sequence[tuple[int, int, int]],
    heads: tuple[str, str],
    title: str,
) -> None:
    """Two columns of rows and a line for each move (from, to, expert)."""
    tall = max(len(left), len(right))
    figure, axes = plt.subplots(figsize=(7.6, 0.6 + 0.36 * tall))
    places = []
    for column, x, head in ((left, 0.0, heads[0]), (right, 6.4, heads[1])):
        step = tall / max(len(column), 1)
        ys = [(row + 0.5) * step - 0.4 for row in range(len(column))]
        for (text, expert), y in zip(column, ys, strict=True):
            _draw(axes, Box(text, expert), x, y, 3.2)
        axes.text(x + 1.6, -0.45, head, ha="center", fontsize=9)
        places.append(ys)
    for start, end, expert in links:
        y, z = places[0][start] + 0.4, places[1][end] + 0.4
        axes.add_patch(
            PathPatch(
                Path(
                    [(3.22, y), (4.8, y), (4.8, z), (6.38, z)],
                    [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
                ),
                fill=False,
                lw=1.6,
                ec=STRONG[expert % len(STRONG)],
            )
        )
    axes.set(xlim=(-0.1, 9.7), ylim=(tall + 0.1, -0.8), title=title)
    axes.axis("off")
    told = "; ".join(f"{left[i][0]} to {right[j][0]}" for i, j, _ in links)
    _finish(figure, f"{title}. {told}.")


def _numbers(values: torch.Tensor) -> str:
    flat = values.detach().flatten()
    if flat.dtype.is_floating_point:
        texts = [f"{value + 0.0:.3f}" for value in flat.tolist()]
    else:
        texts = [str(value) for value in flat.tolist()]
    width = max(map(len, texts), default=0)
    texts = [text.rjust(width) for text in texts]
    if values.ndim == 0:
        return texts[0]
    # A column is told on one line; its shape says what it is.
    last = flat.numel() if values.shape[-1] == 1 else values.shape[-1]
    starts = range(0, len(texts), max(last, 1))
    return "\n".join(" ".join(texts[at : at + last]) for at in starts)


def _told(name: str, value: Any) -> list[str]:
    """Lines that say what a variable holds; none for what does not help."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(map(str, value.shape))
        start = f"{name} [{shape}] = " if value.ndim else f"{name} = "
        if value.numel() == 0:
            return [start + "nothing"]
        if value.numel() > 64:
            return [start.rstrip(" =")]
        lines = _numbers(value).split("\n")
        return [start + lines[0]] + [" " * len(start) + x for x in lines[1:]]
    if isinstance(value, torch.device):
        return []
    if isinstance(value, bool | int | float | str | type(None)):
        return [f"{name} = {value!r}"]
    if isinstance(value, list | tuple):
        if all(isinstance(each, int | str) for each in value):
            return [f"{name} = {value}"]
        return [
            line
            for index, each in enumerate(value)
            for line in _told(f"{name}[{index}]", each)
        ]
    return []


def _statements(function: Callable[..., Any]) -> dict[int, tuple[int, str]]:
    """For each line of a function: where its statement begins, and it."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    found: dict[int, tuple[int, str]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or node is tree.body[0]:
            continue
        is_text = isinstance(node, ast.Expr) and isinstance(
            node.value, ast.Constant
        )
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
        part = lines[node.lineno - 1 : end]
        indent = len(part[0]) - len(part[0].lstrip())
        text = "".join(
            line[min(indent, 4) :] if line.strip() else line for line in part
        )
        checks = isinstance(node, ast.Expr) and "check" in text.split("(")[0]
        text = "" if is_text or checks else text.rstrip()
        for line in range(node.lineno, end + 1):
            found[first + line - 1] = (first + node.lineno - 1, text)
    return found


def walk(
    function: Callable[..., Any],
    *arguments: Any,
    into: Sequence[Callable[..., Any]] = (),
    **named: Any,
) -> Any:
    """Run a function line by line: each line, and what it made of what.

    The lines come from the function's file, with their numbers there. Those
    that only check arguments are left out.

    Args:
        function: plain Python.
        arguments: what it is called with.
        into: functions that it calls and that are shown in the same way.
        named: arguments by name.

    Returns:
        What the function returns.
    """
    shown = {each.__code__: _statements(each) for each in (function, *into)}
    open_calls: list[dict[str, Any]] = []
    said: list[str] = []

    def tell(call: dict[str, Any], local: dict[str, Any]) -> None:
        margin = "  " * (call["depth"] + 4)
        for name, value in local.items():
            lines = _told(name, value)
            if lines != call["known"].get(name):
                call["known"][name] = lines
                said.extend(margin + line for line in lines)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "call":
            if frame.f_code not in shown:
                return None
            call = {"at": None, "depth": len(open_calls), "known": {}}
            for name, value in frame.f_locals.items():
                call["known"][name] = _told(name, value)
            if open_calls:
                said.append("")
            file = "/".join(frame.f_code.co_filename.split("/")[-2:])
            indent = "  " * call["depth"]
            said.append(f"{indent}{frame.f_code.co_name}, {file}")
            open_calls.append(call)
            return trace
        call = open_calls[-1]
        if event == "line":
            at, text = shown[frame.f_code].get(frame.f_lineno, (None, ""))
            # Python announces a statement of several lines more than once.
            if at is None or at == call["at"]:
                return trace
            tell(call, frame.f_locals)
            call["at"] = at
            if text:
                margin = "  " * call["depth"]
                first, *rest = text.split("\n")
                said.append(f"{margin}{at:4d}  {first}")
                said.extend(f"{margin}      {line}" for line in rest)
        if event == "return":
            tell(call, frame.f_locals)
            open_calls.pop()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function(*arguments, **named)
    finally:
        sys.settrace(before)
        # At once: what is printed in parts is shown in parts.
        print("\n".join(said))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows of text under a head, as wide as they need to be."""
    texts = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [
        max(len(row[column]) for row in texts) for column in range(len(head))
    ]
    for row in texts:
        print(
            "  ".join(
                cell.ljust(width)
                for cell, width in zip(row, widths, strict=True)
            ).rstrip()
        )


def check(
    operation: str,
    function: Callable[..., Any],
    only: Sequence[str] = (),
    seed: int = 0,
    profile: str = "smoke",
    **takes: Any,
) -> bool:
    """Hold a function against requirements and print what they say.

    It is the conformance suite's own check, with fewer examples.

    Args:
        operation: which one of the specification the function is.
        function: called with the arguments by name.
        only: the requirements; without, all of the operation, of which those
            that are met are counted and not listed.
        seed: of the inputs.
        profile: how many inputs, as for `moespec check`.
        takes: fields of `Capabilities`: what the function is meant to take.

    Returns:
        Whether every requirement that ran was met.
    """
    from moe_conformance import Capabilities, Target
    from moe_conformance.executor import InlineExecutor
    from moe_conformance.registry import requirements
    from moe_conformance.runner import effort_for, run_requirement
    from moe_conformance.selfcheck import inline_scope

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    student = type(
        "Student",
        (Target,),
        {
            "name": "student",
            "version": "0",
            "capabilities": Capabilities(**takes),
            operation: call,
        },
    )
    executor = InlineExecutor(student())
    scope = inline_scope(executor)
    # A case that is not the smallest is good enough here, and comes sooner.
    effort = replace(effort_for(profile, None, False), shrinks=40)
    met, broken, said = 0, 0, []
    for requirement in requirements():
        if requirement.operation != operation or requirement.also:
            continue
        if only and requirement.id not in only:
            continue
        result = run_requirement(requirement, scope, executor, effort, seed)
        if result.status in ("unsupported", "observed"):
            if only:
                said.append(f"{requirement.id}  not asked: {result.message}")
            continue
        good = result.status in ("pass", "marginal")
        met, broken = met + good, broken + (not good)
        if only or not good:
            head = f"{requirement.id}  {result.status:<6}"
            said.append(_folded(head, requirement.sentence))
        if not good:
            said.append(_folded(" " * 8, result.message))
    if not only:
        said.append(f"{met} requirements of {operation} met, {broken} not.")
    print("\n".join(said))
    return broken == 0


def _folded(head: str, text: str) -> str:
    """A line under a head, folded to the width of a page."""
    return textwrap.fill(
        text,
        78,
        initial_indent=f"{head}  ",
        subsequent_indent=" " * (len(head) + 2),
        break_long_words=False,
    )


def check_router(
    function: Callable[..., Any], routing: dict[str, Any], seed: int = 0
) -> bool:
    """Hold a `route` function against requirements and print what they say.

    Args:
        function: as `moe_reference.gating.route`.
        routing: what it takes, as in `Capabilities.routing`.
        seed: of the inputs.

    Returns:
        Whether every requirement that ran was met.
    """
    numbers = (1, 3, 4, 5, 7, 9, 15)
    only = [f"GATE-{number:02d}" for number in numbers]
    return check("route", function, only, seed, routing=routing)


def time_on_gpu(
    functions: dict[str, Callable[[], Any]], repeats: int = 50
) -> None:
    """Median time of each function on a GPU, or that nothing was measured."""
    if not torch.cuda.is_available():
        print("Not measured here: this machine has no GPU.")
        return
    rows = []
    for name, function in functions.items():
        for _ in range(5):
            function()
        times = []
        for _ in range(repeats):
            start, end = (
                torch.cuda.Event(enable_timing=True) for _ in range(2)
            )
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
        rows.append(
            (
                name,
                f"{np.median(times):.1f}",
                f"{np.quantile(times, 0.9):.1f}",
            )
        )
    table(("on this GPU", "median µs", "90th percentile µs"), rows)


def _rounds(seconds: float, least: int = 5) -> Iterator[int]:
    """Numbers until the time is over."""
    end, count = time.perf_counter() + seconds, 0
    while count < least or time.perf_counter() < end:
        yield count
        count += 1


def compare_times(
    functions: dict[str, Callable[[], Any]], seconds: float = 2.0
) -> dict[str, float]:
    """The least time of each function, and its ratio to that of the first.

    They take turns, so that whatever else the machine does falls on all; what
    is slower than the least was slowed down by it. On a CPU each has one
    thread: threads that wait for each other measure the other programs.

    Returns:
        The ratios by name.
    """
    on_gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in _rounds(seconds):
        for name, function in functions.items():
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    least = {name: min(each) for name, each in times.items()}
    first = next(iter(least))
    ratios = {name: each / least[first] for name, each in least.items()}
    where = "on this GPU" if on_gpu else "on this CPU, one thread"
    table(
        (where, "ms", f"of the time of {first}"),
        [
            (name, f"{least[name] * 1000:.3f}", f"{ratios[name]:.3f}")
            for name in functions
        ],
    )
    return ratios


def number_lines(
    rows: dict[str, torch.Tensor], title: str, xlabel: str
) -> None:
    """The numbers that each name's codes stand for, as ticks on a line."""
    figure, axes = plt.subplots(figsize=(9.5, 0.7 + 0.5 * len(rows)))
    for row, values in enumerate(rows.values()):
        places = np.unique(_array(values))
        axes.hlines(row, places[0], places[-1], color=QUIET, lw=0.8)
        axes.vlines(
            places,
            row - 0.3,
            row + 0.3,
            color=LINES[row % len(LINES)],
            lw=1.4 if len(places) <= 32 else 0.6,
        )
    axes.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    told = "; ".join(
        f"{name}: {len(np.unique(_array(values)))} numbers"
        for name, values in rows.items()
    )
    _finish(figure, f"Ticks on lines, {title}. {told}.")
