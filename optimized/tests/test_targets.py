from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from moe_conformance.codec import walk
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import OPERATIONS, Unsupported
from moe_optimized.interpreter import INTERPRETED, launches
from moe_optimized.targets import Optimized, OptimizedFloat8, OptimizedTriton
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


AMONG_RANKS = {"expert_parallel"}
"""Ranks in one process are threads, and the interpreter is not made for those."""

ASKED = (
    *("GATE-18", "BALANCE-23", "BALANCE-29", "BALANCE-36", "ALIGN-01", "ALIGN-21", "DISPATCH-27"),
    *("DISPATCH-28", "EXPERT-11", "EXPERT-22", "LAYER-10", "QUANT-01", "QUANT-14"),
)
"""Of each operation a requirement, on its gradients where it has any."""


def counted(operation):
    """An operation of the kernels' target that insists on a launch for each result and gradient."""
    run = getattr(OptimizedTriton, operation)

    def operate(self, *arguments, **named):
        before = launches.total()
        result = run(self, *arguments, **named)
        tensors = [tensor for _, tensor in walk(result)]
        if any(t.numel() for t in tensors):
            assert launches.total() > before, f"{operation} gave an answer without a launch"
            self.answers[operation] += 1
        came_in = []
        for tensor in tensors:
            if tensor.requires_grad and tensor.numel():
                tensor.register_hook(lambda _: came_in.append(launches.total()))
        for _, tensor in walk([*arguments, named]):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.came_out(operation, came_in))
        return result

    return operate


class Counted(OptimizedTriton):
    """The kernels' target, where an answer or a gradient without a launch is an error."""

    def __init__(self):
        super().__init__()
        self.answers, self.gradients = Counter(), Counter()

    def came_out(self, operation, came_in):
        assert launches.total() > came_in[0], f"{operation} gave a gradient without a launch"
        self.gradients[operation] += 1


for _operation in OptimizedTriton.operations():
    setattr(Counted, _operation, counted(_operation))


@pytest.mark.triton
def test_what_the_suite_is_given_comes_from_kernels():
    """Answers and gradients that the suite asks for, of every operation."""
    target = Counted()
    executor = InlineExecutor(target)
    scope = replace(inline_scope(executor, ("float32",)), interpreted=True)
    for id in ASKED:
        found = run_requirement(requirement_named(id), scope, executor, Effort(2, 1, 0), 0)
        assert found.status == "pass", (id, found.message)
    assert set(target.answers) == set(OptimizedTriton.operations()) - AMONG_RANKS
    assert set(target.gradients) == set(OptimizedTriton.capabilities.gradients) - AMONG_RANKS


@pytest.mark.triton
@pytest.mark.parametrize("format", ["int8", "e4m3", "e4m3_block"])
def test_rounded_rows_are_the_float8_targets(format):
    """Each target takes what it declares: float8 rows with float8 weights, and no others."""
    x, _, *rest = arguments()["experts_quantized"]
    weights = [
        quantize(t, "e4m3", block_size=16) for t in (torch.randn(3, 8, 8), torch.randn(3, 8, 4))
    ]
    rounded = QuantizedExperts(*weights, activation_format=format)
    if format == "int8":
        with pytest.raises(Unsupported, match="activation_format: expected float8"):
            OptimizedFloat8().experts_quantized(x, rounded, *rest)
    else:
        assert OptimizedFloat8().experts_quantized(x, rounded, *rest).shape == x.shape
    declared = OptimizedTriton.capabilities.quantization["activation_format"]
    assert format not in declared
    assert OptimizedFloat8.operations() == ("experts_quantized",)


@pytest.mark.triton
@pytest.mark.usefixtures("one_rank")
def test_float64_is_unsupported_by_the_kernels():
    for operation, given in arguments(torch.float64).items():
        if not operation.startswith("align"):
            with pytest.raises(Unsupported, match="got float64"):
                getattr(OptimizedTriton(), operation)(*given)
