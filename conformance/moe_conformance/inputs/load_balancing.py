"""Inputs of `balance_loss`, `z_loss` and `update_bias`.

Dimension key: T tokens, E experts, K experts per token, N sequences, L tokens per sequence,
D devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import BalanceConfig

from moe_conformance.inputs.given import (
    ID_DTYPES,
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    choice,
    distinct_rows,
    loads_inside,
    planned,
    seeds,
    sizes,
    torch_dtype,
)
from moe_conformance.inputs.routing import BLOCKS, FEW, fill_logits, past
from moe_conformance.inputs.slots import spread
from moe_conformance.worker import LAYOUTS

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "loss": (
        "switch",
        "gshard",
        "deepseek_expert",
        "deepseek_sequence",
        "deepseek_device",
        "transformers_concatenated",
    ),
    "score": ("softmax", "sigmoid", "sqrtsoftplus"),
    "padding_mask": (False, True),
    "tokens_per_expert": (False, True),
    "centred": (False, True),
}
"""Every value that the suite draws for the choices of load balancing, simplest first."""

NUMBERS: dict[str, tuple[float, ...]] = {
    "coefficient": (1.0, 0.01, 0.5, 2.5),
    "epsilon": (1e-20, 1e-9, 0.25),
}
"""The numbers in `BalanceConfig`, where the target declares none. An epsilon of 0.25 shows where it
is added."""

BATCH = ("switch", "deepseek_expert", "deepseek_device", "transformers_concatenated")
"""Losses that are taken over the whole batch, and that take the counts of a larger one."""

SEQUENCE = ("gshard", "deepseek_sequence")
"""Losses that may be taken per sequence."""

EXPERTS = (1, 2, 3, 4, 8, 16, 31, 32, 33, 60, 64, 65, 128, 129, 160, 255, 256, 257)
"""Numbers of experts: those of published models, one off powers of two, and beyond one byte."""

LOGITS = ("normal", "leaning", "collapsed", "wide", "shifted")
"""Shapes of logits: those of `routing.CONTENTS`; `leaning` prefers the same experts for every
token, `collapsed` so much that no other gets any."""

ROUTINGS = ("uniform", "skewed", "half empty", "one expert", "duplicates")
"""Ids that are not the best experts of the logits; see `slots.LOADS`."""

PADDING = ("some", "tail", "sequences")
"""Where padding is: anywhere, at the end of each sequence, or in whole sequences."""

LOADS = ("spread", "balanced", "idle", "one expert", "huge", "alike", "nothing")
"""Counts: any; many at exactly their mean; half of them 0; one expert has all; beyond 2^24 with
differences of a few; all the same; all 0."""

RATES = (0.001, 0.01, 0.125, 1e-6, 2)
"""Sizes of a step, one of them an int."""

FLOAT_COUNTS = ("float32", "float64", "bfloat16", "float16")
"""Counts are floats where ranks have averaged them: then they need not be integers."""

CROWDS = (200, 400, 3000, 5000, 45_000)
"""Numbers of tokens that make counts too large for a byte, bfloat16, float16 and two bytes."""

INVALID = (-1, -2, 2**31 - 1, -(2**31))
"""Ids that mean *not here*, beside those from E on."""


def balance(
    *,
    losses: tuple[str, ...] = UNIVERSE["loss"],
    scores: tuple[str, ...] = UNIVERSE["score"],
    padding: bool = False,
    counts: bool = False,
    contents: tuple[str, ...] = LOGITS,
    routings: tuple[str, ...] = ("chosen",),
    invalid: bool = False,
    least_sequences: int = 1,
    least_tokens: int = 1,
    least_experts: int = 1,
    least_k: int = 1,
    least_devices: int = 1,
    left_out: bool = False,
    simplest: bool = False,
    narrow: bool | None = None,
    most_experts: int | None = None,
    **numbers: tuple[float, ...],
) -> Given:
    """Inputs of `balance_loss` inside the declaration.

    Args:
        losses: of `UNIVERSE`.
        scores: of `UNIVERSE`.
        padding: with a mask that has padding and at least one real token.
        counts: with the counts of a larger batch.
        contents: shapes of logits to draw from.
        routings: `chosen` is the K best experts of the logits in descending order; others are of
            `ROUTINGS`.
        invalid: some ids mean *not here*.
        least_sequences: smallest N; 2 where sequences are compared.
        least_tokens: smallest number of tokens per sequence.
        least_experts: smallest number of experts.
        least_k: smallest number of experts per token.
        least_devices: smallest D.
        left_out: at least one expert more than K.
        simplest: softmax only, where the target takes it.
        narrow: True for bfloat16 and float16 only, False for the others where there are any.
        most_experts: largest number of experts, where the declaration goes as low.
        **numbers: values of `coefficient` and `epsilon`, inside the declared ones.
    """
    fixed: dict[str, tuple[Any, ...]] = {
        "loss": losses,
        "score": scores,
        "padding_mask": (padding,),
        "tokens_per_expert": (counts,),
        **numbers,
    }
    least = {
        "most_experts": most_experts or EXPERTS[-1],
        "sequences": least_sequences,
        # Padding needs a real token beside it.
        "length": max(least_tokens, 2 if padding and least_sequences == 1 else 1),
        "experts": max(least_experts, least_k + left_out),
        "top_k": least_k,
        "devices": least_devices,
    }

    def plans(scope: Scope) -> Plans | None:
        dtypes = _dtypes(scope, narrow)
        if not dtypes or (invalid and not _takes_invalid(scope)):
            return None
        made = [
            _balance_plans(scope, declared, choices, dtypes, contents, routings, least, left_out)
            for declared in scope.capabilities.alternatives("balance")
            if (choices := _chosen(declared, fixed, simplest)) is not None
        ]
        possible = [each for each in made if each is not None]
        if not possible:
            return None
        return st.one_of(possible).map(lambda plan: {**plan, "invalid": invalid})

    return Given(plans, build_balance)


def _dtypes(scope: Scope, narrow: bool | None) -> tuple[str, ...]:
    small = tuple(d for d in scope.dtypes if d in ("bfloat16", "float16"))
    wide = tuple(d for d in scope.dtypes if d not in small)
    if narrow is None:
        return scope.dtypes
    return small if narrow else wide or small


def _takes_invalid(scope: Scope) -> bool:
    return all(
        any(True in declared.get("invalid_ids", (True,)) for declared in choices)
        for choices in map(scope.capabilities.alternatives, ("balance", "align", "experts"))
    )


def _chosen(
    declared: Mapping[str, tuple[Any, ...]], fixed: Mapping[str, tuple[Any, ...]], simplest: bool
) -> dict[str, tuple[Any, ...]] | None:
    """The values that each field may take, or None where one may take none."""
    chosen = {}
    for name, universe in {**UNIVERSE, **NUMBERS}.items():
        allowed = declared.get(name, universe if name in UNIVERSE else fixed.get(name, universe))
        values = tuple(value for value in fixed.get(name, allowed) if value in allowed)
        if not values:
            return None
        chosen[name] = values
    if simplest and "softmax" in chosen["score"]:
        chosen["score"] = ("softmax",)
    return chosen


def _balance_plans(
    scope: Scope,
    declared: Mapping[str, tuple[Any, ...]],
    choices: Mapping[str, tuple[Any, ...]],
    dtypes: tuple[str, ...],
    contents: tuple[str, ...],
    routings: tuple[str, ...],
    least: Mapping[str, int],
    left_out: bool,
) -> Plans | None:
    capabilities = scope.capabilities
    kinds = (*capabilities.id_dtypes, *capabilities.id_dtypes, *FLOAT_COUNTS)
    lengths = declared.get("sequence_length", (None, "any"))
    if least["top_k"] > (capabilities.max_top_k or least["top_k"]):
        return None
    routings = loads_inside(scope, routings)
    routings = tuple(name for name in routings if name in declared.get("ids", (name,)))
    fewest = max(least["experts"], capabilities.min_experts)
    most = _most_experts(scope, max(least["most_experts"], fewest))
    devices = [
        d
        for d in declared.get("num_devices", (1, 2, 4, 8, 3))
        if d is not None and least["devices"] <= d and most // d * d >= fewest
    ]
    losses = tuple(
        loss
        for loss in choices["loss"]
        if (loss != "deepseek_device" or devices)
        and (least["sequences"] == 1 or (loss in SEQUENCE and lengths != (None,)))
        and (loss != "deepseek_sequence" or lengths != (None,))
    )
    if not losses or not routings or most < fewest:
        return None

    def plan(draw: st.DrawFn) -> Plan:
        loss = draw(choice(losses))
        experts = draw(_experts(fewest, most, capabilities.max_experts))
        groups = None
        if loss == "deepseek_device":
            groups = draw(choice(devices))
            experts = min(most // groups, -(-experts // groups)) * groups
        top = min(experts - left_out, capabilities.max_top_k or 8, 8)
        few = st.integers(least["top_k"], max(least["top_k"], min(top, 4)))
        top_k = draw(st.one_of(few, few, st.integers(least["top_k"], max(least["top_k"], top))))
        return {
            "experts": experts,
            "top_k": top_k,
            "loss": loss,
            **draw(_lengths(loss, lengths, least, 12 if scope.interpreted or experts > 64 else 40)),
            "devices": groups,
            "score": draw(choice(choices["score"])),
            "coefficient": draw(choice(choices["coefficient"])),
            "epsilon": draw(choice(choices["epsilon"])),
            "dtype": draw(choice(dtypes)),
            "logits": draw(choice(contents)),
            "routing": draw(choice(routings)),
            "ids": draw(choice(capabilities.id_dtypes)),
            "padding": draw(choice(PADDING)) if choices["padding_mask"][0] else None,
            "counts": draw(choice(kinds)) if choices["tokens_per_expert"][0] else None,
            "layout": draw(choice(layouts(scope))),
            "seed": draw(seeds()),
            **distinct_rows(scope),
        }

    return planned(plan)


def _most_experts(scope: Scope, wanted: int) -> int:
    most = min(scope.capabilities.max_experts or wanted, wanted)
    return min(most, 33) if scope.interpreted else most


def _experts(fewest: int, most: int, limit: int | None) -> st.SearchStrategy[int]:
    known = (*EXPERTS, fewest, limit or fewest)
    edges = [size for size in known if fewest <= size <= most]
    few = st.integers(fewest, max(fewest, min(most, 9)))
    return st.one_of(few, few, st.sampled_from(edges))


@st.composite
def _lengths(
    draw: st.DrawFn, loss: str, lengths: tuple[Any, ...], least: Mapping[str, int], most: int
) -> Plan:
    """N and L, and whether the configuration says L."""
    if loss not in SEQUENCE:
        tokens = draw(sizes(3 * most, 16, 64, least=least["sequences"] * least["length"]))
        return {"sequences": 1, "length": tokens, "per_sequence": False}
    told = True
    if loss == "gshard" and least["sequences"] == 1 and None in lengths:
        told = draw(st.booleans()) and lengths != (None,)
    sequences = draw(st.integers(least["sequences"], max(5, least["sequences"])))
    length = draw(sizes(most, 16, least=least["length"]))
    if told and "any" not in lengths:
        length = draw(choice([each for each in lengths if each is not None]))
    return {"sequences": sequences, "length": length, "per_sequence": told}


def layouts(scope: Scope) -> tuple[str, ...]:
    """Strides of the logits."""
    return LAYOUTS if scope.capabilities.strides else ("contiguous",)


def build_balance(plan: Plan) -> Inputs:
    """The arguments of `balance_loss`."""
    content = Content(plan["seed"])
    tokens, experts = plan["sequences"] * plan["length"], plan["experts"]
    logits = fill(content, plan["logits"], tokens, experts)
    mask = None
    if plan["padding"] is not None:
        mask = fill_mask(content, plan["padding"], plan["sequences"], plan["length"])
        # What padding holds would count most if it were counted: one expert has it all.
        logits[~mask] = 0
        logits[~mask, int(content.integers(0, experts - 1, 1))] = 12
    logits = logits.to(torch_dtype(plan["dtype"]))
    ids = fill_ids(content, plan, logits, mask)
    counts = None
    if plan["counts"] is not None:
        # A share of each, from none to much more than this batch has.
        counts = content.integers(0, 8, experts) ** 4
        counts[int(content.integers(0, experts - 1, 1))] += 1
        # Up to 2^30, still exact as int32 and as float32, or down to halves and quarters.
        much = int(content.integers(0, 1, 1))
        if plan["counts"] in ID_DTYPES:
            counts = (counts * 2 ** (18 * much)).to(ID_DTYPES[plan["counts"]])
            if much and plan["dtype"] == "float64":
                # Then they need not be exact as float32, and are not.
                odd = 2 * content.integers(0, 7, experts).to(counts.dtype) + 1
                counts = counts + odd * (counts > 0)
        else:
            # 2^30 is beyond float16.
            many = 0 if plan["counts"] == "float16" else 18
            counts = counts * 2.0 ** (many if much else -2)
            counts = counts.to(torch_dtype(plan["counts"]))
    config = BalanceConfig(
        loss=plan["loss"],
        coefficient=plan["coefficient"],
        score=plan["score"],
        epsilon=plan["epsilon"],
        sequence_length=plan["length"] if plan["per_sequence"] else None,
        num_devices=plan["devices"],
    )
    return {
        "logits": logits,
        "expert_ids": ids,
        "config": config,
        "padding_mask": mask,
        "tokens_per_expert": counts,
        "layouts": dict.fromkeys(
            ("logits", "expert_ids", "padding_mask", "tokens_per_expert"), plan["layout"]
        ),
    }


def at_boundaries(given: Given) -> Given:
    """The same inputs, one of E, T and K one past a block, named by `axis`; the others small.

    Args:
        given: inputs of `balance_loss` or `z_loss` with at most 9 experts, of whole batches.
    """

    def plans(scope: Scope) -> Plans | None:
        base = given.plans(scope)
        if base is None:
            return None
        capabilities = scope.capabilities
        least = capabilities.min_experts
        largest = 65 if scope.interpreted else BLOCKS[-1] + 1
        most = min(capabilities.max_experts or largest, largest)
        experts = past(BLOCKS, max(least, 9), most)
        top_k = past(FEW, 1, min(most, capabilities.max_top_k or 33))
        tokens = past(BLOCKS, 1, largest)

        def plan(draw: st.DrawFn) -> Plan:
            drawn = dict(draw(base))
            length = "length" if "length" in drawn else "tokens"
            found = {"experts": experts, "top_k": top_k if "top_k" in drawn else []}
            axis = draw(choice(["tokens", *(name for name in found if found[name])]))
            if axis == "tokens":
                drawn[length] = draw(choice(tokens))
                return drawn | {"axis": axis}
            drawn[length] = min(drawn[length], 9)
            drawn[axis] = draw(choice(found[axis]))
            if axis == "top_k":
                more = draw(st.integers(0, 3))
                drawn["experts"] = min(most, max(drawn["top_k"] + more, least))
            return drawn | {"axis": axis}

        return planned(plan)

    return Given(plans, lambda plan: given.build(plan) | {"axis": plan["axis"]})


def crowded(given: Given) -> Given:
    """The same inputs of `balance_loss` or `z_loss` with many tokens."""

    def plans(scope: Scope) -> Plans | None:
        base = given.plans(scope)
        if base is None or scope.interpreted:
            return None

        def in_a_crowd(plan: Plan, number: int) -> Plan:
            return {**plan, "length" if "length" in plan else "tokens": number}

        return st.builds(in_a_crowd, base, st.sampled_from(CROWDS))

    return Given(plans, given.build)


def fill(content: Content, kind: str, tokens: int, experts: int) -> torch.Tensor:
    """Logits [T, E] of one of the kinds in `LOGITS`, float64."""
    if kind in ("leaning", "collapsed"):
        preferred = content.normal(1, experts, std=1.5 if kind == "leaning" else 8.0)
        return preferred + content.normal(tokens, experts, std=0.5)
    return fill_logits(content, kind, tokens, experts)


def fill_mask(content: Content, kind: str, sequences: int, length: int) -> torch.Tensor:
    """[T] bool, True = a real token; at least one is real, and where T > 1 at least one is not."""
    real = torch.ones(sequences, length, dtype=torch.bool)
    if kind == "sequences":
        real[content.uniform(0, 1, sequences) < 0.4] = False
    elif kind == "tail":
        kept = content.integers(0, length, sequences, 1)
        real = torch.arange(length) < kept
    else:
        real = content.uniform(0, 1, sequences, length) < 0.6
    order = content.permutation(sequences * length)
    flat = real.reshape(-1)
    if bool(flat.all()):
        # The last row of the last sequence, so that a tail stays one.
        flat[-1] = False
    if not bool(flat.any()):
        flat[order[0] if kind == "some" else 0] = True
    return flat


def fill_ids(
    content: Content, plan: Plan, logits: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Expert ids [T, K] of a plan's routing, with the invalid ones that it asks for."""
    tokens, experts = logits.shape
    top_k, dtype = plan["top_k"], ID_DTYPES[plan["ids"]]
    distinct = plan.get("distinct", False)
    if plan["routing"] == "chosen":
        ids = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].clone()
    else:
        ids = spread(content, plan["routing"], tokens, experts, top_k, 16, distinct=distinct)
        ids = ids.clone()
    if plan["invalid"]:
        # Cut to 32 bits the further ones are the ids 0 and E - 1.
        far = (2**32, 2**32 + experts - 1) if dtype is torch.int64 else ()
        bad = torch.tensor((*INVALID, experts, experts + 1, 2 * experts, *far))
        where = content.uniform(0, 1, tokens, top_k) < 0.3
        where.view(-1)[int(content.integers(0, tokens * top_k - 1, 1))] = True
        ids = bad[content.integers(0, len(bad) - 1, tokens, top_k)].where(where, ids)
    if mask is not None and bool((~mask).any()):
        # All padding is sent to one expert, or to that one and the same others.
        best = logits[~mask].double().sort(dim=-1, descending=True, stable=True).indices
        ids[~mask] = best[:, :top_k] if distinct else best[:, :1]
    return ids.to(dtype)


