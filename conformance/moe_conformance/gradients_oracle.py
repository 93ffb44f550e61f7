"""How far the gradients of experts may be from the float64 ones.

Dimension key: T tokens, H hidden size, I intermediate size, K experts per token, E experts, P pairs
of one expert, M rows of its gate_up.

Two bounds, of which the smaller one holds. In the worst case every rounding is as large as it can
be and all have one sign. Mostly they are independent, and a sum of many is off by the root of what
they are together: as for the output, variances are carried through the computation by the squares
of the derivatives, and what is allowed is a number of standard deviations. Where a slope jumps
within the reach of a pre-activation's error, all of the jump is allowed.

What may be rounded on the way back is not declared. So it is allowed at every step: results between
an input and its gradient may each be stored in the narrower of the dtypes that are involved.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_reference.config import ExpertsConfig
from moe_reference.experts import experts as reference_experts

from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import (
    FUNCTION_ULPS,
    activation_parts,
    activation_spread,
    local_ids,
    product_spread,
)
from moe_conformance.judge import FAIL_Z, widening
from moe_conformance.precision import TINY, UNIT, Arithmetic

BEYOND = 8.0
"""Standard deviations of a pre-activation within which a slope may jump."""

VANISHED = 1e-30
"""What the product of factors far below 1 loses, where each is no smaller than float32 can be."""

ASIDE = 1e-6
"""From a jump to where the slope is that on one side of it."""

STORED = ("product", "pre_activation", "gate_activation", "activation_steps", "activation",
          "expert_input", "expert_output", "weighted_output")  # fmt: skip
"""Rounding points that the forward pass may have where gradients are taken."""


def expected_gradients(
    given: dict[str, Any], cotangent: torch.Tensor, arithmetic: Arithmetic, sums: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of `experts` in float64, and how far a legal answer may be from them.

    Args:
        given: the arguments of `experts`.
        cotangent: [T, H], what the output is differentiated with.
        arithmetic: what is rounded, and where.
        sums: how many more times a gradient is rounded, because it is added up.

    Returns:
        The gradients and the bounds, by path.
    """
    wide = _wide(given)
    value = reference_experts(**wide)
    leaves = dict(walk(wide))
    paths = [path for path, t in leaves.items() if t.requires_grad]
    found = torch.autograd.grad(
        value, [leaves[path] for path in paths], cotangent.double(), materialize_grads=True
    )
    expected = dict(zip(paths, found, strict=True))
    bound = _worst(given, cotangent, arithmetic, expected, sums)
    if _independent(arithmetic):
        usual = _Spread.of(given, cotangent, arithmetic, sums).allowed(expected)
        bound = {path: torch.minimum(bound[path], usual[path]) for path in paths}
    return expected, bound


def _independent(arithmetic: Arithmetic) -> bool:
    """Whether the errors in a sum over tokens have little to do with each other.

    Parameters that are rounded on their way in are the same for all tokens, and so is their error;
    a sum in a narrow dtype stops to grow. In float64 the oracle's own errors are as large.
    """
    wide = arithmetic.accumulator in ("float64", "float32", "tf32")
    parameters_as_given = arithmetic.inside is None and "unpacked_weights" not in arithmetic.points
    return arithmetic.dtype != "float64" and parameters_as_given and wide


