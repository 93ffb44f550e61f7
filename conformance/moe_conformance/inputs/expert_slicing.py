"""Inputs of `assign_experts`, `slice_experts`, `slice_tensor_parallel` and `place_experts`."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import ExpertWeights

from moe_conformance.inputs.experts import layouts
from moe_conformance.inputs.given import (
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

LOADS = ("even", "skewed", "one hot", "none", "ties", "few", "one side")
"""How the load is spread over experts; few are some tokens for each of some experts; with one side
the first half of the ids has nearly all."""

LOAD_DTYPES = ("int64", "float32", "int32", "float64")

INEXACT = (41, 47, 49, 55, 98)
"""Numbers of ranks R of which R · (1 / R) is less than 1, in float32 or in float64."""

SCALES = ("tokens", "fractions", "billions")
"""Sizes of a load: tokens of a step, shares of it, or tokens since the start."""

BIASES = ("both", "both", "gate_up", "down")
"""Which of the two biases there are, where there are biases."""


MANY_EXPERTS = (16, 17, 32, 33, 65)
WIDTHS = (17, 33, 64, 65, 129)
"""Numbers of experts, and H, that are copied in blocks, of which the last one is not full."""


def shares() -> Given:
    """Inputs of `assign_experts`: E and R, fewer experts than ranks among them."""

    def plans(scope: Scope) -> Plans | None:
        most = min(400, scope.capabilities.max_experts or 400)
        least = min(scope.capabilities.min_experts, most)
        return st.fixed_dictionaries(
            {
                "num_experts": sizes(most, 8, 64, least=least),
                "world_size": st.one_of(st.integers(1, 9), sizes(72, 8), st.sampled_from(INEXACT)),
            }
        )

    return Given(plans, dict)


def sliced(*, least_experts: int = 1, most_count: int | None = None) -> Given:
    """Inputs of `slice_experts` inside the declaration.

    Args:
        least_experts: smallest E.
        most_count: largest count; None takes up to all.
    """

    def plans(scope: Scope) -> Plans | None:
        choices = _choices(scope)
        most = min(12, scope.capabilities.max_experts or 12)
        least = max(least_experts, min(scope.capabilities.min_experts, most))
        if not choices or least > most:
            return None
        largest = scope.capabilities.max_experts or MANY_EXPERTS[-1]
        many = [n for n in MANY_EXPERTS if least <= n <= largest]

        def plan(draw: st.DrawFn) -> Plan:
            experts = draw(st.integers(least, most))
            if many and draw(st.integers(0, 5)) == 5:
                experts = draw(choice(many))
            start = draw(st.integers(0, experts))
            count = draw(st.integers(0, experts - start))
            if draw(st.integers(0, 4)) == 4:
                start, count = 0, experts
            drawn = _drawn(draw, scope, choices, BIASES)
            wide = draw(st.integers(1, 6)) * scope.capabilities.intermediate_multiple
            return {
                **drawn,
                "experts": experts,
                "intermediate": wide,
                "start": start,
                "count": count if most_count is None else min(count, most_count),
            }

        return planned(plan)

    return Given(plans, build_sliced)


def cut(
    *, even: bool = True, ranks: tuple[int, int] = (1, 9), gated: bool | None = None,
    bias: bool | None = None, biases: tuple[str, ...] = BIASES,
) -> Given:  # fmt: skip
    """Inputs of `slice_tensor_parallel` inside the declaration.

    Args:
        even: R divides I; otherwise it does not.
        ranks: the fewest and the most.
        gated: with a gate, without, or (None) either.
        bias: likewise.
        biases: which of them, where there are biases.
    """

    def plans(scope: Scope) -> Plans | None:
        choices = _choices(scope, gated, bias)
        multiple = scope.capabilities.intermediate_multiple
        if not choices or (not even and multiple > 1):
            return None
        most_experts = min(4, scope.capabilities.max_experts or 4)

        def plan(draw: st.DrawFn) -> Plan:
            world_size = draw(_numbers(*ranks))
            part = draw(st.integers(1, 5)) * multiple
            # Not a multiple of R, and often fewer rows than ranks.
            uneven = sizes(33, 8, 16).filter(lambda n: n % world_size != 0)
            if world_size > 1:
                uneven = st.one_of(uneven, st.integers(1, world_size - 1))
            return {
                **_drawn(draw, scope, choices, biases),
                "experts": draw(st.integers(1, most_experts)),
                "intermediate": part * world_size if even else draw(uneven),
                "world_size": world_size,
            }

        return planned(plan)

    return Given(plans, build_cut)


def _numbers(least: int, most: int) -> st.SearchStrategy[int]:
    """How many ranks there are, mostly few."""
    few = st.integers(least, min(most, least + 3))
    return st.one_of(few, st.integers(least, most))


def cut_for_a_rank() -> Given:
    """Inputs of `slice_tensor_parallel` for the last of the ranks."""
    every = cut()

    def build(plan: Plan) -> Inputs:
        inputs = build_cut(plan)
        return {**inputs, "rank": inputs["world_size"] - 1}

    return Given(every.plans, build)


def placed(
    *,
    loads: tuple[str, ...] = LOADS,
    redundant: bool = False,
    ranks: tuple[int, int] = (1, 9),
) -> Given:
    """Inputs of `place_experts` inside the declaration.

    Args:
        loads: how the load is spread.
        redundant: always more physical than logical experts.
        ranks: the fewest and the most.
    """

    def plans(scope: Scope) -> Plans | None:
        most = min(72, scope.capabilities.max_experts or 72)
        least = min(scope.capabilities.min_experts, most)

        def plan(draw: st.DrawFn) -> Plan:
            count = draw(_numbers(*ranks))
            load = draw(choice(loads))
            experts = draw(
                st.one_of(
                    st.integers(least, max(least, min(most, 20))), sizes(most, 32, least=least)
                )
                if load != "few"
                else st.integers(least, max(least, min(most, 6)))
            )
            fewest = -(-experts // count)
            # With many copies of each, loads per copy are close together and no whole numbers.
            more = draw(st.integers(1 if redundant else 0, 3 if load != "few" else 12))
            if not redundant and fewest * count <= most and draw(st.integers(0, 2)) == 2:
                # One copy of each, which is a case of its own for those that only copy.
                experts, more = fewest * count, 0
            return {
                "experts": experts,
                "num_ranks": count,
                "num_physical": (fewest + more) * count,
                "load": load,
                "dtype": (dtype := draw(choice(LOAD_DTYPES))),
                "scale": draw(choice(_scales(dtype))),
                "layout": draw(choice(layouts(scope))),
                "seed": draw(seeds()),
            }

        return planned(plan)

    return Given(plans, build_placed)


def _choices(
    scope: Scope, gated: bool | None = None, bias: bool | None = None
) -> list[tuple[bool, bool]]:
    """The declared combinations of gate and biases."""
    if not scope.dtypes:
        return []
    return sorted(
        {
            (one, other)
            for choice in scope.capabilities.alternatives("experts")
            for one in choice.get("gated", (False, True))
            for other in choice.get("bias", (False, True))
            if gated in (None, one) and bias in (None, other)
        }
    )


def _drawn(
    draw: st.DrawFn, scope: Scope, choices: list[tuple[bool, bool]], biases: tuple[str, ...]
) -> Plan:
    gated, bias = draw(choice(choices))
    dtype = draw(choice(scope.dtypes))
    others = scope.dtypes if bias and scope.capabilities.mixed_dtypes else ()
    hidden = draw(st.integers(1, 5))
    if draw(st.integers(0, 5)) == 5:
        hidden = draw(choice(WIDTHS))
    return {
        "hidden": hidden * scope.capabilities.hidden_multiple,
        "gated": gated,
        "biases": draw(choice(biases)) if bias else None,
        "special": not scope.capabilities.finite_only and draw(st.booleans()),
        "dtype": dtype,
        "bias_dtype": draw(choice((dtype, dtype, *others))),
        "layout": draw(choice(layouts(scope))),
        "seed": draw(seeds()),
    }


def _coded(plan: Plan) -> ExpertWeights:
    """Weights in which row i of gate and of up, and column i of down, say that they are i."""
    content = Content(plan["seed"])
    experts, hidden, inner = plan["experts"], plan["hidden"], plan["intermediate"]
    halves = 2 if plan["gated"] else 1
    code = torch.arange(inner, dtype=torch.float64)
    gate_up = content.normal(experts, halves * inner, hidden)
    gate_up[:, :, 0] = code.repeat(halves)
    down = content.normal(experts, hidden, inner)
    down[:, 0, :] = code
    gate_up_bias, down_bias = (
        content.normal(experts, halves * inner),
        content.normal(experts, hidden),
    )
    dtype, of_biases = torch_dtype(plan["dtype"]), torch_dtype(plan["bias_dtype"])
    if plan["special"]:
        # Never in what says which row or column it is.
        for tensor in (gate_up[:, :, 1:], down[:, 1:]):
            _plant(content, tensor, dtype)
        for tensor in (gate_up_bias, down_bias):
            _plant(content, tensor, of_biases)
    return ExpertWeights(
        gate_up.to(dtype),
        down.to(dtype),
        gate_up_bias.to(of_biases) if plan["biases"] in ("both", "gate_up") else None,
        down_bias.to(of_biases) if plan["biases"] in ("both", "down") else None,
    )


def _plant(content: Content, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Put some values there that a copy keeps, and arithmetic, or another dtype, does not."""
    info = torch.finfo(dtype)
    kinds = [torch.nan, torch.inf, -torch.inf, info.max, info.smallest_normal / 4, 1 + info.eps]
    for at in content.uniform(0, 1, 6).mul(max(1, tensor.numel())).long().tolist():
        if tensor.numel():
            index = torch.unravel_index(torch.tensor(at), tensor.shape)
            tensor[index] = kinds[int(content.integers(0, len(kinds) - 1))]


