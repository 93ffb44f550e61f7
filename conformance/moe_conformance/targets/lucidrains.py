"""mixture-of-experts and st-moe-pytorch by lucidrains under the suite: their gates.

`Top2Gate` puts `Top2Gating` of mixture-of-experts under test, `TopNGate` `TopNGating` of
st-moe-pytorch; the whole layers stand in `lucidrains_layers`. Installed, beside a torch, by

    pip install --no-deps mixture-of-experts==0.2.3 st-moe-pytorch==0.1.8 beartype \
        colt5-attention local-attention hyper-connections einx frozendict einops

Both gates drop at random unless told otherwise, so they are told: `second_policy_* = "all"`,
`threshold_* = 0`. Three translations are made, and no others:

- logits go in as hidden states: through an identity weight (mixture-of-experts), or with
  `torch.nn.Identity` in the place of the layer that makes the logits (st-moe-pytorch);
- to route, each token is a sequence of its own, which the least capacity of four has room for;
- weights and ids are the K largest of the dense weights that lie in the combine tensor
  [N, L, E, C], in float32 (float64 for float64 logits).

Neither torch nor a library is imported before a target is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import (
    field_values,
    installed,
    kept_random_state,
    refuse,
    refuse_routing,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import BalanceConfig, RoutingConfig

OLDEST = {"mixture-of-experts": (0, 2), "st-moe-pytorch": (0, 1)}
INSTALL = "pip install --no-deps mixture-of-experts==0.2.3 st-moe-pytorch==0.1.8"

MOST_BYTES = 2**31
"""Of one tensor. The gates make a one-hot [L, E, C] for every sequence and choice, with C in
proportion to L / E: quadratic in L, and for a long sequence more than a machine has."""

# Both: softmax over all E, then the best K, divided by their sum. No scale, groups, bias or table.
ROUTING: dict[str, tuple[Any, ...]] = {
    "score": ("softmax",),
    "order": ("score_then_topk",),
    "renormalize": (True,),
    "renormalize_single": (True,),
    "norm": ("sum",),
    "scale": (1.0,),
    "num_groups": (1,),
    "selection_bias": (False,),
    "hash_table": (False,),
}
# Both: the loss over the first choices of each sequence. It selects again from the logits, and
# takes neither a mask of padding nor counts.
BALANCE: dict[str, tuple[Any, ...]] = {
    "loss": ("gshard",),
    "score": ("softmax",),
    "ids": ("chosen",),
    "invalid_ids": (False,),
    "padding_mask": (False,),
    "tokens_per_expert": (False,),
}


class Top2Gate(Target):
    """`Top2Gating` in mixture_of_experts/mixture_of_experts.py."""

    name = "lucidrains/top2_gate"
    distribution: ClassVar[str] = "mixture-of-experts"
    module: ClassVar[str] = "mixture_of_experts.mixture_of_experts"
    gate: ClassVar[str] = "Top2Gating"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=("float32", "bfloat16", "float16", "float64"),
        # `denom = gate_1 + gate_2 + self.eps`, of exactly two.
        routing={**ROUTING, "top_k": (2,), "epsilon_mode": ("add",), "epsilon": (1e-20, 1e-9)},
        balance=BALANCE,
        gradients=("route", "balance_loss"),
        # `raw_gates.softmax(dim=-1)`, and all that follows, in the dtype of x.
        rounding_points=("router_logits", "router_scores"),
        logits_through="identity",
    )

    def __init__(self) -> None:
        found = library(self.name, self.distribution, self.module, self.gate)
        self._library, type(self).version = found

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate on logits [T, E], through an identity weight."""
        refuse_routing(self, config, bias)
        check_matrix(self, logits)
        with kept_random_state():
            gate = self._gate(logits.shape[1], config.top_k, config.epsilon).eval()
        _, combine, *_ = self._call(gate, logits[:, None])
        return weights_and_ids(combine, config.top_k)

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gate's loss on logits [N · L, E]; it selects the experts again itself."""
        flags = {
            "padding_mask": padding_mask is not None,
            "tokens_per_expert": tokens_per_expert is not None,
        }
        refuse(self, "balance", field_values(config) | flags)
        check_matrix(self, logits)
        # The gate has no use for the ids, so nothing else would notice.
        if expert_ids.shape[:-1] != logits.shape[:1] or expert_ids.is_floating_point():
            raise Unsupported(f"{self.name}: {expert_ids.dtype} ids of {list(expert_ids.shape)}")
        return config.coefficient * self._losses(logits, config.sequence_length)[0]

    def _gate(self, num_experts: int, top_k: int, epsilon: float = 1e-9) -> Any:
        return self._library.Top2Gating(
            num_experts,
            num_experts,
            eps=epsilon,
            second_policy_train="all",
            second_policy_eval="all",
            # The loss is that of the choices before any is dropped, so the least capacity will do.
            capacity_factor_train=0.0,
        )

    def _losses(self, logits: torch.Tensor, length: int | None) -> tuple[torch.Tensor, ...]:
        """What the gate returns behind the combine tensor, in training."""
        tokens, num_experts = logits.shape
        length = tokens if length is None else length
        if tokens % max(length, 1):
            raise ValueError(f"sequence_length: expected a divisor of T = {tokens}, got {length}")
        with kept_random_state():
            gate = self._gate(num_experts, 2).train()
        capacity = max(4, min(length, int(length * gate.capacity_factor_train / num_experts)))
        if (needed := 8 * 2 * tokens * num_experts * capacity) > MOST_BYTES:
            raise MemoryError(
                f"{self.name}: one-hot [2, {tokens}, {num_experts}, {capacity}] of the choices "
                f"takes {needed / 2**30:.1f} GiB"
            )
        return self._call(gate, logits.unflatten(0, (-1, length)) if tokens else logits[None])[2:]

    def _call(self, gate: Any, x: torch.Tensor) -> Any:
        """The gate on hidden states [N, L, E] with an identity weight in the place of its own."""
        from torch.func import functional_call

        identity = x.new_zeros(x.shape[-1], x.shape[-1]).fill_diagonal_(1)
        return functional_call(gate, {"w_gating": identity}, (x,))


