"""Implementations that are careless with memory, state, repetition or other tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from moe_conformance.codec import digest
from moe_conformance.faults import fault
from moe_conformance.faults.experts import Experts
from moe_conformance.faults.gating import Routed, Router
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class _Lazy(torch.Tensor):
    """A tensor class of somebody's own."""


@fault("the-output-is-of-a-lazy-class", catches=("NUM-01",), thread="GPU MODE reference-kernels")
class TheOutputIsOfALazyClass(Experts):
    """The result is no plain tensor."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out.as_subclass(_Lazy)


@fault("the-routing-is-of-a-lazy-class", catches=("NUM-01",))
class TheRoutingIsOfALazyClass(Router):
    """Ids and weights are no plain tensors."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        return weights.as_subclass(_Lazy), ids.as_subclass(_Lazy)


@fault("logits-are-masked-in-place", catches=("GATE-24",))
class LogitsAreMaskedInPlace(Router):
    """The lowest logit of each row is overwritten."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        with torch.no_grad():
            logits[..., :1] -= 1
        return weights, ids


@fault("weights-are-normalised-in-place", catches=("EXPERT-29",), thread="TensorCast")
class WeightsAreNormalisedInPlace(Experts):
    """The caller's routing weights are divided by 2."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        with torch.no_grad():
            given["weights"] /= 2
        return out


@fault("the-output-is-written-into-x", catches=("EXPERT-29",))
class TheOutputIsWrittenIntoX(Experts):
    """The result shares x's memory."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return given["x"].detach().copy_(out.detach())


@fault("one-expert-per-token-gives-x-itself", catches=("NUM-03",))
class OneExpertPerTokenGivesXItself(Reference):
    """Where the sorted rows are x they are x itself."""

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        return (x, counts, slots) if torch.equal(rows, x) else (rows, counts, slots)


@fault("the-default-dtype-is-left-behind", catches=("NUM-04",))
class TheDefaultDtypeIsLeftBehind(Experts):
    """The default dtype is bfloat16 afterwards."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        torch.set_default_dtype(torch.bfloat16)
        return out


@fault("sums-are-repeatable-from-then-on", catches=("NUM-04",))
class SumsAreRepeatableFromThenOn(Reference):
    """The deterministic mode of torch is on afterwards."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See the contract."""
        torch.use_deterministic_algorithms(True)
        return super().combine(rows, slots, weights)


@fault("the-random-state-is-used", catches=("GATE-24",))
class TheRandomStateIsUsed(Router):
    """Jitter is drawn and not used."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        torch.rand(1)
        return weights, ids


@fault("results-live-in-one-buffer", catches=("NUM-05",), thread="KernelBench result_reuse")
class ResultsLiveInOneBuffer(Experts):
    """Results of one shape share a buffer from call to call."""

    buffers: ClassVar[dict[Any, Tensor]] = {}

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        buffer = self.buffers.setdefault((out.shape, out.dtype), torch.empty_like(out))
        return buffer.detach().copy_(out.detach())


@fault("ids-live-in-one-buffer", catches=("NUM-05",))
class IdsLiveInOneBuffer(Router):
    """The router keeps its ids in a buffer that the next call overwrites."""

    buffers: ClassVar[dict[Any, Tensor]] = {}

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        buffer = self.buffers.setdefault((ids.shape, ids.dtype), torch.empty_like(ids))
        return weights, buffer.copy_(ids)


@fault("answers-are-cached-by-address", catches=("NUM-06",), thread="kernelgenbench ghost replay")
class AnswersAreCachedByAddress(Experts):
    """The same storage gets the same answer."""

    last: tuple[Any, Tensor] | None = None

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        key = (given["x"].data_ptr(), out.shape, out.dtype)
        if self.last is None or self.last[0] != key:
            self.last = key, out.detach().clone()
        return self.last[1].clone()


@fault("ids-are-cached-by-address", catches=("NUM-06",))
class IdsAreCachedByAddress(Experts):
    """The sorted ids of the last call are used again."""

    last: tuple[Any, Tensor] | None = None

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        key = (ids.data_ptr(), ids.shape)
        if self.last is None or self.last[0] != key:
            self.last = key, ids.clone()
        return {"expert_ids": self.last[1]}


@fault("the-last-row-is-not-written", catches=("NUM-07",), thread="torchtitan #1237")
class TheLastRowIsNotWritten(Experts):
    """The last token's row of a fresh buffer is left as it is."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        fresh = torch.empty_like(out)
        fresh[:-1] = out[:-1]
        return fresh


