"""Runs the `moespec` command as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def planted():
    """From a class in planted.py to a target name."""
    return lambda name: f"{HERE / 'planted.py'}:{name}"


@pytest.fixture(scope="session")
def moespec():
    """Run the command; gives the finished process."""

    def run(*arguments, timeout=300, **options):
        return subprocess.run(
            [sys.executable, "-m", "moe_conformance", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )

    return run
