"""Is X equal to Y? Alignment, dispatch, experts, the layer, slices.

The rest of `test_equivalences`; each test is a question there and here.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from moe_reference.alignment import align, align_batched, local_ids
from moe_reference.capacity import drop_to_capacity, expert_capacity
from moe_reference.config import (
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    RoutingConfig,
)
from moe_reference.dispatch import (
    batch_rows,
    combine,
    count_tokens,
    dispatch,
    inclusive_offsets,
    unbatch_rows,
)
from moe_reference.expert_slicing import (
    assign_experts,
    assign_round_robin,
    make_expert_map,
    slice_experts,
    slice_tensor_parallel,
    take_experts,
)
from moe_reference.experts import (
    activate,
    experts,
    experts_batched,
    experts_grouped,
    grouped_product,
    init_experts,
)
from moe_reference.gating import route
from moe_reference.layer import layer, moe_infer
from moe_reference.layouts import LAYOUTS, Layout, from_layout, infer_transposed
from moe_reference.load_balancing import balance_loss
from moe_reference.placement import add_shared_column, make_placement, physical_ids

DTYPES = (torch.float64, torch.float32)
SILU = ExpertsConfig("silu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def random_ids(seed, T, K, E):
    """Ids [T, K], no expert twice in a row."""
    return torch.rand(T, E, generator=seeded(seed)).argsort(dim=1)[:, :K]


SIZES = ((1, 1, 1), (5, 2, 4), (33, 3, 7), (64, 6, 72))
ALIGNED = [(seed, *size) for seed, size in enumerate(SIZES)]


def assert_close(left, right, roundings):
    """Elementwise equal, up to so many roundings in the dtype of both."""
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    bound = roundings * torch.finfo(right.dtype).eps * right.abs()
    assert ((left - right).abs() <= bound).all(), ((left - right).abs() / bound).max()


def assert_far(left, right, share=0.01):
    """Different by at least a hundredth of the greatest element."""
    assert (left - right).abs().max() > share * right.abs().max()


def cases(gated=True, bias=True, sizes=((1, 1), (4, 2), (7, 3), (16, 16)), T=6, H=5, I=4):
    """x [T, H], E experts, weights [T, K] and ids [T, K], for a few E and K in both dtypes."""
    for seed, (E, K), dtype in product(range(2), sizes, DTYPES):
        drawn = init_experts(E, H, I, gated, bias, seeded(seed), torch.float64)
        weights = torch.rand(T, K, generator=seeded(seed), dtype=torch.float64) + 0.1
        some = mapped(drawn, lambda w, dtype=dtype: (2 * w).to(dtype))
        yield normal(seed, T, H, dtype=dtype), some, weights.to(dtype), random_ids(seed, T, K, E)


def mapped(some, function):
    return ExpertWeights(*(None if w is None else function(w) for w in vars(some).values()))


def assert_same_sum(left, right, x, some, weights, ids, gated=True):
    """Two ways to the same weighted sum of experts, up to roundings.

    With absolute values for all numbers, and relu, an output is the sum of the sizes of everything
    that was added up. A side is off by H roundings of that for the gate, whose activation has a
    slope below 1.2, H for up, I for down, K for the sum, and a few: half an epsilon each.
    """
    sizes = experts(
        x.abs(), mapped(some, torch.abs), weights.abs(), ids, ExpertsConfig("relu", gated)
    )
    roundings = 2.2 * x.shape[1] + some.down.shape[2] + ids.shape[1] + 8
    assert left.dtype == right.dtype == x.dtype
    assert ((left - right).abs() <= roundings * torch.finfo(x.dtype).eps * sizes).all()


def one_expert(gate, up, down=1.0):
    """H = 1, I = 1: the smallest there is."""
    return ExpertWeights(torch.tensor([[[gate], [up]]]), torch.tensor([[[down]]]))


def on_one(some, config, x=1.0, weight=1.0):
    """What the smallest expert makes of one number."""
    ids = torch.tensor([[0]])
    return experts(torch.tensor([[x]]), some, torch.tensor([[weight]]), ids, config).item()


def loss(name, logits, ids):
    return balance_loss(logits, ids, BalanceConfig(name))


def one_hot_counts(ids, E):
    return F.one_hot(ids.flatten(), E).sum(dim=0)


def draws(sizes, T):
    """Logits [T, E] in [-4, 4] and K, without ties."""
    for seed, (E, K), dtype in product(range(3), sizes, DTYPES):
        places = torch.rand(T, E, generator=seeded(seed)).argsort(dim=1)
        jitter = torch.rand(T, E, generator=seeded(seed + 9), dtype=torch.float64) / 4
        yield ((places + jitter) * 8 / E - 4).to(dtype), K


# Alignment


def test_alignment__blocks_of_one_are_a_sort():
    r"""Is alignment with a block size of 1 a sort by expert?

    Yes: the stable sort of the slots, with no padding, and a block's expert is its slot's.
    """
    for seed, T, K, E in ALIGNED:
        ids = random_ids(seed, T, K, E)
        sorted_slots, block_experts, length = align(ids, 1, E)
        order = ids.flatten().argsort(stable=True)
        assert length.item() == T * K
        assert torch.equal(sorted_slots[: T * K].long(), order)
        assert torch.equal(block_experts[: T * K].long(), ids.flatten()[order])


def test_alignment__block_order_is_a_stable_argsort():
    r"""For any block size, are the slots without the padding a stable argsort of the ids?

    Yes in the reference and in vLLM's deterministic mode. vLLM's CUDA kernel places slots by atomic
    additions: the experts are in order, the slots inside an expert in any.

    Asked: vLLM #53440; FlagGems #6492
    """
    for (seed, T, K, E), B in product(ALIGNED, (1, 2, 5, 16)):
        ids = random_ids(seed, T, K, E)
        sorted_slots, block_experts, length = align(ids, B, E)
        used = sorted_slots[: length.item()].long()
        assert torch.equal(used[used < T * K], ids.flatten().argsort(stable=True))
        of_slot = block_experts.long().repeat_interleave(B)[: len(used)]
        assert torch.equal(of_slot[used < T * K], ids.flatten()[used[used < T * K]])


def test_alignment__padded_length_is_rounded_up_slots():
    r"""Is the padded length the number of slots rounded up to whole blocks?

    Only where the experts' paddings add up to less than one block. Every expert is rounded up by
    itself, $\sum_e \lceil c_e / B \rceil B$.
    """
    apart, together = torch.tensor([[0], [1]]), torch.tensor([[0], [0]])
    assert align(apart, 2, 2)[2].item() == 4
    assert align(together, 2, 2)[2].item() == 2
    for (seed, T, K, E), B in product(ALIGNED, (1, 2, 5, 16)):
        ids = random_ids(seed, T, K, E)
        counts = one_hot_counts(ids, E).long().tolist()
        padding = sum(-count % B for count in counts)
        length = align(ids, B, E)[2].item()
        assert length == T * K + padding
        assert (length == -(-T * K // B) * B) == (padding < B)


def test_alignment__batched_is_flat():
    r"""Does the batched alignment give the same blocks as the flat one of the same tokens?

    Yes: the same padded length, the same expert for every block, and row $e C + i$ stands where the
    flat form has the i-th slot of expert e.

    Asked: vLLM #55896
    """
    for (seed, T, K, E), B in product(ALIGNED, (1, 2, 5, 16)):
        ids = random_ids(seed, T, K, E)
        slots, _, length = align(ids, B, E)
        counts = count_tokens(ids, E)
        C, n = T + 1, length.item()
        rows, batched_experts, batched_length = align_batched(counts, C, B)
        assert torch.equal(batched_length, length)
        assert torch.equal(batched_experts[: n // B], align(ids, B, E)[1][: n // B])
        own = ids.flatten().argsort(stable=True)[:, None].double()
        slot_of_row = batch_rows(own, counts, C).view(E * C).int()
        slot_of_row = torch.cat([slot_of_row, torch.tensor([T * K]).int()])
        assert torch.equal(slot_of_row[rows[:n].long()], slots[:n])


def test_alignment__dropping_before_or_mapping_afterwards():
    r"""Is leaving out experts that live elsewhere equal to mapping their blocks to -1 afterwards?

    Only if the blocks of -1 are skipped: what is left are the same slots for the same local rows.
    The padded length is another, and rows of slots that were left out are written by nobody, so
    that they have to be zero before. vLLM has both.

    Asked: vLLM #19590, #29642
    """
    for (seed, T, K, E), B in product(ALIGNED[1:], (1, 4)):
        ids = random_ids(seed, T, K, E)
        expert_map = torch.where(torch.arange(E) % 2 == 1, torch.arange(E) // 2, -1)
        lengths, pairs = [], []
        for drop_invalid in (True, False):
            slots, block_experts, length = align(ids, B, E, expert_map, drop_invalid)
            slots, rows = (
                slots[: length.item()],
                block_experts.repeat_interleave(B)[: length.item()],
            )
            here = (rows >= 0) & (slots < T * K)
            pairs.append(torch.stack([slots[here], rows[here]]))
            lengths.append(length.item())
        assert torch.equal(*pairs)
        assert lengths[0] < lengths[1]
    ids, expert_map = torch.tensor([[0], [1]]), torch.tensor([-1, 0])
    assert align(ids, 1, 2, expert_map, True)[0][:1].tolist() == [1]
    assert align(ids, 1, 2, expert_map, False)[1].tolist() == [-1, 0]


def test_alignment__minus_one_is_an_index():
    r"""Are an id of -1, an id of E and an id that is mapped to -1 the same?

    Yes, all three mean not here, in every operation. As an index into the map they are not: -1 is
    its last entry, in Python and torch alike, and adds an expert that may well live here.

    Asked: vLLM #42034; SGLang #12701; aiter #4636
    """
    expert_map = torch.tensor([-1, 0, 1])
    for nobody in (-1, 3, 0, -7, 99):
        ids = torch.tensor([[nobody, 2]])
        assert local_ids(ids, 2, expert_map).tolist() == [[-1, 1]]
        slots, block_experts, length = align(ids, 1, 3, expert_map, drop_invalid=True)
        assert (slots[: length.item()].tolist(), block_experts[:1].tolist()) == ([1], [1])
    assert expert_map[torch.tensor([-1, 2])].tolist() == [1, 1]


# Dispatch


def test_dispatch__dispatch_and_combine_is_a_gather():
    r"""Is dispatching the tokens and combining them again, with nothing in between, the identity?

    Only if the weights of a token add up to 1: in general it multiplies each token by the sum of
    its weights. The permutation itself is undone exactly.
    """
    for (seed, T, K, E), dtype in product(ALIGNED, DTYPES):
        x, ids = normal(seed, T, 3, dtype=dtype), random_ids(seed, T, K, E)
        weights = torch.rand(T, K, generator=seeded(seed), dtype=torch.float64).to(dtype)
        rows, counts, slots = dispatch(x, ids, E)
        assert torch.equal(rows, x[slots // K])
        # K products and a sum of K on one side, a sum of K and a product on the other.
        plain = x * weights.sum(dim=1, keepdim=True)
        assert_close(combine(rows, slots, weights), plain, 2 * K + 2)
        # One and zeros add up to 1 without a rounding.
        first = torch.eye(1, K, dtype=dtype).expand(T, K)
        assert torch.equal(combine(rows, slots, first), x)
        assert counts.sum() == T * K


def test_dispatch__inclusive_or_exclusive_offsets():
    r"""Do grouped products take the offsets where experts begin, or where they end?

    Only where they end: the inclusive cumulative sum of all E counts, as torch, torchtitan and
    transformers have it. Starts shift every row to the next expert, and a cumulative sum without
    the last count, as in hyper_parallel, has one expert too few.

    Source: hyper_parallel's PyTorch MoE blocks
    """
    for seed, T, K, E in ALIGNED:
        rows, counts, slots = dispatch(normal(seed, T, 3), random_ids(seed, T, K, E), E)
        ends = inclusive_offsets(counts)
        starts = torch.cat([torch.zeros(1), ends[:-1]]).int()
        assert torch.equal(starts + counts, ends)
        matrices = normal(seed, E, 2, 3)
        right = grouped_product(rows, matrices, None, ends)
        own = random_ids(seed, T, K, E).flatten()[slots]
        for s, e in enumerate(own.tolist()):
            # A sum of three products; a product of matrices may add them in another order.
            bound = 4 * torch.finfo(torch.float64).eps * (rows[s].abs() @ matrices[e].abs().T)
            assert ((right[s] - rows[s] @ matrices[e].T).abs() <= bound).all()
        with pytest.raises(ValueError, match="ends"):
            grouped_product(rows, matrices, None, starts)
    # The smallest: one row of expert 0 of two. Read as an end, its start leaves it to expert 1.
    rows, counts = torch.ones(2, 1), torch.tensor([1, 1])
    matrices = torch.tensor([[[10.0]], [[20.0]]])
    ends = inclusive_offsets(counts)
    assert grouped_product(rows, matrices, None, ends).flatten().tolist() == [10.0, 20.0]
    shifted = torch.tensor([0, 2])
    assert grouped_product(rows, matrices, None, shifted).flatten().tolist() == [20.0, 20.0]


def test_dispatch__counting_by_scatter_is_counting():
    r"""Is counting tokens by writing ones into a [T, E] table equal to counting pairs?

    Only if no token names an expert twice. DeepSeek's `moe_infer` writes ones; adding them
    (scatter_add, bincount) counts every pair.

    Source: DeepSeek-V2's model code
    """
    for seed, T, K, E in ALIGNED:
        ids = random_ids(seed, T, K, E)
        written = torch.zeros(T, E, dtype=torch.int64).scatter(1, ids, 1).sum(dim=0)
        assert torch.equal(written, count_tokens(ids, E))
    twice = torch.tensor([[0, 0]])
    assert torch.zeros(1, 2).scatter(1, twice, 1).sum(dim=0).tolist() == [1.0, 0.0]
    assert count_tokens(twice, 2).tolist() == [2, 0]


def test_dispatch__weight_of_zero_is_dropped():
    r"""Is a pair with a weight of 0 the same as a pair that was dropped?

    Only if no gradient is taken and what the expert makes of it is finite: 0 times NaN is NaN, and
    the zero weight still has a gradient, the expert's output, by which the router learns from an
    expert that did not count.

    Asked: transformers #48687; TE #3116
    """
    x, ids = torch.tensor([[3.0, 1.0]]), torch.tensor([[0, 1]])
    gone = torch.tensor([[0, -1]])
    results = []
    for each in (ids, gone):
        weights = torch.tensor([[0.5, 0.0]], requires_grad=True)
        rows, _, slots = dispatch(x, each, 2)
        y = combine(rows, slots, weights)
        results.append((y.detach(), torch.autograd.grad(y.sum(), weights)[0].tolist()))
    assert torch.equal(results[0][0], results[1][0])
    assert [gradient for _, gradient in results] == [[[4.0, 4.0]], [[4.0, 0.0]]]
    rows, _, slots = dispatch(x, ids, 2)
    rows[1] = float("nan")
    assert combine(rows, slots, torch.tensor([[0.5, 0.0]])).isnan().all()
    assert combine(rows[:1], slots[:1], torch.tensor([[0.5, 0.0]])).tolist() == [[1.5, 0.5]]


def test_dispatch__renormalise_before_or_after_dropping():
    r"""Is renormalising before the drop to capacity equal to renormalising after it?

    Only where a token keeps all its experts, or none. st-moe and Megatron renormalise before, so
    that a token which lost an expert is added with less weight; DeepSpeed renormalises after, and
    what is left is scaled up to 1.
    """
    for logits, K in draws(((4, 2), (7, 3), (72, 6)), T=12):
        E = logits.shape[1]
        weights, ids = route(logits, RoutingConfig(K))
        before = weights / weights.sum(dim=1, keepdim=True)
        C = expert_capacity(12, K, E, 1.0)
        before, kept = drop_to_capacity(before, ids, E, C)
        after = drop_to_capacity(weights, ids, E, C)[0]
        after = after / after.sum(dim=1, keepdim=True).clamp(min=torch.finfo(after.dtype).tiny)
        lost = (kept < 0).sum(dim=1)
        some = (lost > 0) & (lost < K)
        assert some.any()
        assert_close(before[~some], after[~some], 2 * K + 4)
        assert (before[some].sum(dim=1) < after[some].sum(dim=1)).all()
    weights, ids = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0, 1], [0, 1]])
    kept = drop_to_capacity(weights, ids, 2, 1)[0]
    assert kept.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_dispatch__dropping_by_weight_or_by_position():
    r"""Is dropping by weight equal to dropping by position?

    Only if nothing is dropped, or an expert's weights fall with the position. Megatron's `probs`
    keeps the greatest weights, its `position` the first tokens, GShard all first choices before any
    second; for K = 1 the last two are the same.

    Asked: Megatron #812
    """
    weights, ids = torch.tensor([[0.1], [0.9]]), torch.tensor([[0], [0]])
    kept = {p: drop_to_capacity(weights, ids, 1, 1, p)[1].tolist() for p in ("position", "probs")}
    assert kept == {"position": [[0], [-1]], "probs": [[-1], [0]]}
    different = 0
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6)), T=12):
        E = logits.shape[1]
        weights, ids = route(logits, RoutingConfig(K))
        counts = count_tokens(ids, E)
        policies = ("position", "first_choice", "probs")
        everything = [drop_to_capacity(weights, ids, E, counts.max().item(), p) for p in policies]
        assert all(torch.equal(each[1], ids) for each in everything)
        C = counts.max().item() - 1
        position, first, probs = (drop_to_capacity(weights, ids, E, C, p)[1] for p in policies)
        # However they choose, they keep equally many of each expert.
        assert torch.equal(count_tokens(position, E), counts.clamp(max=C))
        assert torch.equal(count_tokens(probs, E), counts.clamp(max=C))
        different += not torch.equal(position, probs)
        assert K > 1 or torch.equal(position, first)
    assert different > 12
    # Second choices of the first token come before the first choice of the next, or after.
    ids, weights = torch.tensor([[1, 0], [0, 1]]), torch.ones(2, 2)
    assert drop_to_capacity(weights, ids, 2, 1, "position")[1].tolist() == [[1, 0], [-1, -1]]
    assert drop_to_capacity(weights, ids, 2, 1, "first_choice")[1].tolist() == [[1, -1], [0, -1]]


def test_dispatch__capacity_of_all_tokens_is_none():
    r"""Is a capacity of T, every token, the same as no capacity?

    Only if no token names an expert twice; then a capacity factor of E / K is dropless. Megablocks
    writes 0 for dropless, which elsewhere drops everything.

    Asked: DeepSpeed #5353, #8155
    """
    for seed, T, K, E in ALIGNED:
        ids, weights = random_ids(seed, T, K, E), torch.ones(T, K)
        assert expert_capacity(T, K, E, factor=math.ceil(E / K)) == T
        assert torch.equal(drop_to_capacity(weights, ids, E, T)[1], ids)
        assert (drop_to_capacity(weights, ids, E, 0)[1] == -1).all()
    assert drop_to_capacity(torch.ones(1, 2), torch.tensor([[0, 0]]), 1, 1)[1].tolist() == [[0, -1]]


def test_dispatch__capacity_rounded_up_or_down():
    r"""Is the capacity rounded up equal to the capacity rounded down?

    Only if factor times TK / E is a whole number, and computed exactly: in floats
    1.1 · 100 is above 110 and its ceiling is 111. Megatron and DeepSpeed round up, megablocks and
    st-moe down.
    """
    assert expert_capacity(1000, 1, 10, 1.1) == 110
    assert math.ceil(1000 * 1 / 10 * 1.1) == 111
    assert expert_capacity(3, 1, 2, 1.0) == 2
    assert int(1.0 * 3 * 1 / 2) == 1
    for T, K, E in product((8, 20, 33), (1, 2), (2, 3, 8)):
        up, down = expert_capacity(T, K, E, 0.5), T * K // (2 * E)
        assert up - down == (T * K % (2 * E) > 0)


def test_dispatch__order_of_tokens():
    r"""Does permuting the tokens only permute the outputs?

    Only if nothing is dropped by position. Routing and experts look at one token at a time; a drop
    by position keeps whoever comes first, also among unrelated sequences of a batch.
    """
    for logits, K in draws(((2, 1), (4, 2), (7, 3), (72, 6)), T=12):
        E, order = logits.shape[1], torch.randperm(12, generator=seeded(0))
        weights, ids = route(logits, RoutingConfig(K))
        moved, moved_ids = route(logits[order], RoutingConfig(K))
        assert torch.equal(moved, weights[order])
        assert torch.equal(moved_ids, ids[order])
        C = count_tokens(ids, E).max().item() - 1
        probs = drop_to_capacity(weights, ids, E, C, "probs")[1][order]
        assert torch.equal(drop_to_capacity(moved, moved_ids, E, C, "probs")[1], probs)
    ids, ones = torch.tensor([[0], [0]]), torch.ones(2, 1)
    kept = drop_to_capacity(ones, ids, 1, 1)[1]
    assert kept.flip(0).tolist() != drop_to_capacity(ones, ids.flip(0), 1, 1)[1].tolist()


def test_dispatch__order_of_a_tokens_pairs():
    r"""Is it all the same in which order a token's K experts stand, as with `sorted=False`?

    Only where nobody asks which choice was first: the output is the same up to rounding, but
    GShard's loss and a drop by first choices are not. DeepSeek-V2's gate leaves the order open.
    """
    for seed, T, K, E in ALIGNED[1:]:
        ids = random_ids(seed, T, K, E)
        x, weights = normal(seed, T, 3), normal(seed + 1, T, K).abs()
        rows, _, slots = dispatch(x, ids, E)
        left = combine(rows, slots, weights)
        rows, _, slots = dispatch(x, ids.flip(1), E)
        right = combine(rows, slots, weights.flip(1))
        assert_close(right, left, K)
        logits = normal(seed + 2, T, E)
        assert_close(loss("switch", logits, ids.flip(1)), loss("switch", logits, ids), 1)
        assert loss("gshard", logits, ids.flip(1)) != loss("gshard", logits, ids)
    ids, ones = torch.tensor([[0, 1], [0, 2]]), torch.ones(2, 2)
    kept = drop_to_capacity(ones, ids, 3, 1, "first_choice")[1]
    assert kept.tolist() == [[0, 1], [-1, 2]]
    assert drop_to_capacity(ones, ids.flip(1), 3, 1, "first_choice")[1].tolist() == [
        [1, 0],
        [2, -1],
    ]


def test_dispatch__bfloat16_sum_is_a_rounded_float32_sum():
    r"""Is adding a token's K outputs in bfloat16 equal to adding them in float32 and rounding once?

    Only if K = 1 or nothing is rounded on the way. 256 + 1 + 1 is 256 when every sum is rounded to
    bfloat16, and 258 when the last one is. DeepSeek's code adds in the dtype of the weights,
    float32, the fused path of hanzo-engine in that of the activations.

    Asked: torchtitan #2679
    """
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    slots, ones = torch.arange(3), torch.ones(1, 3)
    assert combine(rows, slots, ones).item() == 258
    assert (rows[0] + rows[1] + rows[2]).item() == 256
    for seed, K in product(range(3), (1, 2, 8)):
        rows, weights = normal(seed, 64 * K, 5).bfloat16(), normal(seed, 64, K).abs().float()
        wide = combine(rows, torch.arange(64 * K), weights)
        products = (rows.view(64, K, 5) * weights.bfloat16()[:, :, None]).unbind(1)
        narrow = sum(products[1:], products[0])
        in_float32 = (rows.view(64, K, 5).float() * weights[:, :, None]).sum(dim=1)
        # Rounded once, half a rounding of bfloat16 is left, and the sum's own in float32.
        assert ((wide - in_float32).abs() <= 2**-8 * in_float32.abs() + 1e-5).all()
        if K > 1:
            assert (narrow - in_float32).abs().sum() > 1.2 * (wide - in_float32).abs().sum()
        else:
            rounded = (rows.view(64, K, 5) * weights.bfloat16()[:, :, None])[:, 0]
            assert torch.equal(combine(rows, torch.arange(64), weights.bfloat16()), rounded)


# Experts


def test_experts__weight_on_input_or_output():
    r"""Is multiplying an expert's input by the router weight equal to multiplying its output?

    Only if the weight is 1, or the expert is relu without gate and biases and the weight positive:
    silu, gelu and every gated expert are not linear. Llama 4 weighs the input, hyper_parallel does
    by default, all others weigh the output.

    Asked: SGLang #7889; vLLM #43694; llm-compressor #1907
    """
    assert on_one(one_expert(1.0, 1.0), SILU, weight=0.5) == pytest.approx(0.3655, abs=1e-4)
    on_input = replace(SILU, weight_on="input")
    assert on_one(one_expert(1.0, 1.0), on_input, weight=0.5) == pytest.approx(0.1556, abs=1e-4)
    for activation, gated, bias in product(("silu", "gelu", "relu"), (True, False), (True, False)):
        config = ExpertsConfig(activation, gated)
        for x, some, weights, ids in cases(gated, bias):
            left = experts(x, some, weights, ids, replace(config, weight_on="input"))
            right = experts(x, some, weights, ids, config)
            if (activation, gated, bias) == ("relu", False, False):
                assert_same_sum(left, right, x, some, weights, ids, gated)
                left = experts(x, some, -weights, ids, replace(config, weight_on="input"))
                assert_far(left, -right)
            else:
                assert_far(left, right)
            ones = torch.ones_like(weights)
            left = experts(x, some, ones, ids, replace(config, weight_on="input"))
            assert torch.equal(left, experts(x, some, ones, ids, config))


def test_experts__weight_on_the_input_of_relu2():
    r"""With relu2, is weighting the input by w equal to weighting the output by w squared?

    Only if there is no gate and no bias, and w is positive. With a gate relu is of degree two and
    relu2 of degree three: $w^2$ and $w^3$ on the output.
    """
    degrees = {("relu", False): 1, ("relu", True): 2, ("relu2", False): 2, ("relu2", True): 3}
    for (activation, gated), degree in degrees.items():
        for x, some, weights, ids in cases(gated, bias=False):
            # Powers of two, so that no factor is rounded.
            powers = 2.0 ** (4 * weights).round()
            config = ExpertsConfig(activation, gated, weight_on="input")
            left = experts(x, some, powers, ids, config)
            right = experts(x, some, powers**degree, ids, replace(config, weight_on="output"))
            assert torch.equal(left, right)
            wrong = experts(
                x, some, powers ** (degree + 1), ids, replace(config, weight_on="output")
            )
            assert_far(left, wrong)
        for x, some, weights, ids in cases(gated, bias=True):
            config = ExpertsConfig(activation, gated, weight_on="input")
            left = experts(x, some, weights, ids, config)
            right = experts(x, some, weights**degree, ids, replace(config, weight_on="output"))
            assert_far(left, right)


def test_experts__weight_before_down():
    r"""Is multiplying the activation by the router weight equal to multiplying the expert's output?

    Only if down has no bias, or the bias is multiplied, too: the second product is linear. That
    saves keeping the output for the backward pass.

    Asked: torchtitan #4095
    """
    for bias in (False, True):
        for x, some, weights, ids in cases(bias=bias):
            pairs = []
            for t, k in product(*map(range, ids.shape)):
                e, w = ids[t, k], weights[t, k]
                pre = x[t] @ some.gate_up[e].T + (some.gate_up_bias[e] if bias else 0)
                hidden = w * activate(pre, SILU)
                pairs.append(hidden @ some.down[e].T + (some.down_bias[e] if bias else 0))
            left = torch.stack(pairs).view(*ids.shape, -1).sum(dim=1)
            right = experts(x, some, weights, ids, SILU)
            if not bias:
                assert_same_sum(left, right, x, some, weights, ids)
                continue
            assert_far(left, right)
            missing = ((weights - 1)[:, :, None] * some.down_bias[ids]).sum(dim=1)
            assert_same_sum(left + missing, right, x, some, (weights + 1), ids)


def test_experts__bias_once_per_token():
    r"""Is adding the bias of down once per token equal to adding it inside every expert?

    Only if all experts share it and the weights add up to 1. gpt-oss has a bias per expert and
    multiplies it by the router weight like the rest of the output.

    Source: gpt-oss model code
    """
    for x, some, weights, ids in cases():
        normalized = weights / weights.sum(dim=1, keepdim=True)
        bare = replace(some, down_bias=None)
        right = experts(x, some, weights, ids, SILU)
        inside = torch.einsum("tk,tkh->th", weights, some.down_bias[ids])
        assert_same_sum(experts(x, bare, weights, ids, SILU) + inside, right, x, some, weights, ids)
        assert_far(experts(x, bare, weights, ids, SILU) + some.down_bias[ids].sum(dim=1), right)
        shared = replace(some, down_bias=some.down_bias[:1].expand_as(some.down_bias))
        left = experts(x, bare, normalized, ids, SILU) + some.down_bias[0]
        right = experts(x, shared, normalized, ids, SILU)
        assert_same_sum(left, right, x, shared, normalized, ids)


def test_experts__concatenated_or_interleaved():
    r"""Are gate and up stored one after the other the same as stored row by row in turn?

    Only if I = 1; the shapes are the same in any case, so that no check tells. gpt-oss interleaves,
    transformers, vLLM and Megatron concatenate, and converting one to the other is exact.

    Asked: sonic-moe #8, #45; Megatron-Bridge #1871
    """
    for x, some, weights, ids in cases():
        I = some.down.shape[2]
        gates, ups = some.gate_up[:, :I], some.gate_up[:, I:]
        in_turn = torch.stack([gates, ups], dim=2).flatten(1, 2)
        bias_in_turn = some.gate_up_bias.view(-1, 2, I).transpose(1, 2).flatten(1)
        stored = (in_turn, some.down, bias_in_turn, some.down_bias)
        right = experts(x, some, weights, ids, SILU)
        assert_far(experts(x, ExpertWeights(*stored), weights, ids, SILU), right)
        converted = from_layout(LAYOUTS["gpt-oss"], *stored)
        assert torch.equal(experts(x, converted, weights, ids, SILU), right)
    for x, some, weights, ids in cases(I=1):
        read = from_layout(LAYOUTS["gpt-oss"], *vars(some).values())
        assert torch.equal(
            experts(x, read, weights, ids, SILU), experts(x, some, weights, ids, SILU)
        )


def test_experts__gate_and_up_exchanged():
    r"""Is silu(gate) · up equal to silu(up) · gate?

    No, $g\,u\,\sigma(g)$ is not $g\,u\,\sigma(u)$. FlashInfer's CUTLASS kernels want up first;
    weights in the wrong order fit every shape, and the model answers nonsense.

    Asked: SGLang #32430; nntrainer #4194; vLLM #42821
    """
    assert on_one(one_expert(1.0, 2.0), SILU) == pytest.approx(1.462, abs=1e-3)
    assert on_one(one_expert(2.0, 1.0), SILU) == pytest.approx(1.762, abs=1e-3)
    for x, some, weights, ids in cases():
        I = some.down.shape[2]
        turned = replace(
            some,
            gate_up=some.gate_up.roll(I, dims=1),
            gate_up_bias=some.gate_up_bias.roll(I, dims=1),
        )
        right = experts(x, some, weights, ids, SILU)
        assert_far(experts(x, turned, weights, ids, SILU), right)
        read = from_layout(Layout(up_first=True), *vars(turned).values())
        assert torch.equal(experts(x, read, weights, ids, SILU), right)


def test_experts__gelu_erf_or_tanh():
    r"""Is gelu with the error function equal to gelu with tanh?

    No. They are up to $4.7 \cdot 10^{-4}$ apart, at 2.7 and -2.7 or so, which has changed what a
    model says; a tolerance above that hides it.

    Asked: vLLM #41574, #56839
    """
    x = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    erf, tanh = (activate(x, ExpertsConfig(name, gated=False)) for name in ("gelu", "gelu_tanh"))
    apart = (erf - tanh).abs()
    assert 4.7e-4 < apart.max() < 4.8e-4
    assert 2.6 < x[apart.argmax()].abs() < 2.8
    # Which name is which.
    assert_close(erf, F.gelu(x), 1)
    assert_close(tanh, F.gelu(x, approximate="tanh"), 1)


def test_experts__swigluoai_is_silu():
    r"""Is swigluoai with alpha = 1 and no limit equal to silu?

    Only if 1 is added to up's bias: swigluoai multiplies by $u + 1$, where silu multiplies by $u$.
    gpt-oss has alpha 1.702 and a limit of 7.

    Asked: onnxruntime #28738
    """
    config = ExpertsConfig("swigluoai", alpha=1.0, limit=math.inf)
    assert on_one(one_expert(1.0, 0.0), SILU) == 0.0
    assert on_one(one_expert(1.0, 0.0), config) == pytest.approx(0.731, abs=1e-3)
    for x, some, weights, ids in cases():
        I = some.down.shape[2]
        left = experts(x, some, weights, ids, config)
        assert_far(left, experts(x, some, weights, ids, SILU))
        one = torch.cat([torch.zeros(I), torch.ones(I)]).to(x.dtype)
        shifted = replace(some, gate_up_bias=some.gate_up_bias + one)
        # Sizes are taken with 1 more than |b|, which |b + 1| may fall short of.
        sizes = replace(some, gate_up_bias=some.gate_up_bias.abs() + one)
        right = experts(x, shifted, weights, ids, SILU)
        assert_same_sum(left, right, x, sizes, weights, ids)


def test_experts__swiglu_limit_is_silu():
    r"""Is swiglu_limit with an infinite limit equal to silu?

    Yes, up to the rounding of an exponential; with a finite limit only where no number reaches it.
    DeepSeek-V4 limits.

    Asked: SGLang #23776; vLLM #26347
    """
    free, tight = (ExpertsConfig("swiglu_limit", limit=limit) for limit in (math.inf, 0.1))
    for x, some, weights, ids in cases():
        right = experts(x, some, weights, ids, SILU)
        # silu of a clamped copy and of a strided view may differ by a bit.
        assert_same_sum(experts(x, some, weights, ids, free), right, x, some, weights, ids)
        assert_far(experts(x, some, weights, ids, tight), right)


def test_experts__clamp_before_or_after_silu():
    r"""Is clamping the gate before silu equal to clamping silu's result?

    Only where the gate is at most the limit: above, the one gives silu(L), the other goes on up to
    L. DeepSeek-V4 clamps before, sgl-jax after.

    Source: sgl-jax's code
    """
    config = ExpertsConfig("swiglu_limit", limit=1.0)
    assert on_one(one_expert(9.0, 1.0), config) == pytest.approx(0.731, abs=1e-3)
    gate = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    before = activate(torch.stack([gate, torch.ones_like(gate)], dim=-1), config)[:, 0]
    after = F.silu(gate).clamp(max=1.0)
    below = gate <= 1.0
    assert_close(before[below], after[below], 2)
    assert (before[~below] < after[~below]).all()
    assert after.max() == 1.0


def test_experts__clamp_of_the_gate_on_both_sides():
    r"""Is clamping the gate on both sides equal to clamping it above only?

    Only where the gate is at least -L. gpt-oss and DeepSeek-V4 clamp the gate above and up on both
    sides, on purpose: below, silu goes to zero by itself.

    Asked: prime-rl #2365
    """
    for name in ("swigluoai", "swiglu_limit"):
        config = ExpertsConfig(name, alpha=1.0, limit=2.0)
        gate = torch.linspace(-9, 9, 1801, dtype=torch.float64)
        up = torch.ones_like(gate)
        above = activate(torch.stack([gate, up], dim=-1), config)
        both = activate(torch.stack([gate.clamp(min=-2.0), up], dim=-1), config)
        assert torch.equal(above[gate >= -2], both[gate >= -2])
        assert (above[gate < -2] != both[gate < -2]).all()
        assert_far(above, both)


def test_experts__one_product_or_two():
    r"""Is one product with gate and up stacked (w13) equal to two products?

    Yes: every row of the result is its own dot product. Kernels may sum it in another order.
    """
    for x, some, weights, ids in cases():
        I = some.down.shape[2]
        total = torch.zeros_like(x)
        for t, k in product(*map(range, ids.shape)):
            e = ids[t, k]
            w1, w3 = some.gate_up[e, :I], some.gate_up[e, I:]
            b1, b3 = some.gate_up_bias[e, :I], some.gate_up_bias[e, I:]
            hidden = F.silu(w1 @ x[t] + b1) * (w3 @ x[t] + b3)
            total[t] += weights[t, k] * (some.down[e] @ hidden + some.down_bias[e])
        assert_same_sum(experts(x, some, weights, ids, SILU), total, x, some, weights, ids)


def test_experts__loop_grouped_or_batched():
    r"""Do a loop over experts, a grouped product and a padded batch compute the same?

    Yes, up to the order of sums. transformers calls the first two eager and grouped_mm; vLLM has
    the padded batch for DeepEP's low-latency kernels.

    Asked: TensorRT-LLM #11128; vLLM #20449
    """
    for x, some, weights, ids in cases():
        E = len(some.down)
        loop = experts(x, some, weights, ids, SILU)
        grouped = experts_grouped(x, some, weights, ids, SILU)
        assert_same_sum(grouped, loop, x, some, weights, ids)
        rows, counts, slots = dispatch(x, ids, E)
        batch = batch_rows(rows, counts, len(x) + 1)
        out = unbatch_rows(experts_batched(batch, counts, some, SILU), counts)
        assert_same_sum(combine(out, slots, weights), loop, x, some, weights, ids)


def test_experts__the_same_expert_twice():
    r"""Is an expert named twice, with weights a and b, equal to one named once with a + b?

    Only if the weight is on the output, which is linear in it. On the input each pair is a number
    of its own; DeepSeek's `moe_infer` cannot do it at all.
    """
    for x, some, weights, _ids in cases(sizes=((1, 2), (4, 2))):
        twice = torch.zeros(len(x), 2, dtype=torch.int64)
        weights = weights.expand(len(x), -1)[:, [0, -1]]
        once = (weights.sum(dim=1, keepdim=True), twice[:, :1])
        left, right = experts(x, some, weights, twice, SILU), experts(x, some, *once, SILU)
        assert_same_sum(left, right, x, some, weights, twice)
        on_input = replace(SILU, weight_on="input")
        assert_far(experts(x, some, weights, twice, on_input), experts(x, some, *once, on_input))


def test_experts__shape_tells_the_layout():
    r"""Can the shape of gate_up tell whether it is [E, 2I, H] or [E, H, 2I]?

    Only if H is not 2I, and down alone only if H is not I. Together they always tell, because
    I = 2I has no solution. hanzo-engine looks at each by itself.

    Source: hanzo-engine's MoEExperts
    """
    for H, I in product(range(1, 17), repeat=2):
        plain = torch.empty(1, 2 * I, H), torch.empty(1, H, I)
        turned = tuple(each.transpose(1, 2) for each in plain)
        assert not infer_transposed(*plain)
        assert infer_transposed(*turned)
        assert (plain[0].shape == turned[0].shape) == (H == 2 * I)
        assert (plain[1].shape == turned[1].shape) == (H == I)


def test_experts__one_initialisation_for_all():
    r"""Is initialising the stacked tensor [E, out, in] equal to initialising every expert?

    No. torch's fan-in of a tensor with three dimensions is out · in, so that the weights are too
    small by $\sqrt{out}$; hyper_parallel reads it as [E, out · in], with the same result.

    Source: hyper_parallel's PyTorch MoE blocks
    """
    E, H, I = 4, 64, 32
    torch_default = math.sqrt(5)
    each, stacked = torch.empty(2 * I, H), torch.empty(E, 2 * I, H)
    torch.nn.init.kaiming_uniform_(each, a=torch_default, generator=seeded(0))
    torch.nn.init.kaiming_uniform_(stacked, a=torch_default, generator=seeded(0))
    flat = torch.empty(E, 2 * I * H)
    torch.nn.init.kaiming_uniform_(flat, a=torch_default, generator=seeded(0))
    right = init_experts(E, H, I, generator=seeded(0)).gate_up
    bound = 1 / math.sqrt(H)
    # The greatest of thousands of uniform numbers is within a hundredth of its bound.
    for weights, expected in (
        (each, bound),
        (right, bound),
        (stacked, bound / math.sqrt(2 * I)),
        (flat, bound / math.sqrt(2 * I)),
    ):
        assert 0.99 * expected < weights.abs().max() <= expected


def test_experts__no_gradient_or_a_gradient_of_zero():
    r"""Is skipping an expert that got no tokens the same as computing it on none?

    Only if no gradient is taken. Skipped, the gradient is None: other ranks wait for it in a
    reduction, and an optimizer leaves its momentum and weight decay out. Computed, it is zero.

    Asked: Megatron #4851, #1877; DeepSpeed #5066; PaddleFormers #3010
    """
    x, ids, weights = normal(0, 3, 5), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    some = mapped(init_experts(2, 5, 4, generator=seeded(0), dtype=torch.float64), lambda w: w)
    some.gate_up.requires_grad_()
    right = experts(x, some, weights, ids, SILU)
    right.sum().backward()
    assert (some.gate_up.grad[1] == 0).all()
    assert (some.gate_up.grad[0] != 0).any()

    matrices = [each.detach().clone().requires_grad_() for each in some.gate_up]
    skipping = torch.zeros_like(x)
    for e, matrix in enumerate(matrices):
        if (ids == e).any():
            skipping = skipping + activate(x @ matrix.T, SILU) @ some.down[e].T
    skipping.sum().backward()
    assert_same_sum(skipping.detach(), right.detach(), x, mapped(some, torch.detach), weights, ids)
    assert matrices[1].grad is None


# The layer


def layer_weights(seed, E, H, I, dtype, shared=None, **parts):
    drawn = [init_experts(n, H, i, True, True, seeded(seed), torch.float64)
             for n, i in ((E, I), (1, shared or I))]  # fmt: skip
    routed, own = (mapped(each, lambda w: (2 * w).to(dtype)) for each in drawn)
    router = normal(seed, E, H, dtype=dtype)
    return LayerWeights(router, routed, shared=own if shared else None, **parts)


def layers(routing=None, shared=None):
    """x [2, 3, H], a layer's weights and its configuration."""
    for seed, (E, K), dtype in product(range(2), ((1, 1), (4, 2), (16, 16)), DTYPES):
        chosen = routing or RoutingConfig(1, renormalize=True)
        config = LayerConfig(replace(chosen, top_k=K), SILU)
        x = normal(seed + 50, 2, 3, 5, dtype=dtype)
        yield x, layer_weights(seed, E, 5, 4, dtype, shared), config


