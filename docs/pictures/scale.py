"""Plots of what benchmarks/scale_model.py recorded, and tables of the same."""

import json
import math
from functools import cache
from pathlib import Path

from moe_reference.presets import PRESETS

from pictures.svg import WIDTH, figure

RESULTS = Path(__file__).parents[2] / "benchmarks/results/scale_model.json"
MODEL = "DeepSeek-V3"
DASHES = ("", "7 4", "2 3", "10 3 2 3")
TOP, HEIGHT, BOTTOM, LEFT, RIGHT, GAP = 58, 210, 46, 52, 24, 60
LEGEND = 20


@cache
def record():
    """What the model gave."""
    return json.loads(RESULTS.read_text())


def rows(table, **keys):
    """The rows of a table that have these values."""
    found = record()[table]
    return [row for row in found if all(row[key] == value for key, value in keys.items())]


def places() -> str:
    """How many ranks and hosts a token needs."""
    alike = rows("links", model=MODEL)
    limited = rows("places", model=MODEL, routing="uniform")
    K = record()["models"][MODEL]["top_k"]
    series = {
        f"experts, {K}": [K] * len(alike),
        "ranks": [row["ranks_touched"] for row in alike],
        "hosts": [row["hosts_touched"] for row in alike],
        "hosts, chosen by its router": [row["hosts_touched"] for row in limited],
    }
    at = [row["ranks"] for row in alike]
    end = next(i for i, ranks in enumerate(at) if ranks == 64)
    routing = PRESETS[record()["models"][MODEL]["preset"]]
    reading = (
        f"Modelled: how many ranks and hosts a token of {MODEL} needs, {_hosts()} ranks in a host. "
        f"On {at[end]} ranks {alike[end]['hosts_touched']:.1f} hosts if all experts are chosen "
        f"alike, and {limited[end]['hosts_touched']:.1f} with its router, which takes experts of "
        f"{routing.topk_groups} out of {routing.num_groups} groups. On {at[-1]:,} ranks nearly "
        "every expert is on a host of its own."
    )
    return _plots([("", series, [0, 2, 4, 6, 8], False)], at, reading)


def times() -> str:
    """Experts against exchange, for many tokens and for few."""
    panels, said = [], []
    ranges = {
        "prefill": (500, 1000, 2000, 5000, 10000, 20000),
        "decode": (20, 50, 100, 200, 500, 1000),
    }
    for phase, ticks in ranges.items():
        found = rows("times", model=MODEL, phase=phase)
        series = {
            "experts": [row["compute_us"] for row in found],
            "exchange, pairs": [row["pairs_us"] for row in found],
            "once per host": [row["once_us"] for row in found],
            "once, its router": [row["routed_us"] for row in found],
        }
        panels.append((f"{phase}, µs", series, ticks, True))
        eight, last = found[0], found[-1]
        said.append(
            f"In {phase}, on {eight['ranks']} and on {last['ranks']:,} ranks, the experts take "
            f"{_us(eight['compute_us'])} and {_us(last['compute_us'])}, the exchange of pairs "
            f"{_us(eight['pairs_us'])} and {_us(last['pairs_us'])}."
        )
    reading = (
        f"Modelled floors in microseconds of one layer of {MODEL}, there and back together. "
        + " ".join(said)
    )
    return _plots(panels, [row["ranks"] for row in found], reading)


def loads() -> str:
    """The busiest rank over the mean, for three kinds of routing."""
    panels, said = [], []
    for kind in ("uniform", "zipf", "recorded"):
        found = rows("imbalance", model=MODEL, routing=kind)
        series = {
            "without copies": [row["without_copies"] for row in found],
            "with copies": [row["with_copies"] for row in found],
            "with copies, in turn by rank": [row["turn_by_rank"] for row in found],
        }
        panels.append((kind, series, [1, 2, 5, 10, 20, 50, 100, 250], True))
        middle = next(row for row in found if row["ranks"] == 256)
        said.append(
            f"{kind} {middle['without_copies']:.1f} without copies and "
            f"{middle['with_copies']:.1f} with"
        )
    reading = (
        f"Simulated: rows of the busiest rank over the mean, {MODEL}, "
        f"{record()['simulation']['tokens_per_rank']} tokens per rank. On 256 ranks: "
        + ", ".join(said)
        + ". From there on there are more ranks than experts, and without copies some are idle."
    )
    return _plots(panels, [row["ranks"] for row in found], reading)


def _hosts():
    return record()["modelled_hardware"]["ranks_per_host"]


def _us(value):
    return f"{value:,.0f} µs"


def _plots(panels, at, reading):
    """Panels side by side with one legend; each is a title, series, ticks, and whether log."""
    wide = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    parts = [_legend(list(panels[0][1]))]
    for i, panel in enumerate(panels):
        parts.append(_panel(LEFT + i * (wide + GAP), wide, panel, at))
    return figure(TOP + HEIGHT + BOTTOM, "".join(parts), reading)


def _legend(names):
    parts, x = [], LEFT
    for i, name in enumerate(names):
        parts.append(_line([(x, LEGEND - 5), (x + 30, LEGEND - 5)], i))
        parts.append(_text(x + 36, LEGEND, name, "start"))
        x += 36 + 6.8 * len(name) + 24
    return "".join(parts)


def _panel(left, wide, panel, at):
    title, series, ticks, logarithmic = panel
    scale = math.log if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(i, value):
        share = (scale(value) - low) / (high - low)
        return left + wide * i / (len(at) - 1), TOP + HEIGHT * (1 - share)

    parts = [_text(left + wide / 2, TOP - 12, title, "middle", "bold")]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide:.1f}" y2="{y:.1f}" '
            f'stroke="var(--picture-line)" stroke-width="0.7"/>'
        )
        parts.append(_text(left - 6, y + 4, f"{tick:,}", "end"))
    every = 2 if wide > 250 else 4
    for i, ranks in enumerate(at):
        x = place(i, ticks[0])[0]
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP + HEIGHT}" x2="{x:.1f}" y2="{TOP + HEIGHT + 4}" '
            f'stroke="var(--picture-line)"/>'
        )
        if i % every == 0:
            parts.append(_text(x, TOP + HEIGHT + 19, f"{ranks:,}", "middle"))
    parts.append(_text(left + wide / 2, TOP + HEIGHT + 38, "ranks", "middle"))
    for i, values in enumerate(series.values()):
        parts.append(_line([place(j, value) for j, value in enumerate(values)], i))
    return "".join(parts)


def _line(points, number):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
    colour = "currentColor" if number == 3 else f"rgb(var(--picture-fill-{number}))"
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>'


def _text(x, y, text, anchor, weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="currentColor">{text}</text>'
    )
