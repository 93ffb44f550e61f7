import subprocess
import sys

import pytest
import torch
from moe_optimized.interpreter import (
    INTERPRETED,
    dot,
    jit,
    launch,
    launches,
    narrow,
    needs_widening,
    tl,
)

pytestmark = pytest.mark.triton
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


@jit
def copy_kernel(source_ptr, out_ptr, ROUND_BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(source_ptr + i)
    tl.store(out_ptr + i, narrow(x, out_ptr.dtype.element_ty, ROUND_BITS))


@jit
def square_kernel(a_ptr, out_ptr, WIDEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    cells = i[:, None] * BLOCK + i[None, :]
    a = tl.load(a_ptr + cells)
    tl.store(out_ptr + cells, dot(a, a, tl.zeros((BLOCK, BLOCK), tl.float32), WIDEN))


@only_interpreted
def test_bfloat16_is_rounded_to_nearest_even():
    values = torch.randn(1024)
    values[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 0.0, -0.0])
    # Halfway between two bfloat16 numbers, above an even one and above an odd one.
    values[6], values[7] = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(1024, dtype=dtype)
        launch(copy_kernel, (1,), values, out, ROUND_BITS=needs_widening(dtype), BLOCK=1024)
        torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@only_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_are_right_in_every_dtype(dtype):
    a = torch.randn(16, 16).to(dtype)
    out = torch.empty(16, 16)
    launch(square_kernel, (1,), a, out, WIDEN=needs_widening(dtype), BLOCK=16)
    torch.testing.assert_close(out, a.float() @ a.float(), rtol=1e-5, atol=1e-5)


def test_launches_are_counted_and_empty_grids_are_not_launched():
    values = torch.zeros(16)
    before = launches.copy()
    launch(copy_kernel, (0, 3), values, values, ROUND_BITS=False, BLOCK=16)
    assert launches == before


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@only_interpreted
def test_triton_may_have_been_imported_before():
    # Then the functions of triton.language are decorated already, for the compiler.
    program = """
import triton.language, torch
from moe_reference.config import RoutingConfig
from moe_optimized.gating import route_triton
print(route_triton(torch.tensor([[1.0, 3.0, 2.0]]), RoutingConfig(top_k=2))[1].tolist())
"""
    assert run(program) == "[[1, 2]]\n"


def test_a_process_with_a_gpu_is_left_alone():
    program = """
import os, torch
os.environ.pop("TRITON_INTERPRET", None)
torch.cuda.is_available = lambda: True
from moe_optimized import interpreter
print(interpreter.COMPILED, interpreter.INTERPRETED, "TRITON_INTERPRET" in os.environ)
"""
    assert run(program) == "True False False\n"


def test_without_triton_only_the_kernels_are_missing():
    program = """
import sys
sys.modules["triton"] = None
import torch
from moe_reference.config import RoutingConfig
from moe_optimized.targets import Optimized, OptimizedTriton
print(Optimized().route(torch.tensor([[1.0, 3.0]]), RoutingConfig(top_k=1))[1].tolist())
try:
    OptimizedTriton()
except ImportError as error:
    print(error)
"""
    assert run(program) == (
        "[[1]]\ntriton: expected an installed package (3.6 or newer), found none\n"
    )
