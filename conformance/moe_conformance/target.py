"""What an implementation under test looks like to the suite: a `Target` and its `Capabilities`.

Both are plain Python and import neither torch nor hypothesis, so that the pytest plugin and the
command line can name them without paying for either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

OPERATIONS: tuple[str, ...] = (
    "route",
    "balance_loss",
    "z_loss",
    "update_bias",
    "align",
    "align_batched",
    "dispatch",
    "combine",
    "drop_to_capacity",
    "experts",
    "experts_batched",
    "layer",
    "assign_experts",
    "slice_experts",
    "slice_tensor_parallel",
    "place_experts",
    "expert_parallel",
    "sliced_expert_parallel",
    "replicated_experts",
    "shared_tensor_parallel",
    "dequantize",
    "experts_quantized",
)
"""Every operation of the specification, in reading order."""

SAME_TOKENS: tuple[str, ...] = (
    "sliced_expert_parallel",
    "replicated_experts",
    "shared_tensor_parallel",
)
"""Operations on ranks that have the same tokens, and get the same output."""

ON_RANKS: tuple[str, ...] = ("expert_parallel", *SAME_TOKENS)
"""Operations that all ranks of a process group call together."""

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")

EXPERTS_DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float64")
"""What experts may compute in whatever x is: a dtype that has room for what others hold."""

FORMATS: tuple[str, ...] = (
    "uint4b8",
    "uint8b128",
    "uint4",
    "e4m3",
    "mxfp4",
    "nvfp4",
    "Q8_0",
    "Q8_1",
    "Q4_K",
)
"""Quantised formats; what each one's codes stand for says `docs/spec/quantization.md`."""

ROUNDING_POINTS: dict[str, str] = {
    "router_logits": "the router's product is rounded to x's dtype",
    "router_scores": "scores are rounded to the logits' dtype, and what follows is computed in it",
    "router_weights": "the routing weights are rounded to the logits' dtype",
    "unpacked_weights": "quantised weights, unpacked, are rounded before each product",
    "expert_input": "x times its weight is rounded before the first product (weight_on = input)",
    "product": "each product is rounded before its bias is added",
    "pre_activation": "the first product's result is rounded before the activation",
    "gate_activation": "activation(gate) is rounded before it is multiplied by up",
    "activation_steps": "each step of the activation's formula is rounded by itself",
    "activation": "the activation's result is rounded before the second product",
    "expert_output": "each expert's output is rounded before it is weighted",
    "weighted_output": "each weighted expert output is rounded before the sum over K",
    "combine": "the running sum over the K experts is rounded after every addition",
    "shared_output": "the shared expert's (gated, scaled) output is rounded before it is added",
}
"""Where an implementation may round to the input's dtype. What is declared enters the tolerance."""

REPLICATED_GRADIENTS: tuple[str, ...] = ("partial", "replicate")
"""What a gradient is of a tensor that all ranks have, named as DTensor's placements."""

ACCUMULATORS: tuple[str, ...] = ("float64", "float32", "tf32", "float16", "bfloat16")
"""In what a matrix product may be accumulated, from the most exact down (tf32: its inputs)."""

Choices = Mapping[str, Sequence[Any]]


CHOICES: dict[str, tuple[str, ...]] = {
    "routing": (
        *("top_k", "score", "order", "renormalize", "norm", "epsilon", "epsilon_mode"),
        *("renormalize_single", "scale", "scale_when", "num_groups", "topk_groups"),
        *("group_score", "mask_fill", "hash_table", "selection_bias"),
    ),
    "experts": (
        *("activation", "gated", "alpha", "limit", "weight_on"),
        *("bias", "expert_map", "invalid_ids"),
    ),
    "layer": (
        *("shared", "shared_gate", "shared_scale", "router_bias", "router_dtype"),
        *("training", "padding_mask", "balance"),
    ),
    "align": ("drop_invalid", "expert_map", "invalid_ids"),
    "balance": (
        *("loss", "coefficient", "score", "epsilon", "sequence_length", "num_devices"),
        *("padding_mask", "tokens_per_expert", "centred", "ids", "invalid_ids"),
    ),
    "capacity": ("policy", "signed_weights"),
    "expert_parallel": ("placement", "part_of_world", "shares"),
    "quantization": (
        *("group_size", "scale_dtype", "g_idx", "padding", "granularity", "mixed"),
        *("activation_format", "activation_scales"),
    ),
}
"""What may be declared of each area."""


