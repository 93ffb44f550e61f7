"""Faults of what goes back through packed experts, whose outputs are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_conformance.faults import fault
from moe_conformance.faults.rare import tokens, top_k
from moe_conformance.faults.rare_experts_arithmetic import in_narrow
from moe_conformance.faults.rare_experts_gradients import gradient
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class OtherWayBack(Reference):
    """The reference, whose gradients are those of other packed experts."""

    def back(self, packed: QuantizedTensor) -> QuantizedTensor:
        """What a matrix is taken for on the way back."""
        return packed

    def experts_quantized(self, x: Tensor, experts: Any, *given: Any, **named: Any) -> Tensor:
        """The right output, with another graph."""
        right = super().experts_quantized(x, experts, *given, **named)
        if not isinstance(experts, QuantizedExperts) or not right.requires_grad:
            return right
        matrices: Any = {name: self.back(getattr(experts, name)) for name in ("gate_up", "down")}
        if all(matrices[name] is getattr(experts, name) for name in matrices):
            return right
        other = super().experts_quantized(x, replace(experts, **matrices), *given, **named)
        nothing = other - other.detach()
        return right.detach() + torch.where(nothing.isnan(), 0, nothing)


@fault("columns-go-back-in-the-order-of-their-groups", catches=("QUANT-24",))
class ColumnsInOrder(OtherWayBack):
    """The way back takes columns for sorted by group, where `g_idx` says otherwise."""

    def back(self, packed: QuantizedTensor) -> QuantizedTensor:
        """With a sorted g_idx."""
        if packed.g_idx is None:
            return packed
        return replace(packed, g_idx=packed.g_idx.sort(-1).values)


@fault("zero-points-do-not-go-back", catches=("QUANT-24",))
class ZeroPointsStay(OtherWayBack):
    """On the way back the zero point of a code of four bits is always 8."""

    def back(self, packed: QuantizedTensor) -> QuantizedTensor:
        """The same codes without zero points."""
        if packed.format != "uint4":
            return packed
        return replace(packed, format="uint4b8", zeros=None)


@fault("global-scales-do-not-go-back", catches=("QUANT-24",))
class GlobalScalesStay(OtherWayBack):
    """On the way back the global scale of an expert is left out."""

    def back(self, packed: QuantizedTensor) -> QuantizedTensor:
        """The same with a scale of 1."""
        if packed.global_scale is None:
            return packed
        return replace(packed, global_scale=torch.ones_like(packed.global_scale))


@fault("the-first-groups-scale-goes-back-for-all-of-a-row", catches=("QUANT-24",))
class FirstScaleGoesBack(OtherWayBack):
    """On the way back a row has one scale, that of its first group."""

    def back(self, packed: QuantizedTensor) -> QuantizedTensor:
        """Where a row has several, of a dtype that is copied."""
        scales = packed.scales
        if scales is None or scales.ndim < 3 or scales.shape[-1] < 2:
            return packed
        return replace(packed, scales=scales[..., :1].expand_as(scales).contiguous())


gradient(
    "the-gradient-of-x-through-packed-experts-is-bfloat16",
    "In float32 the gradient of x is rounded to bfloat16.",
    "x",
    lambda a: in_narrow(a, "float32"),
    lambda g, a: g.bfloat16().to(g),
    "QUANT-24",
    operation="experts_quantized",
)

gradient(
    "weights-of-packed-experts-are-constants-past-64-tokens",
    "With more than 64 tokens the weights have a gradient of zero.",
    "weights",
    lambda a: tokens(a) > 64,
    lambda g, a: g * 0,
    "BACKEND-12",
    operation="experts_quantized",
)

gradient(
    "tokens-of-packed-experts-past-128-have-no-gradient",
    "Of more than 128 tokens those after the last whole block of 128 have a gradient of zero.",
    "x",
    lambda a: tokens(a) > 128 and tokens(a) % 128 != 0,
    lambda g, a: torch.cat([g[: tokens(a) // 128 * 128], 0 * g[tokens(a) // 128 * 128 :]]),
    "BACKEND-12",
    operation="experts_quantized",
)

gradient(
    "the-gradient-of-x-passes-one-choice-of-packed-experts-only",
    "With a map and several choices the gradient of x is divided by K.",
    "x",
    lambda a: a.get("expert_map") is not None and top_k(a) > 1,
    lambda g, a: g / top_k(a),
    "QUANT-24",
    operation="experts_quantized",
)

gradient(
    "a-bias-of-packed-experts-is-counted-once-for-each-choice",
    "With several choices the gradient of the second bias is K times what it is.",
    "experts.down_bias",
    lambda a: a["experts"].down_bias is not None and top_k(a) > 1,
    lambda g, a: g * top_k(a),
    "QUANT-24",
    operation="experts_quantized",
)
