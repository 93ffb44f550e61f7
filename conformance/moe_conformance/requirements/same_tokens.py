"""Requirements on ranks that have the same tokens: slices of them, and sums of partial outputs.

`sliced_expert_parallel` cuts the tokens before the exchange and gathers them after it;
`replicated_experts` and `shared_tensor_parallel` compute a part on each rank and add up. Every rank
has the whole output. Each case runs on real processes, one for each rank.

Dimension key: T tokens, H hidden size, K experts per token, E experts, R ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from moe_reference.config import ExpertWeights

from moe_conformance.case import Answer, Case
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import FUNCTION_ULPS, Spread
from moe_conformance.inputs.expert_parallel import (
    ANY_MODE,
    GATE,
    GATES,
    SOME_OR_NONE,
    on_replicas,
    on_shared,
    taken,
)
from moe_conformance.inputs.given import differentiable
from moe_conformance.judge import Closeness, Violation, close, equal, has_form, impostors
from moe_conformance.precision import UNIT
from moe_conformance.registry import MUST, requirement
from moe_conformance.requirements.expert_parallel import (
    Limit,
    Tensors,
    copies_together,
    gradient_limits,
    hold_gradients,
    oracle_of,
    outputs_of,
    scale_of,
    value_of,
    without,
)
from moe_conformance.requirements.experts import arithmetic_of, cotangent_of, left_alone

SLICED, REPLICATED, SHARED = (
    "sliced_expert_parallel",
    "replicated_experts",
    "shared_tensor_parallel",
)
ARGUMENTS = {
    SLICED: ("ranks", "num_experts", "config", "placement"),
    REPLICATED: ("ranks", "num_experts", "config", "placement"),
    SHARED: ("ranks", "config", "shared_scale"),
}


def arguments(case: Case, operation: str) -> dict[str, Any]:
    """The arguments of a call on all ranks."""
    return {name: case[name] for name in ARGUMENTS[operation]}


def note(case: Case) -> None:
    """Count what was drawn."""
    tokens, size = len(case["whole"]["x"]), len(case["ranks"])
    case.note(f"{size} ranks")
    case.note("tokens that do not divide by the ranks", tokens % size > 0)
    case.note("fewer tokens than ranks", tokens < size)
    case.note("no tokens", tokens == 0)
    case.note("a group that is a part of the world", size < case["world_size"])
    case.note("a rank without experts", not all(case["held"]))
    case.note("a placement", case["placement"] is not None)
    case.note("gradients are off", case["grad_mode"] != "recording")


def judge_everywhere(case: Case, answer: Answer, others: dict[str, torch.Tensor]) -> None:
    """Every rank has to have the one rank's output; the impostors have it on no rank."""
    note(case)
    if len(case["whole"]["x"]) == 0:
        _judge_shapes(case, answer)
        return
    spread, size = _with_gate(case, oracle_of(case)), len(case["ranks"])

    def rule(outputs: Tensors) -> Closeness:
        found = [
            close(f"output of rank {rank}", output, spread.value, spread.sigma, spread.freedom)
            for rank, output in enumerate(outputs)
        ]
        return Closeness(
            any(each.marginal for each in found),
            max(each.worst for each in found),
            max(each.worst_rms for each in found),
        )

    wrong = dict(impostors(spread.value, scale_of(spread)))
    wrong |= {
        name: value
        for name, value in others.items()
        if not torch.equal(value.nan_to_num(), spread.value.nan_to_num())
    }
    outputs = outputs_of(answer, case["ranks"])
    case.judge(rule, outputs, [(name, [value] * size) for name, value in wrong.items()])


