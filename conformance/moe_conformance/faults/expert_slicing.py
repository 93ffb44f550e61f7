"""Slices and placements with one thing wrong."""

from __future__ import annotations

from dataclasses import replace

import torch
from moe_reference.config import ExpertWeights, Placement
from moe_reference.expert_slicing import has_gate
from moe_reference.placement import make_placement

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Share = tuple[int, int]


class Assign(Reference):
    """Shares that can be changed."""

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> Share:
        """Compute as the reference does, and change it."""
        share = super().assign_experts(num_experts, world_size, rank)
        return self.change(share, num_experts, world_size, rank)

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """Change what comes out."""
        return share


@fault("the-rest-goes-to-the-last-rank", catches=("SLICE-02",), thread="vLLM #21497")
class TheRestGoesToTheLastRank(Assign):
    """All that is left over is on the last rank."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        each = E // R
        return rank * each, each if rank < R - 1 else E - each * (R - 1)


@fault("the-rest-goes-to-the-last-ranks", catches=("SLICE-02",), thread="vllm-ascend #1223")
class TheRestGoesToTheLastRanks(Assign):
    """The last E mod R ranks get one expert more."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        each, rest = divmod(E, R)
        late = max(0, rank - (R - rest))
        return rank * each + late, each + (rank >= R - rest)


@fault("the-rest-is-lost", catches=("SLICE-01", "SLICE-02"))
class TheRestIsLost(Assign):
    """Every rank gets E // R."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return rank * (E // R), E // R


@fault("shares-are-rounded-up", catches=("SLICE-02",))
class SharesAreRoundedUp(Assign):
    """The first ranks get ceil(E / R), the last one what is left."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        each = -(-E // R)
        start = min(rank * each, E)
        return start, min(each, E - start)


@fault("the-start-forgets-the-rest", catches=("SLICE-01",), thread="vllm-ascend #16384")
class TheStartForgetsTheRest(Assign):
    """A rank starts at rank · (E // R), whatever the ranks before it got more."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return rank * (E // R), share[1]


@fault("the-start-counts-the-rest-for-every-rank", catches=("SLICE-01",))
class TheStartCountsTheRestForEveryRank(Assign):
    """A rank starts at rank · ceil(E / R), as if all before it had got one more."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return rank * -(-E // R), share[1]


@fault("a-rank-without-experts-gets-the-last", catches=("SLICE-01", "SLICE-02"))
class ARankWithoutExpertsGetsTheLast(Assign):
    """Where there are fewer experts than ranks, nobody gets none."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return share if share[1] else (E - 1, 1)


@fault("a-share-is-start-and-end", catches=("SLICE-01", "SLICE-02"))
class AShareIsStartAndEnd(Assign):
    """The second number is where the share ends."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return share[0], share[0] + share[1]


@fault("at-least-one-expert-each", catches=("SLICE-01", "SLICE-02"))
class AtLeastOneExpertEach(Assign):
    """E // R is taken to be at least 1."""

    def change(self, share: Share, E: int, R: int, rank: int) -> Share:
        """See the contract."""
        return (rank, 1) if E < R else share


@fault("one-rank-more-than-there-is", catches=("SLICE-03",))
class OneRankMoreThanThereIs(Assign):
    """A rank that there is not gets nothing, in silence."""

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> Share:
        """See the contract."""
        if rank == world_size:
            return num_experts, 0
        return super().assign_experts(num_experts, world_size, rank)


@fault("ranks-are-counted-from-behind", catches=("SLICE-03",))
class RanksAreCountedFromBehind(Assign):
    """Rank -1 is the last one, as in a Python list."""

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> Share:
        """See the contract."""
        return super().assign_experts(num_experts, world_size, rank % max(1, world_size))


