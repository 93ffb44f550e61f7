"""Quantised checkpoints: files laid out as published ones, written by bit arithmetic of their own.

Nothing that is expected comes from the reference's own packing: words are put together bit by bit,
weights are (code - zero point) times scale, and fp8 and mxfp4 are read by transformers as well.
"""

import json

import numpy
import pytest
import torch
from moe_reference.checkpoints import Checkpoint
from moe_reference.config import ExpertsConfig, ExpertWeights
from moe_reference.experts import experts
from moe_reference.families import FAMILIES, TensorNames
from moe_reference.loading import load_experts, read_config
from moe_reference.placeholders import ExpertsPlaceholder
from moe_reference.quantized_experts import dequantize_experts, experts_quantized
from moe_reference.quantized_tensors import QuantizedExperts
from safetensors.torch import save_file

E, H, I = 3, 64, 32
B = 16
SIZES = ExpertsPlaceholder(E, H, I)
NAMES = TensorNames()
SILU = ExpertsConfig("silu")
PREFIX = "model.layers.1.mlp."
SHAPES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


@pytest.fixture
def draw():
    return numpy.random.default_rng(0)


def words(codes, bits, axis, order=None):
    """int32 words: the code that comes first along the axis in the lowest bits."""
    in_word = 32 // bits
    order = order or range(in_word)
    codes = numpy.moveaxis(numpy.asarray(codes), axis, -1).astype(numpy.int64)
    short = -codes.shape[-1] % in_word
    codes = numpy.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    packed = numpy.zeros((*codes.shape[:-1], codes.shape[-1] // in_word), numpy.int64)
    for place, code in enumerate(order):
        packed |= codes[..., code::in_word] << (bits * place)
    packed = numpy.where(packed >= 2**31, packed - 2**32, packed).astype(numpy.int32)
    return torch.from_numpy(numpy.ascontiguousarray(numpy.moveaxis(packed, -1, axis)))


def random_scales(draw, *shape):
    return (draw.random(shape) * 0.1 + 0.01).astype(numpy.float16)


def half(array):
    return torch.from_numpy(numpy.ascontiguousarray(array))


def written(tmp_path, stored, config, folder="model"):
    """A checkpoint's folder: the tensors, a router that is not quantised, and config.json."""
    path = tmp_path / folder
    path.mkdir()
    tensors = {name: each.contiguous().clone() for name, each in stored.items()}
    tensors[f"{PREFIX}gate.weight"] = torch.ones(E, H, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


def every_linear(make):
    """The tensors of all experts, and the weights that they stand for."""
    stored, weights = {}, {}
    for e in range(E):
        for product, (rows, columns) in SHAPES.items():
            parts, weight = make(product, rows, columns, e)
            stored |= {f"{PREFIX}experts.{e}.{product}.{part}": each
                       for part, each in parts.items()}  # fmt: skip
            weights[e, product] = torch.from_numpy(numpy.asarray(weight, numpy.float32))
    return stored, stacked(weights)


def stacked(weights):
    gate, up, down = (torch.stack([weights[e, product] for e in range(E)]) for product in SHAPES)
    return ExpertWeights(torch.cat([gate, up], dim=1), down)


def rows_and_routes(num_experts=E, hidden=H):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, hidden, generator=generator)
    ids = torch.randint(0, num_experts, (7, 2), generator=generator)
    return x, torch.rand(7, 2, generator=generator), ids


def check_same(loaded, expected, config=SILU):
    """The same weights, and the same outputs, to the bit."""
    unpacked = dequantize_experts(loaded)
    for name, want in vars(expected).items():
        have = getattr(unpacked, name)
        assert (have is None) == (want is None), name
        assert want is None or torch.equal(have, want), name
    x, weights, ids = rows_and_routes(*expected.down.shape[:2])
    assert torch.equal(
        experts_quantized(x, loaded, weights, ids, config),
        experts(x, expected, weights, ids, config),
    )


def loaded_from(path, names=NAMES, prefix=PREFIX, sizes=SIZES, **options):
    return load_experts(Checkpoint(path), names, prefix, sizes, read_config(path), **options)


# GPTQ


def gptq(draw, bits=4, group=B, symmetric=True, version="gptq", order=None, wrapped=False):
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]."""

    def make(product, rows, columns, e):
        size = columns if group == -1 else group
        groups = columns // size
        codes = draw.integers(0, 2**bits, (columns, rows))
        if symmetric:
            zeros = numpy.full((groups, rows), 2 ** (bits - 1))
        else:
            zeros = draw.integers(0 if version == "gptq_v2" or wrapped else 1, 2**bits,
                                  (groups, rows))  # fmt: skip
        scales = random_scales(draw, groups, rows)
        of_column = numpy.arange(columns) // size
        if order is not None:
            of_column = order[columns]
        stored_zeros = zeros if version == "gptq_v2" else (zeros - 1) % 2**bits
        parts = {
            "qweight": words(codes, bits, 0),
            "qzeros": words(stored_zeros, bits, 1),
            "scales": half(scales),
            "g_idx": torch.from_numpy(of_column.astype(numpy.int32)),
        }
        weight = (codes - zeros[of_column]) * scales[of_column].astype(numpy.float32)
        return parts, weight.T

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
              "desc_act": order is not None, "checkpoint_format": version}  # fmt: skip
    return (*every_linear(make), config)


def orders(draw):
    return {columns: draw.permutation(numpy.arange(columns) // B) for columns in (H, I)}


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "act_order"), [(B, False), (B, True), (-1, False)])
def test_gptq(tmp_path, draw, version, symmetric, group, act_order):
    order = orders(draw) if act_order else None
    stored, expected, config = gptq(draw, 4, group, symmetric, version, order)
    loaded = loaded_from(written(tmp_path, stored, config))
    assert loaded.gate_up.format == ("uint4b8" if symmetric else "uint4")
    assert (loaded.gate_up.g_idx is not None) == act_order
    assert loaded.activation_format is None
    check_same(loaded, expected)


def test_gptq_of_8_bits(tmp_path, draw):
    stored, expected, config = gptq(draw, 8)
    loaded = loaded_from(written(tmp_path, stored, config))
    assert loaded.down.format == "uint8b128"
    check_same(loaded, expected)


def test_a_zero_point_of_0_in_the_first_format_needs_to_be_told(tmp_path, draw):
    stored, expected, config = gptq(draw, symmetric=False, wrapped=True)
    path = written(tmp_path, stored, config)
    check_same(loaded_from(path, zero_points="v1_wrapped"), expected)
    wrong = dequantize_experts(loaded_from(path))
    # A 0 is read as 16: all others are right.
    assert 0.0 < (wrong.down != expected.down).float().mean() < 0.2


def test_a_file_that_says_v1_and_holds_v2(tmp_path, draw):
    stored, expected, config = gptq(draw, version="gptq_v2")
    path = written(tmp_path, stored, {**config, "checkpoint_format": "gptq"})
    with pytest.raises(ValueError, match=r"gate_proj\.qzeros: expected zero points of 8, .* got 9"):
        loaded_from(path)
    check_same(loaded_from(path, zero_points="v2"), expected)


def test_an_expert_in_order_beside_one_with_act_order(tmp_path, draw):
    order = orders(draw)
    stored, expected, config = gptq(draw, order=order)
    other, plain, _ = gptq(draw)
    for name in other:
        if ".experts.1." in name:
            stored[name] = other[name]
    expected.gate_up[1], expected.down[1] = plain.gate_up[1], plain.down[1]
    check_same(loaded_from(written(tmp_path, stored, config)), expected)


def test_gate_and_up_in_different_orders_are_refused(tmp_path, draw):
    stored, _, config = gptq(draw, order=orders(draw))
    name = f"{PREFIX}experts.2.up_proj.g_idx"
    stored[name] = stored[name].flip(0)
    with pytest.raises(ValueError, match=r"2\.gate_proj and up_proj: .* the same g_idx in all"):
        loaded_from(written(tmp_path, stored, config))


# AWQ


def test_awq(tmp_path, draw):
    def make(product, rows, columns, e):
        codes = draw.integers(0, 16, (columns, rows))
        zeros = draw.integers(0, 16, (columns // B, rows))
        scales = random_scales(draw, columns // B, rows)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {
            "qweight": words(codes, 4, 1, order),
            "qzeros": words(zeros, 4, 1, order),
            "scales": half(scales),
        }
        return parts, ((codes - zeros.repeat(B, 0)) * scales.repeat(B, 0).astype(numpy.float32)).T

    stored, expected = every_linear(make)
    config = {"quant_method": "awq", "bits": 4, "group_size": B, "zero_point": True,
              "version": "gemm", "modules_to_not_convert": ["gate"]}  # fmt: skip
    loaded = loaded_from(written(tmp_path, stored, config))
    assert loaded.gate_up.format == "uint4"
    check_same(loaded, expected)


# compressed-tensors


def compressed(format, weights, activations=None, targets=("Linear",)):
    group = {"targets": list(targets), "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip


def packed_integers(draw, bits, symmetric, strategy, order=None):
    """Signed codes and zero points, 2^(bits - 1) added to both, words along the columns; zero
    points along the rows."""
    middle = 2 ** (bits - 1)

    def make(product, rows, columns, e):
        size = B if strategy == "group" else columns
        codes = draw.integers(-middle, middle, (rows, columns))
        scales = random_scales(draw, *((1,) if strategy == "tensor" else (rows, columns // size)))
        parts = {
            "weight_packed": words(codes + middle, bits, 1),
            "weight_shape": torch.tensor([rows, columns]),
            "weight_scale": half(scales),
        }
        zeros = numpy.zeros((rows, columns // size), int)
        if not symmetric:
            zeros = draw.integers(-middle, middle, zeros.shape)
            parts["weight_zero_point"] = words(zeros + middle, bits, 0)
        of_column = numpy.arange(columns) // size
        if order is not None:
            of_column = order[columns]
            parts["weight_g_idx"] = torch.from_numpy(of_column.astype(numpy.int32))
        of_rows = numpy.broadcast_to(scales, zeros.shape)
        weight = (codes - zeros[:, of_column]) * of_rows[:, of_column].astype(numpy.float32)
        return parts, weight

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
               "group_size": B if strategy == "group" else None,
               "actorder": None if order is None else "group"}  # fmt: skip
    return (*every_linear(make), compressed("pack-quantized", weights))


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_compressed_integers_in_words(tmp_path, draw, bits, symmetric, strategy):
    stored, expected, config = packed_integers(draw, bits, symmetric, strategy)
    loaded = loaded_from(written(tmp_path, stored, config))
    names = {(4, True): "uint4b8", (4, False): "uint4", (8, True): "uint8b128"}
    assert loaded.gate_up.format == names[bits, symmetric]
    check_same(loaded, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_integers_with_act_order(tmp_path, draw, symmetric):
    stored, expected, config = packed_integers(draw, 4, symmetric, "group", orders(draw))
    loaded = loaded_from(written(tmp_path, stored, config))
    assert loaded.down.g_idx is not None
    check_same(loaded, expected)


def test_a_g_idx_of_minus_one_is_none(tmp_path, draw):
    stored, expected, config = packed_integers(draw, 4, True, "group")
    for e in range(E):
        for product, (_, columns) in SHAPES.items():
            name = f"{PREFIX}experts.{e}.{product}.weight_g_idx"
            stored[name] = torch.full((columns,), -1, dtype=torch.int32)
    check_same(loaded_from(written(tmp_path, stored, config)), expected)


def test_rows_and_columns_that_fill_no_whole_words(tmp_path, draw):
    """12 rows and 20 columns: the last words are half empty, of zero points too."""
    sizes = ExpertsPlaceholder(1, 20, 12)
    stored, weights = {}, {}
    for product, (rows, columns) in {"gate_proj": (12, 20), "up_proj": (12, 20),
                                     "down_proj": (20, 12)}.items():  # fmt: skip
        codes, zeros = draw.integers(0, 16, (rows, columns)), draw.integers(0, 16, (rows, 1))
        scales = random_scales(draw, rows, 1)
        name = f"{PREFIX}experts.0.{product}."
        stored |= {
            f"{name}weight_packed": words(codes, 4, 1),
            f"{name}weight_zero_point": words(zeros, 4, 0),
            f"{name}weight_scale": half(scales),
            f"{name}weight_shape": torch.tensor([rows, columns]),
        }
        weights[product] = torch.from_numpy((codes - zeros) * scales.astype(numpy.float32))[None]
    settings = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}
    path = written(tmp_path, stored, compressed("pack-quantized", settings))
    gate_up = torch.cat([weights["gate_proj"], weights["up_proj"]], dim=1)
    check_same(loaded_from(path, sizes=sizes), ExpertWeights(gate_up, weights["down_proj"]))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_plain_integers(tmp_path, draw, strategy):
    def make(product, rows, columns, e):
        codes = draw.integers(-128, 128, (rows, columns))
        scales = random_scales(draw, *((rows, 1) if strategy == "channel" else (1,)))
        parts = {"weight": torch.from_numpy(codes.astype(numpy.int8)), "weight_scale": half(scales)}
        return parts, codes * scales.astype(numpy.float32)

    stored, expected = every_linear(make)
    rows = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
    path = written(tmp_path, stored, compressed("int-quantized", weights, rows))
    assert loaded_from(path).activation_format == "int8"
    check_same(loaded_from(path, round_activations=False), expected)


def float8(draw, rows, columns):
    """Random bytes without the two NaNs, and what they stand for by the definition of e4m3."""
    bytes_ = draw.integers(0, 256, (rows, columns)).astype(numpy.uint8)
    bytes_[bytes_ & 0x7F == 0x7F] = 0
    exponent, mantissa = (bytes_ >> 3 & 15).astype(int), (bytes_ & 7) / 8
    size = numpy.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values = numpy.where(bytes_ & 0x80, -size, size)
    return torch.from_numpy(bytes_).view(torch.float8_e4m3fn), values


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_float8(tmp_path, draw, strategy):
    def make(product, rows, columns, e):
        codes, values = float8(draw, rows, columns)
        scales = random_scales(draw, *((rows, 1) if strategy == "channel" else (1,)))
        return {"weight": codes, "weight_scale": half(scales)}, values * scales.astype(
            numpy.float32
        )

    stored, expected = every_linear(make)
    rows = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    path = written(tmp_path, stored, compressed("float-quantized", weights, rows))
    loaded = loaded_from(path)
    assert (loaded.gate_up.format, loaded.activation_format) == ("e4m3", "e4m3")
    check_same(loaded_from(path, round_activations=False), expected)


def test_float8_with_fixed_scales_of_activations(tmp_path, draw):
    given = {"gate_proj": 0.25, "up_proj": 0.25, "down_proj": 0.5}

    def make(product, rows, columns, e):
        codes, values = float8(draw, rows, columns)
        parts = {"weight": codes, "weight_scale": torch.tensor(0.5)}
        parts["input_scale"] = torch.tensor([given[product] * (e + 1)])
        return parts, values * 0.5

    stored, expected = every_linear(make)
    rows = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    path = written(tmp_path, stored, compressed("float-quantized", weights, rows))
    loaded = loaded_from(path)
    assert loaded.activation_scales.tolist() == [[0.25, 0.5], [0.5, 1.0], [0.75, 1.5]]
    check_same(loaded_from(path, round_activations=False), expected)
    # The same file under the other method that writes such files.
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    again = loaded_from(written(tmp_path, stored, config, "again"))
    assert torch.equal(again.activation_scales, loaded.activation_scales)
    check_same(loaded_from(tmp_path / "again", round_activations=False), expected)
    stored[f"{PREFIX}experts.1.up_proj.input_scale"] += 1
    with pytest.raises(ValueError, match=r"1\.up_proj\.input_scale: expected that of gate_proj"):
        loaded_from(written(tmp_path, stored, config, "other"))


def test_the_group_that_names_the_experts_goes_before_the_class(tmp_path, draw):
    stored, expected, config = packed_integers(draw, 4, True, "group")
    other = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["config_groups"] = {
        "group_0": {"targets": ["Linear"], "weights": other, "format": "float-quantized"},
        "group_1": config["config_groups"]["group_0"]
        | {"targets": [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"]},
    }
    check_same(loaded_from(written(tmp_path, stored, config)), expected)


# fp8 in blocks


def blocks_of_float8(draw, sizes, dtype=torch.float32):
    stored, weights = {}, {}
    H, I = sizes.hidden_size, sizes.intermediate_size
    for product, (rows, columns) in {"gate_proj": (I, H), "up_proj": (I, H),
                                     "down_proj": (H, I)}.items():  # fmt: skip
        codes, _ = float8(draw, rows, columns)
        powers = draw.integers(-8, 0, (-(-rows // 128), -(-columns // 128)))
        scales = torch.from_numpy(2.0**powers).float()
        if dtype == torch.float32:
            scales = scales * 1.7
        name = f"{PREFIX}experts.0.{product}."
        stored |= {f"{name}weight": codes, f"{name}weight_scale_inv": scales.to(dtype)}
        weights[product] = (codes, scales)
    return stored, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_float8_in_blocks(tmp_path, draw, dtype):
    """H = 320 is no multiple of 128: the last blocks are short, as in DeepSeek's files."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers import FineGrainedFP8Config

    sizes = ExpertsPlaceholder(1, 320, 256)
    stored, weights = blocks_of_float8(draw, sizes, dtype)
    # DeepSeek-V3 has the entry `fmt`, too.
    config = {**FineGrainedFP8Config().to_dict(), "fmt": "e4m3"}
    path = written(tmp_path, stored, config)
    loaded = loaded_from(path, sizes=sizes)
    assert (loaded.gate_up.group_size, loaded.activation_format) == (128, "e4m3_block")
    theirs = {product: finegrained._dequantize_fp8_weight(*each, [128, 128], torch.float32)[None]
              for product, each in weights.items()}  # fmt: skip
    by_hand = {
        product: torch.tensor(
            [[codes.float()[o, k] * scales[o // 128, k // 128] for k in (0, 127, 128, 191)]
             for o in (0, 127, 128, 190)])
        for product, (codes, scales) in weights.items()
    }  # fmt: skip
    for product, want in by_hand.items():
        assert torch.equal(theirs[product][0][[0, 127, 128, 190]][:, [0, 127, 128, 191]], want)
    gate_up = torch.cat([theirs["gate_proj"], theirs["up_proj"]], dim=1)
    unrounded = loaded_from(path, sizes=sizes, round_activations=False)
    check_same(unrounded, ExpertWeights(gate_up, theirs["down_proj"]))


def test_a_block_with_rows_of_gate_and_up_is_refused(tmp_path, draw):
    sizes = ExpertsPlaceholder(1, 128, 192)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = written(tmp_path, blocks_of_float8(draw, sizes)[0], config)
    with pytest.raises(ValueError, match=r"a multiple of 128 rows, the block of e4m3, .* got 192"):
        loaded_from(path, sizes=sizes)


# mxfp4


def test_mxfp4_stacks(tmp_path, draw):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from transformers import Mxfp4Config

    names, prefix = FAMILIES["gpt-oss"].names, "model.layers.0.mlp."
    stored = {}
    for product, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        blocks = draw.integers(0, 256, (E, rows, columns // 32, 16)).astype(numpy.uint8)
        scales = draw.integers(110, 130, (E, rows, columns // 32)).astype(numpy.uint8)
        bias = torch.from_numpy(draw.standard_normal((E, rows))).bfloat16()
        name = f"{prefix}experts.{product}"
        stored |= {
            f"{name}_blocks": torch.from_numpy(blocks),
            f"{name}_scales": torch.from_numpy(scales),
            f"{name}_bias": bias,
        }
    path = written(tmp_path, stored, Mxfp4Config().to_dict())
    loaded = loaded_from(path, names, prefix)
    # They come out as [E, in, out], with the rows of gate and up in turn.
    gate_up, down = (
        mxfp4.convert_moe_packed_tensors(
            stored[f"{prefix}experts.{product}_blocks"],
            stored[f"{prefix}experts.{product}_scales"],
            dtype=torch.float32,
        ).transpose(1, 2)
        for product in ("gate_up_proj", "down_proj")
    )
    bias = stored[f"{prefix}experts.gate_up_proj_bias"]
    expected = ExpertWeights(
        torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1),
        down.contiguous(),
        torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1),
        stored[f"{prefix}experts.down_proj_bias"],
    )
    check_same(loaded, expected, ExpertsConfig("swigluoai"))


def test_compressed_mxfp4(tmp_path, draw):
    values = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def make(product, rows, columns, e):
        codes = draw.integers(0, 16, (rows, columns))
        exponents = draw.integers(110, 130, (rows, columns // 32))
        parts = {
            "weight_packed": torch.from_numpy(codes[:, ::2] + 16 * codes[:, 1::2]).byte(),
            "weight_scale": torch.from_numpy(exponents).byte(),
        }
        return parts, values[codes] * 2.0 ** (exponents.repeat(32, 1) - 127)

    stored, expected = every_linear(make)
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    path = written(tmp_path, stored, compressed("mxfp4-pack-quantized", weights))
    check_same(loaded_from(path), expected)


# parts of a checkpoint


def test_a_rank_reads_its_own_experts(tmp_path, draw):
    stored, expected, config = gptq(draw)
    path = written(tmp_path, stored, config)
    asked = []

    class Watched(Checkpoint):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    loaded = load_experts(Watched(path), NAMES, PREFIX, SIZES, config, held=[2, 0])
    check_same(loaded, ExpertWeights(expected.gate_up[[2, 0]], expected.down[[2, 0]]))
    assert {name.split(".")[5] for name in asked} == {"0", "2"}
    # Each once; to see whether gate is packed, one name that there is not is asked for.
    read = [name for name in asked if name.rsplit(".", 1)[1] not in ("weight", "bias")]
    assert len(read) == len(set(read)) == 2 * 3 * 4
    none = load_experts(Checkpoint(path), NAMES, PREFIX, SIZES, config, held=[])
    assert none.down.shape == (0, H, I)


def test_biases_come_along(tmp_path, draw):
    stored, expected, config = gptq(draw)
    biases = {}
    for e in range(E):
        for product, (rows, _) in SHAPES.items():
            biases[e, product] = torch.from_numpy(draw.standard_normal(rows)).half()
            stored[f"{PREFIX}experts.{e}.{product}.bias"] = biases[e, product]
    gate, up, down = (torch.stack([biases[e, product] for e in range(E)]) for product in SHAPES)
    path = written(tmp_path, stored, config)
    want = ExpertWeights(expected.gate_up, expected.down, torch.cat([gate, up], dim=1), down)
    check_same(loaded_from(path), want)


def test_experts_that_were_left_out_are_floats(tmp_path, draw):
    _, expected, config = gptq(draw)
    stored = {}
    for e in range(E):
        gate, up = expected.gate_up[e].chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": expected.down[e]}
        for product, weight in parts.items():
            stored[f"{PREFIX}experts.{e}.{product}.weight"] = weight.bfloat16()
    loaded = loaded_from(written(tmp_path, stored, config))
    assert isinstance(loaded, ExpertWeights)
    assert torch.equal(loaded.gate_up, expected.gate_up.bfloat16())


def test_a_loaded_tensor_shares_no_memory_with_the_source(draw):
    stored, _, config = gptq(draw)
    loaded = load_experts(stored, NAMES, PREFIX, SIZES, config)
    before = dequantize_experts(loaded)
    for tensor in stored.values():
        tensor.zero_()
    assert torch.equal(dequantize_experts(loaded).gate_up, before.gate_up)


def test_configurations_as_transformers_writes_them(draw):
    config = pytest.importorskip("transformers.utils.quantization_config")
    stored, expected, _ = gptq(draw, symmetric=False, order=orders(draw))
    theirs = config.GPTQConfig(bits=4, group_size=B, desc_act=True, sym=False).to_dict()
    check_same(load_experts(stored, NAMES, PREFIX, SIZES, theirs), expected)
    theirs = config.AwqConfig(bits=4, group_size=B).to_dict()
    with pytest.raises(ValueError, match=r"gate_proj.qweight: expected shape \[1, D, 4\], got"):
        load_experts(stored, NAMES, PREFIX, SIZES, theirs)


# files and configurations that are refused


def without(part, e=1, product="up_proj"):
    def change(stored, config):
        del stored[f"{PREFIX}experts.{e}.{product}.{part}"]

    return change


def replaced(part, change_of, e=1, product="up_proj"):
    def change(stored, config):
        name = f"{PREFIX}experts.{e}.{product}.{part}"
        stored[name] = change_of(stored[name])

    return change


def configured(**entries):
    def change(stored, config):
        config |= entries

    return change


NAME = r"model\.layers\.1\.mlp\.experts\.1\.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("qweight"), rf"tensors: expected '{NAME}\.qweight', got no such name"),
        (without("qzeros"), rf"tensors: expected '{NAME}\.qzeros', got no such name"),
        (without("scales"), rf"tensors: expected '{NAME}\.scales', got no such name"),
        (replaced("qweight", lambda t: t[:-1]), rf"{NAME}\.g_idx: expected shape \[1, 56\]"),
        (replaced("qweight", lambda t: t[:, :-1]), rf"{NAME}\.qweight: expected shape \[1, D / 8"),
        (replaced("scales", lambda t: t[:1]), rf"{NAME}\.qzeros: expected shape \[1, 1, 4\]"),
        (replaced("g_idx", lambda t: t[1:]), rf"{NAME}\.g_idx: expected shape \[1, 64\]"),
        (replaced("g_idx", lambda t: t + 9), rf"{NAME}\.qweight\.g_idx: expected groups from 0 to"),
        (replaced("scales", lambda t: t.int()), rf"{NAME}\.scales: expected dtype .* got int32"),
        (configured(quant_method="bitsandbytes"), r"quant_method of 'gptq' or .* got 'bitsandby"),
        (configured(quant_method="mxfp4"), r"quant_method of 'gptq' or .* got 'mxfp4'"),
        (configured(bits=3), "config: expected bits of 4 or 8, got 3"),
        (configured(bits=None), "config: expected bits of 4 or 8, got None"),
        (configured(bits=8, sym=False), "config: expected sym of True, got False"),
        (configured(group_size=32), "expected a group_size of 16, which .* has, got 32"),
        (
            configured(checkpoint_format="marlin"),
            "checkpoint_format of 'gptq' or 'gptq_v2', got 'm",
        ),
    ],
)
def test_a_file_that_does_not_hold_the_experts_is_refused(tmp_path, draw, change, message):
    stored, _, config = gptq(draw)
    change(stored, config)
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        loaded_from(written(tmp_path, stored, config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("weight_shape"), rf"expected '{NAME}\.weight_shape', got no such name"),
        (without("weight_zero_point"), rf"expected '{NAME}\.weight_zero_point', got no such name"),
        (
            replaced("weight_packed", lambda t: t[:, 1:]),
            rf"{NAME}\.weight_packed: expected shape \[32, 8\], got \[32, 7\]",
        ),
        (
            replaced("weight_zero_point", lambda t: t[1:]),
            rf"{NAME}\.weight_zero_point: expected shape \[4, 4\], got \[3, 4\]",
        ),
        (
            replaced("weight_scale", lambda t: t[:, 1:]),
            rf"{NAME}\.weight_zero_point: expected shape \[4, 3\]",
        ),
        (configured(format="sparse-bitmask"), "format of 'pack-quantized' or .* got 'sparse"),
        (
            configured(config_groups={}),
            "expected a group with a target for '.*gate_proj', got none",
        ),
    ],
)
def test_a_compressed_file_that_does_not_hold_the_experts_is_refused(
    tmp_path, draw, change, message
):
    stored, _, config = packed_integers(draw, 4, False, "group")
    change(stored, config)
    with pytest.raises(ValueError, match=message):
        loaded_from(written(tmp_path, stored, config))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3}, "num_bits of 4 or 8, got 3"),
        ({"num_bits": 8, "symmetric": False}, "symmetric of True, got False"),
        ({"type": "float"}, "type of 'int', got 'float'"),
        ({"strategy": "block"}, "strategy of 'group' or 'channel' or 'tensor', got 'block'"),
    ],
)
def test_compressed_schemes_that_are_not_read(draw, weights, message):
    stored, _, config = packed_integers(draw, 4, True, "group")
    config["config_groups"]["group_0"]["weights"] |= weights
    with pytest.raises(ValueError, match=f"config: expected {message}"):
        load_experts(stored, NAMES, PREFIX, SIZES, config)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}, "num_bits of 8"),
        ({"num_bits": 8, "strategy": "tensor", "dynamic": True}, "strategy of 'token', got"),
        ({"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}, "symmetric"),
    ],
)
def test_activations_that_are_not_rounded_so_are_refused_unless_left_alone(draw, rows, message):
    stored, expected, config = packed_integers(draw, 4, True, "group")
    config["config_groups"]["group_0"]["input_activations"] = rows
    with pytest.raises(ValueError, match=message):
        load_experts(stored, NAMES, PREFIX, SIZES, config)
    loaded = load_experts(stored, NAMES, PREFIX, SIZES, config, round_activations=False)
    check_same(loaded, expected)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"scale_fmt": "ue8m0"}, "scale_fmt of None or 'float', got 'ue8m0'"),
        ({"activation_scheme": "static"}, "activation_scheme of 'dynamic', got 'static'"),
        ({"weight_block_size": [128, 64]}, r"as high as they are wide, got \[128, 64\]"),
        ({"expert_dtype": "fp4"}, "expert_dtype of 'fp8', got 'fp4'"),
        ({"weight_block_size": [64, 64]}, r"scale_inv: expected shape \[2, 2\], got \[1, 1\]"),
        ({"weight_block_size": None}, r"scale_inv: expected shape \[1, 1\], got \[2, 2\]"),
    ],
)
def test_float8_schemes_that_are_not_read(draw, entries, message):
    sizes = ExpertsPlaceholder(1, 128, 128)
    stored, _ = blocks_of_float8(draw, sizes)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]} | entries
    if entries.get("weight_block_size", 0) is None:
        name = f"{PREFIX}experts.0.gate_proj.weight_scale_inv"
        stored[name] = stored[name].expand(2, 2)
    with pytest.raises(ValueError, match=message):
        load_experts(stored, NAMES, PREFIX, sizes, config)


