"""Requirements on `expert_parallel`: the same answer on any number of ranks.

Each case runs on real processes, one for each rank, over gloo or NCCL.

Dimension key: T tokens, H hidden size, K experts per token, E experts, R ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from moe_reference.config import ExpertWeights, Placement
from moe_reference.experts import experts as reference_experts

from moe_conformance.case import Answer, Case
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import Spread, experts_oracle
from moe_conformance.inputs.expert_parallel import ANY_MODE, cut, held_by_ranks, on_ranks
from moe_conformance.inputs.given import Given, Scope, differentiable
from moe_conformance.judge import (
    Closeness,
    Violation,
    close,
    equal,
    has_form,
    impostors,
    telling_scale,
    within,
)
from moe_conformance.registry import MUST, requirement
from moe_conformance.requirements.experts import (
    arithmetic_of,
    cotangent_of,
    expected_gradients,
    left_alone,
)

OPERATION = "expert_parallel"
SHOWN = ("expert_parallel.expert_parallel", "expert_parallel.over_ranks")
EVERYBODYS = ("num_experts", "config", "placement")
Tensors = list[torch.Tensor]


def arguments(case: Case, **changed: Any) -> dict[str, Any]:
    """The arguments of a call on all ranks."""
    return {name: case[name] for name in ("ranks", *EVERYBODYS)} | changed


def whole(case: Case, **changed: Any) -> dict[str, Any]:
    """What one rank would be given for the same: the arguments of `experts`."""
    return {**case["whole"], "config": case["config"], "expert_map": None} | changed


def counts_of(case: Case) -> list[int]:
    """How many tokens each rank has."""
    return [len(rank["x"]) for rank in case["ranks"]]


def outputs_of(answer: Answer, ranks: Sequence[dict[str, Any]]) -> Tensors:
    """Each rank's output, in the form that the contract gives it."""
    for rank, (output, given) in enumerate(zip(answer.outputs, ranks, strict=True)):
        x = given["x"]
        has_form(f"output of rank {rank}", output, tuple(x.shape), (x.dtype,))
    outputs: Tensors = answer.outputs
    return outputs


def oracle_of(case: Case, **changed: Any) -> Spread:
    """The one rank's output, and how it may spread: rows are rounded when they travel."""
    given = whole(case, **changed)
    declared = arithmetic_of(case, given["x"])
    points = declared.points
    if declared.dtype != "float64":
        points = points | {"expert_input", "expert_output"}
    arithmetic = dataclasses.replace(declared, points=points)
    return experts_oracle(**given, arithmetic=arithmetic)


def value_of(case: Case, **changed: Any) -> torch.Tensor:
    """The output of other arguments in float64: what an impostor gives."""
    given = replace_tensors(
        whole(case, **changed), lambda _, t: t.double() if t.is_floating_point() else t
    )
    value: torch.Tensor = reference_experts(**given)
    return value


def close_on_ranks(spread: Spread, counts: Sequence[int]) -> Callable[[Tensors], Closeness]:
    """Hold the outputs of all ranks against the one rank's."""
    parts = [each.split(list(counts)) for each in (spread.value, spread.sigma, spread.freedom)]

    def rule(outputs: Tensors) -> Closeness:
        found = [
            close(f"output of rank {rank}", output, *of_rank)
            for rank, (output, of_rank) in enumerate(
                zip(outputs, zip(*parts, strict=True), strict=True)
            )
        ]
        return Closeness(
            any(each.marginal for each in found),
            max(each.worst for each in found),
            max(each.worst_rms for each in found),
        )

    return rule


def scale_of(spread: Spread) -> float:
    """The factor that no legal output is off by."""
    return telling_scale(spread.value, spread.sigma, spread.freedom)


def wrong_outputs(
    case: Case,
    expected: torch.Tensor,
    others: dict[str, torch.Tensor] | None = None,
    scale: float = 1.25,
) -> Iterator[tuple[str, Tensors]]:
    """Outputs that any check has to refuse, cut into those of the ranks."""
    counts = counts_of(case)
    for name, value in impostors(expected, scale):
        yield name, list(value.split(counts))
    for name, value in (others or {}).items():
        if not torch.equal(value.nan_to_num(), expected.nan_to_num()):
            yield name, list(value.split(counts))


def judge_outputs(
    case: Case, answer: Answer, others: dict[str, torch.Tensor] | None = None
) -> None:
    """Judge what all ranks gave, with impostors of the property's own."""
    note(case)
    spread = oracle_of(case)
    outputs = outputs_of(answer, case["ranks"])
    case.judge(
        close_on_ranks(spread, counts_of(case)),
        outputs,
        wrong_outputs(case, spread.value, others, scale_of(spread)),
    )


