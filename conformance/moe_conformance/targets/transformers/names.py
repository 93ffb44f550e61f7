"""What a family translates: configurations and parameters by the names that the library has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.targets.transformers.choices import ACTIVATIONS
from moe_conformance.targets.transformers.modules import Modules
from moe_conformance.targets.transformers.tensors import shared_expert

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights, LayerWeights
    from moe_reference.config import RoutingConfig as Routing


class Names(Modules):
    """The translations that most families have in common."""

    shared: ClassVar[str | None] = None
    """What the block calls its shared expert."""

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        """The configuration fields for the three sizes."""
        return {
            "hidden_size": hidden,
            "num_local_experts": num_experts,
            "intermediate_size": intermediate,
        }

    def _routing_fields(self, config: Routing) -> dict[str, Any]:
        """The configuration fields for a routing."""
        return {"num_experts_per_tok": config.top_k}

    def _experts_fields(self, config: ExpertsConfig) -> dict[str, Any]:
        """The configuration fields for the experts."""
        return {"hidden_act": ACTIVATIONS[config.activation]}

    def _router(self, config: Routing) -> str:
        """The class of the router."""
        return self.router_class

    def _router_inputs(
        self, config: Routing, bias: torch.Tensor | None, token_ids: torch.Tensor | None, like: Any
    ) -> tuple[torch.Tensor, ...]:
        """What the router is called with behind the hidden states `like`."""
        return ()

    def _router_parameters(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        selection_bias: torch.Tensor | None,
        config: Routing,
    ) -> dict[str, torch.Tensor]:
        """The router's parameters by their names in the library."""
        return {"weight": weight}

    def _router_dtype(self, given: torch.dtype | None, x: torch.Tensor) -> torch.dtype | None:
        """What a block's router is stored in; None leaves it as it is."""
        # A block has one dtype: `F.linear` takes no wider weight than its input.
        return x.dtype if given is None else None

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """The experts' parameters by their names and in their layout in the library.

        Parameters of a module are contiguous, whatever the tensors were that it was loaded from.
        """
        return {
            "gate_up_proj": experts.gate_up.contiguous(),
            "down_proj": experts.down.contiguous(),
        }

    def _block_arguments(self) -> tuple[Any, ...]:
        """What the block's class takes behind the configuration."""
        return ()

    def _block_inputs(
        self, config: Routing, token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """What the block is called with behind x."""
        return ()

    def _block_parameters(
        self, parameters: LayerWeights, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The parameters that are neither the router's nor the experts'."""
        return {} if self.shared is None else shared_expert(self.shared, parameters.shared, x)
