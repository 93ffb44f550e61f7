"""The requirements on packed weights: who passes them, who does not, and what is drawn."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from moe_conformance import runner
from moe_conformance.codec import digest, from_bytes, to_bytes
from moe_conformance.executor import InlineExecutor
from moe_conformance.faults import faults
from moe_conformance.faults.rounded_activations import computed, rounded
from moe_conformance.inputs import quantization as inputs
from moe_conformance.pages import PROJECTS
from moe_conformance.registry import requirement_named, requirements
from moe_conformance.runner import Effort, drawn_of_the_seed, run_requirement
from moe_conformance.selfcheck import inline_scope, noticed
from moe_conformance.target import FORMATS, Capabilities, Unsupported
from moe_conformance.targets import Reference
from moe_conformance.worker import LAYOUTS, place_arguments
from moe_reference.quantized_experts import dequantize_experts
from moe_reference.quantized_tensors import FORMATS as FORMATS_OF_THE_REFERENCE

MINE = requirements("quantization")
FAULTS = [
    fault for fault in faults() if fault.target.__module__ == "moe_conformance.faults.quantization"
]


@pytest.fixture(autouse=True)
def _found_is_enough(monkeypatch):
    """Failing cases are not made smaller; one thread is quicker for tensors of this size."""
    phases = SimpleNamespace(generate=Phase.generate, shrink=Phase.generate)
    monkeypatch.setattr(runner, "Phase", phases)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(target, requirement, effort, seed=1):
    executor = InlineExecutor(target)
    return run_requirement(requirement, inline_scope(executor), executor, effort, seed)


def drawn(count, *chosen, target=None):
    """Plans of requirements, and what is built of them."""
    scope = inline_scope(InlineExecutor(target or Reference()))
    found = []
    of_mine = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    for requirement in chosen or MINE:

        def keep(plan):
            found.append((requirement, plan, requirement.given.build(plan)))  # noqa: B023

        with drawn_of_the_seed():
            seed(3)(of_mine(given(requirement.given.plans(scope))(keep)))()
    return found


# Who passes.


@pytest.mark.parametrize("requirement", MINE, ids=lambda each: each.id)
def test_the_reference_conforms(requirement):
    result = run(Reference(), requirement, Effort(12, 5, 0))
    assert (result.status, result.message) == ("pass", "")


class OtherOrder(Reference):
    """Sums in another order, over weights that were unpacked in float64; zeros have no sign."""

    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16"), gradients=("experts_quantized",)
    )

    def dequantize(self, packed):
        weights = super().dequantize(packed)
        small = weights.abs() < torch.finfo(weights.dtype).tiny
        return weights.masked_fill(small, 0.0)

    def experts_quantized(self, x, experts, weights, expert_ids, config, expert_map=None):
        super().experts_quantized(x, experts, weights, expert_ids, config, expert_map)
        floats = dequantize_experts(experts, config.gated)
        if experts.activation_format is not None:
            given = {"x": x, "experts": experts, "weights": weights, "expert_ids": expert_ids}
            return computed(given | {"config": config, "expert_map": expert_map}, rounded)
        other = dataclasses.replace(floats, gate_up=floats.gate_up.flip(2))
        turned = super().experts(x.double().flip(1), other, weights, expert_ids, config, expert_map)
        return turned.to(x.dtype)


@pytest.mark.parametrize("requirement", MINE, ids=lambda each: each.id)
def test_another_right_way_is_not_accused(requirement):
    result = run(OtherOrder(), requirement, Effort(7, 2, 0))
    assert (result.status, result.message) == ("pass", "")


class Narrow(Reference):
    """A kernel for few formats, which refuses everything else."""

    capabilities = Capabilities(
        dtypes=("bfloat16",),
        formats=("uint4b8", "mxfp4"),
        quantization={
            "group_size": (-1, 32),
            "scale_dtype": ("bfloat16",),
            "g_idx": (False,),
            "padding": (False,),
        },
        hidden_multiple=16,
        strides=False,
        finite_only=True,
        interpreted=True,
        gradients=("experts_quantized",),
    )

    def dequantize(self, packed):
        self._check(packed)
        return super().dequantize(packed)

    def experts_quantized(self, x, experts, *given, **named):
        if hasattr(experts, "is_k_full"):
            self._check(experts.gate_up)
            self._check(experts.down)
        return super().experts_quantized(x, experts, *given, **named)

    def _check(self, packed):
        fits = packed.format in self.capabilities.formats and packed.group_size in (-1, 32)
        fits = fits and packed.g_idx is None and packed.packed.is_contiguous()
        if packed.format == "uint4b8" and packed.scales is not None:
            fits = fits and packed.scales.dtype in (torch.bfloat16, torch.int32)
        if not fits:
            raise Unsupported("beyond the declaration")


@pytest.mark.parametrize("requirement", MINE, ids=lambda each: each.id)
def test_what_is_drawn_stays_inside_the_declaration(requirement):
    result = run(Narrow(), requirement, Effort(8, 2, 0))
    without = {f"QUANT-{n:02d}" for n in (4, 5, 6, 8, 9, 10, 17, 18, 23)}
    assert result.status == ("unsupported" if requirement.id in without else "pass"), result.message


class Rounded(Reference):
    """Weights are rounded to x's dtype for the product, as a tensor core wants them."""

    capabilities = Capabilities(
        dtypes=("bfloat16", "float16"),
        gradients=("experts_quantized",),
        rounding_points=("unpacked_weights", "activation"),
    )

    def experts_quantized(self, x, experts, weights, expert_ids, config, expert_map=None):
        super().experts_quantized(x, experts, weights, expert_ids, config, expert_map)
        floats = dequantize_experts(experts, config.gated)
        other = dataclasses.replace(
            floats, gate_up=self.rounded(floats.gate_up, x), down=self.rounded(floats.down, x)
        )
        if experts.activation_format is not None:
            given = {"x": x, "experts": experts, "weights": weights, "expert_ids": expert_ids}
            given |= {"config": config, "expert_map": expert_map}
            return computed(given, rounded, unpacked=other)
        return super().experts(x, other, weights, expert_ids, config, expert_map)

    def rounded(self, weights, x):
        return weights.to(x.dtype)


