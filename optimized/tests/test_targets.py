from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from moe_conformance.target import OPERATIONS, Unsupported
from moe_optimized.interpreter import INTERPRETED, launches
from moe_optimized.targets import Optimized, OptimizedTriton
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.quantization import quantize
from moe_reference.quantized_tensors import QuantizedExperts

PROVIDED = {
    "route",
    "balance_loss",
    "z_loss",
    "update_bias",
    "align",
    "align_batched",
    "dispatch",
    "combine",
    "experts",
    "experts_batched",
    "layer",
    "expert_parallel",
    "dequantize",
    "experts_quantized",
}
targets = pytest.mark.parametrize(
    "target",
    [
        Optimized,
        pytest.param(OptimizedTriton, marks=pytest.mark.triton),
    ],
)


def arguments(dtype=torch.float32):
    """One small call per operation."""
    x = torch.randn(5, 8).to(dtype)
    ids = torch.tensor([[0, 2], [1, 1], [2, 0], [-1, 1], [3, 0]])
    experts = ExpertWeights(torch.randn(3, 8, 8).to(dtype), torch.randn(3, 8, 4).to(dtype))
    routing, how = RoutingConfig(top_k=2), ExpertsConfig()
    layer = LayerWeights(router=torch.randn(3, 8).to(dtype), experts=experts)
    counts = torch.tensor([1, 0, 2])
    gate_up, down = (
        replace(packed, scales=packed.scales.to(dtype))
        for packed in (
            quantize(t, "uint8b128", group_size=4) for t in (experts.gate_up, experts.down)
        )
    )
    return {
        "route": (torch.randn(5, 4).to(dtype), routing),
        "balance_loss": (torch.randn(5, 4).to(dtype), ids, BalanceConfig()),
        "z_loss": (torch.randn(5, 4).to(dtype),),
        "update_bias": (torch.randn(3).to(dtype), counts, 0.001, True),
        "align": (ids, 4, 3),
        "align_batched": (counts, 2, 4),
        "dispatch": (x, ids, 3),
        "combine": (x, torch.tensor([0, 3, 1, 9, 10]), torch.rand(5, 2)),
        "experts": (x, experts, torch.rand(5, 2), ids, how),
        "experts_batched": (torch.randn(3, 2, 8).to(dtype), counts, experts, how),
        "layer": (x[None], layer, LayerConfig(routing)),
        "expert_parallel": (x, torch.rand(5, 2), ids, experts, 3, how, None),
        "dequantize": (down,),
        "experts_quantized": (x, QuantizedExperts(gate_up, down), torch.rand(5, 2), ids, how),
    }


@targets
def test_provides_what_it_says(target):
    without_kernel = {"drop_to_capacity"} if target is Optimized else set()
    assert set(target.operations()) == PROVIDED | without_kernel
    assert set(OPERATIONS) >= set(target.capabilities.gradients)
    assert target.capabilities.interpreted == (target is OptimizedTriton and INTERPRETED)
    assert type(target.capabilities).from_json(target.capabilities.to_json()) == target.capabilities


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@targets
@pytest.mark.usefixtures("one_rank")
def test_every_operation_answers_in_every_declared_dtype(target):
    device = target.capabilities.devices[0]
    if device == "cuda":
        pytest.skip("the arguments are in CPU memory")
    for name in target.capabilities.dtypes:
        for operation, given in arguments(getattr(torch, name)).items():
            before = launches.total()
            assert getattr(target(), operation)(*given) is not None
            # Only the kernels' target launches any, and all of its operations do.
            assert (launches.total() > before) == (target is OptimizedTriton)


@pytest.mark.triton
@pytest.mark.usefixtures("one_rank")
def test_float64_is_unsupported_by_the_kernels():
    for operation, given in arguments(torch.float64).items():
        if not operation.startswith("align"):
            with pytest.raises(Unsupported, match="got float64"):
                getattr(OptimizedTriton(), operation)(*given)
