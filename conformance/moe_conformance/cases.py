"""Counterexamples on disk: saved whole, read back to the bit, run again from their files alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_conformance.case import Case
from moe_conformance.codec import Tensors, decode, digest, encode
from moe_conformance.executor import Executor
from moe_conformance.inputs.given import Scope
from moe_conformance.judge import Violation
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Failure
from moe_conformance.target import Capabilities
from moe_conformance.worker import place_arguments

SCHEMA_VERSION = 1
GENERATOR = "philox-3"
"""Names how a plan becomes tensors; it changes whenever the same plan would give other bytes."""

REPRO = '''"""{id} on {target}: {message}"""
from moe_conformance.cases import load_case
from moe_conformance.worker import make, surroundings

case = load_case(__file__)
target = make(case.target)
for session, answers in case.sessions:
    given = []
    with surroundings(session):
        for call in session["calls"]:
            given.append(case.arguments(call, given))
            print(call["operation"], case.shapes(call))
            print(getattr(target, call["operation"])(**given[-1]))
print("expected", case.expected)
'''

REPRO_ON_RANKS = '''"""{id} on {target}: {message}"""
from contextlib import closing
from moe_conformance.cases import load_case
from moe_conformance.executor import WorkerExecutor


def main():
    case = load_case(__file__)
    with closing(WorkerExecutor(case.target, 60.0)) as executor:
        for session, _ in case.sessions:
            for answer in executor.run(session):
                print(answer["error"] or answer["outputs"])
    print("expected", case.expected)


if __name__ == "__main__":  # each rank is a process that imports this file
    main()
'''


@dataclass(frozen=True)
class SavedCase:
    """A counterexample as it was saved.

    Attributes:
        directory: where its files are.
        requirement: the id.
        target: the target's name, as it was given.
        scope: what might be drawn.
        plan: what was drawn.
        inputs: the tensors and configurations that follow from it.
        sessions: the calls that were made, and the answers.
        expected: what was expected, where there is one value for it.
        actual: what came.
        message: how it failed.
        kind: fail, crash or timeout.
        flips: whether it failed in some calls and not in others.
        self_contained: False where it passed in a new process, without the calls before it.
        inputs_digest: names the inputs to the bit.
    """

    directory: Path
    requirement: str
    target: str
    scope: Scope
    plan: dict[str, Any]
    inputs: dict[str, Any]
    sessions: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    expected: Any
    actual: Any
    message: str
    kind: str
    flips: bool
    self_contained: bool
    inputs_digest: str

    def arguments(
        self, call: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """A call's arguments in the strides that they had.

        Args:
            call: one of a session.
            earlier: arguments of the session's calls before it, whose memory it may write over.
        """
        reuse = call.get("reuse")
        storage = None if reuse is None else earlier[reuse]
        return place_arguments(call, "cpu", storage=storage)

    def shapes(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments with shapes in the place of tensors."""
        return {
            name: list(value.shape) if isinstance(value, torch.Tensor) else value
            for name, value in call["arguments"].items()
        }


def case_name(failure: Failure) -> str:
    """The folder under `cases/` that a counterexample is saved in: `<id>-<hash of its inputs>`."""
    return f"{failure.requirement.id}-{digest(failure.inputs)}"


def folder_of(name: str) -> str:
    """The folder of a target's report under the run's, by the target's name.

    >>> folder_of("transformers/mixtral-grouped_mm")
    'transformers_mixtral-grouped_mm'
    >>> folder_of("path/to/file.py:Class")
    'file.py_Class'
    """
    last = name.rsplit("/", 1)[-1] if ":" in name else name
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in last)


