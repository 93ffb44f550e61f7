"""Faults in one step of the balance loss that show on few inputs only: counts, memory, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import BalanceConfig

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_balance import SEQUENCE, experts, loss
from moe_conformance.faults.rare_gating import otherwise
from moe_conformance.targets import Reference

PLAIN = ("switch", "deepseek_expert")


# The counts.


def _counted(a: Arguments) -> torch.Tensor | None:
    """How often each expert was chosen, where that is all that matters and it can be told."""
    logits, ids = a["logits"], a["expert_ids"]
    shapes = logits.ndim == ids.ndim == 2 and len(logits) == len(ids)
    if not shapes or loss(a) not in PLAIN or a["tokens_per_expert"] is not None:
        return None
    if ids.is_floating_point() or a["padding_mask"] is not None:
        return None
    here = ids[(ids >= 0) & (ids < experts(a))].long()
    return torch.bincount(here, minlength=experts(a))


def stalled(a: Arguments) -> Arguments:
    """Counts are added up one by one in bfloat16, where 256 and one are 256."""
    found = _counted(a)
    if found is None or not bool((found > 256).any()):
        return a
    return a | {"tokens_per_expert": found.clamp(max=256)}


otherwise("balance_loss", "counts-stall-at-256", stalled, "BALANCE-56")


def in_a_byte(a: Arguments) -> Arguments:
    """Counts are kept in a signed byte."""
    found = _counted(a)
    if found is None or not bool((found > 127).any()):
        return a
    return a | {"tokens_per_expert": found.to(torch.int8).long().clamp(min=0)}


otherwise("balance_loss", "counts-of-one-byte", in_a_byte, "BALANCE-44", "BALANCE-56")


def first_that_is_here(a: Arguments) -> Arguments:
    """GShard counts a token's first choice that is here instead of its first."""
    ids = a["expert_ids"]
    if loss(a) != "gshard" or ids.ndim != 2 or a["logits"].ndim != 2:
        return a
    here = ((ids >= 0) & (ids < experts(a))).long()
    return a | {"expert_ids": ids.gather(1, here.argmax(1, keepdim=True))}


otherwise(
    "balance_loss", "gshard-takes-the-first-choice-that-is-here", first_that_is_here, "BALANCE-06"
)


def pair_once(a: Arguments) -> Arguments:
    """Two equal ids count once, where a token has two."""
    ids = a["expert_ids"]
    if ids.ndim != 2 or ids.shape[1] != 2:
        return a
    second = ids[:, 1].where(ids[:, 1] != ids[:, 0], -1)
    return a | {"expert_ids": torch.stack([ids[:, 0], second], 1)}


otherwise("balance_loss", "two-equal-ids-count-once", pair_once, "BALANCE-05")


def nothing_counted(out: Any, a: Arguments) -> Any:
    """A batch whose ids are all of no expert gives 0 / 0."""
    here = (a["expert_ids"] >= 0) & (a["expert_ids"] < experts(a))
    given = a["tokens_per_expert"] is not None or len(a["logits"]) == 0
    return out if given or bool(here.any()) else out + torch.nan


otherwise(
    "balance_loss", "nothing-but-ids-of-no-expert-is-nan", None, "BALANCE-06", after=nothing_counted
)


def in_two_bytes(a: Arguments) -> Arguments:
    """Counts are kept in two bytes."""
    found = _counted(a)
    if found is None or not bool((found > 32767).any()):
        return a
    return a | {"tokens_per_expert": found.to(torch.int16).long().clamp(min=0)}


otherwise("balance_loss", "counts-of-two-bytes", in_two_bytes, "BALANCE-56")


def rest_left_out(a: Arguments) -> Arguments:
    """A token beyond the last whole block of 16 is left out."""
    T = len(a["logits"])
    if T < 17 or T % 16 != 1 or loss(a) not in PLAIN or a["padding_mask"] is not None:
        return a
    return a | {"logits": a["logits"][:-1], "expert_ids": a["expert_ids"][:-1]}


otherwise(
    "balance_loss",
    "a-token-past-the-last-block-is-left-out",
    rest_left_out,
    "BALANCE-01",
    "BALANCE-05",
    "BALANCE-24",
    "BALANCE-45",
)


# What is not finite.


