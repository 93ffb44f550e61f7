"""Further faults of routing that show on few inputs only: sizes, dtypes, strides, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference import gating

from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, last_row_zero, rare
from moe_conformance.faults.rare_gating import (
    id_moved,
    last_weight_gone,
    weights_exchanged,
)

# What is wrong.


def weights_a_little_larger(out: Any, a: Arguments) -> Any:
    """The weights are a hundred-thousandth too large."""
    return out[0] * (1 + 1e-5), out[1]


def weights_in_bfloat16(out: Any, a: Arguments) -> Any:
    """The weights are rounded to bfloat16."""
    return out[0].bfloat16().to(out[0].dtype), out[1]


def weights_through_float32(out: Any, a: Arguments) -> Any:
    """The weights are rounded to float32."""
    return out[0].float().to(out[0].dtype), out[1]


def middle_rows_exchanged(out: Any, a: Arguments) -> Any:
    """The two tokens in the middle are exchanged."""
    order = torch.arange(len(out[0]))
    middle = len(order) // 2
    order[[middle - 1, middle]] = order[[middle, middle - 1]]
    return out[0][order], out[1][order]


def squeezed(out: Any, a: Arguments) -> Any:
    """Dimensions of one are gone."""
    return out[0].squeeze(), out[1].squeeze()


def last_id_repeated(out: Any, a: Arguments) -> Any:
    """The last expert of each token is its first once more."""
    ids = out[1].clone()
    ids[:, -1] = ids[:, 0]
    return out[0], ids


def ids_in_a_byte(out: Any, a: Arguments) -> Any:
    """Ids are signed bytes on their way."""
    return out[0], out[1].to(torch.int8).long()


def ids_as_floats(out: Any, a: Arguments) -> Any:
    """Ids come back as float32."""
    return out[0], out[1].float()


def weights_as_halves(out: Any, a: Arguments) -> Any:
    """The weights come back in float16."""
    return out[0].half(), out[1]


def weights_as_doubles(out: Any, a: Arguments) -> Any:
    """The weights come back in float64."""
    return out[0].double(), out[1]


def unscaled(out: Any, a: Arguments) -> Any:
    """The scale is left out."""
    return out[0] / a["config"].scale, out[1]


def scale_made_positive(out: Any, a: Arguments) -> Any:
    """The weights have lost their sign."""
    return out[0].abs(), out[1]


def scale_of_zero_left_out(out: Any, a: Arguments) -> Any:
    """The scale is taken for one that was not given."""
    return gating.route(a["logits"], replace(a["config"], scale=1.0), a["bias"], a["token_ids"])


def gradient_lost(out: Any, a: Arguments) -> Any:
    """The weights have no gradient."""
    return out[0].detach(), out[1]


def gradient_negated(out: Any, a: Arguments) -> Any:
    """The gradient has the wrong sign."""
    return with_gradient(out[0], torch.neg), out[1]


def gradient_of_the_last_token_gone(out: Any, a: Arguments) -> Any:
    """The last token has no gradient."""
    return with_gradient(out[0], lambda g: last_row_zero(g, a)), out[1]


def gradient_a_little_larger(out: Any, a: Arguments) -> Any:
    """The gradient is a thousandth too large."""
    return with_gradient(out[0], lambda g: g * 1.001), out[1]


# In which calls.


def experts(a: Arguments) -> int:
    """E."""
    return int(a["logits"].shape[-1])


def renormalized(a: Arguments) -> bool:
    """Whether the weights are divided by their norm."""
    config = a["config"]
    return bool(config.renormalize and (config.top_k > 1 or config.renormalize_single))


def strided(a: Arguments, name: str) -> bool:
    """Whether that argument was given and is not contiguous."""
    value = a["config"].hash_table if name == "hash_table" else a.get(name)
    return value is not None and not value.is_contiguous()


rare(
    "route",
    "at-128-experts",
    "exactly 128 experts",
    lambda a: experts(a) == 128,
    weights_a_little_larger,
    "GATE-06",
    "GATE-22",
)
rare(
    "route",
    "in-a-byte-beyond-128-experts",
    "more than 128 experts and one each",
    lambda a: experts(a) > 128 and a["config"].top_k == 1,
    ids_in_a_byte,
    "GATE-22",
)
rare(
    "route",
    "at-33-experts",
    "one expert more than a warp has lanes",
    lambda a: experts(a) == 33,
    last_id_repeated,
    "GATE-22",
)
rare(
    "route",
    "at-17-or-65-experts",
    "one expert past a power of two",
    lambda a: experts(a) in (17, 65),
    weights_exchanged,
    "GATE-22",
)
rare(
    "route",
    "from-511-experts",
    "511 experts or more",
    lambda a: experts(a) >= 511,
    weights_in_bfloat16,
    "GATE-22",
)
rare(
    "route",
    "at-33-tokens",
    "one token more than a warp has lanes",
    lambda a: len(a["logits"]) == 33,
    last_weight_gone,
    "GATE-06",
    "GATE-25",
)
rare(
    "route",
    "at-63-tokens",
    "63 tokens",
    lambda a: len(a["logits"]) == 63,
    middle_rows_exchanged,
    "GATE-03",
    "GATE-07",
)
rare(
    "route",
    "at-64-tokens",
    "64 tokens",
    lambda a: len(a["logits"]) == 64,
    weights_a_little_larger,
    "GATE-07",
    "GATE-23",
)
rare(
    "route",
    "from-128-tokens",
    "128 tokens or more",
    lambda a: len(a["logits"]) >= 128,
    id_moved,
    "GATE-16",
    "GATE-20",
    "GATE-21",
    "GATE-29",
)
rare(
    "route",
    "beyond-512-tokens",
    "more than 512 tokens",
    lambda a: len(a["logits"]) > 512,
    last_weight_gone,
    "GATE-22",
)
rare(
    "route",
    "at-k-8-with-groups",
    "eight experts per token and groups",
    lambda a: a["config"].top_k == 8 and a["config"].num_groups > 1,
    weights_exchanged,
    "GATE-07",
    "GATE-09",
    "GATE-27",
)
rare(
    "route",
    "beyond-k-16",
    "more than 16 experts per token",
    lambda a: a["config"].top_k > 16,
    last_id_repeated,
    "GATE-22",
)
rare(
    "route",
    "at-k-of-all-experts",
    "as many experts per token as there are",
    lambda a: a["config"].top_k == experts(a) > 2,
    weights_a_little_larger,
    "GATE-03",
    "GATE-14",
    "GATE-22",
    "GATE-27",
)
rare(
    "route",
    "squeezed-at-one-token",
    "one expert for one token, of several",
    lambda a: a["config"].top_k == 1 == len(a["logits"]) and experts(a) > 8,
    squeezed,
    "GATE-22",
)
rare(
    "route",
    "with-groups-of-one-expert",
    "groups of one expert",
    lambda a: a["config"].num_groups == experts(a) > 1,
    id_moved,
    "GATE-10",
    "GATE-11",
    "GATE-12",
    "GATE-29",
)
rare(
    "route",
    "with-three-groups",
    "three groups",
    lambda a: a["config"].num_groups == 3,
    id_moved,
    "GATE-11",
    "GATE-21",
    "GATE-27",
    "GATE-29",
)
rare(
    "route",
    "with-groups-of-three",
    "groups of three or five experts",
    lambda a: a["config"].num_groups > 1 and experts(a) // a["config"].num_groups in (3, 5),
    weights_a_little_larger,
    "GATE-03",
    "GATE-21",
    "GATE-23",
    "GATE-27",
)
rare(
    "route",
    "with-a-scale-and-a-table",
    "a scale and a hash table",
    lambda a: a["config"].hash_table is not None and a["config"].scale not in (0, 1),
    unscaled,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "through-float32-with-l2",
    "float64 logits and the Euclidean norm",
    lambda a: a["logits"].dtype is torch.float64 and renormalized(a) and a["config"].norm == "l2",
    weights_through_float32,
    "GATE-07",
    "GATE-22",
    "GATE-27",
    "GATE-28",
)
rare(
    "route",
    "with-int32-token-ids",
    "int32 token ids and a hash table",
    lambda a: (
        a["config"].hash_table is not None
        and a["token_ids"] is not None
        and a["token_ids"].dtype is torch.int32
    ),
    weights_exchanged,
    "GATE-14",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "with-token-ids-and-no-table",
    "token ids and no hash table",
    lambda a: a.get("token_ids") is not None and a["config"].hash_table is None,
    last_weight_gone,
    "GATE-25",
)
rare(
    "route",
    "with-a-bias-beside-a-table",
    "a bias and a hash table",
    lambda a: a.get("bias") is not None and a["config"].hash_table is not None,
    weights_exchanged,
    "GATE-25",
)
rare(
    "route",
    "with-a-bfloat16-bias",
    "a bfloat16 bias beside float32 logits",
    lambda a: (
        a.get("bias") is not None
        and a["bias"].dtype is torch.bfloat16
        and a["logits"].dtype is torch.float32
    ),
    id_moved,
    "GATE-03",
    "GATE-05",
    "GATE-12",
)
rare(
    "route",
    "with-a-strided-bias",
    "a bias with strides and sigmoid",
    lambda a: strided(a, "bias") and a["config"].score == "sigmoid",
    id_moved,
    "GATE-03",
    "GATE-12",
    "GATE-20",
    "GATE-21",
)
rare(
    "route",
    "with-strided-token-ids",
    "token ids with strides",
    lambda a: strided(a, "token_ids"),
    id_moved,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "with-a-strided-table",
    "a hash table with strides",
    lambda a: strided(a, "hash_table"),
    id_moved,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "with-token-ids-beyond-2048",
    "token ids that float16 rounds",
    lambda a: a["config"].hash_table is not None and len(a["config"].hash_table) > 2048,
    last_weight_gone,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "at-a-scale-of-zero",
    "a scale of zero",
    lambda a: a["config"].scale == 0,
    scale_of_zero_left_out,
    "GATE-09",
)
rare(
    "route",
    "at-a-negative-scale",
    "a negative scale",
    lambda a: a["config"].scale < 0,
    scale_made_positive,
    "GATE-09",
)
rare(
    "route",
    "at-k-1-where-it-is-not-renormalised",
    "one expert that is not renormalised, and a scale for such",
    lambda a: (
        a["config"].renormalize
        and not renormalized(a)
        and a["config"].scale_when == "not_renormalized"
        and a["config"].scale not in (0, 1)
    ),
    unscaled,
    "GATE-25",
)
rare(
    "route",
    "with-groups-by-their-best-sigmoid",
    "groups scored by their best sigmoid",
    lambda a: (
        a["config"].num_groups > 1
        and a["config"].group_score == "max"
        and a["config"].score == "sigmoid"
    ),
    weights_a_little_larger,
    "GATE-03",
    "GATE-07",
    "GATE-21",
    "GATE-25",
)
rare(
    "route",
    "with-masked-logits-of-zero",
    "closed groups whose logits become zero",
    lambda a: (
        a["config"].num_groups > a["config"].topk_groups
        and a["config"].mask_fill == "zero"
        and a["config"].order == "topk_then_score"
    ),
    id_moved,
    "GATE-10",
    "GATE-15",
    "GATE-23",
    "GATE-27",
)
rare(
    "route",
    "as-halves-with-a-clamp",
    "bfloat16 logits and a clamped norm",
    lambda a: (
        a["logits"].dtype is torch.bfloat16
        and a["config"].epsilon_mode == "clamp"
        and renormalized(a)
    ),
    weights_as_halves,
    "GATE-02",
    "GATE-07",
    "GATE-28",
    "GATE-29",
)
rare(
    "route",
    "as-doubles-with-a-bias",
    "bfloat16 logits and a bias",
    lambda a: a["logits"].dtype is torch.bfloat16 and a.get("bias") is not None,
    weights_as_doubles,
    "GATE-05",
    "GATE-11",
    "GATE-15",
    "GATE-27",
)
rare(
    "route",
    "as-floats-with-an-int32-table",
    "an int32 hash table",
    lambda a: a["config"].hash_table is not None and a["config"].hash_table.dtype is torch.int32,
    ids_as_floats,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
)
rare(
    "route",
    "without-a-gradient-with-l2",
    "the Euclidean norm of sigmoids",
    lambda a: renormalized(a) and a["config"].norm == "l2" and a["config"].score != "softmax",
    gradient_lost,
    "GATE-18",
    "GATE-27",
    "GATE-28",
)
rare(
    "route",
    "backwards-beyond-32-tokens",
    "more than 32 tokens",
    lambda a: len(a["logits"]) > 32,
    gradient_of_the_last_token_gone,
    "GATE-18",
)
rare(
    "route",
    "backwards-with-groups",
    "groups",
    lambda a: a["config"].num_groups > 1,
    gradient_a_little_larger,
    "GATE-18",
)
rare(
    "route",
    "backwards-at-k-1",
    "one sigmoid per token",
    lambda a: a["config"].top_k == 1 and a["config"].score == "sigmoid",
    gradient_negated,
    "GATE-18",
    thread="minimind #858",
)
rare(
    "route",
    "backwards-with-a-table",
    "a hash table",
    lambda a: a["config"].hash_table is not None,
    gradient_a_little_larger,
    "GATE-18",
)
rare(
    "route",
    "backwards-in-float16",
    "float16 logits",
    lambda a: a["logits"].dtype is torch.float16,
    gradient_negated,
    "GATE-18",
)
