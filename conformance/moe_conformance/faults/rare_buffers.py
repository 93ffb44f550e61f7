"""Outputs that live in a buffer: rows that nobody writes hold what an earlier call left there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from moe_reference.alignment import local_ids

from moe_conformance.faults import fault
from moe_conformance.faults.rare import Arguments
from moe_conformance.targets import Reference


def left_in_buffer(
    operation: str, name: str, idle: Callable[[Arguments], torch.Tensor], catches: str, thread: str
) -> None:
    """Register a fault that leaves rows of the output as the call before left them.

    Args:
        operation: the operation that it is in.
        name: what goes wrong.
        idle: from the arguments to the rows that are left, as a mask; its docstring says which.
        catches: the requirement that has to fail.
        thread: where it really happened.
    """
    right = getattr(Reference, operation)
    signature = inspect.signature(right)

    def make(self: Any) -> None:
        self.buffer = None

    def call(self: Any, *given: Any, **named: Any) -> Any:
        bound = signature.bind(self, *given, **named)
        bound.apply_defaults()
        out = right(self, *given, **named)
        old, self.buffer = self.buffer, out.detach().clone()
        if old is None or (old.shape, old.dtype) != (out.shape, out.dtype):
            return out
        rows = idle({key: value for key, value in bound.arguments.items() if key != "self"})
        return torch.where(rows[..., None], old, out)

    members = {
        operation: call,
        "__init__": make,
        "__doc__": f"One buffer for all outputs, which is not cleared: {idle.__doc__}",
        "__module__": idle.__module__,
    }
    fault(name, catches=(catches,), thread=thread)(type("LeftInBuffer", (Reference,), members))


def without_experts(a: Arguments) -> torch.Tensor:
    """Tokens none of whose experts is here get an earlier token's output."""
    local = local_ids(a["expert_ids"], len(a["experts"].down), a["expert_map"])
    return (local < 0).all(1)


left_in_buffer(
    "experts",
    "tokens-without-experts-keep-an-earlier-output",
    without_experts,
    "EXPERT-17",
    "vllm-ascend #9992",
)


def past_the_count(a: Arguments) -> torch.Tensor:
    """Rows past an expert's count get an earlier row's output."""
    return torch.arange(a["x"].shape[1]) >= a["tokens_per_expert"][:, None]


left_in_buffer(
    "experts_batched",
    "rows-past-the-count-keep-an-earlier-output",
    past_the_count,
    "EXPERT-15",
    "vllm-ascend #9992",
)


def without_rows(a: Arguments) -> torch.Tensor:
    """Tokens none of whose pairs has a row get an earlier token's sum."""
    tokens, top_k = a["weights"].shape
    rowless = torch.ones(tokens, dtype=torch.bool)
    rowless[a["slots"][a["slots"] < tokens * top_k].long() // top_k] = False
    return rowless


left_in_buffer(
    "combine", "tokens-without-rows-keep-an-earlier-sum", without_rows, "DISPATCH-15", "TE #3484"
)
