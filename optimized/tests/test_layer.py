from collections import Counter
from dataclasses import replace

import pytest
import torch
from moe_optimized import (
    alignment,
    dispatch,
    experts_backward,
    experts_decode,
    experts_triton,
    gating,
    gating_backward,
    load_balancing,
    router,
)
from moe_optimized import experts as experts_module
from moe_optimized.interpreter import launches
from moe_optimized.layer import layer_torch, layer_triton
from moe_optimized.router import router_logits
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.layer import layer as reference
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(layer_torch, id="torch"),
        pytest.param(layer_triton, id="triton", marks=pytest.mark.triton),
    ],
)
CONFIG = LayerConfig(RoutingConfig(top_k=2, renormalize=True, scale=1.5))


@pytest.fixture
def make_layer(make_experts):
    def make(dtype=torch.float32, shared=True, gate=True, biased=True, E=6, H=16):
        return LayerWeights(
            router=torch.randn(E, H).to(dtype),
            experts=make_experts(E, H, 8, dtype, biased=biased),
            router_bias=torch.randn(E) if biased else None,
            selection_bias=torch.rand(E) if biased else None,
            shared=make_experts(1, H, 24, dtype) if shared else None,
            shared_gate=torch.randn(1, H).to(dtype) if gate else None,
        )

    return make


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shared", "gate", "biased"),
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_agrees_with_the_reference(
    implementation, dtype, shared, gate, biased, make_layer, assert_close
):
    parameters = make_layer(dtype, shared, gate, biased)
    config = replace(CONFIG, shared_scale=0.7)
    x = torch.randn(2, 5, 16).to(dtype)
    mask = torch.rand(2, 5) < 0.7
    cotangent = torch.randn(2, 5, 16).to(dtype)
    found = []
    for run in (implementation, reference):
        router = parameters.router.clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        out = run(leaf, replace(parameters, router=router), config, padding_mask=mask)
        out.output.backward(cotangent)
        found.append((out, leaf.grad, router.grad))
    (ours, *gradients), (theirs, *expected) = found
    assert_close(ours.output, theirs.output)
    assert ours.output.dtype is dtype
    assert torch.equal(ours.expert_ids, theirs.expert_ids)
    assert_close(ours.weights, theirs.weights)
    assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    assert ours.balance_loss is None
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other, dtype)


@implementations
def test_the_router_has_its_own_dtype(implementation, make_layer, assert_close):
    parameters, x = make_layer(), torch.randn(3, 4, 16)
    for dtype in (None, torch.bfloat16, torch.float64):
        config = replace(CONFIG, router_dtype=dtype)
        ours, theirs = (run(x, parameters, config) for run in (implementation, reference))
        assert torch.equal(ours.expert_ids, theirs.expert_ids)
        assert ours.weights.dtype is theirs.weights.dtype
        assert_close(ours.weights, theirs.weights)
        assert_close(ours.output, theirs.output)


@implementations
def test_weighted_inputs_leave_the_shared_expert_alone(implementation, make_layer, assert_close):
    parameters, x = make_layer(), torch.randn(1, 4, 16)
    config = replace(CONFIG, experts=ExpertsConfig(weight_on="input"))
    assert_close(
        implementation(x, parameters, config).output, reference(x, parameters, config).output
    )


@implementations
def test_hash_tables_see_the_token_ids(implementation, make_layer, assert_close):
    table = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    config = LayerConfig(RoutingConfig(top_k=2, hash_table=table))
    parameters, x = make_layer(), torch.randn(2, 3, 16)
    token_ids = torch.randint(0, 9, (2, 3))
    out = implementation(x, parameters, config, token_ids)
    assert torch.equal(out.expert_ids, table[token_ids.flatten()])
    assert_close(out.output, reference(x, parameters, config, token_ids).output)


@implementations
def test_no_tokens(implementation, make_layer):
    for shape in ((0, 4, 16), (3, 0, 16)):
        out = implementation(torch.randn(shape), make_layer(), CONFIG)
        assert out.output.shape == shape
        assert out.tokens_per_expert.tolist() == [0] * 6


