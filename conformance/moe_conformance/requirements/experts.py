"""Requirements on `experts` and `experts_batched`: what the chosen experts compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from moe_reference.experts import experts as reference_experts

from moe_conformance.case import Answer, Case, must_raise
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import Spread, experts_oracle, local_ids
from moe_conformance.gradients_oracle import expected_gradients as oracle_gradients
from moe_conformance.inputs.experts import expert_batches, expert_inputs
from moe_conformance.inputs.given import Content, Given, Scope, differentiable
from moe_conformance.judge import (
    Closeness,
    Violation,
    close,
    equal,
    equals,
    has_form,
    impostors,
    telling_scale,
    within_deviations,
)
from moe_conformance.precision import Arithmetic
from moe_conformance.registry import MUST, SHOULD, requirement

NAMES = ("x", "experts", "weights", "expert_ids", "config", "expert_map")


def arguments(case: Case, **changed: Any) -> dict[str, Any]:
    """The arguments of `experts`, with some of them replaced."""
    return {name: case[name] for name in NAMES} | changed


def output_of(answer: Answer, x: torch.Tensor) -> torch.Tensor:
    """The output, in the form that the contract gives it."""
    has_form("output", answer.outputs, tuple(x.shape), (x.dtype,))
    return answer.outputs


def oracle_of(case: Case, **changed: Any) -> Spread:
    """The expected output, spread as the target declares."""
    given = arguments(case, **changed)
    return experts_oracle(**given, arithmetic=arithmetic_of(case, given["x"]))


def value_of(case: Case, **changed: Any) -> torch.Tensor:
    """The output of other arguments in float64: what an impostor gives."""
    given = arguments(case, **changed)
    wide = {name: given[name].double() for name in ("x", "weights")}
    experts = replace_tensors(given["experts"], lambda _, tensor: tensor.double())
    return reference_experts(**given | wide | {"experts": experts})


def arithmetic_of(case: Case, x: torch.Tensor) -> Arithmetic:
    """What the target declares to round on inputs like x."""
    return Arithmetic.of(case.scope.capabilities, str(x.dtype).removeprefix("torch."))


def left_alone(operation: str) -> Callable[[list[str]], None]:
    """Hold the paths of what an operation changed or gave back against none."""

    def rule(found: list[str]) -> None:
        if found:
            raise Violation(f"{operation} changed or gave back: {', '.join(found)}")

    return rule


def rule_of(spread: Spread, what: str = "output") -> Callable[[torch.Tensor], Closeness]:
    """Hold an output against an expected spread."""
    return lambda answer: close(what, answer, spread.value, spread.sigma, spread.freedom)


def wrong_outputs(spread: Spread) -> Iterator[tuple[str, torch.Tensor]]:
    """Outputs that any check has to refuse."""
    return impostors(spread.value, telling_scale(spread.value, spread.sigma, spread.freedom))


def judge_output(
    case: Case, output: torch.Tensor, spread: Spread, others: dict[str, torch.Tensor] | None = None
) -> None:
    """Judge an output, with the usual impostors and some of the property's own."""

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        yield from wrong_outputs(spread)
        for name, value in (others or {}).items():
            if not torch.equal(value, spread.value):
                yield name, value

    _note(case)
    case.judge(rule_of(spread), output, wrong())


def _note(case: Case) -> None:
    local = local_ids(case["expert_ids"], len(case["experts"].gate_up), case["expert_map"])
    counts = torch.bincount(local[local >= 0], minlength=len(case["experts"].gate_up))
    case.note("an expert without tokens", bool((counts == 0).any()))
    case.note("one expert takes everything", int(counts.max()) == int(counts.sum()))
    case.note("an id that is not here", bool((local < 0).any()))
    case.note(f"dtype {str(case['x'].dtype).removeprefix('torch.')}")


def _lowest_dropped(case: Case) -> dict[str, torch.Tensor]:
    """The output without one token's lightest pair."""
    weights = case["weights"].clone()
    token = int(weights.abs().amin(-1).argmax())
    weights[token, int(weights[token].abs().argmin())] = 0
    return {"one token's lightest pair dropped": value_of(case, weights=weights)}


@requirement(
    "EXPERT-01",
    MUST,
    "experts",
    "The output MUST be the sum over a token's experts of weight times the expert's output, within "
    "the rounding that is declared.",
    reason="This is the layer. A fixed tolerance either misses a dropped token or accuses a legal "
    "order of summation, so the tolerance follows from the numbers of the case.",
    sources=("Shazeer et al. (arXiv 1701.06538)", "aiter #4451", "aiter #4041", "vLLM #45332"),
    given=expert_inputs(
        activation=("silu",), gated=(True,), bias=(False,), expert_map=(False,),
        invalid_ids=(False,), weight_on=("output",),
    ),
    references=("experts.experts",),
)  # fmt: skip
def the_output_is_the_weighted_sum_of_its_experts(case: Case) -> None:
    """Statistical comparison with float64; a dropped pair has to be noticed."""
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    judge_output(case, output, oracle_of(case), _lowest_dropped(case))


def _narrow(given: Given) -> Given:
    """Without float64, where silu(32) is not yet 32."""

    def plans(scope: Scope) -> Any:
        dtypes = tuple(dtype for dtype in scope.dtypes if dtype != "float64")
        return given.plans(dataclasses.replace(scope, dtypes=dtypes))

    return Given(plans, given.build)


@requirement(
    "EXPERT-02",
    MUST,
    "experts",
    "Where no operation rounds, the output MUST be exact.",
    reason="Inputs are chosen so that every order of summation gives the same bits: what differs "
    "is an index, a row, a weight or stale memory, and never rounding.",
    sources=("BLIS testsuite", "aiter #4451"),
    given=_narrow(
        expert_inputs(
            content="exact", activation=("silu", "gelu", "gelu_tanh", "relu"), bias=(False,),
            expert_map=(False,), invalid_ids=(False,), weight_on=("output",),
        )
    ),
    references=("experts.experts",),
)  # fmt: skip
def exact_inputs_give_exact_outputs(case: Case) -> None:
    """Equality to the last bit on small integers."""
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    value = oracle_of(case).value
    expected = ((value * 8).round() / 8).to(case["x"].dtype)
    _note(case)
    case.judge(lambda answer: equal("output", answer, expected), output, impostors(expected, 1.25))


