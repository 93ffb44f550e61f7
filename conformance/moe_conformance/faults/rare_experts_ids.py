"""Rare faults of experts: sizes past a limit or off a tile, ids and maps."""

from __future__ import annotations

from typing import Any

import torch

from moe_conformance.faults.rare import Arguments, tokens, top_k
from moe_conformance.faults.rare_calls import (
    altered,
    counts_of,
    instead,
    right,
    rows_of,
    with_fields,
)


def held(a: Arguments) -> int:
    """Experts that there are weights of."""
    return len(a["experts"].down)


def hidden(a: Arguments) -> int:
    """H."""
    return int(a["x"].shape[-1])


def width(a: Arguments) -> int:
    """I."""
    return int(a["experts"].down.shape[2])


def mapped(a: Arguments) -> bool:
    """Whether there is an expert map."""
    return a.get("expert_map") is not None


def columns_not_here(a: Arguments, columns: slice) -> Arguments:
    """Some of a token's pairs are not here."""
    ids = a["expert_ids"].clone()
    ids[:, columns] = -1
    return {"expert_ids": ids}


def pairs_not_here(a: Arguments, lost: torch.Tensor) -> Arguments:
    """The pairs of a mask [T, K] are not here."""
    return {"expert_ids": a["expert_ids"].masked_fill(lost, -1)}


def rank_in_expert(a: Arguments) -> torch.Tensor:
    """[T, K], how many pairs of the same expert come before."""
    rows = rows_of(a).flatten()
    same = rows[:, None] == rows
    return same.tril(-1).sum(1).view(a["expert_ids"].shape)


def last_of_full_tiles(a: Arguments) -> torch.Tensor:
    """[T, K], the last pair of each expert that has a multiple of 32."""
    counts = counts_of(a)
    rows = rows_of(a)
    full = (rows >= 0) & (counts[rows.clamp(min=0)] % 32 == 0) if held(a) else rows >= 0
    last = rank_in_expert(a) == counts[rows.clamp(min=0)] - 1 if held(a) else full
    return full & last


altered(
    "experts",
    "the-last-of-an-odd-number-of-pairs-is-lost",
    "The sum over a token's experts takes two at a time: from seven on, the last odd one is lost.",
    lambda a: top_k(a) >= 7 and top_k(a) % 2 == 1,
    lambda a: columns_not_here(a, slice(-1, None)),
    "EXPERT-01",
)

altered(
    "experts",
    "pairs-past-the-eighth-are-lost",
    "There is room for eight pairs per token, and those past it are not summed.",
    lambda a: top_k(a) > 8,
    lambda a: columns_not_here(a, slice(8, None)),
    "EXPERT-01",
)

altered(
    "experts",
    "experts-past-the-32nd-get-no-tokens",
    "The counts of a warp's 32 experts are taken, and the experts past them get no tokens.",
    lambda a: held(a) > 32 and not mapped(a),
    lambda a: pairs_not_here(a, a["expert_ids"] >= 32),
    "EXPERT-01",
)

altered(
    "experts",
    "experts-past-the-64th-get-no-tokens",
    "There are 64 bins to count in, and the experts past them get no tokens.",
    lambda a: held(a) > 64 and not mapped(a),
    lambda a: pairs_not_here(a, a["expert_ids"] >= 64),
    "EXPERT-01",
)

altered(
    "experts",
    "pairs-past-64-of-an-expert-are-lost",
    "An expert has room for 64 pairs, and what comes after them is dropped.",
    lambda a: bool((counts_of(a) > 64).any()),
    lambda a: pairs_not_here(a, (rank_in_expert(a) >= 64) & (rows_of(a) >= 0)),
    "EXPERT-01",
)

altered(
    "experts",
    "the-last-pair-of-full-tiles-is-lost",
    "An expert with exactly as many pairs as fill its tiles of 32 loses the last one.",
    lambda a: bool(last_of_full_tiles(a).any()),
    lambda a: pairs_not_here(a, last_of_full_tiles(a)),
    "EXPERT-01",
)

altered(
    "experts",
    "a-tile-with-one-token-is-skipped",
    "With one token more than fills the tiles of 32, the last token gets no output.",
    lambda a: tokens(a) > 32 and tokens(a) % 32 == 1,
    lambda a: pairs_not_here(
        a, torch.arange(tokens(a))[:, None].expand(a["expert_ids"].shape) == tokens(a) - 1
    ),
    "EXPERT-01",
)

