r"""The whole layer: router, routed experts, shared expert.

$$
y = \sum_{k=1}^{K} w_k f_{e_k}(x) + c \, \sigma(x \cdot v) \, f_{\text{shared}}(x), \qquad
(w, e) = \mathrm{route}(R x + b)
$$

with the router $R$ and its bias $b$, the shared expert's scale $c$ and its gate $v$, each where
there is one. The routing scale multiplies the routed part only.

Dimension key: N sequences, L tokens per sequence, T = N · L tokens, H hidden size, E experts,
K experts per token, S rows in expert order.

The router's product has a dtype of its own. Everything behind it is computed in float32, or float64
for float64 x, and the output is rounded to x's dtype once.
"""

import dataclasses

import torch

from moe_reference.activations import product
from moe_reference.alignment import local_ids
from moe_reference.checks import FLOATS, IDS, check_experts, check_routing, check_tensor
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerOutput,
    LayerWeights,
)
from moe_reference.dispatch import accumulation_dtype, count_tokens, inverse_permutation
from moe_reference.experts import (
    experts,
    feed_forward,
    one_by_one,
)
from moe_reference.gating import route
from moe_reference.load_balancing import balance_loss


def layer(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    training: bool = False,
) -> LayerOutput:
    """Route every token, and add up what its experts and the shared expert make of it.

    Args:
        x: [N, L, H], any float dtype and strides.
        parameters: the layer's weights, any float dtype.
        config: routing, experts, loss and dtypes. A loss that is taken per sequence takes L as the
            length of one where `config.balance` names none.
        token_ids: [N, L], int32 or int64; needed with a hash table.
        padding_mask: [N, L], bool, True = a real token; None: all are. A padded token is routed and
            computed like any other, but neither enters the loss nor is counted.
        training: with True and `config.balance`, the balance loss is computed.

    Returns:
        `output` [N, L, H], x's dtype; `expert_ids` [T, K], int64; `weights` [T, K]; `balance_loss`,
        a scalar, or None; `tokens_per_expert` [E], int64, the pairs of real tokens. All but ids and
        counts are differentiable. The loss is not added to anything: that is the caller's to do.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or the configuration does not fit E.

    Source: DeepSeekMoE (arXiv 2401.06066), equations 9-11; the shared gate, Qwen2-MoE model code;
    the router's bias, gpt-oss model code.

    >>> from moe_reference.config import RoutingConfig
    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> parameters = LayerWeights(router=torch.ones(1, 1), experts=one, shared=one)
    >>> config = LayerConfig(RoutingConfig(top_k=1), ExpertsConfig("relu", gated=False))
    >>> layer(torch.tensor([[[3.0]]]), parameters, config).output.tolist()
    [[[6.0]]]
    """
    _check_arguments(x, parameters, config, token_ids, padding_mask)
    N, L, H = x.shape
    x_TH = x.reshape(N * L, H)
    ids_T = None if token_ids is None else token_ids.reshape(-1)
    real_T = None if padding_mask is None else padding_mask.reshape(-1)

    logits_TE = router_logits(x_TH, parameters, config)
    weights_TK, expert_ids_TK = route(logits_TE, config.routing, parameters.selection_bias, ids_T)
    wide_TH = x_TH.to(accumulation_dtype(x))
    y_TH = experts(wide_TH, parameters.experts, weights_TK, expert_ids_TK, config.experts)
    if parameters.shared is not None:
        y_TH = y_TH + shared_expert(wide_TH, parameters, config)

    loss = None
    if training and config.balance is not None:
        balance = _with_sequence_length(config.balance, L)
        loss = balance_loss(logits_TE, expert_ids_TK, balance, real_T)
    counted = expert_ids_TK if real_T is None else expert_ids_TK[real_T]
    tokens_per_expert = count_tokens(counted, len(parameters.router))
    output = y_TH.to(x.dtype).view(N, L, H)
    return LayerOutput(output, expert_ids_TK, weights_TK, loss, tokens_per_expert)