def _only(dtypes: tuple[str, ...], given: Given, *, or_any: bool = True) -> Given:
    """The same inputs in some dtypes; where none of them is declared, in any, or none at all."""

    def plans(scope: Scope) -> Any:
        kept = tuple(dtype for dtype in scope.dtypes if dtype in dtypes)
        if not kept and not or_any:
            return None
        return given.plans(dataclasses.replace(scope, dtypes=kept or scope.dtypes))

    return Given(plans, given.build)


def _mixed(given: Given) -> Given:
    """The same inputs, for targets that take weights in another dtype than x."""
    return Given(
        lambda scope: given.plans(scope) if scope.capabilities.mixed_dtypes else None, given.build
    )


WIDE = ("float32", "float64")

_OTHER = {
    "silu": "gelu",
    "gelu": "gelu_tanh",
    "gelu_tanh": "gelu",
    "relu": "relu2",
    "relu2": "relu",
    "swigluoai": "silu",
    "swiglu_limit": "silu",
}


@requirement(
    "EXPERT-03",
    MUST,
    "experts",
    "The activation MUST be the one named: `gelu` is the erf form, `gelu_tanh` its approximation, "
    "`relu2` the square of relu.",
    reason="The two gelu differ by 4.7e-4 at most, enough to change a model's top tokens and small "
    "enough for any fixed tolerance.",
    sources=("vLLM #41574", "vLLM #56839"),
    given=_only(
        WIDE,
        expert_inputs(
            activation=("gelu", "gelu_tanh", "relu", "relu2"), bias=(False,), expert_map=(False,),
            invalid_ids=(False,), weight_on=("output",),
        ),
    ),
    references=("experts.experts",),
)  # fmt: skip
def the_activation_is_the_one_named(case: Case) -> None:
    """The impostor is the activation that it is most easily taken for."""
    config = case["config"]
    other = dataclasses.replace(config, activation=_OTHER[config.activation])
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    wrong = value_of(case, config=other)
    case.note(f"activation {config.activation}")
    judge_output(case, output, oracle_of(case), {other.activation: wrong})


@requirement(
    "EXPERT-04",
    MUST,
    "experts",
    "The first I rows of `gate_up` MUST be the gate, which is activated, and the last I rows up.",
    reason="Checkpoints and kernels disagree on the order; swapped halves load and run and answer "
    "nonsense.",
    sources=("SGLang #32430", "vLLM #42821", "nntrainer #4194"),
    given=expert_inputs(
        gated=(True,), activation=("silu",), bias=(False,), expert_map=(False,),
        invalid_ids=(False,), weight_on=("output",), loads=("uniform", "one expert"),
    ),
    references=("experts.experts",),
)  # fmt: skip
def the_gate_rows_come_first(case: Case) -> None:
    """The impostors are the halves exchanged, and the rows interleaved."""
    experts = case["experts"]
    gate, up = experts.gate_up.chunk(2, 1)
    swapped = dataclasses.replace(experts, gate_up=torch.cat([up, gate], 1))
    mixed = dataclasses.replace(experts, gate_up=torch.stack([gate, up], 2).flatten(1, 2))
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    others = {
        "gate and up exchanged": value_of(case, experts=swapped),
        "gate and up interleaved": value_of(case, experts=mixed),
    }
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-05",
    MUST,
    "experts",
    "With `weight_on` = input x MUST be multiplied by the weight before the first product, and the "
    "output MUST NOT be weighted again.",
    reason="For a non-linear expert the two are different functions.",
    sources=("SGLang #7889", "vLLM #43694", "llm-compressor #1907", "Llama 4 model code"),
    given=expert_inputs(
        weight_on=("input",), bias=(False,), expert_map=(False,), invalid_ids=(False,)
    ),
    references=("experts.experts",),
)
def a_weight_on_the_input_is_applied_once(case: Case) -> None:
    """The impostor is the weight on the output."""
    on_output = dataclasses.replace(case["config"], weight_on="output")
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    others = {"weight on the output": value_of(case, config=on_output)}
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-06",
    MUST,
    "experts",
    "Biases MUST be added to each product, and the output bias MUST be multiplied by the routing "
    "weight with the output.",
    reason="An output bias added once per token, or unweighted, is right only where the weights "
    "add up to 1.",
    sources=("gpt-oss model code", "torchtitan #2258"),
    given=expert_inputs(bias=(True,), expert_map=(False,), invalid_ids=(False,)),
    references=("experts.experts",),
)
def biases_are_part_of_the_expert(case: Case) -> None:
    """The impostors leave one of the biases out."""
    experts = case["experts"]
    none = {"gate_up_bias": None, "down_bias": None}
    others = {
        f"without {name}": oracle_of(
            case, experts=dataclasses.replace(experts, **{name: None})
        ).value
        for name in none
        if getattr(experts, name) is not None and bool(getattr(experts, name).any())
    }
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-07",
    MUST,
    "experts",
    "A pair whose id is below 0, at or above the number of experts, or mapped to -1 MUST "
    "contribute nothing, whatever its weight.",
    reason="Such ids mark padding and experts of other ranks; as an index -1 is the last expert, "
    "and NaN times 0 is NaN.",
    sources=("vLLM #42034", "aiter #4636", "SGLang #12701", "transformers #40545"),
    given=expert_inputs(invalid_ids=(True,), bias=(False,), loads=("uniform", "skewed")),
    references=("experts.experts",),
)
def ids_that_are_not_here_contribute_nothing(case: Case) -> None:
    """Weights of such pairs are NaN or infinite."""
    local = local_ids(case["expert_ids"], len(case["experts"].gate_up), case["expert_map"])
    gone = local < 0
    weights = _not_finite_where(gone, case["weights"])
    output = output_of(case.call("experts", **arguments(case, weights=weights)), case["x"])
    spread = oracle_of(case)
    ids = case["expert_ids"].long().where(~gone, local_last(case))
    others = {}
    if bool(gone.any()):
        others["counted as the last expert"] = value_of(case, expert_ids=ids)
    judge_output(case, output, spread, others)


