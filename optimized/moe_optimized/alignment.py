"""Which slots each block of a blocked product works on: no host sync, the same bits every time.

Stages, and what each gains:

1. `align_torch`: one stable sort, binary searches for the experts' bounds and one scatter. Nothing
   is read back by the host. This is what a CPU user gets.

Dimension key: T tokens, K experts per token, E experts, B block size, C rows of a batched expert,
M entries of the buffer, S slots that go somewhere.
"""

import torch
from moe_reference.checks import IDS, check_count, check_tensor

_LARGEST = torch.iinfo(torch.int32).max


def align(
    expert_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    drop_invalid: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots by expert, each expert's share filled up to whole blocks.

    Args:
        expert_ids: [T, K], int32 or int64; with a map they are global.
        block_size: B, at least 1.
        num_experts: E, with a map the number of global experts.
        expert_map: [E], int32 or int64, each expert's local row or -1, or None.
        drop_invalid: leave out the slots that the map sends to -1, instead of marking their blocks.

    Returns:
        sorted_slots: [M], int32, ascending inside an expert, then the sentinel T·K.
        block_experts: [ceil(M / B)], int32; with a map the local row.
        padded_length: [1], int32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or M beyond int32. A map's
            rows are checked on a CPU only; on a GPU a row of E or higher means *not here*.
    """
    return align_torch(expert_ids, block_size, num_experts, expert_map, drop_invalid)


def align_batched(
    tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `align`, for rows that stand expert by expert in a batch [E, C, H].

    Args:
        tokens_per_expert: [E], int32 or int64, from 0 to C each.
        max_tokens: C.
        block_size: B, at least 1.

    Returns:
        sorted_rows: [E·ceil(C / B)·B], int32: e·C + i, then the sentinel E·C.
        block_experts: [E·ceil(C / B)], int32.
        padded_length: [1], int32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a buffer beyond int32.
            Counts are checked on a CPU only; on a GPU they are clamped to [0, C].
    """
    return align_batched_torch(tokens_per_expert, max_tokens, block_size)


def align_torch(
    expert_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    drop_invalid: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `align`, in whole-tensor torch operations."""
    size = _check(expert_ids, block_size, num_experts, expert_map)
    if drop_invalid:
        groups, names = local_ids(expert_ids, num_experts, expert_map), None
    else:
        groups, names = local_ids(expert_ids, num_experts), expert_map
    order, ends = sort_slots(groups, num_experts)
    counts = ends.diff(prepend=ends.new_zeros(1))
    expert_of = groups.flatten()[order]
    # Ids that mean *not here* come last in the order; their place is one past the buffer.
    here = torch.arange(order.numel(), device=order.device) < ends[-1]
    rank = torch.arange(order.numel(), device=order.device) - (ends - counts)[expert_of]
    return _fill(order, expert_of, rank, here, counts, names, size, block_size, expert_ids.numel())


def align_batched_torch(
    tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `align_batched`, in whole-tensor torch operations."""
    size = _check_batched(tokens_per_expert, max_tokens, block_size)
    counts = tokens_per_expert.long().clamp(0, max_tokens)
    rows = torch.arange(counts.numel() * max_tokens, device=counts.device)
    expert_of = rows // max(max_tokens, 1)
    rank = rows - expert_of * max_tokens
    here = rank < counts[expert_of]
    return _fill(rows, expert_of, rank, here, counts, None, size, block_size, rows.numel())


def _fill(
    slots: torch.Tensor,
    expert_of: torch.Tensor,
    rank: torch.Tensor,
    here: torch.Tensor,
    counts: torch.Tensor,
    names: torch.Tensor | None,
    size: int,
    block_size: int,
    sentinel: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = (counts + block_size - 1) // block_size
    block_ends = blocks.cumsum(0)
    start = (block_ends - blocks) * block_size
    place = torch.where(here, start[expert_of] + rank, size)
    sorted_slots = slots.new_full((size + 1,), sentinel, dtype=torch.int32)
    # Past the buffer several slots meet; only the sentinel that is cut off below stands there.
    sorted_slots.scatter_(0, place, torch.where(here, slots, sentinel).to(torch.int32))

    num_blocks = -(-size // block_size)
    if counts.numel() == 0:
        block_experts = counts.new_full((num_blocks,), -1, dtype=torch.int32)
        return sorted_slots[:size].clone(), block_experts, counts.new_zeros(1, dtype=torch.int32)
    block_ids = torch.arange(num_blocks, device=counts.device)
    expert = torch.searchsorted(block_ends, block_ids, right=True)
    in_use = expert < counts.numel()
    expert = expert.clamp(max=counts.numel() - 1)
    name = expert if names is None else names.long()[expert].clamp(min=-1)
    block_experts = torch.where(in_use, name, -1).to(torch.int32)
    padded_length = (block_ends[-1:] * block_size).to(torch.int32)
    return sorted_slots[:size].clone(), block_experts, padded_length


def local_ids(
    expert_ids: torch.Tensor, num_local: int, expert_map: torch.Tensor | None = None
) -> torch.Tensor:
    """The row of the weights that each id means, -1 where it means *not here*.

    Args:
        expert_ids: int32 or int64, any shape; with a map they are global.
        num_local: rows of the weights.
        expert_map: [global experts], each one's local row or -1, or None.

    Returns:
        int64, the shape of `expert_ids`.
    """
    ids = expert_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        if expert_map.numel() == 0:
            return torch.full_like(ids, -1)
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_local), ids, -1)


def sort_slots(local: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in expert order and where each expert's end, without a look at any value.

    Args:
        local: [T, K], int64, from -1 to E - 1, as `local_ids` returns.
        num_experts: E.

    Returns:
        order: [T·K], int64, ascending inside an expert; slots of -1 come last.
        ends: [E], int64, the inclusive cumulative sum of the experts' counts.
    """
    keys = torch.where(local < 0, num_experts, local).flatten()
    keys, order = keys.sort(stable=True)
    experts = torch.arange(num_experts, device=keys.device)
    return order, torch.searchsorted(keys, experts, right=True)


def _check(
    expert_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None,
) -> int:
    check_tensor("expert_ids", expert_ids, ("T", "K"), IDS)
    check_count("block_size", block_size, 1)
    check_count("num_experts", num_experts, 1)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, (num_experts,), IDS)
        check_map(expert_map, num_experts)
    numel = expert_ids.numel()
    size = numel + num_experts * (block_size - 1)
    if numel < num_experts:
        size = min(size, numel * block_size)
    return _check_size(size)


def check_map(expert_map: torch.Tensor, num_local: int) -> None:
    """Raise ValueError where a map in CPU memory leads to a row that there is not."""
    if (
        expert_map.device.type == "cpu"
        and expert_map.numel()
        and int(expert_map.max()) >= num_local
    ):
        raise ValueError(
            f"expert_map: expected rows below {num_local}, got {int(expert_map.max())}"
        )


def _check_batched(tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int) -> int:
    check_tensor("tokens_per_expert", tokens_per_expert, ("E",), IDS)
    check_count("max_tokens", max_tokens)
    check_count("block_size", block_size, 1)
    check_tokens(tokens_per_expert, max_tokens)
    return _check_size(tokens_per_expert.numel() * -(-max_tokens // block_size) * block_size)


def check_tokens(tokens_per_expert: torch.Tensor, capacity: int) -> None:
    """Raise ValueError where a count in CPU memory is outside [0, capacity]."""
    if tokens_per_expert.device.type == "cpu" and tokens_per_expert.numel():
        low, high = (int(bound) for bound in tokens_per_expert.aminmax())
        if low < 0 or high > capacity:
            raise ValueError(
                f"tokens_per_expert: expected counts from 0 to {capacity}, "
                f"got {low if low < 0 else high}"
            )


def _check_size(size: int) -> int:
    if size > _LARGEST:
        raise ValueError(f"block_size: expected a buffer of at most 2^31 - 1 entries, got {size}")
    return size
