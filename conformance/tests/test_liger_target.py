"""The adapter for Liger Kernel: what it translates, what conforms, and what it refuses."""

import importlib.metadata
import importlib.util

import pytest
import torch
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import Unsupported
from moe_conformance.targets.liger import Liger
from moe_reference.config import ExpertsConfig, ExpertWeights

# Looked for and not imported: that is left to the adapter, which has the kernels interpreted.
if not all(map(importlib.util.find_spec, ("triton", "liger_kernel"))):
    pytest.skip("needs liger_kernel and triton", allow_module_level=True)

BY_ID = {each.id: each for each in requirements()}
FEW = Effort(examples=1, minimum=1, shrinks=0)


@pytest.fixture(scope="module")
def target():
    return Liger()


def ask(target, name):
    executor = InlineExecutor(target)
    return run_requirement(BY_ID[name], inline_scope(executor), executor, FEW, seed=0)


@pytest.mark.parametrize("name", ["EXPERT-09", "EXPERT-11"])
def test_it_conforms(target, name):
    result = ask(target, name)
    assert result.status == "pass", result.message


def test_where_the_function_raises_everything_crashes(target, monkeypatch):
    def gone(*_):
        raise RuntimeError("gone")

    monkeypatch.setattr(target._function, "forward", gone)
    for name in ("EXPERT-01", "EXPERT-11", "BACKEND-01", "NUM-12"):
        assert ask(target, name).status == "crash"


def test_what_is_not_declared_is_refused(target):
    given = (
        torch.ones(1, 4),
        ExpertWeights(torch.ones(1, 4, 4), torch.ones(1, 4, 2)),
        torch.ones(1, 1),
        torch.zeros(1, 1, dtype=torch.int32),
    )
    with pytest.raises(Unsupported, match="only gated silu"):
        target.experts(*given, ExpertsConfig(activation="gelu"))
    with pytest.raises(Unsupported, match="no expert map"):
        target.experts(*given, ExpertsConfig(), torch.zeros(1, dtype=torch.int32))


def test_without_a_gpu_it_says_that_it_is_interpreted(target):
    interpreted = not torch.cuda.is_available()
    assert target.capabilities.interpreted == interpreted
    assert ("bfloat16" in target.capabilities.dtypes) != interpreted


@pytest.mark.parametrize("found", ["0.7.0", ""])
def test_another_version_gives_one_sentence(monkeypatch, found):
    def version(_):
        if not found:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError) as error:
        Liger()
    assert str(error.value) == (
        f"liger-kernel: expected version 0.8 or newer, found {found or 'none'}: "
        "pip install --no-deps liger-kernel"
    )


def test_a_function_that_has_moved_gives_one_sentence(monkeypatch):
    import liger_kernel.ops.fused_moe as module

    monkeypatch.delattr(module, "LigerFusedMoEFunction")
    with pytest.raises(ImportError, match=r"^liger-kernel: version 0\.\S+ is not laid out as 0\.8"):
        Liger()
