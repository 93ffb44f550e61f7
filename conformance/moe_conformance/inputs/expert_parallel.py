"""Inputs of `expert_parallel`: one set of tokens and experts, cut into what each rank has.

Dimension key: T tokens, H hidden size, K experts per token, E experts, P physical experts, R ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.config import ExpertWeights, Placement

from moe_conformance.codec import replace_tensors, walk
from moe_conformance.inputs.experts import build_experts, expert_inputs
from moe_conformance.inputs.given import Content, Given, Inputs, Plan, Plans, Scope, choice
from moe_conformance.inputs.layer import UNIVERSE as LAYER
from moe_conformance.worker import LAYOUTS

COUNTS = ("equal", "unequal", "one idle", "one busy")
"""Tokens of the ranks: as many on each; not as many; none on one of them; none on all but one."""

SHARES = ("even", "uneven", "fewer")
"""Experts of the ranks: as many on each; one more on some; fewer experts than ranks."""

RECORDED = ("recording",)
ANY_MODE = ("recording", "recording", "no_grad", "inference_mode")
"""Whether torch records for a backward pass where no gradient is asked for: see `GRAD_MODES`."""

MANY = (65, 129, 257)
"""Tokens of a rank: past the blocks, and the byte, that rows are counted in."""

LEAST_WORLD = 3
"""The smallest world that has a group of two ranks without its first."""

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "placement": (False, True),
    "part_of_world": (False, True),
    "shares": SHARES,
}
"""Every value that the suite draws beside those of `experts`."""

COPIES = ("in a row", "in a row", "dealt out")
"""Ranks of the physical experts: blocks of consecutive ones, as `place_experts` gives them; or one
by one in turn, which is as good a placement."""


def on_ranks(
    *,
    counts: tuple[str, ...] = COUNTS,
    shares: tuple[str, ...] = SHARES,
    copies: tuple[bool, ...] = (False,),
    to_one_rank: bool = False,
    part_of_world: tuple[bool, ...] = (False,),
    least_k: int = 1,
    grad_modes: tuple[str, ...] = RECORDED,
    cotangent_layouts: bool = False,
    **fixed: Any,
) -> Given:
    """Inputs inside the declaration, for one of the world sizes of the scope.

    Args:
        counts: of `COUNTS`, or "none": no token anywhere; or "many": of `MANY`, at least on the
            first rank.
        shares: of `SHARES`.
        copies: with a placement that has copies, without, or either.
        to_one_rank: all pairs go to experts of one rank.
        part_of_world: the group is a part of the world, and not its first ranks; or it is the
            world; or either.
        least_k: smallest K.
        grad_modes: what the call is made under.
        cotangent_layouts: the gradient that comes in has other strides than contiguous ones, too.
        **fixed: as for `expert_inputs`.
    """
    fixed = {"invalid_ids": (False,), "loads": ("uniform", "skewed", "duplicates"), **fixed}
    base = expert_inputs(least_k=least_k, expert_map=(False,), **fixed)

    def plans(scope: Scope) -> Plans | None:
        drawn = base.plans(_without_maps(scope))
        allowed = {name: _allowed(scope, name) for name in UNIVERSE}
        cuts = tuple(each for each in shares if each in allowed["shares"])
        with_copies = tuple(each for each in copies if each in allowed["placement"])
        sizes = [
            size for size in scope.world_sizes if _least_experts(size, cuts) <= _most_experts(scope)
        ]
        worlds = {
            part: [size for size in sizes if size >= (LEAST_WORLD if part else 1)]
            for part in part_of_world
            if part in allowed["part_of_world"]
        }
        worlds = {part: large for part, large in worlds.items() if large}
        if drawn is None or not (worlds and cuts and with_copies):
            return None
        strides = LAYOUTS if cotangent_layouts and scope.capabilities.strides else LAYOUTS[:1]
        plain = _plans(drawn, worlds, scope, counts, cuts, with_copies, to_one_rank)
        return st.builds(
            lambda plan, mode, layout: {**plan, "grad_mode": mode, "cotangent_layout": layout},
            plain,
            choice(grad_modes),
            choice(strides),
        )

    return Given(plans, build_on_ranks)


def _allowed(scope: Scope, name: str) -> set[Any]:
    """What is declared of `expert_parallel` by that name, in any of the alternatives."""
    listed = scope.capabilities.alternatives("expert_parallel")
    return {value for choice in listed for value in choice.get(name, UNIVERSE[name])}


def _most_experts(scope: Scope) -> int:
    return scope.capabilities.max_experts or 10**6


def _least_experts(ranks: int, shares: tuple[str, ...]) -> int:
    """With fewer experts the ranks could not have any of these shares."""
    if "fewer" in shares:
        return 1
    return ranks if "even" in shares else ranks + 1


def _experts_of(share: str, experts: int, ranks: int, shares: tuple[str, ...], most: int) -> int:
    """About so many experts, of which ranks have such a share."""
    if share == "even":
        return max(1, min(-(-experts // ranks), most // ranks)) * ranks
    if share == "fewer" and ranks > 1:
        return 1 + experts % (ranks - 1)
    if experts < ranks and "fewer" not in shares:
        experts += ranks
    if experts % ranks == 0:
        experts += 1 if experts < most else -1
    return experts


def _without_maps(scope: Scope) -> Scope:
    """Ids are global here whatever `experts` takes."""
    choices = [
        {name: values for name, values in choice.items() if name != "expert_map"}
        for choice in scope.capabilities.alternatives("experts")
    ]
    capabilities = dataclasses.replace(scope.capabilities, experts=choices)
    return dataclasses.replace(scope, capabilities=capabilities)


@st.composite
def _plans(
    draw: st.DrawFn,
    drawn: Plans,
    worlds: Mapping[bool, Sequence[int]],
    scope: Scope,
    counts: tuple[str, ...],
    shares: tuple[str, ...],
    copies: tuple[bool, ...],
    to_one_rank: bool,
) -> Plan:
    plan = draw(drawn)
    part = draw(choice(worlds))
    world_size = draw(choice(worlds[part]))
    members = list(range(world_size))
    if part:
        members = draw(choice(_parts(world_size)))
    ranks = len(members)
    most = _most_experts(scope)
    experts = _experts_of(draw(choice(shares)), plan["experts"], ranks, shares, most)
    experts = max(1, min(experts, most))
    # Folded onto one rank's experts ids repeat; where they may not, each token has one.
    most_k = 1 if to_one_rank and not scope.capabilities.repeated_ids else experts
    physical = None
    if draw(choice(copies)):
        more = draw(st.integers(1, 2 * ranks))
        # A rank holds no more copies than there may be experts.
        physical = min(-(-(experts + more) // ranks), most) * ranks
    if plan["dtype"] == "float16" and plan["spread"] == "huge":
        # Rows travel in x's dtype, which has no room for them.
        plan = {**plan, "spread": "large"}
    return {
        **plan,
        "world_size": world_size,
        "members": members,
        "counts": _counts(draw, draw(choice(counts)), ranks, scope),
        "experts": experts,
        "local": experts,
        "top_k": min(plan["top_k"], most_k),
        "physical": physical,
        "copies": draw(choice(COPIES)) if physical else None,
        "to_one_rank": to_one_rank,
    }


def _parts(world_size: int) -> list[list[int]]:
    """Groups of two ranks or more, in which no rank has its number in the world."""
    return [
        list(range(start, stop, step))
        for step in (1, 2)
        for start in range(1, world_size)
        for stop in range(start + step + 1, world_size + 1)
    ]


def _counts(draw: st.DrawFn, kind: str, ranks: int, scope: Scope) -> list[int]:
    """How many tokens each rank has."""
    some = st.one_of(st.integers(1, 6), st.integers(1, 20))
    if kind == "none":
        return [0] * ranks
    if kind == "many":
        most = MANY[:1] if scope.interpreted else MANY
        return [draw(choice(most)), *(draw(st.one_of(some, choice(most))) for _ in range(1, ranks))]
    if kind == "equal":
        return [draw(some)] * ranks
    of_ranks = [draw(some) for _ in range(ranks)]
    one = draw(st.integers(0, ranks - 1))
    if kind == "one busy":
        return [n if rank == one else 0 for rank, n in enumerate(of_ranks)]
    if kind == "one idle":
        of_ranks[one] = 0
    elif len(set(of_ranks)) == 1:
        of_ranks[one] += 3
    return of_ranks


def build_on_ranks(plan: Plan) -> Inputs:
    """The arguments of every rank, and the whole that they are cut from."""
    counts = plan["counts"]
    whole = build_experts({**plan, "tokens": sum(counts)})
    content = Content(plan["seed"] ^ 0x5EED)
    placement = _placement(content, plan) if plan["physical"] else None
    held = held_by_ranks(plan["experts"], len(counts), placement)
    ids = whole["expert_ids"]
    if plan["to_one_rank"]:
        ids = _to_one_rank(content, ids, held)
    together = {**{name: whole[name] for name in ("x", "weights", "experts")}, "expert_ids": ids}
    given = {
        "world_size": plan["world_size"],
        "members": plan["members"],
        "ranks": cut(together, counts, held),
        "num_experts": plan["experts"],
        "config": whole["config"],
        "placement": placement,
        **surroundings_of(plan),
        "whole": together,
        "held": held,
    }
    paths = [path for path, _ in walk({"ranks": given["ranks"]})]
    return {**given, "layouts": dict.fromkeys(paths, plan["layout"])}


def surroundings_of(plan: Plan) -> Inputs:
    """What is the same on all ranks, and no argument."""
    return {name: plan[name] for name in ("grad_mode", "cotangent_layout")}


def cut(
    whole: Mapping[str, Any], counts: Sequence[int], held: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """What each rank has for itself: so many tokens, and copies of its experts."""
    tokens = zip(
        *(whole[name].split(list(counts)) for name in ("x", "weights", "expert_ids")), strict=True
    )
    return [
        {
            "x": of_rank[0].clone(),
            "weights": of_rank[1].clone(),
            "expert_ids": of_rank[2].clone(),
            "local": taken(whole["experts"], ids),
        }
        for of_rank, ids in zip(tokens, held, strict=True)
    ]


def taken(experts: ExpertWeights, ids: Sequence[int]) -> ExpertWeights:
    """These experts, in this order; there may be none."""
    rows = torch.tensor(list(ids), dtype=torch.int64)
    made: ExpertWeights = replace_tensors(experts, lambda _, tensor: tensor[rows])
    return made


def held_by_ranks(num_experts: int, ranks: int, placement: Placement | None) -> list[list[int]]:
    """The experts of each rank in the order of its rows, by their logical ids."""
    if placement is not None:
        logical = placement.physical_to_logical.tolist()
        on = placement.rank_of_physical.tolist()
        return [[e for e, at in zip(logical, on, strict=True) if at == r] for r in range(ranks)]
    sizes = [len(range(rank, num_experts, ranks)) for rank in range(ranks)]
    return [list(range(sum(sizes[:r]), sum(sizes[: r + 1]))) for r in range(ranks)]


def _placement(content: Content, plan: Plan) -> Placement:
    """Every expert once, and further copies of any; more than one may be on the same rank."""
    experts, physical, ranks = plan["experts"], plan["physical"], len(plan["counts"])
    further = content.integers(0, experts - 1, physical - experts)
    logical = torch.cat([torch.arange(experts), further])[content.permutation(physical)]
    places = [(logical == e).nonzero()[:, 0].tolist() for e in range(experts)]
    most = max(map(len, places))
    rows = torch.arange(physical)
    return Placement(
        physical_to_logical=logical,
        logical_to_physical=torch.tensor([p + [-1] * (most - len(p)) for p in places]),
        replica_count=torch.tensor([len(p) for p in places]),
        rank_of_physical=rows % ranks
        if plan["copies"] == "dealt out"
        else rows * ranks // physical,
    )


def _to_one_rank(
    content: Content, ids: torch.Tensor, held: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The same ids folded onto the experts of one rank that has some."""
    some = [of_rank for of_rank in held if of_rank]
    of_rank = torch.tensor(some[int(content.integers(0, len(some) - 1))], dtype=ids.dtype)
    return of_rank[ids.long() % len(of_rank)]