def note(case: Case) -> None:
    """Count what was drawn."""
    counts, held = counts_of(case), case["held"]
    case.note(f"{len(counts)} ranks")
    case.note("a rank without tokens", 0 in counts)
    case.note("a rank without experts", not all(held))
    case.note("ranks with more experts than others", len(set(map(len, held))) > 1)
    case.note("a placement", case["placement"] is not None)
    case.note("gradients are off", case["grad_mode"] != "recording")
    case.note(f"dtype {str(case['whole']['x'].dtype).removeprefix('torch.')}")


def rank_of_expert(case: Case) -> torch.Tensor:
    """[E]: the first rank that has it."""
    ranks = torch.zeros(case["num_experts"], dtype=torch.int64)
    for rank, held in reversed(list(enumerate(case["held"]))):
        ranks[held] = rank
    return ranks


def without(case: Case, gone: torch.Tensor) -> torch.Tensor:
    """The output without the pairs [T, K] that are marked."""
    given = case["whole"]
    return value_of(case, expert_ids=given["expert_ids"].masked_fill(gone, -1))


def ranks_of_pairs(case: Case) -> torch.Tensor:
    """[T, K]: the rank that has the pair's expert, -1 where it is not here."""
    ids = case["whole"]["expert_ids"].long()
    here = (ids >= 0) & (ids < case["num_experts"])
    return rank_of_expert(case)[ids.clamp(0, case["num_experts"] - 1)].where(here, -1)


def owners(case: Case) -> torch.Tensor:
    """[T]: the rank that has the token."""
    counts = torch.tensor(counts_of(case))
    return torch.arange(len(counts)).repeat_interleave(counts)


def with_whole(case: Case, **changed: Any) -> None:
    """Give the ranks other tokens than were drawn."""
    made = case["whole"] | changed
    case.inputs["whole"] = made
    case.inputs["ranks"] = cut(made, counts_of(case), case["held"])


@requirement(
    "EP-01",
    MUST,
    OPERATION,
    "Each rank's output MUST be what one rank with all experts computes for its tokens.",
    reason="Spreading the experts changes where the work is done, and no output. Without the way "
    "back every row is still a row of the right width, of another token.",
    sources=("DeepSeek-V2 moe_infer", "xtuner #2053", "DeepEP #112"),
    given=on_ranks(grad_modes=ANY_MODE),
    references=SHOWN,
)
def every_rank_gets_what_one_rank_computes(case: Case) -> None:
    """Statistical comparison with float64; rows are rounded to x's dtype when they travel."""
    answer = case.call(OPERATION, **arguments(case))
    elsewhere = ranks_of_pairs(case) != owners(case)[:, None]
    others = {"pairs of other ranks' experts left out": without(case, elsewhere)}
    judge_outputs(case, answer, others)


def _narrow(given: Given) -> Given:
    """Without float64, where silu(32) is not yet 32."""

    def plans(scope: Scope) -> Any:
        dtypes = tuple(dtype for dtype in scope.dtypes if dtype != "float64")
        return given.plans(dataclasses.replace(scope, dtypes=dtypes))

    return Given(plans, given.build)


def exact_on_ranks(**changed: Any) -> Given:
    """Inputs on which nothing rounds, neither on the way nor in a sum."""
    return _narrow(
        on_ranks(
            content="exact", activation=("silu", "gelu", "gelu_tanh", "relu"), bias=(False,),
            weight_on=("output",), **changed,
        )
    )  # fmt: skip


def exactly(case: Case) -> torch.Tensor:
    """The one output that is right where nothing rounds."""
    return ((oracle_of(case).value * 8).round() / 8).to(case["whole"]["x"].dtype)


def equal_on_ranks(expected: torch.Tensor, counts: Sequence[int]) -> Callable[[Tensors], None]:
    """Hold the outputs of all ranks against these, to the bit."""

    def rule(outputs: Tensors) -> None:
        for rank, (output, of_rank) in enumerate(
            zip(outputs, expected.split(list(counts)), strict=True)
        ):
            equal(f"output of rank {rank}", output, of_rank)

    return rule


@requirement(
    "EP-02",
    MUST,
    OPERATION,
    "Every row MUST come back to the token it left from: where nothing rounds, outputs are exact.",
    reason="Rows arrive rank by rank and are computed expert by expert. Whoever forgets to undo "
    "either order, or swaps the splits on the way there and not on the way back, mixes tokens.",
    sources=("DeepSeek-V2 moe_infer", "TensorCast MoE layer", "xtuner #2053"),
    given=exact_on_ranks(grad_modes=ANY_MODE),
    references=("parallel_steps.expert_major", "dispatch.inverse_permutation"),
)
def rows_come_back_to_their_tokens(case: Case) -> None:
    """Equality to the last bit on small integers; the impostor has two tokens exchanged."""
    answer = case.call(OPERATION, **arguments(case))
    note(case)
    expected, counts = exactly(case), counts_of(case)
    wrong = list(wrong_outputs(case, expected, {"in reverse order": expected.flip(0)}))
    case.judge(equal_on_ranks(expected, counts), outputs_of(answer, case["ranks"]), wrong)


