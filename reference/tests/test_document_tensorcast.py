"""What is wrong, missing or undefined in TensorCast's MoE layer, each on a few lines of its own.

Each test plants one mistake, asserts what it gives, and asserts that the reference does otherwise.
"""

import copy

import pytest
import torch
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig
from moe_reference.dispatch import combine, count_tokens, dispatch
from moe_reference.expert_slicing import assign_experts, slice_experts, take_tensors
from moe_reference.experts import experts
from moe_reference.gates import read_gate
from moe_reference.gating import route
from moe_reference.modules import Experts
from moe_reference.placement import (
    add_shared_column,
    assign_external_shared,
    physical_ids,
    place_experts,
)
from moe_reference.wrapping import experts_of_modules
from torch import nn

LINEAR = ExpertsConfig("relu", gated=False)


def exchange(sent):
    """An all-to-all in one process: what rank s sent to rank r stands at [r][s] afterwards."""
    return [list(column) for column in zip(*sent, strict=True)]


def multiplying_experts(num_experts):
    """Expert e multiplies a positive row by e + 1, so that the output tells who computed it."""
    factors = torch.arange(1.0, num_experts + 1).view(num_experts, 1, 1)
    return ExpertWeights(gate_up=torch.ones(num_experts, 1, 1), down=factors)


# Split sizes


def split_sizes_if_load_were_uniform(num_slots, num_experts):
    """Counts that a cost model would guess: equal shares, the first experts get the rest."""
    share, rest = divmod(num_slots, num_experts)
    return [share + (e < rest) for e in range(num_experts)]


def test_uniform_split_sizes_give_rows_to_the_wrong_experts():
    ids = torch.tensor([[0, 1], [0, 2], [0, 1]])
    rows, tokens_per_expert, slots = dispatch(torch.ones(3, 1), ids, 4)
    guessed = split_sizes_if_load_were_uniform(ids.numel(), 4)
    assert (tokens_per_expert.tolist(), guessed) == ([3, 2, 1, 0], [2, 2, 1, 1])

    chunks = [rows[:, 0] * factor for factor in (1.0, 2.0, 3.0, 4.0)]
    by_guess = [chunk[s] for chunk, s in zip(chunks, blocks(guessed), strict=True)]
    wrong = combine(torch.cat(by_guess)[:, None], slots, torch.ones(3, 2))
    right = experts(torch.ones(3, 1), multiplying_experts(4), torch.ones(3, 2), ids, LINEAR)
    assert wrong.flatten().tolist() == [3.0, 5.0, 5.0]
    assert right.flatten().tolist() == [3.0, 4.0, 3.0]


