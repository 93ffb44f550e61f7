"""torchtitan under the suite: its router, token dispatcher, experts and MoE layer on one rank.

Tried with torchtitan 0.3.0 and torch 2.13.0, installed beside each other with
`pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro shtab docstring-parser typeguard
einops torch_checkpointing torchdata`.

- `router`: `TokenChoiceTopKRouter`, and the optimizer hook of `register_moe_load_balancing_hook`.
- `dispatcher`: `LocalTokenDispatcher`.
- `moe`: `RoutedExperts` with `GroupedExperts`, and `MoE` around them; `gpt_oss` the same with
  `GptOssGroupedExperts` and `GptOssMoE`, and `gpt_oss-float32` in a float32 model.
- `expert_parallel` stands in `torchtitan_parallel.py`.

These translations are made, and no others:

- logits go in as hidden states through an identity weight, because the router takes hidden states;
- gate and up are two parameters of `GroupedExperts`, and their rows alternate in gpt-oss's;
- the dispatcher is told the number of each expert's tokens, which `MoE.forward` counts;
- it keeps token indices and not slots: slots are what it makes of routing scores 0, 1, 2, …;
- a rate becomes the module's attribute `load_balance_coeff`, which the hook reads: the constructor
  takes no 0;
- routing weights come back in float32 whatever their own dtype.

This module imports neither torch nor torchtitan before a target is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import (
    dtype_name,
    refuse,
    refuse_experts,
    refuse_layer,
    refuse_routing,
    refuse_tensor,
)
from moe_conformance.targets.torchtitan_parallel import ExpertParallel
from moe_conformance.targets.torchtitan_parts import (
    DTYPES,
    ROUTING,
    TorchTitanTarget,
    call,
    counts_of,
    elsewhere,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import (
        ExpertsConfig,
        ExpertWeights,
        LayerConfig,
        LayerOutput,
        LayerWeights,
        RoutingConfig,
    )


class Router(TorchTitanTarget):
    """`TokenChoiceTopKRouter` behind its gate, and the update of its bias without a loss."""

    name = "torchtitan/router"
    capabilities = Capabilities(
        dtypes=DTYPES,
        routing=ROUTING,
        # The hook of `register_moe_load_balancing_hook` takes the mean away from every step.
        balance={"centred": (True,)},
        # The gate's autocast to float32 is refused on a CPU, so the scores have x's dtype there.
        rounding_points=("router_logits", "router_scores"),
        gradients=("route",),
        logits_through="identity",
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router on logits [T, E], as a batch of one sequence."""
        refuse_tensor(self, logits)
        refuse_routing(self, config, bias)
        num_experts = logits.shape[-1]
        identity = logits.new_zeros(num_experts, num_experts).fill_diagonal_(1)
        router = self._module(self._router_config(config, num_experts, num_experts))
        weights, expert_ids, _ = call(router, {"gate.weight": identity}, logits[None], bias)
        return weights[0].float(), expert_ids[0]

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """One optimizer step of a model whose only MoE layer has counted these tokens."""
        import torch

        refuse_tensor(self, bias)
        refuse(self, "balance", {"centred": centred})
        one_shape = bias.ndim == 1 and tokens_per_expert.shape == bias.shape
        if not one_shape or dtype_name(tokens_per_expert.dtype) == "bool":
            # Nobody hands them over in the library: they are two buffers [E] of one module.
            raise Unsupported(f"{self.name}: no such counts for a bias of {list(bias.shape)}")
        moe = self._counting_layer(len(bias))
        moe.load_balance_coeff = rate
        # Both buffers are float32 whatever the model's dtype, and the hook writes to them.
        moe.expert_bias_E = bias.to(torch.float32, copy=True)
        moe.tokens_per_expert_E = tokens_per_expert.to(torch.float32, copy=True)
        block = torch.nn.Module()
        block.moe, block.moe_enabled = moe, True  # type: ignore[assignment]
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleDict({"0": block})
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        alone = SimpleNamespace(ep_enabled=False, tp=1, get_optional_mesh=lambda name: None)
        register = self._class("optimizer", "register_moe_load_balancing_hook")
        register(optimizer, [model], alone)
        optimizer.step()
        moved: torch.Tensor = moe.expert_bias_E
        return moved

    def _counting_layer(self, num_experts: int) -> Any:
        """The smallest `MoE` with that many experts; what it keeps is for one call."""
        import torch
        from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

        one = ExpertWeights(torch.empty(num_experts, 2, 1), torch.empty(num_experts, 1, 1))
        return self._built(
            self._class("moe", "MoE").Config(
                num_experts=num_experts,
                router=self._router_config(RoutingConfig(1), num_experts, 1),
                routed_experts=self._routed_config(one, ExpertsConfig(), num_experts, 1),
            )
        )