def router_logits(x: torch.Tensor, parameters: LayerWeights, config: LayerConfig) -> torch.Tensor:
    """The router's product, its bias included.

    Args:
        x: [T, H].
        parameters: `router` and `router_bias`.
        config: `router_dtype` is the dtype that x, router and bias are rounded to before, and the
            logits after, the product; None takes x's. Float64 x stays float64 whatever it says.

    Returns:
        [T, E], in the router's dtype. The sum over H is in float32 or float64.

    >>> from moe_reference.config import RoutingConfig
    >>> none = ExpertWeights(torch.ones(1, 1, 2), torch.ones(1, 2, 1))
    >>> parameters = LayerWeights(torch.tensor([[1.0, 2.0]]), none, router_bias=torch.ones(1))
    >>> router_logits(torch.ones(1, 2), parameters, LayerConfig(RoutingConfig(1))).item()
    4.0
    """
    dtype = config.router_dtype or x.dtype
    if x.dtype == torch.float64:
        dtype = torch.float64
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = parameters.router_bias
    logits = product(
        x.to(dtype).to(wide),
        parameters.router.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    return logits.to(dtype)


def shared_expert(x: torch.Tensor, parameters: LayerWeights, config: LayerConfig) -> torch.Tensor:
    """What the shared expert adds for every token, gated and scaled.

    Args:
        x: [T, H], any float dtype, in which everything is computed.
        parameters: `shared` and `shared_gate`.
        config: how it computes, and `shared_scale`.

    Returns:
        [T, H], x's dtype.

    >>> from moe_reference.config import RoutingConfig
    >>> one = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    >>> parameters = LayerWeights(torch.ones(1, 1), one, shared=one, shared_gate=torch.zeros(1, 1))
    >>> config = LayerConfig(RoutingConfig(1), ExpertsConfig("relu", gated=False))
    >>> shared_expert(torch.tensor([[3.0]]), parameters, config).item()
    1.5
    """
    assert parameters.shared is not None
    [shared] = one_by_one(parameters.shared)
    y_TH = feed_forward(x, shared, config.experts)
    if parameters.shared_gate is not None:
        y_TH = y_TH * torch.sigmoid(product(x, parameters.shared_gate))
    return y_TH * config.shared_scale


def moe_infer(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    config: ExpertsConfig,
) -> torch.Tensor:
    """The routed part as inference code writes it: sort, one chunk per expert, un-permute, weigh.

    Same result as `experts` without a map. Both exist because published code has one for training
    and the other for inference, and they must not drift apart.

    Args:
        x: [T, H], any float dtype and strides.
        expert_ids: [T, K], int32 or int64.
        weights: [T, K], any float dtype.
        experts: weights of E experts, any float dtype.
        config: how an expert computes.

    Returns:
        [T, H], x's dtype.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    Source: `moe_infer` of the DeepSeek-V2 model code, which cannot do equal ids in a row, ids that
    are not here, or zero tokens; this can.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> x, ids, weights = torch.tensor([[3.0]]), torch.tensor([[0, 0]]), torch.tensor([[0.5, 1.0]])
    >>> moe_infer(x, ids, weights, one, ExpertsConfig("relu", gated=False)).tolist()
    [[4.5]]
    """
    check_routing(x, weights, expert_ids)
    check_experts(experts, x, config)
    T, K = expert_ids.shape
    E = len(experts.down)

    # Pairs that are not here are sorted behind all others, as if they belonged to an expert E.
    ids_TK = local_ids(expert_ids, E)
    here_TK = ids_TK >= 0
    ids_TK = ids_TK.where(here_TK, E)
    order = ids_TK.flatten().argsort(stable=True)
    weights_TK = weights.to(accumulation_dtype(x)).where(here_TK, 0.0)

    sorted_SH = x.to(accumulation_dtype(x))[order // max(K, 1)]
    if config.weight_on == "input":
        sorted_SH = sorted_SH * weights_TK.flatten()[order, None]
        weights_TK = torch.ones_like(weights_TK)
    *chunks, nobodys = sorted_SH.split(count_tokens(ids_TK, E + 1).tolist())
    outputs = [
        feed_forward(chunk, one, config)
        for chunk, one in zip(chunks, one_by_one(experts), strict=True)
    ]
    out_SH = torch.cat([*outputs, torch.zeros_like(nobodys)])
    pairs_TKH = out_SH[inverse_permutation(order)].view(T, K, x.shape[1])
    return (weights_TK[:, :, None] * pairs_TKH).sum(dim=1).to(x.dtype)


def _with_sequence_length(balance: BalanceConfig, L: int) -> BalanceConfig:
    """Losses that are taken per sequence take those of x unless they are told otherwise."""
    if balance.sequence_length is not None:
        return balance
    return dataclasses.replace(balance, sequence_length=max(L, 1))


def _check_arguments(
    x: torch.Tensor,
    parameters: LayerWeights,
    config: LayerConfig,
    token_ids: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
) -> None:
    check_tensor("x", x, ("N", "L", "H"))
    N, L, H = x.shape
    if token_ids is not None:
        check_tensor("token_ids", token_ids, (N, L), IDS)
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask, (N, L), (torch.bool,))
    if config.router_dtype not in (None, *FLOATS):
        raise TypeError(f"router_dtype: expected a float dtype or None, got {config.router_dtype}")
    check_tensor("parameters.router", parameters.router, ("E", H))
    E = len(parameters.router)
    for name in ("router_bias", "selection_bias"):
        bias = getattr(parameters, name)
        if bias is not None:
            check_tensor(f"parameters.{name}", bias, (E,))
    check_experts(parameters.experts, x, config.experts, E, "parameters.experts")
    if parameters.shared is not None:
        check_experts(parameters.shared, x, config.experts, 1, "parameters.shared")
    if parameters.shared_gate is not None:
        check_tensor("parameters.shared_gate", parameters.shared_gate, (1, H))
        if parameters.shared is None:
            raise ValueError("parameters.shared_gate: expected None without a shared expert")