def blocks(sizes):
    """Consecutive slices of the given sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def test_uniform_split_sizes_do_not_meet_with_unequal_tokens():
    # Rank 0 has 6 slots, rank 1 has 2; two experts on each rank.
    sent = [
        [sum(guessed[:2]), sum(guessed[2:])]
        for guessed in (split_sizes_if_load_were_uniform(slots, 4) for slots in (6, 2))
    ]
    expected = [[row[rank]] * 2 for rank, row in enumerate(sent)]
    assert sent == [[4, 2], [2, 0]]
    assert expected == [[4, 4], [0, 0]]
    assert exchange(sent) == [[4, 2], [2, 0]] != expected

    # What is received is known when the true counts have been exchanged, whatever they are.
    ids = [torch.tensor([[0, 1], [0, 2], [0, 1]]), torch.tensor([[3, 2]])]
    counts = [count_tokens(each, 4).view(2, 2) for each in ids]
    received = exchange([list(each) for each in counts])
    assert [[part.tolist() for part in rank] for rank in received] == [
        [[3, 2], [0, 0]],
        [[1, 0], [1, 1]],
    ]


def test_split_sizes_never_depend_on_the_ids():
    for ids in ([[0, 1], [0, 1]], [[2, 3], [2, 3]]):
        assert split_sizes_if_load_were_uniform(4, 4) == [1, 1, 1, 1]
        assert dispatch(torch.ones(2, 1), torch.tensor(ids), 4)[1].tolist() != [1, 1, 1, 1]


# Redundant experts


def copies_of_the_first_expert(num_experts, num_redundant):
    """Which expert each physical expert is a copy of, when the first one is copied blindly."""
    return list(range(num_experts)) + [0] * num_redundant


def test_redundant_experts_carry_no_load():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator) + torch.tensor([0.0, 0.0, 4.0, 0.0])
    _, ids = route(logits, RoutingConfig(top_k=1))
    load = count_tokens(ids, 4)
    assert load.argmax() == 2

    physical = copies_of_the_first_expert(4, 2)
    assert physical == [0, 1, 2, 3, 0, 0]
    # The router has four logits, so that the ids of the copies never come up.
    assert count_tokens(ids, 6)[4:].tolist() == [0, 0]
    # Shared out with the others, the copies even take a whole rank of three.
    start, count = assign_experts(6, 3, 2)
    assert physical[start : start + count] == [0, 0]

    placement = place_experts(load, num_physical=6, num_ranks=3)
    loads = count_tokens(physical_ids(ids, placement), 6)
    assert placement.replica_count[2] == 3
    # Expert 2 is busy, and each of its copies gets a third of it.
    assert (loads > load[2] / 3 - 1).sum() == 3
    assert loads.max() <= load[2] / 3 + 1


def test_redundant_experts_cannot_be_appended_to_stacked_weights():
    stacked = Experts(multiplying_experts(4))
    with pytest.raises(AttributeError, match="append"):
        stacked.append(copy.deepcopy(stacked))


# Gates


def top_of_raw_logits(logits, top_k):
    """Weights as the largest logits themselves: no score function, no normalisation."""
    return torch.topk(logits, top_k, dim=-1)


def test_weights_are_raw_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0], [-1.0, -2.0, -3.0]])
    weights, ids = top_of_raw_logits(logits, 2)
    assert weights.tolist() == [[2.0, 1.0], [-1.0, -2.0]]

    config = RoutingConfig(top_k=2, renormalize=True)
    read = read_gate(logits, "logits", config)
    assert read.expert_ids.tolist() == ids.tolist()
    expected = torch.tensor([0.7311, 0.2689])  # sigmoid(1) and sigmoid(-1), to four digits
    torch.testing.assert_close(read.weights, expected.expand(2, 2), atol=5e-5, rtol=0)
    # With negative logits the better expert even gets the smaller weight, and all change sign.
    assert (weights[1] < 0).all()
    assert weights[1, 0].abs() < weights[1, 1].abs()


def gate_output_by_length(output):
    """Ids and weights, where what stands where is concluded from how many values there are."""
    if len(output) == 3:
        return output[2], output[1]
    return output[0], output[1]


@pytest.mark.parametrize("loss", [None, torch.tensor(0.1)])
def test_three_values_are_taken_for_logits_weights_ids(loss):
    ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.3]])
    assert gate_output_by_length((ids, weights, loss))[0] is loss
    read = read_gate((ids, weights, loss), "ids_weights_loss")
    assert read.expert_ids.tolist() == [[2, 0]]
    assert read.balance_loss is loss


def test_two_values_are_taken_for_ids_weights():
    weights, ids = torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]])
    taken_ids, taken_weights = gate_output_by_length((weights, ids))
    assert taken_ids is weights
    assert taken_weights is ids
    assert read_gate((weights, ids), "weights_ids").expert_ids.tolist() == [[2, 0]]
    with pytest.raises(TypeError, match="weights"):
        read_gate((weights, ids), "ids_weights")


def test_dense_scores_and_logits_are_taken_for_ids_weights():
    # As the Llama 4 router of transformers returns them: a score for every expert, and the logits.
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    dense = torch.tensor([[0.8808, 0.0, 0.0]])
    taken_ids, _ = gate_output_by_length((dense, logits))
    assert taken_ids.dtype == torch.float32
    assert taken_ids.shape == (1, 3)
    read = read_gate(logits, "logits", RoutingConfig.preset("llama-4"))
    assert read.expert_ids.tolist() == [[0]]
    assert read.weights.item() == pytest.approx(0.8808, abs=5e-5)  # four digits are written above


def test_more_values_than_known_are_not_noticed():
    ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.3]])
    assert gate_output_by_length((ids, weights, None, None))[0] is ids
    with pytest.raises(ValueError, match="4"):
        read_gate((ids, weights, None, None), "ids_weights")


def normalised_in_place(weights):
    """The division writes into what the gate's operator returned."""
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights


def test_the_gates_output_is_overwritten():
    kept = torch.tensor([[0.5, 0.25]])
    normalised_in_place(kept)
    assert kept.sum() == 1.0
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    before = logits.clone()
    read_gate(logits, "logits", RoutingConfig(top_k=2, renormalize=True))
    assert torch.equal(logits, before)


