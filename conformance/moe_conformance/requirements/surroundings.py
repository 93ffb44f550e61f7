"""Requirements on what a caller has set, which no operation may be different for.

What other requirements ask is asked again, in other surroundings.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from weakref import WeakKeyDictionary

from hypothesis import strategies as st

from moe_conformance.case import Case
from moe_conformance.executor import Executor, TargetLost
from moe_conformance.inputs.given import Given, Inputs, Plan, Plans, Scope, choice
from moe_conformance.judge import Violation
from moe_conformance.registry import (
    ANY,
    MUST,
    Requirement,
    requirement,
    requirement_named,
    requirements,
)
from moe_conformance.target import ON_RANKS
from moe_conformance.worker import SURROUNDINGS, LoadError

ABOUT_ERRORS = (
    *("GATE-17", "BALANCE-27", "BALANCE-35", "BALANCE-43", "ALIGN-19", "ALIGN-31"),
    *("DISPATCH-31", "DISPATCH-32", "DISPATCH-33", "EXPERT-24", "LAYER-14", "SLICE-03"),
    *("SLICE-08", "SLICE-15", "SLICE-21", "QUANT-13"),
)
"""What is refused is so before anything is computed."""


def asked_again(surroundings: str, values: tuple[str, ...]) -> Given:
    """Inputs of any requirement that knows right answers, in surroundings of which one is drawn.

    A kernel of its own may be wrong in any way, so that no few requirements stand for all.

    Args:
        surroundings: what `worker.surroundings` reads.
        values: the values that it may have.
    """

    def plans(scope: Scope) -> Plans | None:
        inside = _recording_nothing(scope) if surroundings == "grad_mode" else scope
        possible: dict[str, list[Plans]] = {}
        for each in requirements():
            if _knows(each, scope) and (plans := each.given.plans(inside)) is not None:
                about = plans.map(functools.partial(_about, each.id))
                possible.setdefault(each.operation, []).append(about)
        if not possible:
            return None
        return st.tuples(_of_each(possible), st.sampled_from(values)).map(
            lambda drawn: {**drawn[0], surroundings: drawn[1]}
        )

    def build(plan: Plan) -> Inputs:
        rest = {name: v for name, v in plan.items() if name not in ("asked", surroundings)}
        inputs = requirement_named(plan["asked"]).given.build(rest)
        return {**inputs, "asked": plan["asked"], surroundings: plan[surroundings]}

    return Given(plans, build)


def _of_each(possible: dict[str, list[Plans]]) -> Plans:
    """As many of each operation, whether one requirement speaks of it or thirty."""
    # Not one choice in another, which Hypothesis makes one choice among all.
    return choice(tuple(possible)).flatmap(lambda operation: st.one_of(possible[operation]))


def _about(id: str, plan: Plan) -> Plan:
    return {**plan, "asked": id}


def _knows(each: Requirement, scope: Scope) -> bool:
    """Whether a requirement is about the answers of operations that the target has.

    Those on ranks draw their surroundings themselves.
    """
    asked = {each.operation, *each.also}
    return (
        each.level == MUST
        and each.id not in ABOUT_ERRORS
        and asked <= set(scope.operations)
        and not asked & set(ON_RANKS)
    )


def _recording_nothing(scope: Scope) -> Scope:
    """The same without gradients, which cannot be taken then."""
    return replace(scope, capabilities=replace(scope.capabilities, gradients=()))


def _ask(case: Case, set_to: str) -> None:
    asked = requirement_named(case["asked"])
    case.note(f"{set_to}, operation {asked.operation}")
    if "grad_mode" in case.inputs:
        case.scope = _recording_nothing(case.scope)
    # Taken now: a check may put other inputs in the place of those that were drawn.
    inputs = {name: value for name, value in case.inputs.items() if name not in SURROUNDINGS}
    try:
        asked.check(case)
    except (Violation, TargetLost):
        # What is wrong in any surroundings is what the other requirement is there to say.
        if not _wrong_anyway(asked, inputs, case):
            raise
        case.note("wrong without them too")
        case.judged += 1


def _wrong_anyway(asked: Requirement, inputs: Inputs, case: Case) -> bool:
    """Whether it is violated without the surroundings too.

    A target may keep what it made in them, and then is wrong without them in the same process. One
    that has answered nothing yet tells, and is asked until it has been wrong once.
    """
    executor = case.executor
    if not _violated(asked, Case(dict(inputs), case.scope, executor)):
        return False
    known = _wrong_when_new.setdefault(executor, set())
    if asked.id in known:
        return True
    try:
        anew = executor.renew()
    except (LoadError, TargetLost):
        # The next session says so.
        return True
    if anew and not _violated(asked, Case(dict(inputs), case.scope, executor)):
        return False
    if anew:
        known.add(asked.id)
    return True


_wrong_when_new: WeakKeyDictionary[Executor, set[str]] = WeakKeyDictionary()


def _violated(asked: Requirement, case: Case) -> bool:
    try:
        asked.check(case)
    except (Violation, TargetLost):
        return True
    return False


@requirement(
    "BACKEND-07",
    MUST,
    ANY,
    "Where gradients are off, under `no_grad` and in inference mode, every operation MUST give the "
    "right answer too.",
    reason="Inference has kernels of its own; and tensors made in inference mode have no version "
    "and cannot be kept for a backward pass.",
    sources=("docs/spec/backends.md", "vLLM #16801"),
    # In inference mode gradients are off as well.
    given=asked_again("grad_mode", ("no_grad", *["inference_mode"] * 3)),
    kinds=4,
    references=("backends.choose_backend",),
)
def the_way_without_gradients_is_right(case: Case) -> None:
    """What another requirement asks, asked again with gradients switched off."""
    _ask(case, case["grad_mode"])


@requirement(
    "NUM-19",
    MUST,
    ANY,
    "Torch's default dtype MUST NOT matter.",
    reason="Servers set it to the dtype of the model while they load it. A buffer that is made "
    "without a dtype is then narrower, or wider, than in any test.",
    sources=("docs/spec/operations.md", "vLLM #16801"),
    given=asked_again("default_dtype", ("bfloat16", "float16", "float64")),
    kinds=6,
)
def the_default_dtype_does_not_matter(case: Case) -> None:
    """What another requirement asks, asked again under another default dtype."""
    _ask(case, f"default {case['default_dtype']}")
