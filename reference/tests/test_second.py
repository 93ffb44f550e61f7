"""The reference against the second formulation in `second.py`, with every configuration field.

Float64 on both sides, so that the two differ by roundings alone: a few dozen of 1e-16 each, of the
greatest number in the sum. What is not a sum is compared exactly.
"""

import importlib.util
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference import (
    alignment,
    bias_update,
    capacity,
    config,
    dispatch,
    expert_slicing,
    experts,
    gating,
    layer,
    layouts,
    load_balancing,
)
from moe_reference.activations import activate
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.layouts import Layout

_spec = importlib.util.spec_from_file_location("second", Path(__file__).with_name("second.py"))
second = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(second)

TOLERANCE = 1e-12
INF, NAN = float("inf"), float("nan")

many = settings(max_examples=60, deadline=None)
# For configurations of many fields.
more = settings(max_examples=250, deadline=None)


def assert_equal(actual, expected):
    """The same numbers to the last bit, NaN where NaN is expected."""
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_close(actual, expected):
    """Within roundings of the greatest expected number; finite where that is."""
    actual, expected = actual.detach().numpy(), np.asarray(expected, dtype=float)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    greatest = np.abs(expected[finite]).max() if finite.any() else 0.0
    bound = TOLERANCE * max(1.0, greatest)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, equal_nan=True)


def draw_array(draw, *shape):
    seed = draw(st.integers(0, 2**32 - 1), label="seed of the numbers")
    return np.random.default_rng(seed).normal(size=shape)


def draw_ids(draw, T, K, E, least=0, past=0):
    """Ids with repetitions in a row, from `least` to E - 1 + `past`."""
    ids = draw(st.lists(st.integers(least, E - 1 + past), min_size=T * K, max_size=T * K))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor(ids, dtype=dtype).view(T, K)


def draw_weights(draw, E, H, I, gated=True):
    J = 2 * I if gated else I
    biased = draw(st.booleans())
    arrays = [draw_array(draw, E, J, H), draw_array(draw, E, H, I)]
    arrays += [draw_array(draw, E, J), draw_array(draw, E, H)] if biased else [None, None]
    return second.Weights(*arrays)


def as_tensors(weights):
    return ExpertWeights(*(None if w is None else torch.from_numpy(w) for w in weights))


def some_map(draw, E):
    """A map from E global experts to the rows of a rank, or none; and the number of rows."""
    if draw(st.booleans()):
        return None, E
    held = draw(st.lists(st.integers(0, E - 1), unique=True, max_size=E))
    rows = torch.full((E,), -1, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    rows[held] = torch.arange(len(held), dtype=rows.dtype)
    return rows, len(held)


def of_all_fields(cls, **values):
    """A configuration of values for every field, so that a new field is not left undrawn."""
    assert values.keys() == {field.name for field in fields(cls)}
    return cls(**values)


# gating


@st.composite
def routings(draw, hashed=False):
    """A configuration with every field drawn, and E."""
    G = draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(2 if G > 1 else 1, 4))
    open_groups = draw(st.integers(1, G))
    kinds = ["max", "top2_sum"]
    K = draw(st.integers(1, open_groups * size))
    if open_groups <= K:
        kinds.append("topk_share_sum")
    table = None
    if hashed:
        distinct = [draw(st.permutations(range(G * size)))[:K] for _ in range(3)]
        table = torch.tensor(distinct)
    routing = of_all_fields(
        RoutingConfig,
        top_k=K,
        score=draw(st.sampled_from(get_args(config.Score))),
        order=draw(st.sampled_from(get_args(config.Order))),
        renormalize=draw(st.booleans()),
        norm=draw(st.sampled_from(get_args(config.Norm))),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 0.25, 10.0])),
        epsilon_mode=draw(st.sampled_from(get_args(config.EpsilonMode))),
        renormalize_single=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5, 0.0])),
        scale_when=draw(st.sampled_from(get_args(config.ScaleWhen))),
        num_groups=1 if hashed else G,
        topk_groups=1 if hashed else open_groups,
        group_score="max" if G == 1 or hashed else draw(st.sampled_from(kinds)),
        mask_fill=draw(st.sampled_from(get_args(config.MaskFill))),
        hash_table=table,
    )
    return routing, G * size


