"""Requirements on slices of experts and their placement: who holds what.

Dimension key: E experts, H hidden size, I intermediate size, R ranks, P physical experts, X copies
of one expert at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import ExpertWeights, Placement

from moe_conformance.case import IDS, Answer, Case, must_raise
from moe_conformance.inputs.expert_slicing import LOADS, cut, placed, shares, sliced
from moe_conformance.inputs.given import Content, differentiable
from moe_conformance.judge import Violation, equal, has_form
from moe_conformance.registry import MUST, SHOULD, requirement

ASSIGN = ("expert_slicing.assign_experts",)
SLICE = ("expert_slicing.slice_experts",)
CUT = ("expert_slicing.slice_tensor_parallel",)
PLACE = ("placement.place_experts",)
FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
Shares = list[tuple[int, int]]
Weights = dict[str, torch.Tensor | None]


# assign_experts


def _shares(case: Case) -> Shares:
    """Start and count of each rank."""
    num_experts, world_size = case["num_experts"], case["world_size"]
    calls = [
        case.planned("assign_experts", num_experts=num_experts, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    case.note("fewer experts than ranks", num_experts < world_size)
    case.note("the ranks divide the experts", num_experts % world_size == 0)
    return [_share(answer) for answer in case.session(calls)]


def _share(answer: Answer) -> tuple[int, int]:
    found = answer.outputs
    if isinstance(found, list):
        found = [int(v) if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in found]
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in found)
    ):
        raise Violation(f"assign_experts: expected start and count, got {found!r}")
    return found[0], found[1]


def _by_hand(num_experts: int, world_size: int) -> list[int]:
    """How many experts each rank gets, dealt out one by one."""
    return [len(range(rank, num_experts, world_size)) for rank in range(world_size)]


@requirement(
    "SLICE-01",
    MUST,
    "assign_experts",
    "The shares of the ranks MUST follow one upon the other from 0 to E.",
    reason="An expert between two shares answers nobody; one in two shares answers twice.",
    sources=("TensorCast assign_experts", "vLLM determine_expert_map", "vLLM #21497"),
    given=shares(),
    references=ASSIGN,
)
def the_shares_partition_the_experts(case: Case) -> None:
    """Every rank starts where the one before it ends; the last one ends at E."""
    num_experts = case["num_experts"]

    def rule(found: Shares) -> None:
        after = 0
        for rank, (start, count) in enumerate(found):
            if count < 0 or (count > 0 and start != after):
                raise Violation(
                    f"rank {rank}: expected a share that starts at {after}, got start {start} and "
                    f"count {count}"
                )
            after += count
        if after != num_experts:
            raise Violation(f"expected {num_experts} experts on all ranks together, got {after}")

    found = _shares(case)
    *head, (start, count) = found
    wrong = [("one expert too many", [*head, (start, count + 1)])]
    wrong.append(("moved by one", [(start + 1, count) for start, count in found]))
    case.judge(rule, found, wrong)


@requirement(
    "SLICE-02",
    MUST,
    "assign_experts",
    "The first E mod R ranks MUST get one expert more than the others.",
    reason="Ranks that compute the split of a collective by themselves have to agree on it.",
    sources=("TensorCast assign_experts", "vLLM determine_expert_map", "vllm-ascend #16384"),
    given=shares(),
    references=ASSIGN,
)
def the_first_ranks_take_the_rest(case: Case) -> None:
    """The counts, rank by rank; a rank may get none."""
    expected = _by_hand(case["num_experts"], case["world_size"])
    found = [count for _, count in _shares(case)]

    def rule(counts: list[int]) -> None:
        if counts != expected:
            raise Violation(f"counts: expected {expected}, got {counts}")

    case.judge(rule, found, [("one more each", [count + 1 for count in expected])])


@requirement(
    "SLICE-03",
    MUST,
    "assign_experts",
    "No rank, a rank that there is not, a negative number of experts, and what is no whole number "
    "MUST raise.",
    reason="A rank counted from 1 takes its neighbour's experts, and the last one's do not exist.",
    sources=("docs/spec/operations.md", "TensorCast ZeroDivisionError"),
    given=shares(),
    references=ASSIGN,
)
def a_share_that_cannot_be_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    good = {"num_experts": case["num_experts"], "world_size": case["world_size"], "rank": 0}
    must_raise(
        case,
        "assign_experts",
        good,
        {
            "rank R": good | {"rank": case["world_size"]},
            "rank -1": good | {"rank": -1},
            "no rank": good | {"world_size": 0},
            "-1 experts": good | {"num_experts": -1},
            "experts that are a float": good | {"num_experts": float(case["num_experts"])},
            "half an expert more": good | {"num_experts": case["num_experts"] + 0.5},
            "ranks that are a float": good | {"world_size": float(case["world_size"])},
            "a rank that is no whole number": good | {"rank": 0.0},
        },
    )


# slice_experts


def _weights(operation: str, answer: Answer) -> Weights:
    """The fields of an answer that has to be `ExpertWeights`."""
    found = answer.outputs
    if not isinstance(found, dict) or not set(FIELDS) <= set(found):
        raise Violation(f"{operation}: expected ExpertWeights, got {type(found).__name__}")
    return {name: found[name] for name in FIELDS}


def _slice(case: Case, **changed: Any) -> tuple[Weights, Answer]:
    given = {name: case[name] for name in ("experts", "start", "count")}
    answer = case.call("slice_experts", **given, **changed)
    case.note("no expert", case["count"] == 0)
    case.note("all experts", case["count"] == len(case["experts"].down))
    return _weights("slice_experts", answer), answer


def _rows(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[case["start"] : case["start"] + case["count"]]


def _judge_fields(case: Case, found: Weights, names: tuple[str, ...]) -> None:
    for name in names:
        whole = getattr(case["experts"], name)
        expected = None if whole is None else _rows(case, whole)

        def rule(answer: torch.Tensor | None, name: str = name, expected: Any = expected) -> None:
            _same(name, answer, expected)

        wrong: list[tuple[str, Any]] = [("a tensor", torch.zeros(1))]
        if expected is not None:
            wrong = [("None", None)]
            wrong += [] if whole.shape == expected.shape else [("the whole", whole)]
        case.judge(rule, found[name], wrong)


def _judge_copies(case: Case, name: str, answers: list[Answer]) -> None:
    """Whether a field of the answers has memory that no argument has."""

    def rule(shared: list[str]) -> None:
        if shared:
            raise Violation(f"{name}: expected a copy, got shared memory: {shared[0]}")

    found = [each for a in answers for each in a.shared if each.startswith(f"{name} and ")]
    case.judge(rule, found, [("a view", [f"{name} and experts.{name}"])])


def _same(what: str, found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """To the bit, and None where there is none."""
    if expected is None:
        if found is not None:
            raise Violation(f"{what}: expected None where there is none, got a tensor")
        return
    has_form(what, found, tuple(expected.shape), (expected.dtype,))
    assert isinstance(found, torch.Tensor)
    equal(what, found, expected)


@requirement(
    "SLICE-04",
    MUST,
    "slice_experts",
    "The weights of the slice MUST be those of the experts from start on, in their dtype.",
    reason="One expert off, and every token is answered by its neighbour's expert.",
    sources=("TensorCast slice_experts", "vLLM determine_expert_map"),
    given=sliced(),
    references=SLICE,
    kinds=2,
)
def a_slice_holds_its_own_experts(case: Case) -> None:
    """gate_up and down, to the bit, for any strides."""
    _judge_fields(case, _slice(case)[0], ("gate_up", "down"))


@requirement(
    "SLICE-05",
    MUST,
    "slice_experts",
    "The biases MUST be sliced with the weights, in their dtype and as copies; where there are "
    "none, there are none.",
    reason="Whole biases beside sliced weights are read at the first rank's rows on every rank.",
    sources=("TensorCast slice_experts", "gpt-oss model code"),
    given=sliced(least_experts=2),
    references=SLICE,
)
def the_biases_are_sliced_too(case: Case) -> None:
    """gate_up_bias and down_bias, to the bit; neither shares memory with what it is sliced from."""
    experts: ExpertWeights = case["experts"]
    found, answer = _slice(case)
    biases = ("gate_up_bias", "down_bias")
    present = [bias for name in biases if (bias := getattr(experts, name)) is not None]
    case.note("biases", bool(present))
    case.note("biases in a dtype of their own", any(b.dtype != experts.down.dtype for b in present))
    _judge_fields(case, found, biases)
    for name in biases:
        _judge_copies(case, name, [answer])


@requirement(
    "SLICE-06",
    MUST,
    "slice_experts",
    "A slice of no experts MUST have weights with no rows.",
    reason="With more ranks than experts the last ranks hold none, and still take part.",
    sources=("TensorCast assign_experts", "DeepSpeed #5066"),
    given=sliced(most_count=0),
    references=SLICE,
)
def a_slice_may_be_empty(case: Case) -> None:
    """The shapes of the other dimensions stay."""
    _judge_fields(case, _slice(case)[0], FIELDS)


@requirement(
    "SLICE-07",
    MUST,
    "slice_experts",
    "Gradients MUST reach the rows that were taken, and be zero in all others.",
    reason="Sharding a model that is trained must not cut it off from its parameters.",
    sources=("TensorCast slice_experts (.data)", "pytorch #160285"),
    given=differentiable("slice_experts", sliced()),
    references=SLICE,
    kinds=4,
)
def gradients_reach_the_experts_that_were_taken(case: Case) -> None:
    """Cotangents of small integers come back where the rows came from."""
    experts: ExpertWeights = case["experts"]
    present = [name for name in FIELDS if getattr(experts, name) is not None]
    content = Content(len(present))
    cotangents, expected = {}, {}
    for name in present:
        whole = getattr(experts, name)
        cotangents[name] = content.integers(-3, 3, *_rows(case, whole).shape).double()
        expected[name] = torch.zeros(whole.shape, dtype=torch.float64)
        _rows(case, expected[name]).copy_(cotangents[name])
    wrt = [f"experts.{name}" for name in present]
    answer = _slice(case, wrt=wrt, cotangents=cotangents)[1]
    for name in present:
        _judge_gradient(case, name, answer.gradients[f"experts.{name}"], expected[name])


def _judge_gradient(
    case: Case, name: str, found: torch.Tensor | None, expected: torch.Tensor
) -> None:
    def rule(gradient: torch.Tensor | None) -> None:
        if gradient is None:
            raise Violation(f"gradient of {name}: expected a tensor, got None")
        equal(f"gradient of {name}", gradient.double(), expected)

    case.judge(rule, found, [("None", None), ("one more", expected + 1)])


@requirement(
    "SLICE-08",
    MUST,
    "slice_experts",
    "Experts that there are not, and weights that do not fit each other, MUST raise.",
    reason="Python cuts a slice off at the end; the rank then has fewer experts than its map says.",
    sources=("docs/spec/operations.md", "mistral.rs shard loaders"),
    given=sliced(),
    references=SLICE,
)
def a_slice_past_the_end_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    experts = case["experts"]
    count = len(experts.down)
    good = {"experts": experts, "start": 0, "count": count}
    bad = {
        "one expert too many": good | {"count": count + 1},
        "from behind the end": good | {"start": count + 1, "count": 1},
        "a negative start": good | {"start": -1, "count": 1},
        "a negative count": good | {"count": -1},
        "the last one and one more": good | {"start": count - 1, "count": 2},
        "a start that is no whole number": good | {"start": 0.0},
        "a count that is no whole number": good | {"count": float(count)},
    }
    bad |= {name: good | {"experts": other} for name, other in _misfits(experts)}
    must_raise(case, "slice_experts", good, bad)


def _misfits(experts: ExpertWeights) -> Iterator[tuple[str, ExpertWeights]]:
    """The weights with one of them larger than the others allow, or short of an expert."""
    for name in FIELDS:
        tensor = getattr(experts, name)
        if tensor is None:
            continue
        yield f"{name} of one expert less", replace(experts, **{name: tensor[:-1]})
        for dimension, of in enumerate(("expert", "row", "column")[: tensor.ndim]):
            # With I = 1 a row or a column more may stand for a gate, or for none.
            if of == ("row" if name == "gate_up" else "column") and experts.down.shape[2] == 1:
                continue
            longer = torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dimension)
            yield f"{name} of one {of} more", replace(experts, **{name: longer})


# slice_tensor_parallel


def _parts(case: Case) -> list[Weights]:
    """The slices of all ranks."""
    return [_weights("slice_tensor_parallel", answer) for answer in _answers(case)]


def _answers(case: Case) -> list[Answer]:
    calls = [
        case.planned(
            "slice_tensor_parallel",
            experts=case["experts"],
            world_size=case["world_size"],
            rank=rank,
        )
        for rank in range(case["world_size"])
    ]
    case.note("one rank", case["world_size"] == 1)
    case.note("a gate", case["gated"])
    return case.session(calls)


def _codes(part: Weights, rank: int) -> torch.Tensor:
    """Which of the I columns of down a rank has: [I_r], by what the columns say."""
    down = part["down"]
    if not isinstance(down, torch.Tensor) or down.ndim != 3 or 0 in down.shape[:2]:
        raise Violation(f"rank {rank}: down: expected [E, H, I / R], got {_shape(down)}")
    return down[0, 0].double()


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _whole(case: Case) -> Weights:
    return {name: getattr(case["experts"], name) for name in FIELDS}


def _taken(case: Case, rank: int, codes: torch.Tensor) -> Weights:
    """The rows and columns of these numbers, gate and up each."""
    experts: ExpertWeights = case["experts"]
    inner = experts.down.shape[2]
    known = torch.arange(inner, dtype=torch.float64)
    if not bool(torch.isin(codes, known).all()):
        raise Violation(f"rank {rank}: down: expected columns of the whole, got others")
    index = codes.long()
    both = torch.cat([index, index + inner]) if case["gated"] else index
    bias = experts.gate_up_bias
    return {
        "gate_up": experts.gate_up[:, both],
        "down": experts.down[:, :, index],
        "gate_up_bias": None if bias is None else bias[:, both],
        "down_bias": _output_bias(case, rank),
    }


def _check_part(case: Case, rank: int, part: Weights, names: tuple[str, ...]) -> None:
    expected = _taken(case, rank, _codes(part, rank))
    for name in names:
        _same(f"rank {rank}: {name}", part[name], expected[name])


def _cut_as_one(case: Case) -> Iterator[tuple[str, list[Weights]]]:
    """Slices of gate_up that are cut without regard to its halves, and the whole everywhere."""
    yield "the whole on two ranks", [_whole(case)] * max(2, case["world_size"])
    if case["gated"] and case["world_size"] > 1:
        experts: ExpertWeights = case["experts"]
        count = case["world_size"]
        biases: tuple[torch.Tensor | None, ...] = (None,) * count
        if experts.gate_up_bias is not None:
            biases = experts.gate_up_bias.chunk(count, 1)
        yield (
            "gate_up cut as one tensor",
            [
                {"gate_up": rows, "down": columns, "gate_up_bias": bias, "down_bias": None}
                for rows, columns, bias in zip(
                    experts.gate_up.chunk(count, 1),
                    experts.down.chunk(count, 2),
                    biases,
                    strict=True,
                )
            ],
        )


@requirement(
    "SLICE-09",
    MUST,
    "slice_tensor_parallel",
    "Every one of the I rows MUST be on exactly one rank, as many on each where R divides I.",
    reason="A row on no rank is lost to the sum over ranks, one on two ranks is counted twice.",
    sources=("Megatron-LM (arXiv 1909.08053)", "mistral.rs FusedExperts", "vLLM #49122"),
    given=cut(),
    references=CUT,
)
def every_row_is_on_one_rank(case: Case) -> None:
    """The columns of down, which say which one they are, counted over all ranks."""
    inner, count = case["experts"].down.shape[2], case["world_size"]

    def rule(found: list[Weights]) -> None:
        codes = [_codes(part, rank) for rank, part in enumerate(found)]
        held = Counter(torch.cat(codes).tolist())
        wrong = [i for i in range(inner) if held[float(i)] != 1]
        if wrong or len(held) != inner:
            times = held[float(wrong[0])] if wrong else 0
            what = f"row {wrong[0]} on {times}" if wrong else "rows that there are not"
            raise Violation(f"expected each of {inner} rows on one rank, got {what}")
        sizes = [len(each) for each in codes]
        if sizes != [inner // count] * count:
            raise Violation(f"expected {inner // count} rows on every rank, got {sizes}")

    case.judge(rule, _parts(case), [("the whole twice", [_whole(case)] * (count + 1))])


@requirement(
    "SLICE-10",
    MUST,
    "slice_tensor_parallel",
    "Gate and up MUST each be cut, the same rows of both, and the same columns of down.",
    reason="Cut as one tensor, gate_up gives the first ranks nothing but gates.",
    sources=("hanzo-engine load_fused_stacked", "mistral.rs fused experts", "SGLang #15432"),
    given=cut(),
    references=CUT,
)
def gate_up_and_down_are_cut_alike(case: Case) -> None:
    """Each rank's rows of gate_up, by the numbers of its columns of down."""

    def rule(found: list[Weights]) -> None:
        for rank, part in enumerate(found):
            _check_part(case, rank, part, ("gate_up", "down"))

    found = _parts(case)
    wrong = [(name, each) for name, each in _cut_as_one(case) if "cut" in name]
    gate_up = found[0]["gate_up"]
    if isinstance(gate_up, torch.Tensor):
        wrong.append(("zeros", [{**found[0], "gate_up": torch.zeros_like(gate_up) - 1}]))
    case.judge(rule, found, wrong)


