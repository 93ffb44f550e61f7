"""Layouts of expert weights: how published systems store what `ExpertWeights` holds.

The canonical layout is [E, 2I, H] for gate and up, the gate's rows first, and [E, H, I] for down.
Others differ in four ways, one field of `Layout` each, or keep gate and up apart
(`from_separate`). All are exact rearrangements, and every conversion here has its inverse.

Dimension key: E experts, H hidden size, I intermediate size, J = 2I (I without a gate), W rows of
one half that stand together.

Shapes tell one thing only, whether both products are transposed, and only when gate_up and down are
looked at together. The order of gate and up, and whether they are interleaved, must be known.
"""

from dataclasses import dataclass

import torch

from moe_reference.checks import check_count, check_tensor, check_weights
from moe_reference.config import ExpertWeights


@dataclass(frozen=True)
class Layout:
    """How gate_up and down are stored.

    Attributes:
        transposed: [E, H, 2I] and [E, I, H], so that x is multiplied from the left.
        interleave: W, how many rows of the gate stand before as many of up: 1 alternates row by
            row, 0 puts all I before all I. Biases likewise.
        up_first: up stands where the gate is expected.
    """

    transposed: bool = False
    interleave: int = 0
    up_first: bool = False

    def __post_init__(self) -> None:
        check_count("interleave", self.interleave)


LAYOUTS = {
    "transformers": Layout(),
    "vllm": Layout(),
    "megatron": Layout(),
    "flashinfer-cutlass": Layout(up_first=True),
    "transformers-llama-4": Layout(transposed=True),
    "gpt-oss": Layout(interleave=1),
    "transformers-gpt-oss": Layout(transposed=True, interleave=1),
}
"""The layouts of published systems by name. Megatron's `moe_mlp_glu_interleave_size` is
`Layout(interleave=size)`. DeepSeek, Mixtral and Qwen checkpoints and torchtitan keep gate and up
apart: `from_separate`."""


