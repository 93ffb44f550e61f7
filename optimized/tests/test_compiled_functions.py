"""Every function that a user may call is one graph to `torch.compile`, with the same results."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from moe_optimized import (
    alignment,
    compiling,
    dispatch,
    gating,
    load_balancing,
    operators,
    quantized_experts,
    quantized_operators,
)
from moe_optimized.interpreter import launches
from moe_optimized.quantized_layout import prepare
from moe_reference.config import BalanceConfig, ExpertsConfig, RoutingConfig
from moe_reference.quantization import quantize
from moe_reference.quantized_tensors import QuantizedExperts

T, K, E, H, I = 9, 2, 4, 32, 32


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def packed(prepared=False, biased=False, **options):
    options = options or {"format": "uint4", "group_size": 16}
    biases = (leaf(E, 2 * I), leaf(E, H)) if biased else (None, None)
    matrices = (quantize(torch.randn(E, *sides), **options) for sides in ((2 * I, H), (H, I)))
    experts = QuantizedExperts(*matrices, *biases)
    return prepare(experts) if prepared else experts


def ids(low=-1):
    return torch.randint(low, E + 1, (T, K))


def routing(how, token_ids=False):
    table = torch.randint(0, E, (7, K)) if token_ids else None
    config = RoutingConfig(K, renormalize=True, hash_table=table, num_groups=2, **how)
    return leaf(T, E), config, torch.rand(E), torch.randint(0, 7, (T,)) if token_ids else None


# The function's module and name, and arguments.
CASES = {
    "route": (gating, "route", lambda: routing({"topk_groups": 1})),
    "route hashed": (gating, "route", lambda: routing({"topk_groups": 2}, token_ids=True)),
    "route_with_counts": (
        gating,
        "route_with_counts",
        lambda: (*routing({"topk_groups": 1}), torch.rand(T) < 0.7, torch.int32),
    ),
    "align": (alignment, "align", lambda: (ids(), 4, E)),
    "align mapped": (alignment, "align", lambda: (ids(), 4, E, torch.arange(E) - 1, True)),
    "align_batched": (alignment, "align_batched", lambda: (torch.tensor([2, 0, 3, 5]), 5, 4)),
    "dispatch": (dispatch, "dispatch", lambda: (leaf(T, H), ids(), E)),
    "combine": (
        dispatch,
        "combine",
        lambda: (leaf(T * K, H), torch.randperm(T * K + 1)[: T * K], leaf(T, K)),
    ),
    "balance_loss": (
        load_balancing,
        "balance_loss",
        lambda: (leaf(T, E), ids(), BalanceConfig("switch", 0.1), torch.rand(T) < 0.7),
    ),
    "balance_loss of sequences": (
        load_balancing,
        "balance_loss",
        lambda: (
            leaf(T, E),
            ids(),
            BalanceConfig("deepseek_sequence", 0.1, "sigmoid", sequence_length=3),
        ),
    ),
    "balance_loss of devices": (
        load_balancing,
        "balance_loss",
        lambda: (
            leaf(T, E),
            ids(),
            BalanceConfig("deepseek_device", num_devices=2),
            None,
            torch.arange(E),
        ),
    ),
    "z_loss": (load_balancing, "z_loss", lambda: (leaf(T, E), torch.rand(T) < 0.7)),
    "update_bias": (load_balancing, "update_bias", lambda: (leaf(E), torch.arange(E), 0.1, True)),
    "dequantize": (quantized_experts, "dequantize", lambda: (packed().down,)),
    "dequantize blocks": (
        quantized_experts,
        "dequantize",
        lambda: (packed(format="Q8_0").gate_up,),
    ),
    "experts_quantized": (
        quantized_experts,
        "experts_quantized",
        lambda: (torch.randn(T, H), packed(), torch.rand(T, K), ids(), ExpertsConfig()),
    ),
    "experts_quantized prepared": (
        quantized_experts,
        "experts_quantized",
        lambda: (
            torch.randn(T, H).half(),
            packed(prepared=True),
            torch.rand(T, K),
            ids(),
            ExpertsConfig(weight_on="input"),
            torch.tensor([1, 0, -1, 3, 2]),
        ),
    ),
}
FORMS = [
    pytest.param(case, form, marks=pytest.mark.triton if form == "_triton" else ())
    for case in CASES
    for form in ("", "_torch", "_triton")
]


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


def gradients(out, wanted):
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad(out, wanted, cotangent.to(out.dtype))


def assert_same(compiled, function, arguments, every_row=False):
    """The results, and the gradients of the first one. With `every_row` ours may have more rows."""
    ours, theirs = (tensors(run(*arguments)) for run in (compiled, function))
    for mine, other in zip(ours, theirs, strict=True):
        if every_row and mine.shape != other.shape:
            # Without a GPU only the operator of dispatch has those of nobody.
            assert mine.shape[0] == T * K
            assert (mine[len(other) :] == (T * K if mine.ndim == 1 else 0)).all()
            mine = mine[: len(other)]
        assert mine.dtype is other.dtype
        assert mine.requires_grad == other.requires_grad
        assert mine.stride() == other.stride()
        torch.testing.assert_close(mine, other)
    if theirs[0].requires_grad:
        wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        mine = ours[0][: len(theirs[0])] if theirs[0].ndim else ours[0]
        for one, other in zip(gradients(mine, wanted), gradients(theirs[0], wanted), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_functions_are_one_graph(case, form):
    module, name, make = CASES[case]
    function, arguments = getattr(module, name + form), make()
    compiled = torch.compile(
        lambda *arguments: function(*arguments), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled, function, arguments, every_row=function is dispatch.dispatch_triton)
    before = launches.copy()
    compiled(*arguments)
    assert (launches != before) is (form == "_triton")


@pytest.mark.triton
@pytest.mark.parametrize("case", [case for case in CASES if "align" not in case])
def test_what_takes_the_kernels_on_a_gpu_is_one_graph(case, monkeypatch):
    module, name, make = CASES[case]
    monkeypatch.setattr(module, "has_kernels", lambda _: True)
    compiled = torch.compile(getattr(module, name), fullgraph=True, backend="aot_eager")
    before = launches.copy()
    assert_same(compiled, getattr(module, name), make(), every_row=name == "dispatch")
    assert launches != before


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "Q4_K"}, {"format": "uint4b8", "group_size": -1}, {"prepared": True}],
    ids=str,
)
def test_packed_experts_with_gradients_are_one_graph(options, monkeypatch):
    if options.get("format") == "Q4_K":
        monkeypatch.setattr(f"{__name__}.H", 256)
        monkeypatch.setattr(f"{__name__}.I", 256)
    experts = packed(biased=True, **options)
    for on in ("output", "input"):
        arguments = leaf(T, H), leaf(T, K), experts.gate_up_bias, experts.down_bias
        expert_ids, config = ids(), ExpertsConfig(weight_on=on)

        def call(x, weights, *_, given=(expert_ids, config)):
            return quantized_experts.experts_quantized(x, experts, weights, *given)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_same(compiled, call, arguments)


FORMS_OF_PACKED = pytest.mark.parametrize(
    "form", ["", "_torch", pytest.param("_triton", marks=pytest.mark.triton)]
)


@FORMS_OF_PACKED
@pytest.mark.parametrize("name", ["dequantize", "experts_quantized"])
def test_packed_scales_have_no_gradient(name, form):
    function, experts = getattr(quantized_experts, name + form), packed()
    matrices = [
        replace(matrix, scales=matrix.scales.clone().requires_grad_())
        for matrix in (experts.gate_up, experts.down)
    ]
    experts = replace(experts, gate_up=matrices[0], down=matrices[1])
    if name == "dequantize":
        cases = [(experts.down,)]
    else:
        rest = torch.rand(T, K), ids(), ExpertsConfig()
        cases = [(torch.randn(T, H), given, *rest) for given in (experts, prepare(experts))]
        if form != "_triton":
            # Those of what has one beside them are there.
            cases.append((leaf(T, H), experts, *rest))
            static = replace(
                experts,
                activation_format="int8",
                activation_scales=torch.full((E, 2), 0.02, requires_grad=True),
            )
            cases.append((torch.randn(T, H), static, *rest))
    for arguments in cases:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(compiled, function, arguments)
        out = function(*arguments)
        x = arguments[0]
        assert out.requires_grad is (name != "dequantize" and x.requires_grad)
        if out.requires_grad:
            scales = [matrix.scales for matrix in matrices]
            assert torch.autograd.grad(out.sum(), scales, allow_unused=True) == (None, None)


def test_batched_packed_experts_are_one_graph():
    function = quantized_experts.experts_batched_quantized
    arguments = torch.randn(E, 5, H), torch.tensor([0, 5, 2, 1]), packed(), ExpertsConfig()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, function, arguments)


def test_wrong_arguments_are_refused_when_the_graph_runs():
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=f"expert_map: expected rows below {E}, got {E}"):
        compiled(alignment.align)(ids(), 4, E, torch.arange(1, E + 1))
    with pytest.raises(ValueError, match="slots: expected slots from 0 to 18, got 19"):
        compiled(dispatch.combine)(leaf(1, H), torch.tensor([T * K + 1]), leaf(T, K))
    with pytest.raises(ValueError, match=r"experts\.gate_up\.shape: expected \(4, 64, 5\)"):
        compiled(quantized_experts.experts_quantized)(
            torch.randn(T, 5), packed(), torch.rand(T, K), ids(), ExpertsConfig()
        )


@pytest.mark.triton
def test_a_gradient_that_no_kernel_has_is_refused_when_the_graph_runs():
    function = quantized_experts.experts_quantized_triton
    for place, name in enumerate(("x", "weights", r"experts\.gate_up_bias", r"experts\.down_bias")):
        experts = packed(biased=True)
        tensors = leaf(T, H), leaf(T, K), experts.gate_up_bias, experts.down_bias
        for other, tensor in enumerate(tensors):
            tensor.requires_grad_(other == place)
        given = tensors[0], experts, tensors[1], ids(), ExpertsConfig()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for run in (function, compiled):
            with pytest.raises(ValueError, match=f"^{name}: expected no gradient"):
                run(*given)
        with torch.no_grad():
            assert torch.equal(compiled(*given), function(*given))


def test_everything_opaque_has_a_stand_in():
    opaque = {
        name
        for module in (alignment, dispatch, gating, load_balancing, quantized_experts)
        for name, value in vars(module).items()
        if getattr(value, "__code__", None) is compiling.opaque(len).__code__
        and value.__module__ == module.__name__
    }
    assert opaque == compiling.STAND_INS.keys()
    assert len(opaque) == 20


@pytest.mark.triton
def test_operators_of_the_losses_are_what_they_say():
    logits, mask = leaf(T, E), torch.rand(T) < 0.7
    for how in (
        ("switch", 0.1, "softmax", 1e-20, None, None),
        ("gshard", 1.0, "sigmoid", 0.1, 3, None),
    ):
        torch.library.opcheck(operators.balance_loss, (logits, ids(), mask, None, *how))
        _, pull, scale = operators.balance_loss(logits.detach(), ids(), mask, None, *how)
        given = torch.tensor(2.0), logits.detach(), mask, pull, scale, *how
        torch.library.opcheck(operators.balance_loss_backward, given)
    torch.library.opcheck(operators.z_loss, (logits, mask))
    _, logs, scale = operators.z_loss(logits.detach(), None)
    given = torch.tensor(2.0), logits.detach(), None, logs, scale
    torch.library.opcheck(operators.z_loss_backward, given)
    torch.library.opcheck(operators.update_bias, (torch.rand(E), torch.arange(E), 0.1, False))


@pytest.mark.parametrize("form", ["_torch", pytest.param("_triton", marks=pytest.mark.triton)])
def test_operators_of_the_forms_are_what_they_say(form):
    def check(name, *arguments):
        torch.library.opcheck(getattr(torch.ops.moespec, name + form).default, arguments)

    check("align", ids(), 4, E, torch.arange(E), False)
    check("align_batched", torch.tensor([2, 0, 3, 5]), 5, 4)
    if form == "_triton":
        check("dispatch", leaf(T, H), ids(), E)
    check("combine", leaf(T * K, H), torch.randperm(T * K), leaf(T, K))


@FORMS_OF_PACKED
def test_operators_of_packed_experts_are_what_they_say(form):
    stored = packed(format="e4m3", granularity="channel").gate_up
    # A file that has [in, out], seen as [out, in].
    transposed = replace(stored, packed=stored.packed.mT.contiguous().mT)
    operator = getattr(torch.ops.moespec, f"dequantize{form}").default
    for matrix in (packed().down, packed(format="mxfp4").gate_up):
        torch.library.opcheck(operator, quantized_operators._parts(matrix))
    # The check of the schema multiplies arguments, which float8 is not made for.
    checks = ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, quantized_operators._parts(transposed), test_utils=checks)
    if not form:
        return
    operator = getattr(quantized_operators, f"experts_quantized{form}")
    grad = form == "_torch"
    for prepared in (False, True):
        experts = packed(prepared, biased=True)
        leaves = leaf(T, H), leaf(T, K), experts.gate_up_bias, experts.down_bias
        leaves = [t if grad else t.detach() for t in leaves]
        how = quantized_operators._how_packed(experts, ExpertsConfig())
        rest = (*leaves, ids(), torch.arange(E), *how)
        torch.library.opcheck(operator, rest)
        if grad:
            rest = [t.detach() if isinstance(t, torch.Tensor) else t for t in rest]
            for needs in ([True] * 4, [False, True, False, True]):
                torch.library.opcheck(
                    quantized_operators._run_packed_backward, (torch.randn(T, H), needs, *rest)
                )
