"""The peers: what people use for the experts of a layer, each behind one small function.

An adapter takes the arguments of `experts` and returns a function without arguments that computes
them, or the text `absent: …` where it cannot be had here. Nothing of a peer is part of this
repository: what is not installed is looked for in the folder `.peers/`; `fill_peers.py` fills it.

Dimension key: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moe_optimized.alignment import align

FOLDER = Path(__file__).parents[1] / ".peers"
Run = Callable[[], torch.Tensor]


class Given(NamedTuple):
    """x [T, H], weights [T, K] float32, ids [T, K] int64, gate_up [E, 2I, H], down [E, H, I]."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Peer(NamedTuple):
    """An adapter, and what it can take part in.

    `capturable` is false where a call waits for the host, which ends the capture of a CUDA graph.
    """

    make: Callable[[Given], Run | str]
    trains: bool
    capturable: bool
    made_of: str


def loop(given: Given) -> Run | str:
    x, weights, ids, gate_up, down = given

    def run() -> torch.Tensor:
        out = torch.zeros_like(x)
        for e, (one_gate_up, one_down) in enumerate(
            zip(gate_up.unbind(), down.unbind(), strict=True)
        ):
            tokens, ks = torch.where(ids == e)
            gate, up = F.linear(x[tokens], one_gate_up).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, one_down) * weights[tokens, ks, None]
            out = out.index_add(0, tokens, rows.to(x.dtype))
        return out

    return run


def of_transformers(name: str) -> Callable[[Given], Run | str]:
    """One of the three ways that transformers has, by name."""

    def make(given: Given) -> Run | str:
        x, weights, ids, gate_up, down = given
        if name == "batched_mm" and (reason := _too_large_for_copies(given)):
            return reason
        transformers = imported("transformers")
        if isinstance(transformers, str):
            return transformers
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        E, H, I = down.shape
        config = transformers.MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
        config._experts_implementation = name
        with torch.device("meta"):
            module = MixtralExperts(config)
        # The tensors themselves: nothing is copied, and gradients come back for them.
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = gate_up, down
        # Its routers hand on weights in the dtype of the model.
        return lambda: module(x, ids, weights.to(x.dtype))

    return make


def liger(given: Given) -> Run | str:
    module = imported("liger_kernel.ops.fused_moe")
    if isinstance(module, str):
        return module
    x, weights, ids, gate_up, down = given
    ids = ids.int()
    return lambda: module.LigerFusedMoEFunction.apply(x, gate_up, down, ids, weights)


def moe_ops(given: Given) -> Run | str:
    module = imported("moe_ops")
    if isinstance(module, str):
        return module
    x, weights, ids, gate_up, down = given
    T, K = ids.shape
    ids = ids.int()

    def run() -> torch.Tensor:
        rows, places, offsets = module.permute(x, ids, 0, gate_up.shape[0])
        gate, up = module.grouped_gemm(rows, gate_up, offsets).chunk(2, dim=-1)
        rows = module.grouped_gemm(F.silu(gate) * up, down, offsets)
        return module.unpermute(rows, places, weights, T, K)

    return run


def scattermoe(given: Given) -> Run | str:
    module = imported("scattermoe.parallel_experts")
    if isinstance(module, str):
        return module
    x, weights, ids, gate_up, down = given
    E, K = gate_up.shape[0], ids.shape[1]

    def run() -> torch.Tensor:
        order = module.flatten_sort_count(ids, num_experts=E)
        rows = module.parallel_linear(x, gate_up.transpose(1, 2), K, *order, grouped_out=True)
        gate, up = rows.chunk(2, dim=-1)
        return module.parallel_linear(
            F.silu(gate) * up,
            down.transpose(1, 2),
            1,
            *order,
            grouped_in=True,
            gates=weights.to(x.dtype),
        )

    return run


