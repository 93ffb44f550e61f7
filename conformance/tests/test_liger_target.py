"""The adapter for Liger Kernel: what it translates, what conforms, and what it refuses."""

import importlib.util

import pytest
import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets.liger import Liger
from moe_reference.config import ExpertsConfig, ExpertWeights

# Looked for and not imported: that is left to the adapter, which has the kernels interpreted.
if not all(map(importlib.util.find_spec, ("triton", "liger_kernel"))):
    pytest.skip("needs liger_kernel and triton", allow_module_level=True)


@pytest.mark.parametrize("id", ["EXPERT-09", "EXPERT-11"])
def test_it_conforms(suite, made, id):
    suite.passes(made(Liger), id, 1)


def test_where_the_function_raises_everything_crashes(suite, made, breaks):
    breaks(made(Liger)._function, "forward")
    suite.crashes(made(Liger), "EXPERT-01 EXPERT-11 BACKEND-01 NUM-12", 1)


def test_what_is_not_declared_is_refused(made):
    given = (
        torch.ones(1, 4),
        ExpertWeights(torch.ones(1, 4, 4), torch.ones(1, 4, 2)),
        torch.ones(1, 1),
        torch.zeros(1, 1, dtype=torch.int32),
    )
    with pytest.raises(Unsupported, match="activation = 'gelu'"):
        made(Liger).experts(*given, ExpertsConfig(activation="gelu"))
    with pytest.raises(Unsupported, match="expert_map = True"):
        made(Liger).experts(*given, ExpertsConfig(), torch.zeros(1, dtype=torch.int32))


def test_without_a_gpu_it_says_that_it_is_interpreted(made):
    interpreted = not torch.cuda.is_available()
    assert made(Liger).capabilities.interpreted == interpreted
    assert ("bfloat16" in made(Liger).capabilities.dtypes) != interpreted


@pytest.mark.parametrize("found", ["none", "0.7.0"])
def test_a_missing_or_old_library_is_one_sentence(needs, found):
    install = "pip install --no-deps liger-kernel==0.8.5"
    needs(Liger, found, f"{Liger.name} needs liger-kernel >= 0.8", install)


def test_a_function_that_has_moved_gives_one_sentence(monkeypatch):
    import liger_kernel.ops.fused_moe as module

    monkeypatch.delattr(module, "LigerFusedMoEFunction")
    with pytest.raises(ImportError, match=r"^liger-kernel: version 0\.\S+ is not laid out as 0\.8"):
        Liger()
