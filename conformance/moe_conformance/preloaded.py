"""What the server that processes are forked from does once: all that is slow, and no target.

All of it stays, so the garbage collector of the processes need not look at it again.
"""

import gc
from importlib import import_module

import hypothesis
from hypothesis import strategies as st

from moe_conformance.registry import requirements

requirements()
for name in (
    "moe_conformance.check",
    # torch imports these on the first call of torch.autograd.grad, in the middle of a case.
    "torch.fx.experimental.symbolic_shapes",
    "torch.nested._internal.nested_tensor",
):
    import_module(name)


@hypothesis.seed(0)
@hypothesis.settings(max_examples=100, database=None)
@hypothesis.given(st.integers())
def draw(number: int) -> None:
    """Has Hypothesis look through all sources for numbers, which it does once."""


draw()
gc.freeze()
