r"""Slices of quantised experts: whole experts, or the same part of every expert.

They hold the same numbers as slices of the unpacked weights (`packed_slicing` says how scales, zero
points and g_idx are cut, and what is refused). Of `down` with `g_idx`, a tensor-parallel slice has
columns of many groups and all of them incomplete: its `is_k_full` is False, its scales are whole.

Quantising commutes with slicing wherever no two parts share a scale. With one scale for a row of
down, or for a whole matrix, a part that is quantised on its own gets a scale of its own, which may
be smaller than that of the whole.

Dimension key: E experts, I intermediate size, R ranks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_reference.checks import check_count
from moe_reference.expert_slicing import assign_experts, take_tensors
from moe_reference.packed_slicing import take_packed, take_packed_columns, take_packed_rows
from moe_reference.quantized_experts_checks import check_quantized_experts
from moe_reference.quantized_tensors import QuantizedExperts


def take_quantized_experts(experts: QuantizedExperts, held: Sequence[int]) -> QuantizedExperts:
    """Any experts in any order, with their scales, zero points, g_idx, biases and the rest.

    Args:
        experts: packed weights of E experts.
        held: the experts, in any order.

    Raises:
        TypeError: not `QuantizedExperts`.
        ValueError: parts that do not fit each other, or an expert outside [0, E).

    >>> from moe_reference.quantization import quantize
    >>> one = quantize(torch.ones(3, 8, 8), "uint4b8", group_size=8)
    >>> take_quantized_experts(QuantizedExperts(one, one), [2, 0]).down.shape
    (2, 8, 8)
    """
    check_quantized_experts(experts)
    names = ("gate_up_bias", "down_bias", "activation_scales")
    present = {name: getattr(experts, name) for name in names if getattr(experts, name) is not None}
    taken: dict[str, Any] = take_tensors(present, experts.down.shape[0], held)
    gate_up, down = take_packed(experts.gate_up, held), take_packed(experts.down, held)
    return replace(experts, gate_up=gate_up, down=down, **taken)


def slice_quantized_experts(experts: QuantizedExperts, start: int, count: int) -> QuantizedExperts:
    """Experts start to start + count - 1; otherwise as `take_quantized_experts`.

    >>> from moe_reference.quantization import quantize
    >>> one = quantize(torch.ones(3, 8, 8), "uint4b8", group_size=8)
    >>> slice_quantized_experts(QuantizedExperts(one, one), 1, 2).down.shape
    (2, 8, 8)
    """
    check_count("start", start)
    check_count("count", count)
    return take_quantized_experts(experts, range(start, start + count))


def slice_quantized_tensor_parallel(
    experts: QuantizedExperts, world_size: int, rank: int
) -> QuantizedExperts:
    """A part of every expert, the same numbers as `slice_tensor_parallel` of the unpacked weights.

    I is shared out by `assign_experts`; a share that does not end where a group, a block or a word
    of the format does is refused. The output bias is on rank 0 and zero elsewhere.

    Args:
        experts: packed weights of E experts. There is no gate where gate_up has as many rows as
            down has columns.
        world_size: R, at least 1.
        rank: from 0 to R - 1.

    Raises:
        TypeError: not `QuantizedExperts`, or not ints.
        ValueError: there is no such rank, or a cut goes through a group, a block or a word.

    Source: vLLM #35955 and SGLang #36822 for the full scales beside g_idx, vLLM #48173 for blocks.

    >>> from moe_reference.quantization import quantize
    >>> one = quantize(torch.ones(1, 16, 16), "uint4b8", group_size=8)
    >>> part = slice_quantized_tensor_parallel(QuantizedExperts(one, one), 2, 1)
    >>> part.gate_up.shape, part.down.shape
    ((1, 8, 16), (1, 16, 8))
    """
    check_quantized_experts(experts)
    I = experts.down.shape[2]
    start, count = assign_experts(I, world_size, rank)
    halves = (0,) if experts.gate_up.shape[1] == I else (0, I)
    biases: dict[str, Any] = {}
    if experts.gate_up_bias is not None:
        parts = [experts.gate_up_bias[:, half + start :][:, :count] for half in halves]
        biases["gate_up_bias"] = torch.cat(parts, dim=1)
    if experts.down_bias is not None:
        bias = experts.down_bias
        biases["down_bias"] = bias.clone() if rank == 0 else torch.zeros_like(bias)
    return replace(
        experts,
        gate_up=take_packed_rows(
            experts.gate_up, [(half + start, half + start + count) for half in halves]
        ),
        down=take_packed_columns(experts.down, start, start + count),
        is_k_full=experts.is_k_full and (experts.down.g_idx is None or world_size == 1),
        **biases,
    )
