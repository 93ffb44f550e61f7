"""Ranks that are threads of this process, over torch's own threaded process group."""

import threading

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded


def on_ranks(world_size, function):
    """What each of several ranks returns, the ranks being threads of this process."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    world = threaded._install_threaded_pg()
    store, results, errors = dist.HashStore(), [None] * world_size, []

    def run(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)

    threads = [
        threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)
    ]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join(15)
        hung = [rank for rank, each in enumerate(threads) if each.is_alive()]
        if hung:
            threaded.ProcessLocalGroup.exception_handle(None)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        del world
    if errors:
        raise errors[0]
    if hung:
        raise TimeoutError(f"ranks {hung} still wait for the others")
    return results


def exchanges(monkeypatch):
    """Rank, dtype, bytes sent and bytes received of every exchange of such ranks, as they happen.

    Recorded where all collectives of a process group come together, whatever called them: one that
    is not an all-to-all of one tensor raises.
    """
    calls, real = [], threaded.Collective.join

    def recorded(self, rank, data):
        if not isinstance(self._collective, threaded.AllToAllBase):
            raise AssertionError(f"{type(self._collective).__name__}: only all-to-all is expected")
        came, sent, *_ = data
        sizes = (each.numel() * each.element_size() for each in (sent, came))
        calls.append((rank, sent.dtype, *sizes))
        return real(self, rank, data)

    monkeypatch.setattr(threaded.Collective, "join", recorded)
    return calls
