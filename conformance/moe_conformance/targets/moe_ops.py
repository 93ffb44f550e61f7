"""moe-ops under the suite: router, permutation and grouped products, all of them Triton kernels.

- `route` is `fused_topk_softmax`, with `fp32_routing` on and, as a second target, off.
- `dispatch` is `permute`; `combine` is `unpermute`.
- `experts` is the sequence of the README's quick usage: `permute`, `grouped_gemm` twice,
  `unpermute`. The activation between the products is left to its users: here torch's silu.

Where there is no GPU the kernels run in the interpreter, and the grouped product is the one of
`grouped_gemm_ops`: that of the package asks the driver which of two kernels to take.

Tried with Triton 3.9.0: `pip install --no-deps moe-ops==0.1.0` (6 s, 0.1 MB).

Three translations are made, and no others: `row_id_map`, a row for each (k, t), becomes a slot
t·K + k for each row, and back; offsets become counts by subtraction; expert weights are made
contiguous, as parameters are.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from moe_conformance.target import Capabilities, Target
from moe_conformance.targets.adapter import installed, refuse_experts, refuse_routing
from moe_conformance.targets.interpreter import interpret_without_gpu, on_this_machine

if TYPE_CHECKING:
    from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

OLDEST = (0, 1)

_ON_A_GPU = Capabilities(
    devices=("cuda",),
    # README.md names bfloat16 and float16, and `_TL_DTYPE` of grouped_gemm_ops.py float32.
    dtypes=("float32", "bfloat16", "float16"),
    routing={
        # `_fused_topk_softmax_fwd_kernel_2d`: a softmax over the K largest logits, and nothing
        # else.
        "score": ("softmax",),
        "order": ("topk_then_score",),
        "renormalize": (False,),
        "scale": (1.0,),
        "num_groups": (1,),
        "selection_bias": (False,),
        "hash_table": (False,),
    },
    # `_permute_countsort_kernel` counts at the id's own place, wherever that is, and
    # `_unpermute_kernel` reads a row for every pair.
    align={"invalid_ids": (False,)},
    experts={
        "activation": ("silu",),
        "gated": (True,),
        # `grouped_gemm` takes two matrices; `unpermute` weighs what comes out.
        "bias": (False,),
        "weight_on": ("output",),
        "expert_map": (False,),
        "invalid_ids": (False,),
    },
    gradients=("route", "dispatch", "combine", "experts"),
    # `gmm_try_fn` asserts one dtype.
    mixed_dtypes=False,
    # Rows take their places with atomics.
    deterministic=False,
    rounding_points=(
        # A product is a tensor of x's dtype, and so is what torch makes of it.
        "pre_activation",
        "gate_activation",
        "activation",
        "expert_output",
    ),
    # `tl.dot` is called with its default precision, tf32.
    accumulator="tf32",
)


class MoeOps(Target):
    """The package `moe_ops`.

    Raises:
        ImportError: moe-ops is missing, too old, or has moved a function; or Triton cannot run
            here.
    """

    name = "moe-ops/any-strides"
    capabilities = on_this_machine(_ON_A_GPU)
    fp32_routing: ClassVar[bool] = True

    def __init__(self) -> None:
        install = "pip install --no-deps moe-ops==0.1.0"
        type(self).version = installed(self.name, OLDEST, install, "moe-ops")
        interpreted = interpret_without_gpu("moe_ops")
        try:
            package = importlib.import_module("moe_ops")
            products = importlib.import_module("moe_ops.grouped_gemm_ops")
            self._topk_softmax = package.fused_topk_softmax
            self._permute, self._unpermute = package.permute, package.unpermute
            self._grouped_gemm = (products if interpreted else package).grouped_gemm
        except (ModuleNotFoundError, AttributeError) as error:
            raise ImportError(
                f"{self.name}: version {self.version} is not laid out as 0.1 was: {error}"
            ) from None

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fused_topk_softmax` on logits [T, E]."""
        refuse_routing(self, config, bias)
        weights, expert_ids = self._topk_softmax(logits, config.top_k, self.fp32_routing)
        return weights.float(), expert_ids

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`permute` on x [T, H]."""
        rows, row_id_map, offsets = self._permute(x, expert_ids, 0, num_experts)
        row_of_slot = row_id_map.view(expert_ids.shape[1], -1).T.reshape(-1).long()
        slots = torch.empty_like(row_of_slot)
        slots[row_of_slot] = torch.arange(len(slots), device=slots.device)
        return rows, offsets.diff(), slots

    def combine(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`unpermute` of rows [S, H]."""
        T, K = weights.shape
        row_of_slot = torch.full((T * K,), -1, dtype=torch.int32, device=slots.device)
        numbers = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
        row_of_slot[slots[slots < T * K].long()] = numbers[slots < T * K]
        return self._unpermute(rows, row_of_slot.view(T, K).T.reshape(-1), weights, T, K)

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`permute`, `grouped_gemm`, silu, `grouped_gemm` and `unpermute`."""
        refuse_experts(self, experts, config, expert_map=expert_map is not None)
        rows, row_id_map, offsets = self._permute(x, expert_ids, 0, len(experts.down))
        gate, up = (
            self._grouped_gemm(rows, matrix.contiguous(), offsets)
            for matrix in experts.gate_up.chunk(2, dim=1)
        )
        activated = torch.nn.functional.silu(gate) * up
        out = self._grouped_gemm(activated, experts.down.contiguous(), offsets)
        return self._unpermute(out, row_id_map, weights, *expert_ids.shape)


class MoeOpsContiguous(MoeOps):
    """Given contiguous tensors only, which shows what else there is."""

    name = "moe-ops/contiguous"
    # `_fused_topk_softmax_fwd_kernel_2d` and the kernels of the products are not given all strides.
    capabilities = replace(MoeOps.capabilities, strides=False)


class MoeOpsNarrow(MoeOpsContiguous):
    """With `fp32_routing` off, as it is unless asked for."""

    name = "moe-ops/narrow-routing"
    # `_fused_topk_softmax_fwd` makes the weights in the logits' dtype.
    capabilities = replace(
        MoeOpsContiguous.capabilities, operations=("route",), rounding_points=("router_weights",)
    )
    fp32_routing = False


def variants() -> dict[str, type[Target]]:
    """The targets of this library, by the name of the variant.

    >>> list(variants())
    ['any-strides', 'contiguous', 'narrow-routing']
    """
    return {each.name.split("/")[1]: each for each in (MoeOps, MoeOpsContiguous, MoeOpsNarrow)}
