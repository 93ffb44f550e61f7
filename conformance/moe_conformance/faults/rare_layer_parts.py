"""Rare faults of layers: the router's dtype, the shared expert, padding, tables, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import LayerOutput
from moe_reference.experts import experts as reference_experts
from moe_reference.layer import layer as reference_layer
from moe_reference.layer import shared_expert

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, When, tokens, top_k
from moe_conformance.faults.rare_alignment import once
from moe_conformance.faults.rare_calls import (
    Change,
    altered,
    as_if_contiguous,
    instead,
    right,
    with_fields,
)
from moe_conformance.targets import Reference


def shared(a: Arguments) -> bool:
    """Whether there is a shared expert."""
    return a["parameters"].shared is not None


def padded(a: Arguments) -> bool:
    """Whether there is a token that is padding."""
    mask = a.get("padding_mask")
    return mask is not None and not bool(mask.all())


def hashed(a: Arguments) -> bool:
    """Whether experts come from a table."""
    return a["config"].routing.hash_table is not None


def trained(a: Arguments) -> bool:
    """Whether a loss is asked for."""
    return bool(a.get("training")) and a["config"].balance is not None


def of_dtype(a: Arguments, *names: str) -> bool:
    """Whether x is of one of these dtypes."""
    return str(a["x"].dtype).removeprefix("torch.") in names


def parameters(a: Arguments, **changed: Any) -> Arguments:
    """Other parameters."""
    return {"parameters": replace(a["parameters"], **changed)}


def configured(a: Arguments, **changed: Any) -> Arguments:
    """Another configuration."""
    return {"config": replace(a["config"], **changed)}


def routed_otherwise(a: Arguments, **changed: Any) -> Arguments:
    """Another configuration of the routing."""
    return configured(a, routing=replace(a["config"].routing, **changed))


def without_shared(a: Arguments) -> Arguments:
    """Without the shared expert."""
    return parameters(a, shared=None, shared_gate=None)


def part_of_shared(a: Arguments) -> torch.Tensor:
    """[N, L, H], what the shared expert adds."""
    wide = torch.float64 if a["x"].dtype is torch.float64 else torch.float32
    x = a["x"].reshape(-1, a["x"].shape[-1]).to(wide)
    return shared_expert(x, a["parameters"], a["config"]).view(a["x"].shape)


def layer_of(
    name: str, sentence: str, when: When, change: Change, *catches: str, thread: str = ""
) -> None:
    """Register a layer that computes with other arguments in some calls."""
    altered("layer", name, sentence, when, change, *catches, thread=thread)


def field_of(
    name: str,
    sentence: str,
    when: When,
    change: Callable[[Any, Arguments], Any],
    *catches: str,
    thread: str = "",
) -> None:
    """Register a layer whose result is changed in some calls."""

    def result(a: Arguments) -> Any:
        return change(right("layer", a), a)

    result.__module__ = change.__module__
    instead("layer", name, sentence, when, result, *catches, thread=thread)


layer_of(
    "the-router-is-rounded-to-the-dtype-of-x",
    "A router in float32 beside a narrower x is rounded to its dtype.",
    lambda a: (
        a["parameters"].router.dtype is not a["x"].dtype and of_dtype(a, "bfloat16", "float16")
    ),
    lambda a: parameters(a, router=a["parameters"].router.to(a["x"].dtype)),
    "LAYER-17",
    thread="SGLang #37133",
)

layer_of(
    "the-router-takes-the-dtype-of-x-with-a-bias",
    "With a router bias the product is in x's dtype, whatever the configuration says.",
    lambda a: (
        a["parameters"].router_bias is not None
        and of_dtype(a, "bfloat16", "float16")
        and a["config"].router_dtype is torch.float32
    ),
    lambda a: configured(a, router_dtype=None),
    "LAYER-03",
)

layer_of(
    "a-router-of-float64-is-one-of-float32",
    "Beside bfloat16 a router that is to compute in float64 does so in float32.",
    lambda a: a["config"].router_dtype is torch.float64 and of_dtype(a, "bfloat16"),
    lambda a: configured(a, router_dtype=torch.float32),
    "LAYER-02",
)

layer_of(
    "the-selection-bias-is-left-out-without-training",
    "Outside of training experts are chosen without the selection bias, with sigmoid scores.",
    lambda a: (
        not a.get("training")
        and a["parameters"].selection_bias is not None
        and a["config"].routing.score == "sigmoid"
    ),
    lambda a: parameters(a, selection_bias=None),
    "LAYER-02",
    thread="Megatron #1441",
)

layer_of(
    "the-router-bias-is-left-out-of-one-token",
    "A single token's logits lack the router's bias.",
    lambda a: tokens(a) <= 2 and a["parameters"].router_bias is not None,
    lambda a: parameters(a, router_bias=None),
    "LAYER-03",
)

layer_of(
    "groups-are-not-looked-at-in-training",
    "In training all groups are open.",
    lambda a: (
        bool(a.get("training"))
        and a["config"].routing.topk_groups < a["config"].routing.num_groups
        and a["config"].routing.group_score != "topk_share_sum"
    ),
    lambda a: routed_otherwise(a, topk_groups=a["config"].routing.num_groups),
    "LAYER-02",
)

layer_of(
    "the-scale-is-applied-to-the-shared-expert",
    "The routing scale multiplies the shared expert as well, with a gate, in bfloat16.",
    lambda a: (
        shared(a)
        and of_dtype(a, "bfloat16")
        and a["parameters"].shared_gate is not None
        and a["config"].routing.scale != 1.0
    ),
    lambda a: configured(a, shared_scale=a["config"].shared_scale * a["config"].routing.scale),
    "LAYER-05",
    thread="SGLang #28237",
)

layer_of(
    "the-shared-scale-is-left-out-with-a-gate",
    "In float16 and with a gate the shared expert is not scaled.",
    lambda a: shared(a) and of_dtype(a, "float16") and a["parameters"].shared_gate is not None,
    lambda a: configured(a, shared_scale=1.0),
    "LAYER-05",
)

layer_of(
    "the-shared-expert-has-the-width-of-the-routed",
    "A shared expert that is wider than the routed ones is cut to their width in float32.",
    lambda a: (
        shared(a)
        and of_dtype(a, "float32")
        and not a["config"].experts.gated
        and a["parameters"].shared.down.shape[2] > a["parameters"].experts.down.shape[2]
    ),
    lambda a: cut_shared(a),
    "LAYER-04",
)


def cut_shared(a: Arguments) -> Arguments:
    """The shared expert with the first I rows."""
    one, wide = a["parameters"].shared, a["parameters"].experts.down.shape[2]
    bias = None if one.gate_up_bias is None else one.gate_up_bias[:, :wide]
    cut = replace(one, gate_up=one.gate_up[:, :wide], down=one.down[..., :wide], gate_up_bias=bias)
    return parameters(a, shared=cut)


layer_of(
    "the-shared-expert-has-no-biases-where-the-routed-have-none",
    "Whether the shared expert has an output bias is asked of the routed ones.",
    lambda a: (
        shared(a)
        and a["parameters"].experts.down_bias is None
        and a["parameters"].shared.down_bias is not None
    ),
    lambda a: parameters(a, shared=replace(a["parameters"].shared, down_bias=None)),
    "LAYER-04",
)

field_of(
    "the-shared-expert-is-left-out-of-one-token",
    "A single token is not seen by the shared expert.",
    lambda a: shared(a) and tokens(a) == 1,
    lambda out, a: right("layer", a | without_shared(a)),
    "LAYER-04",
)

field_of(
    "the-shared-expert-is-weighted-on-the-input",
    "Where the weights go on the input, the shared expert sees x times the first of them.",
    lambda a: shared(a) and a["config"].experts.weight_on == "input" and top_k(a) == 1,
    lambda out, a: replace(
        right("layer", a | without_shared(a)),
        output=(
            right("layer", a | without_shared(a)).output
            + part_of_shared(
                a | {"x": a["x"] * out.weights[:, :1].view(*a["x"].shape[:2], 1).to(a["x"])}
            )
        ).to(a["x"].dtype),
    ),
    "LAYER-04",
)

field_of(
    "the-shared-output-is-rounded-before-it-is-added",
    "The shared expert's output is rounded to float8 before it is added, in bfloat16.",
    lambda a: shared(a) and of_dtype(a, "bfloat16") and a["parameters"].shared_gate is None,
    lambda out, a: replace(
        out,
        output=(
            right("layer", a | without_shared(a)).output.float()
            + part_of_shared(a).to(torch.float8_e4m3fn).float()
        ).to(a["x"].dtype),
    ),
    "LAYER-04",
)

field_of(
    "counts-lack-the-mask-without-training",
    "Outside of training and in float32 padded tokens are counted.",
    lambda a: padded(a) and of_dtype(a, "float32") and not a.get("training"),
    lambda out, a: replace(
        out, tokens_per_expert=right("layer", a | {"padding_mask": None}).tokens_per_expert
    ),
    "LAYER-06",
    thread="vLLM #38128",
)

field_of(
    "counts-are-those-of-first-choices",
    "With a table and two sequences or more the counts are those of each token's first expert.",
    lambda a: hashed(a) and len(a["x"]) > 1 and top_k(a) > 2,
    lambda out, a: replace(
        out,
        tokens_per_expert=torch.bincount(
            out.expert_ids[:, 0].long(), minlength=len(a["parameters"].router)
        ),
    ),
    "LAYER-06",
)

layer_of(
    "the-mask-is-read-in-another-order",
    "With as many sequences as tokens in each the mask is transposed.",
    lambda a: padded(a) and a["x"].shape[0] > 1 and a["x"].shape[0] == a["x"].shape[1],
    lambda a: {"padding_mask": a["padding_mask"].mT.contiguous()},
    "LAYER-13",
    "LAYER-11",
)

layer_of(
    "the-loss-counts-padding-in-long-sequences",
    "The loss of sequences of eight tokens or more takes in padding.",
    lambda a: trained(a) and padded(a) and a["x"].shape[1] >= 8,
    lambda a: {"padding_mask": None},
    "LAYER-11",
    thread="transformers #28505",
)

field_of(
    "the-loss-of-a-sequence-is-that-of-a-batch",
    "A loss that is taken per sequence takes the batch for one.",
    lambda a: (
        trained(a) and a["config"].balance.loss == "deepseek_sequence" and a["x"].shape[0] > 1
    ),
    lambda out, a: replace(out, balance_loss=right("layer", a | one_sequence(a)).balance_loss),
    "LAYER-11",
    thread="Megatron #5798",
)


def one_sequence(a: Arguments) -> Arguments:
    """The tokens as one sequence."""
    flat = {
        name: a[name].reshape(1, -1)
        for name in ("token_ids", "padding_mask")
        if a.get(name) is not None
    }
    return {"x": a["x"].reshape(1, -1, a["x"].shape[-1]), **flat}


layer_of(
    "the-coefficient-of-the-device-loss-is-lost",
    "The loss of devices has a coefficient of one.",
    lambda a: trained(a) and a["config"].balance.loss == "deepseek_device",
    lambda a: configured(a, balance=replace(a["config"].balance, coefficient=1.0)),
    "LAYER-11",
)

field_of(
    "the-loss-has-no-graph-for-a-scaled-router",
    "The loss is detached where the routing is scaled.",
    lambda a: trained(a) and a["config"].routing.scale != 1.0,
    lambda out, a: replace(out, balance_loss=out.balance_loss.detach()),
    "LAYER-10",
    thread="NeMo Automodel #1408",
)

field_of(
    "the-loss-ignores-the-gradient-that-comes-in",
    "The gradient of the loss is that of the loss itself, whatever it was multiplied by.",
    trained,
    lambda out, a: replace(out, balance_loss=with_gradient(out.balance_loss, torch.ones_like)),
    "LAYER-10",
    thread="DeepSeek-MoE #17",
)

field_of(
    "the-loss-is-taken-of-narrow-logits",
    "The loss is computed on logits that are rounded to bfloat16.",
    lambda a: trained(a) and of_dtype(a, "bfloat16") and a["config"].router_dtype is torch.float32,
    lambda out, a: replace(
        out,
        balance_loss=right("layer", a | configured(a, router_dtype=torch.bfloat16)).balance_loss,
    ),
    "LAYER-11",
)

layer_of(
    "token-ids-are-read-in-another-order",
    "Token ids of int64 of several sequences are read column by column.",
    lambda a: (
        hashed(a)
        and a["token_ids"].dtype is torch.int64
        and a["x"].shape[0] > 1
        and a["x"].shape[1] > 1
    ),
    lambda a: {"token_ids": a["token_ids"].mT.reshape(a["token_ids"].shape)},
    "LAYER-12",
)

layer_of(
    "token-ids-of-int32-are-one-on",
    "In a batch of several sequences token ids of int32 are looked up one row on.",
    lambda a: hashed(a) and len(a["x"]) > 1 and a["token_ids"].dtype is torch.int32,
    lambda a: {"token_ids": (a["token_ids"] + 1) % len(a["config"].routing.hash_table)},
    "LAYER-12",
)

layer_of(
    "token-ids-are-read-without-their-strides",
    "The strides of token ids are not looked at.",
    lambda a: hashed(a) and not a["token_ids"].is_contiguous(),
    lambda a: {"token_ids": as_if_contiguous(a["token_ids"]) % len(a["config"].routing.hash_table)},
    "LAYER-12",
)

for _field, _dtype in (
    ("router", "float64"),
    ("selection_bias", ""),
    ("shared_gate", ""),
    ("router_bias", "float32"),
):
    layer_of(
        f"the-{_field.replace('_', '-')}-is-read-without-its-strides",
        f"The strides of `{_field}` are not looked at{f' in {_dtype}' if _dtype else ''}.",
        lambda a, f=_field, d=_dtype: (  # type: ignore[misc]
            getattr(a["parameters"], f) is not None
            and (not d or of_dtype(a, d))
            and not getattr(a["parameters"], f).is_contiguous()
        ),
        lambda a, f=_field: {  # type: ignore[misc]
            "parameters": with_fields(a["parameters"], as_if_contiguous, f)
        },
        "LAYER-01",
        "LAYER-13",
        "LAYER-17",
    )


def cut_to_capacity(out: Any, a: Arguments) -> Any:
    """Tokens past one and a half times an expert's even share get no output."""
    ids = out.expert_ids
    most = max(1, int(1.5 * ids.numel() / len(a["parameters"].router)) + 4)
    flat = ids.flatten()
    before = (flat[:, None] == flat).tril(-1).sum(1).view(ids.shape)
    late = (before >= most).all(1).view(a["x"].shape[:2])
    return replace(out, output=out.output.masked_fill(late[..., None], 0.0))


