"""The backward of the experts in Triton kernels, from x and the pre-activation alone.

Stages, and what each gains:

1. `experts_d_hidden_kernel` gathers its rows of the output's gradient itself and multiplies them by
   down. Its epilogue recomputes the activation from the pre-activation, so that no activation is
   ever kept between forward and backward, and derives from the one product the gradient of the
   pre-activation and that of the routing weights: <dy, D a> = <D^T dy, a>, so that the experts'
   outputs are not kept either.
2. `experts_d_weights_kernel` adds the parts of that dot up, one per column tile, in their order.
3. `experts_d_matrices_kernel` sums over an expert's rows, which it finds between two bounds, and
   gathers the rows of one operand itself. It writes every element once, zeros for an empty expert:
   no memset, no atomics.
4. `experts_d_biases_kernel` sums over the same rows.
5. `experts_d_rows_kernel` writes packed rows, and `combine_rows_kernel` adds each token's up. Where
   weights go on the input, their gradient comes from this product's epilogue: dividing the one of
   the pre-activation by the weight would fail at 0.

Everything is added up in float32 and in an order that the ids alone decide: the same bits every
time. Only those gradients are computed that somebody asked for. No step waits for the host.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token.
"""

from typing import NamedTuple

import torch
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.alignment import TileTable
from moe_optimized.dispatch import sum_places
from moe_optimized.experts_triton import (
    Shapes,
    TileShape,
    activate_block,
    compile_options,
    sigmoid_block,
    tile_of_program,
    tile_shapes,
)
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


class Needs(NamedTuple):
    """Which gradients somebody asked for, in the order in which `run_backward` returns them."""

    x: bool
    weights: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool


