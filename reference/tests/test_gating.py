"""`route` against a second formulation, loops over numbers from the equations; its promises."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_reference.config import (
    EpsilonMode,
    GroupScore,
    MaskFill,
    Norm,
    Order,
    RoutingConfig,
    ScaleWhen,
    Score,
)
from moe_reference.gating import route, scores

SCORES = get_args(Score)
INF, NAN = float("inf"), float("nan")

DEEPSEEK_V3 = RoutingConfig(
    top_k=2,
    score="sigmoid",
    renormalize=True,
    epsilon=1e-20,
    scale=2.5,
    num_groups=2,
    topk_groups=1,
    group_score="top2_sum",
)


def score_numbers(x, score):
    if score == "softmax":
        top = max(x)
        exponentials = [math.exp(v - top) for v in x]
        return [v / math.fsum(exponentials) for v in exponentials]
    if score == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in x]
    return [math.sqrt(math.log1p(math.exp(v))) for v in x]


def route_one_token(x, config, bias):
    """Lists of numbers in, lists of numbers out; finite logits only."""
    E, K, G = len(x), config.top_k, config.num_groups
    pre = score_numbers(x, config.score) if config.order == "score_then_topk" else x
    selection = [s + b for s, b in zip(pre, bias, strict=True)]
    masked = set()
    if G > 1:
        size = E // G
        take = {"max": 1, "top2_sum": 2, "topk_share_sum": K // config.topk_groups}
        group_scores = []
        for g in range(G):
            best = sorted(selection[g * size : (g + 1) * size], reverse=True)
            group_scores.append(sum(best[: take[config.group_score]]))
        ranked = sorted(range(G), key=lambda g: (-group_scores[g], g))
        masked = {e for g in ranked[config.topk_groups :] for e in range(g * size, (g + 1) * size)}
    if config.mask_fill == "zero":
        selection = [0.0 if e in masked else s for e, s in enumerate(selection)]
        masked = set()
    ids = sorted(range(E), key=lambda e: (e in masked, -selection[e], e))[:K]
    if config.order == "score_then_topk":
        weights = [pre[e] for e in ids]
    else:
        weights = score_numbers([x[e] for e in ids], config.score)
    renormalized = config.renormalize and (K > 1 or config.renormalize_single)
    if renormalized:
        norm = sum(weights) if config.norm == "sum" else math.sqrt(sum(w * w for w in weights))
        add = config.epsilon_mode == "add"
        norm = norm + config.epsilon if add else max(norm, config.epsilon)
        weights = [w / norm for w in weights]
    if config.scale_when == "always" or not renormalized:
        weights = [w * config.scale for w in weights]
    return weights, ids


@st.composite
def routing_cases(draw):
    G = draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(2, 5))
    E = G * size
    topk_groups = draw(st.integers(1, G))
    K = draw(st.integers(1, topk_groups * size))
    group_score = draw(st.sampled_from(get_args(GroupScore)))
    if group_score == "topk_share_sum" and topk_groups > K:
        group_score = "max"
    config = RoutingConfig(
        top_k=K,
        score=draw(st.sampled_from(SCORES)),
        order=draw(st.sampled_from(get_args(Order))),
        renormalize=draw(st.booleans()),
        norm=draw(st.sampled_from(get_args(Norm))),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 0.5])),
        epsilon_mode=draw(st.sampled_from(get_args(EpsilonMode))),
        renormalize_single=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5, 0.0])),
        scale_when=draw(st.sampled_from(get_args(ScaleWhen))),
        num_groups=G,
        topk_groups=topk_groups,
        group_score=group_score,
        mask_fill=draw(st.sampled_from(get_args(MaskFill))),
    )
    # Few distinct values, so that ties are frequent; irregular ones, so that no two different sums
    # tie but for rounding, which the two formulations do differently.
    logit = st.integers(1, 9).map(lambda n: 4 * math.sin(n))
    rows = draw(st.lists(st.lists(logit, min_size=E, max_size=E), min_size=1, max_size=4))
    irregular = [1.3 * math.cos(5 * e + 1) for e in range(E)]
    bias = draw(st.sampled_from([None, [0.0] * E, [-1.1] * E, irregular]))
    return config, rows, bias


@settings(max_examples=300, deadline=None)
@given(routing_cases())
def test_route_equals_the_equations_token_by_token(case):
    config, rows, bias = case
    bias_E = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    weights, ids = route(torch.tensor(rows, dtype=torch.float64), config, bias_E)
    for row, got_weights, got_ids in zip(rows, weights.tolist(), ids.tolist(), strict=True):
        want_weights, want_ids = route_one_token(row, config, bias or [0.0] * len(row))
        assert got_weights == pytest.approx(want_weights, rel=1e-12)
        assert got_ids == want_ids


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("group_score", get_args(GroupScore))
def test_group_limits_equal_the_equations_on_rows_without_ties(score, group_score):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    bias = torch.randn(24, generator=generator, dtype=torch.float64) / 4
    config = RoutingConfig(
        top_k=6, score=score, num_groups=4, topk_groups=2, group_score=group_score
    )
    weights, ids = route(logits, config, bias)
    for row, got_weights, got_ids in zip(
        logits.tolist(), weights.tolist(), ids.tolist(), strict=True
    ):
        want_weights, want_ids = route_one_token(row, config, bias.tolist())
        assert got_ids == want_ids
        assert got_weights == pytest.approx(want_weights, rel=1e-12)


# Published equalities.


def test_softmax_topk_renormalize_equals_topk_softmax():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    early, ids_early = route(logits, RoutingConfig(top_k=4, renormalize=True))
    late, ids_late = route(logits, RoutingConfig(top_k=4, order="topk_then_score"))
    assert torch.equal(ids_early, ids_late)
    torch.testing.assert_close(early, late, atol=1e-6, rtol=1e-6)


def test_without_renormalisation_the_two_orders_differ():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    early, _ = route(logits, RoutingConfig(top_k=4))
    late, _ = route(logits, RoutingConfig(top_k=4, order="topk_then_score"))
    assert (early.sum(1) < 0.999).all()
    torch.testing.assert_close(late.sum(1), torch.ones(64))


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("score", SCORES)
def test_the_order_is_without_effect_on_elementwise_scores(score, order):
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    weights, ids = route(logits, RoutingConfig(top_k=3, score=score, order=order))
    if score != "softmax":
        torch.testing.assert_close(weights, scores(logits, score).gather(1, ids))


# Weights: once scaled, renormalised as told, from unbiased scores.


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scale_when", get_args(ScaleWhen))
def test_the_scale_applies_once_and_where_it_is_told(score, renormalize, scale_when):
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    config = RoutingConfig(top_k=3, score=score, renormalize=renormalize, scale_when=scale_when)
    plain, _ = route(logits, config)
    scaled, _ = route(logits, replace(config, scale=2.5))
    factor = 1.0 if renormalize and scale_when == "not_renormalized" else 2.5
    torch.testing.assert_close(scaled, plain * factor)


@pytest.mark.parametrize("score", SCORES)
def test_renormalised_weights_add_up_to_the_scale(score):
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
    config = RoutingConfig(top_k=3, score=score, renormalize=True, scale=2.5)
    torch.testing.assert_close(route(logits, config)[0].sum(1), torch.full((32,), 2.5))
    l2, _ = route(logits, replace(config, norm="l2"))
    torch.testing.assert_close(l2.square().sum(1), torch.full((32,), 6.25))


def test_unrenormalised_weights_are_scores_not_logits():
    logits = torch.tensor([[5.0, -7.0, 3.0]])
    for score in ("softmax", "sigmoid"):
        weights, _ = route(logits, RoutingConfig(top_k=2, score=score))
        assert ((weights > 0) & (weights < 1)).all()


def test_a_single_expert_is_renormalised_only_when_told():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    config = RoutingConfig(top_k=1, renormalize=True, renormalize_single=False)
    weights, _ = route(logits, config)
    assert (weights < 1).all()
    assert torch.autograd.grad(weights.sum(), logits)[0].abs().max() > 1e-3
    constant, _ = route(logits, replace(config, renormalize_single=True))
    torch.testing.assert_close(constant, torch.ones(5, 1))
    assert torch.autograd.grad(constant.sum(), logits)[0].abs().max() < 1e-6


def test_a_single_expert_left_alone_counts_as_not_renormalised():
    config = RoutingConfig(
        top_k=1,
        renormalize=True,
        renormalize_single=False,
        scale=16.0,
        scale_when="not_renormalized",
    )
    weights, _ = route(torch.zeros(1, 4), config)
    assert weights.item() == 4.0


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("score", SCORES)
def test_a_constant_added_to_every_bias_changes_nothing(score, order):
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    config = replace(DEEPSEEK_V3, score=score, order=order)
    weights, ids = route(logits, config, bias)
    shifted_weights, shifted_ids = route(logits, config, bias + 3.0)
    assert torch.equal(ids, shifted_ids)
    assert torch.equal(weights, shifted_weights)


def test_a_small_score_beside_a_large_bias_keeps_its_digits():
    logits = torch.full((1, 4), -18.0)
    bias = torch.tensor([12.0, 11.0, 0.0, 0.0])
    weights, ids = route(logits, RoutingConfig(top_k=2, score="sigmoid"), bias)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist()[0] == pytest.approx([1 / (1 + math.exp(18))] * 2, rel=1e-5)


def test_a_bias_below_the_resolution_of_bfloat16_still_chooses():
    bias = torch.linspace(6.817, 7.063, 256)
    logits = torch.zeros(1, 256)
    _, ids = route(logits, RoutingConfig(top_k=8, score="sigmoid"), bias)
    assert ids.tolist() == [list(range(255, 247, -1))]


def test_the_bias_is_compared_with_unscaled_scores():
    logits = torch.tensor([[0.0, 1.0]])
    bias = torch.tensor([0.3, 0.0])
    for scale in (1.0, 2.5):
        config = RoutingConfig(top_k=1, score="sigmoid", scale=scale)
        assert route(logits, config, bias)[1].tolist() == [[0]]


# Groups.


def probability_logits(*values):
    return torch.logit(torch.tensor([values], dtype=torch.float64))


def test_a_group_is_scored_by_its_best_two_or_by_its_best():
    logits = probability_logits(0.9, 0.1, 0.6, 0.6)
    config = replace(DEEPSEEK_V3, top_k=1)
    assert route(logits, config)[1].tolist() == [[2]]
    assert route(logits, replace(config, group_score="max"))[1].tolist() == [[0]]


def test_the_bias_can_rescue_a_group():
    logits = probability_logits(0.9, 0.8, 0.2, 0.1)
    bias = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert route(logits, DEEPSEEK_V3, bias)[1].tolist() == [[2, 3]]


@pytest.mark.parametrize("shift", [-50.0, -5.0, 0.0, 5.0])
def test_negative_biased_scores_stay_inside_the_best_group(shift):
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    _, ids = route(logits, DEEPSEEK_V3, torch.full((8,), shift))
    best_two = scores(logits, "sigmoid").view(500, 2, 4).sort(descending=True).values[:, :, :2]
    best_group = best_two.sum(2).argmax(1)
    assert torch.equal(ids // 4, best_group[:, None].expand(500, 2))


def test_zero_fill_loses_to_the_masked_experts_once_scores_are_negative():
    logits = probability_logits(0.9, 0.8, 0.2, 0.1)
    config = replace(DEEPSEEK_V3, mask_fill="zero")
    assert route(logits, config)[1].tolist() == [[0, 1]]
    assert route(logits, config, torch.full((4,), -5.0))[1].tolist() == [[2, 3]]


def test_a_group_score_may_take_its_share_of_the_top_k():
    logits = probability_logits(0.9, 0.1, 0.1, 0.8, 0.7, 0.1, 0.6, 0.6, 0.6)
    config = RoutingConfig(
        top_k=3, score="sigmoid", num_groups=3, topk_groups=1, group_score="topk_share_sum"
    )
    assert route(logits, config)[1].tolist() == [[6, 7, 8]]
    wide = replace(config, topk_groups=2)
    assert set(route(logits, wide)[1][0].tolist()) == {0, 3, 4}


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_masked_expert_is_not_chosen_even_beside_a_bad_one(bad):
    logits = torch.tensor([[9.0, 9.0, bad, bad, 1.0, 1.0, 1.0, 1.0]])
    config = replace(DEEPSEEK_V3, top_k=4, order="topk_then_score")
    assert route(logits, config)[1].tolist() == [[0, 1, 2, 3]]


# Any row gets K distinct ids.

GARBAGE = {
    "nan": [NAN] * 8,
    "minus infinity": [-INF] * 8,
    "infinity": [INF] * 8,
    "constant": [1.0] * 8,
    "one nan": [0.0, 1.0, NAN, 0.0, 1.0, 2.0, 0.0, 0.0],
    "mixed": [NAN, INF, -INF, 0.0, INF, NAN, -INF, -0.0],
    "far below": [-1e30] * 8,
    "underflow": [-120.0, -130.0, -140.0, -150.0, -160.0, -170.0, -180.0, -190.0],
}


@pytest.mark.parametrize("mask_fill", get_args(MaskFill))
@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_every_row_gets_k_distinct_ids(garbage, score, order, mask_fill):
    for groups in ({}, {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}):
        config = RoutingConfig(top_k=3, score=score, order=order, mask_fill=mask_fill, **groups)
        for bias in (None, torch.full((8,), -3.0), torch.full((8,), NAN)):
            _, ids = route(torch.tensor([garbage]), config, bias)
            assert len(set(ids[0].tolist())) == 3
            assert ((ids >= 0) & (ids < 8)).all()


def test_nan_counts_as_the_lowest_score():
    logits = torch.tensor([[NAN, -INF, 1.0, NAN]])
    config = RoutingConfig(top_k=4, score="sigmoid")
    assert route(logits, config)[1].tolist() == [[2, 1, 0, 3]]


@pytest.mark.parametrize("score", SCORES)
def test_a_bad_row_changes_no_other_row(score):
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    weights, ids = route(logits, replace(DEEPSEEK_V3, score=score))
    dirty = logits.clone()
    dirty[2], dirty[4] = NAN, INF
    dirty_weights, dirty_ids = route(dirty, replace(DEEPSEEK_V3, score=score))
    rest = [0, 1, 3, 5]
    assert torch.equal(dirty_ids[rest], ids[rest])
    assert torch.equal(dirty_weights[rest], weights[rest])


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("epsilon_mode", get_args(EpsilonMode))
@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_underflowed_scores_give_finite_weights_and_gradients(score, epsilon_mode, norm):
    logits = torch.full((1, 4), -300.0, requires_grad=True)
    config = RoutingConfig(
        top_k=2, score=score, renormalize=True, norm=norm, epsilon=1e-20, epsilon_mode=epsilon_mode
    )
    weights, _ = route(logits, config)
    assert weights.isfinite().all()
    assert torch.autograd.grad(weights.sum(), logits)[0].isfinite().all()


# Ties.


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E", [1, 2, 3, 7, 8, 9, 17, 72, 257])
def test_equal_logits_tie_wherever_they_stand(score, E):
    value = torch.randn(40, 1, generator=torch.Generator().manual_seed(E))
    _, ids = route(value.expand(40, E), RoutingConfig(top_k=E, score=score))
    assert torch.equal(ids, torch.arange(E).expand(40, E))


@pytest.mark.parametrize("score", SCORES)
def test_a_token_is_routed_alike_in_every_batch(score):
    logits = torch.randn(33, 19, generator=torch.Generator().manual_seed(10)) * 9
    weights, ids = route(logits, RoutingConfig(top_k=5, score=score))
    for t in range(33):
        alone = route(logits[t : t + 1], RoutingConfig(top_k=5, score=score))
        assert torch.equal(alone[0][0], weights[t])
        assert torch.equal(alone[1][0], ids[t])


# Sizes, dtypes, strides, purity.


@pytest.mark.parametrize("E", [1, 2, 3, 7, 8, 72, 128, 144, 160, 255, 256, 257, 384, 512])
def test_every_expert_is_reachable(E):
    logits = torch.eye(E) * 3
    weights, ids = route(logits, RoutingConfig(top_k=1, score="sigmoid"))
    assert ids[:, 0].tolist() == list(range(E))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("renormalize", [False, True])
def test_narrow_logits_are_scored_in_float32(dtype, renormalize):
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(11)).to(dtype)
    config = RoutingConfig(top_k=2, score="sigmoid", renormalize=renormalize)
    weights, ids = route(logits, config)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    assert weights.dtype == wide.dtype
    assert ids.dtype == torch.int64
    assert all(map(torch.equal, (weights, ids), route(wide, config)))


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_narrow_logits_are_float32(score):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(16)).bfloat16()
    assert torch.equal(scores(logits, score), scores(logits.float(), score))
    numbers = [score_numbers(row, score) for row in logits.tolist()]
    torch.testing.assert_close(scores(logits, score), torch.tensor(numbers))


@pytest.mark.parametrize("config", [DEEPSEEK_V3, RoutingConfig(top_k=3, order="topk_then_score")])
def test_no_tokens_give_empty_results(config):
    weights, ids = route(torch.empty(0, 8, requires_grad=True), config, torch.zeros(8))
    assert weights.shape == ids.shape == (0, config.top_k)
    weights.sum().backward()


@pytest.mark.parametrize("score", SCORES)
def test_strides_do_not_matter_and_arguments_stay_as_they_are(score):
    base = torch.randn(16, 24, generator=torch.Generator().manual_seed(12))
    bias = torch.randn(16, generator=torch.Generator().manual_seed(13))[::2]
    config = replace(DEEPSEEK_V3, score=score)
    for logits in (base[:, 2::3], base.t()[:8].t(), base[:1, :8].expand(5, 8)):
        before, bias_before = logits.clone(), bias.clone()
        got = route(logits, config, bias)
        assert all(map(torch.equal, got, route(logits.contiguous(), config, bias.contiguous())))
        assert torch.equal(logits, before)
        assert torch.equal(bias, bias_before)
        assert got[0].data_ptr() != logits.data_ptr()
        assert all(part.is_contiguous() for part in got)


# Gradients.


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gradient_in_the_logits_is_right(score, order, renormalize, norm):
    generator = torch.Generator().manual_seed(14)
    # Distinct by far more than gradcheck's step, so that the choice does not change under it.
    logits = torch.stack([torch.randperm(8, generator=generator) for _ in range(3)]) * 0.7 - 2.0
    logits = logits.double().requires_grad_()
    config = replace(
        DEEPSEEK_V3, score=score, order=order, renormalize=renormalize, norm=norm, epsilon=1e-3
    )
    bias = torch.tensor([0.05, 0.0, -0.05, 0.1] * 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: route(x, config, bias)[0], (logits,))


@pytest.mark.parametrize("score", SCORES)
def test_scores_have_the_right_gradient_across_their_range(score):
    x = torch.tensor([-60.0, -40.0, -25.0, -1.0, 0.0, 1.0, 19.0, 21.0, 50.0], dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: scores(v, score), (x,), eps=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", SCORES)
def test_scores_have_finite_gradients_at_the_ends_of_their_range(score):
    x = torch.tensor([-1e30, -1000.0, 1000.0, 1e30], requires_grad=True)
    gradients = [torch.autograd.grad(scores(x, score)[i], x)[0] for i in range(4)]
    assert torch.stack(gradients).isfinite().all()


def test_the_bias_gets_no_gradient():
    bias = torch.zeros(8, requires_grad=True)
    logits = torch.randn(4, 8, requires_grad=True)
    weights, _ = route(logits, DEEPSEEK_V3, bias)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


# Hash routing.


def hash_config(dtype=torch.int64, **changes):
    table = torch.tensor([[3, 0], [1, 2], [2, 3], [0, 1], [1, 1]], dtype=dtype)
    config = RoutingConfig(
        top_k=2, score="sqrtsoftplus", renormalize=True, epsilon=1e-20, scale=1.5, hash_table=table
    )
    return replace(config, **changes)


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_hash_ids_are_the_rows_of_the_table(table_dtype, ids_dtype):
    config = hash_config(table_dtype)
    token_ids = torch.tensor([4, 0, 2, 0], dtype=ids_dtype)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(15), dtype=torch.float64)
    weights, ids = route(logits, config, torch.full((4,), 9.0), token_ids)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 1], [3, 0], [2, 3], [3, 0]]
    for t in range(4):
        chosen = [score_numbers(logits[t].tolist(), config.score)[e] for e in ids[t].tolist()]
        want = [1.5 * s / sum(chosen) for s in chosen]
        assert weights[t].tolist() == pytest.approx(want, rel=1e-12)


def test_hash_weights_carry_gradients_to_the_logits():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([0, 1, 2])
    config = hash_config()
    assert torch.autograd.gradcheck(lambda x: route(x, config, None, token_ids)[0], (logits,))


def test_token_ids_without_a_table_are_not_used():
    logits = torch.randn(3, 4)
    with_ids = route(logits, RoutingConfig(top_k=2), None, torch.tensor([99, -1, 5]))
    assert all(map(torch.equal, with_ids, route(logits, RoutingConfig(top_k=2))))


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        (None, TypeError, r"token_ids: expected a tensor .* got None"),
        (torch.zeros(3), TypeError, r"token_ids: expected dtype int32 or int64, got float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"token_ids: expected shape \[3\], got"),
        (torch.tensor([0, 5, 0]), ValueError, r"token_ids: expected ids in \[0, 5\).* got 5"),
        (torch.tensor([0, -1, 0]), ValueError, r"token_ids: expected ids in \[0, 5\).* got -1"),
    ],
)
def test_bad_token_ids_are_named(token_ids, error, message):
    with pytest.raises(error, match=message):
        route(torch.zeros(3, 4), hash_config(), None, token_ids)


def test_a_table_for_more_experts_than_there_are_is_named():
    with pytest.raises(ValueError, match=r"hash_table: expected ids in \[0, 3\).* got 3"):
        route(torch.zeros(1, 3), hash_config(), None, torch.tensor([0]))


# Bad arguments.


@pytest.mark.parametrize(
    ("logits", "config", "bias", "error", "message"),
    [
        (torch.zeros(8), {}, None, ValueError, r"logits: expected shape \[T, E\], got \[8\]"),
        ([[0.0]], {}, None, TypeError, r"logits: expected a tensor, got list"),
        (torch.zeros(2, 8).long(), {}, None, TypeError, r"logits: expected dtype .* got int64"),
        (torch.zeros(2, 8), {}, torch.zeros(7), ValueError, r"bias: expected shape \[8\], got"),
        (torch.zeros(2, 8), {}, torch.zeros(8).int(), TypeError, r"bias: expected dtype .* int32"),
        (torch.zeros(2, 8), {"top_k": 9}, None, ValueError, r"top_k: .* E = 8.* got 9"),
        (torch.zeros(2, 0), {"top_k": 1}, None, ValueError, r"top_k: .* E = 0"),
        (
            torch.zeros(2, 8),
            {"num_groups": 3},
            None,
            ValueError,
            r"num_groups: expected a divisor of E = 8, got 3",
        ),
        (
            torch.zeros(2, 8),
            {"num_groups": 8, "topk_groups": 8, "group_score": "top2_sum"},
            None,
            ValueError,
            r"num_groups: expected at least 2 experts per group",
        ),
        (
            torch.zeros(2, 8),
            {"top_k": 5, "num_groups": 4, "topk_groups": 2},
            None,
            ValueError,
            r"top_k: expected at most topk_groups \* E / num_groups = 4, got 5",
        ),
    ],
)
def test_bad_arguments_are_named(logits, config, bias, error, message):
    with pytest.raises(error, match=message):
        route(logits, RoutingConfig(**{"top_k": 2, **config}), bias)
