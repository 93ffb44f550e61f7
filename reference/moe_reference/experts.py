r"""Experts: what the chosen experts compute, and in what layouts their weights come.

For ids $e_{tk}$ and weights $w_{tk}$ the output is

$$
y_t = \sum_{k=1}^{K} w_{tk} \, f_{e_{tk}}(x_t), \qquad
f_e(x) = D_e \, a(U_e x + b_e) + c_e
$$

with $U_e$ the rows of gate and up, $D_e$ the rows of down, $a$ the activation and $b_e, c_e$ the
biases. The weight multiplies the output, $c_e$ included. With `weight_on` = input it multiplies x
instead, $f_e(w_{tk} x_t)$, and no bias: for a non-linear expert that is another function.

Three ways to compute it: pair by pair (`experts`, the definition), stage by stage on rows sorted by
expert (`experts_grouped`), and on a batch with the same number of rows for every expert
(`experts_batched`).

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token, S rows, C rows of a batched expert (capacity).

Sums, products and activations are in float32, or float64 for float64 x, and rounded to x's dtype
once at the end. An id below 0, or at or above the number of experts, or mapped to -1, means *not
here*: the pair contributes nothing, whatever its weight, and gets a gradient of zero.
"""

import torch

from moe_reference.activations import activate
from moe_reference.alignment import check_counts, local_ids
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import accumulation_dtype, combine, dispatch
from moe_reference.layouts import (
    LAYOUTS,
    Layout,
    SeparateWeights,
    from_layout,
    from_separate,
    infer_transposed,
    init_experts,
    to_layout,
    to_separate,
)

__all__ = [
    "LAYOUTS",
    "Layout",
    "SeparateWeights",
    "activate",
    "check_experts",
    "expert",
    "experts",
    "experts_batched",
    "experts_grouped",
    "from_layout",
    "from_separate",
    "infer_transposed",
    "init_experts",
    "to_layout",
    "to_separate",
]


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

    >>> eye = torch.eye(2)[None]
    >>> doubling = ExpertWeights(gate_up=torch.cat([eye, 2 * eye]), down=torch.cat([eye, eye]))
    >>> x, weights, ids = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 1.0]]), [[0, 1]]
    >>> config = ExpertsConfig("relu", gated=False)
    >>> globals()["experts"](x, doubling, weights, torch.tensor(ids), config).tolist()
    [[2.5, 7.5]]
    """
    check_arguments(x, experts, weights, expert_ids, config)
    wide = accumulation_dtype(x)
    x_TH, weights_TK = x.to(wide), weights.to(wide)
    rows_TK = local_ids(expert_ids, len(experts.down), expert_map)

    pairs_TKH = _sum_of_nothing(x, weights, experts).expand(*expert_ids.shape, x.shape[1]).clone()
    for e, one in enumerate(_one_by_one(experts, wide)):
        tokens_S, ks_S = (rows_TK == e).nonzero(as_tuple=True)
        weights_S1 = weights_TK[tokens_S, ks_S, None]
        if config.weight_on == "input":
            pairs_TKH[tokens_S, ks_S] = expert(x_TH[tokens_S] * weights_S1, one, config)
        else:
            pairs_TKH[tokens_S, ks_S] = expert(x_TH[tokens_S], one, config) * weights_S1
    return pairs_TKH.sum(dim=1).to(x.dtype)
