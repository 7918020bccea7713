"""Reading cached values: every row is verified when this process first reads it."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.folder import KEYS, SHARD, SpaceFolder, touch
from kubegraft.cache.index import Entries, KeyIndex
from kubegraft.cache.keys import Keys, Views, checked
from kubegraft.cache.shard_file import (
    PAGE_BYTES,
    DamagedShard,
    Header,
    OpenShard,
    Table,
    bytes_of,
    row_crcs,
    rows_of,
    table_of,
)
from kubegraft.cache.spaces import FeatureSpace
from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event

if TYPE_CHECKING:
    from kubegraft.cache.bucket import BucketMirror

_NUM_OPEN: Final = 128
_PART_BYTES: Final = 16 * 2**20
_TOUCH_SECONDS: Final = 600.0
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})


class FeatureReader:
    """Finds and reads values of one space; safe in threads, and beside writers and `prune` in other processes.

    Attributes:
        space: The space.
        num_damaged: Rows and whole shards that were found damaged; each was said in an event and is never used.
    """

    def __init__(
        self, space: FeatureSpace, folder: SpaceFolder | None, mirror: BucketMirror | None = None
    ) -> None:
        """Open the space's folder; None for a cache that is off. Use `FeatureCache.reader`."""
        self.space, self._folder, self._mirror = space, folder, mirror
        self.num_damaged = 0
        self._index = KeyIndex()
        self._shards: list[tuple[str, Header]] = []
        self._seen: set[str] = set()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._touched: dict[int, float] = {}
        self._verified: NDArray[np.bool_] = np.zeros(0, bool)
        self._lock = threading.RLock()
        if mirror is not None and folder is not None:
            mirror.pull(folder)
        self.refresh()

    def __len__(self) -> int:
        """Return how many rows are known; a key may have several."""
        return len(self._index)

    def refresh(self) -> None:
        """Take in what was written since, by this process or another."""
        if self._folder is None:
            return
        with self._lock:
            new = []
            for file in self._folder.files(SHARD, KEYS):
                if file.stem not in self._seen:
                    self._seen.add(file.stem)
                    if loaded := self._load(file.stem):
                        self._shards.append((file.stem, loaded[0]))
                        new.append(loaded[1])
            self._index.add(new)
            grown = np.zeros(len(self._index), bool)
            grown[: len(self._verified)] = self._verified
            self._verified = grown

    def lookup(self, keys: Keys, views: int | Views = 0) -> NDArray[np.bool_]:
        """Return which keys have a value, as far as can be told without reading it: `bool[n]`.

        Args:
            keys: `uint8[n, 32]`.
            views: Number of the view, or one for each key.

        Raises:
            ConfigError: If an argument has another shape or dtype.
        """
        keys, views = checked(keys, views)
        with self._lock:
            return self._index.find(keys, views) >= 0

    def read(
        self, keys: Keys, views: int | Views = 0, out: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values, and which of them were found.

        They are read straight into the array; nothing else grows with the number or size of the shards. A row
        whose checksum is wrong is not found, unless it is somewhere else too.

        Args:
            keys: `uint8[n, 32]`, in any order, with or without repetitions.
            views: Number of the view, or one for each key.
            out: Array to fill, C-contiguous `[n, *shape]` of the space's `stored_dtype`, or None for a new one.

        Returns:
            Values `[n, *shape]`, zero where not found, and `bool[n]`.

        Raises:
            ConfigError: If an argument has another shape or dtype.
        """
        keys, views = checked(keys, views)
        values = self._target(len(keys), out)
        found = np.zeros(len(keys), bool)
        pending = np.arange(len(keys))
        with self._lock:
            while len(pending):
                entries = self._index.find(keys[pending], views[pending])
                pending, entries = pending[entries >= 0], entries[entries >= 0]
                if not len(pending):
                    break
                good = self._read_entries(
                    entries, pending, values
                )  # those that are not, are never found again
                found[pending[good]] = True
                pending = pending[~good]
        values[~found] = 0
        return values, found

    def verify(self, keys: Keys, views: int | Views = 0) -> NDArray[np.bool_]:
        """Return which values are there and right: `bool[n]`. What was not read before is read, in little memory.

        Args:
            keys: `uint8[n, 32]`.
            views: Number of the view, or one for each key.

        Raises:
            ConfigError: If an argument has another shape or dtype.
        """
        keys, views = checked(keys, views)
        step = max(_PART_BYTES // self.space.value_bytes, 1)
        scratch = np.empty((min(step, len(keys)), *self.space.shape), self.space.stored_dtype)
        good = np.zeros(len(keys), bool)
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            good[part] = self.read(keys[part], views[part], scratch[: len(keys[part])])[1]
        return good

    def close(self) -> None:
        """Close the files. What is read later opens them again."""
        with self._lock:
            self._open.clear()

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()

    def _target(self, num_rows: int, out: NDArray[Any] | None) -> NDArray[Any]:
        shape, dtype = (num_rows, *self.space.shape), self.space.stored_dtype
        if out is None:
            return np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ConfigError(
                f"`out` must be a C-contiguous {dtype}{list(shape)}. Received: {out.dtype}{list(out.shape)}. "
                "Leave it out for a new array."
            )
        return out

    def _load(self, stem: str) -> tuple[Header, Table] | None:
        """Return header and table of a shard, or None if it can't be used."""
        assert self._folder is not None
        for load, path in (
            (_load_shard, self._folder.shard_path(stem)),
            (_load_keys, self._folder.path / f"{stem}{KEYS}"),
        ):
            try:
                header, table = load(path)
                self._require_own(header)
                return header, table
            except FileNotFoundError:
                continue
            except DamagedShard as error:
                self.num_damaged += 1
                self._folder.set_aside(path, str(error))
            except OSError as error:
                self._say_unreadable(stem, error)
        return None

    def _require_own(self, header: Header) -> None:
        if (header.space, header.value_bytes) != (self.space.digest, self.space.value_bytes):
            raise DamagedShard("it belongs to another space")

    def _read_entries(
        self, entries: Entries, positions: NDArray[np.intp], values: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Fill `values[positions]` with some entries; return which are good, having forgotten the others."""
        good = np.zeros(len(entries), bool)
        content = bytes_of(values)
        order = np.argsort(entries, kind="stable")
        tables, rows = self._index.place(entries[order])
        for start, end in _stretches(np.diff(tables) != 0):
            part, table = order[start:end], int(tables[start])
            places = positions[part]
            try:
                shard = self._opened(table)
                for row, targets in _targets(rows[start:end], places, content, self.space.value_bytes):
                    shard.read(row, targets)
            except (DamagedShard, OSError) as error:
                self._forget_shard(table, error)
                continue
            good[part] = self._verify(table, entries[part], places, content)
        return good

    def _verify(
        self, table: int, entries: Entries, positions: NDArray[np.intp], content: memoryview
    ) -> NDArray[np.bool_]:
        good = np.ones(len(entries), bool)
        new = np.flatnonzero(~self._verified[entries])
        if len(new):
            rows = rows_of(content, self.space.value_bytes, positions[new].tolist())
            keys, views, expected = self._index.rows(entries[new])
            good[new] = row_crcs(keys, views, rows) == expected
            self._verified[entries[good]] = True
        if not good.all():
            bad = np.unique(entries[~good])
            self._index.forget(bad)
            self.num_damaged += len(bad)
            stem = self._shards[table][0]
            log_event("cache", "damaged", file=stem, rows=len(bad), consequence="they are computed anew")
        return good

    def _opened(self, table: int) -> OpenShard:
        shard = self._open.pop(table, None)
        if shard is None:
            shard = self._open_again(*self._shards[table])
        self._open[table] = shard
        if len(self._open) > _NUM_OPEN:
            self._open.popitem(last=False)
        now = time.monotonic()
        if now - self._touched.get(table, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[table] = now
            assert self._folder is not None
            touch(self._folder.shard_path(self._shards[table][0]))
        return shard

    def _open_again(self, stem: str, header: Header) -> OpenShard:
        assert self._folder is not None
        path = self._folder.shard_path(stem)
        try:
            shard = OpenShard(path)
        except FileNotFoundError:
            if self._mirror is None or not self._mirror.fetch(self._folder, stem):
                raise
            shard = OpenShard(path)
        if shard.header != header:
            raise DamagedShard("it has another table of keys than before")
        return shard

    def _forget_shard(self, table: int, error: DamagedShard | OSError) -> None:
        stem = self._shards[table][0]
        self._index.forget_table(table)
        self._open.pop(table, None)
        assert self._folder is not None
        if isinstance(error, DamagedShard):
            self.num_damaged += 1
            self._folder.set_aside(self._folder.shard_path(stem), str(error))
        elif error.errno in _GONE:
            self.refresh()  # evicted; or compacted, and its rows are elsewhere now
        else:
            self._say_unreadable(stem, error)

    def _say_unreadable(self, stem: str, error: OSError) -> None:
        reason = f"{type(error).__name__}: {error}"
        log_event("cache", "unreadable", file=stem, reason=reason, consequence="its values are computed anew")


def _load_shard(path: Any) -> tuple[Header, Table]:
    shard = OpenShard(path)
    return shard.header, shard.table()


def _load_keys(path: Any) -> tuple[Header, Table]:
    content = path.read_bytes()
    header = Header.from_page(content[:PAGE_BYTES])
    return header, table_of(header, content[PAGE_BYTES:])


def _stretches(breaks: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the stretches between breaks; `breaks[i]` is between i and i + 1."""
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(breaks) + 1]
    return itertools.pairwise(bounds)


def _targets(
    rows: NDArray[np.int64], positions: NDArray[np.intp], content: memoryview, value_bytes: int
) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield what to read at once: the first of consecutive rows, and where in `content` they go."""
    row_steps = np.diff(rows) != 1
    first, following, targets = int(rows[0]), int(rows[0]), list[memoryview]()
    for start, end in _stretches(row_steps | (np.diff(positions) != 1)):
        row, position, count = int(rows[start]), int(positions[start]), end - start
        if row != following:
            yield first, targets
            first, targets = row, []
        targets.append(content[value_bytes * position : value_bytes * (position + count)])
        following = row + count
    yield first, targets
