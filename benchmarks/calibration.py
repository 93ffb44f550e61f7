"""What legal implementations reach: the record behind the limits of `judge.close`.

Every variant of `moe_conformance.variants`, the two of `moe_conformance.mirrored` and the reference
itself run every requirement on what they provide, in each dtype alone; the largest error in
standard deviations, the largest root mean square relative to its limit, the requirements that were
not met, and the share of cases whose bits are not the reference's, are written to
`benchmarks/results/calibration.json` with what they were measured on. Interrupted, the run goes on
where it was.

    python benchmarks/calibration.py [--cases N] [--seed N] [--jobs N] [--only I/N]

`--only 2/7` runs every seventh pair of variant and dtype, from the third on, and writes nothing.
"""

import argparse
import functools
import os
import sys

import torch
from moe_conformance import judge
from moe_conformance.codec import digest, walk
from moe_conformance.executor import InlineExecutor
from moe_conformance.mirrored import InFloat64, Mirrored
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.targets import Reference
from moe_conformance.variants import VARIANTS, variant_target
from record import AROUND, about, resumed, write

DTYPES = ("float32", "bfloat16", "float16")
WHOLE = (Reference, Mirrored, InFloat64)
ACCUSATIONS = ("fail", "crash", "timeout", "warn")


class BesideTheReference(InlineExecutor):
    """Counts the sessions with floating-point output, and those with other bits in it."""

    def __init__(self, target):
        super().__init__(target)
        self.reference = InlineExecutor(Reference())
        self.sessions = self.other_bits = 0

    def run(self, session):
        answers = super().run(session)
        others = self.reference.run(session)
        if _floats(others):
            self.sessions += 1
            self.other_bits += digest(_floats(answers)) != digest(_floats(others))
        return answers


def _floats(answers):
    outputs = [answer.get("outputs") for answer in answers]
    return [t for _, t in walk(outputs) if t.is_floating_point() and t.numel()]


def made(name):
    """The target of that name."""
    for cls in WHOLE:
        if cls.name == name:
            return cls()
    [variant] = [each for each in VARIANTS if each.name == name]
    return variant_target(variant)


def measure(key, cases, seed):
    name, dtype = key.rsplit(": ", 1)
    executor = BesideTheReference(made(name))
    scope = inline_scope(executor, (dtype,))
    row = {"variant": name, "dtype": dtype, "requirements": 0, "cases": 0, "worst_z": 0.0,
           "worst_rms_of_limit": 0.0, "marginal": 0, "inconclusive": 0, "accused": []}  # fmt: skip
    for each in requirements():
        if each.operation != ANY and each.operation not in scope.operations:
            continue
        result = run_requirement(each, scope, executor, Effort(cases, 1, 0), seed)
        row["requirements"] += bool(result.cases)
        row["cases"] += result.cases
        row["worst_z"] = max(row["worst_z"], round(result.worst, 3))
        row["worst_rms_of_limit"] = round(max(row["worst_rms_of_limit"], result.worst_rms), 3)
        row["marginal"] += result.marginal
        row["inconclusive"] += result.status == "inconclusive"
        if result.status in ACCUSATIONS:
            row["accused"].append(f"{each.id}: {result.message}")
    row["other_bits"] = round(executor.other_bits / max(1, executor.sessions), 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=40, help="per variant, requirement and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", help="a part, as 2/7; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= AROUND
    names = [*(variant.name for variant in VARIANTS), *(cls.name for cls in WHOLE)]
    keys = [f"{name}: {dtype}" for name in names for dtype in DTYPES]
    if options.only:
        part, parts = map(int, options.only.split("/"))
        rows = [measure(key, options.cases, options.seed) for key in keys[part::parts]]
    else:
        one = functools.partial(measure, cases=options.cases, seed=options.seed)
        rows = resumed("calibration", keys, one, options.jobs)
    record = {
        "what": "errors of legal implementations in standard deviations, and accusations",
        **about(),
        "around": AROUND,
        "limits": {"pass_z": judge.PASS_Z, "fail_z": judge.FAIL_Z},
        "cases": sum(row["cases"] for row in rows),
        "accused": sum(len(row["accused"]) for row in rows),
        "rows": rows,
    }
    where = "not written" if options.only else write("calibration", record)
    for row in rows:
        for said in row["accused"]:
            print(f"{row['variant']}, {row['dtype']}: {said}")
    print(f"{record['cases']} cases, {record['accused']} accusations: {where}")
    return 0 if not record["accused"] else 1


if __name__ == "__main__":
    sys.exit(main())
