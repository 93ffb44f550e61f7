import pytest
import torch
from moe_optimized.gating import (
    route,
    route_torch,
    route_triton,
    route_with_counts,
    route_with_counts_torch,
    route_with_counts_triton,
)
from moe_optimized.interpreter import launches
from moe_reference.config import RoutingConfig
from moe_reference.gating import route as reference

kernel = pytest.param(route_triton, id="triton", marks=pytest.mark.triton)
implementations = pytest.mark.parametrize(
    "implementation", [pytest.param(route_torch, id="torch"), kernel]
)

counting = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(route_with_counts_torch, id="torch"),
        pytest.param(
            route_with_counts_triton,
            id="triton",
            marks=pytest.mark.triton,
        ),
    ],
)

CONFIGS = {
    "plain": RoutingConfig(top_k=3),
    "renormalized": RoutingConfig(top_k=3, renormalize=True, epsilon=1e-20, scale=2.5),
    "topk-first": RoutingConfig(top_k=3, order="topk_then_score", renormalize=True),
    "sigmoid": RoutingConfig(top_k=2, score="sigmoid", renormalize=True, epsilon=1e-9),
    "sigmoid-topk-first": RoutingConfig(top_k=1, score="sigmoid", order="topk_then_score"),
    "sqrtsoftplus": RoutingConfig(top_k=4, score="sqrtsoftplus", renormalize=True, scale=1.5),
    "l2": RoutingConfig(top_k=3, score="sigmoid", renormalize=True, norm="l2"),
    "clamp": RoutingConfig(
        top_k=3, score="sigmoid", renormalize=True, epsilon=0.9, epsilon_mode="clamp"
    ),
    "single": RoutingConfig(top_k=1, renormalize=True, renormalize_single=False, scale=3.0),
    "single-renormalized": RoutingConfig(top_k=1, renormalize=True),
    "either-or": RoutingConfig(top_k=2, renormalize=True, scale=7.0, scale_when="not_renormalized"),
    "or-either": RoutingConfig(top_k=2, scale=7.0, scale_when="not_renormalized"),
    "groups-max": RoutingConfig(top_k=3, num_groups=4, topk_groups=2),
    "groups-top2": RoutingConfig(
        top_k=3, score="sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum"
    ),
    "groups-share": RoutingConfig(
        top_k=4, num_groups=3, topk_groups=2, group_score="topk_share_sum"
    ),
    "groups-zero": RoutingConfig(
        top_k=3, score="sigmoid", num_groups=6, topk_groups=2, mask_fill="zero"
    ),
    "groups-topk-first": RoutingConfig(
        top_k=2, order="topk_then_score", num_groups=3, topk_groups=1, group_score="top2_sum"
    ),
    "groups-all": RoutingConfig(top_k=5, num_groups=4, topk_groups=4),
}


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_reference(implementation, config, dtype, assert_close):
    values = (3 * torch.randn(7, 12)).to(dtype)
    for bias in (None, torch.randn(12)):
        ours, exact = values.clone().requires_grad_(), values.double().requires_grad_()
        weights, ids = implementation(ours, config, bias)
        expected, expected_ids = reference(exact, config, bias)
        assert torch.equal(ids, expected_ids)
        assert ids.dtype is torch.int64
        assert weights.dtype is torch.float32
        assert_close(weights, expected)
        cotangent = torch.randn_like(weights)
        weights.backward(cotangent)
        expected.backward(cotangent.double())
        if config is CONFIGS["single-renormalized"]:
            # A weight of 1 whatever the logits: two terms as large as the cotangent cancel.
            assert exact.grad.abs().max() < 1e-15
            assert ours.grad.abs().max() <= 3e-7 * cotangent.abs().max()
        else:
            assert_close(ours.grad, exact.grad)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_float64_is_computed_in_float64(config, assert_close):
    logits = torch.randn(5, 12, dtype=torch.float64)
    weights, ids = route(logits, config)
    expected, expected_ids = reference(logits, config)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected, torch.float64)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@implementations
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_row_gets_distinct_ids_whatever_it_holds(implementation, config):
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(10, 12)
    logits[0], logits[1], logits[2], logits[3] = 0.0, nan, -inf, inf
    logits[4, 3] = nan
    logits[5, :9] = nan
    logits[6, :6] = -inf
    logits[7, 2], logits[7, 9] = -inf, inf
    logits[8] = -90.0
    logits[9, ::2], logits[9, 1::2] = -0.0, 0.0
    for bias in (None, torch.randn(12)):
        weights, ids = implementation(logits, config, bias)
        expected, expected_ids = reference(logits, config, bias)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(weights.isnan(), expected.isnan())
        assert all(len(set(row)) == config.top_k for row in ids.tolist())


