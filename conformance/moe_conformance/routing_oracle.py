"""What routing has to give, in float64, with how far a float32 answer may be from it.

Dimension key: T tokens, E experts, K experts per token, G groups, M experts per group.

Selection is judged by margins and weights by a bound, both derived from one forward error analysis:
with unit roundoff u, exp of an argument d that was itself computed costs a relative error of at
most (c·|d| + c)·u for the argument's rounding, the range reduction and the function's last digits
(c = 4 covers exp2-based hardware exponentials), a sum of n positive terms at most n·u, a product or
quotient 2u. The weights are judged on the target's own ids, so that a wrong choice is one failure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moe_reference.config import RoutingConfig

from moe_conformance.judge import Violation, within
from moe_conformance.precision import TINY, UNIT

C = 4.0


@dataclass(frozen=True)
class Scored:
    """A value for each expert and a bound on the absolute error a legal answer makes in it."""

    value: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class RoutingOracle:
    """The right routing of one batch of logits.

    Attributes:
        logits: [T, E], float64.
        config: the definition.
        bias: [E] or None, float64.
        token_ids: [T] or None.
        unit: unit roundoff that scores are evaluated with.
        score_unit: unit roundoff of the dtype that scores are kept in, and of all that follows.
        weight_unit: unit roundoff that the final weights may be rounded with.
        tiny: absolute error of a result that underflows.
        logit_error: absolute error of the logits themselves, where the target computed them.
    """

    logits: torch.Tensor
    config: RoutingConfig
    bias: torch.Tensor | None
    token_ids: torch.Tensor | None
    unit: float
    score_unit: float
    weight_unit: float
    tiny: float
    logit_error: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: torch.Tensor,
        config: RoutingConfig,
        bias: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        points: frozenset[str] = frozenset(),
        router_dtype: str | None = None,
        logit_error: torch.Tensor | None = None,
        dtype: str | None = None,
    ) -> RoutingOracle:
        """From the inputs of `route` and what the target declares to round.

        `dtype` is that of the logits, where they are given here in another one.
        """
        dtype = dtype or str(logits.dtype).removeprefix("torch.")
        evaluated = router_dtype or ("float64" if dtype == "float64" else "float32")
        score_dtype = dtype if "router_scores" in points else evaluated
        weight_dtype = dtype if "router_weights" in points else score_dtype
        if router_dtype and UNIT[evaluated] > UNIT[dtype]:
            # The logits are rounded before anything is computed from them.
            cast = UNIT[evaluated] * logits.double().abs()
            cast = cast.where(cast.isfinite(), 0.0)
            logit_error = cast if logit_error is None else logit_error + cast
        # Two float64 evaluations are compared where the target computes in float64 as well.
        twice = 2.0 if evaluated == "float64" else 1.0
        return cls(
            logits.double(),
            config,
            None if bias is None else bias.double(),
            token_ids,
            UNIT[evaluated] * twice,
            UNIT[score_dtype] * twice,
            UNIT[weight_dtype] * twice,
            max(TINY[score_dtype], TINY[weight_dtype]),
            logit_error,
        )

    def scores(self, logits: torch.Tensor, logit_error: torch.Tensor | None = None) -> Scored:
        """The score function, with its error."""
        u = self.unit
        if self.config.score == "softmax":
            distance = logits.amax(-1, keepdim=True) - logits
            value = logits.softmax(-1)
            spread = (value * (C * distance + C)).sum(-1, keepdim=True)
            terms = logits.shape[-1]
            error = value * u * (C * distance + C + spread + terms + 4)
        elif self.config.score == "sigmoid":
            value = logits.sigmoid()
            error = value * u * ((1 - value) * (C * logits.abs() + C) + 4)
        else:
            # F.softplus is the identity above its threshold, and overflows above 709 without one.
            soft = -F.logsigmoid(-logits)
            value = soft.sqrt()
            # softplus(x) = log1p(exp(x)); below 0 its relative error is that of exp(x).
            relative = torch.where(logits < 0, C * logits.abs() + C, C) + 4
            error = value * u * relative
        if logit_error is not None:
            # No score changes faster, relative to itself, than its own logit and the largest other.
            error = error + value * 2 * logit_error.amax(-1, keepdim=True)
        return Scored(value, error + value * self.score_unit + self.tiny)

    def selection(self) -> Scored:
        """What the experts are ranked by, before groups."""
        if self.config.order == "topk_then_score":
            error = self.logit_error
            keys = Scored(self.logits, torch.zeros_like(self.logits) if error is None else error)
        else:
            keys = self.scores(self.logits, self.logit_error)
        if self.bias is None:
            return keys
        biased = keys.value + self.bias
        return Scored(biased, keys.error + self.score_unit * (keys.value.abs() + self.bias.abs()))

    def check_ids(self, ids: torch.Tensor) -> None:
        """Refuse a choice that no rounding within the bounds could have made.

        Raises:
            Violation: naming the token and the expert.
        """
        if self.config.hash_table is not None:
            assert self.token_ids is not None
            self._check_hash(ids)
            return
        must, may = self.certain()
        chosen = torch.zeros_like(may)
        chosen.scatter_(1, ids.long().clamp(0, chosen.shape[1] - 1), True)
        for wrong, verb in ((must & ~chosen, "has to be chosen"), (chosen & ~may, "must not be")):
            if bool(wrong.any()):
                token, expert = (int(i) for i in wrong.nonzero()[0])
                keys = self.selection()
                raise Violation(
                    f"token {token}: expert {expert} {verb}: chosen are "
                    f"{sorted(ids[token].tolist())}, its selection score is "
                    f"{float(keys.value[token, expert]):.6g}",
                    must,
                    ids,
                )

    def certain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, E] masks: experts that have to be chosen, and experts that may be.

        Rows whose groups are too close to call give no certainty either way.
        """
        keys = self.selection()
        top_k, unsure = self.config.top_k, torch.zeros(len(self.logits), dtype=torch.bool)
        value, error = keys.value, keys.error
        open_ = torch.ones_like(value, dtype=torch.bool)
        if self.config.num_groups > 1:
            open_groups, unsure = self._groups(keys)
            open_ = open_groups.repeat_interleave(value.shape[1] // self.config.num_groups, 1)
        if self.config.mask_fill == "zero":
            value, error = value.where(open_, 0.0), error.where(open_, 0.0)
        else:
            value = value.where(open_, -torch.inf)
            error = error.where(open_, 0.0)
        low, high = value - error, value + error
        experts = value.shape[1]
        # Expert i is beaten for certain by those whose lowest key is above its highest, and may be
        # beaten by the others whose highest key is not below its lowest.
        above = experts - torch.searchsorted(low.sort(-1).values, high, right=True)
        rivals = experts - torch.searchsorted(high.sort(-1).values, low) - 1
        must = (rivals < top_k) & ~unsure[:, None]
        may = (above < top_k) | unsure[:, None]
        if self.config.mask_fill == "-inf":
            must, may = must & open_, may & (open_ | unsure[:, None])
        return must, may

    def _groups(self, keys: Scored) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        shape = (len(self.logits), config.num_groups, -1)
        value_TGM, error_TGM = keys.value.reshape(shape), keys.error.reshape(shape)
        best = {"max": 1, "top2_sum": 2, "topk_share_sum": config.top_k // config.topk_groups}
        count = best[config.group_score]
        value = value_TGM.topk(count, -1).values.sum(-1)
        # Any member may enter the sum, so each of its terms is off by the largest error at most.
        error = count * error_TGM.amax(-1) + (count - 1) * self.score_unit * value.abs()
        ranked = value.sort(dim=-1, descending=True, stable=True)
        last = ranked.values[:, config.topk_groups - 1, None]
        open_groups = torch.zeros_like(value, dtype=torch.bool)
        open_groups.scatter_(1, ranked.indices[:, : config.topk_groups], True)
        if config.topk_groups == config.num_groups:
            return open_groups, torch.zeros(len(value), dtype=torch.bool)
        first_out = ranked.values[:, config.topk_groups, None]
        span = error.amax(-1, keepdim=True)
        unsure = (last - first_out <= 2 * span).squeeze(-1)
        return open_groups, unsure

    def _check_hash(self, ids: torch.Tensor) -> None:
        assert self.config.hash_table is not None
        assert self.token_ids is not None
        wanted = self.config.hash_table[self.token_ids.long()].long().sort(-1).values
        wrong = (ids.long().sort(-1).values != wanted).any(-1)
        if bool(wrong.any()):
            token = int(wrong.nonzero()[0])
            raise Violation(
                f"token {token} with id {int(self.token_ids[token])}: expected the experts "
                f"{wanted[token].tolist()} of the table, got {ids[token].tolist()}",
                wanted,
                ids,
            )

    def weights(self, ids: torch.Tensor) -> Scored:
        """The weights [T, K] that belong to these ids."""
        config, u = self.config, self.score_unit
        ids = ids.long()
        if config.order == "topk_then_score":
            error = self.logit_error
            error = None if error is None else error.gather(1, ids)
            chosen = self.scores(self.logits.gather(1, ids), error)
        else:
            every = self.scores(self.logits, self.logit_error)
            chosen = Scored(every.value.gather(1, ids), every.error.gather(1, ids))
        value, error = chosen.value, chosen.error
        top_k = ids.shape[1]
        normed = config.renormalize and (top_k > 1 or config.renormalize_single)
        if normed:
            if config.norm == "sum":
                norm, norm_error = value.sum(-1, keepdim=True), error.sum(-1, keepdim=True)
            else:
                norm = value.square().sum(-1, keepdim=True).sqrt()
                norm_error = (value * error).sum(-1, keepdim=True) / norm.clamp_min(self.tiny)
            if config.epsilon_mode == "add":
                divisor = norm + config.epsilon
            else:
                divisor = norm.clamp_min(config.epsilon)
            # What is off is measured by what the divisor may have been rounded to.
            coarse = divisor.clamp_min(self.tiny)
            relative = norm_error / coarse + (top_k + 4) * u
            error = error / coarse + value / coarse * relative
            value = value / divisor.clamp_min(TINY["float64"])
        if config.scale_when == "always" or not normed:
            value, error = value * config.scale, error * abs(config.scale)
        error = error + value.abs() * (2 * u + self.weight_unit) + self.tiny
        return Scored(value, error)

    def check_weights(self, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Refuse weights that are not those of these ids.

        Raises:
            Violation: naming the token and the choice.
        """
        expected = self.weights(ids)
        within("weights", weights, expected.value, expected.error)
