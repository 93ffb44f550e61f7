"""The timing matrix of a GPU: benchmarks/results/gpu.json.

    python benchmarks/gpu.py [--seconds N] [--conformance N] [--out FOLDER] [--only KIND]
    python benchmarks/gpu.py --dry-run --out FOLDER     every row with tiny sizes, on any device

A row is one kind of work at one size. Each result is compared with products in float64 (float32
where they are large) before it is timed; what is off is recorded and not timed. Rows come in the
order of their importance and are written as soon as they are measured; when the time is over, the
rest is listed as not reached. After an error that leaves the GPU unusable the program starts itself
again and goes on behind that row.

Floors are what the arithmetic and the memory of the same run's ceilings allow: `flops` over the
dense product's rate, `bytes` over the rate of a copy, the larger of the two.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token,
b bytes of a number.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from goals import OURS, goal_lines
from memory import kept_at_most, kept_bytes, peak_bytes
from moe_optimized.alignment import align, align_torch, align_triton, tile_table
from moe_optimized.dispatch import sum_places
from moe_optimized.experts import (
    experts,
    experts_torch,
    experts_triton,
    sum_of_experts_triton,
)
from moe_optimized.experts_decode import is_few
from moe_optimized.experts_triton import compile_options, experts_down_kernel, tile_shapes
from moe_optimized.gating import route, route_triton
from moe_optimized.interpreter import HAS_TRITON, launch
from moe_optimized.quantized_experts import experts_quantized, experts_quantized_triton
from moe_optimized.quantized_layout import prepare
from moe_reference.activation_quantization import round_activations
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig
from moe_reference.quantization import dequantize, packed_bytes, quantize_experts
from peers import PEERS, Given, imported, look_in_folder
from timing import (
    ceilings,
    clock_of,
    clocks,
    device_facts,
    interleaved,
    one_call,
    rounds_for,
    summary,
)

Tensors = tuple[torch.Tensor, ...]

TORCH, SORTED = OTHER_WAYS = ("moespec-torch", "moespec-sorted")
"""Grouped products of torch; and a few tokens by the way of many."""

MODELS = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Qwen3-235B-A22B": (4096, 1536, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "Kimi-K2": (7168, 2048, 384, 8),
    "7B, I 256": (1536, 256, 128, 8),
    "30B, I 1024": (4096, 1024, 64, 4),
}
"""H, I, E and K of published models, and of two configurations that training papers use."""

FIRST_CALLS = 40.0
"""Seconds that the first calls of a peer may take in all: some try out tiles for minutes."""

PACKED = {
    "fp8": ("e4m3", {"granularity": "block", "block_size": 128}, "e4m3_block"),
    "w4a16": ("uint4b8", {"group_size": 32, "scale_dtype": torch.float16}, None),
}
"""Format and options of weights that are packed, and what rows are rounded to before a product."""

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Of the norm: a bfloat16 has a relative error of 1.7e-3 (root mean square), and four of them add
up on the longest way, hidden row, output row, weight and sum; float32 is summed in other orders."""
ROW_TOLERANCE = 5
"""Times as much for a single row, relative to it or to the rows' root mean square."""


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    kind: str
    model: str
    T: int
    routing: str = "uniform"

    @property
    def label(self) -> str:
        """Kind, model, tokens and routing in one line."""
        return f"{self.kind}, {self.model}, T {self.T}, {self.routing}"


@dataclass
class Work:
    """The implementations of a row, what they have to give, and what it takes at least.

    `ways` are the ways of timing on a GPU; `capturable` those that a graph can hold. `expected_of`
    has what an implementation has to give that computes something else than the others.
    """

    sizes: dict[str, Any]
    runs: dict[str, Callable[[], Any]]
    expected: Callable[[], Tensors]
    flops: int
    bytes: int
    ways: tuple[str, ...]
    capturable: set[str] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    dtype: torch.dtype | None = None
    expected_of: dict[str, Callable[[], Tensors]] = field(default_factory=dict)