def test_experts_of_another_size_are_refused(draw):
    stored, _, config = gptq(draw)
    message = (
        r"experts\.0\.gate_proj: expected 40 rows \(out\) and 64 columns \(in\), got 32 and 64"
    )
    with pytest.raises(ValueError, match=message):
        load_experts(stored, NAMES, PREFIX, ExpertsPlaceholder(E, H, 40), config)
    with pytest.raises(
        ValueError, match=r"expected '.*experts\.3\.gate_proj\.qweight', got no such"
    ):
        load_experts(stored, NAMES, PREFIX, ExpertsPlaceholder(E + 1, H, I), config)


def test_no_experts_at_all(tmp_path):
    path = written(tmp_path, {}, {"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"expected 'model.layers.1.mlp.experts.gate_up_proj', al"):
        loaded_from(path)
    with pytest.raises(ValueError, match="held: expected experts below 3, got 3"):
        loaded_from(path, held=[3])


def test_stacks_of_mxfp4_that_do_not_fit_are_refused():
    names = FAMILIES["gpt-oss"].names
    stored = {}
    for product, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        stored |= {
            f"experts.{product}_blocks": torch.zeros(E, rows, columns // 32, 16).byte(),
            f"experts.{product}_scales": torch.zeros(E, rows, columns // 32).byte(),
        }
    config = {"quant_method": "mxfp4"}
    assert isinstance(load_experts(stored, names, "", SIZES, config), QuantizedExperts)
    cases = [
        ({"experts.down_proj_scales": None}, "expected 'experts.down_proj_scales', got no such"),
        (
            {"experts.down_proj_scales": torch.zeros(E, H, 2).byte()},
            r"\[3, 64, 1\], got \[3, 64, 2",
        ),
        ({"experts.down_proj_blocks": torch.zeros(E, H, 1, 32).byte()}, r"\[E, O, G, 16\]"),
        ({"experts.down_proj_bias": torch.zeros(E, H + 1)}, r"down_proj_bias: expected shape"),
    ]
    for change, message in cases:
        changed = {name: each for name, each in (stored | change).items() if each is not None}
        with pytest.raises(ValueError, match=message):
            load_experts(changed, names, "", SIZES, config)
    with pytest.raises(ValueError, match=r"blocks: expected \[3, 80, 64\] codes, got \[3, 64, 64"):
        load_experts(stored, names, "", ExpertsPlaceholder(E, H, 40), config)
    with pytest.raises(ValueError, match="quant_method of 'mxfp4', got None"):
        load_experts(stored, names, "", SIZES)
