"""Rows on their way to the experts of other ranks and back, while something is computed.

Rows travel in C chunks, of other experts each. Chunk c + 1 is on its way while chunk c is computed,
and the outputs of chunk c while chunk c + 1 is:

| | |
|---|---|
| network | there 0, there 1, back 0, there 2, back 1, back 2 |
| rank | shared expert, chunk 0, chunk 1, chunk 2 |

Every rank posts the same exchanges in the same order: an empty chunk, too. The backward is the same
pipeline, with gradients of outputs on the way there and gradients of rows on the way back.

Two nodes of a graph do it, and what makes room for the shared expert is the order in which autograd
takes them, the last one made first. `depart` is made before the shared expert: forward it posts the
first chunk, backward it waits for the last. `through_experts` is made after: forward it does all
else, and backward it leaves the last exchanges on their way, for `depart` to wait for, or for the
end of the backward where `depart` has none.

Dimension key: S rows, H hidden size, C chunks, R ranks, E experts of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.autograd import once
from moe_optimized.experts_backward import Needs

Kept = tuple[torch.Tensor | None, ...]


class Posted(NamedTuple):
    """An exchange on its way.

    Attributes:
        work: what it is waited for with.
        came: [S, ...], what it writes to.
        sent: what it reads. Perhaps nobody else holds it, and its memory is needed until the end.
    """

    work: Any
    came: torch.Tensor
    sent: torch.Tensor

    def wait(self) -> torch.Tensor:
        """What came. On a GPU the stream waits for it, and not the host."""
        self.work.wait()
        return self.came


def post(
    rows: torch.Tensor,
    came: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Posted:
    """Start an all-to-all.

    Args:
        rows: [S, ...], a piece for every rank, in their order.
        came: [S, ...], dense, to be written.
        send: the R lengths of the pieces of `rows`.
        receive: the R lengths of the pieces of `came`.
        group: who takes part.

    Returns:
        What to wait for before `came` is read.
    """
    rows = rows.contiguous()
    work = dist.all_to_all_single(came, rows, list(receive), list(send), group=group, async_op=True)
    return Posted(work, came, rows)


@dataclass
class Plan:
    """What both nodes have to know.

    Attributes:
        group: who takes part.
        forward: computes arrived rows. Takes rows, experts, local ids [S, 1], the configuration and
            whether to keep what the backward needs; returns outputs [S, H] and what is kept.
        backward: takes the outputs' gradient, rows, what was kept, experts, ids, the configuration
            and `Needs`; returns the gradients in the order of `Needs`.
        config: how an expert computes.
        send: [C][R], how many rows go to each rank.
        receive: [C][R], how many rows come from each.
        experts: of each chunk, which of this rank's.
        ids: of each chunk [S, 1], int64, the expert of each arrived row, counted in the chunk.
        keep: whether there is going to be a backward.
        first: the first chunk, on its way since `depart`.
        last: gradients on their way home since `through_experts`.
    """

    group: dist.ProcessGroup | None
    forward: Callable[..., tuple[torch.Tensor, Kept]]
    backward: Callable[..., tuple[torch.Tensor | None, ...]]
    config: ExpertsConfig
    send: list[list[int]]
    receive: list[list[int]]
    experts: list[slice]
    ids: list[torch.Tensor]
    keep: bool
    first: Posted | None = None
    last: list[Posted] = field(default_factory=list)


def depart(rows: torch.Tensor, anchor: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Send the first chunk off.

    Args:
        rows: [S, H], chunk by chunk and in each rank by rank; on a GPU followed by some of nobody.
        anchor: a scalar that asks for a gradient, so that this rank has a backward to take part in
            even where nothing else does. Without it the others would wait.
        plan: what to do.

    Returns:
        The rows, for `through_experts`.
    """
    return _Depart.apply(rows, anchor, plan)


def through_experts(
    rows: torch.Tensor, anchor: torch.Tensor, local: ExpertWeights, plan: Plan
) -> torch.Tensor:
    """Send the other chunks, compute what comes, send it back, and wait for one's own.

    Args:
        rows: [S, H], as `depart` has given them back.
        anchor: as there.
        local: the experts of this rank.
        plan: what to do.

    Returns:
        [S, H]: the output of each row, where the row was. Rows of nobody are zero.
    """
    tensors = local.gate_up, local.down, local.gate_up_bias, local.down_bias
    return _ThroughExperts.apply(rows, anchor, plan, *tensors)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, anchor: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        plan.first = _post_there(_pieces(rows, plan), 0, plan)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _wait_for_all(ctx.plan.last)
        return grad, None, None


