"""Ticks of a cron expression in a time zone, as Kubernetes' CronJobs have them.

A local time that the clock skips in spring has no tick. One that it repeats in autumn has one tick, the first, unless
the expression is for every hour. Where both day of month and day of week are restricted, either will do.
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from kubegraft.cron import FIELDS, check_fields
from kubegraft.errors import ConfigError, suggestion

_FIELDS: Final = FIELDS[1:]  # without seconds
_FARTHEST: Final = timedelta(days=9 * 366)  # 29 February may be eight years away
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """When: the values of each field, and the zone of its local times."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool
    zone: zoneinfo.ZoneInfo

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """Return the last tick in (after, until], or None; looks back nine years at most."""
        day = until.astimezone(self.zone).date()
        first = max(after, until - _FARTHEST).astimezone(self.zone).date()
        while day >= first:
            for tick in sorted(self._on(day), reverse=True):
                if after < tick <= until:
                    return tick
            day -= _DAY
        return None

    def following(self, after: datetime) -> datetime | None:
        """Return the first tick after a time, or None if there is none in nine years."""
        day = after.astimezone(self.zone).date()
        last = day + _FARTHEST
        while day <= last:
            for tick in sorted(self._on(day)):
                if tick > after:
                    return tick
            day += _DAY
        return None

    def _on(self, day: date) -> Iterator[datetime]:
        if day.month not in self.months or not self._has_day(day):
            return
        for hour in self.hours:
            for minute in self.minutes:
                yield from self._instants(datetime(day.year, day.month, day.day, hour, minute))

    def _has_day(self, day: date) -> bool:
        by_month, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return by_month or by_week if self.either_day else by_month and by_week

    def _instants(self, local: datetime) -> Iterator[datetime]:
        first = local.replace(tzinfo=self.zone).astimezone(UTC)
        if first.astimezone(self.zone).replace(tzinfo=None, fold=0) != local:
            return  # skipped by the clock
        yield first
        second = local.replace(tzinfo=self.zone, fold=1).astimezone(UTC)
        if second != first and len(self.hours) == 24:
            yield second


def parse_cron(cron: str, time_zone: str) -> Cron:
    """Return when a schedule runs.

    Args:
        cron: Five fields: minute, hour, day of month, month, day of week.
        time_zone: Name in the time zone database.

    Raises:
        ConfigError: If either has another form.
    """
    texts = cron.split()
    if len(texts) != len(_FIELDS):
        raise ConfigError(
            "`cron` must have five fields: minute, hour, day of month, month, day of week. Received: "
            f"cron={cron!r}. For example '0 3 * * *'."
        )
    check_fields(cron, _FIELDS)
    minutes, hours, days, months, weekdays = (
        _values(text, low, high, words.split())
        for text, (_, low, high, words) in zip(texts, _FIELDS, strict=True)
    )
    return Cron(
        minutes=tuple(sorted(minutes)),
        hours=tuple(sorted(hours)),
        days=days,
        months=months,
        weekdays=weekdays,
        either_day=texts[2] not in ("*", "?") and texts[4] not in ("*", "?"),
        zone=_zone(time_zone),
    )


def _values(text: str, low: int, high: int, words: list[str]) -> frozenset[int]:
    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if span in ("*", "?"):
            first, last = low, high
        else:
            ends = [
                words.index(end.upper()) + low if end.upper() in words else int(end)
                for end in span.split("-")
            ]
            first, last = ends[0], high if slash and len(ends) == 1 else ends[-1]
        values.update(range(first, last + 1, int(step) if slash else 1))
    return frozenset(values)


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            "`timeZone` must be a name of the time zone database, such as Europe/Berlin. Received: "
            f"timeZone={name!r}.{suggestion(name, zoneinfo.available_timezones())}"
        ) from error
