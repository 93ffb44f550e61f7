"""From router logits to expert ids and weights, in one kernel.

Stages, and what each gains:

1. `route_torch`: whole-tensor torch operations. Selection sorts 64-bit keys that no two experts of
   a token share, so the fast, unstable `topk` is deterministic. This is what a CPU user gets.
2. `route_triton`: one kernel that reads the logits once and keeps the row in registers for score,
   bias, groups, top-k, renormalisation and scale; K passes of argmax over integer keys.

Both give the results of `moe_reference.gating.route`; ties go to the lowest expert id.

Dimension key: T tokens, E experts, K experts per token, G groups.
"""

import torch
import torch.nn.functional as F
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import RoutingConfig

from moe_optimized.interpreter import COMPILED, INTERPRETED, jit, launch, power_of_two, tl

_MASKED = -(1 << 31)
_NAN = _MASKED + 1


def route(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts per token and weigh them, with the fastest means of the logits' device.

    Args:
        logits: [T, E], any float dtype.
        config: which routing is meant.
        bias: [E] or None, added to the scores that choose, never to those that weigh.
        token_ids: [T], int32 or int64; needed with `config.hash_table` and unused otherwise.

    Returns:
        weights: [T, K], float32 (float64 for float64 logits), differentiable in the logits.
        expert_ids: [T, K], int64, descending by selection score.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a token id outside the
            table, or a configuration that E experts cannot satisfy.
    """
    if COMPILED and logits.is_cuda and logits.dtype is not torch.float64:
        return route_triton(logits, config, bias, token_ids)
    return route_torch(logits, config, bias, token_ids)


def route_torch(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, in whole-tensor torch operations."""
    _check(logits, config, bias, token_ids)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    scores = None
    if config.order == "score_then_topk":
        scores = _score(logits, config)
    if config.hash_table is not None:
        table = config.hash_table.to(logits.device)
        expert_ids = table[token_ids.to(logits.device).long()].long()
    else:
        selection = (logits if scores is None else scores).detach()
        if bias is not None:
            selection = selection + bias.detach().to(selection.dtype)
        expert_ids = _select_experts(selection, config)
    return _weigh(logits, scores, expert_ids, config), expert_ids


def route_triton(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, in one Triton kernel; float64 is not supported.

    The gradient is computed by torch operations from the saved logits and ids.
    """
    _check(logits, config, bias, token_ids)
    if logits.dtype is torch.float64:
        raise TypeError("logits: expected dtype float32, bfloat16 or float16, got float64")
    return _Route.apply(logits, bias, token_ids, config)


def _check(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor | None,
) -> None:
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    if not isinstance(config, RoutingConfig):
        raise TypeError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    T, E = logits.shape
    if config.top_k > E:
        raise ValueError(f"top_k: expected at most E = {E}, got {config.top_k}")
    if bias is not None:
        check_tensor("bias", bias, (E,), FLOATS)
    if config.hash_table is not None:
        check_tensor("token_ids", token_ids, (T,), IDS)
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


def _check_table(table: torch.Tensor, token_ids: torch.Tensor, num_experts: int) -> None:
    for name, ids, end in (
        ("token_ids", token_ids, table.shape[0]),
        ("hash_table", table, num_experts),
    ):
        if ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= end:
                came = low if low < 0 else high
                raise ValueError(f"{name}: expected ids in [0, {end}), got {came}")


def _score(logits: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    if config.score == "softmax":
        return logits.softmax(-1)
    if config.score == "sigmoid":
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
        weights = _score(logits.gather(1, expert_ids), config)
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
