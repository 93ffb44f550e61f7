"""Is X equal to Y? Gating and load balancing; the rest is in `test_equivalences_layer`.

Each test is one question; the docstring has the question, the answer and who asked it. A page of
the documentation is made of them. One side is the reference, the other plain torch as other systems
write it, or the reference again, configured differently.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from moe_reference.capacity import drop_to_capacity
from moe_reference.config import BalanceConfig, RoutingConfig
from moe_reference.dispatch import count_tokens
from moe_reference.gating import route, scores
from moe_reference.load_balancing import (
    balance_loss,
    concatenated_balance_loss,
    inject_loss,
    inject_scaled_loss,
    update_bias,
    z_loss,
)

DTYPES = (torch.float64, torch.float32)
SIZES = ((1, 1), (2, 1), (4, 2), (7, 3), (8, 8), (72, 6))
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
INF = float("inf")

# A score has an exponential, whose argument is within 8 of another one, a few sums and a division:
# fewer than 30 roundings, beside the sum over n experts or tokens, which has n.
SCORE = 30


def draws(sizes=SIZES, T=6, seeds=3):
    """Logits [T, E] in [-4, 4] and K. The logits of a row are at least 6 / E apart: no ties."""
    for seed, (E, K), dtype in product(range(seeds), sizes, DTYPES):
        generator = seeded(seed)
        places = torch.rand(T, E, generator=generator).argsort(dim=1)
        jitter = torch.rand(T, E, generator=generator, dtype=torch.float64) / 4
        yield ((places + jitter) * 8 / E - 4).to(dtype), K


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def row(*values, dtype=torch.float32):
    """The logits of a single token."""
    return torch.tensor([values], dtype=dtype)


def logits_of(*sigmoids):
    """A single token's logits from its sigmoid scores."""
    return row(*(math.log(s / (1 - s)) for s in sigmoids), dtype=torch.float64)


def chosen(ids):
    """The ids of each row as a set."""
    return ids.sort(dim=1).values


def chosen_by_top_k(selection, K):
    return chosen(selection.topk(K, dim=1).indices)


def clear(selection, K):
    """True for rows whose choice does not hang on a rounding."""
    if selection.shape[1] == K:
        return torch.ones(len(selection), dtype=torch.bool)
    best = selection.topk(K + 1, dim=1).values
    return best[:, K - 1] - best[:, K] > 1e-4


