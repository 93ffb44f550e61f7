"""`moespec check`: every target in a process of its own, one report each, one index over all."""

from __future__ import annotations

import datetime
import io
import os
import platform
import secrets
import subprocess
import time
from collections import Counter
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
    forkserver,
    in_worker,
)
from moe_conformance.inputs.given import Scope
from moe_conformance.registry import Requirement, requirements
from moe_conformance.report import target_report, write_index, write_target
from moe_conformance.runner import Result, effort_for, run_target
from moe_conformance.target import ON_RANKS, OPERATIONS, Capabilities, suite_version
from moe_conformance.waivers import (
    MalformedWaivers,
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
        requirements: only these, by id; empty takes all.
        device: where to run; None takes a GPU where there is one and the target declares it.
        dtype: only this one.
        seed: of the whole run.
        examples: cases per requirement, in the place of the profile's.
        report: where the reports go.
        waivers: a TOML file.
        timeout: seconds for one case.
        world_sizes: numbers of ranks for `expert_parallel`; None takes 2 and 4, as far as the
            target declares them.
    """

    targets: tuple[str, ...]
    profile: str = "cpu"
    operations: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    examples: int | None = None
    report: Path = Path("moespec-report")
    waivers: Path | None = None
    timeout: float = 60.0
    world_sizes: tuple[int, ...] | None = None

    def selected(self) -> list[Requirement]:
        """The requirements that were asked for.

        Raises:
            UsageError: there is none.
        """
        chosen = requirements()
        known = [each.id for each in chosen]
        for id in self.requirements:
            if id not in known:
                raise UsageError(
                    f"--requirement: expected an id that `moespec requirements` lists, such as "
                    f"{known[0]}, got '{id}'"
                )
        if self.requirements:
            chosen = [each for each in chosen if each.id in self.requirements]
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
        parts += [f"--requirement {id}" for id in self.requirements]
        for name in ("device", "dtype", "examples", "waivers"):
            if getattr(self, name) is not None:
                parts.append(f"--{name} {getattr(self, name)}")
        if self.world_sizes is not None:
            parts.append(f"--world-size {','.join(map(str, self.world_sizes))}")
        return " ".join(parts)


@dataclass(frozen=True)
class Progress:
    """News of one target: a requirement was tried, or it is being loaded."""

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


@dataclass(frozen=True)
class Lane:
    """A part of a target's requirements, judged in a process of its own on a worker of its own.

    Attributes:
        target: its name.
        number: 0 for the first, which also replays what is waived.
        of: how many lanes the target has; each takes every so-manyth requirement.
    """

    target: str
    number: int
    of: int


@dataclass
class Share:
    """What came out of one lane.

    Attributes:
        results: of the lane's requirements.
        description: of the target, from its worker.
        loading: seconds until the target was there.
        cases: seconds of everything after.
        lost: why there are no results, with the exit code that it means.
        stale: what is wrong with a waiver, or empty.
    """

    results: list[Result] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)
    loading: float = 0.0
    cases: float = 0.0
    lost: tuple[int, str] | None = None
    stale: str = ""


Notify = Callable[[Progress], None]
Tell = Callable[[str, str, str], None]
"""Takes a target's name, a requirement's id and its status; both empty while it is loaded."""

WORLD_SIZES = (2, 4)
"""Ranks that `expert_parallel` is tried on where nobody says otherwise."""

LANE = 600
"""Cases that are worth a lane of their own: its processes import torch anew, which takes three to
five seconds, and a case takes some ten milliseconds."""

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
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    total = len(options.selected())
    done: Counter[str] = Counter()

    def tell(target: str, id: str, status: str) -> None:
        done[target] += bool(id)
        notify(Progress(target, done[target], total, id, status))

    examples = effort_for(options.profile, options.examples, interpreted=False).examples
    lanes = lanes_of(names, total * examples, os.cpu_count() or 1)
    shares = _in_processes(lanes, options, tell) if len(lanes) > 1 else {}
    for name in names:
        own = [
            shares.get(lane) or run_lane(lane, options, tell)
            for lane in lanes
            if lane.target == name
        ]
        outcomes.append(_conclude(name, options, own, started))
    order = [*names, *(outcome.target for outcome in outcomes)]
    outcomes.sort(key=lambda outcome: order.index(outcome.target))
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    if reports:
        write_index(options.report, reports)
    return outcomes


def lanes_of(names: Sequence[str], cases: int, cores: int) -> list[Lane]:
    """How the work is cut: cores that have no target of their own share the requirements.

    Args:
        names: of the targets.
        cases: of each target.
        cores: of this machine.
    """
    of = max(1, min(cores // max(1, len(names)), cases // LANE))
    return [Lane(name, number, of) for name in names for number in range(of)]


def _in_processes(lanes: list[Lane], options: Options, tell: Tell) -> dict[Lane, Share]:
    context = forkserver()
    news = context.SimpleQueue()
    shares = {}
    processes = min(len(lanes), os.cpu_count() or 1)
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_judge, initargs=(news,)
    ) as pool:
        waiting = {pool.submit(_run_in_process, lane, options): lane for lane in lanes}
        while waiting:
            while not news.empty():
                tell(*news.get())
            for future in [f for f in waiting if f.done()]:
                shares[waiting.pop(future)] = torch.load(
                    io.BytesIO(future.result()), weights_only=False
                )
            time.sleep(0.05)
        while not news.empty():
            tell(*news.get())
    return shares


def _judge(news: Any) -> None:
    global _queue
    _queue = news
    worker.follow_parent()


def _run_in_process(lane: Lane, options: Options) -> bytes:
    # Bytes, since on its own the pool would send tensors through shared memory; and torch's, since
    # pickle alone knows no float8.
    file = io.BytesIO()
    torch.save(run_lane(lane, options, lambda *step: _queue.put(step)), file)
    return file.getvalue()


def run_lane(lane: Lane, options: Options, tell: Tell) -> Share:
    """Load the target and try the lane's requirements on it."""
    # The oracle's tensors are small; a second thread costs more than it gains, and the target may
    # want the other cores.
    torch.set_num_threads(1)
    share = Share()
    began = time.perf_counter()
    tell(lane.target, "", "loading")
    try:
        executor = WorkerExecutor(lane.target, options.timeout)
    except (worker.LoadError, TargetLost) as error:
        share.lost = 10, str(error)
        return share
    loaded = time.perf_counter()
    try:
        share.description = executor.description
        scope = scope_of(executor, options)
        chosen = options.selected()
        own = share_of(chosen, lane)
        if any(each.operation in ON_RANKS and each.operation in scope.operations for each in own):
            executor.prepare(scope.world_sizes, scope.device)
        if options.waivers is not None and lane.number == 0:
            try:
                waivers = read_waivers(options.waivers)
                check_waived(waivers, lane.target, [each.id for each in chosen], executor)
            except WaiverError as error:
                share.stale = str(error)
        share.results = run_target(
            own,
            scope,
            executor,
            effort_for(options.profile, options.examples, scope.interpreted),
            options.seed,
            lambda result: tell(lane.target, result.requirement.id, result.status),
        )
    except UsageError as error:
        share.lost = 2, str(error)
    finally:
        executor.close()
    meeting = executor.seconds_meeting
    share.loading = loaded - began + meeting
    share.cases = time.perf_counter() - loaded - meeting
    return share


def share_of(chosen: list[Requirement], lane: Lane) -> list[Requirement]:
    """The lane's requirements: those on several ranks to the last lane, the others dealt out.

    Each lane that had some of the former would start ranks of its own.
    """
    shares: list[list[Requirement]] = [[] for _ in range(lane.of)]
    shares[-1] = [each for each in chosen if each.operation in ON_RANKS]
    for each in chosen:
        if each.operation not in ON_RANKS:
            min(shares, key=len).append(each)
    # They come last, when the ranks have met.
    return sorted(shares[lane.number], key=lambda each: each.operation in ON_RANKS)


def _conclude(name: str, options: Options, shares: list[Share], started: str) -> Outcome:
    """Put the shares of one target together and write its report."""
    for share in shares:
        if share.lost is not None:
            code, message = share.lost
            return Outcome(name, None, code, message)
    description = shares[0].description
    scope = _scope(name, description, options)
    order = [each.id for each in options.selected()]
    results = sorted(
        (result for share in shares for result in share.results),
        key=lambda result: order.index(result.requirement.id),
    )
    machine = machine_of(description, scope.device)
    about = {"machine": machine, "suite": suite(), "seed": options.seed}
    directory = options.report / folder_of(name)
    for result in results:
        if result.failure is not None:
            save_case(directory / "cases", result.failure, scope, name, about)
    stale = shares[0].stale
    if options.waivers is not None and not stale:
        apply_waivers(read_waivers(options.waivers), name, results)
    effort = effort_for(options.profile, options.examples, scope.interpreted)
    report = target_report(
        target={
            "name": name,
            "version": description["version"],
            "capabilities": description["capabilities"],
            "operations": description["operations"],
        },
        machine=machine,
        seed=options.seed,
        suite=suite(),
        effort={"profile": options.profile, "examples": effort.examples, "minimum": effort.minimum},
        results=results,
        command=options.command(name),
        started=started,
        seconds={
            "lanes": len(shares),
            "loading": max(share.loading for share in shares),
            "cases": max(share.cases for share in shares),
        },
    )
    write_target(directory, report)
    return Outcome(name, report, 12 if stale else EXIT_CODES[report["verdict"]], stale)


def scope_of(executor: WorkerExecutor, options: Options) -> Scope:
    """What may be drawn for this target and these options.

    Raises:
        UsageError: a device or dtype that the target does not declare.
    """
    return _scope(executor.name, executor.description, options)


def _scope(target: str, description: dict[str, Any], options: Options) -> Scope:
    capabilities = Capabilities.from_json(description["capabilities"])
    present = [name for name in description["devices"] if name in capabilities.devices]
    if options.device is not None and options.device not in present:
        raise UsageError(
            f"--device: expected one of {', '.join(present) or 'none'} for {target}, "
            f"got '{options.device}'"
        )
    if options.dtype is not None and options.dtype not in capabilities.dtypes:
        raise UsageError(
            f"--dtype: expected one of {', '.join(capabilities.dtypes)} for {target}, "
            f"got '{options.dtype}'"
        )
    provided = description["operations"]
    device = options.device or next((d for d in ("cuda", "cpu", "mps") if d in present), "cpu")
    return Scope(
        capabilities,
        tuple(name for name in provided if not options.operations or name in options.operations),
        device,
        capabilities.dtypes if options.dtype is None else (options.dtype,),
        capabilities.interpreted,
        _world_sizes(target, description, options, device),
    )


def _world_sizes(
    target: str, description: dict[str, Any], options: Options, device: str
) -> tuple[int, ...]:
    """What was asked for, or what is usual, inside the declaration and on this machine."""
    declared = tuple(description["capabilities"]["world_sizes"])
    if options.world_sizes is not None:
        outside = [size for size in options.world_sizes if declared and size not in declared]
        if outside:
            raise UsageError(
                f"--world-size: expected any of {', '.join(map(str, declared))} for {target}, "
                f"got {outside[0]}"
            )
        sizes = options.world_sizes
    else:
        usual = tuple(size for size in WORLD_SIZES if not declared or size in declared)
        sizes = usual or tuple(size for size in declared if size <= max(WORLD_SIZES))
    if device == "cpu":
        return sizes
    # NCCL wants a GPU for each rank; nothing else exchanges between other devices.
    gpus = description["gpus"] if device == "cuda" else 0
    return tuple(size for size in sizes if size <= gpus)


def machine_of(description: dict[str, Any], device: str) -> dict[str, Any]:
    """What the run ran on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": description["triton"],
        "device": description["devices"].get(device) or platform.machine(),
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