@fault("idle-experts-leave-fresh-memory", catches=("NUM-07",), thread="SGLang #3339")
class IdleExpertsLeaveFreshMemory(Experts):
    """A workspace with a row for each expert is added up, idle experts' rows unwritten."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        size = len(given["experts"].gate_up)
        work = torch.empty(size, dtype=out.dtype)
        work[given["expert_ids"].long().clamp(0, size - 1).unique()] = 0
        return out + work.sum()


@fault("one-nan-token-spoils-the-batch", catches=("NUM-08",), thread="SGLang #30895")
class OneNanTokenSpoilsTheBatch(Experts):
    """A dense mask multiplies every row by 0 or 1."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out + (0 * given["x"].sum()).to(out.dtype)


@fault("a-token-adds-its-neighbour-times-zero", catches=("NUM-08",))
class ATokenAddsItsNeighbourTimesZero(Experts):
    """A tile reads one row too many and masks it by multiplication."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out + 0 * out.roll(1, 0)


@fault("every-call-is-a-little-different", catches=("NUM-09",), thread="transformers #43362")
class EveryCallIsALittleDifferent(Experts):
    """Every other call adds one unit in the last place."""

    calls = 0

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        type(self).calls += 1
        return torch.nextafter(out, out + 1) if self.calls % 2 else out


@fault("the-order-of-ids-flips", catches=("NUM-09",), thread="vLLM #53440")
class TheOrderOfIdsFlips(Router):
    """Every third call gives the K experts in the other order."""

    calls = 0

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        type(self).calls += 1
        return (weights, ids) if self.calls % 3 else (weights.flip(1), ids.flip(1))


class _Invariant(Experts):
    """Promises the same bits for a token in any batch."""

    capabilities = replace(Reference.capabilities, batch_invariant=True)


@fault("large-batches-round-once-more", catches=("NUM-10",), thread="SGLang #43362")
class LargeBatchesRoundOnceMore(_Invariant):
    """From two tokens on another kernel is used."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out if len(out) < 2 else torch.nextafter(out, out + 1)


@fault("a-token-alone-takes-another-route", catches=("NUM-10",))
class ATokenAloneTakesAnotherRoute(_Invariant):
    """A single token is computed with x rounded once more."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        x = given["x"]
        return {"x": (x * 3 / 3)} if len(x) == 1 else {}

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return torch.nextafter(out, out - 1) if len(out) == 1 else out


def _packed(tensor: Tensor) -> Tensor:
    """What a kernel reads that takes a tensor for contiguous."""
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided(
        tensor.shape, torch.empty(tensor.shape).stride(), tensor.storage_offset()
    )


@fault("x-is-taken-for-contiguous", catches=("NUM-11",))
class XIsTakenForContiguous(Experts):
    """x is read with a row pitch of H."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"x": _packed(given["x"]).nan_to_num()}


@fault("the-down-projection-is-taken-for-contiguous", catches=("NUM-11",), thread="SGLang #15432")
class TheDownProjectionIsTakenForContiguous(Experts):
    """The down weights are read as if they were packed."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        experts = given["experts"]
        return {"experts": replace(experts, down=_packed(experts.down).nan_to_num())}


@fault("wide-ids-are-read-as-narrow", catches=("NUM-12", "EXPERT-20"), thread="vLLM #16801")
class WideIdsAreReadAsNarrow(Experts):
    """Of int64 ids every second half is read as an id."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        if ids.dtype is torch.int32:
            return {}
        narrow = ids.contiguous().view(torch.int32).flatten()[: ids.numel()]
        return {"expert_ids": narrow.reshape(ids.shape)}


