"""Every function that takes tensors, over devices, dtypes, strides, sizes and gradients."""

import functools
import importlib.util
import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
from moe_reference import (
    activations,
    alignment,
    bias_update,
    capacity,
    dispatch,
    expert_gathering,
    expert_slicing,
    gates,
    gating,
    layouts,
    load_balancing,
    loss_graph,
)
from moe_reference import experts as experts_module
from moe_reference import layer as layer_module
from moe_reference.checks import FLOATS, IDS
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

_spec = importlib.util.spec_from_file_location("calls", Path(__file__).with_name("calls.py"))
calls = sys.modules["calls"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(calls)
replace_in, walk = calls.replace_in, calls.walk
# Made once: no function changes its arguments, which is one of the tests.
make_calls = functools.cache(calls.make_calls)

NAMES = tuple(make_calls())
DIFFERENTIABLE = tuple(name for name, call in make_calls().items() if call.differentiable)
SIZES = (1, 2, 3, 7, 8, 72, 128, 255, 256, 257, 384)

NO_TENSORS_OR_ONLY_CHECKS = {
    "accumulation_dtype",
    "assign_experts",
    "assign_round_robin",
    "buffer_size",
    "choose_block_size",
    "expert_capacity",
    "make_expert_map",
    "sum_of_nothing",
    "take_modules",
    "upcast",
}
# The first two have a gradient that is not that of their values, which is what they are for; the
# third is random. Their own tests are in test_load_balancing.py and test_families.py.
SPECIAL = {"inject_loss", "inject_scaled_loss", "jitter"}
# They say so: a view of the weights for reading, and what a gate gave back as it is.
HAND_THROUGH = {"one_by_one", "read_gate", *SPECIAL}


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def same_noise_each_time():
    torch.manual_seed(0)


def same(actual, expected):
    """The same number of tensors, each the same to the last bit, shape, dtype and device."""
    if len(actual) != len(expected):
        return False
    return all(
        a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and _same_bits(a, b)
        for a, b in zip(actual, expected, strict=True)
    )


def _same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_every_function_has_a_call():
    modules = (
        *(activations, alignment, bias_update, capacity, dispatch, expert_gathering),
        *(expert_slicing, experts_module, gates, gating, layer_module, layouts),
        *(load_balancing, loss_graph),
    )
    public = {
        name
        for module in modules
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
    }
    called = {name.split()[0] for name in NAMES}
    assert public - called == NO_TENSORS_OR_ONLY_CHECKS


# gradients


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name, device):
    """Against differences of values. The inputs of the calls are away from ties and kinks."""
    call = make_calls(device, torch.float64)[name]
    paths = [path for path, t in walk(call.arguments) if t.is_floating_point()]

    def of_floats(*floats):
        arguments = call.arguments
        for path, tensor in zip(paths, floats, strict=True):
            arguments = replace_in(arguments, path, tensor)
        return tuple(t for t in call(**arguments) if t.requires_grad)

    leaves = dict(walk(call.arguments))
    inputs = [leaves[path].clone().requires_grad_() for path in paths]
    assert of_floats(*inputs)
    # On a GPU sums of gradients may be taken in any order.
    assert torch.autograd.gradcheck(of_floats, inputs, nondet_tol=1e-12 if device == "cuda" else 0)


@pytest.mark.parametrize(
    "name", ["experts", "experts_grouped", "moe_infer", "dispatch", "combine", "experts_of_modules"]
)
def test_gradients_are_zero_where_nothing_is_routed(name, device):
    call = make_calls(device)[name]
    arguments = call.arguments
    if name == "combine":
        nobody = arguments["weights"].numel()
        arguments = arguments | {"slots": torch.full_like(arguments["slots"], nobody)}
    else:
        arguments = arguments | {"expert_ids": torch.full_like(arguments["expert_ids"], -1)}
    paths = [path for path, t in walk(arguments) if t.is_floating_point()]
    leaves = dict(walk(arguments))
    inputs = [leaves[path].clone().requires_grad_() for path in paths]
    for path, tensor in zip(paths, inputs, strict=True):
        arguments = replace_in(arguments, path, tensor)
    # `dispatch` and `experts_of_modules` do not take all of them, with or without pairs.
    used = [t for t in inputs if name != "dispatch" or t is inputs[0]]
    sum(t.sum() for t in call(**arguments) if t.requires_grad).backward()
    assert all(t.grad is not None and not t.grad.any() for t in used)


# dtypes


def expected_dtype(kind, dtype, ids_dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"x": dtype, "wide": wide, "ids": ids_dtype}.get(kind) or getattr(torch, kind)