@requirement(
    "EP-03",
    MUST,
    OPERATION,
    "Ranks MUST be free to have different numbers of tokens.",
    reason="The last batch of an epoch, decoding, and masks give ranks different numbers. Splits "
    "follow from counts that were exchanged: one that is computed from T, K and R fits a balanced "
    "step only.",
    sources=("TensorCast MoE layer", "DeepSeek-V2 moe_infer", "xtuner #2053"),
    given=on_ranks(counts=("unequal",), loads=("uniform", "skewed")),
    references=("parallel_steps.exchange_counts",),
)
def ranks_have_different_numbers_of_tokens(case: Case) -> None:
    """The impostor computes as many tokens on each rank as the rank with the fewest has."""
    answer = case.call(OPERATION, **arguments(case))
    counts = counts_of(case)
    place = torch.cat([torch.arange(count) for count in counts])
    fewest = without(case, (place >= min(counts))[:, None])
    judge_outputs(case, answer, {"cut to the fewest": fewest})


PATHS = ("x", "weights", "local.gate_up", "local.down", "local.gate_up_bias", "local.down_bias")


def paths_of(case: Case) -> list[str]:
    """What outputs are differentiated by, on each rank."""
    there = dict(walk(case["ranks"][0]))
    return [path for path in PATHS if path in there]


def with_gradients(case: Case) -> Answer:
    """One call on all ranks, and its backward on all ranks."""
    ranks = case["ranks"]
    cotangents = cotangent_of(case["whole"]["x"]).split(counts_of(case))
    call = case.planned(
        OPERATION,
        wrt=[f"ranks.{rank}.{path}" for rank in range(len(ranks)) for path in paths_of(case)],
        cotangents={str(rank): each for rank, each in enumerate(cotangents)},
        cotangent_layout=case["cotangent_layout"],
        **arguments(case),
    )
    answer = case.session([call])[0]
    outputs_of(answer, ranks)
    return answer


def gradients_of(case: Case, answer: Answer) -> dict[str, Tensors]:
    """By path, each rank's gradient, in the form of what it belongs to."""
    found: dict[str, Tensors] = {path: [] for path in paths_of(case)}
    for rank, given in enumerate(case["ranks"]):
        tensors = dict(walk(given))
        for path, of_ranks in found.items():
            gradient = answer.gradients[f"ranks.{rank}.{path}"]
            what = f"gradient of {path} on rank {rank}"
            if gradient is None:
                raise Violation(f"{what}: expected a tensor, got None")
            has_form(what, gradient, tuple(tensors[path].shape), (tensors[path].dtype,))
            of_ranks.append(gradient)
    return found


def of_ranks(case: Case, path: str, tensor: torch.Tensor) -> Tensors:
    """A gradient of the whole, cut into what each rank has."""
    if not path.startswith("local."):
        return list(tensor.split(counts_of(case)))
    return [tensor[torch.tensor(held, dtype=torch.int64)] for held in case["held"]]


def whole_path(path: str) -> str:
    """The name in `experts` of what is local here."""
    return path.replace("local.", "experts.")


def judge_gradients(case: Case, found: dict[str, Tensors]) -> None:
    """Hold each rank's gradients, by path, against its part of the one rank's in float64."""
    right = gradient_limits(case)
    for path, gradients in found.items():
        value, bound = right[whole_path(path)]
        limits = zip(of_ranks(case, path, value), of_ranks(case, path, bound), strict=True)
        hold_gradients(case, path, gradients, list(limits))


Limit = tuple[torch.Tensor, torch.Tensor]


def gradient_limits(case: Case, sums: int = 0) -> dict[str, Limit]:
    """By path of the whole, the one rank's gradient and how far an answer may be from it.

    Args:
        case: what was called.
        sums: how many more times than on one rank a gradient is rounded, because it is added up.
    """
    value, bound = expected_gradients(case, whole(case), sums)
    return {path: (value[path], bound[path]) for path in value}


