"""Calls and answers on disk, as JSON beside a safetensors blob, and on a pipe, as bytes.

A value is a tree of None, numbers, strings, dtypes, tensors, lists, dictionaries and the
dataclasses of `moe_reference`. Tensors go into a flat dictionary and leave their key
in the tree, so that what a case was can be read without a program and restored to the last bit.
Bytes take a third of the time, and a case takes two or three trips.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from moe_reference import config as configurations
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor
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


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name `value`, to the bit."""
    tensors: Tensors = {}
    tree = json.dumps(encode(value, tensors))
    return hashlib.sha256(tree.encode() + save_tensors(tensors)).hexdigest()[:12]


def to_bytes(value: Any) -> bytes:
    """`value` for another process of this run.

    Raises:
        TypeError: `value` holds something that has no place in a call.
    """
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    """The inverse of `to_bytes`."""
    return pickle.loads(data)


PLAIN: tuple[Any, ...] = (int, float, str, list, tuple, dict)


class _Pickler(pickle.Pickler):
    """Takes what `encode` takes; on their own, tensors would go through shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sent = bytearray(value.numel() * value.element_size()), value.dtype, tuple(value.shape)
            _tensor(*sent).copy_(value.detach())
            return _tensor, sent
        for kind in PLAIN:
            if isinstance(value, kind):
                return kind, (kind(value),)
        if isinstance(value, torch.dtype | type) or type(value).__name__ in _DATACLASSES:
            return NotImplemented
        if value is _tensor or getattr(value, "__module__", "") == "copyreg":
            return NotImplemented
        raise TypeError(f"expected a tensor, number, string or configuration, got {value!r}")


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def walk(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `value` with their dotted paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for name, item in _parts(value):
        yield from walk(item, f"{path}.{name}" if path else str(name))


def replace_tensors(value: Any, change: Any, path: str = "") -> Any:
    """`value` with `change(path, tensor)` in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return change(path, value)
    parts = _parts(value)
    if not parts and not isinstance(value, (list, tuple, dict)):
        return value
    made = {
        name: replace_tensors(item, change, f"{path}.{name}" if path else str(name))
        for name, item in parts
    }
    if isinstance(value, (list, tuple)):
        return type(value)(made.values())
    return made if isinstance(value, dict) else type(value)(**made)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """What `value` holds, with indices or names; nothing where it is a number or the like."""
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, dict):
        return list(value.items())
    kind: Any = type(value)
    return [(name, getattr(value, name)) for name in _field_names(kind)]


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
