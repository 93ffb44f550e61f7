import pytest
import torch
from moe_optimized import dispatch as module
from moe_optimized.dispatch import (
    _sum_places_torch,
    combine_torch,
    combine_triton,
    dispatch_torch,
    dispatch_triton,
    drop_to_capacity,
    factors_of,
    gather_sum,
    places_of,
    spread,
    spread_torch,
    spread_triton,
    weighted_sum_torch,
)
from moe_optimized.interpreter import launches
from moe_reference import dispatch as reference

dispatches = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(dispatch_torch, id="torch"),
        pytest.param(dispatch_triton, id="triton", marks=pytest.mark.triton),
    ],
)
combines = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(combine_torch, id="torch"),
        pytest.param(combine_triton, id="triton", marks=pytest.mark.triton),
    ],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Tokens, experts per token, experts, hidden size.
SHAPES = [(0, 2, 3, 4), (4, 0, 3, 4), (5, 2, 0, 3), (1, 1, 1, 1), (9, 3, 4, 19), (70, 2, 8, 33)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@dispatches
@dtypes
@shapes
def test_dispatch_agrees_with_the_reference(implementation, shape, dtype, assert_close):
    T, K, E, H = shape
    ids = torch.randint(-2, E + 2, (T, K))
    x = torch.randn(T, H).to(dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    rows, counts, slots = implementation(ours, ids, E)
    expected, expected_counts, expected_slots = reference.dispatch(theirs, ids, E)
    assert torch.equal(rows, expected)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(slots, expected_slots)
    rows.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, theirs.grad)


@pytest.mark.triton
@dtypes
@shapes
def test_rows_leave_with_their_weights(shape, dtype, assert_close):
    T, K, E, H = shape
    ids = torch.randint(-2, E + 2, (T, K))
    x, weights = torch.randn(T, H + 3).to(dtype)[:, 3:], torch.rand(T, K)
    weights[(ids < 0) | (ids >= E)] = float("nan")
    _, _, slots = reference.dispatch(x, ids, E)
    cotangent = torch.randn(len(slots), H).to(dtype)
    found = []
    for run in (spread_triton, spread_torch):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        rows = run(leaves[0], slots, K, leaves[1])
        rows.backward(cotangent)
        found.append((rows, leaves[0].grad, leaves[1].grad))
    (rows, *gradients), (expected, *expected_gradients) = found
    assert torch.equal(rows, expected)
    for actual, right in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype is right.dtype
        # Products are rounded to x's dtype before torch adds them up.
        assert_close(actual, right, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_nobody_are_zero_and_have_no_gradient(weighted, assert_close):
    x = torch.randn(3, 5, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True) if weighted else None
    slots = torch.tensor([4, 0, 1, 6, 6])
    rows = spread_triton(x, slots, 2, weights)
    expected = spread_torch(x, slots[:3], 2, weights)
    assert torch.equal(rows, torch.cat([expected, torch.zeros(2, 5)]))
    cotangent = torch.randn(5, 5)
    leaves = (x, weights) if weighted else (x,)
    found = torch.autograd.grad(rows, leaves, cotangent)
    for actual, right in zip(
        found, torch.autograd.grad(expected, leaves, cotangent[:3]), strict=True
    ):
        assert_close(actual, right)


@combines
@dtypes
@shapes
def test_combine_agrees_with_the_reference(implementation, shape, dtype, assert_close):
    T, K, E, H = shape
    ids = torch.randint(-1, E + 1, (T, K))
    rows, _, slots = reference.dispatch(torch.randn(T, H).to(dtype), ids, E)
    # Rows of nobody and weights without a row may hold anything, and the order of rows is free.
    slots = torch.cat([slots, torch.tensor([T * K, T * K])])
    rows = torch.cat([rows, rows.new_full((2, H), float("nan"))])
    shuffle = torch.randperm(len(slots))
    weights = torch.rand(T, K).to(dtype)
    weights[(ids < 0) | (ids >= E)] = float("nan")

    found = []
    cotangent = torch.randn(T, H).to(dtype)
    for run in (implementation, reference.combine):
        leaves = rows[shuffle].requires_grad_(), weights.clone().requires_grad_()
        out = run(leaves[0], slots[shuffle], leaves[1])
        out.backward(cotangent)
        found.append((out, leaves[0].grad, leaves[1].grad))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype is expected.dtype
        assert_close(actual, expected)


@combines
def test_combine_takes_any_strides(implementation, assert_close):
    rows = torch.randn(12, 10)[::2, ::2]
    slots = torch.randperm(6)
    weights = torch.rand(2, 3).T.contiguous().T
    expected = reference.combine(rows, slots, weights)
    assert_close(implementation(rows, slots, weights), expected)
    assert_close(implementation(rows.T.contiguous().T, slots, weights), expected)


@pytest.mark.triton
@pytest.mark.parametrize("weighted", [False, True])
def test_slots_may_have_any_stride(weighted):
    x, weights = torch.randn(6, 4), torch.rand(6, 2) if weighted else None
    slots = torch.randperm(12)[::2]
    assert torch.equal(spread_triton(x, slots, 2, weights), spread_torch(x, slots, 2, weights))


@pytest.mark.triton
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("rows_too", [False, True])
def test_only_gradients_that_are_asked_for_are_computed(rows_too, weights_too, monkeypatch):
    computed = []

    def noting(function):
        def run(*given):
            computed.append(function.__name__)
            return function(*given)

        return run

    for name in ("spread_rows", "sum_places", "_dots_of_slots"):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    slots, leaf = torch.randperm(8), torch.ones((), requires_grad=True)
    for run, size, to_rows in (
        (lambda rows, weights: combine_triton(rows, slots, weights), 8, "spread_rows"),
        (lambda rows, weights: spread_triton(rows, slots, 2, weights), 4, "sum_places"),
    ):
        rows, weights = torch.randn(size, 3), torch.rand(4, 2)
        out = run(rows * leaf if rows_too else rows, weights * leaf if weights_too else weights)
        computed.clear()
        if rows_too or weights_too:
            out.sum().backward()
        assert computed == [to_rows] * rows_too + ["_dots_of_slots"] * weights_too


def test_a_weighted_sum_reads_no_value_but_on_a_cpu():
    # What has no values cannot be read.
    rows, weights = (torch.empty(8, n, device="meta", requires_grad=True) for n in (3, 2))
    slots = torch.empty(8, dtype=torch.int64, device="meta")
    out = weighted_sum_torch(rows, slots, weights[:4], torch.float32)
    assert out.shape == (4, 3)
    out.sum().backward()
    assert rows.grad.shape == rows.shape


@combines
def test_combine_refuses_slots_of_nothing(implementation):
    with pytest.raises(ValueError, match="slots: expected slots from 0 to 4, got 5"):
        implementation(torch.randn(2, 3), torch.tensor([0, 5]), torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"slots: expected shape \[2\]"):
        implementation(torch.randn(2, 3), torch.tensor([0]), torch.rand(2, 2))


@pytest.mark.parametrize("policy", ["position", "first_choice", "probs"])
@shapes
def test_drop_to_capacity_agrees_with_the_reference(shape, policy):
    T, K, E, _ = shape
    ids = torch.randint(-2, E + 2, (T, K), dtype=torch.int32)
    weights = torch.randint(0, 4, (T, K)).float()
    weights[torch.rand(T, K) < 0.1] = float("nan")
    for capacity in (0, 1, 3, 100):
        actual = drop_to_capacity(weights, ids, E, capacity, policy)
        expected = reference.drop_to_capacity(weights, ids, E, capacity, policy)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy: expected one of"):
        drop_to_capacity(torch.rand(1, 1), torch.zeros(1, 1, dtype=torch.int64), 1, 1, "prob")


@shapes
def test_a_gpu_without_kernels_sums_without_atomics(shape, assert_close):
    T, K, E, H = shape
    ids = torch.randint(-1, E + 1, (T, K))
    rows, _, slots = reference.dispatch(torch.randn(T, H), ids, E)
    expected = reference.combine(rows, slots, torch.ones(T, K))
    assert_close(_sum_places_torch(rows, places_of(slots, T * K), T, K), expected)


def test_gradients_of_a_token_are_added_up_in_float32():
    # In bfloat16 256 + 1 is 256.
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = spread(x, torch.arange(5), 5)
    rows.backward(torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 260.0


def test_rows_of_nobody_take_no_part():
    slots, known = torch.tensor([6, 3, 6, 0, 5]), torch.tensor([1, 3, 4])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = spread(x, slots, 2)
    assert torch.equal(rows[known], spread(x, slots[known], 2))
    cotangent = torch.randn(5, 2, dtype=torch.float64)
    found = torch.autograd.grad(rows, x, cotangent)
    expected = torch.autograd.grad(spread(x, slots[known], 2), x, cotangent[known])
    assert torch.equal(*found, *expected)
    assert torch.equal(gather_sum(rows, slots, 3, 2), gather_sum(rows[known], slots[known], 3, 2))
    weights = torch.rand(3, 2)
    assert factors_of(weights, slots, torch.float64).tolist() == [
        0.0, weights[1, 1].item(), 0.0, weights[0, 0].item(), weights[2, 1].item()
    ]  # fmt: skip


def test_gradients_in_float64():
    slots = torch.tensor([3, 0, 5])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread(x, slots, 2), x)
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: gather_sum(rows, slots, 3, 2), rows)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows, weights: combine_torch(rows, slots, weights), (rows, weights)
    )


@pytest.mark.triton
def test_the_kernels_are_launched():
    before = launches.copy()
    x, ids = torch.randn(4, 3), torch.randint(0, 3, (4, 2))
    rows, _, slots = dispatch_triton(x, ids, 3)
    combine_triton(rows, slots, torch.rand(4, 2))
    assert launches - before == {
        "align_place_kernel": 1,
        "spread_rows_kernel": 1,
        "combine_rows_kernel": 1,
    }
    with pytest.raises(TypeError, match="x: expected dtype"):
        dispatch_triton(x.double(), ids, 3)
    with pytest.raises(TypeError, match="rows: expected dtype"):
        combine_triton(rows.double(), slots, torch.rand(4, 2))
