"""Faults of packed weights that show on few inputs: with a map, in long rows, in a second call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor
INTEGERS = ("uint4b8", "uint8b128", "uint4")
TILE = 128
"""Columns of a tile."""


class Mapped(Reference):
    """The reference, but for what `seen` makes of experts that come with a map, and of that map."""

    def seen(self, experts: QuantizedExperts, expert_map: Tensor) -> tuple[Any, Tensor]:
        """As it is."""
        return experts, expert_map

    def experts_quantized(
        self, x: Any, experts: Any, weights: Any, expert_ids: Any, config: Any,
        expert_map: Any = None,
    ) -> Tensor:  # fmt: skip
        """Right, of other experts or another map."""
        given = x, experts, weights, expert_ids, config, expert_map
        right = super().experts_quantized(*given)
        if expert_map is None:
            return right
        other, other_map = self.seen(experts, expert_map)
        return super().experts_quantized(x, other, weights, expert_ids, config, other_map)


@fault("biases-of-packed-experts-have-global-ids", catches=("QUANT-15",))
class BiasesOfGlobalIds(Mapped):
    """With a map biases are taken at the global id, the weights at the local one."""

    def seen(self, experts: QuantizedExperts, expert_map: Tensor) -> tuple[Any, Tensor]:
        """Past the last bias it is the last."""
        held = len(experts.down.packed)
        local = expert_map.long()
        ids = torch.arange(len(local))[local >= 0].clamp(max=held - 1)
        order = torch.arange(held).scatter(0, local[local >= 0], ids)
        biases: Any = {
            name: None if (bias := getattr(experts, name)) is None else bias[order]
            for name in ("gate_up_bias", "down_bias")
        }
        return replace(experts, **biases), expert_map


@fault("packed-experts-read-a-long-map-of-int32-as-int64", catches=("QUANT-16",))
class LongMapOfInt32(Mapped):
    """Of an int32 map with more than 8 entries every other one is taken for the upper half."""

    def seen(self, experts: QuantizedExperts, expert_map: Tensor) -> tuple[Any, Tensor]:
        """Experts at odd ids are not here."""
        if expert_map.dtype is torch.int32 and len(expert_map) > 8:
            expert_map = expert_map.clone()
            expert_map[1::2] = -1
        return experts, expert_map


@fault("a-map-gives-all-rows-the-fixed-scales-of-the-first-expert", catches=("QUANT-22",))
class FixedScalesOfTheFirst(Mapped):
    """With a map the activations of every expert are rounded with the first one's scales."""

    def seen(self, experts: QuantizedExperts, expert_map: Tensor) -> tuple[Any, Tensor]:
        """One row of scales for all."""
        scales = experts.activation_scales
        if scales is not None:
            experts = replace(experts, activation_scales=scales[:1].expand(scales.shape))
        return experts, expert_map


@fault("a-single-group-ends-with-the-first-tile", catches=("QUANT-03",))
class OneGroupOneTile(Reference):
    """With one group for a whole row, columns past the first 128 have no scale and are 0."""

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Right up to the end of the tile."""
        weights = super().dequantize(packed)
        if packed.format in INTEGERS and packed.group_size == -1:
            weights[..., TILE:] = 0
        return weights


def _bytes(codes: Tensor) -> Tensor:
    return codes.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


class Remembered:
    """What stood in an address before, and the codes by which it is known again."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, Tensor, Any]] = {}

    def recall(self, packed: QuantizedTensor, value: Any) -> Any:
        """What was kept for the same codes in the same place; else `value`, kept from now on."""
        key = packed.packed.data_ptr(), packed.format, tuple(packed.shape)
        codes = _bytes(packed.packed)
        kept = self._kept.get(key)
        if kept is not None and torch.equal(kept[0], codes):
            return kept[2]
        # What is kept keeps its storage, so that no other case gets the same address.
        self._kept[key] = codes, packed.packed, value
        return value


@fault("weights-are-kept-while-their-codes-are-the-same", catches=("QUANT-11",))
class KeptByCodes(Reference):
    """Unpacked weights are kept until other codes stand there; new scales are not seen."""

    def __init__(self) -> None:
        self._weights = Remembered()

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """The first of these codes."""
        weights = super().dequantize(packed)
        found = self._weights.recall(packed, weights.clone())
        assert isinstance(found, Tensor)
        return found.clone()


