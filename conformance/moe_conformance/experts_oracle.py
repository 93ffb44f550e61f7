"""How far the experts' output may be from the float64 one: first-order propagation of variance.

Dimension key: T tokens, H hidden size, I intermediate size, K experts per token, P pairs that are
here, G experts that are computed side by side, S rows of each, the last of them padding.

Every rounding that the target declares is an independent error, uniform on ±unit · |value|. Its
variance is carried through the rest of the computation by the squares of the derivatives, which is
exact to first order. What is left is one standard deviation per output element, and one number per
token that says how many independent errors there effectively are in its row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import experts as reference_experts

from moe_conformance.codec import replace_tensors
from moe_conformance.precision import FLOOR, TINY, UNIT, Arithmetic

FUNCTION_ULPS = 4.0
"""Errors of exp, tanh or erf in units of the accumulator: what fast hardware versions document."""

MOST_PADDING = 4
"""Experts are computed one by one where a batch of them would have more rows for each that is
needed,"""
FEW_ROWS = 64
"""unless it is small: then the number of operations counts, and not their size."""

Between = Callable[[torch.Tensor, torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
"""What is done to an expert's rows before a product. It takes rows, their variance, the expert, and
0 or 1 for which product; rows and variance come back."""


@dataclass(frozen=True)
class Spread:
    """An expected value with the standard deviation of a legal answer around it.

    Attributes:
        value: float64.
        sigma: float64, same shape, never 0.
        freedom: effective number of independent errors per row (all dimensions but the last).
    """

    value: torch.Tensor
    sigma: torch.Tensor
    freedom: torch.Tensor


def experts_oracle(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    arithmetic: Arithmetic,
    between: Between | None = None,
) -> Spread:
    """The output of `experts` in float64, and how it spreads under the declared arithmetic.

    Args:
        x: [T, H].
        experts: of any float dtype.
        weights: [T, K].
        expert_ids: [T, K].
        config: how an expert computes.
        expert_map: [E] or None.
        arithmetic: what is rounded, and where.
        between: what is done to the rows before each product, if anything is.
    """
    wide = replace_tensors(experts, lambda _, tensor: tensor.double())
    value = reference_experts(x.double(), wide, weights.double(), expert_ids, config, expert_map)
    local = local_ids(expert_ids, len(experts.gate_up), expert_map)
    tokens, hidden = value.shape
    variance = torch.zeros_like(value)
    terms = torch.zeros_like(value)
    squares = torch.zeros_like(value)
    trace, trace_squared = torch.zeros(tokens).double(), torch.zeros(tokens).double()
    shared = torch.zeros(tokens).double()
    for members, token, k, place in _side_by_side(local, len(experts.gate_up), between is not None):
        weight = weights[token, k].double()
        x_GSH = x.new_zeros(len(members), int(place[1].max()) + 1, hidden, dtype=torch.float64)
        weight_GS = x_GSH.new_zeros(x_GSH.shape[:2])
        x_GSH[place], weight_GS[place] = x[token].double(), weight
        row = expert_spread(x_GSH, wide, members, weight_GS, config, arithmetic, between).at(place)
        factor = weight if config.weight_on == "output" else torch.ones_like(weight)
        weighted = factor[:, None] * row.value
        own = factor.square()[:, None] * row.variance
        own = own + arithmetic.variance(weighted, "weighted_output")
        own = own + (arithmetic.accumulator_unit * weighted).square() / 3
        variance.index_add_(0, token, own)
        terms.index_add_(0, token, weighted)
        squares.index_add_(0, token, weighted.square())
        trace.index_add_(0, token, factor.square() * row.trace)
        trace_squared.index_add_(0, token, factor.pow(4) * row.trace_squared)
        shared.scatter_reduce_(0, token, row.shared, "amax")
    if arithmetic.inside is not None:
        # All of a token's experts see the same rounded x.
        trace_squared = trace_squared + shared * trace.square()
    if between is not None:
        value = terms
    sum_unit = arithmetic.accumulator_unit
    if "combine" in arithmetic.points:
        sum_unit = max(sum_unit, arithmetic.unit)
    # K - 1 additions, each of a partial sum whose square is at most K times the sum of squares.
    top_k = weights.shape[1]
    summed = (sum_unit**2 / 3) * (max(top_k - 1, 0) * squares + terms.square())
    out = summed + arithmetic.variance(value)
    variance = variance + out
    trace = trace + out.sum(-1)
    trace_squared = trace_squared + out.square().sum(-1)
    if arithmetic.dtype == arithmetic.of_experts.dtype == "float64":
        variance = 2 * variance  # the oracle's own errors are as large
    freedom = 1 / (1 / hidden + trace_squared / trace.square().clamp_min(1e-300))
    sigma = variance.sqrt().clamp_min(FLOOR[arithmetic.dtype])
    return Spread(value, sigma, freedom.clamp_min(1.0))


def _side_by_side(
    local_TK: torch.Tensor, num_experts: int, alone: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Experts [G] that are computed at once, and of each of their pairs token, k and place.

    A place is the expert's number among the G and the pair's among its rows. All experts that have
    pairs go together, unless most of the rows would be padding.

    Args:
        local_TK: rows of the weights, -1 for what is not here.
        num_experts: how many rows the weights have.
        alone: each expert by itself.
    """
    token, k = (local_TK >= 0).nonzero(as_tuple=True)
    expert, order = local_TK[token, k].sort(stable=True)
    token, k = token[order], k[order]
    counts = expert.bincount(minlength=num_experts)
    row = torch.arange(len(expert)) - (counts.cumsum(0) - counts)[expert]
    used = counts.nonzero().flatten()
    if len(used) == 0:
        return
    padded = len(used) * int(counts.max())
    together = not alone and padded <= MOST_PADDING * max(len(expert), FEW_ROWS)
    for members in used.split(len(used) if together else 1):
        number = torch.searchsorted(members, expert).clamp(max=len(members) - 1)
        own = members[number] == expert
        yield members, token[own], k[own], (number[own], row[own])