@fault("no-rank-divides-by-zero", catches=("SLICE-03",), thread="TensorCast")
class NoRankDividesByZero(Assign):
    """A group of no ranks ends in a ZeroDivisionError."""

    def assign_experts(self, num_experts: int, world_size: int, rank: int) -> Share:
        """See the contract."""
        if world_size == 0:
            raise ZeroDivisionError("integer division or modulo by zero")
        return super().assign_experts(num_experts, world_size, rank)


class Slice(Reference):
    """A slice that can be changed."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """Slice as the reference does, and change it."""
        return self.change(super().slice_experts(experts, start, count), experts, start, count)

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """Change what comes out."""
        return part


@fault("the-first-experts-on-every-rank", catches=("SLICE-04",))
class TheFirstExpertsOnEveryRank(Slice):
    """Count experts, but always from the first on."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See the contract."""
        super().slice_experts(experts, start, count)
        return super().slice_experts(experts, 0, count)


@fault("down-is-of-the-first-rank", catches=("SLICE-04",))
class DownIsOfTheFirstRank(Slice):
    """gate_up is sliced, down always from the first expert on."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down=experts.down[:count].clone())


@fault("sliced-experts-are-float32", catches=("SLICE-04",))
class SlicedExpertsAreFloat32(Slice):
    """What is narrower is widened on the way."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, gate_up=part.gate_up.float())


@fault("strides-are-not-looked-at", catches=("SLICE-04",), thread="SGLang #15432")
class StridesAreNotLookedAt(Slice):
    """The memory of a transposed tensor is read as if it were contiguous."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        E, J, H = experts.gate_up.shape
        if experts.gate_up.stride()[1] != 1 or H == 1:
            return part
        flat = experts.gate_up.transpose(1, 2).contiguous().view(E, J, H)
        return replace(part, gate_up=flat[start : start + count].clone())


@fault("biases-are-not-sliced", catches=("SLICE-05",), thread="TensorCast slice_experts")
class BiasesAreNotSliced(Slice):
    """The biases stay whole beside sliced weights."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(
            part, gate_up_bias=_copy(experts.gate_up_bias), down_bias=_copy(experts.down_bias)
        )


@fault("the-output-bias-is-lost", catches=("SLICE-05",))
class TheOutputBiasIsLost(Slice):
    """down_bias is not carried along."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down_bias=None)


@fault("no-bias-becomes-zeros", catches=("SLICE-05",))
class NoBiasBecomesZeros(Slice):
    """Where there is no bias there are zeros, which a kernel then adds."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        if part.down_bias is not None:
            return part
        return replace(part, down_bias=part.down.new_zeros(part.down.shape[:2]))


@fault("the-bias-slice-is-one-on", catches=("SLICE-05",))
class TheBiasSliceIsOneOn(Slice):
    """gate_up_bias begins one expert too late where there is one more."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        bias = experts.gate_up_bias
        if bias is None or start + count >= len(bias):
            return part
        return replace(part, gate_up_bias=bias[start + 1 : start + count + 1].clone())


@fault("no-experts-is-one-expert", catches=("SLICE-06",))
class NoExpertsIsOneExpert(Slice):
    """A count of 0 is taken for 1."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See the contract."""
        return super().slice_experts(experts, start, count or 1)


@fault("no-experts-is-flat", catches=("SLICE-06",), thread="DeepSeek moe_infer new_empty(0)")
class NoExpertsIsFlat(Slice):
    """A slice of no experts is an empty vector."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return part if count else replace(part, down=part.down.new_empty(0))


@fault("no-experts-is-all-experts", catches=("SLICE-06",))
class NoExpertsIsAllExperts(Slice):
    """A count of 0 is taken for no limit."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See the contract."""
        return super().slice_experts(experts, start, count or len(experts.down) - start)


@fault("slices-are-taken-from-data", catches=("SLICE-07",), thread="TensorCast slice_experts")
class SlicesAreTakenFromData(Slice):
    """The slice is cut from `.data`, and training does not reach the parameter."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down=part.down.detach())


@fault("gradients-come-back-twice", catches=("SLICE-07",))
class GradientsComeBackTwice(Slice):
    """gate_up's gradient is twice what it is."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, gate_up=part.gate_up + (part.gate_up - part.gate_up.detach()))