def _with_gate(case: Case, spread: Spread) -> Spread:
    """Add what the sigmoid of a shared expert's gate may be off by.

    Its argument is exact, but where products are of tf32, which rounds x. The function is off by a
    few units of the accumulator; the factor, and its product with the scale, may be rounded to x's
    dtype, as the layer's. A token has one factor: it moves the whole row, as one error.
    """
    gate = case["ranks"][0].get("shared_gate")
    if gate is None or not bool(gate.any()):
        return spread
    x = case["whole"]["x"]
    arithmetic = arithmetic_of(case, x).outside
    logit = x.double() @ gate.double().T
    unit = arithmetic.accumulator_unit
    relative = FUNCTION_ULPS * unit * (1 + logit.abs()) + 2 * max(unit, arithmetic.unit)
    if arithmetic.accumulator == "tf32":
        relative = relative + UNIT["tf32"] * logit.abs()
    added = (relative * spread.value).square() / 3
    total, once = spread.sigma.square().sum(-1), added.sum(-1)
    squares = (1 / spread.freedom - 1 / x.shape[1]) * total.square() + once.square()
    freedom = 1 / (1 / x.shape[1] + squares / (total + once).square().clamp_min(1e-300))
    sigma = (spread.sigma.square() + added).sqrt()
    return Spread(spread.value, sigma, freedom.clamp_min(1.0))


def _judge_shapes(case: Case, answer: Answer) -> None:
    """Of no tokens there is nothing but the form of what they get."""

    def rule(outputs: Tensors) -> None:
        outputs_of(dataclasses.replace(answer, outputs=outputs), case["ranks"])

    row = case["whole"]["x"].new_zeros(1, case["whole"]["x"].shape[1])
    case.judge(rule, answer.outputs, [("a row", [row] * len(case["ranks"]))])


def same_loss(case: Case) -> bool:
    """Whether all ranks compute the same loss; otherwise their losses are terms of one."""
    return case.scope.capabilities.replicated_gradients == "replicate"


def cotangents_of(case: Case) -> dict[str, torch.Tensor]:
    """One for each rank: of terms, every element counts on one rank, and they add up to the whole.

    Were the loss one rank's alone, or the same on all, a gradient that is not summed, or multiplied
    by R, could be right by chance.
    """
    whole, size = cotangent_of(case["whole"]["x"]), len(case["ranks"])
    if same_loss(case):
        return {str(rank): whole for rank in range(size)}
    rows, columns = (torch.arange(length) for length in whole.shape)
    counts_on = (rows[:, None] + columns) % size
    return {str(rank): whole * (counts_on == rank) for rank in range(size)}


def with_gradients(case: Case, operation: str) -> Answer:
    """One call on all ranks, and its backward on all ranks."""
    ranks = case["ranks"]
    call = case.planned(
        operation,
        wrt=[
            f"ranks.{rank}.{path}"
            for rank, given in enumerate(ranks)
            for path, tensor in walk(given)
            if tensor.is_floating_point()
        ],
        cotangents=cotangents_of(case),
        cotangent_layout=case["cotangent_layout"],
        **arguments(case, operation),
    )
    answer = case.session([call])[0]
    outputs_of(answer, ranks)
    return answer


def gradients_of(case: Case, answer: Answer) -> dict[str, Tensors]:
    """By path, each rank's gradient, in the form of what it belongs to."""
    found: dict[str, Tensors] = {}
    for rank, given in enumerate(case["ranks"]):
        for path, tensor in walk(given):
            if not tensor.is_floating_point():
                continue
            gradient = answer.gradients[f"ranks.{rank}.{path}"]
            what = f"gradient of {path} on rank {rank}"
            if gradient is None:
                raise Violation(f"{what}: expected a tensor, got None")
            has_form(what, gradient, tuple(tensor.shape), (tensor.dtype,))
            found.setdefault(path, []).append(gradient)
    return found


