"""Quantised experts are experts of the unpacked weights, and 8-bit rows are rounded as they say."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import experts, experts_batched, init_experts
from moe_reference.quantization import dequantize, quantize, quantize_experts
from moe_reference.quantized_experts import (
    dequantize_experts,
    experts_batched_quantized,
    experts_quantized,
)
from moe_reference.quantized_tensors import QuantizedExperts

H, I, E = 256, 256, 3
FORMATS = [
    ("uint4b8", {"group_size": 64}),
    ("uint8b128", {"group_size": -1}),
    ("uint4", {"group_size": 32}),
    ("e4m3", {}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("Q8_0", {}),
    ("Q4_K", {}),
]
NAMES = [name for name, _ in FORMATS]


def random_experts(format="uint4", options=None, gated=True, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = init_experts(E, H, I, gated, bias, generator)
    options = {"group_size": 32} if options is None and format == "uint4" else options or {}
    return quantize_experts(made, format, **options)


def random_inputs(tokens=5, top_k=2, num_experts=E, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    return x, weights, ids


# weights alone


@pytest.mark.parametrize(("format", "options"), FORMATS, ids=NAMES)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("bias", [False, True])
def test_they_are_experts_of_the_unpacked_weights(format, options, weight_on, bias):
    packed = random_experts(format, options, bias=bias)
    config = ExpertsConfig(weight_on=weight_on)
    unpacked = ExpertWeights(
        dequantize(packed.gate_up),
        dequantize(packed.down),
        packed.gate_up_bias,
        packed.down_bias,
    )
    inputs = random_inputs()
    expected = experts(inputs[0], unpacked, inputs[1], inputs[2], config)
    assert torch.equal(experts_quantized(inputs[0], packed, *inputs[1:], config), expected)
    assert expected.abs().max() > 0


@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 6),
    top_k=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu", "relu2", "swigluoai"]),
    mapped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ids_maps_and_dtypes_are_those_of_experts(tokens, top_k, dtype, activation, mapped, seed):
    gated = activation == "swigluoai" or seed % 2 == 0
    packed = random_experts(gated=gated)
    config = ExpertsConfig(activation, gated=gated)
    expert_map = torch.tensor([2, -1, 0, 1, -1]) if mapped else None
    x, weights, ids = random_inputs(tokens, top_k, 5 if mapped else E, dtype, seed)
    if tokens:
        # Not here, whatever the weight.
        ids[0, 0], weights[0, 0] = -1, math.nan
    unpacked = dequantize_experts(packed, gated)
    expected = experts(x, unpacked, weights, ids, config, expert_map)
    y = experts_quantized(x, packed, weights, ids, config, expert_map)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("format", "options"), FORMATS, ids=NAMES)
def test_the_batched_form(format, options):
    packed = random_experts(format, options)
    x = random_inputs(E * 4)[0].view(E, 4, H)
    counts = torch.tensor([4, 0, 2])
    x[2, 2:] = math.nan
    config = ExpertsConfig(weight_on="input")
    y = experts_batched_quantized(x, counts, packed, config)
    assert torch.equal(y, experts_batched(x, counts, dequantize_experts(packed), config))
    assert (y[1] == 0).all()
    assert (y[2, 2:] == 0).all()


def test_gradients_are_those_of_experts_and_zero_where_nothing_is_routed():
    packed, config = random_experts(), ExpertsConfig()
    x, weights, ids = random_inputs()
    grads = []
    for call, with_ in ((experts_quantized, packed), (experts, dequantize_experts(packed))):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        call(leaves[0], with_, leaves[1], ids, config).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    x.requires_grad_()
    experts_quantized(x, packed, weights, torch.full_like(ids, -1), config).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_inputs_are_not_changed_and_a_bad_token_changes_no_other():
    packed, config = random_experts(), ExpertsConfig()
    for format in (None, "int8", "e4m3"):
        asked = replace(packed, activation_format=format)
        x, weights, ids = random_inputs()
        expected = experts_quantized(x, asked, weights, ids, config)
        before = x.clone()
        x[1] = math.inf
        x[3, 0] = math.nan
        y = experts_quantized(x, asked, weights, ids, config)
        assert torch.equal(y[[0, 2, 4]], expected[[0, 2, 4]])
        assert torch.equal(x[[0, 2, 4]], before[[0, 2, 4]])


# partial K


def test_groups_must_be_full_unless_is_k_full_is_false():
    options = {"group_size": 32}
    packed = random_experts("uint4b8", options)
    g_idx = torch.arange(I).flip(0).expand(E, I) // 32
    down = replace(packed.down, g_idx=g_idx)
    config, inputs = ExpertsConfig(), random_inputs()
    ordered = replace(packed, down=down)
    expected = experts(inputs[0], dequantize_experts(ordered), *inputs[1:], config)
    y = experts_quantized(inputs[0], ordered, *inputs[1:], config)
    assert torch.equal(y, expected)
    assert not torch.equal(y, experts_quantized(inputs[0], packed, *inputs[1:], config))

    lopsided = g_idx.clone()
    lopsided[1, 0] = 0
    wrong = replace(packed, down=replace(down, g_idx=lopsided))
    with pytest.raises(ValueError, match=r"experts\.down\.g_idx: .* since is_k_full is True"):
        experts_quantized(inputs[0], wrong, *inputs[1:], config)
    partial = replace(wrong, is_k_full=False)
    unpacked = dequantize_experts(partial)
    y = experts_quantized(inputs[0], partial, *inputs[1:], config)
    assert torch.equal(y, experts(inputs[0], unpacked, *inputs[1:], config))
    # The columns of gate_up are whole on every rank.
    wrong = replace(partial, gate_up=replace(packed.gate_up, g_idx=lopsided))
    with pytest.raises(ValueError, match=r"experts\.gate_up\.g_idx: .* whatever is_k_full says"):
        experts_quantized(inputs[0], wrong, *inputs[1:], config)


# 8-bit activations


def test_int8_rows_by_hand():
    rows = torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.01, 0.03, 1]])
    read = round_activations(rows, "int8")
    assert read[0].tolist() == [127.0, -64.0, 0.0, 2.0]
    assert read[1].tolist() == [0.0] * 4
    expected = torch.tensor([-127.0, 0.0, 2.0, 50.0]) * (torch.tensor(2.54) / 127)
    assert torch.equal(read[2], expected)
    static = round_activations(rows, "int8", scale=torch.tensor(0.25))
    assert static[0].tolist() == [31.75, -31.75, 0.5, 1.5]


def test_float8_rows_by_hand():
    rows = torch.tensor([[448.0, 17.0, 18.9, -447.0], [7.0, 1.0, 0.0, 3.5]])
    assert round_activations(rows, "e4m3").tolist() == [
        [448.0, 16.0, 18.0, -448.0],
        [7.0, 1.0, 0.0, 3.5],
    ]
    static = round_activations(rows, "e4m3", scale=torch.tensor(0.25))
    # 448 / 4 is the greatest number there is.
    assert static[0].tolist() == [112.0, 16.0, 18.0, -112.0]


def test_blocks_of_a_row_have_scales_of_their_own():
    rows = torch.tensor([[448.0, 17.0, 0.4375, 1 / 64, 3.0]])
    # Blocks of two, and the one that is left.
    blocks = round_activations(rows, "e4m3_block", block_size=2).tolist()
    assert blocks == [[448.0, 16.0, 0.4375, 1 / 64, 3.0]]
    wide = torch.zeros(1, 64)
    wide[0, 0], wide[0, 1], wide[0, 32] = 127.0, 0.5, 1.27
    q8_1 = round_activations(wide, "Q8_1")
    # A half goes away from zero; 1.27 / 127 is rounded to float16, and 127 of that are read.
    assert q8_1[0, [0, 1]].tolist() == [127.0, 1.0]
    assert q8_1[0, 32].item() == 127 * torch.tensor(0.01, dtype=torch.float16).item()


@pytest.mark.parametrize("format", ["int8", "e4m3", "e4m3_block", "Q8_1"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_rows_are_rounded_before_each_product(format, weight_on):
    options = {"block_size": 64} if format == "e4m3_block" else {"granularity": "channel"}
    packed = replace(random_experts("e4m3", options), activation_format=format)
    config = ExpertsConfig("gelu", weight_on=weight_on)
    x, weights, ids = random_inputs(tokens=3, top_k=1)
    unpacked = dequantize_experts(packed)
    expected = torch.zeros_like(x)
    for t in range(3):
        e = int(ids[t, 0])
        if not 0 <= e < E:
            continue
        row = x[t : t + 1] * (weights[t] if weight_on == "input" else 1)
        first = round_activations(row, format, 64) @ unpacked.gate_up[e].T
        hidden = activate(first + unpacked.gate_up_bias[e], config)
        out = round_activations(hidden, format, 64) @ unpacked.down[e].T + unpacked.down_bias[e]
        expected[t] = out * (weights[t] if weight_on == "output" else 1)
    y = experts_quantized(x, packed, weights, ids, config)
    # Float32 sums of 256 products in another order; a hidden number at a tie may go the other way,
    # which is a 128th of the greatest: the seed has none.
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    plain = experts_quantized(x, replace(packed, activation_format=None), weights, ids, config)
    assert not torch.allclose(y, plain, rtol=1e-5, atol=1e-5)
    # Batched and by token alike.
    counts = torch.tensor([1, 1, 1])
    batch = experts_batched_quantized(x.view(3, 1, H), counts, packed, config).view(3, H)
    own = experts_quantized(x, packed, torch.ones(3, 1), torch.arange(3)[:, None], config)
    assert torch.equal(batch, own)


def test_static_scales_belong_to_an_expert_and_a_product():
    base = random_experts("uint8b128", {"group_size": -1}, gated=False, bias=False)
    config = ExpertsConfig("relu", gated=False)
    scales = torch.tensor([[0.5, 1.0], [0.25, 2.0], [1.0, 0.5]])
    packed = replace(base, activation_format="int8", activation_scales=scales)
    x = torch.randn(3, H, generator=torch.Generator().manual_seed(0)) * 20
    y = experts_quantized(x, packed, torch.ones(3, 1), torch.arange(3)[:, None], config)
    unpacked = dequantize_experts(base, gated=False)
    for e in range(3):
        rows = round_activations(x[e : e + 1], "int8", scale=scales[e, 0])
        hidden = (rows @ unpacked.gate_up[e].T).relu()
        hidden = round_activations(hidden, "int8", scale=scales[e, 1])
        assert torch.allclose(y[e : e + 1], hidden @ unpacked.down[e].T, rtol=1e-5, atol=1e-4)


def test_a_row_that_is_not_finite():
    rows = torch.tensor([[1.0, math.nan], [1.0, math.inf], [1.0, 2.0]])
    for format in ("int8", "e4m3"):
        read = round_activations(rows, format)
        assert read[:2].isnan().all()
        assert torch.equal(read[2:], round_activations(rows[2:], format))
        static = round_activations(rows, format, scale=torch.tensor(0.5))
        assert static[0].isnan().tolist() == [False, True]
        assert static[1, 1].item() == (63.5 if format == "int8" else 224.0)


def test_rounded_rows_have_no_gradient():
    packed = replace(random_experts(), activation_format="int8")
    x, weights, ids = random_inputs()
    x.requires_grad_(), weights.requires_grad_()
    experts_quantized(x, packed, weights, ids, ExpertsConfig()).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert weights.grad.abs().max() > 0


# what cannot be


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"down": None}, TypeError, r"experts\.down: expected a QuantizedTensor"),
        ({"gate_up_bias": torch.ones(E, 3)}, ValueError, r"experts\.gate_up_bias"),
        ({"down_bias": torch.ones(E, 3)}, ValueError, r"experts\.down_bias"),
        ({"activation_format": "int4"}, ValueError, "activation_format: expected one of 'int8'"),
        ({"activation_format": "e4m3_block"}, ValueError, "expected weights with blocks"),
        ({"activation_scales": torch.ones(E, 2)}, ValueError, "activation_scales: expected None"),
        (
            {"activation_format": "int8", "activation_scales": torch.ones(E)},
            ValueError,
            r"activation_scales: .* \[3, 2\]",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, error, message):
    packed = random_experts("uint8b128", {"group_size": -1})
    with pytest.raises(error, match=message):
        experts_quantized(random_inputs()[0], replace(packed, **changes), *random_inputs()[1:],
                          ExpertsConfig())  # fmt: skip


def test_other_wrong_arguments_are_named():
    packed, config = random_experts(), ExpertsConfig()
    x, weights, ids = random_inputs()
    unpacked = dequantize_experts(packed)
    for call, error, message in [
        (lambda: experts_quantized(x, unpacked, weights, ids, config), TypeError, "experts"),
        (lambda: experts_quantized(x[:, 1:], packed, weights, ids, config), ValueError, "down"),
        (lambda: experts_quantized(x, packed, weights[1:], ids, config), ValueError, "weights"),
        (lambda: experts_quantized(x, packed, weights, ids.float(), config), TypeError, "ids"),
        (
            lambda: experts_quantized(x, packed, weights, ids, ExpertsConfig(gated=False)),
            ValueError,
            "gate_up",
        ),
        (
            lambda: experts_batched_quantized(x[:4, None], torch.ones(4).int(), packed, config),
            ValueError,
            "x",
        ),
        (
            lambda: experts_batched_quantized(x[:3, None], torch.full((3,), 2), packed, config),
            ValueError,
            "tokens_per_expert",
        ),
        (lambda: round_activations(x, "int4"), ValueError, "format"),
        (lambda: round_activations(x.int(), "int8"), TypeError, "x"),
        (lambda: round_activations(x, "Q8_1", scale=torch.ones(())), ValueError, "scale"),
        (lambda: round_activations(x[:, :33], "Q8_1"), ValueError, "x: .* multiple of 32"),
    ]:
        with pytest.raises(error, match=message):
            call()
    wide = quantize(torch.ones(E, 2 * I, H * 2), "uint4", group_size=32)
    with pytest.raises(ValueError, match=r"experts\.gate_up\.shape"):
        experts_quantized(x, replace(packed, gate_up=wide), weights, ids, config)
    assert isinstance(packed, QuantizedExperts)
