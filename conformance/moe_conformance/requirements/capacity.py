"""Requirements on `drop_to_capacity`: which pairs stay where an expert has room for so many.

Dimension key: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_conformance.case import IDS, Case, must_raise, parts
from moe_conformance.inputs.given import Content, differentiable
from moe_conformance.inputs.slots import capacities, signed_weights
from moe_conformance.judge import Violation, equal, has_form, impostors
from moe_conformance.registry import MUST, requirement
from moe_conformance.requirements.dispatch import Impostors, gradient_of, valid_ids
from moe_conformance.requirements.experts import left_alone

CROWDED = ("skewed", "one expert", "duplicates")
"""Loads in which some expert has more than its share."""
CAPACITY = ("capacity.drop_to_capacity",)


@dataclass(frozen=True)
class Kept:
    """An answer of `drop_to_capacity` beside what was given.

    Attributes:
        weights: [T, K], what came.
        ids: [T, K] int64, what came.
        before: [T, K] int64, the ids given, -1 where they led nowhere.
        experts: E.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    before: torch.Tensor
    experts: int

    @property
    def stays(self) -> torch.Tensor:
        """[T, K] which pairs still lead to an expert."""
        return (self.ids >= 0) & (self.ids < self.experts)

    def with_ids(self, ids: torch.Tensor) -> Kept:
        """The same with other ids."""
        return Kept(self.weights, ids, self.before, self.experts)

    def per_expert(self, ids: torch.Tensor) -> torch.Tensor:
        """[E] how many of these pairs lead to each expert."""
        here = (ids >= 0) & (ids < self.experts)
        return torch.bincount(ids[here], minlength=self.experts)


def _drop(case: Case, **changed: Any) -> Kept:
    names = ("weights", "expert_ids", "num_experts", "capacity", "policy")
    given = {name: case[name] for name in names} | changed
    answer = case.call("drop_to_capacity", **given)
    weights, ids = parts("drop_to_capacity", answer, 2)
    shape = tuple(given["expert_ids"].shape)
    has_form("weights", weights, shape, (given["weights"].dtype,))
    has_form("expert_ids", ids, shape, IDS)
    before = valid_ids(case)[: shape[0]]
    kept = Kept(weights, ids.long(), before, given["num_experts"])
    case.note("pairs dropped", bool((kept.per_expert(before) > given["capacity"]).any()))
    case.note("a capacity beyond all pairs", given["capacity"] > before.numel())
    return kept


def _first(where: torch.Tensor) -> torch.Tensor:
    """Only the first of the places that are marked."""
    return where & (where.flatten().cumsum(0).reshape(where.shape) == 1)


@requirement(
    "DISPATCH-21",
    MUST,
    "drop_to_capacity",
    "Of each expert's pairs exactly the smaller of their number and the capacity MUST stay.",
    reason="One more overruns the expert's buffer, one less drops a token that had room.",
    sources=(
        "DeepSpeed #1658",
        "DeepSpeed #5353",
        "DeepSpeed #8155",
        "vllm-ascend #14926",
    ),
    given=capacities(),
    references=CAPACITY,
    kinds=2,
)
def as_many_pairs_stay_as_there_is_room(case: Case) -> None:
    """Counts before and after; a capacity beyond T drops nothing."""
    found = _drop(case)
    expected = found.per_expert(found.before).clamp_max(case["capacity"])

    def wrong() -> Impostors:
        if bool(found.stays.any()):
            yield "one less", found.ids.where(~_first(found.stays), -1)
        if bool((found.before >= 0).any() and (found.before != found.ids).any()):
            over = found.per_expert(found.before) > case["capacity"]
            if bool(over.any()):
                yield "none dropped", found.before

    case.judge(
        lambda ids: equal("pairs per expert", found.per_expert(ids), expected), found.ids, wrong()
    )


