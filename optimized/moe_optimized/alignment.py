"""Which slots each block of a blocked product works on: no host sync, the same bits every time.

Stages, and what each gains:

1. `align_torch`: one stable sort, binary searches for the experts' bounds and one scatter. Nothing
   is read back by the host. This is what a CPU user gets.
2. `align_triton`, up to 4096 slots: one launch. Each program ranks the slots of a few experts with
   a running sum over a mask; no sort, and no atomics, whose order would change from run to run.
3. Beyond, three launches: a histogram per chunk of slots, a running sum over the chunks, and the
   ranking with one program per experts and chunk.
4. `tile_table`: the same kernels without the padding, which masks make superfluous where the
   consumer reads a tile's first row and its number of rows.

Dimension key: T tokens, K experts per token, E experts, B block size, C rows of a batched expert,
M entries of the buffer, S slots that go somewhere.
"""

from dataclasses import dataclass

import torch
from moe_reference.checks import IDS, check_count, check_tensor

from moe_optimized.compiling import opaque
from moe_optimized.interpreter import COMPILED, INTERPRETED, jit, launch, power_of_two, tl

_LARGEST = torch.iinfo(torch.int32).max
_CHUNK = 4096


@opaque
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
    run = align_triton if COMPILED and expert_ids.is_cuda else align_torch
    return run(expert_ids, block_size, num_experts, expert_map, drop_invalid)


@opaque
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
    run = align_batched_triton if COMPILED and tokens_per_expert.is_cuda else align_batched_torch
    return run(tokens_per_expert, max_tokens, block_size)


@opaque
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


@opaque
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


