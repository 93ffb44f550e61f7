"""Requirements on what a caller has set, which no operation may be different for.

What other requirements ask is asked again, in other surroundings.
"""

from __future__ import annotations

from hypothesis import strategies as st

from moe_conformance.case import Case
from moe_conformance.inputs.given import Given, Inputs, Plan, Plans, Scope
from moe_conformance.registry import ANY, MUST, requirement, requirement_named

RIGHT_ANSWERS = {
    "route": ("GATE-04", "GATE-06", "GATE-10", "GATE-14", "GATE-22"),
    "balance_loss": ("BALANCE-01", "BALANCE-08", "BALANCE-13"),
    "z_loss": ("BALANCE-28",),
    "update_bias": ("BALANCE-36",),
    "align": ("ALIGN-01", "ALIGN-09"),
    "align_batched": ("ALIGN-21",),
    "dispatch": ("DISPATCH-01", "DISPATCH-02"),
    "combine": ("DISPATCH-11", "DISPATCH-14"),
    "drop_to_capacity": ("DISPATCH-22",),
    "experts": ("EXPERT-06", "EXPERT-08", "EXPERT-13"),
    "experts_batched": ("EXPERT-15",),
    "layer": ("LAYER-01", "LAYER-02", "LAYER-04", "LAYER-06", "LAYER-11"),
    "slice_experts": ("SLICE-04",),
    "slice_tensor_parallel": ("SLICE-10",),
    "place_experts": ("SLICE-17",),
    "dequantize": ("QUANT-01",),
    "experts_quantized": ("QUANT-14", "QUANT-15", "QUANT-16"),
}
"""Requirements that know an operation's right answer, on inputs of many kinds."""


def asked_again(surroundings: str, values: tuple[str, ...]) -> Given:
    """Inputs of one of `RIGHT_ANSWERS`, in surroundings of which one thing is drawn.

    Args:
        surroundings: what `worker.surroundings` reads.
        values: the values that it may have.
    """

    def plans(scope: Scope) -> Plans | None:
        possible = [
            st.one_of(drawn)
            for ids in RIGHT_ANSWERS.values()
            if (drawn := [each for id in ids if (each := _plans(scope, id)) is not None])
        ]
        if not possible:
            return None
        return st.tuples(st.one_of(possible), st.sampled_from(values)).map(
            lambda drawn: {**drawn[0], surroundings: drawn[1]}
        )

    def build(plan: Plan) -> Inputs:
        rest = {name: v for name, v in plan.items() if name not in ("asked", surroundings)}
        inputs = requirement_named(plan["asked"]).given.build(rest)
        return {**inputs, "asked": plan["asked"], surroundings: plan[surroundings]}

    return Given(plans, build)


def _plans(scope: Scope, id: str) -> Plans | None:
    asked = requirement_named(id)
    if not {asked.operation, *asked.also} <= set(scope.operations):
        return None
    drawn = asked.given.plans(scope)
    return None if drawn is None else drawn.map(lambda plan: {**plan, "asked": id})


def _ask(case: Case, set_to: str) -> None:
    asked = requirement_named(case["asked"])
    case.note(f"{set_to}, operation {asked.operation}")
    asked.check(case)


@requirement(
    "BACKEND-07",
    MUST,
    ANY,
    "Where gradients are off, under `no_grad` and in inference mode, every operation MUST give the "
    "right answer too.",
    reason="Inference has kernels of its own; and tensors made in inference mode have no version "
    "and cannot be kept for a backward pass.",
    sources=("docs/spec/backends.md", "vLLM #16801"),
    # In inference mode gradients are off as well.
    given=asked_again("grad_mode", ("no_grad", *["inference_mode"] * 3)),
    references=("backends.choose_backend",),
)
def the_way_without_gradients_is_right(case: Case) -> None:
    """What another requirement asks, asked again with gradients switched off."""
    _ask(case, case["grad_mode"])


@requirement(
    "NUM-19",
    MUST,
    ANY,
    "Torch's default dtype MUST NOT matter.",
    reason="Servers set it to the dtype of the model while they load it. A buffer that is made "
    "without a dtype is then narrower, or wider, than in any test.",
    sources=("docs/spec/operations.md", "vLLM #16801"),
    given=asked_again("default_dtype", ("bfloat16", "float16", "float64")),
)
def the_default_dtype_does_not_matter(case: Case) -> None:
    """What another requirement asks, asked again under another default dtype."""
    _ask(case, f"default {case['default_dtype']}")
