"""Targets one of whose ranks does something that only a process can do."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from moe_conformance import Capabilities, Target
from moe_conformance.target import SAME_TOKENS
from moe_conformance.targets import Reference
from moe_reference.checks import check_experts, check_routing
from moe_reference.config import ExpertWeights
from moe_reference.parallel_steps import held_experts
from moe_reference.partial_sums import partial_shared
from moe_reference.ranks import ProcessRanks, all_gather, all_reduce, gather_counts


class _OnRankOne(Reference):
    capabilities = Capabilities(
        dtypes=("float32",), operations=("expert_parallel",), gradients=("expert_parallel",)
    )

    def expert_parallel(
        self, x, weights, expert_ids, local, num_experts, config, group, placement=None
    ):
        if dist.get_rank(group) == 1:
            self.misbehave()
        return super().expert_parallel(
            x, weights, expert_ids, local, num_experts, config, group, placement
        )

    def misbehave(self):
        pass


class Right(_OnRankOne):
    """Does nothing wrong."""


class KillsItself(_OnRankOne):
    """Rank 1 is killed."""

    def misbehave(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(_OnRankOne):
    """Rank 1 ends its process."""

    def misbehave(self):
        os._exit(7)


class Raises(_OnRankOne):
    """Rank 1 raises."""

    def misbehave(self):
        raise RuntimeError("no space left on device")


class CallsExit(_OnRankOne):
    """Rank 1 calls sys.exit."""

    def misbehave(self):
        sys.exit(3)


class Sleeps(_OnRankOne):
    """Rank 1 sleeps, and leaves a process that would outlive it."""

    def misbehave(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3601)"])
        print(f"child {child.pid}", flush=True)
        time.sleep(3600)


class Leaves(_OnRankOne):
    """Rank 1 returns zeros before the first exchange."""

    def expert_parallel(self, x, weights, expert_ids, *rest, group, **named):
        if dist.get_rank(group) == 1:
            return torch.zeros_like(x)
        return super().expert_parallel(x, weights, expert_ids, *rest, group=group, **named)


class NeverArrives(_OnRankOne):
    """The process of rank 1 sleeps before it has met the others."""

    def __init__(self):
        if os.path.realpath("/proc/self/fd/1").endswith("rank-1.log"):
            time.sleep(3600)


class SendsNothingBack(_OnRankOne):
    """Rank 1 multiplies its output by zero."""

    def expert_parallel(self, *given, group, **named):
        out = super().expert_parallel(*given, group=group, **named)
        return out * 0 if dist.get_rank(group) == 1 else out


class Gathered(Reference):
    """Another right way: all ranks get all tokens, and add up what the others computed for theirs.

    Partial sums travel, which are rounded after they were weighted.
    """

    name = "gathered"
    capabilities = dataclasses.replace(
        Reference.capabilities,
        operations=("expert_parallel",),
        rounding_points=("weighted_output", "combine"),
        expert_parallel={"placement": (False,)},
    )

    def expert_parallel(
        self, x, weights, expert_ids, local, num_experts, config, group, placement=None
    ):
        ranks = ProcessRanks(group)
        held = held_experts(num_experts, ranks.size)[ranks.here[0]]
        check_routing(x, weights, expert_ids)
        check_experts(local, x, config, len(held), "local")
        [counts] = gather_counts([x], ranks)
        tokens = [all_gather([each], ranks)[0] for each in (x, weights, expert_ids)]
        rows = torch.full((num_experts,), -1)
        rows[held] = torch.arange(len(held))
        partial = self.experts(tokens[0], local, tokens[1], tokens[2], config, rows)
        received = [len(x)] * ranks.size
        [parts] = ranks.all_to_all([partial], [counts.tolist()], [received])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return parts.view(ranks.size, *x.shape).sum(0, dtype=wide).to(x.dtype)


class TheOtherWay(Reference):
    """Slices where nobody asked for them, and partial sums where slices were asked for.

    The slices of a shared expert are put together, and each rank computes all of it.
    """

    name = "the other way"
    capabilities = dataclasses.replace(Reference.capabilities, operations=SAME_TOKENS)

    def sliced_expert_parallel(self, *given, **named):
        return super().replicated_experts(*given, **named)

    def replicated_experts(self, *given, **named):
        return super().sliced_expert_parallel(*given, **named)

    def shared_tensor_parallel(self, x, part, config, group, shared_gate=None, shared_scale=1.0):
        ranks = ProcessRanks(group)

        def together(slices, halves):
            """Slices [1, I_r, ...] in the order of the ranks, those of gate before those of up."""
            cut = [half.contiguous() for half in slices[0].tensor_split(halves)]
            return torch.cat([all_gather([half], ranks)[0] for half in cut])[None]

        halves = 2 if config.gated else 1
        bias, down_bias = part.gate_up_bias, part.down_bias
        whole = ExpertWeights(
            gate_up=together(part.gate_up, halves),
            down=together(part.down.mT, 1).mT,
            gate_up_bias=None if bias is None else together(bias, halves),
            down_bias=None if down_bias is None else all_reduce([down_bias], ranks)[0],
        )
        return partial_shared(x, whole, config, shared_gate, shared_scale).to(x.dtype)


class OnThreeRanks(Reference):
    """Runs on three ranks and on no other number."""

    capabilities = Capabilities(operations=("expert_parallel",), world_sizes=(3,))


class OnlyARouter(Target):
    """Has no expert parallelism."""

    name, version = "only-a-router", "0"

    def route(self, logits, config, bias=None, token_ids=None):
        return Reference().route(logits, config, bias, token_ids)