def assert_same_layer(left, right, x, parameters, config):
    """The bound of `assert_same_sum`, over all routed experts and the shared one."""
    out = layer(x, parameters, config)
    x_TH = x.flatten(0, 1)
    some, weights, ids = parameters.experts, out.weights.abs() + 1, out.expert_ids
    if parameters.shared is not None:
        # The shared one is as one more of them: its size is bounded by the greatest numbers.
        greatest = mapped(parameters.shared, lambda w: w.abs().max())
        bounded = [
            torch.maximum(w.abs(), getattr(greatest, name)) for name, w in vars(some).items()
        ]
        some = ExpertWeights(*bounded)
    assert_same_sum(left.flatten(0, 1), right.flatten(0, 1), x_TH, some, 2 * weights, ids)


def test_layer__moe_infer_is_the_forward():
    r"""Is DeepSeek's `moe_infer`, sorted by expert, equal to the training forward?

    Yes on one rank, up to the order of sums, and a training flag changes no output. (On several
    ranks its published excerpt lacks the way back, see the documents.)

    Source: DeepSeek-V2's model code
    """
    for x, some, weights, ids in cases():
        for config in (SILU, replace(SILU, weight_on="input")):
            left = moe_infer(x, ids, weights, some, config)
            right = experts(x, some, weights, ids, config)
            # On the input a weight of at most 1.1 enters both products, and their sizes.
            factor = 1.0 if config.weight_on == "output" else 2.0
            assert_same_sum(left, right, x, some, factor * weights.clamp(min=1), ids)
    for x, parameters, config in layers(shared=6):
        training = replace(config, balance=BalanceConfig("switch"))
        trained, plain = layer(x, parameters, training, training=True), layer(x, parameters, config)
        assert torch.equal(trained.output, plain.output)
        assert trained.balance_loss is not None
        assert plain.balance_loss is None


