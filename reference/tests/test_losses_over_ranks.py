"""Losses of a batch that is cut into micro-batches, on one process and on several over gloo."""

import importlib.util
from pathlib import Path

import pytest
import torch
from moe_reference.config import BalanceConfig, RoutingConfig
from moe_reference.gating import route
from moe_reference.load_balancing import balance_loss, global_counts, z_loss

_spec = importlib.util.spec_from_file_location(
    "ranks_of_processes", Path(__file__).with_name("ranks_of_processes.py")
)
_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_processes)
world = _processes.world

# Both sides add the same float64 products in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
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
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(12, 6, generator=generator, dtype=torch.float64) * 2
    return logits, route(logits, RoutingConfig(top_k=2))[1]


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