@requirement(
    "SLICE-11",
    MUST,
    "slice_tensor_parallel",
    "The bias of gate_up MUST be cut as gate_up is.",
    reason="A whole bias does not fit, and one cut as one tensor fits and is wrong.",
    sources=("gpt-oss model code", "hanzo-engine load_fused_stacked"),
    given=cut(bias=True, biases=("both", "gate_up")),
    references=CUT,
)
def the_bias_of_gate_up_is_cut_alike(case: Case) -> None:
    """Each rank's entries, by the numbers of its columns of down."""

    def rule(found: list[Weights]) -> None:
        for rank, part in enumerate(found):
            _check_part(case, rank, part, ("gate_up_bias",))

    found = _parts(case)
    wrong = [(name, each) for name, each in _cut_as_one(case) if "cut" in name]
    wrong.append(("no bias", [{**part, "gate_up_bias": None} for part in found]))
    case.judge(rule, found, wrong)


@requirement(
    "SLICE-12",
    MUST,
    "slice_tensor_parallel",
    "The bias of down MUST be whole on rank 0 and zero on all others, as copies.",
    reason="The outputs of the ranks are added up: on every rank, it is added R times.",
    sources=("Megatron-LM RowParallelLinear", "vLLM #49378", "SGLang #35535"),
    given=cut(bias=True, biases=("both", "down")),
    references=CUT,
)
def the_output_bias_is_on_rank_0(case: Case) -> None:
    """The values; a zero may have either sign. None of them shares memory with the whole."""
    whole = case["experts"].down_bias

    def rule(found: list[Weights]) -> None:
        for rank, part in enumerate(found):
            _same(f"rank {rank}: down_bias", part["down_bias"], _output_bias(case, rank))

    answers = _answers(case)
    found = [_weights("slice_tensor_parallel", answer) for answer in answers]
    everywhere = [{**part, "down_bias": whole} for part in found]
    nowhere = [{**part, "down_bias": torch.zeros_like(whole)} for part in found]
    wrong = [("on no rank", nowhere)]
    if case["world_size"] > 1:
        wrong.append(("on every rank", everywhere))
    case.judge(rule, found, wrong)
    _judge_copies(case, "down_bias", answers)