SOME = ("equal",)
"""Counts of ranks that have the same tokens, and have some."""

SOME_OR_NONE = ("equal", "equal", "equal", "none")


def on_replicas(*, counts: tuple[str, ...] = SOME, **drawn: Any) -> Given:
    """Inputs of ranks that all have the same tokens: as `on_ranks`.

    Args:
        counts: "equal", or "none".
        **drawn: as for `on_ranks`.
    """
    return Given(on_ranks(counts=counts, **drawn).plans, build_on_replicas)


def build_on_replicas(plan: Plan) -> Inputs:
    """The tokens that would be the first rank's, on every rank; experts are spread over all."""
    size = len(plan["counts"])
    made = build_on_ranks({**plan, "counts": plan["counts"][:1] + [0] * (size - 1)})
    tokens = {name: made["whole"][name] for name in ("x", "weights", "expert_ids")}
    ranks = [
        {name: tensor.clone() for name, tensor in tokens.items()} | {"local": each["local"]}
        for each in made["ranks"]
    ]
    return {**made, "ranks": ranks, "layouts": _layouts(ranks, plan)}


GATES = ("zero", "one column", "one column", "one column")
"""Weights of a shared expert's gate: all zero; or zero but for one, which is a power of two."""


def on_shared(
    *, counts: tuple[str, ...] = SOME, gates: tuple[str, ...] = GATES[:1], **drawn_too: Any
) -> Given:
    """Inputs of a shared expert that is cut over ranks, all of which have the same tokens.

    Args:
        counts: as for `on_replicas`.
        gates: of `GATES`.
        **drawn_too: as for `on_ranks`.
    """
    drawn = on_ranks(counts=counts, weight_on=("output",), **drawn_too)

    def plans(scope: Scope) -> Plans | None:
        made = drawn.plans(scope)
        factors = [
            {"shared_scale": scale, "shared_gate": gated}
            for declared in scope.capabilities.alternatives("layer")
            for scale in declared.get("shared_scale", LAYER["shared_scale"])
            for gated in declared.get("shared_gate", LAYER["shared_gate"])
        ]
        if made is None or not factors:
            return None
        unit = {"unit": scope.capabilities.intermediate_multiple}
        return st.builds(
            lambda plan, of, gate: {**plan, **of, **unit, "gate": gate},
            made,
            choice(factors),
            choice(gates),
        )

    return Given(plans, build_on_shared)


