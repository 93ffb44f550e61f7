from dataclasses import replace

import pytest
import torch
from moe_optimized.interpreter import HAS_TRITON, launches
from moe_optimized.layer import layer_torch, layer_triton
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.layer import layer as reference

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(layer_torch, id="torch"),
        pytest.param(layer_triton, id="triton", marks=needs_triton),
    ],
)
CONFIG = LayerConfig(RoutingConfig(top_k=2, renormalize=True, scale=1.5))


@pytest.fixture
def make_layer(make_experts):
    def make(dtype=torch.float32, shared=True, gate=True, biased=True, E=6, H=16):
        return LayerWeights(
            router=torch.randn(E, H).to(dtype),
            experts=make_experts(E, H, 8, dtype, biased=biased),
            router_bias=torch.randn(E) if biased else None,
            selection_bias=torch.rand(E) if biased else None,
            shared=make_experts(1, H, 24, dtype) if shared else None,
            shared_gate=torch.randn(1, H).to(dtype) if gate else None,
        )

    return make


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shared", "gate", "biased"),
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_agrees_with_the_reference(
    implementation, dtype, shared, gate, biased, make_layer, assert_close
):
    parameters = make_layer(dtype, shared, gate, biased)
    config = replace(CONFIG, shared_scale=0.7)
    x = torch.randn(2, 5, 16).to(dtype)
    mask = torch.rand(2, 5) < 0.7
    cotangent = torch.randn(2, 5, 16).to(dtype)
    found = []
    for run in (implementation, reference):
        router = parameters.router.clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        out = run(leaf, replace(parameters, router=router), config, padding_mask=mask)
        out.output.backward(cotangent)
        found.append((out, leaf.grad, router.grad))
    (ours, *gradients), (theirs, *expected) = found
    assert_close(ours.output, theirs.output)
    assert ours.output.dtype is dtype
    assert torch.equal(ours.expert_ids, theirs.expert_ids)
    assert_close(ours.weights, theirs.weights)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert ours.balance_loss is None
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other, dtype)


@implementations
def test_the_router_has_its_own_dtype(implementation, make_layer, assert_close):
    parameters, x = make_layer(), torch.randn(3, 4, 16)
    for dtype in (None, torch.bfloat16, torch.float64):
        config = replace(CONFIG, router_dtype=dtype)
        ours, theirs = (run(x, parameters, config) for run in (implementation, reference))
        assert torch.equal(ours.expert_ids, theirs.expert_ids)
        assert ours.weights.dtype is theirs.weights.dtype
        assert_close(ours.weights, theirs.weights)
        assert_close(ours.output, theirs.output)


@implementations
def test_weighted_inputs_leave_the_shared_expert_alone(implementation, make_layer, assert_close):
    parameters, x = make_layer(), torch.randn(1, 4, 16)
    config = replace(CONFIG, experts=ExpertsConfig(weight_on="input"))
    assert_close(
        implementation(x, parameters, config).output, reference(x, parameters, config).output
    )


@implementations
def test_hash_tables_see_the_token_ids(implementation, make_layer, assert_close):
    table = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    config = LayerConfig(RoutingConfig(top_k=2, hash_table=table))
    parameters, x = make_layer(), torch.randn(2, 3, 16)
    token_ids = torch.randint(0, 9, (2, 3))
    out = implementation(x, parameters, config, token_ids)
    assert torch.equal(out.expert_ids, table[token_ids.flatten()])
    assert_close(out.output, reference(x, parameters, config, token_ids).output)


@implementations
def test_no_tokens(implementation, make_layer):
    for shape in ((0, 4, 16), (3, 0, 16)):
        out = implementation(torch.randn(shape), make_layer(), CONFIG)
        assert out.output.shape == shape
        assert out.tokens_per_expert.tolist() == [0] * 6


@implementations
def test_bad_arguments_are_refused(implementation, make_layer):
    parameters, x = make_layer(), torch.randn(2, 3, 16)
    balanced = replace(CONFIG, balance=BalanceConfig())
    assert implementation(x, parameters, balanced).balance_loss is None
    with pytest.raises(ValueError, match="balance: expected None"):
        implementation(x, parameters, balanced, training=True)
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \[2, 3\]"):
        implementation(x, parameters, CONFIG, padding_mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"parameters.router: expected shape \[E, 8\]"):
        implementation(x[..., :8], parameters, CONFIG)
    fewer = replace(parameters, router=torch.randn(5, 16), router_bias=None, selection_bias=None)
    with pytest.raises(ValueError, match=r"parameters\.experts: expected 5 experts, got 6"):
        implementation(x, fewer, CONFIG)
    with pytest.raises(ValueError, match=r"parameters\.shared_gate: expected None without"):
        implementation(x, replace(parameters, shared=None), CONFIG)


@needs_triton
def test_the_kernels_are_launched(make_layer):
    before = launches.copy()
    layer_triton(torch.randn(1, 5, 16), make_layer(), CONFIG)
    # The routed experts and the shared one.
    experts = ("align_place_kernel", "experts_up_kernel", "experts_down_kernel")
    assert launches - before == {
        "route_topk_kernel": 1,
        "combine_rows_kernel": 2,
        **dict.fromkeys(experts, 2),
    }
