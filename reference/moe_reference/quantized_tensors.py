r"""Quantised tensors: packed weights, what belongs to them, and the shapes that fit together.

A quantised matrix is codes of 4 or 8 bits and a few numbers that say what the codes stand for. Each
format has one canonical layout here, always [E, out, in] as the float weights have it. What
checkpoints and kernels hold instead is converted to it and from it (`gptq_packing`, `awq_packing`,
`marlin_layout`).

| format | packed | scales | a code q stands for |
|---|---|---|---|
| `uint4b8` | int32 [E, O, D/8] | float [E, O, G] | $(q - 8) \, s_g$ |
| `uint8b128` | int32 [E, O, D/4] | float [E, O, G] | $(q - 128) \, s_g$ |
| `uint4` | int32 [E, O, D/8] | float and `zeros` uint8 [E, O, G] | $(q - z_g) \, s_g$ |
| `e4m3` | float8_e4m3fn [E, O, D] | float [E, 1, 1], [E, O, 1] or per block | $q \, s$ |
| `mxfp4` | uint8 [E, O, D/2] | uint8 exponents [E, O, D/32] | $\mathrm{e2m1}(q) \, 2^{s - 127}$ |
| `nvfp4` | uint8 [E, O, D/2] | float8_e4m3fn [E, O, D/16] | $\mathrm{e2m1}(q) \, s \, s'$ |
| `Q8_0` | uint8 [E, O, 34 D/32] | inside | $q \, d$ |
| `Q8_1` | uint8 [E, O, 36 D/32] | inside | $q \, d$ |
| `Q4_K` | uint8 [E, O, 144 D/256] | inside | $d \, s_g \, q - d' m_g$ |

$s'$ is `global_scale`, float32 [E, 1] or [E, O]. `group_size` is the number of columns that share a
scale, -1 for all D. With `g_idx` [E, D] (act-order) column k is of group `g_idx[k]`, and not of
`k // group_size`. `zeros` are the true zero points, 0 to 16: never less one.

`packed` may hold more rows and columns than `shape` says. The rest is padding, and what stands in
it changes nothing.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from moe_reference.checks import FLOATS

FormatName = Literal[
    "uint4b8", "uint8b128", "uint4", "e4m3", "mxfp4", "nvfp4", "Q8_0", "Q8_1", "Q4_K"
]
ActivationFormatName = Literal["int8", "e4m3", "e4m3_block", "Q8_1"]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A packed matrix for each of E experts.

    Attributes:
        format: the name of the format.
        packed: the codes, [E, O', ...] of the format's dtype.
        scales: of the shape and dtype that the format says, or None.
        zeros: zero points of `uint4`, uint8 [E, O', G], or None.
        g_idx: int32 or int64 [E, D'], the group of each column, or None: in order.
        global_scale: `nvfp4`: float32 [E, 1] or [E, O'], or None.
        group_size: columns that share a scale; -1 for all of them.
        shape: (E, O, D), what the matrix is without padding.
    """

    format: FormatName
    packed: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    group_size: int = -1
    shape: tuple[int, int, int] = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The weights of E experts, packed.

    Attributes:
        gate_up: [E, 2I, H], the gate rows before the up rows ([E, I, H] without a gate).
        down: [E, H, I].
        gate_up_bias: [E, 2I], any float dtype, or None.
        down_bias: [E, H], any float dtype, or None.
        is_k_full: whether each group of `down` has all of its columns. False for a tensor-parallel
            slice with `g_idx`: its columns are of many groups, and none is complete.
        activation_format: what the rows are rounded to before each product, or None.
        activation_scales: float32 [E, 2], for x and for what goes into the second product; None
            takes the scales from the rows.
    """

    gate_up: QuantizedTensor
    down: QuantizedTensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    is_k_full: bool = True
    activation_format: ActivationFormatName | None = None
    activation_scales: torch.Tensor | None = None


class Format(NamedTuple):
    """What a format's tensors look like.

    `values` codes stand in `elements` elements of dtype `packed`. `scales` are the dtypes of the
    scales, none where they are inside. `group` is the size of its groups where the format fixes it.
    """

    packed: torch.dtype
    values: int
    elements: int = 1
    scales: tuple[torch.dtype, ...] = FLOATS
    group: int | None = None


FORMATS: dict[str, Format] = {
    "uint4b8": Format(torch.int32, values=8),
    "uint8b128": Format(torch.int32, values=4),
    "uint4": Format(torch.int32, values=8),
    "e4m3": Format(torch.float8_e4m3fn, values=1),
    "mxfp4": Format(torch.uint8, values=2, scales=(torch.uint8,), group=32),
    "nvfp4": Format(torch.uint8, values=2, scales=(torch.float8_e4m3fn,), group=16),
    "Q8_0": Format(torch.uint8, values=32, elements=34, scales=(), group=32),
    "Q8_1": Format(torch.uint8, values=32, elements=36, scales=(), group=32),
    "Q4_K": Format(torch.uint8, values=256, elements=144, scales=(), group=256),
}
"""The formats by name."""

INTEGER_BITS = {"uint4b8": 4, "uint8b128": 8, "uint4": 4}
"""The formats that have groups of any size, and `g_idx`."""
