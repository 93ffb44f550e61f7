"""Requirements on `update_bias`: the step of the selection bias towards an even load."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.case import Case, must_raise
from moe_conformance.inputs.load_balancing import biases
from moe_conformance.inputs.routing import BLOCKS, past
from moe_conformance.judge import has_form, within
from moe_conformance.precision import UNIT
from moe_conformance.registry import MUST, requirement
from moe_conformance.requirements.load_balancing import judge_untouched, wide_dtype

NAMES = ("bias", "tokens_per_expert", "rate", "centred")
UPDATE = ("bias_update.update_bias",)
PAPER = "Wang et al. (arXiv 2408.15664) algorithm 1"


def _step(case: Case, **changed: Any) -> torch.Tensor:
    """[E] the step that the counts ask for, float64."""
    counts = changed.get("tokens_per_expert", case["tokens_per_expert"]).double()
    # In integers: the sum is exact, and a count is compared with the mean times E.
    sign = torch.sign(counts.sum() - len(counts) * counts)
    return _centred(case, case["rate"] * sign)


def _centred(case: Case, step: torch.Tensor) -> torch.Tensor:
    return step - step.mean() if case["centred"] else step


def _moved(case: Case, step: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[E] the new bias and a bound: the rate and a mean of E steps rounded, then the sum."""
    bias = case["bias"].double()
    unit = 2 * UNIT[wide_dtype(str(case["bias"].dtype).removeprefix("torch."))]
    value = bias + (_step(case) if step is None else step)
    return value, unit * ((len(bias) + 6) * case["rate"] + value.abs() + bias.abs())


def _new_bias(case: Case) -> torch.Tensor:
    given = {name: case[name] for name in NAMES}
    found = case.call("update_bias", **given).outputs
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    has_form("bias", found, tuple(case["bias"].shape), floats)
    assert isinstance(found, torch.Tensor)
    return found


def _judge_bias(case: Case, *wrong: tuple[str, torch.Tensor]) -> None:
    """Hold the new bias against the rule; wrong steps are given by name."""
    expected, bound = _moved(case)
    step = _step(case)
    case.note("one expert", len(expected) == 1)
    case.note(f"bias {str(case['bias'].dtype).removeprefix('torch.')}")
    case.note(f"counts {str(case['tokens_per_expert'].dtype).removeprefix('torch.')}")
    everywhere = [("a step for all", expected + case["rate"])]
    if bool(step.any()):
        everywhere += [
            ("the other way", expected - 2 * step),
            ("no step", expected - step),
        ]
    others = [(name, _moved(case, other)[0]) for name, other in wrong]
    case.judge(
        lambda answer: within("bias", answer, expected, bound),
        _new_bias(case),
        [*everywhere, *others],
    )


@requirement(
    "BALANCE-36",
    MUST,
    "update_bias",
    "The bias MUST rise by `rate` for an expert with fewer tokens than the mean, and fall by it "
    "for one with more; with `centred` the mean of these steps goes off each.",
    reason="The step has one size: in proportion to the load it would swing, and the other way "
    "around the router collapses.",
    sources=(PAPER, "Megatron get_updated_expert_bias", "DeepSeek-V3 (arXiv 2412.19437)"),
    given=biases(loads=("spread", "one expert"), simplest=True),
    references=UPDATE,
)
def the_bias_moves_by_the_sign(case: Case) -> None:
    """Counts of all kinds, as integers and as floats."""
    counts = case["tokens_per_expert"].double()
    off = counts.mean() - counts
    wrong = []
    if bool((off.abs() > 0.5).any()):
        # Its mean is 0, centred or not.
        wrong.append(("in proportion", case["rate"] * off / counts.mean().clamp(min=1)))
    _judge_bias(case, *wrong)


@requirement(
    "BALANCE-37",
    MUST,
    "update_bias",
    "An expert with exactly the mean count MUST NOT be moved by the sign rule, centred or not.",
    reason="Balanced experts that step anyway never come to rest.",
    sources=(PAPER, "Megatron get_updated_expert_bias"),
    given=biases(loads=("balanced", "balanced", "alike", "nothing"), simplest=True),
    references=UPDATE,
)
def experts_at_the_mean_stay(case: Case) -> None:
    """About a third of the experts have the mean, which is an integer."""
    counts = case["tokens_per_expert"].double()
    sign = torch.sign(counts.sum() - len(counts) * counts)
    at = (sign == 0).double()
    case.note("all at the mean", bool(at.all()))
    if not bool(at.any()):
        return
    # Where all are at the mean, centring takes away what each was moved.
    wrong = []
    if not (case["centred"] and bool(at.all())):
        wrong = [("a step at the mean", sign + at), ("a step down", sign - at)]
    _judge_bias(case, *((name, _centred(case, case["rate"] * each)) for name, each in wrong))


