"""Runs sessions of calls on a target: in a worker process, or inline for targets one trusts.

A worker that crashes, hangs or is killed costs the session it was running; the next session gets a
new worker. Workers are forked from a server process that has imported torch once and nothing of any
target, so a new one costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from moe_conformance import worker
from moe_conformance.codec import pack, unpack
from moe_conformance.target import Capabilities, Target

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

    def close(self) -> None:
        """Let go of the process, if there is one."""
        ...


class InlineExecutor:
    """Calls a target in this very process: for seeded faults and our own tests only."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.description = {
            "name": target.name,
            "version": target.version,
            "capabilities": target.capabilities.to_json(),
            "operations": list(type(target).operations()),
            "devices": {"cpu": ""},
            "triton": None,
        }

    def run(self, session: Session) -> list[Answer]:
        """Run the session here; inputs are copied first, as they are on the way to a worker."""
        return worker.run_session(self.target, session)

    def close(self) -> None:
        """Nothing to let go of."""


class WorkerExecutor:
    """Calls a target in a process of its own.

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
        self._pool: ProcessPoolExecutor | None = None
        self._process: Any = None
        handle, self._log = tempfile.mkstemp(prefix="moespec-", suffix=".log")
        os.close(handle)
        self.description = self._start()

    def run(self, session: Session) -> list[Answer]:
        """Run the session in the worker, which is started anew if the last one was lost."""
        if self._pool is None:
            self.restarts += 1
            self._start()
        return unpack(self._submit(self.timeout, worker.run, self.name, pack(session)))

    def close(self) -> None:
        """End the worker and everything that it started."""
        self._kill()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._log)

    def _start(self) -> dict[str, Any]:
        self._pool = ProcessPoolExecutor(
            1, mp_context=forkserver(), initializer=worker.start, initargs=(self._log,)
        )
        return self._submit(LOAD_SECONDS, worker.load, self.name)

    def _submit(self, seconds: float, function: Any, *arguments: Any) -> Any:
        assert self._pool is not None
        future = self._pool.submit(function, *arguments)
        # The pool never says how its process ended, or which it is; the process object does.
        self._process = next(iter(self._pool._processes.values()), self._process)
        try:
            return future.result(seconds)
        except worker.LoadError:
            self._kill()
            raise
        except TimeoutError:
            self._kill()
            raise TargetLost("timeout", f"no answer within {seconds:g} s") from None
        except BrokenProcessPool:
            ended = self._how_it_ended()
            self._kill()
            raise TargetLost("crash", f"the target's process ended with {ended}") from None

    def _how_it_ended(self) -> str:
        self._process.join(5.0)
        code = self._process.exitcode
        if code is None:
            return "no exit code"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def _kill(self) -> None:
        pool, self._pool = self._pool, None
        if self._process is not None:
            # The worker leads a group of its own, so this takes whatever it has started as well.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process = None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def in_worker(function: Any, *arguments: Any) -> Any:
    """Call one of the worker's functions in a process that is gone afterwards."""
    with tempfile.NamedTemporaryFile(prefix="moespec-") as log:
        pool = ProcessPoolExecutor(
            1, mp_context=forkserver(), initializer=worker.start, initargs=(log.name,)
        )
        try:
            return pool.submit(function, *arguments).result(LOAD_SECONDS)
        except BrokenProcessPool:
            raise worker.LoadError(
                f"{' '.join(map(str, arguments))}: the process that loads it ended"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def capabilities_of(executor: Executor) -> Capabilities:
    """The declaration of the executor's target."""
    return Capabilities.from_json(executor.description["capabilities"])


def forkserver() -> Any:
    """Where processes come from: a server that has imported torch and no target."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_conformance.check"])
    return context
