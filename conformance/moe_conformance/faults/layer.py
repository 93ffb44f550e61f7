"""Layers with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import LayerConfig, LayerOutput, LayerWeights

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class Layer(Reference):
    """A layer whose call can be changed on the way in and on the way out."""

    def layer(
        self,
        x: Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """Prepare, compute as the reference does, and finish."""
        changed_x, changed, changed_config = self.prepare(x, parameters, config)
        out = super().layer(changed_x, changed, changed_config, token_ids, padding_mask, training)
        return self.finish(out, x, parameters, config)

    def prepare(
        self, x: Tensor, parameters: LayerWeights, config: LayerConfig
    ) -> tuple[Tensor, LayerWeights, LayerConfig]:
        """Change what goes in."""
        return x, parameters, config

    def finish(
        self, out: LayerOutput, x: Tensor, parameters: LayerWeights, config: LayerConfig
    ) -> LayerOutput:
        """Change what comes out."""
        return out


@fault("the-layer-is-all-zeros", catches=("LAYER-01",), thread="aiter #4451")
class TheLayerIsAllZeros(Layer):
    """The output is zero."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        return replace(out, output=out.output * 0)


@fault("the-residual-is-added", catches=("LAYER-01",))
class TheResidualIsAdded(Layer):
    """x is added to the output, which is the block's business."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        return replace(out, output=out.output + x)


@fault("the-last-sequence-is-weighted-by-the-first", catches=("LAYER-01",))
class TheLastSequenceIsWeightedByTheFirst(Layer):
    """The last sequence's output is that of the first where there are several."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        if len(x) < 2:
            return out
        return replace(out, output=torch.cat([out.output[:-1], out.output[:1]]))


@fault("the-reported-weights-are-raw", catches=("LAYER-02",), thread="transformers #45315")
class TheReportedWeightsAreRaw(Layer):
    """The weights are reported before scale and renormalisation."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        assert out.weights is not None
        return replace(out, weights=out.weights / out.weights.sum(-1, keepdim=True) * 0.5)


@fault("the-reported-ids-are-one-on", catches=("LAYER-02",))
class TheReportedIdsAreOneOn(Layer):
    """Ids are reported as counting from 1."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        assert out.expert_ids is not None
        return replace(out, expert_ids=out.expert_ids + 1)


@fault("the-router-bias-is-dropped", catches=("LAYER-03",), thread="torchtitan #2319")
class TheRouterBiasIsDropped(Layer):
    """The router has no bias."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        return x, replace(parameters, router_bias=None), config


@fault("the-router-bias-only-chooses", catches=("LAYER-03",), thread="torchtitan #2258")
class TheRouterBiasOnlyChooses(Layer):
    """The router's bias is taken for a selection bias."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        if parameters.router_bias is None:
            return x, parameters, config
        bias = parameters.router_bias.float()
        return x, replace(parameters, router_bias=None, selection_bias=bias), config


@fault("the-shared-expert-is-left-out", catches=("LAYER-04",))
class TheSharedExpertIsLeftOut(Layer):
    """Only routed experts are computed."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        return x, replace(parameters, shared=None, shared_gate=None), config


@fault("the-shared-expert-gets-the-routing-scale", catches=("LAYER-04",), thread="SGLang #28237")
class TheSharedExpertGetsTheRoutingScale(Layer):
    """The scale multiplies the whole output."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        scale = config.routing.scale * config.shared_scale
        return x, parameters, replace(config, shared_scale=scale)


@fault("the-shared-expert-is-added-twice", catches=("LAYER-04",), thread="vLLM #49122")
class TheSharedExpertIsAddedTwice(Layer):
    """Two paths add it."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        return x, parameters, replace(config, shared_scale=2 * config.shared_scale)


@fault("the-shared-gate-is-dropped", catches=("LAYER-05",), thread="NousResearch/torchtitan#36")
class TheSharedGateIsDropped(Layer):
    """The shared expert is added ungated."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        return x, replace(parameters, shared_gate=None), config


