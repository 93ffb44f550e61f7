"""The choice of a backend: a reason for everything, and nothing but the arguments."""

import itertools
from typing import get_args

import pytest
import torch
from moe_reference.backends import (
    Device,
    Quantization,
    Workspace,
    choose_backend,
    device_kind,
    workspace_shapes,
)
from moe_reference.routes import ROUTES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BATCHES = [(0, 2, 8), (1, 2, 8), (4, 2, 8), (5, 2, 8), (31, 2, 8), (32, 2, 8), (4096, 8, 256)]


def everything():
    for device, dtype, batch, packed, invariant in itertools.product(
        get_args(Device), DTYPES, BATCHES, (None, *get_args(Quantization)), (False, True)
    ):
        if device != "mps" or dtype != torch.float64:
            yield device, dtype, *batch, packed, invariant


def test_every_question_has_an_answer_with_a_reason():
    for question in everything():
        choice = choose_backend(*question)
        assert choice.route in ROUTES, question
        assert choice.operator, question
        assert choice.reason.endswith("."), question
        assert ("Not run" in choice.reason) == (not choice.verified), question
        assert choice == choose_backend(*question)


def test_only_what_the_tests_run_is_called_verified():
    for device, dtype, tokens, top_k, num_experts, packed, invariant in everything():
        choice = choose_backend(device, dtype, tokens, top_k, num_experts, packed, invariant)
        assert choice.verified == (device == "cpu" and packed is None)


def test_the_same_route_for_every_batch_where_that_is_asked_for():
    for device, dtype, packed in itertools.product(
        get_args(Device), DTYPES[1:], (None, *get_args(Quantization))
    ):
        routes = {
            choose_backend(device, dtype, *batch, packed, batch_invariant=True).route
            for batch in BATCHES
        }
        assert len(routes) == 1


@pytest.mark.parametrize(
    ("question", "route"),
    [
        (("cuda", torch.bfloat16, 1, 8, 256), "fused"),
        (("rocm", torch.bfloat16, 4096, 8, 256), "fused"),
        (("npu", torch.float16, 4096, 8, 256), "fused"),
        (("cuda", torch.float32, 4, 2, 8), "gather"),
        (("cuda", torch.float32, 5, 2, 8), "loop"),
        (("mps", torch.bfloat16, 1, 2, 8), "gather"),
        (("cpu", torch.float32, 4, 2, 8), "gather"),
        (("cpu", torch.float32, 5, 2, 8), "loop"),
        (("cuda", torch.bfloat16, 100, 2, 8, "uint4b8"), "fused"),
        (("cuda", torch.bfloat16, 31, 2, 8, "Q8_0"), "gather"),
        (("cuda", torch.bfloat16, 32, 2, 8, "Q8_0"), "fused"),
        (("cpu", torch.float32, 1, 2, 8, "Q8_0"), "loop"),
        (("cuda", torch.float32, 1, 2, 8, "uint4"), "loop"),
    ],
)
def test_routes(question, route):
    assert choose_backend(*question).route == route


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (("gpu", torch.float32, 1, 1, 1), ValueError, "device: expected one of"),
        (("cpu", torch.int64, 1, 1, 1), TypeError, "dtype: expected a float dtype"),
        (("mps", torch.float64, 1, 1, 1), ValueError, "dtype: expected one that MPS has"),
        (("cpu", torch.float32, -1, 1, 1), ValueError, "num_tokens: expected at least 0, got -1"),
        (("cpu", torch.float32, 1, 1.0, 1), TypeError, "top_k: expected an int, got float"),
        (("cpu", torch.float32, 1, 1, 1, "int3"), ValueError, "quantization: expected one of"),
    ],
)
def test_what_makes_no_sense_is_named(question, error, message):
    with pytest.raises(error, match=message):
        choose_backend(*question)


def test_device_kind():
    assert device_kind(torch.device("cpu")) == "cpu"
    assert device_kind(torch.device("cuda", 3)) in ("cuda", "rocm")
    with pytest.raises(ValueError, match="device: expected one of"):
        device_kind(torch.device("meta"))


def test_workspaces():
    assert workspace_shapes("standard", (0, 2), 8, 3) == Workspace((0, 8), (0, 3), (0, 8))
    assert workspace_shapes("batched", (2, 6), 4, 3, gated=False) == Workspace(
        (12, 4), (12, 3), (2, 6, 4)
    )
    for wrong, error in (((-1, 2), ValueError), ((1, 2.0), TypeError)):
        with pytest.raises(error, match=r"rows\["):
            workspace_shapes("standard", wrong, 8, 3)
    with pytest.raises(ValueError, match="activation_format: expected one of"):
        workspace_shapes("flat", (1, 2), 8, 3)
