"""The experts of a layer: grouped products over rows in expert order.

Stages, and what each gains:

1. `experts_torch`: rows sorted by expert, one `grouped_mm` per product instead of one product per
   expert, activation and weighting in float32. This is what a CPU user gets, and what the backward
   of the kernels recomputes. Narrow dtypes with a bias are multiplied expert by expert on a CPU:
   `grouped_mm` takes no bias and rounds before one could be added.
2. `experts_triton`: the first product's kernel gathers its rows of x itself and applies the
   activation before it stores, with one accumulator for gate and one for up, so that neither the
   gathered rows nor [T·K, 2I] ever reach memory. The second one's writes packed rows, which a
   third gathers and adds up: scattering from the product would cost it atomics, and the sum its
   fixed order. Tiles come from a table made on the device, and no step waits for the host.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert, S rows that go somewhere.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights
from torch.autograd.function import once_differentiable

from moe_optimized.alignment import check_map, check_tokens, local_ids, sort_slots, tile_table
from moe_optimized.dispatch import accumulation_dtype, gather_sum, spread, sum_places
from moe_optimized.interpreter import (
    INTERPRETED,
    KERNEL_DTYPES,
    dot,
    has_kernels,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)


def experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, with the fastest means of x's device.

    Args:
        x: [T, H], any float dtype.
        experts: weights of E experts, any float dtype.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64; an id that is not here contributes nothing.
        config: how one expert computes.
        expert_map: [global experts], each one's row in `experts` or -1, or None.

    Returns:
        [T, H], x's dtype, differentiable in x, weights and every tensor of `experts`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    run = experts_triton if has_kernels(x) else experts_torch
    return run(x, experts, weights, expert_ids, config, expert_map)


def experts_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Each expert's output for its own rows, unweighted.

    Args:
        x: [E, C, H], any float dtype; rows past an expert's count may hold anything.
        tokens_per_expert: [E], int32 or int64.
        experts: weights of E experts.
        config: how one expert computes; `weight_on` plays no part.

    Returns:
        [E, C, H], x's dtype; rows past an expert's count are zero.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape. Counts are checked on a CPU
            only.
    """
    run = experts_batched_triton if has_kernels(x) else experts_batched_torch
    return run(x, tokens_per_expert, experts, config)


