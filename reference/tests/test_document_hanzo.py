"""What is wrong, missing or undefined in hanzo-engine's MoE experts, each on a few lines.

The document is a Rust program: its arithmetic and its decisions are repeated here in PyTorch. Each
test plants one mistake, asserts what it gives, and asserts that the reference does otherwise.
"""

import numpy
import pytest
import torch
from moe_reference.checkpoints import load_layer
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.dispatch import combine
from moe_reference.expert_gathering import gather_tensor_parallel
from moe_reference.expert_slicing import slice_tensor_parallel
from moe_reference.experts import experts, init_experts
from moe_reference.families import TensorNames
from moe_reference.layer import layer
from moe_reference.layouts import LAYOUTS, Layout, from_layout, infer_transposed, to_layout

SILU = ExpertsConfig("silu")
TRANSPOSED = Layout(transposed=True)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def drawn_experts(num_experts, hidden, intermediate, bias=False):
    generator = torch.Generator().manual_seed(0)
    return init_experts(
        num_experts, hidden, intermediate, bias=bias, generator=generator, dtype=torch.float64
    )


def output(weights, x=None):
    """One expert per token, each weight one: 64 tokens on the experts in turn."""
    x = drawn(64, weights.gate_up.shape[2]) if x is None else x
    ids = torch.arange(len(x))[:, None] % len(weights.down)
    return experts(x, weights, torch.ones(len(x), 1), ids, SILU)


def relative_error(wrong, right):
    return ((wrong - right).norm() / right.norm()).item()


# Layout of stacked weights


def transposed_where_its_own_shape_says_so(gate_up, down, hidden, intermediate):
    """Each tensor alone is taken for [in, out] if its shape can be that, else for [out, in]."""
    if gate_up.shape[1:] == (hidden, 2 * intermediate):
        gate_up = gate_up.transpose(1, 2)
    if down.shape[1:] == (intermediate, hidden):
        down = down.transpose(1, 2)
    return ExpertWeights(gate_up, down)


# The square tensor is gate_up with the first pair, down with the second.
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 16), (16, 16)])
def test_a_square_matrix_is_read_transposed(hidden, intermediate):
    right = drawn_experts(4, hidden, intermediate)
    stored = (right.gate_up, right.down)
    wrong = transposed_where_its_own_shape_says_so(*stored, hidden, intermediate)
    assert relative_error(output(wrong), output(right)) > 1.0

    assert infer_transposed(*stored) is False
    both = from_layout(Layout(transposed=infer_transposed(*stored)), *stored)
    assert torch.equal(output(both), output(right))


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 16), (16, 16), (24, 8)])
def test_both_shapes_together_tell_how_weights_are_stored(hidden, intermediate):
    right = drawn_experts(4, hidden, intermediate)
    for layout in (Layout(), TRANSPOSED):
        gate_up, down, *_ = to_layout(layout, right)
        assert infer_transposed(gate_up, down) is layout.transposed


def test_other_matrices_are_read_right_by_their_own_shapes():
    right = drawn_experts(4, 24, 8)
    for layout in (Layout(), TRANSPOSED):
        gate_up, down, *_ = to_layout(layout, right)
        read = transposed_where_its_own_shape_says_so(gate_up, down, 24, 8)
        assert torch.equal(read.gate_up, right.gate_up)
        assert torch.equal(read.down, right.down)


def test_alternating_rows_are_read_as_halves():
    # The layout of gpt-oss has the name and the shape of the stacked weights that are expected.
    right = drawn_experts(4, 24, 8)
    gate_up, down, *_ = to_layout(LAYOUTS["transformers-gpt-oss"], right)
    wrong = transposed_where_its_own_shape_says_so(gate_up, down, 24, 8)
    assert relative_error(output(wrong), output(right)) > 1.0
    read = from_layout(LAYOUTS["transformers-gpt-oss"], gate_up, down)
    assert torch.equal(output(read), output(right))


def test_biases_are_left_out():
    right = drawn_experts(4, 24, 8, bias=True)
    wrong = transposed_where_its_own_shape_says_so(right.gate_up, right.down, 24, 8)
    assert wrong.gate_up_bias is None
    assert relative_error(output(wrong), output(right)) > 0.5


# Tensor parallelism


def part_whatever_the_shape(tensor, shape, dim, world_size, rank):
    """A rank's part along one dimension; the shape is compared only when there is one rank."""
    if world_size == 1 and tensor.shape != shape:
        raise ValueError(f"expected {shape}, got {tensor.shape}")
    return tensor.chunk(world_size, dim)[rank]


