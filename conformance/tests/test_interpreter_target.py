"""What targets change in Triton's interpreter gives what the interpreter gives without it."""

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

KERNELS = """
import sys
import torch
from moe_conformance.targets.interpreter import interpret_without_gpu

change = sys.argv[1] == "changed"
if change:
    interpret_without_gpu()
else:
    import os
    os.environ["TRITON_INTERPRET"] = "1"
import triton
import triton.language as tl


@triton.jit
def affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def first_largest(v, i, w, j):
    left = (v > w) | ((v == w) & (i < j))
    return tl.where(left, v, w), tl.where(left, i, j)


@triton.jit
def branching(a, b):
    return a if a > b else b


@triton.jit
def kernel(x, y, out, N: tl.constexpr, M: tl.constexpr):
    at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    for axis in tl.static_range(2):
        p, q = tl.associative_scan((a, b), axis, affine, reverse=axis == 1)
        tl.store(out + at, p)
        tl.store(out + N * M + at, q)
        out += 2 * N * M
    v, i = tl.reduce((a, b), 1, first_largest)
    tl.store(out + tl.arange(0, N), v)
    tl.store(out + N + tl.arange(0, N), i)
    out += 2 * N
    v, i = tl.reduce((a, b), 0, first_largest, keep_dims=True)
    tl.store(out + tl.arange(0, M)[None, :], v)
    tl.store(out + M + tl.arange(0, M)[None, :], i)
    out += 2 * M
    tl.store(out + tl.arange(0, N), tl.reduce(a, 1, branching))
    out += N
    tl.store(out + tl.arange(0, N * M), tl.sort(tl.reshape(a, [N * M])))
    out += N * M
    tl.store(out + tl.arange(0, N), tl.argmax(a.to(tl.float32), axis=1))


torch.manual_seed(0)
x, y = torch.randint(-3, 4, (8, 4)), torch.randint(0, 50, (8, 4))
out = torch.zeros(300, dtype=torch.int64)
kernel[(1,)](x, y, out, N=8, M=4)
print(out.tolist())
"""

TUNED = """
import torch
import torch._inductor  # imports triton, to compile
from moe_conformance.targets.interpreter import interpret_without_gpu

assert interpret_without_gpu()
import triton
import triton.language as tl


@triton.autotune([triton.Config({"B": 4}), triton.Config({"B": 8})], key=["n"])
@triton.jit
def block(out, n, B: tl.constexpr):
    tl.store(out, tl.sum(tl.arange(0, B)))


@triton.jit
def largest(x, out):
    tl.store(out, tl.argmax(tl.load(x + tl.arange(0, 4)), axis=0))


out = torch.zeros(2, dtype=torch.int32)
block[(1,)](out, 1)
largest[(1,)](torch.full((4,), torch.nan), out[1:])
print(out.tolist())
"""

EARLY = """
import json
from moe_conformance.targets.interpreter import interpret_without_gpu

interpret_without_gpu("not_imported")
import os
del os.environ["TRITON_INTERPRET"]
try:
    interpret_without_gpu("json")
except ImportError as error:
    print(error)
"""


@pytest.fixture
def run(tmp_path):
    """Run a program from a file, because Triton reads the source of a kernel; gives its output."""

    def finish(program, *arguments):
        file = tmp_path / "program.py"
        file.write_text(program)
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", str(file), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return finish


def test_reductions_and_scans_are_what_they_were(run):
    answers = [run(KERNELS, how) for how in ("changed", "unchanged")]
    assert answers[0] == answers[1]
    assert len(set(eval(answers[0]))) > 20


def test_the_first_configuration_is_taken_and_nan_is_no_error(run):
    first, place = eval(run(TUNED))
    assert first == 6
    assert 0 <= place < 4


def test_a_package_that_was_imported_before_is_named(run):
    assert run(EARLY) == (
        "json: expected TRITON_INTERPRET=1 before it is first imported, as this machine has no "
        "GPU, got a process that imported it without\n"
    )
