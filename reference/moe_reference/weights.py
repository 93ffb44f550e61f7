"""The tensors that go in and out together: weights, a layer's results, a placement. No behaviour.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
N sequences, L tokens per sequence, P physical experts, X copies of one expert at most.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of E experts in the canonical layout.

    Attributes:
        gate_up: [E, 2I, H], the I gate rows before the I up rows ([E, I, H] without a gate).
        down: [E, H, I].
        gate_up_bias: [E, 2I] or None.
        down_bias: [E, H] or None.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parameters of one MoE layer.

    Attributes:
        router: [E, H].
        experts: the routed experts.
        router_bias: [E] or None, a part of the logits.
        selection_bias: [E] or None, chooses and never weighs.
        shared: one expert (E = 1) of its own width that sees every token, or None.
        shared_gate: [1, H] or None, a sigmoid gate on the shared expert.
    """

    router: torch.Tensor
    experts: ExpertWeights
    router_bias: torch.Tensor | None = None
    selection_bias: torch.Tensor | None = None
    shared: ExpertWeights | None = None
    shared_gate: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerOutput:
    """What a layer gives back: its output, and what it knows about the way there.

    Attributes:
        output: [N, L, H].
        expert_ids: [T, K] or None.
        weights: [T, K] or None.
        balance_loss: scalar or None.
        tokens_per_expert: [E] or None.
    """

    output: torch.Tensor
    expert_ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    tokens_per_expert: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Placement:
    """Which copies of E experts there are, and on which ranks: P physical experts.

    Attributes:
        physical_to_logical: [P], the expert that each physical expert is a copy of.
        logical_to_physical: [E, X], the copies of each expert, padded with -1; X copies at most.
        replica_count: [E], the number of copies of each expert, at least 1.
        rank_of_physical: [P], the rank that holds it.
    """

    physical_to_logical: torch.Tensor
    logical_to_physical: torch.Tensor
    replica_count: torch.Tensor
    rank_of_physical: torch.Tensor
