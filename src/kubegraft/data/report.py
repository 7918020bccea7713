"""The report of an ingest: what is in the dataset, what it looks like, and what was left out and why."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.data.decode import decode_bytes
from kubegraft.data.inspection import REASONS
from kubegraft.data.manifest import Manifest, QuarantinedFile, read_quarantine
from kubegraft.data.shards import SplitReader
from kubegraft.reporting.html import render
from kubegraft.stage import write_atomically

# Bounds that keep the page under about 10 MB, however large the dataset; quarantine.jsonl has everything.
_MOST_CLASSES_PICTURED: Final = 100
_SAMPLES_PER_CLASS: Final = 6
_MOST_FILES_LISTED: Final = 1000
_THUMBNAIL_PIXELS: Final = 96


def write_report(dataset_dir: Path, manifest: Manifest) -> None:
    """Write `report.html` into a dataset directory that is complete otherwise."""
    page = render(
        "dataset.html",
        manifest=manifest,
        samples=list(_samples(dataset_dir, manifest)),
        num_unpictured=max(0, len(manifest.classes) - _MOST_CLASSES_PICTURED),
        quarantine=list(_by_reason(read_quarantine(dataset_dir))),
    )
    write_atomically(dataset_dir / "report.html", page)


def thumbnail(encoded: bytes) -> str:
    """Return a `data:` URI of a small JPEG of an image, as the decoder of training sees it."""
    from PIL import Image

    image = Image.fromarray(decode_bytes(encoded))
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _samples(dataset_dir: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the first images of each class in train; their order by sha256 makes them a random sample."""
    with SplitReader(dataset_dir, manifest, "train") as reader:
        for label, name in enumerate(manifest.classes[:_MOST_CLASSES_PICTURED]):
            indices = np.flatnonzero(reader.labels == label)[:_SAMPLES_PER_CLASS]
            pictures = [
                {"uri": thumbnail(reader.read(int(index))), "path": reader.paths[index]} for index in indices
            ]
            yield {"name": name, "pictures": pictures}


def _by_reason(quarantined: list[QuarantinedFile]) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[QuarantinedFile]] = defaultdict(list)
    for file in quarantined:
        groups[file.reason].append(file)
    for reason, files in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        yield {
            "reason": reason,
            "meaning": REASONS[reason],
            "num_files": len(files),
            "files": files[:_MOST_FILES_LISTED],
        }