def draw_logits(draw, T, E):
    """A grid with many ties. No two of its numbers add up to the same as another two, so that
    where scores of a group tie, they tie in any arithmetic."""
    steps = st.lists(st.integers(-12, 12), min_size=T * E, max_size=T * E)
    x = (np.array(draw(steps), dtype=float) / 4).reshape(T, E)
    return x + 0.03


def assert_same_routing(logits, routing, bias=None, token_ids=None):
    weights, ids = gating.route(
        torch.from_numpy(logits),
        routing,
        None if bias is None else torch.from_numpy(bias),
        None if token_ids is None else torch.from_numpy(token_ids),
    )
    expected_weights, expected_ids = second.route(logits, routing, bias, token_ids)
    assert_equal(ids, expected_ids)
    assert_close(weights, expected_weights)


@more
@given(st.data())
def test_routing(data):
    routing, E = data.draw(routings())
    logits = draw_logits(data.draw, data.draw(st.integers(0, 4)), E)
    assert_same_routing(logits, routing)


@more
@given(st.data())
def test_routing_with_a_selection_bias(data):
    routing, E = data.draw(routings())
    logits = draw_logits(data.draw, data.draw(st.integers(1, 4)), E)
    constant = data.draw(st.booleans())
    bias = np.full(E, -2.25) if constant else draw_array(data.draw, E)
    assert_same_routing(logits, routing, bias)


@many
@given(st.data())
def test_routing_by_a_hash_table(data):
    routing, E = data.draw(routings(hashed=True))
    token_ids = np.array(data.draw(st.lists(st.integers(0, 2), max_size=4)), dtype=int)
    logits = draw_logits(data.draw, len(token_ids), E)
    bias = data.draw(st.sampled_from([None, np.arange(float(E))]))
    assert_same_routing(logits, routing, bias, token_ids)


@more
@given(st.data())
def test_routing_of_rows_that_are_not_finite(data):
    routing, E = data.draw(routings())
    logits = draw_logits(data.draw, 3, E)
    numbers = [NAN, INF, -INF, 0.5]
    if routing.num_groups > 1:
        numbers = [INF, -INF, 0.5]
        if routing.group_score == "max":
            numbers = data.draw(st.sampled_from([numbers, [NAN, INF, 0.5]]))
    logits[1] = data.draw(st.lists(st.sampled_from(numbers), min_size=E, max_size=E))
    assert_same_routing(logits, routing)


def test_closed_experts_come_after_nan():
    routing = RoutingConfig(2, "sigmoid", num_groups=2)
    assert_same_routing(np.array([[NAN, 1.0, 0.5, 0.25]]), routing)
    assert_equal(second.route(np.array([[NAN, 1.0, 0.5, 0.25]]), routing)[1], [[1, 0]])


@many
@given(st.data())
def test_distinct_experts_whatever_a_row_holds(data):
    """With NaN in the sum of a group's best two, it is not defined which group is the better."""
    routing, E = data.draw(routings())
    logits = draw_logits(data.draw, 3, E)
    clean = second.route(logits, routing)[1]
    numbers = st.sampled_from([NAN, INF, -INF, 0.5])
    logits[1] = data.draw(st.lists(numbers, min_size=E, max_size=E))
    ids = gating.route(torch.from_numpy(logits), routing)[1]
    assert all(len(set(row)) == routing.top_k and max(row) < E for row in ids.tolist())
    assert_equal(ids[[0, 2]], clean[[0, 2]])


def test_a_group_of_nothing_but_nan_is_the_lowest_of_all():
    routing = RoutingConfig(1, order="topk_then_score", num_groups=2)
    assert_same_routing(np.array([[NAN, -INF]]), routing)


@pytest.mark.parametrize("order", get_args(config.Order))
@pytest.mark.parametrize("score", get_args(config.Score))
def test_all_equal_logits_choose_the_lowest_ids(order, score):
    routing = RoutingConfig(3, score, order)
    assert_same_routing(np.full((2, 7), 0.25), routing)
    assert_equal(second.route(np.full((1, 7), 0.25), routing)[1], [[0, 1, 2]])


