r"""Load balancing: the auxiliary losses of published systems.

With $f_i$ the share of all assignments that went to expert $i$ and $P_i$ the mean over tokens of
its probability, every published loss is a variant of

$$
L = \mathrm{coefficient} \cdot E \sum_i f_i P_i
$$

The counts in $f$ have no gradient; the gradient reaches the router through $P$. The product is
taken expert by expert: summed over all pairs, $f_i P_j$ gives the constant E. Values before the
coefficient for E = 8 and K = 2, with all experts alike and with all tokens on two experts:

| loss | alike | collapsed |
|---|---|---|
| `switch`, `deepseek_expert`, `deepseek_sequence` | 1 | 4 |
| `deepseek_device`, 4 devices, both experts on one | 1 | 4 |
| `gshard`, all probability on one first choice | 1 | 8 |
| `transformers_concatenated` | 2 | 8 |

How a loss joins the graph is in `loss_graph`; balance without a loss, in `bias_update`.

Dimension key: T tokens, E experts, K experts per token, N sequences, L tokens per sequence,
D devices.
"""

from collections.abc import Sequence

import torch

from moe_reference.bias_update import global_counts as global_counts
from moe_reference.bias_update import update_bias as update_bias
from moe_reference.checks import FLOATS, IDS, check_tensor
from moe_reference.config import BalanceConfig
from moe_reference.gating import scores, upcast
from moe_reference.loss_graph import inject_loss as inject_loss
from moe_reference.loss_graph import inject_scaled_loss as inject_scaled_loss


def balance_loss(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """The auxiliary loss of one layer, times its coefficient.

    Args:
        logits: [T, E], any float dtype, one sequence after the other.
        expert_ids: [T, K], int32 or int64, in descending selection order: the router's choice
            before any token is dropped. An id outside [0, E) is not counted.
        config: which loss. `gshard` and `deepseek_sequence` are taken per sequence of
            `sequence_length` tokens and averaged over the sequences that have a real token;
            `gshard` without a length takes the batch as one sequence.
        padding_mask: [T], bool, True = a real token. Padding changes nothing, whatever it holds.
        tokens_per_expert: [E], int or float: the counts of the global batch, instead of those of
            `expert_ids`. The probabilities stay those of `logits`, so the mean over ranks or
            micro-batches, weighted by their real tokens, is the loss of the global batch, and so is
            its gradient, however the batch is cut. Unweighted it is where all have as many.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in the logits; 0 without
        tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape; a length that does not divide T; devices that do not divide E;
            counts with `gshard` (first choices only) or `deepseek_sequence` (counts of its own).

    Source: Switch (arXiv 2101.03961, equations 4-6) as in Megatron-LM's
    `switch_load_balancing_loss_func`; GShard (2006.16668); DeepSeekMoE (2401.06066, equations
    12-17); DeepSeek-V3 (2412.19437, equations 17-20); transformers' `load_balancing_loss_func`.

    >>> expert_ids = torch.tensor([[0, 1], [2, 3]])
    >>> balance_loss(torch.zeros(2, 4), expert_ids, BalanceConfig("switch")).item()
    1.0
    """
    _check(logits, expert_ids, config, padding_mask, tokens_per_expert)
    T, E = logits.shape
    K = expert_ids.shape[1]
    L = _tokens_per_sequence(T, config)
    N = T // L if T > 0 else 0
    real_T = padding_mask
    if real_T is None:
        real_T = torch.ones(T, dtype=torch.bool, device=logits.device)
    real_N = real_T.view(N, L).sum(dim=1)

    probabilities_TE = _probabilities(logits, real_T, config)
    P_NE = probabilities_TE.view(N, L, E).sum(dim=1) / real_N.clamp(min=1)[:, None]

    if tokens_per_expert is None:
        counted_ids = expert_ids[:, :1] if config.loss == "gshard" else expert_ids
        counts_NE = _assignments(counted_ids, real_T, E).view(N, L, E).sum(dim=1)
    else:
        counts_NE = tokens_per_expert.detach().expand(N, E)
    counts_NE = counts_NE.to(P_NE)
    total_N1 = counts_NE.sum(dim=1, keepdim=True)
    f_NE = counts_NE / total_N1.where(total_N1 > 0, 1.0)

    if config.loss == "deepseek_device":
        loss_N = _device_loss(f_NE, P_NE, config)
    else:
        loss_N = E * (f_NE * P_NE).sum(dim=1)
    if config.loss == "transformers_concatenated":
        # Its f is per token, not per assignment: the K choices are added up.
        loss_N = K * loss_N
    # A sequence of nothing but padding has loss 0 and is no part of the mean.
    return config.coefficient * loss_N.sum() / (real_N > 0).sum().clamp(min=1)


def concatenated_balance_loss(
    logits: Sequence[torch.Tensor],
    expert_ids: Sequence[torch.Tensor],
    config: BalanceConfig,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One loss over the tokens of all layers, which is how transformers computes it.

    It hides imbalance: eight layers that each send every token to an expert of their own look
    perfectly balanced together, because expert 3 of one layer and expert 3 of the next are counted
    as one. Otherwise call `balance_loss` for each layer and add.

    Args:
        logits: one [T, E] per layer.
        expert_ids: one [T, K] per layer.
        config: as in `balance_loss`; that of transformers is `transformers_concatenated`.
        padding_mask: [T], bool, the same in every layer, or None.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, no layer, or not as many `expert_ids` as `logits`.

    >>> logits = [torch.zeros(2, 4)] * 2
    >>> expert_ids = [torch.tensor([[0], [1]]), torch.tensor([[2], [3]])]
    >>> concatenated_balance_loss(logits, expert_ids, BalanceConfig("switch")).item()
    1.0
    """
    if len(logits) == 0 or len(logits) != len(expert_ids):
        raise ValueError(
            f"expert_ids: expected one tensor for each of at least 1 layer, "
            f"got {len(expert_ids)} for {len(logits)} of logits"
        )
    for logits_TE, expert_ids_TK in zip(logits, expert_ids, strict=True):
        _check(logits_TE, expert_ids_TK, config, padding_mask, None)
        check_tensor("logits", logits_TE, tuple(logits[0].shape), (logits[0].dtype,))
        check_tensor("expert_ids", expert_ids_TK, tuple(expert_ids[0].shape), IDS)
    mask = None if padding_mask is None else padding_mask.repeat(len(logits))
    return balance_loss(torch.cat(list(logits)), torch.cat(list(expert_ids)), config, mask)


def z_loss(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""The mean over tokens of $(\log \sum_i e^{x_i})^2$, which keeps the logits small.

    Of a batch that is cut, too, the mean has to be weighted by the real tokens of the parts.

    Args:
        logits: [T, E], any float dtype.
        padding_mask: [T], bool, True = a real token, or None.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape.

    Source: ST-MoE (arXiv 2202.08906, equation 5).

    >>> round(z_loss(torch.zeros(3, 4)).item(), 4)  # (log 4)^2
    1.9218
    """
    check_tensor("logits", logits, ("T", "E"))
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (logits.shape[0],), (torch.bool,))
        logits = logits[padding_mask]
    squares_T = torch.logsumexp(upcast(logits), dim=1).square()
    return squares_T.sum() / max(squares_T.shape[0], 1)


def _probabilities(
    logits: torch.Tensor, real_T: torch.Tensor, config: BalanceConfig
) -> torch.Tensor:
    """[T, E] scores whose rows add up to 1; 0, with gradient 0, in rows of padding."""
    padding_T1 = ~real_T[:, None]
    # Cleared before the score function, not only after: NaN times 0 is NaN, in the gradient too.
    scores_TE = scores(logits.masked_fill(padding_T1, 0.0), config.score)
    if config.score != "softmax":
        scores_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + config.epsilon)
    return scores_TE.masked_fill(padding_T1, 0.0)


