"""What the suite finds in installed libraries: the record behind docs/findings.md.

python benchmarks/findings.py [--seed N | --report FOLDER]
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from moe_conformance.report import read_report, reports_in
from record import write

BROKEN = ("fail", "crash", "timeout", "inconclusive", "warn")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="of a run that there has been already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.report or Path(made)
        if options.report is None:
            command = ["check", "transformers", "--seed", str(options.seed), "--report", made]
            subprocess.run([sys.executable, "-m", "moe_conformance", *command], check=False)
        reports = [
            report
            for report in reports_in(read_report(folder / "index.json"))
            if report["target"]["name"].startswith("transformers/")
        ]
    record = {
        "command": f"moespec check transformers --seed {reports[0]['seed']}",
        "date": datetime.date.today().isoformat(),
        "commit": reports[0]["suite"]["commit"],
        "machine": reports[0]["machine"],
        "versions": {name: version(name) for name in ("moespec", "torch", "transformers")},
        "verdicts": {report["target"]["name"]: report["verdict"] for report in reports},
        "broken": [
            {
                "target": report["target"]["name"],
                "id": each["id"],
                "status": each["status"],
                "message": each["message"],
            }
            for report in reports
            for each in report["requirements"]
            if each["status"] in BROKEN
        ],
        "sigmoid": uneven("torch.sigmoid", torch.sigmoid),
    }
    print(write("findings", record))
    return 0


def uneven(name, function):
    """How many constant rows a function of one number turns into rows that are not constant."""
    found = tried = 0
    for experts in (8, 17, 60, 72, 160, 257):
        for value in torch.linspace(-8, 8, 200):
            row = function(torch.full((experts,), float(value)))
            found += not bool((row == row[0]).all())
            tried += 1
    return {"function": name, "constant_rows": tried, "not_constant_afterwards": found}


if __name__ == "__main__":
    sys.exit(main())
