"""What is wrong, missing or undefined in DeepSeek's MoE forward, each on a few lines of its own.

Each test plants one mistake, asserts what it gives, and asserts that the reference does otherwise.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.dispatch import combine, count_tokens, dispatch, inverse_permutation
from moe_reference.expert_slicing import assign_experts, make_expert_map, slice_experts
from moe_reference.experts import experts, init_experts
from moe_reference.gates import read_gate
from moe_reference.layer import layer, moe_infer, shared_expert
from moe_reference.loss_graph import inject_loss, inject_scaled_loss
from moe_reference.wrapping import experts_of_modules
from torch import nn

LINEAR = ExpertsConfig("relu", gated=False)


def multiplying_experts(num_experts):
    """Expert e multiplies a positive row by e + 1, so that the output tells who computed it."""
    factors = torch.arange(1.0, num_experts + 1).view(num_experts, 1, 1)
    return ExpertWeights(gate_up=torch.ones(num_experts, 1, 1), down=factors)


# Expert parallelism: the way there, and no way back


def send_and_compute(x_R, ids_R, num_experts):
    """All rows at the owners of their experts: [(expert, source rank, rows times expert + 1)].

    What an owner holds stands by expert and then by the rank that sent it. An all-to-all in one
    process is an exchange of lists.
    """
    num_ranks = len(x_R)
    slots_R, computed_R = [], [[] for _ in range(num_ranks)]
    dispatched_R = [dispatch(x, ids, num_experts) for x, ids in zip(x_R, ids_R, strict=True)]
    for _, _, slots in dispatched_R:
        slots_R.append(slots)
    chunks_R = [rows.split(counts.tolist()) for rows, counts, _ in dispatched_R]
    for owner in range(num_ranks):
        start, count = assign_experts(num_experts, num_ranks, owner)
        for e in range(start, start + count):
            for source in range(num_ranks):
                computed_R[owner].append((e, source, chunks_R[source][e] * (e + 1)))
    return computed_R, slots_R


def rows_that_are_here(computed_R, rank):
    """What stands on a rank after its experts have run, which is for the most part not its own."""
    return torch.cat([rows for _, _, rows in computed_R[rank]])


def rows_that_came_back(computed_R, rank):
    """A rank's own rows, sent back by the owners: in the order of dispatch again."""
    own = [each for computed in computed_R for each in computed if each[1] == rank]
    return torch.cat([rows for _, _, rows in sorted(own, key=lambda each: each[0])])


def put_at_slots(rows, slots, weights):
    """The weighted sum, on memory as large as the rows that there are."""
    pairs = torch.empty_like(rows).index_put((slots,), rows)
    return (pairs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


BALANCED = [[[0, 2], [1, 3], [0, 3]], [[0, 2], [1, 2], [1, 3]]]
SKEWED = [[[0, 1], [0, 1], [0, 2]], [[0, 1], [1, 0], [3, 2]]]
ONE_RANK_IDLE = [[[0, 1], [0, 1], [1, 0]], [[0, 1], [1, 0], [0, 1]]]


def two_ranks(ids_R):
    x_R = [torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[8.0], [16.0], [32.0]])]
    ids_R = [torch.tensor(ids) for ids in ids_R]
    weights = torch.ones(3, 2)
    expected_R = [
        experts(x, multiplying_experts(4), weights, ids, LINEAR)
        for x, ids in zip(x_R, ids_R, strict=True)
    ]
    return *send_and_compute(x_R, ids_R, 4), weights, expected_R


def test_rows_that_are_not_sent_back_are_taken_for_ones_own():
    computed_R, slots_R, weights, expected_R = two_ranks(BALANCED)
    wrong_R = [
        put_at_slots(rows_that_are_here(computed_R, rank), slots_R[rank], weights)
        for rank in range(2)
    ]
    # As many rows as each rank sent, so that nothing is noticed.
    assert wrong_R[0].flatten().tolist() == [5.0, 40.0, 68.0]
    assert expected_R[0].flatten().tolist() == [4.0, 12.0, 20.0]
    assert wrong_R[1].flatten().tolist() == [11.0, 40.0, 176.0]
    assert expected_R[1].flatten().tolist() == [32.0, 80.0, 192.0]


