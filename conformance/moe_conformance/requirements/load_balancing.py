"""Requirements on `balance_loss` and `z_loss`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from moe_reference.config import BalanceConfig, RoutingConfig

from moe_conformance.case import Answer, Case, must_raise
from moe_conformance.inputs.given import Content, Given, Scope, differentiable, either
from moe_conformance.inputs.load_balancing import (
    BATCH,
    ROUTINGS,
    SEQUENCE,
    UNIVERSE,
    at_boundaries,
    balance,
    crowded,
    router_logits,
)
from moe_conformance.judge import Violation, equals, has_form, impostors, within
from moe_conformance.precision import TINY, UNIT
from moe_conformance.registry import MUST, requirement
from moe_conformance.routing_oracle import C, RoutingOracle

NAMES = ("logits", "expert_ids", "config", "padding_mask", "tokens_per_expert")
SOFTMAX = ("softmax",)
SWITCH = ("switch", "deepseek_expert")
NORMALISED = ("sigmoid", "sqrtsoftplus")
DISTINCT = ("uniform", "skewed", "half empty")
"""Routings without equal ids in a row."""

LEANING = ("leaning",)
LIVELY = ("normal", "leaning", "shifted")
"""Shapes of logits whose gradients do not vanish."""

SCALE = 64.0
"""What the loss is multiplied with before it is differentiated: a power of two."""

BALANCE = ("load_balancing.balance_loss",)
Z_LOSS = ("load_balancing.z_loss",)
SWITCH_PAPER = "Switch Transformer (arXiv 2101.03961) equations 4-6"
GSHARD_PAPER = "GShard (arXiv 2006.16668)"
V3_PAPER = "DeepSeek-V3 (arXiv 2412.19437) equations 17-20"


@dataclass(frozen=True)
class Loss:
    """A loss in float64, and how far a legal float32 answer may be from it.

    Attributes:
        value: a scalar.
        error: a scalar, a bound.
        gradient: [T, E], by the logits.
        gradient_error: [T, E], a bound, before rounding to the logits' dtype.
        pull: [N, E], what each sequence's mean probabilities are weighted with.
    """

    value: torch.Tensor
    error: torch.Tensor
    gradient: torch.Tensor
    gradient_error: torch.Tensor
    pull: torch.Tensor


def _scores(
    case: Case, logits: torch.Tensor, score: str, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """[T, E] scores, a bound on their error, and the rounding unit of what follows."""
    oracle = RoutingOracle.of(
        logits,
        RoutingConfig(top_k=1, score=score),  # type: ignore[arg-type]
        points=frozenset(case.scope.capabilities.rounding_points),
        router_dtype=case.scope.capabilities.router_dtype,
        dtype=dtype,
    )
    found = oracle.scores(logits)
    return found.value, found.error, oracle.unit


def _slope(logits: torch.Tensor, scores: torch.Tensor, score: str) -> torch.Tensor:
    """[T, E] the derivative of log(score) by its own logit; softmax has the rest elsewhere."""
    if score == "softmax":
        return torch.ones_like(logits)
    if score == "sigmoid":
        return 1 - scores
    # softplus(x) and sigmoid(x) are both exp(x) far below 0.
    soft = -F.logsigmoid(-logits.clamp(min=-30))
    return logits.clamp(min=-30).sigmoid() / (2 * soft)


def _expected(case: Case, **changed: Any) -> Loss:
    """The loss that these inputs have to give; see `Loss`.

    All terms are positive, so relative errors of factors add up: a sum of n terms that is computed
    in any order is off by at most n units of rounding, a product or a quotient by one.
    """
    given = {name: case[name] for name in NAMES} | changed
    logits, ids, config = given["logits"], given["expert_ids"].long(), given["config"]
    mask, counts = given["padding_mask"], given["tokens_per_expert"]
    dtype = str(logits.dtype).removeprefix("torch.")
    tokens, experts = logits.shape
    real = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    told = config.loss in SEQUENCE and config.sequence_length is not None
    length = config.sequence_length if told else max(tokens, 1)
    wide = logits.double().masked_fill(~real[:, None], 0.0)
    scores, error, unit = _scores(case, wide, config.score, dtype)
    if config.score != "softmax":
        # The sum of E scores, epsilon, and a quotient.
        total = scores.sum(-1, keepdim=True) + config.epsilon
        probability = scores / total
        off = error.sum(-1, keepdim=True) / total + (experts + 4) * unit
        error = error / total + probability * off
    else:
        probability = scores
    shown = real.double()[:, None]
    probability, error = probability * shown, error * shown

    number = real.view(-1, length).sum(1).double()
    divisor = number.clamp(min=1)[:, None]
    mean = probability.view(-1, length, experts).sum(1) / divisor
    mean_error = error.view(-1, length, experts).sum(1) / divisor + (length + 2) * unit * mean

    if counts is None:
        counted = ids[:, :1] if config.loss == "gshard" else ids
        one_hot = (counted[:, :, None] == torch.arange(experts)).sum(1) * real[:, None]
        counted_in = one_hot.view(-1, length, experts).sum(1).double()
    else:
        counted_in = counts.double().expand(len(number), experts)
    total_count = counted_in.sum(1, keepdim=True)
    share = counted_in / total_count.where(total_count > 0, 1.0)
    pull = _pull(share, config)
    if config.loss == "transformers_concatenated":
        pull = pull * ids.shape[1]
    sequences = max(int((number > 0).sum()), 1)
    pull = pull * config.coefficient / sequences
    value = (pull * mean).sum()
    # Counts rounded to float32, their sum and quotient, the factors, a sum over E, one over N; at
    # last the result is rounded to its dtype, where the router computes in a wider one.
    rounded = (3 * experts + len(number) + 16) * unit + UNIT[wide_dtype(dtype)]
    bound = (pull * mean_error).sum() + rounded * value + (experts + 4) * TINY[wide_dtype(dtype)]

    row_pull = (pull / divisor).repeat_interleave(length, 0)
    level = (row_pull * probability).sum(1, keepdim=True)
    level_error = (row_pull * error).sum(1, keepdim=True)
    slope = _slope(wide, scores, config.score)
    gradient = probability * slope * (row_pull - level)
    # The difference may cancel: it is off by what its two terms are off by.
    mass = probability * (row_pull + level)
    gradient_error = error * (row_pull + level) + probability * level_error
    gradient_error = gradient_error + mass * unit * (4 * experts + 32 + C * wide.abs() + C)
    return Loss(value, bound, gradient, gradient_error, pull)


def _pull(share: torch.Tensor, config: BalanceConfig) -> torch.Tensor:
    """[N, E] E times the share, or for each device's experts D times the share of the device."""
    experts = share.shape[1]
    if config.loss != "deepseek_device":
        return experts * share
    assert config.num_devices is not None
    by_device = share.view(len(share), config.num_devices, -1)
    size = by_device.shape[2]
    return (config.num_devices * by_device.sum(2)).repeat_interleave(size, 1)


def wide_dtype(dtype: str) -> str:
    """The dtype that is computed in: float64 stays, all others are float32."""
    return "float64" if dtype == "float64" else "float32"


def _given(case: Case, **changed: Any) -> dict[str, Any]:
    return {name: case[name] for name in NAMES} | changed


def _loss(case: Case, **changed: Any) -> torch.Tensor:
    """The target's loss."""
    return _number("loss", case.call("balance_loss", **_given(case, **changed)))


def _number(what: str, answer: Answer) -> torch.Tensor:
    """One number, float64; its exact form is a requirement of its own."""
    found = answer.outputs
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        came = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise Violation(f"{what}: expected a scalar, got {came}")
    return found.double().reshape(())


def _judge_loss(
    case: Case, found: torch.Tensor, expected: Loss, *wrong: tuple[str, torch.Tensor]
) -> None:
    config = case["config"]
    for name in ("loss", "score"):
        case.note(f"{name} {getattr(config, name)}")
    case.note("one token", len(case["logits"]) == 1)
    case.note("one expert", case["logits"].shape[1] == 1)
    case.judge(
        lambda answer: within("loss", answer, expected.value, expected.error),
        found,
        [*impostors(expected.value), *wrong],
    )


