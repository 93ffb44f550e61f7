"""float8 weights in Marlin's layout: bytes where its threads want them, scales for each row.

The bytes stand as codes of 8 bits do (`marlin_layout`). Scales are [E, G, O] and permuted as those
of integers are; a scale of the whole matrix is spread over its rows, and that of a block over the
block's rows, since a thread asks by row.

vLLM's kernel shifts a byte's bits into a half, where they mean less by a power of two: 2^8 of a
float16, 2^120 of a bfloat16. Its loader multiplies the scales by that, behind what is done here.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
B rows and columns of a block.
"""

import torch

from moe_reference.checks import check_tensor
from moe_reference.marlin_layout import (
    MarlinTensor,
    from_marlin_words,
    permute_scales,
    to_marlin_words,
)
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import QuantizedTensor


def to_marlin_float8(tensor: QuantizedTensor) -> MarlinTensor:
    """Repack e4m3 for Marlin.

    Args:
        tensor: e4m3 with a scale for the matrix, for each row, or for blocks.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: another format, or a shape that is not made of 64 x 16 tiles.

    Source: vLLM, marlin_utils_fp8.py.

    >>> bytes_ = torch.zeros(1, 64, 16).to(torch.float8_e4m3fn)
    >>> one = QuantizedTensor("e4m3", bytes_, torch.ones(1, 1, 1), shape=(1, 64, 16))
    >>> to_marlin_float8(one).scales.shape
    torch.Size([1, 1, 64])
    """
    check_quantized("tensor", tensor)
    if tensor.format != "e4m3":
        raise ValueError(f"tensor: expected the format 'e4m3', got {tensor.format!r}")
    assert tensor.scales is not None
    E, O, D = tensor.shape
    B = tensor.group_size
    codes_EOD = tensor.packed[:, :O, :D].contiguous().view(torch.uint8)
    qweight = to_marlin_words(codes_EOD, 8)
    scales_EOG = tensor.scales
    if B != -1:
        scales_EOG = scales_EOG.repeat_interleave(B, dim=1)[:, :, : -(-D // B)]
    rows_EOG = scales_EOG[:, :O].expand(E, O, scales_EOG.shape[2])
    scales_EGO = permute_scales(rows_EOG.transpose(1, 2))
    return MarlinTensor("e4m3", qweight, scales_EGO, None, None, None, B, tensor.shape)


def from_marlin_float8(marlin: MarlinTensor) -> QuantizedTensor:
    """The inverse of `to_marlin_float8`, with a scale for each row where there was one for all.

    Args:
        marlin: of format e4m3, qweight int32 and scales of any float dtype.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: another format, shapes that do not fit each other, or rows of a block that have
            different scales.

    >>> bytes_ = torch.ones(1, 64, 16).to(torch.float8_e4m3fn)
    >>> one = QuantizedTensor("e4m3", bytes_, torch.ones(1, 1, 1), shape=(1, 64, 16))
    >>> from_marlin_float8(to_marlin_float8(one)).scales.shape
    torch.Size([1, 64, 1])
    """
    if marlin.format != "e4m3":
        raise ValueError(f"marlin.format: expected 'e4m3', got {marlin.format!r}")
    E, O, D = marlin.shape
    B = marlin.group_size
    codes_EOD = from_marlin_words(marlin.qweight, 8)
    check_tensor("qweight's codes", codes_EOD, (E, O, D), (torch.uint8,))
    check_tensor("scales", marlin.scales, (E, 1 if B == -1 else -(-D // B), O))
    scales_EOG = permute_scales(marlin.scales).transpose(1, 2).contiguous()
    if B != -1:
        rows_EOG, scales_EOG = scales_EOG, scales_EOG[:, ::B].contiguous()
        spread_EOG = scales_EOG.repeat_interleave(B, dim=1)[:, :O]
        # NaN is not equal to itself, and a block may have it for a scale.
        same_EOG = (rows_EOG == spread_EOG) | (rows_EOG.isnan() & spread_EOG.isnan())
        if not same_EOG.all():
            raise ValueError("scales: expected the same for all rows of a block, got several")
    bytes_EOD = codes_EOD.view(torch.float8_e4m3fn)
    tensor = QuantizedTensor("e4m3", bytes_EOD, scales_EOG, group_size=B, shape=marlin.shape)
    check_quantized("marlin", tensor)
    return tensor
