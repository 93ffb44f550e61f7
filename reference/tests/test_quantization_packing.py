"""Where the bits stand: words, bytes, GPTQ, AWQ and Marlin.

Expected words are worked by hand, follow from NVIDIA's description of a fragment, or were written
down from what compressed-tensors 0.20 and vLLM's test helpers pack. None of them come from an
inverse of ours.
"""

import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.awq_packing import from_awq, to_awq
from moe_reference.bit_packing import (
    pack_nibbles,
    pack_words,
    unpack_nibbles,
    unpack_words,
)
from moe_reference.gptq_packing import from_gptq, to_gptq
from moe_reference.integer_quantization import (
    dequantize_integer,
    quantize_integer,
    unpack_integer,
)
from moe_reference.marlin_float8 import from_marlin_float8, to_marlin_float8
from moe_reference.marlin_layout import (
    from_marlin,
    from_marlin_words,
    to_marlin,
    to_marlin_words,
)
from moe_reference.quantized_tensors import QuantizedTensor

PARTS = ("packed", "scales", "zeros", "g_idx")
ORDERS = [(4, "plain"), (8, "plain"), (4, "awq")]


def unsigned(words):
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


def signed(*words):
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


def random_codes(*shape, bits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


def random_tensor(format="uint4", shape=(2, 64, 32), group_size=16, act_order=False, seed=0):
    E, O, D = shape
    bits = 8 if format == "uint8b128" else 4
    generator = torch.Generator().manual_seed(seed)
    G = 1 if group_size == -1 else D // group_size
    g_idx = None
    if act_order:
        places = torch.stack([torch.randperm(D, generator=generator) for _ in range(E)])
        g_idx = (places // (D // G)).to(torch.int32)
    return QuantizedTensor(
        format,
        pack_words(random_codes(*shape, bits=bits, seed=seed), bits),
        torch.rand(E, O, G, generator=generator) + 0.5,
        random_codes(E, O, G, seed=seed + 1) if format == "uint4" else None,
        g_idx,
        group_size=group_size,
        shape=shape,
    )


def assert_same(one, other):
    assert (one.format, one.group_size, one.shape) == (other.format, other.group_size, other.shape)
    for name in PARTS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


# words and bytes


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [i * 7 % 16 for i in range(16)], [0x1A3C5E70, 0x92B4D6F8]),
        (8, [i * 37 % 256 for i in range(16)], [0x6F4A2500, 0x03DEB994, 0x97724D28, 0x2B06E1BC]),
    ],
)
def test_words_are_those_of_compressed_tensors(bits, codes, expected):
    words = pack_words(torch.tensor(codes), bits)
    assert words.dtype == torch.int32
    assert unsigned(words) == expected


def test_the_order_of_awq_by_hand():
    # From the lowest bits up: the codes 0, 2, 4, 6, then 1, 3, 5, 7.
    assert unsigned(pack_words(torch.arange(8), 4, "awq")) == [0x75316420]
    assert unsigned(pack_words(torch.arange(8, 16), 4, "awq")) == [0xFDB9ECA8]


def test_the_first_code_of_a_byte_is_in_its_low_half():
    assert pack_nibbles(torch.tensor([[1, 15], [0, 8]])).tolist() == [[0xF1], [0x80]]


@pytest.mark.parametrize(("bits", "order"), ORDERS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_words_and_back(bits, order, data):
    in_word = 32 // bits
    rows, words = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    count = rows * words * in_word
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes = torch.tensor(codes, dtype=torch.uint8).view(rows, words * in_word)
    packed = pack_words(codes, bits, order)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_words(packed, bits, order), codes)


@pytest.mark.parametrize(("bits", "order"), ORDERS)
@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5))
@settings(deadline=None, max_examples=30)
def test_every_word_is_codes_and_the_same_word_again(bits, order, words):
    words = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(pack_words(unpack_words(words, bits, order), bits, order), words)