def _output_bias(case: Case, rank: int) -> torch.Tensor | None:
    whole: torch.Tensor | None = case["experts"].down_bias
    return whole if whole is None or rank == 0 else torch.zeros_like(whole)


@requirement(
    "SLICE-13",
    MUST,
    "slice_tensor_parallel",
    "Where R does not divide I, the slices MUST be right all the same, or be refused.",
    reason="Rounded down, the last rows are on no rank: nothing fails, and the model is worse.",
    sources=("vLLM #48173", "vLLM #44763", "ATOM #1944"),
    given=cut(even=False, ranks=(2, 9)),
    references=CUT,
    kinds=2,
)
def an_uneven_cut_is_right_or_refused(case: Case) -> None:
    """A ValueError on any rank is a refusal."""
    experts: ExpertWeights = case["experts"]
    inner, count = experts.down.shape[2], case["world_size"]
    found: list[Weights] = []
    refused = False
    for rank in range(count):
        given = {"experts": experts, "world_size": count, "rank": rank}
        answer = case.attempt([case.planned("slice_tensor_parallel", **given)])[0]
        if answer.error is not None:
            if not answer.error["unsupported"] and answer.error["type"] != "ValueError":
                kind, message = answer.error["type"], answer.error["message"]
                raise Violation(f"slice_tensor_parallel raised {kind}: {message}", kind="crash")
            refused = True
            break
        found.append(_weights("slice_tensor_parallel", answer))
    case.note("refused", refused)
    case.note("fewer rows than ranks", inner < count)

    def rule(parts: list[Weights] | None) -> None:
        held: Counter[float] = Counter()
        for rank, part in enumerate(parts or ()):
            _check_part(case, rank, part, FIELDS)
            held.update(_codes(part, rank).tolist())
        if parts is not None and held != Counter(map(float, range(inner))):
            missing = next(i for i in range(inner) if held[float(i)] != 1)
            raise Violation(f"expected row {missing} on one rank, got {held[float(missing)]}")

    # Rounded down: the first inner // count · count rows, shared out evenly.
    share = inner // count
    cuts = [torch.arange(rank * share, (rank + 1) * share).double() for rank in range(count)]
    wrong = [_taken(case, rank, codes) for rank, codes in enumerate(cuts)]
    case.judge(rule, None if refused else found, [("rounded down", wrong)])


