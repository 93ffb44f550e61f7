"""Inputs of `align`, `align_batched`, `dispatch`, `combine` and `drop_to_capacity`.

Dimension key: T tokens, K experts per token, E experts, H hidden size, B block size, S slots that
have a row.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

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
from moe_conformance.target import Capabilities
from moe_conformance.worker import LAYOUTS

BLOCK_SIZES = (1, 2, 4, 7, 8, 16, 32, 48, 64, 128, 256)
"""Block sizes where the target declares none: 1, tiles of kernels, two that are no power of two."""

LARGE_BLOCKS = (512, 1000, 1024)
"""Block sizes that neither a byte nor a warp holds: now and then, with few experts."""

ANY_BLOCK = (1, 2**30)

EXPERTS = (
    *(1, 2, 3, 5, 8, 16, 31, 32, 33, 60, 64, 65, 72, 127, 128, 129, 160, 255, 256, 257, 384),
    *(512, 640, 1152),
)
"""Numbers of experts: those of published models, powers of two and one off, beyond one byte, and
beyond a table of 512 or 1024 that holds those of any model so far."""

TOP_KS = (1, 2, 8)
"""Experts per token that models have and kernels are written for."""

MANY_KS = (17, 22, 32, 33)
"""More of them than fill a half warp, or a warp; now and then."""

TILES = tuple(size + off for size in (32, 64, 128, 256, 512, 1024) for off in (-1, 0, 1))
"""Numbers of slots around those that fill the tiles of a kernel."""

LONG = (2**15, 2**15 + 9, 2**16, 2**16 + 9)
"""Numbers of slots that sixteen bits just do not hold, with a sign and without."""

WIDE = tuple(size + off for size in (64, 128, 256, 512, 1024, 2048) for off in (-1, 0, 1))
"""Hidden sizes around those that fill the tiles of a kernel."""

LOADS = ("uniform", "skewed", "half empty", "one expert", "duplicates", "full blocks", "one over")
"""How slots spread over experts. `one expert` gives all of them to the same, `duplicates` repeats
experts within a row, `full blocks` gives experts whole blocks, `one over` a slot more than that.
Where the ids of a row have to differ, `one expert` gives all tokens the same K experts."""

INVALID = ("some", "tokens", "all")
"""Which ids mean *not here*: some of them, all of some tokens, all."""

_OFTEN = st.sampled_from(("some", "tokens") * 4 + ("all",))

COUNTS = (
    "uniform",
    "half empty",
    "one expert",
    "full",
    "full blocks",
    "one over",
    "all but one",
)
"""How many rows each expert of a batched buffer has: `one over` whole blocks and a row, `all but
one` a row less than there is room for."""

SPECIAL = (torch.nan, torch.inf, -torch.inf, -0.0, 1e5, 1e-30, 6e-8, 1e-39)
"""Values that a copy leaves as they are; the last two are subnormal in one dtype or another."""

RANGES = ("spread", "close", "signed", "large")
"""What weights are like that pairs are chosen by: from 0 to 1; so close together that the next
narrower dtype cannot tell them apart; of either sign; up to 4."""

CLOSE = {"float64": 2.0**-26, "float32": 2.0**-10, "float16": 2.0**-8, "bfloat16": 2.0**-4}
"""How far apart close weights are at most: too little for float32, bfloat16, bfloat16; in bfloat16
there are a few values only."""

GIVEN_LAYOUTS = LAYOUTS[1:]
VECTOR_LAYOUTS = ("strided", "offset")


def slots(
    *,
    loads: tuple[str, ...] = LOADS,
    invalid: bool | None = None,
    mapped: bool | None = None,
    dropped: bool | None = None,
    blocks: tuple[int, int] = ANY_BLOCK,
    least_experts: int = 1,
    least_k: int = 1,
    moved: bool = False,
    long: bool = False,
) -> Given:
    """Inputs of `align` inside the declaration.

    Args:
        loads: how slots spread over experts.
        invalid: with ids that mean *not here*, without, or (None) either.
        mapped: with an expert map, without, or either.
        dropped: `drop_invalid`, or either.
        blocks: the smallest and the largest block size to draw.
        least_experts: smallest number of experts, and of tokens; 2 where they are compared.
        least_k: smallest number of experts per token; 2 where a row's ids are compared.
        moved: ids and map have other strides than contiguous ones.
        long: more slots than sixteen bits hold.
    """

    def plans(scope: Scope) -> Plans | None:
        if (moved and not scope.capabilities.strides) or (long and scope.interpreted):
            return None
        sized = _block_sizes(scope, *blocks)
        large = tuple(b for b in LARGE_BLOCKS if blocks[0] <= b <= blocks[1])
        if long or scope.interpreted or scope.capabilities.block_sizes is not None:
            large = ()
        taken = loads_inside(scope, loads)
        made = []
        for declared in scope.capabilities.alternatives("align"):
            choices = {
                "invalid_ids": _allowed(declared, "invalid_ids", invalid),
                "expert_map": _allowed(declared, "expert_map", mapped),
                "drop_invalid": _allowed(declared, "drop_invalid", dropped),
            }
            if sized and taken and all(choices.values()):
                least = max(least_experts, least_k)
                made.append(
                    _align_plans(scope, choices, taken, sized, large, (least, least_k), moved, long)
                )
        possible = [each for each in made if each is not None]
        return st.one_of(possible) if possible else None

    return Given(plans, build_slots)


def _allowed(
    declared: dict[str, tuple[Any, ...]], name: str, wanted: bool | None
) -> tuple[bool, ...]:
    values = declared.get(name, (False, True))
    return tuple(v for v in (False, True) if v in values and wanted in (None, v))


def _block_sizes(scope: Scope, least: int, most: int) -> tuple[int, ...]:
    declared = scope.capabilities.block_sizes
    if declared is None:
        declared = BLOCK_SIZES
        most = min(most, 16) if scope.interpreted else most
    return tuple(b for b in declared if least <= b <= most)


def _align_plans(
    scope: Scope,
    choices: dict[str, tuple[bool, ...]],
    loads: tuple[str, ...],
    block_sizes: tuple[int, ...],
    large: tuple[int, ...],
    least: tuple[int, int],
    moved: bool,
    long: bool,
) -> Plans | None:
    if not _enough_experts(scope, *least):
        return None

    def plan(draw: st.DrawFn) -> Plan:
        drawn = _draw_ids(draw, scope, loads, choices["invalid_ids"], *least, long=long)
        block_size = draw(choice(block_sizes))
        if large and draw(st.integers(0, 9)) == 9:
            block_size = draw(choice(large))
            drawn |= _of_large_blocks(draw, scope, block_size, *least)
        experts, local = drawn["experts"], None
        if draw(choice(choices["expert_map"])):
            some = st.integers(max(1, experts // 3), max(1, experts - 1))
            local = draw(st.one_of(some, some, some, st.sampled_from((experts, 0))))
        return {
            **drawn,
            "block_size": block_size,
            "local": local,
            "map_ids": draw(choice(scope.capabilities.id_dtypes)),
            "drop_invalid": draw(choice(choices["drop_invalid"])),
            "layout": draw(choice(GIVEN_LAYOUTS)) if moved else "contiguous",
            "seed": draw(seeds()),
        }

    return planned(plan)


def _of_large_blocks(
    draw: st.DrawFn, scope: Scope, block_size: int, least: int, least_k: int
) -> Plan:
    """Sizes with which some expert may have a block in full, and more; few experts pad little."""
    most = max(least, min(scope.capabilities.max_experts or 4, 4))
    experts = draw(st.integers(least, most))
    most_k = min(2, experts, scope.capabilities.max_top_k or 2)
    top_k = draw(st.integers(least_k, max(least_k, most_k)))
    total = draw(choice((block_size // 2, block_size, block_size + 1, 2 * block_size + 9)))
    return {"experts": experts, "top_k": top_k, "tokens": max(least, total // top_k)}


def _enough_experts(scope: Scope, least: int, least_k: int) -> bool:
    capabilities = scope.capabilities
    return least <= (capabilities.max_experts or least) and least_k <= (
        capabilities.max_top_k or least_k
    )


def _draw_ids(
    draw: st.DrawFn,
    scope: Scope,
    loads: tuple[str, ...],
    invalid: tuple[bool, ...],
    least: int,
    least_k: int,
    *,
    long: bool = False,
) -> Plan:
    capabilities = scope.capabilities
    most = min(capabilities.max_experts or EXPERTS[-1], 33 if scope.interpreted else EXPERTS[-1])
    edges = [e for e in (*EXPERTS, most) if least <= e <= most]
    few = st.integers(least, min(most, 9))
    # Around and beyond one byte often enough for a fault there to be found.
    many = [e for e in edges if e > 128] or edges
    experts = draw(few if long else st.one_of(few, st.sampled_from(edges), st.sampled_from(many)))
    most_k = min(experts, capabilities.max_top_k or MANY_KS[-1])
    tokens, top_k = _draw_shape(draw, scope, least, least_k, most_k, long)
    return {
        "tokens": tokens,
        "experts": experts,
        "top_k": top_k,
        "load": draw(choice(loads)),
        "invalid": draw(_OFTEN) if draw(choice(invalid)) else None,
        "ids": draw(choice(capabilities.id_dtypes)),
        **distinct_rows(scope),
    }


def _draw_shape(
    draw: st.DrawFn, scope: Scope, least: int, least_k: int, most_k: int, long: bool
) -> tuple[int, int]:
    """T and K: T small or around the ends of tiles, or both so that T·K is."""
    usual = [k for k in TOP_KS if least_k <= k <= most_k]
    few = max(least_k, min(most_k, MANY_KS[0] - 1))
    any_k = st.integers(least_k, few)
    some_k = st.one_of(any_k, st.sampled_from(usual)) if usual else any_k
    many = [k for k in MANY_KS if least_k <= k <= most_k]
    if many and not long and draw(st.integers(0, 9)) == 9:
        some_k = st.sampled_from(many)
    if long:
        top_k = draw(some_k)
        return -(-draw(choice(LONG)) // top_k), top_k
    if draw(choice((False, False, False, False, True))):
        total = draw(choice(TILES[: 6 if scope.interpreted else len(TILES)]))
        divisors = [k for k in range(least_k, few + 1) if total % k == 0 and total // k >= least]
        if divisors:
            top_k = draw(choice(divisors))
            return total // top_k, top_k
    largest = 33 if scope.interpreted else 130
    return draw(sizes(largest, 16, 64, least=least)), draw(some_k)


def build_slots(plan: Plan) -> Inputs:
    """The arguments of `align`."""
    content = Content(plan["seed"])
    expert_map = None
    if plan["local"] is not None:
        expert_map = torch.full((plan["experts"],), -1)
        kept = content.permutation(plan["experts"])[: plan["local"]]
        expert_map[kept] = content.permutation(len(kept))
        expert_map = expert_map.to(ID_DTYPES[plan["map_ids"]])
    return {
        "expert_ids": fill_ids(content, plan, plan["block_size"]),
        "block_size": plan["block_size"],
        "num_experts": plan["experts"],
        "expert_map": expert_map,
        "drop_invalid": plan["drop_invalid"],
        "layouts": {"expert_ids": plan["layout"], "expert_map": plan["layout"]},
    }


def fill_ids(content: Content, plan: Plan, block_size: int = 16) -> torch.Tensor:
    """Expert ids [T, K] of a plan's load, with the invalid ones that it asks for."""
    tokens, experts, top_k = plan["tokens"], plan["experts"], plan["top_k"]
    distinct = plan.get("distinct", False)
    ids = spread(content, plan["load"], tokens, experts, top_k, block_size, distinct=distinct)
    dtype = ID_DTYPES[plan["ids"]]
    if plan["invalid"] is not None:
        shape = (tokens, top_k)
        bad = _bad_ids(experts, dtype)
        # -1 and E are what libraries write; the rest is what only a bounds check stops.
        usual = bad[content.integers(0, 1, *shape)]
        spoilt = usual.where(
            content.uniform(0, 1, *shape) < 0.5, bad[content.integers(0, len(bad) - 1, *shape)]
        )
        ids = spoilt.where(_not_here(content, plan["invalid"], *shape), ids)
    return ids.to(dtype)


