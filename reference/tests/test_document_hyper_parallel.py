"""What is wrong, missing or undefined in hyper_parallel's MoE blocks, each on lines of our own.

Each test plants one mistake, asserts what it gives, and asserts that the reference does otherwise.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from moe_reference.bias_update import global_counts, update_bias
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.dispatch import batch_rows, count_tokens, inclusive_offsets
from moe_reference.expert_slicing import slice_tensor_parallel
from moe_reference.experts import experts, experts_grouped, grouped_product, init_experts
from moe_reference.gating import route, scores
from moe_reference.layer import layer, router_logits
from moe_reference.layouts import from_separate
from moe_reference.load_balancing import balance_loss
from moe_reference.loss_graph import inject_loss
from moe_reference.modules import MoELayer
from torch import nn
from torch.utils.checkpoint import checkpoint

LINEAR = ExpertsConfig("relu", gated=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_layer(top_k=2, num_experts=4, hidden_size=8, seed=0, balance=None):
    """Weights and configuration of a small layer."""
    generator = seeded(seed)
    parameters = LayerWeights(
        router=torch.randn(num_experts, hidden_size, generator=generator),
        experts=init_experts(num_experts, hidden_size, 6, generator=generator),
        selection_bias=torch.zeros(num_experts),
    )
    routing = RoutingConfig(top_k, score="sigmoid", renormalize=True)
    return parameters, LayerConfig(routing, balance=balance)


# Grouped products


def offsets_without_the_last_expert(tokens_per_expert):
    """Where the experts' rows end, if what the last one ends at went without saying."""
    return tokens_per_expert[:-1].cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [[3, 2, 1], [6, 0, 0], [6]])
def test_a_grouped_product_has_as_many_offsets_as_matrices(counts):
    counts = torch.tensor(counts)
    x = torch.randn(6, 16, generator=seeded())
    matrices = torch.randn(len(counts), 32, 16, generator=seeded(1))
    short = offsets_without_the_last_expert(counts)
    with pytest.raises(RuntimeError, match="batch size"):
        F.grouped_mm(x, matrices.transpose(1, 2), offs=short)

    ends = inclusive_offsets(counts)
    assert ends[-1] == 6
    whole = F.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
    # The same float32 products of 16 numbers below 16 in sum, perhaps in another order.
    expected = grouped_product(x, matrices, None, ends)
    torch.testing.assert_close(whole, expected, atol=16 * 2**-23, rtol=1e-5)


def test_the_last_experts_rows_are_in_no_group():
    # What a kernel computes that goes by the offsets alone.
    counts, x = torch.tensor([3, 2, 1]), torch.ones(6, 2)
    matrices = torch.arange(1.0, 4.0).view(3, 1, 1).expand(3, 4, 2)
    short = offsets_without_the_last_expert(counts)
    computed = grouped_product(x[: int(short[-1])], matrices[: len(short)], None, short)
    assert computed[:, 0].tolist() == [2.0, 2.0, 2.0, 4.0, 4.0]
    whole = grouped_product(x, matrices, None, inclusive_offsets(counts))
    assert whole[:, 0].tolist() == [2.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    with pytest.raises(ValueError, match="ends: expected the last one at 6, got 5"):
        grouped_product(x, matrices[: len(short)], None, short)


@pytest.mark.parametrize(("in_features", "out_features"), [(5, 16), (16, 5)])
def test_a_grouped_product_takes_rows_of_whole_sixteen_bytes_only(in_features, out_features):
    counts = torch.tensor([3, 2, 1])
    x = torch.randn(6, in_features, generator=seeded())
    matrices = torch.randn(3, in_features, out_features, generator=seeded(1))
    with pytest.raises(RuntimeError, match="16 bytes"):
        F.grouped_mm(x, matrices, offs=inclusive_offsets(counts))
    here = grouped_product(x, matrices.transpose(1, 2), None, inclusive_offsets(counts))
    assert here.shape == (6, out_features)


def test_a_grouped_product_takes_a_view_of_the_weights():
    # So that the copies of all three weights on every call are for nothing.
    matrices = torch.randn(3, 16, 32, generator=seeded())
    x, ends = torch.randn(6, 32, generator=seeded(1)), inclusive_offsets(torch.tensor([3, 2, 1]))
    view = matrices.transpose(1, 2)
    copy = view.contiguous()
    assert view.data_ptr() == matrices.data_ptr()
    assert copy.data_ptr() != matrices.data_ptr()
    torch.testing.assert_close(  # one sum of 32 products each, perhaps in another order
        F.grouped_mm(x, view, offs=ends), F.grouped_mm(x, copy, offs=ends), atol=1e-5, rtol=1e-5
    )


def product_by_what_the_machine_has(rows, matrices, ends):
    """A product chosen by what there is in the machine, and not by where the rows are."""
    if torch.cuda.is_available():
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
    return grouped_product(rows, matrices, None, ends)


def test_rows_on_the_cpu_take_the_path_of_the_machine(monkeypatch):
    # Rows of 20 bytes, which the grouped product refuses, and which are not on the GPU.
    rows, matrices, ends = (
        torch.ones(3, 5),
        torch.ones(2, 4, 5),
        inclusive_offsets(torch.tensor([1, 2])),
    )
    for machine_has_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=machine_has_cuda: has)
        if machine_has_cuda:
            with pytest.raises(RuntimeError, match="16 bytes"):
                product_by_what_the_machine_has(rows, matrices, ends)
        else:
            assert (product_by_what_the_machine_has(rows, matrices, ends) == 5.0).all()
        held = ExpertWeights(torch.ones(2, 4, 5), torch.ones(2, 5, 4))
        ids, weights = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
        for path in (experts, experts_grouped):
            assert (path(rows, held, weights, ids, LINEAR) == 20.0).all()


