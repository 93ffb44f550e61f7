"""Run every notebook from its first cell to its last, once, and keep the result for the site.

`make notebooks` calls it. What has been run stands in `build/notebooks`, where the pages are made
of it. A notebook is run again when it has changed, or anything that it shows: the packages, the
recorded results, Python, torch. An error in a cell ends the program, with the cell and the error.
"""

import hashlib
import platform
import sys
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KEPT = ROOT / "build" / "notebooks"
SHOWN = ("reference/moe_reference", "optimized/moe_optimized", "conformance/moe_conformance")
SECONDS = 600
"""For one cell. A notebook is meant to take less than a minute; a slow machine is no error."""


def main():
    """Bring `build/notebooks` up to date."""
    KEPT.mkdir(parents=True, exist_ok=True)
    sources = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for gone in {path.name for path in KEPT.glob("*.ipynb")} - {path.name for path in sources}:
        (KEPT / gone).unlink()
    shared = _digest(_shown())
    for source in sources:
        key = hashlib.sha256(shared.encode() + source.read_bytes()).hexdigest()
        kept = KEPT / source.name
        if kept.exists() and nbformat.read(kept, as_version=4).metadata.get("moespec_key") == key:
            print(f"{source.name}: unchanged", flush=True)
            continue
        began = time.perf_counter()
        notebook = nbformat.read(source, as_version=4)
        run = NotebookClient(
            notebook,
            # It warns that a local connection is not encrypted.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            timeout=SECONDS,
            resources={"metadata": {"path": str(NOTEBOOKS)}},
        )
        try:
            run.execute()
        except CellExecutionError as error:
            sys.exit(f"{source.name}: {error}")
        notebook.metadata["moespec_key"] = key
        beside = kept.with_suffix(".partial")
        nbformat.write(notebook, beside)
        beside.replace(kept)
        print(f"{source.name}: {time.perf_counter() - began:.0f} s", flush=True)


def _shown():
    yield NOTEBOOKS / "_show.py"
    for folder in SHOWN:
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield ROOT / "benchmarks" / "goals.py"
    yield from sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


def _digest(paths):
    found = hashlib.sha256(f"{platform.python_version()} {torch.__version__}".encode())
    for path in paths:
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
