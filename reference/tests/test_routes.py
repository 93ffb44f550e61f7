"""The routes against the definition, and what may be exchanged in them."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from moe_reference.backends import DUTIES, ActivationFormat, workspace_shapes
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import experts, grouped_product, init_experts
from moe_reference.routes import (
    ROUTES,
    experts_by_batch,
    experts_by_pair,
    gathered_product,
    grouped_product_npu,
    weigh_and_reduce,
)

WAYS = {**ROUTES, "batched": experts_by_batch}
CONFIGS = [
    ExpertsConfig("silu"),
    ExpertsConfig("silu", weight_on="input"),
    ExpertsConfig("swigluoai", limit=0.7),
    ExpertsConfig("gelu", gated=False),
    ExpertsConfig("relu2", gated=False, weight_on="input"),
]


def drawn(num_experts=5, tokens=7, top_k=3, config=CONFIGS[0], bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_experts * tokens + top_k)
    top_k = min(top_k, num_experts)
    weights = init_experts(num_experts, 4, 3, config.gated, bias, generator, dtype)
    x = torch.randn(tokens, 4, generator=generator, dtype=torch.float64).to(dtype)
    routed = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    return x, weights, routed, ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_every_route_gives_the_definition(way, config, num_experts, bias):
    x, weights, routed, ids = drawn(num_experts, config=config, bias=bias)
    expected = experts(x, weights, routed, ids, config)
    torch.testing.assert_close(WAYS[way](x, weights, routed, ids, config), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_pairs_that_are_not_here_and_maps(way, config):
    x, weights, routed, ids = drawn(5, config=config)
    local = ExpertWeights(*(t[:3] for t in vars(weights).values()))
    expert_map = torch.tensor([-1, 2, 0, -1, 1])
    ids[0] = torch.tensor([-1, 99, 1])
    routed[0, :2] = float("nan")
    expected = experts(x, local, routed, ids, config, expert_map)
    torch.testing.assert_close(WAYS[way](x, local, routed, ids, config, expert_map), expected)
    nobody = torch.full_like(ids, -1)
    assert not WAYS[way](x, local, routed, nobody, config).any()


@pytest.mark.parametrize("way", WAYS)
def test_zero_tokens_and_no_experts(way):
    x, weights, routed, ids = drawn(5, tokens=0)
    assert WAYS[way](x, weights, routed, ids, CONFIGS[0]).shape == (0, 4)
    none = ExpertWeights(torch.zeros(0, 6, 4), torch.zeros(0, 4, 3))
    y = WAYS[way](torch.ones(2, 4), none, torch.ones(2, 1), torch.zeros(2, 1).long(), CONFIGS[0])
    assert y.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients(way, config):
    x, weights, routed, ids = drawn(3, tokens=4, top_k=2, config=config)
    ids[0, 0] = -1
    tensors = [x, routed, *vars(weights).values()]

    def run(x, routed, *fields):
        return WAYS[way](x, ExpertWeights(*fields), routed, ids, config)

    assert torch.autograd.gradcheck(run, [each.clone().requires_grad_() for each in tensors])


@pytest.mark.parametrize("way", WAYS)
def test_nothing_routed_gives_zero_gradients_not_none(way):
    x, weights, routed, ids = drawn(3)
    tensors = [x, routed, *vars(weights).values()]
    for each in tensors:
        each.requires_grad_()
    WAYS[way](x, weights, routed, torch.full_like(ids, -1), CONFIGS[0]).sum().backward()
    assert all(each.grad is not None and not each.grad.any() for each in tensors)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_rounded_once(way):
    x, weights, routed, ids = drawn(4, dtype=torch.bfloat16)
    wide = ExpertWeights(*(t.float() for t in vars(weights).values()))
    expected = experts(x.float(), wide, routed, ids, CONFIGS[0]).bfloat16()
    got = WAYS[way](x, weights, routed, ids, CONFIGS[0])
    # The same float32 sums in another order: at most the last bit of a bfloat16 differs.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(WAYS[way](x, weights, routed, ids, CONFIGS[0]), got)


def test_the_output_may_be_written_to_a_tensor_that_is_given():
    x, weights, routed, ids = drawn()
    expected = experts(x, weights, routed, ids, CONFIGS[0])
    place = torch.empty(4, 7, dtype=x.dtype).T
    assert experts_by_pair(x, weights, routed, ids, CONFIGS[0], out=place) is place
    torch.testing.assert_close(place, expected)
    assert experts_by_pair(x, weights, routed, ids, CONFIGS[0], out=x) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("out", "grad", "error", "message"),
    [
        (
            torch.empty(7, 3, dtype=torch.float64),
            False,
            ValueError,
            r"out: expected shape \[7, 4\]",
        ),
        (torch.empty(7, 4), False, TypeError, "out: expected dtype float64, got float32"),
        (torch.empty(4, dtype=torch.float64).expand(7, 4), False, ValueError, "an expanded tensor"),
        (torch.empty(7, 4, dtype=torch.float64), True, ValueError, "expected None where gradients"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(out, grad, error, message):
    x, weights, routed, ids = drawn()
    with pytest.raises(error, match=message):
        experts_by_pair(x.requires_grad_(grad), weights, routed, ids, CONFIGS[0], out=out)


def test_activation_and_reduction_may_be_exchanged():
    x, weights, routed, ids = drawn()

    def twice(pre, config):
        gate, up = pre.chunk(2, dim=1)
        return 2 * F.silu(gate) * up

    seen = {}

    def largest(rows, slots, weights):
        seen["rows"] = len(rows)
        token = (slots // weights.shape[1])[:, None].expand_as(rows)
        zeros = rows.new_zeros(len(weights), rows.shape[1])
        return zeros.scatter_reduce(0, token, rows, "amax", include_self=False)

    no_bias = ExpertWeights(weights.gate_up, weights.down)
    plain = experts(x, no_bias, routed, ids, CONFIGS[0])
    doubled = experts_by_pair(x, no_bias, routed, ids, CONFIGS[0], activation=twice)
    torch.testing.assert_close(doubled, 2 * plain)
    result = experts_by_pair(x, no_bias, routed, ids, CONFIGS[0], reduction=largest)
    ones = torch.ones(7, 1, dtype=x.dtype)
    each = torch.stack([experts(x, no_bias, ones, ids[:, k, None], CONFIGS[0]) for k in range(3)])
    torch.testing.assert_close(result, each.amax(dim=0))
    assert seen["rows"] == 21
    with pytest.raises(ValueError, match=r"reduction: expected shape \[7, 4\]"):
        experts_by_pair(x, weights, routed, ids, CONFIGS[0], reduction=lambda rows, *_: rows)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_delegated_pairs_are_weighed_once(weight_on):
    config = ExpertsConfig("silu", weight_on=weight_on)
    x, weights, routed, ids = drawn(config=config)
    ids[1, 1] = -1
    pairs = torch.full((7, 3, 4), float("nan"), dtype=x.dtype)
    ones = torch.ones(7, 1, dtype=x.dtype)
    for k in range(3):
        here = ids[:, k] >= 0
        given = routed[:, k, None] if weight_on == "input" else ones
        out = experts(x, weights, given, ids[:, k, None], config)
        pairs[here, k] = out[here]
    summed = weigh_and_reduce(pairs, routed, ids, 5, weight_on)
    torch.testing.assert_close(summed, experts(x, weights, routed, ids, config))


def test_duties_are_those_of_the_routes():
    formats = {"standard", "batched"}
    assert {key[0] for key in DUTIES} == formats == set(ActivationFormat.__args__)
    for (activation_format, weight_on, delegated), duty in DUTIES.items():
        assert (duty.where == "before") == (weight_on == "input")
        assert (duty.adds_up == "caller") == delegated
        if activation_format == "batched":
            assert delegated
            assert duty.multiplies == "caller"


def test_the_buffers_hold_what_two_products_write():
    x, _weights, _routed, _ids = drawn(dtype=torch.float32, bias=False)
    for gated, J in ((True, 6), (False, 3)):
        shapes = workspace_shapes("standard", (7, 3), 4, 3, gated)
        products = torch.empty(shapes.products)
        activated = torch.empty(shapes.activated)
        output = torch.empty(shapes.output)
        rows = x[torch.arange(21) // 3]
        products[:, :J] = rows @ torch.ones(4, J)
        activated[:] = products[:, :3]
        products[:, :4] = activated @ torch.ones(3, 4)
        output[:] = products[:, :4].view(7, 3, 4).sum(dim=1)
        assert products.shape == (21, max(J, 4))
    assert workspace_shapes("batched", (5, 8), 4, 3).output == (5, 8, 4)


def test_gathered_rows_get_their_own_matrix():
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64)
    matrices = torch.randn(4, 2, 3, dtype=torch.float64)
    biases = torch.randn(4, 2, dtype=torch.float64)
    ends = torch.tensor([2, 2, 4, 5])
    torch.testing.assert_close(
        gathered_product(rows, matrices, biases, ends),
        grouped_product(rows, matrices, biases, ends),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_npu_operator_is_called_as_its_documentation_says(monkeypatch, dtype, bias):
    calls = []

    def npu_grouped_matmul(x, weight, *, bias, group_list, **options):
        calls.append(options)
        [rows], [matrices] = x, weight
        assert matrices.is_contiguous()
        assert group_list.dtype == torch.int64
        assert bias is None or bias[0].dtype == (
            torch.float32 if dtype == torch.bfloat16 else dtype
        )
        start, products = 0, []
        for e, end in enumerate(group_list.tolist()):
            own = rows[start:end].float() @ matrices[e].float()
            products.append(own if bias is None else own + bias[0][e].float())
            start = end
        return [torch.cat(products).to(dtype)]

    stand_in = types.SimpleNamespace(npu_grouped_matmul=npu_grouped_matmul)
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    torch.manual_seed(0)
    rows, matrices = torch.randn(5, 3).to(dtype), torch.randn(2, 4, 3).to(dtype)
    biases = torch.randn(2, 4).to(dtype) if bias else None
    ends = torch.tensor([1, 5])
    got = grouped_product_npu(rows, matrices, biases, ends)
    expected = grouped_product(
        rows.float(), matrices.float(), None if biases is None else biases.float(), ends
    ).to(dtype)
    # One rounding more or less, of a sum in another order.
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert calls == [{"group_list_type": 0, "group_type": 0, "split_item": 3}]
