"""How workers keep pace: what they agree on at each step, how long they wait, and when that is too long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from kubegraft.training.steps import NUM_SUMS, NUM_TOLD
from kubegraft.training.watchdog import WATCHDOG
from kubegraft.training.workers import Workers

STEP_SECONDS_VARIABLE: Final = "KUBEGRAFT_STEP_SECONDS"
# A dead or frozen process is noticed by its heartbeat, in seconds. This is for one that is alive and does not go on.
_STEP_SECONDS: Final = 50.0
_SLOWEST_FACTOR: Final = 5.0
# The first step traces and compiles the graph; a pause writes a checkpoint or validates.
_PAUSE_SECONDS: Final = 900.0

# Whether to stop, and whether to save a checkpoint.
Decisions = Callable[[], tuple[bool, bool]]


@dataclass(frozen=True, slots=True)
class Told:
    """What holds for all workers after a step.

    Attributes:
        stop: Whether any of them was asked to stop.
        save: Whether the chief wants a checkpoint.
        elapsed_seconds: The chief's time in training and validation.
    """

    stop: bool
    save: bool
    elapsed_seconds: float


class Pace:
    """One training's agreement at each step, and its speed."""

    def __init__(self, workers: Workers) -> None:
        """Measure nothing yet."""
        self._workers = workers
        self._limit = float(os.environ.get(STEP_SECONDS_VARIABLE) or _STEP_SECONDS)
        self._slowest, self._paused = 0.0, True
        self._started = self._before = 0.0
        self._num_images = self._num_steps = self._seconds = self._waited = 0.0

    def begin(self, elapsed_seconds: float) -> None:
        """Start the clock of an epoch."""
        self._started, self._before = time.monotonic(), elapsed_seconds
        self._num_images = self._num_steps = self._seconds = self._waited = 0.0
        self._paused = True

    def tell(self, decisions: Decisions) -> np.ndarray | None:
        """Return what this worker tells the others in a step, `float32[NUM_TOLD]`; None where there are none."""
        if self._workers.alone:
            return None
        stop, save = decisions()
        chief = self._workers.is_chief
        return np.array([stop, save and chief, self.elapsed() if chief else 0.0], np.float32)

    def told(self, results: np.ndarray, decisions: Decisions) -> Told:
        """Return what holds after a call of the graph; for a process that trains alone what it says itself.

        Args:
            results: What the steps of the call came to; see `steps.Steps`.
            decisions: Asked for what this process would do alone.
        """
        if self._workers.alone:
            stop, save = decisions()
            return Told(stop, save, self.elapsed())
        stop, save, elapsed = results[-1, NUM_SUMS : NUM_SUMS + NUM_TOLD]
        self._num_images += float(results[:, 2].sum())
        self._num_steps += len(results)
        self._waited += float(results[:, -1].sum())
        self._seconds = time.monotonic() - self._started
        return Told(bool(stop > 0), bool(save > 0), float(elapsed))

    def watch(self, calls: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield what the calls of an epoch come to; end this process with exit code 75 where one takes too long."""
        if self._workers.alone:
            yield from calls
            return
        iterator = iter(calls)
        while True:
            seconds = self._patience()
            with WATCHDOG.limit(
                seconds, f"a step was not done in {seconds:g} s: another worker does not go on"
            ):
                started = time.monotonic()
                results = next(iterator, None)
            if results is None:
                return
            took = time.monotonic() - started
            # Part of a step after a pause is the pause, or the compiler's.
            self._slowest = max(self._slowest, took / 2 if self._paused else took)
            self._paused = False
            yield results

    def expect_pause(self) -> None:
        """Give the next step more time, since the chief does something else before."""
        self._paused = True

    def measures(self) -> dict[str, float]:
        """Return the speed of the epoch, as the chief saw it; nothing where there are no other workers.

        `scaling_efficiency` is the speed as a share of what the workers would do together if none ever waited: for
        a slower one, for the gradients to travel.
        """
        if self._workers.alone or not self._seconds:
            return {}
        waiting = min(self._waited / self._seconds, 1.0)
        found = {
            "num_steps": self._num_steps,
            "images_per_second": round(self._num_images / self._seconds, 3),
            "waiting_seconds": round(self._waited, 3),
            "waiting_fraction": round(waiting, 4),
            "scaling_efficiency": round(1 - waiting, 4),
        }
        measures: dict[str, float] = self._workers.share(found)
        return measures

    def elapsed(self) -> float:
        """Return the seconds of training and validation so far, by this process's clock."""
        return self._before + time.monotonic() - self._started

    def _patience(self) -> float:
        patient = max(self._limit, _SLOWEST_FACTOR * self._slowest)
        return max(patient, _PAUSE_SECONDS) if self._paused else patient
