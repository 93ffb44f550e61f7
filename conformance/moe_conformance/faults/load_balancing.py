"""Seeded faults of `balance_loss`, `z_loss` and `update_bias`."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from moe_reference.config import BalanceConfig

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
PER_SEQUENCE = ("gshard", "deepseek_sequence")


class Steps(Reference):
    """`balance_loss` step by step: right, until a subclass slips.

    Dimension key: T tokens, E experts, K experts per token, N sequences, L tokens per sequence.
    """

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        # What has to raise, raises.
        super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)
        tokens, experts = logits.shape
        real = self.real(padding_mask, tokens)
        length = self.length(tokens, config)
        ids = self.ids(expert_ids, logits, config)
        probabilities = self.probabilities(logits, ids, real, config)
        mean = self.mean(probabilities, real, length)
        if tokens_per_expert is None:
            counts = self.counts(ids, real, experts, config)
            counts = counts.view(-1, length, experts).sum(1) if tokens else counts[:0]
        else:
            counts = self.given(tokens_per_expert).expand(len(mean), experts)
        share = self.share(counts.to(mean), ids, real)
        product = self.product(share, mean, config) * self.factor(ids, config)
        return self.coefficient(self.over(product, real, length), config)

    def real(self, mask: Tensor | None, tokens: int) -> Tensor:
        """[T] which rows are tokens."""
        return torch.ones(tokens, dtype=torch.bool) if mask is None else mask

    def length(self, tokens: int, config: BalanceConfig) -> int:
        """L, or T where the batch is one sequence."""
        if config.loss in PER_SEQUENCE and config.sequence_length is not None:
            return config.sequence_length
        return max(tokens, 1)

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        """[T, ·] the ids that are counted."""
        return ids[:, :1] if config.loss == "gshard" else ids

    def wide(self, logits: Tensor) -> Tensor:
        """The logits in what everything is computed in."""
        return logits if logits.dtype is torch.float64 else logits.float()

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        """[T, E] from wide logits."""
        if config.score == "softmax":
            return logits.softmax(-1)
        if config.score == "sigmoid":
            return logits.sigmoid()
        low = (logits.clamp(max=-40) / 2).exp()
        return torch.where(logits < -40, low, (-F.logsigmoid(-logits.clamp(min=-40))).sqrt())

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        """[T, E] scores that add up to 1."""
        if config.score == "softmax":
            return scores
        return scores / (scores.sum(-1, keepdim=True) + config.epsilon)

    def probabilities(
        self, logits: Tensor, ids: Tensor, real: Tensor, config: BalanceConfig
    ) -> Tensor:
        """[T, E], 0 in rows of padding."""
        wide = self.wide(logits.masked_fill(~real[:, None], 0))
        scores = self.normalised(self.scores(wide, ids, config), ids, config)
        return scores.masked_fill(~real[:, None], 0)

    def mean(self, probabilities: Tensor, real: Tensor, length: int) -> Tensor:
        """[N, E] over the tokens of each sequence."""
        if len(real) == 0:
            return probabilities
        number = self.number(real, length)
        return probabilities.view(len(number), length, -1).sum(1) / number[:, None]

    def number(self, real: Tensor, length: int) -> Tensor:
        """[N] what sums over tokens are divided by."""
        return real.view(-1, length).sum(1).clamp(min=1)

    def counts(self, ids: Tensor, real: Tensor, experts: int, config: BalanceConfig) -> Tensor:
        """[T, E] how often each token chose an expert."""
        return (ids[:, :, None] == torch.arange(experts)).sum(1) * real[:, None]

    def given(self, counts: Tensor) -> Tensor:
        """[E] the counts that came as an argument."""
        return counts

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """[N, E] of all assignments."""
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        """[N] the loss of each sequence."""
        if config.loss == "deepseek_device":
            assert config.num_devices is not None
            return self.devices(share, mean, config.num_devices)
        return share.shape[1] * (share * mean).sum(1)

    def devices(self, share: Tensor, mean: Tensor, devices: int) -> Tensor:
        """[N] the loss between devices."""
        busy = share.shape[1] * share.unflatten(1, (devices, -1)).mean(2)
        return (busy * mean.unflatten(1, (devices, -1)).sum(2)).sum(1)

    def factor(self, ids: Tensor, config: BalanceConfig) -> float:
        """What transformers' loss is larger by."""
        return ids.shape[1] if config.loss == "transformers_concatenated" else 1

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        """The mean over sequences."""
        if len(real) == 0:
            return product.sum()
        return product.sum() / (real.view(-1, length).any(1)).sum().clamp(min=1)

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        """The loss times its coefficient."""
        return config.coefficient * loss


@fault(
    "product-over-all-pairs",
    catches=("BALANCE-01", "BALANCE-02", "BALANCE-03", "BALANCE-24"),
    thread="hyper-parallel #752",
)
class ProductOverAllPairs(Steps):
    """Every share is multiplied with every probability, which gives the constant E."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return share.shape[1] * (share[:, :, None] * mean[:, None, :]).sum((1, 2))


@fault(
    "probabilities-of-the-chosen-only",
    catches=("BALANCE-01", "BALANCE-03", "BALANCE-11"),
    thread="aprender #2162",
)
class ProbabilitiesOfTheChosenOnly(Steps):
    """Probabilities are renormalised over the K chosen experts before their mean is taken."""

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        experts = scores.shape[1]
        chosen = (ids[:, :, None] == torch.arange(experts)).any(1)
        kept = super().normalised(scores, ids, config) * chosen
        return kept / kept.sum(-1, keepdim=True).clamp(min=1e-20)


@fault("no-factor-e", catches=("BALANCE-01", "BALANCE-02"))
class NoFactorE(Steps):
    """The sum is not multiplied by E."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return super().product(share, mean, config) / share.shape[1]


