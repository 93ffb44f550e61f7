"""Experts with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from moe_reference.config import ExpertsConfig, ExpertWeights

from moe_conformance.experts_oracle import local_ids
from moe_conformance.faults import fault
from moe_conformance.targets import Reference

Tensor = torch.Tensor


class Experts(Reference):
    """Experts whose call can be changed on the way in and on the way out."""

    def experts(
        self,
        x: Tensor,
        experts: ExpertWeights,
        weights: Tensor,
        expert_ids: Tensor,
        config: ExpertsConfig,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """Prepare, compute as the reference does, and finish."""
        given = {
            "x": x,
            "experts": experts,
            "weights": weights,
            "expert_ids": expert_ids,
            "config": config,
            "expert_map": expert_map,
        }
        changed = {**given, **self.prepare(**given)}
        return self.finish(Reference.experts(self, **changed), **given)

    def prepare(self, **given: Any) -> dict[str, Any]:
        """What goes in otherwise."""
        return {}

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """Change what comes out."""
        return out


@fault("all-zeros", catches=("EXPERT-01", "EXPERT-02"), thread="aiter #4451")
class AllZeros(Experts):
    """The output is zero."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out * 0


@fault("last-token-dropped", catches=("EXPERT-02", "EXPERT-01"))
class LastTokenDropped(Experts):
    """The last token of a batch that does not fill its tile is not written."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        if len(out) % 16 == 0 or len(out) < 2:
            return out
        return torch.cat([out[:-1], torch.zeros_like(out[-1:])])


@fault("one-percent-too-much", catches=("EXPERT-01",))
class OnePercentTooMuch(Experts):
    """The output is 1 % too large."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out * 1.01


@fault("the-lightest-pair-is-dropped", catches=("EXPERT-01",))
class TheLightestPairIsDropped(Experts):
    """Each token's expert with the smallest weight is left out where K > 2."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        weights = given["weights"]
        if weights.shape[1] < 3:
            return {}
        least = weights == weights.amin(-1, keepdim=True)
        return {"weights": weights.masked_fill(least, 0.0)}


@fault("the-last-column-is-stale", catches=("EXPERT-02",))
class TheLastColumnIsStale(Experts):
    """The last hidden unit of an odd H repeats the one before."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        if out.shape[1] < 3 or out.shape[1] % 2 == 0:
            return out
        return torch.cat([out[:, :-1], out[:, -2:-1]], 1)


@fault("gelu-is-approximated", catches=("EXPERT-03",), thread="vLLM #41574")
class GeluIsApproximated(Experts):
    """`gelu` is the tanh form."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        config = given["config"]
        return (
            {"config": replace(config, activation="gelu_tanh")}
            if config.activation == "gelu"
            else {}
        )


@fault("relu2-is-relu", catches=("EXPERT-03",))
class Relu2IsRelu(Experts):
    """The square is forgotten."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        config = given["config"]
        return (
            {"config": replace(config, activation="relu")} if config.activation == "relu2" else {}
        )


def _halves(experts: ExpertWeights, change: Any) -> ExpertWeights:
    bias = experts.gate_up_bias
    return replace(
        experts,
        gate_up=change(*experts.gate_up.chunk(2, 1)),
        gate_up_bias=None if bias is None else change(*bias.chunk(2, 1)),
    )


@fault("gate-and-up-exchanged", catches=("EXPERT-04",), thread="SGLang #32430")
class GateAndUpExchanged(Experts):
    """The first half of `gate_up` is taken for up."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if not given["config"].gated:
            return {}
        return {"experts": _halves(given["experts"], lambda a, b: torch.cat([b, a], 1))}


@fault("gate-and-up-interleaved", catches=("EXPERT-04",), thread="sonic-moe #45")
class GateAndUpInterleaved(Experts):
    """Even rows are taken for the gate, odd rows for up."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if not given["config"].gated:
            return {}
        rows = torch.arange(given["experts"].gate_up.shape[1])
        order = torch.cat([rows[::2], rows[1::2]])
        return {"experts": _halves(given["experts"], lambda a, b: torch.cat([a, b], 1)[:, order])}


