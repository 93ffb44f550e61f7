"""Drawing: boxes in columns and rows as SVG, in the colours of the page.

A picture is a function without arguments that returns `figure(...)`. Its reading, one or two
sentences, is the caption and the text for who cannot see the picture.
"""

import torch

WIDTH, LABEL, CELL, ROW = 760, 168, 72, 34
COLOURS = 4


def figure(height: float, content: str, reading: str) -> str:
    """A picture with its reading."""
    return (
        f'<figure class="picture"><svg viewBox="0 0 {WIDTH} {height + 4}" role="img" '
        f'aria-label="{reading}">{content}</svg><figcaption>{reading}</figcaption></figure>'
    )


def numbers(values, signed=False):
    """Two digits behind the point."""
    return [f"{float(value):{'+' if signed else ''}.2f}" for value in values]


def share(values: torch.Tensor, index: int) -> float:
    """Where a value lies between the least, 0, and the greatest, 1."""
    low, high = float(values.min()), float(values.max())
    return (float(values[index]) - low) / (high - low)


def label(y: float, text: str, style: str = "normal") -> str:
    """The name of the row that begins at y, left of its boxes."""
    return (
        f'<text x="{LABEL - 10}" y="{y + 22}" text-anchor="end" fill="currentColor" '
        f'font-style="{style}">{text}</text>'
    )


def box(
    column: float,
    y: float,
    span: float,
    text: str,
    opacity: float,
    framed: bool = True,
    struck: bool = False,
    marked: bool = False,
    colour: int | None = None,
    cell: float = CELL,
) -> str:
    """A box over `span` columns: shaded by opacity or coloured by number, dashed if struck."""
    x, width = LABEL + column * cell, span * cell - 4
    fill = "fill" if colour is None else f"fill-{colour % COLOURS}"
    line = "var(--picture-mark)" if marked else "var(--picture-line)"
    dash = ' stroke-dasharray="4 3"' if struck else ""
    frame = (
        f'<rect x="{x + 1}" y="{y + 3}" width="{width}" height="{ROW - 6}" rx="3" '
        f'fill="rgba(var(--picture-{fill}),{opacity:.2f})" stroke="{line}" '
        f'stroke-width="{2.5 if marked else 1}"{dash}/>'
    )
    fade = ' opacity="0.55"' if struck else ""
    return (frame if framed else "") + (
        f'<text x="{x + 1 + width / 2}" y="{y + 22}" text-anchor="middle" '
        f'fill="currentColor"{fade}>{text}</text>'
    )
