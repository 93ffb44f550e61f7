"""Reports: what a run found out, as JSON, as pages that one can read, and in the terminal.

`report.json` is the report; everything else is made from it and holds nothing that it lacks. All
that comes from a target (its name, its messages, what it raised) is text that nobody has vetted:
the pages escape it, and what goes to a terminal or into XML has its control characters replaced.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_conformance.cases import case_name, folder_of
from moe_conformance.findings import Finding, explanations
from moe_conformance.inputs import expert_parallel, experts, load_balancing, routing
from moe_conformance.pages import FAILING, NOT_RUN, page, replay, words
from moe_conformance.preview import preview, preview_inputs, worst_place
from moe_conformance.registry import requirements
from moe_conformance.runner import STATUSES, Failure, Result, verdict
from moe_conformance.target import DTYPES, OPERATIONS, Capabilities

SCHEMA_VERSION = 1

Report = dict[str, Any]

AXES: dict[str, Mapping[str, Sequence[Any]]] = {
    "route": routing.UNIVERSE,
    "experts": experts.UNIVERSE,
    "align": dict.fromkeys(("drop_invalid", "expert_map", "invalid_ids"), (False, True)),
    "drop_to_capacity": {
        "policy": ("position", "first_choice", "probs"),
        "signed_weights": (False, True),
    },
    "balance_loss": {n: v for n, v in load_balancing.UNIVERSE.items() if n != "centred"},
    "update_bias": {"centred": (False, True)},
    "expert_parallel": expert_parallel.UNIVERSE,
}
"""The values whose declaration counts towards breadth, by operation and field."""

DECLARED_IN = {
    "route": "routing",
    "experts": "experts",
    "align": "align",
    "drop_to_capacity": "capacity",
    "balance_loss": "balance",
    "update_bias": "balance",
    "expert_parallel": "expert_parallel",
}
"""The field of `Capabilities` in which an operation's values are declared."""

VERDICTS = ("fails", "inconclusive", "conforms_with_waivers", "conforms")
"""From the worst to the best."""

# What no XML document may hold and no terminal should be sent: controls, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def target_report(
    *,
    target: dict[str, Any],
    machine: dict[str, Any],
    seed: int,
    suite: dict[str, Any],
    effort: dict[str, Any],
    results: Sequence[Result],
    command: str,
    started: str,
    seconds: dict[str, Any],
) -> Report:
    """The content of one target's `report.json`.

    Args:
        target: its description: `name`, `version`, `capabilities` as JSON, `operations`.
        machine: `platform`, `python`, `torch`, `triton`, `device`.
        seed: of the whole run.
        suite: `version`, `commit`, `spec`.
        effort: how many cases were asked for.
        results: one per requirement, in reading order.
        command: the command line that makes the report again.
        started: when, as text.
        seconds: how long what took.

    Returns:
        A tree of plain values that follows `schemas/report.schema.json`. The same seed gives the
        same tree but for `timing`.
    """
    capabilities = Capabilities.from_json(target["capabilities"])
    counts = Counter(result.status for result in results)
    return _plain(
        {
            "schema_version": SCHEMA_VERSION,
            "suite": suite,
            "target": {
                name: target[name] for name in ("name", "version", "capabilities", "operations")
            },
            "machine": machine,
            "seed": seed,
            "effort": effort,
            "command": command,
            "verdict": verdict(results),
            "breadth": breadth(capabilities, target["operations"], results),
            "counts": {status: counts[status] for status in STATUSES if counts[status]},
            "requirements": [_entry(result) for result in results],
            "timing": {
                "started": started,
                "seconds": seconds,
                "requirements": {r.requirement.id: round(r.seconds, 3) for r in results},
            },
        }
    )


