"""Parts of a checkpoint: a tensor by its name, an entry of the configuration, scales, or an error.

A file that does not hold what its configuration says is told from one that does by nothing but
these checks: every one gives a sentence with the name of the tensor or of the entry.

Dimension key: E experts (1 here), O rows of a matrix (out), D columns of a matrix (in), G groups of
columns, B rows and columns of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch

from moe_reference.checks import FLOATS, check_tensor
from moe_reference.quantized_tensors import QuantizedTensor

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


def read_tensor(tensors: Tensors, name: str) -> torch.Tensor:
    """The tensor of that name, or an error.

    Args:
        tensors: by name.
        name: of one of them.

    Returns:
        The tensor, any shape and dtype.

    Raises:
        ValueError: there is no such name.

    >>> read_tensor({}, "up.weight")
    Traceback (most recent call last):
    ValueError: tensors: expected 'up.weight', got no such name
    """
    # `in` of a mapping reads the tensor, too.
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"tensors: expected '{name}', got no such name")
    return tensor


def setting(config: Config, key: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """An entry of a configuration, which must be one of those that are read here.

    Args:
        config: the checkpoint's `quantization_config`, or a part of it.
        key: the entry's name.
        known: what it may be.
        default: what a missing entry means.

    Raises:
        ValueError: it is something else.

    >>> setting({"bits": 3}, "bits", (4, 8))
    Traceback (most recent call last):
    ValueError: config: expected bits of 4 or 8, got 3
    """
    value = config.get(key, default)
    if value not in known:
        names = " or ".join(map(repr, known))
        raise ValueError(f"config: expected {key} of {names}, got {value!r}")
    return value


def read_scales(tensors: Tensors, name: str, whole: bool) -> torch.Tensor:
    """Scales as a matrix of floats.

    Args:
        tensors: by name.
        name: of the scales.
        whole: there is one for the whole matrix, stored in any shape.

    Returns:
        [O, G], or [1, 1] for the whole; float32 where they are stored as bare exponents.

    Raises:
        TypeError: they are no floats.
        ValueError: they are missing or have the wrong shape.

    >>> read_scales({"up.weight_scale": torch.tensor(2.0)}, "up.weight_scale", whole=True).tolist()
    [[2.0]]
    """
    scales = read_tensor(tensors, name)
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.to(torch.float32)
    if whole and scales.numel() == 1:
        scales = scales.view(1, 1)
    check_tensor(name, scales, (1, 1) if whole else ("O", "G"), FLOATS)
    return scales


def read_float8(
    tensors: Tensors, name: str, scale_name: str, block: list[int] | None, whole: bool
) -> QuantizedTensor:
    """A float8_e4m3fn `weight` and its scales, E = 1.

    Args:
        tensors: by name.
        name: the layer's.
        scale_name: that of its scales.
        block: rows and columns of a block, or None.
        whole: there is one scale for the whole matrix, and not one for each row.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor is missing or has the wrong shape, or blocks that are not square.

    >>> stored = {"up.weight": torch.ones(2, 3).to(torch.float8_e4m3fn), "scale": torch.ones(2, 1)}
    >>> read_float8(stored, "up", "scale", None, whole=False).shape
    (1, 2, 3)
    """
    weight_OD = read_tensor(tensors, f"{name}.weight")
    check_tensor(f"{name}.weight", weight_OD, ("O", "D"), (torch.float8_e4m3fn,))
    scales = read_scales(tensors, scale_name, whole)
    O, D = weight_OD.shape
    B = -1
    if block is not None:
        if len(block) != 2 or block[0] != block[1]:
            raise ValueError(f"config: expected blocks as high as they are wide, got {list(block)}")
        B = block[0]
        check_tensor(scale_name, scales, (-(-O // B), -(-D // B)))
    elif not whole:
        check_tensor(scale_name, scales, (O, 1))
    return QuantizedTensor("e4m3", weight_OD[None], scales[None], group_size=B, shape=(1, O, D))
