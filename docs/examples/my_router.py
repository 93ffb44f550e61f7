"""A sigmoid router with a selection bias, and one mistake in it."""

from moe_conformance import Capabilities, Target


class MyRouter(Target):
    """The router of a model that we want to run."""

    name, version = "my-router", "0.1"
    capabilities = Capabilities(
        routing={
            "score": ("sigmoid",),
            "order": ("score_then_topk",),
            "renormalize": (True,),
            "renormalize_single": (True,),
            "norm": ("sum",),
            "epsilon_mode": ("add",),
            "scale_when": ("always",),
            "num_groups": (1,),
            "hash_table": (False,),
        },
    )

    # --8<-- [start:route]
    def route(self, logits, config, bias=None, token_ids=None):
        """Logits [T, E] to weights [T, K] and expert ids [T, K]."""
        scores = logits.sigmoid()
        if bias is not None:
            scores = scores + bias
        weights, expert_ids = scores.topk(config.top_k)
        weights = weights / (weights.sum(-1, keepdim=True) + config.epsilon)
        return weights * config.scale, expert_ids

    # --8<-- [end:route]