def breadth(
    capabilities: Capabilities, operations: Iterable[str], results: Sequence[Result]
) -> dict[str, Any]:
    """How much of what there is a target declares, and how much of it was run.

    A cell is one operation, one dtype and one value of one configuration field. The fields are
    added up, not multiplied: an operation with fields of 3 and 2 values has 5 cells per dtype.
    Operations in `AXES` have the fields and values that it lists; every other operation has
    one cell per dtype. The dtypes are those of x and the logits (`DTYPES`), but for `align` and
    `align_batched`, which only see ids, those of ids; `assign_experts` takes plain numbers and has
    a single cell.

    Declared are the cells of provided operations with declared dtypes and allowed values. A field
    that is not named allows every value. With several alternatives a value is allowed where any of
    them allows it. A value that only the target declares counts as one of ours, up to as many as we
    have. Limits on sizes, multiples, world sizes and formats, and what is declared by one bool,
    have no cells.

    Args:
        capabilities: the declaration.
        operations: the operations that the target provides.
        results: what became of each requirement.

    Returns:
        `operations` {provided, all}, `cells` {declared, all, by_operation}, `requirements_run`
        (tried with at least one case) and `requirements_in_all`.
    """
    provided = set(operations)
    by_operation = {
        name: {
            "declared": _declared_cells(capabilities, name) if name in provided else 0,
            "all": len(_all_dtypes(name)) * sum(map(len, _axes(name).values())),
        }
        for name in OPERATIONS
    }
    return {
        "operations": {"provided": len(provided & set(OPERATIONS)), "all": len(OPERATIONS)},
        "cells": {
            "declared": sum(each["declared"] for each in by_operation.values()),
            "all": sum(each["all"] for each in by_operation.values()),
            "by_operation": by_operation,
        },
        "requirements_run": sum(1 for r in results if r.cases or r.failure is not None),
        "requirements_in_all": len(requirements()),
    }


