"""The adapters for transformers against a small float64 oracle of their own.

What is asked here is whether the adapters translate faithfully; whether the library is right is the
suite's business. Where the library is known to differ, the case is marked with what it does.
"""

import dataclasses
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from moe_conformance import targets
from moe_conformance.target import Unsupported
from moe_conformance.targets import transformers as adapter
from moe_conformance.targets.transformers import routers
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

DOCUMENTED = [f"{each.family}-{name}" for each in adapter.FAMILIES for name in each.documented]
VARIANTS = [f"{each.family}-{backend}" for each in adapter.FAMILIES for backend in each.backends]
PARALLEL = [f"expert_parallel-{backend}" for backend in adapter.BACKENDS]
"""Tested in test_transformers_parallel_target.py."""

FIRST = [f"{each.family}-{each.backends[0]}" for each in adapter.FAMILIES]
"""One variant of each family, for what does not depend on the backend."""

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
QWEN = [RoutingConfig(3, renormalize=True), RoutingConfig(3)]
GROUPED = [
    DEEPSEEK,
    dataclasses.replace(DEEPSEEK, num_groups=1, topk_groups=1, group_score="max"),
    dataclasses.replace(DEEPSEEK, renormalize=False, epsilon=0.0),
]
GREEDY = RoutingConfig(3, scale=16.0)
TABLE = torch.tensor([[0, 1, 2], [3, 7, 5], [6, 4, 2], [1, 3, 5]])
SQRT = RoutingConfig(3, "sqrtsoftplus", renormalize=True, epsilon=1e-20, scale=1.5)
ROUTING = {
    "mixtral": QWEN[:1],
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
    "olmoe": QWEN,
    "deepseek_v2": [
        GREEDY,
        dataclasses.replace(GREEDY, num_groups=4, topk_groups=2, mask_fill="zero"),
    ],
    "deepseek_v3": GROUPED,
    "deepseek_v4": [
        SQRT,
        dataclasses.replace(SQRT, score="sigmoid"),
        dataclasses.replace(SQRT, hash_table=TABLE),
    ],
    "glm4_moe": GROUPED,
    "minimax_m2": [RoutingConfig(3, "sigmoid", renormalize=True)],
    "llama4": [RoutingConfig(k, "sigmoid", order="topk_then_score") for k in (3, 1)],
    "gpt_oss": [RoutingConfig(3, order="topk_then_score")],
}
"""Per family; the first is that of its block here."""

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
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


@pytest.fixture(params=FIRST)
def first(request):
    return adapter.variants()[request.param]()


def _family(target):
    return target.name.removeprefix("transformers/").rpartition("-")[0]


def _dtypes(target):
    return [d for d in FLOATS if str(d).removeprefix("torch.") in target.capabilities.dtypes]


def _map(experts, change):
    """Expert weights with `change` applied to each tensor, in the graph of what was given."""
    values = (getattr(experts, field.name) for field in dataclasses.fields(experts))
    return ExpertWeights(*(None if value is None else change(value) for value in values))


def _route(logits, config, bias=None, token_ids=None):
    """[T, E] dense weights in float64, zero where an expert was not chosen."""
    logits = logits.double()
    scores = SCORES[config.score](logits)
    keys = logits if config.order == "topk_then_score" else scores
    keys = keys if bias is None else keys + bias.double()
    if config.num_groups > 1:
        grouped = keys.unflatten(1, (config.num_groups, -1))
        pair = config.group_score == "top2_sum"
        best = grouped.topk(2).values.sum(-1) if pair else grouped.amax(-1)
        groups = best.topk(config.topk_groups).indices
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(1, groups, False)
        keys = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
    ids = keys.topk(config.top_k).indices
    if config.hash_table is not None:
        ids = config.hash_table[token_ids]
    weights = scores.gather(1, ids)
    if config.order == "topk_then_score" and config.score == "softmax":
        weights = logits.gather(1, ids).softmax(-1)
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
    elif config.activation == "swiglu_limit":
        hidden = F.silu(gate.clamp(max=config.limit)) * up.clamp(-config.limit, config.limit)
    else:
        hidden = ACTIVATIONS[config.activation](gate) * up
    out = hidden @ experts.down[e].T
    return out if experts.down_bias is None else out + experts.down_bias[e]


