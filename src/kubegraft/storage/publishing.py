"""From a local directory to a path or bucket, so that a reader sees all of it or nothing (ADR 9).

A local path is written aside and renamed. In a bucket the files are uploaded to a partial folder, which takes as long
as it takes; then the record says `publishing`, the server copies the files to their places, and the record says
`complete`. So an upload that is killed leaves an earlier publication as it was, and the same call continues it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event
from kubegraft.storage.digests import checksum_of
from kubegraft.storage.fetching import plain_objects, read_publication
from kubegraft.storage.objects import ObjectStore, list_objects, opened_store
from kubegraft.storage.publication import (
    COMPLETE,
    PARTIAL_FOLDER,
    PUBLICATION_FILE,
    PUBLISHING,
    Publication,
    PublishedFile,
    describe,
)
from kubegraft.storage.retries import RETRY_WAITS_SECONDS, PassingFault, Retries
from kubegraft.storage.transfers import in_parallel
from kubegraft.storage.uris import OBJECT_SCHEMES, as_folder, known_scheme, local_path, public_uri

_T = TypeVar("_T")


def publish_tree(
    directory: str | os.PathLike[str],
    uri: str,
    *,
    only: Collection[str] | None = None,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> str:
    """Make the folder `uri` hold the files of a local directory, replacing an earlier publication at once.

    Publishing the same content again changes nothing. One process at a time may publish to a URI.

    Args:
        directory: Local directory; empty directories in it are not published.
        uri: Path, or `gs://` or `s3://` URI of a prefix, that does not exist, is empty, or was published by
            this function.
        only: Names at the top of `directory` to publish, or None for everything.
        retry_waits_seconds: How long to wait before each further try of a request.

    Returns:
        Digest of the published content, 64 hex digits.

    Raises:
        ConfigError: If there is nothing to publish, `uri` holds other files or can't be written to by its scheme.
        StorageError: If something can't be read or written, at last.
    """
    directory = Path(directory)
    scheme = _target_scheme(uri)
    publication = describe(directory, only)
    if scheme in OBJECT_SCHEMES:
        with _opened_bucket(uri, Retries(retry_waits_seconds)) as bucket:
            changed = bucket.publish(directory, publication)
    else:
        changed = Retries(retry_waits_seconds).call(
            uri,
            functools.partial(_publish_locally, directory, local_path(uri).absolute(), publication),
            "written",
        )
    log_event(
        "storage",
        "published" if changed else "unchanged",
        uri=public_uri(uri),
        files=len(publication.files),
        mib=round(sum(file.size for file in publication.files) / 2**20, 1),
    )
    return publication.digest


def check_target(
    directory: str | os.PathLike[str],
    uri: str,
    *,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> None:
    """Raise what would keep `publish_tree` from its work later, as far as reading can tell.

    Args:
        directory: Local directory that will be published; it need not exist yet.
        uri: Where to.
        retry_waits_seconds: How long to wait before each further try of a request.

    Raises:
        ConfigError: If `uri` holds other files, or is of a scheme that can't be written.
        StorageError: If it can't be reached.
    """
    if _target_scheme(uri) in OBJECT_SCHEMES:
        with _opened_bucket(uri, Retries(retry_waits_seconds)) as bucket:
            bucket.require_free(bucket.record())
    else:
        _require_outside(Path(directory), local_path(uri).absolute())
        _require_free(local_path(uri).absolute())


def _target_scheme(uri: str) -> str:
    scheme = known_scheme(uri)
    if scheme in ("http", "https"):
        raise ConfigError(
            f"The place to publish to must be a path, or a gs:// or s3:// URI. Received: {public_uri(uri)!r}. "
            f"{scheme}:// can only be read."
        )
    return scheme


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A folder of a bucket that is published to."""

    uri: str
    store: ObjectStore
    prefix: str
    retries: Retries

    def publish(self, directory: Path, publication: Publication) -> bool:
        """Publish, and return whether anything had to change."""
        earlier = self.record()
        self.require_free(earlier)
        there = self._unchanged(earlier)
        new = [file for file in publication.files if file not in there]
        changed = earlier != publication or bool(new)
        if changed:
            staging = f"{self.prefix}{PARTIAL_FOLDER}/{publication.digest[:20]}/"
            self._upload(directory, new, staging)
            self._switch(earlier, publication, new, staging)
        self._remove_partial()
        return changed

    def record(self) -> Publication | None:
        return self.retries.call(self.uri, lambda: read_publication(self.store, self.prefix, self.uri))

    def require_free(self, earlier: Publication | None) -> None:
        for item in plain_objects(self.store, self.prefix, self.uri, self.retries) if earlier is None else ():
            raise _not_free(self.uri, item.key.removeprefix(self.prefix))

    def _unchanged(self, earlier: Publication | None) -> frozenset[PublishedFile]:
        """Return the files of a whole earlier publication that are there."""
        if earlier is None or earlier.state != COMPLETE:
            return frozenset()
        sizes = {
            item.key.removeprefix(self.prefix): item.size
            for item in plain_objects(self.store, self.prefix, self.uri, self.retries)
        }
        return frozenset(file for file in earlier.files if sizes.get(file.path) == file.size)

    def _upload(self, directory: Path, files: Sequence[PublishedFile], staging: str) -> None:
        uploaded = {item.key: item for item in list_objects(self.store, staging, self.uri, self.retries)}

        def upload(file: PublishedFile) -> int:
            source, key = directory / file.path, staging + file.path
            if (there := uploaded.get(key)) and there.is_same_as(source):
                return 0
            self._written(functools.partial(self.store.upload, source, key))
            return file.size

        self._each(upload, files)

    def _switch(
        self,
        earlier: Publication | None,
        publication: Publication,
        new: Sequence[PublishedFile],
        staging: str,
    ) -> None:
        """Put the uploaded files in place; for this moment readers are told to wait."""
        former = earlier.files if earlier else ()
        any_of_them = {file.path: file for file in (*former, *publication.files)}
        self._write_record(replace(publication, files=tuple(any_of_them.values()), state=PUBLISHING))
        self._each(lambda file: self._copy(staging + file.path, self.prefix + file.path), new)
        kept = {file.path for file in publication.files}
        stale = [file for file in former if file.path not in kept]
        self._each(lambda file: self._delete(self.prefix + file.path), stale)
        self._write_record(publication)

    def _remove_partial(self) -> None:
        """Remove what was uploaded on the way, also by earlier calls that were killed and never continued."""
        prefix = f"{self.prefix}{PARTIAL_FOLDER}/"
        keys = [item.key for item in list_objects(self.store, prefix, self.uri, self.retries)]
        self._each(self._delete, keys)

    def _write_record(self, publication: Publication) -> None:
        key, content = self.prefix + PUBLICATION_FILE, publication.to_json()
        self._written(functools.partial(self.store.write, key, content))

    def _copy(self, key: str, new_key: str) -> int:
        self._written(functools.partial(self.store.copy, key, new_key))
        return 0

    def _delete(self, key: str) -> int:
        self._written(functools.partial(self.store.delete, key))
        return 0

    def _written(self, action: functools.partial[None]) -> None:
        self.retries.call(self.uri, action, "written")

    def _each(self, function: Callable[[_T], int], items: Sequence[_T]) -> None:
        in_parallel(function, items, self.retries, total=len(items))


