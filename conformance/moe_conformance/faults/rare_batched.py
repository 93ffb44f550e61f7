"""Rare faults of experts on a batch of rows each."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_calls import (
    altered,
    as_if_contiguous,
    instead,
    right,
    with_fields,
)
from moe_conformance.faults.rare_experts_arithmetic import in_narrow, on_input, uses
from moe_conformance.faults.rare_experts_gradients import gradient
from moe_conformance.targets import Reference


def rows(a: Arguments) -> int:
    """C."""
    return int(a["x"].shape[1])


def counts(a: Arguments) -> torch.Tensor:
    """[E]."""
    found: torch.Tensor = a["tokens_per_expert"]
    return found


def unused(a: Arguments) -> torch.Tensor:
    """[E, C, 1], the rows past the counts."""
    return (torch.arange(rows(a)) >= counts(a)[:, None])[..., None]


def last_used(a: Arguments) -> torch.Tensor:
    """[E, C, 1], the last row in use."""
    return (torch.arange(rows(a)) == counts(a)[:, None] - 1)[..., None]


def broken(a: Arguments) -> torch.Tensor:
    """[E, C, 1], the rows in use that hold NaN or infinity."""
    return ~unused(a) & ~a["x"].isfinite().all(-1, keepdim=True)


instead(
    "experts_batched",
    "a-broken-row-breaks-its-expert",
    "Rows are masked by multiplication: one that is NaN makes all of its expert's NaN.",
    lambda a: bool(broken(a).any()),
    lambda a: right("experts_batched", a).masked_fill(
        ~unused(a) & broken(a).any(1, keepdim=True), torch.nan
    ),
    "EXPERT-31",
    thread="SGLang #30895",
)

instead(
    "experts_batched",
    "a-broken-row-breaks-the-next-experts",
    "A row that is NaN is added to the same row of the next expert, times zero.",
    lambda a: len(a["x"]) > 1 and bool(broken(a).any()),
    lambda a: right("experts_batched", a).masked_fill(~unused(a) & broken(a).roll(1, 0), torch.nan),
    "EXPERT-31",
)

instead(
    "experts_batched",
    "the-last-row-of-full-tiles-is-lost",
    "In float16 an expert whose rows fill its tiles of 16 loses the last one.",
    lambda a: in_narrow(a, "float16") and bool(((counts(a) > 0) & (counts(a) % 16 == 0)).any()),
    lambda a: right("experts_batched", a).masked_fill(
        last_used(a) & ((counts(a) > 0) & (counts(a) % 16 == 0))[:, None, None], 0
    ),
    "EXPERT-15",
)

instead(
    "experts_batched",
    "a-row-over-a-tile-is-lost",
    "In bfloat16 an expert with one row more than fills its tiles of eight loses it.",
    lambda a: in_narrow(a, "bfloat16") and bool(((counts(a) > 8) & (counts(a) % 8 == 1)).any()),
    lambda a: right("experts_batched", a).masked_fill(
        last_used(a) & ((counts(a) > 8) & (counts(a) % 8 == 1))[:, None, None], 0
    ),
    "EXPERT-15",
)

instead(
    "experts_batched",
    "experts-past-the-16th-are-empty",
    "The grid has 16 experts at most, and those past them are never computed.",
    lambda a: len(a["x"]) > 16,
    lambda a: torch.cat([right("experts_batched", a)[:16], right("experts_batched", a)[16:] * 0]),
    "EXPERT-15",
)

instead(
    "experts_batched",
    "full-batches-have-no-last-row",
    "Where every expert has all its rows in use the last of them is taken for padding.",
    lambda a: rows(a) > 1 and bool((counts(a) == rows(a)).all()) and len(a["x"]) > 0,
    lambda a: right("experts_batched", a).masked_fill(last_used(a), 0),
    "EXPERT-15",
)

instead(
    "experts_batched",
    "empty-experts-give-their-bias",
    "In float32 an expert without rows has its output bias in its first row.",
    lambda a: (
        in_narrow(a, "float32")
        and a["experts"].down_bias is not None
        and rows(a) > 0
        and bool((counts(a) == 0).any())
    ),
    lambda a: torch.where(
        (counts(a) == 0)[:, None, None] & (torch.arange(rows(a)) == 0)[:, None],
        a["experts"].down_bias[:, None].to(a["x"].dtype),
        right("experts_batched", a),
    ),
    "EXPERT-26",
    "EXPERT-23",
)

instead(
    "experts_batched",
    "nothing-to-do-leaves-memory-as-it-was",
    "In float64, where no expert has a row the result is not written.",
    lambda a: in_narrow(a, "float64") and not bool(counts(a).any()),
    lambda a: right("experts_batched", a) + 1,
    "EXPERT-26",
    "EXPERT-23",
    thread="vllm-ascend #9992",
)

instead(
    "experts_batched",
    "unused-rows-are-multiplied-by-zero-in-float16",
    "Rows past the count are multiplied by zero, and what is no number there stays, in float16.",
    lambda a: in_narrow(a, "float16"),
    lambda a: right("experts_batched", a) + torch.where(unused(a), a["x"] * 0, 0),
    "EXPERT-26",
    "EXPERT-15",
)

instead(
    "experts_batched",
    "an-unused-row-reaches-the-one-before-it",
    "The row after the last one in use is read with it, and adds zero times itself.",
    lambda a: in_narrow(a, "float64", "bfloat16"),
    lambda a: (
        right("experts_batched", a)
        + torch.where(last_used(a), (a["x"] * 0).roll(-1, 1), 0).where(~unused(a), 0)
    ),
    "EXPERT-15",
)

altered(
    "experts_batched",
    "counts-of-int32-are-one-less-past-32",
    "A count of int32 past 32 lacks its last row.",
    lambda a: counts(a).dtype is torch.int32 and bool((counts(a) > 32).any()),
    lambda a: {"tokens_per_expert": counts(a) - (counts(a) > 32).to(counts(a))},
    "EXPERT-15",
)

altered(
    "experts_batched",
    "x-is-read-without-its-strides",
    "The strides of a batch of float64 are not looked at.",
    lambda a: in_narrow(a, "float64") and not a["x"].is_contiguous(),
    lambda a: {"x": as_if_contiguous(a["x"])},
    "EXPERT-15",
)

altered(
    "experts_batched",
    "counts-are-read-without-their-strides",
    "Beside float32 the strides of the counts are not looked at.",
    lambda a: in_narrow(a, "float32") and not counts(a).is_contiguous(),
    lambda a: {"tokens_per_expert": as_if_contiguous(counts(a)).clamp(0, rows(a))},
    "EXPERT-26",
    "EXPERT-23",
)

altered(
    "experts_batched",
    "weights-of-experts-are-read-without-their-strides",
    "In float16 the strides of down are not looked at.",
    lambda a: in_narrow(a, "float16") and not a["experts"].down.is_contiguous(),
    lambda a: {"experts": with_fields(a["experts"], as_if_contiguous, "down")},
    "EXPERT-15",
)

altered(
    "experts_batched",
    "wider-weights-of-a-batch-are-read-at-its-width",
    "The first bytes of wider weights are read as weights of the dtype of x.",
    lambda a: a["x"].dtype.itemsize < a["experts"].down.dtype.itemsize,
    lambda a: {
        "experts": with_fields(
            a["experts"],
            lambda t: t.contiguous().view(a["x"].dtype)[..., : t.shape[-1]],
            "gate_up",
            "down",
        )
    },
    "EXPERT-28",
)

instead(
    "experts_batched",
    "a-batch-has-the-dtype-of-its-weights",
    "The result has the dtype of the experts' weights where that is wider than x's.",
    lambda a: a["experts"].down.dtype.itemsize > a["x"].dtype.itemsize,
    lambda a: right("experts_batched", a).to(a["experts"].down.dtype),
    "EXPERT-28",
)

altered(
    "experts_batched",
    "weights-on-the-input-leave-the-bias-out",
    "In bfloat16 or float16, with the weights on the input there is no output bias.",
    lambda a: (
        in_narrow(a, "bfloat16", "float16") and on_input(a) and a["experts"].down_bias is not None
    ),
    lambda a: {"experts": with_fields(a["experts"], torch.zeros_like, "down_bias")},
    "EXPERT-15",
)

altered(
    "experts_batched",
    "swigluoai-has-no-alpha",
    "The slope of swigluoai is 1.702 in a batch.",
    lambda a: uses(a, "swigluoai") and a["config"].alpha != 1.702,
    lambda a: {"config": type(a["config"])("swigluoai", limit=a["config"].limit)},
    "EXPERT-15",
)

instead(
    "experts_batched",
    "float64-batches-are-computed-in-float32",
    "A batch of float64 without a gate is computed in float32.",
    lambda a: in_narrow(a, "float64") and not a["config"].gated,
    lambda a: right("experts_batched", a | {"x": a["x"].float()}).double(),
    "EXPERT-15",
)

instead(
    "experts_batched",
    "a-batch-in-use-is-written-over-without-a-gate",
    "Without a gate the result is written into x.",
    lambda a: not a["config"].gated and not a["x"].requires_grad and in_narrow(a, "float32"),
    lambda a: a["x"].copy_(right("experts_batched", a)),
    "EXPERT-25",
    "EXPERT-23",
)


def padding_cleared(a: Arguments) -> Any:
    """Rows past the count are set to zero where they lie."""
    with torch.no_grad():
        a["x"].masked_fill_(unused(a), 0)
    return right("experts_batched", a)


instead(
    "experts_batched",
    "unused-rows-are-cleared-in-x",
    "Rows past the count are set to zero in x itself, up to eight of them.",
    lambda a: rows(a) <= 8 and not a["x"].requires_grad and in_narrow(a, "bfloat16"),
    padding_cleared,
    "EXPERT-25",
    "EXPERT-24",
)

gradient(
    "the-gradient-of-a-batch-is-that-of-its-first-row",
    "An expert with one row gets no gradient for its down.",
    "experts.down",
    lambda a: bool((counts(a) == 1).any()),
    lambda g, a: g.masked_fill((counts(a) == 1)[:, None, None], 0),
    "EXPERT-22",
    operation="experts_batched",
)

gradient(
    "unused-rows-count-in-the-gradient-of-the-output-bias",
    "The gradient of the output bias is summed over the rows past the counts as well.",
    "experts.down_bias",
    lambda a: bool((counts(a) < rows(a)).any()),
    lambda g, a: g + (rows(a) - counts(a))[:, None],
    "EXPERT-22",
    operation="experts_batched",
)

gradient(
    "unused-rows-have-a-gradient",
    "Rows past the count get the gradient of the last row in use.",
    "x",
    lambda a: rows(a) > 1 and bool((counts(a) < rows(a)).any()),
    lambda g, a: torch.where(unused(a), g.roll(1, 1), g),
    "EXPERT-22",
    operation="experts_batched",
)

gradient(
    "an-empty-expert-has-garbage-for-a-gradient",
    "The gradient of gate_up of an expert without rows is what was in memory.",
    "experts.gate_up",
    lambda a: bool((counts(a) == 0).any()),
    lambda g, a: g + (counts(a) == 0)[:, None, None],
    "EXPERT-22",
    operation="experts_batched",
    thread="pytorch #154557",
)

instead(
    "experts_batched",
    "a-count-past-the-rows-is-cut",
    "In bfloat16 a count of more than C is taken for C.",
    lambda a: (
        in_narrow(a, "bfloat16") and counts(a).ndim == 1 and bool((counts(a) > rows(a)).any())
    ),
    lambda a: right("experts_batched", a | {"tokens_per_expert": counts(a).clamp(max=rows(a))}),
    "EXPERT-24",
)

instead(
    "experts_batched",
    "a-negative-count-is-none",
    "In float32 a count below zero is taken for zero.",
    lambda a: in_narrow(a, "float32") and counts(a).ndim == 1 and bool((counts(a) < 0).any()),
    lambda a: right("experts_batched", a | {"tokens_per_expert": counts(a).clamp(min=0)}),
    "EXPERT-24",
)


@fault("a-batch-is-answered-in-one-buffer", catches=("EXPERT-23",))
class BatchHasABuffer(Reference):
    """The answer is a buffer that the next call of its shape writes over."""

    def experts_batched(
        self, x: torch.Tensor, tokens_per_expert: torch.Tensor, experts: Any, config: Any
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        out = super().experts_batched(x, tokens_per_expert, experts, config)
        if out.requires_grad or not config.gated:
            return out
        buffers = vars(self).setdefault("buffers", {})
        buffer: torch.Tensor = buffers.setdefault((out.shape, out.dtype), out)
        return buffer.copy_(out)


@fault("a-batch-keeps-the-rows-of-the-call-before", catches=("EXPERT-23",))
class BatchKeepsRows(Reference):
    """Rows past the counts hold what the call before it with that shape gave."""

    def experts_batched(
        self, x: torch.Tensor, tokens_per_expert: torch.Tensor, experts: Any, config: Any
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        out = super().experts_batched(x, tokens_per_expert, experts, config)
        kept = vars(self).setdefault("kept", {})
        key = out.shape, out.dtype
        before = kept.get(key)
        kept[key] = out.detach().clone()
        if before is None:
            return out
        past = (torch.arange(x.shape[1]) >= tokens_per_expert[:, None])[..., None]
        return torch.where(past, before, out)
