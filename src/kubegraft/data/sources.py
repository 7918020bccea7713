"""From what a user names as the source to a local folder: samples, folders, archives and URIs."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from kubegraft import storage
from kubegraft.data.samples import write_sample
from kubegraft.errors import ConfigError, DataError
from kubegraft.reporting.events import log_event

_ARCHIVE_SUFFIXES: Final = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTED_BY_PREFIX: Final = ("gs", "s3")  # schemes that can hold a folder


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A local folder of images.

    Attributes:
        root: The folder.
        is_archive: Whether it was unpacked, so that a single folder at its top is wrapping.
    """

    root: Path
    is_archive: bool


def open_source(source: str, scratch: Path) -> OpenedSource:
    """Return a local folder with the source's files; what has to be fetched or unpacked goes to `scratch`.

    What an interrupted call with the same `scratch` finished is not done again.

    Raises:
        ConfigError: If the source does not exist or is of no known kind.
        DataError: If an archive is damaged or unsafe.
        StorageError: If it can't be fetched.
    """
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme == "sample":
        return OpenedSource(_sample(source.removeprefix("sample://").strip("/"), scratch), is_archive=False)
    if scheme in ("", "file"):
        path = storage.local_path(source)
        if path.is_dir():
            return OpenedSource(path, is_archive=False)
        if not path.exists():
            raise ConfigError(
                f"`source` must exist. Received: source={source!r}, which is neither a folder nor a file"
                f"{'' if path.is_absolute() else f' in {Path.cwd()}'}. Check the spelling."
            )
        return OpenedSource(_unpacked(path, source, scratch), is_archive=True)
    is_archive = urlsplit(source).path.casefold().endswith(_ARCHIVE_SUFFIXES)
    if scheme in _LISTED_BY_PREFIX and not is_archive:
        target = scratch / "folder"
        log_event("ingest", "fetching", source=storage.public_uri(source))
        storage.fetch_tree(source, target, exact=True)  # an interrupted call may have left what is gone now
        return OpenedSource(target, is_archive=False)
    fetched = scratch / "archive"
    if not fetched.exists():
        log_event("ingest", "fetching", source=storage.public_uri(source))
        storage.fetch_file(source, fetched)
    return OpenedSource(_unpacked(fetched, storage.public_uri(source), scratch), is_archive=True)


def _sample(name: str, scratch: Path) -> Path:
    target, aside = scratch / "sample", scratch / "sample.partial"
    if not target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        write_sample(name, aside)
        aside.rename(target)
    return target


def _unpacked(archive: Path, source: str, scratch: Path) -> Path:
    target, aside = scratch / "unpacked", scratch / "unpacked.partial"
    if target.exists():
        return target
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    log_event("ingest", "unpacking", source=source)
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, aside)
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, aside)
        else:
            raise ConfigError(
                "`source` must be a folder or an archive (.zip, .tar, .tar.gz). Received: "
                f"source={source!r}, a file that is neither. Give the folder that holds the class folders."
            )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"`source` must be a whole archive whose members stay inside it, without a password. Received: "
            f"source={source!r}: {type(error).__name__}: {error}. Unpack it yourself and give the folder."
        ) from error
    aside.rename(target)
    return target


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        _require_space(sum(member.file_size for member in file.infolist()), target)
        for member in file.infolist():
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or (name.parts and name.parts[0].endswith(":")):
                raise zipfile.BadZipFile(f"member {member.filename!r} leads out of the archive")
        file.extractall(target)


def _unpack_tar(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as file:
        for member in file:
            _require_space(member.size, target)
            file.extract(member, target, filter="data")  # refuses what leads out, and devices


def _require_space(num_bytes: int, target: Path) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise DataError(
            f"`source` must fit on the disk when unpacked. Received: {num_bytes / 2**30:.1f} GiB, with "
            f"{free / 2**30:.1f} GiB free at {os.fspath(target)!r}. Free space, or choose another output."
        )
