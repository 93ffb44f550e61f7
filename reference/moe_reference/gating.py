r"""Gating: from router logits to K expert ids and K weights per token.

For one token with logits $x \in \mathbb{R}^E$, scores $s = \mathrm{score}(x)$ and a selection bias
$b$:

$$
\mathcal{K} = \mathrm{topK}(\mathrm{limit}(s + b)), \qquad
w_k = \mathrm{scale} \cdot \frac{s_k}{\lVert s_{\mathcal{K}} \rVert + \epsilon}
\quad (k \in \mathcal{K})
$$

The bias chooses and never weighs: weights are gathered from the unbiased scores, never recovered
as (s + b) - b, which loses every digit of a small score beside a large bias.

Dimension key: T tokens, E experts, K experts per token, G groups, M = E / G experts
of a group, V vocabulary.

Three rules hold throughout. Float64 logits are computed in float64, all others in float32. Of equal
selection scores the lowest expert id wins. A NaN selection score counts as the lowest of all, below
minus infinity, so that every row gets K distinct ids whatever it holds; no row affects another.
"""

import torch
import torch.nn.functional as F

from moe_reference.checks import IDS, check_float, check_tensor
from moe_reference.config import RoutingConfig, Score


def route(
    logits: torch.Tensor,
    config: RoutingConfig,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Choose K experts for each token and weigh them.

    Args:
        logits: [T, E], float32, float64, bfloat16 or float16; any strides.
        config: which published routing is meant.
        bias: [E], any float dtype, or None. Added to the scores (to the logits, with order
            `topk_then_score`) for choosing only. Not used with a hash table.
        token_ids: [T], int32 or int64. Needed with `config.hash_table`, otherwise not used.

    Returns:
        weights [T, K], float32 (float64 for float64 logits), differentiable in the logits, and
        expert_ids [T, K], int64, each row by descending selection score (with a hash table: in the
        order of the table's row).

    Raises:
        TypeError: an argument has the wrong dtype, or `token_ids` is missing.
        ValueError: an argument has the wrong shape, a token id is outside the hash table, or E
            experts cannot be routed as `config` says.

    Source: DeepSeek-V3 (arXiv 2412.19437, equations 13-16) and its published gate, which bias the
    choice; the other fields of `RoutingConfig` name where published systems differ from it.

    >>> weights, expert_ids = route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), RoutingConfig(top_k=2))
    >>> expert_ids.tolist(), [round(weight, 3) for weight in weights[0].tolist()]
    ([[1, 2]], [0.399, 0.399])
    """
    check_tensor("logits", logits, ("T", "E"))
    T, E = logits.shape
    _check_topology(E, config)
    if bias is not None:
        check_tensor("bias", bias, (E,))

    logits_TE = upcast(logits)
    if config.hash_table is not None:
        expert_ids_TK = _look_up(config.hash_table, token_ids, T, E).to(logits.device)
    else:
        selection_TE = _selection_scores(logits_TE, config, bias)
        expert_ids_TK = _select(selection_TE, config)

    weights_TK = _chosen_scores(logits_TE, expert_ids_TK, config)
    return _renormalize_and_scale(weights_TK, config), expert_ids_TK


def scores(logits: torch.Tensor, score: Score) -> torch.Tensor:
    """The score function, over the last dimension.

    Args:
        logits: [..., E], any float dtype.
        score: `softmax` over E; `sigmoid` or `sqrtsoftplus` = sqrt(log(1 + exp(x))) elementwise.

    Returns:
        [..., E], float32 (float64 for float64 logits).

    >>> scores(torch.tensor([0.0, 0.0]), "sigmoid").tolist()
    [0.5, 0.5]
    """
    check_float("logits", logits)
    wide = upcast(logits)
    if score == "softmax":
        return torch.softmax(wide, dim=-1)
    if score == "sigmoid":
        return _sigmoid(wide)
    return _sqrt_softplus(wide)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """What scores are computed in: float64 as it is, anything narrower as float32.

    Args:
        tensor: any shape and float dtype.

    >>> upcast(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    # On a CPU torch.sigmoid rounds the last few elements of a tensor differently from the others,
    # so that equal logits get unequal scores and one token's score depends on the batch. Written
    # out with an exponential of a number that is never positive, it does neither and never
    # overflows.
    z = torch.exp(-torch.where(x >= 0, x, -x))
    return torch.where(x >= 0, 1.0, z) / (1 + z)


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    # softplus(x) underflows long before its root does, and there the root's gradient is infinite.
    # Below -40 softplus(x) is exp(x) to the last bit of a float64, whose root is exp(x / 2).
    tail = torch.exp(x.clamp(max=-40.0) / 2)
    # F.softplus turns into the identity above 20, which is short of float64's precision.
    body = torch.sqrt(-F.logsigmoid(-x.clamp(min=-40.0)))
    return torch.where(x < -40.0, tail, body)


def _selection_scores(
    logits_TE: torch.Tensor, config: RoutingConfig, bias: torch.Tensor | None
) -> torch.Tensor:
    """What experts are chosen by. A choice has no gradient, so neither has this."""
    selection_TE = logits_TE.detach()
    if config.order == "score_then_topk":
        selection_TE = scores(selection_TE, config.score)
    if bias is None:
        return selection_TE
    return selection_TE + bias.detach().to(selection_TE)


def _select(selection_TE: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    """The K best experts of each token, inside its best groups where there are groups."""
    masked_TE = torch.zeros_like(selection_TE, dtype=torch.bool)
    if config.num_groups > 1:
        masked_TE = _outside_best_groups(selection_TE, config)
    if config.mask_fill == "zero":
        # As published by DeepSeek-V2: a masked expert beats an allowed one of negative score.
        selection_TE = selection_TE.masked_fill(masked_TE, 0.0)
        masked_TE = torch.zeros_like(masked_TE)
    return _descending(selection_TE, masked_TE)[:, : config.top_k].contiguous()


def _outside_best_groups(selection_TE: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    """True for the experts of every group that is not among a token's `topk_groups` best."""
    E = selection_TE.shape[1]
    group_scores_TG = _group_scores(selection_TE, config)
    no_group_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    best_groups = _descending(group_scores_TG, no_group_TG)[:, : config.topk_groups]
    outside_TG = torch.ones_like(no_group_TG).scatter(1, best_groups, False)
    return outside_TG.repeat_interleave(E // config.num_groups, dim=1)


def _group_scores(selection_TE: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    """A group's score: the sum of its best experts; `max` is the sum of one."""
    E = selection_TE.shape[1]
    summands = {"max": 1, "top2_sum": 2, "topk_share_sum": config.top_k // config.topk_groups}
    members_TGM = selection_TE.unflatten(1, (config.num_groups, E // config.num_groups))
    # One NaN must not decide about its whole group; a group of nothing else is below all others.
    unknown_TGM = members_TGM.isnan()
    best_TGM = members_TGM.masked_fill(unknown_TGM, -torch.inf).topk(summands[config.group_score])
    return best_TGM.values.sum(dim=2).masked_fill(unknown_TGM.all(dim=2), torch.nan)


def _descending(values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Column ids of each row: best first, then the NaN, then the masked; lowest id first on a tie.

    A masked column comes last even where an allowed one holds -inf or NaN, which filling the
    masked ones with -inf would not achieve. Two stable sorts, the less significant key first.
    """
    nan = values.isnan()
    by_value = values.masked_fill(nan, -torch.inf).argsort(dim=1, descending=True, stable=True)
    tier = nan.long() + 2 * masked.long()
    by_tier = tier.gather(1, by_value).argsort(dim=1, stable=True)
    return by_value.gather(1, by_tier)


def _chosen_scores(
    logits_TE: torch.Tensor, expert_ids_TK: torch.Tensor, config: RoutingConfig
) -> torch.Tensor:
    """The unbiased scores of the chosen experts."""
    if config.order == "score_then_topk":
        return scores(logits_TE, config.score).gather(1, expert_ids_TK)
    return scores(logits_TE.gather(1, expert_ids_TK), config.score)


def _renormalize_and_scale(weights_TK: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    renormalized = config.renormalize and (config.top_k > 1 or config.renormalize_single)
    if renormalized:
        weights_TK = weights_TK / _denominator(weights_TK, config)
    if config.scale_when == "not_renormalized" and renormalized:
        return weights_TK
    return weights_TK * config.scale


def _denominator(weights_TK: torch.Tensor, config: RoutingConfig) -> torch.Tensor:
    if config.norm == "sum":
        norm = weights_TK.sum(dim=1, keepdim=True)
    else:
        norm = torch.linalg.vector_norm(weights_TK, dim=1, keepdim=True)
    return norm + config.epsilon if config.epsilon_mode == "add" else norm.clamp(min=config.epsilon)


def _look_up(table: torch.Tensor, token_ids: torch.Tensor | None, T: int, E: int) -> torch.Tensor:
    """The table's rows for the tokens, [T, K]."""
    if token_ids is None:
        raise TypeError("token_ids: expected a tensor with config.hash_table, got None")
    check_tensor("token_ids", token_ids, (T,), IDS)
    V = table.shape[0]
    _check_range("token_ids", token_ids, V, "the vocabulary of hash_table")
    _check_range("hash_table", table, E, "the experts of logits")
    return table.long()[token_ids.to(table.device).long()]


def _check_range(name: str, ids: torch.Tensor, end: int, what: str) -> None:
    outside = ids[(ids < 0) | (ids >= end)]
    if outside.numel() > 0:
        raise ValueError(f"{name}: expected ids in [0, {end}), {what}, got {outside[0].item()}")


def _check_topology(E: int, config: RoutingConfig) -> None:
    """Raise unless E experts can be routed as the configuration says."""
    K, G = config.top_k, config.num_groups
    if K > E:
        raise ValueError(f"top_k: expected at most E = {E}, the experts of logits, got {K}")
    if G == 1:
        return
    if E % G != 0:
        raise ValueError(f"num_groups: expected a divisor of E = {E}, got {G}")
    if config.group_score == "top2_sum" and E // G < 2:
        raise ValueError(
            f"num_groups: expected at least 2 experts per group with group_score 'top2_sum', "
            f"got {E // G} from E = {E} and num_groups = {G}"
        )
    within_reach = config.topk_groups * (E // G)
    if within_reach < K:
        raise ValueError(
            f"top_k: expected at most topk_groups * E / num_groups = {within_reach}, got {K}"
        )
