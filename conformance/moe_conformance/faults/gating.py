"""Routers with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference import gating
from moe_reference.config import RoutingConfig

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Routed = tuple[Tensor, Tensor]


class Router(Reference):
    """A router whose pieces can be exchanged one at a time."""

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Routed:
        """Prepare, route as the reference does, and finish."""
        logits, config, bias, token_ids = self.prepare(logits, config, bias, token_ids)
        weights, ids = super().route(logits, config, bias, token_ids)
        return self.finish(weights, ids, logits, config, bias)

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """Change what goes in."""
        return logits, config, bias, token_ids

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """Change what comes out."""
        return weights, ids


def _constant(logits: Tensor) -> Tensor:
    return (logits == logits[:, :1]).all(-1, keepdim=True)


@fault("constant-rows-repeat-an-expert", catches=("GATE-01",), thread="SGLang #30989")
class ConstantRowsRepeatAnExpert(Router):
    """Where all logits of a row are equal, the first expert is taken K times."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights, ids.where(~_constant(logits), ids[:, :1])


@fault("an-id-past-the-end-when-all-experts-are-chosen", catches=("GATE-01",))
class AnIdPastTheEnd(Router):
    """With K = E the last id is E."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if config.top_k == logits.shape[1]:
            ids = ids + (ids == config.top_k - 1)
        return weights, ids


@fault("nan-rows-repeat-an-expert", catches=("GATE-02",), thread="vLLM #39391")
class NanRowsRepeatAnExpert(Router):
    """A NaN row gets expert 0 K times."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights, ids.masked_fill(logits.isnan().any(-1, keepdim=True), 0)


@fault("infinite-rows-get-an-id-out-of-range", catches=("GATE-02",), thread="SGLang #30079")
class InfiniteRowsGetAnIdOutOfRange(Router):
    """A row of minus infinity finds no maximum, and the id is E."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        lost = (logits == -torch.inf).any(-1, keepdim=True)
        return weights, ids.masked_fill(lost, logits.shape[1])


@fault("weights-of-the-biased-scores", catches=("GATE-03",), thread="vLLM #12002")
class WeightsOfTheBiasedScores(Router):
    """The weights are gathered after the bias was added."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if bias is None or config.hash_table is not None:
            return weights, ids
        return weights + bias.to(weights.dtype)[ids] * config.scale, ids


@fault("a-negative-bias-weighs", catches=("GATE-03",), thread="transformers #41647")
class ANegativeBiasWeighs(Router):
    """Experts with a bias below -2 lose it from their weight."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if bias is None or config.hash_table is not None:
            return weights, ids
        return weights + bias.clamp(max=-2).to(weights.dtype)[ids] + 2, ids


@fault("the-last-token-gets-the-worst-expert", catches=("GATE-04",))
class TheLastTokenGetsTheWorstExpert(Router):
    """The last row's first choice is the expert with the lowest logit."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        worst = logits[-1:].float().nan_to_num().argmin(-1)
        if len(ids) and config.hash_table is None and not (ids[-1] == worst).any():
            ids = torch.cat([ids[:-1], torch.cat([worst, ids[-1, 1:]])[None]])
        return weights, ids


@fault("the-choice-is-made-in-bfloat16", catches=("GATE-04",), thread="AstrAI #57")
class TheChoiceIsMadeInBfloat16(Router):
    """Logits are rounded before the choice, so close experts are exchanged."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        rough = logits.to(torch.bfloat16).to(logits.dtype)
        return weights, Reference.route(self, rough, config, bias)[1]


@fault("the-bias-does-not-choose", catches=("GATE-05",), thread="mlx-lm #1354")
class TheBiasDoesNotChoose(Router):
    """The bias is dropped."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, config, None, token_ids


@fault("the-bias-is-added-to-the-logits", catches=("GATE-05",))
class TheBiasIsAddedToTheLogits(Router):
    """The choice is made on the scores of biased logits."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if bias is None or config.order == "topk_then_score":
            return weights, ids
        return weights, Reference.route(self, logits.float() + bias.float(), config)[1]


@fault("softmax-where-sigmoid-is-meant", catches=("GATE-06",), thread="llama.cpp #18980")
class SoftmaxWhereSigmoidIsMeant(Router):
    """Every score function is softmax."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, score="softmax"), bias, token_ids


