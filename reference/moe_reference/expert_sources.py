"""Sources of experts: one by one or in stacks, packed or as floats, with the names of the file.

- *one by one*: `experts.7.gate_proj.` and what stands behind it, gate, up and down of every
  expert; `weight` and `bias`, or what `checkpoint_layouts` lists;
- *floats*: `experts.gate_up_proj`, `experts.down_proj` and their `_bias`, in any `Layout`;
- *mxfp4*: the same with `_blocks` and `_scales`, never transposed, rows in the order of the layout.

With `experts.` in front or without, as in `checkpoints`.

Here is which of them a file has, and floats; what is packed is in `packed_sources`.

Dimension key: E experts, H hidden size, I intermediate size.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from moe_reference.checkpoint_parts import Tensors, read_tensor
from moe_reference.checks import FLOATS, check_tensor
from moe_reference.config import ExpertWeights
from moe_reference.families import TensorNames
from moe_reference.layouts import from_layout, from_separate, infer_transposed
from moe_reference.placeholders import ExpertsPlaceholder

Source = Literal["one by one", "floats", "mxfp4"]


def find_source(tensors: Tensors, names: TensorNames, prefix: str) -> tuple[str, Source] | None:
    """What a file has of a layer's experts: what stands before their names, and in which form.

    Args:
        tensors: by name; none is read.
        names: what the family calls them.
        prefix: in front of all of the layer's, with the dot.

    >>> find_source({"mlp.experts.4.up_proj.qweight": torch.ones(1)}, TensorNames(), "mlp.")
    ('mlp.experts.', 'one by one')
    """
    products = "|".join(map(re.escape, (names.gate, names.up, names.down)))
    stored = set(tensors)
    for level in (f"{prefix}experts.", prefix):
        if f"{level}{names.gate_up}_blocks" in stored:
            return level, "mxfp4"
        if f"{level}{names.gate_up}" in stored:
            return level, "floats"
        numbered = re.compile(rf"{re.escape(level)}\d+\.({products})\.")
        if any(numbered.match(name) for name in stored):
            return level, "one by one"
    return None


def is_float(tensors: Tensors, name: str) -> bool:
    """Whether there is a tensor of that name that holds floats of more than 8 bits.

    Args:
        tensors: by name.
        name: of the tensor.

    >>> is_float({"a": torch.ones(1), "b": torch.ones(1).to(torch.float8_e4m3fn)}, "b")
    False
    """
    tensor = tensors.get(name)
    return tensor is not None and tensor.dtype in FLOATS


def separate_floats(
    tensors: Tensors, names: TensorNames, experts: Sequence[str], sizes: ExpertsPlaceholder
) -> ExpertWeights:
    """Float experts that stand one by one.

    Args:
        tensors: by name.
        names: what the family calls them.
        experts: what stands before the names of each, with the dot.
        sizes: what the layer must be.

    Raises:
        TypeError: a tensor is not float.
        ValueError: a tensor is missing or has the wrong shape.

    >>> one = torch.ones(2, 2)
    >>> stored = {f"0.{product}_proj.weight": one for product in ("gate", "up", "down")}
    >>> separate_floats(stored, TensorNames(), ["0."], ExpertsPlaceholder(1, 2, 2)).gate_up.shape
    torch.Size([1, 4, 2])
    """
    read: list[torch.Tensor | None] = []
    for part in ("weight", "bias"):
        for product, shape in product_shapes(names, sizes):
            stored = [f"{each}{product}.{part}" for each in experts]
            if part == "bias" and all(tensors.get(name) is None for name in stored):
                read.append(None)
                continue
            each_one = [read_tensor(tensors, name) for name in stored]
            for name, tensor in zip(stored, each_one, strict=True):
                check_tensor(name, tensor, shape if part == "weight" else shape[:1])
            read.append(torch.stack(each_one))
    return from_separate(*read)  # type: ignore[arg-type]


def stacked_floats(
    tensors: Tensors, names: TensorNames, level: str, sizes: ExpertsPlaceholder
) -> ExpertWeights:
    """Float experts in stacks. Whether they are transposed, both shapes together tell.

    Args:
        tensors: by name.
        names: what the family calls them, and how their rows are laid out.
        level: what stands before the names.
        sizes: what the layer must be.

    Raises:
        TypeError: a tensor is not float.
        ValueError: a tensor is missing or has the wrong shape.

    >>> stored = {"gate_up_proj": torch.ones(1, 2, 4), "down_proj": torch.ones(1, 2, 2)}
    >>> stacked_floats(stored, TensorNames(), "", ExpertsPlaceholder(1, 2, 2)).gate_up.shape
    torch.Size([1, 4, 2])
    """
    gate_up, down = (
        read_tensor(tensors, level + each) for each in (names.gate_up, names.stacked_down)
    )
    layout = replace(names.layout, transposed=infer_transposed(gate_up, down))
    gate_up_bias = tensors.get(f"{level}{names.gate_up}_bias")
    down_bias = tensors.get(f"{level}{names.stacked_down}_bias")
    experts = from_layout(layout, gate_up, down, gate_up_bias, down_bias)
    E, H, I = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    if tuple(experts.down.shape) != (E, H, I):
        raise ValueError(
            f"{level}{names.stacked_down}: expected {E} experts with H = {H} and I = {I}, got "
            f"{list(down.shape)}"
        )
    return experts


def product_shapes(
    names: TensorNames, sizes: ExpertsPlaceholder
) -> list[tuple[str, tuple[int, int]]]:
    """What gate, up and down of an expert are called, and how many rows and columns they have.

    Args:
        names: what the family calls them.
        sizes: what the layer must be.

    >>> product_shapes(TensorNames(), ExpertsPlaceholder(8, 64, 32))[2]
    ('down_proj', (64, 32))
    """
    H, I = sizes.hidden_size, sizes.intermediate_size
    return [(names.gate, (I, H)), (names.up, (I, H)), (names.down, (H, I))]
