"""Faults of rows, and of matrices, that lie further apart than they are long.

Whoever cuts one matrix out of a wider one has such rows. A look at the last stride alone, as many
kernels take it, finds them contiguous. Whoever cuts one batch out of a longer one, or leaves the
padding of a matrix out, has such matrices, and a look at the last two strides finds nothing.
"""

from __future__ import annotations

import torch

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


PITCH = "The pitch of the rows of {} is taken for their width."
WIDTH = ("are-read-at-their-width", PITCH, pitched)
FIELD = ("is-read-at-its-width", PITCH, pitched)
GAPS = ("is-read-without-gaps", "The matrices of {} are taken to follow each other.", spaced)

for _how, _operation, _argument, _catches in (
    (WIDTH, "route", "logits", ("GATE-04", "GATE-28")),
    (WIDTH, "balance_loss", "logits", ("BALANCE-01", "BALANCE-02")),
    (WIDTH, "z_loss", "logits", ("BALANCE-28", "BALANCE-30")),
    (WIDTH, "combine", "rows", ("DISPATCH-19", "DISPATCH-32")),
    (WIDTH, "drop_to_capacity", "weights", ("DISPATCH-41",)),
    (WIDTH, "experts", "x", ("EXPERT-11", "NUM-06")),
    (WIDTH, "layer", "x", ("LAYER-01", "LAYER-04")),
    (GAPS, "experts_batched", "x", ("EXPERT-15", "EXPERT-22")),
    (GAPS, "layer", "x", ("LAYER-01", "LAYER-02")),
):
    _end, _sentence, _shape = _how
    altered(
        _operation,
        f"{_argument}-of-{_operation.replace('_', '-')}-{_end}",
        _sentence.format(_argument),
        lambda a, f=_argument, shape=_shape: shape(a[f]),  # type: ignore[misc]
        lambda a, f=_argument: {f: as_if_contiguous(a[f])},  # type: ignore[misc]
        *_catches,
    )

for _how, _field, _catches in (
    (FIELD, "gate_up", ("EXPERT-11", "NUM-11")),
    (FIELD, "down", ("EXPERT-11", "NUM-11")),
    (GAPS, "gate_up", ("EXPERT-01", "NUM-11")),
    (GAPS, "down", ("EXPERT-01", "NUM-11")),
):
    _end, _sentence, _shape = _how
    altered(
        "experts",
        f"{_field.replace('_', '-')}-{_end}",
        _sentence.format(_field),
        lambda a, f=_field, shape=_shape: shape(getattr(a["experts"], f)),  # type: ignore[misc]
        lambda a, f=_field: {  # type: ignore[misc]
            "experts": with_fields(a["experts"], as_if_contiguous, f)
        },
        *_catches,
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