altered(
    "experts",
    "the-last-hidden-column-is-not-read-one-over-a-tile",
    "With one column more than fills the tiles of 16, the first product leaves the last one out.",
    lambda a: hidden(a) > 16 and hidden(a) % 16 == 1,
    lambda a: {"x": torch.cat([a["x"][:, :-1], a["x"][:, -1:] * 0], 1)},
    "EXPERT-01",
)

altered(
    "experts",
    "the-last-intermediate-row-is-not-read-one-under-a-tile",
    "With one row less than fills the tiles of 16, the second product leaves the last one out.",
    lambda a: width(a) % 16 == 15,
    lambda a: {
        "experts": with_fields(
            a["experts"], lambda t: torch.cat([t[..., :-1], t[..., -1:] * 0], -1), "down"
        )
    },
    "EXPERT-01",
)

altered(
    "experts",
    "an-id-wraps-where-experts-are-a-power-of-two",
    "With a power of two of experts the id is masked, so that one past them is one of them.",
    lambda a: held(a) in (2, 4, 8, 16, 32, 64) and not mapped(a),
    lambda a: {
        "expert_ids": torch.where(
            a["expert_ids"] >= held(a), a["expert_ids"] & (held(a) - 1), a["expert_ids"]
        )
    },
    "EXPERT-20",
)

altered(
    "experts",
    "an-id-below-minus-one-counts-from-the-end",
    "Only -1 is taken for not here; an id below it indexes from the end.",
    lambda a: held(a) > 0 and not mapped(a),
    lambda a: {
        "expert_ids": torch.where(
            a["expert_ids"] < -1, a["expert_ids"] % max(held(a), 1), a["expert_ids"]
        )
    },
    "EXPERT-20",
    "EXPERT-27",
)

altered(
    "experts",
    "an-id-equal-to-the-number-of-experts-is-the-last",
    "An id of E is clamped to the last expert, where ids are int32.",
    lambda a: a["expert_ids"].dtype is torch.int32 and not mapped(a) and held(a) > 0,
    lambda a: {
        "expert_ids": torch.where(
            a["expert_ids"] == held(a),
            torch.full_like(a["expert_ids"], held(a) - 1),
            a["expert_ids"],
        )
    },
    "EXPERT-20",
    "EXPERT-27",
)

altered(
    "experts",
    "ids-are-cut-to-32-bits",
    "Ids of int64 are cut to 32 bits, and one beyond them is one of the experts.",
    lambda a: a["expert_ids"].dtype is torch.int64,
    lambda a: {"expert_ids": a["expert_ids"].to(torch.int32)},
    "EXPERT-20",
    "EXPERT-27",
)

altered(
    "experts",
    "ids-are-cut-to-8-bits",
    "Ids of int32 are kept in a byte, and one of 256 or more is another expert's.",
    lambda a: held(a) <= 256 and a["expert_ids"].dtype is torch.int32,
    lambda a: {
        "expert_ids": torch.where(a["expert_ids"] >= 256, a["expert_ids"] & 255, a["expert_ids"])
    },
    "EXPERT-20",
    "EXPERT-27",
)


def as_range(a: Arguments) -> Arguments:
    """The map as the range from the first expert that is here."""
    here = (a["expert_map"] >= 0).nonzero()[:, 0]
    local = torch.arange(len(a["expert_map"])) - here[0]
    inside = (local >= 0) & (local < min(held(a), len(here)))
    return {"expert_map": local.where(inside, -1).to(a["expert_map"].dtype)}


altered(
    "experts",
    "a-map-is-taken-for-a-range",
    "Of a map of int32 only the first expert that is here and how many are looked at.",
    lambda a: (
        mapped(a)
        and a["expert_map"].dtype is torch.int32
        and bool((a["expert_map"] >= 0).any())
        and held(a) > 0
    ),
    as_range,
    "EXPERT-08",
)

altered(
    "experts",
    "global-ids-are-held-against-the-local-experts",
    "With a map, an id at or above the number of the experts held counts as not here.",
    mapped,
    lambda a: pairs_not_here(a, a["expert_ids"] >= held(a)),
    "EXPERT-08",
)

altered(
    "experts",
    "a-map-of-int64-is-read-as-int32",
    "A map of int64 is read as int32: every other entry is the upper half of a number.",
    lambda a: mapped(a) and a["expert_map"].dtype is torch.int64 and held(a) > 0,
    lambda a: {
        "expert_map": a["expert_map"]
        .contiguous()
        .view(torch.int32)[: len(a["expert_map"])]
        .clamp(max=held(a) - 1)
    },
    "EXPERT-08",
)

