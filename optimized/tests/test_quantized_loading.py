"""Experts that are laid out for the kernels once, while they are loaded."""

import pytest
import torch
from moe_optimized import quantized_layout
from moe_optimized.quantized_experts import (
    experts_quantized,
    experts_quantized_torch,
    experts_quantized_triton,
)
from moe_optimized.quantized_layout import PreparedExperts
from moe_optimized.quantized_loading import load_prepared_experts
from moe_reference import quantized_experts as reference
from moe_reference.config import ExpertsConfig
from moe_reference.families import TensorNames
from moe_reference.gptq_packing import to_gptq
from moe_reference.loading import load_and_quantize, load_experts
from moe_reference.placeholders import ExpertsPlaceholder
from moe_reference.quantization import quantize

E, H, I, B = 3, 64, 32, 16
SIZES = ExpertsPlaceholder(E, H, I)
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": B, "sym": True, "desc_act": False,
    "checkpoint_format": "gptq_v2",
}  # fmt: skip
SHAPES = {"gate": (I, H), "up": (I, H), "down": (H, I)}


def floats():
    return {f"experts.{e}.{name}_proj.weight": 0.3 * torch.randn(*shape)
            for e in range(E) for name, shape in SHAPES.items()}  # fmt: skip


def gptq_file():
    stored = {}
    for name, weight in floats().items():
        parts = to_gptq(quantize(weight[None], "uint4b8", group_size=B), "v2")
        for part, each in zip(("qweight", "qzeros", "scales", "g_idx"), parts, strict=True):
            stored[f"{name.removesuffix('weight')}{part}"] = each[0]
    return stored


def routed(num_experts=E):
    return torch.randn(5, H), torch.rand(5, 2), torch.randint(0, num_experts, (5, 2))


@pytest.fixture
def laid_out(monkeypatch):
    """The matrices that were laid out, each time that it happens."""
    right, made = quantized_layout.prepare_matrix, []

    def counted(tensor, *rest):
        made.append(tensor.shape)
        return right(tensor, *rest)

    monkeypatch.setattr(quantized_layout, "prepare_matrix", counted)
    return made


@pytest.mark.parametrize(
    "implementation",
    [
        experts_quantized,
        experts_quantized_torch,
        pytest.param(experts_quantized_triton, marks=pytest.mark.triton),
    ],
    ids=lambda each: each.__name__,
)
def test_the_layout_is_made_once_and_by_no_call(implementation, laid_out, assert_close):
    stored = gptq_file()
    loaded = load_prepared_experts(stored, TensorNames(), "", SIZES, GPTQ)
    assert isinstance(loaded, PreparedExperts)
    assert laid_out == [(E, 2 * I, H), (E, H, I)]
    expected_of = load_experts(stored, TensorNames(), "", SIZES, GPTQ)
    for _ in range(3):
        x, weights, ids = routed()
        given = (weights, ids, ExpertsConfig())
        out = implementation(x, loaded, *given)
        assert_close(out, reference.experts_quantized(x.double(), expected_of, *given), x.dtype)
    assert len(laid_out) == 2


@pytest.mark.parametrize("held", [None, [2, 0]])
def test_floats_are_packed_on_the_way(held, laid_out, assert_close):
    stored, options = floats(), {"group_size": B}
    given = (stored, TensorNames(), "", SIZES)
    loaded = load_prepared_experts(*given, held=held, format="uint4", **options)
    assert len(laid_out) == 2
    packed = load_and_quantize(*given, "uint4", held, **options)
    x, weights, ids = routed(len(held or range(E)))
    given = (weights, ids, ExpertsConfig())
    out = experts_quantized(x, loaded, *given)
    assert_close(out, reference.experts_quantized(x.double(), packed, *given), x.dtype)


def test_only_the_layout_goes_to_the_device():
    given = (gptq_file(), TensorNames(), "", SIZES, GPTQ)
    loaded = load_prepared_experts(*given, device="meta")
    for matrix in (loaded.gate_up, loaded.down):
        assert {matrix.packed.device.type, matrix.scales.device.type} == {"meta"}
    assert loaded.gate_up.shape == (E, 2 * I, H)


def test_what_the_file_says_of_activations_is_kept_or_left_out():
    one = torch.ones(H, H).to(torch.float8_e4m3fn)
    stored = {f"experts.0.{name}_proj.{part}": each for name in SHAPES
              for part, each in (("weight", one), ("weight_scale", torch.tensor(0.5)))}  # fmt: skip
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    given = (stored, TensorNames(), "", ExpertsPlaceholder(1, H, H), config)
    rounded = load_experts(*given).activation_format
    assert rounded is not None
    assert load_prepared_experts(*given).activation_format == rounded
    assert load_prepared_experts(*given, round_activations=False).activation_format is None


def test_what_has_no_layout_is_refused():
    given = (floats(), TensorNames(), "", SIZES)
    with pytest.raises(ValueError, match="expected packed experts, or a format for them"):
        load_prepared_experts(*given)
    with pytest.raises(TypeError, match="options: expected none without a format, got group_size"):
        load_prepared_experts(*given, group_size=B)
    for more, named in (
        ({"config": GPTQ}, "config"),
        ({"zero_points": "v1"}, "zero_points"),
        ({"config": GPTQ, "round_activations": False}, "config, round_activations"),
    ):
        with pytest.raises(TypeError, match=f"^{named}: expected none with a format"):
            load_prepared_experts(*given, **more, format="uint4", group_size=B)
    wide = ExpertsPlaceholder(1, 256, 256)
    stored = {f"experts.0.{name}_proj.weight": torch.ones(256, 256) for name in SHAPES}
    with pytest.raises(ValueError, match=r"experts.gate_up.format: .* got 'Q4_K'"):
        load_prepared_experts(stored, TensorNames(), "", wide, format="Q4_K")
