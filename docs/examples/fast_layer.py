"""An MoE layer of a model, computed by the fast versions and compiled."""

import torch
from moe_optimized.modules import optimize
from moe_reference.config import ExpertWeights, LayerConfig, LayerWeights, RoutingConfig
from moe_reference.modules import MoELayer

E, H, I = 8, 64, 32
experts = ExpertWeights(gate_up=torch.randn(E, 2 * I, H), down=torch.randn(E, H, I))
moe = MoELayer(LayerWeights(torch.randn(E, H), experts), LayerConfig(RoutingConfig(top_k=2)))

optimize(moe)
compiled = torch.compile(moe, fullgraph=True)
compiled(torch.randn(1, 16, H)).output.sum().backward()
