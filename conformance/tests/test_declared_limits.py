"""Ids that differ within a row, no appended rows, no weights below 0, steps that are centred."""

import dataclasses
import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from moe_conformance.executor import InlineExecutor
from moe_conformance.inputs import slots
from moe_conformance.inputs.given import Content, Scope
from moe_conformance.inputs.load_balancing import SEQUENCE
from moe_conformance.registry import MAY, requirement_named, requirements
from moe_conformance.runner import Effort, drawn_of_the_seed, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import CHOICES, OPERATIONS, Capabilities, Unsupported
from moe_conformance.targets import Reference
from moe_reference.config import BalanceConfig, ExpertsConfig, RoutingConfig
from moe_reference.quantized_tensors import QuantizedTensor

DTYPES = ("float32", "bfloat16")
DISTINCT = Capabilities(dtypes=DTYPES, repeated_ids=False)
OF_REPEATED_IDS = {"ALIGN-13", "DISPATCH-07", "EXPERT-09", "EP-10", "BALANCE-05"}
"""What is about equal ids in a row and nothing else."""


def plans_of(requirement, capabilities, count):
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


def status(target, id, examples=12):
    executor = InlineExecutor(target)
    effort = Effort(examples=examples, minimum=1, shrinks=0)
    return run_requirement(requirement_named(id), inline_scope(executor), executor, effort, 1)


def ids_of(inputs):
    """Every [T, K] of ids in the inputs."""
    given = (inputs.get("whole", inputs), *inputs.get("ranks", ()))
    found = [each.get("expert_ids") for each in given]
    return [ids for ids in found if isinstance(ids, torch.Tensor)]


def repeats(ids, experts):
    """Whether a row names an expert twice."""
    ids = ids.long()
    rows = ids.where((ids >= 0) & (ids < experts), -1 - torch.arange(ids.shape[1]))
    ordered = rows.sort(dim=1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def test_ids_of_a_row_differ_where_they_have_to():
    seen = set()
    for requirement in requirements():
        for plan in plans_of(requirement, DISTINCT, 6):
            # Two calls one after the other have a plan each.
            experts = plan.get("first", plan).get("experts")
            for ids in ids_of(requirement.given.build(plan)):
                seen.add(requirement.operation)
                assert not repeats(ids, experts), f"{requirement.id}: {plan}"
    taken = {"align", "dispatch", "drop_to_capacity", "experts", "balance_loss", "expert_parallel"}
    assert seen >= taken | {"experts_quantized"}


def test_a_target_that_declares_nothing_is_asked_as_before():
    for requirement in requirements():
        for plan in plans_of(requirement, Capabilities(), 2):
            assert "distinct" not in plan
            assert not plan.get("centred") or requirement.id not in STEPS, requirement.id


@pytest.mark.parametrize("load", slots.LOADS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 3), (17, 257, 8), (40, 4, 2), (64, 5, 5)])
def test_distinct_loads_are_valid_ids(load, shape):
    tokens, experts, top_k = shape
    if load == "duplicates":
        return
    ids = slots.spread(Content(3), load, tokens, experts, top_k, 4, distinct=True)
    assert ids.shape == (tokens, top_k)
    assert ids.dtype is torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < experts
    assert not repeats(ids, experts)


def test_distinct_loads_are_what_they_are_called():
    one = slots.spread(Content(3), "one expert", 9, 20, 3, 4, distinct=True)
    assert len(one.unique()) == 3
    counts = (
        slots.spread(Content(3), "full blocks", 16, 8, 2, 4, distinct=True).flatten().bincount()
    )
    assert bool((counts % 4 == 0).all())
    counts = slots.spread(Content(3), "one over", 40, 30, 2, 4, distinct=True).flatten().bincount()
    assert int((counts % 4 == 1).sum()) >= int((counts > 0).sum()) - 1


class Map(Reference):
    """Routes are a map [T, E]: an expert that a row names twice is refused."""

    capabilities = replace(Reference.capabilities, dtypes=DTYPES, repeated_ids=False)

    def _check(self, ids, experts):
        # Arguments that do not fit are the reference's to refuse.
        if ids.ndim == 2 and not ids.is_floating_point() and repeats(ids, experts):
            raise Unsupported("a row names an expert twice")

    def align(self, expert_ids, block_size, num_experts, *more, **named):
        self._check(expert_ids, num_experts)
        return super().align(expert_ids, block_size, num_experts, *more, **named)

    def dispatch(self, x, expert_ids, num_experts):
        self._check(expert_ids, num_experts)
        return super().dispatch(x, expert_ids, num_experts)

    def drop_to_capacity(self, weights, expert_ids, num_experts, capacity, policy):
        self._check(expert_ids, num_experts)
        return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)

    def experts(self, x, experts, weights, expert_ids, config, expert_map=None):
        held = len(experts.gate_up) if expert_map is None else len(expert_map)
        self._check(expert_ids, held)
        return super().experts(x, experts, weights, expert_ids, config, expert_map)

    def experts_quantized(self, x, experts, weights, expert_ids, config, expert_map=None):
        if isinstance(experts.gate_up, QuantizedTensor):
            held = len(experts.gate_up.packed) if expert_map is None else len(expert_map)
            self._check(expert_ids, held)
        return super().experts_quantized(x, experts, weights, expert_ids, config, expert_map)

    def balance_loss(self, logits, expert_ids, *more, **named):
        if logits.ndim == 2:
            self._check(expert_ids, logits.shape[1])
        return super().balance_loss(logits, expert_ids, *more, **named)


