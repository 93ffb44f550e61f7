"""What codes stand for, and how they are made from floats, format by format.

Expected bytes were written down from gguf 0.19 and torchao 0.18 (mxfp4, nvfp4), or are worked by
hand.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.bit_packing import pack_words
from moe_reference.float4 import E2M1, from_e2m1, from_e8m0, to_e2m1
from moe_reference.float8 import to_e4m3
from moe_reference.gguf_blocks import round_half_away
from moe_reference.integer_quantization import unpack_integer
from moe_reference.quantization import FORMATS, dequantize, packed_bytes, quantize
from moe_reference.quantized_tensors import QuantizedTensor

# The numbers that the bytes below were made from: eighths from -6.25 to 6.25.
EIGHTHS = ((torch.arange(64) * 37 % 101) - 50).float().view(1, 1, 64) / 8
OPTIONS = [
    ("uint4b8", {"group_size": 32}),
    ("uint4b8", {"group_size": -1}),
    ("uint4b8", {"group_size": 16, "scale_dtype": torch.float16}),
    ("uint8b128", {"group_size": 32}),
    ("uint4", {"group_size": 32}),
    ("uint4", {"group_size": 64, "scale_dtype": torch.bfloat16}),
    ("e4m3", {"granularity": "tensor"}),
    ("e4m3", {"granularity": "channel"}),
    ("e4m3", {"block_size": 48}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("Q8_0", {}),
    ("Q8_1", {}),
    ("Q4_K", {}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in OPTIONS]


def random_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8).view(1, 1, -1)


def hex_of(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


# integers


@pytest.mark.parametrize(
    ("format", "bits", "middle"), [("uint4b8", 4, 8), ("uint8b128", 8, 128), ("uint4", 4, None)]
)
def test_every_code_of_every_group(format, bits, middle):
    codes = torch.arange(2**bits).expand(2, 3, -1)
    D = 2**bits
    scales = torch.tensor([0.5, 3.0, 0.125])[None, :, None].expand(2, 3, 2) * torch.tensor([1.0, 7])
    zeros = torch.tensor([0, 7, 16]).byte()[None, :, None].expand(2, 3, 2)
    tensor = QuantizedTensor(
        format,
        pack_words(codes, bits),
        scales,
        zeros if middle is None else None,
        group_size=D // 2,
        shape=(2, 3, D),
    )
    read = dequantize(tensor)
    assert read.dtype == torch.float32
    for o in range(3):
        for q in range(D):
            zero = int(zeros[0, o, 0]) if middle is None else middle
            assert read[1, o, q].item() == (q - zero) * scales[0, o, q * 2 // D].item()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("format", ["uint4", "uint8b128", "e4m3"])
def test_there_is_one_rounding(format, dtype):
    """The product of a code and its scale in float64 is exact; float32 is that, rounded once."""
    weight = random_weight(2, 3, 64)
    if format == "e4m3":
        packed = quantize(weight, format, granularity="channel")
        codes = packed.packed.double()
    else:
        packed = quantize(weight, format, group_size=-1)
        codes = unpack_integer(packed).double()
        codes -= 128 if packed.zeros is None else packed.zeros.double()
    scales = (torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
    read = dequantize(replace(packed, scales=scales))
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(read, (codes * scales.double()).to(read.dtype))


def test_columns_of_g_idx_take_the_scale_and_zero_point_of_their_group():
    codes, g_idx = torch.arange(8).expand(1, 1, 8), torch.tensor([[2, 0, 1, 1, 0, 2, 2, 0]])
    scales, zeros = torch.tensor([[[1.0, 10.0, 100.0]]]), torch.tensor([[[0, 1, 2]]]).byte()
    words = pack_words(codes, 4)
    tensor = QuantizedTensor("uint4", words, scales, zeros, g_idx, group_size=8, shape=(1, 1, 8))
    expected = [-200.0, 1.0, 10.0, 20.0, 4.0, 300.0, 400.0, 7.0]
    assert dequantize(tensor).flatten().tolist() == expected


def test_scales_are_the_least_that_cut_nothing_off():
    weight = torch.tensor([-4.0, 3.0, 0.0, 1.0, 0.25, 0.75, 0.0, 0.0]).view(1, 1, 8)
    for format, scale in [("uint4b8", 0.5), ("uint8b128", 1 / 32)]:
        assert quantize(weight, format, group_size=8).scales.item() == scale
    # 3 / 7 is more than 2 / 8.
    other = torch.tensor([-2.0, 3.0, *[0.0] * 6]).view(1, 1, 8)
    assert quantize(other, "uint4b8", group_size=8).scales.item() == pytest.approx(3 / 7)
    packed = quantize(weight, "uint4b8", group_size=8)
    # 0.25 / 0.5 and 0.75 / 0.5 are ties: to 0 and to 2.
    assert hex_of(packed.packed) == "e0a8" + "a8" + "88"
    ranged = quantize(torch.tensor([-1.0, 14.0, *[0.0] * 6]).view(1, 1, 8), "uint4", group_size=8)
    assert (ranged.scales.item(), ranged.zeros.item()) == (1.0, 1)


@pytest.mark.parametrize("format", ["uint4b8", "uint8b128", "uint4"])
def test_groups_of_g_idx_are_quantised_as_groups_in_order(format):
    weight, order = random_weight(1, 3, 64), torch.randperm(64)
    plain = dequantize(quantize(weight, format, group_size=16))
    g_idx = (torch.arange(64) // 16)[order][None]
    shuffled = dequantize(quantize(weight[:, :, order], format, group_size=16, g_idx=g_idx))
    assert torch.equal(shuffled, plain[:, :, order])


# every format

HALF_STEPS = {
    # Half of one step of so many from the greatest number to 0, a little more for the scale's own
    # rounding: 2^-8 with bfloat16, times the 15 steps that it multiplies.
    "uint4b8": (1 / 2 + 7 * 2**-11) / 7,
    "uint8b128": (1 / 2 + 127 * 2**-20) / 127,
    "uint4": (1 / 2 + 15 * 2**-9) * 2 / 15,
    # Between 256 and 448 neighbours are 32 apart.
    "e4m3": (16 + 2**-10) / 448,
    # Between 4 and 6 they are 2 apart; mxfp4 cuts all from 6 to 8.
    "mxfp4": 2 / 8,
    # The scale is rounded, too: a step is up to 1/16 more.
    "nvfp4": 1 / 6 * (1 + 1 / 16),
    "Q8_0": (1 / 2 + 127 * 2**-11) / 127,
    "Q8_1": (1 / 2 + 127 * 2**-11) / 127,
    # 15 steps from the least to the greatest; scales and minima are off by half of 1 / 63.
    "Q4_K": (1 / 2 / 15 + 1 / 2 / 63) * 2 + 1 / 2 / 63 + 2**-8,
}
"""The greatest error, as a part of the greatest number that shares the scale."""


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
@settings(deadline=None, max_examples=12)
@given(E=st.integers(0, 2), O=st.integers(0, 3), blocks=st.integers(0, 2), size=st.integers(-6, 6))
def test_the_error_is_at_most_half_a_step(format, options, E, O, blocks, size):
    weight = random_weight(E, O, 256 * blocks) * 2.0**size
    packed = quantize(weight, format, **options)
    read = dequantize(packed)
    assert read.shape == weight.shape
    if weight.numel() == 0:
        return
    shares_all = options.get("granularity") == "tensor" or "block_size" in options
    greatest = weight.abs().amax(dim=(1, 2) if shares_all else 2, keepdim=True)
    assert ((read - weight).abs() <= HALF_STEPS[format] * greatest).all()


# But Q4_K: the range of a group is not always used up, and would be taken anew.
@pytest.mark.parametrize(("format", "options"), OPTIONS[:-1], ids=IDS[:-1])
def test_quantising_what_was_quantised_changes_nothing_more(format, options):
    once = dequantize(quantize(random_weight(2, 4, 512), format, **options))
    again = dequantize(quantize(once, format, **options))
    # Scales are computed anew from the greatest number: a rounding of float32, or of their dtype.
    eps = torch.finfo(options.get("scale_dtype", torch.float32)).eps
    eps = 2**-10 if format.startswith("Q8") else 2**-3 if format == "nvfp4" else max(eps, 2**-21)
    assert ((once - again).abs() <= eps * once.abs()).all()


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
def test_zeros_stay_zeros(format, options):
    packed = quantize(torch.zeros(1, 2, 256), format, **options)
    assert torch.equal(dequantize(packed), torch.zeros(1, 2, 256))


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
def test_quantising_neither_changes_nor_aliases_its_input(format, options):
    weight = random_weight(1, 2, 256)
    before = weight.clone()
    packed = quantize(weight, format, **options)
    first = dequantize(packed)
    first.zero_()
    assert torch.equal(weight, before)
    assert not torch.equal(dequantize(packed), first)


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
def test_each_expert_is_quantised_on_its_own(format, options):
    weight = random_weight(3, 4, 256) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    whole = dequantize(quantize(weight, format, **options))
    alone = [dequantize(quantize(weight[e : e + 1], format, **options)) for e in range(3)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
def test_what_stands_in_the_padding_changes_nothing(format, options):
    packed = quantize(random_weight(1, 8, 512), format, **options)
    O, D = 5, 300
    inner = replace(packed, shape=(1, O, D))
    expected = dequantize(packed)[:, :O, :D]
    assert torch.equal(dequantize(inner), expected)
    dirty = {"packed": packed.packed.clone()}
    dirty["packed"].view(torch.uint8)[:, O:] = 0xFF
    step = FORMATS[format].values
    kept = -(-D // step) * FORMATS[format].elements
    dirty["packed"].view(torch.uint8)[:, :, kept * packed.packed.element_size() :] = 0xFF
    for name in ("scales", "zeros"):
        part = getattr(packed, name)
        if part is not None and part.shape[1] == 8:
            dirty[name] = part.clone()
            dirty[name].view(torch.uint8)[:, O:] = 0x0F if name == "zeros" else 0xFF
    assert torch.equal(dequantize(replace(inner, **dirty)), expected)


def test_padded_columns_of_g_idx_are_not_looked_at():
    g_idx = torch.arange(64)[None] // 16
    packed = quantize(random_weight(1, 2, 64), "uint4b8", group_size=16, g_idx=g_idx)
    dirty = packed.g_idx.clone()
    dirty[:, 40:] = 10**6
    inner = replace(packed, g_idx=dirty, shape=(1, 2, 40))
    assert torch.equal(dequantize(inner), dequantize(packed)[:, :, :40])


def test_bytes_by_format():
    weight = random_weight(1, 8, 256)
    per_weight = {
        "mxfp4": 4.25, "nvfp4": 4.5 + 32 / 2048, "Q8_0": 8.5, "Q8_1": 9, "Q4_K": 4.5,
    }  # fmt: skip
    for format, bits in per_weight.items():
        assert packed_bytes(quantize(weight, format)) * 8 == bits * weight.numel()
    half = {"group_size": 128, "scale_dtype": torch.float16}
    assert packed_bytes(quantize(weight, "uint4b8", **half)) * 8 == 4.125 * weight.numel()


# 8-bit floats


def test_every_byte_of_e4m3():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 1, 256)
    tensor = QuantizedTensor(
        "e4m3", every.view(torch.float8_e4m3fn), torch.full((1, 1, 1), 2.0), shape=(1, 1, 256)
    )
    for byte, number in enumerate(dequantize(tensor).flatten().tolist()):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        if exponent == 15 and mantissa == 7:
            assert math.isnan(number)
            continue
        size = 2.0 ** max(exponent - 7, -6) * ((exponent > 0) + mantissa / 8)
        assert number == (-2 if byte & 128 else 2) * size


def test_e4m3_at_its_ends():
    numbers = [448.0, 449.0, 465.0, 1e30, math.inf, math.nan, -449.0, -math.inf, 2**-9, 2**-10]
    expected = ["7e", "7e", "7e", "7e", "7e", "7f", "fe", "fe", "01", "00"]
    codes = to_e4m3(torch.tensor(numbers)).view(torch.uint8).tolist()
    assert [f"{code & 0x7F:02x}" if math.isnan(n) else f"{code:02x}"
            for code, n in zip(codes, numbers, strict=True)] == expected  # fmt: skip


def test_the_three_granularities_of_e4m3():
    weight = torch.ones(1, 4, 6)
    weight[0, :2, :4], weight[0, 2:, :4], weight[0, :2, 4:], weight[0, 3, 5] = 2.0, 4.0, 8.0, 16.0
    scales = {
        "tensor": [[16.0]],
        "channel": [[8.0], [8.0], [4.0], [16.0]],
        "block": [[2.0, 8.0], [4.0, 16.0]],
    }
    for granularity, expected in scales.items():
        packed = quantize(weight[:, :, :6], "e4m3", granularity=granularity, block_size=4)
        if granularity == "block":
            packed = quantize(weight[:, [0, 1, 1, 1, 2, 3]], "e4m3", block_size=4)
        assert (packed.scales[0] * 448).tolist() == expected
    # A block of 4 x 4, and what is left of the blocks at the edges.
    assert packed.scales.shape == (1, 2, 2)


# 4-bit floats


def test_every_code_of_e2m1():
    values = from_e2m1(torch.arange(16).byte())
    assert values[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert torch.equal(values[8:], -values[:8])
    assert to_e2m1(values).tolist() == list(range(16))


@given(st.floats(-20, 20, width=32))
def test_e2m1_is_the_nearest_value(number):
    nearest = from_e2m1(to_e2m1(torch.tensor([number]))).item()
    least = min(abs(abs(number) - value) for value in E2M1)
    assert abs(number - nearest) == least


def test_ties_of_e2m1_go_to_the_even_code():
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
    assert to_e2m1(middles).tolist() == [0, 2, 2, 4, 4, 6, 6]
    with pytest.raises(ValueError, match="x: expected no NaN"):
        to_e2m1(torch.tensor([math.nan]))


def test_mxfp4_is_what_torchao_makes():
    packed = quantize(EIGHTHS, "mxfp4")
    assert hex_of(packed.scales) == "7f7f"
    assert hex_of(packed.packed) == (
        "bfe5692ec7f45a0ed6724cafe6613dc7f5692ed7f45b8ee6724cafe6603dc7f5"
    )


def test_nvfp4_is_what_torchao_makes():
    packed = quantize(EIGHTHS, "nvfp4")
    assert packed.global_scale.item() == float.fromhex("0x1.30c30cp-9")
    assert hex_of(packed.scales) == "7e7e7d7e"
    assert hex_of(packed.packed) == (
        "bfe5692ec7f45a0ed6724cafe6613db7f5692ed7f45b8ee6724cafe5603dc7f5"
    )


def test_exponents_at_their_ends():
    ends = torch.tensor([0, 127, 254, 255]).byte()
    assert from_e8m0(ends)[:3].tolist() == [2.0**-127, 1.0, 2.0**127]
    packed = torch.full((1, 1, 64), 0x71, dtype=torch.uint8)
    tensor = QuantizedTensor("mxfp4", packed, ends.view(1, 1, 4), group_size=32, shape=(1, 1, 128))
    read = dequantize(tensor).view(4, 32)[:, :2].tolist()
    # 6 · 2^127 is more than float32 holds.
    assert read[:3] == [[2.0**-128, 6 * 2.0**-127], [0.5, 6.0], [2.0**126, math.inf]]
    assert all(map(math.isnan, read[3]))
    greatest = torch.full((1, 1, 32), torch.finfo(torch.float32).max)
    assert dequantize(quantize(greatest, "mxfp4")).unique().tolist() == [6 * 2.0**125]
    least = torch.full((1, 1, 32), 2.0**-149)
    assert dequantize(quantize(least, "mxfp4")).unique().tolist() == [0.0]


def test_a_global_scale_for_each_row():
    packed = quantize(random_weight(2, 4, 32), "nvfp4")
    rows = packed.global_scale.expand(2, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    read = dequantize(replace(packed, global_scale=rows.contiguous()))
    factors = torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None]
    assert torch.equal(read, dequantize(packed) * factors)


# GGUF


def test_q8_0_is_what_gguf_makes():
    expected = (
        "4d2a81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc"
        "2c2a3c96f656b0106fca2984e3439efd5db71777d1318beb4ba50565bf1f7fd93993"
    )
    assert hex_of(quantize(EIGHTHS, "Q8_0").packed) == expected


def test_q8_1_by_hand():
    # d = 254 / 127 = 2 (float16 0x4000); the codes are 127, -3, 2 (from 1.5, a tie) and zeros.
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, :3] = torch.tensor([254.0, -6.0, 3.0])
    packed = quantize(weight, "Q8_1")
    # s = 2 · (127 - 3 + 2) = 252 (float16 0x5be0).
    assert hex_of(packed.packed) == "0040" + "e05b" + "7ffd02" + "00" * 29
    assert dequantize(packed)[0, 0, :4].tolist() == [254.0, -6.0, 4.0, 0.0]


def q4_k_block():
    """d = 0.5, d' = 0.25, then bytes that count up in steps of 89."""
    block = torch.arange(144) * 89 % 256
    block[:4] = torch.tensor([0x00, 0x38, 0x00, 0x34])
    return block.to(torch.uint8).view(1, 1, 144)