def test_one_normalised_expert_leaves_the_router_without_a_gradient():
    logits = torch.tensor([[2.0, 1.0]], requires_grad=True)
    chosen = torch.softmax(logits, dim=-1).topk(1).values
    (chosen / chosen.sum(dim=-1, keepdim=True)).sum().backward()
    # The two terms of the quotient's derivative cancel; what is left is rounding.
    assert logits.grad.abs().max() < 1e-6

    again = logits.detach().requires_grad_()
    config = RoutingConfig(top_k=1, renormalize=True, renormalize_single=False)
    route(again, config)[0].sum().backward()
    assert again.grad.abs().max() > 0.1


# Dtypes


def weighted_sum_in_the_dtype_of_x(pairs, weights):
    """Weights are rounded to x's dtype, then each product is, then the sum."""
    return (pairs * weights.to(pairs.dtype)[..., None]).sum(dim=-2)


def test_the_weighted_sum_is_rounded_three_times():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(512, 8, 16, generator=generator).bfloat16()
    weights = torch.rand(512, 8, generator=generator).softmax(dim=-1)
    rounded = weights.bfloat16()
    assert (rounded.float().sum(dim=-1) - 1.0).abs().max() > 1e-3

    exact = (pairs.double() * weights.double()[..., None]).sum(dim=1)
    wrong = (weighted_sum_in_the_dtype_of_x(pairs, weights).double() - exact).abs()
    slots = torch.arange(512 * 8)
    right = (combine(pairs.flatten(0, 1), slots, weights).double() - exact).abs()
    # Rounded once the error is at most half a step of bfloat16: 2^-8 of the value, and for sums of
    # terms that cancel a float32 error of 8 terms beside it.
    terms = (pairs.double() * weights.double()[..., None]).abs().sum(dim=1)
    bound = exact.abs() * 2**-8 + terms * 2**-20
    assert (right <= bound).all()
    assert (wrong > bound).float().mean() > 0.2


def test_the_dtype_of_the_sum_depends_on_the_shared_column():
    pairs = torch.ones(1, 3, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[0.75, 0.25]], dtype=torch.bfloat16)
    column = torch.ones(1, 1)
    with_column = torch.cat([weights, column], dim=-1)
    assert (pairs[:, :2] * weights[..., None]).dtype == torch.bfloat16
    assert (pairs * with_column[..., None]).dtype == torch.float32
    ids = torch.tensor([[0, 1]])
    assert add_shared_column(weights, ids, 2, 1)[0].dtype == torch.bfloat16


# External shared experts


def ids_with_an_uninitialised_column(ids, memory):
    """A further column as `torch.empty` makes it: floats, here with the given memory in them."""
    return torch.cat([ids, torch.full((len(ids), 1), memory)], dim=-1)