def plan() -> list[Case]:
    """All rows, the most important first: what a goal asks for, then other sizes and skew."""

    def cases(kind: str, models: Iterable[str], tokens: Iterable[int], routing: str = "uniform"):
        return [Case(kind, model, T, routing) for model in models for T in tokens]

    mixtral, qwen, olmoe, large, oss, oss_large, deepseek, kimi, *papers = MODELS
    decode = (64, 8, 1)
    some = [
        *cases("forward", [qwen, mixtral], (16384, *decode)),
        *cases("grouped_gemm", [mixtral, qwen], [16384]),
        *cases("topk", ["E 128", "E 256"], [1, 16384]),
        *cases("align", ["E 128"], [512, 16384]),
        *cases("gather_sum", [qwen, mixtral], [16384]),
        *cases("backward", [qwen, mixtral], [16384]),
        *cases("memory", [qwen], [16384]),
        *cases("forward", [olmoe], (16384, *decode)),
        *cases("backward", [olmoe], [16384]),
        *cases("forward", [large], (16384, *decode)),
        *cases("backward", [large], [16384]),
        *cases("forward", [mixtral], [4096]),
        *cases("forward", [oss, oss_large], (4096, 512, *decode)),
        *cases("forward", [deepseek], (4096, *decode, 512)),
        *cases("forward", [kimi], (4096, *decode, 512)),
        *cases("fp8", [qwen, mixtral, oss], decode),
        *cases("w4a16", [qwen, mixtral, oss], decode),
        *cases("forward", [qwen], (16384, 64), "zipf"),
        *cases("backward", [qwen], [16384], "zipf"),
        *cases("forward", [mixtral], (16384, 64), "zipf"),
        *cases("memory", [mixtral, olmoe, large], [16384]),
        *cases("gather_sum", [qwen, mixtral], [4096]),
        *cases("forward", [qwen, olmoe, large, mixtral], (4096, 512)),
        *cases("backward", [qwen, olmoe, mixtral, large], [4096]),
        *cases("forward", [oss], [16384]),
        *cases("forward", papers[:1], [24576]),
        *cases("backward", papers[:1], [24576]),
        *cases("forward", papers[1:], [32768]),
        *cases("backward", papers[1:], [32768]),
    ]
    return list(dict.fromkeys(some))


def forward_floor(T: int, H: int, I: int, K: int, touched: int, b: int) -> tuple[int, int]:
    """Operations and bytes of one forward in two products.

    A slot is a row of 3·H·I multiplications and as many additions. The matrices of a touched
    expert are read once; x is read and the output written once; between the two products the hidden
    rows, and behind them the packed output rows, are written and read once.

    >>> forward_floor(T=64, H=2048, I=768, K=8, touched=126, b=2)
    (4831838208, 1195376640)
    """
    slots = T * K
    moved = 3 * touched * H * I + 2 * T * H + 2 * slots * I + 2 * slots * H
    return 6 * slots * H * I, b * moved


def backward_floor(T: int, H: int, I: int, E: int, K: int, touched: int, b: int) -> tuple[int, int]:
    """Operations and bytes of one backward for x, weights and both matrices.

    Twice the products of the forward: one by the matrices, one by the rows. The matrices of a
    touched expert are read once and the gradients of all E written; x and the gradient of the
    output are read, that of x written; the kept pre-activations (2·I) are read; their gradient, the
    hidden rows made again and the packed gradients of x are written and read once.

    >>> backward_floor(T=1, H=4, I=2, E=3, K=1, touched=1, b=2)
    (96, 264)
    """
    slots = T * K
    moved = 3 * (touched + E) * H * I + 3 * T * H + 2 * slots * I + 6 * slots * I + 2 * slots * H
    return 12 * slots * H * I, b * moved


def product_floor(rows: int, H: int, I: int, touched: int, b: int) -> tuple[int, int]:
    """Operations and bytes of packed rows [rows, I] by the matrices [E, H, I] of touched experts.

    >>> product_floor(rows=3, H=4, I=2, touched=2, b=2)
    (48, 68)
    """
    return 2 * rows * H * I, b * (touched * H * I + rows * (H + I))


def topk_floor(T: int, E: int, K: int) -> tuple[int, int]:
    """Bytes of a top-k: float32 logits read, float32 weights and int32 ids written.

    >>> topk_floor(T=2, E=4, K=1)
    (0, 48)
    """
    return 0, 4 * T * E + 8 * T * K


def align_floor(slots: int, E: int, block: int) -> tuple[int, int]:
    """Bytes of an alignment: int64 ids read, the padded order and a name per block written.

    >>> align_floor(slots=4, E=2, block=4)
    (0, 88)
    """
    size, blocks = aligned_sizes(slots, E, block)
    return 0, 8 * slots + 4 * (size + blocks) + 4


