r"""GGUF blocks: codes and their scales side by side, byte for byte as llama.cpp stores them.

    Q8_0, 34 bytes for 32 numbers:  d float16 | 32 codes int8                       w = d q
    Q8_1, 36 bytes for 32 numbers:  d float16 | s float16 | 32 codes int8           w = d q
    Q4_K, 144 bytes for 256:        d float16 | d' float16 | 12 bytes | 128 bytes   w = d a q - d' m

The s of Q8_1 is d times the sum of the codes. A product with weights that have a minimum needs it.

Q4_K has 8 groups of 32 numbers, each with a scale a and a minimum m of 6 bits. The 12 bytes hold
them; with j from 0 to 3:

    byte j       two high bits of a[j + 4] | six bits of a[j]
    byte j + 4   two high bits of m[j + 4] | six bits of m[j]
    byte j + 8   four low bits of m[j + 4] | four low bits of a[j + 4]

The 128 bytes are four runs of 32: the codes of two groups each, the first one in the low halves.

From floats. Q8_0 and Q8_1: d = greatest absolute value / 127, codes rounded to nearest, ties away
from zero, as llama.cpp does it, with the d before it is rounded to float16. Q4_K: for each group
a range from min(w, 0) to max(w) in 15 steps; d and d' such that the greatest a and m is 63; then
all codes to nearest. (llama.cpp also searches for a range with a smaller error. Its codes differ,
what they mean does not.)

Dimension key: E experts, O rows of a matrix (out), G blocks of columns, B numbers in a block, D
columns of a matrix (in).
"""

import torch

from moe_reference.checks import check_tensor
from moe_reference.quantized_checks import check_finite, check_quantized, check_width
from moe_reference.quantized_tensors import FORMATS, FormatName, QuantizedTensor

HALF_MAX = 65504.0