@fault("a-slice-is-cut-off-at-the-end", catches=("SLICE-08",))
class ASliceIsCutOffAtTheEnd(Slice):
    """Past the end there is less, in silence."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See the contract."""
        start = min(start, len(experts.down))
        return super().slice_experts(experts, start, min(count, len(experts.down) - start))


@fault("negative-experts-count-from-behind", catches=("SLICE-08",))
class NegativeExpertsCountFromBehind(Slice):
    """Start -1 is the last expert."""

    def slice_experts(self, experts: ExpertWeights, start: int, count: int) -> ExpertWeights:
        """See the contract."""
        if start < 0:
            start += len(experts.down)
        return super().slice_experts(experts, start, count)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


class Cut(Reference):
    """A tensor-parallel slice that can be changed."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """Slice as the reference does, and change it."""
        part = super().slice_tensor_parallel(experts, world_size, rank)
        return self.change(part, experts, world_size, rank)

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """Change what comes out."""
        return part


@fault("gate-up-is-cut-as-one", catches=("SLICE-10",), thread="hanzo-engine load_fused_stacked")
class GateUpIsCutAsOne(Cut):
    """[gate; up] is cut into R pieces, one after the other."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        width = part.gate_up.shape[1]
        rows = experts.gate_up[:, rank * width : (rank + 1) * width]
        return part if rows.shape != part.gate_up.shape else replace(part, gate_up=rows.clone())


@fault("gate-and-up-are-exchanged-in-the-slice", catches=("SLICE-10",), thread="SGLang #32430")
class GateAndUpAreExchangedInTheSlice(Cut):
    """Up stands before the gate."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        if not has_gate(experts):
            return part
        return replace(part, gate_up=torch.cat(part.gate_up.chunk(2, 1)[::-1], 1))


@fault("up-is-interleaved-with-the-gate", catches=("SLICE-10",), thread="gpt-oss layout")
class UpIsInterleavedWithTheGate(Cut):
    """Gate and up alternate in the slice."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        if not has_gate(experts):
            return part
        gate, up = part.gate_up.chunk(2, 1)
        return replace(part, gate_up=torch.stack([gate, up], 2).flatten(1, 2))


@fault("down-is-cut-backwards", catches=("SLICE-10",))
class DownIsCutBackwards(Cut):
    """The last rank's columns of down are on the first."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        other = super(Cut, self).slice_tensor_parallel(experts, R, R - 1 - rank)
        return part if other.down.shape != part.down.shape else replace(part, down=other.down)


@fault("the-last-rank-takes-the-rows-of-the-first", catches=("SLICE-09",))
class TheLastRankTakesTheRowsOfTheFirst(Cut):
    """Rank R - 1 of three or more computes what rank 0 does."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        last = world_size > 2 and rank == world_size - 1
        part = super().slice_tensor_parallel(experts, world_size, rank)
        return super().slice_tensor_parallel(experts, world_size, 0) if last else part


@fault("weights-are-whole-on-every-rank", catches=("SLICE-09",), thread="hanzo-engine FastExperts")
class WeightsAreWholeOnEveryRank(Cut):
    """Nothing is cut, and the outputs are added up all the same."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        super().slice_tensor_parallel(experts, world_size, rank)
        return super().slice_tensor_parallel(experts, 1, 0)


@fault("the-bias-is-cut-as-one", catches=("SLICE-11",), thread="hanzo-engine load_fused_stacked")
class TheBiasIsCutAsOne(Cut):
    """gate_up is cut by halves, its bias is not."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        bias = experts.gate_up_bias
        if bias is None or part.gate_up_bias is None:
            return part
        width = part.gate_up_bias.shape[1]
        own = bias[:, rank * width : (rank + 1) * width]
        return replace(part, gate_up_bias=own.clone()) if own.shape[1] == width else part