# The loop over experts


def zero_that_hangs_on_the_rows_only(rows):
    """What a loop returns that has called no expert: connected to x, and to nothing else."""
    return rows * 0.0


def test_a_rank_without_rows_has_no_gradients_for_its_weights():
    weight = torch.ones(2, 3, requires_grad=True)
    rows = torch.zeros(0, 3, requires_grad=True)
    zero_that_hangs_on_the_rows_only(rows).sum().backward()
    assert weight.grad is None
    assert rows.grad is not None

    held = init_experts(2, 3, 4)
    for each in (held.gate_up, held.down):
        each.requires_grad_()
    no_ids, no_weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    for path in (experts, experts_grouped):
        held.gate_up.grad = held.down.grad = None
        path(torch.zeros(0, 3), held, no_weights, no_ids, ExpertsConfig()).sum().backward()
        assert (held.gate_up.grad == 0).all()
        assert (held.down.grad == 0).all()


def test_rows_of_nobody_times_zero():
    rows = torch.tensor([[1.0], [float("inf")]])
    assert zero_that_hangs_on_the_rows_only(rows).isnan().flatten().tolist() == [False, True]
    nobody, weights = torch.full((2, 1), -1), torch.ones(2, 1)
    held = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    for path in (experts, experts_grouped):
        assert path(rows, held, weights, nobody, LINEAR).flatten().tolist() == [0.0, 0.0]


def slices_by_counts(rows, counts):
    """Consecutive slices, without a look at how many rows there are."""
    parts, start = [], 0
    for count in counts:
        parts.append(rows[start : start + count])
        start += count
    return torch.cat(parts)


@pytest.mark.parametrize(("counts", "result"), [([1, 1], [1.0, 2.0]), ([2, 9], [1.0, 2.0, 3.0])])
def test_counts_that_do_not_add_up_go_unnoticed(counts, result):
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    assert slices_by_counts(rows, counts).flatten().tolist() == result
    with pytest.raises(ValueError, match="tokens_per_expert"):
        batch_rows(rows, torch.tensor(counts), 9)


