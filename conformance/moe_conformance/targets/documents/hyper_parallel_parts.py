"""hyper_parallel's functions, and what its targets declare."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertWeights

from moe_conformance.target import Capabilities

Tensor = torch.Tensor

WIDE = Capabilities(
    # Scores, bias and counts are cast to float32.
    dtypes=("float32",),
    routing={
        "score": ("sigmoid", "softmax"),
        "order": ("score_then_topk",),
        "renormalize": (False,),
        "scale_when": ("always",),
        "group_score": ("max",),
        "mask_fill": ("-inf",),
        "hash_table": (False,),
    },
    # Ids are the router's own, and every pair has a row.
    align={"invalid_ids": (False,)},
    experts={
        "activation": ("silu",),
        "gated": (True,),
        "bias": (False,),
        "expert_map": (False,),
        "invalid_ids": (False,),
    },
    layer={
        "balance": (None, "switch"),
        "shared_gate": (False,),
        "shared_scale": (1.0,),
        "router_bias": (False,),
        # "Gate in float32", says a comment.
        "router_dtype": ("float32",),
        "padding_mask": (False,),
    },
    balance={
        "loss": ("switch",),
        "score": ("softmax",),
        "padding_mask": (False,),
        "tokens_per_expert": (False,),
        "centred": (False,),
        "invalid_ids": (False,),
    },
    gradients=("route", "balance_loss", "dispatch", "combine", "experts", "layer"),
    # x is viewed, and the parameters are those of one module.
    strides=False,
    mixed_dtypes=False,
)

NARROW = replace(
    WIDE,
    dtypes=("bfloat16", "float16"),
    operations=("update_bias", "combine", "experts", "layer"),
    # Every step is rounded to the module's dtype.
    rounding_points=(
        "pre_activation",
        "gate_activation",
        "activation",
        "expert_output",
        "weighted_output",
        "combine",
        "shared_output",
    ),
)

GROUPED = replace(
    WIDE,
    operations=("experts",),
    # The product wants rows of a multiple of 16 bytes.
    hidden_multiple=4,
    intermediate_multiple=4,
)


def mask_groups(scores: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Scores, minus infinity but in the groups that have the best single experts."""
    per_group = scores.shape[1] // num_groups
    best = scores.view(-1, num_groups, per_group).amax(dim=-1).topk(topk_groups, dim=-1).indices
    closed = torch.ones(len(scores), num_groups, dtype=torch.bool, device=scores.device)
    closed = closed.scatter(1, best, False).repeat_interleave(per_group, dim=1)
    return scores.masked_fill(closed, float("-inf"))


def balance(weights: Tensor, expert_ids: Tensor, num_experts: int) -> Tensor:
    """E times the sum over each mean probability times each share.

    Wrong: means and shares both add up to 1, so that the result is E for any router. And the
    probabilities are of the K chosen experts, by their place in the choice.
    """
    one_hot = torch.zeros(expert_ids.numel(), num_experts, device=weights.device)
    one_hot = one_hot.scatter(1, expert_ids.flatten().unsqueeze(1).long(), 1.0)
    mean = weights.float().softmax(dim=-1).mean(dim=0)
    return num_experts * (mean.unsqueeze(-1) * one_hot.mean(dim=0).unsqueeze(0)).sum()


def experts_in_a_loop(rows: Tensor, experts: ExpertWeights, counts: Tensor) -> Tensor:
    """Each expert on its slice of the rows."""
    parts, start = [], 0
    for e, count in enumerate(counts.tolist()):
        if count > 0:
            mine = rows[start : start + count]
            gate, up = experts.gate_up[e].chunk(2)
            parts.append((F.silu(mine @ gate.T) * (mine @ up.T)) @ experts.down[e].T)
            start += count
    # Wrong: zeros that hang on the rows only, so that the weights have no gradient.
    return torch.cat(parts) if parts else rows * 0.0


def experts_grouped(rows: Tensor, experts: ExpertWeights, counts: Tensor) -> Tensor:
    """All experts in three grouped products."""

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return torch._grouped_mm(rows, matrices.transpose(1, 2).contiguous(), offs=ends)

    # Wrong: the end of the last expert is missing.
    ends = counts[:-1].cumsum(0).to(torch.int32)
    gate, up = experts.gate_up.chunk(2, dim=1)
    return product(F.silu(product(rows, gate)) * product(rows, up), experts.down)


def add_up(rows: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row added to that of its token, in memory of the given dtype."""
    tokens = (slots.long() // weights.shape[1]).unsqueeze(1).expand(-1, rows.shape[1])
    zeros = torch.zeros(len(weights), rows.shape[1], dtype=dtype, device=rows.device)
    return zeros.scatter_add(0, tokens, rows)
