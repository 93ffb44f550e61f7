"""Known failures that a run may end with: named, explained, dated, checked to be still there."""

from __future__ import annotations

import datetime
import fnmatch
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_conformance.registry import requirement_named
from moe_conformance.runner import Result

FIELDS = {"requirement", "target", "reason", "issue", "expires"}


class WaiverError(Exception):
    """A waiver is malformed, unknown, expired or stale; the message says which and why."""


@dataclass(frozen=True)
class Waiver:
    """One known failure.

    Attributes:
        requirement: the id that fails.
        target: a pattern of target names, such as `transformers/*`.
        reason: why it is accepted for now.
        issue: URL of the thread where it is dealt with.
        expires: after this day the waiver is an error.
    """

    requirement: str
    target: str
    reason: str
    issue: str
    expires: datetime.date


def read_waivers(path: Path) -> list[Waiver]:
    """Read a TOML file with a `[[waiver]]` table for each known failure.

    Raises:
        WaiverError: the file, or one of its waivers, is not in order.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise WaiverError(f"waivers: expected a TOML file, got '{path}' ({error})") from None
    listed = content.get("waiver")
    if not isinstance(listed, list):
        raise WaiverError(f"waivers: expected [[waiver]] tables in '{path}', found none")
    return [_waiver(each, number + 1) for number, each in enumerate(listed)]


def _waiver(each: dict[str, object], number: int) -> Waiver:
    if set(each) != FIELDS:
        raise WaiverError(
            f"waiver {number}: expected the fields {', '.join(sorted(FIELDS))}, "
            f"got {', '.join(sorted(each))}"
        )
    expires = each["expires"]
    if not isinstance(expires, datetime.date):
        raise WaiverError(f"waiver {number}: expires: expected a date, got {expires!r}")
    texts = {name: str(each[name]) for name in FIELDS - {"expires"}}
    if not texts["issue"].startswith(("https://", "http://")):
        raise WaiverError(f"waiver {number}: issue: expected a URL, got '{texts['issue']}'")
    try:
        requirement_named(texts["requirement"])
    except ValueError as error:
        raise WaiverError(f"waiver {number}: {error}") from None
    if expires < datetime.date.today():
        raise WaiverError(f"waiver {number} ({texts['requirement']}) expired on {expires}")
    return Waiver(expires=expires, **texts)


def apply_waivers(waivers: Sequence[Waiver], target: str, results: Sequence[Result]) -> None:
    """Turn the failures that are known into `waived`.

    Raises:
        WaiverError: a waiver for this target whose requirement did not fail.
    """
    for waiver in waivers:
        if not fnmatch.fnmatch(target, waiver.target):
            continue
        for result in results:
            if result.requirement.id != waiver.requirement:
                continue
            if result.status not in ("fail", "crash", "timeout"):
                raise WaiverError(
                    f"waiver for {waiver.requirement} on {target} is stale: "
                    f"the requirement's status is {result.status}"
                )
            result.status = "waived"
            result.message = f"{waiver.reason} ({waiver.issue}): {result.message}"
