"""Checks of quantised tensors: do the parts belong to the format, and do they fit each other?

A scale of another dtype or shape is not an error of arithmetic: products run through and are wrong.
So every part is looked at before it is read.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
B columns of a group.
"""

from typing import get_args

import torch

from moe_reference.checks import IDS, check_count, check_tensor
from moe_reference.quantized_tensors import (
    FORMATS,
    INTEGER_BITS,
    Format,
    FormatName,
    QuantizedTensor,
)


def check_format(name: str, value: object) -> Format:
    """The format of that name, or an error.

    Args:
        name: the argument's name, as its caller knows it.
        value: what came.

    Raises:
        ValueError: there is no such format.

    >>> check_format("format", "mxfp4").group
    32
    """
    if value not in get_args(FormatName):
        names = ", ".join(map(repr, FORMATS))
        raise ValueError(f"{name}: expected one of {names}, got {value!r}")
    return FORMATS[str(value)]


def check_width(name: str, columns: int, format: str, group_size: int = -1) -> None:
    """Raise unless a row of so many columns can be held.

    Args:
        name: the argument's name, as its caller knows it.
        columns: D.
        format: the name of the format.
        group_size: of a format that leaves it open; -1 for one group.

    Raises:
        ValueError: D is no whole number of groups or of packed elements.

    >>> check_width("weight", 48, "mxfp4")
    Traceback (most recent call last):
    ValueError: weight: expected a multiple of 32 columns, the block of mxfp4, got 48
    """
    known = check_format("format", format)
    # Blocks of e4m3 may be cut short at the edge, as those of published checkpoints are.
    needs = [(known.group or known.values, "the block" if known.group else "one word")]
    if format in INTEGER_BITS and group_size != -1:
        needs.append((group_size, "the group"))
    for needed, what in needs:
        if columns % needed != 0:
            raise ValueError(
                f"{name}: expected a multiple of {needed} columns, {what} of {format}, "
                f"got {columns}"
            )


def check_quantized(name: str, tensor: object) -> None:
    """Raise unless all parts of a quantised tensor fit its format and each other.

    Args:
        name: the argument's name, as its caller knows it.
        tensor: what came.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: an unknown format, a part missing or too many, or of the wrong shape.

    >>> packed = torch.zeros(1, 1, 1, dtype=torch.int32)
    >>> check_quantized("down", QuantizedTensor("uint4b8", packed, shape=(1, 1, 8)))
    Traceback (most recent call last):
    TypeError: down.scales: expected a tensor, got NoneType
    """
    if not isinstance(tensor, QuantizedTensor):
        raise TypeError(f"{name}: expected a QuantizedTensor, got {type(tensor).__name__}")
    known = check_format(f"{name}.format", tensor.format)
    check_tensor(f"{name}.packed", tensor.packed, ("E", "O", "columns"), (known.packed,))
    E, O, width = tensor.packed.shape
    if width % known.elements != 0:
        raise ValueError(
            f"{name}.packed: expected whole blocks of {known.elements} bytes, got {width}"
        )
    D = width // known.elements * known.values
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[0] != E or not (0 <= shape[1] <= O and 0 <= shape[2] <= D):
        raise ValueError(
            f"{name}.shape: expected ({E}, at most {O}, at most {D}), which is what packed holds, "
            f"got {shape}"
        )
    _check_group_size(name, tensor.group_size, known, tensor.format)
    # With g_idx a group's columns stand anywhere, and a slice has any number of them.
    in_order = tensor.group_size if tensor.g_idx is None else -1
    check_width(f"{name}.packed", D, tensor.format, in_order)
    _check_parts(name, tensor, known, D)


def _check_group_size(name: str, group_size: int, known: Format, format: str) -> None:
    if known.group is not None and group_size != known.group:
        raise ValueError(
            f"{name}.group_size: expected {known.group}, which {format} fixes, got {group_size}"
        )
    if group_size != -1:
        check_count(f"{name}.group_size", group_size, 1)