def asked(requirement):
    """Whether a target is that declares the same and takes ids that repeat."""
    scope = Scope(replace(Map.capabilities, repeated_ids=True), OPERATIONS, dtypes=DTYPES)
    return requirement.given.plans(scope) is not None


ASKED = [
    each
    for each in requirements()
    if {each.operation, *each.also}
    & {"align", "dispatch", "drop_to_capacity", "experts", "experts_quantized", "balance_loss"}
]


@pytest.mark.parametrize("requirement", ASKED, ids=lambda each: each.id)
def test_a_map_is_asked_for_nothing_that_it_cannot_hold(requirement):
    found = status(Map(), requirement.id, 5)
    if requirement.id in OF_REPEATED_IDS or not asked(requirement):
        assert found.status == "unsupported"
    else:
        assert found.status == ("observed" if requirement.level == MAY else "pass"), found.message


@pytest.mark.parametrize("id", sorted(OF_REPEATED_IDS))
def test_what_is_about_repeated_ids_is_asked_of_others(id):
    assert asked(requirement_named(id))


class Appending(Reference):
    """`dispatch` appends two rows, and `combine` takes them."""

    def dispatch(self, x, expert_ids, num_experts):
        rows, counts, row_slots = super().dispatch(x, expert_ids, num_experts)
        rows = torch.cat([rows, rows.new_zeros(2, rows.shape[1])])
        return rows, counts, torch.cat([row_slots, row_slots.new_full((2,), expert_ids.numel())])


class AppendingInSilence(Appending):
    capabilities = replace(Reference.capabilities, appended_rows=False)


class AppendingNone(Reference):
    """`combine` looks every slot up."""

    capabilities = replace(Reference.capabilities, appended_rows=False)

    def combine(self, rows, slots, weights):
        if slots.ndim == 1 and bool((slots >= weights.numel()).any()):
            raise Unsupported("rows of nobody")
        return super().combine(rows, slots, weights)


def test_who_appends_no_rows_is_given_none():
    assert status(Reference(), "DISPATCH-37").status == "pass"
    assert status(AppendingNone(), "DISPATCH-37").status == "unsupported"
    for id in ("DISPATCH-03", "DISPATCH-11", "DISPATCH-12", "DISPATCH-17", "DISPATCH-36"):
        assert status(AppendingNone(), id).status == "pass"


def test_who_declares_that_it_appends_no_rows_appends_none():
    assert status(Appending(), "DISPATCH-03").status == "pass"
    found = status(AppendingInSilence(), "DISPATCH-03")
    assert found.status == "fail"
    assert "expected no appended row, the slot of which is T·K = " in found.message


class Probabilities(Reference):
    """By `probs` a weight below 0 is no pair; by `position` weights are not looked at."""

    capabilities = replace(
        Reference.capabilities,
        dtypes=DTYPES,
        capacity=[{"policy": ("position",)}, {"policy": ("probs",), "signed_weights": (False,)}],
    )
    signed = 0

    def drop_to_capacity(self, weights, expert_ids, num_experts, capacity, policy):
        if bool((weights < 0).any()):
            type(self).signed += 1
            if policy == "probs":
                raise Unsupported("a weight below 0")
        return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)


OF_CAPACITY = [
    each.id
    for each in requirements()
    # One speaks of a policy that it does not declare.
    if each.operation == "drop_to_capacity" and each.id != "DISPATCH-45"
]


@pytest.mark.parametrize("id", OF_CAPACITY)
def test_weights_below_zero_are_given_where_they_are_taken(id):
    found = status(Probabilities(), id, 12)
    assert found.status in ("pass", "observed"), found.message


def test_the_other_policy_still_has_weights_below_zero():
    Probabilities.signed = 0
    status(Probabilities(), "DISPATCH-21", 40)
    assert Probabilities.signed > 0


def test_whether_weights_have_a_sign_is_declared_by_policy():
    declared = Probabilities.capabilities
    assert slots.signed_weights(declared, "position") == {False, True}
    assert slots.signed_weights(declared, "probs") == {False}
    assert slots.signed_weights(replace(declared, capacity={"policy": ("probs",)}), "position") == (
        set()
    )


STEPS = ("BALANCE-36", "BALANCE-37", "BALANCE-38", "BALANCE-39")


