"""Placeholders, layers that can be quantised, and experts that are packed while they are loaded."""

from dataclasses import replace

import pytest
import torch
from moe_reference.checkpoints import Checkpoint, layer_tensors, save_tensors
from moe_reference.config import ExpertsConfig, ExpertWeights, LayerWeights
from moe_reference.expert_slicing import take_experts
from moe_reference.experts import experts, init_experts
from moe_reference.families import TensorNames
from moe_reference.layouts import LAYOUTS
from moe_reference.loading import fill_placeholders, load_and_quantize, load_experts, move
from moe_reference.packed_joining import join_packed, join_packed_rows, join_quantized_experts
from moe_reference.packed_slicing import take_packed, take_packed_rows
from moe_reference.placeholders import (
    ExpertsPlaceholder,
    check_filled,
    layer_weight,
    quantizable_layers,
)
from moe_reference.quantization import dequantize, quantize, quantize_experts
from moe_reference.quantized_experts import dequantize_experts
from moe_reference.quantized_tensors import QuantizedExperts

E, H, I = 3, 128, 128
SIZES = ExpertsPlaceholder(E, H, I)
NAMES = TensorNames()
FORMATS = [
    ("uint4b8", {"group_size": 64}),
    ("uint8b128", {"group_size": -1}),
    ("uint4", {"group_size": 32}),
    ("e4m3", {}),
    ("e4m3", {"granularity": "channel"}),
    ("mxfp4", {}),
    ("Q8_0", {}),
]
"""Those with which gate and up share no scale."""
ALL = [*FORMATS, ("e4m3", {"granularity": "tensor"}), ("nvfp4", {})]