def judge_together(case: Case, found: dict[str, Tensors]) -> None:
    """Hold the gradients of all ranks against the one rank's.

    Those of experts' copies add up, those of slices are put together. Those of what all ranks have
    add up where losses do; where all compute the same loss, each is the whole.
    """
    note(case)
    if len(case["whole"]["x"]) == 0:
        for path, gradients in found.items():
            judge_zeros(case, path, gradients)
        return
    size = len(case["ranks"])
    right = gradient_limits(case, sums=size if same_loss(case) else 0)
    for path, gradients in found.items():
        of_dtype = gradients[0].dtype
        if path.startswith("local."):
            limit = right[path.replace("local.", "experts.")]
            together = [copies_together(case, gradients).to(of_dtype)]
        elif path.startswith("part."):
            limit = right[path.replace("part.", "experts.")]
            together = [_joined(path, gradients, bool(case["config"].gated))]
        else:
            limit = _limit_of_gate(case, right) if path == "shared_gate" else right[path]
            total = torch.stack(gradients).sum(0, dtype=torch.float64).to(of_dtype)
            together = gradients if same_loss(case) else [total]
        names = ", all ranks together" if len(together) == 1 else " on rank {}"
        hold_gradients(case, path, together, [limit] * len(together), names)


def _limit_of_gate(case: Case, right: dict[str, Limit]) -> Limit:
    """The gradient of the gate's weight, by way of that of what each token is multiplied with.

    A token's factor is c · sigmoid(g) with g = 0, so that the gradient of g is c / 4 times the
    factor's. The sum over the tokens is rounded as often as there are tokens.
    """
    x = case["whole"]["x"].double()
    slope = case["shared_scale"] * GATE * (1 - GATE)
    value, bound = right["weights"]
    unit = torch.finfo(case["whole"]["x"].dtype).eps
    size = slope * value.abs().T @ x.abs()
    return slope * value.T @ x, slope * bound.T @ x.abs() + (len(x) + 1) * unit * size


def _joined(path: str, slices: Tensors, gated: bool) -> torch.Tensor:
    """The gradient of the whole shared expert; its output bias is on the first rank."""
    if path == "part.down_bias":
        return slices[0]
    if path == "part.down":
        return torch.cat(slices, 2)
    halves = [each.tensor_split(2 if gated else 1, 1) for each in slices]
    return torch.cat([half for pair in zip(*halves, strict=True) for half in pair], 1)


def spoil_nobodys_weights(case: Case) -> dict[str, torch.Tensor]:
    """Make the weights of pairs whose id is nobody's not finite; what counting them would give."""
    given = case["whole"]
    ids, weights = given["expert_ids"].long(), given["weights"]
    nobodys = (ids < 0) | (ids >= case["num_experts"])
    if not bool(nobodys.any()):
        return {}
    case.note("an id that is nobody's")
    last = ids.masked_fill(nobodys, case["num_experts"] - 1)
    others = {"counted as the last expert": value_of(case, expert_ids=last)}
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=weights.dtype)
    spoilt = torch.where(nobodys, kinds[torch.arange(len(weights)) % 3, None], weights)
    case.inputs["whole"] = given | {"weights": spoilt}
    case.inputs["ranks"] = [rank | {"weights": spoilt.clone()} for rank in case["ranks"]]
    return others


@requirement(
    "EP-19",
    MUST,
    SLICED,
    "Ranks that have the same tokens and share them out MUST all get back every token's output, "
    "also where the tokens do not divide by the ranks, and where there are none. Ranks are counted "
    "in their group. A pair whose id is nobody's counts for nothing, whatever its weight.",
    reason="Tokens are padded, cut, computed, gathered and trimmed. What is cut off at the wrong "
    "end, or left over between equal slices, is another token's output, or nobody's; so is the "
    "slice of a rank's number in the world.",
    sources=("TensorCast MoE layer", "torchtitan #2842", "vLLM #42034"),
    given=on_replicas(
        counts=SOME_OR_NONE,
        invalid_ids=(False, True),
        part_of_world=(False, True),
        grad_modes=ANY_MODE,
    ),
    references=("domain_transforms.sliced_expert_parallel", "token_slices.leave_slices"),
)
def slices_are_put_together_again(case: Case) -> None:
    """Statistical comparison with one rank; the impostor leaves out what is left over."""
    others = spoil_nobodys_weights(case)
    answer = case.call(SLICED, **arguments(case, SLICED))
    tokens, size = len(case["whole"]["x"]), len(case["ranks"])
    left_over = torch.arange(tokens) >= tokens // size * size
    judge_everywhere(case, answer, others | {"left over": without(case, left_over[:, None])})


