"""What the targets of torchtitan share: finding it, building its modules, refusing what it lacks.

Modules are built from the library's own `Config` classes on the meta device and called with the
suite's tensors in the place of their parameters, so that gradients reach the given weights.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Target
from moe_conformance.targets.adapter import installed

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

OLDEST = (0, 3)
INSTALL = (
    "pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro shtab docstring-parser "
    "typeguard einops torch_checkpointing torchdata"
)
MODULES = {
    "moe": "models.common.moe",
    "dispatchers": "models.common.token_dispatcher",
    "dense": "models.common",
    "linear": "models.common.linear",
    "gpt_oss": "models.gpt_oss.moe",
    "optimizer": "components.optimizer.optimizer",
    "utils": "distributed.utils",
}
NAMES = {
    "moe": ("GroupedExperts", "MoE", "RoutedExperts", "TokenChoiceTopKRouter"),
    "dispatchers": ("AllToAllTokenDispatcher", "LocalDispatchMetadata", "LocalTokenDispatcher"),
    "dense": ("FeedForward", "SigmoidGatedFeedForward"),
    "linear": ("Linear",),
    "gpt_oss": ("GptOssGroupedExperts", "GptOssMoE"),
    "optimizer": ("register_moe_load_balancing_hook",),
    "utils": ("set_spmd_backend",),
}
"""What is called, by the module that it stands in."""

# `Training.dtype` and `mixed_precision_param` in torchtitan/config/configs.py take these two.
DTYPES = ("float32", "bfloat16")

# `TokenChoiceTopKRouter.forward`: scores first; a group's score is the sum of its best two, masked
# with -inf; `+ 1e-20` in the denominator, for K = 1 as well; the scale always.
ROUTING: list[dict[str, tuple[Any, ...]]] = [
    {
        "score": ("softmax", "sigmoid"),
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


class TorchTitanTarget(Target):
    """What the targets have in common.

    Raises:
        ImportError: torchtitan is missing, too old, or has moved what is called.
    """

    version: ClassVar[str] = ""
    experts_class: ClassVar[str] = "GroupedExperts"

    def __init__(self) -> None:
        type(self).version = installed(self.name, OLDEST, INSTALL, "torchtitan")
        self._library: dict[str, ModuleType] = {}
        for key, path in MODULES.items():
            self._library[key] = importlib.import_module(f"torchtitan.{path}")
            for name in NAMES[key]:
                if not hasattr(self._library[key], name):
                    raise ImportError(
                        f"{self.name}: torchtitan {self.version} is not laid out as 0.3.0 was: "
                        f"torchtitan.{path} has no {name}"
                    )
        # Trainers do this with `parallelism.spmd_backend`. The default, "spmd_types", asks for a
        # mesh of all ranks of a training run; with this one the modules take plain tensors.
        self._library["utils"].set_spmd_backend("partial_dtensor")
        self._modules: dict[Any, torch.nn.Module] = {}

    def _class(self, where: str, name: str) -> Any:
        return getattr(self._library[where], name)

    def _linear(self, inputs: int, outputs: int, bias: bool = False) -> Any:
        return self._class("linear", "Linear").Config(
            in_features=inputs, out_features=outputs, bias=bias
        )

    def _router_config(
        self, config: RoutingConfig, num_experts: int, hidden: int, bias: bool = False
    ) -> Any:
        """The library's configuration of a router."""
        groups = config.num_groups if config.num_groups > 1 else None
        return self._class("moe", "TokenChoiceTopKRouter").Config(
            num_experts=num_experts,
            gate=self._linear(hidden, num_experts, bias),
            num_expert_groups=groups,
            num_limited_groups=groups and config.topk_groups,
            top_k=config.top_k,
            score_func=config.score,
            route_norm=config.renormalize,
            route_scale=config.scale,
        )

    def _routed_config(
        self,
        experts: ExpertWeights,
        config: ExpertsConfig,
        num_experts: int,
        top_k: int,
        dispatcher: str = "LocalTokenDispatcher",
    ) -> Any:
        """The library's configuration of routed experts: their weights are of this rank's."""
        local, hidden, intermediate = experts.down.shape
        where = "gpt_oss" if self.experts_class == "GptOssGroupedExperts" else "moe"
        more = {"swiglu_limit": float(config.limit)} if where == "gpt_oss" else {}
        return self._class("moe", "RoutedExperts").Config(
            inner_experts=self._class(where, self.experts_class).Config(
                dim=hidden, hidden_dim=intermediate, num_experts=local, **more
            ),
            token_dispatcher=self._class("dispatchers", dispatcher).Config(
                num_experts=num_experts, top_k=top_k
            ),
        )

    def _experts_parameters(self, experts: ExpertWeights) -> dict[str, torch.Tensor]:
        """The experts' parameters by their names and in their layout in the library.

        Parameters of a module are contiguous, whatever the tensors were that it was loaded from.
        """
        if self.experts_class == "GroupedExperts":
            gate, up = experts.gate_up.chunk(2, dim=1)
            given = {"w1_EFD": gate, "w3_EFD": up, "w2_EDF": experts.down}
        else:
            up_bias, down_bias = experts.gate_up_bias, experts.down_bias
            if up_bias is None:
                up_bias = experts.gate_up.new_zeros(experts.gate_up.shape[:2])
            if down_bias is None:
                down_bias = experts.down.new_zeros(experts.down.shape[:2])
            given = {
                "mlp1_weight_EGD": _interleave(experts.gate_up),
                "mlp1_bias_EG": _interleave(up_bias),
                "mlp2_weight_EDF": experts.down,
                "mlp2_bias_ED": down_bias,
            }
        return {f"inner_experts.{name}": value.contiguous() for name, value in given.items()}

    def _module(self, config: Any) -> Any:
        """The library's module for one configuration, made once."""
        key = repr(config)
        if key not in self._modules:
            self._modules[key] = self._built(config)
        return self._modules[key]

    def _built(self, config: Any) -> Any:
        """The library's module for one configuration, with no storage of its own."""
        import torch

        with torch.device("meta"):
            return config.build()


def call(module: torch.nn.Module, parameters: dict[str, torch.Tensor], *inputs: Any) -> Any:
    """The module's forward with other parameters and buffers."""
    from torch.func import functional_call

    return functional_call(module, parameters, inputs, strict=True)


def counts_of(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tokens of each expert, which the library's dispatchers take as an argument."""
    return expert_ids.flatten().bincount(minlength=num_experts)


def elsewhere(expert_ids: torch.Tensor, num_experts: int) -> bool:
    """Whether there are ids of no expert."""
    return bool(((expert_ids < 0) | (expert_ids >= num_experts)).any())


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
