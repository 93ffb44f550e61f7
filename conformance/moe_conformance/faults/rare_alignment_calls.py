"""Rare faults of alignment that show in what calls keep, change, take and refuse."""

# The class says what goes wrong; its methods are those of the reference.
# ruff: noqa: D102

from __future__ import annotations

import torch

from moe_conformance.faults import fault
from moe_conformance.faults.rare_alignment import Aligned, Tensor
from moe_conformance.target import Unsupported
from moe_conformance.targets import Reference


@fault(
    "what-was-counted-before-is-counted-again",
    catches=("ALIGN-03", "ALIGN-16"),
    thread="SGLang #3339",
)
class CountedBefore(Reference):
    """Counts of the call before are still there when E is the same, and 64 or more."""

    before: Tensor | None = None

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        result = super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
        before, self.before = self.before, torch.zeros(num_experts)
        if num_experts < 64 or before is None or len(before) != num_experts:
            return result
        return result[0], result[1], result[2] + block_size


@fault("the-length-is-one-tensor-for-all-calls", catches=("NUM-05",))
class OneLength(Reference):
    """The length is the same tensor in every call with a map."""

    length: Tensor | None = None

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        slots, experts, length = super().align(
            expert_ids, block_size, num_experts, expert_map, drop_invalid
        )
        if expert_map is None:
            return slots, experts, length
        if self.length is None:
            # What is made in inference mode cannot be written to outside of it.
            with torch.inference_mode(False):
                self.length = torch.zeros(length.shape, dtype=length.dtype)
        return slots, experts, self.length.copy_(length)


@fault("ids-are-mapped-in-place", catches=("NUM-02",))
class MappedInPlace(Reference):
    """Global ids of int32 are replaced by local ones where they stand, if slots are dropped."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        result = super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
        if expert_map is not None and drop_invalid and expert_ids.dtype is torch.int32:
            here = (expert_ids >= 0) & (expert_ids < num_experts)
            expert_ids[here] = expert_map.to(torch.int32)[expert_ids[here].long()]
        return result


@fault("a-map-is-cleaned-in-place", catches=("NUM-02",))
class CleanedInPlace(Reference):
    """The -1 of a map of int64 are overwritten with the number of experts."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        result = super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
        if expert_map is not None and expert_map.dtype is torch.int64:
            expert_map[expert_map < 0] = num_experts
        return result


@fault("a-map-is-kept-from-the-call-before", catches=("ALIGN-32", "ALIGN-01"))
class KeptMap(Reference):
    """A map is uploaded once for a number of experts, and never again."""

    def __init__(self) -> None:
        self.maps: dict[int, Tensor] = {}

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        if expert_map is not None and len(expert_map) == num_experts:
            expert_map = self.maps.setdefault(num_experts, expert_map.clone())
        return super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)


@fault(
    "blocks-of-the-same-storage-are-remembered",
    catches=("ALIGN-35",),
    thread="SGLang #25852",
)
class BlocksAreRemembered(Reference):
    """A graph is captured once for an address, and answers with what was there then."""

    def __init__(self) -> None:
        self.before: tuple[tuple[object, ...], Aligned] | None = None

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        aligned = super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
        address = (expert_ids.data_ptr(), expert_ids.shape, block_size, num_experts, drop_invalid)
        if self.before is None or self.before[0] != address:
            self.before = (address, aligned)
        slots, experts, length = self.before[1]
        return slots.clone(), experts.clone(), length.clone()


@fault("too-many-experts-for-shared-memory-are-refused", catches=("ALIGN-01", "ALIGN-03"))
class TooManyExperts(Reference):
    """More than 256 experts are refused, and nothing was declared."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        if num_experts > 256:
            raise Unsupported("num_experts: expected at most 256")
        return super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)


@fault("no-tokens-are-refused-with-a-map", catches=("ALIGN-15",))
class NoTokensFail(Reference):
    """Without tokens there is nothing to map, and the call is refused."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        if expert_map is not None and len(expert_ids) == 0:
            raise Unsupported("expert_ids: expected at least one token")
        return super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)


@fault("a-short-map-is-filled-up", catches=("ALIGN-19",))
class ShortMap(Reference):
    """A map with entries for fewer experts than there are is filled with -1."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        if expert_map is not None and expert_map.ndim == 1:
            missing = max(0, num_experts - len(expert_map))
            expert_map = torch.cat([expert_map, expert_map.new_full((missing,), -1)])
        return super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)


@fault("ids-of-floats-are-rounded", catches=("ALIGN-19",))
class RoundedIds(Reference):
    """Ids of a float dtype are rounded."""

    def align(
        self,
        expert_ids: Tensor,
        block_size: int,
        num_experts: int,
        expert_map: Tensor | None = None,
        drop_invalid: bool = False,
    ) -> Aligned:
        if expert_ids.is_floating_point():
            expert_ids = expert_ids.long()
        return super().align(expert_ids, block_size, num_experts, expert_map, drop_invalid)
