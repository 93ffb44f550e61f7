r"""8-bit activations: rows rounded to int8, float8 or Q8_1 before a product.

$$ x_{ik} \approx q_{ik} \, s_i $$

The scale is taken from the rows (*dynamic*), or was fixed beforehand (*static*). What comes out
here are the rounded rows as floats: a kernel multiplies the codes and applies the scales after,
which is the same sum but for its own rounding.

| format | one scale for | scale | rounding |
|---|---|---|---|
| `int8` | a row (token) | greatest absolute value / 127 | ties to even, from -127 to 127 |
| `e4m3` | a row (token) | greatest absolute value / 448 | ties to even, cut to ±448 |
| `e4m3_block` | B columns of a row, B the block of the weights | as `e4m3` | as `e4m3` |
| `Q8_1` | 32 columns of a row | greatest absolute value / 127, as float16 | ties away from zero |

Rows are rounded each on its own, so that a row that is not finite changes no other one. A NaN or an
infinity with dynamic scales makes NaN of all numbers that share the scale. Static scales cut what
is too great. The gradient of a rounded row is zero.

Dimension key: S rows, D columns, G blocks of columns, B columns of a block.
"""

from typing import get_args

import torch
import torch.nn.functional as F

from moe_reference.checks import check_float
from moe_reference.float8 import E4M3_MAX, to_e4m3
from moe_reference.gguf_blocks import round_half_away
from moe_reference.quantized_checks import check_width
from moe_reference.quantized_tensors import ActivationFormatName

INT8_MAX = 127.0


def round_activations(
    x: torch.Tensor,
    format: ActivationFormatName,
    block_size: int = 128,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows as a product with 8-bit activations sees them.

    Args:
        x: [S, D], any float dtype.
        format: what they are rounded to.
        block_size: B, for `e4m3_block`. The last block of a row may be smaller.
        scale: a number, float32, at least 0: the static scale of all rows (`int8`, `e4m3`), or
            None: dynamic.

    Returns:
        [S, D], x's dtype, without a gradient.

    Raises:
        TypeError: x is no float tensor.
        ValueError: there is no such format, it has no static scales, or D is no multiple of 32
            (`Q8_1`).

    Source: vLLM's per-token quantisation; DeepSeek-V3 (arXiv 2412.19437) for blocks; llama.cpp.

    >>> round_activations(torch.tensor([[127.0, 0.4, -63.7]]), "int8").tolist()
    [[127.0, 0.0, -64.0]]
    >>> round_activations(torch.tensor([[9.0, 1.0]]), "int8", scale=torch.tensor(0.05))[0, 0].item()
    6.349999904632568
    """
    check_float("x", x)
    if format not in get_args(ActivationFormatName):
        choices = ", ".join(map(repr, get_args(ActivationFormatName)))
        raise ValueError(f"format: expected one of {choices}, got {format!r}")
    if scale is not None and format not in ("int8", "e4m3"):
        raise ValueError(f"scale: expected None with {format}, got a static scale")
    rows_SD = x.detach().to(torch.float32)
    if format == "Q8_1":
        check_width("x", x.shape[1], "Q8_1")
    D = x.shape[1]
    B = {"e4m3_block": block_size, "Q8_1": 32}.get(format, max(D, 1))
    blocks_SGB = F.pad(rows_SD, (0, -D % B)).unflatten(1, (-(-D // B), B))
    limit = E4M3_MAX if format.startswith("e4m3") else INT8_MAX
    steps_SG1 = blocks_SGB.abs().amax(dim=2, keepdim=True) / limit
    if scale is not None:
        steps_SG1 = scale.to(steps_SG1).expand_as(steps_SG1)
    # A scale of 0: zeros, which stay zeros whatever they are divided by.
    quotients_SGB = blocks_SGB / steps_SG1.where(steps_SG1 != 0, 1.0)
    if format == "int8":
        codes_SGB = quotients_SGB.round().clamp(-limit, limit)
    elif format == "Q8_1":
        codes_SGB = round_half_away(quotients_SGB)
        steps_SG1 = steps_SG1.to(torch.float16).to(torch.float32)
    else:
        codes_SGB = to_e4m3(quotients_SGB).to(torch.float32)
    return (codes_SGB * steps_SG1).flatten(1)[:, :D].to(x.dtype)
