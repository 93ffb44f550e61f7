"""Ways to spread tokens and weights over ranks, and faults that are planted in them.

The files of the tests have the ways and the faults. Here is how a way is run, put together and
compared with one rank, and what the files draw for it.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.expert_slicing import slice_tensor_parallel
from moe_reference.experts import experts, init_experts

H, E, K = 4, 5, 2
CONFIG = ExpertsConfig("silu")
# Rows and columns of ranks in one process.
SHAPES = ((1, 2), (3, 1), (2, 2))
# Both sides add the same float64 products in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@dataclasses.dataclass(frozen=True)
class Way:
    """Tensors of one rank, cut into those of each rank of a mesh.

    Attributes:
        whole: from rows and columns of the mesh to the tensors of one rank, by name.
        cut: from these and the mesh's shape to those of each rank. Differentiable, so that it also
            says what the gradients of the ranks add up to.
        run: from the tensors of the ranks here, the mesh and its shape to their outputs.
        alone: what one rank makes of the whole: the outputs of all ranks.
    """

    whole: Callable
    cut: Callable
    run: Callable
    alone: Callable


# What ways are made of


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return init_experts(count, H, width, True, True, generator, dtype=torch.float64)


def routed(count, seed=1):
    """Ids of experts that there are, and of some that there are not."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, K, generator=generator, dtype=torch.float64)
    return weights, torch.randint(-1, E + 1, (count, K), generator=generator)


def everywhere(whole, shape, *names):
    """Copies of the same tensors for every rank."""
    same = {name: whole[name] for name in names}
    return [mapped(torch.clone, same) for _ in range(math.prod(shape))]


def slices(weights, shape):
    size = math.prod(shape)
    return [slice_tensor_parallel(weights, size, rank) for rank in range(size)]


def column(here, name):
    return [each[name] for each in here]


def shared_of(x, whole, scale=1.0):
    """The shared expert as one expert of which every token is."""
    ones = x.new_ones(len(x), 1)
    y = experts(x, whole["shared"], ones, ones.long() * 0, CONFIG)
    return y * scale * torch.sigmoid(x @ whole["gate"].T)


# Dictionaries of tensors and of experts


def mapped(function, tensors):
    """The same names, and a function of each tensor."""
    return {
        name: ExpertWeights(**mapped(function, vars(each)))
        if isinstance(each, ExpertWeights)
        else function(each)
        for name, each in tensors.items()
    }


def flat(tensors):
    """The tensors by path."""
    found = {}
    for name, each in tensors.items():
        parts = vars(each) if isinstance(each, ExpertWeights) else {"": each}
        found |= {f"{name}.{part}".rstrip("."): tensor for part, tensor in parts.items()}
    return found


def leaves(tensors):
    return mapped(lambda each: each.detach().clone().requires_grad_(), tensors)


def gradients_of(tensors):
    """The gradients by path. Every tensor has one."""
    found = {path: leaf.grad for path, leaf in flat(tensors).items()}
    missing = [path for path, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient of {missing}"
    return found


# Ranks, and one rank


def target(rank, y):
    """Another loss on every rank: it is the sum of the ranks' own."""
    return normal(*y.shape, seed=50 + rank)


def spread(mesh, way, shape):
    """Outputs of the ranks here, and the gradients of what they have."""
    own = way.cut(way.whole(shape), shape)
    here = [leaves(own[rank]) for rank in mesh[0].here]
    outputs = way.run(here, mesh, shape)
    sum((y * target(r, y)).sum() for r, y in zip(mesh[0].here, outputs, strict=True)).backward()
    return [y.detach() for y in outputs], [*map(gradients_of, here)]


def of_processes(found):
    """What `spread` has found on processes, in the form of that on a list of ranks."""
    outputs, gradients = zip(*found, strict=True)
    return [y for [y] in outputs], [of_rank for [of_rank] in gradients]


def together(way, shape, gradients):
    """The gradient of the whole: what autograd takes those of the ranks to, through the cut."""
    whole = leaves(way.whole(shape))
    pairs = [
        (tensor, gradient[path])
        for each, gradient in zip(way.cut(whole, shape), gradients, strict=True)
        for path, tensor in flat(each).items()
    ]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return gradients_of(whole)


def alone(way, shape):
    """The outputs of all ranks and the gradient of the whole without any ranks."""
    whole = leaves(way.whole(shape))
    outputs = way.alone(whole, shape)
    sum((y * target(rank, y)).sum() for rank, y in enumerate(outputs)).backward()
    return [y.detach() for y in outputs], gradients_of(whole)


def assert_same(way, shape, outputs, gradients):
    expected, of_whole = alone(way, shape)
    for y, one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, one, **TIGHT)
    torch.testing.assert_close(together(way, shape, gradients), of_whole, **TIGHT)


# Faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A function that takes the place of another one.

    Attributes:
        way: the name of the way that it is planted in.
        module: where the other one is looked up.
        name: that of the other one.
        change: called with the other one and with what that would be called with.
        shows: how the comparison says that something is wrong: numbers, unless rows are missing.
    """

    way: str
    module: ModuleType
    name: str
    change: Callable
    shows: str = "not close"

    @contextlib.contextmanager
    def planted(self):
        with pytest.MonkeyPatch.context() as patch:
            real = getattr(self.module, self.name)
            patch.setattr(self.module, self.name, functools.partial(self.change, real))
            yield


def assert_shows(fault, way, shape, found):
    """What was found with the fault is wrong. That it crashed would not show anything."""
    with pytest.raises(AssertionError, match=fault.shows):
        assert_same(way, shape, *found)


def learns_nothing(tensor):
    """The same numbers with a gradient of zero. Just detached, it would have none to compare."""
    return tensor.detach() + 0 * tensor