@dataclass(frozen=True)
class RowSpread:
    """The output rows of experts, before the routing weight.

    Attributes:
        value: [G, S, H], float64.
        variance: [G, S, H].
        trace: [G, S], the variance summed over independent errors.
        trace_squared: [G, S], the sum of its squares.
        shared: [G, S], the sum of squared shares of x's elements in the errors that they bring in.
    """

    value: torch.Tensor
    variance: torch.Tensor
    trace: torch.Tensor
    trace_squared: torch.Tensor
    shared: torch.Tensor

    def at(self, place: tuple[torch.Tensor, torch.Tensor]) -> RowSpread:
        """The rows of pairs: [P, H] or [P] each."""
        return RowSpread(*(getattr(self, f.name)[place] for f in fields(self)))


def expert_spread(
    x_GSH: torch.Tensor,
    experts: ExpertWeights,
    members: torch.Tensor,
    weight_GS: torch.Tensor,
    config: ExpertsConfig,
    arithmetic: Arithmetic,
    between: Between | None = None,
) -> RowSpread:
    """Experts [G] on their rows: value and variance, stage by stage."""
    inner = arithmetic.of_experts
    unit = inner.accumulator_unit
    variance_x = torch.zeros_like(x_GSH)
    if config.weight_on == "input":
        x_GSH = x_GSH * weight_GS[..., None]
        variance_x = (max(unit, arithmetic.accumulator_unit) * x_GSH).square() / 3
        variance_x = variance_x + _at_the_edge(x_GSH, "expert_input", arithmetic)
    entering = arithmetic.entering(x_GSH)
    variance_x = variance_x + entering
    if between is not None:
        x_GSH, variance_x = _changed(between, x_GSH, variance_x, members, 0)
    gate_up = experts.gate_up[members]
    pre, variance_pre = product_spread(x_GSH, variance_x, gate_up, arithmetic)
    if experts.gate_up_bias is not None:
        bias = experts.gate_up_bias[members, None]
        variance_pre = variance_pre + inner.variance(pre, "product") + arithmetic.entering(bias)
        pre = pre + bias
        variance_pre = variance_pre + (unit * pre).square() / 3
    variance_pre = variance_pre + inner.variance(pre, "pre_activation")

    activated, variance_a = activation_spread(pre, variance_pre, config, inner)
    if between is not None:
        activated, variance_a = _changed(between, activated, variance_a, members, 1)
    down = experts.down[members]
    out, variance_out = product_spread(activated, variance_a, down, arithmetic)
    if experts.down_bias is not None:
        bias = experts.down_bias[members, None]
        variance_out = variance_out + inner.variance(out, "product") + arithmetic.entering(bias)
        out = out + bias
        variance_out = variance_out + (unit * out).square() / 3
    rounded = _at_the_edge(out, "expert_output", arithmetic)
    sources = variance_a * down.square().sum(1, keepdim=True)
    trace = sources.sum(-1) + rounded.sum(-1)
    trace_squared = sources.square().sum(-1) + rounded.square().sum(-1)
    if between is not None:
        # Another code moves all that comes after it, and another scale all codes of a row: where
        # there may be one, a row has one error, and not one for each of I.
        moved = [
            (variance > (1e-4 * rows).square().amax(-1, keepdim=True)).any(-1)
            for rows, variance in ((x_GSH, variance_x), (activated, variance_a))
        ]
        trace_squared = trace_squared.where(~(moved[0] | moved[1]), trace.square())
    shared = torch.zeros_like(trace)
    if arithmetic.inside is not None:
        shared = _shared_errors(entering, gate_up, variance_pre)
    return RowSpread(out, variance_out + rounded, trace, trace_squared, shared)


