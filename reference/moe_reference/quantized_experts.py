r"""Quantised experts: unpack the weights, then compute as always.

With $\hat U_e, \hat D_e$ what the packed matrices stand for and $r$ the rounding of 8-bit
activations (none: $r(x) = x$), an expert is

$$ f_e(x) = \hat D_e \, r\big(a(\hat U_e \, r(x) + b_e)\big) + c_e $$

Everything else is as in `experts`: ids, maps, weights on the output or the input, sums in float32.
A weight on the input multiplies x before it is rounded. Nothing is rounded but what $r$ rounds: a
fast version that rounds the weights to bfloat16 on the way has an error that is its own.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token, S rows,
C rows of a batched expert (capacity).
"""

import torch

from moe_reference.activation_quantization import round_activations
from moe_reference.activations import OneExpert, activate, one_by_one, product
from moe_reference.alignment import local_ids
from moe_reference.checks import IDS, check_counts, check_routing, check_tensor, check_weights
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import accumulation_dtype
from moe_reference.experts import sum_of_nothing
from moe_reference.quantization import dequantize
from moe_reference.quantized_experts_checks import check_quantized_experts
from moe_reference.quantized_tensors import QuantizedExperts


def experts_quantized(
    x: torch.Tensor,
    experts: QuantizedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum over a token's experts, whose weights are packed.

    Args:
        x: [T, H], any float dtype and strides.
        experts: packed weights of E experts.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64. Two equal ids in a row are both counted.
        config: how an expert computes.
        expert_map: int32 or int64, one entry per global expert: its row in `experts`, or -1. Ids
            are global with it.

    Returns:
        [T, H], x's dtype; differentiable in x, weights, biases and scales. Gradients are zero, not
        None, where nothing was routed and of activations that are rounded.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, parts of a packed matrix do not fit each
            other, or `is_k_full` is not true of them.

    Source: vLLM's fused Marlin experts; hanzo-engine's quantised backends.

    >>> from moe_reference.quantization import quantize
    >>> matrix = quantize(torch.eye(8)[None], "uint8b128", group_size=8)
    >>> one, config = QuantizedExperts(matrix, matrix), ExpertsConfig("relu", gated=False)
    >>> x, ids = torch.arange(8.0)[None], torch.tensor([[0]])
    >>> experts_quantized(x, one, torch.tensor([[2.0]]), ids, config).round().tolist()
    [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]]
    """
    check_routing(x, weights, expert_ids)
    unpacked = dequantize_experts(experts, config.gated, x.shape[1])
    wide = accumulation_dtype(x)
    x_TH, weights_TK = x.to(wide), weights.to(wide)
    rows_TK = local_ids(expert_ids, len(unpacked.down), expert_map)

    pairs_TKH = x_TH.new_zeros(*rows_TK.shape, x.shape[1]) + sum_of_nothing(x, weights, unpacked)
    for e, one in enumerate(one_by_one(unpacked)):
        tokens_S, ks_S = (rows_TK == e).nonzero(as_tuple=True)
        if len(tokens_S) == 0:
            continue
        weights_S1 = weights_TK[tokens_S, ks_S, None]
        if config.weight_on == "input":
            rows_SH = x_TH[tokens_S] * weights_S1
            pairs_TKH[tokens_S, ks_S] = _feed_forward(rows_SH, one, experts, e, config)
        else:
            out_SH = _feed_forward(x_TH[tokens_S], one, experts, e, config)
            pairs_TKH[tokens_S, ks_S] = out_SH * weights_S1
    return pairs_TKH.sum(dim=1).to(x.dtype)


def experts_batched_quantized(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: QuantizedExperts,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Each expert on its own rows of a batch, unweighted, with packed weights.

    Args:
        x: [E, C, H], any float dtype and strides. Rows past the count may hold anything.
        tokens_per_expert: [E], int32 or int64, from 0 to C each: rows in use.
        experts: packed weights of E experts.
        config: how an expert computes; `weight_on` has no effect.

    Returns:
        [E, C, H], x's dtype; rows past the count are zero.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: as `experts_quantized`, or a count is outside [0, C].

    Source: vLLM's batched Marlin experts.

    >>> from moe_reference.quantization import quantize
    >>> matrix = quantize(torch.eye(8)[None], "uint8b128", group_size=8)
    >>> one, config = QuantizedExperts(matrix, matrix), ExpertsConfig("relu", gated=False)
    >>> x = torch.ones(1, 2, 8)
    >>> experts_batched_quantized(x, torch.tensor([1]), one, config).sum(2).round().tolist()
    [[8.0, 0.0]]
    """
    check_tensor("x", x, ("E", "C", "H"))
    check_tensor("tokens_per_expert", tokens_per_expert, (len(x),), IDS)
    check_counts(tokens_per_expert, x.shape[1])
    unpacked = dequantize_experts(experts, config.gated, x.shape[2])
    check_tensor("x", x, (len(unpacked.down), "C", "H"))
    x_ECH = x.to(accumulation_dtype(x))
    out_ECH = torch.zeros_like(x_ECH) + sum_of_nothing(x, unpacked)
    for e, (one, count) in enumerate(
        zip(one_by_one(unpacked), tokens_per_expert.tolist(), strict=True)
    ):
        out_ECH[e, :count] = _feed_forward(x_ECH[e, :count], one, experts, e, config)
    return out_ECH.to(x.dtype)


def dequantize_experts(
    experts: QuantizedExperts, gated: bool = True, hidden_size: int | None = None
) -> ExpertWeights:
    """The weights that packed experts stand for.

    Args:
        experts: packed weights of E experts.
        gated: whether gate_up is [E, 2I, H] and not [E, I, H].
        hidden_size: H; None takes any.

    Returns:
        New weights, float32 (float64 where scales are), biases as they are.

    Raises:
        TypeError: not `QuantizedExperts`, or a part has the wrong dtype.
        ValueError: parts that do not fit each other, or `is_k_full` is not true of them.

    >>> from moe_reference.quantization import quantize
    >>> matrix = quantize(torch.ones(1, 8, 8), "uint4b8", group_size=8)
    >>> dequantize_experts(QuantizedExperts(matrix, matrix), gated=False).down.shape
    torch.Size([1, 8, 8])
    """
    check_quantized_experts(experts)
    unpacked = ExpertWeights(
        dequantize(experts.gate_up),
        dequantize(experts.down),
        experts.gate_up_bias,
        experts.down_bias,
    )
    H = "H" if hidden_size is None else hidden_size
    check_weights(unpacked, gated, hidden_size=H, prefix="experts.")
    return unpacked


def _feed_forward(
    x_SH: torch.Tensor, one: OneExpert, experts: QuantizedExperts, e: int, config: ExpertsConfig
) -> torch.Tensor:
    """A single expert on its rows, which are rounded before each product."""
    rows_SH = _rounded(x_SH, experts, experts.gate_up.group_size, e, 0)
    hidden_SI = activate(product(rows_SH, one.gate_up, one.gate_up_bias), config)
    rows_SI = _rounded(hidden_SI, experts, experts.down.group_size, e, 1)
    return product(rows_SI, one.down, one.down_bias)


def _rounded(
    rows: torch.Tensor, experts: QuantizedExperts, block_size: int, e: int, step: int
) -> torch.Tensor:
    if experts.activation_format is None:
        return rows
    static = experts.activation_scales
    scale = None if static is None else static[e, step]
    return round_activations(rows, experts.activation_format, block_size, scale)
