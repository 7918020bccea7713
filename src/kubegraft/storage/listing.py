"""What is at a path or under a URI."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubegraft.storage.fetching import folder_scheme, plain_objects
from kubegraft.storage.objects import list_objects, opened_store
from kubegraft.storage.publication import PARTIAL_FOLDER, PUBLICATION_FILE
from kubegraft.storage.retries import RETRY_WAITS_SECONDS, Retries
from kubegraft.storage.uris import OBJECT_SCHEMES, as_folder, local_path


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file in a folder.

    Attributes:
        path: Its path in the folder, with "/".
        size: Bytes, or -1 where it is stored compressed and read decoded.
        checksum: `<kind>:<value>` by which the store tells contents apart; "" for local files.
    """

    path: str
    size: int
    checksum: str = ""


def list_files(
    uri: str, *, retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS
) -> Iterator[ListedFile]:
    """Yield the files in a folder and the folders in it, a page of a bucket at a time; nothing if there is none.

    Args:
        uri: Path of a folder, or `gs://` or `s3://` URI of a prefix.
        retry_waits_seconds: How long to wait before each further try of a page.

    Raises:
        ConfigError: If the scheme is unknown or has no folders, or its package is not installed.
        StorageError: If it can't be listed, at last.
    """
    if folder_scheme(uri) not in OBJECT_SCHEMES:
        yield from _local_files(local_path(uri))
        return
    retries = Retries(retry_waits_seconds)
    with opened_store(uri, retries) as (store, key):
        prefix = as_folder(key)
        for item in plain_objects(store, prefix, uri, retries):
            yield ListedFile(item.key.removeprefix(prefix), item.size, item.checksum)


def exists(uri: str, *, retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS) -> bool:
    """Return whether a file or a folder with files is at `uri`; what is half-published does not count.

    Args:
        uri: Path, or `gs://` or `s3://` URI.
        retry_waits_seconds: How long to wait before each further try.

    Raises:
        ConfigError: If the scheme is unknown or can't be listed, or its package is not installed.
        StorageError: If it can't be told, at last.
    """
    if folder_scheme(uri) not in OBJECT_SCHEMES:
        return local_path(uri).exists()
    retries = Retries(retry_waits_seconds)
    with opened_store(uri, retries) as (store, key):
        if next(plain_objects(store, as_folder(key), uri, retries), None):
            return True
        first = next(list_objects(store, key, uri, retries), None) if key else None
        return first is not None and first.key == key


def _local_files(root: Path) -> Iterator[ListedFile]:
    for directory, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            relative = path.relative_to(root).as_posix()
            if relative != PUBLICATION_FILE and not relative.startswith(f"{PARTIAL_FOLDER}/"):
                yield ListedFile(relative, path.stat().st_size)