def round_after_every_step(x, gate, up, down):
    """An expert whose steps are each rounded to the dtype of x."""
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_bfloat16_is_rounded_after_every_step():
    generator = seeded()
    gate, up, down = (
        torch.randn(*shape, generator=generator).bfloat16() / 8
        for shape in ((64, 64), (64, 64), (64, 64))
    )
    x = torch.randn(200, 64, generator=generator).bfloat16()
    exact = round_after_every_step(*(each.double() for each in (x, gate, up, down)))
    stepwise = round_after_every_step(x, gate, up, down).double()
    held = from_separate(gate[None], up[None], down[None])
    ids, weights = torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1)
    here = experts(x, held, weights, ids, ExpertsConfig()).double()

    # One rounding to bfloat16 is at most 2^-8 of the result; 1e-5 is for the float32 sums.
    bound = exact.abs() * 2**-8 + 1e-5
    assert ((here - exact).abs() <= bound).all()
    assert ((stepwise - exact).abs() > bound).double().mean() > 0.1
    assert (stepwise - exact).norm() > 1.5 * (here - exact).norm()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_a_rank_has_of_a_cut_is_a_part(world_size):
    generator = seeded()
    held = init_experts(3, 8, 8, generator=generator)
    ids, weights = torch.randint(0, 3, (5, 2), generator=generator), torch.ones(5, 2)
    whole_x = torch.randn(5, 8, generator=generator, requires_grad=True)
    whole = experts(whole_x, held, weights, ids, ExpertsConfig())
    whole.sum().backward()

    outputs, gradients = [], []
    for rank in range(world_size):
        x = whole_x.detach().clone().requires_grad_()
        part = slice_tensor_parallel(held, world_size, rank)
        output = experts(x, part, weights, ids, ExpertsConfig())
        output.sum().backward()
        outputs.append(output.detach())
        gradients.append(x.grad)
    is_whole = world_size == 1
    assert torch.allclose(outputs[0], whole.detach()) == is_whole
    assert torch.allclose(gradients[0], whole_x.grad) == is_whole
    torch.testing.assert_close(sum(outputs), whole.detach())  # float32 sums in another order
    torch.testing.assert_close(sum(gradients), whole_x.grad)
    # A shared expert that is whole on every rank would be summed as often as there are ranks.
    shared = torch.ones(5, 8)
    summed = sum(output + shared for output in outputs)
    torch.testing.assert_close(summed - whole.detach(), world_size * shared)


# Initialisation


def init_as_one_matrix(num_experts, out_features, in_features, generator):
    """Uniform weights whose fan-in is counted on all dimensions but the first."""
    weight = torch.empty(num_experts, out_features, in_features)
    nn.init.kaiming_uniform_(weight.view(num_experts, -1), a=math.sqrt(5), generator=generator)
    return weight


def test_the_fan_in_of_stacked_weights_is_that_of_one_expert():
    E, H, I = 4, 64, 128
    generator = seeded()
    gate, up = (init_as_one_matrix(E, I, H, generator) for _ in range(2))
    down = init_as_one_matrix(E, H, I, generator)
    # All of 32768 numbers stay below the bound, and one of them comes within 1 % of it.
    assert gate.abs().max().item() == pytest.approx(1 / math.sqrt(H * I), rel=0.01)
    right = init_experts(E, H, I, generator=generator)
    assert right.gate_up.abs().max().item() == pytest.approx(1 / math.sqrt(H), rel=0.01)
    assert right.down.abs().max().item() == pytest.approx(1 / math.sqrt(I), rel=0.01)
    assert nn.Linear(H, I).weight.abs().max().item() == pytest.approx(1 / math.sqrt(H), rel=0.01)

    x, ids = torch.randn(64, H, generator=generator), torch.arange(64)[:, None] % E
    weights = torch.ones(64, 1)
    small = experts(x, from_separate(gate, up, down), weights, ids, ExpertsConfig())
    usual = experts(x, right, weights, ids, ExpertsConfig())
    # Near zero silu halves its argument, so the output falls by sqrt(I)^2 sqrt(H), about 1000.
    assert 500 < usual.std() / small.std() < 2000


# The router


def bfloat16_product_then_float32(x, router):
    """Logits in a wide dtype, of a product in a narrow one."""
    return (x @ router.T).float()


def test_a_cast_behind_the_gate_is_too_late():
    generator = seeded()
    x = torch.randn(1000, 64, generator=generator).bfloat16()
    router = torch.randn(64, 64, generator=generator).bfloat16() / 8
    late = bfloat16_product_then_float32(x, router)
    parameters = LayerWeights(router, init_experts(64, 64, 1))
    config = LayerConfig(RoutingConfig(top_k=8, score="sigmoid"), router_dtype=torch.float32)
    here = router_logits(x, parameters, config)
    exact = x.double() @ router.double().T
    assert late.dtype == here.dtype == torch.float32

    def share_of_equal_logits(logits):
        ascending = logits.sort(dim=1).values
        return (ascending[:, 1:] == ascending[:, :-1]).any(dim=1).double().mean()

    def share_of_other_sets(logits):
        chosen = [route(each, config.routing)[1].sort(dim=1).values for each in (logits, exact)]
        return (chosen[0] != chosen[1]).any(dim=1).double().mean()

    assert share_of_equal_logits(late) > 0.5
    assert share_of_equal_logits(here) < 0.05
    assert share_of_other_sets(late) > 0.005
    assert share_of_other_sets(here) == 0.0


