import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference import expert_parallel as module
from moe_reference.config import ExpertWeights
from moe_reference.dispatch import dispatch
from moe_reference.expert_parallel import (
    exchange_counts,
    expert_major,
    expert_parallel,
    expert_parallel_on_list,
)
from moe_reference.expert_slicing import slice_experts
from moe_reference.experts import experts
from moe_reference.placement import make_placement, place_experts
from moe_reference.ranks import ListOfRanks, all_gather, all_reduce, mesh_of_list

_spec = importlib.util.spec_from_file_location(
    "rank_problems", Path(__file__).with_name("rank_problems.py")
)
_problems = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_problems)
AWKWARD, CONFIGS, H, Problem = (
    _problems.AWKWARD,
    _problems.CONFIGS,
    _problems.H,
    _problems.Problem,
)
on_ranks, on_threads, exchanges = _problems.on_ranks, _problems.on_threads, _problems.exchanges
leaf, leaves, gradients, summed = (
    _problems.leaf,
    _problems.leaves,
    _problems.gradients,
    _problems.summed,
)
assert_same, differs, on_one_rank = _problems.assert_same, _problems.differs, _problems.on_one_rank


def on_a_list(problem, run=expert_parallel_on_list):
    held, locals_ = problem.locals()
    locals_ = [*map(leaves, locals_)]
    xs, weights = [*map(leaf, problem.xs)], [*map(leaf, problem.weights)]
    outputs = run(
        xs, weights, problem.ids, locals_, problem.num_experts, problem.config, problem.placement
    )
    loss = sum((y * t).sum() for y, t in zip(outputs, problem.targets, strict=True))
    loss.backward()
    of_ranks = [gradients(local) for local in locals_]
    return outputs, [x.grad for x in xs], [w.grad for w in weights], summed(problem, held, of_ranks)


# Any number of ranks computes what one rank computes


@st.composite
def problems(draw, most_ranks=8):
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=most_ranks))
    num_experts = draw(st.integers(1, 10))
    problem = Problem(
        counts,
        num_experts,
        draw(st.integers(1, 4)),
        draw(st.sampled_from(CONFIGS)),
        draw(st.integers(0, 999)),
    )
    if draw(st.booleans()):
        size = len(counts)
        physical = -(-(num_experts + draw(st.integers(0, 4))) // size) * size
        load = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=num_experts,
                                          max_size=num_experts)))  # fmt: skip
        problem.placement = place_experts(load, physical, size)
    return problem


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_list_of_ranks_computes_what_one_rank_computes(problem):
    assert_same(on_a_list(problem), on_one_rank(problem))


@pytest.mark.parametrize("name", AWKWARD)
def test_a_process_group_computes_what_one_rank_computes(name):
    problem = AWKWARD[name]
    assert_same(on_threads(problem), on_one_rank(problem))
    assert_same(on_threads(problem), on_a_list(problem), rtol=0, atol=0)


@settings(max_examples=15, deadline=None)
@given(problems(most_ranks=4))
def test_any_process_group_computes_what_one_rank_computes(problem):
    assert_same(on_threads(problem), on_one_rank(problem))


ON_GLOO = """
import datetime, sys
import torch, torch.distributed as dist
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.expert_parallel import expert_parallel

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))
results = []
for case in torch.load(f"{folder}/cases.pt"):
    x, w = (case[name][rank].requires_grad_() for name in ("xs", "weights"))
    local = {name: tensor.requires_grad_() for name, tensor in case["locals"][rank].items()}
    y = expert_parallel(x, w, case["ids"][rank], ExpertWeights(**local), case["num_experts"],
                        ExpertsConfig(**case["config"]), dist.group.WORLD)
    (y * case["targets"][rank]).sum().backward()
    grads = {name: tensor.grad for name, tensor in local.items()}
    results.append((y.detach(), x.grad, w.grad, grads))
try:
    dist.all_to_all([torch.empty(1 + 2 * rank)] * 2, [torch.ones(1), torch.ones(3)])
    refused = False
except RuntimeError:
    refused = True
torch.save((results, refused), f"{folder}/{rank}.pt")
dist.barrier()
# A graph holds on to its process group, which must not outlive the interpreter.
del y
dist.destroy_process_group()
"""