@fault("softmax-over-the-chosen", catches=("GATE-06",), thread="Megatron #955")
class SoftmaxOverTheChosen(Router):
    """The order of scoring and selecting is always the second."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if config.score == "softmax" and bias is None and config.num_groups == 1:
            config = replace(config, order="topk_then_score")
        return logits, config, bias, token_ids


@fault("renormalisation-is-forgotten", catches=("GATE-07",), thread="torchtitan #1448")
class RenormalisationIsForgotten(Router):
    """Weights are left as they are."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, renormalize=False), bias, token_ids


@fault("one-expert-is-renormalised", catches=("GATE-07",), thread="minimind #858")
class OneExpertIsRenormalised(Router):
    """K = 1 is renormalised whatever the configuration says."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, renormalize_single=True), bias, token_ids


@fault("epsilon-is-forgotten", catches=("GATE-08",), thread="flashinfer #3803")
class EpsilonIsForgotten(Router):
    """0 / 0 when every score underflows."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, epsilon=0.0), bias, token_ids


@fault("epsilon-is-multiplied-by-the-sum", catches=("GATE-08",))
class EpsilonIsMultipliedByTheSum(Router):
    """The divisor is the sum times 1 + epsilon, which is 0 where the sum is."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits * 1, replace(config, epsilon=0.0), bias, token_ids

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights.masked_fill(weights.isnan(), torch.inf), ids


@fault("the-scale-is-lost-with-renormalisation", catches=("GATE-09",), thread="SGLang #31449")
class TheScaleIsLostWithRenormalisation(Router):
    """The scale is applied in the other branch only."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, scale_when="not_renormalized"), bias, token_ids


@fault("the-scale-is-applied-twice", catches=("GATE-09",), thread="vLLM #45037")
class TheScaleIsAppliedTwice(Router):
    """The weights are scaled by the square."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, scale=config.scale**2), bias, token_ids


@fault("groups-are-scored-by-their-best-expert", catches=("GATE-10",), thread="vLLM #13474")
class GroupsAreScoredByTheirBestExpert(Router):
    """Every group score is the maximum."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, group_score="max"), bias, token_ids


@fault("groups-are-ignored", catches=("GATE-10",))
class GroupsAreIgnored(Router):
    """All groups are open."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, num_groups=1, topk_groups=1), bias, token_ids


@fault("the-bias-comes-after-the-groups", catches=("GATE-11",))
class TheBiasComesAfterTheGroups(Router):
    """Groups are chosen on the unbiased scores."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if bias is None or config.num_groups == 1 or config.topk_groups == config.num_groups:
            return weights, ids
        size = logits.shape[1] // config.num_groups
        one = replace(config, top_k=1, topk_groups=1, hash_table=None)
        group = Reference.route(self, logits, one)[1] // size
        inside = torch.arange(logits.shape[1]) // size == group
        free = replace(config, num_groups=1, topk_groups=1, top_k=min(config.top_k, size))
        shifted = bias.float() + inside.float() * 1e4
        chosen = torch.cat(
            [
                Reference.route(self, logits[t : t + 1], free, shifted[t])[1]
                for t in range(len(logits))
            ]
        )
        return weights, chosen if chosen.shape == ids.shape else ids


@fault("groups-are-scored-without-a-negative-bias", catches=("GATE-11",))
class GroupsAreScoredWithoutANegativeBias(Router):
    """A bias below 0 is taken as 0."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, config, None if bias is None else bias.clamp(min=0), token_ids


@fault("closed-groups-are-filled-with-zero", catches=("GATE-12",), thread="transformers #45441")
class ClosedGroupsAreFilledWithZero(Router):
    """A masked score of 0 wins against negative ones."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, replace(config, mask_fill="zero"), bias, token_ids


def _best(keys: Tensor, logits: Tensor, config: RoutingConfig) -> Routed:
    """The experts with the greatest keys, weighed by their logits as the reference does."""
    chosen = keys.argsort(dim=1, descending=True, stable=True)[:, : config.top_k]
    picked = gating._chosen_scores(gating.upcast(logits), chosen, config)
    return gating._renormalize_and_scale(picked, config), chosen


