"""What every target of transformers is: routers and a loss, and here the experts and the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_conformance.target import Unsupported
from moe_conformance.targets.adapter import dtype_name
from moe_conformance.targets.transformers.routers import Routers
from moe_conformance.targets.transformers.tensors import call, widen

if TYPE_CHECKING:
    import torch
    from moe_reference.config import (
        ExpertsConfig,
        ExpertWeights,
        LayerConfig,
        LayerOutput,
        LayerWeights,
    )


class TransformersTarget(Routers):
    """What the families have in common.

    A subclass names the library's classes and translates configurations; `variants` makes one more
    subclass per backend, with `name`, `version`, `backend` and `capabilities`.
    """

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The family's experts on x [T, H], through this variant's backend."""
        num_experts = experts.down.shape[0]
        if expert_map is None:
            local_ids = expert_ids
            absent = (expert_ids < 0) | (expert_ids >= num_experts)
        else:
            known = (expert_ids >= 0) & (expert_ids < expert_map.shape[0])
            local_ids = expert_map[expert_ids.masked_fill(~known, 0)].to(expert_ids.dtype)
            absent = ~known | (local_ids < 0) | (local_ids >= num_experts)
        sharded = expert_map is not None or bool(absent.any())
        self._check_experts(
            x, experts, config, expert_map=expert_map is not None, invalid_ids=bool(absent.any())
        )
        if dtype_name(expert_ids.dtype) not in self.capabilities.id_dtypes:
            raise Unsupported(f"{self.name}: no {dtype_name(expert_ids.dtype)} ids")
        if sharded:
            local_ids = local_ids.masked_fill(absent, num_experts)
            weights = weights.masked_fill(absent, 0.0)
        module = self._module(
            self.experts_class,
            **self._sizes(num_experts, x.shape[-1], experts.down.shape[2]),
            **self._experts_fields(config),
        )
        # `MoEParamShard.shard_param` sets this on a rank that holds a part of the experts.
        module._is_expert_parallel = sharded  # type: ignore[assignment]
        return call(module, self._experts_parameters(experts), x, local_ids, weights)

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """The family's whole block on x [N, L, H].

        Ids and weights are what its router returned in this very forward, seen by a hook. The
        blocks know no padding mask: a padded token is computed like any other.
        """
        from moe_reference.config import LayerOutput

        self._check_layer(x, parameters, config)
        num_experts, _, intermediate = parameters.experts.down.shape
        block = self._module(
            self.block_class,
            *self._block_arguments(),
            **self._sizes(num_experts, x.shape[-1], intermediate),
            **self._routing_fields(config.routing),
            **self._experts_fields(config.experts),
        )
        block.train(training)
        gate, gate_bias = parameters.router, parameters.router_bias
        stored = self._router_dtype(config.router_dtype, x)
        if stored is not None:
            gate = gate.to(stored)
            gate_bias = None if gate_bias is None else gate_bias.to(stored)
        router = self._router_parameters(gate, gate_bias, parameters.selection_bias, config.routing)
        state = {
            **{f"{self.gate}.{name}": value for name, value in router.items()},
            **{
                f"experts.{name}": value
                for name, value in self._experts_parameters(parameters.experts).items()
            },
            **self._block_parameters(parameters, x),
        }
        with self._watch(block.get_submodule(self.gate)) as routed:
            output = call(block, state, x, *self._block_inputs(config.routing, token_ids))
        [(weights, expert_ids)] = routed
        return LayerOutput(
            # GptOssMLP returns its routing weights beside the output.
            output=output[0] if isinstance(output, tuple) else output,
            expert_ids=expert_ids,
            weights=widen(weights, x),
        )
