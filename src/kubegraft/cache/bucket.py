"""A cache in a bucket, and the part of it that this machine holds.

    <uri>/v1/<space>/space.json
    <uri>/v1/<space>/<stem>.shard   as on a disk
    <uri>/v1/<space>/<stem>.keys    its first page and table, uploaded after it: a shard without it is not there yet

An object appears whole or not at all, and names are never used twice; that is all the cache asks of a store. To know
what is there a reader fetches the small objects, and a shard when a value in it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.cache.folder import KEYS, LAYOUT, PENDING, SHARD, SPACE_FILE, SpaceFolder
from kubegraft.cache.shard_file import PAGE_BYTES, ROW_DTYPE, DamagedShard, OpenShard
from kubegraft.cache.space_on_disk import DiskBudget
from kubegraft.errors import StorageError
from kubegraft.reporting.events import log_event
from kubegraft.storage.objects import ObjectStore, StoredObject, list_objects, opened_store
from kubegraft.storage.retries import Retries
from kubegraft.storage.transfers import in_parallel
from kubegraft.storage.uris import as_folder

# A value can be computed again, so a store that is down is not waited for as long as for data.
WAITS_SECONDS: Final = (0.5, 2.0)


@dataclass(frozen=True, slots=True)
class BucketShard:
    """A shard as a listing shows it.

    Attributes:
        space: Digest of its space.
        stem: Its name.
        num_rows: Number of its values, or 0 if its `.keys` are not there.
        size: Bytes of both objects.
        written: When, in seconds since 1970, by the clock of who wrote it.
    """

    space: str
    stem: str
    num_rows: int
    size: int

    @property
    def written(self) -> float:
        """See the class."""
        try:
            return int(self.stem.partition("-")[0], 16) / 1e9
        except ValueError:
            return 0


class Bucket:
    """The objects of a cache. Methods raise StorageError."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[ObjectStore, str, Retries]]:
        """Give the store, the prefix of the cache in it, and how to try again."""
        retries = Retries(WAITS_SECONDS)
        with opened_store(self.uri, retries) as (store, key):
            yield store, f"{as_folder(key)}{LAYOUT}/", retries

    def objects(self, space: str = "") -> dict[str, StoredObject]:
        """Return the objects of a space, or all, by their names after the prefix."""
        with self.opened() as (store, prefix, retries):
            under = f"{prefix}{space}/" if space else prefix
            listed = list_objects(store, under, self.uri, retries)
            return {item.key.removeprefix(prefix): item for item in listed}

    def shards(self) -> list[BucketShard]:
        """Return all shards, by space and name."""
        return shards_in(self.objects())

    def read(self, name: str) -> bytes | None:
        """Return a small object."""
        with self.opened() as (store, prefix, retries):
            return retries.call(self.uri, lambda: store.read(prefix + name))

    def download(self, name: str, target: Path) -> None:
        """Write an object to a local file."""
        with self.opened() as (store, prefix, retries):
            retries.call(self.uri, lambda: store.download(prefix + name, target))

    def delete_object(self, name: str) -> None:
        """Delete an object."""
        with self.opened() as (store, prefix, retries):
            retries.call(self.uri, lambda: store.delete(prefix + name), "deleted")

    def delete(self, space: str, stem: str) -> None:
        """Delete a shard: first what makes it seen."""
        with self.opened() as (store, prefix, retries):
            for suffix in (KEYS, SHARD):
                key = f"{prefix}{space}/{stem}{suffix}"
                retries.call(self.uri, functools.partial(store.delete, key), "deleted")


def shards_in(objects: dict[str, StoredObject]) -> list[BucketShard]:
    """Return the shards among the objects of a cache."""
    found = []
    for name, item in sorted(objects.items()):
        space, _, file = name.partition("/")
        if file.endswith(SHARD):
            stem = file.removesuffix(SHARD)
            keys = objects.get(f"{space}/{stem}{KEYS}")
            num_rows = (keys.size - PAGE_BYTES) // ROW_DTYPE.itemsize if keys else 0
            found.append(BucketShard(space, stem, num_rows, item.size + (keys.size if keys else 0)))
    return found


def keys_content(shard: OpenShard) -> bytes:
    """Return what a shard's `.keys` object holds.

    Raises:
        OSError: If the file can't be read.
        DamagedShard: If the table is not the one that was written.
    """
    return shard.header.to_page() + shard.table().tobytes()


