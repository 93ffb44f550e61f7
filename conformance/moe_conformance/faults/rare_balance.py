"""Faults of the balance loss that show on few inputs only."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, loss_larger, rare
from moe_conformance.faults.rare_calls import altered, instead

SEQUENCE = ("gshard", "deepseek_sequence")


# What is wrong.


def a_little_larger(out: Any, a: Arguments) -> Any:
    """A hundred-thousandth too much."""
    return out * (1 + 1e-5)


def a_thousandth_larger(out: Any, a: Arguments) -> Any:
    """A thousandth too much."""
    return out * 1.001


def negated(out: Any, a: Arguments) -> Any:
    """The sign is wrong."""
    return -out


def through_float32(out: Any, a: Arguments) -> Any:
    """The result is rounded to float32."""
    return out.float().to(out.dtype)


def in_bfloat16_on_the_way(out: Any, a: Arguments) -> Any:
    """The result is rounded to bfloat16."""
    return out.bfloat16().to(out.dtype)


def one_dimension(out: Any, a: Arguments) -> Any:
    """A tensor of one element in the place of a scalar."""
    return out.reshape(1)


def as_a_number(out: Any, a: Arguments) -> Any:
    """A Python number in the place of a tensor."""
    return float(out)


def as_a_double(out: Any, a: Arguments) -> Any:
    """The result is float64."""
    return out.double()


def as_a_half(out: Any, a: Arguments) -> Any:
    """The result is float16."""
    return out.half()


def gradient_lost(out: Any, a: Arguments) -> Any:
    """No gradient."""
    return out.detach()


def gradient_doubled(out: Any, a: Arguments) -> Any:
    """Twice the gradient."""
    return with_gradient(out, lambda g: 2 * g)


def gradient_negated(out: Any, a: Arguments) -> Any:
    """The gradient has the wrong sign."""
    return with_gradient(out, torch.neg)


def gradient_a_hundredth_larger(out: Any, a: Arguments) -> Any:
    """The gradient is a hundredth too large."""
    return with_gradient(out, lambda g: g * 1.01)


def divided_by_epsilon(out: Any, a: Arguments) -> Any:
    """The sum of a softmax has an epsilon added to it."""
    return out / (1 + a["config"].epsilon)


# In which calls.


def loss(a: Arguments) -> str:
    """The formula."""
    return str(a["config"].loss)


def experts(a: Arguments) -> int:
    """E."""
    return int(a["logits"].shape[1])


def top_k(a: Arguments) -> int:
    """K."""
    return int(a["expert_ids"].shape[1])


def real(a: Arguments) -> int | None:
    """The number of tokens that a mask calls real, or None without one."""
    return None if a.get("padding_mask") is None else int(a["padding_mask"].sum())


def counts(a: Arguments, *dtypes: torch.dtype) -> torch.Tensor | None:
    """The counts given, or None where there are none, or none of these dtypes."""
    found = a.get("tokens_per_expert")
    return found if found is None or not dtypes or found.dtype in dtypes else None


rare(
    "balance_loss",
    "at-128-experts",
    "128 experts",
    lambda a: experts(a) == 128,
    a_thousandth_larger,
    "BALANCE-04",
    "BALANCE-18",
    "BALANCE-45",
)
rare(
    "balance_loss",
    "beyond-256-experts",
    "more than 256 experts",
    lambda a: experts(a) > 256,
    loss_larger,
    "BALANCE-02",
    "BALANCE-11",
    "BALANCE-13",
    "BALANCE-44",
    thread="imp #2056",
)
rare(
    "balance_loss",
    "at-32-experts",
    "32 experts",
    lambda a: experts(a) == 32,
    a_thousandth_larger,
    "BALANCE-06",
)
rare(
    "balance_loss",
    "at-33-experts",
    "33 experts",
    lambda a: experts(a) == 33,
    a_thousandth_larger,
    "BALANCE-44",
)
rare(
    "balance_loss",
    "at-one-expert",
    "one expert",
    lambda a: experts(a) == 1,
    loss_larger,
    "BALANCE-01",
    "BALANCE-09",
    "BALANCE-22",
)
rare(
    "balance_loss",
    "at-one-token",
    "one token and a coefficient below one",
    lambda a: len(a["logits"]) == 1 and a["config"].coefficient < 1,
    a_thousandth_larger,
    "BALANCE-01",
    "BALANCE-02",
    "BALANCE-23",
)
rare(
    "balance_loss",
    "at-64-tokens",
    "64 tokens",
    lambda a: len(a["logits"]) == 64,
    a_thousandth_larger,
    "BALANCE-01",
    "BALANCE-14",
    "BALANCE-46",
)
rare(
    "balance_loss",
    "from-128-tokens",
    "128 tokens or more",
    lambda a: len(a["logits"]) >= 128,
    loss_larger,
    "BALANCE-07",
    "BALANCE-08",
    "BALANCE-15",
)
rare(
    "balance_loss",
    "beyond-512-tokens",
    "more than 512 tokens",
    lambda a: len(a["logits"]) > 512,
    a_thousandth_larger,
    "BALANCE-44",
)
rare(
    "balance_loss",
    "at-k-8",
    "eight experts per token",
    lambda a: top_k(a) == 8,
    a_little_larger,
    "BALANCE-44",
)
rare(
    "balance_loss",
    "beyond-k-8",
    "more than eight experts per token",
    lambda a: top_k(a) > 8,
    loss_larger,
    "BALANCE-44",
)
rare(
    "balance_loss",
    "at-k-of-all-experts",
    "as many experts per token as there are",
    lambda a: top_k(a) == experts(a) > 1,
    loss_larger,
    "BALANCE-04",
    "BALANCE-06",
    "BALANCE-10",
    "BALANCE-44",
)
rare(
    "balance_loss",
    "with-gshard-at-k-1",
    "gshard and one expert per token",
    lambda a: top_k(a) == 1 and loss(a) == "gshard",
    a_little_larger,
    "BALANCE-08",
    "BALANCE-15",
    "BALANCE-44",
    "BALANCE-46",
)
rare(
    "balance_loss",
    "with-gshard-without-a-length",
    "gshard over the whole batch",
    lambda a: loss(a) == "gshard" and a["config"].sequence_length is None,
    a_thousandth_larger,
    "BALANCE-07",
    "BALANCE-11",
    "BALANCE-44",
    "BALANCE-46",
)
rare(
    "balance_loss",
    "with-sequences-of-one-token",
    "sequences of one token",
    lambda a: a["config"].sequence_length == 1 and loss(a) in SEQUENCE,
    loss_larger,
    "BALANCE-05",
    "BALANCE-08",
    "BALANCE-15",
)
rare(
    "balance_loss",
    "with-one-sequence",
    "one sequence",
    lambda a: a["config"].sequence_length == len(a["logits"]) and loss(a) == "deepseek_sequence",
    loss_larger,
    "BALANCE-05",
    "BALANCE-14",
    "BALANCE-19",
    "BALANCE-44",
    thread="Megatron #5798",
)
rare(
    "balance_loss",
    "with-one-device",
    "one device",
    lambda a: a["config"].num_devices == 1 and loss(a) == "deepseek_device",
    loss_larger,
    "BALANCE-09",
    "BALANCE-11",
    "BALANCE-45",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-a-device-for-each-expert",
    "a device for each expert",
    lambda a: a["config"].num_devices == experts(a) > 1 and loss(a) == "deepseek_device",
    loss_larger,
    "BALANCE-09",
    "BALANCE-11",
    "BALANCE-48",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-three-devices",
    "three devices",
    lambda a: a["config"].num_devices == 3 and loss(a) == "deepseek_device",
    loss_larger,
    "BALANCE-05",
    "BALANCE-18",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-a-length-of-another-loss",
    "a length that the loss has no use for",
    lambda a: a["config"].sequence_length is not None and loss(a) not in SEQUENCE,
    loss_larger,
    "BALANCE-45",
)
rare(
    "balance_loss",
    "with-devices-of-another-loss",
    "devices that the loss has no use for",
    lambda a: a["config"].num_devices is not None and loss(a) != "deepseek_device",
    loss_larger,
    "BALANCE-45",
)
rare(
    "balance_loss",
    "with-an-epsilon-of-another-score",
    "softmax over 8 experts and more, and an epsilon that shows",
    lambda a: a["config"].score == "softmax" and a["config"].epsilon > 1e-3 and experts(a) > 8,
    divided_by_epsilon,
    "BALANCE-02",
    "BALANCE-07",
    "BALANCE-46",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-a-full-mask",
    "a mask without padding",
    lambda a: real(a) == len(a["logits"]),
    loss_larger,
    "BALANCE-46",
)
rare(
    "balance_loss",
    "with-one-real-token",
    "a single real token",
    lambda a: real(a) == 1,
    loss_larger,
    "BALANCE-13",
    "BALANCE-14",
    "BALANCE-15",
    "BALANCE-46",
    thread="Megatron #1617",
)
rare(
    "balance_loss",
    "with-a-strided-mask",
    "a mask with strides",
    lambda a: real(a) is not None and not a["padding_mask"].is_contiguous(),
    loss_larger,
    "BALANCE-13",
    "BALANCE-14",
    "BALANCE-18",
    "BALANCE-46",
)
rare(
    "balance_loss",
    "with-strided-counts",
    "counts with strides",
    lambda a: (c := counts(a)) is not None and not c.is_contiguous(),
    loss_larger,
    "BALANCE-18",
    "BALANCE-23",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-counts-and-a-mask",
    "counts and a mask",
    lambda a: counts(a) is not None and real(a) is not None,
    loss_larger,
    "BALANCE-18",
)
rare(
    "balance_loss",
    "with-fractions-of-a-token",
    "float32 counts that are no integers",
    lambda a: (c := counts(a, torch.float32)) is not None and bool((c % 1 != 0).any()),
    a_thousandth_larger,
    "BALANCE-18",
)
rare(
    "balance_loss",
    "with-float64-counts",
    "float64 counts",
    lambda a: counts(a, torch.float64) is not None,
    loss_larger,
    "BALANCE-18",
    "BALANCE-23",
)
rare(
    "balance_loss",
    "with-narrow-counts",
    "bfloat16 or float16 counts",
    lambda a: counts(a, torch.bfloat16, torch.float16) is not None,
    loss_larger,
    "BALANCE-18",
    "BALANCE-23",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-counts-beyond-int32",
    "counts whose sum is beyond int32",
    lambda a: (c := counts(a)) is not None and float(c.double().sum()) >= 2**31,
    negated,
    "BALANCE-18",
    "BALANCE-23",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-counts-of-devices",
    "counts and devices",
    lambda a: counts(a) is not None and loss(a) == "deepseek_device",
    a_little_larger,
    "BALANCE-18",
    "BALANCE-23",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "with-int32-ids-and-gshard",
    "gshard and int32 ids",
    lambda a: loss(a) == "gshard" and a["expert_ids"].dtype is torch.int32 and top_k(a) > 1,
    a_thousandth_larger,
    "BALANCE-07",
    "BALANCE-12",
    "BALANCE-44",
    "BALANCE-46",
)
rare(
    "balance_loss",
    "in-one-dimension-at-k-1",
    "one expert per token and switch",
    lambda a: top_k(a) == 1 and loss(a) == "switch",
    one_dimension,
    "BALANCE-20",
    thread="megablocks #87",
)
rare(
    "balance_loss",
    "as-a-number-without-tokens",
    "no tokens",
    lambda a: len(a["logits"]) == 0,
    as_a_number,
    "BALANCE-16",
    "BALANCE-47",
)
rare(
    "balance_loss",
    "without-a-gradient-of-no-tokens",
    "no tokens",
    lambda a: len(a["logits"]) == 0,
    gradient_lost,
    "BALANCE-47",
    thread="DeepSpeed #5066",
)
rare(
    "balance_loss",
    "without-a-gradient-at-a-coefficient-of-zero",
    "a coefficient of zero",
    lambda a: a["config"].coefficient == 0,
    gradient_lost,
    "BALANCE-47",
)
rare(
    "balance_loss",
    "as-a-double-with-counts",
    "float32 logits and int64 counts",
    lambda a: counts(a, torch.int64) is not None and a["logits"].dtype is torch.float32,
    as_a_double,
    "BALANCE-20",
)
rare(
    "balance_loss",
    "as-a-half-of-sigmoids",
    "float16 logits and sigmoid",
    lambda a: a["logits"].dtype is torch.float16 and a["config"].score == "sigmoid",
    as_a_half,
    "BALANCE-14",
    "BALANCE-19",
    "BALANCE-20",
)
rare(
    "balance_loss",
    "backwards-with-counts",
    "counts",
    lambda a: counts(a) is not None,
    gradient_doubled,
    "BALANCE-23",
    thread="Megatron #3672",
)
rare(
    "balance_loss",
    "backwards-with-devices",
    "devices",
    lambda a: loss(a) == "deepseek_device",
    gradient_doubled,
    "BALANCE-14",
    "BALANCE-23",
)
rare(
    "balance_loss",
    "backwards-in-bfloat16",
    "sqrtsoftplus of bfloat16",
    lambda a: a["logits"].dtype is torch.bfloat16 and a["config"].score == "sqrtsoftplus",
    gradient_negated,
    "BALANCE-14",
    "BALANCE-23",
    "BALANCE-24",
)
rare(
    "balance_loss",
    "backwards-with-gshard-and-padding",
    "gshard with padding",
    lambda a: real(a) is not None and loss(a) == "gshard",
    gradient_doubled,
    "BALANCE-14",
)
rare(
    "balance_loss",
    "backwards-beyond-64-tokens",
    "more than 64 tokens",
    lambda a: len(a["logits"]) > 64,
    gradient_a_hundredth_larger,
    "BALANCE-14",
    "BALANCE-23",
)
rare(
    "balance_loss",
    "through-float32-with-sigmoid",
    "sigmoids of float64 logits",
    lambda a: a["logits"].dtype is torch.float64 and a["config"].score == "sigmoid",
    through_float32,
    "BALANCE-11",
    "BALANCE-12",
    "BALANCE-46",
    "BALANCE-50",
)
rare(
    "balance_loss",
    "in-bfloat16-with-padding",
    "bfloat16 logits and padding",
    lambda a: a["logits"].dtype is torch.bfloat16 and real(a) is not None,
    in_bfloat16_on_the_way,
    "BALANCE-14",
)


altered(
    "balance_loss",
    "ids-of-64-bits-are-cut-to-32-before-they-are-counted",
    "An id past 2^32 means not here, and becomes a small one.",
    lambda a: a["expert_ids"].dtype is torch.int64,
    lambda a: {"expert_ids": a["expert_ids"].to(torch.int32)},
    "BALANCE-06",
)

instead(
    "balance_loss",
    "the-loss-of-no-tokens-has-the-dtype-of-the-logits",
    "Where there is nothing to count, a zero of the logits is given back before they are widened.",
    lambda a: len(a["logits"]) == 0,
    lambda a: a["logits"].sum(),
    "BALANCE-20",
)
