"""What the deepspeed targets declare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.target import Capabilities

# `F.softmax(logits, dim=1)`, and then argmax or topk of it.
ROUTING: dict[str, tuple[Any, ...]] = {
    "score": ("softmax",),
    "order": ("score_then_topk",),
    "scale": (1.0,),
    "num_groups": (1,),
    "selection_bias": (False,),
    "hash_table": (False,),
}

EPSILON = 2.0**-23  # torch.finfo(torch.float32).eps

TOP1 = Capabilities(
    # `TopKGate.forward` makes its input and its weight float32, whatever they were.
    dtypes=("float32",),
    routing={**ROUTING, "renormalize": (False,)},
    balance={
        # The mean of the gates times the share of first choices, over the whole batch.
        "loss": ("gshard",),
        "sequence_length": (None,),
        "score": ("softmax",),
        "tokens_per_expert": (False,),
        "ids": ("chosen",),
        "invalid_ids": (False,),
    },
    # Routes are what the gate chose: nothing is absent.
    align={"invalid_ids": (False,)},
    capacity={"policy": ("position",)},
    # `drop_to_capacity` gives the gate a row of logits over experts.
    repeated_ids=False,
    max_top_k=1,
    gradients=("route", "balance_loss"),
)

# `denom_s` is the sum of the gates that stayed, and at least eps.
RENORMALIZED = {
    **ROUTING,
    "renormalize": (True,),
    "renormalize_single": (True,),
    "norm": ("sum",),
    "epsilon": (EPSILON,),
    "epsilon_mode": ("clamp",),
}

TOP2 = replace(
    TOP1,
    operations=("route", "balance_loss"),
    routing={**RENORMALIZED, "top_k": (2,)},
    balance={**TOP1.balance, "padding_mask": (False,)},  # type: ignore[dict-item]
    # The second expert is another than the first.
    min_experts=2,
    max_top_k=None,
)

TOPK = replace(
    TOP1,
    routing=RENORMALIZED,
    balance={
        # The share of all K choices.
        "loss": ("switch", "deepseek_expert"),
        "score": ("softmax",),
        "padding_mask": (False,),
        "tokens_per_expert": (False,),
        "ids": ("chosen",),
        "invalid_ids": (False,),
    },
    max_top_k=None,
)