def scale_then_bias(logits, scale, bias, top_k):
    """A choice by scaled scores and a bias that is not scaled with them."""
    return (scores(logits, "sigmoid") * scale + bias).topk(top_k, dim=1).indices


def test_the_scale_weakens_the_bias():
    logits = torch.logit(torch.tensor([[0.6, 0.5]]))
    bias = torch.tensor([0.0, 0.15])
    assert scale_then_bias(logits, 1.0, bias, 1).tolist() == [[1]]
    assert scale_then_bias(logits, 2.5, bias, 1).tolist() == [[0]]
    for scale in (1.0, 2.5):
        config = RoutingConfig(top_k=1, score="sigmoid", scale=scale)
        assert route(logits, config, bias)[1].tolist() == [[1]]


def test_a_negative_scale_chooses_the_worst():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert scale_then_bias(logits, -1.0, torch.zeros(3), 1).tolist() == [[2]]
    config = RoutingConfig(top_k=1, score="sigmoid", scale=-1.0)
    weights, ids = route(logits, config)
    assert ids.tolist() == [[0]]
    assert weights.item() == pytest.approx(-torch.sigmoid(torch.tensor(3.0)).item(), rel=1e-6)


def test_a_scale_of_zero_chooses_by_the_bias_alone():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    bias = torch.tensor([0.0, 0.0, 1e-3])
    assert scale_then_bias(logits, 0.0, bias, 1).tolist() == [[2]]
    config = RoutingConfig(top_k=1, score="sigmoid", scale=0.0)
    assert route(logits, config, bias)[1].tolist() == [[0]]


def best_groups_by_one_expert(scores_E, num_groups, topk_groups):
    """Groups by their single best expert."""
    return scores_E.view(num_groups, -1).amax(dim=1).topk(topk_groups).indices


TWO_GROUPS = {"top_k": 1, "score": "sigmoid", "num_groups": 2, "topk_groups": 1}


def test_a_group_is_as_good_as_its_best_two():
    chances = torch.tensor([0.9, 0.1, 0.6, 0.6])
    assert best_groups_by_one_expert(chances, 2, 1).tolist() == [0]
    logits = torch.logit(chances)[None]
    chosen = {
        rule: route(logits, RoutingConfig(**TWO_GROUPS, group_score=rule))[1].item()
        for rule in ("max", "top2_sum")
    }
    assert chosen == {"max": 0, "top2_sum": 2}


def bias_after_the_mask(scores_E, bias, num_groups, topk_groups, top_k):
    """The best of the groups that are best without the bias."""
    masked = torch.full_like(scores_E, -torch.inf).view(num_groups, -1)
    best = best_groups_by_one_expert(scores_E, num_groups, topk_groups)
    masked[best] = scores_E.view(num_groups, -1)[best]
    return (masked.flatten() + bias).topk(top_k).indices