def test_layer__all_experts_is_a_soft_mixture():
    r"""Is top-k with K = E equal to a dense soft mixture of all experts?

    Yes, with softmax, renormalised or not: the weights are the softmax itself, in another order.
    """
    for renormalize in (False, True):
        for x, parameters, config in layers(RoutingConfig(1, renormalize=renormalize)):
            E = len(parameters.router)
            config = replace(config, routing=replace(config.routing, top_k=E))
            x_TH = x.flatten(0, 1)
            mixture = torch.softmax(x_TH @ parameters.router.T, dim=1)
            everyone = torch.arange(E).expand(len(x_TH), E)
            soft = experts(x_TH, parameters.experts, mixture, everyone, SILU)
            # The logits are sums over H, and the softmax's own roundings are 30 and E.
            weights = mixture + 30 + E + parameters.router.abs().sum(dim=1).max() * x.abs().max()
            left = layer(x, parameters, config).output.flatten(0, 1)
            assert_same_sum(left, soft, x_TH, parameters.experts, weights, everyone)


def test_layer__one_expert_is_a_dense_layer():
    r"""Is a layer with one expert equal to a dense feed-forward?

    Only if its weight is 1, as with softmax or renormalisation. A sigmoid weight of its own, as in
    DeepSeek-V3 (which does not renormalise K = 1), scales every token by something else.

    Asked: microsoft/Tutel#218
    """
    configs = {
        RoutingConfig(1): True,
        RoutingConfig.preset("gpt-oss", top_k=1): True,
        RoutingConfig(1, "sigmoid", renormalize=True): True,
        RoutingConfig(1, "sigmoid"): False,
        RoutingConfig.preset("deepseek-v3", top_k=1, num_groups=1, topk_groups=1): False,
    }
    for (routing, is_dense), seed, dtype in product(configs.items(), range(2), DTYPES):
        parameters, x = layer_weights(seed, 1, 5, 4, dtype), normal(seed, 1, 6, 5, dtype=dtype)
        dense = LayerWeights(parameters.router, parameters.experts)
        one = experts(x[0], dense.experts, torch.ones(6, 1), torch.zeros(6, 1).long(), SILU)
        out = layer(x, parameters, LayerConfig(routing, SILU)).output[0]
        if is_dense:
            assert torch.equal(out, one)
        else:
            assert_far(out, one)


