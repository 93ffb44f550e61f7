"""Ranks that are processes of their own over gloo, kept alive between calls."""

import datetime
import importlib.util
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time

# Rows and columns of ranks that a function may be called on.
MESHES = ((1, 2), (2, 2))
SIZE = 4
SECONDS = 120


class World:
    """Four processes, forked from one that has imported torch: they cost a second, not ten."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "pytest"])
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            given = {"given": (theirs, self.folder.name, rank)}
            # Such a file has no name that a new process could import.
            process = context.Process(target=runpy.run_path, args=(__file__, given, "rank"))
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, function, shape, *given):
        """What each rank of a mesh returns.

        Args:
            function: of a test's file; called with the mesh and what is given.
            shape: of the mesh, one of `MESHES`.
            given: what can be pickled.
        """
        ranks = self.ranks[: shape[0] * shape[1]]
        asked = pickle.dumps((function.__code__.co_filename, function.__name__, shape, given))
        for _, pipe in ranks:
            pipe.send_bytes(asked)
        answers, until = [], time.monotonic() + SECONDS
        for rank, (_, pipe) in enumerate(ranks):
            assert pipe.poll(max(0, until - time.monotonic())), f"rank {rank} does not answer"
            result, error = pickle.loads(pipe.recv_bytes())
            assert error is None, f"rank {rank}: {error}"
            answers.append(result)
        return answers

    def close(self):
        """End every process."""
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()
        self.folder.cleanup()


def _mesh(shape, rank):
    """All ranks, this rank's row and its column; nothing for a rank outside."""
    import torch.distributed as dist
    from moe_reference.ranks import ProcessRanks, mesh_of_list

    own = []
    for each in mesh_of_list(*shape):
        # Every process makes every group, also those that it is not in.
        groups = [(members, dist.new_group(members)) for members in each.groups]
        own += [group for members, group in groups if rank in members]
    return tuple(map(ProcessRanks, own))


def _serve(pipe, folder, rank):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    meshes, files = {shape: _mesh(shape, rank) for shape in MESHES}, {}
    while True:
        try:
            path, name, shape, given = pickle.loads(pipe.recv_bytes())
        except EOFError:
            # A graph holds on to its process group, which must not outlive the interpreter.
            os._exit(0)
        if path not in files:
            spec = importlib.util.spec_from_file_location("the_test", path)
            sys.modules["the_test"] = files[path] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(files[path])
        try:
            answer = getattr(files[path], name)(meshes[shape], *given), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(answer))


if __name__ == "rank":
    _serve(*globals()["given"])
