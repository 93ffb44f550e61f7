"""The fast implementations as targets of the conformance suite."""

from dataclasses import replace

import torch
import torch.distributed as dist
from moe_conformance.target import Capabilities, Target, Unsupported, suite_version
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
from moe_reference.quantized_checks import check_quantized
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_optimized import alignment, dispatch, gating, layer, load_balancing
from moe_optimized import expert_parallel as _expert_parallel
from moe_optimized import experts as _experts
from moe_optimized import quantized_experts as _quantized
from moe_optimized.dispatch import Policy
from moe_optimized.experts_decode import run_decode
from moe_optimized.interpreter import INTERPRETED, require_triton
from moe_optimized.quantized_dequantize import refusal_of_tensor
from moe_optimized.quantized_layout import CODES

_TORCH_ROUNDING = (
    # The products of `experts_batched` have their operands' dtype, x's. `experts` and `layer` round
    # nothing on a CPU but the pre-activation that they keep for the backward.
    "pre_activation",
    "activation",
    "expert_output",
)

_KERNEL_ROUNDING = (
    # The kernels round where a result goes to memory: between the two products, and before the
    # gather that weighs and adds up in float32.
    "activation",
    "expert_output",
    "shared_output",
)

# On a GPU kernels, or, where Triton is not installed, grouped products in x's dtype.
_GPU_ROUNDING = ("expert_input", "shared_output")


