"""Inputs of `experts` and `experts_batched`: x, canonical weights, routing weights and ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from moe_reference.config import Activation, ExpertsConfig, ExpertWeights

from moe_conformance.codec import walk
from moe_conformance.inputs.given import (
    ID_DTYPES,
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    choice,
    loads_inside,
    planned,
    seeds,
    sizes,
    torch_dtype,
)
from moe_conformance.target import Capabilities
from moe_conformance.worker import LAYOUTS

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "activation": get_args(Activation),
    "gated": (True, False),
    "alpha": (1.702, 1.0, 0.5, 0.0),
    "limit": (7.0, 3.0, 0.625, 2.9),
    "weight_on": ("output", "input"),
    "bias": (False, True),
    "expert_map": (False, True),
    "invalid_ids": (False, True),
}
"""Every value that the suite draws for `ExpertsConfig` and for what goes with it."""

LOADS = ("uniform", "skewed", "one expert", "half empty", "duplicates")
CLAMPED = ("swigluoai", "swiglu_limit")

WEIGHTS = ("positive", "signed", "small", "any")
"""Routing weights: as a softmax gives them; of both signs; of both signs, and of half of the tokens
so small that they are taken for zero; zero, negative and above one as well."""

SMALL = 2.0**-24
"""Below every tolerance that is taken for zero. Times a row and itself float32 still has it."""

SMALL_IN_FLOAT16 = 2.0**-10
"""Below this float16 has hardly a number for what comes of it."""

BIASES = ("both", "both", "gate_up", "down")
"""Which of the two biases there are, where there are biases."""

SHAPES = ("usual", "usual", "usual", "usual", "many experts", "many pairs", "square")
"""What is large, or equal: more experts than a warp or a byte of flags, more pairs than are held in
registers, matrices whose shape does not tell how they are laid out."""

MANY_EXPERTS = (16, 17, 31, 32, 33, 63, 64, 65, 129)
MANY_PAIRS = (6, 7, 8, 9, 10, 15, 16, 17, 33)

STORED = frozenset(
    ("product", "pre_activation", "gate_activation", "activation_steps", "activation",
     "expert_output", "weighted_output", "combine")
)  # fmt: skip
"""Rounding points at which a float16 may overflow where the output does not."""


def expert_inputs(
    *,
    least_tokens: int = 1,
    least_k: int = 1,
    loads: tuple[str, ...] = LOADS,
    content: str = "normal",
    mixed: bool = False,
    **fixed: tuple[Any, ...],
) -> Given:
    """Inputs of `experts` inside the declaration.

    Args:
        least_tokens: smallest number of tokens.
        least_k: smallest number of experts per token; 2 where a token's pairs are compared.
        loads: how tokens spread over experts.
        content: `normal`, or `exact`: small integers whose products and sums are exact in every
            order and every dtype, so that any legal answer is equal to the last bit.
        mixed: the experts' weights have a dtype of their own.
        **fixed: the values that a field may take here, inside the declared ones.
    """

    def plans(scope: Scope) -> Plans | None:
        made = [
            _plans(scope, choice, least_tokens, least_k, loads, content, mixed, fixed)
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
    mixed: bool,
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
    loads = loads_inside(scope, loads)
    if not scope.dtypes or not loads or (mixed and not capabilities.mixed_dtypes):
        return None
    small = scope.interpreted
    hidden = multiples(48 if small else 80, capabilities.hidden_multiple)
    inner = multiples(32 if small else 48, capabilities.intermediate_multiple)
    most_experts = min(6 if small else 12, capabilities.max_experts or 12)
    most_pairs = min(capabilities.max_top_k or MANY_PAIRS[-1], 3 if exact else MANY_PAIRS[-1])
    if least_k > min(most_experts, most_pairs):
        return None
    limit = min(33 if small else MANY_EXPERTS[-1], capabilities.max_experts or MANY_EXPERTS[-1])
    many_experts = [n for n in MANY_EXPERTS if n <= limit]
    many_pairs = [n for n in MANY_PAIRS if least_k <= n <= min(most_pairs, limit)]
    shapes = [s for s in SHAPES if s not in ("many experts", "many pairs")]
    shapes += ["many experts"] if many_experts else []
    shapes += ["many pairs"] if many_pairs else []

    def plan(draw: st.DrawFn) -> Plan:
        config = {name: draw(choice(values)) for name, values in choices.items()}
        extras = {name: config.pop(name) for name in ("bias", "expert_map", "invalid_ids")}
        if config["activation"] in CLAMPED:
            if True not in choices["gated"]:
                config["activation"] = "silu"
            config["gated"] = True
        else:
            config["alpha"], config["limit"] = choices["alpha"][0], choices["limit"][0]
        shape = draw(choice(shapes))
        local = draw(st.integers(least_k, most_experts))
        top_k = None
        if shape == "many experts":
            local = draw(choice(many_experts))
        elif shape == "many pairs":
            top_k = draw(choice(many_pairs))
            local = min(limit, top_k + draw(st.integers(0, 2)))
        experts = local + (draw(st.integers(0, 4)) if extras["expert_map"] else 0)
        if top_k is None:
            top_k = draw(st.integers(least_k, min(experts, most_pairs, 5)))
        dtype = draw(choice(scope.dtypes))
        config["limit"] = limit_in(dtype, capabilities, config["limit"], choices["limit"])
        spread = draw(choice(_spreads(capabilities, dtype)))
        most_tokens = 20 if small else 33 if shape == "many experts" else 70
        return {
            "tokens": draw(sizes(most_tokens, 16, 64, least=least_tokens)),
            **_widths(draw, shape, hidden, inner, config["gated"], capabilities),
            "experts": experts,
            "local": local,
            "top_k": top_k,
            "config": config,
            **extras,
            "biases": draw(choice(BIASES)) if extras["bias"] else None,
            "load": draw(choice(loads)),
            "content": content,
            "spread": spread,
            "weights": draw(choice(WEIGHTS[:2] if spread == "huge" else WEIGHTS)),
            "dtype": dtype,
            "experts_dtype": (of := draw(choice(scope.dtypes)) if mixed else dtype),
            "biases_dtype": draw(choice((of, *scope.dtypes))) if mixed else dtype,
            "weights_dtype": draw(st.one_of(st.none(), st.none(), st.sampled_from(scope.dtypes))),
            "ids": draw(choice(capabilities.id_dtypes)),
            "map": draw(choice(capabilities.id_dtypes)) if extras["expert_map"] else None,
            "layout": draw(choice(layouts(scope))),
            "seed": draw(seeds()),
        }

    return planned(plan)


def limit_in(
    dtype: str, capabilities: Capabilities, drawn: float, limits: tuple[float, ...]
) -> float:
    """The limit that was drawn, or the first one where a narrow dtype has no such number.

    Whether such a dtype clamps at the limit, or at its own neighbour of it, is left open.
    """
    own = [torch_dtype(each) for each in (dtype, capabilities.experts_dtype or dtype)]
    narrow = [each for each in own if each in (torch.float16, torch.bfloat16)]
    return drawn if all(torch.tensor(drawn, dtype=d).item() == drawn for d in narrow) else limits[0]


def _widths(
    draw: st.DrawFn,
    shape: str,
    hidden: st.SearchStrategy[int],
    inner: st.SearchStrategy[int],
    gated: bool,
    capabilities: Capabilities,
) -> Plan:
    """H and I: small ones beside many experts; equal, or gate_up square, where the shape is."""
    of_h, of_i = capabilities.hidden_multiple, capabilities.intermediate_multiple
    if shape == "many experts":
        return {
            "hidden": of_h * draw(st.integers(1, max(1, 8 // of_h))),
            "intermediate": of_i * draw(st.integers(1, max(1, 8 // of_i))),
        }
    if shape == "square":
        both = math.lcm(of_h, of_i)
        size = both * draw(st.integers(1, max(1, 24 // both)))
        rows = 2 if gated and draw(st.booleans()) else 1
        return {"hidden": rows * size, "intermediate": size}
    return {"hidden": draw(hidden), "intermediate": draw(inner)}


def _spreads(capabilities: Capabilities, dtype: str) -> tuple[str, ...]:
    """Shapes of x and of the weights; `huge` ones overflow what is stored in float16 on the way."""
    usual = ("even", "positive", "outliers", "large")
    narrow = capabilities.accumulator == "float16" or STORED & set(capabilities.rounding_points)
    return usual if dtype == "float16" and narrow else (*usual, "huge")


def layouts(scope: Scope) -> tuple[str, ...]:
    """Strides that may be drawn."""
    return LAYOUTS if scope.capabilities.strides else ("contiguous",)


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
        bad = torch.tensor(_bad_ids(plan))
        where = content.uniform(0, 1, tokens, top_k) < 0.3
        ids = ids.where(~where, bad[content.integers(0, len(bad) - 1, tokens, top_k)])
    expert_map = None
    if plan["expert_map"]:
        rows = torch.full((plan["experts"],), -1)
        kept = content.permutation(plan["experts"])[: plan["local"]]
        rows[kept] = content.permutation(plan["local"])
        expert_map = rows.to(ID_DTYPES[plan["map"]])
    fill = _exact if plan["content"] == "exact" else _normal
    x, experts, weights = fill(content, plan, config)
    of = (*[plan["experts_dtype"]] * 2, *[plan["biases_dtype"]] * 2)
    inputs = {
        "x": x.to(dtype),
        "experts": ExpertWeights(
            *(
                None if t is None else beside(t, dtype, own)  # type: ignore[arg-type]
                for t, own in zip(experts, of, strict=True)
            )
        ),
        "weights": _routing_weights(weights, plan),
        "expert_ids": ids.to(ID_DTYPES[plan["ids"]]),
        "config": config,
        "expert_map": expert_map,
    }
    layouts_ = dict.fromkeys((path for path, _ in walk(inputs)), plan["layout"])
    return {**inputs, "layouts": layouts_}


def _bad_ids(plan: Plan) -> list[int]:
    """Ids that are not here: next to the right ones, and right ones where bits are cut off."""
    experts = plan["experts"]
    near = [-1, -2, -experts, experts, experts + 1, 256, 2**16, 2**30, 2**31 - 1, -(2**31)]
    far = [2**31, 2**32, 2**32 + experts - 1, -(2**32)] if plan["ids"] == "int64" else []
    return [each for each in near if not 0 <= each < experts] + far


def beside(tensor: torch.Tensor, dtype: torch.dtype, own: str) -> torch.Tensor:
    """In a dtype of its own, with values that both dtypes have.

    Whether wider weights are rounded to the dtype of x before the products is left open.
    """
    other = torch_dtype(own)
    return tensor.to(dtype).to(other).to(dtype).to(other)


def _routing_weights(weights: torch.Tensor, plan: Plan) -> torch.Tensor:
    """In their own dtype; beside a narrower x float64 ones are such that float32 has them."""
    wide = torch.float64 if plan["dtype"] == "float64" else torch.float32
    own = wide if plan["weights_dtype"] is None else torch_dtype(plan["weights_dtype"])
    return weights.to(wide).to(own)


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
    # Pre-activations of a few units: beyond the clamps of swigluoai in `large` ones. In `huge` ones
    # their exponential overflows float32 and their product float16, and the output is small again.
    reach = 4.0 if plan["spread"] == "large" and not half else 1.0
    shrink = 1.0
    if plan["spread"] == "huge":
        power = 0 if config.activation in CLAMPED else config.gated + 1
        power += config.activation == "relu2"
        reach = 60.0 if power == 3 else 300.0
        shrink = reach**-power
    gate_up = content.normal(local, width, hidden, std=reach / hidden**0.5)
    down = content.normal(local, hidden, inner, std=shrink / inner**0.5)
    gate_up_bias = content.normal(local, width, std=min(reach, 4.0))
    down_bias = content.normal(local, hidden)
    has = plan["biases"]
    biases: Tensors = (
        gate_up_bias if has in ("both", "gate_up") else None,
        down_bias if has in ("both", "down") else None,
    )
    return x, (gate_up, down, *biases), _weights(content, plan)


def _weights(content: Content, plan: Plan) -> torch.Tensor:
    shape = plan["tokens"], plan["top_k"]
    if plan["weights"] == "positive":
        return content.uniform(0.05, 1.0, *shape)
    if plan["weights"] in ("signed", "small"):
        weights = content.uniform(-1.0, 1.0, *shape)
        if plan["weights"] == "signed":
            return weights
        narrow = "float16" in (plan["dtype"], plan["experts_dtype"], plan["weights_dtype"])
        factor = SMALL_IN_FLOAT16 if narrow else SMALL
        return weights.where(content.uniform(0, 1, shape[0], 1) < 0.5, factor * weights)
    weights = content.normal(*shape, std=1.5)
    return weights.masked_fill(content.uniform(0, 1, *shape) < 0.2, 0.0)


def _exact(
    content: Content, plan: Plan, config: ExpertsConfig
) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """Integers for which every order of summation is exact, also in bfloat16.

    x has at most two ones a row, so a gate is a sum of two of {0, 64, 128}: 0 or at least 64, where
    silu, gelu and relu are the identity after rounding, to float64 as well (exp(-64) is 1.6e-28).
    Then gate · up is a multiple of 64 of at most 8 · 64, each output a sum of at most two of them,
    and with weights 1, 1/2 or 1/4 and K <= 3 every partial sum is a multiple of 16 of at most
    192 · 16: eight significant bits.
    """
    tokens, hidden, inner, local = (
        plan[name] for name in ("tokens", "hidden", "intermediate", "local")
    )
    x = torch.zeros(tokens, hidden, dtype=torch.float64)
    x.scatter_(1, content.integers(0, hidden - 1, tokens, 2), 1.0)
    gate = 64 * content.integers(0, 2, local, inner, hidden).double()
    up = content.integers(-1, 1, local, inner, hidden).double()
    gate_up = torch.cat([gate, up], 1) if config.gated else gate
    down = torch.zeros(local, hidden, inner, dtype=torch.float64)
    signs = 2 * content.integers(0, 1, local, hidden, 2).double() - 1
    down.scatter_(2, content.integers(0, inner - 1, local, hidden, 2), signs)
    weights = 2 ** content.integers(-2, 0, tokens, plan["top_k"]).double()
    return x, (gate_up, down, None, None), weights


def expert_batches(**fixed: Any) -> Given:
    """Inputs of `experts_batched`: rows [E, C, H] and counts in the place of ids.

    Args:
        **fixed: as for `expert_inputs`.
    """
    given = expert_inputs(
        expert_map=(False,), invalid_ids=(False,), loads=("uniform", "skewed"), **fixed
    )

    def build(plan: Plan) -> Inputs:
        inputs = given.build(plan)
        content = Content(plan["seed"])
        local = plan["local"]
        capacity = min(plan["tokens"], 9) if local > 16 else plan["tokens"]
        counts = _counts(content, local, capacity, plan["load"])
        x = content.normal(local, capacity, plan["hidden"]).to(inputs["x"].dtype)
        return {
            "x": x,
            "tokens_per_expert": counts.to(ID_DTYPES[plan["ids"]]),
            "experts": inputs["experts"],
            "config": inputs["config"],
            "layouts": {**inputs["layouts"], "tokens_per_expert": plan["layout"]},
        }

    return Given(given.plans, build)


def _counts(content: Content, experts: int, capacity: int, load: str) -> torch.Tensor:
    """Rows in use: anything, or (skewed) all, none, one, full tiles and one off."""
    counts = content.integers(0, capacity, experts)
    if load == "skewed":
        edges = [n for n in (0, 1, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65) if n < capacity]
        edges += [capacity] * (1 + len(edges) // 2)
        counts = torch.tensor(edges)[content.integers(0, len(edges) - 1, experts)]
    if content.uniform(0, 1, 1).item() < 0.2:
        counts = torch.full_like(counts, 0 if content.uniform(0, 1, 1).item() < 0.5 else capacity)
    return counts
