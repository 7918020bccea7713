"""Whether a device waits for its input: measured, and said with what helps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

from kubegraft.reporting.events import log_event

# A device that waits longer than this share of the time would be faster with a faster input.
STARVED_SHARE: Final = 0.2
# The first batches fill the buffers.
_WARM_UP: Final = 3
_FEWEST_BATCHES: Final = 10


class WatchedInput:
    """Passes on an epoch's batches, and says once in its life if whoever takes them waits for them too long."""

    def __init__(self) -> None:
        """Nothing has been measured yet."""
        self.waited_share = 0.0
        self._said = False

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of one epoch.

        Args:
            batches: A stream that computes ahead in threads of its own.
        """
        number, waited, started = 0, 0.0, time.perf_counter()
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            if number < _WARM_UP:
                waited, started = 0.0, time.perf_counter()
            else:
                waited += time.perf_counter() - asked
            number += 1
            yield batch
        if number - _WARM_UP >= _FEWEST_BATCHES:
            self.waited_share = waited / (time.perf_counter() - started)
            self._warn()

    def _warn(self) -> None:
        if self._said or self.waited_share <= STARVED_SHARE:
            return
        self._said = True
        log_event(
            "input",
            "starves the device",
            waited=round(self.waited_share, 3),
            reason="of a pass's time the device waited so much for images to be read, decoded and varied",
            advice="give the process more processors, store images nearer or smaller, or leave `augmentation` "
            "to the recipe, which trains from kept activations",
        )
