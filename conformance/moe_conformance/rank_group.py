"""Several ranks of a target, each in a process of its own, kept alive between cases.

A rank that raises, dies, hangs or leaves early would keep the others waiting for ever. It ends the
case with one message that names the rank and where it was, all processes are ended, and the next
case gets new ones.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_conformance import ranks
from moe_conformance.codec import from_bytes, to_bytes
from moe_conformance.executor import LOAD_SECONDS, TargetLost, end_of, end_worker, start_worker

LEFT_SECONDS = 10.0
"""How long ranks may go on after the first one is through. All of them take the same steps, so they
are through at nearly the same time, unless the first one has left steps out."""

RAISED_SECONDS = 3.0
"""The same after one has raised. The others raise too, or wait for what will not come."""

SAYING_SECONDS = 0.3
"""How long ranks get to write down where they are."""

Session = dict[str, Any]
Answer = dict[str, Any]


class RankGroup:
    """The ranks of one world. They are started at once; `run` waits until they have met.

    Args:
        name: the target, as on the command line.
        world_size: how many ranks.
        device: cpu or cuda.
        timeout: seconds that one session may take.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, name: str, world_size: int, device: str, timeout: float) -> None:
        self.name = name
        self.world_size = world_size
        self.timeout = timeout
        self.seconds_waited = 0.0
        self._met = False
        self._folder = Path(tempfile.mkdtemp(prefix="moespec-ranks-"))
        self._workers: list[tuple[Any, Any]] = []
        try:
            for rank in range(world_size):
                self._workers.append(start_worker(str(self._log(rank))))
            store = str(self._folder / "store")
            for rank, (_, connection) in enumerate(self._workers):
                connection.send((ranks.join, (name, rank, world_size, store, device)))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes' ids, by rank."""
        return [process.pid for process, _ in self._workers]

    def run(self, session: Session) -> list[Answer]:
        """Run a session on all ranks and put their answers together.

        Raises:
            TargetLost: a rank raised, died, hung or left, and the others waited for it.
            worker.LoadError: the ranks could not meet.
        """
        self._meet()
        members = ranks.members_of(session)
        for rank, (process, connection) in enumerate(self._workers):
            part = None
            if rank in members:
                part = to_bytes(ranks.part_of(session, members.index(rank)))
            try:
                connection.send((ranks.run, (self.name, members, part)))
            except OSError:
                raise TargetLost("crash", f"rank {rank} ended with {end_of(process)}") from None
        answers = self._collect(self.timeout, "running")
        return ranks.together([from_bytes(answers[rank][1]) for rank in members])

    def close(self) -> None:
        """End every process and remove their files."""
        for process, connection in self._workers:
            end_worker(process, connection)
        self._workers = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        if not self._met:
            began = time.perf_counter()
            self._collect(LOAD_SECONDS, "starting")
            self.seconds_waited = time.perf_counter() - began
            self._met = True

    def _collect(self, seconds: float, doing: str) -> dict[int, Any]:
        """What each rank answers; the first failure to answer is everybody's."""
        answers: dict[int, Any] = {}
        waiting = dict(enumerate(self._workers))
        limit, until = seconds, time.monotonic() + seconds
        while waiting:
            awaited = [each for process, c in waiting.values() for each in (process.sentinel, c)]
            ready = multiprocessing.connection.wait(awaited, max(0.0, until - time.monotonic()))
            if not ready:
                raise self._late(answers, waiting, limit)
            for rank, (process, connection) in list(waiting.items()):
                if connection in ready or connection.poll():
                    try:
                        answer, error = connection.recv()
                    except (EOFError, OSError):
                        raise self._ended(rank, process, doing) from None
                    if error is not None:
                        raise error
                    answers[rank] = answer
                    del waiting[rank]
                elif process.sentinel in ready:
                    raise self._ended(rank, process, doing)
            if doing == "running" and waiting:
                left = time.monotonic() + (RAISED_SECONDS if _raised(answers) else LEFT_SECONDS)
                # Outside its group a rank has nothing to do: that it is through says nothing.
                if any(answer is not None for answer in answers.values()) and left < until:
                    limit, until = min(limit, LEFT_SECONDS), left
        return answers

    def _ended(self, rank: int, process: Any, doing: str) -> TargetLost:
        where = self._step(rank) if doing == "running" else "starting"
        return TargetLost("crash", f"rank {rank} ended with {end_of(process)} in {where}")

    def _late(self, answers: dict[int, Any], waiting: dict[int, Any], limit: float) -> TargetLost:
        for process, _ in waiting.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(SAYING_SECONDS)
        where = "; ".join(f"rank {rank} {self._place(rank)}" for rank in waiting)
        raised = _raised(answers)
        if raised:
            first, error = next(iter(raised.items()))
            return TargetLost(
                "crash",
                f"rank {first} raised {error['type']}: {error['message'][:300]}, while others "
                f"wait: {where}",
            )
        through = [rank for rank, answer in answers.items() if answer is not None]
        if through:
            left = ", ".join(f"rank {rank}" for rank in sorted(through))
            return TargetLost("timeout", f"{left} came back without waiting for others: {where}")
        return TargetLost("timeout", f"no answer within {limit:g} s: {where}")

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _step(self, rank: int) -> str:
        """The last step that the rank has written down."""
        text = self._log(rank).read_text(errors="replace")
        steps = re.findall(f"^{re.escape(ranks.STEP)}(.*)$", text, re.MULTILINE)
        return steps[-1] if steps else "a step of its own"

    def _place(self, rank: int) -> str:
        """Where a rank is, from the stack that it has just written."""
        text = self._log(rank).read_text(errors="replace")
        return f"is in {self._step(rank)}{place_in(text)}"


def _raised(answers: dict[int, Any]) -> dict[int, dict[str, Any]]:
    """The errors that ranks have answered with, by rank."""
    return {
        rank: answer[0]
        for rank, answer in answers.items()
        if answer is not None and answer[0] is not None
    }


FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')


OUTERMOST = (("worker.py", "run_session"), ("ranks.py", "join"))
"""What the suite calls a target from."""


def place_in(text: str) -> str:
    """The innermost line outside torch of the stack of the thread that joins or runs a session.

    >>> place_in('''Current thread 0x1 (most recent call first):
    ...   File "/python/torch/distributed/distributed_c10d.py", line 9 in all_to_all_single
    ...   File "/home/mine.py", line 7 in exchange
    ...   File "/python/moe_conformance/worker.py", line 5 in run_session
    ... ''')
    ', waiting in all_to_all_single, mine.py line 7 in exchange'
    """
    for stack in reversed(re.split(r"^(?=Thread |Current thread )", text, flags=re.MULTILINE)):
        frames = [found for line in stack.splitlines() if (found := FRAME.match(line))]
        if not any((Path(f["file"]).name, f["name"]) in OUTERMOST for f in frames):
            continue
        inside = [frame for frame in frames if "/torch/" not in frame["file"]]
        waiting = [f["name"] for f in frames if f["file"].endswith("distributed_c10d.py")]
        what = f", waiting in {waiting[-1]}" if waiting else ""
        first = inside[0]
        return f"{what}, {Path(first['file']).name} line {first['line']} in {first['name']}"
    return ""
