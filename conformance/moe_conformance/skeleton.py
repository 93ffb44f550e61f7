"""The file that `moespec init` writes."""

SKELETON = '''"""My MoE layer under the conformance suite: moespec check THIS_FILE:MyMoE"""

import torch
from moe_conformance import Capabilities, Target


class MyMoE(Target):
    name, version = "my-moe", "0.1"
    # What is declared is drawn, up to its limits; a field that is not named may have any value.
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16"),
        routing={
            "score": ("softmax",),
            "order": ("score_then_topk",),
            "norm": ("sum",),
            "epsilon": (0.0,),
            "scale": (1.0,),
            "num_groups": (1,),
            "renormalize_single": (True,),
            "selection_bias": (False,),
            "hash_table": (False,),
        },
        experts={
            "activation": ("silu",),
            "gated": (True,),
            "weight_on": ("output",),
            "bias": (False,),
            "expert_map": (False,),
            "invalid_ids": (False,),
        },
    )

    def route(self, logits, config, bias=None, token_ids=None):
        """logits [T, E] -> weights [T, K] float32, expert_ids [T, K]."""
        scores = logits.float().softmax(-1)
        weights, expert_ids = scores.topk(config.top_k, -1)
        # NaN scores come out of topk in any order, but always as K distinct experts.
        if config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, expert_ids

    def experts(self, x, experts, weights, expert_ids, config, expert_map=None):
        """x [T, H] -> [T, H]; replace the loop by a call of your own kernel."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down)):
            token, k = (expert_ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ gate_up.float().T).chunk(2, -1)
            y = (torch.nn.functional.silu(gate) * up) @ down.float().T
            out.index_add_(0, token, y * weights[token, k, None])
        return out.to(x.dtype)
'''
"""A softmax router and a loop over experts; at most 60 lines, as the guide promises."""