class Dispatcher(TorchTitanTarget):
    """`LocalTokenDispatcher`: rows in the order of their experts, and back."""

    name = "torchtitan/dispatcher"
    capabilities = Capabilities(
        dtypes=DTYPES,
        # Ids are the router's own, and every pair has a row.
        align={"invalid_ids": (False,)},
        # `LocalDispatchMetadata` has a token and a score for every row.
        appended_rows=False,
        gradients=("dispatch", "combine"),
        # `_local_reorder` views ids and scores.
        strides=False,
        # `combine` rounds each weighted row to its dtype, and adds into memory of x's dtype.
        rounding_points=("weighted_output", "combine"),
    )

    def dispatch(
        self, x: torch.Tensor, expert_ids: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows by expert, the counts that go with them, and the slot of each row."""
        import torch

        refuse_tensor(self, x)
        self._refuse_numbers("ids", expert_ids, 2)
        if elsewhere(expert_ids, num_experts):
            raise Unsupported(f"{self.name}: no ids below 0 or from {num_experts} on")
        dispatcher = self._dispatcher(num_experts, expert_ids.shape[1])
        numbered = torch.arange(expert_ids.numel(), device=x.device).view(expert_ids.shape)
        counts = counts_of(expert_ids, num_experts)
        rows, counts, kept = dispatcher.dispatch(x, numbered, expert_ids, counts)
        return rows, counts, kept.topk_scores_experts_sorted_N

    def combine(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Weigh rows and add them up; of the tokens it takes shape and dtype only."""
        refuse_tensor(self, rows)
        self._refuse_numbers("slots", slots, 1)
        if weights.ndim != 2:
            raise Unsupported(f"{self.name}: no weights of {list(weights.shape)}")
        top_k = weights.shape[1]
        if bool((slots >= weights.numel()).any()):
            raise Unsupported(f"{self.name}: no rows that belong to no pair")
        kept = self._class("dispatchers", "LocalDispatchMetadata")(
            token_indices_experts_sorted_N=slots.long() // top_k,
            topk_scores_experts_sorted_N=weights.reshape(-1)[slots.long()],
        )
        x = rows.new_empty(len(weights), rows.shape[1])
        out: torch.Tensor = self._dispatcher(1, top_k).combine(rows, kept, x)
        return out

    def _refuse_numbers(self, name: str, given: torch.Tensor, dimensions: int) -> None:
        """What is counted, or divided by K, before the library sees it."""
        if given.is_floating_point() or given.ndim != dimensions:
            raise Unsupported(f"{self.name}: no {name} of {given.dtype} {list(given.shape)}")

    def _dispatcher(self, num_experts: int, top_k: int) -> Any:
        config = self._class("dispatchers", "LocalTokenDispatcher").Config
        return config(num_experts=num_experts, top_k=top_k).build()


class Layer(TorchTitanTarget):
    """`RoutedExperts` with `GroupedExperts`, and `MoE`."""

    name = "torchtitan/moe"
    layer_class: ClassVar[tuple[str, str]] = ("moe", "MoE")
    capabilities = Capabilities(
        dtypes=DTYPES,
        # `GroupedExperts.forward` casts rows and weights, whatever they are, and its result back.
        experts_dtype="bfloat16",
        routing=ROUTING,
        experts={
            # `GroupedExperts.forward`: silu, two branches, no biases; `combine` weighs outputs.
            "activation": ("silu",),
            "gated": (True,),
            "bias": (False,),
            "weight_on": ("output",),
            # Ids are the router's own. Experts elsewhere are the business of expert parallelism.
            "expert_map": (False,),
            "invalid_ids": (False,),
        },
        layer={
            # The bias moves without a loss.
            "balance": (None,),
            "shared_scale": (1.0,),
            # `MoE.forward` takes no mask.
            "padding_mask": (False,),
            # The gate's autocast to float32 is refused on a CPU.
            "router_dtype": (None,),
        },
        # `torch._grouped_mm` wants rows of a multiple of 16 bytes.
        hidden_multiple=8,
        intermediate_multiple=8,
        gradients=("experts", "layer"),
        # `RoutedExperts.forward` views x, scores and ids.
        strides=False,
        # `F.linear` in the gate and in the shared experts takes two tensors of one dtype.
        mixed_dtypes=False,
        rounding_points=(
            "router_logits",
            "router_scores",
            # Every product and every step behind it is a tensor of the experts' dtype.
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
            "weighted_output",
            "combine",
            "shared_output",
        ),
        logits_through="identity",
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
        """`RoutedExperts` on x [T, H], as a batch of one sequence."""
        num_experts = len(experts.down)
        refuse_tensor(self, x)
        invalid = elsewhere(expert_ids, num_experts)
        flags = {"expert_map": expert_map is not None, "invalid_ids": invalid}
        refuse_experts(self, experts, config, **flags)
        module = self._module(
            self._routed_config(experts, config, num_experts, expert_ids.shape[1])
        )
        counts = counts_of(expert_ids, num_experts)
        parameters = self._experts_parameters(experts)
        out = call(module, parameters, x[None], weights[None], expert_ids[None], counts)
        return out[0]

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """`MoE` on x [N, L, H]; ids and weights are what its router gave in this very forward."""
        from moe_reference.config import LayerOutput

        refuse_layer(self, x, parameters, config, padding_mask=padding_mask is not None)
        num_experts, hidden = parameters.router.shape
        top_k = config.routing.top_k
        where, name = self.layer_class
        module = self._module(
            self._class(where, name).Config(
                num_experts=num_experts,
                router=self._router_config(
                    config.routing, num_experts, hidden, parameters.router_bias is not None
                ),
                routed_experts=self._routed_config(
                    parameters.experts, config.experts, num_experts, top_k
                ),
                shared_experts=self._shared_config(parameters),
                load_balance_coeff=None if parameters.selection_bias is None else 1e-3,
            )
        )
        module.train(training)
        state, counted = self._state(parameters)
        routed: list[tuple[torch.Tensor, ...]] = []
        hook = module.router.register_forward_hook(
            lambda module, inputs, outputs: routed.append(outputs)
        )
        try:
            output = call(module, state, x)
        finally:
            hook.remove()
        [(weights, expert_ids, _)] = routed
        return LayerOutput(
            output=output,
            expert_ids=expert_ids.flatten(0, 1),
            weights=weights.flatten(0, 1).float(),
            # Counted in training only.
            tokens_per_expert=counted if training else None,
        )

    def _state(self, parameters: LayerWeights) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Parameters and buffers of `MoE`, and the one of them that it counts in."""
        dtype = parameters.experts.down.dtype
        counted = parameters.router.new_zeros(len(parameters.router)).float()
        experts = self._experts_parameters(parameters.experts)
        state = {
            # A layer has one dtype: `F.linear` takes no wider weight than its input.
            "router.gate.weight": parameters.router.to(dtype),
            "tokens_per_expert_E": counted,
            **{f"routed_experts.{name}": value for name, value in experts.items()},
        }
        if parameters.router_bias is not None:
            state["router.gate.bias"] = parameters.router_bias.to(dtype)
        if parameters.selection_bias is not None:
            state["expert_bias_E"] = parameters.selection_bias.float()
        if parameters.shared is not None:
            gate, up = parameters.shared.gate_up[0].chunk(2)
            state["shared_experts.w1.weight"] = gate.contiguous()
            state["shared_experts.w3.weight"] = up.contiguous()
            state["shared_experts.w2.weight"] = parameters.shared.down[0].contiguous()
        if parameters.shared_gate is not None:
            state["shared_experts.gate.weight"] = parameters.shared_gate
        return state, counted

    def _shared_config(self, parameters: LayerWeights) -> Any:
        if parameters.shared is None:
            return None
        hidden, width = parameters.shared.down.shape[1:]
        linears = {
            "w1": self._linear(hidden, width),
            "w2": self._linear(width, hidden),
            "w3": self._linear(hidden, width),
        }
        if parameters.shared_gate is None:
            return self._class("dense", "FeedForward").Config(**linears)
        gated = self._class("dense", "SigmoidGatedFeedForward")
        return gated.Config(**linears, gate=self._linear(hidden, 1))


class GptOss(Layer):
    """`RoutedExperts` with `GptOssGroupedExperts`, and `GptOssMoE`."""

    name = "torchtitan/gpt_oss"
    experts_class = "GptOssGroupedExperts"
    layer_class = ("gpt_oss", "GptOssMoE")
    capabilities = replace(
        Layer.capabilities,
        # `GptOssGroupedExperts.forward` does not cast back: see `GptOssFloat32`.
        dtypes=("bfloat16",),
        experts={
            **Layer.capabilities.alternatives("experts")[0],
            # `swiglu` has its alpha built in; biases always exist, and none means zeros.
            "activation": ("swigluoai",),
            "alpha": (1.702,),
            "bias": (False, True),
        },
        # The shared experts of `MoE` have another activation, and no biases.
        layer={**Layer.capabilities.alternatives("layer")[0], "shared": (False,)},
        rounding_points=(
            *Layer.capabilities.rounding_points,
            # Products are bfloat16 before the biases, and so is each step of `swiglu`.
            "product",
            "activation_steps",
        ),
    )


class GptOssFloat32(GptOss):
    """The same in a float32 model, which `Training.dtype` is by default."""

    name = "torchtitan/gpt_oss-float32"
    capabilities = replace(GptOss.capabilities, dtypes=("float32",))


def variants() -> dict[str, Callable[[], Target]]:
    """The targets that this library has, by the name of the variant.

    A factory raises `ImportError` with one sentence where torchtitan is missing or another one.

    >>> list(variants())
    ['router', 'dispatcher', 'moe', 'gpt_oss', 'gpt_oss-float32', 'expert_parallel']
    """
    listed = (Router, Dispatcher, Layer, GptOss, GptOssFloat32, ExpertParallel)
    return {each.name.removeprefix("torchtitan/"): each for each in listed}
