"""The fast implementations as targets of the conformance suite."""

import torch
from moe_conformance.target import Capabilities, Target, Unsupported
from moe_reference.config import ExpertsConfig, ExpertWeights, LayerConfig, LayerOutput
from moe_reference.config import LayerWeights, RoutingConfig

from moe_optimized import alignment, dispatch, gating, layer
from moe_optimized import experts as _experts

_VERSION = "0.1.0"

_GROUPED_ROUNDING = (
    # torch.nn.functional.grouped_mm takes no out_dtype other than its inputs', so that the results
    # of both products are rounded.
    "pre_activation",
    "expert_output",
    # Its inputs have one dtype: x's.
    "activation",
    "expert_input",
    # The shared expert's products round like the others.
    "shared_output",
)


class Optimized(Target):
    """What a user gets on this device: compiled kernels on a GPU, grouped products on a CPU."""

    name = "optimized"
    version = _VERSION
    capabilities = Capabilities(
        devices=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",),
        dtypes=("float32", "bfloat16", "float16", "float64"),
        # Auxiliary losses belong to no module of this package.
        layer={"balance": (None,)},
        gradients=("route", "dispatch", "combine", "experts", "experts_batched", "layer"),
        ties="lowest",
        rounding_points=_GROUPED_ROUNDING,
        accumulator="float32",
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `moe_optimized.gating.route`."""
        return gating.route(logits, config, bias, token_ids)

    def align(
        self,
        expert_ids: torch.Tensor,
        block_size: int,
        num_experts: int,
        expert_map: torch.Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.alignment.align`."""
        return alignment.align(expert_ids, block_size, num_experts, expert_map, drop_invalid)

    def align_batched(
        self, tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.alignment.align_batched`."""
        return alignment.align_batched(tokens_per_expert, max_tokens, block_size)

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.dispatch.dispatch`."""
        return dispatch.dispatch(x, expert_ids, num_experts)

    def combine(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `moe_optimized.dispatch.combine`."""
        return dispatch.combine(rows, slots, weights)

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.experts.experts`."""
        return _experts.experts(x, experts, weights, expert_ids, config, expert_map)

    def experts_batched(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        experts: ExpertWeights,
        config: ExpertsConfig,
    ) -> torch.Tensor:
        """See `moe_optimized.experts.experts_batched`."""
        return _experts.experts_batched(x, tokens_per_expert, experts, config)

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """See `moe_optimized.layer.layer`."""
        if config.balance is not None:
            raise Unsupported("balance: expected None, got a BalanceConfig")
        return layer.layer(x, parameters, config, token_ids, padding_mask, training)
