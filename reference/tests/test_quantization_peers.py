"""Codecs against those of compressed-tensors, torchao and gguf, at random and at the ends.

Bytes that a peer has packed are read here, and those packed here by the peer; the numbers must be
the same. Which scale is the best one is every project's own decision, so codes are compared with
the scale given:

- integers: the least scale that cuts nothing off here; compressed-tensors cuts half a step.
- float8: the same everywhere, but for zeros, whose scale is 1 here.
- mxfp4: torchao's FLOOR is the rule here; below 2^-124 it takes a scale of 2^-126 at least.
- nvfp4: torchao's block scales are at least 2^-6. Its encoder and compressed-tensors' divide in
  float32, that here in float64: what lies at the middle of two codes may go to either.

compressed-tensors unpacks 4-bit floats to bfloat16, and so are the numbers here, then.
"""

from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.bit_packing import pack_words, unpack_nibbles
from moe_reference.compressed_layouts import read_compressed
from moe_reference.float4 import E2M1, dequantize_float4, from_e8m0
from moe_reference.integer_quantization import column_groups, unpack_integer
from moe_reference.quantization import dequantize, quantize
from moe_reference.quantized_tensors import INTEGER_BITS, QuantizedTensor

some = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**31)
MIDDLES = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)]).double()


@pytest.fixture(scope="module")
def compressors():
    """The compressors of compressed-tensors by format, and what makes a scheme for them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def scheme(weights):
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))

    return BaseCompressor.get_value_from_registry, scheme


@pytest.fixture(scope="module")
def primitives():
    """What torchao's formats are made of: affine integers and float8."""
    pytest.importorskip("torchao")
    from torchao.quantization import quant_primitives

    return quant_primitives


def configuration(format, weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {"format": format, "config_groups": {"group_0": group}}


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def integers(format, O, groups, B, seed):
    """Weights off every tie by a tenth of a step at least, and how they are packed.

    The codes are all there are and random ones behind, with 0.4 of a step more or less.
    """
    bits, generator = INTEGER_BITS[format], drawn(seed)
    D = groups * B
    codes = torch.randint(0, 2**bits, (1, O, D), generator=generator)
    ends = torch.arange(min(2**bits, codes.numel()))
    codes.view(-1)[: len(ends)] = ends.flip(0) if seed % 2 else ends
    scales = torch.rand(1, O, groups, generator=generator) + 2.0 ** (seed % 17 - 8)
    zeros = torch.full((1, O, groups), 2 ** (bits - 1))
    if format == "uint4":
        zeros = torch.randint(0, 16, (1, O, groups), generator=generator)
        zeros.view(-1)[:2] = torch.tensor([0, 15])[: zeros.numel()]
    packed = QuantizedTensor(
        format,
        pack_words(codes, bits),
        scales,
        zeros.byte() if format == "uint4" else None,
        group_size=B,
        shape=(1, O, D),
    )
    of_columns = column_groups(packed)[:, None].expand(1, O, D)
    off = 0.8 * torch.rand(1, O, D, generator=generator) - 0.4
    steps = codes - zeros.gather(2, of_columns) + off
    return packed, steps * scales.gather(2, of_columns)


integer_cases = given(
    O=st.integers(1, 9), groups=st.integers(1, 3), words=st.integers(1, 3), seed=seeds
)


@pytest.mark.parametrize("format", INTEGER_BITS)
@some
@integer_cases
def test_integers_of_compressed_tensors(compressors, format, O, groups, words, seed):
    compressor, scheme = compressors
    bits = INTEGER_BITS[format]
    B = words * 32 // bits
    if format == "uint4":
        # compressed-tensors 0.20 does not read zero points that fill a single word.
        O += 8
    ours, weight = integers(format, O, groups, B, seed)
    symmetric = format != "uint4"
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": B,
    }  # fmt: skip
    how, codec = scheme(weights), compressor("pack-quantized")
    state = {"weight": weight[0], "weight_scale": ours.scales[0]}
    if not symmetric:
        state["weight_zero_point"] = (ours.zeros[0].int() - 8).to(torch.int8)
    theirs = codec.compress(state, how)
    assert torch.equal(theirs["weight_packed"], ours.packed[0])
    stored = {f"up.{name}": each for name, each in theirs.items()}
    read = read_compressed(stored, "up", configuration("pack-quantized", weights))
    assert torch.equal(read.packed, ours.packed)
    assert symmetric or torch.equal(read.zeros, ours.zeros)
    numbers = codec.decompress(theirs, how)["weight"]
    assert torch.equal(dequantize(read)[0], numbers)
    # The other way: words of ours, zero points along the rows, read by them.
    given_to_them = {**theirs, "weight_packed": ours.packed[0]}
    if not symmetric:
        padded = torch.nn.functional.pad(ours.zeros[0], (0, 0, 0, -O % 8))
        given_to_them["weight_zero_point"] = pack_words(padded.T, 4).T.contiguous()
    assert torch.equal(codec.decompress(given_to_them, how)["weight"], dequantize(ours)[0])


