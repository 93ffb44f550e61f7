"""Modules: an MoE layer with state, around the functions that have none.

`MoELayer` holds the weights, the selection bias and the counts that move it, and computes by
`layer`. `moe_layer` makes one for a published family.

Dimension key: N sequences, L tokens per sequence, H hidden size, I intermediate size, E experts,
K experts per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_reference.bias_update import global_counts, update_bias
from moe_reference.checkpoints import layer_tensors, load_layer
from moe_reference.config import ExpertWeights, LayerConfig, LayerOutput, LayerWeights
from moe_reference.families import FAMILIES, TensorNames
from moe_reference.gates import jitter
from moe_reference.layer import layer


class Experts(nn.Module):
    """The weights of experts as parameters, in the canonical layout."""

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, weights: ExpertWeights):
        super().__init__()
        for name, tensor in vars(weights).items():
            parameter = None if tensor is None else nn.Parameter(tensor.detach().clone())
            self.register_parameter(name, parameter)

    def weights(self) -> ExpertWeights:
        """The parameters themselves, not copies."""
        return ExpertWeights(self.gate_up, self.down, self.gate_up_bias, self.down_bias)


class MoELayer(nn.Module):
    """An MoE layer that keeps its own counts and selection bias.

    The counts are those of training only: of tokens through which a gradient passed, each once. So
    evaluation does not count, nor does a forward pass that activation checkpointing repeats, nor
    padding. They are no part of the state: a checkpoint is taken between steps, when they are 0.
    The selection bias stays float32 whatever the module is cast to: bfloat16 does not hold 0.501.

    Args:
        parameters: the weights; copied.
        config: how the layer computes. Its hash table is kept in a buffer.
        jitter_epsilon: noise on x while training, for router and experts alike as Mixtral has it;
            see `moe_reference.gates.jitter`.

    Attributes:
        tokens_per_expert: [E], int64, since the last `update_bias`.

    >>> from moe_reference.config import RoutingConfig
    >>> one = ExpertWeights(gate_up=torch.ones(1, 2, 1), down=torch.ones(1, 1, 1))
    >>> parameters = LayerWeights(torch.ones(1, 1), one, selection_bias=torch.zeros(1))
    >>> moe = MoELayer(parameters, LayerConfig(RoutingConfig(top_k=1)))
    >>> moe(torch.ones(1, 3, 1)).output.sum().backward()
    >>> moe.tokens_per_expert
    tensor([3])
    """

    router: nn.Parameter
    router_bias: nn.Parameter | None
    shared_gate: nn.Parameter | None
    tokens_per_expert: torch.Tensor
    selection_bias: torch.Tensor | None
    hash_table: torch.Tensor | None

    compute = staticmethod(layer)
    """What `forward` calls: with another function it is the same layer, computed otherwise."""

    def __init__(self, parameters: LayerWeights, config: LayerConfig, jitter_epsilon: float = 0.0):
        super().__init__()
        self.config = replace(config, routing=replace(config.routing, hash_table=None))
        self.jitter_epsilon = jitter_epsilon
        for name in ("router", "router_bias", "shared_gate"):
            tensor = getattr(parameters, name)
            parameter = None if tensor is None else nn.Parameter(tensor.detach().clone())
            self.register_parameter(name, parameter)
        self.experts = Experts(parameters.experts)
        self.shared = None if parameters.shared is None else Experts(parameters.shared)
        bias, table = parameters.selection_bias, config.routing.hash_table
        self.register_buffer("selection_bias", None if bias is None else bias.detach().float())
        self.register_buffer("hash_table", None if table is None else table.clone())
        counts = torch.zeros(len(parameters.router), dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def parameters_of_layer(self) -> LayerWeights:
        """The weights as `layer` takes them: the parameters themselves, not copies."""
        return LayerWeights(
            router=self.router,
            experts=self.experts.weights(),
            router_bias=self.router_bias,
            selection_bias=self.selection_bias,
            shared=None if self.shared is None else self.shared.weights(),
            shared_gate=self.shared_gate,
        )

    def forward(
        self,
        x: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> LayerOutput:
        """`moe_reference.layer.layer` on the module's weights, with its arguments and errors.

        In training mode the balance loss is computed where the configuration has one. It is the
        caller's to add, or `moe_reference.loss_graph` puts it into the graph of the output.
        """
        routing = replace(self.config.routing, hash_table=self.hash_table)
        config = replace(self.config, routing=routing)
        if self.training:
            x = jitter(x, self.jitter_epsilon)
        parameters = self.parameters_of_layer()
        result = self.compute(x, parameters, config, token_ids, padding_mask, self.training)
        if self.training and result.output.requires_grad:
            return self._counted(result)
        return result

    def update_bias(
        self, rate: float, centred: bool = False, group: dist.ProcessGroup | None = None
    ) -> None:
        """Move the selection bias by the counts of all ranks, and count from 0 again.

        Once per optimizer step, after all its backward passes, on every rank of the group.

        Args:
            rate: the size of a step.
            centred: take the mean of the step off it.
            group: the ranks that share the batch.

        Raises:
            ValueError: the layer has no selection bias.
        """
        if self.selection_bias is None:
            raise ValueError("selection_bias: expected a layer that has one, got None")
        counts_E = global_counts(self.tokens_per_expert, group)
        self.selection_bias.copy_(update_bias(self.selection_bias, counts_E, rate, centred))
        self.tokens_per_expert.zero_()

    def _counted(self, result: LayerOutput) -> LayerOutput:
        """The result of a pass whose tokens are counted when a gradient arrives."""
        assert result.tokens_per_expert is not None
        result.output.register_hook(self._count_once(result.tokens_per_expert))
        return result

    def _count_once(self, tokens_per_expert: torch.Tensor) -> Callable[[Any], None]:
        # Counted when the gradient arrives: a pass that checkpointing repeats has an output of its
        # own that no gradient arrives at, and a second backward pass finds nothing left to count.
        pending = [tokens_per_expert]

        def count(gradient: torch.Tensor) -> None:
            if pending:
                self.tokens_per_expert.add_(pending.pop())

        return count

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "MoELayer":
        """Casts and moves, with the values of the selection bias kept in float32."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self


