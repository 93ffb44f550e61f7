"""mixture-of-experts and st-moe-pytorch by lucidrains under the suite: their whole layers.

`Top2Layer` puts `MoE` of mixture-of-experts under test, `TopNLayer` `MoE` of st-moe-pytorch. How
they are installed, and what is told to their gates, says `lucidrains`. The translations, and no
others:

- the layers are called with the given tensors in the place of their parameters; a bias that there
  is not is zeros, and st-moe's multiplicative bias is ones;
- the capacity factor is E, so that every expert has room for all tokens of a sequence, and a
  sequence goes in in pieces of at most 128 tokens: the layers' tensors are quadratic in its length;
- st-moe's straight-through estimate of the router's gradient, which is not the output's gradient,
  is told off;
- ids and weights are the K largest of the dense weights in the gate's own combine tensor, seen by a
  hook in this very forward.

Neither torch nor a library is imported before a target is made.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import kept_random_state, refuse_layer
from moe_conformance.targets.lucidrains import (
    ROUTING,
    library,
    weights_and_ids,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import (
        ExpertsConfig,
        ExpertWeights,
        LayerConfig,
        LayerOutput,
        LayerWeights,
    )

PIECE = 128
"""Tokens of a sequence at a time."""

# A layer has one router, without a bias, and no shared expert. Its loss is that of its gate, where
# it is asked for: it is taken per sequence, and the suite's layers have no length of a sequence.
LAYER: dict[str, tuple[Any, ...]] = {
    "balance": (None,),
    "shared": (False,),
    "shared_gate": (False,),
    "shared_scale": (1.0,),
    "router_bias": (False,),
    # The product is in the dtype of x.
    "router_dtype": (None,),
    # It knows no padding: a padded token takes part like any other.
    "padding_mask": (False, True),
}
# The gates' combine tensor is a product with float32 masks, which the layers then multiply with x:
# `expected m1 and m2 to have the same dtype` for anything narrower.
DTYPES = ("float32", "float64")


class Top2Layer(Target):
    """`MoE` with `Top2Gating` and `Experts` in mixture_of_experts/mixture_of_experts.py."""

    name = "lucidrains/top2_layer"
    distribution: ClassVar[str] = "mixture-of-experts"
    module: ClassVar[str] = "mixture_of_experts.mixture_of_experts"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        routing={**ROUTING, "top_k": (2,), "epsilon_mode": ("add",), "epsilon": (1e-9,)},
        # `Experts` is two products with an activation module between them, without biases.
        experts={
            "activation": ("silu", "gelu", "gelu_tanh", "relu"),
            "gated": (False,),
            "bias": (False,),
            "weight_on": ("output",),
        },
        layer=LAYER,
        gradients=("layer",),
        mixed_dtypes=False,
        rounding_points=("router_logits", "pre_activation", "activation", "expert_output"),
        logits_through="identity",
    )

    def __init__(self) -> None:
        found = library(self.name, self.distribution, self.module, "MoE", "Experts")
        self._library, type(self).version = found

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """The whole layer on x [N, L, H]."""
        import torch
        from moe_reference.config import LayerOutput
        from torch.func import functional_call

        if x.ndim != 3:
            raise Unsupported(f"{self.name}: x of {list(x.shape)}")
        refuse_layer(self, x, parameters, config)
        with kept_random_state():
            module = self._made(parameters.experts, config).train(training)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        top_k = config.routing.top_k

        def route(_: Any, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            routed = weights_and_ids(outputs[1], top_k)
            found.append(tuple(each.unflatten(0, inputs[0].shape[:2]) for each in routed))

        module.gate.register_forward_hook(route)
        state = self._state(parameters)
        pieces = [functional_call(module, state, (piece,))[0] for piece in x.split(PIECE, dim=1)]
        weights, ids = (torch.cat(each, dim=1).flatten(0, 1) for each in zip(*found, strict=True))
        return LayerOutput(output=torch.cat(pieces, dim=1), expert_ids=ids, weights=weights)

    def _made(self, experts: ExpertWeights, config: LayerConfig) -> Any:
        """The layer for these sizes."""
        num_experts, hidden, intermediate = experts.down.shape
        return self._library.MoE(
            hidden,
            num_experts=num_experts,
            hidden_dim=intermediate,
            activation=_activation(config.experts),
            second_policy_train="all",
            second_policy_eval="all",
            capacity_factor_train=num_experts,
            capacity_factor_eval=num_experts,
        )

    def _state(self, parameters: LayerWeights) -> dict[str, torch.Tensor]:
        """The layer's parameters by their names and in their layout."""
        return {
            "gate.w_gating": parameters.router.T,
            "experts.w1": parameters.experts.gate_up.transpose(1, 2),
            "experts.w2": parameters.experts.down.transpose(1, 2),
        }


