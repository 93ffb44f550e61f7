"""How the library's modules are made, and what becomes of a call outside the declaration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Unsupported
from moe_conformance.targets.adapter import (
    has_bias,
    refuse_experts,
    refuse_layer,
    refuse_routing,
    refuse_tensor,
)
from moe_conformance.targets.transformers.choices import BACKENDS
from moe_conformance.targets.transformers.declaration import Declaration

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

    def _check_routing(
        self, x: torch.Tensor, config: Routing, bias: torch.Tensor | None, num_experts: int
    ) -> None:
        refuse_tensor(self, x)
        self._check_experts_number(num_experts)
        refuse_routing(self, config, bias)

    def _check_experts(
        self, x: torch.Tensor, experts: ExpertWeights, config: ExpertsConfig, **flags: bool
    ) -> None:
        refuse_tensor(self, x)
        refuse_experts(self, experts, config, **flags)

    def _check_experts_number(self, num_experts: int) -> None:
        if num_experts < self.capabilities.min_experts:
            raise Unsupported(f"{self.name}: no E = {num_experts}")

    def _check_layer(self, x: torch.Tensor, parameters: LayerWeights, config: LayerConfig) -> None:
        self._check_experts_number(parameters.router.shape[0])
        if parameters.shared is not None and has_bias(parameters.shared):
            raise Unsupported(f"{self.name}: no biases in the shared expert")
        refuse_layer(self, x, parameters, config)
