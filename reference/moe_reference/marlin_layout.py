r"""Marlin's layout: codes in the order in which a tensor core's threads want them.

A warp multiplies 16 columns (the sum runs over them) by 64 rows of a matrix at a time, as four
times two products of 16 x 8. In one of these, `mma.m16n8k16`, thread 4g + t of the 32 holds the
codes of row g at the columns 2t, 2t + 1, 2t + 8 and 2t + 9. So with

    column = 16 tile + 8 h + 2 t + p            h, p from 0 to 1, t from 0 to 3
    row    = 64 tile + 16 j + 8 b + g           j from 0 to 3, b from 0 to 1, g from 0 to 7

all that a thread needs of a tile is j, b, h and p. Marlin stores it in one piece: thread after
thread (g, then t), then j. With 4 bits a word holds p, b, h, the last one fastest: the two
neighbours p lie 16 bits apart, and `word >> 4i & 0x000f000f` gives both at once, as the two halves
of a register. With 8 bits a word holds p, h, and there is a word for each b.

    bits    28-31 24-27 20-23 16-19 12-15  8-11   4-7   0-3
    p           1     1     1     1     0     0     0     0
    b           1     1     0     0     1     1     0     0
    h           1     0     1     0     1     0     1     0

Scales, [E, G, O], are read with the codes where there are several groups: row 64 tile + 8 i + g
goes to 64 tile + 8 g + i. A single group is applied to the result, where a thread holds two
neighbouring rows: row 32 tile + 8 m + 2 t + p goes to 32 tile + 8 t + 2 m + p. Zero points go the
way of several groups, and are then packed in the order of AWQ.

With act-order the columns are sorted by group first, so that a group is in one piece, and the rows
of x have to be taken in the same order: `sort_indices`.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

from dataclasses import dataclass

import torch

from moe_reference.bit_packing import CODES, pack_words, unpack_words
from moe_reference.checks import IDS, check_tensor
from moe_reference.integer_quantization import column_groups, unpack_integer
from moe_reference.quantized_checks import check_quantized, check_zeros
from moe_reference.quantized_tensors import INTEGER_BITS, FormatName, QuantizedTensor

TILE_COLUMNS, TILE_ROWS = 16, 64


@dataclass(frozen=True, eq=False)
class MarlinTensor:
    """A matrix of each of E experts as Marlin's kernels read it.

    Attributes:
        format: uint4b8, uint8b128 or uint4; e4m3 of `marlin_float8`.
        qweight: int32 [E, D / 16, O · bits / 2].
        scales: [E, G, O], permuted.
        zeros: int32 [E, G, O / 8], permuted and packed, or None.
        g_idx: int32 [E, D], ascending, or None.
        sort_indices: int32 [E, D], the column that stands at each place, or None.
        group_size: columns that share a scale; -1 for all of them.
        shape: (E, O, D).
    """

    format: FormatName
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    g_idx: torch.Tensor | None
    sort_indices: torch.Tensor | None
    group_size: int
    shape: tuple[int, int, int]


def to_marlin(tensor: QuantizedTensor) -> MarlinTensor:
    """Repack an integer format for Marlin.

    Args:
        tensor: uint4b8, uint8b128 or uint4, without g_idx where it is uint4.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: another format, a shape that is not made of 64 x 16 tiles, a zero point of 16,
            or uint4 with g_idx.

    Source: Marlin (arXiv 2408.11743); vLLM, whose GPTQ and AWQ loaders repack to it.

    >>> words = torch.zeros(1, 64, 2, dtype=torch.int32)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 64, 1), shape=(1, 64, 16))
    >>> to_marlin(one).qweight.shape
    torch.Size([1, 1, 128])
    """
    codes_EOD = unpack_integer(tensor)
    bits = INTEGER_BITS[tensor.format]
    E, O, D = tensor.shape
    assert tensor.scales is not None
    zeros = g_idx = sort_indices = None
    if tensor.g_idx is not None:
        if tensor.format == "uint4":
            raise ValueError("tensor: expected no g_idx with uint4, which no kernel has, got one")
        groups_ED = column_groups(tensor)
        order_ED = groups_ED.argsort(dim=1, stable=True)
        codes_EOD = codes_EOD.gather(2, order_ED[:, None, :].expand(E, O, D))
        g_idx = groups_ED.gather(1, order_ED).to(torch.int32)
        sort_indices = order_ED.to(torch.int32)
    qweight = to_marlin_words(codes_EOD, bits)
    if tensor.zeros is not None:
        check_zeros(tensor.zeros[:, :O], 0, 15, "4 bits")
        zeros_EGO = _rows_by_thread(tensor.zeros[:, :O].transpose(1, 2))
        zeros = pack_words(zeros_EGO, 4, "awq")
    scales_EGO = permute_scales(tensor.scales[:, :O].transpose(1, 2))
    return MarlinTensor(
        tensor.format, qweight, scales_EGO, zeros, g_idx, sort_indices, tensor.group_size,
        tensor.shape,
    )  # fmt: skip


def from_marlin(marlin: MarlinTensor) -> QuantizedTensor:
    """The inverse of `to_marlin`.

    Args:
        marlin: qweight, scales and the rest, of the shapes that `MarlinTensor` says.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: another format, or shapes that do not fit each other.

    >>> words = torch.arange(128, dtype=torch.int32).view(1, 64, 2)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 64, 1), shape=(1, 64, 16))
    >>> bool((from_marlin(to_marlin(one)).packed == words).all())
    True
    """
    if marlin.format not in INTEGER_BITS:
        names = ", ".join(map(repr, INTEGER_BITS))
        raise ValueError(f"marlin.format: expected one of {names}, got {marlin.format!r}")
    bits = INTEGER_BITS[marlin.format]
    E, O, D = marlin.shape
    codes_EOD = from_marlin_words(marlin.qweight, bits)
    check_tensor("qweight's codes", codes_EOD, (E, O, D), CODES)
    check_tensor("scales", marlin.scales, (E, "G", O))
    G = marlin.scales.shape[1]
    zeros = g_idx = None
    if marlin.sort_indices is not None:
        assert marlin.g_idx is not None
        check_tensor("sort_indices", marlin.sort_indices, (E, D), IDS)
        check_tensor("g_idx", marlin.g_idx, (E, D), IDS)
        order_ED = marlin.sort_indices.to(torch.int64)
        codes_EOD = codes_EOD.scatter(2, order_ED[:, None, :].expand(E, O, D), codes_EOD)
        g_idx = marlin.g_idx.scatter(1, order_ED, marlin.g_idx)
    if marlin.zeros is not None:
        check_tensor("zeros", marlin.zeros, (E, G, O // 8), (torch.int32,))
        zeros_EGO = _rows_by_thread(unpack_words(marlin.zeros, 4, "awq"))
        zeros = zeros_EGO.transpose(1, 2).contiguous()
    tensor = QuantizedTensor(
        marlin.format,
        pack_words(codes_EOD, bits),
        permute_scales(marlin.scales).transpose(1, 2).contiguous(),
        zeros,
        g_idx,
        group_size=marlin.group_size,
        shape=marlin.shape,
    )
    check_quantized("marlin", tensor)
    return tensor


def to_marlin_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of any 4-bit or 8-bit format in Marlin's order.

    Args:
        codes: [E, O, D], uint8, int32 or int64; float8 weights as their bytes.
        bits: 4 or 8.

    Returns:
        [E, D / 16, O · bits / 2], int32.

    Raises:
        TypeError: the codes are no such integers.
        ValueError: D is no multiple of 16, or O none of 64.

    >>> to_marlin_words(torch.zeros(1, 64, 32, dtype=torch.uint8), 8).shape
    torch.Size([1, 2, 256])
    """
    check_tensor("codes", codes, ("E", "O", "D"), CODES)
    _, O, D = codes.shape
    if O % TILE_ROWS or D % TILE_COLUMNS:
        raise ValueError(
            f"codes: expected a multiple of {TILE_ROWS} rows (out) and of {TILE_COLUMNS} columns "
            f"(in), the tile of Marlin, got {O} and {D}"
        )
    tiles = codes.unflatten(2, (D // 16, 2, 4, 2)).unflatten(1, (O // 64, 4, 2, 8))
    # Dimensions: E, tile of rows, j, b, g, tile of columns, h, t, p.
    last = (8, 3, 6) if bits == 4 else (3, 8, 6)
    return pack_words(tiles.permute(0, 5, 1, 4, 7, 2, *last).flatten(2), bits)


def from_marlin_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `to_marlin_words`.

    Args:
        words: int32 [E, D / 16, O · bits / 2].
        bits: 4 or 8.

    Returns:
        [E, O, D], uint8.

    Raises:
        TypeError: not int32.
        ValueError: no whole number of tiles.

    >>> from_marlin_words(torch.zeros(1, 2, 256, dtype=torch.int32), 8).shape
    torch.Size([1, 64, 32])
    """
    check_tensor("words", words, ("E", "D / 16", "O · bits / 2"), (torch.int32,))
    if words.shape[2] % (TILE_ROWS * bits // 2):
        raise ValueError(
            f"words: expected a multiple of {TILE_ROWS * bits // 2} in the last dimension, the "
            f"tile of Marlin, got {words.shape[2]}"
        )
    codes = unpack_words(words, bits)
    tiles = codes.unflatten(2, (codes.shape[2] // 1024, 8, 4, 4, 2, 2, 2))
    # Dimensions: E, tile of columns, tile of rows, g, t, j, and p b h (4 bits) or b p h (8 bits).
    p, b, h = (6, 7, 8) if bits == 4 else (7, 6, 8)
    return tiles.permute(0, 2, 5, b, 3, 1, h, 4, p).flatten(5, 8).flatten(1, 4).contiguous()


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """To Marlin's order and back: a square is transposed, which is its own inverse.

    Args:
        scales: [E, G, O], any dtype, O a multiple of 64.

    >>> permute_scales(torch.arange(64).view(1, 1, 64)).flatten().tolist()[:8]
    [0, 1, 8, 9, 16, 17, 24, 25]
    """
    if scales.shape[1] == 1:
        runs = scales.unflatten(2, (-1, 4, 4, 2))
        return runs.transpose(3, 4).flatten(2).contiguous()
    return _rows_by_thread(scales)


def _rows_by_thread(rows_EGO: torch.Tensor) -> torch.Tensor:
    """Row 8 i + g of each 64 to place 8 g + i, and back."""
    return rows_EGO.unflatten(2, (-1, 8, 8)).transpose(3, 4).flatten(2).contiguous()
