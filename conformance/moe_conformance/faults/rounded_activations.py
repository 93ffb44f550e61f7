"""Faults of 8-bit activations: rows that are rounded elsewhere, otherwise, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate, one_by_one, product
from moe_reference.alignment import local_ids
from moe_reference.config import ExpertWeights
from moe_reference.quantized_experts import dequantize_experts
from moe_reference.quantized_tensors import QuantizedExperts

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Rounding = Callable[[Tensor, QuantizedExperts, int, int], Tensor]
"""Rows of an expert before its first (0) or second (1) product, as that product sees them."""

When = Callable[[Any], bool]


def rounded(rows: Tensor, experts: QuantizedExperts, e: int, step: int) -> Tensor:
    """As it should be."""
    block = (experts.gate_up, experts.down)[step].group_size
    scale = None if experts.activation_scales is None else experts.activation_scales[e, step]
    assert experts.activation_format is not None
    return round_activations(rows, experts.activation_format, block, scale)


def computed(
    a: Arguments,
    rounding: Rounding,
    late_weight: bool = False,
    unpacked: ExpertWeights | None = None,
) -> Tensor:
    """The output of the experts, with rows rounded in some way, and weights if they are given."""
    x, experts, config = a["x"], a["experts"], a["config"]
    if unpacked is None:
        unpacked = dequantize_experts(experts, config.gated, x.shape[1])
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    rows_TK = local_ids(a["expert_ids"], len(unpacked.down), a.get("expert_map"))
    out = torch.zeros(x.shape, dtype=wide) + x[:0].to(wide).sum()
    for e, one in enumerate(one_by_one(unpacked)):
        token, k = (rows_TK == e).nonzero(as_tuple=True)
        weight = a["weights"].to(wide)[token, k, None]
        before = weight if config.weight_on == "input" else torch.ones_like(weight)
        rows = x.to(wide)[token]
        if late_weight:
            rows = rounding(rows, experts, e, 0) * before
        else:
            rows = rounding(rows * before, experts, e, 0)
        inner = activate(product(rows, one.gate_up, one.gate_up_bias), config)
        found = product(rounding(inner, experts, e, 1), one.down, one.down_bias)
        out = out.index_add(0, token, found if config.weight_on == "input" else found * weight)
    return out.to(x.dtype)


def askew(
    name: str,
    sentence: str,
    when: When,
    rounding: Rounding,
    *catches: str,
    thread: str = "",
    late_weight: bool = False,
) -> None:
    """Register a fault that rounds the activations of some experts in another way.

    Args:
        name: what goes wrong.
        sentence: the same in words.
        when: of which `QuantizedExperts`; they have an activation format.
        rounding: what is done instead of `rounded`.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
        late_weight: a weight on the input multiplies the rounded rows.
    """

    def experts_quantized(
        self: Reference, x: Any, experts: Any, weights: Any, expert_ids: Any, config: Any,
        expert_map: Any = None,
    ) -> Tensor:  # fmt: skip
        # What is refused is refused as ever.
        output = Reference.experts_quantized(
            self, x, experts, weights, expert_ids, config, expert_map
        )
        if experts.activation_format is None or not when(experts):
            return output
        a = {"x": x, "experts": experts, "weights": weights, "expert_ids": expert_ids}
        a |= {"config": config, "expert_map": expert_map}
        return computed(a, rounding, late_weight)

    members = {"experts_quantized": experts_quantized, "__doc__": sentence}
    made = type("Askew", (Reference,), members | {"__module__": __name__})
    fault(name, catches=catches, thread=thread)(made)


def _dynamic(experts: QuantizedExperts) -> bool:
    return experts.activation_scales is None


def _static(experts: QuantizedExperts) -> bool:
    return experts.activation_scales is not None


def _of(*formats: str) -> When:
    return lambda experts: experts.activation_format in formats and _dynamic(experts)


def _only(wrong_step: int, wrong: Rounding) -> Rounding:
    """Wrong before one of the products only."""

    def rounding(rows: Tensor, experts: QuantizedExperts, e: int, step: int) -> Tensor:
        return (wrong if step == wrong_step else rounded)(rows, experts, e, step)

    return rounding


def _kept(rows: Tensor, experts: QuantizedExperts, e: int, step: int) -> Tensor:
    return rows


def _blocks(rows: Tensor, experts: QuantizedExperts, step: int) -> Tensor:
    """[S, G, B], the columns that share a scale; padded with zeros."""
    width = rows.shape[1]
    block = (experts.gate_up, experts.down)[step].group_size
    sizes = {"e4m3_block": block, "Q8_1": 32}
    B = sizes.get(str(experts.activation_format), max(width, 1))
    padded = torch.nn.functional.pad(rows, (0, -width % B))
    return padded.unflatten(1, (-(-width // B), B))


def _scaled(
    change: Callable[[Tensor, Tensor], Tensor], to_codes: Callable[[Tensor], Tensor] | None = None
) -> Rounding:
    """Codes times scales, either of them in another way.

    Args:
        change: from the blocks and their scales to other scales.
        to_codes: from quotients to codes; None is the format's own way.
    """

    def rounding(rows: Tensor, experts: QuantizedExperts, e: int, step: int) -> Tensor:
        blocks = _blocks(rows.float(), experts, step)
        floats = str(experts.activation_format).startswith("e4m3")
        most = 448.0 if floats else 127.0
        if experts.activation_scales is None:
            scale = blocks.abs().amax(2, keepdim=True) / most
        else:
            scale = experts.activation_scales[e, step].expand_as(blocks[..., :1])
        scale = change(blocks, scale)
        quotient = blocks / scale.where(scale != 0, 1.0)
        if to_codes is not None:
            codes = to_codes(quotient)
        elif floats:
            codes = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            codes = quotient.round().clamp(-127, 127)
        return (codes * scale).flatten(1)[:, : rows.shape[1]].to(rows)

    return rounding


def _greatest(experts: QuantizedExperts, step: int) -> int:
    """The expert with the greatest fixed scale."""
    assert experts.activation_scales is not None
    return int(experts.activation_scales[:, step].argmax())


def _same(blocks: Tensor, scale: Tensor) -> Tensor:
    return scale


askew(
    "activations-are-not-rounded",
    "The checkpoint asks for 8-bit activations and is run as if it had packed weights only.",
    _dynamic,
    _kept,
    "QUANT-21",
    thread="vLLM #50833",
)
askew(
    "activations-are-rounded-before-gate-up-only",
    "What goes into the second product stays as it is.",
    _dynamic,
    _only(1, _kept),
    "QUANT-21",
)
askew(
    "activations-are-rounded-before-down-only",
    "What goes into the first product stays as it is.",
    _dynamic,
    _only(0, _kept),
    "QUANT-21",
)
askew(
    "rows-of-int8-share-a-scale",
    "The scale is taken over all rows of an expert.",
    _of("int8"),
    _scaled(lambda blocks, scale: scale.amax().expand_as(scale) if len(scale) else scale),
    "QUANT-21",
)
askew(
    "rows-of-e4m3-share-a-scale",
    "The scale is taken over all rows of an expert.",
    _of("e4m3"),
    _scaled(lambda blocks, scale: scale.amax().expand_as(scale) if len(scale) else scale),
    "QUANT-21",
)
askew(
    "blocks-of-e4m3-share-a-scale",
    "A row has one scale where each of its blocks has its own.",
    _of("e4m3_block"),
    _scaled(lambda blocks, scale: scale.amax(1, keepdim=True).expand_as(scale)),
    "QUANT-21",
)
askew(
    "blocks-of-q8-1-share-a-scale",
    "A row has one scale where each 32 of its columns have their own.",
    _of("Q8_1"),
    _scaled(lambda blocks, scale: scale.amax(1, keepdim=True).expand_as(scale)),
    "QUANT-21",
)
askew(
    "int8-activations-are-cut-off-towards-zero",
    "The quotient is cast to an integer, which drops its fraction.",
    _of("int8"),
    _scaled(_same, lambda quotient: quotient.trunc().clamp(-127, 127)),
    "QUANT-21",
)
askew(
    "int8-activations-are-rounded-down",
    "The quotient is rounded towards minus infinity.",
    _of("int8"),
    _scaled(_same, lambda quotient: quotient.floor().clamp(-127, 127)),
    "QUANT-21",
)
askew(
    "int8-activations-have-a-scale-of-128",
    "The greatest absolute value is divided by 128, and itself cut off.",
    _of("int8"),
    _scaled(lambda blocks, scale: scale * 127 / 128),
    "QUANT-21",
)
askew(
    "e4m3-activations-have-the-range-of-the-other-format",
    "The greatest absolute value is divided by 240, which is where another float of 8 bits ends.",
    _of("e4m3", "e4m3_block"),
    _scaled(lambda blocks, scale: scale * 448 / 240),
    "QUANT-21",
)
askew(
    "scales-of-e4m3-activations-are-powers-of-two",
    "The scale is rounded up to a power of two, which belongs to another format.",
    _of("e4m3", "e4m3_block"),
    _scaled(lambda blocks, scale: 2.0 ** scale.clamp_min(2.0**-100).log2().ceil()),
    "QUANT-21",
    thread="SGLang #33005",
)
askew(
    "scales-of-activations-are-bfloat16",
    "The scale is kept in eight bits of mantissa.",
    _of("int8", "e4m3", "e4m3_block"),
    _scaled(lambda blocks, scale: scale.bfloat16().float()),
    "QUANT-21",
)
askew(
    "scales-of-activations-go-by-the-greatest-number",
    "The greatest number is taken, not the greatest absolute value: negative rows are cut.",
    _dynamic,
    _scaled(
        lambda blocks, scale: (
            scale * blocks.amax(2, keepdim=True) / blocks.abs().amax(2, keepdim=True)
        ).where(blocks.amax(2, keepdim=True) > 0, scale)
    ),
    "QUANT-21",
)
askew(
    "the-weight-multiplies-rounded-rows",
    "A weight on the input is applied after the rounding, to where the fixed scale no longer cuts.",
    _static,
    rounded,
    "QUANT-22",
    late_weight=True,
)
askew(
    "fixed-scales-are-not-used",
    "Scales that were calibrated are left aside and taken from the rows.",
    _static,
    lambda rows, experts, e, step: rounded(rows, replace(experts, activation_scales=None), e, step),
    "QUANT-22",
)
askew(
    "fixed-scales-are-exchanged",
    "The scale of the second product is used for the first, and the other way round.",
    _static,
    lambda rows, experts, e, step: rounded(rows, experts, e, 1 - step),
    "QUANT-22",
)
askew(
    "the-first-fixed-scale-is-used-twice",
    "Both products round with the scale of the first.",
    _static,
    lambda rows, experts, e, step: rounded(rows, experts, e, 0),
    "QUANT-22",
)
askew(
    "all-experts-have-the-first-ones-fixed-scales",
    "Fixed scales are taken to be the same for all experts.",
    _static,
    lambda rows, experts, e, step: rounded(rows, experts, 0, step),
    "QUANT-22",
    thread="TensorRT-LLM #10780",
)
askew(
    "all-experts-have-the-greatest-fixed-scale",
    "Fixed scales of the experts are made one, the greatest, when the checkpoint is read.",
    _static,
    lambda rows, experts, e, step: rounded(rows, experts, _greatest(experts, step), step),
    "QUANT-22",
)
askew(
    "int8-codes-wrap-around",
    "A quotient past the range is cast to int8 without being cut.",
    lambda experts: _static(experts) and experts.activation_format == "int8",
    _scaled(_same, lambda quotient: (quotient.round() + 128).remainder(256) - 128),
    "QUANT-22",
)
askew(
    "e4m3-codes-overflow-to-nan",
    "A quotient past 448 becomes NaN, as a plain cast of floats makes it.",
    lambda experts: _static(experts) and experts.activation_format == "e4m3",
    _scaled(
        _same,
        lambda quotient: torch.where(
            quotient.abs() > 464,
            torch.nan,
            quotient.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
        ),
    ),
    "QUANT-22",
)
askew(
    "fixed-scales-are-inverted",
    "The reciprocal of the scale is passed on, and used as the scale.",
    _static,
    _scaled(lambda blocks, scale: 1 / scale.clamp_min(1e-30)),
    "QUANT-22",
)
askew(
    "both-products-have-the-blocks-of-gate-up",
    "What goes into down is rounded in blocks of the size that gate_up has.",
    lambda experts: experts.activation_format == "e4m3_block",
    lambda rows, experts, e, step: round_activations(
        rows, "e4m3_block", experts.gate_up.group_size, None
    ),
    "QUANT-21",
)