@requirement(
    "SLICE-14",
    MUST,
    "slice_tensor_parallel",
    "Gradients MUST reach the rows that were taken, and be zero in all others.",
    reason="Sharding a model that is trained must not cut it off from its parameters.",
    sources=("pytorch #160285", "TensorCast slice_experts (.data)"),
    given=differentiable("slice_tensor_parallel", cut()),
    references=CUT,
)
def gradients_reach_the_rows_that_were_taken(case: Case) -> None:
    """A rank's cotangent is its own slice of small integers: the gradients add up to the whole.

    Slices of other weights than the case's, so that gate and up, exchanged, are other numbers.
    """
    experts: ExpertWeights = case["experts"]
    fields = {name: getattr(experts, name) for name in FIELDS}
    present = [name for name, each in fields.items() if each is not None]
    content = Content(len(present))
    whole = {name: content.integers(-3, 3, *fields[name].shape) for name in present}
    whole = {name: each.to(fields[name].dtype) for name, each in whole.items()}
    totals = {name: torch.zeros(each.shape, dtype=torch.float64) for name, each in whole.items()}
    missing = set()
    for rank in range(case["world_size"]):
        given = {"experts": experts, "world_size": case["world_size"], "rank": rank}
        sliced_whole = given | {"experts": replace(experts, **whole)}
        part = _weights("slice_tensor_parallel", case.call("slice_tensor_parallel", **sliced_whole))
        cotangents = {name: each for name, each in part.items() if each is not None}
        if "down_bias" in cotangents:
            # Zero on the other ranks, where a gradient has to be seen all the same.
            cotangents["down_bias"] = whole["down_bias"]
        wrt = [f"experts.{name}" for name in present]
        answer = case.call("slice_tensor_parallel", **given, wrt=wrt, cotangents=cotangents)
        for name, total in totals.items():
            gradient = answer.gradients[f"experts.{name}"]
            # The output bias of the other ranks is a zero that belongs to nothing.
            if gradient is None and (name != "down_bias" or rank == 0):
                missing.add(name)
            total += 0 if gradient is None else gradient.double()
    for name, total in totals.items():
        found = None if name in missing else total
        _judge_gradient(case, name, found, whole[name].double())


