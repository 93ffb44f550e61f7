"""Joining packed matrices: experts put together, and rows put under each other.

The inverse of `packed_slicing`. A checkpoint keeps gate and up apart, each with scales of its own;
here they are one matrix, and every number must stay what it was. So:

- A scale for the whole matrix (e4m3 per tensor, the `global_scale` of nvfp4) is spread over the
  rows of its part.
- Blocks of e4m3 must end where the part ends, or the next part's scales would be for other rows.
- `g_idx` says which columns share a scale, for all rows: parts with different ones do not join.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), B rows and columns
of a block, G groups of columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

PARTS = ("packed", "scales", "zeros", "g_idx", "global_scale")


def join_packed(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The matrices of several packed tensors, expert after expert.

    Args:
        tensors: at least one; of one format, group size and shape but for E.

    Raises:
        TypeError: not `QuantizedTensor`s.
        ValueError: none, or they do not belong together.

    >>> words = torch.zeros(1, 2, 1, dtype=torch.int32)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 2, 1), shape=(1, 2, 8))
    >>> join_packed([one, one]).shape
    (2, 2, 8)
    """
    first = _check_alike(tensors)
    shapes = [each.shape[1:] for each in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"tensors: expected matrices of one shape, got {sorted(set(shapes))}")
    # One matrix may have g_idx and another be in order, which is a g_idx that counts up.
    if any(each.g_idx is not None for each in tensors):
        tensors = [_with_g_idx(each) for each in tensors]
    joined: dict[str, Any] = {
        part: torch.cat([getattr(each, part) for each in tensors])
        for part in PARTS
        if getattr(tensors[0], part) is not None
    }
    return replace(first, **joined, shape=(sum(each.shape[0] for each in tensors), *shapes[0]))


def join_packed_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices under each other, the same experts in each.

    Args:
        tensors: at least one; of one format, group size, E and D.

    Raises:
        TypeError: not `QuantizedTensor`s.
        ValueError: none, or they do not belong together: another `g_idx`, or a block of e4m3 that
            would hold rows of two of them.

    Source: vLLM's w13, where gate and up are loaded into one tensor.

    >>> words = torch.zeros(1, 2, 1, dtype=torch.int32)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 2, 1), shape=(1, 2, 8))
    >>> join_packed_rows([one, one]).shape
    (1, 4, 8)
    """
    first = _check_alike(tensors)
    E, _, D = first.shape
    for each in tensors[1:]:
        if (each.shape[0], each.shape[2]) != (E, D) or (
            each.packed.shape[2] != first.packed.shape[2]
        ):
            raise ValueError(
                f"tensors: expected {E} experts and {D} columns in each, got {each.shape}"
            )
        if (each.g_idx is None) != (first.g_idx is None) or (
            each.g_idx is not None
            and first.g_idx is not None
            and not torch.equal(each.g_idx.long(), first.g_idx.long())
        ):
            raise ValueError(
                "tensors: expected the same g_idx in all, since columns of one matrix are grouped "
                "once, got different ones"
            )
    _check_blocks(tensors)
    # One whole matrix keeps its one scale.
    rows = list(tensors) if len(tensors) == 1 else [_spread(each) for each in tensors]
    joined: dict[str, Any] = {}
    for part in ("packed", "scales", "zeros", "global_scale"):
        if getattr(first, part) is not None:
            joined[part] = torch.cat([_own_rows(each, part) for each in rows], dim=1)
    return replace(first, **joined, shape=(E, sum(each.shape[1] for each in tensors), D))


def join_quantized_experts(experts: Sequence[QuantizedExperts]) -> QuantizedExperts:
    """Packed experts, one after the other.

    Args:
        experts: at least one; of the same formats and shapes but for E.

    Raises:
        ValueError: none, or they do not belong together.

    >>> from moe_reference.quantization import quantize
    >>> matrix = quantize(torch.eye(8)[None], "uint8b128", group_size=8)
    >>> one = QuantizedExperts(matrix, matrix)
    >>> join_quantized_experts([one, one, one]).down.shape
    (3, 8, 8)
    """
    if len(experts) == 0:
        raise ValueError("experts: expected at least one, got none")
    first = experts[0]
    joined: dict[str, Any] = {}
    for part in ("gate_up_bias", "down_bias", "activation_scales"):
        pieces = [getattr(each, part) for each in experts]
        missing = sum(piece is None for piece in pieces)
        if 0 < missing < len(pieces):
            raise ValueError(
                f"experts: expected {part} of all or of none, got {missing} of {len(pieces)} "
                f"without it"
            )
        if missing == 0:
            joined[part] = torch.cat(pieces)
    for setting in ("is_k_full", "activation_format"):
        values = {getattr(each, setting) for each in experts}
        if len(values) > 1:
            raise ValueError(f"experts: expected one {setting}, got {sorted(map(str, values))}")
    gate_up = join_packed([each.gate_up for each in experts])
    return replace(first, gate_up=gate_up, down=join_packed([e.down for e in experts]), **joined)


def _check_alike(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    if len(tensors) == 0:
        raise ValueError("tensors: expected at least one, got none")
    for each in tensors:
        check_quantized("tensors", each)
    kinds = {(each.format, each.group_size) for each in tensors}
    if len(kinds) > 1:
        listed = ", ".join(f"{format} with {size}" for format, size in sorted(kinds))
        raise ValueError(f"tensors: expected one format and group size, got {listed}")
    return tensors[0]


def _with_g_idx(tensor: QuantizedTensor) -> QuantizedTensor:
    if tensor.g_idx is not None:
        return replace(tensor, g_idx=tensor.g_idx.to(torch.int32))
    assert tensor.scales is not None
    D = tensor.shape[2]
    columns_D = torch.arange(D, dtype=torch.int32, device=tensor.packed.device)
    B = D if tensor.group_size == -1 else tensor.group_size
    return replace(tensor, g_idx=(columns_D // B).expand(tensor.shape[0], D).contiguous())


def _check_blocks(tensors: Sequence[QuantizedTensor]) -> None:
    B = tensors[0].group_size
    if tensors[0].format != "e4m3" or B == -1:
        return
    for each in tensors[:-1]:
        if each.shape[1] % B != 0:
            raise ValueError(
                f"tensors: expected a multiple of {B} rows, the block of e4m3, in all but the "
                f"last, got {each.shape[1]}"
            )


def _spread(tensor: QuantizedTensor) -> QuantizedTensor:
    """A scale for the whole matrix as one for each row."""
    O = tensor.packed.shape[1]
    changed: dict[str, Any] = {}
    if tensor.format == "e4m3" and tensor.group_size == -1:
        assert tensor.scales is not None
        changed["scales"] = tensor.scales.expand(-1, O, -1)
    if tensor.global_scale is not None:
        changed["global_scale"] = tensor.global_scale.expand(-1, O)
    return replace(tensor, **changed) if changed else tensor


def _own_rows(tensor: QuantizedTensor, part: str) -> torch.Tensor:
    """A part without what belongs to padding below the matrix."""
    O = tensor.shape[1]
    if part == "scales" and tensor.format == "e4m3" and tensor.group_size != -1:
        O = -(-O // tensor.group_size)
    rows: torch.Tensor = getattr(tensor, part)[:, :O]
    return rows
