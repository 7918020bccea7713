"""One event a line on standard error, for people in a terminal and for a pod's log."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import Any, Final

from kubegraft.reporting import metrics

LOG_FORMAT_VARIABLE: Final = "KUBEGRAFT_LOG_FORMAT"
RUN_NAME_VARIABLE: Final = "KUBEGRAFT_RUN_NAME"
_RUN_PID_VARIABLE: Final = "KUBEGRAFT_RUN_PID"  # as in processes.py
_LEVELS: Final = {"failed": "error", "warning": "warning", "retrying": "warning", "no answer": "warning"}


def log_is_json() -> bool:
    """Return whether events are JSON objects."""
    return os.environ.get(LOG_FORMAT_VARIABLE) == "json"


def run_name() -> str:
    """Return the name of the run that this process works for; "" where nobody gave it one."""
    return os.environ.get(RUN_NAME_VARIABLE, "")


def log_event(stage: str, event: str, **fields: Any) -> None:
    """Print one event; as JSON where `KUBEGRAFT_LOG_FORMAT=json`.

    A JSON line begins with `time` (RFC 3339, UTC), `level`, `run` (where it has a name), `stage` and `event`. A line of
    text ends with the run's name where a cluster gave it one.

    Args:
        stage: Stage that speaks, for example `train_head`.
        event: What happened, in one word or a short phrase.
        fields: Details; values must be JSON scalars.
    """
    run = run_name()
    if log_is_json():
        line = json.dumps(
            {
                "time": _time(),
                "level": _LEVELS.get(event, "info"),
                **({"run": run} if run else {}),
                "stage": stage,
                "event": event,
                **fields,
            }
        )
    else:
        if run and not os.environ.get(_RUN_PID_VARIABLE):  # `kubegraft run` shows lines of one run only
            fields["run"] = run
        details = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        line = f"{time.strftime('%H:%M:%S')} {stage}: {event}{'  ' if details else ''}{details}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the one place that prints
    if metrics.wanted():
        metrics.observe_event(stage, event, fields)


def _time() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    # Quoted, a line break in a file name does not break the line; letters beyond ASCII stay readable.
    is_word = text and " " not in text and text.isprintable()
    return text if is_word else json.dumps(text, ensure_ascii=False)
