"""The targets of torchtitan: what they pass, what is known not to, and that nothing is their own.

Whoever has no torchtitan skips all of it. Ranks are threads here; `moespec check` has processes.
"""

import functools
import sys

import pytest

pytest.importorskip("torchtitan")

import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets import torchtitan as adapter
from moe_conformance.targets.torchtitan_parts import INSTALL
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

VARIANTS = adapter.variants()
ASKED = {
    "router": "GATE-01 GATE-03 GATE-04 GATE-05 GATE-06 BALANCE-36 BALANCE-39 BALANCE-40 "
    "BALANCE-41 BALANCE-42",
    "dispatcher": "DISPATCH-01 DISPATCH-02 DISPATCH-03 DISPATCH-05 DISPATCH-11 DISPATCH-17",
    "moe": "EXPERT-01 EXPERT-09 EXPERT-10 EXPERT-11 LAYER-01 LAYER-02 LAYER-04 LAYER-06 BACKEND-01",
    "gpt_oss": "EXPERT-06 EXPERT-09 EXPERT-10 LAYER-01 LAYER-03",
    "expert_parallel": "EP-01 EP-07 EP-12",
}
"""Requirements that each target has to pass; which of its functions serves which is below."""

KNOWN = {
    "router": "BALANCE-38",
    "dispatcher": "DISPATCH-31 DISPATCH-32",
    "moe": "LAYER-08",
    "gpt_oss": "LAYER-08",
    "expert_parallel": "EP-17",
    "gpt_oss-float32": "EXPERT-06 EXPERT-09 EXPERT-13 LAYER-01 LAYER-03",
}
"""What is known to fail. One that is mended, there or here, has to leave."""

CALLED = [
    ("router", "moe.TokenChoiceTopKRouter.forward", "GATE-01 GATE-03 GATE-04 GATE-05"),
    ("router", "optimizer.register_moe_load_balancing_hook", "BALANCE-40 BALANCE-41 BALANCE-42"),
    ("dispatcher", "dispatchers.LocalTokenDispatcher.dispatch", "DISPATCH-01 DISPATCH-05"),
    ("dispatcher", "dispatchers.LocalTokenDispatcher.combine", "DISPATCH-11 DISPATCH-17"),
    ("moe", "moe.GroupedExperts.forward", "EXPERT-01 EXPERT-09 EXPERT-10 LAYER-01 LAYER-04"),
    ("moe", "moe.RoutedExperts.forward", "EXPERT-01 EXPERT-09 EXPERT-10 LAYER-01 LAYER-04"),
    ("moe", "dispatchers.LocalTokenDispatcher.dispatch", "EXPERT-01 LAYER-01"),
    ("moe", "dispatchers.LocalTokenDispatcher.combine", "EXPERT-01 LAYER-01"),
    ("moe", "moe.TokenChoiceTopKRouter.forward", "LAYER-01 LAYER-02"),
    ("moe", "moe.MoE.forward", "LAYER-01 LAYER-02 LAYER-04"),
    ("moe", "dense.FeedForward.forward", "LAYER-04 LAYER-05"),
    ("gpt_oss", "gpt_oss.GptOssGroupedExperts.forward", "EXPERT-06 EXPERT-09 EXPERT-10 LAYER-01"),
]


def test_variants_are_listed_without_torch_or_torchtitan(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    assert list(adapter.variants()) == list(VARIANTS)
    assert len(VARIANTS) == 6


@pytest.mark.parametrize("found", ["none", "0.2.9"])
def test_a_missing_or_old_library_is_one_sentence(needs, found):
    needs(VARIANTS["router"], found, "torchtitan/router needs torchtitan >= 0.3", INSTALL)


def test_a_library_that_has_moved_something_is_one_sentence(monkeypatch, made):
    library = made(VARIANTS["router"])._library["moe"]
    monkeypatch.delattr(library, "RoutedExperts")
    with pytest.raises(ImportError, match=r"torchtitan.models.common.moe has no RoutedExperts"):
        VARIANTS["moe"]()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_target_says_what_it_is(name, made, says_what_it_is):
    says_what_it_is(made(VARIANTS[name]), f"torchtitan/{name}", "torchtitan")
    assert made(VARIANTS[name]).capabilities.alternatives("routing")


@pytest.mark.parametrize("name", ASKED)
def test_it_conforms_where_it_does(name, suite, made):
    # Cases of several ranks are a third as many.
    suite.passes(made(VARIANTS[name]), ASKED[name], 8 if name == "expert_parallel" else 3)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_found(name, suite, made):
    suite.fails(made(VARIANTS[name]), KNOWN[name], 40)


@pytest.mark.parametrize(("name", "function", "served"), CALLED)
def test_the_library_itself_is_called(name, function, served, suite, made, breaks):
    target = made(VARIANTS[name])
    where, *path, last = function.split(".")
    breaks(functools.reduce(getattr, path, target._library[where]), last)
    suite.crashes(target, served, 3)


@pytest.mark.parametrize("step", ["dispatch", "combine"])
def test_the_library_exchanges_the_rows(step, suite, made, breaks):
    target = made(VARIANTS["expert_parallel"])
    breaks(target._library["dispatchers"].AllToAllTokenDispatcher, step)
    suite.crashes(target, "EP-01", 8)


def test_calls_outside_the_declaration_are_refused(made):
    logits = torch.zeros(3, 4)
    x = torch.zeros(3, 8, dtype=torch.bfloat16)
    experts = ExpertWeights(x.new_zeros(4, 16, 8), x.new_zeros(4, 8, 8))
    weights, ids = torch.ones(3, 2), torch.tensor([[0, 1]] * 3)
    silu, swiglu = ExpertsConfig(), ExpertsConfig("swigluoai")
    names = ("moe", "dispatcher", "router", "gpt_oss")
    moe, dispatcher, router, gpt_oss = (made(VARIANTS[name]) for name in names)
    for call in (
        lambda: router.route(logits, RoutingConfig(2, score="sqrtsoftplus")),
        lambda: router.route(logits.half(), RoutingConfig(2)),
        lambda: router.update_bias(logits[0], torch.ones(4), 0.1, False),
        lambda: dispatcher.dispatch(logits, ids - 1, 4),
        lambda: dispatcher.combine(logits, torch.tensor([0, 1, 6]), weights),
        lambda: moe.experts(x, experts, weights, ids - 1, silu),
        lambda: moe.experts(x, experts, weights, ids, ExpertsConfig("gelu")),
        lambda: moe.experts(x.half(), experts, weights, ids, silu),
        lambda: gpt_oss.experts(x.float(), experts, weights, ids, swiglu),
        lambda: moe.experts(x, experts, weights, ids, silu, torch.arange(4)),
        lambda: gpt_oss.experts(x, experts, weights, ids, silu),
    ):
        with pytest.raises(Unsupported, match="torchtitan/"):
            call()
