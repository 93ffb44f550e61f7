"""The experts on a CPU: a product per expert, written where it is needed.

Stages, and what each gains:

1. The rows of a few experts, 384 or more, are gathered, multiplied, activated and multiplied again
   while they are in the cache. The host knows the bounds, so nothing is computed for an empty
   expert, and nothing padded. All but the products is done for these rows at once: with few rows
   each, calling torch once per expert would take as long as the work.
2. Products go straight into slices of the buffers and of the gradients, which autograd would first
   make one by one and then copy together.
3. `embedding_bag` adds each token's rows up, weighted, in one pass over packed rows.
4. The backward recomputes the activation, so that x and the pre-activation are all that is kept.

Everything is multiplied in float32 (float64 for float64 x), which every CPU can do fast. A narrow
matrix is widened when its expert's turn comes, and is still in the cache when it is used. Autocast
would round the factors of a product; one that writes to its `out` it leaves alone.

Dimension key: T tokens, H hidden size, I intermediate size, J = 2I (I without a gate), E experts,
K experts per token, S rows that go somewhere.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_optimized.activations import activate, activate_with_gradient
from moe_optimized.alignment import local_ids, sort_slots
from moe_optimized.dispatch import accumulation_dtype
from moe_optimized.experts_backward import Needs

_ROWS = 384
"""How many rows are enough for one block: of more, what is written does not stay in the cache
until it is read; of fewer, calling torch takes longer. Measured, see `benchmarks/notes.md`."""


class _Order(NamedTuple):
    """Rows in expert order.

    Attributes:
        slots: [S], int64.
        tokens: [S], int64, the row of x.
        blocks: of consecutive experts that have rows: expert, first and last place (exclusive).
        places: [T, K], int64, where a slot's row stands; S for *not here*.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    blocks: list[list[tuple[int, int, int]]]
    places: torch.Tensor


