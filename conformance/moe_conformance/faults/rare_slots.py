"""Faults of alignment, dispatch and capacity that show on few inputs only."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults.rare import (
    Arguments,
    first_row_scaled,
    last_column_zero,
    last_row_zero,
    rare,
    tokens,
    top_k,
)


def counts(a: Arguments) -> torch.Tensor:
    """Pairs of each expert, those that are not here left out."""
    ids = a["expert_ids"].flatten().long()
    number = a.get("num_experts") or len(a["experts"].down)
    return torch.bincount(ids[(ids >= 0) & (ids < number)], minlength=number)


def slot_lost(out: Any, a: Arguments) -> Any:
    """The last slot before the padded length is not there."""
    slots, experts, length = out
    sentinel = a["expert_ids"].numel()
    kept = slots.clone()
    here = (kept[: int(length)] < sentinel).nonzero()[:, 0]
    kept[here[-1:]] = sentinel
    return kept, experts, length


def slots_exchanged(out: Any, a: Arguments) -> Any:
    """The first and the last slot stand in each other's place."""
    slots, experts, length = out
    here = (slots[: int(length)] < a["expert_ids"].numel()).nonzero()[:, 0]
    kept = slots.clone()
    if len(here) > 1:
        kept[here[[0, -1]]] = slots[here[[-1, 0]]]
    return kept, experts, length


def block_of_another(out: Any, a: Arguments) -> Any:
    """The last block carries the expert of the first."""
    slots, experts, length = out
    last = int(length) // a["block_size"] - 1
    changed = experts.clone()
    if last >= 0:
        changed[last] = experts[0]
    return slots, changed, length


def length_grown(out: Any, a: Arguments) -> Any:
    """The padded length counts a block too many."""
    return out[0], out[1], out[2] + a["block_size"]


def row_moved(out: Any, a: Arguments) -> Any:
    """The last two rows stand in each other's place."""
    rows, number, slots = out
    order = torch.arange(len(rows))
    order[-2:] = order[-2:].flip(0)
    return rows[order], number, slots


def count_grown(out: Any, a: Arguments) -> Any:
    """The last expert counts one row too many."""
    rows, number, slots = out
    changed = number.clone()
    changed[-1:] += 1
    return rows, changed, slots


def one_kept_too_many(out: Any, a: Arguments) -> Any:
    """The last pair that was dropped stays."""
    weights, ids = out
    gone = ((ids == -1) & (a["expert_ids"] >= 0)).nonzero()[-1:]
    weights, ids = weights.clone(), ids.clone()
    for t, k in gone.tolist():
        weights[t, k], ids[t, k] = a["weights"][t, k], a["expert_ids"][t, k]
    return weights, ids


def first_dropped(out: Any, a: Arguments) -> Any:
    """The first pair is dropped although there is room."""
    weights, ids = out
    ids = ids.clone()
    ids[:1, :1] = -1
    return weights, ids


def length_grown_batched(out: Any, a: Arguments) -> Any:
    """The padded length counts a block too many."""
    return out[0], out[1], out[2] + a["block_size"]


def block_of_another_batched(out: Any, a: Arguments) -> Any:
    """The last block carries the expert after its own."""
    rows, experts, length = out
    last = int(length) // a["block_size"] - 1
    changed = experts.clone()
    if last >= 0:
        changed[last] += 1
    return rows, changed, length


rare(
    "align",
    "at-block-size-1",
    "blocks of one slot",
    lambda a: a["block_size"] == 1,
    slots_exchanged,
    "ALIGN-05",
    "ALIGN-07",
    "ALIGN-09",
    "ALIGN-10",
)

rare(
    "align",
    "beyond-256-experts",
    "more than 256 experts",
    lambda a: a["num_experts"] > 256,
    slot_lost,
    "ALIGN-01",
    "ALIGN-10",
    "ALIGN-11",
    "ALIGN-13",
    thread="aiter #2359",
)

rare(
    "align",
    "with-one-expert",
    "a single expert",
    lambda a: a["num_experts"] == 1,
    slot_lost,
    "ALIGN-01",
    "ALIGN-16",
)

