import itertools

import pytest
import torch
from moe_reference.config import ExpertWeights
from moe_reference.experts import (
    LAYOUTS,
    Layout,
    from_layout,
    from_separate,
    infer_transposed,
    to_layout,
    to_separate,
)

SIZES = {"E": 3, "H": 5, "I": 4}
ALL_LAYOUTS = [
    Layout(*fields) for fields in itertools.product((False, True), (0, 1, 2, 4), (False, True))
]


def numbered(gated=True, bias=True):
    """Weights whose every entry tells its place."""
    E, H, I = SIZES.values()
    J = 2 * I if gated else I
    shapes = [(E, J, H), (E, H, I)] + ([(E, J), (E, H)] if bias else [])
    return ExpertWeights(*(torch.arange(float(torch.Size(s).numel())).view(s) for s in shapes))


def rows_by_hand(layout, intermediate):
    """For each row of a layout the canonical row that stands there."""
    width = layout.interleave or intermediate
    rows = []
    for start in range(0, intermediate, width):
        gate = list(range(start, start + width))
        up = [intermediate + row for row in gate]
        rows += up + gate if layout.up_first else gate + up
    return rows


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_layout_has_its_rows_where_it_says(layout, bias):
    experts = numbered(bias=bias)
    gate_up, down, gate_up_bias, down_bias = to_layout(layout, experts)
    rows = rows_by_hand(layout, SIZES["I"])
    expected, expected_down = experts.gate_up[:, rows], experts.down
    if layout.transposed:
        expected, expected_down = expected.mT, expected_down.mT
    assert torch.equal(gate_up, expected)
    assert torch.equal(down, expected_down)
    if bias:
        assert torch.equal(gate_up_bias, experts.gate_up_bias[:, rows])
        assert torch.equal(down_bias, experts.down_bias)
    back = from_layout(layout, gate_up, down, gate_up_bias, down_bias)
    assert same(vars(back).values(), vars(experts).values())


@pytest.mark.parametrize("transposed", [False, True])
def test_without_a_gate_there_is_only_the_transpose(transposed):
    experts = numbered(gated=False)
    stored = to_layout(Layout(transposed), experts, gated=False)
    assert stored[0].shape == ((3, 5, 4) if transposed else (3, 4, 5))
    back = from_layout(Layout(transposed), *stored, gated=False)
    assert same(vars(back).values(), vars(experts).values())


def test_published_layouts():
    gate, up = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    experts = from_separate(gate, up, torch.zeros(1, 1, 2))
    first_rows = {name: to_layout(layout, experts)[0] for name, layout in LAYOUTS.items()}
    order = {name: rows.flatten().tolist() for name, rows in first_rows.items()}
    assert order["transformers"] == order["vllm"] == order["megatron"] == [0, 0, 1, 1]
    assert order["flashinfer-cutlass"] == [1, 1, 0, 0]
    assert order["gpt-oss"] == order["transformers-gpt-oss"] == [0, 1, 0, 1]
    transposed = {name for name, rows in first_rows.items() if rows.shape == (1, 1, 4)}
    assert transposed == {"transformers-llama-4", "transformers-gpt-oss"}


@pytest.mark.parametrize("bias", [False, True])
def test_separate_weights_are_the_halves(bias):
    experts = numbered(bias=bias)
    gate, up, down, gate_bias, up_bias, down_bias = to_separate(experts)
    assert torch.equal(gate, experts.gate_up[:, :4])
    assert torch.equal(up, experts.gate_up[:, 4:])
    if bias:
        assert torch.equal(gate_bias, experts.gate_up_bias[:, :4])
        assert torch.equal(up_bias, experts.gate_up_bias[:, 4:])
    back = from_separate(gate, up, down, gate_bias, up_bias, down_bias)
    assert same(vars(back).values(), vars(experts).values())


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS.values()], ids=str)
def test_conversions_never_alias_and_keep_the_dtype(layout):
    experts = numbered()
    half = ExpertWeights(*(t.bfloat16() for t in vars(experts).values()))
    stored = to_layout(layout, half)
    back = vars(from_layout(layout, *stored)).values()
    separate = to_separate(half)
    for new in (*stored, *back, *separate):
        assert new.dtype == torch.bfloat16
        assert new.is_contiguous()
    storages = [t.untyped_storage().data_ptr() for t in (*vars(half).values(), *stored, *back)]
    storages += [t.untyped_storage().data_ptr() for t in separate]
    assert len(set(storages)) == len(storages)


