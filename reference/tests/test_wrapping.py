"""Gates by what they return, and blocks by what they call their parts."""

import pytest
import torch
from moe_reference.config import ExpertsConfig, ExpertWeights, RoutingConfig
from moe_reference.experts import experts, init_experts
from moe_reference.gates import jitter, read_gate
from moe_reference.gating import route
from moe_reference.layouts import LAYOUTS, to_layout
from moe_reference.wrapping import FieldNames, WrappedMoE, experts_of_modules
from torch import nn

E, H, I, K = 4, 5, 3, 2
ROUTING = RoutingConfig(top_k=K, renormalize=True)


class One(nn.Module):
    """One expert of a block, its own calls counted."""

    def __init__(self, weights, e):
        super().__init__()
        self.gate_up, self.down = (nn.Parameter(w[e]) for w in (weights.gate_up, weights.down))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        gate, up = (x @ self.gate_up.T).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down.T


class Stacked(nn.Module):
    def __init__(self, weights, layout, names):
        super().__init__()
        found = to_layout(layout, weights)
        for name, tensor in zip((*names, *(f"{n}_bias" for n in names)), found, strict=True):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))


class Gate(nn.Linear):
    """A gate that returns whatever is asked of it."""

    def __init__(self, returns):
        super().__init__(H, E, bias=False, dtype=torch.float64)
        self.returns = returns

    def forward(self, x):
        logits = super().forward(x)
        if self.returns == "logits":
            return logits
        weights, ids = route(logits.flatten(0, -2), ROUTING)
        values = {"logits": logits, "weights": weights, "ids": ids, "loss": weights.sum()}
        return tuple(values[name] for name in self.returns.split("_"))


def weights_and_x(bias=False):
    generator = torch.Generator().manual_seed(0)
    weights = init_experts(E, H, I, bias=bias, generator=generator, dtype=torch.float64)
    return weights, torch.randn(2, 3, H, generator=generator, dtype=torch.float64)


def expected_of(gate, weights, x, config=ExpertsConfig()):  # noqa: B008
    x_TH = x.flatten(0, 1)
    chosen, ids = route(nn.functional.linear(x_TH, gate.weight), ROUTING)
    return experts(x_TH, weights, chosen, ids, config).view(x.shape)


RETURNS = ["logits", "ids_weights", "weights_ids", "logits_weights_ids", "ids_weights_loss"]


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("flat_gate", [False, True])
def test_a_list_of_modules_behind_any_gate(returns, flat_gate):
    weights, x = weights_and_x()
    block = nn.Module()
    block.choose, block.ffns = Gate(returns), nn.ModuleList(One(weights, e) for e in range(E))
    names = FieldNames(gate="choose", experts="ffns")
    moe = WrappedMoE(block, returns, ROUTING, names=names, flat_gate=flat_gate)
    torch.testing.assert_close(moe(x), expected_of(block.choose, weights, x))
    assert [len(one.rows) for one in block.ffns] == [1] * E
    assert sum(one.rows[0] for one in block.ffns) == 6 * K


@pytest.mark.parametrize("layout", ["transformers", "transformers-llama-4", "transformers-gpt-oss"])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_weights_by_their_names_and_layout(layout, bias):
    weights, x = weights_and_x(bias)
    block = nn.Module()
    block.gate = Gate("ids_weights")
    block.experts = Stacked(weights, LAYOUTS[layout], ("w13", "w2"))
    config = ExpertsConfig("gelu", weight_on="input")
    moe = WrappedMoE(
        block, "ids_weights", config=config, names=FieldNames(gate_up="w13", down="w2"),
        layout=LAYOUTS[layout],
    )  # fmt: skip
    torch.testing.assert_close(moe(x), expected_of(block.gate, weights, x, config))
    moe(x).sum().backward()
    assert block.experts.w13.grad.abs().sum() > 0


def test_shared_experts_and_their_gate_are_added_once():
    weights, x = weights_and_x()
    block = nn.Module()
    block.gate, block.experts = Gate("logits"), nn.ModuleList(One(weights, e) for e in range(E))
    routed = WrappedMoE(block, "logits", ROUTING)(x)
    block.shared_experts = nn.Linear(H, H, dtype=torch.float64)
    shared = block.shared_experts(x)
    moe = WrappedMoE(block, "logits", ROUTING)
    torch.testing.assert_close(moe(x), routed + shared)
    block.shared_expert_gate = nn.Linear(H, 1, dtype=torch.float64)
    gated = torch.sigmoid(block.shared_expert_gate(x)) * shared
    torch.testing.assert_close(moe(x), routed + gated)


