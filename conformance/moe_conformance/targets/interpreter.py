"""Triton libraries on a machine without a GPU: their own kernels, in Triton's interpreter.

An adapter opts in before it imports its library:

- `interpret_without_gpu` switches the interpreter on, which counts for every kernel that is
  decorated from then on, in all of the process, and for Triton's own. Where there is a GPU it does
  nothing. Three things are replaced inside Triton: autotuning, which asks for a GPU; reductions
  and scans by a kernel's own function, which the interpreter calls for one element after the
  other, so that a sort of 1024 takes seconds; and `tl.argmax` of nothing but NaN, which raises.
- `on_this_machine` turns the capabilities that a library has on a GPU into those that can be
  checked here.

An interpreted kernel is the library's source, run by numpy block by block: indices, masks and
formulas are put to the test, but neither the compiler nor races between programs, which run one
after the other.
"""

from __future__ import annotations

import dis
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moe_conformance.target import Capabilities

DTYPES = ("float32", "float16")
"""What the interpreter of Triton 3.6 to 3.9 computes as a GPU does. `tl.dot` of two bfloat16 blocks
multiplies their bit patterns, and a float32 is cut to bfloat16 instead of rounded."""


def interpret_without_gpu(*packages: str) -> bool:
    """Make Triton's kernels run here; True where that takes the interpreter.

    An autotuned kernel takes the first configuration that its own pruning leaves: timing them
    would ask for a GPU, and what an interpreted kernel takes says nothing.

    Args:
        *packages: import names of what has kernels and is imported afterwards.

    Raises:
        ImportError: Triton is missing, or one of the packages was imported before.
    """
    if torch.cuda.is_available():
        return False
    early = [name for name in packages if name in sys.modules]
    if early and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError(
            f"{early[0]}: expected TRITON_INTERPRET=1 before it is first imported, as this machine "
            "has no GPU, got a process that imported it without"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.runtime.interpreter
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        raise ImportError("triton: expected an installed package, found none") from None
    _interpret_standard_library()
    Autotuner._bench = _take_equally_long
    _in_blocks(triton.runtime.interpreter)
    return True


def on_this_machine(capabilities: Capabilities) -> Capabilities:
    """What a library declares with a GPU, narrowed to the interpreter where there is none.

    >>> declared = Capabilities(devices=("cuda",), dtypes=("float32", "bfloat16"))
    >>> on_this_machine(declared).dtypes if not torch.cuda.is_available() else ("float32",)
    ('float32',)
    """
    if torch.cuda.is_available():
        return capabilities
    dtypes = tuple(name for name in capabilities.dtypes if name in DTYPES)
    return replace(capabilities, devices=("cpu",), dtypes=dtypes, interpreted=True)


def _interpret_standard_library() -> None:
    """Have `tl.sum` and its like interpreted, too.

    Triton decorates them when it is imported, and `torch._inductor`, which has been imported where
    targets run, imports it.
    """
    import triton
    import triton.language.standard as standard

    compiled = {
        id(value): triton.jit(value.fn)
        for value in vars(standard).values()
        if isinstance(value, triton.JITFunction)
    }
    for module in (standard, triton.language):
        for name, value in list(vars(module).items()):
            if id(value) in compiled:
                setattr(module, name, compiled[id(value)])


def _take_equally_long(autotuner: Any, *arguments: Any, config: Any, **options: Any) -> float:
    """In the place of a measurement; of equals the autotuner takes the first."""
    return 0.0


def _in_blocks(interpreter: Any) -> None:
    """Have reductions and scans call an elementwise function with blocks."""
    reduce_one_by_one = interpreter.ReduceOps.generic_reduce
    scan_one_by_one = interpreter.ScanOps.generic_scan
    if reduce_one_by_one.__module__ == __name__:
        return
    apply_reduction = interpreter.ReduceOps.apply_impl

    def reduce(reduction: Any, inputs: tuple[Any, ...]) -> list[Any]:
        elementwise = _is_elementwise(reduction.combine_fn.fn, interpreter)
        return (_reduce if elementwise else reduce_one_by_one)(reduction, inputs)

    def scan(scan: Any, inputs: tuple[Any, ...]) -> list[Any]:
        elementwise = _is_elementwise(scan.combine_fn.fn, interpreter)
        return (_scan if elementwise else scan_one_by_one)(scan, inputs)

    def apply(reduction: Any, inputs: tuple[Any, ...]) -> Any:
        # Numpy refuses a maximum's place among nothing but NaN; Triton's own function does not.
        if len(inputs) == 2 and np.isnan(inputs[0].handle.data).any():
            return reduce_one_by_one(reduction, inputs)
        return apply_reduction(reduction, inputs)

    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.ReduceOps.apply_impl = apply
    interpreter.ScanOps.generic_scan = scan


def _is_elementwise(function: Any, interpreter: Any) -> bool:
    """It neither branches, `and` and `or` included, nor calls a function that might."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    names = {**vars(interpreter.tl), **function.__globals__}
    called = (names.get(name) for name in function.__code__.co_names)
    return not (
        any(step.opcode in jumps for step in dis.get_instructions(function))
        or any(isinstance(value, interpreter.InterpretedFunction) for value in called)
    )


def _reduce(reduction: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Neighbours along the axis are combined, all of them at once, until one is left."""
    axis = reduction.axis
    arrays = [x.handle.data.reshape(-1) if axis is None else x.handle.data for x in inputs]
    arrays = [np.moveaxis(array, axis or 0, 0) for array in arrays]
    while len(arrays[0]) > 1:
        arrays = _combine(reduction, inputs, [a[0::2] for a in arrays], [a[1::2] for a in arrays])
    results = [array[0] for array in arrays]
    if reduction.keep_dims and axis is None:
        results = [result.reshape((1,) * len(inputs[0].shape)) for result in results]
    elif reduction.keep_dims:
        results = [np.expand_dims(result, axis) for result in results]
    return [reduction.to_tensor(r, x.dtype) for r, x in zip(results, inputs, strict=True)]


def _scan(scan: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Each element is combined with what ends 1, 2, 4, … before it, all of them at once."""
    arrays = [np.moveaxis(x.handle.data, scan.axis, 0) for x in inputs]
    shift, length = 1, len(arrays[0])
    while shift < length:
        earlier = [np.roll(array, shift, axis=0) for array in arrays]
        combined = _combine(scan, inputs, earlier, arrays)
        arrays = [
            np.concatenate([old[:shift], new[shift:]])
            for old, new in zip(arrays, combined, strict=True)
        ]
        shift *= 2
    arrays = [np.ascontiguousarray(np.moveaxis(array, 0, scan.axis)) for array in arrays]
    return [scan.to_tensor(a, x.dtype) for a, x in zip(arrays, inputs, strict=True)]


def _combine(
    operation: Any, inputs: tuple[Any, ...], left: list[Any], right: list[Any]
) -> list[Any]:
    """The kernel's own function on blocks; it is associative, as Triton asks."""
    blocks = [
        operation.to_tensor(array, x.dtype)
        for side in (left, right)
        for array, x in zip(side, inputs, strict=True)
    ]
    result = operation.combine_fn.fn(*blocks)
    return [r.handle.data for r in (result if isinstance(result, tuple) else (result,))]
