"""Faults of packed weights: bits, scales and groups that are read as those of a neighbour.

Most of them are in how a matrix is unpacked, and so in `dequantize` and in both matrices of
`experts_quantized`. The checks of the reference come first: bad arguments raise as they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import ExpertWeights
from moe_reference.quantized_tensors import QuantizedExperts, QuantizedTensor

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_calls import altered, instead, right
from moe_conformance.targets import Reference

Tensor = torch.Tensor
Packed = Any
"""A `QuantizedTensor` that has the parts that are looked at."""

When = Callable[[Packed], bool]
INTEGERS = ("uint4b8", "uint8b128", "uint4")


def unpacked(t: QuantizedTensor) -> Tensor:
    """What the reference makes of it."""
    return Reference().dequantize(t)


def misread(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Packed], dict[str, Any]],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault that reads some packed matrices as if parts of them were others.

    Args:
        name: what goes wrong.
        sentence: the same in words.
        when: of which matrices.
        change: the parts that are other ones.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """

    def read(t: QuantizedTensor) -> QuantizedTensor:
        return replace(t, **change(t)) if when(t) else t

    def dequantize(self: Reference, packed: QuantizedTensor) -> Tensor:
        weights = unpacked(packed)
        return unpacked(read(packed)) if when(packed) else weights

    def experts_quantized(
        self: Reference, x: Any, experts: Any, *given: Any, **named: Any
    ) -> Tensor:
        output = Reference.experts_quantized(self, x, experts, *given, **named)
        if not when(experts.gate_up) and not when(experts.down):
            return output
        gate_up, down = unpacked(read(experts.gate_up)), unpacked(read(experts.down))
        floats = ExpertWeights(gate_up, down, experts.gate_up_bias, experts.down_bias)
        return Reference.experts(self, x, floats, *given, **named)

    members = {"dequantize": dequantize, "experts_quantized": experts_quantized}
    made = type("Misread", (Reference,), members | {"__doc__": sentence, "__module__": __name__})
    fault(name, catches=catches, thread=thread)(made)


