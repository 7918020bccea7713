"""Features by `model.predict`, and scikit-learn's logistic regression on them: the quick way that people know."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kubegraft.modeling.backbones import get_backbone

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--backbone", default="efficientnet_lite0")
parser.add_argument("--weights", default="imagenet")
parser.add_argument("--input-size", type=int, default=224)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only-features", action="store_true")
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def main() -> None:
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    core = get_backbone(options.backbone).build(options.input_size, options.weights, seed=options.seed)
    model = keras.Model(core.input, keras.layers.GlobalAveragePooling2D()(core.output))
    folders = sorted(path for path in options.data.iterdir() if path.name != "test")
    started = time.monotonic()
    features = {path.name: extract(model, path, options.input_size) for path in folders}
    num_images = sum(len(labels) for _, labels in features.values())
    say("features", images=num_images, phase_seconds=time.monotonic() - started)
    result = {"images_decoded": num_images, "feature_seconds": time.monotonic() - started}
    if not options.only_features:
        result |= classify(features, model, options)
    print(json.dumps(result))


def extract(model, folder: Path, side: int):
    """Return the features and labels of a split, in the order of its files."""
    images = keras.utils.image_dataset_from_directory(
        folder, image_size=(side, side), batch_size=32, shuffle=False, verbose=False
    )
    labels = np.concatenate([label.numpy() for label in _labels(folder)])
    return model.predict(images.prefetch(tf.data.AUTOTUNE), verbose=0), labels


def _labels(folder: Path):
    """Yield the labels without decoding the images once more."""
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        yield tf.fill([sum(1 for _ in path.iterdir())], number)


def classify(features, model, options) -> dict:
    """Fit for several strengths of regularisation, and keep the one that is best on validation."""
    best = (-1.0, None)
    for strength in STRENGTHS:
        candidate = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        candidate.fit(*features["train"])
        accuracy = candidate.score(*features["validation"])
        say("epoch", strength=strength, validation_accuracy=accuracy)
        if accuracy > best[0]:
            best = (accuracy, candidate)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "head.pickle").write_bytes(pickle.dumps(best[1]))
    np.savez(options.output / "features.npz", **{name: rows for name, (rows, _) in features.items()})
    test = {}
    if (options.data / "test").is_dir():
        test["head"] = best[1].score(*extract(model, options.data / "test", options.input_size))
    return {"validation_accuracy": {"head": best[0]}, "test_accuracy": test}


def say(event: str, **fields) -> None:
    print(json.dumps({"stage": "train_head", "event": event, **fields}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