def test_two_processes_over_gloo_compute_what_one_rank_computes(tmp_path):
    problems = [
        Problem([3, 5], 3),
        Problem([4, 0], 3, config=CONFIGS[1]),
        Problem([2, 3], 1),
        Problem([0, 0], 2),
    ]
    cases = [
        {
            "locals": [vars(local) for local in problem.locals()[1]],
            "config": vars(problem.config),
            **{name: getattr(problem, name) for name in
               ("xs", "weights", "ids", "targets", "num_experts")},
        }
        for problem in problems
    ]  # fmt: skip
    torch.save(cases, tmp_path / "cases.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", ON_GLOO, str(tmp_path), str(rank)], env=env)
        for rank in range(2)
    ]
    try:
        assert [each.wait(60) for each in ranks] == [0, 0]
    finally:
        for each in ranks:
            each.kill()
    of_ranks, refused = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
    for problem, *of_both in zip(problems, *of_ranks, strict=True):
        outputs, x_grads, w_grads, gradients_ = zip(*of_both, strict=True)
        got = [*outputs], [*x_grads], [*w_grads], summed(problem, problem.locals()[0], gradients_)
        assert_same(got, on_one_rank(problem))
    # Why the exchange is `all_to_all_single`.
    assert refused == (True, True)


# What is exchanged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS[:2])
def test_counts_and_rows_are_exchanged_and_nothing_else(monkeypatch, dtype, config):
    problem = Problem([3, 0, 5], 4, config=config, dtype=dtype, seed=3)
    held, _ = problem.locals()
    calls = exchanges(monkeypatch)
    outputs, x_grads, _, _ = on_threads(problem)
    assert all(y.dtype == g.dtype == dtype for y, g in zip(outputs, x_grads, strict=True))
    row = H * problem.xs[0].element_size()
    for rank in range(3):
        sent = sum(int(((ids >= 0) & (ids < 4)).sum()) for ids in problem.ids[rank : rank + 1])
        came = sum(int(torch.isin(ids, torch.tensor(held[rank])).sum()) for ids in problem.ids)
        counts = torch.int64, 4 * 8, 3 * len(held[rank]) * 8
        there, back = (dtype, sent * row, came * row), (dtype, came * row, sent * row)
        # The backward goes the same way in the other order.
        assert [call[1:] for call in calls if call[0] == rank] == [counts, there, back, there, back]


