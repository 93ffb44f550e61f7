"""The backward kernels against autograd on the reference in float64."""

from dataclasses import replace

import pytest
import torch
from moe_optimized.experts import (
    experts_batched_triton,
    experts_triton,
    sum_of_experts_triton,
)
from moe_optimized.experts_triton import Shapes, TileShape, run_forward, tile_shapes
from moe_optimized.interpreter import launches
from moe_reference import experts as reference
from moe_reference.config import ExpertsConfig, ExpertWeights

pytestmark = pytest.mark.triton

NAMES = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def gradients(run, x, experts, weights, cotangent, names=NAMES):
    """The gradients by those of `names` that there are, by name.

    Args:
        run: from x, experts and weights to the output.
        x: of any shape.
        experts: its weights.
        weights: the routing weights, or None.
        cotangent: the output's gradient.
        names: what needs a gradient.
    """
    given = {"x": x, "weights": weights, **vars(experts)}
    leaves = {name: t.detach().clone() for name, t in given.items() if t is not None}
    wanted = [name for name in leaves if name in names]
    for name in wanted:
        leaves[name].requires_grad_()
    parts = {name: leaves.get(name) for name in NAMES[2:]}
    out = run(leaves["x"], ExpertWeights(**parts), leaves.get("weights"))
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], cotangent)
    return dict(zip(wanted, found, strict=True))


def both(x, experts, weights, ids, config, expert_map=None, shapes=None, names=NAMES):
    """The kernels' gradients, and the reference's in float64, for one random cotangent."""

    def ours(x, experts, weights):
        return sum_of_experts_triton(x, experts, weights, ids, config, expert_map, x.dtype, shapes)

    def theirs(x, experts, weights):
        return reference.experts(x, experts, weights, ids, config, expert_map)

    cotangent = torch.randn(x.shape).to(x.dtype)
    wide = ExpertWeights(**{n: None if t is None else t.double() for n, t in vars(experts).items()})
    return (
        gradients(ours, x, experts, weights, cotangent, names),
        gradients(theirs, x.double(), wide, weights.double(), cotangent.double(), names),
    )


def tiles_of_16(group_m=1):
    return Shapes(*[TileShape(16, 16, 16, group_m=group_m)] * len(Shapes._fields))


def draw(T, K, E, H, dtype=torch.float32):
    x = (0.5 * torch.randint(-2, 3, (T, H))).to(dtype)
    return x, 0.5 + torch.rand(T, K), torch.randint(0, E, (T, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("config", "biased", "group_m"),
    [
        (ExpertsConfig(), True, 1),
        (ExpertsConfig("swigluoai", limit=0.6, weight_on="input"), True, 4),
        (ExpertsConfig("gelu", gated=False), False, 2),
    ],
)
def test_many_tiles_with_ragged_edges(config, biased, group_m, dtype, make_experts, assert_close):
    T, K, E, H, I = 20, 2, 3, 40, 24
    x, weights, ids = draw(T, K, E, H, dtype)
    experts = make_experts(E, H, I, dtype, config.gated, biased)
    found, expected = both(x, experts, weights, ids, config, shapes=tiles_of_16(group_m))
    for name, gradient in found.items():
        assert_close(gradient, expected[name], dtype)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 1), (3, 4), (0, 2), (2, 0)])
def test_few_tokens_and_few_experts_each(T, K, weight_on, make_experts, assert_close):
    E, H, I = 5, 8, 8
    x, weights, ids = draw(T, K, E, H)
    # The same expert twice, and experts that nobody is sent to.
    ids %= 2
    experts = make_experts(E, H, I, biased=True)
    found, expected = both(x, experts, weights, ids, ExpertsConfig(weight_on=weight_on))
    for name, gradient in found.items():
        assert_close(gradient, expected[name])
        if name in NAMES[2:]:
            assert (gradient[2:] == 0).all()


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_pairs_that_are_not_here_touch_no_memory(weight_on, make_experts, assert_close):
    x, weights, _ = draw(9, 3, 4, 8)
    expert_map = torch.tensor([2, -1, 0, 1, -1, 3])
    ids = torch.randint(-2, 8, (9, 3))
    # A token that is sent nowhere may hold anything.
    x[4], ids[4] = float("nan"), -1
    here = torch.isin(ids, torch.tensor([0, 2, 3, 5]))
    weights[~here] = float("nan")
    experts = make_experts(4, 8, 8, biased=True)
    config = ExpertsConfig(weight_on=weight_on)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        found, expected = both(x, experts, weights, ids, config, expert_map)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in found.items():
        assert_close(gradient, expected[name].nan_to_num())
        assert gradient.isfinite().all()
    assert (found["weights"][~here] == 0).all()
    assert (found["x"][4] == 0).all()


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_token_changes_no_other(value, weight_on, make_experts):
    x, weights, ids = draw(12, 2, 4, 8)
    ids[3] = 1
    experts, config = make_experts(4, 8, 8, biased=True), ExpertsConfig(weight_on=weight_on)
    cotangent = torch.randn(12, 8)

    def run(x, experts, weights):
        return experts_triton(x, experts, weights, ids, config)

    clean = gradients(run, x, experts, weights, cotangent)
    others, elsewhere = torch.arange(12) != 3, torch.arange(4) != 1
    dirty_x, dirty_cotangent = x.clone(), cotangent.clone()
    dirty_x[3] = dirty_cotangent[3] = value
    for given in ((dirty_x, cotangent), (x, dirty_cotangent)):
        found = gradients(run, given[0], experts, weights, given[1])
        assert not found["x"][3].isfinite().all()
        for name, gradient in found.items():
            spared = others if name in ("x", "weights") else elsewhere
            assert torch.equal(gradient[spared], clean[name][spared]), name