rare(
    "align",
    "with-one-token",
    "a single token",
    lambda a: len(a["expert_ids"]) == 1,
    length_grown,
    "ALIGN-03",
    "ALIGN-16",
)

rare(
    "align",
    "where-blocks-are-all-full",
    "experts whose slots all fill their blocks",
    lambda a: bool((counts(a) % a["block_size"] == 0).all()) and int(counts(a).sum()) > 0,
    length_grown,
    "ALIGN-03",
    "ALIGN-11",
    "ALIGN-16",
    thread="LightLLM #1369",
)

rare(
    "align",
    "with-a-map-and-one-block",
    "an expert map, and all slots in one block",
    lambda a: a.get("expert_map") is not None and a["expert_ids"].numel() <= a["block_size"],
    block_of_another,
    "ALIGN-09",
    thread="aiter #2447",
)

rare(
    "align",
    "where-the-first-expert-is-empty",
    "no slot of expert 0 and several others",
    lambda a: int(counts(a)[0]) == 0 and int((counts(a) > 0).sum()) > 3,
    block_of_another,
    "ALIGN-05",
    "ALIGN-09",
    "ALIGN-10",
    thread="SGLang #3339",
)

rare(
    "align",
    "with-dropped-ids-at-k-1",
    "dropped ids and one expert per token",
    lambda a: bool(a.get("drop_invalid")) and top_k(a) == 1,
    slot_lost,
    "ALIGN-01",
    "ALIGN-11",
    "ALIGN-16",
)

rare(
    "align",
    "with-more-experts-than-slots",
    "more experts than slots, and ids of int32",
    lambda a: a["num_experts"] > a["expert_ids"].numel() and a["expert_ids"].dtype is torch.int32,
    slot_lost,
    "ALIGN-01",
    "ALIGN-10",
    "ALIGN-11",
    "ALIGN-13",
    thread="vLLM #19590",
)

rare(
    "align",
    "at-block-size-64",
    "blocks of 64",
    lambda a: a["block_size"] == 64,
    block_of_another,
    "ALIGN-05",
    "ALIGN-09",
)

rare(
    "align",
    "at-k-8",
    "eight experts per token",
    lambda a: top_k(a) == 8,
    slot_lost,
    "ALIGN-01",
    "ALIGN-13",
    "ALIGN-16",
)

rare(
    "align_batched",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["tokens_per_expert"]) == 1,
    length_grown,
    "ALIGN-22",
    "ALIGN-29",
)

rare(
    "align_batched",
    "at-block-size-1",
    "blocks of one row",
    lambda a: a["block_size"] == 1,
    block_of_another_batched,
    "ALIGN-24",
    "ALIGN-25",
)

rare(
    "align_batched",
    "where-a-block-is-larger-than-the-rows",
    "blocks larger than the rows there are",
    lambda a: a["block_size"] > 4 * max(1, a["max_tokens"]),
    length_grown_batched,
    "ALIGN-22",
    "ALIGN-29",
)

rare(
    "align_batched",
    "where-all-is-full",
    "experts that are all full",
    lambda a: a["max_tokens"] > 0 and bool((a["tokens_per_expert"] == a["max_tokens"]).all()),
    block_of_another_batched,
    "ALIGN-24",
)

rare(
    "dispatch",
    "at-k-1-in-float16",
    "one expert per token in float16",
    lambda a: top_k(a) == 1 and a["x"].dtype is torch.float16,
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    "DISPATCH-27",
)

rare(
    "dispatch",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: tokens(a) > 64,
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    "DISPATCH-27",
    thread="aiter #4041",
)

rare(
    "dispatch",
    "with-one-token",
    "a single token",
    lambda a: tokens(a) == 1,
    count_grown,
    "DISPATCH-02",
)

rare(
    "dispatch",
    "where-the-last-expert-is-alone",
    "all rows at the last expert",
    lambda a: a["num_experts"] > 1 and int(counts(a)[:-1].sum()) == 0 and int(counts(a).sum()) > 0,
    count_grown,
    "DISPATCH-02",
)

rare(
    "dispatch",
    "with-one-expert",
    "a single expert",
    lambda a: a["num_experts"] == 1,
    count_grown,
    "DISPATCH-02",
    "DISPATCH-09",
)

