"""The expert parallelism of transformers: what it passes, what is known not to, and that it is its.

Ranks are threads here; `moespec check` has processes.
"""

import pytest
import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets import transformers as adapter
from moe_reference.config import ExpertsConfig, ExpertWeights
from transformers.distributed import expert_parallel as library

NAMES = [name for name in adapter.variants() if name.startswith("expert_parallel-")]
EVERY_RANK_ITS_OWN = "EP-01 EP-03 EP-04 EP-07 EP-08 EP-12 EP-18"
ONE_BATCH = "EP-19 EP-20 EP-21"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=NAMES)
def target(request, made):
    return made(adapter.variants()[request.param])


def test_a_target_says_what_it_is(target, says_what_it_is):
    says_what_it_is(target, target.name, "transformers")
    assert target.operations() == (
        "expert_parallel",
        "sliced_expert_parallel",
        "replicated_experts",
    )


def test_it_conforms_where_it_does(target, suite):
    suite.passes(target, f"{EVERY_RANK_ITS_OWN} {ONE_BATCH}", 12)


# Known: see docs/findings.md. One that is mended, there or here, has to leave.


def test_what_does_not_fit_is_not_refused(target, suite):
    suite.fails(target, "EP-17", 12)


def test_a_rank_without_rows_computes_a_row_of_zeros_with_its_first_expert(target, suite):
    results = suite.results(target, "EP-25", 12)
    assert results["EP-25"].status == "fail"
    assert "got nan" in results["EP-25"].message


def test_a_rank_none_of_whose_experts_was_chosen_has_no_backward_with_eager(made, suite):
    results = {
        name: suite.results(made(adapter.variants()[name]), "EP-22", 12)["EP-22"] for name in NAMES
    }
    found = {name.rpartition("-")[2]: result.status for name, result in results.items()}
    assert found == {"eager": "timeout", "batched_mm": "pass", "grouped_mm": "pass"}
    assert "in the backward pass" in results["expert_parallel-eager"].message


# The library's own.


@pytest.mark.parametrize(
    ("holder", "step", "served"),
    [
        (library, "all_to_all_single", "EP-01 EP-19"),
        (library, "all_to_all_single_autograd", "EP-01 EP-19"),
        (library.AllToAllEP, "_dispatch_tokens", "EP-01 EP-19"),
        (library.AllToAllEP, "_combine_tokens", "EP-01 EP-19"),
        (library.AllReduceEP, "__call__", "EP-21 EP-22"),
        (library.MoEParamShard, "shard_param", "EP-01 EP-19 EP-21"),
    ],
)
def test_the_library_itself_is_called(holder, step, served, made, suite, breaks):
    breaks(holder, step)
    suite.crashes(made(adapter.variants()["expert_parallel-grouped_mm"]), served, 4)


@pytest.mark.parametrize("field", ["placement", "num_experts"])
def test_calls_outside_the_declaration_are_refused(field, target, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    x = torch.zeros(1, 8)
    given = {
        "x": x,
        "weights": torch.ones(1, 1),
        "expert_ids": torch.zeros(1, 1, dtype=torch.int64),
        "local": ExpertWeights(x.new_zeros(1, 16, 8), x.new_zeros(1, 8, 8)),
        "num_experts": 3 if field == "num_experts" else 2,
        "config": ExpertsConfig(),
        "group": None,
        "placement": object() if field == "placement" else None,
    }
    with pytest.raises(Unsupported, match="as many experts on each rank"):
        target.replicated_experts(**given)
