"""The losses against their published formulas as loops, their published values, and the rest."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.config import BalanceConfig, Loss, RoutingConfig, Score
from moe_reference.gating import route
from moe_reference.load_balancing import (
    balance_loss,
    concatenated_balance_loss,
    inject_loss,
    inject_scaled_loss,
    update_bias,
    z_loss,
)
from torch.utils.checkpoint import checkpoint

LOSSES = get_args(Loss)
SCORES = get_args(Score)
NAN = float("nan")


def config_for(loss, **fields):
    """A configuration with what the loss needs: sequences of 4 tokens, 2 devices."""
    needs = {"deepseek_sequence": {"sequence_length": 4}, "gshard": {"sequence_length": 4}}
    needs["deepseek_device"] = {"num_devices": 2}
    return BalanceConfig(loss, **{**needs.get(loss, {}), **fields})


def draw_logits(T, E, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, E, generator=generator, dtype=torch.float64) * spread


def choose(logits, K):
    return route(logits, RoutingConfig(top_k=K))[1]


# The published formulas, each written as its source writes it. p: rows of probabilities,
# ids: rows of expert ids, padding already left out.


def probabilities(x, config):
    if config.score == "softmax":
        exponentials = [math.exp(v) for v in x]
        return [v / sum(exponentials) for v in exponentials]
    if config.score == "sigmoid":
        s = [1 / (1 + math.exp(-v)) for v in x]
    else:
        s = [math.sqrt(math.log1p(math.exp(v))) for v in x]
    return [v / (sum(s) + config.epsilon) for v in s]


def count(ids, expert):
    return sum(row.count(expert) for row in ids)


def mean_probability(p, expert):
    return sum(row[expert] for row in p) / len(p)


def switch(p, ids, E, K, config):
    T = len(p)
    return E / (K * T**2) * sum(count(ids, i) * sum(row[i] for row in p) for i in range(E))


def gshard(p, ids, E, K, config):
    density = [sum(row[0] == i for row in ids) / len(ids) for i in range(E)]
    return sum(density[i] * mean_probability(p, i) for i in range(E)) / E * E**2


def deepseek_expert(p, ids, E, K, config):
    f = [E / (K * len(p)) * count(ids, i) for i in range(E)]
    return sum(f[i] * mean_probability(p, i) for i in range(E))


def deepseek_device(p, ids, E, K, config):
    size = E // config.num_devices
    total = 0.0
    for d in range(config.num_devices):
        own = range(d * size, (d + 1) * size)
        f = sum(E / (K * len(p)) * count(ids, i) for i in own) / size
        total += f * sum(mean_probability(p, i) for i in own)
    return total


def transformers_concatenated(p, ids, E, K, config):
    return E * sum(
        sum(row[k] == i for row in ids) / len(ids) * mean_probability(p, i)
        for k in range(K)
        for i in range(E)
    )


FORMULAS = {
    "switch": switch,
    "gshard": gshard,
    "deepseek_expert": deepseek_expert,
    "deepseek_sequence": deepseek_expert,
    "deepseek_device": deepseek_device,
    "transformers_concatenated": transformers_concatenated,
}


def published_loss(logits, expert_ids, config, mask):
    """The mean of the formula over the sequences that hold a real token."""
    T, E = logits.shape
    K = expert_ids.shape[1]
    per_sequence = config.loss in ("gshard", "deepseek_sequence")
    L = config.sequence_length if per_sequence and config.sequence_length else T
    losses = []
    for start in range(0, T, L):
        real = [t for t in range(start, start + L) if mask[t]]
        if real:
            p = [probabilities(logits[t].tolist(), config) for t in real]
            ids = [expert_ids[t].tolist() for t in real]
            losses.append(FORMULAS[config.loss](p, ids, E, K, config))
    return config.coefficient * sum(losses) / len(losses) if losses else 0.0


@st.composite
def balance_cases(draw):
    E = draw(st.sampled_from([2, 4, 6, 10]))
    K = draw(st.integers(1, E))
    N, L = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    loss = draw(st.sampled_from(LOSSES))
    length = L if loss == "deepseek_sequence" else draw(st.sampled_from([None, L]))
    config = BalanceConfig(
        loss,
        coefficient=draw(st.sampled_from([1.0, 0.01, 0.0])),
        score=draw(st.sampled_from(SCORES)),
        epsilon=draw(st.sampled_from([1e-20, 0.1])),
        sequence_length=length,
        num_devices=draw(st.sampled_from([1, 2, E])),
    )
    logits = draw_logits(N * L, E, draw(st.integers(0, 1000)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=N * L, max_size=N * L))
    return logits, K, config, mask


@settings(max_examples=200, deadline=None)
@given(balance_cases())
def test_the_loss_equals_the_published_formula(case):
    logits, K, config, mask = case
    expert_ids = choose(logits, K)
    mask_T = None if mask is None else torch.tensor(mask)
    got = balance_loss(logits, expert_ids, config, mask_T)
    want = published_loss(logits, expert_ids, config, mask or [True] * len(logits))
    assert got.shape == ()
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want, rel=1e-12)


# Published values for E = 8 and K = 2.

VALUES = {
    "switch": (1.0, 4.0),
    "gshard": (1.0, 8.0),
    "deepseek_expert": (1.0, 4.0),
    "deepseek_sequence": (1.0, 4.0),
    "deepseek_device": (1.0, 4.0),
    "transformers_concatenated": (2.0, 8.0),
}


def even_batch():
    """Eight tokens whose choices cover every expert twice, all probabilities alike."""
    return torch.zeros(8, 8), torch.tensor([[t, (t + 1) % 8] for t in range(8)])


def collapsed_batch(T=8, first=0):
    """All probability and all choices on two neighbouring experts."""
    logits = torch.full((T, 8), -100.0)
    logits[:, first : first + 2] = 0.0
    return logits, torch.tensor([[first, first + 1]]).expand(T, 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_even_and_collapsed_batches_have_the_published_values(loss):
    config = BalanceConfig(loss, sequence_length=8, num_devices=4)
    even, collapsed = VALUES[loss]
    assert balance_loss(*even_batch(), config).item() == pytest.approx(even)
    logits, expert_ids = collapsed_batch()
    if loss == "gshard":
        # The 8 of the table is for a first choice that has all the probability.
        logits = logits - torch.tensor([0.0] + [200.0] * 7)
    assert balance_loss(logits, expert_ids, config).item() == pytest.approx(collapsed)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("loss", LOSSES)
def test_imbalance_raises_the_loss_and_has_a_gradient(loss, score):
    config = config_for(loss, score=score)
    even = balance_loss(*even_batch(), config)
    logits = torch.zeros(8, 8)
    logits[:, 0], logits[:, 1] = 3.0, 2.0
    logits.requires_grad_()
    skewed = balance_loss(logits, choose(logits, 2), config)
    assert skewed > 1.05 * even
    (gradient,) = torch.autograd.grad(skewed, logits)
    assert gradient.abs().max() > 1e-4
    # Descent takes probability from the busy experts.
    assert (gradient[:, 0] > 0).all()


def test_concatenating_layers_hides_imbalance():
    layers = [collapsed_batch(first=first) for first in (0, 2, 4, 6)]
    logits, expert_ids = zip(*layers, strict=True)
    config = BalanceConfig("transformers_concatenated")
    together = concatenated_balance_loss(logits, expert_ids, config)
    each = [balance_loss(*layer, config).item() for layer in layers]
    assert together.item() == pytest.approx(2.0)
    assert each == pytest.approx([8.0] * 4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_concatenated_loss_equals_that_of_transformers(padded):
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [draw_logits(12, 8, seed).float() for seed in (1, 2, 3)]
    mask = torch.arange(12) % 4 < 3
    want = load_balancing_loss_func(tuple(layers), 8, 2, mask.view(3, 4).long() if padded else None)
    got = concatenated_balance_loss(
        layers,
        [choose(logits, 2) for logits in layers],
        BalanceConfig("transformers_concatenated"),
        mask if padded else None,
    )
    torch.testing.assert_close(got, want)


def test_as_many_ids_as_layers_are_needed():
    config = BalanceConfig("transformers_concatenated")
    with pytest.raises(ValueError, match=r"expert_ids: expected one tensor for each"):
        concatenated_balance_loss([], [], config)
    with pytest.raises(ValueError, match=r"expert_ids: .* got 0 for 1 of logits"):
        concatenated_balance_loss([torch.zeros(2, 4)], [], config)


# Gradients.


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_in_the_logits_is_right(loss, score):
    logits = draw_logits(8, 6, seed=5).requires_grad_()
    expert_ids = choose(logits, 2)
    mask = torch.tensor([True, True, False, True] * 2)
    config = config_for(loss, score=score, coefficient=0.3)
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, expert_ids, config, mask), (logits,))


def test_the_gradient_of_the_z_loss_is_right():
    logits = draw_logits(5, 6, seed=6).requires_grad_()
    mask = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x: z_loss(x, mask), (logits,))


# Padding, empty batches, garbage.


@pytest.mark.parametrize("filling", [0.0, NAN, float("inf")])
@pytest.mark.parametrize("loss", LOSSES)
def test_appended_padding_changes_nothing(loss, filling):
    logits = draw_logits(8, 6, seed=7)
    expert_ids = choose(logits, 2)
    config = config_for(loss)
    alone = logits.clone().requires_grad_()
    padded = torch.cat([logits, torch.full((4, 6), filling, dtype=torch.float64)]).requires_grad_()
    padded_ids = torch.cat([expert_ids, torch.zeros(4, 2, dtype=torch.int64)])
    mask = torch.arange(12) < 8

    for function, args in (
        (balance_loss, ((expert_ids, config), (padded_ids, config, mask))),
        (z_loss, ((), (mask,))),
    ):
        without, with_padding = function(alone, *args[0]), function(padded, *args[1])
        torch.testing.assert_close(with_padding, without)
        (gradient,) = torch.autograd.grad(without, alone)
        (padded_gradient,) = torch.autograd.grad(with_padding, padded)
        torch.testing.assert_close(padded_gradient[:8], gradient)
        assert (padded_gradient[8:] == 0).all()


@pytest.mark.parametrize("T", [0, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_real_tokens_loss_and_gradient_are_zero(loss, T):
    logits = torch.zeros(T, 6, requires_grad=True)
    expert_ids = torch.zeros(T, 2, dtype=torch.int32)
    mask = torch.zeros(T, dtype=torch.bool)
    for value in (balance_loss(logits, expert_ids, config_for(loss), mask), z_loss(logits, mask)):
        assert value.item() == 0.0
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.equal(gradient, torch.zeros(T, 6))


@pytest.mark.parametrize("loss", LOSSES)
def test_ids_that_are_not_here_are_not_counted(loss):
    logits = draw_logits(8, 6, seed=8)
    expert_ids = choose(logits, 3)
    marked = expert_ids.clone()
    marked[:, 2] = torch.tensor([-1, 6] * 4)
    config = config_for(loss)
    got = balance_loss(logits, marked, config)
    want = balance_loss(logits, expert_ids[:, :2], config)
    scale = 3 / 2 if loss == "transformers_concatenated" else 1
    torch.testing.assert_close(got, want * scale)


def test_equal_ids_in_a_row_are_counted_each():
    logits = draw_logits(4, 6, seed=17)
    doubled = torch.tensor([[0, 0, 1]]).expand(4, 3)
    P = torch.softmax(logits, 1).mean(0)
    got = balance_loss(logits, doubled, BalanceConfig("switch"))
    torch.testing.assert_close(got, 6 * (2 / 3 * P[0] + 1 / 3 * P[1]))


@pytest.mark.parametrize("loss", LOSSES)
def test_narrow_logits_strides_and_id_dtypes(loss):
    logits = draw_logits(8, 12, seed=9).bfloat16()[:, ::2]
    expert_ids = choose(logits, 2).t().contiguous().t()
    before = logits.clone(), expert_ids.clone()
    config = config_for(loss)
    got = balance_loss(logits, expert_ids.int(), config, torch.ones(16, dtype=torch.bool)[::2])
    want = balance_loss(logits.float().contiguous(), expert_ids.contiguous(), config)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    assert torch.equal(logits, before[0])
    assert torch.equal(expert_ids, before[1])


# Global counts.

GLOBAL_LOSSES = [loss for loss in LOSSES if loss not in ("gshard", "deepseek_sequence")]


def counts_of(expert_ids, E):
    return torch.bincount(expert_ids.flatten(), minlength=E)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("loss", GLOBAL_LOSSES)
def test_the_batchs_own_counts_given_change_nothing(loss, dtype):
    logits = draw_logits(8, 6, seed=10)
    expert_ids = choose(logits, 2)
    counts = counts_of(expert_ids, 6).to(dtype)
    own = balance_loss(logits, expert_ids, config_for(loss))
    torch.testing.assert_close(
        balance_loss(logits, expert_ids, config_for(loss), None, counts), own
    )


@pytest.mark.parametrize("loss", GLOBAL_LOSSES)
def test_the_mean_over_ranks_with_global_counts_is_the_global_loss(loss):
    logits = draw_logits(12, 6, seed=11)
    whole = logits.clone().requires_grad_()
    expert_ids = choose(logits, 2)
    config = config_for(loss)
    counts = counts_of(expert_ids, 6)
    loss_all = balance_loss(whole, expert_ids, config)
    parts = logits.clone().requires_grad_()
    ranks = [slice(0, 4), slice(4, 8), slice(8, 12)]
    loss_ranks = sum(
        balance_loss(parts[rows], expert_ids[rows], config, None, counts) for rows in ranks
    )
    torch.testing.assert_close(loss_ranks / 3, loss_all)
    (want,) = torch.autograd.grad(loss_all, whole)
    (got,) = torch.autograd.grad(loss_ranks / 3, parts)
    torch.testing.assert_close(got, want)


# z-loss.


def test_the_z_loss_is_the_mean_square_of_the_logsumexp():
    logits = draw_logits(7, 5, seed=12)
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()]
    assert z_loss(logits).item() == pytest.approx(sum(squares) / 7, rel=1e-12)
    mask = torch.arange(7) < 3
    assert z_loss(logits, mask).item() == pytest.approx(sum(squares[:3]) / 3, rel=1e-12)
    assert z_loss(logits.bfloat16()).dtype == torch.float32
    assert z_loss(torch.full((2, 4), 1e4)).isfinite()


# Bias update.


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    rate=st.sampled_from([1e-3, 0.5]),
    centred=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64, torch.float32]),
)
@settings(max_examples=100, deadline=None)
def test_the_bias_moves_against_the_load(counts, rate, centred, dtype):
    bias = torch.linspace(-1, 1, len(counts))
    before = bias.clone()
    got = update_bias(bias, torch.tensor(counts, dtype=dtype), rate, centred)
    mean = sum(counts) / len(counts)
    steps = [rate * ((mean > c) - (mean < c)) for c in counts]
    if centred:
        steps = [step - sum(steps) / len(steps) for step in steps]
    want = [b + step for b, step in zip(before.tolist(), steps, strict=True)]
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert torch.equal(bias, before)


def test_a_centred_update_keeps_the_sum_of_the_biases():
    counts = torch.tensor([9, 1, 1, 1])
    for centred, drift in ((True, 0.0), (False, 2 * 0.001)):
        bias = update_bias(torch.zeros(4), counts, 0.001, centred)
        assert bias.sum().item() == pytest.approx(drift, abs=1e-9)


def test_large_counts_are_compared_exactly():
    counts = torch.tensor([2**25 + 1, 2**25 + 1, 2**25, 2**25 + 2])
    bias = update_bias(torch.zeros(4), counts, 1.0, False)
    assert bias.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_a_narrow_bias_is_not_rounded_back():
    bias = update_bias(torch.full((2,), 0.5).bfloat16(), torch.tensor([3, 1]), 1e-3, False)
    assert bias.dtype == torch.float32
    assert bias.tolist() == pytest.approx([0.499, 0.501])


# Joining the graph.


class Model:
    """x -> x times a weight per expert choice, with a loss on the router's logits."""

    def __init__(self):
        self.router = draw_logits(4, 6, seed=13, spread=0.5).requires_grad_()
        self.x = draw_logits(8, 4, seed=14)
        self.target = draw_logits(8, 1, seed=15)

    def forward(self):
        logits = self.x @ self.router
        weights, expert_ids = route(logits, RoutingConfig(top_k=2))
        output = weights.sum(1, keepdim=True) * self.target
        return output, balance_loss(logits, expert_ids, BalanceConfig(coefficient=0.1))

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.router)[0]


