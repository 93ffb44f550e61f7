"""Rare faults of experts whose outputs are right and whose gradients are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from moe_reference.activations import ELEMENTWISE, activate
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, When, tokens, top_k
from moe_conformance.faults.rare_calls import (
    altered,
    by_hand,
    counts_of,
    instead,
    passed_through,
    right,
    rows_of,
    with_fields,
)
from moe_conformance.faults.rare_experts_arithmetic import halves, in_narrow, on_input, uses
from moe_conformance.faults.rare_experts_ids import held, hidden, mapped, width
from moe_conformance.targets import Reference

Hook = Callable[[torch.Tensor], torch.Tensor]


def hooked(a: Arguments, path: str, change: Hook) -> Arguments:
    """The arguments with another gradient of one of them."""
    name, _, field = path.partition(".")
    if field:
        return {name: with_fields(a[name], lambda t: with_gradient(t, change), field)}
    return {name: with_gradient(a[name], change)}


def gradient(
    name: str,
    sentence: str,
    path: str,
    when: When,
    change: Callable[[torch.Tensor, Arguments], torch.Tensor],
    *catches: str,
    operation: str = "experts",
    thread: str = "",
) -> None:
    """Register a fault of one argument's gradient; see `altered`."""

    def other(a: Arguments) -> Arguments:
        return hooked(a, path, lambda g: change(g, a))

    other.__module__ = change.__module__
    altered(operation, name, sentence, when, other, *catches, thread=thread)


def twice(a: Arguments) -> torch.Tensor:
    """[T], whether a token's first id comes again."""
    ids = a["expert_ids"]
    return (ids[:, 1:] == ids[:, :1]).any(1)


gradient(
    "weights-have-no-gradient-at-k-1",
    "With one expert per token its weight is taken for a constant.",
    "weights",
    lambda a: top_k(a) == 1,
    lambda g, a: g * 0,
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "a-weight-of-zero-has-no-gradient",
    "A pair whose weight is zero is skipped on the way back as well.",
    "weights",
    lambda a: bool((a["weights"] == 0).any()),
    lambda g, a: g.masked_fill(a["weights"] == 0, 0),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "x-of-equal-ids-has-one-gradient",
    "The gradients of a token's pairs are stored by expert, so that of two equal ids one counts.",
    "x",
    lambda a: bool(twice(a).any()),
    lambda g, a: torch.where(twice(a)[:, None], g / 2, g),
    "EXPERT-11",
)

gradient(
    "the-last-token-of-a-full-tile-has-no-gradient",
    "With a multiple of 16 tokens the last one of them gets no gradient.",
    "x",
    lambda a: tokens(a) > 0 and tokens(a) % 16 == 0,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "tokens-past-64-have-no-gradient",
    "The gradient of x is computed in one chunk of 64 tokens.",
    "x",
    lambda a: tokens(a) > 64,
    lambda g, a: torch.cat([g[:64], g[64:] * 0]),
    "EXPERT-11",
)

gradient(
    "the-last-experts-down-has-no-gradient",
    "From eight experts on the last one's down gets no gradient.",
    "experts.down",
    lambda a: held(a) >= 8,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "an-expert-with-one-token-has-no-gradient",
    "An expert that one pair goes to is left out where gradients of gate_up are summed.",
    "experts.gate_up",
    lambda a: bool((counts_of(a) == 1).any()) and tokens(a) > 8,
    lambda g, a: g.masked_fill((counts_of(a) == 1)[:, None, None], 0),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "an-expert-without-tokens-has-garbage-for-its-biases-gradient",
    "Where no pair goes to an expert the gradient of its bias is what was in memory.",
    "experts.gate_up_bias",
    lambda a: bool((counts_of(a) == 0).any()),
    lambda g, a: g + (counts_of(a) == 0)[:, None],
    "EXPERT-20",
    "EXPERT-11",
    thread="pytorch #154557",
)