def first_that_loads(tensor, ways, world_size, rank):
    """The first (shape, dimension) that raises no error, and which one that was."""
    for number, (shape, dim) in enumerate(ways):
        try:
            return part_whatever_the_shape(tensor, shape, dim, world_size, rank), number
        except ValueError:
            continue
    raise AssertionError


def test_sharding_never_finds_out_the_second_convention():
    right = drawn_experts(4, 24, 8)
    gate_up_ways = [((4, 24, 16), 2), ((4, 16, 24), 1)]
    down_ways = [((4, 8, 24), 1), ((4, 24, 8), 2)]
    for tensor, ways in ((right.gate_up, gate_up_ways), (right.down, down_ways)):
        assert first_that_loads(tensor, ways, 1, 0)[1] == 1
        assert first_that_loads(tensor, ways, 2, 0)[1] == 0
    # H is cut instead of I.
    assert first_that_loads(right.gate_up, gate_up_ways, 2, 0)[0].shape == (4, 16, 12)
    assert first_that_loads(right.down, down_ways, 2, 0)[0].shape == (4, 12, 8)

    # Here the layout is found on the whole tensors, and what is cut is known from then on.
    assert infer_transposed(right.gate_up, right.down) is False
    part = slice_tensor_parallel(right, 2, 0)
    assert part.gate_up.shape == (4, 8, 24)
    assert part.down.shape == (4, 24, 4)


