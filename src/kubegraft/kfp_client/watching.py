"""A run, watched until it ends: a line for each task whose state changes, patience with a network that doesn't."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, Final

from kubegraft.errors import ClusterError, KubegraftError
from kubegraft.kfp_client.backend import Backend
from kubegraft.reporting.events import log_event

FINISHED: Final = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
_GOOD: Final = ("SUCCEEDED", "SKIPPED")
_STAGE: Final = "kfp"
_MOST_FAILED_POLLS: Final = 6
_UNAUTHORIZED: Final = 401


def watch(
    backend: Backend,
    run_id: str,
    tasks: Collection[str],
    *,
    poll_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Report on a run until it ends, and return it.

    Args:
        backend: Where it runs.
        run_id: Which.
        tasks: Names of the tasks to report on; drivers and executors have names of their own.
        poll_seconds: Time between two looks.
        sleep: Waits; a test need not.

    Raises:
        KubegraftError: If the run failed or was cancelled.
        ClusterError: If the API stays away for several looks.
    """
    seen: dict[str, str] = {}
    while True:
        run = _patiently(backend, run_id, poll_seconds, sleep)
        _report(run, tasks, seen)
        if run.state in FINISHED:
            return _checked(run, backend, seen)
        sleep(poll_seconds)


def _patiently(backend: Backend, run_id: str, poll_seconds: float, sleep: Callable[[float], None]) -> Any:
    for failures in range(1, _MOST_FAILED_POLLS + 1):
        try:
            return backend.get_run(run_id)
        except ClusterError as error:
            if failures == _MOST_FAILED_POLLS or error.status in (403, 404):
                raise
            log_event(_STAGE, "no answer", attempt=failures, status=error.status)
            sleep(poll_seconds)
            if error.status == _UNAUTHORIZED:
                backend.reconnect()
    raise AssertionError  # pragma: no cover - the last attempt returns or raises


def _report(run: Any, tasks: Collection[str], seen: dict[str, str]) -> None:
    details = (run.run_details.task_details if run.run_details else None) or ()
    states = {task.display_name: str(task.state) for task in details if task.display_name in tasks}
    for name, state in {"run": str(run.state), **states}.items():
        if seen.get(name) != state and state not in ("None", "RUNTIME_STATE_UNSPECIFIED"):
            log_event(_STAGE, state.lower(), task=name)
            seen[name] = state


def _checked(run: Any, backend: Backend, seen: dict[str, str]) -> Any:
    if run.state in _GOOD:
        return run
    failed = [name for name, state in seen.items() if state == "FAILED" and name != "run"]
    said = f" {run.error.message}" if run.error and run.error.message else ""
    where = f" in {', '.join(failed)}" if failed else ""
    raise KubegraftError(
        f"The run must succeed. Received: {run.state}{where}.{said} That task's log ends with the reason: "
        f"{backend.link('runs', run.run_id)}"
    )
