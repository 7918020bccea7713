"""A trained classifier asked about image files: what `kubegraft predict` prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kubegraft import tensorflow_setup  # noqa: F401 - quiets TensorFlow before it is imported
from kubegraft.data.inspection import brief
from kubegraft.errors import DataError, ModelError

_SAVED_MODEL_FILE: Final = "saved_model.pb"
_RUN_MODEL_DIR: Final = "model"  # in the output of a run
_MOST_TOP: Final = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the classifier says about one image.

    Attributes:
        path: The image, as it was given.
        class_name: Its most probable class.
        probability: Of `class_name`, in [0, 1].
        top: The five most probable classes with their probabilities, best first.
    """

    path: str
    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]


# From the bytes of an image file to class names and `float32[classes]`.
Classifier = Callable[[bytes], tuple[Sequence[str], NDArray[np.float32]]]


class _UndecodableError(Exception):
    """The bytes of a file can't be decoded."""


def predict(
    model_path: str | os.PathLike[str], image_paths: Sequence[str | os.PathLike[str]]
) -> list[Prediction | DataError]:
    """Return an answer for each image, in order: a prediction, or why the file can't be used as an image.

    Args:
        model_path: Output of a run, of `export`, `train_head` or `fine_tune`, a SavedModel directory that
            `export` wrote, or a `.keras` file.
        image_paths: JPEG, PNG, GIF, BMP, WebP or TIFF files.

    Raises:
        ModelError: If there is no model that can be loaded.
    """
    classify = load(model_path)
    return [_answer(classify, os.fspath(path)) for path in image_paths]


def load(model_path: str | os.PathLike[str]) -> Classifier:
    """Return a function that classifies the bytes of one image file.

    A SavedModel is preferred to a `.keras` file: it loads without Keras, in about half the time.

    Raises:
        ModelError: If there is no model that can be loaded.
    """
    path = Path(model_path)
    if (path / _RUN_MODEL_DIR).is_dir() and not (path / _SAVED_MODEL_FILE).is_file():
        path = path / _RUN_MODEL_DIR
    for directory in (path, path / "saved_model"):
        if (directory / _SAVED_MODEL_FILE).is_file():
            return _load_saved_model(directory)
    if path.suffix == ".keras" or (path / "model.keras").is_file():
        return _load_keras(path)
    raise ModelError(
        "`model` must be a directory with a model.keras or saved_model/, a SavedModel, or a .keras file. "
        f"Received: model={str(path)!r}, which {'has none' if path.exists() else 'does not exist'}. "
        "Give the output of `kubegraft run`, export, fine-tune or train-head."
    )


def _load_saved_model(directory: Path) -> Classifier:
    import tensorflow as tf

    from kubegraft.export.verification import served_bytes

    try:
        loaded = tf.saved_model.load(str(directory))
        serve = loaded.signatures["serve"]
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise ModelError(
            f"`{directory}` must be a SavedModel with the signature 'serve'. Received: "
            f"{type(error).__name__}: {error}. Give the output of `kubegraft export`."
        ) from error

    def classify(encoded: bytes) -> tuple[Sequence[str], NDArray[np.float32]]:
        encoded = _decoded(served_bytes, encoded)
        answer = _decoded(lambda each: serve(image_bytes=tf.constant([each])), encoded)
        names = [name.decode("utf-8", "surrogateescape") for name in answer["class_names"].numpy()[0]]
        return names, answer["probabilities"].numpy()[0]

    # The functions of a SavedModel don't keep it alive.
    classify.saved_model = loaded  # type: ignore[attr-defined]
    return classify


def _load_keras(path: Path) -> Classifier:
    from kubegraft.data.decode import decode_bytes
    from kubegraft.modeling.classifier import load_classifier

    loaded = load_classifier(path)
    names = loaded.metadata["classes"]

    def classify(encoded: bytes) -> tuple[Sequence[str], NDArray[np.float32]]:
        pixels = _decoded(decode_bytes, encoded)[np.newaxis]
        return names, np.asarray(loaded.model(pixels, training=False))[0]

    return classify


def _answer(classify: Classifier, path: str) -> Prediction | DataError:
    try:
        names, probabilities = classify(_read(path))
    except _UndecodableError as error:
        return _unusable(path, str(error), error.__cause__)
    except DataError as error:
        return error
    best = np.argsort(-probabilities, kind="stable")[:_MOST_TOP]
    top = tuple((names[index], float(probabilities[index])) for index in best)
    return Prediction(path, *top[0], top)


def _decoded(decode: Callable[[bytes], Any], encoded: bytes) -> Any:
    try:
        return decode(encoded)
    except Exception as error:  # Pillow raises whatever its plugins raise on damaged bytes
        raise _UndecodableError(brief(error)) from error


def _read(path: str) -> bytes:
    from kubegraft.data.decode import sniff_format

    if Path(path).exists() and not Path(path).is_file():
        kind = "a directory" if Path(path).is_dir() else "a pipe, socket or device"  # which may never answer
        raise _unusable(path, kind, None)
    try:
        encoded = Path(path).read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error), error) from error
    if sniff_format(encoded[:12]) is None:
        raise _unusable(
            path, "its first bytes are of none of these formats" if encoded else "it is empty", None
        )
    return encoded


def _unusable(path: str, reason: str, cause: BaseException | None) -> DataError:
    error = DataError(
        f"`{path}` must be a whole JPEG, PNG, GIF, BMP, WebP or TIFF file. Received: {reason}. "
        "Check the file with an image viewer, or leave it out."
    )
    error.__cause__ = cause
    return error
