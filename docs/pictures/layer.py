"""Pictures of the whole layer, drawn from what the reference computes."""

import dataclasses

import torch
from moe_reference.activations import feed_forward, one_by_one
from moe_reference.config import ExpertsConfig, ExpertWeights, LayerConfig, RoutingConfig
from moe_reference.config import LayerWeights as Weights
from moe_reference.gating import route, scores
from moe_reference.layer import layer, router_logits, shared_expert

from pictures.svg import LABEL, ROW, box, figure, label, numbers

FILLED = 0.5
X = torch.tensor([[[1.0, 0.5]]])
PARAMETERS = Weights(
    router=torch.tensor([[1.0, 0.4], [-1.0, 0.2], [0.5, 1.6], [0.2, 0.2]]),
    router_bias=torch.tensor([0.0, 0.0, 0.3, -0.5]),
    experts=ExpertWeights(
        gate_up=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[2.0, 2.0]], [[1.0, 1.0]]]),
        down=torch.tensor([[[2.0], [0.0]], [[1.0], [1.0]], [[0.0], [1.0]], [[1.0], [0.0]]]),
    ),
    shared=ExpertWeights(
        gate_up=torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        down=torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]),
    ),
    shared_gate=torch.tensor([[1.0, -0.5]]),
)
CONFIG = LayerConfig(
    RoutingConfig(top_k=2, renormalize=True, scale=1.5), ExpertsConfig("relu", gated=False)
)


def one_token() -> str:
    """One token through router, routed experts and the shared expert."""
    x = X[0]
    logits = router_logits(x, PARAMETERS, CONFIG)
    score = scores(logits, CONFIG.routing.score)[0]
    found = layer(X, PARAMETERS, CONFIG)
    assert found.expert_ids is not None
    assert found.weights is not None
    ids, weights = found.expert_ids[0].tolist(), found.weights[0].tolist()
    outputs = [feed_forward(x, one, CONFIG.experts)[0] for one in one_by_one(PARAMETERS.experts)]
    routed = sum(weight * outputs[e] for e, weight in zip(ids, weights, strict=True))
    shared = shared_expert(x, PARAMETERS, CONFIG)[0]
    assert torch.allclose(routed + shared, found.output[0, 0])
    E, cell = len(score), 105
    parts = [label(0, "x"), box(0, 0, E, _vector(x[0]), 0.0, cell=cell)]
    y = ROW
    for name, texts, shade in [
        ("expert", [str(e) for e in range(E)], None),
        ("logits, bias included", numbers(logits[0]), None),
        ("scores = softmax", numbers(score), score),
    ]:
        parts.append(label(y, name, "italic" if name == "expert" else "normal"))
        for e, text in enumerate(texts):
            opacity = 0.0 if shade is None else 0.75 * float(shade[e])
            parts.append(box(e, y, 1, text, opacity, framed=name != "expert", cell=cell))
        y += ROW
    parts.append(label(y, "weights"))
    parts.append(label(y + ROW, "expert output"))
    for e, weight in zip(ids, weights, strict=True):
        parts.append(box(e, y, 1, f"{weight:.2f}", 0.0, marked=True, cell=cell))
        parts.append(box(e, y + ROW, 1, _vector(outputs[e]), FILLED, colour=0, cell=cell))
    y += 2.4 * ROW
    assert PARAMETERS.shared_gate is not None
    gate = float(torch.sigmoid(x @ PARAMETERS.shared_gate.T))
    [shared_one] = one_by_one(PARAMETERS.shared)
    plain = feed_forward(x, shared_one, CONFIG.experts)[0]
    for name, text, colour in [
        ("routed, weighed", _vector(routed), 0),
        ("shared, gated", f"{gate:.2f} · {_vector(plain)} = {_vector(shared)}", 1),
    ]:
        parts.append(label(y, name))
        parts.append(box(0, y, E, text, FILLED, colour=colour, cell=cell))
        y += ROW
    parts.append(label(y, "output"))
    parts.append(box(0, y, E, _vector(found.output[0, 0]), 0.0, marked=True, cell=cell))
    reading = (
        f"One token of two numbers, {E} experts, K = {len(ids)}. Experts {ids[0]} and {ids[1]} are "
        f"chosen; their weights sum to {sum(weights):.2f}, the routing scale. The shared expert "
        f"sees the token too, and its gate lets {gate:.2f} of it through. The output is the sum of "
        "both."
    )
    return figure(y + ROW, "".join(parts), reading)


def scales() -> str:
    """What the routing scale and the scale of the shared expert multiply."""
    doubled = dataclasses.replace(CONFIG.routing, scale=2 * CONFIG.routing.scale)
    rows = [
        ("as above", CONFIG),
        ("twice the routing scale", dataclasses.replace(CONFIG, routing=doubled)),
        ("shared_scale = 2", dataclasses.replace(CONFIG, shared_scale=2.0)),
    ]
    parts, unit = [], 100.0
    for line, (name, config) in enumerate(rows):
        y = line * ROW
        output = layer(X, PARAMETERS, config).output[0, 0, 0]
        shared = shared_expert(X[0], PARAMETERS, config)[0, 0]
        routed = output - shared
        parts.append(label(y, name))
        parts.append(box(0, y, float(routed), f"routed {routed:.2f}", FILLED, colour=0, cell=unit))
        parts.append(
            box(float(routed), y, float(shared), f"shared {shared:.2f}", FILLED, colour=1,
                cell=unit)
        )  # fmt: skip
        at = LABEL + float(output) * unit + 8
        parts.append(f'<text x="{at}" y="{y + 22}" fill="currentColor">= {output:.2f}</text>')
    reading = (
        "The first number of the output, as a sum. The routing scale multiplies the routed part "
        "only, shared_scale the shared part only. Doubling a scale must not double the output."
    )
    return figure(len(rows) * ROW, "".join(parts), reading)


def router_dtype() -> str:
    """A token whose choice the dtype of the router's product decides."""
    x = torch.ones(1, 1)
    router = torch.tensor([[3.001], [3.007], [3.004], [1.0]])
    parameters = dataclasses.replace(
        PARAMETERS, router=router, router_bias=None, shared=None, shared_gate=None
    )
    config = LayerConfig(RoutingConfig(top_k=1))
    parts = [label(0, "expert", "italic")]
    E, cell = len(router), 90
    parts += [box(e, 0, 1, str(e), 0.0, framed=False, cell=cell) for e in range(E)]
    chosen = []
    for line, dtype in enumerate((torch.float32, torch.bfloat16), 1):
        logits = router_logits(x, parameters, dataclasses.replace(config, router_dtype=dtype))
        _, ids = route(logits, config.routing)
        chosen.append(int(ids))
        parts.append(label(line * ROW, f"logits, {str(dtype).removeprefix('torch.')}"))
        for e, logit in enumerate(logits[0].tolist()):
            took = e == chosen[-1]
            parts.append(
                box(e, line * ROW, 1, f"{logit:.3f}", FILLED * took, marked=took, cell=cell)
            )
    reading = (
        f"One token, K = 1, the same weights. In float32 expert {chosen[0]} has the greatest "
        f"logit. In bfloat16 {int((logits == logits.max()).sum())} of them are equal, and the "
        f"lowest id, {chosen[1]}, is chosen. "
        "Casting the logits to float32 afterwards does not bring the difference back."
    )
    return figure(3 * ROW, "".join(parts), reading)


def _vector(values: torch.Tensor) -> str:
    return f"[{', '.join(numbers(values))}]"
