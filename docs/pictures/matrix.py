"""The public matrix: what benchmarks/libraries.py recorded, as tables and as a page of its own."""

import json
import tomllib
from pathlib import Path

from moe_conformance.findings import Finding, read_findings
from moe_conformance.registry import ANY, requirements
from moe_conformance.report import write_matrix
from moe_conformance.summary import restored
from moe_conformance.target import OPERATIONS

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "libraries"
DATA = ROOT / "docs" / "data"
BROKEN = ("fail", "crash", "timeout", "inconclusive", "warn")
DEFINITION = {
    "score": "score",
    "order": "order",
    "renormalize": "renormalised",
    "norm": "norm",
    "epsilon": "epsilon",
    "epsilon_mode": "epsilon is",
    "scale_when": "scaled",
    "group_score": "group score",
    "mask_fill": "masked with",
}
"""The fields of `RoutingConfig` in which libraries differ, and what the table calls them."""


def libraries():
    """The table of benchmarks/libraries.toml."""
    return tomllib.loads((ROOT / "benchmarks" / "libraries.toml").read_text())


def records():
    """What was recorded of each library, in the order of the table."""
    paths = [RECORDS / f"{each['name']}.json" for each in libraries()["library"]]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def findings():
    """What explains the red cells: of the libraries, and of the documents."""
    any_operation = tuple(each.id for each in requirements() if each.operation == ANY)
    title = "It is about every operation, and fails along with one of them."
    along = Finding(title, ("documents/*",), any_operation, "../documents/#suite", {})
    files = ("findings.toml", "documents_suite.toml")
    return [each for name in files for each in read_findings(DATA / name)] + [along]


def part(name):
    """One table of the page.

    Args:
        name: `verdicts`, `routing`, `experts`, `operations`, `environments` or `absent`.
    """
    return globals()[f"_{name}"]()


def write(site):
    """Write the whole matrix into the site, beside its page."""
    reports = [restored(each) for record in records() for each in record["reports"]]
    return write_matrix(reports, Path(site) / "matrix", findings(), back="index.html")


def _rows():
    return [(record, report) for record in records() for report in record["reports"]]


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdicts():
    made = []
    for _, report in _rows():
        statuses = list(report["status"].values())
        spread = report["breadth"]
        verdict = report["verdict"].replace("_", " ")
        if report["target"]["capabilities"]["interpreted"]:
            verdict += ", interpreted"
        made.append(
            [
                f"`{report['target']['name']}`",
                verdict,
                str(statuses.count("pass")),
                str(sum(each in BROKEN and each != "warn" for each in statuses)),
                str(statuses.count("warn")),
                f"{spread['requirements_run']}/{spread['requirements_in_all']}",
                f"{spread['operations']['provided']}/{spread['operations']['all']}",
                f"{spread['cells']['declared']}/{spread['cells']['all']}",
            ]
        )
    return _table(
        ["target", "verdict", "met", "not met", "warned", "run", "operations", "cells"], made
    )


def _values(capabilities, table, field):
    """What the alternatives of a declaration allow for a field, or nothing where all is allowed."""
    alternatives = capabilities[table]
    if isinstance(alternatives, dict):
        alternatives = [alternatives]
    if not alternatives or any(field not in each for each in alternatives):
        return "any"
    allowed = [value for each in alternatives for value in each[field]]
    words = {True: "yes", False: "no", None: "none"}
    shown = [str(words.get(v, v) if isinstance(v, bool) or v is None else v) for v in allowed]
    return ", ".join(dict.fromkeys(shown))


def _grouped(rows):
    """Rows that say the same of several targets become one."""
    joined = {}
    for name, *cells in rows:
        joined.setdefault(tuple(cells), []).append(name)
    return [[", ".join(names), *cells] for cells, names in joined.items()]


def _routing():
    made = []
    for _, report in _rows():
        target = report["target"]
        if "route" not in target["operations"]:
            continue
        capabilities = target["capabilities"]
        made.append(
            [
                f"`{target['name']}`",
                *(_values(capabilities, "routing", field) for field in DEFINITION),
                capabilities["router_dtype"] or "float32 at least",
                capabilities["ties"].replace("lowest", "lowest id"),
            ]
        )
    return _table(["target", *DEFINITION.values(), "computed in", "ties"], _grouped(made))


def _experts():
    made = []
    for _, report in _rows():
        target = report["target"]
        if "experts" not in target["operations"]:
            continue
        capabilities = target["capabilities"]
        made.append(
            [
                f"`{target['name']}`",
                ", ".join(capabilities["dtypes"]),
                # Records from before there was such a field have none.
                capabilities.get("experts_dtype") or "x's dtype",
                _values(capabilities, "experts", "activation"),
                _values(capabilities, "experts", "gated"),
                _values(capabilities, "experts", "bias"),
                _values(capabilities, "experts", "weight_on"),
                capabilities["accumulator"],
                ", ".join(capabilities["rounding_points"]).replace("_", " ") or "none",
                "yes" if "experts" in capabilities["gradients"] else "no",
            ]
        )
    head = ["target", "dtypes", "computed in", "activations", "gated", "biases", "weight on"]
    return _table([*head, "adds up in", "rounds at", "gradients"], _grouped(made))


def _environments():
    made = []
    for record in records():
        machine = record["machine"]
        also = ", ".join(record["installing_moespec_also_installs"]) or "nothing"
        lines = "<br>".join(f"`{line}`" for line in record["install"]) or "part of `make setup`"
        made.append(
            [
                record["library"],
                record["version"],
                lines,
                also,
                _tests(record),
                f"`{_command(record)}`",
                f"{record['date']}, `{record['commit'][:10]}`, torch {machine['torch']}",
            ]
        )
    head = ["library", "version", "installed with", "moespec would add", "tests of the adapter"]
    return _table([*head, "checked with", "when"], made)


def _command(record):
    # Records from before there was such a field have none.
    around = [f"{name}={value}" for name, value in record.get("around", {}).items()]
    return " ".join([*around, record["reports"][0]["command"]])


def _tests(record):
    tested = {each["name"] for each in libraries()["library"] if "tests" in each}
    if record["library"] not in tested:
        return ""
    # Records from before there was such a field have none.
    ends = record.get("tests", {})
    words = {"xfailed": "expected to fail"}
    counts = [f"{count} {words.get(name, name)}" for name, count in ends.items() if count]
    return ", ".join(counts) or "not measured"


def _absent():
    made = [[each["name"], each["why"]] for each in libraries().get("absent", [])]
    return _table(["library", "what stopped it"], made)


def _operations():
    made = []
    for _, report in _rows():
        held = report["target"]["operations"]
        cells = ["✓" if name in held else "" for name in OPERATIONS]
        made.append([f"`{report['target']['name']}`", *cells])
    return _table(["target", *(f"`{name}`" for name in OPERATIONS)], _grouped(made))