def write_target(directory: Path, report: Report) -> None:
    """Write `report.json`, `report.html` and `badge.svg` of one target.

    Args:
        directory: the target's own folder, `folder_of(name)` under the run's; made if missing. The
            replay commands on the page name it as it is given here.
        report: from `target_report`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "report.json", _json(report))
    _write(directory / "report.html", page("report.html.j2", report=report, directory=directory))
    _write(directory / "badge.svg", _badge(report))


def write_index(directory: Path, reports: Sequence[Report]) -> None:
    """Write `index.json`, `index.html` and `junit.xml` of a run.

    Args:
        directory: the run's folder; the targets' reports are in `folder_of(name)` under it.
        reports: one per target.

    Raises:
        ValueError: two targets share a folder.
    """
    folders = [folder_of(report["target"]["name"]) for report in reports]
    twice = next((f for f, n in Counter(folders).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"reports: expected targets with different names, got '{twice}' twice")
    directory.mkdir(parents=True, exist_ok=True)
    reached = {report["verdict"] for report in reports}
    index = {
        "schema_version": SCHEMA_VERSION,
        "verdict": next((each for each in VERDICTS if each in reached), "inconclusive"),
        **{name: reports[0][name] for name in ("suite", "seed", "command") if reports},
        "targets": [
            {
                "name": report["target"]["name"],
                "version": report["target"]["version"],
                "verdict": report["verdict"],
                "breadth": report["breadth"],
                "counts": report["counts"],
                "report": f"{folder}/report.json",
            }
            for folder, report in zip(folders, reports, strict=True)
        ],
    }
    _write(directory / "index.json", _json(index))
    pairs = list(zip(folders, reports, strict=True))
    _write(directory / "index.html", page("index.html.j2", index=index, reports=pairs))
    _write(directory / "junit.xml", _junit(reports))


def write_matrix(
    reports: Sequence[Report], out: Path, findings: Sequence[Finding] = (), *, back: str = ""
) -> Path:
    """Write `matrix.html`: requirements by targets.

    Args:
        reports: from `read_report`; one column for each, an index gives one for each target.
        out: the folder to write it in; made if missing.
        findings: from `read_findings`; a cell that one of them explains links to it.
        back: an address that the heading links to: where the page is part of a site.

    Returns:
        The page's path.

    Raises:
        ValueError: there are no reports.
    """
    reports = [each for read in reports for each in reports_in(read)]
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    known = {each["id"]: each for report in reports for each in report["requirements"]}
    order = {each.id: place for place, each in enumerate(requirements())}
    columns = [{each["id"]: each for each in report["requirements"]} for report in reports]
    rows = [
        {
            "requirement": known[id],
            "concept": known[id]["concept"],
            "cells": [
                (column.get(id), explanations(findings, report["target"]["name"], id))
                for report, column in zip(reports, columns, strict=True)
            ],
            # Among the targets that it was run on: what others do not have is no difference.
            "differs": len({c[id]["status"] for c in columns if id in c} - set(NOT_RUN)) > 1,
        }
        for id in sorted(known, key=lambda id: (order.get(id, len(order)), id))
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "matrix.html"
    found = {entry["status"] for column in columns for entry in column.values()}
    shown = [status for status in STATUSES if status in found]
    content = {"reports": reports, "rows": rows, "statuses": shown, "back": back}
    _write(path, page("matrix.html.j2", again=_again, **content))
    return path


def _again(report: Report, id: str) -> str:
    """The command that finds a failure again where its saved case is not at hand."""
    return shlex.join([*shlex.split(report["command"]), "--requirement", id])


def read_report(path: str | Path) -> Report:
    """Read a report, or the index of a run.

    Args:
        path: `report.json` or `index.json`, or a folder that holds one of them.

    Returns:
        The report; or the index with the reports of its targets under `reports`. `reports_in`
        gives a list for either.

    Raises:
        ValueError: the file is missing, is no report, or has a schema version that is not known.
    """
    file = Path(path)
    if file.is_dir():
        held = [file / name for name in ("report.json", "index.json") if (file / name).is_file()]
        if not held:
            raise ValueError(f"report '{path}': expected report.json or index.json in the folder")
        file = held[0]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"report '{file}': {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"report '{file}': expected JSON, got {error}") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError(f"report '{file}': expected a moespec report, got other JSON")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"report '{file}': expected schema_version {SCHEMA_VERSION}, "
            f"got {content['schema_version']!r}"
        )
    if "targets" in content:
        try:
            listed = [each["report"] for each in content["targets"]]
            paths = [file.parent / name for name in listed]
        except (TypeError, KeyError):
            raise ValueError(
                f"report '{file}': targets: expected a list of objects with 'report'"
            ) from None
        return {**content, "reports": [read_report(each) for each in paths]}
    wrong = _mismatch(content, _schema(), "")
    if wrong is not None:
        raise ValueError(f"report '{file}': {wrong}")
    return content


def reports_in(read: Report) -> list[Report]:
    """The targets' reports in what `read_report` gave: itself, or those of the index."""
    return list(read["reports"]) if "reports" in read else [read]


def compare(old: Report, new: Report) -> dict[str, list[dict[str, Any]]]:
    """What is different between two reports, or between two indexes.

    Targets are paired by name, and one single target with another one whatever their names.

    Args:
        old: from `read_report`.
        new: from `read_report`.

    Returns:
        Lists of {target, id, old, new, message}, where `old` and `new` are statuses, or None where
        the requirement is not listed: `regressed`; `fixed`; `new` (run now and not before); `gone`
        (run before and not now, which may hide a failure); `unchanged`. From best to worst: pass,
        observed and marginal; warn; waived; inconclusive; fail, crash and timeout. A failure that
        is merely waived or inconclusive now counts as unchanged.
    """
    changes: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("regressed", "fixed", "new", "gone", "unchanged")
    }
    before, after = reports_in(old), reports_in(new)
    if len(before) == len(after) == 1:
        pairs = [(after[0]["target"]["name"], before[0], after[0])]
    else:
        by_name = [{r["target"]["name"]: r for r in listed} for listed in (before, after)]
        names = dict.fromkeys([*by_name[0], *by_name[1]])
        nothing: Report = {"requirements": []}
        pairs = [(n, by_name[0].get(n, nothing), by_name[1].get(n, nothing)) for n in names]
    for name, first, second in pairs:
        was = {each["id"]: each for each in first["requirements"]}
        now = {each["id"]: each for each in second["requirements"]}
        for id in dict.fromkeys([*now, *was]):
            statuses = was.get(id, {}).get("status"), now.get(id, {}).get("status")
            changes[_change(*statuses)].append(
                {
                    "target": name,
                    "id": id,
                    "old": statuses[0],
                    "new": statuses[1],
                    "message": now.get(id, was.get(id, {}))["message"],
                }
            )
    return changes


