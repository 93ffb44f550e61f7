"""What crosses the pipe to a target, and what goes into a file, comes back as it was."""

import math

import pytest
import torch
from moe_conformance.codec import (
    decode,
    digest,
    encode,
    from_bytes,
    replace_tensors,
    to_bytes,
    walk,
)
from moe_conformance.worker import place_arguments
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
)


def on_the_pipe(value):
    return from_bytes(to_bytes(value))


def on_disk(value):
    tensors = {}
    return decode(encode(value, tensors), tensors)


WAYS = pytest.mark.parametrize("way", [on_the_pipe, on_disk])


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
def test_a_tensor_keeps_every_bit(way, dtype, shape):
    size = torch.empty(shape, dtype=dtype).nbytes
    # Of a bool all bits but the last are nobody's.
    bits = torch.arange(size, dtype=torch.uint8) * (1 if dtype is torch.bool else 37)
    bits = bits % 2 if dtype is torch.bool else bits
    sent = bits.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    came = way({"x": sent})["x"]
    assert came.dtype is dtype
    assert came.shape == sent.shape
    assert torch.equal(came.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))


@WAYS
def test_signs_of_zero_and_what_is_not_finite_stay(way):
    sent = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    came = way([sent, math.nan, -math.inf])
    assert torch.equal(came[0].view(torch.int32), sent.view(torch.int32))
    assert math.isnan(came[1])
    assert came[2] == -math.inf


@WAYS
def test_configurations_dtypes_and_plain_values_stay(way):
    sent = {
        "config": RoutingConfig(top_k=2, score="sigmoid"),
        "experts": ExpertWeights(torch.ones(2, 6, 4), torch.zeros(2, 4, 3)),
        "more": [ExpertsConfig(), torch.bfloat16, None, True, 3, 2.5, "text"],
    }
    came = way(sent)
    assert came["config"] == sent["config"]
    assert came["more"] == sent["more"]
    assert type(came["experts"]) is ExpertWeights
    assert torch.equal(came["experts"].gate_up, sent["experts"].gate_up)
    assert came["experts"].down_bias is None
    assert digest(came) == digest(sent)


def test_strides_a_gradient_and_a_subclass_stay_behind():
    leaf = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    came = on_the_pipe([leaf, leaf.T, torch.Size([2, 3])])
    assert [type(each) for each in came] == [torch.Tensor, torch.Tensor, tuple]
    assert not came[0].requires_grad
    assert came[1].is_contiguous()
    assert torch.equal(came[1], leaf.detach().T)
    came[0].zero_()
    assert leaf[1, 2] == 5


@WAYS
def test_any_strides_are_taken(way):
    numbers = torch.arange(12.0).view(3, 4)
    views = [numbers[:, ::2], numbers[1:2, 3:], numbers[::3, :1].flatten()[:1], numbers[0, 1::4]]
    views += [numbers[:1, :1].expand(2, 3), numbers.T[1], numbers[2, 3].expand(1), numbers[1, 1]]
    views += [torch.zeros(4, 2)[:, 1:2][3:], torch.arange(6)[1::5], torch.zeros(5)[::2][:1]]
    for sent, came in zip(views, way(views), strict=True):
        assert torch.equal(came, sent)
        assert came.is_contiguous()


@pytest.mark.parametrize("value", [object(), print, torch.nn.Linear(1, 1), 1j])
def test_nothing_else_crosses(value):
    with pytest.raises(TypeError, match=r"^expected a tensor, number, string or configuration, "):
        to_bytes({"x": [value]})
    with pytest.raises(TypeError, match="expected a tensor, number, string or configuration, got "):
        encode({"x": [value]}, {})


def test_tensors_are_found_and_replaced_wherever_they_are():
    value = {
        "x": torch.zeros(1),
        "list": [torch.ones(1), (2, torch.full((1,), 2.0))],
        "experts": ExpertWeights(torch.full((1, 2, 1), 3.0), torch.full((1, 1, 1), 4.0)),
        "nothing": {},
    }
    paths = ["x", "list.0", "list.1.1", "experts.gate_up", "experts.down"]
    assert [path for path, _ in walk(value)] == paths
    seen = []
    made = replace_tensors(value, lambda path, tensor: seen.append(path) or tensor + 1)
    assert seen == paths
    assert [float(tensor.flatten()[0]) for _, tensor in walk(made)] == [1, 2, 3, 4, 5]
    assert made["nothing"] == {}
    assert type(made["list"][1]) is tuple


def test_arguments_that_are_written_over_are_the_same_objects():
    def call(value, length=2):
        experts = ExpertWeights(torch.full((1, 2, 2), value), torch.full((1, 2, length), value))
        config = RoutingConfig(top_k=1, hash_table=torch.full((3, 1), int(value)))
        return {"arguments": {"x": torch.full((2,), value), "experts": experts, "config": config}}

    first = place_arguments(call(1.0), "cpu", wrt=("x",))
    again = place_arguments(call(2.0), "cpu", storage=first)
    for name, value in again.items():
        assert value is first[name], name
    assert not again["x"].requires_grad
    assert {float(tensor.unique()) for _, tensor in walk(again)} == {2.0}
    # What does not fit is another tensor, in another dataclass; what does is still the same one.
    longer = place_arguments(call(3.0, length=4), "cpu", storage=again)
    assert longer["experts"] is not again["experts"]
    assert longer["experts"].gate_up is again["experts"].gate_up
    assert longer["experts"].down.shape == (1, 2, 4)
