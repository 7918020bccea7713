"""Writing values: they become shards in a thread of its own, so that who computes them does not wait for the disk."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.compaction import SHARD_BYTES, merge_if_many
from kubegraft.cache.folder import PENDING, SpaceFolder
from kubegraft.cache.keys import Keys, Views, checked
from kubegraft.cache.shard_file import ShardWriter
from kubegraft.cache.space_on_disk import DiskBudget
from kubegraft.cache.spaces import FeatureSpace
from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event

if TYPE_CHECKING:
    from kubegraft.cache.bucket import BucketMirror

FLUSH_SECONDS: Final = 120.0
_NUM_WAITING: Final = 2
_NUM_TRIES: Final = 3
_BFLOAT16_EXPONENT: Final = np.uint16(0x7F80)
_PIECE_BYTES: Final = 16 * 2**20  # so that no more than 48 MiB wait or are written at any time


@dataclass(frozen=True, slots=True)
class _Rows:
    keys: Keys
    views: Views
    values: NDArray[Any]


class FeatureWriter:
    """Keeps values of one space; a context manager, which keeps what was appended however the block is left.

    Nothing that happens on the disk is an error for the caller. A full disk, a full budget or a missing permission
    end caching for this writer, with an event; a killed process loses what it appended since its last shard, which
    is finished after 256 MiB or two minutes.

    Attributes:
        num_kept: Rows in finished shards.
        num_refused: Rows that were not kept: caching had ended, or a value was not finite.
    """

    def __init__(
        self,
        space: FeatureSpace,
        folder: SpaceFolder | None,
        budget: DiskBudget | None,
        mirror: BucketMirror | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Write into a folder; None for a cache that is off. Use `FeatureCache.writer`."""
        self.space, self._folder, self._budget, self._mirror = space, folder, budget, mirror
        self._shard_bytes, self._flush_seconds = shard_bytes, flush_seconds
        if budget is not None and budget.budget_bytes is not None:
            self._shard_bytes = min(shard_bytes, max(budget.budget_bytes // 8, space.value_bytes))
        self.num_kept = self.num_refused = 0
        self._off = folder is None
        self._shard: ShardWriter | None = None
        self._started = 0.0
        self._waiting: queue.Queue[_Rows | threading.Event | None] = queue.Queue(_NUM_WAITING)
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def append(self, keys: Keys, values: NDArray[Any], views: int | Views = 0) -> None:
        """Keep values; the arrays may be changed afterwards.

        Args:
            keys: `uint8[n, 32]`.
            values: `[n, *shape]` of the space's dtype.
            views: Number of the view, or one for each key.

        Raises:
            ConfigError: If an argument has another shape or dtype.
        """
        keys, views = checked(keys, views)
        values = self._checked_values(np.asarray(values), len(keys))
        if self._failure is not None:
            raise self._failure
        if self._off or not len(keys):
            self.num_refused += len(keys)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="feature-cache", daemon=True)
            self._thread.start()
        step = max(_PIECE_BYTES // self.space.value_bytes, 1)
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            self._waiting.put(_Rows(keys[part].copy(), views[part].copy(), values[part].copy()))

    def flush(self) -> None:
        """Return when everything that was appended is in finished shards, which readers find after a `refresh`."""
        if self._thread is not None:
            done = threading.Event()
            self._waiting.put(done)
            done.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Finish the last shard, and upload what a bucket lacks. Closing twice is no error."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
            if self._folder is not None:
                self._hand_over(self._folder)
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, whatever ended the block: what was appended is right."""
        self.close()

    def _hand_over(self, folder: SpaceFolder) -> None:
        if self._mirror is not None:
            self._mirror.push(folder)
        elif not self._off:
            merge_if_many(folder)

    def _checked_values(self, values: NDArray[Any], num_rows: int) -> NDArray[Any]:
        if values.dtype.name == self.space.dtype == "bfloat16":
            values = values.view(np.uint16)
        shape, dtype = (num_rows, *self.space.shape), self.space.stored_dtype
        if values.shape != shape or values.dtype != dtype:
            raise ConfigError(
                f"`values` must be {dtype}{list(shape)}. Received: {values.dtype}{list(values.shape)}. "
                "Convert them, or describe them in the space."
            )
        return values

    def _work(self) -> None:
        """Do what is waiting until None comes; after an unexpected failure only take it away."""
        while True:
            item = self._waiting.get()
            try:
                if self._failure is None:
                    self._do(item)
            except Exception as error:  # kept for the caller's thread, which raises it
                self._failure = error
            if isinstance(item, threading.Event):
                item.set()
            elif item is None:
                return

    def _do(self, item: _Rows | threading.Event | None) -> None:
        try:
            if isinstance(item, _Rows):
                self._write(item)
            elif self._shard is not None:
                self._finish()
        except OSError as error:
            self._turn_off(f"{type(error).__name__}: {error}")

    def _write(self, rows: _Rows) -> None:
        finite = _finite(rows.values)
        if not finite.all():  # such a value is a fault of the moment; kept, it would be one for ever
            self.num_refused += int((~finite).sum())
            rows = _Rows(rows.keys[finite], rows.views[finite], rows.values[finite])
        start = 0
        while start < len(rows.keys):
            if self._off:
                self.num_refused += len(rows.keys) - start
                return
            shard = self._current()
            room = max((self._shard_bytes - shard.num_bytes) // self.space.value_bytes, 1)
            part = slice(start, start + room)
            shard.append(rows.keys[part], rows.views[part], np.ascontiguousarray(rows.values[part]))
            start += len(rows.keys[part])
            full = shard.num_bytes + self.space.value_bytes > self._shard_bytes
            if full or time.monotonic() - self._started > self._flush_seconds:
                self._finish()

    def _current(self) -> ShardWriter:
        if self._shard is None:
            self._shard = self._new_shard()
            self._started = time.monotonic()
        return self._shard

    def _new_shard(self) -> ShardWriter:
        assert self._folder is not None
        for _ in range(_NUM_TRIES):  # `prune` may remove an empty folder in this very moment
            self._folder.create(self.space)
            with contextlib.suppress(FileNotFoundError):
                return ShardWriter(self._folder.new_aside(), self.space.digest, self.space.value_bytes)
        raise FileNotFoundError(f"{self._folder.path} is being removed again and again")

    def _finish(self) -> None:
        assert self._shard is not None and self._folder is not None and self._budget is not None
        shard, final = self._shard, self._folder.final_path(self._shard.aside)
        if not self._budget.make_room(shard.table_bytes):
            self._turn_off("its budget is used up by what is in use")
            return
        self._folder.create(self.space)  # `prune` may have removed the description of an empty folder
        if self._mirror is not None:
            final.with_suffix(PENDING).touch()
        try:
            shard.finish(final)
            self.num_kept += shard.num_rows
        except FileNotFoundError:  # it was taken for a killed writer's: its rows are computed again some day
            self.num_refused += shard.num_rows
            log_event("cache", "lost", rows=shard.num_rows, reason="the unfinished file was removed")
            shard.discard()
        self._shard = None

    def _turn_off(self, reason: str) -> None:
        self._off = True
        log_event("cache", "off", reason=reason, consequence="the run goes on, and keeps no further values")
        if self._shard is not None:
            self.num_refused += self._shard.num_rows
            self._shard.discard()
            self._shard = None


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows hold no infinity and nothing that is not a number: `bool[n]`."""
    rows = values.reshape(len(values), -1)
    finite: NDArray[np.bool_]
    if rows.dtype.kind == "f":
        finite = np.isfinite(rows).all(axis=1)
        return finite
    if rows.dtype == np.uint16:  # the bits of bfloat16
        finite = ((rows & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT).all(axis=1)
        return finite
    return np.ones(len(rows), bool)
