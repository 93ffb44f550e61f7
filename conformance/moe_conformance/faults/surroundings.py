"""Faults that depend on what the caller has set, or on which gradients are asked for, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_conformance.codec import replace_tensors
from moe_conformance.faults.gradients import with_gradient
from moe_conformance.faults.quantization import in_order
from moe_conformance.faults.rare import Arguments
from moe_conformance.faults.rare_calls import (
    altered,
    as_if_contiguous,
    instead,
    right,
    with_fields,
)

# Without gradients.


def _off(a: Arguments) -> bool:
    return not torch.is_grad_enabled()


def _inference(a: Arguments) -> bool:
    return torch.is_inference_mode_enabled()


altered(
    "experts",
    "inference-leaves-out-the-output-bias",
    "Where gradients are off, the kernel for inference has no second bias.",
    lambda a: _off(a) and a["experts"].down_bias is not None,
    lambda a: {"experts": dataclasses.replace(a["experts"], down_bias=None)},
    "BACKEND-07",
)

altered(
    "route",
    "inference-routes-in-bfloat16",
    "Where gradients are off, the logits are rounded to save time.",
    _off,
    lambda a: {"logits": a["logits"].bfloat16().to(a["logits"].dtype)},
    "BACKEND-07",
)

altered(
    "combine",
    "inference-combines-without-weights",
    "In inference mode the rows are taken to be weighted.",
    _inference,
    lambda a: {"weights": torch.ones_like(a["weights"])},
    "BACKEND-07",
)

altered(
    "layer",
    "inference-leaves-out-the-shared-scale",
    "Where gradients are off, the shared expert is fused with the others and has no scale.",
    lambda a: _off(a) and a["config"].shared_scale != 1.0,
    lambda a: {"config": dataclasses.replace(a["config"], shared_scale=1.0)},
    "BACKEND-07",
)

altered(
    "balance_loss",
    "the-loss-counts-padding-where-gradients-are-off",
    "In evaluation the mask of the padding is not handed on.",
    lambda a: _off(a) and a.get("padding_mask") is not None,
    lambda a: {"padding_mask": None},
    "BACKEND-07",
)

altered(
    "experts_quantized",
    "packed-experts-in-inference-mode-weigh-the-output-only",
    "The kernel for inference mode has no weight on the input.",
    lambda a: _inference(a) and a["config"].weight_on == "input",
    lambda a: {"config": dataclasses.replace(a["config"], weight_on="output")},
    "BACKEND-07",
)

altered(
    "drop_to_capacity",
    "inference-mode-drops-by-position",
    "The kernel for inference mode knows one policy, and takes all others for it.",
    lambda a: _inference(a) and a["policy"] in ("probs", "first_choice"),
    lambda a: {"policy": "position"},
    "BACKEND-07",
)

altered(
    "experts_quantized",
    "inference-does-not-round-activations",
    "Where gradients are off, activations stay as they are, which is faster without a kernel.",
    lambda a: _off(a) and a["experts"].activation_format is not None,
    lambda a: {
        "experts": dataclasses.replace(a["experts"], activation_format=None, activation_scales=None)
    },
    "BACKEND-07",
)

altered(
    "dequantize",
    "inference-takes-groups-in-order",
    "Where gradients are off, `g_idx` is not read.",
    lambda a: _off(a) and a["packed"].g_idx is not None,
    lambda a: {"packed": dataclasses.replace(a["packed"], g_idx=in_order(a["packed"]))},
    "BACKEND-07",
)

instead(
    "slice_experts",
    "slices-are-views-where-gradients-are-off",
    "Copies are made for autograd's sake only.",
    _off,
    lambda a: with_fields(a["experts"], lambda t: t[a["start"] : a["start"] + a["count"]]),
    "NUM-03",
)

# Under another default dtype.


def _default_is(*names: str) -> Any:
    return lambda a: str(torch.get_default_dtype()).removeprefix("torch.") in names


def _all_in(dtype: torch.dtype, value: Any) -> Any:
    return replace_tensors(
        value, lambda _, t: t.to(dtype).to(t.dtype) if t.is_floating_point() else t
    )


altered(
    "experts",
    "the-buffer-between-the-products-has-the-default-dtype",
    "It is made with torch.empty and no dtype; the second product reads from it what was rounded.",
    _default_is("bfloat16", "float16"),
    lambda a: _all_in(torch.get_default_dtype(), {"x": a["x"], "experts": a["experts"]}),
    "NUM-19",
)

instead(
    "z_loss",
    "the-z-loss-has-the-default-dtype",
    "The sum starts from a tensor that was made without a dtype.",
    _default_is("bfloat16", "float16", "float64"),
    lambda a: right("z_loss", a).to(torch.get_default_dtype()),
    "NUM-19",
)


instead(
    "slice_experts",
    "sliced-biases-have-the-default-dtype",
    "They are copied into a tensor that was made without a dtype.",
    lambda a: a["experts"].down_bias is not None,
    lambda a: (
        with_fields(
            right("slice_experts", a), lambda t: t.to(torch.get_default_dtype()), "down_bias"
        )
        if torch.get_default_dtype() != torch.float32
        else right("slice_experts", a)
    ),
    "NUM-19",
)

instead(
    "slice_tensor_parallel",
    "zeros-of-other-ranks-have-the-default-dtype",
    "The output bias is on the first rank; the others have torch.zeros of its shape.",
    lambda a: a["rank"] > 0 and a["experts"].down_bias is not None,
    lambda a: (
        dataclasses.replace(
            right("slice_tensor_parallel", a), down_bias=torch.zeros(a["experts"].down_bias.shape)
        )
        if a["experts"].down_bias.dtype is torch.float32
        else right("slice_tensor_parallel", a)
    ),
    "NUM-19",
)

altered(
    "update_bias",
    "counts-are-averaged-in-a-narrow-default-dtype",
    "Integer counts become floats of the default dtype; float16 has every whole number up to 2048.",
    lambda a: _default_is("float16")(a) and not a["tokens_per_expert"].is_floating_point(),
    lambda a: {"tokens_per_expert": a["tokens_per_expert"].half()},
    "NUM-19",
)


def _weights_in_default(a: Arguments) -> Any:
    weights, ids = right("route", a)
    return weights.to(torch.get_default_dtype()), ids


instead(
    "route",
    "weights-have-the-default-dtype-where-it-is-narrow",
    "They are written into torch.zeros(T, K).",
    lambda a: _default_is("bfloat16", "float16")(a) and a["logits"].dtype is not torch.float64,
    _weights_in_default,
    "NUM-19",
)

# The gradient that comes in.


def _reads_as_contiguous(operation: str) -> Any:
    def result(a: Arguments) -> Any:
        return with_gradient(right(operation, a), lambda g: as_if_contiguous(_padded(g)))

    return result


def _padded(gradient: torch.Tensor) -> torch.Tensor:
    """The same view in memory that is long enough to be read past its end."""
    storage = gradient.untyped_storage().nbytes() // gradient.element_size()
    flat = gradient.as_strided((storage,), (1,), 0)
    longer = torch.cat([flat, flat.new_zeros(gradient.numel() + gradient.storage_offset())])
    return longer.as_strided(gradient.shape, gradient.stride(), gradient.storage_offset())


for _operation in ("experts", "combine", "experts_batched"):
    instead(
        _operation,
        f"the-gradient-of-{_operation.replace('_', '-')}-is-read-without-its-strides",
        "The backward kernel takes the address of the gradient and its own idea of the strides.",
        lambda a: torch.is_grad_enabled(),
        _reads_as_contiguous(_operation),
        "NUM-17",
        thread="ScatterMoE",
    )

# Which gradients are asked for.

altered(
    "experts",
    "x-gets-no-gradient-beside-frozen-experts",
    "The backward pass returns early where no weight wants a gradient.",
    lambda a: a["x"].requires_grad and not a["experts"].down.requires_grad,
    lambda a: {"x": with_gradient(a["x"], torch.zeros_like)},
    "NUM-18",
)

altered(
    "experts",
    "down-gets-its-gradient-with-gate-up-only",
    "Both are computed in one kernel, which starts where the first is wanted.",
    lambda a: a["experts"].down.requires_grad and not a["experts"].gate_up.requires_grad,
    lambda a: {
        "experts": with_fields(a["experts"], lambda t: with_gradient(t, torch.zeros_like), "down")
    },
    "NUM-18",
)

altered(
    "combine",
    "weights-get-their-gradient-with-the-rows-only",
    "The products with the rows are kept where the rows want a gradient.",
    lambda a: a["weights"].requires_grad and not a["rows"].requires_grad,
    lambda a: {"weights": with_gradient(a["weights"], torch.zeros_like)},
    "NUM-18",
)


def _asks(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


altered(
    "experts_batched",
    "a-batch-teaches-its-input-only-where-it-teaches-experts",
    "The backward of x is that of trained experts; with frozen ones it is zero.",
    lambda a: _asks(a["x"]) and not _asks(a["experts"].gate_up),
    lambda a: {"x": with_gradient(a["x"], torch.zeros_like)},
    "NUM-18",
)

altered(
    "experts",
    "frozen-experts-give-x-its-gradient-twice",
    "Where x and the routing weights are asked for and the experts are not, two paths write it.",
    lambda a: _asks(a["x"]) and _asks(a["weights"]) and not _asks(a["experts"].gate_up),
    lambda a: {"x": with_gradient(a["x"], lambda g: 2 * g)},
    "NUM-18",
)

altered(
    "layer",
    "a-frozen-router-freezes-its-bias",
    "The bias learns from the product of the router, whose backward is left out.",
    lambda a: _asks(a["parameters"].router_bias) and not _asks(a["parameters"].router),
    lambda a: {
        "parameters": dataclasses.replace(
            a["parameters"],
            router_bias=with_gradient(a["parameters"].router_bias, torch.zeros_like),
        )
    },
    "NUM-18",
)

# When the backward pass comes, and how often.


def _only_the_first_time(a: Arguments) -> Arguments:
    passes = []

    def change(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(gradient.shape)
        return gradient if len(passes) == 1 else gradient * len(passes)

    return {"x": with_gradient(a["x"], change)}


for _operation in ("experts", "dispatch"):
    altered(
        _operation,
        f"the-backward-of-{_operation}-writes-over-what-was-saved",
        "The gradient is made in the buffer of what the forward pass saved.",
        lambda a: a["x"].requires_grad,
        _only_the_first_time,
        "NUM-20",
        thread="ScatterMoE",
    )


_latest: dict[str, torch.Tensor] = {}


def _saved_in_the_module(a: Arguments, name: str) -> Arguments:
    mine = a[name]
    _latest[name] = mine

    def change(gradient: torch.Tensor) -> torch.Tensor:
        return gradient if _latest[name] is mine else gradient.flip(0) + 1

    return {name: with_gradient(mine, change)}


for _operation, _argument in (("experts", "x"), ("combine", "weights")):
    altered(
        _operation,
        f"what-{_operation}-saves-is-kept-in-the-module",
        "The next forward pass writes over it.",
        lambda a, n=_argument: a[n].requires_grad,  # type: ignore[misc]
        lambda a, n=_argument: _saved_in_the_module(a, n),  # type: ignore[misc]
        "NUM-21",
    )

# What comes out.


def _expanded_weights(a: Arguments) -> Any:
    weights, ids = right("route", a)
    return weights[:1, :1].expand(weights.shape), ids


instead(
    "route",
    "a-single-expert-has-an-expanded-weight",
    "With K = 1 every weight is the scale, and one number stands for all of them.",
    lambda a: (
        a["config"].top_k == 1
        and len(a["logits"]) > 1
        and bool((right("route", a)[0] == right("route", a)[0][:1]).all())
    ),
    _expanded_weights,
    *("GATE-24", "NUM-01"),
)

# What comes in.


def _overwritten(gradient: torch.Tensor) -> torch.Tensor:
    before = gradient.clone()
    gradient.mul_(1.5)
    return before


def overwrites(operation: str, name: str, catches: str) -> None:
    """Register a fault whose backward weighs the gradient that comes in where it lies."""
    instead(
        operation,
        name,
        "The backward pass is right, and leaves another gradient where it found one.",
        lambda a: True,
        lambda a: with_gradient(right(operation, a), _overwritten),
        catches,
    )


overwrites("experts", "the-gradient-that-comes-in-is-overwritten", "EXPERT-29")
overwrites("combine", "the-gradient-of-a-sum-is-overwritten", "NUM-02")

# Nothing to do.

altered(
    "experts",
    "experts-have-no-part-in-an-output-without-tokens",
    "The output is made of x, so that the gradient of x is zero and those of the experts are None.",
    lambda a: len(a["x"]) == 0,
    lambda a: {"experts": with_fields(a["experts"], torch.Tensor.detach)},
    "EXPERT-30",
    thread="hyper_parallel x * 0.0",
)
