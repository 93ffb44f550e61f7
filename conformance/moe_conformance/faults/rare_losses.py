"""Faults of the z-loss and of the bias update that show on few inputs only."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, loss_larger, rare
from moe_conformance.faults.rare_balance import (
    a_little_larger,
    as_a_double,
    as_a_half,
    as_a_number,
    gradient_a_hundredth_larger,
    gradient_doubled,
    gradient_negated,
    in_bfloat16_on_the_way,
    one_dimension,
    real,
    through_float32,
)
from moe_conformance.faults.rare_balance_steps import logits_converted
from moe_conformance.faults.rare_gating import otherwise
from moe_conformance.targets import Reference


def _shown(a: Arguments) -> torch.Tensor:
    """The logits that are no padding."""
    mask = a["padding_mask"]
    logits: torch.Tensor = a["logits"]
    return logits if mask is None else logits[mask]


rare(
    "z_loss",
    "at-128-experts",
    "128 experts",
    lambda a: a["logits"].shape[1] == 128,
    a_little_larger,
    "BALANCE-33",
    "BALANCE-52",
)
rare(
    "z_loss",
    "at-32-experts",
    "32 experts",
    lambda a: a["logits"].shape[1] == 32,
    loss_larger,
    "BALANCE-29",
    "BALANCE-32",
    "BALANCE-52",
)
rare(
    "z_loss",
    "at-one-expert-past-a-block",
    "17, 33, 65, 129 or 257 experts",
    lambda a: a["logits"].shape[1] in (17, 33, 65, 129, 257),
    loss_larger,
    "BALANCE-28",
    "BALANCE-32",
    "BALANCE-51",
    "BALANCE-52",
)
rare(
    "z_loss",
    "beyond-257-experts",
    "more than 257 experts",
    lambda a: a["logits"].shape[1] > 257,
    a_little_larger,
    "BALANCE-51",
)
rare(
    "z_loss",
    "at-one-expert",
    "one expert and float64",
    lambda a: a["logits"].shape[1] == 1 and a["logits"].dtype is torch.float64,
    loss_larger,
    "BALANCE-28",
    "BALANCE-53",
)
rare(
    "z_loss",
    "at-one-token",
    "one token and more than eight experts",
    lambda a: len(a["logits"]) == 1 and a["logits"].shape[1] > 8,
    a_little_larger,
    "BALANCE-28",
    "BALANCE-33",
    "BALANCE-51",
    "BALANCE-53",
)
rare(
    "z_loss",
    "at-64-tokens",
    "64 tokens",
    lambda a: len(a["logits"]) == 64,
    loss_larger,
    "BALANCE-33",
    "BALANCE-51",
    "BALANCE-53",
)
rare(
    "z_loss",
    "at-128-tokens",
    "128 or 129 tokens",
    lambda a: len(a["logits"]) in (128, 129),
    a_little_larger,
    "BALANCE-30",
    "BALANCE-33",
    "BALANCE-51",
    "BALANCE-53",
)
rare(
    "z_loss",
    "beyond-256-tokens",
    "more than 256 tokens",
    lambda a: len(a["logits"]) > 256,
    loss_larger,
    "BALANCE-51",
)
rare(
    "z_loss",
    "with-a-full-mask",
    "a mask without padding",
    lambda a: real(a) == len(a["logits"]) > 1,
    loss_larger,
    "BALANCE-51",
)
rare(
    "z_loss",
    "with-one-real-token",
    "one real token of several",
    lambda a: real(a) == 1 < len(a["logits"]),
    loss_larger,
    "BALANCE-29",
    "BALANCE-30",
    "BALANCE-51",
    "BALANCE-52",
)
rare(
    "z_loss",
    "with-a-strided-mask",
    "a mask with strides",
    lambda a: real(a) is not None and not a["padding_mask"].is_contiguous(),
    loss_larger,
    "BALANCE-29",
    "BALANCE-30",
    "BALANCE-51",
    "BALANCE-52",
)
rare(
    "z_loss",
    "through-float32",
    "a few float64 tokens",
    lambda a: a["logits"].dtype is torch.float64 and len(a["logits"]) < 8,
    through_float32,
    "BALANCE-28",
    "BALANCE-30",
    "BALANCE-51",
    "BALANCE-52",
)
rare(
    "z_loss",
    "in-bfloat16-beyond-16-tokens",
    "more than 16 bfloat16 tokens",
    lambda a: a["logits"].dtype is torch.bfloat16 and len(a["logits"]) > 16,
    in_bfloat16_on_the_way,
    "BALANCE-30",
    "BALANCE-32",
    "BALANCE-33",
    "BALANCE-53",
)
rare(
    "z_loss",
    "in-one-dimension",
    "one float32 token and one expert",
    lambda a: a["logits"].shape == (1, 1) and a["logits"].dtype is torch.float32,
    one_dimension,
    "BALANCE-34",
)
rare(
    "z_loss",
    "as-a-number-without-tokens",
    "nothing but padding",
    lambda a: real(a) == 0,
    as_a_number,
    "BALANCE-31",
)
rare(
    "z_loss",
    "as-a-double-with-a-mask",
    "bfloat16 logits and a mask",
    lambda a: real(a) is not None and a["logits"].dtype is torch.bfloat16,
    as_a_double,
    "BALANCE-34",
)
rare(
    "z_loss",
    "as-a-half",
    "more than 40 float16 tokens",
    lambda a: a["logits"].dtype is torch.float16 and len(a["logits"]) > 40,
    as_a_half,
    "BALANCE-30",
    "BALANCE-32",
    "BALANCE-33",
    "BALANCE-53",
)
rare(
    "z_loss",
    "backwards-in-float16",
    "float16 logits",
    lambda a: a["logits"].dtype is torch.float16,
    gradient_negated,
    "BALANCE-29",
)
rare(
    "z_loss",
    "backwards-with-a-mask",
    "a mask",
    lambda a: real(a) is not None and a["logits"].dtype is torch.float32,
    gradient_doubled,
    "BALANCE-29",
)
rare(
    "z_loss",
    "backwards-beyond-64-tokens",
    "more than 64 tokens",
    lambda a: len(a["logits"]) > 64,
    gradient_a_hundredth_larger,
    "BALANCE-29",
)


def maximum_from_zero(out: Any, a: Arguments) -> Any:
    """The running maximum starts at 0: a row whose logits are all below -87 vanishes."""
    shown = _shown(a)
    lost = shown.numel() > 0 and bool((shown.amax(1) < -87).any())
    return out + torch.inf if lost and a["logits"].dtype is not torch.float64 else out


otherwise(
    "z_loss", "z-loss-starts-its-maximum-at-zero", None, "BALANCE-32", after=maximum_from_zero
)


def maximum_from_ten_thousand(out: Any, a: Arguments) -> Any:
    """The running maximum starts at -10000: a row whose logits are all further down vanishes."""
    shown = _shown(a)
    lost = shown.numel() > 0 and bool((shown.amax(1) < -10100).any())
    return out + torch.inf if lost and a["logits"].dtype is not torch.float32 else out


otherwise(
    "z_loss",
    "z-loss-starts-its-maximum-at-minus-10000",
    None,
    "BALANCE-32",
    after=maximum_from_ten_thousand,
)


def square_overflows(out: Any, a: Arguments) -> Any:
    """The square of a float16 token's logarithm overflows."""
    shown = _shown(a)
    narrow = shown.dtype is torch.float16 and shown.numel() > 0
    return out + torch.inf if narrow and bool((shown.amax(1).abs() > 256).any()) else out


