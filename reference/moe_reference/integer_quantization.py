r"""Integers of 4 and 8 bits with a scale for each group of columns: uint4b8, uint8b128, uint4.

$$
w_{ok} = (q_{ok} - z_{o g(k)}) \, s_{o g(k)}, \qquad
z = 8 \text{ or } 128 \text{ (symmetric), or stored (uint4)}
$$

The group of column k is $g(k) = \lfloor k / \text{group\_size} \rfloor$, or `g_idx[k]`. GPTQ with
act-order quantises the columns in the order of their importance and makes groups in that order; the
columns then stand where they always stood, and `g_idx` says which group each is of.

From floats, round to nearest, ties to even, with the least scale that cuts nothing off:

- symmetric: the scale is the greater of max(w) / 7 and -min(w) / 8 (127 and 128 with 8 bits), so
  that the greatest of either sign fits.
- with zero points: the range is made to contain 0; the scale is (max - min) / 15 and the zero point
  round(-min / scale). A weight of 0 stays exactly 0.

The scale is rounded to the dtype that it is stored in before weights are divided by it. Where it is
0, a group of zeros, it is 1.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

import torch

from moe_reference.bit_packing import pack_words, unpack_words
from moe_reference.checks import FLOATS, check_count, check_tensor
from moe_reference.quantized_checks import check_finite, check_quantized, check_width
from moe_reference.quantized_tensors import INTEGER_BITS, FormatName, QuantizedTensor


def dequantize_integer(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that the codes stand for: one subtraction, which is exact, and one product.

    Args:
        packed: of format uint4b8, uint8b128 or uint4.

    Returns:
        [E, O, D], float32, or float64 where the scales are float64.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: another format, or parts that do not fit each other.

    Source: GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978); the names, vLLM's scalar types.

    >>> packed = pack_words(torch.tensor([[[0, 7, 8, 9, 15, 8, 8, 8]]]), bits=4)
    >>> one = QuantizedTensor("uint4b8", packed, torch.full((1, 1, 1), 0.5), shape=(1, 1, 8))
    >>> dequantize_integer(one).flatten().tolist()[:5]
    [-4.0, -0.5, 0.0, 0.5, 3.5]
    """
    codes_EOD = unpack_integer(packed).to(torch.int32)
    _, O, D = packed.shape
    assert packed.scales is not None
    wide = torch.promote_types(packed.scales.dtype, torch.float32)
    groups_EOD = column_groups(packed)[:, None, :].expand(-1, O, D)
    scales_EOD = packed.scales[:, :O].to(wide).gather(2, groups_EOD)
    if packed.zeros is None:
        zeros_EOD = torch.full_like(codes_EOD, 2 ** (INTEGER_BITS[packed.format] - 1))
    else:
        zeros_EOD = packed.zeros[:, :O].to(torch.int32).gather(2, groups_EOD)
    return (codes_EOD - zeros_EOD).to(wide) * scales_EOD


def unpack_integer(packed: QuantizedTensor) -> torch.Tensor:
    """The codes as they are, without zero points: [E, O, D], uint8.

    Arguments and errors are those of `dequantize_integer`.

    >>> words = torch.tensor([[[0x76543210]]], dtype=torch.int32)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 1, 1), shape=(1, 1, 8))
    >>> unpack_integer(one).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    check_quantized("packed", packed)
    _check_integer("packed", packed.format)
    _, O, D = packed.shape
    return unpack_words(packed.packed, INTEGER_BITS[packed.format])[:, :O, :D]


def column_groups(packed: QuantizedTensor) -> torch.Tensor:
    """The group of each column: [E, D], int64.

    Arguments and errors are those of `dequantize_integer`.

    >>> words, scales = torch.zeros(1, 1, 2, dtype=torch.int32), torch.ones(1, 1, 2)
    >>> one = QuantizedTensor("uint4b8", words, scales, group_size=8, shape=(1, 1, 16))
    >>> column_groups(one).flatten().tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    E, _, D = packed.shape
    if packed.g_idx is not None:
        return packed.g_idx[:, :D].to(torch.int64)
    columns_D = torch.arange(D, device=packed.packed.device)
    groups_D = columns_D * 0 if packed.group_size == -1 else columns_D // packed.group_size
    return groups_D.expand(E, D)