def _assignments(expert_ids_TK: torch.Tensor, real_T: torch.Tensor, E: int) -> torch.Tensor:
    """[T, E]: how often a token chose an expert; equal ids in a row are counted each."""
    experts_E = torch.arange(E, device=expert_ids_TK.device)
    return (expert_ids_TK[:, :, None] == experts_E).sum(dim=1) * real_T[:, None]


def _device_loss(f_NE: torch.Tensor, P_NE: torch.Tensor, config: BalanceConfig) -> torch.Tensor:
    """The mean of E f over each device's experts, times the sum of P over them."""
    E = f_NE.shape[1]
    by_device = (config.num_devices or 1, -1)
    f_ND = E * f_NE.unflatten(1, by_device).mean(dim=2)
    P_ND = P_NE.unflatten(1, by_device).sum(dim=2)
    return (f_ND * P_ND).sum(dim=1)


def _tokens_per_sequence(T: int, config: BalanceConfig) -> int:
    per_sequence = config.loss in ("gshard", "deepseek_sequence")
    return config.sequence_length if per_sequence and config.sequence_length else T


def _check(
    logits: torch.Tensor,
    expert_ids: torch.Tensor,
    config: BalanceConfig,
    padding_mask: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
) -> None:
    check_tensor("logits", logits, ("T", "E"))
    T, E = logits.shape
    check_tensor("expert_ids", expert_ids, (T, "K"), IDS)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (T,), (torch.bool,))
    if tokens_per_expert is not None:
        check_tensor("tokens_per_expert", tokens_per_expert, (E,), IDS + FLOATS)
        if config.loss in ("gshard", "deepseek_sequence"):
            raise ValueError(f"tokens_per_expert: expected None with '{config.loss}', got a tensor")
    length, devices = config.sequence_length, config.num_devices
    if config.loss == "deepseek_sequence" and length is None:
        raise ValueError("sequence_length: expected a number with 'deepseek_sequence', got None")
    if T > 0 and T % _tokens_per_sequence(T, config) != 0:
        raise ValueError(f"sequence_length: expected a divisor of T = {T}, got {length}")
    if config.loss == "deepseek_device" and (devices is None or E % devices != 0):
        raise ValueError(f"num_devices: expected a divisor of E = {E}, got {devices}")
