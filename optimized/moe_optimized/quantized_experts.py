"""Packed experts: their weights are unpacked inside the products, or one expert at a time.

Each way to compute them, and what it gains:

1. `quantized_kernels`: Triton kernels on a layout of their own, which `prepare` makes once when
   weights are loaded. Nothing unpacked is ever stored.
2. In torch, the experts that have tokens one after the other: one expert's weights are unpacked at
   a time, and no others. For what no kernel takes: devices without Triton, float64, gradients,
   Q4_K, and 8-bit activations other than float8 on float8 weights.

No call of the experts unpacks the weights of all of them together, forward or backward: it makes no
tensor [E, out, in]. Only `dequantize` does, which is asked for one.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert, S rows of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate, product
from moe_reference.bit_packing import unpack_words
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig
from moe_reference.integer_quantization import column_groups
from moe_reference.quantization import dequantize as _reference_dequantize
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_experts_checks import check_quantized_experts
from moe_reference.quantized_tensors import INTEGER_BITS, QuantizedExperts, QuantizedTensor

from moe_optimized.activations import activate_with_gradient
from moe_optimized.alignment import check_map, check_tokens, local_ids, sort_slots
from moe_optimized.autograd import once
from moe_optimized.compiling import opaque
from moe_optimized.dispatch import accumulation_dtype
from moe_optimized.interpreter import KERNEL_DTYPES, has_kernels
from moe_optimized.quantized_dequantize import dequantize_kernels, refusal_of_tensor
from moe_optimized.quantized_kernels import run_quantized
from moe_optimized.quantized_layout import (
    CODES,
    PreparedExperts,
    PreparedMatrix,
    prepare,
    unpack_prepared,
)


@opaque
def dequantize(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that a packed tensor stands for.

    Args:
        packed: of any format.

    Returns:
        [E, O, D], float32, or float64 where the scales are float64. Scales have no gradient here;
        in the reference they have one.

    Raises:
        TypeError, ValueError: parts of the wrong dtype or shape, or an unknown format.
    """
    check_quantized("packed", packed)
    on_kernels = has_kernels(torch.empty(0, device=packed.packed.device))
    run = dequantize_triton if on_kernels and not refusal_of_tensor(packed) else dequantize_torch
    return run(packed)


@opaque
def dequantize_torch(packed: QuantizedTensor) -> torch.Tensor:
    """As `dequantize`, in operations of torch: those of the reference."""
    # The kernels have no gradient of scales, and neither has this.
    with torch.no_grad():
        # Codes of e4m3 give their strides to what they become, and a graph counts on contiguous.
        return _reference_dequantize(packed).contiguous()


@opaque
def dequantize_triton(packed: QuantizedTensor) -> torch.Tensor:
    """As `dequantize`, in one Triton kernel; not for Q4_K, nor for scales of float64."""
    check_quantized("packed", packed)
    reason = refusal_of_tensor(packed)
    if reason:
        raise ValueError(reason)
    with torch.no_grad():
        return dequantize_kernels(packed)


