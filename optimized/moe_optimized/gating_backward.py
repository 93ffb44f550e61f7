r"""The gradient of the routing weights in the logits, in one kernel and in closed form.

A choice has no gradient, so groups, bias, ties and hash tables play no part: what counts is which
experts were chosen. With a token's chosen scores s, their norm n, the denominator d, the gradients
g of its weights and the factor c on them,

    v_k = c * s_k / d * (g_k - sum_j g_j s_j / d * dd / ds_k)

is s_k times the gradient of s_k. It needs no division by a score that underflowed, and times the
slope of the score (see `scores`) it is the gradient of the chosen logit. Softmax also takes s_i
times the sum of v from every logit i that it was computed over.

Dimension key: T tokens, E experts, K experts per token.
"""

import torch
from moe_reference.config import RoutingConfig

from moe_optimized.interpreter import (
    INTERPRETED,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)
from moe_optimized.scores import score_block, slope_block


def route_gradient(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    grad: torch.Tensor,
    config: RoutingConfig,
    renormalizes: bool,
    factor: float,
) -> torch.Tensor:
    """The gradient in the logits of weights whose own gradient is `grad`.

    Args:
        logits: [T, E], float32, bfloat16 or float16; any strides.
        expert_ids: [T, K], int32 or int64, contiguous: the experts that were chosen.
        grad: [T, K], float32; any strides.
        config: how the weights were made.
        renormalizes: whether they were divided by their norm.
        factor: what they were multiplied with at last.

    Returns:
        [T, E], the logits' dtype.
    """
    T, E = logits.shape
    K = expert_ids.shape[1]
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block_e = power_of_two(E)
    block_t = max(1, min(power_of_two(T), (16384 if INTERPRETED else 512) // block_e))
    launch(
        route_gradient_kernel,
        (-(-T // block_t),),
        logits,
        expert_ids,
        grad,
        out,
        T,
        E,
        logits.stride(0),
        logits.stride(1),
        grad.stride(0),
        grad.stride(1),
        float(config.epsilon),
        factor,
        SCORE=config.score,
        SCORE_FIRST=config.order == "score_then_topk",
        RENORMALIZE=renormalizes,
        SQUARES=config.norm == "l2",
        CLAMP=config.epsilon_mode == "clamp",
        TOP_K=K,
        ROUND_BITS=needs_widening(logits.dtype),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=power_of_two(K),
        num_warps=1 if block_e <= 512 else 4,
    )
    return out


@jit
def norm_block(scores, SQUARES: tl.constexpr):
    """The norm of each row of scores, which are never negative; columns of 0 add nothing."""
    if SQUARES:
        # Scaled by the greatest, so that squares of small scores do not underflow.
        greatest = tl.max(scores, 1)
        usable = (greatest > 0) & (greatest < float("inf"))
        greatest = tl.where(usable, greatest, 1.0)
        scaled = scores / greatest[:, None]
        return greatest * tl.sqrt(tl.sum(scaled * scaled, 1))
    else:
        return tl.sum(scores, 1)


@jit
def route_gradient_kernel(
    logits_ptr,
    ids_ptr,
    grad_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    stride_lt,
    stride_le,
    stride_gt,
    stride_gk,
    epsilon,
    factor,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SQUARES: tl.constexpr,
    CLAMP: tl.constexpr,
    TOP_K: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of BLOCK_T rows; only a softmax over all experts reads more than K logits."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_tokens
    lanes = tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_K)[None, :]
    here = in_rows[:, None] & (lanes < num_experts)[None, :]
    chosen = in_rows[:, None] & (columns < TOP_K)

    ids = tl.load(ids_ptr + rows[:, None] * TOP_K + columns, mask=chosen, other=-1).to(tl.int32)
    at = logits_ptr + rows[:, None] * stride_lt + ids.to(tl.int64) * stride_le
    x = tl.load(at, mask=chosen & (ids >= 0), other=float("-inf")).to(tl.float32)
    grad_at = grad_ptr + rows[:, None] * stride_gt + columns.to(tl.int64) * stride_gk
    grad = tl.load(grad_at, mask=chosen, other=0.0)

    gradient = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if SCORE == "softmax" and SCORE_FIRST:
        offsets = rows[:, None] * stride_lt + lanes.to(tl.int64)[None, :] * stride_le
        values = tl.load(logits_ptr + offsets, mask=here, other=float("-inf")).to(tl.float32)
        top = tl.max(values, 1)[:, None]
        all_scores = tl.exp(values - top)
        total = tl.sum(all_scores, 1)[:, None]
        all_scores = all_scores / total
        scores = tl.exp(x - top) / total
    else:
        scores = score_block(x, SCORE)
    # A row without a token is all -inf.
    scores = tl.where(chosen, scores, 0.0)

    if RENORMALIZE:
        norm = norm_block(scores, SQUARES)
        if CLAMP:
            shares = scores / tl.where(norm < epsilon, epsilon, norm)[:, None]
        else:
            shares = scores / (norm + epsilon)[:, None]
        mean = tl.sum(grad * shares, 1)
        if CLAMP:
            # A denominator that is held up does not follow the scores.
            mean = tl.where(norm < epsilon, 0.0, mean)
        if SQUARES:
            # The slope of a norm of 0 is taken as 0.
            along = scores / tl.where(norm > 0, norm, 1.0)[:, None]
            moved = shares * (grad - mean[:, None] * along)
        else:
            moved = shares * (grad - mean[:, None])
    else:
        moved = scores * grad
    moved = moved * factor

    if SCORE == "softmax":
        if SCORE_FIRST:
            gradient -= all_scores * tl.sum(moved, 1)[:, None]
        else:
            moved = moved - scores * tl.sum(moved, 1)[:, None]
    else:
        moved = moved * slope_block(x, scores, SCORE)
    for k in range(TOP_K):
        # A table may name an expert twice: what its places get is added up.
        expert = tl.sum(tl.where(columns == k, ids, 0), 1)
        value = tl.sum(tl.where(columns == k, moved, 0.0), 1)
        gradient += tl.where(lanes[None, :] == expert[:, None], value[:, None], 0.0)
    out = out_ptr + rows[:, None] * num_experts + lanes[None, :]
    tl.store(out, narrow(gradient, out_ptr.dtype.element_ty, ROUND_BITS), mask=here)