@requirement(
    "SLICE-15",
    MUST,
    "slice_tensor_parallel",
    "No rank, a rank that there is not, and weights that do not fit each other MUST raise.",
    reason="A shard of half a checkpoint loads without an error and answers without sense.",
    sources=("docs/spec/operations.md", "mistral.rs Shard::Simple"),
    given=cut(),
    references=CUT,
)
def a_cut_that_cannot_be_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    experts: ExpertWeights = case["experts"]
    good = {"experts": experts, "world_size": case["world_size"], "rank": 0}
    bad = {
        "rank R": good | {"rank": case["world_size"]},
        "rank -1": good | {"rank": -1},
        "no rank": good | {"world_size": 0},
        "a rank that is no whole number": good | {"rank": 0.0},
        "ranks that are a float": good | {"world_size": float(case["world_size"])},
    }
    bad |= {name: good | {"experts": other} for name, other in _misfits(experts)}
    must_raise(case, "slice_tensor_parallel", good, bad)


# place_experts


def _place(case: Case) -> Placement:
    """The answer as a `Placement` of int64 tensors."""
    names = ("physical_to_logical", "logical_to_physical", "replica_count", "rank_of_physical")
    given = {name: case[name] for name in ("load", "num_physical", "num_ranks")}
    found = case.call("place_experts", **given).outputs
    if not isinstance(found, dict) or not set(names) <= set(found):
        raise Violation(f"place_experts: expected a Placement, got {type(found).__name__}")
    E, P = len(case["load"]), case["num_physical"]
    has_form("physical_to_logical", found["physical_to_logical"], (P,), IDS)
    has_form("replica_count", found["replica_count"], (E,), IDS)
    has_form("rank_of_physical", found["rank_of_physical"], (P,), IDS)
    table = found["logical_to_physical"]
    if not isinstance(table, torch.Tensor) or table.ndim != 2 or len(table) != E:
        raise Violation(f"logical_to_physical: expected [{E}, X], got {_shape(table)}")
    has_form("logical_to_physical", table, tuple(table.shape), IDS)
    case.note("copies", E < P)
    case.note("one rank", case["num_ranks"] == 1)
    return Placement(*(found[name].long() for name in names))