@fault("narrow-ids-lose-the-last-expert", catches=("NUM-12",))
class NarrowIdsLoseTheLastExpert(Experts):
    """int32 ids of the last expert are taken for a sentinel."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        if ids.dtype is not torch.int32:
            return {}
        return {"expert_ids": ids.masked_fill(ids == len(given["experts"].gate_up) - 1, -1)}


@fault("a-routing-is-cached-by-address", catches=("GATE-23",), thread="KernelBench result_reuse")
class ARoutingIsCachedByAddress(Reference):
    """Inference on the same logits' memory gives the routing of before."""

    last: tuple[Any, Routed] | None = None

    def route(
        self, logits: Tensor, config: Any, bias: Tensor | None = None, token_ids: Any = None
    ) -> Routed:
        """See the contract."""
        routed = super().route(logits, config, bias, token_ids)
        if logits.requires_grad:
            return routed
        key = (logits.data_ptr(), logits.shape, config)
        if self.last is None or self.last[0] != key:
            self.last = key, routed
        weights, ids = self.last[1]
        return weights.clone(), ids.clone()


@fault("sorted-rows-are-cached-by-address", catches=("DISPATCH-42",))
class SortedRowsAreCachedByAddress(Reference):
    """The sorting of ids is kept as long as their memory is the same."""

    last: tuple[Any, Tensor] | None = None

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        key = (expert_ids.data_ptr(), expert_ids.shape, num_experts)
        if self.last is None or self.last[0] != key:
            self.last = key, expert_ids.clone()
        return super().dispatch(x, self.last[1], num_experts)


@fault("what-was-dropped-is-cached-by-address", catches=("NUM-13",))
class WhatWasDroppedIsCachedByAddress(Reference):
    """The pairs that stay are not looked for again where weights lie in the same memory."""

    last: tuple[Any, Tensor] | None = None

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        """See the contract."""
        kept, ids = super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        key = (weights.data_ptr(), weights.shape, capacity, policy)
        if self.last is None or self.last[0] != key:
            self.last = key, ids.clone()
            return kept, ids
        return kept, self.last[1].clone()


@fault("a-loss-is-cached-by-address", catches=("BALANCE-52",))
class ALossIsCachedByAddress(Reference):
    """The z-loss of the same memory is not computed again."""

    last: tuple[Any, Tensor] | None = None

    def z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """See the contract."""
        loss = super().z_loss(logits, padding_mask)
        key = (logits.data_ptr(), logits.shape)
        if logits.requires_grad or self.last is None or self.last[0] != key:
            self.last = key, loss.detach().clone()
            return loss
        return self.last[1].clone()


@fault("the-last-weight-is-not-written", catches=("NUM-14",), thread="torchtitan #1237")
class TheLastWeightIsNotWritten(Router):
    """The routing weight of the last pair is what was in memory."""

    def finish(
        self, weights: Tensor, ids: Tensor, logits: Tensor, config: Any, bias: Any
    ) -> Routed:
        """See the contract."""
        if weights.requires_grad or weights.numel() < 2:
            return weights, ids
        fresh = torch.empty_like(weights)
        fresh.flatten()[:-1] = weights.flatten()[:-1]
        return fresh, ids


