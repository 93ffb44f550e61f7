"""What the adapters of libraries share: one version check, and one way to refuse."""

import importlib.metadata
import re

import pytest
import torch
from moe_conformance import Capabilities, Target
from moe_conformance.target import Unsupported
from moe_conformance.targets.adapter import (
    installed,
    kept_random_state,
    refuse,
    refuse_experts,
    refuse_layer,
    refuse_routing,
    refuse_tensor,
)
from moe_reference.config import (
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)

INSTALL = "pip install --no-deps library==0.16.1"


class Little(Target):
    """Declares two routings; gated silu without biases, for some sizes; no shared expert."""

    name = "library/little"
    version = "1"
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16"),
        routing=[
            {"score": ("softmax",), "renormalize": (False, True), "selection_bias": (False,)},
            {"score": ("sigmoid",), "renormalize": (True,), "hash_table": (False,)},
        ],
        experts={
            "activation": ("silu",),
            "bias": (False,),
            "expert_map": (False,),
            "weight_on": ("output",),
        },
        layer={
            "shared": (False,),
            "router_bias": (False,),
            "router_dtype": ("float32",),
            "padding_mask": (False,),
        },
        hidden_multiple=4,
        intermediate_multiple=2,
    )


@pytest.fixture
def index(monkeypatch):
    """Say which versions of which distributions there are."""

    def there_are(**versions):
        def version(distribution):
            if distribution not in versions:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return versions[distribution]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return there_are


def refuses(sentence):
    return pytest.raises(Unsupported, match=f"^{re.escape(sentence)}$")


@pytest.mark.parametrize(
    "found",
    ["0.16", "0.16.0", "0.16.1.post1", "0.16.0rc2", "0.16rc2", "0.100.0", "1", "1.0.0+cpu"],
)
def test_a_version_that_is_new_enough_is_given_back(index, found):
    index(library=found)
    assert installed("library/little", (0, 16), INSTALL, "library") == found


@pytest.mark.parametrize("found", ["0.15.9", "0.15.99rc3", "0.9", "0", "0rc99", "none"])
def test_an_older_or_missing_library_is_one_sentence(needs, found):
    needs(
        lambda: installed("library/little", (0, 16), INSTALL, "library"),
        found,
        "library/little needs library >= 0.16",
        INSTALL,
    )


def test_a_whole_number_is_its_first_version(index):
    index(library="2")
    assert installed("library/little", (2, 0), INSTALL, "library") == "2"


def test_the_first_name_that_is_there_counts(index):
    index(other="0.17.0")
    assert installed("library/little", (0, 16), INSTALL, "library", "other") == "0.17.0"
    index(library="0.15.0", other="0.17.0")
    with pytest.raises(ImportError, match=r"needs library >= 0\.16, found 0\.15\.0: pip install"):
        installed("library/little", (0, 16), INSTALL, "library", "other")
    index(unrelated="1.0")
    with pytest.raises(ImportError, match=r"needs library >= 0\.16, found none: pip install"):
        installed("library/little", (0, 16), INSTALL, "library", "other")


def test_what_an_alternative_takes_is_not_refused():
    for asked in (
        {"score": "softmax", "renormalize": False},
        {"score": "sigmoid", "renormalize": True, "selection_bias": True},
        {},
    ):
        refuse(Little(), "routing", asked)


def test_the_nearest_alternative_is_named():
    asked = {"score": "sigmoid", "renormalize": False, "selection_bias": True}
    with refuses("library/little: no routing with renormalize = False"):
        refuse(Little(), "routing", asked)


def test_of_two_that_are_equally_near_the_first_is_named():
    asked = {"score": "sigmoid", "renormalize": False}
    with refuses("library/little: no routing with score = 'sigmoid'"):
        refuse(Little(), "routing", asked)
    asked |= {"selection_bias": True, "hash_table": True}
    with refuses("library/little: no routing with score = 'sigmoid', selection_bias = True"):
        refuse(Little(), "routing", asked)


