"""The fast versions as operators of torch, in the namespace `moespec`.

An operator is opaque to `torch.compile`, which is what the fast versions need: kernels that are
launched by hand cannot be traced, `grouped_mm` in float32 has no fake implementation (torch 2.13),
and the way of a CPU depends on the ids. Each operator says what shapes come out, with T·K rows
whatever the ids are, so that nothing depends on data and T may change without compiling again.

| operator | what it is |
|---|---|
| `experts_cpu`, `experts_cpu_backward` | those of `experts_cpu` |
| `experts_grouped`, `experts_grouped_backward` | those of `experts_torch` |
| `experts_triton` | `experts_triton` and `experts_decode` |
| `experts_triton_backward` | `experts_backward` |
| `router` | `router.router_logits_triton` |
| `route`, `route_backward` | the kernels of `gating`, counts included |
| `look_up` | the ids of a hash table; it stands in `gating` |
| `balance_loss`, `balance_loss_backward` | the kernels of `load_balancing` |
| `z_loss`, `z_loss_backward`, `update_bias` | likewise |
| `dispatch_triton` | that of `dispatch`, with T·K rows on every device |
| `combine`, `combine_torch`, `combine_triton` | those of `dispatch` |
| `align`, `align_torch`, `align_triton` | those of `alignment` |
| `align_batched`, `align_batched_torch`, `align_batched_triton` | likewise |
| `add_counts` | `counter += tokens_per_expert`, in a compiled backward pass |

Those of packed experts are in `quantized_operators`. Nobody has to call one: in a compiled function
the functions of the concepts do. Those that are `compiling.opaque` have an operator as a stand-in;
experts, layers, hash tables and modules call theirs by name.

Dimension key: T tokens, H hidden size, J rows of gate_up, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from moe_reference.config import BalanceConfig, ExpertsConfig, ExpertWeights, RoutingConfig

from moe_optimized import alignment, dispatch, gating, load_balancing
from moe_optimized.autograd import once
from moe_optimized.compiling import in_eager, make_operator, make_operators, stands_for
from moe_optimized.experts_backward import Needs, run_backward
from moe_optimized.experts_cpu import backward_on_cpu, forward_on_cpu
from moe_optimized.experts_decode import run_without_backward
from moe_optimized.experts_torch import backward_grouped, forward_grouped
from moe_optimized.experts_triton import one_dtype, run_forward, tile_shapes
from moe_optimized.gating_backward import route_gradient
from moe_optimized.router import router_logits_triton

Tensor = torch.Tensor

# What may be None is a length.
_SCHEMA_TYPES = {int: "int", float: "float", bool: "bool", str: "str", type(None): "SymInt?"}


def _fields(config: Any, *without: str) -> dict[str, str]:
    """Each field of a configuration with its type in a schema."""
    names = [field.name for field in fields(config) if field.name not in without]
    return {name: _SCHEMA_TYPES[type(getattr(config, name))] for name in names}


EXPERTS_FIELDS = _fields(ExpertsConfig())
"""The fields of an `ExpertsConfig`, with their types in a schema."""

_ROUTING_FIELDS = _fields(RoutingConfig(top_k=1), "hash_table")
_BALANCE_FIELDS = _fields(BalanceConfig())


def how_experts(config: ExpertsConfig) -> tuple[Any, ...]:
    """The configuration as the operators of the experts take it."""
    return tuple(getattr(config, name) for name in EXPERTS_FIELDS)


def how_route(config: RoutingConfig) -> tuple[Any, ...]:
    """The configuration as the operators of the routing take it; its table goes beside it."""
    return tuple(getattr(config, name) for name in _ROUTING_FIELDS)


def listed(fields_and_types: dict[str, str]) -> str:
    """Fields as they stand in a schema."""
    return ", ".join(f"{kind} {name}" for name, kind in fields_and_types.items())


_EXPERTS = (
    "Tensor x, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor expert_ids, Tensor? expert_map"
)
_FORWARD = f"{_EXPERTS}, ScalarType dtype, bool keep, {listed(EXPERTS_FIELDS)}"
_BACKWARD = f"Tensor grad, Tensor pre, {_EXPERTS}, bool[] needs, {listed(EXPERTS_FIELDS)}"


def _in_torch(run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        expert_ids: Tensor,
        expert_map: Tensor | None,
        dtype: torch.dtype,
        keep: bool,
        *how: Any,
    ) -> tuple[Tensor, Tensor]:
        _check_map(expert_map, down)
        experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
        config = ExpertsConfig(*how)
        return run(x, experts, weights, expert_ids, config, expert_map, dtype, keep)

    return forward


def _in_torch_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    def backward(
        grad: Tensor,
        pre: Tensor,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        expert_ids: Tensor,
        expert_map: Tensor | None,
        needs: Sequence[bool],
        *how: Any,
    ) -> list[Tensor]:
        experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
        config, wanted = ExpertsConfig(*how), Needs(*needs)
        grads = run(grad, x, pre, experts, weights, expert_ids, config, expert_map, wanted)
        return [gradient.contiguous() for gradient in grads if gradient is not None]

    return backward


def _experts_triton(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_ids: Tensor,
    expert_map: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    _check_map(expert_map, down)
    experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    given = (x, experts, weights, expert_ids, ExpertsConfig(*how), expert_map)
    if not keep:
        return run_without_backward(*given, dtype), x.new_empty(0, gate_up.shape[1])
    out, pre, _ = run_forward(*given, None, dtype, True)
    assert pre is not None
    return out, pre


def _experts_triton_backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_ids: Tensor,
    expert_map: Tensor | None,
    needs: Sequence[bool],
    *how: Any,
) -> list[Tensor]:
    experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias)
    # Made again and not kept: how many tiles there are depends on T in steps.
    E, H, I = down.shape
    dtype = one_dtype(x, gate_up, down)[0].dtype
    height = tile_shapes(expert_ids.numel(), E, I, H, dtype).up.m
    tiles = alignment.tile_table(expert_ids, height, E, expert_map)
    grads = run_backward(
        grad, x, pre, experts, weights, tiles, ExpertsConfig(*how), None, Needs(*needs)
    )
    return [gradient.contiguous() for gradient in grads if gradient is not None]


def _check_map(expert_map: Tensor | None, down: Tensor) -> None:
    # Here and not only before the call: a compiled call cannot look at the map.
    if expert_map is not None:
        alignment.check_map(expert_map, down.shape[0])


def _fake_experts(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    expert_ids: Tensor,
    expert_map: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    rows = expert_ids.shape[0] * expert_ids.shape[1] if keep else 0
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, gate_up.shape[1])


def _fake_experts_backward(grad: Tensor, pre: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[:6], arguments[8]
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs, strict=True) if needed]


def _register_experts(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    run = make_operator(name, _FORWARD, "(Tensor out, Tensor pre)", forward)
    run_back = make_operator(f"{name}_backward", _BACKWARD, "Tensor[]", backward)
    run.register_fake(_fake_experts)
    run_back.register_fake(_fake_experts_backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *inputs[:8])
        ctx.how = inputs[10:]
        ctx.mark_non_differentiable(output[1])
        # A gradient of the pre-activation would be [T·K, J] of zeros.
        ctx.set_materialize_grads(False)

    def differentiate_by(run_back: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad[:6]
            found = [None] * 6
            if grad is not None:
                grads = iter(run_back(grad, *ctx.saved_tensors, list(needs), *ctx.how))
                found = [next(grads) if wanted else None for wanted in needs]
            return (*found, *[None] * (4 + len(ctx.how)))

        return differentiate

    run.register_autograd(differentiate_by(run_back), setup_context=setup)
    refusing = once("experts_torch")(differentiate_by(backward))
    _IN_EAGER[run] = forward, in_eager(forward, refusing, setup)
    return run


_IN_EAGER: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""By operator what does the same in calls that are not compiled, without and with a gradient."""

