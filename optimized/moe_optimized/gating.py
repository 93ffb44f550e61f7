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
        expert_ids = _look_up(config.hash_table, token_ids, logits.shape[1])
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
    if config.hash_table is not None:
        token_ids = _in_vocabulary(token_ids, config.hash_table)
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
        if token_ids is None:
            raise ValueError("token_ids: expected a tensor [T] with a hash_table, got None")
        check_tensor("token_ids", token_ids, (T,), IDS)
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


def _in_vocabulary(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    if token_ids.numel():
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"token_ids: expected ids from 0 to {table.shape[0] - 1}, "
                f"got {low if low < 0 else high}"
            )
    return token_ids


def _look_up(table: torch.Tensor, token_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    token_ids = _in_vocabulary(token_ids, table)
    return table.to(token_ids.device)[token_ids.long()].long()


def _score(logits: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    if config.score == "softmax":
        return logits.softmax(-1)
    if config.score == "sigmoid":
        return logits.sigmoid()
    # Below -40 the logarithm of 1 + e^x is e^x to the last bit of a double; the root of that
    # neither underflows early nor divides zero by zero in the gradient.
    small = logits < -40
    root = F.softplus(logits.masked_fill(small, 0.0), threshold=50.0).sqrt()
    return torch.where(small, (logits / 2).exp(), root)


def _select_experts(selection: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    # A NaN counts as the lowest score: it is chosen when nothing else is left, and not twice.
    selection = selection.masked_fill(selection.isnan(), -torch.inf)
    T, E = selection.shape
    G, L = config.num_groups, config.topk_groups
    if G == 1 or L == G:
        return _top(selection, config.top_k, None)
    members = selection.view(T, G, E // G)
    group_scores = members.topk(_summed_experts(config), dim=-1).values.sum(-1)
    group_scores = group_scores.masked_fill(group_scores.isnan(), -torch.inf)
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
    """Ids of the k greatest per row, ties to the lowest id, masked ones after all others."""
    E = selection.shape[1]
    if selection.dtype is torch.float64:
        order = selection.sort(dim=-1, descending=True, stable=True).indices
        if masked is not None:
            last = masked.gather(1, order).to(torch.uint8).sort(dim=-1, stable=True).indices
            order = order.gather(1, last)
        return order[:, :k].contiguous()
    # The bits of a float order like an integer once the negative ones are reversed (+ 0.0 makes
    # one zero of two); the id below them makes each key unique.
    bits = (selection + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    if masked is not None:
        bits = bits.masked_fill(masked, -(1 << 31))
    keys = (bits << 32) | torch.arange(E - 1, -1, -1, device=selection.device)
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
