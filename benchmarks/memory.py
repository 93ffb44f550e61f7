"""What a call keeps for its backward, and the most memory that it takes."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def kept_at_most(T: int, H: int, I: int, E: int, K: int, b: int) -> int:
    """Bytes that training may keep between forward and backward: x, pre-activations, routing data.

    Routing data are int64 ids, float32 weights, the order and its inverse, and three numbers for
    each tile of at least 16 rows.

    >>> kept_at_most(T=16, H=4, I=2, E=2, K=1, b=2)
    612
    """
    slots = T * K
    return b * (T * H + 2 * slots * I) + 20 * slots + 12 * (-(-slots // 16) + E)


def kept_bytes(forward: Callable[[], torch.Tensor], matrices: Sequence[torch.Tensor]) -> int:
    """Bytes that a graph keeps for its backward, the matrices of the experts left out."""
    left_out = {matrix.data_ptr() for matrix in matrices}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    total = sum(kept.values())
    del out
    return total


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory that a call takes on top of what was there, its result included.

    On a CPU this counts what torch allocates; what a library takes inside a product is not in it.

    Args:
        run: called once.
        device: its type.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    taken = most = 0
    for _, change in changes:
        taken += change
        most = max(most, taken)
    return most
