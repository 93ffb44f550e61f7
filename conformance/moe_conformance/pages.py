"""The pages of a report: templates, tables of numbers, and links to where things are told.

Everything is rendered from the content of `report.json` alone. What came from a target is text that
nobody has vetted: all of it is escaped, and the pages' policy runs no script but their own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moe_conformance.judge import FAIL_Z, PASS_Z

FAILING = ("fail", "crash", "timeout")
NOT_RUN = ("unsupported", "not_provided")

SIGNS = {
    "pass": "✓",
    "fail": "✗",
    "crash": "!",
    "timeout": "…",
    "marginal": "≈",
    "inconclusive": "?",
    "warn": "△",
    "observed": "•",
    "unsupported": "-",
    "not_provided": "○",
    "waived": "~",
    "conforms": "✓",
    "conforms_with_waivers": "~",
    "fails": "✗",
}
"""A sign beside each word, so that nothing hangs on a colour."""

PROJECTS = {
    "afd-plugin": "vllm-project/afd-plugin",
    "aiter": "ROCm/aiter",
    "aprender": "paiml/aprender",
    "atom": "ROCm/ATOM",
    "autogptq": "AutoGPTQ/AutoGPTQ",
    "automodel": "NVIDIA-NeMo/Automodel",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "cosmos-rl": "nvidia-cosmos/cosmos-rl",
    "davidmrau": "davidmrau/mixture-of-experts",
    "deepep": "deepseek-ai/DeepEP",
    "deepseek-moe": "deepseek-ai/DeepSeek-MoE",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "deepspeed": "deepspeedai/DeepSpeed",
    "fast-llm": "ServiceNow/Fast-LLM",
    "fastmoe": "laekov/fastmoe",
    "flaggems": "flagos-ai/FlagGems",
    "flashinfer": "flashinfer-ai/flashinfer",
    "freetoken": "FlashML-org/FreeToken",
    "gptqmodel": "ModelCloud/GPTQModel",
    "hyper-parallel": "mindspore-ai/hyper-parallel",
    "imp": "kekzl/imp",
    "intel-xpu-backend-for-triton": "intel/intel-xpu-backend-for-triton",
    "ktransformers": "kvcache-ai/ktransformers",
    "llama.cpp": "ggml-org/llama.cpp",
    "llm-compressor": "vllm-project/llm-compressor",
    "lmdeploy": "InternLM/lmdeploy",
    "megablocks": "databricks/megablocks",
    "megatron": "NVIDIA/Megatron-LM",
    "megatron-bridge": "NVIDIA-NeMo/Megatron-Bridge",
    "megatron-lm": "NVIDIA/Megatron-LM",
    "minimind": "jingyaogong/minimind",
    "mlx-lm": "ml-explore/mlx-lm",
    "mlx-swift-lm": "ml-explore/mlx-swift-lm",
    "mlxcel": "lablup/mlxcel",
    "moe-infinity": "EfficientMoE/MoE-Infinity",
    "ms-swift": "modelscope/ms-swift",
    "nntrainer": "nnstreamer/nntrainer",
    "onnxruntime": "microsoft/onnxruntime",
    "paddleformers": "PaddlePaddle/PaddleFormers",
    "pai-megatron": "alibaba/Pai-Megatron-Patch",
    "prime-rl": "PrimeIntellect-ai/prime-rl",
    "pytorch": "pytorch/pytorch",
    "sgl-jax": "sgl-project/sglang-jax",
    "sgl-kernel-npu": "sgl-project/sgl-kernel-npu",
    "sglang": "sgl-project/sglang",
    "slime": "THUDM/slime",
    "sonic-moe": "Dao-AILab/sonic-moe",
    "te": "NVIDIA/TransformerEngine",
    "tensorrt-llm": "NVIDIA/TensorRT-LLM",
    "torchtitan": "pytorch/torchtitan",
    "tpu-inference": "vllm-project/tpu-inference",
    "transformers": "huggingface/transformers",
    "triton": "triton-lang/triton",
    "trl": "huggingface/trl",
    "unsloth": "unslothai/unsloth",
    "verl": "verl-project/verl",
    "verl-ascend-recipe": "verl-project/verl-ascend-recipe",
    "vllm": "vllm-project/vllm",
    "vllm-ascend": "vllm-project/vllm-ascend",
    "vllm-metax": "MetaX-MACA/vLLM-metax",
    "xtuner": "InternLM/xtuner",
}
"""Where a project's threads are, by the name that sources use."""

_LINKED = re.compile(
    r"(?P<url>https://[^\s<>\"')]+)"
    r"|arXiv[ :](?P<arxiv>\d{4}\.\d{4,5})"
    r"|(?P<repository>[\w.-]+/[\w.-]+)#(?P<thread>\d+)"
    r"|(?P<project>[A-Za-z][\w.-]*) #(?P<number>\d+)"
    r"|(?<=[,/] )#(?P<next>\d+)"
)


