"""Pictures of packed weights, drawn from what the reference packs and reads."""

import torch
from moe_reference.bit_packing import pack_nibbles, pack_words
from moe_reference.float4 import from_e2m1, from_e8m0
from moe_reference.gptq_packing import to_gptq
from moe_reference.integer_quantization import column_groups
from moe_reference.marlin_layout import from_marlin_words
from moe_reference.packed_slicing import take_packed_columns
from moe_reference.quantization import FORMATS, packed_bytes, quantize
from moe_reference.quantized_tensors import QuantizedTensor

from pictures.svg import LABEL, ROW, box, figure, label

FILLED = 0.5
G_IDX = torch.tensor([[2, 0, 1, 1, 3, 0, 2, 2, 0, 3, 1, 0, 3, 1, 2, 3]])


def words() -> str:
    """Which code stands in which bits of a word, and of a byte."""
    parts = [label(0, "bits", "italic")]
    parts += [
        box(place, 0, 1, f"{28 - 4 * place} to {31 - 4 * place}", 0.0, framed=False)
        for place in range(8)
    ]
    codes = torch.arange(8)
    lines = [
        ("4 bits, plain", _digits(pack_words(codes, 4), 4, 8)),
        ("4 bits, AWQ", _digits(pack_words(codes, 4, "awq"), 4, 8)),
        ("8 bits", _digits(pack_words(codes[:4], 8), 8, 4)),
        ("a byte of 4-bit floats", _digits(pack_nibbles(codes[:2]), 4, 2)),
    ]
    for line, (name, held) in enumerate(lines):
        y = (1.2 + line) * ROW
        parts.append(label(y, name))
        span = 2 if name == "8 bits" else 1
        for place, code in enumerate(held):
            column = 8 - span * (len(held) - place)
            parts.append(box(column, y, span, f"code {code}", FILLED, colour=code % 2))
    reading = (
        "The highest bits are on the left. Codes at even places and at odd ones have two colours: "
        "in the order of AWQ the two halves of a word hold one kind each."
    )
    return figure(5.4 * ROW, "".join(parts), reading)


def floats() -> str:
    """The bits of small floats, each with one number."""
    e4m3 = torch.tensor([0b0_1010_101], dtype=torch.uint8)
    e2m1, e8m0 = torch.tensor([0b1101]).byte(), torch.tensor([130]).byte()
    lines = [
        (
            "float8_e4m3fn",
            "s eeee mmm",
            int(e4m3),
            8,
            e4m3.view(torch.float8_e4m3fn).float().item(),
        ),
        ("E2M1", "s ee m", int(e2m1), 4, from_e2m1(e2m1).item()),
        ("E8M0", "eeeeeeee", int(e8m0), 8, from_e8m0(e8m0).item()),
    ]
    colours = {"s": 0, "e": 1, "m": 2}
    cell, parts = 52, []
    for line, (name, kinds, code, bits, number) in enumerate(lines):
        y = 1.2 * line * ROW
        parts.append(label(y, name))
        digits = f"{code:0{bits}b}"
        for place, (kind, digit) in enumerate(zip(kinds.replace(" ", ""), digits, strict=True)):
            parts.append(
                box(8 - bits + place, y, 1, f"{kind} {digit}", FILLED, colour=colours[kind],
                    cell=cell)
            )  # fmt: skip
        parts.append(_note(8.2, y, cell, f"= {number:g}"))
    reading = (
        "Sign s, exponent e, mantissa m. E8M0 is an exponent and nothing else: it has no sign, no "
        "zero, and steps of a factor of 2."
    )
    return figure(3.6 * ROW, "".join(parts), reading)


def shared_scales() -> str:
    """Which numbers of a matrix of 4 rows and 16 columns share a scale."""
    weight = torch.ones(1, 4, 16)
    cases = [
        ("one for all", quantize(weight, "e4m3", granularity="tensor")),
        ("one for a row", quantize(weight, "e4m3", granularity="channel")),
        ("groups of 4", _in_groups(None)),
        ("with g_idx", _in_groups(G_IDX)),
        ("blocks of 2 x 4", None),
    ]
    parts, cell, height = [], 34, 15
    for line, (name, packed) in enumerate(cases):
        y = line * (4 * height + 14)
        parts.append(label(y + 1.2 * height, name))
        for o in range(4):
            for k in range(16):
                index = _scale_index(packed, o, k)
                x = LABEL + k * cell
                parts.append(
                    f'<rect x="{x + 1}" y="{y + o * height + 2}" width="{cell - 2}" '
                    f'height="{height - 2}" fill="rgba(var(--picture-fill-{index % 4}),'
                    f'{0.3 + 0.1 * (index // 4 % 4):.2f})" stroke="var(--picture-line)"/>'
                )
    reading = (
        "A matrix of 4 rows and 16 columns; what has one shade has one scale. With g_idx the "
        "columns of a group are scattered. (Published groups have 16 to 256 columns, blocks "
        "128 x 128.)"
    )
    return figure(5 * (4 * height + 14), "".join(parts), reading)


