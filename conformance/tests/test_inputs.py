"""What is drawn stays inside the declaration, reaches its limits, and is what it says it is."""

import dataclasses
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import integers
from moe_conformance.codec import walk
from moe_conformance.inputs.given import Scope, choice
from moe_conformance.registry import requirements
from moe_conformance.runner import drawn_of_the_seed
from moe_conformance.target import OPERATIONS, Capabilities
from moe_reference.config import ExpertWeights, RoutingConfig

DECLARED = {
    "everything": Capabilities(dtypes=("float32", "bfloat16", "float16", "float64")),
    "one model": Capabilities(
        dtypes=("bfloat16",),
        id_dtypes=("int32",),
        routing={"top_k": (8,), "num_groups": (8,), "score": ("sigmoid",)},
        min_experts=64,
        hidden_multiple=16,
        intermediate_multiple=32,
        strides=False,
    ),
    "three experts": Capabilities(max_experts=3, max_top_k=2),
    "no groups": Capabilities(routing=[{"num_groups": (1,), "top_k": (1, 2)}], strides=False),
    "no bias": Capabilities(experts={"bias": (False,), "gated": (True,)}),
}
CASES = 12


def plans_of(requirement, capabilities, count=CASES):
    """So many plans of a requirement, or none."""
    scope = Scope(capabilities, OPERATIONS, dtypes=capabilities.dtypes)
    strategy = requirement.given.plans(scope)
    drawn = []
    if strategy is None:
        return drawn

    @settings(
        max_examples=count, database=None, deadline=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def draw(plan):
        drawn.append(plan)

    with drawn_of_the_seed():
        draw()
    return drawn


def parts_of(value, kind):
    """All dataclasses of a kind in the inputs."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from parts_of(each, kind)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from parts_of(each, kind)
    elif dataclasses.is_dataclass(value):
        yield from parts_of(vars(value), kind)


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_drawn_stays_inside_the_declaration(name):
    declared = DECLARED[name]
    allowed = {getattr(torch, each) for each in declared.dtypes}
    seen = 0
    for requirement in requirements():
        for plan in plans_of(requirement, declared):
            seen += 1
            inputs = requirement.given.build(plan)
            told = f"{requirement.id}: {plan}"
            x = inputs.get("x", inputs.get("rows"))
            if isinstance(x, torch.Tensor):
                assert x.dtype in allowed, told
                if requirement.operation in ("experts", "layer", "experts_batched"):
                    assert x.shape[-1] % declared.hidden_multiple == 0, told
            for config in parts_of(inputs, RoutingConfig):
                assert config.top_k <= (declared.max_top_k or config.top_k), told
                for listed in declared.alternatives("routing"):
                    for field, values in listed.items():
                        assert getattr(config, field) in values, told
            for experts in parts_of(inputs, ExpertWeights):
                assert len(experts.down) <= (declared.max_experts or 10**9), told
                if requirement.id != "SLICE-13":  # its widths are uneven on purpose
                    assert experts.down.shape[2] % declared.intermediate_multiple == 0, told
                for listed in declared.alternatives("experts"):
                    if False not in listed.get("bias", (False,)) or listed.get("bias") == (False,):
                        assert (experts.down_bias is not None) in listed["bias"], told
            logits = inputs.get("logits")
            if isinstance(logits, torch.Tensor) and logits.ndim == 2:
                assert logits.shape[1] <= (declared.max_experts or 10**9), told
                assert logits.shape[1] >= declared.min_experts, told
            if not declared.strides:
                layouts = (inputs.get("layouts") or {}).values()
                assert all(each == "contiguous" for each in layouts), told
            ids = inputs.get("expert_ids")
            if isinstance(ids, torch.Tensor) and requirement.id != "NUM-14":
                assert str(ids.dtype).removeprefix("torch.") in declared.id_dtypes, told
    assert seen > 100


def test_the_limits_are_reached():
    declared = Capabilities(max_experts=24, max_top_k=6)
    experts, ks = set(), set()
    for requirement in requirements("gating"):
        for plan in plans_of(requirement, declared, 60):
            inputs = requirement.given.build(plan)
            if isinstance(inputs.get("logits"), torch.Tensor):
                experts.add(inputs["logits"].shape[1])
                ks.add(inputs["config"].top_k)
    assert {1, 24} <= experts
    assert {1, 6} <= ks


def test_the_same_plan_gives_the_same_bytes():
    for requirement in requirements():
        for plan in plans_of(requirement, DECLARED["everything"], 2):
            one, other = (dict(walk(requirement.given.build(plan))) for _ in range(2))
            assert one.keys() == other.keys()
            for name, tensor in one.items():
                assert torch.equal(bits_of(tensor), bits_of(other[name])), name


def bits_of(tensor):
    """Bytes: NaN is not equal to itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_a_seed_draws_the_same_whatever_is_loaded(tmp_path, monkeypatch):
    """Hypothesis by itself draws numbers that stand in the source of what is loaded."""
    drawn = []

    def draw():
        @seed(0)
        @settings(max_examples=200, database=None, phases=[Phase.generate])
        @given(integers(0, 10**6))
        def keep(number):
            drawn[-1].append(number)

        drawn.append([])
        keep()

    def load(name, numbers):
        (tmp_path / f"{name}.py").write_text(f"NUMBERS = {[*numbers]}\n")
        import_module(name)

    monkeypatch.syspath_prepend(tmp_path)
    draw()
    load("few_numbers", range(1000, 2000))
    draw()
    with drawn_of_the_seed():
        draw()
        load("more_numbers", range(2000, 5000))
        draw()
    assert drawn[0] != drawn[1]
    assert drawn[2] == drawn[3]


def test_no_two_requirements_say_the_same():
    listed = requirements()
    assert len({(each.operation, each.sentence) for each in listed}) == len(listed)
    assert len({each.check for each in listed}) == len(listed)


def test_choices_of_equal_values_are_kept_apart():
    """True and 1 are equal, and a field that is a bool is not the number 1."""
    assert {type(value) for value in choice((True, False)).elements} == {bool}
    assert {type(value) for value in choice((1, 0)).elements} == {int}
    assert choice((1, 0)) is choice([1, 0])