@requirement(
    "BALANCE-38",
    MUST,
    "update_bias",
    "Integer counts above 2^24 MUST be compared exactly.",
    reason="The counts of a global batch of a long run of micro-batches are that large; in "
    "float32 those that differ by one are equal.",
    sources=("docs/spec/load_balancing.md",),
    given=biases(loads=("huge",), simplest=True, least_experts=2),
    references=UPDATE,
)
def large_counts_are_compared_exactly(case: Case) -> None:
    """Counts of 2^24 to 2^29 that differ by 1 and 2; as float32 they are something else."""
    counts = case["tokens_per_expert"]
    rounded = _step(case, tokens_per_expert=counts.float())
    if torch.equal(rounded, _step(case)):
        return
    _judge_bias(case, ("counts as float32", rounded))


@requirement(
    "BALANCE-39",
    MUST,
    "update_bias",
    "The mean MUST be taken over all E experts, those without tokens too.",
    reason="Over the busy ones it is too high, and experts with less than their fair share of a "
    "full layer are told to rise while those they compete with do, too.",
    sources=(PAPER, "docs/spec/load_balancing.md"),
    given=biases(loads=("idle",), simplest=True, least_experts=4),
    references=UPDATE,
)
def idle_experts_are_part_of_the_mean(case: Case) -> None:
    """Half of the experts have no token."""
    counts = case["tokens_per_expert"].double()
    busy = counts[counts > 0].mean()
    other = _centred(case, case["rate"] * torch.sign(busy - counts))
    if torch.equal(other, _step(case)):
        return
    _judge_bias(case, ("the mean of those in use", other))


@requirement(
    "BALANCE-40",
    MUST,
    "update_bias",
    "With `centred` the mean of the steps MUST be taken away from them.",
    reason="Uncentred biases drift together, far from the scores that they are added to.",
    sources=("torchtitan #1506", "torchtitan moe_load_balancing"),
    given=biases(loads=("spread", "idle", "one expert", "alike", "nothing"), centred=True),
    references=UPDATE,
)
def centred_steps_add_up_to_zero(case: Case) -> None:
    """Against the step as it was, and against a bias that is centred itself."""
    step = case["rate"] * torch.sign(
        case["tokens_per_expert"].double().mean() - case["tokens_per_expert"].double()
    )
    bias = case["bias"].double()
    wrong = []
    if abs(float(step.mean())) > 0.01 * case["rate"]:
        wrong.append(("not centred", step))
    if abs(float(bias.mean())) > 0.01 * case["rate"]:
        wrong.append(("the bias centred", _step(case) - bias.mean()))
    _judge_bias(case, *wrong)


@requirement(
    "BALANCE-41",
    MUST,
    "update_bias",
    "The new bias MUST be float32 (float64 for a float64 bias) and keep a step of 0.001 on 0.5.",
    reason="bfloat16 has no number between 0.5 and 0.5039: the bias stops moving.",
    sources=("Megatron get_updated_expert_bias", "docs/spec/load_balancing.md"),
    given=biases(
        loads=("spread", "idle", "balanced"), rates=(0.001,), values=("half",), least_experts=2
    ),
    references=UPDATE,
)
def a_small_step_is_kept(case: Case) -> None:
    """A bias of 0.5 in every dtype."""
    wide = torch.float64 if case["bias"].dtype is torch.float64 else torch.float32
    expected, bound = _moved(case)
    if not bool(_step(case).any()):
        return

    def rule(answer: torch.Tensor) -> None:
        has_form("bias", answer, tuple(expected.shape), (wide,))
        within("bias", answer, expected, bound)

    right = expected.to(wide)
    case.note(f"bias {str(case['bias'].dtype).removeprefix('torch.')}")
    case.judge(
        rule,
        _new_bias(case),
        [("bfloat16", right.bfloat16()), ("through bfloat16", right.bfloat16().to(wide))],
    )


