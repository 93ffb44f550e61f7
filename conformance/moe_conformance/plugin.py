"""The suite under pytest: `python -m pytest --pyargs moe_conformance --target NAME`.

This module is loaded by every pytest run in every environment that has moespec installed, so it
imports neither torch nor hypothesis until a target is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moe_conformance.check import Options

FIXTURE = "moespec_requirement"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `moespec check` that make sense here."""
    group = parser.getgroup("moespec", "conformance of Mixture-of-Experts layers")
    group.addoption("--target", metavar="NAME", help="the implementation under test")
    group.addoption("--moespec-profile", default="cpu", help="smoke, cpu or full")
    group.addoption("--moespec-seed", type=int, default=None, help="the run follows from it")
    group.addoption("--moespec-device", default=None, help="where the target runs")
    group.addoption("--moespec-world-size", default=None, help="ranks, such as 2,4")
    group.addoption("--moespec-timeout", type=float, default=60.0, help="seconds for one case")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the target and the seed."""
    if not config.getoption("--target"):
        return None
    return f"moespec: target {config.getoption('--target')}, seed {_options(config).seed}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per requirement, where a target is named."""
    if FIXTURE not in metafunc.fixturenames:
        return
    if not metafunc.config.getoption("--target"):
        metafunc.parametrize(FIXTURE, [])
        return
    from moe_conformance.registry import requirements

    found = requirements()
    metafunc.parametrize(FIXTURE, found, ids=[each.id for each in found], scope="session")


@pytest.fixture(scope="session")
def moespec_target(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The executor and the scope of the target under test."""
    from moe_conformance.check import UsageError, scope_of
    from moe_conformance.executor import TargetLost, WorkerExecutor
    from moe_conformance.worker import LoadError

    options = _options(request.config)
    try:
        executor = WorkerExecutor(options.targets[0], options.timeout)
    except (LoadError, TargetLost) as error:
        pytest.exit(str(error), returncode=10)
    try:
        yield executor, scope_of(executor, options), options
    except UsageError as error:
        pytest.exit(str(error), returncode=2)
    finally:
        executor.close()


def _options(config: pytest.Config) -> Options:
    from moe_conformance.check import Options

    stored = getattr(config, "_moespec_options", None)
    if stored is None:
        seed = config.getoption("--moespec-seed")
        given: dict[str, Any] = {} if seed is None else {"seed": seed}
        sizes = config.getoption("--moespec-world-size")
        if sizes is not None:
            given["world_sizes"] = tuple(int(size) for size in sizes.split(","))
        stored = Options(
            (config.getoption("--target"),),
            profile=config.getoption("--moespec-profile"),
            device=config.getoption("--moespec-device"),
            timeout=config.getoption("--moespec-timeout"),
            **given,
        )
        config._moespec_options = stored  # type: ignore[attr-defined]
    return stored
