"""What is in a bundle: `bundle.json` with every file's size and SHA-256, and the check that all of it is there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.errors import StorageError
from kubegraft.reporting.progress import Progress
from kubegraft.storage import sha256_of
from kubegraft.storage.uris import inside

INDEX_FILE: Final = "bundle.json"
# Its name until everything is there: an unfinished bundle can be continued, and not be loaded.
UNFINISHED_FILE: Final = "bundle.partial.json"
SUMS_FILE: Final = "SHA256SUMS"
_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class BundledFile:
    """One file of a bundle.

    Attributes:
        path: Its path in the bundle, with "/".
        size: Bytes.
        sha256: 64 hex digits.
        kind: `wheel`, `requirements`, `weights`, `image`, `pipeline`, `manifest` or `text`.
    """

    path: str
    size: int
    sha256: str
    kind: str

    @classmethod
    def of(cls, directory: Path, path: Path, kind: str) -> BundledFile:
        """Describe the file `path` in the bundle `directory`."""
        facts = path.stat()
        digest = _digest(path, facts.st_size, facts.st_mtime_ns)
        return cls(path.relative_to(directory).as_posix(), facts.st_size, digest, kind)

    def fault(self, directory: Path) -> str:
        """Return what is wrong with this file in `directory`, or "" if it is what it should be."""
        path = inside(directory, self.path, str(directory))
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != self.size:
            return f"has {path.stat().st_size} bytes in place of {self.size}"
        actual = sha256_of(path)
        return "" if actual == self.sha256 else f"has SHA-256 {actual} in place of {self.sha256}"


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    """Return a file's SHA-256, computed once for as long as it looks the same: an index is written more than once."""
    return sha256_of(path)


@dataclass(frozen=True, slots=True)
class BundledWeights:
    """Published weights of a backbone, for one input size.

    Attributes:
        backbone: Name in kubegraft.
        path: Path in the bundle.
        sha256: 64 hex digits.
        published_hash: MD5 or SHA-256 that Keras states, which the file had; "" where Keras states none.
    """

    backbone: str
    path: str
    sha256: str
    published_hash: str


@dataclass(frozen=True, slots=True)
class BundledImage:
    """A container image.

    Attributes:
        name: Name and tag, as manifests and pipelines name it.
        image_id: Identifier that the container tool gave it.
        digests: Names with the digest that a registry gave it; empty for an image that was built here.
        path: Its archive in the bundle.
    """

    name: str
    image_id: str
    digests: tuple[str, ...]
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The content of `bundle.json`.

    Attributes:
        kubegraft: Version that wrote it.
        target: `cpu` or `gpu`: which TensorFlow its wheels and image have.
        python: Version of Python that the wheels are for, "" without wheels.
        wheels_key: Digest of everything that decides what the wheels are, "" without wheels.
        packaged_backbones: Backbones whose weights are inside the wheels.
        weights: Weights that are files of their own.
        images: Container images.
        files: Every file, by path, but `bundle.json` and `SHA256SUMS`.
    """

    kubegraft: str = __version__
    target: str = "cpu"
    python: str = ""
    wheels_key: str = ""
    packaged_backbones: tuple[str, ...] = ()
    weights: tuple[BundledWeights, ...] = ()
    images: tuple[BundledImage, ...] = ()
    files: tuple[BundledFile, ...] = field(default=())

    def of_kind(self, kind: str) -> tuple[BundledFile, ...]:
        """Return the files of one kind."""
        return tuple(file for file in self.files if file.kind == kind)

    def write(self, path: Path) -> None:
        """Write the index, whole or not at all."""
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1) + "\n"
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


def read_bundle(directory: Path, name: str = INDEX_FILE) -> Bundle:
    """Return what the bundle in `directory` says it holds.

    Raises:
        StorageError: If there is no finished bundle, or its index can't be understood.
    """
    try:
        values: dict[str, Any] = json.loads((directory / name).read_text(encoding="utf-8"))
        if values.pop("schema") != _SCHEMA:
            raise ValueError("of another schema; read it with the kubegraft that wrote it")
        values["weights"] = tuple(BundledWeights(**each) for each in values["weights"])
        values["images"] = tuple(
            BundledImage(**{**each, "digests": tuple(each["digests"])}) for each in values["images"]
        )
        values["files"] = tuple(BundledFile(**each) for each in values["files"])
        values["packaged_backbones"] = tuple(values["packaged_backbones"])
        return Bundle(**values)
    except FileNotFoundError as error:
        unfinished = (directory / UNFINISHED_FILE).exists()
        reason = "an unfinished bundle" if unfinished else "none"
        raise StorageError(
            f"`directory` must hold {INDEX_FILE}, which a finished bundle has. Received: directory={str(directory)!r}, "
            f"which has {reason}. `kubegraft bundle create` makes it, and continues an unfinished one."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"`{INDEX_FILE}` must be the index of a bundle. Received: {directory / name}: {type(error).__name__}: "
            f"{error}. Copy the bundle again, or make it anew."
        ) from error


def verify_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Return what the bundle in `directory` holds, after every file's size and SHA-256 has been compared.

    Raises:
        StorageError: If there is no finished bundle, or a file is missing or another one; all such are named.
    """
    directory = Path(directory)
    bundle = read_bundle(directory)
    faults = []
    with Progress("bundle", len(bundle.files), "files") as progress:
        for file in bundle.files:
            fault = file.fault(directory)
            if fault:
                faults.append(f"{file.path} {fault}")
            progress.update()
    if faults:
        raise StorageError(
            f"Every file of a bundle must be as it was written. Received: in {directory}, {'; '.join(faults)}. "
            "Copy these files again; nothing was loaded."
        )
    return bundle


def write_sums(directory: Path, files: Iterable[BundledFile]) -> None:
    """Write the digests as `sha256sum --check` reads them, for a machine that has no kubegraft yet."""
    index = hashlib.sha256((directory / INDEX_FILE).read_bytes()).hexdigest()
    lines = [f"{file.sha256}  {file.path}\n" for file in files]
    (directory / SUMS_FILE).write_text("".join([*lines, f"{index}  {INDEX_FILE}\n"]), encoding="utf-8")