@fault("packed-experts-are-kept-while-their-codes-are-the-same", catches=("QUANT-19",))
class ExpertsKeptByCodes(Reference):
    """Scales of down are put in order once for its codes; other ones for these are not seen."""

    def __init__(self) -> None:
        self._parts = Remembered()

    def experts_quantized(self, x: Tensor, experts: Any, *given: Any, **named: Any) -> Tensor:
        """With the scales, zero points and g_idx that first came with the codes."""
        right = super().experts_quantized(x, experts, *given, **named)
        names = ("scales", "zeros", "g_idx", "global_scale")
        parts = {name: getattr(experts.down, name) for name in names}
        copied = {name: None if t is None else t.clone() for name, t in parts.items()}
        found = self._parts.recall(experts.down, copied)
        if all(t is None or t.shape == parts[n].shape for n, t in found.items()):
            down = replace(experts.down, **found)
            right = super().experts_quantized(x, replace(experts, down=down), *given, **named)
        return right


class DownLikeGateUp(Reference):
    """Down is read as gate_up is packed, in one respect."""

    def read(self, down: Any, gate_up: Any) -> Any:
        """Down, as it is taken."""
        return down

    def experts_quantized(self, x: Tensor, experts: Any, *given: Any, **named: Any) -> Tensor:
        """With what down is taken for."""
        right = super().experts_quantized(x, experts, *given, **named)
        down = self.read(experts.down, experts.gate_up)
        if down is experts.down:
            return right
        return super().experts_quantized(x, replace(experts, down=down), *given, **named)


@fault("scales-of-down-are-cast-to-those-of-gate-up", catches=("QUANT-14",))
class ScalesOfDownAreCast(DownLikeGateUp):
    """The scales of down are rounded to the dtype that those of gate_up have."""

    def read(self, down: Any, gate_up: Any) -> Any:
        """Through that dtype and back."""
        if down.scales is None or gate_up.scales is None:
            return down
        dtypes = {down.scales.dtype, gate_up.scales.dtype}
        if not dtypes <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
            return down
        cast = down.scales.to(gate_up.scales.dtype).to(down.scales.dtype)
        return replace(down, scales=cast)


@fault("down-has-no-zero-points-where-gate-up-has-none", catches=("QUANT-14",))
class DownHasNoZeroPoints(DownLikeGateUp):
    """Zero points of down are left out where gate_up has none."""

    def read(self, down: Any, gate_up: Any) -> Any:
        """With 8 for all of them."""
        if down.format != "uint4" or gate_up.format == "uint4":
            return down
        return replace(down, format="uint4b8", zeros=None)


MANY = 2**16
"""More weights than this have no index of sixteen bits."""


@fault("weights-have-an-index-of-16-bits", catches=("QUANT-01", "QUANT-06"))
class IndexOf16Bits(Reference):
    """Weights past the 65536th of all experts together are the first ones once more."""

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Right, and read at an index that wraps around."""
        weights = super().dequantize(packed)
        index = torch.arange(weights.numel()) % MANY
        return weights.reshape(-1)[index].reshape(weights.shape)


@fault("packed-rows-have-an-index-of-16-bits", catches=("QUANT-14",))
class RowsOf16Bits(Reference):
    """Rows of gate_up that begin past the 65536th weight of an expert are the first ones again."""

    def experts_quantized(self, x: Tensor, experts: Any, *given: Any, **named: Any) -> Tensor:
        """With the codes of other rows, where there are so many."""
        if isinstance(experts, QuantizedExperts):
            rows = torch.arange(experts.gate_up.packed.shape[1])
            wrapped = rows % max(1, MANY // experts.gate_up.shape[2])
            packed = experts.gate_up.packed.contiguous().view(torch.uint8)[:, wrapped]
            packed = packed.view(experts.gate_up.packed.dtype)
            experts = replace(experts, gate_up=replace(experts.gate_up, packed=packed))
        return super().experts_quantized(x, experts, *given, **named)


@fault("packed-experts-have-an-index-of-four-bits", catches=("QUANT-14",))
class FourBitsOfExperts(Reference):
    """Pairs of the seventeenth expert, and of those after it, go to the first ones again."""

    def experts_quantized(
        self, x: Tensor, experts: Any, weights: Tensor, expert_ids: Tensor, config: Any,
        expert_map: Any = None,
    ) -> Tensor:  # fmt: skip
        """Right up to 16 experts."""
        if expert_map is not None:
            expert_map = expert_map.where(expert_map < 16, expert_map % 16)
        elif len(experts.down.packed) > 16:
            inside = (expert_ids >= 0) & (expert_ids < len(experts.down.packed))
            expert_ids = expert_ids.where(~inside, expert_ids % 16)
        return super().experts_quantized(x, experts, weights, expert_ids, config, expert_map)
