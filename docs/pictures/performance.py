"""Plots and tables of what benchmarks/gpu.py and benchmarks/cpu_experts.py recorded.

A record that is not there is a sentence that says so, never a figure.
"""

import importlib.util
import json
from pathlib import Path

from pictures.svg import WIDTH, figure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
NOT_YET = (
    "**Not measured.** No row of the matrix has been measured on a GPU yet: there is no record of "
    "`make gpu` in `benchmarks/results/`."
)
LEFT, RIGHT, TOP, BAR, GAP = 210, 70, 30, 18, 12


def part(name):
    """A text of the page by its name."""
    return {
        "environment": environment,
        "goals": goal_table,
        "peers": peer_table,
        "conformance": conformance_table,
        "missing": missing,
        "cpu": cpu_tables,
    }[name]()


def gpu_record():
    """The record of `make gpu`, or None."""
    path = RESULTS / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else None


def cpu_records():
    """The records of cpu_experts.py."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu_experts_*.json"))]


def environment():
    """What the GPU's figures were measured on, and the ceilings they are relative to."""
    record = gpu_record()
    if record is None:
        return NOT_YET
    device, ceilings = record["device"], record["ceilings"]
    versions = ", ".join(f"{name} {each}" for name, each in record["versions"].items())
    clocks = ", ".join(
        f"{name} {device[name]}" for name in ("driver_version", "clocks.sm", "clocks.max.sm")
        if name in device
    )  # fmt: skip
    cut = "" if record["finished"] else " The run was cut: rows are missing."
    return (
        f"`{record['command']}` on {record['date']}, commit `{record['commit'][:10]}`, "
        f"{device['name']}, {clocks}, Python {record['machine']['python']}, {versions}: "
        f"{len(record['rows'])} rows.{cut} Ceilings of the same run: a dense product of "
        f"{ceilings['side']:,}³ in {ceilings['dtype']} at {ceilings['dense_flops'] / 1e12:.0f} "
        f"TFLOP/s, a copy at {ceilings['copy_bytes'] / 1e12:.2f} TB/s (read and written), a sum at "
        f"{ceilings['read_bytes'] / 1e12:.2f} TB/s (read), a graph with one smallest kernel in "
        f"{ceilings['launch_us']:.1f} µs."
    )


def goal_table():
    """Every goal with the figure furthest from it."""
    head = ["work", "where", "must", "good", "measured", "a peer over ours, at least"]
    return _table(head, _goals().goal_rows(gpu_record()))


def peer_table():
    """Who took part, and who was absent and why."""
    record = gpu_record()
    if record is None:
        return "Not measured."
    rows = []
    for name, made_of in record["peers"].items():
        measured = sum(
            any(name in way for way in row.get("ways", {}).values()) for row in record["rows"]
        )
        said = {row["absent"][name] for row in record["rows"] if name in row.get("absent", {})}
        rows.append([name, made_of, str(measured), _cell("; ".join(sorted(said))) or "-"])
    return _table(["peer", "what is called", "rows timed", "where absent, why"], rows)


def conformance_table():
    """What the suite said on the same GPU."""
    record = gpu_record()
    if record is None:
        return "Not measured."
    if not record["conformance"]:
        return "The suite was not run with it."
    rows = []
    for each in record["conformance"]:
        counts = ", ".join(f"{count} {name}" for name, count in each.get("counts", {}).items())
        broken = "; ".join(f"{b['id']}: {b['message']}" for b in each.get("broken", []))
        rows.append([each.get("target", "-"), each.get("operation", "-"), each["verdict"],
                     counts or "-", _cell(broken) or "-"])  # fmt: skip
    return _table(["target", "operation", "verdict", "requirements", "broken"], rows)


