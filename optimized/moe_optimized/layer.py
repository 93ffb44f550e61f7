"""A whole MoE layer: router product, routing, experts, shared expert.

The routed and the shared output are added in float32 and rounded once. The shared expert is an
expert of its own that every token is sent to, with its gate and scale as the weight. Stages:

1. `layer_torch`: routing and grouped products in torch. This is what a CPU user gets.
2. `layer_triton`: the kernels of `gating` and `experts` around the router's product.

Auxiliary losses are not computed here: `balance_loss` is always None.

Dimension key: N sequences, L tokens per sequence, T = N·L tokens, H hidden size, E experts,
K experts per token.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import LayerConfig, LayerOutput, LayerWeights

from moe_optimized.dispatch import accumulation_dtype, count_tokens
from moe_optimized.experts import check_weights, sum_of_experts, sum_of_experts_triton
from moe_optimized.gating import route_torch, route_triton
from moe_optimized.interpreter import KERNEL_DTYPES, has_kernels


def layer(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    training: bool = False,
) -> LayerOutput:
    """Run the layer with the fastest means of x's device.

    Args:
        x: [N, L, H], any float dtype.
        parameters: router, experts and shared expert.
        config: how the layer computes; `balance` only where `training` is False.
        token_ids: [N, L], int32 or int64; needed with a hash table.
        padding_mask: [N, L], bool, True = a real token, or None. Padding is computed like any
            other token and left out of the counts.
        training: whether this is the forward of a training step.

    Returns:
        `output` [N, L, H] in x's dtype, `expert_ids` [T, K], `weights` [T, K],
        `tokens_per_expert` [E] int64, and no balance loss.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a balance loss asked for.
    """
    run = layer_triton if has_kernels(x) else layer_torch
    return run(x, parameters, config, token_ids, padding_mask, training)


def layer_torch(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    training: bool = False,
) -> LayerOutput:
    """As `layer`, in whole-tensor torch operations."""
    _check(x, parameters, config, token_ids, padding_mask, training)
    return _run(x, parameters, config, token_ids, padding_mask, route_torch, sum_of_experts)


def layer_triton(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    training: bool = False,
) -> LayerOutput:
    """As `layer`, in Triton kernels and one product of torch, the router's; no float64."""
    check_tensor("x", x, ("N", "L", "H"), KERNEL_DTYPES)
    _check(x, parameters, config, token_ids, padding_mask, training)
    # The routing kernel computes in float32, which a router in float64 asks not to.
    route = route_torch if config.router_dtype is torch.float64 else route_triton
    return _run(x, parameters, config, token_ids, padding_mask, route, sum_of_experts_triton)


def _run(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    route: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    run_experts: Callable[..., torch.Tensor],
) -> LayerOutput:
    tokens = x.reshape(-1, x.shape[2])
    flat_ids = None if token_ids is None else token_ids.reshape(-1)
    logits = _router_logits(tokens, parameters, config)
    weights, expert_ids = route(logits, config.routing, parameters.selection_bias, flat_ids)
    total = run_experts(tokens, parameters.experts, weights, expert_ids, config.experts)
    if parameters.shared is not None:
        total = total + _shared_output(tokens, parameters, config, run_experts)

    counted = expert_ids
    if padding_mask is not None:
        counted = torch.where(padding_mask.reshape(-1, 1), expert_ids, -1)
    return LayerOutput(
        output=total.to(x.dtype).view(x.shape),
        expert_ids=expert_ids,
        weights=weights,
        tokens_per_expert=count_tokens(counted, parameters.router.shape[0]),
    )


def _router_logits(
    tokens: torch.Tensor, parameters: LayerWeights, config: LayerConfig
) -> torch.Tensor:
    dtype = config.router_dtype or tokens.dtype
    if tokens.dtype is torch.float64:
        dtype = torch.float64
    # Rounded to the router's dtype before and after, but multiplied and added in a wide one: a sum
    # in bfloat16 changes experts.
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    bias = parameters.router_bias
    return F.linear(
        tokens.to(dtype).to(wide),
        parameters.router.to(dtype).to(wide),
        None if bias is None else bias.to(dtype).to(wide),
    ).to(dtype)


def _shared_output(
    tokens: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    run_experts: Callable[..., torch.Tensor],
) -> torch.Tensor:
    T = tokens.shape[0]
    wide = accumulation_dtype(tokens)
    weights = tokens.new_full((T, 1), config.shared_scale, dtype=wide)
    if parameters.shared_gate is not None:
        gate = F.linear(tokens.to(wide), parameters.shared_gate.to(wide))
        weights = weights * torch.sigmoid(gate)
    everyone = torch.zeros(T, 1, dtype=torch.int64, device=tokens.device)
    how = replace(config.experts, weight_on="output")
    return run_experts(tokens, parameters.shared, weights, everyone, how)


def _check(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    training: bool,
) -> None:
    check_tensor("x", x, ("N", "L", "H"), FLOATS)
    N, L, H = x.shape
    if token_ids is not None:
        check_tensor("token_ids", token_ids, (N, L), IDS)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (N, L), (torch.bool,))
    if training and config.balance is not None:
        raise ValueError("balance: expected None, no balance loss is computed here, got a config")
    check_tensor("parameters.router", parameters.router, ("E", H), FLOATS)
    E = parameters.router.shape[0]
    for name in ("router_bias", "selection_bias"):
        bias = getattr(parameters, name)
        if bias is not None:
            check_tensor(f"parameters.{name}", bias, (E,), FLOATS)
    for name, weights, count in (
        ("experts", parameters.experts, E),
        ("shared", parameters.shared, 1),
    ):
        if weights is not None:
            check_weights(weights, H, config.experts, f"parameters.{name}")
            if weights.down.shape[0] != count:
                raise ValueError(
                    f"parameters.{name}: expected {count} experts, got {weights.down.shape[0]}"
                )
    if parameters.shared_gate is not None:
        check_tensor("parameters.shared_gate", parameters.shared_gate, (1, H), FLOATS)
        if parameters.shared is None:
            raise ValueError("parameters.shared_gate: expected None without a shared expert")