def sonicmoe(given: Given) -> Run | str:
    module = imported("sonicmoe")
    if isinstance(module, str):
        return module
    from sonicmoe.enums import ActivationType

    x, weights, ids, gate_up, down = given
    T, K = ids.shape
    tokens = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K)
    experts = ids.flatten().int()

    def run() -> torch.Tensor:
        out, _ = module.moe_general_routing_inputs(
            x,
            weights.flatten(),
            tokens,
            experts,
            gate_up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            E=gate_up.shape[0],
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return out

    return run


def vllm(given: Given) -> Run | str:
    module = imported("vllm_fused_moe")
    if isinstance(module, str):
        return module
    x, weights, ids, gate_up, down = given
    T, K = ids.shape
    E, H, I = down.shape
    config = vllm_config(T, E, I)
    weights, height = weights.contiguous(), config["BLOCK_SIZE_M"]
    dtypes = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

    def multiply(
        rows: torch.Tensor,
        matrices: torch.Tensor,
        places: tuple[torch.Tensor, ...],
        top_k: int,
        weigh: bool,
    ) -> torch.Tensor:
        out = rows.new_empty(T * K, matrices.shape[1])
        width, depth = matrices.shape[1:]
        # No more blocks than slots have rows, as vLLM has it for few tokens.
        padded = min(places[0].shape[0], T * K * height)
        tiles = -(-padded // height) * -(-width // config["BLOCK_SIZE_N"])
        values = {
            "a_ptr": rows, "b_ptr": matrices, "c_ptr": out, "b_bias_ptr": None,
            "a_scale_ptr": None, "b_scale_ptr": None, "topk_weights_ptr": weights,
            "sorted_token_ids_ptr": places[0], "expert_ids_ptr": places[1],
            "num_tokens_post_padded_ptr": places[2], "N": width, "K": depth, "EM": padded,
            "num_valid_tokens": T * K, "stride_am": rows.stride(0), "stride_ak": rows.stride(1),
            "stride_be": matrices.stride(0), "stride_bk": matrices.stride(2),
            "stride_bn": matrices.stride(1), "stride_cm": out.stride(0),
            "stride_cn": out.stride(1), "MUL_ROUTED_WEIGHT": weigh, "top_k": top_k,
            "compute_type": getattr(module.tl, dtypes[x.dtype]), "SPLIT_K": 1,
        }  # fmt: skip
        values |= {name: config[name] for name in config}
        # Names differ by version; what is left is about quantised weights and biases.
        names = module.fused_moe_kernel.arg_names
        rest = {name: 0 if name.startswith(("stride", "group")) else False for name in names}
        named = {name: values.get(name, rest[name]) for name in names}
        options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
        module.fused_moe_kernel[(tiles,)](**named, **options)
        return out

    def run() -> torch.Tensor:
        places = align(ids, height, E)
        gate, up = multiply(x, gate_up, places, K, False).chunk(2, dim=-1)
        rows = multiply(F.silu(gate) * up, down, places, 1, True)
        return rows.view(T, K, H).sum(1)

    return run


def vllm_config(tokens: int, experts: int, intermediate: int) -> dict[str, int]:
    """vLLM's tuned tiles for this device if its file was fetched, and what vLLM takes without one.

    Args:
        tokens: T.
        experts: E.
        intermediate: I.
    """
    device = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"
    path = FOLDER / "vllm_configs" / f"E={experts},N={intermediate},device_name={device}.json"
    if path.exists():
        tuned = {
            int(size): tiles
            for size, tiles in json.loads(path.read_text()).items()
            if size.isdigit()
        }
        return tuned[min(tuned, key=lambda size: abs(size - tokens))]
    tiles = (16, 32, 64, 1) if tokens <= experts else (64, 64, 32, 8)
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    return dict(zip(names, tiles, strict=True))


PEERS = {
    "loop": Peer(loop, True, False, "two products of torch per expert"),
    "eager": Peer(of_transformers("eager"), True, False, "transformers, its Mixtral experts"),
    "batched_mm": Peer(of_transformers("batched_mm"), True, True, "transformers"),
    # transformers' documentation says that grouped_mm cannot be captured.
    "grouped_mm": Peer(of_transformers("grouped_mm"), True, False, "transformers"),
    "liger": Peer(liger, True, False, "Liger-Kernel's fused_moe"),
    "moe-ops": Peer(moe_ops, True, False, "moe-ops' permute, grouped_gemm and unpermute"),
    "scattermoe": Peer(scattermoe, True, False, "ScatterMoE's parallel_linear"),
    "vllm": Peer(
        vllm,
        False,
        True,
        "vLLM's fused_moe_kernel; its other parts are CUDA: alignment by moespec, activation and "
        "sum by torch",
    ),
    "sonicmoe": Peer(sonicmoe, True, False, "SonicMoE's moe_general_routing_inputs"),
}


def imported(name: str) -> Any:
    """A module, or the text `absent: …`."""
    look_in_folder()
    try:
        return importlib.import_module(name)
    # A package that is not made for this machine may raise anything while it is imported.
    except Exception as error:
        return f"absent: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def look_in_folder() -> None:
    """Let Python find what is in `.peers/`, behind what is installed."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def _too_large_for_copies(given: Given) -> str | None:
    """batched_mm copies the expert of every pair of token and expert, and so does its gradient."""
    size = given.gate_up.element_size()
    one = (given.gate_up[0].numel() + given.down[0].numel()) * size
    needed = given.ids.numel() * one * (3 if given.x.requires_grad else 1)
    if given.x.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 2:
        return f"absent: takes about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return None
