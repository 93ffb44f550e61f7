"""Known failures that a run may end with: named, explained, dated, checked to be still there.

A waiver holds a stored counterexample. It is run before anything else: if it no longer fails, the
waiver is stale, whatever a random search finds or does not find afterwards. And what is waived is a
failure of the stored kind: a requirement that was wrong and now crashes is red again.
"""

from __future__ import annotations

import datetime
import fnmatch
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_conformance.cases import SavedCase, load_case, replay
from moe_conformance.executor import Executor
from moe_conformance.registry import requirement_named
from moe_conformance.runner import Result

FIELDS = {"requirement", "target", "reason", "issue", "expires", "case"}
FAILURES = ("fail", "crash", "timeout")


class WaiverError(Exception):
    """A waiver is unknown, expired or stale; the message says which and why."""


class MalformedWaivers(Exception):
    """There are no waivers in the file that can be read; the message says why."""


@dataclass(frozen=True)
class Waiver:
    """One known failure.

    Attributes:
        requirement: the id that fails.
        target: a pattern of target names, such as `transformers/*`.
        reason: why it is accepted for now.
        issue: URL of the thread where it is dealt with.
        expires: after this day the waiver is an error.
        case: the counterexample that shows it.
    """

    requirement: str
    target: str
    reason: str
    issue: str
    expires: datetime.date
    case: SavedCase

    def covers(self, target: str, id: str) -> bool:
        """Whether it speaks about this requirement on this target."""
        return id == self.requirement and fnmatch.fnmatch(target, self.target)


def read_waivers(path: Path) -> list[Waiver]:
    """Read a TOML file with a `[[waiver]]` table for each known failure.

    The folders of the counterexamples are named relative to the file.

    Raises:
        MalformedWaivers: the file, or one of its waivers, cannot be read.
        WaiverError: a waiver is expired, or for a requirement that there is not.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MalformedWaivers(f"waivers: expected a TOML file, got '{path}' ({error})") from None
    listed = content.get("waiver")
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise MalformedWaivers(f"waivers: expected [[waiver]] tables in '{path}', found none")
    return [_waiver(each, number + 1, path.parent) for number, each in enumerate(listed)]


def _waiver(each: dict[str, object], number: int, folder: Path) -> Waiver:
    if set(each) != FIELDS:
        raise MalformedWaivers(
            f"waiver {number}: expected the fields {', '.join(sorted(FIELDS))}, "
            f"got {', '.join(sorted(each))}"
        )
    expires = each["expires"]
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise MalformedWaivers(f"waiver {number}: expires: expected a date, got {expires!r}")
    texts = {name: each[name] for name in FIELDS - {"expires"}}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise MalformedWaivers(f"waiver {number}: {name}: expected a text, got {text!r}")
    requirement, issue = str(texts["requirement"]), str(texts["issue"])
    if not issue.startswith(("https://", "http://")):
        raise MalformedWaivers(f"waiver {number}: issue: expected a URL, got '{issue}'")
    try:
        requirement_named(requirement)
    except ValueError as error:
        raise WaiverError(f"waiver {number}: {error}") from None
    try:
        case = load_case(folder / str(texts["case"]))
    except ValueError as error:
        raise MalformedWaivers(f"waiver {number}: {error}") from None
    if case.requirement != requirement:
        raise MalformedWaivers(
            f"waiver {number}: case: expected a case of {requirement}, got one of "
            f"{case.requirement}"
        )
    if expires < datetime.date.today():
        raise WaiverError(f"waiver {number} ({requirement}) expired on {expires}")
    target, reason = str(texts["target"]), str(texts["reason"])
    return Waiver(requirement, target, reason, issue, expires, case)


def check_waived(
    waivers: Sequence[Waiver], target: str, chosen: Sequence[str], executor: Executor
) -> None:
    """Run the stored counterexamples of the waivers for this target.

    Args:
        waivers: all of the file.
        target: the target's name.
        chosen: the ids that this run is about; waivers of others are left alone.
        executor: calls the target.

    Raises:
        WaiverError: a counterexample does not fail.
    """
    for waiver in waivers:
        if any(waiver.covers(target, id) for id in chosen):
            again = replay(waiver.case, executor)
            if not again.failed:
                raise WaiverError(
                    f"waiver for {waiver.requirement} on {target} is stale: its counterexample "
                    f"does not fail any more in {again.runs} runs"
                )


def apply_waivers(waivers: Sequence[Waiver], target: str, results: Sequence[Result]) -> None:
    """Turn the failures that are known into `waived`.

    A failure of another kind than the stored one stays what it is. A requirement that passes
    although its stored counterexample fails is waived, too: the search did not come across it.
    """
    for result in results:
        for waiver in waivers:
            if not waiver.covers(target, result.requirement.id):
                continue
            if result.status in FAILURES and result.status != waiver.case.kind:
                continue
            if result.status not in FAILURES:
                result.message = (
                    f"not met in this run, but in the stored case: {waiver.case.message}"
                )
            result.status = "waived"
            result.message = f"{waiver.reason} ({waiver.issue}): {result.message}"
            break