class _ThroughExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, anchor: torch.Tensor, plan: Plan, *tensors: torch.Tensor
    ) -> torch.Tensor:
        kept: list[Kept] = []

        def compute(c: int, rows: torch.Tensor) -> torch.Tensor:
            experts = _experts_of(tensors, c, plan)
            out, needed = plan.forward(rows, experts, plan.ids[c], plan.config, plan.keep)
            kept.append((rows, *needed) if plan.keep else ())
            return out

        first, plan.first = plan.first, None
        out = _empty_where_somebodys(rows, plan)
        _wait_for_all(_run(first, _pieces(rows, plan), _pieces(out, plan), compute, plan))
        ctx.plan, ctx.lengths = plan, [len(each) for each in kept]
        ctx.save_for_backward(*tensors, *(tensor for each in kept for tensor in each))
        return out

    @staticmethod
    @once("expert_parallel")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        tensors, saved = ctx.saved_tensors[:4], iter(ctx.saved_tensors[4:])
        kept = [tuple(next(saved) for _ in range(length)) for length in ctx.lengths]
        wanted = ctx.needs_input_grad[3:]
        found: list[torch.Tensor | None] = [None] * len(tensors)

        def compute(c: int, grad: torch.Tensor) -> torch.Tensor:
            rows, *needed = kept[c]
            # Somebody may ask for the rows' gradient, on whatever rank. Nobody for that of a one.
            needs = Needs(True, False, *wanted)
            experts = _experts_of(tensors, c, plan)
            to_rows, _, *to_experts = plan.backward(
                grad, rows, needed, experts, plan.ids[c], plan.config, needs
            )
            for i, of_chunk in enumerate(to_experts):
                if len(plan.experts) == 1:
                    found[i] = of_chunk
                elif of_chunk is not None:
                    # Each chunk writes those of its experts; together they are all of this rank.
                    if found[i] is None:
                        found[i] = of_chunk.new_empty(tensors[i].shape)
                    found[i][plan.experts[c]] = of_chunk
            return to_rows

        out, pieces = _empty_where_somebodys(grad, plan), _pieces(grad, plan)
        plan.last = _run(_post_there(pieces, 0, plan), pieces, _pieces(out, plan), compute, plan)
        if torch.is_anomaly_enabled():
            # It reads what every node returns.
            _wait_for_all(plan.last)
        # `depart` has no backward where only the weights' gradients are asked for.
        torch.autograd.Variable._execution_engine.queue_callback(partial(_wait_for_all, plan.last))
        return out, None, None, *found


def _run(
    coming: Posted,
    pieces: Sequence[torch.Tensor],
    home: Sequence[torch.Tensor],
    compute: Callable[[int, torch.Tensor], torch.Tensor],
    plan: Plan,
) -> list[Posted]:
    """The pipeline; `coming` is its first chunk, and what it returns is on its way to `home`."""
    returning = []
    for c in range(len(pieces)):
        following = _post_there(pieces, c + 1, plan) if c + 1 < len(pieces) else None
        out = compute(c, coming.wait())
        returning.append(post(out, home[c], plan.receive[c], plan.send[c], plan.group))
        coming = following
    return returning


def _post_there(pieces: Sequence[torch.Tensor], c: int, plan: Plan) -> Posted:
    came = pieces[c].new_empty(sum(plan.receive[c]), pieces[c].shape[1])
    return post(pieces[c], came, plan.send[c], plan.receive[c], plan.group)


def _wait_for_all(posted: list[Posted]) -> None:
    for each in posted:
        each.wait()
    posted.clear()


def _pieces(rows: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, ...]:
    """The rows of each chunk, without those of nobody."""
    sizes = [sum(lengths) for lengths in plan.send]
    return rows[: sum(sizes)].split(sizes)


def _empty_where_somebodys(rows: torch.Tensor, plan: Plan) -> torch.Tensor:
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    out[sum(map(sum, plan.send)) :] = 0
    return out


def _experts_of(tensors: Sequence[torch.Tensor | None], c: int, plan: Plan) -> ExpertWeights:
    """Views, so that no weight is copied."""
    return ExpertWeights(*(None if t is None else t[plan.experts[c]] for t in tensors))