@requirement(
    "EP-20",
    MUST,
    SLICED,
    "Gradients of shared-out tokens, their weights and the experts MUST be what one rank gets for "
    "the sum of all losses, the copies' added up; or, where all ranks compute the same loss, what "
    "one rank gets for it, on each.",
    reason="Each rank has the outputs of all slices, and its loss reaches into all of them. The "
    "way back of the gathering is a sum over the ranks where losses are terms, and a slice where "
    "they are one; what it leaves of x on a rank is its slice's part.",
    sources=("transformers #48687", "pytorch #160285", "Automodel #1260"),
    given=differentiable(SLICED, on_replicas(counts=SOME_OR_NONE, cotangent_layouts=True)),
    references=("ranks.all_gather",),
)
def gradients_of_slices_add_up(case: Case) -> None:
    """Of losses that are terms, every element of the output counts on one rank."""
    judge_together(case, gradients_of(case, with_gradients(case, SLICED)))


@requirement(
    "EP-21",
    MUST,
    REPLICATED,
    "Ranks that have the same tokens and a share of the experts each MUST all get the one rank's "
    "output, whichever copies of an expert there are, also where there are no tokens. Ranks are "
    "counted in their group. A pair whose id is nobody's counts for nothing, whatever its weight.",
    reason="A pair is computed by exactly one rank. Ranks that choose among copies by themselves "
    "compute it twice or not at all, and an id of another rank's expert is none of this one's. "
    "Where pairs of others are multiplied by zero, what is not finite stays.",
    sources=("SGLang #32962", "transformers #48653", "torchtitan #2842"),
    given=on_replicas(
        copies=(False, True, True),
        counts=SOME_OR_NONE,
        invalid_ids=(False, True),
        part_of_world=(False, True),
        grad_modes=ANY_MODE,
    ),
    references=("partial_sums.replicated_experts", "placement.physical_ids"),
)
def parts_of_all_ranks_add_up(case: Case) -> None:
    """Statistical comparison with one rank; the impostor is the first rank's part."""
    others = spoil_nobodys_weights(case)
    answer = case.call(REPLICATED, **arguments(case, REPLICATED))
    elsewhere = ~torch.isin(
        case["whole"]["expert_ids"].long(), torch.tensor(case["held"][0], dtype=torch.int64)
    )
    others["the first rank's part"] = without(case, elsewhere)
    judge_everywhere(case, answer, others)


@requirement(
    "EP-22",
    MUST,
    REPLICATED,
    "Gradients of the tokens and weights that all ranks have MUST be what one rank gets for the "
    "sum of all losses, the copies' added up, or for the loss that all compute, on each; an "
    "expert's copies together have the expert's.",
    reason="Every rank has the whole output and computed a part of it: what losses ask for has to "
    "come back to each. A reduction without a backward gives each its own loss's, an average a "
    "part; and where all compute one loss, a sum gives R times too much.",
    sources=("pytorch #160285", "DeepSpeed #5259", "transformers #48687"),
    given=differentiable(
        REPLICATED, on_replicas(copies=(False, True), counts=SOME_OR_NONE, cotangent_layouts=True)
    ),
    references=("partial_sums.reduce_once", "ranks.all_reduce"),
)
def gradients_of_parts_add_up(case: Case) -> None:
    """Of losses that are terms, every element of the output counts on one rank."""
    judge_together(case, gradients_of(case, with_gradients(case, REPLICATED)))


def doubled(case: Case) -> torch.Tensor:
    """The shared expert's output times R."""
    value: torch.Tensor = value_of(case) * len(case["ranks"])
    return value


