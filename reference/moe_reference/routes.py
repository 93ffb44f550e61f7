"""Routes: the ways to compute the experts that `backends` chooses from, in plain PyTorch.

What a kernel may do differently is an argument: the product, the activation, the reduction, where
the output goes. Whatever they are, the rows stand in expert order between dispatch and combine.

Dimension key: T tokens, K experts per token, S pairs that are here, E experts, H hidden size, I
intermediate size, J = 2I (I without a gate), C rows of a batched expert (capacity).
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import cast

import torch

from moe_reference.activations import activate
from moe_reference.alignment import local_ids
from moe_reference.backends import Route
from moe_reference.checks import IDS, check_experts, check_routing, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights, WeightOn
from moe_reference.dispatch import (
    accumulation_dtype,
    batch_rows,
    combine,
    dispatch,
    inclusive_offsets,
    unbatch_rows,
)
from moe_reference.experts import experts as experts_one_by_one
from moe_reference.experts import experts_batched, grouped_product

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def experts_by_pair(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    *,
    product: Product = grouped_product,
    activation: Callable[[torch.Tensor, ExpertsConfig], torch.Tensor] = activate,
    reduction: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = combine,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Experts in the standard format, with parts that can be exchanged.

    Arguments, result and errors are those of `moe_reference.experts.experts`, and besides:

    Args:
        product: as `grouped_product`, or `gathered_product`, or `grouped_product_npu`.
        activation: `(pre_activation [S, J], config) -> [S, I]`.
        reduction: `(rows [S, H], slots [S], weights [T, K]) -> [T, H]`. The weights are ones where
            x was weighed, and may be NaN where no slot leads.
        out: [T, H] of x's dtype, or None. It is written to and returned. It may be x itself, which
            has been read by then.

    Raises:
        ValueError: `out` where gradients are wanted, which a write in place would cut off; or rows
            of `out` that lie on top of each other.

    Source: vLLM's `fused_marlin_moe`; with a custom sum that returns what the sum returns, nothing.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> x, weights, ids = torch.tensor([[3.0]]), torch.tensor([[0.5]]), torch.tensor([[0]])
    >>> experts_by_pair(x, one, weights, ids, ExpertsConfig("relu", gated=False), out=x) is x
    True
    """
    check_routing(x, weights, expert_ids)
    check_experts(experts, x, config)
    if out is not None:
        check_tensor("out", out, tuple(x.shape), (x.dtype,))
        if any(
            stride == 0 < size - 1 for stride, size in zip(out.stride(), out.shape, strict=True)
        ):
            raise ValueError("out: expected a place for each number, got an expanded tensor")
    x_SH, tokens_per_expert, slots_S, weights_TK = _rows(
        x, experts, weights, expert_ids, config, expert_map
    )
    ends_E = inclusive_offsets(tokens_per_expert)
    pre_SJ = product(x_SH, experts.gate_up, experts.gate_up_bias, ends_E)
    out_SH = product(activation(pre_SJ, config), experts.down, experts.down_bias, ends_E)
    y_TH = reduction(out_SH, slots_S, weights_TK)
    check_tensor("reduction", y_TH, tuple(x.shape))
    # With no expert at all nothing leads back to x; its gradient is zero nevertheless, not None.
    for part in (x_SH, *vars(experts).values()):
        y_TH = y_TH if part is None else y_TH + part[:0].sum()
    if out is None:
        return y_TH.to(x.dtype)
    if y_TH.requires_grad:
        raise ValueError("out: expected None where gradients are wanted, got a tensor")
    return out.copy_(y_TH)


def experts_by_batch(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    capacity: int | None = None,
) -> torch.Tensor:
    """Experts in the batched format: `experts_batched`, and around it what is the caller's.

    Arguments, result and errors are those of `moe_reference.experts.experts`, and besides:

    Args:
        capacity: C, at least the largest count, which None takes.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> x, weights, ids = torch.tensor([[3.0]]), torch.tensor([[0.5]]), torch.tensor([[0]])
    >>> experts_by_batch(x, one, weights, ids, ExpertsConfig("relu", gated=False)).tolist()
    [[1.5]]
    """
    check_routing(x, weights, expert_ids)
    check_experts(experts, x, config)
    x_SH, tokens_per_expert, slots_S, weights_TK = _rows(
        x, experts, weights, expert_ids, config, expert_map
    )
    C = max(tokens_per_expert.tolist(), default=0) if capacity is None else capacity
    x_ECH = batch_rows(x_SH, tokens_per_expert, C)
    out_ECH = experts_batched(x_ECH, tokens_per_expert, experts, config)
    return combine(unbatch_rows(out_ECH, tokens_per_expert), slots_S, weights_TK).to(x.dtype)


