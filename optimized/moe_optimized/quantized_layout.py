r"""Packed experts in the layout of the kernels: made once, when weights are loaded.

A product with packed weights reads them once and multiplies them by few rows. What it gains from a
layout of its own:

1. *Runs*. The columns are cut into runs of one step each, and a run of all rows stands in one
   piece: [E, runs, O, bytes]. A program's tile of a run is contiguous memory.
2. *Halves of bytes*. With 4 bits, a byte holds a column of the run's first half in its low bits and
   the column as far into the second half in its high ones. Masked and shifted, both are blocks that
   can be multiplied as they are; neighbours in one byte would have to be shuffled apart first.

        run of 32 columns     0  1  2 ... 15 | 16 17 18 ... 31
        byte 0                0 and 16
        byte 1                1 and 17

3. *Scales by rows*. [E, scales, O], so that the rows of a tile read theirs side by side.
4. *Parts*. A run is one product, or two with 4 bits, of `depth` columns each: a *part*. No part has
   columns of two groups, so that scales multiply sums, and codes are multiplied as they are, which
   is exact in every dtype that the kernels take. `share` parts after each other have one scale.
5. *Sorted columns*. With `g_idx`, and with groups that no part fits, columns are sorted by group
   and each group is filled up to whole parts. `columns` says which column of x stands there, -1 for
   none. Groups of any size, also empty ones, become parts of one size.

The numbers stay the ones that the packed tensors stand for; scales of float64 are rounded to
float32. `prepare` works expert by expert: the codes of one expert, a byte each, are the most that
it holds beside its result.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
B columns of a group, P columns with what fills them up.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from moe_reference.bit_packing import unpack_nibbles
from moe_reference.float4 import from_e2m1, from_e8m0
from moe_reference.quantized_experts_checks import check_quantized_experts
from moe_reference.quantized_tensors import (
    ActivationFormatName,
    QuantizedExperts,
    QuantizedTensor,
)

from moe_optimized.interpreter import power_of_two

CodeName = Literal["int4", "int8", "e2m1", "e4m3"]

CODES: dict[str, CodeName] = {
    "uint4b8": "int4",
    "uint4": "int4",
    "uint8b128": "int8",
    "e4m3": "e4m3",
    "mxfp4": "e2m1",
    "nvfp4": "e2m1",
    "Q8_0": "int8",
    "Q8_1": "int8",
}
"""The formats that have a layout, and what their codes are. In Q4_K a minimum is subtracted, which
no factor of a sum can stand for."""

HALVED = ("int4", "e2m1")
"""Codes of which a byte holds two."""

LEAST_DEPTH, MOST_BYTES = 16, 128
"""Columns of a part: what `tl.dot` takes at least; and the bytes of a row that a step reads."""


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """A packed matrix for each of E experts, in the layout of the kernels.

    Attributes:
        codes: what the codes are.
        packed: [E, runs, O, depth], uint8: the codes of a byte each, or two.
        scales: [E, S, O], a float dtype, or uint8: exponents of E8M0.
        zeros: [E, S, O], uint8, or None: the middle one.
        columns: [E, P], int32, the column of the matrix that stands there, or -1; None: in order.
        depth: columns of a part.
        share: parts that have one scale.
        block: B where rows of x may be rounded in blocks of the same columns, or None.
        shape: (E, O, D).
    """

    codes: CodeName
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    columns: torch.Tensor | None
    depth: int
    share: int
    block: int | None
    shape: tuple[int, int, int]

    @property
    def parts(self) -> int:
        """Products of one step."""
        return 2 if self.codes in HALVED else 1

    @property
    def run(self) -> int:
        """Columns of one step."""
        return self.parts * self.depth


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """Packed experts in the layout of the kernels; the rest as in `QuantizedExperts`.

    Scales have no gradient, whoever asks for it.
    """

    gate_up: PreparedMatrix
    down: PreparedMatrix
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation_format: ActivationFormatName | None = None
    activation_scales: torch.Tensor | None = None


@torch.no_grad()
def prepare(experts: QuantizedExperts) -> PreparedExperts:
    """Packed experts in the layout of the kernels, for `experts_quantized`.

    Args:
        experts: packed weights of E experts, of a format in `CODES`.

    Returns:
        New tensors, but for the biases; on the device of the packed ones.

    Raises:
        TypeError: not `QuantizedExperts`, or a part has the wrong dtype.
        ValueError: parts that do not fit each other, or a format that has no layout.

    >>> from moe_reference.quantization import quantize
    >>> matrix = quantize(torch.ones(2, 8, 256), "uint4b8", group_size=128)
    >>> prepare_matrix(matrix).packed.shape
    torch.Size([2, 2, 8, 64])
    """
    check_quantized_experts(experts)
    return PreparedExperts(
        prepare_matrix(experts.gate_up, "experts.gate_up"),
        prepare_matrix(experts.down, "experts.down"),
        experts.gate_up_bias,
        experts.down_bias,
        experts.activation_format,
        experts.activation_scales,
    )


def prepare_matrix(tensor: QuantizedTensor, name: str = "tensor") -> PreparedMatrix:
    """A checked packed matrix in the layout of the kernels.

    Args:
        tensor: packed matrices of E experts.
        name: the argument's name, as its caller knows it.

    Raises:
        ValueError: a format that has no layout.
    """
    if tensor.format not in CODES:
        raise ValueError(
            f"{name}.format: expected one of {', '.join(map(repr, CODES))}, which the kernels "
            f"read, got {tensor.format!r}"
        )
    codes = CODES[tensor.format]
    parts = 2 if codes in HALVED else 1
    E, O, D = tensor.shape
    B = tensor.group_size
    most = MOST_BYTES // parts
    scales = _scales_by_row(tensor)
    zeros = None if tensor.zeros is None else tensor.zeros[:, :O, : scales.shape[1]].mT
    columns = None
    if scales.shape[1] == 1:
        # All columns are of one group, whatever g_idx or a last block that is cut short says.
        B = -1
    if B == -1 or (tensor.g_idx is None and B % LEAST_DEPTH == 0):
        depth = min(most, power_of_two(D, least=LEAST_DEPTH) if B == -1 else B & -B)
        num_parts = _up(D, parts * depth) // depth
        share = max(num_parts, 1) if B == -1 else B // depth
        scales, zeros = (_rows_up_to(-(-num_parts // share), each) for each in (scales, zeros))
    else:
        depth, share, columns, groups = _sorted_columns(tensor, scales.shape[1], parts, most)
        scales, zeros = (_of_parts(groups, each) for each in (scales, zeros))
    width = _up(D, parts * depth) if columns is None else columns.shape[1]
    packed = scales.new_empty(E, width // (parts * depth), O, depth, dtype=torch.uint8)
    for e in range(E):
        row_codes = _codes_of(tensor, e)
        if columns is None:
            row_codes = torch.nn.functional.pad(row_codes, (0, width - D))
        elif D > 0:
            nobodys = columns[e] < 0
            picked = row_codes[:, columns[e].clamp(min=0).long()]
            row_codes = picked.masked_fill_(nobodys, 0)
        else:
            row_codes = row_codes.new_zeros(O, width)
        runs = row_codes.reshape(O, packed.shape[1], parts, depth)
        each = runs[:, :, 0] if parts == 1 else runs[:, :, 0] | runs[:, :, 1] << 4
        packed[e] = each.transpose(0, 1)
    return PreparedMatrix(
        codes,
        packed,
        scales,
        zeros,
        columns,
        depth,
        share,
        tensor.group_size if columns is None and tensor.group_size != -1 else None,
        (E, O, D),
    )


def unpack_prepared(matrix: PreparedMatrix, e: int) -> torch.Tensor:
    """The weights of one expert.

    Args:
        matrix: in the layout of the kernels.
        e: the expert.

    Returns:
        [O, D], float32.
    """
    _, O, D = matrix.shape
    packed = matrix.packed[e]
    if matrix.parts == 2:
        packed = torch.stack([packed & 15, packed >> 4], 2)
    codes = packed.view(packed.shape[0], O, -1).transpose(0, 1).reshape(O, -1)

    def of_columns(part: torch.Tensor) -> torch.Tensor:
        wide = part.repeat_interleave(matrix.share * matrix.depth, 0).T
        return wide[:, : codes.shape[1]]

    if matrix.codes == "e4m3":
        values = codes.view(torch.float8_e4m3fn).to(torch.float32)
    elif matrix.codes == "e2m1":
        values = from_e2m1(codes)
    else:
        middle = 8 if matrix.codes == "int4" else 128
        zeros = middle if matrix.zeros is None else of_columns(matrix.zeros[e]).to(torch.int32)
        values = (codes.to(torch.int32) - zeros).to(torch.float32)
    scales = matrix.scales[e]
    wide = from_e8m0(scales) if scales.dtype is torch.uint8 else scales.to(torch.float32)
    weights = (values * of_columns(wide)).to(torch.float32)
    if matrix.columns is None:
        return weights[:, :D].contiguous()
    columns = matrix.columns[e]
    out = weights.new_zeros(O, D + 1)
    # What fills groups up has column -1, and lands in the one that is cut off.
    out[:, columns.long()] = weights
    return out[:, :D].contiguous()


def _codes_of(tensor: QuantizedTensor, e: int) -> torch.Tensor:
    """The codes of one expert without padding: [O, D], uint8."""
    _, O, D = tensor.shape
    packed = dense(tensor.packed[e, :O])
    kind = CODES[tensor.format]
    if tensor.format.startswith("Q8"):
        width = 34 if tensor.format == "Q8_0" else 36
        blocks = packed.unflatten(1, (packed.shape[1] // width, width))
        # With the sign's bit turned round, int8 is a code with a middle of 128.
        return (blocks[..., width - 32 :] ^ 128).flatten(1)[:, :D]
    # A word's lowest byte comes first, and so does a byte's low half.
    bytes_ = packed.view(torch.uint8)
    return (unpack_nibbles(bytes_) if kind in HALVED else bytes_)[:, :D]


def _scales_by_row(tensor: QuantizedTensor) -> torch.Tensor:
    """One for each group and row, without padding, transposed: [E, G, O]."""
    E, O, D = tensor.shape
    B = tensor.group_size
    scales = tensor.scales
    if scales is None:
        width = 34 if tensor.format == "Q8_0" else 36
        blocks = tensor.packed.unflatten(2, (tensor.packed.shape[2] // width, width))
        scales = dense(blocks[..., :2]).view(torch.float16)[..., 0]
    if tensor.format == "e4m3" and B != -1:
        scales = scales.repeat_interleave(B, 1)
    elif scales.shape[1] == 1:
        scales = scales.expand(E, O, scales.shape[2])
    scales = scales[:, :O]
    if tensor.global_scale is not None:
        shared = tensor.global_scale
        # The product of a float8 and a float32 scale, rounded once.
        scales = (
            scales.to(torch.float32)
            * (shared if shared.shape[1] == 1 else shared[:, :O])[:, :, None]
        )
    if scales.dtype is torch.float64:
        scales = scales.to(torch.float32)
    if tensor.g_idx is None:
        scales = scales[:, :, : 1 if B == -1 else -(-D // B)]
    return scales.mT


def _sorted_columns(
    tensor: QuantizedTensor, G: int, parts: int, most: int
) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Columns by group, each group filled up to whole parts.

    Args:
        tensor: with g_idx, or with groups that no part fits.
        G: groups.
        parts: products of one step.
        most: columns of a part.

    Returns:
        depth: columns of a part.
        share: parts that have one scale.
        columns: [E, P], int32.
        groups: [E, P / depth / share], int64, the group of each scale; -1 for none.
    """
    E, _, D = tensor.shape
    B = tensor.group_size
    device = tensor.packed.device
    places = torch.arange(D, device=device)
    if tensor.g_idx is None:
        ids = (places // B).expand(E, D)
    else:
        ids = tensor.g_idx[:, :D].to(torch.int64)
    counts = ids.new_zeros(E, G).scatter_add_(1, ids, torch.ones_like(ids))
    depth, share = LEAST_DEPTH, 1
    if B % LEAST_DEPTH == 0 and bool((counts == B).all()):
        depth = min(most, B & -B)
        share = B // depth
    filled = (counts + depth - 1) // depth * depth
    ends = filled.cumsum(1)
    sorted_ids, order = ids.sort(dim=1, stable=True)
    # From a column's place among all to its place behind what fills up the groups before it.
    shifts = (ends - filled) - (counts.cumsum(1) - counts)
    length = int(ends[:, -1].max()) if E * G else 0
    width = _up(length, parts * depth)
    columns = torch.full((E, width), -1, dtype=torch.int32, device=device)
    columns.scatter_(1, places + shifts.gather(1, sorted_ids), order.to(torch.int32))
    starts = torch.arange(0, width, depth * share, device=device)
    groups = torch.searchsorted(ends, starts.expand(E, -1).contiguous(), right=True)
    return depth, share, columns, groups.where(groups < G, -1)


def _of_parts(groups: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor | None:
    """[E, G, O] of groups to [E, S, O] in the order of parts; zeros where there is no group."""
    if part is None:
        return None
    nobodys = (groups < 0)[:, :, None]
    rows = groups.clamp(min=0)[:, :, None].expand(-1, -1, part.shape[2])
    return part.gather(1, rows).masked_fill_(nobodys, 0)


def _rows_up_to(count: int, part: torch.Tensor | None) -> torch.Tensor | None:
    """[E, G, O] with zeros for the parts past the last group: [E, count, O], contiguous."""
    if part is None:
        return None
    more = part.new_zeros(part.shape[0], max(count - part.shape[1], 0), part.shape[2])
    return torch.cat([part, more], 1)


def dense(part: torch.Tensor) -> torch.Tensor:
    """Contiguous, also in the strides of dimensions of size 1: a view of another dtype looks there.

    >>> dense(torch.zeros(1, 4).T).stride()
    (1, 1)
    """
    sizes = list(part.shape)
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    return part.contiguous().as_strided(sizes, strides)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
