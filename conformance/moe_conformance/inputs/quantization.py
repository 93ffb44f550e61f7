"""Inputs of `dequantize` and `experts_quantized`: codes and scales that are drawn, then packed.

Nothing here quantises floats. The codes come first; `packed` puts them into the bytes of the
format, and `meaning` says in float64 what they stand for. Both are written for this suite, so that
the reference is held against something that is not itself.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
B columns of a group, or rows and columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_conformance.codec import walk
from moe_conformance.experts_oracle import activation_parts
from moe_conformance.inputs.experts import beside, build_experts, expert_inputs, layouts
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
    torch_dtype,
)
from moe_conformance.rounded_oracle import STATIC, round_rows
from moe_conformance.target import FORMATS

INTEGERS = ("uint4b8", "uint8b128", "uint4")
HALVED = ("uint4b8", "uint4", "mxfp4", "nvfp4", "Q4_K")
"""Formats with more than one code in a byte."""

BITS = {"uint4b8": 4, "uint8b128": 8, "uint4": 4, "e4m3": 8, "mxfp4": 4, "nvfp4": 4,
        "Q8_0": 8, "Q8_1": 8, "Q4_K": 4}  # fmt: skip
UNIT = {"uint4b8": 8, "uint8b128": 4, "uint4": 8, "e4m3": 1, "mxfp4": 32, "nvfp4": 16,
        "Q8_0": 32, "Q8_1": 32, "Q4_K": 256}  # fmt: skip
"""Columns that are packed in one piece."""

UNIVERSE: dict[str, tuple[Any, ...]] = {
    "group_size": (-1, -1, 32, 8, 16, 32, 64, 128, 4, 24),
    "g_idx": (False, True),
    "scale_dtype": ("float32", "bfloat16", "float16", "float64"),
    "granularity": ("tensor", "channel", "block"),
    "padding": (False, True),
    "activation_format": (None, "int8", "e4m3", "e4m3_block", "Q8_1"),
    "activation_scales": (False, True),
    "mixed": (False, True),
}
"""Every value that the suite draws for packed tensors, beside the format. `mixed`: the two matrices
of an expert are packed differently, as llama.cpp has more bits for down."""

NO_ROUNDING: dict[str, tuple[Any, ...]] = {
    "activation_format": (None,), "activation_scales": (False,),
}  # fmt: skip
"""Where a requirement is not about 8-bit activations."""

BLOCKS = (128, 128, 64, 16, 5)
"""B of the blocks of e4m3."""

NARROW_BLOCKS = (16, 5, 5, 8, 128)
"""B where activations have blocks too: of most rows more than one is needed."""

CODES = ("any", "any", "every", "ends", "one")
"""Codes: random; one after the other through all of them; the least, the greatest and those about
the middle; the same one everywhere."""

SCALES = ("usual", "usual", "usual", "zeros", "tiny")
"""Scales: of a few binary orders; some of them 0; the least that their dtype has."""

ZERO_POINTS = ("any", "any", "ends", "middle")
ORDERS = ("shuffled", "shuffled", "uneven", "in order")
"""`g_idx`: groups of equal size in any order of columns; of any sizes, some of them empty; as
without it."""

CHANGES = ("everything", "codes", "scales",
           *("zeros",) * 3, *("g_idx",) * 3, *("global_scale",) * 3)  # fmt: skip
"""What is another one in a second call on the same storage: all there is, or one part alone."""

WIDE = (129, 136, 200, 256, 257, 264)
"""Columns of a row that is longer than the tile, or the group, that kernels count in."""

MANY = 2**16
"""More weights than this have no index of sixteen bits."""

LARGE = 260
"""Columns and rows of a matrix that has more than `MANY` weights."""

Drawn = dict[str, Any]
"""What a packed tensor is made of, as the names of `_drawn` say."""


def _powers(low: int, high: int) -> torch.Tensor:
    return torch.tensor([2.0**power for power in range(low, high + 1)], dtype=torch.float64)


POWERS = torch.cat([_powers(-127, 127), torch.tensor([math.nan], dtype=torch.float64)])
"""What each byte of E8M0 stands for."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def e4m3_values() -> torch.Tensor:
    """What each byte of float8_e4m3fn stands for: [256], float64."""
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).double()
    normal = (8 + mantissa) * _powers(-10, 5)[exponent]
    size = torch.where(exponent == 0, mantissa * 2.0**-9, normal)
    size[(byte & 127) == 127] = math.nan
    return torch.where(byte >> 7 == 1, -size, size)


E4M3 = e4m3_values()


