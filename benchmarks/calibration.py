"""What legal implementations reach: the record behind the limits of `judge.close`.

Every variant of `moe_conformance.variants` runs the statistical requirements on `experts`; the
largest error in standard deviations, the largest root mean square relative to its limit, and the
share of cases whose bits are not the reference's, are written to
`benchmarks/results/calibration.json` with what they were measured on. Interrupted, the run goes on
where it was.

    python benchmarks/calibration.py [--cases N] [--seed N] [--only I/N]

`--only 2/7` runs every seventh pair of variant and dtype, from the third on, and writes nothing.
"""

import argparse
import sys

import torch
from moe_conformance import judge
from moe_conformance.codec import digest
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.targets import Reference
from moe_conformance.variants import VARIANTS, variant_target
from record import about, resumed, write

REQUIREMENTS = ("EXPERT-01", "EXPERT-03", "EXPERT-05", "EXPERT-06", "EXPERT-13", "NUM-12")
DTYPES = ("float32", "bfloat16", "float16")


class BesideTheReference(InlineExecutor):
    """Counts the sessions in which the bits of an output are not the reference's."""

    def __init__(self, target):
        super().__init__(target)
        self.reference = InlineExecutor(Reference())
        self.sessions = self.other_bits = 0

    def run(self, session):
        answers = super().run(session)
        others = self.reference.run(session)
        self.sessions += 1
        self.other_bits += _bits(answers) != _bits(others)
        return answers


def _bits(answers):
    return digest([answer.get("outputs") for answer in answers])


def measure(key, cases, seed):
    name, dtype = key.split(": ")
    [variant] = [each for each in VARIANTS if each.name == name]
    executor = BesideTheReference(variant_target(variant))
    scope = inline_scope(executor, (dtype,))
    row = {"variant": name, "dtype": dtype, "cases": 0, "worst_z": 0.0,
           "worst_rms_of_limit": 0.0, "marginal": 0, "accused": 0}  # fmt: skip
    for id in REQUIREMENTS:
        result = run_requirement(
            requirement_named(id), scope, executor, Effort(cases, 1, 0), seed
        )
        row["cases"] += result.cases
        row["worst_z"] = max(row["worst_z"], round(result.worst, 3))
        row["worst_rms_of_limit"] = round(max(row["worst_rms_of_limit"], result.worst_rms), 3)
        row["marginal"] += result.marginal
        row["accused"] += result.failure is not None
    row["other_bits"] = round(executor.other_bits / executor.sessions, 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="per variant, requirement and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a part, as 2/7; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = [f"{variant.name}: {dtype}" for variant in VARIANTS for dtype in DTYPES]
    if options.only:
        part, parts = map(int, options.only.split("/"))
        rows = [measure(key, options.cases, options.seed) for key in keys[part::parts]]
    else:
        rows = resumed("calibration", keys, lambda key: measure(key, options.cases, options.seed))
    record = {
        "what": "errors of legal variants of `experts`, in standard deviations",
        **about(),
        "limits": {"pass_z": judge.PASS_Z, "fail_z": judge.FAIL_Z},
        "cases": sum(row["cases"] for row in rows),
        "accused": sum(row["accused"] for row in rows),
        "rows": rows,
    }
    where = "not written" if options.only else write("calibration", record)
    print(f"{record['cases']} cases, {record['accused']} accused: {where}")
    return 0 if not record["accused"] else 1


if __name__ == "__main__":
    sys.exit(main())
