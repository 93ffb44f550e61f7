r"""Slices of packed matrices: scales, zero points and g_idx are cut with the codes, or not at all.

Unpacking and slicing commute: a slice stands for exactly the numbers that a slice of the unpacked
matrix holds. Where a cut would go through a group, a block or a packed word, that cannot be, and it
is refused: a scale of the neighbouring group is wrong by a factor that no shape shows.

| part | matrices | rows (gate and up) | columns (down) |
|---|---|---|---|
| codes | taken | cut | cut where a word or block ends |
| scales, zero points, in groups | taken | cut | cut where a group ends |
| the same, one for a whole row | taken | cut | whole |
| the same, with `g_idx` | taken | cut | **whole**: a slice has columns of any group |
| `g_idx` | taken | whole | cut, its numbers as they are |
| scales of B x B blocks | taken | cut where a block ends | cut where a block ends |
| scale per tensor, `global_scale` | taken | whole, or cut with the rows | whole |

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
B columns of a group, or rows and columns of a block.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_reference.checks import check_count
from moe_reference.expert_slicing import take_tensors
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import FORMATS, QuantizedTensor

PARTS = ("packed", "scales", "zeros", "g_idx", "global_scale")


def take_packed(tensor: QuantizedTensor, held: Sequence[int]) -> QuantizedTensor:
    """The matrices of some experts, in any order.

    Args:
        tensor: packed matrices of E experts.
        held: the experts, in any order.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: parts that do not fit each other, or an expert outside [0, E).

    >>> words, scales = torch.zeros(3, 1, 1, dtype=torch.int32), torch.arange(3.0).view(3, 1, 1)
    >>> one = QuantizedTensor("uint4b8", words, scales, shape=(3, 1, 8))
    >>> take_packed(one, [2, 0]).scales.flatten().tolist()
    [2.0, 0.0]
    """
    check_quantized("tensor", tensor)
    parts = {name: getattr(tensor, name) for name in PARTS if getattr(tensor, name) is not None}
    taken: dict[str, Any] = take_tensors(parts, tensor.shape[0], held)
    return replace(tensor, **taken, shape=(len(held), *tensor.shape[1:]))


def take_packed_rows(tensor: QuantizedTensor, ranges: Sequence[tuple[int, int]]) -> QuantizedTensor:
    """Some rows of every matrix: ranges of them, one after the other.

    Args:
        tensor: packed matrices of E experts.
        ranges: start and stop of each; those of blocks begin and end where a block does, but for
            the end of the last range, which may be the end of the matrix.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: a range is outside [0, O], or cuts through a block.

    >>> words, scales = torch.zeros(1, 4, 1, dtype=torch.int32), torch.arange(4.0).view(1, 4, 1)
    >>> one = QuantizedTensor("uint4b8", words, scales, shape=(1, 4, 8))
    >>> take_packed_rows(one, [(1, 2), (3, 4)]).scales.flatten().tolist()
    [1.0, 3.0]
    """
    check_quantized("tensor", tensor)
    E, O, D = tensor.shape
    for start, stop in ranges:
        if not 0 <= start <= stop <= O:
            raise ValueError(f"ranges: expected rows from 0 to {O}, got {start} to {stop}")
    B = tensor.group_size if tensor.format == "e4m3" and tensor.group_size != -1 else 1
    filled = [(start, stop) for start, stop in ranges if stop > start]
    for place, (start, stop) in enumerate(filled):
        at_the_end = stop == O and place == len(filled) - 1
        if start % B or (stop % B and not at_the_end):
            raise ValueError(
                f"ranges: expected rows that begin and end where a block of {B} does, since a "
                f"block has one scale, got {start} to {stop} of {O}"
            )
    changes: dict[str, Any] = {}
    for name in ("packed", "scales", "zeros"):
        part = getattr(tensor, name)
        if part is not None:
            step = B if name == "scales" else 1
            whole = name == "scales" and tensor.format == "e4m3" and part.shape[1] == 1 == B
            changes[name] = part.clone() if whole else _rows_of(part, filled, step)
    if tensor.g_idx is not None:
        changes["g_idx"] = tensor.g_idx.clone()
    if tensor.global_scale is not None:
        one = tensor.global_scale.shape[1] == 1
        part = tensor.global_scale
        changes["global_scale"] = part.clone() if one else _rows_of(part, filled, 1)
    return replace(tensor, **changes, shape=(E, sum(b - a for a, b in filled), D))


def take_packed_columns(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Neighbouring columns of every matrix.

    Args:
        tensor: packed matrices of E experts.
        start: the first column.
        stop: the one behind the last.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: columns outside [0, D], or a cut through a word, a group or a block.

    >>> words, scales = torch.zeros(1, 1, 2, dtype=torch.int32), torch.arange(2.0).view(1, 1, 2)
    >>> one = QuantizedTensor("uint4b8", words, scales, group_size=8, shape=(1, 1, 16))
    >>> take_packed_columns(one, 8, 16).scales.flatten().tolist()
    [1.0]
    >>> take_packed_columns(one, 4, 16)
    Traceback (most recent call last):
    ValueError: start: expected a multiple of 8, where a word of uint4b8 ends, got 4
    """
    check_quantized("tensor", tensor)
    check_count("start", start)
    check_count("stop", stop)
    E, O, D = tensor.shape
    if not start <= stop <= D:
        raise ValueError(f"stop: expected a column from {start} to {D}, got {stop}")
    known = FORMATS[tensor.format]
    grouped = tensor.group_size != -1 and tensor.g_idx is None
    needs = [(known.group or known.values, "a block" if known.group else "a word")]
    if grouped and known.group is None:
        needs.append((tensor.group_size, "a block" if tensor.format == "e4m3" else "a group"))
    for step, what in needs:
        for name, cut in (("start", start), ("stop", stop)):
            # An empty slice cuts nothing, nor does the end of the matrix.
            if cut % step and start < stop and (name, cut) != ("stop", D):
                raise ValueError(
                    f"{name}: expected a multiple of {step}, where {what} of {tensor.format} ends, "
                    f"got {cut}"
                )
    # The last columns take the padding with them; no columns take nothing.
    first, last = (start, None if stop == D else stop) if start < stop else (0, 0)
    changes: dict[str, Any] = {}
    changes["packed"] = _columns_of(tensor.packed, first, last, known.values, known.elements)
    for name in ("scales", "zeros"):
        part = getattr(tensor, name)
        if part is not None:
            B = tensor.group_size
            changes[name] = _columns_of(part, first, last, B, 1) if grouped else part.clone()
    if tensor.g_idx is not None:
        changes["g_idx"] = _columns_of(tensor.g_idx, first, last, 1, 1)
    return replace(tensor, **changes, shape=(E, O, stop - start))


def _rows_of(part: torch.Tensor, ranges: Sequence[tuple[int, int]], step: int) -> torch.Tensor:
    pieces = [part[:, start // step : -(-stop // step)] for start, stop in ranges]
    return torch.cat([part[:, :0], *pieces], dim=1)


def _columns_of(
    part: torch.Tensor, start: int, stop: int | None, step: int, width: int
) -> torch.Tensor:
    """The columns' elements, where `step` columns take `width` elements; None goes to the end."""
    end = None if stop is None else stop // step * width
    return part[..., start // step * width : end].clone()
