"""Reading files and folders by path or URI: local, `file://`, `http(s)://`, `gs://` and `s3://`.

A fetched file appears under its name only when it is whole. What fails for a while (a dropped connection, a
busy server) is tried again here, because Kubernetes does not
start a step again that exits.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from kubegraft import __version__
from kubegraft.errors import ConfigError, KubegraftError, StorageError, suggestion
from kubegraft.reporting.events import log_event

SCHEMES: Final = ("file", "http", "https", "gs", "s3")
RETRY_WAITS_SECONDS: Final = (1.0, 4.0, 15.0)
_CONNECTION_TIMEOUT_SECONDS: Final = 60.0
_CHUNK_BYTES: Final = 1024 * 1024
_NUM_PARALLEL_FETCHES: Final = 8
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


_T = TypeVar("_T")


class _Bucket(Protocol):
    """What an object store must do for us."""

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield the key and size in bytes of each object under `prefix`."""

    def download(self, key: str, target: Path) -> None:
        """Write an object to `target`."""


def is_remote(uri: str) -> bool:
    """Return whether `uri` names something that has to be fetched."""
    return _scheme(uri) not in ("", "file")


def local_path(uri: str) -> Path:
    """Return the path of a local source: a path, `~` allowed, or a `file://` URI."""
    if _scheme(uri) == "file":
        return Path(unquote(urlsplit(uri).path))
    return Path(uri).expanduser()


def public_uri(uri: str) -> str:
    """Return `uri` without user name, password and query, which may hold credentials."""
    if not is_remote(uri):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits.

    Raises:
        StorageError: If the file can't be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _failed(str(path), error) from error


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
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scheme = _known_scheme(uri)
    if scheme in ("http", "https"):
        download: Callable[[Path], None] = lambda aside: _download_http(uri, aside)  # noqa: E731
    elif scheme in ("gs", "s3"):
        bucket, key = _bucket(uri)
        download = lambda aside: bucket.download(key, aside)  # noqa: E731
    else:
        download = lambda aside: _copy(local_path(uri), aside)  # noqa: E731
    _fetch(uri, target, download, retry_waits_seconds)


