"""Every seeded fault is caught by a requirement that it names; every requirement has its faults."""

from pathlib import Path

import pytest
import torch
from moe_conformance.executor import InlineExecutor, WorkerExecutor, capabilities_of
from moe_conformance.faults import faults
from moe_conformance.inputs.given import Scope
from moe_conformance.registry import MAY, requirement_named, requirements
from moe_conformance.runner import PROFILES, Effort, run_requirement
from moe_conformance.selfcheck import catch, inline_scope, noticed, run_selfcheck
from moe_conformance.target import OPERATIONS, Capabilities
from moe_conformance.targets import Reference
from moe_conformance.variants import VARIANTS, variant_target

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICAL = ("EXPERT-01", "EXPERT-03", "EXPERT-05", "EXPERT-06", "EXPERT-13")


def test_names_and_ids():
    listed = requirements()
    known = {each.id for each in listed}
    for fault in faults():
        assert fault.catches, fault.name
        assert set(fault.catches) <= known, fault.name
        assert fault.story.endswith("."), fault.name
    for requirement in listed:
        assert requirement.sources, requirement.id
        assert requirement.level in requirement.sentence, requirement.id
        if requirement.level != MAY:
            assert len(requirement.faults) >= 2, requirement.id


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_eight_faults(operation):
    assert sum(operation in fault.operations for fault in faults()) >= 8


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault):
    results = catch(fault, Effort(120, 1, 0), seed=0)
    if not any(map(noticed, results)):
        # What shows on one case in a hundred is missed by 120 cases three times in ten.
        results = catch(fault, Effort(PROFILES["full"].examples, 1, 0), seed=0)
    assert [r for r in results if noticed(r)], [
        (r.requirement.id, r.status, r.message) for r in results
    ]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_legal_variant_is_not_accused(variant):
    executor = InlineExecutor(variant_target(variant))
    scope = inline_scope(executor, ("float32", "bfloat16", "float16"))
    for requirement in requirements("experts"):
        if requirement.id in STATISTICAL:
            result = run_requirement(requirement, scope, executor, Effort(20, 1, 0), seed=1)
            assert result.status in ("pass", "marginal"), result.message


def test_a_suite_that_misses_a_fault_says_so(monkeypatch):
    """The self-check is unsound when a fault is right after all."""
    from moe_conformance import selfcheck
    from moe_conformance.faults import Fault

    harmless = Fault("nothing-is-wrong", ("GATE-19",), "", Reference)
    monkeypatch.setattr(selfcheck, "faults", lambda: [harmless])
    monkeypatch.setattr(selfcheck, "requirements", lambda: requirements("gating")[18:19])
    result = run_selfcheck(0, 12, lambda line: None)
    assert (result["caught"], result["sound"]) == (0, False)


@pytest.mark.parametrize(
    ("only_inference", "statuses"), [(False, "fail pass"), (True, "pass fail")]
)
def test_what_is_wrong_in_any_surroundings_is_said_once(only_inference, statuses):
    class OffByOne(Reference):
        capabilities = Capabilities(operations=("update_bias",))

        def update_bias(self, *given, **named):
            wrong = not only_inference or torch.is_inference_mode_enabled()
            return super().update_bias(*given, **named) + wrong

    executor = InlineExecutor(OffByOne())
    scope = inline_scope(executor)
    found = [
        run_requirement(requirement_named(id), scope, executor, Effort(20, 1, 0), seed=0).status
        for id in ("BALANCE-36", "BACKEND-07")
    ]
    assert found == statuses.split()


def test_what_is_kept_from_the_surroundings_is_no_excuse():
    """Asked plainly in the same process it is wrong too, for it has kept what it made in them."""
    planted = Path(__file__).with_name("planted.py")
    executor = WorkerExecutor(f"{planted}:WorkspaceOfTheDefaultDtype", 60.0)
    try:
        effort, asked = Effort(20, 1, 0), requirement_named("NUM-19")
        scope = Scope(capabilities_of(executor), ("z_loss",), dtypes=("float32",))
        result = run_requirement(asked, scope, executor, effort, seed=0)
    finally:
        executor.close()
    assert (result.status, result.failure.self_contained) == ("fail", True), result.message
