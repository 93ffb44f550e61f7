"""Inputs of `layer`: x [N, L, H], a router, routed experts, and perhaps a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

from moe_conformance.codec import walk
from moe_conformance.inputs import experts as expert_inputs
from moe_conformance.inputs import routing as routing_inputs
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
from moe_conformance.inputs.load_balancing import SEQUENCE

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "shared": (False, True),
    "shared_gate": (False, True),
    "shared_scale": (1.0, 0.5, 2.5),
    "router_bias": (False, True),
    "router_dtype": ("float32", None, "bfloat16", "float64"),
    "training": (False, True),
    "padding_mask": (False, True),
    "balance": (
        *(None, "switch", "deepseek_expert", "deepseek_sequence", "deepseek_device", "gshard"),
    ),
}
"""Every value that the suite draws for `LayerConfig` and for what goes with it. In training the
loss of gshard comes with one expert per token: it counts first choices, and the order of a token's
ids is free."""

LENGTHS = (16, 17, 31, 32, 33, 64, 65)
"""Lengths of the few long sequences."""

MANY_EXPERTS = (16, 17, 32, 33, 64, 65, 129, 257)
TOP_K = (1, 2, 3, 4, 6, 8, 9)


def layer_inputs(
    *,
    least_tokens: int = 1,
    hashed: bool | None = None,
    mixed: bool = False,
    told: tuple[bool, ...] = (False,),
    **fixed: tuple[Any, ...],
) -> Given:
    """Inputs of `layer` inside the declaration.

    Args:
        least_tokens: smallest number of tokens per sequence.
        hashed: experts come from a table, by token; never; or (None) sometimes.
        mixed: experts and router have dtypes of their own.
        told: whether a loss that is taken per sequence is told to take the whole batch as one.
        **fixed: the values that a field of `UNIVERSE` may take here, inside the declared ones.
    """

    def plans(scope: Scope) -> Plans | None:
        routings = [
            each
            for choice in scope.capabilities.alternatives("routing")
            if (each := _routing(scope, choice, hashed, fixed)) is not None
        ]
        made = [
            _plans(scope, layer, experts, routings, least_tokens, mixed, told, fixed)
            for layer in scope.capabilities.alternatives("layer")
            for experts in scope.capabilities.alternatives("experts")
        ]
        possible = [each for each in made if each is not None]
        return st.one_of(possible) if possible and routings else None

    return Given(plans, build_layer)


def _routing(
    scope: Scope,
    declared: Mapping[str, tuple[Any, ...]],
    hashed: bool | None,
    fixed: Mapping[str, tuple[Any, ...]],
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
    chosen["top_k"] = tuple(k for k in declared.get("top_k", TOP_K) if k <= most_k)
    wanted = (False, False, False, True) if hashed is None else (hashed,)
    chosen["hash_table"] = tuple(v for v in wanted if v in chosen["hash_table"])
    if not chosen["hash_table"] or not chosen["top_k"]:
        return None
    if hashed and (
        1 not in chosen["num_groups"]
        or "score_then_topk" not in chosen["order"]
        or False not in chosen["selection_bias"]
    ):
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
    mixed: bool,
    told: tuple[bool, ...],
    fixed: Mapping[str, tuple[Any, ...]],
) -> Plans | None:
    choices: dict[str, tuple[Any, ...]] = {}
    for universe, declared in ((UNIVERSE, layer), (expert_inputs.UNIVERSE, experts)):
        for name, known in universe.items():
            allowed = declared.get(name, (*known, *fixed.get(name, ())))
            values = tuple(value for value in fixed.get(name, known) if value in allowed)
            values += tuple(v for v in allowed if v not in values and name not in fixed)
            if not values:
                return None
            choices[name] = values
    choices["router_dtype"] = tuple(
        name
        for name in choices["router_dtype"]
        if name in (None, "float32", *scope.capabilities.dtypes)
    )
    if not scope.dtypes or not choices["router_dtype"]:
        return None
    if mixed and not scope.capabilities.mixed_dtypes:
        return None
    capabilities = scope.capabilities
    small = scope.interpreted
    hidden = expert_inputs.multiples(32 if small else 48, capabilities.hidden_multiple)
    inner = expert_inputs.multiples(24 if small else 40, capabilities.intermediate_multiple)

    fewest = min(8, capabilities.min_experts)

    def plan(draw: st.DrawFn) -> Plan:
        drawn = {name: draw(choice(values)) for name, values in choices.items()}
        allowed = dict(draw(choice(routings)))
        allowed_k = allowed.pop("top_k")
        routing = {name: draw(choice(values)) for name, values in allowed.items()}
        bias, table = routing.pop("selection_bias"), routing.pop("hash_table")
        if table:
            possible = routing_inputs.UNIVERSE["order"][0] in allowed["order"]
            table = possible and 1 in allowed["num_groups"] and False in allowed["selection_bias"]
        if table:
            # A bias beside a table has no effect: a model hands both to all of its layers.
            routing |= {"num_groups": 1, "order": "score_then_topk"}
        if 1 in allowed["num_groups"] and draw(st.booleans()):
            routing["num_groups"] = 1
        groups = routing["num_groups"]
        least = routing_inputs.smallest_group(groups, max(fewest, min(allowed_k)))
        most = (capabilities.max_experts or 32) // groups
        per_group = draw(st.integers(least, max(least, min(most, 4 if groups > 1 else 12))))
        many = [n for n in MANY_EXPERTS if least <= n <= (capabilities.max_experts or n)]
        crowded = groups == 1 and bool(many) and not small and draw(st.integers(0, 3)) == 3
        if crowded:
            per_group = draw(choice(many))
        experts_ = groups * per_group
        sequences, length = draw(st.integers(1, 4)), draw(sizes(12, 8, least=least_tokens))
        if not small and draw(st.integers(0, 7)) == 7:
            sequences, length = draw(st.integers(1, 2)), draw(choice(LENGTHS))
        routing["topk_groups"] = draw(st.integers(-(-min(allowed_k) // per_group), groups))
        reachable = per_group * routing["topk_groups"]
        batch = sequences * length if draw(choice(told)) else None
        loss = _loss(draw, scope, drawn["balance"], experts_, batch)
        if loss is not None and loss["loss"] == "gshard" and drawn["training"]:
            loss, allowed_k = (loss, (1,)) if 1 in allowed_k else (None, allowed_k)
        routing["top_k"] = draw(choice([k for k in allowed_k if k <= reachable]))
        if routing["group_score"] == "topk_share_sum":
            routing["topk_groups"] = min(routing["topk_groups"], routing["top_k"])
            if routing["top_k"] // routing["topk_groups"] > per_group:
                routing["topk_groups"] = routing["top_k"]
        activation = drawn["activation"]
        if activation in expert_inputs.CLAMPED and not drawn["gated"]:
            activation = "silu" if "silu" in choices["activation"] else "gelu"
        dtype = draw(choice(scope.dtypes))
        widths = {"hidden": draw(hidden), "intermediate": draw(inner)}
        if crowded:
            widths = {
                "hidden": capabilities.hidden_multiple * draw(st.integers(1, 6)),
                "intermediate": capabilities.intermediate_multiple * draw(st.integers(1, 6)),
            }
        return {
            "sequences": sequences,
            "length": length,
            **widths,
            "experts": experts_,
            "routing": routing,
            "vocabulary": draw(st.integers(1, 50)) if table else None,
            "table": draw(choice(("distinct", "any"))) if table else None,
            "ids": draw(choice(capabilities.id_dtypes)) if table else None,
            "table_ids": draw(choice(capabilities.id_dtypes)) if table else None,
            "selection_bias": bias,
            "activation": activation,
            "gated": drawn["gated"],
            "alpha": drawn["alpha"],
            "limit": expert_inputs.limit_in(dtype, capabilities, drawn["limit"], choices["limit"]),
            "weight_on": drawn["weight_on"],
            "biases": draw(choice(expert_inputs.BIASES)) if drawn["bias"] else None,
            "shared": drawn["shared"],
            "shared_biases": (
                draw(choice((*expert_inputs.BIASES, None))) if drawn["bias"] else None
            ),
            "shared_width": draw(inner),
            "shared_gate": drawn["shared"] and drawn["shared_gate"],
            "shared_scale": drawn["shared_scale"] if drawn["shared"] else 1.0,
            "router_bias": drawn["router_bias"],
            "router_dtype": drawn["router_dtype"],
            "training": drawn["training"],
            "padding_mask": drawn["padding_mask"],
            "balance": loss,
            "dtype": dtype,
            "experts_dtype": draw(choice(scope.dtypes)) if mixed else dtype,
            "router_stored": draw(choice((dtype, "float32"))) if mixed else dtype,
            "layout": draw(choice(expert_inputs.layouts(scope))),
            "seed": draw(seeds()),
        }

    return planned(plan)


def _loss(
    draw: st.DrawFn, scope: Scope, loss: str | None, experts: int, batch: int | None
) -> Plan | None:
    """The fields of `BalanceConfig`, where that loss is declared.

    Args:
        draw: see Hypothesis.
        scope: what is declared.
        loss: which.
        experts: E.
        batch: the number of tokens that a sequence is said to have; None leaves it to x.
    """
    declared = scope.capabilities.alternatives("balance")
    declared = [each for each in declared if loss in each.get("loss", (loss,))]
    if loss in SEQUENCE:
        # Whatever it is told, or the length of the sequences of x.
        declared = [each for each in declared if "any" in each.get("sequence_length", ("any",))]
    if loss is None or not declared:
        return None
    scores = draw(choice(declared)).get("score", ("softmax", "sigmoid"))
    devices = [n for n in (1, 2, 3, 4) if experts % n == 0]
    return {
        "loss": loss,
        "coefficient": draw(choice((1.0, 0.25))),
        "score": draw(choice(scores)),
        "num_devices": draw(choice(devices)) if loss == "deepseek_device" else None,
        "sequence_length": batch if loss in SEQUENCE else None,
    }


def build_layer(plan: Plan) -> Inputs:
    """The tensors of a layer plan."""
    content = Content(plan["seed"])
    dtype = torch_dtype(plan["dtype"])
    hidden, inner, experts = plan["hidden"], plan["intermediate"], plan["experts"]
    width = 2 * inner if plan["gated"] else inner

    def made(*shape: int, std: float) -> torch.Tensor:
        return content.normal(*shape, std=std).to(dtype)

    def expert_weights(count: int, inner_: int, width_: int, biases: str | None) -> ExpertWeights:
        of = plan["experts_dtype"]
        drawn = [
            content.normal(count, width_, hidden, std=hidden**-0.5),
            content.normal(count, hidden, inner_, std=inner_**-0.5),
            content.normal(count, width_) if biases in ("both", "gate_up") else None,
            content.normal(count, hidden) if biases in ("both", "down") else None,
        ]
        return ExpertWeights(
            *(None if t is None else expert_inputs.beside(t, dtype, of) for t in drawn)  # type: ignore[arg-type]
        )

    shared = None
    if plan["shared"]:
        # One expert whose width is not that of the routed ones.
        wider = plan["shared_width"]
        rows = 2 * wider if plan["gated"] else wider
        shared = expert_weights(1, wider, rows, plan["shared_biases"])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    router_dtype, loss = plan["router_dtype"], plan["balance"]
    table, token_ids = None, None
    shape = plan["sequences"], plan["length"]
    if plan["vocabulary"] is not None:
        rows, top_k = plan["vocabulary"], plan["routing"]["top_k"]
        table = routing_inputs.fill_table(
            content, rows, experts, top_k, plan["table"] == "distinct"
        ).to(ID_DTYPES[plan["table_ids"]])
        token_ids = content.integers(0, rows - 1, *shape).to(ID_DTYPES[plan["ids"]])
    config = LayerConfig(
        RoutingConfig(**plan["routing"], hash_table=table),
        ExpertsConfig(
            plan["activation"], plan["gated"], plan["alpha"], plan["limit"], plan["weight_on"]
        ),
        balance=None if loss is None else BalanceConfig(**loss),
        shared_scale=plan["shared_scale"],
        router_dtype=None if router_dtype is None else torch_dtype(router_dtype),
    )
    stored = torch_dtype(plan["router_stored"])
    parameters = LayerWeights(
        router=content.normal(experts, hidden, std=hidden**-0.5).to(stored),
        experts=expert_weights(experts, inner, width, plan["biases"]),
        router_bias=content.normal(experts).to(stored) if plan["router_bias"] else None,
        selection_bias=content.normal(experts, std=0.3).to(wide)
        if plan["selection_bias"]
        else None,
        shared=shared,
        shared_gate=made(1, hidden, std=hidden**-0.5) if plan["shared_gate"] else None,
    )
    inputs = {
        "x": made(*shape, hidden, std=1.0),
        "parameters": parameters,
        "config": config,
        "token_ids": token_ids,
        "padding_mask": content.uniform(0, 1, *shape) < 0.7 if plan["padding_mask"] else None,
        "training": plan["training"],
    }
    layouts = dict.fromkeys((path for path, _ in walk(inputs)), plan["layout"])
    return {**inputs, "layouts": layouts}
