"""How reliably each seeded fault is caught, on how much of what is drawn it shows, and by what.

For every fault: with how many of several seeds it fails the profile `cpu`, the requirements that it
names being tried first; how many numbers the smallest case found has; the share of the cases drawn
for its operations in which any answer is another than the reference's; and the set of requirements
that fail. A crash is not a catch, but among ranks. Interrupted, the run goes on where it was. With
--add, faults that the record has already keep their rows, each with its commit.

    python benchmarks/faults.py [--seeds N] [--first SEED] [--jobs N] [--add] [--fault PATTERN]
"""

import argparse
import fnmatch
import functools
import json
import statistics
import sys
from collections import Counter
from dataclasses import replace

import torch
from moe_conformance.codec import digest
from moe_conformance.executor import InlineExecutor
from moe_conformance.faults import fault_named, faults
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import PROFILES, Effort, run_requirement
from moe_conformance.selfcheck import inline_scope, noticed
from moe_conformance.targets import Reference
from record import RESULTS, about, commit, resumed, write

EFFORT = PROFILES["cpu"]
SAMPLE = 150
"""Cases on which a fault is compared with the reference."""
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


def measure(name, seeds, first):
    fault = fault_named(name)
    operations = set(fault.operations)
    executor = InlineExecutor(fault.target())
    scope = inline_scope(executor)
    named = [each for each in requirements() if each.id in fault.catches]
    others = [
        each
        for each in requirements()
        if each not in named and operations & {each.operation, *each.also}
    ]
    everywhere = [each for each in requirements() if each.operation == ANY and each not in named]
    by, after, scalars = Counter(), [], None
    for seed in range(first, first + seeds):
        cases = 0
        for each in (*named, *others, *everywhere):
            # A counterexample is made small once; that takes longer than to find it.
            effort = EFFORT if scalars is None else replace(EFFORT, shrinks=0)
            result = run_requirement(each, scope, executor, effort, seed)
            cases += result.cases
            if noticed(result):
                by[each.id] += 1
                after.append(cases)
                if scalars is None:
                    scalars = result.failure.size[0]
                break
    failing = [
        each.id
        for each in (*named, *others)
        if noticed(run_requirement(each, scope, executor, Effort(5, 1, 0), first))
    ]
    about_it = [each for each in (*named, *others) if each.operation != ANY]
    counting = _Counting(Comparing(fault.target()))
    for each in about_it:
        run_requirement(each, scope, counting, Effort(max(2, SAMPLE // len(about_it)), 1, 0), first)
    return {
        "fault": name,
        "commit": commit(),
        "operations": sorted(operations),
        "thread": fault.thread,
        "seeds": seeds,
        "caught": sum(by.values()),
        "by": dict(by.most_common()),
        "median_cases": sorted(after)[len(after) // 2] if after else None,
        "scalars": scalars,
        "failing": sorted(failing),
        "drawn": counting.cases,
        "different": counting.different,
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

    def renew(self):
        return False

    def close(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--add", action="store_true", help="only what the record does not have")
    parser.add_argument("--fault", default="*", help="a pattern of names; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [each.name for each in faults() if fnmatch.fnmatch(each.name, options.fault)]
    kept = json.loads((RESULTS / "faults.json").read_text())["rows"] if options.add else []
    have = {row["fault"]: row for row in kept}
    one = functools.partial(measure, seeds=options.seeds, first=options.first)
    some = options.fault != "*"
    left = [name for name in names if name not in have]
    new = [one(name) for name in left] if some else resumed("faults", left, one, options.jobs)
    have |= {row["fault"]: row for row in new}
    rows = [have[name] for name in names]
    scalars = [row["scalars"] for row in rows if row["scalars"] is not None]
    record = {
        "what": "how reliably each seeded fault is caught, and on how many cases it shows",
        **about(),
        "effort": {"examples": EFFORT.examples, "seeds": [options.first, options.seeds]},
        "faults": len(rows),
        "missed": [row["fault"] for row in rows if row["caught"] < row["seeds"]],
        "showing_on_less_than_a_tenth": sum(row["different"] < row["drawn"] / 10 for row in rows),
        "sets_of_failing_requirements": len({tuple(row["failing"]) for row in rows}),
        "median_scalars_of_a_counterexample": statistics.median(scalars) if scalars else None,
        "by_operation": dict(Counter(name for row in rows for name in row["operations"])),
        "rows": rows,
    }
    where = "not written" if some else write("faults", record)
    short = {name: value for name, value in record.items() if name not in ("rows", "what")}
    print(f"{where}: {json.dumps(short, indent=1)}")
    if some:
        print(json.dumps(rows, indent=1))
    return 1 if record["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
