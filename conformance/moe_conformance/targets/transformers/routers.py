"""`route` and `balance_loss`: the library's routers, and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_conformance.target import Unsupported
from moe_conformance.targets.adapter import refuse_tensor
from moe_conformance.targets.transformers.names import Names
from moe_conformance.targets.transformers.tensors import call, widen

if TYPE_CHECKING:
    import torch
    from moe_reference.config import BalanceConfig, RoutingConfig

Routed = list[tuple["torch.Tensor", "torch.Tensor"]]


class Routers(Names):
    """The family's router on logits, and the loss of its file."""

    @contextmanager
    def _watch(self, router: torch.nn.Module) -> Iterator[Routed]:
        """What the router returns while this is open: weights and ids, once for each call."""
        routed: Routed = []
        hook = router.register_forward_hook(
            lambda module, inputs, outputs: routed.append((outputs[1], outputs[2]))
        )
        try:
            yield routed
        finally:
            hook.remove()

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The family's router on logits [T, E], through an identity weight.

        Finite logits arrive as they are. One that is not spreads over its own row, since 0 · inf
        is NaN: the router is then asked about a row of NaN.
        """
        self._check_routing(logits, config, bias, logits.shape[-1])
        num_experts = logits.shape[-1]
        identity = logits.new_zeros(num_experts, num_experts).fill_diagonal_(1)
        router = self._module(
            self._router(config),
            **self._sizes(num_experts, num_experts, 1),
            **self._routing_fields(config),
        )
        parameters = self._router_parameters(identity, None, bias, config)
        with self._watch(router) as routed:
            call(router, parameters, logits, *self._router_inputs(config, bias, token_ids, logits))
        [(weights, expert_ids)] = routed
        return widen(weights, logits), expert_ids

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`load_balancing_loss_func` on one layer's logits; it selects the experts again itself."""
        refuse_tensor(self, logits)
        if config.loss != "transformers_concatenated" or config.score != "softmax":
            raise Unsupported(f"{self.name}: loss {config.loss!r} of {config.score!r} scores")
        if tokens_per_expert is not None:
            raise Unsupported(f"{self.name}: load_balancing_loss_func takes no counts")
        assert self._balance_loss is not None
        return config.coefficient * self._balance_loss(
            (logits,), logits.shape[1], expert_ids.shape[1], padding_mask
        )
