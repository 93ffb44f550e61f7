"""Faults of whole layers that show on few inputs only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_conformance.faults.rare import (
    Arguments,
    Wrong,
    first_row_scaled,
    last_row_zero,
    rare,
    tokens,
    top_k,
)
from moe_conformance.faults.rare_calls import altered


def looked_up(a: Arguments) -> bool:
    """Whether token ids are looked up in a table."""
    return a["config"].routing.hash_table is not None and a.get("token_ids") is not None


def in_layer(wrong: Wrong) -> Wrong:
    """The same on the tokens of a layer's output."""

    def change(out: Any, a: Arguments) -> Any:
        flat = wrong(out.output.flatten(0, 1), a)
        return replace(out, output=flat.view(out.output.shape))

    return change


rare(
    "layer",
    "with-one-token",
    "a single token of sixteen bits",
    lambda a: tokens(a) == 1 and a["x"].dtype in (torch.float16, torch.bfloat16),
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
    thread="SGLang #25852",
)

rare(
    "layer",
    "with-three-sequences-of-one",
    "three sequences",
    lambda a: len(a["x"]) == 3 and a["x"].shape[1] < 4,
    in_layer(last_row_zero),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
)

rare(
    "layer",
    "with-a-shared-gate-in-float16",
    "a shared expert with a gate in float16",
    lambda a: a["parameters"].shared_gate is not None and a["x"].dtype is torch.float16,
    in_layer(first_row_scaled),
    "LAYER-05",
    "LAYER-07",
    thread="lmdeploy #3491",
)

rare(
    "layer",
    "with-a-router-bias-and-groups",
    "a router bias and groups in float16",
    lambda a: (
        a["x"].dtype is torch.float16
        and a["parameters"].router_bias is not None
        and a["config"].routing.num_groups > 1
    ),
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
    thread="torchtitan #2319",
)

rare(
    "layer",
    "with-a-shared-scale-in-training",
    "a shared expert that is scaled, in training",
    lambda a: (
        a["config"].shared_scale != 1.0
        and bool(a.get("training"))
        and a["x"].dtype is torch.bfloat16
    ),
    in_layer(first_row_scaled),
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
    thread="SGLang #28237",
)

rare(
    "layer",
    "with-one-expert",
    "a single expert and padding",
    lambda a: len(a["parameters"].router) == 1 and a.get("padding_mask") is not None,
    in_layer(last_row_zero),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)

rare(
    "layer",
    "at-hidden-size-1",
    "a hidden size of 1 and several sequences",
    lambda a: a["x"].shape[2] == 1 and len(a["x"]) > 1,
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)

rare(
    "layer",
    "at-k-4",
    "four experts per token in training",
    lambda a: top_k(a) == 4 and bool(a.get("training")),
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)

rare(
    "layer",
    "with-strides-in-bfloat16",
    "a transposed x of bfloat16",
    lambda a: not a["x"].is_contiguous() and a["x"].dtype is torch.bfloat16,
    in_layer(last_row_zero),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)

rare(
    "layer",
    "with-sqrtsoftplus-and-l2",
    "sqrtsoftplus and the Euclidean norm",
    lambda a: (
        a["config"].routing.score == "sqrtsoftplus"
        and a["config"].routing.norm == "l2"
        and a["config"].routing.renormalize
    ),
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)


def token_ids_inside(a: Arguments, least: int | None, most: int | None) -> Arguments:
    """Token ids no smaller and no larger than that."""
    return {"token_ids": a["token_ids"].clamp(least, most)}


altered(
    "layer",
    "token-ids-past-the-table-are-the-last",
    "A token id past the end of the hash table is taken for the last one.",
    lambda a: looked_up(a),
    lambda a: token_ids_inside(a, None, len(a["config"].routing.hash_table) - 1),
    "LAYER-14",
)

altered(
    "layer",
    "token-ids-below-0-are-the-first",
    "A token id below 0, which stands for padding elsewhere, is taken for the first one.",
    lambda a: looked_up(a),
    lambda a: token_ids_inside(a, 0, None),
    "LAYER-14",
)


def with_the_selection_bias(a: Arguments) -> Arguments:
    """The selection bias is added to the router's, or stands in its place."""
    parameters = a["parameters"]
    bias = parameters.selection_bias.to(parameters.router.dtype)
    if parameters.router_bias is not None:
        bias = parameters.router_bias + bias
    return {"parameters": replace(parameters, router_bias=bias)}


altered(
    "layer",
    "the-selection-bias-weighs-beside-a-table",
    "Where experts come from a table, the bias that has nothing to choose is added to the logits.",
    lambda a: looked_up(a) and a["parameters"].selection_bias is not None,
    with_the_selection_bias,
    "LAYER-02",
    "LAYER-12",
)
altered(
    "layer",
    "a-selection-bias-turns-the-table-off",
    "A layer with a selection bias chooses by its logits, though it has a table.",
    lambda a: looked_up(a) and a["parameters"].selection_bias is not None,
    lambda a: {
        "config": replace(a["config"], routing=replace(a["config"].routing, hash_table=None))
    },
    "LAYER-02",
    "LAYER-12",
)

altered(
    "layer",
    "a-shared-scale-of-0-is-1",
    "A shared expert's scale of 0 is taken for one that was not given.",
    lambda a: a["parameters"].shared is not None and a["config"].shared_scale == 0,
    lambda a: {"config": replace(a["config"], shared_scale=1.0)},
    "LAYER-04",
)