@pytest.mark.parametrize("format", INTEGER_BITS)
@some
@integer_cases
def test_integers_of_torchao(primitives, format, O, groups, words, seed):
    bits = INTEGER_BITS[format]
    ours, weight = integers(format, O, groups, words * 32 // bits, seed)
    zeros = torch.full_like(ours.scales, 2 ** (bits - 1)) if ours.zeros is None else ours.zeros
    block, scale, zero = (1, ours.group_size), ours.scales[0], zeros[0].int()
    ends = (torch.uint8, 0, 2**bits - 1)
    codes = primitives.quantize_affine(weight[0], block, scale, zero, *ends)
    assert torch.equal(codes, unpack_integer(ours)[0])
    numbers = primitives.dequantize_affine(codes, block, scale, zero, *ends)
    assert torch.equal(numbers, dequantize(ours)[0])


@pytest.mark.parametrize("format", INTEGER_BITS)
@some
@integer_cases
def test_codes_with_our_scales_are_theirs(primitives, format, O, groups, words, seed):
    B = words * 32 // INTEGER_BITS[format]
    weight = torch.randn(1, O, groups * B, generator=drawn(seed)) * 2.0 ** (seed % 17 - 8)
    ours = quantize(weight, format, group_size=B)
    middle = 2 ** (INTEGER_BITS[format] - 1)
    zeros = torch.full_like(ours.scales, middle) if ours.zeros is None else ours.zeros
    codes = primitives.quantize_affine(
        weight[0], (1, B), ours.scales[0], zeros[0].int(), torch.uint8, 0, 2 * middle - 1
    )
    # They multiply by the inverse, so that a middle may go either way.
    steps = weight / ours.scales.repeat_interleave(B, 2)
    apart = (steps - steps.floor() - 0.5).abs()[0] > 1e-4
    assert torch.equal(codes[apart], unpack_integer(ours)[0][apart])
    assert (codes.int() - unpack_integer(ours)[0].int()).abs().max() <= 1


STRATEGIES = {"tensor": (1, 1), "channel": (None, 1), "block": (None, None)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@some
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), B=st.integers(1, 6), seed=seeds)
def test_float8_of_both(compressors, primitives, strategy, rows, columns, B, seed):
    compressor, scheme = compressors
    O, D = rows * B, columns * B
    weight = torch.randn(1, O, D, generator=drawn(seed)) * 2.0 ** (seed % 60 - 30)
    ours = quantize(weight, "e4m3", granularity=strategy, block_size=B)
    scales = ours.scales[0]
    # The greatest of a scale is cut where the division rounds up, and more than it beyond.
    beyond = weight[0] * 1.5
    theirs = primitives._quantize_affine_float8(beyond, scales)
    wide = scales
    if strategy == "block":
        wide = scales.repeat_interleave(B, 0).repeat_interleave(B, 1)
    again = QuantizedTensor(
        "e4m3", theirs[None], ours.scales, group_size=ours.group_size, shape=ours.shape
    )
    assert (theirs.float().abs() <= 448).all()
    numbers = primitives._dequantize_affine_float8(theirs, scales)
    assert torch.equal(dequantize(again)[0], numbers)
    plain = primitives._quantize_affine_float8(weight[0], scales)
    assert torch.equal(plain.view(torch.uint8), ours.packed[0].view(torch.uint8))

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [B, B]
    how, codec = scheme(weights), compressor("float-quantized")
    stored = scales.reshape(1) if strategy == "tensor" else scales
    packed = codec.compress({"weight": beyond, "weight_scale": stored}, how)
    assert torch.equal(packed["weight"].view(torch.uint8), theirs.view(torch.uint8))
    named = {f"up.{name}": each for name, each in packed.items()}
    read = read_compressed(named, "up", configuration("float-quantized", weights))
    assert torch.equal(dequantize(read)[0], codec.decompress(packed, how)["weight"])
    mine = {"weight": ours.packed[0], "weight_scale": stored}
    assert torch.equal(codec.decompress(mine, how)["weight"], ours.packed[0].float() * wide)
    assert torch.equal(codec.decompress(mine, how)["weight"], dequantize(ours)[0])