@implementations
@pytest.mark.parametrize("E", [1, 2, 3, 7, 60, 160, 257])
def test_every_expert_can_be_chosen(implementation, E):
    ids = implementation(torch.eye(E), RoutingConfig(top_k=1))[1]
    assert ids.flatten().tolist() == list(range(E))
    if E % 2 == 0 and E > 2:
        config = RoutingConfig(top_k=2, num_groups=2, topk_groups=1)
        ids = implementation(10 * torch.eye(E), config)[1]
        assert ids[:, 0].tolist() == list(range(E))
        assert torch.equal(ids[:, 0] // (E // 2), ids[:, 1] // (E // 2))


@implementations
def test_ties_go_to_the_lowest_id(implementation):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0]]).repeat(33, 1)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        ids = implementation(logits, RoutingConfig(top_k=5, score=score))[1]
        assert ids.tolist() == [[1, 2, 4, 0, 3]] * 33


@implementations
@pytest.mark.parametrize("order", ["score_then_topk", "topk_then_score"])
def test_a_hash_table_chooses_and_the_logits_weigh(implementation, order, assert_close):
    table = torch.stack([torch.randperm(7)[:3] for _ in range(20)]).to(torch.int32)
    config = RoutingConfig(top_k=3, hash_table=table, order=order, renormalize=True)
    logits, token_ids = torch.randn(9, 7), torch.randint(0, 20, (18,))[::2]
    weights, ids = implementation(logits, config, token_ids=token_ids)
    assert torch.equal(ids, table[token_ids].long())
    assert_close(weights, reference(logits, config, token_ids=token_ids)[0])


@implementations
def test_a_bad_hash_table_is_refused(implementation):
    config = RoutingConfig(top_k=1, hash_table=torch.tensor([[0], [3]]))
    logits = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 2\), got 2"):
        implementation(logits, config, token_ids=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"hash_table: expected ids in \[0, 3\), got 3"):
        implementation(logits[:, :3], config, token_ids=torch.tensor([0, 0]))
    with pytest.raises(TypeError, match="token_ids: expected a tensor"):
        implementation(logits, config)


@implementations
def test_strides_and_empty_batches(implementation):
    config = RoutingConfig(top_k=2, renormalize=True)
    logits = torch.randn(6, 10)
    expected = reference(logits, config)
    for laid in (logits.T.contiguous().T, torch.stack([logits, logits], -1)[..., 1]):
        assert torch.equal(implementation(laid, config)[1], expected[1])
    weights, ids = implementation(torch.zeros(0, 10, requires_grad=True), config)
    assert weights.shape == ids.shape == (0, 2)


@implementations
def test_a_bias_chooses_and_never_weighs(implementation):
    config = RoutingConfig(top_k=2, score="sigmoid")
    logits = torch.full((3, 6), -20.0)
    bias = torch.tensor([0.0, 12.0, 0.0, 12.0, 0.0, 0.0])
    weights, ids = implementation(logits, config, bias)
    assert ids.tolist() == [[1, 3]] * 3
    torch.testing.assert_close(weights, torch.sigmoid(torch.full((3, 2), -20.0)))


