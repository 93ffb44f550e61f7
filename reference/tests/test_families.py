"""Each family's module against transformers: what `save_pretrained` wrote, output and gradients."""

import dataclasses

import pytest
import torch
from moe_reference.checkpoints import Checkpoint, layer_tensors, load_layer, save_tensors
from moe_reference.config import ExpertWeights, LayerWeights, RoutingConfig
from moe_reference.families import FAMILIES
from moe_reference.modules import moe_layer, stored_tensors
from moe_reference.presets import PRESETS
from moe_reference.wrapping import FieldNames, WrappedMoE

transformers = pytest.importorskip("transformers", minversion="5.20")

H, I, VOCABULARY = 16, 12, 32
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
GROUPED = {
    "intermediate_size": 24,
    "moe_intermediate_size": I,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
QWEN = {
    "intermediate_size": 24,
    "moe_intermediate_size": I,
    "num_experts": 8,
    "decoder_sparse_step": 1,
}

# family: (model type of transformers, its configuration, what differs from the family's preset)
MODELS = {
    "mixtral": ("mixtral", {"intermediate_size": I, "num_local_experts": 8}, {}),
    "qwen2-moe": (
        "qwen2_moe",
        QWEN | {"shared_expert_intermediate_size": 20},
        {},
    ),
    "qwen3-moe": ("qwen3_moe", QWEN | {"norm_topk_prob": True}, {}),
    "olmoe": ("olmoe", {"intermediate_size": I, "num_experts": 8}, {}),
    "deepseek-v2": (
        "deepseek_v2",
        GROUPED
        | LATENT
        | {
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        {"num_groups": 4, "topk_groups": 2},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        GROUPED | LATENT | {"n_shared_experts": 1},
        {"num_groups": 4, "topk_groups": 2},
    ),
    # Kimi K2's checkpoints are of DeepSeek-V3's architecture, with one group.
    "kimi-k2": (
        "deepseek_v3",
        GROUPED
        | LATENT
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
        {},
    ),
    "deepseek-v4": (
        "deepseek_v4",
        {
            "intermediate_size": I,
            "moe_intermediate_size": I,
            "num_local_experts": 8,
            "mlp_layer_types": ["hash_moe", "moe"],
        },
        {},
    ),
    "glm-4.5": (
        "glm4_moe",
        GROUPED
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        {},
    ),
    "minimax-m2": ("minimax_m2", {"intermediate_size": I, "num_local_experts": 8}, {}),
    "llama-4": (
        "llama4_text",
        {
            "intermediate_size": I,
            "intermediate_size_mlp": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        {},
    ),
    "gpt-oss": ("gpt_oss", {"intermediate_size": I, "num_local_experts": 8}, {}),
}
CASES = [(family, layer) for family in MODELS for layer in ((0, 1) if "v4" in family else (1,))]


def test_every_preset_is_a_family_and_is_compared():
    assert FAMILIES.keys() == PRESETS.keys() == MODELS.keys()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each family with random weights, and the folder it was saved in."""
    made = {}

    def make(family):
        if family not in made:
            kind, fields, _ = MODELS[family]
            config = transformers.AutoConfig.for_model(kind, **{**COMMON, **fields})
            config._experts_implementation = "eager"
            torch.manual_seed(len(family))
            model = transformers.AutoModelForCausalLM.from_config(config)
            generator = torch.Generator().manual_seed(1)
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if "mlp" not in name and "feed_forward" not in name:
                    continue
                if tensor.dtype == torch.int64:  # a hash table: every row K distinct experts
                    rows = torch.rand(len(tensor), 8, generator=generator).argsort(dim=1)
                    tensor.data.copy_(rows[:, : tensor.shape[1]])
                else:
                    # Small logits: where a sigmoid saturates, its gradient in float32 is noise.
                    size = 0.06 if "gate.weight" in name or "router" in name else 0.5
                    tensor.data.copy_(size * torch.randn(tensor.shape, generator=generator))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = (model, folder)
        return made[family]

    return make


def block_of(model, layer):
    decoder = model.model.layers[layer]
    return decoder.feed_forward if hasattr(decoder, "feed_forward") else decoder.mlp


def prefix_of(family, layer):
    stem = "layers" if family == "deepseek-v4" else "model.layers"
    return f"{stem}.{layer}.{FAMILIES[family].names.block}."


def load(family, layer, folder):
    checkpoint = Checkpoint(folder)
    prefix = prefix_of(family, layer)
    if not any(name.startswith(prefix) for name in checkpoint):
        prefix = f"model.{prefix}"
    changes = dict(MODELS[family][2])
    if family != "llama-4":
        changes["top_k"] = 2
    return moe_layer(family, checkpoint, prefix, **changes), checkpoint, prefix


def run_theirs(block, x, token_ids):
    takes_ids = getattr(block, "is_hash", False)
    output = block(x, token_ids) if takes_ids else block(x)
    return (output[0] if isinstance(output, tuple) else output).view(x.shape)


def as_grads(parameters):
    """The gradients in the place of the parameters."""

    def grads(weights, kind):
        fields = {
            name: None if tensor is None else tensor.grad for name, tensor in vars(weights).items()
        }
        return kind(**fields)

    nested = {"experts": parameters.experts, "shared": parameters.shared}
    flat = dataclasses.replace(parameters, **dict.fromkeys(nested), selection_bias=None)
    grad = grads(flat, LayerWeights)
    return dataclasses.replace(
        grad,
        **{name: None if each is None else grads(each, ExpertWeights)
           for name, each in nested.items()},
    )  # fmt: skip


def close(theirs, ours, exact):
    """Both compute in float32, in other orders: their error is no more than a few times ours."""
    error = (theirs.double() - exact).abs().max()
    own_error = (ours.double() - exact).abs().max()
    # An ulp of the largest number, for the case that ours happens to be exact.
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 8 * own_error + ulp, (error, own_error, ulp)
    assert own_error <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize(("family", "layer"), CASES)
def test_a_family_gives_the_output_and_the_gradients_of_transformers(models, family, layer):
    model, folder = models(family)
    block = block_of(model, layer)
    ours, _, _ = load(family, layer, folder)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, H, generator=generator)
    x[0, 0] *= 8  # beyond the limits of the clamped activations
    direction = torch.randn(2, 5, H, generator=generator)
    token_ids = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    hashed = ours.hash_table is not None
    assert hashed == getattr(block, "is_hash", False)

    def ours_of(moe, dtype):
        x_ours = x.to(dtype, copy=True).requires_grad_()
        output = moe(x_ours, token_ids if hashed else None).output
        (output * direction).sum().backward()
        names = dataclasses.replace(
            FAMILIES[family].names, gate="gate_proj", up="up_proj", down="down_proj"
        )
        grads = layer_tensors(as_grads(moe.parameters_of_layer()), names, "", stacked=True)
        return {"": output, "x": x_ours.grad} | grads

    x_theirs = x.clone().requires_grad_()
    output = run_theirs(block, x_theirs, token_ids)
    model.zero_grad()
    (output * direction).sum().backward()
    theirs = {name: each.grad for name, each in block.named_parameters()}
    theirs |= {"": output, "x": x_theirs.grad}

    in_float32 = ours_of(ours, torch.float32)
    exact = ours_of(load(family, layer, folder)[0].double(), torch.float64)
    assert theirs.keys() == in_float32.keys()
    for name, each in theirs.items():
        close(each, in_float32[name], exact[name])


@pytest.mark.parametrize(("family", "layer"), CASES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("level", ["experts.", ""])
def test_what_is_saved_loads_again(models, tmp_path, family, layer, stacked, level):
    ours, checkpoint, prefix = load(family, layer, models(family)[1])
    names = FAMILIES[family].names
    tensors = stored_tensors(ours, names, prefix, stacked)
    if (family in ("gpt-oss", "llama-4")) == stacked:
        expected = {name for name in checkpoint if name.startswith(prefix)}
        assert tensors.keys() == expected
        for name in expected:
            assert torch.equal(tensors[name], checkpoint[name]), name
    renamed = {name.replace(f"{prefix}experts.", f"{prefix}{level}"): each
               for name, each in tensors.items()}  # fmt: skip
    save_tensors(renamed, tmp_path / "layer.safetensors")
    again, table = load_layer(Checkpoint(tmp_path), names, prefix)
    for one, other in zip(
        (ours.experts.weights(), ours.shared and ours.shared.weights()),
        (again.experts, again.shared),
        strict=True,
    ):
        assert (one is None) == (other is None)
        for a, b in zip(vars(one or again.experts).values(),
                        vars(other or again.experts).values(), strict=True):  # fmt: skip
            assert a is b is None or torch.equal(a, b)
    for name in ("router", "router_bias", "selection_bias", "shared_gate"):
        a, b = getattr(ours, name), getattr(again, name)
        assert a is b is None or torch.equal(a, b)
    assert ours.hash_table is table is None or torch.equal(ours.hash_table, table)


WRAPPED = {
    "mixtral": FieldNames(),
    "qwen2-moe": FieldNames(shared_experts="shared_expert"),
    "deepseek-v3": FieldNames(),
    "gpt-oss": FieldNames(gate="router"),
}


@pytest.mark.parametrize("family", WRAPPED)
def test_a_block_of_transformers_wrapped_by_its_own_names(models, family):
    block = block_of(models(family)[0], 1)
    entry = FAMILIES[family]
    wrapped = WrappedMoE(
        block,
        "logits_weights_ids",
        config=entry.config.experts,
        names=WRAPPED[family],
        layout=entry.names.layout,
        flat_gate=family == "gpt-oss",
    )
    x = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(3))
    moe, _, _ = load(family, 1, models(family)[1])
    exact = moe.double()(x.double()).output
    close(run_theirs(block, x, None), wrapped(x), exact)


def test_the_family_of_a_size_that_is_not_the_presets():
    routing = FAMILIES["deepseek-v2"].config.routing
    lite = dataclasses.replace(routing, num_groups=1, topk_groups=1, scale=1.0)
    assert lite == RoutingConfig.preset("deepseek-v2", num_groups=1, topk_groups=1, scale=1.0)