@pytest.mark.parametrize("score", get_args(config.Score))
def test_scores_from_one_end_to_the_other(score):
    logits = np.array([[-800.0, -40.0, -1.0, 0.0, 1.0, 40.0, 800.0], [0.0] * 7, [-750.0] * 7])
    actual = gating.scores(torch.from_numpy(logits), score)
    # Elementwise: each score to within 1e-14 of itself. The smallest is exp(-800) = 0 in float64.
    expected = second.scores(logits, score)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-14, atol=1e-300)


# load balancing


GLOBAL = ("switch", "deepseek_expert", "deepseek_device", "transformers_concatenated")
LOSSES = get_args(config.Loss)


@st.composite
def balances(draw, losses=LOSSES):
    loss = draw(st.sampled_from(losses))
    per_sequence = loss == "deepseek_sequence" or (loss == "gshard" and draw(st.booleans()))
    return of_all_fields(
        BalanceConfig,
        loss=loss,
        coefficient=draw(st.sampled_from([1.0, 0.001, 0.0])),
        score=draw(st.sampled_from(get_args(config.Score))),
        epsilon=draw(st.sampled_from([1e-20, 0.125])),
        sequence_length=draw(st.integers(1, 3)) if per_sequence else None,
        num_devices=draw(st.integers(1, 3)) if loss == "deepseek_device" else None,
    )


@st.composite
def batches(draw, balance):
    """Logits, ids (some of them not here) and a mask or None."""
    N, E = draw(st.integers(0, 3)), (balance.num_devices or 1) * draw(st.integers(1, 3))
    T, K = N * (balance.sequence_length or draw(st.integers(1, 3))), draw(st.integers(1, E))
    logits, ids = draw_array(draw, T, E), draw_ids(draw, T, K, E, least=-1, past=1)
    mask = None
    if draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=T, max_size=T)), dtype=torch.bool)
        # Whole sequences of padding, which have no part in a mean over sequences.
        mask[: draw(st.integers(0, N)) * (T // N if N else 0)] = False
        logits[~mask.numpy()] = draw(st.sampled_from([NAN, INF, 1.0]))
    return logits, ids, mask


@more
@given(st.data())
def test_balance_loss(data):
    balance = data.draw(balances())
    logits, ids, mask = data.draw(batches(balance))
    actual = load_balancing.balance_loss(torch.from_numpy(logits), ids, balance, mask)
    expected = second.balance_loss(logits, ids.numpy(), balance, mask)
    assert_close(actual, expected)


@many
@given(st.data())
def test_balance_loss_with_given_counts(data):
    balance = data.draw(balances(GLOBAL))
    logits, ids, mask = data.draw(batches(balance))
    E = logits.shape[1]
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=E, max_size=E)))
    counts = data.draw(st.sampled_from([counts, counts.int(), counts.float(), 2.5 * counts]))
    actual = load_balancing.balance_loss(torch.from_numpy(logits), ids, balance, mask, counts)
    expected = second.balance_loss(logits, ids.numpy(), balance, mask, counts.numpy())
    assert_close(actual, expected)


def test_counts_that_add_up_to_less_than_one():
    """Float counts, a mean over ranks say. The share is a quotient, whatever the sum is."""
    counts = torch.tensor([0.25, 0.25])
    ids = torch.zeros(1, 1, dtype=torch.long)
    actual = load_balancing.balance_loss(
        torch.zeros(1, 2, dtype=torch.float64), ids, BalanceConfig(), tokens_per_expert=counts
    )
    expected = second.balance_loss(
        np.zeros((1, 2)), ids.numpy(), BalanceConfig(), None, counts.numpy()
    )
    assert_close(actual, expected)


@many
@given(st.data())
def test_balance_loss_of_concatenated_layers(data):
    balance = data.draw(balances(("transformers_concatenated", "switch", "deepseek_device")))
    logits, ids, mask = data.draw(batches(balance))
    layers = data.draw(st.integers(1, 3))
    all_logits = [logits + i * draw_array(data.draw, *logits.shape) for i in range(layers)]
    all_ids = [(ids + i) % logits.shape[1] for i in range(layers)]
    actual = load_balancing.concatenated_balance_loss(
        [torch.from_numpy(x) for x in all_logits], all_ids, balance, mask
    )
    numpy_ids = [i.numpy() for i in all_ids]
    assert_close(actual, second.concatenated_balance_loss(all_logits, numpy_ids, balance, mask))


