"""Pictures of gating, drawn from what the reference computes."""

import torch
from moe_reference.config import RoutingConfig
from moe_reference.gating import route, scores

from pictures.svg import ROW, box, figure, label, numbers, share

LOGITS = (-1.2, 0.9, 0.4, 0.6, 1.8, -2.0, -0.3, 0.1)
BIAS = (0.0, -0.25, 0.0, 0.05, -0.1, 0.0, 0.3, 0.1)
CONFIG = RoutingConfig(
    top_k=2, score="sigmoid", renormalize=True, num_groups=4, topk_groups=2, group_score="top2_sum"
)


def one_token() -> str:
    """One token through group-limited gating: every number is what `moe_reference` gives."""
    logits = torch.tensor([LOGITS])
    bias = torch.tensor(BIAS)
    score = scores(logits, CONFIG.score)[0]
    biased = score + bias
    groups = biased.unflatten(0, (CONFIG.num_groups, -1)).sum(-1)
    open_groups = groups.topk(CONFIG.topk_groups).indices.tolist()
    weights, ids = route(logits, CONFIG, bias)
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    size = len(LOGITS) // CONFIG.num_groups
    is_open = [expert // size in open_groups for expert in range(len(LOGITS))]

    rows = [
        ("expert", [str(expert) for expert in range(len(LOGITS))], None),
        ("logits", numbers(LOGITS), None),
        ("scores = sigmoid", numbers(score), score),
        ("+ selection bias", numbers(BIAS, signed=True), None),
        ("selection scores", numbers(biased), biased),
    ]
    parts = []
    y = 0
    for name, texts, shade in rows:
        parts.append(label(y, name, "italic" if name == "expert" else "normal"))
        for column, text in enumerate(texts):
            opacity = 0.0 if shade is None else 0.75 * share(shade, column)
            parts.append(box(column, y, 1, text, opacity, framed=name != "expert"))
        y += ROW
    parts.append(label(y, "group score: best two"))
    for group, value in enumerate(groups.tolist()):
        text = f"{value:.2f} {'open' if group in open_groups else 'closed'}"
        opacity = 0.75 * share(groups, group) if group in open_groups else 0.0
        parts.append(box(group * size, y, size, text, opacity, struck=group not in open_groups))
    y += ROW
    parts.append(label(y, "chosen: top 2 of open"))
    for expert in range(len(LOGITS)):
        text = f"{biased[expert]:.2f}" if is_open[expert] else "closed"
        parts.append(
            box(expert, y, 1, text, 0.0, struck=not is_open[expert], marked=expert in chosen)
        )
    y += ROW
    parts.append(label(y, "weights"))
    for expert, weight in chosen.items():
        parts.append(box(expert, y, 1, f"{weight:.2f}", 0.75 * weight, marked=True))
    y += ROW
    first, second = ids[0].tolist()
    reading = (
        f"One token, {len(LOGITS)} experts in {CONFIG.num_groups} groups, of which "
        f"{CONFIG.topk_groups} stay open. Experts {first} and {second} are chosen by their "
        f"selection scores. Their weights come from the unbiased scores "
        f"{score[first]:.2f} and {score[second]:.2f}, divided by their sum."
    )
    return figure(y, "".join(parts), reading)