@pytest.mark.parametrize("activation", ["relu", "relu2", "swigluoai", "swiglu_limit"])
def test_slopes_at_kinks_are_those_of_torch(activation, make_experts, assert_close):
    gated = activation.startswith("swiglu")
    config = ExpertsConfig(activation, gated=gated, limit=1.0)
    I = 5
    points = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    # The first product is the identity: the token is the pre-activation.
    pairs = torch.cartesian_prod(points, points) if gated else points[:, None]
    T, J = len(pairs), 2 * I if gated else I
    x = pairs.repeat_interleave(I, dim=1)
    experts = ExpertWeights(torch.eye(J)[None], torch.randn(1, J, I))
    weights, ids = torch.ones(T, 1), torch.zeros(T, 1, dtype=torch.int64)
    found, expected = both(x, experts, weights, ids, config)
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def test_a_weight_of_zero_on_the_input_has_a_gradient(make_experts, assert_close):
    x, weights, ids = draw(6, 2, 3, 8)
    weights[::2] = 0.0
    config = ExpertsConfig(weight_on="input")
    found, expected = both(x, make_experts(3, 8, 8, biased=True), weights, ids, config)
    assert (expected["weights"][0] != 0).all()
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("config", [ExpertsConfig(), ExpertsConfig("relu2", gated=False)])
def test_batched_with_many_tiles(config, make_experts, assert_close):
    E, C, H, I = 3, 20, 24, 40
    experts = make_experts(E, H, I, gated=config.gated, biased=True)
    counts = torch.tensor([20, 0, 7])
    x = 0.5 * torch.randint(-2, 3, (E, C, H))
    in_use = torch.arange(C) < counts[:, None]
    x[~in_use] = float("nan")
    cotangent = torch.randn(E, C, H)
    wide = ExpertWeights(**{n: t.double() for n, t in vars(experts).items()})
    found = gradients(
        lambda x, experts, _: experts_batched_triton(x, counts, experts, config),
        x,
        experts,
        None,
        cotangent,
    )
    expected = gradients(
        lambda x, experts, _: reference.experts_batched(x, counts, experts, config),
        x.double(),
        wide,
        None,
        cotangent.double(),
    )
    for name, gradient in found.items():
        assert_close(gradient, expected[name])
    assert (found["x"][~in_use] == 0).all()


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_the_same_bits_every_time(weight_on, make_experts):
    x, weights, ids = draw(20, 2, 2, 24)
    experts, cotangent = make_experts(2, 24, 40, biased=True), torch.randn(20, 24)
    config = ExpertsConfig(weight_on=weight_on)

    def run(x, experts, weights):
        return sum_of_experts_triton(x, experts, weights, ids, config, shapes=tiles_of_16())

    once, twice = (gradients(run, x, experts, weights, cotangent) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in NAMES)
    # Nor do a token's gradients depend on which other tokens there are.
    few = gradients(
        lambda x, experts, weights: sum_of_experts_triton(
            x, experts, weights, ids[:9], config, shapes=tiles_of_16()
        ),
        x[:9],
        experts,
        weights[:9],
        cotangent[:9],
    )
    assert torch.equal(few["x"], once["x"][:9])
    assert torch.equal(few["weights"], once["weights"][:9])