@fault("a-weight-on-the-input-goes-on-the-output", catches=("EXPERT-05",), thread="SGLang #7889")
class AWeightOnTheInputGoesOnTheOutput(Experts):
    """`weight_on` is not read."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"config": replace(given["config"], weight_on="output")}


@fault("a-weight-on-the-input-is-applied-twice", catches=("EXPERT-05",), thread="vLLM #43694")
class AWeightOnTheInputIsAppliedTwice(Experts):
    """x is multiplied by the square of the weight."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        twice = given["config"].weight_on == "input"
        return {"weights": given["weights"] ** 2} if twice else {}


@fault("the-output-bias-is-not-weighted", catches=("EXPERT-06",))
class TheOutputBiasIsNotWeighted(Experts):
    """Each pair adds the output bias with weight 1."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        bias = given["experts"].down_bias
        if bias is None or given["config"].weight_on == "input":
            return out
        local = local_ids(given["expert_ids"], len(bias), given["expert_map"])
        missing = (1 - given["weights"]).masked_fill(local < 0, 0.0)
        return out + (missing[..., None] * bias.float()[local.clamp(min=0)]).sum(1).to(out.dtype)


@fault("the-first-bias-is-left-out", catches=("EXPERT-06",), thread="torchtitan #2258")
class TheFirstBiasIsLeftOut(Experts):
    """The gate and up bias is not added."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"experts": replace(given["experts"], gate_up_bias=None)}


@fault(
    "minus-one-computes-the-last-expert", catches=("EXPERT-07", "EXPERT-17"), thread="vLLM #42034"
)
class MinusOneComputesTheLastExpert(Experts):
    """A negative id indexes from the end."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids, size = given["expert_ids"], len(given["experts"].gate_up)
        if given["expert_map"] is not None:
            return {}
        wrapped = ids.where(ids != -1, torch.full_like(ids, size - 1))
        return {"expert_ids": wrapped, "weights": given["weights"].nan_to_num(1.0)}


@fault("absent-pairs-are-multiplied-by-zero", catches=("EXPERT-07",), thread="transformers #40545")
class AbsentPairsAreMultipliedByZero(Experts):
    """A mask times a NaN weight is NaN."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out + (given["weights"] * 0).sum(-1, keepdim=True).to(out.dtype)


@fault("global-ids-are-taken-as-local", catches=("EXPERT-08",), thread="SGLang #28170")
class GlobalIdsAreTakenAsLocal(Experts):
    """The map is not read."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"expert_map": None}


@fault("a-map-of-minus-one-wraps-around", catches=("EXPERT-08",), thread="vLLM #19590")
class AMapOfMinusOneWrapsAround(Experts):
    """Experts of other ranks are computed by the last local one."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        mapped = given["expert_map"]
        return {} if mapped is None else {"expert_map": mapped.clamp(min=0)}


@fault("equal-ids-count-once", catches=("EXPERT-09",))
class EqualIdsCountOnce(Experts):
    """A mask over experts keeps the last of two equal ids."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        again = (ids[:, :, None] == ids[:, None, :]).triu(1).any(-1)
        return {"weights": given["weights"].masked_fill(again, 0.0)}


@fault("equal-ids-share-the-first-weight", catches=("EXPERT-09",))
class EqualIdsShareTheFirstWeight(Experts):
    """The pair found first lends its weight to all others of the same expert."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids = given["expert_ids"]
        first = (ids[:, :, None] == ids[:, None, :]).float().argmax(-1)
        return {"weights": given["weights"].gather(1, first)}


@fault("zero-tokens-lose-the-hidden-size", catches=("EXPERT-10",), thread="DeepSeek moe_infer")
class ZeroTokensLoseTheHiddenSize(Experts):
    """An empty batch gives a vector of no elements."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out if len(out) else out.flatten()


@fault("zero-tokens-give-a-row", catches=("EXPERT-10",))
class ZeroTokensGiveARow(Experts):
    """A grid of at least one program writes one row."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out if len(out) else out.new_zeros(1, out.shape[1])


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, factor: float) -> Tensor:
        """The tensor as it is."""
        context.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient times the factor."""
        return gradients[0] * context.factor, None


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(tensor, factor)


@fault("the-weights-gradient-is-doubled", catches=("EXPERT-11",), thread="DeepSpeed #5259")
class TheWeightsGradientIsDoubled(Experts):
    """The routing weights get their gradient twice."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"weights": _scaled(given["weights"], 2.0)}


