"""One event a line on standard error, for people in a terminal and for a pod's log."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Final

LOG_FORMAT_VARIABLE: Final = "KUBEGRAFT_LOG_FORMAT"


def log_event(stage: str, event: str, **fields: Any) -> None:
    """Print one event; as JSON where `KUBEGRAFT_LOG_FORMAT=json`.

    Args:
        stage: Stage that speaks, for example `train_head`.
        event: What happened, in one word or a short phrase.
        fields: Details; values must be JSON scalars.
    """
    if os.environ.get(LOG_FORMAT_VARIABLE) == "json":
        line = json.dumps({"time": time.time(), "stage": stage, "event": event, **fields})
    else:
        details = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        line = f"{time.strftime('%H:%M:%S')} {stage}: {event}{'  ' if details else ''}{details}"
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the one place that prints


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    # Quoted, a line break in a file name does not break the line; letters beyond ASCII stay readable.
    is_word = text and " " not in text and text.isprintable()
    return text if is_word else json.dumps(text, ensure_ascii=False)
