"""How an answer is compared: exactly, within a derived bound, or in standard deviations.

Every comparison either returns (saying how close it was) or raises `Violation`.
None has a tolerance of its own: the bound or the standard deviation comes with the expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PASS_Z = 5.5
FAIL_Z = 7.0
"""Largest error in standard deviations: right below `PASS_Z`, wrong above `FAIL_Z`, marginal in
between. For a normal error the two are passed once in 2.6e7 and once in 3.9e11 elements; sums of
bounded rounding errors have lighter tails. `benchmarks/calibration.py` records what legal
implementations reach."""

WIDEN_FROM = 100_000
"""Elements from which both limits grow as the expected maximum of so many normal errors does."""


@dataclass(frozen=True)
class Closeness:
    """How close a right answer was.

    Attributes:
        marginal: beyond the limit for passing, not yet beyond that for failing.
        worst: the largest error in standard deviations.
        worst_rms: the largest root mean square of a row, as a share of its limit for failing.
    """

    marginal: bool
    worst: float
    worst_rms: float = 0.0


class Violation(Exception):
    """An answer that breaks the requirement.

    Attributes:
        expected: what was expected, where there is one value for it.
        actual: what came.
        kind: "fail", "crash" or "timeout".
    """

    def __init__(
        self, message: str, expected: Any = None, actual: Any = None, kind: str = "fail"
    ) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.kind = kind


def has_form(
    what: str, actual: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """The answer is a tensor of that shape and one of those dtypes."""
    if not isinstance(actual, torch.Tensor):
        raise Violation(f"{what}: expected a tensor, got {type(actual).__name__}")
    if tuple(actual.shape) != shape:
        raise Violation(f"{what}: expected shape {list(shape)}, got {list(actual.shape)}")
    if actual.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        came = str(actual.dtype).removeprefix("torch.")
        raise Violation(f"{what}: expected dtype {wanted}, got {came}")


def equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit; NaN equals NaN, and 0 equals -0."""
    same_shape = actual.shape == expected.shape
    if not same_shape:
        raise Violation(
            f"{what}: expected shape {list(expected.shape)}, got {list(actual.shape)}",
            expected,
            actual,
        )
    wrong = ~((actual == expected) | ((actual != actual) & (expected != expected)))
    if bool(wrong.any()):
        raise Violation(_where(what, wrong, actual, expected), expected, actual)


