"""Unpacking in one Triton kernel, from the canonical layout.

Stages, and what each gains:

1. `dequantize_kernel`: each byte is read where it stands and each number written once. In torch
   every mask, shift and gather is a pass of its own over all of the weights.

All products but the last are exact in float32, so that a weight is rounded once.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

import torch
from moe_reference.quantized_tensors import QuantizedTensor

from moe_optimized.interpreter import INTERPRETED, jit, launch, power_of_two, tl
from moe_optimized.quantized_kernels import e4m3_to_floats, load_scales
from moe_optimized.quantized_layout import CODES, dense

_INLINE = {"Q8_0": 34, "Q8_1": 36}
"""Bytes of a block that has its scale inside."""


def refusal_of_tensor(packed: QuantizedTensor) -> str | None:
    """Why the kernel does not take a checked tensor, in one sentence, or None where it does."""
    if packed.format not in CODES:
        return (
            f"packed.format: expected one of {', '.join(map(repr, CODES))}, got {packed.format!r}"
        )
    if packed.scales is not None and packed.scales.dtype is torch.float64:
        return "packed.scales: expected float32, bfloat16 or float16, got float64"
    return None


def dequantize_kernels(packed: QuantizedTensor) -> torch.Tensor:
    """Launch the kernel.

    Args:
        packed: checked, and not refused.

    Returns:
        [E, O, D], float32.
    """
    E, O, D = packed.shape
    codes = dense(packed.packed).view(torch.uint8)
    width = codes.shape[2]
    inline = _INLINE.get(packed.format, 0)
    # A scale that stands inside is the first half of its block: the same bytes as float16.
    scales = codes.view(torch.float16) if inline else packed.scales
    assert scales is not None
    if packed.format == "nvfp4":
        # Bytes, as the codes of e4m3 are.
        scales = dense(scales).view(torch.uint8)
    scales = scales.contiguous()
    _, scale_rows, scale_columns = scales.shape
    # Columns that share a scale, and how far two of them are apart.
    B = D if packed.group_size == -1 else packed.group_size
    rows_per_scale = 1
    if packed.format == "e4m3":
        rows_per_scale = O if scale_rows == 1 else 1 if packed.group_size == -1 else B
    out = torch.empty(E, O, D, dtype=torch.float32, device=codes.device)
    block_o, block_d = (1, 1024)
    if INTERPRETED:
        block_o, block_d = min(power_of_two(O), 64), min(power_of_two(D, least=16), 512)
    shared = packed.global_scale
    zeros, g_idx = packed.zeros, packed.g_idx
    launch(
        dequantize_kernel,
        (E * -(-O // block_o), -(-D // block_d)),
        codes,
        scales,
        scales if zeros is None else zeros.contiguous(),
        scales if g_idx is None else g_idx.contiguous(),
        scales if shared is None else shared.contiguous(),
        out,
        O,
        D,
        codes.shape[1],
        width,
        scale_rows,
        scale_columns,
        rows_per_scale,
        max(B, 1),
        1 if g_idx is None else g_idx.shape[1],
        1 if shared is None else shared.shape[1],
        CODES=CODES[packed.format],
        INLINE=inline,
        HAS_ZEROS=zeros is not None,
        HAS_G_IDX=g_idx is not None,
        HAS_GLOBAL=shared is not None,
        MEND_NAN=INTERPRETED,
        BLOCK_O=block_o,
        BLOCK_D=block_d,
    )
    return out


@jit
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    g_idx_ptr,
    global_ptr,
    out_ptr,
    num_rows,
    num_columns,
    packed_rows,
    packed_width,
    scale_rows,
    scale_columns,
    rows_per_scale,
    group,
    g_idx_width,
    global_width,
    CODES: tl.constexpr,
    INLINE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_G_IDX: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    MEND_NAN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_O rows and BLOCK_D columns of one expert's matrix."""
    blocks = tl.cdiv(num_rows, BLOCK_O)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = o < num_rows
    in_columns = d < num_columns
    mask = in_rows[:, None] & in_columns[None, :]

    if INLINE > 0:
        places = d // 32 * INLINE + (INLINE - 32) + d % 32
        groups = d // 32 * (INLINE // 2)
    elif CODES == "int4" or CODES == "e2m1":
        places = d // 2
        groups = d // group
    else:
        places = d
        groups = d // group
    if HAS_G_IDX:
        groups = tl.load(g_idx_ptr + expert * g_idx_width + d, mask=in_columns, other=0)
    row_starts = (expert * packed_rows + o) * packed_width
    codes = tl.load(packed_ptr + row_starts[:, None] + places[None, :], mask=mask, other=0)
    scale_starts = (expert * scale_rows + o // rows_per_scale) * scale_columns
    scale_places = scale_starts[:, None] + groups[None, :]
    if HAS_GLOBAL:
        scales = tl.load(scales_ptr + scale_places, mask=mask, other=0)
        scales = e4m3_to_floats(scales, tl.float32, MEND_NAN)
    else:
        scales = load_scales(scales_ptr, scale_places, mask)

    if CODES == "e4m3":
        values = e4m3_to_floats(codes, tl.float32, MEND_NAN)
    else:
        codes = codes.to(tl.int32)
        if CODES != "int8":
            codes = tl.where((d % 2 == 1)[None, :], codes >> 4, codes & 15)
        if CODES == "e2m1":
            size = codes & 7
            # 0 and 1/2 have no first bit; from code 2 on, two codes to a power of two.
            power = ((size >> 1) + 126) << 23
            fraction = (size & 1) << 22
            float_bits = tl.where(size < 2, tl.where(size == 1, 126 << 23, 0), power | fraction)
            values = (float_bits | ((codes & 8) << 28)).to(tl.float32, bitcast=True)
        elif INLINE > 0:
            values = tl.where(codes > 127, codes - 256, codes).to(tl.float32)
        elif HAS_ZEROS:
            zeros = tl.load(zeros_ptr + scale_places, mask=mask, other=0).to(tl.int32)
            values = (codes - zeros).to(tl.float32)
        else:
            values = (codes - (8 if CODES == "int4" else 128)).to(tl.float32)
    weights = values * scales
    if HAS_GLOBAL:
        column = tl.where(global_width > 1, o, 0)
        shared = tl.load(global_ptr + expert * global_width + column, mask=in_rows, other=0.0)
        weights = weights * shared[:, None]
    out = out_ptr + ((expert * num_rows + o) * num_columns)[:, None] + d[None, :]
    tl.store(out, weights, mask=mask)
