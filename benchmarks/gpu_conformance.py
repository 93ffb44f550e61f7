"""The conformance suite on a device within a limit of time, an operation per process.

Compiling kernels takes most of the time on a GPU and one core each; so the operations run side by
side, and what is over time costs its own operation alone. The reports stay under moespec-report/.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_conformance.report import read_report, reports_in
from moe_optimized.targets import Optimized, OptimizedDecode, OptimizedFloat8, OptimizedTriton

REPORTS = Path(__file__).parents[1] / "moespec-report" / "gpu"
# By class and not by name: names need an installed package.
KINDS = (Optimized, OptimizedTriton, OptimizedDecode, OptimizedFloat8)
TARGETS = {each.name: each for each in KINDS}
BROKEN = ("fail", "crash", "timeout", "inconclusive", "warn")


def conformance(
    device: str,
    seconds: float,
    profile: str = "smoke",
    only: Sequence[str] | None = None,
    reports: Path = REPORTS,
) -> list[dict[str, Any]]:
    """Check each target, one operation per process.

    Args:
        device: its type.
        seconds: for everything.
        profile: of the suite.
        only: operations; None takes all that a target has.
        reports: folder of the reports.

    Returns:
        For each target and operation the verdict, the counts and what is broken, or why there is
        no verdict.
    """
    until = time.time() + seconds
    jobs = [
        (name, operation)
        for name, target in TARGETS.items()
        for operation in target.operations()
        if only is None or operation in only
    ]
    # Two processes each, and the suite's own work beside.
    with ThreadPoolExecutor(max(1, min(10, (os.cpu_count() or 1) // 2))) as pool:
        return list(pool.map(lambda job: _checked(*job, device, profile, until, reports), jobs))


def _checked(
    name: str, operation: str, device: str, profile: str, until: float, reports: Path
) -> dict[str, Any]:
    row: dict[str, Any] = {"target": name, "operation": operation}
    folder, start = reports / f"{name}-{operation}", time.time()
    if start >= until:
        return {**row, "verdict": "not reached"}
    target = f"moe_optimized.targets:{TARGETS[name].__name__}"
    command = [sys.executable, "-m", "moe_conformance", "check", target, "--device", device,
               "--operation", operation, "--profile", profile, "--seed", "0",
               "--report", str(folder)]  # fmt: skip
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = run.communicate(timeout=until - start)
    except subprocess.TimeoutExpired:
        # Its worker as well.
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        return {**row, "verdict": f"cut after {time.time() - start:.0f} s"}
    row["seconds"] = round(time.time() - start, 1)
    index = folder / "index.json"
    if not index.exists() or index.stat().st_mtime < start:
        return {**row, "verdict": f"ended with {run.returncode}", "said": said[-2000:]}
    [report] = reports_in(read_report(index))
    row |= {"verdict": report["verdict"], "counts": report["counts"]}
    row["broken"] = [
        {"id": each["id"], "status": each["status"], "message": each["message"]}
        for each in report["requirements"]
        if each["status"] in BROKEN
    ]
    return row
