"""Each way to spread tokens and weights over ranks: outputs and gradients are those of one rank.

On a list of ranks and on real processes over gloo; and what is planted shows.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moe_reference import domain_transforms, external_shared, partial_sums, token_slices
from moe_reference.config import BalanceConfig, ExpertsConfig, ExpertWeights, RoutingConfig
from moe_reference.expert_parallel import expert_major, experts_on_rows, held_experts
from moe_reference.expert_slicing import slice_tensor_parallel, take_experts
from moe_reference.experts import experts, init_experts
from moe_reference.gating import route
from moe_reference.load_balancing import balance_loss, global_counts, z_loss
from moe_reference.placement import assign_external_shared, place_experts
from moe_reference.ranks import all_gather, all_reduce, mesh_of_list

_spec = importlib.util.spec_from_file_location(
    "ranks_of_processes", Path(__file__).with_name("ranks_of_processes.py")
)
_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_processes)

H, E, K = 4, 5, 2
CONFIG = ExpertsConfig("silu")
ROUTING = RoutingConfig(top_k=K, score="sigmoid", renormalize=True)
HASHED = RoutingConfig(top_k=K, hash_table=torch.tensor([[0, 1], [2, 3], [4, 0], [1, 3]]))
# Both sides add the same float64 products in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def world():
    made = _processes.World()
    yield made
    made.close()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return init_experts(count, H, width, True, True, generator, dtype=torch.float64)


def routed(count, seed=1):
    """Ids of experts that there are, and of some that there are not."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, K, generator=generator, dtype=torch.float64)
    return weights, torch.randint(-1, E + 1, (count, K), generator=generator)


def mapped(function, tensors):
    """The same names, and a function of each tensor."""
    return {
        name: ExpertWeights(**mapped(function, vars(each)))
        if isinstance(each, ExpertWeights)
        else function(each)
        for name, each in tensors.items()
    }


def flat(tensors):
    """The tensors by path."""
    found = {}
    for name, each in tensors.items():
        parts = vars(each) if isinstance(each, ExpertWeights) else {"": each}
        found |= {f"{name}.{part}".rstrip("."): tensor for part, tensor in parts.items()}
    return found


def leaves(tensors):
    return mapped(lambda each: each.detach().clone().requires_grad_(), tensors)


# The ways


@dataclasses.dataclass(frozen=True)
class Way:
    """Tensors of one rank, cut into those of each rank of a mesh.

    Attributes:
        whole: from rows and columns of the mesh to the tensors of one rank, by name.
        cut: from these and the mesh's shape to those of each rank. Differentiable, so that it also
            says what the gradients of the ranks add up to.
        run: from the tensors of the ranks here, the mesh and its shape to their outputs.
        alone: what one rank makes of the whole: the outputs of all ranks.
    """

    whole: Callable
    cut: Callable
    run: Callable
    alone: Callable


def column(here, name):
    return [each[name] for each in here]


def everywhere(whole, shape, *names):
    """Copies of the same tensors for every rank."""
    size = shape[0] * shape[1]
    return [{name: whole[name].clone() for name in names} for _ in range(size)]


def slices(weights, shape):
    size = shape[0] * shape[1]
    return [slice_tensor_parallel(weights, size, rank) for rank in range(size)]


def shared_of(x, whole, scale=1.0):
    """The shared expert as one expert of which every token is."""
    ones = x.new_ones(len(x), 1)
    y = experts(x, whole["shared"], ones, ones.long() * 0, CONFIG)
    return y * scale * torch.sigmoid(x @ whole["gate"].T)


SHARED = Way(
    lambda shape: {"x": normal(5, H), "gate": normal(1, H, seed=3), "shared": made(1, 5, 4)},
    lambda whole, shape: [
        {**each, "part": part}
        for each, part in zip(
            everywhere(whole, shape, "x", "gate"), slices(whole["shared"], shape), strict=True
        )
    ],
    lambda here, mesh, shape: partial_sums.shared_tensor_parallel(
        column(here, "x"), column(here, "part"), CONFIG, mesh[0], column(here, "gate"), 0.5
    ),
    lambda whole, shape: [shared_of(whole["x"], whole, 0.5)] * (shape[0] * shape[1]),
)


