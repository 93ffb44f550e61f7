"""Reading and writing a layer's tensors: forms, levels, ranks, and what is refused."""

import json

import pytest
import torch
from moe_reference.checkpoint_files import INDEX, Checkpoint, save_tensors
from moe_reference.checkpoints import layer_tensors, load_layer
from moe_reference.config import ExpertWeights, LayerWeights
from moe_reference.experts import init_experts
from moe_reference.families import FAMILIES, TensorNames
from moe_reference.layouts import LAYOUTS, Layout
from safetensors.torch import save_file

E, H, I = 5, 4, 3
NAMES = TensorNames()


def random_layer(hidden=H, intermediate=I, bias=False):
    generator = torch.Generator().manual_seed(0)
    return LayerWeights(
        router=torch.randn(E, hidden, generator=generator),
        experts=init_experts(E, hidden, intermediate, bias=bias, generator=generator),
    )


def same(one: ExpertWeights, other: ExpertWeights):
    return all(
        a is b is None or torch.equal(a, b)
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), Layout(transposed=True, up_first=True)])
def test_what_is_written_is_read(stacked, layout, bias):
    weights = random_layer(bias=bias)
    names = TensorNames(layout=layout)
    stored = layer_tensors(weights, names, "a.", stacked=stacked)
    read, table = load_layer(stored, names, "a.")
    assert same(read.experts, weights.experts)
    assert torch.equal(read.router, weights.router)
    assert table is None


@pytest.mark.parametrize(("hidden", "intermediate"), [(6, 3), (3, 3), (2, 1), (4, 3)])
def test_transposed_stacks_are_told_by_both_shapes_where_one_would_not_do(hidden, intermediate):
    # H = 2I makes gate_up alone ambiguous, H = I makes down alone ambiguous.
    weights = random_layer(hidden, intermediate)
    for layout in (Layout(), Layout(transposed=True)):
        stored = layer_tensors(weights, TensorNames(layout=layout), "", stacked=True)
        assert same(load_layer(stored, NAMES, "")[0].experts, weights.experts)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("held", [[], [3], [4, 0], list(range(E))])
def test_a_rank_reads_its_own_experts_and_no_others(stacked, held):
    weights = random_layer(bias=True)
    stored = layer_tensors(weights, NAMES, "", stacked=stacked)
    asked = []

    class Watched(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    read, _ = load_layer(Watched(stored), NAMES, "", held)
    assert read.experts.gate_up.shape == (len(held), 2 * I, H)
    for field, tensor in vars(read.experts).items():
        assert torch.equal(tensor, getattr(weights.experts, field)[held])
    if not stacked and held:
        numbers = {int(name.split(".")[1]) for name in asked if name.startswith("experts.")}
        assert numbers == set(held)


def test_a_folder_with_an_index_reads_across_files(tmp_path):
    stored = layer_tensors(random_layer(), NAMES, "m.")
    halves = {"one.safetensors": {}, "two.safetensors": {}}
    for number, (name, tensor) in enumerate(stored.items()):
        halves[("one.safetensors", "two.safetensors")[number % 2]][name] = tensor.contiguous()
    for file, tensors in halves.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(stored)
    assert len(checkpoint) == len(stored)
    assert same(load_layer(checkpoint, NAMES, "m.")[0].experts, random_layer().experts)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"path: expected the files that .* names, got no \['two"):
        Checkpoint(tmp_path)


def test_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="path: expected a safetensors file"):
            Checkpoint(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "layer.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    with pytest.raises(Exception, match=r".+"):
        save_tensors({"a": torch.ones(2), 3: torch.ones(1)}, path)
    assert torch.equal(Checkpoint(path)["a"], torch.ones(2))
    assert [each.name for each in tmp_path.iterdir()] == ["layer.safetensors"]


def test_tensors_that_share_memory_are_written_each(tmp_path):
    both = torch.arange(6.0).view(2, 3)
    save_tensors({"a": both, "b": both.T, "c": both[0]}, tmp_path / "x.safetensors")
    read = Checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(read["b"], both.T)
    assert torch.equal(read["c"], both[0])


def without(name):
    stored = layer_tensors(random_layer(), NAMES, "")
    del stored[name]
    return stored


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (without("gate.weight"), "tensors: expected 'gate.weight', got no such name"),
        (without("experts.4.up_proj.weight"), r"expected 'experts.4.up_proj.weight', got no"),
        ({"gate.weight": torch.ones(E, H)}, r"expected 'experts.gate_up_proj' or .* got neither"),
        (
            layer_tensors(random_layer(), NAMES, "") | {"gate.weight": torch.ones(3, H)},
            "tensors: expected 3 experts as the router, got more",
        ),
        (
            layer_tensors(random_layer(), NAMES, "", stacked=True)
            | {"gate.weight": torch.ones(3, H)},
            r"experts.gate_up_proj: expected shape \[3, J, H\], got \[5, 6, 4\]",
        ),
        (
            layer_tensors(random_layer(), NAMES, "", stacked=True)
            | {"experts.down_proj": torch.ones(E, 5, 2)},
            "gate_up: expected shapes that fit together, plain or transposed",
        ),
    ],
)
def test_a_checkpoint_that_does_not_hold_the_layer_is_refused(stored, message):
    with pytest.raises(ValueError, match=message):
        load_layer(stored, NAMES, "")


def test_a_part_without_a_name_is_refused():
    weights = random_layer()
    bias = LayerWeights(weights.router, weights.experts, router_bias=torch.zeros(E))
    with pytest.raises(ValueError, match="names: expected a name for router_bias, got None"):
        layer_tensors(bias, NAMES, "")
    shared = LayerWeights(weights.router, weights.experts, shared=init_experts(1, H, I))
    with pytest.raises(ValueError, match="names: expected a name for shared, got None"):
        layer_tensors(shared, NAMES, "")


def test_a_hash_table_is_read_as_int64():
    names = FAMILIES["deepseek-v4"].names
    table = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    stored = layer_tensors(random_layer(), names, "ffn.", hash_table=table)
    assert torch.equal(load_layer(stored, names, "ffn.")[1], table.long())