def router_logits(
    *,
    padding: bool = False,
    contents: tuple[str, ...] = LOGITS,
    narrow: bool | None = None,
    most_experts: int | None = None,
) -> Given:
    """Inputs of `z_loss` inside the declaration.

    Args:
        padding: with a mask that has padding and at least one real token.
        contents: shapes of logits to draw from.
        narrow: True for bfloat16 and float16 only, False for the others where there are any.
        most_experts: largest number of experts, where the declaration goes as low.
    """

    def plans(scope: Scope) -> Plans | None:
        dtypes = _dtypes(scope, narrow)
        capabilities = scope.capabilities
        declared = capabilities.alternatives("balance")
        taken = any(padding in each.get("padding_mask", (False, True)) for each in declared)
        fewest = capabilities.min_experts
        most = _most_experts(scope, max(most_experts or EXPERTS[-1], fewest))
        if not dtypes or not taken or most < fewest:
            return None

        def plan(draw: st.DrawFn) -> Plan:
            return {
                "experts": draw(_experts(fewest, most, capabilities.max_experts)),
                "tokens": draw(sizes(20 if scope.interpreted else 130, 16, 64, least=1 + padding)),
                "dtype": draw(choice(dtypes)),
                "logits": draw(choice(contents)),
                "padding": draw(choice(("some", "tail"))) if padding else None,
                "layout": draw(choice(layouts(scope))),
                "seed": draw(seeds()),
            }

        return planned(plan)

    return Given(plans, build_router_logits)


