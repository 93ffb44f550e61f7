import pytest
import torch
from moe_optimized import operators
from moe_optimized.experts import (
    experts_batched_torch,
    experts_batched_triton,
    experts_torch,
    experts_triton,
    sum_of_experts_triton,
)
from moe_optimized.experts_triton import Shapes, TileShape, tile_shapes
from moe_optimized.interpreter import launches
from moe_reference import experts as reference
from moe_reference.config import ExpertsConfig, ExpertWeights


def experts_grouped(x, experts, weights, ids, config, expert_map=None):
    """What a GPU without compiled kernels does: all rows, those of nobody masked."""
    operator = operators.experts_grouped
    return operators.run_experts(operator, x, experts, weights, ids, config, expert_map, x.dtype)


implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(experts_torch, id="torch"),
        pytest.param(experts_grouped, id="grouped"),
        pytest.param(experts_triton, id="triton", marks=pytest.mark.triton),
    ],
)
batched_implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(experts_batched_torch, id="torch"),
        pytest.param(experts_batched_triton, id="triton", marks=pytest.mark.triton),
    ],
)

CONFIGS = [
    (ExpertsConfig(activation, gated=gated, limit=0.7), biased)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai", "swiglu_limit")
    for gated, biased in ((True, True), (False, False))
    if gated or not activation.startswith("swiglu")
]
CONFIGS += [
    (ExpertsConfig("silu", weight_on="input"), False),
    (ExpertsConfig("swigluoai", weight_on="input", alpha=1.1, limit=0.5), True),
    (ExpertsConfig("gelu", gated=False, weight_on="input"), True),
]


def leaves_of(experts):
    return [t for t in vars(experts).values() if t is not None]