def experts_torch(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, in grouped products of torch."""
    check_experts(x, experts, weights, expert_ids, config, expert_map)
    return sum_of_experts(x, experts, weights, expert_ids, config, expert_map).to(x.dtype)


def sum_of_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    read_count: bool | None = None,
) -> torch.Tensor:
    """`experts_torch` on checked arguments, before the last rounding.

    Args:
        x: as in `experts`, and so are all but the last.
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        read_count: the host may read how many rows there are and leave out the others. Without,
            all T·K rows are multiplied, and those past the last offset, which `grouped_mm` leaves
            uninitialised, are masked. None reads on a CPU only, where it costs nothing.

    Returns:
        [T, H], float32 (float64 for float64 x).
    """
    T, K = expert_ids.shape
    E = experts.down.shape[0]
    wide = accumulation_dtype(x)
    if read_count is None:
        read_count = not x.is_cuda
    local = local_ids(expert_ids, E, expert_map)
    slots, ends = sort_slots(local, E)
    if read_count or E == 0:
        slots = slots[: int(ends[-1]) if E else 0]
    expert_of = local.flatten()[slots]
    here = None if read_count else (expert_of >= 0)[:, None]

    rows = _mask(spread(x, slots, K), here)
    row_weights = _mask(weights.flatten()[slots].to(wide)[:, None], here)
    if config.weight_on == "input":
        rows = (rows.to(wide) * row_weights).to(rows.dtype)
    pre = grouped_linear(rows, experts.gate_up, experts.gate_up_bias, ends, expert_of)
    hidden = activate(_mask(pre, here), config).to(x.dtype)
    rows = grouped_linear(hidden, experts.down, experts.down_bias, ends, expert_of)
    rows = _mask(rows, here)
    if config.weight_on == "output":
        rows = rows * row_weights
    return gather_sum(rows, slots, T, K)


def experts_batched_torch(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """As `experts_batched`, in batched products of torch."""
    check_batched(x, tokens_per_expert, experts, config)
    wide = accumulation_dtype(x)
    in_use = torch.arange(x.shape[1], device=x.device) < tokens_per_expert[:, None]
    # The input is masked as well: a NaN in a row that nobody asked for would pass through the
    # product with a gradient of zero.
    rows = _mask(x, in_use[..., None])
    pre = _batched_linear(rows, experts.gate_up, experts.gate_up_bias).to(wide)
    hidden = activate(pre, config).to(x.dtype)
    rows = _batched_linear(hidden, experts.down, experts.down_bias).to(wide)
    return _mask(rows, in_use[..., None]).to(x.dtype)


def experts_triton(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, in Triton kernels; float64 is not supported.

    The backward recomputes the forward in grouped products of torch and goes through these.
    """
    check_tensor("x", x, ("T", "H"), KERNEL_DTYPES)
    check_experts(x, experts, weights, expert_ids, config, expert_map)
    return sum_of_experts_triton(x, experts, weights, expert_ids, config, expert_map).to(x.dtype)


def sum_of_experts_triton(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    shapes: "tuple[TileShape, TileShape] | None" = None,
) -> torch.Tensor:
    """`experts_triton` on checked arguments, before the last rounding.

    Args:
        x: as in `experts`, and so are all but the last.
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        shapes: the tiles of the two products, of one height; None looks them up.

    Returns:
        [T, H], float32.
    """
    tensors = (getattr(experts, field.name) for field in fields(experts))
    return _Experts.apply(x, weights, *tensors, expert_ids, config, expert_map, shapes)


def experts_batched_triton(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """As `experts_batched`, in the same kernels: every row is a token with one expert, or none."""
    check_tensor("x", x, ("E", "C", "H"), KERNEL_DTYPES)
    check_batched(x, tokens_per_expert, experts, config)
    E, C, H = x.shape
    ids = torch.arange(E, device=x.device)[:, None].expand(E, C)
    in_use = torch.arange(C, device=x.device) < tokens_per_expert[:, None]
    ids = torch.where(in_use, ids, -1).view(E * C, 1)
    ones = torch.ones(E * C, 1, dtype=torch.float32, device=x.device)
    rows = sum_of_experts_triton(x.reshape(E * C, H), experts, ones, ids, config)
    return rows.to(x.dtype).view(E, C, H)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None,
        shapes: "tuple[TileShape, TileShape] | None",
    ) -> torch.Tensor:
        ctx.save_for_backward(
            x, weights, gate_up, down, gate_up_bias, down_bias, expert_ids, expert_map
        )
        ctx.config = config
        experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
        return _launch(x, experts, weights, expert_ids, config, expert_map, shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, expert_ids, expert_map = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(needed)
                for t, needed in zip(tensors, ctx.needs_input_grad[:6], strict=True)
            ]
            x, weights, *parts = leaves
            out = sum_of_experts(
                x, ExpertWeights(*parts), weights, expert_ids, ctx.config, expert_map
            )
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, grad))
        grads = [next(found) if n else None for n in ctx.needs_input_grad[:6]]
        return (*grads, None, None, None, None)


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


# By the most rows per expert, for the first product and the second, in two-byte dtypes. They
# follow what vLLM's tuned tables have in common on Hopper; the first product has two accumulators
# and so half the columns. Float32 is multiplied without tensor cores, in smaller tiles.
_HALF = (
    (16, TileShape(16, 64, 128, 4, 4), TileShape(16, 64, 128, 4, 4)),
    (32, TileShape(32, 64, 128, 4, 3), TileShape(32, 128, 64, 4, 4)),
    (128, TileShape(64, 64, 64, 4, 4), TileShape(64, 128, 64, 4, 4, 8)),
    (None, TileShape(128, 128, 64, 8, 3, 8), TileShape(128, 256, 64, 8, 3, 8)),
)
_SINGLE = (
    (32, TileShape(16, 32, 64), TileShape(16, 64, 64)),
    (None, TileShape(64, 32, 32, 4, 3, 8), TileShape(64, 64, 32, 4, 3, 8)),
)


