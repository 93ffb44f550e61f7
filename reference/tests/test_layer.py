import dataclasses
import math

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
from moe_reference.experts import experts, init_experts
from moe_reference.layer import layer, moe_infer
from moe_reference.load_balancing import balance_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUTING = RoutingConfig(top_k=2, renormalize=True)


def random_parameters(num_experts=6, hidden=4, shared=True, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_experts)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def drawn_experts(count, width):
        return init_experts(count, hidden, width, bias=bias, generator=generator, dtype=dtype)

    return LayerWeights(
        router=drawn(num_experts, hidden),
        experts=drawn_experts(num_experts, 3),
        router_bias=drawn(num_experts) if bias else None,
        selection_bias=drawn(num_experts) if bias else None,
        shared=drawn_experts(1, 5) if shared else None,
        shared_gate=drawn(1, hidden) if shared and bias else None,
    )


def random_x(sequences=2, length=5, hidden=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(sequences, length, hidden, generator=generator, dtype=torch.float64).to(
        dtype
    )


def swiglu(x, weights, expert):
    """One expert with a silu gate, as a model file writes it."""
    width = weights.down.shape[2]
    gate, up = weights.gate_up[expert][:width], weights.gate_up[expert][width:]
    gated, upped = x @ gate.T, x @ up.T
    if weights.gate_up_bias is not None:
        gated = gated + weights.gate_up_bias[expert][:width]
        upped = upped + weights.gate_up_bias[expert][width:]
    out = (gated * torch.sigmoid(gated) * upped) @ weights.down[expert].T
    return out if weights.down_bias is None else out + weights.down_bias[expert]


def layer_by_hand(x, parameters, shared_scale):
    """Softmax, biased choice of two, renormalised: token by token, expert by expert."""
    rows = []
    for token in x.flatten(0, 1):
        logits = parameters.router @ token
        if parameters.router_bias is not None:
            logits = logits + parameters.router_bias
        scores = torch.exp(logits) / torch.exp(logits).sum()
        by = scores if parameters.selection_bias is None else scores + parameters.selection_bias
        chosen = sorted(range(len(by)), key=lambda e: -by[e].item())[:2]
        total = sum(scores[e] for e in chosen)
        row = sum(scores[e] / total * swiglu(token, parameters.experts, e) for e in chosen)
        if parameters.shared is not None:
            gate = 1.0
            if parameters.shared_gate is not None:
                gate = torch.sigmoid(parameters.shared_gate[0] @ token)
            row = row + shared_scale * gate * swiglu(token, parameters.shared, 0)
        rows.append(row)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_experts", [2, 3, 7, 72])
def test_the_layer_equals_a_loop_over_tokens(bias, shared, num_experts):
    parameters = random_parameters(num_experts, bias=bias, shared=shared)
    x = random_x()
    result = layer(x, parameters, LayerConfig(ROUTING, shared_scale=0.75))
    torch.testing.assert_close(result.output, layer_by_hand(x, parameters, 0.75))
    counts = [(result.expert_ids == e).sum().item() for e in range(num_experts)]
    assert result.tokens_per_expert.tolist() == counts
    assert (result.expert_ids.shape, result.weights.shape) == ((10, 2), (10, 2))
    assert result.balance_loss is None


def test_the_selection_bias_chooses_and_never_weighs():
    parameters = random_parameters()
    config, x = LayerConfig(ROUTING), random_x()
    one = layer(x, parameters, config)
    moved = dataclasses.replace(parameters, selection_bias=parameters.selection_bias + 3)
    assert torch.equal(layer(x, moved, config).output, one.output)
    other = dataclasses.replace(parameters, selection_bias=-parameters.selection_bias)
    assert not torch.equal(layer(x, other, config).expert_ids, one.expert_ids)


def test_the_router_bias_weighs():
    parameters = random_parameters(num_experts=2)
    config, x = LayerConfig(ROUTING), random_x()
    none = dataclasses.replace(parameters, router_bias=None)
    assert not torch.allclose(layer(x, none, config).output, layer(x, parameters, config).output)


def test_a_shared_gate_of_zero_halves_the_shared_expert():
    parameters = random_parameters()
    config, x = LayerConfig(ROUTING), random_x()
    routed, full, half = (
        layer(x, dataclasses.replace(parameters, **fields), config).output
        for fields in (
            {"shared": None, "shared_gate": None},
            {"shared_gate": None},
            {"shared_gate": torch.zeros(1, 4)},
        )
    )
    torch.testing.assert_close(half - routed, (full - routed) / 2)


def test_the_routing_scale_does_not_reach_the_shared_expert():
    parameters, x = random_parameters(), random_x()
    scaled = LayerConfig(dataclasses.replace(ROUTING, scale=2.5))
    routed = dataclasses.replace(parameters, shared=None, shared_gate=None)
    shared = layer(x, parameters, LayerConfig(ROUTING)).output
    shared = shared - layer(x, routed, LayerConfig(ROUTING)).output
    expected = 2.5 * layer(x, routed, LayerConfig(ROUTING)).output + shared
    torch.testing.assert_close(layer(x, parameters, scaled).output, expected)


@pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_routers_dtype_decides_the_logits(dtype, router_dtype):
    parameters, x = random_parameters(dtype=dtype), random_x(dtype=dtype)
    result = layer(x, parameters, LayerConfig(ROUTING, router_dtype=router_dtype))
    product = torch.float64 if dtype == torch.float64 else router_dtype or dtype
    logits = F.linear(
        x.flatten(0, 1).to(product),
        parameters.router.to(product),
        parameters.router_bias.to(product),
    )
    probabilities = logits.double().softmax(-1).gather(1, result.expert_ids)
    expected = probabilities / probabilities.sum(1, keepdim=True)
    wide = torch.float64 if product == torch.float64 else torch.float32
    assert (result.output.dtype, result.weights.dtype) == (dtype, wide)
    # A sum in another order may round to the neighbour.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}.get(product, 3e-3)
    torch.testing.assert_close(result.weights.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_rounded_once(dtype):
    parameters, x = random_parameters(dtype=dtype), random_x(dtype=dtype)
    config = LayerConfig(ROUTING, router_dtype=torch.float64)

    def widened(weights):
        return ExpertWeights(*(t.double() for t in vars(weights).values()))

    wide = LayerWeights(
        parameters.router,
        widened(parameters.experts),
        parameters.router_bias,
        parameters.selection_bias,
        widened(parameters.shared),
        parameters.shared_gate,
    )
    exact = layer(x.double(), wide, config).output
    output = layer(x, parameters, config).output
    torch.testing.assert_close(
        output.double(), exact, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_zero_tokens(shape):
    parameters = random_parameters()
    parameters.router.requires_grad_()
    x = torch.zeros(*shape, 4, dtype=torch.float64, requires_grad=True)
    config = LayerConfig(ROUTING, balance=BalanceConfig("deepseek_sequence"))
    real = torch.ones(shape, dtype=torch.bool)
    result = layer(x, parameters, config, padding_mask=real, training=True)
    assert result.output.shape == (*shape, 4)
    assert (result.expert_ids.shape, result.tokens_per_expert.tolist()) == ((0, 2), [0] * 6)
    result.output.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(parameters.router.grad, torch.zeros_like(parameters.router))


def test_padding_changes_neither_outputs_nor_loss_nor_counts():
    parameters, x = random_parameters(), random_x()
    config = LayerConfig(ROUTING, balance=BalanceConfig("switch"))
    real = torch.ones(2, 8, dtype=torch.bool)
    real[:, 5:] = False
    padded = torch.cat([x, torch.full((2, 3, 4), math.nan, dtype=torch.float64)], 1)
    alone = layer(x, parameters, config, training=True)
    among = layer(padded, parameters, config, padding_mask=real, training=True)
    torch.testing.assert_close(among.output[:, :5], alone.output)
    torch.testing.assert_close(among.balance_loss, alone.balance_loss)
    assert torch.equal(among.tokens_per_expert, alone.tokens_per_expert)


@pytest.mark.parametrize("loss", ["switch", "gshard", "deepseek_sequence"])
def test_the_balance_loss_is_that_of_the_logits_and_training_only(loss):
    parameters, x = random_parameters(), random_x()
    balance = BalanceConfig(loss, coefficient=0.1, sequence_length=5)
    config = LayerConfig(ROUTING, balance=dataclasses.replace(balance, sequence_length=None))
    assert layer(x, parameters, config).balance_loss is None
    assert layer(x, parameters, LayerConfig(ROUTING), training=True).balance_loss is None
    result = layer(x, parameters, config, training=True)
    logits = x.flatten(0, 1) @ parameters.router.T + parameters.router_bias
    expected = balance_loss(logits, result.expert_ids, balance, None, None)
    torch.testing.assert_close(result.balance_loss, expected)
    evaluated = layer(x, parameters, config)
    assert torch.equal(evaluated.output, result.output)


def test_a_hash_table_routes_by_token_id():
    table = torch.tensor([[0, 1], [4, 5], [2, 2]])
    config = LayerConfig(RoutingConfig(top_k=2, hash_table=table))
    token_ids = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]])
    result = layer(random_x(), random_parameters(), config, token_ids=token_ids)
    assert torch.equal(result.expert_ids, table[token_ids.flatten()])


