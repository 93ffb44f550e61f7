"""Tries requirements on a target: draws cases, counts them, shrinks what fails, gives a status."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import FlakyFailure, Unsatisfiable
from hypothesis.internal.conjecture import engine, providers

from moe_conformance.case import Case
from moe_conformance.codec import walk
from moe_conformance.executor import Executor
from moe_conformance.inputs.given import Inputs, Plan, Scope
from moe_conformance.judge import Violation
from moe_conformance.registry import ANY, MAY, SHOULD, Requirement
from moe_conformance.target import ON_RANKS, SAME_TOKENS

STATUSES = (
    "pass",
    "fail",
    "crash",
    "timeout",
    "marginal",
    "inconclusive",
    "warn",
    "observed",
    "unsupported",
    "not_provided",
    "waived",
)
"""Every status that a requirement can have in a report."""


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        examples: cases drawn per requirement.
        minimum: cases that could have failed, below which nothing is concluded.
        shrinks: attempts to make a failing case smaller; 0 leaves it as it was found. Attempts
            and not seconds, so that the same seed ends with the same case on a busy machine.
    """

    examples: int
    minimum: int
    shrinks: int = 300


PROFILES: dict[str, Effort] = {
    "smoke": Effort(5, 2, 300),
    "cpu": Effort(60, 10, 300),
    "full": Effort(400, 40, 1000),
}
"""Named efforts. An interpreted target gets a quarter of all; see `effort_for`."""

SHRINK_SECONDS = 60.0
"""Shrinking ends after this in any case: with a target that takes a second for a call."""

RESEEDS = 2
"""A marginal case is drawn again with this many other seeds; marginal every time is a failure."""


OPERATIONS_PER_SHARE = 4
"""A requirement about every operation gets a requirement's cases for so many of them."""


CASES_PER_RANKS_CASE = 3
"""A case of several processes takes the time of three others, and counts as so many."""


