"""Gates: what the router modules of published systems give back, as weights and ids.

A gate is a module from hidden states to a choice of experts. Some return logits and leave the rest
to the layer; some return what was chosen, in either order; some return a third value, the logits or
a balance loss. Nothing tells these apart when one looks at them, three tensors are three tensors.
So which one is meant is declared.

Dimension key: T tokens, H hidden size, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe_reference.checks import IDS, check_float, check_tensor
from moe_reference.config import RoutingConfig
from moe_reference.gating import route

GateReturns = Literal[
    "logits", "ids_weights", "weights_ids", "logits_weights_ids", "ids_weights_loss"
]


@dataclass(frozen=True, eq=False)
class GateOutput:
    """What a gate gave back.

    Attributes:
        weights: [T, K].
        expert_ids: [T, K].
        logits: [T, E] or None.
        balance_loss: a scalar, or None.
    """

    weights: torch.Tensor
    expert_ids: torch.Tensor
    logits: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


def read_gate(
    output: object,
    returns: GateReturns,
    config: RoutingConfig | None = None,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> GateOutput:
    """What a gate gave back, by what it is declared to return.

    Args:
        output: what the gate returned: a tensor with `logits`, a tuple with all others. Leading
            dimensions, [N, L, K] for [T, K], are flattened.
        returns: the order of its values. A loss may be None.
        config: the routing; needed with `logits`, without effect otherwise.
        bias: [E] or None, the selection bias; with `logits` only.
        token_ids: [T] or None; with `logits` and a hash table only.

    Raises:
        TypeError: not a tensor where one is expected, or of the wrong dtype.
        ValueError: as many values as are not declared, or of the wrong shape.

    Source: transformers (logits, weights, ids), DeepSeek-V2's model code (ids, weights, loss),
    TensorCast, which takes the one for the other.

    >>> ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.3]])
    >>> read_gate((ids, weights, None), "ids_weights_loss").expert_ids
    tensor([[2, 0]])
    """
    if returns not in get_args(GateReturns):
        raise ValueError(f"returns: expected one of {get_args(GateReturns)}, got {returns!r}")
    if returns == "logits":
        if config is None:
            raise ValueError("config: expected a RoutingConfig for a gate of logits, got None")
        logits_TE = _rows("logits", output)
        ids_T = None if token_ids is None else token_ids.flatten()
        weights_TK, expert_ids_TK = route(logits_TE, config, bias, ids_T)
        return GateOutput(weights_TK, expert_ids_TK, logits_TE)

    names = returns.split("_")
    if not isinstance(output, tuple) or len(output) != len(names):
        came = f"{len(output)}" if isinstance(output, tuple) else type(output).__name__
        raise ValueError(f"output: expected {', '.join(names)}, got {came}")
    values = dict(zip(names, output, strict=True))
    weights_TK = _rows("weights", values["weights"])
    expert_ids_TK = _rows("ids", values["ids"], IDS)
    check_tensor("ids", expert_ids_TK, tuple(weights_TK.shape), IDS)
    logits = values.get("logits")
    return GateOutput(
        weights_TK,
        expert_ids_TK,
        None if logits is None else _rows("logits", logits),
        values.get("loss"),
    )


def jitter(
    x: torch.Tensor, epsilon: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    r"""Noise for training: every number times one of its own, uniform in $1 \pm \epsilon$.

    It belongs in front of the router alone (Switch, arXiv 2101.03961, section 2.2). Off by default
    everywhere here: two calls with the same x are no longer the same.

    Args:
        x: [..., H], any float dtype. Not changed; Mixtral's code in transformers multiplies in
            place, and so changes what the rest of the model gets.
        epsilon: at least 0, below 1; 0 gives x itself.
        generator: where the numbers come from; None takes PyTorch's global one.

    Returns:
        x's shape and dtype; differentiable in x.

    Raises:
        ValueError: epsilon is outside its range.

    >>> jitter(torch.ones(2), 0.0)
    tensor([1., 1.])
    """
    check_float("x", x)
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon: expected a number from 0 to below 1, got {epsilon}")
    if epsilon == 0.0:
        return x
    unit = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return x * (1.0 + epsilon * (2.0 * unit - 1.0)).to(x.dtype)


def _rows(name: str, value: object, dtypes: tuple[torch.dtype, ...] | None = None) -> torch.Tensor:
    """A tensor of at least two dimensions, all but the last flattened."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.ndim < 2:
        raise ValueError(f"{name}: expected shape [T, K], got {list(value.shape)}")
    rows = value.flatten(0, -2)
    check_tensor(name, rows, ("T", "K"), *(() if dtypes is None else (dtypes,)))
    return rows
