"""Requirements on `layer`: the router's product, the routed experts, the shared one, together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference.config import LayerConfig, LayerWeights
from moe_reference.layer import layer as reference_layer

from moe_conformance.case import Answer, Case
from moe_conformance.codec import replace_tensors
from moe_conformance.experts_oracle import Spread, expert_spread, experts_oracle
from moe_conformance.inputs.given import Given
from moe_conformance.inputs.layer import layer_inputs
from moe_conformance.judge import Closeness, Violation, close, equal, has_form, impostors
from moe_conformance.precision import FLOOR, UNIT, Arithmetic
from moe_conformance.registry import MUST, requirement
from moe_conformance.routing_oracle import RoutingOracle

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


def _arithmetic(case: Case) -> Arithmetic:
    return Arithmetic.of(case.scope.capabilities, str(case["x"].dtype).removeprefix("torch."))


def _routing(case: Case) -> RoutingOracle:
    """The routing of the layer's own logits, with the error that computing them makes."""
    parameters: LayerWeights = case["parameters"]
    config: LayerConfig = case["config"]
    x = case["x"].reshape(-1, case["x"].shape[-1]).double()
    router = parameters.router.double()
    logits = x @ router.T
    capabilities = case.scope.capabilities
    dtype = str(case["x"].dtype).removeprefix("torch.")
    # A worst case bound: every order of H products, each rounded. Where the product is rounded to a
    # narrower dtype at the end, that is declared as a rounding point.
    evaluated = capabilities.router_dtype or ("float64" if dtype == "float64" else "float32")
    unit = min(UNIT[evaluated], UNIT["float32"])
    error = (x.shape[-1] + 1) * unit * (x.abs() @ router.abs().T)
    if parameters.router_bias is not None:
        logits = logits + parameters.router_bias.double()
        error = error + unit * logits.abs()
    if "router_logits" in capabilities.rounding_points:
        error = error + 2 * UNIT[dtype] * logits.abs()
    bias = parameters.selection_bias
    return RoutingOracle.of(
        logits,
        config.routing,
        bias,
        points=frozenset(capabilities.rounding_points),
        router_dtype=capabilities.router_dtype,
        logit_error=error,
        dtype=dtype,
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
    must, may = oracle.certain()
    ids = must.to(torch.int8).topk(top_k, -1).indices
    return ids, oracle.weights(ids).value, (must == may).all(-1)


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
        shared, shared_variance = _shared(x, parameters, config, arithmetic)
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
    rows = expert_spread(x.double(), wide, 0, torch.ones(len(x)).double(), plain, arithmetic)
    value, variance = rows.value, rows.variance + arithmetic.variance(rows.value)
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
    case: Case, fields: dict[str, Any], others: dict[str, dict[str, Any]] | None = None
) -> None:
    """Judge the output, with the usual impostors and layers with other parts."""
    ids, weights, sure = _routed_as(case, fields)
    own = fields.get("expert_ids") is not None and fields.get("weights") is not None
    spread = _expected(case, ids, weights, own)
    kept = sure.reshape(case["x"].shape[:-1])
    case.note("a row left to rounding", not bool(sure.all()))

    def rule(output: torch.Tensor) -> Closeness:
        return close(
            "output", output[kept], spread.value[kept], spread.sigma[kept], spread.freedom[kept]
        )

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        if not bool(kept.any()):
            return
        for name, value in impostors(spread.value[kept]):
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
    given=layer_inputs(shared=(True,), shared_gate=(False,)),
    references=("layer.layer",),
)
def the_shared_expert_is_added_once(case: Case) -> None:
    """The impostors leave it out and add it twice."""
    config = case["config"]
    none = dataclasses.replace(case["parameters"], shared=None)
    twice = dataclasses.replace(config, shared_scale=2 * config.shared_scale)
    _judge(case, _call(case), {"without it": {"parameters": none}, "twice": {"config": twice}})


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
    "`tokens_per_expert`, where it is reported, MUST count every pair of the reported ids once.",
    reason="The counts steer the bias and enter the loss.",
    sources=("torchtitan #1593", "vLLM #38128", "xtuner #2053"),
    given=layer_inputs(),
    references=("layer.layer",),
)
def counts_are_those_of_the_reported_ids(case: Case) -> None:
    """Exact; nothing to judge where nothing is reported."""
    fields = _call(case)
    counts, ids = fields.get("tokens_per_expert"), fields.get("expert_ids")
    if counts is None or ids is None:
        case.note("nothing reported")
        _judge(case, fields)
        return
    experts = len(case["parameters"].router)
    expected = torch.bincount(ids.long().flatten(), minlength=experts)
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
    long = x.reshape(1, -1, x.shape[-1]).clone()
    fields = _call(case, x=long)
    case.inputs["x"] = long
    _judge(case, fields)


@requirement(
    "LAYER-08",
    MUST,
    "layer",
    "Zero tokens MUST give an output of shape [N, 0, H].",
    reason="An empty micro-batch is a batch.",
    sources=("DeepSpeed #5066", "Megatron #4851"),
    given=layer_inputs(),
    references=("layer.layer",),
)
def a_layer_without_tokens(case: Case) -> None:
    """The same call with the tokens cut away."""
    x = case["x"][:, :0]
    given = {name: case[name] for name in NAMES} | {"x": x}
    answer = case.call("layer", **given, layouts={})

    def rule(outputs: Any) -> None:
        _fields(dataclasses.replace(answer, outputs=outputs), x)

    case.judge(rule, answer.outputs, [("one token", {"output": case["x"][:, :1]})])


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
