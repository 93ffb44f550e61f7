r"""Experts: what the chosen experts compute, and in what layouts their weights come.

For ids $e_{tk}$ and weights $w_{tk}$ the output is

$$
y_t = \sum_{k=1}^{K} w_{tk} \, f_{e_{tk}}(x_t), \qquad
f_e(x) = D_e \, a(U_e x + b_e) + c_e
$$

with $U_e$ the rows of gate and up, $D_e$ the rows of down, $a$ the activation and $b_e, c_e$ the
biases. The weight multiplies the output, $c_e$ included. With `weight_on` = input it multiplies x
instead, $f_e(w_{tk} x_t)$, and no bias: for a non-linear expert that is another function.

Three ways to compute it: expert by expert (`experts`, the definition), stage by stage on rows
sorted by expert (`experts_grouped`), and on a batch with the same number of rows for every expert
(`experts_batched`).

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token, S rows, C rows of a batched expert (capacity).

Sums, products and activations are in float32, or float64 for float64 x, and rounded to x's dtype
once at the end. An id below 0, or at or above the number of experts, or mapped to -1, means *not
here*: the pair contributes nothing, whatever its weight, and gets a gradient of zero.
"""

from itertools import pairwise

import torch

from moe_reference.activations import OneExpert as OneExpert
from moe_reference.activations import activate as activate
from moe_reference.activations import feed_forward as feed_forward
from moe_reference.activations import one_by_one as one_by_one
from moe_reference.activations import product
from moe_reference.alignment import local_ids
from moe_reference.checks import (
    IDS,
    check_counts,
    check_experts,
    check_routing,
    check_tensor,
)
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import accumulation_dtype, combine, dispatch, inclusive_offsets
from moe_reference.initialization import init_experts as init_experts
from moe_reference.layouts import LAYOUTS as LAYOUTS
from moe_reference.layouts import Layout as Layout
from moe_reference.layouts import from_layout as from_layout
from moe_reference.layouts import from_separate as from_separate
from moe_reference.layouts import infer_transposed as infer_transposed
from moe_reference.layouts import to_layout as to_layout
from moe_reference.layouts import to_separate as to_separate


def experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum over a token's experts: the definition, one expert after the other.

    Args:
        x: [T, H], any float dtype and strides.
        experts: weights of E experts, any float dtype.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64. Two equal ids in a row are both counted.
        config: how an expert computes.
        expert_map: int32 or int64, one entry per global expert: its row in `experts`, or -1. Ids
            are global with it.

    Returns:
        [T, H], x's dtype; differentiable in x, weights and experts. Gradients are zero, not None,
        where nothing was routed.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or the map leads to a row that there is not.

    Source: Shazeer et al. (arXiv 1701.06538), equation 1; biases and their weighting, gpt-oss model
    code; weights on the input, Llama 4 model code.

    >>> two_experts = ExpertWeights(torch.ones(2, 1, 1), down=torch.tensor([[[1.0]], [[2.0]]]))
    >>> x, weights, ids = torch.tensor([[3.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0, 1]])
    >>> experts(x, two_experts, weights, ids, ExpertsConfig("relu", gated=False)).tolist()
    [[7.5]]
    """
    check_routing(x, weights, expert_ids)
    check_experts(experts, x, config)
    wide = accumulation_dtype(x)
    x_TH, weights_TK = x.to(wide), weights.to(wide)
    rows_TK = local_ids(expert_ids, len(experts.down), expert_map)

    pairs_TKH = x_TH.new_zeros(*rows_TK.shape, x.shape[1]) + sum_of_nothing(x, weights, experts)
    for e, one in enumerate(one_by_one(experts)):
        tokens_S, ks_S = (rows_TK == e).nonzero(as_tuple=True)
        if len(tokens_S) == 0:
            continue
        weights_S1 = weights_TK[tokens_S, ks_S, None]
        if config.weight_on == "input":
            pairs_TKH[tokens_S, ks_S] = feed_forward(x_TH[tokens_S] * weights_S1, one, config)
        else:
            pairs_TKH[tokens_S, ks_S] = feed_forward(x_TH[tokens_S], one, config) * weights_S1
    return pairs_TKH.sum(dim=1).to(x.dtype)


def experts_grouped(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same sum, stage by stage: sort, first products, activation, second products, combine.

    This is the shape of a grouped matrix product. Arguments, result and errors are those of
    `experts`.

    >>> two_experts = ExpertWeights(torch.ones(2, 1, 1), down=torch.tensor([[[1.0]], [[2.0]]]))
    >>> x, weights, ids = torch.tensor([[3.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0, 1]])
    >>> experts_grouped(x, two_experts, weights, ids, ExpertsConfig("relu", gated=False)).tolist()
    [[7.5]]
    """
    check_routing(x, weights, expert_ids)
    check_experts(experts, x, config)
    wide = accumulation_dtype(x)
    weights_TK = weights.to(wide)
    rows_TK = local_ids(expert_ids, len(experts.down), expert_map)

    x_SH, tokens_per_expert, slots_S = dispatch(x.to(wide), rows_TK, len(experts.down))
    if config.weight_on == "input":
        x_SH = x_SH * weights_TK.flatten()[slots_S, None]
        weights_TK = torch.ones_like(weights_TK)
    ends_E = inclusive_offsets(tokens_per_expert)
    pre_SJ = grouped_product(x_SH, experts.gate_up, experts.gate_up_bias, ends_E)
    out_SH = grouped_product(activate(pre_SJ, config), experts.down, experts.down_bias, ends_E)
    summed_TH = combine(out_SH, slots_S, weights_TK) + sum_of_nothing(x, weights, experts)
    return summed_TH.to(x.dtype)