@many
@given(st.data())
def test_z_loss(data):
    logits, _, mask = data.draw(batches(BalanceConfig()))
    expected = second.z_loss(logits, mask)
    assert_close(load_balancing.z_loss(torch.from_numpy(logits), mask), expected)


@many
@given(st.data())
def test_bias_update(data):
    E = data.draw(st.integers(1, 9))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=E, max_size=E)))
    counts = data.draw(st.sampled_from([counts, counts.int(), counts.float()]))
    bias, rate = draw_array(data.draw, E), data.draw(st.sampled_from([0.001, 0.5, 0.0]))
    centred = data.draw(st.booleans())
    actual = bias_update.update_bias(torch.from_numpy(bias), counts, rate, centred)
    assert_close(actual, second.update_bias(bias, counts.tolist(), rate, centred))


# alignment


def assert_same_blocks(actual, expected, num_blocks_in_buffer):
    sorted_slots, block_experts, padded_length = actual
    entries, blocks, length = expected
    assert padded_length.tolist() == [length]
    assert sorted_slots[:length].tolist() == entries
    assert block_experts[: len(blocks)].tolist() == blocks
    assert len(block_experts) == num_blocks_in_buffer >= len(blocks)
    assert {t.dtype for t in actual} == {torch.int32}


@many
@given(st.data())
def test_align(data):
    T, K, E = data.draw(st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 6)))
    ids = draw_ids(data.draw, T, K, E, least=-2, past=2)
    B, drop = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    expert_map, _ = some_map(data.draw, E)
    if expert_map is not None and E > 1 and data.draw(st.booleans()):
        # Rows in another order than the experts.
        expert_map = expert_map.flip(0)
    actual = alignment.align(ids, B, E, expert_map, drop)
    entries = T * K + E * (B - 1)
    entries = min(entries, T * K * B) if T * K < E else entries
    assert len(actual[0]) == entries == alignment.buffer_size(T * K, B, E)
    assert_same_blocks(actual, second.align(ids.numpy(), B, E, expert_map, drop), -(-entries // B))


@many
@given(st.data())
def test_align_batched(data):
    E, C, B = data.draw(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(1, 5)))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, C), min_size=E, max_size=E)))
    counts = data.draw(st.sampled_from([counts, counts.int()]))
    actual = alignment.align_batched(counts, C, B)
    expected = second.align_batched(counts.numpy(), C, B)
    assert_same_blocks(actual, expected, E * -(-C // B))


@many
@given(st.data())
def test_local_ids(data):
    E = data.draw(st.integers(1, 6))
    ids = draw_ids(data.draw, 2, 3, E, least=-3, past=3)
    expert_map, num_local = some_map(data.draw, E)
    actual = alignment.local_ids(ids, num_local, expert_map)
    assert_equal(actual, second.local_ids(ids.numpy(), num_local, expert_map))


@many
@given(st.floats(0, 100), st.sets(st.integers(1, 99), min_size=1), st.sampled_from([0.5, 0.9, 1]))
def test_block_size(rows_per_expert, sizes, fill):
    sizes = tuple(sorted(sizes))
    actual = alignment.choose_block_size(rows_per_expert, sizes, fill)
    # Where the quotient and the product round to different sides of the limit, both are right.
    around = {
        second.choose_block_size(rows_per_expert * (1 + d), sizes, fill) for d in (-1e-15, 0, 1e-15)
    }
    assert actual in around


# dispatch and capacity


@many
@given(st.data())
def test_dispatch_and_combine(data):
    T, K, E, H = data.draw(st.tuples(*[st.integers(0, 5)], *[st.integers(1, 4)] * 3))
    ids, x = draw_ids(data.draw, T, K, E, least=-1, past=2), draw_array(data.draw, T, H)
    rows, counts, slots = dispatch.dispatch(torch.from_numpy(x), ids, E)
    expected_rows, expected_counts, expected_slots = second.dispatch(x, ids.numpy(), E)
    assert_equal(rows, expected_rows)
    assert_equal(counts, expected_counts)
    assert_equal(slots, expected_slots)
    assert_equal(dispatch.count_tokens(ids, E), expected_counts)
    assert_equal(dispatch.inclusive_offsets(counts), [sum(counts[: e + 1]) for e in range(E)])

    # Rows in any order, some of them belonging to nobody.
    order = np.random.default_rng(T).permutation(len(slots))
    weights = draw_array(data.draw, T, K)
    weights[((ids < 0) | (ids >= E)).numpy()] = NAN
    rows = np.concatenate([expected_rows[order], np.full((2, H), NAN)])
    slots = np.concatenate([expected_slots[order], [T * K, T * K]])
    actual = dispatch.combine(*(torch.from_numpy(a) for a in (rows, slots, weights)))
    assert_close(actual, second.combine(rows, slots, weights))


@many
@given(st.data())
def test_batched_rows(data):
    C, H = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(0, C), min_size=1, max_size=4))
    rows = draw_array(data.draw, sum(counts), H)
    batch = dispatch.batch_rows(torch.from_numpy(rows), torch.tensor(counts), C)
    assert_equal(batch, second.batch_rows(rows, counts, C))
    used = dispatch.rows_in_use(torch.tensor(counts), C)
    assert_equal(used, [[i < count for i in range(C)] for count in counts])
    batch[~used] = NAN
    back = dispatch.unbatch_rows(batch, torch.tensor(counts))
    assert_equal(back, second.unbatch_rows(batch.numpy(), counts))


