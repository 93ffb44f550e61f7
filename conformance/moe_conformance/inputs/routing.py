"""Inputs of `route`: a configuration inside the declaration, logits, bias, token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import RoutingConfig

from moe_conformance.inputs.given import (
    ID_DTYPES,
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    choice,
    planned,
    seeds,
    sizes,
    torch_dtype,
)
from moe_conformance.worker import LAYOUTS

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "score": ("softmax", "sigmoid", "sqrtsoftplus"),
    "order": ("score_then_topk", "topk_then_score"),
    "renormalize": (True, False),
    "norm": ("sum", "l2"),
    "epsilon": (0.0, 1e-20, 1e-9),
    "epsilon_mode": ("add", "clamp"),
    "renormalize_single": (True, False),
    "scale": (1.0, 2.5, 0.375),
    "scale_when": ("always", "not_renormalized"),
    "group_score": ("max", "top2_sum", "topk_share_sum"),
    "mask_fill": ("-inf", "zero"),
    "num_groups": (1, 2, 4, 8, 3, 6),
    "selection_bias": (False, True),
    "hash_table": (False, True),
}
"""Every value that the suite draws for the fields of `RoutingConfig`, simplest first."""

BIAS_DTYPES = ("wide", "wide", "bfloat16")
"""Dtypes of the selection bias; `wide` is float32, float64 beside float64 logits."""

EXPERTS = (1, 2, 3, 4, 7, 8, 16, 60, 64, 72, 128, 160, 255, 256, 257, 384, 512)
"""Numbers of experts: those of published models, one off powers of two, and beyond one byte."""

BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
"""Sizes of tiles, warps and bytes: of experts, and of tokens."""

MANY_TOKENS = (*BLOCKS, 2048, 4096)
"""The same of tokens where they are cheap."""

WIDE_GROUPS = (33, 40, 65)
"""Experts per group that a warp has not enough lanes for."""

FEW = (2, 4, 8, 16, 32)
"""Such numbers of experts per token."""

VOCABULARIES = (257, 2049, 33000)
"""Lengths of a hash table whose token ids are too large for bfloat16, float16 and int16."""

CONTENTS = ("normal", "coarse", "wide", "shifted", "close", "negative")
"""Shapes of logits: normal; on a grid of 1/4, so that many tie; ten times as wide; with a large
common offset per token; within a thousandth of each other; all far below zero. There is also
`vanishing`: a sigmoid of these is below the largest epsilon that is drawn."""


def routing(
    *,
    bias: bool | None = None,
    groups: bool | None = None,
    hashed: bool = False,
    contents: tuple[str, ...] = CONTENTS,
    largest: int = 512,
    least_tokens: int = 1,
    left_out: bool = False,
    **fixed: tuple[Any, ...],
) -> Given:
    """Routing inputs inside the declaration.

    Args:
        bias: with a selection bias, without, or (None) either.
        groups: with more than one group, without, or either.
        hashed: experts come from a table.
        contents: shapes of logits to draw from.
        largest: largest number of experts.
        least_tokens: smallest number of tokens; 2 where tokens are compared with each other.
        left_out: at least one expert is not chosen, so that there is a choice to judge.
        **fixed: the values that a field may take here, inside the declared ones.
    """

    def plans(scope: Scope) -> Plans | None:
        made = [
            _plans(
                scope,
                choice,
                bias,
                groups,
                hashed,
                contents,
                largest,
                least_tokens,
                left_out,
                fixed,
            )
            for choice in scope.capabilities.alternatives("routing")
        ]
        possible = [each for each in made if each is not None]
        return st.one_of(possible) if possible else None

    return Given(plans, build_routing)


def smallest_group(num_groups: int, least: int) -> int:
    """Experts per group: at least 2 where there are several, and at least `least` in all."""
    return max(2 if num_groups > 1 else 1, -(-least // num_groups))


def _plans(
    scope: Scope,
    declared: Mapping[str, tuple[Any, ...]],
    bias: bool | None,
    groups: bool | None,
    hashed: bool,
    contents: tuple[str, ...],
    largest: int,
    least_tokens: int,
    left_out: bool,
    fixed: Mapping[str, tuple[Any, ...]],
) -> Plans | None:
    wanted = dict(fixed)
    wanted["selection_bias"] = (False, True) if bias is None else (bias,)
    wanted["hash_table"] = (hashed,)
    wanted.setdefault("num_groups", UNIVERSE["num_groups"])
    if hashed:
        wanted["num_groups"] = (1,)
        wanted["selection_bias"] = (bool(bias),)
    elif groups is not None:
        wanted["num_groups"] = tuple(n for n in wanted["num_groups"] if (n > 1) == groups)
    choices = {}
    for name, universe in UNIVERSE.items():
        allowed = declared.get(name, (*universe, *fixed.get(name, ())))
        values = tuple(value for value in wanted.get(name, universe) if value in allowed)
        # A value that only this target declares is as good as one of ours, but for its kind.
        values += tuple(v for v in allowed if v not in values and name not in wanted)
        if not values:
            return None
        choices[name] = values
    capabilities = scope.capabilities
    most = min(largest, capabilities.max_experts or largest, 64 if scope.interpreted else largest)
    tokens, most_tokens = (12, 20) if scope.interpreted else (40, 130)
    most_k = min(most - left_out, capabilities.max_top_k or 16)
    allowed_k = [k for k in declared.get("top_k", range(1, 17)) if k <= most_k]
    if not scope.dtypes or not allowed_k:
        return None
    fewest_k = min(allowed_k)
    least = max(capabilities.min_experts, fewest_k + left_out)
    choices["num_groups"] = tuple(
        n for n in choices["num_groups"] if n * smallest_group(n, least) <= most
    )
    if not choices["num_groups"]:
        return None
    numbers = st.sampled_from(choices["num_groups"])
    if len(choices["num_groups"]) > 1 and 1 in choices["num_groups"]:
        several = st.sampled_from([n for n in choices["num_groups"] if n > 1])
        numbers = st.one_of(st.just(1), several, several)

    def plan(draw: st.DrawFn) -> Plan:
        config = {
            name: draw(numbers if name == "num_groups" else st.sampled_from(values))
            for name, values in choices.items()
        }
        has_bias, has_table = config.pop("selection_bias"), config.pop("hash_table")
        grouped = config["num_groups"] > 1
        if grouped:
            # The best two of a group need two; any other score takes groups of one expert.
            pair = 2 if config["group_score"] == "top2_sum" else 1
            fewest = max(pair, -(-least // config["num_groups"]))
            most_per_group = max(fewest, min(33, most // config["num_groups"]))
            few = st.integers(fewest, min(most_per_group, fewest + 3))
            per_group = draw(st.one_of(few, st.integers(fewest, most_per_group)))
            wide = [n for n in WIDE_GROUPS if fewest <= n <= most // config["num_groups"]]
            if wide and draw(st.integers(0, 5)) == 5:
                per_group = draw(choice(wide))
            experts = per_group * config["num_groups"]
            fewest_groups = -(-fewest_k // per_group)
            config["topk_groups"] = draw(st.integers(fewest_groups, config["num_groups"]))
            reachable = per_group * config["topk_groups"]
        else:
            known = (*EXPERTS, least, capabilities.max_experts or least)
            edges = [size for size in known if least <= size <= most]
            few = st.integers(least, max(least, min(most, 9)))
            experts = draw(st.one_of(few, st.sampled_from(edges)))
            reachable = experts
            config["topk_groups"] = 1
            config["group_score"], config["mask_fill"] = choices["group_score"][0], "-inf"
        possible_k = [k for k in allowed_k if k <= min(reachable, experts - left_out)]
        # Mostly fewer than half of the experts: with all of them there is nothing to choose.
        few_k = [k for k in possible_k if 2 * k <= reachable] or possible_k[:1]
        config["top_k"] = draw(
            st.one_of(*[st.sampled_from(few_k)] * 2, st.sampled_from(possible_k))
        )
        if grouped and config["group_score"] == "topk_share_sum":
            config["topk_groups"] = min(config["topk_groups"], config["top_k"])
            if config["top_k"] // config["topk_groups"] > per_group:
                config["topk_groups"] = config["num_groups"]
            config["top_k"] = min(config["top_k"], per_group * config["topk_groups"])
            config["topk_groups"] = min(config["topk_groups"], config["top_k"])
        if not config["renormalize"]:
            config["epsilon"], config["norm"] = choices["epsilon"][0], choices["norm"][0]
        return {
            "tokens": draw(
                sizes(tokens if experts > 64 else most_tokens, 16, 64, least=least_tokens)
            ),
            "experts": experts,
            "config": config,
            "dtype": draw(choice(scope.dtypes)),
            "logits": draw(choice(contents)),
            "bias": draw(choice(("normal", "large"))) if has_bias else None,
            "bias_dtype": draw(choice(BIAS_DTYPES)) if has_bias else None,
            "vocabulary": draw(_vocabularies()) if has_table else None,
            "table": draw(choice(("distinct", "distinct", "any"))) if has_table else None,
            "ids": draw(choice(capabilities.id_dtypes)) if has_table else None,
            "table_ids": draw(choice(capabilities.id_dtypes)) if has_table else None,
            "layout": draw(choice(_layouts(scope))),
            "seed": draw(seeds()),
        }

    return planned(plan)


def vanishing() -> Given:
    """Scores whose sum does not show beside epsilon, and is clamped where that is the mode."""
    return routing(
        contents=("vanishing",),
        score=("sigmoid", "sqrtsoftplus"),
        renormalize=(True,),
        epsilon=(1e-9,),
        # Added, it shows in other cases as well; and the sum is what nearly everybody takes.
        epsilon_mode=("clamp", "clamp", "add"),
        norm=("sum", "sum", "l2"),
        scale=(1.0,),
        bias=False,
    )


def _vocabularies() -> st.SearchStrategy[int]:
    few = st.integers(1, 50)
    return st.one_of(few, few, few, st.sampled_from(VOCABULARIES))


def past(blocks: tuple[int, ...], least: int, most: int) -> list[int]:
    """Sizes one past a block, inside the limits with both of their lower neighbours; and `most`.

    Args:
        blocks: sizes of blocks.
        least: the smallest size that is taken.
        most: the largest.
    """
    found = {block + 1 for block in blocks if block + 1 <= most}
    found |= {most} if most <= blocks[-1] else set()
    return sorted(size for size in found if size - 2 >= least)


def at_boundaries() -> Given:
    """One of E, T and K is one past a block, named by `axis`; the other two are small."""

    def plans(scope: Scope) -> Plans | None:
        capabilities = scope.capabilities
        least = capabilities.min_experts
        small = routing(groups=False, contents=("normal",), largest=max(9, least))
        base = small.plans(scope)
        if base is None:
            return None
        largest = 65 if scope.interpreted else BLOCKS[-1] + 1
        most = min(capabilities.max_experts or largest, largest)
        most_k = min(most, capabilities.max_top_k or 33)
        free = all("top_k" not in each for each in capabilities.alternatives("routing"))
        sizes_of = {
            "experts": past(BLOCKS, max(least, 9), most),
            "tokens": past(MANY_TOKENS, 1, 65 if scope.interpreted else MANY_TOKENS[-1] + 1),
            "top_k": past(FEW, 1, most_k) if free else [],
        }
        axes = [
            st.tuples(st.just(axis), st.sampled_from(found))
            for axis, found in sizes_of.items()
            if found
        ]

        def plan(draw: st.DrawFn) -> Plan:
            drawn = dict(draw(base))
            axis, size = draw(st.one_of(axes))
            if axis == "top_k":
                drawn["config"] = {**drawn["config"], "top_k": size}
                drawn["experts"] = min(most, max(size, least) + draw(st.integers(0, 3)))
            else:
                drawn[axis] = size
            if axis != "tokens":
                drawn["tokens"] = min(drawn["tokens"], 9)
            return drawn | {"axis": axis}

        return planned(plan)

    def build(plan: Plan) -> Inputs:
        inputs = build_routing(plan)
        if plan["axis"] == "experts":
            # Of many experts the last ones would hardly ever be among the best.
            inputs["logits"][::2, -3:] += 3
        return {**inputs, "axis": plan["axis"]}

    return Given(plans, build)


def _identity(scope: Scope) -> bool:
    return scope.capabilities.logits_through == "identity"


def _layouts(scope: Scope) -> tuple[str, ...]:
    free = scope.capabilities.strides and not _identity(scope)
    return LAYOUTS if free else ("contiguous",)


def build_routing(plan: Plan) -> Inputs:
    """The tensors of a routing plan."""
    content = Content(plan["seed"])
    tokens, experts = plan["tokens"], plan["experts"]
    config = RoutingConfig(**plan["config"])
    token_ids = None
    if plan["vocabulary"] is not None:
        rows = plan["vocabulary"]
        distinct = plan["table"] == "distinct" and rows not in VOCABULARIES
        table = fill_table(content, rows, experts, config.top_k, distinct)
        config = RoutingConfig(**plan["config"], hash_table=table.to(ID_DTYPES[plan["table_ids"]]))
        token_ids = content.integers(0, rows - 1, tokens).to(ID_DTYPES[plan["ids"]])
    bias = None
    if plan["bias"] is not None:
        bias = content.normal(experts, std=1.0 if plan["bias"] == "normal" else 4.0).float()
        if plan["dtype"] == "float64":
            bias = bias.double()
        if plan["bias_dtype"] == "bfloat16":
            bias = bias.bfloat16()
    logits = fill_logits(content, plan["logits"], tokens, experts).to(torch_dtype(plan["dtype"]))
    return {
        "logits": logits,
        "config": config,
        "bias": bias,
        "token_ids": token_ids,
        "layouts": dict.fromkeys(
            ("logits", "bias", "token_ids", "config.hash_table"), plan["layout"]
        ),
    }


def fill_table(
    content: Content, rows: int, experts: int, top_k: int, distinct: bool
) -> torch.Tensor:
    """A hash table [rows, K], int64; `distinct` ids within a row, or any."""
    if distinct:
        return content.distinct(rows, experts, top_k)
    return content.integers(0, experts - 1, rows, top_k)


def fill_logits(content: Content, kind: str, tokens: int, experts: int) -> torch.Tensor:
    """Logits of one of the kinds in `CONTENTS`, float64."""
    logits = content.normal(tokens, experts)
    if kind == "coarse":
        return (logits * 4).round() / 4
    if kind == "wide":
        return logits * 10
    if kind == "shifted":
        return logits + content.uniform(-30, 30, tokens, 1)
    if kind == "close":
        return 1 + logits * 1e-3
    if kind == "negative":
        return logits - 12
    if kind == "vanishing":
        return logits - 25
    return logits
