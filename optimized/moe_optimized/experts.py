"""The experts of a layer: grouped products over rows in expert order.

Stages, and what each gains:

1. `experts_torch`: rows sorted by expert, one `grouped_mm` per product instead of one product per
   expert, activation and weighting in float32. This is what a CPU user gets, and what the backward
   of the kernels recomputes.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert, S rows that go somewhere.
"""

import torch
import torch.nn.functional as F
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.alignment import check_map, check_tokens, local_ids, sort_slots
from moe_optimized.dispatch import accumulation_dtype, gather_sum, spread


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
    return experts_torch(x, experts, weights, expert_ids, config, expert_map)


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
    return experts_batched_torch(x, tokens_per_expert, experts, config)


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
    pre = grouped_linear(rows, experts.gate_up, ends).to(wide)
    if experts.gate_up_bias is not None:
        pre = pre + experts.gate_up_bias.to(wide)[expert_of]
    hidden = activate(_mask(pre, here), config).to(x.dtype)
    rows = grouped_linear(hidden, experts.down, ends).to(wide)
    if experts.down_bias is not None:
        rows = rows + experts.down_bias.to(wide)[expert_of]
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
    pre = _batched_linear(rows, experts.gate_up).to(wide)
    if experts.gate_up_bias is not None:
        pre = pre + experts.gate_up_bias.to(wide)[:, None]
    rows = _batched_linear(activate(pre, config).to(x.dtype), experts.down).to(wide)
    if experts.down_bias is not None:
        rows = rows + experts.down_bias.to(wide)[:, None]
    return _mask(rows, in_use[..., None]).to(x.dtype)


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


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows times the transposed weight of the expert they stand under.

    Args:
        rows: [S, in], in expert order.
        weight: [E, out, in], of any float dtype.
        ends: [E], int64, where each expert's rows end; all E of them, or `grouped_mm` reads the
            wrong ones.

    Returns:
        [S, out], rows' dtype where `weight` has it too, else float32 (float64). Rows past the last
        end may hold anything.
    """
    rows, weight = _same_dtype(rows, weight)
    if rows.shape[0] == 0:
        # No product at all, but a gradient of zero for every weight.
        return rows @ weight.sum(0).T
    weight = _dense(weight)
    if _takes_grouped_mm(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends.to(torch.int32))
    bounds = [0, *ends.tolist()]
    products = [
        rows[start:end] @ matrix.T
        for start, end, matrix in zip(bounds, bounds[1:], weight.unbind(0), strict=False)
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


def linear(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rows times the transposed matrix [out, in], which may have another dtype."""
    rows, matrix = _same_dtype(rows, matrix)
    return F.linear(rows, matrix)


def _batched_linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, weight = _same_dtype(rows, weight)
    return torch.bmm(rows, weight.transpose(1, 2))


def _same_dtype(rows: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.dtype is weight.dtype:
        return rows, weight
    wide = accumulation_dtype(rows)
    return rows.to(wide), weight.to(wide)


def _mask(rows: torch.Tensor, here: torch.Tensor | None) -> torch.Tensor:
    """Zeros, and gradients of zero, for the rows of nobody, whatever they hold."""
    return rows if here is None else torch.where(here, rows, 0.0)
