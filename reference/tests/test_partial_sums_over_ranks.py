"""Ranks that have the same tokens and add up what they make of them: they are as good as one rank.

Outputs and gradients, on a list of ranks and on processes over gloo; and what is planted shows.
"""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from moe_reference import partial_sums
from moe_reference.expert_parallel import held_experts
from moe_reference.expert_slicing import take_experts
from moe_reference.experts import experts
from moe_reference.placement import place_experts
from moe_reference.ranks import mesh_of_list


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


processes, ways = load("ranks_of_processes"), load("rank_ways")
world = processes.world
CONFIG, E, H, Fault, Way = ways.CONFIG, ways.E, ways.H, ways.Fault, ways.Way
column, everywhere, made, normal = ways.column, ways.everywhere, ways.made, ways.normal
routed, shared_of, slices = ways.routed, ways.shared_of, ways.slices


# A slice of the shared expert on each rank


def cut_shared(whole, shape):
    parts = slices(whole["shared"], shape)
    same = everywhere(whole, shape, "x", "gate")
    return [{**each, "part": part} for each, part in zip(same, parts, strict=True)]


def run_shared(here, mesh, shape):
    xs, parts, gates = (column(here, name) for name in ("x", "part", "gate"))
    return partial_sums.shared_tensor_parallel(xs, parts, CONFIG, mesh[0], gates, 0.5)


SHARED = Way(
    lambda shape: {"x": normal(5, H), "gate": normal(1, H, seed=3), "shared": made(1, 5, 4)},
    cut_shared,
    run_shared,
    lambda whole, shape: [shared_of(whole["x"], whole, 0.5)] * math.prod(shape),
)


# Two terms that are partial, and one that every rank has


def cut_terms(whole, shape):
    parts = zip(
        everywhere(whole, shape, "x", "weights", "gate", "own"),
        slices(whole["experts"], shape),
        slices(whole["shared"], shape),
        strict=True,
    )
    return [{**each, "part": part, "shared": shared} for each, part, shared in parts]


def run_terms(here, mesh, shape):
    ids = routed(6)[1]
    return partial_sums.reduce_once(
        [
            [experts(each["x"], each["part"], each["weights"], ids, CONFIG) for each in here],
            [
                partial_sums.partial_shared(each["x"], each["shared"], CONFIG, each["gate"])
                for each in here
            ],
        ],
        [[partial_sums.partial_shared(each["x"], each["own"], CONFIG) for each in here]],
        mesh[0],
    )


def terms_alone(whole, shape):
    x, ones = whole["x"], torch.ones(6, 1, dtype=torch.float64)
    y = experts(x, whole["experts"], whole["weights"], routed(6)[1], CONFIG)
    own = experts(x, whole["own"], ones, ones.long() * 0, CONFIG)
    return [y + shared_of(x, whole) + own] * math.prod(shape)


TERMS = Way(
    lambda shape: {
        "x": normal(6, H),
        "weights": routed(6)[0],
        "gate": normal(1, H, seed=3),
        "experts": made(E, 6, 2),
        "shared": made(1, 5, 4),
        "own": made(1, 3, 5),
    },
    cut_terms,
    run_terms,
    terms_alone,
)


# A share of the experts on each rank, with or without copies of the busy ones


