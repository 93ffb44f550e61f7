"""Pictures of load balancing, drawn from what the reference computes."""

from functools import cache
from typing import get_args

import torch
from moe_reference.bias_update import update_bias
from moe_reference.config import BalanceConfig, Loss, RoutingConfig
from moe_reference.dispatch import count_tokens
from moe_reference.gating import route, scores
from moe_reference.load_balancing import balance_loss, concatenated_balance_loss

from pictures.svg import ROW, box, figure, label, numbers

E, K = 8, 2
ROUTING = RoutingConfig(top_k=K, renormalize=True)
LEANING = (1.6, 0.8, 0.3, 0.0, -0.2, -0.5, -0.8, -1.2)
CELL, LAST = 62, 8.15
BUSY = (1.5, 0.1, 0.0, 0.0, 0.0, -0.1, -0.1, -0.2)
RATE = 0.005
STEPS = (0, 10, 20, 40, 80, 81)
FAR = 30.0
"""A logit that takes all the probability."""


def terms() -> str:
    """Shares and probabilities of two routers, expert by expert, and the loss that they give."""
    parts = [label(0, "expert", "italic")]
    parts += [box(e, 0, 1, str(e), 0.0, framed=False) for e in range(E)]
    y, losses = ROW, []
    for name, lean in (("even", torch.zeros(E)), ("leaning", torch.tensor(LEANING))):
        logits = _noise(256) + lean
        ids = route(logits, ROUTING)[1]
        f = count_tokens(ids, E) / ids.numel()
        P = scores(logits, "softmax").mean(0)
        losses.append(balance_loss(logits, ids, BalanceConfig("switch")).item())
        for text, row in (("share f", f), ("probability P", P), ("E · f · P", E * f * P)):
            parts.append(label(y, f"{name}: {text}"))
            parts += [box(e, y, 1, numbers([row[e]])[0], _dark(row[e])) for e in range(E)]
            y += ROW
        pairs = E * (f[:, None] * P).sum()
        parts.append(label(y, f"{name}: loss"))
        parts.append(box(0, y, 4, f"expert by expert: {losses[-1]:.2f}", 0.0, marked=True))
        parts.append(box(4, y, 4, f"over all pairs: {pairs:.2f}", 0.0, struck=True))
        y += ROW * 1.25
    reading = (
        f"Two routers, {E} experts, {K} per token. The products add up to the loss: "
        f"{losses[0]:.2f} where experts are chosen evenly, {losses[1]:.2f} where the router leans. "
        "Over all pairs of experts the sum is E, whatever the router does."
    )
    return figure(y, "".join(parts), reading)


def losses() -> str:
    """Every loss on four routers."""
    routers = _routers()
    parts = [
        box(column, 0, 1, name, 0.0, framed=False, cell=148) for column, name in enumerate(routers)
    ]
    y = ROW
    for loss in get_args(Loss):
        parts.append(label(y, loss))
        for column, (logits, ids) in enumerate(routers.values()):
            length = len(logits) // 2 if loss in ("gshard", "deepseek_sequence") else None
            devices = 4 if loss == "deepseek_device" else None
            config = BalanceConfig(loss, sequence_length=length, num_devices=devices)
            value = balance_loss(logits, ids, config).item()
            parts.append(box(column, y, 1, f"{value:.2f}", value / 12, cell=148))
        y += ROW
    reading = (
        f"The six losses with coefficient 1 on four routers, {E} experts, {K} per token, two "
        "sequences, four devices. A value can be compared only with values of the same loss. "
        "Where each sequence uses its own half of the experts, only the losses taken per sequence "
        "see it."
    )
    return figure(y, "".join(parts), reading)


