"""vLLM's Triton experts: `fused_moe_kernel` as its layers on a GPU call it.

What is put under test: `TritonExperts.apply` (vllm/model_executor/layers/fused_moe/experts/
triton_moe.py) inside `FusedMoEKernel`, with `invoke_fused_moe_triton_kernel`, and on a GPU
`moe_align_block_size` by itself. Without a GPU the kernel runs in Triton's interpreter, in the
build of vLLM for CPUs; how to install it says `moe_conformance.targets.vllm`. Tried with Triton
3.9.0.

Where there is no GPU two CUDA kernels have stand-ins, and nothing else has: the reference aligns
the slots, and the rows of a token's experts are added up by torch. vLLM takes Triton for missing
unless a CPU backend is installed; while it looks, one is pretended to be.

One translation is made: the given weights become contiguous.

This module imports neither torch nor vllm before a target is made.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Capabilities, Unsupported
from moe_conformance.targets.interpreter import interpret_without_gpu, on_this_machine
from moe_conformance.targets.vllm import VllmTarget
from moe_conformance.targets.vllm_experts import Experts

if TYPE_CHECKING:
    import torch

CHOICE: dict[str, tuple[Any, ...]] = {
    "bias": (False, True),
    "weight_on": ("output",),
    "activation": ("silu", "gelu", "gelu_tanh"),
    # swigluoai and the clamped silu are CUDA kernels of their own.
    "gated": (True,),
}
UNGATED: dict[str, tuple[Any, ...]] = {
    **CHOICE,
    "activation": ("silu", "gelu", "gelu_tanh", "relu2"),
    "gated": (False,),
}
# The sum over K is told which ids a token has only where there is a map.
ALL_HERE = {"expert_map": (False,), "invalid_ids": (False,)}
OF_A_RANK = {"expert_map": (True,), "invalid_ids": (False, True)}


def _declared() -> Capabilities:
    declared = on_this_machine(
        Capabilities(
            devices=("cuda",),
            # `TritonExperts.apply` asserts these, fp8 and int8 aside.
            dtypes=("float32", "bfloat16", "float16"),
            # What the routers return.
            id_dtypes=("int32",),
            operations=("experts",),
            experts=[
                {**activation, **where}
                for where in (ALL_HERE, OF_A_RANK)
                for activation in (CHOICE, UNGATED)
            ],
            # `apply` asserts a contiguous x, and the kernels read ids and weights as such.
            strides=False,
            # `tl.dot` takes two blocks of one dtype.
            mixed_dtypes=False,
            rounding_points=(
                # Three workspaces of x's dtype.
                "pre_activation",
                "activation",
                "weighted_output",
                # The CUDA kernels of the gated activations.
                "gate_activation",
            ),
            # `tl.dot` is called with its default precision.
            accumulator="tf32",
        )
    )
    if not declared.interpreted:
        return declared
    # `FusedMoEConfig` takes experts without a gate on GPUs only.
    gated = [choice for choice in declared.alternatives("experts") if choice["gated"] == (True,)]
    return replace(
        declared,
        experts=gated,
        # `torch.ops._C.silu_and_mul` on a CPU, which checks that it gets whole vectors.
        intermediate_multiple=16,
        # numpy rounds no factor to tf32.
        accumulator="float32",
    )


class TritonExperts(Experts):
    """`TritonExperts`; never run on a GPU by us.

    Raises:
        ImportError: vllm is missing, too old, or was imported in this process without Triton; or
            Triton cannot run here.
    """

    name = "vllm/triton-experts"
    modules = (
        "experts.triton_moe",
        "modular_kernel",
        "prepare_finalize.no_dp_ep",
        "moe_align_block_size",
    )
    capabilities = _declared()
    expert_class = ("experts.triton_moe", "TritonExperts")
    checked = False

    def __init__(self) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if interpret_without_gpu():
            _pretend_a_backend()
        super().__init__()
        if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
            raise ImportError(
                f"{self.name}: vllm was imported in this process before, and without Triton"
            )
        if self.capabilities.interpreted:
            operations: Any = importlib.import_module("vllm._custom_ops")
            operations.moe_align_block_size = _align
            operations.moe_sum = _sum


class Align(VllmTarget):
    """`moe_align_block_size`, on a GPU only; never run by us."""

    name = "vllm/align"
    modules = ("moe_align_block_size",)
    capabilities = Capabilities(
        devices=("cuda",),
        operations=("align",),
        # Slots are placed with atomics.
        deterministic=False,
    )

    def align(
        self,
        expert_ids: torch.Tensor,
        block_size: int,
        num_experts: int,
        expert_map: torch.Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`ignore_invalid_experts` is `drop_invalid`."""
        if expert_ids.device.type != "cuda":
            raise Unsupported(f"{self.name}: no {expert_ids.device.type}")
        aligned: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._function(
            "moe_align_block_size", "moe_align_block_size"
        )(
            expert_ids,
            block_size,
            num_experts,
            expert_map,
            ignore_invalid_experts=drop_invalid,
        )
        return aligned


def _pretend_a_backend() -> None:
    """Have `vllm.triton_utils` imported while Triton lists a backend called cpu."""
    backends = importlib.import_module("triton.backends")

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Driver)
    try:
        importlib.import_module("vllm.triton_utils")
    finally:
        del backends.backends["cpu"]


def _align(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    """In the place of `vllm._custom_ops.moe_align_block_size`."""
    from moe_reference.alignment import align

    # The kernel is handed a map where it is to leave out what is not here.
    slots, blocks, length = align(
        topk_ids, block_size, num_experts, expert_map, expert_map is not None
    )
    sorted_token_ids[: len(slots)] = slots[: len(sorted_token_ids)]
    experts_ids[: len(blocks)] = blocks[: len(experts_ids)]
    num_tokens_post_pad.fill_(int(length))


def _sum(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """In the place of `vllm._custom_ops.moe_sum`: rows that are not here were never written."""
    if topk_ids is not None and expert_map is not None:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        here = known & (expert_map[topk_ids.long().where(known, 0)] >= 0)
        input = input.where(here[..., None], 0.0)
    output.copy_(input.float().sum(1))
