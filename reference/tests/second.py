"""A second formulation of every concept, in float64 numpy, to hold the reference against.

It shares no code with the reference: one-hot tensors and einsum where the definition is a sum, and
loops over tokens, pairs and experts where it is a choice. It takes arrays and the configurations
(anything with those fields does) and checks nothing. Letters are those of the reference; `hot` is
a one-hot tensor, 1 where a pair goes to an expert.
"""

import math
from collections import namedtuple
from dataclasses import replace
from fractions import Fraction

import numpy as np

Weights = namedtuple("Weights", "gate_up down gate_up_bias down_bias")

_erf = np.vectorize(math.erf, otypes=[float])


def one_hot(ids, size):
    """A 1 in the place of each id along a new last dimension; a row of zeros where it has none."""
    return (np.asarray(ids)[..., None] == np.arange(size)).astype(float)


def _share(counts):
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def round_to(values, dtype):
    """The nearest numbers of a dtype, as float64; of float32 numbers, and ties to even."""
    values = np.asarray(values).astype(np.float32)
    if dtype == "bfloat16":
        # The upper half of a float32: add half of the last digit that stays, cut the rest off.
        bits = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        values = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return (values.astype(np.float16) if dtype == "float16" else values).astype(float)


# gating


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.asarray(x, dtype=float)))


def scores(logits, score):
    logits = np.asarray(logits, dtype=float)
    if score == "sigmoid":
        return sigmoid(logits)
    if score == "sqrtsoftplus":
        with np.errstate(invalid="ignore", over="ignore"):
            # Below -40, log(1 + exp(x)) is exp(x) to the last digit; its root is exp(x / 2), which
            # is still there where exp(x) is 0.
            return np.where(logits < -40, np.exp(logits / 2), np.sqrt(np.logaddexp(0, logits)))
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def descending(values, closed=None):
    """Positions by value: the lowest of equals first, NaN after all numbers, the closed last."""
    nan = np.isnan(values)
    closed = np.zeros_like(nan) if closed is None else closed
    return sorted(
        range(len(values)),
        key=lambda i: (closed[i], nan[i], 0.0 if nan[i] else -values[i], i),
    )


