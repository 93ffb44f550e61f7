r"""Expert slicing: which rank holds which experts, or which part of every expert.

E experts are shared out among R ranks in four ways: whole experts, each on one rank; a part of
every expert on every rank; copies, more of the busy experts than of the others; and the shared
expert on ranks of its own. With $\mathcal{E}_r$ the experts of rank $r$, or $D_e^r, U_e^r$ its part
of expert $e$, the outputs of the ranks add up to the whole:

$$
y_t = \sum_{r} \sum_{k : e_{tk} \in \mathcal{E}_r} w_{tk} \, f_{e_{tk}}(x_t), \qquad
D_e \, a(U_e x) = \sum_{r} D_e^r \, a(U_e^r x)
$$

So the output of a rank that holds a slice is *partial*, and is summed over the ranks exactly once.
A rank that holds everything has the whole output already: summed over the ranks it is R times that.

Dimension key: T tokens, K experts per token, E experts, H hidden size, I intermediate size, J = 2I
(I without a gate), R ranks, P physical experts, X copies of one expert at most.

A rank may hold no expert: its weights are [0, ...] and its output is zero. Slices are copies of the
weights, of the same dtype, contiguous and differentiable.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from moe_reference.alignment import local_ids
from moe_reference.checks import FLOATS, IDS, check_count, check_tensor
from moe_reference.config import ExpertWeights, Placement
from moe_reference.dispatch import inverse_permutation
from moe_reference.layouts import check_weights

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
    _check_ranks(num_experts, world_size, rank)
    share, rest = divmod(num_experts, world_size)
    return rank * share + min(rank, rest), share + (1 if rank < rest else 0)


def assign_round_robin(num_experts: int, world_size: int, rank: int) -> range:
    """The experts of a rank when they are dealt out in turn: r, r + R, r + 2R and so on.

    Arguments and errors are those of `assign_experts`, and so is the number of experts. Source:
    vLLM, which spreads the expert groups of group-limited routing over the ranks with it.

    >>> [list(assign_round_robin(5, 3, rank)) for rank in range(3)]
    [[0, 3], [1, 4], [2]]
    """
    _check_ranks(num_experts, world_size, rank)
    return range(rank, num_experts, world_size)


def assign_external_shared(
    num_experts: int, num_shared_ranks: int, world_size: int, rank: int
) -> range:
    """The share of a rank where the first S ranks hold the shared expert and nothing else.

    The shared expert counts as S more experts, E to E + S - 1, all of them the same; the routed
    ones are shared out among the other ranks. `add_shared_column` sends the tokens there.

    Args:
        num_experts: E, the routed experts.
        num_shared_ranks: S, from 0 to R; less than R where there are routed experts.
        world_size: R.
        rank: from 0 to R - 1.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its range, or no rank is left for routed experts.

    Source: TensorCast, which divides by zero where no rank is left.

    >>> [list(assign_external_shared(4, 1, 3, rank)) for rank in range(3)]
    [[4], [0, 1], [2, 3]]
    """
    _check_ranks(num_experts, world_size, rank)
    check_count("num_shared_ranks", num_shared_ranks)
    routed_ranks = world_size - num_shared_ranks
    if routed_ranks < (1 if num_experts > 0 else 0):
        raise ValueError(
            f"num_shared_ranks: expected a rank of {world_size} to be left for {num_experts} "
            f"experts, got {num_shared_ranks}"
        )
    if rank < num_shared_ranks:
        return range(num_experts + rank, num_experts + rank + 1)
    start, count = assign_experts(num_experts, routed_ranks, rank - num_shared_ranks)
    return range(start, start + count)


def add_shared_column(
    weights: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, num_shared_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send every token to the shared expert too, in a further column, with a weight of one.

    Token t goes to the copy t mod S. An id that was not here stays so: one of E or more, which now
    would be a shared expert, becomes -1.

    Args:
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        num_experts: E.
        num_shared_ranks: S, at least 1.

    Returns:
        weights and expert_ids, both [T, K + 1], of the dtypes given.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape.

    Source: TensorCast, whose column of floats turns all ids into floats.

    >>> add_shared_column(torch.tensor([[0.5], [0.5]]), torch.tensor([[1], [3]]), 3, 1)[1].tolist()
    [[1, 3], [-1, 3]]
    """
    check_tensor("weights", weights, ("T", "K"))
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
    check_count("num_shared_ranks", num_shared_ranks, 1)
    copies_T = torch.arange(len(expert_ids), device=expert_ids.device) % num_shared_ranks
    routed_TK = local_ids(expert_ids, num_experts)
    ids = torch.cat([routed_TK, num_experts + copies_T[:, None]], dim=1)
    return torch.cat([weights, weights.new_ones(len(weights), 1)], dim=1), ids.to(expert_ids.dtype)


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
    _is_gated(experts)
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
    return {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}


