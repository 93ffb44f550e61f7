import math

import pytest
import torch
from moe_reference.dispatch import (
    batch_rows,
    combine,
    count_tokens,
    dispatch,
    drop_to_capacity,
    expert_capacity,
    inclusive_offsets,
    inverse_permutation,
    rows_in_use,
    unbatch_rows,
)

EXPERTS = (1, 2, 3, 7, 8, 72, 257)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def routed(tokens, top_k, num_experts, hidden=3, seed=0, dtype=torch.float64):
    """x, weights and ids; some ids are not here, some stand twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    return x, weights, ids


def one_hot_plan(ids, num_experts):
    """[S, T · K] with a single 1 per row, and the counts, from Python's own sort."""
    flat = ids.flatten().tolist()
    here = [slot for slot, e in enumerate(flat) if 0 <= e < num_experts]
    order = sorted(here, key=lambda slot: (flat[slot], slot))
    plan = torch.zeros(len(order), len(flat), dtype=torch.float64)
    for row, slot in enumerate(order):
        plan[row, slot] = 1.0
    return plan, [flat.count(e) for e in range(num_experts)], order


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_dispatch_and_combine_equal_one_hot_products(num_experts):
    for tokens, top_k in [(0, 2), (1, 1), (6, 3), (17, min(num_experts, 9))]:
        x, weights, ids = routed(tokens, top_k, num_experts, seed=tokens)
        plan, counts, order = one_hot_plan(ids, num_experts)
        rows, tokens_per_expert, slots = dispatch(x, ids.int(), num_experts)
        assert torch.equal(rows, plan @ x.repeat_interleave(top_k, 0))
        assert (tokens_per_expert.tolist(), slots.tolist()) == (counts, order)
        weighted = plan.T @ (rows * (plan @ weights.flatten())[:, None])
        expected = weighted.view(tokens, top_k, 3).sum(1)
        torch.testing.assert_close(combine(rows, slots, weights), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_experts_give_x_times_the_sum_of_its_weights(dtype):
    x, weights, ids = routed(20, 4, 5, dtype=dtype)
    x_before = x.clone()
    rows, counts, slots = dispatch(x, ids, 5)
    assert (rows.dtype, counts.dtype, slots.dtype) == (dtype, torch.int64, torch.int64)
    output = combine(rows, slots, weights)
    here = (ids >= 0) & (ids < 5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = (weights.to(wide) * here).sum(1, keepdim=True)
    assert output.dtype == dtype
    torch.testing.assert_close(output, (x.to(wide) * sums).to(dtype))
    assert torch.equal(x, x_before)
    assert rows.data_ptr() != x.data_ptr()


def test_combine_is_rounded_once():
    # 256 + 1 + 1 is 258 in bfloat16, but 256 where every step is rounded.
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert combine(rows, torch.arange(3), torch.ones(1, 3)).item() == 258.0
    # Each product alone would be rounded down, and so would their sum be then.
    weights = torch.tensor([[1 + 2**-8 - 2**-12, 2**-8]])
    assert combine(torch.ones_like(rows[:2]), torch.arange(2), weights).item() == 1 + 2**-7


def test_the_gradient_of_a_token_is_rounded_once():
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows, _, _ = dispatch(x, torch.tensor([[0, 1, 2]]), 3)
    rows.backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 258.0


def test_equal_ids_in_a_row_are_two_rows():
    x, ids = torch.tensor([[2.0]]), torch.tensor([[1, 1]])
    rows, counts, slots = dispatch(x, ids, 2)
    assert (rows.tolist(), counts.tolist(), slots.tolist()) == ([[2.0], [2.0]], [0, 2], [0, 1])
    assert combine(rows, slots, torch.tensor([[1.0, 10.0]])).tolist() == [[22.0]]


def test_nobodys_rows_and_weights_without_a_row_count_for_nothing():
    rows = torch.tensor([[math.nan], [3.0], [math.inf]], requires_grad=True)
    weights = torch.tensor([[math.nan, 2.0], [math.nan, math.inf]], requires_grad=True)
    output = combine(rows, torch.tensor([4, 1, 4]), weights)
    assert output.tolist() == [[6.0], [0.0]]
    output.sum().backward()
    assert rows.grad.tolist() == [[0.0], [2.0], [0.0]]
    assert weights.grad.tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_a_token_that_is_not_finite_stays_alone():
    x, weights, ids = routed(6, 2, 3)
    x[2] = math.nan
    rows, _, slots = dispatch(x, ids.clamp(0, 2), 3)
    finite = combine(rows, slots, weights).isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_where_nothing_is_routed_gradients_are_zero():
    x, weights, ids = (t.requires_grad_(t.is_floating_point()) for t in routed(4, 2, 3))
    rows, counts, slots = dispatch(x, torch.full_like(ids, -1), 3)
    output = combine(rows, slots, weights)
    assert (rows.shape, counts.tolist(), output.abs().sum()) == ((0, 3), [0, 0, 0], 0)
    output.sum().backward()
    assert x.grad.abs().sum() == weights.grad.abs().sum() == 0


def test_gradients_of_dispatch_and_combine():
    x, weights, ids = routed(5, 3, 4)
    x.requires_grad_()
    weights.requires_grad_()

    def there_and_back(x, weights):
        rows, _, slots = dispatch(x, ids, 4)
        return combine(rows.sin(), slots, weights)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


def test_any_strides_are_right():
    x, weights, ids = routed(10, 4, 5, hidden=6)
    x, weights, ids = x.T.contiguous().T[::2, ::3], weights[::2, ::2], ids[::2, 1::2]
    plain = dispatch(x.contiguous(), ids.contiguous(), 5)
    for one, other in zip(dispatch(x, ids, 5), plain, strict=True):
        assert torch.equal(one, other)
    rows, _, slots = plain
    wide_rows = torch.stack([rows, rows], 2)[..., 0]
    assert torch.equal(
        combine(wide_rows, slots, weights), combine(rows, slots, weights.contiguous())
    )


def test_counts_offsets_and_inverse():
    ids = torch.tensor([[0, 2, 2], [7, -1, 0]], dtype=torch.int32)
    counts = count_tokens(ids, 4)
    assert counts.tolist() == [2, 0, 2, 0]
    offsets = inclusive_offsets(counts)
    assert (offsets.tolist(), offsets.dtype) == ([2, 2, 4, 4], torch.int32)
    permutation = torch.randperm(50)
    assert torch.equal(permutation[inverse_permutation(permutation)], torch.arange(50))
    assert inverse_permutation(torch.arange(0)).tolist() == []


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_batching_puts_each_experts_rows_first(num_experts):
    x, _, ids = routed(12, 2, num_experts)
    rows, counts, _ = dispatch(x, ids, num_experts)
    capacity = int(counts.max()) + 1
    batched = batch_rows(rows, counts, capacity)
    expected = torch.zeros(num_experts, capacity, 3, dtype=torch.float64)
    for expert in range(num_experts):
        chosen = x.repeat_interleave(2, 0)[ids.flatten() == expert]
        expected[expert, : len(chosen)] = chosen
    assert torch.equal(batched, expected)
    poisoned = batched.masked_fill(~rows_in_use(counts, capacity)[..., None], math.nan)
    assert torch.equal(unbatch_rows(poisoned, counts.int()), rows)


def test_gradients_of_batching():
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1, 0, 3])
    assert torch.autograd.gradcheck(lambda rows: batch_rows(rows, counts, 3).sin(), rows)
    batched = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: unbatch_rows(rows, counts).sin(), batched)


