"""The forward of the experts for a few tokens, in two Triton kernels.

With far fewer slots than experts hardly two slots ask for the same one. Then sorting saves no
reading, tiles of 16 rows are nearly empty, and a call takes as long as its launches and one reading
of the chosen experts. Stages, and what each gains:

1. `decode_up_kernel`: a program for each slot and stretch of I reads the expert's id itself, so
   that there is no table to wait for; the activation follows, as in `experts_triton`.
2. `decode_down_kernel`: a program for each token and stretch of H reads up to eight of the token's
   experts side by side and adds them up in registers: no packed rows, no combine.

The products are multiplied and added in float32 without tensor cores, which have nothing to gain
from one row; between the kernels stand float32 numbers, and only the result is rounded.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token.
"""

from typing import Any

import torch
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.experts_triton import activate_block, activate_pair, run_forward
from moe_optimized.interpreter import (
    INTERPRETED,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)


def is_few(T: int, K: int, E: int) -> bool:
    """Whether so few slots are sent to E experts that sorting them is not worth a launch.

    One token asks no expert twice. Of E / 4 slots, sent anywhere, about an eighth ask for an expert
    that an earlier one asked for: so much is read again, from the cache.

    >>> is_few(1, 8, 8), is_few(4, 8, 128), is_few(5, 8, 128)
    (True, True, False)
    """
    return T == 1 or 4 * T * K <= E