def _check_parts(name: str, tensor: QuantizedTensor, known: Format, D: int) -> None:
    """Scales, zero points, g_idx and global scale: there where they belong, and nowhere else."""
    E, O, _ = tensor.packed.shape
    integer = tensor.format in INTEGER_BITS
    belong = {
        "scales": bool(known.scales),
        "zeros": tensor.format == "uint4",
        "g_idx": integer and tensor.g_idx is not None,
        "global_scale": tensor.format == "nvfp4",
    }
    for part, belongs in belong.items():
        if not belongs and getattr(tensor, part) is not None:
            raise ValueError(f"{name}.{part}: expected None with {tensor.format}, got a tensor")
    B = tensor.group_size
    G: int | str = 1 if B == -1 else -(-D // B)
    if tensor.g_idx is not None:
        G = "G"
        check_tensor(f"{name}.g_idx", tensor.g_idx, (E, D), IDS)
    if belong["scales"]:
        rows: int | str = O
        if tensor.format == "e4m3":
            rows = "1 or O" if B == -1 else -(-O // B)
        check_tensor(f"{name}.scales", tensor.scales, (E, rows, G), known.scales)
        assert tensor.scales is not None
        if rows == "1 or O" and tensor.scales.shape[1] not in (1, O):
            raise ValueError(
                f"{name}.scales: expected 1 or {O} rows, got {list(tensor.scales.shape)}"
            )
        if belong["zeros"]:
            shape = tuple(tensor.scales.shape)
            check_tensor(f"{name}.zeros", tensor.zeros, shape, (torch.uint8,))
            assert tensor.zeros is not None
            most = int(tensor.zeros.max()) if tensor.zeros.numel() > 0 else 0
            if most > 16:
                raise ValueError(f"{name}.zeros: expected zero points from 0 to 16, got {most}")
        if tensor.g_idx is not None:
            _check_groups(name, tensor.g_idx[:, : tensor.shape[2]], tensor.scales.shape[2])
    if belong["global_scale"]:
        check_tensor(f"{name}.global_scale", tensor.global_scale, (E, "1 or O"), (torch.float32,))
        assert tensor.global_scale is not None
        if tensor.global_scale.shape[1] not in (1, O):
            raise ValueError(
                f"{name}.global_scale: expected 1 or {O} columns, got "
                f"{list(tensor.global_scale.shape)}"
            )


def _check_groups(name: str, g_idx: torch.Tensor, G: int) -> None:
    wrong = g_idx[(g_idx < 0) | (g_idx >= G)]
    if wrong.numel() > 0:
        raise ValueError(
            f"{name}.g_idx: expected groups from 0 to {G - 1}, which is what scales hold, "
            f"got {wrong[0].item()}"
        )


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raise unless all numbers are finite: no scale would hold an infinity.

    Args:
        name: the argument's name, as its caller knows it.
        value: any shape and float dtype.

    Raises:
        ValueError: there is an infinity or a NaN.

    >>> check_finite("weight", torch.tensor([1.0, float("nan")]))
    Traceback (most recent call last):
    ValueError: weight: expected finite numbers, got 1 that are not
    """
    wrong = int((~value.isfinite()).sum())
    if wrong:
        raise ValueError(f"{name}: expected finite numbers, got {wrong} that are not")


def check_zeros(zeros: torch.Tensor, low: int, high: int, what: str) -> None:
    """Raise unless all zero points can be stored.

    Args:
        zeros: any shape, integers.
        low: the least that can be.
        high: the greatest.
        what: what stores them, for the message.

    Raises:
        ValueError: a zero point is outside the range.

    >>> check_zeros(torch.tensor([16]), 0, 15, "4 bits")
    Traceback (most recent call last):
    ValueError: tensor.zeros: expected zero points from 0 to 15, which 4 bits hold, got 16 to 16
    """
    if zeros.numel() > 0 and not low <= int(zeros.min()) <= int(zeros.max()) <= high:
        raise ValueError(
            f"tensor.zeros: expected zero points from {low} to {high}, which {what} hold, got "
            f"{int(zeros.min())} to {int(zeros.max())}"
        )


def check_rows(name: str, rows: int, in_word: int) -> None:
    """Raise unless so many rows fill whole words of zero points.

    Args:
        name: the argument's name, as its caller knows it.
        rows: O.
        in_word: how many are packed into a word.

    Raises:
        ValueError: the last word would be cut short.

    >>> check_rows("scales", 12, 8)
    Traceback (most recent call last):
    ValueError: scales: expected a multiple of 8 rows (out), which are packed together, got 12
    """
    if rows % in_word != 0:
        raise ValueError(
            f"{name}: expected a multiple of {in_word} rows (out), which are packed together, "
            f"got {rows}"
        )