def test_layer__equal_experts_are_a_dense_layer():
    r"""If all experts are copies of one feed-forward, is the layer equal to it?

    Only if a token's weights add up to 1, as in Mixtral and gpt-oss. Upcycling a dense model into a
    router without renormalisation (Qwen2-MoE, OLMoE) makes every output smaller.

    Source: Sparse upcycling (arXiv 2212.05055)
    """
    for seed, dtype, (E, K) in product(range(2), DTYPES, ((4, 2), (16, 4))):
        one = layer_weights(seed, 1, 5, 4, dtype).experts
        router, x = normal(seed, E, 5, dtype=dtype), normal(seed + 9, 1, 6, 5, dtype=dtype)
        parameters = LayerWeights(router, take_experts(one, [0] * E))
        nobody, ones = torch.zeros(6, 1).long(), torch.ones(6, 1, dtype=dtype)
        dense = experts(x[0], one, ones, nobody, SILU)
        for name in ("mixtral", "gpt-oss"):
            config = LayerConfig(RoutingConfig.preset(name, top_k=K), SILU)
            # K weights have 30 + E roundings of their own, and add up to 1.
            left = layer(x, parameters, config).output[0]
            assert_same_sum(left, dense, x[0], one, (30 + E + K) * ones, nobody)
        config = LayerConfig(RoutingConfig.preset("qwen2-moe", top_k=K), SILU)
        out = layer(x, parameters, config)
        assert_far(out.output[0], dense)
        assert (out.weights.sum(dim=1) < 1).all()


