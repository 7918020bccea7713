"""Cron expressions, as KFP (with seconds) and Kubernetes (without) read them: robfig/cron's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kubegraft.errors import ConfigError

Field = tuple[str, int, int, str]  # name, lowest, highest, words for the numbers from the lowest on
FIELDS: Final[tuple[Field, ...]] = (
    ("second", 0, 59, ""),
    ("minute", 0, 59, ""),
    ("hour", 0, 23, ""),
    ("day of month", 1, 31, ""),
    ("month", 1, 12, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC"),
    ("day of week", 0, 6, "SUN MON TUE WED THU FRI SAT"),
)


def check_fields(cron: str, fields: Sequence[Field]) -> None:
    """Raise unless each field of an expression has a form and values that it can have.

    Args:
        cron: Expression with as many fields as `fields`.
        fields: All of `FIELDS`, or those without seconds.

    Raises:
        ConfigError: If a field is out of its range, or no *, number, range or list of them, with or without a step.
    """
    for text, (name, low, high, words) in zip(cron.split(), fields, strict=True):
        if not all(_is_part(part, low, high, words.split()) for part in text.split(",")):
            raise ConfigError(
                f"`cron` must have a {name} in {low}-{high}, as *, a number, a range, a list or with /step. "
                f"Received: {text!r} in cron={cron!r}."
            )


def _is_part(part: str, low: int, high: int, words: list[str]) -> bool:
    span, slash, step = part.partition("/")
    if slash and not (step.isdecimal() and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [
        words.index(end.upper()) + low if end.upper() in words else int(end) if end.isdecimal() else -1
        for end in span.split("-")
    ]
    return len(ends) <= 2 and all(low <= end <= high for end in ends) and ends == sorted(ends)