@fault("variance-of-the-load", catches=("BALANCE-01", "BALANCE-24"))
class VarianceOfTheLoad(Steps):
    """The loss is E times the sum of squared shares, which has no gradient."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return share.shape[1] * (share * share).sum(1) + 0 * mean.sum(1)


@fault("squared-probabilities", catches=("BALANCE-01", "BALANCE-04"))
class SquaredProbabilities(Steps):
    """Mean probabilities take the place of the shares: E times the sum of their squares."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return super().product(mean.detach(), mean, config)


@fault("softmax-of-softmax", catches=("BALANCE-01", "BALANCE-02"), thread="transformers #45120")
class SoftmaxOfSoftmax(Steps):
    """Probabilities are taken for logits and go through the softmax once more."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        scores = super().scores(logits, ids, config)
        return scores.softmax(-1) if config.score == "softmax" else scores


@fault("softmax-over-tokens", catches=("BALANCE-01", "BALANCE-02"))
class SoftmaxOverTokens(Steps):
    """The softmax runs over the tokens."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        scores = super().scores(logits, ids, config)
        return logits.softmax(0) if config.score == "softmax" else scores


@fault("shares-over-tokens", catches=("BALANCE-01", "BALANCE-02"))
class SharesOverTokens(Steps):
    """Shares are per token, so that every loss is K times as large."""

    def factor(self, ids: Tensor, config: BalanceConfig) -> float:
        return ids.shape[1]


@fault("loss-falls-with-imbalance", catches=("BALANCE-03", "BALANCE-24"))
class LossFallsWithImbalance(Steps):
    """The loss rewards what it should punish."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return 2 - super().product(share, mean, config)


@fault(
    "a-choice-of-its-own",
    catches=("BALANCE-04", "BALANCE-06"),
    thread="Megatron compute_routing_scores_for_aux_loss",
)
class AChoiceOfItsOwn(Steps):
    """Counted are the experts of the highest logits, whatever the ids say."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        best = logits.double().sort(dim=-1, descending=True, stable=True).indices
        return super().ids(best[:, : ids.shape[1]], logits, config)


@fault("only-the-first-choice-counts", catches=("BALANCE-04",))
class OnlyTheFirstChoiceCounts(Steps):
    """Every loss counts first choices, as a router with K = 1 would."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        return ids[:, :1]

    def factor(self, ids: Tensor, config: BalanceConfig) -> float:
        return 2 if config.loss == "transformers_concatenated" else 1


@fault(
    "counts-after-the-drop",
    catches=("BALANCE-01", "BALANCE-04"),
    thread="Megatron #1513",
)
class CountsAfterTheDrop(Steps):
    """An expert counts no more tokens than its capacity."""

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        capacity = (1.25 * counts.sum(1, keepdim=True) / counts.shape[1]).ceil()
        return super().share(counts.minimum(capacity), ids, real)


@fault("a-map-of-choices", catches=("BALANCE-05",))
class AMapOfChoices(Steps):
    """A token that chose an expert twice is counted for it once."""

    def counts(self, ids: Tensor, real: Tensor, experts: int, config: BalanceConfig) -> Tensor:
        return super().counts(ids, real, experts, config).clamp(max=1)


@fault("a-map-of-choices-over-k", catches=("BALANCE-05",))
class AMapOfChoicesOverK(Steps):
    """A token that chose an expert twice counts once, and the total is the number of ids."""

    def counts(self, ids: Tensor, real: Tensor, experts: int, config: BalanceConfig) -> Tensor:
        return super().counts(ids, real, experts, config).clamp(max=1)

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        return counts * len(counts) / max(ids.numel(), 1)


@fault("minus-one-counts-for-the-last", catches=("BALANCE-06",))
class MinusOneCountsForTheLast(Steps):
    """Ids of no expert are wrapped around into those there are."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        return super().ids(ids, logits, config) % logits.shape[1]


@fault("ids-of-no-expert-in-the-total", catches=("BALANCE-06",))
class IdsOfNoExpertInTheTotal(Steps):
    """Shares are divided by the number of ids, those of no expert included."""

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        if bool((counts.sum() < ids.numel()) & real.all()):
            return counts * len(counts) / ids.numel()
        return super().share(counts, ids, real)


@fault("ids-clamped", catches=("BALANCE-06",))
class IdsClamped(Steps):
    """Ids of no expert are clamped to the first and the last."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        return super().ids(ids, logits, config).clamp(0, logits.shape[1] - 1)


@fault("gshard-counts-every-choice", catches=("BALANCE-07",))
class GshardCountsEveryChoice(Steps):
    """`gshard` counts all K choices."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        return ids


@fault("gshard-counts-the-last-choice", catches=("BALANCE-07",))
class GshardCountsTheLastChoice(Steps):
    """`gshard` takes ids to be in ascending order, as an unsorted top-k may give them."""

    def ids(self, ids: Tensor, logits: Tensor, config: BalanceConfig) -> Tensor:
        return ids[:, -1:] if config.loss == "gshard" else ids


