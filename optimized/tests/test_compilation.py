"""Every kernel compiles to machine code for Hopper, which takes no GPU.

The interpreter lets through much that the compiler refuses: Python habits, shapes that are no
powers of two, types that change in a loop. This is what a machine without a GPU can check of it.
"""

import json
import subprocess
import sys

import pytest

BACKWARD = (
    "experts_bounds_kernel",
    "experts_d_hidden_kernel",
    "experts_d_weights_kernel",
    "experts_d_matrices_kernel",
    "experts_d_biases_kernel",
    "experts_d_rows_kernel",
)

FEW_BYTES = 64
"""Of a thread's registers that may be spilled to memory: more costs time at every tile."""

SHARED_MEMORY = 227 * 1024
"""What a program may use on an H100 or H200, in bytes."""

PROGRAM = r"""
import json
import os
import subprocess
import tempfile
import warnings

import torch

warnings.simplefilter("ignore")
torch.cuda.is_available = lambda: True  # Kernels are decorated for the compiler.

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_optimized import (
    alignment, dispatch, experts_backward, experts_decode, experts_triton, gating,
)

POINTERS = {
    "logits_ptr": "*bf16", "table_ptr": "*i32", "token_ids_ptr": "*i64", "ids_ptr": "*i64",
    "bias_ptr": "*fp32", "weights_ptr": "*fp32", "epsilon": "fp32", "factor": "fp32",
    "alpha": "fp32", "limit": "fp32", "dots_ptr": "*fp32",
}


TOOLS = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")


def spilled_bytes(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [os.path.join(TOOLS, "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def compile(kernel, dtype=None, num_warps=4, num_stages=3, measured=True, **constants):
    names = kernel.arg_names
    def kind(name):
        if name in constants:
            return "constexpr"
        if name == "hidden_ptr" and kernel.fn.__name__.startswith("decode"):
            return "*fp32"
        if dtype and name.split("_ptr")[0] in (
            "x", "gate_up", "down", "hidden", "pre", "packed", "rows", "out", "grad", "d_pre",
            "activated", "left", "right",
        ):
            return dtype
        return POINTERS.get(name, "*i32" if name.endswith("_ptr") else "i32")
    signature = {name: kind(name) for name in names}
    # As at run time: pointers, sizes and strides are multiples of 16.
    aligned = [
        i for i, name in enumerate(names)
        if signature[name][0] == "*"
        or signature[name] == "i32"
        and (name[:6] == "stride" or name in ("height", "width", "depth"))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    product = measured and "BLOCK_K" in constants and kernel.fn.__name__.startswith("experts")
    decode = measured and kernel.fn.__name__.startswith("decode")
    step = 0
    if product:
        # One step's operands; the first product has two right ones.
        columns = constants["BLOCK_N"] * (2 if "up" in kernel.fn.__name__ else 1)
        step = (constants["BLOCK_M"] + columns) * constants["BLOCK_K"]
        step *= 2 if dtype == "*bf16" else 4
    if decode:
        num_stages = constants["STAGES"]
        rows = constants["BLOCK_N"] * (constants.get("BLOCK_C") or 2)
        step = rows * constants["BLOCK_K"] * 2
    print(json.dumps({
        "name": kernel.fn.__name__,
        "shared": made.metadata.shared,
        "cubin": len(made.asm["cubin"]),
        "tensor_cores": "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"],
        "asynchronous": "cp.async" in made.asm["ptx"],
        "stages": num_stages if product or decode else 0,
        "step": step,
        "spilled": spilled_bytes(made.asm["cubin"]),
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
half = experts_triton._HALF[0], experts_triton._HALF[-1]
for dtype, table in (("*bf16", half), ("*fp32", experts_triton._SINGLE[-1:])):
    for row, (_, shapes) in enumerate(table):
        first, even, activation = row == 0, row % 2 == 1, next(activations)
        def rows_of(tile):
            return dict(
                num_warps=tile.num_warps, num_stages=tile.num_stages, GROUP_M=tile.group_m,
                BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, WIDEN=False, EVEN_K=even,
            )
        compile(
            experts_triton.experts_up_kernel, dtype, stride_xh=1, stride_gh=1, GATED=True,
            WEIGH=first, HAS_BIAS=first, ACTIVATION=activation, KEEP=True, ROUND_KEPT=False,
            **rows_of(shapes.up),
        )
        compile(
            experts_triton.experts_down_kernel, dtype, stride_di=1, HAS_BIAS=first,
            **rows_of(shapes.down),
        )
        compile(
            experts_backward.experts_d_hidden_kernel, dtype, stride_gh=1, stride_di=1,
            ACTIVATION=activation, GATED=True, WEIGH=True, D_PRE=True, ACTIVATED=True, DOTS=True,
            **rows_of(shapes.d_hidden),
        )
        compile(
            experts_backward.experts_d_rows_kernel, dtype, stride_gh=1, stride_xh=1, WEIGH=first,
            ROWS=True, DOTS=first, **rows_of(shapes.d_rows),
        )
        tile = rows_of(shapes.d_matrices)
        del tile["EVEN_K"]
        for gather_left in (False, True):
            compile(
                experts_backward.experts_d_matrices_kernel, dtype, stride_lm=1, stride_rn=1,
                GATHER_LEFT=gather_left, WEIGH=first and not gather_left, ROUND_BITS=False, **tile,
            )
compile(
    experts_backward.experts_d_weights_kernel, "*bf16", stride_gh=1, stride_bh=1, HAS_BIAS=True,
    BLOCK_M=128, BLOCK_H=64,
)
compile(experts_backward.experts_bounds_kernel, BLOCK=256)
compile(
    experts_backward.experts_d_biases_kernel, "*bf16", stride_rn=1, GATHER=True, WEIGH=True,
    ROUND_BITS=False, BLOCK_S=64, BLOCK_N=64,
)
decode = dict(HAS_BIAS=False, HAS_MAP=False)
compile(
    experts_decode.decode_up_kernel, "*bf16", stride_xh=1, stride_gh=1, ACTIVATION="silu",
    GATED=True, WEIGH=False, **decode, **experts_decode._up_blocks(768, 2048),
)
for top_k in (1, 8):
    compile(
        experts_decode.decode_down_kernel, "*bf16", stride_di=1, WEIGH=True, ROUND_BITS=False,
        **decode, **experts_decode._down_blocks(top_k, 2048, 768),
    )

# Triton takes a size or stride of 1 for a constant, which has no dtype and no methods.
tile = dict(num_warps=1, GROUP_M=1, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, WIDEN=False, EVEN_K=False)
for kernel, flags in (
    (experts_triton.experts_up_kernel, dict(
        ACTIVATION="silu", GATED=True, WEIGH=True, HAS_BIAS=True, KEEP=True, ROUND_KEPT=False,
        **tile,
    )),
    (experts_triton.experts_down_kernel, dict(HAS_BIAS=True, **tile)),
    (experts_backward.experts_d_hidden_kernel, dict(
        ACTIVATION="relu", GATED=False, WEIGH=True, D_PRE=True, ACTIVATED=True, DOTS=True, **tile,
    )),
    (experts_backward.experts_d_rows_kernel, dict(WEIGH=True, ROWS=True, DOTS=True, **tile)),
    (experts_backward.experts_d_matrices_kernel, dict(
        GATHER_LEFT=True, WEIGH=True, ROUND_BITS=False,
        **{name: value for name, value in tile.items() if name != "EVEN_K"},
    )),
    (experts_backward.experts_d_weights_kernel, dict(HAS_BIAS=True, BLOCK_M=16, BLOCK_H=64)),
    (experts_backward.experts_bounds_kernel, dict(BLOCK=256)),
    (experts_backward.experts_d_biases_kernel, dict(
        GATHER=True, WEIGH=True, ROUND_BITS=False, BLOCK_S=64, BLOCK_N=64,
    )),
    (experts_decode.decode_up_kernel, dict(
        ACTIVATION="swigluoai", GATED=True, WEIGH=True, HAS_BIAS=True, HAS_MAP=True, STAGES=1,
        EVEN_K=False, BLOCK_N=16, BLOCK_K=16,
    )),
    (experts_decode.decode_down_kernel, dict(
        HAS_BIAS=True, HAS_MAP=True, WEIGH=False, ROUND_BITS=False, EVEN_K=False, STAGES=1,
        BLOCK_C=2, BLOCK_N=16, BLOCK_K=16,
    )),
):
    sizes = [n for n in kernel.arg_names if n.islower() and n[-4:] != "_ptr" and n not in POINTERS]
    compile(kernel, "*bf16", measured=False, **dict.fromkeys(sizes, 1), **flags)
"""


@pytest.mark.triton
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
        "decode_up_kernel",
        "decode_down_kernel",
        *BACKWARD,
    }
    products = []
    for kernel in compiled:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED_MEMORY
        if kernel["stages"]:
            products.append(kernel)
            # Every step's operands in flight: what is not pipelined holds a single step.
            assert kernel["asynchronous"], "loads are not pipelined"
            assert kernel["shared"] >= (kernel["stages"] - 1) * kernel["step"], kernel
            assert kernel["spilled"] <= FEW_BYTES, kernel
    assert sum(kernel["tensor_cores"] for kernel in products) == 12
    assert len(products) == 21
