"""Inputs of `layer`: x [N, L, H], a router, routed experts, and perhaps a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

from moe_conformance.inputs import experts as expert_inputs
from moe_conformance.inputs import routing as routing_inputs
from moe_conformance.inputs.given import (
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
    "shared": (False, True),
    "shared_gate": (False, True),
    "shared_scale": (1.0, 0.5),
    "router_bias": (False, True),
    "router_dtype": ("float32",),
    "training": (False, True),
}
"""Every value that the suite draws for `LayerConfig` and for what goes with it."""


def layer_inputs(*, least_tokens: int = 1, **fixed: tuple[Any, ...]) -> Given:
    """Inputs of `layer` inside the declaration.

    Args:
        least_tokens: smallest number of tokens per sequence.
        **fixed: the values that a field of `UNIVERSE` may take here, inside the declared ones.
    """

    def plans(scope: Scope) -> Plans | None:
        routings = [
            each
            for choice in scope.capabilities.alternatives("routing")
            if (each := _routing(scope, choice, fixed)) is not None
        ]
        made = [
            _plans(scope, layer, experts, routings, least_tokens, fixed)
            for layer in scope.capabilities.alternatives("layer")
            for experts in scope.capabilities.alternatives("experts")
        ]
        possible = [each for each in made if each is not None]
        return st.one_of(possible) if possible and routings else None

    return Given(plans, build_layer)


def _routing(
    scope: Scope, declared: Mapping[str, tuple[Any, ...]], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, tuple[Any, ...]] | None:
    chosen = {}
    for name, universe in routing_inputs.UNIVERSE.items():
        allowed = declared.get(name, universe)
        values = tuple(value for value in fixed.get(name, universe) if value in allowed)
        values += tuple(v for v in allowed if v not in values and name not in fixed)
        if not values:
            return None
        chosen[name] = values
    capabilities = scope.capabilities
    most = capabilities.max_experts or 32
    most_k = min(capabilities.max_top_k or most, most)
    chosen["top_k"] = tuple(k for k in declared.get("top_k", range(1, 5)) if k <= most_k)
    if False not in chosen["hash_table"] or not chosen["top_k"]:
        return None
    least = max(min(8, capabilities.min_experts), min(chosen["top_k"]))
    chosen["num_groups"] = tuple(
        n for n in chosen["num_groups"] if n * routing_inputs.smallest_group(n, least) <= most
    )
    if not chosen["num_groups"]:
        return None
    return chosen


def _plans(
    scope: Scope,
    layer: Mapping[str, tuple[Any, ...]],
    experts: Mapping[str, tuple[Any, ...]],
    routings: list[dict[str, tuple[Any, ...]]],
    least_tokens: int,
    fixed: Mapping[str, tuple[Any, ...]],
) -> Plans | None:
    choices: dict[str, tuple[Any, ...]] = {}
    for universe, declared in ((UNIVERSE, layer), (expert_inputs.UNIVERSE, experts)):
        for name, known in universe.items():
            allowed = declared.get(name, known)
            values = tuple(value for value in fixed.get(name, known) if value in allowed)
            values += tuple(v for v in allowed if v not in values and name not in fixed)
            if not values:
                return None
            choices[name] = values
    if not scope.dtypes:
        return None
    capabilities = scope.capabilities
    small = scope.interpreted
    hidden = expert_inputs.multiples(32 if small else 48, capabilities.hidden_multiple)
    inner = expert_inputs.multiples(24 if small else 40, capabilities.intermediate_multiple)

    fewest = min(8, capabilities.min_experts)

    @st.composite
    def plan(draw: st.DrawFn) -> Plan:
        drawn = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
        allowed = dict(draw(st.sampled_from(routings)))
        allowed_k = allowed.pop("top_k")
        routing = {name: draw(st.sampled_from(values)) for name, values in allowed.items()}
        bias = routing.pop("selection_bias")
        routing.pop("hash_table")
        groups = routing["num_groups"]
        least = routing_inputs.smallest_group(groups, max(fewest, min(allowed_k)))
        most = (capabilities.max_experts or 32) // groups
        per_group = draw(st.integers(least, max(least, min(most, 4 if groups > 1 else 8))))
        experts_ = groups * per_group
        routing["topk_groups"] = draw(st.integers(-(-min(allowed_k) // per_group), groups))
        reachable = per_group * routing["topk_groups"]
        routing["top_k"] = draw(st.sampled_from([k for k in allowed_k if k <= reachable]))
        if routing["group_score"] == "topk_share_sum":
            routing["topk_groups"] = min(routing["topk_groups"], routing["top_k"])
            if routing["top_k"] // routing["topk_groups"] > per_group:
                routing["topk_groups"] = routing["top_k"]
        activation = drawn["activation"] if drawn["gated"] else "silu"
        if activation in expert_inputs.CLAMPED and not drawn["gated"]:
            activation = "silu"
        return {
            "sequences": draw(st.integers(1, 3)),
            "length": draw(sizes(12, 8, least=least_tokens)),
            "hidden": draw(hidden),
            "intermediate": draw(inner),
            "experts": experts_,
            "routing": routing,
            "selection_bias": bias,
            "activation": activation,
            "gated": drawn["gated"],
            "alpha": drawn["alpha"],
            "limit": drawn["limit"],
            "weight_on": drawn["weight_on"],
            "bias": drawn["bias"],
            "shared": drawn["shared"],
            "shared_width": draw(inner),
            "shared_gate": drawn["shared"] and drawn["shared_gate"],
            "shared_scale": drawn["shared_scale"] if drawn["shared"] else 1.0,
            "router_bias": drawn["router_bias"],
            "router_dtype": drawn["router_dtype"],
            "training": drawn["training"],
            "dtype": draw(st.sampled_from(scope.dtypes)),
            "layout": draw(st.sampled_from(expert_inputs.layouts(scope))),
            "seed": draw(seeds()),
        }

    return plan()


def build_layer(plan: Plan) -> Inputs:
    """The tensors of a layer plan."""
    content = Content(plan["seed"])
    dtype = torch_dtype(plan["dtype"])
    hidden, inner, experts = plan["hidden"], plan["intermediate"], plan["experts"]
    width = 2 * inner if plan["gated"] else inner

    def made(*shape: int, std: float) -> torch.Tensor:
        return content.normal(*shape, std=std).to(dtype)

    def expert_weights(count: int, inner_: int, width_: int) -> ExpertWeights:
        return ExpertWeights(
            made(count, width_, hidden, std=hidden**-0.5),
            made(count, hidden, inner_, std=inner_**-0.5),
            made(count, width_, std=1.0) if plan["bias"] else None,
            made(count, hidden, std=1.0) if plan["bias"] else None,
        )

    shared = None
    if plan["shared"]:
        # One expert whose width is not that of the routed ones.
        wider = plan["shared_width"]
        shared = expert_weights(1, wider, 2 * wider if plan["gated"] else wider)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    router_dtype = plan["router_dtype"]
    config = LayerConfig(
        RoutingConfig(**plan["routing"]),
        ExpertsConfig(
            plan["activation"], plan["gated"], plan["alpha"], plan["limit"], plan["weight_on"]
        ),
        shared_scale=plan["shared_scale"],
        router_dtype=None if router_dtype is None else torch_dtype(router_dtype),
    )
    parameters = LayerWeights(
        router=made(experts, hidden, std=hidden**-0.5),
        experts=expert_weights(experts, inner, width),
        router_bias=made(experts, std=1.0) if plan["router_bias"] else None,
        selection_bias=content.normal(experts, std=0.3).to(wide)
        if plan["selection_bias"]
        else None,
        shared=shared,
        shared_gate=made(1, hidden, std=hidden**-0.5) if plan["shared_gate"] else None,
    )
    return {
        "x": made(plan["sequences"], plan["length"], hidden, std=1.0),
        "parameters": parameters,
        "config": config,
        "token_ids": None,
        "padding_mask": None,
        "training": plan["training"],
        "layouts": {"x": plan["layout"]},
    }
