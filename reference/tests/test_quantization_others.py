"""Codecs of other projects, where they are installed: the same bytes, the same numbers."""

import pytest
import torch
from moe_reference.float4 import from_e2m1
from moe_reference.quantization import dequantize, quantize
from moe_reference.quantized_tensors import QuantizedTensor


def random_weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", ["Q8_0", "Q4_K", "MXFP4"])
def test_gguf_agrees(format):
    gguf = pytest.importorskip("gguf")
    from gguf import quants

    kind = gguf.GGMLQuantizationType[format]
    weight = random_weight(2, 5, 512) * torch.logspace(-3, 2, 5)[None, :, None]
    weight[0, 0, :32] = 0.0
    packed = quantize(weight, format.lower() if format == "MXFP4" else format)
    if format == "Q4_K":
        # gguf reads it, and does not make it.
        assert torch.equal(
            dequantize(packed), torch.tensor(quants.dequantize(packed.packed.numpy(), kind))
        )
        return
    theirs = torch.tensor(quants.quantize(weight.numpy(), kind))
    if format == "Q8_0":
        assert torch.equal(packed.packed, theirs)
        assert torch.equal(
            dequantize(packed), torch.tensor(quants.dequantize(theirs.numpy(), kind))
        )
        return
    # A block of llama.cpp's has the exponent in front, and halves a half block apart.
    blocks = theirs.view(2, 5, 16, 17)
    assert torch.equal(packed.scales, blocks[..., 0])
    codes = torch.cat([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], dim=-1)
    ours = torch.stack([packed.packed & 15, packed.packed >> 4], dim=-1).view(2, 5, 16, 32)
    # It has one zero, without a sign.
    assert torch.equal(from_e2m1(ours), from_e2m1(codes))


def test_transformers_reads_the_same_mxfp4():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 150, (2, 6, 3), generator=generator).to(torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    tensor = QuantizedTensor("mxfp4", blocks.flatten(2), scales, group_size=32, shape=(2, 6, 96))
    assert torch.equal(dequantize(tensor), theirs.transpose(1, 2))
