r"""Backends: which way the experts are computed, in what memory, and who weighs their outputs.

Three routes lead to the same sum over a token's experts. *fused*: the rows are sorted by expert and
one grouped product takes all of them. *gather*: every pair fetches its expert's matrices, and the
pairs are a batch. *loop*: expert after expert, each on its own rows. `routes` holds them in plain
PyTorch; `choose_backend` says which one suits a device.

Between dispatch and combine the rows have one of two activation formats: *standard*, a row for each
of T · K pairs, or *batched*, C rows for each expert. Who weighs and adds up goes with the format
(`DUTIES`), and each is done once: whoever gets rows must know whether they are weighed.

Dimension key: T tokens, K experts per token, E experts, H hidden size, I intermediate size, J = 2I
(I without a gate), C rows of a batched expert (capacity).
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from moe_reference.checks import FLOATS, check_count
from moe_reference.config import WeightOn

Device = Literal["cuda", "rocm", "npu", "mps", "cpu"]
Route = Literal["fused", "gather", "loop"]
Quantization = Literal["uint4", "uint4b8", "uint8b128", "e4m3", "mxfp4", "nvfp4", "Q8_0", "Q4_K"]
ActivationFormat = Literal["standard", "batched"]

GROUPED_KERNELS = {
    "cuda": ("torch.nn.functional.grouped_mm", (torch.bfloat16,)),
    "rocm": ("torch.nn.functional.grouped_mm", (torch.bfloat16,)),
    "npu": ("torch_npu.npu_grouped_matmul", (torch.bfloat16, torch.float16, torch.float32)),
}
"""Where there is a kernel for all experts at once, and for which dtypes. `grouped_mm` takes further
dtypes and devices, but is a loop inside."""

GGUF_GROUPED_FROM = 32
"""Tokens from which on mistral.rs takes its grouped GGUF kernels instead of the indexed ones."""


@dataclass(frozen=True)
class Duty:
    """Who multiplies by the weights, and who adds up the K outputs of a token.

    Attributes:
        multiplies: `experts` or `caller`.
        where: on which rows: before the first product, or after the second.
        adds_up: `experts` or `caller`.
    """

    multiplies: Literal["experts", "caller"]
    where: Literal["before", "after"]
    adds_up: Literal["experts", "caller"]


DUTIES: dict[tuple[ActivationFormat, WeightOn, bool], Duty] = {
    ("standard", "output", False): Duty("experts", "after", "experts"),
    ("standard", "input", False): Duty("experts", "before", "experts"),
    ("standard", "output", True): Duty("caller", "after", "caller"),
    ("standard", "input", True): Duty("experts", "before", "caller"),
    ("batched", "output", True): Duty("caller", "after", "caller"),
    ("batched", "input", True): Duty("caller", "before", "caller"),
}
"""By format, `weight_on`, and whether the experts delegate the sum to their caller, which in the
batched format they always do: they know nothing of tokens. (Of DeepEP's kernels, the low-latency
combine multiplies, and the normal one wants it done before: DeepEP #112.)"""


@dataclass(frozen=True)
class Choice:
    """A route, and why.

    Attributes:
        route: fused, gather or loop.
        operator: what computes the products.
        reason: in words; says so where the route was not run.
        verified: whether the tests of this module run the route on such a device.
    """

    route: Route
    operator: str
    reason: str
    verified: bool


def choose_backend(
    device: Device,
    dtype: torch.dtype,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    quantization: Quantization | None = None,
    batch_invariant: bool = False,
) -> Choice:
    """How experts are best computed. Depends on nothing but the arguments.

    Fused where one kernel takes all experts. Elsewhere gather for T · K of at most E: it copies the
    matrices of one expert for each pair, which then is no more than all weights once. Loop for the
    rest. Packed weights go where published kernels read them, or are unpacked in a loop.

    Args:
        device: where the tensors are; `device_kind` tells CUDA from ROCm.
        dtype: of x, a float dtype.
        num_tokens: T.
        top_k: K.
        num_experts: E, those of this device.
        quantization: the format of the weights, or None.
        batch_invariant: the same route for every T, so that the route does not make a token's
            result depend on how many others there are.

    Raises:
        TypeError: not a float dtype, or not an int.
        ValueError: an unknown device or format, or a dtype that the device does not have.

    Source: hanzo-engine (mistral.rs) for the preference; pytorch issues 162059, 159547 and 161366
    for `grouped_mm`; torch_npu 7.0.0; vLLM's Marlin experts.

    >>> choose_backend("cuda", torch.bfloat16, num_tokens=1, top_k=8, num_experts=256).route
    'fused'
    >>> choose_backend("cpu", torch.float32, num_tokens=100, top_k=2, num_experts=8).route
    'loop'
    """
    _check_choice("device", device, get_args(Device))
    _check_choice("quantization", quantization, (None, *get_args(Quantization)))
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected a float dtype, got {dtype}")
    if device == "mps" and dtype == torch.float64:
        raise ValueError(f"dtype: expected one that MPS has, got {dtype}")
    for name, count in (("num_tokens", num_tokens), ("top_k", top_k), ("num_experts", num_experts)):
        check_count(name, count)

    if quantization is None:
        few = None if batch_invariant else num_tokens * top_k <= num_experts
        route, operator, reason = _plain_route(device, dtype, few)
    else:
        many = not batch_invariant and num_tokens >= GGUF_GROUPED_FROM
        route, operator, reason = _packed_route(device, dtype, quantization, many)
    verified = device == "cpu" and quantization is None
    if not verified:
        reason += f" Not run: the tests have no {quantization or 'experts'} on {device}."
    return Choice(route, operator, reason, verified)


def device_kind(device: torch.device) -> Device:
    """The name of a device, ROCm told from CUDA, whose name it has in PyTorch.

    Args:
        device: of any tensor, whatever its shape and dtype.

    Raises:
        ValueError: a device without a route.

    >>> device_kind(torch.device("cpu"))
    'cpu'
    """
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    _check_choice("device", kind, get_args(Device))
    return cast(Device, kind)


@dataclass(frozen=True)
class Workspace:
    """The shapes of the memory between dispatch and combine.

    Attributes:
        products: both products' results, one after the other: [rows, max(J, H)].
        activated: [rows, I].
        output: [T, H] standard: it may share the memory of `activated`, and not that of `products`,
            which the sum over K still reads. [E, C, H] batched, the second product itself: it may
            share that of `products`, and not that of `activated`, which the product still reads.
    """

    products: tuple[int, int]
    activated: tuple[int, int]
    output: tuple[int, ...]


def workspace_shapes(
    activation_format: ActivationFormat,
    rows: tuple[int, int],
    hidden_size: int,
    intermediate_size: int,
    gated: bool = True,
) -> Workspace:
    """The memory that experts need between dispatch and combine.

    Args:
        activation_format: standard or batched.
        rows: (T, K) in the standard format; in the batched one (E, C), where E are the experts of
            this device and C is what a rank may send to each, times the number of ranks.
        hidden_size: H.
        intermediate_size: I.
        gated: whether J = 2I.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is negative, or the format is unknown.

    Source: vLLM, `workspace_shapes` of the Marlin experts.

    >>> workspace_shapes("standard", (5, 2), hidden_size=8, intermediate_size=3)
    Workspace(products=(10, 8), activated=(10, 3), output=(5, 8))
    >>> workspace_shapes("batched", (2, 6), hidden_size=4, intermediate_size=3)
    Workspace(products=(12, 6), activated=(12, 3), output=(2, 6, 4))
    """
    _check_choice("activation_format", activation_format, get_args(ActivationFormat))
    many, each = rows
    H, I = hidden_size, intermediate_size
    sizes = {"rows[0]": many, "rows[1]": each, "hidden_size": H, "intermediate_size": I}
    for name, size in sizes.items():
        check_count(name, size)
    output = (many, H) if activation_format == "standard" else (many, each, H)
    J = 2 * I if gated else I
    return Workspace((many * each, max(J, H)), (many * each, I), output)


def _plain_route(device: Device, dtype: torch.dtype, few: bool | None) -> tuple[Route, str, str]:
    name = str(dtype).removeprefix("torch.")
    operator, dtypes = GROUPED_KERNELS.get(device, ("", ()))
    if dtype in dtypes:
        return "fused", operator, f"{operator} takes all experts at once in {name}."
    none = f"No kernel takes all experts at once in {name} on {device}, and"
    if few is None:
        return "loop", "torch.nn.functional.linear", f"{none} the route must not go by the batch."
    if few:
        return "gather", "torch.einsum", f"{none} there are no more pairs than experts."
    return "loop", "torch.nn.functional.linear", f"{none} there are more pairs than experts."


def _packed_route(
    device: Device, dtype: torch.dtype, quantization: str, many: bool
) -> tuple[Route, str, str]:
    gguf = quantization in ("Q8_0", "Q4_K")
    if gguf and device == "cuda" and many:
        reason = f"From {GGUF_GROUPED_FROM} tokens on, mistral.rs sorts them by expert."
        return "fused", "mistral.rs grouped GGUF kernels", reason
    if gguf and device in ("cuda", "mps"):
        reason = f"The indexed kernels read {quantization} where it stands, a matrix for each pair."
        return "gather", "mistral.rs indexed GGUF kernels", reason
    if not gguf and device == "cuda" and dtype in (torch.float16, torch.bfloat16):
        reason = f"Marlin's kernel reads {quantization} for all experts at once."
        return "fused", "vLLM moe_wna16_marlin_gemm", reason
    name = str(dtype).removeprefix("torch.")
    reason = f"No kernel for {quantization} and {name} on {device}: experts are unpacked in turn."
    return "loop", "torch.nn.functional.linear", reason


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