def equals(what: str, expected: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """`equal` as a rule."""
    return lambda actual: equal(what, actual, expected)


def within(what: str, actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """No further from the expected value than `bound`, element by element."""
    _same_nonfinite(what, actual, expected)
    error = (actual.double() - expected).abs()
    finite = torch.isfinite(expected)
    wrong = finite & ~(error <= bound)
    if bool(wrong.any()):
        raise Violation(_where(what, wrong, actual, expected, bound=bound), expected, actual)


def close(
    what: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    sigma: torch.Tensor,
    freedom: torch.Tensor | None = None,
) -> Closeness:
    """Within the rounding errors that the declared arithmetic makes.

    Args:
        what: the result's name.
        actual: any float dtype.
        expected: float64, same shape.
        sigma: float64, the standard deviation of each element's error; never 0.
        freedom: one value per row (all dimensions but the last): the effective number of
            independent errors in it. With it the row's root mean square is limited as well, which
            catches errors that are small everywhere and nowhere an outlier.

    Returns:
        How close it was.
    """
    _same_nonfinite(what, actual, expected)
    finite = torch.isfinite(expected)
    z = torch.where(finite, (actual.double() - expected) / sigma, 0.0)
    if z.numel() == 0:
        return Closeness(False, 0.0)
    size = z.abs()
    worst = float(size.max())
    widen = widening(z.numel())
    if not worst <= FAIL_Z * widen:
        wrong = ~(size <= FAIL_Z * widen)
        raise Violation(_where(what, wrong, actual, expected, z=size), expected, actual)
    marginal = worst > PASS_Z * widen
    if freedom is None or z.ndim == 0:
        return Closeness(marginal, worst)
    rms, limit = z.square().mean(-1).sqrt(), rms_limit(freedom, FAIL_Z * widen)
    too_far = ~(rms <= limit)
    if bool(too_far.any()):
        row = tuple(int(i) for i in too_far.nonzero()[0])
        raise Violation(
            f"{what}: row {_index(row)} is wrong throughout: its root mean square error is "
            f"{float(rms[row]):.2f} standard deviations, {float(limit[row]):.2f} at most",
            expected,
            actual,
        )
    marginal = marginal or bool((rms > rms_limit(freedom, PASS_Z * widen)).any())
    return Closeness(marginal, worst, float((rms / limit).max()))


def widening(count: int) -> float:
    """How much further than one error the greatest of so many may be."""
    return max(1.0, math.sqrt(math.log(max(1, count)) / math.log(WIDEN_FROM)))


def within_deviations(
    what: str, actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor
) -> Closeness:
    """`within` a bound that is `FAIL_Z` deviations, widened, or less where less is possible."""
    within(what, actual, expected, bound)
    kept = torch.isfinite(expected) & (bound > 0)
    shares = ((actual.double() - expected).abs() / bound)[kept]
    share = float(shares.max()) if shares.numel() else 0.0
    return Closeness(share > PASS_Z / FAIL_Z, share * FAIL_Z)


def rms_limit(freedom: torch.Tensor, z: float) -> torch.Tensor:
    """The root mean square that is as unlikely as one normal error of `z` deviations.

    With n independent normal errors, n times their mean square is chi-squared, and
    P(mean square >= 1 + 2 sqrt(x / n) + 2 x / n) <= exp(-x) (Laurent and Massart, Annals of
    Statistics 28 (2000), lemma 1). x is chosen so that exp(-x) = P(|Z| > z).
    """
    x = -math.log(math.erfc(z / math.sqrt(2)))
    return (1 + 2 * (x / freedom).sqrt() + 2 * x / freedom).sqrt()


def impostors(expected: torch.Tensor, scale: float = 1.02) -> Iterator[tuple[str, torch.Tensor]]:
    """Wrong answers that any check of `expected` has to refuse, where they differ from it."""
    wrong = {"all zeros": torch.zeros_like(expected)}
    if expected.ndim and len(expected) > 1:
        wrong["rows moved by one"] = expected.roll(1, 0)
    if expected.is_floating_point():
        wrong[f"{scale:g} times"] = expected * scale
    for name, value in wrong.items():
        if not torch.equal(value.nan_to_num(), expected.nan_to_num()):
            yield name, value


def telling_scale(
    expected: torch.Tensor, sigma: torch.Tensor, freedom: torch.Tensor | None = None
) -> float:
    """A factor for `impostors` whose product with `expected` no legal answer can be.

    2% off is wrong in float32. In bfloat16 a right answer may be off by as much, and a case is not
    without force because it lets that pass. So the factor is the smallest of 1.02, 1.04, 1.08, 1.16
    and 1.32 that takes an element, or with `freedom` a row, beyond the limits for failing. A spread
    in which a third more is still at home tells nothing apart: there 1.02 remains, which it lets
    pass, and the case counts as vacuous.

    Args:
        expected: float64.
        sigma: as for `close`.
        freedom: as for `close`.
    """
    for power in range(5):
        scale = 1 + 0.02 * 2**power
        try:
            close("scaled", expected * scale, expected, sigma, freedom)
        except Violation:
            return scale
    return 1.02


def _same_nonfinite(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.shape != expected.shape:
        raise Violation(
            f"{what}: expected shape {list(expected.shape)}, got {list(actual.shape)}",
            expected,
            actual,
        )
    finite, expected_finite = torch.isfinite(actual), torch.isfinite(expected)
    if bool((finite & expected_finite).all()):
        return
    # Exactly where and exactly which: an expected NaN never stands for anything.
    same = (actual.double() == expected) | (torch.isnan(actual) & torch.isnan(expected))
    wrong = torch.where(expected_finite, ~finite, ~same)
    if bool(wrong.any()):
        raise Violation(_where(what, wrong, actual, expected), expected, actual)


def _where(
    what: str,
    wrong: torch.Tensor,
    actual: torch.Tensor,
    expected: torch.Tensor,
    bound: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> str:
    places = wrong.nonzero()
    if z is not None:
        # torch's own unravel_index takes as long as all the rest of a judgement.
        greatest = int(z.nan_to_num(torch.inf).argmax())
        place = tuple(int(i) for i in np.unravel_index(greatest, z.shape))
    else:
        place = tuple(int(i) for i in places[0])
    text = (
        f"{what}{_index(place)}: expected {_number(expected[place])}, got {_number(actual[place])}"
    )
    if bound is not None:
        text += f" (off by {_number((actual[place].double() - expected[place]).abs())}, "
        text += f"at most {_number(bound.expand_as(expected)[place])})"
    if z is not None:
        text += f" ({_number(z[place])} standard deviations off, {FAIL_Z:g} at most)"
    return f"{text}; {len(places)} of {wrong.numel()} values are wrong"


def _index(place: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, place))}]" if place else ""


def _number(value: torch.Tensor) -> str:
    if not value.is_floating_point():
        return str(value.item())
    return f"{value.item():.6g}"