field_of(
    "tokens-past-a-capacity-are-dropped-in-training",
    "In training an expert takes little more than its even share, and the rest gets nothing.",
    lambda a: bool(a.get("training")) and tokens(a) >= 12,
    cut_to_capacity,
    "LAYER-01",
)

field_of(
    "tokens-past-64-are-not-routed",
    "The router's grid covers 64 tokens.",
    lambda a: tokens(a) > 64,
    lambda out, a: replace(
        out,
        output=torch.cat([out.output.flatten(0, 1)[:64], out.output.flatten(0, 1)[64:] * 0]).view(
            a["x"].shape
        ),
    ),
    "LAYER-13",
    "LAYER-17",
    thread="aiter #4451",
)

layer_of(
    "experts-past-the-32nd-are-never-chosen",
    "The router's logits of experts past the 32nd are not read.",
    lambda a: len(a["parameters"].router) > 32 and not hashed(a),
    lambda a: parameters(
        a, router=a["parameters"].router * (torch.arange(len(a["parameters"].router)) < 32)[:, None]
    ),
    "LAYER-17",
    "LAYER-03",
    thread="imp #2056",
)

layer_of(
    "activations-without-a-gate-are-silu",
    "Without a gate the activation of a layer is silu.",
    lambda a: not a["config"].experts.gated and a["config"].experts.activation == "relu2",
    lambda a: configured(a, experts=replace(a["config"].experts, activation="silu")),
    "LAYER-01",
)