def test_a_bias_behind_the_mask_brings_no_group_back():
    chances, bias = torch.tensor([0.9, 0.1, 0.6, 0.5]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert bias_after_the_mask(chances, bias, 2, 1, 1).tolist() == [0]
    logits = torch.logit(chances)[None]
    for rule in ("max", "top2_sum"):
        config = RoutingConfig(**TWO_GROUPS, group_score=rule)
        assert route(logits, config, bias)[1].tolist() == [[2]]


def test_most_tokens_get_other_experts():
    # All three together, against DeepSeek-V3's rule: one best expert, bias too late, scaled scores.
    generator = seeded()
    logits = torch.randn(500, 64, generator=generator)
    bias = 0.1 * torch.randn(64, generator=generator)
    config = RoutingConfig.preset("deepseek-v3")
    _, here = route(logits, config, bias)
    scaled = scores(logits, "sigmoid") * config.scale
    there = torch.stack([bias_after_the_mask(row, bias, 8, 4, 8) for row in scaled])
    other_set = (here.sort(dim=1).values != there.sort(dim=1).values).any(dim=1)
    # 96 % of the tokens of this seed.
    assert other_set.double().mean() > 0.9


def weights_as_they_are(logits, scale, top_k):
    """Scaled scores of the chosen experts, whatever they add up to."""
    return (scores(logits, "sigmoid") * scale).topk(top_k, dim=1).values


def test_weights_do_not_add_up_to_the_scale():
    logits = torch.zeros(1, 64)
    assert weights_as_they_are(logits, 2.5, 8).sum().item() == 10.0
    config = RoutingConfig.preset("deepseek-v3")
    # Eight float32 quotients and their sum.
    assert route(logits, config)[0].sum().item() == pytest.approx(2.5, rel=1e-6)
    random = torch.randn(200, 64, generator=seeded())
    sums = weights_as_they_are(random, 2.5, 8).sum(dim=1)
    assert sums.min() > 4 * 2.5
    assert sums.max() - sums.min() > 2.0
    torch.testing.assert_close(
        route(random, config)[0].sum(dim=1), torch.full((200,), 2.5), rtol=1e-6, atol=0
    )


def top_of_masked_scores(scores_E, allowed_E, top_k):
    """K best of the allowed ones, weighed by what the scores were before the mask."""
    ids = scores_E.masked_fill(~allowed_E, -torch.inf).topk(top_k).indices
    return scores_E[ids], ids


def test_a_masked_expert_is_chosen_and_has_a_weight():
    chances = torch.tensor([0.9, 0.8, 0.7, 0.6])
    allowed = torch.tensor([True, True, False, False])
    weights, ids = top_of_masked_scores(chances, allowed, 3)
    assert ids[2] in (2, 3)
    assert weights[2] in chances[2:]
    with pytest.raises(ValueError, match="top_k"):
        route(torch.logit(chances)[None], RoutingConfig(**{**TWO_GROUPS, "top_k": 3}))


@pytest.mark.parametrize(("num_experts", "num_groups"), [(6, 4), (7, 2), (4, 0)])
def test_groups_that_do_not_divide_the_experts(num_experts, num_groups):
    # An error of the view, or of the division, at the first forward and not before.
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        torch.zeros(1, num_experts).view(1, num_groups, num_experts // num_groups)
    with pytest.raises(ValueError, match="num_groups"):
        route(torch.zeros(1, num_experts), RoutingConfig(top_k=1, num_groups=num_groups))


def test_more_groups_or_experts_than_there_are():
    with pytest.raises(RuntimeError, match="out of range"):
        torch.zeros(1, 2).topk(3)
    with pytest.raises(ValueError, match="topk_groups"):
        RoutingConfig(top_k=1, num_groups=2, topk_groups=3)
    with pytest.raises(ValueError, match="top_k"):
        route(torch.zeros(1, 2), RoutingConfig(top_k=3))


def groups_to_keep(scores_E, num_groups, topk_groups):
    """Which groups are kept; a limit without groups limits nothing."""
    if num_groups is None:
        return torch.arange(len(scores_E))
    return best_groups_by_one_expert(scores_E, num_groups, topk_groups)


def test_a_limit_without_groups_is_ignored():
    assert groups_to_keep(torch.tensor([0.9, 0.1]), None, 7).tolist() == [0, 1]
    with pytest.raises(ValueError, match="topk_groups"):
        RoutingConfig(top_k=1, topk_groups=7)


def choose_by_biased_logits(logits, bias, top_k):
    """A bias on the logits, which is what the document says; it adds it to the scores."""
    return (logits + bias).topk(top_k, dim=1).indices


def test_a_bias_on_logits_is_not_a_bias_on_scores():
    logits, bias = torch.tensor([[6.0, 4.0]]), torch.tensor([0.0, 0.5])
    assert choose_by_biased_logits(logits, bias, 1).tolist() == [[0]]
    # Their sigmoids are only 0.0155 apart.
    assert route(logits, RoutingConfig(top_k=1, score="sigmoid"), bias)[1].tolist() == [[1]]


# The balance loss


def loss_of_all_pairs(weights, expert_ids, num_experts):
    """The mean weight of a choice times the share of an expert, summed over all pairs of them."""
    share_E = count_tokens(expert_ids, num_experts) / expert_ids.numel()
    mean_K = torch.softmax(weights, dim=1).mean(dim=0)
    return num_experts * torch.outer(mean_K, share_E).sum()


def choices(kind):
    """Logits [64, 8] that spread the tokens evenly, send all to two experts, or are random."""
    if kind == "even":
        logits = torch.zeros(64, 8)
        logits[torch.arange(64), torch.arange(64) % 8] = 2.0
        logits[torch.arange(64), (torch.arange(64) + 1) % 8] = 1.0
        return logits
    if kind == "collapsed":
        return torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).repeat(64, 1)
    return torch.randn(64, 8, generator=seeded())


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("even", 0.999, 1.001), ("collapsed", 3.9, 4.1), ("random", 1.0, 1.2)]
)
def test_the_loss_is_the_number_of_experts(kind, low, high):
    logits = choices(kind).requires_grad_()
    weights, ids = route(logits, RoutingConfig(top_k=2))
    constant = loss_of_all_pairs(weights, ids, 8)
    # Both factors add up to 1: what is left is float32 rounding, in the gradient too.
    assert constant.item() == pytest.approx(8.0, rel=1e-6)
    constant.backward(retain_graph=True)
    assert logits.grad.abs().max() < 1e-7

    logits.grad = None
    loss = balance_loss(logits, ids, BalanceConfig("switch"))
    assert low < loss.item() < high
    loss.backward()
    if kind == "random":
        assert logits.grad.abs().max() > 1e-3


