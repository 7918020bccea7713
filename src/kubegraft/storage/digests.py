"""Checksums of files, written `<kind>:<value>` as the stores give them."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Final

_CHUNK_BYTES: Final = 1024 * 1024


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits.

    Raises:
        StorageError: If the file can't be read.
    """
    from kubegraft.storage.retries import failure

    try:
        return _hashed(Path(path), "sha256")
    except OSError as error:
        raise failure(str(path), error) from error


def checksum_of(path: Path, kind: str) -> str:
    """Return the checksum of a file.

    Args:
        path: Local file.
        kind: `sha256` or `md5`, in hex digits, or `crc32c`, in base64 of 4 bytes, big-endian, as GCS writes it.

    Raises:
        OSError: If the file can't be read.
    """
    value = _crc32c(path) if kind == "crc32c" else _hashed(path, kind)
    return f"{kind}:{value}"


def _hashed(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _crc32c(path: Path) -> str:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return base64.b64encode(checksum.digest()).decode()