@pytest.mark.parametrize(
    "collective",
    [
        lambda t, group: dist.all_reduce(t, group=group),
        lambda t, group: dist.broadcast(t, 0, group=group),
        lambda t, group: dist.all_gather([t.clone() for _ in range(2)], t, group=group),
        lambda t, group: dist.all_to_all([t.clone() for _ in range(2)], [t, t], group=group),
        lambda t, group: dist.reduce_scatter(t.clone(), [t, t], group=group),
        lambda t, group: dist.all_gather_object([None] * 2, t, group=group),
    ],
    ids=["reduce", "broadcast", "gather", "list", "scatter", "object"],
)
def test_experts_that_are_exchanged_in_another_way_show(monkeypatch, collective):
    def with_weights(x, weights, ids, local, num_experts, config, group, placement):
        collective(local.down.detach().clone(), group)
        return expert_parallel(x, weights, ids, local, num_experts, config, group, placement)

    exchanges(monkeypatch)
    with pytest.raises(AssertionError, match="only all-to-all is expected"):
        on_threads(Problem([3, 5], 4), with_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_rounded_when_it_travels_and_a_token_once_more(dtype):
    problem = Problem([9, 4, 6], 5, top_k=3, dtype=dtype)
    _, locals_ = problem.locals()
    outputs = expert_parallel_on_list(
        problem.xs, problem.weights, problem.ids, locals_, 5, problem.config
    )
    wide = ExpertWeights(**{name: tensor.double() for name, tensor in vars(problem.whole).items()})
    for y, x, w, ids in zip(outputs, problem.xs, problem.weights, problem.ids, strict=True):
        each = [
            experts(x.double(), wide, w[:, k : k + 1], ids[:, k : k + 1], problem.config)
            for k in range(3)
        ]
        # Half a unit for every pair and half a unit for the sum. The rest is float32's own error:
        # 12 products and an activation before.
        unit = torch.finfo(dtype).eps
        bound = (unit + 32 * torch.finfo(torch.float32).eps) * (sum(p.abs() for p in each) + 0.1)
        assert y.dtype == dtype
        assert ((y.double() - sum(each)).abs() <= bound).all()


def test_each_rank_reads_its_own_experts_only():
    problem = Problem([4, 4, 4], 6, seed=1)
    held, locals_ = problem.locals()
    poisoned = ExpertWeights(**{n: torch.full_like(t, torch.nan) for n, t in
                                vars(locals_[1]).items()})  # fmt: skip
    outputs = expert_parallel_on_list(
        problem.xs, problem.weights, problem.ids, [locals_[0], poisoned, locals_[2]], 6, CONFIGS[0]
    )
    for y, ids in zip(outputs, problem.ids, strict=True):
        assert torch.equal(y.isnan().any(1), torch.isin(ids, torch.tensor(held[1])).any(1))


def test_a_token_that_is_not_finite_changes_no_other():
    problem = Problem([4, 3], 3, seed=1)
    problem.ids[0][1] = 2
    before = on_a_list(problem)[0]
    problem.xs[0][1, 0] = torch.nan
    after = on_a_list(problem)[0]
    same = torch.tensor([True, False, True, True])
    assert after[0][1].isnan().all()
    assert torch.equal(before[0][same], after[0][same])
    assert torch.equal(before[1], after[1])


def test_two_equal_ids_in_a_row_are_both_counted():
    problem = Problem([3, 2], 4, top_k=3)
    problem.ids = [torch.full_like(ids, 2) for ids in problem.ids]
    problem.weights = [weights_of(ids) for ids in problem.ids]
    assert_same(on_a_list(problem), on_one_rank(problem))


def test_arguments_are_not_changed_and_not_given_back():
    problem = Problem([3, 2], 1, top_k=1)
    problem.ids = [torch.zeros_like(ids) for ids in problem.ids]
    before = [each.clone() for each in (*problem.xs, *problem.weights, *problem.ids)]
    _, locals_ = problem.locals()
    outputs = expert_parallel_on_list(
        problem.xs, problem.weights, problem.ids, locals_, 1, CONFIGS[0]
    )
    for y in outputs:
        y.zero_()
    after = (*problem.xs, *problem.weights, *problem.ids)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num())
               for a, b in zip(before, after, strict=True))  # fmt: skip


def test_a_rank_that_asks_for_no_gradient_still_takes_part_in_the_backward():
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    def run(rank):
        x = problem.xs[rank].clone().requires_grad_(rank == 0)
        args = problem.weights[rank], problem.ids[rank], locals_[rank], 4, CONFIGS[0], None
        y = expert_parallel(x, *args)
        (y * problem.targets[rank]).sum().backward()
        return x.grad

    assert torch.equal(on_ranks(2, run)[0], on_a_list(problem)[1][0])


def test_without_gradients_the_output_has_none():
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    @torch.no_grad()
    def run(rank):
        args = problem.weights[rank], problem.ids[rank], locals_[rank], 4, CONFIGS[0], None
        return expert_parallel(problem.xs[rank], *args).requires_grad

    assert on_ranks(2, run) == [False, False]


# Each defect shows


class Faulty(ListOfRanks):
    """What does the third exchange, the way back, do?"""

    def __init__(self, size, way_back):
        super().__init__(size)
        self.calls, self.way_back = 0, way_back

    def all_to_all(self, rows, send, receive):
        self.calls += 1
        if self.calls == 3:
            return self.way_back(super().all_to_all, rows, send, receive)
        return super().all_to_all(rows, send, receive)


