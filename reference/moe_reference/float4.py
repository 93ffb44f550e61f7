r"""4-bit floats in blocks: mxfp4 and nvfp4.

A code of format E2M1 has a sign, 2 bits of exponent and 1 of mantissa. It stands for one of

    code   0    1    2    3    4    5    6    7      8 to 15: the same with a minus
    value  0  0.5    1  1.5    2    3    4    6

$$
\text{mxfp4:} \quad w = \mathrm{e2m1}(q) \, 2^{s - 127} \qquad \qquad
\text{nvfp4:} \quad w = \mathrm{e2m1}(q) \, s \, s'
$$

*mxfp4*: s is a byte for each 32 columns (E8M0: an exponent and nothing else; 255 is NaN). *nvfp4*:
s is a float8_e4m3fn for each 16 columns, and s' a float32 for each expert, or for each row where
gate and up were quantised on their own. s' multiplies; compressed-tensors stores its inverse.

From floats, round to nearest, ties to even, the sign of a zero kept:

- mxfp4, as the MX specification has it: the exponent is that of the greatest absolute value less
  2, so that the greatest lies between 4 and 8; what is above 6 is cut to 6. A block of zeros has
  the byte 0.
- nvfp4: s' = greatest of all / (6 · 448), and s = greatest of the block / (6 s'), rounded to
  float8_e4m3fn.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G blocks of columns,
B columns of a block.
"""

import torch

from moe_reference.bit_packing import pack_nibbles, unpack_nibbles
from moe_reference.checks import check_float, check_tensor
from moe_reference.float8 import E4M3_MAX, to_e4m3
from moe_reference.integer_quantization import stored_scale
from moe_reference.quantized_checks import check_finite, check_quantized, check_width
from moe_reference.quantized_tensors import QuantizedTensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """What codes stand for.

    Args:
        codes: any shape, uint8, from 0 to 15.

    Returns:
        The same shape, float32.

    Raises:
        TypeError: not uint8.

    >>> from_e2m1(torch.tensor([0, 1, 7, 9, 15], dtype=torch.uint8)).tolist()
    [0.0, 0.5, 6.0, -0.5, -6.0]
    """
    check_tensor("codes", codes, tuple(getattr(codes, "shape", ())), (torch.uint8,))
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return values[codes.to(torch.int64)]


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest codes, ties to the even one; what is above 6 becomes 6.

    Args:
        x: any shape and float dtype, no NaN: there is no code for it.

    Returns:
        The same shape, uint8.

    Raises:
        TypeError: not a float tensor.
        ValueError: there is a NaN.

    >>> to_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, 5.1, -9.0])).tolist()
    [0, 2, 4, 6, 7, 15]
    """
    check_float("x", x)
    if bool(x.isnan().any()):
        raise ValueError("x: expected no NaN, which 4-bit floats do not have, got one")
    size = x.abs().clamp(max=E2M1_MAX)
    # The distance of neighbours: 1/2 below 2, then 1, then 2. Even multiples have even codes.
    step = torch.ones_like(size).where(size >= 2, 0.5).where(size < 4, 2.0)
    nearest = (size / step).round() * step
    codes = torch.searchsorted(torch.tensor(E2M1, dtype=x.dtype, device=x.device), nearest)
    return (codes + 8 * x.signbit()).to(torch.uint8)


def dequantize_float4(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that the codes stand for.

    Args:
        packed: of format mxfp4 or nvfp4.

    Returns:
        [E, O, D], float32; NaN where the scale is NaN.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: another format, or parts that do not fit each other.

    Source: OCP Microscaling Formats 1.0; gpt-oss checkpoints; NVIDIA's NVFP4.

    >>> packed = torch.full((1, 1, 16), 0x52, dtype=torch.uint8)
    >>> one = QuantizedTensor("mxfp4", packed, torch.full((1, 1, 1), 129, dtype=torch.uint8),
    ...     group_size=32, shape=(1, 1, 32))
    >>> dequantize_float4(one).flatten().tolist()[:4]
    [4.0, 12.0, 4.0, 12.0]
    """
    check_quantized("packed", packed)
    if packed.format not in ("mxfp4", "nvfp4"):
        raise ValueError(f"packed: expected the format 'mxfp4' or 'nvfp4', got {packed.format!r}")
    assert packed.scales is not None
    _, O, D = packed.shape
    values_EOD = from_e2m1(unpack_nibbles(packed.packed))[:, :O, :D]
    if packed.format == "mxfp4":
        scales_EOG = from_e8m0(packed.scales)
    else:
        scales_EOG = packed.scales.to(torch.float64)
    scales_EOD = scales_EOG.repeat_interleave(packed.group_size, dim=2)[:, :O, :D]
    # Exact in float64, so that there is a single rounding, that to float32.
    weight_EOD = values_EOD.to(torch.float64) * scales_EOD
    if packed.global_scale is not None:
        rows = packed.global_scale.to(torch.float64)
        weight_EOD = weight_EOD * (rows if rows.shape[1] == 1 else rows[:, :O])[:, :, None]
    return weight_EOD.to(torch.float32)