class Optimized(Target):
    """What a user gets on this device: compiled kernels on a GPU, products of torch on a CPU."""

    name = "optimized"
    version = suite_version()
    capabilities = Capabilities(
        devices=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",),
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
            "expert_parallel",
        ),
        ties="lowest",
        rounding_points=_TORCH_ROUNDING + (_GPU_ROUNDING if torch.cuda.is_available() else ()),
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

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.balance_loss`."""
        return load_balancing.balance_loss(
            logits, expert_ids, config, padding_mask, tokens_per_expert
        )

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.z_loss`."""
        return load_balancing.z_loss(logits, padding_mask)

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.update_bias`."""
        return load_balancing.update_bias(bias, tokens_per_expert, rate, centred)

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

    def drop_to_capacity(
        self,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        num_experts: int,
        capacity: int,
        policy: Policy = "position",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `moe_optimized.dispatch.drop_to_capacity`."""
        return dispatch.drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)

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
        return layer.layer(x, parameters, config, token_ids, padding_mask, training)

    def expert_parallel(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        placement: Placement | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.expert_parallel.expert_parallel`."""
        return _expert_parallel.expert_parallel(
            x, weights, expert_ids, local, num_experts, config, group, placement
        )

    def dequantize(self, packed: QuantizedTensor) -> torch.Tensor:
        """See `moe_optimized.quantized_experts.dequantize`."""
        return _quantized.dequantize(packed)

    def experts_quantized(
        self,
        x: torch.Tensor,
        experts: QuantizedExperts,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.quantized_experts.experts_quantized`."""
        return _quantized.experts_quantized(x, experts, weights, expert_ids, config, expert_map)


class OptimizedTriton(Optimized):
    """The kernels themselves: compiled on a GPU, in Triton's interpreter without one.

    Raises:
        ImportError: when it is constructed where Triton is not installed.
    """

    name = "optimized-triton"
    capabilities = replace(
        Optimized.capabilities,
        devices=("cpu",) if INTERPRETED else ("cuda",),
        # What has no kernel is not provided: dropping sorts and scatters once, in torch.
        operations=tuple(o for o in Optimized.operations() if o != "drop_to_capacity"),
        # Packed experts have no backward kernel.
        gradients=tuple(
            o
            for o in Optimized.capabilities.gradients
            if o not in ("drop_to_capacity", "experts_quantized")
        ),
        # Tensor cores have no float64 product that tl.dot would use, and the kernels accumulate in
        # float32.
        dtypes=("float32", "bfloat16", "float16"),
        rounding_points=_KERNEL_ROUNDING,
        formats=tuple(CODES),
        # What is rounded to float8 has a declaration of its own: `OptimizedFloat8`.
        quantization={"activation_format": (None,)},
        interpreted=INTERPRETED,
    )

    def __init__(self) -> None:
        require_triton()

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `moe_optimized.gating.route_triton`."""
        _refuse_float64("logits", logits)
        return gating.route_triton(logits, config, bias, token_ids)

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.balance_loss_triton`."""
        _refuse_float64("logits", logits)
        return load_balancing.balance_loss_triton(
            logits, expert_ids, config, padding_mask, tokens_per_expert
        )

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.z_loss_triton`."""
        _refuse_float64("logits", logits)
        return load_balancing.z_loss_triton(logits, padding_mask)

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """See `moe_optimized.load_balancing.update_bias_triton`."""
        _refuse_float64("bias", bias)
        return load_balancing.update_bias_triton(bias, tokens_per_expert, rate, centred)

    def align(
        self,
        expert_ids: torch.Tensor,
        block_size: int,
        num_experts: int,
        expert_map: torch.Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.alignment.align_triton`."""
        return alignment.align_triton(expert_ids, block_size, num_experts, expert_map, drop_invalid)

    def align_batched(
        self, tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.alignment.align_batched_triton`."""
        return alignment.align_batched_triton(tokens_per_expert, max_tokens, block_size)

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `moe_optimized.dispatch.dispatch_triton`."""
        _refuse_float64("x", x)
        return dispatch.dispatch_triton(x, expert_ids, num_experts)

    def combine(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `moe_optimized.dispatch.combine_triton`."""
        _refuse_float64("rows", rows)
        return dispatch.combine_triton(rows, slots, weights)

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.experts.experts_triton`."""
        _refuse_float64("x", x)
        return _experts.experts_triton(x, experts, weights, expert_ids, config, expert_map)

    def experts_batched(
        self,
        x: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        experts: ExpertWeights,
        config: ExpertsConfig,
    ) -> torch.Tensor:
        """See `moe_optimized.experts.experts_batched_triton`."""
        _refuse_float64("x", x)
        return _experts.experts_batched_triton(x, tokens_per_expert, experts, config)

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """See `moe_optimized.layer.layer_triton`."""
        _refuse_float64("x", x)
        return layer.layer_triton(x, parameters, config, token_ids, padding_mask, training)

    def expert_parallel(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        placement: Placement | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.expert_parallel.expert_parallel_triton`."""
        _refuse_float64("x", x)
        return _expert_parallel.expert_parallel_triton(
            x, weights, expert_ids, local, num_experts, config, group, placement
        )

    def dequantize(self, packed: QuantizedTensor) -> torch.Tensor:
        """See `moe_optimized.quantized_experts.dequantize_triton`."""
        check_quantized("packed", packed)
        _refuse(refusal_of_tensor(packed))
        return _quantized.dequantize_triton(packed)

    def experts_quantized(
        self,
        x: torch.Tensor,
        experts: QuantizedExperts,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.quantized_experts.experts_quantized_triton`."""
        _refuse_float64("x", x)
        given = (x, experts, weights, expert_ids, config, expert_map)
        _quantized.check_experts_quantized(*given)
        _refuse(_quantized.refusal(x, experts, weights, config))
        return _quantized.experts_quantized_triton(*given)


class OptimizedFloat8(OptimizedTriton):
    """The kernels whose products are of float8 rows and float8 weights."""

    name = "optimized-triton-float8"
    capabilities = replace(
        OptimizedTriton.capabilities,
        operations=("experts_quantized",),
        gradients=(),
        formats=("e4m3",),
        # Scales are counted in tiles of 16 columns and rows; what is rounded is each token's row,
        # once, with a scale of its own.
        quantization={
            "activation_format": ("e4m3", "e4m3_block"),
            "activation_scales": (False,),
            "group_size": (-1, 16, 32, 64, 128),
        },
        experts={"weight_on": ("output",)},
    )


class OptimizedDecode(OptimizedTriton):
    """The kernels for a few tokens, however many there are."""

    name = "optimized-triton-decode"
    capabilities = replace(
        OptimizedTriton.capabilities, operations=("experts",), gradients=(), rounding_points=()
    )

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `moe_optimized.experts_decode.run_decode`."""
        _refuse_float64("x", x)
        _experts.check_experts(x, experts, weights, expert_ids, config, expert_map)
        return run_decode(x, experts, weights, expert_ids, config, expert_map, x.dtype)


def _refuse_float64(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64:
        raise Unsupported(f"{name}: expected float32, bfloat16 or float16, got float64")


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise Unsupported(reason)