def take_modules(modules: Sequence[Module], held: Sequence[int]) -> list[Module]:
    """The same experts of a list of modules: the modules themselves, not copies.

    Raises:
        ValueError: an expert is outside [0, E).

    >>> take_modules(["first", "second", "third"], [2, 0])
    ['third', 'first']
    """
    return [modules[e] for e in _index(len(modules), held).tolist()]


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
    halves = 2 if _is_gated(experts) else 1
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


def gather_tensor_parallel(parts: Sequence[ExpertWeights]) -> ExpertWeights:
    """The inverse of `slice_tensor_parallel`: the parts of all ranks, in the order of the ranks.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: the parts do not fit each other.

    >>> gate_up, down = torch.arange(4.0).view(1, 4, 1), torch.ones(1, 1, 2)
    >>> parts = [slice_tensor_parallel(ExpertWeights(gate_up, down), 2, rank) for rank in (0, 1)]
    >>> gather_tensor_parallel(parts).gate_up.flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    columns = _columns(parts, same=(0, 1))
    halves = 2 if any(_is_gated(part) for part in parts) else 1
    whole = {"down": torch.cat(columns["down"], dim=2)}
    for name in columns.keys() & {"gate_up", "gate_up_bias"}:
        of_ranks = [rows.tensor_split(halves, dim=1) for rows in columns[name]]
        whole[name] = torch.cat([half for pair in zip(*of_ranks, strict=True) for half in pair], 1)
    if "down_bias" in columns:
        whole["down_bias"] = torch.stack(columns["down_bias"]).sum(dim=0)
    return ExpertWeights(**whole)


def place_experts(load: torch.Tensor, num_physical: int, num_ranks: int) -> Placement:
    r"""Copies for the busy experts, and all of them on ranks with equally many slots.

    Every expert has one copy. Each further one goes to the expert with the greatest load per copy,
    $\arg\max_e \, \mathrm{load}_e / \mathrm{copies}_e$, the lowest id on a tie. Then the copies,
    those with the greatest load first, go one by one to the rank with the least load that has a
    free slot. Two copies of one expert may meet on a rank.

    Args:
        load: [E], any float or int dtype, finite and not negative: tokens, or their moving average.
        num_physical: P, at least E, and a multiple of R.
        num_ranks: R, at least 1.

    Returns:
        A placement on the device of `load`; rank r holds the physical experts from r · P / R on, in
        ascending order of their ids.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or is outside its range.

    Source: DeepSeek's EPLB without its node groups.

    >>> place_experts(torch.tensor([90, 30, 30]), num_physical=4, num_ranks=2).physical_to_logical
    tensor([0, 1, 0, 2])
    """
    check_tensor("load", load, ("E",), (*FLOATS, *IDS))
    check_count("num_ranks", num_ranks, 1)
    check_count("num_physical", num_physical, len(load))
    if num_physical % num_ranks != 0 or (num_physical > 0 and len(load) == 0):
        raise ValueError(
            f"num_physical: expected copies of {len(load)} experts, as many on each of {num_ranks} "
            f"ranks, got {num_physical}"
        )
    load_E = load.tolist()
    if not all(0 <= each < math.inf for each in load_E):
        raise ValueError(f"load: expected finite numbers >= 0, got {load_E}")

    copies_E = [1] * len(load_E)
    for _ in range(num_physical - len(load_E)):
        busiest = max(range(len(load_E)), key=lambda e: load_E[e] / copies_E[e])
        copies_E[busiest] += 1

    share_E = [each / copies for each, copies in zip(load_E, copies_E, strict=True)]
    held_R: list[list[int]] = [[] for _ in range(num_ranks)]
    load_R = [0.0] * num_ranks
    for e in sorted(range(len(share_E)), key=lambda e: -share_E[e]):
        for _ in range(copies_E[e]):
            free = [r for r in range(num_ranks) if len(held_R[r]) < num_physical // num_ranks]
            least = min(free, key=load_R.__getitem__)
            held_R[least].append(e)
            load_R[least] += share_E[e]
    placed = [e for held in held_R for e in sorted(held)]
    on = torch.tensor(placed, dtype=torch.int64, device=load.device)
    return make_placement(on, len(load_E), num_ranks)


def make_placement(
    physical_to_logical: torch.Tensor, num_experts: int, num_ranks: int
) -> Placement:
    """A placement from which copies there are, in the order of the ranks.

    Args:
        physical_to_logical: [P], int32 or int64: every expert at least once; P a multiple of R.
        num_experts: E.
        num_ranks: R, at least 1.

    Returns:
        Tensors of int64 on the same device, the copies of an expert in ascending order.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or an expert is missing or unknown.

    >>> make_placement(torch.tensor([0, 1, 0, 2]), 3, 2).logical_to_physical.tolist()
    [[0, 2], [1, -1], [3, -1]]
    """
    check_tensor("physical_to_logical", physical_to_logical, ("P",), IDS)
    check_count("num_experts", num_experts)
    check_count("num_ranks", num_ranks, 1)
    logical_P, P = physical_to_logical.tolist(), len(physical_to_logical)
    if P % num_ranks != 0 or set(logical_P) != set(range(num_experts)):
        raise ValueError(
            f"physical_to_logical: expected each of {num_experts} experts at least once, as many "
            f"on each of {num_ranks} ranks, got {logical_P}"
        )
    copies_E = [[p for p in range(P) if logical_P[p] == e] for e in range(num_experts)]
    most = max(map(len, copies_E), default=0)
    padded_E = [copies + [-1] * (most - len(copies)) for copies in copies_E]

    def ids(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=physical_to_logical.device)

    return Placement(
        ids(logical_P),
        ids(padded_E).view(num_experts, most),
        ids([len(copies) for copies in copies_E]),
        ids([p * num_ranks // P for p in range(P)]),
    )


def physical_ids(expert_ids: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Choose a copy for every pair: the j-th pair of an expert, by slot, takes copy j mod X_e.

    The choice follows from the ids alone, so that ranks that see the same tokens choose alike, and
    the copies of an expert differ by one pair at most.

    Args:
        expert_ids: [T, K], int32 or int64.
        placement: X_e copies of expert e.

    Returns:
        [T, K], the dtype given: physical experts, -1 where an expert is not here.

    Raises:
        TypeError: an argument has the wrong dtype.

    >>> placement = make_placement(torch.tensor([0, 1, 0, 2]), 3, 2)
    >>> physical_ids(torch.tensor([[0, 1], [0, 9], [0, 2]]), placement).tolist()
    [[0, 1], [2, -1], [0, 3]]
    """
    ids_S = local_ids(expert_ids, len(placement.replica_count)).flatten()
    copies_EX = placement.logical_to_physical.to(ids_S)
    chosen_S = torch.full_like(ids_S, -1)
    for e, count in enumerate(placement.replica_count.tolist()):
        slots = (ids_S == e).nonzero()[:, 0]
        turn = torch.arange(len(slots), device=slots.device) % count
        chosen_S[slots] = copies_EX[e, turn]
    return chosen_S.view(expert_ids.shape).to(expert_ids.dtype)


