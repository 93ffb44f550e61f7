"""One clear sentence for a bad argument: which it is, what was expected, what came."""

import torch

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