def experts_quantized(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, whose weights are packed.

    Args:
        x: [T, H], any float dtype.
        experts: packed weights of E experts, as they are or as `prepare` has laid them out. As they
            are, every call lays them out again: nothing is kept between calls.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64; an id that is not here contributes nothing.
        config: how one expert computes.
        expert_map: [global experts], each one's row in `experts` or -1, or None.

    Returns:
        [T, H], x's dtype, differentiable in x, weights and biases; with a gradient it takes the way
        of torch. Packed scales have no gradient here; in the reference they have one.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    on_kernels = (
        isinstance(x, torch.Tensor)
        and has_kernels(x)
        and isinstance(experts, QuantizedExperts | PreparedExperts)
        and refusal(x, experts, weights, config) is None
    )
    run = experts_quantized_triton if on_kernels else experts_quantized_torch
    return run(x, experts, weights, expert_ids, config, expert_map)


@opaque
def experts_quantized_triton(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts_quantized`, in Triton kernels.

    Raises:
        ValueError: also what `refusal` says.
    """
    check_experts_quantized(x, experts, weights, expert_ids, config, expert_map)
    reason = refusal(x, experts, weights, config)
    if reason is not None:
        raise ValueError(reason)
    prepared = experts if isinstance(experts, PreparedExperts) else prepare(experts)
    return run_quantized(x, prepared, weights, expert_ids, config, expert_map)


@opaque
def experts_quantized_torch(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts_quantized`, in operations of torch, one expert unpacked at a time.

    Gradients can be taken once: a gradient of theirs raises RuntimeError.
    """
    check_experts_quantized(x, experts, weights, expert_ids, config, expert_map)
    biases = experts.gate_up_bias, experts.down_bias
    return _Experts.apply(x, weights, *biases, experts, expert_ids, config, expert_map)


def experts_batched_quantized(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Each expert's output for its own rows, unweighted, with packed weights.

    Args:
        x: [E, C, H], any float dtype; rows past an expert's count may hold anything.
        tokens_per_expert: [E], int32 or int64.
        experts: packed weights of E experts, as they are or as `prepare` has laid them out.
        config: how one expert computes; `weight_on` plays no part.

    Returns:
        [E, C, H], x's dtype; rows past an expert's count are zero.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape. Counts are checked on a CPU
            only, and not in a compiled call.
    """
    check_tensor("x", x, ("E", "C", "H"), FLOATS)
    check_tensor("tokens_per_expert", tokens_per_expert, (x.shape[0],), IDS)
    # A compiled call cannot look at counts.
    if not torch.compiler.is_compiling():
        check_tokens(tokens_per_expert, x.shape[1])
    E, C, H = x.shape
    # Every row is a token with one expert, or with none.
    ids = torch.arange(E, device=x.device)[:, None].expand(E, C)
    in_use = torch.arange(C, device=x.device) < tokens_per_expert[:, None]
    ids = torch.where(in_use, ids, -1).view(E * C, 1)
    ones = torch.ones(E * C, 1, dtype=torch.float32, device=x.device)
    config = replace(config, weight_on="output")
    return experts_quantized(x.reshape(E * C, H), experts, ones, ids, config).view(E, C, H)


def refusal(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    config: ExpertsConfig,
) -> str | None:
    """Why the kernels do not take a call, in one sentence, or None where they do.

    Args:
        x: [T, H].
        experts: packed weights.
        weights: [T, K].
        config: how one expert computes.
    """
    if x.dtype not in KERNEL_DTYPES:
        name = str(x.dtype).removeprefix("torch.")
        return f"x: expected float32, bfloat16 or float16, got {name}"
    wanted = refusal_of_gradient(x, experts, weights)
    if wanted is not None:
        return wanted
    for name in ("gate_up", "down"):
        matrix = getattr(experts, name)
        if isinstance(matrix, QuantizedTensor) and matrix.format not in CODES:
            return (
                f"experts.{name}.format: expected one of {', '.join(map(repr, CODES))}, got "
                f"{matrix.format!r}"
            )
    return _refusal_of_activations(experts, config)


def refusal_of_gradient(
    x: torch.Tensor, experts: QuantizedExperts | PreparedExperts, weights: torch.Tensor
) -> str | None:
    """As `refusal`, of a call that has a gradient to be taken."""
    biases = {f"experts.{name}": getattr(experts, name) for name in ("gate_up_bias", "down_bias")}
    for name, tensor in {"x": x, "weights": weights, **biases}.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            return (
                f"{name}: expected no gradient, since the kernels have no backward, got one to be "
                "taken"
            )
    return None


def _refusal_of_activations(
    experts: QuantizedExperts | PreparedExperts, config: ExpertsConfig
) -> str | None:
    format = experts.activation_format
    if format is None:
        return None
    if format not in ("e4m3", "e4m3_block"):
        return f"experts.activation_format: expected float8 in the kernels, got {format!r}"
    if experts.activation_scales is not None:
        return "experts.activation_scales: expected None in the kernels, got fixed scales"
    if config.weight_on == "input":
        # What is rounded is the weighted row, which is another one for every pair.
        return "config.weight_on: expected 'output' with 8-bit activations, got 'input'"
    for name in ("gate_up", "down"):
        matrix = getattr(experts, name)
        if isinstance(matrix, PreparedMatrix):
            fits = matrix.codes == "e4m3" and matrix.columns is None
        else:
            B = matrix.group_size
            fits = matrix.format == "e4m3" and (B == -1 or B % 16 == 0)
        if not fits:
            return (
                f"experts.{name}: expected e4m3 with blocks of a multiple of 16 columns for "
                f"8-bit activations, got another format or block"
            )
    return None


def check_experts_quantized(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
) -> None:
    """Raise on arguments that `experts_quantized` cannot take."""
    check_tensor("x", x, ("T", "H"), FLOATS)
    check_tensor("weights", weights, (x.shape[0], "K"), FLOATS)
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    if not isinstance(config, ExpertsConfig):
        raise TypeError(f"config: expected an ExpertsConfig, got {type(config).__name__}")
    if not isinstance(experts, PreparedExperts):
        check_quantized_experts(experts)
    E, H, I = experts.down.shape
    expected = (E, 2 * I if config.gated else I, x.shape[1])
    if tuple(experts.gate_up.shape) != expected:
        raise ValueError(
            f"experts.gate_up.shape: expected {expected}, which fits x, down and config.gated, got "
            f"{tuple(experts.gate_up.shape)}"
        )
    if x.shape[1] != H:
        raise ValueError(f"x: expected {H} columns, which fit experts.down, got {x.shape[1]}")
    # The kernels read as many numbers as the matrices have rows.
    for name, rows in (("gate_up_bias", expected[1]), ("down_bias", H)):
        bias = getattr(experts, name)
        if bias is not None:
            check_tensor(f"experts.{name}", bias, (E, rows), FLOATS)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, ("E",), IDS)
        check_map(expert_map, E)


class _Experts(torch.autograd.Function):
    """One expert after the other, forward and, from x alone, backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        experts: QuantizedExperts | PreparedExperts,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        # Biases may be trained, and what is kept past `save_for_backward` may change unnoticed.
        ctx.save_for_backward(x, weights, gate_up_bias, down_bias, expert_ids, expert_map)
        ctx.experts = replace(experts, gate_up_bias=None, down_bias=None)
        ctx.config = config
        wide = accumulation_dtype(x)
        pairs = x.new_zeros(*expert_ids.shape, x.shape[1], dtype=wide)
        for e, *pair in _pairs(expert_ids, experts, expert_map):
            rows, factors = x[pair[0]].to(wide), weights[*pair, None].to(wide)
            if config.weight_on == "input":
                pairs[*pair] = _one_expert(rows * factors, experts, e, config)[0]
            else:
                pairs[*pair] = _one_expert(rows, experts, e, config)[0] * factors
        return pairs.sum(dim=1).to(x.dtype)

    @staticmethod
    @once("experts_quantized_torch")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, gate_up_bias, down_bias, expert_ids, expert_map = ctx.saved_tensors
        experts = replace(ctx.experts, gate_up_bias=gate_up_bias, down_bias=down_bias)
        how, needs = (ctx.config, expert_map), ctx.needs_input_grad[:4]
        grads = gradients(grad, x, experts, weights, expert_ids, *how, needs)
        return (*grads, None, None, None, None)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients of `experts_quantized_torch`, one expert unpacked at a time.

    Args:
        grad: [T, H], the output's gradient.
        x: [T, H].
        experts: packed weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        needs: which gradients are wanted: of x, weights and the two biases.

    Returns:
        Of each the gradient, with its tensor's shape and dtype, or None.
    """
    wide = accumulation_dtype(x)
    leaves = (x, weights, experts.gate_up_bias, experts.down_bias)
    found = [
        torch.zeros(t.shape, dtype=wide, device=x.device) if wanted else None
        for t, wanted in zip(leaves, needs, strict=True)
    ]
    to_x, to_weights, to_gate_up_bias, to_down_bias = found
    # Every pair has a row of its own, so that no sum depends on the order of the experts.
    if to_x is not None:
        to_x = to_x[:, None].repeat(1, expert_ids.shape[1], 1)
    on_input = config.weight_on == "input"
    # What is rounded has a gradient of zero: only that of what stands behind it is another.
    rounded = experts.activation_format is not None
    needs_rows = not rounded and (to_x is not None or (on_input and to_weights is not None))
    needs_pre = needs_rows or (not rounded and to_gate_up_bias is not None)
    needs_out = not on_input and to_weights is not None
    for e, *pair in _pairs(expert_ids, experts, expert_map):
        rows, factors = x[pair[0]].to(wide), weights[*pair, None].to(wide)
        grads = grad[pair[0]].to(wide)
        to_out = grads if on_input else grads * factors
        if to_down_bias is not None:
            to_down_bias[e] = to_out.sum(0)
        if not needs_pre and not needs_out:
            continue
        out, back = _one_expert(rows * factors if on_input else rows, experts, e, config, needs_out)
        if out is not None:
            to_weights[*pair] = (grads * out).sum(1)
        if needs_pre:
            d_pre, d_rows = back(to_out, needs_rows)
            if to_gate_up_bias is not None:
                to_gate_up_bias[e] = d_pre.sum(0)
            if to_x is not None:
                to_x[*pair] = d_rows * factors if on_input else d_rows
            if on_input and to_weights is not None:
                to_weights[*pair] = (d_rows * rows).sum(1)
    found[0] = None if to_x is None else to_x.sum(1)
    return [
        None if gradient is None else gradient.to(leaf.dtype)
        for gradient, leaf in zip(found, leaves, strict=True)
    ]


def _pairs(
    expert_ids: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    expert_map: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that has tokens, with the tokens and the places among their K."""
    num_experts, top_k = experts.down.shape[0], expert_ids.shape[1]
    local = local_ids(expert_ids, num_experts, expert_map)
    order, ends = sort_slots(local, num_experts)
    start = 0
    # All ends at once: on a GPU each look at a value waits for everything before it.
    for e, end in enumerate(ends.tolist()):
        slots = order[start:end]
        if start < end:
            yield e, slots // top_k, slots % top_k
        start = end


def _one_expert(
    rows: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    e: int,
    config: ExpertsConfig,
    needs_out: bool = True,
) -> tuple[torch.Tensor | None, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]]:
    """One expert on its rows, which are rounded before each product.

    Args:
        rows: [S, H].
        experts: packed weights.
        e: the expert.
        config: how it computes.
        needs_out: whether the second product is made.

    Returns:
        out: [S, H], or None.
        back: where nothing is rounded, from the gradient of out to that of the first product,
            [S, J], and to that of rows, [S, H], or None if its second argument is False.
    """
    gate_up, down = _unpack(experts.gate_up, e), _unpack(experts.down, e)
    up_bias, down_bias = (
        None if bias is None else bias[e] for bias in (experts.gate_up_bias, experts.down_bias)
    )
    pre = product(_rounded(rows, experts, e, 0), gate_up, up_bias)
    out = None
    if needs_out:
        out = product(_rounded(activate(pre, config), experts, e, 1), down, down_bias)

    def back(grad: torch.Tensor, needs_rows: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        d_pre = activate_with_gradient(pre, config)[1](product(grad, down.T))
        return d_pre, product(d_pre, gate_up.T) if needs_rows else None

    return out, back


def _rounded(
    rows: torch.Tensor, experts: QuantizedExperts | PreparedExperts, e: int, step: int
) -> torch.Tensor:
    """Rows as the first product (step 0) or the second (1) of an expert takes them."""
    if experts.activation_format is None:
        return rows
    matrix, static = (experts.gate_up, experts.down)[step], experts.activation_scales
    scale = None if static is None else static[e, step]
    block = matrix.block if isinstance(matrix, PreparedMatrix) else matrix.group_size
    return round_activations(rows, experts.activation_format, block or -1, scale)


def _unpack(matrix: QuantizedTensor | PreparedMatrix, e: int) -> torch.Tensor:
    """The weights of one expert, [O, D]."""
    if isinstance(matrix, PreparedMatrix):
        return unpack_prepared(matrix, e)
    parts: dict[str, Any] = {
        field.name: value[e : e + 1]
        for field in fields(matrix)
        if isinstance(value := getattr(matrix, field.name), torch.Tensor)
    }
    one = replace(matrix, **parts, shape=(1, *matrix.shape[1:]))
    return (_unpack_integers if one.format in INTEGER_BITS else _reference_dequantize)(one)[0]


def _unpack_integers(packed: QuantizedTensor) -> torch.Tensor:
    """As the reference's, whose checks of zero points and groups wait for a GPU each time."""
    _, O, D = packed.shape
    bits = INTEGER_BITS[packed.format]
    codes = unpack_words(packed.packed, bits)[:, :O, :D].to(torch.int32)
    groups = column_groups(packed)[:, None].expand(-1, O, D)
    scales = packed.scales[:, :O].to(torch.promote_types(packed.scales.dtype, torch.float32))
    zeros = 2 ** (bits - 1)
    if packed.zeros is not None:
        zeros = packed.zeros[:, :O].to(torch.int32).gather(2, groups)
    return (codes - zeros).to(scales.dtype) * scales.gather(2, groups)
