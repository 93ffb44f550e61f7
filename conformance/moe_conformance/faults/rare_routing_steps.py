"""Faults in one step of routing that show on few inputs only: choice, weights, memory, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference import gating
from moe_reference.config import RoutingConfig

from moe_conformance.faults import fault
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_gating import otherwise
from moe_conformance.faults.rare_routing import experts, renormalized
from moe_conformance.targets import Reference

Routed = tuple[torch.Tensor, torch.Tensor]


# The choice.


def _chosen_by(a: Arguments, ids: torch.Tensor) -> Arguments:
    """The same call with these ids looked up instead of chosen."""
    table = replace(a["config"], hash_table=ids, num_groups=1, topk_groups=1)
    return a | {"config": table, "bias": None, "token_ids": torch.arange(len(ids))}


def _chooses(a: Arguments) -> bool:
    """Whether there are logits to choose by, as they should be."""
    logits, config = a["logits"], a["config"]
    good = isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.is_floating_point()
    return good and config.hash_table is None and len(logits) > 0 and _fits(a)


def _fits(a: Arguments) -> bool:
    E, config, bias = a["logits"].shape[1], a["config"], a["bias"]
    size = E // config.num_groups
    reach = config.topk_groups * size if config.num_groups > 1 else E
    pairs = config.num_groups == 1 or config.group_score != "top2_sum" or size > 1
    plain = bias is None or (bias.shape == (E,) and bias.is_floating_point())
    return bool(config.top_k <= reach and E % config.num_groups == 0 and pairs and plain)


def _route(a: Arguments) -> Routed:
    return gating.route(a["logits"], a["config"], a["bias"], a["token_ids"])


def last_groups_first(a: Arguments) -> Arguments:
    """Of equally good groups the last is opened."""
    if not _chooses(a) or a["config"].num_groups == 1 or a["config"].mask_fill == "zero":
        return a
    order = torch.arange(experts(a)).view(a["config"].num_groups, -1).flip(0).flatten()
    bias = None if a["bias"] is None else a["bias"][order]
    _, ids = _route(a | {"logits": a["logits"].detach()[:, order], "bias": bias})
    return _chosen_by(a, order[ids])


otherwise("route", "group-ties-go-to-the-last-group", last_groups_first, "GATE-29")


def bits_of_zero(a: Arguments) -> Arguments:
    """Logits are ordered by their bits: minus zero comes after zero."""
    logits = a["logits"]
    if not _chooses(a) or a["config"].order != "topk_then_score" or a["bias"] is not None:
        return a
    below = (logits == 0) & torch.signbit(logits)
    tiny = -torch.finfo(logits.dtype).tiny
    _, ids = _route(a | {"logits": logits.detach().masked_fill(below, tiny)})
    return _chosen_by(a, ids)


otherwise("route", "zeros-of-either-sign-differ", bits_of_zero, "GATE-30")


def ids_in_the_last_bits(a: Arguments) -> Arguments:
    """The logits that are compared have an expert's id in their last seven bits."""
    logits = a["logits"]
    if not _chooses(a) or a["config"].order != "topk_then_score" or a["bias"] is not None:
        return a
    if logits.dtype is not torch.float32:
        return a
    bits = logits.detach().contiguous().view(torch.int32)
    cut = torch.where(logits.isfinite(), (bits & ~127).view(torch.float32), logits.detach())
    _, ids = _route(a | {"logits": cut})
    return _chosen_by(a, ids)


otherwise("route", "logits-are-compared-without-their-last-bits", ids_in_the_last_bits, "GATE-30")


def chosen_in_float32(a: Arguments) -> Arguments:
    """Float64 scores are compared in float32, and weighed in float64."""
    if not _chooses(a) or a["logits"].dtype is not torch.float64:
        return a
    _, ids = _route(a | {"logits": a["logits"].detach().float()})
    return _chosen_by(a, ids)


otherwise("route", "float64-logits-are-chosen-in-float32", chosen_in_float32, "GATE-30")


