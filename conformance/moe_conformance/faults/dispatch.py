"""Seeded faults of `dispatch`, `combine` and `drop_to_capacity`."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

import torch

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Dispatched = tuple[Tensor, Tensor, Tensor]


class Sorted(Reference):
    """`dispatch` from a list of slots: right, until a subclass slips."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        _, counts, slots = super().dispatch(x, expert_ids, num_experts)
        ids = self.read(expert_ids, num_experts)
        if ids is not expert_ids:
            _, counts, slots = super().dispatch(x, ids, num_experts)
        owners = ids.flatten().long()[slots]
        slots = self.order(slots, owners)
        rows = self.rows(x, slots, max(expert_ids.shape[1], 1))
        return rows, self.counts(counts, ids), slots

    def read(self, ids: Tensor, experts: int) -> Tensor:
        """The ids as this target sees them."""
        return ids

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        """The slots in the order of the rows."""
        return slots

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        """The rows of those slots."""
        return x[slots // top_k]

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        """What is said of each expert."""
        return counts


class Weighted(Reference):
    """`combine` in two steps: right, until a subclass slips."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        super().combine(rows, slots, weights)
        tokens, top_k = weights.shape
        wide = self.wide(rows)
        kept = slots < tokens * top_k
        rows, slots = rows[kept], slots[kept].long()
        weight = self.weights(weights, rows, slots).to(wide)
        return self.add(weight[:, None] * rows.to(wide), slots // max(top_k, 1), tokens).to(
            rows.dtype
        )

    def wide(self, rows: Tensor) -> torch.dtype:
        """What is summed in."""
        return torch.float64 if rows.dtype is torch.float64 else torch.float32

    def weights(self, weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """[S] the weight of each row."""
        return weights.flatten()[slots]

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        """[T, H] the sum of each token's terms."""
        return terms.new_zeros(tokens, terms.shape[1]).index_add(0, token, terms)


@fault("token-is-slot-modulo-t", catches=("DISPATCH-01", "DISPATCH-17"))
class TokenIsSlotModuloT(Sorted):
    """Slots are taken to be numbered k·T + t on the way to the rows."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return x[slots % max(len(x), 1)]


@fault("rows-through-float16", catches=("DISPATCH-01",))
class RowsThroughFloat16(Sorted):
    """Rows are copied through a float16 workspace."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return x.half().to(x.dtype)[slots // top_k]


@fault("infinity-becomes-large", catches=("DISPATCH-01",))
class InfinityBecomesLarge(Sorted):
    """Rows are cleaned of NaN and infinity while they are copied."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return x.nan_to_num()[slots // top_k]


@fault("offsets-for-counts", catches=("DISPATCH-02",), thread="xtuner #2053")
class OffsetsForCounts(Sorted):
    """`tokens_per_expert` holds where each expert's rows begin."""

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        return counts.cumsum(0) - counts


@fault("counts-are-tokens", catches=("DISPATCH-02", "DISPATCH-07"))
class CountsAreTokens(Sorted):
    """A token that is sent to an expert twice is counted once."""

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        return ((ids[:, :, None] == torch.arange(len(counts))).any(1)).sum(0)


@fault("slots-are-tokens", catches=("DISPATCH-03",))
class SlotsAreTokens(Sorted):
    """`slots` holds the token of each row."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        return rows, counts, slots // max(expert_ids.shape[1], 1)


@fault("a-hidden-capacity", catches=("DISPATCH-03", "DISPATCH-17"))
class AHiddenCapacity(Sorted):
    """An expert gets no more than 64 rows; the others are dropped without a word."""

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        rank = torch.arange(len(owners)) - torch.searchsorted(owners, owners)
        return slots[rank < 64]


@fault("appended-rows-in-front", catches=("DISPATCH-03",))
class AppendedRowsInFront(Reference):
    """A row that fills the static shape stands before the others."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        front = slots.new_full((1,), expert_ids.numel())
        return torch.cat([x.new_zeros(1, x.shape[1]), rows]), counts, torch.cat([front, slots])


@fault("experts-descend", catches=("DISPATCH-04",))
class ExpertsDescend(Sorted):
    """Rows stand in descending order of their expert."""

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        return slots[owners.argsort(descending=True, stable=True)]


@fault("radix-digits-exchanged-in-dispatch", catches=("DISPATCH-04",))
class RadixDigitsExchangedInDispatch(Sorted):
    """Experts are sorted by their low six bits last: wrong from the 65th expert on."""

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        return slots[(owners % 64 * 2**20 + owners // 64).argsort(stable=True)]


@fault("rows-in-order-of-atomics", catches=("DISPATCH-05",), thread="transformers #43362")
class RowsInOrderOfAtomics(Sorted):
    """The last token wins the first place among its expert's rows."""

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        return slots.flip(0)[owners.flip(0).argsort(stable=True)]


@fault("sort-not-stable-beyond-sixteen", catches=("DISPATCH-05",))
class SortNotStableBeyondSixteen(Sorted):
    """Short runs are sorted by insertion; longer ones begin with their second half."""

    def order(self, slots: Tensor, owners: Tensor) -> Tensor:
        rank = torch.arange(len(owners)) - torch.searchsorted(owners, owners)
        return slots[(owners * 2**20 + (rank + 16 * (rank < 16) * 2**10)).argsort(stable=True)]


@fault("dispatch-minus-one-is-the-last-expert", catches=("DISPATCH-06",), thread="SGLang #12701")
class DispatchMinusOneIsTheLastExpert(Sorted):
    """Negative ids count from the end, as indices do in Python."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        return ids.where((ids >= 0) | (ids < -experts), ids + experts)


@fault("dispatch-ids-cut-to-32-bits", catches=("DISPATCH-06",))
class DispatchIdsCutTo32Bits(Sorted):
    """Ids are cast to int32 before they are checked."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        return ids.int()


@fault("rows-for-ids-that-are-not-here", catches=("DISPATCH-06",))
class RowsForIdsThatAreNotHere(Reference):
    """Pairs without an expert get rows behind the others, with their own slots."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        flat = expert_ids.flatten()
        gone = ((flat < 0) | (flat >= num_experts)).nonzero()[:, 0]
        more = x[gone // max(expert_ids.shape[1], 1)]
        return torch.cat([rows, more]), counts, torch.cat([slots, gone])


@fault("a-map-of-tokens-and-experts", catches=("DISPATCH-07",))
class AMapOfTokensAndExperts(Sorted):
    """Rows come from a boolean map of tokens and experts, which holds a repeated id once."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        same = ids[:, :, None] == ids[:, None, :]
        return ids.where(~same.tril(-1).any(-1), -1)


@fault("dispatch-merges-equal-neighbours", catches=("DISPATCH-07",))
class DispatchMergesEqualNeighbours(Sorted):
    """An id equal to the one before it in the row gets no row."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        merged = ids.clone()
        merged[:, 1:] = ids[:, 1:].where(ids[:, 1:] != ids[:, :-1], -1)
        return merged


@fault("counts-end-with-the-last-used", catches=("DISPATCH-08", "DISPATCH-02"))
class CountsEndWithTheLastUsed(Sorted):
    """`bincount` without a minimum length: experts behind the last one in use have no count."""

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        used = counts.nonzero()[:, 0].tolist()
        return counts[: used[-1] + 1 if used else 0]


@fault("rows-in-float32", catches=("DISPATCH-08",))
class RowsInFloat32(Sorted):
    """Rows come in float32, whatever x is."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return x.float()[slots // top_k]


@fault("no-counts-for-no-tokens", catches=("DISPATCH-09",))
class NoCountsForNoTokens(Sorted):
    """Without tokens there are no counts."""

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        return counts if len(ids) else counts[:0]


@fault("every-expert-has-a-row", catches=("DISPATCH-09",))
class EveryExpertHasARow(Sorted):
    """Without tokens every count is one, so that kernels have something to launch."""

    def counts(self, counts: Tensor, ids: Tensor) -> Tensor:
        return counts if len(ids) else counts + 1


@fault("x-read-as-one-piece", catches=("DISPATCH-10",))
class XReadAsOnePiece(Sorted):
    """x is read row by row from its first address on, whatever its strides are."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return super().rows(x.as_strided(x.shape, (x.shape[1], 1)), slots, top_k)


@fault("dispatch-reads-ids-in-order-of-memory", catches=("DISPATCH-10",))
class DispatchReadsIdsInOrderOfMemory(Sorted):
    """Ids that lie column by column are numbered column by column."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        by_column = not ids.is_contiguous() and ids.stride(0) == 1
        return ids.t().reshape(ids.shape) if by_column else ids


@fault("weights-by-row", catches=("DISPATCH-11", "DISPATCH-12"))
class WeightsByRow(Weighted):
    """Row i is given the i-th weight instead of that of its slot."""

    def weights(self, weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        return weights.flatten()[: len(slots)]


@fault("weights-rounded-to-the-rows-dtype", catches=("DISPATCH-11",), thread="vLLM #16801")
class WeightsRoundedToTheRowsDtype(Weighted):
    """Weights are rounded to bfloat16 or float16 with the rows."""

    def weights(self, weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        return weights.flatten()[slots].to(rows.dtype)


@fault("combined-twice-where-k-is-one", catches=("DISPATCH-11", "DISPATCH-12"))
class CombinedTwiceWhereKIsOne(Weighted):
    """With one expert per token the weight is applied on both of two paths."""

    def weights(self, weights: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        own = weights.flatten()[slots]
        return own * own if weights.shape[1] == 1 else own


@fault("rows-overwritten", catches=("DISPATCH-12", "DISPATCH-11"))
class RowsOverwritten(Weighted):
    """A token's rows are written one over the other."""

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        written = terms.new_zeros(tokens, terms.shape[1])
        for row, place in enumerate(token.tolist()):
            written[place] = terms[row]
        return written


@fault("a-lost-update", catches=("DISPATCH-12", "DISPATCH-11"))
class ALostUpdate(Weighted):
    """Two rows of one token next to each other are added at once, and one is lost."""

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        lost = torch.zeros(len(token), 1, dtype=torch.bool)
        lost[1:, 0] = token[1:] == token[:-1]
        return super().add(terms.masked_fill(lost, 0.0), token, tokens)


@fault("summed-in-the-rows-dtype", catches=("DISPATCH-13",), thread="torchtitan #2679")
class SummedInTheRowsDtype(Weighted):
    """Weighted rows are added up in bfloat16 or float16."""

    def wide(self, rows: Tensor) -> torch.dtype:
        return rows.dtype

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        total = terms.new_zeros(tokens, terms.shape[1])
        # One row after the other: `index_add` may sum wider on some devices.
        for row, place in enumerate(token.tolist()):
            total[place] = total[place] + terms[row]
        return total


@fault("float64-summed-in-float32", catches=("DISPATCH-13",))
class Float64SummedInFloat32(Weighted):
    """The accumulator is float32, also where the rows are float64."""

    def wide(self, rows: Tensor) -> torch.dtype:
        return torch.float32


@fault("missing-rows-are-zeros", catches=("DISPATCH-14",))
class MissingRowsAreZeros(Reference):
    """Rows are put back into a buffer of zeros, and all of it is weighted: zero times NaN."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        tokens, top_k = weights.shape
        missing = torch.ones(tokens * top_k, dtype=torch.bool)
        missing[slots[slots < tokens * top_k].long()] = False
        added = (weights.detach() * 0).masked_fill(~missing.view(tokens, top_k), 0.0).sum(-1)
        return right + added[:, None].to(right.dtype)


@fault("infinite-weights-times-zero", catches=("DISPATCH-14",))
class InfiniteWeightsTimesZero(Reference):
    """Weights of missing pairs are cleaned of NaN, and infinity times zero is NaN again."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        tokens, top_k = weights.shape
        missing = torch.ones(tokens * top_k, dtype=torch.bool)
        missing[slots[slots < tokens * top_k].long()] = False
        infinite = (missing.view(tokens, top_k) & weights.isinf()).any(-1)
        return right.masked_fill(infinite[:, None], torch.nan)


@fault("the-output-is-not-cleared", catches=("DISPATCH-15",), thread="vllm-ascend #9992")
class TheOutputIsNotCleared(Reference):
    """Tokens without a row keep what was in the memory of the output."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        rowless = _rowless(slots, weights)
        return torch.where(rowless[:, None], torch.empty_like(right), right)


def _rowless(slots: Tensor, weights: Tensor) -> Tensor:
    """[T] which tokens have no row."""
    tokens, top_k = weights.shape
    rowless = torch.ones(tokens, dtype=torch.bool)
    rowless[slots[slots < tokens * top_k].long() // max(top_k, 1)] = False
    return rowless


@fault("missing-pairs-take-the-last-row", catches=("DISPATCH-15", "DISPATCH-30"))
class MissingPairsTakeTheLastRow(Weighted):
    """The way back is a table of row numbers, -1 where there is none: the last row."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        tokens, top_k = weights.shape
        missing = torch.ones(tokens * top_k, dtype=torch.bool)
        missing[slots[slots < tokens * top_k].long()] = False
        if len(rows) == 0:
            return right
        taken = weights.masked_fill(~missing.view(tokens, top_k), 0.0).sum(-1)
        return (right + taken[:, None] * rows[-1]).to(right.dtype)


@fault("combined-by-a-one-hot-product", catches=("DISPATCH-16",))
class CombinedByAOneHotProduct(Weighted):
    """Rows are combined by a product with a matrix of ones and zeros, where it is not too large."""

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        if tokens * len(terms) > 2**24:
            return super().add(terms, token, tokens)
        chosen = (torch.arange(tokens)[:, None] == token).to(terms.dtype)
        return chosen @ terms


@fault("combined-by-running-sums", catches=("DISPATCH-16",))
class CombinedByRunningSums(Weighted):
    """A token's sum is the difference of two running sums."""

    def add(self, terms: Tensor, token: Tensor, tokens: int) -> Tensor:
        order = token.argsort(stable=True)
        running = torch.cat([terms.new_zeros(1, terms.shape[1]).double(), terms[order].double()])
        ends = torch.bincount(token, minlength=tokens).cumsum(0)
        running = running.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return (running[ends] - running[starts]).to(terms.dtype)


@fault("appended-rows-go-to-the-last-token", catches=("DISPATCH-17",), thread="SGLang #25852")
class AppendedRowsGoToTheLastToken(Reference):
    """Rows are appended with the slot T·K, and the way back cuts it to the last slot."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        more = x[:1].expand(min(len(x), 1) * 3, -1)
        filled = slots.new_full((len(more),), expert_ids.numel())
        return torch.cat([rows, more]), counts, torch.cat([slots, filled])

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return super().combine(rows, slots.clamp_max(max(weights.numel() - 1, 0)), weights)


@fault("appended-rows-times-zero", catches=("DISPATCH-17",))
class AppendedRowsTimesZero(AppendedRowsGoToTheLastToken):
    """Appended rows are weighted with 0 and added to the first token, whatever they hold."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = Reference.combine(self, rows, slots, weights)
        appended = rows[slots == weights.numel()]
        added = torch.zeros_like(right)
        added[:1] = (appended * 0).sum(0)
        return right + added


@fault("no-tokens-no-width", catches=("DISPATCH-18",))
class NoTokensNoWidth(Reference):
    """Without tokens the output has no columns either."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        return right if len(right) else right[:, :0]


@fault("no-tokens-give-one", catches=("DISPATCH-18",))
class NoTokensGiveOne(Reference):
    """Without tokens one row of zeros comes back."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        return right if len(right) else right.new_zeros(1, rows.shape[1])


@fault("rows-read-as-one-piece", catches=("DISPATCH-19",))
class RowsReadAsOnePiece(Reference):
    """Rows are read from their first address on, whatever their strides are."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        super().combine(rows, slots, weights)
        plain = rows.as_strided(rows.shape, (rows.shape[1], 1))
        return super().combine(plain, slots, weights)


@fault("weights-read-in-order-of-memory", catches=("DISPATCH-19",))
class WeightsReadInOrderOfMemory(Reference):
    """Weights that lie column by column are read column by column."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        by_column = not weights.is_contiguous() and weights.stride(0) == 1
        read = weights.t().reshape(weights.shape) if by_column else weights
        return super().combine(rows, slots, read)


@fault("the-sum-is-returned-as-it-is", catches=("DISPATCH-20",))
class TheSumIsReturnedAsItIs(Reference):
    """The float32 sum is returned without being rounded to the rows' dtype."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        narrow = rows.dtype not in (torch.float32, torch.float64)
        return super().combine(rows.float() if narrow else rows, slots, weights)


@fault("the-weights-widen-the-output", catches=("DISPATCH-20",))
class TheWeightsWidenTheOutput(Reference):
    """The output has the wider dtype of rows and weights."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        return right.to(torch.promote_types(rows.dtype, weights.dtype))


class Capped(Reference):
    """`drop_to_capacity` with its arguments or its answer changed."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        ids = self.read(expert_ids, num_experts)
        room = self.room(capacity, expert_ids)
        # The right call first: what has to raise, raises.
        super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        kept = super().drop_to_capacity(self.keys(weights), ids, num_experts, room, policy)[1]
        return self.after(weights.masked_fill(kept < 0, 0.0), kept, expert_ids, num_experts)

    def read(self, ids: Tensor, experts: int) -> Tensor:
        """The ids as this target sees them."""
        return ids

    def room(self, capacity: int, ids: Tensor) -> int:
        """How many pairs an expert may keep."""
        return capacity

    def keys(self, weights: Tensor) -> Tensor:
        """What is compared."""
        return weights

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        """What is made of the right answer."""
        return weights, ids


@fault("one-pair-beyond-the-capacity", catches=("DISPATCH-21",))
class OnePairBeyondTheCapacity(Capped):
    """A pair stays whose position is at most the capacity, counted from zero."""

    def room(self, capacity: int, ids: Tensor) -> int:
        return capacity + 1


@fault("capacity-cut-below-t", catches=("DISPATCH-21",), thread="DeepSpeed #8155")
class CapacityCutBelowT(Capped):
    """A capacity of T or more is cut to T - 1."""

    def room(self, capacity: int, ids: Tensor) -> int:
        return capacity if capacity < len(ids) else max(len(ids) - 1, 0)


@fault("later-experts-lose-everything", catches=("DISPATCH-21",), thread="vllm-ascend #14926")
class LaterExpertsLoseEverything(Capped):
    """Only the first 64 experts have a place to count in."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        return weights.masked_fill(ids >= 64, 0.0), ids.masked_fill(ids >= 64, -1)


@fault("normalised-after-the-drop", catches=("DISPATCH-22",))
class NormalisedAfterTheDrop(Capped):
    """The weights that a token keeps are scaled to the sum that it had."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        kept, ids = super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        left = kept.sum(-1, keepdim=True)
        scale = torch.where(left > 0, weights.sum(-1, keepdim=True) / left, 1.0)
        return (kept * scale).to(weights.dtype), ids


@fault("dropped-is-e", catches=("DISPATCH-22",))
class DroppedIsE(Capped):
    """A dropped pair gets the id E."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        return weights, ids.masked_fill(ids < 0, experts)


@fault("pairs-move-up", catches=("DISPATCH-22",))
class PairsMoveUp(Capped):
    """The pairs that a token keeps move to the front of its row."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        order = (ids < 0).to(torch.int8).argsort(dim=-1, stable=True)
        return weights.gather(1, order), ids.gather(1, order)


@fault("the-last-pairs-stay", catches=("DISPATCH-23",))
class TheLastPairsStay(Reference):
    """With `position` an expert's last pairs stay."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        if policy != "position":
            return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        kept = super().drop_to_capacity(
            weights.flip(0, 1), expert_ids.flip(0, 1), num_experts, capacity, policy
        )
        return kept[0].flip(0, 1), kept[1].flip(0, 1)


@fault("first-choices-first", catches=("DISPATCH-23",))
class FirstChoicesFirst(Reference):
    """With `position` all first choices stay before any second one."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        if policy != "position":
            return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        kept = super().drop_to_capacity(weights.t(), expert_ids.t(), num_experts, capacity, policy)
        return kept[0].t(), kept[1].t()


@fault("position-for-probs", catches=("DISPATCH-24",), thread="Megatron #812")
class PositionForProbs(Reference):
    """The policy is compared with a misspelt name, so that it is always `position`."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        super().drop_to_capacity(weights, expert_ids, num_experts, capacity, policy)
        return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, "position")


@fault("weights-compared-in-bfloat16", catches=("DISPATCH-24",))
class WeightsComparedInBfloat16(Capped):
    """With `probs` the weights are rounded to bfloat16 before they are compared."""

    def keys(self, weights: Tensor) -> Tensor:
        return weights.bfloat16()


@fault("invalid-ids-take-capacity", catches=("DISPATCH-25",), thread="vLLM #38128")
class InvalidIdsTakeCapacity(Capped):
    """Ids are taken modulo E where pairs are counted, and lead nowhere afterwards."""

    def read(self, ids: Tensor, experts: int) -> Tensor:
        return ids % experts

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        gone = (before < 0) | (before >= experts)
        return weights.masked_fill(gone, 0.0), ids.masked_fill(gone, -1)


@fault("invalid-ids-come-back", catches=("DISPATCH-25",))
class InvalidIdsComeBack(Capped):
    """Ids from E on are cut to the last expert."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        return weights, ids.masked_fill(before >= experts, experts - 1)


@fault("no-tokens-no-pairs", catches=("DISPATCH-26",))
class NoTokensNoPairs(Capped):
    """Without tokens the weights and ids have no columns."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        return (weights, ids) if len(ids) else (weights[:, :0], ids[:, :0])


@fault("no-tokens-give-a-padded-one", catches=("DISPATCH-26",))
class NoTokensGiveAPaddedOne(Capped):
    """Without tokens one token without experts comes back."""

    def after(
        self, weights: Tensor, ids: Tensor, before: Tensor, experts: int
    ) -> tuple[Tensor, Tensor]:
        if len(ids):
            return weights, ids
        return weights.new_zeros(1, ids.shape[1]), ids.new_full((1, ids.shape[1]), -1)


@fault("rows-carry-no-gradient", catches=("DISPATCH-27", "DISPATCH-29"))
class RowsCarryNoGradient(Sorted):
    """Rows are copied outside of autograd."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        return super().rows(x.detach(), slots, top_k)


@fault("only-the-first-row-has-a-gradient", catches=("DISPATCH-27",))
class OnlyTheFirstRowHasAGradient(Sorted):
    """The backward pass writes a token's gradient where it should add: one of its rows counts."""

    def rows(self, x: Tensor, slots: Tensor, top_k: int) -> Tensor:
        rows = super().rows(x, slots, top_k)
        return torch.where((slots % top_k == 0)[:, None], rows, rows.detach())


@fault("weights-carry-no-gradient", catches=("DISPATCH-28",))
class WeightsCarryNoGradient(Reference):
    """The router gets no gradient from the sum."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return super().combine(rows, slots, weights.detach())


@fault("row-gradients-without-their-weight", catches=("DISPATCH-28",))
class RowGradientsWithoutTheirWeight(Reference):
    """The backward pass hands the output's gradient to every row as it is."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows.detach(), slots, weights)
        plain = super().combine(rows, slots, torch.ones_like(weights))
        return right + (plain - plain.detach()).to(right.dtype)


@fault("nothing-to-dispatch-is-a-constant", catches=("DISPATCH-29",), thread="Megatron #4851")
class NothingToDispatchIsAConstant(Reference):
    """Without a row an empty constant is returned, and x gets no gradient at all."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        rows, counts, slots = super().dispatch(x, expert_ids, num_experts)
        return rows if len(slots) else rows.detach(), counts, slots


@fault("nothing-to-combine-is-a-constant", catches=("DISPATCH-30",), thread="DeepSpeed #5066")
class NothingToCombineIsAConstant(Reference):
    """Without a row zeros are returned that know of no weights."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        right = super().combine(rows, slots, weights)
        return right if len(slots) else right.detach()


@fault("dispatch-fits-what-does-not-fit", catches=("DISPATCH-31",))
class DispatchFitsWhatDoesNotFit(Reference):
    """Of x and the ids the longer one is cut."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        tokens = min(len(x), len(expert_ids))
        return super().dispatch(x[:tokens], expert_ids[:tokens], num_experts)


@fault("ids-cut-to-integers", catches=("DISPATCH-31",))
class IdsCutToIntegers(Reference):
    """Ids that are floats are cut to integers."""

    def dispatch(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> Dispatched:
        return super().dispatch(x, expert_ids.long(), num_experts)


@fault("slots-cut-to-integers", catches=("DISPATCH-32",))
class SlotsCutToIntegers(Reference):
    """Slots that are floats are cut to integers."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return super().combine(rows, slots.long(), weights)


@fault("slots-of-any-shape", catches=("DISPATCH-32",))
class SlotsOfAnyShape(Reference):
    """Slots are flattened and the first S of them are taken."""

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return super().combine(rows, slots.flatten()[: len(rows)], weights)


@fault("an-unknown-policy-is-position", catches=("DISPATCH-33",), thread="Megatron #815")
class AnUnknownPolicyIsPosition(Reference):
    """Every policy but `probs` is taken for `position`."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        known = policy if policy == "probs" else "position"
        return super().drop_to_capacity(weights, expert_ids, num_experts, capacity, known)


@fault("a-negative-capacity-is-none", catches=("DISPATCH-33",))
class ANegativeCapacityIsNone(Reference):
    """A negative capacity drops everything."""

    def drop_to_capacity(
        self, weights: Tensor, expert_ids: Tensor, num_experts: int, capacity: int, policy: str
    ) -> tuple[Tensor, Tensor]:
        room = max(capacity, 0)
        return super().drop_to_capacity(weights, expert_ids, num_experts, room, policy)
