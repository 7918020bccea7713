"""What a training stage writes: the model with its metadata, and the history of its epochs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import keras
import numpy as np
import tensorflow as tf

from kubegraft import __version__
from kubegraft.config import TrainingConfig
from kubegraft.data.manifest import Manifest
from kubegraft.errors import TrainingError
from kubegraft.modeling.classifier import model_digest, save_classifier
from kubegraft.recipes import Choice
from kubegraft.reporting.events import log_event
from kubegraft.stage import Outcome, write_atomically
from kubegraft.storage import public_uri
from kubegraft.training.history import History
from kubegraft.training.workers import ALONE, Workers

MODEL_SCHEMA: Final = 1
HISTORY_FILE: Final = "history.json"
HEAD_HISTORY_FILE: Final = "head_history.json"


def require_images(manifest: Manifest) -> None:
    """Raise TrainingError if there is nothing to train on or to choose a model by."""
    for split in ("train", "validation"):
        if not manifest.splits[split].num_images:
            raise TrainingError(
                f"`{split}` split must hold images. Received: {split}=0 images. Ingest more images, or raise the "
                f"fraction that is held out for it."
            )


def log_choices(phase: str, choices: Iterable[Choice]) -> None:
    """Log each chosen value with its reason, as the report will show it."""
    for choice in choices:
        log_event(phase, "choice", name=choice.name, value=choice.value, reason=choice.reason)


def write_model(
    directory: Path,
    model: Any,
    manifest: Manifest,
    history: History,
    config: TrainingConfig,
    *,
    phase: str,
    choices: Sequence[Choice],
    facts: dict[str, Any],
    work: dict[str, float],
    workers: Workers = ALONE,
) -> Outcome:
    """Write a model directory, if this is the chief, and return the stage's outcome.

    Args:
        directory: Empty directory to write into.
        model: Classifier.
        manifest: Dataset it was trained on.
        history: What happened in training.
        config: Resolved config.
        phase: `train_head` or `fine_tune`.
        choices: What the recipe chose.
        facts: More to record in the model's metadata; JSON values.
        work: What `work_of` returned. It goes into the metrics only: it depends on what others left in the cache.
        workers: Those who trained it.

    Raises:
        TrainingError: If another worker holds another model.
    """
    digest = model_digest(model)
    workers.require_equal(digest, "model")
    versions = {
        "tensorflow": tf.__version__,  # the package is called otherwise on GPU machines
        "keras": keras.__version__,
        "numpy": np.__version__,
        "kubegraft": __version__,
        "python": platform.python_version(),
    }
    metadata = {
        "schema": MODEL_SCHEMA,
        "stage": phase,
        "classes": list(manifest.classes),
        "dataset_digest": manifest.digest,
        "model_digest": digest,
        "choices": [dataclasses.asdict(choice) for choice in choices],
        "config": _public(dataclasses.asdict(config)),
        "versions": versions,
        **facts,
    }
    if workers.is_chief:
        save_classifier(model, directory, metadata)
        write_history(directory / HISTORY_FILE, history, phase)
    return Outcome(
        digest=digest,
        metrics={
            "start_validation_accuracy": history.start["validation_accuracy"],
            "validation_accuracy": history.best["validation_accuracy"],
            "validation_loss": history.best["validation_loss"],
            "best_epoch": float(history.best_epoch),
            "num_epochs": float(len(history.epochs)),
            **pace_of(history),
            **work,
        },
        provenance={
            "dataset_digest": manifest.digest,
            "model_digest": digest,
            "seed": config.seed,
            **{f"version_{name}": value for name, value in versions.items()},
            **{name: value for name, value in facts.items() if isinstance(value, (str, int, float, bool))},
        },
    )


def pace_of(history: History) -> dict[str, float]:
    """Return how fast several workers trained, as the median of the epochs; nothing for a process that trains alone."""
    measured = [epoch for epoch in history.epochs if "images_per_second" in epoch]
    names = ("images_per_second", "scaling_efficiency", "waiting_fraction")
    return {name: round(median(each[name] for each in measured), 4) for name in names if measured}


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the credentials that the URI of a weights file may hold."""
    return {**config, "weights": public_uri(config["weights"])} if "weights" in config else config


def write_history(path: Path, history: History, phase: str) -> None:
    """Write the history of one phase as JSON."""
    content = {"phase": phase, **dataclasses.asdict(history)}
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
