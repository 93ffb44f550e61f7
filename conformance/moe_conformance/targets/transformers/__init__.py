"""transformers under the suite: routers, experts, MoE blocks and the loss of eleven families.

`transformers/<family>-<backend>` puts the library's own classes under test: the family's router
and its whole block as they are, its experts through the backend that
`config._experts_implementation` names. Llama 4 has no such switch, and is `llama4-dense`. The
modules are built from small configurations on the meta device and called with the suite's tensors
in the place of their parameters (`torch.func.functional_call`), so nothing is downloaded and
gradients reach the given weights.

`transformers/expert_parallel-<backend>` is the library's expert parallelism (`parallel.py`).

`transformers/<family>-<field>` is the router alone, asked for what a field of the family's
configuration promises and the router does not do (`Declaration.documented`).

Tried with `pip install torch==2.13.0 transformers==5.23.0`.

Three translations are made, and no others; `dense.py` names two more:

- logits go in as hidden states through an identity weight, because the routers take hidden states;
- ids that mean *not here* become the library's own sentinel: the id `num_experts`, with weight 0,
  on an experts module marked as expert parallel
  (`AllReduceEP.__call__` in transformers/distributed/expert_parallel.py);
- routing weights come back in float32 (float64 for float64 logits), whatever their own dtype.

No module here imports torch or transformers before a target is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moe_conformance.target import Target
from moe_conformance.targets.adapter import installed
from moe_conformance.targets.transformers.base import TransformersTarget
from moe_conformance.targets.transformers.choices import ACTIVATIONS, BACKENDS, Choice
from moe_conformance.targets.transformers.deepseek_v2 import DeepseekV2
from moe_conformance.targets.transformers.deepseek_v3 import DeepseekV3, Glm4Moe
from moe_conformance.targets.transformers.deepseek_v4 import DeepseekV4
from moe_conformance.targets.transformers.gpt_oss import GptOss
from moe_conformance.targets.transformers.llama4 import Llama4
from moe_conformance.targets.transformers.minimax_m2 import MiniMaxM2
from moe_conformance.targets.transformers.mixtral import Mixtral
from moe_conformance.targets.transformers.parallel import ExpertParallel
from moe_conformance.targets.transformers.qwen import Olmoe, Qwen2Moe, Qwen3Moe

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FAMILIES",
    "OLDEST",
    "Choice",
    "DeepseekV2",
    "DeepseekV3",
    "DeepseekV4",
    "Glm4Moe",
    "GptOss",
    "Llama4",
    "MiniMaxM2",
    "Mixtral",
    "Olmoe",
    "Qwen2Moe",
    "Qwen3Moe",
    "TransformersTarget",
    "variants",
]

OLDEST = (5, 20)

FAMILIES: tuple[type[TransformersTarget], ...] = (
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    DeepseekV2,
    DeepseekV3,
    DeepseekV4,
    Glm4Moe,
    MiniMaxM2,
    Llama4,
    GptOss,
)


def variants() -> dict[str, Callable[[], Target]]:
    """The targets that this library has, by the name of the variant.

    A factory raises `ImportError` with one sentence where transformers is missing or too old.

    >>> list(variants())[:3]
    ['mixtral-eager', 'mixtral-batched_mm', 'mixtral-grouped_mm']
    """
    listed: tuple[type[TransformersTarget], ...] = (*FAMILIES, ExpertParallel)
    return {
        f"{family.title()}-{backend}": partial(_make, family, backend)
        for family in listed
        for backend in (*family.backends, *family.documented)
    }


def _make(family: type[TransformersTarget], backend: str) -> Target:
    name = f"transformers/{family.title()}-{backend}"
    install = "pip install 'moespec[transformers]'"
    declared: dict[str, Any] = {
        "__doc__": family.__doc__,
        "name": name,
        "version": installed(name, OLDEST, install, "transformers"),
        "backend": backend,
        "capabilities": family.declared(backend),
    }
    return type(f"{family.__name__}_{backend}", (family,), declared)()
