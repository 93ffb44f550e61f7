"""hyper_parallel's PyTorch MoE blocks.

- `route` is its router behind the gate, `layer` the module `MoE`.
- `dispatch`, `experts` and `combine` are the parts of `MoE.forward` behind the router.
- `balance_loss` and `update_bias` are its functions of that kind.

All of it is in the text, but for what shards tensors. Of its further targets `-bfloat16` is the
same module cast to a narrow dtype, and `-grouped_mm` has the experts of a machine with CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerOutput,
    LayerWeights,
    RoutingConfig,
)

from moe_conformance.target import Target, Unsupported, suite_version
from moe_conformance.targets.documents import hyper_parallel_parts as parts
from moe_conformance.targets.documents.hyper_parallel_parts import GROUPED, NARROW, WIDE

Tensor = torch.Tensor


class HyperParallel(Target):
    """As its text has it, in float32."""

    name = "documents/hyper-parallel"
    version = suite_version()
    capabilities = WIDE
    run_experts = staticmethod(parts.experts_in_a_loop)

    def route(
        self,
        logits: Tensor,
        config: RoutingConfig,
        bias: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores, their scale, groups, bias, choice: in this order."""
        logits = logits.float()
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(dim=-1)
        # Wrong: before the choice, so that the bias is compared with scaled scores.
        scores = scores * config.scale
        keys = scores
        if config.num_groups > 1:
            keys = parts.mask_groups(scores, config.num_groups, config.topk_groups)
        if bias is not None:
            # Wrong: behind the mask, so that the bias opens no group.
            keys = keys + bias.float()
        ids = keys.topk(config.top_k, dim=-1).indices
        return scores.gather(1, ids), ids

    def balance_loss(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        config: BalanceConfig,
        padding_mask: Tensor | None = None,
        tokens_per_expert: Tensor | None = None,
    ) -> Tensor:
        """Of the weights of the chosen experts, which is all that it is given."""
        chosen = logits.float().softmax(dim=-1).gather(1, expert_ids.long())
        return config.coefficient * parts.balance(chosen, expert_ids, logits.shape[1])

    def update_bias(
        self, bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
    ) -> Tensor:
        """A step by the sign of what is missing to the mean."""
        # Wrong: counts and mean are float32, and the bias is what the module was cast to.
        counts = tokens_per_expert.float()
        bias = bias.clone()
        bias += rate * (counts.mean() - counts).sign()
        return bias

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by expert, in a stable order."""
        flat = expert_ids.flatten()
        slots = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        return x[slots // expert_ids.shape[1]], counts, slots

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Weigh the outputs, and add them to the rows of their tokens."""
        # Wrong: narrow rows times float32 weights are float32, and are not added to narrow rows.
        weighted = rows * weights.flatten()[slots].unsqueeze(1)
        return parts.add_up(weighted, slots, weights, rows.dtype)

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """There, through the experts, and back."""
        if expert_map is not None or experts.gate_up_bias is not None:
            raise Unsupported("the text has neither an expert map nor biases")
        rows, counts, slots = self.dispatch(x, expert_ids, len(experts.down))
        if config.weight_on == "output":
            return self.combine(self.run_experts(rows, experts, counts), slots, weights)
        # Wrong: narrow rows become float32, which the experts' matrices are not.
        rows = rows * weights.flatten()[slots].unsqueeze(1)
        return parts.add_up(self.run_experts(rows, experts, counts), slots, weights, x.dtype)

    def layer(
        self,
        x: Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """Router, experts, shared expert, and a loss where a coefficient asks for one."""
        flat = x.view(x.shape[0] * x.shape[1], x.shape[2])
        # Wrong: the product is in x's dtype, and only its result is float32.
        logits = F.linear(flat, parameters.router)
        weights, ids = self.route(logits, config.routing, parameters.selection_bias)
        counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
        out = self.experts(flat, parameters.experts, weights, ids, config.experts)
        if parameters.shared is not None:
            one = parameters.shared
            gate, up = F.linear(flat, one.gate_up[0]).chunk(2, dim=-1)
            out = out + F.linear(F.silu(gate) * up, one.down[0])
        loss = None
        if config.balance is not None:
            loss = config.balance.coefficient * parts.balance(weights, ids, logits.shape[1])
        return LayerOutput(out.view(x.shape), ids, weights, loss, counts)


class HyperParallelNarrow(HyperParallel):
    """The module after a cast to bfloat16 or float16."""

    name = "documents/hyper-parallel-bfloat16"
    capabilities = NARROW


class HyperParallelGrouped(HyperParallel):
    """Experts by `torch._grouped_mm`, which is taken wherever there is CUDA."""

    name = "documents/hyper-parallel-grouped_mm"
    capabilities = GROUPED
    run_experts = staticmethod(parts.experts_grouped)
