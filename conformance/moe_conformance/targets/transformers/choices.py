"""What most families of transformers take; a family changes single fields."""

from __future__ import annotations

from typing import Any

BACKENDS = ("eager", "batched_mm", "grouped_mm")

# `ACT2FN` in transformers/activations.py, reached through `config.hidden_act`. The experts classes
# would take its other entries too, but the specification has no names for them.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

Choice = dict[str, tuple[Any, ...]]

COMMON_EXPERTS: Choice = {
    "activation": tuple(ACTIVATIONS),
    # `use_experts_implementation` marks these classes has_gate=True, has_bias=False, and every
    # forward multiplies the expert's output: transformers/integrations/moe.py.
    "gated": (True,),
    "bias": (False,),
    "weight_on": ("output",),
    "expert_map": (False, True),
    "invalid_ids": (False, True),
}
COMMON_LAYER: Choice = {
    # The block returns its output; the loss is the causal model's business (`balance_loss`).
    "balance": (None,),
    "shared": (False,),
    "shared_gate": (False,),
    "shared_scale": (1.0,),
    "router_bias": (False,),
    # `F.linear(hidden_states, self.weight)` in the router: the product is in x's dtype.
    "router_dtype": (None,),
}