def _wide(given: dict[str, Any]) -> dict[str, Any]:
    def leaf(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(True)

    return given | {
        "x": leaf(given["x"]),
        "weights": leaf(given["weights"]),
        "experts": replace_tensors(given["experts"], lambda _, tensor: leaf(tensor)),
    }


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _worst(
    given: dict[str, Any],
    cotangent: torch.Tensor,
    arithmetic: Arithmetic,
    expected: dict[str, torch.Tensor],
    sums: int,
) -> dict[str, torch.Tensor]:
    """The bound that holds for every order and every rounding point, by path.

    Every gradient is a sum of products. With all factors replaced by their absolute values the same
    sums give its size, and each of the at most `stages` roundings on the way costs one unit of it.
    """
    tokens, hidden = given["x"].shape
    inner_size, top_k = given["experts"].down.shape[-1], given["weights"].shape[1]
    terms = 4 * (hidden + inner_size + tokens * top_k)
    u = max(arithmetic.accumulator_unit, UNIT["tf32"] if arithmetic.accumulator == "tf32" else 0.0)
    inner = arithmetic.of_experts
    u = max(u, inner.accumulator_unit, UNIT["tf32"] if inner.accumulator == "tf32" else 0.0)
    stages = 8 + sums  # rounded results between an input and its gradient, forward and back
    if arithmetic.inside is not None:
        stages += 4  # x, both matrices and the cotangent, on their way in
    if "unpacked_weights" in arithmetic.points:
        stages += 2  # both matrices
    sizes = functools.cache(functools.partial(_sizes, given, cotangent))
    leaves = dict(walk(given))
    bound = {}
    for path, gradient in expected.items():
        # A gradient has the dtype of what it belongs to, and may be summed in it.
        own = _name(leaves[path])
        unit = max(arithmetic.unit, UNIT[own], inner.unit)
        relative = terms * u + stages * max(u, unit) + unit
        bound[path] = relative * sizes(relative)[path] + 2 * relative * gradient.abs()
        bound[path] = bound[path] + VANISHED
        if {arithmetic.dtype, own, inner.dtype} & {"float16", "bfloat16"}:
            bound[path] = bound[path] + 2.0**-24 * stages
    return bound


def _sizes(
    given: dict[str, Any], cotangent: torch.Tensor, relative: float
) -> dict[str, torch.Tensor]:
    """Each gradient with every factor and every term replaced by its absolute value.

    Where a pre-activation is as close to a kink or a clamp as its rounding reaches, the slope may
    be the one on the other side: such elements count with all of their slope.
    """
    config: ExpertsConfig = given["config"]
    experts = given["experts"]
    x, weights = given["x"].double(), given["weights"].double()
    gate_up, down = experts.gate_up.double(), experts.down.double()
    cotangent = cotangent.double().abs()
    local = local_ids(given["expert_ids"], len(gate_up), given["expert_map"])
    size = _zeros(given)
    for expert in local[local >= 0].unique().tolist():
        token, k = (local == expert).nonzero(as_tuple=True)
        w = weights[token, k].abs()[:, None]
        rows = x[token].abs()
        on_input = config.weight_on == "input"
        seen = rows * w if on_input else rows
        pre = seen @ gate_up[expert].abs().T
        signed = (x[token] * (weights[token, k][:, None] if on_input else 1)) @ gate_up[expert].T
        bias, out_bias = _biases(experts, expert)
        pre, signed = pre + bias.abs(), signed + bias
        leaf = signed.requires_grad_(True)
        gate, up = leaf.chunk(2, -1) if config.gated else (leaf, torch.ones_like(leaf))
        inner, factor = activation_parts(gate, up, config)
        [slope] = torch.autograd.grad((inner * factor).sum(), leaf)
        # A slope is off by the curvature times the error of the pre-activation. The activations'
        # second derivatives are at most 2 (relu2) on branches of at most `pre`.
        big = pre.chunk(2, -1) if config.gated else (pre, torch.ones_like(pre))
        steep = (1 + big[1]) * (1 + big[0]) if config.gated else 1 + 2 * big[0]
        steep = torch.cat([steep, 1 + big[0]], -1) if config.gated else steep
        reach = relative * pre
        slope = slope.abs() + steep + steep * _near_kink(signed, reach, config) / relative
        result = (inner * factor).detach().abs() + (1 + big[0]) * (1 + big[1])
        g = cotangent[token] * (1 if on_input else w)
        back = g @ down[expert].abs()
        back = torch.cat([back, back], -1) if config.gated else back
        back = back * slope
        to_rows = back @ gate_up[expert].abs()
        size["experts.down"][expert] = g.T @ result
        size["experts.down_bias"][expert] = g.sum(0)
        size["experts.gate_up"][expert] = back.T @ seen
        size["experts.gate_up_bias"][expert] = back.sum(0)
        size["x"].index_add_(0, token, to_rows * (w if on_input else 1))
        if on_input:
            own = (to_rows * rows).sum(-1)
        else:
            own = (cotangent[token] * (result @ down[expert].abs().T + out_bias.abs())).sum(-1)
        size["weights"].index_put_((token, k), own, accumulate=True)
    return {path: t.detach() for path, t in size.items()}


def _zeros(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Zeros in the shape of every gradient there may be."""
    gate_up, down = given["experts"].gate_up, given["experts"].down
    shapes = {
        "x": given["x"].shape,
        "weights": given["weights"].shape,
        "experts.gate_up": gate_up.shape,
        "experts.down": down.shape,
        "experts.gate_up_bias": gate_up.shape[:2],
        "experts.down_bias": down.shape[:2],
    }
    return {path: torch.zeros(shape, dtype=torch.float64) for path, shape in shapes.items()}


def _biases(experts: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The biases of an expert, zeros where there are none."""
    of_first, of_second = experts.gate_up_bias, experts.down_bias
    return (
        experts.gate_up.new_zeros(()).double() if of_first is None else of_first[expert].double(),
        experts.down.new_zeros(()).double() if of_second is None else of_second[expert].double(),
    )


def _kinks(config: ExpertsConfig) -> tuple[float, ...]:
    """Where slopes jump."""
    if config.activation == "relu":
        return (0.0,)
    clamped = config.activation in ("swigluoai", "swiglu_limit")
    return (-config.limit, config.limit) if clamped else ()


def _near_kink(pre: torch.Tensor, reach: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """1 where the slope jumps within that reach of a pre-activation."""
    near = torch.zeros_like(pre)
    for kink in _kinks(config):
        near += (pre.detach() - kink).abs() <= reach
    return near


@dataclass
class _Spread:
    """Variances of all gradients, and what jumps add to them, by path."""

    arithmetic: Arithmetic
    sums: int
    dtypes: dict[str, str]
    variance: dict[str, torch.Tensor]
    jumps: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, given: dict[str, Any], cotangent: torch.Tensor, arithmetic: Arithmetic, sums: int
    ) -> _Spread:
        """The spread of all gradients of `experts` on these arguments."""
        dtypes = {path: _name(t) for path, t in walk(given) if t.is_floating_point()}
        # Results on the way may have the dtype of anything that takes part.
        narrow = max({*dtypes.values()}, key=lambda name: (UNIT[name], TINY[name]))
        loose = Arithmetic(narrow, arithmetic.accumulator, frozenset(STORED))
        made = cls(loose, sums, dtypes, _zeros(given), _zeros(given), _zeros(given))
        experts = given["experts"]
        local = local_ids(given["expert_ids"], len(experts.gate_up), given["expert_map"])
        for expert in local[local >= 0].unique().tolist():
            made._add(given, cotangent.double(), expert, *(local == expert).nonzero(as_tuple=True))
        return made

    def allowed(self, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """How far each gradient may be off."""
        found = {}
        for path, gradient in expected.items():
            step = UNIT[self.dtypes[path]]
            if path == "x" or self.sums:
                step = max(step, self.arithmetic.unit)
            # The sum is stored, and may be added up in parts that are stored as well.
            stored = (2 + self.sums) * gradient.square() + (1 + self.sums) * self.squares[path]
            variance = self.variance[path] + step**2 / 3 * stored
            variance = variance + TINY[self.dtypes[path]] ** 2 / 3
            limit = FAIL_Z * widening(variance.numel())
            # Twice, so that a slope from the other side is no marginal case.
            found[path] = limit * variance.sqrt() + 2 * self.jumps[path] + VANISHED
        return found

    def _add(
        self,
        given: dict[str, Any],
        cotangent: torch.Tensor,
        expert: int,
        token: torch.Tensor,
        k: torch.Tensor,
    ) -> None:
        """One expert's part."""
        config: ExpertsConfig = given["config"]
        a, experts = self.arithmetic, given["experts"]
        gate_up, down = experts.gate_up[expert].double(), experts.down[expert].double()
        bias, out_bias = _biases(experts, expert)
        w = given["weights"].double()[token, k][:, None]
        on_input = config.weight_on == "input"
        x_PH, c_PH = given["x"].double()[token], cotangent[token]
        rows_PH = x_PH * w if on_input else x_PH
        # The weight is rounded, and its product.
        var_rows_PH = (2 if on_input else 0) * a.variance(rows_PH)
        g_PH = c_PH if on_input else c_PH * w
        var_g_PH = (0 if on_input else 2) * a.variance(g_PH)

        pre_PM, var_pre_PM = product_spread(rows_PH, var_rows_PH, gate_up, a)
        var_pre_PM = var_pre_PM + a.variance(pre_PM) + a.variance(pre_PM + bias)
        pre_PM = pre_PM + bias
        result_PI, var_result_PI = activation_spread(pre_PM, var_pre_PM, config, a)
        pulled_PI, var_pulled_PI = product_spread(g_PH, var_g_PH, down.T, a)
        var_pulled_PI = var_pulled_PI + 2 * a.variance(pulled_PI)
        slope_PM, var_slope_PM, jump_PM = _slopes(pre_PM, var_pre_PM, config, a)
        if config.gated:
            pulled_PM = torch.cat([pulled_PI, pulled_PI], -1)
            var_pulled_PM = torch.cat([var_pulled_PI, var_pulled_PI], -1)
        else:
            pulled_PM, var_pulled_PM = pulled_PI, var_pulled_PI
        back_PM = pulled_PM * slope_PM
        var_back_PM = (
            var_pulled_PM * slope_PM.square()
            + (pulled_PM.square() + var_pulled_PM) * var_slope_PM
            + 2 * a.variance(back_PM)
        )
        lost_PM = pulled_PM.abs() * jump_PM

        self._sum("experts.down", expert, g_PH.T, var_g_PH.T, result_PI.T, var_result_PI.T)
        self._sum("experts.gate_up", expert, back_PM.T, var_back_PM.T, rows_PH.T, var_rows_PH.T)
        self.jumps["experts.gate_up"][expert] = lost_PM.T @ rows_PH.abs()
        ones, none = torch.ones(1, len(token)).double(), torch.zeros(1, len(token)).double()
        self._sum("experts.down_bias", expert, g_PH.T, var_g_PH.T, ones, none)
        self._sum("experts.gate_up_bias", expert, back_PM.T, var_back_PM.T, ones, none)
        self.jumps["experts.gate_up_bias"][expert] = lost_PM.sum(0)

        to_rows_PH, var_to_rows_PH = product_spread(back_PM, var_back_PM, gate_up.T, a)
        var_to_rows_PH = var_to_rows_PH + 2 * a.variance(to_rows_PH)
        lost_PH = lost_PM @ gate_up.abs()
        to_x_PH = to_rows_PH * w if on_input else to_rows_PH
        scale = w.square() if on_input else 1.0
        var_to_x_PH = var_to_rows_PH * scale + (2 if on_input else 0) * a.variance(to_x_PH)
        self.variance["x"].index_add_(0, token, var_to_x_PH)
        self.squares["x"].index_add_(0, token, to_x_PH.square())
        self.jumps["x"].index_add_(0, token, lost_PH * (w.abs() if on_input else 1.0))

        unit = a.accumulator_unit
        if on_input:
            parts_PH = to_rows_PH * x_PH
            own = (var_back_PM * (x_PH @ gate_up.T).square()).sum(-1)
            own = own + (x_PH.square() * 2 * a.variance(to_rows_PH)).sum(-1)
            lost = (lost_PH * x_PH.abs()).sum(-1)
        else:
            out_PH, var_out_PH = product_spread(result_PI, var_result_PI * 0, down, a)
            out_PH = out_PH + out_bias
            parts_PH = c_PH * out_PH
            through_PI = c_PH @ down
            own = (var_result_PI * through_PI.square()).sum(-1)
            own = own + (c_PH.square() * (var_out_PH + 3 * a.variance(out_PH))).sum(-1)
            own = own + (result_PI.square() * 2 * a.variance(through_PI)).sum(-1)
            own = own + (a.variance(result_PI * through_PI)).sum(-1)
            lost = torch.zeros(len(token)).double()
        count = parts_PH.shape[-1]
        squares, total = parts_PH.square().sum(-1), parts_PH.sum(-1)
        own = own + a.variance(parts_PH).sum(-1)
        own = own + unit**2 / 3 * (count * (squares / 3 + 2 * total.square() / 3) + squares)
        self.variance["weights"].index_put_((token, k), own, accumulate=True)
        self.jumps["weights"].index_put_((token, k), lost, accumulate=True)

    def _sum(
        self,
        path: str,
        expert: int,
        a_MP: torch.Tensor,
        var_a_MP: torch.Tensor,
        b_NP: torch.Tensor,
        var_b_NP: torch.Tensor,
    ) -> None:
        """A gradient that is a sum over an expert's pairs."""
        _, variance = product_spread(a_MP, var_a_MP, b_NP, self.arithmetic)
        variance = variance + (a_MP.square() + var_a_MP) @ var_b_NP.mT
        squares = a_MP.square() @ b_NP.square().mT
        bias = self.variance[path].ndim == 2
        self.variance[path][expert] = variance[:, 0] if bias else variance
        self.squares[path][expert] = squares[:, 0] if bias else squares


def _slopes(
    pre_PM: torch.Tensor, var_pre_PM: torch.Tensor, config: ExpertsConfig, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of what an expert computes between its products: slopes, their variance, and their jumps."""
    sigma = var_pre_PM.sqrt()
    slope, inner, factor, gate = _slope(pre_PM, config)
    moved, jumps = torch.zeros_like(slope), torch.zeros_like(slope)
    branches = pre_PM.shape[-1] // 2 if config.gated else pre_PM.shape[-1]
    for part in (slice(None, branches), slice(branches, None)) if config.gated else (slice(None),):
        only = torch.zeros_like(pre_PM)
        only[:, part] = sigma[:, part]
        steepest, reached = torch.zeros_like(slope), []
        for away in (-BEYOND, -2.0, 2.0, BEYOND):
            there = _slope(pre_PM + away * only, config)[0]
            reached.append(there)
            steepest = torch.maximum(steepest, (there - slope).abs() / abs(away))
        moved = moved + steepest.square()
        for kink in _kinks(config):
            for side in (kink - ASIDE, kink + ASIDE):
                there = pre_PM.clone()
                there[:, part] = side
                reached.append(_slope(there, config)[0])
        near = torch.zeros_like(pre_PM)
        near[:, part] = _near_kink(pre_PM, BEYOND * sigma, config)[:, part]
        if config.gated:
            # A branch beyond its clamp is a constant for itself and for the other one's slope.
            near = near.unflatten(-1, (2, branches)).amax(-2, keepdim=True).expand(-1, 2, -1)
            near = near.flatten(-2)
        jumps = jumps + near * torch.stack([(r - slope).abs() for r in reached]).amax(0)
    # What a slope is made of may cancel, and each of its parts be rounded.
    first, second = slope[:, :branches], slope[:, branches:]
    share = torch.where(gate == 0, first / factor, inner / gate)
    parts = factor.abs() * (share.abs() + (first / factor - share).abs())
    parts = torch.maximum(parts.nan_to_num(0.0, 0.0, 0.0), first.abs())
    # The function itself, as on the way forward: the argument's size is lost in exp, and the two
    # gelu add 1 to a function that tends to -1.
    lost = (1 + gate.abs()) * parts
    lost_of_up = (1 + gate.abs()) * second.abs() if config.gated else second
    if config.activation in ("gelu", "gelu_tanh"):
        lost = lost + (1 + gate.abs()) * factor.abs()
        lost_of_up = lost_of_up + gate.abs() if config.gated else second
    size = torch.cat([parts, second.abs()], -1)
    function = torch.cat([lost, lost_of_up], -1) * arithmetic.accumulator_unit * FUNCTION_ULPS
    return slope, moved + 6 * arithmetic.variance(size) + function.square() / 3, jumps


def _slope(
    pre_PM: torch.Tensor, config: ExpertsConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slopes, and what they are of: activated gate, what it is multiplied by, and gate."""
    leaf = pre_PM.detach().requires_grad_(True)
    with torch.enable_grad():
        gate, up = leaf.chunk(2, -1) if config.gated else (leaf, torch.ones_like(leaf))
        inner, factor = activation_parts(gate, up, config)
        [slope] = torch.autograd.grad((inner * factor).sum(), leaf)
    return slope, inner.detach(), factor.detach(), gate.detach()
