"""Bringing tokens to their experts and their results back, without one Python loop.

Stages, and what each gains:

1. One stable sort of the T·K expert ids gives the order of the rows; one gather moves them. Its
   backward adds the K gradients of a token up in float32, whatever the dtype of the rows.
2. `combine` adds packed rows up in float32: on a CPU row by row in expert order, on a GPU in one
   kernel that gathers the K rows of a token (no atomics, so the same bits every time).

Both give the results of `moe_reference.dispatch`.

Dimension key: T tokens, H hidden size, E experts, K experts per token, S rows that go somewhere.
"""

import torch
from moe_reference.checks import FLOATS, IDS, check_count, check_tensor

from moe_optimized.alignment import tile_table_triton
from moe_optimized.interpreter import COMPILED, INTERPRETED, jit, launch, narrow, power_of_two, tl