@many
@given(st.permutations(range(6)))
def test_inverse_permutation(permutation):
    inverse = dispatch.inverse_permutation(torch.tensor(permutation))
    assert inverse.tolist() == [permutation.index(i) for i in range(6)]


@many
@given(st.data())
def test_drop_to_capacity(data):
    T, K, E = data.draw(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 4)))
    ids = draw_ids(data.draw, T, K, E, least=-1, past=1)
    few = st.sampled_from([0.25, 0.5, -1.0, 0.0, NAN, INF])
    weights = np.array(data.draw(st.lists(few, min_size=T * K, max_size=T * K))).reshape(T, K)
    C, policy = data.draw(st.integers(0, 4)), data.draw(st.sampled_from(get_args(capacity.Policy)))
    actual = capacity.drop_to_capacity(torch.from_numpy(weights), ids, E, C, policy)
    expected = second.drop_to_capacity(weights, ids.numpy(), E, C, policy)
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])


@many
@given(
    st.integers(0, 1000),
    st.integers(1, 8),
    st.integers(1, 64),
    st.sampled_from([0, 0.1, 1, 1.1, 1.25, 2.3, 1e-9, 7]),
    st.integers(0, 9),
)
def test_capacity(T, K, E, factor, minimum):
    actual = capacity.expert_capacity(T, K, E, factor, minimum)
    assert actual == second.expert_capacity(T, K, E, factor, minimum)


# experts


@st.composite
def expert_configs(draw):
    activation = draw(st.sampled_from(get_args(config.Activation)))
    branched = activation in ("swigluoai", "swiglu_limit")
    return of_all_fields(
        ExpertsConfig,
        activation=activation,
        gated=branched or draw(st.booleans()),
        alpha=draw(st.sampled_from([1.702, 0.5])),
        limit=draw(st.sampled_from([7.0, 0.75])),
        weight_on=draw(st.sampled_from(get_args(config.WeightOn))),
    )


@many
@given(st.data())
def test_activations(data):
    expert_config = data.draw(expert_configs())
    x = 6 * draw_array(data.draw, 3, 10)
    actual = activate(torch.from_numpy(x), expert_config)
    assert_close(actual, second.activate(x, expert_config))


@more
@given(st.data())
def test_experts(data):
    expert_config = data.draw(expert_configs())
    T, K, E, H, I = data.draw(st.tuples(st.integers(0, 4), *[st.integers(1, 4)] * 4))
    expert_map, num_local = some_map(data.draw, E)
    weights = draw_weights(data.draw, num_local, H, I, expert_config.gated)
    x, w = draw_array(data.draw, T, H), draw_array(data.draw, T, K)
    ids = draw_ids(data.draw, T, K, E, least=-1, past=1)
    w[second.local_ids(ids.numpy(), num_local, expert_map) < 0] = NAN
    x[: data.draw(st.integers(0, T), label="tokens that are not finite")] = NAN
    arguments = (torch.from_numpy(x), as_tensors(weights), torch.from_numpy(w), ids)
    expected = second.experts(x, weights, w, ids.numpy(), expert_config, expert_map)
    for function in (experts.experts, experts.experts_grouped):
        assert_close(function(*arguments, expert_config, expert_map), expected)
    if expert_map is None:
        x_T, weights_T, w_T, _ = arguments
        assert_close(layer.moe_infer(x_T, ids, w_T, weights_T, expert_config), expected)