def test_every_byte_of_float8(primitives):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((1, 1, 1), 0.75)
    ours = QuantizedTensor("e4m3", every.view(1, 1, 256), scales, shape=(1, 1, 256))
    theirs = primitives._dequantize_affine_float8(every.view(1, 256), scales[0])
    torch.testing.assert_close(dequantize(ours)[0], theirs, rtol=0, atol=0, equal_nan=True)


float4_cases = given(O=st.integers(1, 5), blocks=st.integers(1, 4), seed=seeds)


@some
@float4_cases
def test_mxfp4_of_torchao(primitives, O, blocks, seed):
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    E2M1_PAIR = torch.float4_e2m1fn_x2
    generator = drawn(seed)
    weight = torch.randn(O, 32 * blocks, generator=generator)
    weight *= torch.exp2(torch.randint(-100, 101, (O, 1), generator=generator).float())
    weight[0, :32] = 0.0
    ours = quantize(weight[None], "mxfp4")
    scales, packed = to_mx(weight, E2M1_PAIR, 32)
    assert torch.equal(scales.view(torch.uint8), ours.scales[0])
    assert torch.equal(packed, ours.packed[0])
    # Every byte may come, and every exponent with the NaN.
    packed = torch.randint(0, 256, (O, 16 * blocks), generator=generator).to(torch.uint8)
    scales = torch.randint(0, 256, (O, blocks), generator=generator).to(torch.uint8)
    scales[0, 0], scales[-1, -1] = (0, 254) if seed % 2 else (255, 1)
    read = QuantizedTensor(
        "mxfp4", packed[None], scales[None], group_size=32, shape=(1, *weight.shape)
    )
    theirs = to_dtype(packed, scales.view(torch.float8_e8m0fnu), E2M1_PAIR, 32, torch.float32)
    torch.testing.assert_close(dequantize(read)[0], theirs, rtol=0, atol=0, equal_nan=True)


def apart_from_middles(weight, steps):
    """Where the number in steps is at the middle of no two codes, nearly."""
    sizes = (weight.double() / steps.double()).abs()
    return ((sizes[..., None] - MIDDLES).abs() > 1e-5).all(-1)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@some
@float4_cases
def test_4_bit_floats_of_compressed_tensors(compressors, format, O, blocks, seed):
    compressor, scheme = compressors
    B = 32 if format == "mxfp4" else 16
    generator = drawn(seed)
    weight = torch.randn(O, B * blocks, generator=generator) * 2.0 ** (seed % 40 - 20)
    ours = quantize(weight[None], format)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": B}
    if format == "mxfp4":
        weights["strategy"], factor = "group", 1.0
        scales = from_e8m0(ours.scales[0]).float()
        state = {"weight": weight, "weight_scale": scales}
    else:
        # A power of two, so that its inverse, which they store, is exact.
        weights["strategy"] = "tensor_group"
        exponent = torch.frexp(ours.global_scale[0]).exponent
        factor = torch.exp2(exponent.float())
        scales = ours.scales[0].float()
        state = {"weight": weight, "weight_scale": scales, "weight_global_scale": 1 / factor}
    how, codec = scheme(weights), compressor(f"{format}-pack-quantized")
    theirs = codec.compress(state, how)
    shared = None if format == "mxfp4" else factor[None]
    stored_scales = theirs["weight_scale"]
    assert torch.equal(stored_scales.view(torch.uint8), ours.scales[0].view(torch.uint8))
    read = QuantizedTensor(
        format, theirs["weight_packed"][None], ours.scales, global_scale=shared, group_size=B,
        shape=ours.shape,
    )  # fmt: skip
    apart = apart_from_middles(weight, (scales * factor).repeat_interleave(B, 1))
    expected = quantize_codes(weight, scales * factor, B)
    assert torch.equal(unpack_nibbles(theirs["weight_packed"])[apart], expected[apart])
    if format == "mxfp4":
        named = {f"up.{name}": each for name, each in theirs.items()}
        stored = read_compressed(named, "up", configuration("mxfp4-pack-quantized", weights))
        assert torch.equal(stored.packed, read.packed)
        assert torch.equal(unpack_nibbles(ours.packed)[0][apart], expected[apart])
    # And what was packed here, unpacked by them.
    mine = {**theirs, "weight_packed": ours.packed[0]}
    for tensor, stored in ((read, theirs), (ours_with(ours, shared), mine)):
        numbers = codec.decompress(stored, how)["weight"]
        assert numbers.dtype is torch.bfloat16
        assert torch.equal(dequantize(tensor)[0].bfloat16(), numbers)