def in_best_groups(selection, G, topk_groups, take):
    """True for the experts of the best groups; a group's score is the sum of its `take` best."""
    T, E = selection.shape
    best = selection.view(T, G, E // G).topk(take, dim=2).values.sum(dim=2).topk(topk_groups, dim=1)
    is_open = torch.zeros(T, G, dtype=torch.bool).scatter(1, best.indices, True)
    return is_open.repeat_interleave(E // G, dim=1)


def one_hot_counts(ids, E):
    return F.one_hot(ids.flatten(), E).sum(dim=0).double()


def assert_close(left, right, roundings):
    """Elementwise equal, up to so many roundings in the dtype of both."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    bound = roundings * torch.finfo(right.dtype).eps * right.abs()
    assert ((left - right).abs() <= bound).all(), ((left - right).abs() / bound).max()


def assert_far(left, right, share=0.01):
    """Different by at least a hundredth of the greatest element."""
    assert (left - right).abs().max() > share * right.abs().max()


# Gating


def test_gating__softmax_topk_renormalise_is_topk_softmax():
    r"""Is softmax, then top-k, then renormalisation equal to top-k, then softmax?

    Yes: the denominator over all experts cancels, $\frac{e^{x_k} / Z}{\sum_j e^{x_j} / Z} =
    \frac{e^{x_k}}{\sum_j e^{x_j}}$. Mixtral and Qwen3-MoE do the first, gpt-oss and Megatron's
    default the second.

    Asked: Megatron #955, #1593; Lightning-AI/litgpt#1286; Lightning-AI/litgpt#2013;
    TensorRT-LLM #2752; Fast-LLM #190
    """
    for logits, K in draws():
        weights, ids = route(logits, RoutingConfig.preset("mixtral", top_k=K))
        top = logits.topk(K, dim=1)
        assert torch.equal(ids, top.indices)
        assert_close(weights, torch.softmax(top.values, dim=1), SCORE + logits.shape[1])


def test_gating__softmax_topk_without_renormalisation_is_topk_softmax():
    r"""Is softmax, then top-k, without renormalisation equal to top-k, then softmax?

    Only if K = E. The choice is the same, but the weights of Qwen2-MoE and OLMoE add up to less
    than 1, those of gpt-oss to exactly 1: a checkpoint of the one kind read as the other has every
    routed output too large.

    Asked: Megatron #955, #1593; QwenLM/Qwen3#687; mlxcel #391; ServiceNow/Fast-LLM#83
    """
    assert route(row(0, 0), RoutingConfig(top_k=1))[0].item() == 0.5
    assert route(row(0, 0), RoutingConfig.preset("gpt-oss", top_k=1))[0].item() == 1.0
    for logits, K in draws():
        flat = logits / 4
        weights, ids = route(flat, RoutingConfig.preset("qwen2-moe", top_k=K))
        others, other_ids = route(flat, RoutingConfig.preset("gpt-oss", top_k=K))
        assert torch.equal(ids, other_ids)
        if logits.shape[1] == K:
            assert_close(weights, others, SCORE + K)
        else:
            assert_far(weights, others)


def test_gating__sigmoid_topk_is_topk_sigmoid():
    r"""Is sigmoid, then top-k equal to top-k, then sigmoid, renormalised or not?

    Only if no bias is added in between. A sigmoid looks at one logit alone, so that scoring before
    or after the choice is the same; a bias of DeepSeek-V3 is added to scores and compared with
    them, a bias added to logits is another one. Llama 4 chooses first, Kimi K2 and GLM-4.5 score
    first.
    """
    for (logits, K), renormalize in product(draws(), (False, True)):
        fields = {"top_k": K, "score": "sigmoid", "renormalize": renormalize}
        weights, ids = route(logits, RoutingConfig(**fields))
        others, other_ids = route(logits, RoutingConfig(**fields, order="topk_then_score"))
        assert torch.equal(ids, other_ids)
        # The same few operations, but an exponential may be rounded otherwise in another place.
        assert_close(weights, others, SCORE + K)
    logits, bias = row(0, 4), torch.tensor([0.6, 0.0])
    orders = ("score_then_topk", "topk_then_score")
    configs = [RoutingConfig(1, "sigmoid", order) for order in orders]
    assert [route(logits, config, bias)[1].item() for config in configs] == [0, 1]


def test_gating__score_functions_choose_alike():
    r"""Do softmax, sigmoid and sqrtsoftplus choose the same experts?

    Only where no scores round to the same number. All three rise with the logit, so they rank
    alike; but in float32 the sigmoid of everything from 17 on is 1, the softmax of everything 104
    below the greatest logit is 0, and equal scores are a tie.
    """
    for logits, K in draws():
        ids = [route(logits, RoutingConfig(K, score))[1] for score in SCORES]
        assert torch.equal(ids[0], ids[1])
        assert torch.equal(ids[0], ids[2])
    assert [route(row(20, 30), RoutingConfig(1, score))[1].item() for score in SCORES] == [1, 0, 1]
    below = row(0, -300, -200)
    ids = [route(below, RoutingConfig(2, score))[1].tolist() for score in SCORES]
    assert ids == [[[0, 1]], [[0, 1]], [[0, 2]]]


def test_gating__score_functions_choose_alike_with_a_bias():
    r"""Do the score functions choose the same experts when a selection bias is added?

    No: a bias is compared with differences of scores, and those are of another size for each score
    function. A bias that was trained with sigmoid (DeepSeek-V3) means nothing to softmax.

    Asked: mlx-lm #1883; llama.cpp #18980
    """
    bias = torch.tensor([0.3, 0.0])
    ids = [route(row(0, 1), RoutingConfig(1, s), bias)[1].item() for s in ("softmax", "sigmoid")]
    assert ids == [1, 0]
    logits, bias = normal(0, 500, 64), normal(1, 64) / 4
    soft, sigmoid, root = (chosen(route(logits, RoutingConfig(6, s), bias)[1]) for s in SCORES)
    for one, other in ((soft, sigmoid), (soft, root), (sigmoid, root)):
        assert (one != other).any(dim=1).double().mean() > 0.5


def test_gating__renormalised_sigmoid_is_softmax():
    r"""Are sigmoid scores divided by their sum equal to a softmax of the chosen logits?

    Only where the chosen logits are far below zero: there $\sigma(x) \approx e^x$. Elsewhere
    sigmoid saturates and its weights are closer together. DeepSeek-V3 and GLM-4.5 are trained with
    the first, gpt-oss with the second.

    Asked: llama.cpp #18980; mlx-lm #1883
    """
    for logits, K in draws(((4, 2), (7, 3), (8, 8), (72, 6))):
        sigmoid = RoutingConfig(K, "sigmoid", renormalize=True)
        softmax = RoutingConfig.preset("gpt-oss", top_k=K)
        assert_far(route(logits, sigmoid)[0], route(logits, softmax)[0])
        low = logits.double() - 50
        # sigmoid(x) is e^x / (1 + e^x), and e^-46 is below a rounding of float64; logits that are
        # 50 greater have 50 roundings more in the argument of the exponential.
        assert_close(route(low, sigmoid)[0], route(low, softmax)[0], SCORE + 2 * 50 + K)


def test_gating__softmax_of_sigmoid_is_softmax():
    r"""Is the softmax of the sigmoid scores equal to the softmax of the logits?

    No. The ranking is the same, but scores lie between 0 and 1, so that no weight can be more than
    e times another: a router scored twice is almost flat.

    Asked: transformers #45120, #45315
    """
    assert torch.softmax(scores(row(-50, 50), "sigmoid"), dim=1).max() < 0.74
    assert scores(row(-50, 50), "softmax").max() == 1.0
    for logits, _K in draws(((2, 1), (7, 3), (72, 6))):
        once = scores(logits, "softmax")
        for score in ("sigmoid", "softmax"):
            twice = torch.softmax(scores(logits, score), dim=1)
            assert torch.equal(twice.argsort(dim=1), once.argsort(dim=1))
            assert (twice.max(dim=1).values <= math.e * twice.min(dim=1).values).all()
            assert_far(twice, once)


def test_gating__constant_added_to_all_logits():
    r"""Does adding a constant to all logits of a token change nothing?

    Only if the score is softmax, which depends on differences alone. Sigmoid and sqrtsoftplus
    still choose the same experts, with other weights, renormalised or not.
    """
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6))):
        for score, renormalize in product(SCORES, (False, True)):
            config = RoutingConfig(K, score, renormalize=renormalize)
            (weights, ids), (others, other_ids) = route(logits, config), route(logits - 4, config)
            assert torch.equal(ids, other_ids)
            if score == "softmax":
                # Logits of at most 8 are off by 8 half roundings each.
                assert_close(others, weights, SCORE + 8 + logits.shape[1])
            elif K > 1 or not renormalize:
                assert_far(others, weights)


def test_gating__constant_added_to_all_biases():
    r"""Does adding a constant to all selection biases change nothing?

    Yes: the bias chooses by comparison and never weighs, so neither ids nor weights move, with
    group limits or without. (Where closed groups are masked with 0 a constant does matter: 0 is not
    shifted.)

    Asked: vLLM #12002; transformers #41647; torchtitan #1506
    """
    for logits, K in draws():
        bias = normal(K, logits.shape[1], dtype=logits.dtype)
        config = RoutingConfig(K, "sigmoid", renormalize=True)
        rows = clear(scores(logits, "sigmoid") + bias, K)
        assert rows.any()
        left, right = route(logits, config, bias), route(logits, config, bias + 3)
        assert torch.equal(left[0][rows], right[0][rows])
        assert torch.equal(left[1][rows], right[1][rows])
    # In float64 random numbers are far from ties, also as sums over groups.
    logits, bias = normal(0, 200, 64), normal(1, 64)
    config = RoutingConfig.preset("deepseek-v3")
    left, right = route(logits, config, bias), route(logits, config, bias - 3)
    assert torch.equal(left[0], right[0])
    assert torch.equal(left[1], right[1])
    zero = RoutingConfig(1, "sigmoid", num_groups=2, mask_fill="zero")
    assert route(row(1, 0), zero, torch.zeros(2))[1].item() == 0
    assert route(row(1, 0), zero, torch.full((2,), -1.0))[1].item() == 1


def test_gating__selection_bias_is_a_bias_of_the_router():
    r"""Is a selection bias equal to a bias of the router's linear layer?

    No. The bias of gpt-oss's router is part of the logits and changes the weights; the correction
    bias of DeepSeek-V3 is added to the scores, chooses, and is gone.

    Asked: vLLM #12002; transformers #41647; torchtitan #2258
    """
    bias = torch.tensor([1.0, 0.0])
    config = RoutingConfig(2, renormalize=True)
    assert route(row(0, 0), config, bias)[0].tolist() == [[0.5, 0.5]]
    assert route(row(0, 0) + bias, config)[0][0, 0] > 0.73
    for logits, K in draws(((4, 2), (7, 3), (8, 8), (72, 6))):
        bias = normal(1, logits.shape[1], dtype=logits.dtype)
        left = route(logits, RoutingConfig(K, renormalize=True), bias)
        right = route(logits + bias, RoutingConfig(K, renormalize=True))
        assert_far(left[0], right[0])


def test_gating__score_plus_bias_minus_bias_is_the_score():
    r"""Can a weight be recovered from the biased score by subtracting the bias?

    Only where the bias is not much greater than the score. Beside a bias of 12 a float32 score of
    $10^{-8}$ is rounded away and the weight is 0; gathering the unbiased score costs nothing.

    Asked: flashinfer #3875; vLLM #47367
    """
    logits, bias = row(-18.4, -30), torch.tensor([12.0, 0.0])
    config = RoutingConfig(1, "sigmoid")
    weights, ids = route(logits, config, bias)
    biased = scores(logits, "sigmoid") + bias
    assert ids.item() == 0
    assert weights.item() > 1e-8
    assert (biased - bias)[0, 0].item() == 0.0
    for logits, K in draws():
        bias = normal(0, logits.shape[1], dtype=logits.dtype).clamp(-1, 1)
        weights, ids = route(logits, RoutingConfig(K, "sigmoid"), bias)
        recovered = (scores(logits, "sigmoid") + bias - bias).gather(1, ids)
        # The sum is at most 2 and is rounded once, its difference once more.
        assert ((recovered - weights).abs() <= 2 * torch.finfo(logits.dtype).eps).all()


def test_gating__bias_in_bfloat16():
    r"""Is a selection bias kept in bfloat16 as good as one in float32?

    No. Trained biases lie close together and far from zero: 256 of them between 6.817 and 7.063
    are 256 numbers in float32 and 9 in bfloat16, and most tokens get other experts.

    Asked: SGLang #37133, #31213; vLLM #23640
    """
    config = RoutingConfig(1, "sigmoid")
    logits, bias = row(0, 0), torch.tensor([7.0, 7.01])
    assert route(logits, config, bias)[1].item() == 1
    assert route(logits, config, bias.bfloat16())[1].item() == 0
    spread = torch.linspace(6.817, 7.063, 256)[torch.rand(256, generator=seeded(0)).argsort()]
    assert len(spread.bfloat16().unique()) == 9
    logits = normal(0, 500, 256, dtype=torch.float32) / 4
    config = RoutingConfig.preset("deepseek-v3")
    wide, narrow = (chosen(route(logits, config, b)[1]) for b in (spread, spread.bfloat16()))
    assert (wide != narrow).any(dim=1).double().mean() > 0.5


def test_gating__bias_before_or_after_the_group_limit():
    r"""Is adding the bias before choosing groups equal to adding it afterwards?

    No. DeepSeek-V3 and torchtitan score the groups by biased scores, so that a bias can open a
    group; hyper_parallel adds it to what the limit has left, and it can only choose inside.

    Source: hyper_parallel's PyTorch MoE blocks; DeepSeek-V3 (arXiv 2412.19437)
    """
    logits, bias = logits_of(0.9, 0.1, 0.3, 0.3), torch.tensor([0.0, 0.0, 0.9, 0.9])
    config = RoutingConfig(1, "sigmoid", num_groups=2, group_score="top2_sum")

    def after(logits, bias, config):
        s = scores(logits, "sigmoid")
        is_open = in_best_groups(s, config.num_groups, config.topk_groups, 2)
        return chosen_by_top_k((s + bias).masked_fill(~is_open, -INF), config.top_k)

    assert route(logits, config, bias)[1].item() == 2
    assert after(logits, bias, config).item() == 0
    logits, bias = normal(0, 500, 64), normal(1, 64) / 4
    config = RoutingConfig.preset("deepseek-v3")
    before = chosen(route(logits, config, bias)[1])
    assert (before != after(logits, bias, config)).any(dim=1).double().mean() > 0.5
    none = torch.zeros(64, dtype=torch.float64)
    assert torch.equal(chosen(route(logits, config, none)[1]), after(logits, none, config))


def test_gating__scale_before_or_after_the_choice():
    r"""Is multiplying all scores by the scale before top-k equal to multiplying the weights after?

    Only if nothing is added or divided in between: a selection bias is worth less beside scaled
    scores (unless it is scaled, too), and renormalisation takes the scale out again. hyper_parallel
    scales before, everybody else after.

    Source: hyper_parallel's PyTorch MoE blocks
    """
    for logits, K in draws():
        weights, ids = route(logits, RoutingConfig(K, "sigmoid", scale=2.5))
        scaled = scores(logits, "sigmoid") * 2.5
        assert torch.equal(chosen(ids), chosen_by_top_k(scaled, K))
        assert torch.equal(weights, scaled.gather(1, ids))
        bias = normal(0, logits.shape[1], dtype=logits.dtype)
        rows = clear(scores(logits, "sigmoid") + bias, K)
        ids = route(logits, RoutingConfig(K, "sigmoid", scale=2.5), bias)[1]
        assert torch.equal(chosen(ids)[rows], chosen_by_top_k(scaled + 2.5 * bias, K)[rows])
    logits, bias = logits_of(0.5, 0.6), torch.tensor([0.2, 0.0])
    assert route(logits, RoutingConfig(1, "sigmoid", scale=2.5), bias)[1].item() == 0
    assert (scores(logits, "sigmoid") * 2.5 + bias).argmax().item() == 1


def test_gating__scale_before_or_after_renormalisation():
    r"""Is scaling before renormalisation equal to scaling after it?

    Only if the scale is 1: the division takes any other factor out again. DeepSeek-V3, GLM-4.5 and
    Megatron scale last, and the weights add up to the scale.

    Asked: SGLang #31449; sgl-jax #1282
    """
    for (logits, K), scale in product(draws(), (1.0, 2.5)):
        weights, ids = route(logits, RoutingConfig(K, "sigmoid", renormalize=True, scale=scale))
        before = scores(logits, "sigmoid").gather(1, ids) * scale
        before = before / before.sum(dim=1, keepdim=True)
        # A factor, a sum of K and a division more or less.
        assert_close(before * scale, weights, 2 * K + 4)
        if scale != 1.0:
            assert_far(before, weights, share=0.5)


def test_gating__scale_only_where_renormalised():
    r"""Is DeepSeek-V2's either-or (renormalise or scale) equal to DeepSeek-V3's always scaling?

    Only if the weights are not renormalised, or the scale is 1. The V2 gate drops the scale when it
    renormalises; SGLang and sgl-jax once did the opposite and scaled only what they renormalised.

    Asked: sgl-jax #1282; SGLang #31449, #35160
    """
    for (logits, K), renormalize, scale in product(draws(), (False, True), (1.0, 16.0)):
        fields = {"top_k": K, "renormalize": renormalize, "scale": scale}
        always = route(logits, RoutingConfig(**fields))[0]
        either = route(logits, RoutingConfig(**fields, scale_when="not_renormalized"))[0]
        if renormalize and scale != 1.0:
            assert torch.equal(either * scale, always)
            assert_far(either, always, share=0.5)
        else:
            assert torch.equal(either, always)


def test_gating__max_is_top2_sum():
    r"""Do the best expert and the sum of the best two rank groups alike?

    No, not in groups of two either. DeepSeek-V2 goes by the best expert, DeepSeek-V3 by the sum of
    the best two biased scores, and groups of one expert have no such sum.

    Asked: vLLM #13474, #29439
    """
    logits = logits_of(0.9, 0.1, 0.6, 0.6)
    opened = {
        group_score: route(
            logits, RoutingConfig(2, "sigmoid", num_groups=2, group_score=group_score)
        )[1]
        for group_score in ("max", "top2_sum")
    }
    assert chosen(opened["max"]).tolist() == [[0, 1]]
    assert chosen(opened["top2_sum"]).tolist() == [[2, 3]]
    for E, G in ((16, 8), (64, 8)):
        limit = {"num_groups": G, "topk_groups": G // 2}
        ids = [
            chosen(
                route(normal(0, 500, E), RoutingConfig(E // 2, "sigmoid", **limit, group_score=s))[
                    1
                ]
            )
            for s in ("max", "top2_sum")
        ]
        assert (ids[0] != ids[1]).any(dim=1).double().mean() > 0.25
    with pytest.raises(ValueError, match="at least 2 experts per group"):
        route(row(0, 0), RoutingConfig(1, num_groups=2, group_score="top2_sum"))


def test_gating__topk_share_sum_is_top2_sum():
    r"""Is Megatron's group score, the best K / G' of a group, equal to DeepSeek-V3's best two?

    Only if $\lfloor K / G' \rfloor = 2$ for $G'$ open groups, as with DeepSeek-V3's K = 8 and 4
    groups. With a share of one it is DeepSeek-V2's best expert.

    Asked: Megatron #1441
    """
    logits = normal(0, 300, 64)
    same_as = {(8, 4): {"top2_sum"}, (5, 2): {"top2_sum"}, (4, 4): {"max"}, (6, 2): set()}
    for (K, topk_groups), same in same_as.items():
        limit = {"num_groups": 8, "topk_groups": topk_groups}
        share, top2, best = (
            chosen(route(logits, RoutingConfig(K, "sigmoid", **limit, group_score=group_score))[1])
            for group_score in ("topk_share_sum", "top2_sum", "max")
        )
        assert torch.equal(share, top2) == ("top2_sum" in same)
        assert torch.equal(share, best) == ("max" in same)


def test_gating__all_groups_open_is_no_limit():
    r"""Is a group limit that opens all groups equal to none?

    Yes, whatever the group score and the bias.
    """
    for seed, E, G in ((0, 8, 2), (1, 64, 8), (2, 6, 3)):
        logits, bias = normal(seed, 100, E), normal(seed + 10, E)
        for group_score, score in product(("max", "top2_sum", "topk_share_sum"), SCORES):
            fields = {"top_k": G, "score": score, "renormalize": True}
            limit = {"num_groups": G, "topk_groups": G, "group_score": group_score}
            left = route(logits, RoutingConfig(**fields), bias)
            right = route(logits, RoutingConfig(**fields, **limit), bias)
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])


def test_gating__groups_of_one_are_no_limit():
    r"""Is a group limit with one expert per group equal to none?

    Yes, as long as at least K groups are open: the best of the best experts are the best experts.
    """
    for logits, K in draws(((4, 2), (7, 3), (72, 6))):
        E = logits.shape[1]
        for topk_groups in {K, (K + E) // 2, E}:
            config = RoutingConfig(K, num_groups=E, topk_groups=topk_groups)
            left, right = route(logits, config), route(logits, RoutingConfig(K))
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])


def test_gating__mask_zero_is_mask_infinity():
    r"""Is masking closed groups with 0 equal to masking them with minus infinity?

    Only if every selection score of an open group is above 0 in floating point. Scores are, unless
    they underflow; biased scores are not. DeepSeek-V2 masks with 0, DeepSeek-V3 did until
    DeepSeek-V3-0324, vLLM, torchtitan and Megatron mask with minus infinity.

    Asked: vLLM #13474; transformers #45441; DeepSeek-V3 #741; ktransformers #1148
    """
    limit = {"num_groups": 8, "topk_groups": 4, "group_score": "top2_sum"}
    infinity = RoutingConfig(8, "sigmoid", **limit)
    zero = RoutingConfig(8, "sigmoid", **limit, mask_fill="zero")
    for dtype in DTYPES:
        logits, none = normal(0, 300, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
        assert torch.equal(route(logits, zero, none)[1], route(logits, infinity, none)[1])
        left, right = (chosen(route(logits, config, none - 2)[1]) for config in (zero, infinity))
        assert (left != right).any(dim=1).all()
    # Two experts: the open one has a negative score, the closed one gets 0 and wins.
    pair = {"num_groups": 2, "topk_groups": 1}
    bias = torch.tensor([-1.0, -1.0])
    ids = [
        route(row(1, 0), RoutingConfig(1, "sigmoid", **pair, mask_fill=fill), bias)[1].item()
        for fill in ("-inf", "zero")
    ]
    assert ids == [0, 1]
    # Four experts, no bias: the second expert of the open group has a softmax of 0 in float32.
    below = row(-300, -300, 0, -200)
    ids = [
        chosen(route(below, RoutingConfig(2, **pair, mask_fill=fill))[1]).tolist()
        for fill in ("-inf", "zero")
    ]
    assert ids == [[[2, 3]], [[0, 2]]]


def test_gating__renormalising_a_single_weight():
    r"""With K = 1, is renormalising the weight equal to leaving it?

    No: s / s is 1 for every token, and the router gets no gradient. DeepSeek and Megatron
    renormalise sigmoid scores only for K > 1; top-k, then softmax is the same constant, and
    Megatron wants softmax first where K = 1.

    Asked: Megatron #894; minimind #858, #859; megablocks #87
    """
    configs = {
        "kept": RoutingConfig(1),
        "skipped": RoutingConfig(1, renormalize=True, renormalize_single=False),
        "renormalized": RoutingConfig(1, renormalize=True),
        "topk_then_softmax": RoutingConfig(1, order="topk_then_score"),
    }
    for logits, _K in draws(((2, 1), (7, 1), (72, 1))):
        weights, gradients = {}, {}
        for name, config in configs.items():
            leaf = logits.clone().requires_grad_()
            weights[name] = route(leaf, config)[0]
            gradients[name] = torch.autograd.grad(weights[name].sum(), leaf)[0]
        assert torch.equal(weights["kept"], weights["skipped"])
        assert gradients["kept"].abs().max() > 1e-3
        for name in ("renormalized", "topk_then_softmax"):
            assert torch.equal(weights[name], torch.ones_like(weights[name]))
            # Of the softmax's own gradient two equal halves cancel, up to a rounding of each.
            assert gradients[name].abs().max() <= 4 * torch.finfo(logits.dtype).eps


def test_gating__epsilon_added_or_clamped():
    r"""Is dividing by the sum plus epsilon equal to dividing by the sum clamped to epsilon?

    Only where the sum is far above epsilon: there both are the bare sum, to the last bit. Where all
    chosen scores underflow both give 0 and no epsilon gives NaN. DeepSeek adds $10^{-20}$, st-moe
    clamps at $10^{-9}$, vLLM and Mixtral have none.

    Asked: flashinfer #3803, #3946
    """
    fields = {"score": "sigmoid", "renormalize": True}
    add, clamp, none = {"epsilon": 1e-20}, {"epsilon": 1e-20, "epsilon_mode": "clamp"}, {}
    for logits, K in draws():
        left, middle, right = (
            route(logits, RoutingConfig(K, **fields, **e))[0] for e in (add, clamp, none)
        )
        assert torch.equal(left, middle)
        assert torch.equal(left, right)
    underflow = row(-200, -200)
    left, middle, right = (
        route(underflow, RoutingConfig(2, **fields, **e))[0] for e in (add, clamp, none)
    )
    assert left.tolist() == middle.tolist() == [[0.0, 0.0]]
    assert right.isnan().all()
    # A sum of exactly epsilon is where they are furthest apart.
    half = {"epsilon": 0.5, "renormalize": True}
    assert route(row(0), RoutingConfig(1, "sigmoid", **half))[0].item() == 0.5
    assert route(row(0), RoutingConfig(1, "sigmoid", **half, epsilon_mode="clamp"))[0].item() == 1.0


def test_gating__l2_norm_is_sum():
    r"""Is renormalising by the Euclidean norm equal to renormalising by the sum?

    Only if K = 1. The weights are proportional, but those divided by the Euclidean norm add up to
    between 1 and $\sqrt K$. Megablocks offers any p-norm, the others take the sum.
    """
    for logits, K in draws():
        by_sum = route(logits, RoutingConfig(K, renormalize=True))[0]
        by_l2 = route(logits, RoutingConfig(K, renormalize=True, norm="l2"))[0]
        totals = by_l2.sum(dim=1, keepdim=True)
        # Both have a sum of K, and so has their quotient.
        assert_close(by_l2 / totals, by_sum, 3 * K + 8)
        slack = K * torch.finfo(logits.dtype).eps
        assert ((totals >= 1 - slack) & (totals <= math.sqrt(K) + slack)).all()
        if K == 1:
            assert torch.equal(by_l2, by_sum)
        else:
            assert_far(by_l2, by_sum)
    by_l2 = route(row(0, 0), RoutingConfig(2, renormalize=True, norm="l2"))[0]
    assert by_l2.sum().item() == pytest.approx(math.sqrt(2), rel=1e-6)


def test_gating__hash_table_is_top_k():
    r"""Are experts from a hash table weighted like experts from top-k?

    Yes: the weights are the scores of the named experts either way, and where the table names those
    that top-k would have chosen, nothing changes. DeepSeek-V4's first layers look experts up by
    token id, and a selection bias has no say there.

    Asked: vLLM #50844
    """
    for logits, K in draws():
        T, E = logits.shape
        weights, ids = route(logits, RoutingConfig.preset("deepseek-v4", top_k=K))
        config = RoutingConfig.preset("deepseek-v4", top_k=K, hash_table=ids)
        bias = normal(0, E, dtype=logits.dtype)
        looked_up, named = route(logits, config, bias, torch.arange(T))
        assert torch.equal(looked_up, weights)
        assert torch.equal(named, ids)
        shifted = RoutingConfig.preset("deepseek-v4", top_k=K, hash_table=(ids + 1) % E)
        looked_up, named = route(logits, shifted, bias, torch.arange(T))
        assert torch.equal(named, (ids + 1) % E)
        own = scores(logits, "sqrtsoftplus").gather(1, named)
        assert_close(looked_up, 1.5 * own / own.sum(dim=1, keepdim=True), 2 * K + 8)


def test_gating__sqrtsoftplus_is_a_square_root():
    r"""Is sqrtsoftplus the square root of the logit?

    Only where the logit is large. $\sqrt{\log(1 + e^x)}$ is 0.83 at zero and $e^{x/2}$ far below;
    there softplus underflows before its root does, so that `sqrt(softplus(x))` is 0 and its
    gradient not finite. DeepSeek-V4 and Megatron score with it.
    """
    x = torch.tensor([30.0, 100.0, 1000.0])
    # softplus(30) - 30 is e^-30, and the root halves a relative error.
    assert_close(scores(x, "sqrtsoftplus"), x.sqrt(), 2)
    assert scores(torch.zeros(1), "sqrtsoftplus").item() == pytest.approx(math.sqrt(math.log(2)))
    x = torch.tensor([-10.0, -60.0, -120.0])
    for dtype in DTYPES:
        exact = torch.log1p(torch.exp(x.double())).sqrt().to(dtype)
        # The exponential's argument, here up to 60, is its number of half roundings.
        assert_close(scores(x.to(dtype), "sqrtsoftplus"), exact, SCORE + 60)
    low = torch.tensor([-120.0], requires_grad=True)
    assert torch.autograd.grad(scores(low, "sqrtsoftplus").sum(), low)[0].item() > 0
    naive = F.softplus(low).sqrt()
    assert naive.item() == 0.0
    assert not torch.autograd.grad(naive.sum(), low)[0].isfinite()


# Load balancing


def choose(logits, K):
    return route(logits, RoutingConfig(K))[1]


def loss(name, logits, ids, **fields):
    return balance_loss(logits, ids, BalanceConfig(name, **fields))


def test_load_balancing__deepseek_is_switch():
    r"""Is DeepSeek's expert-level loss equal to Switch's and Megatron's?

    Yes, for every K: $f_i = \frac{E}{KT} c_i$ with a plain sum, or $f_i = \frac{c_i}{KT}$ and a
    factor of E. Balanced is 1.

    Asked: Megatron #1513; allenai/OLMoE#45; minimind #290
    """
    for logits, K in draws():
        (T, E), ids = logits.shape, choose(logits, K)
        c_E, P_E = one_hot_counts(ids, E).to(logits), torch.softmax(logits, dim=1).mean(dim=0)
        megatron = (c_E * torch.softmax(logits, dim=1).sum(dim=0)).sum() * E / (K * T * T)
        deepseek = (P_E * (c_E * E / (K * T))).sum()
        assert_close(loss("switch", logits, ids), megatron, SCORE + T + 2 * E)
        assert_close(loss("deepseek_expert", logits, ids), deepseek, SCORE + T + 2 * E)
        assert torch.equal(loss("switch", logits, ids), loss("deepseek_expert", logits, ids))


def test_load_balancing__transformers_is_switch():
    r"""For one layer, is transformers' loss equal to Switch's?

    Only if K = 1: otherwise it is exactly K times as large, because its share counts per token and
    not per assignment. A balanced Mixtral has a loss of 2, and a coefficient carried over between
    transformers and Megatron has to be divided or multiplied by K.

    Asked: allenai/OLMoE#45; minimind #290
    """
    for logits, K in draws():
        (T, E), ids = logits.shape, choose(logits, K)
        shares_KE = F.one_hot(ids, E).to(logits).mean(dim=0)
        plain = (shares_KE * torch.softmax(logits, dim=1).mean(dim=0)).sum() * E
        concatenated = loss("transformers_concatenated", logits, ids)
        assert_close(concatenated, plain, SCORE + T + 2 * E)
        assert_close(concatenated, K * loss("switch", logits, ids), 2)
    assert loss("switch", torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]])).item() == 1.0
    both = loss("transformers_concatenated", torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    assert both.item() == 2.0


def test_load_balancing__gshard_is_switch():
    r"""Is GShard's loss equal to Switch's?

    Only if K = 1 and the batch is one sequence. GShard, st-moe and DeepSpeed count a token's first
    choice and not the others, and GShard and st-moe take the loss of each sequence.

    Asked: DeepSpeed #2551, #5156
    """
    for logits, K in draws():
        E, ids = logits.shape[1], choose(logits, K)
        f_E = one_hot_counts(ids[:, 0], E).to(logits) / len(ids)
        plain = (f_E * torch.softmax(logits, dim=1).mean(dim=0)).mean() * E**2
        assert_close(loss("gshard", logits, ids), plain, SCORE + len(ids) + 2 * E)
        if K == 1:
            assert torch.equal(loss("gshard", logits, ids), loss("switch", logits, ids))
    # Both tokens have both experts, but prefer the first: balanced to Switch, not to GShard.
    logits, ids = row(1, -1).repeat(2, 1), torch.tensor([[0, 1], [0, 1]])
    assert loss("switch", logits, ids).item() == pytest.approx(1.0)
    assert loss("gshard", logits, ids).item() > 1.7
    # Two sequences of one token each, one expert each: balanced together, collapsed alone.
    logits, ids = torch.tensor([[9.0, -9.0], [-9.0, 9.0]]), torch.tensor([[0], [1]])
    assert loss("gshard", logits, ids).item() == pytest.approx(1.0)
    assert loss("gshard", logits, ids, sequence_length=1).item() == pytest.approx(2.0)


def test_load_balancing__balanced_is_least():
    r"""Is the balanced value of 1 the least that Switch's loss can be?

    No. It is the value where counts or probabilities are even, but counts that lean one way and
    probabilities that lean the other give less, 8/9 for three tokens and two experts: a logged loss
    below 1 is no mistake by itself.

    Asked: allenai/OLMoE#40; Megatron #1545
    """
    logits = torch.tensor([[1e-9, 0.0], [1e-9, 0.0], [-99.0, 0.0]], dtype=torch.float64)
    assert loss("switch", logits, choose(logits, 1)).item() == pytest.approx(8 / 9)
    even, ids = torch.zeros(8, 4), torch.randint(0, 4, (8, 2), generator=seeded(0))
    assert loss("switch", even, ids).item() == 1.0
    even_ids = torch.arange(8).view(4, 2) % 4
    for seed in range(5):
        assert_close(
            loss("switch", normal(seed, 4, 4), even_ids), torch.ones((), dtype=DTYPES[0]), 40
        )


def test_load_balancing__sigmoid_is_softmax():
    r"""Is the loss of normalised sigmoid scores equal to the loss of the softmax?

    Only where the counts or the scores are even. DeepSeek-V3's sequence-level loss has sigmoid
    scores divided by their sum; Megatron once took the softmax for both.

    Asked: Megatron #1438
    """
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6))):
        (T, E), ids = logits.shape, torch.arange(K).expand(len(logits), K)
        ranked = logits.sort(dim=1, descending=True).values
        s = torch.sigmoid(ranked)
        P_E = (s / s.sum(dim=1, keepdim=True)).mean(dim=0)
        sigmoid = loss("switch", ranked, ids, score="sigmoid")
        assert_close(sigmoid, E / K * P_E[:K].sum(), SCORE + T + 2 * E)
        assert_far(sigmoid, loss("switch", ranked, ids))
        everyone = torch.arange(E).expand(T, E)
        for x, chosen_ids in ((torch.full_like(ranked, 3.0), ids), (ranked, everyone)):
            left, right = (loss("switch", x, chosen_ids, score=s) for s in ("sigmoid", "softmax"))
            assert_close(left, right, SCORE + T + 2 * E)


def test_load_balancing__sigmoid_scores_that_vanish():
    r"""Is the epsilon of 1e-20 under normalised sigmoid scores harmless to the loss?

    Only where a token's scores add up to far more than that. A router that pushes them all below
    brings the loss to zero without balancing anything; without an epsilon the loss would become
    that of the softmax.

    Asked: Megatron #1545
    """
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6))):
        (T, E), ids = logits.shape, torch.arange(K).expand(len(logits), K)
        ranked = logits.sort(dim=1, descending=True).values
        usual, low = (loss("switch", ranked - c, ids, score="sigmoid") for c in (0.0, 60.0))
        bare = {"score": "sigmoid", "epsilon": 0.0}
        assert torch.equal(loss("switch", ranked, ids, **bare), usual)
        # Scores are at most e^-56, and 72 of them 4e-23.
        assert low < 0.01 * usual
        # Logits of 60 and more have 60 and more half roundings, and so have the exponentials.
        without = loss("switch", ranked - 60, ids, **bare)
        assert_close(without, loss("switch", ranked, ids), SCORE + 2 * 64 + T + 2 * E)


def test_load_balancing__sum_over_all_pairs():
    r"""Is the sum of shares times probabilities over all pairs of experts a balancing loss?

    No: it factors into $\sum f_i \cdot \sum P_j = 1$, so the loss is E for every router and its
    gradient is zero. transformers once computed that, and hyper_parallel does in another form.

    Asked: transformers #28093, #28255; hyper-parallel #752
    """
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6))):
        leaf = logits.clone().requires_grad_()
        (T, E), ids = logits.shape, torch.arange(K).expand(len(logits), K)
        f_E = one_hot_counts(ids, E).to(logits) / (T * K)
        P_E = torch.softmax(leaf, dim=1).mean(dim=0)
        pairs = E * (f_E[:, None] * P_E[None, :]).sum()
        assert_close(pairs.detach(), torch.tensor(E, dtype=logits.dtype), SCORE + T + 2 * E)
        # Each logit's gradient is a difference of two equal sums of E terms below 1 each.
        gradient = torch.autograd.grad(pairs, leaf)[0]
        assert gradient.abs().max() <= 2 * E * E * torch.finfo(logits.dtype).eps
        right = torch.autograd.grad(loss("switch", leaf, ids), leaf)[0]
        assert right.abs().max() > 1e-3


def test_load_balancing__probabilities_of_the_chosen_only():
    r"""Is averaging the probabilities of the chosen experts only equal to averaging all of them?

    Only if all tokens choose the same experts. P is the mean of the full distribution, also over
    tokens that went elsewhere; restricted to the chosen ones, experts that nobody chose cannot be
    raised.

    Asked: paiml/aprender#2162
    """

    def restricted(logits, ids):
        (T, E), K = logits.shape, ids.shape[1]
        probabilities = torch.softmax(logits, dim=1)
        mine = torch.zeros_like(probabilities).scatter(1, ids, probabilities.gather(1, ids))
        return E * (one_hot_counts(ids, E).to(logits) / (T * K) * mine.mean(dim=0)).sum()

    for logits, K in draws():
        (T, E), flat = logits.shape, logits / 4
        for ids in (torch.arange(K).expand(T, K), (torch.arange(T)[:, None] + torch.arange(K)) % E):
            alike = (ids.sort(dim=1).values == ids[0].sort().values).all()
            if alike:
                assert_close(restricted(flat, ids), loss("switch", flat, ids), SCORE + T + 2 * E)
            else:
                assert_far(restricted(flat, ids), loss("switch", flat, ids))
    assert loss("switch", row(0, 0).repeat(2, 1), torch.tensor([[0], [1]])).item() == 1.0
    assert restricted(row(0, 0).repeat(2, 1), torch.tensor([[0], [1]])).item() == 0.5


def test_load_balancing__concatenated_layers():
    r"""Is one loss over the concatenated layers equal to the mean of the layers' own losses?

    Only if there is one layer, or all layers have the same counts and probabilities. transformers
    concatenates: eight layers that each collapse on an expert of their own look perfectly balanced.

    Asked: transformers #28255, #31464
    """
    config = BalanceConfig("transformers_concatenated")
    logits = list(normal(0, 3, 12, 4))
    ids = [choose(each, 2) for each in logits]
    own = balance_loss(logits[0], ids[0], config)
    assert torch.equal(concatenated_balance_loss(logits[:1], ids[:1], config), own)
    same = concatenated_balance_loss([logits[0]] * 3, [ids[0]] * 3, config)
    assert_close(same, own, SCORE + 36)
    mean = torch.stack(
        [balance_loss(*each, config) for each in zip(logits, ids, strict=True)]
    ).mean()
    assert_far(concatenated_balance_loss(logits, ids, config), mean)
    # Eight experts, two chosen, eight layers that each collapse on a pair of their own.
    pairs = [torch.tensor([[e, (e + 1) % 8]]) for e in range(8)]
    sure = [torch.full((1, 8), -40.0).scatter(1, pair, row(40, 39)) for pair in pairs]
    assert concatenated_balance_loss(sure, pairs, config).item() == pytest.approx(2.0)
    for each in zip(sure, pairs, strict=True):
        assert balance_loss(*each, config).item() == pytest.approx(8.0)
    # The smallest: two layers of one token, two experts.
    collapsed = [row(50, -50), row(-50, 50)]
    ids = [torch.tensor([[0]]), torch.tensor([[1]])]
    assert concatenated_balance_loss(collapsed, ids, config).item() == 1.0
    assert [balance_loss(*each, config).item() for each in zip(collapsed, ids, strict=True)] == [
        2,
        2,
    ]


def test_load_balancing__sequence_level_is_expert_level():
    r"""Is DeepSeek's sequence-level loss equal to its expert-level loss?

    Only if the batch is one sequence. Otherwise it is the mean of the sequences' own losses, and
    sequences that each keep to an expert of their own are collapsed, however even the batch is.

    Asked: Megatron #5798
    """
    for logits, K in draws():
        ids = choose(logits, K)
        whole = loss("deepseek_expert", logits, ids)
        one = loss("deepseek_sequence", logits, ids, sequence_length=len(logits))
        assert torch.equal(one, whole)
        two = loss("deepseek_sequence", logits, ids, sequence_length=3)
        halves = [
            loss("deepseek_expert", *each)
            for each in zip(logits.split(3), ids.split(3), strict=True)
        ]
        assert_close(two, torch.stack(halves).mean(), 4)
    logits, ids = torch.tensor([[50.0, -50.0], [-50.0, 50.0]]), torch.tensor([[0], [1]])
    assert loss("deepseek_expert", logits, ids).item() == 1.0
    assert loss("deepseek_sequence", logits, ids, sequence_length=1).item() == 2.0


def test_load_balancing__device_level_is_expert_level():
    r"""Is DeepSeek's device-level loss equal to its expert-level loss?

    Only if every device holds one expert. With all experts on one device it is the constant 1, and
    in between it does not see imbalance inside a device.

    Source: DeepSeekMoE (arXiv 2401.06066), equations 15-17
    """
    for logits, K in draws():
        (T, E), ids = logits.shape, choose(logits, K)
        each = loss("deepseek_device", logits, ids, num_devices=E)
        assert_close(each, loss("deepseek_expert", logits, ids), 2 * E + 4)
        everything = loss("deepseek_device", logits, ids, num_devices=1)
        assert_close(everything, torch.ones_like(everything), SCORE + T + 2 * E)
    logits, ids = row(50, -50, -50, -50), torch.tensor([[0]])
    assert loss("deepseek_expert", logits, ids).item() == 4.0
    assert loss("deepseek_device", logits, ids, num_devices=2).item() == 2.0


def test_load_balancing__mean_over_ranks_is_the_global_loss():
    r"""Is the mean over ranks (or micro-batches) of their own losses the loss of the global batch?

    Only if every part uses the counts of the global batch, as Megatron's global loss does, or has
    the same shares by itself: the loss is linear in the probabilities once the counts are fixed,
    and not linear in both. Parts with unequal numbers of tokens have to be weighted by them.

    Asked: Megatron #3672, #5047, #7213
    """
    config = BalanceConfig("switch")
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6))):
        (T, E), ids = logits.shape, choose(logits, K)
        whole, counts = loss("switch", logits, ids), count_tokens(ids, E)
        parts = list(zip(logits.split(T // 3), ids.split(T // 3), strict=True))
        with_global = [balance_loss(*each, config, tokens_per_expert=counts) for each in parts]
        assert_close(torch.stack(with_global).mean(), whole, SCORE + T + 2 * E)
        with_own = torch.stack([balance_loss(*each, config) for each in parts]).mean()
        if all(torch.equal(3 * count_tokens(own, E), counts) for _, own in parts):
            assert_close(with_own, whole, SCORE + T + 2 * E)
        else:
            assert_far(with_own, whole)
    logits, ids = torch.tensor([[50.0, -50.0], [-50.0, 50.0]]), torch.tensor([[0], [1]])
    assert loss("switch", logits, ids).item() == 1.0
    assert [loss("switch", logits[r : r + 1], ids[r : r + 1]).item() for r in (0, 1)] == [2, 2]


def test_load_balancing__counts_after_dropping():
    r"""Is counting after the drop to capacity equal to counting before it?

    Only if nothing is dropped. The drop cuts the counts of exactly the experts that have too many,
    and with every expert filled to capacity the loss is 1, however the router leans.

    Asked: Megatron #1513, #1617
    """
    logits = normal(0, 24, 4)
    logits[:, 0] += 4
    ids = choose(logits, 2)
    weights = torch.ones_like(ids, dtype=torch.float64)
    before = loss("switch", logits, ids)
    kept = drop_to_capacity(weights, ids, 4, capacity=24)[1]
    assert torch.equal(loss("switch", logits, kept), before)
    kept = drop_to_capacity(weights, ids, 4, capacity=3)[1]
    assert count_tokens(kept, 4).tolist() == [3, 3, 3, 3]
    assert loss("switch", logits, kept).item() == pytest.approx(1.0)
    assert before > 1.5


def test_load_balancing__probabilities_for_logits():
    r"""Can the loss be given the router's probabilities instead of its logits?

    No: softmax is taken once more, of numbers between 0 and 1, and every router looks nearly even.

    Asked: transformers #45120, #45315
    """
    logits, ids = row(50, -50), torch.tensor([[0]])
    assert loss("switch", logits, ids).item() == 2.0
    assert loss("switch", torch.softmax(logits, dim=1), ids).item() < 1.5
    collapsed = normal(0, 50, 8)
    collapsed[:, 0] += 9
    ids = choose(collapsed, 1)
    assert loss("switch", collapsed, ids) > 7
    assert loss("switch", torch.softmax(collapsed, dim=1), ids) < 2.4


def test_load_balancing__z_loss_under_a_constant():
    r"""Is the z-loss, like softmax, unchanged when a constant is added to all logits?

    No: that is what it is for. $\log \sum e^{x_i + c}$ is c greater, so the z-loss pulls the logits
    to where it is 0, and the balancing losses do not feel it.

    Source: ST-MoE (arXiv 2202.08906)
    """
    for logits, K in draws(((2, 1), (7, 3), (72, 6))):
        ids = choose(logits, K)
        # Logits of at most 8 are off by 8 half roundings each.
        assert_close(
            loss("switch", logits + 4, ids), loss("switch", logits, ids), 80 + logits.shape[1]
        )
        z_T = torch.logsumexp(logits, dim=1)
        assert_far(z_loss(logits + 4), z_loss(logits))
        shifted = logits - z_T[:, None]
        assert (
            z_loss(shifted) <= (SCORE * torch.finfo(logits.dtype).eps) ** 2 * logits.shape[1] ** 2
        )
    assert z_loss(row(0)).item() == 0.0
    assert z_loss(row(4)).item() == 16.0


def test_load_balancing__injected_gradient_is_an_added_loss():
    r"""Is injecting the auxiliary loss into the backward pass equal to adding it to the main loss?

    Only if the main loss is not multiplied before `backward`, for loss scaling or accumulation.
    DeepSeek's `AddAuxiliaryLoss` always injects a gradient of 1; Megatron's scaler injects the main
    loss's own factor, which is equal to adding.

    Asked: DeepSeek-MoE #17; Automodel #1408
    """

    def gradient(join, factor):
        logits = normal(0, 6, 4).requires_grad_()
        auxiliary = loss("switch", logits, choose(logits.detach(), 2))
        output = torch.softmax(logits, dim=1) * normal(1, 6, 4)
        if join is None:
            total = factor * (output.square().sum() + auxiliary)
        else:
            total = factor * join(output, auxiliary).square().sum()
        return torch.autograd.grad(total, logits)[0]

    for factor in (1.0, 1024.0):
        added = gradient(None, factor)
        scaled = gradient(lambda y, a, s=factor: inject_scaled_loss(y, a, s), factor)
        # Sums of two gradients that were added in another order.
        assert (scaled - added).abs().max() <= 8 * torch.finfo(torch.float64).eps * factor
        injected = gradient(inject_loss, factor)
        if factor == 1.0:
            assert (injected - added).abs().max() <= 8 * torch.finfo(torch.float64).eps
        else:
            assert_far(injected, added)


def test_load_balancing__centred_update_chooses_alike():
    r"""Does centring the bias update change which experts are chosen?

    No: torchtitan's centred steps differ from DeepSeek's and Megatron's by the same number
    for every expert, and a constant added to all biases changes no choice. Without centring the
    biases drift together.

    Asked: torchtitan #1506
    """
    plain = centred = torch.zeros(8, dtype=torch.float64)
    config = RoutingConfig(2, "sigmoid")
    # The steps are multiples of 2^-9, so that no sum of biases is rounded.
    for step in range(20):
        logits = normal(step, 40, 8) + torch.arange(8) / 8
        left, right = route(logits, config, plain), route(logits, config, centred)
        assert torch.equal(left[1], right[1])
        assert torch.equal(left[0], right[0])
        counts = count_tokens(left[1], 8)
        plain = update_bias(plain, counts, 2**-6, centred=False)
        centred = update_bias(centred, counts, 2**-6, centred=True)
        assert len((plain - centred).unique()) == 1
    assert centred.sum().item() == 0.0
    assert plain.abs().max() > 0
    # The smallest: one busy expert and two idle ones, where the mean of the step is not 0.
    counts = torch.tensor([3, 0, 0])
    assert update_bias(torch.zeros(3), counts, 1.0, centred=False).tolist() == [-1.0, 1.0, 1.0]
    assert update_bias(torch.zeros(3), counts, 3.0, centred=True).tolist() == [-4.0, 2.0, 2.0]
