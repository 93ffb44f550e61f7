"""The documents under the suite: what fails is what is known to be wrong, and nothing else."""

import tomllib
from pathlib import Path

import pytest
from moe_conformance.executor import InlineExecutor
from moe_conformance.findings import read_findings
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import PROFILES, Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.targets.documents import variants

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FAILURES = read_findings(ROOT / "docs/data/documents_suite.toml")
FAILED = ("fail", "crash", "timeout", "warn")
FITS = ("pass", "unsupported", "observed", "marginal", "inconclusive")
"""With few cases a requirement that has to be met may well be inconclusive."""

RARE = Effort(examples=60, minimum=1, shrinks=0)
"""What is expected to fail is tried until it does; most of it does with the first cases."""

FEW = Effort(PROFILES["smoke"].examples, minimum=1, shrinks=0)


def about(target, expected):
    """The requirements on the operations of a target; on any operation, those that it fails."""
    provided = set(type(target).operations())
    own = [each for each in requirements() if {each.operation, *each.also} <= provided]
    any_operation = [each for each in requirements() if each.operation == ANY]
    return own + [each for each in any_operation if each.id in expected]


def known(name):
    """The requirements that a target is known to fail, each with the reason."""
    return {
        id: each.title
        for each in FAILURES
        if each.targets == (f"documents/{name}",)
        for id in each.requirements
    }


def test_every_failure_has_one_reason():
    named = [
        (target, id) for each in FAILURES for target in each.targets for id in each.requirements
    ]
    assert len(set(named)) == len(named)
    assert {target for target, _ in named} == {f"documents/{name}" for name in variants()}
    assert all(each.title.endswith(".") for each in FAILURES)


@pytest.mark.parametrize("name", variants())
def test_what_fails_is_what_is_wrong_in_the_text(name):
    target, expected = variants()[name](), known(name)
    executor = InlineExecutor(target)
    scope = inline_scope(executor)
    asked = about(target, expected)
    assert set(expected) <= {each.id for each in asked}
    surprising = []
    for requirement in asked:
        effort = RARE if requirement.id in expected else FEW
        result = run_requirement(requirement, scope, executor, effort, seed=0)
        wanted = FAILED if requirement.id in expected else FITS
        if result.status not in wanted:
            reason = expected.get(requirement.id, "expected to be met")
            surprising.append(f"{requirement.id} {result.status} {result.message} [{reason}]")
    assert not surprising, "\n".join(surprising)


def test_the_documents_are_found_by_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = project["entry-points"]["moespec.targets"]["documents"]
    assert found == "moe_conformance.targets.documents:variants"
    for name, make in variants().items():
        assert make().name == f"documents/{name}"
