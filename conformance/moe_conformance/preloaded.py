"""What the server that processes are forked from does once: all that is slow, and no target.

All of it stays, so the garbage collector of the processes need not look at it again.
"""

import gc
from importlib import import_module

from moe_conformance.registry import requirements

requirements()
for name in (
    "moe_conformance.check",
    # torch imports these on the first call of torch.autograd.grad, in the middle of a case.
    "torch.fx.experimental.symbolic_shapes",
    "torch.nested._internal.nested_tensor",
):
    import_module(name)

gc.freeze()