def experts_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Each expert on its own rows of a batch, unweighted.

    Weighting is left to whoever made the batch: on the way in, or in `combine`.

    Args:
        x: [E, C, H], any float dtype and strides. Rows past the count may hold anything.
        tokens_per_expert: [E], int32 or int64, from 0 to C each: rows in use.
        experts: weights of E experts, any float dtype.
        config: how an expert computes; `weight_on` has no effect.

    Returns:
        [E, C, H], x's dtype, differentiable in x and experts; rows past the count are zero.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a count is outside [0, C].

    Source: vLLM's batched experts format.

    >>> one_expert = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.full((1, 1, 1), 2.0))
    >>> x, counts = torch.tensor([[[3.0], [float("nan")]]]), torch.tensor([1])
    >>> experts_batched(x, counts, one_expert, ExpertsConfig("relu", gated=False)).tolist()
    [[[6.0], [0.0]]]
    """
    check_tensor("x", x, ("E", "C", "H"))
    check_tensor("tokens_per_expert", tokens_per_expert, (len(x),), IDS)
    check_counts(tokens_per_expert, x.shape[1])
    check_experts(experts, x, config, len(x))
    x_ECH = x.to(accumulation_dtype(x))
    out_ECH = torch.zeros_like(x_ECH) + sum_of_nothing(x, experts)
    counts = tokens_per_expert.tolist()
    for e, (one, count) in enumerate(zip(one_by_one(experts), counts, strict=True)):
        out_ECH[e, :count] = feed_forward(x_ECH[e, :count], one, config)
    return out_ECH.to(x.dtype)


def grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, biases: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """Each group of rows times its own matrix, plus its own bias.

    Args:
        rows: [S, A] in expert order.
        matrices: [E, B, A].
        biases: [E, B] or None.
        ends: [E], where each expert's rows end, the last of them at S.

    Returns:
        [S, B], the dtype of rows.

    Raises:
        ValueError: the last end is not S: rows would be left out, or there are not so many.

    >>> rows, matrices = torch.ones(3, 1), torch.tensor([[[2.0]], [[5.0]]])
    >>> grouped_product(rows, matrices, None, torch.tensor([1, 3])).flatten().tolist()
    [2.0, 5.0, 5.0]
    """
    total = int(ends[-1]) if len(ends) else 0
    if total != len(rows):
        raise ValueError(f"ends: expected the last one at {len(rows)}, got {total}")
    groups = pairwise([0, *ends.tolist()])
    own_biases = [None] * len(matrices) if biases is None else biases.unbind(0)
    products = [
        product(rows[start:end], matrix, bias)
        for (start, end), matrix, bias in zip(groups, matrices.unbind(0), own_biases, strict=True)
    ]
    return torch.cat([rows.new_zeros(0, matrices.shape[1]), *products])


def sum_of_nothing(*parts: torch.Tensor | ExpertWeights) -> torch.Tensor:
    """0, connected to every part: gradients are zero instead of None where no row is routed.

    Args:
        *parts: tensors [N, ...] of any shape and float dtype, and weights of experts.

    Returns:
        [], of the last part's dtype.

    >>> w = torch.ones(2, requires_grad=True)
    >>> sum_of_nothing(w).backward()
    >>> w.grad
    tensor([0., 0.])
    """
    zero = torch.zeros(())
    for part in parts:
        tensors = (part,) if isinstance(part, torch.Tensor) else vars(part).values()
        for tensor in tensors:
            if tensor is not None:
                zero = zero.to(tensor) + tensor[:0].sum()
    return zero