def _experts(x, experts, dense, config):
    """Weighted sum over all experts, for dense weights [T, E] in float64."""
    x = x.double()
    experts = _map(experts, torch.Tensor.double)
    if config.weight_on == "input":
        return sum(_expert(dense[:, e, None] * x, experts, e, config) for e in range(E))
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
    if _family(target) == "deepseek_v4":
        return ExpertsConfig("swiglu_limit", limit=1.5)
    return ExpertsConfig("silu", weight_on="input" if _family(target) == "llama4" else "output")


def _bias(target):
    """A selection bias where the family has one."""
    [takes] = {each.get("selection_bias") for each in target.capabilities.alternatives("routing")}
    return _normal(E, seed=32) if True in takes else None


def _close(actual, expected, unit, what=""):
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= unit, f"{what}: off by {error:.2e} of the largest value"


def test_variants_are_listed_without_torch_or_transformers(monkeypatch):
    package = adapter.__name__
    # Both are put back afterwards: the modules, and what `targets` calls by that name.
    monkeypatch.setattr(targets, "transformers", adapter)
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    alone = importlib.import_module(package)
    assert alone is not adapter
    assert sorted(alone.variants()) == sorted(VARIANTS + DOCUMENTED + PARALLEL)
    assert len(VARIANTS) == 10 * 3 + 1
    assert len(DOCUMENTED) == 3
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("found", ["none", "5.19.1"])
def test_a_missing_or_old_library_is_one_sentence(needs, found):
    wanted = "transformers/mixtral-eager needs transformers >= 5.20"
    install = "pip install 'moespec[transformers]'"
    needs(adapter.variants()["mixtral-eager"], found, wanted, install)


def test_a_target_says_what_it_is(request, target, says_what_it_is):
    name = request.node.callspec.params["target"]
    says_what_it_is(target, f"transformers/{name}", "transformers")
    without = ("deepseek_v2", "deepseek_v3", "glm4_moe", "llama4")
    loss = ("balance_loss",) if _family(target) not in without else ()
    assert type(target).operations() == ("route", *loss, "experts", "layer")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_documented_only_is_asked_of_the_router_alone(name):
    target = adapter.variants()[name]()
    assert type(target).operations() == ("route",)
    [config] = {each.get("renormalize") for each in target.capabilities.alternatives("routing")}
    assert config == {"deepseek_v4-norm_topk_prob": (False,)}.get(name, (True,))


def _routings(target):
    """The family's routings, each with what is given along with logits of 40 tokens."""
    tokens = torch.arange(40) % len(TABLE)
    for config in ROUTING[_family(target)]:
        hashed = config.hash_table is not None
        yield config, None if hashed else _bias(target), tokens if hashed else None


def test_route_agrees_with_the_oracle(first):
    for dtype in _dtypes(first):
        for config, bias, tokens in _routings(first):
            logits = _normal(40, E, std=2.0).to(dtype)
            if config.hash_table is None and dtype.itemsize == 2:
                # What rounding could exchange is no matter of translation.
                logits = (logits * 8).round() / 8 + torch.arange(E) / 64
                logits = logits.to(dtype)
            weights, ids = first.route(logits, config, bias, tokens)
            assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ids.dtype == torch.int64
            # The routers compute in float32 at best.
            unit = max(UNIT[dtype], UNIT[torch.float32])
            expected = _route(logits, config, bias, tokens)
            _close(_dense(weights, ids, E), expected, unit, str(dtype))


