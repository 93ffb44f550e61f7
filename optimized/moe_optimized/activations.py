"""The activations in whole-tensor torch operations, and their derivatives without autograd.

A custom operator runs below autograd, so its backward cannot ask for the derivative of its forward:
`activate_with_gradient` returns it as a function. Slopes at kinks are those of torch.

Dimension key: S rows, I intermediate size, J = 2I (I without a gate).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertsConfig

Gradient = Callable[[torch.Tensor], torch.Tensor]


def activate(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The activation of [..., 2I] (of [..., I] without a gate), in its dtype.

    >>> activate(torch.tensor([[-1.0, 2.0]]), ExpertsConfig("relu", gated=False)).tolist()
    [[0.0, 2.0]]
    """
    if not config.gated:
        return _ELEMENTWISE[config.activation](pre)
    gate, up = pre.chunk(2, dim=-1)
    if config.activation in _ELEMENTWISE:
        return _ELEMENTWISE[config.activation](gate) * up
    gate = gate.clamp(max=config.limit)
    up = up.clamp(-config.limit, config.limit)
    if config.activation == "swiglu_limit":
        return F.silu(gate) * up
    return gate * torch.sigmoid(config.alpha * gate) * (up + 1.0)


def activate_with_gradient(
    pre: torch.Tensor, config: ExpertsConfig
) -> tuple[torch.Tensor, Gradient]:
    """`activate`, and how its gradient is turned into that of the pre-activation.

    Args:
        pre: [S, J].
        config: which activation is meant.

    Returns:
        hidden: [S, I].
        gradient: from the gradient of hidden, [S, I], to that of pre, [S, J].

    >>> hidden, gradient = activate_with_gradient(torch.tensor([[2.0, 3.0]]), ExpertsConfig("relu"))
    >>> hidden.tolist(), gradient(torch.ones(1, 1)).tolist()
    ([[6.0]], [[3.0, 2.0]])
    """
    if not config.gated:
        slope = _BACKWARD[config.activation]
        return _ELEMENTWISE[config.activation](pre), lambda grad: slope(grad, pre)
    gate, up = pre.chunk(2, dim=-1)
    if config.activation in _ELEMENTWISE:
        slope = _BACKWARD[config.activation]
        activated = _ELEMENTWISE[config.activation](gate)

        def gradient(grad: torch.Tensor) -> torch.Tensor:
            return torch.cat([slope(grad * up, gate), grad * activated], dim=-1)

        return activated * up, gradient

    inside = gate <= config.limit
    up_inside = (up >= -config.limit) & (up <= config.limit)
    gate = gate.clamp(max=config.limit)
    up = up.clamp(-config.limit, config.limit)
    alpha, shift = (1.0, 0.0) if config.activation == "swiglu_limit" else (config.alpha, 1.0)
    share = torch.sigmoid(alpha * gate)
    activated, up = gate * share, up + shift

    def clamped_gradient(grad: torch.Tensor) -> torch.Tensor:
        by_gate = grad * up * share * (1.0 + alpha * gate * (1.0 - share))
        return torch.cat(
            [torch.where(inside, by_gate, 0.0), torch.where(up_inside, grad * activated, 0.0)], -1
        )

    return activated * up, clamped_gradient


_ELEMENTWISE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

_BACKWARD = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": lambda grad, x: grad * (2.0 * F.relu(x)),
}
