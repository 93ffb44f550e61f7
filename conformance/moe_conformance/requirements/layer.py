"""Requirements on `layer`: the router's product, the routed experts, the shared one, together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference.config import LayerConfig, LayerWeights
from moe_reference.layer import layer as reference_layer
from moe_reference.layer import shared_expert
from moe_reference.load_balancing import balance_loss as reference_loss

from moe_conformance.case import Answer, Case, must_raise
from moe_conformance.codec import replace_tensors, walk
from moe_conformance.experts_oracle import Spread, expert_spread, experts_oracle
from moe_conformance.inputs.given import Content, Given, Scope, differentiable
from moe_conformance.inputs.layer import layer_inputs
from moe_conformance.inputs.load_balancing import SEQUENCE
from moe_conformance.judge import (
    Closeness,
    Violation,
    close,
    equal,
    equals,
    has_form,
    impostors,
    telling_scale,
    within,
)
from moe_conformance.precision import FLOOR, TINY, UNIT, Arithmetic
from moe_conformance.registry import MUST, SHOULD, requirement
from moe_conformance.routing_oracle import C, RoutingOracle

NAMES = ("x", "parameters", "config", "token_ids", "padding_mask", "training")


def _call(case: Case, **changed: Any) -> dict[str, Any]:
    """The layer's answer by field; fields that the target does not have are None."""
    given = {name: case[name] for name in NAMES} | changed
    return _fields(case.call("layer", **given), given["x"])


def _fields(answer: Answer, x: torch.Tensor) -> dict[str, Any]:
    outputs = answer.outputs
    if not isinstance(outputs, dict) or "output" not in outputs:
        raise Violation(f"layer: expected a LayerOutput, got {type(outputs).__name__}")
    has_form("output", outputs["output"], tuple(x.shape), (x.dtype,))
    return outputs


def _reported_ids(case: Case, fields: dict[str, Any]) -> torch.Tensor | None:
    """The ids that are reported, in the form that the contract gives them."""
    ids = fields.get("expert_ids")
    if ids is not None:
        tokens = case["x"].shape[0] * case["x"].shape[1]
        shape = (tokens, case["config"].routing.top_k)
        has_form("expert_ids", ids, shape, (torch.int32, torch.int64))
    return ids


