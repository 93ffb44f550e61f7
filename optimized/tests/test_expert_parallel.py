"""Expert parallelism in chunks: the same numbers as the reference's, and the way that they travel.

Ranks are threads where the question is what happens when, and processes over gloo where it is
whether it happens at all.
"""

import importlib.util
import threading
from pathlib import Path
from types import SimpleNamespace

import moe_optimized.expert_parallel as fast
import moe_optimized.expert_parallel_order as order_module
import moe_optimized.expert_parallel_pipeline as pipeline
import pytest
import torch
import torch.distributed as dist
from moe_optimized.expert_parallel import expert_parallel
from moe_reference.config import Placement
from moe_reference.placement import make_placement, physical_ids


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
processes = load(HERE.parents[1] / "reference" / "tests" / "ranks_of_processes.py")
on_gloo = load(HERE / "ranks_on_gloo.py")
problems = on_gloo.problems
AWKWARD, CONFIGS, H, Problem = problems.AWKWARD, problems.CONFIGS, problems.H, problems.Problem
THREE = Problem([3, 0, 5], 8, seed=3)


def in_chunks(chunks, **options):
    return lambda *given: expert_parallel(*given, chunks=chunks, **options)


class Late:
    """Exchanges whose numbers are there when they are waited for, and not before.

    Attributes:
        log: by rank what happened, exchanges named by the order in which they were posted.
        calls: by rank the bytes that each exchange sent and received.
    """

    def __init__(self):
        self.real = dist.all_to_all_single
        self.log, self.calls, self.names = {}, {}, {}

    def note(self, what):
        self.log.setdefault(dist.get_rank(), []).append(what)

    def __call__(self, output, input, receive, send, group=None, async_op=False):
        assert async_op
        rank = dist.get_rank()
        calls = self.calls.setdefault(rank, [])
        names = self.names.get(rank, [])
        name = names[len(calls)] if len(calls) < len(names) else str(len(calls))
        size = input.element_size()
        calls.append((input.dtype, input.numel() * size, output.numel() * size))
        came, before = torch.empty_like(output), input.clone()
        output.fill_(float("nan") if output.is_floating_point() else -1)
        self.note(f"post {name}")
        self.real(came, input, receive, send, group=group)

        def wait():
            self.note(f"wait for {name}")
            assert torch.equal(input, before), "what is sent was written to"
            output.copy_(came)

        return SimpleNamespace(wait=wait)


@pytest.fixture
def late(monkeypatch):
    made = Late()
    monkeypatch.setattr(pipeline.dist, "all_to_all_single", made)
    return made


def posted_and_waited_for(log):
    return [
        sorted(each.removeprefix(what) for each in log if each.startswith(what))
        for what in ("post ", "wait for ")
    ]


# The same numbers


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
@pytest.mark.parametrize("name", AWKWARD)
def test_any_number_of_chunks_computes_what_one_rank_computes(name, chunks, late):
    problem = AWKWARD[name]
    found = problems.on_threads(problem, in_chunks(chunks))
    problems.assert_same(found, problems.on_one_rank(problem))
    # Each exchange is waited for, and with one rank there is none.
    for log in late.log.values():
        posted, waited = posted_and_waited_for(log)
        assert posted == waited
    assert len(late.log) == (problem.world_size if problem.world_size > 1 else 0)


@pytest.fixture(scope="module")
def on_processes():
    """By number of ranks what each of them has found."""
    sizes = range(1, 9)
    world = processes.World([(1, size) for size in sizes], seconds=240)
    try:
        return {size: world.run(on_gloo.on_mesh, (1, size)) for size in sizes}
    finally:
        world.close()


@pytest.mark.parametrize("means", ["reference", "torch"])
@pytest.mark.parametrize("size", range(1, 9))
def test_processes_compute_what_one_rank_computes(on_processes, size, means):
    for name, problem in problems.awkward_problems(size).items():
        found = [of_rank[means, name] for of_rank in on_processes[size]]
        problems.assert_same(problems.together(problem, found), problems.on_one_rank(problem))


