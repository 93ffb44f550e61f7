"""Rare faults of shares, slices and placements: edges of an integer's range, values, gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_calls import (
    altered,
    as_if_contiguous,
    instead,
    right,
    with_fields,
)
from moe_conformance.faults.rare_experts_gradients import gradient


def share_of(a: Arguments) -> tuple[int, int]:
    """The right start and count."""
    start, count = right("assign_experts", a)
    return start, count


def rest(a: Arguments) -> int:
    """E mod R."""
    return int(a["num_experts"] % a["world_size"])


def fits(a: Arguments) -> bool:
    """Whether these are arguments of a share."""
    return a["world_size"] > 0 and 0 <= a["rank"] < a["world_size"] and a["num_experts"] >= 0


instead(
    "assign_experts",
    "a-start-wraps-at-256",
    "The start is kept in a byte.",
    lambda a: fits(a) and a["num_experts"] > 256,
    lambda a: (share_of(a)[0] % 256, share_of(a)[1]),
    "SLICE-01",
)

instead(
    "assign_experts",
    "a-start-is-a-rounded-quotient",
    "With more than 40 ranks the start is r E / R, rounded down.",
    lambda a: fits(a) and a["world_size"] > 40 and rest(a) > 0,
    lambda a: (a["rank"] * a["num_experts"] // a["world_size"], share_of(a)[1]),
    "SLICE-01",
)

instead(
    "assign_experts",
    "a-share-is-a-product-with-a-reciprocal",
    "A count is a product with 1 / R, which for some R is one short of a whole number.",
    fits,
    lambda a: (
        share_of(a)[0],
        int((a["num_experts"] - a["rank"] + a["world_size"] - 1) * (1.0 / a["world_size"])),
    ),
    *("SLICE-01", "SLICE-02"),
)

instead(
    "assign_experts",
    "shares-are-rounded-up-on-three-ranks",
    "On three or five ranks shares are rounded up, and the last rank has what is left.",
    lambda a: fits(a) and a["world_size"] in (3, 5) and rest(a) > 0,
    lambda a: rounded_up(a),
    "SLICE-02",
)


def rounded_up(a: Arguments) -> tuple[int, int]:
    """The share of a rank when each but the last has the ceiling."""
    share = math.ceil(a["num_experts"] / a["world_size"])
    start = min(a["rank"] * share, a["num_experts"])
    return start, min(share, a["num_experts"] - start)


instead(
    "assign_experts",
    "the-rest-of-a-power-of-two-is-lost",
    "A power of two of experts is shared out by a shift, and the rest is on no rank.",
    lambda a: fits(a) and a["num_experts"] in (8, 16, 32, 64, 128, 256) and rest(a) > 0,
    lambda a: (
        a["rank"] * (a["num_experts"] // a["world_size"]),
        a["num_experts"] // a["world_size"],
    ),
    "SLICE-02",
)

instead(
    "assign_experts",
    "a-count-is-a-quotient-of-floats",
    "Where the ranks divide more than 64 experts the count is a float.",
    lambda a: fits(a) and a["num_experts"] > 64 and rest(a) == 0,
    lambda a: (share_of(a)[0], a["num_experts"] / a["world_size"]),
    "SLICE-01",
)

instead(
    "assign_experts",
    "the-last-rank-of-many-has-one-too-few",
    "Of more than 32 ranks the last one's share lacks an expert.",
    lambda a: fits(a) and a["world_size"] > 32 and a["rank"] == a["world_size"] - 1,
    lambda a: (share_of(a)[0], max(0, share_of(a)[1] - 1)),
    "SLICE-01",
)

instead(
    "assign_experts",
    "a-float-rank-is-cut",
    "On more than 24 ranks a rank that is a float is cut to a whole number.",
    lambda a: a["world_size"] > 24 and any(isinstance(value, float) for value in a.values()),
    lambda a: share_of({name: int(value) for name, value in a.items()}),
    "SLICE-03",
)

instead(
    "slice_experts",
    "a-slice-that-begins-inside-is-cut-off-at-the-end",
    "In float16 a slice that begins at an expert that there is and ends past the last is cut off.",
    lambda a: (
        a["experts"].down.dtype is torch.float16
        and isinstance(a["start"], int)
        and isinstance(a["count"], int)
        and 0 < a["start"] < len(a["experts"].down) < a["start"] + a["count"]
    ),
    lambda a: right("slice_experts", a | {"count": len(a["experts"].down) - a["start"]}),
    "SLICE-08",
)

instead(
    "slice_experts",
    "a-float-start-is-cut",
    "In bfloat16 a start that is a float is cut to a whole number.",
    lambda a: a["experts"].down.dtype is torch.bfloat16 and isinstance(a["start"], float),
    lambda a: right("slice_experts", a | {"start": int(a["start"])}),
    "SLICE-08",
)

instead(
    "slice_experts",
    "experts-that-do-not-fit-are-sliced",
    "In float32, whether down has as many experts as gate_up is not looked at.",
    lambda a: (
        a["experts"].down.dtype is torch.float32
        and len(a["experts"].down) != len(a["experts"].gate_up)
    ),
    lambda a: a["experts"],
    "SLICE-08",
)


def through_float16(tensor: torch.Tensor) -> torch.Tensor:
    """What is left of a tensor that went through float16."""
    return tensor.half().to(tensor)


instead(
    "slice_experts",
    "bfloat16-goes-through-float16",
    "Weights of bfloat16 are copied through float16, which ends at 65504.",
    lambda a: a["experts"].down.dtype is torch.bfloat16,
    lambda a: with_fields(right("slice_experts", a), through_float16),
    "SLICE-04",
)

instead(
    "slice_experts",
    "float64-goes-through-float32",
    "Weights of float64 are copied through float32, for a single expert.",
    lambda a: a["experts"].down.dtype is torch.float64 and a["count"] == 1,
    lambda a: with_fields(right("slice_experts", a), lambda t: t.float().double()),
    "SLICE-04",
)

instead(
    "slice_experts",
    "nan-in-a-slice-is-zero",
    "What is no number in a slice becomes zero.",
    lambda a: a["experts"].down.dtype is torch.float32,
    lambda a: with_fields(right("slice_experts", a), lambda t: t.nan_to_num(0.0, 3e38, -3e38)),
    "SLICE-04",
)

instead(
    "slice_experts",
    "subnormal-numbers-are-flushed",
    "Subnormal numbers of float16 become zero in a copy.",
    lambda a: a["experts"].down.dtype is torch.float16,
    lambda a: with_fields(right("slice_experts", a), lambda t: t.where(t.abs() >= 2.0**-14, 0)),
    "SLICE-04",
)

instead(
    "slice_experts",
    "one-bias-of-two-is-lost",
    "Past the first expert, whether there are biases is asked of gate_up_bias alone.",
    lambda a: (
        a["start"] > 0 and a["experts"].gate_up_bias is None and a["experts"].down_bias is not None
    ),
    lambda a: replace(right("slice_experts", a), down_bias=None),
    "SLICE-05",
)

gradient(
    "a-slice-of-all-has-twice-the-gradient",
    "A slice of all experts is a copy of a copy, whose gradient counts twice.",
    "experts.down",
    lambda a: a["count"] == len(a["experts"].down) > 1,
    lambda g, a: g * 2,
    "SLICE-07",
    operation="slice_experts",
)

gradient(
    "biases-of-a-slice-have-no-gradient",
    "Biases are sliced from their data.",
    "experts.down_bias",
    lambda a: a["experts"].down_bias is not None and a["start"] > 0,
    lambda g, a: g * 0,
    "SLICE-07",
    operation="slice_experts",
)


def inner(a: Arguments) -> int:
    """I."""
    return int(a["experts"].down.shape[2])


def uneven(a: Arguments) -> bool:
    """Whether R does not divide I."""
    return a["world_size"] > 0 and inner(a) % a["world_size"] > 0


instead(
    "slice_tensor_parallel",
    "eight-ranks-have-their-rows-upside-down",
    "On eight ranks the rows of a rank are upside down.",
    lambda a: a["world_size"] == 8,
    lambda a: with_fields(right("slice_tensor_parallel", a), lambda t: t.flip(1), "gate_up"),
    "SLICE-10",
)

instead(
    "slice_tensor_parallel",
    "the-bias-of-an-uneven-cut-is-moved",
    "Where R does not divide I the bias of gate_up is cut one entry on.",
    lambda a: uneven(a) and a["experts"].gate_up_bias is not None,
    lambda a: with_fields(
        right("slice_tensor_parallel", a), lambda t: t.roll(1, 1) + 1, "gate_up_bias"
    ),
    "SLICE-13",
)

instead(
    "slice_tensor_parallel",
    "the-output-bias-is-halved-on-two-ranks",
    "On two ranks each has half of the output bias.",
    lambda a: a["world_size"] == 2 and a["experts"].down_bias is not None,
    lambda a: replace(right("slice_tensor_parallel", a), down_bias=a["experts"].down_bias / 2),
    "SLICE-12",
)

instead(
    "slice_tensor_parallel",
    "the-output-bias-is-multiplied-by-zero",
    "In float64 the output bias of the other ranks is it times zero, which of infinity is none.",
    lambda a: (
        a["experts"].down.dtype is torch.float64
        and a["rank"] > 0
        and a["experts"].down_bias is not None
    ),
    lambda a: replace(right("slice_tensor_parallel", a), down_bias=a["experts"].down_bias * 0),
    "SLICE-12",
)

instead(
    "slice_tensor_parallel",
    "an-output-bias-without-another-is-on-every-rank",
    "On more than four ranks an output bias without the other is left as it is.",
    lambda a: (
        a["world_size"] > 4
        and a["experts"].gate_up_bias is None
        and a["experts"].down_bias is not None
    ),
    lambda a: replace(right("slice_tensor_parallel", a), down_bias=a["experts"].down_bias.clone()),
    "SLICE-12",
    thread="vLLM #49378",
)

instead(
    "slice_tensor_parallel",
    "more-ranks-than-rows-leave-one-row",
    "A rank that has no rows is given the last one.",
    lambda a: inner(a) < a["world_size"] and a["rank"] >= inner(a),
    lambda a: right("slice_tensor_parallel", a | {"world_size": inner(a), "rank": inner(a) - 1}),
    "SLICE-13",
)

instead(
    "slice_tensor_parallel",
    "a-cut-without-a-gate-goes-through-float16",
    "Weights of bfloat16 without a gate are copied through float16.",
    lambda a: (
        a["experts"].down.dtype is torch.bfloat16 and a["experts"].gate_up.shape[1] == inner(a)
    ),
    lambda a: with_fields(right("slice_tensor_parallel", a), through_float16),
    "SLICE-10",
)

gradient(
    "the-bias-of-a-cut-has-twice-the-gradient",
    "The gradient of the bias of gate_up counts twice.",
    "experts.gate_up_bias",
    lambda a: a["world_size"] > 1,
    lambda g, a: g * 2,
    "SLICE-14",
    operation="slice_tensor_parallel",
)

gradient(
    "gate-and-up-of-a-cut-exchange-their-gradients",
    "The gradient of gate_up is put together with up first.",
    "experts.gate_up",
    lambda a: a["experts"].gate_up.shape[1] == 2 * inner(a),
    lambda g, a: torch.cat(g.chunk(2, 1)[::-1], 1),
    "SLICE-14",
    operation="slice_tensor_parallel",
)

gradient(
    "the-output-bias-has-a-gradient-on-every-rank",
    "The output bias that is zero on the other ranks takes a gradient there.",
    "experts.down_bias",
    lambda a: a["rank"] > 0,
    lambda g, a: g + 1,
    "SLICE-14",
    operation="slice_tensor_parallel",
)

gradient(
    "the-last-column-of-a-cut-has-no-gradient",
    "From 16 rows on the last column of down gets no gradient.",
    "experts.down",
    lambda a: inner(a) >= 16,
    lambda g, a: torch.cat([g[..., :-1], g[..., -1:] * 0], -1),
    "SLICE-14",
    operation="slice_tensor_parallel",
)


def one_replica_less(out: Any) -> Any:
    """The last expert counts one copy too few."""
    changed = out.replica_count.clone()
    changed[-1:] -= 1
    return replace(out, replica_count=changed)


altered(
    "place_experts",
    "a-load-of-fractions-is-cut",
    "On more than two ranks a load of float64 is cut to whole numbers.",
    lambda a: (
        a["num_ranks"] > 2 and a["load"].dtype is torch.float64 and bool(a["load"].isfinite().all())
    ),
    lambda a: {"load": a["load"].long()},
    "SLICE-19",
)

altered(
    "place_experts",
    "a-load-wraps-at-32-bits",
    "A load is kept in 32 bits.",
    lambda a: (
        a["load"].dtype is torch.int64 and a["load"].ndim == 1 and bool((a["load"] >= 0).all())
    ),
    lambda a: {"load": a["load"] % 2**31},
    "SLICE-19",
)

altered(
    "place_experts",
    "a-load-is-read-without-its-strides",
    "The strides of a load of int64 are not looked at.",
    lambda a: (
        a["load"].dtype is torch.int64 and not a["load"].is_contiguous() and a["load"].ndim == 1
    ),
    lambda a: {"load": as_if_contiguous(a["load"]).clamp(0, 2**40)},
    "SLICE-19",
)

instead(
    "place_experts",
    "more-than-64-experts-have-no-last-copy",
    "Of more than 64 experts the last counts one copy too few.",
    lambda a: len(a["load"]) > 64,
    lambda a: one_replica_less(right("place_experts", a)),
    "SLICE-17",
)

instead(
    "place_experts",
    "more-than-64-places-are-on-the-last-rank",
    "Of more than 64 places the first is given to the last of several ranks.",
    lambda a: a["num_physical"] > 64 and a["num_ranks"] > 2,
    lambda a: replace(
        right("place_experts", a),
        rank_of_physical=right("place_experts", a).rank_of_physical.where(
            torch.arange(a["num_physical"]) > 0, a["num_ranks"] - 1
        ),
    ),
    "SLICE-18",
)

instead(
    "place_experts",
    "on-eight-ranks-the-table-is-turned",
    "On eight ranks the first and the last expert have each other's copies.",
    lambda a: a["num_ranks"] == 8 and len(a["load"]) > 1,
    lambda a: replace(
        right("place_experts", a),
        logical_to_physical=right("place_experts", a).logical_to_physical.flip(0),
    ),
    "SLICE-17",
)

altered(
    "place_experts",
    "an-int32-load-is-taken-for-even",
    "On more than five ranks a load of int32 is not looked at.",
    lambda a: (
        a["num_ranks"] > 5 and a["load"].dtype is torch.int32 and bool((a["load"] >= 0).all())
    ),
    lambda a: {"load": torch.ones_like(a["load"])},
    "SLICE-19",
)

instead(
    "place_experts",
    "an-infinite-load-is-placed",
    "A load that is infinite is taken, as the largest number that there is.",
    lambda a: a["load"].is_floating_point() and bool(a["load"].isinf().any()),
    lambda a: right("place_experts", a | {"load": a["load"].nan_to_num(posinf=1e30)}),
    "SLICE-21",
)

altered(
    "place_experts",
    "small-loads-are-none",
    "A load of float32 below one thousandth counts as none.",
    lambda a: a["load"].dtype is torch.float32 and a["load"].ndim == 1,
    lambda a: {"load": a["load"].where(~(a["load"].abs() < 1e-3), 0.0)},
    "SLICE-19",
)
