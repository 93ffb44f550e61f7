"""The deepspeed targets: what they call, what they conform on, what they are known to fail."""

import importlib.metadata

import pytest
import torch

pytest.importorskip("deepspeed", exc_type=ImportError)

from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import Unsupported
from moe_conformance.targets.deepspeed import (
    DeepSpeedCombine,
    DeepSpeedTop1,
    DeepSpeedTop2,
    DeepSpeedTopK,
)
from moe_reference.config import BalanceConfig, RoutingConfig
from moe_reference.dispatch import drop_to_capacity

FEW = Effort(examples=2, minimum=1, shrinks=0)
RARE = Effort(examples=30, minimum=1, shrinks=0)
ONCE = Effort(examples=1, minimum=1, shrinks=0)

# Found by nearly every case that is drawn for them.
KNOWN = {
    DeepSpeedTop1: (
        *("BALANCE-13", "BALANCE-14", "BALANCE-16", "BALANCE-25", "BALANCE-27", "DISPATCH-23"),
    ),
    DeepSpeedTop2: ("BALANCE-16", "BALANCE-27", "GATE-02"),
    DeepSpeedTopK: ("BALANCE-16", "BALANCE-27"),
    DeepSpeedCombine: ("GATE-02", "GATE-15", "GATE-19"),
}

BALANCE = ("BALANCE-02", "BALANCE-12", "BALANCE-23", "BALANCE-26")
GATING = ("GATE-01", "GATE-04", "GATE-18", "GATE-23", "GATE-24")
CONFORMS = {
    DeepSpeedTop1: (*BALANCE, *GATING, "GATE-19", "DISPATCH-21", "DISPATCH-22", "DISPATCH-33"),
    DeepSpeedTop2: (*BALANCE, *GATING, "GATE-07", "GATE-19", "BALANCE-07"),
    DeepSpeedTopK: (
        *(*BALANCE, *GATING, "GATE-07", "GATE-15", "GATE-19", "BALANCE-45"),
        *("DISPATCH-21", "DISPATCH-22", "DISPATCH-23", "DISPATCH-33", "DISPATCH-41", "DISPATCH-44"),
    ),
    DeepSpeedCombine: (*GATING, "GATE-07"),
}

CALLED = {
    DeepSpeedTop1: "top1gating",
    DeepSpeedTop2: "top2gating",
    DeepSpeedTopK: "topkgating",
    DeepSpeedCombine: "topkgating",
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def targets():
    return {made: made() for made in KNOWN}


def status(target, id, effort):
    [requirement] = [each for each in requirements() if each.id == id]
    executor = InlineExecutor(target)
    return run_requirement(requirement, inline_scope(executor), executor, effort, seed=0).status


@pytest.mark.parametrize(("made", "id"), [(m, id) for m, ids in KNOWN.items() for id in ids])
def test_what_is_known_is_found(targets, made, id):
    assert status(targets[made], id, RARE) in ("fail", "crash")


@pytest.mark.parametrize(("made", "id"), [(m, id) for m, ids in CONFORMS.items() for id in ids])
def test_the_rest_conforms(targets, made, id):
    assert status(targets[made], id, FEW) == "pass"


@pytest.mark.parametrize("made", CALLED)
def test_every_answer_is_the_library_s(targets, monkeypatch, made):
    def broken(*args, **named):
        raise OSError("broken")

    monkeypatch.setattr(targets[made]._gating, CALLED[made], broken)
    served = [each for each in requirements() if each.operation in made.operations()]
    found = {each.id: status(targets[made], each.id, ONCE) for each in served}
    # A negative capacity and the like are refused before the library is asked.
    found.pop("DISPATCH-33", None)
    assert not {"pass", "observed"} & set(found.values()), found


def test_the_first_pairs_of_an_expert_stay(targets):
    random = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(20, 3, generator=random), torch.rand(20, 5, generator=random)
    ids = ids.topk(3).indices
    for capacity in (0, 1, 4, 12, 99):
        _, found = targets[DeepSpeedTopK].drop_to_capacity(weights, ids, 5, capacity, "position")
        assert torch.equal(found, drop_to_capacity(weights, ids, 5, capacity, "position")[1])


def test_what_the_library_does_not_offer_is_refused(targets):
    logits = torch.zeros(2, 4)
    with pytest.raises(Unsupported, match="no routing with score = 'sigmoid'"):
        targets[DeepSpeedTop1].route(logits, RoutingConfig(1, "sigmoid"))
    config = BalanceConfig("deepseek_device", num_devices=2)
    with pytest.raises(Unsupported, match="no balance with loss = 'deepseek_device'"):
        targets[DeepSpeedTopK].balance_loss(logits, torch.zeros(2, 1).long(), config)
    with pytest.raises(Unsupported, match="no capacity with policy = 'probs'"):
        targets[DeepSpeedTopK].drop_to_capacity(
            torch.ones(2, 1), torch.zeros(2, 1).long(), 4, 1, "probs"
        )


@pytest.mark.parametrize("found", ["", "0.18.9"])
@pytest.mark.parametrize("made", KNOWN)
def test_a_missing_or_old_library_is_one_sentence(monkeypatch, made, found):
    def version(name):
        if not found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"{made.name} needs .* 0.19, found {found or 'none'}: "):
        made()
