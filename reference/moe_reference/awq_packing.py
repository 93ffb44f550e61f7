"""AWQ checkpoints: the codes of `uint4` packed along the rows, in an order of their own.

A matrix is stored as [in, out], as in GPTQ, but a word holds codes of 8 neighbouring rows (out)
at one column (in), in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up. Zero points are
packed alike and are what they are: there is no one to add.

- `qweight`, int32 [E, D, O / 8].
- `qzeros`, int32 [E, G, O / 8].
- `scales`, float [E, G, O].

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

import torch

from moe_reference.bit_packing import pack_words, unpack_words
from moe_reference.checks import FLOATS, check_tensor
from moe_reference.integer_quantization import unpack_integer
from moe_reference.quantized_checks import check_quantized, check_rows, check_zeros
from moe_reference.quantized_tensors import QuantizedTensor

WORDS = (torch.int32,)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> QuantizedTensor:
    """An AWQ checkpoint's tensors of E experts, stacked: uint4, whose zero points are true ones.

    Args:
        qweight: int32 [E, D, O / 8].
        qzeros: int32 [E, G, O / 8].
        scales: [E, G, O], any float dtype.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes do not fit each other, G does not divide D, or 8 does not.

    Source: AutoAWQ, its GEMM version.

    >>> words = torch.tensor([[[0x75316420]]], dtype=torch.int32)
    >>> one = from_awq(words.expand(1, 8, 1), torch.zeros_like(words), torch.ones(1, 1, 8))
    >>> unpack_integer(one)[0, :, 0].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    check_tensor("scales", scales, ("E", "G", "O"), FLOATS)
    E, G, O = scales.shape
    check_rows("scales", O, 8)
    check_tensor("qweight", qweight, (E, "D", O // 8), WORDS)
    check_tensor("qzeros", qzeros, (E, G, O // 8), WORDS)
    D = qweight.shape[1]
    if G == 0 or D % G != 0 or D % 8 != 0:
        raise ValueError(
            f"qweight: expected columns that 8 and the {G} groups of scales divide, got {D}"
        )
    tensor = QuantizedTensor(
        "uint4",
        pack_words(unpack_words(qweight, 4, "awq").transpose(1, 2), 4),
        scales.transpose(1, 2).contiguous(),
        unpack_words(qzeros, 4, "awq").transpose(1, 2).contiguous(),
        group_size=-1 if G == 1 else D // G,
        shape=(E, O, D),
    )
    check_quantized("qweight", tensor)
    return tensor


def to_awq(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `from_awq`: qweight, qzeros and scales.

    Args:
        tensor: uint4 without g_idx; O fills whole words.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: another format, a g_idx, a zero point of 16, or an O that 8 does not divide.

    >>> words, zeros = torch.zeros(1, 8, 1, dtype=torch.int32), torch.ones(1, 8, 1).byte()
    >>> one = QuantizedTensor("uint4", words, torch.ones(1, 8, 1), zeros, shape=(1, 8, 8))
    >>> f"{int(to_awq(one)[1]):x}"
    '11111111'
    """
    check_quantized("tensor", tensor)
    if tensor.zeros is None or tensor.g_idx is not None:
        raise ValueError(
            f"tensor: expected uint4 without g_idx, which AWQ does not have, got {tensor.format}"
            f"{'' if tensor.g_idx is None else ' with g_idx'}"
        )
    assert tensor.scales is not None
    O = tensor.shape[1]
    check_rows("tensor.shape", O, 8)
    zeros_EGO = tensor.zeros[:, :O].transpose(1, 2)
    check_zeros(zeros_EGO, 0, 15, "4 bits")
    codes_EDO = unpack_integer(tensor).transpose(1, 2)
    scales_EGO = tensor.scales[:, :O].transpose(1, 2).contiguous()
    return pack_words(codes_EDO, 4, "awq"), pack_words(zeros_EGO, 4, "awq"), scales_EGO
