"""Targets with a planted fault, for the tests that go through the command line."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import torch
from moe_conformance import Capabilities, Target
from moe_conformance.targets import Reference


class BiasedWeights(Reference):
    """Weights are gathered from the scores that the bias was added to."""

    def route(self, logits, config, bias=None, token_ids=None):
        weights, ids = super().route(logits, config, bias, token_ids)
        if bias is not None and config.hash_table is None:
            weights = weights + bias.to(weights.dtype)[ids]
        return weights, ids


class WorkspaceOfTheDefaultDtype(Reference):
    """Logits go through a buffer that is made once for each shape, in torch's default dtype."""

    capabilities = Capabilities(operations=("z_loss",))

    def __init__(self):
        super().__init__()
        self.kept = {}

    def z_loss(self, logits, padding_mask=None):
        buffer = self.kept.setdefault(logits.shape, torch.empty(logits.shape))
        return super().z_loss(logits.to(buffer.dtype).to(logits.dtype), padding_mask)


class LastTokenDropped(Reference):
    """The last token's output is zero."""

    def experts(self, x, experts, weights, expert_ids, config, expert_map=None):
        out = super().experts(x, experts, weights, expert_ids, config, expert_map).clone()
        out[-1:] = 0
        return out


class OneBlockTooMany(Reference):
    """`padded_length` counts one padded block that is not there."""

    def align(self, expert_ids, block_size, num_experts, expert_map=None, drop_invalid=False):
        slots, experts, length = super().align(
            expert_ids, block_size, num_experts, expert_map, drop_invalid
        )
        missing = torch.full((block_size,), expert_ids.numel(), dtype=torch.int32)
        slots = torch.cat([slots[: int(length)], missing, slots[int(length) :]])
        return slots, torch.cat([experts, experts.new_full((1,), -1)]), length + block_size


class GateAndUpSwapped(Reference):
    """The first half of gate_up is taken for up."""

    def experts(self, x, experts, weights, expert_ids, config, expert_map=None):
        if config.gated:
            first, second = experts.gate_up.chunk(2, 1)
            bias = experts.gate_up_bias
            if bias is not None:
                bias = torch.cat(bias.chunk(2, 1)[::-1], 1)
            experts = type(experts)(
                torch.cat([second, first], 1), experts.down, bias, experts.down_bias
            )
        return super().experts(x, experts, weights, expert_ids, config, expert_map)


class AllZeros(Reference):
    """The output of the experts is zero."""

    def experts(self, x, experts, weights, expert_ids, config, expert_map=None):
        return torch.zeros_like(x)


class Nothing(Target):
    """Declares nothing and provides nothing."""

    name, version = "nothing", "0"


class NoDtype(Reference):
    """Provides a router, for no dtype at all."""

    capabilities = Capabilities(dtypes=(), operations=("route",))


class OnlyOneExpert(Reference):
    """Declares so little that no case of EXPERT-12 could fail: no expert can be idle."""

    capabilities = Capabilities(max_experts=1, operations=("experts",), gradients=("experts",))


class _OnNaN(Reference):
    capabilities = Capabilities(operations=("route",))

    def route(self, logits, config, bias=None, token_ids=None):
        if bool(torch.isnan(logits).any()):
            self.misbehave()
        return super().route(logits, config, bias, token_ids)

    def misbehave(self):
        raise RuntimeError("not a number")


class Raises(_OnNaN):
    """Raises on NaN."""


class Exits(_OnNaN):
    """Calls sys.exit on NaN."""

    def misbehave(self):
        sys.exit(0)


class Interrupts(_OnNaN):
    """Raises KeyboardInterrupt on NaN."""

    def misbehave(self):
        raise KeyboardInterrupt


class KillsItself(_OnNaN):
    """Ends its process on NaN."""

    def misbehave(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Segfaults(_OnNaN):
    """Reads from address 0 on NaN."""

    def misbehave(self):
        ctypes.string_at(0)


class Leaks(_OnNaN):
    """Takes memory on NaN until there is none; it is not written to, so that none is used."""

    def misbehave(self):
        kept = []
        while True:
            kept.append(torch.empty(2**30, dtype=torch.uint8))


class LeavesAProcess(_OnNaN):
    """Starts a process that would outlive it, and hangs."""

    def misbehave(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3601)"])
        time.sleep(3600)


class Hangs(_OnNaN):
    """Does not come back on NaN."""

    def misbehave(self):
        time.sleep(3600)


class Prints(_OnNaN):
    """Prints three megabytes of garbage with each call, and is right."""

    capabilities = Capabilities(operations=("route",))

    def route(self, logits, config, bias=None, token_ids=None):
        for _ in range(3):
            os.write(1, bytes(range(256)) * 4096)
        return Reference.route(self, logits, config, bias, token_ids)


class ChangesEverything(_OnNaN):
    """Leaves torch in another state after each call, and is right."""

    def route(self, logits, config, bias=None, token_ids=None):
        routed = Reference.route(self, logits, config, bias, token_ids)
        torch.set_default_dtype(torch.float16)
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)
        return routed


class KeepsTheFirst(Reference):
    """Keeps its answer by the address of the logits, and gives it again for other logits there."""

    def __init__(self):
        self.kept = {}

    def route(self, logits, config, bias=None, token_ids=None):
        place = (logits.data_ptr(), logits.shape, config.top_k)
        if logits.requires_grad:
            return super().route(logits, config, bias, token_ids)
        if place not in self.kept:
            self.kept = {place: super().route(logits, config, bias, token_ids)}
        weights, ids = self.kept[place]
        return weights.clone(), ids.clone()


class Flips(Reference):
    """Every third call is wrong."""

    calls = 0

    def route(self, logits, config, bias=None, token_ids=None):
        weights, ids = super().route(logits, config, bias, token_ids)
        Flips.calls += 1
        return (weights * 2 if Flips.calls % 3 == 0 else weights), ids


class WrongInInference(Reference):
    """Doubles the weights in inference mode."""

    def route(self, logits, config, bias=None, token_ids=None):
        weights, ids = super().route(logits, config, bias, token_ids)
        return (weights * 2 if torch.is_inference_mode_enabled() else weights), ids


class WearsOut(Reference):
    """Right three times, wrong ever after."""

    calls = 0

    def route(self, logits, config, bias=None, token_ids=None):
        weights, ids = super().route(logits, config, bias, token_ids)
        WearsOut.calls += 1
        return (weights * 2 if WearsOut.calls > 3 else weights), ids


class TwiceInFloat8(Reference):
    """What is packed in e4m3 is twice what it is."""

    def dequantize(self, packed):
        return super().dequantize(packed) * (2 if packed.format == "e4m3" else 1)


class CannotBeMade(Reference):
    """Its constructor raises."""

    def __init__(self):
        raise OSError("the library's shared object is missing")


class RightThisTime(Reference):
    """What `BiasedWeights` became when it was mended."""


class WrongThenRaises(BiasedWeights):
    """Wrong in one call, and from the second on it cannot be called at all."""

    calls = 0

    def route(self, logits, config, bias=None, token_ids=None):
        type(self).calls += 1
        if self.calls > 1:
            raise RuntimeError("worn out")
        return super().route(logits, config, bias, token_ids)