def effort_for(profile: str, examples: int | None, interpreted: bool) -> Effort:
    """The effort of a profile, with the number of examples replaced where one is given."""
    effort = PROFILES[profile]
    count = examples if examples is not None else effort.examples
    if interpreted and examples is None:
        count = max(4, count // 4)
    shrinks = effort.shrinks // 4 if interpreted else effort.shrinks
    return Effort(count, max(1, min(effort.minimum, count // 3)), shrinks)


@dataclass
class Failure:
    """The smallest case found that breaks a requirement.

    Attributes:
        flips: whether the same case failed at one time and passed at another.
        self_contained: False where it was tried in a new process, without the calls before it, and
            passed. A timeout is not tried again.
    """

    requirement: Requirement
    plan: Plan
    inputs: Inputs
    violation: Violation
    sessions: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    flips: bool = False
    self_contained: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """How much there is to read: numbers in the tensors, then length of the plan."""
        return sum(t.numel() for _, t in walk(self.inputs)), len(json.dumps(self.plan))


@dataclass
class Result:
    """What is known of one requirement on one target."""

    requirement: Requirement
    status: str
    message: str = ""
    cases: int = 0
    vacuous: int = 0
    marginal: int = 0
    worst: float = 0.0
    worst_rms: float = 0.0
    seconds: float = 0.0
    drawn: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None


@dataclass
class _Search:
    requirement: Requirement
    scope: Scope
    executor: Executor
    effort: Effort
    result: Result
    failure: Failure | None = None
    failing: list[Plan] = field(default_factory=list)
    failed_at: float = 0.0
    shrinks: int = 0
    final: bool = False

    def execute(self, plan: Plan) -> None:
        if self.final or self._has_shrunk():
            # The process was lost, or the attempts are used up: only what was found fails.
            self.final = True
            assert self.failure is not None
            if plan == self.failure.plan:
                raise self.failure.violation
            return
        case = self._case(plan)
        try:
            self._examine(plan, case)
        except Violation as violation:
            self._record(plan, case, violation)
            raise
        finally:
            if self.failure is None:
                self._count(case)

    def settle(self) -> None:
        """Take the smallest of the failing cases that fails in a new process too.

        A target that keeps something from call to call fails on cases that are right in
        themselves, and a smaller case is then found that nobody can repeat. Goes back through
        the failing cases in growing steps, to the first.
        """
        found = self.failure
        if found is None or found.violation.kind == "timeout":
            return
        back = 1
        while self.executor.renew():
            plan = self.failing[-back]
            case = self._case(plan)
            try:
                self._examine(plan, case)
            except Violation as violation:
                if violation.kind == found.violation.kind:
                    self.failure = Failure(
                        self.requirement, plan, case.inputs, violation, case.sessions
                    )
                    return
            if back == len(self.failing):
                found.self_contained = False
                return
            back = min(2 * back, len(self.failing))

    def _examine(self, plan: Plan, case: Case) -> None:
        self.requirement.check(case)
        if case.marginal:
            self._try_again(plan)

    def _case(self, plan: Plan) -> Case:
        return Case(self.requirement.given.build(plan), self.scope, self.executor)

    def _try_again(self, plan: Plan) -> None:
        for other in range(1, RESEEDS + 1):
            again = self._case({**plan, "seed": (plan["seed"] + other) % 2**32})
            self.requirement.check(again)
            if not again.marginal:
                self.result.marginal += 1
                return
        raise Violation(f"marginal with {RESEEDS + 1} seeds out of {RESEEDS + 1}")

    def _record(self, plan: Plan, case: Case, violation: Violation) -> None:
        found = Failure(self.requirement, plan, case.inputs, violation, case.sessions)
        if self.failure is None:
            self.failed_at = time.perf_counter()
            self.result.cases += 1
        elif self.failure.violation.kind != violation.kind or found.size > self.failure.size:
            return
        self.failure = found
        self.failing.append(plan)
        # A process that dies or hangs costs too much to be made smaller.
        self.final = violation.kind == "timeout" or not case.sessions or not case.sessions[-1][1]

    def _has_shrunk(self) -> bool:
        if self.failure is None:
            return False
        self.shrinks += 1
        late = time.perf_counter() - self.failed_at > SHRINK_SECONDS
        return self.shrinks > self.effort.shrinks or late

    def _count(self, case: Case) -> None:
        self.result.cases += 1
        self.result.vacuous += not case.effective
        self.result.worst = max(self.result.worst, case.worst)
        self.result.worst_rms = max(self.result.worst_rms, case.worst_rms)
        self.result.drawn.update(case.events)
        self.result.drawn.update(f"vacuous: {name}" for name in case.vacuous[:1])


@contextmanager
def drawn_of_the_seed() -> Iterator[None]:
    """Hypothesis draws every case anew, and from the seed alone.

    After each new case it would try mutations of it, which repeat most of what was drawn: of 120
    cases of GATE-06 more than half had the tensors of another. And it would draw numbers that
    stand in the source of whatever modules are loaded and not installed, so that a seed would mean
    other cases where moespec lies in another place.
    """
    with (
        patch.object(engine.ConjectureRunner, "generate_mutations_from", lambda self, data: None),
        patch.object(
            providers.HypothesisProvider, "_maybe_draw_constant", lambda self, *_, **__: None
        ),
    ):
        yield


def run_requirement(
    requirement: Requirement, scope: Scope, executor: Executor, effort: Effort, seed: int
) -> Result:
    """Draw cases for one requirement until one fails or there have been enough.

    Args:
        requirement: what to check.
        scope: what may be drawn.
        executor: calls the target.
        effort: how many cases.
        seed: of the whole run; each requirement derives its own from it.
    """
    result = Result(requirement, "pass")
    needed = [n for n in (requirement.operation, *requirement.also) if n != ANY]
    missing = [name for name in needed if name not in scope.operations]
    if missing:
        result.status = "not_provided"
        result.message = f"the target has no {' and no '.join(missing)}"
        return result
    strategy = requirement.given.plans(scope)
    if strategy is None:
        result.status = "unsupported"
        result.message = "nothing of the kind lies inside the declaration"
        return result
    effort = replace(effort, examples=effort.examples * requirement.kinds)
    if requirement.operation == ANY:
        # Its cases are shared out among all that the target has, but for the operations on ranks
        # that have the same tokens, which it does not draw from.
        drawn = [name for name in scope.operations if name not in SAME_TOKENS]
        share = max(1, len(drawn) // OPERATIONS_PER_SHARE)
        effort = replace(effort, examples=effort.examples * share)
    if requirement.operation in ON_RANKS:
        effort = replace(
            effort,
            examples=-(-effort.examples // CASES_PER_RANKS_CASE),
            minimum=-(-effort.minimum // CASES_PER_RANKS_CASE),
        )
    search = _Search(requirement, scope, executor, effort, result)
    began = time.perf_counter()
    flaky = False

    @hypothesis.seed(_derive(seed, requirement.id))
    @hypothesis.settings(
        max_examples=effort.examples,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if effort.shrinks else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def search_cases(plan: Plan) -> None:
        search.execute(plan)

    try:
        try:
            with drawn_of_the_seed():
                search_cases()
        except Violation:
            pass
        except FlakyFailure:
            flaky = not search.final
        search.settle()
    except Unsatisfiable:
        result.message = "no case could be drawn inside the declaration"
    except Exception as error:
        # Ours, not the target's: nothing may be concluded, and nobody is accused.
        result.cases = result.vacuous = 0
        where = traceback.extract_tb(error.__traceback__)[-1]
        result.message = (
            f"the suite itself failed, please report it: {type(error).__name__}: {error} "
            f"({where.name}, line {where.lineno})"
        )
    result.seconds = time.perf_counter() - began
    _conclude(result, search, effort, flaky)
    return result


def _conclude(result: Result, search: _Search, effort: Effort, flaky: bool) -> None:
    failure = search.failure
    if failure is not None:
        failure.flips = flaky
        result.failure = failure
        result.status = failure.violation.kind
        result.message = str(failure.violation)
        if flaky:
            result.message += " (the answer flips from call to call)"
        elif not failure.self_contained:
            result.message += " (after other calls only; a new process gives a right answer)"
        if result.requirement.level == SHOULD and result.status == "fail":
            result.status = "warn"
    elif result.requirement.level == MAY:
        result.status = "observed"
        result.message = ", ".join(f"{name} {n}" for name, n in sorted(result.drawn.items()))
    elif result.cases - result.vacuous < effort.minimum:
        result.status = "inconclusive"
        result.message = result.message or (
            f"{result.cases - result.vacuous} of {result.cases} cases could have failed, "
            f"{effort.minimum} at least are needed"
        )
    elif result.marginal:
        result.status = "marginal"
        result.message = f"{result.marginal} of {result.cases} cases were marginal with one seed"


def run_target(
    requirements: Sequence[Requirement],
    scope: Scope,
    executor: Executor,
    effort: Effort,
    seed: int,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run every requirement on one target, telling `progress` after each."""
    results = []
    for requirement in requirements:
        result = run_requirement(requirement, scope, executor, effort, seed)
        progress(result)
        results.append(result)
    return results


def verdict(results: Sequence[Result]) -> str:
    """The verdict over all requirements: conforms, conforms_with_waivers, fails, inconclusive."""
    statuses = {result.status for result in results}
    if statuses & {"fail", "crash", "timeout"}:
        return "fails"
    ran = statuses & {"pass", "marginal", "warn", "waived"}
    if not ran or "inconclusive" in statuses:
        return "inconclusive"
    return "conforms_with_waivers" if "waived" in statuses else "conforms"


def _derive(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")