def _closed_experts(selection, config):
    E, G = len(selection), config.num_groups
    group_of = np.arange(E) // (E // G)
    taken = {"max": 1, "top2_sum": 2, "topk_share_sum": config.top_k // config.topk_groups}
    group_scores = []
    for g in range(G):
        members = selection[group_of == g]
        best = descending(members)[: taken[config.group_score]]
        with np.errstate(invalid="ignore"):
            group_scores.append(sum(members[i] for i in best))
    open_groups = descending(np.array(group_scores))[: config.topk_groups]
    return ~np.isin(group_of, open_groups)


def _choose(selection, config):
    closed = np.zeros(len(selection), dtype=bool)
    if config.num_groups > 1:
        closed = _closed_experts(selection, config)
    if config.mask_fill == "zero":
        return descending(np.where(closed, 0.0, selection))[: config.top_k]
    return descending(selection, closed)[: config.top_k]


def _weigh(chosen, config):
    """The weights of one token from the scores of its K experts."""
    divides = config.renormalize and (len(chosen) > 1 or config.renormalize_single)
    scales = config.scale_when == "always" or not divides
    with np.errstate(invalid="ignore", divide="ignore"):
        if divides:
            size = chosen.sum() if config.norm == "sum" else math.sqrt((chosen**2).sum())
            clamps = config.epsilon_mode == "clamp"
            size = np.maximum(size, config.epsilon) if clamps else size + config.epsilon
            chosen = chosen / size
        return chosen * config.scale if scales else chosen


def route(logits, config, bias=None, token_ids=None):
    T, E = logits.shape
    before = config.order == "score_then_topk"
    weights_TK = np.zeros((T, config.top_k))
    ids_TK = np.zeros((T, config.top_k), dtype=int)
    for t in range(T):
        scores_E = scores(logits[t], config.score) if before else logits[t]
        if config.hash_table is not None:
            ids = np.asarray(config.hash_table)[token_ids[t]]
        else:
            ids = _choose(scores_E + (np.zeros(E) if bias is None else bias), config)
        chosen = scores_E[ids] if before else scores(logits[t][ids], config.score)
        weights_TK[t], ids_TK[t] = _weigh(chosen, config), ids
    return weights_TK, ids_TK


# load balancing


def _probabilities(logits, config):
    p = scores(logits, config.score)
    return p if config.score == "softmax" else p / (p.sum(-1, keepdims=True) + config.epsilon)


def _product(hot_TE, p_TE, counts_E=None):
    """E times the sum over experts of f and P, for the tokens given."""
    f = _share(hot_TE.sum(0) if counts_E is None else np.asarray(counts_E, dtype=float))
    return p_TE.shape[1] * np.einsum("e,e->", f, p_TE.mean(0))


def balance_loss(logits, expert_ids, config, padding_mask=None, tokens_per_expert=None):
    T, E = logits.shape
    K = expert_ids.shape[1]
    real = np.ones(T, dtype=bool) if padding_mask is None else np.asarray(padding_mask)
    if not real.any():
        return 0.0
    p_TE = np.full((T, E), np.nan)
    p_TE[real] = _probabilities(logits[real], config)
    hot_TKE = one_hot(expert_ids, E)
    hot_TE = np.einsum("tke->te", hot_TKE)
    if config.loss in ("gshard", "deepseek_sequence"):
        hot_TE = hot_TKE[:, 0] if config.loss == "gshard" else hot_TE
        length = config.sequence_length or T
        sequences = [np.arange(T)[i : i + length] for i in range(0, T, length)]
        sequences = [s[real[s]] for s in sequences if real[s].any()]
        value = np.mean([_product(hot_TE[s], p_TE[s]) for s in sequences])
    elif config.loss == "deepseek_device":
        device_DE = one_hot(np.arange(E) // (E // config.num_devices), config.num_devices).T
        counts = hot_TE[real].sum(0) if tokens_per_expert is None else tokens_per_expert
        # E f is the number that is 1 for every expert when all are alike.
        f_D = np.einsum("de,e->d", device_DE, E * _share(np.asarray(counts, dtype=float)))
        f_D /= device_DE.sum(1)
        value = np.einsum("d,d->", f_D, np.einsum("de,te->d", device_DE, p_TE[real]) / real.sum())
    else:
        value = _product(hot_TE[real], p_TE[real], tokens_per_expert)
        value *= K if config.loss == "transformers_concatenated" else 1
    return config.coefficient * value


def concatenated_balance_loss(logits, expert_ids, config, padding_mask=None):
    mask = None if padding_mask is None else np.tile(padding_mask, len(logits))
    return balance_loss(np.concatenate(logits), np.concatenate(expert_ids), config, mask)


def z_loss(logits, padding_mask=None):
    real = np.ones(len(logits), dtype=bool) if padding_mask is None else np.asarray(padding_mask)
    squares = [np.logaddexp.reduce(row) ** 2 for row in logits[real]]
    return np.mean(squares) if squares else 0.0


def update_bias(bias, tokens_per_expert, rate, centred):
    mean = Fraction(sum(Fraction(float(c)) for c in tokens_per_expert), len(tokens_per_expert))
    signs = [Fraction(float(c)) for c in tokens_per_expert]
    steps = np.array([rate * ((mean > c) - (mean < c)) for c in signs])
    return bias + steps - (steps.mean() if centred else 0.0)


# alignment


def local_ids(expert_ids, num_local, expert_map=None):
    rows = np.arange(num_local) if expert_map is None else np.asarray(expert_map)
    here = (expert_ids >= 0) & (expert_ids < len(rows))
    local = np.full(expert_ids.shape, -1)
    local[here] = np.where(rows[expert_ids[here]] < 0, -1, rows[expert_ids[here]])
    return local


def _blocks(groups, block_size, sentinel):
    """Entries and block labels of (label, entries) groups, each filled up to whole blocks."""
    entries, labels = [], []
    for label, group in groups:
        num_blocks = -(-len(group) // block_size)
        entries += [*group, *[sentinel] * (num_blocks * block_size - len(group))]
        labels += [label] * num_blocks
    return entries, labels


def align(expert_ids, block_size, num_experts, expert_map=None, drop_invalid=False):
    """The part in use: slots, experts of blocks, padded length."""
    slots_of = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(expert_ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    labels = range(num_experts) if expert_map is None else [max(-1, int(r)) for r in expert_map]
    groups = list(zip(labels, slots_of, strict=True))
    if drop_invalid:
        groups = sorted((g for g in groups if g[0] >= 0), key=lambda g: g[0])
    entries, blocks = _blocks(groups, block_size, expert_ids.size)
    return entries, blocks, len(entries)


def align_batched(tokens_per_expert, max_tokens, block_size):
    groups = [
        (e, [e * max_tokens + i for i in range(count)])
        for e, count in enumerate(tokens_per_expert.tolist())
    ]
    entries, blocks = _blocks(groups, block_size, len(tokens_per_expert) * max_tokens)
    return entries, blocks, len(entries)


def choose_block_size(rows_per_expert, block_sizes, fill):
    fitting = [size for size in block_sizes if rows_per_expert < fill * size]
    return (fitting or [block_sizes[-1]])[0]


# dispatch


def dispatch(x, expert_ids, num_experts):
    K = expert_ids.shape[1]
    hot_SE = one_hot(expert_ids.flatten(), num_experts)
    slots = np.array([s for e in range(num_experts) for s in np.flatnonzero(hot_SE[:, e])], int)
    return x[slots // max(K, 1)], hot_SE.sum(0).astype(int), slots


def combine(rows, slots, weights):
    T, K = weights.shape
    out = np.zeros((T, rows.shape[1]))
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot < T * K:
            out[slot // K] += row * weights[slot // K, slot % K]
    return out


def batch_rows(rows, tokens_per_expert, capacity):
    out = np.zeros((len(tokens_per_expert), capacity, rows.shape[1]))
    left = iter(rows)
    for e, count in enumerate(tokens_per_expert):
        for i in range(count):
            out[e, i] = next(left)
    return out


def unbatch_rows(rows, tokens_per_expert):
    used = [rows[e, i] for e, count in enumerate(tokens_per_expert) for i in range(count)]
    return np.array(used).reshape(-1, rows.shape[2])


# capacity


def expert_capacity(num_tokens, top_k, num_experts, factor, minimum=0):
    wanted = math.ceil(Fraction(str(factor)) * num_tokens * top_k / num_experts)
    return min(num_tokens, max(minimum, wanted))


def drop_to_capacity(weights, expert_ids, num_experts, capacity, policy):
    T, K = expert_ids.shape
    pairs = [(t, k) for t in range(T) for k in range(K)]
    if policy == "first_choice":
        pairs = [(t, k) for k in range(K) for t in range(T)]
    elif policy == "probs":
        pairs = [pairs[i] for i in descending(weights.flatten())]
    kept_weights, kept_ids = np.zeros((T, K)), np.full((T, K), -1)
    room = [capacity] * num_experts
    for t, k in pairs:
        expert = expert_ids[t, k]
        if 0 <= expert < num_experts and room[expert] > 0:
            room[expert] -= 1
            kept_weights[t, k], kept_ids[t, k] = weights[t, k], expert
    return kept_weights, kept_ids


# experts


def _of_one_branch(x, activation):
    if activation == "silu":
        return x * sigmoid(x)
    if activation == "gelu":
        return x * (1 + _erf(x / math.sqrt(2))) / 2
    if activation == "gelu_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return np.maximum(x, 0) ** (2 if activation == "relu2" else 1)


def activate(pre_activation, config):
    if not config.gated:
        return _of_one_branch(pre_activation, config.activation)
    gate, up = np.split(pre_activation, 2, axis=-1)
    if config.activation in ("swigluoai", "swiglu_limit"):
        gate, up = np.minimum(gate, config.limit), np.clip(up, -config.limit, config.limit)
        slope, offset = (config.alpha, 1) if config.activation == "swigluoai" else (1, 0)
        return gate * sigmoid(slope * gate) * (up + offset)
    return _of_one_branch(gate, config.activation) * up


def one_expert(x, weights, e, config):
    """What expert e makes of a single row."""
    pre = np.einsum("jh,h->j", weights.gate_up[e], x)
    pre = pre if weights.gate_up_bias is None else pre + weights.gate_up_bias[e]
    out = np.einsum("hi,i->h", weights.down[e], activate(pre, config))
    return out if weights.down_bias is None else out + weights.down_bias[e]


def experts(x, weights, w, expert_ids, config, expert_map=None):
    local = local_ids(expert_ids, len(weights.down), expert_map)
    out = np.zeros(x.shape)
    for t, k in np.ndindex(*local.shape):
        if local[t, k] < 0:
            continue
        if config.weight_on == "input":
            out[t] += one_expert(x[t] * w[t, k], weights, local[t, k], config)
        else:
            out[t] += one_expert(x[t], weights, local[t, k], config) * w[t, k]
    return out


def experts_batched(x, tokens_per_expert, weights, config):
    out = np.zeros(x.shape)
    for e, count in enumerate(tokens_per_expert):
        for i in range(count):
            out[e, i] = one_expert(x[e, i], weights, e, config)
    return out


# layouts


def stored_places(intermediate_size, layout, gated):
    """Where each canonical row of gate_up stands in a layout."""
    width = layout.interleave or intermediate_size
    if not gated:
        return list(range(intermediate_size))
    first = [i // width * 2 * width + i % width for i in range(intermediate_size)]
    second = [place + width for place in first]
    return second + first if layout.up_first else first + second


def from_layout(layout, gate_up, down, gate_up_bias=None, down_bias=None, gated=True):
    if layout.transposed:
        gate_up, down = np.einsum("ehj->ejh", gate_up), np.einsum("eih->ehi", down)
    places = stored_places(down.shape[2], layout, gated)
    biases = None if gate_up_bias is None else gate_up_bias[:, places]
    return Weights(gate_up[:, places], down, biases, down_bias)


# layer


def router_logits(x, router, router_bias, dtype):
    """Everything that goes into the product is rounded, and so is what comes out."""
    x, router, bias = (round_to(a, dtype) for a in (x, router, router_bias))
    return round_to(np.einsum("th,eh->te", x, router) + bias, dtype)


def layer(x, parameters, config, token_ids=None, padding_mask=None):
    """Output, ids, weights, balance loss and counts of a float64 layer."""
    N, L, H = x.shape
    x = x.reshape(N * L, H)
    logits = np.einsum("th,eh->te", x, parameters.router)
    if parameters.router_bias is not None:
        logits = logits + parameters.router_bias
    flat_ids = None if token_ids is None else token_ids.flatten()
    w, ids = route(logits, config.routing, parameters.selection_bias, flat_ids)
    out = experts(x, parameters.experts, w, ids, config.experts)
    if parameters.shared is not None:
        for t in range(N * L):
            gate = 1.0
            if parameters.shared_gate is not None:
                gate = sigmoid(np.einsum("h,h->", parameters.shared_gate[0], x[t]))
            shared = one_expert(x[t], parameters.shared, 0, config.experts)
            out[t] += config.shared_scale * gate * shared
    mask = np.ones(N * L, dtype=bool) if padding_mask is None else padding_mask.flatten()
    loss = None
    if config.balance is not None:
        # GShard and DeepSeek balance each sequence; the layer knows where one ends.
        length = config.balance.sequence_length or L
        loss = balance_loss(logits, ids, replace(config.balance, sequence_length=length), mask)
    counts = np.einsum("t,tke->e", mask.astype(float), one_hot(ids, len(parameters.router)))
    return out.reshape(N, L, H), ids, w, loss, counts.astype(int)


# expert slicing


def assign_experts(num_experts, world_size, rank):
    """Dealt out one by one, each rank's share then put side by side."""
    counts = [0] * world_size
    for e in range(num_experts):
        counts[e % world_size] += 1
    return sum(counts[:rank]), counts[rank]


def take_experts(weights, held):
    rows = np.array(held, dtype=int)
    return Weights(*(None if w is None else w[rows] for w in weights))


def slice_tensor_parallel(weights, world_size, rank, gated):
    I = weights.down.shape[2]
    start, count = assign_experts(I, world_size, rank)
    part = list(range(start, start + count))
    rows = part + [I + i for i in part] if gated else part
    up_bias, down_bias = weights.gate_up_bias, weights.down_bias
    return Weights(
        weights.gate_up[:, rows],
        weights.down[:, :, part],
        None if up_bias is None else up_bias[:, rows],
        None if down_bias is None else down_bias * (rank == 0),
    )
