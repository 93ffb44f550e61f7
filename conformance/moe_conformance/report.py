"""Reports: what a run found out, as JSON, as pages that one can read, and in the terminal.

`report.json` is the report; everything else is made from it and holds nothing that it lacks. All
that comes from a target (its name, its messages, what it raised) is text that nobody has vetted:
the pages escape it, and what goes to a terminal or into XML has its control characters replaced.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
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

import jinja2
import torch
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_conformance.codec import digest, walk
from moe_conformance.inputs import experts, routing
from moe_conformance.judge import FAIL_Z, PASS_Z
from moe_conformance.registry import requirements
from moe_conformance.runner import STATUSES, Failure, Result, verdict
from moe_conformance.target import DTYPES, OPERATIONS, Capabilities

SCHEMA_VERSION = 1

Report = dict[str, Any]

FAILING = ("fail", "crash", "timeout")
NOT_RUN = ("unsupported", "not_provided")

PREVIEW = 8
"""Rows and columns of a tensor that a report shows at most."""

PREVIEWED_INPUTS = 12
"""Inputs of a failing case that a report shows at most; the saved case has them all."""

AXES: dict[str, Mapping[str, Sequence[Any]]] = {
    "route": routing.UNIVERSE,
    "experts": experts.UNIVERSE,
    "align": dict.fromkeys(("drop_invalid", "expert_map", "invalid_ids"), (False, True)),
}
"""The values whose declaration counts towards breadth, by operation and field."""

DECLARED_IN = {"route": "routing", "experts": "experts", "align": "align"}
"""The field of `Capabilities` in which an operation's values are declared."""

VERDICTS = ("fails", "inconclusive", "conforms_with_waivers", "conforms")
"""From the worst to the best."""

SIGNS = {
    "pass": "✓",
    "fail": "✗",
    "crash": "!",
    "timeout": "…",
    "marginal": "≈",
    "inconclusive": "?",
    "warn": "△",
    "observed": "•",
    "unsupported": "–",
    "not_provided": "○",
    "waived": "~",
    "conforms": "✓",
    "conforms_with_waivers": "~",
    "fails": "✗",
}
"""A sign beside each word, so that nothing hangs on a colour."""

PROJECTS = {
    "aiter": "ROCm/aiter",
    "automodel": "NVIDIA-NeMo/Automodel",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "deepep": "deepseek-ai/DeepEP",
    "deepseek-moe": "deepseek-ai/DeepSeek-MoE",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "deepspeed": "deepspeedai/DeepSpeed",
    "fast-llm": "ServiceNow/Fast-LLM",
    "fastmoe": "laekov/fastmoe",
    "flashinfer": "flashinfer-ai/flashinfer",
    "hyper-parallel": "mindspore-ai/hyper-parallel",
    "intel-xpu-backend-for-triton": "intel/intel-xpu-backend-for-triton",
    "ktransformers": "kvcache-ai/ktransformers",
    "llama.cpp": "ggml-org/llama.cpp",
    "llm-compressor": "vllm-project/llm-compressor",
    "lmdeploy": "InternLM/lmdeploy",
    "megablocks": "databricks/megablocks",
    "megatron": "NVIDIA/Megatron-LM",
    "megatron-bridge": "NVIDIA-NeMo/Megatron-Bridge",
    "megatron-lm": "NVIDIA/Megatron-LM",
    "minimind": "jingyaogong/minimind",
    "mlx-lm": "ml-explore/mlx-lm",
    "mlx-swift-lm": "ml-explore/mlx-swift-lm",
    "moe-infinity": "EfficientMoE/MoE-Infinity",
    "ms-swift": "modelscope/ms-swift",
    "nntrainer": "nnstreamer/nntrainer",
    "onnxruntime": "microsoft/onnxruntime",
    "paddleformers": "PaddlePaddle/PaddleFormers",
    "prime-rl": "PrimeIntellect-ai/prime-rl",
    "pytorch": "pytorch/pytorch",
    "sgl-jax": "sgl-project/sglang-jax",
    "sgl-kernel-npu": "sgl-project/sgl-kernel-npu",
    "sglang": "sgl-project/sglang",
    "slime": "THUDM/slime",
    "sonic-moe": "Dao-AILab/sonic-moe",
    "te": "NVIDIA/TransformerEngine",
    "tensorrt-llm": "NVIDIA/TensorRT-LLM",
    "torchtitan": "pytorch/torchtitan",
    "tpu-inference": "vllm-project/tpu-inference",
    "transformers": "huggingface/transformers",
    "triton": "triton-lang/triton",
    "trl": "huggingface/trl",
    "unsloth": "unslothai/unsloth",
    "verl": "verl-project/verl",
    "verl-ascend-recipe": "verl-project/verl-ascend-recipe",
    "vllm": "vllm-project/vllm",
    "vllm-ascend": "vllm-project/vllm-ascend",
    "vllm-metax": "MetaX-MACA/vLLM-metax",
    "xtuner": "InternLM/xtuner",
}
"""Where a project's threads are, by the name that sources use."""