def _counted(case: Case, ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """[E], pairs of real tokens; ids of no expert are nobody's."""
    experts = len(case["parameters"].router)
    kept = ids.long() if real is None else ids.long()[real.reshape(-1)]
    return torch.bincount(kept[(kept >= 0) & (kept < experts)], minlength=experts)


def _arithmetic(case: Case) -> Arithmetic:
    return Arithmetic.of(case.scope.capabilities, str(case["x"].dtype).removeprefix("torch."))


def _routing(case: Case, **changed: Any) -> RoutingOracle:
    """The routing of the layer's own logits, with the error that computing them makes."""
    given = case.inputs | changed
    parameters: LayerWeights = given["parameters"]
    config: LayerConfig = given["config"]
    x = given["x"].reshape(-1, given["x"].shape[-1])
    capabilities = case.scope.capabilities
    dtype = str(x.dtype).removeprefix("torch.")
    # x, router and bias are rounded to the router's dtype before the product, the logits after.
    of = torch.float64 if dtype == "float64" else config.router_dtype or x.dtype
    narrow = str(of).removeprefix("torch.")
    rows, router = x.to(of).double(), parameters.router.to(of).double()
    logits = rows @ router.T
    # A worst case bound: every order of H products, each rounded. Where the product is rounded to a
    # narrower dtype at the end, that is configured, or declared as a rounding point.
    evaluated = capabilities.router_dtype or ("float64" if narrow == "float64" else "float32")
    unit = min(UNIT[evaluated], UNIT["float32"])
    error = (x.shape[-1] + 1) * unit * (rows.abs() @ router.abs().T)
    rounded = 0.0 if narrow in ("float32", "float64") else 2 * UNIT[narrow]
    if "router_logits" in capabilities.rounding_points:
        rounded = max(rounded, 2 * UNIT[dtype])
    size = logits.abs()
    if parameters.router_bias is not None:
        # The product may be rounded by itself, before the bias.
        logits = logits + parameters.router_bias.to(of).double()
        size = size + logits.abs()
        error = error + unit * logits.abs()
    error = error + rounded * size
    token_ids = None if given["token_ids"] is None else given["token_ids"].reshape(-1)
    bias = parameters.selection_bias
    return RoutingOracle.of(
        logits,
        config.routing,
        bias,
        token_ids,
        points=frozenset(capabilities.rounding_points),
        router_dtype=capabilities.router_dtype,
        logit_error=error,
        dtype="float64" if narrow == "float64" else dtype,
    )


def _routed_as(
    case: Case, fields: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and weights to judge the output on, and rows where they are certain.

    They are the target's own where it gives them away. Where it does not, they are the oracle's,
    and only rows whose choice no rounding could change are judged.
    """
    oracle = _routing(case)
    tokens, top_k = len(oracle.logits), case["config"].routing.top_k
    if fields.get("expert_ids") is not None and fields.get("weights") is not None:
        ids, weights = fields["expert_ids"], fields["weights"]
        has_form("expert_ids", ids, (tokens, top_k), (torch.int32, torch.int64))
        has_form("weights", weights, (tokens, top_k), (torch.float32, torch.float64))
        return ids, weights, torch.ones(tokens, dtype=torch.bool)
    ids, sure = _chosen(oracle)
    return ids, oracle.weights(ids).value, sure


def _chosen(oracle: RoutingOracle) -> tuple[torch.Tensor, torch.Tensor]:
    """The right ids [T, K], and the rows [T] in which no rounding could change them."""
    table = oracle.config.hash_table
    if table is not None:
        assert oracle.token_ids is not None
        ids = table[oracle.token_ids.long()].long()
        return ids, torch.ones(len(ids), dtype=torch.bool)
    must, may = oracle.certain()
    ids = must.to(torch.int8).topk(oracle.config.top_k, -1).indices
    return ids, (must == may).all(-1)


def _expected(
    case: Case,
    ids: torch.Tensor,
    weights: torch.Tensor,
    own: bool,
    parameters: LayerWeights | None = None,
    config: LayerConfig | None = None,
) -> Spread:
    """The layer's output on these ids and weights."""
    parameters = parameters or case["parameters"]
    config = config or case["config"]
    arithmetic = _arithmetic(case)
    x = case["x"].reshape(-1, case["x"].shape[-1])
    routed = experts_oracle(x, parameters.experts, weights, ids, config.experts, None, arithmetic)
    value, variance = routed.value, routed.sigma.square()
    if not own:
        # The weights are the oracle's: theirs may be off by as much as their bound.
        scored = _routing(case).weights(ids)
        relative = (scored.error / scored.value.abs().clamp_min(1e-300)).amax(-1, keepdim=True)
        size = experts_oracle(
            x, parameters.experts, weights.abs(), ids, config.experts, None, arithmetic
        ).value.abs()
        variance = variance + (relative * (size + value.abs())).square()
    if parameters.shared is not None:
        shared, shared_variance = _shared(x, parameters, config, arithmetic.outside)
        value = value + shared
        variance = variance + shared_variance + arithmetic.variance(value)
    shape = case["x"].shape
    sigma = variance.sqrt().clamp_min(FLOOR[arithmetic.dtype])
    return Spread(value.reshape(shape), sigma.reshape(shape), routed.freedom.reshape(shape[:-1]))


def _shared(
    x: torch.Tensor, parameters: LayerWeights, config: LayerConfig, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    assert parameters.shared is not None
    wide = replace_tensors(parameters.shared, lambda _, tensor: tensor.double())
    plain = dataclasses.replace(config.experts, weight_on="output")
    one, unweighted = torch.zeros(1, dtype=torch.long), x.new_ones(1, len(x), dtype=torch.float64)
    rows = expert_spread(x.double()[None], wide, one, unweighted, plain, arithmetic)
    value, variance = rows.value[0], rows.variance[0] + arithmetic.variance(rows.value[0])
    if parameters.shared_gate is not None:
        logit = x.double() @ parameters.shared_gate.double().T
        size = x.double().abs() @ parameters.shared_gate.double().abs().T
        unit = max(arithmetic.accumulator_unit, arithmetic.unit)
        error = x.shape[-1] * arithmetic.accumulator_unit * size + 2 * unit * (1 + logit.abs())
        gate = logit.sigmoid()
        variance = variance * gate.square() + (value * gate * (1 - gate) * error).square()
        variance = variance + (value * gate * unit).square()
        value = value * gate
    return value * config.shared_scale, variance * config.shared_scale**2 + arithmetic.variance(
        value * config.shared_scale
    )


def _judge(
    case: Case,
    fields: dict[str, Any],
    others: dict[str, dict[str, Any]] | None = None,
    judged: torch.Tensor | None = None,
) -> None:
    """Judge the output, with the usual impostors and layers with other parts.

    Args:
        case: the layer.
        fields: its answer.
        others: wrong layers by name, each as what is different.
        judged: [N, L], the tokens to look at; all of them where there is none.
    """
    ids, weights, sure = _routed_as(case, fields)
    own = fields.get("expert_ids") is not None and fields.get("weights") is not None
    spread = _expected(case, ids, weights, own)
    kept = sure.reshape(case["x"].shape[:-1])
    if judged is not None:
        kept = kept & judged
    case.note("a row left to rounding", not bool(sure.all()))
    case.note("experts from a table", case["config"].routing.hash_table is not None)

    def rule(output: torch.Tensor) -> Closeness:
        return close(
            "output", output[kept], spread.value[kept], spread.sigma[kept], spread.freedom[kept]
        )

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        if not bool(kept.any()):
            return
        scale = telling_scale(spread.value[kept], spread.sigma[kept], spread.freedom[kept])
        for name, value in impostors(spread.value[kept], scale):
            whole = spread.value.clone()
            whole[kept] = value
            yield name, whole
        for name, changed in (others or {}).items():
            value = _expected(case, ids, weights, own, **changed).value
            if not torch.equal(value[kept], spread.value[kept]):
                yield name, value

    case.judge(rule, fields["output"], wrong())


@requirement(
    "LAYER-01",
    MUST,
    "layer",
    "The output MUST be the routed experts' weighted sum for the layer's own ids and weights.",
    reason="The parts can each be right and put together wrong: weights of another token, a router "
    "that sees the residual, a sum in another shape.",
    sources=("DeepSeek-V2 modeling code", "aiter #4451"),
    given=layer_inputs(shared=(False,)),
    references=("layer.layer",),
)
def the_layer_is_its_parts(case: Case) -> None:
    """Judged on the ids and weights that the layer itself reports, where it does."""
    _judge(case, _call(case))


@requirement(
    "LAYER-02",
    MUST,
    "layer",
    "The reported ids and weights MUST be the routing of the router's logits.",
    reason="Losses, load statistics and bias updates are computed from what is reported.",
    sources=("transformers #45315", "torchtitan #1593"),
    given=layer_inputs(router_bias=(False,)),
    references=("layer.layer", "gating.route"),
)
def the_reported_routing_is_that_of_the_logits(case: Case) -> None:
    """Margins for the ids, bounds for the weights; nothing to judge where nothing is reported."""
    fields = _call(case)
    if fields.get("expert_ids") is None or fields.get("weights") is None:
        case.note("nothing reported")
        _judge(case, fields)
        return
    _judge_routing(case, fields)


def _judge_routing(case: Case, fields: dict[str, Any]) -> None:
    ids, weights, _ = _routed_as(case, fields)
    oracle = _routing(case)
    experts = oracle.logits.shape[1]

    def rule(answer: tuple[torch.Tensor, torch.Tensor]) -> None:
        ids, weights = answer
        if bool(((ids < 0) | (ids >= experts)).any()):
            raise Violation(f"expert_ids: expected ids from 0 to {experts - 1}", None, ids)
        oracle.check_ids(ids)
        oracle.check_weights(weights, ids)

    wrong = [("all zeros", (ids, torch.zeros_like(weights))), ("1.1 times", (ids, weights * 1.1))]
    case.judge(rule, (ids, weights), wrong)


@requirement(
    "LAYER-03",
    MUST,
    "layer",
    "The router's bias MUST be part of the logits, and so of the weights.",
    reason="It is easily taken for a selection bias, which only chooses.",
    sources=("torchtitan #2258", "torchtitan #2319", "gpt-oss model code"),
    given=layer_inputs(router_bias=(True,)),
    references=("layer.layer",),
)
def the_router_bias_weighs(case: Case) -> None:
    """As LAYER-02, and as LAYER-01 where nothing is reported."""
    fields = _call(case)
    if fields.get("expert_ids") is None or fields.get("weights") is None:
        _judge(case, fields)
    else:
        _judge_routing(case, fields)


@requirement(
    "LAYER-04",
    MUST,
    "layer",
    "The shared expert MUST see every token and be added once, times `shared_scale` and not times "
    "the routing scale.",
    reason="It was added twice, scaled with the routed part, and left out.",
    sources=("SGLang #28237", "SGLang #35163", "vLLM #49122", "kvcache-ai/sglang#86"),
    # A scale of 0 is one as well, and no scale that was not given.
    given=layer_inputs(shared=(True,), shared_gate=(False,), shared_scale=(1.0, 0.5, 2.5, 0.0)),
    references=("layer.layer",),
)
def the_shared_expert_is_added_once(case: Case) -> None:
    """The impostors leave it out, add it twice, and without its scale."""
    config = case["config"]
    none = dataclasses.replace(case["parameters"], shared=None)
    twice = dataclasses.replace(config, shared_scale=2 * config.shared_scale)
    whole = dataclasses.replace(config, shared_scale=1.0)
    others = {
        "without it": {"parameters": none},
        "twice": {"config": twice},
        "without its scale": {"config": whole},
    }
    _judge(case, _call(case), others)


@requirement(
    "LAYER-05",
    MUST,
    "layer",
    "A shared gate MUST multiply the shared expert's output by the sigmoid of its own product with "
    "x.",
    reason="Loaders drop the gate's one row, and the model goes on with a shared expert of twice "
    "its size.",
    sources=("NousResearch/torchtitan#36", "lmdeploy #3491", "Pai-Megatron #402"),
    given=layer_inputs(shared=(True,), shared_gate=(True,)),
    references=("layer.layer",),
)
def the_shared_gate_is_applied(case: Case) -> None:
    """The impostor has no gate."""
    none = dataclasses.replace(case["parameters"], shared_gate=None)
    _judge(case, _call(case), {"without the gate": {"parameters": none}})


@requirement(
    "LAYER-06",
    MUST,
    "layer",
    "`tokens_per_expert`, where it is reported, MUST count every pair of the reported ids once, "
    "those of padded tokens not at all.",
    reason="The counts steer the bias and enter the loss; with padding in them they follow the "
    "shape of the batch.",
    sources=("torchtitan #1593", "vLLM #38128", "xtuner #2053"),
    given=layer_inputs(),
    references=("layer.layer",),
)
def counts_are_those_of_the_reported_ids(case: Case) -> None:
    """Exact; nothing to judge where nothing is reported."""
    fields = _call(case)
    counts, ids = fields.get("tokens_per_expert"), _reported_ids(case, fields)
    if counts is None or ids is None:
        case.note("nothing reported")
        _judge(case, fields)
        return
    experts = len(case["parameters"].router)
    mask = case["padding_mask"]
    expected = _counted(case, ids, mask)
    case.note("padding", mask is not None and not bool(mask.all()))
    has_form("tokens_per_expert", counts, (experts,), (counts.dtype,))

    def rule(answer: torch.Tensor) -> None:
        equal("tokens_per_expert", answer.double(), expected.double())

    case.judge(
        rule, counts, [("all zeros", torch.zeros_like(expected)), ("one more", expected + 1)]
    )


@requirement(
    "LAYER-07",
    MUST,
    "layer",
    "How tokens are cut into sequences MUST NOT change any token's output.",
    reason="A layer works on tokens; a view in the wrong order mixes sequence and hidden "
    "dimensions and still has the right shape.",
    sources=("DeepSeek-V2 modeling code", "davidmrau #27"),
    given=layer_inputs(shared=(False, True)),
    references=("layer.layer",),
)
def sequences_do_not_matter(case: Case) -> None:
    """The same tokens as one long sequence, judged against the oracle of the whole."""
    x = case["x"]
    one = {
        name: None if case[name] is None else case[name].reshape(1, -1).clone()
        for name in ("token_ids", "padding_mask")
    }
    one["x"] = x.reshape(1, -1, x.shape[-1]).clone()
    fields = _call(case, **one)
    case.inputs.update(one)
    _judge(case, fields)


@requirement(
    "LAYER-08",
    MUST,
    "layer",
    "Zero tokens MUST give an output of x's shape, [N, 0, H] or [0, L, H], and counts of zero.",
    reason="An empty micro-batch is a batch.",
    sources=("DeepSpeed #5066", "Megatron #4851"),
    given=layer_inputs(),
    references=("layer.layer",),
)
def a_layer_without_tokens(case: Case) -> None:
    """The same call with the tokens cut away, then with the sequences."""
    top_k, experts = case["config"].routing.top_k, len(case["parameters"].router)
    names = ("x", "token_ids", "padding_mask")
    per_token = {name: case[name] for name in names if case[name] is not None}
    for cut in (
        {name: tensor[:, :0] for name, tensor in per_token.items()},
        {name: tensor[:0] for name, tensor in per_token.items()},
    ):
        given = {name: case[name] for name in NAMES} | cut
        answer = case.call("layer", **given, layouts={})

        def rule(outputs: Any, answer: Answer = answer, x: torch.Tensor = cut["x"]) -> None:
            fields = _fields(dataclasses.replace(answer, outputs=outputs), x)
            ids, counts = fields.get("expert_ids"), fields.get("tokens_per_expert")
            if ids is not None:
                has_form("expert_ids", ids, (0, top_k), (torch.int32, torch.int64))
            if counts is not None:
                equal("tokens_per_expert", counts.double(), torch.zeros(experts).double())

        case.judge(rule, answer.outputs, [("one token", {"output": case["x"][:1, :1]})])


@requirement(
    "LAYER-18",
    MUST,
    "layer",
    "Without tokens the output MUST carry gradients too, zeros for every parameter.",
    reason="A rank whose micro-batch is empty takes part in the reduction of every parameter, and "
    "the other ranks wait for it.",
    sources=("DeepSpeed #5066", "Megatron #4851", "hyper_parallel x * 0.0"),
    given=differentiable("layer", layer_inputs()),
    references=("layer.layer",),
)
def a_layer_without_tokens_has_gradients(case: Case) -> None:
    """The same call with the tokens cut away: the gradient of all parameters, the router's too."""
    none = {n: case[n][:, :0] for n in ("x", "token_ids", "padding_mask") if case[n] is not None}
    given = {name: case[name] for name in NAMES} | none
    paths = ["x", *_leaves(case["parameters"])]
    cotangents = {"output": torch.zeros_like(none["x"])}
    call = case.planned("layer", wrt=paths, cotangents=cotangents, layouts={}, **given)
    answer = case.session([call])[0]
    _fields(answer, none["x"])
    for path in paths:
        gradient = answer.gradients[path]
        if gradient is None:
            raise Violation(f"gradient of {path}: expected zeros, got None")
        zero = torch.zeros_like(gradient)
        if zero.numel():
            case.judge(equals(f"gradient of {path}", zero), gradient, [("ones", zero + 1)])


NOTICEABLE = 2.0**-10
"""A gradient of this size is far above what any of the dtypes underflows to (float16: 2^-24)."""


def _router_gradient(given: dict[str, Any]) -> torch.Tensor:
    """The gradient of the output's sum by the router, in float64."""
    wide = replace_tensors(given, lambda _, t: t.double() if t.is_floating_point() else t)
    router = wide["parameters"].router.requires_grad_(True)
    [gradient] = torch.autograd.grad(
        reference_layer(**wide).output.sum(), router, allow_unused=True, materialize_grads=True
    )
    return gradient


@requirement(
    "LAYER-09",
    MUST,
    "layer",
    "The router MUST get a gradient from the output whenever the weights depend on it.",
    reason="Detached weights train every part of the layer but the one that decides.",
    sources=("torchtitan #2416", "transformers #48687"),
    given=Given(
        lambda scope: (
            layer_inputs(renormalize=(False,)).plans(scope)
            if "layer" in scope.capabilities.gradients
            else None
        ),
        layer_inputs().build,
    ),
    references=("layer.layer",),
)
def the_router_learns_from_the_output(case: Case) -> None:
    """Not zero and finite; its value is judged through `route` and `experts`."""
    given = {name: case[name] for name in NAMES}
    call = case.planned(
        "layer",
        wrt=["parameters.router"],
        cotangents={"output": torch.ones_like(case["x"])},
        **given,
    )
    answer = case.session([call])[0]
    _fields(answer, case["x"])
    gradient = answer.gradients["parameters.router"]
    if float(_router_gradient(given).abs().max()) < NOTICEABLE:
        case.vacuous.append("the output hardly depends on the router here")

    def rule(found: torch.Tensor | None) -> None:
        if found is None:
            raise Violation("gradient of parameters.router: expected a tensor, got None")
        if not bool(torch.isfinite(found).all()):
            raise Violation("gradient of parameters.router: expected finite values", None, found)
        if not case.vacuous and not bool(found.any()):
            raise Violation("gradient of parameters.router: expected values that are not all 0")

    case.judge(rule, gradient, [("None", None)])


NARROW = ("tf32", "float16", "bfloat16")
SMOOTH = ("silu", "gelu", "gelu_tanh", "relu2")
"""Activations whose slope does not jump."""

TERMS = 2**12
"""More than any sum of a layer's gradient has. So many units of what it is summed in are its error
in the worst case. Legal layers, whose errors are of both signs, stay below 2**6 of them."""

STAGES = 16
"""Results that may be stored one after the other on the way from the output to a gradient, in x's
dtype; and one more for each choice, where these are added up. Legal layers stay below 4 of their
units."""


def _layer_gradients(given: Given) -> Given:
    """The same inputs, for those that give gradients; sums in a narrow dtype have no bound here."""

    def plans(scope: Scope) -> Any:
        capabilities = scope.capabilities
        kept = scope.dtypes
        if capabilities.accumulator in NARROW:
            kept = tuple(dtype for dtype in kept if dtype == "float64")
        if "layer" not in capabilities.gradients or not kept:
            return None
        return given.plans(dataclasses.replace(scope, dtypes=kept))

    return Given(plans, given.build)


def _leaves(parameters: LayerWeights) -> list[str]:
    """Paths of what is trained: everything but the selection bias."""
    paths = [path for path, _ in walk({"parameters": parameters})]
    return [path for path in paths if path != "parameters.selection_bias"]


def _evaluated(case: Case) -> list[str]:
    """What a gradient is computed in: x's dtype, and the router's and experts' where declared."""
    declared = case.scope.capabilities
    own = str(case["x"].dtype).removeprefix("torch.")
    return [own, *(d for d in (declared.router_dtype, declared.experts_dtype) if d in UNIT)]


def _bound(case: Case, size: float, pull: float) -> float:
    """How far a gradient may be off: by its sums, or by what is stored on the way to it.

    Args:
        case: the case.
        size: of the gradient.
        pull: of what is stored on the way and cancels in it.
    """
    dtypes = _evaluated(case)
    stored = STAGES + case["config"].routing.top_k
    summed = [each for each in dtypes if each not in NARROW] or ["float32"]
    by_sums = TERMS * max(UNIT[each] for each in summed) * size
    by_storing = stored * max(UNIT[each] for each in dtypes) * (size + pull)
    return max(by_sums, by_storing) + TERMS * max(TINY[each] for each in dtypes)


def _cotangent(x: torch.Tensor) -> torch.Tensor:
    return Content(x.numel()).normal(*x.shape).to(x.dtype)


def _loss_cotangent(x: torch.Tensor) -> float:
    """What the gradient of the balance loss is multiplied by: never 1, which tells nothing."""
    return (0.5, -1.0, 2.0, 0.0)[int(Content(x.numel()).integers(0, 3, 1))]


OTHER_SIGNS = 3
"""With a few of them hardly a gradient of a single element is small by chance."""


def _largest(gradient: torch.Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0


def _expected_gradients(
    case: Case, paths: list[str], with_loss: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, float]]:
    """Float64 gradients of what the layer returns, the size that each of them is held against, and
    what cancels in it and may have been stored before.

    That is its largest element, of the output's cotangent or of one with other signs, in which what
    happens to cancel does not; for what the router sees, also that of the terms that cancel in it:
    a weight changes with a logit by at most twice itself.
    """
    given = {name: case[name] for name in NAMES}
    wide = replace_tensors(given, lambda _, t: t.double() if t.is_floating_point() else t)
    leaves = dict(walk(wide))
    for path in paths:
        leaves[path].requires_grad_(True)
    # A target may report the loss outside of training too.
    answer = reference_layer(**wide | ({"training": True} if with_loss else {}))
    cotangent = _cotangent(case["x"]).double()
    total = (answer.output * cotangent).sum()
    if with_loss:
        assert answer.balance_loss is not None
        scale = _loss_cotangent(case["x"])
        total = total + scale * answer.balance_loss
    assert answer.weights is not None
    *found, by_weights = torch.autograd.grad(
        total,
        [*(leaves[path] for path in paths), answer.weights],
        allow_unused=True,
        materialize_grads=True,
        retain_graph=True,
    )
    gradients = dict(zip(paths, found, strict=True))
    size = {path: _largest(g) for path, g in gradients.items()}
    content = Content(cotangent.numel())
    for _ in range(OTHER_SIGNS):
        signs = 2 * content.integers(0, 1, *cotangent.shape) - 1
        others = torch.autograd.grad(
            answer.output,
            [leaves[path] for path in paths],
            signs * cotangent,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for path, g in zip(paths, others, strict=True):
            size[path] = max(size[path], _largest(g))
    pull_T = 4 * (by_weights * answer.weights.detach()).abs().sum(-1)
    if with_loss:
        experts = len(case["parameters"].router)
        pull_T = pull_T + 4 * abs(scale) * case["config"].balance.coefficient * experts
    rows = wide["x"].detach().reshape(-1, case["x"].shape[-1]).abs()
    router = wide["parameters"].router.detach().abs()
    size["parameters.router"] += float((pull_T[:, None] * rows).sum(0).max())
    size["x"] += float(pull_T.max()) * float(router.sum(0).max())
    if "parameters.router_bias" in size:
        size["parameters.router_bias"] += float(pull_T.sum())
    pull = dict.fromkeys(paths, 0.0)
    if "parameters.shared_gate" in size:
        pull_T = _pull_of_gate(wide, cotangent)
        pull["parameters.shared_gate"] = float((pull_T[:, None] * rows).sum(0).max())
        gate = wide["parameters"].shared_gate.detach().abs()
        pull["x"] = float(pull_T.max() * gate.max())
    return gradients, size, pull


@torch.no_grad()
def _pull_of_gate(wide: dict[str, Any], cotangent: torch.Tensor) -> torch.Tensor:
    """[T], the gradient of the shared gate's logits, but for the slope that is left of its sigmoid.

    Close to 1 a sigmoid is stored with an error that is larger than its distance from 1.
    """
    x_TH = wide["x"].reshape(-1, wide["x"].shape[-1])
    alone = dataclasses.replace(wide["parameters"], shared_gate=None)
    shared_TH = shared_expert(x_TH, alone, wide["config"])
    open_T1 = torch.sigmoid(x_TH @ wide["parameters"].shared_gate.T)
    return (open_T1 * shared_TH * cotangent.reshape(x_TH.shape)).abs().sum(-1)


@requirement(
    "LAYER-10",
    MUST,
    "layer",
    "Gradients of x and of all parameters MUST be those of the output, and of the balance loss "
    "where it is reported.",
    reason="Parts whose gradients are right are put together with a detached weight, a scale that "
    "is missing on the way back, or a loss without a graph.",
    sources=("torchtitan #2416", "transformers #48687", "NeMo Automodel #1408", "fastmoe #50"),
    given=_layer_gradients(
        layer_inputs(
            router_dtype=("float32", None), activation=SMOOTH, norm=("sum",),
            epsilon=(0.0, 1e-20),
        )
    ),
    references=("layer.layer",),
    kinds=2,
)  # fmt: skip
def gradients_are_those_of_the_whole_layer(case: Case) -> None:
    """Judged where no rounding could have chosen other experts.

    Of 2, 0.5, 0 or -1 times the balance loss, so that one that ignores what comes from above is
    seen.
    """
    paths = ["x", *_leaves(case["parameters"])]
    given = {name: case[name] for name in NAMES}
    x = case["x"]
    cotangents = {"output": _cotangent(x), "balance_loss": torch.tensor(_loss_cotangent(x))}
    call = case.planned("layer", wrt=paths, cotangents=cotangents, **given)
    answer = case.session([call])[0]
    reported = _fields(answer, case["x"]).get("balance_loss") is not None
    with_loss = reported and case["config"].balance is not None
    _, sure = _chosen(_routing(case))
    case.note("with a balance loss", with_loss)
    if not bool(sure.all()):
        case.vacuous.append("a row is left to rounding")
        return
    expected, size, pull = _expected_gradients(case, paths, with_loss)
    case.note(f"dtype {str(x.dtype).removeprefix('torch.')}")
    for path in paths:
        gradient, wanted = answer.gradients[path], expected[path]
        if gradient is None:
            raise Violation(f"gradient of {path}: expected a tensor, got None")
        bound = torch.full_like(wanted, _bound(case, size[path], pull[path]))

        def rule(
            found: torch.Tensor,
            path: str = path,
            wanted: torch.Tensor = wanted,
            bound: torch.Tensor = bound,
        ) -> None:
            within(f"gradient of {path}", found, wanted, bound)

        wrong = [("two bounds added", wanted + 2 * bound)]
        if bool((wanted.abs() > bound).any()):
            wrong += [("all zeros", torch.zeros_like(wanted)), ("twice as much", 2 * wanted)]
        case.judge(rule, gradient, wrong)


@requirement(
    "LAYER-11",
    MUST,
    "layer",
    "The balance loss, where it is reported, MUST be that of the layer's own logits and ids, over "
    "real tokens.",
    reason="The loss is right for the logits it is given: those of a narrower router, of padding, "
    "or of another length of a sequence are other ones.",
    sources=("transformers #45315", "transformers #28505", "Megatron #5798", "TRL #7222"),
    given=layer_inputs(
        training=(True,),
        told=(False, False, True),
        balance=("switch", "deepseek_expert", "deepseek_sequence", "deepseek_device", "gshard"),
    ),
    references=("layer.layer", "load_balancing.balance_loss"),
    kinds=2,
)
def the_balance_loss_is_that_of_the_layers_own_routing(case: Case) -> None:
    """A bound from the errors of the logits; nothing to judge where nothing is reported."""
    fields = _call(case)
    loss, ids = fields.get("balance_loss"), _reported_ids(case, fields)
    if loss is None or ids is None:
        case.note("nothing reported")
        _judge(case, fields)
        return
    has_form("balance_loss", loss, (), (torch.float32, torch.float64))
    mask = case["padding_mask"]
    expected, bound = _expected_loss(case, ids, mask)
    case.note("padding", mask is not None and not bool(mask.all()))

    def rule(found: torch.Tensor) -> None:
        within("balance_loss", found, expected, bound)

    case.judge(rule, loss, impostors(expected, 1.25))


def _expected_loss(
    case: Case, ids: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in float64, and a bound: all of its terms are positive, so relative errors add up.

    A probability is off by its logit's error, by that of exp, by the sum over E and a quotient; a
    mean by the sum over tokens; the shares and the sum over E by E units more.
    """
    balance, oracle = case["config"].balance, _routing(case)
    if balance.loss in SEQUENCE and balance.sequence_length is None:
        balance = dataclasses.replace(balance, sequence_length=case["x"].shape[1])
    mask = None if real is None else real.reshape(-1)
    logits = oracle.logits.clone().requires_grad_(True)
    value = reference_loss(logits, ids.long(), balance, mask)
    [pull] = torch.autograd.grad(value, logits, materialize_grads=True)
    value = value.detach()
    assert oracle.logit_error is not None
    tokens, experts = logits.shape
    reach = float(oracle.logits.abs().max())
    steps = 4 * (C * 2 * reach + C) + 8 * experts + tokens + 64
    # First order in the logits' errors, and the second, whose derivatives are at most the loss.
    moved = (pull.abs() * oracle.logit_error).sum() * 2
    moved = moved + 4 * value * oracle.logit_error.max().square()
    return value, value * steps * oracle.unit + moved + TINY["float32"]


@requirement(
    "LAYER-12",
    MUST,
    "layer",
    "With a hash table every token MUST go to the experts of its own id.",
    reason="The ids take another way through the layer than x: flattened in another order, or "
    "sharded otherwise, they are some other token's.",
    sources=("vLLM #50844", "afd-plugin #301", "DeepSeek-V4 model code"),
    given=layer_inputs(hashed=True),
    references=("layer.layer",),
)
def a_table_leads_each_token_to_its_experts(case: Case) -> None:
    """As LAYER-02; where nothing is reported the output says it."""
    fields = _call(case)
    if fields.get("expert_ids") is None or fields.get("weights") is None:
        case.note("nothing reported")
        _judge(case, fields)
    else:
        _judge_routing(case, fields)


@requirement(
    "LAYER-13",
    MUST,
    "layer",
    "Padded tokens MUST NOT change the output of any other token, nor the counts, whatever they "
    "hold.",
    reason="Padding holds what was in the buffer, and counts steer the bias.",
    sources=("SGLang #30895", "vLLM #38128", "transformers #28505"),
    given=layer_inputs(padding_mask=(True,), least_tokens=2),
    references=("layer.layer",),
)
def what_padding_holds_does_not_matter_to_a_layer(case: Case) -> None:
    """Padded tokens are NaN; every second token is padded."""
    x = case["x"]
    real = torch.arange(x[..., 0].numel()).reshape(x.shape[:2]) % 2 == 0
    filling = 0.0 if case.scope.capabilities.finite_only else torch.nan
    changed = {"x": x.masked_fill(~real[..., None], filling), "padding_mask": real}
    fields = _call(case, **changed)
    counts, ids = fields.get("tokens_per_expert"), _reported_ids(case, fields)
    if counts is not None and ids is not None:
        expected = _counted(case, ids, real)
        has_form("tokens_per_expert", counts, tuple(expected.shape), (counts.dtype,))
        case.judge(
            lambda found: equal("tokens_per_expert", found.double(), expected.double()),
            counts,
            [("one more", expected + 1)],
        )
    _judge(case, fields, judged=real)


@requirement(
    "LAYER-14",
    SHOULD,
    "layer",
    "Arguments of the wrong shape or dtype, a shared gate without a shared expert, a table "
    "without token ids and a token id outside of it SHOULD raise `ValueError` or `TypeError`.",
    reason="Broadcast, they give an output of the right shape.",
    sources=("docs/spec/operations.md", "davidmrau #27", "vLLM #50844"),
    given=layer_inputs(),
    references=("layer.layer",),
)
def bad_arguments_of_a_layer_raise(case: Case) -> None:
    """One argument is wrong at a time."""
    good = {name: case[name] for name in NAMES}
    x, parameters, config = case["x"], case["parameters"], case["config"]
    router, routed = parameters.router, parameters.experts

    def other(**changed: Any) -> dict[str, Any]:
        return {"parameters": dataclasses.replace(parameters, **changed)}

    wider = torch.cat([routed.down, routed.down[..., :1]], 2)
    bad: dict[str, dict[str, Any]] = {
        "x with two dimensions": {"x": x[0]},
        "x of whole numbers": {"x": torch.ones_like(x, dtype=torch.int64)},
        "x with a further column": {"x": torch.cat([x, x[..., :1]], 2)},
        "a router of one expert more": other(router=torch.cat([router, router[:1]])),
        "down of one column more": other(experts=dataclasses.replace(routed, down=wider)),
    }
    if parameters.shared is None:
        bad["a shared gate without a shared expert"] = other(shared_gate=router[:1].clone())
    if parameters.router_bias is not None:
        bad["a router bias with two dimensions"] = other(router_bias=parameters.router_bias[None])
    if parameters.selection_bias is not None and config.routing.hash_table is None:
        # Beside a table nobody has to look at it.
        bad["a selection bias of two dimensions"] = other(selection_bias=router[:1])
    if case["padding_mask"] is not None:
        mask = case["padding_mask"]
        bad["a mask of a token too many"] = {"padding_mask": torch.cat([mask, mask[:, :1]], 1)}
        bad["a mask of floats"] = {"padding_mask": mask.float()}
    if config.routing.hash_table is not None:
        ids = case["token_ids"]
        bad["a table without token ids"] = {"token_ids": None}
        bad["token ids of one dimension"] = {"token_ids": ids.reshape(-1)}
        bad["token ids of a float dtype"] = {"token_ids": ids.double()}
        # What stands at padding may be anything.
        mask = case["padding_mask"]
        at = torch.arange(ids.numel()) if mask is None else mask.flatten().nonzero().flatten()
        if len(at):
            vocabulary = len(config.routing.hash_table)
            late, early = (
                ids.flatten().index_fill(0, i, n).view(ids.shape)
                for i, n in ((at[-1], vocabulary), (at[0], -1))
            )
            bad["a token id past the end of the table"] = {"token_ids": late}
            bad["a token id of -1"] = {"token_ids": early}
    must_raise(case, "layer", good, {name: good | wrong for name, wrong in bad.items()})


def _any_number(given: Given) -> Given:
    """For targets that take what is no number."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


@requirement(
    "LAYER-15",
    MUST,
    "layer",
    "A token that is NaN or infinite MUST NOT change the output of any other token.",
    reason="A scale over all tokens, or a masked sum, carries it to its neighbours.",
    sources=("SGLang #30895", "vLLM #39391", "vLLM #50845"),
    given=_any_number(layer_inputs(least_tokens=2)),
    references=("layer.layer",),
)
def a_broken_token_breaks_no_other_of_a_layer(case: Case) -> None:
    """The first token is NaN, the last infinite; those between are judged."""
    x = case["x"].clone()
    rows = x.view(-1, x.shape[-1])
    rows[0] = torch.nan
    if len(rows) > 2:
        rows[-1] = torch.inf
    _judge(case, _call(case, x=x), judged=x.isfinite().all(-1))


@requirement(
    "LAYER-16",
    MUST,
    "layer",
    "A call on the same storage with other data MUST give the answer to the other data.",
    reason="A cache of the router's choice, or a captured graph, answers the first call again.",
    sources=("KernelBench result_reuse", "SGLang #25852", "vLLM #42821"),
    given=layer_inputs(least_tokens=2),
    references=("layer.layer",),
)
def a_layer_on_the_same_storage_with_other_data(case: Case) -> None:
    """Everything is written over: tokens, their ids and the mask are turned round, experts move one
    row on, and all other parameters change sign, so that what is kept of any of them shows."""
    before = case["parameters"]

    def write(path: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(1, 0) if path.startswith("experts.") else -tensor

    parameters = replace_tensors(before, write)
    tokens = {name: case[name] for name in ("x", "token_ids", "padding_mask")}
    turned = replace_tensors(tokens, lambda _, t: t.flip(1))
    changed = {**turned, "parameters": parameters}
    given = {name: case[name] for name in NAMES}
    first = case.planned("layer", **given)
    second = case.planned("layer", **given | changed, reuse=0)
    _, answer = case.session([first, second])
    case.inputs.update(changed)
    fields = _fields(answer, case["x"])
    stale = dataclasses.replace(parameters, experts=before.experts)
    _judge(case, fields, {"the experts before": {"parameters": stale}})
    if fields.get("expert_ids") is None or fields.get("weights") is None:
        return
    kept: dict[str, dict[str, Any]] = {
        part: {"parameters": dataclasses.replace(parameters, **{part: getattr(before, part)})}
        for part in ("router", "router_bias", "selection_bias")
        if getattr(before, part) is not None
    }
    if given["token_ids"] is not None:
        kept["token_ids"] = {"token_ids": given["token_ids"]}
    _judge_choice(case, fields["expert_ids"].long(), kept)
    if given["padding_mask"] is not None:
        _judge_padding(case, fields, given["padding_mask"])


LEAST_TELLING = 3
"""Tokens that show which call's data the experts were chosen by. A layer that chooses wrongly in a
way of its own, which is LAYER-02's business, would have to go wrong in just this way in each."""


def _judge_choice(case: Case, chosen: torch.Tensor, kept: dict[str, dict[str, Any]]) -> None:
    """What a layer chose is not what it chooses with the same part of the call before.

    Args:
        case: the layer.
        chosen: [T, K], its ids.
        kept: by name, what the call before had.
    """
    right, sure = _chosen(_routing(case))
    right = right.sort().values
    for name, before in kept.items():
        wrong, also_sure = _chosen(_routing(case, **before))
        wrong = wrong.sort().values
        telling = sure & also_sure & (right != wrong).any(-1)
        if int(telling.sum()) < LEAST_TELLING:
            continue

        def rule(
            ids: torch.Tensor,
            name: str = name,
            wrong: torch.Tensor = wrong,
            telling: torch.Tensor = telling,
        ) -> None:
            if torch.equal(ids.sort().values[telling], wrong[telling]):
                raise Violation(f"expert_ids: chosen by the {name} of the call before", right, ids)

        case.judge(rule, chosen, [(f"by the {name} before", wrong)])


def _judge_padding(case: Case, fields: dict[str, Any], before: torch.Tensor) -> None:
    """Counts and loss are not those of the mask of the call before.

    Args:
        case: the layer.
        fields: what it reports.
        before: [N, L], the mask of the call before.
    """
    ids = fields["expert_ids"]
    counts, loss = fields.get("tokens_per_expert"), fields.get("balance_loss")
    right = _counted(case, ids, case["padding_mask"])
    wrong = _counted(case, ids, before)
    if counts is not None and not torch.equal(right, wrong):

        def counted(found: torch.Tensor) -> None:
            if torch.equal(found.double(), wrong.double()):
                name = "tokens_per_expert"
                raise Violation(f"{name}: counted by the mask of the call before", right, found)

        case.judge(counted, counts, [("by the mask before", wrong)])
    if loss is None or case["config"].balance is None:
        return
    expected, bound = _expected_loss(case, ids, case["padding_mask"])
    stale, error = _expected_loss(case, ids, before)
    if (stale - expected).abs() <= bound + error:
        return

    def lost(found: torch.Tensor) -> None:
        if (found.double() - stale).abs() <= error:
            raise Violation("balance_loss: by the mask of the call before", expected, found)

    case.judge(lost, loss, [("by the mask before", stale)])


@requirement(
    "LAYER-17",
    MUST,
    "layer",
    "Router and experts MUST be taken in any float dtype, whatever that of x, and the router "
    "computed in `router_dtype`.",
    reason="A router in float32 beside bfloat16 experts is kept so on purpose: rounded "
    "to x's dtype it chooses other experts.",
    sources=("DeepSeek-V3 model code: fp32 gate", "SGLang #37133", "vLLM #16801"),
    given=layer_inputs(mixed=True),
    references=("layer.layer", "layer.router_logits"),
)
def parts_of_a_layer_have_dtypes_of_their_own(case: Case) -> None:
    """As LAYER-02 where the routing is reported, and as LAYER-01."""
    fields = _call(case)
    case.note("a router wider than x", case["parameters"].router.dtype is not case["x"].dtype)
    if fields.get("expert_ids") is not None and fields.get("weights") is not None:
        _judge_routing(case, fields)
    _judge(case, fields)
