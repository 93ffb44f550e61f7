"""Layers of compressed-tensors checkpoints (llm-compressor), by the `format` that they have.

| `format` | behind a layer's name | read as |
|---|---|---|
| `pack-quantized` | `weight_packed` int32, `weight_scale`, `weight_shape`, `weight_zero_point`, | |
| | `weight_g_idx` | uint4b8, uint8b128, uint4 |
| `int-quantized` | `weight` int8, `weight_scale` | uint8b128 |
| `float-quantized` | `weight` float8_e4m3fn, `weight_scale` | e4m3 |
| `mxfp4-pack-quantized` | `weight_packed` uint8, `weight_scale` uint8 | mxfp4 |

Integers are signed. Before they are packed, 2^(bits - 1) is added to codes and to zero points, and
in their difference it goes away: the words of `weight_packed` are those of uint4b8, uint8b128 and
uint4 as they stand. Zero points are packed along the rows, in plain order.

Dimension key: E experts (1 here), O rows of a matrix (out), D columns of a matrix (in), G groups of
columns, W words of a row.
"""

import re
from collections.abc import Callable

import torch

from moe_reference.bit_packing import pack_words, unpack_words
from moe_reference.checkpoint_parts import (
    Config,
    Tensors,
    read_float8,
    read_scales,
    read_tensor,
    setting,
)
from moe_reference.checks import check_tensor
from moe_reference.quantized_tensors import ActivationFormatName, FormatName, QuantizedTensor


def read_compressed(tensors: Tensors, name: str, config: Config) -> QuantizedTensor:
    """One layer, E = 1.

    Args:
        tensors: by name; only the layer's own are read.
        name: the layer's, without a dot behind.
        config: the checkpoint's `quantization_config`.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape, or the configuration is one that is
            not read here.

    Source: compressed-tensors' compressors.

    >>> stored = {"up.weight": torch.ones(2, 4).to(torch.int8), "up.weight_scale": torch.ones(2, 1)}
    >>> group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    >>> config = {"format": "int-quantized", "config_groups": {"group_0": group}}
    >>> read_compressed(stored, "up", config).format
    'uint8b128'
    """
    scheme = scheme_of(config, name)
    format = setting(scheme, "format", tuple(COMPRESSED))
    return COMPRESSED[format](tensors, name, scheme["weights"])


def scheme_of(config: Config, name: str) -> Config:
    """The group of a compressed-tensors configuration that a layer belongs to.

    A target is a layer's name, `re:` and a pattern for names, or a class, of which experts are
    `Linear`. One that names the layer goes before one that names the class.

    Args:
        config: the checkpoint's `quantization_config`.
        name: the layer's.

    Returns:
        The group, with the `format` of the whole where it has none of its own.

    Raises:
        ValueError: no group takes the layer in.

    >>> groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    >>> scheme_of({"config_groups": groups, "format": "pack-quantized"}, "up")["format"]
    'pack-quantized'
    """
    groups = [each for each in (config.get("config_groups") or {}).values() if each.get("weights")]
    for takes in (_names, lambda target, _: target == "Linear"):
        for group in groups:
            if any(takes(target, name) for target in group["targets"]):
                return {**group, "format": group.get("format") or config.get("format")}
    raise ValueError(f"config: expected a group with a target for '{name}', got none")


def compressed_activations(config: Config, name: str) -> tuple[ActivationFormatName | None, bool]:
    """What the rows are rounded to before a layer, and whether the file has their scale.

    Args:
        config: the checkpoint's `quantization_config`.
        name: the layer's.

    Raises:
        ValueError: they are rounded in a way that there is not here.

    >>> rows = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    >>> group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": rows}
    >>> compressed_activations({"config_groups": {"group_0": group}}, "up")
    ('e4m3', False)
    """
    rows = scheme_of(config, name).get("input_activations")
    if rows is None:
        return None, False
    setting(rows, "num_bits", (8,))
    kind = setting(rows, "type", ("int", "float"), "int")
    # With a zero point the sum of the weights' rows would come in.
    setting(rows, "symmetric", (True,), True)
    if not rows.get("dynamic", False):
        setting(rows, "strategy", ("tensor",))
        return ("int8" if kind == "int" else "e4m3"), True
    strategies = ("token",) if kind == "int" else ("token", "group")
    if setting(rows, "strategy", strategies) == "group":
        setting(rows, "group_size", (128,))
        return "e4m3_block", False
    return ("int8" if kind == "int" else "e4m3"), False