_LINKED = re.compile(
    r"(?P<url>https://[^\s<>\"')]+)"
    r"|arXiv[ :](?P<arxiv>\d{4}\.\d{4,5})"
    r"|(?P<repository>[\w.-]+/[\w.-]+)#(?P<thread>\d+)"
    r"|(?P<project>[A-Za-z][\w.-]*) #(?P<number>\d+)"
    r"|(?<=[,/] )#(?P<next>\d+)"
)
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
    `route`, `experts` and `align` have the fields and values of `AXES`; every other operation has
    one cell per dtype. The dtypes are those of x and the logits (`DTYPES`), but for `align` and
    `align_batched`, which only see ids, those of ids; `assign_experts` takes plain numbers and has
    a single cell.

    Declared are the cells of provided operations with declared dtypes and allowed values. A field
    that is not named allows every value. With several alternatives a value is allowed where any of
    them allows it. A value that only the target declares counts as one of ours, up to as many as we
    have. Limits on sizes, multiples, world sizes and formats have no cells.

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


def case_name(failure: Failure) -> str:
    """The folder under `cases/` that a counterexample is saved in: `<id>-<hash of its calls>`."""
    sessions = [session for session, _ in failure.sessions]
    return f"{failure.requirement.id}-{digest(sessions)}"


def folder_of(name: str) -> str:
    """The folder of a target under the report's: its name, a slash being a folder of its own.

    >>> folder_of("transformers/mixtral-grouped_mm")
    'transformers/mixtral-grouped_mm'
    >>> folder_of("../my moe.py:Class")
    'my-moe.py-Class'
    """
    parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in name.split("/")]
    return "/".join(part for part in parts if part) or "target"