class BucketMirror:
    """Brings what is needed from a bucket into a local folder, and what was written there to the bucket.

    A store that can't be reached makes values missing, or leaves them to be uploaded by a later run; it never ends one.
    """

    def __init__(self, uri: str, budget: DiskBudget) -> None:
        self._bucket, self._budget = Bucket(uri), budget
        self._sizes: dict[str, int] = {}
        self._room = 0
        self._off = self._is_full = False

    def pull(self, folder: SpaceFolder) -> None:
        """Make the `.keys` of all shards of a space be here, and of no others."""
        with self._forgiving("listed"):
            objects = self._bucket.objects(folder.digest)
            names = {name.partition("/")[2] for name in objects}
            self._sizes |= {name.partition("/")[2]: item.size for name, item in objects.items()}
            here = {file.path.name for file in folder.files(SHARD, KEYS)}
            stems = [name.removesuffix(KEYS) for name in names if name.endswith(KEYS)]
            wanted = [f"{stem}{KEYS}" for stem in stems if not {f"{stem}{KEYS}", f"{stem}{SHARD}"} & here]
            folder.path.mkdir(parents=True, exist_ok=True)
            if SPACE_FILE in names and folder.space() is None:
                wanted.append(SPACE_FILE)
            if wanted:
                self._download_all(folder, wanted, objects)
            for name in here:
                if name.endswith(KEYS) and name not in names:
                    (folder.path / name).unlink(missing_ok=True)

    def fetch(self, folder: SpaceFolder, stem: str) -> bool:
        """Bring a shard, and return whether it is here."""
        if self._off:
            return False
        with self._forgiving("fetched"):
            size = self._sizes.get(f"{stem}{SHARD}", 0)
            if not self._has_room(size):
                return False
            aside = folder.path / f"{stem}.{secrets.token_hex(4)}.{os.getpid()}.writing"
            try:
                self._bucket.download(f"{folder.digest}/{stem}{SHARD}", aside)
                if not self._budget.make_room():
                    raise OSError("the budget of this machine's part is used up by what is in use")
                aside.rename(folder.shard_path(stem))
            finally:
                aside.unlink(missing_ok=True)
            self._room -= size
            log_event("cache", "fetched", file=stem)
            return True
        return False

    def _has_room(self, size: int) -> bool:
        """Return whether so many bytes fit, before they are brought here for nothing; say so once if they do not."""
        if size > self._room:
            self._room = self._budget.room_bytes()
        if size > self._room and not self._is_full:
            self._is_full = True
            log_event(
                "cache",
                "not fetched",
                reason="what was used in this run takes all that the cache may take on this machine",
                room=self._room,
                consequence="what is not on this machine is computed anew",
            )
        return size <= self._room

    def push(self, folder: SpaceFolder) -> None:
        """Upload what was written, now or by a run that could not."""
        with self._forgiving("uploaded"):
            pending = [file for file in folder.files(PENDING) if folder.shard_path(file.stem).exists()]
            if not pending:
                return
            with self._bucket.opened() as (store, prefix, retries):
                upload = functools.partial(self._upload, store, f"{prefix}{folder.digest}/", retries, folder)
                in_parallel(upload, [file.stem for file in pending], retries, total=len(pending))
                description = (folder.path / SPACE_FILE).read_bytes()
                key = f"{prefix}{folder.digest}/{SPACE_FILE}"
                retries.call(self._bucket.uri, lambda: store.write(key, description), "written")
            log_event("cache", "uploaded", shards=len(pending))

    def _upload(
        self, store: ObjectStore, prefix: str, retries: Retries, folder: SpaceFolder, stem: str
    ) -> int:
        path = folder.shard_path(stem)
        try:
            keys = keys_content(OpenShard(path))
        except DamagedShard as error:
            folder.set_aside(path, str(error))
            return 0
        upload = functools.partial(store.upload, path, f"{prefix}{stem}{SHARD}")
        retries.call(self._bucket.uri, upload, "written")
        write = functools.partial(store.write, f"{prefix}{stem}{KEYS}", keys)
        retries.call(self._bucket.uri, write, "written")
        path.with_suffix(PENDING).unlink(missing_ok=True)
        return path.stat().st_size

    def _download_all(self, folder: SpaceFolder, names: list[str], objects: dict[str, StoredObject]) -> None:
        with self._bucket.opened() as (store, _, retries):

            def download(name: str) -> int:
                aside = folder.path / f".{secrets.token_hex(8)}"
                item = objects[f"{folder.digest}/{name}"]
                try:
                    retries.call(self._bucket.uri, lambda: store.download(item.key, aside))
                    aside.replace(folder.path / name)
                except StorageError as error:
                    if not error.is_missing:  # pruned since it was listed
                        raise
                finally:
                    aside.unlink(missing_ok=True)
                return item.size

            in_parallel(download, names, retries, total=len(names))

    @contextlib.contextmanager
    def _forgiving(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (StorageError, OSError) as error:
            # One object that somebody pruned says nothing of the others.
            self._off = self._off or (isinstance(error, StorageError) and not error.is_missing)
            consequence = "what is not on this machine is computed anew, or uploaded by a later run"
            log_event("cache", f"not {verb}", reason=str(error)[:300], consequence=consequence)