def packed_inputs(
    *,
    formats: tuple[str, ...] = FORMATS,
    codes: tuple[str, ...] = CODES,
    scales: tuple[str, ...] = SCALES,
    zeros: tuple[str, ...] = ZERO_POINTS,
    orders: tuple[str, ...] = ORDERS,
    several_groups: bool = False,
    least_experts: int = 1,
    nan: bool = False,
    changes: tuple[str, ...] = (),
    large: bool = False,
    **fixed: tuple[Any, ...],
) -> Given:
    """Inputs of `dequantize` inside the declaration.

    Args:
        formats: to draw from.
        codes: of `CODES`.
        scales: of `SCALES`, or "ends" for formats with scales of 8 bits.
        zeros: of `ZERO_POINTS`.
        orders: of `ORDERS`, where there is a g_idx.
        several_groups: a row has at least two scales, or zero points.
        least_experts: smallest E.
        nan: codes and scales that are NaN, where the target takes them.
        changes: of `CHANGES`, for what comes with a second call.
        large: now and then there are more weights than sixteen bits count.
        **fixed: the values that a field of `UNIVERSE` may take here, inside the declared ones.
    """
    fixed = {"padding": (False,), "g_idx": (False,), **NO_ROUNDING, **fixed}

    def plans(scope: Scope) -> Plans | None:
        chosen = _choices(scope, formats, fixed, several_groups)
        if not chosen:
            return None

        def plan(draw: st.DrawFn) -> Plan:
            format, choices = draw(choice(chosen))
            about = draw(_about(format, choices, orders))
            experts = draw(st.integers(least_experts, 4))
            sizes = _sizes(draw, about, several_groups, scope.interpreted)
            if large and not scope.interpreted and draw(st.integers(0, 9)) == 9:
                # Of all experts together, or in each of two at most.
                apart = draw(st.booleans())
                experts = max(least_experts, min(experts, 2)) if apart else experts
                each = sizes["columns"] * (1 if apart else experts)
                sizes["rows"] = MANY // each + draw(st.integers(1, 3))
            return {
                **about,
                "experts": experts,
                **sizes,
                "codes": draw(choice(codes)),
                "scales": draw(choice(scales)),
                "zeros": draw(choice(zeros)),
                "nan": not scope.capabilities.finite_only,
                "nan_codes": nan and not scope.capabilities.finite_only,
                **_changed(draw, about, changes),
                "layout": draw(choice(layouts(scope))),
                "seed": draw(seeds()),
            }

        return planned(plan)

    return Given(plans, build_packed)


def _choices(
    scope: Scope,
    formats: tuple[str, ...],
    fixed: Mapping[str, tuple[Any, ...]],
    several_groups: bool = False,
) -> list[tuple[str, dict[str, tuple[Any, ...]]]]:
    """Formats with the values that their fields may take; those with none are left out."""
    declared_dtypes = (*scope.capabilities.dtypes, "float32")
    found = []
    for number, declared in enumerate(scope.capabilities.alternatives("quantization")):
        for format in formats:
            if format not in scope.capabilities.formats:
                continue
            choices: dict[str, tuple[Any, ...]] = {"alternative": (number,)}
            for name, universe in UNIVERSE.items():
                allowed = declared.get(name, universe)
                values = tuple(v for v in fixed.get(name, universe) if v in allowed)
                if name not in fixed:
                    values += tuple(v for v in allowed if v not in values)
                choices[name] = values
            if "scale_dtype" not in declared:
                choices["scale_dtype"] = tuple(
                    name for name in choices["scale_dtype"] if name in declared_dtypes
                )
            if format not in INTEGERS:
                # There is nothing else to have.
                choices["g_idx"] = tuple(v for v in choices["g_idx"] if not v)
            if several_groups:
                sizes = tuple(size for size in choices["group_size"] if size != -1)
                choices["group_size"] = sizes
                if format == "e4m3":
                    choices["granularity"] = tuple(
                        each for each in choices["granularity"] if each != "tensor"
                    )
            choices["block"] = _sides(declared, BLOCKS)
            choices["narrow_block"] = _sides(declared, NARROW_BLOCKS)
            if not choices["block"]:
                kinds = tuple(each for each in choices["granularity"] if each != "block")
                choices |= {"granularity": kinds, "block": (-1,), "narrow_block": (-1,)}
            fitting = _rounding_beside(format)
            choices["activation_format"] = tuple(
                each for each in choices["activation_format"] if each in fitting
            )
            if choices["activation_format"] == ("e4m3_block",):
                kinds = tuple(each for each in choices["granularity"] if each == "block")
                choices["granularity"] = kinds
            if choices["activation_scales"] == (True,):
                rounded = choices["activation_format"]
                choices["activation_format"] = tuple(e for e in rounded if e in STATIC)
            if all(choices.values()):
                found.append((format, choices))
    return found


