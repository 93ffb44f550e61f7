"""Legal variants: right implementations that round in other places and sum in other orders.

None of them may ever be accused. What they reach, in standard deviations, is what the limits of
`judge.close` are calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from moe_reference.checks import check_experts, check_routing
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import local_ids

from moe_conformance.experts_oracle import activation_parts
from moe_conformance.target import Capabilities, Target

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to compute that is as right as the reference's.

    Attributes:
        name: what is different.
        product: a [S, N], b [M, N] -> a b^T, accumulated in its own order.
        points: where results are rounded to x's dtype.
        accumulator: what is declared.
        backwards: the K experts of a token are added in descending order of expert.
    """

    name: str
    product: Product
    points: tuple[str, ...] = ()
    accumulator: str = "float32"
    backwards: bool = False


def _plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.float() @ b.float().T


def _reversed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.float().flip(-1) @ b.float().flip(-1).T


def _sequential(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(a), len(b))
    for i in range(a.shape[1]):
        total = total + a[:, i, None].float() * b[None, :, i].float()
    return total


def _pairwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.shape[1] <= 2:
        return _sequential(a, b)
    middle = a.shape[1] // 2
    return _pairwise(a[:, :middle], b[:, :middle]) + _pairwise(a[:, middle:], b[:, middle:])


def _split(parts: int) -> Product:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pieces = [
            _plain(x, y)
            for x, y in zip(a.tensor_split(parts, 1), b.tensor_split(parts, 1), strict=True)
        ]
        return torch.stack(pieces).sum(0)

    return product


def _strided(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum((_plain(a[:, i::4], b[:, i::4]) for i in range(4)), torch.zeros(len(a), len(b)))


def _by_size(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # The largest terms first: the least lucky order that still is an order.
    order = (a.float().square().sum(0) * b.float().square().sum(0)).argsort(descending=True)
    return _sequential(a[:, order], b[:, order])


def _double(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double().T).float()


def _native(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.flip(-1) @ b.to(a.dtype).flip(-1).T).float()


STORED = ("pre_activation", "activation", "expert_output")
"""What an unfused chain of kernels stores between them."""

VARIANTS: tuple[Variant, ...] = (
    Variant("float64 sums, activation stored", _double, ("activation",)),
    Variant("backwards, pre-activation stored", _reversed, ("pre_activation",), backwards=True),
    Variant("one by one, outputs stored", _sequential, ("expert_output",)),
    Variant(
        "in pairs, pre-activation and weighted outputs stored",
        _pairwise,
        ("pre_activation", "weighted_output"),
    ),
    Variant("split in two, gate's activation stored", _split(2), ("gate_activation",)),
    Variant("split in seven, activation stored", _split(7), ("activation",)),
    Variant("four interleaved sums, outputs stored", _strided, ("expert_output",)),
    Variant("largest terms first, activation stored", _by_size, ("activation",)),
    Variant("unfused, every result stored", _split(2), STORED),
    Variant("unfused, products in the input's dtype", _native, (*STORED, "product")),
    Variant("activation stored in two steps", _pairwise, (*STORED, "gate_activation")),
    Variant("fused activation, outputs stored", _strided, ("activation", "expert_output")),
    Variant("weighted outputs stored", _reversed, (*STORED, "weighted_output")),
    Variant("combined in the input's dtype", _split(3), (*STORED, "weighted_output", "combine")),
    Variant("largest terms first, every result stored", _by_size, STORED, backwards=True),
    Variant("weighted input stored", _split(3), (*STORED, "expert_input"), backwards=True),
)
"""Each sums in an order of its own and rounds at a point of its own: an order alone leaves no trace
in bfloat16, a point alone none in float32."""


def variant_target(variant: Variant) -> Target:
    """The variant as a target that provides `experts`."""

    class Legal(Target):
        name, version = variant.name, "1"
        capabilities = Capabilities(
            dtypes=("float32", "bfloat16", "float16"),
            rounding_points=variant.points,
            accumulator=variant.accumulator,
            gradients=("experts",),
        )

        def experts(
            self,
            x: torch.Tensor,
            experts: ExpertWeights,
            weights: torch.Tensor,
            expert_ids: torch.Tensor,
            config: ExpertsConfig,
            expert_map: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """See the contract."""
            check_routing(x, weights, expert_ids)
            check_experts(experts, x, config)
            return _experts(variant, x, experts, weights, expert_ids, config, expert_map)

    return Legal()


def _experts(
    variant: Variant,
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    def stored(value: torch.Tensor, point: str) -> torch.Tensor:
        return value.to(x.dtype).float() if point in variant.points else value

    local = local_ids(expert_ids, len(experts.gate_up), expert_map)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in _order(len(experts.gate_up), variant.backwards):
        token, k = (local == expert).nonzero(as_tuple=True)
        weight = weights[token, k, None].float()
        rows = x[token]
        if config.weight_on == "input":
            rows = stored(rows.float() * weight, "expert_input")
            rows = rows.to(x.dtype) if "expert_input" in variant.points else rows
        pre = variant.product(rows, experts.gate_up[expert])
        if experts.gate_up_bias is not None:
            pre = pre + experts.gate_up_bias[expert].float()
        pre = stored(pre, "pre_activation")
        gate, up = pre.chunk(2, -1) if config.gated else (pre, torch.ones_like(pre))
        inner, factor = activation_parts(gate, up, config)
        hidden = stored(stored(inner, "gate_activation") * factor, "activation")
        y = variant.product(hidden.to(x.dtype) if "activation" in variant.points else hidden,
                            experts.down[expert])  # fmt: skip
        if experts.down_bias is not None:
            y = y + experts.down_bias[expert].float()
        y = stored(y, "expert_output")
        if config.weight_on == "output":
            y = stored(y * weight, "weighted_output")
        if len(token) == 0:
            out = out + y.sum()  # nothing, with a graph
        for pair, t in enumerate(token.tolist()):
            out[t] = stored(out[t] + y[pair], "combine")
    return out.to(x.dtype)


def _order(count: int, backwards: bool) -> Iterator[int]:
    return iter(range(count - 1, -1, -1) if backwards else range(count))