def page(template: str, **content: Any) -> str:
    """The page that a template makes of `content`; whatever it needs is in the text itself."""
    text: str = _environment().get_template(template).render(**content)
    return text


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_conformance"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    folder = resources.files("moe_conformance") / "templates"
    script = (folder / "script.js").read_text(encoding="utf-8")
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup((folder / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{hashed}",
        "signs": SIGNS,
        "failing": FAILING,
        "not_run": NOT_RUN,
        "pass_z": PASS_Z,
        "fail_z": FAIL_Z,
        "comparison": _comparison,
        "grid": _grid,
        "replay": replay,
    }
    environment.filters |= {
        "words": words,
        "links": source_links,
        "brief_value": _brief_value,
        "by_concept": _by_concept,
        "library": _library,
    }
    return environment


def source_links(source: str) -> list[tuple[str, str | None]]:
    """A source cut into pieces of text, each with its address where it is a thread or a paper.

    >>> source_links("vLLM #12002, found late")
    [('vLLM #12002', 'https://github.com/vllm-project/vllm/issues/12002'), (', found late', None)]
    """
    pieces: list[tuple[str, str | None]] = []
    end, repository = 0, None
    for match in _LINKED.finditer(source):
        found = match.groupdict()
        address = None
        if found["url"]:
            address = found["url"].rstrip(".,;")
        elif found["arxiv"]:
            address = f"https://arxiv.org/abs/{found['arxiv']}"
        elif found["repository"]:
            repository = found["repository"]
        elif found["project"]:
            repository = PROJECTS.get(found["project"].lower())
        number = found["thread"] or found["number"] or found["next"]
        if number and repository:
            address = f"https://github.com/{repository}/issues/{number}"
        if address is None:
            continue
        stop = match.start() + len(address) if found["url"] else match.end()
        if match.start() > end:
            pieces.append((source[end : match.start()], None))
        pieces.append((source[match.start() : stop], address))
        end = stop
    if end < len(source):
        pieces.append((source[end:], None))
    return pieces


def replay(counterexample: str, directory: Path | None = None) -> str:
    """The command that runs a saved case again, from where `directory` is relative to."""
    path = counterexample if directory is None else (directory / counterexample).as_posix()
    return f"moespec replay {shlex.quote(path)}"


def words(name: str) -> str:
    """A status, verdict or field as one reads it."""
    return name.replace("_", " ")


def _library(target: str) -> str:
    """What the variants of a target have in common: the name before the first slash."""
    return target.split("/")[0]


def _by_concept(entries: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """In the order in which the concepts come up."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["concept"], []).append(entry)
    return list(groups.items())


def _brief_value(value: Any, missing: str = "none") -> str:
    """A value of the declaration or of a plan as text; `missing` is what None means there."""
    if isinstance(value, Mapping):
        told = (f"{name}: {_brief_value(item, missing)}" for name, item in value.items())
        return "; ".join(told) or "any"
    if isinstance(value, list):
        return (" or " if any(isinstance(each, Mapping) for each in value) else ", ").join(
            _brief_value(each, missing) for each in value
        ) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return missing if value is None else str(value)


def _grid(preview: dict[str, Any], shades: list[list[int]] | None = None) -> dict[str, Any]:
    """A preview as a table: column numbers, and rows of a label and cells."""
    seen = [len(preview["rows"]), len(preview["columns"])]
    shape = preview["shape"]
    folded = [math.prod(shape[:-1]), shape[-1] if shape else 1]
    return {
        "title": preview["name"],
        "form": f"{preview['dtype']} {shape}",
        "part": seen != folded,
        "columns": preview["columns"],
        "rows": [
            {
                "label": ", ".join(map(str, label)),
                "cells": [
                    {
                        "text": _short(value),
                        "full": str(value),
                        "shade": shades[i][j] if shades else 0,
                    }
                    for j, value in enumerate(values)
                ],
            }
            for i, (label, values) in enumerate(
                zip(preview["rows"], preview["values"], strict=True)
            )
        ],
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).removesuffix(".0")


def _comparison(failure: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected and what came as tables, with a third of their difference for floats.

    Cells are shaded from 0 (as expected) to 4 (near the greatest difference).
    """
    expected, actual = failure["expected"], failure["actual"]
    tensors = [each for each in (expected, actual) if each is not None and "values" in each]
    alike = len(tensors) == 2 and expected["shape"] == actual["shape"]
    if not alike:
        return [_grid(each) for each in tensors]
    pairs = [
        list(zip(wanted, came, strict=True))
        for wanted, came in zip(expected["values"], actual["values"], strict=True)
    ]
    errors = [[_error(wanted, came) for wanted, came in row] for row in pairs]
    finite = [e for row in errors for e in row if math.isfinite(e)]
    floats = "float" in expected["dtype"]
    most = max(finite, default=0.0)
    shades = [[_shade(error, most, floats) for error in row] for row in errors]
    grids = [_grid(expected), _grid(actual, shades)]
    if floats:
        difference = [[_difference(wanted, came) for wanted, came in row] for row in pairs]
        shown = {**actual, "name": "difference", "dtype": "actual - expected", "values": difference}
        grids.append({**_grid(shown, shades), "form": "actual - expected"})
    return grids


def _difference(expected: Any, actual: Any) -> Any:
    if isinstance(expected, str) or isinstance(actual, str):
        return "same" if expected == actual else "differs"
    return actual - expected


def _error(expected: Any, actual: Any) -> float:
    if isinstance(expected, str) or isinstance(actual, str):
        return 0.0 if expected == actual else math.inf
    return float(abs(actual - expected))


def _shade(error: float, most: float, graded: bool) -> int:
    if error == 0 or (graded and error <= most / 1000):
        return 0
    if not graded or not math.isfinite(error) or error > most / 2:
        return 4
    return 3 if error > most / 10 else 2 if error > most / 100 else 1