def test_probabilities_are_those_of_all_experts():
    # A token that is almost sure, and one that hardly knows: softmax over the K chosen scores,
    # which all lie in 0..1, takes them for nearly the same.
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]])
    weights, _ = route(logits, RoutingConfig(top_k=2, score="sigmoid"))
    over_chosen = torch.softmax(weights, dim=1)[:, 0]
    over_all = torch.softmax(logits, dim=1)[:, 0]
    assert (over_chosen[0] - over_chosen[1]).item() < 0.11
    assert (over_all[0] - over_all[1]).item() > 0.6


def test_no_tokens_make_the_loss_nan():
    empty_ids, empty_weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert loss_of_all_pairs(empty_weights, empty_ids, 8).isnan()
    assert balance_loss(torch.zeros(0, 8), empty_ids, BalanceConfig("switch")).item() == 0.0


OPERATIONS = {
    "add": lambda y: y + 1.0,
    "view": lambda y: y.view(-1),
    "detach": lambda y: y.detach(),
    "cast": lambda y: y.double(),
    "checkpoint": lambda y: checkpoint(lambda z: z * 1.0, y, use_reentrant=False),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_loss_kept_on_the_output_is_lost(operation):
    output = torch.ones(2, 3, requires_grad=True) * 1.0
    output._loss = torch.tensor(0.5)
    after = OPERATIONS[operation](output)
    assert not hasattr(after, "_loss")

    # A field of the result, or a part of the graph, has no such way to get lost.
    parameters, config = small_layer(balance=BalanceConfig("switch", coefficient=0.5))
    result = layer(torch.ones(1, 2, 8), parameters, config, training=True)
    assert result.balance_loss.ndim == 0
    if operation != "detach":
        router = torch.tensor(3.0, requires_grad=True)
        joined = inject_loss(torch.ones(2, 3, requires_grad=True), router**2)
        OPERATIONS[operation](joined).sum().backward()
        assert router.grad.item() == 6.0


def test_a_loss_in_evaluation_is_not_computed():
    parameters, config = small_layer(balance=BalanceConfig("switch"))
    assert layer(torch.ones(1, 2, 8), parameters, config, training=False).balance_loss is None


# The layer


def weigh_the_input(x, weights, ids, held):
    """Each expert's input times its weight, and the outputs added up."""
    rows = x.repeat_interleave(ids.shape[1], dim=0) * weights.flatten()[:, None]
    ones = torch.ones(len(rows), 1)
    outputs = experts(rows, held, ones, ids.flatten()[:, None], ExpertsConfig())
    return outputs.view(len(x), ids.shape[1], -1).sum(dim=1)


def test_a_weight_on_the_input_of_a_gated_expert_is_another_function():
    generator = seeded()
    held = init_experts(8, 16, 32, generator=generator)
    x = torch.randn(100, 16, generator=generator)
    weights, ids = route(
        torch.randn(100, 8, generator=generator), RoutingConfig(top_k=2, score="sigmoid")
    )
    before = weigh_the_input(x, weights, ids, held)
    after = experts(x, held, weights, ids, ExpertsConfig())
    assert (before - after).norm() / after.norm() > 0.2
    # The reference has both, the output unless told otherwise.
    on_input = experts(x, held, weights, ids, ExpertsConfig(weight_on="input"))
    torch.testing.assert_close(on_input, before)  # the same float32 sums
    assert ExpertsConfig().weight_on == "output"


def test_only_a_linear_expert_does_not_mind():
    one = ExpertWeights(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    x, ids, half = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0.5)
    for activation, quotient in (("relu", 1.0), ("relu2", 0.5)):
        on_input = ExpertsConfig(activation, gated=False, weight_on="input")
        on_output = ExpertsConfig(activation, gated=False)
        both = [experts(x, one, half, ids, config).item() for config in (on_input, on_output)]
        assert both[0] / both[1] == quotient


def test_float32_weights_do_not_meet_a_bfloat16_expert():
    x, weight = torch.ones(2, 3).bfloat16(), torch.ones(3, 3).bfloat16()
    scaled = x * torch.ones(2, 1)
    assert scaled.dtype == torch.float32
    with pytest.raises(RuntimeError, match="same dtype"):
        scaled @ weight

    output = (x @ weight) * torch.ones(2, 1)
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"self\.dtype"):
        torch.zeros(2, 3, dtype=x.dtype).scatter_add(0, index, output)

    parameters, config = small_layer()
    for where in ("input", "output"):
        narrow = LayerConfig(config.routing, ExpertsConfig(weight_on=where))
        assert layer(torch.ones(1, 2, 8).bfloat16(), parameters, narrow).output.dtype == x.dtype


