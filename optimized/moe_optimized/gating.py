"""From router logits to expert ids and weights, in one kernel each way.

Stages, and what each gains:

1. `route_torch`: whole-tensor torch operations. Selection sorts 64-bit keys that no two experts of
   a token share, so the fast, unstable `topk` is deterministic. This is what a CPU user gets.
2. `route_triton`: one kernel that reads the logits once and keeps the row in registers for score,
   bias, groups, top-k, renormalisation and scale; K passes of argmax over integer keys.
3. `route_with_counts`: the same launch also counts the tokens of each expert, which would else read
   the ids back. Atomics add integers, so their order changes nothing.
4. The backward pass is one kernel too (`gating_backward`): closed form, no [T, E] intermediate.

All give the results of `moe_reference.gating.route`; ties go to the lowest expert id.

Dimension key: T tokens, E experts, K experts per token, G groups.
"""

from typing import Any

import torch
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import RoutingConfig

from moe_optimized.autograd import once
from moe_optimized.compiling import opaque
from moe_optimized.dispatch import count_tokens
from moe_optimized.gating_backward import norm_block, route_gradient
from moe_optimized.interpreter import (
    INTERPRETED,
    KERNEL_DTYPES,
    has_kernels,
    jit,
    launch,
    power_of_two,
    tl,
)
from moe_optimized.scores import score, score_block

# Selection keys below that of -inf: a lane without an expert or one that was chosen already, an
# expert of a group that was not chosen, a NaN.
_TAKEN = -(1 << 31)
_MASKED = _TAKEN + 1
_NAN = _TAKEN + 2


