import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from moe_optimized import alignment, dispatch, operators, quantized_operators
from moe_optimized.experts import (
    experts,
    experts_batched,
    experts_batched_triton,
    experts_torch,
    experts_triton,
)
from moe_optimized.gating import look_up, route_with_counts_torch
from moe_optimized.layer import layer, layer_triton
from moe_optimized.router import router_logits
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

T, K, E, H, I = 9, 2, 4, 16, 8


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()


def leaves(make_experts, dtype=torch.float32, tokens=T, biased=True):
    """Arguments of `experts` whose gradients are wanted, and ids, some of them not here."""
    x = torch.randn(tokens, H).to(dtype).requires_grad_()
    weights = torch.rand(tokens, K, requires_grad=True)
    matrices = make_experts(E, H, I, dtype, biased=biased)
    tensors = [t for t in vars(matrices).values() if t is not None]
    for tensor in tensors:
        tensor.requires_grad_()
    return x, matrices, weights, torch.randint(-1, E + 1, (tokens, K)), [x, weights, *tensors]


def gradients(out, wanted, keep=False):
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad(out, wanted, cotangent, retain_graph=keep)


class CompiledOnce:
    """A function compiled for any length of one dimension; compiling it again is an error."""

    def __init__(self, function):
        self.compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        self.stance = "default"

    def __call__(self, dim, *arguments):
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, dim)
        with torch.compiler.set_stance(self.stance):
            out = self.compiled(*arguments)
        self.stance = "fail_on_recompile"
        return out


OPERATORS = [
    operators.experts_cpu,
    operators.experts_grouped,
    pytest.param(operators.experts_triton, marks=pytest.mark.triton),
]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o._name)
@pytest.mark.parametrize("biased", [False, True])
def test_operators_of_the_experts_are_what_they_say(operator, biased, make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts, biased=biased)
    if operator is operators.experts_triton:
        # Kernels leave what they keep of the rows of nobody unwritten.
        ids = ids.clamp(0, E - 1)
    how = operators.how_experts(ExpertsConfig())
    expert_map = torch.arange(E) if biased else None
    tensors = (x, weights, *vars(matrices).values(), ids, expert_map)
    torch.library.opcheck(operator, (*tensors, x.dtype, True, *how))
    detached = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(operator, (*detached, torch.float64, False, *how))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o._name)
def test_backward_operators_are_what_they_say(operator, make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts, biased=False)
    how = operators.how_experts(ExpertsConfig())
    tensors = [t if t is None else t.detach() for t in (x, weights, *vars(matrices).values(), ids)]
    _, pre = operator(*tensors, None, x.dtype, True, *how)
    backward = getattr(torch.ops.moespec, f"{operator._name}_backward")
    for needs in ([True] * 4 + [False] * 2, [False, True, False, True, False, False]):
        torch.library.opcheck(backward, (torch.randn(T, H), pre, *tensors, None, needs, *how))


def test_small_operators_are_what_they_say():
    table, token_ids = torch.randint(0, E, (7, K), dtype=torch.int32), torch.randint(0, 7, (T,))
    torch.library.opcheck(look_up, (table, token_ids, E))
    counts = torch.zeros(E).long(), torch.ones(E).long()
    torch.library.opcheck(operators.add_counts, (*counts, torch.randn(1, T, H)))


def test_every_operator_is_listed():
    listed = set()
    lists = operators.__doc__ + quantized_operators.__doc__
    for row in re.findall(r"^\| (`.*?) \|", lists, re.MULTILINE):
        listed |= set(re.findall(r"`(\w+)`", row))
    names = torch._C._dispatch_get_all_op_names()
    assert listed == {n.removeprefix("moespec::") for n in names if n.startswith("moespec::")}


