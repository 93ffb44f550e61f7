"""One case: its inputs, the calls made on the target, and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from moe_conformance.executor import Executor, TargetLost
from moe_conformance.inputs.given import Inputs, Scope
from moe_conformance.judge import Closeness, Violation, has_form
from moe_conformance.worker import SURROUNDINGS

A = TypeVar("A")
FLOATS = (torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Answer:
    """What one call gave.

    Attributes:
        outputs: the results, tensors on the CPU; a list, a dictionary by field, or one value.
        gradients: by argument path; None where autograd had none.
        changed: argument paths whose values are different after the call.
        shared: outputs that share memory with an argument.
        state: parts of torch's global state that the call changed.
        kinds: path, dtype, device and Python type of each output tensor.
        afterwards: the outputs again, read after all later calls of the session.
        error: type, message, traceback and whether it was `Unsupported`; None if it returned.
        seconds: that the call took.
    """

    outputs: Any
    gradients: dict[str, torch.Tensor | None]
    changed: list[str]
    shared: list[str]
    state: list[str]
    kinds: list[list[str]]
    afterwards: Any
    error: dict[str, Any] | None
    seconds: float


@dataclass
class Case:
    """What a property gets: inputs by name, a target to call, and a place to judge.

    Attributes:
        inputs: named arguments, as the property's `Given` built them.
        scope: what was declared.
        executor: calls the target.
    """

    inputs: Inputs
    scope: Scope
    executor: Executor
    sessions: list[tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    marginal: bool = False
    worst: float = 0.0
    worst_rms: float = 0.0
    judged: int = 0
    vacuous: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    def call(self, operation: str, /, **arguments: Any) -> Answer:
        """Call the target once; an exception it raises is a violation."""
        return self.session([self.planned(operation, **arguments)])[0]

    def planned(
        self,
        operation: str,
        /,
        *,
        layouts: Mapping[str, str] | None = None,
        wrt: Sequence[str] = (),
        cotangents: Mapping[str, torch.Tensor] | None = None,
        reuse: int | None = None,
        poison: bool = False,
        cotangent_layout: str = "contiguous",
        backward: str = "at once",
        **arguments: Any,
    ) -> dict[str, Any]:
        """One call of a session.

        Args:
            operation: its name in the contract.
            layouts: strides of arguments, by path; see `worker.lay_out`.
            wrt: argument paths to differentiate by.
            cotangents: by output path ("" for a single output, "0" for the first), what the
                outputs are multiplied with.
            reuse: write the arguments over those of this earlier call.
            poison: fill memory that the target allocates and does not write with NaN.
            cotangent_layout: strides of the cotangents: see `worker.lay_out`; or `expanded`, as of
                the gradient of a sum: the first value everywhere, with strides of 0.
            backward: when gradients are taken: `at once`; `twice`, through a graph that is kept,
                the second time counts; or `late`, after all calls of the session.
            **arguments: as the contract names them.
        """
        return {
            "operation": operation,
            "arguments": arguments,
            "layouts": dict(self.inputs.get("layouts") or {} if layouts is None else layouts),
            "wrt": list(wrt),
            "cotangents": dict(cotangents or {}),
            "reuse": reuse,
            "poison": poison,
            "cotangent_layout": cotangent_layout,
            "backward": backward,
        }

    def session(self, calls: list[dict[str, Any]]) -> list[Answer]:
        """Make calls one after the other in the same process."""
        answers = self.attempt(calls)
        for call, answer in zip(calls, answers, strict=False):
            if answer.error is None:
                continue
            kind, message = answer.error["type"], answer.error["message"]
            if answer.error["unsupported"]:
                raise Violation(
                    f"{call['operation']} refused a call inside its declaration: {message}"
                )
            raise Violation(f"{call['operation']} raised {kind}: {message}", kind="crash")
        return answers

    def attempt(self, calls: list[dict[str, Any]]) -> list[Answer]:
        """As `session`, but an exception is an answer like any other."""
        session: dict[str, Any] = {"device": self.scope.device, "calls": calls}
        session |= {name: self.inputs[name] for name in SURROUNDINGS if name in self.inputs}
        if "members" in self.inputs:
            session |= {name: self.inputs[name] for name in ("world_size", "members")}
        try:
            answers = self.executor.run(session)
        except TargetLost as lost:
            self.sessions.append((session, []))
            raise Violation(f"{calls[-1]['operation']}: {lost}", kind=lost.kind) from lost
        self.sessions.append((session, answers))
        return [
            Answer(
                outputs=answer.get("outputs"),
                gradients=answer["gradients"],
                changed=answer["changed"],
                shared=answer["shared"],
                state=answer["state"],
                kinds=answer.get("kinds", []),
                afterwards=answer.get("afterwards"),
                error=answer["error"],
                seconds=answer["seconds"],
            )
            for answer in answers
        ]

    def judge(
        self,
        rule: Callable[[A], Closeness | None],
        answer: A,
        impostors: Iterable[tuple[str, A]],
    ) -> None:
        """Hold an answer against a rule, and the rule against answers known to be wrong.

        Args:
            rule: raises `Violation`, or returns nothing, or how close the answer was.
            answer: what the target gave.
            impostors: wrong answers with their names. A rule that lets one of them pass, or that
                was shown none, has shown nothing: the case is vacuous and does not count.
        """
        outcome = rule(answer)
        if outcome is not None:
            self.marginal |= outcome.marginal
            self.worst = max(self.worst, outcome.worst)
            self.worst_rms = max(self.worst_rms, outcome.worst_rms)
        self.judged += 1
        refused = 0
        for name, impostor in impostors:
            try:
                rule(impostor)
            except Violation:
                refused += 1
            else:
                self.vacuous.append(name)
                return
        if not refused:
            self.vacuous.append("no wrong answer to tell it from")

    def note(self, event: str, happened: bool = True) -> None:
        """Count what was drawn, for the report."""
        if happened:
            self.events[event] += 1

    @property
    def effective(self) -> bool:
        """Whether the case could have failed."""
        return self.judged > 0 and not self.vacuous


def routed(answer: Answer, tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and ids of `route`, in the form that the contract gives them."""
    weights, ids = parts("route", answer, 2)
    has_form("expert_ids", ids, (tokens, top_k), IDS)
    has_form("weights", weights, (tokens, top_k), FLOATS)
    return weights, ids