def test_layer__shared_expert_is_one_more_routed():
    r"""Is a shared expert equal to one more routed expert that every token chooses with weight 1?

    Only if its weight is 1 after the routing scale. TensorCast adds such a column; SGLang's fused
    shared expert gets 1 / scale and counts on a later multiplication by the scale.

    Asked: SGLang #28237, #35163, #29059
    """
    for (x, parameters, config), scale in product(layers(shared=4), (1.0, 2.5)):
        config = replace(config, routing=replace(config.routing, scale=scale))
        E, out = len(parameters.router), layer(x, parameters, config)
        stacked = [
            torch.cat([getattr(parameters.experts, name), w])
            for name, w in vars(parameters.shared).items()
        ]
        everyone, x_TH = ExpertWeights(*stacked), x.flatten(0, 1)
        weights, ids = add_shared_column(out.weights, out.expert_ids, E, 1)
        one_more = experts(x_TH, everyone, weights, ids, SILU)
        assert_same_sum(one_more, out.output.flatten(0, 1), x_TH, everyone, weights, ids)
        late = torch.cat([out.weights / scale, torch.ones_like(weights[:, :1]) / scale], dim=1)
        fused = experts(x_TH, everyone, late, ids, SILU)
        if scale != 1.0:
            assert_far(fused, out.output.flatten(0, 1))
        assert_same_sum(fused * scale, out.output.flatten(0, 1), x_TH, everyone, weights, ids)