def layers() -> str:
    """Four layers that are collapsed, each on its own experts, and what the two ways make of it."""
    config = BalanceConfig("transformers_concatenated")
    T, num_layers = 16, E // K
    all_ids = [torch.tensor([[K * i, K * i + 1]]).expand(T, K) for i in range(num_layers)]
    all_logits = [_only(ids) for ids in all_ids]
    each = [balance_loss(*pair, config).item() for pair in zip(all_logits, all_ids, strict=True)]
    together = concatenated_balance_loss(all_logits, all_ids, config).item()
    parts = [label(0, "expert", "italic")]
    parts += [box(e, 0, 1, str(e), 0.0, framed=False, cell=CELL) for e in range(E)]
    parts.append(box(LAST, 0, 1.3, "loss", 0.0, framed=False, cell=CELL))
    rows = [(f"tokens in layer {i}", ids, each[i]) for i, ids in enumerate(all_ids)]
    rows.append(("all layers as one", torch.cat(all_ids), together))
    for y, (name, ids, loss) in enumerate(rows, 1):
        counts = count_tokens(ids, E)
        parts.append(label(y * ROW, name))
        for e, count in enumerate(counts.tolist()):
            parts.append(box(e, y * ROW, 1, str(count), 0.7 * count / T, cell=CELL))
        parts.append(box(LAST, y * ROW, 1.3, f"{loss:.2f}", 0.0, marked=True, cell=CELL))
    reading = (
        f"{num_layers} layers, each with all {T} tokens on two experts of its own. Each layer's "
        f"loss is {each[0]:.2f}. Concatenated, the counts are even, and the loss is that of a "
        f"balanced router, {together:.2f}."
    )
    return figure((len(rows) + 1) * ROW, "".join(parts), reading)


def bias() -> str:
    """Counts while the bias is moved, then the bias itself with and without centring."""
    counts, centred = _balanced(True)
    _, drifted = _balanced(False)
    parts = [label(0, "expert", "italic")]
    parts += [box(e, 0, 1, str(e), 0.0, framed=False, cell=CELL) for e in range(E)]
    parts.append(box(LAST, 0, 1.3, "most / mean", 0.0, framed=False, cell=CELL))
    y = ROW
    for step in STEPS:
        row = counts[step]
        ratio = row.max() / row.double().mean()
        parts.append(label(y, f"counts, step {step}"))
        for e, count in enumerate(row.tolist()):
            parts.append(box(e, y, 1, str(count), 0.75 * count / counts[0].max().item(), cell=CELL))
        parts.append(box(LAST, y, 1.3, f"{ratio:.2f}", 0.0, marked=True, cell=CELL))
        y += ROW
    parts.append(box(LAST, y, 1.3, "mean", 0.0, framed=False, cell=CELL))
    y += ROW
    for name, row in (("bias, centred", centred), ("bias, not centred", drifted)):
        parts.append(label(y, name))
        for e, text in enumerate(numbers(row, signed=True)):
            parts.append(box(e, y, 1, text, 0.0, cell=CELL))
        # Rounding leaves a mean of minus zero.
        mean = round(row.mean().item(), 2) + 0.0
        parts.append(box(LAST, y, 1.3, f"{mean:+.2f}", 0.0, marked=True, cell=CELL))
        y += ROW
    ratio = [counts[step].max() / counts[step].double().mean() for step in (0, STEPS[-1])]
    reading = (
        f"One batch, routed again after each step of {RATE}. The busiest expert has {ratio[0]:.2f} "
        f"times the mean count at first and {ratio[1]:.2f} times after {STEPS[-1]} steps. A step "
        "never gets smaller, so the counts go on swinging. Without centring the bias drifts: its "
        f"mean ends at {drifted.mean():+.2f}."
    )
    return figure(y, "".join(parts), reading)


def _noise(T):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def _dark(value):
    return min(0.75, 0.75 * float(value))


def _only(ids):
    """Logits that give all probability to the experts chosen, each the same."""
    return torch.zeros(len(ids), E).scatter(1, ids, FAR)


def _routers():
    """By name: logits and ids of two sequences, one after the other."""
    L = 28
    t = torch.arange(2 * L)
    in_turn = torch.stack([2 * t % E, (2 * t + 1) % E], 1)
    half = torch.stack([2 * t % 4, (2 * t + 1) % 4], 1) + 4 * (t >= L)[:, None]
    half_logits = torch.where((torch.arange(E) >= 4) == (t >= L)[:, None], FAR, 0.0)
    first = torch.stack([torch.zeros_like(t), 1 + t % (E - 1)], 1)
    two = torch.tensor([[0, 1]]).expand(2 * L, K)
    return {
        "all alike": (torch.zeros(2 * L, E), in_turn),
        "two experts only": (_only(two), two),
        "one first choice": (_only(first[:, :1]), first),
        "half per sequence": (half_logits, half),
    }


@cache
def _balanced(centred):
    """Counts before each step, and the bias after the last one."""
    config = RoutingConfig(top_k=K, score="sigmoid", renormalize=True)
    logits = _noise(512) + torch.tensor(BUSY)
    bias_E, counts = torch.zeros(E), []
    for _ in range(STEPS[-1] + 1):
        counts.append(count_tokens(route(logits, config, bias_E)[1], E))
        bias_E = update_bias(bias_E, counts[-1], rate=RATE, centred=centred)
    return counts, bias_E
