"""Requirements on backends: an implementation may go several ways, and none of them may show.

Which way a call goes depends on its sizes first of all. So the answers that other files ask for are
asked for again at sizes that are no example's.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from moe_conformance.case import Case
from moe_conformance.inputs.experts import expert_batches, expert_inputs
from moe_conformance.inputs.given import (
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    differentiable,
    either,
)
from moe_conformance.inputs.layer import layer_inputs
from moe_conformance.inputs.quantization import quantized_inputs
from moe_conformance.inputs.routing import BLOCKS, past
from moe_conformance.registry import MUST, requirement, requirement_named

LARGEST_INTERPRETED = 129
"""An interpreted kernel takes seconds for the next block."""


MOST_PAIRS = 4096
"""Beyond it the oracle, and not the target, takes the time of a case."""


def _large(scope: Scope, multiple: int = 1) -> st.SearchStrategy[int]:
    """A size on the end of a block or beside it, from 63 on, rounded up to the multiple."""
    most = LARGEST_INTERPRETED if scope.interpreted else BLOCKS[-1] + 1
    ends = [size for size in past(BLOCKS, 1, most) if size > 64]
    near = {size - off for size in ends for off in (0, 1, 2)}
    return st.sampled_from(sorted({-(-size // multiple) * multiple for size in near}))


def _few(multiple: int = 1) -> st.SearchStrategy[int]:
    return st.integers(1, max(1, 8 // multiple)).map(lambda n: n * multiple)


def _resized(given: Given, sizes: Callable[[Scope], st.SearchStrategy[Plan]]) -> Given:
    """The same inputs in other sizes."""

    def plans(scope: Scope) -> Plans | None:
        drawn = given.plans(scope)
        return None if drawn is None else st.tuples(drawn, sizes(scope)).map(_merged)

    return Given(plans, given.build)


def _merged(drawn: tuple[Plan, Plan]) -> Plan:
    plan, sizes = drawn
    plan = {**plan, **sizes}
    if "experts" in sizes and not plan["expert_map"]:
        plan["local"] = plan["experts"]
    if "local" in plan and plan["tokens"] * plan["top_k"] > MOST_PAIRS:
        plan["top_k"] = max(1, MOST_PAIRS // plan["tokens"])
    return plan


def _many_tokens(scope: Scope) -> st.SearchStrategy[Plan]:
    capabilities = scope.capabilities
    return st.fixed_dictionaries(
        {
            "tokens": _large(scope),
            "hidden": _few(capabilities.hidden_multiple),
            "intermediate": _few(capabilities.intermediate_multiple),
        }
    )


def _one_signed(scope: Scope) -> st.SearchStrategy[Plan]:
    """Many tokens, half of the time nowhere negative: their sums grow, and are off if narrow."""
    spreads = st.sampled_from(("even", "large", "positive", "positive"))
    return st.tuples(_many_tokens(scope), spreads).map(
        lambda drawn: {**drawn[0], "spread": drawn[1]}
    )


def _more_tokens(scope: Scope) -> st.SearchStrategy[Plan]:
    """Up to 257 of them: packed matrices are not small."""
    return st.fixed_dictionaries({"tokens": _large(scope).filter(lambda size: size <= 257)})


def _wide(scope: Scope) -> st.SearchStrategy[Plan]:
    """H or I is large, beside one, two or three tokens."""
    capabilities = scope.capabilities
    of_h, of_i = capabilities.hidden_multiple, capabilities.intermediate_multiple
    tokens = st.integers(1, 3)
    hidden = {"tokens": tokens, "hidden": _large(scope, of_h), "intermediate": _few(of_i)}
    inner = {"tokens": tokens, "hidden": _few(of_h), "intermediate": _large(scope, of_i)}
    return st.one_of(st.fixed_dictionaries(hidden), st.fixed_dictionaries(inner))


def _many_experts(scope: Scope) -> st.SearchStrategy[Plan]:
    """More experts than seven, eight or nine bits tell apart, all of them here."""
    capabilities = scope.capabilities
    most = min(capabilities.max_experts or 513, LARGEST_INTERPRETED if scope.interpreted else 513)
    numbers = [number for number in past(BLOCKS, 1, most) if number > 64] or [most]
    return st.tuples(
        st.sampled_from(numbers),
        st.fixed_dictionaries(
            {
                "tokens": st.integers(1, 9),
                "hidden": _few(capabilities.hidden_multiple),
                "intermediate": _few(capabilities.intermediate_multiple),
            }
        ),
    ).map(lambda drawn: {**drawn[1], "experts": drawn[0], "local": drawn[0]})


def _somewhere(scope: Scope) -> st.SearchStrategy[Plan]:
    """Many tokens; or many experts, of which few are here where there is a map."""
    elsewhere = st.tuples(_many_experts(scope), st.integers(1, 9)).map(
        lambda drawn: {**drawn[0], "local": drawn[1]}
    )
    # Twice: there is more about tokens that is seldom drawn together.
    tokens = (_many_tokens(scope), _many_tokens(scope))
    return st.one_of(*tokens, _many_experts(scope), elsewhere)


def _to_the_last(given: Given) -> Given:
    """With a pair that goes to the last expert."""

    def build(plan: Plan) -> Inputs:
        inputs = given.build(plan)
        ids, last = inputs["expert_ids"].clone(), plan["experts"] - 1
        if not bool((ids[0] == last).any()):
            ids[0, 0] = last
        return {**inputs, "expert_ids": ids}

    return Given(given.plans, build)


def _long(scope: Scope) -> st.SearchStrategy[Plan]:
    capabilities = scope.capabilities
    return st.fixed_dictionaries(
        {
            "sequences": st.integers(1, 2),
            "length": _large(scope),
            "hidden": _few(capabilities.hidden_multiple),
            "intermediate": _few(capabilities.intermediate_multiple),
        }
    )


def _asked_in_turn(given: Given, ids: tuple[str, ...]) -> Given:
    """The same inputs, and which of some requirements asks."""

    def plans(scope: Scope) -> Plans | None:
        drawn = given.plans(scope)
        return (
            None
            if drawn is None
            else st.tuples(drawn, st.sampled_from(ids)).map(
                lambda both: {**both[0], "judged_as": both[1]}
            )
        )

    return Given(plans, lambda plan: {**given.build(plan), "judged_as": plan["judged_as"]})


def _wide_layer(scope: Scope) -> st.SearchStrategy[Plan]:
    """H or I is large, that of the shared expert included, beside a few tokens."""
    capabilities = scope.capabilities
    of_h, of_i = capabilities.hidden_multiple, capabilities.intermediate_multiple
    few = {"sequences": st.integers(1, 2), "length": st.integers(1, 2)}
    large = _large(scope, of_i)
    hidden = {"hidden": _large(scope, of_h), "intermediate": _few(of_i), "shared_width": _few(of_i)}
    inner = {"hidden": _few(of_h), "intermediate": large, "shared_width": large}
    return st.one_of(st.fixed_dictionaries(few | hidden), st.fixed_dictionaries(few | inner))


LOADED = expert_inputs(
    loads=("uniform", "skewed", "one expert"), expert_map=(False,), invalid_ids=(False,)
)
"""Loads under which an expert gets more rows than a block. Ids that are not here have requirements
of their own."""


SORTED_OUT = either(
    expert_inputs(invalid_ids=(True,)),
    expert_inputs(expert_map=(True,)),
    expert_inputs(loads=("duplicates",), invalid_ids=(False,), expert_map=(False,)),
)
"""Ids that are not here, are elsewhere or are there twice."""


def _as(id: str, case: Case) -> None:
    """Ask what another requirement asks."""
    requirement_named(id).check(case)


@requirement(
    "BACKEND-01",
    MUST,
    "experts",
    "At every number of tokens the output MUST be that of the experts, whichever way that number "
    "is computed.",
    reason="A few tokens take another kernel than many, and the last tile of a large call is one "
    "that no small call has.",
    sources=("docs/spec/backends.md", "vLLM #45332", "aiter #4451"),
    given=_resized(LOADED, _many_tokens),
    references=("backends.choose_backend", "experts.experts"),
)
def the_number_of_tokens_does_not_show(case: Case) -> None:
    """63 to 1,025 tokens on the ends of blocks, narrow experts; judged as EXPERT-01 is."""
    _as("EXPERT-01", case)


@requirement(
    "BACKEND-02",
    MUST,
    "experts",
    "At every hidden and every intermediate size the output MUST be that of the experts.",
    reason="Sums over H and I are cut into tiles, and the last one is seldom full.",
    sources=("docs/spec/backends.md", "aiter #4041"),
    given=_resized(LOADED, _wide),
    references=("backends.choose_backend", "experts.experts"),
)
def the_width_does_not_show(case: Case) -> None:
    """H or I from 63 to 1,025 on the ends of blocks, few tokens; judged as EXPERT-01 is."""
    case.note("H is large", case["x"].shape[1] > 64)
    _as("EXPERT-01", case)


@requirement(
    "BACKEND-03",
    MUST,
    "experts",
    "At every size gradients MUST be those of the weighted sum.",
    reason="The gradient of a weight is a sum over all rows of an expert, in tiles of its own.",
    sources=("docs/spec/backends.md", "torchtitan #1237", "pytorch #193633"),
    given=_resized(
        differentiable("experts", LOADED),
        lambda scope: st.one_of(_one_signed(scope), _one_signed(scope), _wide(scope)),
    ),
    references=("backends.choose_backend", "experts.experts"),
)
def sizes_do_not_show_in_gradients(case: Case) -> None:
    """As in the two requirements before; judged as EXPERT-11 is."""
    _as("EXPERT-11", case)


@requirement(
    "BACKEND-04",
    MUST,
    "experts_batched",
    "At every capacity, hidden and intermediate size a batch's rows MUST be each expert's own.",
    reason="The capacity is the number of tokens of all ranks together: it is large, and most of "
    "it is empty.",
    sources=("docs/spec/backends.md", "vLLM #43547"),
    given=_resized(
        expert_batches(),
        lambda scope: st.tuples(
            st.one_of(_many_tokens(scope), _wide(scope)), st.integers(1, 3)
        ).map(lambda drawn: {**drawn[0], "local": drawn[1]}),
    ),
    references=("backends.workspace_shapes", "experts.experts_batched"),
)
def sizes_do_not_show_in_a_batch(case: Case) -> None:
    """One to three experts; judged as EXPERT-15 is."""
    _as("EXPERT-15", case)


@requirement(
    "BACKEND-08",
    MUST,
    "experts",
    "At every number of experts the output MUST be that of the experts.",
    reason="Ids are kept in few bits, and tables have the size of the models that were there.",
    sources=("docs/spec/backends.md", "SGLang #30895"),
    given=_to_the_last(_resized(LOADED, _many_experts)),
    references=("backends.choose_backend", "experts.experts"),
)
def the_number_of_experts_does_not_show(case: Case) -> None:
    """65 to 513 experts, of which most get nothing; judged as EXPERT-01 is."""
    last = int(case["expert_ids"].max()) if case["expert_ids"].numel() else 0
    case.note("an id beyond eight bits", last >= 2**8)
    _as("EXPERT-01", case)


@requirement(
    "BACKEND-10",
    MUST,
    "experts",
    "At every number of tokens and of experts a pair that is not here MUST contribute nothing, a "
    "map MUST lead to its rows, and equal ids MUST all be counted.",
    reason="Pairs are sorted out block by block, by tables as long as the experts: what holds in "
    "the first block, or for the first 256 experts, may not hold in the next.",
    sources=("docs/spec/backends.md", "SGLang #30895", "vLLM #42034"),
    given=_resized(SORTED_OUT, _somewhere),
    references=("backends.choose_backend", "experts.experts"),
    kinds=3,
)
def pairs_are_sorted_out_at_every_size(case: Case) -> None:
    """63 to 1,025 tokens, or 65 to 513 experts; judged as EXPERT-07 is."""
    _note_what_is_sorted_out(case)
    _as("EXPERT-07", case)


@requirement(
    "BACKEND-11",
    MUST,
    "experts",
    "At every number of tokens and of experts gradients MUST be those of the pairs that are here.",
    reason="The backward pass sorts pairs in blocks and tables of its own.",
    sources=("docs/spec/backends.md", "torchtitan #1237", "pytorch #193633"),
    given=_resized(differentiable("experts", SORTED_OUT), _somewhere),
    references=("backends.choose_backend", "experts.experts"),
    kinds=2,
)
def gradients_are_sorted_out_at_every_size(case: Case) -> None:
    """The sizes of BACKEND-10; judged as EXPERT-20 is."""
    _note_what_is_sorted_out(case)
    _as("EXPERT-20", case)


def _note_what_is_sorted_out(case: Case) -> None:
    mapped = case["expert_map"]
    case.note("many tokens and a map", mapped is not None and len(case["x"]) > 64)
    case.note("a map of many experts", mapped is not None and len(mapped) > 64)


@requirement(
    "BACKEND-05",
    MUST,
    "layer",
    "At every number of tokens the output of a layer MUST be that of its parts, and what it "
    "reports MUST be about all of them.",
    reason="A prompt of thousands of tokens takes another way than the next token, and is cut "
    "into chunks: counts, losses and weights are then those of the last.",
    sources=("docs/spec/backends.md", "vLLM #45332"),
    given=_asked_in_turn(
        _resized(layer_inputs(), _long),
        ("LAYER-01", "LAYER-01", "LAYER-02", "LAYER-06", "LAYER-11"),
    ),
    references=("backends.choose_backend", "layer.layer"),
    kinds=3,
)
def the_number_of_tokens_does_not_show_in_a_layer(case: Case) -> None:
    """One or two sequences of 63 to 1,025 tokens; judged as one of four others is."""
    case.note(f"as {case['judged_as']}")
    _as(case["judged_as"], case)


@requirement(
    "BACKEND-06",
    MUST,
    "layer",
    "At every hidden and every intermediate size the output of a layer MUST be that of its parts.",
    reason="The router's product is a sum over H of its own, and the shared expert has a width of "
    "its own.",
    sources=("docs/spec/backends.md", "aiter #4041"),
    given=_resized(layer_inputs(), _wide_layer),
    references=("backends.choose_backend", "layer.layer"),
)
def the_width_does_not_show_in_a_layer(case: Case) -> None:
    """H, or I of all experts, from 63 to 1,025; judged as LAYER-01 and LAYER-02 are."""
    _as("LAYER-01", case)
    _as("LAYER-02", case)


@requirement(
    "BACKEND-09",
    MUST,
    "experts_quantized",
    "At every number of tokens the output of packed experts MUST be that of the unpacked ones.",
    reason="A few tokens unpack in the product, many unpack first.",
    sources=("docs/spec/backends.md", "hanzo-engine quantised experts"),
    given=_resized(
        quantized_inputs(g_idx=(False, True)),
        _more_tokens,
    ),
    references=("backends.choose_backend", "quantized_experts.experts_quantized"),
)
def the_number_of_tokens_does_not_show_in_packed_experts(case: Case) -> None:
    """63 to 257 tokens on the ends of blocks; judged as QUANT-14 is."""
    _as("QUANT-14", case)


@requirement(
    "BACKEND-12",
    MUST,
    "experts_quantized",
    "At every number of tokens gradients of packed experts MUST be those of the unpacked ones.",
    reason="What unpacks first for many tokens has another way back than what unpacks in the "
    "product.",
    sources=("docs/spec/backends.md", "docs/spec/quantization.md"),
    given=_resized(
        differentiable("experts_quantized", quantized_inputs(g_idx=(False, True))), _more_tokens
    ),
    references=("backends.choose_backend", "quantized_experts.experts_quantized"),
    kinds=2,
)
def the_number_of_tokens_does_not_show_in_gradients_of_packed_experts(case: Case) -> None:
    """The sizes of BACKEND-09; judged as QUANT-24 is."""
    _as("QUANT-24", case)
