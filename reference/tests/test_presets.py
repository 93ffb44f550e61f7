"""The presets, against the published numbers and against the routers that transformers ships."""

import importlib
from dataclasses import fields

import pytest
import torch
from moe_reference.config import RoutingConfig
from moe_reference.gating import route
from moe_reference.presets import PRESETS, routing_preset

# E, K, groups, kept groups, scale: as in the checkpoint's config.json.
PUBLISHED = {
    "mixtral": (8, 2, 1, 1, 1.0),
    "qwen2-moe": (60, 4, 1, 1, 1.0),
    "qwen3-moe": (128, 8, 1, 1, 1.0),
    "deepseek-v2": (160, 6, 8, 3, 16.0),
    "deepseek-v3": (256, 8, 8, 4, 2.5),
    "deepseek-v4": (256, 6, 1, 1, 1.5),
    "kimi-k2": (384, 8, 1, 1, 2.827),
    "glm-4.5": (160, 8, 1, 1, 2.5),
    "gpt-oss": (32, 4, 1, 1, 1.0),
    "llama-4": (16, 1, 1, 1, 1.0),
    "olmoe": (64, 8, 1, 1, 1.0),
    "minimax-m2": (256, 8, 1, 1, 1.0),
}


def test_every_preset_is_listed_here():
    assert list(PRESETS) == list(PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_routes_its_models_number_of_experts(name):
    E, K, groups, kept, scale = PUBLISHED[name]
    config = routing_preset(name)
    numbers = (config.top_k, config.num_groups, config.topk_groups, config.scale)
    assert numbers == (K, groups, kept, scale)
    weights, ids = route(torch.randn(5, E, generator=torch.Generator().manual_seed(0)), config)
    assert ids.shape == (5, K)
    assert weights.isfinite().all()
    if config.renormalize or name == "gpt-oss":
        torch.testing.assert_close(weights.sum(1), torch.full((5,), scale))
    else:
        assert (weights.sum(1) < scale).all()


# transformers: model, router class, and what its configuration calls things.
ROUTERS = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {"num_local_experts": 8}),
    "qwen2-moe": ("qwen2_moe", "Qwen2MoeTopKRouter", {"num_experts": 60}),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 128, "norm_topk_prob": True}),
    "deepseek-v2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {
            "n_routed_experts": 160,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
            "num_experts_per_tok": 6,
        },
    ),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3TopkRouter", {"n_routed_experts": 256}),
    "deepseek-v4": ("deepseek_v4", "DeepseekV4TopKRouter", {"n_routed_experts": 256}),
    "kimi-k2": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    ),
    "glm-4.5": (
        "glm4_moe",
        "Glm4MoeTopkRouter",
        {"n_routed_experts": 160, "routed_scaling_factor": 2.5},
    ),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 32}),
    "llama-4": ("llama4", "Llama4Router", {"num_local_experts": 16}),
    "olmoe": ("olmoe", "OlmoeTopKRouter", {"num_experts": 64}),
    "minimax-m2": ("minimax_m2", "MiniMaxM2TopKRouter", {"num_local_experts": 256}),
}
BIAS_NAME = "e_score_correction_bias"


def published_router(name, bias_E):
    """A function from logits to (weights, expert_ids): the router with an identity weight."""
    pytest.importorskip("transformers")
    model, class_name, numbers = ROUTERS[name]
    package = f"transformers.models.{model}"
    module = importlib.import_module(f"{package}.modeling_{model}")
    E = bias_E.shape[0]
    configuration = importlib.import_module(f"{package}.configuration_{model}")
    config_names = [
        n for n in vars(configuration) if n.endswith("Config") and n != "PreTrainedConfig"
    ]
    config_name = "Llama4TextConfig" if model == "llama4" else config_names[0]
    config = getattr(configuration, config_name)(hidden_size=E, **numbers)
    router = getattr(module, class_name)(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if getattr(router, "bias", None) is not None:
            router.bias.zero_()
    if hasattr(router, BIAS_NAME):
        getattr(router, BIAS_NAME).copy_(bias_E)
    extra = (bias_E,) if name == "minimax-m2" else ()

    def call(logits):
        with torch.no_grad():
            *_, weights, ids = router(logits, *extra)
        return weights, ids

    def call_llama(logits):
        with torch.no_grad():
            dense_weights, router_logits = router(logits)
        ids = router_logits.argmax(dim=1, keepdim=True)
        return dense_weights.gather(1, ids), ids

    return call_llama if name == "llama-4" else call


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_equals_the_router_of_transformers(name):
    E = PUBLISHED[name][0]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, E, generator=generator)
    biased = name in ("deepseek-v3", "deepseek-v4", "kimi-k2", "glm-4.5", "minimax-m2")
    bias = torch.randn(E, generator=generator) / 8 - 0.5
    want_weights, want_ids = published_router(name, bias)(logits)
    weights, ids = route(logits, routing_preset(name), bias if biased else None)
    # The order of the K is not specified there: compare by id.
    want_ids, order = want_ids.sort(dim=1)
    ids, own_order = ids.sort(dim=1)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights.gather(1, own_order), want_weights.gather(1, order))


def test_deepseek_v4_takes_the_table_of_its_hash_layers():
    table = torch.arange(60, dtype=torch.int32).view(10, 6)
    config = routing_preset("deepseek-v4", hash_table=table)
    _, ids = route(torch.zeros(2, 256), config, None, torch.tensor([9, 0]))
    assert ids.tolist() == [list(range(54, 60)), list(range(6))]


def test_changes_replace_single_fields():
    base, changed = routing_preset("deepseek-v3"), routing_preset("deepseek-v3", top_k=4)
    assert changed.top_k == 4
    for field in fields(RoutingConfig):
        if field.name != "top_k":
            assert getattr(base, field.name) == getattr(changed, field.name)
    assert RoutingConfig.preset("olmoe", scale=2.0) == routing_preset("olmoe", scale=2.0)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"name: expected one of mixtral, .*minimax-m2, got 'gpt-5'"
    ):
        routing_preset("gpt-5")


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match=r"changes: expected fields of RoutingConfig, got topk"):
        routing_preset("mixtral", topk=3)


def test_an_impossible_change_is_named():
    with pytest.raises(ValueError, match=r"topk_groups: expected at most num_groups"):
        routing_preset("mixtral", topk_groups=2)
