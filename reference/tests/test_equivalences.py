r"""Is X equal to Y? Each test is a question and its answer, and the page of equivalences is made
from them: a docstring of question, answer, and where it was asked."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from moe_reference.alignment import align, align_batched
from moe_reference.bias_update import update_bias
from moe_reference.capacity import drop_to_capacity
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.dispatch import combine, count_tokens, dispatch
from moe_reference.expert_slicing import slice_experts, slice_tensor_parallel
from moe_reference.experts import experts, experts_batched, experts_grouped, init_experts
from moe_reference.gating import route, scores
from moe_reference.layer import layer, moe_infer
from moe_reference.layouts import LAYOUTS, from_layout
from moe_reference.load_balancing import balance_loss, concatenated_balance_loss, z_loss
from moe_reference.loss_graph import inject_loss, inject_scaled_loss
from moe_reference.placement import add_shared_column

SEEDS = range(4)
# Everything here is float64: twenty roundings of numbers below a hundred stay below this.
same = torch.testing.assert_close


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def differ(one, other, by=1e-3):
    assert (one - other).abs().max() > by


def chosen_sets(ids):
    return [set(row) for row in ids.tolist()]


def some_experts(count=4, bias=False, gated=True, hidden=5, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return init_experts(count, hidden, width, gated, bias, generator, torch.float64)


def routed(tokens=7, count=4, top_k=2, hidden=5, seed=1):
    weights, ids = route(drawn(tokens, count, seed=seed), RoutingConfig(top_k, renormalize=True))
    return drawn(tokens, hidden, seed=seed + 1), weights, ids


def test_gating__softmax_topk_renormalised_and_topk_softmax():
    r"""Is softmax, then top-k, then renormalisation equal to top-k, then softmax?

    Yes: $e^{x_i} / \sum_E$ divided by the sum over the chosen is $e^{x_i} / \sum_K$. Mixtral writes
    the one and gpt-oss the other.

    Asked: Megatron-LM #955, Megatron-LM #1593, Qwen #687
    """
    for seed in SEEDS:
        for E, K in ((2, 1), (8, 2), (60, 4), (8, 8)):
            logits = 3 * drawn(5, E, seed=seed)
            one = route(logits, RoutingConfig(K, renormalize=True))
            other = route(logits, RoutingConfig(K, order="topk_then_score"))
            same(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_gating__softmax_topk_without_renormalising():
    """Is softmax, then top-k, without renormalisation equal to top-k, then softmax?

    Only if K = E. Otherwise the weights add up to less than one, and the choice is the same.

    Asked: Megatron-LM #955, mlxcel #391
    """
    logits = drawn(6, 8)
    for K in (1, 3, 8):
        one = route(logits, RoutingConfig(K))
        other = route(logits, RoutingConfig(K, order="topk_then_score"))
        assert torch.equal(one[1], other[1])
        if K == 8:
            same(one[0], other[0])
        else:
            differ(one[0], other[0])
            assert (one[0].sum(1) < 1).all()


def test_gating__sigmoid_topk_and_topk_sigmoid():
    """Is sigmoid, then top-k equal to top-k, then sigmoid?

    Yes, where nothing is added in between: the sigmoid rises, so that the best logits have the best
    scores. Llama 4 takes the second way.
    """
    for seed in SEEDS:
        logits = drawn(6, 8, seed=seed)
        one = route(logits, RoutingConfig(3, score="sigmoid"))
        other = route(logits, RoutingConfig(3, score="sigmoid", order="topk_then_score"))
        same(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_gating__score_function_and_choice():
    """Do softmax, sigmoid and sqrtsoftplus choose the same experts?

    Only if there is no selection bias. All three rise with the logit; a bias is added to the score,
    and the scores are on other scales.
    """
    logits, bias = drawn(20, 8), 0.3 * drawn(8, seed=5)
    configs = [RoutingConfig(2, score=score) for score in ("softmax", "sigmoid", "sqrtsoftplus")]
    plain = [route(logits, config)[1] for config in configs]
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain[1], plain[2])
    biased = [chosen_sets(route(logits, config, bias)[1]) for config in configs]
    assert biased[0] != biased[1] != biased[2]


def test_gating__constant_added_to_all_logits():
    """Does a constant added to all logits of a token change its routing?

    Only where the score is not a softmax: the softmax does not change, the sigmoid does.
    """
    logits = drawn(6, 8)
    softmax, sigmoid = (RoutingConfig(2, score=score) for score in ("softmax", "sigmoid"))
    same(route(logits + 3, softmax)[0], route(logits, softmax)[0])
    differ(route(logits + 3, sigmoid)[0], route(logits, sigmoid)[0])
    assert torch.equal(route(logits + 3, sigmoid)[1], route(logits, sigmoid)[1])


def test_gating__constant_added_to_all_biases():
    """Does a constant added to all selection biases change the routing?

    No, neither ids nor weights: the bias is compared with itself only. Where it does, the weights
    were taken from the biased scores.

    Asked: vLLM #12002, transformers #41647
    """
    logits, bias = drawn(20, 8), drawn(8, seed=5)
    config = RoutingConfig(2, score="sigmoid", renormalize=True)
    one, other = route(logits, config, bias), route(logits, config, bias + 4)
    same(one[0], other[0])
    assert torch.equal(one[1], other[1])
    score = scores(logits, "sigmoid")
    biased = [(score + b).gather(1, one[1]) for b in (bias, bias + 4)]
    differ(*(each / each.sum(1, keepdim=True) for each in biased))


GROUPED = RoutingConfig(
    2, score="sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum", scale=2.5
)


def by_hand(selection, config, group_score, closed=float("-inf"), bias=None):
    """Sets of chosen experts, with a group score and a fill of its own; a bias comes last."""
    groups = selection.unflatten(1, (config.num_groups, -1))
    ranked = group_score(groups).topk(config.topk_groups).indices
    is_open = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, ranked, True)
    masked = groups.masked_fill(~is_open[:, :, None], closed).flatten(1)
    masked = masked if bias is None else masked + bias
    return chosen_sets(masked.topk(config.top_k).indices)


def best_two(groups):
    return groups.topk(2).values.sum(-1)


def test_gating__bias_before_and_after_the_groups():
    """Is a selection bias added before the groups are limited equal to one added afterwards?

    No. Added before, it can open a group; DeepSeek-V3 does that, hyper_parallel adds it afterwards.
    """
    logits, bias = drawn(200, 16), 0.5 * drawn(16, seed=3)
    score = scores(logits, "sigmoid")
    right = chosen_sets(route(logits, GROUPED, bias)[1])
    assert by_hand(score + bias, GROUPED, best_two) == right
    after = by_hand(score, GROUPED, best_two, bias=bias)
    assert sum(a != b for a, b in zip(after, right, strict=True)) > 50


def test_gating__bias_on_scaled_scores():
    """Is it the same to add the selection bias to the scaled scores?

    Only if the scale is one: otherwise a bias of the same size weighs less or more.
    """
    logits, bias = drawn(200, 8), 0.3 * drawn(8, seed=3)
    config = RoutingConfig(2, score="sigmoid", scale=2.5)
    right = chosen_sets(route(logits, config, bias)[1])
    for scale in (1.0, 2.5):
        scaled = chosen_sets((scale * scores(logits, "sigmoid") + bias).topk(2).indices)
        assert (scaled == right) == (scale == 1.0)


def test_gating__best_expert_and_best_two():
    """Is ranking groups by their best expert equal to ranking them by their best two?

    No: .9 and .1 beat .6 and .6 in the one and lose in the other. DeepSeek-V2 takes the best,
    DeepSeek-V3 the best two.

    Asked: vLLM #13474
    """
    logits = torch.logit(torch.tensor([[0.9, 0.1, 0.6, 0.6]], dtype=torch.float64))
    config = RoutingConfig(1, score="sigmoid", num_groups=2, group_score="max")
    two = dataclasses.replace(config, group_score="top2_sum")
    assert route(logits, config)[1].item() == 0
    assert route(logits, two)[1].item() == 2


def test_gating__share_of_k_and_best_two():
    """Is Megatron's group score, the best K / groups experts, equal to the best two?

    Only if K is twice the number of open groups, as in DeepSeek-V3 (8 of 4).

    Asked: Megatron-LM #1441
    """
    logits = drawn(200, 32)
    for K, is_same in ((8, True), (4, False), (12, False)):
        config = RoutingConfig(K, score="sigmoid", num_groups=8, topk_groups=4)
        share = dataclasses.replace(config, group_score="topk_share_sum")
        two = dataclasses.replace(config, group_score="top2_sum")
        found = [chosen_sets(route(logits, each)[1]) for each in (share, two)]
        assert (found[0] == found[1]) == is_same


def test_gating__all_groups_open():
    """Is a limit that leaves all groups open equal to no groups?

    Yes.
    """
    logits = drawn(20, 16)
    grouped = RoutingConfig(4, num_groups=4, topk_groups=4, group_score="top2_sum")
    one, other = route(logits, grouped), route(logits, RoutingConfig(4))
    assert torch.equal(one[1], other[1])
    same(one[0], other[0])


def test_gating__mask_of_zero():
    """Is masking closed experts with 0 equal to masking them with minus infinity?

    Only if all selection scores are positive. With a negative bias 0 wins, and experts of closed
    groups are chosen.

    Asked: transformers #45441, DeepSeek-V3 #741
    """
    logits = drawn(50, 16)
    score = scores(logits, "sigmoid")
    bias = torch.full((16,), -2.0, dtype=torch.float64)
    assert by_hand(score, GROUPED, best_two, 0.0) == chosen_sets(route(logits, GROUPED)[1])
    closed = by_hand(score + bias, GROUPED, best_two, 0.0)
    right = chosen_sets(route(logits, GROUPED, bias)[1])
    assert all(a != b for a, b in zip(closed, right, strict=True))


def test_gating__scale_before_renormalising():
    """Is a scale before renormalisation equal to one after it?

    No: the division takes it out again.

    Asked: sgl-jax #1282, SGLang #31449
    """
    logits = drawn(6, 8)
    config = RoutingConfig(2, score="sigmoid", renormalize=True, scale=2.5)
    right = route(logits, config)[0]
    best = 2.5 * scores(logits, "sigmoid").topk(2).values
    same(2.5 * best / best.sum(1, keepdim=True), right)
    differ(best / best.sum(1, keepdim=True), right)


def test_gating__renormalising_a_single_expert():
    """Does renormalisation with K = 1 leave the router a gradient?

    No: the weight is one, whatever the logits are. DeepSeek and Megatron do not renormalise a
    single expert.

    Asked: minimind #858, megablocks #87
    """
    for single in (True, False):
        logits = drawn(6, 8).requires_grad_()
        config = RoutingConfig(1, renormalize=True, renormalize_single=single)
        route(logits, config)[0].square().sum().backward()
        assert (logits.grad.abs().max() < 1e-12) == single


def test_gating__epsilon_added_or_clamped():
    """Is adding an epsilon to the divisor equal to clamping it from below?

    Only where the chosen scores do not underflow: 0 / (0 + 1e-20) and 0 / max(0, 1e-9) are both 0,
    and scores as small as the epsilon come out differently.
    """
    config = RoutingConfig(2, score="sigmoid", renormalize=True, epsilon=1e-9)
    clamp = dataclasses.replace(config, epsilon_mode="clamp")
    usual = drawn(6, 8)
    # The epsilon is one billionth of a divisor of about one.
    same(route(usual, config)[0], route(usual, clamp)[0], rtol=1e-8, atol=0)
    tiny = torch.full((1, 8), -20.7, dtype=torch.float64)
    differ(route(tiny, config)[0], route(tiny, clamp)[0])


def test_gating__all_experts():
    """Is top-k with K = E a soft mixture of all experts?

    Yes: the weights are the softmax itself.
    """
    logits = drawn(6, 8)
    weights, ids = route(logits, RoutingConfig(8))
    same(torch.zeros_like(logits).scatter(1, ids, weights), logits.softmax(1))


def test_gating__either_or_of_deepseek_v2():
    """Is DeepSeek-V2's scale, which is applied only without renormalisation, that of DeepSeek-V3?

    Only if nothing is renormalised, as in DeepSeek-V2 itself; V3 scales in any case.

    Asked: Megatron-LM #1593
    """
    logits = drawn(6, 8)
    for renormalize in (False, True):
        v3 = RoutingConfig(2, renormalize=renormalize, scale=16.0)
        v2 = dataclasses.replace(v3, scale_when="not_renormalized")
        one, other = route(logits, v2)[0], route(logits, v3)[0]
        same(one * (16.0 if renormalize else 1.0), other)


def test_load_balancing__switch_and_transformers():
    """Is the loss of transformers K times the one of Switch and Megatron?

    Yes, for one layer: it adds up the K choices where Switch takes their mean, 2 and 1 for
    Mixtral's two of eight at balance.

    Asked: Megatron-LM #1467, OLMoE #45
    """
    for K in (1, 2, 3):
        logits = drawn(30, 8)
        ids = logits.topk(K).indices
        one = balance_loss(logits, ids, BalanceConfig("transformers_concatenated"))
        same(one, K * balance_loss(logits, ids, BalanceConfig("switch")))


def test_load_balancing__gshard_and_switch():
    """Is the loss of GShard equal to the one of Switch?

    Only if K = 1, with one sequence: GShard counts first choices, Switch counts all K.

    Asked: DeepSpeed #2551
    """
    logits = drawn(30, 8)
    for K in (1, 2):
        ids = logits.topk(K).indices
        found = [balance_loss(logits, ids, BalanceConfig(loss)) for loss in ("gshard", "switch")]
        assert torch.isclose(*found) == (K == 1)


def test_load_balancing__sequence_and_expert_level():
    """Is DeepSeek's sequence-level loss equal to its expert-level loss?

    Only if there is one sequence. Over several the one is a mean of losses, the other a loss of
    means, which sees no imbalance that cancels out.
    """
    logits = drawn(24, 8)
    ids = logits.topk(2).indices
    expert = balance_loss(logits, ids, BalanceConfig("deepseek_expert"))
    for length, is_same in ((24, True), (6, False)):
        config = BalanceConfig("deepseek_sequence", sequence_length=length)
        assert torch.isclose(balance_loss(logits, ids, config), expert) == is_same


def test_load_balancing__device_level():
    """Is the device-level loss with one expert per device equal to the expert-level loss?

    Yes.
    """
    logits = drawn(24, 8)
    ids = logits.topk(2).indices
    device = BalanceConfig("deepseek_device", num_devices=8)
    same(
        balance_loss(logits, ids, device),
        balance_loss(logits, ids, BalanceConfig("deepseek_expert")),
    )


def test_load_balancing__layers_concatenated():
    """Is one loss over the tokens of all layers equal to the mean of the layers' losses?

    No. Eight layers that each send everything to an expert of their own look perfectly balanced
    together: 2 instead of 8 for two of eight experts.

    Asked: transformers #28255, transformers #31464
    """
    layers = []
    for one in range(8):
        logits = torch.full((16, 8), -20.0, dtype=torch.float64)
        logits[:, [one, (one + 1) % 8]] = torch.tensor([20.0, 19.0], dtype=torch.float64)
        layers.append(logits)
    ids = [each.topk(2).indices for each in layers]
    config = BalanceConfig("transformers_concatenated")
    together = concatenated_balance_loss(layers, ids, config)
    apart = [balance_loss(a, b, config) for a, b in zip(layers, ids, strict=True)]
    same(together, torch.tensor(2.0, dtype=torch.float64))
    same(torch.stack(apart).mean(), torch.tensor(8.0, dtype=torch.float64))


def test_load_balancing__constant_added_to_all_logits():
    """Does a constant added to all logits change the losses?

    Only where it is the z-loss: the softmax, and every balance loss with it, stays; the z-loss is
    there to pull the constant to zero.
    """
    logits = drawn(24, 8)
    ids = logits.topk(2).indices
    config = BalanceConfig("switch")
    same(balance_loss(logits + 5, ids, config), balance_loss(logits, ids, config))
    differ(z_loss(logits + 5), z_loss(logits))


def test_load_balancing__injected_loss():
    """Is an injected loss equal to one that is added to the main loss?

    Only if the main loss is not scaled before `backward`, or the injected one is scaled alike:
    DeepSeek's `AddAuxiliaryLoss` gives it a gradient of one, Megatron's scaler that of the main
    loss.

    Asked: DeepSeek-MoE #17, NeMo Automodel #1408
    """
    for scale in (1.0, 1024.0):
        found = []
        for inject in (
            None,
            inject_loss,
            lambda output, loss: inject_scaled_loss(output, loss, scale),  # noqa: B023
        ):
            x = drawn(4).requires_grad_()
            output, auxiliary = x * 2, 0.1 * x.square().sum()
            main = (output if inject is None else inject(output, auxiliary)).sum()
            (scale * (main + (auxiliary if inject is None else 0.0))).backward()
            found.append(x.grad / scale)
        same(found[2], found[0])
        if scale == 1.0:
            same(found[1], found[0])
        else:
            differ(found[1], found[0])


def test_load_balancing__centred_bias_update():
    """Does centring the bias update change which experts are chosen?

    No: it moves all biases by the same amount, and the choice compares them with each other. It
    keeps their mean where it was.

    Asked: torchtitan #1506
    """
    logits, counts = drawn(50, 8), torch.tensor([9, 1, 1, 1, 1, 1, 1, 1])
    biases = {}
    for centred in (True, False):
        bias = torch.zeros(8)
        for _ in range(5):
            bias = update_bias(bias, counts, 0.01, centred)
        biases[centred] = bias
    config = RoutingConfig(2, score="sigmoid")
    one, other = (route(logits, config, bias)[1] for bias in biases.values())
    assert torch.equal(one, other)
    assert biases[True].mean().abs() < 1e-6
    assert biases[False].mean() > 0.03


def test_alignment__blocks_of_one():
    """Is alignment with blocks of one slot equal to a stable sort by expert?

    Yes: there is no padding, and each slot is a block of its own.
    """
    ids = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    slots, blocks, length = align(ids, 1, 5)
    assert slots[: int(length)].tolist() == ids.flatten().argsort(stable=True).tolist()
    assert blocks[: int(length)].tolist() == ids.flatten().sort().values.tolist()


def test_alignment__batched_and_flat():
    """Is the batched alignment that of the same tokens, all sent to one expert each?

    Yes, row for row: a batch is a list of tokens with K = 1 whose expert is their place in it.
    """
    counts, most, size = torch.tensor([3, 0, 5]), 6, 4
    ids = torch.full((3, most), -1)
    for e, count in enumerate(counts.tolist()):
        ids[e, :count] = e
    slots, blocks, length = align(ids.view(-1, 1), size, 3, drop_invalid=True)
    rows, batched, batched_length = align_batched(counts, most, size)
    assert int(length) == int(batched_length)
    n = int(length)
    assert slots[:n].tolist() == rows[:n].tolist()
    assert blocks[: n // size].tolist() == batched[: n // size].tolist()


def test_alignment__dropping_and_mapping():
    """Is dropping the ids of other ranks before counting equal to mapping their blocks to -1?

    Only where it is computed: the slots of the rank's own experts are the same, and without
    dropping there are blocks of others between them, to be skipped.

    Asked: vLLM #19590, vLLM #29642
    """
    ids = torch.randint(0, 6, (9, 2), generator=torch.Generator().manual_seed(1))
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1])
    found = []
    for drop in (True, False):
        slots, blocks, length = align(ids, 4, 6, expert_map, drop)
        by_block = slots[: int(length)].view(-1, 4)
        own = blocks[: len(by_block)] >= 0
        found.append((by_block[own].tolist(), blocks[: len(by_block)][own].tolist(), int(length)))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] < found[1][2]


def test_dispatch__there_and_back():
    """Does dispatch followed by combine give x back?

    Only if the weights of a token add up to one: it is x times their sum.
    """
    x, weights, ids = routed()
    rows, _, slots = dispatch(x, ids, 4)
    same(combine(rows, slots, weights), x)
    same(combine(rows, slots, 2 * weights), 2 * x)


def test_dispatch__renormalising_before_and_after_dropping():
    """Is renormalising before tokens are dropped equal to renormalising afterwards?

    No. Before, what was dropped is missing from the output; after, the experts that are left take
    its share. Megatron does the first, DeepSpeed's `topkgating` the second.
    """
    weights, ids = route(drawn(12, 4), RoutingConfig(2, renormalize=True))
    kept, kept_ids = drop_to_capacity(weights, ids, 4, 3, "position")
    before = kept.where(kept_ids >= 0, 0.0)
    after = before / before.sum(1, keepdim=True).clamp_min(1e-9)
    differ(before, after)
    assert (before.sum(1) < 0.999).any()


def test_dispatch__dropping_by_weight_and_by_position():
    """Is dropping by weight equal to dropping by position?

    Only if there is room for all. By position, a token's output depends on who stands before it.

    Asked: Megatron-LM #812
    """
    weights, ids = route(drawn(12, 4), RoutingConfig(2, renormalize=True))
    for capacity, is_same in ((24, True), (3, False)):
        found = [drop_to_capacity(weights, ids, 4, capacity, p)[1] for p in ("probs", "position")]
        assert torch.equal(*found) == is_same
        numbers = [count_tokens(each, 4) for each in found]
        assert torch.equal(*numbers)


def test_experts__weight_on_input_and_output():
    """Is a weight on the input of an expert equal to one on its output?

    Only if the expert is homogeneous: for relu without biases and positive weights it is, for silu
    it is not, and with biases not even for a linear expert. Llama 4 weighs the input.

    Asked: SGLang #7889, vLLM #43694
    """
    x, weights, ids = routed()

    def both(activation, bias, gated=False):
        some = some_experts(bias=bias, gated=gated)
        return [
            experts(x, some, weights, ids, ExpertsConfig(activation, gated, weight_on=on))
            for on in ("input", "output")
        ]

    same(*both("relu", bias=False))
    differ(*both("relu", bias=True))
    differ(*both("silu", bias=False))
    differ(*both("relu", bias=False, gated=True))


def test_experts__concatenated_and_interleaved():
    """Can interleaved weights of gate and up be read as concatenated ones?

    No, and no shape tells: gpt-oss alternates their rows, everybody else has one after the other.

    Asked: sonic-moe #45, Megatron-Bridge #1871
    """
    x, weights, ids = routed()
    some = some_experts()
    config = ExpertsConfig()
    right = from_layout(LAYOUTS["gpt-oss"], some.gate_up, some.down)
    differ(experts(x, some, weights, ids, config), experts(x, right, weights, ids, config), by=1e-2)


def test_experts__gate_and_up_exchanged():
    """Is silu(gate) · up equal to silu(up) · gate?

    No. FlashInfer's CUTLASS kernels want up first, and weights in the other order run without an
    error.

    Asked: SGLang #32430, vLLM #42821
    """
    x, weights, ids = routed()
    some = some_experts()
    turned = ExpertWeights(some.gate_up.roll(6, dims=1), some.down)
    differ(*(experts(x, each, weights, ids, ExpertsConfig()) for each in (some, turned)), by=1e-2)


def test_experts__gelu_and_its_approximation():
    r"""Is gelu equal to gelu with tanh?

    No: they differ by up to $5 \cdot 10^{-4}$ for each number, enough to change tokens in a model.

    Asked: vLLM #41574, vLLM #56839
    """
    x = torch.linspace(-4, 4, 10001, dtype=torch.float64)
    difference = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max()
    assert 4e-4 < difference < 5e-4


def test_experts__swigluoai_and_silu():
    """Is swigluoai with alpha 1 and no limit equal to silu?

    No: it multiplies by up + 1. Less the gate's own part, silu(gate), it is.

    Asked: onnxruntime #28738
    """
    x, weights, ids = routed()
    some = some_experts()
    oai = ExpertsConfig("swigluoai", alpha=1.0, limit=1e9)
    one = experts(x, some, weights, ids, oai)
    other = experts(x, some, weights, ids, ExpertsConfig("silu"))
    differ(one, other)
    gate_only = ExpertWeights(some.gate_up[:, :6], some.down)
    rest = experts(x, gate_only, weights, ids, ExpertsConfig("silu", gated=False))
    same(one - rest, other)


def test_experts__swiglu_limit_without_a_limit():
    """Is swiglu_limit with a limit that nothing reaches equal to silu?

    Yes. DeepSeek-V4's limit is 10.

    Asked: SGLang #23776
    """
    x, weights, ids = routed()
    some = some_experts()
    free = ExpertsConfig("swiglu_limit", limit=1e9)
    same(*(experts(x, some, weights, ids, each) for each in (free, ExpertsConfig("silu"))))
    tight = ExpertsConfig("swiglu_limit", limit=0.1)
    differ(*(experts(x, some, weights, ids, each) for each in (tight, ExpertsConfig("silu"))))


def test_experts__loop_grouped_and_batched():
    """Do a loop over experts, grouped products and a batch of experts give the same?

    Yes, up to the order of sums.

    Asked: transformers #40365
    """
    x, weights, ids = routed()
    some = some_experts(bias=True)
    loop = experts(x, some, weights, ids, ExpertsConfig())
    same(experts_grouped(x, some, weights, ids, ExpertsConfig()), loop)
    rows, counts, slots = dispatch(x, ids, 4)
    batch = torch.zeros(4, int(counts.max()), 5, dtype=x.dtype)
    starts = counts.cumsum(0) - counts
    for e, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        batch[e, :count] = rows[start : start + count]
    out = experts_batched(batch, counts, some, ExpertsConfig())
    back = torch.cat([out[e, :count] for e, count in enumerate(counts.tolist())])
    same(combine(back, slots, weights), loop)


def test_experts__the_same_expert_twice():
    """Is an expert that is chosen twice, with weights a and b, equal to one chosen once with a + b?

    Yes. DeepSeek's `moe_infer` counts it once and fails.
    """
    x, some = drawn(3, 5), some_experts(bias=True)
    twice = torch.tensor([[1, 1]] * 3)
    weights = torch.tensor([[0.3, 0.5]] * 3, dtype=torch.float64)
    once = experts(x, some, weights.sum(1, keepdim=True), twice[:, :1], ExpertsConfig())
    same(experts(x, some, weights, twice, ExpertsConfig()), once)


def test_layer__training_and_inference():
    """Is DeepSeek's `moe_infer` equal to the forward of training?

    Yes, on one rank. The published excerpt lacks the way back from the other ranks.
    """
    x, weights, ids = routed()
    some = some_experts(bias=True)
    for on in ("output", "input"):
        config = ExpertsConfig(weight_on=on)
        same(moe_infer(x, ids, weights, some, config), experts(x, some, weights, ids, config))


def test_layer__shared_expert_and_one_more_routed():
    """Is a shared expert equal to one more routed expert that everybody chooses with weight one?

    Yes, where the routed weights are scaled by themselves. TensorCast adds such a column.
    """
    x, weights, ids = routed()
    some, shared = some_experts(), some_experts(1, seed=9)
    config = ExpertsConfig()
    ones = torch.ones(7, 1, dtype=torch.float64)
    apart = experts(x, some, weights, ids, config) + experts(
        x, shared, ones, torch.zeros(7, 1, dtype=torch.int64), config
    )
    both = ExpertWeights(*(torch.cat([a, b]) for a, b in zip(
        (some.gate_up, some.down), (shared.gate_up, shared.down), strict=True)))  # fmt: skip
    same(experts(x, both, *add_shared_column(weights, ids, 4, 1), config), apart)


def test_layer__shared_experts_and_one_of_their_width():
    """Are n shared experts equal to one of n times their width?

    Yes: DeepSeek stores them as one.
    """
    x = drawn(6, 5)
    two = some_experts(2)
    ones = torch.ones(6, 2, dtype=torch.float64)
    ids = torch.tensor([[0, 1]] * 6)
    gates, ups = two.gate_up[:, :6].flatten(0, 1), two.gate_up[:, 6:].flatten(0, 1)
    wide = ExpertWeights(torch.cat([gates, ups])[None], torch.cat(list(two.down), dim=1)[None])
    one = experts(x, wide, ones[:, :1], ids[:, :1], ExpertsConfig())
    same(experts(x, two, ones, ids, ExpertsConfig()), one)


def layer_of(**parts):
    parameters = LayerWeights(drawn(4, 5), some_experts(bias=True), **parts)
    config = LayerConfig(RoutingConfig(2, renormalize=True))
    return layer(drawn(2, 3, 5, seed=8), parameters, config).output


def test_layer__shared_gate_of_zeros():
    """Is a shared expert whose gate has zero weights equal to one without a gate?

    No: the sigmoid of zero is one half. A gate that was dropped doubles the shared part.

    Asked: Pai-Megatron #402, lmdeploy #3491
    """
    shared = some_experts(1, seed=9)
    routed_only = layer_of()
    whole = layer_of(shared=shared) - routed_only
    gated = layer_of(shared=shared, shared_gate=torch.zeros(1, 5)) - routed_only
    same(gated, whole / 2)


def test_layer__scale_and_down():
    """Is a routing scale equal to scaling `down` of every routed expert?

    Yes, and its bias with it; the shared expert is not scaled. That is how a scale is folded into a
    checkpoint.

    Asked: SGLang #8511, vLLM #45037
    """
    x, weights, ids = routed()
    some = some_experts(bias=True)
    folded = dataclasses.replace(some, down=2.5 * some.down, down_bias=2.5 * some.down_bias)
    config = ExpertsConfig()
    same(experts(x, folded, weights, ids, config), experts(x, some, 2.5 * weights, ids, config))


def test_layer__padding_in_the_batch():
    """Do padding tokens change the outputs of the others?

    No; they change the balance loss unless they are masked.

    Asked: transformers #28505, SGLang #30895
    """
    parameters = LayerWeights(drawn(4, 5), some_experts())
    config = LayerConfig(RoutingConfig(2), balance=BalanceConfig("switch"))
    x = drawn(1, 6, 5, seed=8)
    padded = torch.cat([x, 9 * drawn(1, 1, 5, seed=2).expand(1, 8, 5)], dim=1)
    mask = torch.arange(14)[None] < 6
    plain = layer(x, parameters, config, training=True)
    masked = layer(padded, parameters, config, padding_mask=mask, training=True)
    unmasked = layer(padded, parameters, config, training=True)
    same(masked.output[:, :6], plain.output)
    same(unmasked.output[:, :6], plain.output)
    same(masked.balance_loss, plain.balance_loss)
    differ(unmasked.balance_loss, plain.balance_loss)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_expert_slicing__sum_of_tensor_parallel_ranks(ranks):
    """Do the outputs of tensor-parallel slices add up to the whole?

    Yes, if the bias of `down` is on one of the ranks; on all of them, it is added R times.

    Asked: vLLM #49122, vLLM #49378
    """
    x, weights, ids = routed()
    some = some_experts(bias=True)
    config = ExpertsConfig()
    parts = [slice_tensor_parallel(some, ranks, rank) for rank in range(ranks)]
    whole = experts(x, some, weights, ids, config)
    same(sum(experts(x, part, weights, ids, config) for part in parts), whole)
    everywhere = [dataclasses.replace(part, down_bias=some.down_bias) for part in parts]
    summed = sum(experts(x, part, weights, ids, config) for part in everywhere)
    bias = torch.einsum("tk,tkh->th", weights, some.down_bias[ids])
    same(summed, whole + (ranks - 1) * bias)


def test_expert_slicing__gate_up_cut_as_one():
    """Is cutting gate_up as one tensor equal to cutting gate and up each?

    No: the first ranks would get nothing but gates. hanzo-engine's stacked loader did so.

    Asked: SGLang #15432
    """
    x, weights, ids = routed()
    some = some_experts()
    config = ExpertsConfig()
    naive = [
        ExpertWeights(rows.contiguous(), columns.contiguous())
        for rows, columns in zip(some.gate_up.chunk(2, 1), some.down.chunk(2, 2), strict=True)
    ]
    summed = sum(experts(x, part, weights, ids, config) for part in naive)
    differ(summed, experts(x, some, weights, ids, config), by=1e-2)


def test_expert_slicing__sum_of_expert_parallel_ranks():
    """Do the outputs of ranks that hold some experts each add up to the whole?

    Yes, where ids of other ranks contribute nothing; each token's sum may be taken anywhere.

    Asked: torchtitan #2416
    """
    x, weights, ids = routed()
    some = some_experts(bias=True)
    config = ExpertsConfig()
    total = torch.zeros_like(x)
    for start, count in ((0, 1), (1, 3), (4, 0)):
        expert_map = torch.full((4,), -1)
        expert_map[start : start + count] = torch.arange(count)
        part = slice_experts(some, start, count)
        total = total + experts(x, part, weights, ids, config, expert_map)
    same(total, experts(x, some, weights, ids, config))


def test_expert_slicing__reducing_whole_weights():
    """Is summing over the ranks harmless where every rank has all weights?

    No: the output is R times what it should be, with no error anywhere.

    Asked: SGLang #35535
    """
    x, weights, ids = routed()
    some = some_experts()
    whole = experts(x, some, weights, ids, ExpertsConfig())
    same(sum(experts(x, some, weights, ids, ExpertsConfig()) for _ in range(2)), 2 * whole)
    differ(2 * whole, whole)
