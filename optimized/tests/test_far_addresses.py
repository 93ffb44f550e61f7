"""Offsets past 2^31 elements: the kernels compute them in 64 bits.

A tensor is spread over memory that nobody writes to, and which therefore is not there: only the
pages with its elements are. Behind its first element lies as much again, so that an offset that
wraps round in 32 bits reads a wrong number and does not end the process.
"""

from dataclasses import fields, replace

import pytest
import torch
from moe_optimized.dispatch import combine_triton
from moe_optimized.experts import experts_triton
from moe_optimized.gating import route_triton
from moe_optimized.load_balancing import balance_loss_triton, z_loss_triton
from moe_optimized.router import router_logits_triton
from moe_reference.config import BalanceConfig, ExpertsConfig, RoutingConfig

T, K, E, H, I = 5, 2, 3, 16, 8
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
    expected = with_gradients(function, *leaves)
    for place, leaf in enumerate(leaves):
        for dim in range(leaf.ndim):
            moved = [far(t, dim) if i == place else t for i, t in enumerate(leaves)]
            for ours, theirs in zip(with_gradients(function, *moved), expected, strict=True):
                assert torch.equal(ours, theirs), (place, dim)


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


def test_combine():
    slots, weights = torch.randperm(T * K), torch.rand(T, K)
    rows = torch.randn(T * K, H).half().requires_grad_()
    assert_far_is_near(lambda rows: combine_triton(rows, slots, weights), rows)


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
