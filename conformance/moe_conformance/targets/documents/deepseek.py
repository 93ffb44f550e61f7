"""DeepSeek's MoE block: its forward for training, and `moe_infer`.

- `experts` is the forward between the gate and `AddAuxiliaryLoss`.
- `dispatch` and `combine` are what `moe_infer` does before and behind its experts.
- `expert_parallel` is `moe_infer` with `ep_size` above 1.

The gate is called and never shown, so that there is no `route` and no `layer`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from moe_reference.config import ExpertsConfig, ExpertWeights, Placement

from moe_conformance.target import Capabilities, Target, Unsupported, suite_version
from moe_conformance.targets.documents.parts import all_to_all, experts_of

Tensor = torch.Tensor


class DeepSeek(Target):
    """As its text has it."""

    name = "documents/deepseek"
    version = suite_version()
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16", "float64"),
        # `moe_infer` refuses an id that has no column, so that every pair has a row.
        align={"invalid_ids": (False,)},
        experts={"expert_map": (False,), "weight_on": ("output",)},
        expert_parallel={"placement": (False,)},
        # `moe_infer` runs without gradients.
        gradients=("experts",),
        # Ids and rows are viewed.
        strides=False,
        # The sort of `moe_infer` is not stable.
        deterministic=False,
        # The experts return rows of x's dtype.
        rounding_points=("expert_output",),
    )

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """The loop of the forward: each expert writes the rows of its own pairs."""
        if expert_map is not None:
            raise Unsupported("the text has no expert map")
        flat = expert_ids.view(-1)
        pairs = x.repeat_interleave(expert_ids.shape[1], dim=0)
        # Wrong: memory that nobody clears. A pair whose id is no expert keeps what was there: here
        # always NaN, so that no run is luckier than another.
        out = torch.full_like(pairs, torch.nan)
        for e, expert in enumerate(experts_of(experts, config)):
            mine = flat == e
            out[mine] = expert(pairs[mine])
        # Wrong: with no tokens the last dimension may be anything, and the view raises.
        per_token = out.view(*weights.shape, -1)
        return (per_token * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype).view(x.shape)

    def dispatch(
        self, x: Tensor, expert_ids: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, the order by expert, and the rows in that order."""
        with torch.no_grad():
            marks = expert_ids.new_zeros(len(expert_ids), num_experts)
            # Wrong: a mark that is set twice is one mark, so equal ids in a row are counted once,
            # and an id that is no expert has no column.
            marks.scatter_(1, expert_ids, 1)
            slots = expert_ids.view(-1).argsort()
            return x[slots // expert_ids.shape[1]], marks.sum(dim=0), slots

    def combine(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The outputs at the places that their rows were taken from, weighed and added up."""
        with torch.no_grad():
            # Wrong: as many places as there are rows, where the weights say how many there are.
            placed = torch.empty_like(rows)
            placed[slots] = rows
            # Wrong: rounded to the dtype of the weights, where that is the narrower one, too.
            pairs = placed.view(*weights.shape, -1).to(weights.dtype)
            return pairs.mul_(weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)

    @torch.no_grad()
    def expert_parallel(
        self,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        local: ExpertWeights,
        num_experts: int,
        config: ExpertsConfig,
        group: dist.ProcessGroup | None,
        placement: Placement | None = None,
    ) -> Tensor:
        """The rows go to the ranks of their experts, and do not come back."""
        if placement is not None:
            raise Unsupported("the text has no placement")
        num_ranks = dist.get_world_size(group)
        rows, tokens_per_expert, slots = self.dispatch(x, expert_ids, num_experts)
        # Wrong: every rank has as many experts.
        send = tokens_per_expert.view(num_ranks, -1).sum(dim=1).tolist()
        came = torch.empty_like(tokens_per_expert)
        dist.all_to_all_single(came, tokens_per_expert, group=group)
        of_rank = came.view(num_ranks, -1)
        arrived = all_to_all(rows, of_rank.sum(dim=1).tolist(), send, group)
        here = torch.arange(of_rank.shape[1]).repeat(num_ranks).repeat_interleave(came)
        arrived = arrived[here.argsort()]
        outputs, start = [], 0
        for expert, count in zip(
            experts_of(local, config), of_rank.sum(dim=0).tolist(), strict=False
        ):
            if count > 0:
                outputs.append(expert(arrived[start : start + count]))
            start += count
        # Wrong: nothing at all has one dimension.
        out = torch.cat(outputs) if outputs else arrived.new_empty(0)
        # Wrong: neither is the order undone nor are the rows sent back, so that the outputs of
        # other ranks' tokens are put at the places of this rank's own.
        return self.combine(out, slots, weights)