def _not_finite_where(gone: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights with NaN and both infinities, token by token, where a pair is not here."""
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=weights.dtype)
    return torch.where(gone, kinds[torch.arange(len(weights)) % 3, None], weights)


def local_last(case: Case) -> torch.Tensor:
    """An id that is here: what -1 means to an index."""
    experts = len(case["experts"].gate_up)
    if case["expert_map"] is None:
        return torch.tensor(experts - 1)
    return (case["expert_map"].long() == experts - 1).nonzero()[0, 0]


@requirement(
    "EXPERT-08",
    MUST,
    "experts",
    "With `expert_map` ids MUST be taken as global and looked up in the map.",
    reason="Under expert parallelism the local row of an expert is not its global id.",
    sources=("SGLang #28170", "vLLM #19590", "vLLM #29642", "flashinfer #1469"),
    given=expert_inputs(expert_map=(True,), invalid_ids=(False,), bias=(False,)),
    references=("experts.experts",),
)
def the_expert_map_leads_to_local_rows(case: Case) -> None:
    """The impostor takes global ids as local rows."""
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    others = {"the map ignored": value_of(case, expert_map=None)}
    case.note("the map drops an expert", bool((case["expert_map"] < 0).any()))
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-09",
    MUST,
    "experts",
    "Two equal ids in a row MUST both be counted.",
    reason="A mask over experts instead of a list of pairs counts the expert once.",
    sources=("DeepSeek-V2 moe_infer: cnts.scatter_",),
    given=expert_inputs(
        least_k=2, loads=("duplicates",), bias=(False,), expert_map=(False,), invalid_ids=(False,)
    ),
    references=("experts.experts",),
)
def equal_ids_in_a_row_are_both_counted(case: Case) -> None:
    """The last id of every token is made equal to the first."""
    ids = case["expert_ids"].clone()
    ids[:, -1] = ids[:, 0]
    output = output_of(case.call("experts", **arguments(case, expert_ids=ids)), case["x"])
    case.inputs["expert_ids"] = ids
    once = case["weights"].clone()
    once[:, -1] = 0
    judge_output(case, output, oracle_of(case), {"counted once": value_of(case, weights=once)})


@requirement(
    "EXPERT-10",
    MUST,
    "experts",
    "Zero tokens MUST give an output of shape [0, H].",
    reason="A rank that got no tokens takes part in the step like any other.",
    sources=("DeepSeek-V2 moe_infer: new_empty(0)", "torchtitan #1166", "Megatron #4851"),
    given=expert_inputs(loads=("uniform",)),
    references=("experts.experts",),
)
def zero_tokens_give_zero_rows(case: Case) -> None:
    """The same call with the tokens cut away."""
    x = case["x"][:0]
    cut = {name: case[name][:0] for name in ("x", "weights", "expert_ids")}
    answer = case.call("experts", **arguments(case, **cut), layouts={})

    def rule(output: Any) -> None:
        has_form("output", output, tuple(x.shape), (x.dtype,))

    case.judge(rule, answer.outputs, [("a row", case["x"][:1])])


WRT = ("x", "weights", "experts.gate_up", "experts.down")


@requirement(
    "EXPERT-11",
    MUST,
    "experts",
    "Gradients of x, of the weights and of the experts' parameters MUST be those of the weighted "
    "sum.",
    reason="The forward pass can be right and the backward pass wrong: a weight applied twice, a "
    "bias left out, rows of an empty expert left as they were.",
    sources=("pytorch #154557", "pytorch #193633", "torchtitan #1237", "DeepSpeed #5259"),
    given=Given(
        lambda scope: (
            expert_inputs(expert_map=(False,), invalid_ids=(False,)).plans(scope)
            if "experts" in scope.capabilities.gradients
            else None
        ),
        expert_inputs().build,
    ),
    references=("experts.experts",),
    kinds=2,
)
def gradients_are_those_of_the_weighted_sum(case: Case) -> None:
    """Autograd on the target against autograd on the reference in float64."""
    given = arguments(case)
    judge_gradients(case, given, _gradients(case, given))


def judge_gradients(
    case: Case,
    given: dict[str, Any],
    found: dict[str, torch.Tensor | None],
    rows: dict[str, torch.Tensor] | None = None,
) -> None:
    """Hold gradients of `experts` on these arguments against those in float64.

    Args:
        case: the case.
        given: the arguments.
        found: the gradients by path.
        rows: by path, which rows to look at; all of them where there is none.
    """
    expected, bound = expected_gradients(case, given)
    for path, gradient in found.items():
        if gradient is None:
            raise Violation(f"gradient of {path}: expected a tensor, got None")
        has_form(
            f"gradient of {path}", gradient, tuple(expected[path].shape), (_dtype(given, path),)
        )

        # Past the largest number of its dtype a gradient is infinite by right.
        most = torch.finfo(gradient.dtype).max
        kept = expected[path].abs() + bound[path] < most
        if rows is not None:
            kept = kept & rows[path].view(-1, *[1] * (kept.ndim - 1))

        def rule(answer: torch.Tensor, path: str = path, kept: torch.Tensor = kept) -> Closeness:
            what, limit = f"gradient of {path}", bound[path][kept]
            return within_deviations(what, answer[kept], expected[path][kept], limit)

        if bool(kept.any()):
            case.judge(rule, gradient, _wrong_gradients(expected[path], bound[path], kept))


def _wrong_gradients(
    expected: torch.Tensor, bound: torch.Tensor, kept: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    yield "one and twice the bound added", expected + 2 * bound + 1
    if bool((expected.abs() > 2 * bound)[kept].any()):
        yield "all zeros", torch.zeros_like(expected)
        yield "twice as much", 2 * expected


def _gradients(
    case: Case, given: dict[str, Any], cotangent: torch.Tensor | None = None
) -> dict[str, torch.Tensor | None]:
    paths = list(WRT) + [
        f"experts.{name}" for name in ("gate_up_bias", "down_bias")
        if getattr(given["experts"], name) is not None
    ]  # fmt: skip
    cotangent = cotangent_of(given["x"]) if cotangent is None else cotangent
    call = case.planned("experts", wrt=paths, cotangents={"": cotangent}, **given)
    answer = case.session([call])[0]
    output_of(answer, given["x"])
    return answer.gradients


def cotangent_of(x: torch.Tensor) -> torch.Tensor:
    """What an output of x's shape and dtype is differentiated with.

    Nowhere negative where x is so: a sum of random signs stays small, and hides what it is summed
    in.
    """
    drawn = Content(x.numel()).normal(*x.shape).to(x.dtype)
    return drawn.abs() if bool((x >= 0).all()) else drawn


def _dtype(given: dict[str, Any], path: str) -> torch.dtype:
    return dict(walk(given))[path].dtype


def expected_gradients(
    case: Case, given: dict[str, Any], sums: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Float64 gradients, and how far a legal answer may be from them, with so many more sums."""
    return oracle_gradients(given, cotangent_of(given["x"]), arithmetic_of(case, given["x"]), sums)


@requirement(
    "EXPERT-12",
    MUST,
    "experts",
    "Where nothing was routed gradients MUST be zero, not None and not what was in memory.",
    reason="None desynchronises the ranks of a sharded optimiser; uninitialised gradients of an "
    "empty expert destroy it in one step.",
    sources=("Megatron #1877", "pytorch #154557", "TE #3484", "PaddleFormers #3010"),
    given=Given(
        lambda scope: (
            expert_inputs(loads=("half empty",), bias=(False,), expert_map=(False,),
                          invalid_ids=(False,)).plans(scope)
            if "experts" in scope.capabilities.gradients
            else None
        ),
        expert_inputs().build,
    ),
    references=("experts.experts",),
)  # fmt: skip
def nothing_routed_gives_zero_gradients(case: Case) -> None:
    """Every pair goes to expert 0, so all others must have gradients of exactly zero.

    Where the ids of a row have to differ, every token goes to the first K.
    """
    ids = torch.zeros_like(case["expert_ids"])
    if not case.scope.capabilities.repeated_ids:
        ids = ids + torch.arange(ids.shape[1]).to(ids)
    used = 1 + int(ids.max())
    found = _gradients(case, arguments(case, expert_ids=ids))
    if len(case["experts"].gate_up) == used:
        case.vacuous.append("one expert cannot be empty" if used == 1 else "no expert is empty")
    for path in ("experts.gate_up", "experts.down"):
        gradient = found[path]
        if gradient is None:
            raise Violation(f"gradient of {path}: expected a tensor, got None")
        idle = gradient[used:]
        rule = equals(f"gradient of {path}, from expert {used} on", torch.zeros_like(idle))
        case.judge(rule, idle, [("ones", torch.ones(max(1, len(idle)), *idle.shape[1:]))])


@requirement(
    "EXPERT-13",
    MUST,
    "experts",
    "`swigluoai` MUST clamp the gate above only and up on both sides, add 1 to up, and use alpha; "
    "`swiglu_limit` MUST clamp before silu, without either.",
    reason="The published clamps are not symmetric, and inputs within the limit cannot tell.",
    sources=("onnxruntime #28738", "SGLang #23776", "vLLM #26347", "prime-rl #2365"),
    given=_only(
        WIDE,
        expert_inputs(
            activation=("swigluoai", "swiglu_limit"), expert_map=(False,), invalid_ids=(False,),
            weight_on=("output",),
        ),
    ),
    references=("experts.experts",),
)  # fmt: skip
def clamped_activations_clamp_as_published(case: Case) -> None:
    """Pre-activations reach well beyond the limit on both sides."""
    experts = dataclasses.replace(case["experts"], gate_up=case["experts"].gate_up * 6)
    case.inputs["experts"] = experts
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    plain = dataclasses.replace(case["config"], activation="silu")
    others = {"silu": value_of(case, config=plain)}
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-14",
    MUST,
    "experts",
    "Multiplying all weights by 2 MUST double the output, to the last bit, where weights go on the "
    "output.",
    reason="A power of two passes through every rounding: what is not doubled was not weighted.",
    sources=("Megatron #1421",),
    # Not float16, whose subnormals begin where ordinary terms still are.
    given=_only(
        ("float32", "bfloat16", "float64"),
        expert_inputs(weight_on=("output",), expert_map=(False,), invalid_ids=(False,)),
        or_any=False,
    ),
    references=("experts.experts",),
)
def the_output_is_linear_in_the_weights(case: Case) -> None:
    """Needs no oracle: two answers of the target are compared with each other."""
    once = case.planned("experts", **arguments(case))
    twice = case.planned("experts", **arguments(case, weights=2 * case["weights"]))
    first, second = case.session([once, twice])
    output = output_of(first, case["x"])
    doubled = output_of(second, case["x"])
    # A subnormal loses bits that its double keeps.
    normal = output.abs() >= 2.0**-100
    expected = (2 * output).where(normal, doubled)
    case.judge(
        lambda answer: equal("output for twice the weights", answer, expected),
        doubled,
        [("not doubled", output.where(normal, doubled))] if bool(normal.any()) else [],
    )