def _copies(placement: Placement, E: int) -> list[list[int]]:
    """The physical experts of each logical one, by `physical_to_logical`."""
    held: list[list[int]] = [[] for _ in range(E)]
    for p, e in enumerate(placement.physical_to_logical.tolist()):
        if not 0 <= e < E:
            raise Violation(f"physical_to_logical[{p}]: expected an expert below {E}, got {e}")
        held[e].append(p)
    return held


def _other(placement: Placement, **changed: torch.Tensor) -> Placement:
    return Placement(**{**vars(placement), **changed})


@requirement(
    "SLICE-16",
    MUST,
    "place_experts",
    "Every expert MUST have a copy.",
    reason="An expert without a copy is chosen by the router and answers nobody.",
    sources=("EPLB rebalance_experts", "SGLang #18213", "TensorCast redundant experts"),
    given=placed(),
    references=PLACE,
)
def every_expert_has_a_copy(case: Case) -> None:
    """By `physical_to_logical`."""
    E = len(case["load"])

    def rule(placement: Placement) -> None:
        missing = [e for e, copies in enumerate(_copies(placement, E)) if not copies]
        if missing:
            raise Violation(
                f"physical_to_logical: expected a copy of expert {missing[0]}, got none"
            )

    found = _place(case)
    last = found.physical_to_logical
    wrong = [("an expert that there is not", _other(found, physical_to_logical=last + 1))]
    if E > 1:
        wrong.append(("one expert only", _other(found, physical_to_logical=last * 0)))
    case.judge(rule, found, wrong)