def build_router_logits(plan: Plan) -> Inputs:
    """The arguments of `z_loss`."""
    content = Content(plan["seed"])
    logits = fill(content, plan["logits"], plan["tokens"], plan["experts"])
    mask = None
    if plan["padding"] is not None:
        mask = fill_mask(content, plan["padding"], 1, plan["tokens"])
        logits[~mask] = 30
    return {
        "logits": logits.to(torch_dtype(plan["dtype"])),
        "padding_mask": mask,
        "layouts": dict.fromkeys(("logits", "padding_mask"), plan["layout"]),
    }


def biases(
    *,
    loads: tuple[str, ...] = LOADS,
    centred: bool | None = None,
    simplest: bool = False,
    least_experts: int = 1,
    experts: tuple[int, ...] | None = None,
    rates: tuple[float, ...] = RATES,
    values: tuple[str, ...] = ("zero", "normal", "half"),
) -> Given:
    """Inputs of `update_bias` inside the declaration.

    Args:
        loads: how tokens spread over experts.
        centred: with the step's mean taken away, without, or (None) either.
        simplest: without it only, where the target takes that.
        least_experts: smallest number of experts.
        experts: numbers of experts to draw from, or None for any.
        rates: sizes of a step.
        values: of the bias: all 0, normal, or all 0.5.
    """

    def plans(scope: Scope) -> Plans | None:
        capabilities = scope.capabilities
        allowed = {
            value
            for declared in capabilities.alternatives("balance")
            for value in declared.get("centred", (False, True))
        }
        wanted = tuple(v for v in (False, True) if v in allowed and centred in (None, v))
        wanted = wanted[:1] if simplest else wanted
        fewest = max(least_experts, capabilities.min_experts)
        most = capabilities.max_experts or (experts or EXPERTS)[-1]
        listed = [n for n in experts or () if fewest <= n <= most]
        if not wanted or not scope.dtypes or most < fewest or (experts and not listed):
            return None
        most = min(most, EXPERTS[-1])
        numbers = _experts(fewest, max(fewest, most), capabilities.max_experts)
        numbers = st.sampled_from(listed) if listed else numbers

        def plan(draw: st.DrawFn) -> Plan:
            load = draw(choice(loads))
            dtype = draw(choice(scope.dtypes))
            kinds = capabilities.id_dtypes
            # A float32 cannot hold what is beyond 2^24.
            kinds = kinds if load == "huge" else (*kinds, *kinds, *FLOAT_COUNTS)
            return {
                "experts": draw(numbers),
                # A selection bias is kept in float32 beside logits of any dtype.
                "dtype": draw(
                    st.sampled_from(("float64" if dtype == "float64" else "float32", dtype))
                ),
                "bias": draw(choice(values)),
                "load": load,
                "counts": draw(choice(kinds)),
                "rate": draw(choice(rates)),
                "centred": draw(choice(wanted)),
                "layout": draw(choice(_flat_layouts(scope))),
                "seed": draw(seeds()),
            }

        return planned(plan)

    return Given(plans, build_biases)


