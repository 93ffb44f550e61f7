r"""Domain transforms: the tokens of a layer, taken to where its experts want them, and back.

Around a layer there are two kinds of ranks. Those of a *tensor-parallel* group have the same
tokens; those of a *data-parallel* group have different ones. Expert parallelism wants every token
on one rank of all. So there are two ways through a layer:

- *with expert parallelism*: each of the R ranks of a tensor-parallel group takes one R-th of its
  tokens, padded to a multiple of R; all ranks exchange rows; the group gathers its tokens again and
  the padding is cut off (`sliced_expert_parallel`).
- *without*: the ranks of a data-parallel group gather the tokens of all, everybody computes all of
  them, and takes its own (`gather_compute_slice`).

What belongs to a token goes where the token goes: weights and ids where routing is done before,
and token ids where it is done after and looks them up. Padding is routed nowhere: its ids are -1.

Dimension key: T tokens, H hidden size, K experts per token, E experts, R ranks of a group, S rows.

Lists have one entry for each rank that lives in this process: all of them, or the only one.
"""

from collections.abc import Callable, Sequence

import torch

from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.expert_parallel import over_ranks
from moe_reference.ranks import Ranks, all_gather, gather_counts
from moe_reference.token_slices import enter_slices as enter_slices
from moe_reference.token_slices import leave_slices as leave_slices
from moe_reference.token_slices import pad_experts as pad_experts
from moe_reference.token_slices import pad_tokens as pad_tokens
from moe_reference.token_slices import slice_tokens as slice_tokens
from moe_reference.token_slices import trim_experts as trim_experts
from moe_reference.token_slices import trim_tokens as trim_tokens

Tensors = Sequence[torch.Tensor]
Route = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""From x [T, H] and token ids [T] or None to weights [T, K] and expert ids [T, K]."""
Compute = Callable[[list[torch.Tensor], list[torch.Tensor | None]], list[torch.Tensor]]
"""From x and token ids of each rank here to its outputs."""


def sliced_expert_parallel(
    xs: Tensors,
    route: Route,
    locals: Sequence[ExpertWeights],
    num_experts: int,
    config: ExpertsConfig,
    everybody: Ranks,
    tensor_parallel: Ranks,
    token_ids: Tensors | None = None,
    placement: Placement | None = None,
    route_after: bool = False,
) -> list[torch.Tensor]:
    """Slice the tokens of each tensor-parallel group, compute them over all ranks, gather again.

    Routing may be done before, by each rank for all tokens of its group, or after, by each rank for
    its slice. Both give the same; the second saves R - 1 of R routings. Either way a token's
    weights, ids and token id are those of the slice that it is in, and padding goes nowhere.

    Args:
        xs: [T, H] for each rank here, the same on all ranks of a tensor-parallel group.
        route: called with x [T, H] and token ids [T] or None, of whole groups or of slices.
        locals: for each rank here its experts; see `expert_parallel`.
        num_experts: E.
        config: how an expert computes.
        everybody: the ranks that the experts are spread over.
        tensor_parallel: the ranks of the group.
        token_ids: [T] for each rank here, where routing looks them up.
        placement: copies of experts.
        route_after: route slices.

    Returns:
        [T, H] for each rank here, the same on all ranks of a group.

    Source: TensorCast, which cuts the logits of a slice once more, and no token ids.

    >>> from moe_reference.ranks import ListOfRanks
    >>> one, ranks = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), ListOfRanks(2)
    >>> def to_the_second(x, token_ids):
    ...     return torch.ones(len(x), 1), torch.ones(len(x), 1, dtype=torch.int64)
    >>> xs, config = [torch.tensor([[3.0]])] * 2, ExpertsConfig("relu", gated=False)
    >>> sliced_expert_parallel(xs, to_the_second, [one] * 2, 2, config, ranks, ranks)
    [tensor([[3.]]), tensor([[3.]])]
    """
    slices = enter_slices(xs, tensor_parallel)
    nothing: list[torch.Tensor | None] = [None] * len(xs)
    if route_after:
        cut = nothing if token_ids is None else enter_slices(token_ids, tensor_parallel)
        routed = [route(x, ids) for x, ids in zip(slices, cut, strict=True)]
        real = enter_slices([x.new_ones(len(x), 1) for x in xs], tensor_parallel)
        weights = [weights for weights, _ in routed]
        ids = [ids.where(is_real > 0, -1) for (_, ids), is_real in zip(routed, real, strict=True)]
    else:
        routed = [route(x, ids) for x, ids in zip(xs, token_ids or nothing, strict=True)]
        weights = enter_slices([weights for weights, _ in routed], tensor_parallel)
        ids = enter_slices([ids for _, ids in routed], tensor_parallel, value=-1)
    ys = over_ranks(slices, weights, ids, locals, num_experts, config, everybody, placement)
    return leave_slices(ys, [len(x) for x in xs], tensor_parallel)


def gather_compute_slice(
    xs: Tensors, compute: Compute, data_parallel: Ranks, token_ids: Tensors | None = None
) -> list[torch.Tensor]:
    """Without expert parallelism: gather the tokens of the group, compute all, take one's own.

    For experts that are cut over all ranks, or on all of them: everybody has to see every token.
    The numbers of tokens may differ, so own tokens begin where those of the ranks before end.

    Args:
        xs: [T, H] for each rank here, T its own.
        compute: called with the gathered x [T, H] and token ids [T] or None of each rank here;
            routing is part of it.
        data_parallel: the ranks with different tokens.
        token_ids: [T] for each rank here, or None.

    Source: TensorCast, where all ranks have as many tokens.

    >>> from moe_reference.ranks import ListOfRanks
    >>> def count_all(xs, token_ids):
    ...     return [x * len(x) for x in xs]
    >>> gather_compute_slice([torch.ones(2, 1), torch.ones(1, 1)], count_all, ListOfRanks(2))[1]
    tensor([[3.]])
    """
    counts_R = [counts.tolist() for counts in gather_counts(xs, data_parallel)]
    gathered_ids: list[torch.Tensor | None] = [None] * len(xs)
    if token_ids is not None:
        gathered_ids = [*all_gather(token_ids, data_parallel)]
    outputs = compute(all_gather(xs, data_parallel), gathered_ids)
    return [
        y[sum(counts[:rank]) : sum(counts[: rank + 1])].clone()
        for y, counts, rank in zip(outputs, counts_R, data_parallel.here, strict=True)
    ]
