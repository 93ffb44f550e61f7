"""The module of `moe_reference.modules`, computed by `moe_optimized.layer`.

Constructor, parameters, state and results are those of the reference's module, whose class this one
extends: a checkpoint of either loads into the other. `optimize` turns the layers of a model that is
there already.

Dimension key: N sequences, L tokens per sequence, H hidden size.
"""

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import LayerOutput
from moe_reference.modules import MoELayer as ReferenceLayer
from torch import nn

from moe_optimized import operators
from moe_optimized.layer import layer


class MoELayer(ReferenceLayer):
    """An MoE layer that keeps its own counts and selection bias; see the reference's.

    >>> from moe_reference.config import ExpertWeights, LayerConfig, LayerWeights, RoutingConfig
    >>> one = ExpertWeights(gate_up=torch.ones(1, 2, 1), down=torch.ones(1, 1, 1))
    >>> parameters = LayerWeights(torch.ones(1, 1), one, selection_bias=torch.zeros(1))
    >>> moe = MoELayer(parameters, LayerConfig(RoutingConfig(top_k=1)))
    >>> moe(torch.ones(1, 3, 1)).output.sum().backward()
    >>> moe.tokens_per_expert
    tensor([3])
    """

    compute = staticmethod(layer)

    def _counted(self, result: LayerOutput) -> LayerOutput:
        if not torch.compiler.is_compiling():
            return super()._counted(result)
        counts = result.tokens_per_expert
        output = _Counted.apply(result.output, counts, self.tokens_per_expert)
        return replace(result, output=output)


class _Counted(torch.autograd.Function):
    """The hook as the compiler takes it: a second pass over one graph would count again."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, counts: torch.Tensor, counter: torch.Tensor
    ) -> torch.Tensor:
        # Not `save_for_backward`: another pass may have been counted before this one's gradient.
        ctx.counts, ctx.counter = counts, counter
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        operators.add_counts(ctx.counter, ctx.counts, grad)
        return grad, None, None


def optimize(model: nn.Module) -> int:
    """Turn every `moe_reference.modules.MoELayer` of a model into this module's, in place.

    Parameters, buffers, hooks and the optimizer's references to them stay what they are.

    Args:
        model: any module, an MoE layer itself included.

    Returns:
        How many layers were turned.

    Raises:
        ValueError: the model has no such layer.

    >>> from moe_reference.config import ExpertWeights, LayerConfig, LayerWeights, RoutingConfig
    >>> one = ExpertWeights(gate_up=torch.ones(1, 2, 1), down=torch.ones(1, 1, 1))
    >>> moe = ReferenceLayer(LayerWeights(torch.ones(1, 1), one), LayerConfig(RoutingConfig(1)))
    >>> optimize(nn.Sequential(moe)), type(moe) is MoELayer
    (1, True)
    """
    layers = [module for module in model.modules() if type(module) is ReferenceLayer]
    if not layers and not any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(f"model: expected one with a MoELayer, got {type(model).__name__}")
    for module in layers:
        module.__class__ = MoELayer
    return len(layers)