def route(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts per token and weigh them, with the fastest means of the logits' device.

    Args:
        logits: [T, E], any float dtype.
        config: which routing is meant.
        bias: [E] or None, added to the scores that choose, never to those that weigh.
        token_ids: [T], int32 or int64; needed with `config.hash_table` and unused otherwise.
        ids_dtype: int32 or int64, of the expert ids.

    Returns:
        weights: [T, K], float32 (float64 for float64 logits), differentiable in the logits.
        expert_ids: [T, K], descending by selection score.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a token id outside the
            table, or a configuration that E experts cannot satisfy. While a CUDA graph is captured
            nothing can be read back: a token id outside the table then gives expert ids of -1.
    """
    run = route_triton if has_kernels(logits) else route_torch
    return run(logits, config, bias, token_ids, ids_dtype)


def route_with_counts(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `route`, and how many tokens each expert got.

    Args:
        logits: [T, E], any float dtype.
        config: which routing is meant.
        bias: [E] or None.
        token_ids: [T], int32 or int64, or None.
        padding_mask: [T], bool, True = a real token, or None. Padding is routed like any other
            token and left out of the counts.
        ids_dtype: int32 or int64, of the expert ids.

    Returns:
        weights: [T, K], as from `route`.
        expert_ids: [T, K], as from `route`.
        tokens_per_expert: [E], int64.

    Raises:
        TypeError, ValueError: as for `route`, or a mask of the wrong dtype or shape.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    >>> route_with_counts(logits, RoutingConfig(top_k=2))[2].tolist()
    [0, 2, 2]
    """
    run = route_with_counts_triton if has_kernels(logits) else route_with_counts_torch
    return run(logits, config, bias, token_ids, padding_mask, ids_dtype)


def route_torch(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, in whole-tensor torch operations."""
    _check(logits, config, bias, token_ids, ids_dtype)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    scores = None
    if config.order == "score_then_topk":
        scores = score(logits, config.score)
    if config.hash_table is not None:
        table, token_ids = config.hash_table.to(logits.device), token_ids.to(logits.device)
        if torch.compiler.is_compiling():
            expert_ids = look_up(table, token_ids, logits.shape[1])
        else:
            expert_ids = table[token_ids.long()].long()
    else:
        selection = (logits if scores is None else scores).detach()
        if bias is not None:
            selection = selection + bias.detach().to(selection.dtype)
        expert_ids = _select_experts(selection, config)
    return _weigh(logits, scores, expert_ids, config), expert_ids.to(ids_dtype)


def route_with_counts_torch(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `route_with_counts`, in whole-tensor torch operations."""
    weights, expert_ids = route_torch(logits, config, bias, token_ids, ids_dtype)
    _check_mask(padding_mask, logits)
    counted = expert_ids
    if padding_mask is not None:
        counted = expert_ids.where(padding_mask[:, None], -1)
    return weights, expert_ids, count_tokens(counted, logits.shape[1])


@opaque
def route_triton(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, in one Triton kernel, and one for the gradient; float64 is not supported."""
    check_tensor("logits", logits, ("T", "E"), KERNEL_DTYPES)
    _check(logits, config, bias, token_ids, ids_dtype)
    weights, expert_ids, _ = _Route.apply(logits, bias, token_ids, None, config, ids_dtype, False)
    return weights, expert_ids


@opaque
def route_with_counts_triton(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `route_with_counts`, in one Triton kernel; float64 is not supported."""
    check_tensor("logits", logits, ("T", "E"), KERNEL_DTYPES)
    _check(logits, config, bias, token_ids, ids_dtype)
    _check_mask(padding_mask, logits)
    return _Route.apply(logits, bias, token_ids, padding_mask, config, ids_dtype, True)


def _check(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    ids_dtype: torch.dtype,
) -> None:
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    if ids_dtype not in IDS:
        raise TypeError(f"ids_dtype: expected torch.int32 or torch.int64, got {ids_dtype}")
    if not isinstance(config, RoutingConfig):
        raise TypeError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    T, E = logits.shape
    if config.top_k > E:
        raise ValueError(f"top_k: expected at most E = {E}, got {config.top_k}")
    if bias is not None:
        check_tensor("bias", bias, (E,), FLOATS)
    if config.hash_table is not None:
        check_tensor("token_ids", token_ids, (T,), IDS)
        # A compiled call cannot look at ids here; `look_up` does.
        if not torch.compiler.is_compiling():
            _check_table(config.hash_table, token_ids, E)
    G = config.num_groups
    if G == 1:
        return
    if E % G:
        raise ValueError(f"num_groups: expected a divisor of E = {E}, got {G}")
    if E // G < 2 and config.group_score == "top2_sum":
        raise ValueError(
            f"num_groups: expected at least 2 experts per group with group_score 'top2_sum', "
            f"got {E // G}"
        )
    allowed = config.topk_groups * (E // G)
    if config.top_k > allowed:
        raise ValueError(
            f"top_k: expected at most the {allowed} experts of {config.topk_groups} groups, "
            f"got {config.top_k}"
        )


def _check_mask(padding_mask: torch.Tensor | None, logits: torch.Tensor) -> None:
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (logits.shape[0],), (torch.bool,))


def _check_table(table: torch.Tensor, token_ids: torch.Tensor, num_experts: int) -> None:
    if token_ids.numel() == 0 or _is_captured(table) or _is_captured(token_ids):
        return
    for name, ids, end in (
        ("token_ids", token_ids, table.shape[0]),
        ("hash_table", table, num_experts),
    ):
        if ids.numel():
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= end:
                came = low if low < 0 else high
                raise ValueError(f"{name}: expected ids in [0, {end}), got {came}")


@torch.library.custom_op("moespec::look_up", mutates_args=())
def look_up(table: torch.Tensor, token_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The experts that a hash table has for each token, as an operator of torch.

    Args:
        table: [vocabulary, K], int32 or int64.
        token_ids: [T], int32 or int64.
        num_experts: E.

    Returns:
        [T, K], int64.

    Raises:
        ValueError: a token id outside the table, or an expert id outside [0, E).
    """
    _check_table(table, token_ids, num_experts)
    return table[token_ids.long()].long()


@look_up.register_fake
def _(table: torch.Tensor, token_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return table.new_empty((token_ids.shape[0], table.shape[1]), dtype=torch.int64)


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _select_experts(selection: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    T, E = selection.shape
    G, L = config.num_groups, config.topk_groups
    if G == 1 or L == G:
        return _top(selection, config.top_k, None)
    # One NaN must not decide about its whole group.
    known = selection.masked_fill(selection.isnan(), -torch.inf).view(T, G, E // G)
    group_scores = known.topk(_summed_experts(config), dim=-1).values.sum(-1)
    groups = _top(group_scores, L, None)
    masked = torch.ones(T, G, dtype=torch.bool, device=selection.device).scatter_(1, groups, False)
    masked = masked.repeat_interleave(E // G, dim=1)
    if config.mask_fill == "zero":
        return _top(selection.masked_fill(masked, 0.0), config.top_k, None)
    return _top(selection, config.top_k, masked)


def _summed_experts(config: RoutingConfig) -> int:
    """How many of a group's best experts make up its score."""
    shares = {"max": 1, "top2_sum": 2, "topk_share_sum": config.top_k // config.topk_groups}
    return shares[config.group_score]


def _top(selection: torch.Tensor, k: int, masked: torch.Tensor | None) -> torch.Tensor:
    """Ids of the k greatest per row, ties to the lowest id; NaN after all, masked after NaN."""
    E = selection.shape[1]
    nan = selection.isnan()
    if selection.dtype is torch.float64:
        order = selection.masked_fill(nan, -torch.inf).sort(descending=True, stable=True).indices
        tier = nan.to(torch.uint8) if masked is None else nan + 2 * masked.to(torch.uint8)
        last = tier.gather(1, order).sort(stable=True).indices
        return order.gather(1, last)[:, :k].contiguous()
    # The bits of a float order like an integer once the negative ones are reversed (+ 0.0 makes
    # one zero of two); below -inf there is room for two more. The id makes each key unique.
    bits = (selection + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(nan, _NAN)
    if masked is not None:
        bits = bits.masked_fill(masked, _MASKED)
    keys = (bits.long() << 32) | torch.arange(E - 1, -1, -1, device=selection.device)
    return keys.topk(k, dim=-1).indices


def _weigh(
    logits: torch.Tensor,
    scores: torch.Tensor | None,
    expert_ids: torch.Tensor,
    config: RoutingConfig,
) -> torch.Tensor:
    if scores is None:
        weights = score(logits.gather(1, expert_ids), config.score)
    else:
        weights = scores.gather(1, expert_ids)
    renormalized = _renormalizes(config)
    if renormalized:
        if config.norm == "sum":
            norm = weights.sum(-1, keepdim=True)
        else:
            norm = torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
        if config.epsilon_mode == "clamp":
            norm = norm.clamp(min=config.epsilon)
        else:
            norm = norm + config.epsilon
        weights = weights / norm
    return weights * _factor(config)


def _renormalizes(config: RoutingConfig) -> bool:
    return config.renormalize and (config.top_k > 1 or config.renormalize_single)


def _factor(config: RoutingConfig) -> float:
    if config.scale_when == "not_renormalized" and _renormalizes(config):
        return 1.0
    return config.scale


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        config: RoutingConfig,
        ids_dtype: torch.dtype,
        counted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        T, E = logits.shape
        weights = logits.new_empty((T, config.top_k), dtype=torch.float32)
        expert_ids = logits.new_empty((T, config.top_k), dtype=ids_dtype)
        counts = logits.new_zeros(E, dtype=torch.int64) if counted else None
        _launch(logits, bias, token_ids, padding_mask, config, weights, expert_ids, counts)
        ctx.save_for_backward(logits, expert_ids)
        ctx.config = config
        ctx.mark_non_differentiable(*((expert_ids, counts) if counted else (expert_ids,)))
        return weights, expert_ids, counts

    @staticmethod
    @once("route_triton")
    def backward(
        ctx: Any, grad: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, expert_ids = ctx.saved_tensors
        how = ctx.config
        out = route_gradient(logits, expert_ids, grad, how, _renormalizes(how), _factor(how))
        return out, None, None, None, None, None, None


def _launch(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    config: RoutingConfig,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    counts: torch.Tensor | None,
) -> None:
    T, E = logits.shape
    # A group starts at a power of two, so that a row is [groups, members] and a row of experts.
    limited = config.num_groups > config.topk_groups and config.hash_table is None
    groups = config.num_groups if limited else 1
    block_g, block_m = power_of_two(groups), power_of_two(E // groups)
    block_t, num_warps = _rows_per_program(T, block_g * block_m)
    hashed = config.hash_table is not None
    table = config.hash_table.to(logits.device) if hashed else expert_ids
    token_ids = token_ids.to(logits.device) if hashed else expert_ids
    mask = expert_ids if padding_mask is None else padding_mask.view(torch.uint8)
    launch(
        route_topk_kernel,
        (-(-T // block_t),),
        logits,
        logits if bias is None else bias,
        table,
        token_ids,
        mask,
        weights,
        expert_ids,
        expert_ids if counts is None else counts,
        T,
        table.shape[0],
        logits.stride(0),
        logits.stride(1),
        0 if bias is None else bias.stride(0),
        table.stride(0),
        table.stride(1),
        token_ids.stride(0),
        mask.stride(0),
        float(config.epsilon),
        float(_factor(config)),
        SCORE=config.score,
        SCORE_FIRST=config.order == "score_then_topk",
        HAS_BIAS=bias is not None,
        HASHED=hashed,
        RENORMALIZE=_renormalizes(config),
        SQUARES=config.norm == "l2",
        CLAMP=config.epsilon_mode == "clamp",
        GROUPS=groups,
        MEMBERS=E // groups,
        TOPK_GROUPS=config.topk_groups if limited else 1,
        SUMMED=_summed_experts(config),
        ZERO_FILL=config.mask_fill == "zero",
        TOP_K=config.top_k,
        COUNT=counts is not None,
        PADDED=padding_mask is not None,
        TAKEN=_TAKEN,
        MASKED=_MASKED,
        NAN=_NAN,
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        BLOCK_M=block_m,
        BLOCK_K=power_of_two(config.top_k),
        num_warps=num_warps,
    )


def _rows_per_program(T: int, lanes: int) -> tuple[int, int]:
    """Rows of a program and its warps: reductions inside one warp need no shared memory."""
    if INTERPRETED:
        return min(power_of_two(T), max(1, 16384 // lanes)), 4
    if lanes > 512:
        return 1, 4
    return (min(4, 512 // lanes) if T >= 1024 else 1), 1


@jit
def order_key(x, NAN: tl.constexpr):
    """Int32 keys in the order of float32 `x`; equal zeros, and NaN below -inf."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, NAN, keys)


@jit
def route_topk_kernel(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ids_ptr,
    mask_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    num_tokens,
    vocabulary,
    stride_lt,
    stride_le,
    stride_be,
    stride_vt,
    stride_vk,
    stride_it,
    stride_m,
    epsilon,
    factor,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HASHED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SQUARES: tl.constexpr,
    CLAMP: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    SUMMED: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    TAKEN: tl.constexpr,
    MASKED: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights and ids of BLOCK_T tokens; a row is BLOCK_G groups of BLOCK_M lanes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < num_tokens
    lanes = tl.arange(0, BLOCK_G * BLOCK_M)
    experts = (lanes // BLOCK_M) * MEMBERS + lanes % BLOCK_M
    in_experts = (lanes // BLOCK_M < GROUPS) & (lanes % BLOCK_M < MEMBERS)

    offsets = rows[:, None] * stride_lt + experts.to(tl.int64)[None, :] * stride_le
    mask = in_rows[:, None] & in_experts[None, :]
    values = tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    if SCORE_FIRST:
        values = score_block(values, SCORE)

    if HASHED:
        token_ids = tl.load(token_ids_ptr + rows * stride_it, mask=in_rows, other=-1).to(tl.int64)
        in_table = (token_ids >= 0) & (token_ids < vocabulary)
    else:
        selection = values
        if HAS_BIAS:
            bias = tl.load(bias_ptr + experts.to(tl.int64) * stride_be, mask=in_experts, other=0.0)
            selection = selection + bias.to(tl.float32)[None, :]
        keys = tl.where(in_experts[None, :], order_key(selection, NAN), TAKEN)

        if TOPK_GROUPS < GROUPS:
            known = (selection == selection) & in_experts[None, :]
            members = tl.where(known, selection, float("-inf"))
            members = tl.reshape(members, (BLOCK_T, BLOCK_G, BLOCK_M))
            totals = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
            places = tl.arange(0, BLOCK_M)[None, None, :]
            for _ in range(SUMMED):
                totals += tl.max(members, 2)
                best = tl.argmax(members, 2)
                members = tl.where(places == best[:, :, None], float("-inf"), members)

            groups = tl.arange(0, BLOCK_G)[None, :]
            group_keys = tl.where(groups < GROUPS, order_key(totals, NAN), TAKEN)
            chosen_groups = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
            for _ in range(TOPK_GROUPS):
                hit = groups == tl.argmax(group_keys, 1)[:, None]
                chosen_groups = tl.where(hit, 1, chosen_groups)
                group_keys = tl.where(hit, TAKEN, group_keys)
            allowed = tl.broadcast_to(chosen_groups[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_M))
            allowed = tl.reshape(allowed, (BLOCK_T, BLOCK_G * BLOCK_M))
            fill = 0 if ZERO_FILL else MASKED
            keys = tl.where((allowed == 0) & in_experts[None, :], fill, keys)

    columns = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    taken = tl.zeros((BLOCK_T, BLOCK_G * BLOCK_M), tl.int32)
    for k in range(TOP_K):
        if HASHED:
            entry = table_ptr + token_ids * stride_vt + tl.cast(k, tl.int64) * stride_vk
            expert = tl.load(entry, mask=in_table, other=-1).to(tl.int32)
            hit = (experts[None, :] == expert[:, None]) & in_experts[None, :]
        else:
            lane = tl.argmax(keys, 1)
            hit = lanes[None, :] == lane[:, None]
            expert = (lane // BLOCK_M) * MEMBERS + lane % BLOCK_M
            keys = tl.where(hit, TAKEN, keys)
        value = tl.sum(tl.where(hit, values, 0.0), 1)
        chosen = tl.where(columns == k, value[:, None], chosen)
        taken += hit.to(tl.int32)
        tl.store(ids_ptr + rows * TOP_K + k, expert.to(ids_ptr.dtype.element_ty), mask=in_rows)

    if COUNT:
        real = in_rows
        if PADDED:
            real = real & (tl.load(mask_ptr + rows * stride_m, mask=in_rows, other=0) != 0)
        counts = tl.sum(tl.where(real[:, None], taken, 0), 0)
        used = in_experts & (counts > 0)
        counts = counts.to(counts_ptr.dtype.element_ty)
        tl.atomic_add(counts_ptr + experts, counts, mask=used, sem="relaxed")

    if not SCORE_FIRST:
        chosen = score_block(chosen, SCORE)
    chosen = tl.where(columns < TOP_K, chosen, 0.0)
    if RENORMALIZE:
        norm = norm_block(chosen, SQUARES)
        # tl.maximum would turn a NaN into epsilon.
        norm = tl.where(norm < epsilon, epsilon, norm) if CLAMP else norm + epsilon
        chosen = chosen / norm[:, None]
    out = weights_ptr + rows[:, None] * TOP_K + columns
    tl.store(out, chosen * factor, mask=in_rows[:, None] & (columns < TOP_K))