@implementations
def test_what_cannot_be_routed_is_refused(implementation):
    logits = torch.randn(2, 6)
    for config, message in (
        (RoutingConfig(top_k=7), "top_k: expected at most E = 6"),
        (RoutingConfig(top_k=1, num_groups=4), "num_groups: expected a divisor of E = 6"),
        (RoutingConfig(top_k=4, num_groups=2), "top_k: expected at most the 3 experts"),
        (RoutingConfig(top_k=1, num_groups=6, group_score="top2_sum"), "at least 2 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation(logits, config)
    with pytest.raises(ValueError, match=r"bias: expected shape \[6\]"):
        implementation(logits, RoutingConfig(top_k=1), torch.zeros(5))
    with pytest.raises(TypeError, match="logits: expected dtype"):
        implementation(logits.long(), RoutingConfig(top_k=1))
    with pytest.raises(TypeError, match="config: expected a RoutingConfig"):
        implementation(logits, None)


@implementations
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("order", ["score_then_topk", "topk_then_score"])
def test_equal_ids_of_a_table_add_their_gradients_up(implementation, score, order, assert_close):
    table = torch.tensor([[2, 2, 0], [4, 1, 4], [3, 3, 3]])
    config = RoutingConfig(
        top_k=3, hash_table=table, score=score, order=order, renormalize=True, epsilon=0.5
    )
    token_ids = torch.tensor([2, 0, 1, 0], dtype=torch.int32)
    ours = torch.randn(4, 5).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    weights, _ = implementation(ours, config, token_ids=token_ids)
    expected, _ = reference(exact, config, token_ids=token_ids)
    assert_close(weights, expected)
    cotangent = torch.randn(4, 3)
    weights.backward(cotangent)
    expected.backward(cotangent.double())
    assert_close(ours.grad, exact.grad)


@implementations
@pytest.mark.parametrize("norm", ["sum", "l2"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_norm_on_either_side_of_the_clamp(implementation, score, norm):
    logits = torch.tensor([[-9.0, -8.0, 0.0, -7.0], [3.0, 2.0, 1.0, 0.0]])
    table = torch.tensor([[0, 1], [3, 0]])
    config = RoutingConfig(
        top_k=2,
        score=score,
        renormalize=True,
        norm=norm,
        epsilon=0.1,
        epsilon_mode="clamp",
        hash_table=table,
    )
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    token_ids, cotangent = torch.tensor([0, 1]), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    implementation(ours, config, token_ids=token_ids)[0].backward(cotangent)
    reference(exact, config, token_ids=token_ids)[0].backward(cotangent.double())
    assert exact.grad.abs().amax(1).min() > 1e-4
    # In float32 a difference of terms as large as the cotangent is off by its unit of rounding.
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=3e-6, atol=2.0**-23)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@implementations
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_gradient_of_a_row_is_its_own(implementation, config):
    logits = torch.randn(5, 12)
    clean, spoiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with torch.no_grad():
        spoiled[1], spoiled[3, 0] = float("nan"), float("nan")
    cotangent = torch.randn(5, config.top_k)
    implementation(clean, config)[0].backward(cotangent)
    implementation(spoiled, config)[0].backward(cotangent)
    others = [0, 2, 4]
    torch.testing.assert_close(spoiled.grad[others], clean.grad[others], rtol=0, atol=1e-7)


@implementations
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("norm", ["sum", "l2"])
def test_weights_of_vanishing_scores_have_a_finite_gradient(implementation, score, norm):
    logits = torch.full((2, 6), -200.0)
    logits[:, 5] = 100.0
    table = torch.tensor([[0, 1], [1, 5]])
    config = RoutingConfig(
        top_k=2, score=score, renormalize=True, norm=norm, epsilon=1e-20, hash_table=table
    )
    logits.requires_grad_()
    weights, _ = implementation(logits, config, token_ids=torch.tensor([0, 1]))
    (weights * torch.tensor([[1.0, -1.0]])).sum().backward()
    assert weights.isfinite().all()
    assert logits.grad.isfinite().all()


@implementations
def test_cotangents_of_any_layout_are_taken(implementation):
    config = RoutingConfig(top_k=3, renormalize=True, epsilon=1.0)
    logits = torch.randn(4, 6).requires_grad_()
    weights, _ = implementation(logits, config)
    cotangent = torch.randn(4, 3)
    expected, *_ = torch.autograd.grad(weights, logits, cotangent, retain_graph=True)
    laid = cotangent.T.contiguous().T
    found, *_ = torch.autograd.grad(weights, logits, laid, retain_graph=True)
    torch.testing.assert_close(found, expected)
    summed, *_ = torch.autograd.grad(weights.sum(), logits, retain_graph=True)
    ones, *_ = torch.autograd.grad(weights, logits, torch.ones(4, 3))
    torch.testing.assert_close(summed, ones)


@implementations
def test_ids_are_int64_unless_int32_is_asked_for(implementation):
    logits, table = torch.randn(4, 6), torch.randint(0, 6, (9, 2))
    for config in (RoutingConfig(top_k=2), RoutingConfig(top_k=2, hash_table=table)):
        given = (logits, config, None, torch.tensor([0, 8, 3, 3]))
        weights, ids = implementation(*given)
        narrow_weights, narrow = implementation(*given, ids_dtype=torch.int32)
        assert (ids.dtype, narrow.dtype) == (torch.int64, torch.int32)
        assert torch.equal(ids, narrow.long())
        assert torch.equal(weights, narrow_weights)
    with pytest.raises(TypeError, match=r"ids_dtype: expected torch\.int32 or torch\.int64, got"):
        implementation(logits, RoutingConfig(top_k=2), ids_dtype=torch.int16)


@counting
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_counts_are_those_of_the_ids(implementation, config, assert_close):
    logits, bias, mask = torch.randn(17, 12), torch.randn(12), torch.rand(17) < 0.6
    weights, ids = reference(logits, config, bias)
    for padding_mask in (None, mask):
        found = implementation(logits, config, bias, None, padding_mask)
        assert torch.equal(found[1], ids)
        assert_close(found[0], weights)
        counted = ids if padding_mask is None else ids[mask]
        assert torch.equal(found[2], torch.bincount(counted.flatten(), minlength=12))
        assert found[2].dtype is torch.int64


@counting
def test_counts_of_a_table_of_nothing_and_of_strided_masks(implementation, assert_close):
    table = torch.tensor([[2, 2], [4, 1]])
    config = RoutingConfig(top_k=2, hash_table=table, renormalize=True, epsilon=1.0)
    logits = torch.randn(3, 5).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, False])[::2]
    weights, ids, counts = implementation(logits, config, None, torch.tensor([0, 1, 0]), mask)
    assert ids.tolist() == [[2, 2], [4, 1], [2, 2]]
    assert counts.tolist() == [0, 1, 2, 0, 1]
    weights.sum().backward()
    expected = logits.detach().requires_grad_()
    reference(expected, config, None, torch.tensor([0, 1, 0]))[0].sum().backward()
    assert_close(logits.grad, expected.grad)
    _, ids, counts = implementation(logits[:0], RoutingConfig(top_k=2), ids_dtype=torch.int32)
    assert ids.dtype is torch.int32
    assert counts.tolist() == [0] * 5
    for bad, error in ((mask[1:], ValueError), (mask.float(), TypeError)):
        with pytest.raises(error, match="padding_mask: expected"):
            implementation(logits, RoutingConfig(top_k=2), None, None, bad)


@pytest.mark.triton
def test_while_a_graph_is_captured_no_memory_outside_the_table_is_read(monkeypatch):
    monkeypatch.setattr("moe_optimized.gating._is_captured", lambda _: True)
    table = torch.tensor([[0, 1], [7, 1]])
    config = RoutingConfig(top_k=2, hash_table=table)
    token_ids = torch.tensor([0, -1, 2, 2**40])
    logits = torch.randn(4, 4).requires_grad_()
    weights, ids, counts = route_with_counts_triton(logits, config, None, token_ids)
    assert ids.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert counts.tolist() == [1, 1, 0, 0]
    weights.sum().backward()
    assert not logits.grad[1:].any()


@pytest.mark.triton
def test_one_kernel_each_way():
    before = launches.copy()
    logits = torch.randn(100, 12).requires_grad_()
    weights, _ = route_triton(logits, CONFIGS["groups-top2"], torch.randn(12))
    assert launches - before == {"route_topk_kernel": 1}
    weights.sum().backward()
    assert launches - before == {"route_topk_kernel": 1, "route_gradient_kernel": 1}
    before = launches.copy()
    route_with_counts_triton(logits, CONFIGS["plain"])
    assert launches - before == {"route_topk_kernel": 1}
    for run in (route_triton, route_with_counts_triton):
        with pytest.raises(TypeError, match="got float64"):
            run(torch.randn(2, 3, dtype=torch.float64), RoutingConfig(top_k=1))
    before = launches.copy()
    route_with_counts(torch.randn(2, 3, dtype=torch.float64), RoutingConfig(top_k=1))
    assert launches == before
