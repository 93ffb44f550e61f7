import pytest
import torch
from moe_optimized import alignment
from moe_optimized.alignment import (
    align_batched_torch,
    align_batched_triton,
    align_torch,
    align_triton,
    local_ids,
    sort_slots,
    tile_table,
)
from moe_optimized.interpreter import launches
from moe_reference import alignment as reference

implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(align_torch, id="torch"),
        pytest.param(align_triton, id="triton", marks=pytest.mark.triton),
    ],
)
batched_implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(align_batched_torch, id="torch"),
        pytest.param(align_batched_triton, id="triton", marks=pytest.mark.triton),
    ],
)

# Tokens, experts per token, experts.
SHAPES = [(0, 2, 3), (1, 1, 1), (3, 0, 2), (2, 2, 40), (19, 3, 5), (33, 2, 100)]


def draw(T, K, E, mapped, dtype=torch.int64):
    ids = torch.randint(-2, E + 2, (T, K), dtype=dtype)
    if not mapped:
        return ids, None
    expert_map = torch.randperm(E).to(torch.int32)
    expert_map[torch.rand(E) < 0.4] = -1
    return ids, expert_map


def same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype is torch.int32
        assert torch.equal(ours, theirs)


@implementations
@pytest.mark.parametrize("mapped", [False, True], ids=["", "mapped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(implementation, shape, mapped):
    for dtype in (torch.int32, torch.int64):
        ids, expert_map = draw(*shape, mapped, dtype)
        for block_size in (1, 3, 16):
            for drop_invalid in (False, True):
                arguments = (ids, block_size, shape[2], expert_map, drop_invalid)
                same(implementation(*arguments), reference.align(*arguments))


@implementations
def test_what_stood_in_memory_before_does_not_matter(implementation):
    ids, expert_map = draw(9, 3, 12, True)
    expected = reference.align(ids, 4, 12, expert_map)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        same(implementation(ids, 4, 12, expert_map), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@implementations
def test_strides_do_not_matter(implementation):
    ids, _ = draw(8, 6, 5, False)
    same(implementation(ids[::2, 1::3], 4, 5), reference.align(ids[::2, 1::3], 4, 5))


@implementations
def test_bad_arguments_are_refused(implementation):
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="block_size: expected at least 1"):
        implementation(ids, 0, 4)
    with pytest.raises(ValueError, match=r"expert_map: expected shape \[4\]"):
        implementation(ids, 4, 4, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expert_map: expected rows below 4, got 4"):
        implementation(ids, 4, 4, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="at most 2"):
        implementation(ids.repeat(2, 2), 2**30, 4)
    with pytest.raises(TypeError, match="expert_ids: expected dtype"):
        implementation(ids.float(), 4, 4)


@pytest.mark.triton
def test_many_slots_take_three_launches(monkeypatch):
    monkeypatch.setattr(alignment, "_CHUNK", 128)
    for mapped in (False, True):
        ids, expert_map = draw(150, 3, 20, mapped)
        for drop_invalid in (False, True):
            before = launches.copy()
            actual = align_triton(ids, 8, 20, expert_map, drop_invalid)
            kernels = ("align_count_kernel", "align_scan_kernel", "align_place_kernel")
            assert launches - before == dict.fromkeys(kernels, 1)
            same(actual, reference.align(ids, 8, 20, expert_map, drop_invalid))
    before = launches.copy()
    align_triton(ids[:40], 8, 20)
    assert launches - before == {"align_place_kernel": 1}


@pytest.mark.triton
@pytest.mark.parametrize("chunk", [128, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tile_table_covers_each_row_once(shape, chunk, monkeypatch):
    monkeypatch.setattr(alignment, "_CHUNK", chunk)
    T, K, E = shape
    ids = torch.randint(-2, E + 5, (5 * T, K))
    expert_map = torch.full((E + 3,), -1)
    expert_map[torch.randperm(E + 3)[:E]] = torch.arange(E)
    table = tile_table(ids, 4, E, expert_map)

    order, ends = sort_slots(local_ids(ids, E, expert_map), E)
    used = int(ends[-1])
    assert torch.equal(table.order[:used].long(), order[:used])
    place = torch.full((ids.numel(),), -1)
    place[order[:used]] = torch.arange(used)
    assert torch.equal(table.place.long(), place)
    expected = []
    for expert, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        expected += [(expert, at, min(4, end - at)) for at in range(start, end, 4)]
    tiles = zip(
        *(column.tolist() for column in (table.experts, table.first, table.rows)), strict=True
    )
    assert list(tiles)[: len(expected)] == expected
    assert (table.experts[len(expected) :] == -1).all()


@batched_implementations
def test_batched_agrees_with_the_reference(implementation):
    for E, C in ((0, 4), (3, 0), (1, 1), (5, 7), (70, 6)):
        counts = torch.randint(0, C + 1, (E,), dtype=torch.int32)
        for block_size in (1, 3, 8):
            arguments = (counts, C, block_size)
            same(implementation(*arguments), reference.align_batched(*arguments))


@batched_implementations
def test_batched_refuses_counts_beyond_the_rows(implementation):
    with pytest.raises(ValueError, match="tokens_per_expert: expected counts from 0 to 4, got 5"):
        implementation(torch.tensor([1, 5]), 4, 2)
    with pytest.raises(ValueError, match="tokens_per_expert: expected counts from 0 to 4, got -1"):
        implementation(torch.tensor([-1, 2]), 4, 2)
