r"""Expert parallelism: tokens travel to the ranks that hold their experts, and the outputs back.

Rank r has tokens of its own, $x^r$, and a share of the experts, $\mathcal{E}_r$. What it wants is

$$
y^r_t = \sum_{k=1}^{K} w^r_{tk} \, f_{e^r_{tk}}(x^r_t)
$$

with experts that are mostly elsewhere. Six steps:

1. Sort the pairs by expert: `dispatch`. Experts stand in the order of the ranks that hold them.
2. Tell every rank how many rows each of its experts gets. All splits follow from these counts.
3. Send the rows. They arrive rank by rank, the rows of one rank sorted by expert.
4. Sort what came by expert, whoever sent it, and let each expert compute its rows.
5. Undo that sort, and send the rows back with the splits of step 3 swapped.
6. Every row is where it left from: weigh and add, `combine`.

Nothing but counts and rows is exchanged: no expert's weights, no router weights, no ids. Rows
travel in x's dtype, which rounds an output once more than without ranks. With `weight_on` = input
the row that is sent is w · x.

Dimension key: T tokens of a rank, H hidden size, K experts per token, E experts (of one rank in the
shape [R, E]), P physical experts, R ranks, S rows that leave a rank or come to it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.dispatch import combine, inverse_permutation
from moe_reference.experts import check_experts, check_routing
from moe_reference.parallel_steps import exchange_counts as exchange_counts
from moe_reference.parallel_steps import expert_major as expert_major
from moe_reference.parallel_steps import expert_places as expert_places
from moe_reference.parallel_steps import experts_on_rows as experts_on_rows
from moe_reference.parallel_steps import held_experts as held_experts
from moe_reference.parallel_steps import rows_to_send as rows_to_send
from moe_reference.ranks import ListOfRanks, ProcessRanks, Ranks

Tensors = Sequence[torch.Tensor]


def expert_parallel(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    local: ExpertWeights,
    num_experts: int,
    config: ExpertsConfig,
    group: dist.ProcessGroup | None,
    placement: Placement | None = None,
) -> torch.Tensor:
    """The routed part of a layer whose experts are spread over a process group.

    Every rank calls it, and its backward, with tokens of its own, as many as it has: none, too.
    The loss is the sum over the ranks of each one's own; the gradients of a rank are its slice of
    what one rank would get. Nothing is divided by R. They are zero, not None, where nothing was
    routed.

    Args:
        x: [T, H], any float dtype and strides, the same H and dtype on every rank.
        weights: [T, K], any float dtype.
        expert_ids: [T, K], int32 or int64, of all E experts. Two equal ids in a row are both
            counted; an id below 0, or at or above E, means *not here*.
        local: the experts of this rank. Without a placement those of `assign_experts`; with one the
            physical experts of this rank, ascending. There may be none: [0, ...].
        num_experts: E.
        config: how an expert computes.
        group: gloo or NCCL; None takes all ranks.
        placement: copies of experts on ranks; the same on every rank.

    Returns:
        [T, H], x's dtype; differentiable in x, weights and local.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape. A rank that raises leaves the others waiting.

    Source: DeepSeek-V2 model code, with the way back that its publication has; vLLM; torchtitan.

    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.full((1, 1, 1), 10.0))
    >>> x, weights, ids = torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[0]])
    >>> expert_parallel(x, weights, ids, one, 1, ExpertsConfig("relu", gated=False), None).tolist()
    [[10.0]]
    >>> dist.destroy_process_group()
    """
    ranks = ProcessRanks(group)
    [y] = over_ranks([x], [weights], [expert_ids], [local], num_experts, config, ranks, placement)
    return y


def expert_parallel_on_list(
    xs: Tensors,
    weights: Tensors,
    expert_ids: Tensors,
    locals: Sequence[ExpertWeights],
    num_experts: int,
    config: ExpertsConfig,
    placement: Placement | None = None,
) -> list[torch.Tensor]:
    """The same with all ranks in one process: lists with one entry for each rank.

    Otherwise arguments, results and errors are those of `expert_parallel`.

    >>> first, second = (ExpertWeights(torch.ones(1, 1, 1), torch.full((1, 1, 1), n)) for n in
    ...     (1.0, 10.0))
    >>> xs, ids = [torch.tensor([[2.0]]), torch.tensor([[3.0]])], [torch.tensor([[1]])] * 2
    >>> config = ExpertsConfig("relu", gated=False)
    >>> expert_parallel_on_list(xs, [torch.ones(1, 1)] * 2, ids, [first, second], 2, config)
    [tensor([[20.]]), tensor([[30.]])]
    """
    lengths = {len(each) for each in (xs, weights, expert_ids, locals)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"locals: expected an entry of every list for each rank, got {lengths}")
    ranks = ListOfRanks(len(xs))
    return over_ranks(xs, weights, expert_ids, locals, num_experts, config, ranks, placement)


def over_ranks(
    xs: Tensors,
    weights: Tensors,
    expert_ids: Tensors,
    locals: Sequence[ExpertWeights],
    num_experts: int,
    config: ExpertsConfig,
    ranks: Ranks,
    placement: Placement | None = None,
) -> list[torch.Tensor]:
    """The six steps, for each rank that lives here. The only exchange is `ranks.all_to_all`.

    Args:
        xs: [T, H] for each rank here.
        weights: [T, K] for each rank here.
        expert_ids: [T, K] for each rank here.
        locals: the experts of each rank here.
        num_experts: E.
        config: how an expert computes.
        ranks: who exchanges.
        placement: copies of experts on ranks.

    Returns:
        [T, H] for each rank here.

    >>> one = ExpertWeights(gate_up=torch.ones(1, 1, 1), down=torch.ones(1, 1, 1))
    >>> config, ids = ExpertsConfig("relu", gated=False), torch.zeros(1, 1, dtype=torch.int64)
    >>> over_ranks([torch.ones(1, 1)], [torch.ones(1, 1)], [ids], [one], 1, config, ListOfRanks(1))
    [tensor([[1.]])]
    """
    held_R = held_experts(num_experts, ranks.size, placement)
    for x, w, ids, local, rank in zip(xs, weights, expert_ids, locals, ranks.here, strict=True):
        check_routing(x, w, ids)
        check_experts(local, x, config, len(held_R[rank]), "local")

    places = [expert_places(ids, num_experts, held_R, placement) for ids in expert_ids]
    made = [rows_to_send(*each, held_R, config) for each in zip(xs, weights, places, strict=True)]
    rows, sent, slots, multiply = zip(*made, strict=True)
    came = exchange_counts(sent, held_R, ranks)

    share = [len(held) for held in held_R]
    send = [[int(of_rank.sum()) for of_rank in counts_P.split(share)] for counts_P in sent]
    receive = [counts_RE.sum(dim=1).tolist() for counts_RE in came]
    arrived = ranks.all_to_all(rows, send, receive)
    outputs = []
    for rows_SH, counts_RE, local in zip(arrived, came, locals, strict=True):
        order_S = expert_major(counts_RE)
        out_SH = experts_on_rows(rows_SH[order_S], counts_RE.sum(dim=0), local, config)
        outputs.append(out_SH[inverse_permutation(order_S)])
    returned = ranks.all_to_all(outputs, send=receive, receive=send)
    return [combine(*each) for each in zip(returned, slots, multiply, strict=True)]
