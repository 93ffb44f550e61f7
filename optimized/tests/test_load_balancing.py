from dataclasses import replace
from typing import get_args

import pytest
import torch
from moe_optimized.interpreter import launches
from moe_optimized.load_balancing import (
    balance_loss,
    balance_loss_torch,
    balance_loss_triton,
    update_bias,
    update_bias_torch,
    update_bias_triton,
    z_loss,
    z_loss_torch,
    z_loss_triton,
)
from moe_reference import load_balancing as reference
from moe_reference.config import BalanceConfig, Loss, Score

NAN, INF = float("nan"), float("inf")


def either(in_torch, in_triton):
    return pytest.mark.parametrize(
        "implementation",
        [
            pytest.param(in_torch, id="torch"),
            pytest.param(in_triton, id="triton", marks=pytest.mark.triton),
        ],
    )


losses = either(balance_loss_torch, balance_loss_triton)
z_losses = either(z_loss_torch, z_loss_triton)
updates = either(update_bias_torch, update_bias_triton)


def config_for(loss, **fields):
    """A configuration with what the loss needs: sequences of 5 tokens, 3 devices."""
    per_sequence = loss in ("gshard", "deepseek_sequence")
    needs = {
        "sequence_length": 5 if per_sequence else None,
        "num_devices": 3 if loss == "deepseek_device" else None,
    }
    return BalanceConfig(loss, **{**needs, "coefficient": 0.5, **fields})


def differentiated(function, logits, *arguments):
    """The loss, and the gradient of 64 times it."""
    logits = logits.clone().requires_grad_()
    loss = function(logits, *arguments)
    (64 * loss).backward()
    return loss, logits.grad


def draw(T, E, K, dtype=torch.float32):
    return (2 * torch.randn(T, E)).to(dtype), torch.randint(-1, E + 1, (T, K))


def assert_same_gradient(found, exact, dtype, largest):
    """Within a few roundings; where pulls cancel, within those of the terms, below `largest`."""
    unit = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    assert found.dtype is dtype
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=unit[dtype], atol=unit[dtype] * largest
    )


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize("loss", get_args(Loss))
def test_agrees_with_the_reference_in_float64(implementation, loss, score, dtype, assert_close):
    logits, ids = draw(20, 12, 3, dtype)
    mask = torch.rand(20) < 0.6
    # The second sequence is all padding.
    mask[5:10] = False
    config = config_for(loss, score=score, epsilon=0.25)
    cases = [(mask, None)]
    if dtype is torch.float32:
        cases.append((None, None))
        if loss not in ("gshard", "deepseek_sequence"):
            cases.append((None, torch.randint(0, 50, (12,))))
    for case in cases:
        found, grad = differentiated(implementation, logits, ids, config, *case)
        exact, exact_grad = differentiated(
            reference.balance_loss, logits.double(), ids, config, *case
        )
        assert found.dtype is torch.float32
        assert found.shape == ()
        assert_close(found, exact)
        assert_same_gradient(grad, exact_grad, dtype, largest=64 * 0.5 / 20)


@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize("loss", get_args(Loss))
def test_float64_is_computed_in_float64(loss, score, assert_close):
    logits, ids = draw(10, 6, 2, torch.float64)
    config, mask = config_for(loss, score=score), torch.arange(10) % 4 > 0
    found, grad = differentiated(balance_loss, logits, ids, config, mask)
    exact, exact_grad = differentiated(reference.balance_loss, logits, ids, config, mask)
    assert_close(found, exact)
    assert_same_gradient(grad, exact_grad, torch.float64, largest=1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, ids, config, mask), logits)
    assert torch.autograd.gradcheck(lambda x: z_loss(x, mask), logits)
    assert update_bias(logits[0], torch.arange(6), 0.1, True).dtype is torch.float64


@losses
def test_even_and_collapsed_routers_have_the_published_values(implementation):
    E, K, T = 8, 2, 20
    even = torch.arange(T * K).view(T, K) % E
    collapsed = torch.full((T, E), -1000.0)
    collapsed[:, 2:4] = 0
    ids = torch.tensor([[2, 3]]).expand(T, K)
    for loss, flat, worst in (
        ("switch", 1.0, 4.0),
        ("deepseek_expert", 1.0, 4.0),
        ("deepseek_sequence", 1.0, 4.0),
        ("gshard", 1.0, 4.0),
        ("deepseek_device", 1.0, 4.0),
        ("transformers_concatenated", 2.0, 8.0),
    ):
        config = replace(config_for(loss, coefficient=1.0), sequence_length=5, num_devices=4)
        assert implementation(torch.zeros(T, E), even, config).item() == pytest.approx(flat)
        assert implementation(collapsed, ids, config).item() == pytest.approx(worst)


