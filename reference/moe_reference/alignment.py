r"""Alignment: which slots each block of a blocked matrix product works on.

A kernel that multiplies B rows at a time by one expert's weights needs the slots sorted by expert
and every expert's share filled up to whole blocks. With $c_e$ slots of expert $e$, the blocks hold

$$
\text{padded length} = \sum_e \lceil c_e / B \rceil \cdot B
$$

entries, of which $\sum_e c_e$ are slots and the rest is a sentinel that stands for nobody.

Dimension key: T tokens, K experts per token, E experts, B block size, C rows of a batched
expert, M entries of the buffer.

The slot of token t's k-th pair is t · K + k. An id below 0, or at or above the number of experts,
or mapped to -1, means *not here*.
"""

import torch

from moe_reference.checks import IDS, check_count, check_counts, check_tensor

BLOCK_SIZES = (8, 16, 32, 48, 64)
"""The block sizes that `choose_block_size` picks from unless told otherwise."""


def align(
    expert_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    drop_invalid: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the slots by expert, each expert's share filled up to whole blocks.

    Experts without slots take no block. Ids outside [0, E) are left out always. With a map, what
    becomes of the experts that it maps to -1 depends on `drop_invalid`: without, they keep their
    blocks and these carry -1, so that a kernel can write zeros for them; with, their slots are left
    out, and whoever reads the product has to start from zeros.

    Args:
        expert_ids: [T, K], int32 or int64. With a map they are global.
        block_size: B, at least 1.
        num_experts: E, at least 1; with a map the number of global experts.
        expert_map: [E], int32 or int64: each expert's local row, or -1. None maps each to itself.
        drop_invalid: leave slots of experts that are mapped to -1 out, instead of marking blocks.

    Returns:
        sorted_slots [M], int32: each expert's slots, ascending, then the sentinel T · K up to a
        multiple of B. Experts are ascending: by global id without `drop_invalid`, by local row
        with it. M is `buffer_size(T * K, B, E)`, whatever the ids are.
        block_experts [ceil(M / B)], int32: the expert of each block; with a map its local row.
        padded_length [1], int32: entries of `sorted_slots` in use, a multiple of B.
        Past padded_length stand sentinels and -1, on which nobody should rely.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or is too small, a row in the map is E or
            higher, or M is beyond int32.

    Source: vLLM, `moe_align_block_size` and its CUDA kernel. The example is that of its docstring
    with the right answer: of E = 4 experts id 4 is none, so the length is 12 and not 16.

    >>> ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    >>> sorted_slots, block_experts, padded_length = align(ids, block_size=4, num_experts=4)
    >>> padded_length.item(), sorted_slots[:12].tolist(), block_experts[:3].tolist()
    (12, [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12], [1, 2, 3])
    """
    check_tensor("expert_ids", expert_ids, ("T", "K"), IDS)
    check_count("block_size", block_size, 1)
    check_count("num_experts", num_experts, 1)
    rows_E = torch.arange(num_experts, device=expert_ids.device)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, (num_experts,), IDS)
        rows_E = expert_map.long()

    if drop_invalid:
        group_ids = local_ids(expert_ids, num_experts, rows_E)
        block_names = torch.arange(num_experts)
    else:
        group_ids = local_ids(expert_ids, num_experts)
        block_names = rows_E.clamp(min=-1)
    slots_per_group = [(group_ids.flatten() == e).nonzero()[:, 0] for e in range(num_experts)]
    size = buffer_size(expert_ids.numel(), block_size, num_experts)
    return _fill_blocks(slots_per_group, block_names.tolist(), size, block_size, expert_ids.numel())


def align_batched(
    tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for rows that already stand expert by expert, in a batch [E, C, H].

    Row i of expert e has the id e · C + i, where the batch is read as [E · C, H].

    Args:
        tokens_per_expert: [E], int32 or int64, from 0 to C each: rows in use.
        max_tokens: C, rows of every expert, in use or not.
        block_size: B, at least 1. Neither C nor E · C has to be a multiple of it.

    Returns:
        sorted_rows [E · ceil(C / B) · B], int32: each expert's row ids, then the sentinel E · C up
        to a multiple of B; block_experts [E · ceil(C / B)], int32; padded_length [1], int32. Past
        padded_length stand sentinels and -1.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or is too small, a count is outside [0, C], or
            the buffer is beyond int32.

    Source: vLLM, `batched_moe_align_block_size`. The example is that of its docstring with the
    right experts, where 5 stood for the last two 4.

    >>> counts = torch.tensor([2, 3, 0, 6, 8])
    >>> sorted_rows, block_experts, padded_length = align_batched(counts, 8, 4)
    >>> padded_length.item(), block_experts.tolist()
    (24, [0, 1, 3, 3, 4, 4, -1, -1, -1, -1])
    >>> sorted_rows[:16].tolist()
    [0, 1, 40, 40, 8, 9, 10, 40, 24, 25, 26, 27, 28, 29, 40, 40]
    """
    check_tensor("tokens_per_expert", tokens_per_expert, ("E",), IDS)
    check_count("max_tokens", max_tokens)
    check_count("block_size", block_size, 1)
    check_counts(tokens_per_expert, max_tokens)

    E = len(tokens_per_expert)
    row_ids_EC = torch.arange(E * max_tokens, device=tokens_per_expert.device)
    row_ids_EC = row_ids_EC.view(E, max_tokens)
    rows_per_expert = [
        row_ids_C[:count]
        for row_ids_C, count in zip(row_ids_EC, tokens_per_expert.tolist(), strict=True)
    ]
    size = E * _blocks(max_tokens, block_size) * block_size
    return _fill_blocks(rows_per_expert, list(range(E)), size, block_size, E * max_tokens)


def _fill_blocks(
    groups: list[torch.Tensor], names: list[int], size: int, block_size: int, sentinel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay the groups out one after the other, each from the start of a block."""
    if size > torch.iinfo(torch.int32).max:
        raise ValueError(f"block_size: expected a buffer of at most 2^31 - 1 entries, got {size}")
    device = groups[0].device if groups else None
    sorted_M = torch.full((size,), sentinel, dtype=torch.int32, device=device)
    block_experts = torch.full((_blocks(size, block_size),), -1, dtype=torch.int32, device=device)
    start = 0
    for name, group in zip(names, groups, strict=True):
        blocks = _blocks(len(group), block_size)
        first_block = start // block_size
        sorted_M[start : start + len(group)] = group
        block_experts[first_block : first_block + blocks] = name
        start += blocks * block_size
    return sorted_M, block_experts, torch.tensor([start], dtype=torch.int32, device=device)


def local_ids(
    expert_ids: torch.Tensor, num_local: int, expert_map: torch.Tensor | None = None
) -> torch.Tensor:
    """The row of the weights that each id means, -1 where it means *not here*.

    Args:
        expert_ids: int32 or int64, any shape. With a map they are global.
        num_local: rows of the weights.
        expert_map: int32 or int64, one entry per global expert: its local row, or -1.

    Returns:
        int64, the shape of `expert_ids`.

    Raises:
        TypeError: ids or map have the wrong dtype.
        ValueError: the map is not one-dimensional, or leads to a row that there is not.

    >>> local_ids(torch.tensor([-1, 0, 2, 3]), 2, torch.tensor([-1, 0, 1])).tolist()
    [-1, -1, 1, -1]
    """
    check_tensor("expert_ids", expert_ids, getattr(expert_ids, "shape", ()), IDS)
    ids = expert_ids.long()
    if expert_map is None:
        return ids.where((ids >= 0) & (ids < num_local), -1)
    check_tensor("expert_map", expert_map, ("E",), IDS)
    if bool((expert_map >= num_local).any()):
        raise ValueError(
            f"expert_map: expected rows below {num_local}, got {int(expert_map.max())}"
        )
    known = (ids >= 0) & (ids < len(expert_map))
    rows = torch.full_like(ids, -1)
    rows[known] = expert_map.long()[ids[known]].clamp(min=-1)
    return rows


def buffer_size(num_slots: int, block_size: int, num_experts: int, round_up: bool = False) -> int:
    """Entries that are enough for `num_slots` slots, however they fall on the experts.

    Each expert wastes at most B - 1 entries of its last block. With fewer slots than experts, at
    most one block per slot is begun.

    Args:
        num_slots: T · K.
        block_size: B.
        num_experts: E.
        round_up: to a multiple of B.

    Returns:
        `num_slots` + E · (B - 1), but no more than `num_slots` · B where `num_slots` < E.

    Source: vLLM, `moe_align_block_size` (`round_up` is its `pad_sorted_ids`).

    >>> buffer_size(12, 4, 4), buffer_size(2, 4, 8), buffer_size(13, 4, 4, round_up=True)
    (24, 8, 28)
    """
    check_count("num_slots", num_slots)
    check_count("block_size", block_size, 1)
    check_count("num_experts", num_experts, 1)
    size = num_slots + num_experts * (block_size - 1)
    if round_up:
        size = _blocks(size, block_size) * block_size
    return min(size, num_slots * block_size) if num_slots < num_experts else size


def choose_block_size(
    rows_per_expert: float, block_sizes: tuple[int, ...] = BLOCK_SIZES, fill: float = 0.9
) -> int:
    """The smallest block size that an average expert does not fill.

    Args:
        rows_per_expert: slots divided by the experts that they fall on. Both must be counted
            alike: global slots over local experts, as published, overstate it by the number of
            ranks.
        block_sizes: what there is to choose from, ascending.
        fill: the share of a block from which on it counts as full.

    Returns:
        The first B with `rows_per_expert` / B < `fill`, or the last where there is none.

    Raises:
        ValueError: `block_sizes` is empty or not ascending, or `rows_per_expert` is negative or
            NaN.

    Source: vLLM, `fused_marlin_moe`.

    >>> [choose_block_size(rows) for rows in (0, 7.1, 7.2, 1000)]
    [8, 8, 16, 64]
    """
    if not block_sizes or list(block_sizes) != sorted(set(block_sizes)):
        raise ValueError(f"block_sizes: expected ascending sizes, got {block_sizes}")
    if not rows_per_expert >= 0:
        raise ValueError(f"rows_per_expert: expected a number >= 0, got {rows_per_expert}")
    for block_size in block_sizes:
        if rows_per_expert / block_size < fill:
            break
    return block_size


def _blocks(entries: int, block_size: int) -> int:
    return -(-entries // block_size)
