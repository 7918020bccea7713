"""Where upkeep finds shards: in a directory or in a bucket."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kubegraft.cache.bucket import Bucket, keys_content, shards_in
from kubegraft.cache.compaction import compact, rewrite
from kubegraft.cache.folder import (
    DAMAGED,
    KEYS,
    SHARD,
    SPACE_FILE,
    WRITING,
    CacheFile,
    SpaceFolder,
    remove,
    space_folders,
)
from kubegraft.cache.location import mirror_root
from kubegraft.cache.shard_file import DamagedShard, OpenShard, verified_parts
from kubegraft.cache.spaces import FeatureSpace
from kubegraft.errors import ConfigError, StorageError
from kubegraft.storage import is_remote, local_path
from kubegraft.storage.fetching import folder_scheme


@dataclass(frozen=True, slots=True)
class Stored:
    """A shard.

    Attributes:
        space: Digest of its space.
        stem: Its name.
        size: Bytes.
        used: When it was last used, or in a bucket written, in seconds since 1970.
        num_rows: Number of its values, or -1 if the listing does not say.
    """

    space: str
    stem: str
    size: int
    used: float
    num_rows: int = -1


@dataclass(frozen=True, slots=True)
class Checked:
    """What reading all of a shard showed.

    Attributes:
        num_good: Rows that are right.
        num_bad: Rows that are not.
        reason: Why the shard as a whole can't be used, or "".
        unreadable: Whether the system refused to read it.
        gone: Whether it was removed meanwhile, which is no damage.
    """

    num_good: int = 0
    num_bad: int = 0
    reason: str = ""
    unreadable: bool = False
    gone: bool = False


class Shelf(Protocol):
    """What upkeep asks of a place with shards."""

    def spaces(self) -> list[str]:
        """Return the digests of all spaces."""

    def space(self, digest: str) -> FeatureSpace | None:
        """Return what a space is, or None if its description is missing or damaged."""

    def shards(self, digest: str) -> list[Stored]:
        """Return the shards of a space."""

    def num_rows(self, item: Stored) -> int:
        """Return the number of values in a shard, 0 if it can't be read."""

    def check(self, item: Stored) -> Checked:
        """Read all of a shard."""

    def mend(self, item: Stored, *, whole: bool) -> bool:
        """Replace a damaged shard by its good rows, if it is `whole` but for some, else by nothing."""

    def remove(self, item: Stored) -> bool:
        """Remove a shard, and return whether it is gone by this."""

    def set_aside(self, digest: str, remove_them: bool) -> list[str]:
        """Return the names of shards that readers have found damaged, and remove them if asked to."""

    def remove_leftovers(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """Remove what killed writers left and what was set aside; return the number of files and bytes."""

    def compact(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """Drop repeated rows and merge small shards; return how many rows, and shards."""

    def tidy(self, digest: str) -> None:
        """Forget a space that holds nothing."""


def open_shelf(location: str | os.PathLike[str]) -> Shelf:
    """Return the shelf at a directory or a `gs://` or `s3://` URI.

    Raises:
        ConfigError: If it is neither.
    """
    text = os.fspath(location)
    folder_scheme(text)
    if is_remote(text):
        return BucketShelf(text)
    root = local_path(text)
    if root.exists() and not root.is_dir():
        raise ConfigError(
            f"`cache` must be a directory, or a gs:// or s3:// URI. Received: cache={text!r}, which is a file. "
            "Name another place."
        )
    return DirectoryShelf(root)


def check_file(path: Path, space: str) -> Checked:
    """Read all of a shard in a local file."""
    num_good = num_rows = 0
    try:
        shard = OpenShard(path)
        table = shard.table()
        num_rows = len(table)
        if shard.header.space != space:
            raise DamagedShard("it belongs to another space")
        for part, _, good in verified_parts(shard, table):
            num_good += int(good[: len(part)].sum())
    except FileNotFoundError:
        return Checked(gone=True)
    except DamagedShard as error:
        return Checked(reason=str(error))
    except OSError as error:
        if error.errno == errno.ESTALE:  # removed by another machine
            return Checked(gone=True)
        return Checked(num_good, 0, f"{type(error).__name__}: {error}", unreadable=True)
    return Checked(num_good, num_rows - num_good)


class DirectoryShelf:
    """A cache in a directory; see `Shelf`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def spaces(self) -> list[str]:
        """See `Shelf`."""
        return [folder.digest for folder in space_folders(self._root)]

    def space(self, digest: str) -> FeatureSpace | None:
        """See `Shelf`."""
        return self._folder(digest).space()

    def shards(self, digest: str) -> list[Stored]:
        """See `Shelf`."""
        files = self._folder(digest).files(SHARD)
        return [Stored(digest, file.stem, file.size, file.used_ns / 1e9) for file in files]

    def num_rows(self, item: Stored) -> int:
        """See `Shelf`."""
        try:
            return OpenShard(self._path(item)).header.num_rows
        except (OSError, DamagedShard):
            return 0

    def check(self, item: Stored) -> Checked:
        """See `Shelf`."""
        return check_file(self._path(item), item.space)

    def mend(self, item: Stored, *, whole: bool) -> bool:
        """See `Shelf`."""
        if whole:
            file = CacheFile(self._path(item), item.size, int(item.used * 1e9))
            return rewrite(self._folder(item.space), [file])
        return self.remove(item)

    def remove(self, item: Stored) -> bool:
        """See `Shelf`."""
        return remove(CacheFile(self._path(item), item.size, 0))

    def set_aside(self, digest: str, remove_them: bool) -> list[str]:
        """See `Shelf`."""
        files = self._folder(digest).files(DAMAGED)
        for file in files if remove_them else ():
            remove(file)
        return [file.stem for file in files]

    def remove_leftovers(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """See `Shelf`."""
        removed = [file for file in self._folder(digest).leftovers() if dry_run or remove(file)]
        return len(removed), sum(file.size for file in removed)

    def compact(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """See `Shelf`."""
        return compact(self._folder(digest), dry_run=dry_run)

    def tidy(self, digest: str) -> None:
        """See `Shelf`."""
        self._folder(digest).remove_if_empty()

    def _folder(self, digest: str) -> SpaceFolder:
        return SpaceFolder(self._root, digest)

    def _path(self, item: Stored) -> Path:
        return self._folder(item.space).shard_path(item.stem)


class BucketShelf:
    """A cache in a bucket; see `Shelf`. A shard is old since it was written: a store knows of no use."""

    def __init__(self, uri: str) -> None:
        self._bucket, self._here = Bucket(uri), DirectoryShelf(mirror_root(uri))
        self._objects = self._bucket.objects()

    def spaces(self) -> list[str]:
        """See `Shelf`."""
        return sorted({*(name.partition("/")[0] for name in self._objects), *self._here.spaces()})

    def space(self, digest: str) -> FeatureSpace | None:
        """See `Shelf`."""
        content = self._bucket.read(f"{digest}/{SPACE_FILE}")
        try:
            return None if content is None else FeatureSpace.from_json(content)
        except ValueError:
            return None

    def shards(self, digest: str) -> list[Stored]:
        """See `Shelf`."""
        return [
            Stored(item.space, item.stem, item.size, item.written, item.num_rows)
            for item in shards_in(self._objects)
            if item.space == digest
        ]

    def num_rows(self, item: Stored) -> int:
        """See `Shelf`."""
        return item.num_rows

    def check(self, item: Stored) -> Checked:
        """See `Shelf`. Its `.keys` are compared too; a shard without them is still being uploaded."""
        name = f"{item.space}/{item.stem}"
        keys = self._bucket.read(name + KEYS)
        if keys is None:
            return Checked(gone=True)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, f"shard{WRITING}")
            try:
                self._bucket.download(name + SHARD, path)
            except StorageError:
                if self._bucket.read(name + KEYS) is None:
                    return Checked(gone=True)
                raise
            checked = check_file(path, item.space)
            if not checked.reason and keys != keys_content(OpenShard(path)):
                return Checked(reason="its .keys are not those of the shard")
            return checked

    def mend(self, item: Stored, *, whole: bool) -> bool:
        """Delete the shard: its good rows are computed again."""
        return self.remove(item)

    def remove(self, item: Stored) -> bool:
        """See `Shelf`."""
        self._bucket.delete(item.space, item.stem)
        for name in [name for name in self._objects if name.startswith(f"{item.space}/{item.stem}.")]:
            del self._objects[name]
        return True

    def set_aside(self, digest: str, remove_them: bool) -> list[str]:
        """Return nothing: readers change no objects."""
        return []

    def remove_leftovers(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """See `Shelf`. In the bucket only `.keys` whose shard is gone: nothing else is ever half there.

        A shard without `.keys` may still be uploaded, and is pruned by its age like others. What is left in this
        machine's part of the cache goes too.
        """
        shards = {f"{item.space}/{item.stem}" for item in shards_in(self._objects)}
        orphans = [
            name
            for name in self._objects
            if name.startswith(f"{digest}/") and name.endswith(KEYS) and name.removesuffix(KEYS) not in shards
        ]
        num_bytes = sum(self._objects[name].size for name in orphans)
        for name in () if dry_run else orphans:
            self._bucket.delete_object(name)
            del self._objects[name]
        num_here, bytes_here = self._here.remove_leftovers(digest, dry_run=dry_run)
        return len(orphans) + num_here, num_bytes + bytes_here

    def compact(self, digest: str, *, dry_run: bool) -> tuple[int, int]:
        """Return nothing: it would move more bytes than it is worth."""
        return 0, 0

    def tidy(self, digest: str) -> None:
        """See `Shelf`."""
        if not self.shards(digest) and f"{digest}/{SPACE_FILE}" in self._objects:
            self._bucket.delete_object(f"{digest}/{SPACE_FILE}")
        self._here.tidy(digest)
