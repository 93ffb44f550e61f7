"""Faults that show on few inputs only: one size, one dtype, one corner of a configuration.

Kernels are specialised, and a specialisation that is wrong is right everywhere else. Each of these
is the reference but for the calls that its condition picks out, on which a small thing is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Arguments = dict[str, Any]
When = Callable[[Arguments], bool]
Wrong = Callable[[Any, Arguments], Any]


def rare(
    operation: str,
    name: str,
    where: str,
    when: When,
    wrong: Wrong,
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of one operation.

    Args:
        operation: the operation that it is in.
        name: in which calls.
        where: the same in words.
        when: the same of a call's arguments.
        wrong: from the right result and the arguments to the wrong one.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """
    sentence = f"{(wrong.__doc__ or '').rstrip('.')}, with {where}."
    right = getattr(Reference, operation)
    names = list(inspect.signature(right).parameters)[1:]

    def call(self: Reference, *given: Any, **named: Any) -> Any:
        result = right(self, *given, **named)
        arguments = dict(zip(names, given, strict=False)) | named
        return wrong(result, arguments) if when(arguments) else result

    members = {operation: call, "__doc__": sentence, "__module__": when.__module__}
    made = type("Rare", (Reference,), members)
    title = f"{operation.replace('_', '-')}-is-wrong-{name}"
    fault(title, catches=catches, thread=thread)(made)


# Which calls.


def tokens(a: Arguments) -> int:
    """T, or the rows of what stands in its place."""
    for name in ("logits", "x", "expert_ids", "weights"):
        if name in a:
            shape = a[name].shape
            return int(shape[0] * shape[1]) if name == "x" and a[name].ndim == 3 else int(shape[0])
    raise KeyError("no tokens")


def top_k(a: Arguments) -> int:
    """K."""
    if "expert_ids" in a:
        return int(a["expert_ids"].shape[1])
    return int((a["config"].routing if hasattr(a["config"], "routing") else a["config"]).top_k)


# What is wrong.


def first_row_scaled(out: Any, a: Arguments) -> Any:
    """The first row is an eighth too large."""
    return torch.cat([out[:1] * 1.125, out[1:]])


def last_row_zero(out: Any, a: Arguments) -> Any:
    """The last row is zero."""
    return torch.cat([out[:-1], out[-1:] * 0])


def last_column_zero(out: Any, a: Arguments) -> Any:
    """The last column is zero."""
    return torch.cat([out[..., :-1], out[..., -1:] * 0], -1)


def loss_larger(out: Any, a: Arguments) -> Any:
    """An eighth too much."""
    return out * 1.125