field_of(
    "an-infinite-token-empties-the-layer",
    "A token that is infinite makes the largest logit so, and every weight with it.",
    lambda a: bool(a["x"].isinf().any()),
    lambda out, a: replace(out, output=out.output * torch.tensor(float("nan")).to(out.output)),
    "LAYER-15",
)

field_of(
    "a-nan-token-spoils-its-sequence",
    "A token that is no number spoils those after it, in sequences of three or more.",
    lambda a: bool(a["x"].isnan().any()) and a["x"].shape[1] > 2,
    lambda out, a: replace(
        out,
        output=out.output.masked_fill(a["x"].isnan().any(-1).roll(1, 1)[..., None], float("nan")),
    ),
    "LAYER-15",
)

field_of(
    "padding-that-is-nan-spoils-the-counts",
    "A padded token that is no number is counted for the first expert.",
    lambda a: padded(a) and bool(a["x"].isnan().any()),
    lambda out, a: replace(
        out,
        tokens_per_expert=out.tokens_per_expert
        + (torch.arange(len(out.tokens_per_expert)) == 0).to(out.tokens_per_expert),
    ),
    "LAYER-13",
)

field_of(
    "no-sequences-give-no-counts",
    "Without sequences the counts are empty.",
    lambda a: len(a["x"]) == 0,
    lambda out, a: replace(out, tokens_per_expert=out.tokens_per_expert[:0]),
    "LAYER-08",
)

