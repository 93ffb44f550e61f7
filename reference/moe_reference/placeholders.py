"""Placeholders: experts that a model has before their weights have been read.

A model is built from its configuration, and a file is read later, perhaps another file than was
thought, perhaps two of them. In between an expert layer is an `ExpertsPlaceholder`: sizes and no
tensors. It cannot be computed with, sliced or cast by mistake, and it says what a file must hold;
`loading` puts experts in its place. What is still a placeholder after the last file is an error
with a name (`check_filled`), not a layer of nothing.

A layer that can be quantised by itself is a matrix that a route has as one piece. *fused* takes one
float tensor and has none; *gather* has three stacks, gate, up and down of all experts; *loop* has
three matrices for each expert. Whoever counts them (for a progress bar, or to find a layer by its
number in a file) counts this list: a number that is kept beside a list may come to differ from it.

Dimension key: E experts, H hidden size, I intermediate size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe_reference.backends import Route
from moe_reference.checks import check_count
from moe_reference.config import ExpertWeights
from moe_reference.expert_slicing import has_gate
from moe_reference.quantized_tensors import QuantizedExperts

Product = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class ExpertsPlaceholder:
    """The experts of one layer, not yet read.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            check_count(name, getattr(self, name), 1)


Experts = ExpertWeights | QuantizedExperts


@dataclass(frozen=True)
class QuantizableLayer:
    """One matrix, or one stack of them, that is quantised as a piece.

    Attributes:
        product: gate, up or down.
        experts: whose: all of them in a stack, or a single one.
    """

    product: Product
    experts: range


def quantizable_layers(route: Route, num_experts: int) -> list[QuantizableLayer]:
    """The layers that can be quantised after experts with a gate have been loaded.

    Args:
        route: the way that the experts are computed: fused, gather or loop.
        num_experts: E.

    Returns:
        None for fused, 3 for gather, 3 E for loop: gate, up and down of one expert after the other.

    Raises:
        TypeError: `num_experts` is not an int.
        ValueError: there is no such route, or no expert.

    Source: hanzo-engine's layers for quantisation in place, and their number.

    >>> [len(quantizable_layers(route, 8)) for route in ("fused", "gather", "loop")]
    [0, 3, 24]
    """
    if route not in get_args(Route):
        choices = ", ".join(map(repr, get_args(Route)))
        raise ValueError(f"route: expected one of {choices}, got {route!r}")
    check_count("num_experts", num_experts, 1)
    if route == "fused":
        return []
    step = num_experts if route == "gather" else 1
    pieces = [range(e, e + step) for e in range(0, num_experts, step)]
    products: tuple[Product, ...] = get_args(Product)
    return [QuantizableLayer(product, piece) for piece in pieces for product in products]


def layer_weight(experts: ExpertWeights, layer: QuantizableLayer) -> torch.Tensor:
    """The weights of one quantisable layer, a view: what `quantize` takes.

    Args:
        experts: weights of E experts with a gate, any float dtype.
        layer: which of them.

    Returns:
        [experts of the layer, I, H] of gate and up, [experts of the layer, H, I] of down.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: the weights do not fit each other, or the layer is of experts that there are
            not.

    >>> experts = ExpertWeights(torch.arange(4.0).view(2, 2, 1), torch.ones(2, 1, 1))
    >>> layer_weight(experts, quantizable_layers("loop", 2)[4]).tolist()
    [[[3.0]]]
    """
    if not has_gate(experts):
        raise ValueError(
            f"experts: expected a gate, which these layers have, got {list(experts.gate_up.shape)}"
        )
    E, _, I = experts.down.shape
    if not 0 <= layer.experts.start <= layer.experts.stop <= E:
        raise ValueError(f"layer: expected experts of {E}, got {layer.experts}")
    held = slice(layer.experts.start, layer.experts.stop)
    if layer.product == "down":
        return experts.down[held]
    return experts.gate_up[held, :I] if layer.product == "gate" else experts.gate_up[held, I:]


def check_filled(model: Mapping[str, Experts | ExpertsPlaceholder]) -> None:
    """Raise unless every layer's experts have been read.

    Args:
        model: experts or placeholders by the prefixes of their layers.

    Raises:
        ValueError: there are placeholders left.

    >>> check_filled({"model.layers.3.mlp.": ExpertsPlaceholder(8, 64, 32)})
    Traceback (most recent call last):
    ValueError: model: expected experts everywhere, got placeholders at ['model.layers.3.mlp.']
    """
    left = [prefix for prefix, each in model.items() if isinstance(each, ExpertsPlaceholder)]
    if left:
        raise ValueError(f"model: expected experts everywhere, got placeholders at {left}")