def with_gradients(run, x, experts, weights, ids, config, expert_map=None, cotangent=None):
    """The output and the gradient of everything that has one."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    copies = {
        name: None if t is None else t.clone().requires_grad_() for name, t in vars(experts).items()
    }
    out = run(x, ExpertWeights(**copies), weights, ids, config, expert_map)
    if cotangent is None:
        out.sum().backward()
    else:
        out.backward(cotangent)
    return [out, x.grad, weights.grad, *(t.grad for t in copies.values() if t is not None)]


def in_float64(experts):
    return ExpertWeights(**{n: None if t is None else t.double() for n, t in vars(experts).items()})


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("config", "biased"), CONFIGS)
def test_agrees_with_the_reference_and_its_gradients(
    implementation, config, biased, dtype, make_experts, assert_close
):
    T, K, E, H, I = 11, 2, 4, 16, 24
    x = (0.5 * torch.randint(-2, 3, (T, H))).to(dtype)
    weights = 0.5 * torch.randint(1, 3, (T, K))
    experts = make_experts(E, H, I, dtype, config.gated, biased)
    ids = torch.randint(-1, E + 1, (T, K))
    weights[(ids < 0) | (ids >= E)] = float("nan")
    cotangent = torch.randn(T, H).to(dtype)
    given = (x, experts, weights, ids, config, None, cotangent)
    actual = with_gradients(implementation, *given)
    expected = with_gradients(
        reference.experts,
        x.double(),
        in_float64(experts),
        weights.double(),
        ids,
        config,
        None,
        cotangent.double(),
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours is not None
        assert_close(ours, theirs, dtype)
    assert actual[0].dtype is dtype


@implementations
def test_maps_duplicates_and_empty_experts(implementation, make_experts, assert_close):
    experts = make_experts(5, 8, 8, biased=True)
    expert_map = torch.tensor([-1, 4, 0, -1, 2], dtype=torch.int32)
    ids = torch.tensor([[1, 1], [2, 3], [0, -5], [7, 4], [4, 4]])
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    given = (x, experts, weights, ids, ExpertsConfig(), expert_map)
    for ours, theirs in zip(
        with_gradients(implementation, *given),
        with_gradients(reference.experts, *given),
        strict=True,
    ):
        assert_close(ours, theirs)
    gradients = with_gradients(implementation, *given)[3:]
    assert all((g[[1, 3]] == 0).all() for g in gradients)


@implementations
@pytest.mark.parametrize(("T", "E"), [(0, 3), (4, 3), (4, 0)])
def test_nothing_routed_gives_zeros_and_zero_gradients(implementation, T, E, make_experts):
    experts = make_experts(E, 8, 8, biased=True)
    ids = torch.full((T, 2), -1)
    weights = torch.full((T, 2), float("nan"))
    for tensor in with_gradients(
        implementation, torch.randn(T, 8), experts, weights, ids, ExpertsConfig()
    ):
        assert tensor is not None
        assert (tensor == 0).all()


@implementations
def test_a_non_finite_token_changes_no_other(implementation, make_experts):
    x, weights = torch.randn(9, 8), torch.rand(9, 2)
    experts, ids = make_experts(3, 8, 8), torch.randint(0, 3, (9, 2))
    clean = implementation(x, experts, weights, ids, ExpertsConfig())
    for value in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[4] = value
        out = implementation(dirty, experts, weights, ids, ExpertsConfig())
        assert not out[4].isfinite().any()
        others = torch.arange(9) != 4
        assert torch.equal(out[others], clean[others])


@implementations
@pytest.mark.parametrize(("H", "I"), [(5, 7), (1, 1), (9, 16), (16, 9)])
def test_sizes_and_strides_that_grouped_mm_refuses(
    implementation, H, I, make_experts, assert_close
):
    experts = make_experts(3, H, I)
    strided = ExpertWeights(
        gate_up=torch.stack([experts.gate_up] * 2, -1)[..., 0],
        down=experts.down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    x, weights = torch.randn(H, 6).T, torch.rand(6, 4)[:, ::2]
    ids = torch.randint(0, 3, (2, 6)).T
    expected = with_gradients(reference.experts, x, experts, weights, ids, ExpertsConfig())
    actual = with_gradients(implementation, x, strided, weights, ids, ExpertsConfig())
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@implementations
def test_weights_of_another_dtype_are_multiplied_in_float32(
    implementation, make_experts, assert_close
):
    x, weights = torch.randn(6, 8), torch.rand(6, 2)
    ids = torch.randint(0, 3, (6, 2))
    for x_dtype, w_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        experts = make_experts(3, 8, 8, w_dtype, biased=True)
        given = (x.to(x_dtype), experts, weights.to(w_dtype), ids, ExpertsConfig())
        actual = with_gradients(implementation, *given)
        for ours, theirs in zip(actual, with_gradients(reference.experts, *given), strict=True):
            assert ours.dtype is theirs.dtype
            assert_close(ours, theirs, torch.bfloat16)


@implementations
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bias_is_added_before_the_product_is_rounded(implementation, bias_dtype):
    H, I = 24, 1
    weights = torch.ones(1, 1)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    x = torch.ones(1, H, dtype=torch.bfloat16)
    gate_up = torch.zeros(1, I, H, dtype=torch.bfloat16)
    gate_up[0, 0, :2] = torch.tensor([2.0, 2.0**-9])
    down = torch.randn(1, H, I).to(torch.bfloat16)
    # Both products need more digits than bfloat16 has; what is left after the bias needs few.
    gate_up_bias = torch.full((1, I), -2.0 + 2.0**-7, dtype=bias_dtype)
    config = ExpertsConfig("relu", gated=False)
    hidden = (2.0 + 2.0**-9 + gate_up_bias.double()).to(torch.bfloat16).double()
    down_bias = -(hidden * down[0, :, 0].double()).to(bias_dtype)
    experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    out = implementation(x, experts, weights, ids, config)
    exact = hidden * down[0, :, 0].double() + down_bias.double()
    assert torch.equal(out, exact.to(torch.bfloat16))


@implementations
def test_memory_that_was_never_written_does_not_leak(implementation, make_experts, assert_close):
    x, weights = torch.randn(7, 8), torch.rand(7, 3)
    experts, ids = make_experts(3, 8, 8), torch.randint(-2, 5, (7, 3))
    given = (x, experts, weights, ids, ExpertsConfig())
    expected = with_gradients(reference.experts, *given)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        actual = with_gradients(implementation, *given)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


def test_float64_takes_the_loop(make_experts):
    experts = make_experts(3, 4, 5, torch.float64, biased=True)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-1, 3, (4, 2))
    tensors = [t.requires_grad_() for t in leaves_of(experts)]
    assert torch.autograd.gradcheck(
        lambda x, weights, *_: experts_torch(x, experts, weights, ids, ExpertsConfig()),
        (x, weights, *tensors),
    )


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_with_ragged_edges(dtype, make_experts, assert_close):
    T, K, E, H, I = 40, 2, 3, 40, 24
    experts = make_experts(E, H, I, dtype, biased=True)
    x, weights = torch.randn(T, H).to(dtype), torch.rand(T, K)
    ids = torch.randint(0, E, (T, K))
    expected = reference.experts(x, experts, weights, ids, ExpertsConfig())
    for group_m in (1, 4):
        shape = TileShape(16, 16, 16, group_m=group_m)
        out = sum_of_experts_triton(
            x, experts, weights, ids, ExpertsConfig(), shapes=Shapes(*[shape] * 5)
        )
        assert out.dtype is torch.float32
        assert_close(out, expected, dtype)


@pytest.mark.triton
def test_the_kernels_are_launched_and_need_no_host(make_experts):
    before = launches.copy()
    ids = torch.randint(0, 3, (5, 2))
    experts_triton(torch.randn(5, 8), make_experts(3, 8, 8), torch.rand(5, 2), ids, ExpertsConfig())
    kernels = ("align_place_kernel", "experts_up_kernel", "experts_down_kernel")
    assert launches - before == dict.fromkeys((*kernels, "combine_rows_kernel"), 1)


def test_products_over_one_table_share_the_height_of_its_tiles():
    for rows in (1, 64, 500, 4096, 10**6):
        for dtype in (torch.float32, torch.bfloat16):
            *over_rows, _ = tile_shapes(rows, 8, 768, 2048, dtype)
            assert len({shape.m for shape in over_rows}) == 1


@batched_implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_agrees_with_the_reference(implementation, dtype, make_experts, assert_close):
    for config, biased in (CONFIGS[0], CONFIGS[-1]):
        experts = make_experts(4, 16, 8, dtype, config.gated, biased)
        x = torch.randn(4, 5, 16).to(dtype)
        counts = torch.tensor([0, 5, 3, 1])
        for expert, count in enumerate(counts.tolist()):
            x[expert, count:] = float("nan")
        found = []
        for run, given in (
            (implementation, (x, experts)),
            (reference.experts_batched, (x.double(), in_float64(experts))),
        ):
            leaves = [t.clone().requires_grad_() for t in (given[0], *leaves_of(given[1]))]
            parts = iter(leaves[1:])
            copy = ExpertWeights(
                **{n: None if t is None else next(parts) for n, t in vars(given[1]).items()}
            )
            out = run(leaves[0], counts, copy, config)
            out.sum().backward()
            found.append([out, *(leaf.grad for leaf in leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, dtype)
        assert found[0][0].dtype is dtype


@pytest.mark.parametrize(
    "implementation", [experts_torch, pytest.param(experts_triton, marks=pytest.mark.triton)]
)
def test_bad_arguments_are_refused(implementation, make_experts):
    experts, config = make_experts(3, 8, 6), ExpertsConfig()
    x, weights, ids = torch.randn(4, 8), torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights: expected shape \[4, K\], got \[3, 2\]"):
        implementation(x, experts, weights[:3], ids, config)
    with pytest.raises(ValueError, match=r"expert_ids: expected shape \[4, 2\]"):
        implementation(x, experts, weights, ids[:, :1], config)
    with pytest.raises(ValueError, match=r"experts.gate_up: expected shape \[3, 6, 8\]"):
        implementation(x, experts, weights, ids, ExpertsConfig(gated=False))
    with pytest.raises(ValueError, match="expert_map: expected rows below 3, got 3"):
        implementation(x, experts, weights, ids, config, torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="expert_ids: expected dtype int32 or int64"):
        implementation(x, experts, weights, weights, config)