@pytest.mark.parametrize("ids_dtype", IDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype, ids_dtype, device):
    """Results have the dtype that is documented, and the value of float64 on the same numbers."""
    wide_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, call in make_calls(device, dtype, ids_dtype).items():
        exact = call.arguments
        for path, tensor in walk(call.arguments):
            if tensor.is_floating_point():
                exact = replace_in(exact, path, tensor.double())
        torch.manual_seed(0)
        actual = call()
        torch.manual_seed(0)
        for result, expected, (_, kind) in zip(actual, call(**exact), call.returns, strict=True):
            assert result.dtype == expected_dtype(kind, dtype, ids_dtype), name
            if not result.is_floating_point():
                assert torch.equal(result, expected), name
                continue
            size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
            eps = torch.finfo(result.dtype).eps
            # One rounding to the dtype of the result behind sums in float32, of which the longest
            # has a few dozen terms. Where each step is in x's dtype, each has a rounding.
            bound = 16 * eps if call.computed_in == "x" else eps / 2 + 64 * wide_eps
            error = (result.double() - expected).abs().max().item() if expected.numel() else 0.0
            assert error <= bound * size, f"{name}: off by {error}"


@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_weights_of_any_float_dtype(x_dtype, weights_dtype, device):
    """The output has x's dtype, and is what the same numbers give in the dtype of sums."""
    wide = torch.float64 if x_dtype == torch.float64 else torch.float32
    for name in ("experts", "experts_grouped", "moe_infer", "experts_batched", "layer"):
        call = make_calls(device, x_dtype)[name]
        given, exact = call.arguments, call.arguments
        for path, tensor in walk(call.arguments):
            if tensor.is_floating_point() and path != ("x",):
                given = replace_in(given, path, tensor.to(weights_dtype))
                exact = replace_in(exact, path, tensor.to(weights_dtype).to(wide))
        assert same(call(**given), call(**exact)), name


# strides


def strided_forms(tensor):
    """The same numbers, laid out in other ways."""
    if tensor.ndim >= 2:
        yield tensor.mT.contiguous().mT
    spaced = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.ndim else None
    if spaced is not None:
        spaced[..., ::2] = tensor
        yield spaced[..., ::2]
        behind = torch.cat([tensor[:1], tensor])
        yield behind[1:]


def answer(call, arguments):
    torch.manual_seed(0)
    try:
        return call(**arguments)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", NAMES)
def test_strides(name, device):
    """Bit for bit what contiguous arguments give."""
    call = make_calls(device)[name]
    expected = answer(call, call.arguments)
    for path, tensor in walk(call.arguments):
        for form in strided_forms(tensor):
            assert same(answer(call, replace_in(call.arguments, path, form)), expected), path


@pytest.mark.parametrize("name", NAMES)
def test_expanded_arguments(name, device):
    """Stride 0: one row that stands for all. Bit for bit what its copies give, errors included."""
    call = make_calls(device)[name]
    for path, tensor in walk(call.arguments):
        # What is all the same number is no permutation.
        if tensor.ndim == 0 or path == ("permutation",):
            continue
        expanded = tensor[:1].expand(tensor.shape)
        actual = answer(call, replace_in(call.arguments, path, expanded))
        expected = answer(call, replace_in(call.arguments, path, expanded.contiguous()))
        if isinstance(expected, str):
            assert actual == expected, path
        else:
            assert same(actual, expected), path


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_not_changed_and_not_returned(name, device):
    call = make_calls(device)[name]
    before = {path: tensor.clone() for path, tensor in walk(call.arguments)}
    outputs = call()
    for path, tensor in walk(call.arguments):
        assert same([tensor], [before[path]]), path
    if name.split()[0] in HAND_THROUGH:
        return
    # The same storage for an output and an argument: who writes into one changes the other.
    owned = {t.untyped_storage().data_ptr() for _, t in walk(call.arguments) if t.numel()}
    assert all(t.untyped_storage().data_ptr() not in owned for t in outputs if t.numel())


# sizes


@pytest.mark.parametrize("ids_dtype", IDS)
@pytest.mark.parametrize(
    "sizes",
    [{"T": 0}, {"T": 3}, {"E": 1, "K": 1}, {"K": 6}, {"used": 1}, {"K": 1}],
    ids=["no token", "few tokens", "one expert", "K = E", "empty experts", "K = 1"],
)
def test_shapes_at_the_edges(sizes, ids_dtype, device):
    for name, call in make_calls(device, ids_dtype=ids_dtype, **sizes).items():
        shapes = [tuple(call.sizes[letter] for letter in letters) for letters, _ in call.returns]
        actual = call()
        assert [tuple(t.shape) for t in actual] == shapes, name
        kinds = [expected_dtype(kind, torch.float32, ids_dtype) for _, kind in call.returns]
        assert [t.dtype for t in actual] == kinds, name
        assert all(t.device.type == device for t in actual), name
        assert all(t.isfinite().all() for t in actual if t.is_floating_point()), name


def numbered_experts(E, device):
    """Expert e multiplies the one number of a token by e + 1."""
    down = torch.arange(1.0, E + 1, device=device).view(E, 1, 1)
    return ExpertWeights(torch.ones(E, 1, 1, device=device), down)


