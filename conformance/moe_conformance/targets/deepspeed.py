"""deepspeed under the suite: the gating functions of `deepspeed/moe/sharded_moe.py`.

`DeepSpeedTop1`, `DeepSpeedTop2` and `DeepSpeedTopK` call `top1gating`, `top2gating` and
`topkgating` with `sparse_routes=True`, as `MOELayer.forward` does. `DeepSpeedCombine` reads what
`topkgating` returns otherwise: a combine tensor [T, E, C].

Installed with `pip install --no-deps --no-build-isolation deepspeed==0.19.8`, and with --no-deps
hjson, py-cpuinfo, msgpack, ninja, einops and wheel, beside torch 2.13.0. It builds nothing.

Translations, and no others:

- routes [K, T] become [T, K], and what is in a combine tensor the weights and ids of its
  non-zero entries; for `route` and the loss nothing is dropped (`drop_tokens=False`);
- choices that are made at random are switched off: the second expert's of `top2gating`
  (`top2_2nd_expert_sampling`) and that of the tokens that stay of `top1gating` (`use_rts`);
- the loss is multiplied by its coefficient; a padding mask is `used_token`;
- for `drop_to_capacity` the gates are made from logits of 0 where a pair is and minus infinity
  elsewhere, and a capacity becomes the factor that the library rounds up to it. Of the result the
  ids are read: the weights that come with them were normalised again.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Target
from moe_conformance.targets.adapter import field_values, installed, refuse, refuse_routing
from moe_conformance.targets.deepspeed_parts import TOP1, TOP2, TOPK
from moe_conformance.targets.dense import capacity_factor, from_dense, to_dense

if TYPE_CHECKING:
    import torch
    from moe_reference.config import BalanceConfig, RoutingConfig

OLDEST = (0, 19)


class DeepSpeedTop1(Target):
    """`top1gating`.

    Raises:
        ImportError: deepspeed is missing, too old, or has moved its gating functions.
    """

    name = "deepspeed/top1"
    version = ""
    capabilities = TOP1

    def __init__(self) -> None:
        install = "pip install --no-deps --no-build-isolation deepspeed==0.19.8"
        type(self).version = installed(self.name, OLDEST, install, "deepspeed")
        self._gating = importlib.import_module("deepspeed.moe.sharded_moe")

    def _gate(self, logits: torch.Tensor, top_k: int, **options: Any) -> tuple[Any, ...]:
        """The library's function, by default with nothing dropped."""
        used_token = options.pop("used_token", None)
        return self._gating.top1gating(
            logits, used_token=used_token, use_rts=False, **_defaults(options)
        )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gates and indices of its routes."""
        refuse_routing(self, config, bias)
        _, _, _, ids, _, gates, _ = self._gate(logits, config.top_k)
        return gates.T, ids.T

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`l_aux`, which chooses again."""
        asked = field_values(config) | {
            "padding_mask": padding_mask is not None,
            "tokens_per_expert": tokens_per_expert is not None,
            "ids": "chosen",
            "invalid_ids": False,
        }
        refuse(self, "balance", asked)
        options = {} if padding_mask is None else {"used_token": padding_mask.long()}
        return config.coefficient * self._gate(logits, expert_ids.shape[1], **options)[0]

    def drop_to_capacity(
        self,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        num_experts: int,
        capacity: int,
        policy: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The routes that the gate keeps of these."""
        refuse(self, "capacity", {"policy": policy})
        _, routed = to_dense(weights, expert_ids, num_experts)
        logits = weights.new_zeros(routed.shape).masked_fill(~routed, float("-inf"))
        factor = capacity_factor(capacity, expert_ids.numel(), num_experts)
        found = self._gate(logits, expert_ids.shape[1], drop_tokens=True, capacity_factor=factor)
        kept = (expert_ids[:, :, None] == found[3].T[:, None, :]).any(dim=2)
        return weights.where(kept, 0.0), expert_ids.where(kept, -1)


class DeepSpeedTop2(DeepSpeedTop1):
    """`top2gating`."""

    name = "deepspeed/top2"
    capabilities = TOP2

    def _gate(self, logits: torch.Tensor, top_k: int, **options: Any) -> tuple[Any, ...]:
        return self._gating.top2gating(logits, top2_2nd_expert_sampling=False, **_defaults(options))


class DeepSpeedTopK(DeepSpeedTop1):
    """`topkgating`."""

    name = "deepspeed/topk"
    capabilities = TOPK

    def _gate(self, logits: torch.Tensor, top_k: int, **options: Any) -> tuple[Any, ...]:
        # Of its policies `probs` ranks its own softmax: weights of any other kind cannot be given.
        return self._gating.topkgating(logits, top_k, drop_policy="position", **_defaults(options))


class DeepSpeedCombine(DeepSpeedTopK):
    """The combine tensor of `topkgating`."""

    name = "deepspeed/combine"
    capabilities = replace(TOPK, operations=("route",))

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights in the combine tensor, and where the dispatch mask is set."""
        refuse_routing(self, config, bias)
        _, combine, dispatch, _ = self._gate(logits, config.top_k, sparse_routes=False)
        return from_dense(combine.sum(dim=2), dispatch.any(dim=2), config.top_k)


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    declared = {"capacity_factor": 1.0, "min_capacity": 0, "drop_tokens": False}
    return {**declared, "sparse_routes": True, **options}


def variants() -> dict[str, type[Target]]:
    """The targets of this library, by the name of the variant.

    >>> list(variants())
    ['top1', 'top2', 'topk', 'combine']
    """
    listed = (DeepSpeedTop1, DeepSpeedTop2, DeepSpeedTopK, DeepSpeedCombine)
    return {each.name.split("/")[1]: each for each in listed}
