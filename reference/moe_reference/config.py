"""The configurations that operations take: frozen dataclasses, no behaviour.

Dimension key: E experts, K experts per token, G groups, L tokens per sequence.

A configuration says *which* of the published definitions is meant; each field is one decision on
which published systems differ. A configuration that no system could run raises `ValueError` when
it is made, so that an operation only ever sees one that works.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from moe_reference.weights import ExpertWeights as ExpertWeights
from moe_reference.weights import LayerOutput as LayerOutput
from moe_reference.weights import LayerWeights as LayerWeights
from moe_reference.weights import Placement as Placement

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Order = Literal["score_then_topk", "topk_then_score"]
Norm = Literal["sum", "l2"]
EpsilonMode = Literal["add", "clamp"]
ScaleWhen = Literal["always", "not_renormalized"]
GroupScore = Literal["max", "top2_sum", "topk_share_sum"]
MaskFill = Literal["-inf", "zero"]
Loss = Literal[
    "switch",
    "gshard",
    "deepseek_expert",
    "deepseek_sequence",
    "deepseek_device",
    "transformers_concatenated",
]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai", "swiglu_limit"]
WeightOn = Literal["output", "input"]


@dataclass(frozen=True)
class RoutingConfig:
    """How router logits become expert ids and weights.

    Attributes:
        top_k: K, experts per token, at least 1.
        score: the function from logits to scores.
        order: `score_then_topk` scores all E experts, then selects; `topk_then_score` selects on
            the logits and scores only the K that were chosen.
        renormalize: divide the K weights by their norm.
        norm: the norm that renormalisation divides by: their sum or their Euclidean norm.
        epsilon: keeps the division finite when every chosen score underflows.
        epsilon_mode: `add` divides by norm + epsilon, `clamp` by max(norm, epsilon).
        renormalize_single: renormalise also when K = 1, which makes the weight a constant and
            leaves the router without a gradient; DeepSeek and Megatron do not.
        scale: factor on the final weights, applied once.
        scale_when: `always`, or `not_renormalized` for the either-or of DeepSeek-V2.
        num_groups: G, groups of E / G consecutive experts; 1 switches group limits off.
        topk_groups: how many groups of the G a token may choose from.
        group_score: a group's score: its best expert, the sum of its best two, or the sum of its
            best `top_k // topk_groups` (Megatron).
        mask_fill: what a masked expert's selection score is replaced by. `zero` is only safe
            where every selection score is positive; it is kept because systems published it.
        hash_table: int tensor [vocabulary, K]; the experts are looked up by token id and the
            logits give only the weights. Not part of equality: tensors do not compare to a bool.
    """

    top_k: int
    score: Score = "softmax"
    order: Order = "score_then_topk"
    renormalize: bool = False
    norm: Norm = "sum"
    epsilon: float = 0.0
    epsilon_mode: EpsilonMode = "add"
    renormalize_single: bool = True
    scale: float = 1.0
    scale_when: ScaleWhen = "always"
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "max"
    mask_fill: MaskFill = "-inf"
    hash_table: torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_choices(self, score=Score, order=Order, norm=Norm, epsilon_mode=EpsilonMode)
        _check_choices(self, scale_when=ScaleWhen, group_score=GroupScore, mask_fill=MaskFill)
        _check_at_least(self, 1, "top_k", "num_groups", "topk_groups")
        if self.topk_groups > self.num_groups:
            raise ValueError(
                f"topk_groups: expected at most num_groups = {self.num_groups}, "
                f"got {self.topk_groups}"
            )
        if not 0.0 <= self.epsilon < float("inf"):
            raise ValueError(f"epsilon: expected a finite number >= 0, got {self.epsilon}")
        if self.scale != self.scale or abs(self.scale) == float("inf"):
            raise ValueError(f"scale: expected a finite number, got {self.scale}")
        if (
            self.num_groups > 1
            and self.group_score == "topk_share_sum"
            and self.top_k < self.topk_groups
        ):
            raise ValueError(
                f"topk_groups: expected at most top_k = {self.top_k} with group_score "
                f"'topk_share_sum', which adds the best top_k // topk_groups experts of a group, "
                f"got {self.topk_groups}"
            )
        table = self.hash_table
        if table is None:
            return
        if not isinstance(table, torch.Tensor):
            raise TypeError(f"hash_table: expected a tensor, got {type(table).__name__}")
        if table.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"hash_table: expected dtype int32 or int64, got {table.dtype}")
        if table.ndim != 2 or table.shape[1] != self.top_k:
            raise ValueError(
                f"hash_table: expected shape [vocabulary, top_k = {self.top_k}], "
                f"got {list(table.shape)}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RoutingConfig":
        """The routing of a published model; `changes` replace single fields.

        >>> RoutingConfig.preset("deepseek-v3").group_score
        'top2_sum'
        """
        from moe_reference.presets import routing_preset

        return routing_preset(name, **changes)


@dataclass(frozen=True)
class BalanceConfig:
    """Which auxiliary load-balancing loss is meant.

    Attributes:
        loss: the published formula.
        coefficient: factor on the loss; 0 gives a loss of 0.
        score: the function from logits to the probabilities in the formula.
        epsilon: added to the sum that sigmoid and sqrtsoftplus scores are divided by.
        sequence_length: L, needed by the losses taken per sequence.
        num_devices: groups of consecutive experts, needed by `deepseek_device`.
    """

    loss: Loss = "switch"
    coefficient: float = 1.0
    score: Score = "softmax"
    epsilon: float = 1e-20
    sequence_length: int | None = None
    num_devices: int | None = None

    def __post_init__(self) -> None:
        _check_choices(self, loss=Loss, score=Score)
        for name in ("sequence_length", "num_devices"):
            if getattr(self, name) is not None:
                _check_at_least(self, 1, name)


@dataclass(frozen=True)
class ExpertsConfig:
    """How one expert computes.

    Attributes:
        activation: by its exact name; `gelu` is the erf form, `gelu_tanh` the approximation.
        gated: two branches, activation(gate) * up; without, `gate_up` is [E, I, H].
        alpha: the sigmoid's slope in `swigluoai`.
        limit: the clamp of `swigluoai` and `swiglu_limit`.
        weight_on: multiply the expert's output by the router weight, or its input x before the
            first product. Biases are never multiplied on the way in.
    """

    activation: Activation = "silu"
    gated: bool = True
    alpha: float = 1.702
    limit: float = 7.0
    weight_on: WeightOn = "output"

    def __post_init__(self) -> None:
        _check_choices(self, activation=Activation, weight_on=WeightOn)
        if self.activation in ("swigluoai", "swiglu_limit") and not self.gated:
            raise ValueError(f"gated: expected True with activation '{self.activation}', got False")


@dataclass(frozen=True)
class LayerConfig:
    """How a whole MoE layer computes.

    Attributes:
        routing: from logits to ids and weights.
        experts: the routed experts and the shared one.
        balance: the auxiliary loss of the training forward, or None.
        shared_scale: factor on the shared expert's output.
        router_dtype: what the router's product is computed in; None takes the dtype of x.
    """

    routing: RoutingConfig
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    balance: BalanceConfig | None = None
    shared_scale: float = 1.0
    router_dtype: torch.dtype | None = torch.float32


def _check_choices(config: Any, **allowed: Any) -> None:
    for name, literal in allowed.items():
        value = getattr(config, name)
        if value not in get_args(literal):
            choices = ", ".join(map(repr, get_args(literal)))
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def _check_at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def field_names(config: type) -> tuple[str, ...]:
    """The names of a dataclass's fields, in order.

    Args:
        config: the class, such as `LayerConfig`; no shapes.

    >>> field_names(LayerConfig)[0]
    'routing'
    """
    return tuple(f.name for f in fields(config))
