"""A report in a few kilobytes: what the matrix shows of it, to be kept where reports are too large.

What the registry says of each requirement is left out, because it is there again when the summary
is read; so are inputs and answers of failures.
"""

from __future__ import annotations

from typing import Any

from moe_conformance.pages import NOT_RUN
from moe_conformance.registry import requirements

KEPT = ("suite", "target", "machine", "seed", "effort", "command", "verdict", "breadth", "counts")


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report.

    Args:
        report: from `read_report`.

    Returns:
        Its parts that say what was run on what, `started`, the number of `cases`, `status` of each
        requirement that was run, `said` where there is a message, and the ids of those that are
        `unsupported` and `not_provided`.
    """
    entries = report["requirements"]
    return {
        **{name: report[name] for name in KEPT},
        "started": report["timing"]["started"],
        "cases": sum(each["cases"] for each in entries),
        "status": {e["id"]: e["status"] for e in entries if e["status"] not in NOT_RUN},
        "said": {
            e["id"]: e["message"] for e in entries if e["status"] not in NOT_RUN and e["message"]
        },
        **{name: [e["id"] for e in entries if e["status"] == name] for name in NOT_RUN},
    }


def restored(summary: dict[str, Any]) -> dict[str, Any]:
    """The report that `write_matrix` takes, of a summary and the registry.

    A requirement that is newer than the summary counts as one that the report does not have.
    """
    rows = [
        {
            "id": each.id,
            "concept": each.area,
            "operation": each.operation,
            "level": each.level,
            "title": each.title,
            "sentence": each.sentence,
            "status": status,
            "message": summary["said"].get(each.id, ""),
        }
        for each in requirements()
        if (status := _status(summary, each.id)) is not None
    ]
    return {**summary, "requirements": rows, "timing": {"started": summary["started"]}}


def _status(summary: dict[str, Any], id: str) -> str | None:
    if id in summary["status"]:
        return str(summary["status"][id])
    if id in summary["unsupported"]:
        return "unsupported"
    return "not_provided" if id in summary["not_provided"] else None
