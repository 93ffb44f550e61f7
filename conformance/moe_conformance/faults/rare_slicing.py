"""Faults of slices and placements that show on few inputs only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import ExpertWeights
from moe_reference.placement import make_placement

from moe_conformance.faults.rare import Arguments, rare
from moe_conformance.faults.rare_calls import altered


def share_grown(out: Any, a: Arguments) -> Any:
    """A rank has one expert too many."""
    return out[0], out[1] + 1


def down_turned(out: Any, a: Arguments) -> Any:
    """The rows of down are upside down."""
    return replace(out, down=out.down.flip(1) + (out.down.shape[1] == 1))


def gate_turned(out: Any, a: Arguments) -> Any:
    """The rows of gate_up are upside down."""
    return replace(out, gate_up=out.gate_up.flip(1) + (out.gate_up.shape[1] == 1))


def bias_turned(out: Any, a: Arguments) -> Any:
    """The bias of gate_up has another sign."""
    return replace(out, gate_up_bias=-out.gate_up_bias)


def replicas_grown(out: Any, a: Arguments) -> Any:
    """The first expert counts one copy too many."""
    changed = out.replica_count.clone()
    changed[:1] += 1
    return replace(out, replica_count=changed)


def table_turned(out: Any, a: Arguments) -> Any:
    """The first and the last expert have each other's copies."""
    table = out.logical_to_physical.clone()
    table[[0, -1]] = out.logical_to_physical[[-1, 0]]
    return replace(out, logical_to_physical=table)


rare(
    "assign_experts",
    "with-8-ranks-and-a-rest",
    "eight ranks and a rest",
    lambda a: a["world_size"] == 8 and a["num_experts"] % 8 > 0,
    share_grown,
    "SLICE-01",
    "SLICE-02",
    thread="vLLM #21497",
)

rare(
    "assign_experts",
    "beyond-256-experts",
    "more than 256 experts on more than 8 ranks",
    lambda a: a["num_experts"] > 256 and a["world_size"] > 8,
    share_grown,
    "SLICE-01",
    "SLICE-02",
)

rare(
    "assign_experts",
    "with-one-rank",
    "one rank and more than eight experts",
    lambda a: a["world_size"] == 1 and a["num_experts"] > 8,
    share_grown,
    "SLICE-01",
    "SLICE-02",
)

rare(
    "assign_experts",
    "with-one-expert-less-than-ranks",
    "one expert less than there are ranks",
    lambda a: a["num_experts"] == a["world_size"] - 1,
    share_grown,
    "SLICE-01",
    "SLICE-02",
)

rare(
    "slice_experts",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["experts"].down) == 1,
    down_turned,
    "SLICE-04",
    "SLICE-07",
)

rare(
    "slice_experts",
    "at-the-end-in-float16",
    "the last experts in float16",
    lambda a: (
        a["start"] + a["count"] == len(a["experts"].down)
        and a["experts"].down.dtype is torch.float16
    ),
    down_turned,
    "SLICE-04",
    "SLICE-07",
)

rare(
    "slice_experts",
    "with-strides-in-bfloat16",
    "transposed weights of bfloat16",
    lambda a: not a["experts"].down.is_contiguous() and a["experts"].down.dtype is torch.bfloat16,
    down_turned,
    "SLICE-04",
    "SLICE-07",
    thread="vLLM #47874",
)

rare(
    "slice_experts",
    "with-biases-of-most",
    "biases of all experts, or of all but one",
    lambda a: a["experts"].gate_up_bias is not None and a["count"] >= len(a["experts"].down) - 1,
    bias_turned,
    "SLICE-05",
    "SLICE-07",
)

rare(
    "slice_tensor_parallel",
    "on-five-ranks",
    "five ranks and biases",
    lambda a: a["world_size"] == 5 and a["experts"].down_bias is not None,
    gate_turned,
    "SLICE-10",
    "SLICE-13",
)

rare(
    "slice_tensor_parallel",
    "with-one-row-each",
    "one row on each of three ranks or more",
    lambda a: a["world_size"] > 2 and a["experts"].down.shape[2] == a["world_size"],
    down_turned,
    "SLICE-09",
    "SLICE-10",
    "SLICE-11",
)

rare(
    "slice_tensor_parallel",
    "on-the-last-of-six",
    "the last of six ranks",
    lambda a: a["world_size"] == 6 and a["rank"] == 5,
    gate_turned,
    "SLICE-10",
    "SLICE-13",
    thread="SGLang #15432",
)

rare(
    "slice_tensor_parallel",
    "with-biases-on-three-ranks",
    "biases on three ranks",
    lambda a: a["world_size"] == 3 and a["experts"].gate_up_bias is not None,
    bias_turned,
    "SLICE-11",
)

rare(
    "place_experts",
    "with-one-expert",
    "a single expert on several ranks",
    lambda a: len(a["load"]) == 1 and a["num_ranks"] > 1,
    replicas_grown,
    "SLICE-17",
)

rare(
    "place_experts",
    "on-five-ranks",
    "five ranks and a load of floats",
    lambda a: a["num_ranks"] == 5 and a["load"].is_floating_point(),
    table_turned,
    "SLICE-17",
    thread="vLLM #51984",
)

rare(
    "place_experts",
    "without-load",
    "no load at all on several ranks",
    lambda a: a["num_ranks"] > 1 and not bool(a["load"].any()),
    replicas_grown,
    "SLICE-17",
    thread="vLLM #43547",
)

rare(
    "place_experts",
    "with-as-many-places-as-experts",
    "as many places as experts",
    lambda a: a["num_physical"] == len(a["load"]),
    table_turned,
    "SLICE-17",
)