def table(reports: Sequence[Report], directory: Path | None = None) -> RenderableType:
    """Verdicts, breadth and counts for the terminal, and below them what is broken.

    Args:
        reports: one per target.
        directory: the run's folder, for replay commands that work from here; without it they are
            relative to the target's own folder.
    """
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("target", "verdict", "operations", "cells", "requirements", "of these"):
        shown.add_column(heading, overflow="fold")
    broken: list[RenderableType] = []
    for report in reports:
        target, spread = report["target"], report["breadth"]
        shown.add_row(
            Text(_printable(f"{target['name']} {target['version']}").strip(), "bold"),
            Text(words(report["verdict"]), _colour(report["verdict"])),
            "{provided}/{all}".format(**spread["operations"]),
            "{declared}/{all}".format(**spread["cells"]),
            f"{spread['requirements_run']}/{spread['requirements_in_all']}",
            Text(", ").join(
                Text(f"{count} {words(status)}", _colour(status))
                for status, count in report["counts"].items()
            ),
        )
        broken += [
            line
            for each in report["requirements"]
            if each["status"] in (*FAILING, "warn", "inconclusive")
            for line in _broken_lines(report, each, directory)
        ]
    return Group(shown, *broken)


def last_line(report: Report, directory: Path | None = None) -> str:
    """Verdict, waivers, breadth, and where the page is.

    Args:
        report: of one target.
        directory: the run's folder; without it the line names no page.
    """
    name, spread = report["target"]["name"], report["breadth"]
    waived = report["counts"].get("waived", 0)
    line = (
        f"{name}: {words(report['verdict'])}{f' ({waived} waived)' if waived else ''}"
        f"{', interpreted' if report['target']['capabilities']['interpreted'] else ''}; breadth: "
        f"{spread['operations']['provided']}/{spread['operations']['all']} operations, "
        f"{spread['cells']['declared']}/{spread['cells']['all']} cells, "
        f"{spread['requirements_run']}/{spread['requirements_in_all']} requirements run"
    )
    if directory is not None:
        line += f"; report: {directory / folder_of(name) / 'report.html'}"
    return _printable(line)


def times_line(report: Report) -> str:
    """How many cases there were and how long they and the target's import took."""
    took = report["timing"]["seconds"]
    cases = sum(entry["cases"] for entry in report["requirements"])
    side = f", in {took['lanes']} processes side by side" if took["lanes"] > 1 else ""
    return _printable(
        f"{report['target']['name']}: {cases} cases in {took['cases']:.1f} s{side}; "
        f"the target was loaded in {took['loading']:.1f} s"
    )


def _entry(result: Result) -> dict[str, Any]:
    requirement, failure = result.requirement, result.failure
    counterexample = None if failure is None else f"cases/{case_name(failure)}"
    return {
        "id": requirement.id,
        "concept": requirement.area,
        "operation": requirement.operation,
        "also": requirement.also,
        "level": requirement.level,
        "title": requirement.title,
        "sentence": requirement.sentence,
        "reason": requirement.reason,
        "sources": requirement.sources,
        "references": requirement.references,
        "status": result.status,
        "message": result.message,
        "cases": result.cases,
        "vacuous": result.vacuous,
        "marginal": result.marginal,
        "worst": float(f"{result.worst:.4g}"),
        "worst_rms": float(f"{result.worst_rms:.4g}"),
        "drawn": dict(sorted(result.drawn.items())),
        "counterexample": counterexample,
        "replay": None if counterexample is None else replay(counterexample),
        "failure": None if failure is None else _failure(failure),
    }


