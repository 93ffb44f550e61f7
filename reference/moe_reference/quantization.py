r"""Quantisation: weights of 4 or 8 bits, what they stand for, and how they are made from floats.

$$ w = \mathrm{value}(q) \cdot \text{scale} \quad (- \text{ a minimum}) $$

Every format is a way to say `value`, how many weights share a scale, and where the bits stand. The
families stand in files of their own:

- `integer_quantization`: uint4b8, uint8b128, uint4, with groups and act-order
- `float8`: e4m3, with a scale per tensor, channel or block
- `float4`: mxfp4 and nvfp4
- `gguf_blocks`: Q8_0, Q8_1, Q4_K
- `gptq_packing`, `awq_packing`, `marlin_layout`, `marlin_float8`: where checkpoints and kernels
  put the same bits

`quantized_tensors` says what a `QuantizedTensor` of each format holds.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in).
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_reference.config import ExpertWeights
from moe_reference.expert_slicing import has_gate
from moe_reference.float4 import dequantize_float4, quantize_mxfp4, quantize_nvfp4
from moe_reference.float8 import dequantize_e4m3, quantize_e4m3
from moe_reference.gguf_blocks import dequantize_gguf, quantize_gguf
from moe_reference.integer_quantization import dequantize_integer, quantize_integer
from moe_reference.quantized_checks import check_format
from moe_reference.quantized_tensors import FORMATS as FORMATS
from moe_reference.quantized_tensors import INTEGER_BITS, FormatName
from moe_reference.quantized_tensors import QuantizedExperts as QuantizedExperts
from moe_reference.quantized_tensors import QuantizedTensor as QuantizedTensor

DEQUANTIZE: dict[str, Callable[[QuantizedTensor], torch.Tensor]] = {
    **dict.fromkeys(INTEGER_BITS, dequantize_integer),
    "e4m3": dequantize_e4m3,
    **dict.fromkeys(("mxfp4", "nvfp4"), dequantize_float4),
    **dict.fromkeys(("Q8_0", "Q8_1", "Q4_K"), dequantize_gguf),
}
"""What reads a format."""


def dequantize(packed: QuantizedTensor) -> torch.Tensor:
    """The weights that a packed tensor stands for, whatever its format.

    Args:
        packed: the codes and what belongs to them.

    Returns:
        [E, O, D], float32, or float64 where the scales are float64. Each weight is the exact value
        of its code, scales and zero point, rounded once.

    Raises:
        TypeError: not a `QuantizedTensor`, or a part has the wrong dtype.
        ValueError: an unknown format, or parts that do not fit it or each other.

    >>> weight = torch.tensor([[[-4.0, 3.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    >>> dequantize(quantize(weight, "uint4b8", group_size=8)).flatten().tolist()[:3]
    [-4.0, 3.5, 0.5]
    """
    if not isinstance(packed, QuantizedTensor):
        raise TypeError(f"packed: expected a QuantizedTensor, got {type(packed).__name__}")
    check_format("packed.format", packed.format)
    return DEQUANTIZE[packed.format](packed)


def quantize(weight: torch.Tensor, format: FormatName, **options: Any) -> QuantizedTensor:
    """Weights packed, each code the nearest to its weight.

    Args:
        weight: [E, O, D], any float dtype, finite.
        format: the name of the format.
        options: `group_size`, `g_idx` and `scale_dtype` of the integer formats, `granularity`
            and `block_size` of e4m3. The others have none.

    Raises:
        TypeError: an argument has the wrong dtype, or an option that the format does not have.
        ValueError: an unknown format, a weight that is not finite, or a size that the format
            cannot hold.

    >>> quantize(torch.ones(2, 3, 64), "mxfp4").packed.shape
    torch.Size([2, 3, 32])
    """
    check_format("format", format)
    if format in INTEGER_BITS:
        return quantize_integer(weight, format, **options)
    if format == "e4m3":
        return quantize_e4m3(weight, **options)
    if options:
        raise TypeError(f"options: expected none with {format}, got {', '.join(options)}")
    if format == "mxfp4":
        return quantize_mxfp4(weight)
    if format == "nvfp4":
        return quantize_nvfp4(weight)
    return quantize_gguf(weight, format)


def quantize_experts(
    experts: ExpertWeights, format: FormatName, **options: Any
) -> QuantizedExperts:
    """Experts packed as they are loaded: both matrices, biases as they are.

    Gate and up are quantised together as one matrix: with a scale per tensor they share it.

    Args:
        experts: weights of E experts, any float dtype, finite.
        format: the name of the format.
        options: those of `quantize`, for both matrices. A `g_idx` is of one matrix: with it, use
            `quantize` for each.

    Raises:
        TypeError: not `ExpertWeights` of float tensors, or a wrong option.
        ValueError: the weights do not fit each other, or the format cannot hold them.

    >>> experts = ExpertWeights(torch.ones(1, 2, 32), torch.ones(1, 32, 32)[:, :, :1])
    >>> quantize_experts(experts, "e4m3", granularity="channel").down.scales.shape
    torch.Size([1, 32, 1])
    """
    has_gate(experts)
    return QuantizedExperts(
        quantize(experts.gate_up, format, **options),
        quantize(experts.down, format, **options),
        experts.gate_up_bias,
        experts.down_bias,
    )


def packed_bytes(packed: QuantizedTensor) -> int:
    """How many bytes all parts of a packed tensor take.

    Args:
        packed: the codes and what belongs to them; no shapes are checked.

    >>> packed_bytes(quantize(torch.ones(1, 2, 64), "mxfp4"))
    68
    """
    parts = (packed.packed, packed.scales, packed.zeros, packed.g_idx, packed.global_scale)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