def test_every_byte_is_two_codes_and_the_same_byte_again():
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = unpack_nibbles(packed)
    assert codes.view(256, 2).tolist() == [[byte % 16, byte // 16] for byte in range(256)]
    assert torch.equal(pack_nibbles(codes), packed)


@pytest.mark.parametrize("strided", [torch.Tensor.t, lambda x: x.flip(0), lambda x: x[:, ::2]])
def test_strides_do_not_matter(strided):
    codes = strided(random_codes(16, 32))
    assert torch.equal(unpack_words(pack_words(codes, 4), 4), codes.contiguous())
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes.contiguous())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_words(torch.zeros(2, 12).byte(), 4), ValueError, "codes: .* multiple of 8"),
        (lambda: pack_words(torch.tensor(0), 4), ValueError, "codes: .* multiple of 8"),
        (lambda: pack_words(torch.full((8,), 16), 4), ValueError, "codes: .* 0 to 15, got 16"),
        (lambda: pack_words(torch.full((8,), -1), 4), ValueError, "codes: .* 0 to 15, got -1"),
        (lambda: pack_words(torch.zeros(8), 4), TypeError, "codes"),
        (lambda: pack_words(torch.zeros(8).byte(), 3), ValueError, "bits: expected 4 or 8, got 3"),
        (lambda: pack_words(torch.zeros(8).byte(), 8, "awq"), ValueError, "order"),
        (lambda: unpack_words(torch.zeros(8), 4), TypeError, "words"),
        (lambda: pack_nibbles(torch.zeros(3).byte()), ValueError, "codes: .* multiple of 2"),
        (lambda: unpack_nibbles([1]), TypeError, "packed"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# GPTQ and AWQ


def test_a_gptq_checkpoint_by_hand():
    """Two groups of 8 columns, 8 rows; row o has the code (column + o) mod 16."""
    qweight = torch.zeros(1, 2, 8, dtype=torch.int32)
    for o in range(8):
        for word in range(2):
            total = sum((8 * word + i + o) % 16 * 16**i for i in range(8))
            qweight[0, word, o] = total - 2**32 if total >= 2**31 else total
    # The first group's zero points 1 to 8, stored less one in v1; those of the second are all 2.
    qzeros = signed(0x76543210, 0x11111111).view(1, 2, 1)
    scales = torch.tensor([1.0, 10.0]).view(1, 2, 1).expand(1, 2, 8)
    read = dequantize_integer(from_gptq(qweight, qzeros, scales, None, 4, "v1", symmetric=False))
    o, k = torch.arange(8)[:, None], torch.arange(16)[None]
    expected = torch.where(k < 8, (k + o) % 16 - (o + 1), 10 * ((k + o) % 16 - 2))
    assert torch.equal(read[0], expected.to(torch.float32))
    # Read as v2, every weight is one step too great.
    other = dequantize_integer(from_gptq(qweight, qzeros, scales, None, 4, "v2", symmetric=False))
    assert torch.equal(other - read, scales.transpose(1, 2).repeat_interleave(8, dim=2))


def test_the_conventions_differ_where_one_more_wraps():
    qweight = torch.zeros(1, 1, 8, dtype=torch.int32)
    fifteens = torch.full((1, 1, 1), -1, dtype=torch.int32)
    zeros = [
        int(from_gptq(qweight, fifteens, torch.ones(1, 1, 8), None, 4, each, False).zeros[0, 0, 0])
        for each in ("v1", "v1_wrapped", "v2")
    ]
    assert zeros == [16, 0, 15]


@pytest.mark.parametrize(
    ("bits", "stored", "zero_points"),
    [(4, 0x77777777, "v1"), (4, 0x88888888, "v2"), (8, 0x7F7F7F7F, "v1"), (8, 0x80808080, "v2")],
)
def test_symmetric_checkpoints_have_the_middle_as_zero_point(bits, stored, zero_points):
    in_word = 32 // bits
    qweight = torch.zeros(1, 4, 8, dtype=torch.int32)
    qzeros = signed(*[stored] * (8 // in_word)).view(1, 1, -1)
    scales = torch.full((1, 1, 8), 0.5)
    read = from_gptq(qweight, qzeros, scales, None, bits, zero_points, symmetric=True)
    assert read.format == ("uint4b8" if bits == 4 else "uint8b128")
    assert dequantize_integer(read).unique().tolist() == [-(2.0 ** (bits - 2))]
    wrong = "v2" if zero_points == "v1" else "v1"
    with pytest.raises(ValueError, match=f"qzeros: .* when read as {wrong}"):
        from_gptq(qweight, qzeros, scales, None, bits, wrong, symmetric=True)


@pytest.mark.parametrize("format", ["uint4b8", "uint8b128", "uint4"])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("zero_points", ["v1_wrapped", "v2"])
def test_gptq_and_back(format, group_size, zero_points):
    tensor = random_tensor(format, group_size=group_size, act_order=group_size != -1)
    bits = 8 if format == "uint8b128" else 4
    stored = to_gptq(tensor, zero_points)
    assert stored[0].shape == (2, 32 * bits // 32, 64)
    assert stored[1].shape == (2, tensor.scales.shape[2], 64 * bits // 32)
    assert_same(from_gptq(*stored, bits, zero_points, format != "uint4"), tensor)


def test_a_g_idx_in_order_says_nothing():
    tensor = random_tensor()
    stored = to_gptq(tensor, "v2")
    assert stored[3].shape == (2, 32)
    assert from_gptq(*stored, 4, "v2", symmetric=False).g_idx is None


def test_zero_points_that_a_convention_lacks_are_refused():
    tensor = random_tensor()
    for zero, refused in [(0, ["v1"]), (16, ["v1_wrapped", "v2"])]:
        tensor.zeros.fill_(zero)
        for convention in ("v1", "v1_wrapped", "v2"):
            if convention in refused:
                with pytest.raises(ValueError, match=r"tensor\.zeros"):
                    to_gptq(tensor, convention)
            else:
                stored = to_gptq(tensor, convention)
                assert_same(from_gptq(*stored, 4, convention, symmetric=False), tensor)
    with pytest.raises(ValueError, match=r"tensor\.zeros"):
        to_awq(tensor)


@pytest.mark.parametrize("group_size", [16, -1])
def test_awq_and_back(group_size):
    tensor = random_tensor(group_size=group_size)
    stored = to_awq(tensor)
    assert stored[0].shape == (2, 32, 8)
    assert_same(from_awq(*stored), tensor)


def test_an_awq_checkpoint_by_hand():
    # One column of words: rows 0 to 7 have the codes 0 to 7 at every column, zero points 7 to 0.
    qweight = signed(*[0x75316420] * 8).view(1, 8, 1)
    qzeros = signed(0x02461357).view(1, 1, 1)
    read = dequantize_integer(from_awq(qweight, qzeros, torch.ones(1, 1, 8)))
    assert read[0, :, 0].tolist() == [-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0]


@st.composite
def packed_as(draw, formats, awq=False):
    """A tensor of any size that words hold, with one group or many; zero points from 0 to 15."""
    format = draw(st.sampled_from(formats))
    in_word = 4 if format == "uint8b128" else 8
    D = in_word * draw(st.integers(1, 6))
    groups = draw(st.sampled_from([G for G in range(1, D + 1) if D % G == 0]))
    shape = (draw(st.integers(1, 3)), in_word * draw(st.integers(1, 4)), D)
    order = not awq and draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    return random_tensor(format, shape, -1 if groups == 1 else D // groups, order, seed)


def word_of(codes, bits, places):
    """Eight or four codes in one word, as Python's integers have it."""
    return sum(int(codes[place]) << bits * i for i, place in enumerate(places))


@pytest.mark.parametrize("zero_points", ["v1", "v1_wrapped", "v2"])
@settings(deadline=None, max_examples=25)
@given(tensor=packed_as(["uint4b8", "uint8b128", "uint4"]), data=st.data())
def test_gptq_and_back_at_any_size(zero_points, tensor, data):
    bits = 8 if tensor.format == "uint8b128" else 4
    in_word, (E, O, D) = 32 // bits, tensor.shape
    G = tensor.scales.shape[2]
    if tensor.zeros is not None and zero_points == "v1":
        tensor.zeros.add_(1)
    qweight, qzeros, scales, g_idx = stored = to_gptq(tensor, zero_points)
    assert qweight.shape == (E, D // in_word, O)
    assert qzeros.shape == (E, G, O // in_word)
    assert torch.equal(scales, tensor.scales.transpose(1, 2))
    e, w, o = (data.draw(st.integers(0, size - 1)) for size in qweight.shape)
    codes = unpack_integer(tensor)[e, o, in_word * w : in_word * (w + 1)]
    assert unsigned(qweight[e, w, o]) == [word_of(codes, bits, range(in_word))]
    e, g, w = (data.draw(st.integers(0, size - 1)) for size in qzeros.shape)
    if tensor.zeros is None:
        zeros = torch.full((in_word,), 2 ** (bits - 1))
    else:
        zeros = tensor.zeros[e, in_word * w : in_word * (w + 1), g].int()
    zeros = (zeros - int(zero_points != "v2")) % 2**bits
    assert unsigned(qzeros[e, g, w]) == [word_of(zeros, bits, range(in_word))]
    in_order = torch.arange(D).expand(E, D) // (D // G)
    if tensor.g_idx is None or torch.equal(tensor.g_idx.long(), in_order):
        assert torch.equal(g_idx.long(), in_order)
        tensor = replace(tensor, g_idx=None)
    assert_same(from_gptq(*stored, bits, zero_points, tensor.format != "uint4"), tensor)


@settings(deadline=None, max_examples=40)
@given(tensor=packed_as(["uint4"], awq=True), data=st.data())
def test_awq_and_back_at_any_size(tensor, data):
    E, O, D = tensor.shape
    qweight, qzeros, scales = stored = to_awq(tensor)
    assert (qweight.shape, qzeros.shape) == ((E, D, O // 8), (E, scales.shape[1], O // 8))
    e, k, w = (data.draw(st.integers(0, size - 1)) for size in qweight.shape)
    codes = unpack_integer(tensor)[e, 8 * w : 8 * (w + 1), k]
    assert unsigned(qweight[e, k, w]) == [word_of(codes, 4, (0, 2, 4, 6, 1, 3, 5, 7))]
    assert_same(from_awq(*stored), tensor)


@pytest.mark.parametrize("format", ["uint4b8", "uint8b128", "uint4"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_sizes_that_words_or_groups_do_not_divide_are_refused(format, data):
    bits = 8 if format == "uint8b128" else 4
    in_word = 32 // bits
    wrong = data.draw(st.integers(1, 40).filter(lambda size: size % in_word))
    D = in_word * data.draw(st.integers(1, 4))
    with pytest.raises(ValueError, match=f"multiple of {in_word} rows .*, got {wrong}$"):
        to_gptq(random_tensor(format, (1, wrong, D), -1), "v2")
    with pytest.raises(ValueError, match=f"multiple of {in_word} columns, one word of .* {wrong}$"):
        quantize_integer(torch.zeros(1, 1, wrong), format, group_size=-1)
    B = data.draw(st.integers(1, D).filter(lambda size: D % size))
    with pytest.raises(ValueError, match=f"multiple of {B} columns, the group of .*, got {D}$"):
        quantize_integer(torch.zeros(1, 1, D), format, group_size=B)
    G = data.draw(st.integers(1, 2 * D).filter(lambda count: D % count))
    words = torch.zeros(1, D // in_word, in_word, dtype=torch.int32)
    zeros, scales = torch.zeros(1, G, 1, dtype=torch.int32), torch.ones(1, G, in_word)
    with pytest.raises(ValueError, match=f"groups that divide {D} columns evenly, got {G} groups"):
        from_gptq(words, zeros, scales, None, bits, "v2", symmetric=False)
    if format == "uint4":
        with pytest.raises(ValueError, match=f"multiple of 8 rows .*, got {wrong}$"):
            to_awq(random_tensor(format, (1, wrong, D), -1))
        words = torch.zeros(1, wrong, 1, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"columns that 8 and the 1 groups .*, got {wrong}$"):
            from_awq(words, torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 8))


def test_what_gptq_and_awq_cannot_hold_is_refused():
    words = torch.zeros(1, 2, 8, dtype=torch.int32)
    zeros, scales = torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 8)
    with pytest.raises(ValueError, match="zero_points"):
        from_gptq(words, zeros, scales, None, 4, "v3", False)
    with pytest.raises(ValueError, match="symmetric: expected True with 8 bits"):
        from_gptq(words, zeros.expand(1, 1, 2), scales, None, 8, "v2", False)
    with pytest.raises(ValueError, match="groups that divide 16"):
        from_gptq(words, zeros.expand(1, 3, 1), scales.expand(1, 3, 8), None, 4, "v2", False)
    with pytest.raises(ValueError, match="g_idx"):
        from_gptq(words, zeros, scales, torch.zeros(1, 8).int(), 4, "v2", False)
    with pytest.raises(ValueError, match=r"scales: .* multiple of 8 rows"):
        from_awq(words[:, :, :1], zeros, torch.ones(1, 1, 12))
    with pytest.raises(ValueError, match=r"tensor\.shape: .* multiple of 8 rows"):
        to_awq(random_tensor(shape=(1, 12, 16)))
    with pytest.raises(ValueError, match="AWQ does not have"):
        to_awq(random_tensor("uint4b8"))
    with pytest.raises(ValueError, match="with g_idx"):
        to_awq(random_tensor(act_order=True))


# Marlin


def fragment_word(codes, bits, tile, lane, j, word):
    """A word by the definition of a B fragment of mma.m16n8k16 (PTX ISA, "Matrix fragments").

    Thread `lane` holds of the 16 x 8 matrix, in its registers b0 to b3, the rows (lane % 4) · 2 +
    (i & 1) + 8 (i >= 2) of column lane // 4.
    """

    def held(block, i):
        k = lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0)
        return int(codes[64 * tile + 16 * j + 8 * block + lane // 4, k])

    if bits == 8:
        return sum(held(word, i) << 8 * place for place, i in enumerate((0, 2, 1, 3)))
    order = [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]
    return sum(held(block, i) << 4 * place for place, (block, i) in enumerate(order))


@pytest.mark.parametrize("bits", [4, 8])
def test_marlin_words_are_fragments(bits):
    codes = random_codes(1, 128, 16, bits=bits)
    words = unsigned(to_marlin_words(codes, bits))
    expected = [
        fragment_word(codes[0], bits, tile, lane, j, word)
        for tile in range(2)
        for lane in range(32)
        for j in range(4)
        for word in range(bits // 4)
    ]
    assert words == expected


@pytest.mark.parametrize(
    ("bits", "first", "checksum"),
    [
        (4, [0x5DD50880, 0x5DD50880], 1051221431),
        (8, [0x4D252800, 0xA57D8058], 2384124842),
    ],
)
def test_marlin_words_are_those_of_vllm(bits, first, checksum):
    k, n = torch.arange(32)[None, None], torch.arange(128)[None, :, None]
    words = to_marlin_words((37 * k + 11 * n) % 2**bits, bits)
    assert unsigned(words)[:2] == first
    assert zlib.crc32(words.numpy().tobytes()) == checksum


@pytest.mark.parametrize("bits", [4, 8])
@settings(deadline=None, max_examples=10)
@given(E=st.integers(0, 2), rows=st.integers(0, 3), columns=st.integers(0, 3), seed=st.integers(0))
def test_marlin_words_and_back(bits, E, rows, columns, seed):
    codes = random_codes(E, 64 * rows, 16 * columns, bits=bits, seed=seed % 2**32)
    words = to_marlin_words(codes, bits)
    assert words.shape == (E, columns, 64 * rows * bits // 2)
    assert torch.equal(from_marlin_words(words, bits), codes)


def test_scales_and_zero_points_go_where_their_rows_go():
    tensor = random_tensor(shape=(1, 128, 32))
    tensor.scales.copy_(torch.arange(128.0)[:, None].expand(128, 2))
    tensor.zeros.copy_((torch.arange(128) % 16)[:, None].expand(128, 2))
    marlin = to_marlin(tensor)
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    assert marlin.scales[0, 0].tolist() == grouped + [64 + row for row in grouped]
    # Of each 8, the order of AWQ: thread 0 has the zero points of rows 0, 8, 16 and so on.
    assert unsigned(marlin.zeros)[0] == 0x88880000
    single = to_marlin(random_tensor("uint4b8", shape=(1, 64, 32), group_size=-1))
    alone = random_tensor("uint4b8", shape=(1, 64, 32), group_size=-1).scales[0, :, 0]
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    assert torch.equal(single.scales[0, 0], alone[order + [32 + row for row in order]])


@pytest.mark.parametrize("format", ["uint4b8", "uint8b128", "uint4"])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_marlin_and_back(format, group_size, act_order):
    tensor = random_tensor(format, group_size=group_size, act_order=act_order)
    if act_order and format == "uint4":
        with pytest.raises(ValueError, match="no g_idx with uint4"):
            to_marlin(tensor)
        return
    assert_same(from_marlin(to_marlin(tensor)), tensor)


def marlin_row(place, single):
    """The row whose scale stands at a place, as vLLM's two tables have it."""
    if single:
        table = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    else:
        table = [i + 8 * j for i in range(8) for j in range(8)]
    return place // len(table) * len(table) + table[place % len(table)]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@settings(deadline=None, max_examples=8)
@given(
    E=st.integers(1, 2), tiles=st.integers(1, 2), columns=st.integers(1, 5),
    B=st.sampled_from([16, 24, 128]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_float8_for_marlin_and_back(granularity, E, tiles, columns, B, seed):
    O, D = 64 * tiles, 16 * columns
    codes = random_codes(E, O, D, bits=8, seed=seed)
    sizes = {"tensor": (1, 1), "channel": (O, 1), "block": (-(-O // B), -(-D // B))}
    scales = torch.rand(E, *sizes[granularity], generator=torch.Generator().manual_seed(seed))
    tensor = QuantizedTensor(
        "e4m3",
        codes.view(torch.float8_e4m3fn),
        scales,
        group_size=B if granularity == "block" else -1,
        shape=(E, O, D),
    )
    marlin = to_marlin_float8(tensor)
    # A fragment of the first tile of columns, and every scale by the rows and columns it is for.
    assert unsigned(marlin.qweight[0, 0, :2]) == [
        fragment_word(codes[0, :, :16], 8, 0, 0, 0, word) for word in range(2)
    ]
    G = marlin.scales.shape[1]
    assert marlin.scales.shape == (E, sizes[granularity][1], O)
    for e in range(E):
        for g in range(G):
            rows = [marlin_row(place, G == 1) for place in range(O)]
            if granularity == "block":
                rows = [row // B for row in rows]
            elif granularity == "tensor":
                rows = [0] * O
            assert marlin.scales[e, g].tolist() == scales[e, rows, g].tolist()
    back = from_marlin_float8(marlin)
    if granularity == "tensor":
        tensor = replace(tensor, scales=scales.expand(E, O, 1).contiguous())
    assert (back.group_size, back.shape) == (tensor.group_size, tensor.shape)
    assert torch.equal(back.packed.view(torch.uint8), codes)
    assert torch.equal(back.scales, tensor.scales)


def test_what_is_no_float8_for_marlin_is_refused():
    with pytest.raises(ValueError, match="tensor: expected the format 'e4m3', got 'uint4'"):
        to_marlin_float8(random_tensor())
    codes, scales = random_codes(1, 64, 16, bits=8), torch.ones(1, 4, 1)
    tensor = QuantizedTensor(
        "e4m3", codes.view(torch.float8_e4m3fn), scales, group_size=16, shape=(1, 64, 16)
    )
    marlin = to_marlin_float8(tensor)
    marlin.scales[0, 0, 3] = 2.0
    with pytest.raises(ValueError, match="scales: expected the same for all rows of a block"):
        from_marlin_float8(marlin)
    with pytest.raises(ValueError, match="scales"):
        from_marlin_float8(replace(marlin, scales=marlin.scales[:, :, :32]))


def test_each_way_back_from_marlin_has_its_formats():
    integers = to_marlin(random_tensor("uint8b128", group_size=-1))
    with pytest.raises(ValueError, match=r"marlin\.format: expected 'e4m3', got 'uint8b128'"):
        from_marlin_float8(integers)
    codes, scales = random_codes(1, 64, 16, bits=8), torch.ones(1, 1, 1)
    tensor = QuantizedTensor("e4m3", codes.view(torch.float8_e4m3fn), scales, shape=(1, 64, 16))
    expected = "marlin.format: expected one of 'uint4b8', 'uint8b128', 'uint4', got 'e4m3'"
    with pytest.raises(ValueError, match=expected):
        from_marlin(to_marlin_float8(tensor))


def test_a_block_of_float8_may_have_nan_for_a_scale():
    codes, scales = random_codes(1, 64, 16, bits=8), torch.rand(1, 4, 1)
    scales[0, 1] = float("nan")
    tensor = QuantizedTensor(
        "e4m3", codes.view(torch.float8_e4m3fn), scales, group_size=16, shape=(1, 64, 16)
    )
    marlin = to_marlin_float8(tensor)
    back = from_marlin_float8(marlin)
    torch.testing.assert_close(back.scales, scales, rtol=0, atol=0, equal_nan=True)
    marlin.scales[0, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="scales: expected the same for all rows of a block"):
        from_marlin_float8(marlin)


def test_act_order_sorts_the_columns_by_group():
    tensor = random_tensor("uint4b8", act_order=True)
    marlin = to_marlin(tensor)
    codes = from_marlin_words(marlin.qweight, 4)
    for e in range(2):
        assert marlin.g_idx[e].tolist() == [0] * 16 + [1] * 16
        order = marlin.sort_indices[e].tolist()
        assert sorted(order) == list(range(32))
        assert torch.equal(codes[e], unpack_integer(tensor)[e][:, order])


def test_what_is_no_tile_is_refused():
    with pytest.raises(ValueError, match="multiple of 64 rows"):
        to_marlin_words(random_codes(1, 32, 16), 4)
    with pytest.raises(ValueError, match="multiple of 64 rows"):
        to_marlin(random_tensor(shape=(1, 64, 24), group_size=8))
    with pytest.raises(ValueError, match="multiple of 128"):
        from_marlin_words(torch.zeros(1, 1, 64, dtype=torch.int32), 4)