def test_the_shared_column_turns_ids_into_floats():
    ids = torch.tensor([[1, 0], [0, 1]])
    assert torch.cat([ids, torch.empty(2, 1)], dim=-1).dtype == torch.float32
    weights, with_column = add_shared_column(torch.ones(2, 2), ids, 2, 1)
    assert with_column.dtype == torch.int64
    assert with_column.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert weights[:, 2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("memory", [7.8e-44, 0.5, 3.0e38])
def test_the_shared_column_is_sorted_by_what_was_in_memory(memory):
    ids = torch.tensor([[1, 0], [0, 1]])
    order = ids_with_an_uninitialised_column(ids, memory).flatten().argsort(stable=True)
    # The first ranks hold the shared expert, so that the first T rows have to be slots 2 and 5.
    assert sorted(order[:2].tolist()) != [2, 5]

    # Here the shared expert is the last one and its rows come last, by its id and not by luck.
    _, with_column = add_shared_column(torch.ones(2, 2), ids, 2, 1)
    assert dispatch(torch.ones(2, 1), with_column, 3)[2][-2:].tolist() == [2, 5]


def test_no_rank_is_left_for_routed_experts():
    with pytest.raises(ZeroDivisionError):
        share_of_a_rank(8, 0, 0)
    with pytest.raises(ValueError, match="num_shared_ranks"):
        assign_external_shared(8, 2, 2, 0)
    with pytest.raises(ValueError, match="world_size"):
        assign_experts(8, 0, 0)


# Expert shares


def share_of_a_rank(num_experts, world_size, rank):
    """The contiguous share, with no look at whether there is such a rank."""
    share, rest = divmod(num_experts, world_size)
    return rank * share + min(rank, rest), share + (rank < rest)


def test_a_rank_below_zero_gets_a_share():
    # Rank 0 of 4 where one rank is set aside for shared experts, and has routed ones all the same.
    start, count = share_of_a_rank(8, 3, 0 - 1)
    assert (start, count) == (-3, 3)
    assert list(range(8))[start : start + count] == []
    with pytest.raises(ValueError, match="rank"):
        assign_experts(8, 3, -1)


def test_a_rank_without_experts_has_nothing_to_concatenate():
    start, count = assign_experts(2, 3, 2)
    assert (start, count) == (2, 0)
    # Which error it is depends on the version of PyTorch.
    with pytest.raises((RuntimeError, ValueError), match="non-empty"):
        torch.cat([torch.ones(1, 1) for _ in range(count)], dim=0)

    mine = slice_experts(multiplying_experts(2), start, count)
    y = experts(torch.ones(3, 1), mine, torch.ones(3, 1), torch.full((3, 1), -1), LINEAR)
    assert y.tolist() == [[0.0], [0.0], [0.0]]


def slice_without_biases(whole, start, count):
    """Only the two matrices are cut; the biases of all experts stay."""
    here = slice(start, start + count)
    return ExpertWeights(whole.gate_up[here], whole.down[here], down_bias=whole.down_bias)


def test_slices_keep_the_biases_of_other_experts():
    whole = ExpertWeights(
        torch.ones(4, 1, 1), torch.zeros(4, 1, 1), down_bias=torch.arange(4.0).view(4, 1)
    )
    x, ones, local = torch.ones(2, 1), torch.ones(2, 1), torch.tensor([[0], [1]])
    # Experts 2 and 3 are local 0 and 1, and would add the biases of experts 0 and 1.
    sliced = slice_without_biases(whole, 2, 2)
    assert sliced.down_bias[local[:, 0], 0].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="down_bias"):
        experts(x, sliced, ones, local, LINEAR)
    with pytest.raises(ValueError, match="scales"):
        take_tensors({"packed": torch.ones(4, 1), "scales": torch.ones(2)}, 4, [2, 3])

    mine = slice_experts(whole, 2, 2)
    assert experts(x, mine, ones, local, LINEAR).flatten().tolist() == [2.0, 3.0]


def slice_as_a_view(tensor, start, count):
    """A slice of the data keeps the memory of the whole tensor."""
    return nn.Parameter(tensor.data[start : start + count])


def test_a_slice_keeps_the_memory_of_all_experts():
    whole = nn.Parameter(torch.ones(8, 4, 4), requires_grad=False)
    mine = slice_as_a_view(whole, 0, 2)
    assert mine.untyped_storage().nbytes() == whole.untyped_storage().nbytes()
    # A new parameter asks for a gradient, also where the old one was frozen.
    assert mine.requires_grad

    cut = take_tensors({"gate_up": whole}, 8, [0, 1])["gate_up"]
    assert cut.untyped_storage().nbytes() * 4 == whole.untyped_storage().nbytes()
    assert not cut.requires_grad


# Calling experts


def weigh_what_is_weighed_already(x, weights, expert_ids, whole, config):
    """Each expert's call runs the module of all of them, and the sum is weighed once more."""
    calls = [experts(x, whole, weights, expert_ids, config) for _ in whole.down]
    return calls[0] * weights, len(calls)


def test_stacked_experts_are_weighed_twice():
    # One expert and one expert per token: the only case in which the shapes allow the call.
    x, weights, ids = torch.ones(2, 1), torch.tensor([[0.5], [0.25]]), torch.zeros(2, 1).long()
    wrong, _ = weigh_what_is_weighed_already(x, weights, ids, multiplying_experts(1), LINEAR)
    assert wrong.flatten().tolist() == [0.25, 0.0625]
    right = experts(x, multiplying_experts(1), weights, ids, LINEAR)
    assert right.flatten().tolist() == [0.5, 0.25]


def test_stacked_experts_are_run_once_for_each_of_them():
    x, weights, ids = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1).long()
    assert weigh_what_is_weighed_already(x, weights, ids, multiplying_experts(4), LINEAR)[1] == 4


def test_stacked_experts_get_one_experts_rows_with_all_tokens_choices():
    x, weights = torch.ones(3, 1), torch.ones(3, 2)
    ids = torch.tensor([[0, 1], [0, 2], [0, 1]])
    rows, tokens_per_expert, _ = dispatch(x, ids, 3)
    of_expert_1 = rows.split(tokens_per_expert.tolist())[1]
    assert (len(of_expert_1), len(ids)) == (2, 3)
    with pytest.raises(ValueError, match="weights"):
        experts(of_expert_1, multiplying_experts(3), weights, ids, LINEAR)