def test_conversions_take_any_strides_and_pass_gradients():
    layout = LAYOUTS["transformers-gpt-oss"]
    gate_up = torch.randn(3, 8, 5, dtype=torch.float64).mT.requires_grad_()
    down = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def there_and_back(gate_up, down):
        canonical = from_layout(layout, gate_up, down)
        return to_layout(LAYOUTS["gpt-oss"], canonical)[:2]

    assert torch.equal(there_and_back(gate_up, down)[0], gate_up.mT)
    assert torch.autograd.gradcheck(there_and_back, (gate_up, down))


def test_both_shapes_together_always_tell():
    for hidden, intermediate in itertools.product(range(1, 33), repeat=2):
        plain = (torch.empty(1, 2 * intermediate, hidden), torch.empty(1, hidden, intermediate))
        assert infer_transposed(*plain) is False
        assert infer_transposed(*(t.mT for t in plain)) is True


def test_what_shapes_cannot_tell_is_refused():
    plain = (torch.zeros(2, 3, 5), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="gate_up: expected shapes that fit one way"):
        infer_transposed(*plain, gated=False)
    with pytest.raises(ValueError, match="fit together, plain or transposed"):
        infer_transposed(*plain)
    with pytest.raises(ValueError, match="fit together, plain or transposed"):
        infer_transposed(torch.zeros(2, 6, 5), torch.zeros(2, 3, 5))


GATE_UP, DOWN = torch.zeros(2, 6, 5), torch.zeros(2, 5, 3)
PLAIN = Layout()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: from_layout(PLAIN, GATE_UP.mT, DOWN),
            ValueError,
            r"gate_up: expected shape \[2, 6",
        ),
        (lambda: from_layout(PLAIN, GATE_UP.int(), DOWN), TypeError, "gate_up: expected dtype"),
        (lambda: from_layout(PLAIN, GATE_UP, DOWN[0]), ValueError, "down: expected shape"),
        (lambda: from_layout(PLAIN, GATE_UP, DOWN, DOWN), ValueError, "gate_up_bias: expected"),
        (lambda: from_layout(PLAIN, GATE_UP, DOWN, None, DOWN), ValueError, "down_bias: expected"),
        (
            lambda: from_layout(Layout(True), GATE_UP[0], DOWN),
            ValueError,
            r"gate_up: expected.*H, J",
        ),
        (
            lambda: from_layout(Layout(interleave=2), GATE_UP, DOWN),
            ValueError,
            "divide I = 3, got 2",
        ),
        (
            lambda: from_layout(Layout(up_first=True), GATE_UP[:, :3], DOWN, gated=False),
            ValueError,
            "layout: expected no order",
        ),
        (lambda: to_layout(PLAIN, ExpertWeights(GATE_UP, DOWN), False), ValueError, r"\[2, 3, 5\]"),
        (lambda: to_separate(ExpertWeights(GATE_UP[:, :3], DOWN)), ValueError, "gate_up: expected"),
        (lambda: from_separate(GATE_UP, GATE_UP[:1], DOWN), ValueError, "up: expected shape"),
        (lambda: from_separate(GATE_UP, GATE_UP, DOWN), ValueError, "gate_up: expected shape"),
        (
            lambda: from_separate(DOWN.mT, DOWN.mT, DOWN, GATE_UP[:, :3, 0]),
            TypeError,
            "up_bias: expected a tensor, got NoneType",
        ),
        (lambda: Layout(interleave=-1), ValueError, "interleave: expected at least 0"),
        (lambda: infer_transposed(GATE_UP, DOWN[:1]), ValueError, "down: expected shape"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
