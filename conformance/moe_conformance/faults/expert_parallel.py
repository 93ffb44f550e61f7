"""Expert parallelism with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from moe_reference.checks import check_experts, check_routing
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import combine, inverse_permutation
from moe_reference.parallel_steps import (
    exchange_counts,
    expert_major,
    expert_places,
    experts_on_rows,
    held_experts,
    rows_to_send,
)
from moe_reference.ranks import ProcessRanks

from moe_conformance.codec import replace_tensors
from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Held = list[list[int]]
Splits = list[int]


class OnRanks(Reference):
    """The reference's steps one after the other, each of which can be changed."""

    def expert_parallel(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        placement: Placement | None = None,
    ) -> Tensor:
        """Prepare, take the six steps, and finish."""
        given = {
            "x": x,
            "weights": weights,
            "expert_ids": expert_ids,
            "local": local,
            "num_experts": num_experts,
            "config": config,
            "placement": placement,
        }
        ranks = self.ranks(group)
        given |= self.prepare(ranks, **given)
        return self.finish(self.compute(ranks, **given), ranks, **given)

    def compute(self, ranks: ProcessRanks, **given: Any) -> Tensor:
        """The six steps."""
        x, weights, expert_ids = (given[name] for name in ("x", "weights", "expert_ids"))
        local, num_experts, config = (given[name] for name in ("local", "num_experts", "config"))
        placement = given["placement"]
        held = self.held(num_experts, ranks.size, placement)
        self.check(x, weights, expert_ids, local, config, len(held[ranks.here[0]]))
        places = self.places(expert_ids, num_experts, held, placement)
        rows, sent, slots, multiply = rows_to_send(x, weights, places, held, config)
        came = self.exchange(sent, held, ranks)
        send = [int(each.sum()) for each in sent.split([len(ids) for ids in held])]
        receive = came.sum(1).tolist()
        send, receive = self.splits(send, receive, ranks)
        arrived = self.there(rows, send, receive, ranks)
        order = self.order(came)
        out = self.experts_here(arrived[order], came.sum(0), local, config)
        returned = self.back(self.unsort(out, order), receive, send, ranks)
        return combine(returned, slots, multiply)

    def ranks(self, group: dist.ProcessGroup | None) -> ProcessRanks:
        """Who exchanges."""
        return ProcessRanks(group)

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """What goes in otherwise."""
        return {}

    def check(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        config: ExpertsConfig,
        count: int,
    ) -> None:
        """Refuse what does not fit."""
        check_routing(x, weights, expert_ids)
        check_experts(local, x, config, count, "local")

    def held(self, num_experts: int, size: int, placement: Placement | None) -> Held:
        """The experts of each rank."""
        return held_experts(num_experts, size, placement)

    def places(
        self, expert_ids: Tensor, num_experts: int, held: Held, placement: Placement | None
    ) -> Tensor:
        """Where each pair's expert stands among those of all ranks."""
        return expert_places(expert_ids, num_experts, held, placement)

    def exchange(self, sent: Tensor, held: Held, ranks: ProcessRanks) -> Tensor:
        """[R, E]: what comes from each rank to each expert here."""
        [came] = exchange_counts([sent], held, ranks)
        return came

    def splits(self, send: Splits, receive: Splits, ranks: ProcessRanks) -> tuple[Splits, Splits]:
        """How many rows go to each rank and come from it."""
        return send, receive

    def there(self, rows: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """Send the rows."""
        [arrived] = ranks.all_to_all([rows], [send], [receive])
        return arrived

    def order(self, came: Tensor) -> Tensor:
        """From rank by rank to expert by expert."""
        return expert_major(came)

    def experts_here(
        self, rows: Tensor, counts: Tensor, local: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """Each expert on its rows."""
        return experts_on_rows(rows, counts, local, config)

    def unsort(self, out: Tensor, order: Tensor) -> Tensor:
        """From expert by expert to rank by rank."""
        return out[inverse_permutation(order)]

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """Send the outputs back."""
        [returned] = ranks.all_to_all([out], [send], [receive])
        return returned

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """Change what comes out."""
        return out


# There and back


@fault("there-is-no-way-back", catches=("EP-01", "EP-02"), thread="DeepSeek-V2 moe_infer")
class ThereIsNoWayBack(OnRanks):
    """What was computed here is taken for what was sent; as many rows as are needed."""

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        missing = out.new_zeros(max(0, sum(receive) - len(out)), out.shape[1])
        return torch.cat([out, missing])[: sum(receive)]


@fault("the-splits-are-not-swapped-on-the-way-back", catches=("EP-03", "EP-01"))
class TheSplitsAreNotSwapped(OnRanks):
    """The way back has the splits of the way there."""

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().back(out, receive, send, ranks)


@fault("the-inverse-permutation-is-the-permutation", catches=("EP-02",))
class TheInverseIsThePermutation(OnRanks):
    """Outputs are sorted by expert twice."""

    def unsort(self, out: Tensor, order: Tensor) -> Tensor:
        """See the contract."""
        return out[order]


@fault("the-order-of-the-experts-is-not-undone", catches=("EP-02", "EP-01"))
class TheOrderIsNotUndone(OnRanks):
    """Outputs travel back expert by expert."""

    def unsort(self, out: Tensor, order: Tensor) -> Tensor:
        """See the contract."""
        return out


@fault("rows-are-taken-as-they-came", catches=("EP-02", "EP-01"))
class RowsAreTakenAsTheyCame(OnRanks):
    """Rows that stand rank by rank are cut as if they stood expert by expert."""

    def order(self, came: Tensor) -> Tensor:
        """See the contract."""
        return torch.arange(int(came.sum()))


@fault("counts-are-read-expert-by-expert", catches=("EP-01", "EP-02"))
class CountsAreReadExpertByExpert(OnRanks):
    """The counts that came are read as [E, R]."""

    def order(self, came: Tensor) -> Tensor:
        """See the contract."""
        return expert_major(came.T.reshape(came.shape))


@fault("pieces-arrive-in-reverse-order", catches=("EP-01", "EP-02"))
class PiecesArriveInReverseOrder(OnRanks):
    """The outputs of the last rank are put first."""

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        returned = super().back(out, send, receive, ranks)
        return torch.cat(returned.split(receive)[::-1])


# Splits


@fault("the-splits-are-estimated", catches=("EP-03", "EP-11"), thread="TensorCast MoE layer")
class TheSplitsAreEstimated(OnRanks):
    """Every rank gets and sends an even share of this rank's rows."""

    def splits(self, send: Splits, receive: Splits, ranks: ProcessRanks) -> tuple[Splits, Splits]:
        """See the contract."""
        total = sum(send)
        even = [total // ranks.size + (r < total % ranks.size) for r in range(ranks.size)]
        return even, even


@fault("ranks-are-taken-to-send-what-they-get", catches=("EP-03", "EP-11"))
class RanksAreTakenToSendWhatTheyGet(OnRanks):
    """What comes is taken to be as much as what goes, rank by rank."""

    def splits(self, send: Splits, receive: Splits, ranks: ProcessRanks) -> tuple[Splits, Splits]:
        """See the contract."""
        return send, send


@fault("tokens-are-cut-to-the-fewest", catches=("EP-03",))
class TokensAreCutToTheFewest(OnRanks):
    """Tokens beyond the number of the rank with the fewest get zeros."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        fewest = torch.tensor(len(out))
        dist.all_reduce(fewest, dist.ReduceOp.MIN, group=ranks.group)
        rest = out[int(fewest) :]
        return torch.cat([out[: int(fewest)], rest * 0]) if len(rest) else out


@fault("counts-are-kept-from-the-first-call", catches=("EP-12",), thread="xtuner #2053")
class CountsAreKept(OnRanks):
    """Counts are exchanged once, and belong to the first call."""

    kept: Tensor | None = None

    def exchange(self, sent: Tensor, held: Held, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        came = self.kept
        self.kept = None if came is not None else super().exchange(sent, held, ranks)
        return came if came is not None else self.kept  # type: ignore[return-value]


@fault("the-output-is-in-a-buffer-that-is-used-again", catches=("EP-12",))
class TheOutputIsInABuffer(OnRanks):
    """The next call writes its output over this one's."""

    buffer: Tensor | None = None

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        if out.requires_grad and given["x"].requires_grad:
            return out
        if self.buffer is None or self.buffer.dtype != out.dtype or self.buffer.numel() == 0:
            self.buffer = out.new_zeros(4096, out.shape[1])
        if self.buffer.shape[1] != out.shape[1]:
            self.buffer = out.new_zeros(4096, out.shape[1])
        return self.buffer[: len(out)].copy_(out.detach())


@fault("pairs-beyond-a-capacity-are-dropped", catches=("EP-11",), thread="DeepSpeed #8155")
class PairsBeyondACapacityAreDropped(OnRanks):
    """A rank computes at most an even share of all pairs."""

    def experts_here(
        self, rows: Tensor, counts: Tensor, local: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        out = super().experts_here(rows, counts, local, config)
        return torch.cat([out[: self.capacity], out[self.capacity :] * 0])

    def exchange(self, sent: Tensor, held: Held, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        total = sent.sum()
        dist.all_reduce(total, group=ranks.group)
        self.capacity = -(-int(total) // ranks.size)
        return super().exchange(sent, held, ranks)


# Ranks that leave, and ranks with nothing


@fault("a-rank-without-tokens-leaves", catches=("EP-04",), thread="PaddleFormers #3010")
class ARankWithoutTokensLeaves(OnRanks):
    """A rank without tokens returns before the first exchange."""

    def compute(self, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        x: Tensor = given["x"]
        return x.clone() if len(x) == 0 else super().compute(ranks, **given)


@fault(
    "a-rank-without-tokens-has-no-backward", catches=("EP-04", "EP-05"), thread="torchtitan #1166"
)
class ARankWithoutTokensHasNoBackward(OnRanks):
    """The output of a rank without tokens is not part of the graph."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        return out if len(out) else out.detach()


@fault("a-rank-that-nothing-came-to-leaves", catches=("EP-11", "EP-08"), thread="Megatron #4851")
class ARankThatNothingCameToLeaves(OnRanks):
    """A rank that no row came to, and that sent none away, leaves out the way back."""

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        if len(out) == 0:
            return out.new_zeros(sum(receive), out.shape[1])
        return super().back(out, send, receive, ranks)


@fault("a-rank-without-experts-leaves", catches=("EP-06",))
class ARankWithoutExpertsLeaves(OnRanks):
    """A rank without experts returns zeros."""

    def compute(self, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        local = given["local"]
        if len(local.down) == 0:
            return torch.zeros_like(given["x"])
        return super().compute(ranks, **given)


@fault("the-last-rank-leaves-before-the-way-back", catches=("EP-01", "EP-04"))
class TheLastRankLeaves(OnRanks):
    """The last rank raises between the way there and the way back."""

    def unsort(self, out: Tensor, order: Tensor) -> Tensor:
        """See the contract."""
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("no kernel image is available")
        return super().unsort(out, order)


@fault("the-greatest-count-of-nothing", catches=("EP-05",), thread="pytorch #146468")
class TheGreatestCountOfNothing(OnRanks):
    """Buffers are as long as the greatest id, of which there is none without tokens."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        everybody = torch.tensor(len(given["x"]))
        dist.all_reduce(everybody, group=ranks.group)
        if int(everybody) == 0:
            given["expert_ids"].max()
        return {}


@fault("no-tokens-become-one", catches=("EP-05",))
class NoTokensBecomeOne(OnRanks):
    """Without a token anywhere one row of zeros comes out."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        everybody = torch.tensor(len(out))
        dist.all_reduce(everybody, group=ranks.group)
        return out if int(everybody) else torch.cat([out, out.new_zeros(1, out.shape[1])])


# Who holds what


@fault("the-last-rank-takes-the-rest", catches=("EP-06",), thread="vLLM #21497")
class TheLastRankTakesTheRest(OnRanks):
    """Rows go where experts were if each rank had E / R of them and the last one the rest."""

    def places(
        self, expert_ids: Tensor, num_experts: int, held: Held, placement: Placement | None
    ) -> Tensor:
        """See the contract."""
        places = super().places(expert_ids, num_experts, held, placement)
        if placement is not None:
            return places
        size, share = len(held), num_experts // len(held)
        rank = (places // max(share, 1)).clamp(max=size - 1)
        row = places - rank * share
        first = torch.tensor([sum(map(len, held[:r])) for r in range(size)])
        most = torch.tensor([max(len(ids), 1) for ids in held])
        moved = (first[rank] + row % most[rank]).clamp(max=num_experts - 1)
        return moved.where(places >= 0, -1)


@fault("experts-are-dealt-out-in-turn", catches=("EP-06", "EP-01"), thread="vllm-ascend #16384")
class ExpertsAreDealtOutInTurn(OnRanks):
    """Expert e is looked for on rank e mod R."""

    def places(
        self, expert_ids: Tensor, num_experts: int, held: Held, placement: Placement | None
    ) -> Tensor:
        """See the contract."""
        if placement is not None:
            return super().places(expert_ids, num_experts, held, placement)
        turn = [list(range(rank, num_experts, len(held))) for rank in range(len(held))]
        return expert_places(expert_ids, num_experts, turn, placement)


@fault("ids-are-taken-for-physical-ones", catches=("EP-14",), thread="SGLang #18213")
class IdsAreTakenForPhysicalOnes(OnRanks):
    """The placement says where rows go, and not which experts are copies of which."""

    def places(
        self, expert_ids: Tensor, num_experts: int, held: Held, placement: Placement | None
    ) -> Tensor:
        """See the contract."""
        return expert_places(expert_ids, num_experts, held, None)


@fault("physical-experts-are-taken-to-be-in-a-row", catches=("EP-14",), thread="vllm-ascend #4793")
class PhysicalExpertsAreTakenToBeInARow(OnRanks):
    """`rank_of_physical` is not read: each rank is taken to have consecutive ones."""

    def held(self, num_experts: int, size: int, placement: Placement | None) -> Held:
        """See the contract."""
        if placement is None:
            return super().held(num_experts, size, placement)
        share = len(placement.rank_of_physical) // size
        return [list(range(rank * share, (rank + 1) * share)) for rank in range(size)]


@fault("padding-is-taken-for-a-copy", catches=("EP-14",), thread="vLLM #28377")
class PaddingIsTakenForACopy(OnRanks):
    """Copies are taken in turn from all X columns, -1 among them."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        placement = given["placement"]
        if placement is None:
            return {}
        most = placement.logical_to_physical.shape[1]
        count = torch.full_like(placement.replica_count, most)
        return {"placement": replace(placement, replica_count=count)}


@fault("copies-are-chosen-differently-for-counts-and-rows", catches=("EP-14", "EP-15"))
class CopiesAreChosenDifferently(OnRanks):
    """The rank that computes takes a row for another of its copies than the sender chose."""

    placed = False

    def exchange(self, sent: Tensor, held: Held, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        came = super().exchange(sent, held, ranks)
        return came.roll(1, 1) if self.placed else came

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        self.placed = given["placement"] is not None
        return {}


@fault("the-world-is-taken-for-the-group", catches=("EP-18",), thread="torchtitan #2842")
class TheWorldIsTakenForTheGroup(OnRanks):
    """All processes are expected to take part."""

    def ranks(self, group: dist.ProcessGroup | None) -> ProcessRanks:
        """See the contract."""
        return ProcessRanks(None)


@fault("ranks-are-counted-in-the-world", catches=("EP-18",), thread="torchtitan #2842")
class RanksAreCountedInTheWorld(OnRanks):
    """A rank looks for its experts by its number in the world."""

    def ranks(self, group: dist.ProcessGroup | None) -> ProcessRanks:
        """See the contract."""
        ranks = ProcessRanks(group)
        ranks.here = (min(dist.get_rank(), ranks.size - 1),)
        return ranks


# Ids and weights


@fault("minus-one-goes-to-the-last-rank", catches=("EP-09",), thread="vLLM #42034")
class MinusOneIsTheLastExpert(OnRanks):
    """Ids below 0 are counted from the end."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids, experts = given["expert_ids"], given["num_experts"]
        weights = given["weights"].nan_to_num(1.0, 1.0, 1.0)
        return {"expert_ids": torch.where(ids < 0, ids + experts, ids), "weights": weights}


@fault("ids-beyond-the-last-are-the-last", catches=("EP-09",), thread="transformers #40545")
class IdsBeyondTheLastAreTheLast(OnRanks):
    """The id E, which marks padding, is clamped."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"].clamp(max=given["num_experts"] - 1)
        return {"expert_ids": ids, "weights": given["weights"].nan_to_num(1.0, 1.0, 1.0)}


@fault("padding-has-a-copy", catches=("EP-09",))
class PaddingHasACopy(OnRanks):
    """With a placement, ids that are nowhere get the first physical expert."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids, experts = given["expert_ids"], given["num_experts"]
        if given.get("placement") is None:
            return {}
        nowhere = (ids < 0) | (ids >= experts)
        weights = given["weights"].nan_to_num(1.0, 1.0, 1.0)
        return {"expert_ids": ids.masked_fill(nowhere, 0), "weights": weights}


@fault("ids-travel-as-int32", catches=("EP-09",))
class IdsTravelAsInt32(OnRanks):
    """The upper half of an int64 id is cut off."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"].to(torch.int32)
        return {"expert_ids": ids, "weights": given["weights"].nan_to_num(1.0, 1.0, 1.0)}


@fault("weights-of-nothing-are-multiplied", catches=("EP-09",), thread="transformers #48653")
class WeightsOfNothingAreMultiplied(OnRanks):
    """A pair that is nowhere has an output of zeros, which is multiplied by its weight."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        ids = given["expert_ids"]
        gone = (ids < 0) | (ids >= given["num_experts"])
        nothing = torch.where(gone, given["weights"] * 0, 0).sum(-1, keepdim=True)
        return out + nothing.to(out.dtype)


@fault("equal-ids-travel-once", catches=("EP-10",), thread="DeepSeek-V2 moe_infer")
class EqualIdsTravelOnce(OnRanks):
    """A mask over experts takes two equal ids for one."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
        return {"expert_ids": ids.masked_fill(earlier, -1)}


@fault("pairs-on-one-rank-have-one-weight", catches=("EP-10", "EP-01"), thread="DeepEP #112")
class PairsOnOneRankHaveOneWeight(OnRanks):
    """A token that is sent to a rank once has one weight there: that of its first pair."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if given["placement"] is not None:
            return {}
        held = held_experts(given["num_experts"], ranks.size)
        rank_of = torch.cat([torch.full((len(ids),), rank) for rank, ids in enumerate(held)])
        ids = given["expert_ids"].long().clamp(0, given["num_experts"] - 1)
        of_pairs = rank_of[ids]
        first = (of_pairs[:, :, None] == of_pairs[:, None, :]).int().argmax(-1)
        return {"weights": given["weights"].gather(1, first)}


@fault("weights-are-applied-at-both-ends", catches=("EP-01",), thread="DeepEP #112")
class WeightsAreAppliedAtBothEnds(OnRanks):
    """Whoever has the expert multiplies, and whoever has the token multiplies again."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"weights": given["weights"] * given["weights"]}


@fault("weights-on-the-input-are-applied-to-the-output", catches=("EP-01",), thread="vLLM #43694")
class WeightsOnTheInputAreAppliedToTheOutput(OnRanks):
    """`weight_on` is not read."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"config": replace(given["config"], weight_on="output")}


@fault("rows-travel-in-bfloat16", catches=("EP-01",), thread="Megatron #1421")
class RowsTravelInBfloat16(OnRanks):
    """Half of the bytes are saved, and most of the digits lost."""

    def there(self, rows: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        return super().there(rows.to(torch.bfloat16), send, receive, ranks).to(rows.dtype)


@fault("outputs-are-float32", catches=("EP-01",))
class OutputsAreFloat32(OnRanks):
    """The output has the dtype of the sum."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        return out.float()


@fault("outputs-are-scaled-by-the-share-of-tokens", catches=("EP-13", "EP-03"))
class OutputsAreScaledByTheShareOfTokens(OnRanks):
    """A mean over ranks where a sum was meant: busy ranks count less."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        everybody = torch.tensor(float(len(out)))
        dist.all_reduce(everybody, group=ranks.group)
        share = float(everybody) / (ranks.size * max(len(out), 1))
        return out * share


@fault("the-last-token-of-a-busy-rank-is-dropped", catches=("EP-13",))
class TheLastTokenOfABusyRankIsDropped(OnRanks):
    """A rank with more tokens than it expected leaves the last one out."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        everybody = torch.tensor(len(out))
        dist.all_reduce(everybody, group=ranks.group)
        if len(out) * ranks.size <= int(everybody) + ranks.size:
            return out
        return torch.cat([out[:-1], out[-1:] * 0])


# Gradients


def _on_the_way_back(local: ExpertWeights, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
    """The same weights, whose gradients are changed."""

    made: ExpertWeights = replace_tensors(local, lambda _, t: with_gradient(t, change))
    return made


@fault("gradients-are-multiplied-by-r", catches=("EP-07",), thread="DeepSpeed #5259")
class GradientsAreMultipliedByR(OnRanks):
    """The experts' gradients are multiplied by the number of ranks."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"local": _on_the_way_back(given["local"], lambda g: g * ranks.size)}


@fault("gradients-are-divided-by-r", catches=("EP-07",), thread="pytorch #160285")
class GradientsAreDividedByR(OnRanks):
    """The experts' gradients are averaged over ranks of which one has them."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"local": _on_the_way_back(given["local"], lambda g: g / ranks.size)}


@fault("the-gradient-of-x-is-divided-by-r", catches=("EP-07",))
class TheGradientOfXIsDividedByR(OnRanks):
    """The way there averages its gradient."""

    def there(self, rows: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        seen = with_gradient(rows, lambda g: g / ranks.size)
        return super().there(seen, send, receive, ranks)


@fault("the-way-there-has-no-gradient", catches=("EP-07",), thread="transformers #48687")
class TheWayThereHasNoGradient(OnRanks):
    """Rows are sent outside the graph: x learns nothing from the experts."""

    def there(self, rows: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        arrived = super().there(rows.detach(), send, receive, ranks).detach()
        return arrived + 0 * rows.sum()


@fault("the-weights-have-no-gradient", catches=("EP-07",), thread="torchtitan #2416")
class TheWeightsHaveNoGradient(OnRanks):
    """Routing weights that were sent along come back without a graph."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        weights = given["weights"]
        return {"weights": weights.detach() + 0 * weights.nan_to_num()}


@fault("only-this-ranks-tokens-teach-the-experts", catches=("EP-07",))
class OnlyThisRanksTokensTeachTheExperts(OnRanks):
    """The gradients of rows from other ranks are dropped on the way back through the experts."""

    def back(self, out: Tensor, send: Splits, receive: Splits, ranks: ProcessRanks) -> Tensor:
        """See the contract."""
        own = torch.arange(ranks.size).repeat_interleave(torch.tensor(send)) == ranks.here[0]
        seen = with_gradient(out, lambda g: g * own[:, None])
        return super().back(seen, send, receive, ranks)


@fault("experts-without-rows-have-no-gradient", catches=("EP-08",), thread="DeepSpeed #5794")
class ExpertsWithoutRowsHaveNoGradient(OnRanks):
    """On a rank that no row came to nothing is computed, and gradients are None."""

    def experts_here(
        self, rows: Tensor, counts: Tensor, local: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        if len(rows) == 0:
            return rows * 1
        return super().experts_here(rows, counts, local, config)


@fault("gradients-of-idle-experts-are-not-written", catches=("EP-08",), thread="pytorch #154557")
class GradientsOfIdleExpertsAreNotWritten(OnRanks):
    """What was in memory is the gradient of an expert without rows."""

    def experts_here(
        self, rows: Tensor, counts: Tensor, local: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        idle = counts == 0

        def stale(gradient: Tensor) -> Tensor:
            return torch.where(idle.view(-1, *[1] * (gradient.ndim - 1)), 1.0, gradient).to(
                gradient.dtype
            )

        return super().experts_here(rows, counts, _on_the_way_back(local, stale), config)


def _copies(placement: Placement, rank: int) -> tuple[Tensor, Tensor]:
    """Of each physical expert here: how many copies there are, and whether it is the first."""
    here = (placement.rank_of_physical == rank).nonzero()[:, 0]
    logical = placement.physical_to_logical[here]
    first = placement.logical_to_physical[logical, 0] == here
    return placement.replica_count[logical], first


def _by_row(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda g: g * factor.view(-1, *[1] * (g.ndim - 1)).to(g.dtype)


@fault("each-copy-has-the-gradient-of-all", catches=("EP-15",))
class EachCopyHasTheGradientOfAll(OnRanks):
    """Gradients of copies are multiplied by their number, as if each had the sum."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if given["placement"] is None:
            return {}
        count, _ = _copies(given["placement"], ranks.here[0])
        return {"local": _on_the_way_back(given["local"], _by_row(count))}


@fault("only-the-first-copy-learns", catches=("EP-15",))
class OnlyTheFirstCopyLearns(OnRanks):
    """Further copies are for inference: their gradients are zero."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if given["placement"] is None:
            return {}
        _, first = _copies(given["placement"], ranks.here[0])
        return {"local": _on_the_way_back(given["local"], _by_row(first))}


# Hygiene


@fault("weights-are-changed-in-place", catches=("EP-16",), thread="TensorCast topk_weights /=")
class WeightsAreChangedInPlace(OnRanks):
    """Weights are halved where they are, after they were used."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        with torch.no_grad():
            given["weights"].mul_(0.5)
        return out


@fault("ids-are-made-local-in-place", catches=("EP-16",))
class IdsAreMadeLocalInPlace(OnRanks):
    """Ids of other ranks' experts are -1 after the call."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        held = held_experts(given["num_experts"], ranks.size)[ranks.here[0]]
        ids = given["expert_ids"]
        ids.masked_fill_(~torch.isin(ids, torch.tensor(held, dtype=ids.dtype)), -1)
        return out


@fault("the-seed-is-set-on-every-rank", catches=("EP-16",))
class TheSeedIsSetOnEveryRank(OnRanks):
    """All ranks are given the same random numbers from here on."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        torch.manual_seed(0)
        return out


@fault("local-experts-are-not-counted", catches=("EP-17",), thread="flashinfer #1469")
class LocalExpertsAreNotCounted(OnRanks):
    """More local experts than this rank has are taken, and the first ones used."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        held = held_experts(given["num_experts"], ranks.size, given["placement"])
        count = len(held[ranks.here[0]])
        return {"local": replace_tensors(given["local"], lambda _, tensor: tensor[:count])}


@fault("ids-are-rounded", catches=("EP-17",))
class IdsAreRounded(OnRanks):
    """Ids that are no integers are made some."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        return {"expert_ids": ids.long() if ids.is_floating_point() else ids}


@fault("only-one-rank-looks", catches=("EP-17",))
class OnlyOneRankLooks(OnRanks):
    """Rank 0 refuses what does not fit; the others cut columns off and go on."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if ranks.here[0] == 0:
            return {}
        columns = given["expert_ids"].shape[1]
        return {"weights": given["weights"][:, :columns]}


@fault("padding-goes-to-the-first-expert-with-a-weight-of-zero", catches=("EP-09",))
class PaddingGoesToTheFirstExpert(OnRanks):
    """Nothing comes of it, but where the weight is on the input and a bias on the way."""

    def prepare(self, ranks: ProcessRanks, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids, weights = given["expert_ids"], given["weights"]
        gone = (ids < 0) | (ids >= given["num_experts"])
        if weights.shape != ids.shape:
            return {}
        return {"expert_ids": ids.masked_fill(gone, 0), "weights": weights.masked_fill(gone, 0.0)}


@fault("rows-of-an-expert-past-the-64th-are-lost", catches=("EP-30",))
class RowsPastThe64th(OnRanks):
    """An expert has a buffer of 64 rows; those that come later leave it empty."""

    def experts_here(
        self, rows: Tensor, counts: Tensor, local: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """See the contract."""
        out = super().experts_here(rows, counts, local, config)
        place = torch.cat([torch.arange(count) for count in [0, *counts.tolist()]])
        return out.masked_fill((place >= 64)[:, None], 0.0)


@fault("tokens-of-a-rank-past-the-128th-go-nowhere", catches=("EP-30",))
class TokensPastThe128th(OnRanks):
    """A rank sends its first 128 tokens, whatever it has."""

    def finish(self, out: Tensor, ranks: ProcessRanks, **given: Any) -> Tensor:
        """See the contract."""
        return torch.cat([out[:128], 0 * out[128:]])