@requirement(
    "SLICE-17",
    MUST,
    "place_experts",
    "The table from logical to physical experts MUST be the inverse of the one back, padded with "
    "-1, and its counts those of the copies.",
    reason="Where the two disagree, a token goes to a rank that holds another expert.",
    sources=("EPLB rebalance_experts", "SGLang #32962", "vllm-ascend #4793", "vLLM #28377"),
    given=placed(),
    references=PLACE,
    kinds=4,
)
def the_two_tables_agree(case: Case) -> None:
    """Row by row; the order of an expert's copies is free."""
    E = len(case["load"])

    def rule(placement: Placement) -> None:
        for e, copies in enumerate(_copies(placement, E)):
            row = placement.logical_to_physical[e].tolist()
            padding = [-1] * (len(row) - len(copies))
            if sorted(row[: len(copies)]) != copies or row[len(copies) :] != padding:
                raise Violation(f"logical_to_physical[{e}]: expected {copies + padding}, got {row}")
            count = int(placement.replica_count[e])
            if count != len(copies):
                raise Violation(f"replica_count[{e}]: expected {len(copies)}, got {count}")

    found = _place(case)
    table, counts = found.logical_to_physical, found.replica_count
    wrong = [
        ("one copy more", _other(found, replica_count=counts + 1)),
        ("no copies", _other(found, logical_to_physical=torch.full_like(table, -1))),
    ]
    if bool((table < 0).any()):
        padded = table.masked_fill(table < 0, 0)
        wrong.append(("padded with 0", _other(found, logical_to_physical=padded)))
    case.judge(rule, found, wrong)


