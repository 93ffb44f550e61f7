"""Packed experts: their weights are unpacked inside the products, or one expert at a time.

Each way to compute them, and what it gains:

1. `quantized_kernels`: Triton kernels on a layout of their own, which `prepare` makes once when
   weights are loaded. Nothing unpacked is ever stored.
2. In torch, the experts that have tokens one after the other: one expert's weights are unpacked at
   a time, and no others. For what no kernel takes: devices without Triton, float64, gradients,
   Q4_K, and 8-bit activations other than float8 on float8 weights.

Nowhere are the weights of all experts unpacked together: there is no tensor [E, out, in] of them.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert, S rows of one expert.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate, product
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig
from moe_reference.quantization import dequantize as _reference_dequantize
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_experts_checks import check_quantized_experts
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_optimized.alignment import check_map, check_tokens, local_ids
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


def dequantize(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that a packed tensor stands for.

    Args:
        packed: of any format.

    Returns:
        [E, O, D], float32, or float64 where the scales are float64.

    Raises:
        TypeError, ValueError: parts of the wrong dtype or shape, or an unknown format.
    """
    check_quantized("packed", packed)
    on_kernels = has_kernels(torch.empty(0, device=packed.packed.device))
    run = dequantize_triton if on_kernels and not refusal_of_tensor(packed) else dequantize_torch
    return run(packed)


def dequantize_torch(packed: QuantizedTensor) -> torch.Tensor:
    """As `dequantize`, in operations of torch: those of the reference."""
    return _reference_dequantize(packed)


def dequantize_triton(packed: QuantizedTensor) -> torch.Tensor:
    """As `dequantize`, in one Triton kernel; not for Q4_K, nor for scales of float64."""
    check_quantized("packed", packed)
    reason = refusal_of_tensor(packed)
    if reason:
        raise ValueError(reason)
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
        of torch.

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


def experts_quantized_torch(
    x: torch.Tensor,
    experts: QuantizedExperts | PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts_quantized`, in operations of torch, one expert unpacked at a time."""
    check_experts_quantized(x, experts, weights, expert_ids, config, expert_map)
    wide = accumulation_dtype(x)
    x_wide, weights_wide = x.to(wide), weights.to(wide)
    local = local_ids(expert_ids, experts.down.shape[0], expert_map)
    # Empty sums keep x and weights in the graph where no expert has a token.
    pairs = x_wide.new_zeros(*local.shape, x.shape[1]) + x_wide[:0].sum() + weights_wide[:0].sum()
    for e in local[local >= 0].unique().tolist():
        tokens, ks = (local == e).nonzero(as_tuple=True)
        factors = weights_wide[tokens, ks, None]
        if config.weight_on == "input":
            pairs[tokens, ks] = _one_expert(x_wide[tokens] * factors, experts, e, config)
        else:
            pairs[tokens, ks] = _one_expert(x_wide[tokens], experts, e, config) * factors
    return pairs.sum(dim=1).to(x.dtype)


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
            only.
    """
    check_tensor("x", x, ("E", "C", "H"), FLOATS)
    check_tensor("tokens_per_expert", tokens_per_expert, (x.shape[0],), IDS)
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
    leaves = (x, weights, experts.gate_up_bias, experts.down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return "x: expected no gradient, since the kernels have no backward, got one to be taken"
    for name in ("gate_up", "down"):
        matrix = getattr(experts, name)
        if isinstance(matrix, QuantizedTensor) and matrix.format not in CODES:
            return (
                f"experts.{name}.format: expected one of {', '.join(map(repr, CODES))}, got "
                f"{matrix.format!r}"
            )
    return _refusal_of_activations(experts, config)


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
    if expert_map is not None:
        check_tensor("expert_map", expert_map, ("E",), IDS)
        check_map(expert_map, E)


def _one_expert(
    rows: torch.Tensor, experts: QuantizedExperts | PreparedExperts, e: int, config: ExpertsConfig
) -> torch.Tensor:
    """One expert on its rows, which are rounded before each product: [S, H]."""
    biases = (experts.gate_up_bias, experts.down_bias)
    for step, (name, bias) in enumerate(zip(("gate_up", "down"), biases, strict=True)):
        matrix = getattr(experts, name)
        if experts.activation_format is not None:
            static = experts.activation_scales
            scale = None if static is None else static[e, step]
            block = matrix.block if isinstance(matrix, PreparedMatrix) else matrix.group_size
            rows = round_activations(rows, experts.activation_format, block or -1, scale)
        unpacked = _unpack(matrix, e)
        rows = product(rows, unpacked, None if bias is None else bias[e])
        if step == 0:
            rows = activate(rows, config)
    return rows


def _unpack(matrix: QuantizedTensor | PreparedMatrix, e: int) -> torch.Tensor:
    """The weights of one expert, [O, D]."""
    if isinstance(matrix, PreparedMatrix):
        return unpack_prepared(matrix, e)
    parts: dict[str, Any] = {
        field.name: value[e : e + 1]
        for field in fields(matrix)
        if isinstance(value := getattr(matrix, field.name), torch.Tensor)
    }
    return _reference_dequantize(replace(matrix, **parts, shape=(1, *matrix.shape[1:])))[0]