def ours_with(tensor, global_scale):
    return QuantizedTensor(
        tensor.format, tensor.packed, tensor.scales, global_scale=global_scale,
        group_size=tensor.group_size, shape=tensor.shape,
    )  # fmt: skip


def quantize_codes(weight, scales, B):
    """The nearest of sixteen values by looking at all of them; a zero keeps its sign."""
    sizes = (weight.double() / scales.double().repeat_interleave(B, 1)).abs()
    distances = (sizes[..., None] - torch.tensor(E2M1).double()).abs()
    return (distances.argmin(-1) + 8 * weight.signbit()).to(torch.uint8)


@some
@float4_cases
def test_nvfp4_of_torchao(primitives, O, blocks, seed):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize

    generator = drawn(seed)
    weight = torch.randn(O, 16 * blocks, generator=generator) * 2.0 ** (seed % 40 - 20)
    ours = quantize(weight[None], "nvfp4")
    shared = ours.global_scale[0, 0]
    scales, packed = nvfp4_quantize(weight, 16, shared)
    steps = (ours.scales[0].double() * shared.double()).repeat_interleave(16, 1)
    assert torch.equal(scales.view(torch.uint8), ours.scales[0].view(torch.uint8))
    apart = apart_from_middles(weight, steps)
    codes = unpack_nibbles(packed)
    assert torch.equal(codes[apart], unpack_nibbles(ours.packed)[0][apart])
    for bytes_, each in ((packed, scales), (ours.packed[0], ours.scales[0])):
        theirs = NVFP4Tensor(bytes_, each, 16, torch.float32, shared).dequantize()
        read = QuantizedTensor(
            "nvfp4", bytes_[None], each[None], global_scale=ours.global_scale, group_size=16,
            shape=ours.shape,
        )  # fmt: skip
        # They multiply the scales first, which is rounded once more.
        torch.testing.assert_close(dequantize(read)[0], theirs, rtol=2**-22, atol=0)


def test_blocks_of_nvfp4_of_gguf():
    gguf = pytest.importorskip("gguf")
    from gguf import quants

    # Four scales in front, then the halves of bytes of each 16, eight columns apart; no scale for
    # the whole. Scales have no sign, and the NaN is a 0 there.
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(4, 64)
    scales = torch.tensor([[1, 7, 8, 0x38], [0x40, 0x7E, 0x39, 0], [2, 3, 4, 5], [64, 65, 66, 67]])
    blocks = torch.cat([scales.byte(), every[:, :32]], 1)
    theirs = quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.NVFP4)
    halves = every[:, :32].view(4, 4, 8)
    codes = torch.cat([halves & 15, halves >> 4], 2).view(1, 4, 64)
    ours = QuantizedTensor(
        "nvfp4",
        codes[..., 0::2] | codes[..., 1::2] << 4,
        scales.byte().view(torch.float8_e4m3fn)[None],
        global_scale=torch.ones(1, 1),
        group_size=16,
        shape=(1, 4, 64),
    )
    assert numpy.array_equal(dequantize_float4(ours)[0].numpy(), theirs)