@requirement(
    "DISPATCH-22",
    MUST,
    "drop_to_capacity",
    "A pair that stays MUST keep its place, its id and its weight; one that is dropped MUST have "
    "the id -1.",
    reason="Weights that are normalised again after the drop, or pairs that move up, change tokens "
    "that lost nothing.",
    sources=(
        "Megatron-LM capacity",
        "GShard (arXiv 2006.16668)",
    ),
    given=capacities(),
    references=CAPACITY,
)
def pairs_that_stay_are_unchanged(case: Case) -> None:
    """The id is the one given or -1, and the weight the one given where the id is."""
    found = _drop(case)
    given = case["weights"]

    def rule(answer: Kept) -> None:
        moved = answer.stays & (answer.ids != answer.before)
        other = ~answer.stays & (answer.before >= 0) & (answer.ids != -1)
        wrong = moved | other
        if bool(wrong.any()):
            token, k = (int(i) for i in wrong.nonzero()[0])
            raise Violation(
                f"expert_ids[{token}, {k}]: expected {int(answer.before[token, k])} or -1, got "
                f"{int(answer.ids[token, k])}",
                None,
                answer.ids,
            )
        equal("weights that stay", answer.weights[answer.stays], given[answer.stays])

    def wrong() -> Impostors:
        if bool(found.stays.any()):
            first = _first(found.stays)
            halved = torch.where(first, found.weights / 2, found.weights)
            yield "half a weight", Kept(halved, found.ids, found.before, found.experts)
            yield "E for -1", found.with_ids(found.ids.where(~first, found.experts))

    case.judge(rule, found, wrong())


@requirement(
    "DISPATCH-23",
    MUST,
    "drop_to_capacity",
    "With the policy `position` an expert's first pairs MUST stay, by slot.",
    reason="Who is dropped must not depend on the device; a top-k over equal keys promises "
    "nothing.",
    sources=(
        "Megatron-LM capacity",
        "GShard (arXiv 2006.16668)",
    ),
    given=capacities(policies=("position",), loads=CROWDED, tight=True),
    references=CAPACITY,
)
def the_first_pairs_stay(case: Case) -> None:
    """No pair stays behind one of the same expert that was dropped."""
    found = _drop(case)
    slot = torch.arange(found.before.numel()).reshape(found.before.shape)
    _judge_order(case, found, -slot, "slot")


@requirement(
    "DISPATCH-24",
    MUST,
    "drop_to_capacity",
    "With the policy `probs` the pairs with an expert's largest weights MUST stay.",
    reason="Dropping by probability is chosen to lose the tokens that lose least.",
    sources=(
        "Megatron-LM capacity",
        "Megatron #812",
        "Megatron #815",
    ),
    given=capacities(policies=("probs",), loads=CROWDED, tight=True),
    references=CAPACITY,
    kinds=2,
)
def the_largest_weights_stay(case: Case) -> None:
    """The same pairs with weights as drawn, below zero, on both sides of it, and above one.

    Without those that have a sign, where the target takes none.
    """
    drawn = case["weights"]
    signs = signed_weights(case.scope.capabilities, "probs")
    signed = (-drawn, drawn - drawn.mean()) if True in signs else ()
    for given in (drawn, *signed, 4 * drawn):
        _judge_order(case, _drop(case, weights=given), given.double(), "weight")


def _judge_order(case: Case, found: Kept, keys: torch.Tensor, what: str) -> None:
    """Whether of each expert's pairs those with the largest keys [T, K] stay."""

    def rule(ids: torch.Tensor) -> None:
        _ranked(found.with_ids(ids), keys, what)

    case.judge(rule, found.ids, _exchanged(found, keys))


def _ranked(kept: Kept, keys: torch.Tensor, what: str) -> None:
    """No pair that was dropped has a larger key than one of its expert that stays."""
    stays = kept.stays & (kept.ids == kept.before)
    gone = (kept.before >= 0) & ~stays
    most = torch.full((kept.experts,), torch.inf, dtype=torch.float64)
    least = most.scatter_reduce(0, kept.before[stays], keys.double()[stays], "amin")
    wrong = gone & (keys > least[kept.before.clamp_min(0)])
    if bool(wrong.any()):
        token, k = (int(i) for i in wrong.nonzero()[0])
        expert = int(kept.before[token, k])
        raise Violation(
            f"expert {expert}: expected pair [{token}, {k}] to stay, whose {what} is "
            f"{abs(float(keys[token, k])):g}, before one whose {what} is "
            f"{abs(float(least[expert])):g}",
            None,
            kept.ids,
        )