def hold_gradients(
    case: Case, path: str, gradients: Tensors, limits: list[Limit], names: str = " on rank {}"
) -> None:
    """Hold some gradients each against what it has to be.

    Args:
        case: what was called.
        path: what they belong to.
        gradients: any number of them.
        limits: for each one the right value and the bound, in float64.
        names: which they are.
    """
    size = len(case["ranks"])
    # Past the largest number of its dtype a gradient is infinite by right.
    most = torch.finfo(gradients[0].dtype).max
    kept = [(value.abs() + bound) < most for value, bound in limits]

    def rule(answer: Tensors) -> None:
        for number, (gradient, (value, bound), here) in enumerate(
            zip(answer, limits, kept, strict=True)
        ):
            what = f"gradient of {path}{names.format(number)}"
            within(what, gradient[here], value[here], bound[here])

    wrong = {"one and twice the bound added": [v + 2 * b + 1 for v, b in limits]}
    for name, factor in (("all zeros", 0.0), ("times R", size), ("divided by R", 1 / size)):
        if any(
            bool((abs(factor - 1) * v.abs() > 2 * b)[k].any())
            for (v, b), k in zip(limits, kept, strict=True)
        ):
            wrong[name] = [factor * v for v, _ in limits]
    if any(bool(each.any()) for each in kept):
        case.judge(rule, gradients, wrong.items())


def copies_together(case: Case, gradients: Tensors) -> torch.Tensor:
    """The gradients of the experts that each rank holds, added up by expert: [E, ...], float64."""
    total = torch.zeros(case["num_experts"], *gradients[0].shape[1:], dtype=torch.float64)
    for held, gradient in zip(case["held"], gradients, strict=True):
        total.index_add_(0, torch.tensor(held, dtype=torch.int64), gradient.double())
    return total


@requirement(
    "EP-04",
    MUST,
    OPERATION,
    "A rank without tokens MUST give an output of shape [0, H] and take part in every exchange, "
    "forward and backward.",
    reason="It may hold the experts of the others' tokens. If it returns early the others wait for "
    "ever; if its output is cut off from the graph they wait in the backward pass.",
    sources=(
        "torchtitan #1166",
        "Megatron #4851",
        "PaddleFormers #3010",
        "DeepSpeed #5066",
        "vLLM #43547",
        "vLLM #51984",
        "sgl-kernel-npu #69",
    ),
    given=differentiable(OPERATION, on_ranks(counts=("one idle", "one busy"))),
    references=("ranks.ProcessRanks",),
)
def a_rank_without_tokens_takes_part(case: Case) -> None:
    """The impostor leaves out the experts of the ranks without tokens."""
    answer = with_gradients(case)
    gradients_of(case, answer)
    idle = torch.tensor([rank for rank, count in enumerate(counts_of(case)) if count == 0])
    there = torch.isin(ranks_of_pairs(case), idle)
    judge_outputs(case, answer, {"experts of idle ranks left out": without(case, there)})


@requirement(
    "EP-05",
    MUST,
    OPERATION,
    "With no token on any rank the call and its backward MUST come through, with outputs of shape "
    "[0, H] and gradients of zeros.",
    reason="All rows of a step may be padding. Maxima of nothing, views of empty tensors and "
    "divisions by the number of tokens fail here and nowhere else.",
    sources=("pytorch #146468", "pytorch #126616", "DeepSpeed #4808", "Megatron #4851"),
    given=differentiable(OPERATION, on_ranks(counts=("none",))),
    references=SHOWN,
)
def no_tokens_at_all_come_through(case: Case) -> None:
    """Shapes of the outputs, and zeros for every expert."""
    answer = with_gradients(case)
    note(case)

    def rule(outputs: Tensors) -> None:
        outputs_of(dataclasses.replace(answer, outputs=outputs), case["ranks"])

    row = case["whole"]["x"].new_zeros(1, case["whole"]["x"].shape[1])
    case.judge(rule, answer.outputs, [("a row", [row] * len(answer.outputs))])
    _judge_zeros(case, gradients_of(case, answer), lambda path: slice(None))


def _judge_zeros(case: Case, found: dict[str, Tensors], which: Callable[[str], Any]) -> None:
    """Hold rows of the experts' gradients against zeros, to the bit."""
    for path, gradients in found.items():
        if not path.startswith("local."):
            continue
        chosen = which(path)
        rows = [
            gradient[chosen if isinstance(chosen, slice) else chosen[rank]]
            for rank, gradient in enumerate(gradients)
        ]

        def rule(answer: Tensors, path: str = path) -> None:
            for rank, gradient in enumerate(answer):
                what = f"gradient of {path} on rank {rank}, where nothing was routed"
                equal(what, gradient, torch.zeros_like(gradient))

        if any(each.numel() for each in rows):
            case.judge(rule, rows, [("ones", [torch.ones_like(each) for each in rows])])


