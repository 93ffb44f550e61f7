"""Faults of routing that show on few inputs only."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults.rare import Arguments, last_row_zero, rare


def weights_exchanged(out: Any, a: Arguments) -> Any:
    """Of each token's weights the first and the last are exchanged."""
    weights, ids = out
    order = torch.arange(weights.shape[1])
    order[[0, -1]] = order[[-1, 0]]
    return weights[:, order], ids


def weights_larger(out: Any, a: Arguments) -> Any:
    """The weights are an eighth too large."""
    return out[0] * 1.125, out[1]


def last_weight_gone(out: Any, a: Arguments) -> Any:
    """The last token's weights are zero."""
    return last_row_zero(out[0], a), out[1]


def id_moved(out: Any, a: Arguments) -> Any:
    """The last token's first expert is the next one."""
    weights, ids = out
    moved = ids.clone()
    moved[-1:, :1] = (moved[-1:, :1] + 1) % a["logits"].shape[1]
    return weights, moved


rare(
    "route",
    "beyond-256-experts",
    "more than 256 experts",
    lambda a: a["logits"].shape[1] > 256,
    last_weight_gone,
    "GATE-03",
    "GATE-06",
    "GATE-07",
    "GATE-14",
    thread="imp #2056",
)

rare(
    "route",
    "at-60-experts",
    "exactly 60 experts",
    lambda a: a["logits"].shape[1] == 60,
    weights_larger,
    "GATE-06",
    "GATE-07",
    "GATE-09",
    "GATE-21",
    thread="vLLM-metax #270",
)

rare(
    "route",
    "at-257-experts",
    "257 experts",
    lambda a: a["logits"].shape[1] == 257,
    id_moved,
    "GATE-04",
    "GATE-05",
    "GATE-06",
    "GATE-16",
    thread="aiter #2359",
)

rare(
    "route",
    "with-one-token",
    "a single token",
    lambda a: len(a["logits"]) == 1,
    weights_larger,
    "GATE-03",
    "GATE-06",
    "GATE-07",
    "GATE-09",
    thread="SGLang #25852",
)

rare(
    "route",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: len(a["logits"]) > 64,
    last_weight_gone,
    "GATE-03",
    "GATE-06",
    "GATE-07",
    "GATE-09",
    thread="aiter #2359",
)

rare(
    "route",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: len(a["logits"]) == 16,
    id_moved,
    "GATE-03",
    "GATE-04",
    "GATE-06",
    "GATE-07",
)

rare(
    "route",
    "at-k-6",
    "six experts per token",
    lambda a: a["config"].top_k == 6,
    weights_exchanged,
    "GATE-03",
    "GATE-06",
    "GATE-07",
    "GATE-09",
)

rare(
    "route",
    "with-one-open-group-of-eight",
    "one open group of eight",
    lambda a: a["config"].num_groups == 8 and a["config"].topk_groups == 1,
    weights_larger,
    "GATE-07",
    "GATE-18",
)

rare(
    "route",
    "with-a-share-of-two-groups",
    "a group's share of K and two open groups",
    lambda a: (
        a["config"].group_score == "topk_share_sum"
        and a["config"].topk_groups == 2
        and a["config"].num_groups > 1
    ),
    weights_larger,
    "GATE-03",
    "GATE-07",
    "GATE-09",
    "GATE-18",
    thread="Megatron #1441",
)

rare(
    "route",
    "with-l2-and-a-clamp",
    "the Euclidean norm, clamped",
    lambda a: (
        a["config"].renormalize
        and a["config"].norm == "l2"
        and a["config"].epsilon_mode == "clamp"
        and a["config"].epsilon > 0
    ),
    weights_larger,
    "GATE-03",
    "GATE-07",
    "GATE-09",
    "GATE-14",
)

rare(
    "route",
    "with-sqrtsoftplus-and-groups",
    "sqrtsoftplus and groups",
    lambda a: a["config"].score == "sqrtsoftplus" and a["config"].num_groups > 1,
    last_weight_gone,
    "GATE-03",
    "GATE-07",
    "GATE-09",
    "GATE-15",
)

rare(
    "route",
    "with-sigmoid-after-top-k-and-a-scale",
    "sigmoid of the chosen logits and a scale",
    lambda a: (
        a["config"].score == "sigmoid"
        and a["config"].order == "topk_then_score"
        and a["config"].scale != 1.0
    ),
    weights_larger,
    "GATE-03",
    "GATE-09",
    "GATE-18",
    thread="vLLM #45037",
)

rare(
    "route",
    "with-a-bias-below-zero",
    "a bias that is below zero everywhere",
    lambda a: a.get("bias") is not None and bool((a["bias"] < 0).all()),
    id_moved,
    "GATE-03",
    "GATE-05",
    "GATE-12",
    thread="transformers #45441",
)

rare(
    "route",
    "in-float16-at-k-1",
    "float16 logits and one expert per token",
    lambda a: a["logits"].dtype is torch.float16 and a["config"].top_k == 1,
    weights_larger,
    "GATE-03",
    "GATE-06",
    "GATE-07",
    "GATE-09",
    thread="minimind #858",
)

rare(
    "route",
    "in-bfloat16-with-a-table",
    "bfloat16 logits and a hash table",
    lambda a: a["logits"].dtype is torch.bfloat16 and a["config"].hash_table is not None,
    last_weight_gone,
    "GATE-14",
    thread="verl-ascend-recipe #126",
)

rare(
    "route",
    "with-strides-and-a-bias",
    "logits that are not contiguous, and a bias",
    lambda a: not a["logits"].is_contiguous() and a.get("bias") is not None,
    weights_larger,
    "GATE-03",
    "GATE-09",
    "GATE-18",
    "GATE-21",
)

rare(
    "route",
    "with-all-groups-open",
    "all groups open",
    lambda a: 1 < a["config"].num_groups == a["config"].topk_groups,
    id_moved,
    "GATE-01",
    "GATE-02",
    "GATE-03",
    "GATE-07",
)

rare(
    "route",
    "with-two-experts",
    "two experts",
    lambda a: a["logits"].shape[1] == 2,
    weights_exchanged,
    "GATE-06",
    "GATE-14",
)
