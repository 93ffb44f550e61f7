"""Safetensors files: read tensor by tensor, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, or of a folder of them; each is read when asked for.

    Args:
        path: a file, or a folder with an index (`model.safetensors.index.json`) or without.

    Raises:
        FileNotFoundError: no such file, or no safetensors file in the folder.
        ValueError: the index names a file that is not there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        self._file_of: dict[str, Path] = {}
        index = path / INDEX
        if index.is_file():
            listed = json.loads(index.read_text())["weight_map"]
            self._file_of = {name: path / file for name, file in listed.items()}
            absent = sorted({file.name for file in self._file_of.values() if not file.is_file()})
            if absent:
                raise ValueError(f"path: expected the files that {index} names, got no {absent}")
            return
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"path: expected a safetensors file or a folder, got {path}")
        for file in files:
            with safe_open(file, "pt") as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Write a safetensors file: beside the place first, so that there is never half a file.

    Args:
        tensors: by name, any strides.
        path: the file; one that is there is replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors({"gate.weight": torch.ones(2, 1)}, f"{folder}/layer.safetensors")
    ...     list(Checkpoint(folder))
    ['gate.weight']
    """
    path = Path(path)
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        # A copy each: tensors that share memory are refused.
        copies = {name: each.detach().clone(memory_format=torch.contiguous_format)
                  for name, each in tensors.items()}  # fmt: skip
        save_file(copies, beside)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