def cut_terms(whole, shape):
    """Two terms that are partial, and one that every rank has."""
    parts = zip(
        everywhere(whole, shape, "x", "weights", "gate"),
        slices(whole["experts"], shape),
        slices(whole["shared"], shape),
        strict=True,
    )
    return [
        {**each, "part": part, "shared": shared, **mapped(torch.clone, {"own": whole["own"]})}
        for each, part, shared in parts
    ]


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
    return [y + shared_of(x, whole) + own] * (shape[0] * shape[1])


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


def counts_of(shape):
    """Tokens of ranks: different numbers, and none on one of them."""
    return [3, 0, 4, 1, 2][: shape[0] * shape[1]]


def by_rank(tensor, shape):
    return tensor.split(counts_of(shape))


def cut_external(whole, shape):
    size, counts = shape[0] * shape[1], counts_of(shape)
    shares = [assign_external_shared(E, size // 2, size, rank) for rank in range(size)]
    tokens = zip(
        everywhere(whole, shape, "gate"),
        whole["x"].split(counts),
        whole["weights"].split(counts),
        shares,
        strict=True,
    )
    return [
        {
            **each,
            "x": x,
            "weights": weights,
            "local": take_experts(whole["experts"], list(share))
            if rank >= size // 2
            else take_experts(whole["shared"], [0]),
        }
        for rank, (each, x, weights, share) in enumerate(tokens)
    ]


def run_external(here, mesh, shape):
    ids = by_rank(routed(sum(counts_of(shape)))[1], shape)
    return external_shared.external_shared_parallel(
        column(here, "x"),
        column(here, "weights"),
        [ids[rank] for rank in mesh[0].here],
        column(here, "local"),
        E,
        shape[0] * shape[1] // 2,
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
    lambda whole, shape: [
        {**each, "x": x, "part": part}
        for each, x, part in zip(
            everywhere(whole, shape, "router"),
            by_rank(whole["x"], shape),
            slices(whole["experts"], shape),
            strict=True,
        )
    ],
    run_gathered,
    gathered_alone,
)

ROWS_OF_EXPERTS = torch.tensor([3, 0, 4, 1, 2])


def run_padded(here, mesh, shape):
    """A group that shares out the rows of every expert, each of which it pads to its size."""
    size, everybody = shape[0] * shape[1], mesh[0]
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


PADDED = Way(
    lambda shape: {"x": normal(10, H), "experts": made(E, 6, 2)},
    lambda whole, shape: [
        {**each, **mapped(torch.clone, {"experts": whole["experts"]})}
        for each in everywhere(whole, shape, "x")
    ],
    run_padded,
    lambda whole, shape: [
        experts_on_rows(whole["x"], ROWS_OF_EXPERTS, whole["experts"], CONFIG)
    ] * (shape[0] * shape[1]),
)  # fmt: skip


def replicated(copied):
    """Tokens on all ranks, with or without copies of the busy experts."""

    def placed(shape):
        size = shape[0] * shape[1]
        load = torch.tensor([9, 1, 5, 1, 3])
        placement = place_experts(load, -(-(E + 3) // size) * size, size) if copied else None
        held = held_experts(E, size, placement)
        if copied:
            logical = placement.physical_to_logical.tolist()
            held = [[logical[p] for p in each] for each in held]
        return placement, held

    def run(here, mesh, shape):
        ids = [routed(6)[1]] * len(here)
        x, weights, local = (column(here, name) for name in ("x", "weights", "local"))
        return partial_sums.replicated_experts(
            x, weights, ids, local, E, CONFIG, mesh[0], placed(shape)[0]
        )

    return Way(
        lambda shape: {"x": normal(6, H), "weights": routed(6)[0], "experts": made(E, 6, 2)},
        lambda whole, shape: [
            {**each, "local": take_experts(whole["experts"], held)}
            for each, held in zip(
                everywhere(whole, shape, "x", "weights"), placed(shape)[1], strict=True
            )
        ],
        run,
        lambda whole, shape: [
            experts(whole["x"], whole["experts"], whole["weights"], routed(6)[1], CONFIG)
        ] * (shape[0] * shape[1]),
    )  # fmt: skip


def sliced(route_after, hashed=False):
    """Rows of the mesh have the same tokens, each row others; experts are spread over all ranks."""
    counts, routing = (5, 2, 0), HASHED if hashed else ROUTING

    def tokens_of(shape):
        return [torch.arange(count) % 4 for count in counts[: shape[0]]]

    def cut(whole, shape):
        rows, size = whole["x"].split(list(counts[: shape[0]])), shape[0] * shape[1]
        return [
            {
                "x": rows[rank // shape[1]].clone(),
                "router": whole["router"].clone(),
                "local": take_experts(whole["experts"], held),
            }
            for rank, held in enumerate(held_experts(E, size))
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
        return [rows[rank // shape[1]] for rank in range(shape[0] * shape[1])]

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


WAYS = {
    "shared": SHARED,
    "terms": TERMS,
    "external": EXTERNAL,
    "gathered": GATHERED,
    "padded": PADDED,
    "replicated": replicated(False),
    "copies": replicated(True),
    "sliced, routed before": sliced(False),
    "sliced, routed after": sliced(True, hashed=True),
}


def target(rank, y):
    """Another loss on every rank: it is the sum of the ranks' own."""
    return normal(*y.shape, seed=50 + rank)


def spread(mesh, name, shape, planted=None):
    """Outputs of the ranks here, and the gradients of what they have."""
    way = WAYS[name]
    own = way.cut(way.whole(shape), shape)
    here = [leaves(own[rank]) for rank in mesh[0].here]
    with pytest.MonkeyPatch.context() as patch:
        if planted is not None:
            FAULTS[planted][1](patch)
        outputs = way.run(here, mesh, shape)
        sum((y * target(r, y)).sum() for r, y in zip(mesh[0].here, outputs, strict=True)).backward()
    gradients = [{path: leaf.grad for path, leaf in flat(each).items()} for each in here]
    return [y.detach() for y in outputs], gradients


def together(name, shape, gradients):
    """The gradient of the whole: what autograd takes those of the ranks to, through the cut."""
    way = WAYS[name]
    whole = leaves(way.whole(shape))
    pairs = [
        (tensor, gradient[path])
        for each, gradient in zip(way.cut(whole, shape), gradients, strict=True)
        for path, tensor in flat(each).items()
    ]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return {path: leaf.grad for path, leaf in flat(whole).items()}


def alone(name, shape):
    whole = leaves(WAYS[name].whole(shape))
    outputs = WAYS[name].alone(whole, shape)
    sum((y * target(rank, y)).sum() for rank, y in enumerate(outputs)).backward()
    return [y.detach() for y in outputs], {path: leaf.grad for path, leaf in flat(whole).items()}


def assert_same(name, shape, outputs, gradients):
    expected, of_whole = alone(name, shape)
    for y, one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, one, **TIGHT)
    torch.testing.assert_close(together(name, shape, gradients), of_whole, **TIGHT)


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("name", WAYS)
def test_a_list_of_ranks_has_the_outputs_and_gradients_of_one(name, shape):
    assert_same(name, shape, *spread(mesh_of_list(*shape), name, shape))


def on_processes(world, name, shape, planted=None):
    of_ranks = world.run(spread, shape, name, shape, planted)
    outputs, gradients = zip(*of_ranks, strict=True)
    return [y for [y] in outputs], [of_rank for [of_rank] in gradients]


@pytest.mark.parametrize("shape", _processes.MESHES)
@pytest.mark.parametrize("name", WAYS)
def test_processes_have_the_outputs_and_gradients_of_one(name, shape, world):
    assert_same(name, shape, *on_processes(world, name, shape))


# What is planted


def never(tensors, ranks):
    return list(tensors)


def twice(tensors, ranks):
    return all_reduce(all_reduce(tensors, ranks), ranks)


def sum_without_gradient(tensors, ranks):
    """The gradient is this rank's own."""
    return [
        own + (total - own).detach()
        for own, total in zip(tensors, all_reduce(tensors, ranks), strict=True)
    ]


def gather_without_gradient(tensors, ranks):
    """The gradient is this rank's own: what the others ask for its tokens is not added."""
    gathered = []
    for own, everything in zip(tensors, all_gather(tensors, ranks), strict=True):
        rank = ranks.here[len(gathered)]
        counts = domain_transforms.gather_counts(tensors, ranks)[len(gathered)].tolist()
        pieces = [*everything.detach().split(counts)]
        pieces[rank] = own
        gathered.append(torch.cat(pieces))
    return gathered


def in_front(tokens, multiple, value=0):
    behind = token_slices.F.pad(tokens, [0, 0] * (tokens.ndim - 1) + [-len(tokens) % multiple, 0])
    return behind


def last_rows(tokens, num_tokens):
    return tokens[len(tokens) - num_tokens :].clone()


def as_many_everywhere(tensors, ranks):
    return [torch.full((ranks.size,), len(each)) for each in tensors]


def changed(module, name, change):
    """A function whose arguments or result are changed."""
    real = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *given: change(real, *given))


def copies_from_the_rank(real, *given):
    """Each rank begins with another copy of an expert: as good a choice, and not the others'."""
    *rest, rank, config, placement = given
    rolled = placement.logical_to_physical.clone()
    for copies, count in zip(rolled, placement.replica_count.tolist(), strict=True):
        copies[:count] = copies[:count].roll(rank)
    return real(*rest, rank, config, dataclasses.replace(placement, logical_to_physical=rolled))


def replaced(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


FAULTS = {
    "the shared expert is never reduced": (
        "shared",
        replaced(partial_sums, "all_reduce", never),
    ),
    "the shared expert is reduced twice": (
        "shared",
        replaced(partial_sums, "all_reduce", twice),
    ),
    "the gradient of the sum is one rank's": (
        "shared",
        replaced(partial_sums, "all_reduce", sum_without_gradient),
    ),
    "the gate learns from nobody": (
        "shared",
        changed(
            partial_sums,
            "partial_shared",
            lambda real, x, part, config, gate, scale: real(x, part, config, gate.detach(), scale),
        ),
    ),
    "what every rank has is reduced": (
        "terms",
        changed(
            partial_sums,
            "reduce_once",
            lambda real, partial, whole, ranks: real([*partial, *whole], [], ranks),
        ),
    ),
    "partial terms are taken for whole ones": (
        "terms",
        changed(
            partial_sums,
            "reduce_once",
            lambda real, partial, whole, ranks: real(partial[:1], [*partial[1:], *whole], ranks),
        ),
    ),
    "tokens go to a routed expert instead of the shared one": (
        "external",
        changed(
            external_shared,
            "add_shared_column",
            lambda real, w, ids, num_experts, shared: (
                real(w, ids, num_experts, shared)[0],
                torch.cat([ids.clamp(max=E - 1), torch.full((len(ids), 1), E - 1)], dim=1),
            ),
        ),
    ),
    "padding is a shared expert": (
        "external",
        changed(
            external_shared,
            "add_shared_column",
            lambda real, w, ids, num_experts, shared: (
                real(w, ids, num_experts, shared)[0],
                torch.cat([ids, torch.full((len(ids), 1), num_experts)], dim=1),
            ),
        ),
    ),
    "the gate of the external expert learns from nobody": (
        "external",
        changed(
            external_shared,
            "external_shared_parallel",
            lambda real, *given: real(*given[:8], [g.detach() * 1 for g in given[8]], given[9]),
        ),
    ),
    "own tokens begin at rank times their number": (
        "gathered",
        replaced(domain_transforms, "gather_counts", as_many_everywhere),
    ),
    "the gradient of gathered tokens is one rank's": (
        "gathered",
        replaced(domain_transforms, "all_gather", gather_without_gradient),
    ),
    "rows of an expert are padded in front": (
        "padded",
        replaced(token_slices, "pad_tokens", in_front),
    ),
    "rows of an expert are trimmed from the front": (
        "padded",
        replaced(token_slices, "trim_tokens", last_rows),
    ),
    "copies are chosen by the rank": (
        "copies",
        changed(partial_sums, "partial_of_held_experts", copies_from_the_rank),
    ),
    "pairs of other ranks' experts are computed": (
        "replicated",
        changed(
            partial_sums,
            "experts",
            lambda real, x, local, w, rows, config: real(x, local, w, rows.clamp(min=0), config),
        ),
    ),
    "gathered tokens are trimmed from the front": (
        "sliced, routed before",
        replaced(token_slices, "trim_tokens", last_rows),
    ),
    "the gradient of gathered outputs is one rank's": (
        "sliced, routed before",
        replaced(token_slices, "all_gather", gather_without_gradient),
    ),
}


@pytest.mark.parametrize("planted", FAULTS)
def test_what_is_planted_shows(planted):
    name, shape = FAULTS[planted][0], (2, 2)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        assert_same(name, shape, *spread(mesh_of_list(*shape), name, shape, planted))


@pytest.mark.parametrize("shape", _processes.MESHES)
def test_copies_that_processes_choose_differently_show(shape, world):
    planted = "copies are chosen by the rank"
    with pytest.raises(AssertionError):
        assert_same("copies", shape, *on_processes(world, "copies", shape, planted))


# Losses of a batch that is cut

LOSSES = {
    "switch": BalanceConfig("switch", 0.5),
    "deepseek_expert": BalanceConfig("deepseek_expert", score="sigmoid"),
    "deepseek_device": BalanceConfig("deepseek_device", num_devices=2),
    "transformers_concatenated": BalanceConfig("transformers_concatenated"),
}
# Rows of each micro-batch of each rank: unequal, one of nothing but padding, and one empty.
CUTS = {
    1: [[(0, 1), (1, 6), (6, 8), (8, 8), (8, 12)]],
    2: [[(0, 3), (3, 3)], [(3, 6), (6, 8), (8, 12)]],
    4: [[(0, 5)], [(5, 5)], [(5, 6), (6, 8)], [(8, 12)]],
}
REAL = torch.tensor([True, False, True, True, True, False, False, False, True, True, True, True])


def batch():
    logits = normal(12, 6, seed=11) * 2
    return logits, route(logits, RoutingConfig(top_k=K))[1]


def own_losses(mesh, loss, cuts):
    """The losses of a rank's own micro-batches, weighted by their real tokens; and its gradient."""
    group, rank = (mesh[0].group, mesh[0].here[0]) if mesh else (None, 0)
    logits, ids = batch()
    logits.requires_grad_()
    own = torch.cat([torch.arange(start, stop) for start, stop in cuts[rank]])
    counts = torch.bincount(ids[own][REAL[own]].flatten(), minlength=6)
    everybodys = global_counts(counts, group)
    real = global_counts(REAL[own].sum()[None], group)
    total = torch.zeros(())
    for start, stop in cuts[rank]:
        rows = slice(start, stop)
        one = balance_loss(logits[rows], ids[rows], LOSSES[loss], REAL[rows], everybodys)
        total = total + (one + z_loss(logits[rows], REAL[rows])) * REAL[rows].sum() / real[0]
    total.backward()
    return total.detach(), logits.grad


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_weighted_by_real_tokens_do_not_depend_on_the_cut(loss, size, world):
    """Micro-batches of one process, and of two and four processes."""
    shape = {2: (1, 2), 4: (2, 2)}.get(size)
    found = [own_losses(None, loss, CUTS[1])]
    if shape is not None:
        found = world.run(own_losses, shape, loss, CUTS[size])
    logits, ids = batch()
    logits.requires_grad_()
    whole = balance_loss(logits, ids, LOSSES[loss], REAL) + z_loss(logits, REAL)
    whole.backward()
    totals, gradients = zip(*found, strict=True)
    torch.testing.assert_close(sum(totals), whole.detach(), **TIGHT)
    torch.testing.assert_close(sum(gradients), logits.grad, **TIGHT)


def test_losses_that_are_not_weighted_or_count_for_themselves_depend_on_the_cut():
    logits, ids = batch()
    config, parts = LOSSES["switch"], [slice(0, 1), slice(1, 6), slice(8, 12)]
    whole = balance_loss(logits, ids, config, REAL)
    counts = torch.bincount(ids[REAL].flatten(), minlength=6)
    real = [int(REAL[rows].sum()) for rows in parts]
    given = [balance_loss(logits[r], ids[r], config, REAL[r], counts) for r in parts]
    own = [balance_loss(logits[r], ids[r], config, REAL[r]) for r in parts]

    def weighted(losses):
        return sum(n * each for n, each in zip(real, losses, strict=True)) / sum(real)

    torch.testing.assert_close(weighted(given), whole, **TIGHT)
    assert not torch.allclose(sum(given) / 3, whole)
    assert not torch.allclose(weighted(own), whole)
    z = [z_loss(logits[r], REAL[r]) for r in parts]
    torch.testing.assert_close(weighted(z), z_loss(logits, REAL), **TIGHT)
    assert not torch.allclose(sum(z) / 3, z_loss(logits, REAL))
