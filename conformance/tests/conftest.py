"""Runs the `moespec` command, as a user does or inside this process; and tests of adapters.

A test of an adapter asks a few requirements of its targets with `suite`. With a fixed seed and
number of examples the same cases are drawn every time.
"""

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_conformance.cli import app
from moe_conformance.executor import InlineExecutor
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Effort, run_requirement
from moe_conformance.selfcheck import inline_scope
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


class Suite:
    """Requirements asked of a target in this process. Ids are given in one string, with spaces."""

    def results(self, target, ids, examples):
        """The result of each requirement by id."""
        executor = InlineExecutor(target)
        scope, effort = inline_scope(executor), Effort(examples, minimum=1, shrinks=0)
        return {
            id: run_requirement(requirement_named(id), scope, executor, effort, seed=0)
            for id in ids.split()
        }

    def statuses(self, target, ids, examples):
        """The status of each requirement by id."""
        results = self.results(target, ids, examples)
        return {id: result.status for id, result in results.items()}

    def passes(self, target, ids, examples):
        """Check that the target conforms."""
        results = self.results(target, ids, examples)
        other = {id: f"{r.status}: {r.message}" for id, r in results.items() if r.status != "pass"}
        assert not other

    def fails(self, target, ids, examples):
        """Check that each of these is still found."""
        found = self.statuses(target, ids, examples)
        assert set(found.values()) <= {"fail", "crash"}, found

    def crashes(self, target, ids, examples):
        """Check that a function that is broken is asked for each of these."""
        results = self.results(target, ids, examples)
        found = {id: (r.status, "broken on purpose" in r.message) for id, r in results.items()}
        assert set(found.values()) == {("crash", True)}, found


@pytest.fixture(scope="session")
def suite():
    """See `Suite`."""
    return Suite()


def pytest_generate_tests(metafunc):
    """A test that takes `one_of_known` runs for each pair of target and id in KNOWN of its file."""
    for name in metafunc.fixturenames:
        if name.startswith("one_of_"):
            table = getattr(metafunc.module, name.removeprefix("one_of_").upper())
            pairs = [(target, id) for target, ids in table.items() for id in ids]
            metafunc.parametrize(name, pairs)


@pytest.fixture(scope="session")
def broken():
    """What stands in for a library's function that a test breaks."""

    def raises(*given, **named):
        raise ArithmeticError("broken on purpose")

    return raises


@pytest.fixture
def breaks(monkeypatch, broken):
    """Break functions of an object, by their names."""

    def replace(holder, *names):
        for name in names:
            monkeypatch.setattr(holder, name, broken)

    return replace


@pytest.fixture(scope="module")
def made():
    """What a factory makes, once for all tests of a file."""
    return functools.cache(lambda make: make())


@pytest.fixture(scope="module")
def one_thread():
    """Threads of torch cost more than they give with tensors as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def needs(monkeypatch):
    """Check the one sentence of a target whose library is missing ("none") or has another version.

    Its beginning is given, up to what was found, and the command at its end.
    """

    def check(make, found, beginning, install):
        def version(distribution):
            if found == "none":
                raise importlib.metadata.PackageNotFoundError(distribution)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(ImportError) as error:
            make()
        assert str(error.value) == f"{beginning}, found {found}: {install}"

    return check


@pytest.fixture(scope="session")
def says_what_it_is():
    """Check a target's name and version, and that its declaration survives JSON."""

    def check(target, name, distribution):
        assert target.name == name
        assert target.version == importlib.metadata.version(distribution)
        declared = target.capabilities
        plain = json.dumps(declared.to_json())
        restored = type(declared).from_json(json.loads(plain))
        assert json.dumps(restored.to_json()) == plain
        for area in ("routing", "experts", "layer", "balance", "capacity"):
            assert restored.alternatives(area) == declared.alternatives(area)

    return check
