"""Times of implementations side by side, and what the machine itself can do.

All implementations run once in every round, in an order drawn anew, so that a clock that drifts or
a neighbour that wakes up meets them all. A ratio is that of two times of the same round.

| way | what is in a time |
|---|---|
| `eager` | one call, with an empty queue and a cold L2 cache: launches by the host count |
| `graph` | one replay of a CUDA graph of one call, with a cold L2 cache |
| `warm` | a tenth of a replay of a graph of ten calls, one behind the other: the cache is warm |
| `cpu` | one call, by the processor's clock |
"""

import gc
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
FLUSHED_BYTES = 256 << 20
"""Written before a measurement with a cold cache: several times the L2 cache of a Hopper GPU."""
CALLS_PER_GRAPH = 10
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


def interleaved(
    runs: Mapping[str, Any], measure: Callable[[Any], float], rounds: int
) -> dict[str, list[float]]:
    """The seconds of every implementation in every round.

    Each is the first of a round in its turn. The others follow in an order drawn anew: in one that
    goes round, each would nearly always come after the same other one, and find the caches and the
    heap as that one leaves them.

    Args:
        runs: what `measure` takes, by name.
        measure: runs it once and returns seconds.
        rounds: how often.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for turn in range(rounds):
        others = list(runs)
        first = others.pop(turn % len(others))
        for name in (first, *order.sample(others, len(others))):
            times[name].append(measure(runs[name]))
    return times


def summary(times: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, Any]]:
    """Microseconds and each one's time over ours, round by round: medians and quartiles.

    Args:
        times: seconds by name and round.
        ours: what the ratios are relative to; without it there are none.
    """
    found = {}
    for name, taken in times.items():
        low, middle, high = quartiles([1e6 * seconds for seconds in taken])
        found[name] = {"us": middle, "us_quartiles": [low, high], "rounds": len(taken)}
        if ours in times:
            ratios = [t / o for t, o in zip(taken, times[ours], strict=True)]
            low, middle, high = quartiles(ratios)
            found[name] |= {"ratio_to_ours": middle, "ratio_quartiles": [low, high]}
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile, with four digits.

    >>> quartiles([1.0, 2.0, 4.0])
    [1.5, 2.0, 3.0]
    """
    if len(values) == 1:
        values = [*values, *values]
    found = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in found]


def rounds_for(estimates: Sequence[float], seconds: float) -> int:
    """How many rounds fit, within limits.

    >>> rounds_for([0.01, 0.03], 0.4), rounds_for([10.0], 0.4)
    (10, 5)
    """
    fitting = int(seconds / max(sum(estimates), 1e-9))
    return max(LEAST_ROUNDS, min(fitting, MOST_ROUNDS))


class CpuClock:
    """Times by the processor's clock."""

    ways = ("cpu",)

    def prepared(self, run: Run, way: str) -> Run:
        """What `measure` takes."""
        return run

    def measure(self, run: Run, way: str) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Nothing runs on."""


class CudaClock:
    """Times by events of the GPU; see the table above."""

    ways = ("eager", "graph", "warm")

    def __init__(self) -> None:
        self.cache = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")

    def prepared(self, run: Run, way: str) -> Any:
        """The call itself, or a graph that has been replayed once.

        Raises:
            RuntimeError: the call cannot be captured.
        """
        if way == "eager":
            return run
        calls = CALLS_PER_GRAPH if way == "warm" else 1
        # A collection while a graph is captured may free memory of it.
        gc.collect()
        torch.cuda.synchronize()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def measure(self, prepared: Any, way: str) -> float:
        """Seconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if way != "warm":
            self.cache.zero_()
        if way == "eager":
            # Otherwise the host would be ahead by as much as writing the cache takes.
            torch.cuda.synchronize()
        start.record()
        if way == "eager":
            prepared()
        else:
            prepared.replay()
        end.record()
        end.synchronize()
        calls = CALLS_PER_GRAPH if way == "warm" else 1
        return start.elapsed_time(end) / 1e3 / calls

    def synchronize(self) -> None:
        """Wait for what was launched."""
        torch.cuda.synchronize()


def clock_of(device: str) -> CpuClock | CudaClock:
    """The clock of a device by its type."""
    return CudaClock() if device == "cuda" else CpuClock()


def one_call(clock: CpuClock | CudaClock, run: Run) -> tuple[float, Any]:
    """Seconds and result of a call that is waited for: the first one, or an estimate later."""
    clock.synchronize()
    start = time.perf_counter()
    result = run()
    clock.synchronize()
    return time.perf_counter() - start, result


def ceilings(clock: CpuClock | CudaClock, device: str, tiny: bool) -> dict[str, Any]:
    """What the machine reaches in this run; every percentage is of these.

    Args:
        clock: of the device.
        device: its type.
        tiny: sizes for a dry run.

    Returns:
        `dense_flops`: of a product of three matrices of side `side` in `dtype`, per second.
        `copy_bytes`: bytes read and written by a copy, per second.
        `read_bytes`: bytes read by a sum over float32, per second.
        `launch_us`: one replay of a graph with one smallest kernel in it (a smallest call, on a
        CPU).
    """
    on_gpu = device == "cuda"
    side = 256 if tiny else 8192
    dtype = torch.bfloat16 if on_gpu else torch.float32
    floats = (1 << 20) if tiny else (1 << 30)
    way = "graph" if on_gpu else "cpu"
    # Random numbers: a product of zeros needs less power and runs at a higher clock.
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    dense = _median(clock, lambda: torch.mm(left, right), way)
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    copy = _median(clock, lambda: target.copy_(source), way)
    read = _median(clock, lambda: source.sum(), way)
    one = torch.zeros(1, device=device)
    launch = _median(clock, lambda: one.add_(1), way)
    return {
        "dense_flops": float(f"{2 * side**3 / dense:.4g}"),
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes": float(f"{8 * floats / copy:.4g}"),
        "read_bytes": float(f"{4 * floats / read:.4g}"),
        "launch_us": float(f"{1e6 * launch:.4g}"),
    }


def _median(clock: CpuClock | CudaClock, run: Run, way: str) -> float:
    for _ in range(3):
        run()
    prepared = clock.prepared(run, way)
    return statistics.median(clock.measure(prepared, way) for _ in range(15))


def device_facts(device: str) -> dict[str, Any]:
    """Name, driver, versions, and the clocks if `nvidia-smi` tells them."""
    if device != "cuda":
        return {"name": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        **clocks(),
    }


def clocks() -> dict[str, str]:
    """What `nvidia-smi` says of driver, clocks, power and temperature; nothing without it."""
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
             "temperature.gpu")  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        return {}
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    values = [value.strip() for value in said.stdout.strip().split(",")]
    if said.returncode or len(values) != len(asked):
        return {}
    return dict(zip(asked, values, strict=True))
