"""The kernels for packed experts compile to machine code for Hopper, which takes no GPU.

As in `test_compilation`, whose `compile` is used here: what the interpreter lets through, and
whether products use tensor cores, loads are asynchronous and registers suffice.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

OTHERS = runpy.run_path(str(Path(__file__).with_name("test_compilation.py")))

PROGRAM = (
    OTHERS["PROGRAM"].split("\nrouting = ")[0]
    + r"""
from moe_optimized import quantized_dequantize, quantized_kernels as kernels

SMALL, GREAT = kernels._TABLE[0][1], kernels._TABLE[-1][1]
ROUNDED = kernels._ROUNDED[-1][1]


def compile_products(shapes, x, scales, stride=1, **flags):
    POINTERS.update(
        x_ptr=x, hidden_ptr=x, out_ptr="*bf16", packed_ptr="*u8", zeros_ptr="*u8",
        scales_ptr=scales, row_scales_ptr="*fp32", bias_ptr="*bf16",
    )
    def tile(shape):
        return dict(
            num_warps=shape.num_warps, num_stages=shape.num_stages, GROUP_M=shape.group_m,
            BLOCK_M=shape.m, BLOCK_N=shape.n, WIDEN=False, MEND_NAN=False, ROUND_BITS=False,
            **flags,
        )
    if x == "*fp8e4nv":
        POINTERS["hidden_ptr"] = "*bf16"
    compile(
        kernels.quantized_up_kernel, stride_xh=1, ACTIVATION="swigluoai", GATED=True, WEIGH=True,
        HAS_BIAS=True, **tile(shapes.up),
    )
    POINTERS["hidden_ptr"] = x
    compile(kernels.quantized_down_kernel, stride_hi=1, HAS_BIAS=True, **tile(shapes.down))


compile_products(
    SMALL, "*bf16", "*fp16", CODES="int4", HAS_ZEROS=True, SORTED=False, JOINT=True,
    ROUNDED=False, EVEN_K=True, BLOCK_K=128,
)
compile_products(
    GREAT, "*bf16", "*u8", CODES="e2m1", HAS_ZEROS=False, SORTED=False, JOINT=False,
    ROUNDED=False, EVEN_K=True, BLOCK_K=64,
)
compile_products(
    GREAT, "*fp16", "*fp16", CODES="int8", HAS_ZEROS=False, SORTED=True, JOINT=True,
    ROUNDED=False, EVEN_K=False, BLOCK_K=128,
)
compile_products(
    ROUNDED, "*fp8e4nv", "*fp32", CODES="e4m3", HAS_ZEROS=False, SORTED=False, JOINT=True,
    ROUNDED=True, EVEN_K=True, BLOCK_K=128,
)
POINTERS.update(x_ptr="*bf16", rows_ptr="*fp8e4nv", scales_ptr="*fp32", out_ptr="*fp32")
compile(kernels.round_rows_kernel, ROUND_BITS=False, BLOCK_S=1, BLOCK_B=128)
compile(
    quantized_dequantize.dequantize_kernel, CODES="int4", INLINE=0, HAS_ZEROS=True, HAS_G_IDX=True,
    HAS_GLOBAL=False, MEND_NAN=False, BLOCK_O=1, BLOCK_D=1024,
)

# Triton takes a size or stride of 1 for a constant, which has no dtype and no methods.
POINTERS.update(x_ptr="*bf16", hidden_ptr="*bf16", out_ptr="*bf16")
tile = dict(
    num_warps=1, GROUP_M=1, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, WIDEN=False, MEND_NAN=False,
    ROUND_BITS=False, EVEN_K=False, CODES="int4", HAS_ZEROS=False, SORTED=True, JOINT=False,
    ROUNDED=False, HAS_BIAS=True,
)
for kernel, flags in (
    (kernels.quantized_up_kernel, dict(ACTIVATION="relu", GATED=False, WEIGH=True, **tile)),
    (kernels.quantized_down_kernel, tile),
    (kernels.round_rows_kernel, dict(ROUND_BITS=False, BLOCK_S=1, BLOCK_B=16)),
    (quantized_dequantize.dequantize_kernel, dict(
        CODES="e2m1", INLINE=0, HAS_ZEROS=False, HAS_G_IDX=False, HAS_GLOBAL=True, MEND_NAN=False,
        BLOCK_O=1, BLOCK_D=16,
    )),
):
    if flags.get("HAS_GLOBAL"):
        POINTERS.update(scales_ptr="*u8")
    sizes = [n for n in kernel.arg_names if n.islower() and n[-4:] != "_ptr" and n not in POINTERS]
    compile(kernel, **dict.fromkeys(sizes, 1), **flags)
"""
)


@pytest.mark.triton
def test_every_kernel_for_packed_experts_compiles_for_hopper(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == {
        "quantized_up_kernel",
        "quantized_down_kernel",
        "round_rows_kernel",
        "dequantize_kernel",
    }
    for kernel in compiled:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= OTHERS["SHARED_MEMORY"]
    products = compiled[:8]
    for kernel in products:
        assert kernel["name"].startswith("quantized")
        assert kernel["tensor_cores"]
        assert kernel["asynchronous"], "loads are not pipelined"
        assert kernel["spilled"] <= OTHERS["FEW_BYTES"], kernel
