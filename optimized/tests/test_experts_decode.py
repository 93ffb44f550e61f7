"""The way of a few tokens, also with more tokens than it is meant for."""

from dataclasses import replace

import pytest
import torch
from moe_optimized import experts_decode
from moe_optimized.experts import check_experts, experts_triton, sum_of_experts_triton
from moe_optimized.experts_decode import is_few, run_decode
from moe_optimized.experts_triton import tile_shapes
from moe_optimized.interpreter import launches
from moe_optimized.layer import layer_triton
from moe_reference import experts as reference
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

pytestmark = pytest.mark.triton

CONFIGS = [
    (ExpertsConfig("silu"), True),
    (ExpertsConfig("gelu", gated=False), False),
    (ExpertsConfig("swiglu_limit", limit=0.7), False),
    (ExpertsConfig("swigluoai", weight_on="input", alpha=1.1, limit=0.5), True),
    (ExpertsConfig("relu2", gated=False, weight_on="input"), True),
]


def decode(x, experts, weights, ids, config, expert_map=None):
    """However many tokens there are."""
    check_experts(x, experts, weights, ids, config, expert_map)
    return run_decode(x, experts, weights, ids, config, expert_map, x.dtype)


def in_float64(experts):
    return ExpertWeights(**{n: None if t is None else t.double() for n, t in vars(experts).items()})


@pytest.fixture(params=["whole", "cut"])
def blocks(request, monkeypatch):
    """The interpreter's blocks, which hold a whole row, and small ones as on a GPU."""
    if request.param == "whole":
        return
    up, down = experts_decode._up_blocks, experts_decode._down_blocks

    def small(made, depth):
        sizes = {name: min(made[name], size) for name, size in (("BLOCK_N", 4), ("BLOCK_K", 8))}
        return {**made, **sizes, "EVEN_K": depth % sizes["BLOCK_K"] == 0}

    monkeypatch.setattr(experts_decode, "_up_blocks", lambda I, H: small(up(I, H), H))
    monkeypatch.setattr(
        experts_decode,
        "_down_blocks",
        lambda K, H, I: {**small(down(K, H, I), I), "BLOCK_C": min(2, down(K, H, I)["BLOCK_C"])},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("config", "biased"), CONFIGS)
def test_agrees_with_the_reference(config, biased, dtype, blocks, make_experts, assert_close):
    T, K, E, H, I = 3, 3, 4, 17, 10
    x = (0.5 * torch.randint(-2, 3, (T, H))).to(dtype)
    weights = 0.5 * torch.randint(1, 3, (T, K))
    experts = make_experts(E, H, I, dtype, config.gated, biased)
    ids = torch.randint(-1, E + 1, (T, K))
    weights[(ids < 0) | (ids >= E)] = float("nan")
    expected = reference.experts(
        x.double(), in_float64(experts), weights.double(), ids, config, None
    )
    actual = decode(x, experts, weights, ids, config)
    assert actual.dtype is dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_maps_duplicates_and_experts_that_are_not_here(dtype, blocks, make_experts, assert_close):
    experts = make_experts(5, 8, 8, biased=True)
    expert_map = torch.tensor([-1, 4, 0, -1, 2], dtype=dtype)
    ids = torch.tensor([[1, 1, 1], [2, 3, 9], [0, -5, 7], [7, 4, 4]], dtype=dtype)
    x, weights = torch.randn(4, 8), torch.rand(4, 3)
    given = (x, experts, weights, ids, ExpertsConfig(), expert_map)
    assert_close(decode(*given), reference.experts(*given))
    assert (decode(*given)[2] == 0).all()


@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (3, 2, 3), (3, 2, 0), (1, 0, 3)])
def test_nothing_routed_gives_zeros(T, K, E, make_experts):
    ids, weights = torch.full((T, K), -1), torch.full((T, K), float("nan"))
    experts = make_experts(E, 8, 8, biased=True)
    out = decode(torch.randn(T, 8), experts, weights, ids, ExpertsConfig())
    assert out.shape == (T, 8)
    assert (out == 0).all()