def test_layer__shared_experts_are_one_wide_one():
    r"""Are n shared experts equal to a single one of n times the width?

    Yes: their gates, ups and downs are put side by side and their biases of down added. DeepSeek
    stores them that way.

    Source: DeepSeekMoE (arXiv 2401.06066)
    """
    for x, some, _weights, _ids in cases(sizes=((1, 1), (2, 1), (3, 1))):
        n, I = len(some.down), some.down.shape[2]
        # [n, 2I, ...] to the n gates before the n ups.
        side_by_side = [
            w.unflatten(1, (2, I)).transpose(0, 1).flatten(0, 2)[None]
            for w in (some.gate_up, some.gate_up_bias)
        ]
        wide = ExpertWeights(
            side_by_side[0],
            torch.cat(list(some.down), dim=1)[None],
            side_by_side[1],
            some.down_bias.sum(dim=0, keepdim=True),
        )
        ones, everyone = torch.ones(len(x), n), torch.arange(n).expand(len(x), n)
        apart = experts(x, some, ones, everyone, SILU)
        together = experts(x, wide, ones[:, :1], everyone[:, :1], SILU)
        # The wide one adds up n I numbers.
        assert_same_sum(together, apart, x, some, ones * (1 + n), everyone)


def test_layer__shared_gate_of_zeros_is_no_gate():
    r"""Is a shared expert whose gate has zero weights equal to one without a gate?

    No: the sigmoid of 0 is one half, so that the shared part is halved. Qwen2-MoE and Qwen3-Next
    have such a gate, and dropping it multiplies the shared part by another factor for every token.

    Asked: NousResearch/torchtitan#36; lmdeploy #3491; Pai-Megatron #402
    """
    for x, parameters, config in layers(shared=6):
        routed_only = layer(x, replace(parameters, shared=None), config).output
        whole = layer(x, parameters, config).output
        zeros = torch.zeros(1, x.shape[2], dtype=x.dtype)
        half = layer(x, replace(parameters, shared_gate=zeros), config).output
        halved = layer(x, parameters, replace(config, shared_scale=0.5)).output
        assert torch.equal(half, halved)
        # Half of either is exact; what is left are the two sums.
        assert_same_layer(half * 2, whole + routed_only, x, parameters, config)
        assert_far(half, whole)