def part_of_gate_and_up_as_one(weights, world_size, rank):
    """Gate and up are cut as one tensor: the first ranks get gates, the last ones ups."""
    return ExpertWeights(
        weights.gate_up.chunk(world_size, 1)[rank], weights.down.chunk(world_size, 2)[rank]
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_gate_and_up_cut_as_one(world_size):
    whole = drawn_experts(4, 24, 8)
    parts = [part_of_gate_and_up_as_one(whole, world_size, rank) for rank in range(world_size)]
    assert torch.equal(parts[0].gate_up, whole.gate_up[:, : 16 // world_size])
    assert relative_error(sum(map(output, parts)), output(whole)) > 1.0

    parts = [slice_tensor_parallel(whole, world_size, rank) for rank in range(world_size)]
    # Sums of the same float64 products in another order.
    torch.testing.assert_close(sum(map(output, parts)), output(whole), rtol=1e-12, atol=1e-14)
    assert torch.equal(gather_tensor_parallel(parts).gate_up, whole.gate_up)


def test_separate_gate_and_up_are_cut_right():
    whole = drawn_experts(4, 24, 8)
    gate, up = whole.gate_up.chunk(2, 1)
    for rank in range(2):
        own = torch.cat([gate.chunk(2, 1)[rank], up.chunk(2, 1)[rank]], 1)
        assert torch.equal(own, slice_tensor_parallel(whole, 2, rank).gate_up)


def test_an_intermediate_size_that_ranks_do_not_divide():
    whole = drawn_experts(2, 4, 5)
    assert whole.down.shape[2] % 2 != 0
    parts = [slice_tensor_parallel(whole, 2, rank) for rank in range(2)]
    assert [part.down.shape[2] for part in parts] == [3, 2]
    torch.testing.assert_close(sum(map(output, parts)), output(whole), rtol=1e-12, atol=1e-14)


def summed_over_ranks_that_hold_everything(weights, world_size):
    """Every rank has loaded all weights, and their outputs are summed all the same."""
    return sum(output(weights) for _ in range(world_size))


@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_weights_are_summed_over_the_ranks(world_size):
    weights = drawn_experts(4, 24, 8)
    wrong = summed_over_ranks_that_hold_everything(weights, world_size)
    # A power of two: the multiple is exact.
    assert torch.equal(wrong, world_size * output(weights))
    parts = [slice_tensor_parallel(weights, world_size, rank) for rank in range(world_size)]
    assert all(not torch.equal(part.down, weights.down) for part in parts)


def sum_of_rounded_parts(parts, x):
    """Each rank's part is rounded to x's dtype before it is sent."""
    return sum(output(part, x).to(x.dtype).double() for part in parts).to(x.dtype)


def test_partial_outputs_are_rounded_before_they_are_summed():
    whole = drawn_experts(4, 24, 8)
    x = drawn(64, 24).bfloat16()
    exact = output(whole, x.double())
    parts = [slice_tensor_parallel(whole, 8, rank) for rank in range(8)]
    # Rounded once: half a step of bfloat16 is 2^-8 of the value, beside it a float32 sum of 32
    # products of numbers around one.
    bound = exact.abs() * 2**-8 + 32 * 2**-24
    assert ((output(whole, x).double() - exact).abs() <= bound).all()
    wrong = (sum_of_rounded_parts(parts, x).double() - exact).abs()
    assert (wrong > bound).float().mean() > 0.1


def layers_or_placeholders(tensors):
    """Whatever is not found under the expected name is taken for a file of another format."""
    name = "experts.0.gate_proj.weight"
    return tensors.get(name, "placeholder")


def test_missing_weights_are_not_noticed_when_loading():
    misspelt = {"gate.weight": torch.ones(1, 1), "experts.0.gate_prj.weight": torch.ones(1, 1)}
    assert layers_or_placeholders(misspelt) == "placeholder"
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight"):
        load_layer(misspelt, TensorNames(), "")


# Which way the forward pass takes


def way_of_the_gathering_experts(num_sequences, length, quantized=True, activation="silu"):
    """Which kernel computes a token on CUDA: it depends on the tokens around it."""
    if length == 1 and quantized and activation in ("silu", "gelu_tanh"):
        return "decode"
    if length > 1 and num_sequences * length >= 32 and quantized:
        return "grouped"
    return "gather"


def test_the_way_of_a_token_depends_on_the_others():
    ways = {shape: way_of_the_gathering_experts(*shape) for shape in ((32, 1), (1, 32), (1, 31))}
    assert ways == {(32, 1): "decode", (1, 32): "grouped", (1, 31): "gather"}
    # 32 tokens are 32 tokens however they are cut into sequences.
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(4, 8, generator=generator)
    parameters = LayerWeights(router, init_experts(4, 8, 6, generator=generator))
    config = LayerConfig(RoutingConfig(top_k=2))
    x = torch.randn(32, 1, 8, generator=generator)
    as_batch = layer(x, parameters, config).output.view(-1)
    as_sequence = layer(x.view(1, 32, 8), parameters, config).output.view(-1)
    assert torch.equal(as_batch, as_sequence)


def test_activations_of_the_decode_kernel():
    for activation, way in (("silu", "decode"), ("gelu_tanh", "decode"), ("gelu", "gather")):
        assert way_of_the_gathering_experts(8, 1, activation=activation) == way
    # What the two gelu functions differ by shows that neither may stand for the other.
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    erf = torch.nn.functional.gelu(x)
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    assert 1e-4 < (erf - tanh).abs().max() < 1e-3


def rows_quantized_to_8_bits(x):
    """Blocks of 32 numbers, each with the scale of its largest one, as the decode kernels take."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


def test_the_quantized_ways_round_their_inputs():
    weights, x = drawn_experts(4, 32, 8), drawn(64, 32)
    error = relative_error(output(weights, rows_quantized_to_8_bits(x)), output(weights, x))
    # More than float32 ever loses, and less than bfloat16 inputs with their 8 bits might.
    assert 1e-3 < error < 2e-2


def slots_of_a_decode_step(num_sequences, top_k):
    """Everything that is to be sorted when each sequence has one token."""
    return num_sequences * top_k


def test_a_decode_step_may_be_longer_than_a_block_of_threads():
    # The sort of a decode step is the one that took up to 1024 elements on CUDA.
    assert slots_of_a_decode_step(128, 8) == 1024
    assert slots_of_a_decode_step(129, 8) > 1024
    x, ids = torch.ones(1, 129, 1), torch.zeros(129, 8, dtype=torch.int64)
    one = ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    assert experts(x[0], one, torch.ones(129, 8), ids, SILU).shape == (129, 1)


# Dtypes


def weights_in_the_dtype_of_x(weights, x):
    return weights.to(x.dtype)


def test_rounded_weights_do_not_add_up():
    weights = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    sums = weights_in_the_dtype_of_x(weights, x).double().sum(dim=-1)
    assert sums.min() < 0.9990
    assert sums.max() > 1.0010
    # A weight is rounded by at most 2^-8 of itself, and the weights add up to one.
    assert (sums - 1).abs().max() <= 2**-8


def product_without_promotion(a, b):
    """Multiplication as the document's tensor library has it: equal dtypes, or an error."""
    if a.dtype != b.dtype:
        raise TypeError(f"expected equal dtypes, got {a.dtype} and {b.dtype}")
    return a * b


def test_the_gathering_experts_take_float32_weights_only():
    rows, weights = torch.ones(1, 2, 1).float(), torch.ones(1, 2, 1, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        product_without_promotion(rows, weights)
    one = ExpertWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert experts(rows[:, 0], one, weights[..., 0].to(dtype), ids, SILU).item() != 0.0


def added_up_in_the_dtype_of_the_rows(rows):
    """Each addition is rounded."""
    total = torch.zeros_like(rows[:, 0])
    for k in range(rows.shape[1]):
        total = total + rows[:, k]
    return total


def test_sums_in_the_dtype_of_x():
    rows = drawn(512, 8, 16).bfloat16()
    exact = rows.double().sum(dim=1)
    bound = exact.abs() * 2**-8 + rows.double().abs().sum(dim=1) * 2**-20
    wrong = (added_up_in_the_dtype_of_the_rows(rows).double() - exact).abs()
    slots = torch.arange(512 * 8)
    right = (combine(rows.flatten(0, 1), slots, torch.ones(512, 8)).double() - exact).abs()
    # Rounded once: half a step of bfloat16 is 2^-8 of the value, float32 adds next to nothing.
    assert (right <= bound).all()
    assert (wrong > bound).float().mean() > 0.2


def added_up_in_order_of_arrival(terms, order):
    """Atomic additions come in any order."""
    total = torch.zeros(())
    for i in order:
        total = total + terms[i]
    return total.item()


def test_sums_in_any_order_are_not_repeatable():
    terms = torch.tensor([1e8, 1.0, -1e8])
    assert added_up_in_order_of_arrival(terms, [0, 1, 2]) == 0.0
    assert added_up_in_order_of_arrival(terms, [0, 2, 1]) == 1.0
    rows, slots = drawn(24, 4).float(), torch.arange(24)
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    once, again = (combine(rows, slots, weights) for _ in range(2))
    assert torch.equal(once, again)
    # Nor does the order in which the rows come in matter here: each has its slot.
    assert torch.equal(once, combine(rows.flip(0), slots.flip(0), weights))


# Ids and sizes


def rows_of_each_expert(ids, num_experts):
    """A list for each expert, filled at the id read as an unsigned number."""
    rows = [[] for _ in range(num_experts)]
    for token, row in enumerate(ids.tolist()):
        for expert in numpy.array(row, dtype=numpy.int32).astype(numpy.uint32):
            rows[expert].append(token)
    return rows


@pytest.mark.parametrize("id_elsewhere", [-1, 4, 1000])
def test_an_id_that_is_not_here_ends_the_program(id_elsewhere):
    ids = torch.tensor([[0, id_elsewhere]], dtype=torch.int32)
    with pytest.raises(IndexError):
        rows_of_each_expert(ids, 4)
    weights = drawn_experts(4, 8, 6)
    x = drawn(1, 8)
    both = experts(x, weights, torch.ones(1, 2), ids, SILU)
    assert torch.equal(both, experts(x, weights, torch.ones(1, 1), ids[:, :1], SILU))


def test_equal_ids_in_a_row_are_both_counted():
    ids = torch.tensor([[2, 2]], dtype=torch.int32)
    assert rows_of_each_expert(ids, 4)[2] == [0, 0]
    weights, x = drawn_experts(4, 8, 6), drawn(1, 8)
    twice = experts(x, weights, torch.ones(1, 2), ids, SILU)
    once = experts(x, weights, torch.ones(1, 1), ids[:, :1], SILU)
    # Products of two rows and of one may add up in another order.
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-14)


def pairs_of_tokens(rows, num_tokens, hidden):
    """K is left to be found out from the number of elements, which zero tokens do not tell."""
    return rows.view(num_tokens, -1, hidden)


def test_zero_tokens():
    assert pairs_of_tokens(torch.ones(6, 4), 3, 4).shape == (3, 2, 4)
    with pytest.raises(RuntimeError, match="0 elements"):
        pairs_of_tokens(torch.ones(0, 4), 0, 4)
    no_ids = torch.zeros(0, 2, dtype=torch.int64)
    y = experts(torch.ones(0, 24), drawn_experts(4, 24, 8), torch.ones(0, 2), no_ids, SILU)
    assert y.shape == (0, 24)


def token_of_each_slot(num_slots, top_k):
    """Which token a slot belongs to, by a K that is configured apart from the ids."""
    return [slot // top_k for slot in range(num_slots)]


def test_k_of_the_configuration_and_of_the_ids():
    ids = torch.tensor([[0, 1], [2, 3]])
    assert token_of_each_slot(ids.numel(), 2) == [0, 0, 1, 1]
    assert token_of_each_slot(ids.numel(), 4) == [0, 0, 0, 0]
    # Here K is the ids' own, and that of the weights must be the same.
    with pytest.raises(ValueError, match="expert_ids"):
        experts(torch.ones(2, 24), drawn_experts(4, 24, 8), torch.ones(2, 4), ids, SILU)
