"""A small dataset and classifiers on it, as the stages before evaluation leave them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kubegraft.config import HeadConfig, IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import build_classifier, model_digest, parts, save_classifier
from kubegraft.stage import Outcome, run_stage

INPUT_SIZE = 32
NAMES = ("blau & <b>", "grün", "red")
_COLOURS = {"blau & <b>": (40, 60, 200), "grün": (50, 180, 60), "red": (200, 50, 40)}
_SUFFIXES = ("jpg", "png", "webp", "jpg", "bmp", "jpg")


def write_dataset(root: Path, per_class: int = 18) -> Path:
    """Images of several formats and odd sizes, one of them damaged, ingested."""
    random = np.random.default_rng(0)
    for name in NAMES:
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            height, width = random.integers(24, 60, 2)
            noise = random.integers(0, 120, (height, width, 3))
            pixels = np.clip(noise + np.array(_COLOURS[name]) - 60, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number} ü.{_SUFFIXES[number % len(_SUFFIXES)]}")
    (root / "images" / "red" / "<script>.jpg").write_bytes(b"no image")
    config = IngestConfig(source=str(root / "images"), validation_fraction=0.2, test_fraction=0.4)
    ingest(root / "dataset", config)
    return root / "dataset"


def write_model(
    directory: Path, dataset_dir: Path, *, skill: float, features: str = "last", **facts: object
) -> Path:
    """A model directory whose head was fitted to the training split; `skill` scales its logits."""
    manifest = load_manifest(dataset_dir)
    options = HeadConfig(weights="imagenet", dropout=0.5, seed=1, features=features)
    model = build_classifier(get_backbone(options.backbone), INPUT_SIZE, manifest.classes, options)
    _fit_head(model, SplitReader(dataset_dir, manifest, "train"), skill)
    metadata = {
        "schema": 1,
        "stage": "fine_tune",
        "classes": list(manifest.classes),
        "backbone": options.backbone,
        "weights": options.weights,
        "weights_digest": options.weights,
        "input_size": INPUT_SIZE,
        "num_unfrozen_blocks": 0,
        "model_digest": model_digest(model),
        "choices": [{"name": "num_blocks", "value": 3, "reason": "few <images>"}],
        "head_choices": [{"name": "learning_rate", "value": 0.001, "reason": "set by the user"}],
        "config": {"seed": 1, "augmentation": "none"},
        "versions": {"keras": "3.15.1"},
        **facts,
    }

    def body(workspace):
        save_classifier(model, workspace.staging, metadata)
        for name, phase in (("head_history", "train_head"), ("history", "fine_tune")):
            (workspace.staging / f"{name}.json").write_text(json.dumps(_history(phase)))
        return Outcome(digest=model_digest(model))

    run_stage("fine_tune", directory, inputs={}, config=options, body=body)
    return directory


def _fit_head(model, reader, skill):
    import tensorflow as tf

    from kubegraft.data.decode import decode_bytes

    layers = parts(model)
    resized = [tf.image.resize(decode_bytes(each), [INPUT_SIZE] * 2, antialias=True) for each in reader]
    features = np.asarray(layers.pool(layers.backbone(tf.stack(resized), training=False)))
    layers.set_standardisation(features.mean(0), features.var(0))
    inputs = np.asarray(layers.standardise(features))
    targets = np.eye(len(NAMES))[reader.labels] - 1 / len(NAMES)
    kernel = inputs.T @ np.linalg.solve(inputs @ inputs.T + 10 * np.eye(len(inputs)), targets) * skill
    layers.head_layers[-1].set_weights([kernel.astype(np.float32), np.zeros(len(NAMES), np.float32)])


def _history(phase):
    epochs = [
        {
            "epoch": epoch,
            "train_loss": 1 / (epoch + 1),
            "train_accuracy": 1 - 0.5 / (epoch + 1),
            "validation_loss": 1.1 / (epoch + 1),
            "validation_accuracy": 1 - 0.6 / (epoch + 1),
        }
        for epoch in range(4)
    ]
    start = {"validation_loss": 1.2, "validation_accuracy": 0.3}
    return {"phase": phase, "epochs": epochs, "best_epoch": 3, "start": start, "stopped": ""}