def test_q4_k_is_what_gguf_reads():
    tensor = QuantizedTensor("Q4_K", q4_k_block(), group_size=256, shape=(1, 1, 256))
    read = dequantize(tensor).flatten()
    assert read[[0, 1, 2]].tolist() == [-2.0, 160.0, 34.0]
    assert read[[32, 33, 34]].tolist() == [266.25, 418.75, 113.75]
    assert read[[128, 129, 130]].tolist() == [-12.5, 113.5, 15.5]
    assert read[[160, 161, 162]].tolist() == [238.5, 35.0, 146.0]
    assert read[[253, 254, 255]].tolist() == [-12.75, 44.75, 113.75]
    assert read.double().sum().item() == 30896.0


def test_q4_k_codes_by_hand():
    # Groups 0 to 7 hold k · (0 to 15 twice) - k: steps k and minima k, the greatest 7.
    steps = torch.arange(8.0)
    weight = (steps[:, None] * (torch.arange(32.0) % 16 - 1)).view(1, 1, 256)
    packed = quantize(weight, "Q4_K").packed.flatten().tolist()
    # d = d' = 7 / 63; scales and minima are 0, 9, 18, 27 and 36, 45, 54, 63.
    assert packed[:4] == [0x1C, 0x2F, 0x1C, 0x2F]
    assert packed[4:8] == [0x80, 0x80 | 9, 0xC0 | 18, 0xC0 | 27]
    assert packed[8:12] == packed[4:8]
    assert packed[12:16] == [0x44, 0xDD, 0x66, 0xFF]
    # A group without a range has the code 0; in the others, each number is its own code.
    assert packed[16:48] == [code << 4 for code in range(16)] * 2
    assert packed[48:80] == [code << 4 | code for code in range(16)] * 2


