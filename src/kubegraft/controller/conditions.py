"""Conditions by Kubernetes' conventions: a status, a reason for programs, a message for people, when it changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kubegraft.controller.status_schema import MAX_MESSAGE

ADMITTED: Final = "Admitted"
RUNNING: Final = "Running"
SUCCEEDED: Final = "Succeeded"
FAILED: Final = "Failed"
READY: Final = "Ready"  # of a TransferSchedule


@dataclass(frozen=True, slots=True)
class Condition:
    """What holds or does not hold, without the time.

    Attributes:
        type: For example `Running`.
        holds: Whether it does.
        reason: CamelCase.
        message: For people, with the fix where something is wrong.
    """

    type: str
    holds: bool
    reason: str
    message: str


def find(conditions: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """Return the condition of a type, empty if there is none."""
    return next((each for each in conditions if each.get("type") == kind), {})


def holds(conditions: Iterable[Mapping[str, Any]], kind: str) -> bool:
    """Return whether a condition is there and true."""
    return find(conditions, kind).get("status") == "True"


def merged(
    old: Sequence[Mapping[str, Any]], new: Iterable[Condition], *, generation: int, now: datetime
) -> list[dict[str, Any]]:
    """Return the conditions after `new` is known; those of other types stay, whoever wrote them.

    Args:
        old: Conditions of the status as read.
        new: What is known now.
        generation: Generation of the spec that it is about.
        now: Time of what changes.
    """
    result = {str(each["type"]): dict(each) for each in old}
    for condition in new:
        before = result.get(condition.type, {})
        status = "True" if condition.holds else "False"
        same = before.get("status") == status
        message = shortened(condition.message)
        if (
            same
            and before.get("reason") == condition.reason
            and _same_words(before.get("message", ""), message)
        ):
            message = before.get("message", "")
        result[condition.type] = {
            "type": condition.type,
            "status": status,
            "observedGeneration": generation,
            "lastTransitionTime": before["lastTransitionTime"] if same else timestamp(now),
            "reason": condition.reason,
            "message": message,
        }
    return list(result.values())


def _same_words(old: str, new: str) -> bool:
    """Return whether two messages differ in figures only: the scheduler counts its nodes anew each time."""
    return re.sub(r"\d+", "#", old) == re.sub(r"\d+", "#", new)


def shortened(message: str, most: int = MAX_MESSAGE) -> str:
    """Return a message that fits."""
    return message if len(message) <= most else f"{message[: most - 3]}..."


def timestamp(time: datetime) -> str:
    """Return a time as the API writes it, in whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str | None) -> datetime | None:
    """Return the time that the API wrote, or None."""
    return datetime.fromisoformat(text) if text else None
