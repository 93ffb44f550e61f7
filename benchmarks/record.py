"""What every record says of itself, how it is written, and how a long run goes on after a break."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

AROUND = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""The environment of runs that hold others to the specification. On a processor with AMX torch
2.13's bfloat16 product lets a row that is not finite reach the row before it (oneDNN #5717), which
is neither a library's nor a variant's fault: see docs/guide/reading-a-failure.md."""


def commit() -> str:
    """The commit of the checkout, with a plus where files have changed since."""
    run = {"capture_output": True, "text": True, "check": False, "cwd": Path(__file__).parent}
    head = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
    code = ["--", "../reference", "../optimized", "../conformance"]
    changed = subprocess.run(["git", "status", "--porcelain", "-uno", *code], **run).stdout.strip()
    return f"{head}+" if changed else head


def about() -> Row:
    """Command, day, commit and machine."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def write(name: str, record: Row) -> Path:
    """Write benchmarks/results/<name>.json: beside first, so that there is never half a record."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)
    return path


def resumed(
    name: str, keys: Sequence[str], measure: Callable[[str], Row], jobs: int = 1
) -> list[Row]:
    """A row for each key. Rows of an earlier run that was cut are taken over.

    With several jobs, `measure` runs in as many processes. Rows are kept line by line in
    benchmarks/results/<name>.partial until all are there, under the commit and the arguments: rows
    of other code or another question are not taken over.
    """
    partial = RESULTS / f"{name}.partial"
    RESULTS.mkdir(exist_ok=True)
    question = {"commit": commit(), "arguments": sys.argv[1:]}
    found: dict[str, Row] = {}
    lines = partial.read_text().splitlines() if partial.exists() else []
    if lines and json.loads(lines[0]) == question:
        for line in lines[1:]:
            if line.endswith("}"):
                row = json.loads(line)
                found[row.pop("key")] = row
    else:
        partial.write_text(json.dumps(question) + "\n")
    left = [key for key in keys if key not in found]
    with partial.open("a") as kept, ProcessPoolExecutor(jobs) as pool:
        answers = pool.map(measure, left) if jobs > 1 else map(measure, left)
        for key, row in zip(left, answers, strict=True):
            found[key] = row
            kept.write(json.dumps({"key": key, **row}) + "\n")
            kept.flush()
            print(key, row, file=sys.stderr, flush=True)
    partial.unlink()
    return [found[key] for key in keys]
