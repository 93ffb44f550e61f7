"""Small pictures of values for a report: a few numbers of a tensor, or a line of text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from moe_conformance.codec import walk

PREVIEW = 8
"""Rows and columns of a tensor that a report shows at most."""

PREVIEWED_INPUTS = 12
"""Inputs of a failing case that a report shows at most; the saved case has them all."""


def preview_inputs(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a case, the tensors of a dataclass one by one under their paths."""
    shown: list[dict[str, Any]] = []
    for name, value in inputs.items():
        tensors = list(walk(value, name))
        if not tensors or isinstance(value, torch.Tensor):
            shown.append(preview(name, value))
            continue
        if dataclasses.is_dataclass(value) and not _brief(value).endswith("()"):
            shown.append(preview(name, value))
        shown += [preview(path, tensor) for path, tensor in tensors]
    return shown[:PREVIEWED_INPUTS]


def preview(name: str, value: Any, around: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """A value as text, or a window of at most `PREVIEW` by `PREVIEW` numbers of a tensor.

    Args:
        name: what it is called in the report.
        value: anything.
        around: row and column that the window has to hold, in folded form: rows run over all
            dimensions but the last.

    Returns:
        `name` and `text`; or `name`, `dtype`, `shape`, `rows` (an index into all dimensions but
        the last for each), `columns` and `values` (by row; non-finite ones as text).
    """
    if not isinstance(value, torch.Tensor):
        return {"name": name, "text": _brief(value)}
    folded = _fold(value)
    starts = [
        max(0, min(place - PREVIEW // 2 + 1, size - PREVIEW))
        for place, size in zip(around, folded.shape, strict=True)
    ]
    rows, columns = (
        range(start, min(start + PREVIEW, size))
        for start, size in zip(starts, folded.shape, strict=True)
    )
    window = folded[rows.start : rows.stop, columns.start : columns.stop]
    return {
        "name": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "rows": [_lead(row, tuple(value.shape[:-1])) for row in rows],
        "columns": list(columns),
        "values": [
            [_number(each) for each in row]
            for row in (window.double() if window.is_floating_point() else window).tolist()
        ],
    }


def _brief(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # What stands at its default, or is shown as a tensor anyway, would only be in the way.
        fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        said = ", ".join(
            f"{name}={_brief(given)}"
            for name, (given, default) in fields.items()
            if not any(True for _ in walk(given)) and given is not None and given != default
        )
        return f"{type(value).__name__}({said})"
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:500]}…"


def _fold(tensor: torch.Tensor) -> torch.Tensor:
    """In two dimensions: all but the last one run down the rows."""
    tensor = tensor.detach().cpu()
    last = tensor.shape[-1] if tensor.ndim else 1
    return tensor.reshape(math.prod(tensor.shape[:-1]), last)


def _lead(row: int, lead: tuple[int, ...]) -> list[int]:
    index: list[int] = []
    for size in reversed(lead):
        row, place = divmod(row, size)
        index.insert(0, place)
    return index


def worst_place(expected: Any, actual: Any) -> tuple[int, int]:
    """Row and column of the greatest difference, in folded form."""
    both = isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor)
    if not both or expected.shape != actual.shape or expected.numel() == 0:
        return 0, 0
    wanted, came = _fold(expected).double(), _fold(actual).double()
    same = (wanted == came) | (wanted.isnan() & came.isnan())
    error = torch.where(same, 0.0, (wanted - came).abs().nan_to_num(torch.inf))
    row, column = divmod(int(error.argmax()), wanted.shape[1])
    return row, column


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)
