r"""Balance without a loss: a bias on the selection that is moved once per optimizer step.

The selection bias chooses experts and never weighs them, so moving it disturbs no gradient. The
counts it goes by are those of the whole global batch, and of nothing else: not of evaluation, not
counted again when activations are recomputed, not of padding.

Dimension key: E experts.
"""

import torch
import torch.distributed as dist

from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.gating import upcast


def global_counts(
    tokens_per_expert: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The counts of all ranks together: what the bias update and the losses go by.

    Args:
        tokens_per_expert: [E], int32, int64 or float: this rank's own counts.
        group: the ranks that share the batch; None takes all of them. Called on every rank of it.

    Returns:
        [E], the dtype given, the same on every rank. The argument is not changed. Without an
        initialised process group there is one rank, and it is a copy.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape.

    >>> global_counts(torch.tensor([3, 1]))
    tensor([3, 1])
    """
    check_tensor("tokens_per_expert", tokens_per_expert, ("E",), IDS + FLOATS)
    counts_E = tokens_per_expert.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_E, group=group)
    return counts_E


def update_bias(
    bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
) -> torch.Tensor:
    r"""Balance without a loss: raise the selection bias of idle experts, lower that of busy ones.

    $b_i + \mathrm{rate} \cdot \mathrm{sign}(\bar c - c_i)$, the step less its own mean if centred.

    Args:
        bias: [E], any float dtype. Keep it in float32: bfloat16 cannot hold 0.5 + 0.001.
        tokens_per_expert: [E], int or float: counts of the global batch, of training steps only,
            each token once and without padding.
        rate: the size of a step.
        centred: True as in torchtitan, so that the biases do not drift together; False as in
            DeepSeek-V3 and Megatron-LM.

    Returns:
        The new bias, [E], float32 (float64 for a float64 bias).

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape.

    Source: arXiv 2408.15664, algorithm 1.

    >>> update_bias(torch.zeros(4), torch.tensor([5, 1, 3, 3]), rate=0.5, centred=False).tolist()
    [-0.5, 0.5, 0.0, 0.0]
    """
    check_tensor("bias", bias, ("E",))
    check_tensor("tokens_per_expert", tokens_per_expert, tuple(bias.shape), IDS + FLOATS)
    # Float32 rounds counts above 2^24, and a count equal to the mean must give exactly 0.
    counts_E = tokens_per_expert.double()
    step_E = rate * torch.sign(counts_E.mean() - counts_E)
    if centred:
        step_E = step_E - step_E.mean()
    bias_E = upcast(bias.detach())
    return bias_E + step_E.to(bias_E)