OF_EXPERTS = [each for each in MINE if each.operation == "experts_quantized"]


@pytest.mark.parametrize("requirement", OF_EXPERTS, ids=lambda each: each.id)
def test_rounded_weights_may_be_declared(requirement):
    result = run(Rounded(), requirement, Effort(10, 3, 0))
    assert result.status in ("pass", "marginal"), result.message
    assert result.worst < 6


def test_rounded_weights_are_found_where_they_are_not_declared():
    class Undeclared(Rounded):
        capabilities = Capabilities(dtypes=("float32",))

        def rounded(self, weights, x):
            return weights.bfloat16()

    class TooMuch(Rounded):
        def rounded(self, weights, x):
            return (weights * 64).to(torch.float8_e4m3fn).to(x.dtype) / 64

    for target in (Undeclared(), TooMuch()):
        result = run(target, requirement_named("QUANT-14"), Effort(30, 5, 0))
        assert result.status == "fail", result.message


def test_a_target_without_the_operations_is_not_asked():
    class Neither(Reference):
        capabilities = Capabilities(operations=("route",))

    for requirement in MINE:
        assert run(Neither(), requirement, Effort(3, 1, 0)).status == "not_provided"


# Who does not.


@pytest.mark.parametrize(
    ("fault", "id"),
    [(fault, id) for fault in FAULTS for id in fault.catches],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_requirement_that_a_fault_names_notices_it(fault, id):
    result = run(fault.target(), requirement_named(id), Effort(120, 1, 0), seed=0)
    assert noticed(result), (result.status, result.message)
    assert result.status in ("fail", "warn"), result.message


def test_most_faults_show_on_few_cases():
    cases = drawn(2)
    rare = 0
    for fault in FAULTS:
        different = asked = 0
        for requirement, _, built in cases:
            operation = requirement.operation
            if operation in fault.operations:
                names = ("packed",) if operation == "dequantize" else NAMES
                given = place_arguments({"arguments": {name: built[name] for name in names}}, "cpu")
                right = getattr(Reference(), operation)(**given)
                wrong = getattr(fault.target(), operation)(**given)
                same = right.shape == wrong.shape and right.dtype == wrong.dtype
                different += not (same and torch.equal(right.nan_to_num(7), wrong.nan_to_num(7)))
                asked += 1
        rare += different * 10 < asked
    assert rare * 2 >= len(FAULTS) >= 24


NAMES = ("x", "experts", "weights", "expert_ids", "config", "expert_map")


# What is drawn.


def test_the_formats_are_those_of_the_reference():
    assert tuple(FORMATS_OF_THE_REFERENCE) == FORMATS
    with pytest.raises(ValueError, match="formats: expected any of uint4b8"):
        Capabilities(formats=("uint3",))


def test_every_format_and_every_kind_is_drawn():
    cases = drawn(100, *(requirement_named(id) for id in ("QUANT-01", "QUANT-03", "QUANT-10")))
    seen = Counter()
    for _, plan, _ in cases:
        seen.update({("format", plan["format"]), ("codes", plan["codes"])})
        seen.update({("scales", plan["scales"]), ("layout", plan["layout"])})
        seen.update({("g_idx", plan["g_idx"]), ("scale_dtype", plan["scale_dtype"])})
        seen.update({("granularity", plan["granularity"]), ("group", plan["group_size"])})
    for kind, values in (
        ("format", FORMATS),
        ("codes", inputs.CODES),
        ("scales", inputs.SCALES),
        ("layout", LAYOUTS),
        ("g_idx", (None, *inputs.ORDERS)),
        ("scale_dtype", inputs.UNIVERSE["scale_dtype"]),
        ("granularity", inputs.UNIVERSE["granularity"]),
        ("group", inputs.UNIVERSE["group_size"]),
    ):
        for value in values:
            assert seen[kind, value] >= 2, (kind, value)


@pytest.mark.parametrize(
    ("sizes", "blocks"), [((-1, 16, 24), {16}), ((-1, 32), {32}), ((-1,), set())]
)
def test_declared_group_sizes_bound_the_blocks_of_e4m3(sizes, blocks):
    class Tiled(Reference):
        capabilities = Capabilities(formats=("e4m3",), quantization={"group_size": sizes})

    chosen = [requirement_named(id) for id in ("QUANT-01", "QUANT-21")]
    seen = {
        plan["group_size"]
        for _, plan, _ in drawn(40, *chosen, target=Tiled())
        if plan["granularity"] == "block"
    }
    assert seen == blocks


def test_every_format_is_drawn_for_experts():
    seen = Counter()
    for _, plan, built in drawn(20, *(each for each in MINE if each.operation != "dequantize")):
        seen.update([plan["quantized"], plan["dtype"], plan["config"]["activation"]])
        seen["a bias"] += built["experts"].down_bias is not None
        seen["a map"] += built["expert_map"] is not None
        seen["g_idx"] += built["experts"].gate_up.g_idx is not None
        seen["partial"] += not built["experts"].is_k_full
        seen["padding"] += plan["padding"]
    wanted = (*FORMATS, "float32", "bfloat16", "float16", "float64", "silu", "swigluoai")
    for name in (*wanted, "a bias", "a map", "g_idx", "partial", "padding"):
        assert seen[name] >= 3, (name, seen)


def test_plans_give_the_same_bytes_again_and_survive_the_pipe():
    for requirement, plan, built in drawn(2):
        again = requirement.given.build(plan)
        there_and_back = from_bytes(to_bytes(built))
        assert digest(built) == digest(again) == digest(there_and_back)
        for name in ("packed", "experts"):
            if name in built:
                assert type(there_and_back[name]) is type(built[name])
        if "experts" in built:
            assert there_and_back["experts"].down.shape == built["experts"].down.shape


def plan_of(format, group_size=-1, **changed):
    return {
        "format": format, "group_size": group_size, "granularity": None, "scale_dtype": "float32",
        "global": "expert", "g_idx": None, "g_idx_dtype": None, "padding": False, "experts": 1,
        "rows": 1, "columns": 8, "codes": "any", "scales": "usual", "zeros": "any", "nan": False,
        "nan_codes": False, "layout": "contiguous", "seed": 1, **changed,
    }  # fmt: skip


def built_with(codes, format, group_size=-1, **parts):
    """A matrix of one row with these codes and parts."""
    plan = plan_of(format, group_size, columns=len(codes))
    made = inputs.build_packed(plan)["drawn"]
    return made | {"codes": torch.tensor(codes).view(1, 1, -1)} | parts


def test_words_and_their_meaning():
    one = built_with(range(8), "uint4b8", scales=torch.full((1, 1, 1), 0.5))
    assert inputs.packed(one).packed.item() == 0x76543210
    assert inputs.meaning(one).flatten().tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]
    one = built_with([1, 2, 3, 255], "uint8b128", scales=torch.full((1, 1, 1), 2.0))
    assert inputs.packed(one).packed.item() == 0xFF030201 - 2**32
    assert inputs.meaning(one).flatten().tolist() == [-254, -252, -250, 254]