class Centring(Reference):
    """Every step is centred."""

    capabilities = replace(Reference.capabilities, balance={"centred": (True,)})

    def update_bias(self, bias, tokens_per_expert, rate, centred):
        if not centred:
            raise Unsupported("every step is centred")
        step = rate * self.sign(tokens_per_expert)
        return bias.to(torch.promote_types(bias.dtype, torch.float32)) + (step - step.mean())

    def sign(self, counts):
        counts = counts.double()
        return torch.sign(counts.mean() - counts)


class AtTheMean(Centring):
    def sign(self, counts):
        return 2.0 * (counts.double() < counts.double().mean()) - 1


class FloatCounts(Centring):
    def sign(self, counts):
        return super().sign(counts.float())


class OfThoseInUse(Centring):
    def sign(self, counts):
        counts = counts.double()
        return torch.sign(counts.sum() / (counts > 0).sum().clamp(min=1) - counts)


class TheOtherWay(Centring):
    def sign(self, counts):
        return -super().sign(counts)


@pytest.mark.parametrize("id", STEPS)
def test_who_always_centres_is_asked_too(id):
    assert status(Centring(), id, 40).status == "pass"


@pytest.mark.parametrize(
    ("made", "id"),
    list(zip((TheOtherWay, AtTheMean, FloatCounts, OfThoseInUse), STEPS, strict=True)),
)
def test_a_centred_step_that_is_wrong_is_found(made, id):
    assert status(made(), id, 40).status == "fail"


@pytest.mark.parametrize(
    ("area", "config"),
    [("routing", RoutingConfig), ("experts", ExpertsConfig), ("balance", BalanceConfig)],
)
def test_every_field_of_a_configuration_may_be_declared(area, config):
    assert {field.name for field in dataclasses.fields(config)} <= set(CHOICES[area])


@pytest.mark.parametrize(
    ("area", "module"),
    [
        *[("routing", "routing"), ("experts", "experts"), ("layer", "layer")],
        *[("balance", "load_balancing"), ("quantization", "quantization")],
    ],
)
def test_everything_that_is_drawn_may_be_declared(area, module):
    drawn = importlib.import_module(f"moe_conformance.inputs.{module}").UNIVERSE
    assert set(drawn) <= set(CHOICES[area])


@pytest.mark.parametrize("area", CHOICES)
def test_what_nobody_draws_cannot_be_declared(area):
    known = ", ".join(CHOICES[area])
    with pytest.raises(ValueError, match=f"^{area}: expected any of {known}, got 'gate_bias'$"):
        Capabilities(**{area: [{CHOICES[area][0]: (1,)}, {"gate_bias": (False,)}]})


def test_ids_that_a_loss_is_given_stay_the_best_of_its_logits():
    class ChosenIds(Reference):
        """Takes no other ids, and says so."""

        capabilities = Capabilities(
            operations=("balance_loss",), balance={"ids": ("chosen",)}, gradients=("balance_loss",)
        )

        def balance_loss(self, logits, expert_ids, config, padding_mask=None, **named):
            real = slice(None) if padding_mask is None else padding_mask
            order = logits.detach().double().sort(dim=1, descending=True, stable=True).indices
            if not torch.equal(order[real, : expert_ids.shape[1]], expert_ids[real].long()):
                raise Unsupported("expert_ids: expected the best of the logits")
            return super().balance_loss(logits, expert_ids, config, padding_mask, **named)

    for id in ("NUM-05", "NUM-13", "NUM-16", "NUM-21"):
        found = status(ChosenIds(), id, examples=40)
        assert found.status in ("pass", "unsupported"), f"{id}: {found.message}"


@pytest.mark.parametrize(
    ("declared", "taken"), [((None,), False), ((16,), False), (("any",), True)]
)
def test_a_layers_loss_per_sequence_is_of_any_length(declared, taken):
    capabilities = Capabilities(balance={"sequence_length": declared})
    plans = plans_of(requirement_named("LAYER-11"), capabilities, 60)
    per_sequence = [p for p in plans if p["balance"] and p["balance"]["loss"] in SEQUENCE]
    assert plans
    assert bool(per_sequence) == taken


def test_blocks_of_activations_come_with_blocks_of_weights():
    rounded = {"activation_format": ("e4m3_block",), "activation_scales": (False,)}
    capabilities = Capabilities(formats=("e4m3",), quantization=rounded)
    plans = plans_of(requirement_named("QUANT-21"), capabilities, 60)
    of_down = [plan["down"] for plan in plans if plan["down"]]
    assert of_down
    for about in (*plans, *of_down):
        assert (about["activation_format"], about["granularity"]) == ("e4m3_block", "block")


def test_an_argument_that_a_target_made_part_of_a_graph_is_written_over():
    class MadePartOfAGraph(Reference):
        capabilities = Capabilities(operations=("z_loss",))

        def z_loss(self, logits, padding_mask=None):
            loss = super().z_loss(logits.clone(), padding_mask)
            if torch.is_grad_enabled() and not logits.requires_grad:
                logits.mul_(torch.ones((), requires_grad=True))
            return loss

    found = status(MadePartOfAGraph(), "BALANCE-52")
    assert found.status == "pass", found.message
