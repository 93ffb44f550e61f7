"""A router that returns dense weights [T, E], and a block that multiplies x by them: Llama 4's.

Two translations are made, beside those that all families need, and no others:

- the router does not return which experts it chose; the ids are those that its own `torch.topk`
  gave;
- the block takes neither weights nor ids: its router's dense weights are replaced by given ones,
  in x's dtype as the router's are. A token that names an expert twice goes through it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.routers import Routed
from moe_conformance.targets.transformers.tensors import call, shared_expert

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights


@contextmanager
def watch_topk() -> Iterator[list[torch.Tensor]]:
    """The indices of every `torch.topk` that is called while this is open."""
    import torch
    from torch.overrides import TorchFunctionMode

    chosen: list[torch.Tensor] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.topk:
                chosen.append(result.indices)
            return result

    with Watch():
        yield chosen


def dense_weights(
    weights: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> Iterator[torch.Tensor]:
    """[T, E], once for the first time that each token names an expert, once for the second, ..."""
    earlier = (ids[:, :, None] == ids[:, None]).tril(-1).sum(-1)
    for time in range(int(earlier.max()) + 1 if earlier.numel() else 1):
        now = weights.masked_fill(earlier != time, 0.0)
        yield now.new_zeros(len(ids), num_experts).scatter_add(1, ids, now)


class DenseBlock(TransformersTarget):
    """Such a router, and the experts of such a block."""

    @contextmanager
    def _watch(self, router: torch.nn.Module) -> Iterator[Routed]:
        routed: Routed = []
        with watch_topk() as chosen:
            hook = router.register_forward_hook(
                lambda module, inputs, outputs: routed.append(
                    (outputs[0].gather(1, chosen[-1]), chosen[-1])
                )
            )
            try:
                yield routed
            finally:
                hook.remove()

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block with a shared expert of no width, and these weights for its router's."""
        import torch

        num_experts, hidden, intermediate = experts.down.shape
        absent = bool(((expert_ids < 0) | (expert_ids >= num_experts)).any())
        self._check_experts(
            x, experts, config, expert_map=expert_map is not None, invalid_ids=absent
        )
        block = self._module(
            self.block_class,
            **self._sizes(num_experts, hidden, intermediate),
            **self._experts_fields(config),
        )
        layouts = self._experts_parameters(experts)
        state = {
            "router.weight": x.new_zeros(num_experts, hidden),
            **{f"experts.{name}": value for name, value in layouts.items()},
            **shared_expert("shared_expert", None, x),
        }
        dense = dense_weights(weights.to(x.dtype), expert_ids.long(), num_experts)
        parts = [self._weighted(block, state, x, scores) for scores in dense]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _weighted(
        self,
        block: torch.nn.Module,
        state: dict[str, torch.Tensor],
        x: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        hook = block.get_submodule(self.gate).register_forward_hook(
            lambda module, inputs, outputs: (scores, outputs[1])
        )
        try:
            output: torch.Tensor = call(block, state, x)[0]
        finally:
            hook.remove()
        return output
