"""Requirements on `route`: from logits to K experts and K weights for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference import gating
from moe_reference.config import RoutingConfig

from moe_conformance.case import Answer, Case, must_raise, routed
from moe_conformance.inputs.given import (
    Content,
    Given,
    Inputs,
    Plan,
    Plans,
    Scope,
    choice,
    differentiable,
    either,
    planned,
    torch_dtype,
)
from moe_conformance.inputs.routing import (
    at_boundaries,
    build_routing,
    fill_logits,
    routing,
    vanishing,
)
from moe_conformance.judge import Violation, equal, within
from moe_conformance.precision import TINY, UNIT
from moe_conformance.registry import MUST, SHOULD, requirement
from moe_conformance.routing_oracle import RoutingOracle

Routed = tuple[torch.Tensor, torch.Tensor]


def _oracle(case: Case, **changed: Any) -> RoutingOracle:
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")} | changed
    return RoutingOracle.of(
        **given,
        points=frozenset(case.scope.capabilities.rounding_points),
        router_dtype=case.scope.capabilities.router_dtype,
    )


def _route(case: Case, **changed: Any) -> Routed:
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")} | changed
    return _in_form(case, case.call("route", **given), given)


def _in_form(case: Case, answer: Answer, given: dict[str, Any]) -> Routed:
    """The weights and ids of an answer, in the shapes and dtypes that they have to have."""
    weights, ids = routed(answer, len(given["logits"]), given["config"].top_k)
    wide = torch.float64 if given["logits"].dtype is torch.float64 else torch.float32
    router = case.scope.capabilities.router_dtype
    allowed = {wide} if router is None else {wide, _wide(router)}
    if weights.dtype not in allowed:
        raise Violation(
            f"weights: expected dtype {' or '.join(map(str, allowed))} for logits of "
            f"{given['logits'].dtype}, got {weights.dtype}"
        )
    return weights, ids


def _wide(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def _judge_weights(case: Case, weights: torch.Tensor, ids: torch.Tensor) -> None:
    """Hold weights against those of the target's own ids."""
    _check_range(ids, case["logits"].shape[1])
    oracle = _oracle(case)
    expected = oracle.weights(ids)

    def rule(answer: torch.Tensor) -> None:
        within("weights", answer, expected.value, expected.error)

    case.judge(rule, weights, _wrong_weights(expected.value))