@pytest.mark.parametrize("order", ["score_then_topk", "topk_then_score"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("E", SIZES)
def test_every_expert_is_reached_by_the_router(E, score, order, device):
    logits = 4.0 * torch.eye(E, device=device)
    expected = torch.arange(E, device=device)
    groups = [1, *(g for g in (2, 3, 8) if E % g == 0 and g < E)]
    for num_groups in groups:
        config = RoutingConfig(1, score, order, num_groups=num_groups)
        weights, ids = gating.route(logits, config)
        assert torch.equal(ids[:, 0], expected)
        bias = torch.zeros(E, device=device)
        bias[-1] = 10.0
        assert (gating.route(logits, config, bias)[1] == E - 1).all()
    everybody = RoutingConfig(E, score, order)
    weights, ids = gating.route(logits, everybody)
    assert torch.equal(ids.sort(dim=1).values, expected.expand(E, E))
    assert torch.equal(ids[:, 0], expected)
    if score == "softmax":
        # E weights in float32, each with a rounding or two, add up to 1.
        assert (weights.sum(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("ids_dtype", IDS)
@pytest.mark.parametrize("E", SIZES)
def test_every_expert_is_reached_behind_the_router(E, ids_dtype, device):
    """Whole numbers below 2^24, so that every product and sum is exact."""
    everyone = torch.arange(E, device=device)
    ids = everyone.flip(0)[:, None].to(ids_dtype)
    x, ones = torch.ones(E, 1, device=device), torch.ones(E, 1, device=device)
    weights, config = numbered_experts(E, device), ExpertsConfig("relu", gated=False)

    rows, counts, slots = dispatch.dispatch(x, ids, E)
    assert torch.equal(slots, everyone.flip(0))
    assert torch.equal(counts, torch.ones_like(everyone))
    assert torch.equal(dispatch.inclusive_offsets(counts), (everyone + 1).int())
    sums = dispatch.combine(everyone[:, None].float() + 1, slots.to(ids_dtype), ones)
    expected = ids.float() + 1
    assert torch.equal(sums, expected)
    for function in (experts_module.experts, experts_module.experts_grouped):
        assert torch.equal(function(x, weights, ones, ids, config), expected)
    assert torch.equal(layer_module.moe_infer(x, ids, ones, weights, config), expected)
    batch = dispatch.batch_rows(rows, counts, 2)
    made = experts_module.experts_batched(batch, counts.to(ids_dtype), weights, config)
    assert torch.equal(dispatch.unbatch_rows(made, counts), everyone[:, None].float() + 1)

    sorted_slots, block_experts, padded_length = alignment.align(ids, 2, E)
    assert padded_length.tolist() == [2 * E]
    assert torch.equal(block_experts[:E], everyone.int())
    assert torch.equal(sorted_slots[: 2 * E : 2], everyone.flip(0).int())
    assert alignment.align_batched(counts.to(ids_dtype), 3, 2)[1][:E].tolist() == everyone.tolist()
    _, kept = capacity.drop_to_capacity(ones, ids, E, 1)
    assert torch.equal(kept, ids)

    # The ids one rank of two has: the upper half, as its rows 0 and on.
    start, count = expert_slicing.assign_experts(E, 2, 1)
    held = range(start, start + count)
    expert_map = expert_slicing.make_expert_map(E, held).to(device)
    upper = expert_slicing.slice_experts(weights, start, count)
    part = experts_module.experts(x, upper, ones, ids, config, expert_map)
    assert torch.equal(part, torch.where(ids >= start, expected, 0.0))


@pytest.mark.parametrize("E", SIZES)
def test_balance_with_every_number_of_experts(E, device):
    logits, ids = torch.zeros(E, E, device=device), torch.arange(E, device=device)[:, None]
    for loss in ("switch", "gshard", "deepseek_expert", "transformers_concatenated"):
        value = load_balancing.balance_loss(logits, ids, BalanceConfig(loss))
        # A mean of E numbers 1 / E, E times: some roundings of float32.
        assert abs(value.item() - 1.0) < 1e-5
    bias = bias_update.update_bias(logits[0], torch.arange(E, device=device), 1.0, False)
    assert bias.tolist() == [math.copysign(i != E - 1 - i, E - 1 - 2 * i) for i in range(E)]


@pytest.mark.parametrize("E", SIZES)
def test_every_expert_is_reached_by_the_layer(E, device):
    x = torch.eye(E, device=device)[None]
    down = torch.arange(1.0, E + 1, device=device).view(E, 1, 1).expand(E, E, 1)
    experts = ExpertWeights(torch.ones(E, 1, E, device=device), down)
    parameters = LayerWeights(4.0 * torch.eye(E, device=device), experts)
    config = LayerConfig(
        RoutingConfig(1, renormalize=True), ExpertsConfig("relu", gated=False), BalanceConfig()
    )
    result = layer_module.layer(x, parameters, config, training=True)
    assert torch.equal(result.output[0, :, 0], torch.arange(1.0, E + 1, device=device))
    assert torch.equal(result.tokens_per_expert, torch.ones(E, device=device).long())
    assert abs(result.balance_loss.item() - 1.0) < 1e-5