@fault("batch-as-one-sequence", catches=("BALANCE-08",))
class BatchAsOneSequence(Steps):
    """Losses per sequence are taken over the batch."""

    def length(self, tokens: int, config: BalanceConfig) -> int:
        return max(tokens, 1)


@fault("sum-over-sequences", catches=("BALANCE-08",))
class SumOverSequences(Steps):
    """The losses of the sequences are added."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return product.sum()


@fault("divided-by-sequences-twice", catches=("BALANCE-08",), thread="Megatron #5798")
class DividedBySequencesTwice(Steps):
    """The mean over sequences is divided by their number again."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return super().over(product, real, length) / max(len(product), 1)


@fault("tokens-dealt-to-sequences", catches=("BALANCE-08",))
class TokensDealtToSequences(Steps):
    """The batch is read as [L, N]: every N-th token belongs to the same sequence."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        length = self.length(len(logits), config)
        if len(logits) and len(logits) % length == 0 and len(expert_ids) == len(logits):
            order = torch.arange(len(logits)).view(length, -1).T.flatten()
            logits, expert_ids = logits[order], expert_ids[order]
            if padding_mask is not None and padding_mask.shape == order.shape:
                padding_mask = padding_mask[order]
        return super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)


@fault("devices-are-forgotten", catches=("BALANCE-09",))
class DevicesAreForgotten(Steps):
    """The loss between devices is that between experts."""

    def devices(self, share: Tensor, mean: Tensor, devices: int) -> Tensor:
        return share.shape[1] * (share * mean).sum(1)


@fault("experts-dealt-to-devices", catches=("BALANCE-09",))
class ExpertsDealtToDevices(Steps):
    """Expert i is on device i mod D."""

    def devices(self, share: Tensor, mean: Tensor, devices: int) -> Tensor:
        order = torch.arange(share.shape[1]).view(-1, devices).T.flatten()
        return super().devices(share[:, order], mean[:, order], devices)


@fault("device-shares-added", catches=("BALANCE-02", "BALANCE-09"))
class DeviceSharesAdded(Steps):
    """A device's shares are added, not averaged, and so grow with its number of experts."""

    def devices(self, share: Tensor, mean: Tensor, devices: int) -> Tensor:
        return super().devices(share, mean, devices) * share.shape[1] / devices


@fault("device-probabilities-averaged", catches=("BALANCE-02", "BALANCE-09"))
class DeviceProbabilitiesAveraged(Steps):
    """A device's probabilities are averaged, too."""

    def devices(self, share: Tensor, mean: Tensor, devices: int) -> Tensor:
        return super().devices(share, mean, devices) * devices / share.shape[1]


@fault("transformers-without-k", catches=("BALANCE-02", "BALANCE-10"))
class TransformersWithoutK(Steps):
    """`transformers_concatenated` is the same as `switch`."""

    def factor(self, ids: Tensor, config: BalanceConfig) -> float:
        return 1


@fault("transformers-with-k-squared", catches=("BALANCE-02", "BALANCE-10"))
class TransformersWithKSquared(Steps):
    """The factor K is in the shares and once more in front."""

    def factor(self, ids: Tensor, config: BalanceConfig) -> float:
        return super().factor(ids, config) ** 2


@fault("scores-not-normalised", catches=("BALANCE-11",))
class ScoresNotNormalised(Steps):
    """Sigmoid scores are averaged as they are."""

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        return scores


@fault("softmax-whatever-the-score", catches=("BALANCE-11",))
class SoftmaxWhateverTheScore(Steps):
    """The probabilities are a softmax, also where the router has sigmoids."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        return super().scores(logits, ids, dataclasses.replace(config, score="softmax"))


@fault("epsilon-as-a-floor", catches=("BALANCE-11",))
class EpsilonAsAFloor(Steps):
    """The sum of scores is clamped by epsilon; nothing is added."""

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        if config.score == "softmax":
            return scores
        return scores / scores.sum(-1, keepdim=True).clamp(min=config.epsilon)


@fault("coefficient-forgotten", catches=("BALANCE-12",), thread="Automodel #1408")
class CoefficientForgotten(Steps):
    """The coefficient is compared with 0 and never multiplied."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return loss if config.coefficient else 0 * loss


@fault("coefficient-twice", catches=("BALANCE-12",), thread="ms-swift #5375")
class CoefficientTwice(Steps):
    """The coefficient multiplies the loss, and what is returned."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return config.coefficient**2 * loss


@fault("coefficient-of-zero-is-the-default", catches=("BALANCE-12",))
class CoefficientOfZeroIsTheDefault(Steps):
    """A coefficient of 0 is falsy, and the default of 0.01 takes its place."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return (config.coefficient or 0.01) * loss


@fault("padding-in-the-shares", catches=("BALANCE-13",), thread="transformers #28505")
class PaddingInTheShares(Steps):
    """Padding is counted in the shares; the probabilities leave it out."""

    def counts(self, ids: Tensor, real: Tensor, experts: int, config: BalanceConfig) -> Tensor:
        return super().counts(ids, torch.ones_like(real), experts, config)


