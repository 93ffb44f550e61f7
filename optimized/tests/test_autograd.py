"""The gradient of a gradient: right, or refused."""

import moe_reference.dispatch as reference
import pytest
import torch
from moe_optimized.alignment import local_ids, sort_slots
from moe_optimized.autograd import once
from moe_optimized.dispatch import (
    combine,
    combine_triton,
    dispatch,
    dispatch_triton,
    spread_triton,
    weighted_sum_triton,
)
from moe_optimized.gating import route_triton
from moe_optimized.load_balancing import balance_loss_triton, z_loss_triton
from moe_reference.config import BalanceConfig, RoutingConfig


def drawn(*shape):
    return torch.randn(*shape, requires_grad=True)


def ids_of(tokens, experts, top_k):
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


def rows_of_all_slots(ids, experts):
    slots, _ = sort_slots(local_ids(ids, experts), experts)
    return slots


def refused(out, leaf, graph):
    loss = out.square().sum() if graph else out.sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        # The second term keeps the sum from having no graph at all.
        (gradient.square().sum() + leaf.sum()).backward()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["route", "balance_loss", "z_loss", "dispatch", "combine"])
@pytest.mark.triton
def test_kernels_refuse_it(name, graph):
    logits, ids = drawn(5, 4), ids_of(5, 4, 2)
    rows = drawn(10, 3)
    calls = {
        "route": lambda: (route_triton(logits, RoutingConfig(top_k=2))[0], logits),
        "balance_loss": lambda: (balance_loss_triton(logits, ids, BalanceConfig()), logits),
        "z_loss": lambda: (z_loss_triton(logits), logits),
        "dispatch": lambda: (dispatch_triton(rows, ids.expand(2, 5, 2).reshape(10, 2), 4)[0], rows),
        "combine": lambda: (
            combine_triton(rows, rows_of_all_slots(ids, 4), torch.rand(5, 2)), rows
        ),
    }  # fmt: skip
    refused(*calls[name](), graph)


@pytest.mark.triton
@pytest.mark.parametrize("move", [spread_triton, weighted_sum_triton])
def test_it_is_refused_in_the_name_of_what_was_called(move):
    x, weights, slots = drawn(4, 3), torch.rand(2, 2), torch.randperm(4)
    given = (x, slots, 1) if move is spread_triton else (x, slots, weights, torch.float32)
    gradient = torch.autograd.grad(move(*given, caller="mine").sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="mine: expected to be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("graph", [False, True])
def test_the_mark_refuses_where_torchs_own_does_not(graph):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once("square")
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    x = drawn(3)
    refused(Square.apply(x), x, graph)


def test_moving_rows_has_every_derivative():
    x, ids, weights = drawn(5, 3), ids_of(5, 4, 2), drawn(5, 2)

    def penalty(move, add):
        rows, _, slots = move(x, ids, 4)
        out = add(rows.square(), slots, weights)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weights))

    found = penalty(dispatch, combine)
    expected = penalty(reference.dispatch, reference.combine)
    torch.testing.assert_close(found, expected)
