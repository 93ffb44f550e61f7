"""Functions of SGLang, compiled from the files of its installed distribution.

Importing `sglang.srt` takes CUDA libraries, a running configuration and dozens of packages. The
functions that are written in torch need none of it: their source is read, and what is asked for is
compiled as it stands, without its decorators (`torch.compile`).
"""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from moe_conformance.targets.adapter import installed

OLDEST = (0, 5)
TOPK = "sglang/srt/layers/moe/topk.py"
NATIVE = "sglang/srt/layers/moe/fused_moe_native.py"
ACTIVATION = "sglang/srt/layers/activation.py"
TRITON = "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe.py"


def version(target: str) -> str:
    """The installed version.

    Raises:
        ImportError: there is none, or it is too old.
    """
    return installed(target, OLDEST, "pip install --no-deps sglang==0.5.23", "sglang")


def functions(file: str, *names: str, **known: Any) -> list[Callable[..., Any]]:
    """Module-level functions of a file, or methods as `Class.method`.

    Args:
        file: its path in the distribution.
        *names: what is wanted.
        **known: what the functions refer to outside of themselves.

    Raises:
        ImportError: the file or a name is not there.
    """
    module = _parsed(file)
    body: list[ast.stmt] = []
    for name in names:
        found: Any = module
        for part in name.split("."):
            inside = {each.name: each for each in found.body if hasattr(each, "name")}
            if part not in inside:
                raise ImportError(f"sglang: expected '{name}' in {file}, found none")
            found = inside[part]
        found.decorator_list = []
        found.name = name.replace(".", "_")
        body.append(found)
    # Annotations name types that are not imported.
    body.insert(0, ast.parse("from __future__ import annotations").body[0])
    namespace: dict[str, Any] = dict(known)
    exec(compile(ast.Module(body, []), file, "exec"), namespace)
    return [namespace[name.replace(".", "_")] for name in names]


def constant(file: str, name: str) -> Any:
    """A module-level constant that is written out as a number.

    Raises:
        ImportError: it is not there.
    """
    for statement in _parsed(file).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise ImportError(f"sglang: expected '{name}' in {file}, found none")


def routers(*names: str) -> list[Callable[..., Any]]:
    """Functions of topk.py."""
    import torch

    epsilon = "_RENORMALIZE_SUM_EPSILON"
    return functions(
        TOPK,
        *names,
        torch=torch,
        F=torch.nn.functional,
        **{epsilon: constant(TOPK, epsilon)},
    )


def native(name: str) -> Callable[..., Any]:
    """A function of fused_moe_native.py, with the activations that it calls."""
    import torch

    known: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    silu, gelu = functions(
        ACTIVATION, "SiluAndMul.forward_native", "GeluAndMul.forward_native", **known
    )
    (swiglu,) = functions(TRITON, "swiglu_gpt_oss_sigmoid_alpha", **known)
    # `GeluAndMul` is made without arguments, which leaves it its default.
    (initialise,) = functions(ACTIVATION, "GeluAndMul.__init__", super=lambda: _Nothing())
    made = SimpleNamespace()
    initialise(made)
    (function,) = functions(
        NATIVE,
        name,
        SiluAndMul=lambda: partial(silu, None),
        GeluAndMul=lambda: partial(gelu, made),
        swiglu_gpt_oss_sigmoid_alpha=swiglu,
        StandardCombineInput=SimpleNamespace,
        **known,
    )
    return function


def _parsed(file: str) -> ast.Module:
    path = importlib.metadata.distribution("sglang").locate_file(file)
    try:
        with open(str(path), encoding="utf-8") as opened:
            return ast.parse(opened.read())
    except FileNotFoundError:
        raise ImportError(f"sglang: expected a file {file}, found none") from None


class _Nothing:
    """A base class whose constructor does nothing."""