def run_without_backward(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The kernels that suit the number of tokens; arguments and result as in `run_decode`."""
    given = (x, experts, weights, expert_ids, config, expert_map)
    if is_few(*expert_ids.shape, experts.down.shape[0]):
        return run_decode(*given, dtype)
    return run_forward(*given, None, dtype, False)[0]


def run_decode(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the kernels.

    Args:
        x: [T, H].
        experts: weights of E experts, in any dtypes.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        dtype: of the result.

    Returns:
        [T, H], `dtype`; nothing is kept for a backward.
    """
    T, K = expert_ids.shape
    E, H, I = experts.down.shape
    num_ids = E if expert_map is None else expert_map.numel()
    ids = expert_ids.contiguous()
    local = ids if expert_map is None else expert_map.contiguous()
    weights = weights.contiguous()
    hidden = x.new_empty((T * K, I), dtype=torch.float32)
    out = x.new_empty((T, H), dtype=dtype)
    gate_up, bias = experts.gate_up, experts.gate_up_bias
    blocks = _up_blocks(I, H)
    launch(
        decode_up_kernel,
        (T * K * -(-I // blocks["BLOCK_N"]),),
        x,
        gate_up,
        x if bias is None else bias,
        weights,
        ids,
        local,
        hidden,
        num_ids,
        max(K, 1),
        I,
        H,
        *x.stride(),
        *gate_up.stride(),
        *((0, 0) if bias is None else bias.stride()),
        float(config.alpha),
        float(config.limit),
        ACTIVATION=config.activation,
        GATED=config.gated,
        HAS_BIAS=bias is not None,
        HAS_MAP=expert_map is not None,
        WEIGH=config.weight_on == "input",
        **blocks,
    )
    down, bias = experts.down, experts.down_bias
    blocks = _down_blocks(K, H, I)
    launch(
        decode_down_kernel,
        (T * -(-H // blocks["BLOCK_N"]),),
        hidden,
        down,
        x if bias is None else bias,
        weights,
        ids,
        local,
        out,
        num_ids,
        K,
        H,
        I,
        *down.stride(),
        *((0, 0) if bias is None else bias.stride()),
        HAS_BIAS=bias is not None,
        HAS_MAP=expert_map is not None,
        WEIGH=config.weight_on == "output",
        ROUND_BITS=needs_widening(dtype),
        **blocks,
    )
    return out


def _up_blocks(width: int, depth: int) -> dict[str, Any]:
    if INTERPRETED:
        n, k = min(power_of_two(width), 256), min(power_of_two(depth), 1024)
    else:
        n, k = 16, 256
    return {"BLOCK_N": n, "BLOCK_K": k, "EVEN_K": depth % k == 0, "STAGES": 3, "num_warps": 4}


def _down_blocks(K: int, width: int, depth: int) -> dict[str, Any]:
    # Eight rows of each of eight experts at a time, at most. A program reads the hidden rows, of
    # four bytes, once for all of these; with more of them there would be too few programs.
    c = min(power_of_two(K), 8)
    if INTERPRETED:
        n, k = min(power_of_two(width), 256), min(power_of_two(depth), 256)
    else:
        n, k = 8, min(1024 // c, 512)
    sizes = {"BLOCK_C": c, "BLOCK_N": n, "BLOCK_K": k}
    return {**sizes, "EVEN_K": depth % k == 0, "STAGES": 3, "num_warps": 8}


@jit
def local_experts(slots, mask, ids_ptr, map_ptr, num_ids, HAS_MAP: tl.constexpr):
    """The rows of the weights that slots ask for, -1 for one that is not here."""
    asked = tl.load(ids_ptr + slots, mask=mask, other=-1).to(tl.int64)
    here = (asked >= 0) & (asked < num_ids)
    if HAS_MAP:
        rows = tl.load(map_ptr + asked, mask=here, other=-1).to(tl.int64)
    else:
        rows = tl.where(here, asked, -1)
    return rows


@jit
def decode_up_kernel(
    x_ptr,
    gate_up_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    hidden_ptr,
    num_ids,
    top_k,
    width,
    depth,
    stride_xt,
    stride_xh,
    stride_ge,
    stride_gj,
    stride_gh,
    stride_be,
    stride_bj,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    WEIGH: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A stretch of one slot's hidden row; nothing for a slot whose expert is not here."""
    columns = tl.cdiv(width, BLOCK_N)
    slot = (tl.program_id(0) // columns).to(tl.int64)
    expert = local_experts(slot, slot >= 0, ids_ptr, map_ptr, num_ids, HAS_MAP)
    if expert < 0:
        return
    n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_columns = n < width

    x_row = x_ptr + slot // top_k * stride_xt
    gate_rows = gate_up_ptr + expert * stride_ge + n[:, None] * stride_gj
    gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up_rows = gate_up_ptr + expert * stride_ge + (n + width)[:, None] * stride_gj
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        at = start + k
        x_mask = at < depth
        w_mask = in_columns[:, None]
        if not EVEN_K:
            w_mask = w_mask & x_mask[None, :]
        x = tl.load(x_row + at * stride_xh, mask=x_mask, other=0.0).to(tl.float32)[None, :]
        step = at[None, :] * stride_gh
        gates += x * tl.load(gate_rows + step, mask=w_mask, other=0.0).to(tl.float32)
        if GATED:
            ups += x * tl.load(up_rows + step, mask=w_mask, other=0.0).to(tl.float32)

    gate = tl.sum(gates, 1)
    if GATED:
        up = tl.sum(ups, 1)
    if WEIGH:
        # Weighing the product is weighing its input, without rounding that.
        weight = tl.load(weights_ptr + slot).to(tl.float32)
        gate = gate * weight
        if GATED:
            up = up * weight
    if HAS_BIAS:
        biases = bias_ptr + expert * stride_be + n * stride_bj
        gate += tl.load(biases, mask=in_columns, other=0.0).to(tl.float32)
        if GATED:
            biases = bias_ptr + expert * stride_be + (n + width) * stride_bj
            up += tl.load(biases, mask=in_columns, other=0.0).to(tl.float32)
    if GATED:
        hidden = activate_pair(gate, up, alpha, limit, ACTIVATION)
    else:
        hidden = activate_block(gate, ACTIVATION)
    tl.store(hidden_ptr + slot * width + n, hidden, mask=in_columns)


@jit
def decode_down_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    num_ids,
    top_k,
    width,
    depth,
    stride_de,
    stride_dh,
    stride_di,
    stride_be,
    stride_bh,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    WEIGH: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A stretch of one token's output: BLOCK_C of its experts at a time, weighed and added up."""
    columns = tl.cdiv(width, BLOCK_N)
    token = (tl.program_id(0) // columns).to(tl.int64)
    n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_columns = n < width

    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, top_k, BLOCK_C):
        choice = first + tl.arange(0, BLOCK_C)
        slots = token * top_k + choice
        experts = local_experts(slots, choice < top_k, ids_ptr, map_ptr, num_ids, HAS_MAP)
        here = experts >= 0
        down_rows = down_ptr + experts[:, None] * stride_de + n[None, :] * stride_dh
        in_rows = here[:, None] & in_columns[None, :]
        products = tl.zeros((BLOCK_C, BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            at = start + k
            h_mask = here[:, None]
            w_mask = in_rows[:, :, None]
            if not EVEN_K:
                h_mask = h_mask & (at < depth)[None, :]
                w_mask = w_mask & (at < depth)[None, None, :]
            hidden = hidden_ptr + slots[:, None] * depth + at[None, :]
            hidden = tl.load(hidden, mask=h_mask, other=0.0)
            rows = down_rows[:, :, None] + at[None, None, :] * stride_di
            rows = tl.load(rows, mask=w_mask, other=0.0).to(tl.float32)
            products += hidden[:, None, :] * rows
        found = tl.sum(products, 2)
        if HAS_BIAS:
            biases = bias_ptr + experts[:, None] * stride_be + n[None, :] * stride_bh
            found += tl.load(biases, mask=in_rows, other=0.0).to(tl.float32)
        if WEIGH:
            weights = tl.load(weights_ptr + slots, mask=here, other=0.0).to(tl.float32)
            found = found * weights[:, None]
        total += tl.sum(found, 0)
    total = narrow(total, out_ptr.dtype.element_ty, ROUND_BITS)
    tl.store(out_ptr + token * width + n, total, mask=in_columns)