@losses
def test_nothing_to_count_gives_zero(implementation):
    for loss in get_args(Loss):
        config = config_for(loss, num_devices=2)
        empty, grad = differentiated(
            implementation, torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), config
        )
        assert empty.item() == 0
        assert grad.shape == (0, 4)
        logits, ids = draw(10, 4, 2)
        none = torch.zeros(10, dtype=torch.bool)
        padded, grad = differentiated(implementation, logits, ids, config, none)
        assert padded.item() == 0
        assert torch.equal(grad, torch.zeros(10, 4))
        # No id is one of an expert, and no id at all.
        for nobody in (torch.full((10, 2), 4), torch.zeros(10, 0, dtype=torch.int32)):
            uncounted, grad = differentiated(implementation, logits, nobody, config)
            assert uncounted.item() == 0
            assert torch.equal(grad, torch.zeros(10, 4))
    free, grad = differentiated(implementation, *draw(6, 4, 2), BalanceConfig(coefficient=0.0))
    assert free.item() == 0
    assert not grad.any()


@losses
@pytest.mark.parametrize("score", get_args(Score))
def test_one_expert_has_a_constant_loss(implementation, score):
    config = BalanceConfig(coefficient=0.25, score=score)
    loss, grad = differentiated(
        implementation, torch.randn(7, 1), torch.zeros(7, 1, dtype=torch.int32), config
    )
    assert loss.item() == pytest.approx(0.25)
    assert grad.abs().max() < 1e-6


@losses
@pytest.mark.parametrize("score", get_args(Score))
def test_what_padding_holds_does_not_matter(implementation, score):
    logits, ids = draw(10, 6, 2)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
    for loss in ("switch", "deepseek_sequence"):
        config = config_for(loss, score=score, epsilon=0.0)
        clean, clean_grad = differentiated(implementation, logits, ids, config, mask)
        poisoned = logits.clone()
        poisoned[~mask] = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 0.0])
        found, grad = differentiated(implementation, poisoned, ids, config, mask)
        assert torch.equal(found, clean)
        assert torch.equal(grad, clean_grad)
        assert not grad[~mask].any()


@losses
def test_a_row_of_nan_spoils_the_loss_and_no_other_row(implementation):
    logits, ids = draw(10, 6, 2)
    for score in get_args(Score):
        config = BalanceConfig(score=score)
        clean, clean_grad = differentiated(implementation, logits, ids, config)
        spoiled = logits.clone()
        spoiled[3, 2] = NAN
        found, grad = differentiated(implementation, spoiled, ids, config)
        assert clean.isfinite()
        assert found.isnan()
        others = torch.arange(10) != 3
        torch.testing.assert_close(grad[others], clean_grad[others])
        assert grad[3].isnan().all()


@losses
@pytest.mark.parametrize("score", get_args(Score))
def test_huge_logits_stay_finite(implementation, score):
    sides = torch.where(torch.randn(9, 6) > 0, 1.0, -1.0)
    logits = sides * torch.tensor([1e2, 1e4, 1e30]).repeat(3)[:, None]
    logits[4] = -logits[4].abs()
    loss, grad = differentiated(
        implementation, logits, draw(9, 6, 2)[1], BalanceConfig(score=score)
    )
    assert 0 <= loss.item() <= 6.001
    assert grad.isfinite().all()


