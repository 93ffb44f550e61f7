"""Packed experts: the layout, the kernels and the way of torch, against the reference."""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from moe_optimized import alignment, dispatch, quantized_kernels
from moe_optimized import quantized_experts as fast
from moe_optimized.experts import experts as float_experts
from moe_optimized.experts_triton import TileShape
from moe_optimized.interpreter import COMPILED, launches
from moe_optimized.quantized_experts import (
    experts_batched_quantized,
    experts_quantized,
    experts_quantized_torch,
    experts_quantized_triton,
)
from moe_optimized.quantized_kernels import QuantizedShapes, quantized_shapes, run_quantized
from moe_optimized.quantized_layout import CODES, prepare, prepare_matrix, unpack_prepared
from moe_reference import quantized_experts as reference
from moe_reference.activation_quantization import round_activations
from moe_reference.activations import activate
from moe_reference.config import ExpertsConfig
from moe_reference.loading import move
from moe_reference.quantization import dequantize, quantize
from moe_reference.quantized_slicing import slice_quantized_tensor_parallel
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FORMATS = [
    ("uint4b8", {"group_size": 32}),
    ("uint4b8", {"group_size": -1}),
    ("uint4b8", {"group_size": 8}),
    ("uint4b8", {"group_size": 48}),
    ("uint4", {"group_size": 32, "scale_dtype": torch.float16}),
    ("uint4", {"group_size": 24}),
    ("uint8b128", {"group_size": 32, "scale_dtype": torch.bfloat16}),
    ("uint8b128", {"group_size": 4}),
    ("e4m3", {"granularity": "tensor"}),
    ("e4m3", {"granularity": "channel"}),
    ("e4m3", {"granularity": "block", "block_size": 32}),
    ("e4m3", {"granularity": "block", "block_size": 5}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("Q8_0", {}),
    ("Q8_1", {}),
]
formats = pytest.mark.parametrize(("format", "options"), FORMATS, ids=lambda v: str(v))
INTEGERS = ("uint4b8", "uint8b128", "uint4")


def act_order(E: int, D: int, groups: int) -> torch.Tensor:
    """Groups of equal size in any order, another one for each expert."""
    return torch.stack([(torch.arange(D) * groups // D)[torch.randperm(D)] for _ in range(E)])


def dirty(tensor: QuantizedTensor, columns: int = 3) -> QuantizedTensor:
    """The last row and the last columns taken out of the shape, with NaN for scales of the row."""
    E, O, D = tensor.shape
    scales = tensor.scales
    if scales is not None and scales.is_floating_point() and scales.shape[1] == O:
        scales = scales.clone()
        scales[:, -1] = float("nan")
    return replace(tensor, scales=scales, shape=(E, O - 1, D - columns))


# The layout.


@formats
def test_the_layout_stands_for_the_same_weights(format, options):
    tensors = [quantize(torch.randn(2, 11, 96), format, **options)]
    tensors += [dirty(tensors[0]), dirty(tensors[0], 51)]
    if format in INTEGERS:
        B = options["group_size"]
        groups = 1 if B == -1 else 96 // B
        tensors.append(
            quantize(torch.randn(2, 11, 96), format, g_idx=act_order(2, 96, groups), **options)
        )
        # Groups of any size, some of them empty.
        uneven = torch.randint(0, groups, (2, 96))
        tensors.append(quantize(torch.randn(2, 11, 96), format, g_idx=uneven, **options))
    for tensor in tensors:
        prepared = prepare_matrix(tensor)
        expected = dequantize(tensor)
        for e in range(2):
            # The two scales of nvfp4 are multiplied beforehand, which is rounded.
            rtol = 2**-23 if format == "nvfp4" else 0
            torch.testing.assert_close(
                unpack_prepared(prepared, e), expected[e], rtol=rtol, atol=0, equal_nan=True
            )


def test_a_step_reads_one_piece_of_memory_and_halves_of_bytes_are_columns_in_order():
    codes = torch.arange(128)[None, None] % 16
    words = (codes.unflatten(2, (16, 8)) << torch.arange(0, 32, 4)).sum(3)
    words = torch.where(words >= 2**31, words - 2**32, words).int().expand(1, 5, 16)
    tensor = QuantizedTensor(
        "uint4b8", words, torch.ones(1, 5, 1), group_size=128, shape=(1, 5, 128)
    )
    prepared = prepare_matrix(tensor)
    assert prepared.packed.shape == (1, 1, 5, 64)
    assert (prepared.depth, prepared.run) == (64, 128)
    assert torch.equal(prepared.packed[0, 0, 4] & 15, codes[0, 0, :64].to(torch.uint8))
    assert torch.equal(prepared.packed[0, 0, 4] >> 4, codes[0, 0, 64:].to(torch.uint8))


def test_act_order_in_full_groups_keeps_their_scales():
    tensor = quantize(torch.randn(2, 3, 128), "uint4b8", group_size=64, g_idx=act_order(2, 128, 2))
    prepared = prepare_matrix(tensor)
    assert (prepared.depth, prepared.share) == (64, 1)
    assert torch.equal(prepared.scales, tensor.scales.mT)


def test_a_format_without_a_layout_is_refused():
    experts = quantize_experts_of("Q4_K", {}, H=256, I=256)
    with pytest.raises(ValueError, match=r"experts.gate_up.format: expected one of .*, got 'Q4_K'"):
        prepare(experts)
    assert set(CODES) == {name for name, _ in FORMATS}


# Unpacking.


@pytest.mark.triton
@formats
def test_unpacking_is_exact(format, options):
    tensor = quantize(torch.randn(2, 9, 96), format, **options)
    for each in (tensor, dirty(tensor)):
        assert torch.equal(fast.dequantize_triton(each), dequantize(each))
        assert torch.equal(fast.dequantize(each), dequantize(each))


@pytest.mark.triton
def test_nan_codes_of_float8_stay_nan():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 8, 32)
    tensor = QuantizedTensor(
        "e4m3", codes.view(torch.float8_e4m3fn), torch.full((1, 1, 1), 0.5), shape=(1, 8, 32)
    )
    unpacked = fast.dequantize_triton(tensor)
    torch.testing.assert_close(unpacked, dequantize(tensor), rtol=0, atol=0, equal_nan=True)
    gate_up = replace(tensor, packed=torch.ones_like(tensor.packed, dtype=torch.float32).to(
        torch.float8_e4m3fn
    ))  # fmt: skip
    down = replace(tensor, packed=tensor.packed.mT.contiguous(), shape=(1, 32, 8))
    experts = QuantizedExperts(gate_up, down)
    x, ids = torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64)
    config = ExpertsConfig(gated=False)
    out = experts_quantized_triton(x, experts, torch.ones(1, 1), ids, config)
    expected = reference.experts_quantized(x, experts, torch.ones(1, 1), ids, config)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()


@pytest.mark.triton
def test_what_the_unpacking_kernel_does_not_take():
    with pytest.raises(ValueError, match=r"packed.format: expected one of .*, got 'Q4_K'"):
        fast.dequantize_triton(quantize(torch.ones(1, 1, 256), "Q4_K"))
    narrow = quantize(torch.ones(1, 1, 8), "uint4b8", group_size=8)
    wide = replace(narrow, scales=narrow.scales.double())
    with pytest.raises(ValueError, match=r"packed.scales: expected .*, got float64"):
        fast.dequantize_triton(wide)
    assert fast.dequantize(wide).dtype is torch.float64


# The products.


def quantize_experts_of(
    format, options, E=3, H=32, I=64, gated=True, biased=False, dtype=torch.float32
):
    J = 2 * I if gated else I
    gate_up, down = 0.3 * torch.randn(E, J, H), 0.3 * torch.randn(E, H, I)
    biases = (torch.randn(E, J).to(dtype), torch.randn(E, H).to(dtype)) if biased else ()
    return QuantizedExperts(
        quantize(gate_up, format, **options), quantize(down, format, **options), *biases
    )


def routed(T=6, K=2, E=3, H=32, dtype=torch.float32):
    """Tokens, weights and ids; ids that are not here have NaN for a weight."""
    ids = torch.randint(-1, E + 1, (T, K))
    weights = torch.rand(T, K)
    weights[(ids < 0) | (ids >= E)] = float("nan")
    return torch.randn(T, H).to(dtype), weights, ids


def expected_of(x, experts, weights, ids, config, expert_map=None):
    wide = x.double() if x.dtype is torch.float32 else x.float()
    return reference.experts_quantized(wide, experts, weights, ids, config, expert_map)


implementations = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(experts_quantized_torch, id="torch"),
        pytest.param(experts_quantized_triton, id="triton", marks=pytest.mark.triton),
    ],
)