@many
@given(st.data())
def test_experts_on_a_batch(data):
    expert_config = data.draw(expert_configs())
    E, C, H, I = data.draw(
        st.tuples(st.integers(1, 3), st.integers(0, 3), *[st.integers(1, 4)] * 2)
    )
    weights = draw_weights(data.draw, E, H, I, expert_config.gated)
    counts = data.draw(st.lists(st.integers(0, C), min_size=E, max_size=E))
    x = draw_array(data.draw, E, C, H)
    x[~dispatch.rows_in_use(torch.tensor(counts), C).numpy()] = NAN
    actual = experts.experts_batched(
        torch.from_numpy(x), torch.tensor(counts), as_tensors(weights), expert_config
    )
    assert_close(actual, second.experts_batched(x, counts, weights, expert_config))


# layouts


@many
@given(st.data())
def test_layouts(data):
    gated = data.draw(st.booleans())
    E, H, width, pieces = data.draw(st.tuples(*[st.integers(1, 4)] * 4))
    I = width * pieces
    layout = Layout(
        transposed=data.draw(st.booleans()),
        interleave=data.draw(st.sampled_from([0, width])) if gated else 0,
        up_first=data.draw(st.booleans()) if gated else False,
    )
    stored = draw_weights(data.draw, E, H, I, gated)
    if layout.transposed:
        gate_up, down = stored.gate_up.swapaxes(1, 2), stored.down.swapaxes(1, 2)
        stored = stored._replace(gate_up=gate_up, down=down)
    tensors = [None if w is None else torch.from_numpy(w) for w in stored]
    canonical = layouts.from_layout(layout, *tensors, gated=gated)
    expected = second.from_layout(layout, *stored, gated=gated)
    for field, array in zip(fields(ExpertWeights), expected, strict=True):
        assert_equal(getattr(canonical, field.name), array)
    for back, tensor in zip(layouts.to_layout(layout, canonical, gated), tensors, strict=True):
        assert_equal(back, tensor)
    if gated:
        assert layouts.infer_transposed(tensors[0], tensors[1]) == layout.transposed


@many
@given(st.data())
def test_separate_gate_and_up(data):
    E, H, I = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    weights = draw_weights(data.draw, E, H, I)
    parts = layouts.to_separate(as_tensors(weights))
    biased = weights.gate_up_bias is not None
    assert_equal(parts[0], weights.gate_up[:, :I])
    assert_equal(parts[1], weights.gate_up[:, I:])
    assert_equal(parts[2], weights.down)
    assert_equal(parts[3], weights.gate_up_bias[:, :I] if biased else None)
    assert_equal(parts[4], weights.gate_up_bias[:, I:] if biased else None)
    assert_equal(parts[5], weights.down_bias)
    together = layouts.from_separate(*parts)
    for field, array in zip(fields(ExpertWeights), weights, strict=True):
        assert_equal(getattr(together, field.name), array)


# layer


