"""The adapters for transformers against a small float64 oracle of their own.

What is asked here is whether the adapters translate faithfully; whether the library is right is the
suite's business. Where the library is known to differ, the case is marked with what it does.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from moe_conformance.target import Unsupported
from moe_conformance.targets import transformers as adapter
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

VARIANTS = list(adapter.variants())
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNIT = {
    torch.float64: 2.0**-50,
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}
"""A few roundings: wide enough for any order of summation, too narrow for a wrong layout."""

DEEPSEEK = RoutingConfig(
    top_k=3,
    score="sigmoid",
    renormalize=True,
    epsilon=1e-20,
    scale=2.5,
    num_groups=4,
    topk_groups=2,
    group_score="top2_sum",
)
ROUTING = {
    "mixtral": [RoutingConfig(3, renormalize=True)],
    "qwen3_moe": [RoutingConfig(3, renormalize=True), RoutingConfig(3)],
    "deepseek_v3": [
        DEEPSEEK,
        dataclasses.replace(DEEPSEEK, num_groups=1, topk_groups=1, group_score="max"),
        dataclasses.replace(DEEPSEEK, renormalize=False, epsilon=0.0),
    ],
    "gpt_oss": [RoutingConfig(3, order="topk_then_score")],
}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda gate: F.relu(gate) ** 2,
}
T, H, I, E, K = 11, 16, 24, 8, 3

# Defects of transformers, on docs/findings.md. Strict: one that is mended there has to leave here.
NO_SENTINEL = pytest.mark.xfail(
    reason="GptOssExperts.forward gives one_hot E classes and so refuses the sentinel E",
    raises=pytest.RaisesExc(RuntimeError, match="Class values must be smaller than num_classes"),
)
NO_GRADIENT = pytest.mark.xfail(
    reason="eager starts from zeros_like(x), which has no gradient when nothing is added",
    raises=pytest.RaisesExc(AssertionError, match="requires_grad"),
)


@pytest.fixture(scope="module", params=VARIANTS)
def target(request):
    return adapter.variants()[request.param]()


def _family(target):
    return target.name.removeprefix("transformers/").rpartition("-")[0]


def _dtypes(target):
    return [d for d in FLOATS if str(d).removeprefix("torch.") in target.capabilities.dtypes]


def _map(experts, change):
    """Expert weights with `change` applied to each tensor, in the graph of what was given."""
    values = (getattr(experts, field.name) for field in dataclasses.fields(experts))
    return ExpertWeights(*(None if value is None else change(value) for value in values))


def _route(logits, config, bias=None):
    """[T, E] dense weights in float64, zero where an expert was not chosen."""
    logits = logits.double()
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    keys = scores if bias is None else scores + bias.double()
    if config.num_groups > 1:
        grouped = keys.unflatten(1, (config.num_groups, -1))
        groups = grouped.topk(2).values.sum(-1).topk(config.topk_groups).indices
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(1, groups, False)
        keys = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
    ids = keys.topk(config.top_k).indices
    if config.order == "topk_then_score":
        weights = logits.gather(1, ids).softmax(-1)
    else:
        weights = scores.gather(1, ids)
    if config.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + config.epsilon)
    return torch.zeros_like(logits).scatter(1, ids, weights * config.scale)


def _expert(x, experts, e, config):
    hidden = x @ experts.gate_up[e].T
    if experts.gate_up_bias is not None:
        hidden = hidden + experts.gate_up_bias[e]
    gate, up = hidden.chunk(2, -1)
    if config.activation == "swigluoai":
        gate, up = gate.clamp(max=config.limit), up.clamp(-config.limit, config.limit) + 1
        hidden = gate * torch.sigmoid(config.alpha * gate) * up
    else:
        hidden = ACTIVATIONS[config.activation](gate) * up
    out = hidden @ experts.down[e].T
    return out if experts.down_bias is None else out + experts.down_bias[e]


def _experts(x, experts, dense, config):
    """Weighted sum over all experts, for dense weights [T, E] in float64."""
    x = x.double()
    experts = _map(experts, torch.Tensor.double)
    return sum(dense[:, e, None] * _expert(x, experts, e, config) for e in range(dense.shape[1]))


def _dense(weights, ids, num_experts):
    return torch.zeros(len(ids), num_experts, dtype=torch.float64).index_put(
        (torch.arange(len(ids))[:, None], ids), weights.double(), accumulate=True
    )


def _normal(*shape, seed=0, std=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def _weights(dtype, num_experts, intermediate, biased, seed=1):
    sizes = {"gate_up": (2 * intermediate, H), "down": (H, intermediate)}
    made = {
        name: _normal(num_experts, *size, seed=seed + i, std=size[-1] ** -0.5).to(dtype)
        for i, (name, size) in enumerate(sizes.items())
    }
    if biased:
        made["gate_up_bias"] = _normal(num_experts, 2 * intermediate, seed=seed + 2).to(dtype)
        made["down_bias"] = _normal(num_experts, H, seed=seed + 3).to(dtype)
    return ExpertWeights(**made)


def _batch(target, dtype, seed=0):
    """x, expert weights, routing weights and ids, with biases where the family has them."""
    biased = _family(target) == "gpt_oss"
    ids = _normal(T, E, seed=seed + 8).topk(K).indices
    x = _normal(T, H, seed=seed).to(dtype)
    return x, _weights(dtype, E, I, biased), _normal(T, K, seed=seed + 9).softmax(-1), ids


def _config(target):
    if _family(target) == "gpt_oss":
        return ExpertsConfig("swigluoai", alpha=1.3, limit=1.5)
    return ExpertsConfig("silu")


def _close(actual, expected, unit, what=""):
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= unit, f"{what}: off by {error:.2e} of the largest value"


def test_variants_are_listed_without_torch_or_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("listed_alone", adapter.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert list(module.variants()) == VARIANTS
    assert len(VARIANTS) == 12


@pytest.mark.parametrize("found", ["", "5.19.1"])
def test_a_missing_or_old_library_is_one_sentence(monkeypatch, found):
    def version(name):
        if not found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"mixtral-eager needs .* 5.20, found {found or 'none'}"):
        adapter.variants()["mixtral-eager"]()


def test_a_target_says_what_it_is(target):
    assert target.name.startswith("transformers/")
    assert target.version == importlib.metadata.version("transformers")
    loss = ("balance_loss",) if _family(target) != "deepseek_v3" else ()
    assert type(target).operations() == ("route", *loss, "experts", "layer")
    declared = target.capabilities
    restored = type(declared).from_json(json.loads(json.dumps(declared.to_json())))
    for area in ("routing", "experts", "layer"):
        assert restored.alternatives(area) == declared.alternatives(area)


def test_route_agrees_with_the_oracle(target):
    for dtype in _dtypes(target):
        for config in ROUTING[_family(target)]:
            logits = _normal(40, 16, std=2.0).to(dtype)
            bias = _normal(16, seed=3) if config.score == "sigmoid" else None
            weights, ids = target.route(logits, config, bias)
            assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ids.dtype == torch.int64
            # The routers compute in float32 at best.
            unit = max(UNIT[dtype], UNIT[torch.float32])
            _close(_dense(weights, ids, 16), _route(logits, config, bias), unit, str(dtype))


def test_logits_pass_the_identity_to_the_last_bit(target, monkeypatch):
    seen = []
    call = adapter._call
    monkeypatch.setattr(adapter, "_call", lambda *given: seen.append(call(*given)) or seen[-1])
    config = ROUTING[_family(target)][0]
    for dtype in _dtypes(target):
        logits = torch.cat((_normal(8, 8, std=9.0), _normal(8, 8, std=1e-6) + 7)).to(dtype)
        logits[0, :4] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0, 1.0])
        # DeepseekV3TopkRouter casts float64 to float32 first, so the logits fit float32.
        logits = logits.float().clamp(-3e38, 3e38).to(dtype)
        target.route(logits, config)
        assert torch.equal(seen.pop()[0].double(), logits.double())


def test_route_has_a_gradient(target):
    for config in ROUTING[_family(target)]:
        logits = _normal(9, 16, std=2.0).requires_grad_()
        cotangent = _normal(9, 16, seed=5).double()
        weights, ids = target.route(logits, config)
        (_dense(weights, ids, 16) * cotangent).sum().backward()
        leaf = logits.detach().double().requires_grad_()
        (_route(leaf, config) * cotangent).sum().backward()
        _close(logits.grad, leaf.grad, 2.0**-18)


def test_experts_agree_with_the_oracle(target):
    config = _config(target)
    names = [config.activation] if config.activation == "swigluoai" else list(ACTIVATIONS)
    for dtype in _dtypes(target):
        for name in names:
            config = dataclasses.replace(config, activation=name)
            x, experts, weights, ids = _batch(target, dtype)
            out = target.experts(x, experts, weights, ids, config)
            assert out.dtype == dtype
            _close(out, _experts(x, experts, _dense(weights, ids, E), config), UNIT[dtype], name)


def test_a_repeated_expert_counts_twice(target):
    x, experts, weights, ids = _batch(target, torch.float32)
    ids[:, 1] = ids[:, 0]
    out = target.experts(x, experts, weights, ids, _config(target))
    _close(out, _experts(x, experts, _dense(weights, ids, E), _config(target)), 2.0**-20)


def _absent(request, target):
    if target.name == "transformers/gpt_oss-eager":
        request.applymarker(NO_SENTINEL)
    x, experts, weights, ids = _batch(target, torch.float32)
    ids[0, 0], ids[1, 1], ids[2] = -1, E, 99
    weights[0, 0] = torch.nan
    here = ids.remainder(E) == ids
    return x, experts, weights, ids, _dense(weights.where(here, 0), ids.where(here, 0), E)


def test_ids_that_are_not_here_contribute_nothing(request, target):
    x, experts, weights, ids, dense = _absent(request, target)
    leaves = (x, weights, experts.gate_up, experts.down)
    for leaf in leaves:
        leaf.requires_grad_()
    cotangent = _normal(T, H, seed=6)
    out = target.experts(x, experts, weights, ids, _config(target))
    found = torch.autograd.grad((out * cotangent).sum(), leaves)
    expected = _experts(x, experts, dense, _config(target))
    _close(out, expected, 2.0**-20)
    assert not out[2].any()
    wanted = torch.autograd.grad((expected * cotangent).sum(), (x, experts.gate_up, experts.down))
    for actual, want in zip((found[0], *found[2:]), wanted, strict=True):
        _close(actual, want.double(), 2.0**-18)
    assert not found[1][0, 0]
    assert not found[1][2].any()


def test_an_expert_map_gives_local_rows(request, target):
    if target.name == "transformers/gpt_oss-eager":
        request.applymarker(NO_SENTINEL)
    x, experts, weights, _ = _batch(target, torch.float32)
    ids = _normal(T, 12, seed=4).topk(K).indices
    local = torch.tensor([-1, 2, 0, -1, 1, 3, -1, 4, 5, 6, 7, -1], dtype=torch.int32)
    out = target.experts(x, experts, weights, ids, _config(target), local)
    dense = _dense(weights, ids, 12)[:, [2, 4, 1, 5, 7, 8, 9, 10]]
    _close(out, _experts(x, experts, dense, _config(target)), 2.0**-20)


def test_experts_have_gradients(target):
    # A clamp's gradient jumps, and bfloat16 lands on either side of it: none lies within reach.
    config = dataclasses.replace(_config(target), limit=50.0)
    for dtype in (torch.float32, torch.bfloat16):
        x, experts, weights, ids = _batch(target, dtype)
        ids %= E - 1  # one expert gets no token
        given = [x, weights]
        _map(experts, given.append)
        cotangent = _normal(T, H, seed=6).to(dtype)

        def gradients(call, tensors, cotangent=cotangent):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = call(leaves[0], ExpertWeights(*leaves[2:]), leaves[1])
            return torch.autograd.grad((out * cotangent.to(out.dtype)).sum(), leaves)

        found = gradients(lambda x, e, w, ids=ids: target.experts(x, e, w, ids, config), given)
        wanted = gradients(
            lambda x, e, w, ids=ids: _experts(x, e, _dense(w, ids, E), config),
            [t.double() for t in given],
        )
        for actual, want in zip(found, wanted, strict=True):
            _close(actual, want, 4 * UNIT[dtype])


def test_nothing_routed_gives_zeros_with_gradients(request, target):
    if target.name.endswith("eager"):
        request.applymarker(NO_GRADIENT)
    x, experts, weights, ids = _batch(target, torch.float32)
    x.requires_grad_()
    out = target.experts(x[:0], experts, weights[:0], ids[:0], _config(target))
    assert out.shape == (0, H)
    assert out.requires_grad


def test_non_contiguous_tensors_are_taken(target):
    x, experts, weights, ids = _batch(target, torch.float32)

    def turned(tensor):
        return tensor.mT.contiguous().mT

    out = target.experts(
        turned(x), _map(experts, turned), turned(weights), turned(ids), _config(target)
    )
    _close(out, _experts(x, experts, _dense(weights, ids, E), _config(target)), 2.0**-20)


def _layer(target, dtype, shared=None):
    family = _family(target)
    deepseek, biased = family == "deepseek_v3", family == "gpt_oss"
    parameters = LayerWeights(
        router=_normal(E, H, seed=30, std=H**-0.5).to(dtype),
        experts=_weights(dtype, E, I, biased),
        router_bias=_normal(E, seed=31).to(dtype) if biased else None,
        selection_bias=_normal(E, seed=32) if deepseek else None,
        shared=None if shared is None else _weights(dtype, 1, shared, False, seed=33),
    )
    config = LayerConfig(
        ROUTING[family][0],
        _config(target),
        router_dtype=torch.float32 if deepseek else None,
    )
    return _normal(2, 5, H).to(dtype), parameters, config


def test_a_block_agrees_with_the_oracle_stage_by_stage(target):
    widths = (None, 8, 20) if _family(target) == "deepseek_v3" else (None,)
    for dtype in _dtypes(target):
        for shared in widths:
            x, parameters, config = _layer(target, dtype, shared)
            given = target.layer(x, parameters, config, training=True)
            assert given.output.dtype == dtype
            rows = x.flatten(0, 1).double()
            logits = rows @ parameters.router.double().T
            if parameters.router_bias is not None:
                logits = logits + parameters.router_bias.double()
            dense = _dense(given.weights, given.expert_ids, E)
            unit = max(UNIT[dtype], UNIT[torch.float32])
            _close(
                dense, _route(logits, config.routing, parameters.selection_bias), unit, "weights"
            )
            expected = _experts(rows, parameters.experts, dense, config.experts)
            if parameters.shared is not None:
                one = torch.ones(len(rows), 1, dtype=torch.float64)
                expected = expected + _experts(rows, parameters.shared, one, config.experts)
            _close(given.output.flatten(0, 1), expected, UNIT[dtype], "output")


def test_a_block_has_gradients(target):
    deepseek = _family(target) == "deepseek_v3"
    x, parameters, config = _layer(target, torch.float32, 8 if deepseek else None)
    leaves = [x, parameters.router, parameters.experts.gate_up, parameters.experts.down]
    if deepseek:
        leaves += [parameters.shared.gate_up, parameters.shared.down]
    for leaf in leaves:
        leaf.requires_grad_()
    given = target.layer(x, parameters, config, training=True)
    rows = x.flatten(0, 1).double()
    logits = rows @ parameters.router.double().T
    if parameters.router_bias is not None:
        logits = logits + parameters.router_bias.double()
    dense = _route(logits, config.routing, parameters.selection_bias)
    expected = _experts(rows, parameters.experts, dense, config.experts)
    if deepseek:
        one = torch.ones(len(rows), 1, dtype=torch.float64)
        expected = expected + _experts(rows, parameters.shared, one, config.experts)
    cotangent = _normal(*x.shape, seed=6)
    found = torch.autograd.grad((given.output * cotangent).sum(), leaves)
    wanted = torch.autograd.grad((expected.view(x.shape) * cotangent).sum(), leaves)
    for actual, want in zip(found, wanted, strict=True):
        _close(actual, want.double(), 2.0**-18)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_balance_loss_agrees_with_the_oracle(family):
    target = adapter.variants()[f"{family}-eager"]()
    logits = _normal(40, E, std=2.0).requires_grad_()
    ids = logits.topk(2).indices
    mask = _normal(40, seed=2) > 0
    config = BalanceConfig("transformers_concatenated", coefficient=0.5)
    for given in (None, mask):
        loss = target.balance_loss(logits, ids, config, given)
        real = torch.ones(40, dtype=torch.float64) if given is None else given.double()
        leaf = logits.detach().double().requires_grad_()
        share = (_dense(torch.ones(40, 2), ids, E) * real[:, None]).sum(0) / real.sum()
        mean = (leaf.softmax(-1) * real[:, None]).sum(0) / real.sum()
        expected = 0.5 * E * (share * mean).sum()
        _close(loss, expected, 2.0**-20)
        [found] = torch.autograd.grad(loss, logits)
        _close(found, torch.autograd.grad(expected, leaf)[0], 2.0**-18)


def test_calls_outside_the_declaration_are_refused(target):
    x, experts, weights, ids = _batch(target, torch.float32)
    config, routing = _config(target), ROUTING[_family(target)][0]
    refused = [
        lambda: target.route(x, dataclasses.replace(routing, score="sqrtsoftplus")),
        lambda: target.route(x.to(torch.float8_e4m3fn), routing),
        lambda: target.experts(
            x, experts, weights, ids, dataclasses.replace(config, weight_on="input")
        ),
        lambda: target.experts(x, experts, weights, ids, ExpertsConfig("swiglu_limit")),
    ]
    if _family(target) == "deepseek_v3":
        one = dataclasses.replace(routing, top_k=1, num_groups=1, topk_groups=1)
        refused.append(lambda: target.route(x[:, :1], one))
    if target.backend == "eager":
        refused.append(lambda: target.experts(x, experts, weights, ids.int(), config))
    if target.backend == "grouped_mm":
        narrow = ExpertWeights(experts.gate_up[..., :12], experts.down[:, :12])
        refused.append(lambda: target.experts(x[:, :12], narrow, weights, ids, config))
        refused.append(lambda: target.experts(x.double(), experts, weights, ids, config))
    y, parameters, layer = _layer(target, torch.float32)
    gate = dataclasses.replace(parameters, shared_gate=torch.zeros(1, H))
    refused.append(lambda: target.layer(y, gate, layer))
    refused.append(
        lambda: target.layer(y, parameters, dataclasses.replace(layer, shared_scale=2.0))
    )
    for call in refused:
        with pytest.raises(Unsupported, match=target.name):
            call()
