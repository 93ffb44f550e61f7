"""Offsets past 2^31 elements: the kernels compute them in 64 bits.

A tensor is spread over memory that nobody writes to, and which therefore is not there: only the
pages with its elements are. Behind its first element lies as much again, so that an offset that
wraps round in 32 bits reads a wrong number and does not end the process.
"""

from dataclasses import fields, replace

import pytest
import torch
from moe_optimized.dispatch import combine_triton, dispatch_triton
from moe_optimized.experts import experts_triton
from moe_optimized.experts_decode import run_decode
from moe_optimized.gating import route_triton
from moe_optimized.load_balancing import balance_loss_triton, update_bias_triton, z_loss_triton
from moe_optimized.quantized_experts import experts_quantized_triton
from moe_optimized.quantized_layout import prepare
from moe_optimized.router import router_logits_triton
from moe_reference.config import BalanceConfig, ExpertsConfig, RoutingConfig
from moe_reference.quantization import quantize
from moe_reference.quantized_experts import QuantizedExperts

# No two: a stride fits into 32 bits then, and what it is multiplied with makes it too large.
T, K, E, H, I = 5, 3, 3, 16, 8
BEYOND = 2**31

pytestmark = pytest.mark.triton


def far(tensor, dim):
    """The same numbers, the last ones of a dimension more than 2^31 elements from the first."""
    sizes, dense, strides = tensor.shape, 1, [0] * tensor.ndim
    for other in reversed(range(tensor.ndim)):
        strides[other], dense = dense, dense * (1 if other == dim else sizes[other])
    strides[dim] = -(-BEYOND // (sizes[dim] - 1))
    memory = torch.empty(2 * BEYOND + dense + sizes[dim], dtype=tensor.dtype)
    spread = memory.as_strided(sizes, strides, BEYOND)
    spread.copy_(tensor.detach())
    assert (sizes[dim] - 1) * spread.stride(dim) >= BEYOND
    return spread.requires_grad_(tensor.requires_grad)


def with_gradients(function, *leaves):
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, *torch.autograd.grad(out, wanted, cotangent.to(out.dtype))


def assert_far_is_near(function, *leaves):
    called = with_gradients if any(leaf.requires_grad for leaf in leaves) else results
    expected = called(function, *leaves)
    for place, leaf in enumerate(leaves):
        for dim in range(leaf.ndim):
            moved = [far(t, dim) if i == place else t for i, t in enumerate(leaves)]
            for ours, theirs in zip(called(function, *moved), expected, strict=True):
                assert torch.equal(ours, theirs), (place, dim)


def results(function, *leaves):
    out = function(*leaves)
    return out if isinstance(out, tuple) else (out,)


def test_experts(make_experts):
    experts = make_experts(E, H, I, torch.float16, biased=True)
    ids = torch.randint(0, E, (T, K))
    weights = torch.rand(T, K)
    names = [field.name for field in fields(experts)]

    def call(x, *matrices):
        moved = replace(experts, **dict(zip(names, matrices, strict=True)))
        return experts_triton(x, moved, weights, ids, ExpertsConfig())

    leaves = torch.randn(T, H).half(), *(getattr(experts, name) for name in names)
    assert_far_is_near(call, *(t.requires_grad_() for t in leaves))


def test_experts_of_a_few_tokens(make_experts):
    experts = make_experts(E, H, I, torch.float16, biased=True)
    names = [field.name for field in fields(experts)]
    expert_map = torch.tensor([2, -1, 0, 1])

    def call(x, weights, ids, expert_map, *matrices):
        moved = replace(experts, **dict(zip(names, matrices, strict=True)))
        return run_decode(x, moved, weights, ids, ExpertsConfig(), expert_map, torch.float32)

    ids = torch.randint(0, 4, (T, K)).int()
    given = torch.randn(T, H).half(), torch.rand(T, K).half(), ids, expert_map.int()
    assert_far_is_near(call, *given, *(getattr(experts, name) for name in names))


@pytest.mark.parametrize(
    ("format", "options", "rows"),
    [("uint4b8", {"group_size": 16}, None), ("e4m3", {"granularity": "channel"}, "e4m3")],
)
def test_packed_experts(format, options, rows):
    packed = [quantize(torch.randn(E, *shape), format, **options) for shape in ((2 * H, H), (H, H))]
    biases = torch.randn(E, 2 * H).half(), torch.randn(E, H).half()
    prepared = prepare(QuantizedExperts(*packed, *biases, activation_format=rows))
    weights, ids = torch.rand(T, K), torch.randint(0, E, (T, K))

    def call(x, gate_up_bias, down_bias):
        moved = replace(prepared, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return experts_quantized_triton(x, moved, weights, ids, ExpertsConfig())

    assert_far_is_near(call, torch.randn(T, H).half(), *biases)


def test_dispatch():
    ids = torch.randint(0, E, (T, K)).int()
    x = torch.randn(T, H).half().requires_grad_()
    assert_far_is_near(lambda x: dispatch_triton(x, ids, E)[0], x)
    assert_far_is_near(lambda ids: dispatch_triton(x.detach(), ids, E), ids)


def test_combine():
    slots, weights = torch.randperm(T * K).int(), torch.rand(T, K)
    rows = torch.randn(T * K, H).half().requires_grad_()
    assert_far_is_near(lambda rows: combine_triton(rows, slots, weights), rows)
    assert_far_is_near(lambda s, w: combine_triton(rows.detach(), s, w), slots, weights)


def test_the_router_and_what_reads_its_logits():
    matrix = torch.randn(E, H).half()
    x = torch.randn(T, H).half()
    near = router_logits_triton(x, matrix, None, torch.float32)
    for dim in (0, 1):
        for moved in ((far(x, dim), matrix), (x, far(matrix, dim))):
            assert torch.equal(router_logits_triton(*moved, None, torch.float32), near)
    logits, config = torch.randn(T, E).half().requires_grad_(), RoutingConfig(K, renormalize=True)
    ids = torch.randint(0, E, (T, K))
    assert_far_is_near(lambda logits: route_triton(logits, config)[0], logits)
    assert_far_is_near(lambda logits: balance_loss_triton(logits, ids, BalanceConfig()), logits)
    assert_far_is_near(z_loss_triton, logits)


def test_what_the_router_and_the_losses_are_given_beside_logits():
    logits, ids = torch.randn(T, E).half(), torch.randint(0, E, (T, K)).int()
    counts, bias = torch.tensor([5.0, 1.0, 3.0]).half(), torch.rand(E).half()
    assert_far_is_near(lambda bias: route_triton(logits, RoutingConfig(K), bias), bias)
    assert_far_is_near(lambda ids: balance_loss_triton(logits, ids, BalanceConfig()), ids)
    assert_far_is_near(
        lambda counts: balance_loss_triton(logits, ids, BalanceConfig(), None, counts), counts
    )
    assert_far_is_near(lambda b, c: update_bias_triton(b, c, 0.1, True), bias, counts)
    table, tokens = torch.randint(0, E, (7, K)).int(), torch.randint(0, 7, (T,)).int()

    def hashed(table, tokens):
        return route_triton(logits, RoutingConfig(K, hash_table=table), None, tokens)

    assert_far_is_near(hashed, table, tokens)


def test_the_gradient_of_routing_weights():
    logits = torch.randn(T, E).half().requires_grad_()
    weights, _ = route_triton(logits, RoutingConfig(K, renormalize=True))

    def back(cotangent):
        return torch.autograd.grad(weights, logits, cotangent, retain_graph=True)[0]

    assert_far_is_near(back, torch.randn(T, K))