@fault("the-shared-gate-is-negated", catches=("LAYER-05",))
class TheSharedGateIsNegated(Layer):
    """The gate is 1 - sigmoid."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        gate = parameters.shared_gate
        return x, replace(parameters, shared_gate=None if gate is None else -gate), config


@fault("counts-are-of-the-first-choice", catches=("LAYER-06",))
class CountsAreOfTheFirstChoice(Layer):
    """Only each token's best expert is counted."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        assert out.expert_ids is not None
        first = torch.bincount(out.expert_ids[:, 0].long(), minlength=len(parameters.router))
        return replace(out, tokens_per_expert=first)


@fault("counts-are-doubled", catches=("LAYER-06",), thread="torchtitan #1593")
class CountsAreDoubled(Layer):
    """The forward pass of recomputation counts again."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        assert out.tokens_per_expert is not None
        return replace(out, tokens_per_expert=2 * out.tokens_per_expert)


@fault("one-long-sequence-is-cut-short", catches=("LAYER-07",))
class OneLongSequenceIsCutShort(Layer):
    """With one sequence the last token is left out."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        if len(x) != 1 or x.shape[1] < 2:
            return out
        kept = torch.arange(x.shape[1])[:, None] < x.shape[1] - 1
        return replace(out, output=out.output * kept.to(out.output.dtype))


@fault("a-view-mixes-tokens", catches=("LAYER-07",))
class AViewMixesTokens(Layer):
    """The output is laid out hidden first and viewed back."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        return replace(out, output=out.output.transpose(1, 2).reshape(x.shape))


@fault("an-empty-layer-loses-a-dimension", catches=("LAYER-08",))
class AnEmptyLayerLosesADimension(Layer):
    """No tokens give a matrix."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        return out if x.shape[1] else replace(out, output=out.output.flatten(0, 1))


@fault("an-empty-layer-gives-a-token", catches=("LAYER-08",))
class AnEmptyLayerGivesAToken(Layer):
    """No tokens give one row per sequence."""

    def finish(self, out: LayerOutput, x: Tensor, parameters: Any, config: Any) -> LayerOutput:
        """See the contract."""
        return out if x.shape[1] else replace(out, output=x.new_zeros(len(x), 1, x.shape[2]))


@fault("the-router-is-detached", catches=("LAYER-09",), thread="torchtitan #2416")
class TheRouterIsDetached(Layer):
    """No gradient reaches the router."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        return x, replace(parameters, router=parameters.router.detach()), config


@fault("the-router-gets-a-zero-gradient", catches=("LAYER-09",), thread="transformers #48687")
class TheRouterGetsAZeroGradient(Layer):
    """The router is in the graph, multiplied by zero."""

    def prepare(self, x: Tensor, parameters: Any, config: Any) -> tuple[Any, Any, Any]:
        """See the contract."""
        router = parameters.router
        return x, replace(parameters, router=router.detach() + 0 * router), config


@fault("gshard-takes-the-batch-as-one-sequence", catches=("LAYER-11",))
class GshardTakesTheBatchAsOneSequence(Layer):
    """Without a length the loss of gshard is that of all sequences as one."""

    def prepare(
        self, x: Tensor, parameters: LayerWeights, config: LayerConfig
    ) -> tuple[Tensor, LayerWeights, LayerConfig]:
        """See the contract."""
        balance = config.balance
        if balance is None or balance.loss != "gshard" or balance.sequence_length is not None:
            return x, parameters, config
        told = replace(balance, sequence_length=max(1, x[..., 0].numel()))
        return x, parameters, replace(config, balance=told)


@fault("a-told-length-is-not-heard", catches=("LAYER-11",))
class AToldLengthIsNotHeard(Layer):
    """Losses per sequence take those of x, whatever the configuration says."""

    def prepare(
        self, x: Tensor, parameters: LayerWeights, config: LayerConfig
    ) -> tuple[Tensor, LayerWeights, LayerConfig]:
        """See the contract."""
        if config.balance is None:
            return x, parameters, config
        return x, parameters, replace(config, balance=replace(config.balance, sequence_length=None))