def with_way_back(way_back):
    def run(xs, weights, ids, locals_, num_experts, config, placement):
        ranks = Faulty(len(xs), way_back)
        return module.over_ranks(xs, weights, ids, locals_, num_experts, config, ranks, placement)

    return run


def weights_of(ids):
    """All different, none of them NaN."""
    return torch.linspace(0.5, 1.5, ids.numel(), dtype=torch.float64).view(ids.shape)


def balanced():
    """Two ranks of two experts, and every rank sends one token to every expert."""
    problem = Problem([4, 4], 4, top_k=1)
    problem.ids = [torch.tensor([[3], [0], [2], [1]]), torch.tensor([[1], [0], [2], [3]])]
    problem.weights = [weights_of(ids) for ids in problem.ids]
    return problem


def test_rows_that_are_not_sent_back_are_silent_where_counts_are_balanced():
    problem = balanced()
    run = with_way_back(lambda real, rows, send, receive: rows)
    assert differs(on_a_list(problem, run), on_one_rank(problem))


def test_splits_that_are_not_swapped_are_an_error_where_counts_are_not_balanced():
    run = with_way_back(lambda real, rows, send, receive: real(rows, receive, send))
    assert_same(on_a_list(balanced(), run), on_one_rank(balanced()))
    with pytest.raises((ValueError, RuntimeError)):
        on_a_list(Problem([6, 1], 4), run)


@pytest.mark.parametrize("wrong", [lambda order: order, lambda order: torch.arange(len(order))])
def test_rows_that_are_sent_back_in_another_order_show(monkeypatch, wrong):
    # The rows of each expert come from three ranks: that permutation is not its own inverse.
    problem = Problem([4, 5, 6], 6, seed=2)
    expected = on_one_rank(problem)
    monkeypatch.setattr(module, "inverse_permutation", wrong)
    assert differs(on_a_list(problem), expected)


def test_splits_that_are_estimated_show(monkeypatch):
    def uniform(counts, held, ranks):
        return [
            torch.full((ranks.size, len(held[rank])), int(mine.sum()) // mine.numel())
            for mine, rank in zip(counts, ranks.here, strict=True)
        ]

    monkeypatch.setattr(module, "exchange_counts", uniform)
    assert_same(on_a_list(balanced()), on_one_rank(balanced()))
    with pytest.raises((ValueError, RuntimeError)):
        on_a_list(Problem([6, 1], 4))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_gradients_that_are_multiplied_by_the_number_of_ranks_show():
    def way_back(real, rows, send, receive):
        return [_Scaled.apply(each, len(rows)) for each in real(rows, send, receive)]

    problem, single = Problem([3, 4], 4), Problem([4], 4)
    got, expected = on_a_list(problem, with_way_back(way_back)), on_one_rank(problem)
    assert all(torch.allclose(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert differs(got, expected)
    # One rank cannot show it.
    assert_same(on_a_list(single, with_way_back(way_back)), on_one_rank(single))


def test_every_expert_of_a_rank_gets_its_own_rows(monkeypatch):
    problem = Problem([4, 5, 6], 6, seed=2)
    expected = on_one_rank(problem)
    monkeypatch.setattr(module, "expert_major", lambda counts: torch.arange(int(counts.sum())))
    assert differs(on_a_list(problem), expected)


# Steps


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_expert_major_sorts_by_expert_and_then_by_rank(counts):
    labels = [
        (e, rank, i)
        for rank, of_experts in enumerate(counts)
        for e, count in enumerate(of_experts)
        for i in range(count)
    ]
    order = expert_major(torch.tensor(counts)).tolist()
    assert [labels[row] for row in order] == sorted(labels)


def test_each_rank_learns_what_comes_to_its_experts():
    held = [[0, 1], [2], []]
    sent = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])]
    first, second, third = exchange_counts(sent, held, ListOfRanks(3))
    assert first.tolist() == [[1, 2], [4, 5], [7, 8]]
    assert second.tolist() == [[3], [6], [9]]
    assert third.shape == (3, 0)


