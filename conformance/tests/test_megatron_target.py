"""The megatron-core targets: what they call, what they conform on, what they are known to fail."""

import pytest
import torch

pytest.importorskip("megatron.core", exc_type=ImportError)

from moe_conformance.registry import requirements
from moe_conformance.target import Unsupported
from moe_conformance.targets.megatron import Megatron, MegatronBias
from moe_reference.config import BalanceConfig, RoutingConfig
from moe_reference.dispatch import combine, dispatch
from moe_reference.gating import route
from moe_reference.load_balancing import balance_loss

pytestmark = pytest.mark.usefixtures("one_thread")

# Found by nearly every case that is drawn for them.
KNOWN = {
    Megatron: (
        *("BALANCE-14", "BALANCE-15", "BALANCE-16", "BALANCE-17", "BALANCE-25", "BALANCE-27"),
        *("BALANCE-30", "BALANCE-31", "BALANCE-33", "BALANCE-35", "BALANCE-47"),
        *("DISPATCH-23", "DISPATCH-31", "GATE-08", "GATE-09", "GATE-19"),
    ),
    MegatronBias: ("BALANCE-38", "BALANCE-43"),
}

CONFORMS = {
    Megatron: (
        *("BALANCE-01", "BALANCE-12", "BALANCE-18", "BALANCE-26", "BALANCE-46", "BALANCE-49"),
        *("BALANCE-28", "DISPATCH-11", "DISPATCH-12", "DISPATCH-20", "DISPATCH-28"),
        *("DISPATCH-01", "DISPATCH-03", "DISPATCH-21", "DISPATCH-24", "DISPATCH-25"),
        *("DISPATCH-32", "DISPATCH-26", "DISPATCH-44"),
        *("GATE-01", "GATE-05", "GATE-10", "GATE-11", "GATE-12", "GATE-18"),
    ),
    MegatronBias: ("BALANCE-36", "BALANCE-37", "BALANCE-41", "BALANCE-42", "BALANCE-55"),
}

# A row never names an expert twice, and no row belongs to nobody.
NOT_ASKED = ("BALANCE-05", "DISPATCH-07", "DISPATCH-37")

# The library's functions, and the operation that each one serves.
CALLED = {
    "topk_routing_with_score_function": "route",
    "compute_routing_scores_for_aux_loss": "balance_loss",
    "get_tokens_per_expert_and_token_count": "balance_loss",
    "switch_load_balancing_loss_func": "balance_loss",
    "z_loss_func": "z_loss",
    "permute": "dispatch",
    "unpermute": "combine",
    "apply_router_token_dropping": "drop_to_capacity",
    "get_updated_expert_bias": "update_bias",
}


def test_what_is_known_is_found(suite, made, one_of_known):
    target, id = one_of_known
    suite.fails(made(target), id, 30)


def test_the_rest_conforms(suite, made, one_of_conforms):
    target, id = one_of_conforms
    suite.passes(made(target), id, 2)


@pytest.mark.parametrize("function", CALLED)
def test_every_answer_is_the_library_s(suite, made, breaks, function):
    operation = CALLED[function]
    target = made(MegatronBias if operation == "update_bias" else Megatron)
    breaks(target._utils, function)
    served = [each.id for each in requirements() if each.operation == operation]
    found = suite.statuses(target, " ".join(served), 1)
    if function in ("get_tokens_per_expert_and_token_count", "switch_load_balancing_loss_func"):
        # The loss over sequences has them from another module: see below.
        assert "crash" in found.values()
    else:
        assert not {"pass", "observed"} & set(found.values()), found


def test_the_loss_over_sequences_is_the_router_s(made, breaks):
    from megatron.core.transformer.moe.router import TopKRouter

    config = BalanceConfig("deepseek_sequence", sequence_length=4)
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    ids = logits.topk(2).indices
    found = made(Megatron).balance_loss(logits, ids, config)
    torch.testing.assert_close(found, balance_loss(logits, ids, config))

    breaks(TopKRouter, "_apply_seq_aux_loss")
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        made(Megatron).balance_loss(logits, ids, config)


def test_the_group_score_is_the_one_with_its_name(made):
    logits = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    for top_k, topk_groups in ((2, 2), (4, 2), (6, 2), (7, 2), (6, 3)):
        config = RoutingConfig(
            top_k, num_groups=4, topk_groups=topk_groups, group_score="topk_share_sum"
        )
        _, ids = made(Megatron).route(logits, config)
        assert torch.equal(ids, route(logits, config)[1].sort().values)


def test_rows_go_there_and_back(made):
    target, random = made(Megatron), torch.Generator().manual_seed(0)
    x, ids = torch.randn(9, 3, generator=random), torch.rand(9, 6, generator=random).topk(3).indices
    ids[2, 1], ids[4, 0] = -1, 6
    weights = torch.rand(9, 3, generator=random)
    for actual, wanted in zip(target.dispatch(x, ids, 6), dispatch(x, ids, 6), strict=True):
        assert torch.equal(actual, wanted.to(actual.dtype))
    rows, _, slots = target.dispatch(x, ids, 6)
    shuffled = torch.randperm(len(slots), generator=random)
    torch.testing.assert_close(
        target.combine(rows[shuffled], slots[shuffled], weights), combine(rows, slots, weights)
    )


@pytest.mark.parametrize("id", NOT_ASKED)
def test_what_a_map_cannot_hold_is_not_asked(suite, made, id):
    assert suite.statuses(made(Megatron), id, 1) == {id: "unsupported"}


def test_what_a_map_cannot_hold_is_refused(made):
    with pytest.raises(Unsupported, match="twice"):
        made(Megatron).dispatch(torch.zeros(1, 1), torch.tensor([[0, 0]]), 2)
    with pytest.raises(Unsupported, match="no pair"):
        made(Megatron).combine(torch.zeros(1, 1), torch.tensor([2]), torch.ones(1, 2))


@pytest.mark.parametrize("found", ["none", "0.15.3"])
@pytest.mark.parametrize("target", KNOWN)
def test_a_missing_or_old_library_is_one_sentence(needs, target, found):
    install = "pip install --no-deps megatron-core==0.16.1"
    needs(target, found, f"{target.name} needs megatron-core >= 0.16", install)
