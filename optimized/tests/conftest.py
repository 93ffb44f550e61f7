"""What the tests of several concepts share: tolerances and random experts."""

import sys
from collections.abc import Callable

import pytest
import torch
from moe_optimized.interpreter import HAS_TRITON
from moe_reference.config import ExpertWeights

# Of the greatest expected value: a few roundings of the dtype, and of float32 for the exact ones.
_TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}


@pytest.fixture
def assert_close() -> Callable[..., None]:
    def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None):
        """Finite where expected, and there within the tolerance of `dtype` (of the actual one)."""
        assert actual.shape == expected.shape
        actual, tolerance = actual.detach().double(), _TOLERANCES[dtype or actual.dtype]
        expected = expected.detach().double()
        finite = expected.isfinite()
        assert torch.equal(finite, actual.isfinite())
        if not finite.any():
            return
        size = max(expected[finite].abs().max().item(), 1e-3)
        error = (actual - expected)[finite].abs().max().item()
        assert error <= tolerance * size, f"off by {error} where the greatest value is {size}"

    return check


@pytest.fixture
def make_experts() -> Callable[..., ExpertWeights]:
    def make(
        E: int,
        H: int,
        I: int,
        dtype: torch.dtype = torch.float32,
        gated: bool = True,
        biased: bool = False,
    ) -> ExpertWeights:
        J = 2 * I if gated else I

        def draw(*shape: int) -> torch.Tensor:
            return (0.3 * torch.randn(*shape)).to(dtype)

        def draw_on_grid(*shape: int, step: float) -> torch.Tensor:
            return (step * torch.randint(-2, 3, shape)).to(dtype)

        return ExpertWeights(
            # With x on a grid as well no first product is rounded, so none changes sides of a kink.
            gate_up=draw_on_grid(E, J, H, step=0.25),
            down=draw(E, H, I),
            gate_up_bias=draw_on_grid(E, J, step=0.125) if biased else None,
            down_bias=draw(E, H) if biased else None,
        )

    return make


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item):
    """Marked `triton`: skipped where there are no wheels of it, and nowhere else.

    `make setup` installs it on Linux. Skipped there, a broken installation would look green.
    """
    if item.get_closest_marker("triton") is None or HAS_TRITON:
        return
    if sys.platform == "linux":
        pytest.fail("Triton cannot be imported; `make setup` installs it", pytrace=False)
    pytest.skip("Triton has wheels for Linux only")
