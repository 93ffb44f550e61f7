"""The score functions and their slopes: what `gating` and `load_balancing` share.

The slope of a score s is the derivative of log s by its own logit, so that s times its slope is the
derivative of s. It stays finite where s underflows, which the derivative over s does not. Softmax
has the slope 1, less a term that all logits of a row share; its callers subtract that.

Dimension key: T tokens, E experts.
"""

import torch
import torch.nn.functional as F
from moe_reference.config import Score

from moe_optimized.interpreter import jit, tl


def score(logits: torch.Tensor, name: Score) -> torch.Tensor:
    """The score function, over the last dimension.

    Args:
        logits: [..., E], float32 or float64.
        name: which one.

    Returns:
        [..., E], the dtype given.

    >>> score(torch.zeros(2), "sigmoid").tolist()
    [0.5, 0.5]
    """
    if name == "softmax":
        return logits.softmax(-1)
    if name == "sigmoid":
        # torch.sigmoid rounds the last elements of a CPU tensor unlike the rest, which would tell
        # equal logits apart.
        positive = logits >= 0
        small = torch.exp(torch.where(positive, -logits, logits))
        return torch.where(positive, 1.0, small) / (1.0 + small)
    # Below -40 the logarithm of 1 + e^x is e^x to the last bit of a double; the root of that
    # neither underflows early nor divides zero by zero in the gradient.
    far = logits < -40.0
    root = (-F.logsigmoid(-logits.masked_fill(far, 0.0))).sqrt()
    return torch.where(far, (logits.clamp(max=-40.0) / 2).exp(), root)


@jit
def score_block(x, SCORE: tl.constexpr):
    """The score function along the lanes of [BLOCK_T, lanes]; lanes of -inf are no experts."""
    if SCORE == "softmax":
        shifted = tl.exp(x - tl.max(x, 1)[:, None])
        return shifted / tl.sum(shifted, 1)[:, None]
    else:
        # The exponential of a number that is never positive cannot overflow.
        z = tl.exp(-tl.abs(x))
        if SCORE == "sigmoid":
            return tl.where(x >= 0, 1.0, z) / (1.0 + z)
        else:
            # log(1 + z) = 2 artanh(z / (2 + z)), whose argument is at most 1/3: eight terms give
            # all of float32, where the logarithm of 1 + z would lose a small z.
            s = z / (2.0 + z)
            s2 = s * s
            series = 1.0 / 13 + s2 * (1.0 / 15)
            series = 1.0 / 9 + s2 * (1.0 / 11 + s2 * series)
            series = 1.0 / 5 + s2 * (1.0 / 7 + s2 * series)
            series = 1.0 + s2 * (1.0 / 3 + s2 * series)
            root = tl.sqrt(2.0 * s * series + tl.where(x > 0, x, 0.0))
            return tl.where(x < -40.0, tl.exp(x * 0.5), root)


@jit
def slope_block(x, scores, SCORE: tl.constexpr):
    """The slopes of `scores`, which are those of the logits `x`; NaN stays NaN."""
    if SCORE == "softmax":
        return tl.where(x == x, 1.0, x)
    else:
        z = tl.exp(-tl.abs(x))
        if SCORE == "sigmoid":
            # 1 - s, without the difference.
            return tl.where(x >= 0, z, 1.0) / (1.0 + z)
        else:
            sigmoid = tl.where(x >= 0, 1.0, z) / (1.0 + z)
            # Half a sigmoid over softplus, which are both e^x far below 0.
            return tl.where(x < -40.0, 0.5, 0.5 * sigmoid / (scores * scores))
