"""The kernels of `load_balancing`: one job each, float32 sums in an order that shapes decide.

| kernel | reads | writes |
|---|---|---|
| `balance_sums_kernel` | logits, ids | per chunk of a sequence: sums of probabilities, counts |
| `balance_pull_kernel` | those | the pull of each expert, the loss of each sequence |
| `mean_kernel` | losses, or the squares of chunks | the mean, and its factor for the gradient |
| `balance_gradient_kernel` | logits, pulls | the gradient |
| `z_sums_kernel` | logits | the logsumexp of each row, sums of squares per chunk |
| `z_gradient_kernel` | logits, logsumexp | the gradient |
| `update_bias_kernel` | bias, counts | the new bias |

Dimension key: T tokens, E experts, K experts per token, N sequences, D devices, C chunks.
"""

from moe_optimized.interpreter import jit, narrow, tl
from moe_optimized.scores import score_block, slope_block


@jit
def load_rows(
    logits_ptr,
    mask_ptr,
    rows,
    in_rows,
    num_experts,
    stride_lt,
    stride_le,
    stride_m,
    PADDED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits of the rows in float32, 0 in padding and -inf without an expert; which are real."""
    in_experts = tl.arange(0, BLOCK_E) < num_experts
    real = in_rows
    if PADDED:
        real = real & (tl.load(mask_ptr + rows * stride_m, mask=in_rows, other=0) != 0)
    offsets = rows[:, None] * stride_lt + tl.arange(0, BLOCK_E).to(tl.int64)[None, :] * stride_le
    x = tl.load(logits_ptr + offsets, mask=real[:, None] & in_experts[None, :], other=0.0)
    return tl.where(in_experts[None, :], x.to(tl.float32), float("-inf")), real


@jit
def share_block(scores, epsilon, SCORE: tl.constexpr):
    """Scores as probabilities: those of softmax are, others are divided by their sum."""
    if SCORE == "softmax":
        return scores
    else:
        return scores / (tl.sum(scores, 1) + epsilon)[:, None]


@jit
def balance_sums_kernel(
    logits_ptr,
    ids_ptr,
    mask_ptr,
    mass_ptr,
    counts_ptr,
    real_ptr,
    num_experts,
    length,
    steps,
    stride_lt,
    stride_le,
    stride_it,
    stride_ik,
    stride_m,
    epsilon,
    SCORE: tl.constexpr,
    COUNTED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Probabilities, choices and real rows of one chunk of a sequence, added up."""
    sequence = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_E)
    mass = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    counts = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    reals = tl.zeros((BLOCK_T,), tl.int32)
    for step in range(0, steps):
        places = (chunk * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = sequence * length + places
        x, real = load_rows(
            logits_ptr, mask_ptr, rows, places < length, num_experts,
            stride_lt, stride_le, stride_m, PADDED, BLOCK_E,
        )  # fmt: skip
        shares = share_block(score_block(x, SCORE), epsilon, SCORE)
        mass += tl.where(real[:, None], shares, 0.0)
        reals += real.to(tl.int32)
        for k in range(COUNTED):
            chosen = ids_ptr + rows * stride_it + tl.cast(k, tl.int64) * stride_ik
            ids = tl.load(chosen, mask=real, other=-1)
            counts += (lanes[None, :] == ids[:, None]).to(tl.int32)

    program = sequence * tl.num_programs(1) + chunk
    out = program * num_experts + lanes
    tl.store(mass_ptr + out, tl.sum(mass, 0), mask=lanes < num_experts)
    if COUNTED > 0:
        tl.store(counts_ptr + out, tl.sum(counts, 0), mask=lanes < num_experts)
    tl.store(real_ptr + program, tl.sum(reals, 0))


@jit
def balance_pull_kernel(
    mass_ptr,
    counts_ptr,
    real_ptr,
    given_ptr,
    pull_ptr,
    losses_ptr,
    present_ptr,
    loss_ptr,
    scale_ptr,
    chunks,
    steps,
    stride_g,
    factor,
    COUNTED: tl.constexpr,
    GIVEN: tl.constexpr,
    SINGLE: tl.constexpr,
    DEVICES: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What pulls each expert of a sequence down, and its loss; the whole loss of a SINGLE one.

    A row is BLOCK_D devices of BLOCK_M lanes.
    """
    sequence = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D * BLOCK_M)
    experts = (lanes // BLOCK_M) * MEMBERS + lanes % BLOCK_M
    in_experts = (lanes // BLOCK_M < DEVICES) & (lanes % BLOCK_M < MEMBERS)
    mass = tl.zeros((BLOCK_C, BLOCK_D * BLOCK_M), tl.float32)
    counted = tl.zeros((BLOCK_C, BLOCK_D * BLOCK_M), tl.int32)
    reals = tl.zeros((BLOCK_C,), tl.int32)
    for step in range(0, steps):
        places = step * BLOCK_C + tl.arange(0, BLOCK_C)
        programs = sequence * chunks + places
        cells = programs[:, None] * (DEVICES * MEMBERS) + experts[None, :]
        here = (places < chunks)[:, None] & in_experts[None, :]
        mass += tl.load(mass_ptr + cells, mask=here, other=0.0)
        if COUNTED:
            counted += tl.load(counts_ptr + cells, mask=here, other=0)
        reals += tl.load(real_ptr + programs, mask=places < chunks, other=0)

    if GIVEN:
        given = given_ptr + experts.to(tl.int64) * stride_g
        counts = tl.load(given, mask=in_experts, other=0).to(tl.float32)
    else:
        counts = tl.sum(counted, 0).to(tl.float32)
    total = tl.sum(counts, 0)
    shares = counts / tl.where(total > 0, total, 1.0)
    if MEMBERS > 1:
        by_device = tl.sum(tl.reshape(shares, (BLOCK_D, BLOCK_M)), 1)
        by_device = tl.broadcast_to(by_device[:, None], (BLOCK_D, BLOCK_M))
        shares = tl.reshape(by_device, (BLOCK_D * BLOCK_M,))
    number = tl.sum(reals, 0)
    pull = shares * DEVICES / tl.maximum(number, 1).to(tl.float32)
    tl.store(pull_ptr + sequence * (DEVICES * MEMBERS) + experts, pull, mask=in_experts)
    loss = tl.sum(tl.where(in_experts, pull * tl.sum(mass, 0), 0.0), 0)
    if SINGLE:
        tl.store(loss_ptr, loss * factor)
        tl.store(scale_ptr, factor)
    else:
        tl.store(losses_ptr + sequence, loss)
        tl.store(present_ptr + sequence, (number > 0).to(tl.int32))


@jit
def mean_kernel(
    sums_ptr, numbers_ptr, mean_ptr, scale_ptr, num_sums, steps, factor, BLOCK: tl.constexpr
):
    """`factor` times all sums over all numbers, and what one of the sums is multiplied with."""
    total = tl.zeros((BLOCK,), tl.float32)
    number = tl.zeros((BLOCK,), tl.int32)
    for step in range(0, steps):
        i = step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < num_sums, other=0.0)
        number += tl.load(numbers_ptr + i, mask=i < num_sums, other=0)
    scale = factor / tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    tl.store(mean_ptr, tl.sum(total, 0) * scale)
    tl.store(scale_ptr, scale)


@jit
def balance_gradient_kernel(
    logits_ptr,
    mask_ptr,
    pull_ptr,
    scale_ptr,
    grad_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    length,
    stride_lt,
    stride_le,
    stride_m,
    epsilon,
    SCORE: tl.constexpr,
    PADDED: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of BLOCK_T rows: p * slope * (pull - the row's mean pull)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, BLOCK_E)
    here = (rows < num_tokens)[:, None] & (lanes < num_experts)[None, :]
    x, real = load_rows(
        logits_ptr, mask_ptr, rows, rows < num_tokens, num_experts,
        stride_lt, stride_le, stride_m, PADDED, BLOCK_E,
    )  # fmt: skip
    cells = pull_ptr + (rows // length)[:, None] * num_experts + lanes[None, :]
    pull = tl.load(cells, mask=here, other=0.0)
    scores = score_block(x, SCORE)
    shares = share_block(scores, epsilon, SCORE)
    level = tl.sum(shares * pull, 1)
    weight = tl.load(scale_ptr) * tl.load(grad_ptr)
    gradient = shares * slope_block(x, scores, SCORE) * (pull - level[:, None]) * weight
    # An expert is not moved by padding, whatever the weight is.
    gradient = tl.where(real[:, None], gradient, 0.0)
    out = out_ptr + rows[:, None] * num_experts + lanes[None, :]
    tl.store(out, narrow(gradient, out_ptr.dtype.element_ty, ROUND_BITS), mask=here)


@jit
def z_sums_kernel(
    logits_ptr,
    mask_ptr,
    logs_ptr,
    squares_ptr,
    real_ptr,
    num_tokens,
    num_experts,
    steps,
    stride_lt,
    stride_le,
    stride_m,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The logsumexp of each row, 0 for padding; a chunk's sum of squares and real rows."""
    chunk = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    reals = tl.zeros((BLOCK_T,), tl.int32)
    for step in range(0, steps):
        rows = (chunk * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        x, real = load_rows(
            logits_ptr, mask_ptr, rows, rows < num_tokens, num_experts,
            stride_lt, stride_le, stride_m, PADDED, BLOCK_E,
        )  # fmt: skip
        top = tl.max(x, 1)
        # Infinity less infinity would be NaN.
        top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        logs = top + tl.log(tl.sum(tl.exp(x - top[:, None]), 1))
        logs = tl.where(real, logs, 0.0)
        squares += logs * logs
        reals += real.to(tl.int32)
        tl.store(logs_ptr + rows, logs, mask=rows < num_tokens)
    tl.store(squares_ptr + chunk, tl.sum(squares, 0))
    tl.store(real_ptr + chunk, tl.sum(reals, 0))


@jit
def z_gradient_kernel(
    logits_ptr,
    mask_ptr,
    logs_ptr,
    scale_ptr,
    grad_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    stride_lt,
    stride_le,
    stride_m,
    PADDED: tl.constexpr,
    ROUND_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of BLOCK_T rows: twice the logsumexp times the softmax."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, BLOCK_E)
    x, real = load_rows(
        logits_ptr, mask_ptr, rows, rows < num_tokens, num_experts,
        stride_lt, stride_le, stride_m, PADDED, BLOCK_E,
    )  # fmt: skip
    logs = tl.load(logs_ptr + rows, mask=rows < num_tokens, other=0.0)
    weights = 2.0 * logs * (tl.load(scale_ptr) * tl.load(grad_ptr))
    gradient = tl.exp(x - logs[:, None]) * weights[:, None]
    gradient = tl.where(real[:, None], gradient, 0.0)
    here = (rows < num_tokens)[:, None] & (lanes < num_experts)[None, :]
    out = out_ptr + rows[:, None] * num_experts + lanes[None, :]
    tl.store(out, narrow(gradient, out_ptr.dtype.element_ty, ROUND_BITS), mask=here)


@jit
def update_bias_kernel(
    bias_ptr,
    counts_ptr,
    out_ptr,
    num_experts,
    stride_b,
    stride_c,
    rate,
    CENTRED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """All of the update; counts are compared in float64, which holds those beyond 2^24."""
    lanes = tl.arange(0, BLOCK_E).to(tl.int64)
    here = lanes < num_experts
    counts = tl.load(counts_ptr + lanes * stride_c, mask=here, other=0).to(tl.float64)
    below = tl.sum(counts, 0) / num_experts - counts
    step = tl.where(below > 0, rate, tl.where(below < 0, -rate, 0.0)).to(tl.float64)
    if CENTRED:
        step -= tl.sum(tl.where(here, step, 0.0), 0) / num_experts
    bias = tl.load(bias_ptr + lanes * stride_b, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + lanes, bias + step.to(tl.float32), mask=here)
