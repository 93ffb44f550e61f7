"""What each rank of a world of processes finds, for `test_expert_parallel.py`."""

import importlib.util
from pathlib import Path

import torch
from moe_optimized import expert_parallel as fast
from moe_reference.expert_parallel import expert_parallel

# Without kernels, all of them; with kernels, which are interpreted, those that differ most.
KERNELS = {2: ("uneven", "copies"), 3: ("even", "one idle rank")}
# Importing DTensor takes each process seconds.
DTENSORS = (2, 3, 4)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


problems = load(Path(__file__).parents[2] / "reference" / "tests" / "rank_problems.py")


def cases(size):
    """The name of an implementation, that of a problem, the problem, its chunks."""
    for name, problem in problems.awkward_problems(size).items():
        yield "reference", name, problem, None
        yield "torch", name, problem, 3
    for name in KERNELS.get(size, ()):
        problem = problems.awkward_problems(size)[name]
        narrow = {**vars(problem), "dtype": torch.float32}
        fields = ("counts", "num_experts", "top_k", "config", "seed", "dtype", "placement")
        yield "triton", name, problems.Problem(**{f: narrow[f] for f in fields}), 2


def on_mesh(mesh):
    """By implementation and problem what this rank computes; and what it does with DTensors."""
    [rank], size, group = mesh[0].here, mesh[0].size, mesh[0].group
    found = {}
    for means, name, problem, chunks in cases(size):
        call = {
            "reference": expert_parallel,
            "torch": lambda *given, c=chunks: fast.expert_parallel(*given, chunks=c),
            "triton": lambda *given, c=chunks: fast.expert_parallel_triton(*given, chunks=c),
        }[means]
        found[means, name] = problems.on_rank(problem, rank, call, group)
    if size in DTENSORS:
        found["DTensor"] = with_dtensors(size, rank, group)
    return found


def with_dtensors(n, rank, group):
    """By the number of experts, this rank's gradient, how it is placed, and what is refused."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    found = {}
    for num_experts in sorted({2 * n, n + 1, 3}):
        problem = problems.Problem([2] * n, num_experts)
        for placement in (Shard(0), Replicate()):
            whole = {
                name: sharded(tensor, mesh, rank, n, placement)
                for name, tensor in vars(problem.whole).items()
            }
            x, w = problems.leaf(problem.xs[rank]), problem.weights[rank]
            given = x, w, problem.ids[rank], problems.ExpertWeights(**whole), num_experts
            try:
                y = fast.expert_parallel(*given, problem.config, group)
                (y * problem.targets[rank]).sum().backward()
            except ValueError as error:
                found[num_experts, str(placement)] = str(error)
                continue
            down = whole["down"].grad
            assert isinstance(down, DTensor)
            assert down.placements == (Shard(0),)
            found[num_experts, str(placement)] = y.detach(), x.grad, down.to_local()
    return found


def sharded(tensor, mesh, rank, n, placement):
    """A DTensor of what is known everywhere, so that nothing is exchanged."""
    from torch.distributed.tensor import DTensor, Shard

    own = tensor
    if placement == Shard(0):
        share = -(-len(tensor) // n)
        own = tensor[rank * share : (rank + 1) * share]
    return DTensor.from_local(
        own.contiguous(), mesh, [placement], run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    ).requires_grad_()  # fmt: skip