@implementations
def test_bad_arguments_are_refused(implementation, make_layer):
    parameters, x = make_layer(), torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \[2, 3\]"):
        implementation(x, parameters, CONFIG, padding_mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"parameters.router: expected shape \[E, 8\]"):
        implementation(x[..., :8], parameters, CONFIG)
    fewer = replace(parameters, router=torch.randn(5, 16), router_bias=None, selection_bias=None)
    with pytest.raises(ValueError, match=r"parameters\.experts: expected 5 experts, got 6"):
        implementation(x, fewer, CONFIG)
    with pytest.raises(ValueError, match=r"parameters\.shared_gate: expected None without"):
        implementation(x, replace(parameters, shared=None), CONFIG)


@implementations
@pytest.mark.parametrize("loss", ["switch", "deepseek_sequence"])
def test_the_balance_loss_is_that_of_the_reference(implementation, loss, make_layer, assert_close):
    parameters, x = make_layer(), torch.randn(2, 5, 16)
    mask = torch.rand(2, 5) < 0.7
    config = replace(CONFIG, balance=BalanceConfig(loss, 0.1))
    assert implementation(x, parameters, config).balance_loss is None
    found = []
    for run in (implementation, reference):
        router = parameters.router.clone().requires_grad_()
        given = replace(parameters, router=router)
        value = run(x, given, config, padding_mask=mask, training=True).balance_loss
        value.backward()
        found.append((value, router.grad))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.triton
def test_the_kernels_are_launched(make_layer):
    parameters, x = make_layer(), torch.randn(1, 5, 16)
    before = launches.copy()
    layer_triton(x, replace(parameters, shared=None, shared_gate=None), CONFIG)
    experts = ("align_place_kernel", "experts_up_kernel", "experts_down_kernel")
    routed = ("router_kernel", "route_topk_kernel", *experts, "combine_rows_kernel")
    assert launches - before == dict.fromkeys(routed, 1)
    before = launches.copy()
    layer_triton(x, parameters, CONFIG)
    assert (launches - before)["experts_up_kernel"] == 2


class Operations(TorchDispatchMode):
    """Every operation of torch, by name; "on the host" stands for a result in CPU memory."""

    def __init__(self):
        self.seen = Counter()
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] += 1
        out = func(*args, **(kwargs or {}))
        if any(t.device.type == "cpu" for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.seen["on the host"] += 1
        return out


@pytest.fixture
def unreadable(monkeypatch):
    """Run something on tensors whose values nobody can read, as if on a GPU that is not there.

    A read of a value raises, and so does a shape that depends on one. Kernels are not launched;
    their grids must be numbers, and their tensors on the device. Operators are taken apart.
    """
    launched = Counter()

    def launch(kernel, grid, *arguments, **options):
        assert all(type(size) is int for size in grid)
        assert all(a.device.type != "cpu" for a in arguments if isinstance(a, torch.Tensor))
        launched[kernel.fn.__name__] += 1

    for module in (
        alignment,
        dispatch,
        experts_backward,
        experts_decode,
        experts_triton,
        gating,
        gating_backward,
        load_balancing,
        router,
    ):
        monkeypatch.setattr(module, "launch", launch)
    # No atomics, no scatter: what a kernel with a place for every row would have done.
    monkeypatch.setattr(dispatch, "has_kernels", lambda tensor: True)

    def run(function):
        launched.clear()
        with FakeTensorMode(), Operations() as operations:
            function()
        return launched, operations.seen

    return run


# Anything else that depends on values has no shape here, and raises.
READS = {"aten::_local_scalar_dense", "on the host"}


@pytest.mark.triton
@pytest.mark.parametrize(("N", "L"), [(1, 1), (1, 5), (2, 4096)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_step_of_the_layer_waits_for_the_host(N, L, shared, training, unreadable, monkeypatch):
    E, H, I, dtype = 8, 64, 32, torch.bfloat16
    # A build of torch without CUDA runs no backward pass on its tensors, fake or not.
    device = "meta" if training else "cuda"

    def run():
        def empty(*shape, dtype=dtype, grad=training):
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)

        def experts(E):
            shapes = ((E, 2 * I, H), (E, H, I), (E, 2 * I), (E, H))
            return ExpertWeights(*(empty(*shape) for shape in shapes))

        parameters = LayerWeights(
            router=empty(E, H),
            experts=experts(E),
            router_bias=empty(E),
            selection_bias=empty(E, dtype=torch.float32, grad=False),
            shared=experts(1) if shared else None,
            shared_gate=empty(1, H) if shared else None,
        )
        routing = CONFIG.routing
        hashed = replace(routing, hash_table=empty(9, 2, dtype=torch.int64, grad=False))
        for how in (routing, hashed):
            # The ids of a table are read and checked, but not while a graph is captured.
            monkeypatch.setattr(gating, "_is_captured", lambda _, how=how: how is hashed)
            config = LayerConfig(how, balance=BalanceConfig())
            ids = empty(N, L, dtype=torch.int64, grad=False)
            mask = empty(N, L, dtype=torch.bool, grad=False)
            out = layer_triton(empty(N, L, H), parameters, config, ids, mask, training)
            assert out.output.shape == (N, L, H)
            if training:
                (out.output.sum() + out.balance_loss).backward()
                gradient = parameters.experts.gate_up.grad
                assert gradient.device.type == device

    launched, seen = unreadable(run)
    assert not READS & seen.keys()
    few = N * L == 1 and not training
    assert launched["decode_up_kernel" if few else "experts_up_kernel"] == (4 if shared else 2)
    assert bool(launched["experts_d_matrices_kernel"]) is training
    if not (shared or training):
        # Six kernels, or eight where the order of the rows takes three, or four for a few tokens;
        # the rest are buffers.
        assert sum(launched.values()) == 2 * {1: 4, 5: 6, 8192: 8}[N * L]
        written = {name for name in seen if not name.startswith("aten::") or "empty" not in name}
        views = {"aten::view", "aten::view.dtype", "aten::detach", "prim::device"}
        assert written - views == {"aten::new_zeros"}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: torch.where(x),
    ],
)
def test_a_step_that_waits_would_be_seen(read, unreadable):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        unreadable(lambda: read(torch.ones(3, dtype=torch.bool, device="cuda")))


