"""GGUF files, written and read back by llama.cpp's own Python package."""

import importlib.util
import sys

import numpy
import pytest
import torch
from moe_reference import gguf_loading
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import experts
from moe_reference.gguf_loading import load_gguf_experts
from moe_reference.placeholders import ExpertsPlaceholder
from moe_reference.quantized_experts import dequantize_experts, experts_quantized

gguf = pytest.importorskip("gguf")

E, H, I = 3, 256, 256
SIZES = ExpertsPlaceholder(E, H, I)
SHAPES = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}
PACKED = ("Q8_0", "Q4_K", "MXFP4")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def draw():
    return numpy.random.default_rng(0)


def encoded(draw, type_name, shape):
    """A tensor's bytes and what gguf says that they stand for."""
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in ("Q4_K", "MXFP4"):
        # Any bytes are blocks: what they stand for is for gguf to say. (It makes no Q4_K.)
        numbers, width = gguf.GGML_QUANT_SIZES[kind]
        blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // numbers, width), numpy.uint8)
        if type_name == "MXFP4":
            blocks[..., 0] = draw.integers(110, 130, blocks.shape[:-1])
        else:
            halves = (draw.random((*blocks.shape[:-1], 2)) * 0.01).astype(numpy.float16)
            blocks[..., :4] = halves.view(numpy.uint8)
        data = blocks.reshape(*shape[:-1], -1)
    else:
        data = gguf.quants.quantize(draw.standard_normal(shape, dtype=numpy.float32), kind)
    return data, torch.from_numpy(gguf.quants.dequantize(data, kind).copy()), kind


def written(path, tensors):
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layer(draw, types, number=0):
    """The tensors of a layer, the types of gate, up and down given, and their weights."""
    tensors, weights = {}, {}
    for (product, shape), type_name in zip(SHAPES.items(), types, strict=True):
        data, weights[product], kind = encoded(draw, type_name, shape)
        tensors[f"blk.{number}.ffn_{product}_exps.weight"] = (data, kind)
    return tensors, weights


def joined(weights):
    return ExpertWeights(torch.cat([weights["gate"], weights["up"]], dim=1), weights["down"])


def check_same(loaded, expected):
    unpacked = dequantize_experts(loaded)
    for name, want in vars(expected).items():
        have = getattr(unpacked, name)
        assert have is want is None or torch.equal(have, want), name
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, H, generator=generator)
    ids = torch.randint(0, len(expected.down), (7, 2), generator=generator)
    routes = (torch.rand(7, 2, generator=generator), ids, ExpertsConfig("silu"))
    assert torch.equal(experts_quantized(x, loaded, *routes), experts(x, expected, *routes))


