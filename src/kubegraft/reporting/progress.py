"""How far a stage is: a bar in a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event, log_is_json

_LINE_SECONDS: Final = 10.0
_BAR_SECONDS: Final = 0.1
_BAR_WIDTH: Final = 24
_MEASURE_SECONDS: Final = 1.0

# Called with a stage's or phase's name, how much is done and the total, as often as there is news; must be quick.
observers: Final[list[Callable[[str, int, int], None]]] = []


class Progress:
    """Counts towards a total; use as a context manager.

    Example:
        with Progress("ingest", len(paths), "images") as progress:
            for path in paths:
                progress.update(bad=num_bad)
    """

    def __init__(self, stage: str, total: int, unit: str, *, images_per_unit: int = 0) -> None:
        """Count `total` things of `unit` for `stage`; a total of 0 means it is not known.

        Args:
            stage: Stage that works.
            total: How many there are.
            unit: What they are, for example `images`.
            images_per_unit: Images in each, for the metrics; 0 where they hold none. An image is one.
        """
        self.stage, self.total, self.unit = stage, total, unit
        self.images_per_unit = 1 if unit == "images" else images_per_unit
        self.done = 0
        self._shown: dict[str, object] = {}
        self._started = self._last = time.monotonic()
        self._measured = 0.0
        self._done_before = 0
        self._bar = sys.stderr.isatty() and not log_is_json()
        self._interval_seconds = _BAR_SECONDS if self._bar else _LINE_SECONDS

    def resume(self, num_done: int) -> None:
        """Count what an interrupted call did before; it is no part of the rate."""
        self.done += num_done
        self._done_before += num_done
        self._tell()

    def update(self, num_done: int = 1, **shown: object) -> None:
        """Count `num_done` more; `shown` are details beside the count, for example `loss=0.31`."""
        self.done += num_done
        self._shown.update(shown)
        self._tell()
        now = time.monotonic()
        if now - self._last >= self._interval_seconds:
            self._last = now
            self._show(now)
        if now - self._measured >= _MEASURE_SECONDS:
            self._measure(now)

    def _tell(self) -> None:
        for observe in observers:
            observe(self.stage, self.done, self.total)

    def _measure(self, now: float) -> None:
        self._measured = now
        if metrics.wanted():
            metrics.observe_progress(
                self.stage, self.unit, self.done, self.total, self._rate(now), self.images_per_unit
            )

    def _rate(self, now: float) -> float:
        """Return the things done a second; those of an interrupted call before don't count."""
        return (self.done - self._done_before) / max(now - self._started, 1e-9)

    def note(self, event: str, **fields: object) -> None:
        """Say that something happened, on a line of its own."""
        if self._bar:
            self._write("")
        log_event(self.stage, event, **fields)

    def __enter__(self) -> Self:
        """Start the clock."""
        self._started = self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar off the line, so that what follows starts on a clean one."""
        if self._bar:
            self._write("")
        self._measure(time.monotonic())

    def _show(self, now: float) -> None:
        rate = self._rate(now)
        if self._bar:
            self._write(self._line(rate))
            return
        total = {"of": self.total} if self.total else {}
        fields = {self.unit: self.done, **total, "per_second": round(rate, 1), **self._shown}
        log_event(self.stage, "progress", **fields)

    def _line(self, rate: float) -> str:
        details = "".join(
            f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value}"
            for name, value in self._shown.items()
        )
        if not self.total:
            return f"{self.stage}  {self.done} {self.unit}  {rate:.0f}/s{details}"
        fraction = min(self.done / self.total, 1.0)
        filled = round(fraction * _BAR_WIDTH)
        bar = "━" * filled + "╌" * (_BAR_WIDTH - filled)
        left_seconds = (self.total - self.done) / rate if rate else 0
        return (
            f"{self.stage}  {bar} {fraction:4.0%}  {self.done}/{self.total} {self.unit}  "
            f"{_clock(left_seconds)} left{details}"
        )

    @staticmethod
    def _write(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r\x1b[K" + line[:width])
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"
