"""The experts on this CPU, forward and backward, beside what people use: benchmarks/results/.

python benchmarks/cpu_experts.py [--tokens 512 4096] [--rounds 15] [--operation forward|training]

Each round runs every implementation once, in an order drawn anew; a ratio is that of two
times of a round. Outputs and all gradients are compared before anything is timed. What torch
allocates is counted in a call of its own.
"""

import argparse
import os
import statistics
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from memory import kept_at_most, kept_bytes, peak_bytes
from moe_optimized.experts import experts
from moe_reference.config import ExpertsConfig, ExpertWeights
from record import about, write
from timing import CpuClock, interleaved, quartiles
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

H, I, E, K = 512, 1024, 16, 2
BACKENDS = ("eager", "batched_mm", "grouped_mm")
TOLERANCE = 2e-5
"""Of the greatest value: sums of up to 1024 float32 numbers in another order."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operation", choices=("training", "forward"), default="training")
    options = parser.parse_args()
    record = {
        **about(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "threads": torch.get_num_threads(),
        "sizes": {"H": H, "I": I, "E": E, "K": K, "dtype": "float32"},
        "operation": options.operation,
        "rounds": options.rounds,
        "tolerance": TOLERANCE,
        "rows": [measure(tokens, options) for tokens in options.tokens],
    }
    print(write(f"cpu_experts_{options.operation}", record))
    return 0


def measure(tokens, options):
    """Median times, and of each peer's time over ours, round by round; and the memory taken."""
    training = options.operation == "training"
    given = draw(tokens, training)
    forwards, absent = implementations(given)
    runs = {name: with_gradients(forward, given) for name, forward in forwards.items()}
    results = {name: run() for name, run in runs.items()}
    differences = compare(results)
    result_bytes = sum(each.nbytes for each in results["moespec"])
    # Their memory is not to be in the way of what is timed.
    del results
    load = os.getloadavg()[0]
    times = interleaved(runs, lambda run: CpuClock().measure(run, "cpu"), options.rounds)
    row = {
        "tokens": tokens,
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "absent": absent,
        "result_bytes": result_bytes,
        "implementations": {},
    }
    if training:
        row["kept_at_most"] = kept_at_most(tokens, H, I, E, K, given[0][0].element_size())
    for name, taken in times.items():
        ratios = [theirs / ours for theirs, ours in zip(taken, times["moespec"], strict=True)]
        low, middle, high = quartiles(ratios)
        row["implementations"][name] = {
            "milliseconds": round(1e3 * statistics.median(taken), 2),
            "fastest_milliseconds": round(1e3 * min(taken), 2),
            "ratio_to_ours": round(middle, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "difference": differences[name],
            "peak_bytes": peak_bytes(runs[name], "cpu"),
        }
        if training:
            kept = kept_bytes(forwards[name], given[0][2:])
            row["implementations"][name]["kept_bytes"] = kept
    fastest = min(r["ratio_to_ours"] for n, r in row["implementations"].items() if n != "moespec")
    row["fastest_peer_over_ours"] = fastest
    print(row, file=sys.stderr, flush=True)
    return row


def draw(tokens, training):
    torch.manual_seed(0)
    gate_up, down = 0.05 * torch.randn(E, 2 * I, H), 0.05 * torch.randn(E, H, I)
    weights, ids = torch.randn(tokens, E).softmax(-1).topk(K)
    leaves = [torch.randn(tokens, H), weights.clone(), gate_up, down]
    if training:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    return leaves, ids, torch.randn(tokens, H)


def implementations(given):
    """Each as a function that returns its output; and what is absent, and why."""
    (x, weights, gate_up, down), ids, _ = given
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
    module = MixtralExperts(config)
    # The parameters themselves: gradients come back for the same tensors.
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = gate_up, down

    def transformers(name):
        def forward():
            config._experts_implementation = name
            return module(x, ids, weights)

        return forward

    def loop():
        out = torch.zeros_like(x)
        for e, (one_gate_up, one_down) in enumerate(
            zip(gate_up.unbind(), down.unbind(), strict=True)
        ):
            tokens, ks = torch.where(ids == e)
            gate, up = F.linear(x[tokens], one_gate_up).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, one_down) * weights[tokens, ks, None]
            out = out.index_add(0, tokens, rows)
        return out

    runs = {
        "moespec": lambda: experts(x, ExpertWeights(gate_up, down), weights, ids, ExpertsConfig()),
        "loop": loop,
    }
    absent = {}
    # Every pair has a copy of its expert, and a gradient of it.
    needed = ids.numel() * 3 * I * H * 4 * (3 if x.requires_grad else 1)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in BACKENDS:
        if name == "batched_mm" and needed > free / 2:
            gigabytes = f"{needed / 1e9:.0f} GB, more than half of the {free / 1e9:.0f} GB"
            absent[name] = f"takes about {gigabytes} that are free"
        else:
            runs[name] = transformers(name)
    return runs, absent


def with_gradients(forward, given):
    """A function that returns the output of `forward`, and the gradients if there are any."""
    leaves, _, cotangent = given

    def run():
        out = forward()
        gradients = torch.autograd.grad(out, leaves, cotangent) if out.requires_grad else ()
        return out.detach(), *gradients

    return run


def compare(results):
    """The greatest difference from ours of any output or gradient, over its greatest value."""
    found = {}
    for name, tensors in results.items():
        pairs = zip(tensors, results["moespec"], strict=True)
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if not found[name] <= TOLERANCE:
            raise SystemExit(
                f"{name}: off by {found[name]} of the greatest value; nothing is timed"
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