def dequantize_gguf(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that the blocks stand for.

    Args:
        packed: of format Q8_0, Q8_1 or Q4_K.

    Returns:
        [E, O, D], float32.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: another format, or parts that do not fit each other.

    Source: llama.cpp's ggml-common.h and ggml-quants.c.

    >>> block = torch.tensor([0x00, 0x3C, *range(32)], dtype=torch.uint8)
    >>> one = QuantizedTensor("Q8_0", block.view(1, 1, 34), group_size=32, shape=(1, 1, 32))
    >>> dequantize_gguf(one).flatten().tolist()[-2:]
    [30.0, 31.0]
    """
    check_quantized("packed", packed)
    _check_gguf("packed", packed.format)
    _, O, D = packed.shape
    width = FORMATS[packed.format].elements
    blocks = packed.packed.unflatten(2, (packed.packed.shape[2] // width, width))
    if packed.format == "Q4_K":
        numbers = _q4_k_numbers(blocks)
    else:
        codes = blocks[..., width - 32 :].contiguous().view(torch.int8)
        numbers = _halves(blocks, 0) * codes
    return numbers.flatten(2)[:, :O, :D].contiguous()


def quantize_gguf(weight: torch.Tensor, format: FormatName) -> QuantizedTensor:
    """From floats; scales and rounding as the head of the module says.

    Args:
        weight: [E, O, D], any float dtype, finite, D a multiple of 32 (Q4_K: 256).
        format: Q8_0, Q8_1 or Q4_K.

    Raises:
        TypeError: not a float tensor.
        ValueError: another format, D that is not a multiple of the block, or a weight that is not
            finite or needs a scale above 65504, the greatest float16.

    >>> weight = torch.linspace(-127, 124.0, 32).view(1, 1, 32)
    >>> quantize_gguf(weight, "Q8_0").packed.flatten().tolist()[:4]
    [0, 60, 129, 137]
    """
    check_tensor("weight", weight, ("E", "O", "D"))
    _check_gguf("format", format)
    check_width("weight", weight.shape[2], format)
    check_finite("weight", weight)
    B = FORMATS[format].values
    blocks_EOGB = weight.to(torch.float32).unflatten(2, (weight.shape[2] // B, B))
    blocks = _q4_k_blocks(blocks_EOGB) if format == "Q4_K" else _q8_blocks(blocks_EOGB, format)
    return QuantizedTensor(
        format,
        blocks.flatten(2),
        group_size=FORMATS[format].group or B,
        shape=tuple(weight.shape),  # type: ignore[arg-type]
    )


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    """The nearest integer, a half away from zero, as C's roundf.

    Args:
        x: any shape and float dtype.

    >>> round_half_away(torch.tensor([0.5, 1.5, -0.5, 0.49999997])).tolist()
    [1.0, 2.0, -1.0, 0.0]
    """
    whole = x.abs().floor()
    # x + 0.5 would be rounded itself.
    return (whole + (x.abs() - whole >= 0.5)).copysign(x)


def _q8_blocks(numbers_EOGB: torch.Tensor, format: str) -> torch.Tensor:
    d_EOG1 = numbers_EOGB.abs().amax(dim=3, keepdim=True) / 127
    inverse_EOG1 = torch.where(d_EOG1 > 0, 1 / d_EOG1, 0.0)
    codes_EOGB = round_half_away(numbers_EOGB * inverse_EOG1).to(torch.int8)
    parts = [_half_bytes(d_EOG1)]
    if format == "Q8_1":
        parts.append(_half_bytes(d_EOG1 * codes_EOGB.sum(dim=3, keepdim=True)))
    return torch.cat([*parts, codes_EOGB.view(torch.uint8)], dim=3)


def _q4_k_blocks(numbers_EOGB: torch.Tensor) -> torch.Tensor:
    groups = numbers_EOGB.unflatten(3, (8, 32))
    minima = -groups.amin(dim=4).clamp(max=0)
    steps = (groups.amax(dim=4) + minima) / 15
    d, d_min = (each.amax(dim=3, keepdim=True) / 63 for each in (steps, minima))
    d_bytes, d_min_bytes = _half_bytes(d), _half_bytes(d_min)
    d, d_min = _halves(d_bytes, 0), _halves(d_min_bytes, 0)
    a = torch.where(d > 0, steps / d, 0.0).round().clamp(0, 63)
    m = torch.where(d_min > 0, minima / d_min, 0.0).round().clamp(0, 63)
    step, minimum = (d * a)[..., None], (d_min * m)[..., None]
    codes = torch.where(step > 0, (groups + minimum) / step, 0.0).round().clamp(0, 15)
    a, m, codes = a.to(torch.uint8), m.to(torch.uint8), codes.to(torch.uint8)
    small = [
        a[..., :4] | a[..., 4:] >> 4 << 6,
        m[..., :4] | m[..., 4:] >> 4 << 6,
        a[..., 4:] & 15 | (m[..., 4:] & 15) << 4,
    ]
    pairs = codes.unflatten(3, (4, 2))
    halves = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(3)
    return torch.cat([d_bytes, d_min_bytes, *small, halves], dim=3)


def _q4_k_numbers(blocks: torch.Tensor) -> torch.Tensor:
    first, second, third = blocks[..., 4:16].split(4, dim=3)
    a = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=3)
    m = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=3)
    halves = blocks[..., 16:].unflatten(3, (4, 1, 32))
    codes = torch.cat([halves & 15, halves >> 4], dim=4).flatten(3, 4)
    # Both products are exact in float32, so that only the difference is rounded.
    step, minimum = _halves(blocks, 0) * a, _halves(blocks, 2) * m
    return (step[..., None] * codes - minimum[..., None]).flatten(3)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 that stands at a place of each block, [..., 1], as float32."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _half_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """[..., 1] to the two bytes of a float16, the lower one first."""
    if numbers.numel() > 0 and float(numbers.abs().max()) > HALF_MAX:
        raise ValueError(
            f"weight: expected numbers whose scale fits into float16, got a scale of "
            f"{float(numbers.abs().max()):g}"
        )
    halves = numbers.to(torch.float16).clone(memory_format=torch.contiguous_format)
    return halves.view(torch.uint8)


def _check_gguf(name: str, format: str) -> None:
    if format not in ("Q8_0", "Q8_1", "Q4_K"):
        raise ValueError(f"{name}: expected the format 'Q8_0', 'Q8_1' or 'Q4_K', got {format!r}")