@pytest.mark.parametrize(
    ("names", "weight_on", "kernels"),
    [
        (
            NAMES,
            "output",
            {
                "experts_d_hidden_kernel": 1,
                "experts_d_weights_kernel": 1,
                "experts_bounds_kernel": 1,
                "experts_d_matrices_kernel": 2,
                "experts_d_biases_kernel": 2,
                "experts_d_rows_kernel": 1,
                "combine_rows_kernel": 1,
            },
        ),
        (
            ("x",),
            "output",
            {"experts_d_hidden_kernel": 1, "experts_d_rows_kernel": 1, "combine_rows_kernel": 1},
        ),
        (
            ("weights",),
            "output",
            {"experts_d_hidden_kernel": 1, "experts_d_weights_kernel": 1},
        ),
        (
            ("weights",),
            "input",
            {
                "experts_d_hidden_kernel": 1,
                "experts_d_rows_kernel": 1,
                "experts_d_weights_kernel": 1,
            },
        ),
        (
            ("down",),
            "output",
            {
                "experts_d_hidden_kernel": 1,
                "experts_bounds_kernel": 1,
                "experts_d_matrices_kernel": 1,
            },
        ),
        (("down_bias",), "output", {"experts_bounds_kernel": 1, "experts_d_biases_kernel": 1}),
        (
            ("gate_up_bias",),
            "input",
            {
                "experts_d_hidden_kernel": 1,
                "experts_bounds_kernel": 1,
                "experts_d_biases_kernel": 1,
            },
        ),
    ],
    ids=str,
)
def test_only_what_somebody_asked_for_is_launched(
    names, weight_on, kernels, make_experts, assert_close
):
    x, weights, ids = draw(5, 2, 3, 8)
    config = ExpertsConfig(weight_on=weight_on)
    experts = make_experts(3, 8, 8, biased=True)
    out = {}

    def run(x, experts, weights):
        out["of"] = experts_triton(x, experts, weights, ids, config)
        launches.clear()
        return out["of"]

    found = gradients(run, x, experts, weights, torch.ones(5, 8), names)
    assert dict(launches) == kernels
    # And it is what it would have been among the others.
    for name, gradient in gradients(run, x, experts, weights, torch.ones(5, 8)).items():
        if name in found:
            assert torch.equal(found[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_x_and_the_pre_activation_are_all_that_is_kept(gated, dtype, make_experts):
    T, K, E, H, I = 64, 2, 4, 16, 32
    x, weights, ids = draw(T, K, E, H, dtype)
    experts = make_experts(E, H, I, dtype, gated)
    inputs = [t.requires_grad_() for t in (x, weights, experts.gate_up, experts.down)]
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts_triton(x, experts, weights, ids, ExpertsConfig(gated=gated))
    for tensor in inputs:
        kept.pop(tensor.data_ptr(), None)
    floats = [t for t in kept.values() if t.is_floating_point()]
    routing = [t for t in kept.values() if not t.is_floating_point()]
    [pre] = floats
    assert pre.shape == (T * K, 2 * I if gated else I)
    assert pre.dtype is dtype
    tiles = -(-T * K // tile_shapes(T * K, E, I, H, dtype).up.m) + E
    assert sum(t.numel() for t in routing) <= 2 * T * K + 3 * tiles
    assert {t.dtype for t in routing} == {torch.int32}


def test_nothing_is_kept_where_no_gradient_is_asked_for(make_experts):
    x, weights, ids = draw(5, 2, 3, 8)
    experts = make_experts(3, 8, 8)
    assert experts_triton(x, experts, weights, ids, ExpertsConfig()).grad_fn is None
    with torch.no_grad():
        assert (
            experts_triton(x.requires_grad_(), experts, weights, ids, ExpertsConfig()).grad_fn
            is None
        )
    given = (x.detach(), experts, weights, ids, ExpertsConfig(), None, None, torch.float32)
    out, pre, _ = run_forward(*given, keep=False)
    assert pre is None
    assert torch.equal(out, run_forward(*given, keep=True)[0])


def test_the_backward_can_be_run_again(make_experts):
    x, weights, ids = draw(5, 2, 3, 8)
    x.requires_grad_()
    out = experts_triton(x, make_experts(3, 8, 8), weights, ids, ExpertsConfig())
    (once,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(once, again)


@pytest.mark.parametrize("graph", [False, True])
def test_a_gradient_of_the_gradient_is_refused(graph, make_experts):
    x, weights, ids = draw(5, 2, 3, 8)
    x.requires_grad_()
    out = experts_triton(x, make_experts(3, 8, 8), weights, ids, ExpertsConfig())
    # With and without a graph of its own, the output's gradient leaves a second derivative.
    loss = out.square().sum() if graph else out.sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        (gradient.square().sum() + x.sum()).backward()


def test_strides_are_taken_as_they_come(make_experts, assert_close):
    x, weights, ids = draw(6, 2, 3, 8)
    experts = make_experts(3, 8, 5, biased=True)
    strided = replace(
        experts,
        gate_up=torch.stack([experts.gate_up] * 2, -1)[..., 0],
        down=experts.down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    cotangent = torch.randn(8, 6).T

    def run(x, experts, weights):
        return experts_triton(x.T.contiguous().T, experts, weights.T.contiguous().T, ids, config)

    config = ExpertsConfig()
    found = gradients(run, x, strided, weights, cotangent)
    for name, expected in gradients(run, x, experts, weights, cotangent.contiguous()).items():
        assert_close(found[name], expected)
    # A gradient without memory of its own, as a sum's is.
    expanded = gradients(run, x, experts, weights, torch.ones(()).expand(6, 8))
    dense = gradients(run, x, experts, weights, torch.ones(6, 8))
    assert all(torch.equal(expanded[name], dense[name]) for name in NAMES)
