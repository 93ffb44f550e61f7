"""What is kept of an argument, as if nobody would write over it.

An optimizer writes weights in place, a router's bias moves at every step, and a server that moves
copies of experts rewrites its maps: the tensor is the same one, what it holds is not.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from moe_conformance.codec import replace_tensors
from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class Keeps(Reference):
    """A copy of some arguments is made once for each tensor, and used from then on.

    Attributes:
        kept_path: how the dotted paths of those arguments begin.
    """

    kept_path: str

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def copied(self, path: str, tensor: Tensor) -> Tensor:
        """The copy; of what is learned there is none."""
        if tensor.requires_grad or not path.startswith(self.kept_path):
            return tensor
        # The tensor is kept too, so that no other one gets its number.
        return self.kept.setdefault(id(tensor), (tensor, tensor.clone()))[1]


def kept(operation: str, name: str, path: str, *catches: str, thread: str = "") -> None:
    """Register a fault that keeps arguments of an operation by the tensors that they are.

    Args:
        operation: where.
        name: what goes wrong.
        path: how the dotted paths of the arguments begin.
        *catches: ids of the requirements that have to fail.
        thread: where it really happened, or empty.
    """
    names = list(inspect.signature(getattr(Reference, operation)).parameters)[1:]

    def call(self: Keeps, *given: Any, **named: Any) -> Any:
        arguments = dict(zip(names, given, strict=False)) | named
        return getattr(Reference, operation)(self, **replace_tensors(arguments, self.copied))

    members = {
        operation: call,
        "kept_path": path,
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
