"""The first stage: from a folder or archive of labelled images to a dataset directory.

    dataset/   manifest.json, images.jsonl, quarantine.jsonl, report.html,
               <split>-NNNNN-of-NNNNN.tfrecord, <split>.index.npy, <split>.sha256.npy

Every file of the source is either an accepted image or quarantined with its reason. Memory holds a line for
each file and the bytes of a few, never the images.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from kubegraft import storage
from kubegraft.config import IngestConfig
from kubegraft.data.folders import FoundFile
from kubegraft.data.inspection import HARMLESS_REASONS, Inspection, InspectionLog, inspect_files
from kubegraft.data.layout import Layout, read_layout
from kubegraft.data.manifest import (
    IMAGES_FILE,
    QUARANTINE_FILE,
    SPLITS,
    DatasetFacts,
    ImageRecord,
    Manifest,
    QuarantinedFile,
    SplitSummary,
    dataset_digest,
    write_lines,
)
from kubegraft.data.shards import SplitWriter, shard_numbers
from kubegraft.data.sources import open_source
from kubegraft.data.splitting import AcceptedImage, assign_splits, require_usable, split_warnings
from kubegraft.errors import ConfigError, DataError, Interrupted
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.stage import Outcome, StageResult, Workspace, run_stage

STAGE: Final = "ingest"
_MOST_REASONS_NAMED: Final = 3


def ingest(
    output_dir: str | os.PathLike[str], config: IngestConfig, expected_digest: str = ""
) -> StageResult:
    """Make a dataset directory of the images that `config.source` names.

    Args:
        output_dir: Directory to make.
        config: Where the images are and how they are split.
        expected_digest: Digest that the dataset must have; "" for any.

    Returns:
        The published dataset. Its digest covers the bytes, class and split of every accepted image and
        nothing else; its metrics count files and images.

    Raises:
        ConfigError: If the source does not exist, or the output lies inside of it.
        DataError: If its folders fit no layout, a class or a split has no image that can be used, or more
            than `config.max_bad_fraction` of the files in class folders are bad, or the digest is another.
        StorageError: If it can't be fetched.
        Interrupted: If the process was asked to stop; the same call continues.
    """

    def body(workspace: Workspace) -> Outcome:
        outcome = _ingest(workspace, config)
        _require_expected(outcome.digest, expected_digest)
        return outcome

    _require_outside(Path(output_dir), config.source)
    # The bytes behind one source can change, so that a finished output says nothing about the next call.
    return run_stage(
        STAGE, output_dir, inputs={"source": config.source}, config=config, body=body, reusable=False
    )


def check_images(config: IngestConfig) -> StageResult:
    """Return what `ingest` comes to now, without the dataset, which is not kept.

    For a task before one that a cache may answer: the cache can't see that what is behind a URI has changed.

    Raises:
        KubegraftError: What `ingest` raises.
    """
    with tempfile.TemporaryDirectory(prefix="kubegraft-check-") as directory:
        return ingest(Path(directory, "dataset"), config)


def _require_expected(digest: str, expected_digest: str) -> None:
    if expected_digest and digest != expected_digest:
        raise DataError(
            f"`source` must not change while a run reads it. Received: images with the digest {digest[:16]}, which "
            f"a moment ago was {expected_digest[:16]}. Wait until whatever writes there is done, and run again."
        )


def _require_outside(output_dir: Path, source: str) -> None:
    if storage.is_remote(source):
        return
    folder = storage.local_path(source).resolve()
    if folder in (output_dir.resolve(), *output_dir.resolve().parents):
        raise ConfigError(
            "`output` must be outside of the images, or its own files would be taken for a class. Received: "
            f"output={str(output_dir)!r}, source={source!r}. Choose another output directory."
        )


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Every file of the source, on one side or the other."""

    accepted: list[tuple[FoundFile, Inspection]]
    quarantined: list[QuarantinedFile]


def _ingest(workspace: Workspace, config: IngestConfig) -> Outcome:
    from kubegraft import tensorflow_setup  # noqa: F401 - comes before the first import of tensorflow
    from kubegraft.data.report import write_report

    source = open_source(config.source, workspace.scratch)
    layout = read_layout(source.root, strip_top_folder=source.is_archive)
    log_event(STAGE, "found", files=len(layout.files), classes=len(layout.classes))
    files = _inspected(layout, workspace.scratch / "inspected.jsonl")
    if metrics.wanted():
        metrics.observe_counts("bad_images", STAGE, Counter(file.reason for file in files.quarantined))
    _require_mostly_good(files, config.max_bad_fraction)
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    images = assign_splits(files.accepted, given=layout.given, fractions=fractions, seed=config.seed)
    require_usable(images, layout.classes, layout.given)
    records = list(_write_shards(workspace.staging, images, layout.classes))
    manifest = _manifest(layout, images, records, files.quarantined, config)
    if metrics.wanted():
        metrics.observe_counts("images", STAGE, {s: found.num_images for s, found in manifest.splits.items()})
    write_lines(workspace.staging / IMAGES_FILE, records)
    write_lines(workspace.staging / QUARANTINE_FILE, files.quarantined)
    manifest.save(workspace.staging)
    for warning in manifest.warnings:
        log_event(STAGE, "warning", text=warning)
    write_report(workspace.staging, manifest)
    return _outcome(manifest)