def weigh_and_reduce(
    pairs: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    weight_on: WeightOn = "output",
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """What experts in the standard format leave to a caller that they delegate to.

    Args:
        pairs: [T, K, H], any float dtype. The row of a pair that is not here may hold anything:
            kernels do not write it.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        num_experts: E, the experts that made the pairs.
        weight_on: with input they are only added up.
        expert_map: int32 or int64, one entry per global expert: its row, or -1; or None.

    Returns:
        [T, H], the dtype of `pairs`; summed in float32, or float64 for float64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Source: vLLM's `TopKWeightAndReduceContiguous`, which multiplies in place.

    >>> pairs = torch.tensor([[[3.0], [float("nan")]]])
    >>> weigh_and_reduce(pairs, torch.tensor([[0.5, 0.5]]), torch.tensor([[0, -1]]), 1).tolist()
    [[1.5]]
    """
    check_tensor("pairs", pairs, ("T", "K", "H"))
    check_tensor("weights", weights, tuple(pairs.shape[:2]))
    check_tensor("expert_ids", expert_ids, tuple(pairs.shape[:2]), IDS)
    here_S = local_ids(expert_ids, num_experts, expert_map).flatten() >= 0
    slots_S = here_S.nonzero()[:, 0]
    weights_TK = weights if weight_on == "output" else torch.ones_like(weights)
    return combine(pairs.flatten(0, 1)[slots_S], slots_S, weights_TK)


def gathered_product(
    rows: torch.Tensor, matrices: torch.Tensor, biases: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """`grouped_product` with a copy of its expert's matrix for every row: S · A · B numbers.

    Arguments and result are those of `grouped_product`.

    >>> rows, matrices = torch.tensor([[1.0], [1.0]]), torch.tensor([[[2.0]], [[3.0]]])
    >>> gathered_product(rows, matrices, None, torch.tensor([1, 2])).tolist()
    [[2.0], [3.0]]
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    e_S = torch.arange(len(matrices), device=ends.device).repeat_interleave(counts)
    # As in `product`: autocast would round the factors.
    with torch.autocast(rows.device.type, enabled=False):
        products = torch.einsum("sa,sba->sb", rows, matrices.to(rows)[e_S])
    return products if biases is None else products + biases.to(rows)[e_S]


def grouped_product_npu(
    rows: torch.Tensor, matrices: torch.Tensor, biases: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """As `grouped_product`, in one call of `torch_npu.npu_grouped_matmul`.

    Written from the operator's documentation, and not run on an NPU. Training needs an autograd
    function around it.

    Args:
        rows: [S, A] in expert order, float16, bfloat16 or float32.
        matrices: [E, B, A].
        biases: [E, B] or None.
        ends: [E], where each expert's rows end.

    Returns:
        [S, B], the dtype of rows.

    Raises:
        ModuleNotFoundError: there is no torch_npu.

    Source: torch_npu 7.0.0: matrices [E, A, B]; with `group_list_type` 0 the list says where each
    group ends, with 1 how long it is; float32 biases for bfloat16 rows; one tensor as the result
    with `split_item` 3.

    >>> grouped_product_npu(torch.ones(1, 1), torch.ones(1, 1, 1), None, torch.tensor([1]))
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'torch_npu'
    """
    bias_dtype = torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype
    [product] = import_module("torch_npu").npu_grouped_matmul(
        [rows],
        [matrices.to(rows).transpose(1, 2).contiguous()],
        bias=None if biases is None else [biases.to(rows.device, bias_dtype)],
        group_list=ends.to(torch.int64),
        group_list_type=0,
        group_type=0,
        split_item=3,
    )
    return cast(torch.Tensor, product)


ROUTES: dict[Route, Callable[..., torch.Tensor]] = {
    "fused": experts_by_pair,
    "gather": partial(experts_by_pair, product=gathered_product),
    "loop": experts_one_by_one,
}
"""The three routes, with the arguments and the result of `moe_reference.experts.experts`."""


def _rows(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `dispatch` gives, in the wide dtype, and the weights that are left to multiply by."""
    wide = accumulation_dtype(x)
    weights_TK = weights.to(wide)
    rows_TK = local_ids(expert_ids, len(experts.down), expert_map)
    x_SH, tokens_per_expert, slots_S = dispatch(x.to(wide), rows_TK, len(experts.down))
    if config.weight_on == "input":
        x_SH = x_SH * weights_TK.flatten()[slots_S, None]
        weights_TK = torch.ones_like(weights_TK)
    return x_SH, tokens_per_expert, slots_S, weights_TK
