"""Targets that are always there: the reference, and an adapter for each library that has one."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from moe_reference import (
    alignment,
    dispatch,
    expert_slicing,
    gating,
    layer,
    load_balancing,
    placement,
    quantization,
)
from moe_reference import expert_parallel as _expert_parallel
from moe_reference import experts as _experts
from moe_reference.capacity import Policy
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerOutput,
    LayerWeights,
    Placement,
    RoutingConfig,
)
from moe_reference.domain_transforms import sliced_expert_parallel
from moe_reference.partial_sums import replicated_experts, shared_tensor_parallel
from moe_reference.quantized_experts import experts_quantized
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor
from moe_reference.ranks import ProcessRanks

from moe_conformance.target import Capabilities, Target, suite_version

Tensor = torch.Tensor

LIBRARIES = {
    "deepspeed": "deepspeed",
    "liger-kernel": "liger_kernel",
    "lucidrains": "mixture_of_experts",
    "megatron-core": "megatron",
    "moe-ops": "moe_ops",
    "olmo-core": "olmo_core",
    "sglang": "sglang",
    "torchtitan": "torchtitan",
    "transformers": "transformers",
    "vllm": "vllm",
}
"""The package that has to be installed for the targets of an entry point of ours."""


class Reference(Target):
    """`moe_reference` itself. Subclass it to change one operation and see what notices.

    The oracle is the same code in float64, so this target shows that float32, bfloat16 and float16
    inputs stay within the tolerance that the suite derives, and that the suite accuses nobody.
    """

    name = "reference"
    version = suite_version()
    capabilities = Capabilities(
        devices=("cpu", "cuda", "mps"),
        dtypes=("float32", "bfloat16", "float16", "float64"),
        gradients=(
            "route",
            "balance_loss",
            "z_loss",
            "dispatch",
            "combine",
            "drop_to_capacity",
            "experts",
            "experts_batched",
            "experts_quantized",
            "layer",
            "slice_experts",
            "slice_tensor_parallel",
            "expert_parallel",
            "sliced_expert_parallel",
            "replicated_experts",
            "shared_tensor_parallel",
        ),
        ties="lowest",
    )

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `moe_reference.gating.route`."""
        return gating.route(logits, config, bias, token_ids)

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        """See `moe_reference.load_balancing.balance_loss`."""
        return load_balancing.balance_loss(
            logits, expert_ids, config, padding_mask, tokens_per_expert
        )

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """See `moe_reference.load_balancing.z_loss`."""
        return load_balancing.z_loss(logits, padding_mask)

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        """See `moe_reference.load_balancing.update_bias`."""
        return load_balancing.update_bias(bias, tokens_per_expert, rate, centred)

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `moe_reference.alignment.align`."""
        return alignment.align(expert_ids, block_size, num_experts, expert_map, drop_invalid)

    def align_batched(
        self, tokens_per_expert: Tensor, max_tokens: int, block_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `moe_reference.alignment.align_batched`."""
        return alignment.align_batched(tokens_per_expert, max_tokens, block_size)

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `moe_reference.dispatch.dispatch`."""
        return dispatch.dispatch(x, expert_ids, num_experts)

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See `moe_reference.dispatch.combine`."""
        return dispatch.combine(rows, slots, weights)

    def drop_to_capacity(
        self,
        weights: Tensor,
        expert_ids: Tensor,
        num_experts: int,
        capacity: int,
        policy: str,
    ) -> tuple[Tensor, Tensor]:
        """See `moe_reference.dispatch.drop_to_capacity`."""
        return dispatch.drop_to_capacity(
            weights, expert_ids, num_experts, capacity, cast(Policy, policy)
        )

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See `moe_reference.experts.experts`."""
        return _experts.experts(x, experts, weights, expert_ids, config, expert_map)

    def experts_batched(
        self, x: Tensor, tokens_per_expert: Tensor, experts: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See `moe_reference.experts.experts_batched`."""
        return _experts.experts_batched(x, tokens_per_expert, experts, config)

    def layer(
        self,
        x: Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """See `moe_reference.layer.layer`."""
        return layer.layer(x, parameters, config, token_ids, padding_mask, training)

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
        """See `moe_reference.expert_slicing.assign_experts`."""
        return expert_slicing.assign_experts(num_experts, world_size, rank)

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See `moe_reference.expert_slicing.slice_experts`."""
        return expert_slicing.slice_experts(experts, start, count)

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See `moe_reference.expert_slicing.slice_tensor_parallel`."""
        return expert_slicing.slice_tensor_parallel(experts, world_size, rank)

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See `moe_reference.placement.place_experts`."""
        return placement.place_experts(load, num_physical, num_ranks)

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
        """See `moe_reference.expert_parallel.expert_parallel`."""
        return _expert_parallel.expert_parallel(
            x, weights, expert_ids, local, num_experts, config, group, placement
        )

    def sliced_expert_parallel(
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
        """See `moe_reference.domain_transforms.sliced_expert_parallel`; routed before."""
        ranks = ProcessRanks(group)
        [y] = sliced_expert_parallel(
            [x],
            lambda *_: (weights, expert_ids),
            [local],
            num_experts,
            config,
            everybody=ranks,
            tensor_parallel=ranks,
            placement=placement,
        )
        return y

    def replicated_experts(
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
        """See `moe_reference.partial_sums.replicated_experts`."""
        ranks = ProcessRanks(group)
        [y] = replicated_experts(
            [x], [weights], [expert_ids], [local], num_experts, config, ranks, placement
        )
        return y

    def shared_tensor_parallel(
        self,
        x: Tensor,
        part: ExpertWeights,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        shared_gate: Tensor | None = None,
        shared_scale: float = 1.0,
    ) -> Tensor:
        """See `moe_reference.partial_sums.shared_tensor_parallel`."""
        gate = None if shared_gate is None else [shared_gate]
        [y] = shared_tensor_parallel([x], [part], config, ProcessRanks(group), gate, shared_scale)
        return y

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """See `moe_reference.quantization.dequantize`."""
        return quantization.dequantize(packed)

    def experts_quantized(
        self,
        x: Tensor,
        experts: QuantizedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See `moe_reference.quantized_experts.experts_quantized`."""
        return experts_quantized(x, experts, weights, expert_ids, config, expert_map)
