"""`moespec check`: every target in a process of its own, one report each, one index over all."""

from __future__ import annotations

import datetime
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_conformance import worker
from moe_conformance.cases import folder_of, save_case
from moe_conformance.executor import (
    TargetLost,
    WorkerExecutor,
    capabilities_of,
    forkserver,
    in_worker,
)
from moe_conformance.inputs.given import Scope
from moe_conformance.registry import Requirement, requirements
from moe_conformance.report import target_report, write_index, write_target
from moe_conformance.runner import Result, effort_for, run_target
from moe_conformance.target import OPERATIONS, suite_version
from moe_conformance.waivers import (
    MalformedWaivers,
    Waiver,
    WaiverError,
    apply_waivers,
    check_waived,
    read_waivers,
)

SPEC = "2026.11"
"""The edition of the specification: the year and month of its last change of meaning."""

EXIT_CODES = {"conforms": 0, "conforms_with_waivers": 0, "fails": 1, "inconclusive": 11}
WORST_FIRST = (10, 1, 12, 11, 0)


class UsageError(Exception):
    """What was asked for makes no sense; the message is the one sentence that says why."""


@dataclass(frozen=True)
class Options:
    """What `moespec check` was asked for.

    Attributes:
        targets: names as given.
        profile: an effort by name.
        operations: only these; empty takes all.
        requirement: only this one.
        device: where to run; None takes a GPU where there is one and the target declares it.
        dtype: only this one.
        seed: of the whole run.
        examples: cases per requirement, in the place of the profile's.
        report: where the reports go.
        waivers: a TOML file.
        timeout: seconds for one case.
    """

    targets: tuple[str, ...]
    profile: str = "cpu"
    operations: tuple[str, ...] = ()
    requirement: str | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    examples: int | None = None
    report: Path = Path("moespec-report")
    waivers: Path | None = None
    timeout: float = 60.0

    def selected(self) -> list[Requirement]:
        """The requirements that were asked for.

        Raises:
            UsageError: there is none.
        """
        chosen = requirements()
        if self.requirement is not None:
            known = [each.id for each in chosen]
            if self.requirement not in known:
                raise UsageError(
                    f"--requirement: expected one of {', '.join(known)}, got '{self.requirement}'"
                )
            chosen = [each for each in chosen if each.id == self.requirement]
        for name in self.operations:
            if name not in OPERATIONS:
                raise UsageError(
                    f"--operation: expected one of {', '.join(OPERATIONS)}, got '{name}'"
                )
        if self.operations:
            chosen = [e for e in chosen if e.operation in (*self.operations, "any")]
        if not chosen:
            raise UsageError("--operation: no requirement speaks about what was asked for")
        return chosen

    def command(self, target: str) -> str:
        """The command that repeats the run on one target."""
        parts = ["moespec check", target, f"--seed {self.seed}", f"--profile {self.profile}"]
        parts += [f"--operation {name}" for name in self.operations]
        for name in ("requirement", "device", "dtype", "examples", "waivers"):
            if getattr(self, name) is not None:
                parts.append(f"--{name} {getattr(self, name)}")
        return " ".join(parts)


@dataclass(frozen=True)
class Progress:
    """News from a judging process: a requirement was tried, or the target is being loaded."""

    target: str
    done: int
    total: int
    id: str
    status: str


@dataclass(frozen=True)
class Outcome:
    """One target's end: a report, or why there is none."""

    target: str
    report: dict[str, Any] | None
    exit_code: int
    message: str = ""


Notify = Callable[[Progress], None]
_queue: Any = None


def expand(names: Sequence[str]) -> tuple[list[str], list[Outcome]]:
    """All variants behind the names, and what could not be loaded.

    Raises:
        UsageError: there is no target of that name.
    """
    found: list[str] = []
    lost: list[Outcome] = []
    for name in names:
        try:
            found += [v for v in in_worker(worker.variants, name) if v not in found]
        except worker.UnknownTarget as error:
            raise UsageError(error) from None
        except worker.LoadError as error:
            lost.append(Outcome(name, None, 10, str(error)))
    return found, lost


def check(options: Options, notify: Notify) -> list[Outcome]:
    """Run the suite and write every report.

    Raises:
        UsageError: see `Options.selected` and `expand`; or the waivers cannot be read.
    """
    options.selected()
    if options.waivers is not None:
        try:
            read_waivers(options.waivers)
        except MalformedWaivers as error:
            raise UsageError(error) from None
        except WaiverError:
            pass  # said for each target, whose report is written all the same
    names, outcomes = expand(options.targets)
    folders = {folder_of(name): name for name in reversed(names)}
    for name in names:
        other = folders[folder_of(name)]
        if other != name:
            raise UsageError(
                f"TARGET: expected names that differ in file or class, got '{other}' and '{name}'; "
                f"give each a --report of its own"
            )
    processes = min(len(names), os.cpu_count() or 1)
    if processes <= 1:
        outcomes += [check_target(name, options, notify) for name in names]
    else:
        outcomes += _in_parallel(names, options, notify, processes)
    order = [*names, *(outcome.target for outcome in outcomes)]
    outcomes.sort(key=lambda outcome: order.index(outcome.target))
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    if reports:
        write_index(options.report, reports)
    return outcomes


