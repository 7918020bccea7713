"""Metrics for Prometheus, where somebody wants them; else nothing happens and nothing is imported.

`KUBEGRAFT_METRICS_PORT` serves them over HTTP, `KUBEGRAFT_METRICS_FILE` writes them to a file. Values come from the
events and the progress that stages report anyway. `kubegraft run` serves for the processes of its stages: each leaves
its board as a file in a directory that the run names. Trouble with metrics is a warning, never a failed run.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kubegraft.reporting.measures import MEASURES, STATES, Board

PORT_VARIABLE: Final = "KUBEGRAFT_METRICS_PORT"
FILE_VARIABLE: Final = "KUBEGRAFT_METRICS_FILE"
# Between a run and the processes of its stages.
DIRECTORY_VARIABLE: Final = "KUBEGRAFT_METRICS_DIR"
_OWNER_VARIABLE: Final = "KUBEGRAFT_METRICS_OWNER"
_WRITE_SECONDS: Final = 1.0
_OF_AN_EPOCH: Final = (
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "learning_rate",
)


def wanted() -> bool:
    """Return whether this process keeps metrics: somebody asked for them, and no process above serves them."""
    names = (PORT_VARIABLE, FILE_VARIABLE, DIRECTORY_VARIABLE)
    if not any(os.environ.get(name) for name in names):
        return False
    return bool(os.environ.get(DIRECTORY_VARIABLE)) or os.environ.get(_OWNER_VARIABLE, "") in (
        "",
        str(os.getpid()),
    )


class _Metrics:
    """The board of this process, and where its values go."""

    def __init__(self) -> None:
        self.board = Board()
        self.started: dict[str, float] = {}
        self._written = 0.0
        self._close: Callable[[], None] | None = None

    def state(self, stage: str, state: str) -> None:
        for name in STATES:
            self.board.set("stage_state", stage, name == state, name)

    def is_in(self, stage: str, state: str) -> bool:
        return bool(self.board.get("stage_state", stage, state))

    def ended_well(self, stage: str) -> None:
        self.state(stage, "done")
        self.board.set("last_success_timestamp_seconds", stage, time.time())

    def show(self, *, at_once: bool) -> None:
        """Hand the values on: to the run's directory, or to the exporter, which is started when first needed."""
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if self._close is not None or not wanted():
            return
        if not directory:
            self.export(None)
        elif at_once or time.monotonic() - self._written > _WRITE_SECONDS:
            self._written = time.monotonic()
            _leave(self.board, Path(directory))

    def export(self, directory: Path | None) -> None:
        if self._close is None:
            self._close = lambda: None  # a warning from the exporter comes through here again
            os.environ[_OWNER_VARIABLE] = str(os.getpid())
            from kubegraft.reporting.exporter import start

            self._close = start(
                self.board, os.environ.get(PORT_VARIABLE, ""), os.environ.get(FILE_VARIABLE, ""), directory
            )
            atexit.register(self.close)

    def close(self) -> None:
        """Write the file a last time, and close the port."""
        if self._close is not None:
            close, self._close = self._close, lambda: None  # or the writer's last warning would start it anew
            close()
            self._close = None
            atexit.unregister(self.close)
            os.environ.pop(_OWNER_VARIABLE, None)


_metrics = _Metrics()


def _leave(board: Board, directory: Path) -> None:
    """Write the board for the run that started this process; a full disk is the stage's concern."""
    path = directory / f"{os.getpid()}.json"
    aside = path.with_suffix(".partial")
    with contextlib.suppress(OSError):
        aside.write_text(board.to_json(), encoding="utf-8")
        aside.replace(path)


def observe_event(stage: str, event: str, fields: Mapping[str, Any]) -> None:
    """Take what an event of the log says."""
    metrics = _metrics
    if event == "started":
        metrics.started[stage] = time.monotonic()
        metrics.state(stage, "running")
    elif event == "finished":
        metrics.ended_well(stage)
        if stage in metrics.started:
            metrics.board.set("stage_duration_seconds", stage, time.monotonic() - metrics.started[stage])
    elif event == "reused":
        metrics.board.add("stage_reuses_total", stage)
        metrics.ended_well(stage)
    elif event == "continuing":
        metrics.board.add("stage_resumes_total", stage)
    elif event == "failed" and "type" in fields:
        failed(stage, str(fields["type"]))
    elif event == "retrying":
        metrics.board.add("storage_retries_total", stage)
    metrics.show(at_once=event != "retrying")


def failed(stage: str, kind: str) -> None:
    """Take that a stage failed; said twice of one failure, it counts once."""
    if _metrics.is_in(stage, "failed"):
        return
    _metrics.board.add("stage_failures_total", stage, kind)
    _metrics.state(stage, "failed")
    _metrics.show(at_once=True)


def observe_progress(stage: str, unit: str, done: int, total: int, rate: float, images_per_unit: int) -> None:
    """Take how far a stage is; `images_per_unit` of 0 means that its items are no images."""
    board = _metrics.board
    board.set("progress_items", stage, done, unit)
    board.set("progress_items_per_second", stage, rate, unit)
    if total:
        board.set("progress_items_target", stage, total, unit)
    if images_per_unit:
        board.set("images_per_second", stage, rate * images_per_unit)
    _metrics.show(at_once=False)


def observe_epoch(stage: str, num_epochs: int, result: Mapping[str, float], best: float) -> None:
    """Take what an epoch came to: `epoch`, counted from 0, and the fields that the log has of it.

    A head that is solved for has a weight decay in the place of each epoch, and no learning rate.
    """
    board = _metrics.board
    board.set("epoch", stage, result["epoch"] + 1)
    board.set("epochs_target", stage, num_epochs)
    board.set("best_validation_accuracy", stage, best)
    for name in _OF_AN_EPOCH:
        if name in result:
            board.set(name, stage, result[name])
    _metrics.show(at_once=False)


def observe_counts(name: str, stage: str, counts: Mapping[str, int]) -> None:
    """Set a measure that has one label, such as `bad_images` by reason; absent reasons are left as they are."""
    for label, value in counts.items() if name in MEASURES else ():
        _metrics.board.set(name, stage, value, label)
    _metrics.show(at_once=False)


@contextlib.contextmanager
def watching(stage: str) -> Iterator[None]:
    """Take that the stage failed, if the block raises."""
    try:
        yield
    except BaseException as error:
        if wanted():
            failed(stage, type(error).__name__)
        raise


@contextlib.contextmanager
def serving_run() -> Iterator[None]:
    """Serve the metrics of a whole run within the block: of this process and of those that it starts."""
    if not wanted() or os.environ.get(DIRECTORY_VARIABLE):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="kubegraft-metrics-", ignore_cleanup_errors=True) as directory:
        _metrics.export(Path(directory))
        os.environ[DIRECTORY_VARIABLE] = directory
        observe_event("run", "started", {})
        try:
            with watching("run"):
                yield
            observe_event("run", "finished", {})
        finally:
            _metrics.close()
            os.environ.pop(DIRECTORY_VARIABLE, None)
