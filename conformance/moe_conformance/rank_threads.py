"""Ranks that are threads of this process, over torch's own threaded process group.

For seeded faults and our own tests: four ranks take milliseconds and need no start. What it does
not show is what only processes do, such as dying.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_conformance import worker
from moe_conformance.executor import TargetLost
from moe_conformance.ranks import members_of, part_of, together
from moe_conformance.target import Target

LEFT_SECONDS = 2.0
"""How long threads may go on after the first one is through; see `rank_group`."""

ENDED = "Test termination event occurs."
"""What torch raises in a thread that waits for one that will not come."""

ISOLATION = "_set_thread_isolation_mode"
"""Lets threads have process groups of their own."""

ALONE = threading.Lock()
"""The threaded group is a global of torch: one session at a time."""


def run_on_threads(targets: Sequence[Target], session: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a session, each rank on a target and in a thread of its own.

    Args:
        targets: one for each rank of the world.
        session: as for `RankGroup.run`.

    Raises:
        TargetLost: a rank raised, or came back early, and the others waited for it.
    """
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    members = members_of(session)
    world_size = session["world_size"]
    store = dist.HashStore()
    answers: dict[int, list[dict[str, Any]]] = {}
    broken: dict[int, BaseException] = {}
    steps: dict[int, str] = {}

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            group = dist.group.WORLD
            if len(members) < world_size:
                group = dist.new_group(members)
            if rank in members:
                part = part_of(session, members.index(rank))
                for call in part["calls"]:
                    call["arguments"]["group"] = group
                answers[rank] = worker.run_session(
                    targets[rank], part, lambda step: steps.__setitem__(rank, step)
                )
                if answers[rank][-1]["error"] is not None:
                    # A moment for the others to raise the same, then nobody has to wait.
                    time.sleep(0.02)
                    threaded.ProcessLocalGroup.exception_handle(None)
        except BaseException as error:
            broken[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)

    with ALONE:
        # Its type information does not know it.
        isolate = getattr(torch._C._distributed_c10d, ISOLATION)
        isolate(True)
        # Torch keeps weak references to it.
        kept = threaded._install_threaded_pg()
        threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world_size)]
        try:
            for each in threads:
                each.start()
            late = _wait(threads, members, answers)
            if late:
                threaded.ProcessLocalGroup.exception_handle(None)
                for each in threads:
                    each.join(LEFT_SECONDS)
        finally:
            threaded.ProcessLocalGroup.reset()
            threaded._uninstall_threaded_pg()
            isolate(False)
            del kept
    if broken:
        raise next(iter(broken.values()))
    if late:
        through = ", ".join(f"rank {rank}" for rank in members if rank not in late)
        where = "; ".join(f"rank {rank} is in {steps.get(rank, 'starting')}" for rank in late)
        raise TargetLost("timeout", f"{through} came back without waiting for others: {where}")
    waited = [rank for rank in members if _was_ended(answers[rank])]
    if waited:
        first = next(r for r in members if r not in waited and answers[r][-1]["error"] is not None)
        error = answers[first][-1]["error"]
        where = "; ".join(f"rank {rank} is in {steps[rank]}" for rank in waited)
        raise TargetLost(
            "crash",
            f"rank {first} raised {error['type']}: {error['message'][:300]}, while others wait: "
            f"{where}",
        )
    return together([answers[rank] for rank in members])


def _wait(
    threads: Sequence[threading.Thread], members: list[int], answers: dict[int, Any]
) -> list[int]:
    """Wait for all; the ranks that are not through long after the first one was."""
    until = None
    while any(each.is_alive() for each in threads):
        for each in threads:
            each.join(0.05)
            if not each.is_alive():
                continue
            break
        if answers and until is None:
            until = time.monotonic() + LEFT_SECONDS
        if until is not None and time.monotonic() > until:
            return [rank for rank in members if rank not in answers]
    return []


def _was_ended(answers: list[dict[str, Any]]) -> bool:
    error = answers[-1]["error"]
    return error is not None and error["type"] == "SystemExit" and error["message"] == ENDED