@given(st.floats(-1000, 1000, width=32))
def test_a_half_goes_away_from_zero(number):
    expected = math.copysign(math.floor(abs(number) + 0.5), number)
    assert round_half_away(torch.tensor([number], dtype=torch.float64)).item() == expected


# what cannot be


@pytest.mark.parametrize(
    ("format", "columns", "options", "reason"),
    [
        ("uint4b8", 12, {"group_size": -1}, "multiple of 8 columns, one word of uint4b8, got 12"),
        ("uint8b128", 6, {"group_size": -1}, "multiple of 4 columns, one word of uint8b128"),
        ("uint4", 40, {"group_size": 16}, "multiple of 16 columns, the group of uint4, got 40"),
        ("mxfp4", 48, {}, "multiple of 32 columns, the block of mxfp4, got 48"),
        ("nvfp4", 24, {}, "multiple of 16 columns, the block of nvfp4, got 24"),
        ("Q8_0", 16, {}, "multiple of 32 columns, the block of Q8_0, got 16"),
        ("Q8_1", 33, {}, "multiple of 32 columns, the block of Q8_1, got 33"),
        ("Q4_K", 128, {}, "multiple of 256 columns, the block of Q4_K, got 128"),
    ],
)
def test_sizes_that_a_format_cannot_hold_are_refused(format, columns, options, reason):
    with pytest.raises(ValueError, match=f"weight: expected a {reason}"):
        quantize(torch.ones(1, 2, columns), format, **options)


