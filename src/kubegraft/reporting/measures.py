"""What is measured, under which names, and the board that a process keeps it on.

Needs the standard library only, so that a stage pays nothing for metrics but a few numbers; `exporter` turns boards
into Prometheus' text format.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric.

    Attributes:
        kind: `counter` or `gauge`, as Prometheus has them.
        text: What it says, with its unit.
        labels: Labels besides `run` and `stage`.
    """

    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...] = ()


def _gauge(text: str, *labels: str) -> Measure:
    return Measure("gauge", text, labels)


def _counter(text: str, *labels: str) -> Measure:
    return Measure("counter", text, labels)


STATES: Final = ("running", "done", "failed")
# By the part of the name after `kubegraft_`; a counter's ends in `_total`. docs/operations.md has the same list.
MEASURES: Final[Mapping[str, Measure]] = {
    "stage_state": _gauge("1 for the state that the stage is in, 0 for the others.", "state"),
    "stage_failures_total": _counter("How often the stage failed, by the error's class.", "error"),
    "stage_resumes_total": _counter("How often the stage continued from a checkpoint."),
    "stage_reuses_total": _counter("How often a finished output was used again."),
    "stage_duration_seconds": _gauge("How long the stage's last call took."),
    "last_success_timestamp_seconds": _gauge("When the stage last succeeded, as seconds since 1970."),
    "progress_items": _gauge("How many of its items the stage has done.", "unit"),
    "progress_items_target": _gauge("How many items the stage has to do.", "unit"),
    "progress_items_per_second": _gauge("Items a second since the stage's progress began.", "unit"),
    "images_per_second": _gauge("Images a second since the stage's progress began."),
    "epoch": _gauge("Epochs that are done."),
    "epochs_target": _gauge("Epochs at most."),
    "train_loss": _gauge("Mean loss over the last epoch's training images."),
    "train_accuracy": _gauge("Accuracy over the last epoch's training images, a fraction."),
    "validation_loss": _gauge("Mean loss over the validation split after the last epoch."),
    "validation_accuracy": _gauge("Accuracy on the validation split after the last epoch, a fraction."),
    "best_validation_accuracy": _gauge("Best validation accuracy so far, a fraction."),
    "learning_rate": _gauge("Learning rate at the last epoch's end."),
    "images": _gauge("Images of the dataset, by split.", "split"),
    "bad_images": _gauge("Files of the source that were set aside, by reason.", "reason"),
    "storage_retries_total": _counter("Reads and writes of a store that were tried again."),
}


class Board:
    """The present values of one process; safe to read while another thread writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}

    def set(self, name: str, stage: str, value: float, *labels: str) -> None:
        """Set a value; `labels` in the order of the measure's."""
        with self._lock:
            self._values[name, (stage, *labels)] = float(value)

    def add(self, name: str, stage: str, *labels: str) -> None:
        """Count one more."""
        with self._lock:
            key = name, (stage, *labels)
            self._values[key] = self._values.get(key, 0.0) + 1.0

    def get(self, name: str, stage: str, *labels: str) -> float:
        """Return a value; 0.0 where there is none."""
        with self._lock:
            return self._values.get((name, (stage, *labels)), 0.0)

    def values(self) -> dict[tuple[str, Labels], float]:
        """Return a copy: (name, labels with the stage first) -> value."""
        with self._lock:
            return dict(self._values)

    def to_json(self) -> str:
        """Return the values as JSON, for another process."""
        return json.dumps([[name, labels, value] for (name, labels), value in self.values().items()])


def from_json(text: str) -> dict[tuple[str, Labels], float]:
    """Return what `Board.to_json` wrote, as `Board.values` gives it.

    Raises:
        ValueError: If it is something else.
    """
    rows: Any = json.loads(text)
    return {(name, tuple(labels)): float(value) for name, labels, value in rows if name in MEASURES}


def merged(
    boards: Iterable[Mapping[tuple[str, Labels], float]],
) -> dict[tuple[str, Labels], float]:
    """Return the values of several processes: counters summed, of gauges the last."""
    found: dict[tuple[str, Labels], float] = {}
    for board in boards:
        for key, value in board.items():
            counted = MEASURES[key[0]].kind == "counter"
            found[key] = found.get(key, 0.0) + value if counted else value
    return found
