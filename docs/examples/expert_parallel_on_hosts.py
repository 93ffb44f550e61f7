"""Expert parallelism over several hosts, compared on every rank with what one rank computes."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.expert_parallel import expert_parallel
from moe_reference.expert_slicing import assign_experts
from moe_reference.experts import experts, init_experts

E, K, H, I = 10, 2, 64, 32
CONFIG = ExpertsConfig("silu")


def tokens_of(rank, device):
    """Tokens, weights and ids of a rank, seeded: any rank can draw those of the others."""
    generator = torch.Generator().manual_seed(rank)
    T = 20 + 7 * rank
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    return x.to(device), weights.to(device), ids.to(device)


def leaves(weights, x):
    """Copies of the experts and of x that gradients can be asked for."""
    copies = {name: t.detach().clone().requires_grad_() for name, t in vars(weights).items()}
    return ExpertWeights(**copies), x.detach().clone().requires_grad_()


def largest_difference(rank, size, device):
    """Between this rank's output and gradients, and the same of one rank that has everything."""
    generator = torch.Generator().manual_seed(99)
    drawn = init_experts(E, H, I, True, True, generator, dtype=torch.float64)
    whole = ExpertWeights(**{name: tensor.to(device) for name, tensor in vars(drawn).items()})
    start, count = assign_experts(E, size, rank)
    share = slice(start, start + count)

    x, weights, ids = tokens_of(rank, device)
    local, x = leaves(ExpertWeights(**{n: t[share] for n, t in vars(whole).items()}), x)
    y = expert_parallel(x, weights, ids, local, E, CONFIG, dist.group.WORLD)
    y.square().sum().backward()
    got = [y, x.grad, *(tensor.grad for tensor in vars(local).values())]

    parts = [tokens_of(other, device) for other in range(size)]
    all_x, all_weights, all_ids = map(torch.cat, zip(*parts, strict=True))
    whole, all_x = leaves(whole, all_x)
    all_y = experts(all_x, whole, all_weights, all_ids, CONFIG)
    all_y.square().sum().backward()
    first = sum(len(part[0]) for part in parts[:rank])
    mine = slice(first, first + len(x))
    expected = [all_y[mine], all_x.grad[mine], *(t.grad[share] for t in vars(whole).values())]
    pairs = zip(got, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs if a.numel())


def main():
    """One line per rank. The exit code is 0 where all is the same."""
    ranks_here, place = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks_here
    device = torch.device("cuda", place) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    # The default is half an hour: too long for a job in which some host did not come up.
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(minutes=2))
    rank, size = dist.get_rank(), dist.get_world_size()

    ids = tokens_of(rank, device)[2]
    shares = [assign_experts(E, size, other) for other in range(size)]
    start, count = shares[rank]
    here = range(rank // ranks_here * ranks_here, (rank // ranks_here + 1) * ranks_here)
    held_here = {e for other in here for e in range(shares[other][0], sum(shares[other]))}
    leaving = sum(e not in held_here for e in ids.flatten().tolist())

    difference = largest_difference(rank, size, device)
    same = difference < 1e-12  # float64, where only the order of sums differs
    print(
        f"rank {rank} of {size} on host {os.environ['GROUP_RANK']}, {dist.get_backend()}: "
        f"{len(ids)} tokens, {count} experts from {start} on, {leaving} of {ids.numel()} rows "
        f"leave the host; {'the same as' if same else 'NOT the same as'} one rank "
        f"({difference:.0e})",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
