"""The `moespec` command."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

app = typer.Typer(
    name="moespec",
    help="Hold an implementation of Mixture-of-Experts layers against the specification.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MOST_RANKS = 64
"""Each rank is a process that has torch in it."""

Json = Annotated[bool, typer.Option("--json", help="For machines.")]


def _fail(message: object, code: int = 2) -> typer.Exit:
    print(f"moespec: {message}", file=sys.stderr)
    return typer.Exit(code)


def _world_sizes(said: Sequence[str]) -> tuple[int, ...]:
    """Numbers of ranks, from options that may have several each."""
    words = [word.strip() for each in said for word in each.split(",")]
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= MOST_RANKS:
            raise _fail(f"--world-size: expected numbers from 1 to {MOST_RANKS}, got '{word}'")
    return tuple(dict.fromkeys(map(int, words)))


@app.command()
def check(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="path/to/file.py:Class, package.module:Class, or a name from `moespec targets`.",
        ),
    ],
    profile: Annotated[str, typer.Option(help="smoke, cpu or full.")] = "cpu",
    operation: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    requirement: Annotated[
        list[str] | None, typer.Option(help="Only this one, by id; repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this one, such as bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="The whole run follows from it.")] = None,
    examples: Annotated[int | None, typer.Option(help="Cases per requirement.", min=1)] = None,
    report: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("moespec-report"),
    waivers: Annotated[Path | None, typer.Option(help="Known failures, as TOML.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one case.", min=0.1)] = 60.0,
    world_size: Annotated[
        list[str] | None,
        typer.Option(help="Ranks for expert parallelism, such as 2,4; repeatable."),
    ] = None,
) -> None:
    """Run the suite against targets, show a table, write the reports."""
    from moe_conformance.check import Options, UsageError, exit_code
    from moe_conformance.check import check as run
    from moe_conformance.report import last_line, table, times_line
    from moe_conformance.runner import PROFILES

    if profile not in PROFILES:
        raise _fail(f"--profile: expected one of {', '.join(PROFILES)}, got '{profile}'")
    if report.exists() and not report.is_dir():
        raise _fail(f"--report: expected a folder, got the file '{report}'")
    given: dict[str, Any] = {} if seed is None else {"seed": seed}
    if world_size:
        given["world_sizes"] = _world_sizes(world_size)
    options = Options(
        tuple(targets), profile, tuple(operation or ()), tuple(requirement or ()),
        device, dtype, examples=examples, report=report, waivers=waivers, timeout=timeout, **given,
    )  # fmt: skip
    # Rich takes 80 columns where there is no terminal; a log has room for a target's whole name.
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"seed {options.seed}", highlight=False)
    try:
        with _Display(console) as display:
            outcomes = run(options, display.notify)
    except UsageError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        raise _fail("interrupted; no report was written") from None
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    if reports:
        console.print(table(reports, options.report), crop=False)
    for outcome in outcomes:
        if outcome.message:
            said = f"{outcome.target}: {outcome.message}"
            console.print(said, style="bold red", markup=False, soft_wrap=True)
    for each in reports:
        console.print(times_line(each), markup=False, highlight=False, soft_wrap=True)
        console.print(
            last_line(each, options.report), markup=False, highlight=False, soft_wrap=True
        )
    if reports:
        console.print(f"report: {options.report / 'index.html'}", highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code(outcomes))


SILENCE = 10.0
"""Seconds without a word, where there is no terminal: whoever reads a log wonders by then."""


class _Display:
    """A bar for each target on a terminal; elsewhere a line now and then, and at each one's end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._bad: dict[str, int] = {}
        self._said = time.monotonic()

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def notify(self, progress: Any) -> None:
        """Show one piece of news."""
        name = progress.target
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(escape(name), total=progress.total, now="")
            if not self._console.is_terminal:
                self._console.print(f"{name}: loading", markup=False, highlight=False)
        self._bad[name] = self._bad.get(name, 0) + (
            progress.status in ("fail", "crash", "timeout", "inconclusive")
        )
        bad = f" · {self._bad[name]} not passed" if self._bad[name] else ""
        now = escape(f"{progress.id} {progress.status}{bad}")
        self._bars.update(self._tasks[name], completed=progress.done, total=progress.total, now=now)
        silent = time.monotonic() - self._said
        if self._console.is_terminal or (progress.done < progress.total and silent < SILENCE):
            return
        of = "" if progress.done == progress.total else f" of {progress.total}"
        self._console.print(
            f"{name}: {progress.done}{of} requirements tried{bad}", markup=False, highlight=False
        )
        self._said = time.monotonic()


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="A folder under <report>/<target>/cases.")],
    target: Annotated[str | None, typer.Option(help="Another target than the saved one.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one run.", min=0.1)] = 60.0,
) -> None:
    """Run one saved counterexample again, from its files alone."""
    from moe_conformance import worker
    from moe_conformance.cases import load_case
    from moe_conformance.cases import replay as run
    from moe_conformance.executor import TargetLost, WorkerExecutor
    from moe_conformance.registry import requirement_named

    try:
        saved = load_case(case)
        requirement = requirement_named(saved.requirement)
    except ValueError as error:
        raise _fail(error) from None
    print(f"{requirement.id} on {target or saved.target}: {requirement.sentence}")
    try:
        executor = WorkerExecutor(target or saved.target, timeout)
    except worker.UnknownTarget as error:
        raise _fail(error) from None
    except (worker.LoadError, TargetLost) as error:
        raise _fail(error, 10) from None
    try:
        found = run(saved, executor)
    finally:
        executor.close()
    inputs = "the same bytes as the plan builds" if found.same_inputs else "NOT those of the plan"
    print(f"inputs:   {inputs}, {saved.inputs_digest}")
    print(f"saved:    {saved.message}")
    if found.failed:
        print(f"now:      {'the same' if found.same_message else found.message}")
        if saved.expected is not None:
            same = "the same bytes as saved" if found.same_expected else "NOT those that were saved"
            print(f"expected: {same}")
        print(f"failed in {found.failed} of {found.runs} runs")
        raise typer.Exit(1)
    print(f"now:      passes, in {found.runs} of {found.runs} runs")


