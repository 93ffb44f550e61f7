"""Runs the `moespec` command: as a user does, or inside this process, which is quicker."""

import subprocess
import sys
from pathlib import Path

import pytest
from moe_conformance.cli import app
from typer.testing import CliRunner

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


@pytest.fixture(scope="session")
def inside():
    """Run the command in this process; gives its exit code and all that it printed."""

    def run(*arguments):
        done = CliRunner().invoke(app, list(map(str, arguments)))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    return run
