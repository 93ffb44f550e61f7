"""The adapter for moe-ops: what it translates, what conforms, and what is known to be wrong."""

import importlib.util

import pytest
import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets.moe_ops import MoeOps, MoeOpsContiguous, MoeOpsNarrow
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

# Looked for and not imported: that is left to the adapter, which has the kernels interpreted.
if not all(map(importlib.util.find_spec, ("triton", "moe_ops"))):
    pytest.skip("needs moe_ops and triton", allow_module_level=True)

TOPK = RoutingConfig(2, order="topk_then_score")

# Logits are read as if they were contiguous; an expert whose logit is minus infinity
# is chosen twice, and NaN leads to ids beyond E; E has to be a power of two.
WRONG = {
    MoeOps: ["GATE-16", "GATE-23"],
    MoeOpsContiguous: ["GATE-02", "DISPATCH-01", "DISPATCH-04", "DISPATCH-17", "DISPATCH-27"],
    MoeOpsNarrow: ["GATE-02"],
}
RIGHT = {
    MoeOpsContiguous: ["GATE-06", "GATE-16", "GATE-18", "DISPATCH-12", "DISPATCH-16"],
    MoeOpsNarrow: ["GATE-06", "GATE-18"],
}
SERVED = {
    "_topk_softmax": ["GATE-01", "GATE-06", "GATE-18"],
    "_permute": ["DISPATCH-01", "DISPATCH-04", "EXPERT-01"],
    "_unpermute": ["DISPATCH-11", "DISPATCH-28", "EXPERT-01"],
    "_grouped_gemm": ["EXPERT-01", "EXPERT-11"],
}


@pytest.mark.parametrize(("kind", "id"), [(k, id) for k, ids in RIGHT.items() for id in ids])
def test_it_conforms(suite, made, kind, id):
    suite.passes(made(kind), id, 2)


@pytest.mark.parametrize(("kind", "id"), [(k, id) for k, ids in WRONG.items() for id in ids])
def test_what_is_known_to_be_wrong_is_found(suite, made, kind, id):
    suite.fails(made(kind), id, 30)


@pytest.mark.parametrize(("function", "id"), [(f, id) for f, ids in SERVED.items() for id in ids])
def test_where_a_function_raises_what_it_serves_crashes(
    suite, made, breaks, monkeypatch, function, id
):
    target = made(MoeOpsContiguous)
    # `permute` refuses most numbers of experts itself.
    monkeypatch.setattr(target, "_permute", permute)
    breaks(target, function)
    suite.crashes(target, id, 2)


def permute(x, ids, _, num_experts):
    """What `permute` gives, for any number of experts."""
    order = ids.T.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return x[order % len(x)], order.argsort().int(), offsets


def test_experts_are_right_where_their_number_is_a_power_of_two():
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(5, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    weights, ids = torch.rand(5, 2), torch.tensor([[0, 1], [3, 0], [2, 3], [1, 1], [3, 0]])
    config = ExpertsConfig()
    out = MoeOps().experts(x, ExpertWeights(gate_up, down), weights, ids.int(), config)
    gate, up = torch.einsum("th,tkfh->tkf", x, gate_up[ids]).chunk(2, -1)
    expected = torch.einsum(
        "tki,tkhi,tk->th", torch.nn.functional.silu(gate) * up, down[ids], weights
    )
    torch.testing.assert_close(out, expected)


def test_an_expanded_gradient_is_read_as_if_it_were_dense():
    gradients = []
    for contiguous in (True, False):
        logits = torch.tensor([[1.0, 2.0, 0.5, 0.0], [0.0, 0.5, 3.0, 1.0]], requires_grad=True)
        weights, _ = MoeOps().route(logits, TOPK)
        # Rows of other numbers stand behind it, where a dense gradient would go on.
        incoming = torch.tensor([[1.0, -1.0], [7.0, 9.0]])[:1].expand(2, 2)
        weights.backward(incoming.contiguous() if contiguous else incoming)
        gradients.append(logits.grad)
    right, wrong = gradients
    assert torch.equal(right[0], wrong[0])
    assert not torch.equal(right[1], wrong[1])


def test_slots_and_rows_are_translated_back_and_forth():
    target = MoeOps()
    x, ids = torch.randn(5, 3), torch.tensor([[0, 3], [1, 0], [3, 2], [2, 0], [0, 1]])
    rows, counts, slots = target.dispatch(x, ids, 4)
    assert counts.tolist() == [4, 2, 2, 2]
    assert torch.equal(rows, x[slots // 2])
    assert (ids.flatten()[slots].diff() >= 0).all()
    torch.testing.assert_close(target.combine(rows, slots, torch.full((5, 2), 0.5)), x)


def test_what_is_not_declared_is_refused():
    with pytest.raises(Unsupported, match="order = 'score_then_topk'"):
        MoeOps().route(torch.zeros(1, 4), RoutingConfig(2))
    with pytest.raises(Unsupported, match="selection_bias = True"):
        MoeOps().route(torch.zeros(1, 4), TOPK, torch.zeros(4))


@pytest.mark.parametrize("found", ["none", "0.0.9"])
def test_a_missing_or_old_library_is_one_sentence(needs, found):
    install = "pip install --no-deps moe-ops==0.1.0"
    needs(MoeOps, found, f"{MoeOps.name} needs moe-ops >= 0.1", install)


def test_a_function_that_has_moved_gives_one_sentence(monkeypatch):
    import moe_ops

    monkeypatch.delattr(moe_ops, "unpermute")
    said = rf"^{MoeOps.name}: version 0\.\S+ is not laid out as 0\.1"
    with pytest.raises(ImportError, match=said):
        MoeOps()
