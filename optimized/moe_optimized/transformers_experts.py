"""The fast experts inside a model of Hugging Face transformers.

    from moe_optimized.transformers_experts import use_fast_experts
    use_fast_experts(model)

transformers (5.20 or newer) calls a function by name for the experts of every MoE model that has
stacked weights. This module registers one, `moespec`. Checkpoints, routers and everything else of
the model stay what they are, and `model.set_experts_implementation("grouped_mm")` switches back.

What a class of experts computes is not written down anywhere, but for its code. So it is recognised
by what it does: its gate is called on a few numbers and compared with every activation there is
here. A class whose gate is none of them is refused, and so is a norm behind the experts.

gpt-oss stores the rows of gate and up in turns. They are taken apart in every call while gradients
are wanted; in evaluation the copy is kept, as long as the parameters are not written to. A write
through `.data` goes unnoticed: call the model's `train()` and run it once, or switch again.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import math
from typing import Any

import torch
from moe_reference.config import ExpertsConfig, ExpertWeights
from torch import nn

from moe_optimized.activations import activate
from moe_optimized.experts import experts

NAME = "moespec"
"""Under which name transformers knows the fast experts."""


def use_fast_experts(model: Any) -> Any:
    """Let a loaded model compute its experts by `moe_optimized.experts`.

    Args:
        model: a `PreTrainedModel` with experts that transformers can switch.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: it has no such experts, or some that compute what there is no configuration for.
    """
    register()
    modules = [module for module in model.modules() if _is_switchable(module)]
    if not modules:
        raise ValueError(
            f"model: expected one whose experts transformers can switch, got {type(model).__name__}"
        )
    for module in modules:
        _remember(module)
    model.set_experts_implementation(NAME)
    # transformers passes over a model whose source it cannot read.
    if any(module.config._experts_implementation != NAME for module in modules):
        raise ValueError(
            f"model: expected one whose experts transformers switches, got {type(model).__name__}"
        )
    return model


def register() -> None:
    """Make `experts_implementation="moespec"` known to transformers, for `from_pretrained` too."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fast_experts_forward)


def fast_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls as the forward of a module of experts.

    Args:
        self: the module.
        hidden_states: [T, H].
        top_k_index: [T, K]; an id that is not here contributes nothing.
        top_k_weights: [T, K].

    Returns:
        [T, H], the dtype of the hidden states.
    """
    config = getattr(self, "_moespec_config", None)
    if config is None:
        if torch.compiler.is_compiling():
            raise ValueError(
                "model: expected use_fast_experts(model) or one call before torch.compile, "
                "got neither"
            )
        config = _remember(self)
    weights = _weights_of(self)
    return experts(hidden_states, weights, top_k_weights, top_k_index, config)


def recognise(module: nn.Module) -> ExpertsConfig:
    """The configuration that computes what a module of experts of transformers computes.

    Args:
        module: of a class that is decorated with `use_experts_implementation`.

    Raises:
        ValueError: there is none.
    """
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"model: expected experts without a norm, got {name}")
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"model: expected experts that are all on this rank, got part of {name}")
    numbers = [getattr(module, field, None) for field in ("alpha", "limit", "swiglu_limit")]
    alpha, *limits = (float(n) if isinstance(n, int | float) else math.nan for n in numbers)
    # From 0.3 to 1000 in size, past any limit of a published model; every gate with every up.
    points = torch.linspace(-7.6, 7.6, 24, dtype=torch.float32, device="cpu").sinh()
    gate, up = torch.meshgrid(points, points, indexing="ij")
    pre = torch.cat([gate, up], dim=1) if module.has_gate else gate
    with torch.no_grad():
        if not module.has_gate:
            expected = module.act_fn(pre)
        elif module.is_concatenated:
            expected = module._apply_gate(pre)
        else:
            expected = module._apply_gate(torch.stack([gate, up], dim=-1).flatten(1))
    candidates = [
        ExpertsConfig(activation, gated=module.has_gate)
        for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    ]
    if module.has_gate:
        for limit in limits:
            if limit > 0:
                candidates.append(ExpertsConfig("swiglu_limit", limit=limit))
                if not math.isnan(alpha):
                    candidates.append(ExpertsConfig("swigluoai", alpha=alpha, limit=limit))
    for config in candidates:
        # Far below the difference of any two, whatever the order of operations.
        if torch.allclose(activate(pre, config), expected, rtol=1e-5, atol=1e-5):
            return config
    raise ValueError(f"model: expected experts with a known activation, got those of {name}")


def _is_switchable(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")


def _remember(module: nn.Module) -> ExpertsConfig:
    module._moespec_config = recognise(module)
    module._moespec_weights = None
    return module._moespec_config


def _weights_of(module: nn.Module) -> ExpertWeights:
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = getattr(module, prefix), module.down_proj
    gate_up_bias = getattr(module, f"{prefix}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if module.is_concatenated or not module.has_gate:
        return ExpertWeights(gate_up, down, gate_up_bias, down_bias)

    keeps = not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    if not keeps:
        if not torch.compiler.is_compiling():
            module._moespec_weights = None
        return _taken_apart(gate_up, down, gate_up_bias, down_bias)
    stored = [t for t in (gate_up, down, gate_up_bias, down_bias) if t is not None]
    state = [(t.data_ptr(), t._version, t.dtype) for t in stored]
    if module._moespec_weights is None or module._moespec_weights[0] != state:
        module._moespec_weights = state, _taken_apart(gate_up, down, gate_up_bias, down_bias)
    return module._moespec_weights[1]


def _taken_apart(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> ExpertWeights:
    """The rows of gate before those of up, where they were stored in turns."""
    gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
    if gate_up_bias is not None:
        gate_up_bias = torch.cat([gate_up_bias[:, ::2], gate_up_bias[:, 1::2]], dim=1)
    return ExpertWeights(gate_up, down, gate_up_bias, down_bias)
