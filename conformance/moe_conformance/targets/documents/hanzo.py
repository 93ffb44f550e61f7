"""hanzo-engine's `MoEExperts`, written in Rust after mistral.rs.

- `experts` is the loop, which its selection takes on a CPU, with weights as
  `load_slow_from_combined_stacked` loads them from a checkpoint.
- `slice_tensor_parallel` is how `load_fused_stacked` cuts the same weights.

The gate is outside of it, so that there is no `route` and no `layer`. What reads a quantized layer
is called and not shown, and so are the kernels of the other two ways, which run on other devices.
"""

from __future__ import annotations

import torch
from moe_reference.activations import ELEMENTWISE
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_conformance.target import Capabilities, Target, Unsupported, suite_version

Tensor = torch.Tensor


class Hanzo(Target):
    """As its text has it."""

    name = "documents/hanzo"
    version = suite_version()
    capabilities = Capabilities(
        # Router weights are read as float32, so that float64 has no place.
        dtypes=("float32", "bfloat16", "float16"),
        experts={
            # The activations that the text names.
            "activation": ("silu", "gelu", "gelu_tanh", "relu"),
            "gated": (True,),
            # No layer of it has a bias.
            "bias": (False,),
            "weight_on": ("output",),
            "expert_map": (False,),
        },
        # Tensors of another type are an error in its tensor library.
        mixed_dtypes=False,
        # Every step gives a tensor of x's dtype.
        rounding_points=(
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
            "weighted_output",
            "combine",
        ),
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
        """One expert after the other on its rows, each added to the output."""
        if expert_map is not None or experts.gate_up_bias is not None:
            raise Unsupported("the text has neither an expert map nor biases")
        E, H, I = len(experts.down), x.shape[1], experts.gate_up.shape[1] // 2
        gate_up = _stored(experts.gate_up, H, 2 * I)
        down = _stored(experts.down, I, H)
        tokens: list[list[int]] = [[] for _ in range(E)]
        weighs: list[list[float]] = [[] for _ in range(E)]
        unsigned = expert_ids.long() & 0xFFFFFFFF
        for token, (ids, row) in enumerate(
            zip(unsigned.tolist(), weights.float().tolist(), strict=True)
        ):
            for e, weight in zip(ids, row, strict=True):
                # Wrong: an id that is no expert ends the program.
                tokens[e].append(token)
                weighs[e].append(weight)
        out = torch.zeros_like(x)
        for e in range(E):
            if not tokens[e]:
                continue
            rows = torch.tensor(tokens[e], device=x.device)
            # Wrong: the weights are rounded to x's dtype.
            weight = torch.tensor(weighs[e], dtype=x.dtype, device=x.device)[:, None]
            gate = ELEMENTWISE[config.activation](x[rows] @ gate_up[e, :, :I])
            hidden = gate * (x[rows] @ gate_up[e, :, I:])
            out = out.index_add(0, rows, (hidden @ down[e]) * weight)
        return out

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """The share of a rank, in the layout that the weights came in."""
        if experts.gate_up_bias is not None or experts.down_bias is not None:
            raise Unsupported("the text has no biases")
        _, J, H = experts.gate_up.shape
        gate_up = _stored(experts.gate_up, H, J)
        down = _stored(experts.down, J // 2, H)
        # Wrong: gate and up are cut as one tensor, so that the first ranks have the gate and the
        # last ones have up.
        return ExpertWeights(
            _share(gate_up, 2, world_size, rank),
            _share(down, 1, world_size, rank),
        )


def _stored(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A tensor of a checkpoint as [E, rows, columns], or transposed where its shape says so.

    Wrong: each tensor is asked by itself. A square one is never transposed, whatever it holds.
    """
    if tensor.shape[1:] == (rows, columns):
        return tensor
    if tensor.shape[1:] == (columns, rows):
        return tensor.transpose(1, 2).contiguous()
    raise ValueError(
        f"tensor: expected [E, {rows}, {columns}] in one order or the other, got "
        f"{list(tensor.shape)}"
    )


def _share(tensor: Tensor, dim: int, world_size: int, rank: int) -> Tensor:
    """A rank's contiguous part, loaded into memory of its own and given back as [E, out, in]."""
    size = tensor.shape[dim]
    if size % world_size != 0:
        raise Unsupported(f"the loader refuses to cut {size} in {world_size} parts")
    return tensor.chunk(world_size, dim)[rank].transpose(1, 2).clone()