class _Filled(Router):
    """Experts of closed groups get a number that is meant to lose against any score."""

    fill: float

    def route(self, logits: Tensor, config: Any, bias: Any = None, token_ids: Any = None) -> Routed:
        """See the contract."""
        weights, ids = super().route(logits, config, bias, token_ids)
        if config.num_groups == 1 or config.mask_fill == "zero" or bias is None:
            return weights, ids
        keys = gating._selection_scores(gating.upcast(logits), config, bias)
        filled = keys.masked_fill(gating._outside_best_groups(keys, config), self.fill)
        return _best(filled, logits, config)


@fault("closed-groups-are-filled-with-minus-10000", catches=("GATE-12",))
class ClosedGroupsAreFilledWithMinus10000(_Filled):
    """Enough for any score in float16, and too little beside a bias that switches experts off."""

    fill = -1e4


@fault("closed-groups-are-filled-with-minus-1e9", catches=("GATE-12",))
class ClosedGroupsAreFilledWithMinus1e9(_Filled):
    """As in attention masks."""

    fill = -1e9


@fault("a-fill-of-0-is-forgotten-beside-a-bias", catches=("GATE-11",))
class AFillOf0IsForgottenBesideABias(Router):
    """With a bias, closed groups are masked with minus infinity whatever was declared."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if bias is not None:
            config = replace(config, mask_fill="-inf")
        return logits, config, bias, token_ids


@fault("the-bias-is-added-to-a-fill-of-0", catches=("GATE-11",), thread="transformers #45441")
class TheBiasIsAddedToAFillOf0(Router):
    """Scores of closed groups become 0 before the bias is added, not after."""

    def route(self, logits: Tensor, config: Any, bias: Any = None, token_ids: Any = None) -> Routed:
        """See the contract."""
        weights, ids = super().route(logits, config, bias, token_ids)
        if bias is None or config.num_groups == 1 or config.mask_fill != "zero":
            return weights, ids
        wide = gating.upcast(logits)
        keys = gating._selection_scores(wide, config, bias)
        closed = gating._outside_best_groups(keys, config)
        filled = gating._selection_scores(wide, config, None).masked_fill(closed, 0.0)
        return _best(filled + bias.to(filled), logits, config)


@fault("closed-groups-open-below-minus-one", catches=("GATE-12",), thread="DeepSeek-V3 #741")
class ClosedGroupsOpenBelowMinusOne(Router):
    """Groups are forgotten for a token whose biased scores are all below -1."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if bias is not None and bool((bias < -1.5).all()):
            config = replace(config, num_groups=1, topk_groups=1)
        return logits, config, bias, token_ids


@fault("ties-go-to-the-highest-id", catches=("GATE-13",))
class TiesGoToTheHighestId(Router):
    """The experts are searched from the end."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if config.hash_table is not None or config.num_groups > 1:
            return weights, ids
        turned = Reference.route(
            self, logits.flip(1), config, None if bias is None else bias.flip(0)
        )
        return turned[0], logits.shape[1] - 1 - turned[1]


@fault("ties-are-broken-by-token", catches=("GATE-13",))
class TiesAreBrokenByToken(Router):
    """Odd tokens search from the end."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if config.hash_table is not None or config.num_groups > 1 or bias is not None:
            return weights, ids
        turned = logits.shape[1] - 1 - Reference.route(self, logits.flip(1), config)[1]
        odd = (torch.arange(len(ids)) % 2 == 1)[:, None]
        return weights, turned.where(odd, ids)


@fault("the-table-is-read-one-row-on", catches=("GATE-14",))
class TheTableIsReadOneRowOn(Router):
    """Token ids are taken as counting from 1."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if config.hash_table is not None:
            config = replace(config, hash_table=config.hash_table.roll(1, 0))
        return logits, config, bias, token_ids


@fault("the-table-is-cast-to-bfloat16", catches=("GATE-14",), thread="verl-ascend-recipe #126")
class TheTableIsCastToBfloat16(Router):
    """Ids above 256 are rounded to even ones."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if config.hash_table is None:
            return weights, ids
        return weights, ids.bfloat16().long().clamp(max=logits.shape[1] - 1)


