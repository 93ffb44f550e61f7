"""The experts of a layer: products over rows in expert order.

Each way to compute them has its own module, with its stages and what each gains:

1. `experts_cpu`: a product per expert. This is what a CPU user gets.
2. `experts_torch`: grouped products of torch, for a GPU without Triton and for float64 on one; and
   the batched experts.
3. `experts_triton`: the forward in Triton kernels. Between forward and backward it keeps x, the
   pre-activation and the tile table.
4. `experts_decode`: the forward of a few tokens that no backward follows, in two launches.
5. `experts_backward`: the backward in Triton kernels, from what 3 keeps alone.

Here stand the functions that a user calls, what they check, and the graph that joins 3 and 5.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
C rows of a batched expert.
"""

from dataclasses import fields
from typing import Any

import torch
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized import operators
from moe_optimized.alignment import TileTable, check_map, check_tokens
from moe_optimized.autograd import once
from moe_optimized.dispatch import accumulation_dtype
from moe_optimized.experts_backward import Needs, run_backward
from moe_optimized.experts_decode import run_without_backward
from moe_optimized.experts_torch import batched_experts
from moe_optimized.experts_triton import Shapes, run_forward
from moe_optimized.interpreter import KERNEL_DTYPES, has_kernels


def experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, with the fastest means of x's device.

    Args:
        x: [T, H], any float dtype.
        experts: weights of E experts, any float dtype.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64; an id that is not here contributes nothing.
        config: how one expert computes.
        expert_map: [global experts], each one's row in `experts` or -1, or None.

    Returns:
        [T, H], x's dtype, differentiable in x, weights and every tensor of `experts`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    run = experts_triton if has_kernels(x) else experts_torch
    return run(x, experts, weights, expert_ids, config, expert_map)


def experts_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """Each expert's output for its own rows, unweighted.

    Args:
        x: [E, C, H], any float dtype; rows past an expert's count may hold anything.
        tokens_per_expert: [E], int32 or int64.
        experts: weights of E experts.
        config: how one expert computes; `weight_on` plays no part.

    Returns:
        [E, C, H], x's dtype; rows past an expert's count are zero.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape. Counts are checked on a CPU
            only, and not in a compiled call.
    """
    run = experts_batched_triton if has_kernels(x) else experts_batched_torch
    return run(x, tokens_per_expert, experts, config)


