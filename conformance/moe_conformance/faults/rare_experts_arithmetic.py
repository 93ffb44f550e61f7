"""Rare faults of experts: activations, biases, weights, and what is computed in which dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from moe_reference.activations import activate
from moe_reference.config import ExpertsConfig

from moe_conformance.faults.rare import Arguments, tokens, top_k
from moe_conformance.faults.rare_calls import (
    altered,
    by_hand,
    instead,
    right,
    rows_of,
    with_fields,
)
from moe_conformance.faults.rare_experts_ids import hidden, mapped, width


def uses(a: Arguments, *names: str) -> bool:
    """Whether the activation is one of these."""
    return a["config"].activation in names


def on_input(a: Arguments) -> bool:
    """Whether the weights multiply x."""
    return bool(a["config"].weight_on == "input")


def halves(pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up."""
    gate, up = pre.chunk(2, -1)
    return gate, up


def in_narrow(a: Arguments, *names: str) -> bool:
    """Whether x is of one of these dtypes."""
    return str(a["x"].dtype).removeprefix("torch.") in names


def saturated(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The activation's result, no larger than float16 goes."""
    return activate(pre, config).clamp(-65504.0, 65504.0)


instead(
    "experts",
    "what-the-second-product-reads-saturates-in-float16",
    "Between the products rows are kept in float16, clamped to its largest number.",
    lambda a: in_narrow(a, "float16"),
    lambda a: by_hand(a, saturated),
    "EXPERT-01",
)


def silu_from_exponentials(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The sigmoid as e^x / (1 + e^x)."""
    gate, up = halves(pre) if config.gated else (pre, torch.ones_like(pre))
    grown = gate.float().exp()
    return gate * (grown / (1 + grown)).to(gate) * up


instead(
    "experts",
    "silu-is-infinity-over-infinity",
    "The sigmoid of silu is e^x / (1 + e^x), which is no number where the gate passes 88.",
    lambda a: uses(a, "silu") and not in_narrow(a, "float64"),
    lambda a: by_hand(a, silu_from_exponentials),
    "EXPERT-27",
    "EXPERT-01",
)


def gelu_tanh_from_exponentials(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The hyperbolic tangent as (e^2x - 1) / (e^2x + 1)."""
    gate, up = halves(pre) if config.gated else (pre, torch.ones_like(pre))
    grown = (2 * 0.7978845608028654 * (gate + 0.044715 * gate**3)).exp()
    return 0.5 * gate * (1 + (grown - 1) / (grown + 1)) * up


instead(
    "experts",
    "gelu-tanh-is-infinity-over-infinity",
    "The tangent of gelu_tanh is made of exponentials, and is no number where they overflow.",
    lambda a: uses(a, "gelu_tanh") and not in_narrow(a, "float64"),
    lambda a: by_hand(a, gelu_tanh_from_exponentials),
    "EXPERT-05",
)

instead(
    "experts",
    "gelu-without-a-gate-is-its-approximation",
    "Without a gate gelu is computed by the tanh approximation.",
    lambda a: uses(a, "gelu") and not a["config"].gated,
    lambda a: by_hand(a, lambda pre, config: F.gelu(pre, approximate="tanh")),
    "EXPERT-05",
    thread="vLLM #41574",
)


def gelu_tanh_constant(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The cubic term with 0.0044715."""
    gate, up = halves(pre) if config.gated else (pre, torch.ones_like(pre))
    inner = 0.7978845608028654 * (gate + 0.04471 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


instead(
    "experts",
    "gelu-tanh-has-another-constant",
    "The cubic term of gelu_tanh is 0.04471 for 0.044715.",
    lambda a: uses(a, "gelu_tanh"),
    lambda a: by_hand(a, gelu_tanh_constant),
    "EXPERT-05",
)


def with_config(a: Arguments, **changes: Any) -> Arguments:
    """Another configuration."""
    return {"config": replace(a["config"], **changes)}


altered(
    "experts",
    "alpha-is-a-constant",
    "The slope of swigluoai is 1.702, whatever the configuration says.",
    lambda a: uses(a, "swigluoai") and a["config"].alpha != 1.702,
    lambda a: with_config(a, alpha=1.702),
    "EXPERT-05",
    thread="onnxruntime #28738",
)

altered(
    "experts",
    "a-limit-below-one-is-one",
    "The limit is kept as a whole number, at least one.",
    lambda a: uses(a, "swigluoai", "swiglu_limit") and a["config"].limit != int(a["config"].limit),
    lambda a: with_config(a, limit=float(max(int(a["config"].limit), 1))),
    "EXPERT-05",
)


def clamped_below(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The gate clamped on both sides."""
    gate, up = halves(pre)
    return activate(torch.cat([gate.clamp(min=-config.limit), up], -1), config)


instead(
    "experts",
    "the-gate-of-swiglu-limit-is-clamped-below-in-float64",
    "The gate of swiglu_limit is clamped on both sides in float64.",
    lambda a: uses(a, "swiglu_limit") and in_narrow(a, "float64"),
    lambda a: by_hand(a, clamped_below),
    "EXPERT-20",
    "EXPERT-27",
    thread="SGLang #23776",
)

instead(
    "experts",
    "the-gate-of-swigluoai-is-clamped-below-in-bfloat16",
    "The gate of swigluoai is clamped on both sides in bfloat16.",
    lambda a: uses(a, "swigluoai") and in_narrow(a, "bfloat16"),
    lambda a: by_hand(a, clamped_below),
    "EXPERT-05",
)


def up_clamped_above(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """Up clamped above only, as the gate is."""
    gate, up = halves(pre)
    gate, up = gate.clamp(max=config.limit), up.clamp(max=config.limit)
    if config.activation == "swigluoai":
        return gate * torch.sigmoid(config.alpha * gate) * (up + 1)
    return F.silu(gate) * up


instead(
    "experts",
    "up-is-clamped-above-only-in-float16",
    "Up is clamped like the gate, above only, in float16.",
    lambda a: uses(a, "swigluoai", "swiglu_limit") and in_narrow(a, "float16"),
    lambda a: by_hand(a, up_clamped_above),
    "EXPERT-05",
)


def clamped_without_bias(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, limit: float
) -> torch.Tensor:
    """The first product, clamped, and its bias on top."""
    gate, up = halves(F.linear(rows, matrix))
    clamped = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], -1)
    return clamped if bias is None else clamped + bias


instead(
    "experts",
    "biases-of-gate-and-up-come-after-the-clamp",
    "The clamp of swiglu_limit is part of the product, and the bias is added to what it left.",
    lambda a: uses(a, "swiglu_limit") and a["experts"].gate_up_bias is not None,
    lambda a: by_hand(
        a,
        lambda pre, config: activate(pre, replace(config, limit=float("inf"))),
        first=lambda rows, matrix, bias: clamped_without_bias(
            rows, matrix, bias, a["config"].limit
        ),
    ),
    "EXPERT-13",
)

altered(
    "experts",
    "biases-are-those-of-both-products-or-none",
    "Whether there are biases is asked of down_bias alone.",
    lambda a: (a["experts"].gate_up_bias is None) != (a["experts"].down_bias is None),
    lambda a: {
        "experts": with_fields(
            a["experts"],
            torch.zeros_like,
            "gate_up_bias" if a["experts"].down_bias is None else "down_bias",
        )
    },
    "EXPERT-20",
    "EXPERT-27",
)

instead(
    "experts",
    "the-output-bias-is-lost-for-one-token",
    "A single token takes the path of a vector, which has no output bias.",
    lambda a: tokens(a) == 1 and a["experts"].down_bias is not None,
    lambda a: right(
        "experts", a | {"experts": with_fields(a["experts"], torch.zeros_like, "down_bias")}
    ),
    "EXPERT-20",
    "EXPERT-27",
)

instead(
    "experts",
    "the-output-bias-is-not-weighted-in-float64",
    "The output bias is added after the weighting in float64.",
    lambda a: in_narrow(a, "float64") and a["experts"].down_bias is not None and not on_input(a),
    lambda a: by_hand(a, weighted=lambda out, w, bias: out * w + (0 if bias is None else bias)),
    "EXPERT-20",
    "EXPERT-06",
)

altered(
    "experts",
    "pairs-of-weight-zero-are-skipped",
    "A pair whose weight is zero is skipped, though with the weights on x its biases count.",
    lambda a: on_input(a) and bool((a["weights"] == 0).any()),
    lambda a: {"expert_ids": a["expert_ids"].masked_fill(a["weights"] == 0, -1)},
    "EXPERT-20",
)

altered(
    "experts",
    "negative-weights-are-cut-off",
    "A negative weight counts as zero, with up to two experts per token.",
    lambda a: top_k(a) <= 2,
    lambda a: {"weights": a["weights"].relu()},
    "EXPERT-01",
)

altered(
    "experts",
    "weights-above-one-are-cut-off",
    "A weight of more than one counts as one, in float16.",
    lambda a: in_narrow(a, "float16"),
    lambda a: {"weights": a["weights"].clamp(max=1.0)},
    "EXPERT-01",
)

altered(
    "experts",
    "routing-weights-are-rounded-to-bfloat16",
    "Routing weights of float32 are rounded to bfloat16 where x is.",
    lambda a: in_narrow(a, "bfloat16") and a["weights"].dtype is torch.float32 and top_k(a) <= 2,
    lambda a: {"weights": a["weights"].to(torch.bfloat16)},
    "EXPERT-27",
    "EXPERT-01",
)

instead(
    "experts",
    "float64-is-computed-in-float32-beside-narrower-weights",
    "With expert weights narrower than float64 the products of a float64 x are in float32.",
    lambda a: in_narrow(a, "float64") and a["experts"].down.dtype is not torch.float64,
    lambda a: by_hand(a, wide=torch.float32),
    "EXPERT-27",
)

instead(
    "experts",
    "float64-activations-are-computed-in-float32",
    "The activation of a float64 x is computed in float32 for swigluoai and swiglu_limit.",
    lambda a: in_narrow(a, "float64") and uses(a, "swigluoai", "swiglu_limit"),
    lambda a: by_hand(a, lambda pre, config: activate(pre.float(), config).to(pre)),
    "EXPERT-13",
)


def sum_in_bfloat16(pairs: torch.Tensor) -> torch.Tensor:
    """A running sum that is rounded after every addition."""
    total = pairs[:, 0].bfloat16()
    for k in range(1, pairs.shape[1]):
        total = (total + pairs[:, k].bfloat16()).bfloat16()
    return total


instead(
    "experts",
    "the-sum-over-four-experts-is-in-bfloat16",
    "From four experts on the outputs are summed in bfloat16, for a bfloat16 x.",
    lambda a: in_narrow(a, "bfloat16") and top_k(a) >= 4,
    lambda a: by_hand(a, summed=sum_in_bfloat16),
    "EXPERT-27",
    "EXPERT-01",
)


def in_tf32(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A product whose factors keep 10 bits of their mantissa."""

    def cut(t: torch.Tensor) -> torch.Tensor:
        return (t.detach().view(torch.int32) & ~0x1FFF).view(torch.float32) + (t - t.detach())

    return F.linear(cut(rows), cut(matrix), bias)


instead(
    "experts",
    "products-are-in-tf32-where-the-tiles-fit",
    "Where H and I are multiples of eight, the factors of float32 products are cut to tf32.",
    lambda a: in_narrow(a, "float32") and hidden(a) % 8 == 0 and width(a) % 8 == 0,
    lambda a: by_hand(a, product=in_tf32),
    "EXPERT-13",
)


def in_two_parts(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A product whose sum is taken in two halves that are rounded to bfloat16."""
    middle = rows.shape[1] // 2
    first = F.linear(rows[:, :middle], matrix[:, :middle]).bfloat16()
    second = F.linear(rows[:, middle:], matrix[:, middle:]).bfloat16()
    total = (first + second).to(rows)
    return total if bias is None else total + bias


instead(
    "experts",
    "sums-are-split-in-two-and-rounded",
    "Past 32 hidden columns the sums of a product are taken in two parts of bfloat16.",
    lambda a: in_narrow(a, "bfloat16") and hidden(a) > 32,
    lambda a: by_hand(a, product=in_two_parts),
    "EXPERT-27",
    "EXPERT-01",
)

instead(
    "experts",
    "one-expert-per-token-always-weighs-the-output",
    "With one expert per token the weight is applied at the end, wherever it belongs, in float16.",
    lambda a: top_k(a) == 1 and on_input(a) and in_narrow(a, "float16", "bfloat16"),
    lambda a: right("experts", a | with_config(a, weight_on="output")),
    "EXPERT-20",
    "EXPERT-27",
    thread="SGLang #7889",
)

altered(
    "experts",
    "with-a-map-the-weights-are-always-on-the-output",
    "With a map the weights multiply the output, wherever they belong.",
    lambda a: mapped(a) and on_input(a),
    lambda a: with_config(a, weight_on="output"),
    "EXPERT-08",
    thread="SGLang #7889",
)


def scaled_by_largest(a: Arguments) -> torch.Tensor:
    """Each token's output through a scale that is one for all tokens of the call."""
    largest = a["x"].abs().max().float().clamp(min=1e-30)
    scaled = (a["x"].float() / largest * 448).to(torch.float8_e4m3fn).float() / 448 * largest
    return scaled.to(a["x"].dtype)


altered(
    "experts",
    "x-goes-through-eight-bits",
    "The rows of more than 64 tokens are kept in eight bits with one scale.",
    lambda a: tokens(a) > 64 and in_narrow(a, "bfloat16"),
    lambda a: {"x": scaled_by_largest(a)},
    "EXPERT-01",
    "EXPERT-07",
)

instead(
    "experts",
    "an-infinite-token-makes-others-nan",
    "The largest of a tile scales it, and an infinite token leaves nothing of its neighbours.",
    lambda a: bool(a["x"].isinf().any()),
    lambda a: right("experts", a) + a["x"].isinf().any() * torch.tensor(float("nan")).to(a["x"]),
    "EXPERT-17",
    "NUM-08",
)

instead(
    "experts",
    "a-nan-token-reaches-the-next-of-its-expert",
    "A row that is no number spoils the row after it, where both go to the last expert.",
    lambda a: bool(a["x"].isnan().any()) and len(a["experts"].down) > 1,
    lambda a: spoiled(a),
    "NUM-08",
)


def spoiled(a: Arguments) -> torch.Tensor:
    """NaN in the token after one that is NaN, where both go to the last expert."""
    last = (rows_of(a) == len(a["experts"].down) - 1).any(1)
    bad = a["x"].isnan().any(1) & last
    after = torch.zeros_like(bad)
    after[1:] = bad[:-1]
    return right("experts", a).masked_fill((after & last)[:, None], float("nan"))


altered(
    "experts",
    "an-alpha-of-zero-is-not-given",
    "An alpha of 0 is taken for none, and replaced by 1.702.",
    lambda a: uses(a, "swigluoai") and a["config"].alpha == 0,
    lambda a: {"config": replace(a["config"], alpha=1.702)},
    "EXPERT-13",
)

altered(
    "experts",
    "the-limit-is-kept-in-bfloat16",
    "The limit of a clamp is a tensor in bfloat16, whatever x is.",
    lambda a: uses(a, "swigluoai", "swiglu_limit") and not in_narrow(a, "bfloat16"),
    lambda a: {
        "config": replace(
            a["config"], limit=torch.tensor(a["config"].limit, dtype=torch.bfloat16).item()
        )
    },
    "EXPERT-13",
)

altered(
    "experts",
    "a-bias-of-another-dtype-than-its-matrix-is-left-out",
    "A bias is loaded only where it has the dtype of the matrix it goes with.",
    lambda a: True,
    lambda a: {
        "experts": replace(
            a["experts"],
            **{
                f"{name}_bias": None
                for name in ("gate_up", "down")
                if (bias := getattr(a["experts"], f"{name}_bias")) is not None
                and bias.dtype is not getattr(a["experts"], name).dtype
            },
        )
    },
    "EXPERT-27",
    thread="vLLM #16801",
)


def none_below(least: float) -> Callable[[Arguments], Arguments]:
    """Weights below so much are taken for zero."""
    return lambda a: {"weights": a["weights"].masked_fill(a["weights"].detach().abs() < least, 0.0)}


altered(
    "experts",
    "choices-of-less-than-a-millionth-are-skipped",
    "A pair whose weight is below 1e-6 is taken for one that is not here.",
    lambda a: True,
    none_below(1e-6),
    "EXPERT-01",
)

altered(
    "experts",
    "weights-on-the-input-of-less-than-a-ten-thousandth-are-skipped",
    "With the weight on the input a pair with a weight below 1e-4 is skipped.",
    on_input,
    none_below(1e-4),
    "EXPERT-05",
)