@fault("the-bias-of-gate-up-is-on-rank-0-only", catches=("SLICE-11",))
class TheBiasOfGateUpIsOnRank0Only(Cut):
    """gate_up's bias is treated as down's is."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        if part.gate_up_bias is None or rank == 0:
            return part
        return replace(part, gate_up_bias=part.gate_up_bias * 0)


@fault("the-bias-of-gate-up-is-dropped", catches=("SLICE-11",))
class TheBiasOfGateUpIsDropped(Cut):
    """Slices have no gate_up_bias."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, gate_up_bias=None)


@fault("the-output-bias-is-on-every-rank", catches=("SLICE-12",), thread="vLLM #49378")
class TheOutputBiasIsOnEveryRank(Cut):
    """down_bias is added R times."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down_bias=_copy(experts.down_bias))


@fault("the-output-bias-is-divided", catches=("SLICE-12",))
class TheOutputBiasIsDivided(Cut):
    """Every rank has 1 / R of down_bias, which is right only before rounding."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        bias = experts.down_bias
        return part if bias is None else replace(part, down_bias=bias / R)


@fault("the-output-bias-is-on-the-last-rank", catches=("SLICE-12",))
class TheOutputBiasIsOnTheLastRank(Cut):
    """down_bias is on rank R - 1."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        bias = experts.down_bias
        return part if bias is None else replace(part, down_bias=bias * (rank == R - 1))


@fault("the-last-rows-are-rounded-away", catches=("SLICE-13",), thread="vLLM #48173")
class TheLastRowsAreRoundedAway(Cut):
    """Every rank gets I // R rows."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        kept = experts.down.shape[2] // max(1, world_size) * max(1, world_size)
        halves = experts.gate_up.chunk(2, 1) if has_gate(experts) else (experts.gate_up,)
        fewer = ExpertWeights(
            torch.cat([half[:, :kept] for half in halves], 1), experts.down[:, :, :kept]
        )
        if kept == experts.down.shape[2] or kept == 0:
            return super().slice_tensor_parallel(experts, world_size, rank)
        return super().slice_tensor_parallel(fewer, world_size, rank)


@fault("an-uneven-last-rank-overlaps", catches=("SLICE-13",), thread="ATOM #1944")
class AnUnevenLastRankOverlaps(Cut):
    """The last rank takes as many rows as the first, from behind."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        inner = experts.down.shape[2]
        width = -(-inner // R)
        if rank != R - 1 or inner % R == 0:
            return part
        first = super(Cut, self).slice_tensor_parallel(
            ExpertWeights(
                torch.cat([half.flip(1) for half in experts.gate_up.chunk(2, 1)], 1)
                if has_gate(experts)
                else experts.gate_up.flip(1),
                experts.down.flip(2),
            ),
            R,
            0,
        )
        assert first.down.shape[2] == width
        return replace(first, gate_up_bias=None, down_bias=part.down_bias)


@fault("cuts-are-taken-from-data", catches=("SLICE-14",), thread="TensorCast slice_experts")
class CutsAreTakenFromData(Cut):
    """down is cut from `.data`."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down=part.down.detach())


@fault("gradients-are-divided-by-the-ranks", catches=("SLICE-14",), thread="pytorch #160285")
class GradientsAreDividedByTheRanks(Cut):
    """gate_up's gradient is 1 / R of what it is."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        gate_up = part.gate_up
        return replace(part, gate_up=gate_up.detach() + (gate_up - gate_up.detach()) / R)


@fault("any-rank-is-taken-modulo", catches=("SLICE-15",))
class AnyRankIsTakenModulo(Cut):
    """Rank R is rank 0, and rank -1 the last."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        return super().slice_tensor_parallel(experts, world_size, rank % max(1, world_size))


