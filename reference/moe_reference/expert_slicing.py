r"""Expert slicing: which rank holds which experts, or which part of every expert.

E experts are shared out among R ranks: whole experts, each on one rank, or a part of every expert
on every rank. (`placement` makes copies of the busy ones.) With $\mathcal{E}_r$ the experts of rank
$r$, or $D_e^r, U_e^r$ its part of expert $e$, the outputs of the ranks add up to the whole:

$$
y_t = \sum_{r} \sum_{k : e_{tk} \in \mathcal{E}_r} w_{tk} \, f_{e_{tk}}(x_t), \qquad
D_e \, a(U_e x) = \sum_{r} D_e^r \, a(U_e^r x)
$$

So the output of a rank that holds a slice is *partial*, and is summed over the ranks exactly once.
A rank that holds everything has the whole output already: summed over the ranks it is R times that.

Dimension key: E experts, H hidden size, I intermediate size, J = 2I (I without a gate), R ranks.

A rank may hold no expert: its weights are [0, ...] and its output is zero. Slices are copies of the
weights, of the same dtype, contiguous and differentiable.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from moe_reference.checks import check_count, check_ranks, check_tensor, check_weights
from moe_reference.config import ExpertWeights

Module = TypeVar("Module")


def assign_experts(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    r"""The contiguous share of a rank: the first E mod R ranks get one expert more.

    $$ \mathrm{start}_r = r \lfloor E / R \rfloor + \min(r, E \bmod R) $$

    Args:
        num_experts: E; fewer than R leave the last ranks without any.
        world_size: R, at least 1.
        rank: r, from 0 to R - 1.

    Returns:
        start, the first expert of the rank, and count.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its range.

    Source: TensorCast, and vLLM's code, whose docstring gives the rest to the last rank. DeepSeek's
    inference code asks for E mod R = 0.

    >>> [assign_experts(5, 3, rank) for rank in range(3)]
    [(0, 2), (2, 2), (4, 1)]
    """
    check_ranks(num_experts, world_size, rank)
    share, rest = divmod(num_experts, world_size)
    return rank * share + min(rank, rest), share + (1 if rank < rest else 0)


def assign_round_robin(num_experts: int, world_size: int, rank: int) -> range:
    """The experts of a rank when they are dealt out in turn: r, r + R, r + 2R and so on.

    Arguments and errors are those of `assign_experts`, and so is the number of experts. Source:
    vLLM, which spreads the expert groups of group-limited routing over the ranks with it.

    >>> [list(assign_round_robin(5, 3, rank)) for rank in range(3)]
    [[0, 3], [1, 4], [2]]
    """
    check_ranks(num_experts, world_size, rank)
    return range(rank, num_experts, world_size)


def make_expert_map(num_experts: int, held: Sequence[int]) -> torch.Tensor:
    """From ids to the rows of a rank: [E], int32, -1 for an expert that it does not hold.

    Args:
        num_experts: E, all experts of all ranks.
        held: the experts of the rank, in the order of its rows, each once.

    Raises:
        ValueError: an expert is outside [0, E), or there twice.

    >>> make_expert_map(4, [2, 0]).tolist()
    [1, -1, 0, -1]
    """
    rows = _index(num_experts, held)
    if len(set(held)) < len(held):
        raise ValueError(f"held: expected each expert once, got {list(held)}")
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    return expert_map.index_put((rows,), torch.arange(len(held), dtype=torch.int32))


def slice_experts(experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
    """Experts start to start + count - 1, with their biases.

    Args:
        experts: weights of E experts, any float dtype and strides.
        start: the first expert.
        count: how many; none with 0.

    Raises:
        TypeError: not `ExpertWeights` of float tensors, or not ints.
        ValueError: the weights do not fit each other, or there are no such experts.

    >>> experts = ExpertWeights(torch.ones(3, 2, 1), torch.arange(3.0).view(3, 1, 1))
    >>> slice_experts(experts, 1, 2).down.flatten().tolist()
    [1.0, 2.0]
    """
    check_count("start", start)
    check_count("count", count)
    return take_experts(experts, range(start, start + count))


def take_experts(experts: ExpertWeights, held: Sequence[int]) -> ExpertWeights:
    """Any experts in any order, one of them also several times; otherwise as `slice_experts`.

    >>> experts = ExpertWeights(torch.ones(3, 2, 1), torch.arange(3.0).view(3, 1, 1))
    >>> take_experts(experts, [2, 0, 2]).down.flatten().tolist()
    [2.0, 0.0, 2.0]
    """
    has_gate(experts)
    present = {name: tensor for name, tensor in vars(experts).items() if tensor is not None}
    return ExpertWeights(**take_tensors(present, len(experts.down), held))


def take_tensors(
    tensors: Mapping[str, torch.Tensor], num_experts: int, held: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The same experts of every tensor: weights, biases, scales and zero points alike.

    Args:
        tensors: [E, ...] each, any dtype.
        num_experts: E. A tensor with another number of rows is refused: whole beside slices, it
            would be read at the wrong rows.
        held: the experts, in any order.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor does not have E rows, or an expert is outside [0, E).

    >>> take_tensors({"packed": torch.tensor([[7], [8]]), "scales": torch.ones(2)}, 2, [1])
    {'packed': tensor([[8]]), 'scales': tensor([1.])}
    """
    rows = _index(num_experts, held)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.shape[:1] != (num_experts,):
            raise ValueError(f"{name}: expected {num_experts} rows, got {list(tensor.shape)}")
    return {name: tensor[rows.to(tensor.device)].contiguous() for name, tensor in tensors.items()}


