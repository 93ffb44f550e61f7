"""How reliably each seeded fault is caught, on how much of what is drawn it shows, and by what.

For every fault: with each of several seeds, whether each requirement that it names fails; the share
of all cases drawn for its operations in which any answer is another than the reference's; and the
set of requirements that fail. A crash is not a catch. Interrupted, the run goes on where it was.

    python benchmarks/faults.py [--seeds N] [--cases N] [--fault PATTERN]
"""

import argparse
import fnmatch
import sys
from collections import Counter

import torch
from moe_conformance.codec import digest
from moe_conformance.executor import InlineExecutor
from moe_conformance.faults import fault_named, faults
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from moe_conformance.target import OPERATIONS
from moe_conformance.targets import Reference
from record import about, resumed, write

CAUGHT = ("fail", "warn")
COMPARED = ("outputs", "gradients", "changed", "shared", "state", "kinds", "afterwards", "error")


class Comparing(InlineExecutor):
    """Gives the reference's answers, and counts the cases in which a fault's are others."""

    def __init__(self, fault):
        super().__init__(Reference())
        self.faulty = InlineExecutor(fault)
        self.different = False

    def run(self, session):
        answers = super().run(session)
        if not self.different:
            others = self.faulty.run(session)
            self.different = [_seen(a) for a in answers] != [_seen(a) for a in others]
        return answers


def _seen(answer):
    kept = {name: answer.get(name) for name in COMPARED}
    if kept["error"] is not None:
        kept["error"] = kept["error"]["type"]
    return digest(kept)


def operations_of(fault):
    """The operations that the fault's class, or what it inherits below the reference, defines."""
    own = [cls for cls in fault.target.__mro__ if cls not in Reference.__mro__]
    return {name for name in OPERATIONS if any(name in vars(cls) for cls in own)}


def measure(name, seeds, cases):
    fault = fault_named(name)
    operations = operations_of(fault)
    about_it = [
        each
        for each in requirements()
        if each.id in fault.catches or operations & {each.operation, *each.also}
        or each.operation == ANY
    ]  # fmt: skip
    executor = InlineExecutor(fault.target())
    scope = inline_scope(executor)
    missed, after = Counter(), []
    for seed in range(seeds):
        for each in about_it:
            if each.id in fault.catches:
                result = run_requirement(each, scope, executor, Effort(cases, 1, 0), seed)
                if result.status in CAUGHT:
                    after.append(result.cases)
                else:
                    missed[each.id] += 1
    failing = [
        each.id
        for each in about_it
        if run_requirement(each, scope, executor, Effort(cases // 4, 1, 0), 0).status in CAUGHT
    ]
    drawn = different = 0
    comparing = Comparing(fault.target())
    for each in about_it:
        if each.operation == ANY:
            continue
        counting = _Counting(comparing)
        run_requirement(each, scope, counting, Effort(max(1, cases // 6), 1, 0), 1)
        drawn += counting.cases
        different += counting.different
    return {
        "fault": name,
        "operations": sorted(operations),
        "thread": fault.thread,
        "seeds": seeds,
        "missed": dict(missed),
        "median_cases": sorted(after)[len(after) // 2] if after else None,
        "failing": failing,
        "drawn": drawn,
        "different": different,
    }


class _Counting:
    """Counts sessions of a comparing executor, and those in which the fault showed."""

    def __init__(self, comparing):
        self.comparing, self.description = comparing, comparing.description
        self.cases = self.different = 0

    def run(self, session):
        self.comparing.different = False
        answers = self.comparing.run(session)
        self.cases += 1
        self.different += self.comparing.different
        return answers

    def close(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--fault", default="*", help="a pattern of names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [each.name for each in faults() if fnmatch.fnmatch(each.name, options.fault)]
    rows = resumed("faults", names, lambda name: measure(name, options.seeds, options.cases))
    rare = sum(row["different"] < row["drawn"] / 10 for row in rows)
    record = {
        "what": "how reliably each seeded fault is caught, and on how many cases it shows",
        **about(),
        "faults": len(rows),
        "missed": sum(bool(row["missed"]) for row in rows),
        "showing_on_less_than_a_tenth": rare,
        "sets_of_failing_requirements": len({tuple(row["failing"]) for row in rows}),
        "by_operation": dict(Counter(name for row in rows for name in row["operations"])),
        "rows": rows,
    }
    path = write("faults", record)
    short = {name: value for name, value in record.items() if name not in ("rows", "what")}
    print(f"{path}: {short}")
    return 1 if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