@fault("shapes-that-do-not-fit-are-cut", catches=("SLICE-15",), thread="mistral.rs Shard::Simple")
class ShapesThatDoNotFitAreCut(Cut):
    """Only the dimension that is cut is looked at."""

    def slice_tensor_parallel(
        self, experts: ExpertWeights, world_size: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        if experts.gate_up.shape[2] == experts.down.shape[1]:
            return super().slice_tensor_parallel(experts, world_size, rank)
        H = min(experts.gate_up.shape[2], experts.down.shape[1])
        fits = ExpertWeights(experts.gate_up[:, :, :H], experts.down[:, :H])
        return super().slice_tensor_parallel(fits, world_size, rank)


class Place(Reference):
    """A placement that can be changed."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """Place as the reference does, and change it."""
        return self.change(super().place_experts(load, num_physical, num_ranks), load)

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """Change what comes out."""
        return placement


def _place(experts: list[int], E: int, R: int) -> Placement:
    return make_placement(torch.tensor(experts), E, R)


@fault("an-idle-expert-has-no-copy", catches=("SLICE-16",))
class AnIdleExpertHasNoCopy(Place):
    """An expert without load gives its place to the busiest."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        idle, busy = load == 0, int(load.argmax())
        if not bool(idle.any()) or bool(idle.all()):
            return placement
        table = placement.physical_to_logical
        return replace(placement, physical_to_logical=table.where(~idle[table], busy))


@fault("copies-have-ids-behind-the-experts", catches=("SLICE-16",), thread="TensorCast")
class CopiesHaveIdsBehindTheExperts(Place):
    """A further copy is listed as an expert of its own, E, E + 1 and so on."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        table = placement.physical_to_logical.clone()
        seen: set[int] = set()
        for p, e in enumerate(table.tolist()):
            table[p] = len(load) + p if e in seen else e
            seen.add(e)
        return replace(placement, physical_to_logical=table)


@fault("the-table-is-padded-with-0", catches=("SLICE-17",), thread="SGLang #18213")
class TheTableIsPaddedWith0(Place):
    """Where an expert has fewer copies, its row ends with physical expert 0."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        table = placement.logical_to_physical
        return replace(placement, logical_to_physical=table.masked_fill(table < 0, 0))


@fault("the-table-knows-one-copy", catches=("SLICE-17",), thread="vLLM #28377")
class TheTableKnowsOneCopy(Place):
    """Of several copies only the first is in the table."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        table = placement.logical_to_physical.clone()
        table[:, 1:] = -1
        return replace(placement, logical_to_physical=table)


@fault("replicas-are-counted-without-the-first", catches=("SLICE-17",))
class ReplicasAreCountedWithoutTheFirst(Place):
    """An expert with one copy counts 0 replicas."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        return replace(placement, replica_count=placement.replica_count - 1)


@fault("the-table-is-of-the-last-placement", catches=("SLICE-17",), thread="SGLang #32962")
class TheTableIsOfTheLastPlacement(Place):
    """The experts were moved after the table was made: the first two places are exchanged."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        moved = placement.physical_to_logical.clone()
        if len(moved) > 1:
            moved[:2] = moved[:2].flip(0)
        return replace(placement, physical_to_logical=moved)


@fault("ranks-are-dealt-out-in-turn", catches=("SLICE-18",))
class RanksAreCountedFrom1(Place):
    """Physical expert p is on rank p mod R, of R + 1 ranks."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        ranks = placement.rank_of_physical
        places = torch.arange(len(ranks))
        return replace(placement, rank_of_physical=places % (int(ranks.max()) + 2))


@fault("the-last-place-is-on-rank-0", catches=("SLICE-18",), thread="SGLang #22525")
class TheLastPlaceIsOnRank0(Place):
    """One physical expert too many on rank 0, one too few on the last."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        ranks = placement.rank_of_physical.clone()
        ranks[-1:] = 0
        return replace(placement, rank_of_physical=ranks)


@fault("copies-are-all-of-expert-0", catches=("SLICE-19",), thread="TensorCast")
class CopiesAreAllOfExpert0(Place):
    """Every further copy is of the first expert."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        super().place_experts(load, num_physical, num_ranks)
        order = [*range(len(load)), *[0] * (num_physical - len(load))]
        return _place(order, len(load), num_ranks)


@fault("copies-are-dealt-out-in-turn", catches=("SLICE-19",))
class CopiesAreDealtOutInTurn(Place):
    """Every expert gets as many copies as the next, whatever its load."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        super().place_experts(load, num_physical, num_ranks)
        order = [p % len(load) for p in range(num_physical)]
        return _place(order, len(load), num_ranks)


@fault("all-copies-go-to-the-busiest", catches=("SLICE-19",))
class AllCopiesGoToTheBusiest(Place):
    """The load of an expert is not divided by the copies that it has already."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        super().place_experts(load, num_physical, num_ranks)
        busiest = int(load.argmax())
        order = [*range(len(load)), *[busiest] * (num_physical - len(load))]
        return _place(order, len(load), num_ranks)


@fault("copies-go-to-the-idlest", catches=("SLICE-19",))
class CopiesGoToTheIdlest(Place):
    """The comparison is the wrong way round."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        return super().place_experts(load.max() - load, num_physical, num_ranks)


@fault("the-busiest-are-together", catches=("SLICE-20",))
class TheBusiestAreTogether(Place):
    """The heaviest copies fill the first rank, the next the second, and so on."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        share = load.double() / placement.replica_count
        order = share[placement.physical_to_logical].argsort(descending=True)
        ranks = int(placement.rank_of_physical.max()) + 1
        return _place(placement.physical_to_logical[order].tolist(), len(load), ranks)


@fault("without-copies-experts-stand-by-id", catches=("SLICE-20",))
class WithoutCopiesExpertsStandById(Place):
    """Where there is nothing to copy, nothing is balanced."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        if len(placement.physical_to_logical) > len(load):
            return placement
        ranks = int(placement.rank_of_physical.max()) + 1
        return _place(list(range(len(load))), len(load), ranks)


@fault("all-ranks-are-one", catches=("SLICE-18", "SLICE-20"))
class AllRanksAreOne(Place):
    """Everything is on rank 0."""

    def change(self, placement: Placement, load: Tensor) -> Placement:
        """See the contract."""
        return replace(placement, rank_of_physical=placement.rank_of_physical * 0)


@fault("copies-that-do-not-fit-are-left-out", catches=("SLICE-21",))
class CopiesThatDoNotFitAreLeftOut(Place):
    """P is rounded down to a multiple of R, in silence."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        kept = num_physical // max(1, num_ranks) * max(1, num_ranks)
        return super().place_experts(load, kept, num_ranks)


@fault("a-negative-load-is-a-load", catches=("SLICE-21",))
class ANegativeLoadIsALoad(Place):
    """A counter that ran over gives a placement."""

    def place_experts(self, load: Tensor, num_physical: int, num_ranks: int) -> Placement:
        """See the contract."""
        return super().place_experts(load.clamp_min(0), num_physical, num_ranks)


@fault("slices-are-views", catches=("NUM-03",))
class SlicesAreViews(Slice):
    """The slice lies in the memory of the whole, which is written to when a new model is loaded."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, start: int, count: int
    ) -> ExpertWeights:
        """See the contract."""
        return replace(part, down=experts.down[start : start + count])


@fault("cuts-are-views", catches=("NUM-03",))
class CutsAreViews(Cut):
    """The columns of down lie in the memory of the whole."""

    def change(
        self, part: ExpertWeights, experts: ExpertWeights, R: int, rank: int
    ) -> ExpertWeights:
        """See the contract."""
        inner = part.down.shape[2]
        return replace(part, down=experts.down[:, :, rank * inner : (rank + 1) * inner])