def from_layout(
    layout: Layout,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gated: bool = True,
) -> ExpertWeights:
    """Weights in some layout, in the canonical one.

    Args:
        layout: the layout that they are in.
        gate_up: [E, 2I, H], or [E, H, 2I] where transposed; any float dtype.
        down: [E, H, I], or [E, I, H] where transposed.
        gate_up_bias: [E, 2I] or None, its entries in the order of gate_up's rows.
        down_bias: [E, H] or None.
        gated: False where there is no gate, with I for 2I.

    Returns:
        New tensors of the same dtypes.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: the shapes do not fit each other and the layout.

    >>> gate_up = torch.arange(4.0).view(1, 4, 1)
    >>> from_layout(LAYOUTS["gpt-oss"], gate_up, torch.zeros(1, 1, 2)).gate_up.flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    if layout.transposed:
        check_tensor("gate_up", gate_up, ("E", "H", "J"))
        check_tensor("down", down, ("E", "I", "H"))
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    check_weights(ExpertWeights(gate_up, down, gate_up_bias, down_bias), gated)
    _check_order(layout, down.shape[2], gated)
    if gated:
        gate_up = _halves_together(gate_up, layout)
        gate_up_bias = None if gate_up_bias is None else _halves_together(gate_up_bias, layout)
    return ExpertWeights(*map(_copy, (gate_up, down, gate_up_bias, down_bias)))  # type: ignore[arg-type]


def to_layout(
    layout: Layout, experts: ExpertWeights, gated: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The inverse of `from_layout`: gate_up, down, gate_up_bias and down_bias in a layout.

    Raises:
        TypeError: a weight is not a float tensor.
        ValueError: the shapes do not fit each other and the layout.

    >>> experts = ExpertWeights(torch.arange(4.0).view(1, 4, 1), torch.zeros(1, 1, 2))
    >>> to_layout(LAYOUTS["gpt-oss"], experts)[0].flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    check_weights(experts, gated)
    gate_up, down = experts.gate_up, experts.down
    gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
    _check_order(layout, down.shape[2], gated)
    if gated:
        gate_up = _halves_apart(gate_up, layout)
        gate_up_bias = None if gate_up_bias is None else _halves_apart(gate_up_bias, layout)
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return _copy(gate_up), _copy(down), _copy(gate_up_bias), _copy(down_bias)  # type: ignore[return-value]


def from_separate(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> ExpertWeights:
    """Gate and up as two tensors (w1 and w3, with down as w2), put together, the gate first.

    Args:
        gate: [E, I, H], any float dtype.
        up: [E, I, H].
        down: [E, H, I].
        gate_bias: [E, I] or None.
        up_bias: [E, I] or None; both or neither.
        down_bias: [E, H] or None.

    Returns:
        New tensors of the same dtypes.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: the shapes do not fit each other, or one of gate and up lacks its bias.

    >>> one, two = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)
    >>> from_separate(gate=one, up=two, down=one).gate_up.flatten().tolist()
    [1.0, 2.0]
    """
    check_tensor("gate", gate, ("E", "I", "H"))
    check_tensor("up", up, tuple(gate.shape))
    gate_up_bias = None
    if gate_bias is not None or up_bias is not None:
        check_tensor("gate_bias", gate_bias, tuple(gate.shape[:2]))
        check_tensor("up_bias", up_bias, tuple(gate.shape[:2]))
        gate_up_bias = torch.cat([gate_bias, up_bias], dim=1)  # type: ignore[list-item]
    gate_up = torch.cat([gate, up], dim=1)
    return from_layout(Layout(), gate_up, down, gate_up_bias, down_bias)


def to_separate(experts: ExpertWeights) -> tuple[torch.Tensor | None, ...]:
    """The inverse of `from_separate`: gate, up, down and their biases (None where there is none).

    Raises:
        TypeError: a weight is not a float tensor.
        ValueError: the shapes do not fit each other, which they do not without a gate.

    >>> experts = ExpertWeights(torch.arange(4.0).view(1, 4, 1), torch.zeros(1, 1, 2))
    >>> [weight.flatten().tolist() for weight in to_separate(experts)[:2]]
    [[0.0, 1.0], [2.0, 3.0]]
    """
    gate_up, down, gate_up_bias, down_bias = to_layout(Layout(), experts)
    gate, up = map(_copy, gate_up.chunk(2, dim=1))
    if gate_up_bias is None:
        return gate, up, down, None, None, down_bias
    gate_bias, up_bias = map(_copy, gate_up_bias.chunk(2, dim=1))
    return gate, up, down, gate_bias, up_bias, down_bias


def infer_transposed(gate_up: torch.Tensor, down: torch.Tensor, gated: bool = True) -> bool:
    """Whether weights are transposed, from both shapes together.

    [E, 2I, H] with [E, H, I] and [E, H, 2I] with [E, I, H] never have the same shapes, since
    I = 2I has no solution. One tensor alone does not tell where H = 2I (gate_up) or H = I (down);
    nor do both without a gate, where any two that fit one way fit the other.

    Args:
        gate_up: [E, 2I, H] or [E, H, 2I] (I for 2I without a gate).
        down: [E, H, I] or [E, I, H].
        gated: whether there is a gate.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: the shapes fit neither way, or both.

    >>> infer_transposed(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1))
    False
    """
    check_tensor("gate_up", gate_up, ("E", "2I or H", "H or 2I"))
    check_tensor("down", down, (len(gate_up), "H or I", "I or H"))
    _, a, b = gate_up.shape
    _, c, d = down.shape
    halves = 2 if gated else 1
    plain = b == c and a == halves * d
    transposed = a == d and b == halves * c
    if plain == transposed:
        expected = "one way" if plain else "together, plain or transposed"
        raise ValueError(
            f"gate_up: expected shapes that fit {expected}, got {list(gate_up.shape)} with down "
            f"{list(down.shape)} and gated = {gated}"
        )
    return transposed


def _halves_together(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[E, 2I, ...] in a layout's order of rows to gate before up."""
    W = layout.interleave or max(rows.shape[1] // 2, 1)
    runs = rows.unflatten(1, (-1, 2, W))
    if layout.up_first:
        runs = runs.flip(2)
    return runs.transpose(1, 2).flatten(1, 3)


def _halves_apart(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[E, 2I, ...] with the gate before up to a layout's order of rows."""
    W = layout.interleave or max(rows.shape[1] // 2, 1)
    runs = rows.unflatten(1, (2, -1, W)).transpose(1, 2)
    if layout.up_first:
        runs = runs.flip(2)
    return runs.flatten(1, 3)


def _check_order(layout: Layout, I: int, gated: bool) -> None:
    """Raise unless I rows of gate and up can stand in a layout's order."""
    if not gated and (layout.interleave or layout.up_first):
        raise ValueError(f"layout: expected no order of gate and up without a gate, got {layout}")
    if layout.interleave and I % layout.interleave != 0:
        raise ValueError(f"layout: expected interleave to divide I = {I}, got {layout.interleave}")


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)