def _failure(failure: Failure) -> dict[str, Any]:
    violation = failure.violation
    expected, actual = violation.expected, violation.actual
    around = worst_place(expected, actual)
    answers = failure.sessions[-1][1] if failure.sessions else []
    error = answers[-1].get("error") if answers else None
    return {
        "kind": violation.kind,
        "flips": failure.flips,
        "self_contained": failure.self_contained,
        "plan": failure.plan,
        "calls": [c["operation"] for session, _ in failure.sessions for c in session["calls"]],
        "inputs": preview_inputs(failure.inputs),
        "expected": None if expected is None else preview("expected", expected, around),
        "actual": None if actual is None else preview("actual", actual, around),
        "traceback": None if error is None else error["traceback"],
    }


def _badge(report: Report) -> str:
    """A picture for a README: the verdict, and on how many requirements it rests."""
    run, all_ = report["breadth"]["requirements_run"], report["breadth"]["requirements_in_all"]
    said = f"{words(report['verdict'])} ({run}/{all_} run)"
    colour = {"conforms": "#1b7f3b", "fails": "#b3261e"}.get(report["verdict"], "#8a6d00")
    # 6.5 pixels a character are what the fonts take at this size; the text is fitted to it.
    sizes = {"left": 62, "right": round(6.5 * len(said)) + 12}
    return page("badge.svg.j2", report=report, said=said, colour=colour, **sizes)


def _axes(operation: str) -> Mapping[str, Sequence[Any]]:
    return AXES.get(operation, {"": (None,)})


def _all_dtypes(operation: str) -> tuple[str, ...]:
    if operation == "assign_experts":
        return ("",)
    return ("int64", "int32") if operation in ("align", "align_batched") else DTYPES


def _declared_cells(capabilities: Capabilities, operation: str) -> int:
    listed = {"", *capabilities.dtypes, *capabilities.id_dtypes}
    dtypes = [name for name in _all_dtypes(operation) if name in listed]
    alternatives: list[dict[str, tuple[Any, ...]]] = [{}]
    if operation in DECLARED_IN:
        alternatives = capabilities.alternatives(DECLARED_IN[operation])
    values = 0
    for field, universe in _axes(operation).items():
        allowed = {str(v) for choice in alternatives for v in choice.get(field, universe)}
        values += min(len(allowed), len(universe))
    return len(dtypes) * values


def _change(old: str | None, new: str | None) -> str:
    ran_before = old is not None and old not in NOT_RUN
    runs_now = new is not None and new not in NOT_RUN
    if ran_before and runs_now:
        was, now = _badness(old), _badness(new)
        if now > was:
            return "regressed"
        return "fixed" if now < was and now <= _badness("warn") else "unchanged"
    if ran_before == runs_now:
        return "unchanged"
    return "new" if runs_now else "gone"


def _badness(status: str | None) -> int:
    from_best = (
        ("pass", "observed", "marginal"),
        ("warn",),
        ("waived",),
        ("inconclusive",),
        FAILING,
    )
    return next(place for place, group in enumerate(from_best) if status in group)


def _broken_lines(
    report: Report, entry: dict[str, Any], directory: Path | None
) -> list[RenderableType]:
    heading = Text("\n")
    heading.append(words(entry["status"]), _colour(entry["status"]))
    heading.append(f" {entry['id']}", "bold")
    heading.append(_printable(f" {report['target']['name']}: {entry['sentence']}"))
    lines: list[RenderableType] = [heading]
    if entry["message"]:
        lines.append(Padding(Text(_printable(entry["message"])), (0, 0, 0, 2)))
    if entry["counterexample"]:
        folder = None if directory is None else directory / folder_of(report["target"]["name"])
        command = _printable(replay(entry["counterexample"], folder))
        # One line whatever its length: it is there to be copied.
        lines.append(Text(f"  {command}", "cyan", no_wrap=True, overflow="ignore"))
    return lines


