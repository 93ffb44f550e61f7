"""Faults of rows, and of matrices, that lie further apart than they are long.

Whoever cuts one matrix out of a wider one has such rows. A look at the last stride alone, as many
kernels take it, finds them contiguous. Whoever cuts one batch out of a longer one, or leaves the
padding of a matrix out, has such matrices, and a look at the last two strides finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_calls import altered, as_if_contiguous, with_fields


def pitched(tensor: torch.Tensor) -> bool:
    """Whether rows of several elements lie one after the other with gaps between them."""
    dense = tensor.stride(-1) == 1 and tensor.shape[-1] > 1
    return dense and tensor.stride(-2) > tensor.shape[-1]


def spaced(tensor: torch.Tensor) -> bool:
    """Whether contiguous matrices lie one after the other with gaps between them."""
    if tensor.ndim != 3 or tensor.numel() == 0 or len(tensor) == 1 or pitched(tensor):
        return False
    return tensor[0].is_contiguous() and tensor.stride(0) > tensor[0].numel()


def _when(name: str) -> Callable[[Arguments], bool]:
    return lambda a: pitched(a[name])


def _read_densely(name: str) -> Callable[[Arguments], Arguments]:
    return lambda a: {name: as_if_contiguous(a[name])}


for _operation, _argument, _catches in (
    ("route", "logits", ("GATE-04", "GATE-28")),
    ("balance_loss", "logits", ("BALANCE-01", "BALANCE-02")),
    ("z_loss", "logits", ("BALANCE-28", "BALANCE-30")),
    ("combine", "rows", ("DISPATCH-19", "DISPATCH-32")),
    ("drop_to_capacity", "weights", ("DISPATCH-41",)),
    ("experts", "x", ("EXPERT-11", "NUM-06")),
    ("layer", "x", ("LAYER-01", "LAYER-04")),
):
    altered(
        _operation,
        f"{_argument}-of-{_operation.replace('_', '-')}-are-read-at-their-width",
        f"The pitch of {_argument} is taken for their width.",
        _when(_argument),
        _read_densely(_argument),
        *_catches,
    )

for _field in ("gate_up", "down"):
    altered(
        "experts",
        f"{_field.replace('_', '-')}-is-read-at-its-width",
        f"The pitch of the rows of {_field} is taken for their width.",
        lambda a, f=_field: pitched(getattr(a["experts"], f)),  # type: ignore[misc]
        lambda a, f=_field: {  # type: ignore[misc]
            "experts": with_fields(a["experts"], as_if_contiguous, f)
        },
        "EXPERT-11",
        "NUM-11",
    )

for _operation, _argument, _catches in (
    ("experts_batched", "x", ("EXPERT-15", "EXPERT-22")),
    ("layer", "x", ("LAYER-01", "LAYER-02")),
):
    altered(
        _operation,
        f"{_argument}-of-{_operation.replace('_', '-')}-is-read-without-gaps",
        f"The matrices of {_argument} are taken to follow each other.",
        lambda a, f=_argument: spaced(a[f]),  # type: ignore[misc]
        _read_densely(_argument),
        *_catches,
    )

for _field in ("gate_up", "down"):
    altered(
        "experts",
        f"{_field.replace('_', '-')}-is-read-without-gaps",
        f"The matrices of {_field} are taken to follow each other.",
        lambda a, f=_field: spaced(getattr(a["experts"], f)),  # type: ignore[misc]
        lambda a, f=_field: {  # type: ignore[misc]
            "experts": with_fields(a["experts"], as_if_contiguous, f)
        },
        "EXPERT-01",
        "NUM-11",
    )


def first_alone(tensor: torch.Tensor) -> torch.Tensor:
    """The first row, and zeros where the same row stands again."""
    return torch.cat([tensor[:1], torch.zeros_like(tensor[1:])])


for _argument in ("x", "weights"):
    altered(
        "experts",
        f"{_argument}-is-there-for-the-first-token-alone",
        f"Of {_argument}, where one row stands for all tokens, the first token gets something.",
        lambda a, f=_argument: len(a[f]) > 1 and a[f].stride(0) == 0,  # type: ignore[misc]
        lambda a, f=_argument: {f: first_alone(a[f])},  # type: ignore[misc]
        "NUM-11",
    )

altered(
    "experts_batched",
    "x-is-there-for-the-first-expert-alone",
    "Of one batch that stands for all experts, the first expert gets something.",
    lambda a: len(a["x"]) > 1 and a["x"].stride(0) == 0,
    lambda a: {"x": first_alone(a["x"])},
    "EXPERT-15",
)