def test_logits_pass_the_identity_to_the_last_bit(first, monkeypatch):
    seen = []
    call = routers.call
    monkeypatch.setattr(routers, "call", lambda *given: seen.append(call(*given)) or seen[-1])
    config = ROUTING[_family(first)][0]
    for dtype in _dtypes(first):
        logits = torch.cat((_normal(8, E, std=9.0), _normal(8, E, std=1e-6) + 7)).to(dtype)
        logits[0, :4] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0, 1.0])
        # DeepseekV3TopkRouter casts float64 to float32 first, so the logits fit float32.
        logits = logits.float().clamp(-3e38, 3e38).to(dtype)
        first.route(logits, config)
        # Llama4Router returns its logits last, the others first.
        arrived = seen.pop()[-1 if _family(first) == "llama4" else 0]
        assert torch.equal(arrived.double(), logits.double())


def test_route_has_a_gradient(first):
    cotangent = _normal(40, E, seed=5).double()
    for config, bias, tokens in _routings(first):
        logits = _normal(40, E, std=2.0).requires_grad_()
        weights, ids = first.route(logits, config, bias, tokens)
        (_dense(weights, ids, E) * cotangent).sum().backward()
        leaf = logits.detach().double().requires_grad_()
        (_route(leaf, config, bias, tokens) * cotangent).sum().backward()
        _close(logits.grad, leaf.grad, 2.0**-18)


def test_experts_agree_with_the_oracle(target):
    config = _config(target)
    names = list(ACTIVATIONS) if config.activation == "silu" else [config.activation]
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
    expected = sum(
        _experts(x, experts, _dense(weights[:, [k]], ids[:, [k]], E), _config(target))
        for k in range(K)
    )
    _close(out, expected, 2.0**-20)


def _declaring(field):
    """The variants whose experts declare that they take it."""
    names = (
        f"{each.family}-{backend}"
        for each in adapter.FAMILIES
        for backend in each.backends
        if any(True in c[field] for c in each.declared(backend).alternatives("experts"))
    )
    return [
        pytest.param(name, marks=NO_SENTINEL if name == "gpt_oss-eager" else ()) for name in names
    ]


@pytest.mark.parametrize("target", _declaring("invalid_ids"), indirect=True)
def test_ids_that_are_not_here_contribute_nothing(target):
    x, experts, weights, ids = _batch(target, torch.float32)
    ids[0, 0], ids[1, 1], ids[2] = -1, E, 99
    weights[0, 0] = torch.nan
    here = ids.remainder(E) == ids
    dense = _dense(weights.where(here, 0), ids.where(here, 0), E)
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


@pytest.mark.parametrize("target", _declaring("expert_map"), indirect=True)
def test_an_expert_map_gives_local_rows(target):
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
        ids = _normal(T, E - 1, seed=8).topk(K).indices  # one expert gets no token
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
    layer = target.capabilities.alternatives("layer")[-1]
    biased = True in layer["router_bias"]
    parameters = LayerWeights(
        router=_normal(E, H, seed=30, std=H**-0.5).to(dtype),
        experts=_weights(dtype, E, I, biased),
        router_bias=_normal(E, seed=31).to(dtype) if biased else None,
        selection_bias=_bias(target),
        shared=None if shared is None else _weights(dtype, 1, shared, False, seed=33),
    )
    if shared is not None and True in layer["shared_gate"]:
        gate = _normal(1, H, seed=36, std=H**-0.5).to(dtype)
        parameters = dataclasses.replace(parameters, shared_gate=gate)
    config = LayerConfig(
        ROUTING[_family(target)][0],
        _config(target),
        router_dtype=None if None in layer["router_dtype"] else torch.float32,
    )
    return _normal(2, 5, H).to(dtype), parameters, config


def _takes_shared(target):
    return True in target.capabilities.alternatives("layer")[-1]["shared"]


def _logits(rows, parameters):
    logits = rows @ parameters.router.double().T
    bias = parameters.router_bias
    return logits if bias is None else logits + bias.double()