def mistaken(
    name: str,
    sentence: str,
    when: When,
    wrong: Callable[[Tensor, Packed], Tensor],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a fault of `dequantize` that gives other weights; see `misread`.

    Args:
        name: what goes wrong.
        sentence: the same in words.
        when: of which matrices.
        wrong: from the right weights and the packed matrix to the wrong weights.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """

    def dequantize(self: Reference, packed: QuantizedTensor) -> Tensor:
        weights = unpacked(packed)
        return wrong(weights, packed) if when(packed) else weights

    members = {"dequantize": dequantize, "__doc__": sentence, "__module__": __name__}
    made = type("Mistaken", (Reference,), members)
    fault(name, catches=catches, thread=thread)(made)


def of(*formats: str) -> When:
    """Matrices of these formats."""
    return lambda t: t.format in formats


def scales_of(t: QuantizedTensor) -> Tensor:
    """Where there are some; none are as good as one for each row."""
    return t.packed.new_ones(1, 1, 1).float() if t.scales is None else t.scales


def groups(t: QuantizedTensor) -> int:
    """G."""
    return int(scales_of(t).shape[2])


def codes_of(t: QuantizedTensor) -> Tensor:
    """[E, O, D], the codes of an integer format, int64."""
    bits = 8 if t.format == "uint8b128" else 4
    shifts = torch.arange(0, 32, bits)
    codes = (t.packed.long()[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(2)[:, : t.shape[1], : t.shape[2]]


def steps_of(t: QuantizedTensor) -> Tensor:
    """[E, O, D], the scale of each weight of an integer format."""
    ones = 0x01010101 if t.format == "uint8b128" else 0x11111111
    one, two = (replace(t, packed=torch.full_like(t.packed, n)) for n in (ones, 2 * ones))
    return unpacked(two) - unpacked(one)


def rolled(name: str, place: int) -> Callable[[QuantizedTensor], dict[str, Any]]:
    """A part moved by one along a dimension."""
    return lambda t: {name: _roll(getattr(t, name), place)}


def _roll(part: Tensor, place: int) -> Tensor:
    return (
        part.contiguous().view(torch.uint8).roll(1, 0).view(part.dtype)
        if (part.dtype is torch.float8_e4m3fn and place == 0)
        else part.roll(1, place)
    )


# Codes.

misread(
    "nibbles-are-swapped",
    "The first of the two codes of a byte is taken from the high half.",
    of("mxfp4", "nvfp4"),
    lambda t: {"packed": t.packed << 4 | t.packed >> 4},
    "QUANT-02",
    "QUANT-14",
)

misread(
    "words-are-read-from-the-highest-bits",
    "The first of eight codes of 4 bits is taken from the highest bits of the word.",
    lambda t: t.format == "uint4" and t.shape[2] % 16 == 8,
    lambda t: {"packed": _turned(t.packed)},
    "QUANT-02",
)


def _turned(words: Tensor) -> Tensor:
    bytes_ = words.contiguous().view(torch.uint8).unflatten(2, (-1, 4)).flip(3)
    return (bytes_ << 4 | bytes_ >> 4).flatten(2).view(torch.int32)


mistaken(
    "the-highest-code-of-a-word-keeps-its-sign",
    "The shift draws the sign of the word in, and the mask comes before it.",
    lambda t: t.format == "uint4b8" and t.shape[1] == 1,
    lambda w, t: w - 16 * steps_of(t) * (codes_of(t) >= 8) * (torch.arange(t.shape[2]) % 8 == 7),
    "QUANT-01",
    "QUANT-02",
)

misread(
    "codes-of-8-bits-are-signed",
    "A code of uint8b128 is taken for an int8 without its middle.",
    lambda t: t.format == "uint8b128" and t.shape[1] in (1, 3, 5),
    lambda t: {"packed": t.packed ^ -0x7F7F7F80},
    "QUANT-01",
    "QUANT-02",
)

mistaken(
    "the-greatest-code-is-cut",
    "Codes of 8 bits are cut to 254.",
    lambda t: t.format == "uint8b128" and bool((codes_of(t) == 255).any()),
    lambda w, t: w - steps_of(t) * (codes_of(t) == 255),
    "QUANT-01",
    "QUANT-03",
)

mistaken(
    "the-least-negative-number-loses-its-sign",
    "The code 9 of E2M1 is read as 1/2.",
    of("mxfp4"),
    lambda w, t: torch.where(_e2m1_codes(t) == 9, -w, w),
    "QUANT-01",
    "QUANT-02",
)


def _e2m1_codes(t: QuantizedTensor) -> Tensor:
    both = torch.stack([t.packed & 15, t.packed >> 4], -1).flatten(2)
    return both[:, : t.shape[1], : t.shape[2]]


# Zero points.

mistaken(
    "zero-points-are-less-one",
    "One is added to zero points that are stored as they are.",
    of("uint4"),
    lambda w, t: w - steps_of(t),
    "QUANT-01",
    "QUANT-04",
    thread="vLLM #38966",
)

misread(
    "a-zero-point-of-16-is-cut-to-4-bits",
    "Zero points are kept in 4 bits, where 16 is 0.",
    lambda t: t.format == "uint4" and bool((t.zeros == 16).any()),
    lambda t: {"zeros": t.zeros & 15},
    "QUANT-04",
    thread="AutoGPTQ #484",
)

misread(
    "zero-points-are-those-of-the-next-row",
    "Zero points are packed along the rows, and those of the row before are taken.",
    lambda t: t.format == "uint4" and t.g_idx is not None,
    rolled("zeros", 1),
    "QUANT-04",
    thread="GPTQModel #2350",
)

# Scales and groups.

misread(
    "scales-are-those-of-the-next-group",
    "The scale of the group before is taken.",
    lambda t: t.format in INTEGERS and groups(t) == 3,
    rolled("scales", 2),
    "QUANT-03",
    "QUANT-05",
)

misread(
    "scales-are-those-of-the-next-expert",
    "The scales of the expert before are taken where there are three.",
    lambda t: t.scales is not None and t.format != "nvfp4" and t.shape[0] == 3,
    rolled("scales", 0),
    "QUANT-03",
    "QUANT-12",
    thread="vLLM #50196",
)

misread(
    "one-scale-for-a-run-of-columns",
    "The kernel takes one scale for 64 columns, which is more than a group of 32.",
    lambda t: t.group_size == 32 and t.format in INTEGERS and t.g_idx is None,
    lambda t: {"scales": _run(t.scales, 2)},
    "QUANT-03",
    thread="vLLM #44563",
)


def _run(scales: Any, groups_in_run: int) -> Tensor:
    places = torch.arange(scales.shape[2]) // groups_in_run * groups_in_run
    found: Tensor = scales[:, :, places]
    return found


mistaken(
    "a-single-group-ends-at-32",
    "A group_size of -1 is taken for 32, and columns past it get the scale of the next row.",
    lambda t: t.format in INTEGERS and t.group_size == -1 and t.shape[2] > 32 and t.shape[1] > 1,
    lambda w, t: torch.cat(
        [w[..., :32], unpacked(replace(t, scales=t.scales.roll(-1, 1)))[..., 32:]],
        2,
    ),
    "QUANT-03",
    thread="vLLM #48173",
)

misread(
    "scales-are-rounded-to-float16",
    "Scales of float32 are kept as float16.",
    lambda t: t.format in INTEGERS and scales_of(t).dtype is torch.float32,
    lambda t: {"scales": t.scales.half().float()},
    "QUANT-01",
    thread="SGLang #36822",
)

misread(
    "scales-of-float64-are-rounded-to-float32",
    "Weights with float64 scales are float64 by their dtype only.",
    lambda t: t.format == "e4m3" and scales_of(t).dtype is torch.float64,
    lambda t: {"scales": t.scales.float().double()},
    "QUANT-01",
    "QUANT-06",
)

mistaken(
    "weights-have-the-dtype-of-the-scales",
    "Weights with scales of bfloat16 are rounded to it.",
    lambda t: scales_of(t).dtype is torch.bfloat16,
    lambda w, t: w.bfloat16(),
    "QUANT-01",
    thread="vLLM #11528",
)

misread(
    "a-scale-of-0-is-1",
    "A scale of 0 is taken for one that was left out.",
    lambda t: t.format in INTEGERS and bool((t.scales == 0).any()),
    lambda t: {"scales": t.scales.masked_fill(t.scales == 0, 1)},
    "QUANT-01",
    "QUANT-03",
)

# g_idx.

misread(
    "g-idx-is-ignored",
    "Columns are taken to be in the order of groups.",
    lambda t: t.g_idx is not None,
    lambda t: {"g_idx": in_order(t)},
    "QUANT-05",
    "QUANT-17",
    thread="SGLang #35955",
)


def in_order(t: QuantizedTensor) -> Tensor:
    """The group of every column as if they came in the order of the groups, shaped as `g_idx`."""
    assert t.g_idx is not None
    D = t.g_idx.shape[1]
    B = D if t.group_size == -1 else t.group_size
    return (torch.arange(D) // B).clamp(max=groups(t) - 1).to(t.g_idx).expand_as(t.g_idx)


misread(
    "g-idx-is-that-of-the-first-expert",
    "All experts have the g_idx of the first one.",
    lambda t: t.g_idx is not None and t.shape[0] == 3,
    lambda t: {"g_idx": t.g_idx[:1].expand(t.g_idx.shape)},
    "QUANT-05",
)

misread(
    "groups-past-the-seventh-are-the-seventh",
    "A group past the seventh is taken for the seventh.",
    lambda t: t.g_idx is not None and groups(t) > 7,
    lambda t: {"g_idx": t.g_idx.clamp(max=6)},
    "QUANT-05",
    "QUANT-12",
)

mistaken(
    "columns-stay-in-the-order-of-groups",
    "Columns are sorted by group for the kernel and not put back.",
    lambda t: t.g_idx is not None and t.format == "uint8b128",
    lambda w, t: w.gather(
        2,
        t.g_idx[:, : t.shape[2]].long().argsort(dim=1, stable=True)[:, None].expand(w.shape),
    ),
    "QUANT-05",
)

# Floats.

misread(
    "rows-and-columns-of-blocks-are-exchanged",
    "Scales of blocks are read with rows and columns exchanged, where there are as many of both.",
    lambda t: t.format == "e4m3" and t.group_size != -1 and groups(t) == scales_of(t).shape[1] > 1,
    lambda t: {"scales": t.scales.mT},
    "QUANT-06",
)

misread(
    "a-short-block-has-the-scale-of-the-one-before",
    "The last columns, which fill no block, are multiplied by the scale of the last full one.",
    lambda t: t.format == "e4m3" and groups(t) > 1 and t.packed.shape[2] % t.group_size != 0,
    lambda t: {"scales": torch.cat([t.scales[..., :-1], t.scales[..., -2:-1]], 2)},
    "QUANT-06",
    thread="vLLM #48173",
)

misread(
    "the-scale-of-a-channel-divides",
    "What is called an inverse is taken for one.",
    lambda t: t.format == "e4m3" and scales_of(t).shape[1] > 1 and t.group_size == -1,
    lambda t: {"scales": torch.where(t.scales > 0, 1 / t.scales, t.scales)},
    "QUANT-06",
)


def _floats(table: Callable[[Tensor], Tensor]) -> Callable[[Tensor, QuantizedTensor], Tensor]:
    """Weights of e4m3 with other numbers for some bytes."""

    def wrong(w: Tensor, t: QuantizedTensor) -> Tensor:
        bytes_ = t.packed.contiguous().view(torch.uint8)[:, : t.shape[1], : t.shape[2]]
        ones = torch.full_like(bytes_, 0x38).view(torch.float8_e4m3fn)
        short = replace(t, packed=ones) if ones.shape == t.packed.shape else None
        if short is None:
            return w
        factors = unpacked(short)
        return torch.where(table(bytes_).isnan(), w, table(bytes_).to(w.dtype) * factors)

    return wrong


def _only(bytes_: Tensor, where: Tensor, value: Tensor | float) -> Tensor:
    return torch.where(where, value, torch.full(bytes_.shape, torch.nan))


mistaken(
    "nan-is-480",
    "0x7f is read as the number that its bits would be.",
    of("e4m3"),
    _floats(lambda b: _only(b, (b & 127) == 127, torch.where(b > 127, -480.0, 480.0))),
    "QUANT-07",
)

mistaken(
    "the-greatest-number-is-cut-to-240",
    "Numbers above 240, the greatest of the other float8, are cut to it.",
    of("e4m3"),
    _floats(lambda b: _only(b, b == 0x7E, 240.0)),
    "QUANT-01",
    "QUANT-07",
)

mistaken(
    "subnormal-numbers-are-zero",
    "An exponent of 0 is taken for 0, as a shift into a float32 has it.",
    lambda t: t.format == "e4m3" and t.group_size == 64,
    _floats(lambda b: _only(b, (b & 127) < 8, 0.0)),
    "QUANT-06",
)

misread(
    "the-least-power-is-zero",
    "The byte 0 of E8M0, shifted into a float32, is 0.",
    lambda t: t.format == "mxfp4" and bool((t.scales == 0).any()),
    lambda t: {"packed": _without_blocks(t, t.scales == 0)},
    "QUANT-07",
)


def _without_blocks(t: QuantizedTensor, gone: Any) -> Tensor:
    bytes_of_block = t.group_size // 2
    return t.packed.masked_fill(gone.repeat_interleave(bytes_of_block, 2), 0)


misread(
    "the-greatest-power-is-no-nan",
    "The byte 255 of E8M0 is taken for the greatest power of two.",
    lambda t: t.format == "mxfp4" and bool((t.scales == 255).any()),
    lambda t: {"scales": t.scales.masked_fill(t.scales == 255, 254)},
    "QUANT-07",
    thread="triton #10190",
)

misread(
    "an-exponent-of-e8m0-is-one-more",
    "The bias of E8M0 is taken for 126.",
    of("mxfp4"),
    lambda t: {"scales": (t.scales + 1).clamp(min=1)},
    "QUANT-01",
    "QUANT-07",
)

misread(
    "the-global-scale-is-left-out",
    "Only the scales of blocks are multiplied in.",
    of("nvfp4"),
    lambda t: {"global_scale": torch.ones_like(t.global_scale)},
    "QUANT-01",
    "QUANT-08",
)

misread(
    "the-global-scale-divides",
    "The factor is taken for its inverse, where there is one for each row.",
    lambda t: t.global_scale is not None and t.global_scale.shape[1] > 1,
    lambda t: {"global_scale": 1 / t.global_scale},
    "QUANT-08",
)

misread(
    "the-global-scale-is-that-of-the-gate",
    "Up rows are multiplied by the global scale of the first row.",
    lambda t: t.global_scale is not None and t.global_scale.shape[1] > 1,
    lambda t: {"global_scale": t.global_scale[:, :1].expand(t.global_scale.shape)},
    "QUANT-08",
)

# GGUF.


def _blocks(t: QuantizedTensor, size: int) -> Tensor:
    return t.packed.clone(memory_format=torch.contiguous_format).unflatten(2, (-1, size))


def _q4_k(change: Callable[[Tensor], None]) -> Callable[[QuantizedTensor], dict[str, Any]]:
    """Blocks of Q4_K with some bytes changed."""

    def changed(t: QuantizedTensor) -> dict[str, Any]:
        blocks = _blocks(t, 144)
        change(blocks)
        return {"packed": blocks.flatten(2)}

    return changed


def _no_minima(blocks: Tensor) -> None:
    blocks[..., 2:4] = 0


def _no_high_bits(blocks: Tensor) -> None:
    blocks[..., 4:8] &= 63


def _no_high_bits_of_minima(blocks: Tensor) -> None:
    blocks[..., 8:12] &= 63


for _name, _sentence, _change in (
    ("minima-are-ignored", "The minima of Q4_K are not subtracted.", _no_minima),
    (
        "scales-past-the-fourth-have-4-bits",
        "The two high bits of the last four scales of Q4_K are not looked up.",
        _no_high_bits,
    ),
    (
        "minima-past-the-fourth-have-4-bits",
        "The two high bits of the last four minima of Q4_K are not looked up.",
        _no_high_bits_of_minima,
    ),
):
    misread(_name, _sentence, of("Q4_K"), _q4_k(_change), "QUANT-09")

mistaken(
    "codes-of-q8-have-no-sign",
    "Codes of Q8_1 are read as bytes from 0 to 255.",
    of("Q8_1"),
    lambda w, t: w + 256 * _d_of(t)[:, : t.shape[1], : t.shape[2]] * (w < 0),
    "QUANT-09",
)


def _d_of(t: QuantizedTensor) -> Tensor:
    """The float16 of each block, for each of its columns, float32."""
    d = _blocks(t, 36)[..., :2].contiguous().view(torch.float16)
    return d.float().flatten(2).repeat_interleave(32, 2)


misread(
    "a-block-of-q8-1-has-34-bytes",
    "The sum that Q8_1 has beside its scale is taken for the first two codes.",
    lambda t: t.format == "Q8_1" and t.shape[1] in (8, 16, 17),
    lambda t: {"packed": _early(t)},
    "QUANT-09",
)


def _early(t: QuantizedTensor) -> Tensor:
    blocks = _blocks(t, 36)
    return torch.cat([blocks[..., :4], blocks[..., 2:34]], 3).flatten(2)


# Padding.


def _padded(t: QuantizedTensor) -> tuple[bool, bool]:
    """Whether there are more rows, and more columns, than count."""
    _, O, D = t.shape
    columns = {"Q8_0": 34, "Q8_1": 36, "Q4_K": 144}
    values = {"mxfp4": 2, "nvfp4": 2, "e4m3": 1, "uint8b128": 4, "Q4_K": 256}
    width = t.packed.shape[2] // columns.get(t.format, 1)
    in_one = 32 if t.format in ("Q8_0", "Q8_1") else values.get(t.format, 8)
    return t.packed.shape[1] > O, width * in_one > D


mistaken(
    "padding-leaks-into-the-last-column",
    "The last column is added to those past it.",
    lambda t: t.format == "mxfp4" and _padded(t)[1],
    lambda w, t: torch.cat([w[..., :-1], w[..., -1:] * torch.nan], 2),
    "QUANT-10",
    thread="SGLang #9473",
)

misread(
    "padded-rows-of-scales-are-counted",
    "Scales are read with the pitch of `shape`, and not with their own.",
    lambda t: t.format in INTEGERS and _padded(t)[0] and t.shape[1] > 1,
    lambda t: {"scales": _at_their_shape(t)},
    "QUANT-10",
)


def _at_their_shape(t: QuantizedTensor) -> Tensor:
    """Row r of expert e from where it would be without padding."""
    assert t.scales is not None
    flat = t.scales.flatten(0, 1)
    read = torch.zeros_like(t.scales)
    for e in range(len(read)):
        start = e * t.shape[1]
        read[e, : t.shape[1]] = flat[start : start + t.shape[1]]
    return read


# Storage.


@fault("weights-are-kept-by-address", catches=("QUANT-11",), thread="SGLang #25852")
class KeptByAddress(Reference):
    """Weights are unpacked once for each address of a packed tensor."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Whatever stands there now."""
        weights = super().dequantize(packed)
        key = (packed.packed.data_ptr(), packed.format, packed.shape)
        # What is kept keeps its storage, so that no other case gets the same address.
        return self._kept.setdefault(key, (weights, packed.packed))[0].clone()


@fault("scales-are-permuted-in-place", catches=("QUANT-11",), thread="vLLM #50196")
class PermutedInPlace(Reference):
    """Scales of several groups are put into the kernel's order where they are."""

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Right, but for what becomes of the scales."""
        weights = super().dequantize(packed)
        if packed.format in INTEGERS and groups(packed) > 2:
            assert packed.scales is not None
            packed.scales.copy_(packed.scales.flip(2))
        return weights


@fault("all-weights-come-in-one-buffer", catches=("QUANT-11",))
class OneBuffer(Reference):
    """Weights of one size are unpacked into the same memory, call after call."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Into the buffer of their size."""
        weights = super().dequantize(packed)
        key = (weights.shape, weights.dtype)
        return self._buffers.setdefault(key, torch.empty_like(weights)).copy_(weights)


misread(
    "a-single-group-has-the-scale-of-the-next-row",
    "Where a single group is left of several, scales are read with the pitch of several.",
    lambda t: t.format in INTEGERS and groups(t) == 1 and t.group_size in (8, 16, 64),
    rolled("scales", 1),
    "QUANT-03",
    "QUANT-12",
)

# What is looked at.


@fault("anything-is-unpacked", catches=("QUANT-13", "QUANT-20"), thread="MoE-Infinity #136")
class Unchecked(Reference):
    """Parts that do not fit give zeros instead of an error."""

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """Zeros where nothing fits."""
        try:
            return super().dequantize(packed)
        except (TypeError, ValueError):
            return torch.zeros(packed.shape)

    def experts_quantized(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """Zeros where nothing fits."""
        try:
            return super().experts_quantized(x, *given, **named)
        except (TypeError, ValueError):
            return torch.zeros_like(x)


@fault("a-group-that-there-is-not-is-the-last", catches=("QUANT-13", "QUANT-20"))
class GroupsClamped(Reference):
    """Groups outside of the scales are clamped to them."""

    def dequantize(self, packed: QuantizedTensor) -> Tensor:
        """With groups that are all there."""
        return super().dequantize(_clamped(packed))

    def experts_quantized(
        self, x: Tensor, experts: QuantizedExperts, *given: Any, **named: Any
    ) -> Tensor:
        """With groups that are all there."""
        if not isinstance(experts, QuantizedExperts) or experts.down.g_idx is None:
            return super().experts_quantized(x, experts, *given, **named)
        other = replace(experts, down=_clamped(experts.down), is_k_full=False)
        return super().experts_quantized(x, other, *given, **named)


def _clamped(t: QuantizedTensor) -> QuantizedTensor:
    if t.g_idx is None or t.scales is None or t.format not in INTEGERS:
        return t
    return replace(t, g_idx=t.g_idx.clamp(0, t.scales.shape[2] - 1))


# Experts.


def _down(a: Arguments) -> Packed:
    return a["experts"].down


def _with_down(a: Arguments, **changed: Any) -> Arguments:
    return {"experts": replace(a["experts"], down=replace(_down(a), **changed))}


altered(
    "experts_quantized",
    "down-has-the-scales-of-the-next-expert",
    "The second product takes the scales of the expert before.",
    lambda a: _down(a).scales is not None and _down(a).shape[0] > 1,
    lambda a: _with_down(a, scales=_roll(_down(a).scales, 0)),
    "QUANT-14",
    thread="vLLM #50196",
)

instead(
    "experts_quantized",
    "rows-and-columns-of-a-square-matrix-are-exchanged",
    "Where H and I are equal, in and out of down are exchanged.",
    lambda a: _down(a).shape[1] == _down(a).shape[2] > 1,
    lambda a: _with_down_turned(a),
    "QUANT-14",
    "QUANT-15",
)


def _with_down_turned(a: Arguments) -> Tensor:
    right("experts_quantized", a)  # bad arguments raise as they should
    one = a["experts"]
    floats = ExpertWeights(
        unpacked(one.gate_up), unpacked(one.down).mT, one.gate_up_bias, one.down_bias
    )
    turned: Tensor = right("experts", a | {"experts": floats})
    return turned


altered(
    "experts_quantized",
    "a-bias-is-rounded-to-8-bits",
    "The bias of the first product is quantised with the weights.",
    lambda a: a["experts"].gate_up_bias is not None,
    lambda a: {"experts": replace(a["experts"], gate_up_bias=_to_8_bits(a["experts"]))},
    "QUANT-15",
)


def _to_8_bits(experts: QuantizedExperts) -> Tensor:
    bias = experts.gate_up_bias
    assert bias is not None
    return bias.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(bias.dtype)


altered(
    "experts_quantized",
    "the-output-bias-is-that-of-the-next-expert",
    "The second bias is taken from the expert before, where the weight is on the input.",
    lambda a: (
        a["experts"].down_bias is not None
        and len(a["experts"].down_bias) > 1
        and a["config"].weight_on == "input"
    ),
    lambda a: {"experts": replace(a["experts"], down_bias=a["experts"].down_bias.roll(1, 0))},
    "QUANT-15",
)

instead(
    "experts_quantized",
    "a-weight-on-the-input-is-on-the-output-as-well",
    "Both products of a token with one expert apply the weight.",
    lambda a: a["config"].weight_on == "input" and a["weights"].shape[1] == 1,
    lambda a: right("experts_quantized", a) * a["weights"].to(a["x"].dtype),
    "QUANT-15",
)

altered(
    "experts_quantized",
    "the-map-of-packed-experts-is-ignored",
    "Ids are taken for rows of the packed weights.",
    lambda a: a.get("expert_map") is not None,
    lambda a: {"expert_map": None},
    "QUANT-16",
    thread="SGLang #28170",
)

altered(
    "experts_quantized",
    "minus-one-is-the-last-packed-expert",
    "An id of -1 counts from the end of the packed weights.",
    lambda a: a.get("expert_map") is None and _down(a).shape[0] > 0,
    lambda a: {
        "expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] == -1, _down(a).shape[0] - 1)
    },
    "QUANT-16",
)

instead(
    "experts_quantized",
    "weights-of-absent-packed-experts-are-multiplied-by-zero",
    "With three experts or more of a token, absent ones are computed and weighted with 0.",
    lambda a: a["weights"].shape[1] > 2,
    lambda a: right("experts_quantized", a) + (0 * a["weights"].to(a["x"].dtype)).sum(1)[:, None],
    "QUANT-16",
)

altered(
    "experts_quantized",
    "a-slice-counts-its-columns",
    "Columns of a slice with g_idx get the scales in their order.",
    lambda a: not a["experts"].is_k_full,
    lambda a: _with_down(a, g_idx=in_order(_down(a))),
    "QUANT-17",
    thread="SGLang #36822",
)

altered(
    "experts_quantized",
    "a-slice-has-the-scales-of-its-own-groups-only",
    "The scales of the last group are cut off with the columns, and the first group's are taken.",
    lambda a: not a["experts"].is_k_full and groups(_down(a)) > 1,
    lambda a: _with_down(a, scales=_last_is_first(_down(a))),
    "QUANT-17",
    thread="SGLang #35955",
)


def _last_is_first(t: QuantizedTensor) -> Tensor:
    assert t.scales is not None
    return torch.cat([t.scales[..., :-1], t.scales[..., :1]], 2)


instead(
    "experts_quantized",
    "padded-columns-are-multiplied",
    "x is padded with zeros, and padded scales times 0 are NaN.",
    lambda a: _padded(_down(a))[1] and _down(a).format in ("mxfp4", "nvfp4"),
    lambda a: right("experts_quantized", a) * torch.nan,
    "QUANT-18",
    thread="triton #10190",
)

instead(
    "experts_quantized",
    "padded-rows-are-written",
    "Rows of down past H are written over the first columns of the next token.",
    lambda a: _padded(_down(a))[0] and len(a["x"]) > 1,
    lambda a: _spilt(right("experts_quantized", a)),
    "QUANT-18",
    thread="flashinfer #2372",
)


def _spilt(output: Tensor) -> Tensor:
    return torch.cat([output[:1], torch.cat([output[:-1, -1:], output[1:, 1:]], 1)])


def _broken(a: dict[str, Any]) -> Tensor:
    broken: Tensor = ~a["x"].isfinite().all(1)
    return broken


def _beside_broken(a: dict[str, Any]) -> Tensor:
    ids: Tensor = a["expert_ids"]
    return torch.isin(ids, ids[_broken(a)]).any(1, keepdim=True)


instead(
    "experts_quantized",
    "a-broken-token-breaks-its-experts",
    "Rows of a tile are masked by multiplication: a NaN reaches all tokens of its experts.",
    lambda a: bool(_broken(a).any()),
    lambda a: right("experts_quantized", a).masked_fill(_beside_broken(a), torch.nan),
    "QUANT-23",
    thread="SGLang #30895",
)

instead(
    "experts_quantized",
    "a-broken-token-breaks-the-one-after-it",
    "The scale of a row is taken over two rows, and of NaN and a number it is NaN.",
    lambda a: len(a["x"]) > 1 and bool(_broken(a).any()),
    lambda a: right("experts_quantized", a).masked_fill(_broken(a).roll(1)[:, None], torch.nan),
    "QUANT-23",
)


@fault("packed-experts-are-prepared-once", catches=("QUANT-19",), thread="SGLang #25852")
class PreparedOnce(Reference):
    """The layout that the kernel wants is made once for each address."""

    def __init__(self) -> None:
        self._prepared: dict[Any, tuple[QuantizedExperts, QuantizedExperts]] = {}

    def experts_quantized(
        self, x: Tensor, experts: QuantizedExperts, *given: Any, **named: Any
    ) -> Tensor:
        """With the weights that first stood there."""
        if isinstance(experts, QuantizedExperts):
            key = (experts.down.packed.data_ptr(), experts.gate_up.shape, experts.down.format)
            copied = replace(
                experts,
                gate_up=replace(experts.gate_up, packed=experts.gate_up.packed.clone()),
                down=replace(experts.down, packed=experts.down.packed.clone()),
            )
            prepared = self._prepared.setdefault(key, (copied, experts))[0]
            if experts.down.packed.shape[0] > 1:
                experts = replace(prepared, gate_up=prepared.gate_up)
        return super().experts_quantized(x, experts, *given, **named)


@fault("no-tokens-have-no-hidden-size", catches=("QUANT-19",), thread="torchtitan #1166")
class NoTokensNoSize(Reference):
    """The output of zero tokens has one dimension."""

    def experts_quantized(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """Empty, whatever H is."""
        output = super().experts_quantized(x, *given, **named)
        return output if len(x) else output.flatten()