@pytest.mark.triton
def test_kernels_compute_what_one_rank_computes(on_processes):
    for size in on_gloo.KERNELS:
        for means, name, problem, _ in on_gloo.cases(size):
            if means != "triton":
                continue
            found = [of_rank[means, name] for of_rank in on_processes[size]]
            tolerance = {"rtol": 2e-5, "atol": 2e-6}
            expected = problems.on_one_rank(problem)
            problems.assert_same(problems.together(problem, found), expected, **tolerance)


def test_weights_may_be_dtensors_where_the_shares_are_the_same(on_processes):
    refused = []
    for size in on_gloo.DTENSORS:
        for num_experts in sorted({2 * size, size + 1, 3}):
            found = [of_rank["DTensor"] for of_rank in on_processes[size]]
            for each in found:
                assert "expected placements" in each[num_experts, "R"]
            found = [each[num_experts, "S(0)"] for each in found]
            if any(isinstance(each, str) for each in found):
                # Nobody goes on alone.
                assert len(set(found)) == 1
                assert "expected shares of" in found[0]
                refused.append((num_experts, size))
                continue
            outputs, x_grads, _, weights = problems.on_one_rank(Problem([2] * size, num_experts))
            ys, xs, downs = zip(*found, strict=True)
            torch.testing.assert_close(torch.cat(ys), torch.cat(outputs).detach())
            torch.testing.assert_close(torch.cat(xs), torch.cat(x_grads))
            torch.testing.assert_close(torch.cat(downs), weights["down"])
    # DTensor's ceiling is a share of the others here: 5 experts are 2, 2, 1, 0 there.
    assert refused == [(4, 3), (5, 4)]


def test_the_same_copies_are_chosen():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        num_experts, top_k = seed % 5 + 1, seed % 4
        logical = torch.randint(0, num_experts, (12,), generator=generator)
        logical[:num_experts] = torch.arange(num_experts)
        placement = make_placement(logical[torch.randperm(12, generator=generator)], num_experts, 3)
        ids = torch.randint(-2, num_experts + 2, (seed, top_k), generator=generator)
        ids = ids.int() if seed % 2 else ids
        chosen = order_module.choose_copies(ids, placement)
        assert torch.equal(chosen, physical_ids(ids, placement).long())


