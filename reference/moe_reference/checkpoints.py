"""Checkpoints: the tensors of a layer under the names that published models give them.

Experts come in two forms: one tensor for each product of each expert, or one for all experts of a
layer. Both are read, whichever is there, with the level `experts.` in their names or without it.
Of stacked tensors, whether they are transposed is told by both shapes together; the order of gate
and up is not to be seen and is what the family says.

Dimension key: E experts, H hidden size, I intermediate size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moe_reference.checkpoint_files import Checkpoint as Checkpoint
from moe_reference.checkpoint_files import save_tensors as save_tensors
from moe_reference.checks import check_tensor
from moe_reference.config import ExpertWeights, LayerWeights
from moe_reference.expert_slicing import take_experts
from moe_reference.families import TensorNames
from moe_reference.layouts import (
    from_layout,
    from_separate,
    infer_transposed,
    to_layout,
    to_separate,
)


def load_layer(
    tensors: Mapping[str, torch.Tensor],
    names: TensorNames,
    prefix: str,
    held: Sequence[int] | None = None,
) -> tuple[LayerWeights, torch.Tensor | None]:
    """One layer out of a checkpoint.

    Args:
        tensors: by name: a `Checkpoint`, or any mapping. Only the layer's own are read.
        names: what the family calls them.
        prefix: in front of all of them, with the dot: `model.layers.3.mlp.`.
        held: the experts to load, in that order; None for all. The router is whole in any case.

    Returns:
        The weights, of the dtypes stored, and the layer's hash table [vocabulary, K], int64, or
        None. Optional parts that the checkpoint does not have are None.

    Raises:
        ValueError: a tensor is missing, or shapes do not fit each other.

    >>> one = torch.ones(1, 1)
    >>> stored = {f"mlp.experts.0.{name}.weight": one for name in ("gate_proj", "up_proj")}
    >>> stored |= {"mlp.gate.weight": one, "mlp.experts.0.down_proj.weight": one}
    >>> load_layer(stored, TensorNames(), "mlp.")[0].experts.gate_up.shape
    torch.Size([1, 2, 1])
    """
    router = _read(tensors, prefix + names.router)
    shared = shared_gate = None
    if names.shared is not None and any(
        name.startswith(f"{prefix}{names.shared}.") for name in tensors
    ):
        shared = _separate_experts(tensors, names, [f"{prefix}{names.shared}."])
        shared_gate = _optional(tensors, prefix, names.shared_gate)
    parameters = LayerWeights(
        router=router,
        experts=_load_experts(tensors, names, prefix, len(router), held),
        router_bias=_optional(tensors, prefix, names.router_bias),
        selection_bias=_optional(tensors, prefix, names.selection_bias),
        shared=shared,
        shared_gate=shared_gate,
    )
    table = _optional(tensors, prefix, names.hash_table)
    return parameters, None if table is None else table.to(torch.int64)


def layer_tensors(
    parameters: LayerWeights,
    names: TensorNames,
    prefix: str,
    hash_table: torch.Tensor | None = None,
    stacked: bool = False,
) -> dict[str, torch.Tensor]:
    """The inverse of `load_layer`: a layer's tensors under a family's names.

    Args:
        parameters: the layer, its experts with a gate.
        names: what the family calls them.
        prefix: in front of all of them, with the dot.
        hash_table: [vocabulary, K], or None.
        stacked: one tensor for all experts of a product, in the family's layout.

    Raises:
        ValueError: the layer has a part that the family has no name for.

    >>> one = ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    >>> sorted(layer_tensors(LayerWeights(torch.ones(1, 1), one), TensorNames(), "", stacked=True))
    ['experts.down_proj', 'experts.gate_up_proj', 'gate.weight']
    """
    tensors = {prefix + names.router: parameters.router}
    optional = {
        "router_bias": parameters.router_bias,
        "selection_bias": parameters.selection_bias,
        "shared_gate": parameters.shared_gate,
        "hash_table": hash_table,
    }
    for part, tensor in optional.items():
        name = getattr(names, part)
        if tensor is None:
            continue
        if name is None:
            raise ValueError(f"names: expected a name for {part}, got None")
        tensors[prefix + name] = tensor
    if stacked:
        stored = to_layout(names.layout, parameters.experts)
        suffixes = (names.gate_up, names.stacked_down)
        all_names = [*suffixes, *(f"{suffix}_bias" for suffix in suffixes)]
        found = zip(all_names, stored, strict=True)
        tensors |= {f"{prefix}experts.{name}": each for name, each in found if each is not None}
    else:
        tensors |= _separate_tensors(parameters.experts, names, f"{prefix}experts.{{}}.")
    if parameters.shared is not None:
        if names.shared is None:
            raise ValueError("names: expected a name for shared, got None")
        tensors |= _separate_tensors(parameters.shared, names, f"{prefix}{names.shared}.")
    return tensors


def _load_experts(
    tensors: Mapping[str, torch.Tensor],
    names: TensorNames,
    prefix: str,
    num_experts: int,
    held: Sequence[int] | None,
) -> ExpertWeights:
    for level in (f"{prefix}experts.", prefix):
        if f"{level}{names.gate_up}" in tensors:
            stacked = _stacked_experts(tensors, names, level)
            check_tensor(f"{level}{names.gate_up}", stacked.gate_up, (num_experts, "J", "H"))
            return stacked if held is None else take_experts(stacked, held)
        if f"{level}0.{names.gate}.weight" in tensors:
            if f"{level}{num_experts}.{names.gate}.weight" in tensors:
                raise ValueError(f"tensors: expected {num_experts} experts as the router, got more")
            if held is not None and len(held) == 0:
                return take_experts(_separate_experts(tensors, names, [f"{level}0."]), [])
            wanted = range(num_experts) if held is None else held
            return _separate_experts(tensors, names, [f"{level}{e}." for e in wanted])
    raise ValueError(
        f"tensors: expected '{prefix}experts.{names.gate_up}' or "
        f"'{prefix}experts.0.{names.gate}.weight', got neither, nor either without 'experts.'"
    )


def _stacked_experts(
    tensors: Mapping[str, torch.Tensor], names: TensorNames, level: str
) -> ExpertWeights:
    gate_up = tensors[level + names.gate_up]
    down = _read(tensors, level + names.stacked_down)
    gate_up_bias = tensors.get(f"{level}{names.gate_up}_bias")
    down_bias = tensors.get(f"{level}{names.stacked_down}_bias")
    layout = replace(names.layout, transposed=infer_transposed(gate_up, down))
    return from_layout(layout, gate_up, down, gate_up_bias, down_bias)


def _separate_experts(
    tensors: Mapping[str, torch.Tensor], names: TensorNames, prefixes: Sequence[str]
) -> ExpertWeights:
    products = (names.gate, names.up, names.down)
    weights = [
        torch.stack([_read(tensors, f"{prefix}{product}.weight") for prefix in prefixes])
        for product in products
    ]
    biases = [
        torch.stack([_read(tensors, f"{prefix}{product}.bias") for prefix in prefixes])
        if f"{prefixes[0]}{product}.bias" in tensors
        else None
        for product in products
    ]
    return from_separate(*weights, *biases)


def _separate_tensors(
    experts: ExpertWeights, names: TensorNames, level: str
) -> dict[str, torch.Tensor]:
    kinds = [f"{product}.{kind}" for kind in ("weight", "bias")
             for product in (names.gate, names.up, names.down)]  # fmt: skip
    return {
        f"{level.format(e)}{kind}": stacked[e]
        for kind, stacked in zip(kinds, to_separate(experts), strict=True)
        if stacked is not None
        for e in range(len(stacked))
    }


def _optional(
    tensors: Mapping[str, torch.Tensor], prefix: str, name: str | None
) -> torch.Tensor | None:
    return None if name is None else tensors.get(prefix + name)


def _read(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"tensors: expected '{name}', got no such name")
    return tensors[name]