def test_an_injected_loss_has_the_gradient_of_the_sum():
    model = Model()
    output, loss = model.forward()
    want = model.gradient(output.square().sum() + loss)
    output, loss = model.forward()
    for joined in (inject_loss(output, loss), inject_scaled_loss(output, loss, 1.0)):
        assert torch.equal(joined, output)
        got = torch.autograd.grad(joined.square().sum(), model.router, retain_graph=True)[0]
        torch.testing.assert_close(got, want)


def test_loss_scaling_leaves_the_injected_loss_behind_unless_it_is_told():
    model, scale = Model(), 1024.0
    main = model.gradient(model.forward()[0].square().sum())
    auxiliary = model.gradient(model.forward()[1])
    unscaled = {}
    for name, join in (
        ("inject_loss", inject_loss),
        ("inject_scaled_loss", lambda output, loss: inject_scaled_loss(output, loss, scale)),
    ):
        total = join(*model.forward()).square().sum() * scale
        unscaled[name] = model.gradient(total) / scale
    torch.testing.assert_close(unscaled["inject_loss"], main + auxiliary / scale)
    torch.testing.assert_close(unscaled["inject_scaled_loss"], main + auxiliary)


def test_the_scale_is_read_when_backward_runs():
    model, scale = Model(), torch.ones(1)
    joined = inject_scaled_loss(*model.forward(), scale)
    scale.fill_(4.0)
    got = model.gradient((joined * 0.0).sum())
    torch.testing.assert_close(got, 4.0 * model.gradient(model.forward()[1]))


