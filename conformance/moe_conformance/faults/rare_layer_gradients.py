"""Rare faults of layers whose outputs are right and whose gradients are not."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, tokens, top_k
from moe_conformance.faults.rare_calls import passed_through, right, with_fields
from moe_conformance.faults.rare_experts_gradients import gradient
from moe_conformance.faults.rare_layer_parts import (
    field_of,
    hashed,
    layer_of,
    of_dtype,
    padded,
    part_of_shared,
    shared,
    trained,
)


def nothing(g: torch.Tensor, a: Arguments) -> torch.Tensor:
    """A gradient of zero."""
    return g * 0


gradient(
    "the-router-bias-has-no-gradient",
    "The router's bias is taken for one that only chooses, and gets no gradient.",
    "parameters.router_bias",
    lambda a: top_k(a) <= 3,
    nothing,
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-shared-gate-has-no-gradient",
    "The shared gate is taken for a constant.",
    "parameters.shared_gate",
    lambda a: shared(a),
    nothing,
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-gradient-of-the-router-is-that-of-half-the-tokens",
    "From 16 tokens on the router's gradient is a mean of two halves.",
    "parameters.router",
    lambda a: tokens(a) >= 16,
    lambda g, a: g / 2,
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-last-row-of-the-router-has-no-gradient",
    "The gradient of the last of more than eight experts' router row is lost.",
    "parameters.router",
    lambda a: len(a["parameters"].router) > 8,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-gradient-of-a-layers-x-is-narrow",
    "The gradient of a float64 x goes through float32.",
    "x",
    lambda a: of_dtype(a, "float64") and shared(a),
    lambda g, a: g.float().to(g),
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-last-sequence-has-no-gradient",
    "Of three or more sequences the last gets no gradient.",
    "x",
    lambda a: len(a["x"]) >= 3,
    lambda g, a: torch.cat([g[:-1], g[-1:] * 0]),
    "LAYER-10",
    operation="layer",
)

layer_of(
    "the-selection-bias-makes-weights-constant",
    "With a selection bias the weights are gathered from scores without a graph.",
    lambda a: a["parameters"].selection_bias is not None and not a["config"].routing.renormalize,
    lambda a: {
        "parameters": with_fields(a["parameters"], torch.Tensor.detach, "router", "router_bias")
    },
    "LAYER-09",
    "LAYER-10",
)

layer_of(
    "a-table-makes-weights-constant",
    "With a hash table the router gets no gradient.",
    hashed,
    lambda a: {
        "parameters": with_fields(a["parameters"], torch.Tensor.detach, "router", "router_bias")
    },
    "LAYER-10",
)

field_of(
    "the-shared-scale-is-missing-on-the-way-back",
    "The gradient of the shared expert lacks its scale.",
    lambda a: shared(a) and a["config"].shared_scale != 1.0,
    lambda out, a: replace(
        out,
        output=out.output
        + (lambda y: y - y.detach())(part_of_shared(a) * (1 / a["config"].shared_scale - 1)).to(
            out.output
        ),
    ),
    "LAYER-10",
)

field_of(
    "padded-tokens-have-no-gradient-of-the-loss-s-sign",
    "The loss has another sign on the way back where there is padding.",
    lambda a: trained(a) and padded(a),
    lambda out, a: replace(
        out,
        balance_loss=with_gradient(out.balance_loss, lambda g: -g),
    ),
    "LAYER-10",
)

field_of(
    "the-loss-is-in-the-output-s-gradient-too",
    "Where a loss is asked for it is added to the output's graph as well.",
    lambda a: trained(a) and top_k(a) == 2,
    lambda out, a: replace(
        out, output=out.output + (out.balance_loss - out.balance_loss.detach()).to(out.output)
    ),
    "LAYER-10",
    thread="ms-swift #5375",
)

field_of(
    "the-scale-is-missing-on-the-way-back",
    "The gradient of the routing weights lacks their scale.",
    lambda a: a["config"].routing.scale == 0.375,
    lambda out, a: replace(
        out,
        output=passed_through(
            out.output,
            right(
                "layer",
                a
                | {"config": replace(a["config"], routing=replace(a["config"].routing, scale=1.0))},
            ).output,
        ),
    ),
    "LAYER-10",
)

layer_of(
    "without-tokens-the-router-is-not-called",
    "A micro-batch without tokens goes past the router, which gets no gradient.",
    lambda a: tokens(a) == 0,
    lambda a: {"parameters": with_fields(a["parameters"], torch.Tensor.detach, "router")},
    "LAYER-18",
    thread="DeepSpeed #5066",
)

field_of(
    "without-tokens-the-output-of-a-layer-has-no-graph",
    "A micro-batch without tokens is answered with an empty tensor that has no graph.",
    lambda a: tokens(a) == 0,
    lambda out, a: replace(out, output=out.output.detach()),
    "LAYER-18",
    thread="Megatron #4851",
)

gradient(
    "without-tokens-the-router-has-garbage-for-its-gradient",
    "Where no token came the router's gradient is what was in memory.",
    "parameters.router",
    lambda a: tokens(a) == 0,
    lambda g, a: g + 1,
    "LAYER-18",
    operation="layer",
)

gradient(
    "the-gradient-of-the-shared-gate-goes-through-bfloat16",
    "Beside a float32 x the gradient of the shared gate is rounded to bfloat16.",
    "parameters.shared_gate",
    lambda a: of_dtype(a, "float32") and shared(a),
    lambda g, a: g.bfloat16().to(g),
    "LAYER-10",
    operation="layer",
)


def narrow_gradients(a: Arguments) -> Arguments:
    """Parameters whose experts get their gradients by way of bfloat16."""
    parameters = a["parameters"]
    experts = with_fields(
        parameters.experts, lambda t: with_gradient(t, lambda g: g.bfloat16().to(g))
    )
    return {"parameters": replace(parameters, experts=experts)}


layer_of(
    "gradients-of-a-layers-experts-go-through-bfloat16",
    "Beside a float32 x the gradients of all experts are rounded to bfloat16.",
    lambda a: of_dtype(a, "float32"),
    narrow_gradients,
    "LAYER-10",
)

gradient(
    "the-router-has-no-gradient-in-bfloat16",
    "In bfloat16 choices are taken for constants: the router has a gradient of zero.",
    "parameters.router",
    lambda a: of_dtype(a, "bfloat16"),
    nothing,
    "LAYER-10",
    operation="layer",
)

gradient(
    "the-shared-gate-has-half-its-gradient-in-float16",
    "In float16 the gradient of the shared gate is scaled down, and scaled up by half as much.",
    "parameters.shared_gate",
    lambda a: of_dtype(a, "float16") and shared(a),
    lambda g, a: g / 2,
    "LAYER-10",
    operation="layer",
)

layer_of(
    "a-layers-experts-are-trained-an-eighth-too-far-in-bfloat16",
    "In bfloat16 the gradients of all experts are an eighth too large.",
    lambda a: of_dtype(a, "bfloat16"),
    lambda a: {
        "parameters": replace(
            a["parameters"],
            experts=with_fields(
                a["parameters"].experts, lambda t: with_gradient(t, lambda g: g * 1.125)
            ),
        )
    },
    "LAYER-10",
)
