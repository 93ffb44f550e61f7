"""Loading: a layer's experts out of a checkpoint, packed as they are stored, or packed on the way.

A file has experts one by one or in stacks, packed or as floats; which it is, its names tell
(`expert_sources`). Gate and up become one matrix, and no number changes. Experts that the
configuration leaves out are stored as floats: they are loaded as `ExpertWeights`.

**Quantised when loaded**: floats are read and packed on the CPU, one expert after the other, and
only what is packed goes to the device. The device never holds a float expert, and the CPU no more
than one; of stacks, the stacks.

Dimension key: E experts, H hidden size, I intermediate size.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_reference.checkpoint_parts import Config, Tensors, setting
from moe_reference.checks import check_count
from moe_reference.config import ExpertWeights
from moe_reference.expert_slicing import take_experts
from moe_reference.expert_sources import (
    Source,
    find_source,
    is_float,
    separate_floats,
    stacked_floats,
)
from moe_reference.families import TensorNames
from moe_reference.gptq_packing import ZeroPoints
from moe_reference.packed_joining import join_quantized_experts
from moe_reference.packed_sources import separate_packed, stacked_mxfp4
from moe_reference.placeholders import Experts, ExpertsPlaceholder
from moe_reference.quantization import quantize_experts
from moe_reference.quantized_slicing import take_quantized_experts
from moe_reference.quantized_tensors import FormatName, QuantizedExperts

Parts = TypeVar("Parts")


def load_experts(
    tensors: Tensors,
    names: TensorNames,
    prefix: str,
    sizes: ExpertsPlaceholder,
    config: Config | None = None,
    held: Sequence[int] | None = None,
    zero_points: ZeroPoints | None = None,
    round_activations: bool = True,
) -> Experts:
    """One layer's experts as the checkpoint has them: packed, or floats.

    Args:
        tensors: by name: a `Checkpoint`, or any mapping. Only the layer's own are read.
        names: what the family calls them.
        prefix: in front of all of them, with the dot: `model.layers.3.mlp.`.
        sizes: what the layer must be.
        config: the checkpoint's `quantization_config`, or None.
        held: the experts to load, in that order; None for all.
        zero_points: the convention of GPTQ's; None takes that of `checkpoint_format`.
        round_activations: whether to round activations as the configuration says. Without it only
            the weights are packed, as kernels do on a device that has no products of 8 bits.

    Returns:
        New tensors, of the dtypes stored.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape, gate and up do not join, or the
            configuration is one that is not read here.

    >>> one = torch.ones(4, 4).to(torch.float8_e4m3fn)
    >>> parts = {"weight": one, "weight_scale": torch.tensor(0.5)}
    >>> stored = {f"experts.0.{product}_proj.{part}": each for part, each in parts.items()
    ...     for product in ("gate", "up", "down")}
    >>> config = {"quant_method": "fp8"}
    >>> load_experts(stored, TensorNames(), "", ExpertsPlaceholder(1, 4, 4), config).gate_up.shape
    (1, 8, 4)
    """
    wanted = _held(sizes, held)
    level, source = _source(tensors, names, prefix)
    if source == "floats":
        return take_experts(stacked_floats(tensors, names, level, sizes), wanted)
    if source == "mxfp4":
        setting(config or {}, "quant_method", ("mxfp4",))
        return take_quantized_experts(stacked_mxfp4(tensors, names, level, sizes), wanted)
    # With none held the first one is read, and nothing is taken of it.
    read = [f"{level}{e}." for e in wanted or [0]]
    if config is None or is_float(tensors, f"{read[0]}{names.gate}.weight"):
        floats = separate_floats(tensors, names, read, sizes)
        return take_experts(floats, range(len(wanted)))
    packed = separate_packed(tensors, names, read, sizes, config, zero_points, round_activations)
    return take_quantized_experts(packed, range(len(wanted)))


def load_and_quantize(
    tensors: Tensors,
    names: TensorNames,
    prefix: str,
    sizes: ExpertsPlaceholder,
    format: FormatName,
    held: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> QuantizedExperts:
    """One layer's float experts, packed while they are loaded.

    Args:
        tensors: by name, float; otherwise as `load_experts`.
        names: what the family calls them.
        prefix: in front of all of them, with the dot.
        sizes: what the layer must be.
        format: what they become.
        held: the experts to load, in that order; None for all.
        device: where all parts are in the end, biases too.
        options: those of `quantize_experts`.

    Raises:
        TypeError: a tensor is not float.
        ValueError: a tensor is missing or has the wrong shape, or the format cannot hold it.

    Source: hanzo-engine's quantisation while loading.

    >>> one = torch.ones(8, 8)
    >>> stored = {f"experts.0.{product}_proj.weight": one for product in ("gate", "up", "down")}
    >>> sizes = ExpertsPlaceholder(1, 8, 8)
    >>> load_and_quantize(stored, TensorNames(), "", sizes, "uint8b128", group_size=8).down.format
    'uint8b128'
    """
    wanted = _held(sizes, held)
    level, source = _source(tensors, names, prefix)
    if source != "one by one" or not wanted:
        floats = load_experts(tensors, names, prefix, sizes, None, wanted)
        assert isinstance(floats, ExpertWeights)
        return move(quantize_experts(move(floats, "cpu"), format, **options), device)
    packed = []
    for e in wanted:
        one = move(separate_floats(tensors, names, [f"{level}{e}."], sizes), "cpu")
        packed.append(quantize_experts(one, format, **options))
    return move(join_quantized_experts(packed), device)


def fill_placeholders(
    model: Mapping[str, Experts | ExpertsPlaceholder],
    tensors: Tensors,
    names: TensorNames,
    config: Config | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Experts | ExpertsPlaceholder]:
    """A model with experts wherever a file has those of a placeholder; the others stay.

    Args:
        model: experts or placeholders by the prefixes of their layers.
        tensors: by name.
        names: what the family calls them.
        config: the checkpoint's `quantization_config`, or None.
        device: where the experts go, in the dtypes stored.

    Raises:
        TypeError: as `load_experts`.
        ValueError: as `load_experts`; or a file has experts that the model has already.

    Source: hanzo-engine's layers that are replaced when a file is read.

    >>> model = {"0.": ExpertsPlaceholder(1, 2, 2), "1.": ExpertsPlaceholder(1, 2, 2)}
    >>> one = torch.ones(2, 2)
    >>> stored = {f"1.experts.0.{product}_proj.weight": one for product in ("gate", "up", "down")}
    >>> [type(each).__name__ for each in fill_placeholders(model, stored, TensorNames()).values()]
    ['ExpertsPlaceholder', 'ExpertWeights']
    """
    filled = dict(model)
    for prefix, each in model.items():
        if find_source(tensors, names, prefix) is None:
            continue
        if not isinstance(each, ExpertsPlaceholder):
            raise ValueError(
                f"tensors: expected no experts of '{prefix}', which the model has, got some"
            )
        filled[prefix] = move(load_experts(tensors, names, prefix, each, config), device)
    return filled


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint's `config.json`, or None.

    Args:
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: there is no `config.json`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text('{"quantization_config": {"bits": 4}}')
    ...     read_config(folder)
    {'bits': 4}
    """
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found.get("quantization_config")