GATE = 0.5
"""The sigmoid of a shared expert's gate whose weight is zero, exact in every dtype."""


def build_on_shared(plan: Plan) -> Inputs:
    """One expert, which every token goes to with the same weight, and its slices.

    The gate's weight is zero, so that it is a factor that the oracle has without rounding; its
    gradient is not zero. Or it has one element, a power of two: then its product with a token is
    exact in every dtype and every order, and the factor is off by what its sigmoid rounds.
    """
    size, scale, gated = len(plan["counts"]), plan["shared_scale"], plan["shared_gate"]
    one = {**plan, "experts": 1, "local": 1, "top_k": 1, "tokens": plan["counts"][0]}
    unit = plan["unit"]
    if unit > 1:
        # Of what has to be a multiple, every rank gets one; of others a rank may get nothing.
        one["intermediate"] = plan["intermediate"] * size
    whole = build_experts({**one, "load": "one expert"})
    x, shared, config = whole["x"], whole["experts"], whole["config"]
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    gate = x.new_zeros(1, x.shape[1])
    if gated and plan["gate"] == "one column" and len(x):
        gate = _one_column(Content(plan["seed"] ^ 0x6A7E), x)
    factors = (x.double() @ gate.double().T).sigmoid() if gated else torch.ones(len(x), 1).double()
    ranks = [
        {"x": x.clone(), "part": _slice(shared, config.gated, size, rank, unit)}
        | ({"shared_gate": gate.clone()} if gated else {})
        for rank in range(size)
    ]
    return {
        "world_size": plan["world_size"],
        "members": plan["members"],
        "ranks": ranks,
        "num_experts": 1,
        "config": config,
        "placement": None,
        **surroundings_of(plan),
        "shared_scale": scale,
        "whole": {
            "x": x,
            "weights": scale * factors,
            "expert_ids": ids,
            "experts": shared,
        },
        "held": [[0]] * size,
        "layouts": _layouts(ranks, plan),
    }