def kept_by_hand(weights, ids, num_experts, capacity, policy):
    """The slots that stay, from Python's sort with the policy's key."""
    top_k = ids.shape[1]
    keys = {
        "position": lambda slot: slot,
        "first_choice": lambda slot: (slot % top_k, slot // top_k),
        "probs": lambda slot: (-weights.flatten()[slot].item(), slot),
    }
    flat = ids.flatten().tolist()
    kept = set()
    for expert in range(num_experts):
        slots = sorted((s for s, e in enumerate(flat) if e == expert), key=keys[policy])
        kept.update(slots[:capacity])
    return kept


@pytest.mark.parametrize("policy", ["position", "first_choice", "probs"])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_dropping_keeps_the_first_by_each_policy(policy, num_experts):
    for tokens, top_k, capacity in [(0, 2, 1), (9, 2, 3), (20, min(3, num_experts), 0), (6, 1, 99)]:
        _, weights, ids = routed(tokens, top_k, num_experts, seed=tokens)
        weights = (weights * 4).round() / 4
        new_weights, new_ids = drop_to_capacity(
            weights.float(), ids.int(), num_experts, capacity, policy
        )
        kept = kept_by_hand(weights, ids, num_experts, capacity, policy)
        for slot in range(ids.numel()):
            old = (weights.flatten()[slot].item(), ids.flatten()[slot].item())
            new = (new_weights.flatten()[slot].item(), new_ids.flatten()[slot].item())
            assert new == (old if slot in kept else (0.0, -1))
        assert (new_weights.dtype, new_ids.dtype) == (torch.float32, torch.int32)


def test_ties_in_weight_go_to_the_lowest_token_and_nan_comes_last():
    ids = torch.zeros(4, 1, dtype=torch.int64)
    weights = torch.tensor([[math.nan], [0.5], [0.5], [0.1]])
    assert drop_to_capacity(weights, ids, 1, 1, "probs")[1].flatten().tolist() == [-1, 0, -1, -1]
    ties, many = torch.full((5000, 1), 0.5), torch.zeros(5000, 1, dtype=torch.int64)
    kept = drop_to_capacity(ties, many, 1, 2500, "probs")[1].flatten() == 0
    assert torch.equal(kept, torch.arange(5000) < 2500)
    kept, _ = drop_to_capacity(weights, ids, 1, 3, "probs")
    assert kept.flatten().tolist() == pytest.approx([0.0, 0.5, 0.5, 0.1])


def test_dropped_weights_have_no_gradient_and_nothing_is_changed_in_place():
    ids = torch.tensor([[0, 5], [0, 1]])
    weights = torch.tensor([[0.5, math.nan], [0.25, 0.75]], requires_grad=True)
    dropped, new_ids = drop_to_capacity(weights, ids, 2, 1)
    dropped.sum().backward()
    assert weights.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (dropped.tolist(), new_ids.tolist()) == ([[0.5, 0.0], [0.0, 0.75]], [[0, -1], [-1, 1]])
    assert ids.tolist() == [[0, 5], [0, 1]]
    assert drop_to_capacity(weights, ids, 6, 9)[1].data_ptr() != ids.data_ptr()


def test_capacity_is_the_exact_ceiling_within_its_limits():
    assert expert_capacity(64, 2, 8, 1.0) == 16
    assert expert_capacity(64, 2, 8, 1.25) == 20
    assert expert_capacity(7, 2, 3, 1.0) == 5
    assert expert_capacity(1000, 1, 10, 1.1) == 110 != math.ceil(1000 / 10 * 1.1)
    assert expert_capacity(4, 2, 2, 10.0) == 4
    assert expert_capacity(64, 1, 64, 1.0, minimum=4) == 4
    assert expert_capacity(3, 1, 64, 1.0, minimum=4) == 3
    assert expert_capacity(0, 2, 8, 1.0) == 0


X, IDS = torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64)
WEIGHTS, COUNTS = torch.zeros(2, 2), torch.tensor([1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dispatch(X[0], IDS, 2), ValueError, r"x: expected shape \[T, H\]"),
        (lambda: dispatch(X.int(), IDS, 2), TypeError, "x: expected dtype"),
        (lambda: dispatch(X, IDS[:1], 2), ValueError, r"expert_ids: expected shape \[2, K\]"),
        (lambda: dispatch(X, IDS.float(), 2), TypeError, "expert_ids: expected dtype"),
        (lambda: dispatch(X, IDS, -1), ValueError, "num_experts: expected at least 0"),
        (lambda: combine(X, IDS, WEIGHTS), ValueError, r"slots: expected shape \[2\]"),
        (lambda: combine(X, COUNTS + 4, WEIGHTS), ValueError, "slots: expected slots from 0 to 4"),
        (lambda: combine(X, COUNTS - 2, WEIGHTS), ValueError, "slots: expected slots from 0 to 4"),
        (lambda: combine(X, COUNTS, IDS), TypeError, "weights: expected dtype"),
        (lambda: inclusive_offsets(COUNTS * 2**31), ValueError, r"at most 2\^31 - 1 rows"),
        (lambda: inverse_permutation(X), TypeError, "permutation: expected dtype"),
        (lambda: batch_rows(X, COUNTS, 0), ValueError, "expected counts from 0 to 0, got 1"),
        (lambda: batch_rows(X, COUNTS * 2, 2), ValueError, "expected a sum of 2, got 4"),
        (lambda: unbatch_rows(X, COUNTS), ValueError, r"rows: expected shape \[E, C, H\]"),
        (lambda: unbatch_rows(X[None], COUNTS), ValueError, "tokens_per_expert: expected shape"),
        (lambda: drop_to_capacity(WEIGHTS, IDS, 2, -1), ValueError, "capacity: expected at least"),
        (lambda: drop_to_capacity(WEIGHTS, IDS, 2, 1, "prob"), ValueError, "policy: expected one"),
        (
            lambda: drop_to_capacity(WEIGHTS, IDS[:1], 2, 1),
            ValueError,
            "expert_ids: expected shape",
        ),
        (lambda: expert_capacity(1, 1, 0, 1.0), ValueError, "num_experts: expected at least 1"),
        (lambda: expert_capacity(1, 1, 1, math.inf), ValueError, "factor: expected a finite"),
        (lambda: expert_capacity(1, 1, 1, -1.0), ValueError, "factor: expected a finite"),
        (lambda: expert_capacity(-1, 1, 1, 1.0), ValueError, "num_tokens: expected at least 0"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
