"""Families: what the MoE layer of a published model is, and what its checkpoints call its tensors.

A family is a `LayerConfig`, which optional parts its layers have, and `TensorNames`. The sizes are
no part of it: one family has many. The balance loss is none either, it belongs to a training run:
`dataclasses.replace(config, balance=...)`.

Every entry was compared with the MoE block of transformers 5.23: its output, its gradients and the
names that `save_pretrained` writes.
"""

from dataclasses import dataclass, field, replace

import torch

from moe_reference.config import ExpertsConfig, LayerConfig
from moe_reference.layouts import LAYOUTS, Layout
from moe_reference.presets import routing_preset


@dataclass(frozen=True)
class TensorNames:
    """The names of a layer's tensors in a checkpoint, behind the layer's own prefix.

    Attributes:
        block: what the prefix ends with: `model.layers.3.` and then this.
        router: [E, H].
        router_bias: [E], or None.
        selection_bias: [E], or None.
        hash_table: [vocabulary, K], or None.
        gate, up, down: one expert's products: `experts.7.<gate>.weight`, and `.bias`. The shared
            expert's are the same behind `shared`.
        gate_up, stacked_down: all experts' in one tensor: `experts.<gate_up>`; the biases have
            `_bias` behind.
        layout: how the stacked tensors are laid out.
        shared: the shared expert, or None.
        shared_gate: [1, H], or None.
    """

    block: str = "mlp"
    router: str = "gate.weight"
    router_bias: str | None = None
    selection_bias: str | None = None
    hash_table: str | None = None
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"
    stacked_down: str = "down_proj"
    layout: Layout = field(default_factory=Layout)
    shared: str | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class Family:
    """The MoE layers of one published model.

    Attributes:
        config: how a layer computes.
        names: what its checkpoints call the tensors.
    """

    config: LayerConfig
    names: TensorNames


def _family(
    preset: str,
    names: TensorNames,
    experts: ExpertsConfig | None = None,
    router_dtype: torch.dtype | None = None,
) -> Family:
    routing = routing_preset(preset)
    config = LayerConfig(routing, experts or ExpertsConfig(), router_dtype=router_dtype)
    return Family(config, names)


_W = TensorNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
_DEEPSEEK = TensorNames(selection_bias="gate.e_score_correction_bias", shared="shared_experts")

FAMILIES: dict[str, Family] = {
    "mixtral": _family("mixtral", _W),
    "qwen2-moe": _family(
        "qwen2-moe", TensorNames(shared="shared_expert", shared_gate="shared_expert_gate.weight")
    ),
    "qwen3-moe": _family("qwen3-moe", TensorNames()),
    # No selection bias before DeepSeek-V3.
    "deepseek-v2": _family(
        "deepseek-v2", replace(_DEEPSEEK, selection_bias=None), router_dtype=torch.float32
    ),
    "deepseek-v3": _family("deepseek-v3", _DEEPSEEK, router_dtype=torch.float32),
    # A layer has a hash table or a selection bias, never both.
    "deepseek-v4": _family(
        "deepseek-v4",
        TensorNames(
            block="ffn",
            selection_bias="gate.bias",
            hash_table="gate.tid2eid",
            gate="w1",
            up="w3",
            down="w2",
            shared="shared_experts",
        ),
        ExpertsConfig("swiglu_limit", limit=10.0),
    ),
    "kimi-k2": _family("kimi-k2", _DEEPSEEK, router_dtype=torch.float32),
    "glm-4.5": _family("glm-4.5", _DEEPSEEK, router_dtype=torch.float32),
    "gpt-oss": _family(
        "gpt-oss",
        TensorNames(
            router="router.weight",
            router_bias="router.bias",
            layout=LAYOUTS["transformers-gpt-oss"],
        ),
        ExpertsConfig("swigluoai"),
    ),
    "llama-4": _family(
        "llama-4",
        TensorNames(
            block="feed_forward",
            router="router.weight",
            layout=LAYOUTS["transformers-llama-4"],
            shared="shared_expert",
        ),
        ExpertsConfig("silu", weight_on="input"),
    ),
    "olmoe": _family("olmoe", TensorNames()),
    "minimax-m2": _family("minimax-m2", replace(_W, selection_bias="e_score_correction_bias")),
}
"""The families by the names of their routing presets."""