def _differentiated(case: Case, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient in the logits of `SCALE` times it."""
    given = _given(case, **changed)
    answer = case.call(
        "balance_loss", **given, wrt=["logits"], cotangents={"": torch.tensor(SCALE)}
    )
    return _number("loss", answer), _gradient(answer)


def _gradient(answer: Answer) -> torch.Tensor:
    found = answer.gradients["logits"]
    if found is None:
        raise Violation("gradient of logits: expected a tensor, got None")
    return found


def _close_gradient(
    logits: torch.Tensor, gradient: torch.Tensor, error: torch.Tensor, found: torch.Tensor
) -> None:
    """The gradient was computed wide, and rounded once to the logits' dtype."""
    dtype = str(logits.dtype).removeprefix("torch.")
    bound = SCALE * error
    size = SCALE * gradient.abs() + bound
    tiny = TINY[dtype] + (logits.shape[1] + 4) * SCALE * TINY[wide_dtype(dtype)]
    within("gradient of logits", found, SCALE * gradient, bound + UNIT[dtype] * size + tiny)


def _judge_gradient(
    case: Case,
    logits: torch.Tensor,
    found: torch.Tensor,
    gradient: torch.Tensor,
    error: torch.Tensor,
    *wrong: tuple[str, torch.Tensor],
) -> None:
    scaled = SCALE * gradient
    case.judge(
        lambda answer: _close_gradient(logits, gradient, error, answer),
        found,
        [*impostors(scaled, 1.25), *wrong],
    )


def _changed(config: BalanceConfig, **fields: Any) -> BalanceConfig:
    return dataclasses.replace(config, **fields)


def _finite_only(given: Given) -> Given:
    """The same inputs, for targets that take NaN and infinity."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


def _direct(given: Given) -> Given:
    """The same inputs, for targets that take logits as they are: infinity times 0 is NaN."""
    return Given(
        lambda scope: given.plans(scope) if scope.capabilities.logits_through == "direct" else None,
        given.build,
    )


def _takes_mask(given: Given) -> Given:
    """The same inputs, for targets that take a padding mask."""

    def taken(scope: Scope) -> bool:
        declared = scope.capabilities.alternatives("balance")
        return all(True in each.get("padding_mask", (True,)) for each in declared)

    return Given(lambda scope: given.plans(scope) if taken(scope) else None, given.build)


@requirement(
    "BALANCE-01",
    MUST,
    "balance_loss",
    "`switch` and `deepseek_expert` MUST be the coefficient times E times the sum over experts of "
    "share times mean probability.",
    reason="Coefficients are tuned for one formula; another factor, or a product over all pairs of "
    "experts, trains another router.",
    sources=(SWITCH_PAPER, "DeepSeekMoE (arXiv 2401.06066) equations 12-14", "Megatron #7213"),
    given=balance(losses=SWITCH, simplest=True, narrow=False),
    references=BALANCE,
)
def the_loss_is_e_times_share_times_probability(case: Case) -> None:
    """The formula, on experts that the logits chose."""
    expected = _expected(case)
    wrong = []
    if case["logits"].shape[1] > 1:
        config = case["config"]
        pairs = torch.tensor(config.coefficient * case["logits"].shape[1], dtype=torch.float64)
        wrong = [("the product over all pairs", pairs)]
    _judge_loss(case, _loss(case), expected, *wrong)


def _equal_logits(case: Case) -> torch.Tensor:
    return torch.full_like(case["logits"], 0.5)


def _collapsed(case: Case) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits that give K experts the same probability and the others none, the ids, and the loss.

    exp(-1000) is 0 in every dtype.
    """
    config, ids = case["config"], case["expert_ids"]
    experts, top_k = case["logits"].shape[1], ids.shape[1]
    first = experts - top_k
    logits = torch.full_like(case["logits"], -1000.0)
    logits[:, first:] = 0
    chosen = torch.arange(first, experts).to(ids.dtype).expand_as(ids).contiguous()
    value = experts / top_k
    if config.loss == "transformers_concatenated":
        value = float(experts)
    if config.loss == "deepseek_device":
        devices = config.num_devices
        size = experts // devices
        inside = [
            sum(first <= e < experts for e in range(d * size, (d + 1) * size))
            for d in range(devices)
        ]
        value = devices * sum((count / top_k) ** 2 for count in inside)
    return logits, chosen, config.coefficient * value


@requirement(
    "BALANCE-02",
    MUST,
    "balance_loss",
    "Equal logits MUST give the coefficient (K times it for `transformers_concatenated`), and all "
    "tokens on K experts the published value of a collapsed router.",
    reason="The two ends of the scale are what a training log is read by.",
    sources=("transformers #28255", "Megatron #1617", SWITCH_PAPER),
    given=balance(scores=SOFTMAX, left_out=True, narrow=False),
    references=BALANCE,
)
def even_and_collapsed_routers_have_the_published_values(case: Case) -> None:
    """E / K for most losses; logits whose probabilities are the same in every arithmetic."""
    config, top_k = case["config"], case["expert_ids"].shape[1]
    logits, ids, value = _collapsed(case)
    even = config.coefficient * (top_k if config.loss == "transformers_concatenated" else 1)
    wanted = torch.tensor([even, value], dtype=torch.float64)
    flat = _equal_logits(case)
    found = torch.stack([_loss(case, logits=flat), _loss(case, logits=logits, expert_ids=ids)])
    bounds = [_expected(case, logits=flat), _expected(case, logits=logits, expert_ids=ids)]
    bound = torch.stack([each.error for each in bounds])
    case.note(f"loss {config.loss}")
    wrong = [*impostors(wanted)]
    if value != even:
        wrong.append(("the same for both", wanted[:1].expand(2)))
    case.judge(lambda answer: within("even, collapsed", answer, wanted, bound), found, wrong)


@requirement(
    "BALANCE-03",
    MUST,
    "balance_loss",
    "The loss MUST rise as probability and tokens gather on fewer experts.",
    reason="A loss that is the same for every router trains nothing; no crash and no NaN says so.",
    sources=("transformers #28093", "transformers #28255", "hyper-parallel #752", "aprender #2162"),
    given=balance(
        losses=tuple(loss for loss in UNIVERSE["loss"] if loss != "deepseek_device"),
        scores=SOFTMAX,
        left_out=True,
    ),
    references=BALANCE,
)
def the_loss_rises_with_imbalance(case: Case) -> None:
    """The same K experts for every token, preferred more and more; no formula is needed."""
    logits, ids = case["logits"], case["expert_ids"]
    ramp = torch.linspace(0, 1, logits.shape[1], dtype=torch.float64)
    ramp = ramp[Content(logits.shape[1]).permutation(logits.shape[1])]
    best = ramp.argsort(descending=True)[: ids.shape[1]].to(ids.dtype).expand_as(ids).contiguous()
    found = [
        _loss(case, logits=(strength * ramp).expand(logits.shape).to(logits.dtype), expert_ids=best)
        for strength in (0.0, 2.0, 8.0)
    ]

    def rule(answer: torch.Tensor) -> None:
        if not bool((answer.diff() > 0).all()):
            raise Violation(
                f"loss of ever less even routers: expected rising numbers, got {answer.tolist()}",
                None,
                answer,
            )

    answer = torch.stack(found)
    case.note(f"loss {case['config'].loss}")
    case.judge(rule, answer, [("a constant", torch.ones(3)), ("falling", answer.flip(0))])


@requirement(
    "BALANCE-04",
    MUST,
    "balance_loss",
    "The shares MUST be those of the ids given, all K of them (`gshard`: the first of each token).",
    reason="With a selection bias or groups the experts used are not those of the highest logits; "
    "a loss on a choice of its own balances a router that nobody runs.",
    sources=("Megatron compute_routing_scores_for_aux_loss", "Megatron #1513"),
    given=balance(simplest=True, routings=DISTINCT, least_k=2, least_experts=3, narrow=False),
    references=BALANCE,
)
def shares_are_those_of_the_ids_given(case: Case) -> None:
    """Ids that have nothing to do with the logits."""
    expected, ids, config = _expected(case), case["expert_ids"], case["config"]
    best = case["logits"].double().sort(dim=-1, descending=True, stable=True).indices
    own = _expected(case, expert_ids=best[:, : ids.shape[1]])
    other = "switch" if config.loss == "gshard" else "gshard"
    if config.loss in ("deepseek_device", "transformers_concatenated"):
        wrong = _expected(case, expert_ids=ids[:, :1].expand_as(ids))
    else:
        length = config.sequence_length
        whole = {"loss": other, "sequence_length": length}
        if config.loss == "gshard" and length is not None:
            whole["loss"] = "deepseek_sequence"
        wrong = _expected(case, config=_changed(config, **whole))
    _judge_loss(
        case,
        _loss(case),
        expected,
        ("experts of the highest logits", own.value),
        ("another number of choices", wrong.value),
    )


@requirement(
    "BALANCE-05",
    MUST,
    "balance_loss",
    "Equal ids in a row MUST be counted each.",
    reason="A map of tokens and experts that holds True once for them loses an assignment, and the "
    "shares no longer add up to 1.",
    sources=("docs/spec/operations.md",),
    given=balance(
        losses=(*BATCH, "deepseek_sequence"),
        simplest=True,
        routings=("duplicates",),
        least_k=2,
        left_out=True,
        narrow=False,
    ),
    references=BALANCE,
)
def equal_ids_in_a_row_are_counted_each(case: Case) -> None:
    """In every second row the last id is the first one again, and counts as much as the first."""
    ids, experts = case["expert_ids"].long(), case["logits"].shape[1]
    distinct = (ids[:, :1] + torch.arange(ids.shape[1])) % experts
    # Two ids that are equal in every row have the same shares when each row counts once.
    odd = torch.arange(len(ids)) % 2 == 1
    ids = torch.where(odd[:, None], distinct, ids)
    given = {"expert_ids": ids.to(case["expert_ids"].dtype)}
    expected = _expected(case, **given)
    earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    once = _expected(case, expert_ids=ids.masked_fill(earlier, experts)).value
    wrong = [("counted once, of as many ids", once * (~earlier).double().mean())]
    if ids.shape[1] > 2:
        wrong.append(("counted once", once))
    _judge_loss(case, _loss(case, **given), expected, *wrong)


@requirement(
    "BALANCE-06",
    MUST,
    "balance_loss",
    "Ids below 0 and from E on MUST NOT be counted, neither for an expert nor in the total.",
    reason="As an index -1 is the last expert; and a total that holds ids of no expert makes "
    "the loss of a balanced router less than its coefficient.",
    sources=("docs/spec/operations.md", "docs/spec/load_balancing.md"),
    given=balance(
        simplest=True, routings=("chosen", *DISTINCT), invalid=True, least_experts=2, narrow=False
    ),
    references=BALANCE,
)
def ids_of_no_expert_are_not_counted(case: Case) -> None:
    """-1, E, and ids far outside of either end; the shares of the others add up to 1."""
    expected, ids, experts = _expected(case), case["expert_ids"].long(), case["logits"].shape[1]
    bad = (ids < 0) | (ids >= experts)
    case.note("no id left", bool(bad.all()))
    last = _expected(case, expert_ids=ids.where(~bad, experts - 1))
    wrong = [("counted for the last expert", last.value)]
    _judge_loss(case, _loss(case), expected, *wrong)


@requirement(
    "BALANCE-07",
    MUST,
    "balance_loss",
    "`gshard` MUST count the first choice of each token only.",
    reason="Its gate sends the second expert by chance, and balances the first.",
    sources=(GSHARD_PAPER, "DeepSpeed #2551", "DeepSpeed #5156"),
    given=balance(losses=("gshard",), simplest=True, least_k=2, left_out=True, narrow=False),
    references=BALANCE,
)
def gshard_counts_first_choices(case: Case) -> None:
    """Against all K choices in the same formula."""
    expected, ids = _expected(case), case["expert_ids"]
    case.note("per sequence", case["config"].sequence_length is not None)
    whole = "switch" if case["config"].sequence_length is None else "deepseek_sequence"
    every = _expected(case, config=_changed(case["config"], loss=whole))
    last = _expected(case, expert_ids=ids.flip(1))
    _judge_loss(
        case,
        _loss(case),
        expected,
        ("all choices counted", every.value),
        ("the last choice counted", last.value),
    )


@requirement(
    "BALANCE-08",
    MUST,
    "balance_loss",
    "`deepseek_sequence`, and `gshard` with a sequence length, MUST take shares and probabilities "
    "per sequence, and the mean over sequences.",
    reason="Over the batch, sequences that each lean on other experts look balanced; and a sum in "
    "the place of the mean grows with the batch.",
    sources=(V3_PAPER, GSHARD_PAPER, "Megatron #5798"),
    given=balance(
        losses=SEQUENCE,
        simplest=True,
        contents=LIVELY,
        least_sequences=2,
        least_experts=2,
        left_out=True,
        narrow=False,
    ),
    references=BALANCE,
)
def sequences_are_balanced_one_by_one(case: Case) -> None:
    """Every second sequence prefers the experts in the opposite order."""
    logits, config = case["logits"].clone(), case["config"]
    length = config.sequence_length
    turn = torch.arange(len(logits)) // length % 2 == 1
    logits[turn] = logits[turn].flip(1)
    ids = case["expert_ids"].clone()
    ids[turn] = logits.shape[1] - 1 - ids[turn]
    changed = {"logits": logits, "expert_ids": ids}
    expected = _expected(case, **changed)
    batch = _expected(case, **changed, config=_changed(config, sequence_length=len(logits)))
    single = _expected(
        case,
        logits=logits[:length],
        expert_ids=ids[:length],
    )
    _judge_loss(
        case,
        _loss(case, **changed),
        expected,
        ("the batch as one sequence", batch.value),
        ("the first sequence", single.value),
        ("the sum over sequences", expected.value * (len(logits) // length)),
    )


@requirement(
    "BALANCE-09",
    MUST,
    "balance_loss",
    "`deepseek_device` MUST take the mean of E times the share over each device's experts, times "
    "the sum of their probabilities.",
    reason="It balances devices and leaves the experts of one device free.",
    sources=("DeepSeekMoE (arXiv 2401.06066) equations 15-17",),
    given=balance(
        losses=("deepseek_device",), simplest=True, routings=("chosen", *ROUTINGS), narrow=False
    ),
    references=BALANCE,
)
def devices_are_groups_of_consecutive_experts(case: Case) -> None:
    """One device gives the coefficient, E devices the loss of `switch`."""
    config, experts = case["config"], case["logits"].shape[1]
    case.note("one device", config.num_devices == 1)
    case.note("one expert per device", config.num_devices == experts)
    wrong = []
    if 1 < config.num_devices < experts:
        switch = _expected(case, config=_changed(config, loss="switch"))
        wrong.append(("the loss between experts", switch.value))
        order = torch.arange(experts).view(config.num_devices, -1).T.flatten()
        ids = order[case["expert_ids"].long()]
        dealt = _expected(case, logits=case["logits"][:, order.argsort()], expert_ids=ids)
        wrong.append(("experts dealt to devices in turn", dealt.value))
    _judge_loss(case, _loss(case), _expected(case), *wrong)


@requirement(
    "BALANCE-10",
    MUST,
    "balance_loss",
    "`transformers_concatenated` MUST be K times as large as `switch` on the same inputs.",
    reason="Its shares are per token and add up to K; published coefficients of its models are "
    "tuned for that.",
    sources=("transformers load_balancing_loss_func",),
    given=balance(losses=("transformers_concatenated",), simplest=True, least_k=2, narrow=False),
    references=BALANCE,
)
def the_concatenated_loss_is_k_times_as_large(case: Case) -> None:
    """Against the loss without the factor."""
    expected = _expected(case)
    without = expected.value / case["expert_ids"].shape[1]
    _judge_loss(case, _loss(case), expected, ("without K", without))


@requirement(
    "BALANCE-11",
    MUST,
    "balance_loss",
    "Sigmoid and sqrtsoftplus scores MUST be divided by their sum over all E experts plus epsilon.",
    reason="Without it a router lowers the loss by lowering all of its scores.",
    sources=(V3_PAPER, "Megatron compute_routing_scores_for_aux_loss", "aprender #2162"),
    given=balance(scores=NORMALISED, narrow=False, left_out=True),
    references=BALANCE,
)
def other_scores_are_divided_by_their_sum(case: Case) -> None:
    """Each loss with these scores; softmax in their place would be another loss."""
    config = case["config"]
    softmax = _expected(case, config=_changed(config, score="softmax"))
    case.note("epsilon that shows", config.epsilon > 1e-6)
    wrong = []
    # Logits that are all alike have the same shares in any score, and one device the same loss.
    if config.loss != "deepseek_device" or config.num_devices != 1 or config.epsilon > 1e-6:
        wrong = [("softmax", softmax.value)]
    _judge_loss(case, _loss(case), _expected(case), *wrong)


@requirement(
    "BALANCE-12",
    MUST,
    "balance_loss",
    "The coefficient MUST multiply the loss once, and a coefficient of 0 MUST give 0.",
    reason="A coefficient that is only compared with 0, or used twice, is found by nobody who "
    "looks at a falling loss.",
    sources=("Automodel #1408", "ms-swift #5375"),
    given=balance(coefficient=(0.0, 0.125, 0.01, 3.0), narrow=False),
    references=BALANCE,
)
def the_coefficient_multiplies_once(case: Case) -> None:
    """Without one, with its square, and exactly 0 for 0."""
    config, expected = case["config"], _expected(case)
    c = config.coefficient
    found = _loss(case)
    case.note("a coefficient of 0", c == 0)
    if c == 0:
        zero = torch.zeros((), dtype=torch.float64)
        one = _expected(case, config=_changed(config, coefficient=1.0)).value
        case.judge(equals("loss", zero), found, [("without it", one), ("NaN", zero + torch.nan)])
        return
    wrong = (("not multiplied", expected.value / c), ("multiplied twice", expected.value * c))
    _judge_loss(case, found, expected, *wrong)


@requirement(
    "BALANCE-13",
    MUST,
    "balance_loss",
    "Rows that `padding_mask` marks False MUST count neither in the shares nor in the "
    "probabilities, nor in the number of tokens.",
    reason="Padding is routed alike everywhere: counted, it looks like a collapsed router.",
    sources=(
        "transformers #28505",
        "transformers #28517",
        "transformers #29363",
        "Megatron #1984",
        "Megatron #2121",
    ),
    given=balance(padding=True, left_out=True, narrow=False),
    references=BALANCE,
)
def padding_is_not_counted(case: Case) -> None:
    """Padding sends all it has to one expert."""
    expected, mask, config = _expected(case), case["padding_mask"], case["config"]
    wrong = []
    if not bool(mask.all()) and not (config.loss == "deepseek_device" and config.num_devices == 1):
        wrong.append(("padding counted", _expected(case, padding_mask=None).value))
        wrong.append(("the mask the other way around", _expected(case, padding_mask=~mask).value))
    _judge_loss(case, _loss(case), expected, *wrong)


def _poisoned(case: Case) -> torch.Tensor:
    logits = case["logits"].clone()
    places = (~case["padding_mask"]).nonzero()[:, 0]
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=logits.dtype)
    logits[places] = kinds[torch.arange(len(places)) % 3][:, None]
    return logits


@requirement(
    "BALANCE-14",
    MUST,
    "balance_loss",
    "What padding holds MUST NOT matter, NaN and infinity included: neither for the loss nor for "
    "the gradient.",
    reason="Padded rows hold whatever was in memory, and NaN times a mask of 0 is NaN, in the "
    "gradient too.",
    sources=("transformers load_balancing_loss_func", "vLLM #39391", "Megatron #2121"),
    given=_finite_only(
        differentiable("balance_loss", balance(padding=True, contents=LIVELY, left_out=True))
    ),
    references=BALANCE,
)
def what_padding_holds_does_not_matter(case: Case) -> None:
    """Loss and gradient with padding that is NaN or infinite."""
    logits = _poisoned(case)
    expected = _expected(case)
    value, gradient = _differentiated(case, logits=logits)
    _judge_loss(case, value, expected, ("NaN", value + torch.nan))
    nan = torch.full_like(gradient, torch.nan)
    _judge_gradient(
        case, logits, gradient, expected.gradient, expected.gradient_error, ("NaN", nan)
    )


@requirement(
    "BALANCE-15",
    MUST,
    "balance_loss",
    "A sequence of nothing but padding MUST be left out of the mean over sequences.",
    reason="Otherwise filling a batch up with empty sequences lowers the loss.",
    sources=("docs/spec/load_balancing.md",),
    given=_takes_mask(
        balance(losses=SEQUENCE, simplest=True, least_sequences=2, left_out=True, narrow=False)
    ),
    references=BALANCE,
)
def empty_sequences_are_no_part_of_the_mean(case: Case) -> None:
    """Between one and all but one of the sequences are empty."""
    length, tokens = case["config"].sequence_length, len(case["logits"])
    sequences = tokens // length
    content = Content(tokens)
    empty = content.permutation(sequences)[: int(content.integers(1, sequences - 1, 1))]
    mask = torch.ones(sequences, length, dtype=torch.bool)
    mask[empty] = False
    mask = mask.flatten()
    expected = _expected(case, padding_mask=mask)
    every = expected.value * (sequences - len(empty)) / sequences
    found = _loss(case, padding_mask=mask)
    _judge_loss(case, found, expected, ("the mean over all sequences", every))


@requirement(
    "BALANCE-16",
    MUST,
    "balance_loss",
    "Zero tokens MUST give 0.",
    reason="A rank without tokens takes part in the step; 0 / 0 makes every rank's loss NaN.",
    sources=("megablocks batched_load_balancing_loss", "Megatron #1877"),
    given=balance(),
    references=BALANCE,
)
def zero_tokens_give_zero(case: Case) -> None:
    """[0, E] logits and [0, K] ids."""
    found = _loss(case, logits=case["logits"][:0], expert_ids=case["expert_ids"][:0])
    _judge_zero_loss(case, found)


def _judge_zero_loss(case: Case, found: torch.Tensor) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    case.judge(equals("loss", zero), found, [("NaN", zero + torch.nan), ("one", zero + 1)])


@requirement(
    "BALANCE-17",
    MUST,
    "balance_loss",
    "A batch of nothing but padding MUST give 0.",
    reason="It happens at the end of an epoch, and the NaN that comes of it ends the run.",
    sources=("docs/spec/load_balancing.md", "transformers load_balancing_loss_func"),
    given=_takes_mask(balance()),
    references=BALANCE,
)
def nothing_but_padding_gives_zero(case: Case) -> None:
    """A mask without a real token."""
    mask = torch.zeros(len(case["logits"]), dtype=torch.bool)
    _judge_zero_loss(case, _loss(case, padding_mask=mask))


@requirement(
    "BALANCE-18",
    MUST,
    "balance_loss",
    "`tokens_per_expert` MUST take the place of the counts of the ids, and only their shares MUST "
    "matter.",
    reason="Balance is meant over the global batch; divided by the tokens of the local one, the "
    "loss grows with the number of ranks.",
    sources=("Megatron #3672", "verl #6609", "transformers #48690", "Megatron #5047"),
    given=either(
        balance(losses=BATCH, counts=True, left_out=True, narrow=False),
        balance(losses=BATCH, counts=True, padding=True, left_out=True, narrow=False),
    ),
    references=BALANCE,
)
def given_counts_replace_local_ones(case: Case) -> None:
    """Counts as integers and as floats, of a batch of another size."""
    config, counts = case["config"], case["tokens_per_expert"]
    expected = _expected(case)
    case.note(f"counts {str(counts.dtype).removeprefix('torch.')}")
    wrong = []
    if config.loss != "deepseek_device" or config.num_devices > 1:
        wrong.append(("its own counts", _expected(case, tokens_per_expert=None).value))
    total = case["expert_ids"].numel()
    if float(counts.double().sum()) != total:
        wrong.append(("divided by its own total", expected.value * counts.double().sum() / total))
    _judge_loss(case, _loss(case), expected, *wrong)


@requirement(
    "BALANCE-19",
    MUST,
    "balance_loss",
    "bfloat16 and float16 logits MUST be computed in float32.",
    reason="A mean over tokens in bfloat16 stops growing at a few hundred, and probabilities of 1 "
    "in 100 have two digits.",
    sources=("docs/spec/operations.md", "transformers load_balancing_loss_func"),
    given=balance(narrow=True, left_out=True),
    references=BALANCE,
)
def narrow_logits_are_computed_wide(case: Case) -> None:
    """The same bound as for float32 logits."""
    _judge_loss(case, _loss(case), _expected(case))


def _result_dtypes(case: Case) -> tuple[torch.dtype, ...]:
    wide = torch.float64 if case["logits"].dtype is torch.float64 else torch.float32
    router = case.scope.capabilities.router_dtype
    if router is None:
        return (wide,)
    return (wide, torch.float64 if router == "float64" else torch.float32)


def _judge_form(case: Case, answer: Answer) -> None:
    wanted = _result_dtypes(case)

    def wrong() -> Iterator[tuple[str, Any]]:
        yield "one dimension", torch.ones(1, dtype=wanted[0])
        yield "bfloat16", torch.ones((), dtype=torch.bfloat16)
        yield "a number", 1.0

    case.judge(lambda found: has_form("loss", found, (), wanted), answer.outputs, wrong())


@requirement(
    "BALANCE-20",
    MUST,
    "balance_loss",
    "The loss MUST be a float32 scalar, float64 for float64 logits.",
    reason="In bfloat16 it is rounded away when it is added to the main loss.",
    sources=("docs/spec/operations.md",),
    given=either(balance(), balance(padding=True), balance(losses=BATCH, counts=True), balance()),
    references=BALANCE,
    kinds=4,
)
def the_loss_is_a_wide_scalar(case: Case) -> None:
    """No dimension, and the wide dtype; without tokens too, where nothing comes with them."""
    _judge_form(case, case.call("balance_loss", **_given(case)))
    given = _given(case)
    if given["padding_mask"] is None and given["tokens_per_expert"] is None:
        none = {name: given[name][:0] for name in ("logits", "expert_ids")}
        _judge_form(case, case.call("balance_loss", **given | none))


@requirement(
    "BALANCE-21",
    MUST,
    "balance_loss",
    "Exchanging tokens inside a sequence, or whole sequences, MUST NOT change the loss beyond "
    "rounding.",
    reason="A mean does not know an order; a loss that does has read another token's row.",
    sources=("Megatron #5047",),
    given=balance(least_tokens=3, left_out=True, narrow=False),
    references=BALANCE,
)
def the_order_of_tokens_does_not_matter(case: Case) -> None:
    """The same tokens in another order, no formula needed: both answers are off by rounding."""
    logits, ids, config = case["logits"], case["expert_ids"], case["config"]
    tokens = len(logits)
    told = config.loss in SEQUENCE and config.sequence_length is not None
    length = config.sequence_length if told else tokens
    content = Content(tokens)
    inside = torch.stack([content.permutation(length) for _ in range(tokens // length)])
    order = inside + length * content.permutation(tokens // length)[:, None]
    order = order.flatten()
    first, second = _loss(case), _loss(case, logits=logits[order], expert_ids=ids[order])
    bound = 2 * _expected(case).error
    case.note("several sequences", length < tokens)
    wrong = [("2% more", first * 1.02)] if bool(first) else []
    case.judge(lambda answer: within("loss in another order", answer, first, bound), second, wrong)


@requirement(
    "BALANCE-22",
    MUST,
    "balance_loss",
    "Finite logits MUST give a finite loss from 0 to coefficient · E (K times that for "
    "`transformers_concatenated`), and finite gradients, however large they are.",
    reason="One step too large makes logits of hundreds; without subtracting the largest one the "
    "exponential overflows, and a root of an underflow has an infinite gradient.",
    sources=("flashinfer #3803", "flashinfer #3946"),
    given=differentiable("balance_loss", balance()),
    references=BALANCE,
)
def huge_logits_give_a_finite_loss(case: Case) -> None:
    """Logits of 100, 1e4 and more on either side of 0, and rows that are all far below it."""
    logits, config = case["logits"].clone(), case["config"]
    tokens = len(logits)
    largest = 6e4 if logits.dtype is torch.float16 else 1e30
    size = torch.tensor([100.0, 1000.0, 1e4, largest], dtype=torch.float64)
    size = size[torch.arange(tokens) % 4][:, None]
    side = torch.where(logits.double() > logits.double().mean(-1, keepdim=True), 1.0, -1.0)
    side[1::3] = -1
    huge = (size * side).to(logits.dtype)
    best = huge.double().sort(dim=-1, descending=True, stable=True).indices
    ids = best[:, : case["expert_ids"].shape[1]].to(case["expert_ids"].dtype).contiguous()
    value, gradient = _differentiated(case, logits=huge, expert_ids=ids)
    limit = config.coefficient * logits.shape[1] * 1.001
    if config.loss == "transformers_concatenated":
        limit *= ids.shape[1]

    def rule(answer: torch.Tensor) -> None:
        if not 0 <= float(answer) <= limit:
            raise Violation(f"loss: expected a number from 0 to {limit:.6g}, got {float(answer)}")

    def finite(answer: torch.Tensor) -> None:
        if not bool(torch.isfinite(answer).all()):
            row = int((~torch.isfinite(answer)).any(-1).nonzero()[0])
            raise Violation(
                f"gradient of logits[{row}]: expected finite numbers, got {answer[row].tolist()}",
                None,
                answer,
            )

    case.note(f"score {config.score}")
    case.judge(rule, value, [("NaN", value + torch.nan), ("infinity", value + torch.inf)])
    case.judge(finite, gradient, [("NaN", gradient + torch.nan)])


@requirement(
    "BALANCE-23",
    MUST,
    "balance_loss",
    "The gradient in the logits MUST be that of the formula with the counts held constant.",
    reason="Counts have no gradient, probabilities have one; an implementation that detaches both, "
    "or scales by tokens or ranks, shows the right number and trains another router.",
    sources=("fastmoe #49", "fastmoe #50", "Automodel #1408", "Megatron #5047", "verl #6609"),
    given=differentiable(
        "balance_loss",
        either(
            balance(contents=LIVELY, left_out=True),
            balance(contents=LIVELY, left_out=True),
            balance(losses=BATCH, counts=True, contents=LIVELY, left_out=True),
        ),
    ),
    references=BALANCE,
)
def the_gradient_is_that_of_the_formula(case: Case) -> None:
    """Of 64 times the loss, so that a gradient that ignores what comes from above is seen."""
    expected = _expected(case)
    case.note(f"loss {case['config'].loss}")
    _, found = _differentiated(case)
    _judge_gradient(
        case,
        case["logits"],
        found,
        expected.gradient,
        expected.gradient_error,
    )


@requirement(
    "BALANCE-24",
    MUST,
    "balance_loss",
    "At imbalance the gradient MUST lower the probability of the busiest experts.",
    reason="A detached loss has no gradient, and one of the wrong sign collapses the router.",
    sources=("transformers #28093", "hyper-parallel #752", "fastmoe #50"),
    given=differentiable(
        "balance_loss", balance(contents=LEANING, left_out=True, least_tokens=2, least_experts=3)
    ),
    references=BALANCE,
)
def the_gradient_works_against_imbalance(case: Case) -> None:
    """The logits of the busiest experts have a positive gradient, which descent takes away."""
    expected, logits = _expected(case), case["logits"]
    length = len(logits) // len(expected.pull)
    pull = expected.pull.repeat_interleave(length, 0)
    # What is smaller than its error, or than the dtype holds, has no sign to ask for.
    seen = 4 * TINY[str(logits.dtype).removeprefix("torch.")]
    least = SCALE * (expected.gradient - expected.gradient_error)
    sure = (pull == pull.amax(1, keepdim=True)) & (least > seen)
    _, found = _differentiated(case)
    if not bool(sure.any()):
        return

    def rule(answer: torch.Tensor) -> None:
        wrong = sure & ~(answer > 0)
        if bool(wrong.any()):
            token, expert = (int(i) for i in wrong.nonzero()[0])
            raise Violation(
                f"gradient of logits[{token}, {expert}], of a busiest expert: expected a positive "
                f"number, got {float(answer[token, expert]):.6g}",
                None,
                answer,
            )

    zero = torch.zeros_like(found)
    case.judge(rule, found, [("zero", zero), ("the other sign", -found)])


@requirement(
    "BALANCE-25",
    MUST,
    "balance_loss",
    "Rows of padding MUST have a gradient of exactly 0, not None, also where all rows are padding.",
    reason="The router learns from what the padding happened to hold; a gradient of None stops "
    "the reduction between ranks.",
    sources=("Megatron #2121", "DeepSpeed #5066", "Megatron #4851"),
    given=differentiable("balance_loss", balance(padding=True, contents=LIVELY)),
    references=BALANCE,
)
def padding_has_a_gradient_of_zero(case: Case) -> None:
    """With the mask given, and with one that has no real token."""
    real, logits = case["padding_mask"], case["logits"]
    none = torch.zeros_like(real)
    for mask in (real, none):
        if bool(mask.all()):
            continue
        _, found = _differentiated(case, padding_mask=mask)
        rows = found[~mask]
        zeros = torch.zeros_like(rows)
        wrong = [("ones", zeros + 1), ("NaN", zeros + torch.nan)]
        case.judge(equals("gradient of padded logits", zeros), rows, wrong)
    case.note("one expert", logits.shape[1] == 1)


def judge_untouched(case: Case, answers: list[Answer]) -> None:
    """No argument is changed, and no result shares memory with one."""
    changed = [path for answer in answers for path in answer.changed]
    shared = [path for answer in answers for path in answer.shared]

    def rule(found: list[str]) -> None:
        if found:
            raise Violation(f"expected inputs as they were and a result of its own: {found}")

    case.judge(rule, changed + shared, [("one argument", ["bias"])])


@requirement(
    "BALANCE-26",
    MUST,
    "balance_loss",
    "Logits, ids, mask and counts MUST be left as they are.",
    reason="The logits are used by the router and the z-loss as well; clearing padding in place "
    "clears it there, too.",
    sources=("docs/spec/operations.md",),
    given=either(
        balance(padding=True),
        balance(losses=BATCH, padding=True, counts=True),
        balance(invalid=True),
        balance(),
    ),
    references=BALANCE,
    kinds=2,
)
def the_loss_leaves_its_inputs_alone(case: Case) -> None:
    """With padding, counts and ids of no expert, which are what gets cleared; and with none."""
    case.note("counts", case["tokens_per_expert"] is not None)
    judge_untouched(case, [case.call("balance_loss", **_given(case))])


def _bad_losses(case: Case) -> dict[str, dict[str, Any]]:
    good = _given(case)
    logits, ids, config = good["logits"], good["expert_ids"], good["config"]
    tokens, experts = logits.shape
    mask = torch.ones(tokens, dtype=torch.bool)
    bad = {
        "logits with one dimension": good | {"logits": logits[:, 0]},
        "a token without ids": good | {"expert_ids": ids[1:]},
        "ids without a token": good | {"expert_ids": torch.cat([ids, ids[:1]])},
        "ids that are floats": good | {"expert_ids": ids.float()},
        "logits of integers": good | {"logits": logits.long()},
    }
    declared = case.scope.capabilities.alternatives("balance")
    if all(True in each.get("padding_mask", (True,)) for each in declared):
        bad["a mask of another length"] = good | {"padding_mask": torch.cat([mask, mask[:1]])}
        bad["a mask of floats"] = good | {"padding_mask": mask.float()}
    if config.loss in BATCH:
        if all(True in each.get("tokens_per_expert", (True,)) for each in declared):
            counts = torch.ones(experts + 1)
            bad["counts of another number of experts"] = good | {"tokens_per_expert": counts}
            if experts > 1:
                bad["one count for all"] = good | {"tokens_per_expert": torch.ones(1)}
    elif config.sequence_length is not None:
        longer = _changed(config, sequence_length=tokens + 1)
        bad["a length beyond T"] = good | {"config": longer}
        if tokens > 2:
            odd = _changed(config, sequence_length=tokens - 1)
            bad["a length that does not divide T"] = good | {"config": odd}
    if config.loss in SEQUENCE:
        counts = torch.ones(experts)
        bad["counts that the loss has no use for"] = good | {"tokens_per_expert": counts}
    if config.loss == "deepseek_sequence":
        without = _changed(config, sequence_length=None)
        bad["no sequence length"] = good | {"config": without}
    if config.loss == "deepseek_device":
        bad["no number of devices"] = good | {"config": _changed(config, num_devices=None)}
        odd = _changed(config, num_devices=experts + 1)
        bad["more devices than experts"] = good | {"config": odd}
    return bad


@requirement(
    "BALANCE-27",
    MUST,
    "balance_loss",
    "Shapes that do not fit each other, ids or a mask of another kind, and a configuration that "
    "the inputs cannot meet MUST raise.",
    reason="A mask of another length broadcasts or is cut, and a mask of floats indexes instead of "
    "choosing; the number that comes of it looks like a loss.",
    sources=("docs/spec/load_balancing.md", "transformers #29363"),
    given=balance(),
    references=BALANCE,
)
def what_gives_no_loss_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    case.note(f"loss {case['config'].loss}")
    must_raise(case, "balance_loss", _given(case), _bad_losses(case))


@dataclass(frozen=True)
class ZLoss:
    """A z-loss in float64, and how far a legal float32 answer may be from it.

    Attributes:
        value: a scalar.
        error: a scalar, a bound.
        gradient: [T, E], by the logits.
        gradient_error: [T, E], a bound, before rounding to the logits' dtype.
    """

    value: torch.Tensor
    error: torch.Tensor
    gradient: torch.Tensor
    gradient_error: torch.Tensor


def _expected_z(case: Case, **changed: Any) -> ZLoss:
    """What `z_loss` has to give.

    The logsumexp is off by the relative error of its sum of exponentials, by that of a logarithm,
    and by its own rounding; its square by twice that.
    """
    logits = changed.get("logits", case["logits"])
    mask = changed.get("padding_mask", case["padding_mask"])
    dtype = str(logits.dtype).removeprefix("torch.")
    experts = logits.shape[1]
    real = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    wide = logits.double().masked_fill(~real[:, None], 0.0)
    scores, error, unit = _scores(case, wide, "softmax", dtype)
    shown = real.double()[:, None]
    log = wide.logsumexp(1, keepdim=True) * shown
    top = wide.amax(1, keepdim=True)
    # Legal with or without subtracting the largest logit first, while nothing overflows.
    distance = (top - wide) + wide.abs()
    spread = (scores * (C * distance + C)).sum(1, keepdim=True)
    off = unit * (spread + experts + C * (log - top).abs() + C + log.abs() + top.abs())
    number = real.double().sum().clamp(min=1)
    value = log.square().sum() / number
    bound = ((2 * log.abs() * off + off.square()) * shown).sum() / number
    rounded = (len(logits) + 4) * unit + UNIT[wide_dtype(dtype)]
    bound = bound + rounded * value + 4 * TINY[wide_dtype(dtype)]
    gradient = 2 * log * scores / number * shown
    gradient_error = 2 * (off * scores + log.abs() * (error + scores * unit * 8)) / number * shown
    gradient_error = gradient_error + 2 * off * error / number * shown
    return ZLoss(value, bound, gradient, gradient_error)


def _z_given(case: Case, **changed: Any) -> dict[str, Any]:
    return {name: case[name] for name in ("logits", "padding_mask")} | changed


def _z(case: Case, **changed: Any) -> torch.Tensor:
    return _number("z-loss", case.call("z_loss", **_z_given(case, **changed)))


def _z_differentiated(
    case: Case, scale: float = SCALE, **changed: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    given = _z_given(case, **changed)
    answer = case.call("z_loss", **given, wrt=["logits"], cotangents={"": torch.tensor(scale)})
    return _number("z-loss", answer), _gradient(answer)


def _judge_z(
    case: Case, found: torch.Tensor, expected: ZLoss, *wrong: tuple[str, torch.Tensor]
) -> None:
    case.note("one expert", case["logits"].shape[1] == 1)
    case.judge(
        lambda answer: within("z-loss", answer, expected.value, expected.error),
        found,
        [*impostors(expected.value), *wrong],
    )


@requirement(
    "BALANCE-28",
    MUST,
    "z_loss",
    "The z-loss MUST be the mean over tokens of the squared logarithm of the sum of exponentials.",
    reason="The square of the mean, a sum over tokens, or the squared logits pull elsewhere.",
    sources=("ST-MoE (arXiv 2202.08906) equation 5", "Megatron z_loss_func"),
    given=router_logits(narrow=False),
    references=Z_LOSS,
)
def the_z_loss_is_the_mean_squared_logsumexp(case: Case) -> None:
    """The formula."""
    expected = _expected_z(case)
    logits = case["logits"].double()
    wrong = []
    if len(logits) > 1:
        wrong.append(("the sum over tokens", expected.value * len(logits)))
    if logits.shape[1] > 1:
        wrong.append(("the mean of squared logits", logits.square().mean()))
    _judge_z(case, _z(case), expected, *wrong)


@requirement(
    "BALANCE-29",
    MUST,
    "z_loss",
    "The gradient of the z-loss MUST be 2 · logsumexp · softmax / T.",
    reason="It is there to lower large logits; without a gradient it is a number in a log.",
    sources=("ST-MoE (arXiv 2202.08906) equation 5", "Automodel #1408"),
    given=differentiable(
        "z_loss",
        either(router_logits(contents=LIVELY), router_logits(padding=True, contents=LIVELY)),
    ),
    references=Z_LOSS,
)
def the_gradient_of_the_z_loss(case: Case) -> None:
    """Of 64 times the z-loss, as for the balance loss."""
    expected = _expected_z(case)
    _, found = _z_differentiated(case)
    _judge_gradient(case, case["logits"], found, expected.gradient, expected.gradient_error)


@requirement(
    "BALANCE-30",
    MUST,
    "z_loss",
    "Padding MUST NOT count in the z-loss nor in its number of tokens, and MUST have a gradient of "
    "0, whatever it holds.",
    reason="Padded rows often hold the largest logits of a batch, or NaN.",
    sources=("Megatron #1984", "Megatron #2121"),
    given=differentiable("z_loss", router_logits(padding=True, contents=LIVELY)),
    references=Z_LOSS,
)
def padding_is_no_part_of_the_z_loss(case: Case) -> None:
    """Padding of 30, and of NaN and infinity where they are taken."""
    expected, real = _expected_z(case), case["padding_mask"]
    logits = case["logits"]
    if not case.scope.capabilities.finite_only:
        logits = _poisoned(case)
    value, gradient = _z_differentiated(case, logits=logits)
    counted = expected.value * real.sum() / len(real)
    wrong = [] if bool(real.all()) else [("divided by all rows", counted)]
    _judge_z(case, value, expected, *wrong)
    rows = gradient[~real]
    zeros = torch.zeros_like(rows)
    if len(rows):
        case.judge(equals("gradient of padded logits", zeros), rows, [("ones", zeros + 1)])


@requirement(
    "BALANCE-31",
    MUST,
    "z_loss",
    "The z-loss of zero tokens MUST be 0, and so MUST that of nothing but padding.",
    reason="The mean of nothing is NaN, and a rank without tokens would hand it to all others.",
    sources=("megablocks batched_load_balancing_loss", "Megatron #1877"),
    given=router_logits(),
    references=Z_LOSS,
)
def the_z_loss_of_nothing_is_zero(case: Case) -> None:
    """[0, E] logits, with a gradient too, and a mask without a real token where masks are taken."""
    nothing = case["logits"][:0]
    _judge_zero_loss(case, _z(case, logits=nothing))
    if "z_loss" in case.scope.capabilities.gradients:
        gradient = _z_differentiated(case, logits=nothing)[1]

        def rule(found: torch.Tensor) -> None:
            has_form("gradient of logits", found, tuple(nothing.shape), (nothing.dtype,))

        case.judge(rule, gradient, [("of one token", nothing.new_zeros(1, nothing.shape[1]))])
    declared = case.scope.capabilities.alternatives("balance")
    if all(True in each.get("padding_mask", (True,)) for each in declared):
        mask, logits = torch.zeros(len(case["logits"]), dtype=torch.bool), case["logits"].clone()
        if not case.scope.capabilities.finite_only:
            logits[::2], logits[1::4] = torch.nan, torch.inf
        _judge_zero_loss(case, _z(case, logits=logits, padding_mask=mask))


@requirement(
    "BALANCE-32",
    MUST,
    "z_loss",
    "Large logits MUST NOT overflow in the exponentials of the z-loss.",
    reason="It is there for logits that grow; exp(89) is infinite in float32.",
    sources=("ST-MoE (arXiv 2202.08906) equation 5",),
    given=differentiable("z_loss", router_logits(contents=("normal", "leaning"))),
    references=Z_LOSS,
)
def the_z_loss_of_large_logits_is_finite(case: Case) -> None:
    """Logits around ±1000 and ±30000, against the formula."""
    logits = case["logits"].clone()
    sizes = torch.tensor([1000.0, -30000.0, 30000.0, -1000.0])
    start = logits.numel()
    logits += sizes[(start + torch.arange(len(logits))) % 4][:, None].to(logits.dtype)
    expected = _expected_z(case, logits=logits)
    # A gradient of 2 · 1000 fits into float16 as long as nothing multiplies it.
    value, gradient = _z_differentiated(case, scale=1.0, logits=logits)
    _judge_z(case, value, expected, ("infinity", value + torch.inf))

    # 64 times a gradient of up to 60000 is beyond float16, and rightly infinite there.
    held = SCALE * 2 * expected.gradient.abs() < torch.finfo(logits.dtype).max

    def rule(answer: torch.Tensor) -> None:
        if bool(answer.isnan().any()) or not bool(torch.isfinite(answer[held]).all()):
            raise Violation("gradient of logits: expected finite numbers", None, answer)

    case.judge(rule, gradient, [("NaN", gradient + torch.nan)])


@requirement(
    "BALANCE-33",
    MUST,
    "z_loss",
    "The z-loss of bfloat16 and float16 logits MUST be computed in float32.",
    reason="A logsumexp of 5.3 has the square 28.1, in bfloat16 28.",
    sources=("ST-MoE (arXiv 2202.08906)", "docs/spec/operations.md"),
    given=either(
        router_logits(narrow=True),
        crowded(router_logits(padding=True, contents=LIVELY, narrow=True, most_experts=4)),
    ),
    references=Z_LOSS,
)
def narrow_logits_have_a_wide_z_loss(case: Case) -> None:
    """The same bound as for float32 logits, also where bfloat16 cannot count the tokens."""
    _judge_z(case, _z(case), _expected_z(case))


@requirement(
    "BALANCE-34",
    MUST,
    "z_loss",
    "The z-loss MUST be a float32 scalar, float64 for float64 logits.",
    reason="One number for each token, or one in bfloat16, does not add to the main loss.",
    sources=("docs/spec/operations.md",),
    given=either(router_logits(), router_logits(padding=True)),
    references=Z_LOSS,
)
def the_z_loss_is_a_wide_scalar(case: Case) -> None:
    """No dimension, and the wide dtype."""
    _judge_form(case, case.call("z_loss", **_z_given(case)))


@requirement(
    "BALANCE-35",
    MUST,
    "z_loss",
    "Logits that are not [T, E], and a mask that is not one bool for each token, MUST raise.",
    reason="A mask of floats or of another length chooses other rows than it was meant to.",
    sources=("docs/spec/operations.md",),
    given=_takes_mask(router_logits()),
    references=Z_LOSS,
)
def what_has_no_z_loss_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    good = _z_given(case)
    logits = good["logits"]
    mask = torch.ones(len(logits), dtype=torch.bool)
    must_raise(
        case,
        "z_loss",
        good,
        {
            "logits with one dimension": good | {"logits": logits[:, 0]},
            "logits with three dimensions": good | {"logits": logits[None]},
            "a mask that is too long": good | {"padding_mask": torch.cat([mask, mask[:1]])},
            "a mask that is too short": good | {"padding_mask": mask[1:]},
            "a mask of floats": good | {"padding_mask": mask.float()},
            "logits of integers": good | {"logits": logits.long()},
        },
    )


@requirement(
    "BALANCE-44",
    MUST,
    "balance_loss",
    "The loss MUST be right for every number of experts, tokens and experts per token, on the "
    "boundaries of blocks and beside them.",
    reason="Reductions are specialised by size; a tail that is left out, or a counter of one byte, "
    "is right everywhere else.",
    sources=("aiter #2359", "vLLM-metax #270", "Megatron #7213"),
    given=at_boundaries(
        balance(
            losses=("switch", "deepseek_expert", "transformers_concatenated"),
            contents=("normal", "leaning", "collapsed"),
            most_experts=9,
            narrow=False,
        )
    ),
    references=BALANCE,
)
def no_size_of_a_batch_is_special(case: Case) -> None:
    """One past a block, a whole one, and one short of it; E and T to 1025, K to 33."""
    axis, whole = case["axis"], _given(case)
    case.note(f"at a boundary of {axis}")
    tokens, experts = whole["logits"].shape
    top_k = whole["expert_ids"].shape[1]
    for short in range(3):
        cut = (
            tokens - short * (axis == "tokens"),
            experts - short * (axis == "experts"),
            top_k - short * (axis == "top_k"),
        )
        logits = whole["logits"][: cut[0], : cut[1]]
        best = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, : cut[2]]
        changed = {"logits": logits, "expert_ids": best.to(whole["expert_ids"].dtype).contiguous()}
        _judge_loss(case, _loss(case, **changed), _expected(case, **changed))


@requirement(
    "BALANCE-45",
    MUST,
    "balance_loss",
    "A sequence length, a number of devices and an epsilon MUST have no effect on a loss or a "
    "score that has no use for them.",
    reason="One configuration is kept for a model and its loss exchanged; what is left over of the "
    "other loss changes nothing.",
    sources=("docs/spec/load_balancing.md",),
    given=balance(
        losses=("switch", "deepseek_expert", "transformers_concatenated", "deepseek_device"),
        epsilon=(0.25, 1e-20),
        contents=LIVELY,
        least_tokens=2,
        left_out=True,
        narrow=False,
    ),
    references=BALANCE,
)
def what_a_loss_has_no_use_for_has_no_effect(case: Case) -> None:
    """Sequences of one token, and as many devices as experts."""
    config, experts = case["config"], case["logits"].shape[1]
    expected = _expected(case)
    devices = experts if config.num_devices is None else config.num_devices
    unneeded = _changed(config, sequence_length=1, num_devices=devices)
    found = _loss(case, config=unneeded)
    _judge_loss(case, found, expected)


@requirement(
    "BALANCE-46",
    MUST,
    "balance_loss",
    "A mask without padding MUST give the loss without a mask.",
    reason="A batch that happens to be full is as good as any; a branch of its own for it is "
    "entered rarely.",
    sources=("transformers #29363", "docs/spec/load_balancing.md"),
    given=_takes_mask(balance(left_out=True, narrow=False)),
    references=BALANCE,
)
def a_full_batch_is_a_batch(case: Case) -> None:
    """A mask that is True throughout, against the formula without one."""
    mask = torch.ones(len(case["logits"]), dtype=torch.bool)
    _judge_loss(case, _loss(case, padding_mask=mask), _expected(case))


@requirement(
    "BALANCE-47",
    MUST,
    "balance_loss",
    "Zero tokens, and a coefficient of 0, MUST give a gradient of zeros, not None.",
    reason="A rank whose loss is off or whose batch is empty takes part in the reduction of "
    "gradients, or all ranks wait for it.",
    sources=("DeepSpeed #5066", "Megatron #4851", "Megatron #1877"),
    given=differentiable("balance_loss", balance(coefficient=(0.0, 0.0, 1.0))),
    references=BALANCE,
)
def a_loss_of_zero_has_a_gradient_of_zeros(case: Case) -> None:
    """[0, E] logits with any coefficient, and all of them with a coefficient of 0."""
    none = {"logits": case["logits"][:0], "expert_ids": case["expert_ids"][:0]}
    asked = [none] if case["config"].coefficient else [none, {}]
    for changed in asked:
        logits = changed.get("logits", case["logits"])
        given = _given(case, **changed)
        answer = case.call(
            "balance_loss", **given, wrt=["logits"], cotangents={"": torch.tensor(SCALE)}
        )

        def rule(found: torch.Tensor | None, logits: torch.Tensor = logits) -> None:
            if found is None:
                raise Violation("gradient of logits: expected zeros, got None")
            equals("gradient of logits", torch.zeros_like(logits))(found)

        case.judge(rule, answer.gradients["logits"], [("None", None)])


def _absent(plan: dict[str, Any], logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Minus infinity for about half of the experts of each token, but not for those kept.

    Any half, or the first one: whole tiles of a kernel are then absent.
    """
    content = Content(plan["seed"] + 1)
    absent = content.uniform(0, 1, *logits.shape) < 0.5
    if plan["seed"] % 2:
        absent = (torch.arange(logits.shape[1]) < logits.shape[1] // 2).repeat(len(logits), 1)
    absent[:, -1] = True
    return logits.masked_fill(absent & ~kept, -torch.inf)


def _balance_absent(plan: dict[str, Any]) -> dict[str, Any]:
    inputs = balance().build(plan)
    logits, ids = inputs["logits"], inputs["expert_ids"].long()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    return inputs | {"logits": _absent(plan, logits, chosen)}


@requirement(
    "BALANCE-48",
    MUST,
    "balance_loss",
    "An expert whose logit is minus infinity MUST have the probability 0, and MUST NOT make the "
    "loss or a gradient NaN.",
    reason="Experts that a model pads its router with, or that are switched off, are marked so; "
    "0 times minus infinity is NaN.",
    sources=("vLLM #39391", "flashinfer #3803"),
    given=_direct(
        _finite_only(
            differentiable(
                "balance_loss",
                Given(balance(contents=LIVELY, left_out=True, narrow=False).plans, _balance_absent),
            )
        )
    ),
    references=BALANCE,
)
def absent_experts_have_no_probability(case: Case) -> None:
    """Against the formula on logits of -10000, whose scores are 0 in float64 too."""
    logits = case["logits"]
    absent = logits == -torch.inf
    low = logits.masked_fill(absent, -1e4)
    expected = _expected(case, logits=low)
    value, gradient = _differentiated(case)
    _judge_loss(case, value, expected, ("NaN", value + torch.nan))

    def rule(answer: torch.Tensor) -> None:
        if not bool(torch.isfinite(answer).all()):
            raise Violation("gradient of logits: expected finite numbers", None, answer)
        equals("gradient of absent logits", torch.zeros_like(answer[absent]))(answer[absent])

    case.judge(rule, gradient, [("NaN", gradient + torch.nan)])


@requirement(
    "BALANCE-49",
    MUST,
    "balance_loss",
    "Counts that are given MUST get no gradient.",
    reason="They are a fact of the batch; a loss that pulls at them pulls at whatever they were "
    "made of.",
    sources=("fastmoe #49", "docs/spec/load_balancing.md"),
    given=differentiable("balance_loss", balance(losses=BATCH, counts=True)),
    references=BALANCE,
)
def given_counts_get_no_gradient(case: Case) -> None:
    """None or zeros, where float counts ask for one."""
    counts = case["tokens_per_expert"].float()
    answer = case.call(
        "balance_loss",
        **_given(case, tokens_per_expert=counts),
        wrt=["logits", "tokens_per_expert"],
        cotangents={"": torch.tensor(SCALE)},
    )
    zeros = equals("gradient of tokens_per_expert", torch.zeros_like(counts))

    def rule(found: torch.Tensor | None) -> None:
        if found is not None:
            zeros(found)

    case.judge(rule, answer.gradients["tokens_per_expert"], [("ones", torch.ones_like(counts))])


def _mirrored(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Ids for the logits turned round: chosen from these where the given ones were chosen."""
    top_k = ids.shape[1]
    best = logits.double().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if torch.equal(best, ids.long()):
        return logits.double().sort(dim=1, stable=True).indices[:, :top_k].to(ids)
    return logits.shape[1] - 1 - ids


@requirement(
    "BALANCE-50",
    MUST,
    "balance_loss",
    "Every call MUST give the loss of its own logits, ids and counts, also in the storage of an "
    "earlier call.",
    reason="Counters that are not cleared, and a loss kept for its address, belong to the batch "
    "before.",
    sources=("SGLang #3339", "Megatron #1330", "SGLang #25852"),
    given=either(
        balance(contents=LIVELY, left_out=True, narrow=False),
        balance(losses=BATCH, counts=True, contents=LIVELY, left_out=True, narrow=False),
    ),
    references=BALANCE,
)
def every_loss_is_of_its_own_call(case: Case) -> None:
    """Other data in the storage of the first call, then the same call once more."""
    first = _given(case)
    counts = first["tokens_per_expert"]
    other = first | {
        "logits": -first["logits"],
        "expert_ids": _mirrored(first["logits"], first["expert_ids"]),
        "tokens_per_expert": None if counts is None else counts.flip(0),
    }
    calls = [
        case.planned("balance_loss", **first),
        case.planned("balance_loss", **other, reuse=0),
        case.planned("balance_loss", **other, reuse=0),
    ]
    for answer, given in zip(case.session(calls), (first, other, other), strict=True):
        _judge_loss(case, _number("loss", answer), _expected(case, **given))


@requirement(
    "BALANCE-51",
    MUST,
    "z_loss",
    "The z-loss MUST be right for every number of experts and tokens, on the boundaries of blocks "
    "and beside them, with a mask and without.",
    reason="Reductions are specialised by size; a tail that is left out is right everywhere else.",
    sources=("aiter #2359", "vLLM-metax #270"),
    given=either(
        at_boundaries(router_logits(most_experts=9, narrow=False)),
        _takes_mask(at_boundaries(router_logits(padding=True, most_experts=9, narrow=False))),
    ),
    references=Z_LOSS,
)
def no_size_of_a_z_loss_is_special(case: Case) -> None:
    """One past a block, a whole one, and one short of it; without a mask with a full one, too."""
    whole, mask, axis = case["logits"], case["padding_mask"], case["axis"]
    case.note(f"at a boundary of {axis}")
    tokens, experts = whole.shape
    declared = case.scope.capabilities.alternatives("balance")
    masked = all(True in each.get("padding_mask", (True,)) for each in declared)
    for short in range(3):
        logits = whole[
            : tokens - short * (axis == "tokens"), : experts - short * (axis == "experts")
        ]
        real = None if mask is None else mask[: len(logits)]
        asked = [real] if mask is not None or not masked else [None, torch.ones(len(logits)) > 0]
        for each in asked:
            given = {"logits": logits, "padding_mask": each}
            if each is None or bool(each.any()):
                _judge_z(case, _z(case, **given), _expected_z(case, **given))


@requirement(
    "BALANCE-52",
    MUST,
    "z_loss",
    "Logits and mask MUST be left as they are, and every call MUST give the z-loss of its own "
    "logits, also in the storage of an earlier call.",
    reason="The logits go on to the router; a partial sum that is not cleared belongs to the batch "
    "before.",
    sources=("SGLang #3339", "docs/spec/operations.md"),
    given=either(router_logits(narrow=False), router_logits(padding=True, narrow=False)),
    references=Z_LOSS,
)
def the_z_loss_keeps_nothing_and_touches_nothing(case: Case) -> None:
    """Other logits in the storage of the first call, then the same once more."""
    first = _z_given(case)
    other = first | {"logits": 2 - first["logits"]}
    calls = [
        case.planned("z_loss", **first),
        case.planned("z_loss", **other, reuse=0),
        case.planned("z_loss", **other, reuse=0),
    ]
    answers = case.session(calls)
    for answer, given in zip(answers, (first, other, other), strict=True):
        _judge_z(case, _number("z-loss", answer), _expected_z(case, **given))
    judge_untouched(case, answers)


def _z_absent(plan: dict[str, Any]) -> dict[str, Any]:
    inputs = router_logits().build(plan)
    logits = inputs["logits"]
    best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(1, True), True)
    return inputs | {"logits": _absent(plan, logits, best)}


@requirement(
    "BALANCE-53",
    MUST,
    "z_loss",
    "An expert whose logit is minus infinity MUST add nothing to the z-loss, and MUST NOT make it "
    "or a gradient NaN.",
    reason="Experts that a model pads its router with, or that are switched off, are marked so.",
    sources=("vLLM #39391", "flashinfer #3803"),
    given=_direct(
        _finite_only(
            differentiable("z_loss", Given(router_logits(contents=LIVELY).plans, _z_absent))
        )
    ),
    references=Z_LOSS,
)
def absent_experts_add_nothing(case: Case) -> None:
    """Against the formula on logits of -10000; one expert of each token is always there."""
    logits = case["logits"]
    absent = logits == -torch.inf
    expected = _expected_z(case, logits=logits.masked_fill(absent, -1e4))
    value, gradient = _z_differentiated(case)
    _judge_z(case, value, expected, ("NaN", value + torch.nan))

    def rule(answer: torch.Tensor) -> None:
        if not bool(torch.isfinite(answer).all()):
            raise Violation("gradient of logits: expected finite numbers", None, answer)
        equals("gradient of absent logits", torch.zeros_like(answer[absent]))(answer[absent])

    case.judge(rule, gradient, [("NaN", gradient + torch.nan)])


def _in_a_crowd(padding: bool) -> Given:
    return crowded(
        balance(
            losses=("switch", "deepseek_expert", "transformers_concatenated"),
            scores=SOFTMAX,
            contents=("leaning",),
            padding=padding,
            least_experts=2,
            most_experts=4,
            left_out=True,
        )
    )


@requirement(
    "BALANCE-56",
    MUST,
    "balance_loss",
    "Counts MUST be exact however many tokens an expert gets.",
    reason="A counter in bfloat16 stops at 256, one in float16 at 2048, and one of two bytes turns "
    "negative at 32768.",
    sources=("docs/spec/operations.md", "Megatron #1617"),
    given=either(*map(_in_a_crowd, (False, True))),
    references=BALANCE,
)
def no_count_is_too_large(case: Case) -> None:
    """Up to 45,000 tokens, most of them on the same few experts."""
    case.note("T > 30000", len(case["logits"]) > 30_000)
    _judge_loss(case, _loss(case), _expected(case))