@requirement(
    "EP-06",
    MUST,
    OPERATION,
    "The number of experts MUST be free: the first E mod R ranks have one more, and with fewer "
    "experts than ranks some have none.",
    reason="A rank that takes E / R for everybody's share sends rows to the wrong experts, or to "
    "none. One without experts has nothing to compute and everything to exchange.",
    sources=("vLLM #21497", "vllm-ascend #16384", "vllm-ascend #1223", "TensorCast assign_experts"),
    given=on_ranks(shares=("uneven", "fewer")),
    references=("parallel_steps.held_experts",),
)
def ranks_hold_different_numbers_of_experts(case: Case) -> None:
    """The impostor leaves the last expert out."""
    answer = case.call(OPERATION, **arguments(case))
    last = case["whole"]["expert_ids"] == case["num_experts"] - 1
    judge_outputs(case, answer, {"without the last expert": without(case, last)})


@requirement(
    "EP-07",
    MUST,
    OPERATION,
    "Gradients of x, of the weights and of the local experts MUST be that slice of what one rank "
    "gets for the sum of all losses, neither multiplied nor divided by R.",
    reason="Frameworks average the gradients of replicated parameters over the ranks. An expert is "
    "on one rank, which has seen the tokens of all: its gradient is whole already.",
    sources=("pytorch #160285", "DeepSpeed #5259", "transformers #48687", "torchtitan #2416"),
    given=differentiable(OPERATION, on_ranks(cotangent_layouts=True)),
    references=("ranks.ProcessRanks", "expert_parallel.expert_parallel"),
)
def gradients_are_the_slice_of_one_ranks(case: Case) -> None:
    """Autograd through both ways against autograd on one rank in float64."""
    answer = with_gradients(case)
    note(case)
    judge_gradients(case, gradients_of(case, answer))


@requirement(
    "EP-08",
    MUST,
    OPERATION,
    "Where nothing was routed gradients MUST be zero, not None and not what was in memory: also on "
    "ranks that no row came to.",
    reason="An optimiser that is sharded over the ranks reduces gradients by position. A rank that "
    "has None there leaves the reduction out, and the others wait.",
    sources=("torchtitan #1166", "DeepSpeed #5794", "DeepSpeed #4966", "PaddleFormers #3010"),
    given=differentiable(
        OPERATION, on_ranks(to_one_rank=True, shares=("even", "uneven"), loads=("one expert",))
    ),
    references=("parallel_steps.experts_on_rows",),
)
def gradients_where_nothing_was_routed_are_zero(case: Case) -> None:
    """All pairs go to one rank; every other rank's experts, and idle ones there, get zeros."""
    answer = with_gradients(case)
    note(case)
    used = case["whole"]["expert_ids"].unique().tolist()
    idle = [
        torch.tensor([row for row, e in enumerate(held) if e not in used], dtype=torch.int64)
        for held in case["held"]
    ]
    _judge_zeros(case, gradients_of(case, answer), lambda path: idle)


@requirement(
    "EP-09",
    MUST,
    OPERATION,
    "A pair whose id is below 0, or at or above E, MUST contribute nothing on any rank, whatever "
    "its weight.",
    reason="Padding has such ids. Each is sent nowhere: as an index -1 is the last rank's last "
    "expert, and a bin of its own shifts the splits.",
    sources=("transformers #40545", "transformers #48653", "vLLM #42034"),
    # A pair that is computed with a weight of 0 shows where the weight is on the input.
    given=on_ranks(
        invalid_ids=(True,), weight_on=("output", "input", "input"), copies=(False, True)
    ),
    references=("parallel_steps.expert_places", "placement.physical_ids"),
)
def ids_that_are_nowhere_contribute_nothing(case: Case) -> None:
    """Weights of such pairs are not finite; the impostor counts them as the last expert."""
    ids = case["whole"]["expert_ids"].long()
    gone = (ids < 0) | (ids >= case["num_experts"])
    weights = case["whole"]["weights"]
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=weights.dtype)
    others = {}
    if bool(gone.any()):
        last = ids.masked_fill(gone, case["num_experts"] - 1)
        others["counted as the last expert"] = value_of(case, expert_ids=last)
    spoilt = torch.where(gone, kinds[torch.arange(len(weights)) % 3, None], weights)
    with_whole(case, weights=spoilt)
    case.note("an id that is not here", bool(gone.any()))
    answer = case.call(OPERATION, **arguments(case))
    judge_outputs(case, answer, others)