def _inspected(layout: Layout, log_path: Path) -> _Sorted:
    accepted, quarantined = [], []
    progress = Progress(STAGE, len(layout.files), "files")
    with stopping_gracefully(), InspectionLog(log_path) as log, progress:
        for file, verdict in inspect_files(layout.files, log):
            if verdict.reason:
                quarantined.append(
                    QuarantinedFile(file.path, file.label, file.split, verdict.reason, verdict.detail)
                )
            else:
                accepted.append((file, verdict))
            progress.update(quarantined=len(quarantined))
            _stop_if_asked()
    return _Sorted(accepted, quarantined)


def _stop_if_asked() -> None:
    if stop_requested():
        raise Interrupted(
            "ingest was asked to stop. Received: SIGTERM. The same call keeps what is inspected already."
        )


def _require_mostly_good(files: _Sorted, max_bad_fraction: float) -> None:
    bad = [file for file in files.quarantined if file.reason not in HARMLESS_REASONS]
    num_files = len(bad) + len(files.accepted)
    if len(bad) <= max_bad_fraction * num_files:
        return
    example = {file.reason: file.path for file in reversed(bad)}
    worst = Counter(file.reason for file in bad).most_common(_MOST_REASONS_NAMED)
    reasons = "; ".join(f"{number} {reason}, such as {example[reason]!r}" for reason, number in worst)
    raise DataError(
        f"More than `max_bad_fraction` of the files in class folders can't be used as images. Received: "
        f"{len(bad)} of {num_files} ({len(bad) / num_files:.1%}), max_bad_fraction={max_bad_fraction!r}. "
        f"Most are {reasons}. Repair or remove them, or raise max_bad_fraction."
    )


def _write_shards(
    directory: Path, images: Sequence[AcceptedImage], classes: Sequence[str]
) -> Iterator[ImageRecord]:
    labels = {name: label for label, name in enumerate(classes)}
    for split in SPLITS:
        members = [image for image in images if image.split == split]
        numbers = shard_numbers([image.file.size for image in members])
        with SplitWriter(directory, split, numbers) as writer:
            for index, image in enumerate(members):
                record = _record(image, writer.shards[numbers[index]], index)
                writer.write(_unchanged_bytes(image), labels[image.label], _features(record))
                yield record
                _stop_if_asked()


def _unchanged_bytes(image: AcceptedImage) -> bytes:
    try:
        with open(image.file.location, "rb") as file:  # noqa: PTH123 - the name may hold undecodable bytes
            encoded = file.read()
    except OSError as error:
        raise _changed(image, f"{type(error).__name__}: {os.strerror(error.errno or 0)}") from error
    if hashlib.sha256(encoded).hexdigest() != image.verdict.sha256:
        raise _changed(image, "other bytes than a moment ago")
    return encoded


def _changed(image: AcceptedImage, received: str) -> DataError:
    return DataError(
        f"`source` must not change while it is read. Received: {received} in {image.file.path!r}. "
        "Wait until whatever writes there is done, and run again."
    )


def _record(image: AcceptedImage, shard: str, index: int) -> ImageRecord:
    verdict = image.verdict
    return ImageRecord(
        path=image.file.path,
        label=image.label,
        split=image.split,
        sha256=verdict.sha256,
        width=verdict.width,
        height=verdict.height,
        format=verdict.format,
        mode=verdict.mode,
        shard=shard,
        index=index,
    )


def _features(record: ImageRecord) -> dict[str, bytes | int]:
    return {
        "image/format": record.format.encode(),
        "image/class/text": record.label.encode(),
        "image/filename": record.path.encode(),
        "image/sha256": record.sha256.encode(),
        "image/height": record.height,
        "image/width": record.width,
    }


def _manifest(
    layout: Layout,
    images: Sequence[AcceptedImage],
    records: Sequence[ImageRecord],
    quarantined: Sequence[QuarantinedFile],
    config: IngestConfig,
) -> Manifest:
    splits = {split: _summary(split, records, layout.classes) for split in SPLITS}
    train_counts = splits["train"].class_counts
    trained = [record for record in records if record.split == "train"]
    return Manifest(
        classes=layout.classes,
        splits=splits,
        digest=dataset_digest((record.split, record.label, record.sha256) for record in records),
        num_found=len(layout.files),
        num_accepted=len(records),
        num_quarantined=len(quarantined),
        warnings=(*layout.warnings, *split_warnings(images, layout.classes)),
        facts=DatasetFacts(
            num_train=splits["train"].num_images,
            num_validation=splits["validation"].num_images,
            num_classes=len(layout.classes),
            smallest_class=min(train_counts),
            largest_class=max(train_counts),
            median_height=int(np.median([record.height for record in trained])),
            median_width=int(np.median([record.width for record in trained])),
        ),
        source=storage.public_uri(config.source),
        seed=config.seed,
    )


def _summary(split: str, records: Sequence[ImageRecord], classes: Sequence[str]) -> SplitSummary:
    members = [record for record in records if record.split == split]
    counts = Counter(record.label for record in members)
    return SplitSummary(
        num_images=len(members),
        class_counts=tuple(counts[name] for name in classes),
        shards=tuple(sorted({record.shard for record in members})),
    )


def _outcome(manifest: Manifest) -> Outcome:
    metrics = {
        "num_found": manifest.num_found,
        "num_accepted": manifest.num_accepted,
        "num_quarantined": manifest.num_quarantined,
        "num_classes": len(manifest.classes),
        **{f"num_{split}": summary.num_images for split, summary in manifest.splits.items()},
    }
    provenance = {
        "dataset_digest": manifest.digest,
        "source": manifest.source,
        "seed": manifest.seed,
        "num_warnings": len(manifest.warnings),
    }
    return Outcome(digest=manifest.digest, metrics=metrics, provenance=provenance)
