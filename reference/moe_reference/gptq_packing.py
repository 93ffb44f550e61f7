r"""GPTQ checkpoints: the codes of integer formats in another order, and zero points with a history.

A matrix is stored as [in, out]: a column there is a row here.

- `qweight`, int32 [E, D · bits / 32, O]: a word holds codes of one row, in plain order.
- `qzeros`, int32 [E, G, O · bits / 32]: a word holds zero points of neighbouring rows, in plain
  order.
- `scales`, float [E, G, O], and `g_idx`, int [E, D].

**Zero points.** The first format (v1) stores z - 1. A z of 0 cannot be stored so: -1 wraps round to
15, which kernels then read as 16, or wrap back to 0. The second one (v2) stores z. Nothing in the
tensors says which it is, and there are files that say v1 and hold v2; so it is an argument.

- `v1`: z = stored + 1, from 1 to 16, as the ExLlama kernels compute it.
- `v1_wrapped`: z = (stored + 1) mod 16, from 0 to 15, as AutoGPTQ's PyTorch code computes it.
- `v2`: z = stored.

Symmetric checkpoints have zero points, too, all of them 8 (128 with 8 bits). Where they are not,
the convention is the wrong one, and that is an error here.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns,
F codes in one word.
"""

from typing import Literal, get_args

import torch

from moe_reference.bit_packing import pack_words, unpack_words
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.integer_quantization import column_groups, unpack_integer
from moe_reference.quantized_checks import check_quantized, check_rows, check_zeros
from moe_reference.quantized_tensors import INTEGER_BITS, FormatName, QuantizedTensor

