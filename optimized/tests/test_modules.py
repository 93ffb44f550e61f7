"""The fast module against the reference's: results, gradients, state and counts."""

import pytest
import torch
from moe_optimized.modules import MoELayer, optimize
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.modules import MoELayer as Reference
from moe_reference.modules import moe_layer, stored_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

E, H, I, K = 5, 16, 8, 2
CONFIG = LayerConfig(
    RoutingConfig(top_k=K, score="sigmoid", renormalize=True), balance=BalanceConfig("switch", 0.1)
)


@pytest.fixture
def both(make_experts):
    """The reference's layer and ours, of the same weights."""

    def make(config=CONFIG, selection_bias=True, **options):
        parameters = LayerWeights(
            router=torch.randn(E, H),
            experts=make_experts(E, H, I, gated=config.experts.gated),
            selection_bias=torch.rand(E) if selection_bias else None,
            shared=make_experts(1, H, 2 * I, gated=config.experts.gated),
            shared_gate=torch.randn(1, H),
        )
        return Reference(parameters, config, **options), MoELayer(parameters, config, **options)

    return make


def train(moe, x, mask=None):
    result = moe(x, padding_mask=mask)
    (result.output.square().mean() + result.balance_loss).backward()
    return result


def test_a_training_step_is_that_of_the_reference(both, assert_close):
    reference, ours = both()
    x, mask = torch.randn(2, 6, H), torch.rand(2, 6) < 0.7
    for _ in range(2):
        expected, found = (train(moe, x, mask) for moe in (reference, ours))
        assert_close(found.output, expected.output)
        assert_close(found.balance_loss, expected.balance_loss)
        assert torch.equal(found.expert_ids, expected.expert_ids)
        for (name, parameter), other in zip(
            ours.named_parameters(), reference.parameters(), strict=True
        ):
            assert parameter.grad is not None, name
            assert_close(parameter.grad, other.grad)
        assert torch.equal(ours.tokens_per_expert, reference.tokens_per_expert)
        for moe in (reference, ours):
            moe.update_bias(0.1, centred=True)
        assert torch.equal(ours.selection_bias, reference.selection_bias)


def test_checkpoints_of_either_load_into_the_other(both):
    reference, ours = both()
    _, other = both()
    assert list(ours.state_dict()) == list(reference.state_dict())
    other.load_state_dict(reference.state_dict())
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(1, 4, H)
    assert torch.equal(other.eval()(x).output, ours.eval()(x).output)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_nothing_twice(use_reentrant, both):
    _, moe = both()
    x = torch.randn(1, 6, H, requires_grad=True)
    output = checkpoint(lambda x: moe(x).output * 1, x, use_reentrant=use_reentrant)
    output.sum().backward(retain_graph=not use_reentrant)
    assert moe.tokens_per_expert.sum() == 6 * K
    moe.eval()(x).output.sum().backward()
    assert moe.tokens_per_expert.sum() == 6 * K


def test_hash_tables_and_jitter_are_passed_on(both):
    table = torch.stack([torch.randperm(E)[:K] for _ in range(9)])
    config = LayerConfig(RoutingConfig(top_k=K, hash_table=table))
    _, moe = both(config, selection_bias=False, jitter_epsilon=0.5)
    x, token_ids = torch.randn(1, 4, H), torch.randint(0, 9, (1, 4))
    steady = moe.eval()(x, token_ids)
    assert torch.equal(steady.expert_ids, table[token_ids[0]])
    assert not torch.equal(moe.train()(x, token_ids).output, steady.output)


def test_the_bias_stays_float32_whatever_the_module_is_cast_to(both):
    _, moe = both()
    bias = moe.selection_bias.clone()
    moe.to(torch.bfloat16)
    assert torch.equal(moe.selection_bias, bias)
    result = train(moe, torch.randn(1, 3, H).to(torch.bfloat16))
    assert result.output.dtype is moe.router.grad.dtype is torch.bfloat16


def test_the_layers_of_a_model_are_turned_in_place(both, assert_close):
    reference, other = both(LayerConfig(CONFIG.routing, ExpertsConfig("gelu", gated=False)))
    model = nn.ModuleDict({"moe": reference, "head": nn.Linear(H, 1), "turned": other})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1, 4, H)
    expected = reference(x).output
    parameters = list(model.parameters())
    assert optimize(model) == 1
    assert isinstance(model["moe"], MoELayer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    out = model["moe"](x).output
    assert_close(out, expected)
    before = model["moe"].router.clone()
    out.sum().backward()
    optimizer.step()
    assert not torch.equal(model["moe"].router, before)
    assert optimize(model) == 0
    with pytest.raises(ValueError, match="model: expected one with a MoELayer, got Linear"):
        optimize(model["head"])


def test_a_published_family_can_be_turned(make_experts):
    stored = {}
    weights = make_experts(E, H, I)
    for e in range(E):
        gate, up = weights.gate_up[e].chunk(2)
        for name, tensor in (("gate", gate), ("up", up), ("down", weights.down[e])):
            stored[f"mlp.experts.{e}.{name}_proj.weight"] = tensor
    stored["mlp.gate.weight"] = torch.randn(E, H)
    moe = moe_layer("olmoe", stored, "mlp.", top_k=K)
    x = torch.randn(1, 4, H)
    expected = moe(x).output
    optimize(moe)
    torch.testing.assert_close(moe(x).output, expected)
    from moe_reference.families import FAMILIES

    found = stored_tensors(moe, FAMILIES["olmoe"].names, "mlp.")
    assert found.keys() == stored.keys()


def test_a_compiled_training_step_counts_as_well(both, assert_close):
    reference, ours = both()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 6, H)
        expected, found = (train(moe, x) for moe in (reference, compiled))
        assert_close(found.output, expected.output)
        assert torch.equal(ours.tokens_per_expert, reference.tokens_per_expert)
    assert_close(ours.router.grad, reference.router.grad)
    with torch.no_grad():
        compiled(x)
    assert torch.equal(ours.tokens_per_expert, reference.tokens_per_expert)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_compiled_passes_are_counted_one_by_one(use_reentrant, both):
    _, moe = both(CONFIG, selection_bias=False)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")

    def run(x):
        if use_reentrant is None:
            return compiled(x).output
        return checkpoint(lambda x: compiled(x).output * 1, x, use_reentrant=use_reentrant)

    x = torch.randn(1, 6, H, requires_grad=True)
    first, second = run(x), run(x)
    assert moe.tokens_per_expert.sum() == 0
    first.sum().backward()
    assert moe.tokens_per_expert.sum() == 6 * K
    second.sum().backward()
    assert moe.tokens_per_expert.sum() == 2 * 6 * K
    (run(x) + run(x)).sum().backward()
    assert moe.tokens_per_expert.sum() == 4 * 6 * K