@implementations
@formats
def test_every_format_agrees_with_the_reference(implementation, format, options, assert_close):
    config = ExpertsConfig()
    H, I = (48, 48) if options.get("group_size") in (24, 48) else (32, 64)
    experts = quantize_experts_of(format, options, H=H, I=I)
    x, weights, ids = routed(H=H)
    expected = expected_of(x, experts, weights, ids, config)
    assert_close(implementation(x, experts, weights, ids, config), expected, x.dtype)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["uint4", "uint8b128", "e4m3", "mxfp4"])
def test_half_dtypes_agree_with_the_reference(implementation, format, dtype, assert_close):
    config = ExpertsConfig("gelu_tanh")
    options = {"group_size": 32} if format in INTEGERS else {}
    experts = quantize_experts_of(format, options, biased=True, dtype=dtype)
    x, weights, ids = routed(dtype=dtype)
    expected = expected_of(x, experts, weights, ids, config)
    given = prepare(experts) if dtype is torch.bfloat16 else experts
    out = implementation(x, given, weights, ids, config)
    assert out.dtype is dtype
    assert_close(out, expected, dtype)


CONFIGS = [
    ExpertsConfig("silu", weight_on="input"),
    ExpertsConfig("swigluoai", weight_on="input", alpha=1.1, limit=0.5),
    ExpertsConfig("swiglu_limit", limit=0.7),
    ExpertsConfig("gelu", gated=False, weight_on="input"),
    ExpertsConfig("relu2", gated=False),
]