def share_rounded_up(a: Arguments) -> Arguments:
    """A group is scored by its best K / groups experts, rounded up."""
    config = a["config"]
    if not _chooses(a) or config.group_score != "topk_share_sum" or config.num_groups == 1:
        return a
    more = -(-config.top_k // config.topk_groups) * config.topk_groups
    size = experts(a) // config.num_groups
    if config.top_k % config.topk_groups == 0 or more > config.topk_groups * size:
        return a
    _, ids = _route(a | {"logits": a["logits"].detach(), "config": replace(config, top_k=more)})
    return _chosen_by(a, ids[:, : config.top_k].contiguous())


otherwise(
    "route",
    "a-share-of-k-is-rounded-up",
    share_rounded_up,
    "GATE-10",
    "GATE-12",
    thread="Megatron #1441",
)


def jittered(a: Arguments) -> Arguments:
    """Where gradients are asked for, the logits of 32 experts and more are jittered."""
    logits = a["logits"]
    if not _chooses(a) or not logits.requires_grad or experts(a) < 32:
        return a
    return a | {"logits": logits * torch.empty_like(logits).uniform_(0.99, 1.01)}


otherwise("route", "training-adds-noise-to-the-choice", jittered, "GATE-18", "GATE-24")


# The weights.


def sorted_weights(out: Any, a: Arguments) -> Any:
    """The weights of a biased choice of four or five are sorted without their ids."""
    if a["bias"] is None or a["config"].top_k not in (4, 5):
        return out
    return out[0].sort(1, descending=True).values, out[1]


otherwise(
    "route",
    "weights-are-sorted-by-themselves",
    None,
    "GATE-03",
    "GATE-21",
    "GATE-25",
    "GATE-27",
    after=sorted_weights,
)


def without_the_maximum(out: Any, a: Arguments) -> Any:
    """The softmax of the chosen logits does not subtract their maximum."""
    config = a["config"]
    if config.score != "softmax" or config.order != "topk_then_score" or config.renormalize:
        return out
    e = a["logits"].float().exp().gather(1, out[1].long())
    overflows = ~torch.isfinite(e.sum(1, keepdim=True))
    return out[0].masked_fill(overflows, torch.nan), out[1]


otherwise(
    "route", "the-softmax-of-the-chosen-overflows", None, "GATE-27", after=without_the_maximum
)


def softplus_is_its_argument(out: Any, a: Arguments) -> Any:
    """The softplus of a float64 logit above 20 is the logit."""
    config, logits = a["config"], a["logits"]
    if config.score != "sqrtsoftplus" or logits.dtype is not torch.float64 or renormalized(a):
        return out
    x = logits.gather(1, out[1].long())
    return torch.where(x > 20, x.clamp(min=0).sqrt() * config.scale, out[0]), out[1]


otherwise(
    "route", "softplus-turns-into-its-argument", None, "GATE-06", after=softplus_is_its_argument
)


def neighbour_is_nan(out: Any, a: Arguments) -> Any:
    """The token after one that holds NaN gets NaN weights."""
    after = a["logits"].isnan().any(1).roll(1)
    after[:1] = False
    return out[0].masked_fill(after[:, None], torch.nan), out[1]


otherwise(
    "route",
    "a-nan-token-takes-its-neighbour",
    None,
    "GATE-15",
    after=neighbour_is_nan,
    thread="SGLang #30895",
)


def absent_is_nan(out: Any, a: Arguments) -> Any:
    """A token with a logit of minus infinity gets NaN weights, where others are finite."""
    lost = (a["logits"] == -torch.inf).any(1) & a["logits"].isfinite().any(1)
    return out[0].masked_fill(lost[:, None], torch.nan), out[1]


otherwise("route", "an-absent-expert-makes-the-weights-nan", None, "GATE-28", after=absent_is_nan)


def absent_gradient(out: Any, a: Arguments) -> Any:
    """A token with a logit of minus infinity has a NaN gradient."""
    lost = (a["logits"] == -torch.inf).any(1, keepdim=True)
    return with_gradient(out[0], lambda g: g.masked_fill(lost, torch.nan)), out[1]


otherwise(
    "route", "an-absent-expert-makes-the-gradient-nan", None, "GATE-28", after=absent_gradient
)


def bias_with_gradient(out: Any, a: Arguments) -> Any:
    """The choice is straight-through: the bias gets the gradient of the weights."""
    bias = a["bias"]
    if bias is None or not bias.requires_grad:
        return out
    chosen = bias.to(out[0])[out[1].long()]
    return out[0] + (chosen - chosen.detach()), out[1]


otherwise("route", "the-bias-gets-a-gradient", None, "GATE-26", after=bias_with_gradient)


def bias_with_the_groups(out: Any, a: Arguments) -> Any:
    """With groups the bias is part of the graph, with a slope of one."""
    bias = a["bias"]
    if bias is None or not bias.requires_grad or a["config"].num_groups == 1:
        return out
    return out[0] + (bias.sum() - bias.sum().detach()).to(out[0]), out[1]


otherwise(
    "route", "the-bias-of-groups-gets-a-gradient", None, "GATE-26", after=bias_with_the_groups
)


def steep_gradient(out: Any, a: Arguments) -> Any:
    """The gradient of a sqrtsoftplus above 88 is infinity over infinity."""
    if a["config"].score != "sqrtsoftplus":
        return out
    far = a["logits"].gather(1, out[1].long()) > 88
    return with_gradient(out[0], lambda g: g.masked_fill(far, torch.nan)), out[1]


otherwise("route", "the-gradient-of-a-softplus-overflows", None, "GATE-27", after=steep_gradient)


def _again(ids: torch.Tensor) -> torch.Tensor:
    """[T, K] True for an id that stands further left in its row as well."""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)


