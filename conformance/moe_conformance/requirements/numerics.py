"""Requirements on every operation alike: memory, state, repetition, other tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from moe_conformance.case import Answer, Case
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import Spread
from moe_conformance.inputs.expert_slicing import cut_for_a_rank, placed, sliced
from moe_conformance.inputs.experts import expert_batches, expert_inputs
from moe_conformance.inputs.given import (
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    choice,
    either,
    torch_dtype,
)
from moe_conformance.inputs.layer import layer_inputs
from moe_conformance.inputs.load_balancing import BATCH, balance, biases, router_logits
from moe_conformance.inputs.quantization import packed_inputs, quantized_inputs
from moe_conformance.inputs.routing import routing
from moe_conformance.inputs.slots import batched, capacities, rows, scattered, slots
from moe_conformance.judge import Closeness, Violation, equal, equals, impostors
from moe_conformance.registry import ANY, MUST, requirement
from moe_conformance.requirements.experts import (
    arguments,
    oracle_of,
    output_of,
    rule_of,
    wrong_outputs,
)
from moe_conformance.targets import Reference
from moe_conformance.worker import LAYOUTS

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "route": ("logits", "config", "bias", "token_ids"),
    "balance_loss": ("logits", "expert_ids", "config", "padding_mask", "tokens_per_expert"),
    "z_loss": ("logits", "padding_mask"),
    "update_bias": ("bias", "tokens_per_expert", "rate", "centred"),
    "align": ("expert_ids", "block_size", "num_experts", "expert_map", "drop_invalid"),
    "align_batched": ("tokens_per_expert", "max_tokens", "block_size"),
    "dispatch": ("x", "expert_ids", "num_experts"),
    "combine": ("rows", "slots", "weights"),
    "drop_to_capacity": ("weights", "expert_ids", "num_experts", "capacity", "policy"),
    "experts": ("x", "experts", "weights", "expert_ids", "config", "expert_map"),
    "experts_batched": ("x", "tokens_per_expert", "experts", "config"),
    "layer": ("x", "parameters", "config", "token_ids", "padding_mask", "training"),
    "slice_experts": ("experts", "start", "count"),
    "slice_tensor_parallel": ("experts", "world_size", "rank"),
    "place_experts": ("load", "num_physical", "num_ranks"),
    "dequantize": ("packed",),
    "experts_quantized": ("x", "experts", "weights", "expert_ids", "config", "expert_map"),
}

GIVEN: dict[str, Given] = {
    "route": routing(contents=("normal",), largest=64),
    "balance_loss": balance(),
    "z_loss": router_logits(),
    "update_bias": biases(),
    "align": slots(),
    "align_batched": batched(),
    "dispatch": rows(),
    "combine": scattered(),
    "drop_to_capacity": capacities(),
    # Ids that are not here have requirements of their own: EXPERT-07, 08, 17 and 18.
    "experts": expert_inputs(invalid_ids=(False,), expert_map=(False,)),
    "experts_batched": expert_batches(),
    "layer": layer_inputs(),
    "slice_experts": sliced(),
    "slice_tensor_parallel": cut_for_a_rank(),
    "place_experts": placed(),
    "dequantize": packed_inputs(),
    "experts_quantized": quantized_inputs(),
}

WITH_MORE_ARGUMENTS: dict[str, Given] = {
    **GIVEN,
    "route": either(routing(contents=("normal",), largest=64), routing(hashed=True, largest=64)),
    "balance_loss": either(balance(padding=True), balance(losses=BATCH, counts=True), balance()),
    "z_loss": either(router_logits(), router_logits(padding=True)),
    "experts": expert_inputs(invalid_ids=(False,)),
    "experts_quantized": either(
        quantized_inputs(),
        quantized_inputs(),
        quantized_inputs(activation_scales=(True,), activation_format=("int8", "e4m3")),
    ),
}
"""The same with masks, counts, maps, tables and fixed scales, for what is asked the same of a call
whatever arguments it has."""

KEPT = ("experts_batched", "dequantize", "experts_quantized")
"""Operations of which one requirement asks for the answer to other data in the same storage, and
that arguments and the first answer stay what they were: EXPERT-23 and 25, QUANT-11, QUANT-19."""

APART = ("route", "balance_loss", "z_loss", "update_bias", "experts", "drop_to_capacity", *KEPT)
"""Operations whose arguments and results have a requirement of their own, which asks more of them:
GATE-24, BALANCE-26, BALANCE-52, BALANCE-42, EXPERT-29, DISPATCH-44, and those of `KEPT`."""

ANSWERED = (*APART[:5], "align", "dispatch", "combine", "layer", *KEPT)
"""Operations of which another requirement asks for the answer to other data in the same storage:
GATE-23, BALANCE-50, 52 and 54, NUM-06, ALIGN-35, DISPATCH-42 and 43, LAYER-16, those of `KEPT`."""

FREE_ORDER = ("align", "align_batched", "dispatch")
"""Operations whose results stand in an order that is free unless it is declared."""

DIFFERENTIABLE: dict[str, tuple[str, ...]] = {
    "route": ("logits",),
    "balance_loss": ("logits",),
    "z_loss": ("logits",),
    "dispatch": ("x",),
    "combine": ("rows", "weights"),
    "experts": (
        "x",
        "weights",
        "experts.gate_up",
        "experts.down",
        "experts.gate_up_bias",
        "experts.down_bias",
    ),
    "experts_batched": (
        "x",
        "experts.gate_up",
        "experts.down",
        "experts.gate_up_bias",
        "experts.down_bias",
    ),
    "drop_to_capacity": ("weights",),
    "layer": (
        "x",
        "parameters.router",
        "parameters.router_bias",
        "parameters.experts.gate_up",
        "parameters.experts.down",
        "parameters.experts.gate_up_bias",
        "parameters.experts.down_bias",
        "parameters.shared.gate_up",
        "parameters.shared.down",
        "parameters.shared.gate_up_bias",
        "parameters.shared.down_bias",
        "parameters.shared_gate",
    ),
    "slice_experts": (
        "experts.gate_up",
        "experts.down",
        "experts.gate_up_bias",
        "experts.down_bias",
    ),
    "slice_tensor_parallel": (
        "experts.gate_up",
        "experts.down",
        "experts.gate_up_bias",
        "experts.down_bias",
    ),
    "experts_quantized": (
        "x",
        "weights",
        "experts.gate_up_bias",
        "experts.down_bias",
    ),
}
"""What the outputs of an operation are differentiated by, where the target declares gradients."""


GRADIENT_LAYOUTS = ("expanded", *LAYOUTS[1:])
"""Strides of the gradients that come in."""


def _without(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in GIVEN if name not in names)


def any_operation(*names: str, inputs: Mapping[str, Given] = GIVEN) -> Given:
    """Inputs of one of these operations (all by default) that the target provides."""
    wanted = names or tuple(inputs)

    def plans(scope: Scope) -> Plans | None:
        possible = []
        for name in wanted:
            found = inputs[name].plans(scope) if name in scope.operations else None
            if found is not None:
                possible.append(found.map(functools.partial(_named, name)))
        return st.one_of(possible) if possible else None

    def build(plan: Plan) -> Inputs:
        rest = {name: value for name, value in plan.items() if name != "operation"}
        return {**inputs[plan["operation"]].build(rest), "operation": plan["operation"]}

    return Given(plans, build)


def _named(operation: str, plan: Plan) -> Plan:
    return {**plan, "operation": operation}


def in_any_mode(given: Given) -> Given:
    """The same, some of it with gradients off: a path of its own has memory of its own."""

    def plans(scope: Scope) -> Plans | None:
        drawn = given.plans(scope)
        if drawn is None:
            return None
        return st.tuples(drawn, choice(("recording", "inference_mode", "no_grad"))).map(
            lambda pair: {**pair[0], "grad_mode": pair[1]}
        )

    def build(plan: Plan) -> Inputs:
        rest = {name: value for name, value in plan.items() if name != "grad_mode"}
        return {**given.build(rest), "grad_mode": plan["grad_mode"]}

    return Given(plans, build)


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
    "Results MUST be ordinary tensors on the device of the inputs, each element in a place of its "
    "own.",
    reason="A result on another device, of a lazy class, or with a stride of 0, moves the cost and "
    "the error to whoever uses it next.",
    sources=("GPU MODE reference-kernels", "vLLM #16801"),
    given=in_any_mode(any_operation()),
)
def results_are_plain_tensors_on_the_inputs_device(case: Case) -> None:
    """Type and device of every tensor in the result; one that is expanded cannot be written to."""
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
    "Inputs MUST NOT be changed, and neither MUST the gradient that comes in.",
    reason="The caller goes on with them: router logits feed the loss, x feeds the residual, whose "
    "gradient is the one that came in.",
    sources=("transformers MoE jitter", "TensorCast topk_weights /=", "KernelBench zero_out"),
    given=in_any_mode(any_operation(*_without(APART))),
    kinds=2,
)
def inputs_are_left_alone(case: Case) -> None:
    """Every argument is compared with a copy made before the call, and before the backward pass."""
    operation, given = case["operation"], _given(case)
    answer = case.call(operation, **given)
    _judge_none(case, "changed its input", answer.changed)
    recorded = case["grad_mode"] == "recording" and operation in DIFFERENTIABLE
    if recorded and operation in case.scope.capabilities.gradients:
        asked = {"wrt": _leaves(operation, given), "cotangents": _cotangents(answer.outputs)}
        _judge_none(case, "changed its input", case.call(operation, **given, **asked).changed)


@requirement(
    "NUM-03",
    MUST,
    ANY,
    "Outputs MUST NOT share memory with an input.",
    reason="The caller may write to either.",
    sources=("KernelBench result_reuse",),
    given=in_any_mode(any_operation(*_without(APART))),
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
    given=any_operation(*_without(("route",))),
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
    given=in_any_mode(any_operation(*_without(KEPT))),
)
def earlier_results_stay(case: Case) -> None:
    """The first result is read again after a second call with other data."""
    operation, given = case["operation"], _given(case)
    other = _other_data(operation, given)
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


TURNED: dict[str, tuple[str, ...]] = {
    "dispatch": ("x", "expert_ids"),
    "combine": ("rows", "weights"),
    "drop_to_capacity": ("weights", "expert_ids"),
    "experts": ("x", "weights", "expert_ids"),
    "experts_quantized": ("x", "weights", "expert_ids"),
}
"""Arguments that other data changes, where it is more than the first tensor."""


COUNTED = (
    ("align", "expert_ids"),
    ("align_batched", "tokens_per_expert"),
    ("balance_loss", "expert_ids"),
)
"""Arguments of which only the number of equal ones matters."""


def _other_data(
    operation: str, given: dict[str, Any], paths: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The same call with its data turned upside down, or these arguments of it.

    Ids that a loss is given stay the best of its logits: some take no others.
    """
    first, _ = next(walk(given))
    turned_paths = paths or TURNED.get(operation, (first,))

    def turn(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if path not in turned_paths:
            return tensor
        if not tensor.is_floating_point():
            turned = tensor.flip(tuple(range(tensor.ndim)))
            if (operation, path) in COUNTED:
                # Half of them alike, so that what is counted changes as well.
                turned[len(turned) // 2 :] = turned[:1]
            return turned
        turned = tensor.flip(0)
        # A load stays a load: nothing that is nowhere negative becomes so.
        return turned + 1 if bool((turned >= 0).all()) else -turned

    changed: dict[str, Any] = replace_tensors(given, turn)
    if operation == "balance_loss" and "expert_ids" not in turned_paths:
        best = changed["logits"].double().sort(dim=1, descending=True, stable=True).indices
        ids = changed["expert_ids"]
        changed["expert_ids"] = best[:, : ids.shape[1]].to(ids.dtype)
    return changed


@requirement(
    "NUM-06",
    MUST,
    "experts",
    "A call on the same storage with other data MUST give the answer to the other data, and leave "
    "the first answer as it was.",
    reason="A cache keyed by address, or a captured graph, answers the first call again.",
    sources=("KernelBench result_reuse", "kernelgenbench ghost replay", "SGLang #25852"),
    given=expert_inputs(bias=(False,), expert_map=(False,), invalid_ids=(False,)),
)
def the_same_storage_with_other_data(case: Case) -> None:
    """The second call's arguments are written over the first one's."""
    x, experts = case["x"], case["experts"]
    changed = {
        "x": x.flip(0) * 0.5,
        "expert_ids": case["expert_ids"].flip(0),
        "experts": replace(experts, gate_up=experts.gate_up.flip(0), down=-experts.down.flip(0)),
    }
    first = case.planned("experts", **arguments(case))
    second = case.planned("experts", **arguments(case, **changed), reuse=0)
    answers = case.session([first, second])
    before, again = output_of(answers[0], x), answers[0].afterwards
    expected, stale = oracle_of(case, **changed), oracle_of(case).value

    def rule(outputs: tuple[torch.Tensor, torch.Tensor]) -> Closeness:
        second, first = outputs
        equal("the first answer, read again", first, before)
        return rule_of(expected)(second)

    answer = output_of(answers[1], x)
    wrong = [*wrong_outputs(expected), ("the answer to the first call", stale)]
    case.judge(
        rule,
        (answer, again),
        [*((name, (value, again)) for name, value in wrong), ("written over", (answer, again + 1))],
    )


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
        [*wrong_outputs(expected), ("NaN", unwritten)],
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
    whole = oracle_of(case)
    expected = Spread(whole.value[rows], whole.sigma[rows], whole.freedom[rows])
    rule = rule_of(expected, "output of the other tokens")
    wrong = torch.full_like(expected.value, torch.nan)
    case.judge(rule, output[rows], [*wrong_outputs(expected), ("NaN", wrong)])


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
    """Every argument in a layout of its own; what lies between its elements is poison.

    In some cases all tokens are one, or weighed alike, and there is one row for all.
    """
    kinds = LAYOUTS[1:]
    paths = [path for path, _ in walk(arguments(case))]
    content = Content(len(paths) + case["x"].numel())
    choice = content.integers(0, len(kinds) - 1, len(paths)).tolist()
    layouts = {path: kinds[index] for path, index in zip(paths, choice, strict=True)}
    name = ("x", "weights", None, None)[int(content.integers(0, 3, 1))]
    if name is not None and len(case["x"]) > 1:
        case.inputs[name] = case[name][:1].expand(case[name].shape).clone()
        layouts[name] = "expanded"
        case.note("one row for all tokens")
    answer = case.call("experts", **arguments(case), layouts=layouts)
    expected = oracle_of(case)
    case.judge(rule_of(expected), output_of(answer, case["x"]), wrong_outputs(expected))


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
    case.judge(rule_of(expected), narrow, wrong_outputs(expected))
    case.judge(rule_of(expected), wide, wrong_outputs(expected))


OTHERS = _without(("experts",))
"""Operations that NUM-06 and NUM-07, which know the right answer, do not speak about."""


def _repeatable(*names: str, inputs: Mapping[str, Given] = GIVEN) -> Given:
    """Inputs of operations whose answers can be compared with each other."""

    def plans(scope: Scope) -> Plans | None:
        asked = [n for n in names if scope.capabilities.deterministic or n not in FREE_ORDER]
        return any_operation(*asked, inputs=inputs).plans(scope) if asked else None

    return Given(plans, any_operation(*names, inputs=inputs).build)


def _twice(*names: str) -> Given:
    """Two inputs of one operation, with sizes and configurations of their own."""
    one = _repeatable(*names)

    def plans(scope: Scope) -> Plans | None:
        possible = []
        for name in names:
            found = _repeatable(name).plans(scope)
            if found is not None:
                possible.append(st.tuples(found, found).map(functools.partial(_pair, name)))
        return st.one_of(possible) if possible else None

    def build(plan: Plan) -> Inputs:
        return {**one.build(plan["first"]), "other": one.build(plan["other"])}

    return Given(plans, build)


def _pair(name: str, drawn: tuple[Plan, Plan]) -> Plan:
    return {"operation": name, "first": drawn[0], "other": drawn[1]}


def _defined(operation: str, outputs: Any) -> list[torch.Tensor]:
    """The tensors of a result, without what is nobody's business."""
    found = [tensor for _, tensor in walk(outputs)]
    if operation not in ("align", "align_batched") or len(found) < 2:
        return found
    length = int(outputs[2])
    blocks = max(1, len(found[0]) // max(1, len(found[1])))
    return [found[0][:length], found[1][: length // blocks]]


def _alike(case: Case, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The same bits from a deterministic target; from another, rows far nearer than another's.

    Half a row's own size is far more than rounding and far less than other data.
    """
    operation = case["operation"]
    if len(found) != len(expected):
        raise Violation(f"{operation}: expected {len(expected)} results, got {len(found)}")
    for index, (now, before) in enumerate(zip(found, expected, strict=True)):
        what = f"result {index} of {operation}"
        if case.scope.capabilities.deterministic:
            equal(what, now, before)
        elif now.is_floating_point():
            _near(case, what, now, before)


def _near(case: Case, what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.shape != expected.shape:
        raise Violation(f"{what}: expected shape {list(expected.shape)}, got {list(actual.shape)}")
    equal(f"{what}, where it is finite", actual.isfinite(), expected.isfinite())
    width = expected.shape[-1] if expected.ndim else 1
    rows_now, rows_before = (
        t.double().nan_to_num(0.0, 0.0, 0.0).reshape(-1, max(1, width)) for t in (actual, expected)
    )
    sizes = rows_before.abs().sum(-1)
    # With renormalised weights the terms of an expert that no token chose cancel: all that its row
    # of the router's gradient holds is their rounding. They are K terms, times a probability below
    # 1 / K, each as large as one of an expert that was chosen, and rounded up to four times, in
    # either of two results.
    rounding = 8 * _coarsest(case) * (float(sizes.max()) if len(sizes) else 0.0)
    far = (rows_now - rows_before).abs().sum(-1) > (sizes / 2).clamp(min=rounding)
    if bool(far.any()):
        row = int(far.nonzero()[0])
        raise Violation(f"{what}: row {row} is that of other data", expected, actual)


def _coarsest(case: Case) -> float:
    """The machine epsilon of the least precise dtype that a call is given, or computes in."""
    declared = case.scope.capabilities
    names = [name for name in (declared.router_dtype, declared.experts_dtype) if name is not None]
    dtypes = {tensor.dtype for _, tensor in walk(_given(case)) if tensor.is_floating_point()}
    known = {*dtypes, *map(torch_dtype, names)}
    return max((torch.finfo(dtype).eps for dtype in known), default=0.0)


def _wrong(expected: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """`other` in the form of `expected`, or None where the two cannot be told apart."""
    if len(other) != len(expected):
        return None
    same = all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(other, expected, strict=True)
    )
    return None if same else other


def _with_a_turn(given: Given) -> Given:
    """The same, and a number that says which of a call's arguments is other data later."""

    def plans(scope: Scope) -> Plans | None:
        drawn = given.plans(scope)
        if drawn is None:
            return None
        # Many numbers divide 60: of the turns that a call has each comes about as often.
        return st.tuples(drawn, choice(tuple(range(60)))).map(
            lambda pair: {**pair[0], "turned": pair[1]}
        )

    def build(plan: Plan) -> Inputs:
        rest = {name: value for name, value in plan.items() if name != "turned"}
        return {**given.build(rest), "turned": plan.get("turned", 0)}

    return Given(plans, build)


SELDOM_GIVEN = (
    *("bias", "mask", "map", "table", "token_ids", "shared_gate"),
    *("tokens_per_expert", "activation_scales"),
)
"""How the paths of arguments end that few calls have. Where they are given they are turned twice as
often as others."""


def _turns(case: Case, operation: str, given: dict[str, Any]) -> list[tuple[str, ...]]:
    """The sets of arguments that are other data at once: each alone, and what belongs together.

    What is packed is not turned: QUANT-11 and QUANT-19 do it, one part at a time. Nor are the ids
    that a loss is given, where it may take none but the best of its logits.
    """
    paths = [path for path, _ in walk(given)]
    if any("ids" in each for each in case.scope.capabilities.alternatives("balance")):
        paths = [path for path in paths if (operation, path) != ("balance_loss", "expert_ids")]
    if operation in KEPT:
        packed = {each.rpartition(".")[0] for each in paths if each.endswith(".packed")}
        paths = [path for path in paths if path.rpartition(".")[0] not in packed]
    seldom = [path for path in paths if path.endswith(SELDOM_GIVEN)]
    alone: list[tuple[str, ...]] = [(path,) for path in (*paths, *seldom)]
    if operation in TURNED and operation not in ANSWERED:
        alone.append(TURNED[operation])
    return alone


@requirement(
    "NUM-13",
    MUST,
    ANY,
    "An operation that is called with other data, on the same storage or on its own, MUST answer "
    "the other data, also where a single argument is other data.",
    reason="Ids sorted once per address, a routing kept for the next layer or a captured graph "
    "whose inputs were not copied answer the first call again. An optimizer writes weights in "
    "place, a server its maps.",
    sources=("KernelBench result_reuse", "SGLang #25852", "vllm-ascend #4793", "flashinfer #5287"),
    given=_with_a_turn(_repeatable(*_without(("dequantize",)), inputs=WITH_MORE_ARGUMENTS)),
    kinds=4,
)
def other_data_in_the_same_storage(case: Case) -> None:
    """Other data in memory of its own, the first data, and the other data written over it."""
    operation, first = case["operation"], _given(case)
    turns = _turns(case, operation, first)
    turned = turns[case["turned"] % len(turns)]
    other = _other_data(operation, first, turned)
    answers = case.session(
        [
            case.planned(operation, **other),
            case.planned(operation, **first),
            case.planned(operation, **other, reuse=1),
        ]
    )
    expected, stale, found = (_defined(operation, answer.outputs) for answer in answers)
    case.note(f"operation {operation}, other {' and '.join(turned)}")
    wrong = _wrong(expected, stale)
    shown = [] if wrong is None else [("the answer to the first data", wrong)]
    case.judge(lambda answer: _alike(case, answer, expected), found, shown)
    by_weight = first.get("policy") == "probs"
    if operation not in CHOOSING and not by_weight and _is_alike(case, stale, expected):
        _may_be_alike(case, first, other, turned)


def _is_alike(case: Case, found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    try:
        _alike(case, found, expected)
    except Violation:
        return False
    return True


CHOOSING = ("route", "layer", "place_experts")
"""Operations that choose: where rounding or the target decides between equals, other data may get
equal answers, as it may where the largest weights stay. GATE-23 and LAYER-16 know the right ones.
"""


def _may_be_alike(
    case: Case, first: dict[str, Any], other: dict[str, Any], turned: tuple[str, ...]
) -> None:
    """Two answers that are alike have to be so by the definition, up to rounding.

    What is kept for a call's form, as a captured graph does it, answers every call of the form
    with the data of the first: no comparison of its answers with each other tells.
    """
    operation = case["operation"]
    define = getattr(Reference(), operation)
    ours, others = (_defined(operation, define(**given)) for given in (first, other))
    for index, (one, another) in enumerate(zip(ours, others, strict=True)):
        if _are_apart(case, one, another):
            raise Violation(
                f"result {index} of {operation}: other {' and '.join(turned)} got the answer to "
                "the first data",
                another,
                one,
            )


def _are_apart(case: Case, one: torch.Tensor, another: torch.Tensor) -> bool:
    """Whether two answers of the definition are further apart than a target can round."""
    if one.shape != another.shape:
        return True
    if not one.is_floating_point():
        # Where the order is free, what stands there is not.
        return not torch.equal(one.flatten().sort().values, another.flatten().sort().values)
    if one.ndim == 0 and bool(one.isfinite() & another.isfinite()):
        # A loss: terms of one sign, of which nothing cancels. In the worst order a sum of n is
        # rounded n times, a term 8 times before that (score, sum, quotient, logarithm, square),
        # each by half of epsilon, in either of two answers.
        roundings = sum(t.numel() for _, t in walk(_given(case)) if t.is_floating_point()) + 8
        epsilon = max(_coarsest(case), torch.finfo(one.dtype).eps)
        largest = max(abs(float(one)), abs(float(another)))
        return abs(float(one) - float(another)) > roundings * epsilon * largest
    try:
        _near(case, "", one, another)
    except Violation:
        return True
    return False


@requirement(
    "NUM-14",
    MUST,
    ANY,
    "No operation's result MUST hold memory that was never written.",
    reason="Fresh memory is often zero in a test and never in production.",
    sources=("SGLang #3339", "vllm-ascend #9992", "torchtitan #1237"),
    given=_repeatable(*OTHERS),
)
def fresh_memory_shows_in_no_result(case: Case) -> None:
    """The same call twice; in the second, new tensors are filled with NaN and huge integers."""
    operation, given = case["operation"], _given(case)
    plain, poisoned = case.session(
        [case.planned(operation, **given), case.planned(operation, **given, poison=True)]
    )
    expected = _defined(operation, plain.outputs)
    case.note(f"operation {operation}")
    spoilt = [_spoilt(tensor) for tensor in expected]
    wrong = _wrong(expected, spoilt)

    def rule(answer: list[torch.Tensor]) -> None:
        for index, (now, before) in enumerate(zip(answer, expected, strict=True)):
            what = f"result {index} of {operation} with fresh memory filled"
            if now.is_floating_point():
                # Filling memory may bring another, deterministic kernel with other rounding.
                _near(case, what, now, before)
            elif case.scope.capabilities.deterministic:
                equal(what, now, before)

    case.judge(
        rule,
        _defined(operation, poisoned.outputs),
        [] if wrong is None else [("memory that was never written", wrong)],
    )


def _spoilt(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.full_like(tensor, torch.nan)
    return tensor if tensor.dtype is torch.bool else torch.full_like(tensor, 2**30)


@requirement(
    "NUM-15",
    MUST,
    ANY,
    "An answer MUST NOT depend on the calls that were made before.",
    reason="A workspace that is kept, a table made for the first size, a configuration that is "
    "read once: right in every test of a single call.",
    sources=("SGLang #25852", "vLLM #45496", "kernelgenbench ghost replay"),
    given=_twice(*GIVEN),
)
def calls_leave_no_trace(case: Case) -> None:
    """A call, one with other sizes and another configuration, and the first call again."""
    operation, given = case["operation"], _given(case)
    other = {name: case["other"][name] for name in ARGUMENTS[operation]}
    answers = case.session(
        [
            case.planned(operation, **given),
            case.planned(operation, **other, layouts=dict(case["other"].get("layouts") or {})),
            case.planned(operation, **given),
        ]
    )
    expected, between, again = (_defined(operation, answer.outputs) for answer in answers)
    case.note(f"operation {operation}")
    wrong = _wrong(expected, between) or _wrong(expected, [t + 1 for t in expected])
    shown = [] if wrong is None else [("another call's answer", wrong)]
    case.judge(lambda answer: _alike(case, answer, expected), again, shown)


@requirement(
    "NUM-16",
    MUST,
    ANY,
    "Gradients MUST NOT depend on the calls that were made before.",
    reason="A backward that adds to a buffer, or reads what the last forward left in one, is right "
    "in the first step only.",
    sources=("torchtitan #1237", "ScatterMoE"),
    given=Given(
        lambda scope: _repeatable(
            *(name for name in DIFFERENTIABLE if name in scope.capabilities.gradients)
        ).plans(scope),
        _repeatable(*DIFFERENTIABLE).build,
    ),
)
def gradients_start_anew(case: Case) -> None:
    """The gradients of a call, of one with other data, and of the first again."""
    operation, given = case["operation"], _given(case)
    wrt = _leaves(operation, given)
    cotangents = _cotangents(case.call(operation, **given).outputs)
    other = _other_data(operation, given)
    planned = [
        case.planned(operation, **arguments, wrt=wrt, cotangents=cotangents)
        for arguments in (given, other, given)
    ]
    first, _, again = case.session(planned)
    # Whether a gradient may be None is what others say.
    at_first = {path: g for path, g in first.gradients.items() if g is not None}
    anew = {path: g for path, g in again.gradients.items() if g is not None}
    for path in at_first.keys() - anew.keys():
        raise Violation(f"gradient of {path}, taken again: expected a tensor, got None")
    expected, found = list(at_first.values()), [anew[path] for path in at_first]
    case.note(f"operation {operation}")

    def rule(gradients: list[torch.Tensor]) -> None:
        for path, now, before in zip(at_first, gradients, expected, strict=True):
            _near(case, f"gradient of {path}, taken again", now, before)

    wrong = _wrong(expected, [2 * g for g in expected])
    case.judge(rule, found, [] if wrong is None else [("added up", wrong)])


def _differentiable_operations() -> Given:
    """Inputs of one of the operations whose outputs carry gradients."""

    def plans(scope: Scope) -> Plans | None:
        names = [name for name in DIFFERENTIABLE if name in scope.capabilities.gradients]
        return any_operation(*names).plans(scope) if names else None

    return Given(plans, any_operation().build)


def _cotangents(outputs: Any) -> dict[str, torch.Tensor]:
    content = Content(0)
    return {
        path: content.normal(*tensor.shape).to(tensor.dtype)
        for path, tensor in walk(outputs)
        if tensor.is_floating_point() and path != "balance_loss"
    }


def _same_gradient(
    case: Case, what: str, expected: torch.Tensor | None
) -> Callable[[torch.Tensor | None], None]:
    def rule(gradient: torch.Tensor | None) -> None:
        if expected is None:
            return
        if gradient is None:
            raise Violation(f"{what}: expected a tensor, got None")
        _near(case, what, gradient, expected)

    return rule


@requirement(
    "NUM-17",
    MUST,
    ANY,
    "The gradient that comes in MUST be read by its strides.",
    reason="That of a sum is expanded and has strides of 0, and that of a slice has rows that lie "
    "apart. A backward kernel is mostly tried on one that `randn_like` made.",
    sources=("pytorch #154557", "pytorch #193633", "ScatterMoE"),
    given=Given(
        lambda scope: (
            st.tuples(plans, st.sampled_from(GRADIENT_LAYOUTS)).map(_with_layout)
            if scope.capabilities.strides
            and (plans := _differentiable_operations().plans(scope)) is not None
            else None
        ),
        lambda plan: {
            **any_operation().build({k: v for k, v in plan.items() if k != "cotangent_layout"}),
            "cotangent_layout": plan["cotangent_layout"],
        },
    ),
)
def the_gradient_that_comes_in_may_have_any_strides(case: Case) -> None:
    """The same values twice: one after the other in memory, and in another layout."""
    operation, given = case["operation"], _given(case)
    layout = case["cotangent_layout"]
    wrt = _leaves(operation, given)
    cotangents = _cotangents(case.call(operation, **given).outputs)
    if layout == "expanded":
        cotangents = {
            path: t.flatten()[:1].sum().expand(t.shape).contiguous()
            for path, t in cotangents.items()
        }
    plain, laid = case.session(
        [
            case.planned(operation, **given, wrt=wrt, cotangents=cotangents),
            case.planned(
                operation, **given, wrt=wrt, cotangents=cotangents, cotangent_layout=layout
            ),
        ]
    )
    case.note(layout)
    _judge_gradients(case, operation, wrt, plain, laid, f"from one that is {layout}")


def _with_layout(drawn: tuple[Plan, str]) -> Plan:
    return {**drawn[0], "cotangent_layout": drawn[1]}


def _leaves(operation: str, given: dict[str, Any]) -> list[str]:
    present = {path for path, _ in walk(given)}
    return [path for path in DIFFERENTIABLE[operation] if path in present]


@requirement(
    "NUM-18",
    MUST,
    ANY,
    "A gradient MUST be the same whichever others are asked for.",
    reason="With frozen experts, or a router that is trained alone, a backward pass has to leave "
    "out what nobody asks for, and nothing else.",
    sources=("torchtitan #1237", "DeepSpeed #5259"),
    given=_differentiable_operations(),
)
def a_gradient_does_not_depend_on_the_others(case: Case) -> None:
    """Each gradient by itself, those of parameters, and those of all else, against all together."""
    operation, given = case["operation"], _given(case)
    wrt = _leaves(operation, given)
    cotangents = _cotangents(case.call(operation, **given).outputs)
    trained = [path for path in wrt if "." in path]
    frozen = [path for path in wrt if path not in trained]
    some = [paths for paths in (trained, frozen) if 1 < len(paths) < len(wrt)]
    asked = [*([path] for path in wrt), *some]
    together, *apart = case.session(
        [
            case.planned(operation, **given, wrt=paths, cotangents=cotangents)
            for paths in (wrt, *asked)
        ]
    )
    for paths, answer in zip(asked, apart, strict=True):
        how = "alone" if len(paths) == 1 else f"with {' and '.join(paths)} alone"
        _judge_gradients(case, operation, paths, together, answer, how)


@requirement(
    "NUM-20",
    MUST,
    ANY,
    "A second backward pass through a graph that was kept MUST give the same gradients.",
    reason="Two losses share a forward pass. Kernels that write over what was saved, to spare "
    "memory, are right once.",
    sources=("torchtitan #1237", "ScatterMoE"),
    given=_differentiable_operations(),
)
def the_second_backward_pass_is_the_first(case: Case) -> None:
    """One pass through one graph, and the second of two through another."""
    operation, given = case["operation"], _given(case)
    wrt = _leaves(operation, given)
    cotangents = _cotangents(case.call(operation, **given).outputs)
    once, twice = case.session(
        [
            case.planned(operation, **given, wrt=wrt, cotangents=cotangents, backward=backward)
            for backward in ("at once", "twice")
        ]
    )
    _judge_gradients(case, operation, wrt, once, twice, "of the second pass")


@requirement(
    "NUM-21",
    MUST,
    ANY,
    "A backward pass MUST be right after other forward passes.",
    reason="Under pipeline parallelism and with gradient accumulation several micro-batches are "
    "under way. What is saved in a buffer of the module is that of the last one.",
    sources=("torchtitan #1237", "SGLang #25852"),
    given=Given(
        lambda scope: _repeatable(
            *(name for name in DIFFERENTIABLE if name in scope.capabilities.gradients)
        ).plans(scope),
        _repeatable(*DIFFERENTIABLE).build,
    ),
)
def the_backward_pass_may_come_late(case: Case) -> None:
    """Two forward passes on different data, then both backward passes; and the first by itself."""
    operation, given = case["operation"], _given(case)
    wrt = _leaves(operation, given)
    cotangents = _cotangents(case.call(operation, **given).outputs)
    other = _other_data(operation, given)
    alone, late, _ = case.session(
        [
            case.planned(operation, **arguments, wrt=wrt, cotangents=cotangents, backward=backward)
            for arguments, backward in ((given, "at once"), (given, "late"), (other, "late"))
        ]
    )
    _judge_gradients(case, operation, wrt, alone, late, "taken late")


def _judge_gradients(
    case: Case, operation: str, wrt: list[str], expected: Answer, found: Answer, how: str
) -> None:
    case.note(f"operation {operation}")
    for path in wrt:
        right, gradient = expected.gradients[path], found.gradients[path]
        wrong = [] if right is None or not right.any() else [("twice", 2 * right + 1)]
        case.judge(_same_gradient(case, f"gradient of {path} {how}", right), gradient, wrong)