def aligned_sizes(slots: int, E: int, block: int) -> tuple[int, int]:
    """Lengths of the padded order and of the names: as many as any ids can need.

    >>> aligned_sizes(slots=4, E=2, block=4), aligned_sizes(slots=2, E=8, block=4)
    ((10, 3), (8, 2))
    """
    size = slots + E * (block - 1)
    if slots < E:
        size = min(size, slots * block)
    return size, -(-size // block)


def gather_floor(T: int, H: int, K: int, b: int) -> tuple[int, int]:
    """Bytes of a gather-and-sum: K rows read and one written per token, places and weights read.

    >>> gather_floor(T=2, H=4, K=2, b=2)
    (0, 80)
    """
    return 0, b * T * H * (K + 1) + 8 * T * K


def draw_ids(T: int, E: int, K: int, routing: str, device: str) -> torch.Tensor:
    """[T, K] int64, K different experts per token.

    `uniform` draws logits alike for all experts; `zipf` gives the i-th of the experts, in an order
    that is drawn, a probability in proportion to 1 / i to the power of 1.1.
    """
    made = torch.Generator(device).manual_seed(0)
    # The greatest of log p plus Gumbel noise are a draw without replacement.
    scores = -torch.empty(T, E, device=device).exponential_(generator=made).log()
    if routing == "zipf":
        ranks = torch.randperm(E, generator=made, device=device) + 1
        scores = scores - 1.1 * ranks.log()
    return scores.topk(K, dim=-1).indices


def load(ids: torch.Tensor, E: int) -> tuple[int, int]:
    """How many experts have rows, and the most rows of one; both counted.

    >>> load(torch.tensor([[0, 2], [2, 1]]), 4)
    (3, 2)
    """
    counts = torch.bincount(ids.flatten(), minlength=E)
    return int((counts > 0).sum()), int(counts.max())


class Bench:
    """The rows of one run on one device."""

    def __init__(self, device: str, tiny: bool, row_seconds: float) -> None:
        self.device, self.tiny, self.row_seconds = device, tiny, row_seconds
        self.clock = clock_of(device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.ceilings: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.first_calls: dict[str, float] = {}
        self._weights: tuple[Any, Tensors] | None = None
        self._interpreted: set[str] = set()

    def row(self, case: Case) -> dict[str, Any]:
        """Check and time one case.

        Raises:
            DeviceLost: an error after which the GPU answers nothing any more.
        """
        work = getattr(self, f"_{case.kind}")(case)
        for name in self.left_out.keys() & work.runs.keys():
            del work.runs[name]
            work.absent[name] = self.left_out[name]
        row = {"kind": case.kind, "model": case.model, "routing": case.routing, **work.sizes}
        dtype = work.dtype or self.dtype
        row["dtype"] = str(dtype).removeprefix("torch.")
        if case.kind == "memory":
            return row
        row |= {"flops": work.flops, "bytes": work.bytes, **self._floor(work)}
        row |= {"absent": work.absent, "wrong": {}, "first_call_s": {}, "ways": {}}
        good = self._checked(work, row)
        if case.kind in PACKED:
            row["peak_bytes"] = {name: peak_bytes(run, self.device) for name, run in good.items()}
        ways = work.ways if self.device == "cuda" else ("cpu",)
        for way in ways:
            self._time(way, {n: r for n, r in good.items() if self._takes(n, way, work)}, row)
        return row

    def _takes(self, name: str, way: str, work: Work) -> bool:
        return way in ("eager", "cpu") or name in work.capturable

    def _floor(self, work: Work) -> dict[str, Any]:
        arithmetic = work.flops / self.ceilings["dense_flops"]
        memory = work.bytes / self.ceilings["copy_bytes"]
        return {
            "floor_us": float(f"{1e6 * max(arithmetic, memory):.4g}"),
            "bound": "compute" if arithmetic > memory else "memory",
        }

    def _checked(self, work: Work, row: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        """What gives the expected result; the rest goes into the row."""
        expected, good = work.expected(), {}
        for name, run in work.runs.items():
            try:
                # The first result: a backward may write over what its graph keeps.
                seconds, given = one_call(self.clock, run)
                given = given if isinstance(given, tuple) else (given,)
                right = work.expected_of[name]() if name in work.expected_of else expected
                wrong = difference(given, right, work.dtype or self.dtype, work.exact)
            except Exception as error:
                self._lost(name, error)
                row["absent"][name] = f"{type(error).__name__}: {_first_line(error)}"
                continue
            if wrong:
                row["wrong"][name] = wrong
            else:
                good[name] = run
            row["first_call_s"][name] = round(seconds, 2)
            self._count_first_call(name, seconds)
        return good

    def _count_first_call(self, name: str, seconds: float) -> None:
        spent = self.first_calls[name] = self.first_calls.get(name, 0.0) + seconds
        if name not in (OURS, *OTHER_WAYS) and spent > FIRST_CALLS:
            self.left_out[name] = (
                f"its first calls took {spent:.0f} s, of {FIRST_CALLS:.0f} at most"
            )

    def _lost(self, name: str, error: Exception) -> None:
        if not answers(self.device):
            raise DeviceLost(name, _first_line(error)) from error
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _time(self, way: str, runs: Mapping[str, Callable[[], Any]], row: dict[str, Any]) -> None:
        prepared, estimates = {}, []
        for name, run in runs.items():
            try:
                prepared[name] = self.clock.prepared(run, way)
                # Once more: the second call tells what later ones take.
                estimates.append(one_call(self.clock, run)[0])
            except Exception as error:
                self._lost(name, error)
                row["absent"][f"{name}, {way}"] = f"{type(error).__name__}: {_first_line(error)}"
        if not prepared:
            return
        rounds = 2 if self.tiny else rounds_for(estimates, self.row_seconds)
        times = interleaved(prepared, lambda each: self.clock.measure(each, way), rounds)
        found = summary(times, OURS)
        for each in found.values():
            each["of_floor"] = float(f"{row['floor_us'] / each['us']:.4g}")
            if row["flops"]:
                each["tflops"] = float(f"{row['flops'] / each['us'] / 1e6:.4g}")
            each["gb_per_s"] = float(f"{row['bytes'] / each['us'] / 1e3:.4g}")
        row["ways"][way] = found

    def _sizes(self, case: Case) -> tuple[int, int, int, int, int]:
        H, I, E, K = MODELS[case.model]
        if not self.tiny:
            return case.T, H, I, E, K
        return min(case.T, 12), 32, 16, min(E, 4), min(K, 2)

    def _drawn(self, case: Case, training: bool) -> tuple[Given, dict[str, Any]]:
        T, H, I, E, K = self._sizes(case)
        gate_up, down = self._matrices(E, H, I)
        torch.manual_seed(1)
        x = torch.randn(T, H, dtype=self.dtype, device=self.device)
        ids = draw_ids(T, E, K, case.routing, self.device)
        weights = torch.randn(T, K, device=self.device).softmax(-1)
        touched, most = load(ids, E)
        given = Given(x, weights, ids, gate_up, down)
        for tensor in (x, weights, gate_up, down):
            tensor.requires_grad_(training)
        sizes = {"T": T, "H": H, "I": I, "E": E, "K": K, "touched": touched, "most_rows": most}
        return given, sizes

    def _matrices(self, E: int, H: int, I: int) -> Tensors:
        # Those of one model alone: two of the largest do not fit.
        if self._weights is None or self._weights[0] != (E, H, I):
            self._weights = None
            if self.device == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            shapes = ((E, 2 * I, H), (E, H, I))
            drawn = [torch.empty(*s, dtype=self.dtype, device=self.device) for s in shapes]
            self._weights = ((E, H, I), tuple(each.normal_(0, 0.02) for each in drawn))
        return self._weights[1]

    def _by_kernels(self, kind: str) -> bool:
        """On a GPU always; in a dry run once per kind, for the interpreter is slow."""
        if self.device == "cuda":
            return True
        first = kind not in self._interpreted
        self._interpreted.add(kind)
        return first and HAS_TRITON and self.tiny

    def _experts(self, given: Given, kind: str) -> tuple[dict, dict, set]:
        """Forwards of everybody by name, who is absent, and whom a graph can hold."""
        x, weights, ids, gate_up, down = given
        matrices, how = ExpertWeights(gate_up, down), ExpertsConfig()
        ours = experts_triton if self._by_kernels(kind) else experts
        runs = {OURS: lambda: ours(x, matrices, weights, ids, how)}
        if self.device == "cuda" and TORCH not in self.left_out:
            runs[TORCH] = lambda: experts_torch(x, matrices, weights, ids, how)
        E, H, I = down.shape
        if ours is experts_triton and is_few(*ids.shape, E) and not x.requires_grad:
            # What a few tokens would take the way of many.
            shapes = tile_shapes(ids.numel(), E, I, H, x.dtype)
            runs[SORTED] = lambda: sum_of_experts_triton(
                x, matrices, weights, ids, how, dtype=x.dtype, shapes=shapes
            )
        absent = {}
        for name, peer in PEERS.items():
            made = self.left_out.get(name, "it has no backward")
            if name not in self.left_out and (peer.trains or not x.requires_grad):
                try:
                    made = peer.make(given)
                except Exception as error:
                    made = f"absent: {type(error).__name__}: {_first_line(error)}"
            if isinstance(made, str):
                absent[name] = made.removeprefix("absent: ")
            else:
                runs[name] = made
        capturable = {OURS, SORTED, *(name for name, peer in PEERS.items() if peer.capturable)}
        return runs, absent, capturable

    def _forward(self, case: Case) -> Work:
        given, sizes = self._drawn(case, training=False)
        runs, absent, capturable = self._experts(given, case.kind)
        T, H, I, K = (sizes[name] for name in "THIK")
        flops, moved = forward_floor(T, H, I, K, sizes["touched"], given.x.element_size())
        runs = {name: torch.no_grad()(run) for name, run in runs.items()}
        ways = ("eager", "graph") if T <= 512 else ("eager",)
        return Work(
            sizes, runs, lambda: (_expected(given),), flops, moved, ways, capturable, absent
        )

    def _backward(self, case: Case) -> Work:
        given, sizes = self._drawn(case, training=True)
        forwards, absent, _ = self._experts(given, case.kind)
        leaves = (given.x, given.weights, given.gate_up, given.down)
        cotangent = torch.randn_like(given.x, requires_grad=False)
        T, H, I, E, K = (sizes[name] for name in "THIEK")
        flops, moved = backward_floor(T, H, I, E, K, sizes["touched"], given.x.element_size())
        return Work(
            sizes,
            {name: Backward(forward, leaves, cotangent) for name, forward in forwards.items()},
            lambda: _expected_gradients(given, cotangent),
            flops,
            moved,
            ("eager",),
            absent=absent,
        )

    def _memory(self, case: Case) -> Work:
        given, sizes = self._drawn(case, training=True)
        forwards, absent, _ = self._experts(given, case.kind)
        leaves = (given.x, given.weights, given.gate_up, given.down)
        cotangent = torch.randn_like(given.x, requires_grad=False)
        T, H, I, E, K = (sizes[name] for name in "THIEK")
        found = {}
        for name, forward in forwards.items():
            try:
                forward()
                found[name] = {
                    "kept_bytes": kept_bytes(forward, (given.gate_up, given.down)),
                    "peak_bytes": peak_bytes(
                        lambda forward=forward: torch.autograd.grad(forward(), leaves, cotangent),
                        self.device,
                    ),
                }
            except Exception as error:
                self._lost(name, error)
                absent[name] = f"{type(error).__name__}: {_first_line(error)}"
        most = kept_at_most(T, H, I, E, K, given.x.element_size())
        sizes |= {"implementations": found, "absent": absent, "kept_at_most": most}
        return Work(sizes, {}, tuple, 0, 0, ())

    def _fp8(self, case: Case) -> Work:
        return self._packed(case)

    def _w4a16(self, case: Case) -> Work:
        return self._packed(case)

    def _packed(self, case: Case) -> Work:
        given, sizes = self._drawn(case, training=False)
        x, weights, ids, gate_up, down = given
        format, options, rounded = PACKED[case.kind]
        if self.tiny:
            options = {n: 16 if isinstance(each, int) else each for n, each in options.items()}
        packed = quantize_experts(ExpertWeights(gate_up, down), format, **options)
        packed = replace(packed, activation_format=rounded)
        # What is packed is what counts, so the unpacked weights go to everybody.
        plain = [dequantize(each) for each in (packed.gate_up, packed.down)]
        matrices = ExpertWeights(*(each.to(x.dtype) for each in plain))
        prepared, how = prepare(packed), ExpertsConfig()
        ours = experts_quantized_triton if self._by_kernels(case.kind) else experts_quantized
        runs = {
            OURS: lambda: ours(x, prepared, weights, ids, how),
            "unpacked": lambda: experts(x, matrices, weights, ids, how),
        }
        T, H, I, K = (sizes[name] for name in "THIK")
        flops, unpacked = forward_floor(T, H, I, K, sizes["touched"], x.element_size())
        one = sum(packed_bytes(each) for each in (packed.gate_up, packed.down)) // sizes["E"]
        saved = 3 * H * I * x.element_size() - one
        sizes |= {"activations": rounded, "one_expert_bytes": 3 * H * I * x.element_size()}
        unrounded = Given(x, weights, ids, *plain)

        def rows_of(rows: torch.Tensor) -> torch.Tensor:
            # As the kernels have them: hidden rows are of x's dtype before they are rounded.
            narrow = rows.to(x.dtype).float()
            return round_activations(narrow, rounded, packed.down.group_size).to(rows.dtype)

        return Work(
            sizes,
            {name: torch.no_grad()(run) for name, run in runs.items()},
            lambda: (_expected(unrounded, rows_of=rows_of if rounded else None),),
            flops,
            unpacked - sizes["touched"] * saved,
            ("eager", "graph"),
            {OURS, "unpacked"},
            expected_of={"unpacked": lambda: (_expected(unrounded),)} if rounded else {},
        )

    def _grouped_gemm(self, case: Case) -> Work:
        T, H, I, E, K = self._sizes(case)
        _, down = self._matrices(E, H, I)
        down.requires_grad_(False)
        ids = draw_ids(T, E, K, case.routing, self.device)
        touched, most = load(ids, E)
        rows = torch.randn(T * K, I, dtype=self.dtype, device=self.device)
        counts = torch.bincount(ids.flatten(), minlength=E)
        ends = counts.cumsum(0).to(torch.int32)
        shares = counts.tolist()

        def by_expert() -> torch.Tensor:
            parts = rows.split(shares)
            return torch.cat([F.linear(part, one) for part, one in zip(parts, down, strict=True)])

        runs = {
            "loop": by_expert,
            "grouped_mm": lambda: F.grouped_mm(rows, down.transpose(-2, -1), offs=ends),
        }
        absent = {}
        if self._by_kernels(case.kind):
            runs = {OURS: grouped_product(rows, down, ids), **runs}
        else:
            absent[OURS] = "its product alone is a kernel"
        module = imported("moe_ops")
        if isinstance(module, str):
            absent["moe-ops"] = module.removeprefix("absent: ")
        else:
            runs["moe-ops"] = lambda: module.grouped_gemm(rows, down, F.pad(ends, (1, 0)))
        flops, moved = product_floor(T * K, H, I, touched, rows.element_size())
        sizes = {"T": T, "H": H, "I": I, "E": E, "K": K, "touched": touched, "most_rows": most}

        def expected() -> Tensors:
            wide = _wide(T * K * H * I)
            parts = zip(rows.split(shares), down, strict=True)
            return (torch.cat([F.linear(part.to(wide), one.to(wide)) for part, one in parts]),)

        return Work(sizes, runs, expected, flops, moved, ("eager",), absent=absent)

    def _topk(self, case: Case) -> Work:
        E, K = int(case.model.removeprefix("E ")), 8
        T = min(case.T, 12) if self.tiny else case.T
        torch.manual_seed(0)
        # A row's logits stand apart: which are the greatest does not depend on rounding.
        logits = torch.rand(T, E, device=self.device).argsort(-1) * (6 / E)
        config = RoutingConfig(top_k=K, renormalize=True)
        ours = route_triton if self._by_kernels(case.kind) else route

        def by_torch(wide: torch.dtype = torch.float32) -> Tensors:
            weights, ids = logits.to(wide).softmax(-1).topk(K, dim=-1)
            return weights / weights.sum(-1, keepdim=True), ids

        runs = {
            OURS: lambda: ours(logits, config, ids_dtype=torch.int32),
            "torch": by_torch,
        }
        absent, capturable = {}, {OURS, "torch"}
        module = imported("moe_ops")
        if isinstance(module, str):
            absent["moe-ops"] = module.removeprefix("absent: ")
        else:
            runs["moe-ops"] = lambda: module.fused_topk_softmax(logits, K)
        flops, moved = topk_floor(T, E, K)
        return Work(
            {"T": T, "E": E, "K": K},
            runs,
            lambda: by_torch(torch.float64),
            flops,
            moved,
            ("eager", "warm"),
            capturable,
            absent,
            dtype=torch.float32,
        )

    def _align(self, case: Case) -> Work:
        E, K, block = int(case.model.removeprefix("E ")), 8, 64
        T = min(case.T, 12) if self.tiny else case.T
        ids = draw_ids(T, E, K, case.routing, self.device)
        ours = align_triton if self._by_kernels(case.kind) else align
        flops, moved = align_floor(T * K, E, block)
        return Work(
            {"T": T, "E": E, "K": K, "block": block},
            {OURS: lambda: ours(ids, block, E), "torch": lambda: align_torch(ids, block, E)},
            lambda: _expected_alignment(ids, block, E),
            flops,
            moved,
            ("eager", "warm"),
            {OURS, "torch"},
            exact=True,
        )

    def _gather_sum(self, case: Case) -> Work:
        T, H, _, E, K = self._sizes(case)
        torch.manual_seed(0)
        rows = torch.randn(T * K, H, dtype=self.dtype, device=self.device)
        weights = torch.randn(T, K, device=self.device).softmax(-1)
        ids = draw_ids(T, E, K, case.routing, self.device)
        order = ids.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(T * K, device=self.device)
        short = places.int()

        def by_torch() -> torch.Tensor:
            picked = rows.index_select(0, places).view(T, K, H)
            return torch.bmm(weights.to(rows.dtype)[:, None], picked)[:, 0]

        runs = {"torch": by_torch}
        absent = {}
        if self._by_kernels(case.kind):
            runs = {OURS: lambda: sum_places(rows, short, weights, T, K, rows.dtype), **runs}
        else:
            absent[OURS] = "the sum alone is a kernel"

        def expected() -> Tensors:
            wide = _wide(T * K * H)
            picked = rows.to(wide).index_select(0, places).view(T, K, H)
            return ((picked * weights.to(wide)[..., None]).sum(1),)

        flops, moved = gather_floor(T, H, K, rows.element_size())
        return Work(
            {"T": T, "H": H, "E": E, "K": K},
            runs,
            expected,
            flops,
            moved,
            ("eager", "graph"),
            {OURS, "torch"},
            absent,
        )


class DeviceLost(Exception):
    """An implementation left the GPU in a state in which it answers nothing."""

    def __init__(self, name: str, said: str) -> None:
        super().__init__(f"{name}: {said}")
        self.name, self.said = name, said


def answers(device: str) -> bool:
    """Whether the device still computes. After some errors a GPU does not, until the process ends.

    The error does not tell: what ends the capture of a graph has the same class.
    """
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return float(torch.ones(1, device=device)) == 1.0
    except Exception:
        return False


class Backward:
    """A backward over a graph that is kept: the forward runs in the first call, once."""

    def __init__(
        self, forward: Callable[[], torch.Tensor], leaves: Tensors, cotangent: torch.Tensor
    ) -> None:
        self.forward, self.leaves, self.cotangent = forward, leaves, cotangent
        self.out: torch.Tensor | None = None

    def __call__(self) -> Tensors:
        """The output and the gradients of all leaves."""
        if self.out is None:
            self.out = self.forward()
        found = torch.autograd.grad(self.out, self.leaves, self.cotangent, retain_graph=True)
        return self.out.detach(), *found


def grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, ids: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The second product of the experts alone, over a tile table that is there already.

    Args:
        rows: [T·K, I], packed by expert.
        matrices: [E, H, I].
        ids: [T, K].
    """
    E, H, I = matrices.shape
    shape = tile_shapes(rows.shape[0], E, I, H, rows.dtype)
    tiles = tile_table(ids, shape.up.m, E)
    table = (tiles.experts, tiles.first, tiles.rows)
    num_tiles = tiles.experts.numel()
    grid = (num_tiles * -(-H // shape.down.n),)

    def run() -> torch.Tensor:
        out = rows.new_empty(rows.shape[0], H)
        launch(
            experts_down_kernel,
            grid,
            rows,
            matrices,
            rows,
            out,
            *table,
            num_tiles,
            H,
            I,
            *matrices.stride(),
            0,
            0,
            HAS_BIAS=False,
            **compile_options(shape.down, I, rows.dtype),
        )
        return out

    return run


def difference(
    given: Sequence[torch.Tensor], expected: Tensors, dtype: torch.dtype, exact: bool
) -> str | None:
    """What is wrong with a result, or None.

    Args:
        given: what an implementation gave.
        expected: the same in a wider dtype; integers are compared exactly.
        dtype: of the implementation, for the tolerance.
        exact: compare everything exactly.
    """
    if len(given) != len(expected):
        return f"expected {len(expected)} tensors, got {len(given)}"
    for number, (came, right) in enumerate(zip(given, expected, strict=True)):
        if came.shape != right.shape:
            return f"result {number}: expected shape {tuple(right.shape)}, got {tuple(came.shape)}"
        if exact or not right.is_floating_point():
            off = int((came.long() != right.long()).sum())
            if off:
                return f"result {number}: {off} of {right.numel()} values are wrong"
            continue
        tolerance = TOLERANCE[dtype]
        error = (came.to(right.dtype) - right).flatten(0, -2)
        size = right.flatten(0, -2).norm(dim=-1)
        typical = size.square().mean().sqrt().clamp(min=torch.finfo(right.dtype).tiny)
        rows = error.norm(dim=-1)
        whole = float(rows.square().mean().sqrt() / typical)
        worst = float((rows / size.maximum(typical)).max()) if rows.numel() else 0.0
        # A NaN is neither less nor greater.
        if not whole <= tolerance or not worst <= ROW_TOLERANCE * tolerance:
            return (
                f"result {number}: off by {whole:.2g} of its norm (at most {tolerance:g}), and by "
                f"{worst:.2g} in its worst row (at most {ROW_TOLERANCE * tolerance:g})"
            )
    return None


def _wide(operations: int) -> torch.dtype:
    """Float64 where that takes no time; float32 has a thousandth of the error of bfloat16."""
    return torch.float64 if operations < 1e9 else torch.float32


def _expected(
    given: Given,
    wide: torch.dtype | None = None,
    rows_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """A product per expert in a wider dtype, one expert's matrices widened at a time.

    Args:
        given: what everybody gets.
        wide: the dtype, or None for that of `_wide`.
        rows_of: what becomes of the rows before each product, or None: they stay as they are.
    """
    x, weights, ids, gate_up, down = given
    wide = wide or _wide(ids.numel() * down[0].numel())
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for e in range(down.shape[0]):
        tokens, ks = torch.where(ids == e)
        if tokens.numel() == 0:
            continue
        rows = x[tokens].to(wide)
        rows = rows if rows_of is None else rows_of(rows)
        gate, up = F.linear(rows, gate_up[e].to(wide)).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        hidden = hidden if rows_of is None else rows_of(hidden)
        rows = F.linear(hidden, down[e].to(wide))
        out = out.index_add(0, tokens, rows * weights[tokens, ks, None].to(wide))
    return out


def _expected_gradients(given: Given, cotangent: torch.Tensor) -> Tensors:
    wide = _wide(given.ids.numel() * given.down[0].numel())
    leaves = [
        leaf.detach().to(wide).requires_grad_()
        for leaf in (given.x, given.weights, given.gate_up, given.down)
    ]
    x, weights, gate_up, down = leaves
    out = _expected(Given(x, weights, given.ids, gate_up, down), wide)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(wide))


def _expected_alignment(ids: torch.Tensor, block: int, E: int) -> Tensors:
    """By a stable sort, expert by expert."""
    flat = ids.flatten()
    size, num_blocks = aligned_sizes(flat.numel(), E, block)
    sorted_slots = torch.full((size,), flat.numel(), dtype=torch.int64)
    blocks = torch.full((num_blocks,), -1, dtype=torch.int64)
    at = 0
    for e in range(E):
        slots = (flat == e).nonzero()[:, 0].cpu()
        sorted_slots[at : at + slots.numel()] = slots
        end = at + -(-slots.numel() // block) * block
        blocks[at // block : end // block] = e
        at = end
    return tuple(t.to(ids.device) for t in (sorted_slots, blocks, torch.tensor([at])))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def versions() -> dict[str, str]:
    """Of what takes part; a peer that was copied from a repository has none."""
    found = {}
    look_in_folder()
    names = ("torch", "triton", "transformers", "liger-kernel", "moe-ops", "sonic-moe", "numpy")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def about() -> dict[str, Any]:
    """As `record.about`; MOESPEC_COMMIT names the commit where there is no git."""
    named = os.environ.get("MOESPEC_COMMIT")
    if named or shutil.which("git") is None:
        record.commit = lambda: named or ""
    found = record.about()
    if not found["commit"].strip("+"):
        found["commit"] = "unknown"
    return found


def main() -> int:
    """Run the matrix."""
    options = arguments()
    record.RESULTS = options.out
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu_dry_run" if options.dry_run else "gpu_part" if options.only else "gpu"
    until = options.until or time.time() + options.seconds
    bench = Bench(options.device, options.dry_run, options.row_seconds)
    if options.resume:
        log = json.loads((options.out / f"{name}.json").read_text())
    else:
        log = {
            "what": "times of moespec and its peers side by side",
            **about(),
            "versions": versions(),
            "dry_run": options.dry_run,
            "device": device_facts(options.device),
            "peers": {name: peer.made_of for name, peer in PEERS.items()},
            "tolerance": TOLERANCE[bench.dtype],
            "crashed": {},
            "ceilings": {},
            "conformance": [],
            "rows": [],
            "errors": {},
            "not_reached": [],
            "finished": False,
        }
        if options.conformance:
            log["conformance"] = _conformance(options)
            record.write(name, log)
        log["ceilings"] = ceilings(bench.clock, options.device, options.dry_run)
        record.write(name, log)
    bench.ceilings = log["ceilings"]
    bench.left_out = dict(log["crashed"])
    _measure(bench, [c for c in plan() if options.only in (None, c.kind)], log, name, until)
    log |= {"finished": True, "clocks_after": clocks() if options.device == "cuda" else {}}
    path = record.write(name, log)
    print("\n".join(goal_lines(log)))
    print(f"{len(log['rows'])} rows, {len(log['not_reached'])} not reached: {path}")
    return 0


def _conformance(options: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        from gpu_conformance import conformance

        return conformance(options.device, options.conformance)
    except Exception as error:
        # The times need neither hypothesis nor what else the suite is made of.
        return [{"verdict": f"not run: {type(error).__name__}: {_first_line(error)}"}]


def _measure(
    bench: Bench, cases: Sequence[Case], log: dict[str, Any], name: str, until: float
) -> None:
    done = {row["label"] for row in log["rows"]} | set(log["errors"])
    longest = 0.0
    for case in cases:
        if case.label in done:
            continue
        start = time.time()
        if start + longest > until:
            log["not_reached"].append(case.label)
            continue
        try:
            row = {"label": case.label, **bench.row(case)}
        except DeviceLost as lost:
            if lost.name != OURS and lost.name not in log["crashed"]:
                # The row comes again, without it.
                log["crashed"][lost.name] = f"it left the GPU unusable ({case.label}): {lost.said}"
            else:
                log["errors"][case.label] = str(lost)
            record.write(name, log)
            _start_again(until)
        except Exception as error:
            log["errors"][case.label] = f"{type(error).__name__}: {_first_line(error)}"
            if not answers(bench.device):
                record.write(name, log)
                _start_again(until)
        else:
            row["seconds"] = round(time.time() - start, 1)
            log["rows"].append(row)
            print(_line(row), file=sys.stderr, flush=True)
        longest = max(longest, time.time() - start)
        record.write(name, log)


def _start_again(until: float) -> None:
    given = [each for each in sys.argv[1:] if each != "--resume"]
    os.execv(sys.executable, [sys.executable, __file__, *given, "--resume", "--until", str(until)])


def _line(row: Mapping[str, Any]) -> str:
    parts = [row["label"]]
    for way, found in row.get("ways", {}).items():
        times = ", ".join(f"{n} {each['us']:g}" for n, each in found.items())
        parts.append(f"{way} (µs): {times}; floor {row['floor_us']:g}")
    parts += [f"{name} is wrong: {said}" for name, said in row.get("wrong", {}).items()]
    return "\n    ".join(parts)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = sorted({case.kind for case in plan()})
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=480, help="for all, conformance included")
    parser.add_argument("--row-seconds", type=float, default=0.4, help="of timing, per way")
    parser.add_argument("--conformance", type=float, default=0, help="seconds for the suite, first")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--only", choices=kinds, help="rows of one kind, into gpu_part.json")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch sees, found none")
    if options.device == "cpu" and not options.dry_run:
        parser.error("without a GPU there is only --dry-run")
    return options


if __name__ == "__main__":
    sys.exit(main())
