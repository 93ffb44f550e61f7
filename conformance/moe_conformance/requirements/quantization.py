"""Requirements on `dequantize` and `experts_quantized`: what packed weights stand for.

Dimension key: E experts, O rows of a matrix (out), D columns of a matrix (in), G groups of columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from moe_reference.config import ExpertWeights
from moe_reference.experts import experts as reference_experts

from moe_conformance.case import Answer, Case, must_raise
from moe_conformance.experts_oracle import Between, Spread, local_ids
from moe_conformance.inputs.given import Given, differentiable
from moe_conformance.inputs.quantization import (
    CHANGES,
    E4M3,
    HALVED,
    INTEGERS,
    POWERS,
    UNIT,
    Drawn,
    changed_part,
    meaning,
    packed,
    packed_inputs,
    quantized_inputs,
    unpacked,
)
from moe_conformance.judge import (
    Closeness,
    Violation,
    equal,
    has_form,
    impostors,
    telling_scale,
)
from moe_conformance.quantized_oracle import quantized_oracle
from moe_conformance.registry import MUST, SHOULD, requirement
from moe_conformance.requirements.experts import (
    arithmetic_of,
    cotangent_of,
    judge_gradients,
    left_alone,
    output_of,
    rule_of,
    wrong_outputs,
)
from moe_conformance.rounded_oracle import STATIC, rounded_rows
from moe_conformance.target import FORMATS

NAMES = ("x", "experts", "weights", "expert_ids", "config", "expert_map")
GROUPED = (*INTEGERS, "mxfp4", "nvfp4", "Q8_0", "Q8_1", "Q4_K")
Values = Mapping[str, torch.Tensor]
Impostors = list[tuple[str, tuple[torch.Tensor, torch.Tensor, list[str]]]]
"""By name: an answer, an earlier one read again, and the paths of what was changed."""


def weights_of(answer: Answer, expected: torch.Tensor) -> torch.Tensor:
    """The unpacked weights, in the form that the contract gives them."""
    has_form("weights", answer.outputs, tuple(expected.shape), (expected.dtype,))
    return answer.outputs


def is_exactly(expected: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Equal to the last bit, but that a number too small to be normal may have become 0."""
    tiny = (expected.abs() < torch.finfo(expected.dtype).tiny) & (expected != 0)

    def rule(actual: torch.Tensor) -> None:
        equal("weights", torch.where(tiny & (actual == 0), expected, actual), expected)

    return rule


def judge_weights(case: Case, weights: torch.Tensor, others: Mapping[str, Drawn]) -> None:
    """Judge unpacked weights; the impostors are what other parts would stand for."""
    judge_values(case, weights, {name: unpacked(other) for name, other in others.items()})


def judge_values(case: Case, weights: torch.Tensor, others: Values) -> None:
    """As `judge_weights`, of impostors that are weights themselves."""
    expected = unpacked(case["drawn"])

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        yield from impostors(expected)
        for name, value in others.items():
            if not torch.equal(value.nan_to_num(), expected.nan_to_num()):
                yield name, value

    case.note(f"format {case['drawn']['format']}")
    case.judge(is_exactly(expected), weights, wrong())


def unpack(case: Case) -> torch.Tensor:
    """What the target makes of the packed tensor."""
    answer = case.call("dequantize", packed=case["packed"])
    return weights_of(answer, unpacked(case["drawn"]))


def _rounded_to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.to(dtype).to(t.dtype)


