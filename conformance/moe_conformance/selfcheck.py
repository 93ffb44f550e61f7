"""The suite against itself: every seeded fault has to be caught, the reference never accused."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.table import Table

from moe_conformance.executor import InlineExecutor, capabilities_of, forkserver
from moe_conformance.faults import Fault, faults
from moe_conformance.inputs.given import Scope
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import Effort, Result, run_requirement
from moe_conformance.target import Target
from moe_conformance.variants import VARIANTS, variant_target

DTYPES = ("float32", "bfloat16", "float16", "float64")
REFERENCE = "reference"
PARTS = 8
"""The requirements of a legal implementation are so many pieces of work."""


def inline_scope(executor: InlineExecutor, dtypes: tuple[str, ...] = DTYPES) -> Scope:
    """The scope of a target that is called in this process."""
    capabilities = capabilities_of(executor)
    kept = tuple(dtype for dtype in dtypes if dtype in capabilities.dtypes)
    return Scope(capabilities, type(executor.target).operations(), dtypes=kept)


def catch(fault: Fault, effort: Effort, seed: int, *, anyhow: bool = False) -> list[Result]:
    """Results of the requirements that a fault names, up to the first that fails.

    Args:
        fault: what has to be caught.
        effort: cases for each requirement.
        seed: of all of them.
        anyhow: where none of them fails, go on with all others that its operations have.
    """
    executor = InlineExecutor(fault.target())
    scope = inline_scope(executor)
    named = [each for each in requirements() if each.id in fault.catches]
    others = [
        each
        for each in requirements()
        if each not in named and {each.operation, *each.also} & {*fault.operations, ANY}
    ]
    results = []
    for requirement in (*named, *(others if anyhow else ())):
        results.append(run_requirement(requirement, scope, executor, effort, seed))
        if noticed(results[-1]):
            break
    return results


def noticed(result: Result) -> bool:
    """Whether a fault was caught: the answer was wrong, or, among ranks, it did not come.

    A rank that leaves early has no answer of its own to be wrong: the others wait for it.
    """
    lost = ("crash", "timeout") if result.requirement.area == "expert_parallel" else ()
    return result.status in ("fail", "warn", *lost)


def run_selfcheck(
    seed: int, examples: int, tell: Callable[[str], None], jobs: int = 1
) -> dict[str, Any]:
    """Run everything; see the keys for what comes back.

    Args:
        seed: of all runs.
        examples: cases per requirement and fault, at most; legal implementations get fewer.
        tell: called with a line of progress.
        jobs: processes; 1 is this one.
    """
    rows, alarms = [], []
    legal = [REFERENCE, *(variant.name for variant in VARIANTS)]
    work = [("fault", each.name, 0) for each in faults()]
    work += [("legal", name, part) for name in legal for part in range(PARTS)]
    perform = functools.partial(_perform, seed=seed, examples=examples)
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[Any]] = map
        if jobs > 1:
            pool = ProcessPoolExecutor(jobs, mp_context=forkserver())
            run = stack.enter_context(pool).map
        for (kind, name, _), found in zip(work, run(perform, work), strict=True):
            if kind == "legal":
                alarms += found
                continue
            rows.append(found)
            by = found["caught_by"]
            tell(f"{name}: {'caught by ' + by[0] if by else 'NOT CAUGHT'}")
    without = [r.id for r in requirements() if r.level != "MAY" and len(r.faults) < 2]
    caught = sum(bool(row["caught_by"]) for row in rows)
    return {
        "seed": seed,
        "faults": len(rows),
        "caught": caught,
        "legal_implementations": len(legal),
        "false_alarms": alarms,
        "requirements_with_fewer_than_two_faults": without,
        "sound": caught == len(rows) and not alarms and not without,
        "matrix": rows,
    }


def _perform(piece: tuple[str, str, int], seed: int, examples: int) -> Any:
    """One fault's row of the matrix, or the false alarms on a part of a legal implementation."""
    torch.set_num_threads(1)
    kind, name, part = piece
    if kind == "fault":
        [fault] = [each for each in faults() if each.name == name]
        return _row(fault, Effort(examples, 1, shrinks=0), seed)
    few = Effort(max(1, examples // (4 if name == REFERENCE else 10)), 1, shrinks=0)
    return _false_alarms(name, part, few, seed)


def _row(fault: Fault, effort: Effort, seed: int) -> dict[str, Any]:
    results = catch(fault, effort, seed, anyhow=True)
    return {
        "fault": fault.name,
        "thread": fault.thread,
        "catches": list(fault.catches),
        "caught_by": [r.requirement.id for r in results if noticed(r)],
        "after_cases": sum(r.cases for r in results),
    }


def _false_alarms(name: str, part: int, effort: Effort, seed: int) -> list[dict[str, str]]:
    from moe_conformance.targets import Reference

    if name == REFERENCE:
        target: Target = Reference()
    else:
        [variant] = [each for each in VARIANTS if each.name == name]
        target = variant_target(variant)
    executor = InlineExecutor(target)
    scope = inline_scope(executor, target.capabilities.dtypes)
    asked = requirements()
    if name != REFERENCE:
        asked = [each for each in asked if each.operation in target.operations()]
    alarms = []
    for requirement in asked[part::PARTS]:
        result = run_requirement(requirement, scope, executor, effort, seed)
        if result.status not in ("pass", "marginal", "observed", "not_provided", "unsupported"):
            about = {"id": requirement.id, "status": result.status, "message": result.message}
            alarms.append({"target": name, **about})
    return alarms


def selfcheck_table(result: dict[str, Any]) -> Table:
    """The kill matrix for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("fault", "has to be caught by", "caught by", "cases"):
        table.add_column(name, overflow="fold")
    for row in result["matrix"]:
        by = ", ".join(row["caught_by"]) or "NOT CAUGHT"
        table.add_row(row["fault"], ", ".join(row["catches"]), by, str(row["after_cases"]))
    for alarm in result["false_alarms"]:
        table.add_row(f"{alarm['target']} (false alarm)", "", alarm["id"], alarm["message"])
    for id in result["requirements_with_fewer_than_two_faults"]:
        table.add_row("(fewer than two faults)", id, "", "")
    return table
