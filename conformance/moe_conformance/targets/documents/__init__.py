"""Five published texts about MoE layers as targets: what the suite says of each.

`documents/<system>` is code of our own that does what a text does, what is wrong in it included;
`docs/documents.md` goes through the texts line by line. Three rules hold for all of them:

- What a text calls and does not show is done right by a stand-in from `moe_reference`, where the
  text says what it is for: an expert, a product of matrices, an exchange of rows.
- An operation that hangs on something which the text never defines is not provided.
- `Capabilities` has a limit only where the text sets one: in a check, a list of names, a default, a
  cast, a view that refuses, a comment on itself. What a text leaves open is drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from moe_conformance.target import Target

CLASSES = {
    "deepseek": "deepseek:DeepSeek",
    "marlin": "marlin:Marlin",
    "tensorcast": "tensorcast:TensorCast",
    "tensorcast-scores": "tensorcast:TensorCastScores",
    "hanzo": "hanzo:Hanzo",
    "hyper-parallel": "hyper_parallel:HyperParallel",
    "hyper-parallel-bfloat16": "hyper_parallel:HyperParallelNarrow",
    "hyper-parallel-grouped_mm": "hyper_parallel:HyperParallelGrouped",
}
"""A second target stands for a second way through the same text."""


def variants() -> dict[str, Callable[[], Target]]:
    """The targets of the documents, by the name of the system.

    >>> list(variants())[:2]
    ['deepseek', 'marlin']
    """
    return {name: partial(_make, where) for name, where in CLASSES.items()}


def _make(where: str) -> Target:
    module, _, name = where.partition(":")
    made: Target = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    return made
