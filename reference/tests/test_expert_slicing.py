import dataclasses
import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    Placement,
    RoutingConfig,
)
from moe_reference.expert_gathering import gather_experts, gather_tensor_parallel
from moe_reference.expert_slicing import (
    assign_experts,
    assign_round_robin,
    make_expert_map,
    slice_experts,
    slice_tensor_parallel,
    take_experts,
    take_modules,
    take_tensors,
)
from moe_reference.experts import experts, init_experts
from moe_reference.layer import layer
from moe_reference.placement import (
    add_shared_column,
    assign_external_shared,
    logical_ids,
    make_placement,
    physical_ids,
    place_experts,
)

SIZES = st.tuples(st.integers(0, 400), st.integers(1, 40))
CONFIGS = [
    ExpertsConfig("silu"),
    ExpertsConfig("swigluoai", limit=0.7),
    ExpertsConfig("swiglu_limit", limit=0.7),
    ExpertsConfig("gelu", gated=False),
    ExpertsConfig("relu2", weight_on="input"),
]


def random_experts(num_experts, intermediate=3, gated=True, bias=True, hidden=4):
    generator = torch.Generator().manual_seed(num_experts)
    return init_experts(
        num_experts, hidden, intermediate, gated, bias, generator, dtype=torch.float64
    )


def random_inputs(tokens, top_k, num_experts, hidden=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, max(num_experts, 1), (tokens, top_k), generator=generator)
    return x, weights, ids


def tensors(weights):
    return [tensor for tensor in vars(weights).values() if tensor is not None]


def same(one, other):
    return all(
        a is b is None or torch.equal(a, b)
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


# Assignment


@given(SIZES)
def test_contiguous_shares_are_those_of_array_split(sizes):
    num_experts, world_size = sizes
    shares = [assign_experts(num_experts, world_size, rank) for rank in range(world_size)]
    expected = numpy.array_split(numpy.arange(num_experts), world_size)
    assert [list(range(start, start + count)) for start, count in shares] == [
        share.tolist() for share in expected
    ]
    counts = [count for _, count in shares]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(SIZES)
def test_dealing_out_in_turn_gives_expert_e_to_rank_e_mod_r(sizes):
    num_experts, world_size = sizes
    for rank in range(world_size):
        held = assign_round_robin(num_experts, world_size, rank)
        assert list(held) == [e for e in range(num_experts) if e % world_size == rank]
        assert len(held) == assign_experts(num_experts, world_size, rank)[1]


@given(SIZES, st.integers(0, 40))
def test_with_shared_ranks_everything_is_on_one_rank(sizes, num_shared):
    num_experts, world_size = sizes
    if num_shared > world_size or (num_shared == world_size and num_experts > 0):
        with pytest.raises(ValueError, match="num_shared_ranks: expected a rank of"):
            assign_external_shared(num_experts, num_shared, world_size, 0)
        return
    held = [
        list(assign_external_shared(num_experts, num_shared, world_size, rank))
        for rank in range(world_size)
    ]
    assert held[:num_shared] == [[num_experts + s] for s in range(num_shared)]
    assert list(itertools.chain(*held[num_shared:])) == list(range(num_experts))


def test_a_map_leads_to_the_rows_of_a_rank():
    expert_map = make_expert_map(7, [5, 0, 6])
    assert expert_map.dtype == torch.int32
    assert {e: row for e, row in enumerate(expert_map.tolist()) if row >= 0} == {5: 0, 0: 1, 6: 2}
    assert make_expert_map(3, []).tolist() == [-1, -1, -1]


# Whole experts


def shares_of(num_experts, world_size):
    """Both assignments, as the ids that each rank holds."""
    contiguous = [assign_experts(num_experts, world_size, rank) for rank in range(world_size)]
    yield [range(start, start + count) for start, count in contiguous]
    yield [assign_round_robin(num_experts, world_size, rank) for rank in range(world_size)]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 72, 257])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_outputs_of_all_ranks_add_up(num_experts, world_size):
    config = ExpertsConfig()
    whole = random_experts(num_experts)
    x, weights, ids = random_inputs(12, min(num_experts, 4), num_experts)
    expected = experts(x, whole, weights, ids, config)
    for shares in shares_of(num_experts, world_size):
        partial = [
            experts(
                x,
                take_experts(whole, held),
                weights,
                ids,
                config,
                make_expert_map(num_experts, held),
            )
            for held in shares
        ]
        torch.testing.assert_close(sum(partial), expected)


