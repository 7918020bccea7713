"""A classifier on disk: one `.keras` file that also holds its metadata, and the metadata beside it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.errors import ModelError, WeightsError
from kubegraft.modeling.archive import read_metadata, require_safe, rewrite
from kubegraft.modeling.precision import with_policy
from kubegraft.stage import write_atomically

MODEL_FILE: Final = "model.keras"
METADATA_FILE: Final = "model.json"


@dataclass(frozen=True, slots=True)
class LoadedClassifier:
    """A classifier as it was saved.

    Attributes:
        model: `keras.Model`, `uint8[batch, height, width, 3]` to `float32[batch, classes]`.
        metadata: What was saved with it; `classes` is always there.
    """

    model: Any
    metadata: Mapping[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities."""
        return tuple(self.metadata["classes"])


def save_classifier(model: Any, directory: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Path:
    """Write `model.keras` and `model.json` into `directory`, each whole or not at all.

    The same weights and metadata give the same bytes. The model is written in float32, whatever it was
    trained in, so that it answers alike on any machine.

    Args:
        model: Classifier of `build_classifier`.
        directory: Where to write; made if need be.
        metadata: JSON values with `classes`, the class names in the order of the probabilities.

    Returns:
        Path of `model.keras`.

    Raises:
        ModelError: If `metadata` does not name every class.
    """
    _require_classes(model, metadata)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / MODEL_FILE
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as aside:
        written, stamped = Path(aside) / "written.keras", Path(aside) / "stamped.keras"
        with_policy(model, "float32").save(written)
        rewrite(written, stamped, metadata)
        _synced(stamped).replace(target)
    described = json.dumps(metadata, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(directory / METADATA_FILE, described + "\n")
    return target


def load_classifier(path: str | os.PathLike[str], *, policy: str = "float32") -> LoadedClassifier:
    """Return the classifier in a model directory or a `.keras` file of kubegraft.

    The file is not trusted: it must describe its model by Keras's own layers, and is opened in safe mode.

    Args:
        path: A directory with `model.keras`, or such a file.
        policy: Keras dtype policy to compute in.

    Raises:
        ModelError: If there is none, or it is not kubegraft's.
        WeightsError: If it could run code.
    """
    import keras

    file = _file_of(path)
    metadata = classifier_metadata(file)
    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(file, error) from error
    _require_classes(model, metadata)
    return LoadedClassifier(with_policy(model, policy), metadata)


def model_digest(model: Any) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every weight, in order.

    Equal digests mean models that answer bit for bit alike. The state of random generators is no weight.
    """
    digest = hashlib.sha256()
    for weight in model.weights:
        value = np.ascontiguousarray(weight.numpy())
        digest.update(f"{weight.name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def classifier_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is said about the classifier in a model directory or a `.keras` file, without loading it.

    Raises:
        ModelError: If there is none, or it is not kubegraft's.
        WeightsError: If it could run code.
    """
    file = _file_of(path)
    try:
        require_safe(file)
        metadata = read_metadata(file)
    except WeightsError:
        raise
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    if metadata is None or "classes" not in metadata:
        raise ModelError(
            f"`model` must be written by kubegraft, with its class names inside. Received: model={str(file)!r}, "
            "a .keras file of something else. To start from its weights, train a head with weights='<this file>'."
        )
    return metadata


def _file_of(path: str | os.PathLike[str]) -> Path:
    return Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"`model` must be a model directory or a .keras file. Received: model={str(file)!r}: "
        f"{type(error).__name__}: {error}. Give the output of `kubegraft train-head`, `fine-tune` or `export`."
    )


def _require_classes(model: Any, metadata: Mapping[str, Any]) -> None:
    num_outputs, classes = model.output_shape[-1], metadata.get("classes", ())
    if len(classes) != num_outputs:
        raise ModelError(
            f"`classes` must name each of the model's {num_outputs} outputs. Received: classes={list(classes)!r}. "
            "Train the head again."
        )


def _synced(path: Path) -> Path:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