def _wrong_weights(expected: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not bool(expected.any()):
        yield "all ones", torch.ones_like(expected)
        return
    yield "all zeros", torch.zeros_like(expected)
    yield "1.02 times", expected * 1.02
    if expected.shape[1] > 1 and not torch.equal(expected, expected.flip(1)):
        yield "two experts' weights exchanged", expected.flip(1)


def _check_range(ids: torch.Tensor, experts: int) -> None:
    wrong = (ids < 0) | (ids >= experts)
    if bool(wrong.any()):
        token, k = (int(i) for i in wrong.nonzero()[0])
        raise Violation(
            f"expert_ids[{token}, {k}]: expected an id from 0 to {experts - 1}, "
            f"got {int(ids[token, k])}",
            None,
            ids,
        )


def _check_distinct(ids: torch.Tensor, experts: int) -> None:
    _check_range(ids, experts)
    ranked = ids.sort(-1).values
    twice = (ranked[:, 1:] == ranked[:, :-1]).any(-1)
    if bool(twice.any()):
        token = int(twice.nonzero()[0])
        raise Violation(
            f"token {token}: expected {ids.shape[1]} distinct experts, got {ids[token].tolist()}",
            None,
            ids,
        )


def _wrong_ids(ids: torch.Tensor, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Choices that are wrong whatever the right one is."""
    past = ids.clone()
    past[-1, -1] = experts
    yield "an id past the last expert", past
    if ids.shape[1] > 1:
        twice = ids.clone()
        twice[0, -1] = twice[0, 0]
        yield "one expert twice", twice


@requirement(
    "GATE-01",
    MUST,
    "route",
    "Every token MUST get K distinct expert ids from 0 to E - 1, also where scores are equal.",
    reason="A repeated id sends a token twice to one expert and loses another; an id out of range "
    "is an access out of bounds in the next kernel.",
    sources=("SGLang #30989", "SGLang #31001", "vLLM #39391"),
    given=routing(contents=("normal", "coarse", "wide", "negative")),
    references=("gating.route",),
)
def each_token_gets_k_distinct_experts(case: Case) -> None:
    """Distinct and in range, for drawn logits and for rows that are constant."""
    logits = case["logits"].clone()
    logits[0] = logits[0, 0]
    _, ids = _route(case, logits=logits)
    experts = logits.shape[1]
    case.note("K = E", ids.shape[1] == experts)
    case.judge(lambda answer: _check_distinct(answer, experts), ids, _wrong_ids(ids, experts))


def _broken_rows(case: Case) -> torch.Tensor:
    logits = case["logits"].clone()
    kinds = (torch.nan, torch.inf, -torch.inf)
    for row in range(0, len(logits), 2):
        logits[row] = kinds[row // 2 % 3]
        if row // 2 % 2:
            logits[row, ::2] = 1.0
    return logits


def _finite_only(given: Given) -> Given:
    """The same inputs, for targets that take NaN and infinity."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


@requirement(
    "GATE-02",
    MUST,
    "route",
    "Rows with NaN or infinity MUST get K distinct expert ids from 0 to E - 1 as well.",
    reason="Padded rows of a batch hold whatever was in memory; an id made from them is used as an "
    "address.",
    sources=("vLLM #39391", "SGLang #30079"),
    given=_finite_only(routing(contents=("normal",))),
    references=("gating.route",),
)
def rows_that_are_not_finite_get_valid_experts(case: Case) -> None:
    """Distinct and in range where a row is NaN, infinite, or partly so."""
    logits = _broken_rows(case)
    _, ids = _route(case, logits=logits)
    experts = logits.shape[1]
    case.judge(lambda answer: _check_distinct(answer, experts), ids, _wrong_ids(ids, experts))


@requirement(
    "GATE-03",
    MUST,
    "route",
    "Weights MUST be gathered from the unbiased scores: the selection bias chooses and never "
    "weighs.",
    reason="The bias steers the load; in the weights it would change what the layer computes.",
    sources=("DeepSeek-V3 (arXiv 2412.19437) section 2.1.2", "vLLM #12002", "transformers #41647"),
    given=routing(bias=True),
    references=("gating.route",),
)
def the_bias_never_weighs(case: Case) -> None:
    """The weights are those of the chosen ids' unbiased scores."""
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-04",
    MUST,
    "route",
    "The K experts with the highest selection scores MUST be chosen.",
    reason="Which experts see a token is the definition of the router; choices that rounding can "
    "exchange are free.",
    sources=("Shazeer et al. (arXiv 1701.06538)", "mlx-lm #1883"),
    given=routing(bias=False, groups=False, left_out=True),
    references=("gating.route",),
)
def the_best_experts_are_chosen(case: Case) -> None:
    """Must-have and must-not-have experts, with the margin of the score's rounding."""
    _, ids = _route(case)
    _judge_ids(case, ids)


def _judge_ids(case: Case, ids: torch.Tensor) -> None:
    experts = case["logits"].shape[1]
    _check_distinct(ids, experts)
    oracle = _oracle(case)
    must, may = oracle.certain()
    case.note("a choice left to rounding", not bool((must == may).all()))

    def impostors() -> Iterator[tuple[str, torch.Tensor]]:
        never = (~may).nonzero()
        for token, expert in never[:1].tolist():
            wrong = ids.clone()
            wrong[token, -1] = expert
            yield "an expert that cannot be meant", wrong

    case.judge(oracle.check_ids, ids, impostors())


@requirement(
    "GATE-05",
    MUST,
    "route",
    "The selection bias MUST be added to the scores, before any expert is chosen.",
    reason="Without it, or added to the logits instead, the load is not steered as trained.",
    sources=("DeepSeek-V3 (arXiv 2412.19437) section 2.1.2", "mlx-lm #1354"),
    given=routing(bias=True, groups=False, left_out=True),
    references=("gating.route",),
)
def the_bias_takes_part_in_the_choice(case: Case) -> None:
    """As GATE-04, on biased scores."""
    _, ids = _route(case)
    _judge_ids(case, ids)


@requirement(
    "GATE-06",
    MUST,
    "route",
    "Weights MUST be the declared score function of the logits, in the declared order of scoring "
    "and selection.",
    reason="Softmax over all experts and softmax over the chosen ones differ unless renormalised; "
    "a sigmoid is neither.",
    sources=("Megatron #955", "Megatron #1593", "mlxcel #391", "llama.cpp #18980", "SGLang #35160"),
    given=routing(bias=False, groups=False, renormalize=(False,), scale=(1.0,)),
    references=("gating.route", "gating.scores"),
)
def weights_are_the_declared_scores(case: Case) -> None:
    """The weights of the target's own ids, without renormalisation."""
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-07",
    MUST,
    "route",
    "With `renormalize` the K weights MUST be divided by their norm (plus or clamped by epsilon).",
    reason="A forgotten or a double normalisation changes the size of the layer's output.",
    sources=("torchtitan #1448", "torchtitan #1418", "PaddleFormers #2844", "flashinfer #2889"),
    given=either(
        *[routing(bias=False, renormalize=(True,), scale=(1.0,))] * 2,
        vanishing(),
    ),
    references=("gating.route",),
)
def renormalised_weights_are_divided_by_their_norm(case: Case) -> None:
    """The weights of the target's own ids, renormalised."""
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-08",
    MUST,
    "route",
    "Renormalised weights MUST be finite when every score underflows and epsilon is positive.",
    reason="0 / 0 is NaN, and one NaN weight makes a token's whole output NaN.",
    sources=("flashinfer #3803", "flashinfer #3946"),
    given=routing(
        renormalize=(True,),
        epsilon=(1e-20, 1e-9),
        score=("sigmoid", "sqrtsoftplus"),
        contents=("normal",),
    ),
    references=("gating.route",),
)
def weights_stay_finite_when_scores_underflow(case: Case) -> None:
    """Logits around -300, whose scores are 0 in float32."""
    logits = (case["logits"].double() - 300).to(case["logits"].dtype)
    weights, _ = _route(case, logits=logits)
    scale = abs(case["config"].scale)
    top = scale * (1 + 1e-3)  # a share of the sum, whatever is left of it

    def rule(answer: torch.Tensor) -> None:
        wrong = ~(answer.abs() <= top)
        if bool(wrong.any()):
            token, k = (int(i) for i in wrong.nonzero()[0])
            raise Violation(
                f"weights[{token}, {k}]: expected a finite number of at most {scale:g}, "
                f"got {float(answer[token, k])}",
                None,
                answer,
            )

    case.judge(rule, weights, [("NaN", torch.full_like(weights, torch.nan))])


@requirement(
    "GATE-09",
    MUST,
    "route",
    "The scale MUST be applied exactly once, after and independently of renormalisation.",
    reason="Nested in the renormalisation branch it is lost for half of the configurations; "
    "applied twice it multiplies the routed output.",
    sources=("sgl-jax #1282", "SGLang #31449", "vLLM #45037", "SGLang #8511"),
    given=routing(
        scale=(2.5, 0.375, 2.5, 0.375, -1.5, 0.0),
        scale_when=("always",),
        contents=("normal", "wide"),
    ),
    references=("gating.route",),
)
def the_scale_is_applied_once(case: Case) -> None:
    """Weights with the scale are the scale times the weights of the same ids without."""
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-10",
    MUST,
    "route",
    "With groups, experts MUST be chosen from the `topk_groups` best groups only, by the declared "
    "group score.",
    reason="The group limit bounds how many nodes a token is sent to; max and top-2 sum pick "
    "different groups for most tokens.",
    sources=("vLLM #13474", "Megatron #1441", "DeepSeek-V3 inference/model.py"),
    given=routing(bias=False, groups=True, left_out=True),
    references=("gating.route",),
)
def experts_come_from_the_best_groups(case: Case) -> None:
    """Must-have and must-not-have experts, in open and closed groups."""
    _, ids = _route(case)
    _judge_ids(case, ids)


