"""Which mutations of the reference the suite does not notice.

cosmic-ray makes the mutants, one changed operator, number, comparison, loop or decorator at a time.
Each stands in a copy of `moe_reference` under another name, so that the oracle stays what it was,
and is asked everything about the operations that its module has a part in until something fails.
What survives is no fault by itself: a mutant may be the same function written otherwise. It is a
list to be read. Interrupted, the run goes on where it was.

    pip install cosmic-ray
    python benchmarks/mutation.py [--module NAME] [--share 0.25] [--cases N] [--jobs N]
    python benchmarks/mutation.py --again [--module NAME] [--cases N] [--jobs N]

`--again` asks today's suite about the mutants that survived when the record was made.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.abc
import importlib.util
import json
import multiprocessing
import random
import sys
from pathlib import Path

import cosmic_ray.plugins
import moe_conformance.targets
import moe_reference
import torch
from cosmic_ray.mutating import mutate_code
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import ANY, requirements
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
from record import RESULTS, about, resumed, write

SOURCE = Path(moe_reference.__file__).parent
COPY = "moe_mutant"
OPERATIONS = {
    "gating": ("route", "layer"),
    "load_balancing": ("balance_loss", "z_loss"),
    "bias_update": ("update_bias",),
    "alignment": ("align", "align_batched"),
    "dispatch": ("dispatch", "combine"),
    "capacity": ("drop_to_capacity",),
    "experts": ("experts", "experts_batched", "layer"),
    "activations": ("experts", "experts_batched"),
    "layer": ("layer",),
    "expert_slicing": ("assign_experts", "slice_experts", "slice_tensor_parallel"),
    "placement": ("place_experts", "expert_parallel"),
    "parallel_steps": ("expert_parallel",),
    "expert_parallel": ("expert_parallel",),
    "quantization": ("dequantize",),
    "quantized_experts": ("experts_quantized",),
}
SHARED = ("config", "weights", "presets", "quantized_tensors")
"""Modules that the copy takes from the original: their classes have to be the oracle's."""
TIMEOUT = 900.0
"""Seconds. What survives is asked everything; with a short limit it would be taken for noticed."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `moe_mutant` in the reference's source, with one module's text replaced."""

    def __init__(self, module, text):
        self.module, self.text = module, text

    def find_spec(self, name, path=None, target=None):
        if name == COPY or name.startswith(COPY + "."):
            return importlib.util.spec_from_loader(name, self, is_package=name == COPY)
        return None

    def create_module(self, spec):
        short = spec.name.rpartition(".")[2]
        return sys.modules[f"moe_reference.{short}"] if short in SHARED else None

    def exec_module(self, module):
        name = module.__spec__.name if module.__spec__ else module.__name__
        short = name.rpartition(".")[2]
        if short in SHARED or name == COPY:
            return
        text = self.text if short == self.module else (SOURCE / f"{short}.py").read_text()
        exec(compile(text.replace("moe_reference", COPY), f"<{name}>", "exec"), vars(module))


def mutant(module, text):
    """A target like the reference, one module of which has another text.

    It provides the operations that the module has a part in and no others.
    """
    finder = _Finder(module, text)
    sys.meta_path.insert(0, finder)
    for name in SHARED:
        importlib.import_module(f"moe_reference.{name}")
    package = importlib.util.module_from_spec(finder.find_spec(COPY))
    package.__path__ = []
    sys.modules[COPY] = package
    for name in SHARED:
        sys.modules[f"{COPY}.{name}"] = sys.modules[f"moe_reference.{name}"]
    space = {"__name__": "moe_mutant_targets"}
    source = Path(moe_conformance.targets.__file__).read_text()
    exec(compile(source.replace("moe_reference", COPY), "<targets>", "exec"), space)
    whole = space["Reference"]
    only = dataclasses.replace(whole.capabilities, operations=OPERATIONS[module])
    return type("Mutant", (whole,), {"capabilities": only})()


def mutants(module):
    """Names and texts of the mutants of a module, but for those that are the same program."""
    code = (SOURCE / f"{module}.py").read_text()
    plain = _meaning(code)
    seen = {}
    for name in cosmic_ray.plugins.operator_names():
        if "Variable" in name:  # they want to be told which
            continue
        operator = cosmic_ray.plugins.get_operator(name)()
        for occurrence in range(10_000):
            changed = mutate_code(code, operator, occurrence)
            if changed is None:
                break
            try:
                meaning = _meaning(changed)
            except SyntaxError:
                continue
            if meaning not in (plain, *seen):
                seen[meaning] = (f"{module}:{name.removeprefix('core/')}:{occurrence}", changed)
    return dict(seen.values())


