"""One valid call, or several, of each function that takes tensors, for the tests of all of them.

Letters are those of the reference. `returns` gives, for each tensor of the result in order, the
letters of its shape and its dtype: `x` for that of the inputs, `wide` for float32 (float64 for
float64 inputs), or a dtype by name.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from moe_reference import (
    activations,
    alignment,
    bias_update,
    capacity,
    dispatch,
    expert_gathering,
    expert_slicing,
    experts,
    gates,
    gating,
    layer,
    layouts,
    load_balancing,
    loss_graph,
    wrapping,
)
from moe_reference.config import (
    Activation,
    BalanceConfig,
    ExpertsConfig,
    ExpertWeights,
    LayerConfig,
    LayerWeights,
    Loss,
    RoutingConfig,
    Score,
)

PATH = tuple[str | int, ...]


@dataclass
class Call:
    """A function with arguments that it takes.

    Attributes:
        function: what is called.
        arguments: by name.
        returns: letters and dtype of each tensor of the result.
        sizes: what the letters stand for.
        computed_in: `wide`, and then rounded once; or `x`, with a rounding at every step.
        differentiable: whether a gradient passes through.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    returns: tuple[tuple[str, str], ...]
    sizes: dict[str, int]
    computed_in: str = "wide"
    differentiable: bool = True

    def __call__(self, **changes: Any) -> list[torch.Tensor]:
        """The tensors of the result."""
        return [t for _, t in walk(self.function(**self.arguments | changes))]


