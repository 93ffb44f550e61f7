"""The model behind docs/guide/beyond-one-machine.md, against counts of what really travels."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moe_reference import ranks as ranks_module
from moe_reference.config import ExpertsConfig
from moe_reference.expert_parallel import expert_parallel, experts_on_rows, held_experts
from moe_reference.expert_slicing import take_experts
from moe_reference.experts import init_experts
from moe_reference.placement import make_placement, physical_ids, place_experts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Where its dataclasses look for their module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(BENCHMARKS))
model = loaded("scale_model", BENCHMARKS / "scale_model.py")
sys.path.remove(str(BENCHMARKS))
on_ranks = loaded("ranks_of_threads", Path(__file__).with_name("ranks_of_threads.py")).on_ranks
RECORD = json.loads((BENCHMARKS / "results/scale_model.json").read_text())

# E, K, R, h: fewer ranks than experts, as many, and more; hosts that hold every expert, and not.
SHAPES = [(4, 2, 2, 1), (4, 2, 4, 2), (6, 3, 3, 1), (8, 3, 4, 2), (4, 2, 8, 2), (2, 2, 8, 4),
          (2, 1, 8, 2), (4, 3, 4, 4)]  # fmt: skip


def all_choices(E, K, R):
    """Every set of K experts with every choice of copies, as the ranks that they go to."""
    slots = max(E, R) // R
    X = max(E, R) // E
    for chosen in itertools.combinations(range(E), K):
        for copies in itertools.product(range(X), repeat=K):
            yield [(e + copy * E) // slots for e, copy in zip(chosen, copies, strict=True)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize(("E", "K", "R", "h"), SHAPES)
def test_places_touched_are_the_mean_over_all_choices(E, K, R, h):
    rows = model.rows_per_token(E, K, R, h)
    ranks = mean(len(set(to)) for to in all_choices(E, K, R))
    hosts = mean(len({rank // h for rank in to}) for to in all_choices(E, K, R))
    assert rows["ranks_touched"] == pytest.approx(ranks, rel=1e-12)
    assert rows["hosts_touched"] == pytest.approx(hosts, rel=1e-12)


@pytest.mark.parametrize(("E", "K", "R", "h"), SHAPES)
def test_rows_per_token_are_the_mean_over_all_choices_and_senders(E, K, R, h):
    found = {name: [] for name in ("pairs_network", "pairs_nvlink", "once_network", "once_nvlink")}
    for sender, to in itertools.product(range(R), list(all_choices(E, K, R))):
        host = sender // h
        found["pairs_network"].append(sum(rank // h != host for rank in to))
        found["pairs_nvlink"].append(sum(rank // h == host and rank != sender for rank in to))
        found["once_network"].append(len({rank // h for rank in to} - {host}))
        # A row arrives at the rank of the other host that has the sender's place in it.
        found["once_nvlink"].append(sum(rank % h != sender % h for rank in set(to)))
    rows = model.rows_per_token(E, K, R, h)
    for name, values in found.items():
        assert rows[name] == pytest.approx(mean(values), rel=1e-12), name


def test_a_number_of_ranks_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="ranks: expected a divisor or a multiple of 6 experts"):
        model.slots(6, 4)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_link_are_the_bytes_that_the_collectives_send(monkeypatch, copies, dtype):
    E, H, R, h = 6, 4, 4, 2
    generator = torch.Generator().manual_seed(0)
    whole = init_experts(E, H, 3, True, True, generator, dtype=dtype)
    ids = [torch.randint(-1, E, (T, 3), generator=generator) for T in (5, 0, 7, 2)]
    placement = make_placement(torch.arange(8) % E, E, R) if copies else None
    held = held_experts(E, R, placement)
    sent = []
    real = dist.all_to_all_single

    def recorded(output, input, output_split_sizes, input_split_sizes, group=None):
        if input.is_floating_point():
            row = input.shape[1] * input.element_size()
            sent.append((dist.get_rank(), [row * count for count in input_split_sizes],
                         [row * count for count in output_split_sizes]))  # fmt: skip
        return real(output, input, output_split_sizes, input_split_sizes, group=group)

    monkeypatch.setattr(ranks_module.dist, "all_to_all_single", recorded)

    def run(rank):
        logical = held[rank] if placement is None else placement.physical_to_logical[held[rank]]
        local = take_experts(whole, [int(e) for e in logical])
        x = torch.randn(len(ids[rank]), H).to(dtype)
        weights = torch.ones(ids[rank].shape)
        args = ids[rank], local, E, ExpertsConfig(), None, placement
        return expert_parallel(x, weights, *args)

    with torch.no_grad():
        on_ranks(R, run)
    row = H * dtype.itemsize
    links = model.rows_by_link(ids, held, h, placement)
    for rank in range(R):
        there, back = (each[1:] for each in sent if each[0] == rank)
        # The way back is the way there with the splits swapped, byte for byte.
        assert back == there[::-1]
        by_link = {"stay": 0, "host": 0, "others": 0}
        for to, size in enumerate(there[0]):
            link = "stay" if to == rank else "host" if to // h == rank // h else "others"
            by_link[link] += size
        assert by_link == {link: row * counts[rank] for link, counts in links.items()}


@pytest.mark.parametrize(("E", "K", "R", "h"), SHAPES)
def test_the_mean_of_rows_by_link_is_the_formula(E, K, R, h):
    P = max(E, R)
    placement = make_placement(torch.arange(P) % E, E, R)
    held = held_experts(E, R, placement)
    # Each set of experts in each order: copies, taken in turn, are then all used alike.
    chosen = torch.tensor(list(itertools.permutations(range(E), K))).repeat(P // E, 1)
    links = model.rows_by_link([chosen] * R, held, h, placement)
    rows = model.rows_per_token(E, K, R, h)
    assert sum(links["others"]) / (R * len(chosen)) == pytest.approx(rows["pairs_network"])
    assert sum(links["host"]) / (R * len(chosen)) == pytest.approx(rows["pairs_nvlink"])


def test_the_floor_of_the_experts_counts_the_products_that_are_computed(monkeypatch):
    layer = model.Model(hidden=8, intermediate=6, num_experts=4, preset="mixtral", source="")
    T, R = 10, 4
    rows = T * layer.routing.top_k
    local = init_experts(1, 8, 6, True, False, torch.Generator().manual_seed(0))
    operations = []
    real = torch.nn.functional.linear

    def counted(x, matrix, bias=None):
        operations.append(2 * x.shape[0] * matrix.numel())
        return real(x, matrix, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    experts_on_rows(torch.zeros(rows, 8), torch.tensor([rows]), local, ExpertsConfig())
    only_flops = model.Hardware("", 1.0, 1e30, 1.0, 1.0, 2, "")
    assert model.compute_seconds(layer, T, R, only_flops) == sum(operations) > 0
    assert model.compute_seconds(layer, T, R, only_flops, 1.5) == 1.5 * sum(operations)


def test_the_floor_of_the_experts_reads_those_that_got_a_row():
    layer = model.Model(hidden=8, intermediate=6, num_experts=4, preset="mixtral", source="")
    only_memory = model.Hardware("", 1e30, 1.0, 1.0, 1.0, 2, "")
    T, R = 1, 2
    sets = list(itertools.combinations(range(4), 2))
    reached = mean(len(set(itertools.chain(*both))) for both in itertools.product(sets, repeat=2))
    weights = reached / R * 3 * 8 * 6
    rows = T * 2 * (8 + 8 + 3 * 6)
    assert model.compute_seconds(layer, T, R, only_memory) == pytest.approx(2 * (weights + rows))


def test_the_floor_of_the_exchange_is_that_of_the_slower_link():
    rows = model.rows_per_token(8, 2, 8, 4)
    slow, fast = 1.0, 1e9
    for way in ("pairs", "once"):
        for link in ("network", "nvlink"):
            speeds = {"network": fast, "nvlink": fast, link: slow}
            hardware = model.Hardware("", 1.0, 1.0, speeds["nvlink"], speeds["network"], 4, "")
            seconds = model.exchange_seconds(160.0, rows, way, hardware)
            assert seconds == rows[f"{way}_{link}"] * 160


@pytest.mark.parametrize("turn_by_rank", [False, True])
def test_loads_with_copies_are_those_of_the_copies_that_are_chosen(turn_by_rank):
    R, E = 4, 5
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, E, (T, 2), generator=generator) // (1 + T % 2) for T in (9, 4, 0, 7)]
    counts = torch.stack([torch.bincount(each.flatten(), minlength=E) for each in ids])
    placement = place_experts(counts.sum(0), 12, R)
    expected = torch.zeros(R, dtype=torch.int64)
    for rank, ids_TK in enumerate(ids):
        if turn_by_rank:
            seen = [0] * E
            for e in ids_TK.flatten().tolist():
                X = int(placement.replica_count[e])
                copy = placement.logical_to_physical[e, (rank + seen[e]) % X]
                expected[placement.rank_of_physical[copy]] += 1
                seen[e] += 1
        else:
            chosen = physical_ids(ids_TK, placement).flatten()
            expected += torch.bincount(placement.rank_of_physical[chosen], minlength=R)
    assert torch.equal(model.loads_with_copies(counts, placement, turn_by_rank), expected)


def test_loads_without_copies_are_those_of_the_shares():
    counts = torch.tensor([[1, 2, 4], [8, 16, 32]])
    assert model.loads_without_copies(counts).tolist() == [27, 36]
    more_ranks = torch.tensor([[1, 2], [0, 1], [0, 0], [3, 0]])
    assert model.loads_without_copies(more_ranks).tolist() == [4, 3, 0, 0]
    assert model.imbalance(torch.tensor([4, 3, 0, 1])) == 2.0


def test_the_first_choice_of_zipf_has_its_popularity():
    E, T = 4, 20_000
    first = model.logits_of("zipf", E, T, seed=0, place=0).argmax(1)
    shares = (torch.bincount(first, minlength=E) / T).sort(descending=True).values
    expected = 1 / torch.arange(1, E + 1)
    expected /= expected.sum()
    # Five standard deviations of a share.
    assert (shares - expected).abs().max() < 5 * (0.25 / T) ** 0.5


@pytest.mark.parametrize("kind", model.KINDS)
def test_a_stream_is_the_same_for_a_seed_and_moves_on(kind):
    draw = [model.logits_of(kind, 8, 600, seed, place) for seed, place in
            ((0, 0), (0, 0), (0, 64), (1, 0))]  # fmt: skip
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


def test_bytes_are_those_that_deepep_published():
    for row in model.published_rows():
        # Half a unit of 39 GB/s is 1.3 %, and its benchmark leaves out some 10 of 1024 choices.
        assert row["model_mb"] == pytest.approx(row["published_mb"], rel=0.025)
        assert row["floor_us"] < row["published_us"]


def assert_alike(rows, others, rel):
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            near = isinstance(value, float)
            assert value == (pytest.approx(other[name], rel=rel) if near else other[name]), name


def test_the_record_is_what_the_model_says():
    # Five digits are kept.
    assert_alike(RECORD["links"], model.link_rows(), rel=1e-4)
    assert_alike(RECORD["published"], model.published_rows(), rel=1e-4)
    times = model.time_rows(RECORD["imbalance"], RECORD["places"])
    assert_alike(RECORD["times"], times, rel=1e-4)


def test_the_record_has_the_loads_that_are_simulated_now():
    one = "Mixtral 8x7B", "zipf"
    now = {
        "imbalance": model.simulated_imbalance(*one, RECORD["seed"]),
        "places": model.simulated_places(*one, RECORD["seed"]),
    }
    for table, rows in now.items():
        kept = [row for row in RECORD[table] if (row["model"], row["routing"]) == one]
        # A logarithm that rounds otherwise may send a few of the pairs elsewhere.
        assert_alike(kept, rows, rel=0.01)
