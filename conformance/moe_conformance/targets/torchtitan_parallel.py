"""torchtitan's expert parallelism: `RoutedExperts` with `AllToAllTokenDispatcher`.

Tried with torchtitan 0.3.0 on gloo with 2 and 4 ranks; `torchtitan.py` has the line that installs
it, and says which translations are made. Here the process group becomes the dispatcher's mesh, as
`RoutedExperts.parallelize` hands it one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_conformance.target import Capabilities, Unsupported
from moe_conformance.targets.adapter import refuse_experts, refuse_tensor
from moe_conformance.targets.torchtitan_parts import (
    DTYPES,
    TorchTitanTarget,
    call,
    counts_of,
    elsewhere,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from moe_reference.config import ExpertsConfig, ExpertWeights, Placement


class ExpertParallel(TorchTitanTarget):
    """`AllToAllTokenDispatcher` around `GroupedExperts`, on the ranks of a process group."""

    name = "torchtitan/expert_parallel"
    capabilities = Capabilities(
        dtypes=DTYPES,
        # `GroupedExperts.forward` casts rows and weights, whatever they are, and its result back.
        experts_dtype="bfloat16",
        experts={
            "activation": ("silu",),
            "gated": (True,),
            "bias": (False,),
            "weight_on": ("output",),
            "invalid_ids": (False,),
        },
        expert_parallel={
            "placement": (False,),
            # `num_local_tokens_per_expert_E.view(ep_size, -1)` in `AllToAllTokenDispatcher`.
            "shares": ("even",),
        },
        hidden_multiple=8,
        intermediate_multiple=8,
        gradients=("expert_parallel",),
        strides=False,
        mixed_dtypes=False,
        rounding_points=(
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
            "weighted_output",
            "combine",
        ),
    )

    def expert_parallel(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup,
        placement: Placement | None = None,
    ) -> torch.Tensor:
        """The routed experts on this rank's x [T_r, H], as a batch of one sequence."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        refuse_tensor(self, x)
        refuse_experts(self, local, config, invalid_ids=elsewhere(expert_ids, num_experts))
        if placement is not None:
            raise Unsupported(f"{self.name}: no placement")
        ranks = dist.get_world_size(group)
        if num_experts % ranks:
            raise Unsupported(f"{self.name}: no {num_experts} experts on {ranks} ranks")
        top_k = expert_ids.shape[1]
        # Not kept: the dispatcher holds the mesh of one group.
        module = self._built(
            self._routed_config(local, config, num_experts, top_k, "AllToAllTokenDispatcher")
        )
        mesh = DeviceMesh.from_group(group, x.device.type, mesh_dim_names=("ep",))
        module.token_dispatcher.wire_meshes(ep_mesh=mesh)
        counts = counts_of(expert_ids, num_experts)
        parameters = self._experts_parameters(local)
        out = call(module, parameters, x[None], weights[None], expert_ids[None], counts)
        return out[0]