class TopNLayer(Top2Layer):
    """`MoE` with `TopNGating`, `Experts` and `Expert` in st_moe_pytorch/st_moe_pytorch.py."""

    name = "lucidrains/topn_layer"
    distribution = "st-moe-pytorch"
    module = "st_moe_pytorch.st_moe_pytorch"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        routing={
            **ROUTING,
            "top_k": tuple(range(2, 17)),
            "epsilon_mode": ("clamp",),
            "epsilon": (1e-9,),
        },
        # `GEGLU`, between two linear layers with biases.
        experts={
            "activation": ("gelu",),
            "gated": (True,),
            "bias": (False, True),
            "weight_on": ("output",),
        },
        layer=LAYER,
        gradients=("layer",),
        mixed_dtypes=False,
        rounding_points=(
            "router_logits",
            "product",
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
        ),
        logits_through="identity",
    )

    def _made(self, experts: ExpertWeights, config: LayerConfig) -> Any:
        num_experts, hidden, intermediate = experts.down.shape
        # `dim_hidden = int(dim * hidden_mult * 2 / 3)`: half a row more, for its rounding.
        expert = partial(self._library.Expert, hidden, (intermediate + 0.5) * 1.5 / hidden)
        return self._library.MoE(
            hidden,
            num_experts=num_experts,
            gating_top_n=config.routing.top_k,
            threshold_train=0.0,
            threshold_eval=0.0,
            capacity_factor_train=float(num_experts),
            capacity_factor_eval=float(num_experts),
            straight_through_dispatch_tensor=False,
            experts=_list(expert() for _ in range(num_experts)),
        )

    def _state(self, parameters: LayerWeights) -> dict[str, torch.Tensor]:

        given = parameters.experts
        # `x, gate = chunk(2)`: up rows first.
        gate_up = _swap(given.gate_up)
        width = given.down.shape[2]
        if given.gate_up_bias is None:
            gate_up_bias = given.gate_up.new_zeros(given.gate_up.shape[:2])
        else:
            gate_up_bias = _swap(given.gate_up_bias)
        down_bias = given.down_bias
        if down_bias is None:
            down_bias = given.down.new_zeros(given.down.shape[:2])
        state = {"gate.to_gates.weight": parameters.router}
        for e in range(len(given.down)):
            state |= {
                f"experts.experts.{e}.net.0.weight": gate_up[e],
                f"experts.experts.{e}.net.0.bias": gate_up_bias[e],
                f"experts.experts.{e}.net.1.mult_bias": given.down.new_ones(width),
                f"experts.experts.{e}.net.2.weight": given.down[e],
                f"experts.experts.{e}.net.2.bias": down_bias[e],
            }
        return state


def _swap(gate_up: torch.Tensor) -> torch.Tensor:
    """Gate rows first to up rows first, or the other way round."""
    import torch

    return torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)


def _list(modules: Any) -> torch.nn.ModuleList:
    import torch

    return torch.nn.ModuleList(modules)


def _activation(config: ExpertsConfig) -> Any:
    """The module class of an activation."""
    from torch import nn

    return {
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, approximate="tanh"),
        "relu": nn.ReLU,
    }[config.activation]