@requirement(
    "BALANCE-42",
    MUST,
    "update_bias",
    "`bias` and `tokens_per_expert` MUST be left as they are, and the new bias MUST have memory of "
    "its own.",
    reason="The caller copies it over when the step is done; the counts are reset by whoever "
    "collected them.",
    sources=("docs/spec/operations.md",),
    given=biases(rates=(0.0, 0.001, 2)),
    references=UPDATE,
)
def the_update_leaves_its_inputs_alone(case: Case) -> None:
    """Both arguments are compared with copies; a step of 0 gives no reason to hand one back."""
    judge_untouched(case, [case.call("update_bias", **{n: case[n] for n in NAMES})])


@requirement(
    "BALANCE-43",
    MUST,
    "update_bias",
    "Counts that are not one for each expert, and a bias that is not [E] floats, MUST raise.",
    reason="One count broadcasts to all experts, and the counts of fewer experts belong to another "
    "layer.",
    sources=("docs/spec/operations.md",),
    given=biases(least_experts=2),
    references=UPDATE,
)
def what_moves_no_bias_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    good = {name: case[name] for name in NAMES}
    bias, counts = good["bias"], good["tokens_per_expert"]
    must_raise(
        case,
        "update_bias",
        good,
        {
            "one count for all": good | {"tokens_per_expert": counts[:1]},
            "a count too many": good | {"tokens_per_expert": torch.cat([counts, counts[:1]])},
            "counts with two dimensions": good | {"tokens_per_expert": counts[None]},
            "a bias with two dimensions": good | {"bias": bias[None]},
            "a bias of integers": good | {"bias": counts.long()},
            "one bias for all": good | {"bias": bias[:1]},
            "counts that are bools": good | {"tokens_per_expert": counts > 0},
        },
    )


@requirement(
    "BALANCE-54",
    MUST,
    "update_bias",
    "Every call MUST move the bias by the counts of its own, and a rate of 0 by nothing.",
    reason="Counts that are added up over calls are those of no batch; DeepSeek-V3 ends its "
    "training with a rate of 0.",
    sources=(PAPER, "DeepSeek-V3 (arXiv 2412.19437) section 4.2", "torchtitan #1593"),
    given=biases(loads=("spread", "idle", "one expert"), rates=(0.001, 0.125, 2, 0.0)),
    references=UPDATE,
)
def every_step_is_of_its_own_counts(case: Case) -> None:
    """The counts in the opposite order, in the storage of the first call, twice."""
    first = {name: case[name] for name in NAMES}
    other = first | {"tokens_per_expert": first["tokens_per_expert"].flip(0)}
    calls = [
        case.planned("update_bias", **first),
        case.planned("update_bias", **other, reuse=0),
        case.planned("update_bias", **other, reuse=0),
    ]
    case.note("a rate of 0", case["rate"] == 0)
    for answer, given in zip(case.session(calls), (first, other, other), strict=True):
        expected, bound = _moved(case, _step(case, **given))
        has_form("bias", answer.outputs, tuple(expected.shape), (torch.float32, torch.float64))

        def rule(
            found: torch.Tensor, expected: torch.Tensor = expected, bound: torch.Tensor = bound
        ) -> None:
            within("bias", found, expected, bound)

        wrong = [("a step for all", expected + max(case["rate"], 0.001))]
        case.judge(rule, answer.outputs, wrong)


@requirement(
    "BALANCE-55",
    MUST,
    "update_bias",
    "The rule MUST hold for every number of experts, on the boundaries of blocks and beside them, "
    "and for counts of any dtype.",
    reason="One block of threads moves all biases; a tail that is left out stays where it was.",
    sources=("aiter #2359", "imp #2056"),
    given=biases(experts=tuple(past(BLOCKS, 1, 513)), loads=("spread", "idle")),
    references=UPDATE,
)
def no_number_of_biases_is_special(case: Case) -> None:
    """One past a block, a whole one, and one short of it."""
    whole = dict(case.inputs)
    for short in range(3):
        experts = len(whole["bias"]) - short
        for name in ("bias", "tokens_per_expert"):
            case.inputs[name] = whole[name][:experts]
        _judge_bias(case)