def absent_is_nan(out: Any, a: Arguments) -> Any:
    """An expert whose logit is minus infinity makes the loss NaN."""
    shown = a["logits"] if a["padding_mask"] is None else a["logits"][a["padding_mask"]]
    return out + torch.nan if bool((shown == -torch.inf).any()) else out


otherwise(
    "balance_loss", "an-absent-expert-makes-the-loss-nan", None, "BALANCE-48", after=absent_is_nan
)


def absent_gradient(a: Arguments) -> Arguments:
    """A logit of minus infinity has a NaN gradient."""
    absent = a["logits"] == -torch.inf
    return a | {"logits": with_gradient(a["logits"], lambda g: g.masked_fill(absent, torch.nan))}


otherwise(
    "balance_loss",
    "an-absent-expert-makes-a-gradient-of-the-loss-nan",
    absent_gradient,
    "BALANCE-14",
    "BALANCE-48",
)


def infinite_padding(a: Arguments) -> Arguments:
    """Padding of infinite logits has a NaN gradient, but for softmax."""
    mask, logits = a["padding_mask"], a["logits"]
    if mask is None or a["config"].score == "softmax" or mask.dtype is not torch.bool:
        return a
    if mask.shape != logits.shape[:1]:
        return a
    bad = logits.isinf().any(1) & ~mask
    changed = with_gradient(logits, lambda g: g.masked_fill(bad[:, None], torch.nan))
    return a | {"logits": changed}


otherwise("balance_loss", "infinite-padding-makes-the-gradient-nan", infinite_padding, "BALANCE-14")


def gradient_of_the_sum(out: Any, a: Arguments) -> Any:
    """The sum that sqrtsoftplus scores are divided by adds to the gradient."""
    if a["config"].score != "sqrtsoftplus" or not a["logits"].requires_grad:
        return out
    total = a["logits"].sum()
    return out + 1e-3 * (total - total.detach())


otherwise(
    "balance_loss",
    "a-sum-of-scores-adds-to-the-gradient",
    None,
    "BALANCE-14",
    "BALANCE-23",
    "BALANCE-47",
    "BALANCE-48",
    after=gradient_of_the_sum,
)


def counts_with_gradient(out: Any, a: Arguments) -> Any:
    """Float counts get a gradient."""
    given = a["tokens_per_expert"]
    if given is None or not given.requires_grad:
        return out
    return out + (given.sum() - given.sum().detach()).to(out)


otherwise(
    "balance_loss", "given-counts-get-a-gradient", None, "BALANCE-49", after=counts_with_gradient
)


def counts_in_the_graph(out: Any, a: Arguments) -> Any:
    """The counts of the concatenated loss are part of the graph."""
    given = a["tokens_per_expert"]
    if given is None or not given.requires_grad or loss(a) != "transformers_concatenated":
        return out
    share = given / given.sum().clamp(min=1)
    return out + (share[0] - share[0].detach()).to(out)


otherwise(
    "balance_loss",
    "concatenated-counts-get-a-gradient",
    None,
    "BALANCE-49",
    after=counts_in_the_graph,
)


# Memory.


def shares_in_place(out: Any, a: Arguments) -> Any:
    """Float counts are divided by their sum in place."""
    given = a["tokens_per_expert"]
    if given is not None and given.is_floating_point() and not given.requires_grad:
        given.div_(given.double().sum().to(given))
    return out


otherwise(
    "balance_loss", "float-counts-become-shares-in-place", None, "BALANCE-26", after=shares_in_place
)


def mask_inverted(out: Any, a: Arguments) -> Any:
    """The mask of a loss per sequence is inverted in place."""
    if a["padding_mask"] is not None and loss(a) == "deepseek_sequence":
        a["padding_mask"].logical_not_()
    return out


otherwise("balance_loss", "the-mask-is-inverted-in-place", None, "BALANCE-26", after=mask_inverted)


def ids_cleared(out: Any, a: Arguments) -> Any:
    """Ids of no expert are overwritten with -1."""
    ids = a["expert_ids"]
    ids.masked_fill_((ids < 0) | (ids >= experts(a)), -1)
    return out


otherwise(
    "balance_loss", "ids-of-no-expert-are-cleared-in-place", None, "BALANCE-26", after=ids_cleared
)