def write_target(directory: Path, report: Report) -> None:
    """Write `report.json` and `report.html` of one target.

    Args:
        directory: the target's own folder, `folder_of(name)` under the run's; made if missing. The
            replay commands on the page name it as it is given here.
        report: from `target_report`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "report.json", _json(report))
    _write(directory / "report.html", _page("report.html.j2", report=report, directory=directory))


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
    page = _page("index.html.j2", index=index, reports=list(zip(folders, reports, strict=True)))
    _write(directory / "index.html", page)
    _write(directory / "junit.xml", _junit(reports))


def write_matrix(reports: Sequence[Report], out: Path) -> Path:
    """Write `matrix.html`: requirements by targets.

    Args:
        reports: one per column.
        out: the folder to write it in; made if missing.

    Returns:
        The page's path.

    Raises:
        ValueError: there are no reports.
    """
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    known = {each["id"]: each for report in reports for each in report["requirements"]}
    order = {each.id: place for place, each in enumerate(requirements())}
    columns = [{each["id"]: each for each in report["requirements"]} for report in reports]
    rows = [
        {
            "requirement": known[id],
            "concept": known[id]["concept"],
            "cells": [column.get(id) for column in columns],
            "differs": len({column.get(id, {}).get("status") for column in columns}) > 1,
        }
        for id in sorted(known, key=lambda id: (order.get(id, len(order)), id))
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "matrix.html"
    _write(path, _page("matrix.html.j2", reports=reports, rows=rows))
    return path


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
    broken: list[Text] = []
    for report in reports:
        target, spread = report["target"], report["breadth"]
        shown.add_row(
            Text(_printable(f"{target['name']} {target['version']}").strip(), "bold"),
            Text(_words(report["verdict"]), _colour(report["verdict"])),
            "{provided}/{all}".format(**spread["operations"]),
            "{declared}/{all}".format(**spread["cells"]),
            f"{spread['requirements_run']}/{spread['requirements_in_all']}",
            Text(", ").join(
                Text(f"{count} {_words(status)}", _colour(status))
                for status, count in report["counts"].items()
            ),
        )
        broken += [
            _broken_line(report, each, directory)
            for each in report["requirements"]
            if each["status"] in (*FAILING, "warn", "inconclusive")
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
        f"{name}: {_words(report['verdict'])}{f' ({waived} waived)' if waived else ''}; breadth: "
        f"{spread['operations']['provided']}/{spread['operations']['all']} operations, "
        f"{spread['cells']['declared']}/{spread['cells']['all']} cells, "
        f"{spread['requirements_run']}/{spread['requirements_in_all']} requirements run"
    )
    if directory is not None:
        line += f"; report: {directory / folder_of(name) / 'report.html'}"
    return _printable(line)


def source_links(source: str) -> list[tuple[str, str | None]]:
    """A source cut into pieces of text, each with its address where it is a thread or a paper.

    >>> source_links("vLLM #12002, found late")
    [('vLLM #12002', 'https://github.com/vllm-project/vllm/issues/12002'), (', found late', None)]
    """
    pieces: list[tuple[str, str | None]] = []
    end, repository = 0, None
    for match in _LINKED.finditer(source):
        found = match.groupdict()
        address = None
        if found["url"]:
            address = found["url"].rstrip(".,;")
        elif found["arxiv"]:
            address = f"https://arxiv.org/abs/{found['arxiv']}"
        elif found["repository"]:
            repository = found["repository"]
        elif found["project"]:
            repository = PROJECTS.get(found["project"].lower())
        number = found["thread"] or found["number"] or found["next"]
        if number and repository:
            address = f"https://github.com/{repository}/issues/{number}"
        if address is None:
            continue
        stop = match.start() + len(address) if found["url"] else match.end()
        if match.start() > end:
            pieces.append((source[end : match.start()], None))
        pieces.append((source[match.start() : stop], address))
        end = stop
    if end < len(source):
        pieces.append((source[end:], None))
    return pieces


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
        "drawn": dict(sorted(result.drawn.items())),
        "counterexample": counterexample,
        "replay": None if counterexample is None else _replay(counterexample),
        "failure": None if failure is None else _failure(failure),
    }


def _replay(counterexample: str, directory: Path | None = None) -> str:
    path = counterexample if directory is None else (directory / counterexample).as_posix()
    return f"moespec replay {shlex.quote(path)}"


def _failure(failure: Failure) -> dict[str, Any]:
    violation = failure.violation
    expected, actual = violation.expected, violation.actual
    around = _worst_place(expected, actual)
    answers = failure.sessions[-1][1] if failure.sessions else []
    error = answers[-1].get("error") if answers else None
    return {
        "kind": violation.kind,
        "flips": failure.flips,
        "plan": failure.plan,
        "calls": [c["operation"] for session, _ in failure.sessions for c in session["calls"]],
        "inputs": _inputs(failure.inputs),
        "expected": None if expected is None else _preview("expected", expected, around),
        "actual": None if actual is None else _preview("actual", actual, around),
        "traceback": None if error is None else error["traceback"],
    }


def _inputs(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for name, value in inputs.items():
        tensors = list(walk(value, name))
        if not tensors or isinstance(value, torch.Tensor):
            shown.append(_preview(name, value))
            continue
        if dataclasses.is_dataclass(value) and not _brief(value).endswith("()"):
            shown.append(_preview(name, value))
        shown += [_preview(path, tensor) for path, tensor in tensors]
    return shown[:PREVIEWED_INPUTS]


def _preview(name: str, value: Any, around: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """A value as text, or the window of a tensor that holds the place `around`."""
    if not isinstance(value, torch.Tensor):
        return {"name": name, "text": _brief(value)}
    folded = _fold(value)
    starts = [
        max(0, min(place - PREVIEW // 2 + 1, size - PREVIEW))
        for place, size in zip(around, folded.shape, strict=True)
    ]
    rows, columns = (
        range(start, min(start + PREVIEW, size))
        for start, size in zip(starts, folded.shape, strict=True)
    )
    window = folded[rows.start : rows.stop, columns.start : columns.stop]
    return {
        "name": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "rows": [_lead(row, tuple(value.shape[:-1])) for row in rows],
        "columns": list(columns),
        "values": [
            [_number(each) for each in row]
            for row in (window.double() if window.is_floating_point() else window).tolist()
        ],
    }


def _brief(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # What stands at its default, and what is shown as a tensor anyway, would only be in the way.
        fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        said = ", ".join(
            f"{name}={_brief(given)}"
            for name, (given, default) in fields.items()
            if not any(True for _ in walk(given)) and given is not None and given != default
        )
        return f"{type(value).__name__}({said})"
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:500]}…"


def _fold(tensor: torch.Tensor) -> torch.Tensor:
    """In two dimensions: all but the last one run down the rows."""
    tensor = tensor.detach().cpu()
    last = tensor.shape[-1] if tensor.ndim else 1
    return tensor.reshape(math.prod(tensor.shape[:-1]), last)


def _lead(row: int, lead: tuple[int, ...]) -> list[int]:
    index: list[int] = []
    for size in reversed(lead):
        row, place = divmod(row, size)
        index.insert(0, place)
    return index


def _worst_place(expected: Any, actual: Any) -> tuple[int, int]:
    """Row and column of the greatest difference, in folded form."""
    both = isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor)
    if not both or expected.shape != actual.shape or expected.numel() == 0:
        return 0, 0
    wanted, came = _fold(expected).double(), _fold(actual).double()
    same = (wanted == came) | (wanted.isnan() & came.isnan())
    error = torch.where(same, 0.0, (wanted - came).abs().nan_to_num(torch.inf))
    row, column = divmod(int(error.argmax()), wanted.shape[1])
    return row, column


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


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


def _broken_line(report: Report, entry: dict[str, Any], directory: Path | None) -> Text:
    line = Text("\n")
    line.append(_words(entry["status"]), _colour(entry["status"]))
    line.append(f" {entry['id']}", "bold")
    line.append(_printable(f" {report['target']['name']}: {entry['sentence']}"))
    if entry["message"]:
        line.append(_printable(f"\n  {entry['message']}"))
    if entry["counterexample"]:
        folder = None if directory is None else directory / folder_of(report["target"]["name"])
        line.append(_printable(f"\n  {_replay(entry['counterexample'], folder)}"), "cyan")
    return line


def _colour(word: str) -> str:
    if word in (*FAILING, "fails"):
        return "bold red"
    if word in ("warn", "inconclusive", "marginal", "waived", "conforms_with_waivers"):
        return "yellow"
    return "green" if word in ("pass", "conforms") else "dim"


def _words(name: str) -> str:
    return name.replace("_", " ")


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
        text = f"{_words(status)}: {message}"
        ElementTree.SubElement(case, "skipped", message=text)
    elif message:
        ElementTree.SubElement(case, "system-out").text = f"{_words(status)}: {message}"


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


def _page(template: str, **content: Any) -> str:
    text: str = _environment().get_template(template).render(**content)
    return text


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_conformance"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    folder = resources.files("moe_conformance") / "templates"
    script = (folder / "script.js").read_text(encoding="utf-8")
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup((folder / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{hashed}",
        "signs": SIGNS,
        "statuses": STATUSES,
        "failing": FAILING,
        "not_run": NOT_RUN,
        "pass_z": PASS_Z,
        "fail_z": FAIL_Z,
        "comparison": _comparison,
        "grid": _grid,
        "replay": _replay,
    }
    environment.filters |= {
        "words": _words,
        "links": source_links,
        "brief_value": _brief_value,
        "by_concept": _by_concept,
    }
    return environment


def _by_concept(entries: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """In the order in which the concepts come up."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["concept"], []).append(entry)
    return list(groups.items())