def from_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two, from bytes: 2^(byte - 127), and NaN for 255.

    Args:
        exponents: any shape, uint8.

    Returns:
        The same shape, float64.

    >>> from_e8m0(torch.tensor([126, 127, 130, 255], dtype=torch.uint8)).tolist()
    [0.5, 1.0, 8.0, nan]
    """
    powers = torch.exp2(exponents.to(torch.float64) - 127)
    return powers.where(exponents != 255, float("nan"))


def quantize_mxfp4(weight: torch.Tensor) -> QuantizedTensor:
    """From floats, with an exponent for each 32 columns.

    Args:
        weight: [E, O, D], any float dtype, finite, D a multiple of 32.

    Raises:
        TypeError: not a float tensor.
        ValueError: a weight that is not finite, or D is no multiple of 32.

    >>> weight = torch.tensor([5.0, -8.0, 0.9, 0.0]).repeat(8).view(1, 1, 32)
    >>> dequantize_float4(quantize_mxfp4(weight)).flatten().tolist()[:4]
    [4.0, -8.0, 1.0, 0.0]
    """
    blocks_EOGB = _blocks(weight, "mxfp4", 32)
    # frexp: greatest = mantissa · 2^exponent with the mantissa from 1/2 to 1.
    greatest_EOG = blocks_EOGB.abs().amax(dim=3)
    exponents_EOG = torch.frexp(greatest_EOG).exponent - 1 - 2 + 127
    scales_EOG = exponents_EOG.where(greatest_EOG > 0, 0).clamp(0, 254).to(torch.uint8)
    codes_EOGB = to_e2m1(blocks_EOGB / from_e8m0(scales_EOG)[..., None])
    return QuantizedTensor(
        "mxfp4",
        pack_nibbles(codes_EOGB.flatten(2)),
        scales_EOG,
        group_size=32,
        shape=tuple(weight.shape),  # type: ignore[arg-type]
    )


def quantize_nvfp4(weight: torch.Tensor) -> QuantizedTensor:
    """From floats, with a float8 scale for each 16 columns and a float32 for each expert.

    Args:
        weight: [E, O, D], any float dtype, finite, D a multiple of 16.

    Raises:
        TypeError: not a float tensor.
        ValueError: a weight that is not finite, or D is no multiple of 16.

    >>> one = quantize_nvfp4(torch.full((1, 1, 16), 2688.0))
    >>> one.scales.float().item(), one.global_scale.item(), dequantize_float4(one)[0, 0, 0].item()
    (448.0, 1.0, 2688.0)
    """
    blocks_EOGB = _blocks(weight, "nvfp4", 16)
    greatest_EOG = blocks_EOGB.abs().amax(dim=3)
    # The zero in front is for matrices without rows or columns.
    numbers = torch.cat([greatest_EOG.new_zeros(len(weight), 1), greatest_EOG.flatten(1)], dim=1)
    whole_E1 = numbers.amax(dim=1, keepdim=True).to(torch.float32)
    global_E1 = stored_scale(whole_E1 / (E2M1_MAX * E4M3_MAX), torch.float32)
    scales_EOG = to_e4m3(greatest_EOG / E2M1_MAX / global_E1[..., None])
    steps_EOG = scales_EOG.to(torch.float64) * global_E1[..., None]
    # A block of numbers that are too small for the scale's dtype becomes zeros.
    steps_EOG = steps_EOG.where(steps_EOG > 0, float("inf"))
    codes_EOGB = to_e2m1(blocks_EOGB / steps_EOG[..., None])
    return QuantizedTensor(
        "nvfp4",
        pack_nibbles(codes_EOGB.flatten(2)),
        scales_EOG,
        global_scale=global_E1,
        group_size=16,
        shape=tuple(weight.shape),  # type: ignore[arg-type]
    )


def _blocks(weight: torch.Tensor, format: str, B: int) -> torch.Tensor:
    """[E, O, D] to [E, O, G, B], float64."""
    check_tensor("weight", weight, ("E", "O", "D"))
    check_width("weight", weight.shape[2], format)
    check_finite("weight", weight)
    return weight.to(torch.float32).to(torch.float64).unflatten(2, (weight.shape[2] // B, B))
