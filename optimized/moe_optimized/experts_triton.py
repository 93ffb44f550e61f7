"""The forward of the experts in Triton kernels.

Stages, and what each gains:

1. `experts_up_kernel` gathers its rows of x itself and applies the activation before it stores,
   with one accumulator for gate and one for up, so that the gathered rows never reach memory, and
   [T·K, 2I] only where a backward will ask for it.
2. `experts_down_kernel` writes packed rows: scattering from the product would cost it atomics, and
   the sum its fixed order.
3. `combine_rows_kernel` gathers each token's packed rows and adds them up in float32.

The tiles come from a table made on the device, and no step waits for the host.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.alignment import TileTable, tile_table
from moe_optimized.dispatch import sum_places
from moe_optimized.interpreter import (
    INTERPRETED,
    dot,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)


@dataclass(frozen=True)
class TileShape:
    """One program's tile of a product, and how it is compiled.

    Attributes:
        m: rows.
        n: columns; of gate and up each in the first product.
        k: depth of one step.
        num_warps: warps of a program.
        num_stages: steps in flight.
        group_m: row tiles that are run side by side for the sake of the L2 cache.
    """

    m: int
    n: int
    k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 1


class Shapes(NamedTuple):
    """The tiles of every product; all but the last are cut from one table, so of one height.

    Attributes:
        up: [rows, I] of the first product, gate and up each.
        down: [rows, H] of the second product.
        d_hidden: [rows, I] of the gradient by the hidden rows.
        d_rows: [rows, H] of the gradient by the rows of x.
        d_matrices: [J, H] and [H, I] of the gradients by the experts; k counts rows.
    """

    up: TileShape
    down: TileShape
    d_hidden: TileShape
    d_rows: TileShape
    d_matrices: TileShape


# By the most rows per expert, in two-byte dtypes. Those of the forward follow what vLLM's tuned
# tables have in common on Hopper; the first product has two accumulators and so half the columns.
# The gradient by the hidden rows has one, but its epilogue holds gate and up as well.
_HALF = (
    (
        16,
        Shapes(
            up=TileShape(16, 64, 128, 4, 4),
            down=TileShape(16, 64, 128, 4, 4),
            d_hidden=TileShape(16, 64, 128, 4, 4),
            d_rows=TileShape(16, 64, 128, 4, 4),
            d_matrices=TileShape(128, 128, 16, 8, 4),
        ),
    ),
    (
        32,
        Shapes(
            up=TileShape(32, 64, 128, 4, 3),
            down=TileShape(32, 128, 64, 4, 4),
            d_hidden=TileShape(32, 64, 128, 4, 3),
            d_rows=TileShape(32, 128, 64, 4, 4),
            d_matrices=TileShape(128, 128, 32, 8, 4),
        ),
    ),
    (
        128,
        Shapes(
            up=TileShape(64, 64, 64, 4, 4),
            down=TileShape(64, 128, 64, 4, 4, 8),
            d_hidden=TileShape(64, 64, 64, 4, 4, 8),
            d_rows=TileShape(64, 128, 64, 4, 4, 8),
            d_matrices=TileShape(128, 128, 64, 8, 3, 8),
        ),
    ),
    (
        None,
        Shapes(
            up=TileShape(128, 128, 64, 8, 3, 8),
            down=TileShape(128, 256, 64, 8, 3, 8),
            d_hidden=TileShape(128, 128, 64, 8, 4, 8),
            d_rows=TileShape(128, 256, 64, 8, 3, 8),
            d_matrices=TileShape(128, 256, 64, 8, 3, 8),
        ),
    ),
)
# Float32 is multiplied without tensor cores, in smaller tiles.
_SINGLE = (
    (
        32,
        Shapes(
            up=TileShape(16, 32, 64),
            down=TileShape(16, 64, 64),
            d_hidden=TileShape(16, 64, 64),
            d_rows=TileShape(16, 64, 64),
            d_matrices=TileShape(64, 64, 16),
        ),
    ),
    (
        None,
        Shapes(
            up=TileShape(64, 32, 32, 4, 3, 8),
            down=TileShape(64, 64, 32, 4, 3, 8),
            d_hidden=TileShape(64, 64, 32, 4, 3, 8),
            d_rows=TileShape(64, 64, 32, 4, 3, 8),
            d_matrices=TileShape(64, 64, 32, 4, 3, 8),
        ),
    ),
)


def tile_shapes(rows: int, num_experts: int, width: int, depth: int, dtype: torch.dtype) -> Shapes:
    """The tiles of every product, from tables: nothing is tried out.

    Args:
        rows: T·K.
        num_experts: E.
        width: I.
        depth: H.
        dtype: what is multiplied.
    """
    share = rows / max(num_experts, 1)
    if INTERPRETED:
        # A step costs milliseconds whatever its size, so there should be few.
        m = min(power_of_two(int(share) + 1, least=16), 128)
        i, h = (min(power_of_two(size, least=16), 256) for size in (width, depth))
        side = min(power_of_two(max(2 * width, depth), least=16), 256)
        to_i, to_h = TileShape(m, i, h), TileShape(m, h, i)
        return Shapes(to_i, to_h, to_i, to_h, TileShape(side, side, m))
    table = _SINGLE if dtype is torch.float32 else _HALF
    return next(shapes for most, shapes in table if most is None or share <= most)


def compile_options(shape: TileShape, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    """The `constexpr` arguments that the products over a tile of rows have in common.

    Args:
        shape: one program's tile.
        depth: length of the sum.
        dtype: what is multiplied.
    """
    return {
        "EVEN_K": depth % shape.k == 0,
        "WIDEN": needs_widening(dtype),
        "GROUP_M": shape.group_m,
        "BLOCK_M": shape.m,
        "BLOCK_N": shape.n,
        "BLOCK_K": shape.k,
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }


def one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operands of a product as they are, or all in float32 where their dtypes differ."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    return tuple(tensor.float() for tensor in tensors)


def run_forward(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    shapes: Shapes | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, TileTable]:
    """Launch the kernels.

    Args:
        x: [T, H].
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        shapes: the tiles of the products; None looks them up.
        dtype: of the result.
        keep: store the pre-activation for a backward.

    Returns:
        out: [T, H].
        pre: [T·K, J], x's dtype, packed like the table's order, or None.
        tiles: which rows each tile works on.
    """
    T, K = expert_ids.shape
    E, H, I = experts.down.shape
    pre = x.new_empty(T * K, experts.gate_up.shape[1]) if keep else None
    x, gate_up, down = one_dtype(x, experts.gate_up, experts.down)
    shapes = shapes or tile_shapes(T * K, E, I, H, x.dtype)
    tiles = tile_table(expert_ids, shapes.up.m, E, expert_map)
    table = (tiles.order, tiles.experts, tiles.first, tiles.rows)
    weights = weights.contiguous()
    hidden = x.new_empty(T * K, I)
    packed = x.new_empty(T * K, H)
    num_tiles = tiles.experts.numel()
    bias = experts.gate_up_bias
    launch(
        experts_up_kernel,
        (num_tiles * -(-I // shapes.up.n),),
        x,
        gate_up,
        x if bias is None else bias,
        weights,
        hidden,
        hidden if pre is None else pre,
        *table,
        num_tiles,
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
        WEIGH=config.weight_on == "input",
        KEEP=keep,
        ROUND_KEPT=pre is not None and needs_widening(pre.dtype),
        **compile_options(shapes.up, H, x.dtype),
    )
    bias = experts.down_bias
    launch(
        experts_down_kernel,
        (num_tiles * -(-H // shapes.down.n),),
        hidden,
        down,
        x if bias is None else bias,
        packed,
        *table[1:],
        num_tiles,
        H,
        I,
        *down.stride(),
        *((0, 0) if bias is None else bias.stride()),
        HAS_BIAS=bias is not None,
        **compile_options(shapes.down, I, x.dtype),
    )
    factors = weights if config.weight_on == "output" else None
    return sum_places(packed, tiles.place, factors, T, K, dtype), pre, tiles


@jit
def tile_of_program(program, num_tiles, width, GROUP_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row tile and column tile: GROUP_M row tiles share each column tile while it is cached."""
    num_columns = tl.cdiv(width, BLOCK_N)
    first = program // (GROUP_M * num_columns) * GROUP_M
    within = program % (GROUP_M * num_columns)
    tall = num_tiles - first
    tall = tl.where(tall < GROUP_M, tall, GROUP_M)
    return first + within % tall, within // tall


