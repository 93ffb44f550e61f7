"""A model of transformers, with its experts computed by the fast versions."""

from moe_optimized.transformers_experts import use_fast_experts
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("my-model")
use_fast_experts(model)
