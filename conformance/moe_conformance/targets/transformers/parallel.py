"""transformers' expert parallelism: Mixtral's experts, as `apply_expert_parallelism` changes them.

Tried with transformers 5.23.0 on gloo with 2 and 4 ranks; `__init__.py` has the line that installs
it. `AllToAllEP` is what the library takes in training, and wherever ranks have different batches;
`AllReduceEP` at inference on one batch. Here a process group becomes the two meshes that a model's
`DistributedConfig` would make: one of the experts, and one of the ranks that have the same batch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Capabilities, Unsupported
from moe_conformance.targets.transformers.mixtral import Mixtral
from moe_conformance.targets.transformers.tensors import call

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
    from torch.distributed.device_mesh import DeviceMesh


class ExpertParallel(Mixtral):
    """transformers/distributed/expert_parallel.py around `MixtralExperts`."""

    def __init__(self) -> None:
        super().__init__()
        self._alone: dict[dist.ProcessGroup | None, dist.ProcessGroup] = {}

    @classmethod
    def title(cls) -> str:
        """What variants are called by."""
        return "expert_parallel"

    @classmethod
    def declared(cls, backend: str) -> Capabilities:
        """Those of `MixtralExperts`, less what the exchange does not take."""
        operations = ("expert_parallel", "sliced_expert_parallel", "replicated_experts")
        return dataclasses.replace(
            super().declared(backend),
            operations=operations,
            gradients=operations,
            # `send_counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))` counts ids.
            id_dtypes=("int64",),
            experts={**cls.experts_choice, "expert_map": (False,), "invalid_ids": (False,)},
            # `MoEParamShard.shard_param` refuses a number of experts that does not divide.
            expert_parallel={"placement": (False,), "shares": ("even",)},
            # `_AllReduceForward` hands its gradient through, and so does `full_tensor`.
            replicated_gradients="replicate",
            rounding_points=(*cls.experts_rounding, "combine"),
        )

    def expert_parallel(self, *given: Any, **named: Any) -> torch.Tensor:
        """`AllToAllEP` where each rank has a batch of its own, x [T_r, H]."""
        return self._run("all_to_all", False, *given, **named)

    def sliced_expert_parallel(self, *given: Any, **named: Any) -> torch.Tensor:
        """`AllToAllEP` where all ranks share one batch, x [T, H]."""
        return self._run("all_to_all", True, *given, **named)

    def replicated_experts(self, *given: Any, **named: Any) -> torch.Tensor:
        """`AllReduceEP`, x [T, H]."""
        return self._run("all_reduce", True, *given, **named)

    def _run(
        self,
        implementation: str,
        one_batch: bool,
        x: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup,
        placement: Placement | None = None,
    ) -> torch.Tensor:
        import torch
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Shard
        from transformers.distributed.expert_parallel import apply_expert_parallelism

        self._check_experts(x, local, config, invalid_ids=False)
        share, rest = divmod(num_experts, dist.get_world_size(group))
        if placement is not None or rest:
            raise Unsupported(f"{self.name}: no placement, and as many experts on each rank")
        if len(local.down) != share:
            # The library cuts a checkpoint itself; what comes here has been cut already.
            raise ValueError(f"local: expected {share} experts, got {len(local.down)}")
        ep_mesh = _mesh(group, x)
        tp_mesh = ep_mesh if one_batch else _mesh(self._group_of_this_rank(), x)
        model = torch.nn.Module()
        model.experts = self._module(
            self.experts_class,
            **self._sizes(num_experts, x.shape[1], local.down.shape[2]),
            **self._experts_fields(config),
        )
        # It is changed in place, and bound to this group: not one to keep.
        self._modules.clear()
        plan = {
            name.removeprefix("layers.*.mlp."): style
            for name, style in self._config_class.base_model_ep_plan.items()
        }
        apply_expert_parallelism(model, ep_mesh, tp_mesh, plan, implementation)
        parameters = {
            name: DTensor.from_local(tensor, ep_mesh, [Shard(0)], run_check=False)
            for name, tensor in self._experts_parameters(local).items()
        }
        return call(model.experts, parameters, x, expert_ids, weights)

    def _group_of_this_rank(self) -> dist.ProcessGroup:
        """No other rank has this one's batch; made once in each world."""
        import torch.distributed as dist

        world = dist.group.WORLD
        if world not in self._alone:
            self._alone[world] = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return self._alone[world]


def _mesh(group: dist.ProcessGroup, x: torch.Tensor) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, x.device.type, mesh_dim_names=("ranks",))