def _meaning(code):
    """The program without its annotations, docstrings and messages of errors.

    `is` reads as `==`: what the reference compares are short strings, dtypes and None. So does an
    order between strings, which asks for nothing that anybody would write.
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
        if isinstance(node, ast.Compare):
            same = {ast.Is: ast.Eq(), ast.IsNot: ast.NotEq()}
            [*_, last] = node.comparators
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                same |= dict.fromkeys((ast.Lt, ast.LtE, ast.Gt, ast.GtE), ast.Eq())
            node.ops = [same.get(type(op), op) for op in node.ops]
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            if isinstance(node, ast.FunctionDef):
                node.returns = None
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def line_of(module, text):
    """The first line that is another, before and after."""
    before = (SOURCE / f"{module}.py").read_text().splitlines()
    for number, (old, new) in enumerate(zip(before, text.splitlines(), strict=False), 1):
        if old != new:
            return f"{number}: {old.strip()}  ->  {new.strip()}"
    return "at the end"


def judge(module, text, cases, pipe):
    """In a process of its own: what notices the mutant, or nothing."""
    torch.set_num_threads(1)
    try:
        executor = InlineExecutor(mutant(module, text))
        scope = inline_scope(executor)
        operations = OPERATIONS[module]
        asked = [each for each in requirements() if each.operation in operations]
        asked += [each for each in requirements() if each.operation == ANY]
        for each in asked:
            result = run_requirement(each, scope, executor, Effort(cases, 1, 0), 0)
            if result.status in ("fail", "crash", "timeout", "warn"):
                pipe.send((each.id, result.message[:200]))
                return
        pipe.send((None, ""))
    except BaseException as error:
        pipe.send(("import", f"{type(error).__name__}: {error}"[:200]))


def measure(key, cases):
    module = key.split(":")[0]
    text = _texts(module)[key]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=judge, args=(module, text, cases, theirs))
    process.start()
    by, message = ours.recv() if ours.poll(TIMEOUT) else ("timeout", "")
    process.kill()
    process.join()
    return {"mutant": key, "line": line_of(module, text), "by": by, "message": message}


@functools.cache
def _texts(module):
    return mutants(module)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=OPERATIONS, action="append")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the mutants, drawn with seed 0"
    )
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="only what survived")
    parser.add_argument("--line", type=int, help="with --again: only mutants of this line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    one = functools.partial(measure, cases=options.cases)
    if options.again:
        return again(one, options.jobs, options.module or tuple(OPERATIONS), options.line)
    keys = [key for module in options.module or OPERATIONS for key in _texts(module)]
    drawn = random.Random(0).sample(keys, round(len(keys) * options.share))
    keys = [key for key in keys if key in set(drawn)]
    about_all = {
        "what": "mutants of moe_reference, and the requirement that noticed each",
        **about(),
    }
    tell(about_all, resumed("mutation", keys, one, options.jobs))


def again(one, jobs, modules, line):
    """Replace the rows of survivors; what else the record says of itself stays."""
    record = json.loads((RESULTS / "mutation.json").read_text())
    survived = [row for row in record["rows"] if row["by"] is None]
    if line is not None:
        survived = [row for row in survived if row["line"].startswith(f"{line}:")]
    names = [row["mutant"] for row in survived]
    left = [name for name in names if name.split(":")[0] in modules]
    found = {row["mutant"]: row for row in resumed("mutation-again", left, one, jobs)}
    rows = [found.get(row["mutant"], row) for row in record["rows"]]
    first = {name: record[name] for name in ("what", "command", "date", "commit", "machine")}
    tell({**first, "again": about()}, rows)


def tell(first, rows):
    """Write the record, and print what survived."""
    survived = [row for row in rows if row["by"] is None]
    record = {**first, "mutants": len(rows), "survived": len(survived), "rows": rows}
    print(f"{write('mutation', record)}: {len(survived)} of {len(rows)} survived")
    for row in survived:
        print(f"{row['mutant']}  {row['line']}")


if __name__ == "__main__":
    main()
