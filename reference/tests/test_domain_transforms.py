import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference import domain_transforms, expert_parallel, parallel_steps, partial_sums
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.domain_transforms import (
    enter_slices,
    gather_compute_slice,
    leave_slices,
    pad_experts,
    pad_tokens,
    slice_tokens,
    sliced_expert_parallel,
    trim_experts,
    trim_tokens,
)
from moe_reference.expert_parallel import experts_on_rows, held_experts
from moe_reference.expert_slicing import slice_tensor_parallel, take_experts
from moe_reference.experts import experts, init_experts
from moe_reference.external_shared import external_shared_parallel, external_shared_placement
from moe_reference.gating import route
from moe_reference.layer import layer
from moe_reference.partial_sums import (
    partial_of_held_experts,
    partial_shared,
    reduce_once,
    replicated_experts,
    shared_tensor_parallel,
    tensor_parallel_experts,
)
from moe_reference.placement import assign_external_shared, make_placement
from moe_reference.ranks import ListOfRanks, ProcessRanks, mesh_of_list

_spec = importlib.util.spec_from_file_location(
    "ranks_of_threads", Path(__file__).with_name("ranks_of_threads.py")
)
_threads = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_threads)
on_ranks, exchanges = _threads.on_ranks, _threads.exchanges

H, I, E, K = 4, 6, 5, 2
CONFIG = ExpertsConfig("silu")
ON_INPUT = ExpertsConfig("gelu", gated=False, weight_on="input")
ROUTING = RoutingConfig(top_k=K, score="sigmoid", renormalize=True)
HASHED = RoutingConfig(top_k=K, hash_table=torch.tensor([[0, 1], [2, 3], [4, 0], [1, 3]]))
# Both sides add the same float64 products in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def made(num_experts=E, width=I, config=CONFIG, seed=0):
    return init_experts(
        num_experts, H, width, config.gated, True, generator(seed), dtype=torch.float64
    )


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def leaves(weights):
    return ExpertWeights(**{n: leaf(t) for n, t in vars(weights).items()})


def routed(count, num_experts=E, seed=0):
    weights = torch.rand(count, K, generator=generator(seed), dtype=torch.float64)
    ids = torch.randint(-1, num_experts + 1, (count, K), generator=generator(seed))
    return weights, ids


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, **TIGHT)


def grads_of_copies(tensors):
    return sum(each.grad for each in tensors)


def assert_gradients_of_slices(parts, whole, cut):
    """The gradients of the ranks are the same cut of the gradients of the whole."""
    of_whole = ExpertWeights(**{n: t.grad for n, t in vars(whole).items()})
    for rank, part in enumerate(parts):
        for name, expected in vars(cut(of_whole, rank)).items():
            gradient = getattr(part, name).grad
            if name != "down_bias" or rank == 0:
                assert_close(gradient, expected)