def quantize_integer(
    weight: torch.Tensor,
    format: FormatName,
    group_size: int = 128,
    g_idx: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """From floats, round to nearest; the scale as the head of the module says.

    Args:
        weight: [E, O, D], any float dtype, finite.
        format: uint4b8, uint8b128 or uint4.
        group_size: columns of a group; -1 for all of them.
        g_idx: int32 or int64 [E, D], the group of each column, or None: in order.
        scale_dtype: a float dtype, in which the scales are stored.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: another format, a weight that is not finite, a g_idx of the wrong shape, or D
            is not a multiple of the group or of the codes in a word.

    >>> weight = torch.tensor([[[-4.0, 3.5, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0]]])
    >>> dequantize_integer(quantize_integer(weight, "uint4b8", group_size=8)).flatten().tolist()[:4]
    [-4.0, 3.5, 0.0, 0.5]
    """
    check_tensor("weight", weight, ("E", "O", "D"))
    _check_integer("format", format)
    if group_size != -1:
        check_count("group_size", group_size, 1)
    check_width("weight", weight.shape[2], format, group_size)
    check_finite("weight", weight)
    if scale_dtype not in FLOATS:
        raise TypeError(f"scale_dtype: expected a float dtype, got {scale_dtype}")
    E, O, D = weight.shape
    bits = INTEGER_BITS[format]
    end, middle = 2**bits - 1, 2 ** (bits - 1)
    # The parts are made for the groups to be known; what they hold comes after.
    G = 1 if group_size == -1 else D // group_size
    empty = QuantizedTensor(
        format,
        torch.zeros(E, O, D * bits // 32, dtype=torch.int32, device=weight.device),
        torch.ones(E, O, G, dtype=scale_dtype, device=weight.device),
        torch.zeros(E, O, G, dtype=torch.uint8, device=weight.device)
        if format == "uint4"
        else None,
        g_idx,
        group_size=group_size,
        shape=(E, O, D),
    )
    check_quantized("weight", empty)
    weight_EOD = weight.to(torch.float32)
    groups_EOD = column_groups(empty)[:, None, :].expand(E, O, D)
    nothing_EOG = weight_EOD.new_zeros(E, O, G)
    low_EOG = nothing_EOG.scatter_reduce(2, groups_EOD, weight_EOD, "amin")
    high_EOG = nothing_EOG.scatter_reduce(2, groups_EOD, weight_EOD, "amax")
    if format == "uint4":
        scales_EOG = stored_scale((high_EOG - low_EOG) / end, scale_dtype)
        zeros_EOG = (-low_EOG / scales_EOG.to(torch.float32)).round().clamp(0, end)
    else:
        steps_EOG = torch.maximum(high_EOG / (end - middle), -low_EOG / middle)
        scales_EOG = stored_scale(steps_EOG, scale_dtype)
        zeros_EOG = torch.full_like(nothing_EOG, middle)
    steps_EOD = scales_EOG.to(torch.float32).gather(2, groups_EOD)
    codes_EOD = (weight_EOD / steps_EOD).round() + zeros_EOG.gather(2, groups_EOD)
    return QuantizedTensor(
        format,
        pack_words(codes_EOD.clamp(0, end).to(torch.uint8), bits),
        scales_EOG,
        zeros_EOG.to(torch.uint8) if format == "uint4" else None,
        g_idx,
        group_size=group_size,
        shape=(E, O, D),
    )


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale as it is stored: rounded, at most the greatest of its dtype, and 1 where it is 0.

    Args:
        scale: any shape, float32, at least 0.
        dtype: a float dtype.

    >>> stored_scale(torch.tensor([0.0, 1e9]), torch.float16).tolist()
    [1.0, 65504.0]
    """
    greatest = min(torch.finfo(dtype).max, torch.finfo(scale.dtype).max)
    stored = scale.clamp(max=greatest).to(dtype)
    return stored.where(stored != 0, torch.ones_like(stored))


def _check_integer(name: str, format: str) -> None:
    if format not in INTEGER_BITS:
        names = ", ".join(map(repr, INTEGER_BITS))
        raise ValueError(f"{name}: expected a format of {names}, got {format!r}")
