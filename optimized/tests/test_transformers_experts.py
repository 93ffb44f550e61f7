"""Tiny models of transformers, before and after the one line that switches their experts."""

import pytest
import torch
from moe_optimized.experts import experts_triton
from moe_optimized.interpreter import launches
from moe_reference.config import ExpertsConfig

transformers = pytest.importorskip("transformers")
from moe_optimized import transformers_experts  # noqa: E402
from moe_optimized.transformers_experts import recognise, register, use_fast_experts  # noqa: E402

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=12, norm_topk_prob=True
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4),
    "nemotron-h": lambda: transformers.NemotronHConfig(
        **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=8,
        n_group=1,
        topk_group=1,
    ),
}
CONFIGS = {
    "mixtral": ExpertsConfig("silu"),
    "qwen3-moe": ExpertsConfig("silu"),
    "gpt-oss": ExpertsConfig("swigluoai", alpha=1.702, limit=7.0),
    "nemotron-h": ExpertsConfig("relu2", gated=False),
}
models = pytest.mark.parametrize("name", list(MODELS))


def made(name, implementation="eager"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        MODELS[name](), experts_implementation=implementation, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name or "router" in parameter_name:
                parameter.normal_(std=0.3)
    return model.eval()


def experts_of(model):
    return [m for m in model.modules() if transformers_experts._is_switchable(m)]


def step(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits, {name: p.grad for name, p in model.named_parameters()}


@models
@pytest.mark.parametrize("tokens", [1, 11])
def test_a_step_is_that_of_eager(name, tokens, assert_close):
    model, ids = made(name), torch.randint(0, 32, (2, tokens + 1))
    expected, gradients = step(model, ids)
    assert use_fast_experts(model) is model
    assert model.config._experts_implementation == "moespec"
    found, ours = step(model, ids)
    torch.testing.assert_close(found, expected)
    for parameter, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(ours[parameter], gradient, msg=parameter)


@models
def test_it_recognises_what_the_experts_compute(name):
    assert {recognise(module) for module in experts_of(made(name))} == {CONFIGS[name]}


@models
def test_decoding_gives_the_same_tokens(name):
    model, ids = made(name), torch.randint(0, 32, (1, 4))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(use_fast_experts(model).generate(ids, **settings), expected)


def test_it_is_our_experts_that_compute(monkeypatch):
    seen = []

    def watched(x, weights, *arguments):
        seen.append(x.shape)
        return torch.zeros_like(x)

    model = use_fast_experts(made("mixtral"))
    monkeypatch.setattr(transformers_experts, "experts", watched)
    model(torch.randint(0, 32, (1, 5)))
    assert seen == [(5, 16)] * 2


@pytest.mark.triton
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_kernels_take_the_layout_as_it_is(name, monkeypatch):
    model, ids = made(name), torch.randint(0, 32, (1, 5))
    expected, gradients = step(model, ids)
    monkeypatch.setattr(transformers_experts, "experts", experts_triton)
    before = launches.copy()
    found, ours = step(use_fast_experts(model), ids)
    assert (launches - before)["experts_d_matrices_kernel"] == 4
    torch.testing.assert_close(found, expected)
    for parameter, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(ours[parameter], gradient, msg=parameter)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_switched_models_compile(name):
    model, ids = use_fast_experts(made(name)), torch.randint(0, 32, (1, 6))
    expected, gradients = step(model, ids)
    torch._dynamo.reset()
    layer = model.model.layers[0].mlp
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    found, ours = step(model, ids)
    torch.testing.assert_close(found, expected)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(ours[parameter], gradient, msg=parameter)


def test_rows_in_turns_are_taken_apart_once_and_again_after_a_change():
    model, ids = use_fast_experts(made("gpt-oss")), torch.randint(0, 32, (1, 6))
    module = experts_of(model)[0]
    with torch.no_grad():
        model(ids)
        kept = module._moespec_weights[1].gate_up
        first = model(ids).logits
        assert module._moespec_weights[1].gate_up is kept
        module.gate_up_proj.mul_(2.0)
        found = model(ids).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(found, model(ids).logits)
        assert not torch.allclose(found, first)
    use_fast_experts(model)(ids)
    assert module._moespec_weights is None
    assert all("moespec" not in key for key in model.state_dict())


def test_a_name_is_enough_once_it_is_registered():
    register()
    model, ids = made("mixtral", "moespec"), torch.randint(0, 32, (1, 6))
    torch.testing.assert_close(model(ids).logits, made("mixtral")(ids).logits)


def test_what_it_cannot_compute_is_refused():
    with pytest.raises(ValueError, match=r"model: expected one whose experts .* got Linear"):
        use_fast_experts(torch.nn.Linear(2, 2))
    model = made("mixtral")
    experts_of(model)[0].act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"known activation, got those of MixtralExperts"):
        use_fast_experts(model)
    assert model.config._experts_implementation == "eager"
    experts_of(model)[0].has_post_expert_norm = True
    with pytest.raises(ValueError, match="expected experts without a norm, got MixtralExperts"):
        use_fast_experts(model)
    model = made("mixtral")
    experts_of(model)[1]._is_expert_parallel = True
    with pytest.raises(ValueError, match="all on this rank, got part of MixtralExperts"):
        use_fast_experts(model)


@pytest.mark.parametrize("limit", [0.7, 15.0, 600.0])
def test_a_limit_is_seen_however_great(limit):
    module = experts_of(made("gpt-oss"))[0]
    module.limit = limit
    assert recognise(module) == ExpertsConfig("swigluoai", alpha=1.702, limit=limit)
    module = experts_of(made("mixtral"))[0]
    plain = module._apply_gate
    module._apply_gate = lambda pre: plain(pre.clamp(max=limit))
    with pytest.raises(ValueError, match="known activation"):
        recognise(module)


def test_a_switch_that_does_nothing_is_refused(monkeypatch):
    model = made("mixtral")
    monkeypatch.setattr(type(model), "set_experts_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="whose experts transformers switches, got Mixtral"):
        use_fast_experts(model)