def zero_points() -> str:
    """What the conventions of GPTQ store for a zero point."""
    shown, cell = (0, 1, 7, 8, 15, 16), 64
    parts = [label(0, "zero point", "italic")]
    parts += [box(i, 0, 1, str(zero), 0.0, framed=False, cell=cell) for i, zero in enumerate(shown)]
    for line, convention in enumerate(("v1", "v1_wrapped", "v2")):
        y = (1.1 + line) * ROW
        parts.append(label(y, f"stored, {convention}"))
        for i, zero in enumerate(shown):
            stored = _stored_zero(zero, convention)
            text = "none" if stored is None else str(stored)
            parts.append(
                box(i, y, 1, text, 0.0 if stored is None else FILLED, struck=stored is None,
                    colour=None if stored is None else line, cell=cell)
            )  # fmt: skip
    reading = (
        "The same checkpoint, read by the wrong convention, is off by one step everywhere. The two "
        "readings of v1 differ at one stored number, 15."
    )
    return figure(4.3 * ROW, "".join(parts), reading)


def gguf() -> str:
    """The bytes of GGUF blocks, and the bits of the 12 bytes of Q4_K."""
    runs = {
        "Q8_0": [("d", 2), ("32 codes", 32)],
        "Q8_1": [("d", 2), ("s", 2), ("32 codes", 32)],
        "Q4_K": [("d", 2), ("d'", 2), ("a and m", 12), ("256 codes, two to a byte", 128)],
    }
    parts, cell = [], 74
    for line, (name, run) in enumerate(runs.items()):
        y = 1.1 * line * ROW
        assert sum(count for _, count in run) == FORMATS[name].elements
        parts.append(label(y, f"{name}, {FORMATS[name].elements} bytes"))
        column = 0.0
        for place, (text, count) in enumerate(run):
            span = 1 if count == 2 else 2 if count == 12 else 3.6
            parts.append(
                box(column, y, span, f"{text}: {count}", FILLED, colour=min(place, 3), cell=cell)
            )
            column += span
    small = [
        ("byte 0 to 3", (2, "2 high of a"), (6, "6 bits of a[0 to 3]")),
        ("byte 4 to 7", (2, "2 high of m"), (6, "6 bits of m[0 to 3]")),
        ("byte 8 to 11", (4, "4 low bits of m[4 to 7]"), (4, "4 low bits of a[4 to 7]")),
    ]
    for line, (name, *fields) in enumerate(small):
        y, start = (3.8 + line) * ROW, 0
        parts.append(label(y, name, "italic"))
        for bits, text in fields:
            colour = 2 if "of a" in text else 3
            parts.append(box(start, y, bits, text, FILLED, colour=colour, cell=cell))
            start += bits
    reading = (
        "Above: blocks as they stand in a file, widths not to scale. Below: the 12 bytes of Q4_K, "
        "the highest bit on the left: 8 scales a and 8 minima m of 6 bits each; the two high bits "
        "of numbers 4 to 7 stand over the six of 0 to 3."
    )
    return figure(6.9 * ROW, "".join(parts), reading)