@implementations
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.activation)
def test_biases_weights_on_either_side_and_maps(implementation, config, assert_close):
    experts = quantize_experts_of("uint4", {"group_size": 16}, gated=config.gated, biased=True)
    expert_map = torch.tensor([-1, 2, 0, -1, 1], dtype=torch.int32)
    ids = torch.tensor([[1, 1], [2, 3], [0, -5], [7, 4], [4, 4]], dtype=torch.int32)
    x, weights = torch.randn(32, 5).T, torch.rand(5, 4)[:, ::2]
    given = (experts, weights, ids, config, expert_map)
    out = implementation(x, *given)
    assert_close(out, expected_of(x, *given), torch.float32)
    assert (out[2] == 0).all()


@implementations
@pytest.mark.parametrize("format", INTEGERS)
def test_act_order_and_slices_of_it(implementation, format, assert_close):
    E, H, I, config = 2, 32, 64, ExpertsConfig()
    gate_up = quantize(
        0.3 * torch.randn(E, 2 * I, H), format, group_size=16, g_idx=act_order(E, H, 2)
    )
    down = quantize(0.3 * torch.randn(E, H, I), format, group_size=32, g_idx=act_order(E, I, 2))
    experts = QuantizedExperts(gate_up, down, torch.randn(E, 2 * I), torch.randn(E, H))
    x, weights, ids = routed(E=E, H=H)
    for each in (experts, slice_quantized_tensor_parallel(experts, 2, 1)):
        out = implementation(x, each, weights, ids, config)
        assert_close(out, expected_of(x, each, weights, ids, config), torch.float32)
    assert not each.is_k_full


@pytest.mark.triton
@pytest.mark.parametrize(
    ("format", "dtype"), [("uint4b8", torch.bfloat16), ("e4m3", torch.float32)], ids=str
)
def test_many_tiles_with_ragged_edges(format, dtype, assert_close):
    config = ExpertsConfig()
    options = {"group_size": 8} if format == "uint4b8" else {"block_size": 16}
    experts = quantize_experts_of(format, options, E=2, H=24, I=24, biased=True)
    x, weights, ids = routed(T=12, E=2, H=24, dtype=dtype)
    expected = expected_of(x, experts, weights, ids, config)
    shape = TileShape(16, 16, 0, group_m=4)
    out = run_quantized(
        x, prepare(experts), weights, ids, config, None, QuantizedShapes(shape, shape)
    )
    assert_close(out, expected, dtype)


