"""The functions of `quantized_experts` as operators of torch, made as those of `operators` are.

| operator | what it is |
|---|---|
| `experts_quantized_torch`, `experts_quantized_torch_backward` | the way of torch |
| `experts_quantized_triton` | the kernels, without a gradient |
| `dequantize`, `dequantize_torch`, `dequantize_triton` | unpacking, without a gradient |
| `refuse` | an error when the graph runs |

A schema has no place for `QuantizedExperts`: they are taken apart in front of an operator and put
together in it. Arguments are checked there, so they are with every call.

Dimension key: T tokens, H hidden size, E experts, O rows of a matrix (out), D columns of a matrix
(in), K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from moe_reference.config import ExpertsConfig
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_optimized import quantized_experts
from moe_optimized.compiling import make_operator, make_operators, stands_for
from moe_optimized.operators import EXPERTS_FIELDS, how_experts, listed
from moe_optimized.quantized_layout import PreparedExperts, PreparedMatrix

Tensor = torch.Tensor

# A packed matrix as it is, or in the layout of the kernels, which has two numbers more.
_MATRIX = (
    "str {0}format, Tensor {0}packed, Tensor? {0}scales, Tensor? {0}zeros, Tensor? {0}columns, "
    "Tensor? {0}global_scale, int[] {0}numbers"
)


def _parts(matrix: QuantizedTensor | PreparedMatrix) -> tuple[Any, ...]:
    if isinstance(matrix, QuantizedTensor):
        tensors = (matrix.scales, matrix.zeros, matrix.g_idx, matrix.global_scale)
        numbers = [matrix.group_size, *matrix.shape]
        return matrix.format, *map(_detached, (matrix.packed, *tensors)), numbers
    tensors = (matrix.scales, matrix.zeros, matrix.columns, None)
    numbers = [matrix.depth, matrix.share, matrix.block or 0, *matrix.shape]
    return matrix.codes, *map(_detached, (matrix.packed, *tensors)), numbers


def _detached(part: Tensor | None) -> Tensor | None:
    # No part of what is packed has a gradient, and an operator that gets one that wants it asks for
    # a backward.
    return None if part is None else part.detach()


def _matrix(*parts: Any) -> QuantizedTensor | PreparedMatrix:
    *tensors, global_scale, numbers = parts
    *how, E, O, D = numbers
    if len(how) == 1:
        return QuantizedTensor(*tensors, global_scale, *how, shape=(E, O, D))
    depth, share, block = how
    return PreparedMatrix(*tensors, depth, share, block or None, (E, O, D))


def _fake_dequantize(format: str, packed: Tensor, scales: Tensor | None, *rest: Any) -> Tensor:
    known = scales is not None and scales.dtype is torch.float64
    dtype = torch.float64 if known else torch.float32
    return packed.new_empty(rest[-1][1:], dtype=dtype)


make_operators(
    quantized_experts,
    "dequantize",
    _MATRIX.format(""),
    "Tensor",
    _fake_dequantize,
    run=lambda function: lambda *parts: function(_matrix(*parts)),
    stand_in=lambda operator: lambda packed: operator(*_parts(packed)),
)

_PACKED = (
    "Tensor x, Tensor weights, Tensor? gate_up_bias, Tensor? down_bias, Tensor expert_ids, "
    f"Tensor? expert_map, {_MATRIX.format('gate_up_')}, {_MATRIX.format('down_')}, "
    "str? activation_format, Tensor? activation_scales, bool is_k_full, "
    f"{listed(EXPERTS_FIELDS)}"
)


def _how_packed(
    experts: QuantizedExperts | PreparedExperts, config: ExpertsConfig
) -> tuple[Any, ...]:
    """The rest of the arguments, after the tensors that are not packed."""
    activations = (experts.activation_format, _detached(experts.activation_scales))
    # Prepared, nobody asks any more.
    is_k_full = getattr(experts, "is_k_full", True)
    parts = (*_parts(experts.gate_up), *_parts(experts.down), *activations, is_k_full)
    return (*parts, *how_experts(config))


def _packed_experts(
    gate_up_bias: Tensor | None, down_bias: Tensor | None, how: Sequence[Any]
) -> tuple[QuantizedExperts | PreparedExperts, ExpertsConfig]:
    gate_up, down = _matrix(*how[:7]), _matrix(*how[7:14])
    activation_format, activation_scales, is_k_full = how[14:17]
    config = ExpertsConfig(*how[17:])
    parts = (gate_up, down, gate_up_bias, down_bias)
    if isinstance(down, PreparedMatrix):
        return PreparedExperts(*parts, activation_format, activation_scales), config
    return QuantizedExperts(*parts, is_k_full, activation_format, activation_scales), config


def _raise(x: Tensor, reason: str) -> Tensor:
    raise ValueError(reason)


# Whether somebody wants a gradient is known while a graph is made, where errors have other types.
_refuse = make_operator("refuse", "Tensor x, str reason", "Tensor", _raise)
_refuse.register_fake(lambda x, reason: x.new_empty(x.shape))


def _packed_operator(function: Callable[..., Any]) -> Any:
    def run(
        x: Tensor,
        weights: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        expert_ids: Tensor,
        expert_map: Tensor | None,
        *how: Any,
    ) -> Tensor:
        experts, config = _packed_experts(gate_up_bias, down_bias, how)
        return function(x, experts, weights, expert_ids, config, expert_map)

    operator = make_operator(function.__name__, _PACKED, "Tensor", run)
    operator.register_fake(lambda x, *_: x.new_empty(x.shape))

    @stands_for(function)
    def stand_in(
        x: Tensor,
        experts: QuantizedExperts | PreparedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        if operator is experts_quantized_triton:
            reason = quantized_experts.refusal_of_gradient(x, experts, weights)
            if reason is not None:
                return _refuse(x.detach(), reason)
        leaves = (x, weights, experts.gate_up_bias, experts.down_bias)
        return operator(*leaves, expert_ids, expert_map, *_how_packed(experts, config))

    return operator


def _packed_backward(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_ids: Tensor,
    expert_map: Tensor | None,
    *how: Any,
) -> list[Tensor]:
    experts, config = _packed_experts(gate_up_bias, down_bias, how)
    grads = quantized_experts.gradients(
        grad, x, experts, weights, expert_ids, config, expert_map, needs
    )
    return [gradient for gradient in grads if gradient is not None]


def _setup_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    # Packed weights among them, which nobody writes to.
    ctx.how = inputs[6:]


def _differentiate_packed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    grads = iter(_run_packed_backward(grad, list(needs), *ctx.saved_tensors, *ctx.how))
    found = [next(grads) if wanted else None for wanted in needs]
    return (*found, *[None] * (2 + len(ctx.how)))


experts_quantized_torch = _packed_operator(quantized_experts.experts_quantized_torch)
experts_quantized_triton = _packed_operator(quantized_experts.experts_quantized_triton)
_run_packed_backward = make_operator(
    "experts_quantized_torch_backward",
    f"Tensor grad, bool[] needs, {_PACKED}",
    "Tensor[]",
    _packed_backward,
)
_run_packed_backward.register_fake(
    lambda grad, needs, *leaves: [
        t.new_empty(t.shape) for t, needed in zip(leaves, needs, strict=False) if needed
    ]
)
experts_quantized_torch.register_autograd(_differentiate_packed, setup_context=_setup_packed)