@requirement(
    "EXPERT-15",
    MUST,
    "experts_batched",
    "Row i of expert e MUST be that expert's output for its input row, unweighted, for i below the "
    "expert's count; rows past the count MUST be zero.",
    reason="The batched format pads every expert to the same number of rows; what lies in the "
    "padding must neither be used nor come out.",
    sources=("vllm-ascend #9992", "SGLang #30895", "vLLM #43547"),
    given=expert_batches(),
    references=("experts.experts_batched",),
)
def batched_rows_are_each_experts_own(case: Case) -> None:
    """The padding rows of the input hold NaN; in the call before, every row is in use.

    Where all experts get all tokens, one batch is often expanded over them.
    """
    x, hidden = case["x"], case["x"].shape[-1]
    poisoned = _padded(case, torch.nan)
    counts = torch.full_like(case["tokens_per_expert"], x.shape[1])
    before = case.planned("experts_batched", **_batch(case, tokens_per_expert=counts))
    call = case.planned("experts_batched", **_batch(case, x=poisoned))
    answer = case.session([before, call])[1]

    def judge() -> None:
        pairs = _as_pairs(case)
        real = (pairs["expert_ids"] >= 0).view(-1)
        spread = experts_oracle(**pairs, arithmetic=arithmetic_of(case, x))

        def rule(rows: torch.Tensor) -> Closeness:
            idle = rows[~real].double()
            equal("rows past the count", idle, torch.zeros_like(idle))
            return close("output", rows, spread.value, spread.sigma, spread.freedom)

        case.judge(rule, output_of(answer, x).reshape(-1, hidden), wrong_outputs(spread))

    judge()
    case.note("an expert without rows", bool((case["tokens_per_expert"] == 0).any()))
    if len(x) > 1 and x.shape[1] % 2 and case.scope.capabilities.strides:
        case.note("one batch for all experts")
        case.inputs |= {"x": x[:1].expand(x.shape).clone(), "tokens_per_expert": counts}
        answer = case.call("experts_batched", **_batch(case), layouts={"x": "expanded"})
        judge()