def logical_ids(physical: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The inverse of `physical_ids`: what each physical expert is a copy of, -1 where not here.

    >>> logical_ids(torch.tensor([2, 3, -1]), make_placement(torch.tensor([0, 1, 0, 2]), 3, 2))
    tensor([ 0,  2, -1])
    """
    logical_P = placement.physical_to_logical
    rows = local_ids(physical, len(logical_P))
    ids = torch.full_like(rows, -1)
    ids[rows >= 0] = logical_P.to(rows)[rows[rows >= 0]]
    return ids.to(physical.dtype)


def _check_ranks(num_experts: int, world_size: int, rank: int) -> None:
    check_count("num_experts", num_experts)
    check_count("world_size", world_size, 1)
    check_count("rank", rank)
    if rank >= world_size:
        raise ValueError(f"rank: expected at most {world_size - 1}, got {rank}")


def _index(num_experts: int, held: Sequence[int]) -> torch.Tensor:
    """The ids as an index, or an error where one is outside [0, E)."""
    for e in held:
        check_count("held", e)
        if e >= num_experts:
            raise ValueError(f"held: expected experts below {num_experts}, got {e}")
    return torch.tensor(held, dtype=torch.int64)


def _is_gated(experts: ExpertWeights) -> bool:
    """Whether there is a gate; or an error where the weights do not fit each other."""
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"experts: expected ExpertWeights, got {type(experts).__name__}")
    check_tensor("experts.gate_up", experts.gate_up, ("E", "J", "H"))
    check_tensor("experts.down", experts.down, ("E", "H", "I"))
    gated = experts.gate_up.shape[1] != experts.down.shape[2]
    check_weights(experts, gated, prefix="experts.")
    return gated


def _cut_halves(rows: torch.Tensor, halves: int, start: int, count: int) -> torch.Tensor:
    """[E, J, ...] to `count` rows of each half."""
    return torch.cat([half.narrow(1, start, count) for half in rows.tensor_split(halves, 1)], 1)


def _columns(
    parts: Sequence[ExpertWeights], same: tuple[int, int]
) -> dict[str, list[torch.Tensor]]:
    """The tensors of all parts by name; or an error unless two dimensions of down are the same."""
    # A part of width 0 looks as if it had no gate.
    gated = {_is_gated(part) for part in parts if _is_gated(part) or part.down.shape[2] > 0}
    sizes = {tuple(part.down.shape[dim] for dim in same) for part in parts}
    present = [{n: t for n, t in vars(part).items() if t is not None} for part in parts]
    if len(gated) > 1 or len(sizes) != 1 or any(p.keys() != present[0].keys() for p in present):
        shapes = [{name: list(tensor.shape) for name, tensor in part.items()} for part in present]
        raise ValueError(f"parts: expected parts of the same experts, got {shapes}")
    return {name: [part[name] for part in present] for name in present[0]}
