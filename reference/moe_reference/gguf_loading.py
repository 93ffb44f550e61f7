"""GGUF files: a layer's experts, packed as llama.cpp has them, or floats.

A stack of all experts for each product, out before in:

    blk.3.ffn_gate_exps.weight   blk.3.ffn_up_exps.weight   blk.3.ffn_down_exps.weight

or gate and up in one, `ffn_gate_up_exps`, the gate first; in old files a matrix for each expert,
`blk.3.ffn_gate.7.weight`. Biases stand beside them as `.bias`. Each tensor has a type of its own:
gate and up must have the same here, down may have another.

Blocks of Q8_0 and Q4_K are taken as they stand. A block of MXFP4 is 17 bytes, the exponent and
16 bytes of codes: the first 16 codes in the low halves, the other 16 in the high ones. Here two
neighbours share a byte.

The package `gguf` reads the file; it is asked for when a file is opened, and not before.

Dimension key: E experts, H hidden size, I intermediate size, O rows of a matrix (out), D columns of
a matrix (in), G blocks of columns.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_reference.bit_packing import pack_nibbles
from moe_reference.checks import FLOATS, check_count, check_tensor
from moe_reference.config import ExpertWeights
from moe_reference.expert_slicing import take_experts
from moe_reference.packed_joining import join_packed, join_packed_rows
from moe_reference.placeholders import Experts, ExpertsPlaceholder
from moe_reference.quantized_slicing import take_quantized_experts
from moe_reference.quantized_tensors import FORMATS, QuantizedExperts, QuantizedTensor

Matrix = torch.Tensor | QuantizedTensor


def load_gguf_experts(
    path: str | os.PathLike[str],
    layer: int,
    sizes: ExpertsPlaceholder,
    held: Sequence[int] | None = None,
) -> Experts:
    """One layer's experts out of a GGUF file.

    Args:
        path: the file; of a model in several files, the one with the layer.
        layer: its number.
        sizes: what the layer must be.
        held: the experts to load, in that order; None for all.

    Returns:
        New tensors: packed where the file has Q8_0, Q4_K or MXFP4, floats where it has F32, F16 or
        BF16.

    Raises:
        ImportError: the package `gguf` is not there.
        ValueError: a tensor is missing, has the wrong shape or another type, or types do not go
            together.

    Source: llama.cpp; its gguf-py names the tensors.

    >>> load_gguf_experts("model.gguf", -1, ExpertsPlaceholder(8, 64, 32))
    Traceback (most recent call last):
    ValueError: layer: expected at least 0, got -1
    """
    check_count("layer", layer)
    from gguf import GGUFReader

    block = f"blk.{layer}.ffn_"
    stored = {each.name: each for each in GGUFReader(path).tensors if each.name.startswith(block)}
    E, H, I = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    if f"{block}gate_up_exps.weight" in stored:
        gate_up = _product(stored, f"{block}gate_up", "weight", (E, 2 * I, H))
        gate_up_bias = _bias(stored, [f"{block}gate_up"], (E, 2 * I))
    else:
        gate = _product(stored, f"{block}gate", "weight", (E, I, H))
        up = _product(stored, f"{block}up", "weight", (E, I, H))
        gate_up = _joined(gate, up, f"{block}gate and up")
        gate_up_bias = _bias(stored, [f"{block}gate", f"{block}up"], (E, I))
    down = _product(stored, f"{block}down", "weight", (E, H, I))
    down_bias = _bias(stored, [f"{block}down"], (E, H))
    wanted = range(E) if held is None else held
    if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor):
        return take_experts(ExpertWeights(gate_up, down, gate_up_bias, down_bias), wanted)
    if isinstance(gate_up, QuantizedTensor) and isinstance(down, QuantizedTensor):
        packed = QuantizedExperts(gate_up, down, gate_up_bias, down_bias)
        return take_quantized_experts(packed, wanted)
    raise ValueError(
        f"{block}down: expected packed weights or floats as gate and up, got the other"
    )


def from_gguf(data: torch.Tensor, type_name: str, name: str) -> Matrix:
    """What a GGUF tensor's data are: floats, or packed matrices.

    Args:
        data: as `gguf` has them, out before in, any shape: floats of F32 and F16, otherwise uint8.
        type_name: the tensor's type: Q8_0, Q4_K, MXFP4, F32, F16 or BF16.
        name: the tensor's.

    Returns:
        Floats of the same shape, or a `QuantizedTensor` of [E, O, D].

    Raises:
        ValueError: another type.

    >>> block = torch.tensor([127, *[0x21] * 16], dtype=torch.uint8)
    >>> one = from_gguf(block.view(1, 1, 17), "MXFP4", "down")
    >>> [f"{byte:02x}" for byte in one.packed.flatten().tolist()][7:9]
    ['11', '22']
    """
    if type_name in ("F32", "F16"):
        return data
    if type_name == "BF16":
        return data.contiguous().view(torch.bfloat16)
    if type_name in ("Q8_0", "Q4_K"):
        known = FORMATS[type_name]
        E, O, width = data.shape
        shape = (E, O, width // known.elements * known.values)
        return QuantizedTensor(type_name, data, group_size=known.group or -1, shape=shape)  # type: ignore[arg-type]
    if type_name == "MXFP4":
        blocks = data.unflatten(2, (-1, 17))
        E, O, G, _ = blocks.shape
        low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
        packed = pack_nibbles(torch.cat([low, high], dim=3)).flatten(2)
        scales_EOG = blocks[..., 0].contiguous()
        return QuantizedTensor("mxfp4", packed, scales_EOG, group_size=32, shape=(E, O, 32 * G))
    raise ValueError(
        f"{name}: expected a type of Q8_0, Q4_K, MXFP4, F32, F16 or BF16, got {type_name}"
    )


def _product(stored: Mapping[str, Any], product: str, part: str, shape: tuple[int, ...]) -> Matrix:
    """All experts' matrices of a product, or their biases, stacked."""
    stack = f"{product}_exps.{part}"
    if f"{product}_exps.scale" in stored:
        raise ValueError(f"{product}_exps.scale: expected no scale beside the blocks, got one")
    if stack in stored:
        matrix = _data(stored[stack], stack)
    elif f"{product}.0.{part}" in stored:
        names = [f"{product}.{e}.{part}" for e in range(shape[0])]
        absent = [name for name in names if name not in stored]
        if absent:
            raise ValueError(f"path: expected '{absent[0]}', got no such name")
        pieces = [_data(stored[name], name, alone=True) for name in names]
        packed = [each for each in pieces if isinstance(each, QuantizedTensor)]
        floats = [each for each in pieces if isinstance(each, torch.Tensor)]
        if packed and floats:
            raise ValueError(f"{product}: expected experts of one type, got packed ones and floats")
        matrix = join_packed(packed) if packed else torch.cat(floats)
    else:
        raise ValueError(f"path: expected '{stack}', got no such name")
    if isinstance(matrix, torch.Tensor):
        check_tensor(stack, matrix, shape, FLOATS)
    elif matrix.shape != shape:
        raise ValueError(f"{stack}: expected shape {list(shape)}, got {list(matrix.shape)}")
    return matrix


def _data(tensor: Any, name: str, alone: bool = False) -> Matrix:
    # A copy: what gguf has is the file, mapped into memory.
    data = torch.tensor(tensor.data)
    return from_gguf(data[None] if alone else data, tensor.tensor_type.name, name)


def _joined(gate: Matrix, up: Matrix, name: str) -> Matrix:
    if isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor):
        return torch.cat([gate, up], dim=1)
    if isinstance(gate, QuantizedTensor) and isinstance(up, QuantizedTensor):
        if gate.format != up.format:
            raise ValueError(f"{name}: expected one type, got {gate.format} and {up.format}")
        return join_packed_rows([gate, up])
    raise ValueError(f"{name}: expected one type, got packed weights and floats")


def _bias(
    stored: Mapping[str, Any], products: Sequence[str], shape: tuple[int, int]
) -> torch.Tensor | None:
    if not any(f"{product}_exps.bias" in stored for product in products):
        return None
    biases = [_product(stored, product, "bias", shape) for product in products]
    return torch.cat(biases, dim=1)  # type: ignore[arg-type]
