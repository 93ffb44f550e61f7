"""Faults that show on few inputs only: one size, one dtype, one corner of a configuration.

Kernels are specialised, and a specialisation that is wrong is right everywhere else. Each of these
is the reference but for the calls that its condition picks out, on which a small thing is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Arguments = dict[str, Any]
When = Callable[[Arguments], bool]
Wrong = Callable[[Any, Arguments], Any]


def rare(
    operation: str,
    name: str,
    where: str,
    when: When,
    wrong: Wrong,
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of one operation.

    Args:
        operation: the operation that it is in.
        name: in which calls.
        where: the same in words.
        when: the same of a call's arguments.
        wrong: from the right result and the arguments to the wrong one.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """
    sentence = f"{(wrong.__doc__ or '').rstrip('.')}, with {where}."
    right = getattr(Reference, operation)
    names = list(inspect.signature(right).parameters)[1:]

    def call(self: Reference, *given: Any, **named: Any) -> Any:
        result = right(self, *given, **named)
        arguments = dict(zip(names, given, strict=False)) | named
        return wrong(result, arguments) if when(arguments) else result

    made = type("Rare", (Reference,), {operation: call, "__doc__": sentence})
    title = f"{operation.replace('_', '-')}-is-wrong-{name}"
    fault(title, catches=catches, thread=thread)(made)


# Which calls.


def tokens(a: Arguments) -> int:
    """T, or the rows of what stands in its place."""
    for name in ("logits", "x", "expert_ids", "weights"):
        if name in a:
            shape = a[name].shape
            return int(shape[0] * shape[1]) if name == "x" and a[name].ndim == 3 else int(shape[0])
    raise KeyError("no tokens")


def top_k(a: Arguments) -> int:
    """K."""
    if "expert_ids" in a:
        return int(a["expert_ids"].shape[1])
    return int((a["config"].routing if hasattr(a["config"], "routing") else a["config"]).top_k)


def counts(a: Arguments) -> torch.Tensor:
    """Pairs of each expert, those that are not here left out."""
    ids = a["expert_ids"].flatten().long()
    number = a.get("num_experts") or len(a["experts"].down)
    return torch.bincount(ids[(ids >= 0) & (ids < number)], minlength=number)


# What is wrong.


def first_row_scaled(out: Any, a: Arguments) -> Any:
    """The first row is an eighth too large."""
    return torch.cat([out[:1] * 1.125, out[1:]])


def last_row_zero(out: Any, a: Arguments) -> Any:
    """The last row is zero."""
    return torch.cat([out[:-1], out[-1:] * 0])


def last_column_zero(out: Any, a: Arguments) -> Any:
    """The last column is zero."""
    return torch.cat([out[..., :-1], out[..., -1:] * 0], -1)


def in_layer(wrong: Wrong) -> Wrong:
    """The same on the tokens of a layer's output."""

    def change(out: Any, a: Arguments) -> Any:
        flat = wrong(out.output.flatten(0, 1), a)
        return replace(out, output=flat.view(out.output.shape))

    return change


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


def loss_larger(out: Any, a: Arguments) -> Any:
    """An eighth too much."""
    return out * 1.125


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
rare(
    "experts",
    "below-16-tokens-in-float16",
    "fewer than 16 tokens of float16",
    lambda a: tokens(a) < 16 and a["x"].dtype is torch.float16,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
    thread="aiter #4041",
)
rare(
    "experts",
    "beyond-64-tokens",
    "more than 64 tokens",
    lambda a: tokens(a) > 64,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="aiter #4451",
)
rare(
    "experts",
    "at-k-5",
    "five experts per token",
    lambda a: top_k(a) == 5,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-04",
    "EXPERT-05",
)
rare(
    "experts",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[1] == 1,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)
rare(
    "experts",
    "at-hidden-size-32",
    "a hidden size of 32",
    lambda a: a["x"].shape[1] == 32,
    last_column_zero,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-05",
    "EXPERT-06",
    thread="triton #10190",
)
rare(
    "experts",
    "at-intermediate-size-1",
    "an intermediate size of 1",
    lambda a: a["experts"].down.shape[2] == 1,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)
rare(
    "experts",
    "at-intermediate-size-17",
    "one over a tile of intermediate size 16",
    lambda a: a["experts"].down.shape[2] == 17,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="vLLM #48173",
)
rare(
    "experts",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["experts"].down) == 1,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)