def _names(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _packed_integers(tensors: Tensors, name: str, weights: Config) -> QuantizedTensor:
    setting(weights, "type", ("int",), "int")
    bits = setting(weights, "num_bits", (4, 8))
    symmetric = setting(weights, "symmetric", (True,) if bits == 8 else (True, False), True)
    strategy = setting(weights, "strategy", ("group", "channel", "tensor"))
    O, D = (int(size) for size in read_tensor(tensors, f"{name}.weight_shape"))
    words_OW = read_tensor(tensors, f"{name}.weight_packed")
    check_tensor(f"{name}.weight_packed", words_OW, (O, -(-D * bits // 32)), (torch.int32,))
    scales_OG = read_scales(tensors, f"{name}.weight_scale", strategy == "tensor")
    zeros_OG = None
    if not symmetric:
        words = read_tensor(tensors, f"{name}.weight_zero_point")
        shape = (-(-O * bits // 32), scales_OG.shape[1])
        check_tensor(f"{name}.weight_zero_point", words, shape, (torch.int32,))
        zeros_OG = unpack_words(words.T, bits).T[:O].contiguous()
    g_idx_D = tensors.get(f"{name}.weight_g_idx")
    # -1 is what it is filled with before anything is known of an order.
    if g_idx_D is not None and bool((g_idx_D == -1).any()):
        g_idx_D = None
    name_of: dict[int, FormatName] = {4: "uint4b8", 8: "uint8b128"}
    return QuantizedTensor(
        name_of[bits] if symmetric else "uint4",
        words_OW[None],
        scales_OG.expand(O, -1)[None] if strategy == "tensor" else scales_OG[None],
        None if zeros_OG is None else zeros_OG[None],
        None if g_idx_D is None else g_idx_D[None],
        group_size=weights["group_size"] if strategy == "group" else -1,
        shape=(1, O, D),
    )


def _plain_integers(tensors: Tensors, name: str, weights: Config) -> QuantizedTensor:
    setting(weights, "num_bits", (8,))
    setting(weights, "symmetric", (True,), True)
    strategy = setting(weights, "strategy", ("channel", "tensor"))
    codes_OD = read_tensor(tensors, f"{name}.weight")
    check_tensor(f"{name}.weight", codes_OD, ("O", "D"), (torch.int8,))
    O, D = codes_OD.shape
    scales_O1 = read_scales(tensors, f"{name}.weight_scale", strategy == "tensor").expand(O, 1)
    words_OW = pack_words(codes_OD.to(torch.int32) + 128, 8)
    return QuantizedTensor("uint8b128", words_OW[None], scales_O1[None], shape=(1, O, D))


def _float8(tensors: Tensors, name: str, weights: Config) -> QuantizedTensor:
    setting(weights, "num_bits", (8,))
    setting(weights, "type", ("float",))
    strategy = setting(weights, "strategy", ("tensor", "channel", "block"))
    block = weights.get("block_structure") if strategy == "block" else None
    return read_float8(tensors, name, f"{name}.weight_scale", block, strategy == "tensor")


def _mxfp4(tensors: Tensors, name: str, weights: Config) -> QuantizedTensor:
    setting(weights, "num_bits", (4,))
    bytes_ = read_tensor(tensors, f"{name}.weight_packed")
    exponents = read_tensor(tensors, f"{name}.weight_scale")
    check_tensor(f"{name}.weight_packed", bytes_, ("O", "D / 2"), (torch.uint8,))
    O, D = bytes_.shape[0], bytes_.shape[1] * 2
    return QuantizedTensor("mxfp4", bytes_[None], exponents[None], group_size=32, shape=(1, O, D))


COMPRESSED: dict[str, Callable[[Tensors, str, Config], QuantizedTensor]] = {
    "pack-quantized": _packed_integers,
    "int-quantized": _plain_integers,
    "float-quantized": _float8,
    "mxfp4-pack-quantized": _mxfp4,
}
"""What reads a layer, by `format`."""