def run_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    tiles: TileTable,
    config: ExpertsConfig,
    shapes: Shapes | None,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the kernels.

    Args:
        grad: [T, H], the output's gradient; it is multiplied in x's dtype.
        x: [T, H].
        pre: [T·K, J], the pre-activation, packed like the table's order.
        experts: weights of E experts.
        weights: [T, K].
        tiles: which rows each tile works on.
        config: how one expert computes.
        shapes: the tiles of the products, of the forward's height; None looks them up.
        needs: which gradients are wanted.

    Returns:
        The gradients of x, weights, gate_up, down, gate_up_bias and down_bias, each with its
        tensor's shape and dtype, or None.
    """
    (T, K), (E, H, I), (S, J) = weights.shape, experts.down.shape, pre.shape
    same = x.dtype == experts.gate_up.dtype == experts.down.dtype
    dtype = x.dtype if same else torch.float32
    grad, rows = grad.to(dtype), x.to(dtype)
    gate_up, down = experts.gate_up.to(dtype), experts.down.to(dtype)
    factors = weights.contiguous()
    shapes = shapes or tile_shapes(S, E, I, H, dtype)
    table = (tiles.order, tiles.experts, tiles.first, tiles.rows)
    num_tiles, top_k = tiles.experts.numel(), max(K, 1)
    on_input = config.weight_on == "input"
    found: dict[str, torch.Tensor] = {}

    # The routing weights' gradient comes from either product's epilogue, in parts.
    dot_down, dot_up = needs.weights and not on_input, needs.weights and on_input
    needs_pre = needs.x or needs.gate_up or needs.gate_up_bias or dot_up
    num_columns = -(-I // shapes.d_hidden.n)
    d_pre = pre.new_empty((S, J) if needs_pre else 0, dtype=dtype)
    activated = pre.new_empty((S, I) if needs.down else 0, dtype=dtype)
    dots = pre.new_empty((num_columns, S) if dot_down else 0, dtype=torch.float32)
    if needs_pre or needs.down or dot_down:
        launch(
            experts_d_hidden_kernel,
            (num_tiles * num_columns,),
            grad,
            down,
            pre,
            factors,
            d_pre,
            activated,
            dots,
            *table,
            num_tiles,
            S,
            top_k,
            I,
            # The activation alone takes no product.
            H if needs_pre or dot_down else 0,
            *grad.stride(),
            *down.stride(),
            float(config.alpha),
            float(config.limit),
            ACTIVATION=config.activation,
            GATED=config.gated,
            WEIGH=not on_input,
            D_PRE=needs_pre,
            ACTIVATED=needs.down,
            DOTS=dot_down,
            **compile_options(shapes.d_hidden, H, dtype),
        )
    if dot_down:
        found["weights"] = _sum_dots(dots, grad, experts.down_bias, tiles, weights, shapes.up.m)

    if needs.gate_up or needs.down or needs.gate_up_bias or needs.down_bias:
        where = (factors, tiles.order, _bounds(tiles, E), top_k)
        if needs.down:
            found["down"] = _d_matrices(
                grad, activated, experts.down, *where, shapes.d_matrices, True, False
            )
            del activated
        if needs.gate_up:
            found["gate_up"] = _d_matrices(
                d_pre, rows, experts.gate_up, *where, shapes.d_matrices, False, on_input
            )
        if needs.gate_up_bias:
            found["gate_up_bias"] = _d_biases(d_pre, experts.gate_up_bias, *where, False, False)
        if needs.down_bias:
            found["down_bias"] = _d_biases(grad, experts.down_bias, *where, True, not on_input)

    if needs.x or dot_up:
        num_columns = -(-H // shapes.d_rows.n)
        packed = pre.new_empty((S, H) if needs.x else 0, dtype=dtype)
        dots = pre.new_empty((num_columns, S) if dot_up else 0, dtype=torch.float32)
        launch(
            experts_d_rows_kernel,
            (num_tiles * num_columns,),
            d_pre,
            gate_up,
            rows,
            factors,
            packed,
            dots,
            *table,
            num_tiles,
            S,
            top_k,
            H,
            J,
            *gate_up.stride(),
            *rows.stride(),
            WEIGH=on_input,
            ROWS=needs.x,
            DOTS=dot_up,
            **compile_options(shapes.d_rows, J, dtype),
        )
        if needs.x:
            found["x"] = sum_places(packed, tiles.place, None, T, K, x.dtype)
        if dot_up:
            found["weights"] = _sum_dots(dots, grad, None, tiles, weights, shapes.up.m)
    return tuple(found.get(name) for name in Needs._fields)


def _bounds(tiles: TileTable, num_experts: int) -> torch.Tensor:
    """Where each expert's rows start and end in the order, [2, E]; 0 and 0 where it has none."""
    bounds = tiles.experts.new_zeros(2, num_experts)
    num_tiles = tiles.experts.numel()
    launch(
        experts_bounds_kernel,
        (-(-num_tiles // 256),),
        tiles.experts,
        tiles.first,
        tiles.rows,
        bounds,
        num_tiles,
        num_experts,
        BLOCK=256,
    )
    return bounds


def _sum_dots(
    dots: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: TileTable,
    weights: torch.Tensor,
    height: int,
) -> torch.Tensor:
    """The routing weights' gradient, [T, K], from its parts [column tiles, T·K]."""
    # A pair that is not here has no row, and so keeps its 0.
    total = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
    launch(
        experts_d_weights_kernel,
        (tiles.experts.numel(),),
        dots,
        grad,
        grad if bias is None else bias,
        total,
        tiles.order,
        tiles.experts,
        tiles.first,
        tiles.rows,
        *dots.shape,
        max(weights.shape[1], 1),
        grad.shape[1],
        *grad.stride(),
        *((0, 0) if bias is None else bias.stride()),
        HAS_BIAS=bias is not None,
        BLOCK_M=height,
        BLOCK_H=256 if INTERPRETED else 64,
    )
    return total.to(weights.dtype)


def _d_matrices(
    left: torch.Tensor,
    right: torch.Tensor,
    matrices: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    top_k: int,
    shape: TileShape,
    gather_left: bool,
    weigh: bool,
) -> torch.Tensor:
    """Each expert's left rows transposed times its right rows, in the matrices' shape and dtype."""
    E, height, width = matrices.shape
    out = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    launch(
        experts_d_matrices_kernel,
        (E * -(-height // shape.m) * -(-width // shape.n),),
        left,
        right,
        weights,
        out,
        order,
        bounds,
        E,
        top_k,
        height,
        width,
        *left.stride(),
        *right.stride(),
        GATHER_LEFT=gather_left,
        WEIGH=weigh,
        WIDEN=needs_widening(left.dtype),
        ROUND_BITS=needs_widening(out.dtype),
        GROUP_M=shape.group_m,
        BLOCK_M=shape.m,
        BLOCK_N=shape.n,
        BLOCK_K=shape.k,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out


def _d_biases(
    rows: torch.Tensor,
    biases: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    top_k: int,
    gather: bool,
    weigh: bool,
) -> torch.Tensor:
    """The sum of each expert's rows, in the biases' shape and dtype."""
    E, width = biases.shape
    out = torch.empty(biases.shape, dtype=biases.dtype, device=biases.device)
    block_s, block_n = (128, min(power_of_two(width), 1024)) if INTERPRETED else (64, 64)
    launch(
        experts_d_biases_kernel,
        (E, -(-width // block_n)),
        rows,
        weights,
        out,
        order,
        bounds,
        E,
        top_k,
        width,
        *rows.stride(),
        GATHER=gather,
        WEIGH=weigh,
        ROUND_BITS=needs_widening(out.dtype),
        BLOCK_S=block_s,
        BLOCK_N=block_n,
    )
    return out


@jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate_block`; at a kink that of the lower side, as torch has it."""
    if ACTIVATION == "silu":
        s = sigmoid_block(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid_block(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, 2.0 * x)
    else:
        return tl.where(x <= 0, 0.0, 1.0)


@jit
def activate_pair_and_slopes(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """`activate_pair` and its derivatives by gate and by up; 0 beyond a clamp."""
    if ACTIVATION == "swigluoai" or ACTIVATION == "swiglu_limit":
        inside = gate <= limit
        up_inside = (up >= -limit) & (up <= limit)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        slope = 1.0
        if ACTIVATION == "swigluoai":
            slope = alpha
            up += 1.0
        s = sigmoid_block(slope * gate)
        by_gate = tl.where(inside, s * (1.0 + slope * gate * (1.0 - s)) * up, 0.0)
        by_up = gate * s
        return by_up * up, by_gate, tl.where(up_inside, by_up, 0.0)
    else:
        by_up = activate_block(gate, ACTIVATION)
        return by_up * up, activation_slope(gate, ACTIVATION) * up, by_up


@jit
def experts_d_hidden_kernel(
    grad_ptr,
    down_ptr,
    pre_ptr,
    weights_ptr,
    d_pre_ptr,
    activated_ptr,
    dots_ptr,
    order_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
    num_slots,
    top_k,
    width,
    depth,
    stride_gt,
    stride_gh,
    stride_de,
    stride_dh,
    stride_di,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGH: tl.constexpr,
    D_PRE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    DOTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the pre-activation's gradient, with what only its product can tell.

    Stored packed, each where it is asked for: the gradient of the pre-activation (D_PRE), the
    activation times its weight, which the gradient of down needs (ACTIVATED), and the dot of the
    activation with its gradient over this tile's columns (DOTS).
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

    grad_block = grad_ptr + (slots // top_k)[:, None] * stride_gt + k[None, :] * stride_gh
    down_block = down_ptr + expert * stride_de
    down_block += k[:, None] * stride_dh + n[None, :] * stride_di
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        g_mask = in_rows[:, None]
        w_mask = in_columns[None, :]
        if not EVEN_K:
            g_mask = g_mask & (start + k < depth)[None, :]
            w_mask = w_mask & (start + k < depth)[:, None]
        grad = tl.load(grad_block, mask=g_mask, other=0.0)
        total = dot(grad, tl.load(down_block, mask=w_mask, other=0.0), total, WIDEN)
        grad_block += BLOCK_K * stride_gh
        down_block += BLOCK_K * stride_dh

    weights = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    if WEIGH:
        weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)
    # Offsets inside a tile are short: long ones would take registers that the epilogue needs.
    height: tl.constexpr = 2 if GATED else 1
    pre_ptr += first * (height * width)
    d_pre_ptr += first * (height * width)
    activated_ptr += first * width
    # In halves, one after the other: a whole tile with gate and up does not fit the registers.
    halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    dots = store_d_hidden(
        left,
        column * BLOCK_N,
        pre_ptr,
        d_pre_ptr,
        activated_ptr,
        weights,
        num_rows,
        width,
        alpha,
        limit,
        ACTIVATION,
        GATED,
        D_PRE,
        ACTIVATED,
        WIDEN,
        BLOCK_M,
        BLOCK_N // 2,
    )
    dots += store_d_hidden(
        right,
        column * BLOCK_N + BLOCK_N // 2,
        pre_ptr,
        d_pre_ptr,
        activated_ptr,
        weights,
        num_rows,
        width,
        alpha,
        limit,
        ACTIVATION,
        GATED,
        D_PRE,
        ACTIVATED,
        WIDEN,
        BLOCK_M,
        BLOCK_N // 2,
    )
    if DOTS:
        tl.store(dots_ptr + column.to(tl.int64) * num_slots + first + m, dots, mask=in_rows)


@jit
def store_d_hidden(
    total,
    first_column,
    pre_ptr,
    d_pre_ptr,
    activated_ptr,
    weights,
    num_rows,
    width,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    D_PRE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of `experts_d_hidden_kernel` for BLOCK_N columns of `total`.

    Returns:
        The dot of each row's activation with its gradient.
    """
    m = tl.arange(0, BLOCK_M)
    n = first_column + tl.arange(0, BLOCK_N)
    mask = (m < num_rows)[:, None] & (n < width)[None, :]
    flat = m[:, None] * width + n[None, :]
    if GATED:
        places = m[:, None] * (2 * width) + n[None, :]
        up = tl.load(pre_ptr + places + width, mask=mask, other=0.0).to(tl.float32)
    else:
        places = flat
    gate = tl.load(pre_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        activated, by_gate, by_up = activate_pair_and_slopes(gate, up, alpha, limit, ACTIVATION)
    else:
        activated = activate_block(gate, ACTIVATION)
        by_gate = activation_slope(gate, ACTIVATION)
    dots = tl.sum(total * activated, 1)
    total = total * weights[:, None]
    if ACTIVATED:
        activated = narrow(activated * weights[:, None], activated_ptr.dtype.element_ty, WIDEN)
        tl.store(activated_ptr + flat, activated, mask=mask)
    if D_PRE:
        by_gate = narrow(total * by_gate, d_pre_ptr.dtype.element_ty, WIDEN)
        tl.store(d_pre_ptr + places, by_gate, mask=mask)
        if GATED:
            by_up = narrow(total * by_up, d_pre_ptr.dtype.element_ty, WIDEN)
            tl.store(d_pre_ptr + places + width, by_up, mask=mask)
    return dots


@jit
def experts_d_weights_kernel(
    dots_ptr,
    grad_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_columns,
    num_slots,
    top_k,
    depth,
    stride_gt,
    stride_gh,
    stride_be,
    stride_bh,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The routing weights' gradient of one tile's rows: their dots, and the one with the bias."""
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_first_ptr + tile).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    in_rows = m < tl.load(tile_rows_ptr + tile)
    slots = tl.load(order_ptr + first + m, mask=in_rows, other=0).to(tl.int64)
    dots = dots_ptr + first + m
    total = tl.zeros((BLOCK_M,), tl.float32)
    for _column in range(0, num_columns):
        total += tl.load(dots, mask=in_rows, other=0.0)
        dots += num_slots
    if HAS_BIAS:
        h = tl.arange(0, BLOCK_H).to(tl.int64)
        grad_block = grad_ptr + (slots // top_k)[:, None] * stride_gt + h[None, :] * stride_gh
        bias_block = bias_ptr + expert * stride_be + h * stride_bh
        for start in range(0, depth, BLOCK_H):
            inside = start + h < depth
            mask = in_rows[:, None] & inside[None, :]
            grad = tl.load(grad_block, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(bias_block, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(grad * bias[None, :], 1)
            grad_block += BLOCK_H * stride_gh
            bias_block += BLOCK_H * stride_bh
    tl.store(out_ptr + slots, total, mask=in_rows)


@jit
def experts_bounds_kernel(
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    bounds_ptr,
    num_tiles,
    num_experts,
    BLOCK: tl.constexpr,
):
    """From an expert's first and last tile, where its rows start and end."""
    tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.load(tile_experts_ptr + tiles, mask=tiles < num_tiles, other=-1)
    before = tl.load(tile_experts_ptr + tiles - 1, mask=(tiles > 0) & (tiles < num_tiles), other=-1)
    after = tl.load(tile_experts_ptr + tiles + 1, mask=tiles + 1 < num_tiles, other=-1)
    first = tl.load(tile_first_ptr + tiles, mask=experts >= 0, other=0)
    rows = tl.load(tile_rows_ptr + tiles, mask=experts >= 0, other=0)
    tl.store(bounds_ptr + experts, first, mask=(experts >= 0) & (experts != before))
    ends = bounds_ptr + num_experts + experts
    tl.store(ends, first + rows, mask=(experts >= 0) & (experts != after))


@jit
def experts_d_matrices_kernel(
    left_ptr,
    right_ptr,
    weights_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    num_experts,
    top_k,
    height,
    width,
    stride_ls,
    stride_lm,
    stride_rs,
    stride_rn,
    GATHER_LEFT: tl.constexpr,
    WEIGH: tl.constexpr,
    WIDEN: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one expert's matrix: left rows transposed times right rows.

    The rows of one side are packed, those of the other side gathered by token. WEIGH multiplies the
    left ones by their routing weights.
    """
    row_tiles = tl.cdiv(height, BLOCK_M)
    tiles = row_tiles * tl.cdiv(width, BLOCK_N)
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = tile_of_program(tl.program_id(0) % tiles, row_tiles, width, GROUP_M, BLOCK_N)
    begin = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + num_experts + expert)
    m = (row * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    in_height = m < height
    in_width = n < width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The next step's slots are loaded one step ahead, so that no load waits for another one.
    slots = tl.load(order_ptr + begin + k, mask=begin + k < end, other=0).to(tl.int64)
    for start in range(begin, end, BLOCK_K):
        in_rows = start + k < end
        places = (start + k).to(tl.int64)
        if GATHER_LEFT:
            left_rows = slots // top_k
            right_rows = places
        else:
            left_rows = places
            right_rows = slots // top_k
        left_block = left_ptr + m[:, None] * stride_lm + left_rows[None, :] * stride_ls
        right_block = right_ptr + right_rows[:, None] * stride_rs + n[None, :] * stride_rn
        left = tl.load(left_block, mask=in_height[:, None] & in_rows[None, :], other=0.0)
        right = tl.load(right_block, mask=in_rows[:, None] & in_width[None, :], other=0.0)
        if WEIGH:
            weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)
            left = narrow(left.to(tl.float32) * weights[None, :], left_ptr.dtype.element_ty, WIDEN)
        total = dot(left, right, total, WIDEN)
        ahead = start + BLOCK_K + k
        slots = tl.load(order_ptr + ahead, mask=ahead < end, other=0).to(tl.int64)
    out = out_ptr + expert * height * width + m[:, None] * width + n[None, :]
    total = narrow(total, out_ptr.dtype.element_ty, ROUND_BITS)
    tl.store(out, total, mask=in_height[:, None] & in_width[None, :])


@jit
def experts_d_biases_kernel(
    rows_ptr,
    weights_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    num_experts,
    top_k,
    width,
    stride_rs,
    stride_rn,
    GATHER: tl.constexpr,
    WEIGH: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of the sum of one expert's rows, weighted or not, gathered or packed."""
    expert = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + num_experts + expert)
    s = tl.arange(0, BLOCK_S)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_width = n < width
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_S):
        in_rows = start + s < end
        places = (start + s).to(tl.int64)
        if GATHER or WEIGH:
            slots = tl.load(order_ptr + places, mask=in_rows, other=0).to(tl.int64)
        if GATHER:
            places = slots // top_k
        block = rows_ptr + places[:, None] * stride_rs + n[None, :] * stride_rn
        rows = tl.load(block, mask=in_rows[:, None] & in_width[None, :], other=0.0)
        rows = rows.to(tl.float32)
        if WEIGH:
            weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)
            rows = rows * weights[:, None]
        total += rows
    out = narrow(tl.sum(total, 0), out_ptr.dtype.element_ty, ROUND_BITS)
    tl.store(out_ptr + expert * width + n, out, mask=in_width)


@jit
def experts_d_rows_kernel(
    d_pre_ptr,
    gate_up_ptr,
    x_ptr,
    weights_ptr,
    packed_ptr,
    dots_ptr,
    order_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
    num_slots,
    top_k,
    width,
    depth,
    stride_ge,
    stride_gj,
    stride_gh,
    stride_xt,
    stride_xh,
    WEIGH: tl.constexpr,
    ROWS: tl.constexpr,
    DOTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the gradient by the rows of x, stored packed (ROWS).

    Where weights go on the input (WEIGH), so does the product, and its dot with the rows over this
    tile's columns is a part of the weights' gradient (DOTS).
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

    d_pre_block = d_pre_ptr + (first + m)[:, None] * depth + k[None, :]
    gate_up_block = gate_up_ptr + expert * stride_ge
    gate_up_block += k[:, None] * stride_gj + n[None, :] * stride_gh
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        d_mask = in_rows[:, None]
        w_mask = in_columns[None, :]
        if not EVEN_K:
            d_mask = d_mask & (start + k < depth)[None, :]
            w_mask = w_mask & (start + k < depth)[:, None]
        d_pre = tl.load(d_pre_block, mask=d_mask, other=0.0)
        total = dot(d_pre, tl.load(gate_up_block, mask=w_mask, other=0.0), total, WIDEN)
        d_pre_block += BLOCK_K
        gate_up_block += BLOCK_K * stride_gj

    mask = in_rows[:, None] & in_columns[None, :]
    if WEIGH:
        slots = tl.load(order_ptr + first + m, mask=in_rows, other=0).to(tl.int64)
        if DOTS:
            x_block = x_ptr + (slots // top_k)[:, None] * stride_xt + n[None, :] * stride_xh
            x = tl.load(x_block, mask=mask, other=0.0).to(tl.float32)
            dots = dots_ptr + column.to(tl.int64) * num_slots + first + m
            tl.store(dots, tl.sum(total * x, 1), mask=in_rows)
        weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)
        total = total * weights[:, None]
    if ROWS:
        total = narrow(total, packed_ptr.dtype.element_ty, WIDEN)
        tl.store(packed_ptr + (first + m)[:, None] * width + n[None, :], total, mask=mask)