def test_rows_that_are_not_sent_back_do_not_fit_where_load_is_uneven():
    computed_R, slots_R, weights, _ = two_ranks(SKEWED)
    here_R = [rows_that_are_here(computed_R, rank) for rank in range(2)]
    # Each rank sent 6 rows. Their shape is what the way back would need, and nothing else does.
    assert [(len(here), len(slots)) for here, slots in zip(here_R, slots_R, strict=True)] == [
        (9, 6),
        (3, 6),
    ]
    for rank in range(2):
        with pytest.raises((RuntimeError, IndexError), match=r"shape mismatch|out of"):
            put_at_slots(here_R[rank], slots_R[rank], weights)


def test_an_idle_rank_has_nothing_to_put_back():
    computed_R, slots_R, weights, expected_R = two_ranks(ONE_RANK_IDLE)
    assert len(rows_that_are_here(computed_R, 1)) == 0
    with pytest.raises((RuntimeError, IndexError)):
        put_at_slots(torch.empty(0), slots_R[1], weights)
    came_back = rows_that_came_back(computed_R, 1)
    assert torch.equal(combine(came_back, slots_R[1], weights), expected_R[1])


@pytest.mark.parametrize("ids_R", [BALANCED, SKEWED, ONE_RANK_IDLE])
def test_rows_that_are_sent_back_are_the_right_ones(ids_R):
    computed_R, slots_R, weights, expected_R = two_ranks(ids_R)
    for rank in range(2):
        came_back = rows_that_came_back(computed_R, rank)
        assert torch.equal(combine(came_back, slots_R[rank], weights), expected_R[rank])


def rows_per_rank_if_shares_are_equal(tokens_per_expert, num_ranks):
    """How many rows go to each rank, where every rank has as many experts."""
    return tokens_per_expert.view(num_ranks, -1).sum(dim=1)


def test_five_experts_cannot_be_shared_by_two_ranks():
    counts = count_tokens(torch.tensor([[0, 1], [4, 2], [4, 3]]), 5)
    with pytest.raises(RuntimeError, match="invalid for input"):
        rows_per_rank_if_shares_are_equal(counts, 2)
    shares = [assign_experts(5, 2, rank) for rank in range(2)]
    assert [int(counts[start : start + count].sum()) for start, count in shares] == [3, 3]


def test_experts_of_other_ranks_are_called():
    held = [nn.Identity(), nn.Identity(), None, None]
    x, ids, weights = torch.ones(2, 1), torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2)
    # Not even chosen: a loop over all experts calls every one of them, on no rows if need be.
    with pytest.raises(TypeError, match="NoneType"):
        [expert(x[ids[:, 0] == e]) for e, expert in enumerate(held)]

    ids = torch.tensor([[0, 3], [2, 1]])
    partial = []
    for rank in range(2):
        start, count = assign_experts(4, 2, rank)
        local = slice_experts(multiplying_experts(4), start, count)
        expert_map = make_expert_map(4, range(start, start + count))
        partial.append(experts(x, local, weights, ids, LINEAR, expert_map))
    assert [part.flatten().tolist() for part in partial] == [[1.0, 2.0], [4.0, 3.0]]
    assert torch.equal(sum(partial), experts(x, multiplying_experts(4), weights, ids, LINEAR))


# Counting


def count_by_marks(ids, num_experts):
    """How many tokens marked an expert: a mark that is set twice is one mark."""
    return torch.zeros(len(ids), num_experts, dtype=ids.dtype).scatter(1, ids, 1).sum(dim=0)


