"""Presets: the routing of published models, as `RoutingConfig`.

Each entry says where its values were read. The number of experts is no part of a routing
configuration; the comments give it because the other numbers only make sense beside it. Where a
model comes in several sizes, the entry is the one its comment names, and the others are a change
away: `routing_preset("deepseek-v2", num_groups=1, topk_groups=1, scale=1.0)` is V2-Lite.
"""

from dataclasses import replace
from typing import Any

from moe_reference.config import RoutingConfig, field_names

PRESETS: dict[str, RoutingConfig] = {
    # Mixtral 8x7B and 8x22B: E = 8. transformers models/mixtral: softmax over all experts, top 2,
    # always divided by their sum.
    "mixtral": RoutingConfig(top_k=2, score="softmax", renormalize=True),
    # Qwen1.5-MoE-A2.7B: E = 60. transformers models/qwen2_moe, norm_topk_prob false.
    "qwen2-moe": RoutingConfig(top_k=4, score="softmax", renormalize=False),
    # Qwen3-30B-A3B and 235B-A22B: E = 128. transformers models/qwen3_moe; norm_topk_prob is true
    # in the checkpoints' config.json although the class defaults to false.
    "qwen3-moe": RoutingConfig(top_k=8, score="softmax", renormalize=True),
    # DeepSeek-V2 (236B): E = 160. Its config.json (group_limited_greedy, norm_topk_prob false,
    # routed_scaling_factor 16) and its gate (modeling_deepseek.py), which scales only what it has
    # not renormalised and masks with 0; softmax scores are positive, so that is safe here.
    "deepseek-v2": RoutingConfig(
        top_k=6,
        score="softmax",
        renormalize=False,
        epsilon=1e-20,
        renormalize_single=False,
        scale=16.0,
        scale_when="not_renormalized",
        num_groups=8,
        topk_groups=3,
        group_score="max",
        mask_fill="zero",
    ),
    # DeepSeek-V3 and R1: E = 256. config.json (noaux_tc) and the gate of modeling_deepseek.py in
    # its text since DeepSeek-V3-0324, which masks with -inf; before, it masked with 0.
    "deepseek-v3": RoutingConfig(
        top_k=8,
        score="sigmoid",
        renormalize=True,
        epsilon=1e-20,
        renormalize_single=False,
        scale=2.5,
        num_groups=8,
        topk_groups=4,
        group_score="top2_sum",
    ),
    # DeepSeek-V4-Flash: E = 256. transformers models/deepseek_v4. This is the routing of the
    # layers that choose by score. The first layers look their experts up by token id; for those,
    # pass the layer's table: routing_preset("deepseek-v4", hash_table=tid2eid).
    "deepseek-v4": RoutingConfig(
        top_k=6, score="sqrtsoftplus", renormalize=True, epsilon=1e-20, scale=1.5
    ),
    # Kimi K2: E = 384. config.json (noaux_tc, n_group 1) with DeepSeek-V3's gate.
    "kimi-k2": RoutingConfig(
        top_k=8,
        score="sigmoid",
        renormalize=True,
        epsilon=1e-20,
        renormalize_single=False,
        scale=2.827,
    ),
    # GLM-4.5 (355B): E = 160. transformers models/glm4_moe, routed_scaling_factor 2.5 in the
    # checkpoint's config.json; GLM-4.5-Air has E = 128 and the class's default scale of 1.
    "glm-4.5": RoutingConfig(top_k=8, score="sigmoid", renormalize=True, epsilon=1e-20, scale=2.5),
    # gpt-oss-20b (E = 32) and 120b (E = 128). transformers models/gpt_oss: the softmax is over the
    # 4 chosen logits, so the weights add up to 1. The router's bias is a part of the logits.
    "gpt-oss": RoutingConfig(top_k=4, score="softmax", order="topk_then_score"),
    # Llama 4 Scout (E = 16) and Maverick (E = 128). transformers models/llama4: the sigmoid of the
    # one chosen logit. That it multiplies the expert's input is a matter of ExpertsConfig.
    "llama-4": RoutingConfig(top_k=1, score="sigmoid", order="topk_then_score"),
    # OLMoE-1B-7B: E = 64. transformers models/olmoe, norm_topk_prob false.
    "olmoe": RoutingConfig(top_k=8, score="softmax", renormalize=False),
    # MiniMax-M2: E = 256. transformers models/minimax_m2 divides by the bare sum; the epsilon is
    # vLLM's (RoutingMethodType.MiniMax2) and only matters where every chosen sigmoid underflows.
    "minimax-m2": RoutingConfig(top_k=8, score="sigmoid", renormalize=True, epsilon=1e-20),
}
"""The published routings by model name."""


def routing_preset(name: str, **changes: Any) -> RoutingConfig:
    """The routing of a published model, with single fields replaced.

    Args:
        name: a key of `PRESETS`.
        changes: fields of `RoutingConfig` and their new values.

    Raises:
        ValueError: no such preset, or the changed configuration is impossible.
        TypeError: a change names no field of `RoutingConfig`.

    >>> routing_preset("gpt-oss").order
    'topk_then_score'
    >>> routing_preset("glm-4.5", scale=1.0).scale
    1.0
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    unknown = [field for field in changes if field not in field_names(RoutingConfig)]
    if unknown:
        raise TypeError(f"changes: expected fields of RoutingConfig, got {', '.join(unknown)}")
    return replace(PRESETS[name], **changes)
