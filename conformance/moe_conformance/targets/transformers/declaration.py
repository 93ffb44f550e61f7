"""What a family declares; the defaults are what most families of transformers have in common."""

from __future__ import annotations

from typing import ClassVar

from moe_conformance.target import Capabilities, Target
from moe_conformance.targets.transformers.choices import (
    BACKENDS,
    COMMON_EXPERTS,
    COMMON_LAYER,
    Choice,
)


class Declaration(Target):
    """The choices of a family, and the capabilities that follow from them for each variant."""

    family: ClassVar[str]
    backends: ClassVar[tuple[str, ...]] = BACKENDS

    documented: ClassVar[dict[str, list[Choice]]] = {}
    """Routings that the family's configuration documents and its router does not do, by what they
    are called. Each is a variant of its own, of the router alone."""

    has_balance_loss: ClassVar[bool] = True
    """Whether the family's file has a `load_balancing_loss_func`."""

    strides: ClassVar[bool] = False
    """Whether all of it takes non-contiguous tensors. Routers and experts do, but the blocks begin
    with `hidden_states.view(-1, hidden_dim)`, which refuses a transposed x with a RuntimeError."""

    min_experts: ClassVar[int] = 1

    routing: ClassVar[list[Choice]]
    experts_choice: ClassVar[Choice] = COMMON_EXPERTS
    layer_choice: ClassVar[Choice | list[Choice]] = COMMON_LAYER
    # The routers call softmax or sigmoid in float32, for float64 hidden states as well.
    router_dtype: ClassVar[str | None] = "float32"
    router_rounding: ClassVar[tuple[str, ...]] = ("router_logits",)
    # Every product, activation and multiplication is a tensor of x's dtype; the weighting too,
    # unless the routing weights are wider.
    experts_rounding: ClassVar[tuple[str, ...]] = (
        "pre_activation",
        "gate_activation",
        "activation",
        "expert_output",
        "weighted_output",
    )
    layer_rounding: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def title(cls) -> str:
        """What variants are called by."""
        return cls.family

    @classmethod
    def declared(cls, backend: str) -> Capabilities:
        """The capabilities of this family with one of its `backends` or `documented` routings."""
        grouped = backend == "grouped_mm"
        loss = ("balance_loss",) if cls.has_balance_loss else ()
        operations = ("route", *loss, "experts", "layer")
        if backend in cls.documented:
            operations = ("route",)
        return Capabilities(
            devices=("cpu", "cuda"),
            # `torch.nn.functional.grouped_mm` takes no float64.
            dtypes=("float32", "bfloat16", "float16") + (() if grouped else ("float64",)),
            # The eager forwards hand the ids to `one_hot`, which takes int64 and nothing else.
            id_dtypes=("int64",) if backend == "eager" else ("int64", "int32"),
            operations=operations,
            routing=cls.documented.get(backend, cls.routing),
            experts=cls.experts_choice,
            layer=cls.layer_choice,
            # `load_balancing_loss_func` has no argument for ids or counts: it selects again.
            balance={
                "loss": ("transformers_concatenated",),
                "score": ("softmax",),
                "tokens_per_expert": (False,),
                "ids": ("chosen",),
                "invalid_ids": (False,),
            },
            router_dtype=cls.router_dtype,
            min_experts=cls.min_experts,
            # `grouped_mm` wants rows of a multiple of 16 bytes: 8 numbers of 2 bytes.
            hidden_multiple=8 if grouped else 1,
            intermediate_multiple=8 if grouped else 1,
            gradients=operations,
            strides=cls.strides,
            # `linear` and `grouped_mm` take two tensors of one dtype.
            mixed_dtypes=False,
            rounding_points=(
                *cls.router_rounding,
                *cls.experts_rounding,
                # Eager adds into a tensor of x's dtype with `index_add_`; the other two sum over K
                # at once: transformers/integrations/moe.py.
                *(("combine",) if backend == "eager" else ()),
                *cls.layer_rounding,
            ),
            logits_through="identity",
        )
