"""Script, run in a fresh process: what exported files answer, by TensorFlow, Keras and numpy alone.

    python -P fresh_answers.py REQUEST.npz ANSWERS.npz

The request holds `saved_model` and `keras` (paths, "" for none), `encoded_<i>` (bytes of image files as
`uint8[n]`) and `pixels_<i>` (the same images, `uint8[height, width, 3]`) for i = 0, 1, ... The answers hold
`float32[images, classes]` by the way they were asked for, and `class_names`. It must not import kubegraft:
a server doesn't have it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf


def main(request_path: str, answers_path: str) -> None:
    """Load what the request names, and write what it answers."""
    tf.config.experimental.enable_tensor_float_32_execution(False)  # rounds to 10 bits on newer GPUs
    request = np.load(request_path, allow_pickle=False)
    encoded, pixels = _series(request, "encoded"), _series(request, "pixels")
    answers: dict[str, Any] = {"tensorflow_version": tf.__version__}
    if path := str(request["saved_model"]):
        answers |= _ask_saved_model(path, [each.tobytes() for each in encoded])
    if path := str(request["keras"]):
        answers |= _ask_keras(path, pixels)
    if any(name.split(".")[0] == "kubegraft" for name in sys.modules):
        raise RuntimeError("the export needs kubegraft to be loaded")
    np.savez(answers_path, **answers)


def _series(request: Any, name: str) -> list[Any]:
    count = sum(key.startswith(f"{name}_") for key in request.files)
    return [request[f"{name}_{index}"] for index in range(count)]


def _ask_saved_model(path: str, encoded: list[bytes]) -> dict[str, Any]:
    signatures = tf.saved_model.load(path).signatures
    serve = signatures["serve"]
    together = serve(image_bytes=tf.constant(encoded))
    default = signatures["serving_default"](image_bytes=tf.constant(encoded))
    alone = [serve(image_bytes=tf.constant([each]))["probabilities"][0] for each in encoded]
    return {
        "saved_model_batch": together["probabilities"],
        "saved_model_single": np.stack(alone),
        "saved_model_default": default["probabilities"],
        "class_names": together["class_names"].numpy().astype(bytes),
        "predicted_class": together["predicted_class"].numpy().astype(bytes),
    }


def _ask_keras(path: str, pixels: list[Any]) -> dict[str, Any]:
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    # A batch needs images of one size: each image, with its mirror image.
    pairs = [np.stack([each, each[:, ::-1]]) for each in pixels]
    return {
        "keras_single": np.stack([np.asarray(model(each[np.newaxis], training=False))[0] for each in pixels]),
        "keras_batch": np.stack([np.asarray(model(pair, training=False))[0] for pair in pairs]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
