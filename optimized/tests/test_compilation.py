"""Every kernel compiles to machine code for Hopper, which takes no GPU.

The interpreter lets through much that the compiler refuses: Python habits, shapes that are no
powers of two, types that change in a loop. This is what a machine without a GPU can check of it.
"""

import json
import subprocess
import sys

import pytest
from moe_optimized.interpreter import HAS_TRITON

SHARED_MEMORY = 227 * 1024
"""What a program may use on an H100 or H200, in bytes."""

PROGRAM = r"""
import json
import warnings

import torch

warnings.simplefilter("ignore")
torch.cuda.is_available = lambda: True  # Kernels are decorated for the compiler.

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_optimized import alignment, dispatch, experts, gating

POINTERS = {
    "logits_ptr": "*bf16", "table_ptr": "*i32", "token_ids_ptr": "*i64", "ids_ptr": "*i64",
    "bias_ptr": "*fp32", "weights_ptr": "*fp32", "epsilon": "fp32", "factor": "fp32",
    "alpha": "fp32", "limit": "fp32",
}


def compile(kernel, dtype=None, num_warps=4, num_stages=3, **constants):
    names = kernel.arg_names
    def kind(name):
        if name in constants:
            return "constexpr"
        if dtype and name.split("_ptr")[0] in (
            "x", "gate_up", "down", "hidden", "packed", "rows", "out"
        ):
            return dtype
        return POINTERS.get(name, "*i32" if name.endswith("_ptr") else "i32")
    signature = {name: kind(name) for name in names}
    # As at run time: pointers, sizes and strides are multiples of 16.
    aligned = [
        i for i, name in enumerate(names)
        if signature[name][0] == "*"
        or signature[name] == "i32" and (name[:6] == "stride" or name in ("width", "depth"))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(json.dumps({
        "name": kernel.fn.__name__,
        "shared": made.metadata.shared,
        "cubin": len(made.asm["cubin"]),
        "tensor_cores": "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"],
        "asynchronous": "cp.async" in made.asm["ptx"],
    }))


routing = dict(
    SCORE="softmax", SCORE_FIRST=True, HAS_BIAS=False, HASHED=False, RENORMALIZE=True,
    SQUARES=False, CLAMP=False, GROUPS=1, MEMBERS=160, TOPK_GROUPS=1, SUMMED=1, ZERO_FILL=False,
    TOP_K=6, TAKEN=gating._TAKEN, MASKED=gating._MASKED, NAN=gating._NAN, BLOCK_T=1, BLOCK_G=1,
    BLOCK_M=256, BLOCK_K=8,
)
compile(gating.route_topk_kernel, num_warps=1, **routing)
compile(gating.route_topk_kernel, num_warps=1, **{**routing, "HASHED": True})
compile(gating.route_topk_kernel, num_warps=1, **{
    **routing, "SCORE": "sqrtsoftplus", "HAS_BIAS": True, "SQUARES": True, "CLAMP": True,
    "GROUPS": 5, "MEMBERS": 32, "TOPK_GROUPS": 3, "SUMMED": 2, "BLOCK_G": 8, "BLOCK_M": 32,
    "SCORE_FIRST": False, "BLOCK_T": 2,
})
common = dict(MAP_IDS=True, BINS=256, BLOCK_S=4096)
compile(alignment.align_count_kernel, **common)
compile(alignment.align_scan_kernel, BINS=256, BLOCK_C=32, BLOCK_E=16)
for chunked in (False, True):
    compile(
        alignment.align_place_kernel, MAP_BLOCKS=chunked, CHUNKED=chunked, PADDED=chunked,
        BLOCK_E=1, BLOCK_J=64, BLOCK_B=64, BLOCK_F=1024, **common,
    )
compile(alignment.align_batched_kernel, BINS=64, BLOCK_E=1, BLOCK_R=1024)
compile(
    dispatch.combine_rows_kernel, "*bf16", WEIGH=True, ROUND_BITS=False, BLOCK_T=1, BLOCK_H=1024
)
activations = iter(("gelu", "swigluoai", "relu2"))
# The smallest and the greatest tiles.
half = experts._HALF[0], experts._HALF[-1]
for dtype, table in (("*bf16", half), ("*fp32", experts._SINGLE[-1:])):
    for row, (_, up, down) in enumerate(table):
        def shape(tile):
            return dict(
                num_warps=tile.num_warps, num_stages=tile.num_stages, GROUP_M=tile.group_m,
                BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, WIDEN=False,
                HAS_BIAS=row % 2 == 0, EVEN_K=row % 2 == 1,
            )
        compile(
            experts.experts_up_kernel, dtype, stride_xh=1, stride_gh=1, GATED=True, WEIGH=row == 0,
            ACTIVATION=next(activations), **shape(up),
        )
        compile(experts.experts_down_kernel, dtype, stride_di=1, **shape(down))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_every_kernel_compiles_for_hopper(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == {
        "route_topk_kernel",
        "align_count_kernel",
        "align_scan_kernel",
        "align_place_kernel",
        "align_batched_kernel",
        "combine_rows_kernel",
        "experts_up_kernel",
        "experts_down_kernel",
    }
    for kernel in compiled:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED_MEMORY
        if kernel["name"].startswith("experts"):
            assert kernel["asynchronous"], "loads are not pipelined"
    products = [kernel for kernel in compiled if kernel["name"].startswith("experts")]
    assert sum(kernel["tensor_cores"] for kernel in products) == 4