@requirement(
    "EP-23",
    MUST,
    SHARED,
    "The slices of a shared expert MUST be summed over the ranks of the group exactly once, its "
    "output bias too, however many tokens there are.",
    reason="A slice's output is partial. Beside routed experts it is easily reduced a second time "
    "with their sum, or with none; one rank shows neither.",
    sources=("vLLM #49122", "vLLM #49378", "SGLang #35535", "SGLang #32963"),
    given=on_shared(
        counts=SOME_OR_NONE, part_of_world=(False, True), gates=GATES, grad_modes=ANY_MODE
    ),
    references=("partial_sums.shared_tensor_parallel", "partial_sums.reduce_once"),
)
def the_shared_expert_is_reduced_once(case: Case) -> None:
    """Statistical comparison with the whole expert; the impostor is reduced twice."""
    answer = case.call(SHARED, **arguments(case, SHARED))
    judge_everywhere(case, answer, {"reduced twice": doubled(case)})


@requirement(
    "EP-24",
    MUST,
    SHARED,
    "Gradients of the slices of a shared expert MUST be slices of the whole's, for the sum of all "
    "losses or the one that all compute; those of x and of the gate MUST add up over the ranks, or "
    "be the whole on each.",
    reason="Where losses are terms the backward of the sum is a sum over the ranks, once: left "
    "out, every slice learns from one rank's loss; taken twice, R times too much. Where they are "
    "one, it is x's and the gate's gradients that have to be summed.",
    sources=("pytorch #160285", "DeepSpeed #5259"),
    given=differentiable(SHARED, on_shared(counts=SOME_OR_NONE, cotangent_layouts=True)),
    references=("partial_sums.reduce_once", "ranks.all_reduce"),
)
def gradients_of_the_shared_expert_are_slices(case: Case) -> None:
    """Of losses that are terms, every element of the output counts on one rank."""
    judge_together(case, gradients_of(case, with_gradients(case, SHARED)))


@requirement(
    "EP-25",
    MUST,
    SLICED,
    "The padding of a slice MUST be routed nowhere: an expert that no token chose is not computed, "
    "whatever it holds, and its gradient is zero.",
    reason="Padded rows with an id that is an expert's cost work on its rank, count in the load, "
    "and take what is not finite there into its gradient.",
    sources=("TensorCast MoE layer",),
    given=differentiable(SLICED, on_replicas(loads=("one expert",))),
    references=("token_slices.enter_slices", "token_slices.pad_tokens"),
)
def padding_is_routed_nowhere(case: Case) -> None:
    """Experts that no token chose hold NaN, where padding would find it."""
    used = case["whole"]["expert_ids"].unique()
    idle = [
        torch.tensor([row for row, e in enumerate(held) if e not in used], dtype=torch.int64)
        for held in case["held"]
    ]
    spoilt = replace_tensors(
        case["whole"]["experts"],
        lambda _, tensor: tensor.masked_fill(
            ~torch.isin(torch.arange(len(tensor)), used).view(-1, *[1] * (tensor.ndim - 1)),
            torch.nan,
        ),
    )
    case.inputs["ranks"] = [
        given | {"local": taken(spoilt, held)}
        for given, held in zip(case["ranks"], case["held"], strict=True)
    ]
    answer = with_gradients(case, SLICED)
    judge_everywhere(case, answer, {})
    for path, gradients in gradients_of(case, answer).items():
        if path.startswith("local."):
            rows = [each[of_rank] for each, of_rank in zip(gradients, idle, strict=True)]
            judge_zeros(case, path, rows)


def judge_zeros(case: Case, path: str, rows: Tensors) -> None:
    """Hold rows of gradients against zeros, to the bit, where there are any."""
    if any(each.numel() for each in rows):
        case.judge(_zeros(path), rows, [("ones", [each + 1 for each in rows])])


def _zeros(path: str) -> Callable[[Tensors], None]:
    def rule(rows: Tensors) -> None:
        for rank, gradient in enumerate(rows):
            what = f"gradient of {path} on rank {rank}, where nothing was routed"
            equal(what, gradient, torch.zeros_like(gradient))

    return rule