def tile_shapes(
    rows: int, num_experts: int, width: int, depth: int, dtype: torch.dtype
) -> tuple[TileShape, TileShape]:
    """The tiles of the first and the second product, from tables: nothing is tried out.

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
        return TileShape(m, i, h), TileShape(m, h, i)
    table = _SINGLE if dtype is torch.float32 else _HALF
    return next((up, down) for most, up, down in table if most is None or share <= most)


def _launch(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    shapes: tuple[TileShape, TileShape] | None,
) -> torch.Tensor:
    T, K = expert_ids.shape
    E, H, I = experts.down.shape
    gate_up, down = experts.gate_up, experts.down
    if not x.dtype == gate_up.dtype == down.dtype:
        x, gate_up, down = x.float(), gate_up.float(), down.float()
    up_shape, down_shape = shapes or tile_shapes(T * K, E, I, H, x.dtype)
    tiles = tile_table(expert_ids, up_shape.m, E, expert_map)
    table = (tiles.order, tiles.experts, tiles.first, tiles.rows)
    weights = weights.contiguous()
    hidden = x.new_empty(T * K, I)
    packed = x.new_empty(T * K, H)
    num_tiles = tiles.experts.numel()
    bias = experts.gate_up_bias
    launch(
        experts_up_kernel,
        (num_tiles * -(-I // up_shape.n),),
        x,
        gate_up,
        x if bias is None else bias,
        weights,
        hidden,
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
        **_compile_options(up_shape, H, x.dtype),
    )
    bias = experts.down_bias
    launch(
        experts_down_kernel,
        (num_tiles * -(-H // down_shape.n),),
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
        **_compile_options(down_shape, I, x.dtype),
    )
    factors = weights if config.weight_on == "output" else None
    return sum_places(packed, tiles.place, factors, T, K, torch.float32)


def _compile_options(shape: TileShape, depth: int, dtype: torch.dtype) -> dict[str, Any]:
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


def check_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
) -> None:
    """Raise on arguments that `experts` cannot take."""
    check_tensor("x", x, ("T", "H"), FLOATS)
    check_tensor("weights", weights, (x.shape[0], "K"), FLOATS)
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_weights(experts, x.shape[1], config)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, ("E",), IDS)
        check_map(expert_map, experts.down.shape[0])


def check_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> None:
    """Raise on arguments that `experts_batched` cannot take."""
    check_tensor("x", x, ("E", "C", "H"), FLOATS)
    check_weights(experts, x.shape[2], config)
    if experts.down.shape[0] != x.shape[0]:
        raise ValueError(f"x: expected E = {experts.down.shape[0]} experts, got {x.shape[0]}")
    check_tensor("tokens_per_expert", tokens_per_expert, (x.shape[0],), IDS)
    check_tokens(tokens_per_expert, x.shape[1])


def check_weights(
    experts: ExpertWeights, hidden: int, config: ExpertsConfig, name: str = "experts"
) -> None:
    """Raise unless the weights fit each other, H and the configuration."""
    if not isinstance(config, ExpertsConfig):
        raise TypeError(f"config: expected an ExpertsConfig, got {type(config).__name__}")
    check_tensor(f"{name}.down", experts.down, ("E", hidden, "I"), FLOATS)
    E, _, I = experts.down.shape
    J = 2 * I if config.gated else I
    check_tensor(f"{name}.gate_up", experts.gate_up, (E, J, hidden), FLOATS)
    if experts.gate_up_bias is not None:
        check_tensor(f"{name}.gate_up_bias", experts.gate_up_bias, (E, J), FLOATS)
    if experts.down_bias is not None:
        check_tensor(f"{name}.down_bias", experts.down_bias, (E, hidden), FLOATS)


def activate(pre: torch.Tensor, config: ExpertsConfig) -> torch.Tensor:
    """The activation of [..., 2I] (of [..., I] without a gate), in its dtype."""
    if not config.gated:
        return _ELEMENTWISE[config.activation](pre)
    gate, up = pre.chunk(2, dim=-1)
    if config.activation in _ELEMENTWISE:
        return _ELEMENTWISE[config.activation](gate) * up
    gate = gate.clamp(max=config.limit)
    up = up.clamp(-config.limit, config.limit)
    if config.activation == "swiglu_limit":
        return F.silu(gate) * up
    return gate * torch.sigmoid(config.alpha * gate) * (up + 1.0)


_ELEMENTWISE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    expert_of: torch.Tensor,
) -> torch.Tensor:
    """Rows times the transposed weight of the expert they stand under, plus its bias.

    The product is rounded to the rows' dtype where `weight` has it too, on a CPU together with the
    bias.

    Args:
        rows: [S, in], in expert order.
        weight: [E, out, in], of any float dtype.
        bias: [E, out] or None, of any float dtype.
        ends: [E], int64, where each expert's rows end; all E of them, or `grouped_mm` reads the
            wrong ones.
        expert_of: [S], int64, the expert of each row.

    Returns:
        [S, out], float32 (float64). Rows past the last end may hold anything.
    """
    wide = accumulation_dtype(rows)
    # grouped_mm takes no bias, and a product that is rounded before one is added may cancel
    # against it.
    together = bias is not None and rows.dtype is not wide and not rows.is_cuda
    operands = (rows, weight, bias) if together else (rows, weight)
    if any(operand.dtype is not rows.dtype for operand in operands):
        rows, weight, together = rows.to(wide), weight.to(wide), False
    if rows.shape[0] == 0:
        # No product at all, but a gradient of zero for every weight.
        product = rows @ weight.sum(0).T
    elif together:
        return _one_by_one(rows, weight, bias, ends).to(wide)
    elif _takes_grouped_mm(rows, weight):
        offsets = ends.to(torch.int32)
        product = F.grouped_mm(rows, _dense(weight).transpose(1, 2), offs=offsets)
    else:
        product = _one_by_one(rows, weight, None, ends)
    product = product.to(wide)
    return product if bias is None else product + bias.to(wide)[expert_of]


def _one_by_one(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    bounds = [0, *ends.tolist()]
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    products = [
        F.linear(rows[start:end], matrix, vector)
        for start, end, matrix, vector in zip(
            bounds, bounds[1:], weight.unbind(0), biases, strict=False
        )
    ]
    past = rows.new_zeros(rows.shape[0] - bounds[-1], weight.shape[1])
    return torch.cat([*products, past])


def _takes_grouped_mm(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    # torch refuses float64, and rows whose stride is not a multiple of 16 bytes.
    return (
        rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and rows.shape[1] * rows.element_size() % 16 == 0
        and weight.shape[1] * weight.element_size() % 16 == 0
        and weight.data_ptr() % 16 == 0
        and min(weight.shape) > 0
    )


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is where its matrices are dense in either order, else a dense copy."""
    if weight.is_contiguous() or weight.transpose(1, 2).is_contiguous():
        return weight
    return weight.contiguous()