def parts(operation: str, answer: Answer, count: int) -> list[Any]:
    """The results of an operation that returns several."""
    outputs = answer.outputs
    if not isinstance(outputs, list) or len(outputs) != count:
        came = f"{len(outputs)} of them" if isinstance(outputs, list) else type(outputs).__name__
        raise Violation(f"{operation}: expected {count} results, got {came}")
    return outputs


def must_raise(
    case: Case, operation: str, good: dict[str, Any], bad: dict[str, dict[str, Any]]
) -> None:
    """Each of the bad calls by itself has to raise, for its reason.

    Args:
        case: what to call.
        operation: its name in the contract.
        good: arguments that are right. They are tried first: whoever raises at everything has
            refused nothing.
        bad: arguments by what is wrong with them.
    """
    case.call(operation, layouts={}, **good)
    for name, arguments in bad.items():
        answer = case.attempt([case.planned(operation, layouts={}, **arguments)])[0]

        def rule(error: dict[str, Any] | None, name: str = name) -> None:
            if error is None:
                raise Violation(f"{name}: expected an exception, got a result")
            if not error["unsupported"] and error["type"] not in ("ValueError", "TypeError"):
                raise Violation(
                    f"{name}: expected ValueError or TypeError, got {error['type']}: "
                    f"{error['message'][:200]}"
                )

        case.judge(rule, answer.error, [("a result", None)])