def _flat_layouts(scope: Scope) -> tuple[str, ...]:
    """Strides of vectors."""
    return ("contiguous", "strided", "offset") if scope.capabilities.strides else ("contiguous",)


def build_biases(plan: Plan) -> Inputs:
    """The arguments of `update_bias`."""
    content = Content(plan["seed"])
    experts = plan["experts"]
    bias = {
        "zero": torch.zeros(experts, dtype=torch.float64),
        "half": torch.full((experts,), 0.5, dtype=torch.float64),
        "normal": content.normal(experts, std=0.2),
    }[plan["bias"]]
    counts = fill_counts(content, plan["load"], experts)
    return {
        "bias": bias.to(torch_dtype(plan["dtype"])),
        "tokens_per_expert": counts.to(ID_DTYPES[plan["counts"]])
        if plan["counts"] in ID_DTYPES
        else (counts / 4).to(torch_dtype(plan["counts"])),
        "rate": plan["rate"],
        "centred": plan["centred"],
        "layouts": dict.fromkeys(("bias", "tokens_per_expert"), plan["layout"]),
    }


def fill_counts(content: Content, load: str, experts: int) -> torch.Tensor:
    """Tokens per expert [E], int64, with one of the `LOADS`."""
    if load == "one expert":
        counts = torch.zeros(experts, dtype=torch.int64)
        counts[int(content.integers(0, experts - 1, 1))] = content.integers(1, 100, 1)
        return counts
    if load in ("alike", "nothing"):
        count = 0 if load == "nothing" else int(content.integers(1, 1000, 1))
        return torch.full((experts,), count)
    if load in ("balanced", "huge"):
        # As much above the mean as below it, and about a third at it. The mean is an integer.
        mean = content.integers(*((2**24 + 1, 2**29) if load == "huge" else (10, 1000)), 1)
        pairs = experts // 2
        off = content.integers(-2, 2, pairs) if load == "huge" else content.integers(-5, 5, pairs)
        off = off.where(content.uniform(0, 1, pairs) < 0.8, 0)
        step = torch.cat([off, -off, off.new_zeros(experts - 2 * pairs)])
        return mean + step[content.permutation(experts)]
    counts = content.integers(0, 100, experts)
    if load == "idle":
        counts = content.integers(1, 100, experts)
        counts[content.permutation(experts)[: experts // 2]] = 0
    return counts
