"""The reference stands on torch alone."""

import pkgutil
import subprocess
import sys

import moe_reference


def test_the_reference_needs_neither_triton_nor_the_suite():
    names = [f"moe_reference.{each.name}" for each in pkgutil.iter_modules(moe_reference.__path__)]
    code = (
        f"import sys, {', '.join(names)};"
        "print([m for m in ('triton', 'pytest', 'hypothesis', 'moe_conformance', 'moe_optimized')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
