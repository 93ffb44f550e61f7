"""What the suite says of the libraries that have a target: the records behind the public matrix.

Each library of `benchmarks/libraries.toml` gets an environment under build/libraries, made with
exactly the commands that stand there; its targets are checked in it, and the tests of its adapter
are run, which need the library and are skipped everywhere else. What is kept of the
reports is small: one file per library in benchmarks/results/libraries. The site's matrix is made
of these files, so that it is built without any of the libraries.

    python benchmarks/libraries.py [NAME ...] [--profile smoke] [--seed 0]
    python benchmarks/libraries.py NAME --target TARGET [--target TARGET ...]

The second way checks some of a library's targets; the reports of the others stay as they are, each
with the commit that it is of.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import time
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from moe_conformance.report import read_report, reports_in
from moe_conformance.summary import summarize
from record import AROUND, RESULTS, about, write

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).parent / "libraries.toml"
KEPT = RESULTS / "libraries"
TESTS = ROOT / "conformance" / "tests"
HERE = [str(ROOT / room) for room in ("reference", "optimized", "conformance")]


def libraries():
    """The entries of the table by name."""
    return {each["name"]: each for each in tomllib.loads(TABLE.read_text())["library"]}


def environment(library):
    """The Python of the library's environment, made if it is not there.

    Most see the packages of this interpreter beside their own, so that torch is there once. One
    that says `own` shares nothing: its library wants other versions than this project's tools.
    """
    folder = ROOT / "build" / "libraries" / library["name"]
    python = folder / "bin" / "python"
    done = folder / "done"
    if done.exists() and done.read_text() == repr(library["install"]):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    shared = [] if library.get("own") else [sysconfig.get_paths()["purelib"]]
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "moespec-tree.pth").write_text("\n".join([*HERE, *shared]) + "\n")
    for line in library["install"]:
        subprocess.run([python, "-m", *line.split()], check=True)
    done.write_text(repr(library["install"]))
    return python


def would_change(python):
    """What pip would install or replace beside moespec, if that were installed there."""
    wheels = ROOT / "build" / "libraries" / "wheel"
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT]
    subprocess.run(build, check=True)
    [wheel] = wheels.glob("moespec-*.whl")
    command = [python, *pip, "install", "--dry-run", "--report", "-", wheel]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {each["metadata"]["name"] for each in json.loads(said)["install"]}
    return sorted(found - {"moespec"})


def check(library, targets, profile, seed):
    """Run the suite on targets of the library; its reports, and what moespec would change there."""
    python = environment(library)
    folder = ROOT / "build" / "libraries" / f"{library['name']}-report"
    command = [python, "-m", "moe_conformance", "check", *targets]
    command += ["--profile", profile, "--seed", str(seed), "--report", folder]
    command += library.get("arguments", [])
    index = folder / "index.json"
    # A run that ends before it has one must not be taken for the one before.
    index.unlink(missing_ok=True)
    around = {**os.environ, **AROUND}
    subprocess.run(command, check=False, env=around, stdin=subprocess.DEVNULL)
    reports = reports_in(read_report(index))
    for report, name in zip(reports, library.get("names", ()), strict=False):
        report["target"]["name"] = name
    return reports, would_change(python)


def pytest_of(library):
    """The arguments of the environment's Python that start pytest.

    An environment that shares nothing gets pytest from a folder of its own, which comes last on
    the path: what is installed stays as it is, and none of it is hidden.
    """
    if not library.get("own"):
        return ["-m", "pytest"]
    folder = ROOT / "build" / "libraries" / "pytest"
    if not (folder / "pytest").exists():
        same = f"pytest=={importlib.metadata.version('pytest')}"
        pip = [sys.executable, "-m", "pip", "install", "--target", folder, same]
        subprocess.run(pip, check=True)
    start = "import sys; sys.path.append(sys.argv.pop(1)); import pytest; sys.exit(pytest.main())"
    return ["-c", start, folder]


def run_tests(library):
    """How many tests of the library's adapter end how, in its environment."""
    outcome = ROOT / "build" / "libraries" / f"{library['name']}-tests.xml"
    outcome.unlink(missing_ok=True)
    command = [environment(library), *pytest_of(library), "-q", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={outcome}", *(TESTS / name for name in library["tests"])]
    around = {**os.environ, **AROUND, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=around, stdin=subprocess.DEVNULL)
    # A run that tests failed in, or that had none but skipped ones, is one that counts.
    if done.returncode not in (0, 1, 5):
        raise subprocess.CalledProcessError(done.returncode, command)
    ends = Counter(map(_end, ET.parse(outcome).iter("testcase")))
    return {name: ends[name] for name in ("passed", "failed", "xfailed", "skipped")}


def _end(testcase):
    skipped = testcase.find("skipped")
    if skipped is not None:
        return "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"
    broken = testcase.find("failure") is not None or testcase.find("error") is not None
    return "failed" if broken else "passed"


def kept(name, checked):
    """What is recorded of the library's other targets: reports that name their commits."""
    path = KEPT / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"reports": []}
    others = [each for each in record["reports"] if each["target"]["name"] not in checked]
    return [{**each, "commit": each.get("commit", record["commit"])} for each in others]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(libraries()))
    parser.add_argument("--target", action="append", default=[], help="of one NAME: only these")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.names) - set(libraries())
    if unknown:
        parser.error(f"expected names of {TABLE.name}, got {', '.join(sorted(unknown))}")
    if options.target and len(options.names) != 1:
        parser.error(f"--target: expected one NAME beside it, got {len(options.names)}")
    for name in options.names or libraries():
        library = libraries()[name]
        targets = options.target or library["targets"]
        started = time.monotonic()
        try:
            reports, changes = check(library, targets, options.profile, options.seed)
            tests = {"tests": run_tests(library)} if "tests" in library else {}
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{name}: not run, what is recorded stays as it is: {error}", file=sys.stderr)
            continue
        record = {
            "what": "verdicts of the conformance suite on one library's targets",
            **about(),
            "library": name,
            "version": library["version"],
            "install": [" ".join(line.split()) for line in library["install"]],
            "installing_moespec_also_installs": changes,
            "around": AROUND,
            **tests,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "reports": [
                *(kept(name, options.target) if options.target else ()),
                *(summarize(report) for report in reports),
            ],
        }
        KEPT.mkdir(parents=True, exist_ok=True)
        print(write(f"libraries/{name}", record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