def test_what_is_not_asked_or_not_declared_is_not_looked_at():
    refuse(Little(), "routing", {"selection_bias": False})
    refuse(Little(), "routing", {"score": "softmax", "scale": 2.5})
    refuse(Little(), "balance", {"loss": "switch"})


def test_another_dtype_or_device_is_refused():
    refuse_tensor(Little(), torch.zeros(2, dtype=torch.bfloat16))
    with refuses("library/little: no float64 on cpu"):
        refuse_tensor(Little(), torch.zeros(2, dtype=torch.float64))
    with refuses("library/little: no float32 on meta"):
        refuse_tensor(Little(), torch.zeros(2, device="meta"))


def test_another_routing_is_refused():
    refuse_routing(Little(), RoutingConfig(2), None)
    refuse_routing(Little(), RoutingConfig(2, "sigmoid", renormalize=True), torch.zeros(4))
    with refuses("library/little: no routing with selection_bias = True"):
        refuse_routing(Little(), RoutingConfig(2), torch.zeros(4))
    table = torch.zeros(3, 2, dtype=torch.int64)
    hashed = RoutingConfig(2, "sigmoid", renormalize=True, hash_table=table)
    with refuses("library/little: no routing with score = 'sigmoid'"):
        refuse_routing(Little(), hashed, None)
    with refuses("library/little: no routing with hash_table = True"):
        refuse_routing(Little(), hashed, torch.zeros(4))


def weights(hidden=4, intermediate=2, **biases):
    gate_up, down = torch.zeros(3, 2 * intermediate, hidden), torch.zeros(3, hidden, intermediate)
    return ExpertWeights(gate_up, down, **biases)


def test_other_experts_are_refused():
    config = ExpertsConfig()
    refuse_experts(Little(), weights(8, 6), config, expert_map=False)
    with refuses("library/little: no H = 6 with I = 2"):
        refuse_experts(Little(), weights(6, 2), config)
    with refuses("library/little: no H = 4 with I = 3"):
        refuse_experts(Little(), weights(4, 3), config)
    with refuses("library/little: no experts with activation = 'gelu'"):
        refuse_experts(Little(), weights(), ExpertsConfig("gelu"))
    with refuses("library/little: no experts with expert_map = True"):
        refuse_experts(Little(), weights(), config, expert_map=True)
    for bias in ("gate_up_bias", "down_bias"):
        with refuses("library/little: no experts with bias = True"):
            refuse_experts(Little(), weights(**{bias: torch.zeros(3, 4)}), config)


def layer(**changed):
    return LayerWeights(**{"router": torch.zeros(3, 4), "experts": weights(), **changed})


def test_another_layer_is_refused_in_any_of_its_parts():
    x, routing = torch.zeros(1, 2, 4), RoutingConfig(2)
    config = LayerConfig(routing, ExpertsConfig())
    refuse_layer(Little(), x, layer(), config, padding_mask=False)
    for part, given in {
        "no float64 on cpu": (x.double(), layer(), config),
        "no routing with selection_bias = True": (
            x,
            layer(selection_bias=torch.zeros(3)),
            config,
        ),
        "no experts with activation = 'relu'": (
            x,
            layer(),
            LayerConfig(routing, ExpertsConfig("relu")),
        ),
        "no layer with shared = True": (x, layer(shared=weights()), config),
        "no layer with router_bias = True": (x, layer(router_bias=torch.zeros(3)), config),
        "no layer with router_dtype = 'float64'": (
            x,
            layer(),
            LayerConfig(routing, ExpertsConfig(), router_dtype=torch.float64),
        ),
    }.items():
        with refuses(f"library/little: {part}"):
            refuse_layer(Little(), *given)
    with refuses("library/little: no layer with padding_mask = True"):
        refuse_layer(Little(), x, layer(), config, padding_mask=True)


def test_the_random_state_is_put_back():
    before = torch.random.get_rng_state()
    with kept_random_state():
        torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), before)
