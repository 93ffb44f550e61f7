r"""One expert: two products and the activation between them, by its exact name.

With the two halves of the first product, gate $g$ and up $u$, an expert computes $a(g) \cdot u$;
without a gate, $a(u)$. Two published ones are not of that form:

$$
\begin{aligned}
\text{swigluoai:} \quad & g' \, \sigma(\alpha g') \, (\bar u + 1) \\
\text{swiglu\_limit:} \quad & g' \, \sigma(g') \, \bar u
\end{aligned}
\qquad g' = \min(g, L), \quad \bar u = \min(\max(u, -L), L)
$$

The gate is clamped above only, up on both sides, and both before anything else.

Dimension key: S rows, H hidden size, I intermediate size, J = 2I (I without a gate), E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_reference.checks import check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights


class OneExpert(NamedTuple):
    """The weights of a single expert: gate_up [J, H], down [H, I], biases [J] and [H] or None."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


def feed_forward(x: torch.Tensor, one: OneExpert, config: ExpertsConfig) -> torch.Tensor:
    """A single expert on its rows.

    Args:
        x: [S, H], any float dtype, in which everything is computed.
        one: its weights, any float dtype.
        config: how it computes.

    Returns:
        [S, H], x's dtype.

    >>> one = OneExpert(torch.ones(1, 1), torch.full((1, 1), 2.0), None, None)
    >>> feed_forward(torch.tensor([[3.0]]), one, ExpertsConfig("relu", gated=False)).item()
    6.0
    """
    pre_SJ = product(x, one.gate_up, one.gate_up_bias)
    return product(activate(pre_SJ, config), one.down, one.down_bias)


ELEMENTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="none"),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""x · sigmoid(x); x · Φ(x) with the error function; its tanh approximation; max(x, 0); and that
squared."""


def activate(pre_activation: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """From the first product to what the second one multiplies.

    Args:
        pre_activation: [..., 2I], the gate before up; [..., I] without a gate. Any float dtype, in
            which everything is computed.
        config: `activation`, `gated`, and `alpha` and `limit` for those that have them.

    Returns:
        [..., I], the dtype of `pre_activation`.

    Raises:
        TypeError: not a float tensor.
        ValueError: with a gate, an odd last dimension.

    Source: swigluoai, gpt-oss model code; swiglu_limit, DeepSeek-V4; the others by their names in
    PyTorch, relu2 from Primer (arXiv 2109.08668).

    >>> activate(torch.tensor([1.0, -9.0]), ExpertsConfig("swigluoai", alpha=0.0)).tolist()
    [-3.0]
    """
    check_tensor("pre_activation", pre_activation, getattr(pre_activation, "shape", ()))
    if not config.gated:
        return ELEMENTWISE[config.activation](pre_activation)
    width = pre_activation.shape[-1]
    if width % 2 != 0:
        raise ValueError(f"pre_activation: expected an even last dimension, got {width}")
    gate, up = pre_activation.chunk(2, dim=-1)
    if config.activation in ELEMENTWISE:
        return ELEMENTWISE[config.activation](gate) * up
    gate = gate.clamp(max=config.limit)
    up = up.clamp(min=-config.limit, max=config.limit)
    if config.activation == "swigluoai":
        return gate * torch.sigmoid(config.alpha * gate) * (up + 1)
    return F.silu(gate) * up


def one_by_one(experts: ExpertWeights) -> list[OneExpert]:
    """The weights [E, ...] as a list of E experts.

    Args:
        experts: any float dtype and shape.

    >>> len(one_by_one(ExpertWeights(torch.ones(3, 2, 1), torch.ones(3, 1, 1))))
    3
    """
    E = len(experts.down)
    columns = (
        [None] * E if weight is None else weight.unbind(0)
        for weight in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    )
    return [OneExpert(*one) for one in zip(*columns, strict=True)]


def product(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows times a matrix, plus a bias, in the dtype of the rows, also inside `torch.autocast`.

    Args:
        rows: [S, A].
        matrix: [B, A], any float dtype.
        bias: [B] or None.

    Returns:
        [S, B], the dtype of rows.

    >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [[11.0]]
    """
    # Autocast would round both factors to a narrower dtype, and the result with them.
    # And other strides would mean another order of summation.
    rows, matrix = rows.contiguous(), matrix.to(rows).contiguous()
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear(rows, matrix, None if bias is None else bias.to(rows))