@app.command()
def explain(id: Annotated[str, typer.Argument(metavar="ID", help="Such as GATE-03.")]) -> None:
    """Say what a requirement asks, why, which bugs it comes from, and how it is checked."""
    from moe_conformance.registry import requirement_named

    try:
        found = requirement_named(id)
    except ValueError as error:
        raise _fail(error) from None
    console = Console()
    console.print(f"[bold]{found.id}[/bold]  {found.level}  {found.operation}", highlight=False)
    console.print(found.sentence, markup=False, highlight=False)
    console.print(f"\n[bold]Why[/bold]  {escape(found.reason)}", highlight=False)
    console.print("\n[bold]From[/bold]", highlight=False)
    for source in found.sources:
        console.print(f"  {source}", markup=False, highlight=False)
    console.print("\n[bold]Seeded faults that it catches[/bold]", highlight=False)
    for name in found.faults or ("none",):
        console.print(f"  {name}", markup=False, highlight=False)
    console.print("\n[bold]Read how it is done[/bold]", highlight=False)
    for reference in found.references:
        console.print(f"  {_lines(reference)}", markup=False, highlight=False)
    console.print("\n[bold]The property[/bold]", highlight=False)
    console.print(found.property_source, markup=False, highlight=False)


def _lines(reference: str) -> str:
    import importlib
    import inspect

    module_name, _, name = reference.rpartition(".")
    module = importlib.import_module(f"moe_reference.{module_name}")
    lines, first = inspect.getsourcelines(getattr(module, name))
    last = first + len(lines) - 1
    return f"moe_reference.{reference}: {module.__file__}:{first}-{last}"


@app.command()
def requirements(
    json_: Json = False,
    concept: Annotated[str | None, typer.Option(help="Only those of one concept.")] = None,
) -> None:
    """List the requirements."""
    from moe_conformance.registry import AREAS
    from moe_conformance.registry import requirements as listed

    if concept is not None and concept not in AREAS.values():
        raise _fail(f"--concept: expected one of {', '.join(AREAS.values())}, got '{concept}'")
    rows = [
        {
            "id": each.id,
            "level": each.level,
            "operation": each.operation,
            "sentence": each.sentence,
            "reason": each.reason,
            "sources": list(each.sources),
            "faults": list(each.faults),
        }
        for each in listed(concept)
    ]
    _print_rows(rows, ("id", "level", "operation", "sentence"), json_)


