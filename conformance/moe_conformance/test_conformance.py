"""What pytest collects: one test per requirement, for the target that `--target` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_requirement(moespec_requirement: Any, moespec_target: Any) -> None:
    """The target does what the requirement says."""
    from moe_conformance.cases import folder_of, save_case
    from moe_conformance.check import suite
    from moe_conformance.runner import effort_for, run_requirement

    executor, scope, options = moespec_target
    effort = effort_for(options.profile, None, scope.interpreted)
    result = run_requirement(moespec_requirement, scope, executor, effort, options.seed)
    if result.status in ("not_provided", "unsupported"):
        # Nothing was tried, which is not a pass; the report counts it apart as well.
        pytest.skip(f"{result.status}: {result.message}")
    if result.status in ("pass", "marginal", "observed"):
        return
    text = f"{moespec_requirement.sentence}\n{result.status}: {result.message}"
    if result.failure is not None:
        root = Path("moespec-report") / folder_of(options.targets[0]) / "cases"
        about = {"suite": suite(), "seed": options.seed}
        saved = save_case(root, result.failure, scope, options.targets[0], about)
        text += f"\nreplay: moespec replay {saved}"
    if result.status == "warn":
        # A SHOULD that does not hold is shown, and fails nobody.
        pytest.xfail(text)
    pytest.fail(text, pytrace=False)