def _sides(declared: Mapping[str, tuple[Any, ...]], usual: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of e4m3's blocks, which stand in `group_size` as well."""
    sizes = declared.get("group_size", usual)
    return tuple(B for B in usual if B in sizes) or tuple(B for B in sizes if B > 0)


def _rounding_beside(format: str) -> tuple[str | None, ...]:
    """The formats of activations that are used with packed weights of this one."""
    if format in INTEGERS:
        return (None, "int8", "e4m3")
    if format == "e4m3":
        return (None, "int8", "e4m3", "e4m3_block")
    return (None, "e4m3") if format in ("mxfp4", "nvfp4") else (None, "Q8_1")


@st.composite
def _about(
    draw: st.DrawFn,
    format: str,
    choices: Mapping[str, tuple[Any, ...]],
    orders: tuple[str, ...],
) -> Plan:
    """Everything about a format but sizes and contents."""
    integer = format in INTEGERS
    granularity, group_size = None, -1
    rounding = choices["activation_format"]
    if format == "e4m3":
        granularity = draw(choice(choices["granularity"]))
    if granularity != "block":
        rounding = tuple(each for each in rounding if each != "e4m3_block") or (None,)
    rounded = draw(choice(rounding))
    if integer:
        group_size = draw(choice(choices["group_size"]))
    elif granularity == "block":
        group_size = draw(choice(choices["narrow_block" if rounded == "e4m3_block" else "block"]))
    elif format != "e4m3":
        group_size = {"Q4_K": 256, "nvfp4": 16}.get(format, 32)
    has_scales = integer or format == "e4m3"
    with_g_idx = draw(choice(choices["g_idx"]))
    static = rounded in STATIC and draw(choice(choices["activation_scales"]))
    return {
        "format": format,
        "group_size": group_size,
        "granularity": granularity,
        "scale_dtype": draw(choice(choices["scale_dtype"])) if has_scales else None,
        "global": draw(choice(("expert", "row"))) if format == "nvfp4" else None,
        "g_idx": draw(choice(orders)) if with_g_idx else None,
        "g_idx_dtype": draw(choice(tuple(ID_DTYPES))) if with_g_idx else None,
        "padding": draw(choice(choices["padding"])),
        "activation_format": rounded,
        "activation_scales": static,
    }


@st.composite
def _beside(
    draw: st.DrawFn,
    about: Plan,
    alternative: tuple[Any, ...],
    chosen: list[tuple[str, dict[str, tuple[Any, ...]]]],
    orders: tuple[str, ...],
) -> Plan:
    """Everything about the down matrix, where gate_up is like this and rows are rounded alike."""
    rounded = about["activation_format"]
    possible = []
    for format, choices in chosen:
        fixed = {**choices, "activation_format": (rounded,)}
        if rounded == "e4m3_block":
            fixed["granularity"] = ("block",)
            others = tuple(B for B in choices["narrow_block"] if about["group_size"] != B)
            fixed["narrow_block"] = others or choices["narrow_block"]
        if choices["alternative"] == alternative and rounded in choices["activation_format"]:
            possible.append((format, fixed))
    kin = [each for each in possible if _family(each[0]) == _family(about["format"])]
    format, fixed = draw(choice(kin if draw(st.integers(0, 3)) else possible))
    drawn = draw(_about(format, fixed, orders))
    same = ("activation_format", "activation_scales", "padding")
    return {**drawn, **{name: about[name] for name in same}}


def _family(format: str) -> str:
    """Formats of one family are used side by side, and easily taken for each other."""
    if format in INTEGERS:
        return "integers"
    return "GGUF" if format.startswith("Q") else "floats"


def _changed(draw: st.DrawFn, about: Plan, changes: tuple[str, ...]) -> Plan:
    """Which part is another one in a second call, of those that the format has."""
    format = about["format"]
    has = {
        "scales": not format.startswith("Q"),
        "zeros": format == "uint4",
        "g_idx": about["g_idx"] is not None and about["group_size"] != -1,
        "global_scale": format == "nvfp4",
    }
    possible = tuple(name for name in changes if has.get(name, True))
    return {"changed": draw(choice(possible))} if possible else {}


def step_of(about: Plan) -> int:
    """D has to be a multiple of this: whole words, blocks and groups."""
    unit = UNIT[about["format"]]
    whole = about["format"] in INTEGERS and about["group_size"] != -1
    return math.lcm(unit, about["group_size"]) if whole else unit


def _sizes(draw: st.DrawFn, about: Plan, several_groups: bool, small: bool) -> Plan:
    """O and D: small, at the edge of a tile, or of a block where there are some."""
    if about["format"] == "e4m3":
        B = about["group_size"]
        edges = [B - 1, B, B + 1, 2 * B - 1] if 1 < B <= 64 else [127, 128, 129] if B > 1 else []
        size = st.one_of(st.integers(1, 9), st.sampled_from([*edges, 17, 24]))
        least = 2 if several_groups else 1
        rows, columns = max(least, draw(size)), max(least, draw(size))
        if not small and _long(draw, about):
            columns, rows = draw(choice(WIDE)), min(rows, 3)
        return {"rows": rows, "columns": columns}
    step = step_of(about)
    if not small and step <= 128 and _long(draw, about):
        columns = -(-draw(choice(WIDE)) // step) * step
        return {"rows": draw(choice((1, 2, 3))), "columns": columns}
    most = max(2, 96 // step) if step < 96 else 2 if small or step > 128 else 3
    columns = draw(st.integers(2 if several_groups else 1, most)) * step
    if about["padding"]:
        # A last word or block that is not full.
        columns -= draw(st.integers(0, UNIT[about["format"]] - 1))
    return {"rows": draw(choice((1, 2, 3, 5, 8, 16, 17, 31))), "columns": columns}


def _long(draw: st.DrawFn, about: Plan) -> bool:
    """Whether a row is a `WIDE` one: often where it is one group, of whatever length."""
    often = about["format"] in INTEGERS and about["group_size"] == -1
    return draw(st.integers(0, 2 if often else 7)) > (0 if often else 6)


def quantized_inputs(
    *,
    formats: tuple[str, ...] = FORMATS,
    partial: bool = False,
    least_tokens: int = 1,
    changes: tuple[str, ...] = (),
    large: bool = False,
    loads: tuple[str, ...] = ("uniform", "skewed", "duplicates", "half empty"),
    **fixed: tuple[Any, ...],
) -> Given:
    """Inputs of `experts_quantized` inside the declaration.

    Args:
        formats: to draw from; gate_up and down are of the same, or of two where `mixed` is drawn.
        partial: the groups of down lack columns, as those of a tensor-parallel slice do.
        least_tokens: smallest number of tokens.
        changes: of `CHANGES`, for what comes with a second call.
        large: now and then each expert has more weights than sixteen bits count.
        loads: how tokens spread over experts.
        **fixed: the values that a field of `UNIVERSE`, or of that of `experts`, may take here,
            inside the declared ones.
    """
    own = {name: values for name, values in fixed.items() if name in UNIVERSE}
    own = {"padding": (False,), "g_idx": (partial,), **NO_ROUNDING, **own}
    others: dict[str, Any] = {n: values for n, values in fixed.items() if n not in UNIVERSE}
    base = expert_inputs(least_tokens=least_tokens, loads=loads, **others)

    def plans(scope: Scope) -> Plans | None:
        chosen = _choices(scope, formats, own)
        drawn = base.plans(scope)
        if not chosen or drawn is None:
            return None

        def plan(draw: st.DrawFn) -> Plan:
            # Groups in full, but where the requirement is about those that are not.
            orders = ("uneven",) if partial else ("shuffled", "shuffled", "in order")
            format, choices = draw(choice(chosen))
            about = of_down = draw(_about(format, choices, orders))
            # A second call changes one part of both.
            if draw(choice(choices["mixed"])) and not partial and not changes:
                of_down = draw(_beside(about, choices["alternative"], chosen, orders))
            return {
                **_fitting(draw, draw(drawn), about, of_down, scope, large),
                **{name: value for name, value in about.items() if name != "format"},
                "quantized": about["format"],
                "down": None if of_down is about else of_down,
                "codes": "any",
                "scales": draw(choice(("usual", "usual", "zeros"))),
                "zeros": draw(choice(ZERO_POINTS)),
                "nan": not scope.capabilities.finite_only,
                "nan_codes": False,
                "partial": partial,
                **_changed(draw, about, changes),
            }

        return planned(plan)

    return Given(plans, build_quantized)


MOST_WEIGHTS = 20_000
"""Of all experts together, about."""

MOST_EXPERTS, MOST_TOKENS = 4, 14
"""What there are more of is mostly the matter of `experts`."""

MANY_EXPERTS = (9, 17, 33, 65)
"""With matrices that are as small as their format allows."""

ELSEWHERE = (5, 8, 13, 29)
"""Experts of other ranks: a map may be longer than any list of experts here."""


def _fitting(
    draw: st.DrawFn, plan: Plan, about: Plan, of_down: Plan, scope: Scope, large: bool
) -> Plan:
    """A plan of `experts` with sizes that the formats of both matrices can hold."""
    capabilities = scope.capabilities
    steps = [1 if each["padding"] else step_of(each) for each in (about, of_down)]
    of_h = math.lcm(steps[0], capabilities.hidden_multiple)
    of_i = math.lcm(steps[1], capabilities.intermediate_multiple)
    hidden, inner = (
        -(-min(size, 36) // of) * of
        for size, of in ((plan["hidden"], of_h), (plan["intermediate"], of_i))
    )
    if not scope.interpreted and max(steps) <= 128 and _long(draw, about):
        # One side longer than a tile, the other one short.
        wide = draw(choice(WIDE))
        if draw(st.booleans()):
            hidden, inner = -(-wide // of_h) * of_h, -(-min(inner, 8) // of_i) * of_i
        else:
            hidden, inner = -(-min(hidden, 8) // of_h) * of_h, -(-wide // of_i) * of_i
    few_tokens = MOST_TOKENS
    if large and not scope.interpreted and draw(st.integers(0, 9)) == 9:
        hidden, inner = (-(-LARGE // of) * of for of in (of_h, of_i))
        few_tokens = 3
    many = not scope.interpreted and draw(st.integers(0, 7)) == 7
    if many:
        hidden, inner = (-(-8 // of) * of for of in (of_h, of_i))
        few_tokens = MANY_EXPERTS[-1]
    if about["g_idx"] == "uneven" and inner == about["group_size"]:
        # A single group cannot lack what the others have.
        inner *= 2
    most = max(2, capabilities.min_experts, MOST_WEIGHTS // (3 * hidden * inner))
    elsewhere = plan["experts"] - plan["local"]
    wanted = min(plan["local"], max(MOST_EXPERTS, capabilities.min_experts))
    if many:
        wanted = min(draw(choice(MANY_EXPERTS)), (capabilities.max_experts or 2**16) - elsewhere)
    local = max(capabilities.min_experts, min(wanted, most))
    experts = local + elsewhere
    if plan["expert_map"] and draw(st.booleans()):
        most_experts = capabilities.max_experts or local + ELSEWHERE[-1]
        experts = max(experts, min(local + draw(choice(ELSEWHERE)), most_experts))
    return {
        **plan,
        "tokens": min(plan["tokens"], few_tokens),
        "hidden": hidden,
        "intermediate": inner,
        "local": local,
        "experts": experts,
        "top_k": min(plan["top_k"], experts),
        # A fixed scale of activations would lose rows that small weights are multiplied to.
        "weights": "signed" if plan["weights"] == "small" else plan["weights"],
        # Scales take the place of a spread of the weights.
        "spread": "even" if plan["spread"] == "huge" else plan["spread"],
        "experts_dtype": plan["dtype"],
    }


def build_quantized(plan: Plan) -> Inputs:
    """The arguments of `experts_quantized`, and what the packed matrices are made of."""
    given = build_experts({**plan, "intermediate": 1})
    content = Content(plan["seed"] ^ 0x0DD)
    H, I, E = plan["hidden"], plan["intermediate"], plan["local"]
    J = 2 * I if plan["config"]["gated"] else I
    dtype = torch_dtype(plan["dtype"])
    about = {
        **plan,
        "format": plan["quantized"],
        "experts": E,
        "few_digits": plan["dtype"] == "float64",
    }
    of_gate_up = {**about, "g_idx": "shuffled"} if plan["partial"] else about
    gate_up = drawn_tensor(content, of_gate_up, J, H)
    down = drawn_tensor(content, {**about, **(plan.get("down") or {})}, H, I)
    biases: dict[str, Any] = {
        f"{name}_bias": beside(content.normal(E, size), dtype, plan["dtype"])
        if plan["biases"] in ("both", name)
        else None
        for name, size in (("gate_up", J), ("down", H))
    }
    weights = {"gate_up": unpacked(gate_up), "down": unpacked(down)}
    given["x"] = _within_float16(given, weights, biases, plan)
    experts = QuantizedExperts(
        packed(gate_up),
        packed(down),
        **biases,
        is_k_full=not plan["partial"],
        activation_format=plan["activation_format"],
        activation_scales=_static_scales(content, plan, given, weights, biases),
    )
    inputs = {name: value for name, value in given.items() if name != "layouts"}
    inputs["experts"] = experts
    if plan["activation_format"] is not None:
        inputs["x"] = _away_from_edges(inputs)
    names = dict.fromkeys((path for path, _ in walk(inputs)), plan["layout"])
    return {
        **inputs,
        "drawn": {"gate_up": gate_up, "down": down},
        "unpacked": weights,
        "turn": plan["seed"] % 2,
        "changed": plan.get("changed"),
        "layouts": names,
    }


def _away_from_edges(inputs: Inputs) -> torch.Tensor:
    """x without the numbers that may be rounded to either of two codes: zeros in their place.

    Nobody can say which one is right, and each of them changes a whole row of the output.
    """
    x, experts, weights = inputs["x"].clone(), inputs["experts"], inputs["weights"].double()
    on_input = inputs["config"].weight_on == "input"
    factors = weights.unbind(1) if on_input else (torch.ones(len(x)).double(),)
    static = experts.activation_scales
    scales = [None] if static is None else static[:, 0].tolist()
    for factor in factors:
        for scale in scales:
            rows = x.double() * factor[:, None]
            block = experts.gate_up.group_size
            exact = torch.zeros_like(rows)
            value, variance = round_rows(rows, exact, experts.activation_format, block, scale)
            of_row = value.abs().amax(1, keepdim=True)
            x[variance.sqrt() > 1e-4 * of_row] = 0
    return x


def _stages(
    given: Inputs, weights: dict[str, torch.Tensor], biases: Drawn
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each expert makes of each token: before and after the activation, and at the end.

    Returns:
        [E, T, J], [E, T, I] and [E, T, H], float64, with a weight on the input at its greatest.
    """
    x = given["x"].double()
    if given["config"].weight_on == "input":
        x = x * given["weights"].double().nan_to_num().abs().amax(1, keepdim=True)
    pre = torch.einsum("th,ejh->etj", x, weights["gate_up"].double())
    if biases["gate_up_bias"] is not None:
        pre = pre + biases["gate_up_bias"].double()[:, None]
    gate, up = pre.chunk(2, -1) if given["config"].gated else (pre, torch.ones_like(pre))
    inner, factor = activation_parts(gate, up, given["config"])
    hidden = inner * factor
    out = torch.einsum("eti,ehi->eth", hidden, weights["down"].double())
    return pre, hidden, out


def _within_float16(
    given: Inputs, weights: dict[str, torch.Tensor], biases: Drawn, plan: Plan
) -> torch.Tensor:
    """x, smaller by a power of two where float16 could not hold what comes of it.

    What an overflow gives is asked elsewhere; here it would be the answer to nothing else.
    """
    if plan["dtype"] != "float16":
        return given["x"]
    stages = _stages(given, weights, biases)
    top_k = max(1, given["weights"].shape[1])
    share = given["weights"].double().nan_to_num().abs().amax().clamp_min(1.0) * top_k
    most = float(torch.stack([each.abs().amax() for each in stages]).amax() * share)
    return given["x"] if most < 2**14 else given["x"] * 2.0 ** -math.ceil(math.log2(most / 2**14))


def _static_scales(
    content: Content,
    plan: Plan,
    given: Inputs,
    weights: dict[str, torch.Tensor],
    biases: Drawn,
) -> torch.Tensor | None:
    """[E, 2], float32: near the scales of the rows that come, or so small that these are cut."""
    if not plan["activation_scales"]:
        return None
    hidden = _stages(given, weights, biases)[1]
    of_x = given["x"].double().abs().amax().expand(len(hidden))
    greatest = torch.stack([of_x, hidden.abs().amax((1, 2))], 1)
    most = 448.0 if plan["activation_format"] == "e4m3" else 127.0
    part = 2.0 ** (content.integers(-5, 3, len(hidden), 2).double() / 2)
    return (greatest * part / most).float()


def build_packed(plan: Plan) -> Inputs:
    """The packed tensor of a plan, what it is made of, and nothing else."""
    content = Content(plan["seed"])
    drawn = drawn_tensor(content, plan, plan["rows"], plan["columns"])
    inputs: Inputs = {"packed": packed(drawn)}
    names = dict.fromkeys((path for path, _ in walk(inputs)), plan["layout"])
    return {
        **inputs,
        "drawn": drawn,
        "turn": plan["seed"] % 2,
        "changed": plan.get("changed"),
        "layouts": names,
    }


def drawn_tensor(content: Content, plan: Plan, rows: int, columns: int) -> Drawn:
    """Codes, scales and the rest of E matrices of so many rows and columns.

    Args:
        content: where the numbers come from.
        plan: of `packed_inputs`.
        rows: O.
        columns: D, a multiple of `step_of` where there is no padding.
    """
    E, B, format = plan["experts"], plan["group_size"], plan["format"]
    O, D = rows, columns
    step = step_of(plan)
    D += -D % step
    if plan["padding"]:
        O += int(content.integers(0, 3))
        D += step * int(content.integers(int(rows == O and columns == D), 1 if step > 32 else 2))
    G = 1 if B == -1 else -(-D // B)
    drawn: Drawn = {
        "format": format,
        "shape": [E, rows, columns],
        "group_size": B,
        "codes": _codes(content, plan, E, O, D),
        "g_idx": _g_idx(content, plan, E, D, G),
    }
    if drawn["g_idx"] is not None:
        drawn["g_idx"] = drawn["g_idx"].to(ID_DTYPES[plan["g_idx_dtype"]])
    G_rows = O
    if format == "e4m3":
        G_rows = {"tensor": 1, "channel": O}.get(plan["granularity"], -(-O // max(B, 1)))
    drawn |= _scales(content, plan, E, G_rows, G, columns)
    if format == "uint4":
        drawn["zeros"] = _zero_points(content, plan, E, O, G)
    if plan["padding"]:
        _dirty(drawn, plan["nan"])
    return drawn


def _codes(content: Content, plan: Plan, E: int, O: int, D: int) -> torch.Tensor:
    """[E, O, D], int64: the bits as they are, from 0 to 15 or 255."""
    most = 2 ** BITS[plan["format"]] - 1
    kind = plan["codes"]
    if kind == "every":
        start = int(content.integers(0, most))
        codes = (torch.arange(E * O * D) + start).view(E, O, D) % (most + 1)
    elif kind == "one":
        codes = content.integers(0, most, E, 1, 1).expand(E, O, D).clone()
    else:
        codes = content.integers(0, most, E, O, D)
    if kind == "ends":
        middle = (most + 1) // 2
        ends = [0, 1, middle - 1, middle, middle + 1, most, most - 1, middle - 2]
        codes = torch.tensor(ends)[codes % len(ends)]
    if plan["format"] == "e4m3" and not plan["nan_codes"]:
        codes = torch.where((codes & 127) == 127, codes - 1, codes)
    return codes


def _g_idx(content: Content, plan: Plan, E: int, D: int, G: int) -> torch.Tensor | None:
    """[E, D], int64, the group of each column; other ones for each expert."""
    kind = plan["g_idx"]
    if kind is None:
        return None
    if kind == "uneven":
        return content.integers(0, G - 1, E, D)
    in_order = torch.arange(D) // (D // G)
    if kind == "in order":
        return in_order.expand(E, D).clone()
    return torch.stack([in_order[content.permutation(D)] for _ in range(E)])


def _zero_points(content: Content, plan: Plan, E: int, O: int, G: int) -> torch.Tensor:
    if plan["zeros"] == "middle":
        return torch.full((E, O, G), 8)
    zeros = content.integers(0, 15, E, O, G)
    return torch.tensor([0, 1, 15, 16])[zeros % 4] if plan["zeros"] == "ends" else zeros


ROOT_MEAN_SQUARE = {"uint4b8": 4.6, "uint8b128": 74.0, "uint4": 6.5, "e4m3": 120.0, "mxfp4": 3.0,
                    "nvfp4": 3.0, "Q8_0": 74.0, "Q8_1": 74.0, "Q4_K": 9.0}  # fmt: skip
"""Of random codes, with scales of 1."""


def _scales(content: Content, plan: Plan, E: int, rows: int, G: int, columns: int) -> Drawn:
    """Scales about such that a row of weights has a length of 1, each of a size of its own."""
    format, kind = plan["format"], plan["scales"]
    step = 1 / (ROOT_MEAN_SQUARE[format] * columns**0.5)
    sizes = step * content.uniform(-1, 1, E, rows, G).exp2()
    none = content.uniform(0, 1, E, rows, G) < (0.3 if kind == "zeros" else 0)
    if format == "mxfp4":
        exponents = 127 + sizes.log2().round().long()
        if kind == "tiny":
            exponents = content.integers(0, 4, E, rows, G)
        elif kind == "ends":
            exponents = torch.tensor(
                [0, 1, 126, 127, 128, 253, 254, 255 if plan["nan_codes"] else 2]
            )[content.integers(0, 7, E, rows, G)]
        # The least scale is no zero: only codes are.
        return {"scales": exponents.masked_fill(none, 0)}
    if format == "nvfp4":
        of_rows = rows if plan["global"] == "row" else 1
        bytes_ = content.integers(0x28, 0x47, E, rows, G)
        if kind == "tiny":
            bytes_ = content.integers(0, 9, E, rows, G)
        elif kind == "ends":
            bytes_ = torch.tensor([0, 1, 7, 8, 0x38, 0x7D, 0x7E, 0x7F if plan["nan_codes"] else 2])[
                content.integers(0, 7, E, rows, G)
            ]
        shared = step * content.uniform(-2, 2, E, of_rows).exp2()
        return {
            "scales": bytes_.masked_fill(none, 0),
            "global_scale": _held(shared, torch.float32, plan),
        }
    if format.startswith("Q"):
        halves = {"scales": sizes}
        if kind == "tiny":
            halves["scales"] = content.integers(1, 900, E, rows, G).double() * 2.0**-24
        if format == "Q4_K":
            small = content.integers(0, 63, 2, E, rows, G, 8)
            halves |= {"a": small[0], "m": small[1]}
            power = content.integers(-2, 1, E, rows, G)
            halves["scales"] = halves["scales"] / 32
            halves["minima"] = halves["scales"] * _powers(-2, 1)[power + 2]
        return {
            name: _held(t.masked_fill(none, 0), torch.float16, plan)
            if name in ("scales", "minima")
            else t
            for name, t in halves.items()
        }
    dtype = torch_dtype(plan["scale_dtype"])
    if kind == "tiny":
        least = torch.finfo(dtype).tiny if dtype is not torch.float16 else 2.0**-24
        sizes = content.integers(1, 9, E, rows, G) * least
    return {"scales": _held(sizes.masked_fill(none, 0), dtype, plan)}


def _held(numbers: torch.Tensor, dtype: torch.dtype, plan: Plan) -> torch.Tensor:
    """In the dtype that holds them; with few digits where weights have to be exact in float32."""
    if plan.get("few_digits"):
        numbers = numbers.bfloat16().double()
    return numbers.to(dtype)


def _dirty(drawn: Drawn, nan: bool) -> None:
    """The worst that there is in every place that `shape` leaves out."""
    _, O, D = drawn["shape"]
    codes, format = drawn["codes"], drawn["format"]
    codes[:, O:] = codes[:, :, D:] = 0x7F if format == "e4m3" else codes.max()
    B = drawn["group_size"]
    worst = math.nan if nan else 1e4
    of_rows, of_columns = O, drawn["scales"].shape[2] if B == -1 else -(-D // B)
    if format == "e4m3":
        # One scale for a block reaches into the padding, which takes nothing from it.
        of_rows = drawn["scales"].shape[1] if drawn["scales"].shape[1] == 1 else -(-O // max(B, 1))
    if drawn["g_idx"] is not None:
        of_columns = drawn["scales"].shape[2]
        drawn["g_idx"][:, D:] = -(2**20)
    for name in ("scales", "minima"):
        if name in drawn:
            bytes_ = {"mxfp4": 255, "nvfp4": 0x7F}.get(format, worst)
            drawn[name][:, of_rows:] = drawn[name][:, :, of_columns:] = bytes_
    if "global_scale" in drawn:
        drawn["global_scale"][:, max(O, 1) :] = worst
    if "zeros" in drawn:
        drawn["zeros"][:, of_rows:] = drawn["zeros"][:, :, of_columns:] = 16


def changed_part(drawn: Drawn, name: str) -> Drawn:
    """The same with one part that is another one, of the same dtype and shape and no larger.

    Groups stay complete: columns of one group are together those of another one.
    """
    part = drawn[name]
    if name == "codes":
        part = part.roll(1, 2).flip(1)
    elif name == "zeros":
        part = torch.where(part == 16, 15, part ^ 1)
    elif name == "g_idx":
        part = (part + 1) % drawn["scales"].shape[2]
    elif part.is_floating_point():
        part = part / 2
    else:
        # A byte that stands for a float: the next one below, and of the least the next one above.
        part = (part - 1).abs()
    return drawn | {name: part}


# What it stands for.


def meaning(drawn: Drawn, e4m3: torch.Tensor = E4M3, e8m0: torch.Tensor = POWERS) -> torch.Tensor:
    """The exact weights that codes and scales stand for: [E, O, D], float64.

    Args:
        drawn: codes, scales and the rest.
        e4m3: what each byte of float8_e4m3fn stands for.
        e8m0: what each byte of E8M0 stands for.
    """
    E, O, D = drawn["shape"]
    format, codes = drawn["format"], drawn["codes"][:, :O, :D]
    B = drawn["group_size"]
    groups = torch.zeros(D).long() if B == -1 else torch.arange(D) // B

    def of_columns(part: torch.Tensor) -> torch.Tensor:
        if drawn["g_idx"] is None:
            return part[:, :O, groups]
        return part[:, :O].gather(2, drawn["g_idx"][:, None, :D].long().expand(E, O, D))

    if format in INTEGERS:
        zeros = 2 ** (BITS[format] - 1) if format != "uint4" else of_columns(drawn["zeros"])
        return (codes - zeros) * of_columns(drawn["scales"].double())
    if format == "e4m3":
        scales = drawn["scales"].double()
        rows = torch.arange(O) // B if B != -1 else torch.arange(O).clamp(max=scales.shape[1] - 1)
        return e4m3[codes] * scales[:, rows][:, :, groups]
    if format in ("mxfp4", "nvfp4"):
        values = torch.where(codes >= 8, -E2M1[codes & 7], E2M1[codes & 7])
        if format == "mxfp4":
            return values * of_columns(e8m0[drawn["scales"]])
        shared = drawn["global_scale"].double()[:, :O, None]
        return values * of_columns(e4m3[drawn["scales"]]) * shared
    d = of_columns(drawn["scales"].double())
    if format in ("Q8_0", "Q8_1"):
        return d * torch.where(codes >= 128, codes - 256, codes)
    inside = torch.arange(D) % 256 // 32
    a = drawn["a"].flatten(2)[:, :O, torch.arange(D) // 256 * 8 + inside]
    m = drawn["m"].flatten(2)[:, :O, torch.arange(D) // 256 * 8 + inside]
    return d * a * codes - of_columns(drawn["minima"].double()) * m


def unpacked(drawn: Drawn) -> torch.Tensor:
    """The weights as they are given back: rounded once, to float32 or the scales' float64."""
    wide = drawn["scales"].dtype is torch.float64
    return meaning(drawn) if wide else meaning(drawn).float()


# Where the bits stand.


def packed(drawn: Drawn) -> QuantizedTensor:
    """The same in the bytes of its format."""
    format, codes = drawn["format"], drawn["codes"]
    parts: dict[str, Any] = {"scales": drawn["scales"]}
    if format in INTEGERS:
        bits = BITS[format]
        shifts = torch.arange(0, 32, bits)
        words = (codes.unflatten(2, (-1, 32 // bits)) << shifts).sum(3)
        parts["packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
    elif format == "e4m3":
        parts["packed"] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    elif format in ("mxfp4", "nvfp4"):
        parts["packed"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        bytes_ = drawn["scales"].to(torch.uint8)
        parts["scales"] = bytes_ if format == "mxfp4" else bytes_.view(torch.float8_e4m3fn)
    else:
        parts = {"packed": _gguf(drawn).flatten(2)}
    if format == "uint4":
        parts["zeros"] = drawn["zeros"].to(torch.uint8)
    return QuantizedTensor(
        format,
        g_idx=drawn["g_idx"],
        global_scale=drawn.get("global_scale"),
        group_size=drawn["group_size"],
        shape=tuple(drawn["shape"]),
        **parts,
    )


def _gguf(drawn: Drawn) -> torch.Tensor:
    """[E, O, blocks, bytes of a block], uint8."""
    format = drawn["format"]
    codes = drawn["codes"].unflatten(2, (-1, UNIT[format]))
    d = _bytes_of(drawn["scales"])
    if format != "Q4_K":
        signed = torch.where(codes >= 128, codes - 256, codes)
        parts = [d]
        if format == "Q8_1":
            total = drawn["scales"].float() * signed.sum(3)
            parts.append(_bytes_of(total.clamp(-6e4, 6e4).half()))
        return torch.cat([*parts, codes.to(torch.uint8)], 3)
    a, m = drawn["a"], drawn["m"]
    low = torch.cat([a[..., :4] + 64 * (a[..., 4:] // 16), m[..., :4] + 64 * (m[..., 4:] // 16)], 3)
    small = torch.cat([low, a[..., 4:] % 16 + 16 * (m[..., 4:] % 16)], 3)
    runs = codes.unflatten(3, (4, 2, 32))
    halves = (runs[..., 0, :] + 16 * runs[..., 1, :]).flatten(3)
    rest = torch.cat([small, halves], 3).to(torch.uint8)
    return torch.cat([d, _bytes_of(drawn["minima"]), rest], 3)


def _bytes_of(halves: torch.Tensor) -> torch.Tensor:
    """The two bytes of each float16, the lower one first: [..., 2], uint8."""
    bits = halves.contiguous().view(torch.int16).long() & 0xFFFF
    return torch.stack([bits % 256, bits // 256], -1).to(torch.uint8)