def replicated(copied):
    def placed(shape):
        size = math.prod(shape)
        load = torch.tensor([9, 1, 5, 1, 3])
        placement = place_experts(load, -(-(E + 3) // size) * size, size) if copied else None
        held = held_experts(E, size, placement)
        if copied:
            logical = placement.physical_to_logical.tolist()
            held = [[logical[p] for p in each] for each in held]
        return placement, held

    def cut(whole, shape):
        same = everywhere(whole, shape, "x", "weights")
        return [
            {**each, "local": take_experts(whole["experts"], held)}
            for each, held in zip(same, placed(shape)[1], strict=True)
        ]

    def run(here, mesh, shape):
        ids = [routed(6)[1]] * len(here)
        x, weights, local = (column(here, name) for name in ("x", "weights", "local"))
        return partial_sums.replicated_experts(
            x, weights, ids, local, E, CONFIG, mesh[0], placed(shape)[0]
        )

    def alone(whole, shape):
        y = experts(whole["x"], whole["experts"], whole["weights"], routed(6)[1], CONFIG)
        return [y] * math.prod(shape)

    return Way(
        lambda shape: {"x": normal(6, H), "weights": routed(6)[0], "experts": made(E, 6, 2)},
        cut,
        run,
        alone,
    )


# Outputs and gradients

WAYS = {
    "shared": SHARED,
    "terms": TERMS,
    "replicated": replicated(False),
    "copies": replicated(True),
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


def never(all_reduce, tensors, ranks):
    return list(tensors)


def twice(all_reduce, tensors, ranks):
    return all_reduce(all_reduce(tensors, ranks), ranks)


def sum_without_gradient(all_reduce, tensors, ranks):
    """The gradient is this rank's own."""
    return [
        own + (total - own).detach()
        for own, total in zip(tensors, all_reduce(tensors, ranks), strict=True)
    ]


def gate_learns_nothing(partial_shared, x, part, config, gate, scale):
    return partial_shared(x, part, config, ways.learns_nothing(gate), scale)


def all_partial(reduce_once, partial, whole, ranks):
    return reduce_once([*partial, *whole], [], ranks)


def one_partial(reduce_once, partial, whole, ranks):
    return reduce_once(partial[:1], [*partial[1:], *whole], ranks)


def copies_from_the_rank(partial_of_held_experts, *given):
    """Each rank begins with another copy of an expert: as good a choice, and not the others'."""
    *rest, rank, config, placement = given
    rolled = placement.logical_to_physical.clone()
    for copies, count in zip(rolled, placement.replica_count.tolist(), strict=True):
        copies[:count] = copies[:count].roll(rank)
    of_rank = dataclasses.replace(placement, logical_to_physical=rolled)
    return partial_of_held_experts(*rest, rank, config, of_rank)


def nothing_left_out(experts, x, local, weights, rows, config):
    return experts(x, local, weights, rows.clamp(min=0), config)


FAULTS = {
    "the shared expert is never reduced": Fault("shared", partial_sums, "all_reduce", never),
    "the shared expert is reduced twice": Fault("shared", partial_sums, "all_reduce", twice),
    "the gradient of the sum is one rank's": Fault(
        "shared", partial_sums, "all_reduce", sum_without_gradient
    ),
    "the gate learns from nobody": Fault(
        "shared", partial_sums, "partial_shared", gate_learns_nothing
    ),
    "what every rank has is reduced": Fault("terms", partial_sums, "reduce_once", all_partial),
    "partial terms are taken for whole ones": Fault(
        "terms", partial_sums, "reduce_once", one_partial
    ),
    "copies are chosen by the rank": Fault(
        "copies", partial_sums, "partial_of_held_experts", copies_from_the_rank
    ),
    "pairs of other ranks' experts are computed": Fault(
        "replicated", partial_sums, "experts", nothing_left_out
    ),
}


def spread_wrongly(mesh, planted, shape):
    """Called on processes, too."""
    with FAULTS[planted].planted():
        return spread(mesh, FAULTS[planted].way, shape)


@pytest.mark.parametrize("planted", FAULTS)
def test_what_is_planted_shows(planted):
    fault, shape = FAULTS[planted], (2, 2)
    found = spread_wrongly(mesh_of_list(*shape), planted, shape)
    ways.assert_shows(fault, WAYS[fault.way], shape, found)


@pytest.mark.parametrize("shape", processes.MESHES)
def test_copies_that_processes_choose_differently_show(shape, world):
    planted = "copies are chosen by the rank"
    found = ways.of_processes(world.run(spread_wrongly, shape, planted, shape))
    ways.assert_shows(FAULTS[planted], WAYS["copies"], shape, found)
