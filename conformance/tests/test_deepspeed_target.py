"""The deepspeed targets: what they call, what they conform on, what they are known to fail."""

import pytest
import torch

pytest.importorskip("deepspeed", exc_type=ImportError)

from moe_conformance.registry import requirements
from moe_conformance.target import Unsupported
from moe_conformance.targets.deepspeed import (
    DeepSpeedCombine,
    DeepSpeedTop1,
    DeepSpeedTop2,
    DeepSpeedTopK,
)
from moe_reference.config import BalanceConfig, RoutingConfig
from moe_reference.dispatch import drop_to_capacity

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_what_is_known_is_found(suite, made, one_of_known):
    target, id = one_of_known
    suite.fails(made(target), id, 30)


def test_the_rest_conforms(suite, made, one_of_conforms):
    target, id = one_of_conforms
    suite.passes(made(target), id, 2)


@pytest.mark.parametrize("target", CALLED)
def test_every_answer_is_the_library_s(suite, made, breaks, target):
    breaks(made(target)._gating, CALLED[target])
    served = [each.id for each in requirements() if each.operation in target.operations()]
    # A negative capacity and the like are refused before the library is asked.
    served = [id for id in served if id != "DISPATCH-33"]
    found = suite.statuses(made(target), " ".join(served), 1)
    assert not {"pass", "observed"} & set(found.values()), found


def test_the_first_pairs_of_an_expert_stay(made):
    random = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(20, 3, generator=random), torch.rand(20, 5, generator=random)
    ids = ids.topk(3).indices
    for capacity in (0, 1, 4, 12, 99):
        _, found = made(DeepSpeedTopK).drop_to_capacity(weights, ids, 5, capacity, "position")
        assert torch.equal(found, drop_to_capacity(weights, ids, 5, capacity, "position")[1])


def test_what_the_library_does_not_offer_is_refused(made):
    logits = torch.zeros(2, 4)
    with pytest.raises(Unsupported, match="no routing with score = 'sigmoid'"):
        made(DeepSpeedTop1).route(logits, RoutingConfig(1, "sigmoid"))
    config = BalanceConfig("deepseek_device", num_devices=2)
    with pytest.raises(Unsupported, match="no balance with loss = 'deepseek_device'"):
        made(DeepSpeedTopK).balance_loss(logits, torch.zeros(2, 1).long(), config)
    with pytest.raises(Unsupported, match="no capacity with policy = 'probs'"):
        made(DeepSpeedTopK).drop_to_capacity(
            torch.ones(2, 1), torch.zeros(2, 1).long(), 4, 1, "probs"
        )


@pytest.mark.parametrize("found", ["none", "0.18.9"])
@pytest.mark.parametrize("target", KNOWN)
def test_a_missing_or_old_library_is_one_sentence(needs, target, found):
    install = "pip install --no-deps --no-build-isolation deepspeed==0.19.8"
    needs(target, found, f"{target.name} needs deepspeed >= 0.19", install)
