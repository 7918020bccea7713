"""The files of one space: `<root>/v1/<digest of the space>/`.

    space.json                             what the space is, for people
    <time>-<random>.shard                  values; its modification time is that of its last use
    <time>-<random>.keys                   first page and table of a shard that is in the bucket behind this folder
    <time>-<random>.pending                this shard is still to be uploaded
    <time>-<random>.<host>.<pid>.writing   what a writer has not finished, or left when it was killed
    <time>-<random>.damaged                a shard that was found damaged; `verify` and `prune` remove it

A name is never used twice, so no writer meets another; removing a file is safe at any time, because who has it open
keeps it, and who wants to open it computes its values again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.cache.spaces import FeatureSpace
from kubegraft.reporting.events import log_event
from kubegraft.stage import write_atomically

LAYOUT: Final = "v1"
SPACE_FILE: Final = "space.json"
SHARD: Final = ".shard"
KEYS: Final = ".keys"
PENDING: Final = ".pending"
WRITING: Final = ".writing"
DAMAGED: Final = ".damaged"
# A live writer touches its file with every batch. A day where locks tell nothing, as on some network file systems.
_ABANDONED_SECONDS: Final = 3600.0
_ABANDONED_WITHOUT_LOCKS_SECONDS: Final = 86400.0


@dataclass(frozen=True, slots=True)
class CacheFile:
    """A file as a listing shows it.

    Attributes:
        path: Where it is.
        size: Bytes.
        used_ns: Time of its last use, in nanoseconds since 1970, by the clock of the file system.
    """

    path: Path
    size: int
    used_ns: int

    @property
    def stem(self) -> str:
        """Name without what tells its kind."""
        return self.path.name.partition(".")[0]


class SpaceFolder:
    """Files of one space. It need not exist until something is written."""

    def __init__(self, root: Path, digest: str) -> None:
        self.digest, self.path = digest, root / LAYOUT / digest

    def files(self, *suffixes: str) -> list[CacheFile]:
        """Return the files that end in one of `suffixes`, or all, by name: the oldest first."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if not suffixes or entry.name.endswith(suffixes):
                    with contextlib.suppress(OSError):  # it may have gone since
                        stat = entry.stat()
                        found.append(CacheFile(Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return sorted(found, key=lambda file: file.path.name)

    def shard_path(self, stem: str) -> Path:
        """Return where a shard is or would be."""
        return self.path / f"{stem}{SHARD}"

    def create(self, space: FeatureSpace) -> None:
        """Make the folder and its `space.json`, or mend it.

        Raises:
            OSError: If the system refuses.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path, content = self.path / SPACE_FILE, space.to_json()
        if self.space() is None:
            aside = self.path / f".{secrets.token_hex(8)}"  # two writers must not share one
            write_atomically(aside, content)
            aside.replace(path)

    def space(self) -> FeatureSpace | None:
        """Return what `space.json` says, or None if there is none or it is damaged."""
        with contextlib.suppress(OSError, ValueError):
            space = FeatureSpace.from_json((self.path / SPACE_FILE).read_bytes())
            if space.digest == self.digest:
                return space
        return None

    def new_aside(self) -> Path:
        """Return a name for a file to write; `final_path` makes the shard's name of it."""
        host = platform.node().partition(".")[0] or "host"
        stem = f"{time.time_ns():016x}-{secrets.token_hex(8)}"
        return self.path / f"{stem}.{host}.{os.getpid()}{WRITING}"

    def final_path(self, aside: Path) -> Path:
        """Return the name that a finished file gets."""
        return self.shard_path(aside.name.partition(".")[0])

    def set_aside(self, path: Path, reason: str) -> None:
        """Take a damaged file out of use, for all processes, and say so."""
        log_event(
            "cache", "damaged", file=path.name, reason=reason, consequence="its values are computed anew"
        )
        with contextlib.suppress(OSError):  # read-only, or another process was quicker
            path.rename(self.path / f"{path.name.partition('.')[0]}{DAMAGED}")

    def abandoned(self) -> list[CacheFile]:
        """Return what killed processes left, and marks of shards that were evicted before they were uploaded."""
        old_ns = time.time_ns() - int(_ABANDONED_SECONDS * 1e9)
        old = [file for file in self.files() if file.used_ns < old_ns]
        hidden = [file for file in old if file.path.name.startswith(".")]
        marks = [
            file for file in old if file.path.suffix == PENDING and not self.shard_path(file.stem).exists()
        ]
        return [*hidden, *marks, *(file for file in self.files(WRITING) if _is_abandoned(file))]

    def leftovers(self) -> list[CacheFile]:
        """Return what nobody will use again: what killed processes left, and what was found damaged."""
        return [*self.abandoned(), *self.files(DAMAGED)]

    def remove_if_empty(self) -> None:
        """Remove the folder if it holds nothing but its description."""
        if not [file for file in self.files() if file.path.name != SPACE_FILE]:
            with contextlib.suppress(OSError):
                (self.path / SPACE_FILE).unlink(missing_ok=True)
                self.path.rmdir()


def space_folders(root: Path) -> list[SpaceFolder]:
    """Return the folders of all spaces under a cache's root."""
    with contextlib.suppress(OSError):
        names = sorted(entry.name for entry in (root / LAYOUT).iterdir() if entry.is_dir())
        return [SpaceFolder(root, name) for name in names if len(name) == 64]
    return []


def all_files(root: Path) -> Iterator[CacheFile]:
    """Yield every file of a cache."""
    for folder in space_folders(root):
        yield from folder.files()


def remove(file: CacheFile) -> bool:
    """Remove a file, and return whether this call did."""
    try:
        file.path.unlink()
    except OSError:
        return False
    return True


def touch(path: Path) -> None:
    """Note that a shard was used. The time is that of the file's content, since access times are often off."""
    with contextlib.suppress(OSError):  # a cache may be read-only
        os.utime(path)


def _is_abandoned(file: CacheFile) -> bool:
    age_seconds = time.time() - file.used_ns / 1e9
    locked = _is_locked(file.path)
    if locked is None:
        return age_seconds > _ABANDONED_WITHOUT_LOCKS_SECONDS
    return not locked and (age_seconds > _ABANDONED_SECONDS or _writer_is_gone(file.path))


def _is_locked(path: Path) -> bool | None:
    """Return whether a writer holds its lock, or None if that can't be known. A hint only: see `ShardWriter.finish`."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _writer_is_gone(path: Path) -> bool:
    """Return whether the writer was a process of this machine that has ended."""
    host, _, pid = path.name.removesuffix(WRITING).partition(".")[2].rpartition(".")
    if host != platform.node().partition(".")[0] or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
