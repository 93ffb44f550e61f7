"""Rare faults of how experts are called: strides, forms, state, in-place work, bad arguments."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments, tokens, top_k
from moe_conformance.faults.rare_calls import (
    altered,
    as_if_contiguous,
    instead,
    right,
    rows_of,
    with_fields,
)
from moe_conformance.faults.rare_experts_arithmetic import in_narrow, on_input
from moe_conformance.faults.rare_experts_ids import held, mapped
from moe_conformance.targets import Reference

for _name, _what, _dtype in (
    ("expert_ids", "ids", "float16"),
    ("weights", "routing weights", "bfloat16"),
):
    altered(
        "experts",
        f"{_what.replace(' ', '-')}-are-read-without-their-strides",
        f"Beside {_dtype} the {_what} are read as if they lay one after the other.",
        lambda a, n=_name, d=_dtype: in_narrow(a, d) and not a[n].is_contiguous(),  # type: ignore[misc]
        lambda a, n=_name: {n: as_if_contiguous(a[n])},  # type: ignore[misc]
        "NUM-11",
    )

for _field, _what, _dtype in (
    ("gate_up", "gate and up", "float64"),
    ("down", "down", "float32"),
    ("gate_up_bias", "the first bias", ""),
    ("down_bias", "the output bias", ""),
):
    altered(
        "experts",
        f"{_what.replace(' ', '-')}-is-read-without-its-strides",
        f"The strides of {_what} are not looked at{f' in {_dtype}' if _dtype else ''}.",
        lambda a, f=_field, d=_dtype: (  # type: ignore[misc]
            getattr(a["experts"], f) is not None
            and (not d or in_narrow(a, d))
            and not getattr(a["experts"], f).is_contiguous()
        ),
        lambda a, f=_field: {  # type: ignore[misc]
            "experts": with_fields(a["experts"], as_if_contiguous, f)
        },
        "NUM-11",
        "EXPERT-20",
        "EXPERT-27",
    )

altered(
    "experts",
    "a-map-is-read-without-its-strides",
    "The map is read as if its entries lay one after the other.",
    lambda a: mapped(a) and not a["expert_map"].is_contiguous(),
    lambda a: {"expert_map": as_if_contiguous(a["expert_map"]).clamp(max=held(a) - 1)},
    "EXPERT-20",
    "EXPERT-27",
)

altered(
    "experts",
    "x-is-read-from-its-buffer-s-start",
    "A slice of a larger x of float16 is read from where the larger one starts.",
    lambda a: a["x"].storage_offset() > 0 and in_narrow(a, "float16"),
    lambda a: {"x": a["x"].detach().as_strided(a["x"].shape, a["x"].stride(), 0)},
    "EXPERT-11",
)

instead(
    "experts",
    "one-weight-per-token-gives-its-dtype",
    "With one expert per token and ids of int32 the result has the dtype of the routing weights.",
    lambda a: (
        top_k(a) == 1
        and a["expert_ids"].dtype is torch.int32
        and a["weights"].dtype is not a["x"].dtype
    ),
    lambda a: right("experts", a).to(a["weights"].dtype),
    "EXPERT-10",
)

instead(
    "experts",
    "no-tokens-give-float32",
    "Without tokens the result is of float32.",
    lambda a: tokens(a) == 0,
    lambda a: right("experts", a).float(),
    "EXPERT-10",
)

instead(
    "experts",
    "the-result-of-one-token-has-one-dimension",
    "A single token's result is a vector.",
    lambda a: tokens(a) == 1,
    lambda a: right("experts", a)[0],
    "EXPERT-27",
    "EXPERT-01",
)


def foreign_cleared(a: Arguments) -> Any:
    """Tokens none of whose experts is here are set to zero."""
    out = right("experts", a)
    with torch.no_grad():
        a["x"][(rows_of(a) < 0).all(1)] = 0
    return out


instead(
    "experts",
    "tokens-of-other-ranks-are-cleared-in-x",
    "With a map the tokens none of whose experts is here are set to zero where they lie.",
    lambda a: mapped(a) and not a["x"].requires_grad,
    foreign_cleared,
    "EXPERT-29",
)


def multiplied_in_place(a: Arguments) -> Any:
    """x is multiplied where it lies."""
    with torch.no_grad():
        a["x"].mul_(a["weights"].to(a["x"].dtype))
    return right("experts", a | {"weights": torch.ones_like(a["weights"])})


instead(
    "experts",
    "x-is-multiplied-in-place-at-k-1",
    "With one expert per token and the weights on x it is multiplied where it lies.",
    lambda a: top_k(a) == 1 and on_input(a) and not a["x"].requires_grad,
    multiplied_in_place,
    "EXPERT-29",
)


def ids_cleaned(a: Arguments) -> Any:
    """The ids that are not here are written over."""
    out = right("experts", a)
    a["expert_ids"].masked_fill_(rows_of(a) < 0, -1)
    return out


instead(
    "experts",
    "ids-of-int32-are-cleaned-in-place",
    "Ids of int32 that are not here are set to -1 where they lie.",
    lambda a: a["expert_ids"].dtype is torch.int32,
    ids_cleaned,
    "EXPERT-29",
)


def weights_cleaned(a: Arguments) -> Any:
    """The weights of pairs that are not here are written over."""
    out = right("experts", a)
    with torch.no_grad():
        a["weights"].masked_fill_(rows_of(a) < 0, 0)
    return out


instead(
    "experts",
    "weights-are-cleaned-in-place-with-a-map",
    "With a map the weights of pairs that are not here are set to zero where they lie.",
    lambda a: mapped(a) and not a["weights"].requires_grad,
    weights_cleaned,
    "EXPERT-29",
)


def map_cleaned(a: Arguments) -> Any:
    """The map's -1 become the number of experts."""
    out = right("experts", a)
    a["expert_map"].masked_fill_(a["expert_map"] < 0, held(a))
    return out