def test_gathered_and_reduced_tensors_have_the_gradients_of_all_ranks():
    groups = ListOfRanks([[0, 2], [1, 3]])
    xs = [torch.full((n, 2), float(n), requires_grad=True) for n in (1, 2, 3, 0)]
    gathered = all_gather(xs, groups)
    assert [len(each) for each in gathered] == [4, 2, 4, 2]
    assert torch.equal(gathered[0], torch.cat([xs[0], xs[2]]))
    (gathered[0].sum() + 10 * gathered[2].sum()).backward()
    assert torch.equal(xs[0].grad, torch.full((1, 2), 11.0))
    assert xs[1].grad is None
    terms = [torch.tensor(float(n), requires_grad=True) for n in range(4)]
    reduced = all_reduce(terms, groups)
    assert [float(each.detach()) for each in reduced] == [2, 4, 2, 4]
    (reduced[0] + 10 * reduced[2]).backward()
    assert float(terms[0].grad) == float(terms[2].grad) == 11


def test_a_mesh_has_every_rank_once_in_a_row_and_once_in_a_column():
    everybody, rows, columns = mesh_of_list(3, 2)
    assert (everybody.size, rows.size, columns.size) == (6, 2, 3)
    assert rows.here == (0, 1, 0, 1, 0, 1)
    assert columns.here == (0, 0, 1, 1, 2, 2)


# Bad arguments


def call(problem=None, **changed):
    problem = problem or Problem([2, 3], 4)
    arguments = {
        "xs": problem.xs,
        "weights": problem.weights,
        "expert_ids": problem.ids,
        "locals": problem.locals()[1],
        "num_experts": 4,
        "config": CONFIGS[0],
    }
    return expert_parallel_on_list(**{**arguments, **changed})


def test_bad_arguments_are_named():
    problem = Problem([2, 3], 4)
    whole = [problem.whole] * 2
    with pytest.raises(
        ValueError, match=r"local.down: expected shape \[2, 4, I\], got \[4, 4, 3\]"
    ):
        call(locals=whole)
    with pytest.raises(ValueError, match="locals: expected an entry of every list for each rank"):
        call(locals=whole[:1])
    with pytest.raises(ValueError, match="locals: expected an entry"):
        call(xs=[], weights=[], expert_ids=[], locals=[])
    with pytest.raises(TypeError, match="num_experts: expected an int, got float"):
        call(num_experts=4.0)
    with pytest.raises(TypeError, match="expert_ids: expected dtype int32 or int64, got float64"):
        call(expert_ids=problem.weights)
    with pytest.raises(TypeError, match="local: expected ExpertWeights, got list"):
        call(locals=[[], []])
    three = make_placement(torch.tensor([0, 1, 2, 0]), 3, 2)
    with pytest.raises(ValueError, match="placement: expected copies of 4 experts on ranks below"):
        call(placement=three)
    four_ranks = make_placement(torch.arange(4), 4, 4)
    with pytest.raises(ValueError, match=r"got 4 experts on ranks \[0, 1, 2, 3\]"):
        call(placement=four_ranks)
    with pytest.raises(ValueError, match=r"receive: expected \[1, 2\] for rank 0, .* got \[1, 3\]"):
        ListOfRanks(2).all_to_all(
            [torch.zeros(2), torch.zeros(2)], [[1, 1], [2, 0]], [[1, 3], [1, 0]]
        )
    with pytest.raises(ValueError, match="groups: expected groups of one size"):
        ListOfRanks([[0, 1], [2]])


def test_ids_of_int32_are_as_good():
    problem = Problem([2, 3], 4)
    as_int32 = call(problem, expert_ids=[ids.int() for ids in problem.ids])
    for one, other in zip(as_int32, call(problem), strict=True):
        assert torch.equal(one, other)


def test_slices_are_what_assign_experts_gives():
    problem = Problem([2, 3, 1], 5)
    held, locals_ = problem.locals()
    assert held == [[0, 1], [2, 3], [4]]
    assert torch.equal(locals_[1].down, slice_experts(problem.whole, 2, 2).down)
    rows, _, _ = dispatch(problem.xs[0], problem.ids[0], 5)
    assert rows.dtype == problem.xs[0].dtype