def test_under_autocast_an_expert_is_narrower_than_the_memory():
    x, weight = torch.ones(2, 3), torch.ones(3, 3)
    index = torch.zeros(2, 3, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        before = (x * torch.ones(2, 1)) @ weight
        with pytest.raises(RuntimeError, match=r"self\.dtype"):
            torch.zeros(2, 3).scatter_add(0, index, before)
        # With the weight behind the expert, the product is float32 again.
        after = (x @ weight) * torch.ones(2, 1)
        assert torch.zeros(2, 3).scatter_add(0, index, after).dtype == torch.float32

    parameters, config = small_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 2, 8), parameters, config).output.dtype == torch.float32


def test_a_transposed_input_cannot_be_viewed_as_rows():
    x = torch.randn(3, 2, 8, generator=seeded()).transpose(0, 1)
    with pytest.raises(RuntimeError, match="not compatible"):
        x.view(6, 8)
    parameters, config = small_layer()
    here, contiguous = (layer(each, parameters, config).output for each in (x, x.contiguous()))
    assert torch.equal(here, contiguous)


# Counts


class CountInForward(nn.Module):
    """Counts whenever it is called, into a buffer that is a part of the state."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(2, dtype=dtype))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        with torch.no_grad():
            self.tokens_per_expert.add_(torch.bincount(ids.flatten(), minlength=2))
        return self.weight * ids


def counting_layer():
    parameters, config = small_layer(top_k=1, num_experts=2)
    return MoELayer(parameters, config)


def test_evaluation_is_counted():
    module, moe = CountInForward().eval(), counting_layer().eval()
    with torch.no_grad():
        module(torch.tensor([[0], [1], [1]]))
        moe(torch.ones(1, 3, 8))
    assert module.tokens_per_expert.tolist() == [1.0, 2.0]
    assert moe.tokens_per_expert.tolist() == [0, 0]


def test_a_repeated_forward_is_counted_twice():
    module, moe = CountInForward(), counting_layer()
    checkpoint(module, torch.tensor([[0], [1], [1]]), use_reentrant=False).sum().backward()
    assert module.tokens_per_expert.tolist() == [2.0, 4.0]
    x = torch.ones(1, 3, 8, requires_grad=True)
    checkpoint(lambda x: moe(x).output, x, use_reentrant=False).sum().backward()
    assert moe.tokens_per_expert.sum() == 3


def test_counts_of_half_a_step_are_stored():
    module, moe = CountInForward(), counting_layer()
    assert "tokens_per_expert" in module.state_dict()
    assert "tokens_per_expert" not in moe.state_dict()
    assert "selection_bias" in moe.state_dict()


def test_float32_counts_stop():
    counts = torch.tensor([2.0**24])
    assert (counts + 1 == counts).all()
    module = CountInForward().bfloat16()
    for _ in range(2):
        module(torch.zeros(256, 1, dtype=torch.int64))
        module(torch.zeros(1, 1, dtype=torch.int64))
    # 514 were seen. bfloat16 holds every whole number up to 256 only.
    assert module.tokens_per_expert[0].item() == 512.0

    moe = counting_layer().bfloat16()
    moe.tokens_per_expert.fill_(2**24)
    moe(torch.ones(1, 3, 8)).output.sum().backward()
    assert moe.tokens_per_expert.sum().item() == 2 * 2**24 + 3


def test_padding_is_counted_and_weighs_in_the_loss():
    logits = torch.cat([choices("even"), choices("collapsed")])
    real = torch.arange(128) < 64
    _, ids = route(logits, RoutingConfig(top_k=2))
    config = BalanceConfig("switch")
    assert balance_loss(logits, ids, config).item() > 1.5
    masked = balance_loss(logits, ids, config, padding_mask=real)
    assert masked.item() == pytest.approx(1.0, rel=1e-5)
    assert count_tokens(ids, 8).tolist() == [80, 80, 16, 16, 16, 16, 16, 16]

    parameters, layer_config = small_layer(top_k=1)
    x, mask = torch.ones(1, 3, 8), torch.tensor([[True, False, False]])
    assert layer(x, parameters, layer_config, padding_mask=mask).tokens_per_expert.sum() == 1


# The update of the bias


def step_by_float32_mean(counts):
    """The sign of the difference to a mean that is rounded like the counts."""
    return (counts.float().mean() - counts.float()).sign()


def test_equal_counts_move_the_bias():
    counts = torch.full((3,), 5592407)
    assert counts.float().long().tolist() == counts.tolist()
    assert step_by_float32_mean(counts).tolist() == [-1.0, -1.0, -1.0]
    assert update_bias(torch.zeros(3), counts, 0.5, centred=False).tolist() == [0.0, 0.0, 0.0]


def test_ranks_move_their_biases_apart():
    counts_R = [torch.tensor([3.0, 1.0]), torch.tensor([0.0, 5.0])]
    own = [update_bias(torch.zeros(2), counts, 0.5, centred=False) for counts in counts_R]
    assert [each.tolist() for each in own] == [[-0.5, 0.5], [0.5, -0.5]]
    # All together expert 1 is the busy one, and every rank has to see that.
    together = update_bias(torch.zeros(2), sum(counts_R), 0.5, centred=False)
    assert together.tolist() == [0.5, -0.5]
    assert global_counts(counts_R[0]).tolist() == [3.0, 1.0]


def test_a_step_that_is_not_centred_drifts():
    # One busy expert of eight: seven go up and one goes down.
    counts = torch.tensor([8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    bias = {centred: torch.zeros(8) for centred in (False, True)}
    for _ in range(4):
        bias = {each: update_bias(bias[each], counts, 0.5, each) for each in bias}
    assert bias[False].mean().item() == 4 * 0.75 * 0.5
    assert bias[True].mean().item() == 0.0
    # It does not matter to the choice, as long as everything is biased alike.
    assert torch.equal(*[each - each[1] for each in bias.values()])


def test_a_bfloat16_bias_does_not_move():
    buffer = torch.tensor([0.5]).bfloat16()
    assert torch.equal(buffer + 1e-3, buffer)
    moe = counting_layer()
    moe.selection_bias.fill_(0.5)
    moe = moe.bfloat16()
    assert moe.selection_bias.dtype == torch.float32
    moe.tokens_per_expert.copy_(torch.tensor([3, 1]))
    moe.update_bias(1e-3)
    # Half a unit in the last place of a float32 near 0.5.
    expected = torch.tensor([0.499, 0.501])
    torch.testing.assert_close(moe.selection_bias, expected, rtol=0, atol=2**-25)
    assert moe.tokens_per_expert.tolist() == [0, 0]