def _batched_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if len({t.dtype for t in (rows, weight, bias) if t is not None}) > 1:
        wide = accumulation_dtype(rows)
        rows, weight = rows.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    if bias is None:
        return torch.bmm(rows, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))


def _mask(rows: torch.Tensor, here: torch.Tensor | None) -> torch.Tensor:
    """Zeros, and gradients of zero, for the rows of nobody, whatever they hold."""
    return rows if here is None else torch.where(here, rows, 0.0)


@jit
def tile_of_program(num_tiles, width, GROUP_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row tile and column tile: GROUP_M row tiles share each column tile while it is cached."""
    program = tl.program_id(0)
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
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden rows of one tile: gather x, multiply by gate and up, activate, store packed."""
    tile, column = tile_of_program(num_tiles, width, GROUP_M, BLOCK_N)
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
    up_block = gate_block
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_block += width.to(tl.int64) * stride_gj
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
            bias_block += width.to(tl.int64) * stride_bj
            up += tl.load(bias_block, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        hidden = activate_pair(gate, up, alpha, limit, ACTIVATION)
    else:
        hidden = activate_block(gate, ACTIVATION)
    hidden = narrow(hidden, hidden_ptr.dtype.element_ty, WIDEN)
    out = hidden_ptr + (first + m)[:, None] * width + n[None, :]
    tl.store(out, hidden, mask=in_rows[:, None] & in_columns[None, :])


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
    tile, column = tile_of_program(num_tiles, width, GROUP_M, BLOCK_N)
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