def moe_layer(
    family: str,
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    **changes: Any,
) -> MoELayer:
    """A published family's layer out of a checkpoint.

    Args:
        family: a key of `FAMILIES`.
        tensors: by name: a `moe_reference.checkpoints.Checkpoint`, or any mapping.
        prefix: in front of the layer's tensors, with the dot: `model.layers.3.mlp.`.
        changes: fields of `RoutingConfig` that this size of the model has otherwise.

    Raises:
        ValueError: no such family, or a tensor is missing.
        TypeError: a change names no field.

    >>> one = torch.ones(1, 1)
    >>> stored = {f"mlp.experts.0.{name}.weight": one for name in ("gate_proj", "up_proj")}
    >>> stored |= {"mlp.gate.weight": one, "mlp.experts.0.down_proj.weight": one}
    >>> moe_layer("olmoe", stored, "mlp.", top_k=1)(torch.zeros(1, 2, 1)).output.tolist()
    [[[0.0], [0.0]]]
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    parameters, table = load_layer(tensors, FAMILIES[family].names, prefix)
    config = FAMILIES[family].config
    if table is not None:
        changes["hash_table"] = table
    return MoELayer(parameters, replace(config, routing=replace(config.routing, **changes)))


def stored_tensors(
    moe: MoELayer, names: TensorNames, prefix: str, stacked: bool = False
) -> dict[str, torch.Tensor]:
    """The inverse of `moe_layer`, with arguments and errors of `checkpoints.layer_tensors`.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 2, 1), down=torch.ones(1, 1, 1))
    >>> moe = MoELayer(LayerWeights(torch.ones(1, 1), one), FAMILIES["olmoe"].config)
    >>> sorted(stored_tensors(moe, FAMILIES["olmoe"].names, "", stacked=True))
    ['experts.down_proj', 'experts.gate_up_proj', 'gate.weight']
    """
    return layer_tensors(moe.parameters_of_layer(), names, prefix, moe.hash_table, stacked)