def _batch(case: Case, **changed: Any) -> dict[str, Any]:
    names = ("x", "tokens_per_expert", "experts", "config")
    return {name: case[name] for name in names} | changed


def _padded(case: Case, value: float) -> torch.Tensor:
    """x with a value in all rows past the counts."""
    used = torch.arange(case["x"].shape[1]) < case["tokens_per_expert"][:, None]
    return case["x"].masked_fill(~used[..., None], value)


def _takes_nan(given: Given) -> Given:
    """The same inputs, for targets that take NaN."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


def _as_pairs(case: Case) -> dict[str, Any]:
    """The batch as arguments of `experts`: a pair of weight 1 per row, -1 past the counts."""
    x, counts = case["x"], case["tokens_per_expert"]
    rows = torch.arange(len(x))[:, None].expand(x.shape[:2])
    used = torch.arange(x.shape[1]) < counts[:, None]
    return {
        "x": x.reshape(-1, x.shape[-1]),
        "experts": case["experts"],
        "weights": torch.ones(x.shape[0] * x.shape[1], 1, dtype=_wide_dtype(x)),
        "expert_ids": rows.masked_fill(~used, -1).reshape(-1, 1),
        "config": dataclasses.replace(case["config"], weight_on="output"),
        "expert_map": None,
    }


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@requirement(
    "EXPERT-16",
    MUST,
    "experts",
    "Renaming the experts MUST NOT change the output.",
    reason="Which row an expert's weights stand in is a matter of storage; an implementation that "
    "mixes up a row and an id notices here.",
    sources=("SGLang #18213", "vllm-ascend #4793"),
    given=expert_inputs(
        bias=(False,), expert_map=(False,), invalid_ids=(False,), loads=("uniform", "skewed")
    ),
    references=("experts.experts",),
)
def renaming_the_experts_changes_nothing(case: Case) -> None:
    """Weights moved one row on, ids with them."""
    experts, ids = case["experts"], case["expert_ids"]
    count = len(experts.gate_up)
    moved = dataclasses.replace(
        experts, gate_up=experts.gate_up.roll(1, 0), down=experts.down.roll(1, 0)
    )
    renamed = ((ids + 1) % count).to(ids.dtype)
    output = output_of(
        case.call("experts", **arguments(case, experts=moved, expert_ids=renamed)), case["x"]
    )
    others = {}
    if count > 1:
        others["ids not renamed"] = value_of(case, expert_ids=(ids - 1) % count)
    judge_output(case, output, oracle_of(case), others)


@requirement(
    "EXPERT-17",
    MUST,
    "experts",
    "A token none of whose experts is here MUST get a row of zeros.",
    reason="Under expert parallelism that is the common case, and a kernel that writes only the "
    "rows it computes returns what was in memory for the others.",
    sources=(
        "vLLM fused_marlin_moe: output.zero_()",
        "vllm-ascend #9992",
        "DeepSeek-V2: empty_like",
    ),
    given=expert_inputs(invalid_ids=(True,), bias=(False,), least_tokens=2, loads=("uniform",)),
    references=("experts.experts",),
)
def a_token_without_experts_gets_zeros(case: Case) -> None:
    """Every other token is sent nowhere, and is no number; memory that is not written is NaN.

    It has a row in the call before, for one that keeps its buffers.
    """
    ids, x = case["expert_ids"].clone(), case["x"].clone()
    ids[::2] = -1
    if not case.scope.capabilities.finite_only:
        x[::4], x[2::4] = torch.nan, torch.inf
    before = case.planned("experts", **arguments(case))
    call = case.planned("experts", **arguments(case, x=x, expert_ids=ids), poison=True)
    answer = case.session([before, call])[1]
    expected = torch.zeros_like(case["x"][::2])
    rule = equals("output of tokens without experts", expected)
    wrong = [("NaN", torch.full_like(expected, torch.nan)), ("ones", expected + 1)]
    case.judge(rule, output_of(answer, case["x"])[::2], wrong)


@requirement(
    "EXPERT-18",
    MUST,
    "experts",
    "Where no token is routed at all, the output MUST still carry gradients, all of them zero.",
    reason="A rank without tokens takes part in the backward pass and the reduction after it; an "
    "output without a graph stops there, and the other ranks wait.",
    sources=("Megatron #4851", "DeepSpeed #5066", "PaddleFormers #3010", "hyper_parallel x * 0.0"),
    given=Given(
        lambda scope: (
            expert_inputs(invalid_ids=(True,), bias=(False,)).plans(scope)
            if "experts" in scope.capabilities.gradients
            else None
        ),
        expert_inputs().build,
    ),
    references=("experts.experts",),
)
def no_token_at_all_gives_zero_gradients(case: Case) -> None:
    """Every id is -1."""
    nowhere = torch.full_like(case["expert_ids"], -1)
    _judge_zero_gradients(case, arguments(case, expert_ids=nowhere))


def _judge_zero_gradients(case: Case, given: dict[str, Any]) -> None:
    for path, gradient in _gradients(case, given).items():
        if gradient is None:
            raise Violation(f"gradient of {path}: expected zeros, got None")
        zero = torch.zeros_like(gradient)
        if zero.numel():
            case.judge(equals(f"gradient of {path}", zero), gradient, [("ones", zero + 1)])


@requirement(
    "EXPERT-30",
    MUST,
    "experts",
    "Without tokens the output MUST carry gradients too, zeros for every expert.",
    reason="A loop over the tokens' experts is not entered then, and what it would have made has "
    "no graph: the optimizer of this rank skips what the others step.",
    sources=("hyper_parallel x * 0.0", "torchtitan #1166", "PaddleFormers #3010"),
    given=differentiable("experts", expert_inputs(loads=("uniform",), invalid_ids=(False,))),
    references=("experts.experts",),
)
def no_tokens_give_zero_gradients(case: Case) -> None:
    """The same call with the tokens cut away."""
    none = {name: case[name][:0] for name in ("x", "weights", "expert_ids")}
    _judge_zero_gradients(case, arguments(case, **none))


@requirement(
    "EXPERT-19",
    MUST,
    "experts",
    "An expert that is not finite MUST reach the tokens that were sent to it and no others.",
    reason="Absent pairs computed by some expert and multiplied by 0 are harmless until that "
    "expert overflows: 0 times infinity is NaN.",
    sources=("transformers batched_mm_experts_forward", "SGLang #12701"),
    given=Given(
        lambda scope: (
            None
            if scope.capabilities.finite_only
            else expert_inputs(bias=(False,), least_tokens=2).plans(scope)
        ),
        expert_inputs().build,
    ),
    references=("experts.experts",),
)
def a_broken_expert_breaks_only_its_own_tokens(case: Case) -> None:
    """The last expert's weights are NaN; tokens that were not sent to it are judged."""
    experts = case["experts"]
    last = len(experts.gate_up) - 1
    broken = dataclasses.replace(experts, down=experts.down.clone())
    broken.down[last] = torch.nan
    local = local_ids(case["expert_ids"], last + 1, case["expert_map"])
    spared = ~(local == last).any(-1)
    answer = case.call("experts", **arguments(case, experts=broken))
    output = output_of(answer, case["x"])[spared]
    spread = oracle_of(case)

    def rule(rows: torch.Tensor) -> Closeness:
        return close(
            "output of tokens sent elsewhere",
            rows,
            spread.value[spared],
            spread.sigma[spared],
            spread.freedom[spared],
        )

    wrong = torch.full_like(output, torch.nan)
    case.note("an id that is not here", bool((local[spared] < 0).any()))
    case.judge(rule, output, [("NaN", wrong)] if wrong.numel() else [])