def _in_parallel(
    names: list[str], options: Options, notify: Notify, processes: int
) -> list[Outcome]:
    context = forkserver()
    news = context.SimpleQueue()
    outcomes = []
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_judge, initargs=(news,)
    ) as pool:
        waiting = {pool.submit(_check_in_process, name, options) for name in names}
        while waiting:
            while not news.empty():
                notify(news.get())
            for future in [f for f in waiting if f.done()]:
                waiting.remove(future)
                outcomes.append(future.result())
            time.sleep(0.05)
    return outcomes


def _judge(news: Any) -> None:
    global _queue
    _queue = news


def _check_in_process(name: str, options: Options) -> Outcome:
    return check_target(name, options, _queue.put)


def check_target(name: str, options: Options, notify: Notify) -> Outcome:
    """Run the suite on one target and write its report."""
    # The oracle's tensors are small; a second thread costs more than it gains, and the target may
    # want the other cores.
    torch.set_num_threads(1)
    began = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    chosen = options.selected()
    notify(Progress(name, 0, len(chosen), "", "loading"))
    try:
        executor = WorkerExecutor(name, options.timeout)
    except (worker.LoadError, TargetLost) as error:
        return Outcome(name, None, 10, str(error))
    loaded = time.perf_counter()
    waivers: list[Waiver] = []
    stale = ""
    try:
        scope = scope_of(executor, options)
        if options.waivers is not None:
            try:
                waivers = read_waivers(options.waivers)
                check_waived(waivers, name, [each.id for each in chosen], executor)
            except WaiverError as error:
                waivers, stale = [], str(error)
        done = 0

        def tell(result: Result) -> None:
            nonlocal done
            done += 1
            notify(Progress(name, done, len(chosen), result.requirement.id, result.status))

        effort = effort_for(options.profile, options.examples, scope.interpreted)
        results = run_target(chosen, scope, executor, effort, options.seed, tell)
        machine = machine_of(executor, scope.device)
    except UsageError as error:
        return Outcome(name, None, 2, str(error))
    finally:
        executor.close()
    directory = options.report / folder_of(name)
    about = {"machine": machine, "suite": suite(), "seed": options.seed}
    for result in results:
        if result.failure is not None:
            save_case(directory / "cases", result.failure, scope, name, about)
    apply_waivers(waivers, name, results)
    report = target_report(
        target={
            "name": name,
            "version": executor.description["version"],
            "capabilities": executor.description["capabilities"],
            "operations": executor.description["operations"],
        },
        machine=machine,
        seed=options.seed,
        suite=suite(),
        effort={"profile": options.profile, "examples": effort.examples, "minimum": effort.minimum},
        results=results,
        command=options.command(name),
        started=started,
        seconds={"loading": loaded - began, "cases": sum(r.seconds for r in results)},
    )
    write_target(directory, report)
    return Outcome(name, report, 12 if stale else EXIT_CODES[report["verdict"]], stale)


def scope_of(executor: WorkerExecutor, options: Options) -> Scope:
    """What may be drawn for this target and these options.

    Raises:
        UsageError: a device or dtype that the target does not declare.
    """
    capabilities = capabilities_of(executor)
    present = [name for name in executor.description["devices"] if name in capabilities.devices]
    if options.device is not None and options.device not in present:
        raise UsageError(
            f"--device: expected one of {', '.join(present) or 'none'} for {executor.name}, "
            f"got '{options.device}'"
        )
    if options.dtype is not None and options.dtype not in capabilities.dtypes:
        raise UsageError(
            f"--dtype: expected one of {', '.join(capabilities.dtypes)} for {executor.name}, "
            f"got '{options.dtype}'"
        )
    provided = executor.description["operations"]
    return Scope(
        capabilities,
        tuple(name for name in provided if not options.operations or name in options.operations),
        options.device or next((d for d in ("cuda", "cpu", "mps") if d in present), "cpu"),
        capabilities.dtypes if options.dtype is None else (options.dtype,),
        capabilities.interpreted,
    )


def machine_of(executor: WorkerExecutor, device: str) -> dict[str, Any]:
    """What the run ran on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": executor.description["triton"],
        "device": executor.description["devices"].get(device) or platform.machine(),
        "device_type": device,
        "cpus": os.cpu_count(),
    }


def suite() -> dict[str, Any]:
    """Which suite this is: version, commit where there is a checkout, edition."""
    return {"version": suite_version(), "commit": _commit(), "spec": SPEC}


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The worst of several targets' codes; usage errors before all."""
    codes = {outcome.exit_code for outcome in outcomes}
    if 2 in codes:
        return 2
    return next((code for code in WORST_FIRST if code in codes), 11)