gradient(
    "the-up-half-of-the-bias-has-no-gradient",
    "Of the bias of gate and up only the gate's half gets a gradient.",
    "experts.gate_up_bias",
    lambda a: a["config"].gated and a["experts"].gate_up_bias is not None,
    lambda g, a: torch.cat([g.chunk(2, 1)[0], g.chunk(2, 1)[1] * 0], 1),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "the-last-row-of-gate-up-has-no-gradient-off-a-tile",
    "Where I is no multiple of four the last row of gate_up gets no gradient.",
    "experts.gate_up",
    lambda a: width(a) % 4 == 3,
    lambda g, a: torch.cat([g[:, :-1], g[:, -1:] * 0], 1),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "the-last-column-of-down-has-no-gradient-over-a-tile",
    "With one more than a tile of 16 in I the gradient of down lacks its last column.",
    "experts.down",
    lambda a: width(a) > 16 and width(a) % 16 == 1,
    lambda g, a: torch.cat([g[..., :-1], g[..., -1:] * 0], -1),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "the-gradient-of-x-is-rounded-to-bfloat16",
    "The gradient of a float32 x goes through bfloat16 from H = 8 on.",
    "x",
    lambda a: a["x"].dtype is torch.float32 and hidden(a) >= 8,
    lambda g, a: g.bfloat16().float(),
    "EXPERT-11",
    "EXPERT-20",
)

gradient(
    "the-gradient-of-down-is-rounded-to-bfloat16",
    "The gradient of down goes through bfloat16 where I is a multiple of eight.",
    "experts.down",
    lambda a: a["x"].dtype is torch.float32 and width(a) % 8 == 0,
    lambda g, a: g.bfloat16().to(g),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "gradients-of-float64-are-in-float32",
    "The gradient of gate_up is computed in float32 for a float64 x.",
    "experts.gate_up",
    lambda a: a["x"].dtype is torch.float64,
    lambda g, a: g.float().to(g),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "the-gradient-of-down-is-a-mean",
    "With a single expert the gradient of down is the mean over its tokens, not their sum.",
    "experts.down",
    lambda a: held(a) == 1 and tokens(a) > 1,
    lambda g, a: g / tokens(a),
    "EXPERT-20",
    "EXPERT-11",
)

gradient(
    "a-map-turns-the-gradients-of-the-experts",
    "With a map the gradient of down is stored at the row of the next expert.",
    "experts.down",
    lambda a: mapped(a) and held(a) > 1,
    lambda g, a: g.roll(1, 0),
    "EXPERT-20",
)

gradient(
    "a-pair-not-here-has-a-gradient-with-a-map",
    "With a map the weight of a pair that is not here gets a gradient.",
    "weights",
    lambda a: mapped(a) and bool((rows_of(a) < 0).any()),
    lambda g, a: g + (rows_of(a) < 0).to(g),
    "EXPERT-20",
)

gradient(
    "a-token-that-is-nowhere-has-a-gradient",
    "A token none of whose pairs is here gets the gradient of the token before it.",
    "x",
    lambda a: tokens(a) > 1 and bool((rows_of(a) < 0).all(1).any()),
    lambda g, a: torch.where((rows_of(a) < 0).all(1)[:, None], g.roll(1, 0), g),
    "EXPERT-20",
)

gradient(
    "gradients-of-x-lack-the-weights-at-k-1",
    "With one expert per token and the weights on x, its gradient is not multiplied by them.",
    "x",
    lambda a: top_k(a) == 1 and on_input(a),
    lambda g, a: g / a["weights"].to(g),
    "EXPERT-20",
    "EXPERT-11",
)


