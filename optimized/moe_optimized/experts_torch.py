"""The experts in grouped products of torch: all T·K rows at once, and no look at any value.

Stages, and what each gains:

1. The rows are sorted by expert, and one grouped product does the work of a product per expert.
2. Activation and weighting are computed in float32.
3. The backward is written out: like the kernels' it needs x and the pre-activation only, and takes
   the gradient of the routing weights from the product that it makes anyway.

`torch.nn.functional.grouped_mm` has traps, and this is how each is met:

| trap | what is done |
|---|---|
| rows past the last offset are not written | pairs that are not here are masked behind a product |
| strides must be multiples of 16 bytes | matrices are padded with zeros where they are not |
| a gradient that is expanded, as that of a sum, is refused | operands are made dense |
| it wants the end of every group, in int32 | all E ends are given, those of empty experts too |
| it wants one dtype for both operands | two that differ are widened to float32 |
| it takes no float64 | a loop over the experts, which reads the bounds |
| it takes no bias | added in float32, to a product that has x's dtype on a GPU |

On an NPU the same products are `torch_npu.npu_grouped_matmul`. That branch was written to its
documentation and has never been run by this project.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token, C rows of a batched expert, S = T·K rows, A and B sides of a matrix.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.activations import activate, activate_with_gradient
from moe_optimized.alignment import local_ids, sort_slots
from moe_optimized.dispatch import accumulation_dtype, gather_sum, spread, without_autocast
from moe_optimized.experts_backward import Needs

try:
    import torch_npu
except ImportError:
    torch_npu = None


class _Rows(NamedTuple):
    """Rows in expert order, those of nobody last.

    Attributes:
        slots: [S], int64.
        ends: [E], int64, where each expert's rows end.
        expert_of: [S], int64, the expert of each row, 0 for those of nobody.
        here: [S, 1], bool, False for those of nobody.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    expert_of: torch.Tensor
    here: torch.Tensor