class TopNGate(Top2Gate):
    """`TopNGating` in st_moe_pytorch/st_moe_pytorch.py."""

    name = "lucidrains/topn_gate"
    distribution = "st-moe-pytorch"
    module = "st_moe_pytorch.st_moe_pytorch"
    gate = "TopNGating"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=("float32", "bfloat16", "float16", "float64"),
        # `assert top_n >= 2`; `denom = sum(gates).clamp(min = eps)`.
        routing={
            **ROUTING,
            "top_k": tuple(range(2, 17)),
            "epsilon_mode": ("clamp",),
        },
        balance=BALANCE,
        # `topk` of two, also where the loss alone is asked for.
        min_experts=2,
        gradients=("route", "balance_loss", "z_loss"),
        rounding_points=("router_scores",),
    )

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The gate's z-loss on logits [T, E] as one sequence."""
        refuse(self, "balance", {"padding_mask": padding_mask is not None})
        check_matrix(self, logits)
        return self._losses(logits, 1)[1]

    def _gate(self, num_experts: int, top_k: int, epsilon: float = 1e-9) -> Any:
        import torch

        gate = self._library.TopNGating(
            num_experts,
            num_experts,
            eps=epsilon,
            top_n=top_k,
            threshold_train=0.0,
            threshold_eval=0.0,
        )
        gate.to_gates = torch.nn.Identity()
        return gate

    def _call(self, gate: Any, x: torch.Tensor) -> Any:
        return gate(x)


def variants() -> dict[str, Callable[[], Target]]:
    """The targets by the name of the variant.

    >>> list(variants())
    ['top2_gate', 'topn_gate', 'top2_layer', 'topn_layer']
    """

    def layer(name: str) -> Target:
        layers = importlib.import_module("moe_conformance.targets.lucidrains_layers")
        made: Target = getattr(layers, name)()
        return made

    return {
        "top2_gate": Top2Gate,
        "topn_gate": TopNGate,
        "top2_layer": partial(layer, "Top2Layer"),
        "topn_layer": partial(layer, "TopNLayer"),
    }


def library(name: str, distribution: str, module: str, *classes: str) -> tuple[Any, str]:
    """A library's module and version.

    Raises:
        ImportError: it is missing, or has moved one of the classes.
    """
    found = installed(name, OLDEST[distribution], INSTALL, distribution)
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name}: {distribution} {found} cannot be imported: {error}") from None
    for missing in (each for each in classes if not hasattr(imported, each)):
        raise ImportError(f"{name}: {distribution} {found} has no {module}.{missing}")
    return imported, found


def weights_and_ids(combine: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest weights [N·L, K] of a combine tensor [N, L, E, C], and whose they are."""
    weights, ids = combine.sum(-1).flatten(0, 1).topk(top_k, -1)
    return weights.double() if weights.element_size() == 8 else weights.float(), ids


def check_matrix(target: Target, logits: torch.Tensor) -> None:
    """Refuse what is not [T, E]."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise Unsupported(f"{target.name}: {logits.dtype} logits of {list(logits.shape)}")
