"""Two more legal variants, of every numeric operation: counted from the other end, and in float64.

Reversing tokens, experts, channels and rows changes no result but the order of every sum. Neither
may ever be accused; both say that ties are free, because both decide some of them the other way.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerOutput,
    LayerWeights,
    RoutingConfig,
)

from moe_conformance.targets import Reference

Tensor = torch.Tensor

OPERATIONS = (
    "route",
    "balance_loss",
    "z_loss",
    "update_bias",
    "combine",
    "experts",
    "experts_batched",
    "layer",
)


class Mirrored(Reference):
    """Everything that can be is counted from its end."""

    name = "counted from the other end"
    capabilities = replace(Reference.capabilities, ties="free", operations=OPERATIONS)

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the contract."""
        if logits.ndim != 2:
            return super().route(logits, config, bias, token_ids)
        last = logits.shape[1] - 1
        weights, ids = super().route(
            logits.flip(0, 1), _mirrored(config, last), _flip(bias, 0), _flip(token_ids, 0)
        )
        return weights.flip(0), last - ids.flip(0)

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        if logits.ndim != 2:
            return super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)
        return super().balance_loss(
            logits.flip(0, 1),
            _other_end(expert_ids.flip(0), logits.shape[1]),
            config,
            _flip(padding_mask, 0),
            _flip(tokens_per_expert, 0),
        )

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """See the contract."""
        turned = logits.flip(0, 1) if logits.ndim == 2 else logits
        return super().z_loss(turned, _flip(padding_mask, 0))

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        """See the contract."""
        return super().update_bias(bias.flip(0), tokens_per_expert.flip(0), rate, centred).flip(0)

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See the contract."""
        return super().combine(rows.flip(0), slots.flip(0), weights)

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        if not _sound(experts, x):
            return super().experts(x, experts, weights, expert_ids, config, expert_map)
        return (
            super()
            .experts(
                x.flip(0, 1),
                _channels(experts, config.gated),
                weights.flip(0, 1),
                expert_ids.flip(0, 1),
                config,
                expert_map,
            )
            .flip(0, 1)
        )

    def experts_batched(
        self, x: Tensor, tokens_per_expert: Tensor, experts: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        if not _sound(experts, x):
            return super().experts_batched(x, tokens_per_expert, experts, config)
        turned = _channels(experts, config.gated)
        return super().experts_batched(x.flip(-1), tokens_per_expert, turned, config).flip(-1)

    def layer(
        self,
        x: Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """See the contract."""
        whole = all(each is None or each.ndim == 2 for each in (token_ids, padding_mask))
        if x.ndim != 3 or not whole or not _sound(parameters.experts, x):
            return super().layer(x, parameters, config, token_ids, padding_mask, training)
        last = len(parameters.router) - 1
        gated = config.experts.gated
        experts = _channels(parameters.experts, gated)
        turned = replace(
            parameters,
            router=parameters.router.flip(0, 1),
            router_bias=_flip(parameters.router_bias, 0),
            selection_bias=_flip(parameters.selection_bias, 0),
            experts=_mapped(experts, lambda tensor: tensor.flip(0)),
            shared=None if parameters.shared is None else _channels(parameters.shared, gated),
            shared_gate=_flip(parameters.shared_gate, 1),
        )
        out = super().layer(
            x.flip(0, 1, 2),
            turned,
            replace(config, routing=_mirrored(config.routing, last)),
            _flip(token_ids, 0, 1),
            _flip(padding_mask, 0, 1),
            training,
        )
        assert out.expert_ids is not None
        return replace(
            out,
            output=out.output.flip(0, 1, 2),
            expert_ids=last - out.expert_ids.flip(0),
            weights=_flip(out.weights, 0),
            tokens_per_expert=_flip(out.tokens_per_expert, 0),
        )


class InFloat64(Reference):
    """Everything is computed in float64 and rounded at the end."""

    name = "in float64, rounded at the end"
    capabilities = replace(
        Reference.capabilities,
        ties="free",
        # A layer's router rounds to a dtype that is part of its meaning.
        operations=tuple(name for name in OPERATIONS if name != "layer"),
    )

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the contract."""
        weights, ids = super().route(_double(logits), config, _double(bias), token_ids)
        return weights.to(_wide(logits)), ids

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        loss = super().balance_loss(
            _double(logits), expert_ids, config, padding_mask, tokens_per_expert
        )
        return loss.to(_wide(logits))

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """See the contract."""
        return super().z_loss(_double(logits), padding_mask).to(_wide(logits))

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        """See the contract."""
        updated = super().update_bias(_double(bias), tokens_per_expert, rate, centred)
        return updated.to(_wide(bias))

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See the contract."""
        return super().combine(_double(rows), slots, _double(weights)).to(rows.dtype)

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        wide = _mapped(experts, _double)
        out = super().experts(_double(x), wide, _double(weights), expert_ids, config, expert_map)
        return out.to(x.dtype)

    def experts_batched(
        self, x: Tensor, tokens_per_expert: Tensor, experts: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        wide = _mapped(experts, _double)
        return super().experts_batched(_double(x), tokens_per_expert, wide, config).to(x.dtype)


def _sound(experts: ExpertWeights, x: Tensor) -> bool:
    """Whether the arguments have the dimensions that are turned; the reference refuses others."""
    biases = (experts.gate_up_bias, experts.down_bias)
    return (
        x.ndim >= 2
        and experts.gate_up.ndim == experts.down.ndim == 3
        and all(bias is None or bias.ndim == 2 for bias in biases)
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _double(tensor: Any) -> Any:
    # What is no number of the right kind is left for the reference to refuse.
    return tensor.double() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def _flip(tensor: Tensor | None, *dims: int) -> Tensor | None:
    return None if tensor is None else tensor.flip(*dims)


def _other_end(ids: Tensor, experts: int) -> Tensor:
    # Ids that are not here stay what they are.
    return torch.where((ids >= 0) & (ids < experts), experts - 1 - ids, ids)


def _mirrored(config: RoutingConfig, last: int) -> RoutingConfig:
    if config.hash_table is None:
        return config
    return replace(config, hash_table=_other_end(config.hash_table, last + 1))


def _mapped(experts: ExpertWeights, change: Any) -> ExpertWeights:
    tensors = {field.name: getattr(experts, field.name) for field in fields(experts)}
    made: dict[str, Any] = {
        name: None if tensor is None else change(tensor) for name, tensor in tensors.items()
    }
    return ExpertWeights(**made)


def _channels(experts: ExpertWeights, gated: bool) -> ExpertWeights:
    """The same experts with the channels of x, of the output and between the products reversed."""

    def inner(tensor: Tensor) -> Tensor:
        if not gated:
            return tensor.flip(1)
        return torch.cat([half.flip(1) for half in tensor.chunk(2, 1)], 1)

    return ExpertWeights(
        gate_up=inner(experts.gate_up).flip(2),
        down=experts.down.flip(1, 2),
        gate_up_bias=None if experts.gate_up_bias is None else inner(experts.gate_up_bias),
        down_bias=_flip(experts.down_bias, 1),
    )
