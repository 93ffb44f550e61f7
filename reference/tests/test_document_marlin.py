"""What is wrong, missing or undefined in vLLM's Marlin experts, each on a few lines of its own.

The kernels are CUDA and are not run: what is planted here is the arithmetic and the checks around
them. Each test plants one mistake, asserts what it gives, and asserts that the reference does
otherwise.
"""

import inspect
import re

import pytest
import torch
from moe_reference.alignment import align, align_batched, choose_block_size
from moe_reference.capacity import drop_to_capacity
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import batch_rows, combine, dispatch, unbatch_rows
from moe_reference.expert_slicing import make_expert_map, slice_experts
from moe_reference.experts import experts, experts_batched, init_experts

SILU = ExpertsConfig("silu")
LINEAR = ExpertsConfig("relu", gated=False)


def multiplying_experts(num_experts):
    """Expert e multiplies a positive row by e + 1, so that the output tells who computed it."""
    factors = torch.arange(1.0, num_experts + 1).view(num_experts, 1, 1)
    return ExpertWeights(gate_up=torch.ones(num_experts, 1, 1), down=factors)


def drawn_experts(num_experts, hidden=8, intermediate=6, bias=False):
    generator = torch.Generator().manual_seed(0)
    return init_experts(
        num_experts, hidden, intermediate, bias=bias, generator=generator, dtype=torch.float64
    )


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one_pair():
    """Weights and ids of one token with one expert."""
    return torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)


def relative_error(wrong, right):
    return ((wrong - right).norm() / right.norm()).item()


# Checks of sizes


def hidden_size_by_floor_division(packed_columns, num_bits):
    """How many columns packed weights have, whatever the remainder is."""
    return packed_columns // (num_bits // 2)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_a_remainder_of_packed_columns_is_not_noticed(num_bits):
    columns = 64 * (num_bits // 2)
    passing = [c for c in range(1, 512) if hidden_size_by_floor_division(c, num_bits) == 64]
    assert passing == list(range(columns, columns + num_bits // 2))
    assert len(passing) > 1
    wider = ExpertWeights(torch.ones(1, 4, 64), torch.ones(1, 65, 2))
    with pytest.raises(ValueError, match="down"):
        experts(torch.ones(1, 64), wider, *one_pair(), SILU)


def sizes_fit(w1_hidden, w2_hidden, hidden):
    """Both hidden sizes are compared, the intermediate ones are not."""
    return w1_hidden == w2_hidden == hidden


def test_the_intermediate_sizes_are_not_compared():
    unfit = ExpertWeights(torch.ones(1, 4, 8), torch.ones(1, 8, 3))
    assert sizes_fit(unfit.gate_up.shape[2], unfit.down.shape[1], 8)
    with pytest.raises(ValueError, match="gate_up"):
        experts(torch.ones(1, 8), unfit, *one_pair(), SILU)


def read_by_slot(weights, slots):
    """Numbers of the memory from the first one on, whatever shape and strides the tensor has."""
    numbers = torch.tensor(weights.untyped_storage().tolist(), dtype=torch.uint8)
    return numbers.view(weights.dtype)[slots]


def test_weights_of_another_shape_or_other_strides_are_read_by_slot():
    # Slots of T = 2 and K = 2; the weights are the first two columns of three.
    wide = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.4, 9.0]])
    slots = torch.arange(4)
    assert read_by_slot(wide[:, :2], slots)[2] == 9.0
    assert wide[:, :2].flatten()[2] == wide[1, 0]

    x, ids = torch.ones(2, 1), torch.tensor([[0, 1], [0, 1]])
    right = experts(x, multiplying_experts(2), wide[:, :2].contiguous(), ids, LINEAR)
    assert torch.equal(experts(x, multiplying_experts(2), wide[:, :2], ids, LINEAR), right)
    with pytest.raises(ValueError, match="expert_ids"):
        experts(x, multiplying_experts(2), wide, ids, LINEAR)