def test_gradients_reach_every_parameter():
    parameters, x = random_parameters(num_experts=3), random_x(1, 3)
    tensors = [x, parameters.router, parameters.router_bias, parameters.shared_gate]
    routed, shared = vars(parameters.experts), vars(parameters.shared)
    tensors += [*routed.values(), *shared.values()]
    config = LayerConfig(
        ROUTING, ExpertsConfig("gelu"), BalanceConfig("switch", coefficient=0.3), shared_scale=0.5
    )

    def call(x, router, router_bias, shared_gate, *weights):
        given = LayerWeights(
            router,
            ExpertWeights(*weights[:4]),
            router_bias,
            parameters.selection_bias,
            ExpertWeights(*weights[4:]),
            shared_gate,
        )
        result = layer(x, given, config, training=True)
        return result.output, result.weights, result.balance_loss

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


def test_any_strides_are_right_and_nothing_is_changed_or_aliased():
    parameters, config = random_parameters(), LayerConfig(ROUTING)
    x = random_x(4, 6, 8).transpose(0, 2).contiguous().transpose(0, 2)[::2, :, ::2]
    before = x.clone()
    result = layer(x, parameters, config)
    torch.testing.assert_close(result.output, layer(x.contiguous(), parameters, config).output)
    assert torch.equal(x, before)
    assert result.output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def random_pairs(tokens, top_k, num_experts):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    return x, ids, weights.masked_fill((ids < 0) | (ids >= num_experts), math.nan)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 72, 257])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_inference_equals_the_definition(num_experts, weight_on):
    config = ExpertsConfig(weight_on=weight_on)
    parameters = init_experts(num_experts, 4, 3, bias=True, dtype=torch.float64)
    for tokens, top_k in [(0, 2), (1, 1), (9, 3), (5, min(num_experts, 8))]:
        x, ids, weights = random_pairs(tokens, top_k, num_experts)
        expected = experts(x, parameters, weights, ids, config)
        torch.testing.assert_close(moe_infer(x, ids.int(), weights, parameters, config), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_takes_every_dtype(dtype):
    x, ids, weights = random_pairs(9, 2, 3)
    parameters = init_experts(3, 4, 3, dtype=dtype)
    args = (weights.float(), ids)
    output = moe_infer(x.to(dtype), args[1], args[0], parameters, ExpertsConfig())
    assert output.dtype == dtype
    torch.testing.assert_close(output, experts(x.to(dtype), parameters, *args, ExpertsConfig()))


def test_inference_leaves_a_token_that_is_not_finite_alone():
    x, ids, _ = random_pairs(6, 2, 3)
    parameters = init_experts(3, 4, 3, dtype=torch.float64)
    x[3] = math.nan
    weights = torch.ones(6, 2, dtype=torch.float64)
    output = moe_infer(x, ids.clamp(0, 2), weights, parameters, ExpertsConfig())
    assert output.isfinite().all(1).tolist() == [True] * 3 + [False] + [True] * 2


X, PARAMETERS, CONFIG = random_x(), random_parameters(), LayerConfig(ROUTING)
TOKEN_IDS = torch.zeros(2, 5).long()


def given(**fields):
    return dataclasses.replace(PARAMETERS, **fields)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer(X[0], PARAMETERS, CONFIG), ValueError, r"x: expected shape \[N, L, H\]"),
        (lambda: layer(X.int(), PARAMETERS, CONFIG), TypeError, "x: expected dtype"),
        (
            lambda: layer(X, PARAMETERS, CONFIG, TOKEN_IDS[0]),
            ValueError,
            "token_ids: expected shape",
        ),
        (lambda: layer(X, PARAMETERS, CONFIG, X[..., 0]), TypeError, "token_ids: expected dtype"),
        (
            lambda: layer(X, PARAMETERS, CONFIG, None, TOKEN_IDS),
            TypeError,
            "padding_mask: expected dtype bool",
        ),
        (
            lambda: layer(X, given(router=X), CONFIG),
            ValueError,
            "parameters.router: expected shape",
        ),
        (lambda: layer(X, given(router_bias=X), CONFIG), ValueError, "parameters.router_bias"),
        (
            lambda: layer(X, given(selection_bias=X), CONFIG),
            ValueError,
            "parameters.selection_bias",
        ),
        (lambda: layer(X, given(experts=PARAMETERS.shared), CONFIG), ValueError, "experts.down"),
        (lambda: layer(X, given(shared=PARAMETERS.experts), CONFIG), ValueError, "shared.down"),
        (lambda: layer(X, given(shared_gate=X[0]), CONFIG), ValueError, "parameters.shared_gate"),
        (lambda: layer(X, given(shared=None), CONFIG), ValueError, "shared_gate: expected None"),
        (
            lambda: layer(X, PARAMETERS, LayerConfig(ROUTING, router_dtype=torch.int32)),
            TypeError,
            "router_dtype: expected a float dtype or None",
        ),
        (
            lambda: layer(X, PARAMETERS, LayerConfig(RoutingConfig(top_k=7))),
            ValueError,
            "top_k: expected at most E = 6",
        ),
        (
            lambda: moe_infer(X, TOKEN_IDS, X[0], PARAMETERS.experts, ExpertsConfig()),
            ValueError,
            r"x: expected shape \[T, H\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_autocast_changes_nothing():
    parameters, x = random_parameters(dtype=torch.float32), random_x(dtype=torch.float32)
    config = LayerConfig(ROUTING)
    plain = layer(x, parameters, config)
    infer = (x[0], plain.expert_ids[:5], plain.weights[:5], parameters.experts, config.experts)
    inferred = moe_infer(*infer)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x, parameters, config)
        assert torch.equal(moe_infer(*infer), inferred)
    assert torch.equal(inside.output, plain.output)
    assert torch.equal(inside.weights, plain.weights)