def take_modules(modules: Sequence[Module], held: Sequence[int]) -> list[Module]:
    """The same experts of a list of modules: the modules themselves, not copies.

    Args:
        modules: E of them, of any kind.
        held: the experts, in any order.

    Raises:
        ValueError: an expert is outside [0, E).

    >>> take_modules(["first", "second", "third"], [2, 0])
    ['third', 'first']
    """
    return [modules[e] for e in _index(len(modules), held).tolist()]


def slice_tensor_parallel(experts: ExpertWeights, world_size: int, rank: int) -> ExpertWeights:
    """A part of every expert: some of the I rows of the gate, the same of up and of down.

    I is shared out by `assign_experts`, so it need not be divisible by R. (Packed weights can only
    be cut where a group of them ends.) The gate is cut apart from up: cut as one tensor, the first
    ranks would get nothing but gates. The output bias is on rank 0 and zero elsewhere.

    Args:
        experts: weights of E experts, any float dtype and strides. There is no gate where gate_up
            has as many rows as down has columns.
        world_size: R, at least 1. Ranks past I get a width of 0.
        rank: from 0 to R - 1.

    Raises:
        TypeError: not `ExpertWeights` of float tensors, or not ints.
        ValueError: the weights do not fit each other, or there is no such rank.

    Source: Megatron-LM (arXiv 1909.08053, section 3); for the two halves, mistral.rs.

    >>> gate_up, down = torch.arange(4.0).view(1, 4, 1), torch.ones(1, 1, 2)
    >>> slice_tensor_parallel(ExpertWeights(gate_up, down), 2, 1).gate_up.flatten().tolist()
    [1.0, 3.0]
    """
    halves = 2 if has_gate(experts) else 1
    start, count = assign_experts(experts.down.shape[2], world_size, rank)
    biases = {}
    if experts.gate_up_bias is not None:
        biases["gate_up_bias"] = _cut_halves(experts.gate_up_bias, halves, start, count)
    if experts.down_bias is not None:
        elsewhere = torch.full_like(experts.down_bias, rank > 0, dtype=torch.bool)
        biases["down_bias"] = experts.down_bias.masked_fill(elsewhere, 0.0).contiguous()
    return ExpertWeights(
        _cut_halves(experts.gate_up, halves, start, count),
        torch.cat([experts.down[:, :, start : start + count]], dim=2),
        **biases,
    )


def has_gate(experts: ExpertWeights) -> bool:
    """Whether the experts have a gate: `gate_up` has twice as many rows as `down` has columns.

    Args:
        experts: weights of E experts, any float dtype.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: the weights do not fit each other, with a gate or without.

    >>> has_gate(ExpertWeights(torch.ones(1, 4, 3), torch.ones(1, 3, 2)))
    True
    """
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"experts: expected ExpertWeights, got {type(experts).__name__}")
    check_tensor("experts.gate_up", experts.gate_up, ("E", "J", "H"))
    check_tensor("experts.down", experts.down, ("E", "H", "I"))
    gated = experts.gate_up.shape[1] != experts.down.shape[2]
    check_weights(experts, gated, prefix="experts.")
    return gated


def _index(num_experts: int, held: Sequence[int]) -> torch.Tensor:
    """The ids as an index, or an error where one is outside [0, E)."""
    for e in held:
        check_count("held", e)
        if e >= num_experts:
            raise ValueError(f"held: expected experts below {num_experts}, got {e}")
    return torch.tensor(held, dtype=torch.int64)


def _cut_halves(rows: torch.Tensor, halves: int, start: int, count: int) -> torch.Tensor:
    """[E, J, ...] to `count` rows of each half."""
    return torch.cat([half.narrow(1, start, count) for half in rows.tensor_split(halves, 1)], 1)