def _brief_value(value: Any) -> str:
    """A value of the declaration or of a plan as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_brief_value(item)}" for name, item in value.items()) or "any"
    if isinstance(value, list):
        return ", ".join(map(_brief_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _grid(preview: dict[str, Any], shades: list[list[int]] | None = None) -> dict[str, Any]:
    """A preview as a table: column numbers, and rows of a label and cells."""
    seen = [len(preview["rows"]), len(preview["columns"])]
    shape = preview["shape"]
    folded = [math.prod(shape[:-1]), shape[-1] if shape else 1]
    return {
        "title": preview["name"],
        "form": f"{preview['dtype']} {shape}",
        "part": seen != folded,
        "columns": preview["columns"],
        "rows": [
            {
                "label": ", ".join(map(str, label)),
                "cells": [
                    {
                        "text": _short(value),
                        "full": str(value),
                        "shade": shades[i][j] if shades else 0,
                    }
                    for j, value in enumerate(values)
                ],
            }
            for i, (label, values) in enumerate(
                zip(preview["rows"], preview["values"], strict=True)
            )
        ],
    }


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value).removesuffix(".0")


def _comparison(failure: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected and what came as tables, with a third of their difference for floats.

    Cells are shaded from 0 (as expected) to 4 (near the greatest difference).
    """
    expected, actual = failure["expected"], failure["actual"]
    tensors = [each for each in (expected, actual) if each is not None and "values" in each]
    alike = len(tensors) == 2 and expected["shape"] == actual["shape"]
    if not alike:
        return [_grid(each) for each in tensors]
    pairs = [
        list(zip(wanted, came, strict=True))
        for wanted, came in zip(expected["values"], actual["values"], strict=True)
    ]
    errors = [[_error(wanted, came) for wanted, came in row] for row in pairs]
    finite = [e for row in errors for e in row if math.isfinite(e)]
    floats = "float" in expected["dtype"]
    most = max(finite, default=0.0)
    shades = [[_shade(error, most, floats) for error in row] for row in errors]
    grids = [_grid(expected), _grid(actual, shades)]
    if floats:
        difference = [
            [
                c - w if math.isfinite(e) and e else ("0" if not e else "–")
                for (w, c), e in zip(*both)
            ]
            for both in zip(pairs, errors, strict=True)
        ]
        shown = {**actual, "name": "difference", "dtype": "actual - expected", "values": difference}
        grids.append({**_grid(shown, shades), "form": "actual - expected"})
    return grids


def _error(expected: Any, actual: Any) -> float:
    if isinstance(expected, str) or isinstance(actual, str):
        return 0.0 if expected == actual else math.inf
    return float(abs(actual - expected))


def _shade(error: float, most: float, graded: bool) -> int:
    if error == 0 or (graded and error <= most / 1000):
        return 0
    if not graded or not math.isfinite(error) or error > most / 2:
        return 4
    return 3 if error > most / 10 else 2 if error > most / 100 else 1