def test_layer__scale_on_the_weights_or_the_output():
    r"""Is scaling the router's weights equal to scaling the layer's output?

    Only if there is no shared expert, which the scale is not for, and only one of the two is done:
    both together scale twice. DeepSeek-V3 and Kimi K2 scale the weights.

    Asked: vLLM #45037; SGLang #8511, #35152; kvcache-ai/sglang#86
    """
    for shared in (None, 6):
        for x, parameters, config in layers(shared=shared):
            plain = layer(x, parameters, config).output
            # A power of two, so that the factor is not rounded.
            scaled_config = replace(config, routing=replace(config.routing, scale=2.0))
            scaled = layer(x, parameters, scaled_config).output
            if shared is None:
                assert torch.equal(scaled, 2 * plain)
            else:
                assert_far(scaled, 2 * plain)
                alike = replace(scaled_config, shared_scale=2.0)
                assert torch.equal(layer(x, parameters, alike).output, 2 * plain)
            assert_far(2 * scaled, scaled)


def test_layer__scale_folded_into_down():
    r"""Is the routing scale equal to scaling `down` of every routed expert?

    Only if its bias is scaled, too, and the weight is on the output. That is how a checkpoint is
    made for code that knows no scale.

    Asked: SGLang #8402
    """
    for x, some, weights, ids in cases():
        right = experts(x, some, 2.5 * weights, ids, SILU)
        folded = replace(some, down=2.5 * some.down, down_bias=2.5 * some.down_bias)
        left = experts(x, folded, weights, ids, SILU)
        assert_same_sum(left, right, x, some, 2.5 * weights, ids)
        assert_far(experts(x, replace(some, down=2.5 * some.down), weights, ids, SILU), right)
        on_input = replace(SILU, weight_on="input")
        folded_left = experts(x, folded, weights, ids, on_input)
        assert_far(folded_left, experts(x, some, 2.5 * weights, ids, on_input))