def test_floats_and_their_meaning():
    one = built_with([1, 9] + [0] * 30, "mxfp4", 32, scales=torch.full((1, 1, 1), 128))
    assert inputs.packed(one).packed.flatten()[0].item() == 0x91
    assert inputs.meaning(one).flatten()[:2].tolist() == [1.0, -1.0]
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(inputs.E4M3.nan_to_num(1e9), values.nan_to_num(1e9))


def test_blocks_and_their_meaning():
    d = torch.full((1, 1, 1), 1.0, dtype=torch.float16)
    one = built_with([255, *range(31)], "Q8_0", 32, scales=d)
    assert inputs.packed(one).packed.flatten()[:4].tolist() == [0x00, 0x3C, 255, 0]
    assert inputs.meaning(one).flatten()[:3].tolist() == [-1.0, 0.0, 1.0]
    a, m = torch.zeros(2, 1, 1, 1, 8, dtype=torch.int64)
    a[..., 4], m[..., 4] = 0x21, 0x13
    one = built_with([3] * 256, "Q4_K", 256, scales=d, minima=2 * d, a=a, m=m)
    bytes_ = inputs.packed(one).packed.flatten().tolist()
    assert bytes_[:4] == [0x00, 0x3C, 0x00, 0x40]
    assert (bytes_[4], bytes_[8], bytes_[12]) == (0x80, 0x40, 0x31)
    assert inputs.meaning(one)[0, 0, 128].item() == 3 * 0x21 - 2 * 0x13


def test_padding_is_the_worst_that_there_is():
    dirty = Counter()
    for _, _, built in drawn(40, requirement_named("QUANT-10")):
        packed, (_, rows, columns) = built["packed"], built["packed"].shape
        if packed.scales is not None and packed.scales.is_floating_point():
            dirty["NaN scales"] += bool(packed.scales.float().isnan().any())
        dirty["rows"] += packed.packed.shape[1] > rows
        dirty["columns"] += built["drawn"]["codes"].shape[2] > columns
    assert min(dirty.values()) >= 10, dirty


def test_sources_have_a_page():
    for requirement in MINE:
        for source in requirement.sources:
            project, _, number = source.rpartition(" #")
            if number.isdigit():
                assert project.lower() in PROJECTS, source
