"""transformers under the suite: routers, experts and MoE blocks of four families, three backends.

`transformers/<family>-<backend>` puts the library's own classes under test: the family's router
and its whole block as they are, its experts through the backend that
`config._experts_implementation` names. The modules are built from small configurations on the
meta device and called with the suite's tensors in the place of their parameters
(`torch.func.functional_call`), so nothing is downloaded and gradients reach the given weights.

Three translations are made, and no others:

- logits go in as hidden states through an identity weight, because the routers take hidden states;
- ids that mean *not here* become the library's own sentinel: the id `num_experts`, with weight 0,
  on an experts module marked as expert parallel
  (`AllReduceEP.__call__` in transformers/distributed/expert_parallel.py);
- routing weights come back in float32 (float64 for float64 logits), whatever their own dtype.

This module imports neither torch nor transformers before a target is made.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported

if TYPE_CHECKING:
    import torch
    from moe_reference.config import (
        BalanceConfig,
        ExpertsConfig,
        ExpertWeights,
        LayerConfig,
        LayerOutput,
        LayerWeights,
        RoutingConfig,
    )

OLDEST = (5, 20)
BACKENDS = ("eager", "batched_mm", "grouped_mm")

# `ACT2FN` in transformers/activations.py, reached through `config.hidden_act`. The experts classes
# would take its other entries too, but the specification has no names for them.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

Choice = dict[str, tuple[Any, ...]]


class TransformersTarget(Target):
    """What the four families have in common.

    A subclass names the library's classes and translates configurations; `variants` makes one more
    subclass per backend, with `name`, `version`, `backend` and `capabilities`.

    Raises:
        ImportError: transformers has moved one of the classes.
    """

    family: ClassVar[str]
    backend: ClassVar[str]
    config_class: ClassVar[str]
    router_class: ClassVar[str]
    experts_class: ClassVar[str]
    block_class: ClassVar[str]
    gate: ClassVar[str] = "gate"
    """What the block calls its router."""

    has_balance_loss: ClassVar[bool] = True
    """Whether the family's file has a `load_balancing_loss_func`."""

    strides: ClassVar[bool] = False
    """Whether all of it takes non-contiguous tensors. Routers and experts do, but the blocks begin
    with `hidden_states.view(-1, hidden_dim)`, which refuses a transposed x with a RuntimeError."""

    min_experts: ClassVar[int] = 1

    routing: ClassVar[list[Choice]]
    experts_choice: ClassVar[Choice] = {
        "activation": tuple(ACTIVATIONS),
        # `use_experts_implementation` marks these classes has_gate=True, has_bias=False, and every
        # forward multiplies the expert's output: transformers/integrations/moe.py.
        "gated": (True,),
        "bias": (False,),
        "weight_on": ("output",),
        "expert_map": (False, True),
        "invalid_ids": (False, True),
    }
    layer_choice: ClassVar[Choice] = {
        # The block returns its output; the loss is the causal model's business (`balance_loss`).
        "balance": (None,),
        "shared": (False,),
        "shared_gate": (False,),
        "shared_scale": (1.0,),
        "router_bias": (False,),
        # `F.linear(hidden_states, self.weight)` in the router: the product is in x's dtype.
        "router_dtype": (None,),
    }
    # The routers call softmax or sigmoid in float32, for float64 hidden states as well.
    router_dtype: ClassVar[str | None] = "float32"
    router_rounding: ClassVar[tuple[str, ...]] = ("router_logits",)
    experts_rounding: ClassVar[tuple[str, ...]] = ()
    layer_rounding: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        package = f"transformers.models.{self.family}"
        modeling = importlib.import_module(f"{package}.modeling_{self.family}")
        configuration = importlib.import_module(f"{package}.configuration_{self.family}")
        try:
            self._config_class = getattr(configuration, self.config_class)
            self._classes = {
                name: getattr(modeling, name)
                for name in (self.router_class, self.experts_class, self.block_class)
            }
        except AttributeError as error:
            raise ImportError(
                f"{self.name}: transformers {self.version} is not laid out as 5.20 was: {error}"
            ) from None
        self._balance_loss = getattr(modeling, "load_balancing_loss_func", None)
        self._modules: dict[Any, torch.nn.Module] = {}

    # What a family translates.

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        """The configuration fields for the three sizes."""
        return {
            "hidden_size": hidden,
            "num_local_experts": num_experts,
            "intermediate_size": intermediate,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        """The configuration fields for a routing."""
        return {"num_experts_per_tok": config.top_k}

    def _experts_fields(self, config: ExpertsConfig) -> dict[str, Any]:
        """The configuration fields for the experts."""
        return {"hidden_act": ACTIVATIONS[config.activation]}

    def _router_parameters(
        self, weight: torch.Tensor, bias: torch.Tensor | None, selection_bias: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The router's parameters by their names in the library."""
        return {"weight": weight}

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """The experts' parameters by their names and in their layout in the library.

        Parameters of a module are contiguous, whatever the tensors were that it was loaded from.
        """
        return {
            "gate_up_proj": experts.gate_up.contiguous(),
            "down_proj": experts.down.contiguous(),
        }

    def _shared_parameters(
        self, shared: ExpertWeights | None, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The shared expert's parameters by their names in the library."""
        return {}

    # The operations.

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The family's router on logits [T, E], through an identity weight.

        Finite logits arrive as they are. One that is not spreads over its own row, since 0 · inf
        is NaN: the router is then asked about a row of NaN.
        """
        self._check_routing(logits, config, bias, logits.shape[-1])
        num_experts = logits.shape[-1]
        identity = logits.new_zeros(num_experts, num_experts).fill_diagonal_(1)
        router = self._module(
            self.router_class,
            **self._sizes(num_experts, num_experts, 1),
            **self._routing_fields(config),
        )
        parameters = self._router_parameters(identity, None, bias)
        _, weights, expert_ids = _call(router, parameters, logits)
        return _widen(weights, logits), expert_ids

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`load_balancing_loss_func` on one layer's logits; it selects the experts again itself."""
        self._check_inputs(logits)
        if config.loss != "transformers_concatenated" or config.score != "softmax":
            raise Unsupported(f"{self.name}: loss {config.loss!r} of {config.score!r} scores")
        if tokens_per_expert is not None:
            raise Unsupported(f"{self.name}: load_balancing_loss_func takes no counts")
        assert self._balance_loss is not None
        return config.coefficient * self._balance_loss(
            (logits,), logits.shape[1], expert_ids.shape[1], padding_mask
        )

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The family's experts on x [T, H], through this variant's backend."""
        num_experts = experts.down.shape[0]
        if expert_map is None:
            local_ids = expert_ids
            absent = (expert_ids < 0) | (expert_ids >= num_experts)
        else:
            known = (expert_ids >= 0) & (expert_ids < expert_map.shape[0])
            local_ids = expert_map[expert_ids.masked_fill(~known, 0)].to(expert_ids.dtype)
            absent = ~known | (local_ids < 0) | (local_ids >= num_experts)
        sharded = expert_map is not None or bool(absent.any())
        self._check_experts(
            x, experts, config, expert_map=expert_map is not None, invalid_ids=bool(absent.any())
        )
        if _name(expert_ids.dtype) not in self.capabilities.id_dtypes:
            raise Unsupported(f"{self.name}: no {_name(expert_ids.dtype)} ids")
        if sharded:
            local_ids = local_ids.masked_fill(absent, num_experts)
            weights = weights.masked_fill(absent, 0.0)
        module = self._module(
            self.experts_class,
            **self._sizes(num_experts, x.shape[-1], experts.down.shape[2]),
            **self._experts_fields(config),
        )
        # `MoEParamShard.shard_param` sets this on a rank that holds a part of the experts.
        module._is_expert_parallel = sharded  # type: ignore[assignment]
        return _call(module, self._experts_parameters(experts), x, local_ids, weights)

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """The family's whole block on x [N, L, H].

        Ids and weights are what its router returned in this very forward, seen by a hook. The
        blocks know no padding mask: a padded token is computed like any other.
        """
        from moe_reference.config import LayerOutput

        self._check_layer(x, parameters, config)
        num_experts, _, intermediate = parameters.experts.down.shape
        block = self._module(
            self.block_class,
            **self._sizes(num_experts, x.shape[-1], intermediate),
            **self._routing_fields(config.routing),
            **self._experts_fields(config.experts),
        )
        block.train(training)
        gate, gate_bias = parameters.router, parameters.router_bias
        if config.router_dtype is None:
            # A block has one dtype: `F.linear` takes no wider weight than its input.
            gate = gate.to(x.dtype)
            gate_bias = None if gate_bias is None else gate_bias.to(x.dtype)
        router = self._router_parameters(gate, gate_bias, parameters.selection_bias)
        state = {
            **{f"{self.gate}.{name}": value for name, value in router.items()},
            **{
                f"experts.{name}": value
                for name, value in self._experts_parameters(parameters.experts).items()
            },
            **self._shared_parameters(parameters.shared, x),
        }
        routed: list[tuple[torch.Tensor, ...]] = []
        hook = block.get_submodule(self.gate).register_forward_hook(
            lambda module, inputs, outputs: routed.append(outputs)
        )
        try:
            output = _call(block, state, x)
        finally:
            hook.remove()
        [(_, weights, expert_ids)] = routed
        return LayerOutput(
            # GptOssMLP returns its routing weights beside the output.
            output=output[0] if isinstance(output, tuple) else output,
            expert_ids=expert_ids,
            weights=_widen(weights, x),
        )

    # What is declared, and what is asked.

    @classmethod
    def declared(cls, backend: str) -> Capabilities:
        """The capabilities of this family with one of the `BACKENDS`."""
        grouped = backend == "grouped_mm"
        loss = ("balance_loss",) if cls.has_balance_loss else ()
        operations = ("route", *loss, "experts", "layer")
        return Capabilities(
            devices=("cpu", "cuda"),
            # `torch.nn.functional.grouped_mm` takes no float64.
            dtypes=("float32", "bfloat16", "float16") + (() if grouped else ("float64",)),
            # The eager forwards hand the ids to `one_hot`, which takes int64 and nothing else.
            id_dtypes=("int64",) if backend == "eager" else ("int64", "int32"),
            operations=operations,
            routing=cls.routing,
            experts=cls.experts_choice,
            layer=cls.layer_choice,
            # `load_balancing_loss_func` has no argument for ids or counts: it selects again.
            balance={
                "loss": ("transformers_concatenated",),
                "score": ("softmax",),
                "tokens_per_expert": (False,),
                "ids": ("chosen",),
                "invalid_ids": (False,),
            },
            router_dtype=cls.router_dtype,
            min_experts=cls.min_experts,
            # `grouped_mm` wants rows of a multiple of 16 bytes: 8 numbers of 2 bytes.
            hidden_multiple=8 if grouped else 1,
            intermediate_multiple=8 if grouped else 1,
            gradients=operations,
            strides=cls.strides,
            # `linear` and `grouped_mm` take two tensors of one dtype.
            mixed_dtypes=False,
            rounding_points=(
                *cls.router_rounding,
                *cls.experts_rounding,
                # Every product, activation and multiplication is a tensor of x's dtype; the
                # weighting too, unless the routing weights are wider.
                "pre_activation",
                "gate_activation",
                "activation",
                "expert_output",
                "weighted_output",
                # Eager adds into a tensor of x's dtype with `index_add_`; the other two sum over K
                # at once: transformers/integrations/moe.py.
                *(("combine",) if backend == "eager" else ()),
                *cls.layer_rounding,
            ),
            logits_through="identity",
        )

    def _check_inputs(self, x: torch.Tensor) -> None:
        dtype, device = _name(x.dtype), x.device.type
        if dtype not in self.capabilities.dtypes or device not in self.capabilities.devices:
            raise Unsupported(f"{self.name}: no {dtype} on {device}")

    def _check_routing(
        self,
        x: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None,
        num_experts: int,
    ) -> None:
        self._check_inputs(x)
        if num_experts < self.capabilities.min_experts:
            raise Unsupported(f"{self.name}: no E = {num_experts}")
        asked = _fields(config)
        asked["hash_table"] = config.hash_table is not None
        self._check_choice("routing", asked | {"selection_bias": bias is not None})

    def _check_experts(
        self, x: torch.Tensor, experts: ExpertWeights, config: ExpertsConfig, **flags: bool
    ) -> None:
        self._check_inputs(x)
        declared = self.capabilities
        hidden, intermediate = experts.down.shape[1:]
        if hidden % declared.hidden_multiple or intermediate % declared.intermediate_multiple:
            raise Unsupported(f"{self.name}: no H = {hidden} with I = {intermediate}")
        asked = _fields(config) | {"bias": _biased(experts), "expert_map": False}
        self._check_choice("experts", asked | {"invalid_ids": False} | flags)

    def _check_layer(self, x: torch.Tensor, parameters: LayerWeights, config: LayerConfig) -> None:
        num_experts = parameters.router.shape[0]
        self._check_routing(x, config.routing, parameters.selection_bias, num_experts)
        self._check_experts(x, parameters.experts, config.experts)
        if parameters.shared is not None and _biased(parameters.shared):
            raise Unsupported(f"{self.name}: no biases in the shared expert")
        asked = _fields(config) | {
            "shared": parameters.shared is not None,
            "shared_gate": parameters.shared_gate is not None,
            "router_bias": parameters.router_bias is not None,
        }
        self._check_choice("layer", asked)

    def _check_choice(self, area: str, asked: Mapping[str, Any]) -> None:
        refused = [
            {name: asked[name] for name, allowed in choice.items() if asked[name] not in allowed}
            for choice in self.capabilities.alternatives(area)
        ]
        if all(refused):
            nearest = min(refused, key=len)
            listed = ", ".join(f"{name} = {value!r}" for name, value in nearest.items())
            raise Unsupported(f"{self.name}: no {area} with {listed}")

    def _module(self, class_name: str, **configuration: Any) -> torch.nn.Module:
        """The library's module for one configuration, made once, with no storage of its own."""
        import torch

        key = (class_name, *sorted(configuration.items()))
        if key not in self._modules:
            config = self._config_class(**configuration)
            config._experts_implementation = self.backend
            with torch.device("meta"):
                self._modules[key] = self._classes[class_name](config)
        return self._modules[key]


class Mixtral(TransformersTarget):
    """transformers/models/mixtral/modeling_mixtral.py."""

    family = "mixtral"
    config_class = "MixtralConfig"
    router_class = "MixtralTopKRouter"
    experts_class = "MixtralExperts"
    block_class = "MixtralSparseMoeBlock"
    routing: ClassVar[list[Choice]] = [
        {
            "score": ("softmax",),
            "order": ("score_then_topk",),
            # `MixtralTopKRouter.forward` always divides by the plain sum, for K = 1 as well.
            "renormalize": (True,),
            "renormalize_single": (True,),
            "norm": ("sum",),
            "epsilon": (0.0,),
            # It has no scale, groups, selection bias or table.
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        }
    ]


class Qwen3Moe(TransformersTarget):
    """transformers/models/qwen3_moe/modeling_qwen3_moe.py."""

    family = "qwen3_moe"
    config_class = "Qwen3MoeConfig"
    router_class = "Qwen3MoeTopKRouter"
    experts_class = "Qwen3MoeExperts"
    block_class = "Qwen3MoeSparseMoeBlock"
    # `Qwen3MoeTopKRouter.forward` is Mixtral's with `norm_topk_prob` as a switch.
    routing: ClassVar[list[Choice]] = [
        Mixtral.routing[0],
        {
            "score": ("softmax",),
            "order": ("score_then_topk",),
            "renormalize": (False,),
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        },
    ]
    # `router_top_value.to(router_logits.dtype)` at its end.
    router_rounding = ("router_logits", "router_weights")

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "num_experts": num_experts,
            "moe_intermediate_size": intermediate,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        return {"num_experts_per_tok": config.top_k, "norm_topk_prob": config.renormalize}


class DeepseekV3(TransformersTarget):
    """transformers/models/deepseek_v3/modeling_deepseek_v3.py."""

    family = "deepseek_v3"
    config_class = "DeepseekV3Config"
    router_class = "DeepseekV3TopkRouter"
    experts_class = "DeepseekV3Experts"
    block_class = "DeepseekV3MoE"
    has_balance_loss = False
    # `.topk(2, dim=-1)` over each group's scores in `DeepseekV3TopkRouter.forward`, with one group
    # as with several.
    min_experts = 2
    # `DeepseekV3TopkRouter.forward`: sigmoid, a group's score is always the sum of its best two,
    # masked with -inf, (+ 1e-20) in the denominator, for K = 1 as well, and the scale always.
    routing: ClassVar[list[Choice]] = [
        {
            "score": ("sigmoid",),
            "order": ("score_then_topk",),
            "selection_bias": (False, True),
            "hash_table": (False,),
            **groups,
            **renormalisation,
        }
        for groups in (
            {"num_groups": (1,)},
            {"group_score": ("top2_sum",), "mask_fill": ("-inf",)},
        )
        for renormalisation in (
            {"renormalize": (False,)},
            {
                "renormalize": (True,),
                "renormalize_single": (True,),
                "norm": ("sum",),
                "epsilon": (1e-20,),
                "epsilon_mode": ("add",),
                "scale_when": ("always",),
            },
        )
    ]
    layer_choice: ClassVar[Choice] = {
        **TransformersTarget.layer_choice,
        # `DeepseekV3MoE` always adds `shared_experts`; n_shared_experts = 0 gives it no width.
        "shared": (False, True),
        # `hidden_states.type(torch.float32)` in the router, for float64 as well.
        "router_dtype": ("float32",),
    }
    router_rounding = ()
    layer_rounding = ("shared_output",)

    def _sizes(self, num_experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "n_routed_experts": num_experts,
            "moe_intermediate_size": intermediate,
            # hidden_size must be a multiple of it, and 1 divides everything.
            "num_attention_heads": 1,
        }

    def _routing_fields(self, config: RoutingConfig) -> dict[str, Any]:
        return {
            "num_experts_per_tok": config.top_k,
            "norm_topk_prob": config.renormalize,
            "routed_scaling_factor": float(config.scale),
            "n_group": config.num_groups,
            "topk_group": config.topk_groups,
        }

    def _router_parameters(
        self, weight: torch.Tensor, bias: torch.Tensor | None, selection_bias: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if selection_bias is None:
            selection_bias = weight.new_zeros(weight.shape[0])
        # The buffer is float32: `nn.Buffer(torch.zeros(self.num_experts))`.
        return {"weight": weight, "e_score_correction_bias": selection_bias.float()}

    def _shared_parameters(
        self, shared: ExpertWeights | None, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if shared is None:
            gate = up = x.new_zeros(0, x.shape[-1])
            down = x.new_zeros(x.shape[-1], 0)
        else:
            gate, up = shared.gate_up[0].chunk(2)
            down = shared.down[0]
        # `DeepseekV3MLP` is three linear layers, so its width is that of the given weights.
        return {
            "shared_experts.gate_proj.weight": gate.contiguous(),
            "shared_experts.up_proj.weight": up.contiguous(),
            "shared_experts.down_proj.weight": down.contiguous(),
        }


class GptOss(TransformersTarget):
    """transformers/models/gpt_oss/modeling_gpt_oss.py."""

    family = "gpt_oss"
    config_class = "GptOssConfig"
    router_class = "GptOssTopKRouter"
    experts_class = "GptOssExperts"
    block_class = "GptOssMLP"
    gate = "router"
    strides = True  # `GptOssMLP.forward` begins with a reshape.
    routing: ClassVar[list[Choice]] = [
        {
            # `GptOssTopKRouter.forward`: softmax over the K chosen logits, which then sum to 1.
            "score": ("softmax",),
            "order": ("topk_then_score",),
            "renormalize": (False,),
            "scale": (1.0,),
            "num_groups": (1,),
            "selection_bias": (False,),
            "hash_table": (False,),
        }
    ]
    experts_choice: ClassVar[Choice] = {
        **TransformersTarget.experts_choice,
        # `GptOssExperts._apply_gate` has its activation built in; alpha and limit are read from
        # config.swiglu_alpha and config.swiglu_limit. Its biases always exist: none means zeros.
        "activation": ("swigluoai",),
        "bias": (False, True),
    }
    layer_choice: ClassVar[Choice] = {
        **TransformersTarget.layer_choice,
        "router_bias": (False, True),
    }
    # `softmax(router_top_value, dtype=router_top_value.dtype)`: float64 stays float64.
    router_dtype = None
    router_rounding = ("router_logits", "router_scores")
    # `current_state @ gate_up_proj + bias`, and `_apply_gate` in five steps, each a tensor of x's
    # dtype.
    experts_rounding = ("product", "activation_steps")

    def _experts_fields(self, config: ExpertsConfig) -> dict[str, Any]:
        return {"swiglu_alpha": float(config.alpha), "swiglu_limit": float(config.limit)}

    def _router_parameters(
        self, weight: torch.Tensor, bias: torch.Tensor | None, selection_bias: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {
            "weight": weight,
            "bias": weight.new_zeros(weight.shape[0]) if bias is None else bias,
        }

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        gate_up_bias, down_bias = experts.gate_up_bias, experts.down_bias
        if gate_up_bias is None:
            gate_up_bias = experts.gate_up.new_zeros(experts.gate_up.shape[:2])
        if down_bias is None:
            down_bias = experts.down.new_zeros(experts.down.shape[:2])
        # gate and up rows alternate, and both matrices are transposed: [E, H, 2I] and [E, I, H].
        return {
            "gate_up_proj": _interleave(experts.gate_up).transpose(1, 2).contiguous(),
            "gate_up_proj_bias": _interleave(gate_up_bias),
            "down_proj": experts.down.transpose(1, 2).contiguous(),
            "down_proj_bias": down_bias.contiguous(),
        }


FAMILIES: tuple[type[TransformersTarget], ...] = (Mixtral, Qwen3Moe, DeepseekV3, GptOss)


def variants() -> dict[str, Callable[[], Target]]:
    """The targets that this library has, by the name of the variant.

    A factory raises `ImportError` with one sentence where transformers is missing or too old.

    >>> list(variants())[:3]
    ['mixtral-eager', 'mixtral-batched_mm', 'mixtral-grouped_mm']
    """
    return {
        f"{family.family}-{backend}": partial(_make, family, backend)
        for family in FAMILIES
        for backend in BACKENDS
    }


def _make(family: type[TransformersTarget], backend: str) -> Target:
    name = f"transformers/{family.family}-{backend}"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"{name} needs transformers >= 5.20, found {version or 'none'}: "
            "pip install 'moespec[transformers]'"
        )
    declared: dict[str, Any] = {
        "__doc__": family.__doc__,
        "name": name,
        "version": version,
        "backend": backend,
        "capabilities": family.declared(backend),
    }
    return type(f"{family.__name__}_{backend}", (family,), declared)()


def _call(module: torch.nn.Module, parameters: dict[str, torch.Tensor], *inputs: Any) -> Any:
    from torch.func import functional_call

    return functional_call(module, parameters, inputs, strict=True)


def _widen(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return weights.double() if like.element_size() == 8 else weights.float()


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)


def _biased(experts: ExpertWeights) -> bool:
    return experts.gate_up_bias is not None or experts.down_bias is not None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fields(config: Any) -> dict[str, Any]:
    """A configuration's fields, with dtypes by name, as capabilities have them."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: _name(value) if type(value).__name__ == "dtype" else value
        for name, value in values.items()
    }
