"""Packed experts out of a checkpoint, in the layout of the kernels: made once, while loading.

1. The layout is made where the weights are read, and only it goes to the device: packed weights in
   the layout of the file, and those in the layout of the kernels, are never there together.
2. What comes back is `PreparedExperts`, which `experts_quantized` takes as they are: a call makes
   no layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from moe_reference.checkpoint_parts import Config, Tensors
from moe_reference.families import TensorNames
from moe_reference.gptq_packing import ZeroPoints
from moe_reference.loading import load_and_quantize, load_experts, move
from moe_reference.placeholders import ExpertsPlaceholder
from moe_reference.quantized_tensors import FormatName, QuantizedExperts

from moe_optimized.quantized_layout import PreparedExperts, prepare


def load_prepared_experts(
    tensors: Tensors,
    names: TensorNames,
    prefix: str,
    sizes: ExpertsPlaceholder,
    config: Config | None = None,
    held: Sequence[int] | None = None,
    zero_points: ZeroPoints | None = None,
    round_activations: bool = True,
    *,
    device: torch.device | str = "cpu",
    format: FormatName | None = None,
    **options: Any,
) -> PreparedExperts:
    """One layer's experts, read and laid out for the kernels.

    Args:
        tensors: by name; this and what follows as `load_experts` takes it.
        names: what the family calls them.
        prefix: in front of all of them, with the dot.
        sizes: what the layer must be.
        config: the checkpoint's `quantization_config`, or None.
        held: the experts to load, in that order; None for all.
        zero_points: the convention of GPTQ's; None takes that of `checkpoint_format`.
        round_activations: whether to round activations as the configuration says.
        device: where all parts are in the end.
        format: what float experts become, or None: they are packed in the file.
        options: those of `quantize_experts`, with a format.

    Raises:
        TypeError: as `load_experts`; options without a format; or, with one, what is said of packed
            files: `config`, `zero_points` or `round_activations`.
        ValueError: as `load_experts` and `load_and_quantize`; floats without a format; or a format
            that has no layout.

    >>> one = torch.ones(16, 16)
    >>> stored = {f"experts.0.{product}_proj.weight": one for product in ("gate", "up", "down")}
    >>> given = (stored, TensorNames(), "", ExpertsPlaceholder(1, 16, 16))
    >>> load_prepared_experts(*given, format="uint8b128", group_size=16).down.codes
    'int8'
    """
    if format is not None:
        unread = {"config": config, "zero_points": zero_points}
        named = [name for name, value in unread.items() if value is not None]
        named += [] if round_activations else ["round_activations"]
        if named:
            raise TypeError(
                f"{', '.join(named)}: expected none with a format, which is for float experts, got "
                f"format={format!r}"
            )
        packed = load_and_quantize(tensors, names, prefix, sizes, format, held, "cpu", **options)
        return move(prepare(packed), device)
    if options:
        raise TypeError(f"options: expected none without a format, got {', '.join(options)}")
    loaded = load_experts(
        tensors, names, prefix, sizes, config, held, zero_points, round_activations
    )
    if not isinstance(loaded, QuantizedExperts):
        raise ValueError("tensors: expected packed experts, or a format for them, got floats")
    return move(prepare(loaded), device)