def test_copies_are_those_of_a_placement_that_was_written_over():
    ids = torch.tensor([[0, 1], [1, 0]])
    for dtype in (torch.int32, torch.int64):
        placed = make_placement(torch.tensor([0, 1, 0]), 2, 3)
        placement = Placement(*(map_.to(dtype) for map_ in vars(placed).values()))
        assert order_module.choose_copies(ids, placement).tolist() == [[0, 1], [1, 2]]
        moved = make_placement(torch.tensor([1, 0, 1]), 2, 3)
        for map_, other in zip(vars(placement).values(), vars(moved).values(), strict=True):
            map_.copy_(other)
        assert order_module.choose_copies(ids, placement).tolist() == [[1, 0], [2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shared_output_is_added_before_the_one_rounding(dtype):
    problem = Problem([3, 0, 4], 5, dtype=dtype)
    _, locals_ = problem.locals()
    extra = [torch.randn(*x.shape) for x in problem.xs]

    def run(rank):
        given = problem.xs[rank], problem.weights[rank], problem.ids[rank], locals_[rank], 5
        return [
            expert_parallel(*given, problem.config, None, chunks=2, shared=shared).detach()
            for shared in (None, lambda: extra[rank], lambda: -problem.xs[rank].float())
        ]

    def widely(rank):
        given = problem.xs[rank].double(), problem.weights[rank], problem.ids[rank]
        wide = type(locals_[rank])(*(t.double() for t in vars(locals_[rank]).values()))
        return expert_parallel(*given, wide, 5, problem.config, None)

    unit = torch.finfo(dtype).eps
    for x, found, exact, more in zip(
        problem.xs, problems.on_ranks(3, run), problems.on_ranks(3, widely), extra, strict=True
    ):
        for y, term in zip(found, (0, more, -x.float()), strict=True):
            assert y.dtype == dtype
            # A pair is rounded when it travels; the sum is rounded once, relative to itself.
            bound = unit * ((exact + term).abs() / 2 + 2) + 1e-6
            assert ((y.double() - exact.detach() - term).abs() <= bound).all()
        if dtype is torch.bfloat16 and len(x):
            alone, together = found[0].float(), found[1].float()
            assert not torch.equal(together, (alone + more).bfloat16().float())


def test_a_shared_output_is_added_with_one_rank_too():
    problem = AWKWARD["one rank"]
    extra = torch.ones(5, H, dtype=torch.float64, requires_grad=True)
    found = problems.on_threads(problem, in_chunks(2, shared=lambda: extra))
    torch.testing.assert_close(found[0][0], problems.on_one_rank(problem)[0][0].detach() + 1)
    assert torch.equal(extra.grad, problem.targets[0])


# What travels, and when


OTHERS = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "irecv",
    "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


def refuse(*_, **__):
    raise AssertionError("another collective")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS[:2])
def test_rows_travel_once_each_way_in_any_number_of_chunks(monkeypatch, dtype, config):
    problem = Problem([3, 0, 5], 8, config=config, dtype=dtype, seed=3)
    held, _ = problem.locals()
    for name in OTHERS:
        monkeypatch.setattr(dist, name, refuse)
    for chunks in (1, 2, 3, 9):
        with monkeypatch.context() as patch:
            late = Late()
            patch.setattr(pipeline.dist, "all_to_all_single", late)
            problems.on_threads(problem, in_chunks(chunks))
        row = H * problem.xs[0].element_size()
        used = min(chunks, 3)
        for rank in range(3):
            ids = problem.ids[rank]
            sent = int(((ids >= 0) & (ids < 8)).sum()) * row
            mine = torch.tensor(held[rank])
            came = sum(int(torch.isin(ids, mine).sum()) for ids in problem.ids) * row
            counts, *rows = late.calls[rank]
            assert counts == (torch.int64, 8 * 8, 3 * len(mine) * 8)
            assert len(rows) == 4 * used
            assert {each[0] for each in rows} == {dtype}
            # There and back, and the same for the gradients.
            assert sum(each[1] for each in rows) == 2 * (sent + came)
            assert sum(each[2] for each in rows) == 2 * (sent + came)


class Marked(torch.autograd.Function):
    """The identity, which says when its backward runs."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.note("shared backward")
        return gradient, None


WAY = ["there 0", "there 1", "back 0", "there 2", "back 1", "back 2"]
CHUNKS = [
    "post there 1", "wait for there 0", "compute", "post back 0",
    "post there 2", "wait for there 1", "compute", "post back 1",
    "wait for there 2", "compute", "post back 2",
]  # fmt: skip
HOME = ["wait for back 0", "wait for back 1", "wait for back 2"]


def test_the_next_chunk_travels_while_one_is_computed(late, monkeypatch):
    def noting(function):
        def run(*given):
            late.note("compute")
            return function(*given)

        return run

    means = fast._TORCH
    means = means._replace(forward=noting(means.forward), backward=noting(means.backward))
    monkeypatch.setattr(fast, "_TORCH", means)
    late.names = {rank: ["counts", *WAY, *WAY] for rank in range(3)}
    _, locals_ = THREE.locals()
    halfway = {}

    def run(rank):
        x, w = problems.leaf(THREE.xs[rank]), problems.leaf(THREE.weights[rank])

        def shared():
            late.note("shared")
            return Marked.apply(x, late.note)

        given = x, w, THREE.ids[rank], problems.leaves(locals_[rank]), 8, THREE.config, None
        y = expert_parallel(*given, chunks=3, shared=shared)
        halfway[rank] = len(late.log[rank])
        y.sum().backward()

    problems.on_ranks(3, run)
    for rank, log in late.log.items():
        forward, backward = log[: halfway[rank]], log[halfway[rank] :]
        first = ["post counts", "wait for counts", "post there 0", "shared"]
        assert forward == [*first, *CHUNKS, *HOME]
        assert backward == ["post there 0", *CHUNKS, "shared backward", *HOME]


def test_a_rank_that_asks_for_no_gradient_takes_part_in_the_backward(late):
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    def run(rank):
        x = problem.xs[rank].clone().requires_grad_(rank == 0)
        given = problem.weights[rank], problem.ids[rank], locals_[rank], 4, CONFIGS[0], None
        y = expert_parallel(x, *given)
        (y * problem.targets[rank]).sum().backward()
        return x.grad

    found = problems.on_ranks(2, run)
    torch.testing.assert_close(found[0], problems.on_one_rank(problem)[1][0])
    assert found[1] is None
    assert len(late.calls[0]) == len(late.calls[1]) == 1 + 4 * 2


def test_gradients_of_the_weights_alone_leave_no_exchange_behind(late):
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    def run(rank):
        x, local = problems.leaf(problem.xs[rank]), problems.leaves(locals_[rank])
        given = problem.weights[rank], problem.ids[rank], local, 4, CONFIGS[0], None
        y = expert_parallel(x, *given)
        return torch.autograd.grad((y * problem.targets[rank]).sum(), local.down)[0]

    found = problems.on_ranks(2, run)
    torch.testing.assert_close(torch.cat(found), problems.on_one_rank(problem)[3]["down"])
    for log in late.log.values():
        posted, waited = posted_and_waited_for(log)
        assert posted == waited


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()
    expected = problems.on_one_rank(problem)[0]

    def run(rank):
        with mode():
            local = problems.leaves(locals_[rank])
            x = problems.leaf(problem.xs[rank])
            given = problem.weights[rank], problem.ids[rank], local, 4, CONFIGS[0], None
            y = expert_parallel(x, *given)
        assert y.grad_fn is None
        assert not y.requires_grad
        return y

    for y, right in zip(problems.on_ranks(2, run), expected, strict=True):
        torch.testing.assert_close(y.clone(), right.detach())


def test_gradients_can_be_taken_again_and_in_anomaly_mode():
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    def run(rank):
        x = problems.leaf(problem.xs[rank])
        given = problem.weights[rank], problem.ids[rank], problems.leaves(locals_[rank])
        y = expert_parallel(x, *given, 4, CONFIGS[0], None)
        loss = (y * problem.targets[rank]).sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        loss.backward()
        return first, x.grad

    expected = problems.on_one_rank(problem)[1]
    with torch.autograd.set_detect_anomaly(True):
        for found, right in zip(problems.on_ranks(2, run), expected, strict=True):
            torch.testing.assert_close(found, (right, right))


@pytest.mark.parametrize("graph", [False, True])
def test_the_gradient_of_a_gradient_is_refused(graph):
    problem = Problem([3, 4], 4)
    _, locals_ = problem.locals()

    def run(rank):
        x = problems.leaf(problem.xs[rank])
        given = problem.weights[rank], problem.ids[rank], problems.leaves(locals_[rank])
        y = expert_parallel(x, *given, 4, CONFIGS[0], None)
        loss = y.square().sum() if graph else y.sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="expert_parallel: expected to be differentiated"):
            (gradient.square().sum() + x.sum()).backward()

    problems.on_ranks(2, run)


def test_a_compiled_function_is_interrupted():
    torch._dynamo.reset()
    problem = AWKWARD["one rank"]
    _, [local] = problem.locals()

    @torch.compile(backend="eager")
    def run(x, weights, ids):
        y = expert_parallel(x + 1, weights, ids, local, 3, problem.config, None)
        return 2 * y

    def on_rank(rank):
        given = problem.weights[0], problem.ids[0]
        expected = expert_parallel(problem.xs[0] + 1, *given, local, 3, problem.config, None)
        torch.testing.assert_close(run(problem.xs[0], *given), 2 * expected)

    problems.on_ranks(1, on_rank)
    torch._dynamo.reset()


# Bad arguments


def test_bad_arguments_are_refused_before_anything_is_exchanged(monkeypatch):
    for name in ("all_to_all_single", *OTHERS):
        monkeypatch.setattr(dist, name, refuse)
    problem = Problem([2, 3], 4)
    _, locals_ = problem.locals()
    four = make_placement(torch.arange(4), 4, 4)
    wrong = [
        (TypeError, "num_experts: expected an int, got float", {"num_experts": 4.0}),
        (TypeError, "expert_ids: expected dtype", {"expert_ids": problem.weights[0]}),
        (TypeError, "local: expected ExpertWeights, got list", {"local": []}),
        (ValueError, "local.down: expected shape", {"local": problem.whole}),
        (ValueError, "weights: expected shape", {"weights": torch.ones(1, 2)}),
        (ValueError, r"placement: .* on ranks \[0, 1, 2, 3\]", {"placement": four}),
        (ValueError, "chunks: expected at least 1, got 0", {"chunks": 0}),
        (TypeError, "chunks: expected an int, got float", {"chunks": 1.5}),
    ]

    def run(rank):
        given = {
            "x": problem.xs[rank],
            "weights": problem.weights[rank],
            "expert_ids": problem.ids[rank],
            "local": locals_[rank],
            "num_experts": 4,
            "config": CONFIGS[0],
            "group": None,
        }
        for error, message, changed in wrong:
            with pytest.raises(error, match=message):
                expert_parallel(**{**given, **changed})
        with pytest.raises(TypeError, match="x: expected dtype float32"):
            fast.expert_parallel_triton(**given)

    problems.on_ranks(2, run)


def test_a_shared_output_of_another_shape_is_refused():
    problem = AWKWARD["one rank"]
    with pytest.raises(ValueError, match=r"shared\(\): expected shape \[5, 4\], got \[1, 4\]"):
        problems.on_threads(problem, in_chunks(2, shared=lambda: torch.ones(1, H)))


# Each defect shows


def differs(problem, chunks=3):
    """Whether threads find something else than one rank, or nothing at all."""
    try:
        found = problems.on_threads(problem, in_chunks(chunks))
    except (RuntimeError, ValueError, IndexError):
        return True
    return problems.differs(found, problems.on_one_rank(problem))


def test_places_that_are_not_inverted_show(monkeypatch):
    real = fast.order_of_experts

    def wrong(*given):
        order = real(*given)
        return order._replace(place=order.place.argsort())

    monkeypatch.setattr(fast, "order_of_experts", wrong)
    # With two experts on each of two ranks the order is its own inverse.
    problems.assert_same(
        problems.on_threads(Problem([4, 4], 4), in_chunks(2)),
        problems.on_one_rank(Problem([4, 4], 4)),
    )
    assert differs(Problem([4, 5], 6))


def test_lengths_of_another_chunk_show(monkeypatch):
    real = fast.lengths_of

    def wrong(*given):
        send, receive, rows_of = real(*given)
        return send[:1] * len(send), receive[:1] * len(receive), rows_of

    monkeypatch.setattr(fast, "lengths_of", wrong)
    assert differs(Problem([4, 5], 6))


def test_a_return_that_is_not_waited_for_shows(monkeypatch, late):
    monkeypatch.setattr(pipeline, "_wait_for_all", lambda posted: posted.clear())
    assert differs(Problem([4, 5], 6))


def test_gradients_of_another_chunk_show(monkeypatch):
    means, here = fast._TORCH, threading.local()

    def wrong(*given):
        # Each chunk gets what the one before it should have got.
        found = means.backward(*given)
        before, here.found = getattr(here, "found", found), found
        return (*found[:2], *before[2:])

    monkeypatch.setattr(fast, "_TORCH", means._replace(backward=wrong))
    assert differs(Problem([4, 5], 6))
