"""Packed sources of experts: layer by layer out of a quantised checkpoint, or stacks of mxfp4.

Gate and up are put together as one matrix. Where their scales or their `g_idx` do not allow it,
that is an error: vLLM, for one, keeps a single `g_idx` for both, and the one that is read last
stays.

Where the configuration says so, activations are rounded: with scales from the rows, or with those
in the file, `input_scale`. Gate and up see the same rows, so theirs must be the same.

Dimension key: E experts, H hidden size, I intermediate size, O rows of a matrix (out), D columns of
a matrix (in).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_reference.checkpoint_layouts import activations_of, read_linear, read_mxfp4_stack
from moe_reference.checkpoint_parts import Config, Tensors, read_tensor
from moe_reference.checks import check_tensor
from moe_reference.expert_sources import product_shapes
from moe_reference.families import TensorNames
from moe_reference.gptq_packing import ZeroPoints
from moe_reference.layouts import from_layout
from moe_reference.packed_joining import join_packed_rows, join_quantized_experts
from moe_reference.placeholders import ExpertsPlaceholder
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor


def separate_packed(
    tensors: Tensors,
    names: TensorNames,
    experts: Sequence[str],
    sizes: ExpertsPlaceholder,
    config: Config,
    zero_points: ZeroPoints | None = None,
    round_activations: bool = True,
) -> QuantizedExperts:
    """Packed experts that stand one by one.

    Args:
        tensors: by name.
        names: what the family calls them.
        experts: what stands before the names of each, with the dot.
        sizes: what the layer must be.
        config: the checkpoint's `quantization_config`.
        zero_points: the convention of GPTQ's; None takes that of `checkpoint_format`.
        round_activations: whether to round activations as the configuration says.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape, or gate and up do not join.

    >>> parts = {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}
    >>> stored = {f"0.{product}_proj.{part}": each for part, each in parts.items()
    ...     for product in ("gate", "up", "down")}
    >>> sizes, config = ExpertsPlaceholder(1, 2, 2), {"quant_method": "fp8"}
    >>> separate_packed(stored, TensorNames(), ["0."], sizes, config).activation_format
    'e4m3'
    """
    packed = []
    for each in experts:
        gate, up, down = (
            _linear(tensors, f"{each}{product}", shape, config, zero_points)
            for product, shape in product_shapes(names, sizes)
        )
        try:
            gate_up = join_packed_rows([gate, up])
        except ValueError as error:
            raise ValueError(f"{each}{names.gate} and {names.up}: {error}") from None
        both = (names.gate, names.up)
        gate_up_bias = _biases(tensors, [f"{each}{product}.bias" for product in both], gate_up)
        down_bias = _biases(tensors, [f"{each}{names.down}.bias"], down)
        one = QuantizedExperts(gate_up, down, gate_up_bias, down_bias)
        if round_activations:
            one = _with_activations(one, tensors, names, each, config)
        packed.append(one)
    return join_quantized_experts(packed)


def stacked_mxfp4(
    tensors: Tensors, names: TensorNames, level: str, sizes: ExpertsPlaceholder
) -> QuantizedExperts:
    """Experts of mxfp4 in stacks, their rows put in order.

    Args:
        tensors: by name.
        names: what the family calls them, and how their rows are laid out.
        level: what stands before the names.
        sizes: what the layer must be.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape.

    Source: gpt-oss checkpoints.

    >>> stored = {f"{name}_blocks": torch.zeros(1, 64, 1, 16).byte() for name in ("a", "down_proj")}
    >>> stored |= {f"{name}_scales": torch.zeros(1, 64, 1).byte() for name in ("a", "down_proj")}
    >>> stored["down_proj_blocks"] = stored["down_proj_blocks"][:, :32]
    >>> stored["down_proj_scales"] = stored["down_proj_scales"][:, :32]
    >>> sizes = ExpertsPlaceholder(1, 32, 32)
    >>> stacked_mxfp4(stored, TensorNames(gate_up="a"), "", sizes).gate_up.shape
    (1, 64, 32)
    """
    E, H, I = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    read = []
    for product, shape in ((names.gate_up, (E, 2 * I, H)), (names.stacked_down, (E, H, I))):
        tensor = read_mxfp4_stack(tensors, f"{level}{product}")
        if tensor.shape != shape:
            raise ValueError(
                f"{level}{product}_blocks: expected {list(shape)} codes, got {list(tensor.shape)}"
            )
        bias = tensors.get(f"{level}{product}_bias")
        if bias is not None:
            check_tensor(f"{level}{product}_bias", bias, shape[:2])
        read.append((tensor, bias))
    (gate_up, gate_up_bias), (down, down_bias) = read
    # A layout moves rows of floats: their numbers show where each row comes from.
    numbers = torch.arange(2 * I, dtype=torch.float64).view(1, 2 * I, 1)
    layout = replace(names.layout, transposed=False)
    order = from_layout(layout, numbers, numbers.new_empty(1, 1, I)).gate_up.flatten().long()
    assert gate_up.scales is not None
    gate_up = replace(gate_up, packed=gate_up.packed[:, order], scales=gate_up.scales[:, order])
    bias = None if gate_up_bias is None else gate_up_bias[:, order]
    return QuantizedExperts(gate_up, down, bias, down_bias)


def _linear(
    tensors: Tensors,
    name: str,
    shape: tuple[int, int],
    config: Config,
    zero_points: ZeroPoints | None,
) -> QuantizedTensor:
    tensor = read_linear(tensors, name, config, zero_points)
    if tensor.shape[1:] != shape:
        raise ValueError(
            f"{name}: expected {shape[0]} rows (out) and {shape[1]} columns (in), got "
            f"{tensor.shape[1]} and {tensor.shape[2]}"
        )
    return tensor


def _biases(tensors: Tensors, names: Sequence[str], matrix: QuantizedTensor) -> torch.Tensor | None:
    """One after the other as [1, O], or None where there is none of them."""
    if all(tensors.get(name) is None for name in names):
        return None
    biases = [read_tensor(tensors, name) for name in names]
    for name, bias in zip(names, biases, strict=True):
        check_tensor(name, bias, (matrix.shape[1] // len(names),))
    return torch.cat(biases)[None]


def _with_activations(
    one: QuantizedExperts, tensors: Tensors, names: TensorNames, prefix: str, config: Config
) -> QuantizedExperts:
    kinds = [
        activations_of(config, f"{prefix}{each}") for each in (names.gate, names.up, names.down)
    ]
    if len(set(kinds)) > 1:
        raise ValueError(f"config: expected gate, up and down of '{prefix}' alike, got {kinds}")
    format, static = kinds[0]
    if not static:
        return replace(one, activation_format=format)
    gate, up, down = (
        read_tensor(tensors, f"{prefix}{each}.input_scale").to(torch.float32).flatten()
        for each in (names.gate, names.up, names.down)
    )
    if not torch.equal(gate, up):
        raise ValueError(
            f"{prefix}{names.up}.input_scale: expected that of {names.gate}, since both see the "
            f"same rows, got {up.tolist()} and {gate.tolist()}"
        )
    check_tensor(f"{prefix}{names.gate}.input_scale", gate, (1,))
    check_tensor(f"{prefix}{names.down}.input_scale", down, (1,))
    return replace(one, activation_format=format, activation_scales=torch.stack([gate, down], 1))