@requirement(
    "EXPERT-32",
    MUST,
    "experts",
    "An expert or a token that is not finite MUST NOT reach the gradients of other experts and of "
    "tokens that have nothing to do with it.",
    reason="One overflow, multiplied by the zero of everybody else's mask, is NaN in every "
    "parameter, and the step is lost on all ranks and not on one.",
    sources=("transformers batched_mm_experts_forward", "SGLang #12701", "pytorch #193633"),
    given=_takes_nan(differentiable("experts", expert_inputs(least_tokens=2))),
    references=("experts.experts",),
)
def what_is_broken_stays_out_of_other_gradients(case: Case) -> None:
    """The last expert is NaN or infinite, and so is the first token; what is apart is judged."""
    given = arguments(case)
    experts, count = case["experts"], len(case["experts"].gate_up)
    kind = torch.nan if len(case["x"]) % 2 else torch.inf
    x, down = case["x"].clone(), experts.down.clone()
    x[0], down[-1] = kind, kind
    local = local_ids(case["expert_ids"], count, case["expert_map"])
    sound_T = ~(local == count - 1).any(-1)
    sound_T[0] = False
    sound_E = torch.ones(count, dtype=torch.bool)
    sound_E[-1] = False
    sound_E[local[0][local[0] >= 0]] = False
    case.note("a token apart", bool(sound_T.any()))
    case.note("an expert apart that has tokens", bool(sound_E[local[local >= 0]].any()))
    broken = given | {"x": x, "experts": dataclasses.replace(experts, down=down)}
    found = _gradients(case, broken, cotangent_of(case["x"]))
    kept = {path: sound_T if path in ("x", "weights") else sound_E for path in found}
    judge_gradients(case, given, found, kept)


@requirement(
    "EXPERT-20",
    MUST,
    "experts",
    "Gradients MUST be those of the pairs that are here; the weight of a pair that is not MUST get "
    "zero, whatever it is.",
    reason="On a rank that holds some of the experts most pairs are not here, and the backward "
    "pass is where a row too many, or a NaN times zero, ends up in everybody's parameters.",
    sources=("transformers #48687", "DeepSpeed #5259", "pytorch #160285"),
    given=differentiable("experts", expert_inputs(invalid_ids=(True,))),
    references=("experts.experts",),
)
def gradients_are_those_of_the_pairs_that_are_here(case: Case) -> None:
    """As EXPERT-11, where ids are not here and their weights no numbers."""
    local = local_ids(case["expert_ids"], len(case["experts"].gate_up), case["expert_map"])
    weights = _not_finite_where(local < 0, case["weights"])
    found = _gradients(case, arguments(case, weights=weights))
    case.note("a token that goes nowhere", bool((local < 0).all(1).any()))
    given = arguments(case, weights=case["weights"].masked_fill(local < 0, 0.0))
    judge_gradients(case, given, found)


@requirement(
    "EXPERT-21",
    SHOULD,
    "experts",
    "Arguments of the wrong shape or dtype, and a map that leads to a row that there is not, "
    "SHOULD raise `ValueError` or `TypeError`.",
    reason="A kernel reads whatever lies at the address that a wrong shape leads to.",
    sources=("docs/spec/operations.md", "SGLang #28170", "vLLM #16801"),
    given=expert_inputs(expert_map=(False,), invalid_ids=(False,), loads=("uniform",)),
    references=("experts.experts",),
    kinds=2,
)
def bad_arguments_of_experts_raise(case: Case) -> None:
    """One argument is wrong at a time."""
    good = arguments(case)
    x, weights, ids, experts = (good[n] for n in ("x", "weights", "expert_ids", "experts"))
    bad = {
        "x with a further dimension": {"x": x[None]},
        "x of whole numbers": {"x": torch.ones_like(x, dtype=torch.int64)},
        "x with a further column": {"x": torch.cat([x, x[:, :1]], 1)},
        "ids of a float dtype": {"expert_ids": ids.float()},
        "one row of ids too many": {"expert_ids": torch.cat([ids, ids[:1]])},
        "one column of ids too many": {"expert_ids": torch.cat([ids, ids[:, :1]], 1)},
        "one row of weights too many": {"weights": torch.cat([weights, weights[:1]])},
        "weights of whole numbers": {"weights": weights.long()},
        **{name: {"experts": each} for name, each in _bad_weights(experts).items()},
    }
    if case.scope.capabilities.alternatives("experts")[0].get("expert_map", (True,)) != (False,):
        rows = torch.arange(len(experts.down) + 1, dtype=ids.dtype)
        bad["a map to a row that there is not"] = {"expert_map": rows}
        bad["a map of a float dtype"] = {"expert_map": rows[:-1].double()}
    must_raise(case, "experts", good, {name: good | wrong for name, wrong in bad.items()})


