"""Requirements on `route`: from logits to K experts and K weights for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference.config import RoutingConfig

from moe_conformance.case import Case, routed
from moe_conformance.inputs.given import Content, Given, Inputs, Plan, Plans, Scope, torch_dtype
from moe_conformance.inputs.routing import build_routing, fill_logits, routing
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
    tokens, config = len(given["logits"]), given["config"]
    return routed(case.call("route", **given), tokens, config.top_k)


def _judge_weights(case: Case, weights: torch.Tensor, ids: torch.Tensor) -> None:
    """Hold weights against those of the target's own ids."""
    _check_range(ids, case["logits"].shape[1])
    oracle = _oracle(case)
    expected = oracle.weights(ids)

    def rule(answer: torch.Tensor) -> None:
        within("weights", answer, expected.value, expected.error)

    case.judge(rule, weights, _wrong_weights(expected.value))


def _wrong_weights(expected: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
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
    given=routing(bias=False, renormalize=(True,), scale=(1.0,)),
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
    given=routing(scale=(2.5, 0.375), scale_when=("always",), contents=("normal", "wide")),
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
    "Groups MUST be scored on the biased scores.",
    reason="A bias added after the group mask cannot bring back a group that was closed.",
    sources=("DeepSeek-V3 inference/model.py", "transformers #45441"),
    given=routing(bias=True, groups=True, mask_fill=("-inf",), left_out=True),
    references=("gating.route",),
)
def groups_are_scored_with_the_bias(case: Case) -> None:
    """As GATE-10, on biased scores."""
    _, ids = _route(case)
    _judge_ids(case, ids)


@requirement(
    "GATE-12",
    MUST,
    "route",
    "An expert of a closed group MUST never be chosen, however low the biased scores of the open "
    "ones are.",
    reason="A mask value of 0.0 wins against negative biased scores, and the group limit is gone.",
    sources=("transformers #45441", "DeepSeek-V3 #741", "ktransformers #1148"),
    given=routing(bias=True, groups=True, mask_fill=("-inf",), contents=("normal", "negative")),
    references=("gating.route",),
)
def closed_groups_stay_closed(case: Case) -> None:
    """Every bias is lowered by 8, below the range of any score."""
    bias = case["bias"] - 8
    case.inputs["bias"] = bias
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


@dataclasses.dataclass(frozen=True)
class _BadCall:
    name: str
    arguments: dict[str, Any]


def _bad_calls(logits: torch.Tensor, config: RoutingConfig) -> list[_BadCall]:
    experts = logits.shape[1]
    plain = RoutingConfig(config.top_k, config.score, config.order)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("top_k > E", {"config": dataclasses.replace(plain, top_k=experts + 1)}),
        ("logits with one dimension", {"logits": logits[0], "config": plain}),
        ("a bias of another length", {"config": plain, "bias": torch.zeros(experts + 1)}),
    ]
    if experts > 2:
        uneven = dataclasses.replace(plain, top_k=1, num_groups=experts - 1)
        bad.append(("E not divisible by num_groups", {"config": uneven}))
    if experts % 2 == 0 and experts > 2:
        narrow = dataclasses.replace(plain, top_k=experts // 2 + 1, num_groups=2)
        bad.append(("top_k beyond the open groups", {"config": narrow}))
    table = torch.zeros(4, config.top_k, dtype=torch.int64)
    hashed = dataclasses.replace(plain, hash_table=table)
    outside = torch.full((len(logits),), 4)
    bad.append(("a token id outside the hash table", {"config": hashed, "token_ids": outside}))
    return [
        _BadCall(name, {"logits": logits, "bias": None, "token_ids": None} | arguments)
        for name, arguments in bad
    ]


@requirement(
    "GATE-17",
    MUST,
    "route",
    "A topology that cannot work, a bias of the wrong length and a token id outside the hash table "
    "MUST raise.",
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
    for bad in _bad_calls(case["logits"], case["config"]):
        answer = case.attempt([case.planned("route", layouts={}, **bad.arguments)])[0]

        def rule(error: dict[str, Any] | None, name: str = bad.name) -> None:
            if error is None:
                raise Violation(f"{name}: expected an exception, got a result")
            if error["type"] not in ("ValueError", "TypeError"):
                raise Violation(
                    f"{name}: expected ValueError or TypeError, got {error['type']}: "
                    f"{error['message'][:200]}"
                )

        case.judge(rule, answer.error, [("a result", None)])


@requirement(
    "GATE-18",
    MUST,
    "route",
    "The gradient of the weights by the logits MUST be that of the score function, "
    "renormalisation and scale at the chosen experts.",
    reason="The router learns through its weights alone; a gradient cut or doubled there goes "
    "unnoticed until the load collapses.",
    sources=("minimind #858", "torchtitan #2416", "Megatron #1421"),
    given=Given(
        lambda scope: (
            routing(hashed=False, contents=("normal", "coarse")).plans(scope)
            if "route" in scope.capabilities.gradients
            else None
        ),
        routing().build,
    ),
    references=("gating.route",),
)
def the_router_gets_its_gradient(case: Case) -> None:
    """Autograd through the weights against autograd through the oracle at the same ids."""
    logits, config = case["logits"], case["config"]
    given = {name: case[name] for name in ("logits", "config", "bias", "token_ids")}
    shape = (len(logits), config.top_k)
    cotangent = Content(int(logits.numel())).normal(*shape).float()
    call = case.planned("route", wrt=["logits"], cotangents={"0": cotangent}, **given)
    answer = case.session([call])[0]
    _, ids = routed(answer, *shape)
    _check_distinct(ids, logits.shape[1])
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
    given=routing(contents=("normal",), largest=64),
    references=("gating.route",),
)
def zero_tokens_are_routed_to_nothing(case: Case) -> None:
    """The same configuration with the tokens cut away."""
    logits, token_ids = case["logits"][:0], case["token_ids"]
    token_ids = None if token_ids is None else token_ids[:0]
    given = {"config": case["config"], "bias": case["bias"], "token_ids": token_ids}
    answer = case.call("route", logits=logits, layouts={}, **given)
    top_k = case["config"].top_k

    def rule(outputs: Any) -> None:
        routed(dataclasses.replace(answer, outputs=outputs), 0, top_k)

    one = [torch.zeros(1, top_k), torch.zeros(1, top_k, dtype=torch.int64)]
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
    inputs["bias"] = (6.817 + 1e-3 * steps).to(inputs["bias"].dtype)
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
    inputs["bias"] = (12 + content.normal(plan["experts"])).to(inputs["bias"].dtype)
    return inputs
