import itertools

import pytest
import torch
from moe_reference.alignment import (
    align,
    align_batched,
    buffer_size,
    choose_block_size,
    local_ids,
)

EXPERTS = (1, 2, 3, 7, 8, 72, 257)


def random_ids(tokens, top_k, num_experts, seed=0):
    """Ids from below 0 to above E, and equal ones in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, num_experts + 2, (tokens, top_k), generator=generator)


def aligned_by_hand(ids, block_size, num_experts, expert_map=None, drop_invalid=False):
    """The entries in use and their experts, from Python dictionaries."""
    groups = {}
    flat = ids.flatten().tolist()
    for slot, expert in enumerate(flat):
        if not 0 <= expert < num_experts:
            continue
        row = expert if expert_map is None else expert_map[expert]
        if drop_invalid and row < 0:
            continue
        key = row if drop_invalid else expert
        groups.setdefault(key, (row, []))[1].append(slot)
    entries, blocks = [], []
    for key in sorted(groups):
        row, slots = groups[key]
        padded = slots + [len(flat)] * (-len(slots) % block_size)
        entries += padded
        blocks += [row] * (len(padded) // block_size)
    return entries, blocks


def assert_aligned(result, expected, num_slots, block_size, num_experts):
    sorted_slots, block_experts, padded_length = result
    entries, blocks = expected
    size = buffer_size(num_slots, block_size, num_experts)
    assert {t.dtype for t in result} == {torch.int32}
    assert padded_length.shape == (1,)
    assert padded_length.item() == len(entries)
    assert sorted_slots.tolist() == entries + [num_slots] * (size - len(entries))
    assert block_experts.tolist() == blocks + [-1] * (-(-size // block_size) - len(blocks))


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_align_equals_a_dictionary_of_slots(num_experts, block_size):
    for tokens, top_k in [(0, 2), (1, 1), (5, 3), (33, min(num_experts, 8))]:
        ids = random_ids(tokens, top_k, num_experts, seed=tokens)
        for dtype in (torch.int32, torch.int64):
            result = align(ids.to(dtype), block_size, num_experts)
            expected = aligned_by_hand(ids, block_size, num_experts)
            assert_aligned(result, expected, ids.numel(), block_size, num_experts)


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_align_with_a_map_equals_a_dictionary_of_slots(num_experts, drop_invalid, dtype):
    generator = torch.Generator().manual_seed(num_experts)
    here = torch.rand(num_experts, generator=generator) < 0.5
    rows = torch.full((num_experts,), -1)
    rows[here] = torch.randperm(int(here.sum()), generator=generator)
    ids = random_ids(21, 4, num_experts)
    result = align(ids, 4, num_experts, rows.to(dtype), drop_invalid)
    expected = aligned_by_hand(ids, 4, num_experts, rows.tolist(), drop_invalid)
    assert_aligned(result, expected, ids.numel(), 4, num_experts)
    used = result[1][: result[2].item() // 4]
    if drop_invalid:
        assert bool((used >= 0).all())


def test_without_dropping_blocks_of_absent_experts_stay_and_carry_minus_one():
    ids, rows = torch.tensor([[0, 1], [1, 2]]), torch.tensor([1, -1, 0])
    kept = align(ids, 2, 3, rows)
    assert (kept[0][:6].tolist(), kept[1][:3].tolist()) == ([0, 4, 1, 2, 3, 4], [1, -1, 0])
    dropped = align(ids, 2, 3, rows, drop_invalid=True)
    assert (dropped[0][:4].tolist(), dropped[1][:2].tolist()) == ([3, 4, 0, 4], [0, 1])
    assert dropped[2].item() == 4


def test_replicas_share_blocks_only_where_slots_are_grouped_by_local_row():
    ids, rows = torch.tensor([[0], [1]]), torch.tensor([0, 0])
    assert align(ids, 2, 2, rows)[2].item() == 4
    assert align(ids, 2, 2, rows, drop_invalid=True)[2].item() == 2


def test_each_slot_is_there_once_when_every_expert_is_chosen():
    ids = torch.stack([torch.randperm(7) for _ in range(9)])
    sorted_slots, block_experts, padded_length = align(ids, 4, 7)
    used = sorted_slots[: padded_length.item()]
    assert used[used < 63].sort().values.tolist() == list(range(63))
    assert block_experts[: padded_length.item() // 4].unique().tolist() == list(range(7))


def test_align_takes_any_strides_and_leaves_its_arguments_alone():
    ids = random_ids(12, 6, 8)
    before = ids.clone()
    strided = ids.T.contiguous().T[::2, 1::2]
    for one, other in zip(align(strided, 4, 8), align(strided.clone(), 4, 8), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 4])
def test_the_buffer_is_large_enough_for_every_distribution(block_size, num_experts):
    for slots in range(9):
        size = buffer_size(slots, block_size, num_experts)
        rounded = buffer_size(slots, block_size, num_experts, round_up=True)
        worst = max(
            sum(-(-count // block_size) * block_size for count in counts)
            for counts in itertools.product(range(slots + 1), repeat=num_experts)
            if sum(counts) == slots
        )
        assert worst <= size <= rounded
        assert rounded % block_size == 0


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize(("capacity", "block_size"), [(8, 4), (96, 64), (8, 64), (5, 3), (0, 4)])
def test_align_batched_equals_a_list_of_rows(num_experts, capacity, block_size):
    generator = torch.Generator().manual_seed(capacity)
    counts = torch.randint(0, capacity + 1, (num_experts,), generator=generator)
    entries, blocks = [], []
    for expert, count in enumerate(counts.tolist()):
        rows = [expert * capacity + i for i in range(count)]
        padded = rows + [num_experts * capacity] * (-count % block_size)
        entries += padded
        blocks += [expert] * (len(padded) // block_size)
    size = num_experts * -(-capacity // block_size) * block_size
    for dtype in (torch.int32, torch.int64):
        sorted_rows, block_experts, length = align_batched(counts.to(dtype), capacity, block_size)
        assert {sorted_rows.dtype, block_experts.dtype, length.dtype} == {torch.int32}
        assert length.tolist() == [len(entries)]
        assert sorted_rows.tolist() == entries + [num_experts * capacity] * (size - len(entries))
        assert block_experts.tolist() == blocks + [-1] * (size // block_size - len(blocks))


def test_no_experts_have_no_rows():
    sorted_rows, block_experts, length = align_batched(torch.zeros(0, dtype=torch.int32), 8, 4)
    assert (sorted_rows.numel(), block_experts.numel(), length.item()) == (0, 0, 0)


def test_block_size_follows_from_the_rows_of_an_expert_alone():
    chosen = {0: 8, 7.19: 8, 7.2: 16, 14.39: 16, 14.4: 32, 28.8: 48, 43.2: 64, 57.6: 64, 1e9: 64}
    assert {rows: choose_block_size(rows) for rows in chosen} == chosen
    assert choose_block_size(100, (16, 128)) == 128
    assert choose_block_size(15, (16, 128), fill=1.0) == 16


def test_local_ids_are_minus_one_where_not_here():
    ids = torch.tensor([[-5, -1, 0], [2, 3, 2**40]])
    assert local_ids(ids, 3).tolist() == [[-1, -1, 0], [2, -1, -1]]
    rows = torch.tensor([1, -1, 0], dtype=torch.int32)
    assert local_ids(ids, 2, rows).tolist() == [[-1, -1, 1], [0, -1, -1]]
    assert local_ids(ids, 0, torch.zeros(0, dtype=torch.int64)).tolist() == [[-1] * 3] * 2


IDS = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: align([[0]], 4, 2), TypeError, "expert_ids: expected a tensor"),
        (lambda: align(IDS.float(), 4, 2), TypeError, "expert_ids: expected dtype"),
        (lambda: align(IDS[0], 4, 2), ValueError, r"expert_ids: expected shape \[T, K\]"),
        (lambda: align(IDS, 0, 2), ValueError, "block_size: expected at least 1, got 0"),
        (lambda: align(IDS, 4.0, 2), TypeError, "block_size: expected an int"),
        (lambda: align(IDS, 4, 0), ValueError, "num_experts: expected at least 1"),
        (lambda: align(IDS, 4, 2, IDS[0][:1]), ValueError, r"expert_map: expected shape \[2\]"),
        (lambda: align(IDS, 4, 2, IDS[0].float()), TypeError, "expert_map: expected dtype"),
        (lambda: align(IDS, 4, 2, IDS[0] + 2, True), ValueError, "expert_map: expected rows below"),
        (lambda: align(IDS, 2**31, 2), ValueError, "block_size: expected a buffer of at most"),
        (lambda: align_batched(IDS, 4, 2), ValueError, "tokens_per_expert: expected shape"),
        (lambda: align_batched(IDS[0] + 5, 4, 2), ValueError, "expected counts from 0 to 4, got 5"),
        (lambda: align_batched(IDS[0] - 1, 4, 2), ValueError, "from 0 to 4, got -1"),
        (lambda: align_batched(IDS[0], -1, 2), ValueError, "max_tokens: expected at least 0"),
        (lambda: buffer_size(-1, 4, 2), ValueError, "num_slots: expected at least 0"),
        (lambda: choose_block_size(-1.0), ValueError, "rows_per_expert: expected a number"),
        (lambda: choose_block_size(float("nan")), ValueError, "rows_per_expert"),
        (lambda: choose_block_size(1.0, ()), ValueError, "block_sizes: expected ascending"),
        (lambda: choose_block_size(1.0, (16, 8)), ValueError, "block_sizes: expected ascending"),
        (lambda: local_ids(IDS.float(), 2), TypeError, "expert_ids: expected dtype"),
        (lambda: local_ids(IDS, 2, IDS), ValueError, "expert_map: expected shape"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
