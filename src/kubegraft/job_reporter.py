"""A pod's reports while it works on a job: lines on standard output, and the last one as its termination message."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kubegraft.job_report import Report

TERMINATION_VARIABLE: Final = "KUBEGRAFT_TERMINATION_FILE"
_DEFAULT_FILE: Final = Path("/dev/termination-log")
# Which part of its stage a phase is, in percent; the frozen pass comes before training.
_SHARES: Final[Mapping[str, tuple[int, int]]] = {
    "features": (0, 40),
    "activations": (0, 40),
    "head_search": (40, 60),
    "train_head": (40, 99),
    "fine_tune": (40, 99),
}
_REPORTED: Final = (
    "validation_accuracy",
    "test_accuracy",
    "test_accuracy_low",
    "test_accuracy_high",
    "images_per_second",
    "scaling_efficiency",
    "waiting_fraction",
)


class Reporter:
    """Says what a pod does, in few words: when its stage or the tens of its percentage change."""

    def __init__(self, *, speaks: bool = True) -> None:
        """Begin with nothing done.

        Args:
            speaks: Whether this pod prints; of several workers the chief does.
        """
        self._report, self._speaks, self._ended = Report(), speaks, False
        self._file = termination_file()

    def begin(self, stage: str) -> None:
        """Say that a stage begins."""
        self._say(dataclasses.replace(self._report, stage=stage, progress=0))

    def observe(self, phase: str, done: int, total: int) -> None:
        """Take the progress of a phase of the stage; see `reporting.progress.observers`."""
        low, high = _SHARES.get(phase, (0, 99))
        percent = low + (high - low) * min(done, total) // total if total else low
        if percent // 10 > self._report.progress // 10:
            self._say(dataclasses.replace(self._report, progress=percent))
        elif percent > self._report.progress:
            self._report = dataclasses.replace(self._report, progress=percent)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Say that the stage is done, and what it came to."""
        known = {name: metrics[name] for name in _REPORTED if name in metrics}
        self._say(dataclasses.replace(self._report, progress=100, metrics={**self._report.metrics, **known}))

    def done(self, *, dataset_digest: str = "", model_uri: str = "") -> None:
        """Say that this pod's part is finished."""
        self._end(
            dataclasses.replace(
                self._report, progress=100, done=True, dataset_digest=dataset_digest, model_uri=model_uri
            )
        )

    def fail(self, exit_code: int, error: str, message: str) -> None:
        """Say how the process ends before its part is done."""
        self._end(dataclasses.replace(self._report, exit_code=exit_code, error=error, message=message))

    def foretell(self, exit_code: int, error: str, message: str) -> None:
        """Leave the message for an end in which nothing can be said any more; `take_back` removes it."""
        self._write(
            dataclasses.replace(self._report, exit_code=exit_code, error=error, message=message).to_json()
        )

    def take_back(self) -> None:
        """Remove what was foretold."""
        self._write("")

    def _end(self, report: Report) -> None:
        if not self._ended:
            self._ended = True
            self._say(report)
            self._write(report.to_json())

    def _say(self, report: Report) -> None:
        self._report = report
        if self._speaks:
            print(report.to_json(), flush=True)  # noqa: T201 - the controller reads it in the pod's log
            sys.stdout.flush()

    def _write(self, text: str) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # a report that can't be left must not hide how the work ended
                self._file.write_text(text, encoding="utf-8")


def termination_file() -> Path | None:
    """Return where a pod's last word goes; None outside of one."""
    if named := os.environ.get(TERMINATION_VARIABLE):
        return Path(named)
    return _DEFAULT_FILE if _DEFAULT_FILE.exists() else None
