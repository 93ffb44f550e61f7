"""Bit packing: codes of 4 or 8 bits side by side in one integer, and back.

A code is a small unsigned integer, 0 to 15 or 0 to 255. What number it stands for is a matter of
the format; here it is bits, and the question is only which bits.

int32 words, plain order (GPTQ, compressed-tensors): code i of a word in bits `4i` to `4i + 3`. AWQ
order: the codes at even places first, so that a kernel that splits a word by one mask and one shift
gets neighbours in pairs.

    bits       28-31 24-27 20-23 16-19 12-15  8-11   4-7   0-3
    plain          7     6     5     4     3     2     1     0
    awq            7     5     3     1     6     4     2     0

Bytes (mxfp4, nvfp4): the first of two codes in the low half.

Dimension key: V codes, W words or bytes, F codes in one word.
"""

from typing import Literal

import torch

from moe_reference.checks import check_tensor

Order = Literal["plain", "awq"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The code that stands in bits 4i to 4i + 3."""

CODES = (torch.uint8, torch.int32, torch.int64)


def pack_words(codes: torch.Tensor, bits: int, order: Order = "plain") -> torch.Tensor:
    """Codes side by side along the last dimension, 8 of 4 bits or 4 of 8 bits in a word.

    Args:
        codes: [..., V], uint8, int32 or int64, from 0 to 2^bits - 1.
        bits: 4 or 8.
        order: `awq` exists for 4 bits only.

    Returns:
        [..., V · bits / 32], int32, contiguous. The highest bit of a word is its sign.

    Raises:
        TypeError: the codes are no such integers.
        ValueError: V does not fill whole words, a code needs more bits, or there is no such order.

    >>> [f"{word:x}" for word in pack_words(torch.arange(8), bits=4).tolist()]
    ['76543210']
    >>> [f"{word:x}" for word in pack_words(torch.arange(8), bits=4, order="awq").tolist()]
    ['75316420']
    """
    places = _places(bits, order)
    _check_codes(codes, 2**bits, len(places))
    codes_WF = codes.to(torch.int64).unflatten(-1, (codes.shape[-1] // len(places), len(places)))
    shifts_F = torch.arange(len(places), device=codes.device) * bits
    words_W = (codes_WF[..., places] << shifts_F).sum(dim=-1)
    # Conversion of int64 to int32 keeps the low 32 bits.
    return words_W.to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, order: Order = "plain") -> torch.Tensor:
    """The inverse of `pack_words`.

    Args:
        words: [..., W], int32.
        bits: 4 or 8.
        order: the one that they were packed in.

    Returns:
        [..., W · 32 / bits], uint8, contiguous.

    Raises:
        TypeError: the words are not int32.
        ValueError: there are not so many bits, or there is no such order.

    >>> unpack_words(torch.tensor([-1, 0x10], dtype=torch.int32), bits=8).tolist()
    [255, 255, 255, 255, 16, 0, 0, 0]
    """
    places = _places(bits, order)
    check_tensor("words", words, _any_shape(words), (torch.int32,))
    shifts_F = torch.arange(len(places), device=words.device) * bits
    # The mask takes away the copies of the sign that the shift draws in.
    shifted_WF = (words.to(torch.int64)[..., None] >> shifts_F) & (2**bits - 1)
    codes_WF = torch.empty_like(shifted_WF)
    codes_WF[..., places] = shifted_WF
    return codes_WF.flatten(-2).to(torch.uint8)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits in bytes, the first of two in the low half.

    Args:
        codes: [..., V], uint8, int32 or int64, from 0 to 15.

    Returns:
        [..., V / 2], uint8, contiguous.

    Raises:
        TypeError: the codes are no such integers.
        ValueError: V is odd, or a code needs more bits.

    >>> [f"{byte:02x}" for byte in pack_nibbles(torch.tensor([1, 2, 3, 15])).tolist()]
    ['21', 'f3']
    """
    _check_codes(codes, 16, 2)
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`.

    Args:
        packed: [..., W], uint8.

    Returns:
        [..., 2 W], uint8, contiguous.

    Raises:
        TypeError: not uint8.

    >>> unpack_nibbles(torch.tensor([0x21, 0xF3], dtype=torch.uint8)).tolist()
    [1, 2, 3, 15]
    """
    check_tensor("packed", packed, _any_shape(packed), (torch.uint8,))
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _places(bits: int, order: str) -> list[int]:
    """For each place in a word, from the lowest bits up, the code that stands there."""
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if order == "plain":
        return list(range(32 // bits))
    if order == "awq" and bits == 4:
        return list(AWQ_ORDER)
    raise ValueError(f"order: expected 'plain', or 'awq' with 4 bits, got {order!r} with {bits}")


def _check_codes(codes: torch.Tensor, end: int, in_one: int) -> None:
    check_tensor("codes", codes, _any_shape(codes), CODES)
    if codes.ndim == 0 or codes.shape[-1] % in_one != 0:
        raise ValueError(
            f"codes: expected a multiple of {in_one} in the last dimension, since {in_one} are "
            f"packed into one, got {list(codes.shape)}"
        )
    if codes.numel() > 0 and not 0 <= int(codes.min()) <= int(codes.max()) < end:
        raise ValueError(
            f"codes: expected numbers from 0 to {end - 1}, got {int(codes.min())} to "
            f"{int(codes.max())}"
        )


def _any_shape(tensor: object) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))
