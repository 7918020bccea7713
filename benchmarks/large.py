"""Throughput and memory on many generated images, with backbones whose weights are random: accuracy means nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .contest import kubegraft, stage_seconds, variables
from .datasets import draw
from .measuring import Seen, documents, watch

BACKBONES = ("mobilenet_v2", "resnet50")
_PACKAGE = __package__ or "benchmarks"


def compare(work: Path, num_images: int, input_size: int, say: Any) -> list[dict[str, Any]]:
    """Return a row for each backbone and way: images a second, seconds, memory.

    `predict`: `model.predict` over files. `fit`: one epoch of the textbook with a frozen backbone. `kubegraft-cold` and
    `kubegraft-warm`: the stage `train_head` on the ingested dataset, from its start to its end.
    """
    draw(work / "images", num_images)
    ingest = kubegraft("ingest", work / "images", "--output", work / "dataset", "--json")
    seen = watch([ingest], variables(work / "cache", work / "home"))
    rows = [_row("", "ingest", num_images, seen, seen.seconds)]
    for backbone in BACKBONES:
        for way, command in _commands(work, backbone, input_size).items():
            # Without a dataset there is nothing to train on, and after a failure nothing is warm.
            if (way.startswith("kubegraft") and rows[0]["failed"]) or (
                way == "kubegraft-warm" and rows[-1]["failed"]
            ):
                continue
            say(f"{backbone}: {way}")
            seen = watch([command], variables(work / "cache", work / "home"))
            rows.append(_row(backbone, way, num_images, seen, _worked(way, seen)))
    return rows


def _commands(work: Path, backbone: str, input_size: int) -> dict[str, list[str]]:
    shared = ["--backbone", backbone, "--weights", "none", "--input-size", str(input_size)]
    ours, python = work / backbone, [sys.executable, "-m"]
    images = [str(work / "images"), "--output", str(work / f"{backbone}-keras")]
    return {
        "predict": [*python, f"{_PACKAGE}.features_logreg", *images, *shared, "--only-features"],
        "fit": [
            *python,
            f"{_PACKAGE}.textbook",
            *images,
            *shared,
            "--head-epochs",
            "1",
            "--tune-epochs",
            "0",
        ],
        **{
            f"kubegraft-{name}": kubegraft(
                "train-head", work / "dataset", "--output", f"{ours}-{name}", *shared, "--json"
            )
            for name in ("cold", "warm")
        },
    }


def _worked(way: str, seen: Seen) -> float:
    """Return the seconds of the work itself, without the start of Python and TensorFlow."""
    if way.startswith("kubegraft"):
        return stage_seconds(seen.events).get("train_head", seen.seconds)
    found = documents(seen.stdout)
    result = found[-1] if found else {}
    if way == "predict":
        return float(result.get("feature_seconds", seen.seconds))
    return float(result.get("epoch_seconds", {}).get("head", [seen.seconds])[0])


def _row(backbone: str, way: str, num_images: int, seen: Seen, worked: float) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "way": way,
        "num_images": num_images,
        "failed": "" if seen.exit_code == 0 else f"exit code {seen.exit_code}: {seen.tail[-2000:]}",
        "seconds": round(seen.seconds, 2),
        "work_seconds": round(worked, 2),
        "images_per_second": round(num_images / worked, 1) if worked else None,
        "peak_memory_bytes": seen.peak_memory_bytes,
        "other_cores": seen.other_cores,
    }