def _block(rows, parameters, dense, config):
    """The block's output on rows [T, H] in float64, for these dense weights."""
    expected = _experts(rows, parameters.experts, dense, config.experts)
    if parameters.shared is None:
        return expected
    one = torch.ones(len(rows), 1, dtype=torch.float64)
    of_shared = dataclasses.replace(config.experts, weight_on="output")
    shared = _experts(rows, parameters.shared, one, of_shared)
    if parameters.shared_gate is not None:
        shared = torch.sigmoid(rows @ parameters.shared_gate.double().T) * shared
    return expected + shared


def test_a_block_agrees_with_the_oracle_stage_by_stage(target):
    for dtype in _dtypes(target):
        for shared in (None, 20) if _takes_shared(target) else (None,):
            x, parameters, config = _layer(target, dtype, shared)
            given = target.layer(x, parameters, config, training=True)
            assert given.output.dtype == dtype
            assert given.output.shape == x.shape
            rows = x.flatten(0, 1).double()
            dense = _dense(given.weights, given.expert_ids, E)
            unit = max(UNIT[dtype], UNIT[torch.float32])
            logits = _logits(rows, parameters)
            expected = _route(logits, config.routing, parameters.selection_bias)
            _close(dense, expected, unit, "weights")
            expected = _block(rows, parameters, dense, config)
            _close(given.output.flatten(0, 1), expected, UNIT[dtype], "output")


def test_a_block_has_gradients(target):
    x, parameters, config = _layer(target, torch.float32, 8 if _takes_shared(target) else None)
    leaves = [x, parameters.router, parameters.experts.gate_up, parameters.experts.down]
    if parameters.shared is not None:
        leaves += [parameters.shared.gate_up, parameters.shared.down]
    if parameters.shared_gate is not None:
        leaves.append(parameters.shared_gate)
    for leaf in leaves:
        leaf.requires_grad_()
    given = target.layer(x, parameters, config, training=True)
    rows = x.flatten(0, 1).double()
    dense = _route(_logits(rows, parameters), config.routing, parameters.selection_bias)
    expected = _block(rows, parameters, dense, config)
    cotangent = _normal(*x.shape, seed=6)
    found = torch.autograd.grad((given.output * cotangent).sum(), leaves)
    wanted = torch.autograd.grad((expected.view(x.shape) * cotangent).sum(), leaves)
    for actual, want in zip(found, wanted, strict=True):
        _close(actual, want.double(), 2.0**-18)


def test_a_block_looks_experts_up_by_token():
    target = adapter.variants()["deepseek_v4-eager"]()
    x, parameters, config = _layer(target, torch.float32)
    hashed = dataclasses.replace(config, routing=ROUTING["deepseek_v4"][2])
    parameters = dataclasses.replace(parameters, selection_bias=None)
    tokens = torch.tensor([[0, 1, 2, 3, 0], [3, 3, 2, 1, 0]])
    given = target.layer(x, parameters, hashed, tokens)
    assert torch.equal(given.expert_ids, TABLE[tokens.flatten()])
    rows = x.flatten(0, 1).double()
    dense = _route(_logits(rows, parameters), hashed.routing, None, tokens.flatten())
    _close(given.output.flatten(0, 1), _block(rows, parameters, dense, hashed), 2.0**-20)