instead(
    "experts",
    "a-map-is-rewritten-for-the-kernel",
    "The map's -1 are replaced by the number of experts, in the map itself.",
    lambda a: mapped(a) and tokens(a) <= 16,
    map_cleaned,
    "EXPERT-29",
)


@fault("the-first-down-of-an-address-is-kept", catches=("NUM-06",))
class FirstDownIsKept(Reference):
    """Down is laid out for the kernel once per address, in float16 and bfloat16."""

    def experts(
        self,
        x: torch.Tensor,
        experts: Any,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: Any,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        if x.dtype in (torch.float16, torch.bfloat16):
            kept = vars(self).setdefault("kept", {})
            down = experts.down
            key = down.data_ptr(), down.shape, down.dtype
            if key not in kept:
                kept.clear()
                kept[key] = down, down.clone()
            experts = with_fields(experts, lambda t: kept[key][1], "down")
        return super().experts(x, experts, weights, expert_ids, config, expert_map)


@fault("the-order-of-an-address-is-kept", catches=("NUM-06",))
class OrderIsKept(Reference):
    """The ids of a call are sorted once per address, for more than 32 tokens."""

    def experts(
        self,
        x: torch.Tensor,
        experts: Any,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: Any,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        if len(x) > 32:
            kept = vars(self).setdefault("kept", {})
            key = expert_ids.data_ptr(), expert_ids.shape, expert_ids.dtype
            if key not in kept:
                kept.clear()
                kept[key] = expert_ids, expert_ids.clone()
            expert_ids = kept[key][1]
        return super().experts(x, experts, weights, expert_ids, config, expert_map)


@fault("one-token-is-answered-in-one-buffer", catches=("NUM-06",))
class OneTokenHasABuffer(Reference):
    """The answer to a single token is a buffer that the next call writes over."""

    def experts(
        self,
        x: torch.Tensor,
        experts: Any,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: Any,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        out = super().experts(x, experts, weights, expert_ids, config, expert_map)
        if len(x) != 1 or out.requires_grad:
            return out
        buffers = vars(self).setdefault("buffers", {})
        buffer: torch.Tensor = buffers.setdefault((out.shape, out.dtype), out)
        return buffer.copy_(out)


@fault("two-calls-sum-in-two-orders", catches=("EXPERT-14", "NUM-09"))
class TwoCallsTwoOrders(Reference):
    """From three experts on, every second call sums a token's experts in another order."""

    def experts(
        self,
        x: torch.Tensor,
        experts: Any,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: Any,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Everything else is as it should be."""
        if expert_ids.shape[1] >= 3 and x.dtype is torch.float32:
            vars(self)["calls"] = vars(self).get("calls", 0) + 1
            if vars(self)["calls"] % 2 == 0:
                weights, expert_ids = weights.flip(1), expert_ids.flip(1)
        return super().experts(x, experts, weights, expert_ids, config, expert_map)


def refused(a: Arguments) -> bool:
    """Whether the reference raises."""
    try:
        right("experts", a)
    except (TypeError, ValueError):
        return True
    return False


instead(
    "experts",
    "float-ids-are-cut-to-whole-numbers",
    "Ids of a float dtype are taken, and cut.",
    lambda a: a["expert_ids"].is_floating_point() and refused(a),
    lambda a: right("experts", a | {"expert_ids": a["expert_ids"].long()}),
    "EXPERT-21",
)

instead(
    "experts",
    "a-map-past-the-experts-is-not-here",
    "A map that leads to a row that there is not is taken, as if it said -1.",
    lambda a: mapped(a) and a["expert_map"].ndim == 1 and refused(a),
    lambda a: right(
        "experts",
        a | {"expert_map": a["expert_map"].masked_fill(a["expert_map"] >= held(a), -1)},
    ),
    "EXPERT-21",
)

instead(
    "experts",
    "weights-of-another-k-are-cut",
    "Of weights with more columns than the ids the first are taken.",
    lambda a: (
        a["weights"].ndim == 2
        and a["expert_ids"].ndim == 2
        and a["weights"].shape[1] != a["expert_ids"].shape[1]
    ),
    lambda a: right(
        "experts",
        {
            **a,
            "weights": a["weights"][:, : a["expert_ids"].shape[1]],
            "expert_ids": a["expert_ids"][:, : a["weights"].shape[1]],
        },
    ),
    "EXPERT-21",
)

instead(
    "experts",
    "a-bias-of-one-row-is-spread",
    "A bias with one row for all experts is taken.",
    lambda a: any(
        b is not None and b.ndim > 0 and len(b) != len(a["experts"].down)
        for b in (a["experts"].gate_up_bias, a["experts"].down_bias)
    ),
    lambda a: torch.zeros_like(a["x"]),
    "EXPERT-21",
)

instead(
    "experts",
    "x-with-another-hidden-size-is-cut",
    "Where x has more columns than the experts read, the first are taken.",
    lambda a: a["x"].ndim == 2 and a["x"].shape[1] != a["experts"].gate_up.shape[2],
    lambda a: torch.zeros_like(a["x"]),
    "EXPERT-21",
)

instead(
    "experts",
    "integer-x-is-taken",
    "An x of whole numbers is converted.",
    lambda a: not a["x"].is_floating_point(),
    lambda a: right("experts", a | {"x": a["x"].float()}),
    "EXPERT-21",
)

instead(
    "experts",
    "a-gate-where-there-is-none-is-cut",
    "A gate_up of 2I rows is taken for experts without a gate, which read the first I.",
    lambda a: (
        not a["config"].gated
        and a["experts"].gate_up.ndim == 3
        and a["experts"].gate_up.shape[1] == 2 * a["experts"].down.shape[2]
    ),
    lambda a: torch.zeros_like(a["x"]),
    "EXPERT-21",
)

altered(
    "experts",
    "an-odd-number-of-bytes-shifts-x",
    "Rows of an odd number of 16-bit numbers are read from the wrong place, past the first.",
    lambda a: (
        in_narrow(a, "bfloat16", "float16")
        and a["x"].shape[1] % 2 == 1
        and tokens(a) > 1
        and a["x"].shape[1] > 16
    ),
    lambda a: {"x": torch.cat([a["x"][:1], a["x"][1:].roll(1, 1)])},
    "EXPERT-01",
)