def test_a_non_finite_token_changes_no_other(blocks, make_experts):
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    experts, ids = make_experts(3, 8, 8), torch.randint(0, 3, (5, 2))
    clean = decode(x, experts, weights, ids, ExpertsConfig())
    for value in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[4] = value
        out = decode(dirty, experts, weights, ids, ExpertsConfig())
        assert not out[4].isfinite().any()
        assert torch.equal(out[:4], clean[:4])


@pytest.mark.parametrize(("H", "I"), [(5, 7), (1, 1), (9, 16), (16, 9)])
def test_any_strides_and_dtypes(H, I, blocks, make_experts, assert_close):
    experts = make_experts(3, H, I, biased=True)
    strided = ExpertWeights(
        gate_up=torch.stack([experts.gate_up] * 2, -1)[..., 0],
        down=experts.down.transpose(1, 2).contiguous().transpose(1, 2).half(),
        gate_up_bias=experts.gate_up_bias.T.contiguous().T,
        down_bias=experts.down_bias[:, :1].expand(3, H),
    )
    x, weights = torch.randn(H, 6).T, torch.rand(6, 4)[:, ::2]
    ids = torch.randint(0, 3, (2, 6)).T
    expected = reference.experts(
        x.double(), in_float64(strided), weights.double(), ids, ExpertsConfig()
    )
    assert_close(decode(x, strided, weights, ids, ExpertsConfig()), expected)


def test_hidden_rows_of_float16_do_not_overflow(make_experts):
    experts = make_experts(2, 8, 4, torch.float16, gated=False)
    experts = replace(experts, gate_up=torch.full_like(experts.gate_up, 30.0))
    experts.down[:] = 2.0**-12
    x = torch.full((1, 8), 2.0, dtype=torch.float16)
    ids, config = torch.zeros(1, 1, dtype=torch.int64), ExpertsConfig("relu2", gated=False)
    out = decode(x, experts, torch.ones(1, 1), ids, config)
    # The hidden numbers are 480 squared.
    assert torch.equal(out, torch.full_like(out, 4 * 480.0**2 * 2.0**-12))


def test_a_few_tokens_go_this_way_where_no_backward_follows(make_experts):
    T, K, E = 2, 2, 16
    assert is_few(T, K, E)
    x, weights = torch.randn(T, 8), torch.rand(T, K)
    experts, ids = make_experts(E, 8, 8), torch.randint(0, E, (T, K))
    given = (x, experts, weights, ids, ExpertsConfig())

    def launched(run):
        before = launches.copy()
        out = run()
        return set(launches - before), out

    two = {"decode_up_kernel", "decode_down_kernel"}
    sorting = {"align_place_kernel", "experts_up_kernel", "experts_down_kernel"}
    kernels, out = launched(lambda: experts_triton(*given))
    assert kernels == two
    kernels, other = launched(lambda: experts_triton(x.clone().requires_grad_(), *given[1:]))
    assert kernels == {*sorting, "combine_rows_kernel"}
    torch.testing.assert_close(out, other.detach())
    shapes = tile_shapes(T * K, E, 8, 8, x.dtype)
    kernels, other = launched(lambda: sum_of_experts_triton(*given, shapes=shapes))
    assert kernels == {*sorting, "combine_rows_kernel"}
    torch.testing.assert_close(out, other)
    torch.compiler.reset()
    kernels, other = launched(
        lambda: torch.compile(experts_triton, fullgraph=True, backend="eager")(*given)
    )
    assert kernels == two
    assert torch.equal(out, other)


def test_a_layer_is_four_launches(make_experts):
    E, H = 8, 16
    parameters = LayerWeights(router=torch.randn(E, H), experts=make_experts(E, H, 8))
    config = LayerConfig(routing=RoutingConfig(top_k=2), experts=ExpertsConfig())
    before = launches.copy()
    layer_triton(torch.randn(1, 1, H), parameters, config)
    kernels = ("router_kernel", "route_topk_kernel", "decode_up_kernel", "decode_down_kernel")
    assert launches - before == dict.fromkeys(kernels, 1)
