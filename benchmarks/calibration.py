"""What legal implementations reach: the record behind the limits of `judge.close`.

Every variant of `moe_conformance.variants` runs the statistical requirements on `experts`; the
largest error in standard deviations, and the largest root mean square relative to its limit, are
written to `benchmarks/results/calibration.json` with what they were measured on.

    python benchmarks/calibration.py [--cases N] [--seed N]
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from moe_conformance import judge
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.variants import VARIANTS, variant_target

REQUIREMENTS = ("EXPERT-01", "EXPERT-03", "EXPERT-05", "EXPERT-06", "EXPERT-13", "NUM-12")
OUT = Path(__file__).parent / "results" / "calibration.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="per variant, requirement and dtype")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for variant in VARIANTS:
        executor = InlineExecutor(variant_target(variant))
        for dtype in ("float32", "bfloat16", "float16"):
            scope = inline_scope(executor, (dtype,))
            row = {"variant": variant.name, "dtype": dtype, "cases": 0, "worst_z": 0.0,
                   "worst_rms_of_limit": 0.0, "marginal": 0, "accused": 0}  # fmt: skip
            for id in REQUIREMENTS:
                result = run_requirement(
                    requirement_named(id),
                    scope,
                    executor,
                    Effort(options.cases, 1, 0.0),
                    options.seed,
                )
                row["cases"] += result.cases
                row["worst_z"] = max(row["worst_z"], round(result.worst, 3))
                row["worst_rms_of_limit"] = round(
                    max(row["worst_rms_of_limit"], result.worst_rms), 3
                )
                row["marginal"] += result.marginal
                row["accused"] += result.failure is not None
            rows.append(row)
            print(row, file=sys.stderr)
    record = {
        "what": "errors of legal variants of `experts`, in standard deviations",
        "limits": {"pass_z": judge.PASS_Z, "fail_z": judge.FAIL_Z},
        "cases": sum(row["cases"] for row in rows),
        "accused": sum(row["accused"] for row in rows),
        "rows": rows,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
        },
    }
    OUT.parent.mkdir(exist_ok=True)
    beside = OUT.with_suffix(".new")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(OUT)
    print(f"{record['cases']} cases, {record['accused']} accused: {OUT}")
    return 0 if not record["accused"] else 1


if __name__ == "__main__":
    sys.exit(main())