def test_weights_of_other_dtypes_are_taken_here():
    x, ids = torch.ones(1, 1), torch.tensor([[0, 1]])
    weights = torch.tensor([[0.5, 0.25]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        y = experts(x, multiplying_experts(2), weights.to(dtype), ids, LINEAR)
        assert y.item() == 1.0


# Batched format


def row_ids_without_a_bound(tokens_per_expert, capacity):
    """Rows of the flattened batch, one expert after the other, as many as the counts say."""
    return [[e * capacity + i for i in range(c)] for e, c in enumerate(tokens_per_expert)]


def test_a_count_above_the_capacity_leads_into_the_next_experts_rows():
    assert row_ids_without_a_bound([3, 1], 2) == [[0, 1, 2], [2]]
    with pytest.raises(ValueError, match="tokens_per_expert"):
        align_batched(torch.tensor([3, 1]), 2, 4)
    with pytest.raises(ValueError, match="tokens_per_expert"):
        experts_batched(torch.ones(2, 2, 1), torch.tensor([3, 1]), multiplying_experts(2), LINEAR)


def test_counts_of_64_bits_read_as_32():
    counts = torch.tensor([3, 5])
    # The order of the two halves is that of a little-endian machine.
    assert counts.view(torch.int32).tolist() == [3, 0, 5, 0]
    for dtype in (torch.int32, torch.int64):
        _, block_experts, length = align_batched(counts.to(dtype), 8, 4)
        assert (length.item(), block_experts[:3].tolist()) == (12, [0, 1, 1])


def weights_replaced_by_ones(weights):
    """The batched experts have no router weights and give the kernel ones in their place."""
    return torch.ones_like(weights)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_the_batched_experts_do_not_weigh(weight_on):
    config = ExpertsConfig("silu", weight_on=weight_on)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    x, stacked = drawn(5, 8), drawn_experts(3)
    right = experts(x, stacked, weights, ids, config)
    wrong = experts(x, stacked, weights_replaced_by_ones(weights), ids, config)
    assert relative_error(wrong, right) > 0.5

    # The caller weighs: rows on their way in, or outputs on their way back. Once.
    rows, counts, slots = dispatch(x, ids, 3)
    left = weights
    if weight_on == "input":
        rows, left = rows * weights.flatten()[slots, None], weights_replaced_by_ones(weights)
    out = experts_batched(batch_rows(rows, counts, 4), counts, stacked, config)
    y = combine(unbatch_rows(out, counts), slots, left)
    # The same float64 products, grouped otherwise.
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-14)


def only_rows_in_use_are_written(memory, counts):
    """A kernel that stops at the count leaves what was in the rest of its output."""
    written = memory.clone()
    for e, count in enumerate(counts):
        written[e, :count] = 1.0
    return written


def test_rows_past_the_count_hold_what_was_in_memory():
    memory = torch.full((2, 3, 1), torch.nan)
    assert only_rows_in_use_are_written(memory, [1, 2]).isnan().sum() == 3
    y = experts_batched(
        memory.nan_to_num(1.0), torch.tensor([1, 2]), multiplying_experts(2), LINEAR
    )
    assert y[..., 0].tolist() == [[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]]


def rows_with_a_fixed_block(counts, block_size=64):
    return sum(-(-count // block_size) * block_size for count in counts)


def test_a_fixed_block_size_pads_short_batches():
    counts = [1] * 8
    assert rows_with_a_fixed_block(counts) == 512
    chosen = choose_block_size(sum(counts) / len(counts))
    assert align_batched(torch.tensor(counts), 128, chosen)[2].item() == 64


def weights_without_the_global_scale(codes, scales, global_scale):
    """The third factor of a two-level format is not handed on."""
    return codes * scales


def test_the_batched_experts_lose_the_global_scales():
    codes = torch.tensor([0.5, 1.0, 1.5, 6.0], dtype=torch.float64)
    scales, global_scale = torch.tensor(448.0, dtype=torch.float64), 1 / 2688
    lost = weights_without_the_global_scale(codes, scales, global_scale)
    kept = codes * scales * global_scale
    torch.testing.assert_close(lost, kept * 2688, rtol=1e-15, atol=0)

    # The activation is not linear, so that no factor behind the layer makes up for it.
    right = drawn_experts(2)
    scaled = ExpertWeights(right.gate_up * 8, right.down * 8)
    x, ids = drawn(4, 8), torch.tensor([[0], [1], [0], [1]])
    wrong = experts(x, scaled, torch.ones(4, 1), ids, SILU)
    assert relative_error(wrong / 8**3, experts(x, right, torch.ones(4, 1), ids, SILU)) > 0.1


def configured_activation_left_out(config):
    """What is computed where the function with the configured constants is not handed on."""
    return ExpertsConfig(config.activation)


def test_the_batched_experts_lose_the_activations_constants():
    config = ExpertsConfig("swigluoai", alpha=1.0, limit=0.5)
    stacked, counts = drawn_experts(2), torch.tensor([4, 4])
    x = 4 * drawn(2, 4, 8)
    right = experts_batched(x, counts, stacked, config)
    wrong = experts_batched(x, counts, stacked, configured_activation_left_out(config))
    assert relative_error(wrong, right) > 0.5
    ids = torch.tensor([[0]] * 4 + [[1]] * 4)
    same = experts(x.flatten(0, 1), stacked, torch.ones(8, 1), ids, config)
    torch.testing.assert_close(right.flatten(0, 1), same, rtol=1e-12, atol=1e-14)


# Results


def what_the_sum_returns(rows, output, total=None):
    """The result of a given sum is handed on, and a sum that writes into output has none."""
    if total is None:
        return torch.sum(rows, dim=1, out=output)
    return total(rows, output)


def test_with_a_given_sum_nothing_is_returned():
    def write(rows, output):
        output.copy_(rows.sum(dim=1))

    rows, output = torch.ones(2, 3, 1), torch.empty(2, 1)
    assert what_the_sum_returns(rows, output) is output
    output.zero_()
    assert what_the_sum_returns(rows, output, write) is None
    assert output.flatten().tolist() == [3.0, 3.0]
    y = experts(torch.ones(1, 1), multiplying_experts(1), *one_pair(), LINEAR)
    assert y.tolist() == [[1.0]]


def test_a_sum_into_an_output_has_no_gradient():
    rows = torch.ones(2, 3, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        what_the_sum_returns(rows, torch.empty(2, 1))
    x = torch.ones(1, 1, requires_grad=True)
    experts(x, multiplying_experts(2), torch.ones(1, 1), torch.ones(1, 1).long(), LINEAR).backward()
    assert x.grad.item() == 2.0


def output_over_the_input(x, rows):
    """In place, the sum is written over the hidden states."""
    return torch.sum(rows, dim=1, out=x)


def test_in_place_the_hidden_states_are_lost():
    x = torch.ones(2, 1)
    output_over_the_input(x, torch.full((2, 3, 1), 5.0))
    assert x.flatten().tolist() == [15.0, 15.0]
    kept = torch.ones(2, 1)
    experts(kept, multiplying_experts(1), torch.ones(2, 1), torch.zeros(2, 1).long(), LINEAR)
    assert kept.flatten().tolist() == [1.0, 1.0]


# Expert parallelism


def sum_over_rows_that_were_not_written(memory, ids, num_experts):
    """Rows of ids that are not here are never written, and are added up all the same."""
    rows = memory.clone()
    here = (ids >= 0) & (ids < num_experts)
    rows[here] = 1.0
    return rows.sum(dim=1)


@pytest.mark.parametrize("id_elsewhere", [-1, 2, 1000])
def test_unwritten_rows_are_added_up(id_elsewhere):
    ids = torch.tensor([[0, id_elsewhere], [0, 1]])
    memory = torch.full((2, 2, 1), torch.nan)
    assert sum_over_rows_that_were_not_written(memory, ids, 2).isnan().flatten().tolist() == [
        True,
        False,
    ]
    # With zeros in the memory it is right; with a map the document's other half clears it.
    cleared = sum_over_rows_that_were_not_written(torch.zeros(2, 2, 1), ids, 2)
    assert cleared.flatten().tolist() == [1.0, 2.0]
    y = experts(torch.ones(2, 1), multiplying_experts(2), torch.ones(2, 2), ids, LINEAR)
    assert y.flatten().tolist() == [1.0, 3.0]


def slots_that_count(ids, num_experts, expert_map):
    """Ids at or above the number of experts are dropped before the map is asked."""
    return [e for e in ids if e < num_experts and expert_map[e] >= 0]


def test_a_map_without_the_global_number_of_experts_drops_tokens():
    # Rank 1 of 2 holds experts 2 and 3 of 4. Left out, the number is taken from the local weights.
    expert_map = make_expert_map(4, [2, 3])
    assert slots_that_count([0, 2, 3], 4, expert_map) == [2, 3]
    assert slots_that_count([0, 2, 3], 2, expert_map) == []

    ids = torch.tensor([[0, 2, 3]])
    with pytest.raises(ValueError, match="expert_map"):
        align(ids, 4, 2, expert_map, drop_invalid=True)
    mine = slice_experts(multiplying_experts(4), 2, 2)
    y = experts(torch.ones(1, 1), mine, torch.ones(1, 3), ids, LINEAR, expert_map)
    assert y.item() == 7.0


def rows_per_local_expert(num_tokens, top_k, num_local):
    """All slots, of every rank's experts, over the experts of one rank."""
    return num_tokens * top_k / num_local


def test_the_block_size_counts_slots_of_all_ranks_over_experts_of_one():
    # 64 tokens, K = 8, 256 experts on 8 ranks: 2 rows an expert, not 16.
    mistaken = choose_block_size(rows_per_local_expert(64, 8, 32))
    chosen = choose_block_size(64 * 8 / 256)
    assert (mistaken, chosen) == (32, 8)

    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(64, 256, generator=generator).topk(8).indices
    expert_map = make_expert_map(256, range(32))
    lengths = [
        align(ids, block_size, 256, expert_map, drop_invalid=True)[2].item()
        for block_size in (mistaken, chosen)
    ]
    assert lengths[0] == 4 * lengths[1]


def test_a_rank_without_experts_divides_by_zero():
    with pytest.raises(ZeroDivisionError):
        rows_per_local_expert(64, 8, 0)
    nobody = slice_experts(multiplying_experts(2), 2, 0)
    ids, expert_map = torch.tensor([[0, 1]]), make_expert_map(2, [])
    y = experts(torch.ones(1, 1), nobody, torch.ones(1, 2), ids, LINEAR, expert_map)
    assert y.tolist() == [[0.0]]


def test_the_largest_block_size_is_kept_where_none_suffices():
    assert choose_block_size(1000) == 64
    # It is the intended answer: more blocks of an expert, no row without one.
    length = align(torch.zeros(100, 10, dtype=torch.int64), 64, 1)[2].item()
    assert length == 1024


# Alignment


def padded_length_with_all_ids(ids, block_size):
    """As the example of the alignment has it: an id that is none has blocks, too."""
    return sum(-(-count // block_size) * block_size for count in torch.bincount(ids.flatten()))


def test_the_alignment_example_counts_an_expert_that_is_none():
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    assert padded_length_with_all_ids(ids, 4) == 16
    assert align(ids, 4, 4)[2].item() == 12


def experts_of_blocks_one_too_high(counts, block_size):
    """As the example of the batched alignment has it: the last expert's blocks carry E."""
    blocks = [-(-count // block_size) for count in counts]
    return [e + (e == len(counts) - 1) for e, number in enumerate(blocks) for _ in range(number)]


def test_the_batched_alignment_example_names_an_expert_that_is_none():
    counts = [2, 3, 0, 6, 8]
    assert experts_of_blocks_one_too_high(counts, 4) == [0, 1, 3, 3, 5, 5]
    _, block_experts, length = align_batched(torch.tensor(counts), 8, 4)
    assert block_experts[: length.item() // 4].tolist() == [0, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("capacity", [1, 8, 64, 96])
def test_the_batched_alignment_takes_any_capacity(capacity):
    counts = torch.tensor([capacity, 0, 1, 1])
    sorted_rows, _, length = align_batched(counts, capacity, 64)
    assert len(sorted_rows) == 4 * -(-capacity // 64) * 64
    in_use = sorted_rows[: length.item()]
    assert (in_use < 4 * capacity).sum() == counts.sum()


# Documentation


def documented_under_an_old_name(weights, num_columns):
    """A docstring that has outlived its arguments.

    Args:
        weights: packed.
        num_bits: of one weight.
    """


def documented_arguments(function):
    """The names of the section Args of a docstring."""
    section = inspect.getdoc(function).split("Args:\n")[1].split("\n\n")[0]
    return [
        name.strip()
        for names in re.findall(r"^ {4}(\w[\w, ]*):", section, re.MULTILINE)
        for name in names.split(",")
    ]


def test_the_documented_arguments_are_not_those_that_there_are():
    function = documented_under_an_old_name
    assert documented_arguments(function) == ["weights", "num_bits"]
    assert list(inspect.signature(function).parameters) == ["weights", "num_columns"]
    for function in (experts, experts_batched, align, align_batched, dispatch, drop_to_capacity):
        assert documented_arguments(function) == list(inspect.signature(function).parameters)
