"""Triton on this machine: compiled, interpreted or absent, and what interpreting gets wrong.

A process that sees a GPU compiles its kernels. One that sees none runs the same kernels in
Triton's interpreter, for which this module switches it on before any kernel is decorated. Where
Triton is not installed (macOS), the kernels can still be imported but not launched.

What the interpreter of Triton 3.6 to 3.9 gets wrong, and what is done about it here:

| defect | remedy |
|---|---|
| `tl.dot` of two bfloat16 blocks multiplies their bit patterns | `dot` widens both to float32 |
| float32 to bfloat16 truncates instead of rounding to nearest even | `narrow` rounds the bits |
| the NaN of float8_e4m3fn, 0x7f, is read as 480 | `MEND_NAN` of `quantized_kernels` |
| `triton.autotune` asks for a driver | tile sizes come from tables in Python |
| functions of `triton.language` decorated before the switch stay compiled | re-decorated below |
| a K-loop step costs milliseconds at any tile size | tables have a column of large tiles |
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    # Kernels name nothing else of it before they are launched.
    tl = SimpleNamespace(constexpr=object)

HAS_TRITON: bool = triton is not None
"""Triton is installed."""

INTERPRETED: bool = HAS_TRITON and triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter: there is no GPU, or TRITON_INTERPRET=1 asked for it."""

COMPILED: bool = HAS_TRITON and not INTERPRETED
"""Kernels are compiled for a GPU."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels multiply and read. They accumulate in float32, which is too little for float64."""

launches: Counter[str] = Counter()
"""How often each kernel was launched in this process, by name."""


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or, without Triton, a stand-in that refuses to be launched."""
    if HAS_TRITON:
        return triton.jit(kernel)

    @functools.wraps(kernel)
    def absent(*_: Any, **__: Any) -> None:
        require_triton()

    return absent


def require_triton() -> None:
    """Raise unless Triton is installed.

    Raises:
        ImportError: it is not.
    """
    if not HAS_TRITON:
        raise ImportError("triton: expected an installed package (3.6 or newer), found none")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel: the one place where it happens, so that it can be counted and profiled.

    Args:
        kernel: what `jit` returned.
        grid: programs per axis; an axis of 0 launches nothing.
        *arguments: the kernel's arguments, tensors of one device among them.
        **options: its `constexpr` arguments, `num_warps` and `num_stages`.
    """
    require_triton()
    if 0 in grid:
        return
    name = kernel.fn.__name__
    launches[name] += 1
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    profiling = torch.autograd._profiler_enabled()
    with (
        # As on a GPU, infinities and NaN are no news.
        np.errstate(all="ignore") if INTERPRETED else nullcontext(),
        torch.profiler.record_function(name) if profiling else nullcontext(),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        kernel[grid](*arguments, **options)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether `x` is best handed to the kernels: they are compiled, and take it where it is."""
    return COMPILED and x.is_cuda and x.dtype in KERNEL_DTYPES


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and at least `least`.

    >>> power_of_two(5), power_of_two(5, least=16)
    (8, 16)
    """
    return max(least, 1 << max(n - 1, 0).bit_length())


def _interpret_standard_library() -> None:
    """Make `tl.sum` and its like interpreted where Triton was imported before the switch.

    They are decorated when Triton is imported, by torch's compiler for example. Without a GPU
    their compiled form has no use, so nothing is taken away from anybody.
    """
    import triton.language.standard as standard
    from triton.runtime.jit import JITFunction

    replaced = {
        id(value): triton.jit(value.fn)
        for value in vars(standard).values()
        if isinstance(value, JITFunction)
    }
    for module in (standard, tl):
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


if INTERPRETED:
    _interpret_standard_library()


@jit
def dot(a, b, accumulator, WIDEN: tl.constexpr):
    """`accumulator + a @ b` with float32 products: no tf32, and WIDEN when interpreting."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@jit
def narrow(x, DTYPE: tl.constexpr, ROUND_BITS: tl.constexpr):
    """Float32 `x` in DTYPE, rounded to nearest even; ROUND_BITS does it by hand for bfloat16."""
    if ROUND_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


def needs_widening(dtype: torch.dtype) -> bool:
    """Whether kernels must avoid the interpreter's own bfloat16 (WIDEN, ROUND_BITS)."""
    return INTERPRETED and dtype is torch.bfloat16