def _check_known(name: str, values: Sequence[Any], known: Sequence[Any]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: expected any of {', '.join(map(str, known))}, got {value!r}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


class Unsupported(Exception):
    """Raised by a target for a call outside its declared capabilities."""


@dataclass(frozen=True)
class Capabilities:
    """What a target takes. Inputs are drawn inside the declaration and reach its limits.

    Attributes:
        devices: of "cpu", "cuda", "mps", …
        dtypes: dtypes of x and of the logits, by their torch names.
        id_dtypes: of "int32", "int64".
        operations: the operations that are provided; None takes every method the class defines.
        routing: allowed values of the fields of `RoutingConfig`, and of `selection_bias`
            (True, False: with and without) and `hash_table` (likewise). A field that is not named
            may have any value. A sequence of such mappings is a list of alternatives.
        experts: the same for `ExpertsConfig`, and for `bias` (with and without; either of the two
            may come alone), `expert_map` (with and without) and `invalid_ids` (ids that mean *not
            here*).
        layer: the same for `shared_scale`, `router_dtype` and `balance` (names of losses) of
            `LayerConfig`, and for `shared`, `shared_gate`, `router_bias`, `padding_mask` and
            `training` (with and without).
        align: the same for `drop_invalid`, `expert_map`, `invalid_ids` (also of `dispatch` and
            `drop_to_capacity`).
        balance: the same for `BalanceConfig`, for `padding_mask` and `tokens_per_expert` of the
            losses (with and without), for `invalid_ids`, for `centred` of `update_bias`, and for
            `ids`: ("chosen",) where the loss selects again from the logits and takes no other ids.
        capacity: the same for `policy` of `drop_to_capacity`, and for `signed_weights` (with
            weights below 0 among them, and without).
        expert_parallel: the same for `placement` (with and without), `part_of_world` (groups that
            are not all processes) and `shares` of `expert_parallel`: how many experts ranks have,
            of "even" (as many on each), "uneven" and "fewer" (fewer experts than ranks).
        replicated_gradients: what the ranks' losses are where all have the same tokens and output.
            With "partial" each loss is a term, and the gradient of a tensor that all ranks have is
            the sum of its copies'. With "replicate" all ranks compute the same loss, and each copy
            has the whole gradient, as in Megatron-LM's tensor parallelism.
        router_dtype: what the router computes in, whatever its inputs are; None is the rule:
            float32, or float64 where the logits are float64.
        experts_dtype: what the routed experts compute in, whatever x is; None is x's own dtype.
            x (or x times its weight) and the experts' parameters are rounded to it on their way
            in, products and what follows at the declared rounding points up to `expert_output`.
            Routing weights on the output, the sum over K and the shared expert have x's dtype.
            Not "float16", whose range is smaller than that of the numbers drawn for other dtypes.
        min_experts: smallest E.
        max_experts: largest E; None has no limit. One that keeps a module small which is made anew
            for every call keeps a check short.
        max_top_k: largest K; None has no limit.
        hidden_multiple: H must be a multiple of this.
        intermediate_multiple: I must be a multiple of this.
        block_sizes: allowed block sizes of `align`; None allows any.
        world_sizes: numbers of ranks that the operations of `ON_RANKS` run on; () runs on any.
        formats: quantised formats, of `FORMATS`.
        quantization: the same as `experts` for `group_size` (-1 is one group; with e4m3 the side of
            a block), `scale_dtype`, `g_idx` and `padding` (with and without) of packed tensors, for
            `granularity` of e4m3 (tensor, channel, block), for `activation_format` (None, int8,
            e4m3, e4m3_block, Q8_1) and `activation_scales` (with and without), and for `mixed`
            (True: an expert's two matrices may be packed differently).
        gradients: operations whose outputs carry gradients.
        ties: "lowest" (the lowest expert id wins) or "free".
        repeated_ids: a row of `expert_ids` may name an expert twice, in every operation that takes
            them. False where routes are a map [T, E] with one place for each.
        appended_rows: `combine` takes rows of the slot T·K, which belong to nobody. False where
            `dispatch` appends none.
        strides: non-contiguous inputs are taken. Where this is False none are drawn.
        mixed_dtypes: expert weights may have another dtype than x.
        finite_only: NaN and infinity are refused.
        deterministic: the same call gives the same bits.
        batch_invariant: a token's result does not depend on the other tokens, to the bit.
        rounding_points: keys of `ROUNDING_POINTS`.
        accumulator: one of `ACCUMULATORS`, for operations on inputs narrower than it.
        logits_through: "direct", or "identity": the router takes hidden states, and the adapter
            hands it logits through an identity weight (finite, exact in `router_dtype`).
        interpreted: runs in an interpreter; fewer and smaller cases, a budget of its own.
    """

    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    id_dtypes: tuple[str, ...] = ("int64", "int32")
    operations: tuple[str, ...] | None = None
    routing: Choices | Sequence[Choices] = field(default_factory=dict)
    experts: Choices | Sequence[Choices] = field(default_factory=dict)
    layer: Choices | Sequence[Choices] = field(default_factory=dict)
    align: Choices | Sequence[Choices] = field(default_factory=dict)
    balance: Choices | Sequence[Choices] = field(default_factory=dict)
    capacity: Choices | Sequence[Choices] = field(default_factory=dict)
    expert_parallel: Choices | Sequence[Choices] = field(default_factory=dict)
    replicated_gradients: str = "partial"
    router_dtype: str | None = None
    experts_dtype: str | None = None
    min_experts: int = 1
    max_experts: int | None = None
    max_top_k: int | None = None
    hidden_multiple: int = 1
    intermediate_multiple: int = 1
    block_sizes: tuple[int, ...] | None = None
    world_sizes: tuple[int, ...] = ()
    formats: tuple[str, ...] = FORMATS
    quantization: Choices | Sequence[Choices] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    ties: str = "free"
    repeated_ids: bool = True
    appended_rows: bool = True
    strides: bool = True
    mixed_dtypes: bool = True
    finite_only: bool = False
    deterministic: bool = True
    batch_invariant: bool = False
    rounding_points: tuple[str, ...] = ()
    accumulator: str = "float32"
    logits_through: str = "direct"
    interpreted: bool = False

    def __post_init__(self) -> None:
        for area, known in CHOICES.items():
            for choice in self.alternatives(area):
                _check_known(area, tuple(choice), known)
        _check_known("operations", self.operations or (), OPERATIONS)
        _check_known("dtypes", self.dtypes, DTYPES)
        _check_known("id_dtypes", self.id_dtypes, ("int32", "int64"))
        _check_known("rounding_points", self.rounding_points, tuple(ROUNDING_POINTS))
        _check_known("formats", self.formats, FORMATS)
        _check_known("gradients", self.gradients, OPERATIONS)
        _check_known("accumulator", (self.accumulator,), ACCUMULATORS)
        _check_known("ties", (self.ties,), ("lowest", "free"))
        _check_known("replicated_gradients", (self.replicated_gradients,), REPLICATED_GRADIENTS)
        _check_known("logits_through", (self.logits_through,), ("direct", "identity"))
        _check_known("router_dtype", (self.router_dtype or "float32",), DTYPES)
        _check_known("experts_dtype", (self.experts_dtype or "float32",), EXPERTS_DTYPES)

    def alternatives(self, area: str) -> list[dict[str, tuple[Any, ...]]]:
        """The declared choices of an area, such as `routing`, as a list."""
        declared = getattr(self, area)
        listed = [declared] if isinstance(declared, Mapping) else list(declared)
        return [{name: tuple(values) for name, values in choice.items()} for choice in listed]

    def to_json(self) -> dict[str, Any]:
        """As plain lists, numbers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, declared: Mapping[str, Any]) -> Capabilities:
        """The inverse of `to_json`."""
        known = {f.name for f in fields(cls)}
        _check_known("capabilities", tuple(declared), tuple(sorted(known)))
        return cls(**{name: _tuples(value) for name, value in declared.items()})


class Target:
    """An implementation under test. A subclass has one method per operation that it provides.

    A method takes and returns plain tensors, with the signature in `docs/spec/operations.md`. One
    that is missing is *not provided*, which costs breadth and nothing else.
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = ""
    capabilities: Capabilities = Capabilities()

    @classmethod
    def operations(cls) -> tuple[str, ...]:
        """The operations that are provided, in reading order."""
        declared = cls.capabilities.operations
        return tuple(
            name
            for name in OPERATIONS
            if callable(getattr(cls, name, None)) and (declared is None or name in declared)
        )


def suite_version() -> str:
    """The installed version of moespec."""
    try:
        return version("moespec")
    except PackageNotFoundError:
        return "not installed"