instead(
    "experts",
    "a-rank-that-nothing-goes-to-gives-x",
    "Where no pair is here the output is never written, and holds what x did.",
    lambda a: not bool((rows_of(a) >= 0).any()),
    lambda a: right("experts", a) + a["x"],
    "EXPERT-20",
    "EXPERT-07",
)

instead(
    "experts",
    "an-infinite-weight-of-a-pair-not-here-counts",
    "The output of a pair that is not here is zero, and is multiplied with its weight.",
    lambda a: bool(((rows_of(a) < 0) & a["weights"].isinf()).any()),
    lambda a: (
        right("experts", a)
        + (a["weights"] * 0).where(rows_of(a) < 0, 0).sum(1, keepdim=True).to(a["x"].dtype)
    ),
    "EXPERT-07",
)

instead(
    "experts",
    "a-token-that-goes-nowhere-is-multiplied-by-zero",
    "A token none of whose pairs is here gives x times zero, which of infinity is no zero.",
    lambda a: bool((rows_of(a) < 0).all(1).any()),
    lambda a: right("experts", a) + (a["x"] * 0).where((rows_of(a) < 0).all(1, keepdim=True), 0),
    "EXPERT-17",
)


def dense(a: Arguments) -> Any:
    """Every expert on every token, times zero where it was not chosen."""
    unread = a["experts"].down.double().sum() * 0
    return right("experts", a) + unread.to(a["x"].dtype)


instead(
    "experts",
    "experts-nobody-chose-are-multiplied-by-zero",
    "Up to four tokens go through every expert, and those not chosen are multiplied by zero.",
    lambda a: tokens(a) <= 4,
    dense,
    "EXPERT-19",
)

altered(
    "experts",
    "ids-are-not-read-with-one-expert",
    "With a single expert the ids are not looked at, and no pair is ever not here.",
    lambda a: held(a) == 1 and not mapped(a),
    lambda a: {"expert_ids": torch.zeros_like(a["expert_ids"])},
    "EXPERT-20",
    "EXPERT-07",
)

altered(
    "experts",
    "as-many-pairs-as-experts-are-taken-in-order",
    "With as many pairs as experts each is taken to go to the expert of its own number.",
    lambda a: 1 < held(a) == top_k(a) and not mapped(a),
    lambda a: {
        "expert_ids": torch.arange(held(a)).to(a["expert_ids"]).expand(a["expert_ids"].shape)
    },
    "EXPERT-01",
)

altered(
    "experts",
    "a-square-down-is-taken-for-transposed",
    "In bfloat16, where H is I nothing tells how down is laid out, and it is taken for [E, I, H].",
    lambda a: hidden(a) == width(a) > 1 and a["x"].dtype is torch.bfloat16,
    lambda a: {"experts": with_fields(a["experts"], lambda t: t.mT, "down")},
    "EXPERT-01",
    thread="vLLM #47874",
)

altered(
    "experts",
    "a-square-gate-up-is-taken-for-transposed",
    "In float16 a square gate_up, which does not tell how it is laid out, is read the other way.",
    lambda a: a["experts"].gate_up.shape[1] == hidden(a) > 1 and a["x"].dtype is torch.float16,
    lambda a: {"experts": with_fields(a["experts"], lambda t: t.mT, "gate_up")},
    "EXPERT-20",
    "EXPERT-05",
    thread="vLLM #47874",
)

altered(
    "experts",
    "the-second-chunk-of-tokens-has-the-weights-of-the-first",
    "Tokens go in chunks of 64, and every chunk takes the routing weights of the first.",
    lambda a: tokens(a) > 64,
    lambda a: {"weights": a["weights"][torch.arange(tokens(a)) % 64]},
    "EXPERT-01",
)

altered(
    "experts",
    "an-expert-with-all-tokens-has-the-next-ones-weights",
    "One expert that has every pair of more than eight tokens is read one row too far.",
    lambda a: held(a) > 1 and tokens(a) > 8 and bool((counts_of(a) == rows_of(a).numel()).any()),
    lambda a: {"experts": with_fields(a["experts"], lambda t: t.roll(-1, 0))},
    "EXPERT-01",
)

altered(
    "experts",
    "of-three-equal-ids-one-is-lost",
    "Of equal ids in a row the first two are summed.",
    lambda a: top_k(a) >= 3,
    lambda a: pairs_not_here(
        a,
        (a["expert_ids"][:, :, None] == a["expert_ids"][:, None]).tril(-1).sum(2) >= 2,
    ),
    "EXPERT-01",
)
