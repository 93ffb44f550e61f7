"""vLLM's Marlin experts: `fused_marlin_moe`.

- `experts_quantized` is `fused_marlin_moe` with its own sum over K.

The text is one page of documentation. The alignment and the function with the two products are
called and not shown: the reference stands in for both, with rows in the dtype of the hidden states
between the steps. `batched_fused_marlin_moe` takes packed weights only, for which there is no
batched operation.
"""

from __future__ import annotations

import torch
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate, one_by_one, product
from moe_reference.alignment import align
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.quantized_experts import dequantize_experts
from moe_reference.quantized_tensors import QuantizedExperts

from moe_conformance.target import Capabilities, Target, suite_version

Tensor = torch.Tensor

BITS = {"uint4": 4, "uint8b128": 8, "uint4b8": 4, "e4m3": 8, "mxfp4": 4, "nvfp4": 4}
"""The types that the text lists; its float of four bits is that of both mxfp4 and nvfp4."""


class Marlin(Target):
    """As its text has it."""

    name = "documents/marlin"
    version = suite_version()
    capabilities = Capabilities(
        # Asserted, and with them that hidden states and weights are contiguous.
        dtypes=("bfloat16", "float16"),
        strides=False,
        # The activation is an argument whose one value in the text is the default.
        experts={"activation": ("silu",), "gated": (True,)},
        # Weights are tiles of 16.
        hidden_multiple=16,
        intermediate_multiple=16,
        formats=tuple(BITS),
        quantization={"padding": (False,), "mixed": (False,)},
        # Workspaces hold the results of both products and of the activation.
        rounding_points=("pre_activation", "activation", "weighted_output"),
    )

    def experts_quantized(
        self,
        x: Tensor,
        experts: QuantizedExperts,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """Align the slots, compute a row for each, and add up the K rows of a token."""
        # What a caller has to do: router weights are float32, asserted.
        weights = weights.float()
        T, H = x.shape
        E, K = experts.gate_up.shape[0], expert_ids.shape[1]
        num_bits = BITS[experts.gate_up.format]
        assert experts.gate_up.shape[2] // 16 * 16 == H, "Hidden size mismatch w1"
        # Wrong: a remainder of columns is not noticed, and I of the two is not compared.
        assert experts.down.shape[1] * num_bits // 2 // (num_bits // 2) == H
        assert x.is_contiguous()
        assert x.dtype in (torch.float16, torch.bfloat16)
        for block_size in (8, 16, 32, 48, 64):
            # Wrong, though it changes no value: the slots of all ranks over the experts of one.
            if T * K / E / block_size < 0.9:
                break
        num_experts = E if expert_map is None else len(expert_map)
        slots, block_experts, length = align(
            expert_ids, block_size, num_experts, expert_map, drop_invalid=True
        )
        # Wrong: without a map rows whose id is no expert are written by nobody and added up. What
        # memory holds is here always NaN, so that no run is luckier than another.
        rows = torch.full((T * K, H), torch.nan, dtype=x.dtype, device=x.device)
        if expert_map is not None:
            rows.zero_()
        unpacked = one_by_one(dequantize_experts(experts))
        for number, e in enumerate(block_experts[: int(length) // block_size].tolist()):
            block = slots[number * block_size : (number + 1) * block_size].long()
            block = block[block < T * K]
            rows[block] = self._rows(x, weights, block, unpacked[e], experts, e, config)
        out = torch.empty_like(x)
        return torch.sum(rows.view(-1, K, H), dim=1, out=out)

    def _rows(
        self,
        x: Tensor,
        weights: Tensor,
        slots: Tensor,
        one: ExpertWeights,
        experts: QuantizedExperts,
        e: int,
        config: ExpertsConfig,
    ) -> Tensor:
        """The two products for some slots of one expert, each stored in x's dtype."""
        K = weights.shape[1]
        weight = weights.flatten()[slots, None]
        rows = x[slots // K].float()
        if config.weight_on == "input":
            rows = rows * weight
        rows = _rounded(rows, experts, e, 0)
        hidden = product(rows, one.gate_up, one.gate_up_bias).to(x.dtype)
        activated = activate(hidden.float(), config).to(x.dtype)
        out = product(_rounded(activated.float(), experts, e, 1), one.down, one.down_bias)
        return (out if config.weight_on == "input" else out * weight).to(x.dtype)


def _rounded(rows: Tensor, experts: QuantizedExperts, e: int, step: int) -> Tensor:
    """Rows in the dtype of the argument that the text hands on to the products."""
    if experts.activation_format is None:
        return rows
    scales = experts.activation_scales
    block = (experts.gate_up, experts.down)[step].group_size
    scale = None if scales is None else scales[e, step]
    return round_activations(rows, experts.activation_format, block, scale)