rare(
    "dispatch",
    "with-strides-in-bfloat16",
    "a transposed x of bfloat16",
    lambda a: not a["x"].is_contiguous() and a["x"].dtype is torch.bfloat16,
    row_moved,
    "DISPATCH-10",
    thread="SGLang #15432",
)

rare(
    "dispatch",
    "with-a-duplicate-at-k-2",
    "two equal ids in a row of two",
    lambda a: (
        top_k(a) == 2
        and len(a["expert_ids"]) > 0
        and bool((a["expert_ids"][:, 0] == a["expert_ids"][:, -1]).any())
    ),
    row_moved,
    "DISPATCH-01",
    "DISPATCH-17",
    thread="DeepSeek moe_infer scatter_",
)

rare(
    "dispatch",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[1] == 1,
    count_grown,
    "DISPATCH-02",
    "DISPATCH-07",
    "DISPATCH-09",
)

rare(
    "combine",
    "at-k-1",
    "one expert per token, in float16",
    lambda a: a["weights"].shape[1] == 1 and a["rows"].dtype is torch.float16,
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-16",
    "DISPATCH-17",
    thread="DeepEP #112",
)

rare(
    "combine",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: len(a["weights"]) > 64,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "with-one-token",
    "a single token",
    lambda a: len(a["weights"]) == 1,
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "where-no-row-is-missing-in-float64",
    "all pairs there, in float64",
    lambda a: a["rows"].dtype is torch.float64 and len(a["rows"]) == a["weights"].numel(),
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-16",
)

rare(
    "combine",
    "with-few-rows",
    "rows for fewer than half of the pairs",
    lambda a: 0 < 2 * len(a["rows"]) < a["weights"].numel(),
    first_row_scaled,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-14",
    "DISPATCH-16",
    thread="pytorch #154557",
)

rare(
    "combine",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["rows"].shape[1] == 1,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-14",
)

rare(
    "combine",
    "with-strides-in-bfloat16",
    "transposed rows of bfloat16",
    lambda a: not a["rows"].is_contiguous() and a["rows"].dtype is torch.bfloat16,
    last_column_zero,
    "DISPATCH-19",
)

rare(
    "combine",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: len(a["weights"]) == 16,
    last_row_zero,
    "DISPATCH-11",
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-28",
)

rare(
    "combine",
    "with-slots-of-int32-at-k-3",
    "slots of int32 and three experts per token",
    lambda a: a["slots"].dtype is torch.int32 and a["weights"].shape[1] == 3,
    first_row_scaled,
    "DISPATCH-12",
    "DISPATCH-13",
    "DISPATCH-16",
    "DISPATCH-28",
    thread="vLLM #34279",
)

rare(
    "drop_to_capacity",
    "at-capacity-1-by-position",
    "room for one, by position",
    lambda a: a["capacity"] == 1 and a["policy"] == "position",
    first_dropped,
    "DISPATCH-21",
    "DISPATCH-25",
    thread="DeepSpeed #1658",
)

rare(
    "drop_to_capacity",
    "at-k-1",
    "one expert per token, by weight",
    lambda a: top_k(a) == 1 and a["policy"] == "probs",
    one_kept_too_many,
    "DISPATCH-21",
    "DISPATCH-24",
    "DISPATCH-25",
)

rare(
    "drop_to_capacity",
    "with-room-for-all",
    "room for more than there are",
    lambda a: a["capacity"] > a["expert_ids"].numel() and a["policy"] == "probs",
    first_dropped,
    "DISPATCH-21",
    thread="DeepSpeed #8155",
)

rare(
    "drop_to_capacity",
    "in-bfloat16-by-weight",
    "weights of bfloat16",
    lambda a: a["weights"].dtype is torch.bfloat16 and a["policy"] == "probs",
    one_kept_too_many,
    "DISPATCH-21",
    "DISPATCH-24",
    "DISPATCH-25",
    thread="AstrAI #57",
)

rare(
    "drop_to_capacity",
    "with-one-token",
    "a single token",
    lambda a: len(a["weights"]) == 1,
    first_dropped,
    "DISPATCH-21",
)