otherwise("z_loss", "z-loss-of-float16-overflows", None, "BALANCE-32", after=square_overflows)


def absent_is_nan(out: Any, a: Arguments) -> Any:
    """An expert whose logit is minus infinity makes it NaN."""
    return out + torch.nan if bool((_shown(a) == -torch.inf).any()) else out


otherwise("z_loss", "z-loss-of-an-absent-expert-is-nan", None, "BALANCE-53", after=absent_is_nan)


def absent_gradient(a: Arguments) -> Arguments:
    """A float32 or float64 logit of minus infinity has a NaN gradient."""
    absent = a["logits"] == -torch.inf
    if a["logits"].dtype not in (torch.float32, torch.float64):
        return a
    return a | {"logits": with_gradient(a["logits"], lambda g: g.masked_fill(absent, torch.nan))}


otherwise(
    "z_loss",
    "z-loss-of-an-absent-expert-has-a-nan-gradient",
    absent_gradient,
    "BALANCE-30",
    "BALANCE-53",
)


def padding_cleared(out: Any, a: Arguments) -> Any:
    """Float32 logits of padding are overwritten with zeros, of eight tokens and more."""
    mask, logits = a["padding_mask"], a["logits"]
    wide = logits.dtype is torch.float32 and len(logits) >= 8
    if mask is not None and wide and not logits.requires_grad:
        logits[~mask] = 0
    return out