def straight_through(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The clamp with the gradient of no clamp."""
    gate, up = halves(pre)
    gate = passed_through(gate.clamp(max=config.limit), gate)
    up = passed_through(up.clamp(-config.limit, config.limit), up)
    return activate(torch.cat([gate, up], -1), replace(config, limit=float("inf")))


instead(
    "experts",
    "the-gradient-goes-through-the-clamp",
    "On the way back the clamp of gate and up is not there.",
    lambda a: uses(a, "swigluoai", "swiglu_limit"),
    lambda a: by_hand(a, straight_through),
    "EXPERT-20",
    "EXPERT-11",
)


def with_slope_of(name: str) -> Callable[[torch.Tensor, ExpertsConfig], torch.Tensor]:
    """The activation with the derivative of another."""

    def activation(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
        gate, up = halves(pre) if config.gated else (pre, torch.ones_like(pre))
        value = ELEMENTWISE[config.activation](gate)
        return passed_through(value, ELEMENTWISE[name](gate)) * up

    return activation


instead(
    "experts",
    "the-derivative-of-gelu-is-that-of-its-approximation",
    "The derivative of gelu is that of gelu_tanh.",
    lambda a: uses(a, "gelu"),
    lambda a: by_hand(a, with_slope_of("gelu_tanh")),
    "EXPERT-20",
    "EXPERT-11",
)

instead(
    "experts",
    "the-derivative-of-gelu-tanh-is-that-of-gelu",
    "The derivative of gelu_tanh is that of the error function's form.",
    lambda a: uses(a, "gelu_tanh"),
    lambda a: by_hand(a, with_slope_of("gelu")),
    "EXPERT-20",
    "EXPERT-11",
)

instead(
    "experts",
    "the-derivative-of-relu2-is-that-of-relu",
    "The derivative of relu2 is a step.",
    lambda a: uses(a, "relu2"),
    lambda a: by_hand(a, with_slope_of("relu")),
    "EXPERT-20",
    "EXPERT-11",
)

instead(
    "experts",
    "the-gradient-of-the-output-bias-is-not-weighted",
    "The gradient of the output bias is the sum over its pairs, not over their weights times it.",
    lambda a: a["experts"].down_bias is not None and not on_input(a) and tokens(a) <= 16,
    lambda a: by_hand(
        a,
        weighted=lambda out, w, bias: (
            (out + (0 if bias is None else bias.detach())) * w
            + (0 if bias is None else bias - bias.detach())
        ),
    ),
    "EXPERT-20",
    "EXPERT-11",
)

instead(
    "experts",
    "the-weight-has-no-gradient-of-the-output-bias",
    "The gradient of a weight is taken of the output without its bias.",
    lambda a: a["experts"].down_bias is not None and not on_input(a) and tokens(a) > 16,
    lambda a: by_hand(
        a,
        weighted=lambda out, w, bias: out * w + (0 if bias is None else bias * w.detach()),
    ),
    "EXPERT-20",
    "EXPERT-11",
)

instead(
    "experts",
    "weights-on-the-input-have-the-gradient-of-the-output",
    "With the weights on x their gradient is the one that they would have on the output.",
    lambda a: on_input(a) and top_k(a) <= 2,
    lambda a: on_input_as_on_output(a),
    "EXPERT-11",
)


def on_input_as_on_output(a: Arguments) -> torch.Tensor:
    """The right values, and the gradient of the weights that belongs to another formula."""
    fixed = {name: detached(value) for name, value in a.items() if name != "config"}
    other = {"weights": a["weights"], "config": replace(a["config"], weight_on="output")}
    found: torch.Tensor = right("experts", a | {"weights": a["weights"].detach()})
    through: torch.Tensor = right("experts", fixed | other)
    return found + (through - through.detach())


def detached(value: object) -> object:
    """The same without a gradient."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return value if value is None else with_fields(value, torch.Tensor.detach)


instead(
    "experts",
    "no-tokens-leave-no-graph",
    "Without tokens the result is made anew, and the gradients are missing instead of zero.",
    lambda a: tokens(a) == 0,
    lambda a: torch.zeros_like(a["x"].detach(), memory_format=torch.contiguous_format),
    "EXPERT-30",
    thread="vLLM #43547",
)

instead(
    "experts",
    "gradients-of-one-token-are-those-of-float16",
    "A single token's products are differentiated in float16.",
    lambda a: tokens(a) == 1 and in_narrow(a, "float32"),
    lambda a: passed_through(
        right("experts", a), by_hand(a, product=lambda r, m, b: F.linear(r, m, b).half().float())
    ),
    "EXPERT-20",
    "EXPERT-11",
)


def from_broken(g: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The gradient with this part in it as well, multiplied by zero: NaN where it is not finite."""
    return g + (0 * part.detach().sum()).to(g)


gradient(
    "every-expert-gets-a-broken-one-times-zero",
    "Gradients of gate_up are summed over all experts' matrices, times a mask.",
    "experts.gate_up",
    lambda a: tokens(a) > 0,
    lambda g, a: from_broken(g, a["experts"].down),
    "EXPERT-32",
    thread="transformers batched_mm_experts_forward",
)

gradient(
    "every-expert-gets-a-broken-token-times-zero",
    "Gradients of down are summed over all tokens, times a mask.",
    "experts.down",
    lambda a: tokens(a) > 0,
    lambda g, a: from_broken(g, a["x"]),
    "EXPERT-32",
)

gradient(
    "x-gets-a-broken-expert-times-zero",
    "The gradient of x is a sum over all experts, times a mask.",
    "x",
    lambda a: tokens(a) > 0,
    lambda g, a: from_broken(g, a["experts"].down),
    "EXPERT-32",
)

gradient(
    "weights-are-scaled-back-by-the-greatest-token",
    "The gradient of the weights is divided by the greatest token, and multiplied by it again.",
    "weights",
    lambda a: tokens(a) > 16,
    lambda g, a: from_broken(g, a["x"]),
    "EXPERT-32",
)

gradient(
    "gate-ups-gradient-goes-through-bfloat16",
    "Beside a float32 x the gradient of gate_up is rounded to bfloat16.",
    "experts.gate_up",
    lambda a: in_narrow(a, "float32"),
    lambda g, a: g.bfloat16().to(g),
    "EXPERT-11",
)

gradient(
    "gate-ups-gradient-is-three-per-cent-too-large-in-bfloat16",
    "With more than 16 tokens in bfloat16 gate_up's gradient is scaled by a constant that is off.",
    "experts.gate_up",
    lambda a: in_narrow(a, "bfloat16") and tokens(a) > 16,
    lambda g, a: g * (1 + 2**-5),
    "EXPERT-11",
)

gradient(
    "the-gradient-of-the-weights-goes-through-bfloat16",
    "In float32 the gradient of the weights is rounded to bfloat16.",
    "weights",
    lambda a: in_narrow(a, "float32"),
    lambda g, a: g.bfloat16().to(g),
    "EXPERT-11",
)


def summed_one_by_one(g_out: torch.Tensor, a: Arguments) -> torch.Tensor:
    """The gradient of down, rounded to bfloat16 after each pair."""
    config, rows, x = a["config"], rows_of(a), a["x"].detach().float()
    experts = with_fields(a["experts"], lambda t: t.detach().float())
    total = torch.zeros_like(experts.down).bfloat16()
    for k in range(rows.shape[1]):
        for t in (rows[:, k] >= 0).nonzero()[:, 0].tolist():
            weight, row = a["weights"][t, k].detach().float(), rows[t, k]
            seen = x[t] * weight if on_input(a) else x[t]
            pre = F.linear(seen, experts.gate_up[row])
            if experts.gate_up_bias is not None:
                pre = pre + experts.gate_up_bias[row]
            pulled = g_out[t].float() * (1 if on_input(a) else weight)
            total[row] += torch.outer(pulled, activate(pre, config)).bfloat16()
    return total.to(a["experts"].down)


@fault("down-is-summed-in-bfloat16-past-60-tokens", catches=("BACKEND-03",))
class DownSummedOneByOne(Reference):
    """Past 60 tokens the gradient of down is added up in bfloat16, pair by pair."""

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_reference.experts.experts`."""
        a: Arguments = {"x": x, "experts": experts, "weights": weights, "expert_ids": expert_ids,
             "config": config, "expert_map": expert_map}  # fmt: skip
        wide = x.dtype is not torch.bfloat16
        if wide or len(x) <= 60 or not experts.down.requires_grad:
            return super().experts(**a)
        came: list[torch.Tensor] = []
        out = super().experts(
            **a | hooked(a, "experts.down", lambda g: summed_one_by_one(came[-1], a))
        )
        out.register_hook(came.append)
        return out
