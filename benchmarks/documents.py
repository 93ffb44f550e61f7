"""What the suite says of the five documents: the record behind docs/documents.md.

python benchmarks/documents.py [--seed N | --report FOLDER]
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from findings import BROKEN
from moe_conformance.report import read_report, reports_in
from record import write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="of a run that there has been already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.report or Path(made)
        if options.report is None:
            command = ["check", "documents", "--profile", "smoke", "--seed", str(options.seed)]
            command += ["--report", made]
            subprocess.run([sys.executable, "-m", "moe_conformance", *command], check=False)
        reports = [
            report
            for report in reports_in(read_report(folder / "index.json"))
            if report["target"]["name"].startswith("documents/")
        ]
    record = {
        "command": f"moespec check documents --profile smoke --seed {reports[0]['seed']}",
        "date": datetime.date.today().isoformat(),
        "commit": reports[0]["suite"]["commit"],
        "machine": reports[0]["machine"],
        "versions": {name: version(name) for name in ("moespec", "torch")},
        "targets": [
            {
                "target": report["target"]["name"],
                "verdict": report["verdict"],
                "operations": [
                    name
                    for name, cells in report["breadth"]["cells"]["by_operation"].items()
                    if cells["declared"]
                ],
                "statuses": Counter(each["status"] for each in report["requirements"]),
                "broken": {
                    each["id"]: {"status": each["status"], "message": each["message"]}
                    for each in report["requirements"]
                    if each["status"] in BROKEN
                },
            }
            for report in reports
        ],
    }
    print(write("documents", record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