def _moved(place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.roll(1, place)


def with_parts(drawn: Drawn, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Drawn:
    """The same with some of its parts changed, where it has them."""
    return drawn | {name: change(drawn[name]) for name in names if drawn.get(name) is not None}


@requirement(
    "QUANT-01",
    MUST,
    "dequantize",
    "Each weight MUST be the exact value of its code, scales and zero point, rounded once: to "
    "float32, or to float64 where the scales are float64.",
    reason="The error was made when the weights were packed. A second one, of scales that were "
    "rounded to another dtype on the way, is in every product and in no test with scales of 1.",
    sources=("SGLang #36822", "vLLM #11528", "MoE-Infinity #82", "docs/spec/quantization.md"),
    given=packed_inputs(
        # Scales of every dtype are those of integers and of e4m3 alone.
        formats=(*INTEGERS, *FORMATS, *("e4m3",) * 5),
        scales=("usual", "usual", "zeros", "zeros", "tiny"),
        g_idx=(False, True),
        large=True,
    ),
    references=("quantization.dequantize",),
)
def each_weight_is_exact(case: Case) -> None:
    """Bit for bit; the impostors have scales of other dtypes, and another order of roundings."""
    drawn = case["drawn"]
    others = {}
    if drawn["scales"].is_floating_point():
        case.note(f"scales {str(drawn['scales'].dtype).removeprefix('torch.')}")
        for dtype in (torch.bfloat16, torch.float16):
            others[f"scales rounded to {dtype}"] = unpacked(
                with_parts(drawn, _rounded_to(dtype), "scales")
            )
    right = unpacked(drawn)
    others["weights rounded to bfloat16"] = right.bfloat16().to(right.dtype)
    judge_values(case, unpack(case), others)


@requirement(
    "QUANT-02",
    MUST,
    "dequantize",
    "Codes MUST be read from where the format puts them: the first of a word or byte in the lowest "
    "bits; in Q4_K two groups in the two halves of the same bytes.",
    reason="Every order of codes has the same shape and the same spread of weights. A model whose "
    "neighbours are exchanged answers fluently and wrong.",
    sources=("OCP Microscaling Formats 1.0", "llama.cpp ggml-common.h", "vLLM #26092"),
    given=packed_inputs(formats=(*HALVED, "uint8b128"), codes=("any", "every", "ends")),
    references=("bit_packing.unpack_words", "bit_packing.unpack_nibbles"),
)
def codes_stand_where_the_format_puts_them(case: Case) -> None:
    """The impostors exchange neighbours, turn words round, and read in the order of AWQ."""
    drawn = case["drawn"]

    def pairs(codes: torch.Tensor) -> torch.Tensor:
        return codes.unflatten(2, (-1, 2)).flip(3).flatten(2)

    def words(codes: torch.Tensor) -> torch.Tensor:
        return (
            codes.unflatten(2, (-1, 32 // (8 if format == "uint8b128" else 4))).flip(3).flatten(2)
        )

    def awq(codes: torch.Tensor) -> torch.Tensor:
        return codes.unflatten(2, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(2)

    format = drawn["format"]
    changes = {"neighbours exchanged": pairs}
    if format in INTEGERS:
        changes["words from the other end"] = words
    if format in ("uint4", "uint4b8"):
        changes["the order of AWQ"] = awq
    others = {name: with_parts(drawn, change, "codes") for name, change in changes.items()}
    judge_weights(case, unpack(case), others)


@requirement(
    "QUANT-03",
    MUST,
    "dequantize",
    "A column MUST have the scale, and the zero point or minimum, of its own group, row and "
    "expert; a `group_size` of -1 is one group.",
    reason="Kernels take one scale for a run of columns. Where the run is longer than a group, or "
    "starts elsewhere, weights are wrong by the ratio of two scales.",
    sources=("vLLM #44563", "vLLM #50196", "vLLM #48173"),
    given=packed_inputs(
        # Groups of any size, and one for a whole row, are those of integers alone.
        formats=(*INTEGERS, *INTEGERS, *GROUPED),
        codes=("any", "every", "one"),
        least_experts=2,
        large=True,
    ),
    references=("quantization.dequantize",),
)
def a_column_has_the_scale_of_its_group(case: Case) -> None:
    """The impostors take the scales of neighbours."""
    drawn = case["drawn"]
    parts = ("scales", "minima", "zeros", "a", "m")
    others = {
        f"those of the next {what}": with_parts(drawn, _moved(place), *parts)
        for what, place in (("expert", 0), ("row", 1), ("group", 2))
    }
    others["those of the first group"] = with_parts(
        drawn, lambda t: t[:, :, :1].expand(t.shape), *parts
    )
    case.note("one group", drawn["scales"].shape[2] == 1)
    case.note(
        "one group of more than 128 columns", drawn["group_size"] == -1 and drawn["shape"][2] > 128
    )
    judge_weights(case, unpack(case), others)


@requirement(
    "QUANT-04",
    MUST,
    "dequantize",
    "Zero points of `uint4` MUST be taken as they are, from 0 to 16.",
    reason="The first GPTQ format stores them less one, the second and AWQ do not; no shape shows "
    "which. Read the wrong way every weight is off by one step, and a 16 does not fit in 4 bits.",
    sources=("vLLM #38966", "vLLM #26092", "GPTQModel #2350", "AutoGPTQ #484"),
    given=packed_inputs(
        formats=("uint4",), zeros=("any", "ends", "ends"), scales=("usual",), g_idx=(False, True)
    ),
    references=("integer_quantization.dequantize_integer",),
)
def zero_points_are_taken_as_they_are(case: Case) -> None:
    """The impostors are off by one, cut to 4 bits, and the middle."""
    drawn = case["drawn"]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "one more": lambda zeros: zeros + 1,
        "one less": lambda zeros: zeros - 1,
        "cut to 4 bits": lambda zeros: zeros & 15,
        "the middle": lambda zeros: torch.full_like(zeros, 8),
    }
    case.note("a zero point of 16", bool((drawn["zeros"] == 16).any()))
    others = {name: with_parts(drawn, change, "zeros") for name, change in changes.items()}
    judge_weights(case, unpack(case), others)


@requirement(
    "QUANT-05",
    MUST,
    "dequantize",
    "With `g_idx` column k MUST be of group `g_idx[k]` of its expert, and stay where it is.",
    reason="With act-order columns of a group do not stand side by side. Without g_idx each of "
    "them gets some other group's scale, and nothing raises.",
    sources=("SGLang #36822", "SGLang #35955", "vLLM #11528", "GPTQ (arXiv 2210.17323)"),
    given=packed_inputs(
        formats=INTEGERS, g_idx=(True,), several_groups=True, scales=("usual", "zeros")
    ),
    references=("integer_quantization.column_groups",),
)
def g_idx_says_which_group_a_column_is_of(case: Case) -> None:
    """The impostors ignore it, take the first expert's, and leave columns in the groups' order."""
    drawn = case["drawn"]
    g_idx = drawn["g_idx"]
    others = {
        "g_idx ignored": unpacked(drawn | {"g_idx": None}),
        "g_idx of the first expert": unpacked(drawn | {"g_idx": g_idx[:1].expand(g_idx.shape)}),
    }
    order = g_idx.argsort(dim=1, stable=True)[:, None].expand(unpacked(drawn).shape)
    others["columns in the order of groups"] = unpacked(drawn).gather(2, order)
    case.note("a group without columns", len(g_idx[0].unique()) < drawn["scales"].shape[2])
    judge_values(case, unpack(case), others)


@requirement(
    "QUANT-06",
    MUST,
    "dequantize",
    "A scale of `e4m3` MUST multiply the matrix, the row or the block that it is of; blocks at the "
    "edges may be cut short.",
    reason="Rows and columns of blocks are exchanged without an error where there are as many of "
    "both, and sizes that no block divides end in the neighbour's scale.",
    sources=("vLLM #48173", "vLLM #44763", "ATOM #1944", "DeepSeek-V3 (arXiv 2412.19437)"),
    given=packed_inputs(
        formats=("e4m3",), scales=("usual", "zeros"), codes=("any", "every"), large=True
    ),
    references=("float8.dequantize_e4m3",),
)
def a_float8_scale_multiplies_what_it_is_of(case: Case) -> None:
    """The impostors move the scales, divide by them, and leave them out."""
    drawn = case["drawn"]
    scales, B = drawn["scales"], drawn["group_size"]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "left out": torch.ones_like,
        "as divisors": lambda t: torch.where(t > 0, 1 / t, t),
        "of the next row": lambda t: t.roll(1, 1),
        "of the next column": lambda t: t.roll(1, 2),
    }
    if scales.shape[1] == scales.shape[2] > 1:
        changes["with rows and columns exchanged"] = lambda t: t.mT
    others = {name: with_parts(drawn, change, "scales") for name, change in changes.items()}
    _, O, D = drawn["shape"]
    kind = "block" if B != -1 else "tensor" if scales.shape[1] == 1 else "channel"
    case.note(f"scales of a {kind}")
    case.note("a block cut short", B != -1 and bool(O % B or D % B))
    judge_weights(case, unpack(case), others)


NOT_NUMBERS = torch.where(E4M3.isnan(), torch.tensor([480.0, -480.0]).double().repeat(128), E4M3)
INFINITE = torch.where(E4M3.isnan(), math.inf, E4M3)
FLUSHED = torch.where(E4M3.abs() < 2.0**-6, 0.0, E4M3)
HALF = torch.cat([E4M3[:127] / 2, E4M3[126:127], -E4M3[:127] / 2, E4M3[127:128]])
NO_LEAST = torch.cat([torch.zeros(1), POWERS[1:]]).double()
GREAT = torch.cat([POWERS[:-1], torch.tensor([math.inf]).double()])


@requirement(
    "QUANT-07",
    MUST,
    "dequantize",
    "Floats of 8 bits MUST keep their ends: 0x7e is 448, 0x7f is NaN and no infinity, numbers "
    "below 2^-6 are subnormal; E8M0 is 2^(s - 127) from 0 to 254, and 255 is NaN.",
    reason="The ends are where float8 dtypes differ: with and without infinities, with another "
    "bias. Bits that are shifted into a float32 make 0 of the least power of two.",
    sources=(
        "Micikevicius et al. (arXiv 2209.05433)",
        "OCP Microscaling Formats 1.0",
        "triton #10190",
    ),
    given=packed_inputs(
        formats=("e4m3", "mxfp4", "nvfp4"), codes=("ends", "every"), scales=("usual", "ends"),
        nan=True,
    ),
    references=("float8.dequantize_e4m3", "float4.from_e8m0"),
)  # fmt: skip
def floats_of_8_bits_keep_their_ends(case: Case) -> None:
    """The impostors read the bytes as those of neighbouring dtypes."""
    drawn = case["drawn"]
    right = unpacked(drawn)
    if drawn["format"] == "mxfp4":
        tables = {"0 as no power": {"e8m0": NO_LEAST}, "infinity": {"e8m0": GREAT}}
        tables["one more"] = {"e8m0": POWERS.roll(-1)}
    else:
        tables = {
            "480 for NaN": {"e4m3": NOT_NUMBERS},
            "infinity for NaN": {"e4m3": INFINITE},
            "no subnormal numbers": {"e4m3": FLUSHED},
            "another bias": {"e4m3": HALF},
        }
    others = {}
    for name, table in tables.items():
        value = meaning(drawn, **table).to(right.dtype)
        # What may be flushed tells nothing.
        if not _passes(is_exactly(right), value):
            others[name] = value
    case.note("a weight that is NaN", bool(right.isnan().any()))
    judge_values(case, unpack(case), others)


def _passes(rule: Callable[[torch.Tensor], None], value: torch.Tensor) -> bool:
    try:
        rule(value)
    except Violation:
        return False
    return True


@requirement(
    "QUANT-08",
    MUST,
    "dequantize",
    "`global_scale` of `nvfp4` MUST multiply, one for an expert or one for each row.",
    reason="Some files hold the factor and some its inverse, and gate and up that were quantised "
    "apart have one each.",
    sources=("NVIDIA NVFP4", "compressed-tensors nvfp4", "flashinfer #2372"),
    given=packed_inputs(formats=("nvfp4",), scales=("usual",), least_experts=2),
    references=("float4.dequantize_float4",),
)
def a_global_scale_multiplies(case: Case) -> None:
    """The impostors leave it out, divide by it, and take another expert's."""
    drawn = case["drawn"]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "left out": torch.ones_like,
        "as a divisor": lambda t: 1 / t,
        "of the next expert": lambda t: t.roll(1, 0),
        "of the first row": lambda t: t[:, :1].expand(t.shape),
        "rounded to bfloat16": lambda t: t.bfloat16().float(),
    }
    case.note("one for each row", drawn["global_scale"].shape[1] > 1)
    others = {name: with_parts(drawn, change, "global_scale") for name, change in changes.items()}
    judge_weights(case, unpack(case), others)


@requirement(
    "QUANT-09",
    MUST,
    "dequantize",
    "GGUF blocks MUST be read byte for byte: Q8 codes have a sign; in Q4_K scales and minima have "
    "6 bits, those of the last four groups in two places, and the minimum is subtracted.",
    reason="A block mixes floats, codes and bits of both. Half of the scales of Q4_K can be wrong "
    "while the other half is right.",
    sources=("llama.cpp ggml-common.h", "llama.cpp ggml-quants.c"),
    given=packed_inputs(formats=("Q8_0", "Q8_1", "Q4_K", "Q4_K")),
    references=("gguf_blocks.dequantize_gguf",),
)
def gguf_blocks_are_read_byte_for_byte(case: Case) -> None:
    """The impostors have codes without a sign, no minima, and scales of 4 bits."""
    drawn = case["drawn"]
    if drawn["format"] == "Q4_K":
        others = {
            "without minima": unpacked(with_parts(drawn, torch.zeros_like, "m")),
            "minima added": unpacked(with_parts(drawn, torch.neg, "minima")),
            "scales of 4 bits": unpacked(with_parts(drawn, lambda t: t & 15, "a")),
            "scales and minima exchanged": unpacked(drawn | {"a": drawn["m"], "m": drawn["a"]}),
        }
    else:
        _, O, D = drawn["shape"]
        d = drawn["scales"][:, :O].double().repeat_interleave(32, 2)[..., :D]
        codes = drawn["codes"][:, :O, :D]
        others = {
            "without a sign": (d * codes).float(),
            "with a middle of 128": (d * (codes - 128)).float(),
        }
    judge_values(case, unpack(case), others)


@requirement(
    "QUANT-10",
    MUST,
    "dequantize",
    "What lies outside of `shape` MUST NOT change any weight, whatever stands there.",
    reason="Packed tensors are padded to what a kernel takes. NaN scales in the padding times 0 "
    "are NaN, and a short last block takes its scale from a block that is all there is.",
    sources=("SGLang #9473", "triton #10190", "flashinfer #2372"),
    given=packed_inputs(padding=(True,), g_idx=(False, True)),
    references=("quantized_tensors.QuantizedTensor",),
)
def padding_changes_nothing(case: Case) -> None:
    """Codes, scales, zero points and g_idx are the worst that there is outside of `shape`."""
    weights = unpack(case)
    right = unpacked(case["drawn"])
    leaked = right.clone()
    leaked[:, -1], leaked[:, :, -1] = torch.nan, torch.nan
    drawn = case["drawn"]
    _, O, D = drawn["shape"]
    case.note("rows that do not count", drawn["codes"].shape[1] > O)
    case.note("columns that do not count", drawn["codes"].shape[2] > D)
    judge_values(case, weights, {"NaN at the edges": leaked})


@requirement(
    "QUANT-11",
    MUST,
    "dequantize",
    "A call on the same storage with other codes and scales MUST give the weights of these; the "
    "first weights, and the packed tensor, MUST stay as they are.",
    reason="Weights are unpacked into a buffer that is used for every layer, or kept by the "
    "address of what they were unpacked from.",
    sources=("KernelBench result_reuse", "MoE-Infinity #136", "SGLang #25852"),
    given=packed_inputs(
        scales=("usual",), codes=("any", "every"), g_idx=(False, True), changes=CHANGES
    ),
    references=("quantization.dequantize",),
)
def other_codes_in_the_same_storage_are_other_weights(case: Case) -> None:
    """The second call has the codes of another row and the scales of another expert, or one part
    alone is another one: the same codes with other scales are other weights."""
    drawn, what = case["drawn"], case["changed"]
    if what == "everything":
        other = with_parts(drawn, lambda t: t.roll(1, 2).flip(1), "codes")
        other = with_parts(other, lambda t: t.flip(0), "scales", "global_scale")
    else:
        other = changed_part(drawn, what)
    case.note(f"other {what}")
    first = case.planned("dequantize", packed=case["packed"])
    second = case.planned("dequantize", packed=packed(other), reuse=0)
    answers = case.session([first, second])
    before, again = weights_of(answers[0], unpacked(drawn)), answers[0].afterwards
    expected = unpacked(other)

    def rule(found: tuple[torch.Tensor, torch.Tensor, list[str]]) -> None:
        now, kept, changed = found
        equal("the first weights, read again", kept, before)
        left_alone("dequantize")(changed)
        is_exactly(expected)(now)

    answer = weights_of(answers[1], expected)
    changed = [path for each in answers for path in (*each.changed, *each.shared)]
    wrong: Impostors = [(name, (value, again, [])) for name, value in impostors(expected)]
    wrong.append(("written over", (answer, again + 1, [])))
    wrong.append(("a part changed", (answer, again, ["packed"])))
    if not torch.equal(expected, unpacked(drawn)):
        wrong.append(("the first weights", (unpacked(drawn), again, [])))
    case.judge(rule, (answer, again, changed), wrong)


@requirement(
    "QUANT-12",
    MUST,
    "dequantize",
    "Experts, rows, and columns between the ends of groups, cut out of a packed tensor with their "
    "scales, zero points and g_idx, MUST stand for the weights cut out of the whole.",
    reason="That is how ranks get their parts. Scales of a slice are those of the whole only if "
    "nothing depends on where a group stands in it.",
    sources=("SGLang #36822", "SGLang #35955", "vLLM #48173", "vLLM #50196"),
    given=packed_inputs(
        formats=GROUPED, g_idx=(False, True), scales=("usual", "zeros"), least_experts=2
    ),
    references=("packed_slicing.take_packed_rows", "packed_slicing.take_packed_columns"),
)
def unpacking_and_slicing_commute(case: Case) -> None:
    """The last experts and rows, and the second half of the columns where a group ends there."""
    drawn = case["drawn"]
    (_, O, D), B = drawn["shape"], drawn["group_size"]
    # Where words and groups end together; with g_idx groups are anywhere, and kept whole.
    per_row = B == -1 or drawn["g_idx"] is not None
    step = math.lcm(max(B, 1), UNIT[drawn["format"]])
    start, row = D // step // 2 * step, O // 2
    part = {**drawn, "shape": [drawn["shape"][0] - 1, O - row, D - start]}
    for name, each in drawn.items():
        if not isinstance(each, torch.Tensor):
            continue
        part[name] = each[1:]
        if name == "global_scale":
            part[name] = part[name] if each.shape[1] == 1 else part[name][:, row:]
        elif name == "g_idx":
            part[name] = part[name][:, start:]
        else:
            width = 1 if name == "codes" else B
            first = 0 if name != "codes" and per_row else start // width
            part[name] = part[name][:, row:, first:]
    case.note("columns cut", start > 0)
    case.inputs |= {"drawn": part, "packed": packed(part)}
    whole = unpacked(drawn)[1:, row:, start:]
    others = {"the first expert's": unpacked(drawn)[:-1, row:, start:]}
    answer = case.call("dequantize", packed=case["packed"])
    weights = weights_of(answer, whole)
    judge_values(case, weights, others)


@requirement(
    "QUANT-13",
    SHOULD,
    "dequantize",
    "Parts of another dtype or shape, groups outside of the scales, and parts that the format does "
    "not have, SHOULD raise `ValueError` or `TypeError`.",
    reason="A scale of another shape or dtype is no error of arithmetic: products run through and "
    "are wrong.",
    sources=("docs/spec/quantization.md", "SGLang #36822", "MoE-Infinity #136", "vLLM #50196"),
    given=packed_inputs(scales=("usual",), g_idx=(False, True), codes=("any",)),
    references=("quantized_checks.check_quantized",),
)
def parts_that_do_not_fit_raise(case: Case) -> None:
    """One part is wrong at a time; every other case tries the other half."""
    good = case["packed"]
    E, O, D = good.shape
    bad: dict[str, dict[str, Any]] = {
        "a format that there is not": {"format": "uint3"},
        "codes that were cast to float32": {"packed": good.packed.float()},
        "more rows than there are": {"shape": (E, good.packed.shape[1] + 1, D)},
        "more columns than there are": {"shape": (E, O, 2 * D + 1)},
        "another number of experts": {"shape": (E + 1, O, D)},
    }
    if good.scales is not None:
        scales = good.scales
        bad["scales of whole numbers"] = {"scales": torch.ones(scales.shape, dtype=torch.int32)}
        bad["no scales"] = {"scales": None}
        bad["scales of one expert more"] = {"scales": torch.cat([scales, scales[:1]])}
        more = torch.cat([scales, scales], 2)
        if good.g_idx is None:
            bad["twice as many groups"] = {"scales": more}
        if scales.shape[1] not in (1, scales.shape[2]) and good.g_idx is None:
            bad["scales with rows and groups exchanged"] = {"scales": scales.mT.contiguous()}
    else:
        bad["scales that the format has inside"] = {"scales": torch.ones(E, O, 1)}
    if good.format == "uint4":
        bad["no zero points"] = {"zeros": None}
        bad["a zero point of 17"] = {"zeros": torch.full_like(good.zeros, 17)}
    else:
        bad["zero points that there are none of"] = {
            "zeros": torch.zeros(E, O, 1, dtype=torch.uint8)
        }
    if good.g_idx is not None:
        groups = good.scales.shape[2]
        bad["a group past the last"] = {"g_idx": torch.full_like(good.g_idx, groups)}
        bad["a group below zero"] = {"g_idx": torch.full_like(good.g_idx, -1)}
    calls = {
        name: {"packed": dataclasses.replace(good, **changed)}
        for name, changed in list(bad.items())[case["turn"] :: 2]
    }
    must_raise(case, "dequantize", {"packed": good}, calls)


# Experts.


def arguments(case: Case, **changed: Any) -> dict[str, Any]:
    """The arguments of `experts_quantized`, with some of them replaced."""
    return {name: case[name] for name in NAMES} | changed


def float_experts(case: Case, **drawn: Drawn) -> ExpertWeights:
    """The experts' weights unpacked, some of other parts, with the biases as they are."""
    weights = case["unpacked"] | {name: unpacked(each) for name, each in drawn.items()}
    experts = case["experts"]
    return ExpertWeights(
        weights["gate_up"], weights["down"], experts.gate_up_bias, experts.down_bias
    )


def spread_of(case: Case, between: Between | None = None, **changed: Any) -> Spread:
    """The expected output, spread as the target declares."""
    given = arguments(case) | {"experts": float_experts(case)} | changed
    return quantized_oracle(arithmetic_of(case, given["x"]), between, **given)


def rounding_of(case: Case, lowest: float = -127.0, **changed: Any) -> Between:
    """What is done to the rows before each product; `changed` are fields of the experts."""
    experts = dataclasses.replace(case["experts"], **changed)
    blocks = (experts.gate_up.group_size, experts.down.group_size)
    return rounded_rows(experts.activation_format, blocks, experts.activation_scales, lowest)


def value_of(case: Case, **changed: Any) -> torch.Tensor:
    """The output of other weights or arguments in float64: what an impostor gives."""
    given = arguments(case) | {"experts": float_experts(case)} | changed
    experts = given["experts"]
    wide = {
        f.name: None if (t := getattr(experts, f.name)) is None else t.double()
        for f in dataclasses.fields(experts)
    }
    floats = {name: given[name].double() for name in ("x", "weights")}
    return reference_experts(**given | floats | {"experts": ExpertWeights(**wide)})  # type: ignore[arg-type]


def judge_output(
    case: Case, output: torch.Tensor, spread: Spread, others: Values | None = None
) -> None:
    """Judge an output, with the usual impostors and some of the property's own."""

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        scale = telling_scale(spread.value, spread.sigma, spread.freedom)
        yield from impostors(spread.value, scale)
        for name, value in (others or {}).items():
            if not torch.equal(value.nan_to_num(), spread.value.nan_to_num()):
                yield name, value

    case.note(f"format {case['experts'].down.format}")
    case.note(f"dtype {str(case['x'].dtype).removeprefix('torch.')}")
    case.judge(rule_of(spread), output, wrong())


def compute(case: Case, **changed: Any) -> torch.Tensor:
    """What the target makes of the arguments."""
    answer = case.call("experts_quantized", **arguments(case, **changed))
    return output_of(answer, changed.get("x", case["x"]))


def _takes_nan(given: Given) -> Given:
    """The same inputs, for targets that take NaN."""
    return Given(
        lambda scope: None if scope.capabilities.finite_only else given.plans(scope), given.build
    )


PLAIN: dict[str, Any] = {
    "bias": (False,), "expert_map": (False,), "invalid_ids": (False,), "weight_on": ("output",),
}  # fmt: skip


@requirement(
    "QUANT-14",
    MUST,
    "experts_quantized",
    "The output MUST be that of `experts` on the unpacked weights, each matrix unpacked by its own "
    "format and groups, within the rounding that is declared.",
    reason="The error of quantisation is in the weights, once. Held against the original weights "
    "a wrong kernel hides behind it.",
    sources=("vLLM fused_marlin_moe", "hanzo-engine quantised experts", "vLLM #44563"),
    given=quantized_inputs(g_idx=(False, True), large=True, **PLAIN),
    references=("quantized_experts.experts_quantized",),
    kinds=3,
)
def packed_experts_are_experts_on_the_unpacked_weights(case: Case) -> None:
    """The impostor has the scales of the next expert in one of the matrices."""
    others = {}
    if len(case["experts"].down.packed) > 1:
        name = ("gate_up", "down")[case["turn"]]
        parts = ("scales", "minima", "zeros", "global_scale")
        moved = float_experts(case, **{name: with_parts(case["drawn"][name], _moved(0), *parts)})
        others[f"{name} with the next expert's scales"] = value_of(case, experts=moved)
    judge_output(case, compute(case), spread_of(case), others)


@requirement(
    "QUANT-15",
    MUST,
    "experts_quantized",
    "Biases MUST be added as they are, and a weight on the input MUST multiply x before the first "
    "product and nothing after it.",
    reason="Kernels for packed weights come with a variant for each, which is run least: a bias "
    "permuted with the scales, a weight that both products apply.",
    sources=("vLLM fused_marlin_moe", "SGLang #7889", "gpt-oss model code"),
    given=quantized_inputs(
        bias=(True,), expert_map=(False, True), invalid_ids=(False,), weight_on=("output", "input")
    ),
    references=("quantized_experts.experts_quantized",),
)
def biases_and_weights_on_the_input_are_those_of_experts(case: Case) -> None:
    """The impostors leave a bias out, and put the weight on the other side."""
    config, experts = case["config"], float_experts(case)
    other = "input" if config.weight_on == "output" else "output"
    others = {f"weight on the {other}": value_of(
        case, config=dataclasses.replace(config, weight_on=other)
    )}  # fmt: skip
    for name in ("gate_up_bias", "down_bias"):
        if getattr(experts, name) is not None:
            without = dataclasses.replace(experts, **{name: None})  # type: ignore[arg-type]
            others[f"without {name}"] = value_of(case, experts=without)
    case.note(f"weight on the {config.weight_on}")
    case.note("with a map", case["expert_map"] is not None)
    judge_output(case, compute(case), spread_of(case), others)


@requirement(
    "QUANT-16",
    MUST,
    "experts_quantized",
    "A pair whose id is outside of the experts, or mapped to -1, MUST contribute nothing, whatever "
    "its weight; with `expert_map` ids MUST be looked up in it.",
    reason="Under expert parallelism most ids are somebody else's, and packed weights at the "
    "address that a wrong id leads to are numbers like any other.",
    sources=("SGLang #28170", "vLLM fused_marlin_moe: output.zero_()", "vLLM #42034"),
    given=quantized_inputs(
        bias=(False, True), expert_map=(True, True, False), invalid_ids=(True,), least_tokens=2
    ),
    references=("quantized_experts.experts_quantized",),
)
def packed_experts_that_are_not_here_contribute_nothing(case: Case) -> None:
    """Weights of such pairs are NaN; tokens that go nowhere get zeros, whatever was in memory."""
    held = len(case["experts"].down.packed)
    gone = local_ids(case["expert_ids"], held, case["expert_map"]) < 0
    ids = case["expert_ids"].clone()
    ids[:1] = -1
    gone[:1] = True
    weights = case["weights"].masked_fill(gone, torch.nan)
    given = arguments(case, weights=weights, expert_ids=ids)
    output = output_of(case.call("experts_quantized", **given, poison=True), case["x"])
    spread = spread_of(case, expert_ids=ids)
    others = {}
    if case["expert_map"] is not None:
        others["the map ignored"] = value_of(case, expert_ids=ids, expert_map=None)
    others["NaN for tokens that go nowhere"] = spread.value.masked_fill(
        gone.all(1)[:, None], torch.nan
    )
    mapped = case["expert_map"]
    case.note("with a map", mapped is not None)
    case.note("with a map of more than 8", mapped is not None and len(mapped) > 8)
    judge_output(case, output, spread, others)


@requirement(
    "QUANT-17",
    MUST,
    "experts_quantized",
    "With `is_k_full` False columns of down MUST be of the groups that its g_idx says, of which "
    "none needs to be complete.",
    reason="A tensor-parallel slice of act-order weights has columns of any group and the scales "
    "of all. A kernel that counts columns instead runs past the scales of the slice.",
    sources=("SGLang #35955", "SGLang #36822", "vLLM #11528"),
    given=quantized_inputs(formats=INTEGERS, partial=True, **PLAIN),
    references=("quantized_slicing.slice_quantized_tensor_parallel",),
)
def groups_of_a_slice_need_not_be_complete(case: Case) -> None:
    """The impostors ignore g_idx, and sort the columns without the rows of x."""
    down = case["drawn"]["down"]
    ignored = float_experts(case, down=down | {"g_idx": None})
    in_turn = float_experts(case, down=down | {"g_idx": down["g_idx"].sort(1).values})
    others = {
        "g_idx ignored": value_of(case, experts=ignored),
        "g_idx in order": value_of(case, experts=in_turn),
    }
    judge_output(case, compute(case), spread_of(case), others)


@requirement(
    "QUANT-18",
    MUST,
    "experts_quantized",
    "Padding of the packed matrices MUST NOT reach the output, nor an expert's NaN the tokens of "
    "other experts.",
    reason="A product over padded columns multiplies NaN by 0.",
    sources=("SGLang #9473", "triton #10190", "flashinfer #2372"),
    given=quantized_inputs(padding=(True,), **PLAIN),
    references=("quantized_experts.experts_quantized",),
)
def padding_never_reaches_the_output(case: Case) -> None:
    """All parts are the worst that there is outside of `shape`."""
    spread = spread_of(case)
    leaked = torch.full_like(spread.value, torch.nan)
    judge_output(case, compute(case), spread, {"NaN": leaked})


@requirement(
    "QUANT-23",
    MUST,
    "experts_quantized",
    "A token that is NaN or infinite MUST NOT change the output of any other token.",
    reason="The tokens of an expert are the rows of one tile; a mask that multiplies, or a scale "
    "that is taken over the tile, makes all of them what one of them is.",
    sources=("docs/spec/operations.md", "SGLang #30895", "vLLM #50845"),
    given=_takes_nan(quantized_inputs(least_tokens=2, **PLAIN | {"g_idx": (False, True)})),
    references=("quantized_experts.experts_quantized",),
)
def a_broken_token_breaks_no_other_of_packed_experts(case: Case) -> None:
    """The first token is NaN, the last infinite; those between are judged."""
    x = case["x"].clone()
    x[0] = torch.nan
    if len(x) > 2:
        x[-1] = torch.inf
    rows = slice(1, -1 if len(x) > 2 else None)
    whole = spread_of(case)
    expected = Spread(whole.value[rows], whole.sigma[rows], whole.freedom[rows])
    case.note(f"format {case['experts'].down.format}")
    wrong = torch.full_like(expected.value, torch.nan)
    case.judge(
        rule_of(expected, "output of the other tokens"),
        compute(case, x=x)[rows],
        [*wrong_outputs(expected), ("NaN", wrong)],
    )


@requirement(
    "QUANT-24",
    MUST,
    "experts_quantized",
    "Gradients of x, of the weights and of the biases MUST be those of `experts` on the unpacked "
    "weights.",
    reason="Adapters are trained through frozen packed experts: what goes back to x has to pass "
    "the same weights, by the same scales and the same order of columns.",
    sources=("docs/spec/quantization.md", "docs/spec/experts.md"),
    given=differentiable("experts_quantized", quantized_inputs(g_idx=(False, True))),
    references=("quantized_experts.experts_quantized",),
    kinds=2,
)
def gradients_go_through_the_unpacked_weights(case: Case) -> None:
    """Autograd on the target against autograd on the unpacked weights in float64."""
    biases = [
        f"experts.{name}"
        for name in ("gate_up_bias", "down_bias")
        if getattr(case["experts"], name) is not None
    ]
    answer = case.call(
        "experts_quantized",
        wrt=["x", "weights", *biases],
        cotangents={"": cotangent_of(case["x"])},
        **arguments(case),
    )
    output_of(answer, case["x"])
    case.note(f"format {case['experts'].down.format}")
    judge_gradients(case, arguments(case) | {"experts": float_experts(case)}, answer.gradients)


@requirement(
    "QUANT-19",
    MUST,
    "experts_quantized",
    "Zero tokens MUST give an output of shape [0, H]; a call on the same storage with other data "
    "MUST give the answer to the other data; neither MUST change an argument.",
    reason="A prepared weight layout is kept by address; the next layer's weights are written to "
    "the same one.",
    sources=("KernelBench result_reuse", "SGLang #25852", "torchtitan #1166", "MoE-Infinity #136"),
    given=quantized_inputs(changes=CHANGES, **PLAIN | {"g_idx": (False, True)}),
    references=("quantized_experts.experts_quantized",),
)
def other_experts_in_the_same_storage_are_other_experts(case: Case) -> None:
    """For the second call rows of x are turned round, and so are those of the codes, or one part of
    the matrices is another one; the third has no tokens."""
    drawn, x, what = case["drawn"], case["x"], case["changed"]
    if what == "everything":
        turned = {
            name: with_parts(each, lambda t: t.flip(1), "codes", "scales", "minima", "zeros")
            for name, each in drawn.items()
        }
    else:
        turned = {name: changed_part(each, what) for name, each in drawn.items()}
    case.note(f"other {what}")
    other = dataclasses.replace(
        case["experts"], **{name: packed(each) for name, each in turned.items()}
    )
    none = {name: case[name][:0] for name in ("x", "weights", "expert_ids")}
    moved = {"x": -x.flip(0), "experts": other}
    calls = [
        case.planned("experts_quantized", **arguments(case)),
        case.planned("experts_quantized", **arguments(case, **moved), reuse=0),
        case.planned("experts_quantized", **arguments(case, **none), layouts={}),
    ]
    answers = case.session(calls)
    before, again = output_of(answers[0], x), answers[0].afterwards
    output_of(answers[2], none["x"])
    expected = spread_of(case, x=moved["x"], experts=float_experts(case, **turned))
    changed = [path for each in answers for path in (*each.changed, *each.shared)]

    def rule(found: tuple[torch.Tensor, torch.Tensor, list[str]]) -> Closeness:
        now, kept, paths = found
        equal("the first answer, read again", kept, before)
        left_alone("experts_quantized")(paths)
        return rule_of(expected)(now)

    answer = output_of(answers[1], x)
    wrong: Impostors = [(name, (value, again, [])) for name, value in wrong_outputs(expected)]
    wrong += [
        ("written over", (answer, again + 1, [])),
        ("an argument changed", (answer, again, ["x"])),
    ]
    stale = value_of(case, x=moved["x"])
    if not torch.equal(stale, expected.value):
        wrong.append(("the first call's weights", (stale, again, [])))
    case.judge(rule, (answer, again, changed), wrong)


ROUNDED: dict[str, Any] = {
    # Blocks of both, weights and activations, are e4m3's alone.
    "formats": ("e4m3", "e4m3", "e4m3", *FORMATS),
    "granularity": ("block", "block", "channel", "tensor"),
    "g_idx": (False,),
    "bias": (False, True),
    "expert_map": (False, True),
    "invalid_ids": (False,),
    "activation_format": ("int8", "e4m3", "e4m3_block", "Q8_1"),
    # Blocks of one matrix are easily taken for those of the other.
    "mixed": (False, True, True),
}


def judge_rounded(case: Case, others: Values) -> None:
    """Judge an output with 8-bit activations; the steps tell most in float32."""
    experts = case["experts"]
    case.note(f"activations {experts.activation_format}")
    case.note("with a map", case["expert_map"] is not None)
    case.note(f"format {experts.down.format}")
    case.note(f"dtype {str(case['x'].dtype).removeprefix('torch.')}")
    cut = experts.activation_format == "int8" and experts.activation_scales is not None
    spreads = [
        spread_of(case, rounding_of(case, lowest))
        for lowest in ((-127.0, -128.0) if cut else (-127.0,))
    ]

    def rule(output: torch.Tensor) -> Closeness:
        *first, last = spreads
        for spread in first:
            try:
                return rule_of(spread)(output)
            except Violation:
                continue
        return rule_of(last)(output)

    value = spreads[0].value
    if case["x"].dtype is torch.float32:
        others = {"rows that were not rounded": value_of(case), **others}
    wrong = [
        *wrong_outputs(spreads[0]),
        *(each for each in others.items() if not torch.equal(each[1], value)),
    ]
    case.judge(rule, compute(case), wrong)


@requirement(
    "QUANT-21",
    MUST,
    "experts_quantized",
    "With an `activation_format` rows MUST be rounded to it before each product, with scales of "
    "their own: one for each row, for each block of `e4m3_block`, or for each 32 columns of Q8_1; "
    "a weight on the input MUST multiply x before it is rounded.",
    reason="8-bit activations are part of the model's numbers: a kernel that leaves one rounding "
    "out, or takes a scale over several rows, answers otherwise for the same checkpoint, and "
    "otherwise in each batch.",
    sources=("vLLM #50833", "hanzo-engine Q8_1 activations", "SGLang #33005"),
    given=quantized_inputs(activation_scales=(False,), **ROUNDED),
    references=("activation_quantization.round_activations",),
    kinds=4,
)
def rows_are_rounded_before_each_product(case: Case) -> None:
    """Held against the float64 product of rows that the oracle has rounded."""
    judge_rounded(case, {})


@requirement(
    "QUANT-22",
    MUST,
    "experts_quantized",
    "With `activation_scales` the rows of an expert MUST be rounded with its two scales, the first "
    "before gate_up and the second before down, and cut where they leave the range of the codes.",
    reason="Calibrated checkpoints bring these numbers. With another expert's, or the first for "
    "both products, nothing overflows and everything is a little wrong.",
    sources=("TensorRT-LLM #10780", "vLLM fused_experts a1_scale, a2_scale"),
    given=quantized_inputs(**ROUNDED | {"activation_format": STATIC, "activation_scales": (True,)}),
    references=("activation_quantization.round_activations",),
    kinds=2,
)
def fixed_scales_are_those_of_the_expert_and_the_product(case: Case) -> None:
    """The impostor has the two scales exchanged."""
    scales = case["experts"].activation_scales
    others = {}
    if case["x"].dtype is torch.float32 and not torch.equal(scales, scales.flip(1)):
        between = rounding_of(case, activation_scales=scales.flip(1))
        others["the two scales exchanged"] = spread_of(case, between).value
    judge_rounded(case, others)


@requirement(
    "QUANT-20",
    SHOULD,
    "experts_quantized",
    "Packed matrices, biases and arguments that do not fit each other SHOULD raise `ValueError` or "
    "`TypeError`; so SHOULD `is_k_full` where a group of down lacks columns.",
    reason="A kernel takes sizes from x and addresses from the packed words; what does not fit is "
    "read from somewhere else.",
    sources=("docs/spec/quantization.md", "SGLang #35955", "vLLM #50196", "vLLM #16801"),
    given=quantized_inputs(g_idx=(False, True), **PLAIN),
    references=("quantized_experts_checks.check_quantized_experts",),
)
def packed_experts_that_do_not_fit_raise(case: Case) -> None:
    """One argument is wrong at a time; every other case tries the other half."""
    good = arguments(case)
    x, weights, ids, experts = (good[n] for n in ("x", "weights", "expert_ids", "experts"))

    def changed(**fields: Any) -> dict[str, Any]:
        return {"experts": dataclasses.replace(experts, **fields)}

    down = experts.down
    E, H, _ = down.shape
    bad = {
        "x with a further column": {"x": torch.cat([x, x[:, :1]], 1)},
        "x of whole numbers": {"x": torch.ones_like(x, dtype=torch.int64)},
        "ids of a float dtype": {"expert_ids": ids.float()},
        "one row of weights too many": {"weights": torch.cat([weights, weights[:1]])},
        "weights that are not packed": {"experts": float_experts(case)},
        "codes of down that were cast": changed(
            down=dataclasses.replace(down, packed=down.packed.float())
        ),
        "a bias of one expert more": changed(down_bias=torch.zeros(E + 1, H)),
        "an activation format that there is not": changed(activation_format="int3"),
    }
    if len(set(experts.gate_up.shape[1:])) > 1:
        bad["gate_up in the place of down"] = changed(down=experts.gate_up)
    if down.g_idx is not None:
        groups = down.scales.shape[2]
        lacking = torch.zeros_like(down.g_idx)
        if groups > 1:
            bad["is_k_full with groups that lack columns"] = changed(
                down=dataclasses.replace(down, g_idx=lacking)
            )
        bad["a group past the last"] = changed(
            down=dataclasses.replace(down, g_idx=lacking + groups)
        )
    half = list(bad.items())[case["turn"] :: 2]
    must_raise(case, "experts_quantized", good, {name: good | wrong for name, wrong in half})