@pytest.mark.triton
def test_operators_of_the_routing_are_what_they_say():
    logits = torch.randn(T, E, requires_grad=True)
    mask, bias = torch.rand(T) < 0.5, torch.rand(E)
    table, token_ids = torch.randint(0, E, (7, K)), torch.randint(0, 7, (T,))
    config = RoutingConfig(top_k=K, renormalize=True, scale=1.5)
    for given in ((bias, None, mask, None), (None, token_ids, None, table)):
        arguments = (logits, *given, torch.int64, *operators.how_route(config))
        torch.library.opcheck(operators.route, arguments)
    weights, ids, counts = operators.route(
        logits, bias, None, mask, None, torch.int32, *operators.how_route(config)
    )
    expected = route_with_counts_torch(logits, config, bias, None, mask, torch.int32)
    assert torch.equal(ids, expected[1])
    assert torch.equal(counts, expected[2])
    arguments = torch.rand(T, K), logits.detach(), ids, *operators.how_route(config)
    torch.library.opcheck(operators.route_backward, arguments)
    for ours, theirs in zip(
        (weights, *gradients(weights, [logits])),
        (expected[0], *gradients(expected[0], [logits])),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.triton
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_the_router_is_what_it_says(dtypes, router_dtype, assert_close):
    x = torch.randn(T, H).to(dtypes[0]).requires_grad_()
    router = torch.randn(E, H).to(dtypes[1]).requires_grad_()
    bias = torch.randn(E, requires_grad=True)
    torch.library.opcheck(operators.router, (x, router, bias, router_dtype))
    ours = operators.router(x, router, bias, router_dtype)
    theirs = router_logits(x, router, bias, router_dtype)
    assert ours.dtype is theirs.dtype
    assert_close(ours, theirs)
    wanted = [x, router, bias]
    for gradient, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert_close(gradient, other)


@pytest.mark.triton
def test_operators_of_dispatch_and_combine_are_what_they_say(assert_close):
    x = torch.randn(T, H, requires_grad=True)
    weights = torch.rand(T, K, requires_grad=True)
    ids = torch.randint(-1, E, (T, K))
    torch.library.opcheck(operators.dispatch_triton, (x, ids, E))
    rows, counts, slots = operators.dispatch_triton(x, ids, E)
    expected, expected_counts, expected_slots = dispatch.dispatch(x, ids, E)
    assert rows.shape[0] == T * K
    assert torch.equal(counts, expected_counts)
    assert torch.equal(slots[: len(expected_slots)], expected_slots)
    assert (slots[len(expected_slots) :] == T * K).all()
    torch.library.opcheck(operators.combine, (rows.detach().requires_grad_(), slots, weights))
    ours = operators.combine(rows, slots, weights)
    theirs = dispatch.combine(expected, expected_slots, weights)
    assert_close(ours, theirs)
    wanted = [x, weights]
    for gradient, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert_close(gradient, other)


def test_operators_of_the_alignment_are_what_they_say():
    ids = torch.randint(-1, E, (T, K))
    for given in ((ids, 4, E, None, False), (ids[:1], 16, E, torch.arange(E), True)):
        torch.library.opcheck(operators.align, given)
        for ours, theirs in zip(operators.align(*given), alignment.align(*given), strict=True):
            assert torch.equal(ours, theirs)
    torch.library.opcheck(operators.align_batched, (torch.tensor([2, 0, 3]), 5, 4))


def experts_grouped(x, matrices, weights, ids, config):
    """The way of torch on a GPU without Triton: grouped products, which run on a CPU as well."""
    operator = operators.experts_grouped
    return operators.run_experts(operator, x, matrices, weights, ids, config, None, x.dtype)


@pytest.mark.parametrize(
    "run",
    [
        experts,
        experts_torch,
        experts_grouped,
        pytest.param(experts_triton, marks=pytest.mark.triton),
    ],
)
def test_experts_compile_once_for_every_number_of_tokens(run, make_experts):
    _, matrices, *_ = leaves(make_experts)

    def call(x, weights, ids):
        return run(x, matrices, weights, ids, ExpertsConfig())

    compiled = CompiledOnce(call)
    for tokens in (T, 5, 13):
        x, _, weights, ids, _ = leaves(make_experts, tokens=tokens)
        wanted = [x, weights, *vars(matrices).values()]
        ours, theirs = compiled(0, x, weights, ids), call(x, weights, ids)
        assert torch.equal(ours, theirs)
        for gradient, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
            assert torch.equal(gradient, other)


def test_experts_compile_to_machine_code(make_experts):
    x, matrices, weights, ids, wanted = leaves(make_experts)

    def call(x, weights):
        return experts(2.0 * x, matrices, weights.sqrt(), ids, ExpertsConfig(), None).sin()

    ours, theirs = torch.compile(call, fullgraph=True)(x, weights), call(x, weights)
    torch.testing.assert_close(ours, theirs)
    for gradient, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        torch.testing.assert_close(gradient, other)


def test_a_compiled_call_still_refuses_a_map_that_leads_nowhere(make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts)

    def call(expert_map):
        return experts(x, matrices, weights, ids, ExpertsConfig(), expert_map)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(torch.arange(E))
    with pytest.raises(ValueError, match=f"expert_map: expected rows below {E}, got {E}"):
        compiled(torch.arange(1, E + 1))


@pytest.mark.parametrize(
    "run", [experts_batched, pytest.param(experts_batched_triton, marks=pytest.mark.triton)]
)
def test_batched_experts_compile(run, make_experts):
    matrices = make_experts(E, H, I)
    counts = torch.tensor([0, 5, 2, 1])

    def call(x, counts):
        return run(x, counts, matrices, ExpertsConfig())

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.randn(E, 5, H, requires_grad=True)
    ours, theirs = compiled(x, counts), call(x, counts)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [x]), gradients(theirs, [x]))


LAYERS = pytest.mark.parametrize(
    "run", [layer, pytest.param(layer_triton, marks=pytest.mark.triton)]
)