@requirement(
    "SLICE-18",
    MUST,
    "place_experts",
    "Every rank MUST hold P / R physical experts.",
    reason="The weights of a rank are one tensor of fixed size; there is no room for one more.",
    sources=("EPLB rebalance_experts", "SGLang #22525"),
    given=placed(),
    references=PLACE,
)
def every_rank_holds_as_many(case: Case) -> None:
    """By `rank_of_physical`."""
    R, P = case["num_ranks"], case["num_physical"]

    def rule(placement: Placement) -> None:
        held = Counter(placement.rank_of_physical.tolist())
        if held != Counter(dict.fromkeys(range(R), P // R)):
            raise Violation(f"rank_of_physical: expected {P // R} on each of {R}, got {dict(held)}")

    found = _place(case)
    ranks = found.rank_of_physical
    case.judge(rule, found, [("counted from 1", _other(found, rank_of_physical=ranks + 1))])


def _fewest(load: list[float], P: int) -> list[int]:
    """How many copies each expert gets, each further one where the load per copy is greatest."""
    copies = [1] * len(load)
    for _ in range(P - len(load)):
        copies[max(range(len(load)), key=lambda e: load[e] / copies[e])] += 1
    return copies


@requirement(
    "SLICE-19",
    MUST,
    "place_experts",
    "The greatest load per copy MUST be the least that P physical experts allow.",
    reason="The busiest copy holds up its rank, and its rank all others.",
    sources=("EPLB replicate_experts", "TensorCast redundant experts", "DeepSeek-V3 report, 3.4"),
    given=placed(redundant=True, loads=("even", "skewed", "one hot", "ties", "few", "few")),
    references=PLACE,
    kinds=3,
)
def copies_go_where_the_load_is(case: Case) -> None:
    """Giving each further copy to the greatest load per copy reaches the least there is.

    Shares are compared in the float32 that an implementation may divide in: two that differ by a
    rounding may be taken in either order, and the greatest is off by two roundings at most.
    """
    load, P = case["load"].tolist(), case["num_physical"]
    best = max(each / copies for each, copies in zip(load, _fewest(load, P), strict=True))
    bound = best * (1 + 2 * 2.0**-23)

    def rule(placement: Placement) -> None:
        copies = _copies(placement, len(load))
        shares = [each / max(1, len(held)) for each, held in zip(load, copies, strict=True)]
        if max(shares) > bound:
            e = shares.index(max(shares))
            raise Violation(
                f"expected at most {best:g} tokens per copy, got {shares[e]:g} for each of "
                f"{len(copies[e])} copies of expert {e}"
            )

    found = _place(case)
    spare = min(range(len(load)), key=load.__getitem__)
    idle = torch.full_like(found.physical_to_logical, spare)
    idle[: len(load)] = torch.arange(len(load))
    wrong = [("all further copies of the idlest", _other(found, physical_to_logical=idle))]
    case.judge(rule, found, wrong if max(load) > bound else [])


@requirement(
    "SLICE-20",
    SHOULD,
    "place_experts",
    "No rank SHOULD have more load than the mean over ranks and one copy's load.",
    reason="Heaviest copies first, each to the rank with the least load and a free place, stays "
    "below that; what does worse has not looked at the load.",
    sources=("EPLB balanced_packing", "Graham, Bounds on multiprocessing anomalies (1966)"),
    given=placed(loads=("skewed", "ties", "even", "one side"), ranks=(2, 9)),
    references=PLACE,
)
def no_rank_is_overloaded(case: Case) -> None:
    """The load of a rank is the sum over its copies of load / copies."""
    load, R = case["load"].tolist(), case["num_ranks"]

    def loads(placement: Placement) -> list[float]:
        copies = _copies(placement, len(load))
        found = [0.0] * R
        for each, held in zip(load, copies, strict=True):
            for p in held:
                found[int(placement.rank_of_physical[p]) % R] += each / len(held)
        return found

    def rule(placement: Placement) -> None:
        copies = _copies(placement, len(load))
        one = max(each / max(1, len(held)) for each, held in zip(load, copies, strict=True))
        limit = (sum(load) / R + one) * (1 + 1e-9)
        worst = max(loads(placement))
        if worst > limit:
            raise Violation(f"expected at most {limit:g} tokens on a rank, got {worst:g}")

    found = _place(case)
    one_rank = _other(found, rank_of_physical=found.rank_of_physical * 0)
    case.judge(rule, found, [("all of them on one rank", one_rank)])


@requirement(
    "SLICE-21",
    MUST,
    "place_experts",
    "Fewer physical experts than experts, or not as many on each rank, and a load that is negative "
    "or no number MUST raise.",
    reason="The tables would have to leave an expert out, and nothing else would notice.",
    sources=("docs/spec/operations.md", "EPLB rebalance_experts"),
    given=placed(loads=LOADS[:1]),
    references=PLACE,
)
def a_placement_that_cannot_be_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    load, P, R = case["load"], case["num_physical"], case["num_ranks"]
    good = {"load": load, "num_physical": P, "num_ranks": R}
    bad = {
        "fewer physical experts than experts": good
        | {"num_physical": len(load) - 1, "num_ranks": 1},
        "no rank": good | {"num_ranks": 0},
        "physical experts that are a float": good | {"num_physical": float(P)},
        "ranks that are a float": good | {"num_ranks": float(R)},
        "a negative load": good | {"load": -load - 1},
        "a load of two dimensions": good | {"load": load[None]},
    }
    if R > 1:
        bad["not as many on each rank"] = good | {"num_physical": P + 1}
    if load.is_floating_point():
        bad["a load of NaN"] = good | {"load": load * torch.nan}
        bad["an infinite load"] = good | {"load": load + torch.inf}
    must_raise(case, "place_experts", good, bad)