def _bad_weights(experts: Any) -> dict[str, Any]:
    """Expert weights that do not fit each other."""

    def with_fields(**changed: torch.Tensor) -> Any:
        return dataclasses.replace(experts, **changed)

    gate_up, down = experts.gate_up, experts.down
    bias = gate_up.new_zeros(len(gate_up) + 1, gate_up.shape[1])
    return {
        "gate_up of one row more": with_fields(gate_up=torch.cat([gate_up, gate_up[:, :1]], 1)),
        "gate_up of one expert more": with_fields(gate_up=torch.cat([gate_up, gate_up[:1]])),
        "down of one column more": with_fields(down=torch.cat([down, down[..., :1]], 2)),
        "a bias of one expert more": with_fields(gate_up_bias=bias),
        "an output bias of one dimension": with_fields(down_bias=down.new_zeros(down.shape[1])),
    }


@requirement(
    "EXPERT-22",
    MUST,
    "experts_batched",
    "Gradients MUST be those of the rows in use, and zero for all others.",
    reason="What lies past the counts is anything, and summed into a parameter it is in every "
    "step that follows.",
    sources=("pytorch #154557", "pytorch #193633", "torchtitan #1237", "TE #3484"),
    given=differentiable("experts_batched", expert_batches()),
    references=("experts.experts_batched",),
)
def gradients_of_a_batch_are_those_of_its_rows(case: Case) -> None:
    """The padding rows are NaN; each row in use is a pair of weight 1."""
    x = case["x"]
    fields = [f for f, tensor in vars(case["experts"]).items() if tensor is not None]
    paths = ["x", *(f"experts.{field}" for field in fields)]
    given = _batch(case, x=_padded(case, torch.nan))
    call = case.planned("experts_batched", wrt=paths, cotangents={"": cotangent_of(x)}, **given)
    answer = case.session([call])[0]
    output_of(answer, x)
    found = dict(answer.gradients)
    pairs = _as_pairs(case)
    if found["x"] is not None:
        has_form("gradient of x", found["x"], tuple(x.shape), (x.dtype,))
        found["x"] = found["x"].reshape(pairs["x"].shape)
    case.note("an expert without rows", bool((case["tokens_per_expert"] == 0).any()))
    judge_gradients(case, pairs, found)


@requirement(
    "EXPERT-23",
    MUST,
    "experts_batched",
    "A call on the same storage with other data MUST give the answer to the other data, and leave "
    "the first answer as it was.",
    reason="The batched format lives in buffers that are made once and used for every step.",
    sources=("KernelBench result_reuse", "SGLang #30895", "SGLang #25852"),
    given=expert_batches(least_tokens=2),
    references=("experts.experts_batched",),
)
def a_batch_in_the_same_storage_is_another_batch(case: Case) -> None:
    """Rows and counts are turned round; the first answer is read again after the second."""
    x, counts = case["x"], case["tokens_per_expert"]
    changed = {"x": -x.flip(1), "tokens_per_expert": counts.flip(0)}
    first = case.planned("experts_batched", **_batch(case))
    second = case.planned("experts_batched", **_batch(case, **changed), reuse=0)
    answers = case.session([first, second])
    before, again = output_of(answers[0], x), answers[0].afterwards
    case.inputs |= changed
    spread = experts_oracle(**_as_pairs(case), arithmetic=arithmetic_of(case, x))

    def rule(outputs: tuple[torch.Tensor, torch.Tensor]) -> Closeness:
        rows, kept = outputs
        equal("the first answer, read again", kept, before)
        flat = rows.reshape(spread.value.shape)
        return close("the second answer", flat, spread.value, spread.sigma, spread.freedom)

    answer = output_of(answers[1], x)
    wrong = [(name, (value, again)) for name, value in wrong_outputs(spread)]
    case.judge(rule, (answer, again), [*wrong, ("written over", (answer, again + 1))])


@requirement(
    "EXPERT-24",
    MUST,
    "experts_batched",
    "Counts that are negative or more than C, and arguments of the wrong shape or dtype, MUST "
    "raise `ValueError` or `TypeError`.",
    reason="A count past C reads the rows of the next expert.",
    sources=("docs/spec/operations.md", "DeepSpeed #8155", "SGLang #3339"),
    given=expert_batches(),
    references=("experts.experts_batched",),
)
def bad_batches_raise(case: Case) -> None:
    """One argument is wrong at a time."""
    good = _batch(case)
    x, counts, experts = good["x"], good["tokens_per_expert"], good["experts"]
    more, fewer = counts.clone(), counts.clone()
    more[-1], fewer[0] = x.shape[1] + 1, -1
    bad = {
        "a count of more than C": {"tokens_per_expert": more},
        "a count below zero": {"tokens_per_expert": fewer},
        "one count too many": {"tokens_per_expert": torch.cat([counts, counts[:1]])},
        "counts of a float dtype": {"tokens_per_expert": counts.float()},
        "x with two dimensions": {"x": x[0]},
        "rows of one expert more": {"x": torch.cat([x, x[:1]])},
        "x with a further column": {"x": torch.cat([x, x[..., :1]], 2)},
        **{name: {"experts": each} for name, each in _bad_weights(experts).items()},
    }
    must_raise(case, "experts_batched", good, {name: good | wrong for name, wrong in bad.items()})