@more
@given(st.data())
def test_layer(data):
    hashed = data.draw(st.booleans())
    routing, E = data.draw(routings(hashed=hashed))
    expert_config = data.draw(expert_configs())
    N, L, H, I = data.draw(st.tuples(st.integers(0, 2), *[st.integers(1, 3)] * 3))
    maybe = st.booleans()
    arrays = SimpleNamespace(
        router=draw_array(data.draw, E, H),
        router_bias=draw_array(data.draw, E) if data.draw(maybe) else None,
        selection_bias=draw_array(data.draw, E) if data.draw(maybe) else None,
        experts=draw_weights(data.draw, E, H, I, expert_config.gated),
        shared=None,
        shared_gate=None,
    )
    if data.draw(maybe):
        arrays.shared = draw_weights(data.draw, 1, H, I + 1, expert_config.gated)
        arrays.shared_gate = draw_array(data.draw, 1, H) if data.draw(maybe) else None
    balance = data.draw(st.one_of(st.none(), balances(), balances(("gshard", "deepseek_sequence"))))
    if balance is not None:
        # Without a length, those losses that are taken per sequence take the sequences of x.
        length = data.draw(st.sampled_from([None, L]))
        devices = balance.num_devices and data.draw(st.sampled_from([1, E]))
        balance = replace(balance, sequence_length=length, num_devices=devices)
    layer_config = LayerConfig(
        routing, expert_config, balance, data.draw(st.sampled_from([1.0, 0.5])), torch.float32
    )
    x = draw_array(data.draw, N, L, H)
    token_ids = np.arange(N * L).reshape(N, L) % 3 if hashed else None
    mask = draw_array(data.draw, N, L) > 0 if data.draw(maybe) else None

    def tensor(value):
        if isinstance(value, second.Weights):
            return as_tensors(value)
        return None if value is None else torch.from_numpy(value)

    parameters = LayerWeights(**{name: tensor(value) for name, value in vars(arrays).items()})
    actual = layer.layer(
        tensor(x), parameters, layer_config, tensor(token_ids), tensor(mask), training=True
    )
    out, ids, weights, loss, counts = second.layer(x, arrays, layer_config, token_ids, mask)
    assert_equal(actual.expert_ids, ids)
    assert_equal(actual.tokens_per_expert, counts)
    assert_close(actual.weights, weights)
    assert_close(actual.output, out)
    assert (actual.balance_loss is None) == (loss is None)
    if loss is not None:
        assert_close(actual.balance_loss, loss)
    quiet = layer.layer(tensor(x), parameters, layer_config, tensor(token_ids), tensor(mask))
    assert quiet.balance_loss is None
    assert torch.equal(quiet.output, actual.output)


@many
@given(st.data())
def test_router_logits(data):
    T, H, E = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))

    def grid(*shape):
        # Of 12 digits, so that products and sums are exact in float32, and bfloat16 has to round.
        return np.round(draw_array(data.draw, *shape).clip(-2, 2) * 512) / 512

    x, router, bias = grid(T, H), grid(E, H), grid(E)
    parameters = LayerWeights(
        torch.from_numpy(router).float(),
        ExpertWeights(torch.ones(E, 2, H), torch.ones(E, H, 1)),
        torch.from_numpy(bias).float(),
    )
    layer_config = LayerConfig(RoutingConfig(1), router_dtype=getattr(torch, dtype))
    actual = layer.router_logits(torch.from_numpy(x).float(), parameters, layer_config)
    assert actual.dtype == getattr(torch, dtype)
    assert_equal(actual.double(), second.router_logits(x, router, bias, dtype))


# expert slicing


@many
@given(st.integers(0, 20), st.integers(1, 9))
def test_assignment(E, R):
    for rank in range(R):
        actual = expert_slicing.assign_experts(E, R, rank)
        assert actual == second.assign_experts(E, R, rank)
        dealt = expert_slicing.assign_round_robin(E, R, rank)
        assert list(dealt) == [e for e in range(E) if e % R == rank]


def assert_same_weights(actual, expected):
    for field, array in zip(fields(ExpertWeights), expected, strict=True):
        assert_equal(getattr(actual, field.name), array)


@many
@given(st.data())
def test_slices(data):
    gated = data.draw(st.booleans())
    E, H, I, R = data.draw(st.tuples(*[st.integers(1, 5)] * 4))
    weights = draw_weights(data.draw, E, H, I, gated)
    tensors = as_tensors(weights)
    for rank in range(R):
        start, count = second.assign_experts(E, R, rank)
        actual = expert_slicing.slice_experts(tensors, start, count)
        assert_same_weights(actual, second.take_experts(weights, range(start, start + count)))
        actual = expert_slicing.slice_tensor_parallel(tensors, R, rank)
        assert_same_weights(actual, second.slice_tensor_parallel(weights, R, rank, gated))
    held = data.draw(st.lists(st.integers(0, E - 1)))
    actual = expert_slicing.take_experts(tensors, held)
    assert_same_weights(actual, second.take_experts(weights, held))
    taken = expert_slicing.take_tensors({"down": tensors.down}, E, held)
    assert_equal(taken["down"], second.take_experts(weights, held).down)


@many
@given(st.data())
def test_expert_map(data):
    E = data.draw(st.integers(1, 6))
    held = data.draw(st.lists(st.integers(0, E - 1), unique=True))
    expected = [held.index(e) if e in held else -1 for e in range(E)]
    assert expert_slicing.make_expert_map(E, held).tolist() == expected