def test_a_slice_is_the_same_rows_of_everything():
    whole = random_experts(5)
    mine = slice_experts(whole, 1, 3)
    for sliced, full in zip(tensors(mine), tensors(whole), strict=True):
        assert torch.equal(sliced, torch.stack([full[1], full[2], full[3]]))
    assert slice_experts(random_experts(5, bias=False), 0, 5).down_bias is None


def test_a_rank_without_experts_adds_nothing_and_has_gradients():
    empty = slice_experts(random_experts(3), 3, 0)
    assert [len(tensor) for tensor in tensors(empty)] == [0, 0, 0, 0]
    x, weights, ids = random_inputs(5, 2, 3)
    x.requires_grad_()
    output = experts(x, empty, weights, ids, ExpertsConfig(), make_expert_map(3, []))
    assert torch.equal(output, torch.zeros_like(x))
    output.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@given(st.integers(0, 9), st.integers(1, 12), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_parts_put_together_are_the_whole(num_experts, world_size, gated, bias):
    whole = random_experts(num_experts, 5, gated, bias)
    contiguous, in_turn = shares_of(num_experts, world_size)
    assert same(gather_experts([take_experts(whole, held) for held in contiguous]), whole)
    parts = [take_experts(whole, held) for held in in_turn]
    assert same(gather_experts(parts, in_turn), whole)
    cut = [slice_tensor_parallel(whole, world_size, rank) for rank in range(world_size)]
    assert same(gather_tensor_parallel(cut), whole)


def test_modules_and_packed_tensors_are_sliced_alike():
    modules = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(5))
    start, count = assign_experts(5, 2, 1)
    held = range(start, start + count)
    assert take_modules(modules, held) == [modules[3], modules[4]]
    packed = {
        "qweight": torch.arange(10, dtype=torch.int32).view(5, 2),
        "scales": torch.arange(5.0).to(torch.float8_e4m3fn).view(5, 1),
        "zeros": torch.arange(5, dtype=torch.uint8),
        "g_idx": torch.arange(15).view(5, 3),
        "bias": torch.arange(5.0, dtype=torch.bfloat16),
    }
    taken = take_tensors(packed, 5, held)
    assert list(taken) == list(packed)
    for name, tensor in packed.items():
        assert taken[name].dtype == tensor.dtype
        assert taken[name].tolist() == tensor.tolist()[3:]


def test_what_has_not_one_row_per_expert_is_refused():
    with pytest.raises(ValueError, match=r"global_scale: expected 5 rows, got \[1\]"):
        take_tensors({"scales": torch.ones(5), "global_scale": torch.ones(1)}, 5, [0])
    with pytest.raises(ValueError, match=r"alpha: expected 5 rows, got \[\]"):
        take_tensors({"alpha": torch.ones(())}, 5, [0])


# A part of every expert


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activation}-{c.weight_on}")
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_the_partial_outputs_of_tensor_parallel_ranks_add_up(config, world_size, bias):
    whole = random_experts(3, 5, config.gated, bias)
    x, weights, ids = random_inputs(9, 2, 3)
    parts = [slice_tensor_parallel(whole, world_size, rank) for rank in range(world_size)]
    partial = [experts(x, part, weights, ids, config) for part in parts]
    torch.testing.assert_close(sum(partial), experts(x, whole, weights, ids, config))
    widths = [part.down.shape[2] for part in parts]
    assert widths == [assign_experts(5, world_size, rank)[1] for rank in range(world_size)]


def test_rows_of_gate_and_up_stay_together():
    gate_up = torch.arange(10.0).view(1, 10, 1)
    whole = ExpertWeights(gate_up, torch.arange(5.0).view(1, 1, 5), gate_up[..., 0])
    parts = [slice_tensor_parallel(whole, 2, rank) for rank in range(2)]
    assert [part.gate_up.flatten().tolist() for part in parts] == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]
    assert [part.gate_up_bias[0].tolist() for part in parts] == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]
    assert [part.down.flatten().tolist() for part in parts] == [[0, 1, 2], [3, 4]]