def missing():
    """Rows without figures, and results that were wrong."""
    record = gpu_record()
    if record is None:
        return "Not measured."
    rows = [[row["label"], f"{name}: {_cell(said)}"] for row in record["rows"]
            for name, said in row.get("wrong", {}).items()]  # fmt: skip
    rows += [[label, _cell(said)] for label, said in record["errors"].items()]
    rows += [[label, "not measured: the time was over"] for label in record["not_reached"]]
    return _table(["row", "what is missing"], rows) if rows else "Nothing is missing."


def cpu_tables():
    """Every record of the CPU: where it was measured, and the times."""
    found = cpu_records()
    if not found:
        return "**Not measured.** There is no record of `benchmarks/cpu_experts.py`."
    return "\n\n".join(_cpu_table(record) for record in found)


def _cpu_table(record):
    machine, sizes = record["machine"], record["sizes"]
    versions = ", ".join(f"{name} {each}" for name, each in record["versions"].items())
    operation = {"training": "Forward and backward", "forward": "Forward"}[record["operation"]]
    head = (
        f"**{operation}.** `{record['command']}` on {record['date']}, commit "
        f"`{record['commit'][:10]}`, {versions}, Python {machine['python']}, "
        f"{machine['platform']}, {record['threads']} threads. "
        + ", ".join(f"{name} {size}" for name, size in sizes.items())
        + f"; {record['rounds']} rounds. The load of the machine (processes that want to run) was "
        + ", ".join(f"{row['load_before']:g} to {row['load_after']:g}" for row in record["rows"])
        + "."
    )
    columns = ["T", "implementation", "median, ms", "fastest, ms", "over ours (quartiles)",
               "difference", "allocated, MB"]  # fmt: skip
    training = record["operation"] == "training"
    columns += ["kept, MB"] if training else []
    rows = []
    for row in record["rows"]:
        for name, each in row["implementations"].items():
            low, high = each["ratio_quartiles"]
            rows.append([f"{row['tokens']}", name, f"{each['milliseconds']:,.1f}",
                         f"{each['fastest_milliseconds']:,.1f}",
                         f"{each['ratio_to_ours']:.2f} ({low:.2f} to {high:.2f})",
                         f"{each['difference']:.1e}", _megabytes(each["peak_bytes"]),
                         *([_megabytes(each["kept_bytes"])] if training else [])])  # fmt: skip
        rows += [[f"{row['tokens']}", name, f"absent: {said}", *["-"] * (len(columns) - 3)]
                 for name, said in row["absent"].items()]  # fmt: skip
    return f"{head}\n\n{_table(columns, rows)}\n\n{_memory(record)}"


def _memory(record):
    """What the columns about memory count, and the limits."""
    per_size = "; ".join(
        f"at T {row['tokens']} the results are {_megabytes(row['result_bytes'])} MB"
        + (
            f" and the limit is {_megabytes(row['kept_at_most'])} MB"
            if "kept_at_most" in row
            else ""
        )
        for row in record["rows"]
    )
    kept = (
        " *Kept* is what lies between forward and backward, the matrices left out; the limit for "
        "it is x, the pre-activations and the routing data."
        if record["operation"] == "training"
        else ""
    )
    return (
        "*Allocated* is the most that torch holds during one call on top of what was there, "
        f"results included; what a library takes inside a product is not in it.{kept} "
        f"{per_size[0].upper()}{per_size[1:]}."
    )


def _megabytes(count):
    return f"{count / 1e6:,.1f}"


def cpu():
    """Each implementation's time over ours on the CPU."""
    groups, said = [], []
    for record in cpu_records():
        for row in record["rows"]:
            title = f"{record['operation']}, T {row['tokens']}"
            bars = [_bar(name, each) for name, each in row["implementations"].items()]
            groups.append((title, bars))
            fastest = row["fastest_peer_over_ours"]
            than = "slower" if fastest < 1 else "faster"
            said.append(f"{title}: the fastest peer takes {fastest:.2f} times ours, so ours is "
                        f"{than}")  # fmt: skip
    if not groups:
        return ""
    reading = "Time over ours, median and quartiles of the rounds. " + "; ".join(said) + "."
    return _bars(groups, reading, mark=1.0)