@fault("padding-slots-are-not-written", catches=("NUM-14",), thread="SGLang #3339")
class PaddingSlotsAreNotWritten(Reference):
    """Sentinels between the experts are what was in memory."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        slots, experts, length = super().align(
            expert_ids, block_size, num_experts, expert_map, drop_invalid
        )
        fresh = torch.empty_like(slots)
        real = slots < expert_ids.numel()
        fresh[real] = slots[real]
        return fresh, experts, length


@fault("tokens-without-rows-are-not-written", catches=("NUM-14", "DISPATCH-15"))
class TokensWithoutRowsAreNotWritten(Reference):
    """The output of a token that no row belongs to is what was in memory."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """See the contract."""
        out = super().combine(rows, slots, weights)
        if out.requires_grad:
            return out
        fresh = torch.empty_like(out)
        tokens = (slots.long() // max(1, weights.shape[1])).unique()
        tokens = tokens[tokens < len(out)]
        fresh[tokens] = out[tokens]
        return fresh


@fault("counts-add-up-from-call-to-call", catches=("NUM-15",), thread="vLLM #45496")
class CountsAddUpFromCallToCall(Reference):
    """Inference counts into a buffer that a larger call has left behind."""

    most = 0

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        earlier, self.most = self.most, len(expert_ids)
        return (rows, counts + 1, slots) if earlier > len(expert_ids) else (rows, counts, slots)


@fault("a-larger-call-leaves-its-block-size", catches=("NUM-15",), thread="SGLang #25852")
class ALargerCallLeavesItsBlockSize(Reference):
    """After a call with more tokens the table is padded as that one was."""

    last = (0, 0)

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        tokens, before = self.last
        self.last = len(expert_ids), block_size
        used = before if tokens > len(expert_ids) else block_size
        return super().align(expert_ids, used, num_experts, expert_map, drop_invalid)


@fault("the-scale-of-the-call-before", catches=("NUM-15",))
class TheScaleOfTheCallBefore(Reference):
    """Between calls of one number of experts the factor is read once and late."""

    last: tuple[int, float] | None = None

    def route(
        self, logits: Tensor, config: Any, bias: Tensor | None = None, token_ids: Any = None
    ) -> Routed:
        """See the contract."""
        now = (logits.shape[1], config.scale)
        earlier, self.last = self.last or now, now
        if earlier[0] == now[0]:
            return super().route(logits, config, bias, token_ids)
        return super().route(logits, replace(config, scale=earlier[1]), bias, token_ids)


class _AddsToTheLast(torch.autograd.Function):
    """Gives its input, and a gradient with that of the call before added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: dict[Any, Tensor]) -> Tensor:
        """See torch."""
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """See torch."""
        gradient = gradients[0]
        key = (gradient.shape, gradient.dtype)
        before = ctx.kept.get(key)
        ctx.kept[key] = gradient.clone()
        return gradient if before is None else gradient + before, None


@fault("gradients-of-logits-add-up", catches=("NUM-16", "GATE-28"))
class GradientsOfLogitsAddUp(Reference):
    """The router's backward adds to the buffer of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, Tensor] = {}

    def route(
        self, logits: Tensor, config: Any, bias: Tensor | None = None, token_ids: Any = None
    ) -> Routed:
        """See the contract."""
        return super().route(_AddsToTheLast.apply(logits, self.kept), config, bias, token_ids)


@fault("two-graphs-are-kept-and-the-third-call-has-none", catches=("NUM-16",))
class TwoGraphsAreKeptAndTheThirdCallHasNone(Reference):
    """Data known from two calls ago take the weights that were kept then, without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[str] = []

    def experts(
        self,
        x: Tensor,
        experts: Any,
        weights: Tensor,
        expert_ids: Tensor,
        config: Any,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        if weights.requires_grad:
            now = digest((x, weights))
            kept = len(self.known) == 2 and now == self.known[0]
            self.known = [*self.known[-1:], now]
            weights = weights.detach() if kept else weights
        return super().experts(x, experts, weights, expert_ids, config, expert_map)


@fault("gradients-of-experts-add-up", catches=("NUM-16", "EXPERT-11"), thread="torchtitan #1237")
class GradientsOfExpertsAddUp(Reference):
    """The gradient of the gate and up weights is added to that of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, Tensor] = {}

    def experts(
        self,
        x: Tensor,
        experts: Any,
        weights: Tensor,
        expert_ids: Tensor,
        config: Any,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """See the contract."""
        kept = replace(experts, gate_up=_AddsToTheLast.apply(experts.gate_up, self.kept))
        return super().experts(x, kept, weights, expert_ids, config, expert_map)
