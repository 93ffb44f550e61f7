"""The auxiliary losses and the bias update, with the logits read once each way.

Every balance loss is a sum over experts of a pull, which the counts make, times the mean
probability. So the forward pass needs two sums per expert and sequence, and the gradient is

    gradient = p * slope * (pull - sum_j pull_j p_j)

in closed form, with `p` from the logits again. Stages, and what each gains:

1. `balance_loss_torch`, `z_loss_torch`: whole-tensor torch operations. Assignments are counted by
   one scatter over T·K ids instead of a [T, K, E] comparison. This is what a CPU user gets.
2. `balance_loss_triton`: one kernel reads logits and ids once and leaves sums per expert of a few
   hundred programs, a second adds those up in a fixed order and makes the pull, and one more
   takes the mean over sequences where there are several. Nothing of size [T, E] is written or
   saved, no atomics decide the order of a sum. The backward pass is one kernel.
3. `z_loss_triton`: likewise; the [T] logarithms are saved, so that no row is reduced again.
4. `update_bias_triton`: one launch instead of one per step of the formula.

The kernels themselves are in `load_balancing_kernels`.

Dimension key: T tokens, E experts, K experts per token, N sequences, L tokens per sequence,
D devices, C partial sums per sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import BalanceConfig

from moe_optimized.autograd import once
from moe_optimized.compiling import opaque
from moe_optimized.interpreter import (
    INTERPRETED,
    KERNEL_DTYPES,
    has_kernels,
    launch,
    needs_widening,
    power_of_two,
)
from moe_optimized.load_balancing_kernels import (
    balance_gradient_kernel,
    balance_pull_kernel,
    balance_sums_kernel,
    mean_kernel,
    update_bias_kernel,
    z_gradient_kernel,
    z_sums_kernel,
)
from moe_optimized.scores import score

# Two for each multiprocessor of a Hopper GPU. The order of a sum follows from the shapes alone.
_PROGRAMS = 264


def balance_loss(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """The auxiliary loss of one layer, with the fastest means of the logits' device.

    Args:
        logits: [T, E], any float dtype, one sequence after the other.
        expert_ids: [T, K], int32 or int64, the router's choice in descending order; ids outside
            [0, E) are not counted.
        config: which loss.
        padding_mask: [T], bool, True = a real token, or None. Padding changes nothing.
        tokens_per_expert: [E], int or float: the counts of the global batch, or None.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in the logits; 0 without
        tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or what the loss cannot be
            computed with, as for `moe_reference.load_balancing.balance_loss`.
    """
    run = balance_loss_triton if has_kernels(logits) else balance_loss_torch
    return run(logits, expert_ids, config, padding_mask, tokens_per_expert)


def balance_loss_torch(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `balance_loss`, in whole-tensor torch operations."""
    _check_balance(logits, expert_ids, config, padding_mask, tokens_per_expert)
    T, E = logits.shape
    L = tokens_per_sequence(T, config.loss, config.sequence_length)
    N = T // L if T > 0 else 0
    wide = logits if logits.dtype is torch.float64 else logits.float()
    if padding_mask is not None:
        # Before the score function as well: NaN times 0 is NaN, in the gradient too.
        wide = wide.masked_fill(~padding_mask[:, None], 0.0)
    shares = score(wide, config.score)
    if config.score != "softmax":
        shares = shares / (shares.sum(1, keepdim=True) + config.epsilon)
    if padding_mask is not None:
        shares = shares.masked_fill(~padding_mask[:, None], 0.0)
    mass = shares.view(N, L, E).sum(1)
    if padding_mask is None:
        real = torch.full((N,), L, dtype=mass.dtype, device=mass.device)
    else:
        real = padding_mask.view(N, L).sum(1).to(mass.dtype)

    if tokens_per_expert is None:
        ids = expert_ids[:, :1] if config.loss == "gshard" else expert_ids
        counts = _count(ids, padding_mask, N, L, E)
    else:
        counts = tokens_per_expert.detach().expand(N, E)
    counts = counts.to(mass.dtype)
    total = counts.sum(1, keepdim=True)
    pull = counts / total.where(total > 0, 1.0) / real.clamp(min=1)[:, None]
    D = _devices(E, config)
    if D != E:
        pull = pull.view(N, D, E // D).sum(2).repeat_interleave(E // D, dim=1)
    # A sequence of nothing but padding has loss 0 and is no part of the mean.
    factor = _factor(expert_ids.shape[1], config) * D
    return (pull * mass).sum() * factor / (real > 0).sum().clamp(min=1)


@opaque
def balance_loss_triton(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `balance_loss`, in Triton kernels; float64 is not supported."""
    return _Balance.apply(logits, expert_ids, padding_mask, tokens_per_expert, config)


def z_loss(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of the squared logsumexp, with the fastest means of the device.

    Args:
        logits: [T, E], any float dtype.
        padding_mask: [T], bool, True = a real token, or None.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in the logits; 0 without
        tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    run = z_loss_triton if has_kernels(logits) else z_loss_torch
    return run(logits, padding_mask)


def z_loss_torch(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """As `z_loss`, in whole-tensor torch operations; the rows of padding are not picked out."""
    _check_z(logits, padding_mask)
    wide = logits if logits.dtype is torch.float64 else logits.float()
    if padding_mask is None:
        return wide.logsumexp(1).square().sum() / max(logits.shape[0], 1)
    wide = wide.masked_fill(~padding_mask[:, None], 0.0)
    squares = wide.logsumexp(1).square().masked_fill(~padding_mask, 0.0)
    return squares.sum() / padding_mask.sum().clamp(min=1)


@opaque
def z_loss_triton(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """As `z_loss`, in Triton kernels; float64 is not supported."""
    return _ZLoss.apply(logits, padding_mask)


def update_bias(
    bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
) -> torch.Tensor:
    """Raise the selection bias of idle experts and lower that of busy ones by one step.

    Args:
        bias: [E], any float dtype.
        tokens_per_expert: [E], int or float, the counts of the global batch.
        rate: the size of a step.
        centred: whether the mean of the steps is taken away from each.

    Returns:
        The new bias, [E], float32 (float64 for a float64 bias).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    run = update_bias_triton if has_kernels(bias) else update_bias_torch
    return run(bias, tokens_per_expert, rate, centred)


def update_bias_torch(
    bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
) -> torch.Tensor:
    """As `update_bias`, in torch operations on [E]."""
    _check_update(bias, tokens_per_expert)
    # Float32 rounds counts above 2^24, and a count equal to the mean must give exactly 0.
    counts = tokens_per_expert.detach().double()
    step = (counts.mean() - counts).sign_().mul_(rate)
    if centred:
        step -= step.mean()
    wide = bias.detach() if bias.dtype is torch.float64 else bias.detach().float()
    return wide + step.to(wide.dtype)


@opaque
def update_bias_triton(
    bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
) -> torch.Tensor:
    """As `update_bias`, in one Triton kernel; float64 biases are not supported."""
    _check_update(bias, tokens_per_expert, KERNEL_DTYPES)
    (E,) = bias.shape
    out = bias.new_empty(E, dtype=torch.float32)
    launch(
        update_bias_kernel,
        (min(E, 1),),
        bias.detach(),
        tokens_per_expert.detach(),
        out,
        E,
        bias.stride(0),
        tokens_per_expert.stride(0),
        float(rate),
        CENTRED=centred,
        BLOCK_E=power_of_two(E),
        num_warps=1 if E <= 256 else 4,
    )
    return out


def _check_balance(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    _check_z(logits, padding_mask, dtypes)
    if not isinstance(config, BalanceConfig):
        raise TypeError(f"config: expected a BalanceConfig, got {type(config).__name__}")
    T, E = logits.shape
    check_tensor("expert_ids", expert_ids, (T, "K"), IDS)
    if tokens_per_expert is not None:
        check_tensor("tokens_per_expert", tokens_per_expert, (E,), IDS + FLOATS)
        if config.loss in ("gshard", "deepseek_sequence"):
            raise ValueError(f"tokens_per_expert: expected None with '{config.loss}', got a tensor")
    length, devices = config.sequence_length, config.num_devices
    if config.loss == "deepseek_sequence" and length is None:
        raise ValueError("sequence_length: expected a number with 'deepseek_sequence', got None")
    if T > 0 and T % tokens_per_sequence(T, config.loss, config.sequence_length) != 0:
        raise ValueError(f"sequence_length: expected a divisor of T = {T}, got {length}")
    if config.loss == "deepseek_device" and (devices is None or E % devices != 0):
        raise ValueError(f"num_devices: expected a divisor of E = {E}, got {devices}")


def _check_z(
    logits: torch.Tensor,
    padding_mask: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    check_tensor("logits", logits, ("T", "E"), dtypes)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (logits.shape[0],), (torch.bool,))


def _check_update(
    bias: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    check_tensor("bias", bias, ("E",), dtypes)
    check_tensor("tokens_per_expert", tokens_per_expert, tuple(bias.shape), IDS + FLOATS)


def tokens_per_sequence(T: int, loss: str, length: int | None) -> int:
    """L: all tokens, but for a loss that is taken per sequence."""
    return length if loss in ("gshard", "deepseek_sequence") and length else T


def _devices(E: int, config: BalanceConfig) -> int:
    """D: between how many groups of consecutive experts is balanced; else each is its own."""
    return config.num_devices if config.loss == "deepseek_device" else E


def _factor(K: int, config: BalanceConfig) -> float:
    # The shares of transformers are per token and add up to K.
    return config.coefficient * (K if config.loss == "transformers_concatenated" else 1)


def _count(
    expert_ids: torch.Tensor, padding_mask: torch.Tensor | None, N: int, L: int, E: int
) -> torch.Tensor:
    """[N, E] int64: how often each sequence chose each expert."""
    here = (expert_ids >= 0) & (expert_ids < E)
    if padding_mask is not None:
        here = here & padding_mask[:, None]
    # The last bin holds what is not counted. Integers add up to the same in any order.
    bins = expert_ids.long().where(here, E).reshape(N, L * expert_ids.shape[1])
    counts = bins.new_zeros(N, E + 1)
    return counts.scatter_add_(1, bins, torch.ones_like(bins))[:, :E]


@dataclass(frozen=True)
class _Rows:
    """How the rows of [T, E] logits are shared out.

    Attributes:
        chunks: C, programs per sequence.
        steps: blocks of rows that a program takes one after the other.
        block_t: rows of a block.
        block_e: lanes of a row.
    """

    chunks: int
    steps: int
    block_t: int
    block_e: int


def _share_out(N: int, L: int, E: int) -> _Rows:
    block_e = power_of_two(E)
    # A block is held in registers several times over, in 8 warps 16 numbers of it per thread.
    cells = 16384 if INTERPRETED else 4096
    block_t = max(1, min(power_of_two(L), cells // block_e))
    blocks = -(-L // block_t)
    steps = max(1, min(blocks, -(-blocks * N // _PROGRAMS)))
    return _Rows(-(-blocks // steps), steps, block_t, block_e)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        padding_mask: torch.Tensor | None,
        tokens_per_expert: torch.Tensor | None,
        config: BalanceConfig,
    ) -> torch.Tensor:
        loss, pull, scale = balance_forward(
            logits, expert_ids, padding_mask, tokens_per_expert, config
        )
        ctx.save_for_backward(logits, padding_mask, pull, scale)
        ctx.config = config
        return loss

    @staticmethod
    @once("balance_loss_triton")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return balance_backward(grad, *ctx.saved_tensors, ctx.config), None, None, None, None


def balance_forward(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    padding_mask: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
    config: BalanceConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels of `balance_loss`, below autograd.

    Args:
        logits: [T, E].
        expert_ids: [T, K].
        padding_mask: [T], bool, or None.
        tokens_per_expert: [E], or None.
        config: which loss.

    Returns:
        loss: a scalar, float32.
        pull: [N, E], float32, and scale, a scalar, float32: what the gradient is made of.
    """
    _check_balance(logits, expert_ids, config, padding_mask, tokens_per_expert, KERNEL_DTYPES)
    T, E = logits.shape
    L = tokens_per_sequence(T, config.loss, config.sequence_length)
    loss = logits.new_zeros((), dtype=torch.float32)
    pull = logits.new_empty((T // max(L, 1), E), dtype=torch.float32)
    scale = torch.empty_like(loss)
    if logits.numel():
        mask = _bytes(padding_mask)
        _launch_balance(logits, expert_ids, mask, tokens_per_expert, config, L, pull, loss, scale)
    return loss, pull, scale


def balance_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    padding_mask: torch.Tensor | None,
    pull: torch.Tensor,
    scale: torch.Tensor,
    config: BalanceConfig,
) -> torch.Tensor:
    """The gradient of `balance_forward`.

    Args:
        grad: a scalar, the gradient of the loss.
        logits: [T, E].
        padding_mask: [T], bool, or None.
        pull: [N, E], from the forward pass.
        scale: a scalar, from the forward pass.
        config: which loss.

    Returns:
        [T, E], the dtype of the logits.
    """
    T, E = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not logits.numel():
        return out
    mask = _bytes(padding_mask)
    rows = _share_out(1, T, E)
    launch(
        balance_gradient_kernel,
        (-(-T // rows.block_t),),
        logits,
        logits if mask is None else mask,
        pull,
        scale,
        grad,
        out,
        T,
        E,
        tokens_per_sequence(T, config.loss, config.sequence_length),
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
        float(config.epsilon),
        SCORE=config.score,
        PADDED=mask is not None,
        ROUND_BITS=needs_widening(logits.dtype),
        BLOCK_T=rows.block_t,
        BLOCK_E=rows.block_e,
        num_warps=8,
    )
    return out


def _bytes(padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if padding_mask is None else padding_mask.view(torch.uint8)


def _launch_balance(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    mask: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
    config: BalanceConfig,
    L: int,
    pull: torch.Tensor,
    loss: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    N, E = pull.shape
    K = expert_ids.shape[1]
    rows = _share_out(N, L, E)
    C = rows.chunks
    given = tokens_per_expert is not None
    # Those of gshard are the first choices.
    counted = 0 if given else min(K, 1) if config.loss == "gshard" else K
    mass = torch.empty((N, C, E), dtype=torch.float32, device=logits.device)
    counts = torch.empty((N, C, E), dtype=torch.int32, device=logits.device)
    real = torch.empty((N, C), dtype=torch.int32, device=logits.device)
    launch(
        balance_sums_kernel,
        (N, C),
        logits,
        expert_ids,
        logits if mask is None else mask,
        mass,
        counts,
        real,
        E,
        L,
        rows.steps,
        logits.stride(0),
        logits.stride(1),
        expert_ids.stride(0),
        expert_ids.stride(1),
        0 if mask is None else mask.stride(0),
        float(config.epsilon),
        SCORE=config.score,
        COUNTED=counted,
        PADDED=mask is not None,
        BLOCK_T=rows.block_t,
        BLOCK_E=rows.block_e,
        num_warps=8,
    )
    D = _devices(E, config)
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    present = torch.empty(N, dtype=torch.int32, device=logits.device)
    block_d, block_m = power_of_two(D), power_of_two(E // D)
    block_c = max(1, min(power_of_two(C), 4096 // (block_d * block_m)))
    factor = float(_factor(K, config))
    launch(
        balance_pull_kernel,
        (N,),
        mass,
        counts,
        real,
        tokens_per_expert if given else counts,
        pull,
        losses,
        present,
        loss,
        scale,
        C,
        -(-C // block_c),
        tokens_per_expert.stride(0) if given else 0,
        factor,
        COUNTED=counted > 0,
        GIVEN=given,
        SINGLE=N == 1,
        DEVICES=D,
        MEMBERS=E // D,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        num_warps=4,
    )
    if N > 1:
        _launch_mean(losses, present, loss, scale, factor)


class _ZLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        loss, logs, scale = z_forward(logits, padding_mask)
        ctx.save_for_backward(logits, padding_mask, logs, scale)
        return loss

    @staticmethod
    @once("z_loss_triton")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return z_backward(grad, *ctx.saved_tensors), None


def z_forward(
    logits: torch.Tensor, padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels of `z_loss`, below autograd.

    Args:
        logits: [T, E].
        padding_mask: [T], bool, or None.

    Returns:
        loss: a scalar, float32.
        logs: [T], float32, and scale, a scalar, float32: what the gradient is made of.
    """
    _check_z(logits, padding_mask, KERNEL_DTYPES)
    T, E = logits.shape
    mask = _bytes(padding_mask)
    rows = _share_out(1, T, E)
    C = rows.chunks
    logs = logits.new_empty(T, dtype=torch.float32)
    squares = logits.new_empty(C, dtype=torch.float32)
    real = torch.empty(C, dtype=torch.int32, device=logits.device)
    launch(
        z_sums_kernel,
        (C,),
        logits,
        logits if mask is None else mask,
        logs,
        squares,
        real,
        T,
        E,
        rows.steps,
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
        PADDED=mask is not None,
        BLOCK_T=rows.block_t,
        BLOCK_E=rows.block_e,
        num_warps=8,
    )
    loss = logits.new_empty((), dtype=torch.float32)
    scale = torch.empty_like(loss)
    _launch_mean(squares, real, loss, scale, 1.0)
    return loss, logs, scale


def z_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    padding_mask: torch.Tensor | None,
    logs: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The gradient of `z_forward`.

    Args:
        grad: a scalar, the gradient of the loss.
        logits: [T, E].
        padding_mask: [T], bool, or None.
        logs: [T], from the forward pass.
        scale: a scalar, from the forward pass.

    Returns:
        [T, E], the dtype of the logits.
    """
    T, E = logits.shape
    mask = _bytes(padding_mask)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = _share_out(1, T, E)
    launch(
        z_gradient_kernel,
        (-(-T // rows.block_t) if E else 0,),
        logits,
        logits if mask is None else mask,
        logs,
        scale,
        grad,
        out,
        T,
        E,
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
        PADDED=mask is not None,
        ROUND_BITS=needs_widening(logits.dtype),
        BLOCK_T=rows.block_t,
        BLOCK_E=rows.block_e,
        num_warps=8,
    )
    return out


def _launch_mean(
    sums: torch.Tensor,
    numbers: torch.Tensor,
    loss: torch.Tensor,
    scale: torch.Tensor,
    factor: float,
) -> None:
    block = power_of_two(min(sums.numel(), 1024))
    launch(
        mean_kernel,
        (1,),
        sums,
        numbers,
        loss,
        scale,
        sums.numel(),
        -(-sums.numel() // block),
        factor,
        BLOCK=block,
        num_warps=1 if block <= 256 else 4,
    )
