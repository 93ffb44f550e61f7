"""Tokens that are taken to where their experts are, and back: the ranks are as good as one rank.

Outputs and gradients, on a list of ranks and on processes over gloo; and what is planted shows.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from moe_reference import domain_transforms, external_shared, partial_sums, token_slices
from moe_reference.config import RoutingConfig
from moe_reference.expert_parallel import expert_major, experts_on_rows, held_experts
from moe_reference.expert_slicing import take_experts
from moe_reference.experts import experts
from moe_reference.gating import route
from moe_reference.placement import assign_external_shared
from moe_reference.ranks import all_gather, gather_counts, mesh_of_list


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


processes, ways = load("ranks_of_processes"), load("rank_ways")
world = processes.world
CONFIG, E, H, K, Fault, Way = ways.CONFIG, ways.E, ways.H, ways.K, ways.Fault, ways.Way
column, everywhere, made, normal = ways.column, ways.everywhere, ways.made, ways.normal
routed, shared_of, slices = ways.routed, ways.shared_of, ways.slices

ROUTING = RoutingConfig(top_k=K, score="sigmoid", renormalize=True)
HASHED = RoutingConfig(top_k=K, hash_table=torch.tensor([[0, 1], [2, 3], [4, 0], [1, 3]]))


def counts_of(shape):
    """Tokens of ranks: different numbers, and none on one of them."""
    return [3, 0, 4, 1, 2][: math.prod(shape)]


def by_rank(tensor, shape):
    return tensor.split(counts_of(shape))


# The shared expert on the first half of the ranks, the routed ones on the second


def cut_external(whole, shape):
    size = math.prod(shape)
    held = [take_experts(whole["shared"], [0])] * (size // 2)
    for rank in range(size // 2, size):
        share = assign_external_shared(E, size // 2, size, rank)
        held.append(take_experts(whole["experts"], list(share)))
    parts = zip(
        everywhere(whole, shape, "gate"),
        by_rank(whole["x"], shape),
        by_rank(whole["weights"], shape),
        held,
        strict=True,
    )
    return [{**each, "x": x, "weights": w, "local": local} for each, x, w, local in parts]


def run_external(here, mesh, shape):
    ids = by_rank(routed(sum(counts_of(shape)))[1], shape)
    return external_shared.external_shared_parallel(
        column(here, "x"),
        column(here, "weights"),
        [ids[rank] for rank in mesh[0].here],
        column(here, "local"),
        E,
        math.prod(shape) // 2,
        CONFIG,
        mesh[0],
        column(here, "gate"),
        0.5,
    )


def external_alone(whole, shape):
    x, ids = whole["x"], routed(len(whole["x"]))[1]
    y = experts(x, whole["experts"], whole["weights"], ids, CONFIG)
    return by_rank(y + shared_of(x, whole, 0.5), shape)


EXTERNAL = Way(
    lambda shape: {
        "x": normal(sum(counts_of(shape)), H),
        "weights": routed(sum(counts_of(shape)))[0],
        "gate": normal(1, H, seed=3),
        "experts": made(E, 6, 2),
        "shared": made(1, 3, 4),
    },
    cut_external,
    run_external,
    external_alone,
)


# Everybody computes the tokens of all


def cut_gathered(whole, shape):
    parts = zip(
        everywhere(whole, shape, "router"),
        by_rank(whole["x"], shape),
        slices(whole["experts"], shape),
        strict=True,
    )
    return [{**each, "x": x, "part": part} for each, x, part in parts]


def run_gathered(here, mesh, shape):
    def compute(gathered, token_ids):
        chosen = [
            route(x @ each["router"].T, ROUTING) for x, each in zip(gathered, here, strict=True)
        ]
        weights, ids = zip(*chosen, strict=True)
        parts = column(here, "part")
        return partial_sums.tensor_parallel_experts(gathered, weights, ids, parts, CONFIG, mesh[0])

    return domain_transforms.gather_compute_slice(column(here, "x"), compute, mesh[0])


def gathered_alone(whole, shape):
    chosen = route(whole["x"] @ whole["router"].T, ROUTING)
    return by_rank(experts(whole["x"], whole["experts"], *chosen, CONFIG), shape)


GATHERED = Way(
    lambda shape: {
        "x": normal(sum(counts_of(shape)), H),
        "router": normal(E, H, seed=7),
        "experts": made(E, 6, 2),
    },
    cut_gathered,
    run_gathered,
    gathered_alone,
)


# A group that shares out the rows of every expert, each of which it pads to its size

ROWS_OF_EXPERTS = torch.tensor([3, 0, 4, 1, 2])


def run_padded(here, mesh, shape):
    size, everybody = math.prod(shape), mesh[0]
    computed = []
    for rank, each in zip(everybody.here, here, strict=True):
        rows, counts = token_slices.pad_experts(each["x"], ROWS_OF_EXPERTS, size)
        of_experts = rows.split(counts.tolist())
        mine = [token_slices.slice_tokens(piece, size, rank) for piece in of_experts]
        computed.append(experts_on_rows(torch.cat(mine), counts // size, each["experts"], CONFIG))
    order = expert_major((counts // size).expand(size, -1))
    return [
        token_slices.trim_experts(rows[order], ROWS_OF_EXPERTS, size)
        for rows in all_gather(computed, everybody)
    ]


def padded_alone(whole, shape):
    y = experts_on_rows(whole["x"], ROWS_OF_EXPERTS, whole["experts"], CONFIG)
    return [y] * math.prod(shape)


PADDED = Way(
    lambda shape: {"x": normal(10, H), "experts": made(E, 6, 2)},
    lambda whole, shape: everywhere(whole, shape, "x", "experts"),
    run_padded,
    padded_alone,
)


# Rows of the mesh have the same tokens, each row others; experts are spread over all ranks


def sliced(route_after, hashed=False):
    counts, routing = (5, 2, 0), HASHED if hashed else ROUTING

    def tokens_of(shape):
        return [torch.arange(count) % 4 for count in counts[: shape[0]]]

    def cut(whole, shape):
        rows = whole["x"].split(list(counts[: shape[0]]))
        return [
            {
                "x": rows[rank // shape[1]].clone(),
                "router": whole["router"].clone(),
                "local": take_experts(whole["experts"], held),
            }
            for rank, held in enumerate(held_experts(E, math.prod(shape)))
        ]

    def run(here, mesh, shape):
        routers = iter(column(here, "router"))  # Each rank has its own, and they are asked in turn.
        token_ids = [tokens_of(shape)[rank // shape[1]] for rank in mesh[0].here]

        def choose(x, ids):
            return route(x @ next(routers).T, routing, None, ids)

        return domain_transforms.sliced_expert_parallel(
            column(here, "x"),
            choose,
            column(here, "local"),
            E,
            CONFIG,
            mesh[0],
            mesh[1],
            token_ids if hashed else None,
            route_after=route_after,
        )

    def alone(whole, shape):
        ids = torch.cat(tokens_of(shape)) if hashed else None
        chosen = route(whole["x"] @ whole["router"].T, routing, None, ids)
        y = experts(whole["x"], whole["experts"], *chosen, CONFIG)
        rows = y.split(list(counts[: shape[0]]))
        return [rows[rank // shape[1]] for rank in range(math.prod(shape))]

    return Way(
        lambda shape: {
            "x": normal(sum(counts[: shape[0]]), H),
            "router": normal(E, H, seed=7),
            "experts": made(E, 6, 2),
        },
        cut,
        run,
        alone,
    )


# Outputs and gradients

WAYS = {
    "external": EXTERNAL,
    "gathered": GATHERED,
    "padded": PADDED,
    "sliced, routed before": sliced(False),
    "sliced, routed after": sliced(True, hashed=True),
}


def spread(mesh, name, shape):
    """Called on processes, which are told names."""
    return ways.spread(mesh, WAYS[name], shape)


@pytest.mark.parametrize("shape", ways.SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_a_list_of_ranks_has_the_outputs_and_gradients_of_one(name, shape):
    ways.assert_same(WAYS[name], shape, *spread(mesh_of_list(*shape), name, shape))


@pytest.mark.parametrize("shape", processes.MESHES)
@pytest.mark.parametrize("name", WAYS)
def test_processes_have_the_outputs_and_gradients_of_one(name, shape, world):
    found = ways.of_processes(world.run(spread, shape, name, shape))
    ways.assert_same(WAYS[name], shape, *found)


# What is planted


def routed_for_shared(add_shared_column, *given):
    weights, ids = add_shared_column(*given)
    ids[:, -1] = E - 1
    return weights, ids


def padding_for_shared(add_shared_column, weights, padded_ids, *given):
    """An id that was one too many for a routed expert is now that of the shared one."""
    weights, ids = add_shared_column(weights, padded_ids, *given)
    ids[:, :-1] = padded_ids
    return weights, ids


def gates_learn_nothing(external_shared_parallel, *given):
    *rest, gates, scale = given
    return external_shared_parallel(*rest, [*map(ways.learns_nothing, gates)], scale)


def as_many_everywhere(gather_counts, tensors, ranks):
    return [torch.full((ranks.size,), len(each)) for each in tensors]


def gather_without_gradient(all_gather, tensors, ranks):
    """The gradient is this rank's own: what the others ask for its tokens is not added."""
    gathered, everythings = [], all_gather(tensors, ranks)
    here = zip(ranks.here, tensors, everythings, gather_counts(tensors, ranks), strict=True)
    for rank, own, everything, counts in here:
        pieces = [*everything.detach().split(counts.tolist())]
        pieces[rank] = own
        gathered.append(torch.cat(pieces))
    return gathered


