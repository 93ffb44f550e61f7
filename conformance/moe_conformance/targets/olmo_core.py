"""OLMo-core under the suite: its router with the losses and the bias update, without its experts.

`Router` puts `MoELinearRouter` under test; the experts and layers stand in `olmo_core_layers`.
Installed, beside torch 2.13.0 and triton 3.9.0 in an environment of its own, by

    pip install ai2-olmo-core==3.0.0

which has rich below 14, filelock below 4 and huggingface-hub below 2, all inside the bounds of
moespec. Three translations are made, and no others:

- logits go in as hidden states [N, L, E] through an identity weight;
- the losses are what the router returns beside its choice: it is set to training, and gradients are
  switched on, since it computes none otherwise;
- counts come in float32, as the router gathers them, and the new bias out of its buffer; a rate
  of 0 is no `bias_gamma`, which has to be above 0.

Neither torch nor OLMo-core is imported before a target is made.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_conformance.target import Capabilities, Target, Unsupported
from moe_conformance.targets.adapter import (
    field_values,
    installed,
    kept_random_state,
    refuse,
    refuse_routing,
)

if TYPE_CHECKING:
    import torch
    from moe_reference.config import BalanceConfig, RoutingConfig

OLDEST = (3, 0)

CLASSES = (
    "MoEConfig",
    "MoELinearRouter",
    "MoELoadBalancingLossGranularity",
    "MoERouterConfig",
    "MoEType",
)

ROUTING: dict[str, tuple[Any, ...]] = {
    # Its sigmoid is `sigmoid(logits) + 1e-7`, which the specification has no name for, and
    # `topk_softmax` is a value of its enumeration that raises NotImplementedError.
    "score": ("softmax",),
    "order": ("score_then_topk",),
    # `normalize_expert_weights` is the p of a norm without an epsilon, for K = 1 as well.
    "renormalize": (False, True),
    "renormalize_single": (True,),
    "norm": ("sum", "l2"),
    "epsilon": (0.0,),
    # No scale, groups or table; a selection bias where there is a `bias_gamma`.
    "scale": (1.0,),
    "num_groups": (1,),
    "selection_bias": (False, True),
    "hash_table": (False,),
}


class Router(Target):
    """`MoELinearRouter` in olmo_core/nn/moe/router.py, and what it calls in loss.py."""

    name = "olmo-core/router"
    capabilities = Capabilities(
        devices=("cpu", "cuda"),
        # Those of `olmo_core.config.DType` that a router is made in.
        dtypes=("float32", "bfloat16", "float16"),
        routing=ROUTING,
        # `granularity` local_batch and instance. The router selects again from the logits; it takes
        # neither a mask of padding nor counts of other ranks.
        balance={
            "loss": ("switch", "deepseek_expert", "deepseek_sequence"),
            "score": ("softmax",),
            "ids": ("chosen",),
            "invalid_ids": (False,),
            "padding_mask": (False,),
            "tokens_per_expert": (False,),
            # `post_batch` adds the sign of what is missing to the mean, and no more.
            "centred": (False,),
        },
        gradients=("route", "balance_loss", "z_loss"),
        logits_through="identity",
    )

    def __init__(self) -> None:
        self._library, type(self).version = library(self.name)

    def route(
        self,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router on logits [T, E], as one sequence."""
        refuse_routing(self, config, bias)
        self._check_matrix(logits)
        router = self._router(logits.shape[1], **routing_fields(config, bias)).eval()
        weights, ids, *_ = self._call(router, logits[None], bias)
        return weights[0], ids[0]

    def balance_loss(
        self,
        logits: torch.Tensor,
        expert_ids: torch.Tensor,
        config: BalanceConfig,
        padding_mask: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The router's load-balancing loss; it selects the experts again itself."""
        flags = {
            "padding_mask": padding_mask is not None,
            "tokens_per_expert": tokens_per_expert is not None,
        }
        refuse(self, "balance", field_values(config) | flags)
        self._check_matrix(logits)
        # The loss has no use for the ids, so nothing else would notice.
        if expert_ids.shape[:-1] != logits.shape[:1] or expert_ids.is_floating_point():
            raise Unsupported(f"{self.name}: {expert_ids.dtype} ids of {list(expert_ids.shape)}")
        granularity, sequences = "local_batch", logits[None]
        if config.loss == "deepseek_sequence":
            length = config.sequence_length
            if length is None or len(logits) % length:
                raise ValueError(
                    f"sequence_length: expected a divisor of T = {len(logits)}, got {length}"
                )
            granularity = "instance"
            sequences = logits.reshape(-1, length, logits.shape[1])
        router = self._router(
            logits.shape[1],
            top_k=expert_ids.shape[1],
            lb_loss_weight=config.coefficient,
            lb_loss_granularity=self._library.MoELoadBalancingLossGranularity(granularity),
        )
        return self._loss(router, sequences)

    def z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The router's z-loss on logits [T, E]."""
        refuse(self, "balance", {"padding_mask": padding_mask is not None})
        self._check_matrix(logits)
        router = self._router(logits.shape[1], top_k=1, z_loss_weight=1.0)
        return self._loss(router, logits[None])

    def update_bias(
        self, bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, centred: bool
    ) -> torch.Tensor:
        """`post_batch` of the router with these counts."""
        import torch

        refuse(self, "balance", {"centred": centred})
        # They are turned into float32 here, so nothing else would notice.
        counts, wrong = tokens_per_expert, not bias.is_floating_point()
        if bias.ndim != 1 or counts.shape != bias.shape or counts.dtype is torch.bool or wrong:
            raise Unsupported(
                f"{self.name}: a bias of {bias.dtype} {list(bias.shape)} with counts of "
                f"{counts.dtype} {list(counts.shape)}"
            )
        router = self._router(len(bias), top_k=1, bias_gamma=rate or None).train()
        router.score_bias = bias.to(torch.float32, copy=True)
        router.score_bias_batch_size_per_expert = counts.to(torch.float32, copy=True)
        router.post_batch()
        return router.score_bias

    def _router(self, num_experts: int, **options: Any) -> Any:
        with kept_random_state():
            return self._library.MoELinearRouter(
                d_model=num_experts, num_experts=num_experts, **options
            )

    def _call(self, router: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """The router on hidden states [N, L, E] with an identity weight in the place of its own."""
        from torch.func import functional_call

        identity = x.new_zeros(x.shape[-1], x.shape[-1]).fill_diagonal_(1)
        state = {"weight": identity.flatten()}
        if bias is not None:
            state["score_bias"] = bias.float()
        return functional_call(router, state, (x,))

    def _loss(self, router: Any, x: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.enable_grad():
            return self._call(router.train(), x)[3]

    def _check_matrix(self, logits: torch.Tensor) -> None:
        dtype = str(logits.dtype).removeprefix("torch.")
        if logits.ndim != 2 or dtype not in self.capabilities.dtypes:
            raise Unsupported(f"{self.name}: {dtype} logits of {list(logits.shape)}")


def variants() -> dict[str, Callable[[], Target]]:
    """The targets by the name of the variant.

    >>> list(variants())
    ['router', 'dropless', 'default', 'dropless_strided']
    """

    def layer(name: str) -> Target:
        layers = importlib.import_module("moe_conformance.targets.olmo_core_layers")
        made: Target = getattr(layers, name)()
        return made

    return {
        "router": Router,
        "dropless": partial(layer, "Dropless"),
        "default": partial(layer, "Default"),
        "dropless_strided": partial(layer, "DroplessStrided"),
    }


def library(name: str) -> tuple[Any, str]:
    """`olmo_core.nn.moe` and the version.

    It imports its kernels with everything else, so the interpreter is switched on for all of it.

    Raises:
        ImportError: it or Triton is missing, too old, or has moved something.
    """
    install = "pip install ai2-olmo-core==3.0.0"
    found = installed(name, OLDEST, install, "ai2-olmo-core")
    try:
        importlib.import_module("moe_conformance.targets.interpreter").interpret_without_gpu(
            "olmo_core.kernels"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moe = importlib.import_module("olmo_core.nn.moe")
    except ImportError as error:
        raise ImportError(f"{name}: ai2-olmo-core {found} cannot be imported: {error}") from None
    for missing in (each for each in CLASSES if not hasattr(moe, each)):
        raise ImportError(f"{name}: ai2-olmo-core {found} has no olmo_core.nn.moe.{missing}")
    return moe, found


def routing_fields(config: RoutingConfig, bias: torch.Tensor | None) -> dict[str, Any]:
    """The options of a router for a routing."""
    options: dict[str, Any] = {"top_k": config.top_k}
    if config.renormalize:
        options["normalize_expert_weights"] = {"sum": 1.0, "l2": 2.0}[config.norm]
    if bias is not None:
        # How far a step moves it; to route, it matters only that there is one.
        options["bias_gamma"] = 1.0
    return options
