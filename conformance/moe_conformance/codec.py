"""Calls and answers as JSON beside a safetensors blob: one form on the pipe and on disk.

A value is a tree of None, numbers, strings, dtypes, tensors, lists, dictionaries and the
dataclasses of `moe_reference`. Tensors go into a flat dictionary and leave their key
in the tree, so that what a case was can be read without a program and restored to the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference import config as configurations
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

Tensors = dict[str, torch.Tensor]

_DATACLASSES = {
    name: value
    for name, value in vars(configurations).items()
    if isinstance(value, type) and dataclasses.is_dataclass(value)
} | {each.__name__: each for each in (QuantizedTensor, QuantizedExperts)}


def encode(value: Any, tensors: Tensors, path: str = "") -> Any:
    """Turn `value` into JSON, moving its tensors into `tensors` under their path.

    Raises:
        TypeError: `value` holds something that has no place in a call.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        key = path or "value"
        # A copy: the blob must not change when the caller goes on with the tensor.
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, list | tuple):
        return [encode(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            "dict": {
                str(name): encode(item, tensors, f"{path}.{name}".lstrip("."))
                for name, item in value.items()
            }
        }
    if type(value).__name__ in _DATACLASSES:
        names = [f.name for f in dataclasses.fields(value)]
        return {
            "dataclass": type(value).__name__,
            "fields": {n: encode(getattr(value, n), tensors, f"{path}.{n}") for n in names},
        }
    raise TypeError(f"{path}: expected a tensor, number, string or configuration, got {value!r}")


def decode(tree: Any, tensors: Tensors) -> Any:
    """The inverse of `encode`; lists come back as lists."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "float" in tree:
        return float(tree["float"])
    if "dtype" in tree:
        return getattr(torch, tree["dtype"])
    if "dict" in tree:
        return {name: decode(item, tensors) for name, item in tree["dict"].items()}
    made = {name: decode(item, tensors) for name, item in tree["fields"].items()}
    if tree["dataclass"] == QuantizedTensor.__name__:
        made["shape"] = tuple(made["shape"])
    return _DATACLASSES[tree["dataclass"]](**made)


def pack(value: Any) -> tuple[str, bytes]:
    """`value` as a JSON string and a safetensors blob."""
    tensors: Tensors = {}
    tree = encode(value, tensors)
    return json.dumps(tree), save_tensors(tensors)


def unpack(packed: tuple[str, bytes]) -> Any:
    """The inverse of `pack`."""
    text, blob = packed
    return decode(json.loads(text), load_tensors(blob))


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name `value`, to the bit."""
    text, blob = pack(value)
    return hashlib.sha256(text.encode() + blob).hexdigest()[:12]


def walk(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `value` with their dotted paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from walk(item, f"{path}.{i}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, f"{path}.{name}".lstrip("."))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from walk(getattr(value, f.name), f"{path}.{f.name}".lstrip("."))


def replace_tensors(value: Any, change: Any, path: str = "") -> Any:
    """`value` with `change(path, tensor)` in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return change(path, value)
    if isinstance(value, list | tuple):
        made = [
            replace_tensors(item, change, f"{path}.{i}".lstrip(".")) for i, item in enumerate(value)
        ]
        return type(value)(made)
    if isinstance(value, dict):
        return {
            name: replace_tensors(item, change, f"{path}.{name}".lstrip("."))
            for name, item in value.items()
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{
                f.name: replace_tensors(
                    getattr(value, f.name), change, f"{path}.{f.name}".lstrip(".")
                )
                for f in dataclasses.fields(value)
            }
        )
    return value