def walk(tree: Any, path: PATH = ()) -> Iterator[tuple[PATH, torch.Tensor]]:
    """The tensors inside, with their paths; a float counts as none."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
        return
    if dataclasses.is_dataclass(tree):
        tree = vars(tree)
    elif hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from walk(branch, (*path, key))


def replace_in(tree: Any, path: PATH, leaf: Any) -> Any:
    """The same with another leaf at a path; the tree given stays as it is."""
    if not path:
        return leaf
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(tree):
        return dataclasses.replace(tree, **{key: replace_in(getattr(tree, key), rest, leaf)})
    if hasattr(tree, "_asdict"):
        return tree._replace(**{key: replace_in(getattr(tree, key), rest, leaf)})
    if isinstance(tree, dict):
        return tree | {key: replace_in(tree[key], rest, leaf)}
    branches = [replace_in(b, rest, leaf) if i == key else b for i, b in enumerate(tree)]
    return type(tree)(branches)


class _Problem:
    """Tensors of one device, dtype and size, and the calls that are made of them."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        ids_dtype: torch.dtype,
        sizes: dict[str, int],
        used: int | None,
    ):
        self.device, self.dtype, self.ids_dtype, self.sizes = device, dtype, ids_dtype, sizes
        self.generator = torch.Generator().manual_seed(5)
        self.calls: dict[str, Call] = {}

        T, E, K, C = self.shape("TEKC")
        self.x, self.weights = self.floats("TH"), self.floats("TK")
        self.logits, self.mask = self.apart("TE"), torch.arange(T, device=device) % 3 != 1
        self.batch = self.floats("ECH")
        self.experts, self.shared = self.some_experts(E), self.some_experts(1, width=sizes["I"] + 1)
        self.ids = self.integers("TK", end=used or E)
        # Some ids are not here: -1 and E.
        self.some_ids = self.integers("TK", end=used or E + 1, least=-1)
        self.here = (self.some_ids >= 0) & (self.some_ids < E)
        self.counts = torch.bincount(self.ids.flatten().long(), minlength=E).to(ids_dtype)
        self.rows_of_batch = torch.arange(E, device=device, dtype=ids_dtype) % (C + 1)
        self.expert_map = torch.arange(E, device=device, dtype=ids_dtype).flip(0) - 1
        # S rows of pairs that are here, Q rows of the batch.
        sizes |= {"S": int(self.here.sum()), "Q": int(self.rows_of_batch.sum())}

        self.routing = self._grouped_routing()
        table = torch.stack([torch.arange(K) + i for i in range(E - K + 1)]).to(device, ids_dtype)
        self.hashed = RoutingConfig(K, "sqrtsoftplus", order="topk_then_score", hash_table=table)
        self.token_ids = self.integers("T", end=len(table))

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in letters)

    def floats(self, letters: str) -> torch.Tensor:
        shape = self.shape(letters)
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.device, self.dtype)

    def integers(self, letters: str, end: int, least: int = 0) -> torch.Tensor:
        numbers = torch.randint(least, end, self.shape(letters), generator=self.generator)
        return numbers.to(self.device, self.ids_dtype)

    def apart(self, letters: str) -> torch.Tensor:
        """Rows of numbers far from any tie, in every row another order."""
        rows, columns = self.shape(letters)
        order = torch.rand(rows, columns, generator=self.generator).argsort(dim=1)
        steps = torch.arange(columns, dtype=torch.float64) ** 1.1 * 0.3 - 1.0
        return steps[order].to(self.device, self.dtype)

    def some_experts(self, count: int, width: int | None = None) -> ExpertWeights:
        sizes = self.sizes
        I = width or sizes["I"]
        self.sizes = sizes | {"E": count, "I": I, "J": 2 * I}
        experts = ExpertWeights(*(self.floats(letters) for letters in ("EJH", "EHI", "EJ", "EH")))
        self.sizes = sizes
        return experts

    def _grouped_routing(self) -> RoutingConfig:
        E, K = self.shape("EK")
        routing = RoutingConfig(K, "sigmoid", renormalize=True, epsilon=1e-20, scale=2.5)
        if E % 3 != 0 or E == 3:
            return routing
        return dataclasses.replace(
            routing, num_groups=3, topk_groups=-(-K // (E // 3)), group_score="top2_sum"
        )

    def add(
        self,
        function: Callable[..., Any],
        returns: str,
        /,
        *,
        what: str = "",
        computed_in: str = "wide",
        differentiable: bool = True,
        **arguments: Any,
    ) -> None:
        """Of `returns`, "TH:x E:int64" for two tensors."""
        pairs = [tuple(result.split(":")) for result in returns.split()]
        name = f"{function.__name__} {what}".strip()
        self.calls[name] = Call(
            function, arguments, tuple(pairs), self.sizes, computed_in, differentiable
        )


def make_calls(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    T: int = 6,
    E: int = 6,
    K: int = 2,
    used: int | None = None,
) -> dict[str, Call]:
    """The calls by the name of their function, with what is special behind a space.

    T is a multiple of 3. `used` experts get all the tokens; None for no such limit.
    """
    sizes = {"T": T, "H": 3, "I": 2, "J": 4, "E": E, "K": K, "N": T // 3, "L": 3, "C": 4}
    problem = _Problem(device, dtype, ids_dtype, sizes | {"1": 1, "2": 2}, used)
    for concept in (
        *(_gating, _load_balancing, _alignment, _dispatch, _capacity, _activations),
        *(_experts, _layouts, _expert_slicing, _layer, _loss_graph, _gates),
    ):
        concept(problem)
    return problem.calls


CHOSEN = "TK:wide TK:int64"


def _gating(p: _Problem) -> None:
    bias = 0.01 * p.floats("E")
    p.add(gating.route, CHOSEN, logits=p.logits, config=p.routing, bias=bias)
    hashed = {"config": p.hashed, "token_ids": p.token_ids}
    p.add(gating.route, CHOSEN, what="by hash", logits=p.logits, **hashed)
    for score in get_args(Score):
        p.add(gating.scores, "TE:wide", what=score, logits=p.logits, score=score)


def _load_balancing(p: _Problem) -> None:
    for loss in get_args(Loss):
        p.add(
            load_balancing.balance_loss,
            ":wide",
            what=loss,
            logits=p.logits,
            expert_ids=p.some_ids,
            config=BalanceConfig(loss, 0.5, "sigmoid", 0.1, 3, 2 if p.sizes["E"] % 2 == 0 else 1),
            padding_mask=p.mask,
            tokens_per_expert=None if loss in ("gshard", "deepseek_sequence") else 1 + p.counts,
        )
    p.add(
        load_balancing.concatenated_balance_loss,
        ":wide",
        logits=[p.logits, p.apart("TE")],
        expert_ids=[p.ids, p.some_ids],
        config=BalanceConfig("transformers_concatenated"),
        padding_mask=p.mask,
    )
    p.add(load_balancing.z_loss, ":wide", logits=p.logits, padding_mask=p.mask)
    p.add(
        bias_update.update_bias,
        "E:wide",
        differentiable=False,
        bias=p.floats("E"),
        tokens_per_expert=p.counts,
        rate=0.5,
        centred=True,
    )
    function = bias_update.global_counts
    p.add(function, "E:ids", differentiable=False, tokens_per_expert=p.counts)


def _alignment(p: _Problem) -> None:
    T, K, E, C = p.shape("TKEC")
    # M and m entries of the two buffers, O and o blocks in them.
    entries = alignment.buffer_size(T * K, 4, E)
    p.sizes |= {"M": entries, "O": -(-entries // 4), "m": E * C, "o": E}
    for drop in (False, True):
        p.add(
            alignment.align,
            "M:int32 O:int32 1:int32",
            what=f"drop_invalid={drop}",
            differentiable=False,
            expert_ids=p.some_ids,
            block_size=4,
            num_experts=E,
            expert_map=p.expert_map,
            drop_invalid=drop,
        )
    p.add(
        alignment.align_batched,
        "m:int32 o:int32 1:int32",
        differentiable=False,
        tokens_per_expert=p.rows_of_batch,
        max_tokens=C,
        block_size=4,
    )
    p.add(
        alignment.local_ids,
        "TK:int64",
        differentiable=False,
        expert_ids=p.some_ids,
        num_local=E,
        expert_map=p.expert_map,
    )


def _dispatch(p: _Problem) -> None:
    E, C = p.shape("EC")
    returns = "SH:x E:int64 S:int64"
    p.add(dispatch.dispatch, returns, x=p.x, expert_ids=p.some_ids, num_experts=E)
    slots = p.here.flatten().nonzero()[:, 0].to(p.ids_dtype).flip(0)
    p.add(dispatch.combine, "TH:x", rows=p.floats("SH"), slots=slots, weights=p.weights)
    counts = {"tokens_per_expert": p.rows_of_batch}
    p.add(dispatch.batch_rows, "ECH:x", rows=p.floats("QH"), **counts, capacity=C)
    p.add(dispatch.unbatch_rows, "QH:x", rows=p.batch, **counts)
    for function, returns, arguments in (
        (dispatch.count_tokens, "E:int64", {"expert_ids": p.some_ids, "num_experts": E}),
        (dispatch.inclusive_offsets, "E:int32", {"tokens_per_expert": p.counts}),
        (dispatch.inverse_permutation, "E:int64", {"permutation": p.expert_map + 1}),
        (dispatch.rows_in_use, "EC:bool", {**counts, "capacity": C}),
    ):
        p.add(function, returns, differentiable=False, **arguments)


def _capacity(p: _Problem) -> None:
    for policy in get_args(capacity.Policy):
        p.add(
            capacity.drop_to_capacity,
            "TK:x TK:ids",
            what=policy,
            weights=p.apart("TK"),
            expert_ids=p.some_ids,
            num_experts=p.sizes["E"],
            capacity=2,
            policy=policy,
        )


def _activations(p: _Problem) -> None:
    for activation in get_args(Activation):
        config = ExpertsConfig(activation, limit=1.0)
        given = {"pre_activation": 2 * p.floats("TJ"), "config": config}
        p.add(activations.activate, "TI:x", what=activation, computed_in="x", **given)
    [one] = activations.one_by_one(p.shared)
    given = {"x": p.x, "one": one, "config": ExpertsConfig()}
    p.add(activations.feed_forward, "TH:x", computed_in="x", **given)
    p.add(activations.one_by_one, "JH:x HI:x J:x H:x " * p.sizes["E"], experts=p.experts)
    given = {"rows": p.x, "matrix": one.gate_up[:4], "bias": one.gate_up_bias[:4]}
    p.add(activations.product, "TJ:x", computed_in="x", **given)


def _experts(p: _Problem) -> None:
    given = {"x": p.x, "experts": p.experts, "weights": p.weights, "expert_ids": p.some_ids}
    on_input = {"config": ExpertsConfig("swigluoai", weight_on="input")}
    for function in (experts.experts, experts.experts_grouped):
        p.add(function, "TH:x", **given, config=ExpertsConfig())
        p.add(function, "TH:x", what="mapped", **given, **on_input, expert_map=p.expert_map)
    p.add(layer.moe_infer, "TH:x", **given, **on_input)
    p.add(
        experts.experts_batched,
        "ECH:x",
        x=p.batch,
        tokens_per_expert=p.rows_of_batch,
        experts=p.experts,
        config=ExpertsConfig(),
    )
    p.add(
        experts.grouped_product,
        "QJ:x",
        computed_in="x",
        rows=p.floats("QH"),
        matrices=p.experts.gate_up,
        biases=p.experts.gate_up_bias,
        ends=p.rows_of_batch.cumsum(0),
    )
    modules = [torch.nn.Identity(), *[torch.nn.SiLU() for _ in range(1, p.sizes["E"])]]
    given |= {"modules": modules, "config": ExpertsConfig()}
    del given["experts"]
    p.add(wrapping.experts_of_modules, "TH:x", computed_in="x", **given)


CANONICAL = "EJH:x EHI:x EJ:x EH:x"


def _layouts(p: _Problem) -> None:
    layout = layouts.LAYOUTS["gpt-oss"]
    p.add(layouts.from_layout, CANONICAL, layout=layout, **vars(p.experts))
    p.add(layouts.to_layout, CANONICAL, layout=layout, experts=p.experts)
    p.add(layouts.to_separate, "EIH:x EIH:x EHI:x EI:x EI:x EH:x", experts=p.experts)
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    parts = dict(zip(names, layouts.to_separate(p.experts), strict=True))
    p.add(layouts.from_separate, CANONICAL, **parts)
    both = {"gate_up": p.experts.gate_up, "down": p.experts.down}
    p.add(layouts.infer_transposed, "", differentiable=False, **both)


def _expert_slicing(p: _Problem) -> None:
    E = p.sizes["E"]
    single = "1JH:x 1HI:x 1J:x 1H:x"
    p.add(expert_slicing.slice_experts, single, experts=p.experts, start=E - 1, count=1)
    p.add(expert_slicing.take_experts, single, experts=p.experts, held=[E - 1])
    stored = {"scales": p.floats("EH"), "packed": p.rows_of_batch}
    function = expert_slicing.take_tensors
    p.add(function, "1H:x 1:ids", tensors=stored, num_experts=E, held=[E - 1])
    function = expert_slicing.slice_tensor_parallel
    p.add(function, "E2H:x EH1:x E2:x EH:x", experts=p.experts, world_size=2, rank=0)
    p.add(expert_slicing.has_gate, "", differentiable=False, experts=p.experts)
    shares = [expert_slicing.assign_experts(E, 2, rank) for rank in (0, 1)]
    parts = [expert_slicing.slice_experts(p.experts, *share) for share in shares]
    p.add(expert_gathering.gather_experts, CANONICAL, parts=parts)
    parts = [expert_slicing.slice_tensor_parallel(p.experts, 2, rank) for rank in (0, 1)]
    p.add(expert_gathering.gather_tensor_parallel, CANONICAL, parts=parts)


def _layer(p: _Problem) -> None:
    parameters = LayerWeights(
        router=p.floats("EH"),
        experts=p.experts,
        router_bias=p.floats("E"),
        selection_bias=0.1 * p.floats("E"),
        shared=p.shared,
        shared_gate=p.floats("1H"),
    )
    returns = f"NLH:x TK:int64 {CHOSEN.split()[0]} :wide E:int64"
    given = {"x": 2 * p.floats("NLH"), "parameters": parameters, "training": True}
    config = LayerConfig(p.routing, balance=BalanceConfig("gshard", 0.5), shared_scale=0.5)
    mask, token_ids = p.mask.view(p.shape("NL")), p.token_ids.view(p.shape("NL"))
    p.add(layer.layer, returns, **given, config=config, padding_mask=mask)
    hashed = LayerConfig(p.hashed, balance=BalanceConfig("switch"))
    p.add(layer.layer, returns, what="by hash", **given, config=hashed, token_ids=token_ids)
    config = dataclasses.replace(config, router_dtype=None)
    given = {"x": p.x, "parameters": parameters, "config": config}
    p.add(layer.router_logits, "TE:x", **given)
    p.add(layer.shared_expert, "TH:x", computed_in="x", **given)


def _loss_graph(p: _Problem) -> None:
    given = {"output": p.floats("TH"), "loss": p.floats("1").sum()}
    p.add(loss_graph.inject_loss, "TH:x", differentiable=False, **given)
    given |= {"main_loss_scale": 2.0}
    p.add(loss_graph.inject_scaled_loss, "TH:x", differentiable=False, **given)


def _gates(p: _Problem) -> None:
    given = {"output": p.logits, "returns": "logits", "config": p.routing, "bias": p.floats("E")}
    p.add(gates.read_gate, f"{CHOSEN} TE:x", **given)
    p.add(gates.jitter, "TH:x", computed_in="x", differentiable=False, x=p.x, epsilon=0.25)