def _exchanged(kept: Kept, keys: torch.Tensor) -> Impostors:
    """A dropped pair in the place of one of the same expert with a larger key."""
    gone = (kept.before >= 0) & ~kept.stays
    for token, k in gone.nonzero()[:1].tolist():
        expert = kept.before[token, k]
        better = kept.stays & (kept.before == expert) & (keys > keys[token, k])
        if bool(better.any()):
            ids = kept.ids.where(~_first(better), -1)
            ids[token, k] = expert
            yield "a worse pair instead", ids


@requirement(
    "DISPATCH-25",
    MUST,
    "drop_to_capacity",
    "Ids that are not here MUST take no capacity and lead nowhere afterwards.",
    reason="Padding that counts as a token pushes real ones out.",
    sources=(
        "vLLM #38128",
        "vLLM #42034",
    ),
    given=capacities(invalid=True, loads=CROWDED, tight=True),
    references=CAPACITY,
    kinds=2,
)
def invalid_ids_take_no_capacity(case: Case) -> None:
    """As DISPATCH-21 among the valid ones, and no id out of an invalid one."""
    found = _drop(case)
    expected = found.per_expert(found.before).clamp_max(case["capacity"])

    def rule(ids: torch.Tensor) -> None:
        kept = found.with_ids(ids)
        wrong = kept.stays & (kept.before < 0)
        if bool(wrong.any()):
            token, k = (int(i) for i in wrong.nonzero()[0])
            raise Violation(
                f"expert_ids[{token}, {k}]: expected an id that leads nowhere, got "
                f"{int(ids[token, k])}",
                None,
                ids,
            )
        valid = ids.where(kept.before >= 0, -1)
        equal("pairs per expert", kept.per_expert(valid), expected)

    made = found.ids.where(found.before >= 0, 0)
    case.judge(rule, found.ids, [("the first expert for invalid ids", made)])


@requirement(
    "DISPATCH-26",
    MUST,
    "drop_to_capacity",
    "Zero tokens MUST give empty weights and ids of shape [0, K].",
    reason="A rank without tokens is an ordinary batch.",
    sources=(
        "torchtitan #1166",
        "vLLM #43547",
    ),
    given=capacities(invalid=False),
    references=CAPACITY,
)
def zero_tokens_are_dropped_to_nothing(case: Case) -> None:
    """The same call with the tokens cut away."""
    top_k, dtype = case["weights"].shape[1], case["weights"].dtype
    names = ("num_experts", "capacity", "policy")
    answer = case.call(
        "drop_to_capacity",
        weights=case["weights"][:0],
        expert_ids=case["expert_ids"][:0],
        **{name: case[name] for name in names},
    )

    def rule(outputs: Any) -> None:
        if not isinstance(outputs, list) or len(outputs) != 2:
            raise Violation("drop_to_capacity: expected 2 results")
        has_form("weights", outputs[0], (0, top_k), (dtype,))
        has_form("expert_ids", outputs[1], (0, top_k), IDS)

    one = [torch.zeros(1, top_k, dtype=dtype), torch.zeros(1, top_k, dtype=torch.int64)]
    case.judge(rule, answer.outputs, [("one token", one)])


@requirement(
    "DISPATCH-33",
    MUST,
    "drop_to_capacity",
    "A policy that there is not, a negative capacity and weights of another shape MUST raise.",
    reason="A misspelt policy that falls through to the other one is found by nobody.",
    sources=(
        "Megatron #812",
        "Megatron #815",
    ),
    given=capacities(invalid=False),
    references=CAPACITY,
)
def what_cannot_be_dropped_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    names = ("weights", "expert_ids", "num_experts", "capacity", "policy")
    good = {name: case[name] for name in names}
    weights = case["weights"]
    must_raise(
        case,
        "drop_to_capacity",
        good,
        {
            "a policy that there is not": good | {"policy": case["policy"] + "s"},
            "an empty policy": good | {"policy": ""},
            "a negative capacity": good | {"capacity": -1},
            "weights of another shape": good | {"weights": torch.cat([weights, weights[:1]])},
        },
    )


