"""The same router without the mistake."""

from my_router import MyRouter


class MendedRouter(MyRouter):
    """Weights are gathered from the unbiased scores."""

    name, version = "my-router", "0.2"

    # --8<-- [start:route]
    def route(self, logits, config, bias=None, token_ids=None):
        """Logits [T, E] to weights [T, K] and expert ids [T, K]."""
        scores = logits.sigmoid()
        selection = scores if bias is None else scores + bias
        expert_ids = selection.topk(config.top_k).indices
        weights = scores.gather(-1, expert_ids)
        weights = weights / (weights.sum(-1, keepdim=True) + config.epsilon)
        return weights * config.scale, expert_ids

    # --8<-- [end:route]
