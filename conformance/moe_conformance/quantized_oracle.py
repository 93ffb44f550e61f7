"""How far the output of quantised experts may be from the float64 one.

It is the spread of `experts` on the unpacked weights. A target that declares `unpacked_weights`
rounds each of these to x's dtype before it is multiplied: one more independent error of every
weight, which is carried to the output here.

Dimension key: T tokens, H hidden size, S rows of one expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import ExpertWeights

from moe_conformance.codec import replace_tensors
from moe_conformance.experts_oracle import (
    Between,
    Spread,
    activation_spread,
    experts_oracle,
    local_ids,
)
from moe_conformance.precision import TINY, Arithmetic

POINT = "unpacked_weights"


def quantized_oracle(
    arithmetic: Arithmetic, between: Between | None = None, **given: Any
) -> Spread:
    """The output in float64, and how it spreads under the declared arithmetic.

    Args:
        arithmetic: what is rounded, and where.
        between: how activations are rounded before each product, from `rounded_rows`, or None.
        **given: the arguments of `experts`, with the unpacked weights.
    """
    if between is not None and POINT in arithmetic.points:
        between = _after_weights(between, arithmetic, given["experts"], given["config"])
    spread = experts_oracle(**given, arithmetic=arithmetic, between=between)
    if POINT not in arithmetic.points:
        return spread
    x, weights, config = given["x"].double(), given["weights"].double(), given["config"]
    experts: ExpertWeights = replace_tensors(given["experts"], lambda _, t: t.double())
    local = local_ids(given["expert_ids"], len(experts.down), given["expert_map"])
    variance_TH = torch.zeros_like(spread.value)
    trace_T, squared_T = torch.zeros(2, len(x), dtype=torch.float64)
    for expert in range(len(experts.down)):
        token, k = (local == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        weight_S = weights[token, k]
        on_input = config.weight_on == "input"
        rows_SH = x[token] * weight_S[:, None] if on_input else x[token]
        factor_S = torch.ones_like(weight_S) if on_input else weight_S.square()
        carried, own, sources = _of_weights(rows_SH, experts, expert, config, arithmetic)
        variance_TH.index_add_(0, token, factor_S[:, None] * (carried + own))
        trace_T.index_add_(0, token, factor_S * (sources.sum(-1) + own.sum(-1)))
        squares_S = sources.square().sum(-1) + own.square().sum(-1)
        squared_T.index_add_(0, token, factor_S.square() * squares_S)
    freedom = 1 / (1 / x.shape[1] + squared_T / trace_T.square().clamp_min(1e-300))
    return Spread(
        spread.value,
        (spread.sigma.square() + variance_TH).sqrt(),
        # The fewer independent errors there are, the further a whole row may be off.
        torch.minimum(spread.freedom, freedom.clamp_min(1.0)),
    )


def _after_weights(
    between: Between, arithmetic: Arithmetic, experts: ExpertWeights, config: Any
) -> Between:
    """`between`, told how far rounded weights may have moved what goes into the second product."""
    wide: ExpertWeights = replace_tensors(experts, lambda _, tensor: tensor.double())
    before: dict[int, torch.Tensor] = {}

    def after(
        rows: torch.Tensor, variance: torch.Tensor, expert: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 1:
            moved = _hidden(before[expert], wide, expert, config, arithmetic)[1]
            variance = variance + moved
        rows, variance = between(rows, variance, expert, step)
        if step == 0:
            before[expert] = rows
        return rows, variance

    return after


def _of_weights(
    rows_SH: torch.Tensor,
    experts: ExpertWeights,
    expert: int,
    config: Any,
    arithmetic: Arithmetic,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Variances of the output: by gate_up's rounding, by down's; and those of gate_up by source."""
    down = experts.down[expert]
    hidden, variance = _hidden(rows_SH, experts, expert, config, arithmetic)
    carried = variance @ down.square().T
    own = arithmetic.unit**2 / 3 * (hidden.square() @ down.square().T)
    return carried, own, variance * down.square().sum(0)


def _hidden(
    rows_SH: torch.Tensor,
    experts: ExpertWeights,
    expert: int,
    config: Any,
    arithmetic: Arithmetic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the second product, and its variance by the rounding of gate_up."""
    gate_up = experts.gate_up[expert]
    pre = rows_SH @ gate_up.T
    if experts.gate_up_bias is not None:
        pre = pre + experts.gate_up_bias[expert]
    # What else is rounded is in the spread of `experts` already.
    nothing = replace(arithmetic, points=frozenset())
    variance_pre = arithmetic.unit**2 / 3 * (rows_SH.square() @ gate_up.square().T)
    # Weights of zero are exact; a secant needs some length nevertheless.
    variance_pre = variance_pre.clamp_min(TINY["float32"] ** 2)
    return activation_spread(pre, variance_pre, config, nothing)