def forward_on_cpu(
    x: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of each token's experts, below autograd.

    Arguments and results are those of `moe_optimized.experts_torch.forward_grouped`.
    """
    (T, K), (E, H, _), J = expert_ids.shape, experts.down.shape, experts.gate_up.shape[1]
    wide = accumulation_dtype(x)
    order = _in_expert_order(expert_ids, E, expert_map)
    on_input = config.weight_on == "input"
    factors = weights.reshape(-1)[order.slots].to(wide) if on_input else None
    pre = x.new_empty(T * K if keep else 0, J)
    pre[len(order.slots) :] = 0
    packed = x.new_empty((len(order.slots) + 1, H), dtype=wide)
    packed[-1] = 0
    for block in order.blocks:
        _, start, _ = block[0]
        _, _, end = block[-1]
        rows = x.index_select(0, order.tokens[start:end]).to(wide)
        if factors is not None:
            rows.mul_(factors[start:end, None])
        direct = keep and x.dtype is wide
        product = pre[start:end] if direct else rows.new_empty(end - start, J)
        _multiply(rows, experts.gate_up.mT, experts.gate_up_bias, block, product)
        if keep and not direct:
            pre[start:end] = product
        hidden = activate(product, config)
        _multiply(hidden, experts.down.mT, experts.down_bias, block, packed[start:end])
    return _sum_rows(packed, order, None if on_input else weights).to(dtype), pre


def backward_on_cpu(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    experts: ExpertWeights,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    config: ExpertsConfig,
    expert_map: torch.Tensor | None,
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `forward_on_cpu`.

    Arguments and results are those of `moe_optimized.experts_torch.backward_grouped`.
    """
    E, H, _ = experts.down.shape
    wide = accumulation_dtype(x)
    order = _in_expert_order(expert_ids, E, expert_map)
    on_input = config.weight_on == "input"
    factors = weights.reshape(-1)[order.slots].to(wide)
    dots = torch.zeros(len(order.slots) + 1, dtype=wide)
    packed = x.new_empty((len(order.slots) + 1 if needs.x else 0, H), dtype=wide)
    packed[-1:] = 0
    found = {name: t.new_empty(t.shape) for name, t in _wanted(experts, needs).items()}
    touched = {e for block in order.blocks for e, _, _ in block}
    for e in set(range(E)) - touched:
        for gradient in found.values():
            gradient[e] = 0

    needs_rows = needs.x or (needs.weights and on_input)
    needs_pre = needs_rows or needs.gate_up or needs.gate_up_bias
    dots_down, dots_up = needs.weights and not on_input, needs.weights and on_input
    for block in order.blocks:
        _, start, _ = block[0]
        _, _, end = block[-1]
        tokens, factor = order.tokens[start:end], factors[start:end, None]
        grads = grad.index_select(0, tokens).to(wide)
        hidden, by_hidden = activate_with_gradient(pre[start:end].to(wide), config)
        if needs_pre or dots_down:
            d_hidden = torch.empty_like(hidden)
            _multiply(grads, experts.down, None, block, d_hidden)
        if dots_down:
            # <dy, D a + c> = <D^T dy, a> + <dy, c>: the experts' outputs need not be kept.
            torch.sum(d_hidden * hidden, 1, out=dots[start:end])
            if experts.down_bias is not None:
                for e, first, last in block:
                    bias = experts.down_bias[e].to(wide)
                    with torch.autocast("cpu", enabled=False):
                        dots[first:last] += grads[first - start : last - start] @ bias
        if not on_input:
            hidden.mul_(factor)
        if needs.down:
            _sum_outer(grads, hidden, block, found["down"])
        if needs.down_bias:
            _sum_by_expert(grads if on_input else grads * factor, block, found["down_bias"])
        if not needs_pre:
            continue
        d_pre = by_hidden(d_hidden if on_input else d_hidden.mul_(factor))
        if needs.gate_up_bias:
            _sum_by_expert(d_pre, block, found["gate_up_bias"])
        if needs.gate_up or dots_up:
            rows = x.index_select(0, tokens).to(wide)
        if needs_rows:
            d_rows = packed[start:end] if needs.x else torch.empty_like(grads)
            _multiply(d_pre, experts.gate_up, None, block, d_rows)
            if dots_up:
                torch.sum(d_rows * rows, 1, out=dots[start:end])
            if on_input:
                d_rows.mul_(factor)
        if needs.gate_up:
            _sum_outer(d_pre, rows.mul_(factor) if on_input else rows, block, found["gate_up"])
    if needs.x:
        found["x"] = _sum_rows(packed, order, None).to(x.dtype)
    if needs.weights:
        # The place of a pair that is not here is the last one, which holds a 0.
        found["weights"] = dots[order.places].to(weights.dtype)
    return tuple(found.get(name) for name in Needs._fields)


def _in_expert_order(
    expert_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> _Order:
    T, K = expert_ids.shape
    slots, ends = sort_slots(local_ids(expert_ids, num_experts, expert_map), num_experts)
    last = ends.tolist()
    first = [0, *last][:-1]
    blocks: list[list[tuple[int, int, int]]] = []
    rows = _ROWS
    for e, (start, end) in enumerate(zip(first, last, strict=True)):
        if start == end:
            continue
        if rows >= _ROWS:
            blocks.append([])
            rows = 0
        blocks[-1].append((e, start, end))
        rows += end - start
    slots = slots[: last[-1] if last else 0]
    places = torch.full((T * K,), len(slots), dtype=torch.int64)
    places[slots] = torch.arange(len(slots))
    return _Order(slots, slots // max(K, 1), blocks, places.view(T, K))


def _multiply(
    rows: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor | None,
    block: list[tuple[int, int, int]],
    out: torch.Tensor,
) -> None:
    """Rows of a block times the matrix of their expert, plus its bias, into `out`."""
    for (e, _, _), mine, result in zip(block, *_by_expert(block, rows, out), strict=True):
        matrix = matrices[e].to(rows.dtype)
        if biases is None:
            torch.mm(mine, matrix, out=result)
        else:
            torch.addmm(biases[e].to(rows.dtype), mine, matrix, out=result)


def _sum_outer(
    left: torch.Tensor, right: torch.Tensor, block: list[tuple[int, int, int]], out: torch.Tensor
) -> None:
    """Of each expert of a block the left rows transposed times the right rows, into `out`."""
    for (e, _, _), one, other in zip(block, *_by_expert(block, left, right), strict=True):
        if out.dtype is left.dtype:
            torch.mm(one.T, other, out=out[e])
        else:
            with torch.autocast("cpu", enabled=False):
                out[e] = one.T @ other


def _by_expert(
    block: list[tuple[int, int, int]], *rows: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Each tensor of a block's rows in parts, one per expert; a slice for each took longer."""
    sizes = [last - first for _, first, last in block]
    return [each.split(sizes) for each in rows]


def _sum_by_expert(
    rows: torch.Tensor, block: list[tuple[int, int, int]], out: torch.Tensor
) -> None:
    """Of each expert of a block the sum of its rows, into `out`."""
    for (e, _, _), mine in zip(block, *_by_expert(block, rows), strict=True):
        out[e] = mine.sum(0)


def _sum_rows(packed: torch.Tensor, order: _Order, weights: torch.Tensor | None) -> torch.Tensor:
    """The sum of each token's rows, [T, H]; the last packed row is zero and stands for nobody's."""
    if order.places.numel() == 0:
        return packed.new_zeros(order.places.shape[0], packed.shape[1])
    if weights is not None:
        here = order.places < len(order.slots)
        # Any NaN among the weights of pairs that are not here would spread.
        weights = torch.where(here, weights.to(packed.dtype), 0.0).contiguous()
    return F.embedding_bag(order.places, packed, mode="sum", per_sample_weights=weights)


def _wanted(experts: ExpertWeights, needs: Needs) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in vars(experts).items() if getattr(needs, name)}