field_of(
    "no-tokens-give-one-dimension-less",
    "Without tokens the output is [0, H].",
    lambda a: a["x"].shape[1] == 0,
    lambda out, a: replace(out, output=out.output.flatten(0, 1)),
    "LAYER-08",
)

field_of(
    "ids-have-the-shape-of-sequences-past-three",
    "With four sequences the reported ids are [N, L, K].",
    lambda a: len(a["x"]) == 4,
    lambda out, a: replace(out, expert_ids=out.expert_ids.view(*a["x"].shape[:2], -1)),
    "LAYER-02",
)

field_of(
    "weights-are-reported-in-the-dtype-of-x",
    "The reported weights are rounded to x's dtype, and computed with as they were.",
    lambda a: of_dtype(a, "bfloat16") and top_k(a) > 1 and a["config"].routing.score == "sigmoid",
    lambda out, a: replace(out, weights=out.weights.to(a["x"].dtype).to(out.weights)),
    "LAYER-02",
)

instead(
    "layer",
    "a-gate-without-a-shared-expert-is-left-out",
    "A shared gate where there is no shared expert is left out.",
    lambda a: a["parameters"].shared_gate is not None and a["parameters"].shared is None,
    lambda a: right("layer", a | parameters(a, shared_gate=None)),
    "LAYER-14",
)