@requirement(
    "EP-10",
    MUST,
    OPERATION,
    "Two equal ids in a row MUST both be counted, and so MUST two pairs of a token that go to the "
    "same rank.",
    reason="A token may be sent once to a rank that has two of its experts, and is then easily "
    "weighted once.",
    sources=("DeepSeek-V2 moe_infer: cnts.scatter_", "DeepEP #112"),
    given=on_ranks(least_k=2, loads=("duplicates",), grad_modes=ANY_MODE),
    references=("dispatch.dispatch",),
)
def equal_ids_travel_twice(case: Case) -> None:
    """The last id of every token is made equal to the first."""
    ids = case["whole"]["expert_ids"].clone()
    if ids.shape[1] > 1:
        ids[:, -1] = ids[:, 0]
    with_whole(case, expert_ids=ids)
    answer = case.call(OPERATION, **arguments(case))
    once = torch.zeros_like(ids, dtype=torch.bool)
    once[:, -1] = ids.shape[1] > 1
    judge_outputs(case, answer, {"counted once": without(case, once)})


@requirement(
    "EP-11",
    MUST,
    OPERATION,
    "All pairs MUST be computed, also where all of them go to one rank.",
    reason="Routing is skewed most when it matters. Buffers for an even share, or for a capacity "
    "that nobody asked for, drop pairs or end in memory of others.",
    sources=("TensorCast MoE layer", "Megatron #1877", "DeepSpeed #8155", "DeepSpeed #5353"),
    given=on_ranks(to_one_rank=True, counts=("equal", "unequal")),
    references=("parallel_steps.exchange_counts",),
)
def one_rank_gets_everything(case: Case) -> None:
    """The impostor drops what goes beyond an even share of all pairs."""
    answer = case.call(OPERATION, **arguments(case))
    ids = case["whole"]["expert_ids"]
    pairs = torch.arange(ids.numel()).view_as(ids)
    beyond = pairs >= -(-ids.numel() // len(case["ranks"]))
    judge_outputs(case, answer, {"an even share each": without(case, beyond)})


def second(case: Case) -> None:
    """Other tokens in other numbers, with the same experts on the same ranks."""
    given = case["whole"]
    counts = counts_of(case)
    counts = [*counts[1:], counts[0]]
    if len(set(counts)) == 1:
        counts[0], counts[-1] = counts[0] - 1, counts[-1] + 1
    made = {
        "x": given["x"].flip(0) * 0.5,
        "weights": given["weights"].flip(0),
        "expert_ids": given["expert_ids"].flip(0).flip(1),
        "experts": given["experts"],
    }
    case.inputs["whole"] = made
    case.inputs["ranks"] = cut(made, counts, case["held"])


@requirement(
    "EP-12",
    MUST,
    OPERATION,
    "A second call on the same group with other numbers of tokens MUST be right, and leave the "
    "first answer as it was.",
    reason="Splits, buffers and handles are kept between steps to save an exchange, and then "
    "belong to other tokens.",
    sources=("xtuner #2053", "KernelBench result_reuse"),
    given=on_ranks(counts=("unequal", "equal", "one idle")),
    references=SHOWN,
)
def a_second_call_is_right(case: Case) -> None:
    """Both answers are judged; the first is read again after the second call."""
    first_ranks, first = case["ranks"], case.planned(OPERATION, **arguments(case))
    expected = oracle_of(case)
    counts = counts_of(case)
    second(case)
    answers = case.session([first, case.planned(OPERATION, **arguments(case))])
    outputs = outputs_of(answers[0], first_ranks)
    wrong = [
        (name, list(value.split(counts)))
        for name, value in impostors(expected.value, scale_of(expected))
    ]
    case.judge(close_on_ranks(expected, counts), outputs, wrong)
    judge_outputs(case, answers[1])

    def rule(again: Tensors) -> None:
        for rank, (before, after) in enumerate(zip(outputs, again, strict=True)):
            equal(f"the first output of rank {rank}, read again", after, before)

    other = [torch.where(each == 0, 1.0, 0.0).to(each.dtype) for each in outputs]
    case.judge(rule, answers[0].afterwards, [("overwritten", other)])


def written_over(case: Case) -> None:
    """As many other tokens, other experts, and the copies of each expert on other ranks."""
    given, placement = case["whole"], case["placement"]
    if placement is not None:
        ranks, experts = len(case["ranks"]), case["num_experts"]
        # Tables of the same size: experts change their names, and ranks their places.
        placement = Placement(
            physical_to_logical=experts - 1 - placement.physical_to_logical,
            logical_to_physical=placement.logical_to_physical.flip(0),
            replica_count=placement.replica_count.flip(0),
            rank_of_physical=(placement.rank_of_physical + 1) % ranks,
        )
    made = {
        "x": given["x"].flip(0) * 0.5,
        "weights": given["weights"].flip(0),
        "expert_ids": given["expert_ids"].flip(0),
        "experts": replace_tensors(given["experts"], lambda _, tensor: -tensor.flip(0)),
    }
    counts = counts_of(case)
    held = held_by_ranks(case["num_experts"], len(counts), placement)
    case.inputs |= {
        "whole": made,
        "placement": placement,
        "held": held,
        "ranks": cut(made, counts, held),
    }


@requirement(
    "EP-29",
    MUST,
    OPERATION,
    "A second call whose tokens, weights and placement are written over those of the first MUST "
    "be right.",
    reason="A server that moves copies rewrites its maps and weights in place, and an optimizer "
    "its weights: what was looked up or prepared for them belongs to what they were.",
    sources=("vllm-ascend #4793", "SGLang #18213", "SGLang #25852", "KernelBench result_reuse"),
    given=on_ranks(copies=(True, True, False), grad_modes=ANY_MODE),
    references=("placement.physical_ids", *SHOWN),
)
def nothing_is_kept_of_what_is_written_over(case: Case) -> None:
    """The same objects with other contents; the impostors have the old weights and the old ids."""
    first = case.planned(OPERATION, **arguments(case))
    before = dict(case["whole"])
    written_over(case)
    answers = case.session([first, case.planned(OPERATION, **arguments(case), reuse=0)])
    others = {
        f"the {name} of before": value_of(case, **{name: before[name]})
        for name in ("experts", "expert_ids")
    }
    judge_outputs(case, answers[1], others)


@requirement(
    "EP-30",
    MUST,
    OPERATION,
    "With many tokens on a rank, or on all, each rank's output MUST be what one rank with all "
    "experts computes for its tokens.",
    reason="Counts that travel are narrow, and buffers have a size: what is beyond it is lost "
    "without a word.",
    sources=("DeepEP #112", "docs/spec/expert_parallel.md"),
    given=on_ranks(counts=("many",), loads=("uniform", "skewed"), copies=(False, False, True)),
    references=SHOWN,
)
def many_tokens_of_a_rank_are_all_computed(case: Case) -> None:
    """65, 129 or 257 tokens of the first rank; judged as EP-01 is."""
    every_rank_gets_what_one_rank_computes(case)


@requirement(
    "EP-13",
    MUST,
    OPERATION,
    "The same tokens MUST get the same outputs however they are spread over the ranks.",
    reason="What a token gets depends on nothing but the token. Statistics of a rank's own tokens, "
    "and drops by position, make it depend on its neighbours.",
    sources=("Megatron #1421", "vLLM #16801"),
    given=exact_on_ranks(counts=("unequal", "one busy", "one idle")),
    references=SHOWN,
)
def the_cut_into_ranks_does_not_matter(case: Case) -> None:
    """Two calls with the same tokens in two cuts; on small integers they agree to the bit."""
    first = case.planned(OPERATION, **arguments(case))
    ranks, total = case["ranks"], sum(counts_of(case))
    size = len(ranks)
    counts = [total // size + (rank >= size - total % size) for rank in range(size)]
    evenly = cut(case["whole"], counts, case["held"])
    answers = case.session([first, case.planned(OPERATION, **arguments(case, ranks=evenly))])
    one = torch.cat(outputs_of(answers[0], ranks))
    other = torch.cat(outputs_of(answers[1], evenly))
    note(case)

    def rule(found: torch.Tensor) -> None:
        equal("outputs of the same tokens, in another cut", found, one)

    case.judge(rule, other, impostors(one, 1.25))


@requirement(
    "EP-14",
    MUST,
    OPERATION,
    "A placement MUST NOT change any output: each physical expert is a copy of a logical one, on "
    "the rank that the placement says.",
    reason="Copies are there to spread the load. Ids that are taken for physical ones, a copy "
    "looked up on the wrong rank, and padding taken for a copy give another expert's output.",
    sources=(
        "SGLang #18213",
        "SGLang #12866",
        "SGLang #22525",
        "vllm-ascend #4793",
        "vllm-ascend #5311",
        "vLLM #28377",
    ),
    given=on_ranks(copies=(True,), grad_modes=ANY_MODE),
    references=("placement.physical_ids", "parallel_steps.held_experts"),
)
def a_placement_changes_no_output(case: Case) -> None:
    """The impostor takes ids for physical ones."""
    answer = case.call(OPERATION, **arguments(case))
    logical = case["placement"].physical_to_logical
    ids = case["whole"]["expert_ids"].long()
    here = (ids >= 0) & (ids < len(logical))
    taken_for = logical[ids.clamp(0, len(logical) - 1)].where(here, -1)
    judge_outputs(case, answer, {"ids taken as physical": value_of(case, expert_ids=taken_for)})


@requirement(
    "EP-15",
    MUST,
    OPERATION,
    "The gradients of an expert's copies MUST add up to the gradient of the expert.",
    reason="Each copy has the gradient of the pairs that it computed. A copy that has the sum "
    "already counts it once more when the copies are reduced.",
    sources=("pytorch #160285", "DeepSpeed #5259"),
    given=differentiable(OPERATION, on_ranks(copies=(True,))),
    references=("placement.physical_ids",),
)
def gradients_of_copies_add_up(case: Case) -> None:
    """The copies' gradients are added by expert, and judged as those of one rank."""
    answer = with_gradients(case)
    note(case)
    found = gradients_of(case, answer)
    judge_gradients(case, {path: found[path] for path in ("x", "weights")})
    right = gradient_limits(case)
    for path, gradients in found.items():
        if path.startswith("local."):
            total = [copies_together(case, gradients)]
            hold_gradients(case, path, total, [right[whole_path(path)]], ", all copies together")


@requirement(
    "EP-16",
    MUST,
    OPERATION,
    "On every rank inputs MUST NOT be changed, outputs MUST NOT share memory with them, and "
    "torch's global state MUST stay.",
    reason="A row that is sent is easily multiplied in place, and x goes on into the residual.",
    sources=("TensorCast topk_weights /=", "KernelBench zero_out", "vLLM #16801"),
    given=on_ranks(copies=(False, True), weight_on=("output", "input")),
    references=SHOWN,
)
def inputs_of_all_ranks_are_left_alone(case: Case) -> None:
    """Every argument of every rank is compared with a copy made before the call."""
    answer = case.call(OPERATION, **arguments(case))
    note(case)
    found = answer.changed + answer.shared + answer.state
    case.judge(left_alone(OPERATION), found, [("one", ["one"])])


def _one_more(experts: ExpertWeights) -> ExpertWeights:
    def longer(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_ones(1, *tensor.shape[1:])])

    made: ExpertWeights = replace_tensors(experts, longer)
    return made


@requirement(
    "EP-17",
    MUST,
    OPERATION,
    "Arguments that do not fit MUST raise on the rank that has them: shapes, float ids, and a "
    "number of local experts that is not this rank's.",
    reason="What is refused before the first exchange names its reason. What is not leaves every "
    "rank in a collective with other sizes, where it hangs or ends in memory of others.",
    sources=("docs/spec/operations.md", "flashinfer #1469"),
    given=on_ranks(counts=("equal", "unequal")),
    references=SHOWN,
)
def arguments_that_do_not_fit_raise_on_every_rank(case: Case) -> None:
    """Each bad call is made on all ranks, and all of them have to raise."""
    case.call(OPERATION, layouts={}, **arguments(case))

    def each(change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        return [rank | change(rank) for rank in case["ranks"]]

    bad = {
        "x with three dimensions": each(lambda rank: {"x": rank["x"][None]}),
        "one column of weights too many": each(
            lambda rank: {"weights": torch.cat([rank["weights"], rank["weights"][:, :1]], 1)}
        ),
        "ids that are no integers": each(lambda rank: {"expert_ids": rank["expert_ids"].float()}),
        "one local expert too many": each(lambda rank: {"local": _one_more(rank["local"])}),
        "x wider than the experts": each(
            lambda rank: {"x": torch.cat([rank["x"], rank["x"][:, :1]], 1)}
        ),
    }
    everybody = list(range(len(case["ranks"])))
    note(case)
    for name, ranks in bad.items():
        answer = case.attempt(
            [case.planned(OPERATION, layouts={}, **arguments(case, ranks=ranks))]
        )[0]

        def rule(error: dict[str, Any] | None, name: str = name) -> None:
            if error is None or error["ranks"] != everybody:
                came = "none raised" if error is None else f"only {error['ranks']} raised"
                raise Violation(f"{name}: expected an exception on every rank, {came}")
            if not error["unsupported"] and error["type"] not in ("ValueError", "TypeError"):
                raise Violation(
                    f"{name}: expected ValueError or TypeError, got {error['type']}: "
                    f"{error['message'][:200]}"
                )

        case.judge(rule, answer.error, [("a result", None)])


@requirement(
    "EP-18",
    MUST,
    OPERATION,
    "Ranks MUST be counted in the group that is given, which need not be all processes.",
    reason="With pipeline or data parallelism around it the experts' group is a part of the world: "
    "a rank's number there is another, and those outside are not called.",
    sources=("torchtitan #2842", "torchtitan #2416"),
    given=on_ranks(part_of_world=(True,)),
    references=("ranks.ProcessRanks",),
)
def ranks_are_counted_in_their_group(case: Case) -> None:
    """Some processes of a larger world call, and none of them has its number in the world."""
    answer = case.call(OPERATION, **arguments(case))
    case.note(f"a group of {len(case['members'])} out of {case['world_size']}")
    elsewhere = ranks_of_pairs(case) != owners(case)[:, None]
    judge_outputs(case, answer, {"without the other ranks": without(case, elsewhere)})
