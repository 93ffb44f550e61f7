import dataclasses
import math

import pytest
import torch
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.dispatch import batch_rows, combine, dispatch, unbatch_rows
from moe_reference.experts import (
    activate,
    experts,
    experts_batched,
    experts_grouped,
    grouped_product,
    init_experts,
)

EXPERTS = (1, 2, 3, 7, 8, 72, 257)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EVALUATIONS = (experts, experts_grouped)
GATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai", "swiglu_limit")
CONFIGS = [ExpertsConfig(name, limit=0.7) for name in GATED] + [
    ExpertsConfig(name, gated=False) for name in GATED[:5]
]


def random_experts(num_experts, hidden, intermediate, config, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gated = config.gated
    drawn = init_experts(num_experts, hidden, intermediate, gated, bias, generator, torch.float64)
    return map_weights(lambda weight: 2 * weight, drawn)


def map_weights(function, weights):
    return ExpertWeights(*(None if w is None else function(w) for w in vars(weights).values()))


def random_inputs(tokens, top_k, num_experts, hidden=5, seed=0):
    """x, weights (NaN where not here) and ids, some of them not here, some twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    return x, weights.masked_fill((ids < 0) | (ids >= num_experts), math.nan), ids


def activated_by_hand(name, gate, up, alpha, limit):
    """The published formulas, spelled out."""
    phi = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    below = torch.where(gate > limit, limit, gate)
    inside = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return {
        "silu": gate / (1 + torch.exp(-gate)) * up,
        "gelu": gate * phi * up,
        "gelu_tanh": 0.5 * gate * (1 + torch.tanh(inner)) * up,
        "relu": torch.where(gate > 0, gate, 0.0) * up,
        "relu2": torch.where(gate > 0, gate**2, 0.0) * up,
        "swigluoai": (inside + 1) * below / (1 + torch.exp(-alpha * below)),
        "swiglu_limit": below / (1 + torch.exp(-below)) * inside,
    }[name]


def one_hot_experts(x, weights, routed_weights, ids, config):
    """Every expert on every pair, and a one-hot choice among them: [T, K, E] by einsum."""
    E, _, I = weights.down.shape
    choice = (ids[..., None] == torch.arange(E)).to(x)
    routed = routed_weights.where(choice.sum(-1) > 0, 0.0)
    x_pairs = x[:, None, :].expand(-1, ids.shape[1], -1)
    if config.weight_on == "input":
        x_pairs = x_pairs * routed[..., None]
    pre = torch.einsum("tkh,ejh->tkej", x_pairs, weights.gate_up)
    if weights.gate_up_bias is not None:
        pre = pre + weights.gate_up_bias
    gate = pre[..., :I]
    up = pre[..., I:] if config.gated else torch.ones_like(gate)
    inner = activated_by_hand(config.activation, gate, up, config.alpha, config.limit)
    out = torch.einsum("tkei,ehi->tkeh", inner, weights.down)
    if weights.down_bias is not None:
        out = out + weights.down_bias
    if config.weight_on == "output":
        choice = choice * routed[..., None]
    return torch.einsum("tke,tkeh->th", choice, out)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activation}-{c.gated}")
def test_each_activation_equals_its_formula(config):
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 12).requires_grad_()
    gate, up = x.chunk(2, -1) if config.gated else (x, torch.ones_like(x))
    by_hand = activated_by_hand(config.activation, gate, up, config.alpha, config.limit)
    torch.testing.assert_close(activate(x, config), by_hand)
    assert torch.autograd.gradcheck(lambda x: activate(x, config), x)


def test_swigluoai_clamps_the_gate_above_only():
    config = ExpertsConfig("swigluoai")
    far = torch.tensor([[9.0, 9.0], [9.0, -9.0], [-9.0, 9.0], [7.0, 7.0]], dtype=torch.float64)
    expected = [7 * 8, 7 * -6, -9 / (1 + math.exp(1.702 * 9)) * 8, 7 * 8]
    assert activate(far, config).flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activation}-{c.gated}")
def test_experts_equal_one_hot_products(evaluate, weight_on, bias, config):
    config = dataclasses.replace(config, weight_on=weight_on)
    x, routed, ids = random_inputs(9, 3, 4)
    weights = random_experts(4, 5, 3, config, bias)
    expected = one_hot_experts(x, weights, routed, ids, config)
    torch.testing.assert_close(evaluate(x, weights, routed, ids, config), expected)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_any_number_of_experts_and_tokens(evaluate, num_experts):
    config = ExpertsConfig()
    weights = random_experts(num_experts, 5, 2, config)
    for tokens, top_k in [(0, 2), (1, 1), (5, 3), (4, min(num_experts, 72))]:
        x, routed, ids = random_inputs(tokens, top_k, num_experts, seed=tokens)
        output = evaluate(x, weights, routed, ids.int(), config)
        assert output.shape == x.shape
        torch.testing.assert_close(output, one_hot_experts(x, weights, routed, ids, config))


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_every_expert_at_once(evaluate):
    config = ExpertsConfig()
    x, _, _ = random_inputs(6, 1, 8)
    ids = torch.stack([torch.randperm(8) for _ in range(6)])
    weights, routed = random_experts(8, 5, 3, config), torch.rand(6, 8, dtype=torch.float64)
    expected = one_hot_experts(x, weights, routed, ids, config)
    torch.testing.assert_close(evaluate(x, weights, routed, ids, config), expected)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_with_a_map_ids_are_global(evaluate, dtype):
    config = ExpertsConfig()
    x, routed, ids = random_inputs(20, 3, 6)
    everything = random_experts(6, 5, 3, config)
    rows = torch.tensor([-1, 2, -1, 0, 1, -1])
    local = map_weights(lambda weight: weight[[3, 4, 1]], everything)
    here = torch.isin(ids, torch.tensor([1, 3, 4]))
    routed = routed.where(here, math.nan)
    output = evaluate(x, local, routed, ids, config, rows.to(dtype))
    expected = one_hot_experts(x, everything, routed, ids.where(here, -1), config)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_gradients(evaluate, weight_on):
    config = ExpertsConfig("gelu", weight_on=weight_on)
    x, routed, ids = random_inputs(4, 2, 3, hidden=3)
    routed = routed.nan_to_num(0.5)
    weights = random_experts(3, 3, 2, config)
    inputs = [t.requires_grad_() for t in (x, routed, *vars(weights).values())]
    assert torch.autograd.gradcheck(
        lambda x, routed, *w: evaluate(x, ExpertWeights(*w), routed, ids, config), inputs
    )


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("num_experts", [0, 3])
@pytest.mark.parametrize("tokens", [0, 4])
def test_where_nothing_is_routed_gradients_are_zero(evaluate, num_experts, tokens):
    config = ExpertsConfig()
    x, _, _ = random_inputs(tokens, 2, num_experts)
    routed = torch.full((tokens, 2), math.nan, dtype=torch.float64)
    weights = random_experts(num_experts, 5, 3, config)
    inputs = [t.requires_grad_() for t in (x, routed, *vars(weights).values())]
    ids = torch.full((tokens, 2), -1)
    output = evaluate(x, weights, routed, ids, config)
    assert torch.equal(output, torch.zeros(tokens, 5, dtype=torch.float64))
    output.sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_idle_experts_have_zero_gradients_even_where_they_are_not_finite(evaluate):
    config = ExpertsConfig()
    x, _, _ = random_inputs(4, 2, 3)
    weights = random_experts(3, 5, 3, config)
    weights.gate_up[1] = math.nan
    weights.down[2] = math.inf
    inputs = [t.requires_grad_() for t in vars(weights).values()]
    routed = torch.ones(4, 2, dtype=torch.float64)
    output = evaluate(x, weights, routed, torch.zeros(4, 2, dtype=torch.int64), config)
    assert bool(output.isfinite().all())
    output.sum().backward()
    for tensor in inputs:
        assert bool(tensor.grad[0].any())
        assert not bool(tensor.grad[1:].any())


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_the_exact_one_rounded_to_the_dtype_of_x(evaluate, dtype):
    config = ExpertsConfig()
    x, routed, ids = random_inputs(16, 3, 4, hidden=24)
    weights = map_weights(lambda w: w.to(dtype), random_experts(4, 24, 16, config))
    x = x.to(dtype)
    output = evaluate(x, weights, routed.float(), ids, config)
    wide = map_weights(torch.Tensor.double, weights)
    exact = one_hot_experts(x.double(), wide, routed.float().double(), ids, config)
    assert output.dtype == dtype
    # Half an ulp of the dtype, and what float32 sums may be off by.
    unit = max(torch.finfo(dtype).eps / 2, 0.0 if dtype == torch.float64 else 2e-6)
    tolerance = {"rtol": 1.01 * unit if dtype != torch.float64 else 1e-12, "atol": 2e-6}
    torch.testing.assert_close(output.double(), exact, **tolerance)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_any_dtype_are_taken(evaluate, weight_dtype):
    config = ExpertsConfig()
    x, routed, ids = random_inputs(5, 2, 3)
    weights = map_weights(lambda w: w.to(weight_dtype), random_experts(3, 5, 4, config))
    output = evaluate(x.float(), weights, routed.to(weight_dtype), ids, config)
    wide = map_weights(torch.Tensor.double, weights)
    expected = one_hot_experts(x, wide, routed.to(weight_dtype).double(), ids, config)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_a_token_that_is_not_finite_stays_alone(evaluate):
    config = ExpertsConfig()
    x, _, ids = random_inputs(6, 2, 3)
    weights, routed = random_experts(3, 5, 3, config), torch.ones(6, 2, dtype=torch.float64)
    ids = ids.clamp(0, 2)
    clean = evaluate(x, weights, routed, ids, config)
    x[2], x[4] = math.nan, math.inf
    dirty = evaluate(x, weights, routed, ids, config)
    others = [0, 1, 3, 5]
    torch.testing.assert_close(dirty[others], clean[others])
    assert not bool(dirty[[2, 4]].isfinite().any())


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_any_strides_are_right_and_nothing_is_changed(evaluate):
    config = ExpertsConfig()
    x, routed, ids = random_inputs(8, 4, 3, hidden=10)
    x, routed, ids = x.T.contiguous().T[::2, ::2], routed[::2, ::2], ids[::2, 1::2]
    routed = routed.nan_to_num(0.5)
    weights = map_weights(
        lambda w: w.transpose(0, -1).contiguous().transpose(0, -1), random_experts(3, 5, 4, config)
    )
    given = (x, routed, ids, *vars(weights).values())
    before = [t.clone() for t in given]
    plain = map_weights(torch.Tensor.contiguous, weights)
    output = evaluate(x, weights, routed, ids, config)
    expected = evaluate(x.contiguous(), plain, routed.contiguous(), ids.contiguous(), config)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_the_bias_of_the_output_is_weighted_on_the_output_only():
    weights = ExpertWeights(
        torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1)
    )
    args = (torch.ones(1, 1), weights, torch.full((1, 2), 0.25), torch.zeros(1, 2).long())
    on_output = ExpertsConfig("relu", gated=False)
    on_input = dataclasses.replace(on_output, weight_on="input")
    for evaluate in EVALUATIONS:
        assert evaluate(*args, on_output).item() == 0.5
        assert evaluate(*args, on_input).item() == 2.0


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("gated", [True, False])
def test_the_batched_evaluation_agrees_with_the_loop(num_experts, gated):
    config = ExpertsConfig(gated=gated)
    x, routed, ids = random_inputs(11, 3, num_experts)
    weights = random_experts(num_experts, 5, 3, config)
    rows, counts, slots = dispatch(x, ids, num_experts)
    batched = batch_rows(rows, counts, int(counts.max()) + 2)
    past = torch.arange(batched.shape[1]) >= counts[:, None]
    outputs = experts_batched(
        batched.masked_fill(past[..., None], math.nan), counts, weights, config
    )
    assert not bool(outputs[past].any())
    combined = combine(unbatch_rows(outputs, counts), slots, routed)
    torch.testing.assert_close(combined, experts(x, weights, routed, ids, config))


def test_batched_gradients_and_rows_past_the_count():
    config = ExpertsConfig()
    weights = random_experts(3, 3, 2, config)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    counts = torch.tensor([2, 0, 1], dtype=torch.int32)
    inputs = [t.requires_grad_() for t in (x, *vars(weights).values())]
    assert torch.autograd.gradcheck(
        lambda x, *w: experts_batched(x, counts, ExpertWeights(*w), config), inputs
    )
    experts_batched(x, torch.zeros_like(counts), weights, config).sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5)])
def test_an_empty_batch(shape):
    config = ExpertsConfig()
    weights = random_experts(shape[0], 5, 2, config)
    counts = torch.zeros(shape[0], dtype=torch.int64)
    x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    output = experts_batched(x, counts, weights, config)
    assert (output.shape, output.dtype) == (shape, torch.bfloat16)
    output.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_initial_weights_have_the_fan_in_of_one_expert():
    weights = init_experts(8, 512, 64, bias=True, generator=torch.Generator().manual_seed(0))
    bounds = {"gate_up": 512, "gate_up_bias": 512, "down": 64, "down_bias": 64}
    for name, fan_in in bounds.items():
        weight = getattr(weights, name)
        bound = fan_in**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for expert in weights.gate_up:
        assert expert.std().item() == pytest.approx(512**-0.5 / math.sqrt(3), rel=0.02)
    assert init_experts(2, 4, 3, gated=False, dtype=torch.bfloat16).gate_up.shape == (2, 3, 4)


X, IDS, ROUTED = torch.zeros(2, 4), torch.zeros(2, 1).long(), torch.zeros(2, 1)
W, CONFIG = ExpertWeights(torch.zeros(3, 6, 4), torch.zeros(3, 4, 3)), ExpertsConfig()
BIAS = torch.zeros(3, 5)


def changed(**fields):
    return dataclasses.replace(W, **fields)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X[0], W, ROUTED, IDS, CONFIG), ValueError, r"x: expected shape \[T, H\]"),
        ((X.int(), W, ROUTED, IDS, CONFIG), TypeError, "x: expected dtype"),
        ((X, None, ROUTED, IDS, CONFIG), TypeError, "experts: expected ExpertWeights"),
        ((X[:, :3], W, ROUTED, IDS, CONFIG), ValueError, r"experts.down: expected shape \[E, 3, I"),
        ((X, changed(gate_up=BIAS), ROUTED, IDS, CONFIG), ValueError, "experts.gate_up: expected"),
        ((X, W, ROUTED, IDS, ExpertsConfig(gated=False)), ValueError, r"expected shape \[3, 3, 4"),
        ((X, changed(gate_up_bias=BIAS), ROUTED, IDS, CONFIG), ValueError, "experts.gate_up_bias"),
        (
            (X, changed(down_bias=BIAS), ROUTED, IDS, CONFIG),
            ValueError,
            "experts.down_bias: expected",
        ),
        ((X, W, ROUTED[:1], IDS, CONFIG), ValueError, r"weights: expected shape \[2, K\]"),
        ((X, W, IDS, IDS, CONFIG), TypeError, "weights: expected dtype"),
        ((X, W, ROUTED, IDS[:1], CONFIG), ValueError, r"expert_ids: expected shape \[2, 1\]"),
        ((X, W, ROUTED, IDS.float(), CONFIG), TypeError, "expert_ids: expected dtype"),
        ((X, W, ROUTED, IDS, CONFIG, IDS[0] + 3), ValueError, "expert_map: expected rows below 3"),
    ],
)
def test_bad_arguments_are_named(args, error, message):
    for evaluate in EVALUATIONS:
        with pytest.raises(error, match=message):
            evaluate(*args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: experts_batched(X, IDS[0], W, CONFIG), ValueError, r"x: expected shape \[E, C, H"),
        (
            lambda: experts_batched(X[None], IDS[0] + 3, W, CONFIG),
            ValueError,
            "tokens_per_expert: expected counts from 0 to 2, got 3",
        ),
        (
            lambda: experts_batched(X[None], IDS[0], W, CONFIG),
            ValueError,
            r"experts.down: expected shape \[1, 4, I\]",
        ),
        (lambda: activate(torch.zeros(3), CONFIG), ValueError, "pre_activation: expected an even"),
        (lambda: activate([0.0, 0.0], CONFIG), TypeError, "pre_activation: expected a tensor"),
        (lambda: init_experts(1, 0, 1), ValueError, "hidden_size: expected at least 1"),
    ],
)
def test_other_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(weight_on, dtype):
    weights = init_experts(3, 4, 5, bias=True, generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = torch.tensor([[0, 2]] * 6)
    given = (x, weights, torch.full((6, 2), 0.3), ids, ExpertsConfig(weight_on=weight_on))
    for evaluate in (experts, experts_grouped):
        plain = evaluate(*given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(evaluate(*given), plain)


def test_ends_that_are_not_those_of_the_rows_are_refused():
    for ends in ([1, 2], [2, 4], []):
        with pytest.raises(ValueError, match="ends: expected the last one at 3, got"):
            grouped_product(torch.ones(3, 1), torch.ones(len(ends), 1, 1), None,
                            torch.tensor(ends, dtype=torch.int64))  # fmt: skip
