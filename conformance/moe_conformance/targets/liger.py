"""Liger Kernel under the suite: the fused experts, forward and backward.

What is put under test is `liger_kernel.ops.fused_moe.LigerFusedMoEFunction`, which `LigerExperts`
calls in the place of the experts of transformers' Mixtral, Qwen3-MoE and DeepSeek models. Its
kernels are Triton's; where there is no GPU they run in the interpreter.

Tried with Triton 3.9.0: `pip install --no-deps liger-kernel==0.8.5` (6 s, 4 MB).

No translation is made: layouts, ids and weights are the library's own as they are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from moe_conformance.target import Capabilities, Target
from moe_conformance.targets.adapter import installed, refuse_experts
from moe_conformance.targets.interpreter import interpret_without_gpu, on_this_machine

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights

OLDEST = (0, 8)


class Liger(Target):
    """`LigerFusedMoEFunction` of liger_kernel/ops/fused_moe.py.

    Raises:
        ImportError: Liger Kernel is missing, too old, or has moved the function; or Triton cannot
            run here.
    """

    name = "liger-kernel"
    capabilities = on_this_machine(
        Capabilities(
            devices=("cuda",),
            # Every product is accumulated in a float32 block, which takes no float64 operands.
            dtypes=("float32", "bfloat16", "float16"),
            experts={
                # Gate and up, silu and the weighting of outputs are built into the kernels, and
                # the function has no argument for a bias or a map.
                "activation": ("silu",),
                "gated": (True,),
                "bias": (False,),
                "weight_on": ("output",),
                "expert_map": (False,),
                # `_moe_router_histogram_kernel` adds at the id's own place, wherever that is.
                "invalid_ids": (False,),
            },
            gradients=("experts",),
            # A block of x and one of the experts' weights meet in `tl.dot`, which takes one dtype.
            mixed_dtypes=False,
            # `_moe_bwd_down_proj_kernel` adds up the gradients of routing weights with atomics.
            deterministic=False,
            rounding_points=(
                # Kept in x's dtype for the backward; the forward goes on with float32.
                "pre_activation",
                # Tensors of x's dtype between the kernels.
                "activation",
                "expert_output",
            ),
            # `tl.dot` is called with its default precision, tf32.
            accumulator="tf32",
        )
    )

    def __init__(self) -> None:
        install = "pip install --no-deps liger-kernel==0.8.5"
        type(self).version = installed(self.name, OLDEST, install, "liger-kernel")
        interpret_without_gpu("liger_kernel")
        try:
            module = importlib.import_module("liger_kernel.ops.fused_moe")
            self._function = module.LigerFusedMoEFunction
        except (ModuleNotFoundError, AttributeError) as error:
            raise ImportError(
                f"{self.name}: version {self.version} is not laid out as 0.8 was: {error}"
            ) from None

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`LigerFusedMoEFunction` on x [T, H]."""
        refuse_experts(self, experts, config, expert_map=expert_map is not None)
        return self._function.apply(x, experts.gate_up, experts.down, expert_ids, weights)
