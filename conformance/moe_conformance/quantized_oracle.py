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
from moe_conformance.experts_oracle import Spread, _activation_spread, experts_oracle, local_ids
from moe_conformance.precision import TINY, Arithmetic

POINT = "unpacked_weights"


def quantized_oracle(arithmetic: Arithmetic, **given: Any) -> Spread:
    """The output in float64, and how it spreads under the declared arithmetic.

    Args:
        arithmetic: what is rounded, and where.
        **given: the arguments of `experts`, with the unpacked weights.
    """
    spread = experts_oracle(**given, arithmetic=arithmetic)
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


def _of_weights(
    rows_SH: torch.Tensor,
    experts: ExpertWeights,
    expert: int,
    config: Any,
    arithmetic: Arithmetic,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Variances of the output: by gate_up's rounding, by down's; and those of gate_up by source."""
    share = arithmetic.unit**2 / 3
    gate_up, down = experts.gate_up[expert], experts.down[expert]
    pre = rows_SH @ gate_up.T
    if experts.gate_up_bias is not None:
        pre = pre + experts.gate_up_bias[expert]
    # What else is rounded is in the spread of `experts` already.
    nothing = replace(arithmetic, points=frozenset())
    variance_pre = share * (rows_SH.square() @ gate_up.square().T)
    # Weights of zero are exact; a secant needs some length nevertheless.
    variance_pre = variance_pre.clamp_min(TINY["float32"] ** 2)
    hidden, variance = _activation_spread(pre, variance_pre, config, nothing)
    carried = variance @ down.square().T
    own = share * (hidden.square() @ down.square().T)
    return carried, own, variance * down.square().sum(0)
