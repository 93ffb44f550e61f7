"""How the rare faults of alignment, dispatch and capacity are made: where arguments are good."""

from __future__ import annotations

from moe_conformance.faults import rare_calls
from moe_conformance.faults.rare import Arguments, When
from moe_conformance.faults.rare_calls import Change, Result, right


def good(operation: str, when: When) -> When:
    """The same calls without those whose arguments have to be refused."""

    def of_good(a: Arguments) -> bool:
        try:
            right(operation, a)
        except (TypeError, ValueError):
            return False
        return when(a)

    return of_good


def instead(
    operation: str,
    name: str,
    sentence: str,
    when: When,
    result: Result,
    *catches: str,
    thread: str = "",
) -> None:
    """As `rare_calls.instead`, with what is refused refused as ever."""
    where = good(operation, when)
    rare_calls.instead(operation, name, sentence, where, result, *catches, thread=thread)


def altered(
    operation: str,
    name: str,
    sentence: str,
    when: When,
    change: Change,
    *catches: str,
    thread: str = "",
) -> None:
    """As `rare_calls.altered`, with what is refused refused as ever."""
    where = good(operation, when)
    rare_calls.altered(operation, name, sentence, where, change, *catches, thread=thread)
