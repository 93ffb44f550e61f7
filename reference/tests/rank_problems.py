"""Tokens and experts of several ranks, and what one rank makes of them.

The tests of the reference and those of the fast version are of the same problems.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement
from moe_reference.expert_parallel import expert_parallel, held_experts
from moe_reference.expert_slicing import take_experts
from moe_reference.experts import experts, init_experts
from moe_reference.placement import make_placement

_spec = importlib.util.spec_from_file_location(
    "ranks_of_threads", Path(__file__).with_name("ranks_of_threads.py")
)
_threads = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_threads)
on_ranks, exchanges = _threads.on_ranks, _threads.exchanges

H, I = 4, 3
CONFIGS = [
    ExpertsConfig("silu"),
    ExpertsConfig("gelu", gated=False, weight_on="input"),
    ExpertsConfig("swigluoai", limit=0.7),
]
# Both sides add the same float64 products in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
OUTSIDE = (-1, -7, 99)


@dataclasses.dataclass
class Problem:
    """The tokens of each rank, and all experts."""

    counts: list
    num_experts: int
    top_k: int = 2
    config: ExpertsConfig = CONFIGS[0]
    seed: int = 0
    dtype: torch.dtype = torch.float64
    placement: Placement | None = None

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        whole = init_experts(
            self.num_experts, H, I, self.config.gated, True, generator, dtype=torch.float64
        )
        self.whole = ExpertWeights(**{n: t.to(self.dtype) for n, t in vars(whole).items()})
        self.xs, self.weights, self.ids, self.targets = [], [], [], []
        for count in self.counts:
            draw = torch.randn(2, count, H, generator=generator, dtype=torch.float64)
            x, target = draw.to(self.dtype)
            shape = count, self.top_k
            w = torch.rand(shape, generator=generator, dtype=torch.float64)
            ids = torch.randint(0, max(self.num_experts, 1), shape, generator=generator)
            where = torch.rand(shape, generator=generator)
            for outside, share in zip(OUTSIDE, (0.05, 0.1, 0.15), strict=True):
                gone = (where < share) & (where >= share - 0.05)
                ids = ids.masked_fill(gone, outside)
            gone = (ids < 0) | (ids >= self.num_experts)
            self.xs.append(x)
            self.weights.append(w.masked_fill(gone, float("nan")))
            self.ids.append(ids)
            self.targets.append(target)

    @property
    def world_size(self):
        return len(self.counts)

    def locals(self):
        held = held_experts(self.num_experts, self.world_size, self.placement)
        if self.placement is not None:
            logical = self.placement.physical_to_logical.tolist()
            held = [[logical[p] for p in ids] for ids in held]
        return held, [take_experts(self.whole, ids) for ids in held]


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def leaves(weights):
    return ExpertWeights(**{n: leaf(t) for n, t in vars(weights).items()})


def gradients(weights):
    return {name: tensor.grad for name, tensor in vars(weights).items()}


def on_one_rank(problem):
    """Outputs and gradients of every token and every expert without any ranks: `experts`."""
    whole = leaves(problem.whole)
    xs, weights = [*map(leaf, problem.xs)], [*map(leaf, problem.weights)]
    outputs = [
        experts(x, whole, w, ids, problem.config)
        for x, w, ids in zip(xs, weights, problem.ids, strict=True)
    ]
    loss = sum((y * t).sum() for y, t in zip(outputs, problem.targets, strict=True))
    loss.backward()
    return outputs, [x.grad for x in xs], [w.grad for w in weights], gradients(whole)


def on_rank(problem, rank, call=expert_parallel, group=None):
    """The output of one rank and its gradients. All ranks have to ask for theirs."""
    _, locals_ = problem.locals()
    x, w, local = leaf(problem.xs[rank]), leaf(problem.weights[rank]), leaves(locals_[rank])
    args = problem.ids[rank], local, problem.num_experts, problem.config, group, problem.placement
    y = call(x, w, *args)
    (y * problem.targets[rank]).sum().backward()
    return y.detach(), x.grad, w.grad, gradients(local)


def on_threads(problem, call=expert_parallel):
    found = on_ranks(problem.world_size, lambda rank: on_rank(problem, rank, call))
    return together(problem, found)


def together(problem, found):
    """What `on_rank` has found on all ranks, in the form of `on_one_rank`."""
    outputs, x_grads, w_grads, of_ranks = zip(*found, strict=True)
    held, _ = problem.locals()
    return [*outputs], [*x_grads], [*w_grads], summed(problem, held, of_ranks)


def summed(problem, held, of_ranks):
    """The gradients of the ranks put together; those of the copies of an expert are added."""
    together = {}
    for name, tensor in vars(problem.whole).items():
        together[name] = torch.zeros_like(tensor)
        for ids, local in zip(held, of_ranks, strict=True):
            assert local[name] is not None, name
            together[name].index_add_(0, torch.tensor(ids, dtype=torch.int64), local[name])
    return together


def assert_same(got, expected, **tolerance):
    tolerance = tolerance or TIGHT
    for one, other in zip(got[:3], expected[:3], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    for name, gradient in expected[3].items():
        torch.testing.assert_close(got[3][name], gradient, **tolerance)


def differs(got, expected):
    with pytest.raises(AssertionError):
        assert_same(got, expected)
    return True


AWKWARD = {
    "one rank": Problem([5], 3),
    "even": Problem([4, 4], 4),
    "one idle rank": Problem([6, 0], 4),
    "all idle": Problem([0, 0, 0], 4),
    "uneven": Problem([3, 1, 7], 5, config=CONFIGS[1]),
    "ranks without experts": Problem([3, 2, 4, 1], 2),
    "one expert, one busy rank": Problem([0, 0, 5, 0], 1, config=CONFIGS[2]),
    "no experts": Problem([2, 3], 0),
    "copies": Problem(
        [5, 0, 2], 3, placement=make_placement(torch.tensor([2, 0, 0, 1, 2, 0]), 3, 3)
    ),
}


def awkward_problems(size):
    """The same for any number of ranks."""
    counts = [3, 1, 4, 1, 5, 2, 6, 2][:size]
    per_rank = -(-3 // size) + 1
    copies = [(e * 2) % 3 for e in range(per_rank * size)]
    return {
        "even": Problem([2] * size, 2 * size),
        "uneven": Problem(counts, 3 * size - 1, config=CONFIGS[1]),
        "one idle rank": Problem([*counts[1:], 0], size + 1, top_k=3),
        "all idle": Problem([0] * size, size),
        "ranks without experts": Problem(counts, -(-size // 2), config=CONFIGS[2]),
        "one expert, one busy rank": Problem([*[0] * (size - 1), 5], 1),
        "no experts": Problem(counts, 0),
        "copies": Problem(
            counts, 3, placement=make_placement(torch.tensor(copies), 3, size), seed=size
        ),
    }
