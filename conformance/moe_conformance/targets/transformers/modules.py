"""How the library's modules are made, and what becomes of a call outside the declaration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Unsupported
from moe_conformance.targets.transformers.choices import BACKENDS
from moe_conformance.targets.transformers.declaration import Declaration
from moe_conformance.targets.transformers.tensors import biased, dtype_name, values_of

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights, LayerConfig, LayerWeights
    from moe_reference.config import RoutingConfig as Routing


class Modules(Declaration):
    """The library's classes by name, and modules of them on the meta device.

    Raises:
        ImportError: transformers has moved one of the classes.
    """

    backend: ClassVar[str]
    config_class: ClassVar[str]
    router_class: ClassVar[str]
    experts_class: ClassVar[str]
    block_class: ClassVar[str]
    other_classes: ClassVar[tuple[str, ...]] = ()
    gate: ClassVar[str] = "gate"
    """What the block calls its router."""

    def __init__(self) -> None:
        package = f"transformers.models.{self.family}"
        modeling = importlib.import_module(f"{package}.modeling_{self.family}")
        configuration = importlib.import_module(f"{package}.configuration_{self.family}")
        names = (self.router_class, self.experts_class, self.block_class, *self.other_classes)
        try:
            self._config_class = getattr(configuration, self.config_class)
            self._classes = {name: getattr(modeling, name) for name in names}
        except AttributeError as error:
            raise ImportError(
                f"{self.name}: transformers {self.version} is not laid out as 5.20 was: {error}"
            ) from None
        self._balance_loss = getattr(modeling, "load_balancing_loss_func", None)
        self._modules: dict[Any, torch.nn.Module] = {}

    def _module(self, class_name: str, *arguments: Any, **configuration: Any) -> torch.nn.Module:
        """The library's module for one configuration, made once, with no storage of its own."""
        import torch

        key = (class_name, *sorted(configuration.items()))
        if key not in self._modules:
            config = self._config_class(**configuration)
            if self.backend in BACKENDS:
                config._experts_implementation = self.backend
            with torch.device("meta"):
                self._modules[key] = self._classes[class_name](config, *arguments)
        return self._modules[key]

    def _check_inputs(self, x: torch.Tensor) -> None:
        dtype, device = dtype_name(x.dtype), x.device.type
        if dtype not in self.capabilities.dtypes or device not in self.capabilities.devices:
            raise Unsupported(f"{self.name}: no {dtype} on {device}")

    def _check_routing(
        self, x: torch.Tensor, config: Routing, bias: torch.Tensor | None, num_experts: int
    ) -> None:
        self._check_inputs(x)
        if num_experts < self.capabilities.min_experts:
            raise Unsupported(f"{self.name}: no E = {num_experts}")
        asked = values_of(config)
        asked["hash_table"] = config.hash_table is not None
        self._check_choice("routing", asked | {"selection_bias": bias is not None})

    def _check_experts(
        self, x: torch.Tensor, experts: ExpertWeights, config: ExpertsConfig, **flags: bool
    ) -> None:
        self._check_inputs(x)
        declared = self.capabilities
        hidden, intermediate = experts.down.shape[1:]
        if hidden % declared.hidden_multiple or intermediate % declared.intermediate_multiple:
            raise Unsupported(f"{self.name}: no H = {hidden} with I = {intermediate}")
        asked = values_of(config) | {"bias": biased(experts), "expert_map": False}
        self._check_choice("experts", asked | {"invalid_ids": False} | flags)

    def _check_layer(self, x: torch.Tensor, parameters: LayerWeights, config: LayerConfig) -> None:
        num_experts = parameters.router.shape[0]
        self._check_routing(x, config.routing, parameters.selection_bias, num_experts)
        self._check_experts(x, parameters.experts, config.experts)
        if parameters.shared is not None and biased(parameters.shared):
            raise Unsupported(f"{self.name}: no biases in the shared expert")
        asked = values_of(config) | {
            "shared": parameters.shared is not None,
            "shared_gate": parameters.shared_gate is not None,
            "router_bias": parameters.router_bias is not None,
        }
        self._check_choice("layer", asked)

    def _check_choice(self, area: str, asked: Mapping[str, Any]) -> None:
        refused = [
            {name: asked[name] for name, allowed in choice.items() if asked[name] not in allowed}
            for choice in self.capabilities.alternatives(area)
        ]
        if all(refused):
            nearest = min(refused, key=len)
            listed = ", ".join(f"{name} = {value!r}" for name, value in nearest.items())
            raise Unsupported(f"{self.name}: no {area} with {listed}")
