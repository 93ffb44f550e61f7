"""Slices of packed experts stand for the numbers that slices of the unpacked experts hold."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.expert_slicing import (
    assign_experts,
    slice_experts,
    slice_tensor_parallel,
    take_experts,
)
from moe_reference.experts import experts
from moe_reference.packed_slicing import take_packed, take_packed_columns, take_packed_rows
from moe_reference.quantization import dequantize, quantize, quantize_experts
from moe_reference.quantized_experts import dequantize_experts, experts_quantized
from moe_reference.quantized_slicing import (
    slice_quantized_experts,
    slice_quantized_tensor_parallel,
    take_quantized_experts,
)

# Format, options, and the columns or rows of I that cannot be parted.
FORMATS = [
    ("uint4b8", {"group_size": 16}, 16),
    ("uint4b8", {"group_size": -1}, 8),
    ("uint8b128", {"group_size": -1}, 4),
    ("uint4", {"group_size": 32}, 32),
    ("e4m3", {"granularity": "tensor"}, 1),
    ("e4m3", {"granularity": "channel"}, 1),
    ("e4m3", {"block_size": 16}, 16),
    ("mxfp4", {}, 32),
    ("nvfp4", {}, 16),
    ("Q8_0", {}, 32),
    ("Q8_1", {}, 32),
    ("Q4_K", {}, 256),
]
NAMES = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options, _ in FORMATS]
# Where a slice that is quantised on its own has the same scales: no two ranks share one.
COMMUTING = [
    each for each in FORMATS
    if each[1].get("group_size") != -1 and "granularity" not in each[1] and each[0] != "nvfp4"
]  # fmt: skip


def random_weights(E=3, I=256, H=256, gated=True, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    J = 2 * I if gated else I
    parts = [torch.randn(*shape, generator=generator)
             for shape in ((E, J, H), (E, H, I), (E, J), (E, H))]  # fmt: skip
    return ExpertWeights(*(parts if bias else parts[:2]))


def assert_same_weights(one, other):
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.is_contiguous(), name
            assert torch.equal(a, b), name


def random_g_idx(E, D, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(D, generator=generator) for _ in range(E)])
    return (places // group_size).to(torch.int32)


# by experts


@pytest.mark.parametrize(("format", "options", "unit"), FORMATS, ids=NAMES)
def test_unpacking_and_taking_experts_commute(format, options, unit):
    packed = quantize_experts(random_weights(), format, **options)
    whole = dequantize_experts(packed)
    for held in ([2, 0], [1], [], [0, 0, 1]):
        part = take_quantized_experts(packed, held)
        assert_same_weights(dequantize_experts(part), take_experts(whole, held))
    part = slice_quantized_experts(packed, 1, 2)
    assert_same_weights(dequantize_experts(part), slice_experts(whole, 1, 2))


def test_g_idx_and_activation_scales_go_with_their_experts():
    g_idx = random_g_idx(3, 64, 16)
    base = quantize_experts(random_weights(I=64, H=64), "uint4b8", group_size=16, g_idx=g_idx)
    scales = torch.arange(6.0).view(3, 2)
    packed = replace(base, activation_format="int8", activation_scales=scales)
    part = take_quantized_experts(packed, [2, 1])
    assert torch.equal(part.down.g_idx, g_idx[[2, 1]])
    assert torch.equal(part.activation_scales, scales[[2, 1]])
    assert part.activation_format == "int8"
    assert_same_weights(dequantize_experts(part), take_experts(dequantize_experts(packed), [2, 1]))


# tensor-parallel


@pytest.mark.parametrize(("format", "options", "unit"), FORMATS, ids=NAMES)
@settings(deadline=None, max_examples=10)
@given(
    units=st.integers(1, 3),
    world_size=st.integers(1, 4),
    gated=st.booleans(),
    bias=st.booleans(),
    data=st.data(),
)
def test_unpacking_and_slicing_commute_or_the_cut_is_refused(
    format, options, unit, units, world_size, gated, bias, data
):
    rank = data.draw(st.integers(0, world_size - 1))
    I = unit * units if unit > 1 else 8 * units
    weights = random_weights(2, I, 256, gated, bias, seed=units)
    packed = quantize_experts(weights, format, **options)
    start, count = assign_experts(I, world_size, rank)
    if count and (start % unit or (start + count) % unit):
        with pytest.raises(ValueError, match=r"expected (a multiple of|rows that begin and end)"):
            slice_quantized_tensor_parallel(packed, world_size, rank)
        return
    part = slice_quantized_tensor_parallel(packed, world_size, rank)
    expected = slice_tensor_parallel(dequantize_experts(packed, gated), world_size, rank)
    assert part.is_k_full
    assert_same_weights(dequantize_experts(part, gated), expected)


@pytest.mark.parametrize(("format", "options", "unit"), COMMUTING)
@settings(deadline=None, max_examples=6)
@given(world_size=st.integers(1, 3), each=st.integers(1, 2), data=st.data())
def test_quantising_and_slicing_commute(format, options, unit, world_size, each, data):
    rank = data.draw(st.integers(0, world_size - 1))
    I = max(unit, 8) * each * world_size
    assume(I <= 1024)
    weights = random_weights(1, I, 256)
    first = slice_quantized_tensor_parallel(
        quantize_experts(weights, format, **options), world_size, rank
    )
    last = quantize_experts(slice_tensor_parallel(weights, world_size, rank), format, **options)
    for name in ("gate_up", "down"):
        one, other = getattr(first, name), getattr(last, name)
        assert one.shape == other.shape
        for part in ("packed", "scales", "zeros"):
            a, b = getattr(one, part), getattr(other, part)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_where_ranks_share_a_scale_they_do_not_commute():
    weights = random_weights(1, 16, 16)
    weights.down[0, 0, 0] = 100.0
    whole = quantize_experts(weights, "uint4b8", group_size=-1)
    part = slice_quantized_tensor_parallel(whole, 2, 1)
    alone = quantize(slice_tensor_parallel(weights, 2, 1).down, "uint4b8", group_size=-1)
    assert part.down.scales[0, 0].item() > 10 * alone.scales[0, 0].item()


@pytest.mark.parametrize("format", ["uint4b8", "uint8b128", "uint4"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_columns_with_g_idx_keep_all_scales(format, world_size):
    E, I, H = 2, 96, 32
    weights = random_weights(E, I, H)
    g_idx = random_g_idx(E, I, 16)
    packed = quantize_experts(weights, format, group_size=16)
    packed = replace(packed, down=quantize(weights.down, format, group_size=16, g_idx=g_idx))
    whole, config = dequantize_experts(packed), ExpertsConfig()
    x, ids = torch.randn(5, H, dtype=torch.float64), torch.randint(0, E, (5, 2))
    router = torch.rand(5, 2, dtype=torch.float64)
    total = torch.zeros_like(x)
    for rank in range(world_size):
        part = slice_quantized_tensor_parallel(packed, world_size, rank)
        assert part.is_k_full == (world_size == 1)
        assert torch.equal(part.down.scales, packed.down.scales)
        start, count = assign_experts(I, world_size, rank)
        assert torch.equal(part.down.g_idx, g_idx[:, start : start + count])
        expected = slice_tensor_parallel(whole, world_size, rank)
        assert_same_weights(dequantize_experts(part), expected)
        total += experts_quantized(x, part, router, ids, config)
        if world_size > 1:
            with pytest.raises(ValueError, match="since is_k_full is True"):
                dequantize_experts(replace(part, is_k_full=True))
    # Float64 sums of 96 in another order.
    assert torch.allclose(total, experts(x, whole, router, ids, config), rtol=1e-11, atol=1e-11)


def test_columns_with_g_idx_may_be_fewer_than_a_group():
    g_idx = random_g_idx(2, 64, 32)
    packed = quantize(torch.randn(2, 8, 64), "uint4b8", group_size=32, g_idx=g_idx)
    part = take_packed_columns(packed, 8, 16)
    assert torch.equal(dequantize(part), dequantize(packed)[..., 8:16])


def test_ranks_past_i_get_a_width_of_0():
    packed = quantize_experts(random_weights(1, 8, 32), "uint4b8", group_size=8)
    with pytest.raises(ValueError, match="a word of uint4b8 ends"):
        slice_quantized_tensor_parallel(packed, 9, 0)
    part = slice_quantized_tensor_parallel(packed, 9, 8)
    assert part.down.shape == (1, 32, 0)
    y = experts_quantized(torch.ones(1, 32), replace(part, down_bias=None), torch.ones(1, 1),
                          torch.zeros(1, 1).int(), ExpertsConfig())  # fmt: skip
    assert torch.equal(y, torch.zeros(1, 32))


def test_a_block_that_holds_gate_and_up_cannot_be_cut():
    # 24 rows of gate: the second block of 16 holds the last of them and the first of up.
    packed = quantize_experts(random_weights(1, 24, 32), "e4m3", block_size=16)
    for rank in range(2):
        with pytest.raises(ValueError, match="a block of 16"):
            slice_quantized_tensor_parallel(packed, 2, rank)


# parts


@pytest.mark.parametrize(("format", "options", "unit"), FORMATS, ids=NAMES)
def test_padding_is_cut_off_or_goes_with_the_last_columns(format, options, unit):
    tensor = quantize(random_weights(I=512).down, format, **options)
    inner = replace(tensor, shape=(3, 200, 300))
    whole = dequantize(inner)
    begin = unit * (-(-20 // unit)) if unit <= 32 else 256
    part = take_packed_columns(inner, begin, 300)
    assert torch.equal(dequantize(part), whole[:, :, begin:])
    rows = take_packed_rows(inner, [(0, 32), (48, 200)])
    assert torch.equal(dequantize(rows), torch.cat([whole[:, :32], whole[:, 48:]], dim=1))
    assert torch.equal(dequantize(take_packed(inner, [2, 2])), whole[[2, 2]])


def test_rows_of_a_global_scale_for_each_row():
    tensor = quantize(random_weights().down, "nvfp4")
    rows = tensor.global_scale * torch.linspace(1, 2, 256)
    tensor = replace(tensor, global_scale=rows)
    part = take_packed_rows(tensor, [(3, 5), (100, 200)])
    expected = dequantize(tensor)
    assert torch.equal(dequantize(part), torch.cat([expected[:, 3:5], expected[:, 100:200]], 1))


def test_a_slice_is_a_copy():
    packed = quantize_experts(random_weights(), "uint4", group_size=32)
    before = dequantize_experts(packed)
    for part in (
        slice_quantized_tensor_parallel(packed, 1, 0),
        slice_quantized_experts(packed, 0, 3),
    ):
        for tensor in (part.gate_up, part.down):
            for name in ("packed", "scales", "zeros"):
                getattr(tensor, name).zero_()
        part.down_bias.fill_(math.nan)
    assert_same_weights(dequantize_experts(packed), before)


@pytest.mark.parametrize(
    ("format", "options", "start", "stop", "message"),
    [
        ("uint4b8", {"group_size": 32}, 8, 32, "start: .* multiple of 32, where a group"),
        ("uint4b8", {"group_size": 32}, 0, 24, "stop: .* multiple of 32, where a group"),
        ("uint4b8", {"group_size": 4}, 4, 16, "start: .* multiple of 8, where a word"),
        ("mxfp4", {}, 16, 64, "start: .* multiple of 32, where a block"),
        ("Q4_K", {}, 0, 128, "stop: .* multiple of 256, where a block"),
        ("e4m3", {"block_size": 16}, 8, 256, "start: .* multiple of 16, where a block"),
        ("mxfp4", {}, 32, 257, "stop: expected a column from 32 to 256, got 257"),
        ("mxfp4", {}, 32, 0, "stop: expected a column from 32 to 256, got 0"),
    ],
)
def test_cuts_through_a_group_a_block_or_a_word_are_refused(format, options, start, stop, message):
    tensor = quantize(random_weights().down, format, **options)
    with pytest.raises(ValueError, match=message):
        take_packed_columns(tensor, start, stop)


def test_other_wrong_arguments_are_named():
    packed = quantize_experts(random_weights(), "uint4", group_size=32)
    for call, error, message in [
        (lambda: take_packed_rows(packed.down, [(0, 257)]), ValueError, "ranges: .* 0 to 256"),
        (lambda: take_packed_rows(packed.down, [(5, 4)]), ValueError, "ranges"),
        (lambda: take_packed(packed.down, [3]), ValueError, "held"),
        (lambda: take_packed(packed, [0]), TypeError, "tensor: expected a QuantizedTensor"),
        (lambda: take_quantized_experts(packed.down, [0]), TypeError, "experts"),
        (lambda: slice_quantized_experts(packed, 2, 2), ValueError, "held"),
        (lambda: slice_quantized_experts(packed, -1, 2), ValueError, "start"),
        (lambda: slice_quantized_tensor_parallel(packed, 2, 2), ValueError, "rank"),
        (lambda: slice_quantized_tensor_parallel(packed, 0, 0), ValueError, "world_size"),
    ]:
        with pytest.raises(error, match=message):
            call()
