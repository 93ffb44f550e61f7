r"""How an auxiliary loss joins the graph of a layer that returns one tensor.

The plain way is to hand the loss to the caller, who adds it to the main loss. Where a layer can
return nothing but its output, the loss is injected into the backward pass: the output keeps its
values, and the gradient that comes back through it starts the loss's own. The two ways here differ
in what they make of a main loss that is multiplied by $s$ before `backward`, for fp16 or for
accumulation over micro-batches. With $m$ the main loss and $a$ the auxiliary one they give

$$
\texttt{inject\_loss}: \; \nabla (s \, m + a) \qquad
\texttt{inject\_scaled\_loss}: \; \nabla (s \, m + s \, a)
$$

A loss kept as an attribute of the output tensor is neither: the next operation on it loses it.
"""

from typing import Any

import torch

from moe_reference.checks import check_float, check_tensor


def inject_loss(output: torch.Tensor, loss: torch.Tensor | None) -> torch.Tensor:
    """Join an auxiliary loss to the graph through a layer's output, as DeepSeek does.

    The output keeps its values; whatever is differentiated through it, the loss's own gradient is
    added once, with weight 1, **whatever the main loss is multiplied by**: under fp16 loss scaling
    or a division by accumulation steps the coefficient is off by that factor. Nothing is added
    where no gradient passes through the output.

    Args:
        output: any shape and float dtype.
        loss: a scalar, or None, which injects nothing.

    Source: DeepSeek's `AddAuxiliaryLoss`.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> inject_loss(torch.ones(2, requires_grad=True), x**2).sum().mul(1000).backward()
    >>> x.grad.item()
    6.0
    """
    return inject_scaled_loss(output, loss, 1.0)


def inject_scaled_loss(
    output: torch.Tensor, loss: torch.Tensor | None, main_loss_scale: float | torch.Tensor
) -> torch.Tensor:
    """`inject_loss` with the weight that the main loss has, as Megatron-LM does.

    With the main loss multiplied by `main_loss_scale` before `backward`, the gradients are those of
    `main_loss_scale * (main + loss)`, and unscaling restores both alike.

    Args:
        output: any shape and float dtype.
        loss: a scalar, or None, which injects nothing.
        main_loss_scale: a number, or a tensor of one, read when `backward` runs: the scale of a
            micro-batch may be written into it after the forward pass.

    Raises:
        TypeError: not float tensors.
        ValueError: the loss is not a scalar.

    Source: Megatron-LM's `MoEAuxLossAutoScaler`, which keeps the scale in a class attribute.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> output = inject_scaled_loss(torch.ones(2, requires_grad=True), x**2, main_loss_scale=1000)
    >>> output.sum().mul(1000).backward()
    >>> x.grad.item()
    6000.0
    """
    check_float("output", output)
    if loss is None:
        return output
    check_tensor("loss", loss, ())
    joined: torch.Tensor = _InjectLoss.apply(output, loss, main_loss_scale)
    return joined


class _InjectLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, loss: torch.Tensor, scale: float | torch.Tensor
    ) -> torch.Tensor:
        ctx.one, ctx.scale = torch.ones_like(loss), scale
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient, (ctx.one * ctx.scale).reshape(()), None
