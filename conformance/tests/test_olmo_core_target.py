"""The targets of OLMo-core: what they pass, what is known not to, and that nothing is their own.

Whoever has no OLMo-core skips all of it. Without a GPU its kernels run in Triton's interpreter.
"""

import functools
import importlib
import sys

import pytest

pytest.importorskip("olmo_core")

import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets import olmo_core as adapter
from moe_reference import experts as reference
from moe_reference.config import BalanceConfig, ExpertsConfig, ExpertWeights, RoutingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = adapter.variants()
ASKED = {
    "router": "GATE-03 GATE-04 GATE-06 GATE-07 GATE-18 GATE-19 BALANCE-01 BALANCE-08 BALANCE-23 "
    "BALANCE-28 BALANCE-29 BALANCE-36 BALANCE-37 BALANCE-39",
    "dropless": "EXPERT-01 EXPERT-10 EXPERT-12 LAYER-02 LAYER-08",
    "default": "EXPERT-01 LAYER-02",
}
"""Requirements that each target has to pass."""

KNOWN = {
    "router": "BALANCE-16 BALANCE-31 BALANCE-38 BALANCE-47",
    "dropless_strided": "NUM-11",
}
"""What is known to fail. One that is mended, there or here, has to leave."""

CALLED = [
    ("router", "nn.moe.router", "MoELinearRouter.forward", "GATE-04 GATE-07 BALANCE-01 BALANCE-28"),
    ("router", "nn.moe.router", "MoELinearRouter.get_top_k", "GATE-04"),
    ("router", "nn.moe.router", "MoELinearRouter.post_batch", "BALANCE-36 BALANCE-39"),
    ("router", "nn.moe.router", "load_balancing_loss", "BALANCE-01 BALANCE-08"),
    ("router", "nn.moe.router", "router_z_loss", "BALANCE-28"),
    ("dropless", "nn.moe.parallel_mlp", "ParallelDroplessMLP.forward", "EXPERT-01 LAYER-02"),
    ("dropless", "nn.moe.mlp", "DroplessMoEMLP.forward", "EXPERT-01 LAYER-02"),
    ("dropless", "nn.moe.moe", "DroplessMoE.forward", "LAYER-02"),
    ("dropless", "nn.moe.router", "MoELinearRouter.forward", "LAYER-02"),
    ("dropless", "ops.moe", "gather", "EXPERT-01 LAYER-02"),
    ("dropless", "ops.moe", "scatter", "EXPERT-01 LAYER-02"),
    ("default", "nn.moe.parallel_mlp", "ParallelMLP.forward", "EXPERT-01 LAYER-02"),
    ("default", "nn.moe.mlp", "MoEMLP.forward", "EXPERT-01 LAYER-02"),
    ("default", "ops.moe", "binned_gather", "EXPERT-01 LAYER-02"),
    ("default", "ops.moe", "binned_scatter", "EXPERT-01 LAYER-02"),
]


def test_variants_are_listed_without_torch_or_olmo_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "olmo_core", None)
    assert list(adapter.variants()) == ["router", "dropless", "default", "dropless_strided"]


@pytest.mark.parametrize("found", ["none", "2.9.1"])
@pytest.mark.parametrize("name", ["router", "dropless"])
def test_a_missing_or_old_library_is_one_sentence(name, found, needs):
    wanted = f"olmo-core/{name} needs ai2-olmo-core >= 3.0"
    needs(VARIANTS[name], found, wanted, "pip install ai2-olmo-core==3.0.0")


def test_a_library_that_has_moved_something_is_one_sentence(monkeypatch, made):
    monkeypatch.delattr(made(VARIANTS["router"])._library, "MoELinearRouter")
    with pytest.raises(ImportError, match=r"has no olmo_core.nn.moe.MoELinearRouter$"):
        VARIANTS["router"]()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_target_says_what_it_is(name, made, says_what_it_is):
    says_what_it_is(made(VARIANTS[name]), f"olmo-core/{name}", "ai2-olmo-core")


@pytest.mark.parametrize("name", ASKED)
def test_it_conforms_where_it_does(name, suite, made):
    found = suite.statuses(made(VARIANTS[name]), ASKED[name], 4 if name == "router" else 1)
    # One example is too few for most requirements to be shown.
    allowed = {"pass"} if name == "router" else {"pass", "inconclusive"}
    assert set(found.values()) <= allowed, found


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_found(name, suite, made):
    suite.fails(made(VARIANTS[name]), KNOWN[name], 12 if name == "router" else 6)


@pytest.mark.parametrize(("name", "module", "function", "served"), CALLED)
def test_the_library_itself_is_called(name, module, function, served, suite, made, breaks):
    *path, last = function.split(".")
    holder = importlib.import_module(f"olmo_core.{module}")
    breaks(functools.reduce(getattr, path, holder), last)
    suite.crashes(made(VARIANTS[name]), served, 1)


@pytest.mark.parametrize("name", ["dropless", "default"])
def test_experts_are_those_of_the_reference(name, made):
    torch.manual_seed(0)
    x, weights = torch.randn(5, 6), torch.rand(5, 2)
    given = ExpertWeights(torch.randn(3, 8, 6), torch.randn(3, 6, 4))
    ids = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1], [0, 2]])
    found = made(VARIANTS[name]).experts(x, given, weights, ids, ExpertsConfig())
    expected = reference.experts(x, given, weights, ids, ExpertsConfig())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_declared_is_refused(made):
    logits, ids = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    router, dropless = made(VARIANTS["router"]), made(VARIANTS["dropless"])
    with pytest.raises(Unsupported, match="score = 'sigmoid'"):
        router.route(logits, RoutingConfig(2, score="sigmoid"))
    with pytest.raises(Unsupported, match="loss = 'gshard'"):
        router.balance_loss(logits, ids, BalanceConfig("gshard"))
    with pytest.raises(ValueError, match="expected a divisor of T = 4, got 3"):
        router.balance_loss(logits, ids, BalanceConfig("deepseek_sequence", sequence_length=3))
    with pytest.raises(Unsupported, match="centred = True"):
        router.update_bias(torch.zeros(3), torch.ones(3), 0.1, True)
    given = ExpertWeights(torch.randn(3, 8, 6), torch.randn(3, 6, 4))
    with pytest.raises(Unsupported, match="activation = 'gelu'"):
        dropless.experts(logits, given, torch.rand(4, 2), ids, ExpertsConfig("gelu"))
    with pytest.raises(Unsupported, match="no float64 on cpu"):
        dropless.experts(logits.double(), given, torch.rand(4, 2), ids, ExpertsConfig())