# Tokens


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 5))
def test_slices_are_put_together_again(count, size):
    x = normal(count, H)
    padded = pad_tokens(x, size)
    assert len(padded) % size == 0
    assert count <= len(padded) < count + size
    assert not padded[count:].any()
    slices = [slice_tokens(padded, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(slices), padded)
    assert torch.equal(trim_tokens(padded, count), x)
    ranks = ListOfRanks(size)
    back = leave_slices(enter_slices([x] * size, ranks), [count] * size, ranks)
    assert all(torch.equal(each, x) for each in back)


def test_padding_of_ids_means_not_here_and_keeps_their_dtype():
    padded = pad_tokens(torch.tensor([[3, 1]], dtype=torch.int32), 3, value=-1)
    assert padded.dtype == torch.int32
    assert padded.tolist() == [[3, 1], [-1, -1], [-1, -1]]


def test_a_slice_of_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="size: expected 2 equal slices of 3 rows, got rank=0"):
        slice_tokens(torch.zeros(3), 2, 0)
    with pytest.raises(ValueError, match="size: expected 2 equal slices"):
        slice_tokens(torch.zeros(4), 2, 2)
    with pytest.raises(ValueError, match="num_tokens: expected at most 3, got 4"):
        trim_tokens(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="multiple: expected at least 1, got 0"):
        pad_tokens(torch.zeros(3), 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_experts_compute_padded_rows_as_they_compute_rows(counts, multiple):
    counts_E = torch.tensor(counts)
    rows, whole = normal(sum(counts), H), made(len(counts))
    padded, padded_counts = pad_experts(rows, counts_E, multiple)
    assert padded_counts.tolist() == [-(-count // multiple) * multiple for count in counts]
    assert len(padded) == padded_counts.sum()
    computed = experts_on_rows(padded, padded_counts, whole, CONFIG)
    back = trim_experts(computed, counts_E, multiple)
    assert_close(back, experts_on_rows(rows, counts_E, whole, CONFIG))
    assert torch.equal(trim_experts(padded, counts_E, multiple), rows)


# With expert parallelism


def router(routing):
    matrix = normal(E, H, seed=7)

    def choose(x, token_ids):
        return route(x @ matrix.T, routing, None, token_ids)

    return choose


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_sliced_tokens_are_computed_as_whole_ones(counts, columns, route_after, hashed):
    everybody, rows, _ = mesh_of_list(len(counts), columns)
    routing = HASHED if hashed else ROUTING
    whole, size = made(), everybody.size
    xs = [normal(count, H, seed=i) for i, count in enumerate(counts)]
    tokens = [torch.arange(count) % 4 for count in counts]
    targets = [normal(count, H, seed=i + 50) for i, count in enumerate(counts)]

    one_rank, x_one = leaves(whole), [*map(leaf, xs)]
    expected = []
    for x, ids in zip(x_one, tokens, strict=True):
        weights, chosen = router(routing)(x, ids if hashed else None)
        expected.append(experts(x, one_rank, weights, chosen, CONFIG))
    sum((y * t).sum() for y, t in zip(expected, targets, strict=True)).backward()

    held = held_experts(E, size)
    locals_ = [leaves(take_experts(whole, ids)) for ids in held]
    copies = [leaf(x) for x in xs for _ in range(columns)]
    got = sliced_expert_parallel(
        copies,
        router(routing),
        locals_,
        E,
        CONFIG,
        everybody,
        rows,
        token_ids=[ids for ids in tokens for _ in range(columns)] if hashed else None,
        route_after=route_after,
    )
    for rank, y in enumerate(got):
        assert_close(y, expected[rank // columns])
    # Every column has the output, so the loss of one of them counts: here the last.
    last = [rank for rank in range(size) if rank % columns == columns - 1]
    sum((got[rank] * targets[rank // columns]).sum() for rank in last).backward()
    for d, x in enumerate(x_one):
        assert_close(grads_of_copies(copies[d * columns : (d + 1) * columns]), x.grad)
    for name, tensor in vars(one_rank).items():
        assert_close(torch.cat([getattr(local, name).grad for local in locals_]), tensor.grad)


def test_a_group_of_processes_slices_as_a_list_does():
    whole, x = made(), normal(5, H)
    held = held_experts(E, 3)
    ranks = ListOfRanks(3)
    locals_ = [take_experts(whole, ids) for ids in held]
    choose = router(ROUTING)
    expected = sliced_expert_parallel([x] * 3, choose, locals_, E, CONFIG, ranks, ranks)

    def run(rank):
        group = ProcessRanks()
        [y] = sliced_expert_parallel(
            [x], choose, [locals_[rank]], E, CONFIG, group, group, route_after=True
        )
        return y.detach()

    for y in on_ranks(3, run):
        assert_close(y, expected[0])


def test_token_ids_that_are_not_cut_with_the_tokens_show(monkeypatch):
    everybody, rows, _ = mesh_of_list(1, 2)
    locals_ = [take_experts(made(), ids) for ids in held_experts(E, 2)]
    xs, tokens = [normal(4, H)] * 2, [torch.tensor([0, 1, 2, 3])] * 2
    arguments = xs, router(HASHED), locals_, E, CONFIG, everybody, rows
    right = sliced_expert_parallel(*arguments, token_ids=tokens, route_after=True)
    real = domain_transforms.enter_slices

    def first_slice_for_all(tensors, ranks, value=0):
        cut = real(tensors, ranks, value)
        return [cut[0]] * len(cut) if not tensors[0].is_floating_point() else cut

    monkeypatch.setattr(domain_transforms, "enter_slices", first_slice_for_all)
    wrong = sliced_expert_parallel(*arguments, token_ids=tokens, route_after=True)
    assert not torch.allclose(right[0], wrong[0])


def test_padding_is_sent_nowhere(monkeypatch):
    seen = []
    real = domain_transforms.over_ranks

    def recorded(xs, weights, ids, *rest):
        seen.append([each.tolist() for each in ids])
        return real(xs, weights, ids, *rest)

    monkeypatch.setattr(domain_transforms, "over_ranks", recorded)
    everybody, rows, _ = mesh_of_list(1, 3)
    locals_ = [take_experts(made(), ids) for ids in held_experts(E, 3)]
    for route_after in (False, True):
        sliced_expert_parallel(
            [normal(4, H)] * 3,
            router(ROUTING),
            locals_,
            E,
            CONFIG,
            everybody,
            rows,
            route_after=route_after,
        )
    before, after = seen
    assert before == after
    assert before[2] == [[-1, -1], [-1, -1]]


def exchanged_in_slices(monkeypatch):
    """What three ranks with the same four tokens exchange, and how many pairs are of experts."""
    whole, x = made(), normal(4, H)
    held = held_experts(E, 3)
    calls = exchanges(monkeypatch)

    def run(rank):
        group, local = ProcessRanks(), leaves(take_experts(whole, held[rank]))
        [y] = sliced_expert_parallel([leaf(x)], router(ROUTING), [local], E, CONFIG, group, group)
        y.sum().backward()

    on_ranks(3, run)
    sent = [
        torch.bincount(ids.flatten(), minlength=E) for ids in router(ROUTING)(x, None)[1].split(2)
    ]
    return calls, held, [*sent, torch.zeros(E, dtype=torch.int64)]


def test_slices_exchange_counts_rows_and_outputs_and_nothing_else(monkeypatch):
    calls, held, sent = exchanged_in_slices(monkeypatch)
    row = H * 8
    for rank in range(3):
        went = int(sent[rank].sum())
        came = int(sum(counts[held[rank]].sum() for counts in sent))
        there = torch.float64, went * row, came * row
        back = torch.float64, came * row, went * row
        # Padding makes two rows of every slice, the last of which are nobody's.
        gathered = torch.float64, 3 * 2 * row, 3 * 2 * row
        counts = torch.int64, E * 8, 3 * len(held[rank]) * 8
        lengths = torch.int64, 3 * 8, 3 * 8
        assert [call[1:] for call in calls if call[0] == rank] == [
            *(counts, there, back, lengths, gathered),
            # The backward goes the same way in the other order.
            *(gathered, there, back),
        ]


def test_padding_that_is_routed_shows_in_the_bytes(monkeypatch):
    real = domain_transforms.enter_slices
    monkeypatch.setattr(domain_transforms, "enter_slices", lambda t, ranks, value=0: real(t, ranks))
    calls, _, sent = exchanged_in_slices(monkeypatch)
    [_, (_, _, went, _), *_] = [call for call in calls if call[0] == 2]
    assert int(sent[2].sum()) == 0
    assert went == 2 * K * H * 8


# Without


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans())
def test_gathered_tokens_are_computed_as_own_ones(counts, hashed):
    ranks = ListOfRanks(len(counts))
    routing, whole = HASHED if hashed else ROUTING, made()
    parts = [leaves(slice_tensor_parallel(whole, ranks.size, rank)) for rank in range(ranks.size)]
    xs = [leaf(normal(count, H, seed=i)) for i, count in enumerate(counts)]
    tokens = [torch.arange(count) % 4 for count in counts] if hashed else None
    targets = [normal(count, H, seed=i + 50) for i, count in enumerate(counts)]

    def compute(gathered, token_ids):
        chosen = [router(routing)(*each) for each in zip(gathered, token_ids, strict=True)]
        weights, ids = zip(*chosen, strict=True)
        return tensor_parallel_experts(gathered, weights, ids, parts, CONFIG, ranks)

    got = gather_compute_slice(xs, compute, ranks, tokens)
    sum((y * t).sum() for y, t in zip(got, targets, strict=True)).backward()

    one_rank, x_one = leaves(whole), [leaf(x) for x in xs]
    loss = 0
    for i, x in enumerate(x_one):
        weights, chosen = router(routing)(x, tokens[i] if hashed else None)
        y = experts(x, one_rank, weights, chosen, CONFIG)
        assert_close(got[i], y)
        loss = loss + (y * targets[i]).sum()
    loss.backward()
    for x, alone in zip(xs, x_one, strict=True):
        assert_close(x.grad, alone.grad)
    assert_gradients_of_slices(
        parts, one_rank, lambda whole, rank: slice_tensor_parallel(whole, ranks.size, rank)
    )


def test_gathering_exchanges_lengths_and_tokens_and_nothing_else(monkeypatch):
    counts, row = [3, 0, 2], H * 8
    calls = exchanges(monkeypatch)

    def run(rank):
        x = leaf(normal(counts[rank], H))
        [y] = gather_compute_slice([x], lambda xs, ids: [each * 2 for each in xs], ProcessRanks())
        y.sum().backward()

    on_ranks(3, run)
    lengths = torch.int64, 3 * 8, 3 * 8
    for rank, count in enumerate(counts):
        there, back = 3 * count * row, sum(counts) * row
        assert [call[1:] for call in calls if call[0] == rank] == [
            *(lengths, lengths, (torch.float64, there, back), (torch.float64, back, there))
        ]


# Partial sums


@pytest.mark.parametrize("config", [CONFIG, ON_INPUT])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tensor_parallel_experts_add_up_to_whole_ones(size, config):
    ranks, whole, x = ListOfRanks(size), made(config=config), normal(7, H)
    weights, ids = routed(7)
    parts = [leaves(slice_tensor_parallel(whole, size, rank)) for rank in range(size)]
    xs, one_rank, x_one = [leaf(x) for _ in range(size)], leaves(whole), leaf(x)
    got = tensor_parallel_experts(xs, [weights] * size, [ids] * size, parts, config, ranks)
    expected = experts(x_one, one_rank, weights, ids, config)
    for y in got:
        assert_close(y, expected)
    # All ranks have the same output: each counts 1 / R of the loss.
    (sum((y * y).sum() for y in got) / size).backward()
    (expected * expected).sum().backward()
    assert_close(grads_of_copies(xs), x_one.grad)
    assert_gradients_of_slices(
        parts, one_rank, lambda whole, rank: slice_tensor_parallel(whole, size, rank)
    )


PLACEMENT = make_placement(torch.tensor([0, 1, 2, 3, 4, 0, 0, 2, 2]), E, 3)


@pytest.mark.parametrize("placement", [None, PLACEMENT])
def test_experts_on_their_ranks_add_up_without_all_to_all(placement):
    ranks, whole, x = ListOfRanks(3), made(), normal(6, H)
    weights, ids = routed(6)
    held = held_experts(E, 3, placement)
    if placement is not None:
        logical = placement.physical_to_logical.tolist()
        held = [[logical[p] for p in each] for each in held]
    locals_ = [leaves(take_experts(whole, each)) for each in held]
    one_rank = leaves(whole)
    arguments = [x] * 3, [weights] * 3, [ids] * 3, locals_, E, CONFIG, ranks, placement
    got, expected = replicated_experts(*arguments), experts(x, one_rank, weights, ids, CONFIG)
    for y in got:
        assert_close(y, expected)
    (got[1] ** 2).sum().backward()
    (expected**2).sum().backward()
    for name, tensor in vars(one_rank).items():
        together = torch.zeros_like(tensor)
        for each, local in zip(held, locals_, strict=True):
            together.index_add_(0, torch.tensor(each), getattr(local, name).grad)
        assert_close(together, tensor.grad)


def test_copies_that_ranks_choose_differently_show(monkeypatch):
    ranks, whole, x = ListOfRanks(3), made(), normal(6, H)
    weights, ids = routed(6)
    logical = PLACEMENT.physical_to_logical.tolist()
    held = held_experts(E, 3, PLACEMENT)
    locals_ = [take_experts(whole, [logical[p] for p in each]) for each in held]
    calls = []

    def first_copy_counted_from_the_rank(expert_ids, placement):
        calls.append(None)
        safe = expert_ids.clamp(0, E - 1)
        turn = len(calls) % placement.replica_count[safe]
        chosen = placement.logical_to_physical[safe, turn]
        return chosen.where((expert_ids >= 0) & (expert_ids < E), -1)

    monkeypatch.setattr(parallel_steps, "physical_ids", first_copy_counted_from_the_rank)
    everywhere = [x] * 3, [weights] * 3, [ids] * 3, locals_, E, CONFIG
    expected = experts(x, whole, weights, ids, CONFIG)
    assert not torch.allclose(replicated_experts(*everywhere, ranks, PLACEMENT)[0], expected)
    # Where rows travel, ranks need not agree.
    for y in expert_parallel.over_ranks(*everywhere, ranks, PLACEMENT):
        assert_close(y, expected)


def count_reductions(monkeypatch):
    calls = []
    real = partial_sums.all_reduce
    monkeypatch.setattr(partial_sums, "all_reduce", lambda *a: (calls.append(None), real(*a))[1])
    return calls


@pytest.mark.parametrize("tensor_parallel_shared", [True, False])
def test_each_term_of_a_layer_is_reduced_exactly_once(monkeypatch, tensor_parallel_shared):
    size, x = 3, normal(6, H)
    gate, shared, whole = normal(1, H, seed=3), made(1, 5, seed=4), made()
    parameters = LayerWeights(normal(E, H, seed=7), whole, shared=shared, shared_gate=gate)
    config = LayerConfig(ROUTING, CONFIG, shared_scale=0.5)
    expected = layer(x[None], parameters, config)
    weights, ids = expected.weights, expected.expert_ids
    ranks = ListOfRanks(size)
    parts = [slice_tensor_parallel(whole, size, rank) for rank in range(size)]
    routed_terms = [experts(x, part, weights, ids, CONFIG) for part in parts]
    calls = count_reductions(monkeypatch)
    if tensor_parallel_shared:
        cut = [slice_tensor_parallel(shared, size, rank) for rank in range(size)]
        shared_terms = [partial_shared(x, part, CONFIG, gate, 0.5) for part in cut]
        got = reduce_once([routed_terms, shared_terms], [], ranks)
        twice = reduce_once([routed_terms], [shared_tensor_parallel(
            [x] * size, cut, CONFIG, ranks, [gate] * size, 0.5)], ranks)  # fmt: skip
        assert_close(twice[0], got[0])
        assert len(calls) == 3
        never = reduce_once([routed_terms], [shared_terms], ranks)
        assert not torch.allclose(never[0], expected.output[0])
    else:
        shared_terms = [partial_shared(x, shared, CONFIG, gate, 0.5)] * size
        got = reduce_once([routed_terms], [shared_terms], ranks)
        assert len(calls) == 1
        twice = reduce_once([routed_terms, shared_terms], [], ranks)
        assert not torch.allclose(twice[0], expected.output[0])
    for y in got:
        assert_close(y, expected.output[0])


def test_one_rank_cannot_show_a_term_that_is_reduced_twice():
    term = [normal(3, H)]
    one = ListOfRanks(1)
    assert torch.equal(reduce_once([term, term], [], one)[0], reduce_once([term], [term], one)[0])


def test_processes_add_up_as_a_list_does():
    size, x, whole = 3, normal(6, H), made()
    weights, ids = routed(6)
    parts = [slice_tensor_parallel(whole, size, rank) for rank in range(size)]
    everywhere = [x] * size, [weights] * size, [ids] * size, parts, CONFIG, ListOfRanks(size)
    expected = tensor_parallel_experts(*everywhere)

    def run(rank):
        part, mine = leaves(parts[rank]), leaf(x)
        [y] = tensor_parallel_experts([mine], [weights], [ids], [part], CONFIG, ProcessRanks())
        (y.sum() / size).backward()
        return y.detach(), mine.grad

    one_rank = leaf(x)
    experts(one_rank, whole, weights, ids, CONFIG).sum().backward()
    outputs, grads = zip(*on_ranks(size, run), strict=True)
    for y in outputs:
        assert torch.equal(y, expected[0])
    assert_close(sum(grads), one_rank.grad)


def test_bfloat16_partial_outputs_are_added_before_they_are_rounded():
    size = 4
    x, whole = normal(16, H).bfloat16(), made()
    weights, ids = routed(16)
    parts = [slice_tensor_parallel(whole, size, rank) for rank in range(size)]
    [y, *_] = tensor_parallel_experts(
        [x] * size, [weights] * size, [ids] * size, parts, CONFIG, ListOfRanks(size)
    )
    exact = experts(x.double(), whole, weights, ids, CONFIG)
    # Half a unit of bfloat16, and float32's own error.
    bound = exact.abs() * 2**-8 + 1e-5
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= bound).all()


def test_a_wrong_share_of_experts_is_named():
    with pytest.raises(
        ValueError, match=r"local.down: expected shape \[3, 4, I\], got \[5, 4, 6\]"
    ):
        partial_of_held_experts(normal(2, H), *routed(2), made(), held_experts(E, 2), 0, CONFIG)


# The shared expert on ranks of its own


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_external_shared_experts_compute_what_the_layer_computes(shared_ranks, more, gated, seed):
    size = shared_ranks + more
    whole, shared = made(), made(1, 3, seed=4)
    gate = normal(1, H, seed=3) if gated else None
    scale = 0.5 if gated else 1.0
    parameters = LayerWeights(normal(E, H, seed=7), whole, shared=shared, shared_gate=gate)
    config = LayerConfig(ROUTING, CONFIG, shared_scale=scale)
    xs = [normal((seed + 2 * rank) % 5, H, seed=rank) for rank in range(size)]
    expected = [layer(x[None], parameters, config) for x in xs]
    shares = [assign_external_shared(E, shared_ranks, size, rank) for rank in range(size)]
    locals_ = [
        leaves(shared if rank < shared_ranks else take_experts(whole, list(share)))
        for rank, share in enumerate(shares)
    ]
    got = external_shared_parallel(
        xs,
        [each.weights for each in expected],
        [each.expert_ids for each in expected],
        locals_,
        E,
        shared_ranks,
        CONFIG,
        ListOfRanks(size),
        None if gate is None else [gate] * size,
        scale,
    )
    for y, each in zip(got, expected, strict=True):
        assert_close(y, each.output[0])
    sum(y.sum() for y in got).backward()
    one_rank = leaves(shared)
    for x in xs:
        partial_shared(x, one_rank, CONFIG, gate, scale).sum().backward()
    of_copies = grads_of_copies([local.down for local in locals_[:shared_ranks]])
    assert_close(of_copies, one_rank.down.grad)


def test_the_placement_of_external_shared_experts_is_that_of_assign_external_shared():
    placement = external_shared_placement(5, 2, 4)
    held = held_experts(7, 4, placement)
    logical = placement.physical_to_logical.tolist()
    assert [[logical[p] for p in each] for each in held] == [[5], [6], [0, 1, 2], [3, 4]]
    assert placement.replica_count.tolist() == [1] * 7


def test_a_shared_gate_is_refused_where_it_would_enter_the_expert():
    with pytest.raises(ValueError, match="shared_gate: expected None and a scale of 1"):
        external_shared_parallel([], [], [], [], E, 1, ON_INPUT, ListOfRanks(2), shared_scale=2.0)
