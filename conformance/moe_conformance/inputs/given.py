"""What a property is tried on: a strategy that draws a plan, and a function that builds the inputs.

A plan is a small dictionary of integers, names and one seed: what Hypothesis draws, shrinks and
prints. Tensor contents follow from the seed through NumPy's Philox, a counter-based generator whose
stream is the same on every machine, so that a plan gives the same bytes everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st

from moe_conformance.target import Capabilities

Plan = dict[str, Any]
Inputs = dict[str, Any]
Plans = st.SearchStrategy[Plan]
T = TypeVar("T")

ID_DTYPES = {"int64": torch.int64, "int32": torch.int32}


@dataclass(frozen=True)
class Scope:
    """What may be drawn: the target's declaration, narrowed by the command line.

    Attributes:
        capabilities: the declaration.
        operations: what the target provides.
        device: where the target runs.
        dtypes: the dtypes to draw from.
        interpreted: the target runs in an interpreter and gets smaller sizes.
        world_sizes: numbers of ranks that `expert_parallel` is tried on.
    """

    capabilities: Capabilities
    operations: tuple[str, ...]
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    interpreted: bool = False
    world_sizes: tuple[int, ...] = (2, 4)


@st.composite
def planned(draw: st.DrawFn, plan: Callable[[st.DrawFn], Plan]) -> Plan:
    """The plans that a function draws.

    Hypothesis reads the source of a function that it makes a strategy of: once here, and not of
    each function for each requirement.
    """
    return plan(draw)


@dataclass(frozen=True)
class Given:
    """A way to draw plans inside a scope, and to build inputs from a plan.

    Attributes:
        plans: the strategy, or None where nothing of the kind lies inside the declaration.
        build: from a plan to named arguments; the same plan gives the same bytes.
    """

    plans: Callable[[Scope], Plans | None]
    build: Callable[[Plan], Inputs]


class Content:
    """Tensor contents from one seed.

    Args:
        seed: any integer from 0 to 2**32 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.Philox(key=seed))

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Normal values, float64."""
        return torch.from_numpy(np.asarray(self._random.standard_normal(shape) * std))

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Uniform values, float64."""
        return torch.from_numpy(self._random.uniform(low, high, shape))

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers from `low` to `high`, both included, int64."""
        return torch.from_numpy(self._random.integers(low, high, shape, endpoint=True))

    def permutation(self, size: int) -> torch.Tensor:
        """A random order of 0 … size - 1, int64."""
        return torch.from_numpy(self._random.permutation(size))

    def distinct(self, rows: int, size: int, count: int) -> torch.Tensor:
        """`count` distinct integers below `size` in each of `rows` rows, int64."""
        return torch.from_numpy(
            np.argsort(self._random.random((rows, size)), axis=1)[:, :count].copy()
        )


@functools.cache
def seeds() -> st.SearchStrategy[int]:
    """One seed for all of a case's contents."""
    return st.integers(0, 2**32 - 1)


def choice(values: Iterable[T]) -> st.SearchStrategy[T]:
    """`st.sampled_from`, made once for the same values: to make it takes longer than to draw."""
    values = tuple(values)
    try:
        # True and 1 are the same key of a dictionary, and not the same value.
        return _choice(values, tuple(map(type, values)))
    except TypeError:  # a value that cannot be a key
        return st.sampled_from(values)


@functools.cache
def _choice(values: tuple[T, ...], types: tuple[type, ...]) -> st.SearchStrategy[T]:
    return st.sampled_from(values)


@functools.cache
def sizes(largest: int, *blocks: int, least: int = 1) -> st.SearchStrategy[int]:
    """A size from `least` to `largest`, often on a multiple of a block or one off it.

    Args:
        largest: the largest size.
        blocks: tile sizes that kernels use, such as 16 or 64.
        least: the smallest size.
    """
    edges = sorted(
        {
            size
            for block in blocks
            for multiple in (1, 2, 3)
            for size in (block * multiple - 1, block * multiple, block * multiple + 1)
            if least <= size <= largest
        }
    )
    small = st.integers(least, min(largest, least + 5))
    anywhere = st.integers(least, largest)
    return (
        st.one_of(small, anywhere, st.sampled_from(edges)) if edges else st.one_of(small, anywhere)
    )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def loads_inside(scope: Scope, loads: tuple[str, ...]) -> tuple[str, ...]:
    """The loads that the declaration allows: `duplicates` repeats ids within a row."""
    if scope.capabilities.repeated_ids:
        return loads
    return tuple(load for load in loads if load != "duplicates")


def distinct_rows(scope: Scope) -> Plan:
    """What a plan holds where the ids of a row have to differ."""
    return {} if scope.capabilities.repeated_ids else {"distinct": True}


def deterministic(given: Given) -> Given:
    """The same inputs, for targets that are declared deterministic."""
    return Given(
        lambda scope: given.plans(scope) if scope.capabilities.deterministic else None, given.build
    )


def either(*givens: Given) -> Given:
    """The inputs of any of these, all of them built alike."""

    def plans(scope: Scope) -> Plans | None:
        possible = [found for each in givens if (found := each.plans(scope)) is not None]
        return st.one_of(possible) if possible else None

    return Given(plans, givens[0].build)


def differentiable(operation: str, given: Given) -> Given:
    """The same inputs, for targets whose outputs of that operation carry gradients."""
    return Given(
        lambda scope: given.plans(scope) if operation in scope.capabilities.gradients else None,
        given.build,
    )