def _laid_out(experts: ExpertWeights, layout: str) -> dict[str, str]:
    fields = [name for name, tensor in vars(experts).items() if tensor is not None]
    return {f"experts.{name}": layout for name in fields}


def build_sliced(plan: Plan) -> Inputs:
    """The arguments of `slice_experts`."""
    experts = _coded(plan)
    return {
        "experts": experts,
        "start": plan["start"],
        "count": plan["count"],
        "layouts": _laid_out(experts, plan["layout"]),
    }


def build_cut(plan: Plan) -> Inputs:
    """The arguments of `slice_tensor_parallel`, for all ranks."""
    experts = _coded(plan)
    return {
        "experts": experts,
        "world_size": plan["world_size"],
        "gated": plan["gated"],
        "layouts": _laid_out(experts, plan["layout"]),
    }


def build_placed(plan: Plan) -> Inputs:
    """The arguments of `place_experts`."""
    content, experts = Content(plan["seed"]), plan["experts"]
    kinds: dict[str, Any] = {
        "even": lambda: content.integers(80, 120, experts),
        "skewed": lambda: content.uniform(0, 1, experts).pow(4).mul(1000).round().long(),
        "one hot": lambda: torch.arange(experts).eq(int(content.integers(0, experts - 1))) * 900,
        "none": lambda: torch.zeros(experts, dtype=torch.int64),
        "ties": lambda: content.integers(1, 3, experts) * 60,
        "few": lambda: content.integers(1, 20, experts),
        "one side": lambda: (
            (torch.arange(experts) < experts // 2) * 90 + content.integers(0, 9, experts)
        ),
    }
    load = kinds[plan["load"]]().double()
    if plan["load"] in ("even", "skewed") and plan["dtype"] in ("float32", "float64"):
        load = load + content.uniform(0, 1, experts)
    # Powers of two: what ties goes on to tie, and nothing is rounded.
    load = load * {"tokens": 1.0, "fractions": 2.0**-20, "billions": 2.0**26}[plan["scale"]]
    return {
        "load": load.to(torch_dtype(plan["dtype"])),
        "num_physical": plan["num_physical"],
        "num_ranks": plan["num_ranks"],
        "layouts": {"load": plan["layout"]},
    }


def _scales(dtype: str) -> tuple[str, ...]:
    """Sizes that the dtype has numbers for."""
    if dtype == "int32":
        return SCALES[:1]
    return ("tokens", "billions") if dtype == "int64" else ("tokens", "fractions")