def random_experts(bias=False, num_experts=E, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = init_experts(num_experts, H, I, bias=bias, generator=generator)
    return ExpertWeights(
        *(None if each is None else each.to(dtype) for each in vars(made).values())
    )


def stored_layer(weights, stacked, prefix="", names=NAMES):
    layer = LayerWeights(torch.ones(len(weights.down), H), weights)
    return layer_tensors(layer, names, prefix, stacked=stacked)


def parts_of(value, path=""):
    """All tensors of a dataclass, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if not hasattr(value, "__dataclass_fields__"):
        return {}
    found = {}
    for field in vars(value):
        found |= parts_of(getattr(value, field), f"{path}.{field}")
    return found


def check_identical(one, other):
    mine, theirs = parts_of(one), parts_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# packed while loading


@pytest.mark.parametrize(("format", "options"), ALL)
@pytest.mark.parametrize("stacked", [False, True])
def test_packed_while_loading_is_loaded_and_then_packed(tmp_path, format, options, stacked):
    weights = random_experts(bias=True, dtype=torch.bfloat16)
    save_tensors(stored_layer(weights, stacked, "m."), tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    packed = load_and_quantize(source, NAMES, "m.", SIZES, format, **options)
    check_identical(packed, quantize_experts(weights, format, **options))
    some = load_and_quantize(source, NAMES, "m.", SIZES, format, held=[2, 0], **options)
    check_identical(some, quantize_experts(take_experts(weights, [2, 0]), format, **options))
    none = load_and_quantize(source, NAMES, "m.", SIZES, format, held=[], **options)
    assert none.down.shape == (0, H, I)


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_stacks_in_any_layout(layout):
    weights, names = random_experts(bias=True), TensorNames(layout=layout)
    stored = stored_layer(weights, stacked=True, names=names)
    check_identical(load_experts(stored, names, "", SIZES), weights)
    packed = load_and_quantize(stored, names, "", SIZES, "Q8_0")
    check_identical(packed, quantize_experts(weights, "Q8_0"))


def test_no_more_than_one_expert_is_float_at_a_time():
    """Of experts that stand one by one, the next is read when the last is packed."""
    events = []

    class Watched(dict):
        def get(self, name, default=None):
            if name in self:
                events.append(int(name.split(".")[1]))
            return super().get(name, default)

    stored = Watched(stored_layer(random_experts(), stacked=False))
    load_and_quantize(stored, NAMES, "", SIZES, "Q8_0")
    assert events == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("stacked", [False, True])
def test_every_part_is_moved_and_no_dtype_changes(stacked):
    stored = stored_layer(random_experts(bias=True, dtype=torch.float16), stacked)
    for format in ("uint4", "nvfp4", "Q8_0"):
        here = load_and_quantize(stored, NAMES, "", SIZES, format)
        there = load_and_quantize(stored, NAMES, "", SIZES, format, device="meta")
        mine, theirs = parts_of(here), parts_of(there)
        assert mine.keys() == theirs.keys()
        assert all(tensor.device.type == "meta" for tensor in theirs.values())
        assert {name: each.dtype for name, each in mine.items()} == {
            name: each.dtype for name, each in theirs.items()
        }


def test_integers_stay_integers():
    order = (torch.arange(H) // 64)[torch.randperm(H)].expand(E, -1)
    matrix = quantize(random_experts().down, "uint4", group_size=64, g_idx=order)
    moved = move(QuantizedExperts(matrix, matrix), torch.device("cpu"))
    check_identical(moved, QuantizedExperts(matrix, matrix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts.1.up_proj.weight": None}, "expected 'experts.1.up_proj.weight', got no such"),
        (
            {"experts.1.up_proj.weight": torch.ones(I, H + 1)},
            r"experts.1.up_proj.weight: expected shape \[128, 128\], got \[128, 129\]",
        ),
        (
            {"experts.1.up_proj.weight": torch.ones(I, H).to(torch.float8_e4m3fn)},
            r"experts.1.up_proj.weight: expected dtype .* got float8_e4m3fn",
        ),
        ({"experts.0.up_proj.bias": torch.ones(I)}, "expected 'experts.1.up_proj.bias', got no"),
    ],
)
def test_floats_that_are_not_there_or_do_not_fit(change, message):
    stored = stored_layer(random_experts(), stacked=False) | change
    stored = {name: each for name, each in stored.items() if each is not None}
    with pytest.raises((TypeError, ValueError), match=message):
        load_experts(stored, NAMES, "", SIZES)


def test_stacks_of_another_size_are_refused():
    stored = stored_layer(random_experts(), stacked=True)
    with pytest.raises(ValueError, match=r"experts\.down_proj: expected 4 experts with H = 128"):
        load_experts(stored, NAMES, "", replace(SIZES, num_experts=4))


# layers that can be quantised


def test_the_list_has_every_matrix_once():
    weights = random_experts()
    for route, count in (("fused", 0), ("gather", 3), ("loop", 3 * E)):
        layers = quantizable_layers(route, E)
        assert len(layers) == count
        if count:
            seen = sorted((layer.product, e) for layer in layers for e in layer.experts)
            assert seen == sorted((p, e) for p in ("gate", "up", "down") for e in range(E))
            assert sum(layer_weight(weights, layer).numel() for layer in layers) == sum(
                each.numel() for each in (weights.gate_up, weights.down)
            )
    loop = quantizable_layers("loop", E)
    assert [(layer.product, *layer.experts) for layer in loop[:4]] == [
        ("gate", 0), ("up", 0), ("down", 0), ("gate", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("format", "options"), ALL)
@pytest.mark.parametrize("route", ["gather", "loop"])
def test_layer_by_layer_is_all_at_once_where_gate_and_up_share_no_scale(format, options, route):
    weights = random_experts()
    products = {"gate": [], "up": [], "down": []}
    for layer in quantizable_layers(route, E):
        products[layer.product].append(quantize(layer_weight(weights, layer), format, **options))
    gate, up, down = (join_packed(each) for each in products.values())
    both = dequantize(join_packed_rows([gate, up]))
    # However they were packed, joining changes no number.
    assert torch.equal(both, torch.cat([dequantize(gate), dequantize(up)], dim=1))
    whole = quantize_experts(weights, format, **options)
    assert torch.equal(dequantize(down), dequantize(whole.down))
    assert torch.equal(both, dequantize(whole.gate_up)) == ((format, options) in FORMATS)


def test_layers_that_there_are_not():
    with pytest.raises(ValueError, match="route: expected one of 'fused', 'gather', 'loop', got"):
        quantizable_layers("slow", 8)
    with pytest.raises(ValueError, match="layer: expected experts of 3, got range"):
        layer_weight(random_experts(), quantizable_layers("gather", 4)[0])
    ungated = init_experts(E, H, I, gated=False)
    with pytest.raises(ValueError, match=r"experts: expected a gate, which .* got \[3, 128, 128\]"):
        layer_weight(ungated, quantizable_layers("gather", E)[0])


# joining


@pytest.mark.parametrize(("format", "options"), ALL)
def test_joining_undoes_taking(format, options):
    matrix = quantize(random_experts().gate_up, format, **options)
    check_identical(join_packed([take_packed(matrix, [0]), take_packed(matrix, [1, 2])]), matrix)
    parts = [take_packed_rows(matrix, [(0, 128)]), take_packed_rows(matrix, [(128, 2 * I)])]
    joined = join_packed_rows(parts)
    assert torch.equal(dequantize(joined), dequantize(matrix))


def test_padding_between_rows_is_left_out():
    matrix = quantize(random_experts().down, "uint4", group_size=64)
    more = {part: torch.cat([getattr(matrix, part), getattr(matrix, part)[:, :3]], dim=1)
            for part in ("packed", "scales", "zeros")}  # fmt: skip
    padded = replace(matrix, **more)
    joined = join_packed_rows([padded, padded])
    assert joined.packed.shape[1] == 2 * H
    assert torch.equal(dequantize(joined), dequantize(matrix).repeat(1, 2, 1))


def test_what_does_not_join():
    one = quantize(torch.ones(1, 64, 64), "uint4b8", group_size=32)
    other = quantize(torch.ones(1, 64, 64), "uint4b8", group_size=64)
    for join in (join_packed, join_packed_rows):
        with pytest.raises(
            ValueError, match="one format and group size, got uint4b8 with 32, uint"
        ):
            join([one, other])
        with pytest.raises(ValueError, match="tensors: expected at least one, got none"):
            join([])
        with pytest.raises(TypeError, match="tensors: expected a QuantizedTensor, got int"):
            join([one, 3])
    wide = quantize(torch.ones(1, 64, 32), "uint4b8", group_size=32)
    with pytest.raises(ValueError, match=r"expected 1 experts and 64 columns in each, got \(1, 64"):
        join_packed_rows([one, wide])
    with pytest.raises(ValueError, match="tensors: expected matrices of one shape"):
        join_packed([one, wide])
    experts_of = QuantizedExperts(one, one)
    with pytest.raises(ValueError, match="experts: expected at least one, got none"):
        join_quantized_experts([])
    with pytest.raises(
        ValueError, match="expected down_bias of all or of none, got 1 of 2 without"
    ):
        join_quantized_experts([experts_of, replace(experts_of, down_bias=torch.ones(1, 64))])
    with pytest.raises(ValueError, match="experts: expected one activation_format"):
        join_quantized_experts([experts_of, replace(experts_of, activation_format="int8")])


# placeholders


def test_placeholders_are_filled_file_by_file():
    one, two = random_experts(), random_experts(bias=True)
    first, second = stored_layer(one, False, "l.1."), stored_layer(two, True, "l.2.")
    model = {"l.1.": SIZES, "l.2.": SIZES}
    half = fill_placeholders(model, first, NAMES)
    check_identical(half["l.1."], one)
    assert half["l.2."] is SIZES
    with pytest.raises(ValueError, match=r"got placeholders at \['l.2.'\]"):
        check_filled(half)
    full = fill_placeholders(half, second, NAMES)
    check_identical(full["l.2."], two)
    check_filled(full)
    # What came in is as it was.
    assert model == {"l.1.": SIZES, "l.2.": SIZES}


def test_layer_1_is_not_layer_11():
    stored = stored_layer(random_experts(), False, "l.11.")
    filled = fill_placeholders({"l.1.": SIZES, "l.11.": SIZES}, stored, NAMES)
    assert filled["l.1."] is SIZES
    check_identical(filled["l.11."], random_experts())


def test_a_layer_is_not_filled_twice():
    stored = stored_layer(random_experts(), False, "l.1.")
    filled = fill_placeholders({"l.1.": SIZES}, stored, NAMES)
    with pytest.raises(
        ValueError, match=r"expected no experts of 'l\.1\.', which the model has, got"
    ):
        fill_placeholders(filled, stored, NAMES)


def test_half_a_layer_is_an_error_and_not_a_placeholder():
    stored = stored_layer(random_experts(), False, "l.1.")
    del stored["l.1.experts.0.gate_proj.weight"]
    with pytest.raises(ValueError, match=r"expected 'l.1.experts.0.gate_proj.weight', got no such"):
        fill_placeholders({"l.1.": SIZES}, stored, NAMES)


def test_nobody_computes_with_a_placeholder():
    x, weights, ids = torch.ones(1, H), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="expected ExpertWeights, got ExpertsPlaceholder"):
        experts(x, SIZES, weights, ids, ExpertsConfig())
    with pytest.raises(TypeError, match="expected QuantizedExperts, got ExpertsPlaceholder"):
        dequantize_experts(SIZES)


def test_sizes_are_counts():
    with pytest.raises(ValueError, match="hidden_size: expected at least 1, got 0"):
        ExpertsPlaceholder(8, 0, 8)
    with pytest.raises(TypeError, match="num_experts: expected an int, got float"):
        ExpertsPlaceholder(8.0, 8, 8)
