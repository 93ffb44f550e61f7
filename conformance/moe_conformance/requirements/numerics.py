"""Requirements on every operation alike: memory, state, repetition, other tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import strategies as st

from moe_conformance.case import Case
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.inputs.expert_slicing import cut_for_a_rank, placed, sliced
from moe_conformance.inputs.experts import expert_inputs
from moe_conformance.inputs.given import Content, Given, Inputs, Plan, Plans, Scope
from moe_conformance.inputs.layer import layer_inputs
from moe_conformance.inputs.load_balancing import balance, biases, router_logits
from moe_conformance.inputs.routing import routing
from moe_conformance.inputs.slots import rows, scattered, slots
from moe_conformance.judge import Closeness, Violation, close, equal, equals, impostors
from moe_conformance.registry import ANY, MUST, requirement
from moe_conformance.requirements.experts import arguments, oracle_of, output_of, rule_of

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "route": ("logits", "config", "bias", "token_ids"),
    "balance_loss": ("logits", "expert_ids", "config", "padding_mask", "tokens_per_expert"),
    "z_loss": ("logits", "padding_mask"),
    "update_bias": ("bias", "tokens_per_expert", "rate", "centred"),
    "align": ("expert_ids", "block_size", "num_experts", "expert_map", "drop_invalid"),
    "dispatch": ("x", "expert_ids", "num_experts"),
    "combine": ("rows", "slots", "weights"),
    "experts": ("x", "experts", "weights", "expert_ids", "config", "expert_map"),
    "layer": ("x", "parameters", "config", "token_ids", "padding_mask", "training"),
    "slice_experts": ("experts", "start", "count"),
    "slice_tensor_parallel": ("experts", "world_size", "rank"),
    "place_experts": ("load", "num_physical", "num_ranks"),
}

GIVEN: dict[str, Given] = {
    "route": routing(contents=("normal",), largest=64),
    "balance_loss": balance(),
    "z_loss": router_logits(),
    "update_bias": biases(),
    "align": slots(),
    "dispatch": rows(),
    "combine": scattered(),
    # Ids that are not here have requirements of their own: EXPERT-07, 08, 17 and 18.
    "experts": expert_inputs(invalid_ids=(False,), expert_map=(False,)),
    "layer": layer_inputs(),
    "slice_experts": sliced(),
    "slice_tensor_parallel": cut_for_a_rank(),
    "place_experts": placed(),
}


def any_operation(*names: str) -> Given:
    """Inputs of one of these operations (all by default) that the target provides."""
    wanted = names or tuple(GIVEN)

    def plans(scope: Scope) -> Plans | None:
        possible = []
        for name in wanted:
            found = GIVEN[name].plans(scope) if name in scope.operations else None
            if found is not None:
                possible.append(found.map(functools.partial(_named, name)))
        return st.one_of(possible) if possible else None

    def build(plan: Plan) -> Inputs:
        rest = {name: value for name, value in plan.items() if name != "operation"}
        return {**GIVEN[plan["operation"]].build(rest), "operation": plan["operation"]}

    return Given(plans, build)


def _named(operation: str, plan: Plan) -> Plan:
    return {**plan, "operation": operation}


def _given(case: Case) -> dict[str, Any]:
    return {name: case[name] for name in ARGUMENTS[case["operation"]]}


def _none(what: str, found: list[str]) -> None:
    if found:
        raise Violation(f"{what}: {', '.join(found)}", None, None)


def _judge_none(case: Case, what: str, found: list[str]) -> None:
    case.note(f"operation {case['operation']}")
    case.judge(
        lambda answer: _none(f"{case['operation']} {what}", answer), found, [("one", ["one"])]
    )


@requirement(
    "NUM-01",
    MUST,
    ANY,
    "Results MUST be ordinary tensors on the device of the inputs.",
    reason="A result on another device, or of a lazy class, moves the cost and the error to "
    "whoever uses it next.",
    sources=("GPU MODE reference-kernels", "vLLM #16801"),
    given=any_operation(),
)
def results_are_plain_tensors_on_the_inputs_device(case: Case) -> None:
    """Type and device of every tensor in the result."""
    answer = case.call(case["operation"], **_given(case))
    host = ("padded_length", "2") if case["operation"] == "align" else ()
    wrong = [
        f"{path or 'result'} is a {kind} on {device}"
        for path, _, device, kind in answer.kinds
        if (device != case.scope.device and path not in host) or kind not in ("Tensor", "Parameter")
    ]
    _judge_none(case, "gave another kind of result", wrong)


@requirement(
    "NUM-02",
    MUST,
    ANY,
    "Inputs MUST NOT be changed.",
    reason="The caller goes on with them: router logits feed the loss, x feeds the residual.",
    sources=("transformers MoE jitter", "TensorCast topk_weights /=", "KernelBench zero_out"),
    given=any_operation(),
)
def inputs_are_left_alone(case: Case) -> None:
    """Every argument is compared with a copy made before the call."""
    answer = case.call(case["operation"], **_given(case))
    _judge_none(case, "changed its input", answer.changed)


@requirement(
    "NUM-03",
    MUST,
    ANY,
    "Outputs MUST NOT share memory with an input.",
    reason="The caller may write to either.",
    sources=("KernelBench result_reuse",),
    given=any_operation(),
)
def outputs_have_memory_of_their_own(case: Case) -> None:
    """Storages of arguments and results do not overlap."""
    answer = case.call(case["operation"], **_given(case))
    _judge_none(case, "gave memory of its input back", answer.shared)


@requirement(
    "NUM-04",
    MUST,
    ANY,
    "A call MUST NOT change torch's global state: default dtype, grad mode, threads, deterministic "
    "mode, the CPU's random state.",
    reason="What it changes shows up in somebody else's numbers.",
    sources=("conformance suites of array libraries", "transformers router jitter"),
    given=any_operation(),
)
def global_state_is_left_alone(case: Case) -> None:
    """The state is compared before and after the call."""
    answer = case.call(case["operation"], **_given(case))
    _judge_none(case, "changed the global", answer.state)


@requirement(
    "NUM-05",
    MUST,
    ANY,
    "A second call MUST NOT change the result of the first.",
    reason="A result that lives in a reused buffer is overwritten by the next call.",
    sources=("KernelBench result_reuse", "kernelgenbench ghost replay"),
    given=any_operation(),
)
def earlier_results_stay(case: Case) -> None:
    """The first result is read again after a second call with other data."""
    operation, given = case["operation"], _given(case)
    other = _other_data(given)
    first = case.planned(operation, **given)
    second = case.planned(operation, **other)
    answers = case.session([first, second])
    before, after = answers[0].outputs, answers[0].afterwards
    pairs = [(a, b) for (_, a), (_, b) in zip(walk(before), walk(after), strict=True)]

    def rule(found: list[torch.Tensor]) -> None:
        for (kept, _), now in zip(pairs, found, strict=True):
            equal(f"the first result of {operation}, read again", now, kept)

    case.note(f"operation {operation}")
    wrong = [torch.full_like(kept, 1) if kept.any() else kept + 1 for kept, _ in pairs]
    if not any(kept.numel() for kept, _ in pairs):
        wrong = []
    differs = any(not torch.equal(w, kept) for w, (kept, _) in zip(wrong, pairs, strict=False))
    case.judge(rule, [now for _, now in pairs], [("overwritten", wrong)] if differs else [])


def _other_data(given: dict[str, Any]) -> dict[str, Any]:
    """The same call with its first tensor turned upside down."""
    first, _ = next(walk(given))

    def turn(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if path != first:
            return tensor
        turned = tensor.flip(0)
        if not turned.is_floating_point():
            return turned
        # A load stays a load: nothing that is nowhere negative becomes so.
        return turned + 1 if bool((turned >= 0).all()) else -turned

    changed: dict[str, Any] = replace_tensors(given, turn)
    return changed


@requirement(
    "NUM-06",
    MUST,
    "experts",
    "A call on the same storage with other data MUST give the answer to the other data.",
    reason="A cache keyed by address, or a captured graph, answers the first call again.",
    sources=("KernelBench result_reuse", "kernelgenbench ghost replay", "SGLang #25852"),
    given=expert_inputs(bias=(False,), expert_map=(False,), invalid_ids=(False,), least_tokens=2),
)
def the_same_storage_with_other_data(case: Case) -> None:
    """The second call's arguments are written over the first one's."""
    x, ids = case["x"], case["expert_ids"]
    changed = {"x": x.flip(0) * 0.5, "expert_ids": ids.flip(0)}
    first = case.planned("experts", **arguments(case))
    second = case.planned("experts", **arguments(case, **changed), reuse=0)
    _, answer = case.session([first, second])
    output = output_of(answer, x)
    expected, stale = oracle_of(case, **changed), oracle_of(case).value
    wrong = [*impostors(expected.value), ("the answer to the first call", stale)]
    case.judge(rule_of(expected), output, wrong)


@requirement(
    "NUM-07",
    MUST,
    "experts",
    "Memory that was never written MUST NOT show up in the output.",
    reason="Fresh memory is often zero in a test and never in production.",
    sources=("SGLang #3339", "vllm-ascend #9992", "torchtitan #1237", "TE #3116"),
    given=expert_inputs(
        bias=(False,),
        expert_map=(False,),
        invalid_ids=(False,),
        loads=("uniform", "half empty", "one expert"),
    ),
)
def fresh_memory_never_shows(case: Case) -> None:
    """New tensors are filled with NaN before the target gets them."""
    answer = case.call("experts", **arguments(case), poison=True)
    expected = oracle_of(case)
    unwritten = torch.full_like(expected.value, torch.nan)
    case.judge(
        rule_of(expected),
        output_of(answer, case["x"]),
        [*impostors(expected.value), ("NaN", unwritten)],
    )


@requirement(
    "NUM-08",
    MUST,
    "experts",
    "A token that is NaN or infinite MUST NOT change the output of any other token.",
    reason="Padding rows hold anything; 0 times NaN is NaN, so masking by multiplication leaks.",
    sources=("SGLang #30895", "vLLM #50845"),
    given=Given(
        lambda scope: (
            None
            if scope.capabilities.finite_only
            else expert_inputs(
                bias=(False,), expert_map=(False,), invalid_ids=(False,), least_tokens=2
            ).plans(scope)
        ),
        expert_inputs().build,
    ),
)
def a_broken_token_breaks_no_other(case: Case) -> None:
    """The first token is NaN, the last infinite; those between are judged."""
    x = case["x"].clone()
    x[0] = torch.nan
    if len(x) > 2:
        x[-1] = torch.inf
    output = output_of(case.call("experts", **arguments(case, x=x)), x)
    rows = slice(1, -1 if len(x) > 2 else None)
    expected = oracle_of(case)

    def rule(answer: torch.Tensor) -> Closeness:
        return close(
            "output of the other tokens",
            answer,
            expected.value[rows],
            expected.sigma[rows],
            expected.freedom[rows],
        )

    wrong = torch.full_like(expected.value[rows], torch.nan)
    case.judge(rule, output[rows], [*impostors(expected.value[rows]), ("NaN", wrong)])


@requirement(
    "NUM-09",
    MUST,
    ANY,
    "A target that is declared deterministic MUST give the same bits for the same call.",
    reason="Sums whose order is decided by atomics differ from run to run, and with them the "
    "routing of the next layer.",
    sources=("transformers #43362", "vLLM #53440", "FlagGems #6492"),
    given=Given(
        lambda scope: any_operation().plans(scope) if scope.capabilities.deterministic else None,
        any_operation().build,
    ),
)
def the_same_call_gives_the_same_bits(case: Case) -> None:
    """Three calls in a row."""
    planned = case.planned(case["operation"], **_given(case))
    answers = case.session([planned] * 3)
    first = [t for _, t in walk(answers[0].outputs)]

    def rule(found: list[torch.Tensor]) -> None:
        for kept, again in zip(first, found, strict=True):
            equal(f"{case['operation']} called again", again, kept)

    case.note(f"operation {case['operation']}")
    wrong = [t + 1 if t.dtype is not torch.bool else ~t for t in first]
    shown = [("other bits", wrong)] if any(t.numel() for t in first) else []
    for answer in answers[1:]:
        case.judge(rule, [t for _, t in walk(answer.outputs)], shown)


@requirement(
    "NUM-10",
    MUST,
    "experts",
    "A target that is declared batch-invariant MUST give a token the same bits whatever else is in "
    "the batch.",
    reason="Otherwise a token's answer depends on who else was served in the same moment.",
    sources=("vLLM batch-invariant mode", "transformers #43362"),
    given=Given(
        lambda scope: (
            expert_inputs(expert_map=(False,), invalid_ids=(False,), least_tokens=2).plans(scope)
            if scope.capabilities.batch_invariant
            else None
        ),
        expert_inputs().build,
    ),
)
def a_token_alone_gets_the_same_bits(case: Case) -> None:
    """Each of the first tokens by itself against the whole batch."""
    whole = output_of(case.call("experts", **arguments(case)), case["x"])
    for token in range(min(3, len(whole))):
        one = {name: case[name][token : token + 1] for name in ("x", "weights", "expert_ids")}
        alone = output_of(case.call("experts", **arguments(case, **one)), one["x"])
        expected = whole[token : token + 1]
        case.judge(
            equals("output of a token alone", expected),
            alone,
            impostors(expected),
        )


@requirement(
    "NUM-11",
    MUST,
    "experts",
    "Any strides MUST give the right answer, or be refused.",
    reason="A slice of a larger buffer is what a caller has; a kernel that assumes a row pitch "
    "reads its neighbour.",
    sources=("SGLang #15432", "hyper_parallel x.view"),
    given=Given(
        lambda scope: (
            expert_inputs(bias=(False,), expert_map=(False,), invalid_ids=(False,)).plans(scope)
            if scope.capabilities.strides
            else None
        ),
        expert_inputs().build,
    ),
)
def strides_do_not_matter(case: Case) -> None:
    """Every argument in a layout of its own; what lies between its elements is poison."""
    kinds = ("transposed", "strided", "offset")
    paths = [path for path, _ in walk(arguments(case))]
    choice = Content(len(paths) + case["x"].numel()).integers(0, 2, len(paths)).tolist()
    layouts = {path: kinds[index] for path, index in zip(paths, choice, strict=True)}
    answer = case.call("experts", **arguments(case), layouts=layouts)
    expected = oracle_of(case)
    case.judge(rule_of(expected), output_of(answer, case["x"]), impostors(expected.value))


@requirement(
    "NUM-12",
    MUST,
    "experts",
    "Ids in int32 and in int64 MUST mean the same.",
    reason="Routers of one library give int32 and those of the other int64; read as the other "
    "width, every second id is 0.",
    sources=("DeepSeek-V2 moe_infer scatter_", "vLLM #16801"),
    given=Given(
        lambda scope: (
            expert_inputs(bias=(False,), expert_map=(False,), invalid_ids=(False,)).plans(scope)
            if len(scope.capabilities.id_dtypes) > 1
            else None
        ),
        expert_inputs().build,
    ),
)
def the_width_of_an_id_does_not_matter(case: Case) -> None:
    """The same call with either width."""
    narrow, wide = (
        output_of(
            case.call("experts", **arguments(case, expert_ids=case["expert_ids"].to(dtype))),
            case["x"],
        )
        for dtype in (torch.int32, torch.int64)
    )
    expected = oracle_of(case)
    case.judge(rule_of(expected), narrow, impostors(expected.value))
    case.judge(rule_of(expected), wide, impostors(expected.value))