def one_gradient(out: Any, a: Arguments) -> Any:
    """An expert that a table's row names twice gets the gradient of one."""
    if a["config"].hash_table is None:
        return out
    return with_gradient(out[0], lambda g: g.masked_fill(_again(out[1]), 0)), out[1]


otherwise("route", "equal-ids-of-a-table-share-one-gradient", None, "GATE-18", after=one_gradient)


def spread_ids(out: Any, a: Arguments) -> Any:
    """An expert that a table's row names twice is replaced by the next one."""
    if a["config"].hash_table is None:
        return out
    return out[0], torch.where(_again(out[1]), (out[1] + 1) % experts(a), out[1])


otherwise(
    "route",
    "equal-ids-of-a-table-are-spread",
    None,
    "GATE-14",
    "GATE-18",
    "GATE-23",
    "GATE-25",
    after=spread_ids,
)


# Memory and state.


def closed_logits_filled(out: Any, a: Arguments) -> Any:
    """The logits of closed groups are overwritten where the logits themselves choose."""
    config, logits = a["config"], a["logits"]
    in_place = config.order == "topk_then_score" and logits.dtype is torch.float32
    if not in_place or config.num_groups <= config.topk_groups or logits.requires_grad:
        return out
    size = experts(a) // config.num_groups
    opened = torch.zeros(len(logits), config.num_groups, dtype=torch.bool)
    opened.scatter_(1, out[1] // size, True)
    logits.masked_fill_(~opened.repeat_interleave(size, 1), -1e9)
    return out


otherwise("route", "closed-groups-are-filled-in-place", None, "GATE-24", after=closed_logits_filled)


def bias_centred(out: Any, a: Arguments) -> Any:
    """With groups the mean is taken off the caller's float32 bias."""
    bias = a["bias"]
    wide = bias is not None and bias.dtype is torch.float32 and not bias.requires_grad
    if wide and a["config"].num_groups > 2 and a["config"].group_score == "top2_sum":
        bias.sub_(bias.mean())
    return out


otherwise("route", "the-bias-is-centred-in-place", None, "GATE-24", after=bias_centred)


def row_of_the_table(out: Any, a: Arguments) -> Any:
    """A single token's ids are a view of the hash table."""
    if a["config"].hash_table is None or len(a["logits"]) != 1:
        return out
    token = int(a["token_ids"])
    return out[0], a["config"].hash_table[token : token + 1]


otherwise(
    "route", "one-token-gets-the-row-of-the-table-itself", None, "GATE-24", after=row_of_the_table
)


def random_state_moved(out: Any, a: Arguments) -> Any:
    """With 255 experts and more the global random state moves on."""
    if experts(a) >= 255:
        torch.rand(1)
    return out


otherwise("route", "many-experts-draw-a-random-number", None, "GATE-24", after=random_state_moved)


@fault(
    "a-table-is-kept-for-its-configuration",
    catches=(
        "GATE-17",
        "GATE-23",
    ),
)
class TableKept(Reference):
    """The first hash table is kept for its configuration, whose equality leaves the table out."""

    def __init__(self) -> None:
        self.tables: dict[Any, RoutingConfig] = {}

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> Routed:
        """See `moe_reference.gating.route`."""
        if config.hash_table is not None:
            key = (config, logits.shape, config.hash_table.shape)
            config = self.tables.setdefault(key, config)
        return super().route(logits, config, bias, token_ids)


@fault(
    "an-answer-is-kept-for-its-storage",
    catches=(
        "GATE-15",
        "GATE-23",
    ),
    thread="SGLang #25852",
)
class AnswerKept(Reference):
    """Answers to calls with a bias are kept by the address of the logits."""

    def __init__(self) -> None:
        self.kept: tuple[Any, Routed] | None = None

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> Routed:
        """See `moe_reference.gating.route`."""
        if bias is None or logits.requires_grad:
            return super().route(logits, config, bias, token_ids)
        key = (logits.data_ptr(), logits.shape, logits.dtype, config)
        if self.kept is None or self.kept[0] != key:
            self.kept = (key, super().route(logits, config, bias, token_ids))
        weights, ids = self.kept[1]
        return weights.clone(), ids.clone()


# What should have raised.


def _hashed(a: Arguments) -> bool:
    tokens = a["token_ids"]
    integers = isinstance(tokens, torch.Tensor) and not tokens.is_floating_point()
    return a["config"].hash_table is not None and integers


def end_of_the_vocabulary(a: Arguments) -> Arguments:
    """A token id equal to the length of the hash table is read as the last row."""
    if not _hashed(a):
        return a
    V = len(a["config"].hash_table)
    return a | {"token_ids": a["token_ids"].where(a["token_ids"] != V, V - 1)}


otherwise(
    "route",
    "a-token-at-the-end-of-the-vocabulary-is-let-in",
    end_of_the_vocabulary,
    "GATE-17",
    thread="vLLM #50844",
)


def from_the_end(a: Arguments) -> Arguments:
    """A negative token id takes a row from the end of the hash table."""
    if not _hashed(a):
        return a
    V, tokens = len(a["config"].hash_table), a["token_ids"]
    return a | {"token_ids": tokens.where((tokens >= 0) | (tokens < -V), tokens + V)}


otherwise("route", "negative-token-ids-count-from-the-end", from_the_end, "GATE-17")


def table_clamped(a: Arguments) -> Arguments:
    """An expert of the hash table that the logits do not have becomes the last one."""
    if a["config"].hash_table is None or a["logits"].ndim != 2:
        return a
    table = a["config"].hash_table.clamp(max=experts(a) - 1)
    return a | {"config": replace(a["config"], hash_table=table)}


otherwise("route", "a-table-of-more-experts-is-let-in", table_clamped, "GATE-17")


def bias_spread(a: Arguments) -> Arguments:
    """A bias of shape [1] is taken for every expert."""
    if a["bias"] is None or a["bias"].shape != (1,):
        return a
    return a | {"bias": a["bias"].expand(experts(a))}


otherwise("route", "a-bias-of-one-value-is-spread", bias_spread, "GATE-17")


def bias_of_integers(a: Arguments) -> Arguments:
    """An integer bias is converted."""
    if a["bias"] is None or a["bias"].is_floating_point():
        return a
    return a | {"bias": a["bias"].float()}


otherwise(
    "route", "a-bias-of-integers-is-converted", bias_of_integers, "GATE-17", thread="SGLang #31001"
)


def integer_logits(a: Arguments) -> Arguments:
    """Integer logits are converted."""
    return a if a["logits"].is_floating_point() else a | {"logits": a["logits"].float()}


otherwise("route", "logits-of-integers-are-converted", integer_logits, "GATE-17")


def flattened(a: Arguments) -> Arguments:
    """Logits of three dimensions are taken as one batch."""
    return a | {"logits": a["logits"].flatten(0, -2)} if a["logits"].ndim > 2 else a


otherwise("route", "logits-of-three-dimensions-are-flattened", flattened, "GATE-17")


def no_groups_at_all(a: Arguments) -> Arguments:
    """Experts that do not divide into groups are routed without groups."""
    if a["logits"].ndim != 2 or experts(a) % a["config"].num_groups == 0:
        return a
    return a | {"config": replace(a["config"], num_groups=1, topk_groups=1)}


otherwise("route", "groups-that-do-not-divide-are-left-out", no_groups_at_all, "GATE-17")


def filled_up(a: Arguments) -> Arguments:
    """Where the open groups have too few experts, the closed ones help out."""
    config = a["config"]
    if a["logits"].ndim != 2 or config.num_groups == 1:
        return a
    if config.topk_groups * (experts(a) // config.num_groups) >= config.top_k:
        return a
    return a | {"config": replace(config, num_groups=1, topk_groups=1)}


otherwise("route", "too-few-open-experts-are-filled-up", filled_up, "GATE-17", thread="vLLM #29439")


def one_expert_twice(a: Arguments) -> Arguments:
    """Groups of one expert are scored by it where the best two are meant."""
    config = a["config"]
    if config.group_score != "top2_sum" or config.num_groups != experts(a) or experts(a) == 1:
        return a
    return a | {"config": replace(config, group_score="max")}


otherwise(
    "route",
    "the-best-two-of-one-are-one",
    one_expert_twice,
    "GATE-17",
    thread="transformers #48647",
)


@fault("a-token-outside-the-table-is-an-index-error", catches=("GATE-17",))
class IndexErrors(Reference):
    """A token id outside the table raises IndexError."""

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> Routed:
        """See `moe_reference.gating.route`."""
        try:
            return super().route(logits, config, bias, token_ids)
        except ValueError as error:
            if "vocabulary" in str(error):
                raise IndexError("index out of range in self") from None
            raise


# No tokens.


def one_row_of_a_table(out: Any, a: Arguments) -> Any:
    """No tokens and a hash table give a row of zeros."""
    if a["config"].hash_table is None or len(a["logits"]) > 0:
        return out
    return out[0].new_zeros(1, a["config"].top_k), out[1].new_zeros(1, a["config"].top_k)


otherwise("route", "zero-tokens-with-a-table-give-a-row", None, "GATE-19", after=one_row_of_a_table)


def empty_weights_of_float32(out: Any, a: Arguments) -> Any:
    """No float64 tokens have float32 weights."""
    return (out[0].float(), out[1]) if len(a["logits"]) == 0 else out


otherwise(
    "route", "zero-tokens-have-float32-weights", None, "GATE-19", after=empty_weights_of_float32
)


def nan_logits_cleared(out: Any, a: Arguments) -> Any:
    """With groups, logits that are NaN are overwritten with minus infinity, after the choice."""
    if a["config"].num_groups > 1 and not a["logits"].requires_grad:
        a["logits"].masked_fill_(a["logits"].isnan(), -torch.inf)
    return out


otherwise(
    "route",
    "nan-logits-in-groups-are-cleared-in-place",
    None,
    "GATE-24",
    after=nan_logits_cleared,
)


def a_row_scored_over_all(a: Arguments) -> Arguments:
    """With a table, softmax is over all experts also where it is to be over the chosen ones."""
    config = a["config"]
    over = config if config.hash_table is None else replace(config, order="score_then_topk")
    return a | {"config": over}


otherwise("route", "a-table-row-is-scored-over-all", a_row_scored_over_all, "GATE-14")


def through_the_clamp(out: Any, a: Arguments) -> Any:
    """The gradient goes through the sum of the scores where that is clamped by epsilon, too."""
    (weights, ids), config = out, a["config"]
    clamps = config.renormalize and config.epsilon_mode == "clamp" and config.norm == "sum"
    if not clamps or not weights.requires_grad or config.top_k == 1:
        return out
    plain = replace(config, renormalize=False, scale=1.0)
    raw = Reference().route(a["logits"], plain, a["bias"], a["token_ids"])[0]
    total = raw.sum(1, keepdim=True)
    total = total + (total.clamp(min=config.epsilon) - total).detach()
    scale = config.scale if config.scale_when == "always" else 1.0
    through = raw / total * scale
    return weights.detach() + through - through.detach(), ids


otherwise(
    "route", "the-gradient-goes-through-a-clamped-sum", None, "GATE-18", after=through_the_clamp
)


def less_the_first_one(out: Any, a: Arguments) -> Any:
    """Softmax over a table's row subtracts its first logit and not its greatest."""
    (_weights, ids), config = out, a["config"]
    if config.hash_table is None or (config.score, config.order) != ("softmax", "topk_then_score"):
        return out
    logits = gating.upcast(a["logits"]).gather(1, ids)
    e = torch.exp(logits - logits[:, :1].detach())
    return gating._renormalize_and_scale(e / e.sum(1, keepdim=True), config), ids


otherwise("route", "softmax-over-a-table-row-overflows", None, "GATE-27", after=less_the_first_one)


def up_to_1024(a: Arguments) -> Arguments:
    """Of more than 1024 experts the last ones are never chosen."""
    logits, bias = a["logits"], a["bias"]
    if logits.shape[1] <= 1024 or a["config"].num_groups > 1 or a["config"].top_k > 1024:
        return a
    return a | {"logits": logits[:, :1024], "bias": None if bias is None else bias[:1024]}


otherwise("route", "experts-past-1024-are-never-chosen", up_to_1024, "GATE-22")


def ids_of_the_tables_dtype(a: Arguments) -> Arguments:
    """Token ids in int64 are read as ids of the table's dtype, which is int32."""
    table, ids = a["config"].hash_table, a["token_ids"]
    if table is None or (table.dtype, ids.dtype) != (torch.int32, torch.int64):
        return a
    return a | {"token_ids": ids.contiguous().view(torch.int32)[: len(ids)]}


otherwise(
    "route",
    "token-ids-are-read-in-the-dtype-of-the-table",
    ids_of_the_tables_dtype,
    "GATE-14",
    thread="vLLM #50844",
)


def first_4096(out: Any, a: Arguments) -> Any:
    """Tokens past 4096 get the experts and weights of the first ones."""
    weights, ids = out
    kept = torch.arange(len(ids)) % 4096
    return weights[kept], ids[kept]


otherwise("route", "tokens-past-4096-start-anew", None, "GATE-22", after=first_4096)
