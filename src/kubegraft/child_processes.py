"""Ending a run's stage processes when the run is asked to stop.

`kfp.local` blocks on a stage's output and knows nothing of signals. So the handler passes SIGTERM on to the
processes below, which save a checkpoint and end; kfp then sees a failed task and returns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_GRACE_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.2


@dataclass(slots=True)
class StopRequest:
    """Which signals have come.

    Attributes:
        requested: Whether the run was asked to stop.
        interrupted: Whether by SIGINT, a user's ctrl-c.
    """

    requested: bool = False
    interrupted: bool = False
    _deadline: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def stopping_children() -> Iterator[StopRequest]:
    """Pass SIGTERM and SIGINT on to all processes below this one, and kill what is left after 20 seconds.

    A second signal kills at once. Outside of the main thread, where Python takes no signals, do nothing.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        stop.interrupted = stop.interrupted or number == signal.SIGINT
        if stop.requested:
            stop._deadline = 0.0
            return
        stop.requested, stop._deadline = True, time.monotonic() + _GRACE_SECONDS
        threading.Thread(target=_end_children, args=(stop,), daemon=True).start()

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        stop._ended.set()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _end_children(stop: StopRequest) -> None:
    """Ask every process below to stop, also those that start meanwhile, then kill those that are left.

    All are remembered by their id, since what a shell started belongs to another parent once it has ended.
    """
    asked: set[int] = set()
    while not stop._ended.is_set():
        for pid in descendants(os.getpid()) - asked:
            asked.add(pid)
            send(pid, signal.SIGTERM)
        if time.monotonic() >= stop._deadline:
            for pid in asked:
                send(pid, signal.SIGKILL)
        stop._ended.wait(_POLL_SECONDS)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes below `pid`."""
    children: dict[int, list[int]] = {}
    for child, parent in _processes():
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def _processes() -> Iterator[tuple[int, int]]:
    """Yield (process, its parent) for every process of the system."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():  # macOS
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            pid, parent = line.split()
            yield int(pid), int(parent)
        return
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                yield int(entry.name), int(fields[1])
