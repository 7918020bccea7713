"""From a path or URI to local files: each whole or not at all, in parallel, continued where a call was killed."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from kubegraft.errors import ConfigError, StorageError
from kubegraft.reporting.events import log_event
from kubegraft.storage.digests import checksum_of
from kubegraft.storage.objects import ObjectStore, StoredObject, list_objects, opened_store
from kubegraft.storage.publication import COMPLETE, PARTIAL_FOLDER, PUBLICATION_FILE, Publication
from kubegraft.storage.retries import RETRY_WAITS_SECONDS, PassingFault, Retries
from kubegraft.storage.transfers import in_parallel
from kubegraft.storage.uris import OBJECT_SCHEMES, as_folder, inside, known_scheme, local_path, public_uri
from kubegraft.storage.web import download_http

_WEB_SCHEMES: Final = ("http", "https")


def fetch_file(
    uri: str, target: str | os.PathLike[str], *, retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS
) -> None:
    """Copy one file to the local path `target`, whole or not at all; its folder is made if need be.

    Args:
        uri: Path or URI of a file.
        target: Local path to write.
        retry_waits_seconds: How long to wait before each further try.

    Raises:
        ConfigError: If the scheme is unknown, or the package that reads it is not installed.
        StorageError: If the file can't be read, at last.
    """
    scheme = known_scheme(uri)
    retries = Retries(retry_waits_seconds)
    if scheme in _WEB_SCHEMES:
        download: Callable[[Path], None] = functools.partial(download_http, uri)
    elif scheme in OBJECT_SCHEMES:
        with opened_store(uri, retries) as (store, key):
            _fetch(uri, Path(target), functools.partial(store.download, key), retries)
        return
    else:
        download = functools.partial(_copy, local_path(uri))
    _fetch(uri, Path(target), download, retries)


def fetch_tree(
    uri: str,
    target_dir: str | os.PathLike[str],
    *,
    part: str = "",
    exact: bool = False,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> None:
    """Copy a folder, with everything in it, into the local directory `target_dir`.

    A file that is there already with the size and checksum of the one to fetch is kept, so that an interrupted
    call continues. Of a folder that `publish_tree` wrote, exactly the published files are fetched.

    Args:
        uri: Path of a folder, or `gs://` or `s3://` URI of a prefix.
        target_dir: Local directory, made if need be.
        part: Path in the folder; only what is there is fetched, to the same path in `target_dir`. "" for all.
        exact: Whether files in `target_dir` that are not in the folder (any more) are removed; for buckets only.
        retry_waits_seconds: How long to wait before each further try of a file.

    Raises:
        ConfigError: If the scheme is unknown or has no folders, or its package is not installed.
        StorageError: If something can't be read, at last, or there is nothing under the prefix, or what was
            being published there is still not whole.
    """
    target_dir = Path(target_dir)
    retries = Retries(retry_waits_seconds)
    scheme = folder_scheme(uri)
    if scheme not in OBJECT_SCHEMES:
        retries.call(uri, functools.partial(_copy_tree, local_path(uri), target_dir, part.strip("/")))
        return
    started_ns = _file_system_time_ns(target_dir)
    with opened_store(uri, retries) as (store, key):
        num_files, num_bytes = _fetch_objects(
            store, as_folder(key), target_dir, uri, retries, part.strip("/")
        )
    if not num_files:
        missing = f"no {part!r} in it" if part else "no object under this prefix"
        raise StorageError(
            f"`{public_uri(uri)}` must be a folder with files. Received: {missing}. "
            "Check the spelling and the permission to list."
        )
    if exact:
        _remove_older(target_dir, started_ns)
    log_event("storage", "fetched", uri=public_uri(uri), files=num_files, mib=round(num_bytes / 2**20, 1))


def fetch_whole_tree(
    uri: str,
    directory: str | os.PathLike[str],
    *,
    part: str = "",
    replace: bool = False,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> tuple[int, int]:
    """Copy a folder so that `directory` appears when all of it is there; the next call continues one that was killed.

    Args:
        uri: Path of a folder, or `gs://` or `s3://` URI of a prefix.
        directory: Local directory to make; its parent is made if need be.
        part: See `fetch_tree`.
        replace: Whether it may take the place of what is there.
        retry_waits_seconds: How long to wait before each further try of a file.

    Returns:
        How many files and bytes are there.

    Raises:
        ConfigError: If there is something and `replace` is not given; else as `fetch_tree`.
        StorageError: As `fetch_tree`.
    """
    directory = Path(directory)
    if ".." in PurePosixPath(part).parts:
        raise ConfigError(
            f"`only` must be a path in the folder. Received: only={part!r}, which leads out of it."
        )
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if occupied and not (replace and directory.is_dir()):
        raise ConfigError(
            "`directory` must not exist, or be empty. Received: "
            f"directory={str(directory)!r}, which holds something. Choose another one, or replace its content."
        )
    aside, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "old"))
    if folder_scheme(uri) not in OBJECT_SCHEMES:
        shutil.rmtree(aside, ignore_errors=True)
    fetch_tree(uri, aside, part=part, exact=True, retry_waits_seconds=retry_waits_seconds)
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def folder_scheme(uri: str) -> str:
    """Return the scheme of a folder's URI, "" for a path.

    Raises:
        ConfigError: If the scheme is unknown or has no folders.
    """
    scheme = known_scheme(uri)
    if scheme in _WEB_SCHEMES:
        raise ConfigError(
            f"`source` must be a file where it is fetched by {scheme}, because {scheme} can't list folders. "
            f"Received: {public_uri(uri)!r}. Give the URI of a .zip or .tar.gz archive."
        )
    return scheme


def read_publication(store: ObjectStore, prefix: str, uri: str) -> Publication | None:
    """Return the record in a bucket's folder, or None where nothing was published."""
    content = store.read(prefix + PUBLICATION_FILE)
    return None if content is None else Publication.from_json(content, uri)