experts_cpu = _register_experts(
    "experts_cpu", _in_torch(forward_on_cpu), _in_torch_backward(backward_on_cpu)
)
experts_grouped = _register_experts(
    "experts_grouped", _in_torch(forward_grouped), _in_torch_backward(backward_grouped)
)
experts_triton = _register_experts("experts_triton", _experts_triton, _experts_triton_backward)


def run_experts(
    operator: Any,
    x: Tensor,
    experts: ExpertWeights,
    weights: Tensor,
    expert_ids: Tensor,
    config: ExpertsConfig,
    expert_map: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Call one of the three operators of the experts, or do what it does where nothing is compiled.

    Args:
        operator: `experts_cpu`, `experts_grouped` or `experts_triton`.
        x: [T, H].
        experts: weights of E experts.
        weights: [T, K].
        expert_ids: [T, K].
        config: how one expert computes.
        expert_map: global ids to local rows, or None.
        dtype: of the result.

    Returns:
        [T, H], differentiable in x, weights and every tensor of `experts`.
    """
    tensors = (x, weights, experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    run = operator if torch.compiler.is_compiling() else _IN_EAGER[operator][keep]
    return run(*tensors, expert_ids, expert_map, dtype, keep, *how_experts(config))[0]


def _route(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    padding_mask: Tensor | None,
    table: Tensor | None,
    ids_dtype: torch.dtype,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    config = RoutingConfig(*how, hash_table=table)
    return gating.route_with_counts_triton(logits, config, bias, token_ids, padding_mask, ids_dtype)


def _fake_route(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    padding_mask: Tensor | None,
    table: Tensor | None,
    ids_dtype: torch.dtype,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    K = RoutingConfig(*how).top_k
    return (
        logits.new_empty((T, K), dtype=torch.float32),
        logits.new_empty((T, K), dtype=ids_dtype),
        logits.new_empty(E, dtype=torch.int64),
    )


def _route_backward(grad: Tensor, logits: Tensor, expert_ids: Tensor, *how: Any) -> Tensor:
    config = RoutingConfig(*how)
    renormalizes, factor = gating._renormalizes(config), gating._factor(config)
    return route_gradient(logits, expert_ids, grad, config, renormalizes, factor)


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.how = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_route(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    found = None if grad is None else route_backward(grad, *ctx.saved_tensors, *ctx.how)
    return (found, *[None] * (5 + len(ctx.how)))


_ROUTE = listed(_ROUTING_FIELDS)
route = make_operator(
    "route",
    "Tensor logits, Tensor? bias, Tensor? token_ids, Tensor? padding_mask, Tensor? table, "
    f"ScalarType ids_dtype, {_ROUTE}",
    "(Tensor weights, Tensor expert_ids, Tensor tokens_per_expert)",
    _route,
)
route_backward = make_operator(
    "route_backward",
    f"Tensor grad, Tensor logits, Tensor expert_ids, {_ROUTE}",
    "Tensor",
    _route_backward,
)
route.register_fake(_fake_route)
route.register_autograd(_differentiate_route, setup_context=_setup_route)
route_backward.register_fake(lambda grad, logits, *_: logits.new_empty(logits.shape))


@stands_for(gating.route_with_counts_triton)
def _route_with_counts(
    logits: Tensor,
    config: RoutingConfig,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor, Tensor]:
    table, how = config.hash_table, how_route(config)
    return route(logits, bias, token_ids, padding_mask, table, ids_dtype, *how)


@stands_for(gating.route_triton)
def _route_alone(
    logits: Tensor,
    config: RoutingConfig,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    return _route_with_counts(logits, config, bias, token_ids, None, ids_dtype)[:2]


def _balance_loss(
    logits: Tensor,
    expert_ids: Tensor,
    padding_mask: Tensor | None,
    tokens_per_expert: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    config = BalanceConfig(*how)
    return load_balancing.balance_forward(
        logits, expert_ids, padding_mask, tokens_per_expert, config
    )


def _fake_balance_loss(
    logits: Tensor,
    expert_ids: Tensor,
    padding_mask: Tensor | None,
    tokens_per_expert: Tensor | None,
    loss: str,
    coefficient: float,
    score: str,
    epsilon: float,
    sequence_length: int | None,
    num_devices: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    L = load_balancing.tokens_per_sequence(T, loss, sequence_length)
    number = logits.new_empty((), dtype=torch.float32)
    return number, number.new_empty(T // max(L, 1), E), torch.empty_like(number)


def _balance_loss_backward(
    grad: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
    pull: Tensor,
    scale: Tensor,
    *how: Any,
) -> Tensor:
    config = BalanceConfig(*how)
    return load_balancing.balance_backward(grad, logits, padding_mask, pull, scale, config)


def _setup_balance_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, padding_mask, _, *ctx.how = inputs
    ctx.save_for_backward(logits, padding_mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_balance_loss(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    saved = ctx.saved_tensors
    found = None if grad is None else balance_loss_backward(grad, *saved, *ctx.how)
    return (found, *[None] * (3 + len(ctx.how)))


_BALANCE = listed(_BALANCE_FIELDS)
balance_loss = make_operator(
    "balance_loss",
    "Tensor logits, Tensor expert_ids, Tensor? padding_mask, Tensor? tokens_per_expert, "
    f"{_BALANCE}",
    "(Tensor loss, Tensor pull, Tensor scale)",
    _balance_loss,
)
balance_loss_backward = make_operator(
    "balance_loss_backward",
    f"Tensor grad, Tensor logits, Tensor? padding_mask, Tensor pull, Tensor scale, {_BALANCE}",
    "Tensor",
    _balance_loss_backward,
)
balance_loss.register_fake(_fake_balance_loss)
balance_loss.register_autograd(_differentiate_balance_loss, setup_context=_setup_balance_loss)
balance_loss_backward.register_fake(lambda grad, logits, *_: logits.new_empty(logits.shape))


@stands_for(load_balancing.balance_loss_triton)
def _balance_loss_alone(
    logits: Tensor,
    expert_ids: Tensor,
    config: BalanceConfig,
    padding_mask: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
) -> Tensor:
    how = (getattr(config, name) for name in _BALANCE_FIELDS)
    return balance_loss(logits, expert_ids, padding_mask, tokens_per_expert, *how)[0]


def _fake_z_loss(logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    number = logits.new_empty((), dtype=torch.float32)
    return number, number.new_empty(logits.shape[0]), torch.empty_like(number)


def _setup_z_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_z_loss(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    return None if grad is None else z_loss_backward(grad, *ctx.saved_tensors), None


z_loss = make_operator(
    "z_loss",
    "Tensor logits, Tensor? padding_mask",
    "(Tensor loss, Tensor logs, Tensor scale)",
    load_balancing.z_forward,
)
z_loss_backward = make_operator(
    "z_loss_backward",
    "Tensor grad, Tensor logits, Tensor? padding_mask, Tensor logs, Tensor scale",
    "Tensor",
    load_balancing.z_backward,
)
z_loss.register_fake(_fake_z_loss)
z_loss.register_autograd(_differentiate_z_loss, setup_context=_setup_z_loss)
z_loss_backward.register_fake(lambda grad, logits, *_: logits.new_empty(logits.shape))


@stands_for(load_balancing.z_loss_triton)
def _z_loss_alone(logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    return z_loss(logits, padding_mask)[0]


update_bias = make_operator(
    "update_bias",
    "Tensor bias, Tensor tokens_per_expert, float rate, bool centred",
    "Tensor",
    load_balancing.update_bias_triton,
)
update_bias.register_fake(lambda bias, *_: bias.new_empty(bias.shape, dtype=torch.float32))


@stands_for(load_balancing.update_bias_triton)
def _update_bias_detached(
    bias: Tensor, tokens_per_expert: Tensor, rate: float, centred: bool
) -> Tensor:
    # An operator without a gradient, asked for one, would raise in the backward pass.
    return update_bias(bias.detach(), tokens_per_expert.detach(), rate, centred)


def _fake_dispatch(
    x: Tensor, expert_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_ids.new_empty(expert_ids.shape[0] * expert_ids.shape[1], dtype=torch.int64)
    rows = x.new_empty(slots.shape[0], x.shape[1])
    return rows, slots.new_empty(num_experts), slots


def _setup_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_dispatch(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    expert_ids, slots = ctx.saved_tensors
    # Each token's sum; its dtype decides that of the sum's result.
    ones = torch.ones(expert_ids.shape, dtype=torch.float32, device=grad.device)
    return combine(grad, slots, ones), None, None


def _dispatch_triton(
    x: Tensor, expert_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, counts, slots = dispatch.dispatch_triton(x, expert_ids, num_experts)
    missing = expert_ids.numel() - rows.shape[0]
    if missing:
        # On a CPU the rows of nobody are left out; here they are, as on a GPU.
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        slots = torch.cat([slots, slots.new_full((missing,), expert_ids.numel())])
    return rows, counts, slots


dispatch_triton = make_operator(
    "dispatch_triton",
    "Tensor x, Tensor expert_ids, int num_experts",
    "(Tensor rows, Tensor tokens_per_expert, Tensor slots)",
    _dispatch_triton,
)
dispatch_triton.register_fake(_fake_dispatch)
dispatch_triton.register_autograd(_differentiate_dispatch, setup_context=_setup_dispatch)
stands_for(dispatch.dispatch_triton)(dispatch_triton)


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_combine(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    rows, slots, weights = ctx.saved_tensors
    T, K = weights.shape
    wide = dispatch.accumulation_dtype(rows)
    known = dispatch.known_slots(slots, T * K).long()
    here = known < T * K
    # A zero behind all, which the rows of nobody read.
    tokens = known // max(K, 1)
    grads = torch.cat([grad.to(wide), grad.new_zeros((1, grad.shape[1]), dtype=wide)])[tokens]
    factors = dispatch.factors_of(weights, known, wide)
    dots = torch.where(here, (grads * rows.to(wide)).sum(1), 0.0)
    to_weights = torch.zeros(T * K + 1, dtype=wide, device=rows.device).scatter(0, known, dots)
    to_rows = torch.where(here[:, None], grads * factors[:, None], 0.0)
    return to_rows.to(rows.dtype), None, to_weights[:-1].view(T, K).to(weights.dtype)


combine, *_ = make_operators(
    dispatch,
    "combine",
    "Tensor rows, Tensor slots, Tensor weights",
    "Tensor",
    lambda rows, slots, weights: rows.new_empty(weights.shape[0], rows.shape[1]),
    (_differentiate_combine, _setup_combine),
)


def _fake_align(
    expert_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    drop_invalid: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    numel = expert_ids.shape[0] * expert_ids.shape[1]
    size = numel + num_experts * (block_size - 1)
    size = torch.sym_min(size, numel * block_size)
    return _int32(expert_ids, size, -(-size // block_size), 1)


def _fake_align_batched(
    tokens_per_expert: Tensor, max_tokens: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = tokens_per_expert.shape[0] * -(-max_tokens // block_size)
    return _int32(tokens_per_expert, blocks * block_size, blocks, 1)


def _int32(like: Tensor, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (like.new_empty(size, dtype=torch.int32) for size in sizes)
    return first, second, third


_ALIGNED = "(Tensor sorted_slots, Tensor block_experts, Tensor padded_length)"
align, *_ = make_operators(
    alignment,
    "align",
    "Tensor expert_ids, int block_size, int num_experts, Tensor? expert_map=None, "
    "bool drop_invalid=False",
    _ALIGNED,
    _fake_align,
)
align_batched, *_ = make_operators(
    alignment,
    "align_batched",
    "Tensor tokens_per_expert, SymInt max_tokens, SymInt block_size",
    _ALIGNED,
    _fake_align_batched,
)


def _differentiate_router(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, router_matrix, bias = ctx.saved_tensors
    wide = grad.to(dispatch.accumulation_dtype(grad))
    to_x = to_router = to_bias = None
    # Autocast would round the factors.
    with dispatch.without_autocast(grad):
        if ctx.needs_input_grad[0]:
            to_x = (wide @ router_matrix.to(ctx.dtype).to(wide.dtype)).to(ctx.dtype).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_router = wide.T @ x.to(ctx.dtype).to(wide.dtype)
            to_router = to_router.to(ctx.dtype).to(router_matrix.dtype)
    if ctx.needs_input_grad[2]:
        to_bias = wide.sum(0).to(ctx.dtype).to(bias.dtype)
    return to_x, to_router, to_bias, None


def _setup_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.dtype = inputs[3]


router = make_operator(
    "router",
    "Tensor x, Tensor router, Tensor? bias, ScalarType dtype",
    "Tensor",
    router_logits_triton,
)
router.register_fake(
    lambda x, router, bias, dtype: x.new_empty((x.shape[0], router.shape[0]), dtype=dtype)
)
router.register_autograd(_differentiate_router, setup_context=_setup_router)
_router_in_eager = in_eager(router_logits_triton, _differentiate_router, _setup_router)


def run_router(x: Tensor, router_matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`router_logits_triton` with a gradient, as an operator where something is compiled."""
    given = x, router_matrix, bias, dtype
    if torch.compiler.is_compiling():
        return router(*given)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[:3])
    return _router_in_eager(*given) if keep else router_logits_triton(*given)


def _add_counts(counter: Tensor, tokens_per_expert: Tensor, grad: Tensor) -> None:
    # The gradient is there for the compiler, which else adds in the forward pass what the backward
    # pass stores: of two forward passes in a row only the second would be counted.
    counter.add_(tokens_per_expert)


add_counts = torch.library.custom_op(
    "moespec::add_counts",
    _add_counts,
    mutates_args=("counter",),
    schema="(Tensor(a!) counter, Tensor tokens_per_expert, Tensor grad) -> ()",
)
add_counts.register_fake(lambda counter, tokens_per_expert, grad: None)