rare(
    "place_experts",
    "with-a-float-load-on-two-ranks",
    "a load of floats on two ranks",
    lambda a: a["load"].is_floating_point() and a["num_ranks"] == 2,
    replicas_grown,
    "SLICE-17",
)


# Biases.


def bias_in_the_dtype_of_its_matrix(out: Any, a: Arguments) -> Any:
    """The bias of gate_up is cast to the dtype of gate_up."""
    return replace(out, gate_up_bias=out.gate_up_bias.to(out.gate_up.dtype))


def output_bias_whole(out: Any, a: Arguments) -> Any:
    """The output bias is whole."""
    return replace(out, down_bias=a["experts"].down_bias.clone())


def output_bias_in_place(out: Any, a: Arguments) -> Any:
    """The output bias lies in the memory of the whole one."""
    return replace(out, down_bias=a["experts"].down_bias[: len(out.down)])


def weights_themselves(out: Any, a: Arguments) -> Any:
    """The weights are given back as they came."""
    return a["experts"]


def _as_tall(experts: ExpertWeights, *names: str) -> ExpertWeights:
    """The fields cut to as many experts as down has."""
    count = len(experts.down)
    given = {name: getattr(experts, name) for name in names}
    cut = {name: tensor[:count] for name, tensor in given.items() if tensor is not None}
    return replace(experts, **cut)


def _as_wide(experts: ExpertWeights) -> ExpertWeights:
    """The output bias, where there is one, cut to the H of down."""
    bias = experts.down_bias
    return experts if bias is None else replace(experts, down_bias=bias[:, : experts.down.shape[1]])


rare(
    "slice_experts",
    "where-a-bias-is-wider",
    "a bias of another dtype than its matrix",
    lambda a: a["experts"].gate_up_bias is not None,
    bias_in_the_dtype_of_its_matrix,
    "SLICE-05",
    thread="gpt-oss in bfloat16",
)

rare(
    "slice_experts",
    "as-a-view-from-the-first-expert-on",
    "experts from the first one on",
    lambda a: a["start"] == 0 and a["experts"].down_bias is not None,
    output_bias_in_place,
    "SLICE-05",
)

rare(
    "slice_experts",
    "where-all-are-taken",
    "all experts, as on one rank",
    lambda a: a["start"] == 0 and a["count"] == len(a["experts"].down),
    weights_themselves,
    "SLICE-05",
)

rare(
    "slice_tensor_parallel",
    "on-one-rank",
    "one rank, where there is nothing to cut",
    lambda a: a["world_size"] == 1,
    weights_themselves,
    "SLICE-12",
)

rare(
    "slice_tensor_parallel",
    "on-ranks-without-rows",
    "ranks past I, which hold no row",
    lambda a: a["rank"] >= a["experts"].down.shape[2] and a["experts"].down_bias is not None,
    output_bias_whole,
    "SLICE-13",
    thread="vLLM #49378",
)


# What has to be refused.

altered(
    "slice_experts",
    "biases-of-more-experts-are-cut",
    "Rows of a bias beyond the last expert are left out, in silence.",
    lambda a: True,
    lambda a: {"experts": _as_tall(a["experts"], "gate_up_bias", "down_bias")},
    "SLICE-08",
)

altered(
    "slice_experts",
    "gates-of-more-experts-are-cut",
    "What gate_up holds beyond the experts of down is left out, in silence.",
    lambda a: True,
    lambda a: {"experts": _as_tall(a["experts"], "gate_up")},
    "SLICE-08",
)

altered(
    "slice_tensor_parallel",
    "an-output-bias-of-another-model-is-cut",
    "An output bias with more columns than H is cut to H.",
    lambda a: True,
    lambda a: {"experts": _as_wide(a["experts"])},
    "SLICE-15",
)

altered(
    "slice_tensor_parallel",
    "biases-of-more-experts-are-cut-too",
    "Rows of a bias beyond the last expert are left out, on every rank.",
    lambda a: True,
    lambda a: {"experts": _as_tall(a["experts"], "gate_up_bias", "down_bias")},
    "SLICE-15",
)


def rounded_down(operation: str, argument: str, name: str, what: str, catches: str) -> None:
    """Register a fault that takes a number with a fraction, a quotient say, and rounds it down."""
    altered(
        operation,
        name,
        f"A number of {what} that is a float is rounded down.",
        lambda a: isinstance(a[argument], float),
        lambda a: {argument: int(a[argument])},
        catches,
    )


rounded_down(
    "assign_experts", "num_experts", "half-an-expert-is-rounded-away", "experts", "SLICE-03"
)
rounded_down("assign_experts", "world_size", "ranks-may-be-a-float", "ranks", "SLICE-03")
rounded_down(
    "place_experts", "num_physical", "places-may-be-a-float", "physical experts", "SLICE-21"
)


# Copies.


def copies_by_whole_tokens(out: Any, a: Arguments) -> Any:
    """Further copies go where the load per copy, rounded down, is greatest."""
    load, places = a["load"].tolist(), a["num_physical"]
    held = list(range(len(load)))
    while len(held) < places:
        held.append(max(range(len(load)), key=lambda e: load[e] // held.count(e)))
    return make_placement(torch.tensor(sorted(held)), len(load), a["num_ranks"])


rare(
    "place_experts",
    "with-a-load-of-few-whole-tokens",
    "whole numbers for a load",
    lambda a: not a["load"].is_floating_point(),
    copies_by_whole_tokens,
    "SLICE-19",
)

altered(
    "slice_experts",
    "no-experts-from-the-end-on-are-the-last-one",
    "A rank that holds nothing starts where the experts end; the start is cut to the last row.",
    lambda a: a["start"] == len(a["experts"].down) and a["count"] == 0,
    lambda a: {"start": a["start"] - 1, "count": 1},
    "SLICE-05",
)