def test_recomputation_counts_the_loss_once():
    model = Model()
    want = model.gradient(inject_loss(*model.forward()).sum())
    recomputed = checkpoint(lambda _: inject_loss(*model.forward()), model.x, use_reentrant=False)
    torch.testing.assert_close(model.gradient(recomputed.sum()), want)


def test_no_loss_injects_nothing():
    output = torch.ones(3, requires_grad=True)
    for joined in (inject_loss(output, None), inject_scaled_loss(output, None, 8.0)):
        assert torch.equal(torch.autograd.grad(joined.sum(), output)[0], torch.ones(3))


def test_the_output_may_be_changed_in_place_afterwards():
    loss = torch.tensor(2.0, requires_grad=True)
    output = torch.ones(3, requires_grad=True)
    joined = inject_loss(output * 1.0, loss * 3.0)
    joined += 1.0
    joined.sum().backward()
    assert loss.grad.item() == 3.0


# Bad arguments.

LOGITS, IDS = torch.zeros(8, 6), torch.zeros(8, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(6)}, ValueError, r"logits: expected shape \[T, E\]"),
        ({"expert_ids": IDS[:7]}, ValueError, r"expert_ids: expected shape \[8, K\], got \[7, 2\]"),
        ({"expert_ids": IDS.float()}, TypeError, r"expert_ids: expected dtype int32 or int64"),
        ({"padding_mask": torch.ones(8)}, TypeError, r"padding_mask: expected dtype bool"),
        ({"padding_mask": torch.ones(7).bool()}, ValueError, r"padding_mask: expected shape \[8\]"),
        ({"tokens_per_expert": torch.ones(5)}, ValueError, r"tokens_per_expert: .* \[6\], got"),
        (
            {"config": BalanceConfig("gshard"), "tokens_per_expert": torch.ones(6)},
            ValueError,
            r"tokens_per_expert: expected None with 'gshard'",
        ),
        ({"config": BalanceConfig("deepseek_sequence")}, ValueError, r"sequence_length: .* None"),
        (
            {"config": BalanceConfig("deepseek_sequence", sequence_length=3)},
            ValueError,
            r"sequence_length: expected a divisor of T = 8, got 3",
        ),
        ({"config": BalanceConfig("deepseek_device")}, ValueError, r"num_devices: .* got None"),
        (
            {"config": BalanceConfig("deepseek_device", num_devices=4)},
            ValueError,
            r"num_devices: expected a divisor of E = 6, got 4",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"logits": LOGITS, "expert_ids": IDS, "config": BalanceConfig(), **changes}
    with pytest.raises(error, match=message):
        balance_loss(**arguments)


def test_bad_arguments_of_the_others_are_named():
    with pytest.raises(ValueError, match=r"logits: expected shape"):
        z_loss(torch.zeros(3))
    with pytest.raises(TypeError, match=r"padding_mask: expected dtype bool"):
        z_loss(LOGITS, torch.ones(8))
    with pytest.raises(ValueError, match=r"tokens_per_expert: expected shape \[4\], got \[3\]"):
        update_bias(torch.zeros(4), torch.zeros(3), 1.0, False)
    with pytest.raises(ValueError, match=r"loss: expected shape \[\], got \[1\]"):
        inject_loss(torch.ones(2), torch.ones(1))


def test_a_coefficient_multiplies_the_loss():
    logits = draw_logits(8, 6, seed=16)
    expert_ids = choose(logits, 2)
    one = balance_loss(logits, expert_ids, BalanceConfig())
    assert balance_loss(logits, expert_ids, replace(BalanceConfig(), coefficient=0.0)).item() == 0.0
    tenth = balance_loss(logits, expert_ids, replace(BalanceConfig(), coefficient=0.1))
    torch.testing.assert_close(tenth, one * 0.1)