def call_unless_empty(module, x):
    """An expert without a token is not called; its input is taken for its output."""
    return x if x.numel() == 0 else module(x)


def test_an_idle_experts_gradients_are_none():
    x, weights, ids = torch.ones(1, 2), torch.ones(1, 1), torch.zeros(1, 1).long()
    modules = [nn.Linear(2, 2, bias=False) for _ in range(2)]
    outputs = [call_unless_empty(m, x[:n]) for m, n in zip(modules, (1, 0), strict=True)]
    torch.cat(outputs).sum().backward()
    assert modules[1].weight.grad is None

    experts_of_modules(x, modules, weights, ids, ExpertsConfig()).sum().backward()
    assert modules[1].weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def split_into_the_callers_list(rows_per_expert, sizes):
    """Going back to the order of the ranks, each entry of the argument is replaced."""
    for i, rows in enumerate(rows_per_expert):
        rows_per_expert[i] = rows.split(sizes[i])
    return torch.cat([part for parts in zip(*rows_per_expert, strict=True) for part in parts])


def test_the_list_of_the_experts_outputs_is_overwritten():
    outputs = [torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])]
    by_rank = split_into_the_callers_list(outputs, [[1, 1], [1, 1]])
    assert by_rank.flatten().tolist() == [0.0, 2.0, 1.0, 3.0]
    assert all(isinstance(each, tuple) for each in outputs)


# Transforms around the layer


def share_of_tokens(rows, world_size, rank):
    """Padded to a multiple of the ranks, and cut."""
    padding = torch.zeros(-len(rows) % world_size, *rows.shape[1:], dtype=rows.dtype)
    return torch.cat([rows, padding]).chunk(world_size)[rank]


def test_logits_of_a_slice_are_sliced_again():
    hidden = torch.arange(8.0).view(8, 1)
    mine = share_of_tokens(hidden, 2, 1)
    twice = share_of_tokens(mine, 2, 1)
    assert (len(mine), len(twice)) == (4, 2)
    # Padded to the length of the tokens the choice would belong to others.
    assert twice.flatten().tolist() == [6.0, 7.0]
    assert mine[:2].flatten().tolist() == [4.0, 5.0]


def test_a_choice_for_all_tokens_meets_a_slice_of_them():
    hidden, ids = torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int64)
    mine = share_of_tokens(hidden, 2, 1)
    with pytest.raises(ValueError, match="weights"):
        experts(mine, multiplying_experts(1), torch.ones(8, 1), ids, LINEAR)


def test_token_ids_are_not_sliced_with_the_tokens():
    token_ids = torch.arange(8)
    table = torch.arange(8).view(8, 1)
    mine = share_of_tokens(torch.zeros(8, 8), 2, 1)
    config = RoutingConfig(top_k=1, hash_table=table)
    # Cut to fit from the front, rank 1 would look up the experts of rank 0's tokens.
    wrong = route(mine, config, token_ids=token_ids[: len(mine)])[1]
    right = route(mine, config, token_ids=share_of_tokens(token_ids, 2, 1))[1]
    assert (wrong.flatten().tolist(), right.flatten().tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    with pytest.raises(ValueError, match="token_ids"):
        route(mine, config, token_ids=token_ids)


def test_padding_is_routed_and_loads_experts():
    logits = torch.tensor([[0.0, 0.0, 0.0, 5.0]]).expand(5, 4)
    padded = torch.cat([share_of_tokens(logits, 4, rank) for rank in range(4)])
    _, ids = route(padded, RoutingConfig(top_k=1))
    # Three rows of zeros are a tie, which makes expert 0 the busiest but one.
    assert count_tokens(ids, 4).tolist() == [3, 0, 0, 5]
    real = torch.arange(8)[:, None] < 5
    assert count_tokens(ids.where(real, -1), 4).tolist() == [0, 0, 0, 5]


def test_gathered_tokens_are_shared_out_as_if_ranks_had_equally_many():
    ranks = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0])]
    gathered = torch.cat(ranks)
    back = [part.tolist() for part in gathered.chunk(2)]
    assert back == [[0.0, 1.0], [2.0, 3.0]]
    assert [part.tolist() for part in gathered.split([3, 1])] == [[0.0, 1.0, 2.0], [3.0]]