def test_equal_ids_in_a_row_are_counted_once():
    ids, weights = torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0.5, 1.0], [1.0, 1.0]])
    marked = count_by_marks(ids, 3)
    assert marked.tolist() == [1, 1, 1]
    assert count_tokens(ids, 3).tolist() == [2, 1, 1]

    # Chunks of these sizes leave a row over, and those behind it go to the wrong experts.
    x, order = torch.tensor([[1.0], [2.0]]), ids.flatten().argsort(stable=True)
    rows = x[order // 2][: int(marked.sum())] * torch.tensor([[1.0], [2.0], [3.0]])
    assert rows.flatten().tolist() == [1.0, 2.0, 6.0]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        put_at_slots(rows, order, weights)

    for here in (
        moe_infer(x, ids, weights, multiplying_experts(3), LINEAR),
        experts(x, multiplying_experts(3), weights, ids, LINEAR),
    ):
        assert here.flatten().tolist() == [1.5, 10.0]


def test_distinct_ids_are_counted_right():
    ids = torch.tensor([[0, 2], [1, 2], [2, 0]])
    assert torch.equal(count_by_marks(ids, 3), count_tokens(ids, 3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_both_integer_types_are_counted(dtype):
    ids, weights = torch.tensor([[0, 1], [2, 1]], dtype=dtype), torch.ones(2, 2)
    assert count_tokens(ids, 3).tolist() == [1, 2, 1]
    here = moe_infer(torch.ones(2, 1), ids, weights, multiplying_experts(3), LINEAR)
    assert here.flatten().tolist() == [3.0, 5.0]


@pytest.mark.parametrize("nobody", [-1, 2])
def test_an_id_that_is_not_here_has_no_place_for_a_mark(nobody):
    ids, weights = torch.tensor([[0, nobody]]), torch.tensor([[1.0, float("nan")]])
    with pytest.raises(RuntimeError, match="out of bounds"):
        count_by_marks(ids, 2)
    assert moe_infer(torch.ones(1, 1), ids, weights, multiplying_experts(2), LINEAR).item() == 1.0


# No tokens


def rows_of_called_experts(chunks):
    """Only what experts were called on; nothing at all has one dimension."""
    called = [chunk for chunk in chunks if len(chunk) > 0]
    return torch.cat(called) if called else torch.empty(0)


def test_no_tokens_have_no_hidden_size():
    rows = rows_of_called_experts([torch.empty(0, 4), torch.empty(0, 4)])
    assert rows.shape == (0,)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        rows.view(0, 2, -1)
    no_ids, no_weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    weights = init_experts(3, 4, 5)
    here = moe_infer(torch.zeros(0, 4), no_ids, no_weights, weights, ExpertsConfig())
    assert here.shape == (0, 4)


def test_no_tokens_leave_a_size_to_guess_in_training_too():
    # The rows have their two dimensions here, and yet -1 may be anything.
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        torch.empty(0, 4).view(0, 2, -1)
    parameters = LayerWeights(router=torch.ones(3, 4), experts=init_experts(3, 4, 5))
    config = LayerConfig(RoutingConfig(top_k=2))
    assert layer(torch.zeros(2, 0, 4), parameters, config, training=True).output.shape == (2, 0, 4)


# The loop of the training forward


def write_rows_of_known_experts(ids, num_experts, memory):
    """What memory holds afterwards, where every expert writes the rows that are its own."""
    for e in range(num_experts):
        memory[ids == e] = 1.0
    return memory


@pytest.mark.parametrize("nobody", [-1, 3])
def test_a_row_that_nobody_writes_holds_what_was_there(nobody):
    ids = torch.tensor([[0, 1], [2, nobody]])
    garbage = torch.full((4, 1), 9.1e28)
    pairs = write_rows_of_known_experts(ids.flatten(), 3, garbage).view(2, 2, 1)
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    wrong = (pairs * weights.unsqueeze(-1)).sum(dim=1)
    assert wrong[0].item() == 1.0
    assert wrong[1].item() > 1e28

    # A weight of zero does not help where memory happens to hold no number.
    nothing = torch.full((4, 1), float("nan"))
    pairs = write_rows_of_known_experts(ids.flatten(), 3, nothing).view(2, 2, 1)
    assert (pairs[1] * torch.tensor([[0.5], [0.0]])).sum().isnan()

    one_each = ExpertWeights(gate_up=torch.ones(3, 1, 1), down=torch.ones(3, 1, 1))
    here = experts(torch.ones(2, 1), one_each, weights, ids, LINEAR)
    assert here.flatten().tolist() == [1.0, 0.5]


def test_rows_of_another_dtype_under_autocast():
    x, weight = torch.ones(3, 4), torch.ones(4, 4)
    memory = torch.empty_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        product = F.linear(x, weight)
        assert (product.dtype, memory.dtype) == (torch.bfloat16, torch.float32)
        with pytest.raises(RuntimeError, match="dtypes match"):
            memory[torch.tensor([True, False, True])] = product[:2]

    generator = torch.Generator().manual_seed(0)
    held = init_experts(3, 4, 5, generator=generator)
    x = torch.randn(6, 4, generator=generator)
    ids, weights = torch.arange(12).view(6, 2) % 3, torch.full((6, 2), 0.5)
    expected = experts(x, held, weights, ids, ExpertsConfig())
    with torch.autocast("cpu", torch.bfloat16):
        here = experts(x, held, weights, ids, ExpertsConfig())
    assert here.dtype == torch.float32
    # Autocast rounds x, weights, activation and product to bfloat16, 2^-8 each, of values below 1.
    torch.testing.assert_close(here, expected, atol=4 * 2**-8, rtol=0)


def test_a_transposed_input_cannot_be_viewed_as_rows():
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    with pytest.raises(RuntimeError, match="not compatible"):
        x.view(-1, 4)
    parameters = LayerWeights(router=torch.eye(3, 4), experts=init_experts(3, 4, 5))
    config = LayerConfig(RoutingConfig(top_k=2))
    here, contiguous = (layer(each, parameters, config).output for each in (x, x.contiguous()))
    assert torch.equal(here, contiguous)


def test_an_expert_that_is_called_on_no_rows_has_gradients():
    # What the loop does right: the gradients of an idle expert are zero and not None.
    modules = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    experts_of_modules(torch.ones(3, 1), modules, weights, ids, LINEAR).sum().backward()
    assert modules[1].weight.grad.item() == 0.0
    assert modules[0].weight.grad.item() == 3.0


def routed_part_alone(x, parameters, config):
    """A layer that forgets what sees every token."""
    return layer(x, dataclasses.replace(parameters, shared=None), config).output


def test_the_shared_expert_is_left_out():
    shared = ExpertWeights(torch.ones(1, 1, 1), torch.full((1, 1, 1), 100.0))
    parameters = LayerWeights(torch.eye(2, 1), multiplying_experts(2), shared=shared)
    config = LayerConfig(RoutingConfig(top_k=1), LINEAR)
    x = torch.tensor([[[1.0], [2.0]]])
    wrong, here = routed_part_alone(x, parameters, config), layer(x, parameters, config).output
    assert (here - wrong).flatten().tolist() == [100.0, 200.0]
    assert torch.equal((here - wrong)[0], shared_expert(x[0], parameters, config))


# The auxiliary loss


def number_of_losses(loss):
    """What an injection asks of its loss first, which it takes for a tensor."""
    return loss.numel()


def test_no_loss_is_not_a_tensor():
    # A gate has no loss in evaluation, nor with a coefficient of zero.
    with pytest.raises(AttributeError, match="numel"):
        number_of_losses(None)
    output = torch.ones(2)
    assert inject_loss(output, None) is output

    parameters = LayerWeights(torch.eye(2, 1), multiplying_experts(2))
    config = LayerConfig(RoutingConfig(top_k=1), LINEAR, BalanceConfig("deepseek_expert"))
    evaluated = layer(torch.ones(1, 2, 1), parameters, config, training=False)
    assert evaluated.balance_loss is None
    assert evaluated.output.shape == (1, 2, 1)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 1.0), (1000.0, 1e-3)])