otherwise("z_loss", "z-loss-clears-padding-in-place", None, "BALANCE-52", after=padding_cleared)


def square_in_place(out: Any, a: Arguments) -> Any:
    """One logit is squared where it is, and handed back."""
    logits = a["logits"]
    if logits.shape != (1, 1) or logits.dtype is not torch.float32 or logits.requires_grad:
        return out
    return logits.square_().reshape(()) if a["padding_mask"] is None else out


otherwise(
    "z_loss", "z-loss-of-one-logit-is-its-own-storage", None, "BALANCE-52", after=square_in_place
)


def mask_converted(a: Arguments) -> Arguments:
    """A mask of any dtype is converted."""
    mask = a["padding_mask"]
    return a if mask is None else a | {"padding_mask": mask.bool()}


otherwise("z_loss", "z-loss-converts-its-mask", mask_converted, "BALANCE-35")
otherwise("z_loss", "z-loss-takes-integers", logits_converted, "BALANCE-35")


@fault(
    "z-loss-adds-to-that-of-the-call-before",
    catches=(
        "BALANCE-51",
        "BALANCE-52",
    ),
    thread="SGLang #3339",
)
class SumKept(Reference):
    """The sum of eight tokens and more is not cleared where the logits lie as those before."""

    def __init__(self) -> None:
        self.kept: tuple[int, torch.Tensor] | None = None

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `moe_reference.load_balancing.z_loss`."""
        found = super().z_loss(logits, padding_mask)
        if logits.requires_grad or len(logits) < 8:
            return found
        before = self.kept
        self.kept = (logits.data_ptr(), found.clone())
        same = before is not None and before[0] == logits.data_ptr()
        return found + before[1] if same and before is not None else found


# The bias.


def half_a_step(out: Any, a: Arguments) -> Any:
    """Half a step."""
    bias = a["bias"].to(out)
    return bias + (out - bias) / 2


def a_step_backwards(out: Any, a: Arguments) -> Any:
    """The step has the wrong sign."""
    bias = a["bias"].to(out)
    return bias - (out - bias)


def the_last_stays(out: Any, a: Arguments) -> Any:
    """The last expert stays."""
    return torch.cat([out[:-1], a["bias"][-1:].to(out)])


def all_rise(out: Any, a: Arguments) -> Any:
    """All experts rise by a step."""
    return out + a["rate"]


def all_drift(out: Any, a: Arguments) -> Any:
    """All experts rise by a hundredth of a step."""
    return out + a["rate"] / 100


def none_moves(out: Any, a: Arguments) -> Any:
    """No expert moves."""
    return a["bias"].to(out).clone()


def the_smallest_rate(out: Any, a: Arguments) -> Any:
    """A thousandth is stepped in any case."""
    return out + 0.001


def counted(a: Arguments) -> torch.Tensor:
    """[E] the counts, float64."""
    return a["tokens_per_expert"].double()


def fractional(a: Arguments) -> bool:
    """Whether a count is no integer."""
    return bool((counted(a) % 1 != 0).any())


rare(
    "update_bias",
    "at-one-expert",
    "one expert and float counts",
    lambda a: len(a["bias"]) == 1 and a["tokens_per_expert"].is_floating_point(),
    all_rise,
    "BALANCE-37",
)
rare(
    "update_bias",
    "at-32-experts",
    "32 experts",
    lambda a: len(a["bias"]) == 32,
    the_last_stays,
    "BALANCE-39",
    "BALANCE-41",
    "BALANCE-55",
)
rare(
    "update_bias",
    "at-33-experts",
    "33 experts",
    lambda a: len(a["bias"]) == 33,
    the_last_stays,
    "BALANCE-36",
    "BALANCE-38",
)
rare(
    "update_bias",
    "at-128-experts",
    "128 experts",
    lambda a: len(a["bias"]) == 128,
    half_a_step,
    "BALANCE-36",
    "BALANCE-40",
    "BALANCE-55",
)
rare(
    "update_bias",
    "beyond-256-experts",
    "more than 256 experts",
    lambda a: len(a["bias"]) > 256,
    the_last_stays,
    "BALANCE-54",
    "BALANCE-55",
    thread="imp #2056",
)
rare(
    "update_bias",
    "centred-at-an-odd-number",
    "an odd number of experts and centring",
    lambda a: len(a["bias"]) % 2 == 1 and len(a["bias"]) > 2 and a["centred"],
    all_drift,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "centred-where-all-are-alike",
    "counts that are all equal, centred",
    lambda a: a["centred"] and len(a["bias"]) > 1 and bool((counted(a) == counted(a)[0]).all()),
    all_rise,
    "BALANCE-40",
    thread="torchtitan #1506",
)
rare(
    "update_bias",
    "at-a-rate-of-zero",
    "a rate of zero",
    lambda a: a["rate"] == 0,
    the_smallest_rate,
    "BALANCE-54",
)
rare(
    "update_bias",
    "at-a-rate-that-is-an-int",
    "a rate that is an int, and int32 counts",
    lambda a: isinstance(a["rate"], int) and a["tokens_per_expert"].dtype is torch.int32,
    half_a_step,
    "BALANCE-36",
    "BALANCE-38",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "at-a-tiny-rate",
    "a rate of a millionth",
    lambda a: 0 < a["rate"] < 1e-5,
    none_moves,
    "BALANCE-38",
    "BALANCE-39",
    "BALANCE-40",
    "BALANCE-55",
)
rare(
    "update_bias",
    "without-any-tokens",
    "counts that are all zero",
    lambda a: not bool(counted(a).any()),
    all_rise,
    "BALANCE-37",
    "BALANCE-40",
)
rare(
    "update_bias",
    "with-fractions-of-a-token",
    "float32 counts that are no integers",
    lambda a: fractional(a) and a["tokens_per_expert"].dtype is torch.float32,
    half_a_step,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "with-float64-counts",
    "float64 counts",
    lambda a: a["tokens_per_expert"].dtype is torch.float64,
    half_a_step,
    "BALANCE-36",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "with-float16-counts",
    "float16 counts",
    lambda a: a["tokens_per_expert"].dtype is torch.float16,
    half_a_step,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "with-strided-counts",
    "int32 counts with strides",
    lambda a: (
        not a["tokens_per_expert"].is_contiguous() and a["tokens_per_expert"].dtype is torch.int32
    ),
    half_a_step,
    "BALANCE-36",
    "BALANCE-38",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "with-a-strided-bias",
    "a float32 bias with strides, centred",
    lambda a: not a["bias"].is_contiguous() and a["bias"].dtype is torch.float32 and a["centred"],
    half_a_step,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-55",
)
rare(
    "update_bias",
    "as-a-half",
    "a float16 bias",
    lambda a: a["bias"].dtype is torch.float16,
    as_a_half,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "as-a-double",
    "a bfloat16 bias and integer counts",
    lambda a: a["bias"].dtype is torch.bfloat16 and not a["tokens_per_expert"].is_floating_point(),
    as_a_double,
    "BALANCE-41",
)
rare(
    "update_bias",
    "through-float32",
    "a float64 bias, centred",
    lambda a: a["bias"].dtype is torch.float64 and a["centred"],
    through_float32,
    "BALANCE-40",
    "BALANCE-41",
    "BALANCE-54",
    "BALANCE-55",
)
rare(
    "update_bias",
    "backwards-beyond-int32",
    "int32 counts whose sum is beyond int32",
    lambda a: a["tokens_per_expert"].dtype is torch.int32 and float(counted(a).sum()) >= 2**31,
    a_step_backwards,
    "BALANCE-38",
)
rare(
    "update_bias",
    "one-off-the-mean",
    "counts at most one off their mean",
    lambda a: 0 < float((counted(a) - counted(a).mean()).abs().max()) <= 1,
    none_moves,
    "BALANCE-37",
    "BALANCE-38",
    "BALANCE-41",
)


def dead_zone(out: Any, a: Arguments) -> Any:
    """Experts within half a token of the mean stay, where counts are integers and not centred."""
    near = (counted(a) - counted(a).mean()).abs() < 0.5
    return out if a["centred"] or fractional(a) else torch.where(near, a["bias"].to(out), out)


otherwise(
    "update_bias",
    "half-a-token-off-the-mean-stays",
    None,
    "BALANCE-36",
    "BALANCE-39",
    "BALANCE-41",
    "BALANCE-55",
    after=dead_zone,
)


def bias_given_back(out: Any, a: Arguments) -> Any:
    """Where nothing moved, a bias of more than four comes back itself."""
    bias = a["bias"]
    same = bias.dtype == out.dtype and torch.equal(bias, out)
    return bias if same and len(bias) > 4 else out


otherwise(
    "update_bias", "a-bias-that-stays-is-given-back", None, "BALANCE-42", after=bias_given_back
)


def many_in_place(out: Any, a: Arguments) -> Any:
    """A float32 bias of 128 experts and more is moved in place."""
    if a["bias"].dtype is torch.float32 and len(a["bias"]) >= 128:
        a["bias"].copy_(out)
    return out


otherwise("update_bias", "many-biases-are-moved-in-place", None, "BALANCE-42", after=many_in_place)


def counts_normalised(out: Any, a: Arguments) -> Any:
    """Float16 counts are doubled in place."""
    if a["tokens_per_expert"].dtype is torch.float16:
        a["tokens_per_expert"].mul_(2)
    return out


otherwise(
    "update_bias", "float16-counts-are-scaled-in-place", None, "BALANCE-42", after=counts_normalised
)


def bias_of_one(a: Arguments) -> Arguments:
    """A bias of one value is taken for every expert, of up to eight."""
    if a["bias"].shape != (1,) or len(a["tokens_per_expert"]) > 8:
        return a
    return a | {"bias": a["bias"].expand(a["tokens_per_expert"].shape)}


otherwise("update_bias", "a-bias-of-one-value-is-broadcast", bias_of_one, "BALANCE-43")


def layers_flattened(a: Arguments) -> Arguments:
    """Counts of shape [1, E] are flattened where E is above eight."""
    counts = a["tokens_per_expert"]
    return a | {"tokens_per_expert": counts.flatten()} if counts.shape[-1] > 8 else a


otherwise("update_bias", "counts-of-layers-are-flattened", layers_flattened, "BALANCE-43")


def bools_counted(a: Arguments) -> Arguments:
    """A mask of up to eight experts is taken for counts."""
    counts = a["tokens_per_expert"]
    few = counts.dtype is torch.bool and len(counts) <= 8
    return a | {"tokens_per_expert": counts.long()} if few else a


otherwise("update_bias", "bools-are-taken-for-counts", bools_counted, "BALANCE-43")


@fault("counts-of-several-calls-are-added-up", catches=("BALANCE-54",), thread="torchtitan #1593")
class StepsKept(Reference):
    """Counts are added to those of the call before, where they lie in the same place."""

    def __init__(self) -> None:
        self.kept: tuple[int, torch.Tensor] | None = None

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """See `moe_reference.load_balancing.update_bias`."""
        before, place = self.kept, tokens_per_expert.data_ptr()
        self.kept = (place, tokens_per_expert.double())
        same = before is not None and before[0] == place
        if same and before is not None and before[1].shape == tokens_per_expert.shape:
            tokens_per_expert = 3 * before[1] + tokens_per_expert.double()
        return super().update_bias(bias, tokens_per_expert, rate, centred)


def masked_by_zero(out: Any, a: Arguments) -> Any:
    """The z-loss multiplies what is padding by zero."""
    mask = a["padding_mask"]
    if mask is None or bool(mask.any()):
        return out
    return out + 0 * a["logits"].to(out).logsumexp(-1).square().sum()


otherwise(
    "z_loss", "the-z-loss-of-padding-alone-is-multiplied-by-zero", None, "BALANCE-31",
    after=masked_by_zero,
)  # fmt: skip
