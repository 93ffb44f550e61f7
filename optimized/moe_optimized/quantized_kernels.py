"""The forward of packed experts in Triton kernels, which unpack inside the product.

Stages, and what each gains:

1. `round_rows_kernel`, with 8-bit activations only: rows become float8 codes and scales, so that
   the product multiplies bytes by bytes.
2. `quantized_up_kernel` gathers its rows of x, multiplies them by gate and up and applies the
   activation. Codes are read once from memory, and become numbers in registers: no unpacked matrix
   is ever stored.
3. `quantized_down_kernel` writes packed rows, as `experts_down_kernel` does and for its reasons.
4. `combine_rows_kernel` gathers each token's packed rows and adds them up in float32.

In the products weights are on the left: a tile is rows of the matrix by rows of x. The tensor cores
of Hopper take 64 rows on the left or more, and on the right as few as 16 cost no more than they
are; and what is on the left may come from registers, where the unpacked codes are.

Codes are multiplied as they are: integers to 255 less their zero point, float4 and float8 are exact
in float16, and in bfloat16. The scale multiplies the float32 sum over its columns. So nothing is
rounded that `experts` does not round.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token, S rows, D columns of a row, G blocks of columns.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from moe_reference.config import ExpertsConfig

from moe_optimized.alignment import tile_table
from moe_optimized.dispatch import sum_places
from moe_optimized.experts_triton import (
    TileShape,
    activate_block,
    activate_pair,
    compile_options,
    tile_of_program,
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
from moe_optimized.quantized_layout import PreparedExperts, PreparedMatrix


class QuantizedShapes(NamedTuple):
    """The tiles of both products, of one height.

    Attributes:
        up: [rows, I] of the first product, gate and up each.
        down: [rows, H] of the second product.
    """

    up: TileShape
    down: TileShape


# By the most rows per expert. `k` is the layout's: one run. A tile has m rows of x and n of the
# matrix, 64 at least for the tensor cores; the first product has two sums and so half the rows.
_TABLE = (
    (16, QuantizedShapes(TileShape(16, 64, 0, 4, 4), TileShape(16, 64, 0, 4, 4))),
    (32, QuantizedShapes(TileShape(32, 64, 0, 4, 4), TileShape(32, 128, 0, 4, 4))),
    (128, QuantizedShapes(TileShape(64, 64, 0, 4, 3), TileShape(64, 128, 0, 8, 3, 8))),
    (None, QuantizedShapes(TileShape(128, 64, 0, 8, 3, 8), TileShape(128, 128, 0, 8, 3, 8))),
)
# Scales of rows take registers, which sums of the greatest tiles have none to spare.
_ROUNDED = (
    *_TABLE[:-1],
    (None, QuantizedShapes(TileShape(128, 64, 0, 8, 3, 8), TileShape(128, 64, 0, 8, 3, 8))),
)


def quantized_shapes(
    rows: int, num_experts: int, width: int, depth: int, rounded: bool = False
) -> QuantizedShapes:
    """The tiles of both products, from a table: nothing is tried out.

    Args:
        rows: T·K.
        num_experts: E.
        width: I.
        depth: H.
        rounded: rows of x are codes with scales.
    """
    share = rows / max(num_experts, 1)
    if INTERPRETED:
        # A step costs milliseconds whatever its size, so there should be few.
        m = min(power_of_two(int(share) + 1, least=16), 128)
        i, h = (min(power_of_two(size, least=16), 256) for size in (width, depth))
        return QuantizedShapes(TileShape(m, i, 0), TileShape(m, h, 0))
    table = _ROUNDED if rounded else _TABLE
    return next(shapes for most, shapes in table if most is None or share <= most)


def run_quantized(
    x: torch.Tensor,
    experts: PreparedExperts,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    shapes: QuantizedShapes | None = None,
) -> torch.Tensor:
    """Launch the kernels.

    Args:
        x: [T, H].
        experts: packed weights of E experts in the layout of the kernels.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        shapes: the tiles of the products; None looks them up.

    Returns:
        [T, H], x's dtype.
    """
    T, K = expert_ids.shape
    E, H, I = experts.down.shape
    rounded = experts.activation_format is not None
    shapes = shapes or quantized_shapes(T * K, E, I, H, rounded)
    tiles = tile_table(expert_ids, shapes.up.m, E, expert_map)
    table = (tiles.experts, tiles.first, tiles.rows)
    num_tiles = tiles.experts.numel()
    weights = weights.contiguous()
    hidden = x.new_empty(T * K, I)
    packed = x.new_empty(T * K, H)
    bias = experts.gate_up_bias
    rows, row_scales, row_share = _round_rows(x, experts, experts.gate_up)
    launch(
        quantized_up_kernel,
        (num_tiles * -(-I // shapes.up.n),),
        rows,
        row_scales,
        *_pointers(experts.gate_up),
        x if bias is None else bias,
        weights,
        hidden,
        tiles.order,
        *table,
        num_tiles,
        max(K, 1),
        I,
        *_sizes(experts.gate_up),
        row_share,
        *rows.stride(),
        *((0, 0) if bias is None else bias.stride()),
        float(config.alpha),
        float(config.limit),
        ACTIVATION=config.activation,
        GATED=config.gated,
        HAS_BIAS=bias is not None,
        WEIGH=config.weight_on == "input",
        ROUND_BITS=needs_widening(x.dtype),
        **_options(shapes.up, experts.gate_up, rows),
    )
    bias = experts.down_bias
    rows, row_scales, row_share = _round_rows(hidden, experts, experts.down)
    launch(
        quantized_down_kernel,
        (num_tiles * -(-H // shapes.down.n),),
        rows,
        row_scales,
        *_pointers(experts.down),
        x if bias is None else bias,
        packed,
        *table,
        num_tiles,
        H,
        *_sizes(experts.down),
        row_share,
        *rows.stride(),
        *((0, 0) if bias is None else bias.stride()),
        HAS_BIAS=bias is not None,
        ROUND_BITS=needs_widening(x.dtype),
        **_options(shapes.down, experts.down, rows),
    )
    factors = weights if config.weight_on == "output" else None
    return sum_places(packed, tiles.place, factors, T, K, x.dtype)


def _pointers(matrix: PreparedMatrix) -> tuple[torch.Tensor, ...]:
    parts = (matrix.scales, matrix.zeros, matrix.columns)
    return (matrix.packed, *(matrix.packed if part is None else part for part in parts))


def _sizes(matrix: PreparedMatrix) -> tuple[int, ...]:
    """Depth, rows of the matrix, runs, rows of scales, and how many parts have the same."""
    _, O, D = matrix.shape
    return D, O, matrix.packed.shape[1], matrix.scales.shape[1], matrix.share


def _options(shape: TileShape, matrix: PreparedMatrix, rows: torch.Tensor) -> dict[str, Any]:
    rounded = rows.dtype is torch.float8_e4m3fn
    options = {
        "CODES": matrix.codes,
        "HAS_ZEROS": matrix.zeros is not None,
        "SORTED": matrix.columns is not None,
        "JOINT": matrix.parts == 1 or matrix.share % 2 == 0,
        "ROUNDED": rounded,
        "MEND_NAN": INTERPRETED,
        **compile_options(replace(shape, k=matrix.run), matrix.shape[2], rows.dtype),
    }
    # The interpreter's float8 has no NaN.
    options["WIDEN"] |= rounded and INTERPRETED
    return options


def _round_rows(
    x: torch.Tensor, experts: PreparedExperts, matrix: PreparedMatrix
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows as the product takes them.

    Args:
        x: [S, D].
        experts: says what rows are rounded to.
        matrix: what they are multiplied by.

    Returns:
        rows: [S, D], x itself or float8_e4m3fn.
        scales: [S, G], float32, or x itself.
        share: parts of the matrix that have one scale.
    """
    if experts.activation_format is None:
        return x, x, 1
    S, D = x.shape
    blocks = experts.activation_format == "e4m3_block"
    B = matrix.block if blocks and matrix.block is not None else max(D, 1)
    G = -(-D // B)
    rows = torch.empty(S, D, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(S, G, dtype=torch.float32, device=x.device)
    block_s = min(power_of_two(S), 64) if INTERPRETED else 1
    launch(
        round_rows_kernel,
        (-(-S // block_s), G),
        x,
        rows,
        scales,
        S,
        D,
        B,
        *x.stride(),
        ROUND_BITS=INTERPRETED,
        BLOCK_S=block_s,
        BLOCK_B=power_of_two(min(B, D), least=16),
    )
    # Codes of 8 bits have one part in a run; a single block may be narrower than that.
    return rows, scales, B // matrix.depth if G > 1 else max(matrix.packed.shape[1], 1)


@jit
def to_e4m3(x, ROUND_BITS: tl.constexpr):
    """Float32 from -448 to 448, rounded to nearest even; ROUND_BITS does it by hand."""
    if ROUND_BITS:
        exponents = (x.to(tl.int32, bitcast=True) >> 23) & 255
        # Three bits after the first; below 2^-6 numbers are as far apart as there.
        exponents = tl.where(exponents < 121, 121, exponents) - 3
        steps = (exponents << 23).to(tl.float32, bitcast=True)
        # Adding 1.5 · 2^23 leaves no bits for fractions.
        x = ((x / steps + 12582912.0) - 12582912.0) * steps
    return x.to(tl.float8e4nv)


@jit
def round_rows_kernel(
    x_ptr,
    rows_ptr,
    scales_ptr,
    num_rows,
    width,
    block,
    stride_xs,
    stride_xd,
    ROUND_BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """BLOCK_S rows of one block of columns, as float8 and a scale each."""
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    b = tl.arange(0, BLOCK_B)
    d = (tl.program_id(1) * block + b).to(tl.int64)
    in_rows = s < num_rows
    mask = in_rows[:, None] & ((b < block) & (d < width))[None, :]
    x = tl.load(x_ptr + s[:, None] * stride_xs + d[None, :] * stride_xd, mask=mask, other=0.0)
    x = x.to(tl.float32)
    greatest = tl.max(tl.abs(tl.where(x == x, x, 0.0)), 1)
    numbers = tl.min((x == x).to(tl.int32), 1) > 0
    scales = tl.where(numbers, greatest / 448.0, float("nan"))
    scaled = x / tl.where(scales == 0, 1.0, scales)[:, None]
    scaled = tl.where(scaled > 448.0, 448.0, tl.where(scaled < -448.0, -448.0, scaled))
    # With a scale that is no number, or infinite, it does not matter what it multiplies.
    codes = to_e4m3(tl.where(scaled == scaled, scaled, 0.0), ROUND_BITS)
    tl.store(rows_ptr + s[:, None] * width + d[None, :], codes, mask=mask)
    places = s * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales_ptr + places, scales, mask=in_rows)


@jit
def integers_to_floats(codes, zeros, FOUR_BITS: tl.constexpr, dtype: tl.constexpr):
    """Unsigned codes less their zero points, exactly.

    The bits of a code are put into those of a float whose last place counts ones, which takes one
    instruction where a conversion takes several; what that added is subtracted with the zero point.
    """
    if dtype == tl.float16:
        floats = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return floats - (zeros + 1024.0).to(tl.float16)
    elif FOUR_BITS and dtype == tl.bfloat16:
        floats = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return floats - (zeros + 128.0).to(tl.bfloat16)
    else:
        floats = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
        return (floats - (zeros + 8388608.0)).to(dtype)


@jit
def e4m3_to_floats(codes, dtype: tl.constexpr, MEND_NAN: tl.constexpr):
    """Bytes of float8_e4m3fn, exactly. The interpreter takes NaN for 480: MEND_NAN."""
    floats = codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    if MEND_NAN:
        floats = tl.where((codes & 127) == 127, float("nan"), floats)
    return floats


@jit
def codes_to_floats(codes, zeros, CODES: tl.constexpr, dtype: tl.constexpr, MEND_NAN: tl.constexpr):
    """What codes stand for without their scales, exactly: [n, k], `dtype`."""
    if CODES == "e4m3":
        return e4m3_to_floats(codes, dtype, MEND_NAN)
    elif CODES == "e2m1":
        # Sign, exponent and fraction where float16 has them; its exponent is 14 too small for them.
        codes = codes.to(tl.uint16)
        bits = ((codes & 8) << 12) | ((codes & 7) << 9)
        return (bits.to(tl.float16, bitcast=True) * 16384.0).to(dtype)
    else:
        return integers_to_floats(codes, zeros, CODES == "int4", dtype)


@jit
def load_scales(scales_ptr, places, mask):
    """Scales as float32; bytes are exponents. Where the mask is not, nothing is stored of it."""
    scales = tl.load(scales_ptr + places, mask=mask)
    if scales.dtype == tl.uint8:
        exponents = scales.to(tl.int32)
        bits = tl.where(exponents == 255, 0x7FC00000, exponents << 23)
        # 2^-127 is below the normal numbers.
        bits = tl.where(exponents == 0, 0x00400000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        return scales.to(tl.float32)


@jit
def add_run(
    total,
    low,
    high,
    row_factors,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    run,
    height,
    share,
    n,
    in_columns,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDEN: tl.constexpr,
    MEND_NAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`total`, [n, m], and the product of one run of n rows of a matrix with columns of x.

    `low` is [DEPTH, m] of x, `high` the second half where a byte holds two codes. The pointers are
    those of the expert. JOINT: both halves have one scale.
    """
    HALVED: tl.constexpr = CODES == "int4" or CODES == "e2m1"
    k = tl.arange(0, DEPTH)
    places = (run * height + n)[:, None] * DEPTH + k[None, :]
    codes = tl.load(packed_ptr + places, mask=in_columns[:, None], other=0)
    part = run * 2 if HALVED else run
    scale_places = (part // share) * height + n
    scales = load_scales(scales_ptr, scale_places, in_columns)
    zeros = tl.zeros((BLOCK_N,), tl.float32) + (8.0 if CODES == "int4" else 128.0)
    if HAS_ZEROS:
        zeros = tl.load(zeros_ptr + scale_places, mask=in_columns, other=0).to(tl.float32)
    sums = tl.zeros((BLOCK_N, low.shape[1]), tl.float32)
    if HALVED:
        left = codes_to_floats(codes & 15, zeros[:, None], CODES, low.dtype, MEND_NAN)
        sums = dot(left, low, sums, WIDEN)
        if not JOINT:
            total += sums * scales[:, None]
            scale_places = ((part + 1) // share) * height + n
            scales = load_scales(scales_ptr, scale_places, in_columns)
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + scale_places, mask=in_columns, other=0).to(tl.float32)
            sums = tl.zeros((BLOCK_N, low.shape[1]), tl.float32)
        left = codes_to_floats(codes >> 4, zeros[:, None], CODES, low.dtype, MEND_NAN)
        sums = dot(left, high, sums, WIDEN)
    else:
        left = codes_to_floats(codes, zeros[:, None], CODES, low.dtype, MEND_NAN)
        sums = dot(left, low, sums, WIDEN)
    sums = sums * scales[:, None]
    if ROUNDED:
        sums = sums * row_factors[None, :]
    return total + sums


@jit
def load_columns(
    rows,
    mask,
    columns_ptr,
    start,
    depth,
    stride,
    SORTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """[DEPTH, m] of x: columns from a place of the layout on, of the rows that pointers are to."""
    columns = start + tl.arange(0, DEPTH)
    if SORTED:
        columns = tl.load(columns_ptr + columns)
        mask = mask[None, :] & (columns >= 0)[:, None]
    elif EVEN_K:
        mask = mask[None, :]
    else:
        mask = mask[None, :] & (columns < depth)[:, None]
    x = tl.load(rows[None, :] + columns.to(tl.int64)[:, None] * stride, mask=mask, other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@jit
def sums_of_runs(
    rows,
    in_rows,
    row_scales,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    columns_ptr,
    expert,
    n,
    in_columns,
    second,
    depth,
    height,
    num_runs,
    num_scales,
    share,
    row_share,
    stride,
    TWO: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SORTED: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    MEND_NAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of n rows of an expert's matrix with m rows of x, [n, m], float32.

    TWO: those of the n rows that stand `second` rows further down as well, with the same x.
    """
    HALVED: tl.constexpr = CODES == "int4" or CODES == "e2m1"
    DEPTH: tl.constexpr = BLOCK_K // 2 if HALVED else BLOCK_K
    packed_ptr += expert * num_runs * height * DEPTH
    scales_ptr += expert * num_scales * height
    zeros_ptr += expert * num_scales * height
    columns_ptr += expert * num_runs * BLOCK_K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    other = total
    for run in range(0, num_runs):
        start = run * BLOCK_K
        low = load_columns(
            rows, in_rows, columns_ptr, start, depth, stride, SORTED, EVEN_K, DEPTH, WIDEN
        )
        high = low
        if HALVED:
            high = load_columns(
                rows, in_rows, columns_ptr, start + DEPTH, depth, stride, SORTED, EVEN_K, DEPTH,
                WIDEN,
            )  # fmt: skip
        factors = 1.0
        if ROUNDED:
            factors = tl.load(row_scales + run // row_share, mask=in_rows, other=0.0)
        total = add_run(
            total, low, high, factors, packed_ptr, scales_ptr, zeros_ptr, run, height, share, n,
            in_columns, CODES, HAS_ZEROS, JOINT, ROUNDED, WIDEN, MEND_NAN,
                BLOCK_N, DEPTH,
        )  # fmt: skip
        if TWO:
            other = add_run(
                other, low, high, factors, packed_ptr, scales_ptr, zeros_ptr, run, height, share,
                n + second, in_columns, CODES, HAS_ZEROS, JOINT, ROUNDED, WIDEN, MEND_NAN,
                BLOCK_N, DEPTH,
            )  # fmt: skip
    return total, other


@jit
def quantized_up_kernel(
    x_ptr,
    row_scales_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    columns_ptr,
    bias_ptr,
    weights_ptr,
    hidden_ptr,
    order_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
    top_k,
    width,
    depth,
    height,
    num_runs,
    num_scales,
    share,
    row_share,
    stride_xt,
    stride_xh,
    stride_be,
    stride_bj,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SORTED: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    MEND_NAN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden rows of one tile: gather x, multiply by packed gate and up, activate, store."""
    tile, column = tile_of_program(tl.program_id(0), num_tiles, width, GROUP_M, BLOCK_N)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_first_ptr + tile).to(tl.int64)
    num_rows = tl.load(tile_rows_ptr + tile)
    m = tl.arange(0, BLOCK_M)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows = m < num_rows
    in_columns = n < width
    slots = tl.load(order_ptr + first + m, mask=in_rows, other=0).to(tl.int64)
    tokens = slots // top_k
    row_scales = row_scales_ptr
    if ROUNDED:
        row_scales += tokens * tl.cdiv(num_runs, row_share)
    gate, up = sums_of_runs(
        x_ptr + tokens * stride_xt, in_rows, row_scales, packed_ptr, scales_ptr, zeros_ptr,
        columns_ptr, expert, n, in_columns, width, depth, height, num_runs, num_scales, share,
        row_share, stride_xh, GATED, CODES, HAS_ZEROS, SORTED, JOINT, ROUNDED, EVEN_K, WIDEN,
        MEND_NAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if WEIGH:
        # Weighing the product is weighing its input, without rounding that.
        weights = tl.load(weights_ptr + slots, mask=in_rows, other=0.0).to(tl.float32)[None, :]
        gate = gate * weights
        if GATED:
            up = up * weights
    if HAS_BIAS:
        bias_block = bias_ptr + expert * stride_be + n * stride_bj
        gate += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[:, None]
        if GATED:
            bias_block = bias_ptr + expert * stride_be + (n + width) * stride_bj
            up += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[:, None]
    if GATED:
        hidden = activate_pair(gate, up, alpha, limit, ACTIVATION)
    else:
        hidden = activate_block(gate, ACTIVATION)
    hidden = narrow(hidden, hidden_ptr.dtype.element_ty, ROUND_BITS)
    out = hidden_ptr + (first + m)[None, :] * width + n[:, None]
    tl.store(out, hidden, mask=in_columns[:, None] & in_rows[None, :])


@jit
def quantized_down_kernel(
    hidden_ptr,
    row_scales_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    columns_ptr,
    bias_ptr,
    out_ptr,
    tile_experts_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    num_tiles,
    width,
    depth,
    height,
    num_runs,
    num_scales,
    share,
    row_share,
    stride_ht,
    stride_hi,
    stride_be,
    stride_bh,
    HAS_BIAS: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SORTED: tl.constexpr,
    JOINT: tl.constexpr,
    ROUNDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    MEND_NAN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output rows of one tile by packed down, stored like the hidden ones."""
    tile, column = tile_of_program(tl.program_id(0), num_tiles, width, GROUP_M, BLOCK_N)
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_first_ptr + tile).to(tl.int64)
    num_rows = tl.load(tile_rows_ptr + tile)
    m = tl.arange(0, BLOCK_M)
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows = m < num_rows
    in_columns = n < width
    row_scales = row_scales_ptr
    if ROUNDED:
        row_scales += (first + m) * tl.cdiv(num_runs, row_share)
    total, _ = sums_of_runs(
        hidden_ptr + (first + m) * stride_ht, in_rows, row_scales, packed_ptr, scales_ptr,
        zeros_ptr, columns_ptr, expert, n, in_columns, 0, depth, height, num_runs, num_scales,
        share, row_share, stride_hi, False, CODES, HAS_ZEROS, SORTED, JOINT, ROUNDED, EVEN_K,
        WIDEN, MEND_NAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        bias_block = bias_ptr + expert * stride_be + n * stride_bh
        total += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (first + m)[None, :] * width + n[:, None]
    total = narrow(total, out_ptr.dtype.element_ty, ROUND_BITS)
    tl.store(out, total, mask=in_columns[:, None] & in_rows[None, :])