def _colour(word: str) -> str:
    if word in (*FAILING, "fails"):
        return "bold red"
    if word in ("warn", "inconclusive", "marginal", "waived", "conforms_with_waivers"):
        return "yellow"
    return "green" if word in ("pass", "conforms") else "dim"


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def _plain(value: Any) -> Any:
    """Lists, dictionaries by string, numbers that JSON has, and strings for all the rest."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def _json(content: Report) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _junit(reports: Sequence[Report]) -> str:
    root = ElementTree.Element("testsuites", name="moespec")
    for report in reports:
        counts, timing = report["counts"], report["timing"]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_printable(report["target"]["name"]),
            tests=str(len(report["requirements"])),
            failures=str(sum(counts.get(status, 0) for status in FAILING)),
            errors=str(counts.get("inconclusive", 0)),
            skipped=str(sum(counts.get(status, 0) for status in (*NOT_RUN, "waived"))),
            time=f"{sum(timing['requirements'].values()):.3f}",
            timestamp=_printable(timing["started"]),
        )
        for entry in report["requirements"]:
            _junit_case(suite, entry, timing["requirements"].get(entry["id"], 0.0))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _junit_case(suite: ElementTree.Element, entry: dict[str, Any], seconds: float) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"{suite.get('name')}.{entry['concept']}",
        name=entry["id"],
        time=f"{seconds:.3f}",
    )
    properties = ElementTree.SubElement(case, "properties")
    for name in ("level", "operation", "status"):
        ElementTree.SubElement(properties, "property", name=name, value=entry[name])
    status, message = entry["status"], _printable(entry["message"])
    if status in FAILING:
        told = ElementTree.SubElement(case, "failure", type=status, message=message)
        lines = [entry["sentence"], entry["message"], entry["replay"] or ""]
        told.text = _printable("\n".join(line for line in lines if line))
    elif status == "inconclusive":
        # Never green: a reader who sees only this file must not take it for a pass.
        ElementTree.SubElement(case, "error", type=status, message=message)
    elif status in (*NOT_RUN, "waived"):
        text = f"{words(status)}: {message}"
        ElementTree.SubElement(case, "skipped", message=text)
    elif message:
        ElementTree.SubElement(case, "system-out").text = f"{words(status)}: {message}"


@functools.cache
def _schema() -> dict[str, Any]:
    file = resources.files("moe_conformance") / "schemas" / "report.schema.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _mismatch(value: Any, schema: Mapping[str, Any], path: str) -> str | None:
    """The first place where `value` leaves the schema, for the keywords that ours uses.

    The jsonschema package says the same and more, and is not there when a library is tested.
    """
    if "$ref" in schema:
        schema = _schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    where = path.lstrip(".") or "report"
    wanted = schema.get("type", [])
    kinds = [wanted] if isinstance(wanted, str) else wanted
    if kinds and not any(
        isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
        for kind in kinds
    ):
        return f"{where}: expected {' or '.join(kinds)}, got {type(value).__name__}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: expected one of {', '.join(schema['enum'])}, got {value!r}"
    if "minimum" in schema and value < schema["minimum"]:
        return f"{where}: expected at least {schema['minimum']}, got {value}"
    if isinstance(value, list):
        parts = [(f"{path}[{i}]", each, schema.get("items", {})) for i, each in enumerate(value)]
    elif isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{where}: expected '{missing[0]}', which is missing"
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        parts = [(f"{path}.{name}", each, known.get(name, other)) for name, each in value.items()]
    else:
        return None
    found = (_mismatch(each, its_schema, its_path) for its_path, each, its_schema in parts)
    return next((wrong for wrong in found if wrong is not None), None)
