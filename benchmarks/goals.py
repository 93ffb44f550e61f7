"""What the fast versions are to reach on one H200, and what a record says of it.

Read by `gpu.py` and by the page about performance; nothing here needs torch. A goal that no row of
the record speaks about is *not measured*; where several rows do, the furthest from the goal counts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

OURS = "moespec"
NOT_MEASURED = "not measured"
Row = Mapping[str, Any]

MIXTRAL, QWEN, OLMOE, LARGE = "Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "Qwen3-235B-A22B"
SPARSE = ("DeepSeek-V3", "Kimi-K2", "gpt-oss-120b")
DECODED = (MIXTRAL, LARGE, "gpt-oss-20b", *SPARSE)


class Goal(NamedTuple):
    """A line of the table.

    Attributes:
        work: what is measured.
        shapes: where, for a reader.
        value: a row's figure, or None where the row says nothing about it.
        unit: how the figure is written.
        limits: must, good, record try.
        peers: the least ratio of each peer's time to ours that must be reached, by peer.
        least: the figure has to be at least the limit, not at most.
    """

    work: str
    shapes: str
    value: Callable[[Row, Row], float | None]
    unit: str
    limits: tuple[float, ...]
    peers: Mapping[str, float]
    least: bool = True


def _at(kind: str, tokens: Callable[[int], bool], models: tuple[str, ...]) -> Callable[[Row], bool]:
    return lambda row: (
        row["kind"] == kind
        and row["routing"] == "uniform"
        and row["model"] in models
        and tokens(row["T"])
    )


def way_of(row: Row) -> str:
    """The way of timing that counts: few tokens and small kernels without what the host takes."""
    if row["kind"] in ("topk", "align"):
        return "warm"
    return "graph" if row["T"] <= 512 else "eager"


def our_times(row: Row) -> Row | None:
    """Our times in the way that counts, or None."""
    return row.get("ways", {}).get(way_of(row), {}).get(OURS)


def _figure(
    here: Callable[[Row], bool], of: Callable[[Row, float, Row], float]
) -> Callable[[Row, Row], float | None]:
    """A figure of our seconds, of the rows that it is about."""

    def value(row: Row, ceilings: Row) -> float | None:
        ours = our_times(row) if here(row) else None
        return None if ours is None else of(row, ours["us"] / 1e6, ceilings)

    return value


def _of_dense(here: Callable[[Row], bool]) -> Callable[[Row, Row], float | None]:
    return _figure(here, lambda row, s, ceilings: row["flops"] / s / ceilings["dense_flops"])


def _of_copy(here: Callable[[Row], bool]) -> Callable[[Row, Row], float | None]:
    return _figure(here, lambda row, s, ceilings: row["bytes"] / s / ceilings["copy_bytes"])


def _of_floor(here: Callable[[Row], bool]) -> Callable[[Row, Row], float | None]:
    return _figure(here, lambda row, s, _: row["floor_us"] / 1e6 / s)


def _over_floor(here: Callable[[Row], bool]) -> Callable[[Row, Row], float | None]:
    return _figure(here, lambda row, s, _: 1e6 * s / row["floor_us"])


def _microseconds(here: Callable[[Row], bool]) -> Callable[[Row, Row], float | None]:
    return _figure(here, lambda _row, s, _: 1e6 * s)


def _kept(row: Row, ceilings: Row) -> float | None:
    if row["kind"] != "memory" or OURS not in row["implementations"]:
        return None
    return row["implementations"][OURS]["kept_bytes"] / row["kept_at_most"]


def _touching(row: Row) -> bool:
    """At least 0.4 GB of matrices are read."""
    shape = _at("forward", lambda T: 8 <= T <= 64, (*DECODED, QWEN, OLMOE))
    return shape(row) and 6 * row["touched"] * row["H"] * row["I"] >= 4e8


def _prefill(row: Row) -> bool:
    return _at("forward", lambda T: T >= 4096, (MIXTRAL,))(row) or _at(
        "forward", lambda T: T == 16384, (LARGE,)
    )(row)


def _packed(kind: str) -> Callable[[Row, Row], float | None]:
    """How many times faster than our own with the same weights unpacked."""

    def value(row: Row, ceilings: Row) -> float | None:
        return ratio_to(row, "unpacked") if row["kind"] == kind else None

    return value


TRAINED = {"liger": 1.3, "scattermoe": 1.4}
GOALS = (
    Goal(
        "Grouped product alone", "512 rows per expert or more: Mixtral, Qwen3-30B, T 16384",
        _of_dense(_at("grouped_gemm", lambda T: T == 16384, (MIXTRAL, QWEN))),
        "of dense", (0.70, 0.78, 0.85), {"grouped_mm": 1.0},
    ),
    Goal(
        "Forward, prefill, I of 1536 or more", "Mixtral T 4096 and more, Qwen3-235B T 16384",
        _of_dense(_prefill), "of dense", (0.58, 0.65, 0.72),
        {"vllm": 1.05, "scattermoe": 1.5, "grouped_mm": 1.3},
    ),
    Goal(
        "Forward, prefill, fine-grained", "Qwen3-30B, OLMoE, T 16384",
        _of_dense(_at("forward", lambda T: T == 16384, (QWEN, OLMOE))),
        "of dense", (0.45, 0.55, 0.62),
        {"liger": 1.2, "vllm": 1.1, "scattermoe": 1.5, "grouped_mm": 1.6},
    ),
    Goal(
        "Forward, in between", "DeepSeek-V3, Kimi-K2, gpt-oss-120b, T 512 and 4096",
        _of_floor(_at("forward", lambda T: T in (512, 4096), SPARSE)),
        "of floor", (0.60, 0.72, 0.80), {"vllm": 1.1},
    ),
    Goal(
        "Decode, 0.4 GB touched or more", "T 8 to 64", _of_copy(_touching), "of copy",
        (0.70, 0.82, 0.90), {"vllm": 1.0, "batched_mm": 3.0},
    ),
    Goal(
        "Decode, T 1, an expert of 35 MB or more", "Mixtral, DeepSeek-V3, Kimi-K2, gpt-oss, "
        "Qwen3-235B", _of_copy(_at("forward", lambda T: T == 1, DECODED)), "of copy",
        (0.60, 0.75, 0.85), {"vllm": 1.05},
    ),
    Goal(
        "Decode, T 1, small experts", "Qwen3-30B, OLMoE",
        _over_floor(_at("forward", lambda T: T == 1, (QWEN, OLMOE))), "times the floor",
        (2.2, 1.7, 1.4), {"vllm": 1.1}, least=False,
    ),
    Goal(
        "Backward, fine-grained", "Qwen3-30B, OLMoE, T 16384",
        _of_dense(_at("backward", lambda T: T == 16384, (QWEN, OLMOE))),
        "of dense", (0.35, 0.45, 0.52), TRAINED,
    ),
    Goal(
        "Backward, I of 1536 or more", "Mixtral, Qwen3-235B, T 16384",
        _of_dense(_at("backward", lambda T: T == 16384, (MIXTRAL, LARGE))),
        "of dense", (0.45, 0.52, 0.60), TRAINED,
    ),
    Goal(
        "Kept for the backward", "x, pre-activations and routing data", _kept, "of that",
        (1.0, 1.0, 1.0), {"liger": 1.0, "scattermoe": 1.0}, least=False,
    ),
    Goal(
        "Decode, FP8 weights", "T 1 to 64, activations in FP8", _packed("fp8"),
        "times the rate of bfloat16", (1.5, 1.75, 1.9), {},
    ),
    Goal(
        "Decode, 4-bit weights", "T 1 to 64", _packed("w4a16"), "times the rate of bfloat16",
        (1.8, 2.4, 3.0), {},
    ),
    Goal(
        "Top-k, T 1", "E 128 and 256",
        _microseconds(_at("topk", lambda T: T == 1, ("E 128", "E 256"))), "µs", (4.0, 2.5, 2.0),
        {"torch": 5.0}, least=False,
    ),
    Goal(
        "Top-k, T 16384", "E 128 and 256",
        _microseconds(_at("topk", lambda T: T == 16384, ("E 128", "E 256"))), "µs",
        (30.0, 22.0, 13.0), {"torch": 5.0}, least=False,
    ),
    Goal(
        "Alignment, 4096 slots", "E 128", _microseconds(_at("align", lambda T: T == 512,
        ("E 128",))), "µs", (12.0, 6.0, 4.0), {"torch": 3.0}, least=False,
    ),
    Goal(
        "Alignment, 131072 slots", "E 128", _microseconds(_at("align", lambda T: T == 16384,
        ("E 128",))), "µs", (40.0, 20.0, 12.0), {"torch": 3.0}, least=False,
    ),
    Goal(
        "Gather-and-sum", "Mixtral, Qwen3-30B, T 4096 and more",
        _of_copy(_at("gather_sum", lambda T: T >= 4096, (MIXTRAL, QWEN))), "of copy",
        (0.80, 0.90, 0.95), {},
    ),
)  # fmt: skip


class Found(NamedTuple):
    """What a record says of a goal.

    Attributes:
        goal: the line.
        rows: how many rows speak about it.
        worst: the figure furthest from the goal, or None.
        reached: how many of must, good and record try the worst figure reaches.
        ratios: the least ratio to each peer that the goal names, where it was measured.
    """

    goal: Goal
    rows: int
    worst: float | None
    reached: int
    ratios: dict[str, float]


def found(goal: Goal, record: Row | None) -> Found:
    """Evaluate a goal on a record of `gpu.py`; None, or a dry run, has measured nothing."""
    if record is None or record["dry_run"]:
        return Found(goal, 0, None, 0, {})
    values, ratios = [], {}
    for row in record["rows"]:
        value = goal.value(row, record["ceilings"])
        if value is None:
            continue
        values.append(value)
        for name in goal.peers:
            if name == "batched_mm" and row["T"] != 64:
                continue
            ratio = ratio_to(row, name)
            if ratio is not None:
                ratios[name] = min(ratios.get(name, ratio), ratio)
    if not values:
        return Found(goal, 0, None, 0, {})
    worst = min(values) if goal.least else max(values)
    reached = sum(worst >= l if goal.least else worst <= l for l in goal.limits)
    return Found(goal, len(values), worst, reached, ratios)


def ratio_to(row: Row, peer: str) -> float | None:
    """A peer's time over ours in the same rounds, or None.

    In the way that counts; a peer that a graph cannot hold is compared in eager calls. In a row
    about memory, what it keeps over what ours keeps.
    """
    if row["kind"] == "memory":
        kept = row["implementations"]
        return kept[peer]["kept_bytes"] / kept[OURS]["kept_bytes"] if peer in kept else None
    for way in (way_of(row), "eager"):
        both = row["ways"].get(way, {})
        if OURS in both and peer in both:
            return both[peer]["ratio_to_ours"]
    return None


def written(value: float, unit: str) -> str:
    """A figure with its unit.

    >>> written(0.7, "of dense"), written(2.0, "µs"), written(1.7, "times the floor")
    ('70 % of dense', '2 µs', '1.7 times the floor')
    """
    if unit in ("of dense", "of copy", "of floor", "of that"):
        return f"{100 * value:.0f} % {unit}"
    return f"{value:.3g} {unit}"


def goal_rows(record: Row | None) -> list[list[str]]:
    """The table: work, where, must, good, measured, peers."""
    made = []
    for goal in GOALS:
        of = found(goal, record)
        must, good, _ = (written(limit, goal.unit) for limit in goal.limits)
        measured = NOT_MEASURED
        if of.worst is not None:
            reached = ("missed", "must", "good", "record try")[of.reached]
            measured = f"{written(of.worst, goal.unit)} ({reached})"
        peers = [
            f"{name} {of.ratios[name]:.2f} (must {least:g})"
            if name in of.ratios
            else f"{name} {NOT_MEASURED} (must {least:g})"
            for name, least in goal.peers.items()
        ]
        made.append([goal.work, goal.shapes, must, good, measured, ", ".join(peers) or "-"])
    return made


def goal_lines(record: Row | None) -> list[str]:
    """The table for a terminal."""
    return [f"{work}: {measured} (must {must}; {peers})"
            for work, _, must, _, measured, peers in goal_rows(record)]  # fmt: skip
