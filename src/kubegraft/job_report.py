"""What a pod of a TransferJob says about itself: lines on stdout while it works, a file at its end.

The pods write reports (`worker_job`), the controller reads them; so this module needs the standard library only.
Kubernetes keeps 4 KiB of a termination message, a report stays under 3 KiB.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# The stages of a job in their order; `""` is "not begun".
STAGES: Final = ("ingest", "train_head", "fine_tune", "evaluate", "export")
_KEY: Final = "kubegraft_report"
_MAX_MESSAGE: Final = 1024
_MAX_BYTES: Final = 3 * 1024 - 1
_MAX_SHORT: Final = 256
_MAX_URI: Final = 512
_MAX_METRICS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The state of one pod's part of a job.

    Attributes:
        stage: One of `STAGES`, or `""` before the first.
        progress: Percent of that stage, 0 to 100.
        metrics: Finite numbers, such as `validation_accuracy`, `images_per_second`, `scaling_efficiency`.
        model_uri: Where the export is; of `finish`.
        dataset_digest: Of `prepare`.
        done: Whether this pod's part is finished.
        error: Class name of a `KubegraftError`, or `""`.
        message: What the error says, bounded to 1,024 characters.
        exit_code: How the process ends; 0 while it works.
    """

    stage: str = ""
    progress: int = 0
    metrics: Mapping[str, float] = field(default_factory=lambda: types.MappingProxyType({}))
    model_uri: str = ""
    dataset_digest: str = ""
    done: bool = False
    error: str = ""
    message: str = ""
    exit_code: int = 0

    def to_json(self) -> str:
        """Return one line of JSON under 3 KiB; the message is cut to what is left for it."""
        values = _bounded(self)
        line = _line(values)
        # A cut by whole characters: each may take several bytes, and more where JSON escapes it.
        while (excess := len(line.encode()) - _MAX_BYTES) > 0 and values["message"]:
            values["message"] = values["message"][: -max(1, excess // 12)]
            line = _line(values)
        return line


def parse_report(text: str) -> Report | None:
    """Return the report that `text` is, or None for anything else; unknown keys are ignored, nothing is raised."""
    try:
        values = json.loads(text)[_KEY]
        known = {each.name for each in dataclasses.fields(Report)}
        return _read({name: value for name, value in values.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def latest_report(log_text: str) -> Report | None:
    """Return the last report among the lines of a log, or None."""
    for line in reversed(log_text.splitlines()):
        if _KEY in line and (report := parse_report(line.strip())):
            return report
    return None


def _bounded(report: Report) -> dict[str, Any]:
    finite = {str(name)[:64]: float(value) for name, value in report.metrics.items() if math.isfinite(value)}
    return {
        "stage": report.stage[:_MAX_SHORT],
        "progress": report.progress,
        "metrics": {name: round(finite[name], 6) for name in list(finite)[:_MAX_METRICS]},
        "model_uri": report.model_uri[:_MAX_URI],
        "dataset_digest": report.dataset_digest[:_MAX_SHORT],
        "done": report.done,
        "error": report.error[:_MAX_SHORT],
        "message": report.message[:_MAX_MESSAGE],
        "exit_code": report.exit_code,
    }


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({_KEY: values}, ensure_ascii=False, separators=(",", ":"))


def _read(values: dict[str, Any]) -> Report:
    """Return the report; raise TypeError or ValueError for a value of another type."""
    for name, default in _bounded(Report()).items():
        value = values.get(name, default)
        if type(value) is not type(default) and not (isinstance(default, Mapping) and value == {}):
            raise TypeError(name)
    metrics = {str(name): float(value) for name, value in values.get("metrics", {}).items()}
    if not all(map(math.isfinite, metrics.values())):
        raise ValueError("metrics")
    values = values | {
        "metrics": types.MappingProxyType(metrics),
        "progress": min(max(values.get("progress", 0), 0), 100),
    }
    return Report(**values)