@implementations
@pytest.mark.parametrize(("T", "E"), [(0, 3), (4, 3), (4, 0)])
def test_nothing_routed_gives_zeros(implementation, T, E):
    experts = quantize_experts_of("mxfp4", {}, E=E, biased=True)
    ids, weights = torch.full((T, 2), -1), torch.full((T, 2), float("nan"))
    for given in (experts, prepare(experts)):
        out = implementation(torch.randn(T, 32), given, weights, ids, ExpertsConfig())
        assert out.shape == (T, 32)
        assert (out == 0).all()


@implementations
def test_a_non_finite_token_changes_no_other(implementation):
    experts = quantize_experts_of("uint4b8", {"group_size": 32})
    x, weights, ids = torch.randn(6, 32), torch.rand(6, 2), torch.randint(0, 3, (6, 2))
    clean = implementation(x, experts, weights, ids, ExpertsConfig())
    for value in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[4] = value
        out = implementation(dirty, experts, weights, ids, ExpertsConfig())
        assert not out[4].isfinite().any()
        assert torch.equal(out[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]])


def test_batched_agrees_with_the_reference(assert_close):
    experts = quantize_experts_of("uint8b128", {"group_size": 32}, biased=True)
    x, counts = torch.randn(3, 4, 32), torch.tensor([0, 4, 2])
    x[2, 2:] = float("nan")
    config = ExpertsConfig(weight_on="input")
    for given in (experts, prepare(experts)):
        out = experts_batched_quantized(x, counts, given, config)
        expected = reference.experts_batched_quantized(x.double(), counts, experts, config)
        assert_close(out, expected, torch.float32)
    with pytest.raises(ValueError, match="tokens_per_expert: expected counts from 0 to 4, got 5"):
        experts_batched_quantized(x, counts + 1, experts, config)


# 8-bit activations.


def rounded_experts(format_of_rows, **options):
    experts = quantize_experts_of("e4m3", options, H=56, I=72, biased=True)
    return replace(experts, activation_format=format_of_rows)


ROUNDED = [
    ("e4m3_block", {"granularity": "block"}),
    ("e4m3_block", {"granularity": "block", "block_size": 80}),
    ("e4m3_block", {"granularity": "block", "block_size": 48}),
    ("e4m3", {"granularity": "block", "block_size": 32}),
    ("e4m3", {"granularity": "tensor"}),
    ("e4m3", {"granularity": "channel"}),
]


@implementations
@pytest.mark.parametrize(("rows", "options"), ROUNDED, ids=str)
def test_rows_in_float8_agree_with_the_reference(implementation, rows, options, assert_close):
    experts, config = rounded_experts(rows, **options), ExpertsConfig()
    x, weights, ids = routed(H=56)
    before = launches.copy()
    given = experts if rows == "e4m3" else prepare(experts)
    out = implementation(x, given, weights, ids, config)
    assert_close(out, expected_of(x, experts, weights, ids, config), torch.float32)
    rounded = (launches - before)["round_rows_kernel"]
    assert rounded == (2 if implementation is experts_quantized_triton else 0)


@pytest.mark.triton
def test_hidden_rows_are_rounded_to_the_dtype_before_they_are_to_float8(assert_close):
    experts, config = rounded_experts("e4m3_block", block_size=48), ExpertsConfig()
    x = torch.randn(4, 56).bfloat16()
    ids, weights = torch.tensor([[0], [2], [1], [0]]), torch.ones(4, 1)
    gate_up, down = dequantize(experts.gate_up), dequantize(experts.down)
    expected = []
    for row, e in zip(x, ids.flatten().tolist(), strict=True):
        row = round_activations(row[None].float(), "e4m3_block", 48)
        hidden = activate(row @ gate_up[e].T + experts.gate_up_bias[e], config).bfloat16()
        hidden = round_activations(hidden.float(), "e4m3_block", 48)
        expected.append(hidden @ down[e].T + experts.down_bias[e])
    out = experts_quantized_triton(x, experts, weights, ids, config)
    # Two roundings of the result to bfloat16, of the packed row and of the sum.
    torch.testing.assert_close(out.float(), torch.cat(expected), rtol=2**-7, atol=2**-7)


