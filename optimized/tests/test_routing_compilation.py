"""The kernels around the router compile to machine code for Hopper, which takes no GPU.

Every switch of theirs is taken in both directions at least once, with the tile sizes of a GPU.
"""

import json
import subprocess
import sys

import pytest

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

from moe_optimized import gating, load_balancing, router
from moe_optimized.gating_backward import route_gradient_kernel

POINTERS = {
    "logits_ptr": "*bf16", "ids_ptr": "*i64", "token_ids_ptr": "*i64", "table_ptr": "*i32",
    "mask_ptr": "*u8", "counts_ptr": "*i64", "given_ptr": "*i64", "real_ptr": "*i32",
    "present_ptr": "*i32", "numbers_ptr": "*i32",
}
FLOATS = ("epsilon", "factor", "rate")
TOOLS = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")


def spilled_bytes(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [os.path.join(TOOLS, "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def compile(kernel, pointers=(), num_warps=4, num_stages=3, aligned=(), **constants):
    names = kernel.arg_names
    kinds = {**POINTERS, **dict(pointers)}

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        return kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    signature = {name: kind(name) for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names) if signature[n][0] == "*" or n in aligned
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    words = made.asm["ptx"].split()
    print(json.dumps({
        "name": kernel.fn.__name__,
        "shared": made.metadata.shared,
        "cubin": len(made.asm["cubin"]),
        "spilled": spilled_bytes(made.asm["cubin"]),
        "tensor_cores": "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"],
        "atomics": sorted({w.split(".")[-1] for w in words if w.startswith(("atom.", "red."))}),
    }))


topk = dict(
    SCORE="softmax", SCORE_FIRST=True, HAS_BIAS=False, HASHED=False, RENORMALIZE=True,
    SQUARES=False, CLAMP=False, GROUPS=1, MEMBERS=128, TOPK_GROUPS=1, SUMMED=1, ZERO_FILL=False,
    TOP_K=8, COUNT=True, PADDED=False, TAKEN=gating._TAKEN, MASKED=gating._MASKED,
    NAN=gating._NAN, BLOCK_T=4, BLOCK_G=1, BLOCK_M=128, BLOCK_K=8,
)
compile(gating.route_topk_kernel, num_warps=1, **topk)
compile(
    gating.route_topk_kernel, {"ids_ptr": "*i32", "logits_ptr": "*fp32"}, num_warps=1,
    **{**topk, "PADDED": True, "HASHED": True, "SCORE": "sqrtsoftplus"},
)
compile(gating.route_topk_kernel, num_warps=1, **{
    **topk, "SCORE": "sigmoid", "HAS_BIAS": True, "GROUPS": 8, "MEMBERS": 32, "TOPK_GROUPS": 4,
    "SUMMED": 2, "BLOCK_T": 2, "BLOCK_G": 8, "BLOCK_M": 32, "COUNT": False,
})

gradient = dict(
    SCORE="softmax", SCORE_FIRST=True, RENORMALIZE=True, SQUARES=False, CLAMP=False, TOP_K=8,
    ROUND_BITS=False, BLOCK_T=4, BLOCK_E=128, BLOCK_K=8,
)
compile(route_gradient_kernel, {"out_ptr": "*bf16"}, num_warps=1, **gradient)
compile(route_gradient_kernel, {"logits_ptr": "*fp32", "ids_ptr": "*i32"}, num_warps=1, **{
    **gradient, "SCORE": "sigmoid", "SQUARES": True, "CLAMP": True, "TOP_K": 6,
})
compile(route_gradient_kernel, {"logits_ptr": "*fp16", "out_ptr": "*fp16"}, num_warps=1, **{
    **gradient, "SCORE": "sqrtsoftplus", "RENORMALIZE": False, "TOP_K": 1, "BLOCK_K": 1,
})
compile(route_gradient_kernel, {"out_ptr": "*bf16"}, **{
    **gradient, "SCORE_FIRST": False, "BLOCK_T": 1, "BLOCK_E": 1024,
})

for tokens, x, out in (
    (8, "bfloat16", "bfloat16"), (4096, "bfloat16", "float32"), (4096, "float32", "float32"),
):
    names = {"float32": "*fp32", "bfloat16": "*bf16"}
    operand = getattr(torch, x)
    tile = router._blocks(tokens, 256, 7168, operand)
    compile(
        router.router_kernel,
        {"x_ptr": names[x], "router_ptr": names[x], "logits_ptr": names[out]},
        num_stages=4, aligned=("depth", "stride_xt", "stride_re"), HAS_BIAS=tokens == 8,
        OPERAND=router._TRITON[operand], ROUND_OPERANDS=False, WIDEN=False, stride_xh=1,
        stride_rh=1, **dict(zip(("BLOCK_T", "BLOCK_E", "BLOCK_K"), tile)),
    )
compile(
    router.router_kernel, HAS_BIAS=True, OPERAND=router._TRITON[torch.float32],
    ROUND_OPERANDS=False, WIDEN=False, BLOCK_T=16, BLOCK_E=16, BLOCK_K=32,
    **dict.fromkeys(("num_tokens", "num_experts", "depth", "stride_xt", "stride_xh"), 1),
    **dict.fromkeys(("stride_re", "stride_rh", "stride_b"), 1),
)

for row, score in enumerate(("softmax", "sigmoid", "sqrtsoftplus")):
    cells = dict(
        SCORE=score, PADDED=row == 1, BLOCK_T=(32, 16, 4)[row], BLOCK_E=(128, 256, 1024)[row],
    )
    compile(
        load_balancing.balance_sums_kernel, {"counts_ptr": "*i32"}, num_warps=8,
        COUNTED=(8, 1, 0)[row], **cells,
    )
    compile(
        load_balancing.balance_gradient_kernel, {"out_ptr": "*bf16"}, num_warps=8,
        ROUND_BITS=False, **cells,
    )
compile(
    load_balancing.balance_pull_kernel, {"counts_ptr": "*i32"}, COUNTED=True, GIVEN=False,
    SINGLE=True, DEVICES=160, MEMBERS=1, BLOCK_C=16, BLOCK_D=256, BLOCK_M=1,
)
for given in ("*i64", "*i32", "*fp32", "*fp64"):
    compile(
        load_balancing.balance_pull_kernel, {"counts_ptr": "*i32", "given_ptr": given},
        COUNTED=False, GIVEN=True, SINGLE=False, DEVICES=5, MEMBERS=32, BLOCK_C=16, BLOCK_D=8,
        BLOCK_M=32,
    )
compile(load_balancing.mean_kernel, BLOCK=256, num_warps=1)
for padded in (False, True):
    tile = dict(PADDED=padded, BLOCK_T=16, BLOCK_E=256)
    compile(load_balancing.z_sums_kernel, num_warps=8, **tile)
    compile(
        load_balancing.z_gradient_kernel, {"out_ptr": "*bf16"}, num_warps=8, ROUND_BITS=False,
        **tile,
    )
for counts in ("*i64", "*fp32"):
    compile(
        load_balancing.update_bias_kernel, {"counts_ptr": counts}, num_warps=1,
        CENTRED=counts == "*i64", BLOCK_E=256,
    )

# Integers that are 1 become constants of the program.
tile = dict(PADDED=True, BLOCK_T=16, BLOCK_E=1, num_experts=1, stride_le=1, stride_m=1)
compile(
    load_balancing.balance_sums_kernel, {"counts_ptr": "*i32"}, SCORE="softmax", COUNTED=1,
    steps=1, length=1, stride_ik=1, **tile,
)
compile(
    load_balancing.balance_pull_kernel, {"counts_ptr": "*i32"}, COUNTED=True, GIVEN=False,
    SINGLE=True, DEVICES=1, MEMBERS=1, BLOCK_C=1, BLOCK_D=1, BLOCK_M=1, chunks=1, steps=1,
)
compile(
    load_balancing.balance_gradient_kernel, SCORE="softmax", ROUND_BITS=False, length=1,
    num_tokens=1, **tile,
)
compile(load_balancing.mean_kernel, BLOCK=1, num_sums=1, steps=1)
compile(load_balancing.z_sums_kernel, steps=1, num_tokens=1, **tile)
compile(load_balancing.z_gradient_kernel, ROUND_BITS=False, num_tokens=1, **tile)
compile(
    load_balancing.update_bias_kernel, CENTRED=True, BLOCK_E=1, num_experts=1, stride_b=1,
    stride_c=1,
)
compile(route_gradient_kernel, num_tokens=1, num_experts=1, stride_le=1, stride_gk=1, **{
    **gradient, "TOP_K": 1, "BLOCK_T": 1, "BLOCK_E": 1, "BLOCK_K": 1,
})
"""


@pytest.mark.triton
def test_every_kernel_around_the_router_compiles_for_hopper(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == {
        "router_kernel",
        "route_topk_kernel",
        "route_gradient_kernel",
        "balance_sums_kernel",
        "balance_pull_kernel",
        "balance_gradient_kernel",
        "mean_kernel",
        "z_sums_kernel",
        "z_gradient_kernel",
        "update_bias_kernel",
    }
    for kernel in compiled:
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= SHARED_MEMORY
        assert kernel["spilled"] == 0, kernel
    # Tensor cores multiply no more than the first ten bits of a float32's fraction.
    products = [kernel["tensor_cores"] for kernel in compiled if kernel["name"] == "router_kernel"]
    assert products == [True, True, False, False]
    # Sums of floats would depend on who comes first; those of integers do not.
    atomics = [(kernel["name"], kernel["atomics"]) for kernel in compiled if kernel["atomics"]]
    assert atomics == 2 * [("route_topk_kernel", ["u64"])]