def _one_column(content: Content, x: torch.Tensor) -> torch.Tensor:
    """[1, H]: with x at most 4, and below -2 for one of the tokens: there a sigmoid is not linear.

    A column of zeros stays one.
    """
    column = int(content.integers(0, x.shape[1] - 1))
    values = x[:, column].double()
    most = values[values.abs().argmax()]
    gate = torch.zeros_like(x[:1])
    if most != 0:
        power = 2 - int(torch.log2(most.abs()).ceil())
        gate[0, column] = -torch.sign(most) * 2.0 ** max(-14, min(power, 14))
    return gate


def _layouts(ranks: list[dict[str, Any]], plan: Plan) -> dict[str, str]:
    return {path: plan["layout"] for path, _ in walk({"ranks": ranks})}


def _slice(shared: ExpertWeights, gated: bool, size: int, rank: int, unit: int) -> ExpertWeights:
    """The rank's share of I: some rows of the gate and the same of up; the bias is on one rank."""
    width = shared.down.shape[2]
    shares = [len(range(r, width // unit, size)) * unit for r in range(size)]
    start, stop = sum(shares[:rank]), sum(shares[: rank + 1])
    rows = torch.arange(start, stop)
    if gated:
        rows = torch.cat([rows, rows + width])
    bias, down_bias = shared.gate_up_bias, shared.down_bias
    return ExpertWeights(
        gate_up=shared.gate_up[:, rows],
        down=shared.down[:, :, start:stop].clone(),
        gate_up_bias=None if bias is None else bias[:, rows],
        down_bias=None if down_bias is None else down_bias * (rank == 0),
    )