@requirement(
    "GATE-11",
    MUST,
    "route",
    "Groups MUST be scored on the biased scores, and a declared fill of 0 MUST compete with these.",
    reason="A bias added after the group mask cannot bring back a group that was closed, and moves "
    "what was filled in.",
    sources=("DeepSeek-V3 inference/model.py", "transformers #45441"),
    given=either(
        *[routing(bias=True, groups=True, mask_fill=("-inf",), left_out=True)] * 2,
        routing(bias=True, groups=True, mask_fill=("zero",), left_out=True),
    ),
    references=("gating.route",),
)
def groups_are_scored_with_the_bias(case: Case) -> None:
    """As GATE-10, on biased scores."""
    case.note("closed groups filled with 0", case["config"].mask_fill == "zero")
    _, ids = _route(case)
    _judge_ids(case, ids)


def _lowered_plans(scope: Scope) -> Plans | None:
    base = routing(
        bias=True, groups=True, mask_fill=("-inf",), contents=("normal", "negative")
    ).plans(scope)
    if base is None:
        return None
    # Of 16 of 2**105, the best of a group, the sum is finite in all but float16.
    narrow = scope.capabilities.router_dtype == "float16"
    powers = choice((0,) if narrow else (0, 0, 12, 100))
    return planned(lambda draw: dict(draw(base)) | {"power": draw(powers)})


def _lowered(plan: Plan) -> Inputs:
    """Every bias is -8 or below, times a power of two."""
    inputs = build_routing(plan)
    inputs["bias"] = (-8 - inputs["bias"].abs()) * 2.0 ** plan["power"]
    return inputs


@requirement(
    "GATE-12",
    MUST,
    "route",
    "An expert of a closed group MUST never be chosen, however low the biased scores of the open "
    "ones are.",
    reason="A mask value of 0.0 wins against negative biased scores, one of -10000 against those "
    "of experts that are switched off, and the group limit is gone.",
    sources=("transformers #45441", "DeepSeek-V3 #741", "ktransformers #1148"),
    given=Given(_lowered_plans, _lowered),
    references=("gating.route",),
)
def closed_groups_stay_closed(case: Case) -> None:
    """Every bias is below the range of any score, or below any number that masks in practice."""
    case.note("below -10000", bool((case["bias"] < -1e4).all()))
    _, ids = _route(case)
    _judge_ids(case, ids)


@requirement(
    "GATE-13",
    MUST,
    "route",
    "Where ties are declared to go to the lowest id, equal selection scores MUST be taken in order "
    "of expert id.",
    reason="Two kernels that break ties differently route the same token differently.",
    sources=("intel-xpu-backend-for-triton #7580", "intel-xpu-backend-for-triton #7575"),
    given=Given(
        lambda scope: (
            routing(bias=False, groups=False, contents=("normal",), left_out=True).plans(scope)
            if scope.capabilities.ties == "lowest"
            else None
        ),
        lambda plan: _tied(plan),
    ),
    references=("gating.route",),
)
def ties_go_to_the_lowest_id(case: Case) -> None:
    """Logits from three values far apart: the choice is known without any rounding."""
    _, ids = _route(case)
    logits, top_k = case["logits"].double(), case["config"].top_k
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].sort(-1).values
    ranked = ids.long().sort(-1).values
    highest = logits.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    other = (logits.shape[1] - 1 - highest).sort(-1).values

    def impostors() -> Iterator[tuple[str, torch.Tensor]]:
        if not torch.equal(other, expected):
            case.note("a tie at the boundary")
            yield "the highest ids", other

    case.judge(lambda answer: equal("expert_ids (sorted)", answer, expected), ranked, impostors())


def _tied(plan: Plan) -> Inputs:
    inputs = build_routing(plan)
    values = Content(plan["seed"]).integers(-1, 1, *inputs["logits"].shape)
    inputs["logits"] = values.to(inputs["logits"].dtype)
    return inputs


@requirement(
    "GATE-14",
    MUST,
    "route",
    "With a hash table the experts of a token MUST be the table's row for its token id, weighted "
    "by their own scores.",
    reason="Hash layers look experts up; the table is an integer table, and a cast to a narrow "
    "float merges neighbouring ids.",
    sources=("verl-ascend-recipe #126", "vLLM #50844", "afd-plugin #301"),
    given=routing(hashed=True),
    references=("gating.route",),
    kinds=2,
)
def hash_layers_follow_their_table(case: Case) -> None:
    """Ids equal the rows as sets, weights follow from them."""
    weights, ids = _route(case)
    oracle = _oracle(case)
    oracle.check_ids(ids)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-15",
    MUST,
    "route",
    "The routing of a token MUST depend on its own row only.",
    reason="A row that is NaN, padded or moved changes no other token's experts.",
    sources=("SGLang #30895", "vLLM #39391", "Megatron #1421"),
    given=routing(contents=("normal",), least_tokens=2),
    references=("gating.route",),
)
def a_token_is_routed_by_its_own_row(case: Case) -> None:
    """Reversing the tokens reverses the result; a broken last row leaves the others alone."""
    logits, token_ids = case["logits"], case["token_ids"]
    turned = logits.flip(0)
    if not case.scope.capabilities.finite_only:
        turned = turned.clone()
        turned[0] = torch.nan
    weights, ids = _route(case)
    turned_ids = None if token_ids is None else token_ids.flip(0)
    other_weights, other_ids = _route(case, logits=turned, token_ids=turned_ids)
    oracle, rows = _oracle(case), slice(0, len(logits) - 1)
    expected = _dense(weights, ids, logits.shape[1])[rows]
    must, may = oracle.certain()
    sure = (must == may).all(-1)[rows] if case["config"].hash_table is None else slice(None)
    error = 2 * _dense(oracle.weights(ids).error, ids, logits.shape[1])[rows]

    def rule(answer: torch.Tensor) -> None:
        within("weights by expert", answer[sure], expected.double()[sure], error[sure])

    answer = _dense(other_weights, other_ids, logits.shape[1]).flip(0)[rows]
    case.judge(rule, answer, [("all zeros", torch.zeros_like(answer))])


