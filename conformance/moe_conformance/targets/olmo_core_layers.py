"""OLMo-core under the suite: its experts and its whole layers, dropless and with a capacity.

`Dropless` puts `DroplessMoE` under test, `Default` `MoE`, the default, whose buffers have room for
a fixed number of rows. Permuting and weighting are Triton kernels, which run in the interpreter
where there is no GPU; the products are the library's loop over experts where `grouped_gemm` is not
installed. How it is installed says `olmo_core`. The translations, and no others:

- the modules are called with the given tensors in the place of their parameters, which have one
  dimension for experts and rows together;
- experts are called with the counts that the library's own `batched_histc` makes of the ids;
- with a capacity the factor is E, so that every expert has room for all tokens;
- ids and weights are what the layer's router returned in this very forward, seen by a hook.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import (
    kept_random_state,
    refuse_experts,
    refuse_layer,
    refuse_tensor,
)
from moe_conformance.targets.interpreter import on_this_machine
from moe_conformance.targets.olmo_core import (
    ROUTING,
    library,
    routing_fields,
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

EXPERTS: dict[str, tuple[Any, ...]] = {
    # `MoEMLP` and `DroplessMoEMLP` are three matrices and a silu, in mlp.py.
    "activation": ("silu",),
    "gated": (True,),
    "bias": (False,),
    "weight_on": ("output",),
    "expert_map": (False,),
    # `batched_histc` counts by `scatter_add_` with the ids as they are.
    "invalid_ids": (False,),
}
LAYER: dict[str, tuple[Any, ...]] = {
    # The losses join the graph behind x (`attach_auxiliary_loss`) and are not returned.
    "balance": (None,),
    # A shared expert is averaged with the K others: shared / (K + 1) + routed · K / (K + 1).
    "shared": (False,),
    "shared_gate": (False,),
    "router_bias": (False,),
    # `F.linear(x.float(), weight.float())`.
    "router_dtype": ("float32",),
}


def _capabilities(**changed: Any) -> Capabilities:
    declared: dict[str, Any] = {
        "devices": ("cuda",),
        # Those of `olmo_core.config.DType` that a layer is made in.
        "dtypes": ("float32", "bfloat16", "float16"),
        # `scatter_add_` takes no other.
        "id_dtypes": ("int64",),
        "routing": ROUTING,
        "experts": EXPERTS,
        "layer": LAYER,
        "gradients": ("experts", "layer"),
        # `_padded_copy` and `_binned_copy` take x's rows to lie one behind the other, and nothing
        # asks whether they do: what comes of it shows `DroplessStrided`.
        "strides": False,
        # The products are those of two tensors of one dtype.
        "mixed_dtypes": False,
        # `torch.sort` of the ids is not told to be stable.
        "deterministic": False,
        # Every product, activation and weighting is a tensor of x's dtype; the sum over K is taken
        # at once.
        "rounding_points": (
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
            "weighted_output",
        ),
    }
    return on_this_machine(Capabilities(**(declared | changed)))


class Dropless(Target):
    """`DroplessMoE` in olmo_core/nn/moe/moe.py, its `ParallelDroplessMLP` and `DroplessMoEMLP`."""

    name = "olmo-core/dropless"
    kind: ClassVar[str] = "dropless"
    capabilities = _capabilities()

    def __init__(self) -> None:
        self._library, type(self).version = library(self.name)
        self._count = importlib.import_module("olmo_core.ops.moe").batched_histc

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's experts on x [T, H], called apart."""
        from torch.func import functional_call

        refuse_tensor(self, x)
        refuse_experts(self, experts, config, expert_map=expert_map is not None)
        self._refuse_width(x, experts)
        if x.ndim != 2 or weights.shape != expert_ids.shape or len(x) != len(expert_ids):
            # The library takes any number of dimensions and looks at their product.
            raise Unsupported(
                f"{self.name}: x of {list(x.shape)} with weights of {list(weights.shape)} and ids "
                f"of {list(expert_ids.shape)}"
            )
        module = self._made(experts, {"top_k": expert_ids.shape[1]}).experts
        counts = self._count(expert_ids, len(experts.down)).sum(dim=0)
        state = {f"mlp.{name}": value for name, value in self._state(experts).items()}
        return functional_call(module, state, (x, weights, expert_ids, counts))

    def layer(
        self,
        x: torch.Tensor,
        parameters: LayerWeights,
        config: LayerConfig,
        token_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        training: bool = False,
    ) -> LayerOutput:
        """The whole layer on x [N, L, H]. It knows no padding, so its counts are given without."""
        from moe_reference.config import LayerOutput
        from torch.func import functional_call

        refuse_layer(self, x, parameters, config)
        self._refuse_width(x, parameters.experts)
        options = routing_fields(config.routing, parameters.selection_bias)
        layer = self._made(parameters.experts, options).train(training)
        state = {
            f"experts.mlp.{name}": value for name, value in self._state(parameters.experts).items()
        }
        state["router.weight"] = parameters.router.flatten()
        if parameters.selection_bias is not None:
            state["router.score_bias"] = parameters.selection_bias.float()
        found: list[tuple[torch.Tensor, ...]] = []
        layer.router.register_forward_hook(lambda _, x, outputs: found.append(outputs))
        output = functional_call(layer, state, (x,))
        [(weights, ids, counts, _)] = found
        return LayerOutput(
            output=output,
            expert_ids=ids.flatten(0, 1),
            weights=weights.flatten(0, 1),
            tokens_per_expert=counts if padding_mask is None else None,
        )

    def _made(self, experts: ExpertWeights, router: dict[str, Any]) -> Any:
        """The layer for these sizes, without a loss."""
        num_experts, hidden, intermediate = experts.down.shape
        with kept_random_state():
            return self._library.MoEConfig(
                name=self._library.MoEType(self.kind),
                num_experts=num_experts,
                hidden_size=intermediate,
                router=self._library.MoERouterConfig(**router),
                lb_loss_weight=None,
                **self._options(num_experts),
            ).build(hidden, init_device="cpu")

    def _options(self, num_experts: int) -> dict[str, Any]:
        return {}

    def _state(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """The experts' parameters by their names and in their layout: all [E · I, H]."""
        gate, up = experts.gate_up.chunk(2, dim=1)
        return {
            "w1": gate.flatten(0, 1),
            "w3": up.flatten(0, 1),
            "w2": experts.down.transpose(1, 2).flatten(0, 1),
        }

    def _refuse_width(self, x: torch.Tensor, experts: ExpertWeights) -> None:
        if x.shape[-1:] != experts.down.shape[1:2]:
            raise Unsupported(f"{self.name}: x of {list(x.shape)} for H = {experts.down.shape[1]}")


class DroplessStrided(Dropless):
    """The same, with x at other strides: the experts take it, and read something else."""

    name = "olmo-core/dropless_strided"
    capabilities = _capabilities(strides=True)


class Default(Dropless):
    """`MoE` in olmo_core/nn/moe/moe.py, its `ParallelMLP` and `MoEMLP`."""

    name = "olmo-core/default"
    kind = "default"

    def _options(self, num_experts: int) -> dict[str, Any]:
        return {"capacity_factor": float(num_experts)}

    def _state(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """All transposed: [E · H, I] and [E · I, H]."""
        gate, up = experts.gate_up.transpose(1, 2).chunk(2, dim=2)
        return {
            "w1": gate.flatten(0, 1),
            "w3": up.flatten(0, 1),
            "w2": experts.down.transpose(1, 2).flatten(0, 1),
        }