def other_data(case: Case) -> None:
    """As many other tokens, on all ranks, and experts of the opposite sign."""

    def opposite(experts: ExpertWeights) -> ExpertWeights:
        bias = experts.down_bias
        return dataclasses.replace(
            experts, down=-experts.down, down_bias=None if bias is None else -bias
        )

    made = dict(case["whole"])
    made["x"] = made["x"].flip(0) * 0.5
    made["experts"] = opposite(made["experts"])
    for name in ("weights", "expert_ids"):
        made[name] = made[name].flip(0).flip(1)
    case.inputs["whole"] = made
    tokens = ("x", "weights", "expert_ids")
    case.inputs["ranks"] = [
        rank
        | {name: made[name].clone() for name in tokens if name in rank}
        | {name: opposite(rank[name]) for name in ("local", "part") if name in rank}
        for rank in case["ranks"]
    ]


def leaves_things_alone(case: Case, operation: str) -> None:
    """Two calls with the same storage; the second one is judged too, and the first read again."""
    first_ranks, first = case["ranks"], case.planned(operation, **arguments(case, operation))
    other_data(case)
    second = case.planned(operation, **arguments(case, operation), reuse=0)
    answers = case.session([first, second])
    for answer in answers:
        found = answer.changed + answer.shared + answer.state
        case.judge(left_alone(operation), found, [("one", ["one"])])
    judge_everywhere(case, answers[1], {})
    outputs = outputs_of(answers[0], first_ranks)

    def rule(again: Tensors) -> None:
        for rank, (before, after) in enumerate(zip(outputs, again, strict=True)):
            equal(f"the first output of rank {rank}, read again", after, before)

    overwritten = [torch.where(each == 0, 1.0, 0.0).to(each.dtype) for each in outputs]
    case.judge(rule, answers[0].afterwards, [("overwritten", overwritten)])


ALONE = (
    "inputs MUST NOT be changed, the output MUST NOT share memory with them, torch's global state "
    "MUST stay, and a second call whose tokens and weights are written over those of the first "
    "MUST be right and leave the first output as it was."
)


@requirement(
    "EP-26",
    MUST,
    SLICED,
    f"Where tokens are cut into slices, {ALONE}",
    reason="A slice is a view of what the caller has, and where nothing has to be padded so is all "
    "of it. What is gathered has the same shape at every step, and is easily kept.",
    sources=("TensorCast topk_weights /=", "KernelBench result_reuse", "xtuner #2053"),
    given=on_replicas(grad_modes=ANY_MODE),
    references=("token_slices.enter_slices", "token_slices.leave_slices"),
)
def slices_leave_things_alone(case: Case) -> None:
    """Every argument of every rank is compared with a copy made before the call."""
    leaves_things_alone(case, SLICED)


@requirement(
    "EP-27",
    MUST,
    REPLICATED,
    f"Where parts are added up, {ALONE}",
    reason="A reduction works in place. In a buffer that is kept the next step's sum is in the "
    "place of this one's, and x goes on into the residual.",
    sources=("TensorCast topk_weights /=", "KernelBench result_reuse", "vLLM #16801"),
    given=on_replicas(copies=(False, True), grad_modes=ANY_MODE),
    references=("partial_sums.replicated_experts", "partial_sums.reduce_once"),
)
def parts_leave_things_alone(case: Case) -> None:
    """Every argument of every rank is compared with a copy made before the call."""
    leaves_things_alone(case, REPLICATED)


@requirement(
    "EP-28",
    MUST,
    SHARED,
    f"Where slices of a shared expert are added up, {ALONE}",
    reason="A reduction works in place. In a buffer that is kept the next layer's sum is in the "
    "place of this one's, and x is what the routed experts are given too.",
    sources=("KernelBench result_reuse", "vLLM #16801"),
    given=on_shared(grad_modes=ANY_MODE),
    references=("partial_sums.shared_tensor_parallel", "partial_sums.reduce_once"),
)
def slices_of_the_shared_expert_leave_things_alone(case: Case) -> None:
    """Every argument of every rank is compared with a copy made before the call."""
    leaves_things_alone(case, SHARED)
