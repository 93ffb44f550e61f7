import pytest
import torch
from moe_optimized.gating import route, route_torch, route_triton
from moe_optimized.interpreter import HAS_TRITON, launches
from moe_reference.config import RoutingConfig
from moe_reference.gating import route as reference

kernel = pytest.param(
    route_triton, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
)
implementations = pytest.mark.parametrize(
    "implementation", [pytest.param(route_torch, id="torch"), kernel]
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
        ours, theirs = (values.clone().requires_grad_() for _ in range(2))
        weights, ids = implementation(ours, config, bias)
        expected, expected_ids = reference(theirs, config, bias)
        assert torch.equal(ids, expected_ids)
        assert ids.dtype is torch.int64
        assert weights.dtype is torch.float32
        assert_close(weights, expected)
        cotangent = torch.randn_like(weights)
        weights.backward(cotangent)
        expected.backward(cotangent)
        assert_close(ours.grad, theirs.grad)


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


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_the_kernel_is_launched_once():
    before = launches.copy()
    route_triton(torch.randn(100, 12), CONFIGS["groups-top2"], torch.randn(12))
    assert launches - before == {"route_topk_kernel": 1}
    with pytest.raises(TypeError, match="got float64"):
        route_triton(torch.randn(2, 3, dtype=torch.float64), RoutingConfig(top_k=1))