def marlin() -> str:
    """Which thread holds which code of a fragment, and the word of thread 0."""
    places = _marlin_places()
    cell, height, parts = 36, 24, []
    for g in range(8):
        y = g * height
        parts.append(_small(LABEL - 10, y + 16, f"row {g}", "end"))
        for k in range(16):
            lane = places[0, g, k]
            x = LABEL + k * cell
            parts.append(
                f'<rect x="{x + 1}" y="{y + 2}" width="{cell - 2}" height="{height - 3}" rx="2" '
                f'fill="rgba(var(--picture-fill-{lane % 4}),0.50)" stroke="var(--picture-line)"/>'
                + _small(x + cell / 2, y + 16, str(lane), "middle")
            )
    y = 8 * height + 0.6 * ROW
    parts.append(label(y, "word of thread 0"))
    for place, (row, column) in enumerate(_first_word()):
        parts.append(box(7 - place, y, 1, f"{row}, {column}", FILLED, colour=row // 8, cell=72))
    reading = (
        "Above: 8 rows and 16 columns of a matrix, each with the number of the thread that needs "
        "it. Below: the row and column of the eight 4-bit codes in the first word of thread 0, "
        "highest bits on the left: neighbours in a row are 16 bits apart."
    )
    return figure(y + 1.2 * ROW, "".join(parts), reading)


def slices() -> str:
    """The columns of down on two ranks, in order and with g_idx, and the scales they need."""
    parts, cell, y = [], 36, 0.0
    for name, g_idx in (("in order", None), ("with g_idx", G_IDX)):
        whole = _in_groups(g_idx)
        for rank in range(2):
            part = take_packed_columns(whole, 8 * rank, 8 * rank + 8)
            parts.append(label(y, f"{name}, rank {rank}"))
            groups = (column_groups(whole)[0, 8 * rank : 8 * rank + 8]).tolist()
            for k, g in enumerate(groups):
                parts.append(box(k, y, 1, str(g), FILLED, colour=g, cell=cell))
            held = part.scales[0, 0].int().tolist()
            for i, g in enumerate(held):
                parts.append(box(9.5 + i, y, 1, f"s{g}", FILLED, colour=g, cell=cell))
            assert set(groups) == set(held)
            y += 1.1 * ROW
        y += 0.3 * ROW
    reading = (
        "16 columns of down in 4 groups; left the group of each column of a rank, right the scales "
        "that the rank holds. In order, the scales are cut with the columns. With g_idx both ranks "
        "have columns of all groups and need all scales."
    )
    return figure(y, "".join(parts), reading)


def sizes() -> str:
    """Bits for a weight, with everything that belongs to it."""
    half, weight = {"group_size": 128, "scale_dtype": torch.float16}, torch.ones(1, 256, 512)
    cases = [
        ("bfloat16", 16.0),
        ("uint8b128, 128", _bits(weight, "uint8b128", **half)),
        ("Q8_0", _bits(weight, "Q8_0")),
        ("e4m3, blocks", _bits(weight, "e4m3")),
        ("uint4, 128", _bits(weight, "uint4", **half)),
        ("uint4b8, 128", _bits(weight, "uint4b8", **half)),
        ("nvfp4", _bits(weight, "nvfp4")),
        ("Q4_K", _bits(weight, "Q4_K")),
        ("mxfp4", _bits(weight, "mxfp4")),
    ]
    parts = []
    for line, (name, bits) in enumerate(cases):
        parts.append(label(line * ROW, name))
        parts.append(box(0, line * ROW, bits, f"{bits:.3f}", FILLED, colour=0, cell=34))
    reading = (
        "Bits for one weight of a matrix of 256 rows and 512 columns, scales and zero points "
        "included; scales of integer groups are float16, zero points one byte."
    )
    return figure(len(cases) * ROW, "".join(parts), reading)


def _digits(word: torch.Tensor, bits: int, count: int) -> list[int]:
    """The codes of a word, from the highest bits down."""
    number = int(word) & 0xFFFFFFFF
    return [number >> bits * place & (2**bits - 1) for place in reversed(range(count))]


def _in_groups(g_idx: torch.Tensor | None) -> QuantizedTensor:
    """4 rows and 16 columns in groups of 4, whose scales are their numbers."""
    words_, scales = torch.zeros(1, 4, 4, dtype=torch.int32), torch.arange(4.0).expand(1, 4, 4)
    return QuantizedTensor("uint8b128", words_, scales, None, g_idx, group_size=4, shape=(1, 4, 16))


def _scale_index(packed: QuantizedTensor | None, o: int, k: int) -> int:
    if packed is None:
        return o // 2 * 5 + k // 4
    if packed.format == "e4m3":
        return o if packed.scales.shape[1] > 1 else 0
    return int(column_groups(packed)[0, k]) + 5 * o


def _stored_zero(zero: int, convention: str) -> int | None:
    words, zeros = torch.zeros(1, 8, 1, dtype=torch.int32), torch.full((1, 8, 1), zero).byte()
    tensor = QuantizedTensor("uint4", words, torch.ones(1, 8, 1), zeros, shape=(1, 8, 8))
    try:
        return int(to_gptq(tensor, convention)[1]) & 15
    except ValueError:
        return None


def _marlin_places() -> dict[tuple[int, int, int], int]:
    """The thread of each (j, row, column) of a tile: words that hold their own thread."""
    lanes = torch.arange(32)[:, None].expand(32, 4 * 2)
    words_ = (lanes * 0x01010101).to(torch.int32).reshape(1, 1, 256)
    held = from_marlin_words(words_, 8)[0]
    return {(0, g, k): int(held[g, k]) for g in range(8) for k in range(16)}


def _first_word() -> list[tuple[int, int]]:
    """Row and column of each code of the first word, from the lowest bits up."""
    found = []
    for place in range(8):
        one = torch.zeros(1, 1, 128, dtype=torch.int64)
        one[0, 0, 0] = 1 << 4 * place
        row, column = from_marlin_words(one.to(torch.int32), 4)[0].nonzero()[0].tolist()
        found.append((row, column))
    return found


def _bits(weight, format, **options):
    return packed_bytes(quantize(weight, format, **options)) * 8 / weight.numel()


def _small(x, y, text, anchor):
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="currentColor" font-size="12">'
        f"{text}</text>"
    )


def _note(column, y, cell, text):
    return f'<text x="{LABEL + column * cell}" y="{y + 22}" fill="currentColor">{text}</text>'