def floors():
    """Our share of the floor in every row of the forward and the backward."""
    record = gpu_record()
    if record is None:
        return "Not measured."
    groups = []
    for kind in ("forward", "backward"):
        bars = []
        for row in record["rows"]:
            ours = _goals().our_times(row) if row["kind"] == kind else None
            if ours:
                skew = "" if row["routing"] == "uniform" else f", {row['routing']}"
                bars.append((f"{row['model']}, T {row['T']}{skew}", 100 * ours["of_floor"], ()))
        if bars:
            groups.append((f"{kind}, % of the floor", bars))
    if not groups:
        return "Not measured."
    values = [value for _, bars in groups for _, value, _ in bars]
    reading = (
        f"How much of the floor's rate moespec reaches on {record['device']['name']}: from "
        f"{min(values):.0f} to {max(values):.0f} % in {len(values)} rows."
    )
    return _bars(groups, reading, mark=100.0)


def peers():
    """Each peer's time over ours in the rows with most and with few tokens."""
    record = gpu_record()
    if record is None:
        return "Not measured."
    groups, least = [], {}
    for row in record["rows"]:
        if row["routing"] != "uniform" or row["kind"] not in ("forward", "backward"):
            continue
        way = "graph" if row["T"] <= 512 else "eager"
        found = row["ways"].get(way, {})
        others = {name: each for name, each in found.items() if not name.startswith("moespec")}
        if row["T"] in (64, 16384) and others and "moespec" in found:
            bars = [_bar(name, each) for name, each in others.items()]
            groups.append((f"{row['kind']}, {row['model']}, T {row['T']}, {way}", bars))
            for name, each in others.items():
                least[name] = min(least.get(name, each["ratio_to_ours"]), each["ratio_to_ours"])
    if not groups:
        return "Not measured."
    said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in least.items())
    reading = f"Time over ours, median and quartiles of the rounds. The least of each peer: {said}."
    return _bars(groups, reading, mark=1.0)


def _bar(name, each):
    return name, each["ratio_to_ours"], tuple(each["ratio_quartiles"])


def _bars(groups, reading, mark):
    """Horizontal bars under titles; `mark` is a line across, and quartiles are whiskers."""
    values = [max((value, *span)) for _, bars in groups for _, value, span in bars]
    # A peer that takes fifty times as long would make all others alike.
    end = min(max([*values, mark]), 6 * mark)
    wide = WIDTH - LEFT - RIGHT

    def place(value):
        return LEFT + wide * min(value, end) / end

    parts, y = [], 0
    for title, bars in groups:
        parts.append(_text(8, y + 18, title, "start", "bold"))
        y += TOP
        for i, (name, value, span) in enumerate(bars):
            parts.append(_text(LEFT - 8, y + BAR - 4, name, "end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{place(value) - LEFT:.1f}" '
                f'height="{BAR - 4}" fill="rgba(var(--picture-fill-{i % 4}),0.75)"/>'
            )
            if span:
                middle = y + BAR / 2
                parts.append(_line(place(span[0]), middle, place(span[1]), middle))
            cut = "→ " if value > end else ""
            parts.append(_text(place(max((value, *span))) + 6, y + BAR - 4, f"{cut}{value:.3g}"))
            y += BAR
        y += GAP
    parts.append(_line(place(mark), 0, place(mark), y, dashed=True))
    return figure(y, "".join(parts), reading)


def _line(x1, y1, x2, y2, dashed=False):
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f'stroke-width="1.2"{dash}/>'
    )


def _text(x, y, text, anchor="start", weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="currentColor">{text}</text>'
    )


def _cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _goals():
    spec = importlib.util.spec_from_file_location("moespec_goals", BENCHMARKS / "goals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
