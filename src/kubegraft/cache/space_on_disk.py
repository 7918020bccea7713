"""How much the cache may take, and which shards go for new ones."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.cache.folder import PENDING, SHARD, CacheFile, all_files, remove, space_folders
from kubegraft.reporting.events import log_event

_DEFAULT_FRACTION: Final = 0.2
_DEFAULT_BYTES: Final = 50 * 2**30
# Whoever fills the disk makes the run's own files fail; the cache is never worth that.
_RESERVE_FRACTION: Final = 0.05
_RESERVE_BYTES: Final = 2 * 2**30


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """What a cache's folder may take.

    Attributes:
        root: The folder.
        budget_bytes: Most bytes of all its files; None: 50 GiB, or a fifth of the file system if that is less.
        opened_ns: When this process opened the cache, by the file system's clock. What was used since is never
            evicted: a pass over more images than fit would otherwise evict each shard just before it is needed.
    """

    root: Path
    budget_bytes: int | None
    opened_ns: int

    def limit_bytes(self, used_bytes: int) -> int:
        """Return how large the cache may be now, with `used_bytes` in it."""
        disk = os.statvfs(self.root)
        total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        budget = self.budget_bytes
        if budget is None:
            budget = min(int(total * _DEFAULT_FRACTION), _DEFAULT_BYTES)
        reserve = min(int(total * _RESERVE_FRACTION), _RESERVE_BYTES)
        return min(budget, used_bytes + free - reserve)

    def room_bytes(self) -> int:
        """Return how much more fits, if everything goes that may be evicted.

        Raises:
            OSError: If the file system can't be asked.
        """
        excess, old = self._excess()
        return max(sum(file.size for file in (*old, *self._leftovers())) - excess, 0)

    def make_room(self, num_bytes: int = 0) -> bool:
        """Evict the least recently used shards until the cache is within its budget; return whether it is.

        Unfinished files count, so a writer calls this before it renames its own. What killed writers left goes first.

        Args:
            num_bytes: What is yet to be written.

        Raises:
            OSError: If the file system can't be asked.
        """
        excess, old = self._excess()
        excess += num_bytes
        if excess > 0:
            excess -= sum(file.size for file in self._leftovers() if remove(file))
        if excess > sum(file.size for file in old):
            return False  # nothing would be gained by evicting some
        evicted = evict_least_recent(old, excess)
        if evicted:
            log_event(
                "cache", "evicted", shards=len(evicted), mib=round(sum(f.size for f in evicted) / 2**20, 1)
            )
        return excess <= sum(file.size for file in evicted)

    def _leftovers(self) -> list[CacheFile]:
        return [file for folder in space_folders(self.root) for file in folder.leftovers()]

    def _excess(self) -> tuple[int, list[CacheFile]]:
        """Return by how much the cache is too large, negative if it is not, and the shards that may be evicted."""
        files = list(all_files(self.root))
        used_bytes = sum(file.size for file in files)
        old = [file for file in files if file.path.suffix == SHARD and file.used_ns < self.opened_ns]
        return used_bytes - self.limit_bytes(used_bytes), old


def evict_least_recent(files: list[CacheFile], num_bytes: int) -> list[CacheFile]:
    """Remove the least recently used of `files` until `num_bytes` are gained, and return what was removed."""
    evicted: list[CacheFile] = []
    for file in sorted(files, key=lambda file: file.used_ns):
        if num_bytes <= 0:
            break
        if remove(file) or not file.path.exists():  # by this process or another
            file.path.with_suffix(PENDING).unlink(missing_ok=True)
            evicted.append(file)
            num_bytes -= file.size
    return evicted


def file_system_time_ns(directory: Path) -> int:
    """Return the time as the file system stamps it, whose clock need not be this machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return time.time_ns()
