"""The conformance suite: point it at an MoE implementation and get a verdict.

An adapter needs three names, and they import neither torch nor hypothesis.
"""

from moe_conformance.target import Capabilities, Target, Unsupported

__all__ = ["Capabilities", "Target", "Unsupported"]
