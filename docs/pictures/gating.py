"""Pictures of the pages, drawn as SVG from what the reference computes."""

import torch
from moe_reference.config import RoutingConfig
from moe_reference.gating import route, scores

WIDTH, LABEL, CELL, ROW = 760, 168, 72, 34

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
    share = len(LOGITS) // CONFIG.num_groups
    is_open = [expert // share in open_groups for expert in range(len(LOGITS))]

    rows = [
        ("expert", [str(expert) for expert in range(len(LOGITS))], None),
        ("logits", _numbers(LOGITS), None),
        ("scores = sigmoid", _numbers(score), score),
        ("+ selection bias", _numbers(BIAS, signed=True), None),
        ("selection scores", _numbers(biased), biased),
    ]
    parts = []
    y = 0
    for label, texts, shade in rows:
        parts.append(_label(y, label, "italic" if label == "expert" else "normal"))
        for column, text in enumerate(texts):
            opacity = 0.0 if shade is None else 0.75 * _share(shade, column)
            parts.append(_box(column, y, 1, text, opacity, framed=label != "expert"))
        y += ROW
    parts.append(_label(y, "group score: best two"))
    for group, value in enumerate(groups.tolist()):
        text = f"{value:.2f} {'open' if group in open_groups else 'closed'}"
        opacity = 0.75 * _share(groups, group) if group in open_groups else 0.0
        parts.append(_box(group * share, y, share, text, opacity, struck=group not in open_groups))
    y += ROW
    parts.append(_label(y, "chosen: top 2 of open"))
    for expert in range(len(LOGITS)):
        text = f"{biased[expert]:.2f}" if is_open[expert] else "closed"
        parts.append(
            _box(expert, y, 1, text, 0.0, struck=not is_open[expert], marked=expert in chosen)
        )
    y += ROW
    parts.append(_label(y, "weights"))
    for expert, weight in chosen.items():
        parts.append(_box(expert, y, 1, f"{weight:.2f}", 0.75 * weight, marked=True))
    y += ROW
    first, second = ids[0].tolist()
    reading = (
        f"One token, {len(LOGITS)} experts in {CONFIG.num_groups} groups, of which "
        f"{CONFIG.topk_groups} stay open. Experts {first} and {second} are chosen by their "
        f"selection scores. Their weights come from the unbiased scores "
        f"{score[first]:.2f} and {score[second]:.2f}, divided by their sum."
    )
    return _figure(y, "".join(parts), reading)


def _figure(height: float, content: str, reading: str) -> str:
    return (
        f'<figure class="picture"><svg viewBox="0 0 {WIDTH} {height + 4}" role="img" '
        f'aria-label="{reading}">{content}</svg><figcaption>{reading}</figcaption></figure>'
    )


def _numbers(values, signed=False):
    return [f"{float(value):{'+' if signed else ''}.2f}" for value in values]


def _share(values: torch.Tensor, index: int) -> float:
    low, high = float(values.min()), float(values.max())
    return (float(values[index]) - low) / (high - low)


def _label(y: float, text: str, style: str = "normal") -> str:
    return (
        f'<text x="{LABEL - 10}" y="{y + 22}" text-anchor="end" fill="currentColor" '
        f'font-style="{style}">{text}</text>'
    )


def _box(
    column: int,
    y: float,
    span: int,
    text: str,
    opacity: float,
    framed: bool = True,
    struck: bool = False,
    marked: bool = False,
) -> str:
    x, width = LABEL + column * CELL, span * CELL - 4
    line = "var(--picture-mark)" if marked else "var(--picture-line)"
    dash = ' stroke-dasharray="4 3"' if struck else ""
    frame = (
        f'<rect x="{x + 1}" y="{y + 3}" width="{width}" height="{ROW - 6}" rx="3" '
        f'fill="rgba(var(--picture-fill),{opacity:.2f})" stroke="{line}" '
        f'stroke-width="{2.5 if marked else 1}"{dash}/>'
    )
    fade = ' opacity="0.55"' if struck else ""
    return (frame if framed else "") + (
        f'<text x="{x + 1 + width / 2}" y="{y + 22}" text-anchor="middle" '
        f'fill="currentColor"{fade}>{text}</text>'
    )