def test_the_ids_of_a_hash_table_are_read_where_no_graph_is_captured(unreadable):
    def check():
        gating._check_table(
            torch.ones(9, 2, dtype=torch.int64, device="meta"),
            torch.ones(5, dtype=torch.int64, device="meta"),
            4,
        )

    with pytest.raises(DataDependentOutputException):
        unreadable(check)


def test_a_copy_to_the_host_would_be_seen(unreadable):
    _, seen = unreadable(lambda: torch.ones(3, device="cuda").cpu())
    assert READS & seen.keys()


def gradients_of(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


@implementations
@pytest.mark.parametrize("narrow", [False, True])
def test_autocast_changes_nothing(implementation, narrow, make_layer):
    form = implementation.__name__.removeprefix("layer")
    # Experts of another dtype than their rows have a way of their own.
    parameters = make_layer()
    if narrow:
        parameters = replace(parameters, experts=make_layer(torch.bfloat16).experts)
    x, weights, ids = torch.randn(2, 6, 16), torch.rand(12, 2), torch.randint(-1, 6, (12, 2))
    counts = torch.randint(0, 3, (6,))
    matrices = {k: v.clone().requires_grad_() for k, v in vars(parameters.experts).items()}
    router, gate = (getattr(parameters, k).requires_grad_() for k in ("router", "shared_gate"))
    parameters = replace(parameters, experts=ExpertWeights(**matrices))
    given = x.requires_grad_(), weights.requires_grad_(), *matrices.values()

    def of_layer():
        out = implementation(x, parameters, CONFIG)
        return out.output, out.weights, out.expert_ids

    def of_route():
        route = getattr(gating, f"route{form}")
        logits = router_logits(x.view(12, 16), router, None, torch.float32)
        return route(logits, CONFIG.routing)

    def of_experts():
        run = getattr(experts_module, f"experts{form}")
        return (run(x.view(12, 16), parameters.experts, weights, ids, ExpertsConfig()),)

    def of_batched():
        run = getattr(experts_module, f"experts_batched{form}")
        return (run(x.view(6, 2, 16), counts, parameters.experts, ExpertsConfig()),)

    for run in (of_layer, of_route, of_experts, of_batched):
        leaves = [*given, router, gate]
        plain = run()
        plain_grads = gradients_of(plain[0].square().sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            inside = run()
            loss = inside[0].float().square().sum()
            if run is of_experts:
                # Its backward is written out.
                inside_grads = gradients_of(loss, leaves)
        if run is not of_experts:
            inside_grads = gradients_of(loss, leaves)
        for found, expected in zip(inside, plain, strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(inside_grads, plain_grads, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
