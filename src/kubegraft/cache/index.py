"""Which key is in which row: numpy arrays, 53 bytes a key, so that a million of them load in a moment."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.keys import Keys, Views
from kubegraft.cache.shard_file import Table

_MIX: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, so that views of one image lie far apart
Entries = NDArray[np.int64]


def _prefixes(keys: Keys, views: Views) -> NDArray[np.uint64]:
    first = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
    mixed: NDArray[np.uint64] = first ^ (views.astype(np.uint64) * _MIX)
    return mixed


def _words(keys: Keys) -> NDArray[np.uint64]:
    """Return keys as four words each, which are compared faster than 32 bytes."""
    return np.ascontiguousarray(keys).view(np.uint64)


class KeyIndex:
    """Finds entries, numbered in the order in which tables were added; a key may have several."""

    def __init__(self) -> None:
        self._keys: NDArray[np.uint64] = np.empty((0, 4), np.uint64)
        self._views: Views = np.empty(0, np.uint32)
        self._crcs: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._sorted: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._order: NDArray[np.int32] = np.empty(0, np.int32)
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._dead: NDArray[np.bool_] = np.zeros(0, bool)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._views)

    @property
    def num_tables(self) -> int:
        """Number of tables added."""
        return len(self._starts)

    def add(self, tables: list[Table]) -> None:
        """Add the tables of shards, in their order."""
        if not tables:
            return
        lengths = np.cumsum([len(self), *map(len, tables)])
        self._starts = np.concatenate([self._starts, lengths[:-1]])
        self._keys = np.concatenate([self._keys, *(_words(table["key"]) for table in tables)])
        self._views = np.concatenate([self._views, *(table["view"] for table in tables)])
        self._crcs = np.concatenate([self._crcs, *(table["crc"] for table in tables)])
        self._dead = np.concatenate([self._dead, np.zeros(len(self) - len(self._dead), bool)])
        prefixes = _prefixes(self._keys.view(np.uint8), self._views)
        self._order = np.argsort(prefixes, kind="stable").astype(np.int32)
        self._sorted = prefixes[self._order]

    def find(self, keys: Keys, views: Views) -> Entries:
        """Return an entry for each key, or -1: `int64[n]`. The whole key is compared."""
        prefixes, words = _prefixes(keys, views), _words(keys)
        entries = np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self._sorted, prefixes)
        pending = np.arange(len(keys))
        while True:
            pending = pending[at[pending] < len(self._sorted)]
            pending = pending[self._sorted[at[pending]] == prefixes[pending]]
            if not len(pending):
                return entries
            candidates = self._order[at[pending]]
            same = (self._keys[candidates] == words[pending]).all(axis=1)
            same &= (self._views[candidates] == views[pending]) & ~self._dead[candidates]
            entries[pending[same]] = candidates[same]
            pending = pending[~same]
            at[pending] += 1

    def rows(self, entries: Entries) -> tuple[Keys, Views, NDArray[np.uint32]]:
        """Return keys, views and checksums of some entries."""
        return self._keys[entries].view(np.uint8), self._views[entries], self._crcs[entries]

    def place(self, entries: Entries) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of the table, and the row in it, of each entry."""
        tables = np.searchsorted(self._starts, entries, "right") - 1
        return tables, entries - self._starts[tables]

    def forget(self, entries: Entries) -> None:
        """Never find these entries again."""
        self._dead[entries] = True

    def forget_table(self, number: int) -> None:
        """Never find any entry of a table again."""
        end = self._starts[number + 1] if number + 1 < len(self._starts) else len(self)
        self._dead[self._starts[number] : end] = True