@fault("the-gradient-of-x-forgets-an-expert", catches=("EXPERT-11",))
class TheGradientOfXForgetsAnExpert(Experts):
    """Every second hidden unit gets no gradient where I is odd."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        x = given["x"]
        if given["experts"].down.shape[-1] % 2 == 0:
            return {}
        even = torch.arange(x.shape[1]) % 2 == 0
        return {"x": torch.where(even, x, x.detach())}


@fault("idle-experts-get-no-gradient", catches=("EXPERT-12",), thread="hyper_parallel")
class IdleExpertsGetNoGradient(Experts):
    """The parameters are left out of the graph where an expert is idle."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        weights = given["experts"]
        if len(torch.unique(given["expert_ids"])) == len(weights.gate_up):
            return {}
        return {"experts": replace(weights, down=weights.down.detach())}


@fault("idle-experts-get-what-was-in-memory", catches=("EXPERT-12",), thread="pytorch #154557")
class IdleExpertsGetWhatWasInMemory(Experts):
    """The gradient of an expert without tokens is not zero."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        weights = given["experts"]
        idle = torch.ones(len(weights.down), dtype=torch.bool)
        local = local_ids(given["expert_ids"], len(weights.down), given["expert_map"])
        idle[local[local >= 0]] = False
        down = weights.down[idle]
        return out + (down - down.detach()).sum().to(out.dtype)


@fault("the-gate-is-clamped-on-both-sides", catches=("EXPERT-13",), thread="prime-rl #2365")
class TheGateIsClampedOnBothSides(Experts):
    """The clamp of `swigluoai` has a lower limit for the gate."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out if given["config"].activation != "swigluoai" else _clamped(self, **given)


def _clamped(target: Experts, **given: Any) -> Tensor:
    """The output with the gate's pre-activation clamped below as well, one expert after another."""
    x, weights, config = given["x"], given["experts"], given["config"]
    local = local_ids(given["expert_ids"], len(weights.down), given["expert_map"])
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(len(weights.down)):
        token, k = (local == expert).nonzero(as_tuple=True)
        pre = x[token].double() @ weights.gate_up[expert].double().T
        if weights.gate_up_bias is not None:
            pre = pre + weights.gate_up_bias[expert].double()
        gate, up = pre.chunk(2, -1)
        gate, up = (part.clamp(-config.limit, config.limit) for part in (gate, up))
        y = gate * torch.sigmoid(config.alpha * gate) * (up + 1) @ weights.down[expert].double().T
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert].double()
        out.index_add_(0, token, y * given["weights"][token, k, None].double())
    return out.to(x.dtype)


@fault("the-limit-is-always-seven", catches=("EXPERT-13",), thread="onnxruntime #28738")
class TheLimitIsAlwaysSeven(Experts):
    """The configured limit is not read."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"config": replace(given["config"], limit=7.0)}


@fault("the-limit-is-not-applied", catches=("EXPERT-13",), thread="SGLang #23776")
class TheLimitIsNotApplied(Experts):
    """`swiglu_limit` is silu."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        config = given["config"]
        return (
            {"config": replace(config, activation="silu")}
            if config.activation == "swiglu_limit"
            else {}
        )


@fault("weights-are-clamped-to-one", catches=("EXPERT-14",))
class WeightsAreClampedToOne(Experts):
    """A routing weight above 1 is taken as 1."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        return {"weights": given["weights"].clamp(max=1.0)}


@fault("weights-are-renormalised-again", catches=("EXPERT-14",), thread="TensorCast")
class WeightsAreRenormalisedAgain(Experts):
    """The experts divide the weights by their sum."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        weights = given["weights"]
        return {"weights": weights / weights.sum(-1, keepdim=True)}