@pytest.mark.triton
def test_rows_in_float8_have_the_codes_and_scales_of_the_reference():
    from moe_optimized.quantized_kernels import _round_rows

    x = torch.randn(9, 56) * torch.logspace(-30, 30, 9)[:, None]
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), 0.0
    x[3] = torch.randn(56) * torch.logspace(-9, 0, 56)
    for rows, options in ROUNDED:
        experts = rounded_experts(rows, **options)
        codes, scales, _ = _round_rows(x, prepare(experts), prepare(experts).gate_up)
        B = experts.gate_up.group_size if rows == "e4m3_block" else 56
        found = codes.float() * scales.repeat_interleave(B, 1)[:, :56]
        expected = round_activations(x, rows, B)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# What is refused, what is launched, and what is allocated.


def test_what_no_kernel_takes_goes_the_way_of_torch(assert_close):
    x, weights, ids = routed()
    plain = quantize_experts_of("e4m3", {}, I=64)
    wide = x.double()
    cases = [
        (wide, plain, ExpertsConfig(), "x: expected float32, bfloat16 or float16, got float64"),
        (x, replace(plain, activation_format="int8"), ExpertsConfig(), "got 'int8'"),
        (
            x,
            replace(plain, activation_format="e4m3", activation_scales=torch.full((3, 2), 0.02)),
            ExpertsConfig(),
            "got fixed scales",
        ),
        (
            x,
            replace(plain, activation_format="e4m3"),
            ExpertsConfig(weight_on="input"),
            "got 'input'",
        ),
        (
            x,
            replace(quantize_experts_of("mxfp4", {}, I=64), activation_format="e4m3"),
            ExpertsConfig(),
            "got another format or block",
        ),
        (
            torch.randn(6, 256),
            quantize_experts_of("Q4_K", {}, H=256, I=256),
            ExpertsConfig(),
            "got 'Q4_K'",
        ),
        (x.clone().requires_grad_(), plain, ExpertsConfig(), "got one to be taken"),
    ]
    for x, experts, config, reason in cases:
        assert fast.refusal(x, experts, weights, config).endswith(reason)
        with pytest.raises(ValueError, match=reason):
            experts_quantized_triton(x, experts, weights, ids, config)
        out = experts_quantized(x, experts, weights, ids, config)
        expected = reference.experts_quantized(x, experts, weights, ids, config)
        assert_close(out, expected)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_gradients_are_those_of_the_reference(weight_on, activations, assert_close):
    experts = quantize_experts_of("uint4", {"group_size": 32}, biased=True)
    experts = replace(experts, activation_format=activations)
    x, weights, ids = torch.randn(5, 32), torch.rand(5, 2), torch.randint(-1, 4, (5, 2))
    config = ExpertsConfig("swigluoai", weight_on=weight_on)
    found = []
    for run in (experts_quantized, reference.experts_quantized):
        biases = experts.gate_up_bias, experts.down_bias
        leaves = [t.clone().requires_grad_() for t in (x, weights, *biases)]
        given = replace(experts, gate_up_bias=leaves[2], down_bias=leaves[3])
        out = run(leaves[0], given, leaves[1], ids, config).square().sum()
        # What is rounded has a gradient of zero, or none.
        found.append(torch.autograd.grad(out, leaves, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


NEEDED = [
    # For each expert: the products for x, for weights and for the two biases, each alone.
    ("output", None, (3, 2, 2, 0)),
    ("input", None, (3, 3, 2, 0)),
    ("output", "int8", (0, 2, 0, 0)),
    ("input", "int8", (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("weight_on", "activations", "counts"), NEEDED)
def test_a_backward_makes_the_products_that_it_needs(weight_on, activations, counts, monkeypatch):
    experts = quantize_experts_of("uint4", {"group_size": 32}, biased=True)
    experts = replace(experts, activation_format=activations)
    x, weights, ids = torch.randn(5, 32), torch.rand(5, 2), torch.randint(0, 3, (5, 2))
    config = ExpertsConfig(weight_on=weight_on)
    tensors = x, weights, experts.gate_up_bias, experts.down_bias

    def gradients(*wanted):
        leaves = [t.detach().requires_grad_(place in wanted) for place, t in enumerate(tensors)]
        given = replace(experts, gate_up_bias=leaves[2], down_bias=leaves[3])
        out = experts_quantized(leaves[0], given, leaves[1], ids, config).square().sum()
        made.clear()
        return torch.autograd.grad(out, [leaves[place] for place in wanted])

    made, right = [], fast.product
    monkeypatch.setattr(fast, "product", lambda *given: made.append(1) or right(*given))
    together = gradients(0, 1, 2, 3)
    for place, count in enumerate(counts):
        (alone,) = gradients(place)
        assert torch.equal(alone, together[place])
        assert len(made) == count * len(ids.unique())


def test_a_gradient_of_the_gradient_is_refused():
    experts = quantize_experts_of("mxfp4", {})
    x, weights, ids = routed()
    x.requires_grad_()
    out = experts_quantized(x, experts, weights, ids, ExpertsConfig()).sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="experts_quantized_torch: expected to be diff"):
        first.sum().backward()


def test_gradients_keep_no_unpacked_weights():
    experts = quantize_experts_of("mxfp4", {}, biased=True)
    x, weights, ids = routed()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts_quantized(x.requires_grad_(), experts, weights, ids, ExpertsConfig())
    given = (x, weights, experts.gate_up_bias, experts.down_bias, ids)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in given}


@pytest.mark.parametrize("kind", ["packed", "prepared", "floats"])
@pytest.mark.parametrize("name", ["gate_up_bias", "down_bias"])
def test_a_bias_that_changes_before_the_gradient_is_an_error(name, kind, make_experts):
    if kind == "floats":
        run, experts = float_experts, make_experts(3, 32, 64, biased=True)
    else:
        run, experts = experts_quantized, quantize_experts_of("mxfp4", {}, biased=True)
        experts = prepare(experts) if kind == "prepared" else experts
    x, weights, ids = torch.randn(4, 32), torch.rand(4, 2), torch.randint(0, 3, (4, 2))
    out = run(x.requires_grad_(), experts, weights, ids, ExpertsConfig())
    getattr(experts, name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@implementations
def test_bad_arguments_are_refused(implementation):
    experts, config = quantize_experts_of("uint4b8", {"group_size": 32}), ExpertsConfig()
    x, weights, ids = torch.randn(4, 32), torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights: expected shape \[4, K\], got \[3, 2\]"):
        implementation(x, experts, weights[:3], ids, config)
    with pytest.raises(ValueError, match=r"experts.gate_up.shape: expected \(3, 64, 32\)"):
        implementation(x, experts, weights, ids, ExpertsConfig(gated=False))
    with pytest.raises(ValueError, match=r"experts.gate_up.shape: expected \(3, 128, 16\)"):
        implementation(x[:, :16], experts, weights, ids, config)
    with pytest.raises(TypeError, match="experts: expected QuantizedExperts, got int"):
        implementation(x, 3, weights, ids, config)
    with pytest.raises(TypeError, match="config: expected an ExpertsConfig, got str"):
        implementation(x, experts, weights, ids, "silu")
    with pytest.raises(ValueError, match="expert_map: expected rows below 3, got 3"):
        implementation(x, experts, weights, ids, config, torch.tensor([0, 3]))


@implementations
@pytest.mark.parametrize("prepared", [False, True])
def test_biases_that_do_not_fit_are_refused(implementation, prepared):
    experts = quantize_experts_of("uint4", {"group_size": 32}, biased=True)
    given = torch.randn(4, 32), torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    for name, rows in (("gate_up_bias", 128), ("down_bias", 32)):
        wrong = [
            (torch.zeros(3, rows // 2), ValueError, rf"expected shape \[3, {rows}\], got"),
            (torch.zeros(2, rows), ValueError, rf"expected shape \[3, {rows}\], got"),
            (torch.zeros(3, rows, dtype=torch.int64), TypeError, "expected dtype .*, got int64"),
        ]
        for bias, error, message in wrong:
            unfit = replace(prepare(experts) if prepared else experts, **{name: bias})
            with pytest.raises(error, match=rf"experts\.{name}: {message}"):
                implementation(given[0], unfit, *given[1:], ExpertsConfig())


@pytest.mark.triton
def test_the_kernels_are_launched_and_the_way_of_torch_launches_none():
    experts, config = quantize_experts_of("mxfp4", {}), ExpertsConfig()
    x, weights, ids = routed()
    before = launches.copy()
    experts_quantized_torch(x, experts, weights, ids, config)
    assert launches == before
    experts_quantized_triton(x, prepare(experts), weights, ids, config)
    kernels = ("align_place_kernel", "quantized_up_kernel", "quantized_down_kernel")
    assert launches - before == dict.fromkeys((*kernels, "combine_rows_kernel"), 1)
    before = launches.copy()
    fast.dequantize_triton(experts.down)
    assert launches - before == Counter(dequantize_kernel=1)


class LiveBytes(TorchDispatchMode):
    """What operations allocate less what was freed again, in bytes: now, and at most.

    Floats are counted apart, those of one byte not among them: they are codes.
    """

    def __init__(self):
        super().__init__()
        self.now = Counter()
        self.peak = Counter()
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What is given to an operation and was not made by one was there before.
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                self.known.setdefault(t.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage() not in self.known:
                self.made(t)
        return out

    def made(self, t):
        storage = t.untyped_storage()
        self.known[storage] = True
        kinds = ["all"]
        if t.is_floating_point() and t.element_size() > 1:
            kinds.append("floats")
        for kind in kinds:
            self.now[kind] += storage.nbytes()
            self.peak[kind] = max(self.peak[kind], self.now[kind])
        weakref.finalize(storage, self.freed, kinds, storage.nbytes()).atexit = False

    def freed(self, kinds, size):
        for kind in kinds:
            self.now[kind] -= size


def peak_of(call, device="cpu"):
    """The most bytes that a call has at a time: all, and of floats. A GPU counts all as one."""
    if torch.device(device).type == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return Counter(dict.fromkeys(("all", "floats"), torch.cuda.max_memory_allocated() - before))
    # What was there before is nothing that a collection has to look at.
    gc.freeze()
    try:
        with LiveBytes() as live:
            out = call()
        assert live.now["all"] >= out.numel() * out.element_size()
        del out
        # The interpreter's cycles keep what a kernel was given, which makes the peak no smaller.
        gc.collect()
        assert live.now["all"] == 0
    finally:
        gc.unfreeze()
    return live.peak


class Waits(TorchDispatchMode):
    """Operations whose result has to be on the CPU before the next one can start, counted."""

    OPERATIONS = ("nonzero", "_unique2", "_local_scalar_dense", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.OPERATIONS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("format", "ordered"), [("uint4", False), ("uint4b8", True)])
def test_the_way_of_torch_waits_no_longer_for_more_experts(format, ordered):
    E, H, I = 6, 32, 64
    experts = quantize_experts_of(format, {"group_size": 16}, E=E, H=H, I=I)
    if ordered:
        matrices = [
            quantize(dequantize(matrix), format, group_size=16, g_idx=act_order(E, D, D // 16))
            for matrix, D in ((experts.gate_up, H), (experts.down, I))
        ]
        experts = QuantizedExperts(*matrices)
    x, weights, counts = torch.randn(6, H).requires_grad_(), torch.rand(6, 1), []
    for ids in (torch.zeros(6, 1, dtype=torch.int64), torch.arange(6)[:, None]):
        with Waits() as waits:
            out = experts_quantized_torch(x, experts, weights, ids, ExpertsConfig())
            torch.autograd.grad(out.sum(), x)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_live_bytes_are_counted_until_they_are_freed():
    x = torch.ones(1000)

    def call():
        first = x + 1
        second = first.view(10, 100) * 2
        del first
        third = second.to(torch.uint8)
        return (second[:1] * 2) + third.sum()

    # Two of 4000 bytes; a view keeps what it is of, and x was there.
    peak = peak_of(call)
    assert peak["floats"] == 8000
    assert peak["all"] == 8000
    with LiveBytes() as live:
        view = (x + 1)[:5]
        assert live.now["all"] == 4000
        x.view(10, 100).add_(1)
        assert live.now["all"] == 4000
        del view
        assert live.now["all"] == 0


TEMPORARIES = 8
"""Times a gate_up matrix in float32: what one expert's unpacking has at a time. Its codes as
numbers, its scales spread over them and their product, in float64 where that is exact."""

MEASURED = [
    *((name, options, None) for name, options in FORMATS),
    ("uint4b8", {"group_size": 32}, "act-order"),
    ("uint4", {"group_size": 16}, "act-order"),
    ("uint8b128", {"group_size": 32}, "act-order"),
    *(("e4m3", options, rows) for rows, options in ROUNDED[3:]),
    ("e4m3", {"block_size": 16}, "e4m3_block"),
]


@pytest.fixture
def no_launches(monkeypatch):
    """Leaves kernels out, which take long in the interpreter and allocate nothing that is counted.

    A GPU counts what its driver allocates as well, and is fast enough.
    """
    if not COMPILED:
        for module in (alignment, dispatch, quantized_kernels):
            monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)


@pytest.mark.triton
@pytest.mark.skipif(COMPILED, reason="nothing is left out on a GPU")
def test_without_launches_the_peak_is_the_same(request):
    experts = rounded_experts("e4m3_block", block_size=16)
    x, weights, ids = routed(H=56)

    def measured():
        given = (weights, ids, ExpertsConfig())
        before = launches.copy()
        peaks = [
            peak_of(lambda each=each: experts_quantized_triton(x, each, *given))
            for each in (experts, prepare(experts))
        ]
        return peaks, sum((launches - before).values())

    peaks, launched = measured()
    assert launched > 0
    request.getfixturevalue("no_launches")
    assert measured() == (peaks, 0)


@implementations
@pytest.mark.parametrize(("format", "options", "how"), MEASURED, ids=lambda v: str(v))
@pytest.mark.usefixtures("no_launches")
def test_the_weights_of_all_experts_are_never_unpacked(implementation, format, options, how):
    E, T, K, config = 12, 4, 2, ExpertsConfig()
    H = I = 96 if options.get("group_size") in (24, 48) else 64
    device = "cuda" if implementation is experts_quantized_triton and COMPILED else "cpu"
    experts = quantize_experts_of(format, options, E=E, H=H, I=I)
    if how == "act-order":
        parts = []
        for D, tensor in ((H, experts.gate_up), (I, experts.down)):
            order = act_order(E, D, D // options["group_size"])
            parts.append(quantize(dequantize(tensor), format, g_idx=order, **options))
        experts = QuantizedExperts(*parts)
    elif how is not None:
        experts = replace(experts, activation_format=how)
    x, weights, ids = torch.randn(T, H), torch.rand(T, K), torch.randint(0, E, (T, K))
    prepared, x, weights, ids = (
        each.to(device) if isinstance(each, torch.Tensor) else move(each, device)
        for each in (prepare(experts), x, weights, ids)
    )
    one_matrix = 4 * 2 * I * H
    # Groups that no part fits are filled up with columns of nobody, which are unpacked as well.
    laid_out = prepared.gate_up.packed.shape[1] * prepared.gate_up.run
    filled_matrix = one_matrix * laid_out // H
    # Rows of x as codes, hidden rows, output rows, and the result; what else there is are indices.
    activations = 4 * (2 * T * H + T * K * (2 * I + H))
    for given in (prepared, move(experts, device)):
        peak = peak_of(lambda given=given: implementation(x, given, weights, ids, config), device)
        if implementation is experts_quantized_torch:
            matrix = filled_matrix if given is prepared else one_matrix
            assert peak["floats"] <= activations + TEMPORARIES * matrix
        elif given is prepared:
            # A GPU gives out whole pieces of 512 bytes, tables of indices among them.
            assert device == "cuda" or peak["floats"] <= activations
            assert peak["all"] < one_matrix
        else:
            # The layout is made on the way: codes of one expert beside that, and no floats of it.
            packed = sum(each.packed.nbytes for each in (prepared.gate_up, prepared.down))
            assert peak["all"] < 2 * packed + 2 * one_matrix
        assert peak["floats"] < E * filled_matrix


def test_what_is_prepared_is_a_copy():
    experts = quantize_experts_of("uint4b8", {"group_size": 32})
    prepared = prepare(experts)
    expected = unpack_prepared(prepared.down, 1)
    experts.down.packed.zero_()
    experts.down.scales.zero_()
    assert torch.equal(unpack_prepared(prepared.down, 1), expected)


def test_products_over_one_table_share_the_height_of_its_tiles():
    for rows in (1, 64, 500, 4096, 10**6):
        for rounded in (False, True):
            up, down = quantized_shapes(rows, 8, 768, 2048, rounded)
            assert up.m == down.m
