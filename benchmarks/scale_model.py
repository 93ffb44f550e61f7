r"""What expert parallelism costs on many machines: a model, not a measurement.

No cluster is behind these numbers. They are *floors*: bytes divided by the speed of a link, and
products divided by the peak of a GPU. What a real system adds, latency, launches and congestion,
comes on top; how much is seen beside the table that DeepEP published, which is in the record too.

Every rank has T tokens. Each token chooses K of E experts, all choices alike where nothing else is
said. R ranks hold P = max(E, R) physical experts, P / R each in a row, and h ranks share a host.

A row is one token on its way to one place. Two ways to send are counted:

- *pairs*: one row for each pair of token and expert, as the reference does;
- *once per host*: one row for each host that a token needs, handed on inside the host to the ranks
  that need it, as DeepEP's normal kernels do; the way back is added up in the host.

The simulated part draws tokens, routes them with the router of the reference and counts what lands
on each rank, with and without copies of experts. It is written to
`benchmarks/results/scale_model.json` together with the rest.

    python benchmarks/scale_model.py [--seed N]
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass

import torch
from moe_reference.config import RoutingConfig
from moe_reference.dispatch import count_tokens
from moe_reference.expert_parallel import held_experts
from moe_reference.gating import route
from moe_reference.placement import make_placement, physical_ids, place_experts
from moe_reference.presets import routing_preset
from record import about, write

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PHASES = {"prefill": 4096, "decode": 128}
"""Tokens of a rank: those that DeepEP measures its two kinds of kernels with."""
KINDS = ("uniform", "zipf", "recorded")
BLOCK, HISTORY, CHUNK = 128, 512, 64
"""Tokens of a rank in the simulation; blocks seen before placing; blocks routed at once."""
VOCABULARY, WIDTH, PASSAGE = 32768, 64, 512
"""Of the synthetic text: different words, size of an embedding, tokens with one topic."""


@dataclass(frozen=True)
class Model:
    """One MoE layer of a published model, with gated experts."""

    hidden: int
    intermediate: int
    num_experts: int
    preset: str
    source: str

    @property
    def routing(self) -> RoutingConfig:
        return routing_preset(self.preset)


MODELS = {
    "DeepSeek-V3": Model(7168, 2048, 256, "deepseek-v3", "config.json of deepseek-ai/DeepSeek-V3"),
    "Qwen3-235B-A22B": Model(4096, 1536, 128, "qwen3-moe", "config.json of Qwen/Qwen3-235B-A22B"),
    "Mixtral 8x7B": Model(4096, 14336, 8, "mixtral", "config.json of mistralai/Mixtral-8x7B-v0.1"),
}


@dataclass(frozen=True)
class Hardware:
    """Peaks per second of one GPU, in one direction."""

    name: str
    flops: float
    memory: float
    nvlink: float
    network: float
    ranks_per_host: int
    source: str


H200 = Hardware(
    "H200 SXM, eight in a host, one 400 Gb/s port each",
    flops=989.5e12,
    memory=4.8e12,
    nvlink=450e9,
    network=50e9,
    ranks_per_host=8,
    source=(
        "NVIDIA's data sheet of the H200 (1,979 TFLOP/s in bfloat16 with sparsity, half without; "
        "4.8 TB/s; NVLink 900 GB/s, both directions together); NVIDIA DGX BasePOD reference "
        "architecture (eight GPUs and eight ConnectX-7 of 400 Gb/s in a host)"
    ),
)
BFLOAT16 = 2

PUBLISHED = {
    "source": "DeepEP, docs/legacy.md, low-latency kernels: H800 with one 400 Gb/s port each, "
    "128 tokens per rank, 7168 wide, 8 experts per token, float8 there and bfloat16 back",
    "tokens": 128,
    "ranks": (16, 32, 64, 128, 256),
    "dispatch_us": (118, 155, 173, 192, 194),
    "dispatch_gb_s": (63, 48, 43, 39, 39),
    "combine_us": (195, 273, 314, 369, 360),
    "combine_gb_s": (74, 53, 46, 39, 40),
}


# Places that a token touches


def slots(num_experts: int, ranks: int) -> int:
    """How many physical experts a rank holds: E / R, or one where there are more ranks."""
    P = max(num_experts, ranks)
    if P % num_experts or P % ranks:
        raise ValueError(
            f"ranks: expected a divisor or a multiple of {num_experts} experts, got {ranks}"
        )
    return P // ranks


def touched(num_experts: int, top_k: int, ranks: int, together: int) -> float:
    r"""The probability that a token needs a place of `together` ranks in a row.

    The place has $s = \min(E, \text{its slots})$ different experts. Of the K chosen ones j are
    among them with the hypergeometric probability; each of those j pairs goes to this place with
    $q = c / X$, c of the X copies being here, and past it otherwise:

    $$
    1 - \sum_j \frac{\binom{s}{j} \binom{E - s}{K - j}}{\binom{E}{K}} (1 - q)^j
    $$
    """
    held = slots(num_experts, ranks) * together
    different = min(held, num_experts)
    here = held // different / (max(num_experts, ranks) // num_experts)
    past = sum(
        math.comb(different, j) * math.comb(num_experts - different, top_k - j) * (1 - here) ** j
        for j in range(top_k + 1)
    )
    return 1 - past / math.comb(num_experts, top_k)


def rows_per_token(num_experts: int, top_k: int, ranks: int, ranks_per_host: int) -> dict:
    """Ranks and hosts that a token needs, and the rows that it sends for them: `rows_of`."""
    h = min(ranks_per_host, ranks)
    ranks_touched = ranks * touched(num_experts, top_k, ranks, 1)
    hosts_touched = ranks // h * touched(num_experts, top_k, ranks, h)
    return rows_of(top_k, ranks, h, ranks_touched, hosts_touched)


def rows_of(
    top_k: int, ranks: int, ranks_per_host: int, ranks_touched: float, hosts_touched: float
) -> dict:
    r"""Rows that a token sends over each kind of link, in one direction.

    Whoever sends, all ranks are needed alike. Pairs: $K (1 - h / R)$ rows leave the host and
    $K (h - 1) / R$ go to another rank of it.

    Once per host: of the hosts that are needed the share $1 - h / R$ are others. A row arrives at
    the rank with the sender's own place in its host, and goes on over NVLink to the ranks that are
    needed there: of all ranks the share $1 - 1 / h$ have another place.
    """
    h = ranks_per_host
    return {
        "ranks_touched": ranks_touched,
        "hosts_touched": hosts_touched,
        "pairs_network": top_k * (1 - h / ranks),
        "pairs_nvlink": top_k * (h - 1) / ranks,
        "once_network": hosts_touched * (1 - h / ranks),
        "once_nvlink": ranks_touched * (1 - 1 / h),
    }


def rows_by_link(ids, held, ranks_per_host: int, placement=None) -> dict[str, list[int]]:
    """The rows of each rank that stay, that go to its host and that go to others, counted.

    Args:
        ids: [T, K] of each rank; experts that are nowhere travel nowhere.
        held: the experts of each rank, of `held_experts`.
        ranks_per_host: h.
        placement: copies of experts.
    """
    rank_of = {e: rank for rank, experts in enumerate(held) for e in experts}
    found: dict[str, list[int]] = {"stay": [], "host": [], "others": []}
    for rank, ids_TK in enumerate(ids):
        chosen = ids_TK if placement is None else physical_ids(ids_TK, placement)
        to = [rank_of[e] for e in chosen.flatten().tolist() if e in rank_of]
        same = [each for each in to if each // ranks_per_host == rank // ranks_per_host]
        found["stay"].append(same.count(rank))
        found["host"].append(len(same) - same.count(rank))
        found["others"].append(len(to) - len(same))
    return found


# Time


def compute_seconds(
    model: Model, tokens: int, ranks: int, hardware: Hardware, imbalance: float = 1.0
) -> float:
    r"""The floor of the experts of a rank: products or memory, whichever takes longer.

    T · K rows come to a rank on average, `imbalance` times as many to the busiest. Each costs
    6 H I operations, and is read and written: H wide in and out, 2 I written and I read again in
    between. Of the rank's experts those that got a row are read: each is missed with probability
    $(1 - K / P)^{R T}$.
    """
    E, K, H, I = model.num_experts, model.routing.top_k, model.hidden, model.intermediate
    rows = tokens * K * imbalance
    reached = 1 - (1 - K / max(E, ranks)) ** (ranks * tokens)
    weights = slots(E, ranks) * reached * 3 * H * I
    moved = BFLOAT16 * (weights + rows * (2 * H + 3 * I))
    return max(6 * rows * H * I / hardware.flops, moved / hardware.memory)


def exchange_seconds(size: float, rows: dict, way: str, hardware: Hardware) -> float:
    """The floor of one direction: the slower of the two links, which work at the same time.

    Args:
        size: bytes of a row of each token that the busiest rank receives.
        rows: of `rows_of`.
        way: pairs or once.
        hardware: speeds of the links.
    """
    return max(
        rows[f"{way}_network"] * size / hardware.network,
        rows[f"{way}_nvlink"] * size / hardware.nvlink,
    )


def published_rows() -> list[dict]:
    """The bytes and the floor of this model beside what DeepEP published for its own kernels."""
    model, T = MODELS["DeepSeek-V3"], PUBLISHED["tokens"]
    K, H = model.routing.top_k, model.hidden
    # A scale of four bytes for 128 numbers of float8.
    sizes = {"dispatch": H + H // 128 * 4, "combine": H * BFLOAT16}
    rows = []
    for i, ranks in enumerate(PUBLISHED["ranks"]):
        for direction, size in sizes.items():
            us, speed = PUBLISHED[f"{direction}_us"][i], PUBLISHED[f"{direction}_gb_s"][i]
            sent = rows_per_token(model.num_experts, K, ranks, H200.ranks_per_host)
            floor = T * sent["pairs_network"] * size / H200.network * 1e6
            rows.append({
                "ranks": ranks,
                "direction": direction,
                "model_mb": T * K * size / 1e6,
                "published_mb": us * speed / 1e3,
                "floor_us": floor,
                "published_us": us,
                "published_of_floor": us / floor,
            })  # fmt: skip
    return rows


# Simulation


def logits_of(kind: str, num_experts: int, tokens: int, seed: int, place: int) -> torch.Tensor:
    r"""Router logits [T, E] of one of `KINDS`, float32; `place` numbers the part of the stream.

    - uniform: independent normal numbers.
    - zipf: $\log p_e$ plus Gumbel noise, which draws experts without replacement by popularity;
      $p_e \propto 1 / n$ for the n-th most popular. Which expert is which is drawn once.
    - recorded: a router with fixed random weights reads a synthetic text: words of a Zipf
      distribution with fixed random embeddings, plus a topic that holds for a passage. There is no
      trained model and no real text in it.
    """
    fixed = torch.Generator().manual_seed(seed)
    moving = torch.Generator().manual_seed(seed * 1_000_003 + place + 1)
    E = num_experts
    if kind == "uniform":
        return torch.randn(tokens, E, generator=moving)
    if kind == "zipf":
        popularity_E = -torch.arange(1, E + 1).log()[torch.randperm(E, generator=fixed)]
        uniform_TE = torch.rand(tokens, E, generator=moving).clamp(1e-12, 1 - 1e-7)
        return popularity_E - (-uniform_TE.log()).log()
    router_EH = torch.randn(E, WIDTH, generator=fixed)
    words_VH = torch.randn(VOCABULARY, WIDTH, generator=fixed)
    topics_SH = torch.randn(-(-tokens // PASSAGE), WIDTH, generator=moving)
    words_T = torch.multinomial(
        1 / torch.arange(1, VOCABULARY + 1), tokens, replacement=True, generator=moving
    )
    x_TH = words_VH[words_T] + topics_SH.repeat_interleave(PASSAGE, 0)[:tokens]
    return x_TH @ router_EH.T


def stream(kind: str, model: Model, blocks: int, seed: int):
    """Expert ids of a stream of tokens, [tokens of CHUNK blocks, K] at a time."""
    for place in range(0, blocks, CHUNK):
        tokens = min(CHUNK, blocks - place) * BLOCK
        yield route(logits_of(kind, model.num_experts, tokens, seed, place), model.routing)[1]


def counts_of_blocks(kind: str, model: Model, blocks: int, seed: int) -> torch.Tensor:
    """How many pairs each block of `BLOCK` tokens has for each expert: [blocks, E], int64."""
    E = model.num_experts
    return torch.stack([
        count_tokens(ids_TK, E)
        for chunk in stream(kind, model, blocks, seed)
        for ids_TK in chunk.split(BLOCK)
    ])  # fmt: skip


def loads_without_copies(counts_RE: torch.Tensor) -> torch.Tensor:
    """Rows that come to each rank, [R], with the shares of `assign_experts`."""
    R, E = counts_RE.shape
    counts_E = counts_RE.sum(0)
    return torch.stack([counts_E[held].sum() for held in held_experts(E, R)])


def loads_with_copies(counts_RE: torch.Tensor, placement, turn_by_rank: bool) -> torch.Tensor:
    """Rows that come to each rank, [R], where each rank takes the copies of an expert in turn.

    Args:
        counts_RE: pairs of each rank for each expert.
        placement: P physical experts on R ranks.
        turn_by_rank: rank r begins with copy r mod X, instead of all with the first one as
            `physical_ids` does.
    """
    R = len(counts_RE)
    start_R = torch.arange(R) if turn_by_rank else torch.zeros(R, dtype=torch.int64)
    loads_R = torch.zeros(R, dtype=torch.int64)
    for counts_R, copies, X in zip(
        counts_RE.T, placement.logical_to_physical, placement.replica_count.tolist(), strict=True
    ):
        later_RX = (torch.arange(X) - start_R[:, None]) % X
        got_X = ((counts_R[:, None] + X - 1 - later_RX) // X).sum(0)
        loads_R.index_add_(0, placement.rank_of_physical[copies[:X]], got_X)
    return loads_R


def imbalance(loads_R: torch.Tensor) -> float:
    """The busiest rank over the mean."""
    return (loads_R.max() / loads_R.double().mean()).item()


def simulated_imbalance(name: str, kind: str, seed: int) -> list[dict]:
    """Imbalance for every number of ranks, the mean over up to four parts of one stream.

    The first `HISTORY` blocks are what a placement is made from, the others what it meets. With
    copies a rank has one slot more than the experts need, E / R + 1, and one where R exceeds E.
    """
    model = MODELS[name]
    E = model.num_experts
    counts = counts_of_blocks(kind, model, HISTORY + max(RANKS), seed)
    before, after = counts[:HISTORY].sum(0), counts[HISTORY:]
    rows = []
    for R in RANKS:
        placement = place_experts(before, R * (E // R + 1), R)
        parts = [after[i : i + R] for i in range(0, len(after), max(R, len(after) // 4))]
        ways = {
            "without_copies": loads_without_copies,
            "with_copies": lambda part, p=placement: loads_with_copies(part, p, False),
            "turn_by_rank": lambda part, p=placement: loads_with_copies(part, p, True),
        }
        found = {
            way: sum(imbalance(loads(part)) for part in parts) / len(parts)
            for way, loads in ways.items()
        }
        rows.append({"model": name, "routing": kind, "ranks": R, "parts": len(parts),
                     "slots": R * (E // R + 1), **found})  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def simulated_places(name: str, kind: str, seed: int) -> list[dict]:
    """Ranks and hosts that a token of the stream needs, the mean over `CHUNK` blocks."""
    model = MODELS[name]
    E, h = model.num_experts, H200.ranks_per_host
    [ids_TK] = stream(kind, model, CHUNK, seed)
    rows = []
    for R in RANKS:
        placement = make_placement(torch.arange(max(E, R)) % E, E, R)
        chosen = torch.cat([physical_ids(block, placement) for block in ids_TK.split(BLOCK)])
        rank_TK = placement.rank_of_physical[chosen]
        rows.append({
            "model": name, "routing": kind, "ranks": R,
            "ranks_touched": different(rank_TK), "hosts_touched": different(rank_TK // h),
        })  # fmt: skip
    return rows


def different(places_TK: torch.Tensor) -> float:
    """How many different numbers a row has, on average."""
    changes = places_TK.sort(dim=1).values.diff(dim=1) != 0
    return 1 + changes.sum(1).double().mean().item()


# The record


def link_rows() -> list[dict]:
    """Rows and bytes per token of every model, in one direction, and the weights on a rank."""
    found = []
    for name, model in MODELS.items():
        for R in RANKS:
            E, K, H, I = model.num_experts, model.routing.top_k, model.hidden, model.intermediate
            rows = rows_per_token(E, K, R, H200.ranks_per_host)
            sent = {f"{link}_bytes": count * H * BFLOAT16 for link, count in rows.items()
                    if not link.endswith("touched")}  # fmt: skip
            weights = slots(E, R) * 3 * H * I * BFLOAT16
            found.append({"model": name, "ranks": R, **rows, **sent, "weights_bytes": weights})
    return found


def time_rows(imbalances: list[dict], places: list[dict]) -> list[dict]:
    """Floors of a layer in microseconds, balanced and with the imbalance of recorded routing.

    The exchange is there and back. `routed_us` is once per host with the places that the model's
    own router chose in the simulation, which limits them where it limits groups. Loads were
    simulated with the tokens of a decoding step, so that prefill has no uneven columns.
    """
    uneven = {(row["model"], row["ranks"]): row for row in imbalances
              if row["routing"] == "recorded"}  # fmt: skip
    chosen = {(row["model"], row["ranks"]): row for row in places
              if row["routing"] == "uniform"}  # fmt: skip
    found = []
    for name, model in MODELS.items():
        for phase, T in PHASES.items():
            for R in RANKS:
                row = {
                    "model": name, "phase": phase, "ranks": R, "tokens": T,
                    **layer_us(model, T, R, chosen[name, R]),
                    "message_bytes": T * model.routing.top_k * model.hidden * BFLOAT16 / R,
                }  # fmt: skip
                if T == BLOCK:
                    for way in ("without_copies", "with_copies"):
                        times = layer_us(model, T, R, chosen[name, R], uneven[name, R][way])
                        row |= {f"{way}_{column}": us for column, us in times.items()}
                found.append(row)
    return found


def layer_us(
    model: Model, tokens: int, ranks: int, chosen: dict, imbalance: float = 1.0
) -> dict[str, float]:
    """Microseconds of the experts, and of both directions of the exchange in each way."""
    K, h = model.routing.top_k, H200.ranks_per_host
    size = tokens * model.hidden * BFLOAT16 * imbalance
    alike = rows_per_token(model.num_experts, K, ranks, h)
    routed = rows_of(K, ranks, h, chosen["ranks_touched"], chosen["hosts_touched"])
    return {
        "compute_us": compute_seconds(model, tokens, ranks, H200, imbalance) * 1e6,
        "pairs_us": 2e6 * exchange_seconds(size, alike, "pairs", H200),
        "once_us": 2e6 * exchange_seconds(size, alike, "once", H200),
        "routed_us": 2e6 * exchange_seconds(size, routed, "once", H200),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    imbalances = [
        row for name in MODELS for kind in KINDS
        for row in simulated_imbalance(name, kind, options.seed)
    ]  # fmt: skip
    places = [
        row for name in MODELS for kind in KINDS
        for row in simulated_places(name, kind, options.seed)
    ]  # fmt: skip
    record = {
        "what": "a model of expert parallelism on many machines, and simulated loads; no cluster "
        "was measured",
        **about(),
        "seed": options.seed,
        "modelled_hardware": asdict(H200),
        "models": {name: {**asdict(model), "top_k": model.routing.top_k}
                   for name, model in MODELS.items()},
        "simulation": {"tokens_per_rank": BLOCK, "history_tokens": HISTORY * BLOCK,
                       "vocabulary": VOCABULARY, "width": WIDTH, "passage": PASSAGE},
        "links": link_rows(),
        "times": time_rows(imbalances, places),
        "published_source": PUBLISHED["source"],
        "published": published_rows(),
        "imbalance": imbalances,
        "places": places,
    }  # fmt: skip
    print(write("scale_model", rounded(record)))
    return 0


def rounded(value):
    """Five digits: more would be noise in a file that people compare."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
