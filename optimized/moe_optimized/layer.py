"""A whole MoE layer: router product, routing, experts, shared expert.

The routed and the shared output are added in float32 and rounded once. The shared expert is an
expert of its own that every token is sent to, with its gate and scale as the weight. Stages:

1. `layer_torch`: routing and products in torch. This is what a CPU user gets.
2. `layer_triton`: a kernel each for the router's product, for routing with counts, for the order of
   the rows, for either product of the experts and for their sum: six launches up to 4096 pairs. A
   few tokens that no backward follows take four, without order and sum. A shared expert adds its
   own four or two, and the sum of both outputs.

Neither waits for the host on a GPU, so a call can be captured in a CUDA graph, and under
`torch.compile` both are whole graphs: what cannot be traced is an operator of `operators`. The one
exception is a hash table: its token ids are read and checked, but not while a graph is captured.

Dimension key: N sequences, L tokens per sequence, T = N·L tokens, H hidden size, E experts,
K experts per token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import LayerConfig, LayerOutput, LayerWeights

from moe_optimized import operators
from moe_optimized.dispatch import accumulation_dtype
from moe_optimized.experts import check_weights, sum_of_experts, sum_of_experts_triton
from moe_optimized.gating import route_with_counts_torch, route_with_counts_triton
from moe_optimized.interpreter import KERNEL_DTYPES, has_kernels
from moe_optimized.load_balancing import balance_loss_torch, balance_loss_triton
from moe_optimized.router import router_logits


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
        config: how the layer computes. A loss that is taken per sequence takes L as the length of
            one where `config.balance` names none.
        token_ids: [N, L], int32 or int64; needed with a hash table.
        padding_mask: [N, L], bool, True = a real token, or None. Padding is computed like any
            other token and left out of the counts.
        training: with True and `config.balance`, the balance loss is computed.

    Returns:
        `output` [N, L, H] in x's dtype, `expert_ids` [T, K], `weights` [T, K],
        `tokens_per_expert` [E] int64, and `balance_loss`, a scalar or None.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a configuration that does
            not fit E.
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
    _check(x, parameters, config, token_ids, padding_mask)
    return _run(x, parameters, config, token_ids, padding_mask, training, _TORCH)


def layer_triton(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    training: bool = False,
) -> LayerOutput:
    """As `layer`, in Triton kernels; no float64."""
    check_tensor("x", x, ("N", "L", "H"), KERNEL_DTYPES)
    _check(x, parameters, config, token_ids, padding_mask)
    means = _TRITON
    if config.router_dtype is torch.float64:
        # Their kernels compute in float32.
        means = _TORCH._replace(experts=_TRITON.experts)
    return _run(x, parameters, config, token_ids, padding_mask, training, means)


class _Means(NamedTuple):
    """The parts of one way to compute a layer."""

    router: Callable[..., torch.Tensor]
    route: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    experts: Callable[..., torch.Tensor]
    balance_loss: Callable[..., torch.Tensor]


_TORCH = _Means(router_logits, route_with_counts_torch, sum_of_experts, balance_loss_torch)


_TRITON = _Means(
    operators.run_router, route_with_counts_triton, sum_of_experts_triton, balance_loss_triton
)


def _run(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    training: bool,
    means: _Means,
) -> LayerOutput:
    tokens = x.reshape(-1, x.shape[2])
    flat_ids = None if token_ids is None else token_ids.reshape(-1)
    real = None if padding_mask is None else padding_mask.reshape(-1)
    dtype = config.router_dtype or x.dtype
    if x.dtype is torch.float64:
        dtype = torch.float64
    logits = means.router(tokens, parameters.router, parameters.router_bias, dtype)
    weights, expert_ids, counts = means.route(
        logits, config.routing, parameters.selection_bias, flat_ids, real
    )
    shared = parameters.shared is not None
    # Two outputs are added before they are rounded.
    wide = accumulation_dtype(x) if shared else x.dtype
    how = config.experts
    total = means.experts(tokens, parameters.experts, weights, expert_ids, how, dtype=wide)
    if shared:
        total = (total + _shared_output(tokens, parameters, config, means)).to(x.dtype)
    loss = None
    if training and config.balance is not None:
        balance = config.balance
        if balance.sequence_length is None:
            balance = replace(balance, sequence_length=max(x.shape[1], 1))
        loss = means.balance_loss(logits, expert_ids, balance, real)
    return LayerOutput(
        output=total.view(x.shape),
        expert_ids=expert_ids,
        weights=weights,
        balance_loss=loss,
        tokens_per_expert=counts,
    )


def _shared_output(
    tokens: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    means: _Means,
) -> torch.Tensor:
    T = tokens.shape[0]
    wide = accumulation_dtype(tokens)
    weights = tokens.new_full((T, 1), config.shared_scale, dtype=wide)
    if parameters.shared_gate is not None:
        gate = router_logits(tokens, parameters.shared_gate, None, wide)
        weights = weights * torch.sigmoid(gate)
    everyone = torch.zeros(T, 1, dtype=torch.int32, device=tokens.device)
    how = replace(config.experts, weight_on="output")
    return means.experts(tokens, parameters.shared, weights, everyone, how, dtype=wide)


def _check(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
) -> None:
    check_tensor("x", x, ("N", "L", "H"), FLOATS)
    N, L, H = x.shape
    if token_ids is not None:
        check_tensor("token_ids", token_ids, (N, L), IDS)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (N, L), (torch.bool,))
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
