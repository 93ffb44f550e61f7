"""Faults of the way that a call goes at large sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.rare import Arguments, tokens
from moe_conformance.faults.rare_alignment import once
from moe_conformance.faults.rare_calls import (
    altered,
    instead,
    right,
    rows_of,
    with_fields,
)


def _full(size: int, block: int) -> int:
    """What whole blocks cover of a size."""
    return size // block * block


def _ended(tensor: torch.Tensor, end: int, dim: int = 0) -> torch.Tensor:
    """Zeros from `end` on."""
    kept = torch.arange(tensor.shape[dim]) < end
    shape = [1] * tensor.ndim
    shape[dim] = -1
    return tensor * kept.view(shape)


def _width(a: Arguments) -> int:
    return int(a["x"].shape[-1])


def _inner(a: Arguments) -> int:
    return int(a["experts"].down.shape[-1])


# Many tokens.

instead(
    "experts",
    "tokens-past-the-last-full-chunk-of-256-get-nothing",
    "More than 256 tokens are taken in chunks, and what does not fill one is left out.",
    lambda a: tokens(a) > 256,
    lambda a: _ended(right("experts", a), _full(tokens(a), 256)),
    "BACKEND-01",
)

altered(
    "experts",
    "the-second-chunk-of-1024-tokens-has-the-weights-of-the-first",
    "The offset of a chunk is added to x and to the ids, and not to the weights.",
    lambda a: tokens(a) > 1024,
    lambda a: {"weights": torch.cat([a["weights"][:1024], a["weights"][: tokens(a) - 1024]])},
    "BACKEND-01",
)


def _rank_of(rows_TK: torch.Tensor) -> torch.Tensor:
    """[T, K], how many pairs of the same expert stand before each."""
    rows = rows_TK.flatten().long()
    order = rows.argsort(stable=True)
    first = torch.searchsorted(rows[order], rows[order])
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(len(rows)) - first
    return rank.view_as(rows_TK)


altered(
    "experts",
    "an-expert-takes-256-rows-at-most",
    "The grid has a fixed number of row blocks for each expert.",
    lambda a: a["weights"].numel() > 256,
    lambda a: {"expert_ids": a["expert_ids"].masked_fill(_rank_of(rows_of(a)) >= 256, -1)},
    "BACKEND-01",
    thread="vLLM #45332",
)

# Wide experts.

altered(
    "experts",
    "the-last-tile-of-h-is-not-read",
    "The sum over H goes in whole tiles of 128, where there is more than one.",
    lambda a: _width(a) > 128 and _width(a) % 128 != 0,
    lambda a: {"x": _ended(a["x"], _full(_width(a), 128), 1)},
    "BACKEND-02",
)

altered(
    "experts",
    "the-last-tile-of-i-is-not-read",
    "The sum over I goes in whole tiles of 256, where there is more than one.",
    lambda a: _inner(a) > 256 and _inner(a) % 256 != 0,
    lambda a: {
        "experts": with_fields(a["experts"], lambda t: _ended(t, _full(_inner(a), 256), 2), "down")
    },
    "BACKEND-02",
)

instead(
    "experts",
    "columns-past-512-are-not-written",
    "The grid has four column blocks of 128.",
    lambda a: _width(a) > 512,
    lambda a: _ended(right("experts", a), 512, 1),
    "BACKEND-02",
)

# Many experts.


def _here(a: Arguments) -> int:
    mapped = a.get("expert_map")
    return len(a["experts"].down) if mapped is None else len(mapped)


def _low_bytes(a: Arguments) -> Any:
    ids = a["expert_ids"]
    return torch.where((ids >= 0) & (ids < _here(a)), ids % 256, ids)


altered(
    "experts",
    "ids-are-kept-in-eight-bits",
    "The sort packs ids into bytes.",
    lambda a: _here(a) > 256,
    lambda a: {"expert_ids": _low_bytes(a)},
    "BACKEND-08",
)

altered(
    "experts",
    "the-table-of-experts-has-512-places",
    "What lies beyond the table is taken for an id that is not here.",
    lambda a: _here(a) > 512,
    lambda a: {"expert_ids": a["expert_ids"].masked_fill(a["expert_ids"] >= 512, -1)},
    "BACKEND-08",
)

# Pairs that are sorted out.


def _past(a: Arguments, end: int) -> Any:
    """[T, 1], whether a token stands behind the first `end`."""
    return (torch.arange(tokens(a)) >= end)[:, None]


altered(
    "experts",
    "padding-past-token-128-goes-to-the-last-expert",
    "Ids of -1 are sorted out in the first block of 128 tokens; in the next they are an index.",
    lambda a: tokens(a) > 128 and a.get("expert_map") is None,
    lambda a: {
        "expert_ids": torch.where(
            _past(a, 128) & (a["expert_ids"] == -1), len(a["experts"].down) - 1, a["expert_ids"]
        ).to(a["expert_ids"])
    },
    "BACKEND-10",
)


def _as_local(a: Arguments) -> Any:
    """Ids that the map leads to the row that has the number of the id."""
    ids, rows = a["expert_ids"].long(), a["expert_map"].long()
    back = torch.full((len(a["experts"].down),), -1)
    back[rows[rows >= 0]] = (rows >= 0).nonzero()[:, 0]
    here = (ids >= 0) & (ids < len(back))
    return torch.where(here, back[ids.where(here, 0)], -1).to(a["expert_ids"])


altered(
    "experts",
    "past-token-256-ids-are-taken-as-local",
    "The second block of 256 tokens is handed on without the map.",
    lambda a: tokens(a) > 256 and a.get("expert_map") is not None,
    lambda a: {"expert_ids": torch.where(_past(a, 256), _as_local(a), a["expert_ids"])},
    "BACKEND-10",
)

altered(
    "experts",
    "many-tokens-count-equal-ids-once",
    "From 512 tokens on pairs are found in a mask [T, E].",
    lambda a: tokens(a) >= 512,
    lambda a: {"expert_ids": once(a["expert_ids"])},
    "BACKEND-10",
)

altered(
    "experts",
    "a-map-is-looked-up-by-the-low-byte",
    "Ids are bytes until the map has made them local.",
    lambda a: a.get("expert_map") is not None and _here(a) > 256,
    lambda a: {"expert_ids": _low_bytes(a)},
    "BACKEND-10",
)

altered(
    "experts",
    "the-gradient-of-down-has-256-places",
    "Gradients of the second matrix are added up in 256 bins.",
    lambda a: len(a["experts"].down) > 256,
    lambda a: {
        "experts": with_fields(
            a["experts"], lambda t: with_gradient(t, lambda g: _ended(g, 256)), "down"
        )
    },
    "BACKEND-11",
)

altered(
    "experts",
    "weights-past-token-512-get-a-gradient-where-nothing-is",
    "The dot products of pairs that are not here are left out of the first block only.",
    lambda a: tokens(a) > 512,
    lambda a: {
        "weights": with_gradient(
            a["weights"], lambda g: torch.where(_past(a, 512) & (rows_of(a) < 0), 1.0, g).to(g)
        )
    },
    "BACKEND-11",
)

# Gradients.


def _without_parameters_gradient(a: Arguments) -> Any:
    end = _full(tokens(a), 128)
    fixed = a | {"experts": with_fields(a["experts"], torch.Tensor.detach)}
    early = (torch.arange(tokens(a)) < end)[:, None]
    return torch.where(early, right("experts", a), right("experts", fixed))


instead(
    "experts",
    "gradients-of-the-experts-miss-the-last-tile-of-rows",
    "The gradient of an expert's matrices is a sum over whole tiles of 128 tokens.",
    lambda a: tokens(a) > 128 and tokens(a) % 128 != 0,
    _without_parameters_gradient,
    "BACKEND-03",
)

altered(
    "experts",
    "the-gradient-of-a-wide-x-is-cut-at-256",
    "The backward pass has two column blocks of 128.",
    lambda a: _width(a) > 256,
    lambda a: {"x": with_gradient(a["x"], lambda gradient: _ended(gradient, 256, 1))},
    "BACKEND-03",
)

# Batches.

instead(
    "experts_batched",
    "rows-of-a-batch-past-512-stay-zero",
    "The grid has four row blocks of 128 for each expert.",
    lambda a: a["x"].shape[1] > 512,
    lambda a: _ended(right("experts_batched", a), 512, 1),
    "BACKEND-04",
)

altered(
    "experts_batched",
    "the-last-tile-of-a-wide-batch-is-not-read",
    "The sum over H goes in whole tiles of 64, where there is more than one.",
    lambda a: _width(a) > 64 and _width(a) % 64 != 0,
    lambda a: {"x": _ended(a["x"], _full(_width(a), 64), 2)},
    "BACKEND-04",
)

# Layers.


def _parameters(a: Arguments, **changed: Any) -> Arguments:
    return {"parameters": dataclasses.replace(a["parameters"], **changed)}


altered(
    "layer",
    "a-long-prompt-has-no-shared-expert",
    "The way for more than 256 tokens does not know of the shared expert.",
    lambda a: tokens(a) > 256 and a["parameters"].shared is not None,
    lambda a: _parameters(
        a, shared=with_fields(a["parameters"].shared, torch.zeros_like), shared_gate=None
    ),
    "BACKEND-05",
)


def _second_half_of_the_first(a: Arguments) -> Any:
    result = right("layer", a)
    flat = result.output.flatten(0, -2)
    output = torch.cat([flat[:512], flat[: len(flat) - 512]]).view_as(result.output)
    return dataclasses.replace(result, output=output)


instead(
    "layer",
    "tokens-past-512-get-the-output-of-the-first",
    "The pointer to the output of the second chunk is that of the first.",
    lambda a: 512 < tokens(a) <= 1024,
    _second_half_of_the_first,
    "BACKEND-05",
)

altered(
    "layer",
    "the-router-reads-512-columns",
    "The router's kernel holds a row of x in registers, and there are 512 of them.",
    lambda a: _width(a) > 512,
    lambda a: _parameters(a, router=_ended(a["parameters"].router, 512, 1)),
    "BACKEND-06",
)

altered(
    "layer",
    "the-last-tile-of-the-shared-expert-is-not-read",
    "The shared expert goes in whole tiles of 128, where there is more than one.",
    lambda a: (
        a["parameters"].shared is not None
        and a["parameters"].shared.down.shape[-1] > 128
        and a["parameters"].shared.down.shape[-1] % 128 != 0
    ),
    lambda a: _parameters(
        a,
        shared=with_fields(
            a["parameters"].shared, lambda t: _ended(t, _full(t.shape[-1], 128), 2), "down"
        ),
    ),
    "BACKEND-06",
)

# Packed experts.

altered(
    "experts_quantized",
    "packed-experts-take-128-rows-of-an-expert-at-most",
    "The kernel that unpacks in the product has one row block.",
    lambda a: a["weights"].numel() > 128,
    lambda a: {"expert_ids": a["expert_ids"].masked_fill(_packed_rank(a) >= 128, -1)},
    "BACKEND-09",
)


def _packed_rank(a: Arguments) -> torch.Tensor:
    ids = a["expert_ids"]
    if a.get("expert_map") is not None:
        ids = a["expert_map"].long()[ids.clamp(0, len(a["expert_map"]) - 1).long()]
    return _rank_of(ids)


instead(
    "experts_quantized",
    "many-tokens-of-packed-experts-end-at-the-last-full-tile",
    "From 64 tokens on they go in whole tiles of 16.",
    lambda a: tokens(a) > 64,
    lambda a: _ended(right("experts_quantized", a), _full(tokens(a), 16)),
    "BACKEND-09",
)

# Rows, choices and experts that there are more of.

instead(
    "combine",
    "columns-of-a-sum-past-1024-are-not-written",
    "The grid has eight column blocks of 128.",
    lambda a: a["rows"].shape[-1] > 1024,
    lambda a: _ended(right("combine", a), 1024, 1),
    "DISPATCH-16",
)

altered(
    "combine",
    "choices-past-the-32nd-add-nothing",
    "A warp has a lane for each choice of a token.",
    lambda a: a["weights"].shape[-1] > 32,
    lambda a: {"weights": _ended(a["weights"], 32, 1)},
    "DISPATCH-12",
)


instead(
    "layer",
    "the-weights-of-a-long-batch-are-those-of-its-last-chunk",
    "More than 256 tokens go chunk by chunk, and the weights of a chunk take the same place.",
    lambda a: tokens(a) > 256,
    lambda a: _weights_of_the_last(a, 256),
    "BACKEND-05",
)

instead(
    "layer",
    "the-counts-of-a-long-batch-are-those-of-its-first-chunk",
    "More than 512 tokens are routed in chunks, and counted once.",
    lambda a: tokens(a) > 512 and a.get("padding_mask") is None,
    lambda a: _counts_of_the_first(a, 512),
    "BACKEND-05",
)


altered(
    "experts",
    "experts-take-32-choices-of-a-token-at-most",
    "A warp has a lane for each choice of a token.",
    lambda a: a["weights"].shape[-1] > 32,
    lambda a: {"weights": _ended(a["weights"], 32, 1)},
    "EXPERT-09",
)


def _weights_of_the_last(a: Arguments, block: int) -> Any:
    out = right("layer", a)
    weights = torch.cat([out.weights[-block:], out.weights[block:]])
    return dataclasses.replace(out, weights=weights)


def _counts_of_the_first(a: Arguments, end: int) -> Any:
    out = right("layer", a)
    counts = torch.bincount(out.expert_ids[:end].flatten(), minlength=len(out.tokens_per_expert))
    return dataclasses.replace(out, tokens_per_expert=counts.to(out.tokens_per_expert))


altered(
    "align_batched",
    "a-batch-of-more-than-512-experts-is-not-looked-through",
    "The table of counts has 512 places.",
    lambda a: len(a["tokens_per_expert"]) > 512,
    lambda a: {"tokens_per_expert": _ended(a["tokens_per_expert"], 512)},
    "ALIGN-21",
)

instead(
    "experts",
    "without-tokens-and-with-a-map-there-is-no-graph-to-the-experts",
    "A rank that holds some of the experts returns early where no token came.",
    lambda a: tokens(a) == 0 and a.get("expert_map") is not None,
    lambda a: a["x"] * 1,
    "EXPERT-30",
)
