"""The adapters for SGLang: what they translate, what conforms, and what is known to be wrong."""

import importlib.util

import pytest
import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets import sglang_source
from moe_conformance.targets.sglang import Sglang, SglangBiasedGrouped, SglangGrouped
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the files of sglang", allow_module_level=True)

TARGETS = [Sglang, SglangGrouped, SglangBiasedGrouped]

WRONG = {
    # Where there is a bias, scores are taken in float16, too.
    Sglang: ["GATE-03"],
    # Without tokens a view does not know its width. Equal ids of a row are counted once.
    SglangGrouped: [
        *("GATE-19", "EXPERT-01", "EXPERT-02", "EXPERT-06", "EXPERT-09", "EXPERT-10", "EXPERT-13"),
        *("EXPERT-14", "EXPERT-19", "EXPERT-29", "NUM-06", "NUM-08", "NUM-12"),
    ],
    SglangBiasedGrouped: ["GATE-19"],
}
RIGHT = {
    Sglang: ["GATE-04", "GATE-05", "GATE-07", "GATE-19", "EXPERT-01", "EXPERT-09", "EXPERT-10"],
    SglangGrouped: ["GATE-06", "GATE-09", "GATE-10"],
    SglangBiasedGrouped: ["GATE-03", "GATE-05", "GATE-11", "GATE-12"],
}


@pytest.mark.parametrize(("kind", "id"), [(k, id) for k, ids in RIGHT.items() for id in ids])
def test_it_conforms(suite, made, kind, id):
    suite.passes(made(kind), id, 5)


@pytest.mark.parametrize(("kind", "id"), [(k, id) for k, ids in WRONG.items() for id in ids])
def test_what_is_known_to_be_wrong_is_found(suite, made, kind, id):
    suite.fails(made(kind), id, 200)


@pytest.mark.parametrize("kind", TARGETS)
def test_where_a_function_raises_what_it_serves_crashes(suite, made, breaks, kind):
    breaks(made(kind), "_router", "_native")
    gate = "GATE-05" if kind is SglangBiasedGrouped else "GATE-01"
    suite.crashes(made(kind), f"{gate} EXPERT-01 EXPERT-03" if kind.native else gate, 2)


def test_swigluoai_alternates_gate_and_up():
    gate_up, down = torch.randn(1, 6, 4), torch.randn(1, 4, 3)
    x, config = 20 * torch.randn(5, 4), ExpertsConfig(activation="swigluoai", alpha=1.5, limit=6.0)
    ids = torch.zeros(5, 1, dtype=torch.int32)
    out = SglangGrouped().experts(x, ExpertWeights(gate_up, down), torch.ones(5, 1), ids, config)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    gate, up = gate.clamp(max=6), up.clamp(-6, 6)
    expected = (gate * torch.sigmoid(1.5 * gate) * (up + 1)) @ down[0].T
    torch.testing.assert_close(out, expected)


def test_what_is_not_declared_is_refused():
    logits = torch.zeros(1, 4)
    with pytest.raises(Unsupported, match="no groups, scale or table"):
        Sglang().route(logits, RoutingConfig(2, scale=2.5))
    with pytest.raises(Unsupported, match="no selection bias"):
        SglangGrouped().route(logits, RoutingConfig(2), torch.zeros(4))
    with pytest.raises(Unsupported, match="always a selection bias"):
        SglangBiasedGrouped().route(logits, RoutingConfig(2, score="sigmoid"))


@pytest.mark.parametrize("found", ["none", "0.4.9"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_missing_or_old_library_is_one_sentence(needs, kind, found):
    install = "pip install --no-deps sglang==0.5.23"
    needs(kind, found, f"{kind.name} needs sglang >= 0.5", install)


def test_a_function_or_file_that_has_moved_gives_one_sentence(monkeypatch):
    with pytest.raises(ImportError) as error:
        sglang_source.routers("no_such_router")
    assert str(error.value) == (
        f"sglang: expected 'no_such_router' in {sglang_source.TOPK}, found none"
    )
    monkeypatch.setattr(sglang_source, "TOPK", "sglang/nowhere.py")
    with pytest.raises(ImportError) as error:
        Sglang()
    assert str(error.value) == "sglang: expected a file sglang/nowhere.py, found none"
