"""Seeded faults: the reference with one thing wrong, and the requirements that have to notice.

They are how the suite is tested. Each is a slip that somebody could make, many are one that
somebody made; it is named after what goes wrong and, where there is one, carries the thread.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from moe_conformance.target import OPERATIONS, Target


@dataclass(frozen=True)
class Fault:
    """One wrong implementation.

    Attributes:
        name: what goes wrong.
        catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
        target: the class to run.
    """

    name: str
    catches: tuple[str, ...]
    thread: str
    target: type[Target]

    @property
    def story(self) -> str:
        """What goes wrong, in a sentence."""
        return (self.target.__doc__ or "").strip().split("\n")[0]

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that the class, or a fault that it inherits from, defines anew."""
        own = [cls for cls in self.target.__mro__ if cls.__module__.startswith(__name__)]
        return tuple(name for name in OPERATIONS if any(name in vars(cls) for cls in own))


_registered: dict[str, Fault] = {}


def fault(
    name: str, *, catches: tuple[str, ...], thread: str = ""
) -> Callable[[type[Target]], type[Target]]:
    """Register the decorated target as a seeded fault."""

    def register(target: type[Target]) -> type[Target]:
        if name in _registered:
            raise ValueError(f"fault {name} was named before")
        target.name = name
        _registered[name] = Fault(name, catches, thread, target)
        return target

    return register


def faults() -> list[Fault]:
    """All seeded faults, in the order of their files."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return list(_registered.values())


def fault_named(name: str) -> Fault:
    """The fault of that name.

    Raises:
        ValueError: there is none.
    """
    known = {each.name: each for each in faults()}
    if name not in known:
        raise ValueError(f"fault: expected one of {', '.join(known)}, got '{name}'")
    return known[name]
