"""One rank of a process group: what runs in its process, and how a session is cut into parts.

A session for several ranks has a `world_size`, and `members`: the ranks of that world that call, in
the order of their group. Each call's argument `ranks` is a list with what every member has for
itself; all other arguments are everybody's. Paths name the member: `ranks.1.x`.

Nothing here judges, and only torch.distributed exchanges anything: gloo on a CPU, NCCL on GPUs.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_conformance import worker
from moe_conformance.codec import from_bytes
from moe_conformance.worker import SURROUNDINGS, LoadError

STEP = "moespec: in "
"""Marks in a rank's log where it was: a rank that hangs or dies cannot say it any more."""

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

Session = dict[str, Any]
Answer = dict[str, Any]


def members_of(session: Session) -> list[int]:
    """The ranks of the world that take part, in the order of their group."""
    return list(session.get("members") or range(session["world_size"]))


def part_of(session: Session, member: int) -> Session:
    """What one member has to do: the same calls with its own arguments."""
    own = f"ranks.{member}."
    calls = []
    for call in session["calls"]:
        ranks = call["arguments"]["ranks"]
        shared = {name: value for name, value in call["arguments"].items() if name != "ranks"}
        cotangent = (call.get("cotangents") or {}).get(str(member))
        calls.append(
            {
                **call,
                "arguments": shared | ranks[member],
                "layouts": {
                    path.removeprefix(own): layout
                    for path, layout in (call.get("layouts") or {}).items()
                    if path.startswith(own)
                },
                "wrt": [p.removeprefix(own) for p in call.get("wrt") or () if p.startswith(own)],
                "cotangents": {} if cotangent is None else {"": cotangent},
            }
        )
    asked = {"device": session["device"], "calls": calls}
    return asked | {name: session[name] for name in SURROUNDINGS if name in session}


def together(parts: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The members' answers as one for each call, up to the first that somebody raised in.

    Its error is that of the first member that raised, and says in `ranks` who else did.
    """
    answers = []
    for of_call in zip(*parts, strict=False):
        raised = [member for member, answer in enumerate(of_call) if answer["error"] is not None]
        answer: Answer = {
            "error": None,
            "outputs": [each.get("outputs") for each in of_call],
            "gradients": {
                f"ranks.{member}.{path}": gradient
                for member, each in enumerate(of_call)
                for path, gradient in each["gradients"].items()
            },
            "kinds": [
                [f"{member}.{path}".rstrip("."), *rest]
                for member, each in enumerate(of_call)
                for path, *rest in each.get("kinds", [])
            ],
            "seconds": max(each["seconds"] for each in of_call),
        }
        for name in ("changed", "shared", "state"):
            answer[name] = [f"rank {m}: {w}" for m, each in enumerate(of_call) for w in each[name]]
        if all("afterwards" in each for each in of_call):
            answer["afterwards"] = [each["afterwards"] for each in of_call]
        if raised:
            error = of_call[raised[0]]["error"]
            message = f"rank {raised[0]}: {error['message']}"
            answer["error"] = {**error, "message": message, "ranks": raised}
        answers.append(answer)
        if raised:
            break
    return answers


def join(name: str, rank: int, world_size: int, store: str, device: str) -> dict[str, Any]:
    """Make the target, and become a rank of a new process group.

    Args:
        name: of the target.
        rank: in the world.
        world_size: how many ranks there will be.
        store: a file that is not there yet, the same for all ranks.
        device: cpu or cuda; a GPU for each rank.

    Raises:
        LoadError: the target cannot be made, or the ranks do not find each other.
    """
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    _tell("the loading of the target")
    described = worker.load(name)
    _tell("the rendezvous")
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        elif sys.platform == "linux":
            # Without it gloo asks what address this machine's name has, which not every one knows.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            # Whoever judges has a shorter one, and a better message.
            timeout=datetime.timedelta(hours=1),
        )
    except Exception as error:
        raise LoadError(f"rank {rank} of {world_size} found no others: {error}") from error
    return described


def run(
    name: str, members: list[int], sent: bytes | None
) -> tuple[dict[str, Any] | None, bytes] | None:
    """Run this rank's part of a session.

    Args:
        name: of the target that `join` made.
        members: who takes part.
        sent: the part, or None for a rank that does not take part.

    Returns:
        The error that it ended with, or None, and its answers.
    """
    os.ftruncate(1, 0)
    group = _group_of(members)
    if sent is None:
        return None
    part = from_bytes(sent)
    for call in part["calls"]:
        call["arguments"]["group"] = group
    worker.draw_once()
    answers = worker.run_session(worker.loaded(name), part, _tell)
    return answers[-1]["error"], worker.answers_to_bytes(answers)


def _tell(step: str) -> None:
    os.write(1, f"{STEP}{step}\n".encode())


def _group_of(members: list[int]) -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    if len(members) == dist.get_world_size():
        return world
    key = tuple(members)
    if key not in _groups:
        # A collective of all ranks of the world, also of those outside.
        _groups[key] = dist.new_group(members)
    return _groups[key]
