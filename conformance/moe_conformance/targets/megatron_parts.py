"""What the megatron-core targets declare, and need beside the functions under test.

The loss over sequences is a method of `TopKRouter`. It is called on a router as the library makes
it, but for one method: what would attach the loss to the activations hands the loss back.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Capabilities

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


SOFTMAX: dict[str, tuple[Any, ...]] = {
    "score": ("softmax",),
    "renormalize": (False,),
    # `if scaling_factor:` multiplies last, whatever came before.
    "scale_when": ("always",),
    # `expert_bias` is read in the branch for sigmoid only.
    "selection_bias": (False,),
    "hash_table": (False,),
}

ROUTING: tuple[dict[str, tuple[Any, ...]], ...] = (
    # The default, and `use_pre_softmax`, which does not renormalise.
    {**SOFTMAX, "order": ("topk_then_score",)},
    {**SOFTMAX, "order": ("score_then_topk",)},
    {
        "score": ("sigmoid",),
        "order": ("score_then_topk",),
        # `scores / (scores.sum(...) + 1e-20) if topk > 1 else scores`.
        "renormalize": (True,),
        "renormalize_single": (False,),
        "norm": ("sum",),
        "epsilon": (1e-20,),
        "epsilon_mode": ("add",),
        "scale_when": ("always",),
        "selection_bias": (False, True),
        "hash_table": (False,),
    },
)

GROUPS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"num_groups": (1,)},
    # `group_limited_topk` adds the best topk // group_topk of each, and masks with -inf.
    {"group_score": ("topk_share_sum",), "mask_fill": ("-inf",)},
)

DECLARED = Capabilities(
    dtypes=("float32", "bfloat16", "float16", "float64"),
    operations=("route", "balance_loss", "z_loss", "dispatch", "combine", "drop_to_capacity"),
    routing=[{**choice, **groups} for choice in ROUTING for groups in GROUPS],
    balance={
        # `aux_loss` is the formula of both; `seq_aux_loss` is the one over sequences.
        "loss": ("switch", "deepseek_expert", "deepseek_sequence"),
        "score": ("softmax", "sigmoid"),
        # A literal in `compute_routing_scores_for_aux_loss`, which also selects again.
        "epsilon": (1e-20,),
        "ids": ("chosen",),
        "invalid_ids": (False,),
        # `get_updated_expert_bias` takes no mean away.
        "centred": (False,),
    },
    capacity=(
        {"policy": ("position",)},
        # `apply_router_token_dropping` takes the top-k of a matrix in which 0 is "not routed".
        {"policy": ("probs",), "signed_weights": (False,)},
    ),
    # Routes are a map [T, E] of bools.
    repeated_ids=False,
    # `permute` appends no row, and `unpermute` has a place for each.
    appended_rows=False,
    # `torch.softmax(..., dtype=torch.float32)` and `torch.sigmoid(logits.float())`.
    router_dtype="float32",
    gradients=("route", "balance_loss", "z_loss", "dispatch", "combine", "drop_to_capacity"),
    rounding_points=(
        # `.type_as(logits)` after the score function.
        "router_scores",
        # `unpermute` multiplies and adds in the wider dtype of rows and weights.
        "weighted_output",
        "combine",
    ),
)


def one_rank() -> dist.ProcessGroup:
    """A gloo group of this process alone, known to the library as every group that it has."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


@cache
def _router(num_experts: int, top_k: int) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Tapped(TopKRouter):
        def attach_and_log_load_balancing_loss(
            self, activation: Any, coefficient: float, aux_loss: Any, *more: Any, **named: Any
        ) -> Any:
            return aux_loss

    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="seq_aux_loss",
        # The configuration wants it where K is 1; the loss does not read it.
        moe_router_pre_softmax=True,
        moe_aux_loss_coeff=1.0,
        add_bias_linear=False,
        perform_initialization=False,
    )
    return Tapped(config, get_default_pg_collection())


def as_buffer(counts: torch.Tensor) -> torch.Tensor:
    """Counts as the buffers of `TopKRouter` hold them."""
    return counts.detach().float()


def by_position(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens of sequences one after the other, as the library has them: position by position."""
    sequences = tensor.reshape(-1, length, *tensor.shape[1:])
    return sequences.transpose(0, 1).flatten(0, 1)


def sequence_loss(
    routing_map: torch.Tensor,
    scores: torch.Tensor,
    top_k: int,
    length: int,
    padding: torch.Tensor | None,
) -> torch.Tensor:
    """`TopKRouter._apply_seq_aux_loss` with a coefficient of 1."""
    tokens, num_experts = scores.shape
    return _router(num_experts, top_k)._apply_seq_aux_loss(
        scores,
        scores,
        routing_map,
        seq_length=length,
        bsz=tokens // length,
        with_padding_mask=padding is not None,
    )
