"""One clear sentence for a bad argument: which it is, what was expected, what came."""

import torch

from moe_reference.config import ExpertWeights

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


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise unless `value` is an int of at least `least`.

    Raises:
        TypeError: not an int.
        ValueError: too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_ranks(num_experts: int, world_size: int, rank: int) -> None:
    """Raise unless `rank` is one of `world_size` ranks that share `num_experts` experts."""
    check_count("num_experts", num_experts)
    check_count("world_size", world_size, 1)
    check_count("rank", rank)
    if rank >= world_size:
        raise ValueError(f"rank: expected at most {world_size - 1}, got {rank}")


def check_counts(tokens_per_expert: torch.Tensor, capacity: int) -> None:
    """Raise ValueError unless all counts are from 0 to `capacity`."""
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

    Raises:
        TypeError: a weight is not a float tensor.
        ValueError: a weight has the wrong shape.
    """
    check_tensor(f"{prefix}down", experts.down, (num_experts, hidden_size, "I"))
    E, H, I = experts.down.shape
    J = 2 * I if gated else I
    check_tensor(f"{prefix}gate_up", experts.gate_up, (E, J, H))
    if experts.gate_up_bias is not None:
        check_tensor(f"{prefix}gate_up_bias", experts.gate_up_bias, (E, J))
    if experts.down_bias is not None:
        check_tensor(f"{prefix}down_bias", experts.down_bias, (E, H))