rare(
    "experts",
    "with-relu2",
    "relu2 and no gate",
    lambda a: a["config"].activation == "relu2" and not a["config"].gated,
    first_row_scaled,
    "EXPERT-03",
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
)
rare(
    "experts",
    "with-gelu-tanh-in-bfloat16",
    "gelu_tanh in bfloat16",
    lambda a: a["config"].activation == "gelu_tanh" and a["x"].dtype is torch.bfloat16,
    first_row_scaled,
    "EXPERT-02",
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    thread="vLLM #56839",
)
rare(
    "experts",
    "with-relu-and-weighted-input",
    "relu and weights on the input",
    lambda a: a["config"].activation == "relu" and a["config"].weight_on == "input",
    first_row_scaled,
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    "EXPERT-08",
)
rare(
    "experts",
    "with-swigluoai-in-float16",
    "swigluoai in float16",
    lambda a: a["config"].activation == "swigluoai" and a["x"].dtype is torch.float16,
    first_row_scaled,
    "EXPERT-05",
    "EXPERT-06",
    "EXPERT-07",
    "EXPERT-08",
    thread="SGLang #23776",
)
rare(
    "experts",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: tokens(a) == 16,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
)
rare(
    "experts",
    "at-65-tokens",
    "one token more than a tile",
    lambda a: tokens(a) == 65,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-03",
    "EXPERT-04",
    "EXPERT-05",
    thread="aiter #4041",
)
rare(
    "experts",
    "with-a-map-of-one-expert",
    "an expert map that keeps one expert",
    lambda a: a.get("expert_map") is not None and int((a["expert_map"] >= 0).sum()) == 1,
    first_row_scaled,
    "EXPERT-08",
    thread="flashinfer #1469",
)
rare(
    "experts",
    "with-strides-in-float16",
    "a transposed x of float16",
    lambda a: not a["x"].is_contiguous() and a["x"].dtype is torch.float16,
    last_column_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
)
rare(
    "experts",
    "at-k-1-in-bfloat16",
    "one expert per token in bfloat16",
    lambda a: top_k(a) == 1 and a["x"].dtype is torch.bfloat16,
    first_row_scaled,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-04",
    "EXPERT-05",
)
rare(
    "experts",
    "with-7-experts",
    "seven experts",
    lambda a: len(a["experts"].down) == 7,
    last_row_zero,
    "EXPERT-01",
    "EXPERT-02",
    "EXPERT-03",
    "EXPERT-04",
    thread="moe-ops permute",
)
rare(
    "experts_batched",
    "with-one-row",
    "batches of one row",
    lambda a: a["x"].shape[1] == 1,
    first_row_scaled,
    "EXPERT-15",
)
rare(
    "experts_batched",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["x"]) == 1,
    last_row_zero,
    "EXPERT-15",
)
rare(
    "experts_batched",
    "in-float16-with-biases",
    "biases in float16",
    lambda a: a["x"].dtype is torch.float16 and a["experts"].down_bias is not None,
    first_row_scaled,
    "EXPERT-15",
)
rare(
    "experts_batched",
    "with-relu2",
    "relu2",
    lambda a: a["config"].activation == "relu2",
    first_row_scaled,
    "EXPERT-15",
)
rare(
    "experts_batched",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[2] == 1,
    last_row_zero,
    "EXPERT-15",
)
rare(
    "experts_batched",
    "with-swiglu-limit",
    "swiglu_limit",
    lambda a: a["config"].activation == "swiglu_limit",
    first_row_scaled,
    "EXPERT-15",
    thread="SGLang #23776",
)
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
rare(
    "layer",
    "with-one-token",
    "a single token",
    lambda a: tokens(a) == 1,
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
    "a router bias and groups",
    lambda a: a["parameters"].router_bias is not None and a["config"].routing.num_groups > 1,
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
    "a single expert",
    lambda a: len(a["parameters"].router) == 1,
    in_layer(last_row_zero),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)
rare(
    "layer",
    "at-hidden-size-1",
    "a hidden size of 1",
    lambda a: a["x"].shape[2] == 1,
    in_layer(first_row_scaled),
    "LAYER-01",
    "LAYER-04",
    "LAYER-05",
    "LAYER-07",
)
rare(
    "layer",
    "at-k-4",
    "four experts per token",
    lambda a: top_k(a) == 4,
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
    "one rank",
    lambda a: a["world_size"] == 1,
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
    "with-biases-of-all",
    "biases of all experts",
    lambda a: a["experts"].down_bias is not None and a["count"] == len(a["experts"].down),
    bias_turned,
    "SLICE-05",
    "SLICE-07",
)
rare(
    "slice_tensor_parallel",
    "on-five-ranks",
    "five ranks",
    lambda a: a["world_size"] == 5,
    gate_turned,
    "SLICE-10",
    "SLICE-13",
)
rare(
    "slice_tensor_parallel",
    "with-one-row-each",
    "one row per rank",
    lambda a: a["world_size"] > 1 and a["experts"].down.shape[2] == a["world_size"],
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
    lambda a: a["world_size"] == 3 and a["experts"].down_bias is not None,
    bias_turned,
    "SLICE-11",
)
rare(
    "place_experts",
    "with-one-expert",
    "a single expert",
    lambda a: len(a["load"]) == 1,
    replicas_grown,
    "SLICE-17",
)
rare(
    "place_experts",
    "on-five-ranks",
    "five ranks",
    lambda a: a["num_ranks"] == 5,
    table_turned,
    "SLICE-17",
    thread="vLLM #51984",
)
rare(
    "place_experts",
    "without-load",
    "no load at all",
    lambda a: not bool(a["load"].any()),
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