def _bad_ids(experts: int, dtype: torch.dtype) -> torch.Tensor:
    bad = [-1, experts, experts + 1, 2 * experts, -2, -experts, -experts - 1, 2**31 - 1, -(2**31)]
    if dtype is torch.int64:
        # Cut to 32 bits these are the ids 0 and E - 1.
        bad += [2**32, 2**32 + experts - 1, -(2**32)]
    return torch.tensor(bad)


def _not_here(content: Content, which: str, tokens: int, top_k: int) -> torch.Tensor:
    """Which of the [T, K] pairs lead nowhere: at least one does, and unless all are to, not all."""
    if which == "all" or tokens * top_k == 1:
        return torch.ones(tokens, top_k, dtype=torch.bool)
    columns = 1 if which == "tokens" and tokens > 1 else top_k
    where = content.uniform(0, 1, tokens, columns) < 0.4
    order = content.permutation(where.numel())
    where.view(-1)[order[:2]] = torch.tensor([True, False])
    return where.expand(tokens, top_k)


def spread(
    content: Content,
    load: str,
    tokens: int,
    experts: int,
    top_k: int,
    block_size: int,
    *,
    distinct: bool = False,
) -> torch.Tensor:
    """Valid expert ids [T, K], int64, with one of the `LOADS`; `distinct` ones within a row."""
    if distinct and load in ("one expert", "full blocks", "one over"):
        return _spread_distinct(content, load, tokens, experts, top_k, block_size)
    if load == "one expert":
        return content.integers(0, experts - 1, 1, 1).repeat(tokens, top_k)
    if load == "duplicates":
        few = content.permutation(experts)[: max(2, top_k // 2)]
        ids = few[content.integers(0, len(few) - 1, tokens, top_k)]
        ids[:, -1] = ids[:, 0]
        return ids
    if load == "full blocks":
        blocks = content.permutation(experts).repeat_interleave(block_size)
        count = tokens * top_k
        flat = blocks.repeat(-(-count // len(blocks)))[:count]
        return flat[content.permutation(count)].reshape(tokens, top_k)
    if load == "one over":
        blocks = content.integers(1, 2, experts) * block_size + 1
        flat = content.permutation(experts).repeat_interleave(blocks)
        count = tokens * top_k
        flat = torch.cat([flat, flat[-1:].expand(max(0, count - len(flat)))])[:count]
        return flat[content.permutation(count)].reshape(tokens, top_k)
    if load == "half empty":
        some = content.permutation(experts)[: max(top_k, (experts + 1) // 2)]
        return some[content.distinct(tokens, len(some), top_k)]
    if load == "skewed":
        popularity = -2 * content.permutation(experts).add(1).log()
        noise = -(-content.uniform(1e-9, 1, tokens, experts).log()).log()
        return (popularity + noise).argsort(-1, descending=True)[:, :top_k]
    return content.distinct(tokens, experts, top_k)


def _spread_distinct(
    content: Content, load: str, tokens: int, experts: int, top_k: int, block_size: int
) -> torch.Tensor:
    """Loads in which no expert has more slots than there are tokens."""
    order = content.permutation(experts)
    if load == "one expert":
        return order[:top_k].repeat(tokens, 1)
    total, over = tokens * top_k, int(load == "one over")
    # The largest count of whole blocks, and a slot more, that T has room for.
    largest = (tokens - over) // block_size * block_size + over or tokens
    blocks = content.integers(1, 2, experts) if over else -(-total // (experts * block_size))
    counts = (torch.zeros_like(order) + blocks * block_size + over).clamp_max(largest)
    counts = _first_of(counts, total)
    # What is left over goes to experts that have room, past whole blocks only if it must.
    for room in (largest, tokens):
        counts += _first_of(room - counts, total - int(counts.sum()))
    # Equal ids are less than T apart, and so in different rows of what is filled by columns.
    ids = order.repeat_interleave(counts).reshape(top_k, tokens).T[content.permutation(tokens)]
    return ids.gather(1, content.distinct(tokens, top_k, top_k))


def _first_of(counts: torch.Tensor, total: int) -> torch.Tensor:
    """The same counts, but none beyond a sum of `total`."""
    before = counts.cumsum(0) - counts
    return (total - before).clamp_min(0).minimum(counts)


def batched(
    *,
    loads: tuple[str, ...] = COUNTS,
    blocks: tuple[int, int] = ANY_BLOCK,
    least_tokens: int = 1,
    moved: bool = False,
    long: bool = False,
) -> Given:
    """Inputs of `align_batched` inside the declaration.

    Args:
        loads: how many rows the experts have.
        blocks: the smallest and the largest block size to draw.
        least_tokens: smallest capacity.
        moved: the counts have other strides than contiguous ones.
        long: more rows than sixteen bits hold.
    """

    def plans(scope: Scope) -> Plans | None:
        if (moved and not scope.capabilities.strides) or (long and scope.interpreted):
            return None
        sized = _block_sizes(scope, *blocks)
        return _batched_plans(scope, sized, loads, least_tokens, moved, long) if sized else None

    return Given(plans, build_batched)


def _batched_plans(
    scope: Scope,
    block_sizes: tuple[int, ...],
    loads: tuple[str, ...],
    least: int,
    moved: bool,
    long: bool,
) -> Plans:
    most = min(scope.capabilities.max_experts or 640, 16 if scope.interpreted else 640)
    edges = [e for e in (*EXPERTS, most) if e <= most]

    def plan(draw: st.DrawFn) -> Plan:
        few = st.integers(1, min(most, 9))
        many = [e for e in edges if e > 128] or edges
        experts = draw(st.one_of(few, st.sampled_from(edges), st.sampled_from(many)))
        largest = 33 if scope.interpreted else min(260, max(3, 2048 // experts))
        capacity = (
            -(-draw(choice(LONG)) // experts)
            if long
            else draw(sizes(largest, 16, 64, 256, least=least))
        )
        return {
            "experts": experts,
            "max_tokens": capacity,
            "block_size": draw(choice(block_sizes)),
            "load": draw(choice(loads)),
            "ids": draw(choice(scope.capabilities.id_dtypes)),
            "layout": draw(choice(VECTOR_LAYOUTS)) if moved else "contiguous",
            "seed": draw(seeds()),
        }

    return planned(plan)


def build_batched(plan: Plan) -> Inputs:
    """The arguments of `align_batched`."""
    content = Content(plan["seed"])
    experts, largest, block_size = plan["experts"], plan["max_tokens"], plan["block_size"]
    counts = content.integers(0, largest, experts)
    if plan["load"] == "full":
        counts = torch.full((experts,), largest)
    elif plan["load"] == "half empty":
        counts[content.permutation(experts)[: (experts + 1) // 2]] = 0
    elif plan["load"] == "one expert":
        alone = int(content.integers(0, experts - 1, 1))
        counts = torch.zeros(experts, dtype=torch.int64)
        counts[alone] = content.integers(min(1, largest), largest, 1)
    elif plan["load"] == "full blocks":
        counts = counts // block_size * block_size
    elif plan["load"] == "one over":
        counts = (counts // block_size * block_size + 1).clamp_max(largest)
    elif plan["load"] == "all but one":
        counts = torch.full((experts,), max(0, largest - 1))
    return {
        "tokens_per_expert": counts.to(ID_DTYPES[plan["ids"]]),
        "max_tokens": largest,
        "block_size": block_size,
        "layouts": {"tokens_per_expert": plan["layout"]},
    }


def rows(
    *,
    loads: tuple[str, ...] = LOADS,
    invalid: bool | None = None,
    least_experts: int = 1,
    least_k: int = 1,
    content: str = "normal",
    moved: bool = False,
    long: bool = False,
) -> Given:
    """Inputs of `dispatch`, and weights for `combine`, inside the declaration.

    Args:
        loads: how slots spread over experts.
        invalid: with ids that mean *not here*, without, or (None) either.
        least_experts: smallest number of experts, and of tokens.
        least_k: smallest number of experts per token.
        content: `normal`; `special` (NaN, infinities, large and tiny values among them, where they
            are taken); `exact` (small integers and weights that are powers of two).
        moved: x and the ids have other strides than contiguous ones.
        long: more slots than sixteen bits hold, and few columns.
    """

    def plans(scope: Scope) -> Plans | None:
        wanted, taken = _not_here_choices(scope, invalid), loads_inside(scope, loads)
        if not scope.dtypes or not wanted or (moved and not scope.capabilities.strides):
            return None
        if not _enough_experts(scope, least_experts, least_k) or (long and scope.interpreted):
            return None
        if not taken:
            return None
        least = max(least_experts, least_k)

        def plan(draw: st.DrawFn) -> Plan:
            drawn = _draw_ids(draw, scope, taken, wanted, least, least_k, long=long)
            slots = drawn["tokens"] * drawn["top_k"]
            return {**drawn, **_draw_rows(draw, scope, content, moved, slots)}

        return planned(plan)

    return Given(plans, build_rows)


def _not_here_choices(scope: Scope, wanted: bool | None) -> tuple[bool, ...]:
    """Whether pairs without an expert may be drawn: both declarations of `invalid_ids` count."""
    taken = all(
        any(True in declared.get("invalid_ids", (True,)) for declared in choices)
        for choices in map(scope.capabilities.alternatives, ("align", "experts"))
    )
    return tuple(v for v in (False, True) if (taken or not v) and wanted in (None, v))


def _draw_rows(draw: st.DrawFn, scope: Scope, content: str, moved: bool, slots: int) -> Plan:
    multiple = scope.capabilities.hidden_multiple
    dtype = draw(choice(scope.dtypes))
    if content == "special" and scope.capabilities.finite_only:
        content = "normal"
    exact = "float64" if dtype == "float64" else "float32"
    columns = 2 if slots >= LONG[0] else 40
    hidden = sizes(max(1, columns // multiple), 16)
    tiles = [h // multiple for h in WIDE if h % multiple == 0 and h * slots <= 2**15]
    if tiles and not scope.interpreted:
        # Beside the fewest slots only: as often as all others.
        wide = [h for h in tiles if h * multiple > 512] or tiles
        hidden = st.one_of(hidden, hidden, st.sampled_from(tiles), st.sampled_from(wide))
    return {
        "hidden": multiple * draw(hidden),
        "dtype": dtype,
        # Weights come from the router in float32, or rounded to x's dtype.
        "weights": draw(choice((exact, dtype))),
        "content": content,
        "layout": draw(choice(GIVEN_LAYOUTS)) if moved else "contiguous",
        "seed": draw(seeds()),
    }


def build_rows(plan: Plan) -> Inputs:
    """The arguments of `dispatch`, and weights [T, K]."""
    content = Content(plan["seed"])
    layout = plan["layout"]
    return {
        "x": _fill(content, plan["content"], plan["tokens"], plan["hidden"], plan["dtype"]),
        "expert_ids": fill_ids(content, plan),
        "num_experts": plan["experts"],
        "weights": _weigh(content, plan),
        "layouts": {"x": layout, "expert_ids": layout},
    }


def _fill(content: Content, kind: str, count: int, hidden: int, dtype: str) -> torch.Tensor:
    if kind == "exact":
        return content.integers(-3, 3, count, hidden).to(torch_dtype(dtype))
    x = content.normal(count, hidden)
    if kind == "special":
        special = torch.tensor(SPECIAL, dtype=torch.float64)
        drawn = special[content.integers(0, len(special) - 1, count, hidden)]
        x = drawn.where(content.uniform(0, 1, count, hidden) < 0.2, x)
    return x.to(torch_dtype(dtype))


def _weigh(content: Content, plan: Plan) -> torch.Tensor:
    shape = (plan["tokens"], plan["top_k"])
    if plan["content"] == "exact":
        weights = 2.0 ** content.integers(-1, 1, *shape)
        weights[content.uniform(0, 1, *shape) < 0.1] = 0
    else:
        weights = content.normal(*shape)
    return weights.to(torch_dtype(plan["weights"]))


def scattered(
    *,
    missing: bool | None = None,
    least_k: int = 1,
    content: str = "normal",
    moved: bool = False,
    appended: bool = False,
    long: bool = False,
) -> Given:
    """Inputs of `combine` inside the declaration: rows in a random order of their slots.

    Args:
        missing: some pairs have no row, all have one, or (None) either.
        least_k: smallest number of experts per token.
        content: as in `rows`.
        moved: rows, slots and weights have other strides than contiguous ones.
        appended: rows follow that belong to nobody.
        long: more slots than sixteen bits hold, and few columns.
    """

    def plans(scope: Scope) -> Plans | None:
        wanted = _not_here_choices(scope, missing)
        if not scope.dtypes or not wanted or (moved and not scope.capabilities.strides):
            return None
        if not _enough_experts(scope, 1, least_k) or (long and scope.interpreted):
            return None
        if appended and not scope.capabilities.appended_rows:
            return None
        most = max(least_k, scope.capabilities.max_top_k or MANY_KS[-1])

        def plan(draw: st.DrawFn) -> Plan:
            tokens, top_k = _draw_shape(draw, scope, 1, least_k, most, long)
            return {
                "tokens": tokens,
                "top_k": top_k,
                "missing": draw(_OFTEN) if draw(choice(wanted)) else None,
                "in_order": draw(choice((False, False, True))),
                "appended": draw(st.integers(1, 5)) if appended else 0,
                "ids": draw(choice(scope.capabilities.id_dtypes)),
                **_draw_rows(draw, scope, content, moved, tokens * top_k),
            }

        return planned(plan)

    return Given(plans, build_scattered)


def build_scattered(plan: Plan) -> Inputs:
    """The arguments of `combine`."""
    content = Content(plan["seed"])
    tokens, top_k = plan["tokens"], plan["top_k"]
    order = content.permutation(tokens * top_k)
    if plan["missing"] is not None:
        gone = _not_here(content, plan["missing"], tokens, top_k).flatten()
        order = order[~gone[order]]
    if plan["in_order"]:
        order = order.sort().values
    order = torch.cat([order, torch.full((plan["appended"],), tokens * top_k)])
    layout = plan["layout"]
    return {
        "rows": _fill(content, plan["content"], len(order), plan["hidden"], plan["dtype"]),
        "slots": order.to(ID_DTYPES[plan["ids"]]),
        "weights": _weigh(content, plan),
        "layouts": dict.fromkeys(("rows", "slots", "weights"), layout),
    }


def capacities(
    *,
    policies: tuple[str, ...] = ("position", "first_choice", "probs"),
    invalid: bool | None = None,
    loads: tuple[str, ...] = LOADS,
    tight: bool = False,
    moved: bool = False,
) -> Given:
    """Inputs of `drop_to_capacity` inside the declaration.

    Args:
        policies: how the pairs that stay are chosen.
        invalid: with ids that mean *not here*, without, or (None) either.
        loads: how slots spread over experts.
        tight: less than what an expert has on average, so that some are dropped.
        moved: weights and ids have other strides than contiguous ones.
    """

    def plans(scope: Scope) -> Plans | None:
        if moved and not scope.capabilities.strides:
            return None
        wanted, taken = _not_here_choices(scope, invalid), loads_inside(scope, loads)
        ranges = {policy: _ranges(scope.capabilities, policy) for policy in policies}
        allowed = tuple(policy for policy in policies if ranges[policy])
        if not wanted or not taken or not scope.dtypes or not allowed:
            return None
        dtypes = tuple(dict.fromkeys(("float32", *scope.dtypes)))

        def plan(draw: st.DrawFn) -> Plan:
            drawn = _draw_ids(draw, scope, taken, wanted, 2 if tight else 1, 1)
            total = drawn["tokens"] * drawn["top_k"]
            mean = -(-total // drawn["experts"])
            some = st.one_of(st.integers(0, 2 * mean), st.just(mean), st.just(total + 1))
            capacity = draw(st.integers(1, max(1, mean // 2)) if tight else some)
            policy = draw(choice(allowed))
            return {
                **drawn,
                "capacity": capacity,
                "policy": policy,
                "range": draw(choice(ranges[policy])),
                "dtype": draw(choice(dtypes)),
                "layout": draw(choice(GIVEN_LAYOUTS)) if moved else "contiguous",
                "seed": draw(seeds()),
            }

        return planned(plan)

    return Given(plans, build_capacities)


def signed_weights(capabilities: Capabilities, policy: str) -> set[bool]:
    """Whether a policy takes weights with some below 0 (True), and without (False)."""
    return {
        value
        for declared in capabilities.alternatives("capacity")
        if policy in declared.get("policy", (policy,))
        for value in declared.get("signed_weights", (False, True))
    }


def _ranges(capabilities: Capabilities, policy: str) -> tuple[str, ...]:
    taken = signed_weights(capabilities, policy)
    return tuple(name for name in RANGES if (name == "signed") in taken)


def build_capacities(plan: Plan) -> Inputs:
    """The arguments of `drop_to_capacity`."""
    content = Content(plan["seed"])
    ids = fill_ids(content, plan)
    low, high = {
        "spread": (0.01, 1.0),
        "close": (1 - CLOSE[plan["dtype"]], 1.0),
        "signed": (-1.0, 1.0),
        "large": (0.5, 4.0),
    }[plan["range"]]
    weights = content.uniform(low, high, plan["tokens"], plan["top_k"])
    layout = plan["layout"]
    return {
        "weights": weights.to(torch_dtype(plan["dtype"])),
        "expert_ids": ids,
        "num_experts": plan["experts"],
        "capacity": plan["capacity"],
        "policy": plan["policy"],
        "layouts": {"weights": layout, "expert_ids": layout},
    }
