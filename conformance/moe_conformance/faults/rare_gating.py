"""Faults of routing that show on few inputs only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments, last_row_zero, rare
from moe_conformance.targets import Reference


def otherwise(
    operation: str,
    name: str,
    before: Callable[[Arguments], Arguments] | None,
    *catches: str,
    after: Callable[[Any, Arguments], Any] | None = None,
    thread: str = "",
) -> None:
    """Register a fault that calls the reference with other arguments, or changes its answer.

    Args:
        operation: the operation that it is in.
        name: what goes wrong.
        before: from the arguments to those that are used in their place; its docstring says what
            goes wrong, unless there is none and that of `after` does.
        *catches: ids of the requirements that have to fail.
        after: from the answer and the arguments given to the answer that comes back.
        thread: where it really happened, or empty.
    """
    right = getattr(Reference, operation)
    signature = inspect.signature(right)

    def call(self: Reference, *given: Any, **named: Any) -> Any:
        bound = signature.bind(self, *given, **named)
        bound.apply_defaults()
        arguments = {key: value for key, value in bound.arguments.items() if key != "self"}
        answer = right(self, **(before(arguments) if before else arguments))
        return after(answer, arguments) if after else answer

    change = before or after
    assert change is not None
    members = {operation: call, "__doc__": change.__doc__, "__module__": change.__module__}
    fault(name, catches=catches, thread=thread)(type("Otherwise", (Reference,), members))


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
    "GATE-06",
    "GATE-14",
    "GATE-15",
    "GATE-22",
    thread="imp #2056",
)

rare(
    "route",
    "at-60-experts",
    "exactly 60 experts",
    lambda a: a["logits"].shape[1] == 60,
    weights_larger,
    "GATE-28",
    thread="vLLM-metax #270",
)

rare(
    "route",
    "at-257-experts",
    "257 experts",
    lambda a: a["logits"].shape[1] == 257,
    id_moved,
    "GATE-06",
    "GATE-09",
    thread="aiter #2359",
)

rare(
    "route",
    "with-one-token",
    "a single token and a bias",
    lambda a: len(a["logits"]) == 1 and a.get("bias") is not None,
    weights_larger,
    "GATE-03",
    "GATE-21",
    "GATE-25",
    thread="SGLang #25852",
)

rare(
    "route",
    "beyond-64-tokens",
    "65 tokens to 95",
    lambda a: 64 < len(a["logits"]) < 96,
    last_weight_gone,
    "GATE-03",
    "GATE-14",
    "GATE-27",
    "GATE-28",
    thread="aiter #2359",
)

rare(
    "route",
    "at-16-tokens",
    "exactly 16 tokens",
    lambda a: len(a["logits"]) == 16,
    id_moved,
    "GATE-05",
)

rare(
    "route",
    "at-k-6",
    "six experts per token",
    lambda a: a["config"].top_k == 6,
    weights_exchanged,
    "GATE-06",
    "GATE-14",
    "GATE-18",
    "GATE-27",
)

rare(
    "route",
    "with-one-open-group-of-eight",
    "one open group of eight",
    lambda a: a["config"].num_groups == 8 and a["config"].topk_groups == 1,
    weights_larger,
    "GATE-27",
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
    "GATE-07",
    "GATE-21",
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
    "GATE-22",
    "GATE-25",
)

rare(
    "route",
    "with-sqrtsoftplus-and-groups",
    "renormalised sqrtsoftplus and groups",
    lambda a: (
        a["config"].score == "sqrtsoftplus"
        and a["config"].num_groups > 1
        and a["config"].renormalize
    ),
    last_weight_gone,
    "GATE-07",
    "GATE-15",
    "GATE-18",
    "GATE-27",
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
    "GATE-22",
    "GATE-28",
    thread="vLLM #45037",
)

rare(
    "route",
    "with-a-bias-below-zero",
    "a bias that is below zero everywhere",
    lambda a: a.get("bias") is not None and bool((a["bias"] < 0).all()),
    id_moved,
    "GATE-12",
    "GATE-25",
    thread="transformers #45441",
)

rare(
    "route",
    "in-float16-at-k-1",
    "float16 logits and one expert per token",
    lambda a: a["logits"].dtype is torch.float16 and a["config"].top_k == 1,
    weights_larger,
    "GATE-07",
    "GATE-09",
    "GATE-22",
    "GATE-23",
    thread="minimind #858",
)

rare(
    "route",
    "in-bfloat16-with-a-table",
    "bfloat16 logits and a hash table",
    lambda a: a["logits"].dtype is torch.bfloat16 and a["config"].hash_table is not None,
    last_weight_gone,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
    thread="verl-ascend-recipe #126",
)

rare(
    "route",
    "with-strides-and-a-bias",
    "transposed logits, a bias and several experts per token",
    lambda a: a["logits"].stride(0) == 1 and a.get("bias") is not None and a["config"].top_k > 1,
    weights_larger,
    "GATE-03",
    "GATE-21",
    "GATE-25",
    "GATE-27",
)

rare(
    "route",
    "with-all-groups-open",
    "all groups open",
    lambda a: 1 < a["config"].num_groups == a["config"].topk_groups,
    id_moved,
    "GATE-03",
    "GATE-11",
    "GATE-12",
    "GATE-29",
)

rare(
    "route",
    "with-two-experts",
    "two experts",
    lambda a: a["logits"].shape[1] == 2,
    weights_exchanged,
    "GATE-06",
)