@pytest.mark.parametrize(("format", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(format, options, wrong):
    weight = torch.ones(1, 2, 256)
    weight[0, 1, 7] = wrong
    with pytest.raises(ValueError, match="weight: expected finite numbers, got 1"):
        quantize(weight, format, **options)


def good(format="uint4"):
    options = {"uint4": {"group_size": 16}, "e4m3": {"block_size": 4}}.get(format, {})
    return quantize(random_weight(2, 8, 64), format, **options)


@pytest.mark.parametrize(
    ("tensor", "changes", "error", "message"),
    [
        ("uint4", {"format": "int4"}, ValueError, "packed.format: expected one of 'uint4b8'"),
        ("uint4", {"packed": torch.zeros(2, 8, 8)}, TypeError, "packed.packed: .* int32"),
        ("uint4", {"scales": None}, TypeError, "packed.scales: expected a tensor, got NoneType"),
        ("uint4", {"scales": torch.ones(2, 8, 3)}, ValueError, r"packed.scales: .* \[2, 8, 4\]"),
        ("uint4", {"scales": torch.ones(2, 4, 8)}, ValueError, r"packed.scales: .* \[2, 8, 4\]"),
        ("uint4", {"scales": torch.ones(2, 8, 4).int()}, TypeError, "packed.scales: .* got int32"),
        ("uint4", {"zeros": None}, TypeError, "packed.zeros: expected a tensor"),
        ("uint4", {"zeros": torch.ones(2, 8, 4)}, TypeError, "packed.zeros: .* uint8"),
        ("uint4", {"zeros": torch.full((2, 8, 4), 17).byte()}, ValueError, "zeros: .* got 17"),
        ("uint4b8", {"zeros": torch.ones(2, 8, 4).byte()}, ValueError, "zeros: expected None with"),
        ("uint4", {"g_idx": torch.zeros(2, 32).int()}, ValueError, r"g_idx: .* \[2, 64\]"),
        ("uint4", {"g_idx": torch.full((2, 64), 4)}, ValueError, "g_idx: .* 0 to 3, .* got 4"),
        ("uint4", {"g_idx": torch.full((2, 64), -1)}, ValueError, "g_idx: .* 0 to 3, .* got -1"),
        ("uint4", {"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
        ("uint4", {"group_size": 24}, ValueError, "multiple of 24 columns, the group"),
        ("uint4", {"shape": (2, 9, 64)}, ValueError, r"packed.shape: .* got \(2, 9, 64\)"),
        ("uint4", {"shape": (2, 8, 65)}, ValueError, "packed.shape"),
        ("uint4", {"shape": (1, 8, 64)}, ValueError, "packed.shape"),
        ("mxfp4", {"group_size": 16}, ValueError, "group_size: expected 32, which mxfp4 fixes"),
        ("mxfp4", {"scales": torch.ones(2, 8, 2)}, TypeError, "packed.scales: .* uint8"),
        ("mxfp4", {"g_idx": torch.zeros(2, 64).int()}, ValueError, "g_idx: expected None"),
        ("mxfp4", {"global_scale": torch.ones(2, 1)}, ValueError, "global_scale: expected None"),
        ("nvfp4", {"global_scale": None}, TypeError, "global_scale: expected a tensor"),
        ("nvfp4", {"global_scale": torch.ones(2, 3)}, ValueError, "global_scale: .* 1 or 8"),
        ("nvfp4", {"scales": torch.ones(2, 8, 4).byte()}, TypeError, "scales: .* float8_e4m3fn"),
        ("e4m3", {"scales": torch.ones(2, 8, 16)}, ValueError, r"scales: .* \[2, 2, 16\]"),
        ("e4m3", {"group_size": -1, "scales": torch.ones(2, 3, 1)}, ValueError, "1 or 8 rows"),
        ("Q8_0", {"packed": torch.zeros(2, 8, 35).byte()}, ValueError, "whole blocks of 34 bytes"),
        ("Q8_0", {"scales": torch.ones(2, 8, 2)}, ValueError, "scales: expected None with Q8_0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tensor, changes, error, message):
    base = good("uint4") if tensor == "uint4b8" else good(tensor)
    if tensor == "uint4b8":
        changes = {"format": "uint4b8", **changes}
    with pytest.raises(error, match=message):
        dequantize(replace(base, **changes))


def test_other_wrong_arguments_are_named():
    weight = torch.ones(1, 2, 256)
    for call, error, message in [
        (lambda: dequantize(3), TypeError, "packed: expected a QuantizedTensor, got int"),
        (lambda: quantize(weight, "int3"), ValueError, "format: expected one of"),
        (lambda: quantize(weight, "mxfp4", group_size=8), TypeError, "options: .* group_size"),
        (lambda: quantize(weight, "e4m3", granularity="row"), ValueError, "granularity: .* 'row'"),
        (lambda: quantize(weight[0], "mxfp4"), ValueError, "weight: expected shape"),
        (lambda: quantize(weight.int(), "Q8_0"), TypeError, "weight: expected dtype"),
        (lambda: quantize(weight, "uint4", scale_dtype=torch.int8), TypeError, "scale_dtype"),
        (lambda: quantize(weight * 1e8, "Q8_0"), ValueError, "weight: .* fits into float16"),
    ]:
        with pytest.raises(error, match=message):
            call()
