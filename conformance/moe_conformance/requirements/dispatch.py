"""Requirements on `dispatch` and `combine`: tokens to experts and back.

Dimension key: T tokens, K experts per token, E experts, H hidden size, S rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from moe_conformance.case import FLOATS, IDS, Answer, Case, must_raise, parts
from moe_conformance.inputs.given import (
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    deterministic,
    differentiable,
    torch_dtype,
)
from moe_conformance.inputs.slots import build_rows, build_scattered, rows, scattered
from moe_conformance.judge import Violation, equal, has_form, impostors, within
from moe_conformance.precision import TINY, UNIT
from moe_conformance.registry import MAY, MUST, SHOULD, requirement
from moe_conformance.requirements.alignment import SEVERAL

Impostors = Iterable[tuple[str, Any]]

DISPATCH = ("dispatch.dispatch",)
COMBINE = ("dispatch.combine",)


@dataclass(frozen=True)
class Dispatched:
    """An answer of `dispatch`.

    Attributes:
        rows: [S, H].
        counts: [·] int64, tokens per expert.
        slots: [S] int64.
        owner: [T·K] int64, the expert of each slot that was asked for, -1 where there is none.
        top_k: K.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor
    owner: torch.Tensor
    top_k: int

    @property
    def known(self) -> torch.Tensor:
        """[S] which rows belong to a slot, and are not appended to fill a static shape."""
        return (self.slots >= 0) & (self.slots < len(self.owner))

    @property
    def by_slot(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots that have a row in ascending order, and their rows."""
        slots, order = self.slots[self.known].sort()
        return slots, self.rows[self.known][order]

    @property
    def owners(self) -> torch.Tensor:
        """The experts of the rows that have one, in the order of the rows."""
        owners = self.owner[self.slots[self.known]]
        return owners[owners >= 0]


def valid_ids(case: Case) -> torch.Tensor:
    """[T, K] the expert ids, int64, with -1 for every one that leads nowhere."""
    ids = case["expert_ids"].long()
    return ids.where((ids >= 0) & (ids < case["num_experts"]), -1)


def _dispatch(case: Case, **options: Any) -> tuple[Dispatched, Answer]:
    given = {name: case[name] for name in ("x", "expert_ids", "num_experts")}
    answer = case.call("dispatch", **given, **options)
    owner = valid_ids(case)
    counts = _counts(case)
    case.note("an empty expert", bool((counts == 0).any()))
    case.note("invalid ids", bool((owner < 0).any()))
    return _read(answer, owner, case["x"].shape[1]), answer


def _read(answer: Answer, owner: torch.Tensor, hidden: int) -> Dispatched:
    rows_, counts, slots = parts("dispatch", answer, 3)
    for name, value, dimensions in (
        ("rows", rows_, 2),
        ("tokens_per_expert", counts, 1),
        ("slots", slots, 1),
    ):
        if not isinstance(value, torch.Tensor) or value.ndim != dimensions:
            came = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise Violation(f"{name}: expected {dimensions} dimensions, got {came}")
    if slots.is_floating_point() or counts.is_floating_point():
        raise Violation("slots and tokens_per_expert: expected integers, got floats")
    has_form("rows", rows_, (len(slots), hidden), (rows_.dtype,))
    return Dispatched(rows_, counts.long(), slots.long(), owner.flatten(), owner.shape[1])


def _counts(case: Case) -> torch.Tensor:
    owner = valid_ids(case)
    return torch.bincount(owner[owner >= 0], minlength=case["num_experts"])


def _combine(case: Case, **changed: Any) -> torch.Tensor:
    given = {name: case[name] for name in ("rows", "slots", "weights")} | changed
    answer = case.call("combine", **given)
    return _combined(answer, len(case["weights"]), case["rows"].shape[1])


def _combined(answer: Answer, tokens: int, hidden: int) -> torch.Tensor:
    found = answer.outputs
    floats = (*FLOATS, torch.bfloat16, torch.float16)
    has_form("combined", found, (tokens, hidden), floats)
    assert isinstance(found, torch.Tensor)
    return found


@dataclass(frozen=True)
class _Sum:
    """A weighted sum in float64, and how far a legal one may be from it."""

    value: torch.Tensor
    bound: torch.Tensor


def _weighted_sum(
    case: Case, rows_: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> _Sum:
    """What `combine` has to give.

    A product that is rounded r times is off by at most (1 + unit)^r - 1 of its absolute value:
    once as a product, K times in the sum, once more for a weight wider than the accumulator, and as
    often in x's dtype as is declared. Then the sum is rounded once to x's dtype.
    """
    tokens, top_k = weights.shape
    dtype = str(rows_.dtype).removeprefix("torch.")
    weight = weights.double().flatten()[slots.long()][:, None]
    terms = weight * rows_.double()
    token = slots.long() // top_k
    zero = torch.zeros(tokens, rows_.shape[1], dtype=torch.float64)
    value, mass = zero.index_add(0, token, terms), zero.index_add(0, token, terms.abs())
    unit = UNIT[dtype]
    # In float64 the expected value itself is off by as much.
    rounded = (top_k + 2) * math.log1p(UNIT["float32"] if dtype != "float64" else 2 * unit)
    for point, times in (("weighted_output", 1), ("combine", top_k)):
        if point in _points(case, dtype):
            rounded += times * math.log1p(unit)
    error = math.expm1(rounded) * mass
    return _Sum(value, error + unit * (value.abs() + error) + (top_k + 1) * TINY[dtype])


def _points(case: Case, dtype: str) -> tuple[str, ...]:
    return () if dtype == "float64" else case.scope.capabilities.rounding_points


def _judge_sum(case: Case, found: torch.Tensor, expected: _Sum) -> None:
    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        yield from impostors(expected.value, 1.0)
        # Beyond any bound that is worth having: a quarter of the largest value.
        if expected.value.numel() and bool(expected.value.any()):
            yield "a quarter too much", expected.value * 1.25

    case.judge(
        lambda answer: within("combined", answer, expected.value, expected.bound), found, wrong()
    )


@requirement(
    "DISPATCH-01",
    MUST,
    "dispatch",
    "Row i MUST be a copy of x[slots[i] // K], to the last bit.",
    reason="Slot t·K + k belongs to token t; any other numbering sends a token to the experts of "
    "another one.",
    sources=(
        "torchtitan stable argsort",
        "transformers grouped_mm",
        "DeepSeek moe_infer",
    ),
    given=rows(content="special"),
    references=DISPATCH,
)
def rows_are_copies_of_their_tokens(case: Case) -> None:
    """Equal, the sign of a zero too, also for values that a detour would change."""
    found, _ = _dispatch(case)
    expected = case["x"][found.slots[found.known] // found.top_k]

    def rule(answer: torch.Tensor) -> None:
        equal("rows", answer, expected)
        zero = expected == 0
        equal("signs of zeros", answer[zero].signbit(), expected[zero].signbit())

    case.judge(rule, found.rows[found.known], impostors(expected))


@requirement(
    "DISPATCH-02",
    MUST,
    "dispatch",
    "`tokens_per_expert` MUST hold the number of slots of each of the E experts.",
    reason="Offsets, split sizes and the load all follow from it; a running sum in its place "
    "shifts every expert.",
    sources=(
        "xtuner #2053",
        "torchtitan #1166",
    ),
    given=rows(),
    references=DISPATCH,
)
def counts_are_slots_per_expert(case: Case) -> None:
    """The counts against the ids; empty experts have a zero."""
    found, _ = _dispatch(case)
    expected = _counts(case)

    def wrong() -> Impostors:
        yield "one more", expected + 1
        if not torch.equal(expected.cumsum(0), expected):
            yield "a running sum", expected.cumsum(0)
        yield "one expert more", torch.cat([expected, expected[:1] * 0])

    case.judge(lambda answer: equal("tokens_per_expert", answer, expected), found.counts, wrong())


@requirement(
    "DISPATCH-03",
    MUST,
    "dispatch",
    "Every slot whose id is valid MUST be in `slots` exactly once; further rows may be appended "
    "and carry T·K, but by a target that declares that it appends none.",
    reason="`slots` is the way back: a slot that is missing or stands twice is a pair that is lost "
    "or added twice.",
    sources=(
        "vllm-ascend #14926",
        "vLLM moe_align_block_size",
    ),
    given=rows(),
    references=DISPATCH,
)
def every_slot_has_one_row(case: Case) -> None:
    """Each valid slot once, nothing outside of 0 … T·K, and T·K at the end only, or nowhere."""
    found, _ = _dispatch(case)
    owner, total = found.owner, len(found.owner)
    appends = case.scope.capabilities.appended_rows

    def rule(slots: torch.Tensor) -> None:
        outside = (slots < 0) | (slots > total)
        known = (slots >= 0) & (slots < total)
        early = ~known & ~outside & (known.flip(0).cumsum(0).flip(0) > 0)
        checks = [("a slot or T·K", outside), ("no slot after an appended row", early)]
        if not appends:
            checks.append(("no appended row, the slot of which is T·K", slots == total))
        for name, wrong in checks:
            if bool(wrong.any()):
                place = int(wrong.nonzero()[0])
                raise Violation(
                    f"slots[{place}]: expected {name} = {total}, got {int(slots[place])}",
                    None,
                    slots,
                )
        times = torch.bincount(slots[known], minlength=total)
        missed = (owner >= 0) & (times != 1)
        if bool(missed.any()):
            slot = int(missed.nonzero()[0])
            raise Violation(
                f"slot {slot} (expert {int(owner[slot])}): expected one row, got "
                f"{int(times[slot])}; {int(missed.sum())} slots are wrong",
                None,
                slots,
            )

    def wrong() -> Impostors:
        if len(found.owners):
            yield "the first slot lost", found.slots[1:]
            yield "the first slot twice", torch.cat([found.slots[:1], found.slots])
        yield "one beyond", torch.cat([found.slots, torch.tensor([total + 1])])

    case.judge(rule, found.slots, wrong())


def _follows(what: str, numbers: torch.Tensor, strictly: bool) -> None:
    wrong = numbers.diff() < (1 if strictly else 0)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise Violation(
            f"{what}: expected ascending order, got {int(numbers[place])} before "
            f"{int(numbers[place + 1])}",
            None,
            numbers,
        )


@requirement(
    "DISPATCH-04",
    MUST,
    "dispatch",
    "Rows MUST stand in ascending order of their expert.",
    reason="The counts say where an expert's rows begin only if they stand in that order.",
    sources=(
        "torchtitan stable argsort",
        "megablocks radix sort",
        "Megatron permutation",
    ),
    given=rows(least_experts=2, loads=SEVERAL),
    references=DISPATCH,
)
def rows_stand_in_order_of_experts(case: Case) -> None:
    """The ids of the rows' slots never descend."""
    found, _ = _dispatch(case)

    def wrong() -> Impostors:
        if bool((found.owners.diff() > 0).any()):
            yield "the other way around", found.owners.flip(0)

    case.judge(lambda answer: _follows("experts of the rows", answer, False), found.owners, wrong())


@requirement(
    "DISPATCH-05",
    MUST,
    "dispatch",
    "Where the target is declared deterministic, an expert's rows MUST ascend by slot.",
    reason="A sort that is not stable orders them differently on another device, and sums over "
    "them with it.",
    sources=("transformers #43362", "vLLM #53440", "FlagGems #6492"),
    given=deterministic(
        rows(loads=("skewed", "one expert", "duplicates", "full blocks"), least_experts=2)
    ),
    references=DISPATCH,
)
def rows_of_an_expert_ascend(case: Case) -> None:
    """The slots of each expert, in the order of its rows."""
    found, _ = _dispatch(case)
    total = len(found.owner)

    def rule(slots: torch.Tensor) -> None:
        kept = slots[(slots >= 0) & (slots < total)]
        owners = found.owner[kept]
        kept, owners = kept[owners >= 0], owners[owners >= 0]
        by_expert = owners.argsort(stable=True)
        # The order of experts is another requirement's business.
        _follows("slots by expert", owners[by_expert] * total + kept[by_expert], True)

    def wrong() -> Impostors:
        if len(found.owners) > len(found.owners.unique()):
            yield "the other way around", found.slots.flip(0)

    case.judge(rule, found.slots, wrong())


@requirement(
    "DISPATCH-06",
    MUST,
    "dispatch",
    "Ids below 0 and from E on MUST get no row.",
    reason="As an index -1 is the last expert in Python and an access out of bounds elsewhere.",
    sources=("vLLM #42034", "aiter #4636", "SGLang #12701", "transformers #40545"),
    given=rows(invalid=True),
    references=DISPATCH,
)
def invalid_ids_get_no_row(case: Case) -> None:
    """-1, E, and ids far outside of either end."""
    found, _ = _dispatch(case)

    def rule(slots: torch.Tensor) -> None:
        known = (slots >= 0) & (slots < len(found.owner))
        wrong = known & (found.owner[slots.where(known, 0)] < 0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            slot = int(slots[row])
            came = int(case["expert_ids"].flatten()[slot])
            raise Violation(
                f"slots[{row}]: expected no row for slot {slot}, whose id is {came}", None, slots
            )

    gone = (found.owner < 0).nonzero()[:1, 0]
    case.judge(rule, found.slots, [("a row for one of them", torch.cat([found.slots, gone]))])


@requirement(
    "DISPATCH-07",
    MUST,
    "dispatch",
    "Equal ids in a row MUST each get their row.",
    reason="A boolean map of tokens and experts holds one of them only, and every row behind it "
    "is then sliced wrongly.",
    sources=(
        "docs/spec/operations.md",
        "DeepSeek moe_infer",
    ),
    given=rows(loads=("duplicates",), invalid=False, least_k=2),
    references=DISPATCH,
)
def equal_ids_in_a_row_get_two_rows(case: Case) -> None:
    """As many rows as pairs, and a count that says so."""
    found, _ = _dispatch(case)
    total = len(found.owner)
    case.note("duplicates")

    def rule(numbers: tuple[int, int]) -> None:
        if numbers != (total, total):
            raise Violation(
                f"expected {total} rows and {total} counted, got {numbers[0]} and {numbers[1]}"
            )

    answer = (len(found.slots[found.known].unique()), int(found.counts.sum()))
    case.judge(rule, answer, [("one pair less", (total - 1, total - 1))])


@requirement(
    "DISPATCH-08",
    MUST,
    "dispatch",
    "Rows MUST have x's dtype, `tokens_per_expert` one integer for each expert, and `slots` one "
    "integer for each row.",
    reason="Counts that end with the last expert in use do not fit the weights.",
    sources=(
        "torchtitan #1166",
        "docs/spec/operations.md",
    ),
    given=rows(),
    references=DISPATCH,
    kinds=8,
)
def dispatched_tensors_have_their_form(case: Case) -> None:
    """Dtypes and lengths."""
    _, answer = _dispatch(case)
    shape, dtype = (case["num_experts"],), case["x"].dtype

    def rule(outputs: Any) -> None:
        rows_, counts, slots = outputs
        has_form("rows", rows_, tuple(rows_.shape), (dtype,))
        has_form("tokens_per_expert", counts, shape, IDS)
        has_form("slots", slots, (len(rows_),), IDS)

    def wrong() -> Impostors:
        rows_, counts, slots = answer.outputs
        other = torch.float32 if dtype is not torch.float32 else torch.float64
        yield "rows of another dtype", [rows_.to(other), counts, slots]
        yield "counts cut off", [rows_, counts[:-1], slots]

    case.judge(rule, answer.outputs, wrong())


@requirement(
    "DISPATCH-09",
    MUST,
    "dispatch",
    "Zero tokens MUST give no row of a slot and a count of zero for every expert.",
    reason="A rank without tokens is an ordinary batch, and its collective calls still have to "
    "happen.",
    sources=(
        "torchtitan #1166",
        "DeepSpeed #5066",
        "PaddleFormers #3010",
        "Megatron #4851",
    ),
    given=rows(invalid=False),
    references=DISPATCH,
)
def zero_tokens_give_no_rows(case: Case) -> None:
    """The same call with the tokens cut away."""
    case.inputs["x"], case.inputs["expert_ids"] = case["x"][:0], case["expert_ids"][:0]
    found, _ = _dispatch(case)
    experts = case["num_experts"]

    def rule(answer: tuple[torch.Tensor, torch.Tensor]) -> None:
        counts, slots = answer
        equal("tokens_per_expert", counts, torch.zeros(experts, dtype=torch.int64))
        if bool((slots != 0).any()):
            raise Violation(f"slots: expected none, or T·K = 0, got {slots.tolist()}")

    none = torch.zeros(0, dtype=torch.int64)
    one = torch.ones(experts, dtype=torch.int64)
    case.judge(
        rule, (found.counts, found.slots), [("no counts", (none, none)), ("a count", (one, none))]
    )


@requirement(
    "DISPATCH-10",
    MUST,
    "dispatch",
    "x and the ids MUST be read by their strides.",
    reason="A slice of a longer batch and a transposed projection are ordinary inputs.",
    sources=(
        "docs/spec/operations.md",
        "hyper_parallel router",
    ),
    given=rows(invalid=False, moved=True),
    references=DISPATCH,
)
def dispatch_reads_by_strides(case: Case) -> None:
    """Transposed, strided and offset inputs against the same ones in one piece."""
    found, _ = _dispatch(case)
    plain, _ = _dispatch(case, layouts={})

    def rule(answer: Dispatched) -> None:
        equal("tokens_per_expert", answer.counts, plain.counts)
        equal("experts of the rows", answer.owners, plain.owners)
        for name, came, expected in zip(
            ("slots", "rows by slot"), answer.by_slot, plain.by_slot, strict=True
        ):
            equal(name, came, expected)

    def wrong() -> Impostors:
        if len(found.rows):
            yield "other rows", replace(found, rows=found.rows + 1)
            yield "a slot lost", replace(found, rows=found.rows[1:], slots=found.slots[1:])

    case.judge(rule, found, wrong())


@requirement(
    "DISPATCH-11",
    MUST,
    "combine",
    "Each token MUST get the sum of its rows, each times the weight of its slot, wherever the rows "
    "stand.",
    reason="It is the definition of the layer's output; a row taken for its position instead of "
    "its slot gets another token's weight.",
    sources=(
        "Shazeer et al. (arXiv 1701.06538)",
        "DeepEP #112",
        "vLLM #16801",
    ),
    given=scattered(),
    references=COMBINE,
)
def combined_rows_are_the_weighted_sum(case: Case) -> None:
    """Rows in a random order, within the error of a float32 sum and the output's rounding."""
    found = _combine(case)
    case.note("K = 1", case["weights"].shape[1] == 1)
    _judge_sum(case, found, _weighted_sum(case, case["rows"], case["slots"], case["weights"]))


@requirement(
    "DISPATCH-12",
    MUST,
    "combine",
    "Rows of small integers with weights that are powers of two MUST be summed exactly.",
    reason="Every order of summation is exact for them in every dtype: what differs is a row that "
    "was lost, overwritten or added twice.",
    sources=(
        "vLLM #49122",
        "SGLang #35535",
        "vllm-ascend #9992",
    ),
    given=scattered(content="exact"),
    references=COMBINE,
)
def exact_rows_are_summed_exactly(case: Case) -> None:
    """Integers up to 3 times 1/2, 1 or 2: sums of 16 of them have at most eight bits."""
    found = _combine(case)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"]).value

    def wrong() -> Impostors:
        weights = case["weights"].double().flatten()[case["slots"].long()]
        for row in (case["rows"].any(-1) & (weights != 0)).nonzero()[:1, 0].tolist():
            without = expected.clone()
            slot, weight = int(case["slots"][row]), weights[row]
            without[slot // case["weights"].shape[1]] -= weight * case["rows"][row].double()
            yield "one row lost", without

    case.judge(lambda answer: equal("combined", answer.double(), expected), found, wrong())


@requirement(
    "DISPATCH-13",
    MUST,
    "combine",
    "The sum MUST be taken in float32, or in float64 where the rows are float64, unless a rounding "
    "after every addition is declared.",
    reason="In bfloat16 256 + 1 is 256: a large expert output swallows all others.",
    sources=("torchtitan #2679",),
    given=Given(lambda scope: _absorbing(scope), lambda plan: _build_absorbing(plan)),
    references=COMBINE,
)
def the_sum_is_taken_in_float32(case: Case) -> None:
    """One row of 2^p among ones, p the dtype's (or float32's) digits: the ones have to arrive."""
    found = _combine(case)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"]).value
    lost = case["rows"].double().amax().expand_as(expected)
    case.judge(
        lambda answer: equal("combined", answer.double(), expected),
        found,
        [("the ones lost", lost)],
    )


SWALLOWS = {"bfloat16": 2.0**8, "float16": 2.0**11, "float64": 2.0**24}
"""The number to which 1 can no longer be added: in the dtype, and for float64 in float32."""


def _absorbing(scope: Scope) -> Plans | None:
    capabilities = scope.capabilities
    dtypes = tuple(d for d in scope.dtypes if d in SWALLOWS)
    if "combine" in capabilities.rounding_points:
        dtypes = tuple(d for d in dtypes if d == "float64")
    counts = [k for k in (3, 5, 7, 9, 15) if k <= (capabilities.max_top_k or 15)]
    if not dtypes or not counts:
        return None
    plans = scattered(missing=False).plans(scope)
    if plans is None:
        return None
    return st.tuples(plans, st.sampled_from(dtypes), st.sampled_from(counts)).map(
        lambda drawn: {**drawn[0], "dtype": drawn[1], "top_k": drawn[2]}
    )


def _build_absorbing(plan: Plan) -> Inputs:
    """K is odd, so 2^p + (K - 1) has an even last digit and is exact in the dtype."""
    inputs = build_scattered({**plan, "weights": _wide(plan)})
    tokens, top_k = inputs["weights"].shape
    hidden = inputs["rows"].shape[1]
    large = Content(plan["seed"]).integers(0, top_k - 1, tokens, hidden)
    k = inputs["slots"].long() % top_k
    token = inputs["slots"].long() // top_k
    rows_ = torch.where(large[token] == k[:, None], SWALLOWS[plan["dtype"]], 1.0)
    inputs["rows"] = rows_.to(torch_dtype(plan["dtype"]))
    inputs["weights"] = torch.ones_like(inputs["weights"])
    return inputs


def _all(given: Given, **fixed: Any) -> Given:
    """The same inputs, with these entries in every plan."""

    def plans(scope: Scope) -> Plans | None:
        found = given.plans(scope)
        return None if found is None else found.map(lambda plan: {**plan, **fixed})

    return Given(plans, given.build)


def _finite_only(given: Given) -> Given:
    """The same inputs, for targets that take NaN and infinity."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


@requirement(
    "DISPATCH-14",
    MUST,
    "combine",
    "A pair without a row MUST contribute nothing, whatever its weight: NaN and infinity too.",
    reason="The weight of an id that is not here is never looked at; zero times NaN is NaN.",
    sources=("vllm-ascend #9992", "SGLang #30895", "transformers #48653"),
    given=_finite_only(scattered(missing=True)),
    references=COMBINE,
)
def pairs_without_a_row_contribute_nothing(case: Case) -> None:
    """The weights of missing pairs are NaN and infinity."""
    missing = torch.ones(case["weights"].numel(), dtype=torch.bool)
    missing[case["slots"].long()] = False
    missing = missing.reshape(case["weights"].shape)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=case["weights"].dtype)
    drawn = bad[torch.arange(missing.numel()).reshape(missing.shape) % 3]
    found = _combine(case, weights=drawn.where(missing, case["weights"]))
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"])
    broken = expected.value.clone()
    broken[missing.any(-1)] = torch.nan
    case.judge(
        lambda answer: within("combined", answer, expected.value, expected.bound),
        found,
        [("NaN where a pair is missing", broken)],
    )


@requirement(
    "DISPATCH-15",
    MUST,
    "combine",
    "A token none of whose pairs has a row MUST get zeros.",
    reason="An output that is allocated and not cleared returns what was in memory.",
    sources=("vllm-ascend #9992", "pytorch #193633", "torchtitan #1237", "TE #3484"),
    given=_all(scattered(missing=True), missing="tokens"),
    references=COMBINE,
)
def tokens_without_rows_get_zeros(case: Case) -> None:
    """Exactly zero, with fresh memory full of NaN, and after a call in which others have none."""
    tokens, top_k = case["weights"].shape
    given = {name: case[name] for name in ("rows", "slots", "weights")}
    others = (case["slots"] + top_k) % max(1, tokens * top_k)
    before = case.planned("combine", **given | {"slots": others})
    answer = case.session([before, case.planned("combine", **given, poison=True)])[1]
    found = _combined(answer, tokens, case["rows"].shape[1])
    rowless = torch.ones(tokens, dtype=torch.bool)
    rowless[case["slots"].long() // top_k] = False
    zeros = torch.zeros_like(found[rowless])

    def wrong() -> Impostors:
        if bool(rowless.any()):
            yield "NaN", torch.full_like(zeros, torch.nan)
            yield "ones", torch.ones_like(zeros)

    case.judge(lambda answer: equal("tokens without a row", answer, zeros), found[rowless], wrong())


@requirement(
    "DISPATCH-16",
    MUST,
    "combine",
    "Rows that are not finite MUST change their own token only.",
    reason="A product with a one-hot matrix, or a difference of running sums, spreads one NaN over "
    "the whole batch.",
    sources=(
        "SGLang #30895",
        "SGLang #25852",
    ),
    given=_finite_only(scattered()),
    references=COMBINE,
)
def a_broken_row_stays_in_its_token(case: Case) -> None:
    """Every third token's rows are NaN and infinite; the others are as they should be."""
    tokens, top_k = case["weights"].shape
    token = case["slots"].long() // top_k
    broken = torch.arange(tokens) % 3 == 1
    rows_ = case["rows"].clone()
    rows_[broken[token]] = torch.nan
    rows_[broken[token], ::2] = torch.inf
    found = _combine(case, rows=rows_)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"])
    _judge_sum(case, found[~broken], _Sum(expected.value[~broken], expected.bound[~broken]))


@requirement(
    "DISPATCH-17",
    MUST,
    "dispatch",
    "`combine` of what `dispatch` gave MUST be each token times the sum of its valid weights.",
    reason="The way there and the way back belong together: rows that were appended, left out or "
    "renumbered on one of them show up here.",
    sources=(
        "DeepEP #112",
        "SGLang #25852",
    ),
    given=rows(),
    also=("combine",),
    references=("dispatch.dispatch", "dispatch.combine"),
)
def there_and_back_is_the_sum_of_weights(case: Case) -> None:
    """What rows of T·K hold is replaced by NaN on the way, where the target takes it."""
    found, answer = _dispatch(case)
    rows_, _, slots = answer.outputs
    appended = found.slots == len(found.owner)
    case.note("appended rows", bool(appended.any()))
    if bool(appended.any()) and not case.scope.capabilities.finite_only:
        rows_ = torch.where(appended[:, None], torch.nan, rows_)
    back = case.call("combine", layouts={}, rows=rows_, slots=slots, weights=case["weights"])
    x, top_k = case["x"], found.top_k
    here = (found.owner >= 0).nonzero()[:, 0]
    expected = _weighted_sum(case, x[here // top_k], here, case["weights"])
    _judge_sum(case, _combined(back, *x.shape), expected)


@requirement(
    "DISPATCH-18",
    MUST,
    "combine",
    "Zero tokens MUST give an output of shape [0, H].",
    reason="A rank without tokens is an ordinary batch.",
    sources=(
        "torchtitan #1166",
        "vLLM #43547",
        "DeepSpeed #5066",
    ),
    given=scattered(),
    references=COMBINE,
)
def zero_tokens_are_combined_to_nothing(case: Case) -> None:
    """No rows, no slots, weights of shape [0, K]."""
    none = {name: case[name][:0] for name in ("rows", "slots", "weights")}
    answer = case.call("combine", **none)
    hidden, dtype = case["rows"].shape[1], case["rows"].dtype

    def rule(output: Any) -> None:
        has_form("combined", output, (0, hidden), (dtype,))

    case.judge(rule, answer.outputs, [("one token", torch.zeros(1, hidden, dtype=dtype))])


@requirement(
    "DISPATCH-19",
    MUST,
    "combine",
    "Rows, slots and weights MUST be read by their strides.",
    reason="The weights of a router are often a slice of all scores, the rows one of a workspace.",
    sources=(
        "docs/spec/operations.md",
        "hyper_parallel router",
    ),
    given=scattered(moved=True),
    references=COMBINE,
)
def combine_reads_by_strides(case: Case) -> None:
    """Transposed, strided and offset inputs against the same ones in one piece."""
    found = _combine(case)
    plain = _combine(case, layouts={}).double()
    bound = 2 * _weighted_sum(case, case["rows"], case["slots"], case["weights"]).bound
    _judge_sum(case, found, _Sum(plain, bound))


@requirement(
    "DISPATCH-20",
    MUST,
    "combine",
    "The output MUST have the rows' dtype.",
    reason="The sum is taken in float32; a layer that returns it as such doubles the memory of "
    "every layer after it.",
    sources=(
        "docs/spec/operations.md",
        "NeMo Automodel #3650",
    ),
    given=scattered(),
    references=COMBINE,
)
def the_output_has_the_rows_dtype(case: Case) -> None:
    """Also where the weights have another."""
    found = _combine(case)
    shape, dtype = tuple(found.shape), case["rows"].dtype
    other = torch.float32 if dtype is not torch.float32 else torch.float64
    case.judge(
        lambda answer: has_form("combined", answer, shape, (dtype,)),
        found,
        [("another dtype", found.to(other))],
    )


def gradient_of(gradients: Mapping[str, torch.Tensor | None], name: str) -> torch.Tensor:
    """The gradient of that argument; None is a violation."""
    found = gradients[name]
    if found is None:
        raise Violation(f"gradient of {name}: expected a tensor, got None")
    return found


def _judge_gradient(case: Case, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    def wrong() -> Impostors:
        yield from impostors(expected, 2.0)

    case.judge(
        lambda answer: equal(f"gradient of {name}", answer.double(), expected), found, wrong()
    )


@requirement(
    "DISPATCH-27",
    MUST,
    "dispatch",
    "The gradient of x MUST be the sum of the gradients of its rows.",
    reason="A token that was sent to K experts learns from all of them.",
    sources=("pytorch #160285", "transformers #48687", "torchtitan #2416"),
    given=differentiable("dispatch", rows(content="exact")),
    references=DISPATCH,
)
def the_gradient_of_x_adds_up(case: Case) -> None:
    """Cotangents of small integers, whose sums are exact in every order and dtype."""
    shape = _dispatch(case)[0].rows.shape
    cotangent = Content(shape[0]).integers(-2, 2, *shape).double()
    # Rows are appended at the end and differentiated by nobody.
    cotangent[int(_counts(case).sum()) :] = 0
    found, answer = _dispatch(case, wrt=["x"], cotangents={"0": cotangent})
    token = found.slots[found.known] // found.top_k
    expected = torch.zeros(case["x"].shape, dtype=torch.float64)
    expected.index_add_(0, token, cotangent[found.known])
    _judge_gradient(case, "x", gradient_of(answer.gradients, "x"), expected)


@requirement(
    "DISPATCH-28",
    MUST,
    "combine",
    "The gradients of rows and weights MUST be those of the weighted sum.",
    reason="The router learns through the weights alone, the experts through their rows.",
    sources=("transformers #48687", "torchtitan #2416", "pytorch #160285"),
    given=differentiable("combine", scattered(content="exact")),
    references=COMBINE,
)
def the_gradients_of_a_weighted_sum(case: Case) -> None:
    """weight · cotangent for a row, row · cotangent for a weight; all of them exact."""
    tokens, top_k = case["weights"].shape
    wide = torch.float64 if case["rows"].dtype is torch.float64 else torch.float32
    weights = case["weights"].to(wide)
    case.inputs["weights"] = weights
    cotangent = Content(tokens).integers(-2, 2, tokens, case["rows"].shape[1]).double()
    # A weight's gradient is a sum over H: 32 terms of at most 6 stay exact in every dtype.
    cotangent[:, 32:] = 0
    found = _combine_gradients(case, cotangent)
    slot = case["slots"].long()
    own = cotangent[slot // top_k]
    _judge_gradient(case, "rows", found[0], weights.double().flatten()[slot][:, None] * own)
    expected = torch.zeros(tokens * top_k, dtype=torch.float64)
    expected[slot] = (own * case["rows"].double()).sum(-1)
    _judge_gradient(case, "weights", found[1], expected.reshape(tokens, top_k))


def _combine_gradients(case: Case, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = {name: case[name] for name in ("rows", "slots", "weights")}
    answer = case.call("combine", **given, wrt=["rows", "weights"], cotangents={"": cotangent})
    _combined(answer, *cotangent.shape)
    return gradient_of(answer.gradients, "rows"), gradient_of(answer.gradients, "weights")


@requirement(
    "DISPATCH-29",
    MUST,
    "dispatch",
    "Where no id is valid the gradient of x MUST be zero, not None.",
    reason="A rank without tokens of its own still takes part in the reduction of gradients.",
    sources=("Megatron #4851", "Megatron #1877", "DeepSpeed #5066", "DeepSpeed #4808"),
    given=differentiable("dispatch", _all(rows(invalid=True), invalid="all")),
    references=DISPATCH,
)
def nothing_dispatched_gives_zero_gradients(case: Case) -> None:
    """All ids lead nowhere."""
    shape = _dispatch(case)[0].rows.shape
    _, answer = _dispatch(case, wrt=["x"], cotangents={"0": torch.zeros(shape)})
    _judge_zero(case, "x", answer)


def _judge_zero(case: Case, name: str, answer: Answer) -> None:
    zeros = torch.zeros_like(case[name])

    def rule(found: torch.Tensor | None) -> None:
        equal(f"gradient of {name}", gradient_of({name: found}, name), zeros)

    case.judge(rule, answer.gradients[name], [("None", None), ("ones", torch.ones_like(zeros))])


@requirement(
    "DISPATCH-30",
    MUST,
    "combine",
    "A pair without a row MUST have a zero gradient, also where its weight is NaN or no pair has a "
    "row.",
    reason="None breaks the reduction of gradients between ranks, NaN breaks the router.",
    sources=("Megatron #4851", "DeepSpeed #5066", "TE #3484", "TE #3116", "cosmos-rl #32"),
    given=differentiable("combine", _finite_only(scattered(missing=True))),
    references=COMBINE,
)
def pairs_without_a_row_have_zero_gradients(case: Case) -> None:
    """The weights of missing pairs are NaN; their gradients are zero."""
    tokens, top_k = case["weights"].shape
    missing = torch.ones(tokens * top_k, dtype=torch.bool)
    missing[case["slots"].long()] = False
    missing = missing.reshape(tokens, top_k)
    case.inputs["weights"] = case["weights"].masked_fill(missing, torch.nan)
    case.note("no pair has a row", bool(missing.all()))
    cotangent = torch.ones(tokens, case["rows"].shape[1])
    found = _combine_gradients(case, cotangent)[1]
    zeros = torch.zeros_like(found[missing])

    def rule(answer: torch.Tensor) -> None:
        equal("gradient of weights without a row", answer, zeros)

    nans = torch.full_like(zeros, torch.nan)
    case.judge(rule, found[missing], [("NaN", nans), ("ones", torch.ones_like(zeros))])


@requirement(
    "DISPATCH-31",
    MUST,
    "dispatch",
    "Ids that are no [T, K] integers, or not those of x's tokens, MUST raise.",
    reason="With one token too many in x the last one silently goes nowhere.",
    sources=(
        "docs/spec/operations.md",
        "afd-plugin #301",
    ),
    given=rows(invalid=False),
    references=DISPATCH,
)
def what_does_not_fit_is_not_dispatched(case: Case) -> None:
    """Each bad call by itself has to raise."""
    x, ids = case["x"], case["expert_ids"]
    good = {"x": x, "expert_ids": ids, "num_experts": case["num_experts"]}
    must_raise(
        case,
        "dispatch",
        good,
        {
            "a token without ids": good | {"x": torch.cat([x, x[:1]])},
            "ids without a token": good | {"expert_ids": torch.cat([ids, ids[:1]])},
            "ids with one dimension": good | {"expert_ids": ids[:, 0]},
            "ids that are floats": good | {"expert_ids": ids.float()},
            "x with one dimension": good | {"x": x[:, 0]},
        },
    )


@requirement(
    "DISPATCH-32",
    MUST,
    "combine",
    "Slots that are no integers or not one for each row, and weights that are no [T, K], MUST "
    "raise.",
    reason="Broadcast instead, one slot takes all rows.",
    sources=("docs/spec/operations.md",),
    given=scattered(missing=False),
    references=COMBINE,
)
def what_does_not_fit_is_not_combined(case: Case) -> None:
    """Each bad call by itself has to raise."""
    slots = case["slots"]
    good = {"rows": case["rows"], "slots": slots, "weights": case["weights"]}
    must_raise(
        case,
        "combine",
        good,
        {
            "a slot too many": good | {"slots": torch.cat([slots, slots[:1]])},
            "slots with two dimensions": good | {"slots": slots[:, None]},
            "slots that are floats": good | {"slots": slots.float()},
            "weights with one dimension": good | {"weights": case["weights"][:, 0]},
            "rows with one dimension": good | {"rows": case["rows"][:, 0]},
        },
    )


@requirement(
    "DISPATCH-34",
    MAY,
    "dispatch",
    "Rows whose slot is T·K MAY be appended to reach a static shape.",
    reason="A graph that is captured once needs shapes that do not depend on the routing.",
    sources=(
        "SGLang #30895",
        "SGLang #25852",
    ),
    given=rows(),
    references=DISPATCH,
)
def rows_may_be_appended(case: Case) -> None:
    """How often it was so; never judged."""
    found, _ = _dispatch(case)
    case.note("rows appended", bool((found.slots == len(found.owner)).any()))
    case.note("no row appended", not bool((found.slots == len(found.owner)).any()))


@requirement(
    "DISPATCH-35",
    MUST,
    "dispatch",
    "More slots than sixteen bits hold MUST each get their row, and the counts MUST say so.",
    reason="A prompt of 8000 tokens with eight experts each is beyond them; a slot or a count that "
    "wraps around is another token's.",
    sources=("vLLM #34279", "vLLM #34507", "SGLang #4727", "Liger #1248"),
    given=rows(long=True),
    references=DISPATCH,
)
def slots_beyond_sixteen_bits_get_their_rows(case: Case) -> None:
    """Slots, rows and counts, just beyond 2^15 and 2^16 slots."""
    found, _ = _dispatch(case)
    case.note("beyond 2^16", len(found.owner) >= 2**16)
    slots = (found.owner >= 0).nonzero()[:, 0]
    expected, counts = case["x"][slots // found.top_k], _counts(case)
    came = (found.counts, *found.by_slot)

    def rule(answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        equal("tokens_per_expert", answer[0], counts)
        equal("slots", answer[1], slots)
        equal("rows by slot", answer[2], expected)

    def wrong() -> Impostors:
        yield "counts of sixteen bits", (counts - 2**16, slots, expected)
        if len(slots):
            yield "slots of fourteen bits", (counts, slots % 2**14, expected)

    case.judge(rule, came, wrong())


@requirement(
    "DISPATCH-36",
    MUST,
    "combine",
    "More slots than sixteen bits hold MUST each add their row to their token.",
    reason="A slot that wraps around adds its row to another token, with another weight.",
    sources=("vLLM #34279", "vLLM #34507", "SGLang #4727", "Liger #1248"),
    given=scattered(content="exact", long=True),
    references=COMBINE,
)
def slots_beyond_sixteen_bits_add_their_rows(case: Case) -> None:
    """As DISPATCH-12, just beyond 2^15 and 2^16 slots."""
    case.note("beyond 2^16", case["weights"].numel() >= 2**16)
    found = _combine(case)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"]).value
    case.judge(
        lambda answer: equal("combined", answer.double(), expected),
        found,
        impostors(expected),
    )


@requirement(
    "DISPATCH-37",
    MUST,
    "combine",
    "A row whose slot is T·K MUST change nothing, no gradient of a weight either, and get a "
    "gradient of zero, whatever it holds.",
    reason="Graphs of a fixed shape append rows that hold what was in memory; zero times NaN is "
    "NaN.",
    sources=("SGLang #30895", "SGLang #25852", "TE #3484", "pytorch #154557"),
    given=_finite_only(scattered(content="exact", appended=True)),
    references=COMBINE,
)
def rows_of_nobody_change_nothing(case: Case) -> None:
    """Up to five rows of NaN and infinity at the end."""
    total, rows_ = case["weights"].numel(), case["rows"].clone()
    nobodys = case["slots"] == total
    rows_[nobodys] = torch.nan
    rows_[nobodys, 1::2] = torch.inf
    case.inputs["rows"] = rows_
    kept = ~nobodys
    expected = _weighted_sum(case, rows_[kept], case["slots"][kept], case["weights"]).value
    wrong = [("NaN", torch.full_like(expected, torch.nan)), *impostors(expected)]
    case.judge(lambda answer: equal("combined", answer.double(), expected), _combine(case), wrong)
    if "combine" in case.scope.capabilities.gradients:
        cotangent = torch.ones(len(expected), rows_.shape[1])
        # As in DISPATCH-28: sums over so many columns are exact in every dtype.
        cotangent[:, 32:] = 0
        of_rows, of_weights = _combine_gradients(case, cotangent)
        found = of_rows[nobodys]
        zeros = torch.zeros_like(found)
        case.judge(
            lambda answer: equal("gradient of rows of nobody", answer, zeros),
            found,
            [("ones", zeros + 1), ("NaN", zeros + torch.nan)],
        )
        sums = torch.zeros(total, dtype=torch.float64)
        sums[case["slots"][kept].long()] = rows_[kept, :32].double().sum(-1)
        _judge_gradient(case, "weights", of_weights, sums.view_as(case["weights"]))


@requirement(
    "DISPATCH-38",
    MUST,
    "combine",
    "A row that is NaN or infinite MUST show in its token.",
    reason="A broken expert whose NaN is taken for zero is found by nobody.",
    sources=("Shazeer et al. (arXiv 1701.06538)", "SGLang #30895"),
    given=_finite_only(scattered(content="special")),
    references=COMBINE,
)
def what_is_not_finite_shows(case: Case) -> None:
    """NaN and infinities where the weighted sum has them, and nowhere else."""
    found = _combine(case)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"]).value
    # A finite sum may still be beyond the rows' dtype.
    limit = torch.finfo(case["rows"].dtype).max / 2
    sure = ~(expected.isfinite() & (expected.abs() > limit))
    case.note("a NaN", bool(expected.isnan().any()))
    case.note("an infinity", bool(expected.isinf().any()))

    def kinds(sums: torch.Tensor) -> torch.Tensor:
        sums = sums.double()
        signs = torch.where(sums.isinf(), sums.sign(), 0)
        return torch.where(sums.isnan(), torch.nan, signs)[sure]

    def wrong() -> Impostors:
        if not bool(expected[sure].isfinite().all()):
            yield "finite", expected.nan_to_num(0.0, 1.0, -1.0)

    case.judge(
        lambda answer: equal("what is not finite", kinds(answer), kinds(expected)), found, wrong()
    )


@requirement(
    "DISPATCH-39",
    MUST,
    "combine",
    "Products beyond the range of the rows' dtype MUST be summed to what lies inside it, unless "
    "a rounding of them is declared.",
    reason="In float16 twice 40000 is infinite, and the difference of two such is NaN instead of "
    "the small number that it is.",
    sources=("torchtitan #2679", "DeepEP #112"),
    given=Given(lambda scope: _overflowing(scope), lambda plan: _build_overflowing(plan)),
    references=COMBINE,
)
def products_do_not_overflow(case: Case) -> None:
    """Rows near 2^15 times 4 and -4: the differences are exact in float16."""
    found = _combine(case)
    expected = _weighted_sum(case, case["rows"], case["slots"], case["weights"]).value
    case.judge(
        lambda answer: equal("combined", answer.double(), expected),
        found,
        [("NaN", torch.full_like(expected, torch.nan)), *impostors(expected)],
    )


def _overflowing(scope: Scope) -> Plans | None:
    declared = {"combine", "weighted_output"} & set(scope.capabilities.rounding_points)
    if "float16" not in scope.dtypes or declared or (scope.capabilities.max_top_k or 2) < 2:
        return None
    found = _all(scattered(missing=False, least_k=2), dtype="float16").plans(scope)
    return None if found is None else found.map(_with_weights_of_its_own)


def _with_weights_of_its_own(plan: Plan) -> Plan:
    return {**plan, "weights": "float16" if plan["weights"] == "float16" else "float32"}


def _build_overflowing(plan: Plan) -> Inputs:
    inputs = build_scattered(plan)
    (tokens, top_k), hidden = inputs["weights"].shape, inputs["rows"].shape[1]
    content = Content(plan["seed"])
    weights = torch.zeros(tokens, top_k)
    # Two pairs of each token, anywhere in its row.
    pair = content.distinct(tokens, top_k, 2)
    weights.scatter_(1, pair, torch.tensor([4.0, -4.0]).expand(tokens, 2))
    rows_ = 2.0**15 - 32 * content.integers(0, 7, len(inputs["slots"]), hidden)
    inputs["weights"] = weights.to(torch_dtype(plan["weights"]))
    inputs["rows"] = rows_.to(torch.float16)
    return inputs


@requirement(
    "DISPATCH-40",
    SHOULD,
    "dispatch",
    "The gradient of x SHOULD be summed in float32, or in float64 where x is float64.",
    reason="In bfloat16 256 + 1 is 256: of a token's experts the one with the largest gradient "
    "silences the others.",
    sources=("torchtitan #2679", "torchtitan #2416"),
    given=differentiable(
        "dispatch",
        Given(
            lambda scope: _swallowed(scope),
            lambda plan: build_rows(plan),
        ),
    ),
    references=DISPATCH,
)
def the_gradient_of_x_is_summed_in_float32(case: Case) -> None:
    """Of a token's cotangents one is 2^p, the others are 1: the ones have to arrive."""
    found, _ = _dispatch(case)
    top_k = found.top_k
    large = Content(len(found.slots)).integers(0, top_k - 1, len(case["x"]))
    swallows = SWALLOWS[str(case["x"].dtype).removeprefix("torch.")]
    token, k = found.slots // top_k, found.slots % top_k
    ours = torch.where(k == large[token.clamp_max(len(large) - 1)], swallows, 1.0)
    cotangent = ours.where(found.known, 0.0).double()[:, None].repeat(1, case["x"].shape[1])
    _, answer = _dispatch(case, wrt=["x"], cotangents={"0": cotangent})
    expected = torch.full(case["x"].shape, swallows + top_k - 1, dtype=torch.float64)
    lost = torch.full_like(expected, swallows)
    case.judge(
        lambda found: equal("gradient of x", found.double(), expected),
        gradient_of(answer.gradients, "x"),
        [("the ones lost", lost)],
    )


def _swallowed(scope: Scope) -> Plans | None:
    dtypes = tuple(d for d in scope.dtypes if d in SWALLOWS)
    most = scope.capabilities.max_top_k or 16
    if not dtypes or most < 3:
        return None
    found = rows(invalid=False, least_k=3).plans(scope)
    if found is None:
        return None
    # K is odd, so that the sum has an even last digit and is exact in the dtype.
    return st.tuples(found, st.sampled_from(dtypes)).map(
        lambda drawn: {
            **drawn[0],
            "dtype": drawn[1],
            "top_k": drawn[0]["top_k"] - 1 + drawn[0]["top_k"] % 2,
        }
    )


@requirement(
    "DISPATCH-48",
    SHOULD,
    "combine",
    "The gradient of the weights SHOULD be summed in float32, or in float64 where the rows are "
    "float64.",
    reason="It is a sum over all columns: in bfloat16 one large column silences the others, and "
    "the router learns from it alone.",
    sources=("torchtitan #2679", "torchtitan #2416"),
    given=differentiable(
        "combine",
        Given(
            lambda scope: _with_dtype(scattered().plans(scope), scope, SWALLOWS),
            lambda plan: build_scattered({**plan, "weights": _wide(plan)}),
        ),
    ),
    references=COMBINE,
)
def the_gradient_of_the_weights_is_summed_in_float32(case: Case) -> None:
    """Rows of ones; of a token's cotangents one is 2^p, the others are 1: the ones arrive."""
    case.inputs["rows"] = torch.ones_like(case["rows"])
    swallows = SWALLOWS[str(case["rows"].dtype).removeprefix("torch.")]
    (tokens, top_k), hidden = case["weights"].shape, case["rows"].shape[1]
    # An odd number of them, so that the sum has an even last digit and is exact in the dtype.
    columns = min(hidden, 31) - (min(hidden, 31) + 1) % 2
    cotangent = torch.zeros(tokens, hidden, dtype=torch.float64)
    cotangent[:, :columns] = 1
    large = Content(tokens).integers(0, columns - 1, tokens, 1)
    cotangent.scatter_(1, large, swallows)
    _, found = _combine_gradients(case, cotangent)
    expected = torch.zeros(tokens * top_k, dtype=torch.float64)
    expected[case["slots"].long()] = swallows + columns - 1
    expected = expected.reshape(tokens, top_k)
    lost = expected.clamp(max=swallows)
    case.judge(
        lambda answer: equal("gradient of weights", answer.double(), expected),
        found,
        [("the ones lost", lost)] if columns > 1 else [],
    )


def _wide(plan: Plan) -> str:
    return "float64" if plan["dtype"] == "float64" else "float32"


def _with_dtype(plans: Plans | None, scope: Scope, dtypes: Iterable[str]) -> Plans | None:
    """The same plans in those of the scope's dtypes."""
    wanted = tuple(dtype for dtype in dtypes if dtype in scope.dtypes)
    if plans is None or not wanted:
        return None
    return st.tuples(plans, st.sampled_from(wanted)).map(
        lambda drawn: {**drawn[0], "dtype": drawn[1]}
    )


@requirement(
    "DISPATCH-42",
    MUST,
    "dispatch",
    "A call on the same storage with other data MUST give the answer to the other data.",
    reason="Counters that are not set back, or a captured graph, answer the first call once more.",
    sources=("SGLang #3339", "SGLang #25852"),
    given=rows(least_experts=2),
    references=DISPATCH,
)
def the_same_tokens_storage_with_other_tokens(case: Case) -> None:
    """The second call's x and ids are written over the first one's."""
    ids, experts = case["expert_ids"], case["num_experts"]
    given = {name: case[name] for name in ("x", "expert_ids", "num_experts")}
    # Every valid id moves by one expert.
    moved = torch.where((ids >= 0) & (ids < experts), (ids + 1) % experts, ids)
    case.inputs["x"], case.inputs["expert_ids"] = case["x"].flip(0) + 1, moved
    changed = {name: case[name] for name in given}
    first, second = case.planned("dispatch", **given), case.planned("dispatch", **changed, reuse=0)
    found = _read(case.session([first, second])[1], valid_ids(case), case["x"].shape[1])
    slots = (found.owner >= 0).nonzero()[:, 0]
    expected = case["x"][slots // found.top_k]

    def rule(answer: Dispatched) -> None:
        equal("tokens_per_expert", answer.counts, _counts(case))
        equal("slots", answer.by_slot[0], slots)
        _follows("experts of the rows", answer.owners, False)
        equal("rows by slot", answer.by_slot[1], expected)

    def wrong() -> Impostors:
        yield "counted twice", replace(found, counts=found.counts + 1)
        if len(slots):
            yield "the rows before", replace(found, rows=found.rows - 1)

    case.judge(rule, found, wrong())


@requirement(
    "DISPATCH-43",
    MUST,
    "combine",
    "A call on the same storage with other data MUST give the answer to the other data.",
    reason="A sum that is not cleared goes on from the call before, and a captured graph answers "
    "it once more.",
    sources=("SGLang #3339", "SGLang #25852"),
    given=scattered(content="exact"),
    references=COMBINE,
)
def the_same_rows_storage_with_other_rows(case: Case) -> None:
    """The second call's rows, slots and weights are written over the first one's."""
    given = {name: case[name] for name in ("rows", "slots", "weights")}
    tokens, top_k = case["weights"].shape
    changed = {
        "rows": given["rows"].flip(0) + 1,
        # Every row goes to the next token.
        "slots": (given["slots"] + top_k) % max(1, tokens * top_k),
        "weights": given["weights"] * 2,
    }
    first, second = case.planned("combine", **given), case.planned("combine", **changed, reuse=0)
    answer = case.session([first, second])[1]
    expected = _weighted_sum(case, changed["rows"], changed["slots"], changed["weights"]).value
    before = _weighted_sum(case, given["rows"], given["slots"], given["weights"]).value
    wrong = list(impostors(expected))
    if not torch.equal(before, expected):
        wrong.append(("the sum before", before))
    found = _combined(answer, tokens, given["rows"].shape[1])
    case.judge(lambda answer: equal("combined", answer.double(), expected), found, wrong)


@requirement(
    "DISPATCH-47",
    MUST,
    "combine",
    "The gradient of a row that belongs to nobody MUST be zero.",
    reason="Such rows hold what the memory held; a gradient goes on from them into the experts.",
    sources=("pytorch #154557", "torchtitan #1237", "TE #3116"),
    given=differentiable("combine", scattered(content="exact", appended=True)),
    references=COMBINE,
)
def rows_of_nobody_have_zero_gradients(case: Case) -> None:
    """Rows whose slot is T * K, behind those of the tokens."""
    tokens, top_k = case["weights"].shape
    nobody = case["slots"].long() == tokens * top_k
    cotangent = torch.ones(tokens, case["rows"].shape[1])
    found = _combine_gradients(case, cotangent)[0][nobody]
    zeros = torch.zeros_like(found)
    wrong = [("NaN", torch.full_like(zeros, torch.nan)), ("ones", torch.ones_like(zeros))]
    case.judge(lambda answer: equal("gradient of a row of nobody", answer, zeros), found, wrong)
