"""How the rare faults of experts, layers and slices are made: other arguments, other gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from moe_reference.activations import activate
from moe_reference.alignment import local_ids
from moe_reference.config import ExpertsConfig

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments, When
from moe_conformance.targets import Reference

Change = Callable[[Arguments], Arguments]
Result = Callable[[Arguments], Any]
Activation = Callable[[torch.Tensor, ExpertsConfig], torch.Tensor]


def instead(
    operation: str,
    name: str,
    sentence: str,
    when: When,
    result: Result,
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault that gives another result in some calls.

    Args:
        operation: the operation that it is in.
        name: what goes wrong.
        sentence: the same in words.
        when: in which calls.
        result: what they give instead; `right` gives what the reference does.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """
    names = list(inspect.signature(getattr(Reference, operation)).parameters)[1:]

    def call(self: Reference, *given: Any, **named: Any) -> Any:
        arguments = dict(zip(names, given, strict=False)) | named
        if not when(arguments):
            return right(operation, arguments)
        return result(arguments)

    members = {operation: call, "__doc__": sentence, "__module__": result.__module__}
    fault(name, catches=catches, thread=thread)(type("Rare", (Reference,), members))


def altered(
    operation: str,
    name: str,
    sentence: str,
    when: When,
    change: Change,
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault that computes with other arguments in some calls; see `instead`.

    Args:
        operation: the operation that it is in.
        name: what goes wrong.
        sentence: the same in words.
        when: in which calls.
        change: from the arguments to those that are other ones.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """

    def result(a: Arguments) -> Any:
        return right(operation, a | change(a))

    result.__module__ = change.__module__
    instead(operation, name, sentence, when, result, *catches, thread=thread)


def right(operation: str, a: Arguments) -> Any:
    """What the reference gives."""
    return getattr(Reference(), operation)(**a)


def passed_through(value: torch.Tensor, gradient_of: torch.Tensor) -> torch.Tensor:
    """The values of one tensor with the gradient of another."""
    return value.detach() + (gradient_of - gradient_of.detach())


def as_if_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel reads that takes a tensor's address and ignores its strides."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor.detach().as_strided(tensor.shape, strides, tensor.storage_offset())


def with_fields(value: Any, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Any:
    """The same dataclass with some of its tensors changed, all of them where none is named."""
    assert is_dataclass(value)
    names = names or tuple(f.name for f in fields(value))
    given = {name: getattr(value, name) for name in names}
    changed = {name: change(t) for name, t in given.items() if t is not None}
    return replace(value, **changed)  # type: ignore[type-var]


def rows_of(a: Arguments) -> torch.Tensor:
    """[T, K], the row of the weights of each pair, -1 where it is not here."""
    return local_ids(a["expert_ids"], len(a["experts"].down), a.get("expert_map"))


def counts_of(a: Arguments) -> torch.Tensor:
    """[E], pairs of each expert that is here."""
    rows = rows_of(a)
    return torch.bincount(rows[rows >= 0], minlength=len(a["experts"].down))


def by_hand(
    a: Arguments,
    activation: Activation = activate,
    *,
    product: Callable[..., torch.Tensor] = F.linear,
    first: Callable[..., torch.Tensor] | None = None,
    weighted: Callable[..., torch.Tensor] | None = None,
    summed: Callable[[torch.Tensor], torch.Tensor] = lambda pairs: pairs.sum(1),
    wide: torch.dtype | None = None,
) -> torch.Tensor:
    """`experts` with one step exchanged.

    Args:
        a: the arguments of `experts`.
        activation: from the first product to what the second one multiplies.
        product: of rows, a matrix and a bias.
        first: the same for the first of the two products.
        weighted: from (outputs [S, H], weights [S, 1], down_bias [H] or None) to the weighted
            outputs; the bias is then not in them yet.
        summed: from the pairs [T, K, H] to [T, H].
        wide: the dtype of everything; float32, or float64 where x is.
    """
    right("experts", a)  # bad arguments raise as they should
    x, weights, one, config = a["x"], a["weights"], a["experts"], a["config"]
    wide = wide or (torch.float64 if x.dtype is torch.float64 else torch.float32)
    rows, on_input = rows_of(a), config.weight_on == "input"
    pairs = x.new_zeros(*rows.shape, x.shape[1], dtype=wide)
    # Zero, and connected to everything: gradients are zero instead of None.
    given = (x, weights, *(t for t in vars(one).values() if t is not None))
    pairs = pairs + sum(t[:0].to(wide).sum() for t in given)
    for e in range(len(one.down)):
        at = (rows == e).nonzero(as_tuple=True)
        if len(at[0]) == 0:
            continue
        x_S, w_S = x[at[0]].to(wide), weights[at][:, None].to(wide)
        biases = [None if b is None else b[e].to(wide) for b in (one.gate_up_bias, one.down_bias)]
        pre = (first or product)(x_S * w_S if on_input else x_S, one.gate_up[e].to(wide), biases[0])
        hidden = activation(pre, config)
        if weighted is None or on_input:
            out = product(hidden, one.down[e].to(wide), biases[1])
            out = out if on_input else out * w_S
        else:
            out = weighted(product(hidden, one.down[e].to(wide), None), w_S, biases[1])
        pairs = pairs.index_put(at, out.to(pairs.dtype))
    return summed(pairs).to(x.dtype)
