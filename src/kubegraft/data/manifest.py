"""What a dataset directory contains, readable without TensorFlow.

    manifest.json      classes, splits, counts, digest, warnings and facts
    images.jsonl       one `ImageRecord` a line, every accepted image
    quarantine.jsonl   one `QuarantinedFile` a line, every file that is not used, with its reason

`kubegraft.data.ingest` writes these files; every later stage starts by reading the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import DataError
from kubegraft.recipes import DatasetFacts
from kubegraft.stage import write_atomically

__all__ = [
    "DatasetFacts",
    "ImageRecord",
    "Manifest",
    "QuarantinedFile",
    "SplitSummary",
    "dataset_digest",
    "load_manifest",
    "read_images",
    "read_quarantine",
    "write_lines",
]

SPLITS: Final = ("train", "validation", "test")
SCHEMA: Final = 1
MANIFEST_FILE: Final = "manifest.json"
IMAGES_FILE: Final = "images.jsonl"
QUARANTINE_FILE: Final = "quarantine.jsonl"
_DIGEST_FORMAT: Final = "kubegraft dataset 1"


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """One split of a dataset.

    Attributes:
        num_images: Images in the split.
        class_counts: Images of each class, in the order of the manifest's `classes`.
        shards: Names of the split's TFRecord files, in the order that `<split>.index.npy` numbers them.
    """

    num_images: int
    class_counts: tuple[int, ...]
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    r"""One accepted image.

    Attributes:
        path: Path below the source's root, `/` between folders; bytes that are not UTF-8 show as `\xff`.
        label: Class name (`class` in the file).
        split: One of `SPLITS`.
        sha256: Digest of the file's bytes, 64 hex digits.
        width: Pixels, after EXIF orientation.
        height: Pixels, after EXIF orientation.
        format: `jpeg`, `png`, `gif`, `bmp`, `webp` or `tiff`.
        mode: Pillow's name of the pixel format in the file, for example `CMYK`.
        shard: Name of the TFRecord file that holds the bytes.
        index: Position in the split, the argument of `SplitReader.read`.
    """

    path: str
    label: str
    split: str
    sha256: str
    width: int
    height: int
    format: str
    mode: str
    shard: str
    index: int


@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """One file that is not used.

    Attributes:
        path: As in `ImageRecord`.
        label: Class that the file's folder names, or None outside class folders (`class` in the file).
        split: Split that the file's folder names, or None where splits are carved by ingest.
        reason: Short code, for example `truncated`; `kubegraft.data.inspection.REASONS` describes each.
        detail: What the decoder or the system said.
    """

    path: str
    label: str | None
    split: str | None
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        classes: Class names in the order of their labels 0, 1, ...
        splits: Summary of each of `SPLITS`.
        digest: Names the dataset; see `dataset_digest`.
        num_found: Files in the source, `num_accepted + num_quarantined`.
        num_accepted: Images in the three splits.
        num_quarantined: Files that are not used.
        warnings: What a user should know about the data, one sentence or more each.
        facts: What recipes choose from.
        source: Where the images came from, without credentials.
        seed: Seed of the split.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, SplitSummary]
    digest: str
    num_found: int
    num_accepted: int
    num_quarantined: int
    warnings: tuple[str, ...]
    facts: DatasetFacts
    source: str
    seed: int

    def __post_init__(self) -> None:
        """Make the mapping of splits read-only."""
        object.__setattr__(self, "splits", types.MappingProxyType(dict(self.splits)))

    def save(self, dataset_dir: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into `dataset_dir`, atomically."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["splits"] = {name: dataclasses.asdict(split) for name, split in self.splits.items()}
        values["facts"] = dataclasses.asdict(self.facts)
        text = json.dumps({"schema": SCHEMA, **values}, indent=2, ensure_ascii=False)
        write_atomically(Path(dataset_dir) / MANIFEST_FILE, text + "\n")


def load_manifest(dataset_dir: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a dataset directory.

    Raises:
        DataError: If it is missing, damaged, or written by a newer kubegraft.
    """
    path = Path(dataset_dir) / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.pop("schema")
        if schema == SCHEMA:
            return _manifest(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"`{dataset_dir}` must be a dataset directory with a readable {MANIFEST_FILE}. "
            f"Received: {type(error).__name__}: {error}. Give the directory that `kubegraft ingest` wrote."
        ) from error
    raise DataError(
        f"`schema` of {path} must be {SCHEMA}. Received: schema={schema!r}, written by another kubegraft. "
        "Ingest the images again with this one, or install the version that wrote it."
    )


def _manifest(values: dict[str, Any]) -> Manifest:
    splits = {
        name: SplitSummary(split["num_images"], tuple(split["class_counts"]), tuple(split["shards"]))
        for name, split in values.pop("splits").items()
    }
    if set(splits) != set(SPLITS):
        raise KeyError(f"splits must be {', '.join(SPLITS)}")
    return Manifest(
        classes=tuple(values.pop("classes")),
        warnings=tuple(values.pop("warnings")),
        facts=DatasetFacts(**values.pop("facts")),
        splits=splits,
        **values,
    )


def dataset_digest(images: Iterable[tuple[str, str, str]]) -> str:
    """Return the digest of (split, class, sha256) triples: 64 hex digits.

    It covers which bytes are in which split and class and nothing else: neither file names nor the order of
    folders, time stamps or the machine.
    """
    digest = hashlib.sha256(_DIGEST_FORMAT.encode())
    for image in sorted(images):
        digest.update(b"\n" + json.dumps(image).encode())
    return digest.hexdigest()


def write_lines(path: Path, rows: Iterable[ImageRecord | QuarantinedFile]) -> None:
    """Write one JSON object a row and line to `path`."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            values = {_key(name): value for name, value in dataclasses.asdict(row).items()}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_images(dataset_dir: str | os.PathLike[str]) -> Iterator[ImageRecord]:
    """Yield every accepted image of a dataset, split by split in the order of `index`.

    Raises:
        DataError: If `images.jsonl` is missing or damaged.
    """
    for values in _read_lines(Path(dataset_dir) / IMAGES_FILE):
        yield ImageRecord(**values)


def read_quarantine(dataset_dir: str | os.PathLike[str]) -> list[QuarantinedFile]:
    """Return every file that ingest found and does not use.

    Raises:
        DataError: If `quarantine.jsonl` is missing or damaged.
    """
    return [QuarantinedFile(**values) for values in _read_lines(Path(dataset_dir) / QUARANTINE_FILE)]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield {_attribute(name): value for name, value in json.loads(line).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"`{path}` must be a file of one JSON object a line. Received: {type(error).__name__}: {error}. "
            "Ingest the images again."
        ) from error


def _key(attribute: str) -> str:
    return "class" if attribute == "label" else attribute


def _attribute(key: str) -> str:
    return "label" if key == "class" else key