def test_the_weight_of_minimax_says_what_its_router_computes_in():
    target = adapter.variants()["minimax_m2-eager"]()
    x, parameters, config = _layer(target, torch.bfloat16)
    weights = [
        target.layer(x, parameters, dataclasses.replace(config, router_dtype=dtype)).weights
        for dtype in (None, torch.bfloat16, torch.float32)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_chosen_expert_whose_weight_is_zero_is_still_told():
    target = adapter.variants()["llama4-dense"]()
    logits = torch.full((1, E), -300.0)
    logits[0, 5] = -200.0
    weights, ids = target.route(logits, RoutingConfig(1, "sigmoid", order="topk_then_score"))
    assert ids.tolist() == [[5]]
    assert weights.tolist() == [[0.0]]


def test_balance_loss_agrees_with_the_oracle(first):
    if "balance_loss" not in type(first).operations():
        assert first._balance_loss is None
        return
    target = first
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
    other = "output" if config.weight_on == "input" else "input"
    refused = [
        lambda: target.route(x, dataclasses.replace(routing, norm="l2", renormalize=True)),
        lambda: target.route(x.to(torch.float8_e4m3fn), routing),
        lambda: target.experts(
            x, experts, weights, ids, dataclasses.replace(config, weight_on=other)
        ),
        lambda: target.experts(
            x, experts, weights, ids, dataclasses.replace(config, gated=False, activation="silu")
        ),
    ]
    if target.capabilities.min_experts == 2:
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
    if _family(target) != "qwen2_moe":
        refused.append(lambda: target.layer(y, gate, layer))
    else:
        shared = dataclasses.replace(parameters, shared=_weights(torch.float32, 1, 8, False))
        refused.append(lambda: target.layer(y, shared, layer))
    if target.backend == "dense":
        refused.append(lambda: target.experts(x, experts, weights, ids - 1, config))
    refused.append(
        lambda: target.layer(y, parameters, dataclasses.replace(layer, shared_scale=2.0))
    )
    for call in refused:
        with pytest.raises(Unsupported, match=target.name):
            call()


SERVES = {"route": "GATE-19", "balance_loss": "BALANCE-02", "experts": "EXPERT-10"}
SERVES["layer"] = "LAYER-01"


@pytest.mark.parametrize("operation", SERVES)
def test_what_the_library_raises_crashes_the_requirements_it_serves(
    suite, first, operation, breaks
):
    if operation not in type(first).operations():
        return
    asked = {"route": first.router_class, "layer": first.block_class}.get(operation)
    asked = asked or {"experts": first.experts_class}.get(operation)
    if asked is None:
        breaks(first, "_balance_loss")
    else:
        breaks(first._classes[asked], "forward")
    suite.crashes(first, SERVES[operation], 3)


@pytest.mark.parametrize("backend", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", [each.family for each in adapter.FAMILIES if each.backends[1:]])
def test_the_backend_that_is_named_is_the_one_that_computes(family, backend, monkeypatch, broken):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    target = adapter.variants()[f"{family}-{backend}"]()
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, backend, broken)
    x, experts, weights, ids = _batch(target, torch.float32)
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        target.experts(x, experts, weights, ids, _config(target))
    target.backend = "eager"
    target._modules.clear()
    target.experts(x, experts, weights, ids, _config(target))


EAGER = "EXPERT-18 EXPERT-20 EXPERT-30"
KNOWN = {
    **{f"{each.family}-eager": EAGER for each in adapter.FAMILIES if each.backends[1:]},
    **{f"{each.family}-batched_mm": "EXPERT-19" for each in adapter.FAMILIES if each.backends[1:]},
    "gpt_oss-eager": "EXPERT-07 EXPERT-08 EXPERT-17",
    "olmoe-grouped_mm": "BALANCE-14 BALANCE-16 BALANCE-17 BALANCE-19 BALANCE-25",
    "gpt_oss-batched_mm": "BALANCE-10 BALANCE-20 EXPERT-19",
    "deepseek_v4-grouped_mm": "GATE-08 GATE-14",
    "llama4-dense": "EXPERT-19",
    "deepseek_v2-norm_topk_prob": "GATE-22",
    "deepseek_v4-norm_topk_prob": "GATE-06",
    "deepseek_v4-softmax": "GATE-01",
}
"""Of what is told on docs/findings.md, some requirements of each."""


@pytest.mark.parametrize("name", KNOWN)
def test_known_findings_are_still_found(suite, name):
    suite.fails(adapter.variants()[name](), KNOWN[name], 60)