@fault(
    "counts-are-added-to-those-of-the-call-before",
    catches=(
        "BALANCE-02",
        "BALANCE-50",
    ),
    thread="SGLang #3339",
)
class CountsKept(Reference):
    """The counters are not cleared where the logits lie where those of the call before lay."""

    def __init__(self) -> None:
        self.kept: tuple[int, torch.Tensor] | None = None

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_reference.load_balancing.balance_loss`."""
        found = _counted(
            {
                "logits": logits,
                "expert_ids": expert_ids,
                "config": config,
                "padding_mask": padding_mask,
                "tokens_per_expert": tokens_per_expert,
            }
        )
        if found is not None and not logits.requires_grad:
            same = self.kept is not None and self.kept[0] == logits.data_ptr()
            if same and self.kept is not None and self.kept[1].shape == found.shape:
                tokens_per_expert = found + self.kept[1]
            self.kept = (logits.data_ptr(), found)
        return super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)


@fault(
    "a-loss-is-kept-for-its-storage",
    catches=(
        "BALANCE-02",
        "BALANCE-27",
        "BALANCE-50",
    ),
    thread="SGLang #25852",
)
class LossKept(Reference):
    """A loss without gradients is kept for the addresses of its arguments."""

    def __init__(self) -> None:
        self.kept: tuple[Any, torch.Tensor] | None = None

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_reference.load_balancing.balance_loss`."""
        key = (logits.data_ptr(), expert_ids.data_ptr(), logits.shape, logits.dtype, config)
        if self.kept is None or self.kept[0] != key or logits.requires_grad:
            found = super().balance_loss(
                logits, expert_ids, config, padding_mask, tokens_per_expert
            )
            self.kept = (key, found)
        found = self.kept[1]
        return found if logits.requires_grad else found.clone()


# What should have raised.


def length_cut(a: Arguments) -> Arguments:
    """Tokens that do not fill a sequence are left out."""
    length = a["config"].sequence_length
    if loss(a) not in SEQUENCE or length is None or a["logits"].ndim != 2:
        return a
    kept = len(a["logits"]) // length * length
    if kept in (0, len(a["logits"])):
        return a
    mask = a["padding_mask"]
    return a | {
        "logits": a["logits"][:kept],
        "expert_ids": a["expert_ids"][:kept],
        "padding_mask": None if mask is None else mask[:kept],
    }


otherwise("balance_loss", "tokens-that-fill-no-sequence-are-left-out", length_cut, "BALANCE-27")


def one_device(a: Arguments) -> Arguments:
    """Devices that do not divide the experts are taken as one."""
    devices = a["config"].num_devices
    if loss(a) != "deepseek_device" or a["logits"].ndim != 2 or not devices:
        return a
    if experts(a) % devices == 0:
        return a
    return a | {"config": replace(a["config"], num_devices=1)}


otherwise("balance_loss", "devices-that-do-not-divide-are-one", one_device, "BALANCE-27")


def no_device(a: Arguments) -> Arguments:
    """A device loss without a number of devices takes one."""
    if loss(a) != "deepseek_device" or a["config"].num_devices is not None:
        return a
    return a | {"config": replace(a["config"], num_devices=1)}


otherwise("balance_loss", "without-devices-there-is-one", no_device, "BALANCE-27")


def counts_spread(a: Arguments) -> Arguments:
    """Counts of shape [1] are taken for every expert."""
    given = a["tokens_per_expert"]
    if given is None or given.shape != (1,):
        return a
    return a | {"tokens_per_expert": given.expand(experts(a))}


otherwise("balance_loss", "counts-of-one-value-are-spread", counts_spread, "BALANCE-27")


def ids_truncated(a: Arguments) -> Arguments:
    """Ids of a float dtype are truncated."""
    ids = a["expert_ids"]
    return a | {"expert_ids": ids.long()} if ids.is_floating_point() else a


otherwise("balance_loss", "float-ids-are-truncated", ids_truncated, "BALANCE-27")


def ids_cut(a: Arguments) -> Arguments:
    """Ids of more tokens than there are logits are cut off."""
    return a | {"expert_ids": a["expert_ids"][: len(a["logits"])]}


otherwise("balance_loss", "ids-of-more-tokens-are-cut", ids_cut, "BALANCE-27")


def logits_converted(a: Arguments) -> Arguments:
    """Integer logits are converted."""
    return a if a["logits"].is_floating_point() else a | {"logits": a["logits"].float()}


otherwise("balance_loss", "integer-logits-have-a-loss", logits_converted, "BALANCE-27")
