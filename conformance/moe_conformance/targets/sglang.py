"""SGLang's functions in plain torch under the suite: three routers and two ways through experts.

- `Sglang`: `fused_topk_torch_native` and `fused_moe_forward_native`.
- `SglangGrouped`: `grouped_topk_gpu` and `moe_forward_native`.
- `SglangBiasedGrouped`: `biased_grouped_topk_impl`.

They are what SGLang runs where no kernel is taken (`--enable-torch-compile`, a CPU, a test), and
what its kernels are checked against. `sglang_source` reads them from the installed distribution;
the package itself is not imported.

Tried: `pip install --no-deps sglang==0.5.23` (12 s, 130 MB).

Four translations are made, and no others: the scale goes in as a factor that is applied to the
routing weights; those of `fused_topk_torch_native` come back in float32; they go into
`moe_forward_native` in float32, as its own routers give them, since it multiplies in their dtype;
for swigluoai gate and up rows alternate.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets import sglang_source

if TYPE_CHECKING:
    from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig

DTYPES = ("float32", "bfloat16", "float16")

_RENORMALIZE = (
    {"renormalize": (False,)},
    {
        "renormalize": (True,),
        # `renormalize` does not ask for K.
        "renormalize_single": (True,),
        "norm": ("sum",),
        # `_RENORMALIZE_SUM_EPSILON`.
        "epsilon": (1e-20,),
        "epsilon_mode": ("add",),
    },
)

_EXPERTS: dict[str, tuple[Any, ...]] = {
    "gated": (True,),
    "weight_on": ("output",),
    # Ids index the weights. A row of padding has ids of -1, and nobody reads its result.
    "expert_map": (False,),
    "invalid_ids": (False,),
}


class SglangTarget(Target):
    """What the three have in common.

    Raises:
        ImportError: SGLang is missing, too old, or has moved a function.
    """

    router: ClassVar[str]
    native: ClassVar[str] = ""

    def __init__(self) -> None:
        type(self).version = sglang_source.version(self.name)
        (self._router,) = sglang_source.routers(self.router)
        self._native: Callable[..., Any] | None = None
        if self.native:
            self._native = sglang_source.native(self.native)

    def _refuse(self, sentence: str) -> Unsupported:
        return Unsupported(f"{self.name}: {sentence}")

    def _check_experts(
        self, config: ExpertsConfig, activations: dict[str, str], expert_map: torch.Tensor | None
    ) -> None:
        if config.activation not in activations or not config.gated:
            raise self._refuse(f"no {config.activation} with gated = {config.gated}")
        if config.weight_on != "output" or expert_map is not None:
            raise self._refuse("no weight on the input and no expert map")


class Sglang(SglangTarget):
    """`fused_topk_torch_native`, `fused_moe_forward_native`."""

    name = "sglang/native"
    router = "fused_topk_torch_native"
    native = "fused_moe_forward_native"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        routing=[
            {
                "score": ("softmax", "sigmoid", "sqrtsoftplus"),
                "order": ("score_then_topk",),
                # Neither groups nor a scale are among its arguments.
                "num_groups": (1,),
                "scale": (1.0,),
                "selection_bias": (False, True),
                "hash_table": (False,),
                **renormalize,
            }
            for renormalize in _RENORMALIZE
        ],
        experts={
            **_EXPERTS,
            "activation": ("silu", "gelu"),
            # It looks for none.
            "bias": (False,),
        },
        # `torch.einsum` takes one dtype.
        mixed_dtypes=False,
        rounding_points=(
            # With a bias, scores are taken in the logits' dtype.
            "router_scores",
            # Tensors of x's dtype; `topk_weights.to(expert_outs.dtype)`.
            "pre_activation",
            "gate_activation",
            "activation",
            "expert_output",
            "weighted_output",
        ),
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fused_topk_torch_native`; of the hidden states it reads the number of rows."""
        if config.num_groups > 1 or config.scale != 1 or config.hash_table is not None:
            raise self._refuse("no groups, scale or table")
        weights, expert_ids = self._router(
            logits, logits, config.top_k, config.renormalize, bias, config.score
        )
        return weights.float(), expert_ids

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`fused_moe_forward_native`."""
        self._check_experts(config, {"silu": "silu", "gelu": "gelu"}, expert_map)
        if experts.gate_up_bias is not None or experts.down_bias is not None:
            raise self._refuse("no biases")
        layer = SimpleNamespace(
            w13_weight=experts.gate_up,
            w2_weight=experts.down,
            moe_runner_config=_runner(activation=config.activation),
        )
        given = SimpleNamespace(hidden_states=x, topk_output=(weights, expert_ids, None))
        assert self._native is not None
        out: torch.Tensor = self._native(layer, given).hidden_states
        return out


class SglangGrouped(SglangTarget):
    """`grouped_topk_gpu`, `moe_forward_native`."""

    name = "sglang/grouped"
    router = "grouped_topk_gpu"
    native = "moe_forward_native"
    # `GeluAndMul` is made with its default, tanh.
    activations: ClassVar[dict[str, str]] = {
        "silu": "silu",
        "gelu_tanh": "gelu",
        "swigluoai": "silu",
    }
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        routing=[
            {
                "score": ("softmax", "sigmoid"),
                "order": ("score_then_topk",),
                "group_score": ("max",),
                "mask_fill": ("zero",),
                "scale_when": ("always",),
                "selection_bias": (False,),
                "hash_table": (False,),
                **renormalize,
            }
            for renormalize in _RENORMALIZE
        ],
        experts={**_EXPERTS, "activation": tuple(activations), "bias": (False, True)},
        mixed_dtypes=False,
        rounding_points=(
            # Scores and weights are tensors of the logits' dtype.
            "router_scores",
            # Tensors of x's dtype; a product is rounded before its bias is added, and swigluoai is
            # written step by step.
            "product",
            "pre_activation",
            "gate_activation",
            "activation_steps",
            "activation",
            "expert_output",
        ),
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`grouped_topk_gpu`; of the hidden states it reads the number of rows."""
        if bias is not None or config.hash_table is not None:
            raise self._refuse("no selection bias and no table")
        answer: tuple[torch.Tensor, torch.Tensor] = self._router(
            logits, logits, scoring_func=config.score, **_grouped(config)
        )
        return answer

    def experts(
        self,
        x: torch.Tensor,
        experts: ExpertWeights,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`moe_forward_native`."""
        self._check_experts(config, self.activations, expert_map)
        clamped = config.activation == "swigluoai"
        order = _interleave if clamped else lambda rows: rows
        layer = SimpleNamespace(
            num_experts=len(experts.down),
            w13_weight=order(experts.gate_up),
            w2_weight=experts.down,
            w13_weight_bias=_or_none(experts.gate_up_bias, order),
            w2_weight_bias=experts.down_bias,
        )
        runner = _runner(
            activation=self.activations[config.activation],
            gemm1_alpha=config.alpha if clamped else None,
            gemm1_clamp_limit=config.limit if clamped else None,
        )
        assert self._native is not None
        out: torch.Tensor = self._native(layer, x, (weights.float(), expert_ids, None), runner)
        return out


class SglangBiasedGrouped(SglangTarget):
    """`biased_grouped_topk_impl`."""

    name = "sglang/biased-grouped"
    router = "biased_grouped_topk_impl"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        dtypes=DTYPES,
        routing=[
            {
                "score": ("sigmoid",),
                "order": ("score_then_topk",),
                "group_score": ("top2_sum",),
                "mask_fill": ("-inf",),
                "scale_when": ("always",),
                # The bias is added without asking for it.
                "selection_bias": (True,),
                "hash_table": (False,),
                **renormalize,
            }
            for renormalize in _RENORMALIZE
        ],
        # `.topk(2)` of each group, with one group, too.
        min_experts=2,
        # Scores and weights are tensors of the logits' dtype.
        rounding_points=("router_scores",),
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`biased_grouped_topk_impl`; of the hidden states it reads the number of rows."""
        if bias is None or config.hash_table is not None:
            raise self._refuse("always a selection bias, never a table")
        answer: tuple[torch.Tensor, torch.Tensor] = self._router(
            logits, logits, bias, **_grouped(config)
        )
        return answer


def _grouped(config: RoutingConfig) -> dict[str, Any]:
    return {
        "topk": config.top_k,
        "renormalize": config.renormalize,
        "num_expert_group": config.num_groups,
        "topk_group": config.topk_groups,
        "routed_scaling_factor": config.scale,
        "apply_routed_scaling_factor_on_output": True,
    }


def _runner(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(apply_router_weight_on_input=False, **fields)


def _or_none(
    tensor: torch.Tensor | None, order: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    return None if tensor is None else order(tensor)


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def variants() -> dict[str, type[Target]]:
    """The targets of this library, by the name of the variant.

    >>> list(variants())
    ['native', 'grouped', 'biased-grouped']
    """
    listed = (Sglang, SglangGrouped, SglangBiasedGrouped)
    return {each.name.split("/")[1]: each for each in listed}
