"""The router's product: logits of every expert for every token.

Stages, and what each gains:

1. `router_logits`: torch's product of widened operands. This is what a CPU user gets.
2. `router_logits_triton`: one kernel that rounds its operands as it loads them. No widened copy of
   x is written, and narrow operands are multiplied by the tensor cores: their products are exact in
   float32, in which they are added up.

Both round x, router and bias to the router's dtype before, and the logits after, the product; the
sum over H is in float32 (float64): a sum in bfloat16 changes experts.

Dimension key: T tokens, H hidden size, E experts.
"""

import torch
import torch.nn.functional as F

from moe_optimized.dispatch import without_autocast
from moe_optimized.interpreter import (
    INTERPRETED,
    dot,
    jit,
    launch,
    narrow,
    needs_widening,
    power_of_two,
    tl,
)


def router_logits(
    x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The product in torch operations.

    Args:
        x: [T, H], any float dtype.
        router: [E, H], any float dtype.
        bias: [E], any float dtype, or None.
        dtype: the router's.

    Returns:
        [T, E], `dtype`.

    >>> x, router = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> router_logits(x, router, torch.ones(1), torch.float32).item()
    12.0
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    # Autocast would round both factors to a narrower dtype, and other experts would be chosen.
    with without_autocast(x):
        return F.linear(
            x.to(dtype).to(wide),
            router.to(dtype).to(wide),
            None if bias is None else bias.to(dtype).to(wide),
        ).to(dtype)


def router_logits_triton(
    x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `router_logits`, in one Triton kernel and below autograd; no float64.

    >>> x, router = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> router_logits_triton(x, router, torch.ones(1), torch.float32).item()
    12.0
    """
    (T, H), E = x.shape, router.shape[0]
    operands = {_narrower(x.dtype, dtype), _narrower(router.dtype, dtype)}
    operand = operands.pop() if len(operands) == 1 else torch.float32
    logits = x.new_empty((T, E), dtype=dtype)
    block_t, block_e, block_k = _blocks(T, E, H, operand)
    launch(
        router_kernel,
        (-(-T // block_t), -(-E // block_e)),
        x,
        router,
        router if bias is None else bias,
        logits,
        T,
        E,
        H,
        *x.stride(),
        *router.stride(),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        OPERAND=_TRITON[operand],
        ROUND_OPERANDS=needs_widening(dtype),
        WIDEN=needs_widening(operand),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=4,
    )
    return logits


_TRITON = {
    torch.float32: getattr(tl, "float32", None),
    torch.bfloat16: getattr(tl, "bfloat16", None),
    torch.float16: getattr(tl, "float16", None),
}


def _narrower(dtype: torch.dtype, router: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds what is left of `dtype` when it is rounded to the router's."""
    return dtype if router is torch.float32 else router


def _blocks(T: int, E: int, H: int, operand: torch.dtype) -> tuple[int, int, int]:
    if INTERPRETED:
        return tuple(min(power_of_two(size, least=16), 256) for size in (T, E, H))
    # A few tokens are spread over as many programs as there are experts to read.
    if T <= 64:
        return 16, 16, 128
    if operand is torch.float32:
        return 32, min(power_of_two(E, least=16), 64), 32
    return 64, min(power_of_two(E, least=16), 128), 64


@jit
def router_kernel(
    x_ptr,
    router_ptr,
    bias_ptr,
    logits_ptr,
    num_tokens,
    num_experts,
    depth,
    stride_xt,
    stride_xh,
    stride_re,
    stride_rh,
    stride_b,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND_OPERANDS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of BLOCK_T tokens for BLOCK_E experts."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_tokens = (t < num_tokens)[:, None]
    in_experts = e < num_experts
    x_block = x_ptr + t[:, None] * stride_xt + k[None, :] * stride_xh
    router_block = router_ptr + e[None, :] * stride_re + k[:, None] * stride_rh
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, depth, BLOCK_K):
        here = start + k < depth
        x = tl.load(x_block, mask=in_tokens & here[None, :], other=0.0).to(tl.float32)
        router = tl.load(router_block, mask=here[:, None] & in_experts[None, :], other=0.0)
        x = narrow(x, dtype, ROUND_OPERANDS).to(OPERAND)
        router = narrow(router.to(tl.float32), dtype, ROUND_OPERANDS).to(OPERAND)
        total = dot(x, router, total, WIDEN)
        x_block += BLOCK_K * stride_xh
        router_block += BLOCK_K * stride_rh
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e * stride_b, mask=in_experts, other=0.0).to(tl.float32)
        total += narrow(bias, dtype, ROUND_OPERANDS).to(tl.float32)[None, :]
    out = logits_ptr + t[:, None] * num_experts + e[None, :]
    tl.store(out, narrow(total, dtype, ROUND_OPERANDS), mask=in_tokens & in_experts[None, :])