@LAYERS
@pytest.mark.parametrize("shared", [False, True])
def test_layers_compile_once_for_every_number_of_tokens(run, shared, make_experts):
    parameters = LayerWeights(
        router=torch.randn(E, H, requires_grad=True),
        experts=make_experts(E, H, I, biased=True),
        router_bias=torch.randn(E),
        selection_bias=torch.rand(E),
        shared=make_experts(1, H, 12) if shared else None,
        shared_gate=torch.randn(1, H) if shared else None,
    )
    routing = RoutingConfig(top_k=K, renormalize=True, num_groups=2, topk_groups=1)
    config = LayerConfig(routing, balance=BalanceConfig("switch", 0.1), shared_scale=0.5)

    def call(x, mask):
        found = run(x, parameters, config, None, mask, training=True)
        loss = found.balance_loss
        return found.output + loss, found.expert_ids, found.weights, found.tokens_per_expert

    compiled = CompiledOnce(call)
    for length in (5, 3, 8):
        x = torch.randn(2, length, H, requires_grad=True)
        mask = torch.rand(2, length) < 0.7
        ours, theirs = compiled(1, x, mask), call(x, mask)
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[3], theirs[3])
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[2], theirs[2])
        wanted = [x, parameters.router]
        for gradient, other in zip(
            gradients(ours[0], wanted), gradients(theirs[0], wanted), strict=True
        ):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@LAYERS
def test_hash_tables_compile(run, make_experts):
    table = torch.stack([torch.randperm(E)[:K] for _ in range(7)])
    config = LayerConfig(RoutingConfig(top_k=K, hash_table=table))
    parameters = LayerWeights(torch.randn(E, H), make_experts(E, H, I))

    def call(x, token_ids):
        return run(x, parameters, config, token_ids).output

    given = torch.randn(1, T, H), torch.randint(0, 7, (1, T))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), call(*given))
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 7\), got 7"):
        compiled(given[0], given[1] * 0 + 7)


def test_a_gradient_of_the_gradient_is_refused(make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts)
    out = experts_torch(x, matrices, weights, ids, ExpertsConfig())
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="experts_torch: expected to be differentiated once"):
        first.sum().backward()


def test_only_what_somebody_asked_for_is_computed(make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts)
    frozen = ExpertWeights(*(t.detach() for t in vars(matrices).values()))
    for config in (ExpertsConfig(), ExpertsConfig(weight_on="input")):
        for operator in (operators.experts_cpu, operators.experts_grouped):
            found = []
            for given in (matrices, frozen):
                out = operators.run_experts(operator, x, given, weights, ids, config, None, x.dtype)
                found.append(gradients(out, [x, weights], keep=True))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            (alone,) = gradients(out, [weights])
            assert torch.equal(alone, found[0][1])


def test_nothing_is_kept_without_a_gradient(make_experts):
    x, matrices, weights, ids, _ = leaves(make_experts)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            experts_torch(x, matrices, weights, ids, ExpertsConfig())
        assert not kept
        experts_torch(x, matrices, weights, ids, ExpertsConfig())
    own = {t.data_ptr() for t in (x, weights, ids, *vars(matrices).values())}
    (pre,) = [t for t in kept if t.data_ptr() not in own]
    assert pre.shape == (T * K, 2 * I)


def test_the_grouped_products_of_an_npu(monkeypatch, make_experts, assert_close):
    """Its function is only documented here: a stand-in that follows the documentation."""
    from moe_optimized import experts_torch as grouped

    class StandIn:
        @staticmethod
        def npu_grouped_matmul(x, weight, *, group_list, split_item, group_type, group_list_type):
            [left], [right] = x, weight
            assert group_list.dtype is torch.int64
            assert group_list_type == 0
            assert group_list[-1] == left.shape[0 if group_type == 0 else 1]
            starts = [0, *group_list.tolist()]
            if group_type == 0:
                assert split_item == 2
                parts = [left[a:b] @ right[e] for e, (a, b) in enumerate(pairwise(starts))]
                return [torch.cat(parts)]
            assert (group_type, split_item) == (2, 3)
            parts = [left[:, a:b] @ right[a:b] for a, b in pairwise(starts)]
            return [torch.stack(parts)]

    x, matrices, weights, ids, wanted = leaves(make_experts)

    def call():
        given = (x, matrices, weights, ids, ExpertsConfig(), None, x.dtype)
        out = operators.run_experts(operators.experts_grouped, *given)
        return out, *gradients(out, wanted)

    expected = call()
    monkeypatch.setattr(grouped, "torch_npu", StandIn)
    monkeypatch.setattr(grouped, "_on_npu", lambda _: True)
    for ours, theirs in zip(call(), expected, strict=True):
        assert_close(ours, theirs)


def test_configurations_survive_the_way_through_a_schema():
    config = ExpertsConfig("swigluoai", alpha=1.1, limit=2.0, weight_on="input")
    assert ExpertsConfig(*operators.how_experts(config)) == config
    routing = replace(RoutingConfig.preset("deepseek-v3"), epsilon=1e-12)
    assert RoutingConfig(*operators.how_route(routing)) == routing
