"""The scaled impostor: wrong beyond the limits of a case, and no further than it has to be."""

import dataclasses

import pytest
import torch
from moe_conformance.executor import InlineExecutor
from moe_conformance.judge import FAIL_Z, Violation, close, impostors, telling_scale
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import ROUNDING_POINTS
from moe_conformance.targets import Reference


class Narrow(Reference):
    """Only bfloat16, rounded wherever it can be."""

    capabilities = dataclasses.replace(
        Reference.capabilities, dtypes=("bfloat16",), rounding_points=tuple(ROUNDING_POINTS)
    )


@pytest.mark.parametrize(
    ("share", "scale"),
    [(1e-6, 1.02), (0.0028, 1.02), (0.0029, 1.04), (0.01, 1.08), (0.02, 1.16), (0.04, 1.32)],
)
def test_the_scale_follows_from_the_spread(share, scale):
    """The spread is a share of the value: 0.02 · 2^n is beyond 7 of them, or the next is taken."""
    expected = torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)
    sigma = share * expected.abs() + 1e-30
    assert telling_scale(expected, sigma) == pytest.approx(scale)
    with pytest.raises(Violation):
        close("scaled", expected * telling_scale(expected, sigma), expected, sigma)


def test_one_element_is_enough():
    expected = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert telling_scale(expected, torch.tensor([1.0, 1e-6], dtype=torch.float64)) == 1.02


def test_where_nothing_tells_the_case_stays_vacuous():
    expected = torch.ones(4, 3, dtype=torch.float64)
    sigma = expected * 0.33 / FAIL_Z
    scale = telling_scale(expected, sigma)
    assert scale == 1.02
    close("scaled", dict(impostors(expected, scale))["1.02 times"], expected, sigma)


def test_a_row_that_is_wrong_throughout_tells():
    expected = torch.ones(1, 400, dtype=torch.float64)
    sigma = expected * 0.005
    assert telling_scale(expected, sigma) == 1.04
    assert telling_scale(expected, sigma, torch.tensor([400.0], dtype=torch.float64)) == 1.02


def test_values_that_are_not_finite_tell_nothing():
    expected = torch.tensor([torch.inf, torch.nan], dtype=torch.float64)
    assert telling_scale(expected, torch.ones(2, dtype=torch.float64)) == 1.02


def _run(target, id, examples, monkeypatch, dtypes=("float32", "bfloat16", "float16", "float64")):
    """The result, and the scales that impostors were made with."""
    scales = []

    def watched(expected, scale=1.02):
        scales.append(scale)
        return impostors(expected, scale)

    for module in ("experts", "layer", "quantization"):
        monkeypatch.setattr(f"moe_conformance.requirements.{module}.impostors", watched)
    executor = InlineExecutor(target)
    scope = inline_scope(executor, dtypes)
    effort = Effort(examples, max(1, examples // 3), 0)
    return run_requirement(requirement_named(id), scope, executor, effort, 0), set(scales)


@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-15", "LAYER-01", "QUANT-14", "BACKEND-08"])
def test_in_float32_it_is_two_percent(id, monkeypatch):
    result, scales = _run(Reference(), id, 12, monkeypatch, ("float32",))
    assert result.status == "pass", result.message
    assert scales == {1.02}


@pytest.mark.parametrize("id", ["EXPERT-01", "EXPERT-15", "BACKEND-01", "BACKEND-08", "LAYER-01"])
def test_in_bfloat16_something_is_concluded(id, monkeypatch):
    result, scales = _run(Narrow(), id, 12, monkeypatch)
    assert result.status == "pass", result.message
    assert max(scales) > 1.02
    assert max(scales) <= 1.32
