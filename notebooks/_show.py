"""What notebooks share: device, pictures, the exercise's check, a stopwatch.

The pictures need matplotlib and nothing else. Colours come from cividis,
which also reads in grey and for eyes that confuse red and green; what is
chosen is marked by a frame, not by a colour.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

MARK = "#d95f02"
QUIET = "#9aa0a6"
plt.rcParams.update({
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "image.cmap": "cividis",
    "axes.spines.top": False,
    "axes.spines.right": False,
})  # fmt: skip


def find_device() -> torch.device:
    """The GPU where there is one, otherwise the CPU; says which."""
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}; sizes of a real model.")
        return torch.device("cuda")
    print(
        "No GPU: small sizes, the fast versions are torch operations, "
        "nothing is timed."
    )
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
    plt.show()


def curves(
    x: torch.Tensor, lines: dict[str, torch.Tensor], title: str, xlabel: str
) -> None:
    """One line per name over x, told apart by dashes as well as by colour."""
    _, axes = plt.subplots(figsize=(7, 3.2))
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.8, len(lines)))
    for (name, y), style, colour in zip(
        lines.items(),
        ("-", "--", ":", "-.") * len(lines),
        colours,
        strict=False,
    ):
        axes.plot(_array(x), _array(y), style, label=name, color=colour, lw=2)
    axes.set(title=title, xlabel=xlabel)
    axes.legend(frameon=False)
    plt.show()


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
            color=plt.get_cmap("cividis")(0.25),
        )
        axes.axhline(counts.mean(), color=MARK, lw=1.5, ls="--", label="mean")
        axes.set(title=name, xlabel="expert")
    panels[0][0].set_ylabel("tokens")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title)
    plt.show()
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
    _, panels = plt.subplots(
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
            color=plt.get_cmap("cividis")(0.25),
            alpha=0.6,
        )
        axes.set(title=name, xlabel=xlabel, aspect="equal")
    panels[0][0].set_ylabel(ylabel)
    plt.show()


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
    from moe_conformance import Capabilities, Target
    from moe_conformance.executor import InlineExecutor
    from moe_conformance.registry import requirement_named
    from moe_conformance.runner import effort_for, run_requirement
    from moe_conformance.selfcheck import inline_scope

    class Student(Target):
        name, version = "student", "0"
        capabilities = Capabilities(routing=routing)

        def route(self, logits, config, bias=None, token_ids=None):
            return function(logits, config, bias, token_ids)

    executor = InlineExecutor(Student())
    scope, effort = inline_scope(executor), effort_for("smoke", None, False)
    met = True
    for id in (
        "GATE-01",
        "GATE-03",
        "GATE-04",
        "GATE-05",
        "GATE-07",
        "GATE-09",
        "GATE-15",
    ):
        requirement = requirement_named(id)
        result = run_requirement(requirement, scope, executor, effort, seed)
        print(f"{id}  {result.status:<6}  {requirement.sentence}")
        if result.status not in ("pass", "marginal"):
            met = False
            print(f"         {result.message}")
    return met


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