def save_case(
    root: Path, failure: Failure, scope: Scope, target: str, about: dict[str, Any]
) -> Path:
    """Write a failure's files into `root`/<id>-<hash> and return that folder.

    Args:
        root: the target's `cases` folder.
        failure: the smallest case found.
        scope: what might be drawn.
        target: the target's name, as it was given.
        about: machine, suite and seed, kept for whoever reads the file.
    """
    tensors: Tensors = {}
    violation = failure.violation
    name = case_name(failure)
    # The inputs are built anew: a property may replace some of them while it runs.
    inputs = failure.requirement.given.build(failure.plan)
    content = {
        "schema_version": SCHEMA_VERSION,
        "generator": GENERATOR,
        "requirement": failure.requirement.id,
        "sentence": failure.requirement.sentence,
        "target": target,
        "message": str(violation),
        "kind": violation.kind,
        "flips": failure.flips,
        "self_contained": failure.self_contained,
        "plan": failure.plan,
        "inputs_digest": digest(inputs),
        "scope": asdict(scope),
        "about": about,
        "inputs": encode(inputs, tensors, "inputs"),
        "sessions": encode([list(pair) for pair in failure.sessions], tensors, "sessions"),
        "expected": encode(violation.expected, tensors, "expected"),
        "actual": encode(violation.actual, tensors, "actual"),
    }
    root.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    (beside / "case.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(tensors, beside / "tensors.safetensors")
    summary = str(violation).splitlines()[0].replace("\\", "/").replace('"', "'")[:120]
    (beside / "repro.py").write_text(
        (REPRO_ON_RANKS if "members" in inputs else REPRO).format(
            id=failure.requirement.id, target=target, message=summary
        )
    )
    final = root / name
    if final.exists():
        shutil.rmtree(final)
    os.replace(beside, final)
    return final


def load_case(path: str | Path) -> SavedCase:
    """Read a saved case; `path` is its folder or a file in it.

    Raises:
        ValueError: there is no case, or not one of a known version.
    """
    directory = Path(path)
    if directory.is_file():
        directory = directory.parent
    try:
        content = json.loads((directory / "case.json").read_text())
        tensors = load_file(directory / "tensors.safetensors")
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {version} is not {SCHEMA_VERSION}")
        scope = content["scope"]
        return SavedCase(
            directory=directory,
            requirement=content["requirement"],
            target=content["target"],
            scope=Scope(
                Capabilities.from_json(scope["capabilities"]),
                tuple(scope["operations"]),
                scope["device"],
                tuple(scope["dtypes"]),
                scope["interpreted"],
                tuple(scope.get("world_sizes", (2, 4))),
            ),
            plan=content["plan"],
            inputs=decode(content["inputs"], tensors),
            sessions=[
                (session, answers) for session, answers in decode(content["sessions"], tensors)
            ],
            expected=decode(content["expected"], tensors),
            actual=decode(content["actual"], tensors),
            message=content["message"],
            kind=content["kind"],
            flips=content["flips"],
            self_contained=content["self_contained"],
            inputs_digest=content["inputs_digest"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"case: expected a folder with case.json and tensors.safetensors, got '{path}' "
            f"({type(error).__name__}: {error})"
        ) from None
    except Exception as error:  # safetensors has an exception type of its own
        raise ValueError(
            f"case: tensors.safetensors in '{directory}' cannot be read: {error}"
        ) from None


@dataclass(frozen=True)
class Replay:
    """What running a saved case again showed.

    Attributes:
        failed: in how many runs it failed again.
        runs: how many runs there were.
        message: how it failed the last time, or empty.
        same_message: whether that is how it was saved.
        same_inputs: the stored inputs are those that the plan builds today, to the bit.
        same_expected: the expected values are the stored ones, to the bit.
    """

    failed: int
    runs: int
    message: str
    same_message: bool
    same_inputs: bool
    same_expected: bool


def replay(saved: SavedCase, executor: Executor) -> Replay:
    """Run a saved case: once, or ten times where the answer is not the same every time."""
    requirement = requirement_named(saved.requirement)
    rebuilt = digest(requirement.given.build(saved.plan)) == saved.inputs_digest
    intact = digest(saved.inputs) == saved.inputs_digest
    violations: list[Violation] = []
    runs = 0
    wanted = 10 if saved.flips or not saved.scope.capabilities.deterministic else 1
    while runs < wanted:
        runs += 1
        again = replace(saved, inputs=load_case(saved.directory).inputs)
        try:
            requirement.check(Case(again.inputs, saved.scope, executor))
        except Violation as violation:
            violations.append(violation)
        if runs == 1 and not violations:
            wanted = 10  # it may flip
    last = violations[-1] if violations else None
    return Replay(
        len(violations),
        runs,
        "" if last is None else str(last),
        last is not None and str(last) == saved.message,
        rebuilt and intact,
        last is not None and digest(last.expected) == digest(saved.expected),
    )