@contextlib.contextmanager
def _opened_bucket(uri: str, retries: Retries) -> Iterator[_Bucket]:
    with opened_store(uri, retries) as (store, key):
        yield _Bucket(uri, store, as_folder(key), retries)


def _publish_locally(directory: Path, target: Path, publication: Publication) -> bool:
    """Write aside and rename; return whether anything had to change."""
    _require_outside(directory, target)
    record, content = target / PUBLICATION_FILE, publication.to_json()
    _require_free(target)
    if record.is_file() and record.read_bytes() == content:
        return False
    aside, old = (target.with_name(target.name + suffix) for suffix in (".partial", ".old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for file in publication.files:
        (aside / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / file.path, aside / file.path)
        if checksum_of(aside / file.path, "sha256") != f"sha256:{file.sha256}":
            raise PassingFault(f"{file.path} changed while it was copied")
    (aside / PUBLICATION_FILE).write_bytes(content)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _require_outside(directory: Path, target: Path) -> None:
    resolved = directory.resolve(), target.resolve()
    if resolved[0] in (resolved[1], *resolved[1].parents) or resolved[1] in resolved[0].parents:
        raise ConfigError(
            f"A directory must be published outside of itself. Received: directory={str(directory)!r}, "
            f"uri={str(target)!r}. Choose another place."
        )


def _require_free(target: Path) -> None:
    if target.is_dir() and not (target / PUBLICATION_FILE).is_file():
        for path in target.iterdir():
            raise _not_free(str(target), path.name)
    elif target.exists() and not target.is_dir():
        raise ConfigError(
            f"The place to publish to must be a directory. Received: {str(target)!r}, a file. Choose another."
        )


def _not_free(uri: str, name: str) -> ConfigError:
    return ConfigError(
        f"The place to publish to must not exist, be empty, or hold an earlier publication. Received: "
        f"{public_uri(uri)!r}, which holds {name!r}. Choose another place, or move what is there."
    )