@fault("one-nan-token-breaks-the-batch", catches=("GATE-15",), thread="SGLang #30895")
class OneNanTokenBreaksTheBatch(Router):
    """The maximum is taken over the whole batch before the exponential."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return (weights * torch.nan if bool(logits.isnan().any()) else weights), ids


@fault("the-first-token-is-special", catches=("GATE-15",))
class TheFirstTokenIsSpecial(Router):
    """The first token's weights are multiplied by 1.01."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        first = (torch.arange(len(weights)) == 0)[:, None]
        return weights * torch.where(first, 1.01, 1.0), ids


@fault("ids-are-one-byte", catches=("GATE-16",), thread="imp #2056")
class IdsAreOneByte(Router):
    """Experts from 256 on come out as those from 0 on."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights, ids % 256


@fault("the-last-expert-is-never-chosen", catches=("GATE-16",), thread="aiter #2359")
class TheLastExpertIsNeverChosen(Router):
    """Where E is not a power of two the last expert is left out."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        experts = logits.shape[1]
        if experts & (experts - 1) and config.top_k < experts and config.hash_table is None:
            ids = ids - (ids == experts - 1).long() * (experts - 1 - config.top_k // 2)
        return weights, ids


@fault("too-many-experts-per-token-are-cut-off", catches=("GATE-17",))
class TooManyExpertsAreCutOff(Router):
    """K > E is taken as K = E."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if logits.ndim == 2 and config.top_k > logits.shape[1]:
            config = replace(config, top_k=logits.shape[1])
        return logits, config, bias, token_ids


@fault("token-ids-are-clamped", catches=("GATE-17",), thread="vLLM #50844")
class TokenIdsAreClamped(Router):
    """A token id outside the table reads its last row."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        if token_ids is not None and config.hash_table is not None:
            token_ids = token_ids.clamp(0, len(config.hash_table) - 1)
        return logits, config, bias, token_ids


@fault("the-weights-are-detached", catches=("GATE-18",))
class TheWeightsAreDetached(Router):
    """The router gets no gradient."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights.detach(), ids


@fault("the-norm-is-detached", catches=("GATE-18",))
class TheNormIsDetached(Router):
    """The renormalisation is taken as a constant in the backward pass."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if not config.renormalize or config.hash_table is not None:
            return weights, ids
        plain = Reference.route(self, logits, replace(config, renormalize=False), bias)[0]
        if plain.shape != weights.shape:
            return weights, ids
        ratio = (weights / plain).detach().nan_to_num()
        return weights.detach() + ratio * (plain - plain.detach()), ids


@fault("zero-tokens-lose-a-dimension", catches=("GATE-19",))
class ZeroTokensLoseADimension(Router):
    """An empty batch gives empty vectors."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return (weights, ids) if len(ids) else (weights.flatten(), ids.flatten())


@fault("zero-tokens-give-one-row", catches=("GATE-19",))
class ZeroTokensGiveOneRow(Router):
    """A grid of at least one program writes one row."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if len(ids):
            return weights, ids
        return weights.new_zeros(1, config.top_k), ids.new_zeros(1, config.top_k)


@fault("the-bias-is-kept-in-bfloat16", catches=("GATE-20",), thread="SGLang #37133")
class TheBiasIsKeptInBfloat16(Router):
    """Biases a thousandth apart become equal."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, config, None if bias is None else bias.bfloat16(), token_ids


@fault("the-bias-is-kept-in-float16", catches=("GATE-20",))
class TheBiasIsKeptInFloat16(Router):
    """Biases closer than 1/256 at 7 become equal."""

    def prepare(self, logits: Tensor, config: Any, bias: Any, token_ids: Any) -> tuple[Any, ...]:
        """See the contract."""
        return logits, config, None if bias is None else bias.half(), token_ids


@fault("weights-are-recovered-from-biased-scores", catches=("GATE-21",), thread="flashinfer #3875")
class WeightsAreRecoveredFromBiasedScores(Router):
    """(s + b) - b loses a small score beside a large bias."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if bias is None or config.renormalize:
            return weights, ids
        chosen = bias.to(weights.dtype)[ids]
        return (weights / config.scale + chosen - chosen) * config.scale, ids


@fault("small-weights-are-flushed", catches=("GATE-21",), thread="vLLM #47367")
class SmallWeightsAreFlushed(Router):
    """Weights below 1e-6 come out as 0."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights.where(weights.abs() > 1e-6, 0.0), ids
