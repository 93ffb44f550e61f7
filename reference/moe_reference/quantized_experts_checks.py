"""Checks of quantised experts: do the packed matrices, biases and scales belong together?

Dimension key: E experts, H hidden size, I intermediate size, J = 2I (I without a gate), B columns
of a group.
"""

from typing import get_args

import torch

from moe_reference.checks import check_tensor
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import (
    ActivationFormatName,
    QuantizedExperts,
    QuantizedTensor,
)


def check_quantized_experts(experts: object, name: str = "experts") -> None:
    """Raise unless the parts of packed experts fit each other.

    Args:
        experts: what came; `is_k_full` is checked against the groups of `down`.
        name: the argument's name, as its caller knows it.

    Raises:
        TypeError: not `QuantizedExperts`, or a part has the wrong dtype.
        ValueError: a part has the wrong shape, or a group lacks columns though `is_k_full` is True.

    >>> check_quantized_experts(3)
    Traceback (most recent call last):
    TypeError: experts: expected QuantizedExperts, got int
    """
    if not isinstance(experts, QuantizedExperts):
        raise TypeError(f"{name}: expected QuantizedExperts, got {type(experts).__name__}")
    check_quantized(f"{name}.gate_up", experts.gate_up)
    check_quantized(f"{name}.down", experts.down)
    # The columns of gate_up are never cut: H is whole on every rank.
    _check_full_groups(f"{name}.gate_up", experts.gate_up, "whatever is_k_full says of down")
    if experts.is_k_full:
        _check_full_groups(f"{name}.down", experts.down, "since is_k_full is True")
    _check_shapes(name, experts)
    E = experts.down.shape[0]
    format = experts.activation_format
    if format is not None and format not in get_args(ActivationFormatName):
        choices = ", ".join(map(repr, get_args(ActivationFormatName)))
        raise ValueError(f"{name}.activation_format: expected one of {choices}, got {format!r}")
    if experts.activation_scales is not None:
        scales = experts.activation_scales
        check_tensor(f"{name}.activation_scales", scales, (E, 2), (torch.float32,))
        if format not in ("int8", "e4m3"):
            raise ValueError(
                f"{name}.activation_scales: expected None unless activation_format is 'int8' or "
                f"'e4m3', got a tensor with {format!r}"
            )
    if format == "e4m3_block" and -1 in (experts.gate_up.group_size, experts.down.group_size):
        raise ValueError(
            f"{name}.activation_format: expected weights with blocks for 'e4m3_block', got a "
            f"group_size of -1"
        )


def _check_full_groups(name: str, tensor: QuantizedTensor, why: str) -> None:
    if tensor.g_idx is None:
        return
    assert tensor.scales is not None
    B = tensor.shape[2] if tensor.group_size == -1 else tensor.group_size
    for g_idx in tensor.g_idx[:, : tensor.shape[2]].to(torch.int64):
        counts = torch.bincount(g_idx, minlength=tensor.scales.shape[2])
        if bool((counts != B).any()):
            raise ValueError(
                f"{name}.g_idx: expected {B} columns in each of {len(counts)} groups, {why}, "
                f"got {counts.min()} to {counts.max()}"
            )


def _check_shapes(name: str, experts: QuantizedExperts) -> None:
    E, H, I = experts.down.shape
    if experts.gate_up.shape not in ((E, 2 * I, H), (E, I, H)):
        raise ValueError(
            f"{name}.gate_up.shape: expected {(E, 2 * I, H)}, or {(E, I, H)} without a gate, which "
            f"fits down, got {experts.gate_up.shape}"
        )
    if experts.gate_up_bias is not None:
        J = experts.gate_up.shape[1]
        check_tensor(f"{name}.gate_up_bias", experts.gate_up_bias, (E, J))
    if experts.down_bias is not None:
        check_tensor(f"{name}.down_bias", experts.down_bias, (E, H))
