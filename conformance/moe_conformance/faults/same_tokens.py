"""Ranks that have the same tokens, with one thing wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from moe_reference import partial_sums
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import accumulation_dtype
from moe_reference.expert_parallel import over_ranks
from moe_reference.experts import experts
from moe_reference.parallel_steps import expert_places, held_experts
from moe_reference.ranks import ProcessRanks, all_gather, all_reduce
from moe_reference.token_slices import enter_slices, leave_slices

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare_calls import as_if_contiguous
from moe_conformance.target import SAME_TOKENS
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Group = dist.ProcessGroup | None


class _Total(torch.autograd.Function):
    """A sum over the ranks, of which this rank's term has the gradient that comes in here."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor) -> Tensor:
        """The sum."""
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The same for the term."""
        return gradients[0], None


def own_gradient(own: Tensor, total: Tensor) -> Tensor:
    """The sum of all ranks, of which only this rank's term has a gradient: this rank's own."""
    made: Tensor = _Total.apply(own, total.detach())
    return made


class Entered(Reference):
    """What all ranks have goes into each one's part as it is."""

    def entered(self, ranks: ProcessRanks, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What a rank's part is made of."""
        return tensors


class OnSlices(Entered):
    """The reference's steps one after the other, each of which can be changed."""

    def sliced_expert_parallel(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: Group,
        placement: Placement | None = None,
    ) -> Tensor:
        """Cut, compute, put together."""
        ranks = ProcessRanks(group)
        whole_x, whole_weights = self.entered(ranks, x, weights)
        [rows], [cut] = enter_slices([whole_x], ranks), enter_slices([whole_weights], ranks)
        ids = self.ids(expert_ids, ranks)
        [y] = over_ranks([rows], [cut], [ids], [local], num_experts, config, ranks, placement)
        return self.leave(self.computed(y, local), len(x), ranks)

    def ids(self, expert_ids: Tensor, ranks: ProcessRanks) -> Tensor:
        """The slice's ids."""
        [ids] = enter_slices([expert_ids], ranks, value=-1)
        return ids

    def computed(self, y: Tensor, local: ExpertWeights) -> Tensor:
        """Change what was computed."""
        return y

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """Gather and trim."""
        [gathered] = leave_slices([y], [tokens], ranks)
        return gathered


@fault("padding-is-trimmed-from-the-front", catches=("EP-19",), thread="TensorCast MoE layer")
class PaddingIsTrimmedFromTheFront(OnSlices):
    """The last T rows are kept, and padding was appended."""

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        [gathered] = all_gather([y], ranks)
        return gathered[len(gathered) - tokens :].clone()


@fault("what-is-left-over-between-slices-is-nobodys", catches=("EP-19",))
class WhatIsLeftOverIsNobodys(OnSlices):
    """Each rank computes T / R tokens, rounded down; the rest is zero."""

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        whole = super().leave(y, tokens, ranks)
        kept = tokens // ranks.size * ranks.size
        return torch.cat([whole[:kept], whole[kept:] * 0])


@fault(
    "the-gradient-of-gathered-slices-is-not-summed", catches=("EP-20",), thread="Automodel #1260"
)
class TheGradientOfGatheredSlicesIsNotSummed(OnSlices):
    """What other ranks' losses ask of this rank's slice never comes back to it."""

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        [gathered] = all_gather([y], ranks)
        pieces = [*gathered.detach().split(len(y))] if len(y) else [y]
        if len(y):
            pieces[ranks.here[0]] = y
        return torch.cat(pieces)[:tokens]


@fault("the-gradient-of-gathered-slices-is-averaged", catches=("EP-20",), thread="DeepSpeed #5259")
class TheGradientOfGatheredSlicesIsAveraged(OnSlices):
    """Every rank has the output, so somebody divides by R."""

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().leave(with_gradient(y, lambda g: g / ranks.size), tokens, ranks)


@fault("padding-is-routed", catches=("EP-25",), thread="TensorCast MoE layer")
class PaddingIsRouted(OnSlices):
    """Ids are padded with zeros like everything else, and zero is an expert."""

    def ids(self, expert_ids: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        [ids] = enter_slices([expert_ids], ranks, value=0)
        return ids


@fault("experts-without-tokens-are-multiplied-by-zero", catches=("EP-25",))
class ExpertsWithoutTokensAreMultipliedByZero(OnSlices):
    """All local experts are made part of the graph by adding nothing of them."""

    def computed(self, y: Tensor, local: ExpertWeights) -> Tensor:
        """See the contract."""
        return y + (local.down * 0).sum().to(y.dtype)


class Added(Entered):
    """Parts of all ranks, and their sum."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """The sum."""
        [total] = all_reduce([part], ranks)
        return total


class OnReplicas(Added):
    """`replicated_experts`, of which the parts and their sum can be changed."""

    def replicated_experts(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: Group,
        placement: Placement | None = None,
    ) -> Tensor:
        """A part, and the sum of all parts."""
        ranks = ProcessRanks(group)
        [rank] = ranks.here
        held = held_experts(num_experts, ranks.size, placement)
        places = expert_places(expert_ids, num_experts, held, self.placed(placement, rank))
        rows = self.rows(places, sum(map(len, held[:rank])), len(held[rank]))
        whole_x, whole_weights = self.entered(ranks, x, weights)
        factors = self.factors(whole_weights, rows)
        part = experts(whole_x.to(accumulation_dtype(x)), local, factors, rows, config)
        return self.added(part, ranks).to(x.dtype)

    def placed(self, placement: Placement | None, rank: int) -> Placement | None:
        """Where this rank looks for copies."""
        return placement

    def rows(self, places: Tensor, start: int, count: int) -> Tensor:
        """[T, K]: rows of the local experts, -1 of other ranks'."""
        here = (places >= start) & (places < start + count)
        return (places - start).where(here, -1)

    def factors(self, weights: Tensor, rows: Tensor) -> Tensor:
        """What this rank's pairs are weighed with."""
        return weights


@fault("replicas-are-chosen-differently-per-rank", catches=("EP-21",), thread="SGLang #32962")
class ReplicasAreChosenDifferentlyPerRank(OnReplicas):
    """Every rank begins with a copy of its own, although all see the same pairs."""

    def placed(self, placement: Placement | None, rank: int) -> Placement | None:
        """See the contract."""
        if placement is None:
            return None
        rolled = placement.logical_to_physical.clone()
        for copies, count in zip(rolled, placement.replica_count.tolist(), strict=True):
            copies[:count] = copies[:count].roll(rank)
        return dataclasses.replace(placement, logical_to_physical=rolled)


@fault("ids-of-other-ranks-are-taken-for-the-last-local-expert", catches=("EP-21",))
class IdsOfOtherRanksAreTakenForTheLastLocalExpert(OnReplicas):
    """Ids below this rank's experts become negative, and count from the end."""

    def rows(self, places: Tensor, start: int, count: int) -> Tensor:
        """See the contract."""
        rows = super().rows(places, start, count)
        before = (places >= 0) & (places == start - 1)
        return rows.where(~before, count - 1) if count else rows


@fault("the-last-expert-of-a-rank-is-the-next-ranks", catches=("EP-21",))
class TheLastExpertOfARankIsTheNextRanks(OnReplicas):
    """The end of a rank's experts is taken as exclusive, and was inclusive already."""

    def rows(self, places: Tensor, start: int, count: int) -> Tensor:
        """See the contract."""
        rows = super().rows(places, start, count)
        return rows.where(rows != count - 1, -1) if count > 1 else rows


@fault("the-weights-of-this-ranks-pairs-are-made-to-sum-to-one", catches=("EP-21",))
class TheWeightsOfThisRanksPairsAreMadeToSumToOne(OnReplicas):
    """Weights are renormalised after those of other ranks' experts were left out."""

    def factors(self, weights: Tensor, rows: Tensor) -> Tensor:
        """See the contract."""
        here = rows >= 0
        left = weights * here
        total = weights.sum(1, keepdim=True) / left.sum(1, keepdim=True)
        return (left * total).where(here.any(1, keepdim=True) & total.isfinite(), weights)


@fault("parts-of-other-ranks-are-never-added", catches=("EP-21",))
class PartsOfOtherRanksAreNeverAdded(OnReplicas):
    """Each rank gives back what its own experts computed."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return part


@fault("the-gradient-of-the-sum-is-one-ranks", catches=("EP-22",))
class TheGradientOfTheSumIsOneRanks(OnReplicas):
    """The reduction has no backward: each part learns from its own rank's loss."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return own_gradient(part, super().added(part, ranks))


@fault("the-gradient-of-the-sum-is-averaged", catches=("EP-22",), thread="DeepSpeed #5259")
class TheGradientOfTheSumIsAveraged(OnReplicas):
    """The backward of the reduction divides by R."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().added(with_gradient(part, lambda g: g / ranks.size), ranks)


class OnSharedSlices(Added):
    """`shared_tensor_parallel`, of which the parts and their sum can be changed."""

    def shared_tensor_parallel(
        self,
        x: Tensor,
        part: ExpertWeights,
        config: ExpertsConfig,
        group: Group,
        shared_gate: Tensor | None = None,
        shared_scale: float = 1.0,
    ) -> Tensor:
        """A part, and the sum of all parts."""
        ranks = ProcessRanks(group)
        part, gate = self.part(part, ranks), self.gate(shared_gate, ranks)
        whole_x, *gates = self.entered(ranks, *(x,) if gate is None else (x, gate))
        gate = gates[0] if gates else None
        y = partial_sums.partial_shared(whole_x, part, config, gate, shared_scale)
        return self.added(y, ranks).to(x.dtype)

    def gate(self, shared_gate: Tensor | None, ranks: ProcessRanks) -> Tensor | None:
        """What each token's factor is made of."""
        return shared_gate

    def part(self, part: ExpertWeights, ranks: ProcessRanks) -> ExpertWeights:
        """This rank's slice."""
        return part


@fault("the-shared-expert-is-reduced-twice", catches=("EP-23",), thread="vLLM #49122")
class TheSharedExpertIsReducedTwice(OnSharedSlices):
    """Reduced by itself, and once more with the routed experts."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().added(super().added(part, ranks), ranks)


@fault("the-shared-expert-is-never-reduced", catches=("EP-23",), thread="SGLang #32963")
class TheSharedExpertIsNeverReduced(OnSharedSlices):
    """A slice's output is taken for the whole."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return part


@fault("every-rank-adds-the-shared-output-bias", catches=("EP-23",))
class EveryRankAddsTheSharedOutputBias(OnSharedSlices):
    """The output bias, which is on one rank, is given to all of them."""

    def part(self, part: ExpertWeights, ranks: ProcessRanks) -> ExpertWeights:
        """See the contract."""
        if part.down_bias is None:
            return part
        [everybodys] = all_reduce([part.down_bias], ranks)
        return dataclasses.replace(part, down_bias=everybodys)


@fault("slices-of-the-shared-expert-learn-from-one-loss", catches=("EP-24",))
class SlicesOfTheSharedExpertLearnFromOneLoss(OnSharedSlices):
    """The reduction has no backward."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return own_gradient(part, super().added(part, ranks))


@fault("the-gradient-of-the-shared-expert-is-multiplied-by-r", catches=("EP-24",))
class TheGradientOfTheSharedExpertIsMultipliedByR(OnSharedSlices):
    """What is summed over the ranks already is multiplied by their number."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().added(with_gradient(part, lambda g: g * ranks.size), ranks)


@fault("slices-of-the-shared-expert-are-not-gated", catches=("EP-23",))
class SlicesOfTheSharedExpertAreNotGated(OnSharedSlices):
    """The gate is left to whoever adds the shared expert's output to the routed experts'."""

    def gate(self, shared_gate: Tensor | None, ranks: ProcessRanks) -> Tensor | None:
        """See the contract."""
        return None


@fault("the-gate-of-the-shared-expert-is-that-of-the-first-token", catches=("EP-23",))
class TheGateIsThatOfTheFirstToken(OnSharedSlices):
    """One factor for all tokens."""

    def shared_tensor_parallel(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        gate = named.pop("shared_gate", None)
        y = super().shared_tensor_parallel(x, *given, **named)
        return y if gate is None else (y * torch.sigmoid(x @ gate.T)[:1]).to(y.dtype)


@fault("every-rank-gates-what-it-has-added-up", catches=("EP-23",))
class EveryRankGatesWhatItHasAddedUp(OnSharedSlices):
    """A slice's output is gated, and so is the sum."""

    def shared_tensor_parallel(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        y = super().shared_tensor_parallel(x, *given, **named)
        gate = named.get("shared_gate")
        return y if gate is None else y * torch.sigmoid(x @ gate.T)


@fault("the-gate-of-the-shared-expert-learns-on-one-rank", catches=("EP-24",))
class TheGateOfTheSharedExpertLearnsOnOneRank(OnSharedSlices):
    """Every rank has the gate, so the first one's gradient is taken for all of it."""

    def gate(self, shared_gate: Tensor | None, ranks: ProcessRanks) -> Tensor | None:
        """See the contract."""
        if shared_gate is None:
            return None
        return with_gradient(shared_gate, lambda g: g * (ranks.here[0] == 0))


# What all three have in common.


class OnSameTokens(Reference):
    """All three operations, whose arguments and output can be changed."""

    def sliced_expert_parallel(self, *given: Any, **named: Any) -> Tensor:
        """As `changed`."""
        return self.changed(super().sliced_expert_parallel, *given, **named)

    def replicated_experts(self, *given: Any, **named: Any) -> Tensor:
        """As `changed`."""
        return self.changed(super().replicated_experts, *given, **named)

    def shared_tensor_parallel(self, *given: Any, **named: Any) -> Tensor:
        """As `changed`."""
        return self.changed(super().shared_tensor_parallel, *given, **named)

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """The right output."""
        return right(*given, **named)


@fault("no-tokens-are-refused", catches=("EP-19", "EP-21", "EP-23"), thread="pytorch #146468")
class NoTokensAreRefused(OnSameTokens):
    """A view of the tokens has a dimension that is worked out from their number."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        x = named["x"]
        x.view(-1, *x.shape)
        return right(*given, **named)


@fault("no-tokens-have-no-gradient", catches=("EP-20", "EP-22", "EP-24"))
class NoTokensHaveNoGradient(OnSameTokens):
    """Without tokens a new tensor is given back at once, which leads to no parameter."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        x = named["x"]
        return right(*given, **named) if len(x) else torch.zeros_like(x)


@fault(
    "ranks-that-have-the-same-tokens-are-counted-in-the-world",
    catches=("EP-19", "EP-21", "EP-23"),
    thread="torchtitan #2842",
)
class RanksAreCountedInTheWorld(OnSameTokens):
    """Rows are found by the number of the rank in the world."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        group = named["group"]
        return right(*given, **named).roll(dist.get_rank() - dist.get_rank(group), 0)


@fault(
    "pairs-of-nobody-are-multiplied-by-zero",
    catches=("EP-19", "EP-21"),
    thread="transformers #48653",
)
class PairsOfNobodyAreMultipliedByZero(OnSameTokens):
    """A mask is multiplied with the weights, of which some are not finite."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        y = right(*given, **named)
        if "expert_ids" not in named:
            return y
        ids = named["expert_ids"]
        here = (ids >= 0) & (ids < named["num_experts"])
        masked = named["weights"].detach() * ~here * 0
        return y + masked.sum(1, keepdim=True).to(y.dtype)


@fault("ids-of-nobody-are-the-last-experts", catches=("EP-19", "EP-21"), thread="vLLM #42034")
class IdsOfNobodyAreTheLastExperts(OnSameTokens):
    """As an index -1 is the last expert."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        if "expert_ids" in named:
            ids, last = named["expert_ids"], named["num_experts"] - 1
            named["expert_ids"] = ids.where(ids >= 0, last)
        return right(*given, **named)


@fault(
    "the-tokens-are-written-over-with-the-output",
    catches=("EP-26", "EP-27", "EP-28"),
    thread="vLLM #16801",
)
class TheTokensAreWrittenOverWithTheOutput(OnSameTokens):
    """Where no gradient is asked for, memory is saved."""

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        y, x = right(*given, **named), named["x"]
        if not x.requires_grad:
            x.copy_(y)
        return y


@fault(
    "the-sum-is-in-a-buffer-that-is-used-again",
    catches=("EP-26", "EP-27", "EP-28"),
    thread="KernelBench result_reuse",
)
class TheSumIsInABufferThatIsUsedAgain(OnSameTokens):
    """Where no gradient is asked for, outputs of one shape have one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        y = right(*given, **named)
        if named["x"].requires_grad:
            return y
        # What was added up is part of a graph in any case, for a rank that asks for gradients.
        y = y.detach()
        key = (dist.get_rank(), y.shape, y.dtype)
        return self.kept.setdefault(key, torch.empty_like(y)).copy_(y)


@fault(
    "the-gradient-of-the-output-is-read-as-if-contiguous",
    catches=("EP-07", "EP-20", "EP-22", "EP-24"),
    thread="pytorch #193633",
)
class TheGradientOfTheOutputIsReadAsIfContiguous(OnSameTokens):
    """The elements of the gradient that comes in are read one after the other in memory."""

    def expert_parallel(self, *given: Any, **named: Any) -> Tensor:
        """As `changed`."""
        return self.changed(super().expert_parallel, *given, **named)

    def changed(self, right: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        """See the contract."""
        return with_gradient(right(*given, **named), as_if_contiguous)


@fault("without-gradients-equal-ids-travel-once", catches=("EP-10",))
class WithoutGradientsEqualIdsTravelOnce(Reference):
    """The way of inference has one row for each token and expert."""

    def expert_parallel(
        self, x: Tensor, weights: Tensor, expert_ids: Tensor, *given: Any, **named: Any
    ) -> Tensor:
        """See the contract."""
        ids = expert_ids.clone()
        if not torch.is_grad_enabled():
            for k in range(1, ids.shape[1]):
                seen = (ids[:, :k] == ids[:, k : k + 1]).any(1)
                ids[:, k] = ids[:, k].where(~seen, -1)
        return super().expert_parallel(x, weights, ids, *given, **named)


# All ranks compute the same loss, of the output that all of them have.


class _Entered(torch.autograd.Function):
    """What all ranks have, whose gradients are the sums of what the ranks' parts ask for."""

    @staticmethod
    def forward(ctx: Any, ranks: ProcessRanks, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same."""
        ctx.ranks = ranks
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Their sums over the ranks."""
        return None, *(all_reduce([gradient], ctx.ranks)[0] for gradient in gradients)


class OneLoss(OnSlices, OnReplicas, OnSharedSlices):
    """The right way where all ranks compute the same loss, each part of which can be changed.

    A sum over the ranks has the gradient that comes in, and what all ranks have gets the sum of
    what their parts ask for.
    """

    name = "one-loss"
    capabilities = dataclasses.replace(
        Reference.capabilities,
        operations=SAME_TOKENS,
        replicated_gradients="replicate",
    )

    def entered(self, ranks: ProcessRanks, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Gradients are reduced on the way back."""
        entered: tuple[Tensor, ...] = _Entered.apply(ranks, *tensors)
        return entered

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """The sum, which has this rank's gradient."""
        return own_gradient(part, super().added(part.detach(), ranks))

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """The slices, of which this rank's has a gradient."""
        [all_slices] = all_gather([y.detach()], ranks)
        start = len(y) * ranks.here[0]
        behind = all_slices[start + len(y) :]
        return torch.cat([all_slices[:start], y, behind])[:tokens]


@fault("the-same-loss-is-counted-on-every-rank", catches=("EP-20", "EP-22", "EP-24"))
class TheSameLossIsCountedOnEveryRank(OneLoss):
    """The reductions' own backward adds up a gradient that all ranks have already."""

    def added(self, part: Tensor, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return Added.added(self, part, ranks)

    def leave(self, y: Tensor, tokens: int, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return OnSlices.leave(self, y, tokens, ranks)


@fault("x-has-the-gradient-of-this-ranks-part", catches=("EP-20", "EP-22", "EP-24"))
class XHasTheGradientOfThisRanksPart(OneLoss):
    """What goes into a rank's part is not reduced on the way back."""

    def entered(self, ranks: ProcessRanks, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See the contract."""
        return tensors


@fault("x-has-the-mean-of-the-parts-gradients", catches=("EP-20", "EP-22", "EP-24"))
class XHasTheMeanOfThePartsGradients(OneLoss):
    """What goes into the ranks' parts is averaged on the way back, like a replica's gradient."""

    def entered(self, ranks: ProcessRanks, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See the contract."""
        entered = super().entered(ranks, *tensors)
        return tuple(with_gradient(each, lambda g: g / ranks.size) for each in entered)
