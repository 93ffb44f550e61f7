"""What the adapters of libraries share: the version they need, and refusing what is not declared.

Neither torch nor a library is imported before it is needed.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Target, Unsupported

if TYPE_CHECKING:
    import torch
    from moe_reference.config import (
        ExpertsConfig,
        ExpertWeights,
        LayerConfig,
        LayerWeights,
        RoutingConfig,
    )


def installed(target: str, oldest: tuple[int, int], install: str, *distributions: str) -> str:
    """The version of a library that is there, under the first of its names that is.

    Args:
        target: The target that asks, named in the error.
        oldest: The first version, as (major, minor), that has what is put under test.
        install: The command that installs it.
        distributions: Its names on the package index.

    Raises:
        ImportError: it is missing, or older.

    >>> installed("mine/router", (99, 0), "pip install --upgrade torch", "torch")
    Traceback (most recent call last):
    ...
    ImportError: mine/router needs torch >= 99.0, found ...: pip install --upgrade torch
    """
    found = "none"
    for distribution in distributions:
        try:
            found = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    # A version may end in letters, such as 0.16.1rc2, and need not have a second number.
    numbers = re.match(r"(\d+)(?:\.(\d+))?", found)
    if numbers is None or tuple(map(int, numbers.groups("0"))) < oldest:
        wanted = f"{distributions[0]} >= {oldest[0]}.{oldest[1]}"
        raise ImportError(f"{target} needs {wanted}, found {found}: {install}")
    return found


def field_values(config: Any) -> dict[str, Any]:
    """A configuration's fields by name, with dtypes by their names, as they are declared."""
    import torch

    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: dtype_name(value) if isinstance(value, torch.dtype) else value
        for name, value in values.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def has_bias(experts: ExpertWeights) -> bool:
    """Whether experts have a bias in either product."""
    return experts.gate_up_bias is not None or experts.down_bias is not None


def refuse(target: Target, area: str, asked: Mapping[str, Any]) -> None:
    """Refuse what none of an area's declared alternatives takes.

    Args:
        target: The target that is asked.
        area: Such as `routing`.
        asked: Values by the name of the field; one that is not named is not looked at.

    Raises:
        Unsupported: with the fields that the nearest alternative does not take.
    """
    refused = [
        {n: asked[n] for n, allowed in choice.items() if n in asked and asked[n] not in allowed}
        for choice in target.capabilities.alternatives(area)
    ]
    if all(refused):
        listed = ", ".join(f"{name} = {value!r}" for name, value in min(refused, key=len).items())
        raise Unsupported(f"{target.name}: no {area} with {listed}")


def refuse_tensor(target: Target, x: torch.Tensor) -> None:
    """Refuse another dtype or device than the declared ones.

    Raises:
        Unsupported: naming both.
    """
    declared, dtype = target.capabilities, dtype_name(x.dtype)
    if dtype not in declared.dtypes or x.device.type not in declared.devices:
        raise Unsupported(f"{target.name}: no {dtype} on {x.device.type}")


def refuse_routing(target: Target, config: RoutingConfig, bias: torch.Tensor | None) -> None:
    """Refuse another routing than the declared one.

    Raises:
        Unsupported: with the fields that the nearest alternative does not take.
    """
    flags = {"selection_bias": bias is not None, "hash_table": config.hash_table is not None}
    refuse(target, "routing", field_values(config) | flags)


def refuse_experts(
    target: Target, experts: ExpertWeights, config: ExpertsConfig, **flags: bool
) -> None:
    """Refuse other experts than the declared ones.

    Raises:
        Unsupported: with the fields that the nearest alternative does not take, or with the sizes.
    """
    declared = target.capabilities
    hidden, intermediate = experts.down.shape[1:]
    if hidden % declared.hidden_multiple or intermediate % declared.intermediate_multiple:
        raise Unsupported(f"{target.name}: no H = {hidden} with I = {intermediate}")
    refuse(target, "experts", field_values(config) | {"bias": has_bias(experts)} | flags)


def refuse_layer(
    target: Target, x: torch.Tensor, parameters: LayerWeights, config: LayerConfig, **flags: bool
) -> None:
    """Refuse another layer than the declared one, in any of its parts.

    Raises:
        Unsupported: with the fields that the nearest alternative does not take.
    """
    refuse_tensor(target, x)
    refuse_routing(target, config.routing, parameters.selection_bias)
    refuse_experts(target, parameters.experts, config.experts)
    has = {
        "shared": parameters.shared is not None,
        "shared_gate": parameters.shared_gate is not None,
        "router_bias": parameters.router_bias is not None,
    }
    refuse(target, "layer", field_values(config) | has | flags)


def kept_random_state() -> AbstractContextManager[None]:
    """For making a module: its initial parameters are random, and not used."""
    import torch

    return torch.random.fork_rng(devices=[])
