"""TensorCast's MoE layer.

- `route` is the layer's way with a gate that returns logits, as its configuration says of it.
- `experts`, `layer` and `expert_parallel` are its dispatch, experts and combine; the experts are a
  list of modules. Stacked ones are called with arguments that the text does not explain.
- `assign_experts` is its own, `slice_experts` that of stacked experts.
- `place_experts` is what it does with redundant experts.

The operators that score, permute and put back, the exchange between ranks, the gate and the experts
are called and not shown. Its target `tensorcast-scores` has the layer's way with a gate that
returns one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerOutput,
    LayerWeights,
    Placement,
    RoutingConfig,
)
from moe_reference.layer import router_logits

from moe_conformance.target import Capabilities, Target, Unsupported, suite_version
from moe_conformance.targets.documents.parts import experts_of
from moe_conformance.targets.documents.tensorcast_fused import ALONE, Ranks, assign_experts, fused

Tensor = torch.Tensor

ROUTING: dict[str, tuple[Any, ...]] = {
    "score": ("softmax",),
    "order": ("score_then_topk",),
    "norm": ("sum",),
    "epsilon": (0.0,),
    "renormalize_single": (True,),
    "scale": (1.0,),
    "num_groups": (1,),
    "selection_bias": (False,),
    "hash_table": (False,),
}


class TensorCast(Target):
    """As its text has it."""

    name = "documents/tensorcast"
    version = suite_version()
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16", "float64"),
        routing=ROUTING,
        # What the operators do with ids that are no experts is not shown.
        experts={"weight_on": ("output",), "expert_map": (False,), "invalid_ids": (False,)},
        layer={"balance": (None,), "shared_scale": (1.0,), "padding_mask": (False,)},
        expert_parallel={"placement": (False,)},
        gradients=("route", "experts", "layer"),
        rounding_points=("router_weights", "expert_output", "weighted_output", "shared_output"),
    )

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Softmax, the K best, and perhaps a division by their sum."""
        weights, ids = _choose(logits, config, logits.dtype)
        return _widen(weights), ids

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """On a single rank."""
        if expert_map is not None:
            raise Unsupported("the text has no expert map")
        listed = experts_of(experts, config)
        return fused(x, expert_ids, weights, listed, len(listed), ALONE)

    def layer(
        self,
        x: Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """Route, run the experts, add the shared expert."""
        logits = router_logits(x.flatten(0, 1), parameters, config).unflatten(0, x.shape[:2])
        weights, ids = _choose(logits, config.routing, x.dtype)
        listed = experts_of(parameters.experts, config.experts)
        out = fused(x, ids, weights, listed, len(listed), ALONE)
        if parameters.shared is not None:
            shared = experts_of(parameters.shared, config.experts)[0](x)
            if parameters.shared_gate is not None:
                gate = parameters.shared_gate.to(x.dtype)
                shared = torch.sigmoid(torch.nn.functional.linear(x, gate)) * shared
            out = out + shared
        return LayerOutput(out.to(x.dtype), ids.flatten(0, 1), _widen(weights).flatten(0, 1))

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
        """A contiguous share. Wrong: nothing asks whether there is such a rank."""
        return assign_experts(num_experts, world_size, rank)

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """The matrices are cut, as views. Wrong: the biases stay those of all experts."""
        mine = slice(start, start + count)
        return ExpertWeights(
            experts.gate_up.data[mine],
            experts.down.data[mine],
            experts.gate_up_bias,
            experts.down_bias,
        )

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """Redundant experts. Wrong: all are copies of expert 0, and the router knows of none."""
        E = len(load)
        shares = [assign_experts(num_physical, num_ranks, rank) for rank in range(num_ranks)]
        return Placement(
            physical_to_logical=torch.arange(num_physical).where(torch.arange(num_physical) < E, 0),
            # No table leads from an expert to its copies: an id means the physical expert itself.
            logical_to_physical=torch.arange(E)[:, None],
            replica_count=torch.ones(E, dtype=torch.int64),
            rank_of_physical=torch.arange(num_ranks).repeat_interleave(
                torch.tensor([count for _, count in shares])
            ),
        )

    def expert_parallel(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        placement: Placement | None = None,
    ) -> Tensor:
        """There and back with sizes that are guessed."""
        if placement is not None:
            raise Unsupported("the text has no placement")
        ranks = Ranks(dist.get_rank(group), dist.get_world_size(group), group)
        return fused(x, expert_ids, weights, experts_of(local, config), num_experts, ranks)


class TensorCastScores(Target):
    """The layer's way with a gate that returns one tensor, here the logits."""

    name = "documents/tensorcast-scores"
    version = suite_version()
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16", "float64"),
        # Neither a score nor a division is in the text's way with such a gate.
        routing={**ROUTING, "renormalize": (False,)},
        gradients=("route",),
        rounding_points=("router_weights",),
    )

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The K largest values. Wrong: they are the weights as they are."""
        weights, ids = torch.topk(logits, config.top_k, dim=-1)
        return _widen(weights), ids


def _choose(logits: Tensor, config: RoutingConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in the dtype of the hidden states, and ids."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights, ids = logits.to(wide).softmax(dim=-1).topk(config.top_k, dim=-1)
    if config.renormalize:
        # Wrong: without an epsilon, and where K = 1 the router learns nothing.
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(dtype), ids


def _widen(weights: Tensor) -> Tensor:
    """What was rounded, in the dtype that weights are given back in."""
    return weights if weights.dtype == torch.float64 else weights.float()
