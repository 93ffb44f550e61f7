"""What the compiler of torch cannot trace is one operator to it.

Kernels that are launched by hand have no graph, and neither has a step that depends on a value. A
function with such a step is marked `opaque` where it stands. Its operator is made in `operators` or
`quantized_operators`, in the namespace `moespec`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

STAND_INS: dict[str, Callable[..., Any]] = {}
"""What compiled functions call for those that are `opaque`, by their names."""


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function be called in compiled functions, where nobody looks into it.

    What is wrong about shapes and values is then said when the compiled function runs, not when it
    is compiled.

    Args:
        function: of the name of one of the `STAND_INS`, with its arguments and its result.
    """
    name = function.__name__

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*arguments, **named)
        # Not at the top: operators are made of functions like this one.
        from moe_optimized import operators, quantized_operators  # noqa: F401

        return STAND_INS[name](*arguments, **named)

    return call


def stands_for(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make something the stand-in of an opaque function.

    Args:
        function: the opaque one.
    """

    def mark(stand_in: Any) -> Any:
        STAND_INS[function.__name__] = stand_in
        return stand_in

    return mark


def make_operator(name: str, arguments: str, results: str, run: Callable[..., Any]) -> Any:
    """An operator of torch that writes to none of its arguments.

    Args:
        name: without the namespace.
        arguments: of the schema.
        results: of the schema.
        run: what it runs.
    """
    # Operators stand below autograd. Functions that build a graph by themselves must not start one.
    return torch.library.custom_op(
        f"moespec::{name}",
        torch.no_grad()(run),
        mutates_args=(),
        schema=f"({arguments}) -> {results}",
    )


def in_eager(
    run: Callable[..., Any], differentiate: Callable[..., Any], setup: Callable[..., Any]
) -> Callable[..., Any]:
    """What an operator does, for calls that are not compiled: they need not pay for the compiler.

    Args:
        run: what the operator runs.
        differentiate: its backward.
        setup: what its backward needs.
    """
    members = {"forward": run, "setup_context": setup, "backward": differentiate}
    members = {name: staticmethod(member) for name, member in members.items()}
    return type(run.__name__, (torch.autograd.Function,), members).apply


def make_operators(
    module: Any,
    name: str,
    arguments: str,
    results: str,
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    run: Callable[[Any], Any] = lambda function: function,
    stand_in: Callable[[Any], Any] = lambda operator: operator,
) -> list[Any]:
    """An operator each for an opaque function and for its forms in torch and in Triton.

    Args:
        module: where they stand.
        name: of the function.
        arguments: of the schema.
        results: of the schema.
        fake: makes the results without their values.
        autograd: the backward and its setup, or None.
        run: from a function to what its operator runs.
        stand_in: from an operator to what is called for its function.
    """
    made = []
    for form in ("", "_torch", "_triton"):
        function = getattr(module, name + form)
        operator = make_operator(name + form, arguments, results, run(function))
        operator.register_fake(fake)
        if autograd:
            operator.register_autograd(autograd[0], setup_context=autograd[1])
        stands_for(function)(stand_in(operator))
        made.append(operator)
    return made
