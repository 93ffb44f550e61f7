"""vLLM's experts on a CPU: `cpu_fused_moe`, in C++, reached as a model reaches it.

What is put under test: `CPUUnquantizedExperts` (vllm/model_executor/layers/fused_moe/experts/
cpu_moe.py) with its "vec" kernel, the one that takes every dtype and runs on every processor,
inside `FusedMoEKernel` and `MoEPrepareAndFinalizeNoDPEPModular` (modular_kernel.py,
prepare_finalize/no_dp_ep.py), which weight the input and hand the expert map on. How to install
it says `moe_conformance.targets.vllm`.

Two translations are made, and no others:

- the given weights, contiguous, become the parameters of a layer, whose weights are then processed
  as after loading: padded and packed;
- for swigluoai gate and up rows alternate, as in the checkpoints of gpt-oss.

This module imports neither torch nor vllm before a target is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Unsupported
from moe_conformance.targets.adapter import refuse_experts, refuse_tensor
from moe_conformance.targets.vllm import PACKAGE, VllmTarget

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu2": "relu2",
    "swigluoai": "swigluoai",
    # silu, and a limit beside it.
    "swiglu_limit": "silu",
}
DTYPES = ("float32", "bfloat16", "float16")
CHOICE: dict[str, tuple[Any, ...]] = {
    # `CPUUnquantizedExperts._supports_activation` and `_supports_no_act_and_mul`; the fourth,
    # swigluoai, has targets of its own.
    "activation": ("silu", "gelu", "gelu_tanh"),
    "gated": (True,),
    "bias": (False, True),
    "weight_on": ("output",),
    "expert_map": (False,),
    "invalid_ids": (False,),
}


def _declared(**changed: Any) -> Capabilities:
    declared: dict[str, Any] = {
        # `prepack_moe_weight` is not implemented for double.
        "dtypes": DTYPES,
        # The kernel checks that ids are int32, which is what the routers return.
        "id_dtypes": ("int32",),
        "operations": ("experts",),
        "experts": CHOICE,
        # `_supports_grouped_gemm`: H a multiple of 32; I is padded.
        "hidden_multiple": 32,
        # The kernel checks that rows of x lie as far apart as they are long.
        "strides": False,
        # x and weights are read with one type.
        "mixed_dtypes": False,
        # What is between the two products; products, biases, activation and the weighted sum are
        # float32.
        "rounding_points": ("activation",),
    }
    return Capabilities(**(declared | changed))


class Experts(VllmTarget):
    """silu, gelu and gelu_tanh, weighted outputs, all experts on one rank."""

    name = "vllm/experts"
    modules: ClassVar[tuple[str, ...]] = (
        "experts.cpu_moe",
        "modular_kernel",
        "prepare_finalize.no_dp_ep",
    )
    capabilities = _declared()
    expert_class: ClassVar[tuple[str, str]] = ("experts.cpu_moe", "CPUUnquantizedExperts")
    checked: ClassVar[bool] = True
    """Whether the class is asked first if it takes the configuration."""

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A layer's weights are loaded and processed, and its kernel is applied once."""
        import torch

        num_experts = experts.down.shape[0] if expert_map is None else len(expert_map)
        here = (expert_ids >= 0) & (expert_ids < num_experts)
        refuse_tensor(self, x)
        flags = {"expert_map": expert_map is not None, "invalid_ids": not bool(here.all())}
        refuse_experts(self, experts, config, **flags)
        if expert_ids.dtype is not torch.int32:
            raise Unsupported(f"{self.name}: no {expert_ids.dtype} ids")
        if not all(each.is_contiguous() for each in (x, weights, expert_ids)):
            raise Unsupported(f"{self.name}: tokens, weights and ids have to be contiguous")
        if experts.gate_up.dtype is not x.dtype:
            raise Unsupported(f"{self.name}: weights of {experts.gate_up.dtype} for {x.dtype}")
        kernel, layer, activation = self._load(x, experts, expert_ids.shape[1], num_experts, config)
        return kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=weights.float(),
            topk_ids=expert_ids,
            activation=activation,
            global_num_experts=num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=config.weight_on == "input",
        )

    def _load(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        top_k: int,
        num_experts: int,
        config: ExpertsConfig,
    ) -> tuple[Any, torch.nn.Module, Any]:
        """The kernel of `FusedMoEKernel`, the layer with its weights processed, the activation."""
        import torch

        settings, modular = module_of("config"), module_of("modular_kernel")
        module, name = self.expert_class
        expert_class = getattr(module_of(module), name)
        options = options_of(
            x,
            experts.down.shape,
            top_k,
            config,
            num_experts=num_experts,
            num_logical_experts=num_experts,
            moe_parallel_config=self._parallel(settings.FusedMoEParallelConfig),
        )
        supported, reason = expert_class.is_supported_config(
            expert_class, options, None, None, modular.FusedMoEActivationFormat.Standard
        )
        if self.checked and not supported:
            raise Unsupported(f"{self.name}: {reason}")
        layer = torch.nn.Module()
        for name, tensor in self._parameters(experts).items():
            parameter = torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
            layer.register_parameter(name, parameter)
        biases = (getattr(layer, name, None) for name in ("w13_bias", "w2_bias"))
        expert_part = expert_class(options, settings.biased_moe_quant_config(*biases))
        expert_part.process_weights_after_loading(layer)
        prepare = module_of("prepare_finalize.no_dp_ep").MoEPrepareAndFinalizeNoDPEPModular()
        return modular.FusedMoEKernel(prepare, expert_part), layer, options.activation

    def _parallel(self, parallel_class: Any) -> Any:
        return parallel_class.make_no_parallel()

    def _parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """The weights by the names and in the layout that a layer has them."""
        named = {
            "w13_weight": experts.gate_up,
            "w2_weight": experts.down,
            "w13_bias": experts.gate_up_bias,
            "w2_bias": experts.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class ExpertsOfGptOss(Experts):
    """swigluoai, as gpt-oss has it."""

    name = "vllm/experts-swigluoai"
    capabilities = _declared(
        # alpha and limit are constants of the kernel.
        experts=CHOICE | {"activation": ("swigluoai",), "alpha": (1.702,), "limit": (7.0,)},
        # Gate and up alternate, so `_padded_intermediate_size` leaves I as it is.
        intermediate_multiple=32,
    )

    def _parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        import torch

        def alternating(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)

        named = super()._parameters(experts)
        return {k: alternating(v) if k.startswith("w13") else v for k, v in named.items()}


class ExpertsWithLimit(Experts):
    """silu with a limit on gate and up, as DeepSeek-V4 has it.

    `FusedMoEConfig.swiglu_limit` says that classes without it are filtered out by
    `is_supported_config`, which takes it here.
    """

    name = "vllm/experts-with-limit"
    capabilities = _declared(
        dtypes=("float32",), experts=CHOICE | {"activation": ("swiglu_limit",)}
    )


class ExpertsWeightedInput(Experts):
    """Weighted inputs, as Llama 4 has them."""

    name = "vllm/experts-weighted-input"
    capabilities = _declared(
        experts=CHOICE | {"weight_on": ("input",)},
        # `MoEPrepareAndFinalizeNoDPEPModular.prepare` asserts it.
        max_top_k=1,
        rounding_points=("activation", "expert_input"),
    )


class ExpertsOfOneRank(Experts):
    """A rank's experts with the map and the ids of all, as under `--enable-expert-parallel`.

    `CPUUnquantizedExperts._supports_parallel_config` takes every parallel configuration.
    """

    name = "vllm/experts-of-one-rank"
    capabilities = _declared(
        dtypes=("float32",),
        experts=CHOICE | {"expert_map": (True,), "invalid_ids": (False, True)},
    )

    def _parallel(self, parallel_class: Any) -> Any:
        parallel = super()._parallel(parallel_class)
        parallel.use_ep, parallel.ep_size = True, 2
        return parallel


TARGETS: tuple[type[VllmTarget], ...] = (
    Experts,
    ExpertsOfGptOss,
    ExpertsWithLimit,
    ExpertsWeightedInput,
    ExpertsOfOneRank,
)


def options_of(
    x: torch.Tensor, shape: Sequence[int], top_k: int, config: ExpertsConfig, **more: Any
) -> Any:
    """A `FusedMoEConfig` of experts whose second matrix is of that shape, [E, H, I]."""
    settings, activations = module_of("config"), module_of("activation")
    num_local, hidden, intermediate = shape
    suffix = "" if config.gated else "_no_mul"
    return settings.FusedMoEConfig(
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=intermediate,
        num_local_experts=num_local,
        activation=activations.MoEActivation(ACTIVATIONS[config.activation] + suffix),
        device="cpu",
        routing_method=settings.RoutingMethodType.Renormalize,
        in_dtype=x.dtype,
        swiglu_limit=config.limit if config.activation == "swiglu_limit" else None,
        **more,
    )


def module_of(name: str) -> Any:
    """A module of vLLM's fused MoE."""
    return importlib.import_module(f"{PACKAGE}.{name}")