@requirement(
    "EXPERT-25",
    MUST,
    "experts_batched",
    "The inputs of a batch MUST NOT be changed, and its output MUST NOT share memory with them.",
    reason="Rows past the counts are free to use, and are the next call's rows in use.",
    sources=("KernelBench zero_out", "vllm-ascend #9992"),
    given=expert_batches(),
    references=("experts.experts_batched",),
)
def a_batch_is_left_alone(case: Case) -> None:
    """Every argument is compared with a copy made before the call."""
    answer = case.call("experts_batched", **_batch(case))
    case.judge(left_alone("experts_batched"), [*answer.changed, *answer.shared], [("x", ["x"])])


@requirement(
    "EXPERT-26",
    MUST,
    "experts_batched",
    "A batch without rows MUST give an output of shape [E, 0, H], and one whose counts are all "
    "zero MUST give zeros, both in x's dtype.",
    reason="A rank to which nothing was sent takes part in the step like any other.",
    sources=("vLLM #43547", "DeepSpeed #5066", "vllm-ascend #9992"),
    given=expert_batches(),
    references=("experts.experts_batched",),
)
def a_batch_of_nothing_gives_nothing(case: Case) -> None:
    """Rows that are not in use are NaN, and so is memory that is never written."""
    x, idle = case["x"], torch.zeros_like(case["tokens_per_expert"])
    case.inputs["tokens_per_expert"] = idle
    full = case.planned("experts_batched", poison=True, **_batch(case, x=_padded(case, torch.nan)))
    cut = case.planned("experts_batched", layouts={}, **_batch(case, x=x[:, :0]))
    answers = case.session([full, cut])
    output_of(answers[1], x[:, :0])
    zero = torch.zeros_like(x)
    rule = equals("output of a batch without rows in use", zero)
    case.judge(rule, output_of(answers[0], x), [("ones", zero + 1)])


@requirement(
    "EXPERT-27",
    MUST,
    "experts",
    "Expert weights MUST be taken in any float dtype, whatever that of x.",
    reason="Weights are kept in the dtype of the checkpoint and x in that of the step; read with "
    "the other's size, or computed in the narrower of the two, they are wrong.",
    sources=("vLLM #16801", "vLLM #50845", "DeepSeek-V3 model code: fp32 gate"),
    given=_mixed(expert_inputs(mixed=True)),
    references=("experts.experts",),
)
def expert_weights_have_a_dtype_of_their_own(case: Case) -> None:
    """Their values are ones that x's dtype has too: whether they are rounded to it is open."""
    output = output_of(case.call("experts", **arguments(case)), case["x"])
    case.note("another dtype than x", case["experts"].down.dtype is not case["x"].dtype)
    judge_output(case, output, oracle_of(case))


@requirement(
    "EXPERT-28",
    MUST,
    "experts_batched",
    "A batch MUST be computed with expert weights of any float dtype, whatever that of x.",
    reason="The batched path has kernels of its own, each made for one dtype.",
    sources=("vLLM #16801", "vLLM #50845"),
    given=_mixed(expert_batches(mixed=True)),
    references=("experts.experts_batched",),
)
def weights_of_a_batch_have_a_dtype_of_their_own(case: Case) -> None:
    """As EXPERT-27, on rows instead of pairs."""
    output = output_of(case.call("experts_batched", **_batch(case)), case["x"])
    spread = experts_oracle(**_as_pairs(case), arithmetic=arithmetic_of(case, case["x"]))
    case.note("another dtype than x", case["experts"].down.dtype is not case["x"].dtype)
    flat = output.reshape(spread.value.shape)
    case.judge(rule_of(spread), flat, wrong_outputs(spread))


@requirement(
    "EXPERT-31",
    MUST,
    "experts_batched",
    "A row in use that is NaN or infinite MUST NOT change any other row.",
    reason="The rows of an expert are one product: masked by multiplication, or scaled by their "
    "greatest, they are all what one of them is.",
    sources=("docs/spec/operations.md", "SGLang #30895", "vLLM #50845"),
    given=_takes_nan(expert_batches(least_tokens=2)),
    references=("experts.experts_batched",),
)
def a_broken_row_breaks_no_other(case: Case) -> None:
    """The first row of every other expert is NaN or infinite, and all others are judged."""
    x, counts = case["x"].clone(), case["tokens_per_expert"]
    x[::4, 0], x[2::4, 0] = torch.nan, torch.inf
    output = output_of(case.call("experts_batched", **_batch(case, x=x)), x)
    whole = experts_oracle(**_as_pairs(case), arithmetic=arithmetic_of(case, x))
    spoilt = (torch.arange(len(x)) % 2 == 0) & (counts > 0)
    broken = (torch.arange(x.shape[1]) == 0) & spoilt[:, None]
    kept = ~broken.reshape(-1)
    expected = Spread(whole.value[kept], whole.sigma[kept], whole.freedom[kept])
    case.note("an expert with several rows", bool((counts > 1).any()))
    wrong = torch.full_like(expected.value, torch.nan)
    case.judge(
        rule_of(expected, "output of the other rows"),
        output.reshape(whole.value.shape)[kept],
        [*wrong_outputs(expected), ("NaN", wrong)],
    )


@requirement(
    "EXPERT-29",
    MUST,
    "experts",
    "Arguments MUST NOT be changed where ids are not here or mapped, nor given back; neither MUST "
    "the gradient that comes in be changed.",
    reason="Ids, weights and the map are rewritten for a kernel, and the next layer or the "
    "backward pass reads them again.",
    sources=("KernelBench zero_out", "TensorCast topk_weights /=", "vllm-ascend #9992"),
    given=expert_inputs(),
    references=("experts.experts",),
)
def experts_leave_their_arguments_alone(case: Case) -> None:
    """Every argument is compared with a copy made before the call, and before the backward pass.

    With gradients and without, for what is written in place without them only.
    """
    case.note("a map", case["expert_map"] is not None)
    calls = [case.planned("experts", **arguments(case))]
    if "experts" in case.scope.capabilities.gradients:
        cotangents = {"": torch.ones_like(case["x"])}
        given = arguments(case)
        calls.append(case.planned("experts", **given, wrt=["x", "weights"], cotangents=cotangents))
    for call in calls:
        answer = case.session([call])[0]
        case.judge(left_alone("experts"), [*answer.changed, *answer.shared], [("x", ["x"])])