@app.command()
def targets(json_: Json = False) -> None:
    """List the targets that can be checked by name."""
    from moe_conformance import worker
    from moe_conformance.executor import in_worker
    from moe_conformance.targets import LIBRARIES

    rows = []
    for entry in sorted(entry_points(group=worker.ENTRY_POINTS), key=lambda e: e.name):
        library = LIBRARIES.get(entry.name)
        if library is not None and importlib.util.find_spec(library) is None:
            state = f"not here: there is no package {library}"
            rows.append({"name": entry.name, "from": entry.value, "state": state})
            continue
        try:
            names, state = in_worker(worker.variants, entry.name), "ready"
        except worker.LoadError as error:
            names, state = [entry.name], str(error)
        rows += [{"name": name, "from": entry.value, "state": state} for name in names]
    _print_rows(rows, ("name", "from", "state"), json_)


@app.command()
def faults(json_: Json = False) -> None:
    """List the seeded faults that the suite is tested with."""
    from moe_conformance.faults import faults as listed

    rows = [
        {
            "name": each.name,
            "catches": ", ".join(each.catches),
            "thread": each.thread,
            "story": each.story,
        }
        for each in listed()
    ]
    _print_rows(rows, ("name", "catches", "thread", "story"), json_)


@app.command()
def init(file: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Write a target skeleton that runs as it is."""
    from moe_conformance.skeleton import SKELETON

    if file.suffix != ".py":
        raise _fail(f"FILE: expected a name that ends in .py, got '{file}'")
    try:
        with file.open("x") as new:
            new.write(SKELETON)
    except FileExistsError:
        raise _fail(f"FILE: expected a new file, '{file}' exists") from None
    except OSError as error:
        raise _fail(f"FILE: '{file}' cannot be written: {error.strerror}") from None
    print(f"wrote {file}; run it with: moespec check {file}:MyMoE")


@app.command()
def selfcheck(
    seed: Annotated[int, typer.Option(help="The whole run follows from it.")] = 0,
    examples: Annotated[int, typer.Option(help="Cases per requirement.", min=1)] = 120,
    out: Annotated[Path | None, typer.Option(help="Write the kill matrix here, as JSON.")] = None,
) -> None:
    """Run the suite against its own seeded faults and print what catches what."""
    from moe_conformance.selfcheck import run_selfcheck, selfcheck_table

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    result = run_selfcheck(seed, examples, tell, os.cpu_count() or 1)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(selfcheck_table(result))
    print(f"{result['caught']} of {result['faults']} faults caught, "
          f"{len(result['false_alarms'])} false alarms on "
          f"{result['legal_implementations']} legal implementations")  # fmt: skip
    raise typer.Exit(0 if result["sound"] else 13)


@app.command()
def matrix(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="report.json files.")],
    out: Annotated[Path, typer.Option(help="Folder for the page.")],
    findings: Annotated[
        Path | None, typer.Option(help="TOML file that explains failures; cells link to it.")
    ] = None,
) -> None:
    """Write one static page: requirements by targets."""
    from moe_conformance.findings import read_findings
    from moe_conformance.report import read_report, write_matrix

    try:
        explained = read_findings(findings) if findings is not None else []
        page = write_matrix([read_report(path) for path in reports], out, explained)
    except ValueError as error:
        raise _fail(error) from None
    print(page)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A report.json.")],
    new: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Say what regressed, what was fixed and what is new."""
    from moe_conformance.report import compare as difference
    from moe_conformance.report import read_report

    try:
        found = difference(read_report(old), read_report(new))
    except ValueError as error:
        raise _fail(error) from None
    for kind in ("regressed", "fixed", "new", "gone"):
        print(f"{kind}: {len(found[kind])}")
        for each in found[kind]:
            print(
                f"  {each['target']} {each['id']}: {each['old']} -> {each['new']} {each['message']}"
            )
    raise typer.Exit(1 if found["regressed"] else 0)


def _print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, no_wrap=column in ("id", "name", "level"), overflow="fold")
    for row in rows:
        shown.add_row(*(escape(str(row[column])) for column in columns))
    Console().print(shown, highlight=False)


def main() -> None:
    """The entry point of the command."""
    app()