@opaque
def align_triton(
    expert_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    drop_invalid: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `align`, in one Triton kernel up to 4096 slots and in three beyond."""
    size = _check(expert_ids, block_size, num_experts, expert_map)
    num_blocks = _ceil(size, block_size)
    sorted_slots = expert_ids.new_empty(size, dtype=torch.int32)
    block_experts = expert_ids.new_empty(num_blocks, dtype=torch.int32)
    padded_length = expert_ids.new_empty(1, dtype=torch.int32)
    _place(
        expert_ids,
        expert_map,
        drop_invalid,
        num_experts,
        block_size,
        True,
        (sorted_slots, block_experts, padded_length, padded_length, padded_length),
    )
    return sorted_slots, block_experts, padded_length


@dataclass(frozen=True)
class TileTable:
    """Which rows each tile of a grouped product works on, without padding.

    Attributes:
        order: [T·K], int32, slots in expert order, ascending inside an expert. Past the slots that
            are here stands anything.
        place: [T·K], int32, the inverse: where in `order` a slot stands, -1 for *not here*.
        experts: [tiles], int32, the expert of each tile, -1 past the last one.
        first: [tiles], int32, the tile's first place in `order`.
        rows: [tiles], int32, its number of rows, at most the tile's height.
    """

    order: torch.Tensor
    place: torch.Tensor
    experts: torch.Tensor
    first: torch.Tensor
    rows: torch.Tensor


def tile_table(
    expert_ids: torch.Tensor,
    height: int,
    num_local: int,
    expert_map: torch.Tensor | None = None,
) -> TileTable:
    """Cut each expert's slots into tiles of at most `height` rows, in Triton and without a sync.

    Args:
        expert_ids: [T, K], int32 or int64; with a map they are global.
        height: rows of a tile.
        num_local: rows of the weights.
        expert_map: global ids to local rows, or None.

    Returns:
        The tiles, as many as there can be whatever the ids are.
    """
    slots = expert_ids.numel()
    tiles = min(slots, (slots + num_local * (height - 1)) // height)
    table = TileTable(
        *(expert_ids.new_empty(n, dtype=torch.int32) for n in (slots, slots, tiles, tiles, tiles))
    )
    buffers = (table.order, table.experts, table.place, table.first, table.rows)
    _place(expert_ids, expert_map, True, num_local, height, False, buffers)
    return table


def _place(
    expert_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    drop_invalid: bool,
    num_experts: int,
    block_size: int,
    padded: bool,
    buffers: tuple[torch.Tensor, ...],
) -> None:
    """Launch the one kernel or the three.

    Args:
        expert_ids: [T, K].
        expert_map: global ids to local rows, or None.
        drop_invalid: group slots by the map's rows; without, by id, and map the blocks' names.
        num_experts: groups.
        block_size: rows of a block or tile.
        padded: whether each group starts at a multiple of `block_size`.
        buffers: slots, block experts, and then the length and two of anything (padded), or the
            inverse, the first row and the number of rows of each tile (not padded).
    """
    ids = expert_ids.contiguous()
    slots, block_experts = buffers[:2]
    numel = ids.numel()
    chunk = min(_CHUNK, power_of_two(numel, least=128))
    chunks = max(1, _ceil(numel, chunk))
    # One more bin than experts holds the ids that are not here. At least 128, a thread each.
    bins = power_of_two(num_experts + 1, least=128)
    has_map = expert_map is not None
    shared = (ids, expert_map.contiguous() if has_map else ids)
    sizes = (expert_map.numel() if has_map else 0, numel, num_experts)
    flags = {"MAP_IDS": has_map and drop_invalid, "BINS": bins, "BLOCK_S": chunk}
    counts = bases = slots
    if chunks > 1:
        bases = ids.new_empty((chunks, bins), dtype=torch.int32)
        counts = ids.new_empty(bins, dtype=torch.int32)
        launch(align_count_kernel, (chunks,), *shared, bases, *sizes, **flags)
        launch(
            align_scan_kernel,
            (bins // 16,),
            bases,
            counts,
            chunks,
            BINS=bins,
            BLOCK_C=power_of_two(chunks),
            BLOCK_E=16,
        )
    block_e = min(power_of_two(num_experts), 64) if INTERPRETED else 1
    programs = max(1, _ceil(num_experts, block_e))
    size = slots.numel() if padded else 0
    fill = 1024
    fill_steps = _ceil(max(size, block_experts.numel()), fill * programs * chunks)
    block_steps = _ceil(_ceil(numel, block_size), 64 * chunks)
    launch(
        align_place_kernel,
        (programs, chunks),
        *shared,
        bases,
        counts,
        *buffers,
        *sizes,
        block_size,
        size,
        block_experts.numel(),
        fill_steps,
        block_steps,
        MAP_BLOCKS=has_map and not drop_invalid,
        CHUNKED=chunks > 1,
        PADDED=padded,
        BLOCK_E=block_e,
        BLOCK_J=64,
        BLOCK_B=power_of_two(block_size),
        BLOCK_F=fill,
        **flags,
    )


@opaque
def align_batched_triton(
    tokens_per_expert: torch.Tensor, max_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `align_batched`, in one Triton kernel."""
    size = _check_batched(tokens_per_expert, max_tokens, block_size)
    E = tokens_per_expert.numel()
    sorted_rows = tokens_per_expert.new_empty(size, dtype=torch.int32)
    block_experts = tokens_per_expert.new_empty(size // block_size, dtype=torch.int32)
    padded_length = tokens_per_expert.new_empty(1, dtype=torch.int32)
    height = size // max(E, 1)
    block_e = min(power_of_two(E), 64) if INTERPRETED else 1
    block_r = min(power_of_two(height, least=16), 1024)
    launch(
        align_batched_kernel,
        (max(1, _ceil(E, block_e)), max(1, _ceil(height, block_r))),
        tokens_per_expert.contiguous(),
        sorted_rows,
        block_experts,
        padded_length,
        E,
        max_tokens,
        block_size,
        height,
        BINS=power_of_two(E),
        BLOCK_E=block_e,
        BLOCK_R=block_r,
    )
    return sorted_rows, block_experts, padded_length


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

    num_blocks = _ceil(size, block_size)
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
    return _check_size(tokens_per_expert.numel() * _ceil(max_tokens, block_size) * block_size)


def check_tokens(tokens_per_expert: torch.Tensor, capacity: int) -> None:
    """Raise ValueError where a count in CPU memory is outside [0, capacity]."""
    if tokens_per_expert.device.type == "cpu" and tokens_per_expert.numel():
        low, high = (int(bound) for bound in tokens_per_expert.aminmax())
        if low < 0 or high > capacity:
            raise ValueError(
                f"tokens_per_expert: expected counts from 0 to {capacity}, "
                f"got {low if low < 0 else high}"
            )


def _ceil(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _check_size(size: int) -> int:
    if size > _LARGEST:
        raise ValueError(f"block_size: expected a buffer of at most 2^31 - 1 entries, got {size}")
    return size


@jit
def load_groups(
    ids_ptr,
    map_ptr,
    slots,
    map_size,
    numel,
    num_experts,
    MAP_IDS: tl.constexpr,
):
    """The group of each slot, int32; `num_experts` for a slot that is not here or not at all."""
    ids = tl.load(ids_ptr + slots, mask=slots < numel, other=-1)
    if MAP_IDS:
        known = (ids >= 0) & (ids < map_size)
        ids = tl.load(map_ptr + tl.where(known, ids, 0), mask=known, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@jit
def align_count_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    map_size,
    numel,
    num_experts,
    MAP_IDS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Counts per group of one chunk of slots, [chunks, BINS]."""
    chunk = tl.program_id(0)
    slots = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    groups = load_groups(ids_ptr, map_ptr, slots, map_size, numel, num_experts, MAP_IDS)
    counts = tl.histogram(groups, BINS)
    tl.store(counts_ptr + chunk.to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@jit
def align_scan_kernel(
    counts_ptr,
    totals_ptr,
    num_chunks,
    BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each chunk's counts become the sum over the chunks before it; the totals go elsewhere."""
    chunks = tl.arange(0, BLOCK_C)
    bins = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    cells = counts_ptr + chunks.to(tl.int64)[:, None] * BINS + bins[None, :]
    mask = (chunks < num_chunks)[:, None] & (bins < BINS)[None, :]
    counts = tl.load(cells, mask=mask, other=0)
    tl.store(cells, tl.cumsum(counts, 0) - counts, mask=mask)
    tl.store(totals_ptr + bins, tl.sum(counts, 0), mask=bins < BINS)


@jit
def align_place_kernel(
    ids_ptr,
    map_ptr,
    bases_ptr,
    totals_ptr,
    slots_ptr,
    block_experts_ptr,
    length_or_place_ptr,
    first_ptr,
    rows_ptr,
    map_size,
    numel,
    num_experts,
    block_size,
    size,
    num_blocks,
    fill_steps,
    block_steps,
    MAP_IDS: tl.constexpr,
    MAP_BLOCKS: tl.constexpr,
    CHUNKED: tl.constexpr,
    PADDED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Place one chunk's slots of BLOCK_E experts, and a share of the blocks and of the rest."""
    chunk = tl.program_id(1)
    slots = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    groups = load_groups(ids_ptr, map_ptr, slots, map_size, numel, num_experts, MAP_IDS)
    bins = tl.arange(0, BINS)
    if CHUNKED:
        totals = tl.load(totals_ptr + bins, mask=bins < num_experts, other=0)
    else:
        totals = tl.where(bins < num_experts, tl.histogram(groups, BINS), 0)
    blocks = (totals + block_size - 1) // block_size
    num_used = tl.sum(blocks, 0)

    first_expert = tl.program_id(0) * BLOCK_E
    experts = first_expert + tl.arange(0, BLOCK_E)
    mine = (groups[None, :] == experts[:, None]) & (experts < num_experts)[:, None]
    counts = tl.sum(tl.where(bins[None, :] == experts[:, None], totals[None, :], 0), 1)
    counts = tl.where(experts < num_experts, counts, 0)
    my_blocks = (counts + block_size - 1) // block_size
    blocks_before = tl.sum(tl.where(bins < first_expert, blocks, 0), 0)
    first_blocks = blocks_before + tl.cumsum(my_blocks, 0) - my_blocks
    if PADDED:
        starts = first_blocks * block_size
    else:
        rows_before = tl.sum(tl.where(bins < first_expert, totals, 0), 0)
        starts = rows_before + tl.cumsum(counts, 0) - counts

    ranks = tl.cumsum(mine.to(tl.int32), 1) - 1
    if CHUNKED:
        cells = bases_ptr + chunk.to(tl.int64) * BINS + experts
        ranks += tl.load(cells, mask=experts < num_experts, other=0)[:, None]
    places = starts[:, None] + ranks
    slot_rows = tl.broadcast_to(slots[None, :], (BLOCK_E, BLOCK_S))
    tl.store(slots_ptr + places, slot_rows, mask=mine)

    for step in range(0, block_steps):
        j = (step * tl.num_programs(1) + chunk) * BLOCK_J + tl.arange(0, BLOCK_J)
        in_use = j[None, :] < my_blocks[:, None]
        where = first_blocks[:, None] + j[None, :]
        names = experts
        if MAP_BLOCKS:
            names = tl.load(map_ptr + experts, mask=experts < num_experts, other=-1).to(tl.int32)
            names = tl.where(names < 0, -1, names)
        names = tl.broadcast_to(names[:, None], (BLOCK_E, BLOCK_J))
        tl.store(block_experts_ptr + where, names, mask=in_use)
        if not PADDED:
            done = j[None, :] * block_size
            tl.store(first_ptr + where, starts[:, None] + done, mask=in_use)
            left = counts[:, None] - done
            tl.store(rows_ptr + where, tl.where(left < block_size, left, block_size), mask=in_use)

    if PADDED:
        pad = tl.arange(0, BLOCK_B)[None, :]
        missing = tl.where(chunk == 0, my_blocks * block_size - counts, 0)
        ends = starts[:, None] + counts[:, None] + pad
        sentinels = tl.zeros((BLOCK_E, BLOCK_B), tl.int32) + numel
        tl.store(slots_ptr + ends, sentinels, mask=pad < missing[:, None])
        if (first_expert == 0) & (chunk == 0):
            tl.store(length_or_place_ptr, num_used * block_size)
    else:
        tl.store(length_or_place_ptr + slot_rows, places, mask=mine)
        if first_expert == 0:
            nowhere = (groups == num_experts) & (slots < numel)
            tl.store(length_or_place_ptr + slots, tl.zeros((BLOCK_S,), tl.int32) - 1, mask=nowhere)

    program = chunk * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for step in range(0, fill_steps):
        rest = (step * programs + program) * BLOCK_F + tl.arange(0, BLOCK_F)
        nobody = tl.zeros((BLOCK_F,), tl.int32) - 1
        tail = (rest >= num_used) & (rest < num_blocks)
        tl.store(block_experts_ptr + rest, nobody, mask=tail)
        if PADDED:
            tail = (rest >= num_used * block_size) & (rest < size)
            tl.store(slots_ptr + rest, nobody + 1 + numel, mask=tail)


@jit
def align_batched_kernel(
    counts_ptr,
    rows_ptr,
    block_experts_ptr,
    length_ptr,
    num_experts,
    max_tokens,
    block_size,
    height,
    BINS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Place BLOCK_R rows of BLOCK_E experts, whose buffers hold `height` rows each."""
    bins = tl.arange(0, BINS)
    totals = tl.load(counts_ptr + bins, mask=bins < num_experts, other=0).to(tl.int32)
    totals = tl.where(totals < 0, 0, tl.where(totals > max_tokens, max_tokens, totals))
    blocks = (totals + block_size - 1) // block_size
    num_used = tl.sum(blocks, 0)

    first_expert = tl.program_id(0) * BLOCK_E
    experts = first_expert + tl.arange(0, BLOCK_E)
    counts = tl.sum(tl.where(bins[None, :] == experts[:, None], totals[None, :], 0), 1)
    my_blocks = (counts + block_size - 1) // block_size
    blocks_before = tl.sum(tl.where(bins < first_expert, blocks, 0), 0)
    first_blocks = blocks_before + tl.cumsum(my_blocks, 0) - my_blocks

    i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    sentinel = num_experts * max_tokens
    rows = tl.where(i < counts[:, None], experts[:, None] * max_tokens + i, sentinel)
    in_use = i < my_blocks[:, None] * block_size
    tl.store(rows_ptr + first_blocks[:, None] * block_size + i, rows, mask=in_use)
    names = tl.broadcast_to(experts[:, None], (BLOCK_E, BLOCK_R))
    in_use = i < my_blocks[:, None]
    tl.store(block_experts_ptr + first_blocks[:, None] + i, names, mask=in_use)

    buffer = experts[:, None] * height + i
    inside = (experts < num_experts)[:, None] & (i < height)
    nobody = tl.zeros((BLOCK_E, BLOCK_R), tl.int32) - 1
    tail = inside & (buffer >= num_used * block_size)
    tl.store(rows_ptr + buffer, nobody + 1 + sentinel, mask=tail)
    blocks_each = height // block_size
    buffer = experts[:, None] * blocks_each + i
    inside = (experts < num_experts)[:, None] & (i < blocks_each)
    tl.store(block_experts_ptr + buffer, nobody, mask=inside & (buffer >= num_used))
    if (first_expert == 0) & (tl.program_id(1) == 0):
        tl.store(length_ptr, num_used * block_size)
