r"""Token slices: a part of the tokens for each rank, all of one size, and back.

R ranks that have the same tokens share them out. T need not be divisible by R, so rows are appended
first and cut off last:

$$
T' = R \lceil T / R \rceil, \qquad x^r = x_{[r T' / R, \, (r + 1) T' / R)}
$$

Dimension key: T tokens, H hidden size, E experts, R ranks of a group, S rows in expert order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moe_reference.checks import check_count, check_counts
from moe_reference.ranks import Ranks, all_gather

Tensors = Sequence[torch.Tensor]


def pad_tokens(tokens: torch.Tensor, multiple: int, value: float = 0) -> torch.Tensor:
    r"""Append rows until their number is a multiple: $T' = R \lceil T / R \rceil$.

    Padding is appended, so that `trim_tokens` finds the tokens in front. Zero tokens stay zero.

    Args:
        tokens: [T, ...], any dtype.
        multiple: R, at least 1.
        value: what the rows hold; -1 for expert ids, which means *not here*.

    >>> pad_tokens(torch.tensor([7, 8, 9]), 2, value=-1).tolist()
    [7, 8, 9, -1]
    """
    check_count("multiple", multiple, 1)
    behind = -len(tokens) % multiple
    return F.pad(tokens, [0, 0] * (tokens.ndim - 1) + [0, behind], value=value)


def trim_tokens(tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The inverse of `pad_tokens`: the first T rows.

    Args:
        tokens: [T', ...], any dtype.
        num_tokens: T.

    Raises:
        ValueError: there are not as many.

    >>> trim_tokens(torch.tensor([7, 8, 9, -1]), 3).tolist()
    [7, 8, 9]
    """
    check_count("num_tokens", num_tokens)
    if num_tokens > len(tokens):
        raise ValueError(f"num_tokens: expected at most {len(tokens)}, got {num_tokens}")
    return tokens[:num_tokens].clone()


def slice_tokens(tokens: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    r"""The r-th of R equal slices: rows $r T' / R$ to $(r + 1) T' / R - 1$.

    Args:
        tokens: [T', ...], any dtype.
        size: R.
        rank: r.

    Raises:
        ValueError: R does not divide the number of rows. What is left over would be nobody's.

    >>> slice_tokens(torch.tensor([7, 8, 9, -1]), size=2, rank=1).tolist()
    [9, -1]
    """
    check_count("size", size, 1)
    check_count("rank", rank)
    if len(tokens) % size != 0 or rank >= size:
        raise ValueError(f"size: expected {size} equal slices of {len(tokens)} rows, got {rank=}")
    share = len(tokens) // size
    return tokens[rank * share : (rank + 1) * share].clone()


def enter_slices(tokens: Tensors, ranks: Ranks, value: float = 0) -> list[torch.Tensor]:
    """From the same tokens on all ranks of a group to a slice on each: pad, then slice.

    Args:
        tokens: [T, ...] for each rank here, any dtype.
        ranks: the ranks of the group.
        value: what padding holds.

    >>> from moe_reference.ranks import ListOfRanks
    >>> enter_slices([torch.tensor([7, 8, 9])] * 2, ListOfRanks(2))
    [tensor([7, 8]), tensor([9, 0])]
    """
    return [
        slice_tokens(pad_tokens(each, ranks.size, value), ranks.size, rank)
        for each, rank in zip(tokens, ranks.here, strict=True)
    ]


def leave_slices(slices: Tensors, num_tokens: Sequence[int], ranks: Ranks) -> list[torch.Tensor]:
    """The inverse of `enter_slices`: gather the slices of the group on each rank, then trim.

    Args:
        slices: [T' / R, ...] for each rank here, any dtype.
        num_tokens: T for each rank here.
        ranks: the ranks of the group.

    >>> from moe_reference.ranks import ListOfRanks
    >>> leave_slices([torch.tensor([7, 8]), torch.tensor([9, 0])], [3, 3], ListOfRanks(2))
    [tensor([7, 8, 9]), tensor([7, 8, 9])]
    """
    gathered = all_gather(slices, ranks)
    return [trim_tokens(each, T) for each, T in zip(gathered, num_tokens, strict=True)]


def pad_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Append zeros to the rows of each expert: $c'_e = R \lceil c_e / R \rceil$.

    For experts that are computed by a tensor-parallel group which cuts their rows into equal
    slices. An expert without rows gets none.

    Args:
        rows: [S, H] in expert order.
        tokens_per_expert: [E], int32 or int64, adding up to S.
        multiple: R, at least 1.

    Returns:
        The padded rows, and how many each expert has now.

    >>> rows, counts = pad_experts(torch.tensor([[7.0], [8.0], [9.0]]), torch.tensor([1, 2]), 2)
    >>> rows[:, 0].tolist(), counts.tolist()
    ([7.0, 0.0, 8.0, 9.0], [2, 2])
    """
    check_counts(tokens_per_expert, len(rows))
    padded = [pad_tokens(each, multiple) for each in rows.split(tokens_per_expert.tolist())]
    counts_E = -(-tokens_per_expert // multiple) * multiple
    return torch.cat([rows[:0], *padded]), counts_E


def trim_experts(
    rows: torch.Tensor, tokens_per_expert: torch.Tensor, multiple: int
) -> torch.Tensor:
    """The inverse of `pad_experts`.

    Args:
        rows: [S', H] in expert order, padding included.
        tokens_per_expert: [E], int32 or int64, the counts without padding.
        multiple: R.

    >>> trim_experts(torch.tensor([[7.0], [0.0], [8.0], [9.0]]), torch.tensor([1, 2]), 2)[:, 0]
    tensor([7., 8., 9.])
    """
    padded_E = (-(-tokens_per_expert // multiple) * multiple).tolist()
    pieces = zip(rows.split(padded_E), tokens_per_expert.tolist(), strict=True)
    return torch.cat([rows[:0], *(trim_tokens(piece, count) for piece, count in pieces)])
