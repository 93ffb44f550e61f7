r"""float8_e4m3fn weights: 8-bit floats with a scale per tensor, per channel or per block.

$$ w_{ok} = q_{ok} \, s, \qquad q = (-1)^{b_7} \, 2^{e - 7} \, (1 + m / 8) $$

with 4 bits of exponent e and 3 of mantissa m (e = 0: $2^{-6} \, m / 8$). The greatest number is
448. There is no infinity; the two codes with all other bits set, 0x7f and 0xff, are NaN.

The scale multiplies, whatever a checkpoint calls it (DeepSeek's `weight_scale_inv` is no inverse).
It is one for the whole matrix (*tensor*), for each row (*channel*), or for each block of 128 rows
by 128 columns (*block*); blocks at the edges may be smaller.

From floats: scale = greatest absolute value / 448, float32; round to nearest, ties to even. What is
above 448 after the division is cut to 448, and NaN stays NaN. A plain conversion may do otherwise:
some cut, some make NaN of it, and some another number.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), B rows and columns
of a block.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from moe_reference.checks import check_count, check_float, check_tensor
from moe_reference.integer_quantization import stored_scale
from moe_reference.quantized_checks import check_finite, check_quantized
from moe_reference.quantized_tensors import QuantizedTensor

Granularity = Literal["tensor", "channel", "block"]

E4M3_MAX = 448.0


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to float8_e4m3fn; what is too great becomes ±448, and NaN stays NaN.

    Args:
        x: any shape and float dtype.

    Raises:
        TypeError: not a float tensor.

    >>> to_e4m3(torch.tensor([1.0, 1.06, -1e9, float("nan")])).tolist()
    [1.0, 1.0, -448.0, nan]
    """
    check_float("x", x)
    return x.to(torch.float32).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize_e4m3(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that the bytes stand for.

    Args:
        packed: of format e4m3.

    Returns:
        [E, O, D], float32, or float64 where the scales are float64; NaN where a byte is NaN.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: another format, or parts that do not fit each other.

    Source: Micikevicius et al. (arXiv 2209.05433); blocks, DeepSeek-V3 (arXiv 2412.19437).

    >>> bytes_ = torch.tensor([[[0x38, 0x7E, 0x7F]]], dtype=torch.uint8)
    >>> one = QuantizedTensor(
    ...     "e4m3", bytes_.view(torch.float8_e4m3fn), torch.full((1, 1, 1), 2.0), shape=(1, 1, 3))
    >>> dequantize_e4m3(one).flatten().tolist()
    [2.0, 896.0, nan]
    """
    check_quantized("packed", packed)
    if packed.format != "e4m3":
        raise ValueError(f"packed: expected the format 'e4m3', got {packed.format!r}")
    assert packed.scales is not None
    _, O, D = packed.shape
    wide = torch.promote_types(packed.scales.dtype, torch.float32)
    scales = packed.scales.to(wide)
    if packed.group_size != -1:
        B = packed.group_size
        scales = scales.repeat_interleave(B, dim=1).repeat_interleave(B, dim=2)
    rows = scales if scales.shape[1] == 1 else scales[:, :O]
    factors = rows if rows.shape[2] == 1 else rows[:, :, :D]
    return packed.packed[:, :O, :D].to(wide) * factors


def quantize_e4m3(
    weight: torch.Tensor, granularity: Granularity = "block", block_size: int = 128
) -> QuantizedTensor:
    """From floats, with scales of float32.

    Args:
        weight: [E, O, D], any float dtype, finite.
        granularity: what shares a scale.
        block_size: B, of blocks.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a weight that is not finite, or there is no such granularity.

    >>> one = quantize_e4m3(torch.tensor([[[1.0, -2.0], [0.5, 0.25]]]), "channel")
    >>> one.packed.float().tolist()
    [[[224.0, -448.0], [448.0, 224.0]]]
    """
    check_tensor("weight", weight, ("E", "O", "D"))
    check_finite("weight", weight)
    if granularity not in get_args(Granularity):
        choices = ", ".join(map(repr, get_args(Granularity)))
        raise ValueError(f"granularity: expected one of {choices}, got {granularity!r}")
    check_count("block_size", block_size, 1)
    E, O, D = weight.shape
    weight_EOD = weight.to(torch.float32)
    greatest = weight_EOD.abs()
    if granularity == "block":
        B = block_size
        padded = F.pad(greatest, (0, -D % B, 0, -O % B))
        greatest = padded.unflatten(1, (-(-O // B), B)).unflatten(3, (-(-D // B), B))
        greatest = greatest.amax(dim=(2, 4))
    elif weight.numel() == 0:
        greatest = weight_EOD.new_zeros(E, O if granularity == "channel" else 1, 1)
    else:
        dims = (1, 2) if granularity == "tensor" else (2,)
        greatest = greatest.amax(dim=dims, keepdim=True)
    scales = stored_scale(greatest / E4M3_MAX, torch.float32)
    factors = scales
    if granularity == "block":
        factors = scales.repeat_interleave(block_size, dim=1).repeat_interleave(block_size, dim=2)
        factors = factors[:, :O, :D]
    return QuantizedTensor(
        "e4m3",
        to_e4m3(weight_EOD / factors),
        scales,
        group_size=block_size if granularity == "block" else -1,
        shape=(E, O, D),
    )
