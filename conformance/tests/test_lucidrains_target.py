"""The targets of mixture-of-experts and st-moe-pytorch: what they pass, and what is known not to.

Whoever has not both of them skips all of it.
"""

import sys

import pytest

pytest.importorskip("mixture_of_experts")
pytest.importorskip("st_moe_pytorch")

import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets import lucidrains as adapter
from moe_reference import dispatch
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.layer import layer as reference_layer

VARIANTS = adapter.variants()
ASKED = {
    "top2_gate": "GATE-01 GATE-02 GATE-04 GATE-07 GATE-15 GATE-18 BALANCE-02 BALANCE-21 BALANCE-24",
    "topn_gate": "GATE-01 GATE-02 GATE-04 GATE-07 GATE-15 GATE-18 BALANCE-28",
    "top2_layer": "LAYER-01 LAYER-02 LAYER-07 LAYER-16",
    "topn_layer": "LAYER-01 LAYER-02 LAYER-07 LAYER-16",
}
"""Requirements that each target has to pass."""

KNOWN = {
    "top2_gate": "GATE-19 BALANCE-08 BALANCE-16 BALANCE-23 BALANCE-47",
    "topn_gate": "GATE-19 GATE-24 BALANCE-02 BALANCE-07 BALANCE-08 BALANCE-16 BALANCE-23 "
    "BALANCE-31 BALANCE-33 BALANCE-34 BALANCE-47 NUM-04",
    "top2_layer": "LAYER-08 LAYER-13 LAYER-15",
    "topn_layer": "LAYER-08 LAYER-13 LAYER-15 NUM-04",
}
"""What is known to fail. One that is mended, there or here, has to leave."""

CALLED = [
    ("top2_gate", "Top2Gating.forward", "GATE-01 GATE-07 BALANCE-02"),
    ("topn_gate", "TopNGating.forward", "GATE-01 GATE-07 BALANCE-02 BALANCE-28"),
    ("top2_layer", "Top2Gating.forward", "LAYER-01 LAYER-02"),
    ("top2_layer", "Experts.forward", "LAYER-01 LAYER-02"),
    ("top2_layer", "MoE.forward", "LAYER-01 LAYER-02"),
    ("topn_layer", "TopNGating.forward", "LAYER-01 LAYER-02"),
    ("topn_layer", "Experts.forward", "LAYER-01 LAYER-02"),
    ("topn_layer", "Expert.forward", "LAYER-01 LAYER-02"),
    ("topn_layer", "GEGLU.forward", "LAYER-01 LAYER-02"),
    ("topn_layer", "MoE.forward", "LAYER-01 LAYER-02"),
]


