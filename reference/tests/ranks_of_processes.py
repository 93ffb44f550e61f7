"""Ranks that are processes of their own over gloo, kept alive between calls.

The tests of the reference and those of the fast version start theirs here.
"""

import datetime
import importlib.util
import math
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import pytest

# Rows and columns of ranks that a function may be called on, if nothing else is asked for.
MESHES = ((1, 2), (2, 2))


class World:
    """Processes, forked from one that has imported torch: they cost a second, not ten.

    Args:
        meshes: rows and columns of ranks that functions will be called on. The greatest says how
            many processes there are.
        seconds: how long a call may take.
    """

    def __init__(self, meshes=MESHES, seconds=120):
        self.seconds = seconds
        context = multiprocessing.get_context("forkserver")
        # There is one such server in a process of pytest. The suite forks from it as well, and is
        # slow if it has to import all this each time. What is not installed is left out.
        context.set_forkserver_preload(["moe_conformance.preloaded", "torch.distributed", "pytest"])
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = []
        for rank in range(max(map(math.prod, meshes))):
            ours, theirs = context.Pipe()
            given = {"given": (theirs, self.folder.name, rank, meshes, seconds)}
            # Such a file has no name that a new process could import.
            process = context.Process(target=runpy.run_path, args=(__file__, given, "rank"))
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, function, shape, *given):
        """What each rank of a mesh returns.

        Args:
            function: of a test's file; called with the mesh and what is given.
            shape: of the mesh, one of those that the world was made for.
            given: what can be pickled.
        """
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks[: math.prod(shape)])}
        asked = pickle.dumps((function.__code__.co_filename, function.__name__, shape, given))
        for pipe in ranks:
            pipe.send_bytes(asked)
        answers, until = [None] * len(ranks), time.monotonic() + self.seconds
        while ranks:
            # Whoever has failed answers before those who wait for it.
            ready = wait([*ranks], max(0, until - time.monotonic()))
            assert ready, f"ranks {[*ranks.values()]} do not answer"
            for pipe in ready:
                rank = ranks.pop(pipe)
                try:
                    answers[rank], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = "its process has ended"
                assert error is None, f"rank {rank}: {error}"
        return answers

    def close(self):
        """End every process."""
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def world():
    made = World()
    yield made
    made.close()


def _mesh(shape, rank, groups):
    """All ranks, this rank's row and its column; nothing for a rank outside."""
    import torch.distributed as dist
    from moe_reference.ranks import ProcessRanks, mesh_of_list

    own = []
    for each in mesh_of_list(*shape):
        for members in map(tuple, each.groups):
            # Every process makes every group, also those that it is not in, and each of them once.
            if members not in groups:
                groups[members] = dist.new_group(members)
            if rank in members:
                own.append(groups[members])
    return tuple(map(ProcessRanks, own))


def _serve(pipe, folder, rank, meshes, seconds):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=max(map(math.prod, meshes)),
        timeout=datetime.timedelta(seconds=seconds),
    )
    groups, files = {}, {}
    meshes = {shape: _mesh(shape, rank, groups) for shape in meshes}
    while True:
        try:
            path, name, shape, given = pickle.loads(pipe.recv_bytes())
        except EOFError:
            # A graph holds on to its process group, which must not outlive the interpreter.
            os._exit(0)
        try:
            if path not in files:
                spec = importlib.util.spec_from_file_location("the_test", path)
                sys.modules["the_test"] = module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                files[path] = module
            answer = getattr(files[path], name)(meshes[shape], *given), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


if __name__ == "rank":
    _serve(*globals()["given"])