def fetch_tree(
    uri: str,
    target_dir: str | os.PathLike[str],
    *,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> None:
    """Copy a folder, with everything in it, into the local directory `target_dir`.

    A file that is there already with the right size is kept, so that an interrupted call continues.

    Args:
        uri: Path of a folder, or `gs://` or `s3://` URI of a prefix.
        target_dir: Local directory, made if need be.
        retry_waits_seconds: How long to wait before each further try of a file.

    Raises:
        ConfigError: If the scheme is unknown or has no folders, or its package is not installed.
        StorageError: If something can't be read, at last, or there is nothing under the prefix.
    """
    target_dir = Path(target_dir)
    scheme = _known_scheme(uri)
    if scheme in ("http", "https"):
        raise ConfigError(
            f"`source` must be a file where it is fetched by {scheme}, because {scheme} can't list folders. "
            f"Received: {public_uri(uri)!r}. Give the URI of a .zip or .tar.gz archive."
        )
    if scheme in ("", "file"):
        copy = functools.partial(shutil.copytree, local_path(uri), target_dir, dirs_exist_ok=True)
        _tried(uri, copy, retry_waits_seconds)
        return
    bucket, prefix = _bucket(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    objects = _tried(uri, lambda: list(bucket.keys(prefix)), retry_waits_seconds)

    def fetch(item: tuple[str, int]) -> None:
        key, size = item
        target = _inside(target_dir, key.removeprefix(prefix), uri)
        if not (target.is_file() and target.stat().st_size == size):
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(uri, target, lambda aside: bucket.download(key, aside), retry_waits_seconds)

    files = [item for item in objects if not item[0].endswith("/")]  # consoles make such keys for folders
    if not files:
        raise StorageError(
            f"`{public_uri(uri)}` must be a folder with files. Received: no object under this prefix. "
            "Check the spelling and the permission to list."
        )
    with ThreadPoolExecutor(_NUM_PARALLEL_FETCHES, "fetch") as pool:
        for _ in pool.map(fetch, files):
            pass


def _inside(directory: Path, relative: str, uri: str) -> Path:
    parts = PurePosixPath(relative).parts
    if not parts or ".." in parts or PurePosixPath(relative).is_absolute():
        raise StorageError(
            f"`{public_uri(uri)}` holds an object whose name leads out of the folder. Received: "
            f"{relative!r}. Rename it."
        )
    return directory.joinpath(*parts)


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.casefold() if "://" in uri else ""


def _known_scheme(uri: str) -> str:
    scheme = _scheme(uri)
    if scheme and scheme not in SCHEMES:
        raise ConfigError(
            f"A URI must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}. Received: "
            f"{public_uri(uri)!r}.{suggestion(scheme, SCHEMES)}"
        )
    return scheme


def _fetch(uri: str, target: Path, download: Callable[[Path], None], waits: Sequence[float]) -> None:
    aside = target.with_name(f"{target.name}.partial")
    try:
        _tried(uri, lambda: download(aside), waits)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _tried(uri: str, action: Callable[[], _T], waits: Sequence[float]) -> _T:
    """Return what `action` returns, trying again after each of `waits` while its failure may be passing."""
    for wait_seconds in (*waits, None):
        try:
            return action()
        except KubegraftError:
            raise
        except Exception as error:  # each client has its own tree of errors; all end as a StorageError
            if wait_seconds is None or not _is_passing(error):
                raise _failed(uri, error) from error
            log_event(
                "storage", "retrying", uri=public_uri(uri), seconds=wait_seconds, error=type(error).__name__
            )
            time.sleep(wait_seconds)
    raise AssertionError("unreachable: the last try returns or raises")


def _is_passing(error: Exception) -> bool:
    status = _http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, (ssl.SSLCertVerificationError, str))
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    # Dropped connections, as the clients of google-cloud-storage and boto3 name them.
    return any(word in type(error).__name__ for word in ("Connection", "Timeout", "Transport", "Incomplete"))


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(error, "code", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if isinstance(status, int) else None


def _failed(uri: str, error: Exception) -> StorageError:
    hint = {401: "Give credentials.", 403: "Check the permissions.", 404: "Check the spelling."}
    return StorageError(
        f"`{public_uri(uri)}` could not be read. Received: {type(error).__name__}: {error}. "
        f"{hint.get(_http_status(error) or 0, 'Check that it exists and that this machine can reach it.')}"
    )


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _download_http(uri: str, target: Path) -> None:
    request = urllib.request.Request(uri, headers={"User-Agent": f"kubegraft/{__version__}"})
    with (
        urllib.request.urlopen(request, timeout=_CONNECTION_TIMEOUT_SECONDS) as response,
        target.open("wb") as file,
    ):
        # A connection that drops in the middle looks like the end of the file to `read(size)`.
        expected = response.headers.get("Content-Length")
        shutil.copyfileobj(response, file, _CHUNK_BYTES)
        if expected is not None and file.tell() != int(expected):
            raise ConnectionError(f"the connection ended after {file.tell()} of {expected} bytes")


def _bucket(uri: str) -> tuple[_Bucket, str]:
    """Return the bucket and the key or prefix that a `gs://` or `s3://` URI names."""
    parts = urlsplit(uri)
    if not parts.netloc:
        raise ConfigError(
            f"A {parts.scheme}:// URI must name a bucket. Received: {public_uri(uri)!r}. "
            f"Write {parts.scheme}://BUCKET/PATH."
        )
    opened = _GoogleBucket if parts.scheme.casefold() == "gs" else _S3Bucket
    return opened(parts.netloc), uri.partition("://")[2].partition("/")[2]  # "?" and "#" may be in a key


class _GoogleBucket:
    def __init__(self, name: str) -> None:
        try:
            from google.auth.exceptions import DefaultCredentialsError
            from google.cloud import storage
        except ImportError as error:
            raise _not_installed("gs", "google-cloud-storage", "train", error) from error
        try:
            client = storage.Client()
        except DefaultCredentialsError:  # public buckets can be read by anyone
            client = storage.Client.create_anonymous_client()
        self._bucket = client.bucket(name)

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        for blob in self._bucket.client.list_blobs(self._bucket, prefix=prefix):
            yield blob.name, blob.size

    def download(self, key: str, target: Path) -> None:
        self._bucket.blob(key).download_to_filename(str(target))


class _S3Bucket:
    def __init__(self, name: str) -> None:
        try:
            import boto3
        except ImportError as error:
            raise _not_installed("s3", "boto3", "s3", error) from error
        self._name = name
        self._client: Any = boto3.client("s3")  # endpoint and credentials: AWS_ENDPOINT_URL, AWS_...

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix)
        for page in pages:
            for item in page.get("Contents", ()):
                yield item["Key"], item["Size"]

    def download(self, key: str, target: Path) -> None:
        self._client.download_file(self._name, key, str(target))


def _not_installed(scheme: str, package: str, extra: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{scheme}:// needs the package {package}, which is not installed. Received: {error}. "
        f"Install kubegraft[{extra}]."
    )
