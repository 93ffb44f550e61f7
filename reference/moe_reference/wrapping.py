"""Wrapping: another library's MoE block, computed here from its own gate and experts.

What a block calls its parts differs from one library to the next, so the names are fields of
`FieldNames`. What a gate returns is declared (`gates`). Experts are a list of modules, one for
each, or one module with stacked weights.

Dimension key: N sequences, L tokens per sequence, T = N · L tokens, H hidden size, E experts,
K experts per token, S pairs in expert order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig
from moe_reference.dispatch import accumulation_dtype, combine, dispatch
from moe_reference.experts import experts
from moe_reference.gates import GateOutput, GateReturns, read_gate
from moe_reference.layouts import Layout, from_layout


@dataclass(frozen=True)
class FieldNames:
    """What a block calls its parts; a part that it does not have is simply not there.

    Attributes:
        gate: the router module.
        experts: a `torch.nn.ModuleList`, or a module with stacked weights.
        shared_experts: a module that sees every token.
        shared_experts_gate: a module to one number per token, through a sigmoid.
        selection_bias: [E], on the gate or on the block.
        gate_up, down: the stacked weights of `experts`, with `_bias` behind for the biases.
    """

    gate: str = "gate"
    experts: str = "experts"
    shared_experts: str = "shared_experts"
    shared_experts_gate: str = "shared_expert_gate"
    selection_bias: str = "e_score_correction_bias"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


class WrappedMoE(nn.Module):
    """A block of another library, from tokens to outputs, by way of its own modules and weights.

    Args:
        block: the module that has the parts; its parameters are used, not copied.
        returns: what its gate returns.
        routing: needed where the gate returns logits.
        config: how the experts compute; only `weight_on` matters for a list of modules.
        names: what it calls its parts.
        layout: of stacked weights.
        flat_gate: its gate takes tokens [T, H] and not sequences [N, L, H]. Which one is not always
            to be seen: gpt-oss's in transformers takes both, and is wrong with sequences.

    Raises:
        ValueError: the block has no gate or no experts under these names.

    >>> block = nn.Module()
    >>> block.router, block.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in "ab")
    >>> moe = WrappedMoE(block, "logits", RoutingConfig(top_k=1), names=FieldNames(gate="router"))
    >>> moe(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        block: nn.Module,
        returns: GateReturns,
        routing: RoutingConfig | None = None,
        config: ExpertsConfig | None = None,
        names: FieldNames | None = None,
        layout: Layout | None = None,
        flat_gate: bool = False,
    ):
        super().__init__()
        self.block, self.returns, self.routing = block, returns, routing
        self.config = config or ExpertsConfig()
        self.names = names or FieldNames()
        self.layout, self.flat_gate = layout or Layout(), flat_gate
        for part in ("gate", "experts"):
            if not isinstance(self._part(part), nn.Module):
                name, kind = getattr(self.names, part), type(block).__name__
                raise ValueError(f"names: expected a {part} module at '{name}' of {kind}, got none")

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[N, L, H] to [N, L, H]; token_ids [N, L] are handed to the gate where there are any."""
        chosen = self.route(x, token_ids)
        x_TH = x.flatten(0, 1)
        modules = self._part("experts")
        weights_TK, expert_ids_TK = chosen.weights, chosen.expert_ids
        if isinstance(modules, nn.ModuleList):
            y_TH = experts_of_modules(x_TH, modules, weights_TK, expert_ids_TK, self.config)
        else:
            stacked = self.expert_weights()
            y_TH = experts(x_TH, stacked, weights_TK, expert_ids_TK, self.config)
        shared = self._part("shared_experts")
        if shared is not None:
            shared_TH = shared(x_TH)
            gate = self._part("shared_experts_gate")
            if gate is not None:
                shared_TH = torch.sigmoid(gate(x_TH)) * shared_TH
            y_TH = y_TH + shared_TH
        return y_TH.view(x.shape)

    def route(self, x: torch.Tensor, token_ids: torch.Tensor | None = None) -> GateOutput:
        """What the block's gate chooses for x [N, L, H]."""
        gate = self._part("gate")
        if self.flat_gate:
            x = x.flatten(0, 1)
            token_ids = None if token_ids is None else token_ids.flatten()
        output = gate(x) if token_ids is None or self.returns == "logits" else gate(x, token_ids)
        bias = getattr(gate, self.names.selection_bias, self._part("selection_bias"))
        return read_gate(output, self.returns, self.routing, bias, token_ids)

    def expert_weights(self) -> ExpertWeights:
        """The stacked weights of the block's experts in the canonical layout."""
        stacked = self._part("experts")
        suffixes = (self.names.gate_up, self.names.down)
        biases = [getattr(stacked, f"{suffix}_bias", None) for suffix in suffixes]
        gate_up, down = (getattr(stacked, suffix) for suffix in suffixes)
        return from_layout(self.layout, gate_up, down, biases[0], biases[1], self.config.gated)

    def _part(self, part: str) -> Any:
        return getattr(self.block, getattr(self.names, part), None)


def experts_of_modules(
    x: torch.Tensor,
    modules: Iterable[nn.Module],
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
) -> torch.Tensor:
    """`experts` where every expert is a module: each is called once, on its own rows.

    Args:
        x: [T, H], any float dtype.
        modules: E modules, [S, H] to [S, H].
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.
        config: `weight_on` says where the weights go; the rest is the modules' business.

    Returns:
        [T, H], x's dtype. An expert without a token is called on no rows, so that its parameters
        have gradients of zero and a rank that waits for it does not wait in vain.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Source: the expert loops of DeepSeek's and TensorCast's modules.

    >>> weights, ids = torch.tensor([[0.5, 2.0]]), torch.tensor([[0, 1]])
    >>> modules = [nn.Identity(), nn.ReLU()]
    >>> experts_of_modules(torch.tensor([[-1.0]]), modules, weights, ids, ExpertsConfig()).item()
    -0.5
    """
    modules = list(modules)
    x_SH, tokens_per_expert, slots_S = dispatch(x, expert_ids, len(modules))
    if config.weight_on == "input":
        x_SH = (x_SH * weights.flatten()[slots_S, None]).to(x.dtype)
        weights = torch.ones_like(weights)
    groups = x_SH.split(tokens_per_expert.tolist())
    outputs = [module(group) for module, group in zip(modules, groups, strict=True)]
    out_SH = torch.cat([x_SH[:0], *outputs]).to(accumulation_dtype(x))
    return combine(out_SH, slots_S, weights).to(x.dtype)
