"""vLLM's experts on a CPU whose weights stay packed: `fused_experts_cpu`, in C++, on AMX tiles.

What is put under test: `CPUExpertsMxfp4` and `CPUExpertsFp8` (vllm/model_executor/layers/fused_moe/
experts/cpu_moe.py), inside `FusedMoEKernel` as in `moe_conformance.targets.vllm_experts`, with what
prepares their weights after loading and the quantisation configs of oracle/mxfp4.py and
oracle/fp8.py. Both multiply bfloat16 rows, so that no activation is rounded to 8 bits.

Nothing is translated but names: the packed bytes and the scales are those of a checkpoint.

Not put under test: `CPUExpertsInt4` and `CPUExpertsInt8` round activations to 8 bits with scales of
their own, and `CPUExpertsFp8W8A8` asks for float8 products that few processors have.

This module imports neither torch nor vllm before a target is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from moe_conformance.target import Capabilities, Unsupported
from moe_conformance.targets.adapter import field_values, refuse, refuse_tensor
from moe_conformance.targets.vllm import VllmTarget
from moe_conformance.targets.vllm_experts import module_of, options_of

if TYPE_CHECKING:
    import torch
    from moe_reference.config import ExpertsConfig
    from moe_reference.quantized_tensors import QuantizedExperts

    Prepared = tuple[torch.Tensor, torch.Tensor, Any]
    """Both matrices as the kernel reads them, and a `FusedMoEQuantConfig`."""

QUANT_KEYS = "vllm.model_executor.layers.quantization.utils.quant_utils"
BLOCK = 128


def _declared(
    format: str, rounding: tuple[str, ...] = (), **quantization: tuple[Any, ...]
) -> Capabilities:
    return Capabilities(
        operations=("experts_quantized",),
        # The kernels read x as bfloat16.
        dtypes=("bfloat16",),
        id_dtypes=("int32",),
        formats=(format,),
        quantization={
            "padding": (False,),
            "g_idx": (False,),
            "mixed": (False,),
            "activation_format": (None,),
            "activation_scales": (False,),
            **quantization,
        },
        experts={
            "activation": ("silu",),
            "gated": (True,),
            "bias": (False,),
            "weight_on": ("output",),
            "expert_map": (False,),
            "invalid_ids": (False,),
        },
        # The width of a tile: `BLOCK_N`.
        hidden_multiple=32,
        intermediate_multiple=32,
        strides=False,
        mixed_dtypes=False,
        # What `fused_experts_fp_kernel_impl` stores between its stages, in x's dtype.
        rounding_points=(
            "pre_activation",
            "activation",
            "expert_output",
            "weighted_output",
            *rounding,
        ),
    )


class PackedExperts(VllmTarget):
    """What the targets of packed experts have in common.

    Raises:
        ImportError: vllm is missing or too old, or the processor has no AMX tiles.
    """

    modules: ClassVar[tuple[str, ...]] = (
        "experts.cpu_moe",
        "modular_kernel",
        "prepare_finalize.no_dp_ep",
    )
    expert_class: ClassVar[str]
    keys: ClassVar[tuple[str, str | None]]
    """Names of the weights' and of the activations' `QuantKey`."""

    def __init__(self) -> None:
        super().__init__()
        import torch

        if not torch.cpu._is_amx_tile_supported():
            raise ImportError(f"{self.name}: the processor has no AMX tiles")

    def experts_quantized(
        self,
        x: torch.Tensor,
        experts: QuantizedExperts,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights are prepared as after loading, and the kernel is applied once."""
        import torch

        E, H, I = experts.down.shape
        self._refuse(x, experts, config, expert_map)
        if not (expert_ids.dtype is torch.int32 and x.is_contiguous()):
            raise Unsupported(f"{self.name}: ids have to be int32, and tokens contiguous")
        settings, modular = module_of("config"), module_of("modular_kernel")
        options = options_of(
            x,
            (E, H, I),
            expert_ids.shape[1],
            config,
            num_experts=E,
            num_logical_experts=E,
            moe_parallel_config=settings.FusedMoEParallelConfig.make_no_parallel(),
        )
        expert_class = getattr(module_of("experts.cpu_moe"), self.expert_class)
        known = importlib.import_module(QUANT_KEYS)
        keys = (None if key is None else getattr(known, key) for key in self.keys)
        standard = modular.FusedMoEActivationFormat.Standard
        supported, reason = expert_class.is_supported_config(expert_class, options, *keys, standard)
        if not supported:
            raise Unsupported(f"{self.name}: {reason}")
        w13, w2, quant_config = self._prepare(experts)
        prepare = module_of("prepare_finalize.no_dp_ep").MoEPrepareAndFinalizeNoDPEPModular()
        kernel = modular.FusedMoEKernel(prepare, expert_class(options, quant_config))
        return kernel.apply(
            hidden_states=x,
            w1=w13,
            w2=w2,
            topk_weights=weights.float(),
            topk_ids=expert_ids,
            activation=options.activation,
            global_num_experts=E,
            expert_map=None,
            apply_router_weight_on_input=False,
        )

    def _refuse(
        self,
        x: torch.Tensor,
        experts: QuantizedExperts,
        config: ExpertsConfig,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Refuse what is not declared."""
        declared = self.capabilities
        refuse_tensor(self, x)
        _, H, I = experts.down.shape
        if H % declared.hidden_multiple or I % declared.intermediate_multiple:
            raise Unsupported(f"{self.name}: no H = {H} with I = {I}")
        if {experts.gate_up.format, experts.down.format} != {*declared.formats}:
            raise Unsupported(f"{self.name}: no {experts.gate_up.format}")
        if experts.activation_format is not None:
            raise Unsupported(f"{self.name}: no activations of {experts.activation_format}")
        biases = (experts.gate_up_bias, experts.down_bias)
        flags = {"bias": biases != (None, None), "expert_map": expert_map is not None}
        refuse(self, "experts", field_values(config) | flags)

    def _prepare(self, experts: QuantizedExperts) -> Prepared:
        raise NotImplementedError


class ExpertsMxfp4(PackedExperts):
    """E2M1 weights with a power of two for each 32 columns, as gpt-oss has them; with silu."""

    name = "vllm/experts-mxfp4"
    capabilities = _declared("mxfp4")
    expert_class = "CPUExpertsMxfp4"
    keys = ("kMxfp4Static", None)

    def _prepare(self, experts: QuantizedExperts) -> Prepared:
        gate_up, down = experts.gate_up, experts.down
        assert gate_up.scales is not None
        assert down.scales is not None
        parts = (gate_up.packed, down.packed, gate_up.scales, down.scales)
        prepare = module_of("experts.cpu_moe").prepare_mxfp4_moe_layer_for_cpu
        w13, w2, *scales = prepare(*(part.contiguous() for part in parts))
        return w13, w2, module_of("config").mxfp4_w4a16_moe_quant_config(*scales)


class ExpertsFp8(PackedExperts):
    """e4m3 weights with a scale for each block of 128 x 128, as DeepSeek-V3 has them."""

    name = "vllm/experts-fp8"
    capabilities = _declared(
        "e4m3",
        # Codes are multiplied by their scale before the product.
        rounding=("unpacked_weights",),
        granularity=("block",),
        group_size=(BLOCK,),
        scale_dtype=("float32",),
    )
    expert_class = "CPUExpertsFp8"
    # Such checkpoints say that activations are float8; this class leaves them as they are.
    keys = ("kFp8Static128BlockSym", "kFp8Dynamic128Sym")

    def _prepare(self, experts: QuantizedExperts) -> Prepared:
        gate_up, down = experts.gate_up, experts.down
        assert gate_up.scales is not None
        assert down.scales is not None
        prepare = module_of("experts.cpu_moe").prepare_fp8_moe_layer_for_cpu
        w13, w2 = prepare(gate_up.packed.contiguous(), down.packed.contiguous())
        scales = (gate_up.scales.contiguous(), down.scales.contiguous())
        config = module_of("config").fp8_w8a16_moe_quant_config
        return w13, w2, config(*scales, block_shape=[BLOCK, BLOCK])


TARGETS: tuple[type[VllmTarget], ...] = (ExpertsMxfp4, ExpertsFp8)
