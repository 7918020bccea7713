"""The record of a published folder: which files belong to it, with their digests, and whether they are all there.

It is one small object beside the files, written first as `publishing` and last as `complete`. A reader goes by it,
so that it sees all of a publication or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import ConfigError, StorageError
from kubegraft.storage.digests import sha256_of
from kubegraft.storage.uris import public_uri

PUBLICATION_FILE: Final = "_kubegraft.json"
PARTIAL_FOLDER: Final = "_kubegraft.partial"
COMPLETE: Final = "complete"
PUBLISHING: Final = "publishing"
_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file of a publication.

    Attributes:
        path: Its path in the folder, with "/".
        size: Bytes.
        sha256: 64 hex digits.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Publication:
    """A published folder.

    Attributes:
        digest: SHA-256 of the files' paths and digests, 64 hex digits; equal content has an equal digest.
        files: The files by path. While it is being published: all that may be there, of the former one too.
        state: `complete`, or `publishing` while files are put in place.
    """

    digest: str
    files: tuple[PublishedFile, ...]
    state: str = COMPLETE

    def to_json(self) -> bytes:
        """Return the record's content."""
        return (json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, uri: str) -> Publication:
        """Return what a record says.

        Raises:
            StorageError: If it can't be understood.
        """
        try:
            values: dict[str, Any] = json.loads(content)
            if values["schema"] != _SCHEMA:
                raise ValueError(f"schema {values['schema']!r}")
            files = tuple(PublishedFile(**file) for file in values["files"])
            return cls(str(values["digest"]), files, str(values["state"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"`{public_uri(uri)}/{PUBLICATION_FILE}` must be a record of schema {_SCHEMA}. Received: "
                f"{type(error).__name__}: {error}. Publish again, or read it with the kubegraft that wrote it."
            ) from error


def describe(directory: Path, only: Collection[str] | None) -> Publication:
    """Return the publication that a local directory would be.

    Args:
        directory: Local directory.
        only: Names at its top that belong to it, or None for all.

    Raises:
        ConfigError: If there is no file in it, or a name of `only` is not there.
        StorageError: If a file can't be read.
    """
    missing = [name for name in only or () if not (directory / name).exists()]
    paths = sorted(_files(directory, only), key=lambda path: path.relative_to(directory).as_posix())
    if missing or not paths:
        raise ConfigError(
            f"`directory` must be a directory with files to publish. Received: directory={str(directory)!r}, "
            f"which has no {', '.join(missing) or 'file'}. Check the path."
        )
    files = tuple(
        PublishedFile(path.relative_to(directory).as_posix(), path.stat().st_size, sha256_of(path))
        for path in paths
    )
    listing = "".join(f"{file.sha256}  {file.path}\n" for file in files)
    return Publication(hashlib.sha256(listing.encode()).hexdigest(), files)


def _files(directory: Path, only: Collection[str] | None) -> Iterator[Path]:
    for root, _, names in os.walk(directory):
        for name in names:
            path = Path(root, name)
            top = path.relative_to(directory).parts[0]
            if top not in (PUBLICATION_FILE, PARTIAL_FOLDER) and (only is None or top in only):
                yield path
