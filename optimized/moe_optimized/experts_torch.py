"""The experts in grouped products of torch: what a CPU user gets.

Stages, and what each gains:

1. The rows are sorted by expert, and one `grouped_mm` does the work of a product per expert.
2. Activation and weighting are computed in float32.
3. Narrow dtypes with a bias are multiplied expert by expert on a CPU: `grouped_mm` takes no bias
   and rounds before one could be added.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert, S rows that go somewhere.
"""

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.alignment import local_ids, sort_slots
from moe_optimized.dispatch import accumulation_dtype, gather_sum, spread


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


def batched_experts(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """`experts_batched_torch` on checked arguments."""
    wide = accumulation_dtype(x)
    in_use = torch.arange(x.shape[1], device=x.device) < tokens_per_expert[:, None]
    # The input is masked as well: a NaN in a row that nobody asked for would pass through the
    # product with a gradient of zero.
    rows = _mask(x, in_use[..., None])
    pre = _batched_linear(rows, experts.gate_up, experts.gate_up_bias).to(wide)
    hidden = activate(pre, config).to(x.dtype)
    rows = _batched_linear(hidden, experts.down, experts.down_bias).to(wide)
    return _mask(rows, in_use[..., None]).to(x.dtype)


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