ZeroPoints = Literal["v1", "v1_wrapped", "v2"]
WORDS = (torch.int32,)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    zero_points: ZeroPoints,
    symmetric: bool,
) -> QuantizedTensor:
    """A GPTQ checkpoint's tensors of E experts, stacked.

    Args:
        qweight: int32 [E, D · bits / 32, O].
        qzeros: int32 [E, G, O · bits / 32].
        scales: [E, G, O], any float dtype.
        g_idx: int32 or int64 [E, D], or None. One that counts up in order becomes None.
        bits: 4 or 8.
        zero_points: the convention that they are stored in.
        symmetric: whether all zero points are the middle one; 8 bits have no others.

    Returns:
        uint4b8 or uint8b128 where symmetric, else uint4.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes do not fit each other, G does not divide D, or zero points that should
            be the middle one are not.

    Source: AutoGPTQ; GPTQModel; vLLM #26092 and #38966 for the conventions, AutoGPTQ #484 and
    GPTQModel #2350 for the zero point that wraps.

    >>> words, sevens = torch.zeros(1, 1, 8, dtype=torch.int32), torch.tensor([[[0x77777777]]])
    >>> scales = torch.ones(1, 1, 8)
    >>> from_gptq(words, sevens.to(torch.int32), scales, None, 4, "v1", symmetric=True).format
    'uint4b8'
    """
    _check_convention(zero_points, bits)
    F = 32 // bits
    check_tensor("scales", scales, ("E", "G", "O"), FLOATS)
    E, G, O = scales.shape
    check_rows("scales", O, F)
    check_tensor("qweight", qweight, (E, f"D / {F}", O), WORDS)
    check_tensor("qzeros", qzeros, (E, G, O // F), WORDS)
    D = qweight.shape[1] * F
    if g_idx is not None:
        check_tensor("g_idx", g_idx, (E, D), IDS)
    if G == 0 or D % G != 0:
        raise ValueError(f"scales: expected groups that divide {D} columns evenly, got {G} groups")
    stored_EGO = unpack_words(qzeros, bits)
    zeros_EOG = _true_zeros(stored_EGO, zero_points, bits).transpose(1, 2).contiguous()
    format: FormatName = "uint4"
    if symmetric:
        format = "uint4b8" if bits == 4 else "uint8b128"
        _check_middle(zeros_EOG, bits, zero_points)
    elif bits == 8:
        raise ValueError("symmetric: expected True with 8 bits, got False")
    group_size = -1 if G == 1 else D // G
    codes_EOD = unpack_words(qweight.transpose(1, 2), bits)
    tensor = QuantizedTensor(
        format,
        pack_words(codes_EOD, bits),
        scales.transpose(1, 2).contiguous(),
        None if symmetric else zeros_EOG,
        None if g_idx is None or _in_order(g_idx, D // G) else g_idx.clone(),
        group_size=group_size,
        shape=(E, O, D),
    )
    check_quantized("qweight", tensor)
    return tensor


def to_gptq(tensor: QuantizedTensor, zero_points: ZeroPoints) -> tuple[torch.Tensor, ...]:
    """The inverse of `from_gptq`: qweight, qzeros, scales and g_idx, the last one always there.

    Args:
        tensor: uint4b8, uint8b128 or uint4; O fills whole words.
        zero_points: the convention to store them in.

    Raises:
        TypeError: not a `QuantizedTensor`.
        ValueError: another format, a zero point that the convention cannot hold, or an O that does
            not fill whole words.

    >>> words = torch.zeros(1, 8, 1, dtype=torch.int32)
    >>> one = QuantizedTensor("uint4b8", words, torch.ones(1, 8, 1), shape=(1, 8, 8))
    >>> [f"{int(to_gptq(one, version)[1]):x}" for version in ("v1", "v2")]
    ['77777777', '-77777778']
    """
    codes_EOD = unpack_integer(tensor)
    bits = INTEGER_BITS[tensor.format]
    _check_convention(zero_points, bits)
    assert tensor.scales is not None
    O = tensor.shape[1]
    scales_EGO = tensor.scales[:, :O].transpose(1, 2).contiguous()
    if tensor.zeros is None:
        zeros_EGO = torch.full(scales_EGO.shape, 2 ** (bits - 1), device=codes_EOD.device)
    else:
        zeros_EGO = tensor.zeros[:, :O].transpose(1, 2).to(torch.int64)
    stored_EGO = zeros_EGO - (0 if zero_points == "v2" else 1)
    if zero_points == "v1_wrapped":
        stored_EGO = stored_EGO.where(zeros_EGO != 0, 2**bits - 1)
    allowed = {"v1": (1, 2**bits), "v1_wrapped": (0, 2**bits - 1), "v2": (0, 2**bits - 1)}
    check_zeros(zeros_EGO, *allowed[zero_points], f"zero points of {zero_points}")
    check_rows("tensor.shape", O, 32 // bits)
    qweight = pack_words(codes_EOD, bits).transpose(1, 2).contiguous()
    g_idx = column_groups(tensor).to(torch.int32).contiguous()
    return qweight, pack_words(stored_EGO, bits), scales_EGO, g_idx


def _true_zeros(stored: torch.Tensor, zero_points: ZeroPoints, bits: int) -> torch.Tensor:
    zeros = stored.to(torch.int32) + (0 if zero_points == "v2" else 1)
    if zero_points == "v1_wrapped":
        zeros = zeros % 2**bits
    # 256, of a v1 file with 8 bits, has no place in uint8; `_check_middle` refuses any but 128.
    return zeros.clamp(max=255).to(torch.uint8)


def _check_middle(zeros: torch.Tensor, bits: int, zero_points: str) -> None:
    wrong = zeros[zeros != 2 ** (bits - 1)]
    if wrong.numel() > 0:
        raise ValueError(
            f"qzeros: expected zero points of {2 ** (bits - 1)}, which symmetric codes have, got "
            f"{wrong[0].item()} when read as {zero_points}"
        )


def _check_convention(zero_points: str, bits: int) -> None:
    if zero_points not in get_args(ZeroPoints):
        choices = ", ".join(map(repr, get_args(ZeroPoints)))
        raise ValueError(f"zero_points: expected one of {choices}, got {zero_points!r}")
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")


def _in_order(g_idx: torch.Tensor, group_size: int) -> bool:
    D = g_idx.shape[1]
    return bool((g_idx == torch.arange(D, device=g_idx.device) // group_size).all())