def test_variants_are_listed_without_torch_or_the_libraries(monkeypatch):
    for name in ("torch", "mixture_of_experts", "st_moe_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list(adapter.variants()) == ["top2_gate", "topn_gate", "top2_layer", "topn_layer"]


@pytest.mark.parametrize("found", ["none", "0.0.9"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_missing_or_old_library_is_one_sentence(name, found, needs):
    wanted = "mixture-of-experts >= 0.2" if "top2" in name else "st-moe-pytorch >= 0.1"
    needs(VARIANTS[name], found, f"lucidrains/{name} needs {wanted}", adapter.INSTALL)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("top2_gate", "Top2Gating"),
        ("topn_gate", "TopNGating"),
        ("top2_layer", "MoE"),
        ("topn_layer", "Experts"),
    ],
)
def test_a_library_that_has_moved_something_is_one_sentence(name, gone, monkeypatch, made):
    monkeypatch.delattr(made(VARIANTS[name])._library, gone)
    with pytest.raises(ImportError, match=rf"^lucidrains/{name}: .* has no [a-z_.]+\.{gone}$"):
        VARIANTS[name]()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_target_says_what_it_is(name, made, says_what_it_is):
    target = made(VARIANTS[name])
    says_what_it_is(target, f"lucidrains/{name}", target.distribution)


@pytest.mark.parametrize("name", ASKED)
def test_it_conforms_where_it_does(name, suite, made):
    suite.passes(made(VARIANTS[name]), ASKED[name], 3)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_found(name, suite, made):
    suite.fails(made(VARIANTS[name]), KNOWN[name], 25)


@pytest.mark.parametrize(("name", "function", "served"), CALLED)
def test_the_library_itself_is_called(name, function, served, suite, made, breaks):
    target = made(VARIANTS[name])
    where, method = function.split(".")
    breaks(getattr(target._library, where), method)
    suite.crashes(target, served, 3)


@pytest.mark.parametrize("name", ["top2_gate", "topn_gate"])
def test_what_stays_at_a_tight_capacity_is_the_first_choices(name, made):
    """The suite has no requirement on the policy `first_choice`; the gates are held to it here."""
    library = made(VARIANTS[name])._library
    torch.manual_seed(0)
    for length in (12, 31):
        x = torch.randn(1, length, 4) + torch.tensor([2.0, 1.0, 0.0, 0.0])
        if name == "top2_gate":
            gate = library.Top2Gating(4, 4, second_policy_eval="all", capacity_factor_eval=0.7)
            gate.w_gating.data.copy_(torch.eye(4))
        else:
            gate = library.TopNGating(4, 4, threshold_eval=0.0, capacity_factor_eval=0.7)
            gate.to_gates = torch.nn.Identity()
        combine = gate.eval()(x)[1][0]
        weights, ids = x[0].softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        room = max(4, int(length * 0.7 / 4))
        kept, left = dispatch.drop_to_capacity(weights, ids, 4, room, "first_choice")
        assert bool((left < 0).any())
        dense = torch.zeros(length, 5).scatter_add(1, left.where(left >= 0, 4), kept)[:, :4]
        torch.testing.assert_close(combine.sum(-1), dense)
        assert combine.shape[-1] == room
        assert int((combine > 0).sum(0).max()) == 1


def test_what_is_not_declared_is_refused(made):
    logits, ids = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    gate = made(VARIANTS["top2_gate"])
    with pytest.raises(Unsupported, match="top_k = 3"):
        gate.route(logits, RoutingConfig(3, renormalize=True, epsilon=1e-9))
    with pytest.raises(Unsupported, match="selection_bias = True"):
        gate.route(logits, RoutingConfig(2, renormalize=True, epsilon=1e-9), torch.zeros(6))
    with pytest.raises(Unsupported, match="loss = 'switch'"):
        gate.balance_loss(logits, ids, BalanceConfig("switch"))
    with pytest.raises(ValueError, match="expected a divisor of T = 4, got 3"):
        gate.balance_loss(logits, ids, BalanceConfig("gshard", sequence_length=3))
    with pytest.raises(MemoryError, match="GiB"):
        made(VARIANTS["topn_gate"]).balance_loss(
            torch.zeros(20_000, 2),
            torch.zeros(20_000, 1, dtype=torch.int64),
            BalanceConfig("gshard"),
        )


# st-moe moves its experts to their device in every forward, which looks at each parameter's grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["top2_layer", "topn_layer"])
def test_gradients_of_a_layer_are_those_of_the_reference(name, made):
    """The suite asks for them with other epsilons than these layers have."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    gated = name == "topn_layer"
    experts = [leaf(6, 8 if gated else 4, 5), leaf(6, 5, 4)]
    experts += [leaf(6, 8), leaf(6, 5)] if gated else []
    x, router = leaf(2, 7, 5), leaf(6, 5)
    parameters = LayerWeights(router, ExpertWeights(*experts))
    mode = "clamp" if gated else "add"
    config = LayerConfig(
        RoutingConfig(2, renormalize=True, epsilon=1e-9, epsilon_mode=mode),
        ExpertsConfig("gelu", gated=gated),
        router_dtype=None,
    )
    seen = torch.randn(2, 7, 5, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(
            (each(x, parameters, config).output * seen).sum(), [x, router, *experts]
        )
        for each in (made(VARIANTS[name]).layer, reference_layer)
    )
    torch.testing.assert_close(found, expected)