@jit
def sigmoid_block(x):
    """The logistic function; 0 for large negative numbers."""
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def activate_block(x, ACTIVATION: tl.constexpr):
    """An elementwise activation of float32 `x` by its name; a NaN stays one."""
    if ACTIVATION == "silu":
        return x * sigmoid_block(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) is the logistic function of 2 z.
        return x * sigmoid_block(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.where(x < 0, 0.0, x)
        if ACTIVATION == "relu2":
            return positive * positive
        else:
            return positive


@jit
def activate_pair(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """A gated activation of float32 blocks."""
    if ACTIVATION == "swigluoai" or ACTIVATION == "swiglu_limit":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        if ACTIVATION == "swigluoai":
            return gate * sigmoid_block(alpha * gate) * (up + 1.0)
        else:
            return gate * sigmoid_block(gate) * up
    else:
        return activate_block(gate, ACTIVATION) * up


@jit
def experts_up_kernel(
    x_ptr,
    gate_up_ptr,
    bias_ptr,
    weights_ptr,
    hidden_ptr,
    pre_ptr,
    order_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
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
    WEIGH: tl.constexpr,
    KEEP: tl.constexpr,
    ROUND_KEPT: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden rows of one tile: gather x, multiply by gate and up, activate, store packed.

    KEEP stores what is activated as well, gate before up.
    """
    tile, column = tile_of_program(tl.program_id(0), num_tiles, width, GROUP_M, BLOCK_N)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_first_ptr + tile).to(tl.int64)
    num_rows = tl.load(tile_rows_ptr + tile)
    m = tl.arange(0, BLOCK_M)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows = m < num_rows
    in_columns = n < width
    slots = tl.load(order_ptr + first + m, mask=in_rows, other=0).to(tl.int64)

    x_block = x_ptr + (slots // top_k)[:, None] * stride_xt + k[None, :] * stride_xh
    gate_block = gate_up_ptr + expert * stride_ge
    gate_block += n[None, :] * stride_gj + k[:, None] * stride_gh
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_block = gate_up_ptr + expert * stride_ge
        up_block += (n + width)[None, :] * stride_gj + k[:, None] * stride_gh
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        x_mask = in_rows[:, None]
        w_mask = in_columns[None, :]
        if not EVEN_K:
            x_mask = x_mask & (start + k < depth)[None, :]
            w_mask = w_mask & (start + k < depth)[:, None]
        x = tl.load(x_block, mask=x_mask, other=0.0)
        gate = dot(x, tl.load(gate_block, mask=w_mask, other=0.0), gate, WIDEN)
        if GATED:
            up = dot(x, tl.load(up_block, mask=w_mask, other=0.0), up, WIDEN)
            up_block += BLOCK_K * stride_gh
        x_block += BLOCK_K * stride_xh
        gate_block += BLOCK_K * stride_gh

    if WEIGH:
        # Weighing the product is weighing its input, without rounding that.
        weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        gate = gate * weights
        if GATED:
            up = up * weights
    if HAS_BIAS:
        bias_block = bias_ptr + expert * stride_be + n * stride_bj
        gate += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            bias_block = bias_ptr + expert * stride_be + (n + width) * stride_bj
            up += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if KEEP:
        kept_type: tl.constexpr = pre_ptr.dtype.element_ty
        if GATED:
            kept = pre_ptr + (first + m)[:, None] * (2 * width) + n[None, :]
            tl.store(kept + width, narrow(up, kept_type, ROUND_KEPT), mask=mask)
        else:
            kept = pre_ptr + (first + m)[:, None] * width + n[None, :]
        tl.store(kept, narrow(gate, kept_type, ROUND_KEPT), mask=mask)
    if GATED:
        hidden = activate_pair(gate, up, alpha, limit, ACTIVATION)
    else:
        hidden = activate_block(gate, ACTIVATION)
    hidden = narrow(hidden, hidden_ptr.dtype.element_ty, WIDEN)
    out = hidden_ptr + (first + m)[:, None] * width + n[None, :]
    tl.store(out, hidden, mask=mask)


@jit
def experts_down_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    packed_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
    width,
    depth,
    stride_de,
    stride_dh,
    stride_di,
    stride_be,
    stride_bh,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output rows of one tile, packed like the hidden ones."""
    tile, column = tile_of_program(tl.program_id(0), num_tiles, width, GROUP_M, BLOCK_N)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_first_ptr + tile).to(tl.int64)
    num_rows = tl.load(tile_rows_ptr + tile)
    m = tl.arange(0, BLOCK_M)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows = m < num_rows
    in_columns = n < width

    hidden_block = hidden_ptr + (first + m)[:, None] * depth + k[None, :]
    down_block = down_ptr + expert * stride_de
    down_block += n[None, :] * stride_dh + k[:, None] * stride_di
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        h_mask = in_rows[:, None]
        w_mask = in_columns[None, :]
        if not EVEN_K:
            h_mask = h_mask & (start + k < depth)[None, :]
            w_mask = w_mask & (start + k < depth)[:, None]
        hidden = tl.load(hidden_block, mask=h_mask, other=0.0)
        total = dot(hidden, tl.load(down_block, mask=w_mask, other=0.0), total, WIDEN)
        hidden_block += BLOCK_K
        down_block += BLOCK_K * stride_di

    if HAS_BIAS:
        bias_block = bias_ptr + expert * stride_be + n * stride_bh
        total += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out = packed_ptr + (first + m)[:, None] * width + n[None, :]
    total = narrow(total, packed_ptr.dtype.element_ty, WIDEN)
    tl.store(out, total, mask=in_rows[:, None] & in_columns[None, :])