def test_layer__router_in_bfloat16():
    r"""Is casting the router's logits to float32 equal to computing them in float32?

    Only where the chosen logits are further from the others than bfloat16's roundings: after a
    product in bfloat16 logits are equal that were not, and a cast does not bring the difference
    back. DeepSeek's model code and torchtitan compute in float32, hyper_parallel casts.

    Asked: Automodel #3650; torchtitan #2389
    """
    # Numbers that bfloat16 holds, whose sum it does not.
    x, router = torch.ones(1, 1, 2), torch.tensor([[1.0, 0.0], [1.0, 2**-9]])
    some = init_experts(2, 2, 1, generator=seeded(0))
    chosen = [
        layer(x, LayerWeights(router, some), LayerConfig(RoutingConfig(1), router_dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [out.expert_ids.item() for out in chosen] == [1, 0]
    H, E, K = 64, 64, 6
    x = normal(0, 1, 500, H).bfloat16().float()
    router = (normal(1, E, H) / math.sqrt(H)).bfloat16().float()
    parameters = LayerWeights(router, init_experts(E, H, 1, generator=seeded(0)))
    wide, narrow = (
        layer(x, parameters, LayerConfig(RoutingConfig(K), router_dtype=dtype)).expert_ids
        for dtype in (torch.float32, torch.bfloat16)
    )
    other = (wide.sort(dim=1).values != narrow.sort(dim=1).values).any(dim=1)
    best = (x[0] @ router.T).topk(K + 1, dim=1).values
    margin = best[:, K - 1] - best[:, K]
    assert 0.01 < other.double().mean() < 0.5
    # Both logits are below 8 and rounded to 8 bits, each by 2^-7 at most.
    assert best.max() < 8
    assert not other[margin > 2**-5].any()


def test_layer__padding_in_the_batch():
    r"""Are padding tokens in the batch harmless?

    Only if the losses and counts are given a mask. The outputs of the other tokens do not change,
    whatever the padding holds, as long as nothing is dropped by capacity.

    Asked: transformers #28505, #29363; Megatron #1984; SGLang #30895; vLLM #38128
    """
    for x, parameters, config in layers(shared=6):
        config = replace(config, balance=BalanceConfig("switch"))
        garbage = torch.full((2, 2, 5), math.nan, dtype=x.dtype)
        padded = torch.cat([x, garbage], dim=1)
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[:, 3:] = False
        alone = layer(x, parameters, config, training=True)
        masked = layer(padded, parameters, config, padding_mask=mask, training=True)
        # Other rows in a product may change the order of its sums.
        assert_same_layer(masked.output[:, :3], alone.output, x, parameters, config)
        assert torch.equal(masked.tokens_per_expert, alone.tokens_per_expert)
        assert_close(masked.balance_loss, alone.balance_loss, 100)
        finite = torch.cat([x, torch.full_like(garbage, 9.0)], dim=1)
        unmasked = layer(finite, parameters, config, training=True)
        assert_same_layer(unmasked.output[:, :3], alone.output, x, parameters, config)
        assert unmasked.tokens_per_expert.sum() > alone.tokens_per_expert.sum()
        if 1 < config.routing.top_k < len(parameters.router):
            assert_far(unmasked.balance_loss, alone.balance_loss)


def test_layer__sequences_or_one_long_sequence():
    r"""Is a batch of N sequences equal to one sequence of all its tokens?

    Only if no loss is taken per sequence. Routing and experts do not know of sequences, nor does
    Switch's loss; GShard's and DeepSeek's sequence-level losses do.
    """
    for x, parameters, config in layers(shared=6):
        long = x.flatten(0, 1)[None]
        for name in ("switch", "deepseek_sequence", "gshard"):
            balanced = replace(config, balance=BalanceConfig(name))
            two = layer(x, parameters, balanced, training=True)
            one = layer(long, parameters, balanced, training=True)
            assert torch.equal(two.output.flatten(0, 1), one.output[0])
            if name == "switch":
                assert torch.equal(two.balance_loss, one.balance_loss)
            elif 1 < config.routing.top_k < len(parameters.router):
                assert_far(two.balance_loss, one.balance_loss)


# Slices and ranks


def summed(parts):
    parts = list(parts)
    return sum(parts[1:], parts[0])


def test_expert_slicing__tensor_parallel_sum_is_the_whole():
    r"""Do the outputs of tensor-parallel slices add up to the whole expert's output?

    Yes: I is cut, gate and up alike, and the sum over I is what down computes anyway. I need not be
    divisible by the number of ranks.

    Source: Megatron-LM (arXiv 1909.08053)
    """
    for (x, some, weights, ids), R in product(cases(), (1, 2, 3, 6)):
        parts = (slice_tensor_parallel(some, R, rank) for rank in range(R))
        total = summed(experts(x, part, weights, ids, SILU) for part in parts)
        whole = experts(x, some, weights, ids, SILU)
        # R more sums of at most K numbers each.
        assert_same_sum(total, whole, x, some, (1 + R / 5) * weights, ids)


def test_expert_slicing__bias_of_down_on_every_rank():
    r"""May every tensor-parallel rank add the bias of down?

    No: the sum over the ranks has it R times. It is on one rank and zero elsewhere, or divided by
    R.

    Asked: vLLM #49122, #49378
    """
    for (x, some, weights, ids), R in product(cases(), (2, 4)):
        whole = experts(x, some, weights, ids, SILU)
        parts = [slice_tensor_parallel(some, R, rank) for rank in range(R)]
        everywhere = [replace(part, down_bias=some.down_bias) for part in parts]
        total = summed(experts(x, part, weights, ids, SILU) for part in everywhere)
        assert_far(total, whole)
        bias = torch.einsum("tk,tkh->th", weights, some.down_bias[ids])
        assert_same_sum(total, whole + (R - 1) * bias, x, some, R * weights, ids)
        # R is a power of two, so that its share of a bias is exact.
        shared = [replace(part, down_bias=some.down_bias / R) for part in parts]
        total = summed(experts(x, part, weights, ids, SILU) for part in shared)
        assert_same_sum(total, whole, x, some, 2 * weights, ids)


def test_expert_slicing__gate_up_cut_as_one():
    r"""Is cutting the rows of gate_up as one tensor equal to cutting gate and up each?

    Only if there is one rank: on two, the first gets all gates and the second all ups.
    hanzo-engine's loader of stacked weights does that. Interleaved rows (gpt-oss) may be cut as
    one.

    Asked: SGLang #15432
    """
    for x, some, weights, ids in cases(bias=False):
        whole = experts(x, some, weights, ids, SILU)
        for R, layout in product((1, 2, 4), (Layout(), LAYOUTS["gpt-oss"])):
            I = some.down.shape[2]
            stored = some.gate_up
            if layout.interleave:
                stored = stored.unflatten(1, (2, I)).transpose(1, 2).flatten(1, 2)
            halves = zip(stored.chunk(R, dim=1), some.down.chunk(R, dim=2), strict=True)
            parts = (from_layout(layout, gate_up, down) for gate_up, down in halves)
            total = summed(experts(x, part, weights, ids, SILU) for part in parts)
            if R == 1 or layout.interleave:
                assert_same_sum(total, whole, x, some, 2 * weights, ids)
            else:
                assert_far(total, whole)
    # The smallest: I = 2, gates 1 and 2, ups 3 and 4. The second rank needs the second of each.
    smallest = ExpertWeights(torch.arange(1.0, 5.0).view(1, 4, 1), torch.ones(1, 1, 2))
    assert slice_tensor_parallel(smallest, 2, 1).gate_up.flatten().tolist() == [2.0, 4.0]
    assert smallest.gate_up.chunk(2, dim=1)[1].flatten().tolist() == [3.0, 4.0]


def test_expert_slicing__cutting_the_hidden_size():
    r"""May H be cut instead of I, and the outputs added up at the end?

    No: the first product is then partial itself and has to be summed before the activation. silu of
    a sum is not the sum of silus.

    Source: Megatron-LM (arXiv 1909.08053)
    """
    for x, some, weights, ids in cases(bias=False):
        whole = experts(x, some, weights, ids, SILU)
        without_half = [
            torch.cat([x[:, :2], 0 * x[:, 2:]], 1),
            torch.cat([0 * x[:, :2], x[:, 2:]], 1),
        ]
        late = summed(experts(half, some, weights, ids, SILU) for half in without_half)
        assert_far(late, whole)
        early = torch.zeros_like(x)
        for t, k in product(*map(range, ids.shape)):
            pre = summed(some.gate_up[ids[t, k]] @ half[t] for half in without_half)
            early[t] += weights[t, k] * (some.down[ids[t, k]] @ activate(pre, SILU))
        assert_same_sum(early, whole, x, some, weights, ids)


def test_expert_slicing__expert_parallel_sum_is_the_whole():
    r"""Do the outputs of ranks that hold some of the experts add up to the output of all?

    Yes, however the experts are shared out, in order or in turn, evenly or not: every pair is
    computed on exactly one rank. A rank may hold none.

    Asked: vLLM #21497; torchtitan #2416
    """
    for (x, some, weights, ids), R in product(cases(), (1, 2, 3, 9)):
        E, whole = len(some.down), experts(x, some, weights, ids, SILU)
        contiguous = [range(start, start + n)
                      for start, n in (assign_experts(E, R, r) for r in range(R))]  # fmt: skip
        in_turn = [assign_round_robin(E, R, rank) for rank in range(R)]
        for shares in (contiguous, in_turn):
            assert sorted(e for share in shares for e in share) == list(range(E))
            total = summed(
                experts(x, take_experts(some, share), weights, ids, SILU, make_expert_map(E, share))
                for share in shares
            )
            # A token's K outputs are added up in another order.
            assert_same_sum(total, whole, x, some, weights, ids)


def test_expert_slicing__summing_what_is_whole():
    r"""Is summing over the ranks harmless where every rank has all the weights?

    No: the output is R times too large, and nothing fails. The same for a shared expert that is
    whole on every rank; a slice that is not summed is the opposite mistake.

    Asked: vLLM #49122; SGLang #35535, #32963; tpu-inference #3435
    """
    for x, some, weights, ids in cases():
        whole = experts(x, some, weights, ids, SILU)
        # Sums of two and of four equal numbers are exact.
        assert torch.equal(summed([whole] * 4), 4 * whole)
        assert_far(summed([whole] * 2), whole)
        assert_far(experts(x, slice_tensor_parallel(some, 2, 0), weights, ids, SILU), whole)


def test_expert_slicing__local_ids_by_subtraction():
    r"""Is subtracting a rank's first expert from the ids equal to an expert map?

    Only if the rank's experts are consecutive, and whatever falls outside is left out. As an index
    it is not left out: -1 is the last local expert.

    Asked: flashinfer #1469; vLLM #42034; SGLang #28170; transformers #40545
    """
    for x, some, weights, ids in cases(sizes=((4, 2), (7, 3), (16, 16))):
        E = len(some.down)
        for start, count in (assign_experts(E, 2, rank) for rank in range(2)):
            local = slice_experts(some, start, count)
            by_map = make_expert_map(E, range(start, start + count))
            left = experts(x, local, weights, ids - start, SILU)
            right = experts(x, local, weights, ids, SILU, by_map)
            assert torch.equal(left, right)
            assert torch.equal(local_ids(ids - start, count), local_ids(ids, count, by_map))
        wrapped = experts(x, local, weights, (ids - start) % count, SILU)
        assert_far(wrapped, right)
    assert torch.tensor([10, 11])[torch.tensor([1 - 2])].item() == 11


def test_expert_slicing__copies_are_one_expert():
    r"""Does an expert with copies (EPLB) compute what it computes without?

    Yes, whichever copy each pair takes, as long as every pair takes exactly one. Copies that every
    rank picks for itself from the same tokens are computed several times or never.

    Asked: SGLang #32962, #18213; vllm-ascend #4793
    """
    for x, some, weights, ids in cases(sizes=((1, 1), (4, 2), (7, 3))):
        E, whole = len(some.down), experts(x, some, weights, ids, SILU)
        on = torch.tensor([*range(E), *range(E)][: E + E % 2 + 2 if E > 1 else 2])
        placement = make_placement(on, E, 2)
        copies = take_experts(some, on.tolist())
        physical = physical_ids(ids, placement)
        assert torch.equal(on[physical], ids)
        left = experts(x, copies, weights, physical, SILU)
        assert_same_sum(left, whole, x, some, weights, ids)
        last = placement.logical_to_physical.max(dim=1).values[ids]
        assert_same_sum(experts(x, copies, weights, last, SILU), whole, x, some, weights, ids)
        # Two ranks of half the copies each, every rank preferring the copy that it holds.
        half = len(on) // 2
        total = torch.zeros_like(x)
        for rank in range(2):
            mine = range(rank * half, rank * half + half)
            held = [int(on[p]) for p in mine]
            first = {e: held.index(e) for e in reversed(held)}
            rows = torch.tensor([[first.get(e, -1) for e in each] for each in ids.tolist()])
            total += experts(x, take_experts(some, held), weights, rows, SILU)
        assert_far(total, whole)
