"""Inputs of `experts` and `experts_batched`: x, canonical weights, routing weights and ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from moe_reference.config import Activation, ExpertsConfig, ExpertWeights

from moe_conformance.inputs.given import (
    ID_DTYPES,
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    seeds,
    sizes,
    torch_dtype,
)

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "activation": get_args(Activation),
    "gated": (True, False),
    "alpha": (1.702, 1.0),
    "limit": (7.0, 3.0),
    "weight_on": ("output", "input"),
    "bias": (False, True),
    "expert_map": (False, True),
    "invalid_ids": (False, True),
}
"""Every value that the suite draws for `ExpertsConfig` and for what goes with it."""

LOADS = ("uniform", "skewed", "one expert", "half empty", "duplicates")
CLAMPED = ("swigluoai", "swiglu_limit")


def expert_inputs(
    *,
    least_tokens: int = 1,
    least_k: int = 1,
    loads: tuple[str, ...] = LOADS,
    content: str = "normal",
    **fixed: tuple[Any, ...],
) -> Given:
    """Inputs of `experts` inside the declaration.

    Args:
        least_tokens: smallest number of tokens.
        least_k: smallest number of experts per token; 2 where a token's pairs are compared.
        loads: how tokens spread over experts.
        content: `normal`, or `exact`: small integers whose products and sums are exact in every
            order and every dtype, so that any legal answer is equal to the last bit.
        **fixed: the values that a field may take here, inside the declared ones.
    """

    def plans(scope: Scope) -> Plans | None:
        made = [
            _plans(scope, choice, least_tokens, least_k, loads, content, fixed)
            for choice in scope.capabilities.alternatives("experts")
        ]
        possible = [each for each in made if each is not None]
        return st.one_of(possible) if possible else None

    return Given(plans, build_experts)


def _plans(
    scope: Scope,
    declared: Mapping[str, tuple[Any, ...]],
    least_tokens: int,
    least_k: int,
    loads: tuple[str, ...],
    content: str,
    fixed: Mapping[str, tuple[Any, ...]],
) -> Plans | None:
    choices = {}
    for name, universe in UNIVERSE.items():
        allowed = declared.get(name, universe)
        values = tuple(value for value in fixed.get(name, universe) if value in allowed)
        values += tuple(v for v in allowed if v not in values and name not in fixed)
        if not values:
            return None
        choices[name] = values
    capabilities = scope.capabilities
    exact = content == "exact"
    if not scope.dtypes:
        return None
    small = scope.interpreted
    hidden = multiples(48 if small else 80, capabilities.hidden_multiple)
    inner = multiples(32 if small else 48, capabilities.intermediate_multiple)
    most_experts = min(6 if small else 12, capabilities.max_experts or 12)
    if least_k > min(most_experts, capabilities.max_top_k or most_experts):
        return None

    @st.composite
    def plan(draw: st.DrawFn) -> Plan:
        config = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
        extras = {name: config.pop(name) for name in ("bias", "expert_map", "invalid_ids")}
        if config["activation"] in CLAMPED:
            if True not in choices["gated"]:
                config["activation"] = "silu"
            config["gated"] = True
        else:
            config["alpha"], config["limit"] = choices["alpha"][0], choices["limit"][0]
        local = draw(st.integers(least_k, most_experts))
        experts = local + (draw(st.integers(0, 4)) if extras["expert_map"] else 0)
        most_k = min(experts, 3 if exact else 5, capabilities.max_top_k or 5)
        top_k = draw(st.integers(least_k, most_k))
        return {
            "tokens": draw(sizes(20 if small else 70, 16, 64, least=least_tokens)),
            "hidden": draw(hidden),
            "intermediate": draw(inner),
            "experts": experts,
            "local": local,
            "top_k": top_k,
            "config": config,
            **extras,
            "load": draw(st.sampled_from(loads)),
            "content": content,
            "spread": draw(st.sampled_from(("even", "positive", "outliers", "large"))),
            "dtype": draw(st.sampled_from(scope.dtypes)),
            "ids": draw(st.sampled_from(capabilities.id_dtypes)),
            "layout": draw(st.sampled_from(layouts(scope))),
            "seed": draw(seeds()),
        }

    return plan()


def layouts(scope: Scope) -> tuple[str, ...]:
    """Strides that may be drawn."""
    if not scope.capabilities.strides:
        return ("contiguous",)
    return ("contiguous", "transposed", "strided", "offset")


def multiples(largest: int, multiple: int) -> st.SearchStrategy[int]:
    """A size up to `largest` that is a multiple of `multiple`."""
    if multiple == 1:
        return sizes(largest, 16, 32)
    return st.integers(1, max(1, largest // multiple)).map(lambda n: n * multiple)


def build_experts(plan: Plan) -> Inputs:
    """The tensors of an experts plan."""
    content = Content(plan["seed"])
    dtype = torch_dtype(plan["dtype"])
    config = ExpertsConfig(**plan["config"])
    tokens, top_k = plan["tokens"], plan["top_k"]
    ids = draw_ids(content, tokens, plan["experts"], top_k, plan["load"])
    if plan["invalid_ids"]:
        bad = torch.tensor([-1, plan["experts"], -plan["experts"], 2**30])
        where = content.uniform(0, 1, tokens, top_k) < 0.3
        ids = ids.where(~where, bad[content.integers(0, 3, tokens, top_k)])
    expert_map = None
    if plan["expert_map"]:
        rows = torch.full((plan["experts"],), -1)
        kept = content.permutation(plan["experts"])[: plan["local"]]
        rows[kept] = content.permutation(plan["local"])
        expert_map = rows.to(torch.int32)
    fill = _exact if plan["content"] == "exact" else _normal
    x, experts, weights = fill(content, plan, config)
    if plan["dtype"] != "float64":
        weights = weights.float()
    return {
        "x": x.to(dtype),
        "experts": ExpertWeights(*(None if t is None else t.to(dtype) for t in experts)),  # type: ignore[arg-type]
        "weights": weights,
        "expert_ids": ids.to(ID_DTYPES[plan["ids"]]),
        "config": config,
        "expert_map": expert_map,
        "layouts": {"x": plan["layout"]},
    }


def draw_ids(content: Content, tokens: int, experts: int, top_k: int, load: str) -> torch.Tensor:
    """Expert ids [T, K] with one of the `LOADS`, int64."""
    if load == "duplicates":
        return content.integers(0, experts - 1, tokens, top_k)
    if load == "one expert":
        ids = content.distinct(tokens, experts, top_k)
        return (ids - ids[:, :1] + content.integers(0, experts - 1)) % experts
    if load == "skewed":
        pull = content.uniform(0, 1, tokens, experts) * torch.arange(1, experts + 1)
        return pull.topk(top_k, -1, largest=False).indices
    if load == "half empty" and experts // 2 >= top_k:
        return content.distinct(tokens, experts // 2, top_k)
    return content.distinct(tokens, experts, top_k)


Tensors = tuple[torch.Tensor | None, ...]


def _normal(
    content: Content, plan: Plan, config: ExpertsConfig
) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    tokens, hidden, inner, local = (
        plan[name] for name in ("tokens", "hidden", "intermediate", "local")
    )
    width = 2 * inner if config.gated else inner
    # float16 ends at 65504: its pre-activations stay below a dozen, so that their square times up,
    # summed over I, stays clear of it in every variant.
    half = plan["dtype"] == "float16"
    x = content.normal(tokens, hidden)
    if plan["spread"] == "positive":
        x = x.abs()
    elif plan["spread"] == "outliers":
        x[:, content.integers(0, hidden - 1, 2)] *= 3 if half else 20
    # Pre-activations of a few units: beyond the clamps of swigluoai in `large` ones.
    reach = 4.0 if plan["spread"] == "large" and not half else 1.0
    gate_up = content.normal(local, width, hidden, std=reach / hidden**0.5)
    down = content.normal(local, hidden, inner, std=1 / inner**0.5)
    biases: Tensors = (None, None)
    if plan["bias"]:
        biases = (content.normal(local, width), content.normal(local, hidden))
    weights = content.uniform(0.05, 1.0, tokens, plan["top_k"])
    return x, (gate_up, down, *biases), weights


def _exact(
    content: Content, plan: Plan, config: ExpertsConfig
) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """Integers for which every order of summation is exact, also in bfloat16.

    x has at most two ones a row, so a gate is a sum of two of {0, 32, 64}: 0 or at least 32, where
    silu, gelu and relu are the identity after rounding. Then gate · up is a multiple of 32 of at
    most 8 · 32, each output a sum of at most two of them, and with weights 1, 1/2 or 1/4 and K <= 3
    every partial sum is a multiple of 8 of at most 192 · 8: eight significant bits.
    """
    tokens, hidden, inner, local = (
        plan[name] for name in ("tokens", "hidden", "intermediate", "local")
    )
    x = torch.zeros(tokens, hidden, dtype=torch.float64)
    x.scatter_(1, content.integers(0, hidden - 1, tokens, 2), 1.0)
    gate = 32 * content.integers(0, 2, local, inner, hidden).double()
    up = content.integers(-1, 1, local, inner, hidden).double()
    gate_up = torch.cat([gate, up], 1) if config.gated else gate
    down = torch.zeros(local, hidden, inner, dtype=torch.float64)
    signs = 2 * content.integers(0, 1, local, hidden, 2).double() - 1
    down.scatter_(2, content.integers(0, inner - 1, local, hidden, 2), signs)
    weights = 2 ** content.integers(-2, 0, tokens, plan["top_k"]).double()
    return x, (gate_up, down, None, None), weights
