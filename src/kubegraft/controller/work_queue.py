"""Which objects have to be looked at: each at most once in the queue, and by one worker at a time."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

_FIRST_SECONDS: Final = 0.5
_MOST_SECONDS: Final = 120.0
Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """Keys to work on, with timers and back-off.

    A key that is added while it waits is not added again; one that is added while a worker has it is worked on once
    more afterwards. So any number of events about one object cost one or two reconciles. Not for threads.
    """

    def __init__(
        self,
        *,
        observe_depth: Callable[[int], None] = lambda _: None,
        is_urgent: Callable[[Key], bool] = lambda _: False,
    ) -> None:
        """Begin empty.

        Args:
            observe_depth: Told how many keys wait.
            is_urgent: Whether a key goes before those that are not.
        """
        self._waiting: asyncio.PriorityQueue[tuple[int, int, Key | None]] = asyncio.PriorityQueue()
        self._order, self._is_urgent = itertools.count(), is_urgent
        self._wanted: set[Key] = set()
        self._working: dict[Key, float] = {}
        self._timers: dict[Key, tuple[float, asyncio.TimerHandle]] = {}
        self._failures: dict[Key, int] = {}
        self._closed = False
        self._observe_depth = observe_depth

    def __len__(self) -> int:
        """Return how many keys wait, timers aside."""
        return self._waiting.qsize()

    def add(self, key: Key) -> None:
        """Have a key worked on."""
        if key in self._wanted or self._closed:
            return
        self._wanted.add(key)
        if key not in self._working:
            self._put(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have a key worked on after some time; of several times the earliest holds."""
        due = time.monotonic() + seconds
        if self._closed or (key in self._timers and self._timers[key][0] <= due):
            return
        self._cancel_timer(key)
        handle = asyncio.get_running_loop().call_later(seconds, self._fire, key)
        self._timers[key] = (due, handle)

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """Have a key worked on again after a failure, each time later; return after how many seconds.

        Args:
            key: What failed.
            at_least: Seconds that the server asked for.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = min(_FIRST_SECONDS * 2.0 ** min(failures - 1, 20), _MOST_SECONDS)
        seconds = max(seconds * random.uniform(0.8, 1.2), at_least)
        self.add_after(key, seconds)
        return seconds

    def forget(self, key: Key) -> None:
        """Let a key's next failure be its first."""
        self._failures.pop(key, None)

    def longest_work_seconds(self) -> float:
        """Return for how long the slowest worker has been at its key; 0.0 if none is at work."""
        now = time.monotonic()
        return now - min(self._working.values(), default=now)

    async def work(self, worker: Callable[[Key], Awaitable[None]]) -> None:
        """Work on keys until the queue is closed, and end what was begun; several may run at once.

        Args:
            worker: Called with a key; must not raise.
        """
        while (key := (await self._waiting.get())[-1]) is not None:
            self._wanted.discard(key)
            self._working[key] = time.monotonic()
            self._observe_depth(len(self))
            try:
                await worker(key)
            finally:
                del self._working[key]
            if key in self._wanted:
                self._put(key)
        self._put_end()  # for the next worker

    def close(self) -> None:
        """Let every worker end what it is at, and take nothing more."""
        self._closed = True
        self._wanted.clear()
        for key in list(self._timers):
            self._cancel_timer(key)
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._put_end()

    def _put(self, key: Key) -> None:
        self._waiting.put_nowait((0 if self._is_urgent(key) else 1, next(self._order), key))
        self._observe_depth(len(self))

    def _put_end(self) -> None:
        self._waiting.put_nowait((2, next(self._order), None))

    def _fire(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _cancel_timer(self, key: Key) -> None:
        if key in self._timers:
            self._timers.pop(key)[1].cancel()
