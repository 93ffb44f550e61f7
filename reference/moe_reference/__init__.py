"""The specification of Mixture-of-Experts layers, as plain PyTorch that one can read.

Read the modules in this order: gating, load_balancing, alignment, dispatch, experts, layer,
expert_slicing, expert_parallel, quantization, backends.
"""