def test_the_loss_keeps_its_weight_when_the_main_loss_is_scaled(scale, share):
    def gradients(inject):
        main, auxiliary = (torch.tensor(3.0, requires_grad=True) for _ in range(2))
        (inject(main * 1.0, auxiliary**2) * scale).backward()
        return main.grad.item() / scale, auxiliary.grad.item() / scale

    # After unscaling, the coefficient is a thousandth of what was asked for.
    assert gradients(inject_loss) == (1.0, 6.0 * share)
    assert gradients(lambda y, loss: inject_scaled_loss(y, loss, scale)) == (1.0, 6.0)


# Sorting and the weighted sum


def test_any_order_inside_an_expert_gives_the_same_sum():
    ids = torch.tensor([[0, 1], [1, 0], [0, 2]])
    x = torch.tensor([[1.0], [2.0], [4.0]])
    weights = torch.tensor([[1.0, 0.5], [0.25, 1.0], [1.0, 2.0]])
    flat = ids.flatten()
    forwards = flat.argsort(stable=True)
    # Equal ids the other way round, which a sort that is not stable may give.
    backwards = (flat.numel() - 1) - flat.flip(0).argsort(stable=True)
    assert forwards.tolist() != backwards.tolist()
    assert flat[forwards].tolist() == flat[backwards].tolist()

    sums = []
    for order in (forwards, backwards):
        rows = x[order // 2] * (flat[order, None] + 1)
        sums.append((rows[inverse_permutation(order)].view(3, 2, 1) * weights[..., None]).sum(1))
    assert torch.equal(*sums)
    assert torch.equal(sums[0], moe_infer(x, ids, weights, multiplying_experts(3), LINEAR))
    # Which order it is, is promised here: that of the slots.
    assert torch.equal(dispatch(x, ids, 3)[2], forwards)


def weigh_in_the_dtype_of_the_weights(pairs, weights):
    """The outputs take on the weights' dtype, be it the narrower one."""
    return (pairs.to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).to(pairs.dtype)


def test_outputs_are_rounded_to_the_weights():
    fine = 1 + 2**-10
    pairs, weights = torch.full((1, 1, 1), fine), torch.ones(1, 1)
    assert weigh_in_the_dtype_of_the_weights(pairs, weights).item() == fine
    assert weigh_in_the_dtype_of_the_weights(pairs, weights.bfloat16()).item() == 1.0

    one = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    x, ids = torch.full((1, 1), fine), torch.zeros(1, 1, dtype=torch.int64)
    assert moe_infer(x, ids, weights.bfloat16(), one, LINEAR).item() == fine
    # The training forward multiplies without a cast, and so disagrees with it.
    assert (pairs * weights.bfloat16().unsqueeze(-1)).item() == fine


def test_outputs_of_narrow_experts_are_weighted_in_float32():
    # What the cast is for, and does right: with float32 weights a bfloat16 sum is rounded once.
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(50, 8, 4, generator=generator).bfloat16()
    weights = torch.rand(50, 8, generator=generator)
    exact = (pairs.double() * weights.double().unsqueeze(-1)).sum(dim=1)
    once = weigh_in_the_dtype_of_the_weights(pairs, weights)
    # bfloat16 rounds by 2^-8 at most; a hundredth of that, and 1e-6, for the float32 sum before.
    torch.testing.assert_close(once.double(), exact, rtol=1.01 * 2**-8, atol=1e-6)
    slots = torch.arange(400)
    torch.testing.assert_close(
        combine(pairs.view(400, 4), slots, weights).double(), exact, rtol=1.01 * 2**-8, atol=1e-6
    )


def test_the_two_forwards_must_not_drift_apart():
    # Inference is under no_grad in the document, so that no test of gradients reaches it.
    generator = torch.Generator().manual_seed(0)
    held = init_experts(5, 4, 3, generator=generator)
    x = torch.randn(7, 4, generator=generator)
    ids = torch.randint(-1, 6, (7, 3), generator=generator)
    weights = torch.rand(7, 3, generator=generator, requires_grad=True)
    with torch.no_grad():
        assert not moe_infer(x, ids, weights, held, ExpertsConfig()).requires_grad
    trained = experts(x, held, weights, ids, ExpertsConfig())
    inferred = moe_infer(x, ids, weights, held, ExpertsConfig())
    torch.testing.assert_close(inferred, trained)  # float32 sums in another order
    for output in (trained, inferred):
        weights.grad = None
        output.sum().backward()
        assert (weights.grad[(ids < 0) | (ids >= 5)] == 0).all()
        assert weights.grad.abs().sum() > 0


def add_up_the_second_dimension(pairs, weights):
    """The sum over K, if ids and weights of all sequences stand in one list."""
    return (pairs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def test_choices_that_stand_by_sequence_are_added_over_tokens():
    # N = 1 sequence of L = 2 tokens, K = 2, H = 1.
    ids, weights = torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    pairs = torch.tensor([[1.0], [2.0], [10.0], [20.0]])
    assert add_up_the_second_dimension(pairs, weights[0]).flatten().tolist() == [1.5, 20.0]
    # Both tokens' first outputs, then their second: as many numbers, since K = L.
    assert add_up_the_second_dimension(pairs, weights).flatten().tolist() == [0.5, 21.0]

    read = read_gate((ids, weights), "ids_weights")
    assert combine(pairs, torch.arange(4), read.weights).flatten().tolist() == [1.5, 20.0]