class Batched(Reference):
    """`experts_batched` with a change on the way in and out."""

    def experts_batched(
        self, x: Tensor, tokens_per_expert: Tensor, experts: ExpertWeights, config: ExpertsConfig
    ) -> Tensor:
        """Prepare, compute as the reference does, and finish."""
        counts = self.counts(tokens_per_expert, x)
        return self.finish(super().experts_batched(x, counts, experts, config), tokens_per_expert)

    def counts(self, tokens_per_expert: Tensor, x: Tensor) -> Tensor:
        """The counts that are used."""
        return tokens_per_expert

    def finish(self, out: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Change what comes out."""
        return out


@fault("batched-padding-comes-out", catches=("EXPERT-15",), thread="vllm-ascend #9992")
class BatchedPaddingComesOut(Batched):
    """Every row is computed, the padding too."""

    def counts(self, tokens_per_expert: Tensor, x: Tensor) -> Tensor:
        """See the contract."""
        return torch.full_like(tokens_per_expert, x.shape[1])


@fault("batched-experts-lose-their-last-row", catches=("EXPERT-15",), thread="SGLang #30895")
class BatchedExpertsLoseTheirLastRow(Batched):
    """A full expert stops one row early."""

    def counts(self, tokens_per_expert: Tensor, x: Tensor) -> Tensor:
        """See the contract."""
        return tokens_per_expert - (tokens_per_expert == x.shape[1]).to(tokens_per_expert.dtype)


@fault("the-first-expert-is-computed-twice", catches=("EXPERT-16",))
class TheFirstExpertIsComputedTwice(Experts):
    """Pairs of expert 0 are added twice where there are more than two experts."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        if len(given["experts"].gate_up) < 3:
            return {}
        factor = 1.0 + (given["expert_ids"] == 0)
        return {"weights": given["weights"] * factor}


@fault("the-last-expert-uses-the-one-before", catches=("EXPERT-16",))
class TheLastExpertUsesTheOneBefore(Experts):
    """The last expert's weights are read one row early."""

    def prepare(self, **given: Any) -> dict[str, Any]:
        """See the contract."""
        ids, last = given["expert_ids"], len(given["experts"].gate_up) - 1
        return {"expert_ids": ids - ((ids == last) & (last > 0)).to(ids.dtype)}


@fault("tokens-without-experts-are-not-written", catches=("EXPERT-17",), thread="vllm-ascend #9992")
class TokensWithoutExpertsAreNotWritten(Experts):
    """Their rows hold what was in memory."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        local = local_ids(given["expert_ids"], len(given["experts"].gate_up), given["expert_map"])
        return torch.where((local >= 0).any(-1, keepdim=True), out, torch.empty_like(out))


@fault("tokens-without-experts-pass-through", catches=("EXPERT-17",))
class TokensWithoutExpertsPassThrough(Experts):
    """Their rows are x."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        local = local_ids(given["expert_ids"], len(given["experts"].gate_up), given["expert_map"])
        return torch.where((local >= 0).any(-1, keepdim=True), out, given["x"])


@fault("no-tokens-cut-the-graph", catches=("EXPERT-18",), thread="Megatron #4851")
class NoTokensCutTheGraph(Experts):
    """The output has no graph where nothing was routed."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        local = local_ids(given["expert_ids"], len(given["experts"].gate_up), given["expert_map"])
        return out if bool((local >= 0).any()) else out.detach()


@fault("no-tokens-give-gradients-all-the-same", catches=("EXPERT-18",))
class NoTokensGiveGradientsAllTheSame(Experts):
    """A dummy pass over the first token keeps the graph alive, with a gradient that is not zero."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        local = local_ids(given["expert_ids"], len(given["experts"].gate_up), given["expert_map"])
        x = given["x"]
        return out if bool((local >= 0).any()) else out + (x - x.detach()).mean()


def _last_is_broken(experts: ExpertWeights) -> bool:
    return not bool(torch.isfinite(experts.down[-1]).all())


@fault("absent-pairs-are-computed-by-the-last-expert", catches=("EXPERT-19",))
class AbsentPairsAreComputedByTheLastExpert(Experts):
    """Pairs that are not here run through the last expert and are multiplied by 0."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        local = local_ids(given["expert_ids"], len(given["experts"].down), given["expert_map"])
        hit = (local < 0).any(-1, keepdim=True) & _last_is_broken(given["experts"])
        return out.masked_fill(hit, torch.nan)


@fault("every-expert-sees-every-token", catches=("EXPERT-19",))
class EveryExpertSeesEveryToken(Experts):
    """All experts run on all tokens, and a mask of zeros and ones picks from them."""

    def finish(self, out: Tensor, **given: Any) -> Tensor:
        """See the contract."""
        return out * torch.nan if _last_is_broken(given["experts"]) else out