def move(parts: Parts, device: torch.device | str) -> Parts:
    """Experts or a packed tensor on another device; no dtype changes, whatever it is.

    Args:
        parts: a dataclass of tensors, or of such dataclasses.
        device: where they go.

    >>> move(ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1)), "meta").down.device.type
    'meta'
    """
    moved: dict[str, Any] = {}
    for each in fields(parts):  # type: ignore[arg-type]
        value = getattr(parts, each.name)
        if isinstance(value, torch.Tensor):
            moved[each.name] = value.to(device)
        elif hasattr(value, "__dataclass_fields__"):
            moved[each.name] = move(value, device)
    return replace(parts, **moved)  # type: ignore[type-var]


def _source(tensors: Tensors, names: TensorNames, prefix: str) -> tuple[str, Source]:
    found = find_source(tensors, names, prefix)
    if found is None:
        raise ValueError(
            f"tensors: expected '{prefix}experts.{names.gate_up}', alone or with '_blocks', or "
            f"'{prefix}experts.0.{names.gate}.', got none of them, nor without 'experts.'"
        )
    return found


def _held(sizes: ExpertsPlaceholder, held: Sequence[int] | None) -> list[int]:
    wanted = list(range(sizes.num_experts)) if held is None else list(held)
    for e in wanted:
        check_count("held", e)
        if e >= sizes.num_experts:
            raise ValueError(f"held: expected experts below {sizes.num_experts}, got {e}")
    return wanted
