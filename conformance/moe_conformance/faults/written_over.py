"""What is kept of an argument, as if nobody would write over it, or bring another one.

An optimizer writes weights in place, a router's bias moves at every step, and a server that moves
copies of experts rewrites its maps: the tensor is the same one, what it holds is not. A graph that
was captured for a call's form answers all calls of the form, whose tensors are others.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from moe_conformance.codec import replace_tensors, walk
from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class Keeps(Reference):
    """A copy of some arguments is made once for each tensor, and used from then on.

    Attributes:
        kept_path: how the dotted paths of those arguments begin.
        captured: whether once for each form of a call instead: its shapes, dtypes and numbers.
    """

    kept_path: str
    captured: bool

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[object, tuple[Tensor, Tensor]] = {}

    def replaced(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the copies in their places; of what is learned there is none."""
        form = str(
            [(path, tensor.shape, tensor.dtype) for path, tensor in walk(arguments)]
            + [value for value in arguments.values() if not list(walk(value))]
        )

        def copied(path: str, tensor: Tensor) -> Tensor:
            if tensor.requires_grad or not path.startswith(self.kept_path):
                return tensor
            key = (path, form) if self.captured else id(tensor)
            # The tensor is kept too, so that no other one gets its number.
            return self.kept.setdefault(key, (tensor, tensor.clone()))[1]

        changed: dict[str, Any] = replace_tensors(arguments, copied)
        return changed


def kept(
    operation: str,
    name: str,
    path: str,
    *catches: str,
    thread: str = "",
    captured: bool = False,
) -> None:
    """Register a fault that keeps arguments of an operation by the tensors that they are.

    Args:
        operation: where.
        name: what goes wrong.
        path: how the dotted paths of the arguments begin.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
        captured: by the form of the call instead.
    """
    names = list(inspect.signature(getattr(Reference, operation)).parameters)[1:]

    def call(self: Keeps, *given: Any, **named: Any) -> Any:
        arguments = dict(zip(names, given, strict=False)) | named
        return getattr(Reference, operation)(self, **self.replaced(arguments))

    members = {
        operation: call,
        "kept_path": path,
        "captured": captured,
        "__doc__": f"What {path.rstrip('.')} held at first is used from then on.",
        "__module__": __name__,
    }
    fault(name, catches=catches, thread=thread)(type("Kept", (Keeps,), members))


NUM, LAYER, PREPARED, MOVED = "NUM-13", "LAYER-16", "SGLang #25852", "vllm-ascend #4793"

kept(
    "route", "the-bias-of-the-first-step-is-kept", "bias", NUM, "GATE-23", thread="torchtitan #1593"
)
kept("balance_loss", "the-mask-of-the-first-batch-is-kept", "padding_mask", NUM)
kept("z_loss", "the-mask-of-the-first-z-loss-is-kept", "padding_mask", NUM)
kept("align", "a-map-is-kept-with-its-blocks", "expert_map", NUM, "ALIGN-35", thread=MOVED)
kept("experts", "prepared-biases-are-kept", "experts.gate_up_bias", NUM, thread=PREPARED)
kept("experts", "the-map-of-the-experts-here-is-kept", "expert_map", NUM, thread=MOVED)
kept("experts_batched", "prepared-experts-are-kept", "experts.", NUM, thread=PREPARED)
kept("experts_quantized", "a-map-beside-packed-experts-is-kept", "expert_map", NUM, thread=MOVED)
kept("experts_quantized", "fixed-scales-are-kept", "experts.activation_scales", NUM)
kept("layer", "a-prepared-router-is-kept", "parameters.router", LAYER, NUM, thread=PREPARED)
kept("layer", "the-bias-of-a-layers-first-step-is-kept", "parameters.selection_bias", LAYER, NUM)
kept("layer", "a-prepared-shared-expert-is-kept", "parameters.shared", LAYER, NUM, thread=PREPARED)
kept("expert_parallel", "a-placement-is-looked-up-once", "placement.", "EP-29", thread=MOVED)
kept("expert_parallel", "experts-of-a-rank-are-kept", "local.", "EP-29", thread=PREPARED)
kept("replicated_experts", "experts-that-add-up-are-kept", "local.", "EP-27", thread=PREPARED)
kept("sliced_expert_parallel", "experts-for-slices-are-kept", "local.", "EP-26", thread=PREPARED)
kept("shared_tensor_parallel", "a-shared-slice-is-kept", "part.", "EP-28", thread=PREPARED)


def graph(operation: str, name: str, path: str, *catches: str) -> None:
    """Register a fault that keeps arguments of an operation by the form of the call."""
    kept(operation, name, path, *catches, thread=CAPTURED, captured=True)


CAPTURED = "flashinfer #5287"

graph("route", "a-captured-router-keeps-its-bias", "bias", "GATE-23")
graph("balance_loss", "a-captured-loss-keeps-its-mask", "padding_mask", NUM)
graph("z_loss", "a-captured-z-loss-keeps-its-mask", "padding_mask", NUM)
graph("update_bias", "a-captured-step-keeps-its-counts", "tokens_per_expert", NUM)
graph("align", "captured-blocks-keep-their-map", "expert_map", NUM)
graph("align_batched", "captured-blocks-keep-their-counts", "tokens_per_expert", NUM)
graph("drop_to_capacity", "a-captured-drop-keeps-its-ids", "expert_ids", NUM)
graph("experts", "captured-experts-keep-their-map", "expert_map", NUM)
graph("experts_batched", "a-captured-batch-keeps-its-counts", "tokens_per_expert", NUM)
graph("experts_quantized", "captured-packed-experts-keep-their-map", "expert_map", NUM)
graph("layer", "a-captured-layer-keeps-its-router", "parameters.router", LAYER)
graph("layer", "a-captured-layer-keeps-its-bias", "parameters.selection_bias", LAYER)
graph("layer", "a-captured-layer-keeps-its-token-ids", "token_ids", LAYER)
graph("layer", "a-captured-layer-keeps-its-mask", "padding_mask", LAYER)
