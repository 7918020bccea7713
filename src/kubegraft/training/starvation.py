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


_FROM_IMAGES: Final = (
    "images are read, decoded and varied",
    "give the process more processors, store images nearer or smaller, or leave `augmentation` to the recipe, which "
    "trains from kept activations",
)
_FROM_ROWS: Final = (
    "kept activations are read",
    "keep the work directory on a faster disk, give the process more memory, or unfreeze fewer blocks",
)
_ONCE: Final = (
    "images are read and decoded",
    "give the process more processors, or store images nearer or smaller; it happens once for each image",
)


class WatchedInput:
    """Passes on an epoch's batches, and says once in its life if whoever takes them waits for them too long."""

    def __init__(self, *, rows: bool = False, once: bool = False) -> None:
        """Nothing has been measured yet.

        Args:
            rows: Whether kept rows are waited for, in place of images.
            once: Whether this is a frozen pass, which no choice of the user's spares.
        """
        self.waited_share = 0.0
        self._what, self._advice = _FROM_ROWS if rows else _ONCE if once else _FROM_IMAGES
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
            reason=f"share of the time that the device waited until {self._what}",
            advice=self._advice,
        )
