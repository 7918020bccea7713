"""What an object store must do for kubegraft, and how a `gs://` or `s3://` URI is opened."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kubegraft.errors import ConfigError
from kubegraft.storage.digests import checksum_of
from kubegraft.storage.retries import Retries
from kubegraft.storage.uris import bucket_and_key, scheme_of

NUM_THREADS: Final = 16
CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it.

    Attributes:
        key: Its whole key.
        size: Bytes of its content, or -1 where the listing can't know (content that is decoded on the way).
        checksum: `<kind>:<value>`, see `digests`; "" where there is none.
    """

    key: str
    size: int
    checksum: str = ""

    def is_same_as(self, path: Path) -> bool:
        """Return whether the local file surely holds this object."""
        if not self.checksum or not path.is_file() or path.stat().st_size != self.size:
            return False
        return checksum_of(path, self.checksum.partition(":")[0]) == self.checksum


class ObjectStore(Protocol):
    """One bucket. Every method makes one attempt and raises what its client raises; all are thread-safe."""

    def page(self, prefix: str, token: str | None) -> tuple[list[StoredObject], str | None]:
        """Return some objects under `prefix` in the order of their keys, and the token of the next page."""

    def download(self, key: str, target: Path) -> None:
        """Write an object to `target`, verified by the checksum that the store keeps."""

    def upload(self, source: Path, key: str) -> None:
        """Write a file to `key`, verified by the store."""

    def read(self, key: str) -> bytes | None:
        """Return the content of a small object, or None if there is no such object."""

    def write(self, key: str, content: bytes) -> None:
        """Write a small object."""

    def copy(self, key: str, new_key: str) -> None:
        """Copy an object within the bucket, on the server."""

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""

    def close(self) -> None:
        """Close the connections."""


@contextlib.contextmanager
def opened_store(uri: str, retries: Retries) -> Iterator[tuple[ObjectStore, str]]:
    """Give the bucket that a `gs://` or `s3://` URI names, and the key or prefix in it; close it at the end.

    Raises:
        ConfigError: If no bucket is named, or the package that reads it is not installed.
        StorageError: If there are credentials that can't be read.
    """
    bucket, key = bucket_and_key(uri)
    with contextlib.closing(retries.call(uri, lambda: _store(scheme_of(uri), bucket), "opened")) as store:
        yield store, key


def _store(scheme: str, bucket: str) -> ObjectStore:
    if scheme == "gs":
        from kubegraft.storage.gcs import GoogleBucket

        return GoogleBucket(bucket)
    from kubegraft.storage.s3 import S3Bucket

    return S3Bucket(bucket)


def list_objects(store: ObjectStore, prefix: str, uri: str, retries: Retries) -> Iterator[StoredObject]:
    """Yield the objects under `prefix` page by page, so that memory does not grow with their number."""
    token: str | None = None
    while True:
        objects, token = retries.call(uri, functools.partial(store.page, prefix, token), "listed")
        yield from objects
        if token is None:
            return


def not_installed(scheme: str, package: str, extra: str, error: ImportError) -> ConfigError:
    """Return the error for a scheme whose package is not there."""
    return ConfigError(
        f"{scheme}:// needs the package {package}, which is not installed. Received: {error}. "
        f"Install kubegraft[{extra}]."
    )
