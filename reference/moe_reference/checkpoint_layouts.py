"""Checkpoint layouts: one linear layer of a quantised checkpoint, as a `QuantizedTensor`.

What stands behind a layer's name is told by `quantization_config` of `config.json`:

| `quant_method` | tensors | read as |
|---|---|---|
| `gptq` | `qweight`, `qzeros`, `scales`, `g_idx` | uint4b8, uint8b128, uint4 |
| `awq` | `qweight`, `qzeros`, `scales` | uint4 |
| `fp8` | `weight` float8_e4m3fn, `weight_scale_inv` or `weight_scale` | e4m3 |
| `compressed-tensors` | see `compressed_layouts` | |

Gate, up and down of every expert are such layers. gpt-oss, `mxfp4`, has stacks of all experts
instead: `gate_up_proj_blocks` uint8 [E, O, G, 16] and `gate_up_proj_scales` uint8 [E, O, G], out
before in, the gate's rows and up's in turn.

Dimension key: E experts (1 for one layer), O rows of a matrix (out), D columns of a matrix (in),
G groups of columns.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_reference.awq_packing import from_awq
from moe_reference.checkpoint_parts import Config, Tensors, read_float8, read_tensor, setting
from moe_reference.checks import check_tensor
from moe_reference.compressed_layouts import compressed_activations, read_compressed
from moe_reference.gptq_packing import ZeroPoints, from_gptq
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import ActivationFormatName, QuantizedTensor


def read_linear(
    tensors: Tensors, name: str, config: Config, zero_points: ZeroPoints | None = None
) -> QuantizedTensor:
    """One linear layer out of a quantised checkpoint, E = 1.

    Args:
        tensors: by name; only the layer's own are read.
        name: the layer's, without a dot behind.
        config: the checkpoint's `quantization_config`.
        zero_points: the convention of GPTQ's; None takes that of `checkpoint_format`.

    Returns:
        [1, O, D]. Parts may share memory with the tensors.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape, or the configuration is one that is
            not read here.

    >>> weight = torch.ones(2, 3).to(torch.float8_e4m3fn)
    >>> stored = {"up.weight": weight, "up.weight_scale": torch.tensor(0.5)}
    >>> read_linear(stored, "up", {"quant_method": "fp8"}).scales.flatten().tolist()
    [0.5]
    """
    method = setting(config, "quant_method", tuple(READERS))
    tensor = READERS[method](tensors, name, config, zero_points)
    check_quantized(name, tensor)
    return tensor


def activations_of(config: Config, name: str) -> tuple[ActivationFormatName | None, bool]:
    """What the rows are rounded to before a layer, and whether the file has their scales.

    Args:
        config: the checkpoint's `quantization_config`.
        name: the layer's.

    Raises:
        ValueError: they are rounded in a way that there is not here.

    >>> activations_of({"quant_method": "fp8", "weight_block_size": [128, 128]}, "up")
    ('e4m3_block', False)
    """
    method = config.get("quant_method")
    if method == "fp8":
        static = setting(config, "activation_scheme", ("dynamic", "static"), "dynamic") == "static"
        # ue8m0: scales of activations are powers of two, which they are not here.
        setting(config, "scale_fmt", (None, "float"))
        if config.get("weight_block_size") is None:
            return "e4m3", static
        setting(config, "activation_scheme", ("dynamic",), "dynamic")
        return "e4m3_block", False
    if method == "compressed-tensors":
        return compressed_activations(config, name)
    return None, False


def read_mxfp4_stack(tensors: Tensors, name: str) -> QuantizedTensor:
    """All experts' matrices out of their blocks and scales, rows in the order stored.

    Args:
        tensors: by name.
        name: what stands before `_blocks` and `_scales`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape.

    Source: gpt-oss checkpoints.

    >>> blocks, scales = torch.zeros(2, 6, 3, 16).byte(), torch.full((2, 6, 3), 127).byte()
    >>> stored = {"down_proj_blocks": blocks, "down_proj_scales": scales}
    >>> read_mxfp4_stack(stored, "down_proj").shape
    (2, 6, 96)
    """
    blocks = read_tensor(tensors, f"{name}_blocks")
    check_tensor(f"{name}_blocks", blocks, ("E", "O", "G", 16), (torch.uint8,))
    E, O, G, _ = blocks.shape
    scales_EOG = read_tensor(tensors, f"{name}_scales")
    check_tensor(f"{name}_scales", scales_EOG, (E, O, G), (torch.uint8,))
    shape = (E, O, 32 * G)
    return QuantizedTensor("mxfp4", blocks.flatten(2), scales_EOG, group_size=32, shape=shape)


def _gptq(
    tensors: Tensors, name: str, config: Config, zero_points: ZeroPoints | None
) -> QuantizedTensor:
    bits = setting(config, "bits", (4, 8))
    written = config.get("format", "gptq")
    version = setting(config, "checkpoint_format", ("gptq", "gptq_v2"), written)
    symmetric = setting(config, "sym", (True,) if bits == 8 else (True, False), True)
    stored: ZeroPoints = "v1" if version == "gptq" else "v2"
    g_idx_D = tensors.get(f"{name}.g_idx")
    tensor = _named(
        name,
        from_gptq,
        *(read_tensor(tensors, f"{name}.{part}")[None] for part in ("qweight", "qzeros", "scales")),
        g_idx=None if g_idx_D is None else g_idx_D[None],
        bits=bits,
        zero_points=zero_points or stored,
        symmetric=symmetric,
    )
    return _check_group(name, tensor, config)


def _awq(
    tensors: Tensors, name: str, config: Config, zero_points: ZeroPoints | None
) -> QuantizedTensor:
    setting(config, "bits", (4,))
    for key in ("version", "format"):
        setting(config, key, ("gemm", "GEMM"), "gemm")
    setting(config, "zero_point", (True,), True)
    parts = [
        read_tensor(tensors, f"{name}.{part}")[None] for part in ("qweight", "qzeros", "scales")
    ]
    return _check_group(name, _named(name, from_awq, *parts), config)


def _compressed(
    tensors: Tensors, name: str, config: Config, zero_points: ZeroPoints | None
) -> QuantizedTensor:
    return read_compressed(tensors, name, config)


def _fp8(
    tensors: Tensors, name: str, config: Config, zero_points: ZeroPoints | None
) -> QuantizedTensor:
    setting(config, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    setting(config, "expert_dtype", ("fp8",), "fp8")
    block = config.get("weight_block_size")
    scale_name = f"{name}.weight_scale_inv"
    if block is None and tensors.get(scale_name) is None:
        scale_name = f"{name}.weight_scale"
    return read_float8(tensors, name, scale_name, block, whole=block is None)


def _named(
    name: str, read: Callable[..., QuantizedTensor], *parts: Any, **options: Any
) -> QuantizedTensor:
    """What `read` gives; its errors name the part, and get the layer's name in front."""
    try:
        return read(*parts, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}.{error}") from None


def _check_group(name: str, tensor: QuantizedTensor, config: Config) -> QuantizedTensor:
    D = tensor.shape[2]
    said, found = (D if size == -1 else size for size in (config.get("group_size", -1),
                                                          tensor.group_size))  # fmt: skip
    if said != found:
        raise ValueError(
            f"config: expected a group_size of {found}, which '{name}.scales' has, got {said}"
        )
    return tensor


READERS: dict[str, Callable[..., QuantizedTensor]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}
"""What reads a layer, by `quant_method`."""
