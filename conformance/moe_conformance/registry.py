"""The requirements: what each says, why, where it comes from, and the property that checks it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_conformance.case import Case
    from moe_conformance.inputs.given import Given

MUST, SHOULD, MAY = "MUST", "SHOULD", "MAY"
ANY = "any"
"""The operation of a requirement that is drawn from all that the target provides."""

AREAS: dict[str, str] = {
    "GATE": "gating",
    "BALANCE": "load_balancing",
    "ALIGN": "alignment",
    "DISPATCH": "dispatch",
    "EXPERT": "experts",
    "LAYER": "layer",
    "SLICE": "expert_slicing",
    "EP": "expert_parallel",
    "QUANT": "quantization",
    "BACKEND": "backends",
    "NUM": "numerics",
}
"""The first part of an id, and the concept that it belongs to."""

RETIRED: frozenset[str] = frozenset()
"""Ids of requirements that are gone. None of them is ever given out again."""


@dataclass(frozen=True)
class Requirement:
    """One numbered sentence of the specification.

    Attributes:
        id: never used twice, never renumbered.
        level: MUST, SHOULD or MAY.
        operation: the operation that it speaks about.
        sentence: what an implementation must do.
        reason: why.
        sources: papers, projects' code, threads of real bugs.
        given: the inputs that the property is tried on.
        check: the property; raises `Violation`.
        also: further operations that the property calls.
        references: dotted names in moe_reference that show how it is done right.
        kinds: how many times the usual number of cases it gets, where its inputs are of so many
            kinds that a fault in one of them would be drawn too seldom (benchmarks/faults.py).
    """

    id: str
    level: str
    operation: str
    sentence: str
    reason: str
    sources: tuple[str, ...]
    given: Given
    check: Callable[[Case], None]
    also: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    kinds: int = 1

    def __reduce__(self) -> Any:
        # Between processes a requirement goes by its id: its inputs and property are functions.
        return requirement_named, (self.id,)

    @property
    def area(self) -> str:
        """The concept: `gating`, `alignment`, …"""
        return AREAS[self.id.split("-")[0]]

    @property
    def title(self) -> str:
        """The property's name as a sentence."""
        return self.check.__name__.replace("_", " ")

    @property
    def property_source(self) -> str:
        """The property's source code, without its decorator."""
        source = inspect.getsource(self.check)
        return source[source.index("def ") :]

    @property
    def faults(self) -> tuple[str, ...]:
        """The names of the seeded faults that it has to catch."""
        from moe_conformance.faults import faults

        return tuple(fault.name for fault in faults() if self.id in fault.catches)


_registered: dict[str, Requirement] = {}


def requirement(
    id: str,
    level: str,
    operation: str,
    sentence: str,
    *,
    reason: str,
    sources: tuple[str, ...],
    given: Given,
    also: tuple[str, ...] = (),
    references: tuple[str, ...] = (),
    kinds: int = 1,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register the decorated property as the check of a requirement."""

    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        if id in _registered or id in RETIRED:
            raise ValueError(f"requirement id {id} was used before")
        _registered[id] = Requirement(
            id, level, operation, sentence, reason, sources, given, check, also, references, kinds
        )
        return check

    return register


def requirements(area: str | None = None) -> list[Requirement]:
    """All requirements, or those of one concept, in reading order."""
    from moe_conformance import requirements as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    order = list(AREAS)

    def place(each: Requirement) -> tuple[int, int]:
        prefix, number = each.id.split("-")
        return order.index(prefix), int(number)

    listed = sorted(_registered.values(), key=place)
    return [each for each in listed if area is None or each.area == area]


def requirement_named(id: str) -> Requirement:
    """The requirement with that id.

    Raises:
        ValueError: there is none.
    """
    # Asked for each case of some requirements: the files are looked through once.
    if id not in _registered:
        first = requirements()[0].id
        if id not in _registered:
            raise ValueError(
                f"requirement: expected an id that `moespec requirements` lists, such as {first}, "
                f"got '{id}'"
            )
    return _registered[id]
