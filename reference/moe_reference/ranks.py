r"""Ranks: how the parts of a layer that live in different places exchange rows.

Everything here is made of one exchange, the *all-to-all*. Rank i cuts its rows into one piece per
rank, $x_i = [x_{i0}, \dots, x_{i,R-1}]$, and rank j gets

$$
y_j = [x_{0j}, x_{1j}, \dots, x_{R-1,j}]
$$

The lengths of the pieces are the *splits*: rank i sends $n_{i0}, n_{i1}, \dots$ rows, and rank j
receives $n_{0j}, n_{1j}, \dots$. Its gradient is the way back: an all-to-all with the two swapped.

Every function takes a list with one entry for each rank that lives in this process. For
`ListOfRanks` these are all ranks: a reader can step through and look at each. For `ProcessRanks` it
is one, and the others are called with theirs in other processes. The same code serves both.

The loss is the sum of the ranks' own losses. So nothing is divided by R, and where R ranks hold
the same output, the loss of one of them counts, or 1 / R of each.

Dimension key: R ranks of a group, S rows, T tokens or other rows, each rank its own number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Splits = Sequence[Sequence[int]]


class Ranks(ABC):
    """Some ranks, and the exchange between them.

    Attributes:
        size: R, how many ranks exchange with each other.
        here: the ranks that live in this process, each counted in its own group: the entries of
            every list.
    """

    size: int
    here: tuple[int, ...]

    @abstractmethod
    def all_to_all(
        self, rows: Sequence[torch.Tensor], send: Splits, receive: Splits
    ) -> list[torch.Tensor]:
        """Send a piece of the rows to every rank, and receive one from every rank.

        Args:
            rows: one [S, ...] for each rank here, any dtype, the same on all ranks.
            send: for each rank here the R lengths of its pieces, adding up to S.
            receive: for each rank here the R lengths of what comes.

        Returns:
            The pieces that came, in the order of the ranks that sent them. Differentiable.
        """


class ListOfRanks(Ranks):
    """All ranks in one process, with or without groups that exchange apart from each other.

    Args:
        groups: the ranks of each group, all of one size, every rank from 0 on once. A number means
            one group of so many.

    Raises:
        ValueError: the groups are of different sizes, or not every rank once.

    >>> one, two = torch.tensor([1, 2, 3]), torch.tensor([4])
    >>> ListOfRanks(2).all_to_all([one, two], send=[[1, 2], [1, 0]], receive=[[1, 1], [2, 0]])
    [tensor([1, 4]), tensor([2, 3])]
    """

    def __init__(self, groups: int | Sequence[Sequence[int]]) -> None:
        self.groups = [list(range(groups))] if isinstance(groups, int) else [*map(list, groups)]
        members = [rank for group in self.groups for rank in group]
        sizes = {len(group) for group in self.groups}
        if len(sizes) != 1 or 0 in sizes or sorted(members) != list(range(len(members))):
            raise ValueError(
                f"groups: expected groups of one size, every rank once, got {self.groups}"
            )
        self.size = sizes.pop()
        place = {rank: i for group in self.groups for i, rank in enumerate(group)}
        self.here = tuple(place[rank] for rank in range(len(members)))

    def all_to_all(
        self, rows: Sequence[torch.Tensor], send: Splits, receive: Splits
    ) -> list[torch.Tensor]:
        """See `Ranks`. Splits that do not fit each other raise ValueError."""
        pieces = [each.split(list(lengths)) for each, lengths in zip(rows, send, strict=True)]
        came: list[torch.Tensor] = [each[:0] for each in rows]
        for group in self.groups:
            for j, rank in enumerate(group):
                lengths = [send[other][j] for other in group]
                if list(receive[rank]) != lengths:
                    raise ValueError(
                        f"receive: expected {lengths} for rank {rank}, which is what the others "
                        f"send, got {list(receive[rank])}"
                    )
                came[rank] = torch.cat([pieces[other][j] for other in group])
        return came


class ProcessRanks(Ranks):
    """One rank of a process group, gloo or NCCL. All of its ranks have to make the same calls.

    The one collective that is called is `all_to_all_single`. There is also an `all_to_all` of lists
    of tensors, but gloo refuses it where the sizes differ.

    Args:
        group: None takes all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.here = (dist.get_rank(group),)

    def all_to_all(
        self, rows: Sequence[torch.Tensor], send: Splits, receive: Splits
    ) -> list[torch.Tensor]:
        """See `Ranks`. Wrong splits are an error of the backend, or wait for ever."""
        [mine], [sent], [received] = rows, send, receive
        if not (torch.is_grad_enabled() and mine.is_floating_point()):
            return [_exchange(mine, sent, received, self.group)]
        # The way back needs all ranks, so it is part of the graph of every rank, also of one where
        # nothing asks for a gradient. Without it the others would wait.
        anchor = torch.zeros((), requires_grad=True)
        return [_AllToAll.apply(mine, anchor, sent, received, self.group)]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        anchor: torch.Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.way_back = receive, send, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _exchange(gradient, *ctx.way_back), None, None, None, None