def _dense(weights: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
    _check_range(ids, experts)
    return torch.zeros(len(ids), experts, dtype=torch.float64).scatter_add(
        1, ids.long(), weights.double()
    )


@requirement(
    "GATE-16",
    MUST,
    "route",
    "Every expert MUST be reachable, for every number of experts.",
    reason="Kernels written for powers of two, or with one byte for an id, never choose the last "
    "experts.",
    sources=("imp #2056", "aiter #2359", "vLLM-metax #270", "moe-ops permute for E = 5"),
    given=routing(bias=False, groups=False, contents=("close",)),
    references=("gating.route",),
)
def every_expert_can_be_chosen(case: Case) -> None:
    """One token per expert, with a logit that stands out at that expert."""
    experts = case["logits"].shape[1]
    logits = case["logits"][:1].repeat(experts, 1)
    logits = logits + 6 * torch.eye(experts, dtype=logits.dtype)
    _, ids = _route(case, logits=logits)

    def rule(answer: torch.Tensor) -> None:
        missed = ~(answer == torch.arange(experts)[:, None]).any(-1)
        if bool(missed.any()):
            expert = int(missed.nonzero()[0])
            raise Violation(
                f"expert {expert} of {experts} has the highest logit and is not chosen: "
                f"{answer[expert].tolist()}",
                None,
                answer,
            )

    case.note("E is not a power of two", experts & (experts - 1) != 0)
    case.judge(rule, ids, [("one id further", ids + 1)])


def _bad_calls(logits: torch.Tensor, config: RoutingConfig) -> dict[str, dict[str, Any]]:
    tokens, experts = logits.shape
    plain = RoutingConfig(config.top_k, config.score, config.order)
    table = torch.zeros(4, config.top_k, dtype=torch.int64)
    hashed = dataclasses.replace(plain, hash_table=table)
    beyond = dataclasses.replace(plain, hash_table=table + experts)
    token_ids = torch.zeros(tokens, dtype=torch.int64)
    late = token_ids.clone()
    late[-1] = 4
    bad: dict[str, dict[str, Any]] = {
        "top_k > E": {"config": dataclasses.replace(plain, top_k=experts + 1)},
        "logits with one dimension": {"logits": logits[0]},
        "logits with three dimensions": {"logits": logits[None]},
        "logits of integers": {"logits": logits.long()},
        "a bias of another length": {"bias": torch.zeros(experts + 1)},
        "a bias of integers": {"bias": torch.zeros(experts, dtype=torch.int64)},
        "a token id past the end of the hash table": {"config": hashed, "token_ids": late},
        "a negative token id": {"config": hashed, "token_ids": -1 - token_ids},
        "an expert of the hash table past E": {"config": beyond, "token_ids": token_ids},
        "a hash table and no token ids": {"config": hashed},
        "a token id too many": {"config": hashed, "token_ids": torch.cat([token_ids, late[:1]])},
        "token ids that are floats": {"config": hashed, "token_ids": token_ids.float()},
    }
    if experts > 1:
        bad["one bias for all experts"] = {"bias": torch.zeros(1)}
        single = dataclasses.replace(
            plain, top_k=1, num_groups=experts, topk_groups=experts, group_score="top2_sum"
        )
        bad["the best two of groups of one"] = {"config": single}
    if experts > 2:
        uneven = dataclasses.replace(plain, top_k=1, num_groups=experts - 1)
        bad["E not divisible by num_groups"] = {"config": uneven}
    if experts % 2 == 0 and experts > 2:
        narrow = dataclasses.replace(plain, top_k=experts // 2 + 1, num_groups=2)
        bad["top_k beyond the open groups"] = {"config": narrow}
    good = {"logits": logits, "config": plain, "bias": None, "token_ids": None}
    return {name: good | arguments for name, arguments in bad.items()}


@requirement(
    "GATE-17",
    MUST,
    "route",
    "A topology that cannot work, an argument of the wrong shape or dtype, and a token id or an "
    "expert outside the hash table MUST raise.",
    reason="Silently routed, they give experts that nobody asked for.",
    sources=("vLLM #29439", "transformers #48647", "vLLM #50844"),
    given=Given(
        lambda scope: (
            None
            if scope.capabilities.alternatives("routing") != [{}]
            else routing(contents=("normal",), largest=16, groups=False, bias=False).plans(scope)
        ),
        routing().build,
    ),
    references=("gating.route",),
)
def what_cannot_work_raises(case: Case) -> None:
    """Each bad call by itself has to raise."""
    good = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    must_raise(case, "route", good, _bad_calls(case["logits"], case["config"]))


@requirement(
    "GATE-18",
    MUST,
    "route",
    "The gradient of the weights by the logits MUST be that of the score function, "
    "renormalisation and scale at the chosen experts.",
    reason="The router learns through its weights alone; a gradient cut or doubled there goes "
    "unnoticed until the load collapses.",
    sources=("minimind #858", "torchtitan #2416", "Megatron #1421"),
    given=differentiable(
        "route",
        either(
            routing(contents=("normal", "coarse", "wide", "shifted")),
            routing(contents=("normal", "coarse")),
            routing(hashed=True, contents=("normal", "coarse")),
            vanishing(),
        ),
    ),
    references=("gating.route",),
    kinds=2,
)
def the_router_gets_its_gradient(case: Case) -> None:
    """Autograd through the weights against autograd through the oracle at the same ids."""
    logits, config = case["logits"], case["config"]
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    shape = (len(logits), config.top_k)
    cotangent = Content(int(logits.numel())).normal(*shape).float()
    call = case.planned("route", wrt=["logits"], cotangents={"0": cotangent}, **given)
    answer = case.session([call])[0]
    _, ids = _in_form(case, answer, given)
    case.note("a hash table", config.hash_table is not None)
    if config.hash_table is None:
        _check_distinct(ids, logits.shape[1])
    else:
        _oracle(case).check_ids(ids)
    found = answer.gradients["logits"]
    if found is None:
        raise Violation("gradient of logits: expected a tensor, got None")
    leaf = logits.double().requires_grad_(True)
    dtype = str(logits.dtype).removeprefix("torch.")
    oracle = _oracle(case, logits=leaf, dtype=dtype)
    scored = oracle.weights(ids)
    weight = cotangent.double()
    [expected] = torch.autograd.grad((scored.value * weight).sum(), leaf, allow_unused=True)
    if expected is None:
        expected = torch.zeros_like(leaf)
    bound = _gradient_bound(oracle, scored.value.detach(), weight, ids, dtype)

    def rule(gradient: torch.Tensor) -> None:
        within("gradient of logits", gradient, expected, bound)

    def impostors() -> Iterator[tuple[str, torch.Tensor]]:
        if bool((expected.abs() > 2 * bound).any()):
            yield "all zeros", torch.zeros_like(expected)
            yield "twice as much", 2 * expected

    case.judge(rule, found, impostors())


def _gradient_bound(
    oracle: RoutingOracle,
    weights: torch.Tensor,
    cotangent: torch.Tensor,
    ids: torch.Tensor,
    dtype: str,
) -> torch.Tensor:
    """A bound on the error of the gradient by the logits.

    The derivative of weight j by logit i is a sum of terms, each a product of a weight and at most
    two shares below 1 times the relative derivative of the score: w_j, w_j · p_i (softmax) and
    w_j · share_i (renormalisation). Every factor is off by at most the score's largest relative
    error, and a sum of K or E terms by as many units more.
    """
    with torch.no_grad():
        scored = oracle.scores(oracle.logits.detach())
        relative = (scored.error / scored.value.clamp_min(oracle.tiny)).amax(-1, keepdim=True)
        terms = oracle.logits.shape[1] + 16
        mass = (weights * cotangent).abs()
        own = torch.zeros_like(oracle.logits).scatter_add(1, ids.long(), mass)
        chosen = torch.zeros_like(oracle.logits).scatter(1, ids.long(), 1.0)
        share = scored.value if oracle.config.score == "softmax" else chosen
        size = own + (2 * share + chosen) * mass.sum(-1, keepdim=True)
        # sqrtsoftplus' = sigmoid / (2 sqrtsoftplus): at most 1/2 of the score's own size below 0
        # and shrinking above, so the relative derivative stays at most 1 as for the other two.
        # The gradient has the logits' dtype, so it is rounded to that at the end.
        rounded = UNIT[dtype] + terms * oracle.unit
        return size * (4 * relative + 2 * rounded) + 4 * max(oracle.tiny, TINY[dtype])


@requirement(
    "GATE-19",
    MUST,
    "route",
    "Zero tokens MUST give empty weights and ids of shape [0, K].",
    reason="A rank or an expert group without tokens is an ordinary batch, not an error.",
    sources=("DeepSpeed #8155", "torchtitan #1166"),
    given=either(
        routing(contents=("normal",), largest=64),
        routing(contents=("normal",), largest=64),
        routing(contents=("normal",), largest=64, hashed=True),
    ),
    references=("gating.route",),
)
def zero_tokens_are_routed_to_nothing(case: Case) -> None:
    """The same configuration with the tokens cut away."""
    logits, token_ids = case["logits"][:0], case["token_ids"]
    token_ids = None if token_ids is None else token_ids[:0]
    given = {"config": case["config"], "bias": case["bias"], "token_ids": token_ids}
    answer = case.call("route", logits=logits, layouts={}, **given)
    top_k, dtype = case["config"].top_k, logits.dtype
    case.note("a hash table", token_ids is not None)

    def rule(outputs: Any) -> None:
        _in_form(case, dataclasses.replace(answer, outputs=outputs), {"logits": logits, **given})

    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    one = [torch.zeros(1, top_k, dtype=dtype), torch.zeros(1, top_k, dtype=torch.int64)]
    case.judge(rule, answer.outputs, [("one token", one), ("nothing", None)])


@requirement(
    "GATE-20",
    MUST,
    "route",
    "The selection bias MUST take part with all of its float32 digits.",
    reason="Trained biases lie close together: rounded to bfloat16, the biases of 256 experts "
    "became a handful of values and nearly every token was routed differently.",
    sources=("SGLang #37133", "SGLang #31213", "vLLM #23640", "FreeToken #469"),
    given=Given(lambda scope: _fine_bias(scope), lambda plan: _build_fine_bias(plan)),
    references=("gating.route",),
)
def the_bias_keeps_its_digits(case: Case) -> None:
    """Equal logits and biases a few float32 units apart: the bias alone decides."""
    _, ids = _route(case)
    _judge_ids(case, ids)


def _fine_bias(scope: Scope) -> Plans | None:
    return routing(
        bias=True,
        groups=False,
        order=("score_then_topk",),
        contents=("normal",),
        largest=256,
        left_out=True,
    ).plans(scope)


def _build_fine_bias(plan: Plan) -> Inputs:
    inputs = build_routing(plan)
    experts = plan["experts"]
    content = Content(plan["seed"])
    # As far apart as in the trained layer of the thread: some 1e-3, below bfloat16's 2^-5 at 7.
    steps = content.permutation(experts).double()
    inputs["bias"] = (6.817 + 1e-3 * steps).to(_wide(plan["dtype"]))
    inputs["logits"] = torch.zeros_like(inputs["logits"])
    return inputs


@requirement(
    "GATE-21",
    SHOULD,
    "route",
    "Weights SHOULD be gathered, not recovered as (score + bias) - bias.",
    reason="With a bias of 12 a score of 1e-8 is lost in the sum, and its weight comes out as 0.",
    sources=("flashinfer #3875", "vLLM #47367"),
    given=Given(lambda scope: _lost_scores(scope), lambda plan: _build_lost_scores(plan)),
    references=("gating.route",),
)
def small_scores_survive_a_large_bias(case: Case) -> None:
    """Biases around 12 and scores around 1e-8."""
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)


def _lost_scores(scope: Scope) -> Plans | None:
    return routing(
        bias=True, score=("sigmoid",), order=("score_then_topk",), renormalize=(False,),
        contents=("normal",), largest=64,
    ).plans(scope)  # fmt: skip


def _build_lost_scores(plan: Plan) -> Inputs:
    inputs = build_routing(plan)
    content = Content(plan["seed"])
    logits = fill_logits(content, "normal", plan["tokens"], plan["experts"]) - 18
    inputs["logits"] = logits.to(torch_dtype(plan["dtype"]))
    inputs["bias"] = (12 + content.normal(plan["experts"])).to(_wide(plan["dtype"]))
    return inputs


@requirement(
    "GATE-22",
    MUST,
    "route",
    "The routing MUST be right for every number of experts, tokens and experts per token, on the "
    "boundaries of blocks and beside them.",
    reason="Kernels are specialised by size; a wrong tail or a path for one size is right "
    "everywhere else.",
    sources=("vLLM-metax #270", "aiter #2359", "aiter #4451", "imp #2056"),
    given=at_boundaries(),
    references=("gating.route",),
    kinds=3,
)
def no_size_is_special(case: Case) -> None:
    """One past a block, a whole one, and one short of it; E to 1025, T to 4097 and K to 33."""
    case.note(f"at a boundary of {case['axis']}")
    whole = dict(case.inputs)
    for short in range(3):
        case.inputs.update(_shorter(whole, short))
        weights, ids = _route(case)
        experts = case["logits"].shape[1]
        if ids.shape[1] < experts:
            _judge_ids(case, ids)
        else:
            _check_distinct(ids, experts)
        _judge_weights(case, weights, ids)


def _shorter(inputs: Inputs, short: int) -> Inputs:
    """The same inputs with so many experts, tokens or choices left out, by `axis`."""
    logits, config, bias = inputs["logits"], inputs["config"], inputs["bias"]
    if inputs["axis"] == "tokens":
        return {"logits": logits[: len(logits) - short]}
    if inputs["axis"] == "top_k":
        return {"config": dataclasses.replace(config, top_k=config.top_k - short)}
    experts = logits.shape[1] - short
    return {"logits": logits[:, :experts], "bias": None if bias is None else bias[:experts]}


@requirement(
    "GATE-23",
    MUST,
    "route",
    "Every call MUST be answered for its own logits, bias, token ids and table, also where an "
    "earlier call had the same shapes, the same storage or an equal configuration.",
    reason="A cache keyed by address answers the call before; one keyed by the configuration keeps "
    "its hash table, which takes no part in equality.",
    sources=("SGLang #25852", "vLLM #50844", "docs/spec/gating.md"),
    given=either(
        routing(contents=("normal",), largest=64),
        routing(contents=("normal",), largest=64, hashed=True, least_tokens=2),
    ),
    references=("gating.route",),
)
def every_call_is_answered_for_itself(case: Case) -> None:
    """Other data in the storage of the first call, then the first call's data in fresh storage."""
    first = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    bias, config = case["bias"], case["config"]
    other = dict(first)
    other["logits"] = -first["logits"].flip(0)
    other["bias"] = None if bias is None else -bias
    if config.hash_table is not None:
        table = (config.hash_table + 1) % first["logits"].shape[1]
        other["config"] = dataclasses.replace(config, hash_table=table)
        other["token_ids"] = first["token_ids"].flip(0)
    calls = [
        case.planned("route", **first),
        case.planned("route", **other, reuse=0),
        case.planned("route", **first),
    ]
    for answer, given in zip(case.session(calls), (first, other, first), strict=True):
        weights, ids = _in_form(case, answer, given)
        oracle = _oracle(case, **given)
        if config.hash_table is None:
            _check_distinct(ids, given["logits"].shape[1])
        oracle.check_ids(ids)
        expected = oracle.weights(ids)

        def rule(found: torch.Tensor, expected: Any = expected) -> None:
            within("weights", found, expected.value, expected.error)

        case.judge(rule, weights, _wrong_weights(expected.value))


@requirement(
    "GATE-24",
    MUST,
    "route",
    "In every configuration the arguments and torch's global state MUST be left as they are, and "
    "the results MUST have memory of their own, with a place for each element.",
    reason="The logits go on to the losses, and the bias and the table to the next step; a mask "
    "filled in place, or a row of the table handed out, is found there. Where K = 1 one weight for "
    "all tokens cannot be written to.",
    sources=("transformers MoE jitter", "TensorCast topk_weights /=", "docs/spec/operations.md"),
    given=either(routing(), routing(), routing(hashed=True)),
    references=("gating.route",),
    kinds=4,
)
def routing_leaves_everything_as_it_was(case: Case) -> None:
    """With and without gradients, which take other paths, and with rows that are not finite.

    Whether such rows are answered at all, GATE-15 asks.
    """
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    calls = [case.planned("route", **given)]
    if "route" in case.scope.capabilities.gradients:
        cotangent = torch.ones(len(given["logits"]), given["config"].top_k)
        calls.append(case.planned("route", wrt=["logits"], cotangents={"0": cotangent}, **given))

    def rule(touched: list[str]) -> None:
        if touched:
            raise Violation(
                f"route changed, shares, expands or moved {', '.join(sorted(set(touched)))}"
            )

    answers = [case.session([call])[0] for call in calls]
    if not case.scope.capabilities.finite_only:
        broken = case.planned("route", **given | {"logits": _broken_rows(case)})
        answers += [each for each in case.attempt([broken]) if each.error is None]
    for answer in answers:
        expanded = [f"result {path}" for path, *_, kind in answer.kinds if "expanded" in kind]
        found = [*answer.changed, *answer.shared, *answer.state, *expanded]
        case.judge(rule, found, [("the logits", ["logits"])])


@requirement(
    "GATE-25",
    MUST,
    "route",
    "Token ids MUST have no effect without a hash table, and a bias MUST have none with one.",
    reason="A layer hands both to all of its routers; a model mixes hash layers with others.",
    sources=("docs/spec/gating.md",),
    given=either(
        routing(contents=("normal",), largest=64, left_out=True),
        Given(
            lambda scope: routing(bias=True, hashed=True, contents=("normal",), largest=64).plans(
                scope
            ),
            build_routing,
        ),
    ),
    references=("gating.route",),
)
def what_a_router_has_no_use_for_has_no_effect(case: Case) -> None:
    """Token ids from far outside any table, or a bias that would choose otherwise."""
    config, tokens = case["config"], len(case["logits"])
    case.note("a bias beside a table", config.hash_table is not None)
    if config.hash_table is None:
        unneeded = Content(tokens).integers(-3, 2**31 - 1, tokens)
        weights, ids = _route(case, token_ids=unneeded)
        _judge_ids(case, ids)
    else:
        weights, ids = _route(case)
        _oracle(case).check_ids(ids)
    _judge_weights(case, weights, ids)


@requirement(
    "GATE-26",
    MUST,
    "route",
    "The selection bias MUST get no gradient.",
    reason="It is moved by the load and by nothing else; a gradient pulls it back to where the "
    "loss wants it.",
    sources=("DeepSeek-V3 (arXiv 2412.19437) section 2.1.2", "docs/spec/gating.md"),
    given=differentiable("route", routing(bias=True)),
    references=("gating.route",),
)
def the_bias_gets_no_gradient(case: Case) -> None:
    """None or zeros, where the bias asks for one."""
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    cotangent = 1 + Content(given["logits"].numel()).uniform(
        0, 1, len(given["logits"]), given["config"].top_k
    )
    answer = case.call("route", wrt=["logits", "bias"], cotangents={"0": cotangent}, **given)
    zero = torch.zeros_like(given["bias"])

    def rule(found: torch.Tensor | None) -> None:
        if found is not None:
            equal("gradient of bias", found, zero)

    case.judge(rule, answer.gradients["bias"], [("ones", zero + 1)])


def _far(plan: Plan) -> Inputs:
    """Logits moved by up to 900, far beyond what an exponential in float32 can hold."""
    inputs = build_routing(plan)
    # Far below 0 every sigmoid is 0, and no weight is left to judge; a softmax has no such end.
    low = -900 if inputs["config"].score == "softmax" else 0
    moved = Content(plan["seed"]).uniform(low, 900, plan["tokens"], 1)
    if inputs["config"].hash_table is not None:
        # The first one of a row need not be the greatest, nor anywhere near it.
        inputs["logits"] = inputs["logits"] * 60
    inputs["logits"] = (inputs["logits"].double() + moved).to(inputs["logits"].dtype)
    return inputs


@requirement(
    "GATE-27",
    MUST,
    "route",
    "Large logits MUST NOT overflow, neither in the weights nor in their gradient.",
    reason="exp(89) is infinite in float32, and exp(12) in float16; infinity over infinity is NaN.",
    sources=("flashinfer #3803", "flashinfer #3946", "ST-MoE (arXiv 2202.08906)"),
    given=Given(
        either(
            *[routing(contents=("normal",), largest=256)] * 4,
            # Over all experts, the scores of a row that is far from the greatest underflow.
            routing(
                hashed=True,
                contents=("normal",),
                score=("softmax",),
                order=("topk_then_score",),
                largest=256,
            ),
        ).plans,
        _far,
    ),
    references=("gating.route", "gating.scores"),
    kinds=2,
)
def large_logits_do_not_overflow(case: Case) -> None:
    """Rows of logits around any number from -900 to 900, for scores that are then not all 0."""
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    weights, ids = _route(case)
    _judge_weights(case, weights, ids)
    if "route" not in case.scope.capabilities.gradients:
        return
    cotangent = torch.ones_like(weights)
    answer = case.call("route", wrt=["logits"], cotangents={"0": cotangent}, **given)
    found = answer.gradients["logits"]

    def rule(gradient: torch.Tensor | None) -> None:
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            raise Violation("gradient of logits: expected finite numbers", None, gradient)

    case.judge(rule, found, [("NaN", torch.full_like(given["logits"], torch.nan))])


def _with_absent_experts(plan: Plan) -> Inputs:
    """Some experts of each token have a logit of minus infinity, and K at least have not.

    Any ones, or the first ones.
    """
    inputs = build_routing(plan)
    content, top_k = Content(plan["seed"] + 1), inputs["config"].top_k
    tokens, experts = inputs["logits"].shape
    present = content.integers(top_k, experts - 1, tokens, 1)
    rank = content.uniform(0, 1, tokens, experts).argsort(1).argsort(1)
    if plan["seed"] % 2:
        # The first ones: whole tiles of a kernel are then absent.
        rank = torch.arange(experts - 1, -1, -1).expand(tokens, experts)
    inputs["logits"] = inputs["logits"].masked_fill(rank >= present, -torch.inf)
    return inputs


@requirement(
    "GATE-28",
    MUST,
    "route",
    "An expert whose logit is minus infinity MUST NOT be chosen while enough others are left, and "
    "MUST NOT change their weights or make a gradient NaN.",
    reason="Experts that a model pads its router with, or that are switched off, are marked so.",
    sources=("vLLM #39391", "SGLang #30079", "docs/spec/gating.md"),
    given=_finite_only(
        Given(
            lambda scope: (
                routing(bias=False, groups=False, contents=("normal",), left_out=True).plans(scope)
                if scope.capabilities.logits_through == "direct"
                else None
            ),
            _with_absent_experts,
        )
    ),
    references=("gating.route", "gating.scores"),
)
def absent_experts_take_no_part(case: Case) -> None:
    """Against the oracle on logits of -10000, whose scores are 0 in float64 too."""
    logits = case["logits"]
    absent = logits == -torch.inf
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    oracle = _oracle(case, logits=logits.double().masked_fill(absent, -1e4), dtype=_name(logits))
    answer = case.call("route", **given)
    weights, ids = _in_form(case, answer, given)
    _check_distinct(ids, logits.shape[1])
    ahead = absent.long().sort(dim=1, stable=True, descending=True).indices[:, : ids.shape[1]]
    case.judge(oracle.check_ids, ids, [("absent experts", ahead)])
    expected = oracle.weights(ids)
    case.judge(
        lambda found: within("weights", found, expected.value, expected.error),
        weights,
        _wrong_weights(expected.value),
    )
    if "route" not in case.scope.capabilities.gradients:
        return
    cotangents = {"0": torch.ones_like(weights)}
    found = case.call("route", wrt=["logits"], cotangents=cotangents, **given).gradients["logits"]

    def rule(gradient: torch.Tensor | None) -> None:
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            raise Violation("gradient of logits: expected finite numbers", None, gradient)
        equal("gradient of absent logits", gradient[absent], torch.zeros_like(gradient[absent]))

    case.judge(rule, found, [("NaN", torch.full_like(logits, torch.nan))])


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tied_groups(plan: Plan) -> Inputs:
    """Logits from three values, one of them for whole groups, so that groups tie as well."""
    inputs = build_routing(plan)
    content, groups = Content(plan["seed"]), plan["config"]["num_groups"]
    tokens, experts = inputs["logits"].shape
    # No two different multisets of these have the same sum of scores but for sums of logits, which
    # are exact.
    values = torch.tensor([0.0, 1.0, 3.0])
    each = values[content.integers(0, 2, tokens, experts)]
    alike = values[content.integers(0, 2, tokens, groups)].repeat_interleave(experts // groups, 1)
    whole = content.uniform(0, 1, tokens, 1) < 0.7
    inputs["logits"] = torch.where(whole, alike, each).to(inputs["logits"].dtype)
    return inputs


@requirement(
    "GATE-29",
    MUST,
    "route",
    "Where ties are declared to go to the lowest id, the groups of lower ids MUST be opened first "
    "of those with equal scores.",
    reason="Otherwise the experts that tie are not all in the running, and two kernels that both "
    "declare the rule route differently.",
    sources=("intel-xpu-backend-for-triton #7580", "docs/spec/gating.md"),
    given=Given(
        lambda scope: (
            routing(bias=False, groups=True, contents=("normal",), left_out=True).plans(scope)
            if scope.capabilities.ties == "lowest"
            else None
        ),
        _tied_groups,
    ),
    references=("gating.route",),
)
def equal_groups_are_opened_in_order(case: Case) -> None:
    """Mostly groups of experts that are all alike: the choice is known without any rounding."""
    _, ids = _route(case)
    logits, config = case["logits"].double(), case["config"]
    groups, experts = config.num_groups, logits.shape[1]
    expected = gating.route(logits, config)[1].sort(-1).values
    last = torch.arange(experts).view(groups, -1).flip(0).flatten()
    other = last[gating.route(logits[:, last], config)[1]].sort(-1).values

    def impostors() -> Iterator[tuple[str, torch.Tensor]]:
        if not torch.equal(other, expected):
            case.note("a tie between groups")
            yield "the last groups", other

    case.judge(
        lambda answer: equal("expert_ids (sorted)", answer, expected),
        ids.long().sort(-1).values,
        impostors(),
    )


def _close_calls(plan: Plan) -> Inputs:
    """Logits one unit in the last place apart in most rows, zeros of either sign in the others."""
    inputs = build_routing(plan)
    content = Content(plan["seed"])
    tokens, experts = inputs["logits"].shape
    order = content.uniform(0, 1, tokens, experts).argsort(1)
    steps = 1 + order.double() * 2 * UNIT[plan["dtype"]]
    signed = torch.tensor([0.0, -0.0, -1.0, 0.0, -0.0])[content.integers(0, 4, tokens, experts)]
    zeros = content.uniform(0, 1, tokens, 1) < 0.3
    inputs["logits"] = torch.where(zeros, signed.double(), steps).to(inputs["logits"].dtype)
    return inputs


@requirement(
    "GATE-30",
    MUST,
    "route",
    "Logits that are selected on MUST be compared exactly: neighbours of the dtype differ, and "
    "zero equals minus zero.",
    reason="An expert's id packed into the last bits of its logit, or floats compared as integers, "
    "choose among close logits by something else.",
    sources=("aiter #2359", "SGLang #30989", "docs/spec/gating.md"),
    given=Given(
        lambda scope: (
            routing(
                bias=False,
                groups=False,
                order=("topk_then_score",),
                contents=("normal",),
                largest=64,
                left_out=True,
            ).plans(scope)
            if scope.capabilities.router_dtype in (None, "float64")
            else None
        ),
        _close_calls,
    ),
    references=("gating.route",),
)
def logits_are_compared_exactly(case: Case) -> None:
    """One unit apart; where ties are declared, zeros of either sign tie."""
    _, ids = _route(case)
    logits, config = case["logits"], case["config"]
    case.note("zeros", bool((logits == 0).any()))
    if case.scope.capabilities.ties != "lowest":
        _judge_ids(case, ids)
        return
    expected = gating.route(logits, config)[1].sort(-1).values
    highest = logits.shape[1] - 1 - gating.route(logits.flip(-1), config)[1]
    wrong = [("the lowest logits", gating.route(-logits, config)[1].sort(-1).values)]
    if not torch.equal(highest.sort(-1).values, expected):
        wrong.append(("the highest ids of those equal", highest.sort(-1).values))
    wrong = [(name, found) for name, found in wrong if not torch.equal(found, expected)]
    case.judge(
        lambda answer: equal("expert_ids (sorted)", answer, expected),
        ids.long().sort(-1).values,
        wrong,
    )
