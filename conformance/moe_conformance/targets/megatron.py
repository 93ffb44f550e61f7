"""megatron-core under the suite: the functions of `megatron/core/transformer/moe/moe_utils.py`.

- `Megatron` has the router's top-k, the balance losses, the z-loss, `permute` and `unpermute`,
  and the capacity limit.
- `MegatronBias` has the bias update, which knows float32 only.

Installed with `pip install --no-deps megatron-core==0.16.1` beside torch 2.13.0.

Translations, and no others:

- a dense [T, E] matrix with a map becomes weights and ids, and the other way round (`dense`);
- `permute` carries the slots as its `probs`, so that it names the slot of each row itself;
- `unpermute` wants rows in the order of the columns of a map, each ascending: rows are brought
  into the order of their place among a token's K, and the map has K columns;
- a capacity becomes the factor that the library rounds up to it;
- a padding mask is inverted, and tokens of several sequences become [L, N], as the library has
  them; the loss over sequences is taken with a coefficient of 1 and then multiplied;
- with counts of all ranks the library's loss is this rank's part of a sum over ranks. It becomes
  a mean by the number of all tokens over that of this rank's;
- a selection bias narrower than float32 becomes float32, as
  `TopKRouter._maintain_float32_expert_bias` has it, and counts that are given become float32
  without a gradient, as the buffers are that `TopKRouter.__init__` registers for them.

The functions that add up over ranks get a gloo process group of one rank.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_conformance.target import Target, Unsupported
from moe_conformance.targets.adapter import field_values, installed, refuse, refuse_routing
from moe_conformance.targets.dense import (
    at_ids,
    by_place,
    capacity_factor,
    from_dense,
    slots_like,
    to_dense,
    token_places,
    widened,
)
from moe_conformance.targets.megatron_parts import (
    DECLARED,
    as_buffer,
    by_position,
    one_rank,
    sequence_loss,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import BalanceConfig, RoutingConfig

OLDEST = (0, 16)


class Megatron(Target):
    """moe_utils.py, but for the bias update.

    Raises:
        ImportError: megatron-core is missing, too old, or has moved one of the functions.
    """

    name = "megatron-core/moe_utils"
    version = ""
    capabilities = DECLARED

    def __init__(self) -> None:
        install = "pip install --no-deps megatron-core==0.16.1"
        type(self).version = installed(self.name, OLDEST, install, "megatron-core")
        self._utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        self._one_rank = one_rank()

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`topk_routing_with_score_function`."""
        refuse_routing(self, config, bias)
        grouped = config.num_groups > 1
        probs, routing_map = self._utils.topk_routing_with_score_function(
            logits,
            config.top_k,
            use_pre_softmax=config.order == "score_then_topk",
            num_groups=config.num_groups if grouped else None,
            group_topk=config.topk_groups if grouped else None,
            scaling_factor=config.scale,
            score_function=config.score,
            expert_bias=None if bias is None else widened(bias),
        )
        weights, expert_ids = from_dense(probs, routing_map, config.top_k)
        return widened(weights), expert_ids

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `TopKRouter.routing` does for `aux_loss` and `seq_aux_loss`."""
        asked = field_values(config) | {"ids": "chosen", "invalid_ids": False, "centred": False}
        refuse(self, "balance", asked)
        num_experts, top_k = logits.shape[-1], expert_ids.shape[-1]
        padding = None if padding_mask is None else ~padding_mask
        length = config.sequence_length if config.loss == "deepseek_sequence" else None
        if length is not None:
            if tokens_per_expert is not None:
                raise Unsupported(f"{self.name}: the loss over sequences has counts of its own")
            logits = by_position(logits, length)
            padding = None if padding is None else by_position(padding, length)
        routing_map, scores = self._utils.compute_routing_scores_for_aux_loss(
            logits, top_k, config.score, padding_mask=padding
        )
        if length is not None:
            loss = sequence_loss(routing_map, scores, top_k, length, padding)
            return config.coefficient * loss
        counts, here, everywhere = self._utils.get_tokens_per_expert_and_token_count(
            routing_map, self._one_rank, topk=top_k, with_padding_mask=padding is not None
        )
        coefficient = config.coefficient
        if tokens_per_expert is not None:
            counts = as_buffer(tokens_per_expert)
            everywhere = counts.sum() / top_k
            coefficient = coefficient * everywhere / max(here, 1)
        return self._utils.switch_load_balancing_loss_func(
            scores, counts, everywhere, top_k, num_experts, coefficient
        )

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`z_loss_func`."""
        return self._utils.z_loss_func(logits, 1.0, None if padding_mask is None else ~padding_mask)

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """`get_updated_expert_bias`."""
        if centred:
            raise Unsupported(f"{self.name}: no centred update")
        return self._utils.get_updated_expert_bias(
            as_buffer(tokens_per_expert).clone(), widened(bias), rate
        )

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`permute`."""
        slots, routing_map = to_dense(slots_like(expert_ids), expert_ids, num_experts)
        rows, row_slots, _ = self._utils.permute(x, routing_map, probs=slots)
        return rows, routing_map.sum(dim=0), row_slots

    def combine(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """`unpermute`, with the weights as its `probs`."""
        tokens, top_k = token_places(weights)
        order, present = by_place(rows, slots, tokens, top_k)
        return self._utils.unpermute(
            rows[order],
            slots[order].long() // top_k,
            restore_shape=(tokens, rows.shape[1]),
            probs=weights,
            routing_map=present,
        )

    def drop_to_capacity(
        self,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        num_experts: int,
        capacity: int,
        policy: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`apply_router_token_dropping`."""
        probs, routing_map = to_dense(weights, expert_ids, num_experts)
        probs, routing_map = self._utils.apply_router_token_dropping(
            probs,
            routing_map,
            router_topk=expert_ids.shape[1],
            capacity_factor=capacity_factor(capacity, expert_ids.numel(), num_experts),
            drop_policy=policy,
        )
        return at_ids(probs, routing_map, expert_ids)


class MegatronBias(Megatron):
    """`get_updated_expert_bias`."""

    name = "megatron-core/bias"
    # The buffer `expert_bias` is kept in float32, whatever the model is in.
    capabilities = replace(
        DECLARED, dtypes=("float32", "bfloat16", "float16"), operations=("update_bias",)
    )


def variants() -> dict[str, type[Target]]:
    """The targets of this library, by the name of the variant.

    >>> list(variants())
    ['moe_utils', 'bias']
    """
    return {each.name.split("/")[1]: each for each in (Megatron, MegatronBias)}