def _changed(
    between: Between, rows: torch.Tensor, variance: torch.Tensor, members: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `between` makes of the rows of the only expert there is."""
    [rows], [variance], [expert] = rows, variance, members
    rows, variance = between(rows, variance, int(expert), step)
    return rows[None], variance[None]


def _at_the_edge(value: torch.Tensor, point: str, arithmetic: Arithmetic) -> torch.Tensor:
    """Variance of rounding where rows come in or go out: to either dtype, where there are two."""
    variance = arithmetic.variance(value, point)
    if arithmetic.of_experts.dtype != arithmetic.dtype:
        variance = variance + arithmetic.of_experts.variance(value, point)
    return variance


def _shared_errors(
    entering_GSN: torch.Tensor, gate_up_GMN: torch.Tensor, variance_GSM: torch.Tensor
) -> torch.Tensor:
    """[G, S]: one over the number of independent errors in a row, as far as they are those of x.

    An element of x that is rounded on its way in moves all pre-activations of the row together: the
    row has no more errors of this kind than x has elements. They count by what they bring to the
    pre-activations, and by the largest share of a variance there that is theirs.
    """
    squares_GMN = gate_up_GMN.square()
    brought = entering_GSN * squares_GMN.sum(1, keepdim=True)
    total = brought.sum(-1).square().clamp_min(1e-300)
    share = (entering_GSN @ squares_GMN.mT / variance_GSM.clamp_min(1e-300)).amax(-1)
    return share.square() * brought.square().sum(-1) / total


def product_spread(
    a_GSN: torch.Tensor, variance_GSN: torch.Tensor, b_GMN: torch.Tensor, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    """a b^T and its variance: what came in, what rounding b and accumulating N terms adds.

    Of experts side by side, or of one, without the dimension G.

    After i of N terms in a random order the partial sum's square is about i Q / N (1 - i / N)
    + (i / N)^2 S^2, with Q the sum of squared terms times N / N and S the total. Added up over i
    and taken twice, for orders that are not random: N (Q / 3 + 2 S^2 / 3).
    """
    squares_GMN = b_GMN.square()
    total = a_GSN @ b_GMN.mT
    squares = a_GSN.square() @ squares_GMN.mT
    carried = variance_GSN @ squares_GMN.mT
    if arithmetic.inside is not None:
        carried = carried + a_GSN.square() @ arithmetic.entering(b_GMN).mT
    count = a_GSN.shape[-1]
    unit = arithmetic.of_experts.accumulator_unit
    added = unit**2 / 3 * (count * (squares / 3 + 2 * total.square() / 3) + squares)
    if arithmetic.of_experts.accumulator == "tf32":
        added = added + 2 * UNIT["tf32"] ** 2 / 3 * squares
    return total, carried + added


def activation_spread(
    pre: torch.Tensor, variance: torch.Tensor, config: ExpertsConfig, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert computes between its products, and its variance."""
    leaf = pre.detach().requires_grad_(True)
    with torch.enable_grad():
        branches = leaf.chunk(2, -1) if config.gated else (leaf, torch.ones_like(leaf))
        gate, up = branches
        inner, factor = activation_parts(gate, up, config)
        result = inner * factor
        [slope] = torch.autograd.grad(result.sum(), leaf)
    result, inner, factor = result.detach(), inner.detach(), factor.detach()
    slope = slope.abs()
    if arithmetic.dtype != "float64":
        slope = torch.maximum(slope, _secants(pre, variance, result, config))
    carried = slope.square() * variance
    if config.gated:
        gate_part, up_part = carried.chunk(2, -1)
        carried = gate_part + up_part
    unit = arithmetic.accumulator_unit
    # The function itself: its argument's size is lost in exp, as in any softmax. The two gelu add
    # 1 to a function that tends to -1, so far below 0 their error is one of the gate's own size.
    size = (1 + gate.detach().abs()) * result.abs()
    if config.activation in ("gelu", "gelu_tanh"):
        size = size + (gate.detach() * factor).abs()
    carried = carried + (unit * FUNCTION_ULPS * size).square() / 3
    if config.activation not in ("relu", "relu2"):
        # Far below 0 the exponential, or its reciprocal, leaves the range: the gate times nothing.
        lost = TINY[arithmetic.accumulator] * gate.detach().abs() * factor.abs()
        carried = carried + lost.square() / 3
    if "activation_steps" in arithmetic.points:
        carried = carried + _step_variance(gate.detach(), inner, factor, config, arithmetic)
    elif "gate_activation" in arithmetic.points:
        carried = carried + arithmetic.variance(inner) * factor.square()
    return result, carried + arithmetic.variance(result, "activation")


def _secants(
    pre: torch.Tensor, variance: torch.Tensor, result: torch.Tensor, config: ExpertsConfig
) -> torch.Tensor:
    """The steepest way from each argument to one that its rounding may have made of it.

    Where a function bends within the reach of its argument's error, as relu does at 0 and a clamp
    at its limit, its slope at one point says nothing of what the error does to it. Eight standard
    deviations are beyond the limit for failing.
    """
    away = torch.tensor([-8.0, -2.0, 2.0, 8.0], dtype=pre.dtype).view(-1, *(1 for _ in pre.shape))
    step = away * variance.sqrt()
    if config.gated:
        (gate, up), (gate_step, up_step) = pre.chunk(2, -1), step.chunk(2, -1)
        moved = torch.cat(
            [
                _activated(gate + gate_step, up, config) - result,
                _activated(gate, up + up_step, config) - result,
            ],
            -1,
        )
    else:
        moved = _activated(pre + step, torch.ones_like(pre), config) - result
    return (moved.abs() / step.abs().clamp_min(1e-300)).amax(0)


def _activated(gate: torch.Tensor, up: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    inner, factor = activation_parts(gate, up, config)
    return inner * factor


def _step_variance(
    gate: torch.Tensor,
    inner: torch.Tensor,
    factor: torch.Tensor,
    config: ExpertsConfig,
    arithmetic: Arithmetic,
) -> torch.Tensor:
    """What rounding the activated gate, its parts and its factor, each by itself, adds."""
    carried = arithmetic.variance(inner) * factor.square()
    carried = carried + arithmetic.variance(factor) * inner.square()
    if config.activation == "swigluoai":
        # gate * alpha, its sigmoid, and their product with the gate are three results.
        gate = gate.clamp(max=config.limit)
        sigmoid = torch.sigmoid(config.alpha * gate)
        slope = gate * sigmoid * (1 - sigmoid)
        argument = arithmetic.variance(config.alpha * gate) * slope.square()
        carried = carried + (argument + arithmetic.variance(sigmoid) * gate.square()) * (
            factor.square()
        )
    return carried


def activation_parts(
    gate: torch.Tensor, up: torch.Tensor, config: ExpertsConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activated gate and what it is multiplied by; up is 1 where there is no gate."""
    name, limit = config.activation, config.limit
    if name == "swigluoai":
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(config.alpha * gate), up.clamp(-limit, limit) + 1
    if name == "swiglu_limit":
        return F.silu(gate.clamp(max=limit)), up.clamp(-limit, limit)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda z: F.relu(z).square(),
    }
    return functions[name](gate), up


def local_ids(
    expert_ids: torch.Tensor, num_local: int, expert_map: torch.Tensor | None
) -> torch.Tensor:
    """Rows of the weights, -1 where an id means *not here*."""
    ids = expert_ids.long()
    here = len(expert_map) if expert_map is not None else num_local
    known = (ids >= 0) & (ids < here)
    if expert_map is not None:
        mapped = expert_map.long()[ids.clamp(0, here - 1)]
        known = known & (mapped >= 0) & (mapped < num_local)
        ids = mapped
    return ids.where(known, -1)