def test_the_output_bias_is_on_rank_0_whatever_it_is():
    whole = random_experts(2)
    odd = dataclasses.replace(whole, down_bias=torch.tensor([[math.nan, math.inf, 1.0, 2.0]] * 2))
    first, second = (slice_tensor_parallel(odd, 2, rank).down_bias for rank in range(2))
    torch.testing.assert_close(first, odd.down_bias, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(second, torch.zeros_like(second))


def test_cutting_gate_up_as_one_tensor_is_another_function():
    whole = random_experts(2, 4, bias=False)
    x, weights, ids = random_inputs(50, 1, 2)
    expected = experts(x, whole, weights, ids, ExpertsConfig())
    naive = sum(
        experts(x, ExpertWeights(*part), weights, ids, ExpertsConfig())
        for part in zip(whole.gate_up.chunk(2, 1), whole.down.chunk(2, 2), strict=True)
    )
    assert (naive - expected).norm() > 0.5 * expected.norm()


def test_summing_outputs_of_weights_that_are_whole_gives_r_times_the_layer():
    whole = random_experts(2)
    x, weights, ids = random_inputs(5, 1, 2)
    every_rank = [experts(x, whole, weights, ids, ExpertsConfig()) for _ in range(3)]
    torch.testing.assert_close(sum(every_rank), 3 * every_rank[0])


SLICERS = {
    "slice": lambda whole: slice_experts(whole, 0, 2),
    "all": lambda whole: slice_experts(whole, 0, 3),
    "take": lambda whole: take_experts(whole, [2, 0, 2]),
    "first rank": lambda whole: slice_tensor_parallel(whole, 2, 0),
    "last rank": lambda whole: slice_tensor_parallel(whole, 2, 1),
    "only rank": lambda whole: slice_tensor_parallel(whole, 1, 0),
    "gather": lambda whole: gather_experts([whole]),
    "gather tensor parallel": lambda whole: gather_tensor_parallel([whole]),
}


@pytest.mark.parametrize("slicer", SLICERS.values(), ids=SLICERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_slices_are_contiguous_copies_of_the_same_dtype(slicer, dtype):
    columns = [tensor.to(dtype) for tensor in tensors(random_experts(3))]
    strided = ExpertWeights(*(t.mT.contiguous().mT if t.ndim > 2 else t for t in columns))
    before = [tensor.clone() for tensor in columns]
    for part, plain in zip(
        tensors(slicer(strided)), tensors(slicer(ExpertWeights(*columns))), strict=True
    ):
        assert part.dtype == dtype
        assert part.is_contiguous()
        assert torch.equal(part, plain)
        part.fill_(7.0)
    assert all(map(torch.equal, tensors(strided), before))


@pytest.mark.parametrize("slicer", SLICERS.values(), ids=SLICERS)
def test_gradients_pass_through_slices(slicer):
    columns = [tensor.requires_grad_() for tensor in tensors(random_experts(3))]
    assert torch.autograd.gradcheck(lambda *c: tensors(slicer(ExpertWeights(*c))), columns)


# Copies of experts


def fewest_for_the_busiest(load, num_physical):
    """The least possible greatest load per copy, by trying every number of copies."""
    extra = num_physical - len(load)
    best = math.inf
    for chosen in itertools.combinations_with_replacement(range(len(load)), extra):
        best = min(best, max(each / (1 + chosen.count(e)) for e, each in enumerate(load)))
    return best


def least_rank_load(shares, num_ranks):
    """The least possible greatest load of a rank, by trying every way to fill equal slots."""
    if num_ranks == 1:
        return sum(shares)
    first, rest = shares[0], shares[1:]
    best = math.inf
    for others in itertools.combinations(range(len(rest)), len(shares) // num_ranks - 1):
        left = [share for i, share in enumerate(rest) if i not in others]
        mine = first + sum(rest[i] for i in others)
        best = min(best, max(mine, least_rank_load(left, num_ranks - 1)))
    return best


def rank_loads(load, placement, num_ranks):
    shares = load.double() / placement.replica_count
    on_slots = shares[placement.physical_to_logical]
    return torch.zeros(num_ranks).double().index_add(0, placement.rank_of_physical, on_slots)


def assert_valid(placement, num_experts, num_physical, num_ranks):
    logical = placement.physical_to_logical.tolist()
    assert len(logical) == num_physical
    assert placement.replica_count.tolist() == [logical.count(e) for e in range(num_experts)]
    assert min(placement.replica_count.tolist()) >= 1
    for e, copies in enumerate(placement.logical_to_physical.tolist()):
        real = [p for p in copies if p >= 0]
        assert sorted(real) == [p for p in range(num_physical) if logical[p] == e]
        assert copies == real + [-1] * (len(copies) - len(real))
    per_rank = torch.bincount(placement.rank_of_physical, minlength=num_ranks)
    assert per_rank.tolist() == [num_physical // num_ranks] * num_ranks


@st.composite
def loads(draw, most=4):
    num_experts = draw(st.integers(1, most))
    load = draw(st.lists(st.integers(0, 20), min_size=num_experts, max_size=num_experts))
    num_ranks = draw(st.sampled_from([1, 2, 3]))
    least = -(-num_experts // num_ranks)
    return torch.tensor(load), num_ranks * draw(st.integers(least, least + 1)), num_ranks


@given(loads())
@settings(deadline=None, max_examples=80)
def test_placements_are_valid_and_near_the_best_there_is(drawn):
    load, num_physical, num_ranks = drawn
    placement = place_experts(load, num_physical, num_ranks)
    assert_valid(placement, len(load), num_physical, num_ranks)
    shares = load.double() / placement.replica_count
    assert shares.max() == fewest_for_the_busiest(load.tolist(), num_physical)
    best = least_rank_load(shares[placement.physical_to_logical].tolist(), num_ranks)
    assert rank_loads(load, placement, num_ranks).max() <= 4 / 3 * best + 1e-9


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_copies_go_to_the_greatest_load_per_copy_and_ties_to_the_lowest_id(dtype):
    placement = place_experts(torch.tensor([2, 8, 4, 8], dtype=dtype), 8, 2)
    # 8 and 8, then 4, 4 and 4: the third of the further copies goes to expert 1.
    assert placement.replica_count.tolist() == [1, 3, 2, 2]
    assert place_experts(torch.zeros(3, dtype=dtype), 6, 1).replica_count.tolist() == [4, 1, 1]


def test_a_busy_expert_no_longer_holds_up_its_rank():
    load = torch.tensor([90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86])
    alone = make_placement(torch.arange(12), 12, 4)
    copied = place_experts(load, 16, 4)
    mean = load.sum() / 4
    assert rank_loads(load, alone, 4).max() > 1.25 * mean
    assert rank_loads(load, copied, 4).max() < 1.1 * mean


@pytest.mark.parametrize("num_experts", [1, 3, 8, 72, 257, 384])
def test_many_experts(num_experts):
    load = torch.rand(num_experts, generator=torch.Generator().manual_seed(0))
    num_physical = -(-(num_experts + 5) // 8) * 8
    placement = place_experts(load, num_physical, 8)
    assert_valid(placement, num_experts, num_physical, 8)
    assert placement.physical_to_logical.dtype == torch.int64


@st.composite
def placements(draw):
    num_experts = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, num_experts - 1), max_size=8))
    physical = draw(st.permutations([*range(num_experts), *extra]))
    divisors = [r for r in range(1, len(physical) + 1) if len(physical) % r == 0]
    num_ranks = draw(st.sampled_from(divisors))
    return make_placement(torch.tensor(physical), num_experts, num_ranks), num_ranks


@given(placements(), st.integers(0, 2**31), st.sampled_from([torch.int32, torch.int64]))
@settings(deadline=None, max_examples=60)
def test_choosing_copies_and_back(drawn, seed, dtype):
    placement, num_ranks = drawn
    num_experts, num_physical = len(placement.replica_count), len(placement.rank_of_physical)
    assert_valid(placement, num_experts, num_physical, num_ranks)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_experts + 2, (11, 3), generator=generator, dtype=dtype)
    chosen = physical_ids(ids, placement)
    assert chosen.dtype == dtype
    assert torch.equal(chosen, physical_ids(ids.clone(), placement))
    here = (ids >= 0) & (ids < num_experts)
    assert torch.equal(logical_ids(chosen, placement), ids.where(here, -1))
    counts = torch.bincount(chosen[here], minlength=num_physical)
    for copies in placement.logical_to_physical.tolist():
        used = [counts[p].item() for p in copies if p >= 0]
        assert max(used) - min(used) <= 1


@given(placements())
@settings(deadline=None, max_examples=30)
def test_a_placement_changes_no_output(drawn):
    placement, num_ranks = drawn
    num_experts, num_physical = len(placement.replica_count), len(placement.rank_of_physical)
    whole, config = random_experts(num_experts), ExpertsConfig()
    x, weights, ids = random_inputs(8, 2, num_experts)
    chosen = physical_ids(ids, placement)
    total = torch.zeros_like(x)
    for rank in range(num_ranks):
        held = (placement.rank_of_physical == rank).nonzero()[:, 0]
        mine = take_experts(whole, placement.physical_to_logical[held].tolist())
        expert_map = make_expert_map(num_physical, held.tolist())
        total += experts(x, mine, weights, chosen, config, expert_map)
    torch.testing.assert_close(total, experts(x, whole, weights, ids, config))


def test_copies_that_no_id_leads_to_carry_no_load():
    ids = torch.arange(24).view(12, 2) % 4
    appended = ids
    mapped = physical_ids(ids, make_placement(torch.tensor([0, 1, 2, 3, 0, 0]), 4, 2))
    assert torch.bincount(appended.flatten(), minlength=6).tolist() == [6, 6, 6, 6, 0, 0]
    assert torch.bincount(mapped.flatten(), minlength=6).tolist() == [2, 6, 6, 6, 2, 2]


def test_ids_that_no_copy_has():
    placement = make_placement(torch.tensor([1, 0]), 2, 2)
    physical = torch.tensor([-5, 0, 1, 2], dtype=torch.int32)
    assert logical_ids(physical, placement).tolist() == [-1, 1, 0, -1]
    assert logical_ids(physical, placement).dtype == torch.int32
    assert physical_ids(torch.zeros(0, 3, dtype=torch.int64), placement).shape == (0, 3)
    assert isinstance(place_experts(torch.zeros(0), 0, 2), Placement)


# The shared expert on ranks of its own


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_shared", [1, 2, 3])
def test_external_shared_experts_add_up_to_the_layer(num_shared, dtype):
    num_experts, world_size, config = 5, 7, ExpertsConfig()
    routed, shared = random_experts(num_experts), random_experts(1, intermediate=6)
    routing = RoutingConfig(top_k=2, score="sigmoid", scale=2.5)
    router = torch.randn(num_experts, 4, dtype=torch.float64)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    parameters = LayerWeights(router=router, experts=routed, shared=shared)
    expected = layer(x, parameters, LayerConfig(routing, config))
    weights, ids = add_shared_column(
        expected.weights, expected.expert_ids.to(dtype), num_experts, num_shared
    )
    assert ids.dtype == dtype
    assert weights.dtype == torch.float64
    total = torch.zeros_like(x[0])
    for rank in range(world_size):
        held = assign_external_shared(num_experts, num_shared, world_size, rank)
        mine = shared if rank < num_shared else take_experts(routed, held)
        expert_map = make_expert_map(num_experts + num_shared, held)
        total += experts(x[0], mine, weights, ids, config, expert_map)
    torch.testing.assert_close(total, expected.output[0])
    tokens = torch.bincount(ids[:, -1] - num_experts)
    assert len(tokens) == num_shared
    assert tokens.max() - tokens.min() <= 1


def test_an_id_that_was_not_here_does_not_become_the_shared_expert():
    ids = torch.tensor([[4, -1, 3, 5]])
    assert add_shared_column(torch.ones(1, 4), ids, 4, 2)[1].tolist() == [[-1, -1, 3, -1, 4]]
    assert add_shared_column(torch.ones(0, 4), ids[:0], 4, 2)[1].shape == (0, 5)


def test_a_column_of_floats_would_turn_the_ids_into_floats():
    ids = torch.tensor([[16777217]])
    column = torch.empty(1, 1)
    assert torch.cat([ids, column], dim=1)[0, 0].item() != 16777217
    assert add_shared_column(torch.ones(1, 1), ids, 2**25, 1)[1][0, 0].item() == 16777217


# Arguments

WHOLE = random_experts(3)
UNBIASED = random_experts(3, bias=False)
NARROW = random_experts(3, intermediate=2)
ONCE = make_placement(torch.arange(3), 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: assign_experts(4, 0, 0), ValueError, "world_size: expected at least 1, got 0"),
        (lambda: assign_experts(4, 2, 2), ValueError, "rank: expected at most 1, got 2"),
        (lambda: assign_experts(4, 2, -1), ValueError, "rank: expected at least 0, got -1"),
        (lambda: assign_experts(4.0, 2, 0), TypeError, "num_experts: expected an int, got float"),
        (lambda: assign_round_robin(-1, 2, 0), ValueError, "num_experts: expected at least 0"),
        (lambda: assign_external_shared(4, 2, 2, 0), ValueError, "to be left for 4 experts, got 2"),
        (lambda: make_expert_map(3, [3]), ValueError, "held: expected experts below 3, got 3"),
        (lambda: make_expert_map(3, [1, 1]), ValueError, r"each expert once, got \[1, 1\]"),
        (lambda: slice_experts(WHOLE, 2, 2), ValueError, "held: expected experts below 3, got 3"),
        (lambda: slice_experts(WHOLE, -1, 2), ValueError, "start: expected at least 0, got -1"),
        (lambda: slice_experts([WHOLE], 0, 1), TypeError, "expected ExpertWeights, got list"),
        (
            lambda: slice_experts(dataclasses.replace(WHOLE, down_bias=torch.ones(3, 3)), 0, 1),
            ValueError,
            r"experts.down_bias: expected shape \[3, 4\], got \[3, 3\]",
        ),
        (lambda: take_tensors({"scales": [1.0]}, 1, [0]), TypeError, "scales: expected a tensor"),
        (lambda: take_modules([1, 2], [2]), ValueError, "held: expected experts below 2, got 2"),
        (lambda: gather_experts([]), ValueError, "parts: expected"),
        (lambda: gather_experts([WHOLE, NARROW]), ValueError, "parts: expected"),
        (lambda: gather_experts([WHOLE, UNBIASED]), ValueError, "parts: expected"),
        (lambda: gather_experts([WHOLE], [[0, 1]]), ValueError, "held: expected every expert"),
        (lambda: gather_experts([WHOLE], [[0, 1, 1]]), ValueError, "held: expected every expert"),
        (lambda: gather_tensor_parallel([]), ValueError, "parts: expected"),
        (
            lambda: gather_tensor_parallel([WHOLE, slice_experts(WHOLE, 0, 2)]),
            ValueError,
            "parts: expected",
        ),
        (
            lambda: gather_tensor_parallel([WHOLE, random_experts(3, gated=False)]),
            ValueError,
            "parts: expected",
        ),
        (
            lambda: slice_tensor_parallel(ExpertWeights(WHOLE.gate_up[:, :5], WHOLE.down), 2, 0),
            ValueError,
            r"experts.gate_up: expected shape \[3, 6, 4\], got \[3, 5, 4\]",
        ),
        (lambda: slice_tensor_parallel(WHOLE, 2, 2), ValueError, "rank: expected at most 1"),
        (lambda: place_experts(torch.ones(4), 6, 4), ValueError, "num_physical: expected copies"),
        (lambda: place_experts(torch.ones(4), 3, 1), ValueError, "num_physical: expected at least"),
        (lambda: place_experts(torch.ones(0), 2, 1), ValueError, "num_physical: expected copies"),
        (lambda: place_experts(torch.ones(2, 2), 4, 1), ValueError, r"load: expected shape \[E\]"),
        (lambda: place_experts(-torch.ones(2), 2, 1), ValueError, "load: expected finite numbers"),
        (
            lambda: place_experts(torch.tensor([math.nan]), 1, 1),
            ValueError,
            "load: expected finite",
        ),
        (
            lambda: make_placement(torch.tensor([0, 2]), 3, 1),
            ValueError,
            "physical_to_logical: expected each of 3 experts",
        ),
        (
            lambda: make_placement(torch.tensor([0.0]), 1, 1),
            TypeError,
            "physical_to_logical: expected dtype",
        ),
        (lambda: physical_ids(torch.ones(1, 1), ONCE), TypeError, "expert_ids: expected dtype"),
        (
            lambda: add_shared_column(torch.ones(1, 1), torch.ones(1, 2), 3, 1),
            TypeError,
            "expert_ids: expected dtype",
        ),
        (
            lambda: add_shared_column(torch.ones(1, 1), torch.zeros(1, 1).long(), 3, 0),
            ValueError,
            "num_shared_ranks: expected at least 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
