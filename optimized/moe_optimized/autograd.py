"""Backward passes that are written out refuse what was not: the gradient of a gradient."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once(name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark the backward of a `torch.autograd.Function` as one that is differentiated once.

    torch's `once_differentiable` refuses only where the output's gradient has a graph. Without one,
    that of a sum for example, it takes the gradients for constants, which they are not: a penalty
    on them would have no effect, and nobody would be told.

    Args:
        name: of the function, for the error; None takes the `caller` of the context.
    """

    def mark(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def marked(ctx: Any, *grads: torch.Tensor | None) -> Any:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            found = found if isinstance(found, tuple) else (found,)
            marker = torch.empty(0, requires_grad=True)
            return _Refusing.apply(marker, name or ctx.caller, *found)

        return marked

    return mark


class _Refusing(torch.autograd.Function):
    """The same gradients, with a graph that ends in an error."""

    @staticmethod
    def forward(
        ctx: Any, marker: torch.Tensor, name: str, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name}: expected to be differentiated once, got asked for the gradient of a "
            "gradient (create_graph=True)"
        )