def experts_torch(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, in products of torch.

    Gradients can be taken once: a gradient of theirs raises RuntimeError.
    """
    check_experts(x, experts, weights, expert_ids, config, expert_map)
    return sum_of_experts(x, experts, weights, expert_ids, config, expert_map, x.dtype)


def sum_of_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`experts_torch` on checked arguments, in the dtype that the caller goes on with.

    Args:
        x: as in `experts`, and so are all but the last.
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        dtype: of the result; None takes float32 (float64 for float64 x).

    Returns:
        [T, H], `dtype`.
    """
    dtype = dtype or accumulation_dtype(x)
    on_cpu = x.device.type == "cpu"
    operator = operators.experts_cpu if on_cpu else operators.experts_grouped
    return operators.run_experts(
        operator, x, experts, weights, expert_ids, config, expert_map, dtype
    )


def experts_batched_torch(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """As `experts_batched`, in batched products of torch."""
    check_batched(x, tokens_per_expert, experts, config)
    return batched_experts(x, tokens_per_expert, experts, config)


def experts_triton(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, in Triton kernels, forward and backward; float64 is not supported.

    Gradients can be taken once: a gradient of theirs raises RuntimeError.
    """
    check_tensor("x", x, ("T", "H"), KERNEL_DTYPES)
    check_experts(x, experts, weights, expert_ids, config, expert_map)
    return sum_of_experts_triton(x, experts, weights, expert_ids, config, expert_map, x.dtype)


def sum_of_experts_triton(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    shapes: Shapes | None = None,
) -> torch.Tensor:
    """`experts_triton` on checked arguments, in the dtype that the caller goes on with.

    Args:
        x: as in `experts`, and so are all but the last two.
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        dtype: of the result. Its gradient is rounded to x's dtype, which loses nothing where the
            result is rounded to that in the end.
        shapes: the tiles of the products; None looks them up, or takes none for a few tokens.

    Returns:
        [T, H], `dtype`.
    """
    if torch.compiler.is_compiling():
        # Elsewhere the graph below: it keeps the tile table, which has no fixed size.
        operator = operators.experts_triton
        return operators.run_experts(
            operator, x, experts, weights, expert_ids, config, expert_map, dtype
        )
    tensors = [x, weights, *(getattr(experts, field.name) for field in fields(experts))]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Experts.apply(*tensors, expert_ids, config, expert_map, dtype, shapes)
    given = (x, experts, weights, expert_ids, config, expert_map)
    if shapes is None:
        return run_without_backward(*given, dtype)
    return run_forward(*given, shapes, dtype, False)[0]


def experts_batched_triton(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """As `experts_batched`, in the same kernels: every row is a token with one expert, or none."""
    check_tensor("x", x, ("E", "C", "H"), KERNEL_DTYPES)
    check_batched(x, tokens_per_expert, experts, config)
    E, C, H = x.shape
    ids = torch.arange(E, device=x.device)[:, None].expand(E, C)
    in_use = torch.arange(C, device=x.device) < tokens_per_expert[:, None]
    ids = torch.where(in_use, ids, -1).view(E * C, 1)
    ones = torch.ones(E * C, 1, dtype=torch.float32, device=x.device)
    rows = sum_of_experts_triton(x.reshape(E * C, H), experts, ones, ids, config, dtype=x.dtype)
    return rows.view(E, C, H)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None,
        dtype: torch.dtype,
        shapes: Shapes | None,
    ) -> torch.Tensor:
        experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
        out, pre, tiles = run_forward(
            x, experts, weights, expert_ids, config, expert_map, shapes, dtype, True
        )
        ctx.save_for_backward(
            x, weights, gate_up, down, gate_up_bias, down_bias, pre, *vars(tiles).values()
        )
        ctx.config, ctx.shapes = config, shapes
        return out

    @staticmethod
    @once("experts_triton")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, *tensors, pre, order, place, experts, first, rows = ctx.saved_tensors
        grads = run_backward(
            grad,
            x,
            pre,
            ExpertWeights(*tensors),
            weights,
            TileTable(order, place, experts, first, rows),
            ctx.config,
            ctx.shapes,
            Needs(*ctx.needs_input_grad[:6]),
        )
        return (*grads, None, None, None, None, None)


def check_experts(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
) -> None:
    """Raise on arguments that `experts` cannot take."""
    check_tensor("x", x, ("T", "H"), FLOATS)
    check_tensor("weights", weights, (x.shape[0], "K"), FLOATS)
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_weights(experts, x.shape[1], config)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, ("E",), IDS)
        # A compiled call cannot look at the map here; the operators do.
        if not torch.compiler.is_compiling():
            check_map(expert_map, experts.down.shape[0])


def check_batched(
    x: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> None:
    """Raise on arguments that `experts_batched` cannot take."""
    check_tensor("x", x, ("E", "C", "H"), FLOATS)
    check_weights(experts, x.shape[2], config)
    if experts.down.shape[0] != x.shape[0]:
        raise ValueError(f"x: expected E = {experts.down.shape[0]} experts, got {x.shape[0]}")
    check_tensor("tokens_per_expert", tokens_per_expert, (x.shape[0],), IDS)
    if not torch.compiler.is_compiling():
        check_tokens(tokens_per_expert, x.shape[1])


def check_weights(
    experts: ExpertWeights, hidden: int, config: ExpertsConfig, name: str = "experts"
) -> None:
    """Raise unless the weights fit each other, H and the configuration."""
    if not isinstance(config, ExpertsConfig):
        raise TypeError(f"config: expected an ExpertsConfig, got {type(config).__name__}")
    check_tensor(f"{name}.down", experts.down, ("E", hidden, "I"), FLOATS)
    E, _, I = experts.down.shape
    J = 2 * I if config.gated else I
    check_tensor(f"{name}.gate_up", experts.gate_up, (E, J, hidden), FLOATS)
    if experts.gate_up_bias is not None:
        check_tensor(f"{name}.gate_up_bias", experts.gate_up_bias, (E, J), FLOATS)
    if experts.down_bias is not None:
        check_tensor(f"{name}.down_bias", experts.down_bias, (E, hidden), FLOATS)