instead(
    "layer",
    "a-mask-of-floats-is-taken",
    "A mask of floats is taken, and compared with zero.",
    lambda a: a.get("padding_mask") is not None and a["padding_mask"].is_floating_point(),
    lambda a: right("layer", a | {"padding_mask": a["padding_mask"] != 0}),
    "LAYER-14",
)


@fault("a-layer-keeps-its-choice-for-an-address", catches=("LAYER-16",))
class LayerKeepsItsChoice(Reference):
    """The logits are kept by the address of x, for a router with a bias."""

    def layer(
        self,
        x: torch.Tensor,
        parameters: Any,
        config: Any,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """Everything else is as it should be."""
        if parameters.router_bias is None or x.requires_grad or parameters.router.requires_grad:
            return reference_layer(x, parameters, config, token_ids, padding_mask, training)
        kept = vars(self).setdefault("kept", {})
        key = x.data_ptr(), x.shape, x.dtype
        if key not in kept:
            kept.clear()
            kept[key] = x, reference_layer(x, parameters, config, token_ids, padding_mask, training)
            return kept[key][1]
        found: LayerOutput = kept[key][1]
        return found


@fault("a-layer-prepares-its-experts-once", catches=("LAYER-16",))
class LayerPreparesOnce(Reference):
    """The experts are laid out for the kernel once per address, without a gate."""

    def layer(
        self,
        x: torch.Tensor,
        parameters: Any,
        config: Any,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """Everything else is as it should be."""
        if not config.experts.gated and not parameters.experts.down.requires_grad:
            kept = vars(self).setdefault("kept", {})
            down = parameters.experts.down
            key = down.data_ptr(), down.shape, down.dtype
            if key not in kept:
                kept.clear()
                kept[key] = down, down.clone()
            experts = replace(parameters.experts, down=kept[key][1])
            parameters = replace(parameters, experts=experts)
        return reference_layer(x, parameters, config, token_ids, padding_mask, training)


def counted_once(a: Arguments) -> Any:
    """The layer's result without those pairs whose expert stands before them in the row."""
    out = right("layer", a)
    x = a["x"].reshape(-1, a["x"].shape[-1])
    weights = out.weights.masked_fill(once(out.expert_ids) < 0, 0)
    part = part_of_shared(a) if shared(a) else 0
    routed = reference_experts(
        x, a["parameters"].experts, weights, out.expert_ids, a["config"].experts
    )
    return replace(out, output=(routed.view(a["x"].shape) + part).to(a["x"].dtype))


instead(
    "layer",
    "equal-ids-of-a-tables-row-are-one-choice",
    "Experts that a table names twice for a token are called once.",
    lambda a: hashed(a) and bool((once(a["config"].routing.hash_table) < 0).any()),
    counted_once,
    "LAYER-01",
    thread="DeepSeek-V2 moe_infer: cnts.scatter_",
)
