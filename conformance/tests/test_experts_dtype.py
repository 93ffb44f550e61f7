"""Experts that compute in another dtype than x's: right where that is declared, and there only."""

import dataclasses
import threading

import pytest
import torch
from moe_conformance.executor import InlineExecutor
from moe_conformance.judge import PASS_Z
from moe_conformance.precision import Arithmetic
from moe_conformance.registry import requirement_named, requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import ROUNDING_POINTS, Capabilities
from moe_conformance.targets import Reference
from moe_reference import activations, experts, parallel_steps

INSIDE = (
    "product", "pre_activation", "gate_activation", "activation_steps", "activation",
    "expert_output",
)  # fmt: skip
COMPUTED = ("experts", "experts_batched", "layer", "expert_parallel")
MANY, SOME = 40, 6
ASKED = [each.id for each in requirements() if each.operation in COMPUTED[:3] and not each.also]
ON_RANKS = ["EP-01", "EP-02", "EP-03", "EP-04", "EP-07", "EP-12"]
ACCUSED = ("fail", "crash", "timeout", "marginal", "warn")


def in_bfloat16(rows, one, config):
    return activations.feed_forward(rows.bfloat16(), one, config).to(rows.dtype)


def in_float32(rows, one, config):
    return activations.feed_forward(rows.float(), one, config).to(rows.dtype)


def too_large(rows, one, config):
    """About one expert in two is 15% too large."""
    scale = 1.15 if float(one.down.sum()) > 0 else 1.0
    return scale * in_bfloat16(rows, one, config)


def exchanged(rows, one, config):
    if config.gated:
        gate, up = one.gate_up.chunk(2)
        one = one._replace(gate_up=torch.cat([up, gate]))
    return in_bfloat16(rows, one, config)


class Narrow(Reference):
    """The reference whose routed experts are computed by `one_expert`, in bfloat16."""

    name = "bfloat16 experts"
    one_expert = staticmethod(in_bfloat16)
    capabilities = dataclasses.replace(
        Reference.capabilities,
        dtypes=("float32", "bfloat16", "float64"),
        experts_dtype="bfloat16",
        rounding_points=INSIDE,
    )


CALLED = threading.local()
"""Who is called in this thread, if anyone: the oracle shares the functions with the reference."""


def _of_whom(rows, one, config):
    target = getattr(CALLED, "target", None)
    return (target.one_expert if target else activations.feed_forward)(rows, one, config)


def _called(operation):
    def method(self, *given, **named):
        CALLED.target = self
        try:
            return getattr(Reference, operation)(self, *given, **named)
        finally:
            CALLED.target = None

    return method


for operation in COMPUTED:
    setattr(Narrow, operation, _called(operation))


def changed(one_expert=in_bfloat16, **declared):
    """A target like `Narrow` with something else."""
    body = {
        "one_expert": staticmethod(one_expert),
        "capabilities": dataclasses.replace(Narrow.capabilities, **declared),
    }
    return type("Changed", (Narrow,), body)()


@pytest.fixture(autouse=True)
def _computed_by_the_target(monkeypatch):
    monkeypatch.setattr(experts, "feed_forward", _of_whom)
    monkeypatch.setattr(parallel_steps, "feed_forward", _of_whom)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # On processors with AMX its product of two bfloat16 matrices lets a row that is NaN reach the
    # one before it (oneDNN #5717).
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    yield
    torch.set_num_threads(before)


def run(target, id, examples=8, seed=0, shrinks=0):
    executor = InlineExecutor(target)
    effort = Effort(examples, 1, shrinks)
    return run_requirement(requirement_named(id), inline_scope(executor), executor, effort, seed)


@pytest.mark.parametrize("id", [*ASKED, *ON_RANKS])
def test_what_is_declared_is_never_accused(id):
    result = run(changed(), id, SOME, seed=ASKED.index(id) if id in ASKED else 1)
    assert result.status not in ACCUSED, result.message


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-05", "EXPERT-11", "EXPERT-15", "LAYER-01"])
def test_nor_in_many_cases(id, seed):
    result = run(changed(), id, MANY, seed)
    assert result.status == "pass", result.message
    assert result.worst < PASS_Z


@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-11", "EXPERT-15", "LAYER-01", "EP-01"])
def test_the_same_without_the_declaration_is(id):
    """With all that could be said otherwise: every rounding point, and sums in bfloat16."""
    target = changed(
        experts_dtype=None,
        rounding_points=tuple(ROUNDING_POINTS),
        accumulator="bfloat16",
        dtypes=("float32",),
    )
    assert run(target, id).status == "fail"


@pytest.mark.parametrize("one_expert", [too_large, exchanged])
@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-15", "LAYER-01", "EP-01"])
def test_a_fault_behind_the_declaration_is_found(id, one_expert):
    assert run(changed(one_expert, dtypes=("float32",)), id, MANY).status == "fail"


def test_results_inside_are_held_to_the_dtype_inside():
    """For bfloat16 x what is rounded inside float32 experts is rounded to float32."""
    target = changed(in_bfloat16, experts_dtype="float32", dtypes=("bfloat16",))
    assert run(target, "EXPERT-01").status == "fail"


@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-05", "EXPERT-11", "LAYER-01", "LAYER-10"])
def test_experts_may_be_wider_or_narrower(id):
    target = changed(in_float32, experts_dtype="float32")
    assert run(target, id, SOME).status == "pass"


def test_float64_is_no_better_than_its_experts():
    undeclared = changed(experts_dtype=None, dtypes=("float64",))
    for asked in ("EXPERT-01", "LAYER-10"):
        assert run(changed(dtypes=("float64",)), asked).status == "pass"
        assert run(undeclared, asked).status == "fail"


def test_the_declaration_is_checked_and_written_down():
    declared = Capabilities(experts_dtype="bfloat16")
    assert Capabilities.from_json(declared.to_json()) == declared
    assert declared.to_json()["experts_dtype"] == "bfloat16"
    for wrong in ("half", "float16"):
        with pytest.raises(ValueError, match=f"experts_dtype: expected any of .*, got '{wrong}'"):
            Capabilities(experts_dtype=wrong)


def test_what_the_dtype_inside_has_is_not_rounded():
    arithmetic = Arithmetic.of(Capabilities(experts_dtype="bfloat16"), "float32")
    found = arithmetic.entering(torch.tensor([0.0, 1.5, -96.0, 1.001], dtype=torch.float64))
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert found[3].sqrt().item() == pytest.approx(1.001 * 2**-8 / 3**0.5)
    assert not Arithmetic.of(Capabilities(), "float32").entering(found).any()
    assert arithmetic.outside == Arithmetic.of(Capabilities(), "float32")
