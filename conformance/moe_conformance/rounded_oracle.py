r"""8-bit activations in the oracle: what rows are before a product, and how far they may be off.

Rounding to codes is a function with steps. A quotient that is well inside of a step gives the same
code whatever rounding went before; one that the declared arithmetic may have moved over an edge
gives one code or the other, and both are right. Eight standard deviations to each side decide which
of the two it is, as for the kinks of `experts_oracle`: that is beyond the limit for failing. Where
two codes are possible the middle is expected, with half the distance as standard deviation.

Scales are computed from rows that have an error too, and everything that shares one is off by the
same factor. n errors of one sign add up to no more than n independent ones of $\sqrt n$ times the
size, which is what is taken here.

Dimension key: S rows, D columns, G blocks of columns, B columns of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_conformance.experts_oracle import Between

STATIC = ("int8", "e4m3")
"""Formats whose scales may be fixed beforehand."""

REACH = 8.0
"""Standard deviations to each side of a quotient."""

ROUNDED = 2.0**-23
"""The relative error of a scale, of a quotient and of a code times its scale: they are float32,
also where x is float64; two roundings of 2^-24 in each."""


def _e4m3_sizes() -> torch.Tensor:
    byte = torch.arange(0x7F)
    exponent, mantissa = byte >> 3, (byte & 7).double()
    normal = (8 + mantissa) * 2.0 ** (exponent - 10).double()
    return torch.where(exponent == 0, mantissa * 2.0**-9, normal)


SIZES = _e4m3_sizes()
"""The numbers from 0 to 448 that float8_e4m3fn has, in order."""
MIDDLES = (SIZES[1:] + SIZES[:-1]) / 2


def nearest(format: str, quotients: torch.Tensor, lowest: float) -> torch.Tensor:
    """The code that a quotient is rounded to; which way it goes at a tie is nobody's business."""
    if format.startswith("e4m3"):
        sizes = SIZES[torch.bucketize(quotients.abs(), MIDDLES)]
        return torch.where(quotients < 0, -sizes, sizes)
    return quotients.round().clamp(lowest, 127.0)


def rounded_rows(
    format: str,
    block_sizes: tuple[int, int],
    scales: torch.Tensor | None,
    lowest: float = -127.0,
) -> Between:
    """What `experts_oracle` does between products where activations have 8 bits.

    Args:
        format: int8, e4m3, e4m3_block or Q8_1.
        block_sizes: B of `e4m3_block` before the first and the second product.
        scales: [E, 2], static scales, or None.
        lowest: the least code of int8. No row with a scale of its own has -128, so whether what is
            cut becomes -127 or -128 is left open: an output has to fit one of the two.
    """

    def between(
        rows: torch.Tensor, variance: torch.Tensor, expert: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        static = None if scales is None else float(scales[expert, step])
        return round_rows(rows, variance, format, block_sizes[step], static, lowest)

    return between


def round_rows(
    rows: torch.Tensor,
    variance: torch.Tensor,
    format: str,
    block_size: int,
    static: float | None,
    lowest: float = -127.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a product with 8-bit activations sees them, and their variance.

    Args:
        rows: [S, D], float64.
        variance: [S, D], of what they may have been computed as.
        format: see `rounded_rows`.
        block_size: B, for `e4m3_block`.
        static: the scale, or None: it is taken from the rows.
        lowest: see `rounded_rows`.
    """
    S, D = rows.shape
    B = {"e4m3_block": block_size, "Q8_1": 32}.get(format, max(D, 1))
    shape = (S, -(-D // B), B)
    x_SGB = F.pad(rows, (0, -D % B)).view(shape)
    sigma_SGB = F.pad(variance, (0, -D % B)).sqrt().view(shape)
    most = 448.0 if format.startswith("e4m3") else 127.0
    greatest_SG1 = x_SGB.abs().amax(-1, keepdim=True)
    if static is None:
        scale_SG1 = greatest_SG1 / most
        # The greatest may be another one of those near it, so the widest error of all counts.
        off_SG1 = (sigma_SGB.amax(-1, keepdim=True) / greatest_SG1.clamp_min(1e-300)).clamp(max=1.0)
    else:
        scale_SG1, off_SG1 = torch.full_like(greatest_SG1, static), torch.zeros_like(greatest_SG1)
    off_SG1 = (off_SG1.square() + ROUNDED**2).sqrt()
    shared_SG1 = scale_SG1
    if format == "Q8_1":
        shared_SG1, off_SG1 = _as_half(scale_SG1, off_SG1)
    divisor_SG1 = scale_SG1.where(scale_SG1 != 0, 1.0)
    quotient = x_SGB / divisor_SG1
    reach = REACH * ((sigma_SGB / divisor_SG1).square() + (quotient * off_SG1).square()).sqrt()
    low, high = (nearest(format, quotient + way * reach, lowest) for way in (-1, 1))
    middle, half = (low + high) / 2, (high - low) / 2
    # Numbers that are equal, as those that a clamp has cut, all go to the same side.
    alike = (quotient[..., None] == quotient[..., None, :]).sum(-1)
    value = middle * shared_SG1
    spread = alike * (half * shared_SG1).square() + B * (value * off_SG1).square()
    # Rows of nothing but errors have any scale, and stay as small as they are.
    nothing = (greatest_SG1 <= REACH * sigma_SGB.amax(-1, keepdim=True)).expand_as(spread)
    spread = spread + sigma_SGB.square().where(nothing, 0.0)
    return value.view(S, -1)[:, :D], spread.view(S, -1)[:, :D]


def _as_half(scale: torch.Tensor, off: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale that is kept as float16: one of two, where its own error reaches an edge."""
    factors = ((1 + way * REACH * off).clamp_min(0.0) for way in (-1, 1))
    low, high = ((scale * factor).half().double() for factor in factors)
    middle = (low + high) / 2
    apart = (high - low) / 2 / middle.clamp_min(1e-300)
    return middle, (apart.square() + ROUNDED**2).sqrt()
