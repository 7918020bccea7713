"""How a stage's process ends: asked to stop, or orphaned by the run that started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kubegraft.errors import Interrupted, KubegraftError, StorageError
from kubegraft.reporting.events import log_event, log_is_json

WORK_DIR_VARIABLE: Final = "KUBEGRAFT_WORK_DIR"
ERROR_FILE: Final = "error.json"
RUN_PID_VARIABLE: Final = "KUBEGRAFT_RUN_PID"
_POLL_SECONDS: Final = 0.5
ORPHANED_EXIT_CODE: Final = 75
_stop = threading.Event()
_graceful = threading.Event()
_last_act: list[Callable[[], None]] = []


def catch_stop_signals() -> None:
    """End this process with exit code 143 on SIGTERM, or let `stopping_gracefully` do it.

    A process that is the first of its container would otherwise ignore the signal.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _handle_stop)


def before_stopping(act: Callable[[], None] | None) -> None:
    """Do this before a SIGTERM ends the process at once; None for nothing."""
    _last_act[:] = [act] if act else []


@contextlib.contextmanager
def watching_for_stop() -> Iterator[None]:
    """Within the block, SIGTERM does its work also while the main thread waits in native code.

    Python itself handles signals only between its own instructions, in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def follow() -> None:
        with os.fdopen(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if signal.SIGTERM in number:
                    _handle_stop()

    thread = threading.Thread(target=follow, daemon=True, name="watch-for-stop")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()


def _handle_stop(*_: object) -> None:
    _stop.set()
    if not _graceful.is_set():
        for act in _last_act:
            act()
        os._exit(Interrupted.exit_code)  # nothing is lost: what is half-written has not been renamed yet


@contextlib.contextmanager
def stopping_gracefully() -> Iterator[None]:
    """Within the block, SIGTERM only makes `stop_requested` true, so that training can save a checkpoint."""
    _graceful.set()
    try:
        yield
    finally:
        _graceful.clear()


def stop_requested() -> bool:
    """Return whether this process was asked to stop."""
    return _stop.is_set()


def end_with_run() -> None:
    """End this process when the run named in `KUBEGRAFT_RUN_PID` is gone; without that variable do nothing.

    A stage hangs on its run by a shell or a fork server only, so a killed run would leave it training on and
    holding its lock. The work directory is written so that it can be left at any moment.
    """
    run_pid = os.environ.get(RUN_PID_VARIABLE)
    if not run_pid:
        return
    threading.Thread(target=_follow, args=(int(run_pid),), daemon=True, name="end-with-run").start()


def _follow(pid: int) -> None:
    started = _start_time(pid)
    while started is not None and _start_time(pid) == started:
        time.sleep(_POLL_SECONDS)
    os._exit(ORPHANED_EXIT_CODE)


def _start_time(pid: int) -> str | None:
    """Return something that changes when `pid` is reused, or None when no live process has it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:  # noqa: PTH123
            fields = stat.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):  # noqa: PTH112 - Linux: the process is gone
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def refused_by_system(error: OSError) -> StorageError:
    """Return the error to show for what the system refused: a full disk, a path without permission."""
    return StorageError(
        f"The system refused to read or write. Received: {type(error).__name__}: {error}. Check the path, "
        "its permissions and the free space; --debug shows where it happened."
    )


@contextlib.contextmanager
def exit_on_error(stage: str) -> Iterator[None]:
    """End this process with the error's exit code, its message being the last line of the log.

    For processes that run one stage. KFP keeps the log of a failed step as an artifact, and nothing else of it
    (docs/adr/0010). The error is also left in `$KUBEGRAFT_WORK_DIR/error.json` for the run that started them.
    """
    try:
        yield
    except (KubegraftError, OSError) as caught:
        error = caught if isinstance(caught, KubegraftError) else refused_by_system(caught)
        record = {
            "stage": stage,
            "type": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
            "retryable": error.retryable,
        }
        if work_dir := os.environ.get(WORK_DIR_VARIABLE):
            with contextlib.suppress(OSError):  # a full disk must not hide that it is full
                Path(work_dir).mkdir(parents=True, exist_ok=True)
                Path(work_dir, ERROR_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if os.environ.get("KUBEGRAFT_DEBUG"):
            traceback.print_exc()
        sys.stdout.flush()  # what is buffered there would otherwise come after the last line
        details = {name: record[name] for name in ("type", "exit_code", "retryable")}
        log_event(stage, "failed", **details, **({"reason": record["message"]} if log_is_json() else {}))
        print(f"Error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise SystemExit(error.exit_code) from None