def forward_grouped(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of each token's experts, below autograd.

    Args:
        x: [T, H].
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        dtype: of the result.
        keep: return the pre-activation for a backward.

    Returns:
        out: [T, H].
        pre: [S, J] in expert order, x's dtype, zeros past the last row; without `keep` [0, J].
    """
    (T, K), (E, H, _), J = expert_ids.shape, experts.down.shape, experts.gate_up.shape[1]
    if E == 0:
        return x.new_zeros((T, H), dtype=dtype), x.new_zeros(T * K if keep else 0, J)
    order = _in_expert_order(expert_ids, E, expert_map)
    factors = _factors(weights, order, x)
    narrow, wide = _product_dtype(x, experts), accumulation_dtype(x)
    rows = spread(x, order.slots, K)
    if config.weight_on == "input":
        rows = rows.to(wide) * factors
    rows = _mask(rows, order).to(narrow)
    pre = _linear(rows, experts.gate_up, experts.gate_up_bias, order, wide)
    hidden = activate(pre, config).to(narrow)
    rows = _linear(hidden, experts.down, experts.down_bias, order, wide)
    if config.weight_on == "output":
        rows = rows * factors
    out = gather_sum(rows, order.slots, T, K).to(dtype)
    return out, pre.to(x.dtype) if keep else pre.new_empty((0, J), dtype=x.dtype)


def backward_grouped(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `forward_grouped`.

    Args:
        grad: [T, H], the output's gradient.
        x: [T, H].
        pre: [S, J], what the forward kept.
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        needs: which gradients are wanted.

    Returns:
        Of each of `Needs`' fields the gradient, with its tensor's shape and dtype, or None.
    """
    (T, K), E = expert_ids.shape, experts.down.shape[0]
    tensors = {"x": x, "weights": weights, **vars(experts)}
    found: dict[str, torch.Tensor] = {}
    if E == 0:
        return tuple(
            torch.zeros_like(tensors[name]) if wanted else None
            for name, wanted in needs._asdict().items()
        )
    order = _in_expert_order(expert_ids, E, expert_map)
    factors = _factors(weights, order, x)
    on_input = config.weight_on == "input"
    narrow, wide = _product_dtype(x, experts), accumulation_dtype(x)
    grads = _mask(spread(grad, order.slots, K), order).to(narrow)
    hidden, by_hidden = activate_with_gradient(pre.to(wide), config)

    d_hidden = grouped_product(grads, experts.down.to(narrow), order.ends)
    d_hidden = _mask(d_hidden, order).to(wide)
    # <dy, D a + c> = <D^T dy, a> + <dy, c>: the experts' outputs need not be kept.
    dots = (d_hidden * hidden).sum(1)
    if experts.down_bias is not None and needs.weights and not on_input:
        dots = dots + (grads.to(wide) * experts.down_bias.to(wide)[order.expert_of]).sum(1)
    if not on_input:
        hidden, d_hidden = hidden * factors, d_hidden * factors
    if needs.down:
        found["down"] = grouped_outer(grads, hidden.to(narrow), order.ends)
    if needs.down_bias:
        weighted = grads if on_input else (grads.to(wide) * factors).to(narrow)
        found["down_bias"] = _sum_by_expert(weighted, order)

    d_pre = by_hidden(d_hidden).to(narrow)
    if needs.gate_up_bias:
        found["gate_up_bias"] = _sum_by_expert(d_pre, order)
    if needs.gate_up:
        rows = spread(x, order.slots, K)
        rows = _mask(rows.to(wide) * factors if on_input else rows, order)
        found["gate_up"] = grouped_outer(d_pre, rows.to(narrow), order.ends)
    if needs.x or (needs.weights and on_input):
        d_rows = grouped_product(d_pre, experts.gate_up.to(narrow), order.ends)
        d_rows = _mask(d_rows, order).to(wide)
        if on_input:
            dots = (d_rows * _mask(spread(x, order.slots, K), order).to(wide)).sum(1)
            d_rows = d_rows * factors
        found["x"] = gather_sum(d_rows, order.slots, T, K)
    if needs.weights:
        # Every slot has a row here, so every element is written.
        found["weights"] = torch.empty_like(dots).scatter_(0, order.slots, dots).view(T, K)
    return tuple(
        found[name].to(tensors[name].dtype) if wanted else None
        for name, wanted in needs._asdict().items()
    )


def batched_experts(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """`experts_batched_torch` on checked arguments."""
    wide = accumulation_dtype(x)
    in_use = (torch.arange(x.shape[1], device=x.device) < tokens_per_expert[:, None])[..., None]
    # The input is masked as well: a NaN in a row that nobody asked for would pass through the
    # product with a gradient of zero.
    rows = torch.where(in_use, x, 0.0)
    pre = _batched_linear(rows, experts.gate_up, experts.gate_up_bias).to(wide)
    hidden = activate(pre, config).to(x.dtype)
    rows = _batched_linear(hidden, experts.down, experts.down_bias).to(wide)
    return torch.where(in_use, rows, 0.0).to(x.dtype)


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows times the matrix of the expert they stand under.

    Args:
        rows: [S, A], in expert order.
        matrices: [E, A, B], the rows' dtype, any strides.
        ends: [E], int64, where each expert's rows end.

    Returns:
        [S, B], the rows' dtype. Rows past the last end may hold anything.

    >>> rows, matrices = torch.ones(3, 1), torch.tensor([[[2.0]], [[5.0]]])
    >>> grouped_product(rows, matrices, torch.tensor([1, 3])).flatten().tolist()
    [2.0, 5.0, 5.0]
    """
    S, B = rows.shape[0], matrices.shape[2]
    if S == 0 or min(matrices.shape) == 0:
        return rows.new_zeros(S, B)
    if _on_npu(rows):
        return _npu_grouped_matmul(rows, matrices, ends, group_type=0, split_item=2)
    if rows.dtype is torch.float64:
        bounds = [0, *ends.tolist(), S]
        parts = zip(bounds, bounds[1:], [*matrices.unbind(0), matrices[0]], strict=False)
        return torch.cat([rows[start:end] @ matrix for start, end, matrix in parts])
    rows, matrices = _aligned(rows), _aligned(matrices)
    return F.grouped_mm(rows, matrices, offs=ends.to(torch.int32))[:, :B]


def grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each expert's left rows transposed times its right rows.

    Args:
        left: [S, A], in expert order.
        right: [S, B], the dtype of left.
        ends: [E], int64, where each expert's rows end; rows past the last one are zeros.

    Returns:
        [E, A, B], the dtype of left; zeros for an expert without rows.

    >>> rows = torch.tensor([[2.0], [3.0], [4.0]])
    >>> grouped_outer(rows, rows, torch.tensor([2, 2, 3])).flatten().tolist()
    [13.0, 0.0, 16.0]
    """
    E, (S, A), B = len(ends), left.shape, right.shape[1]
    if min(E, S, A, B) == 0:
        return left.new_zeros(E, A, B)
    if _on_npu(left):
        return _npu_grouped_matmul(left.T, right, ends, group_type=2, split_item=3)
    if left.dtype is torch.float64:
        bounds = [0, *ends.tolist()]
        parts = pairwise(bounds)
        return torch.stack([left[start:end].T @ right[start:end] for start, end in parts])
    offsets = ends.to(torch.int32)
    products = F.grouped_mm(_aligned(left).T, _aligned(right), offs=offsets)[:, :A, :B]
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    # Whether an empty sum is written is nowhere promised.
    return products.masked_fill(empty[:, None, None], 0.0)


def _npu_grouped_matmul(
    left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor, group_type: int, split_item: int
) -> torch.Tensor:
    # Its last group has to end at the last row. Those of nobody are zeros: they add nothing.
    ends = torch.cat([ends[:-1], ends.new_full((1,), left.shape[-1 if group_type == 2 else 0])])
    [out] = torch_npu.npu_grouped_matmul(
        [left],
        [right],
        group_list=ends,
        split_item=split_item,
        group_type=group_type,
        group_list_type=0,
    )
    return out


def _on_npu(tensor: torch.Tensor) -> bool:
    return torch_npu is not None and tensor.device.type == "npu"


def _in_expert_order(
    expert_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> _Rows:
    local = local_ids(expert_ids, num_experts, expert_map)
    slots, ends = sort_slots(local, num_experts)
    expert_of = local.flatten()[slots]
    return _Rows(slots, ends, expert_of.clamp(min=0), (expert_of >= 0)[:, None])


def _factors(weights: torch.Tensor, order: _Rows, x: torch.Tensor) -> torch.Tensor:
    """The routing weight of each row, [S, 1], 0 for those of nobody."""
    return _mask(weights.flatten()[order.slots].to(accumulation_dtype(x))[:, None], order)


def _product_dtype(x: torch.Tensor, experts: ExpertWeights) -> torch.dtype:
    """x's dtype where the matrices have it too, else a wide one; on a CPU always a wide one."""
    same = x.dtype == experts.gate_up.dtype == experts.down.dtype
    return x.dtype if same and x.device.type != "cpu" else accumulation_dtype(x)


def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: _Rows,
    wide: torch.dtype,
) -> torch.Tensor:
    """Rows times the transposed weight, plus its bias; zeros for the rows of nobody."""
    product = grouped_product(rows, weight.to(rows.dtype).transpose(1, 2), order.ends).to(wide)
    return _mask(product if bias is None else product + bias.to(wide)[order.expert_of], order)


def _sum_by_expert(rows: torch.Tensor, order: _Rows) -> torch.Tensor:
    """The sum of each expert's rows, [E, B]: a product, for adding into an index is atomic."""
    return grouped_outer(rows, torch.ones_like(rows[:, :1]), order.ends)[:, :, 0]


def _aligned(operand: torch.Tensor) -> torch.Tensor:
    """The operand as it is where `grouped_mm` takes it, else a dense copy padded with zeros.

    Matrices may be dense in either order; rows of a product, [S, A], are padded in A alone.
    """
    multiple = 16 // operand.element_size()
    sides = operand.shape[1:]
    dense = operand.is_contiguous() or (
        operand.ndim == 3 and operand.transpose(1, 2).is_contiguous()
    )
    if dense and operand.data_ptr() % 16 == 0 and not any(side % multiple for side in sides):
        return operand
    missing = [(0, -side % multiple) for side in reversed(sides)]
    return F.pad(operand, [n for pair in missing for n in pair]).clone(
        memory_format=torch.contiguous_format
    )


def _batched_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if len({t.dtype for t in (rows, weight, bias) if t is not None}) > 1:
        wide = accumulation_dtype(rows)
        rows, weight = rows.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    # Autocast would round both factors to a narrower dtype.
    with without_autocast(rows):
        if bias is None:
            return torch.bmm(rows, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))


def _mask(rows: torch.Tensor, order: _Rows) -> torch.Tensor:
    """Zeros for the rows of nobody, whatever they hold."""
    return torch.where(order.here, rows, 0.0)
