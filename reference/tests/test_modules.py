"""What `MoELayer` keeps: counts of training only, each token once, and a bias in float32."""

import importlib.util
from pathlib import Path

import pytest
import torch
from moe_reference.bias_update import global_counts, update_bias
from moe_reference.config import BalanceConfig, LayerConfig, LayerWeights, RoutingConfig
from moe_reference.dispatch import count_tokens
from moe_reference.experts import init_experts
from moe_reference.layer import layer
from moe_reference.modules import MoELayer, moe_layer
from torch.utils.checkpoint import checkpoint

_spec = importlib.util.spec_from_file_location(
    "ranks_of_threads", Path(__file__).with_name("ranks_of_threads.py")
)
ranks_of_threads = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_of_threads)
on_ranks = ranks_of_threads.on_ranks

E, H, I, K = 5, 4, 3, 2
CONFIG = LayerConfig(RoutingConfig(top_k=K, score="sigmoid", renormalize=True))


def made(selection_bias=True, config=CONFIG, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = LayerWeights(
        router=torch.randn(E, H, generator=generator),
        experts=init_experts(E, H, I, generator=generator),
        selection_bias=torch.zeros(E) if selection_bias else None,
        shared=init_experts(1, H, 2 * I, generator=generator),
        shared_gate=torch.randn(1, H, generator=generator),
    )
    return MoELayer(parameters, config, **options)


def tokens(count=6, seed=0):
    return torch.randn(1, count, H, generator=torch.Generator().manual_seed(seed))


def test_it_computes_what_layer_computes():
    moe = made()
    expected = layer(tokens(), moe.parameters_of_layer(), CONFIG)
    got = moe.eval()(tokens())
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.expert_ids, expected.expert_ids)


def test_a_training_step_counts_each_real_token_once():
    moe = made()
    mask = torch.tensor([[True] * 4 + [False] * 2])
    result = moe(tokens(), padding_mask=mask)
    result.output.sum().backward()
    assert moe.tokens_per_expert.tolist() == count_tokens(result.expert_ids[:4], E).tolist()
    assert moe.tokens_per_expert.sum() == 4 * K


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_nothing_twice(use_reentrant):
    moe = made()
    x = tokens().requires_grad_()
    output = checkpoint(lambda x: moe(x).output * 1, x, use_reentrant=use_reentrant)
    output.sum().backward()
    assert moe.tokens_per_expert.sum() == 6 * K


def test_micro_batches_add_up_and_a_second_backward_adds_nothing():
    moe = made()
    output = moe(tokens()).output.sum()
    output.backward(retain_graph=True)
    output.backward()
    moe(tokens(3, seed=1)).output.sum().backward()
    assert moe.tokens_per_expert.sum() == 9 * K


def test_evaluation_counts_nothing():
    moe = made().eval()
    moe(tokens().requires_grad_()).output.sum().backward()
    with torch.no_grad():
        moe.train()(tokens())
    assert moe.tokens_per_expert.sum() == 0


def test_the_bias_is_moved_by_the_counts_and_they_are_taken_back_to_zero():
    moe = made()
    moe(tokens()).output.sum().backward()
    counts = moe.tokens_per_expert.clone()
    moe.update_bias(0.1, centred=True)
    assert torch.equal(moe.selection_bias, update_bias(torch.zeros(E), counts, 0.1, True))
    assert moe.tokens_per_expert.sum() == 0
    assert not moe.selection_bias.requires_grad


def test_a_layer_without_a_selection_bias_says_so():
    with pytest.raises(ValueError, match="selection_bias: expected a layer that has one, got None"):
        made(selection_bias=False).update_bias(0.1)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_stays_float32_whatever_the_module_is_cast_to(cast):
    moe = made()
    moe.selection_bias.fill_(0.501)
    moe.to(cast)
    assert moe.router.dtype == moe.experts.down.dtype == cast
    assert moe.selection_bias.dtype == torch.float32
    assert (moe.selection_bias == torch.tensor(0.501)).all()
    assert moe.tokens_per_expert.dtype == torch.int64
    output = moe(tokens().to(cast)).output
    output.sum().backward()
    assert output.dtype == moe.router.grad.dtype == cast


def test_the_state_is_weights_and_bias_and_no_counts():
    moe = made()
    moe(tokens()).output.sum().backward()
    state = moe.state_dict()
    assert "tokens_per_expert" not in state
    assert "selection_bias" in state
    other = made()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(tokens()).output, moe.eval()(tokens()).output)


def test_every_parameter_has_a_gradient_where_nothing_was_routed():
    moe = made()
    moe(tokens(0)).output.sum().backward()
    for name, parameter in moe.named_parameters():
        if name != "router":
            assert parameter.grad is not None, name
            assert not parameter.grad.any()


def test_the_balance_loss_is_there_in_training_only():
    config = LayerConfig(RoutingConfig(top_k=K), balance=BalanceConfig("switch", 0.01))
    moe = made(config=config)
    assert moe(tokens()).balance_loss.requires_grad
    assert moe.eval()(tokens()).balance_loss is None


def test_jitter_is_off_by_default_and_in_training_only():
    x = tokens()
    plain, noisy = made(), made(jitter_epsilon=0.1)
    assert torch.equal(plain(x).output, noisy.eval()(x).output)
    assert not torch.equal(plain(x).output, noisy.train()(x).output)
    assert torch.equal(x, tokens())


def test_the_weights_given_are_copied():
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights(torch.ones(E, H), init_experts(E, H, I, generator=generator))
    moe = MoELayer(weights, CONFIG)
    weights.router.zero_()
    assert (moe.router == 1).all()


def test_an_unknown_family_and_a_missing_tensor_are_named():
    with pytest.raises(ValueError, match=r"family: expected one of mixtral, .* got 'gpt-5'"):
        moe_layer("gpt-5", {}, "mlp.")
    with pytest.raises(ValueError, match=r"tensors: expected 'mlp.gate.weight', got no such name"):
        moe_layer("olmoe", {}, "mlp.")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_counts_are_those_of_all_ranks(world_size):
    def own(rank):
        return torch.arange(3) * (rank + 1)

    def run(rank):
        mine = own(rank)
        return global_counts(mine), mine

    expected = sum(own(rank) for rank in range(world_size))
    for rank, (counts, mine) in enumerate(on_ranks(world_size, run)):
        assert torch.equal(counts, expected)
        assert torch.equal(mine, own(rank))


def test_ranks_that_see_other_tokens_move_their_bias_alike():
    def run(rank):
        moe = made()
        moe(tokens(4 * rank, seed=rank).requires_grad_()).output.sum().backward()
        moe.update_bias(0.1)
        return moe.selection_bias

    one, two, three = on_ranks(3, run)
    assert torch.equal(one, two)
    assert torch.equal(two, three)
    assert one.any()
