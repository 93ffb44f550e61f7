"""What is known about failures of a library: a TOML file that the matrix takes its links from."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_conformance.registry import requirement_named

FIELDS = ("title", "targets", "requirements", "address")


@dataclass(frozen=True)
class Finding:
    """One cause, and the red cells that it explains.

    Attributes:
        title: what goes wrong, in a line.
        targets: patterns of target names, such as `transformers/*`.
        requirements: ids that are not met because of it.
        address: where it is told in full.
        fields: whatever else the file says about it.
    """

    title: str
    targets: tuple[str, ...]
    requirements: tuple[str, ...]
    address: str
    fields: dict[str, Any]

    def explains(self, target: str, id: str) -> bool:
        """Whether it speaks about this requirement on this target."""
        return id in self.requirements and any(
            fnmatch.fnmatchcase(target, pattern) for pattern in self.targets
        )


def read_findings(path: Path) -> list[Finding]:
    """Read a TOML file with a `[[finding]]` table for each cause.

    Each table has `title`, `targets`, `requirements` and `address`; other fields are kept as they
    are.

    Raises:
        ValueError: the file cannot be read, or a table lacks a field, has one of another kind, or
            names a requirement that there is not.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"findings: expected a TOML file, got '{path}' ({error})") from None
    listed = content.get("finding")
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ValueError(f"findings: expected [[finding]] tables in '{path}', found none")
    return [_finding(each, f"finding {place} of '{path}'") for place, each in enumerate(listed, 1)]


def _finding(each: dict[str, Any], where: str) -> Finding:
    for name in FIELDS:
        kind: type = str if name in ("title", "address") else list
        value = each.get(name)
        if not isinstance(value, kind) or not value:
            word = "a string" if kind is str else "a list of strings"
            raise ValueError(f"{where}: expected {name} to be {word}, got {value!r}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where}: expected {name} to be a list of strings, got {value!r}")
    for id in each["requirements"]:
        try:
            requirement_named(id)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Finding(
        each["title"],
        tuple(each["targets"]),
        tuple(each["requirements"]),
        each["address"],
        {name: value for name, value in each.items() if name not in FIELDS},
    )


def explanations(findings: Sequence[Finding], target: str, id: str) -> list[Finding]:
    """The findings that explain a cell of the matrix; there may be several."""
    return [each for each in findings if each.explains(target, id)]