def test_the_selection_bias_is_found_on_the_gate_or_on_the_block():
    weights, x = weights_and_x()
    bias = torch.tensor([0.0, 9.0, 0.0, 0.0])
    for owner in ("gate", "block"):
        block = nn.Module()
        block.gate, block.experts = Gate("logits"), nn.ModuleList(One(weights, e) for e in range(E))
        (block.gate if owner == "gate" else block).e_score_correction_bias = bias
        chosen = WrappedMoE(block, "logits", ROUTING).route(x)
        assert (chosen.expert_ids[:, 0] == 1).all()
        assert (chosen.weights < 1).all()


def test_a_hash_gate_is_handed_the_token_ids():
    weights, x = weights_and_x()
    table = torch.tensor([[0, 1], [2, 3]])

    class Hash(nn.Module):
        def forward(self, x, token_ids):
            ids = table[token_ids]
            return ids, torch.full(ids.shape, 0.5, dtype=x.dtype)

    block = nn.Module()
    block.gate, block.experts = Hash(), nn.ModuleList(One(weights, e) for e in range(E))
    token_ids = torch.tensor([[0, 1, 1], [0, 0, 1]])
    moe = WrappedMoE(block, "ids_weights")
    assert torch.equal(moe.route(x, token_ids).expert_ids, table[token_ids.flatten()])
    assert moe(x, token_ids).shape == x.shape


def test_experts_without_tokens_have_gradients_of_zero():
    weights, x = weights_and_x()
    modules = nn.ModuleList(One(weights, e) for e in range(E))
    ids = torch.tensor([[0, -1], [0, 9]])
    given = torch.full((2, 2), float("nan"), dtype=x.dtype)
    given[:, 0] = 0.5
    y = experts_of_modules(x[0, :2], modules, given, ids, ExpertsConfig())
    torch.testing.assert_close(y, 0.5 * modules[0](x[0, :2]))
    y.sum().backward()
    assert all(not one.down.grad.any() for one in modules[1:])
    empty = experts_of_modules(x[0, :0], modules, given[:0], ids[:0], ExpertsConfig())
    assert empty.shape == (0, H)


def test_ids_and_weights_in_the_wrong_order_are_refused():
    ids, weights = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.5]])
    with pytest.raises(TypeError, match=r"weights: expected dtype .* got int64"):
        read_gate((weights, ids), "ids_weights")


@pytest.mark.parametrize(
    ("output", "returns", "error", "message"),
    [
        (torch.ones(2, 3), "ids_weights", ValueError, "output: expected ids, weights, got Tensor"),
        (
            (torch.ones(2, 3),) * 3,
            "ids_weights",
            ValueError,
            "output: expected ids, .* got 3",
        ),
        (torch.ones(2, 3), "logits", ValueError, "config: expected a RoutingConfig"),
        (None, "weights", ValueError, "returns: expected one of"),
        ((torch.ones(2, dtype=torch.int64), torch.ones(2)), "ids_weights", ValueError, "weights: "),
        (
            (None, torch.ones(2, 1)),
            "ids_weights",
            TypeError,
            "ids: expected a tensor, got None",
        ),
        (
            (torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 2)),
            "ids_weights",
            ValueError,
            r"ids: expected shape \[2, 2\], got \[2, 1\]",
        ),
    ],
)
def test_what_a_gate_must_not_return_is_named(output, returns, error, message):
    with pytest.raises(error, match=message):
        read_gate(output, returns)


def test_a_block_without_its_parts_is_refused():
    block = nn.Module()
    with pytest.raises(ValueError, match="names: expected a gate module at 'gate' of Module"):
        WrappedMoE(block, "logits", ROUTING)


def test_jitter_is_uniform_and_leaves_its_argument_alone():
    x = torch.full((1000,), 2.0, requires_grad=True)
    noisy = jitter(x, 0.25, torch.Generator().manual_seed(0))
    assert noisy.min() >= 1.5
    assert noisy.max() <= 2.5
    # Uniform over 1: a mean of 1000 such numbers has a standard deviation of 0.0091.
    assert abs(noisy.mean() - 2) < 5 * 0.0091
    noisy.sum().backward()
    torch.testing.assert_close(x.grad, noisy.detach() / 2)
    assert (x == 2).all()
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon: expected a number from 0 to below 1"):
            jitter(x, wrong)


def test_expert_weights_of_a_block_are_its_own(tmp_path):
    weights, _ = weights_and_x(bias=True)
    block = nn.Module()
    block.gate = Gate("logits")
    block.experts = Stacked(weights, LAYOUTS["gpt-oss"], ("gate_up_proj", "down_proj"))
    read = WrappedMoE(block, "logits", ROUTING, layout=LAYOUTS["gpt-oss"]).expert_weights()
    assert isinstance(read, ExpertWeights)
    for field, tensor in vars(read).items():
        assert torch.equal(tensor, getattr(weights, field))