def in_front(pad_tokens, tokens, multiple, value=0):
    return F.pad(tokens, [0, 0] * (tokens.ndim - 1) + [-len(tokens) % multiple, 0], value=value)


def last_rows(trim_tokens, tokens, num_tokens):
    return tokens[len(tokens) - num_tokens :].clone()


FAULTS = {
    "tokens go to a routed expert instead of the shared one": Fault(
        "external", external_shared, "add_shared_column", routed_for_shared
    ),
    "padding is a shared expert": Fault(
        "external", external_shared, "add_shared_column", padding_for_shared
    ),
    "the gate of the external expert learns from nobody": Fault(
        "external", external_shared, "external_shared_parallel", gates_learn_nothing
    ),
    # A rank of four tokens begins behind the last one of all eight, and has none.
    "own tokens begin at rank times their number": Fault(
        "gathered",
        domain_transforms,
        "gather_counts",
        as_many_everywhere,
        shows=r"'shape' do not match: torch.Size\(\[0, 4\]\) != torch.Size\(\[4, 4\]\)",
    ),
    "the gradient of gathered tokens is one rank's": Fault(
        "gathered", domain_transforms, "all_gather", gather_without_gradient
    ),
    "rows of an expert are padded in front": Fault("padded", token_slices, "pad_tokens", in_front),
    "rows of an expert are trimmed from the front": Fault(
        "padded", token_slices, "trim_tokens", last_rows
    ),
    "gathered tokens are trimmed from the front": Fault(
        "sliced, routed before", token_slices, "trim_tokens", last_rows
    ),
    "the gradient of gathered outputs is one rank's": Fault(
        "sliced, routed before", token_slices, "all_gather", gather_without_gradient
    ),
}


@pytest.mark.parametrize("planted", FAULTS)
def test_what_is_planted_shows(planted):
    fault, shape = FAULTS[planted], (2, 2)
    with fault.planted():
        found = spread(mesh_of_list(*shape), fault.way, shape)
    ways.assert_shows(fault, WAYS[fault.way], shape, found)