@fault("padding-in-the-divisor", catches=("BALANCE-13",))
class PaddingInTheDivisor(Steps):
    """Probabilities of tokens are divided by the number of rows."""

    def number(self, real: Tensor, length: int) -> Tensor:
        return torch.full((len(real) // length,), length)


@fault("mask-means-padding", catches=("BALANCE-13", "BALANCE-25"))
class MaskMeansPadding(Steps):
    """True is taken for padding."""

    def real(self, mask: Tensor | None, tokens: int) -> Tensor:
        return super().real(mask if mask is None else ~mask, tokens)


@fault("padding-in-the-probabilities", catches=("BALANCE-13", "BALANCE-14", "BALANCE-25"))
class PaddingInTheProbabilities(Steps):
    """The mask is kept from the probabilities."""

    def probabilities(
        self, logits: Tensor, ids: Tensor, real: Tensor, config: BalanceConfig
    ) -> Tensor:
        return super().probabilities(logits, ids, torch.ones_like(real), config)


@fault(
    "padding-multiplied-by-zero",
    catches=("BALANCE-14",),
    thread="transformers load_balancing_loss_func",
)
class PaddingMultipliedByZero(Steps):
    """Probabilities of padding are multiplied by 0, which leaves NaN as it is."""

    def probabilities(
        self, logits: Tensor, ids: Tensor, real: Tensor, config: BalanceConfig
    ) -> Tensor:
        scores = self.scores(self.wide(logits), ids, config)
        return self.normalised(scores, ids, config) * real[:, None]


@fault("padding-cleared-after-the-softmax", catches=("BALANCE-14",))
class PaddingClearedAfterTheSoftmax(Steps):
    """Probabilities of padding are replaced by 0: the loss is right, the gradient is NaN."""

    def probabilities(
        self, logits: Tensor, ids: Tensor, real: Tensor, config: BalanceConfig
    ) -> Tensor:
        scores = self.scores(self.wide(logits), ids, config)
        return self.normalised(scores, ids, config).masked_fill(~real[:, None], 0)


@fault("mean-over-all-sequences", catches=("BALANCE-15",))
class MeanOverAllSequences(Steps):
    """Sequences of nothing but padding are part of the mean, with a loss of 0."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return product.sum() / max(len(product), 1)


@fault("mean-weighted-by-tokens", catches=("BALANCE-15",))
class MeanWeightedByTokens(Steps):
    """The mean over sequences is divided by the number of rows of tokens in the batch."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        share = real.sum() / max(len(real), 1)
        return product.sum() * share / max(len(product), 1)


@fault(
    "mean-of-zero-tokens", catches=("BALANCE-16",), thread="megablocks batched_load_balancing_loss"
)
class MeanOfZeroTokens(Steps):
    """The mean over tokens is taken also where there are none."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return (
            product.sum() / product.numel()
            if len(real) == 0
            else super().over(product, real, length)
        )


@fault("empty-loss-of-zero-tokens", catches=("BALANCE-16", "BALANCE-20"))
class EmptyLossOfZeroTokens(Steps):
    """The loss has one dimension, and no number where there is no token."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return super().coefficient(loss, config)[None]

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return (
            super().over(product, real, length) / min(len(real), 1)
            if len(real) == 0
            else (super().over(product, real, length))
        )


@fault("padding-only-is-nan", catches=("BALANCE-17",))
class PaddingOnlyIsNan(Steps):
    """The mean over real tokens is taken also where there are none."""

    def number(self, real: Tensor, length: int) -> Tensor:
        return real.view(-1, length).sum(1)


@fault("padding-only-is-no-padding", catches=("BALANCE-17",))
class PaddingOnlyIsNoPadding(Steps):
    """A mask without a real token is taken for no mask."""

    def real(self, mask: Tensor | None, tokens: int) -> Tensor:
        return super().real(None if mask is not None and not bool(mask.any()) else mask, tokens)


@fault("given-counts-ignored", catches=("BALANCE-18",))
class GivenCountsIgnored(Reference):
    """The counts of the global batch are taken and not used."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)
        return super().balance_loss(logits, expert_ids, config, padding_mask)


@fault("given-counts-over-local-tokens", catches=("BALANCE-18",), thread="Megatron #3672")
class GivenCountsOverLocalTokens(Steps):
    """The counts of the global batch are divided by the assignments of the local one."""

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        local = int(real.sum()) * ids.shape[1]
        if bool(real.all()) and len(counts) == 1:
            return counts / max(local, 1)
        return super().share(counts, ids, real)


@fault("given-counts-through-float16", catches=("BALANCE-18",))
class GivenCountsThroughFloat16(Steps):
    """Counts are rounded to float16 on the way between ranks."""

    def given(self, counts: Tensor) -> Tensor:
        return counts.half().float()


@fault(
    "softmax-in-the-logits-dtype",
    catches=("BALANCE-19",),
    thread="transformers load_balancing_loss_func",
)
class SoftmaxInTheLogitsDtype(Steps):
    """Scores are rounded to the dtype of the logits."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        scores = super().scores(logits, ids, config)
        return scores.to(self.narrow).to(scores.dtype)

    def wide(self, logits: Tensor) -> Tensor:
        self.narrow = logits.dtype
        return super().wide(logits)


@fault("shares-in-the-logits-dtype", catches=("BALANCE-19",))
class SharesInTheLogitsDtype(Steps):
    """Shares are rounded to the dtype of the logits."""

    def wide(self, logits: Tensor) -> Tensor:
        self.narrow = logits.dtype
        return super().wide(logits)

    def share(self, counts: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        share = super().share(counts, ids, real)
        return share.to(self.narrow).to(share.dtype)


@fault("loss-in-the-logits-dtype", catches=("BALANCE-19", "BALANCE-20"))
class LossInTheLogitsDtype(Steps):
    """The loss is rounded to the dtype of the logits."""

    def wide(self, logits: Tensor) -> Tensor:
        self.narrow = logits.dtype
        return super().wide(logits)

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return super().coefficient(loss, config).to(self.narrow)


@fault("float64-logits-in-float32", catches=("BALANCE-20",))
class Float64LogitsInFloat32(Steps):
    """The loss of float64 logits is a float32."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return super().coefficient(loss, config).float()


@fault("later-tokens-weigh-more", catches=("BALANCE-21",))
class LaterTokensWeighMore(Steps):
    """A running mean over tokens forgets the first ones."""

    def mean(self, probabilities: Tensor, real: Tensor, length: int) -> Tensor:
        weight = torch.linspace(0.5, 1.5, max(len(real), 1))[: len(real), None]
        return super().mean(probabilities * weight.to(probabilities), real, length)


@fault("neighbours-are-counted", catches=("BALANCE-21",))
class NeighboursAreCounted(Steps):
    """The first token is counted with the probabilities of the second one."""

    def mean(self, probabilities: Tensor, real: Tensor, length: int) -> Tensor:
        shifted = torch.cat([probabilities[1:2], probabilities[1:]])[: len(probabilities)]
        return super().mean(shifted if len(real) > 1 else probabilities, real, length)


@fault("exponentials-overflow", catches=("BALANCE-22",))
class ExponentialsOverflow(Steps):
    """The largest logit is not subtracted before the exponentials."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        if config.score == "softmax":
            return logits.exp() / logits.exp().sum(-1, keepdim=True)
        return super().scores(logits, ids, config)


@fault("root-of-an-underflow", catches=("BALANCE-22",))
class RootOfAnUnderflow(Steps):
    """The root of a softplus of 0 has an infinite gradient."""

    def scores(self, logits: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        if config.score == "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        return super().scores(logits, ids, config)


@fault("sum-of-scores-is-zero", catches=("BALANCE-22",))
class SumOfScoresIsZero(Steps):
    """Epsilon is forgotten, and all scores of a token underflow."""

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        if config.score == "softmax":
            return scores
        return scores / scores.sum(-1, keepdim=True)


class Scaled(torch.autograd.Function):
    """The same number with another gradient."""

    @staticmethod
    def forward(context, loss: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        context.factor = factor
        return loss.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        factor = context.factor
        return torch.ones_like(gradient) if factor == 0 else gradient * factor, None


def scaled(loss: Tensor, factor: float) -> Tensor:
    """`loss` with a gradient `factor` times as large; 0: one that ignores what comes from above."""
    found = Scaled.apply(loss, factor)
    assert isinstance(found, Tensor)
    return found


@fault("gradient-times-tokens", catches=("BALANCE-23",), thread="Automodel #1408")
class GradientTimesTokens(Steps):
    """The gradient is that of the sum over tokens."""

    def over(self, product: Tensor, real: Tensor, length: int) -> Tensor:
        return scaled(super().over(product, real, length), float(max(len(real), 1)))


@fault("gradient-ignores-the-scale", catches=("BALANCE-23",), thread="DeepSeek-MoE #17")
class GradientIgnoresTheScale(Steps):
    """The gradient of the loss is 1, whatever it was multiplied with."""

    def coefficient(self, loss: Tensor, config: BalanceConfig) -> Tensor:
        return scaled(super().coefficient(loss, config), 0)


@fault("counts-with-a-gradient", catches=("BALANCE-23",))
class CountsWithAGradient(Steps):
    """The shares pass the gradient of the probabilities on, as if they were those."""

    def product(self, share: Tensor, mean: Tensor, config: BalanceConfig) -> Tensor:
        return super().product(share + mean - mean.detach(), mean, config)


@fault(
    "gradient-of-the-chosen-only",
    catches=("BALANCE-23",),
)
class GradientOfTheChosenOnly(Steps):
    """The probabilities of experts that a token did not choose are detached."""

    def normalised(self, scores: Tensor, ids: Tensor, config: BalanceConfig) -> Tensor:
        found = super().normalised(scores, ids, config)
        chosen = (ids[:, :, None] == torch.arange(scores.shape[1])).any(1)
        return torch.where(chosen, found, found.detach())


@fault("detached-loss", catches=("BALANCE-23", "BALANCE-24"))
class DetachedLoss(Steps):
    """The probabilities are detached like the counts."""

    def mean(self, probabilities: Tensor, real: Tensor, length: int) -> Tensor:
        return super().mean(probabilities.detach(), real, length) + 0 * probabilities.sum()


@fault("no-gradient-of-padding", catches=("BALANCE-25",))
class NoGradientOfPadding(Steps):
    """A batch of nothing but padding gives a constant without a gradient."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        loss = super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)
        if padding_mask is not None and not bool(padding_mask.any()):
            return torch.zeros_like(loss)
        return loss


@fault("padding-cleared-in-place", catches=("BALANCE-26",))
class PaddingClearedInPlace(Reference):
    """Rows of padding are set to 0 in the logits themselves."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        if padding_mask is not None and padding_mask.dtype is torch.bool:
            logits.data[~padding_mask] = 0
        return super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)


@fault("padded-ids-become-minus-one-in-place", catches=("BALANCE-26",))
class PaddedIdsBecomeMinusOneInPlace(Reference):
    """Ids of padding are set to -1 in the ids themselves."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        if padding_mask is not None and padding_mask.dtype is torch.bool:
            expert_ids[~padding_mask] = -1
        return super().balance_loss(logits, expert_ids, config, padding_mask, tokens_per_expert)


class Lenient(Reference):
    """Makes arguments fit that do not; a subclass says how."""

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        config = self.configuration(config, logits)
        mask = self.mask(padding_mask, logits)
        rows = self.rows(logits, expert_ids)
        counts = self.counts(tokens_per_expert, logits, config)
        return super().balance_loss(logits[:rows], expert_ids[:rows], config, mask, counts)

    def configuration(self, config: BalanceConfig, logits: Tensor) -> BalanceConfig:
        """A configuration that can be met."""
        return config

    def mask(self, mask: Tensor | None, logits: Tensor) -> Tensor | None:
        """A mask that fits."""
        return mask

    def rows(self, logits: Tensor, ids: Tensor) -> int:
        """How many rows are looked at."""
        return max(len(logits), len(ids))

    def counts(self, counts: Tensor | None, logits: Tensor, config: BalanceConfig) -> Tensor | None:
        """Counts that fit."""
        return counts


@fault("a-mask-of-any-length", catches=("BALANCE-27",), thread="transformers #29363")
class AMaskOfAnyLength(Lenient):
    """A mask that is too long is cut."""

    def mask(self, mask: Tensor | None, logits: Tensor) -> Tensor | None:
        return None if mask is None else mask[: len(logits)]


@fault("a-mask-of-any-dtype", catches=("BALANCE-27",))
class AMaskOfAnyDtype(Lenient):
    """A mask of numbers is compared with 0."""

    def mask(self, mask: Tensor | None, logits: Tensor) -> Tensor | None:
        return None if mask is None else mask != 0


@fault("what-is-too-long-is-cut", catches=("BALANCE-27",))
class WhatIsTooLongIsCut(Lenient):
    """Tokens without ids and ids without a token are left out."""

    def rows(self, logits: Tensor, ids: Tensor) -> int:
        return min(len(logits), len(ids))


@fault("no-length-is-one-sequence", catches=("BALANCE-27",))
class NoLengthIsOneSequence(Lenient):
    """A loss per sequence without a length takes the batch for one, and so does a wrong length."""

    def configuration(self, config: BalanceConfig, logits: Tensor) -> BalanceConfig:
        length = config.sequence_length
        if config.loss in PER_SEQUENCE and (length is None or len(logits) % length):
            return dataclasses.replace(config, sequence_length=len(logits))
        return config


@fault("counts-that-nobody-wants", catches=("BALANCE-27",))
class CountsThatNobodyWants(Lenient):
    """Losses per sequence drop the counts of the global batch without a word."""

    def counts(self, counts: Tensor | None, logits: Tensor, config: BalanceConfig) -> Tensor | None:
        return None if config.loss in PER_SEQUENCE else counts


class ZSteps(Reference):
    """`z_loss` step by step: right, until a subclass slips."""

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        super().z_loss(logits, padding_mask)
        real = torch.ones(len(logits), dtype=torch.bool) if padding_mask is None else padding_mask
        return self.mean(self.squares(self.log(self.wide(self.kept(logits, real)))), real)

    def kept(self, logits: Tensor, real: Tensor) -> Tensor:
        """The rows that are tokens."""
        return logits[real]

    def wide(self, logits: Tensor) -> Tensor:
        """The logits in what everything is computed in."""
        return logits if logits.dtype is torch.float64 else logits.float()

    def log(self, logits: Tensor) -> Tensor:
        """[T] the logarithm of the sum of exponentials."""
        return logits.logsumexp(-1)

    def squares(self, log: Tensor) -> Tensor:
        """[T]"""
        return log.square()

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        """Over tokens."""
        return squares.sum() / max(len(squares), 1)


@fault("z-loss-adds-tokens", catches=("BALANCE-28", "BALANCE-29"))
class ZLossAddsTokens(ZSteps):
    """The squares are added, not averaged."""

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return squares.sum()


@fault("z-loss-squares-the-mean", catches=("BALANCE-28", "BALANCE-29"))
class ZLossSquaresTheMean(ZSteps):
    """The mean is taken before the square."""

    def squares(self, log: Tensor) -> Tensor:
        return log

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return super().mean(squares, real).square()


@fault("z-loss-of-squared-logits", catches=("BALANCE-28",))
class ZLossOfSquaredLogits(ZSteps):
    """The logits are squared, not their logsumexp."""

    def log(self, logits: Tensor) -> Tensor:
        return logits.square().mean(-1).clamp(min=1e-30).sqrt()


@fault("z-loss-is-detached", catches=("BALANCE-29",))
class ZLossIsDetached(ZSteps):
    """The z-loss is a number for the log and has a gradient of 0."""

    def wide(self, logits: Tensor) -> Tensor:
        return super().wide(logits.detach() + 0 * logits)


@fault("z-loss-counts-padding", catches=("BALANCE-30",), thread="Megatron #1984")
class ZLossCountsPadding(ZSteps):
    """Padding takes part in the mean."""

    def kept(self, logits: Tensor, real: Tensor) -> Tensor:
        return logits


@fault("z-loss-over-all-rows", catches=("BALANCE-30",))
class ZLossOverAllRows(ZSteps):
    """The sum over tokens is divided by the number of rows."""

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return squares.sum() / max(len(real), 1)


@fault("z-loss-clears-after-the-square", catches=("BALANCE-30",))
class ZLossClearsAfterTheSquare(ZSteps):
    """Padding is cleared at the end: the z-loss is right, the gradient of padding is not."""

    def kept(self, logits: Tensor, real: Tensor) -> Tensor:
        return logits

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return squares.where(real, 0.0).sum() / real.sum().clamp(min=1)


@fault("z-loss-of-nothing-is-nan", catches=("BALANCE-31",))
class ZLossOfNothingIsNan(ZSteps):
    """The mean is taken also where there is no token."""

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return squares.mean()


@fault("z-loss-of-padding-only", catches=("BALANCE-31",))
class ZLossOfPaddingOnly(ZSteps):
    """A mask without a real token is taken for no mask."""

    def kept(self, logits: Tensor, real: Tensor) -> Tensor:
        return logits if not bool(real.any()) else super().kept(logits, real)


@fault("z-loss-overflows", catches=("BALANCE-32",))
class ZLossOverflows(ZSteps):
    """The logarithm of a sum of exponentials as it is written."""

    def log(self, logits: Tensor) -> Tensor:
        return logits.exp().sum(-1).log()


@fault("z-loss-clamps-logits", catches=("BALANCE-32",))
class ZLossClampsLogits(ZSteps):
    """Logits are clamped to ±80 so that nothing overflows."""

    def log(self, logits: Tensor) -> Tensor:
        return logits.clamp(-80, 80).logsumexp(-1)


@fault("z-loss-in-the-logits-dtype", catches=("BALANCE-33", "BALANCE-34"))
class ZLossInTheLogitsDtype(ZSteps):
    """The z-loss is computed in the dtype of the logits."""

    def wide(self, logits: Tensor) -> Tensor:
        return logits


@fault("z-loss-log-rounded", catches=("BALANCE-33",))
class ZLossLogRounded(ZSteps):
    """The logsumexp is kept in bfloat16 until it is squared."""

    def squares(self, log: Tensor) -> Tensor:
        return log.square() if log.dtype is torch.float64 else log.bfloat16().float().square()


@fault("z-loss-counts-tokens-in-the-logits-dtype", catches=("BALANCE-33",), thread="Megatron #1617")
class ZLossCountsTokensInTheLogitsDtype(ZSteps):
    """The number of real tokens is rounded to the dtype of the logits: 257 are 256 in bfloat16."""

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        loss = super().z_loss(logits, padding_mask)
        if padding_mask is None:
            return loss
        count = padding_mask.sum().clamp(min=1)
        return loss * (count / count.to(logits.dtype).to(loss.dtype))


@fault("z-loss-for-each-token", catches=("BALANCE-34",))
class ZLossForEachToken(ZSteps):
    """The z-loss comes with one dimension."""

    def mean(self, squares: Tensor, real: Tensor) -> Tensor:
        return super().mean(squares, real)[None]


@fault("z-loss-takes-any-mask", catches=("BALANCE-35",))
class ZLossTakesAnyMask(Reference):
    """A mask of numbers is compared with 0."""

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().z_loss(logits, None if padding_mask is None else padding_mask != 0)


@fault("z-loss-flattens", catches=("BALANCE-35",))
class ZLossFlattens(Reference):
    """Logits of any number of dimensions are flattened."""

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().z_loss(logits.flatten(0, -2) if logits.ndim > 2 else logits, padding_mask)


class Update(Reference):
    """`update_bias` step by step: right, until a subclass slips."""

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        super().update_bias(bias, tokens_per_expert, rate, centred)
        wide = bias.double() if bias.dtype is torch.float64 else bias.float()
        step = self.step(tokens_per_expert, rate)
        return self.moved(wide, self.centre(step, wide) if centred else step, bias)

    def mean(self, counts: Tensor) -> Tensor:
        """What counts are compared with."""
        return counts.mean()

    def counts(self, counts: Tensor) -> Tensor:
        """Counts as numbers that can be compared."""
        return counts.double()

    def step(self, counts: Tensor, rate: float) -> Tensor:
        """[E]"""
        counts = self.counts(counts)
        return rate * torch.sign(self.mean(counts) - counts)

    def centre(self, step: Tensor, bias: Tensor) -> Tensor:
        """[E] the step without its mean."""
        return step - step.mean()

    def moved(self, wide: Tensor, step: Tensor, bias: Tensor) -> Tensor:
        """[E] the new bias."""
        return wide + step.to(wide)


@fault("bias-moves-with-the-load", catches=("BALANCE-36", "BALANCE-40"))
class BiasMovesWithTheLoad(Update):
    """Experts with more tokens are made more likely."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        return -super().step(counts, rate)


@fault("step-in-proportion", catches=("BALANCE-36",))
class StepInProportion(Update):
    """The step is as large as the load is wrong."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        counts = self.counts(counts)
        return rate * (counts.mean() - counts) / counts.mean().clamp(min=1)


@fault("always-centred", catches=("BALANCE-36",))
class AlwaysCentred(Update):
    """The mean of the step is taken away also where it was not asked for."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        return self.centre(super().step(counts, rate), counts)


@fault("counts-cut-to-integers", catches=("BALANCE-36",))
class CountsCutToIntegers(Update):
    """The mean is an integer division."""

    def mean(self, counts: Tensor) -> Tensor:
        return counts.sum() // len(counts)


@fault("a-step-at-the-mean", catches=("BALANCE-37",))
class AStepAtTheMean(Update):
    """An expert that is not below the mean is taken to be above it."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        counts = self.counts(counts)
        return rate * (2.0 * (counts < counts.mean()) - 1)


@fault("mean-by-a-reciprocal", catches=("BALANCE-37",))
class MeanByAReciprocal(Update):
    """Shares in float32 are compared with 1 / E, which is rounded differently."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        counts = counts.float()
        share = counts * (1 / counts.sum().clamp(min=1))
        return rate * torch.sign(torch.tensor(1 / len(counts)) - share).double()


@fault("counts-in-float32", catches=("BALANCE-38",))
class CountsInFloat32(Update):
    """Counts become float32 before they are compared."""

    def counts(self, counts: Tensor) -> Tensor:
        return counts.float()


@fault("mean-in-float32", catches=("BALANCE-38",))
class MeanInFloat32(Update):
    """Counts are exact, their mean is a float32."""

    def mean(self, counts: Tensor) -> Tensor:
        return counts.mean().float().double()


@fault("mean-of-experts-in-use", catches=("BALANCE-39",))
class MeanOfExpertsInUse(Update):
    """Experts without tokens are left out of the mean."""

    def mean(self, counts: Tensor) -> Tensor:
        return counts.sum() / (counts > 0).sum().clamp(min=1)


@fault("idle-experts-stay", catches=("BALANCE-39",))
class IdleExpertsStay(Update):
    """Only experts that had tokens are moved."""

    def step(self, counts: Tensor, rate: float) -> Tensor:
        return super().step(counts, rate) * (counts > 0)


@fault("median-for-the-mean", catches=("BALANCE-39", "BALANCE-36"))
class MedianForTheMean(Update):
    """Counts are compared with their median."""

    def mean(self, counts: Tensor) -> Tensor:
        return counts.median()


@fault("never-centred", catches=("BALANCE-40",), thread="torchtitan #1506")
class NeverCentred(Update):
    """`centred` is taken and not used."""

    def centre(self, step: Tensor, bias: Tensor) -> Tensor:
        return step


@fault("the-bias-is-centred", catches=("BALANCE-40",))
class TheBiasIsCentred(Update):
    """The mean of the new bias is taken away, and with it what the bias was."""

    def centre(self, step: Tensor, bias: Tensor) -> Tensor:
        return step - (bias + step).mean()


@fault("centred-before-the-sign", catches=("BALANCE-40",))
class CentredBeforeTheSign(Update):
    """The mean is taken away from the counts, where it is already, and not from the step."""

    def centre(self, step: Tensor, bias: Tensor) -> Tensor:
        return step.abs().max() * torch.sign(step - step.mean())


@fault("bias-in-its-own-dtype", catches=("BALANCE-41",))
class BiasInItsOwnDtype(Update):
    """The new bias has the dtype of the old one."""

    def moved(self, wide: Tensor, step: Tensor, bias: Tensor) -> Tensor:
        return super().moved(wide, step, bias).to(bias.dtype)


@fault("bias-through-bfloat16", catches=("BALANCE-41",))
class BiasThroughBfloat16(Update):
    """The new bias is stored in bfloat16 and read back."""

    def moved(self, wide: Tensor, step: Tensor, bias: Tensor) -> Tensor:
        return super().moved(wide, step, bias).bfloat16().to(wide.dtype)


@fault("float64-bias-in-float32", catches=("BALANCE-41",))
class Float64BiasInFloat32(Update):
    """The new bias is float32, whatever the old one was."""

    def moved(self, wide: Tensor, step: Tensor, bias: Tensor) -> Tensor:
        return super().moved(wide, step, bias).float()


@fault("bias-moved-in-place", catches=("BALANCE-42",))
class BiasMovedInPlace(Update):
    """The step is added to the argument, and the argument is given back."""

    def moved(self, wide: Tensor, step: Tensor, bias: Tensor) -> Tensor:
        return bias.add_(step.to(bias)) if wide.dtype is bias.dtype else wide + step


@fault("counts-are-reset", catches=("BALANCE-42",))
class CountsAreReset(Update):
    """The counts are set to 0 after they were used."""

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        found = super().update_bias(bias, tokens_per_expert, rate, centred)
        tokens_per_expert.zero_()
        return found


@fault("one-count-for-all", catches=("BALANCE-43",))
class OneCountForAll(Reference):
    """Counts broadcast to the bias."""

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        if tokens_per_expert.shape == (1,):
            tokens_per_expert = tokens_per_expert.expand(len(bias))
        return super().update_bias(bias, tokens_per_expert, rate, centred)


@fault("a-bias-of-integers", catches=("BALANCE-43",))
class ABiasOfIntegers(Reference):
    """A bias of integers is taken for one of floats."""

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        bias = bias if bias.is_floating_point() else bias.float()
        return super().update_bias(bias, tokens_per_expert, rate, centred)
