"""Random weights for experts, for training from nothing and for tests."""

import math

import torch

from moe_reference.checks import check_count
from moe_reference.config import ExpertWeights


def init_experts(
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    gated: bool = True,
    bias: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExpertWeights:
    r"""Random weights, uniform in $\pm 1 / \sqrt{\text{fan-in}}$ as `torch.nn.Linear` has them.

    The fan-in is that of one expert's product: H for gate_up, I for down. Reading [E, out, in] as
    one matrix [E, out · in] would make the weights smaller by sqrt(out).

    Args:
        num_experts: E.
        hidden_size: H, at least 1.
        intermediate_size: I, at least 1.
        gated: with a gate, gate_up is [E, 2I, H].
        bias: with biases, drawn from the same interval.
        generator: where the numbers come from; None takes PyTorch's global one.
        dtype: of the weights.

    >>> init_experts(4, hidden_size=16, intermediate_size=3).gate_up.shape
    torch.Size([4, 6, 16])
    """
    check_count("num_experts", num_experts)
    check_count("hidden_size", hidden_size, 1)
    check_count("intermediate_size", intermediate_size, 1)

    def uniform(fan_in: int, *shape: int) -> torch.Tensor:
        unit = torch.rand(shape, generator=generator, dtype=torch.float64)
        return ((2 * unit - 1) / math.sqrt(fan_in)).to(dtype)

    E, H, I = num_experts, hidden_size, intermediate_size
    J = 2 * I if gated else I
    gate_up, down = uniform(H, E, J, H), uniform(I, E, H, I)
    return ExpertWeights(gate_up, down, *((uniform(H, E, J), uniform(I, E, H)) if bias else ()))
