"""Rounding units, and what the declared arithmetic is allowed to round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_conformance.target import Capabilities

UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Unit roundoff: the largest relative error of rounding to nearest."""

TINY = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "tf32": 2.0**-126,
    "float16": 2.0**-24,
    "bfloat16": 2.0**-126,
}
"""Below this a result may be off by as much: the smallest normal number where subnormals may be
flushed to zero, and the spacing of float16, whose subnormals are used and kept."""


FLOOR = {dtype: max(tiny / 2, TINY["float64"] ** 0.5) for dtype, tiny in TINY.items()}
"""The smallest standard deviation: half of `TINY`, but never so small that its square is 0."""


@dataclass(frozen=True)
class Arithmetic:
    """What one operation may round on inputs of one dtype.

    Attributes:
        dtype: of the inputs and the output.
        accumulator: what products are summed in, never narrower than declared.
        points: the declared rounding points.
        inside: what the experts compute in, where that is declared: rows and parameters are
            rounded to its dtype on their way in, and results up to the experts' outputs at its
            points.
    """

    dtype: str
    accumulator: str
    points: frozenset[str]
    inside: Arithmetic | None = None

    @classmethod
    def of(cls, capabilities: Capabilities, dtype: str) -> Arithmetic:
        """The declared arithmetic for inputs of `dtype`; float64 inputs stay in float64.

        Experts stay in float64 too, unless they are declared to compute in another dtype.
        """
        own = cls._in(capabilities, dtype)
        inside = capabilities.experts_dtype
        return own if inside is None else replace(own, inside=cls._in(capabilities, inside))

    @classmethod
    def _in(cls, capabilities: Capabilities, dtype: str) -> Arithmetic:
        accumulator = capabilities.accumulator
        if dtype == "float64":
            return cls(dtype, "float64", frozenset())
        if accumulator == "float64":
            return cls(dtype, "float64", frozenset(capabilities.rounding_points))
        if dtype == "float32" and accumulator in ("float16", "bfloat16"):
            accumulator = "float32"
        return cls(dtype, accumulator, frozenset(capabilities.rounding_points))

    @property
    def of_experts(self) -> Arithmetic:
        """What the experts compute in."""
        return self.inside or self

    @property
    def outside(self) -> Arithmetic:
        """The same for what is no routed expert."""
        return replace(self, inside=None)

    @property
    def unit(self) -> float:
        """Unit roundoff of the dtype."""
        return UNIT[self.dtype]

    @property
    def accumulator_unit(self) -> float:
        """Unit roundoff of sums."""
        return UNIT["float32" if self.accumulator == "tf32" else self.accumulator]

    def variance(self, value: torch.Tensor, point: str | None = None) -> torch.Tensor:
        """Variance of rounding `value` to the dtype at a point, 0 where it is not declared.

        The error of rounding to nearest is taken as uniform on ±unit · |value|, whose variance is
        a third of its square.
        """
        if point is not None and point not in self.points:
            return torch.zeros_like(value)
        return (self.unit * value).square() / 3 + TINY[self.dtype] ** 2 / 3

    def entering(self, value: torch.Tensor) -> torch.Tensor:
        """Variance of rounding `value` to the experts' dtype, 0 where that dtype has the value."""
        if self.inside is None:
            return torch.zeros_like(value)
        rounded = value.to(getattr(torch, self.inside.dtype)).to(value.dtype)
        return self.inside.variance(value).masked_fill(rounded == value, 0.0)
