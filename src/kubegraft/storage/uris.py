"""What a path or URI names, and how it may be shown. Pure functions; nothing here opens anything."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from kubegraft.errors import ConfigError, StorageError, suggestion

SCHEMES: Final = ("file", "http", "https", "gs", "s3")
OBJECT_SCHEMES: Final = ("gs", "s3")


def scheme_of(uri: str) -> str:
    """Return the scheme in lower case, or "" for a path."""
    return urlsplit(uri).scheme.casefold() if "://" in uri else ""


def known_scheme(uri: str) -> str:
    """Return the scheme in lower case, or "" for a path.

    Raises:
        ConfigError: If it is none that can be read.
    """
    scheme = scheme_of(uri)
    if scheme and scheme not in SCHEMES:
        raise ConfigError(
            f"A URI must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}. Received: "
            f"{public_uri(uri)!r}.{suggestion(scheme, SCHEMES)}"
        )
    return scheme


def is_remote(uri: str) -> bool:
    """Return whether `uri` names something that has to be fetched."""
    return scheme_of(uri) not in ("", "file")


def local_path(uri: str) -> Path:
    """Return the path of a local source: a path, `~` allowed, or a `file://` URI."""
    if scheme_of(uri) == "file":
        return Path(unquote(urlsplit(uri).path))
    return Path(uri).expanduser()


def public_uri(uri: str) -> str:
    """Return `uri` without user name, password and query, which may hold credentials."""
    if not is_remote(uri):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Return the bucket of a `gs://` or `s3://` URI, and the key or prefix in it, "" for all of the bucket.

    Raises:
        ConfigError: If no bucket is named.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")  # "?" and "#" may be in a key
    if not bucket:
        scheme = scheme_of(uri)
        raise ConfigError(
            f"A {scheme}:// URI must name a bucket. Received: {public_uri(uri)!r}. Write {scheme}://BUCKET/PATH."
        )
    return bucket, key


def as_folder(key: str) -> str:
    """Return the prefix that all keys in the folder `key` begin with; "" for the whole bucket."""
    return key.rstrip("/") + "/" if key.strip("/") else ""


def inside(directory: Path, relative: str, uri: str) -> Path:
    """Return the path of the object `relative` to `directory`.

    Raises:
        StorageError: If its name leads out of the folder.
    """
    parts = PurePosixPath(relative).parts
    if not parts or ".." in parts or PurePosixPath(relative).is_absolute():
        raise StorageError(
            f"`{public_uri(uri)}` holds an object whose name leads out of the folder. Received: "
            f"{relative!r}. Rename it."
        )
    return directory.joinpath(*parts)