def plain_objects(store: ObjectStore, prefix: str, uri: str, retries: Retries) -> Iterator[StoredObject]:
    """Yield the objects in a folder that are somebody's files: no record, nothing half-published, no folder keys."""
    for item in list_objects(store, prefix, uri, retries):
        relative = item.key.removeprefix(prefix)
        ours = relative == PUBLICATION_FILE or relative.startswith(f"{PARTIAL_FOLDER}/")
        if not ours and not item.key.endswith("/"):  # consoles make such keys for folders
            yield item


def _fetch_objects(
    store: ObjectStore, prefix: str, target_dir: Path, uri: str, retries: Retries, part: str
) -> tuple[int, int]:
    publication = retries.call(uri, lambda: _whole_publication(store, prefix, uri))
    wanted = _published(publication, prefix) if publication else _listed(store, prefix + part, uri, retries)
    return in_parallel(
        lambda item: _fetch_object(store, item, prefix, target_dir, uri, retries),
        (each for each in wanted if _is_in(each.item.key.removeprefix(prefix), part)),
        retries,
        total=len(publication.files) if publication and not part else 0,
    )


def _is_in(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}/")


@dataclass(frozen=True, slots=True)
class _Wanted:
    item: StoredObject
    sha256: str = ""


def _whole_publication(store: ObjectStore, prefix: str, uri: str) -> Publication | None:
    publication = read_publication(store, prefix, uri)
    if publication is not None and publication.state != COMPLETE:
        raise PassingFault("it is being published; if nobody is at it any more, publish it again")
    return publication


def _published(publication: Publication, prefix: str) -> Iterator[_Wanted]:
    for file in publication.files:
        yield _Wanted(StoredObject(prefix + file.path, file.size, f"sha256:{file.sha256}"), file.sha256)


def _listed(store: ObjectStore, prefix: str, uri: str, retries: Retries) -> Iterator[_Wanted]:
    return map(_Wanted, plain_objects(store, prefix, uri, retries))


def _fetch_object(
    store: ObjectStore, wanted: _Wanted, prefix: str, target_dir: Path, uri: str, retries: Retries
) -> int:
    """Fetch one object of a folder, and return how many bytes came."""
    item = wanted.item
    target = inside(target_dir, item.key.removeprefix(prefix), uri)
    if item.is_same_as(target):
        os.utime(target)
        return 0

    def download(aside: Path) -> None:
        store.download(item.key, aside)
        if wanted.sha256 and checksum_of(aside, "sha256") != f"sha256:{wanted.sha256}":
            raise PassingFault("the file is not the one that was published; it may be being replaced")

    _fetch(f"{uri.rstrip('/')}/{item.key.removeprefix(prefix)}", target, download, retries)
    return target.stat().st_size


def _fetch(uri: str, target: Path, download: Callable[[Path], None], retries: Retries) -> None:
    # Of fixed length, because the name may be as long as names can be; the same each time, so that none piles up.
    name = hashlib.sha256(target.name.encode(errors="surrogateescape")).hexdigest()[:16]
    aside = target.with_name(f".{name}.partial")

    def attempt() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        download(aside)
        aside.replace(target)

    try:
        retries.call(uri, attempt)
    finally:
        aside.unlink(missing_ok=True)


def _file_system_time_ns(directory: Path) -> int:
    """Return the time as the file system of `directory` stamps it, whose clock need not be this machine's."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _remove_older(directory: Path, started_ns: int) -> None:
    """Remove what this call neither wrote nor kept: each such file has an earlier stamp. Needs no list of names."""
    for root, _, names in os.walk(directory):
        for name in names:
            path = Path(root, name)
            if path.stat().st_mtime_ns < started_ns:
                path.unlink()


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _copy_tree(source: Path, target_dir: Path, part: str = "") -> None:
    if part and not (source / part).is_dir():
        (target_dir / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / part, target_dir / part)
        return

    def ignored(directory: str, names: list[str]) -> list[str]:
        at_top = Path(directory) == source
        return [name for name in names if at_top and name in (PUBLICATION_FILE, PARTIAL_FOLDER)]

    shutil.copytree(source / part, target_dir / part, ignore=ignored, dirs_exist_ok=True)
