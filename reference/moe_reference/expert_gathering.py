"""The inverse of expert slicing: the experts of all ranks together again.

A checkpoint is written whole, whatever it was trained on; and what a rank holds is checked by it.

Dimension key: E experts, H hidden size, I intermediate size, R ranks.
"""

from collections.abc import Sequence

import torch

from moe_reference.config import ExpertWeights
from moe_reference.dispatch import inverse_permutation
from moe_reference.expert_slicing import has_gate, take_experts


def gather_experts(
    parts: Sequence[ExpertWeights], held: Sequence[Sequence[int]] | None = None
) -> ExpertWeights:
    """The inverse of `slice_experts` and `take_experts`: the experts of all ranks together.

    Args:
        parts: one for each rank.
        held: the experts of each part in the order of its rows, every expert once; None for
            contiguous shares in the order of the ranks.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: the parts do not fit each other, or are not every expert once.

    >>> one, two = (ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1) * n) for n in (1, 2))
    >>> gather_experts([one, two], held=[[1], [0]]).down.flatten().tolist()
    [2.0, 1.0]
    """
    columns = _columns(parts, same=(1, 2))
    whole = ExpertWeights(**{name: torch.cat(each) for name, each in columns.items()})
    if held is None:
        return whole
    order = [e for ids in held for e in ids]
    fits = [len(ids) for ids in held] == [len(part.down) for part in parts]
    if not fits or sorted(order) != list(range(len(order))):
        raise ValueError(f"held: expected every expert of the parts once, got {held}")
    rows = inverse_permutation(torch.tensor(order, dtype=torch.int64))
    return take_experts(whole, rows.tolist())


def gather_tensor_parallel(parts: Sequence[ExpertWeights]) -> ExpertWeights:
    """The inverse of `slice_tensor_parallel`: the parts of all ranks, in the order of the ranks.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: the parts do not fit each other.

    >>> from moe_reference.expert_slicing import slice_tensor_parallel
    >>> gate_up, down = torch.arange(4.0).view(1, 4, 1), torch.ones(1, 1, 2)
    >>> parts = [slice_tensor_parallel(ExpertWeights(gate_up, down), 2, rank) for rank in (0, 1)]
    >>> gather_tensor_parallel(parts).gate_up.flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    columns = _columns(parts, same=(0, 1))
    halves = 2 if any(has_gate(part) for part in parts) else 1
    whole = {"down": torch.cat(columns["down"], dim=2)}
    for name in columns.keys() & {"gate_up", "gate_up_bias"}:
        of_ranks = [rows.tensor_split(halves, dim=1) for rows in columns[name]]
        whole[name] = torch.cat([half for pair in zip(*of_ranks, strict=True) for half in pair], 1)
    if "down_bias" in columns:
        whole["down_bias"] = torch.stack(columns["down_bias"]).sum(dim=0)
    return ExpertWeights(**whole)


def _columns(
    parts: Sequence[ExpertWeights], same: tuple[int, int]
) -> dict[str, list[torch.Tensor]]:
    """The tensors of all parts by name; or an error unless two dimensions of down are the same."""
    # A part of width 0 looks as if it had no gate.
    gated = {has_gate(part) for part in parts if has_gate(part) or part.down.shape[2] > 0}
    sizes = {tuple(part.down.shape[dim] for dim in same) for part in parts}
    present = [{n: t for n, t in vars(part).items() if t is not None} for part in parts]
    if len(gated) > 1 or len(sizes) != 1 or any(p.keys() != present[0].keys() for p in present):
        shapes = [{name: list(tensor.shape) for name, tensor in part.items()} for part in present]
        raise ValueError(f"parts: expected parts of the same experts, got {shapes}")
    return {name: [part[name] for part in present] for name in present[0]}
