"""Runs sessions of calls on a target: in a worker process, or inline for targets one trusts.

A worker that crashes, hangs or is killed costs the session it was running; the next session gets a
new worker. Workers are forked from a server process that has imported torch once and nothing of any
target, so a new one costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from moe_conformance import worker
from moe_conformance.codec import from_bytes, to_bytes
from moe_conformance.target import Capabilities, Target

if TYPE_CHECKING:
    from moe_conformance.rank_group import RankGroup

LOAD_SECONDS = 300.0
"""How long a target may take to be imported and made; heavy libraries take a minute on a busy
machine, and a hang here costs the whole target."""

Session = dict[str, Any]
Answer = dict[str, Any]


class TargetLost(Exception):
    """The target's process did not give an answer.

    Attributes:
        kind: "crash" or "timeout".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Executor(Protocol):
    """What the runner needs of either way to call a target."""

    description: dict[str, Any]

    def run(self, session: Session) -> list[Answer]:
        """Run the session; raise `TargetLost` if there is no answer to be had."""
        ...

    def renew(self) -> bool:
        """Let the next session meet a target that has answered none; False where none is to be had.

        Raises:
            TargetLost, worker.LoadError: the target could not be loaded again.
        """
        ...

    def close(self) -> None:
        """Let go of the process, if there is one."""
        ...


class InlineExecutor:
    """Calls a target in this very process: for seeded faults and our own tests only."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._ranks: dict[int, list[Target]] = {}
        self.description = {
            "name": target.name,
            "version": target.version,
            "capabilities": target.capabilities.to_json(),
            "operations": list(type(target).operations()),
            "devices": {"cpu": ""},
            "triton": None,
        }

    def run(self, session: Session) -> list[Answer]:
        """Run the session here; inputs are copied first, as they are on the way to a worker.

        The ranks of a session for several are threads, each with a copy of the target.
        """
        worker.draw_once()
        if "world_size" in session:
            from moe_conformance.rank_threads import run_on_threads

            size = session["world_size"]
            if size not in self._ranks:
                self._ranks[size] = [copy.copy(self.target) for _ in range(size)]
            return run_on_threads(self._ranks[size], session)
        return worker.run_session(self.target, session)

    def renew(self) -> bool:
        """Not to be had: what a module keeps outlives every new target of it."""
        return False

    def close(self) -> None:
        """Nothing to let go of."""


class WorkerExecutor:
    """Calls a target in a process of its own, and for sessions of several ranks in one for each.

    Args:
        name: the target, as on the command line.
        timeout: seconds that one session may take.

    Raises:
        worker.LoadError: the target could not be loaded.
        TargetLost: its process died or hung while it was being loaded.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        self.restarts = 0
        self.seconds_meeting = 0.0
        self._groups: dict[tuple[int, str], RankGroup] = {}
        self._process: Any = None
        self._connection: Any = None
        handle, self._log = tempfile.mkstemp(prefix="moespec-", suffix=".log")
        os.close(handle)
        self.description = self._start()

    def run(self, session: Session) -> list[Answer]:
        """Run the session in the worker, which is started anew if the last one was lost."""
        if "world_size" in session:
            return self._on_ranks(session)
        if self._process is None:
            self.restarts += 1
            self._start()
        return from_bytes(self._ask(self.timeout, worker.run, self.name, to_bytes(session)))

    def prepare(self, world_sizes: Iterable[int], device: str) -> None:
        """Start the ranks of these worlds; they load the target and meet while others work."""
        from moe_conformance.rank_group import RankGroup

        for size in world_sizes:
            if (size, device) not in self._groups:
                self._groups[size, device] = RankGroup(self.name, size, device, self.timeout)

    def _on_ranks(self, session: Session) -> list[Answer]:
        key = session["world_size"], session["device"]
        self.prepare([key[0]], key[1])
        group = self._groups[key]
        before = group.seconds_waited
        try:
            answers = group.run(session)
        except (worker.LoadError, TargetLost):
            self.restarts += 1
            self._groups.pop(key).close()
            raise
        finally:
            self.seconds_meeting += group.seconds_waited - before
        if not _in_step(answers[-1], len(session["calls"][-1]["arguments"]["ranks"])):
            self.restarts += 1
            self._groups.pop(key).close()
        return answers

    def renew(self) -> bool:
        """End the worker and the ranks; the next session gets new ones."""
        self._end()
        self._start()
        return True

    def close(self) -> None:
        """End the worker, the ranks, and everything that they started."""
        self._end()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._log)

    def _start(self) -> dict[str, Any]:
        self._process, self._connection = start_worker(self._log)
        return self._ask(LOAD_SECONDS, worker.load, self.name)

    def _ask(self, seconds: float, function: Any, *arguments: Any) -> Any:
        try:
            return _answer_of(self._process, self._connection, seconds, function, arguments)
        except (worker.LoadError, TargetLost):
            self._kill()
            raise

    def _end(self) -> None:
        while self._groups:
            self._groups.popitem()[1].close()
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            end_worker(self._process, self._connection)
        self._process = self._connection = None


def _in_step(answer: Answer, members: int) -> bool:
    """Whether the ranks can go on: all of them came through, or all refused for the same reason."""
    error = answer["error"]
    if error is None:
        return True
    refused = error["type"] in ("ValueError", "TypeError") or error["unsupported"]
    return refused and len(error["ranks"]) == members


def in_worker(function: Any, *arguments: Any) -> Any:
    """Call one of the worker's functions in a process that is gone afterwards.

    Raises:
        worker.LoadError: the function raised it, or the process ended.
    """
    with tempfile.NamedTemporaryFile(prefix="moespec-") as log:
        process, connection = start_worker(log.name)
        try:
            return _answer_of(process, connection, LOAD_SECONDS, function, arguments)
        except TargetLost as lost:
            raise worker.LoadError(f"{' '.join(map(str, arguments))}: {lost}") from None
        finally:
            end_worker(process, connection)


def start_worker(log: str) -> tuple[Any, Any]:
    """A new worker and our end of its pipe; what it prints goes into the file `log`."""
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=worker.serve, args=(theirs, log), daemon=False)
    process.start()
    theirs.close()
    return process, ours


def _answer_of(
    process: Any, connection: Any, seconds: float, function: Any, arguments: tuple[Any, ...]
) -> Any:
    # A pipe of our own instead of a pool: a pool passes each call through three threads, which
    # took as long as the call itself.
    try:
        connection.send((function, arguments))
        # A process that the target has started may hold the pipe open after the worker's end.
        ready = multiprocessing.connection.wait([connection, process.sentinel], seconds)
        if not ready:
            raise TargetLost("timeout", f"no answer within {seconds:g} s")
        if connection not in ready and not connection.poll():
            raise EOFError
        answer, error = connection.recv()
    except (EOFError, OSError):
        raise TargetLost("crash", f"the target's process ended with {end_of(process)}") from None
    if error is not None:
        raise error
    return answer


def end_of(process: Any) -> str:
    """How a process that has ended came to its end."""
    process.join(5.0)
    code = process.exitcode
    if code is None:
        return "no exit code: it closed the pipe"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_worker(process: Any, connection: Any) -> None:
    """End a worker and everything that it has started, and close the pipe to it."""
    # The worker leads a group of its own, so this takes whatever it has started as well.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    connection.close()


def capabilities_of(executor: Executor) -> Capabilities:
    """The declaration of the executor's target."""
    return Capabilities.from_json(executor.description["capabilities"])


def forkserver() -> Any:
    """Where processes come from: a server that has imported torch and no target."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_conformance.preloaded"])
    return context