def test_the_package_is_asked_for_when_a_file_is_opened(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    spec = importlib.util.spec_from_file_location("fresh", gguf_loading.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ImportError, match="gguf"):
        fresh.load_gguf_experts(tmp_path / "model.gguf", 0, SIZES)


@pytest.mark.parametrize("down", PACKED)
@pytest.mark.parametrize("both", PACKED)
def test_stacks(tmp_path, draw, both, down):
    """Types as files mix them: Q4_K files have another type for down."""
    tensors, weights = layer(draw, (both, both, down), number=2)
    other, _ = layer(draw, (both, both, down), number=20)
    path = written(tmp_path / "model.gguf", other | tensors)
    check_same(load_gguf_experts(path, 2, SIZES), joined(weights))


@pytest.mark.parametrize("type_name", FLOATS)
def test_floats(tmp_path, draw, type_name):
    tensors, weights = layer(draw, [type_name] * 3)
    loaded = load_gguf_experts(written(tmp_path / "model.gguf", tensors), 0, SIZES)
    assert isinstance(loaded, ExpertWeights)
    assert loaded.down.dtype == FLOATS[type_name]
    expected = joined(weights)
    assert torch.equal(loaded.gate_up.float(), expected.gate_up)
    assert torch.equal(loaded.down.float(), expected.down)


@pytest.mark.parametrize("type_name", PACKED)
def test_gate_and_up_in_one(tmp_path, draw, type_name):
    tensors, weights = layer(draw, [type_name] * 3)
    kind = gguf.GGMLQuantizationType[type_name]
    both = [tensors.pop(f"blk.0.ffn_{product}_exps.weight")[0] for product in ("gate", "up")]
    tensors["blk.0.ffn_gate_up_exps.weight"] = (numpy.concatenate(both, axis=1), kind)
    path = written(tmp_path / "model.gguf", tensors)
    check_same(load_gguf_experts(path, 0, SIZES), joined(weights))


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_old_files_have_a_matrix_for_each_expert(tmp_path, draw, type_name):
    tensors, weights = layer(draw, [type_name] * 3)
    single = {}
    for product in SHAPES:
        data, kind = tensors[f"blk.0.ffn_{product}_exps.weight"]
        single |= {f"blk.0.ffn_{product}.{e}.weight": (data[e], kind) for e in range(E)}
    path = written(tmp_path / "model.gguf", single)
    check_same(load_gguf_experts(path, 0, SIZES), joined(weights))
    del single["blk.0.ffn_up.2.weight"]
    path = written(tmp_path / "less.gguf", single)
    with pytest.raises(
        ValueError, match=r"path: expected 'blk\.0\.ffn_up\.2\.weight', got no such"
    ):
        load_gguf_experts(path, 0, SIZES)


def test_biases(tmp_path, draw):
    tensors, weights = layer(draw, ["MXFP4"] * 3)
    biases = {}
    for product, shape in SHAPES.items():
        biases[product] = draw.standard_normal(shape[:2], dtype=numpy.float32)
        tensors[f"blk.0.ffn_{product}_exps.bias"] = (biases[product], None)
    path = written(tmp_path / "model.gguf", tensors)
    expected = ExpertWeights(
        joined(weights).gate_up,
        weights["down"],
        torch.from_numpy(numpy.concatenate([biases["gate"], biases["up"]], axis=1)),
        torch.from_numpy(biases["down"]),
    )
    check_same(load_gguf_experts(path, 0, SIZES), expected)
    del tensors["blk.0.ffn_up_exps.bias"]
    path = written(tmp_path / "less.gguf", tensors)
    with pytest.raises(ValueError, match=r"expected 'blk\.0\.ffn_up_exps\.bias', got no such name"):
        load_gguf_experts(path, 0, SIZES)


def test_some_experts(tmp_path, draw):
    tensors, weights = layer(draw, ["Q8_0"] * 3)
    path = written(tmp_path / "model.gguf", tensors)
    expected = joined(weights)
    loaded = load_gguf_experts(path, 0, SIZES, held=[2, 0])
    check_same(loaded, ExpertWeights(expected.gate_up[[2, 0]], expected.down[[2, 0]]))
    assert load_gguf_experts(path, 0, SIZES, held=[]).down.shape == (0, H, I)


def refused(tmp_path, tensors, message, sizes=SIZES, number=0):
    path = written(tmp_path / "model.gguf", tensors)
    with pytest.raises(ValueError, match=message) as raised:
        load_gguf_experts(path, number, sizes)
    assert "\n" not in str(raised.value)


def test_what_is_refused(tmp_path, draw):
    tensors, _ = layer(draw, ["Q8_0"] * 3)
    refused(tmp_path, tensors, r"'blk\.1\.ffn_gate_exps\.weight', got no such name", number=1)
    message = r"blk\.0\.ffn_gate_exps\.weight: expected shape \[4, 256, 256\], got \[3, 256, 256\]"
    refused(tmp_path, tensors, message, sizes=ExpertsPlaceholder(4, H, I))
    scale = {"blk.0.ffn_down_exps.scale": (numpy.ones(3, numpy.float32), None)}
    refused(tmp_path, tensors | scale, r"ffn_down_exps\.scale: expected no scale beside the blocks")

    tensors, _ = layer(draw, ("Q8_0", "Q8_0", "Q4_0"))
    message = r"down_exps\.weight: expected a type of Q8_0, Q4_K, MXFP4, F32, F16 or BF16, got Q4_0"
    refused(tmp_path, tensors, message)
    tensors, _ = layer(draw, ("Q8_0", "MXFP4", "Q8_0"))
    refused(tmp_path, tensors, "gate and up: expected one type, got Q8_0 and mxfp4")
    tensors, _ = layer(draw, ("Q8_0", "F16", "Q8_0"))
    refused(tmp_path, tensors, "gate and up: expected one type, got packed weights and floats")
    tensors, _ = layer(draw, ("F32", "F32", "Q8_0"))
    refused(tmp_path, tensors, "down: expected packed weights or floats as gate and up, got the ot")