@losses
def test_ids_and_counts_of_every_dtype_and_layout(implementation):
    logits, ids = draw(10, 6, 2)
    config = BalanceConfig(score="sigmoid")
    expected = reference.balance_loss(logits, ids, config)
    # Far outside, where 32 bits would wrap around to an expert.
    far = ids.where((ids >= 0) & (ids < 6), 2**32 + 1)
    for same in (ids.int(), far, ids.T.contiguous().T, torch.stack([ids, ids], -1)[..., 1]):
        torch.testing.assert_close(implementation(logits, same, config), expected)
    for laid in (logits.T.contiguous().T, torch.stack([logits, logits], -1)[..., 1]):
        torch.testing.assert_close(implementation(laid, ids, config), expected)
    mask = torch.rand(20) < 0.7
    torch.testing.assert_close(
        implementation(logits, ids, config, mask[::2]),
        reference.balance_loss(logits, ids, config, mask[::2]),
    )
    counts = torch.tensor([4, 0, 9, 1, 1, 3])
    expected = reference.balance_loss(logits, ids, config, None, counts)
    for dtype in (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        for given in (counts.to(dtype), torch.stack([counts, counts], 1).to(dtype)[:, 0]):
            torch.testing.assert_close(implementation(logits, ids, config, None, given), expected)
    none = implementation(logits, ids, config, None, torch.zeros(6))
    assert none.item() == 0


@losses
def test_a_cotangent_of_any_layout_is_taken(implementation):
    logits, ids = draw(6, 5, 2)
    logits.requires_grad_()
    loss = implementation(logits, ids, BalanceConfig())
    expanded, *_ = torch.autograd.grad(loss.expand(4).sum(), logits, retain_graph=True)
    scaled, *_ = torch.autograd.grad(loss * 4, logits)
    torch.testing.assert_close(expanded, scaled)


@losses
def test_what_gives_no_loss_is_refused_as_by_the_reference(implementation):
    logits, ids = draw(10, 6, 2)
    counts, mask = torch.ones(6), torch.ones(10, dtype=torch.bool)
    switch, gshard = BalanceConfig(), BalanceConfig("gshard")
    for arguments in (
        (logits[0], ids, switch),
        (logits.long(), ids, switch),
        (logits, ids[1:], switch),
        (logits, ids.float(), switch),
        (logits, ids, switch, mask[1:]),
        (logits, ids, switch, mask.float()),
        (logits, ids, switch, None, counts[1:]),
        (logits, ids, switch, None, counts.bool()),
        (logits, ids, gshard, None, counts),
        (logits, ids, BalanceConfig("gshard", sequence_length=4)),
        (logits, ids, BalanceConfig("deepseek_sequence")),
        (logits, ids, BalanceConfig("deepseek_device")),
        (logits, ids, BalanceConfig("deepseek_device", num_devices=4)),
    ):
        with pytest.raises((TypeError, ValueError)) as expected:
            reference.balance_loss(*arguments)
        with pytest.raises(expected.type) as found:
            implementation(*arguments)
        assert str(found.value).split(":")[0] == str(expected.value).split(":")[0]
    with pytest.raises(TypeError, match="config: expected a BalanceConfig, got NoneType"):
        implementation(logits, ids, None)


@pytest.mark.triton
@pytest.mark.parametrize("loss", ["switch", "deepseek_sequence", "deepseek_device"])
def test_many_partial_sums_are_added_in_a_fixed_order(loss, monkeypatch, assert_close):
    monkeypatch.setattr("moe_optimized.load_balancing._PROGRAMS", 3)
    # Blocks of 32 rows: 4 blocks of each sequence or 8 of all, of which the last is not full.
    logits, ids = draw(228, 258, 2)
    mask = torch.rand(228) < 0.8
    config = replace(config_for(loss), sequence_length=114, num_devices=6)
    found, grad = differentiated(balance_loss_triton, logits, ids, config, mask)
    again, _ = differentiated(balance_loss_triton, logits, ids, config, mask)
    exact, exact_grad = differentiated(reference.balance_loss, logits.double(), ids, config, mask)
    assert_close(found, exact)
    assert torch.equal(found, again)
    assert_same_gradient(grad, exact_grad, torch.float32, largest=64 * 0.5 / 228)
    found, grad = differentiated(z_loss_triton, logits, mask)
    exact, exact_grad = differentiated(reference.z_loss, logits.double(), mask)
    assert_close(found, exact)
    assert_close(grad, exact_grad)


@pytest.mark.triton
def test_the_kernels_are_launched_and_the_logits_are_all_that_is_kept():
    logits, ids = draw(20, 12, 3, torch.float16)
    logits.requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    for loss, mean in (("switch", {}), ("deepseek_sequence", {"mean_kernel": 1})):
        before = launches.copy()
        with hooks:
            total = balance_loss_triton(logits, ids, config_for(loss))
        forward = {"balance_sums_kernel": 1, "balance_pull_kernel": 1, **mean}
        assert launches - before == forward
        total.backward()
        assert launches - before == {**forward, "balance_gradient_kernel": 1}
    before = launches.copy()
    with hooks:
        total = z_loss_triton(logits)
    total.backward()
    assert launches - before == {"z_sums_kernel": 1, "mean_kernel": 1, "z_gradient_kernel": 1}
    # Beside the logits themselves: pulls, logarithms and scales.
    assert sum(each.numel() for each in kept if each.data_ptr() != logits.data_ptr()) == (
        (1 * 12 + 1) + (4 * 12 + 1) + (20 + 1)
    )
    before = launches.copy()
    update_bias_triton(torch.zeros(4), torch.arange(4), 0.1, True)
    assert launches - before == {"update_bias_kernel": 1}


@pytest.mark.triton
def test_float64_is_refused_by_the_kernels():
    wide = torch.randn(4, 3, dtype=torch.float64)
    for call in (
        lambda: balance_loss_triton(wide, torch.zeros(4, 1, dtype=torch.int64), BalanceConfig()),
        lambda: z_loss_triton(wide),
        lambda: update_bias_triton(wide[0], torch.ones(3), 0.1, False),
    ):
        with pytest.raises(TypeError, match="got float64"):
            call()


@z_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_z_loss_agrees_with_the_reference_in_float64(implementation, dtype, assert_close):
    logits = (3 * torch.randn(20, 12)).to(dtype)
    logits[0], logits[1] = 1000.0, -1000.0
    for mask in (None, torch.rand(20) < 0.6):
        found, grad = differentiated(implementation, logits, mask)
        exact, exact_grad = differentiated(reference.z_loss, logits.double(), mask)
        assert found.dtype is torch.float32
        assert found.shape == ()
        assert_close(found, exact)
        assert grad.dtype is dtype
        # A logsumexp near 1000 is rounded by up to 3e-5, and the softmax by that share.
        tolerance = {torch.float32: 4e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@z_losses
def test_the_edges_of_the_z_loss(implementation):
    empty, grad = differentiated(implementation, torch.zeros(0, 4))
    assert empty.item() == 0
    assert grad.shape == (0, 4)
    logits = torch.randn(5, 4)
    padded, grad = differentiated(implementation, logits, torch.zeros(5, dtype=torch.bool))
    assert padded.item() == 0
    assert torch.equal(grad, torch.zeros(5, 4))
    # One expert: the logarithm of one exponential is the logit.
    single, grad = differentiated(implementation, logits[:, :1])
    torch.testing.assert_close(single, logits[:, 0].square().mean())
    torch.testing.assert_close(grad, 64 * 2 * logits[:, :1] / 5)
    mask = torch.tensor([1, 0, 1, 1, 0]).bool()
    clean, clean_grad = differentiated(implementation, logits, mask)
    poisoned = logits.clone()
    poisoned[1], poisoned[4] = NAN, INF
    found, grad = differentiated(implementation, poisoned, mask)
    assert torch.equal(found, clean)
    assert torch.equal(grad, clean_grad)
    for laid in (logits.T.contiguous().T, torch.stack([logits, logits], -1)[..., 1]):
        torch.testing.assert_close(implementation(laid), reference.z_loss(logits))
    for hopeless in (NAN, INF, -INF):
        logits[2] = hopeless
        expected = reference.z_loss(logits)
        torch.testing.assert_close(implementation(logits), expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"padding_mask: expected shape \[5\]"):
        implementation(logits, mask[1:])
    with pytest.raises(TypeError, match="padding_mask: expected dtype bool"):
        implementation(logits, mask.float())
    with pytest.raises(ValueError, match=r"logits: expected shape \[T, E\]"):
        implementation(logits[0])


@updates
@pytest.mark.parametrize("centred", [False, True])
def test_the_bias_moves_as_in_the_reference(implementation, centred):
    for E in (1, 2, 5, 60, 257):
        for dtype in (torch.int32, torch.int64, torch.float32):
            bias, counts = torch.randn(E), torch.randint(0, 4, (E,)).to(dtype)
            moved = implementation(bias, counts, 0.125, centred)
            assert moved.dtype is torch.float32
            expected = reference.update_bias(bias, counts, 0.125, centred)
            torch.testing.assert_close(moved, expected, rtol=2e-7, atol=1e-8)
            narrow = implementation(bias.bfloat16(), counts, 0.125, centred)
            expected = reference.update_bias(bias.bfloat16(), counts, 0.125, centred)
            torch.testing.assert_close(narrow, expected, rtol=2e-7, atol=1e-8)


@updates
def test_large_counts_are_compared_exactly(implementation):
    counts = 2**29 + torch.tensor([1, -1, 0, 2, -2])
    step = implementation(torch.full((10,), 0.5)[::2], counts.repeat(2)[:5], 0.25, False) - 0.5
    assert step.tolist() == [-0.25, 0.25, 0.0, -0.25, 0.25]
    assert implementation(torch.zeros(5), counts.int(), 0.25, False).tolist() == step.tolist()
    strided = torch.stack([counts, counts], 1)[:, 1]
    assert implementation(torch.zeros(5), strided, 0.25, False).tolist() == step.tolist()
    assert implementation(torch.zeros(0), counts[:0], 0.25, False).shape == (0,)
    for unknown in (NAN, INF):
        counts[2] = 0
        given = counts.float().where(counts > 0, unknown)
        expected = reference.update_bias(torch.zeros(5), given, 0.25, False)
        assert torch.equal(implementation(torch.zeros(5), given, 0.25, False), expected)


@updates
def test_a_bias_that_cannot_be_moved_is_refused(implementation):
    bias, counts = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"tokens_per_expert: expected shape \[4\]"):
        implementation(bias, counts[:1], 0.1, False)
    with pytest.raises(TypeError, match="tokens_per_expert: expected dtype"):
        implementation(bias, counts.bool(), 0.1, False)
    with pytest.raises(ValueError, match=r"bias: expected shape \[E\]"):
        implementation(bias[None], counts, 0.1, False)
    with pytest.raises(TypeError, match="bias: expected dtype"):
        implementation(counts.long(), counts, 0.1, False)