@requirement(
    "DISPATCH-41",
    MUST,
    "drop_to_capacity",
    "Weights and ids MUST be read by their strides.",
    reason="The weights of a router are often a slice of all scores.",
    sources=("docs/spec/operations.md", "hyper_parallel router"),
    given=capacities(moved=True, invalid=False),
    references=CAPACITY,
)
def capacity_reads_by_strides(case: Case) -> None:
    """Transposed, strided and offset inputs against the same ones in one piece."""
    found, plain = _drop(case), _drop(case, layouts={})

    def rule(answer: Kept) -> None:
        equal("expert_ids", answer.ids, plain.ids)
        equal("weights that stay", answer.weights[plain.stays], plain.weights[plain.stays])

    def wrong() -> Impostors:
        yield "another id", found.with_ids(found.ids + 1)
        if bool(found.stays.any()):
            yield "other weights", replace(found, weights=found.weights + 1)

    case.judge(rule, found, wrong())


@requirement(
    "DISPATCH-44",
    MUST,
    "drop_to_capacity",
    "Weights and ids MUST be left as they are, and the results MUST have memory of their own.",
    reason="Where nothing is dropped it is tempting to give back what came, and where something is "
    "to write over it.",
    sources=("TensorCast topk_weights /=", "KernelBench zero_out"),
    given=capacities(),
    references=CAPACITY,
)
def dropping_leaves_its_arguments_alone(case: Case) -> None:
    """Every argument is compared with a copy made before the call."""
    names = ("weights", "expert_ids", "num_experts", "capacity", "policy")
    answer = case.call("drop_to_capacity", **{name: case[name] for name in names})
    case.note("room for all", case["capacity"] >= case["expert_ids"].numel())
    found = [*answer.changed, *answer.shared]
    case.judge(left_alone("drop_to_capacity"), found, [("weights", ["weights"])])


@requirement(
    "DISPATCH-45",
    MUST,
    "drop_to_capacity",
    "With the policy `first_choice` an expert's first choices MUST stay before its second ones, "
    "and of choices of the same place those of the first tokens.",
    reason="A token's best expert is worth more to it than another token's second best.",
    sources=("GShard (arXiv 2006.16668)", "st-moe-pytorch"),
    given=capacities(policies=("first_choice",), loads=CROWDED, tight=True),
    references=CAPACITY,
)
def the_first_choices_stay(case: Case) -> None:
    """No pair stays behind one of the same expert that was dropped, in the order by k, then t."""
    found = _drop(case)
    tokens, top_k = found.before.shape
    place = torch.arange(top_k) * tokens + torch.arange(tokens)[:, None]
    _judge_order(case, found, -place, "place")


@requirement(
    "DISPATCH-46",
    MUST,
    "drop_to_capacity",
    "The gradient of a weight MUST be that of its pair where it stays, and zero where it is "
    "dropped.",
    reason="A router that learns from pairs that were never computed learns what is not so.",
    sources=("Megatron-LM capacity", "DeepSpeed #5353"),
    given=differentiable("drop_to_capacity", capacities()),
    references=CAPACITY,
)
def the_gradient_of_what_stays(case: Case) -> None:
    """Cotangents of small integers come back as they are, or as zero."""
    names = ("weights", "expert_ids", "num_experts", "capacity", "policy")
    given = {name: case[name] for name in names}
    found = _drop(case)
    cotangent = Content(found.before.numel()).integers(1, 7, *found.before.shape).double()
    answer = case.call("drop_to_capacity", **given, wrt=["weights"], cotangents={"0": cotangent})
    expected = cotangent.masked_fill(~found.stays, 0.0)
    case.note("a gradient is cut", bool((found.before >= 0)[~found.stays].any()))

    def wrong() -> Impostors:
        yield "the gradient of a copy", cotangent
        yield from impostors(expected, 2.0)

    case.judge(
        lambda answer: equal("gradient of weights", answer.double(), expected),
        gradient_of(answer.gradients, "weights"),
        ((name, other) for name, other in wrong() if not torch.equal(other, expected)),
    )
