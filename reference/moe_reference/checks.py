"""One clear sentence for a bad argument: which it is, what was expected, what came."""

import torch

from moe_reference.config import ExpertsConfig, ExpertWeights

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Raise unless `value` is a tensor of that shape and one of those dtypes.

    Args:
        name: the argument's name, as its caller knows it.
        value: what came.
        shape: one entry per dimension: a size that must match, or a letter where any size does.
        dtypes: the dtypes that are accepted.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape.

    >>> check_tensor("logits", torch.zeros(3), ("T", "E"))
    Traceback (most recent call last):
    ValueError: logits: expected shape [T, E], got [3]
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        came = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {came}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")


def check_float(name: str, value: object) -> None:
    """Raise unless `value` is a tensor of a float dtype, of any shape.

    Args:
        name: the argument's name, as its caller knows it.
        value: what came, whatever its shape.

    Raises:
        TypeError: not a tensor, or of another dtype.

    >>> check_float("logits", torch.zeros(3, dtype=torch.int64))
    Traceback (most recent call last):
    TypeError: logits: expected dtype float64 or float32 or bfloat16 or float16, got int64
    """
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    check_tensor(name, value, shape)


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise unless `value` is an int of at least `least`.

    Args:
        name: the argument's name, as its caller knows it.
        value: what came.
        least: the smallest int that is accepted.

    Raises:
        TypeError: not an int.
        ValueError: too small.

    >>> check_count("top_k", 0, least=1)
    Traceback (most recent call last):
    ValueError: top_k: expected at least 1, got 0
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_ranks(num_experts: int, world_size: int, rank: int) -> None:
    """Raise unless `rank` is one of `world_size` ranks that share `num_experts` experts.

    Args:
        num_experts: E, at least 0.
        world_size: R, at least 1.
        rank: from 0 to R - 1.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is outside its range.

    >>> check_ranks(8, world_size=2, rank=2)
    Traceback (most recent call last):
    ValueError: rank: expected at most 1, got 2
    """
    check_count("num_experts", num_experts)
    check_count("world_size", world_size, 1)
    check_count("rank", rank)
    if rank >= world_size:
        raise ValueError(f"rank: expected at most {world_size - 1}, got {rank}")


def check_counts(tokens_per_expert: torch.Tensor, capacity: int) -> None:
    """Raise unless all counts are from 0 to `capacity`.

    Args:
        tokens_per_expert: [E], int32 or int64.
        capacity: C, the most that there may be.

    Raises:
        ValueError: a count is outside [0, C].

    >>> check_counts(torch.tensor([1, 3]), 2)
    Traceback (most recent call last):
    ValueError: tokens_per_expert: expected counts from 0 to 2, got 3
    """
    wrong = tokens_per_expert[(tokens_per_expert < 0) | (tokens_per_expert > capacity)]
    if wrong.numel() > 0:
        raise ValueError(
            f"tokens_per_expert: expected counts from 0 to {capacity}, got {wrong[0].item()}"
        )


def check_weights(
    experts: ExpertWeights,
    gated: bool,
    num_experts: int | str = "E",
    hidden_size: int | str = "H",
    prefix: str = "",
) -> None:
    """Raise unless the weights fit each other, and the sizes where they are given.

    Args:
        experts: the weights, any float dtype and shape.
        gated: whether gate_up is [E, 2I, H] and not [E, I, H].
        num_experts: E, or a letter where any number does.
        hidden_size: H, or a letter.
        prefix: in front of the names of the fields, such as `experts.`.

    Raises:
        TypeError: a weight is not a float tensor.
        ValueError: a weight has the wrong shape.

    >>> check_weights(ExpertWeights(torch.ones(1, 3, 2), torch.ones(1, 2, 2)), gated=True)
    Traceback (most recent call last):
    ValueError: gate_up: expected shape [1, 4, 2], got [1, 3, 2]
    """
    check_tensor(f"{prefix}down", experts.down, (num_experts, hidden_size, "I"))
    E, H, I = experts.down.shape
    J = 2 * I if gated else I
    check_tensor(f"{prefix}gate_up", experts.gate_up, (E, J, H))
    if experts.gate_up_bias is not None:
        check_tensor(f"{prefix}gate_up_bias", experts.gate_up_bias, (E, J))
    if experts.down_bias is not None:
        check_tensor(f"{prefix}down_bias", experts.down_bias, (E, H))


def check_experts(
    experts: ExpertWeights,
    x: torch.Tensor,
    config: ExpertsConfig,
    num_experts: int | None = None,
    name: str = "experts",
) -> None:
    """Raise unless the weights fit each other, the rows and the configuration.

    Args:
        experts: the weights, any float dtype and shape.
        x: the rows, [..., H].
        config: `gated`.
        num_experts: E; None takes any.
        name: the argument's name, as its caller knows it.

    Raises:
        TypeError: not `ExpertWeights` of float tensors.
        ValueError: a weight has the wrong shape.

    >>> weights = ExpertWeights(torch.ones(1, 2, 3), torch.ones(1, 3, 1))
    >>> check_experts(weights, torch.ones(5, 4), ExpertsConfig())
    Traceback (most recent call last):
    ValueError: experts.down: expected shape [E, 4, I], got [1, 3, 1]
    """
    if not isinstance(experts, ExpertWeights):
        raise TypeError(f"{name}: expected ExpertWeights, got {type(experts).__name__}")
    E = "E" if num_experts is None else num_experts
    check_weights(experts, config.gated, E, x.shape[-1], f"{name}.")


def check_routing(x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> None:
    """Raise unless rows, weights and ids are of the same tokens.

    Args:
        x: [T, H], any float dtype.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape.

    >>> check_routing(torch.ones(2, 1), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    Traceback (most recent call last):
    ValueError: weights: expected shape [2, K], got [3, 1]
    """
    check_tensor("x", x, ("T", "H"))
    check_tensor("weights", weights, (len(x), "K"))
    check_tensor("expert_ids", expert_ids, tuple(weights.shape), IDS)
