"""Ends this process when something takes too long, even where no Python can run any more.

A worker whose peers never come hangs inside TensorFlow, which holds Python's lock all the while: no thread, timer or
signal handler of Python's gets a turn (facts by experiment, docs/adr/0017). Linux's own timers can call a C function;
`_exit` is one. Where Python does run, a thread is quicker and says a last word before.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from kubegraft.errors import PeerLost
from kubegraft.reporting.events import log_event

_CLOCK_MONOTONIC: Final = 1
_NOTIFY_BY_THREAD: Final = 2  # SIGEV_THREAD
_POLL_SECONDS: Final = 0.5
# How much later than the thread, which can say why, the timer ends the process.
_GRACE_SECONDS: Final = 3.0


class Watchdog:
    """At most one deadline at a time; when it passes, the process ends with exit code 75.

    Attributes:
        last_words: Called with the reason before the process ends, where Python still runs; must not raise or block.
    """

    def __init__(self) -> None:
        """Nothing is watched yet; timer and thread are made with the first deadline."""
        self.last_words: Callable[[str], None] = lambda reason: None
        self._timer: _Timer | None = None
        self._deadline = float("inf")
        self._reason = ""

    def arm(self, seconds: float, reason: str) -> None:
        """End this process in so many seconds, unless `arm` or `disarm` is called before."""
        self._reason, self._deadline = reason, time.monotonic() + seconds
        if self._timer is None:
            self._timer = _Timer()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self._timer.set(seconds + _GRACE_SECONDS)

    def disarm(self) -> None:
        """Let the process live."""
        self._deadline = float("inf")
        if self._timer:
            self._timer.set(0.0)

    @contextlib.contextmanager
    def limit(self, seconds: float, reason: str) -> Iterator[None]:
        """End this process if the block takes longer than so many seconds."""
        self.arm(seconds, reason)
        own = self._deadline
        try:
            yield
        finally:
            if self._deadline == own:  # else what went wrong within has set one, which stays
                self.disarm()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() > self._deadline:
                self.last_words(self._reason)
                log_event("workers", "failed", reason=self._reason, exit_code=PeerLost.exit_code)
                os._exit(PeerLost.exit_code)


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("pointer", ctypes.c_void_p))


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux, 64 bytes."""

    _fields_ = (
        ("value", _Value),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Interval(ctypes.Structure):
    _fields_ = (("again", _Time), ("first", _Time))


class _Timer:
    """A timer that calls `_exit(75)` in a thread that the C library makes."""

    def __init__(self) -> None:
        self._library = _library_with("timer_create")
        self._id = ctypes.c_void_p()
        if self._library is None:
            return
        leave = ctypes.cast(self._library._exit, ctypes.c_void_p).value
        event = _Event(value=_Value(number=PeerLost.exit_code), notify=_NOTIFY_BY_THREAD, function=leave)
        if self._library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)):
            self._library = None

    def set(self, seconds: float) -> None:
        """Call it in so many seconds; 0 for never."""
        if self._library is None:  # not Linux: without the exit code, but no hang either
            faulthandler.cancel_dump_traceback_later()
            if seconds:
                faulthandler.dump_traceback_later(seconds, exit=True)
            return
        whole = int(seconds)
        first = _Time(whole, int((seconds - whole) * 1e9))
        self._library.timer_settime(self._id, 0, ctypes.byref(_Interval(_Time(), first)), None)


def _library_with(name: str) -> Any:
    """Return the C library that has a function, or None; before glibc 2.34 timers are in one of their own."""
    if not sys.platform.startswith("linux"):
        return None
    for library in (None, "librt.so.1"):
        with contextlib.suppress(OSError):
            found = ctypes.CDLL(library)
            if hasattr(found, name) and hasattr(found, "_exit"):
                return found
    return None


WATCHDOG: Final = Watchdog()