def _exchange(
    rows: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    came = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), list(receive), list(send), group=group)
    return came


def all_gather(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """The tensors of all ranks of a group, one below the other, on each of them.

    Written as what it is, everybody sends everything to everybody, so that the numbers of rows may
    differ and the gradient follows: each rank gets back the sum of what all of them ask for.

    Args:
        tensors: one [T, ...] for each rank here, any dtype, the same on every rank.
        ranks: who exchanges.

    Returns:
        One [sum of all T, ...] for each rank here, in the order of the ranks.

    >>> all_gather([torch.tensor([1, 2]), torch.tensor([3])], ListOfRanks(2))
    [tensor([1, 2, 3]), tensor([1, 2, 3])]
    """
    send = [[len(each)] * ranks.size for each in tensors]
    receive = [each.tolist() for each in gather_counts(tensors, ranks)]
    copies = [torch.cat([each] * ranks.size) for each in tensors]
    return ranks.all_to_all(copies, send, receive)


def gather_counts(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """How many rows every rank of a group has: [R], int64, for each rank here.

    Args:
        tensors: one [T, ...] for each rank here, any dtype.
        ranks: who exchanges.

    >>> gather_counts([torch.zeros(2, 7), torch.zeros(0, 7)], ListOfRanks(2))[1].tolist()
    [2, 0]
    """
    one_each = [[1] * ranks.size] * len(tensors)
    lengths = [torch.full((ranks.size,), len(each), device=each.device) for each in tensors]
    return ranks.all_to_all(lengths, one_each, one_each)


def all_reduce(tensors: Sequence[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """The sum of the tensors of all ranks of a group, on each of them.

    Added up in the order of the ranks and in the dtype given, so that all ranks get the same bits.

    Args:
        tensors: one for each rank here, any shape and dtype, the same on every rank.
        ranks: who exchanges.

    >>> all_reduce([torch.tensor([1.0]), torch.tensor([2.0])], ListOfRanks(2))
    [tensor([3.]), tensor([3.])]
    """
    one_each = [[1] * ranks.size] * len(tensors)
    copies = [torch.stack([each] * ranks.size) for each in tensors]
    return [each.sum(dim=0) for each in ranks.all_to_all(copies, one_each, one_each)]


def mesh_of_list(
    data_parallel: int, tensor_parallel: int
) -> tuple[ListOfRanks, ListOfRanks, ListOfRanks]:
    """Ranks in rows and columns, all in one process.

    Rank d · tensor_parallel + t is in row d and column t. The ranks of a row see the same tokens
    and may cut weights among themselves; those of a column see different tokens.

    Args:
        data_parallel: how many rows.
        tensor_parallel: how many columns.

    Returns:
        All ranks; the rows, which are the tensor-parallel groups; the columns, which are the
        data-parallel groups.

    >>> everybody, rows, columns = mesh_of_list(data_parallel=2, tensor_parallel=3)
    >>> rows.groups, columns.groups
    ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]])
    """
    ids = torch.arange(data_parallel * tensor_parallel).view(data_parallel, tensor_parallel)
    return ListOfRanks(ids.numel()), ListOfRanks(ids.tolist()), ListOfRanks(ids.T.tolist())
