"""The exported model behind the server: found, checked, loaded, and asked about the bytes of image files.

TensorFlow alone loads it, as any other server would: nothing here needs Keras, or code that builds models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.data.inspection import MAX_PIXELS, brief, read_header
from kubegraft.errors import ModelError
from kubegraft.export.export import SAVED_MODEL_DIR, VERIFICATION_FILE
from kubegraft.serving.protocol import INPUT, RequestError
from kubegraft.storage import sha256_of
from kubegraft.storage.publication import PUBLICATION_FILE, Publication

_SAVED_MODEL_FILE: Final = "saved_model.pb"
_RUN_MODEL_DIR: Final = "model"  # in the output of a run
_MOST_TOGETHER: Final = 32  # images in one call of TensorFlow, which all lie resized in memory
_RECORD_DEPTH: Final = 3  # a run is published with its model/saved_model/ in it
_FORMATS: Final = "JPEG, PNG or GIF"


def find_saved_model(model: Path) -> Path:
    """Return the SavedModel directory of a model.

    Args:
        model: Output of a run or of `export`, or a SavedModel directory.

    Raises:
        ModelError: If there is none.
    """
    places = (model, model / SAVED_MODEL_DIR, model / _RUN_MODEL_DIR / SAVED_MODEL_DIR)
    for directory in places:
        if (directory / _SAVED_MODEL_FILE).is_file():
            return directory
    raise ModelError(
        f"`model` must be a directory with a {SAVED_MODEL_DIR}/, or a SavedModel. Received: model={str(model)!r}, "
        f"which {'has none' if model.exists() else 'does not exist'}. Give the model/ of `kubegraft run`, or the "
        "output of `kubegraft export` with `saved_model` among its formats."
    )


def check_export(directory: Path) -> str:
    """Check a SavedModel against what lies beside it, as far as there is any, and say what was there.

    `verification.json` must say that the SavedModel answers like the trained model; where the folder was
    published, every file must have the digest it was published with.

    Args:
        directory: SavedModel directory.

    Returns:
        What was checked: "proof", "digests", both, or "nothing".

    Raises:
        ModelError: If the proof can't be read or says otherwise, or a file is another.
    """
    checked = []
    if directory.name == SAVED_MODEL_DIR and (directory.parent / VERIFICATION_FILE).is_file():
        _require_proof(directory.parent / VERIFICATION_FILE)
        checked.append("proof")
    for folder in (directory, *directory.resolve().parents)[:_RECORD_DEPTH]:
        if (folder / PUBLICATION_FILE).is_file() and _is_as_published(folder.resolve(), directory.resolve()):
            checked.append("digests")
    return " and ".join(checked) or "nothing"


def _require_proof(path: Path) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        difference, tolerance = values["formats"]["saved_model"]["max_difference"], values["tolerance"]
        is_alike = math.isfinite(difference) and difference <= tolerance
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"`{path}` must say how far the SavedModel's answers are off. Received: {type(error).__name__}: "
            f"{error}. Export the model again."
        ) from error
    if not is_alike:
        raise ModelError(
            f"The SavedModel must answer like the trained model. Received: {path} with a difference of "
            f"{difference!r} where `tolerance` is {tolerance!r}. Export the model again."
        )


def _is_as_published(folder: Path, directory: Path) -> bool:
    """Return whether a publication's record speaks of the SavedModel; then its files are those of the record."""
    record = Publication.from_json((folder / PUBLICATION_FILE).read_bytes(), str(folder))
    published = {folder / file.path: file.sha256 for file in record.files}
    if directory / _SAVED_MODEL_FILE not in published:
        return False
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        if path.name != PUBLICATION_FILE and sha256_of(path) != published.get(path):
            raise ModelError(
                f"`{path}` must be the file that was published. Received: another SHA-256 than "
                f"{folder / PUBLICATION_FILE} has. Copy or publish the model again."
            )
    return True


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded SavedModel; may be asked by several threads at once.

    Attributes:
        saved_model: What TensorFlow loaded; keeps the signatures alive.
        signatures: Name -> SignatureDef in protobuf's JSON.
    """

    saved_model: Any
    signatures: Mapping[str, Any]

    @classmethod
    def load(cls, directory: Path) -> ServedModel:
        """Load a SavedModel directory, and ask it once.

        Raises:
            ModelError: If it can't be loaded, or has no signature that takes `image_bytes`.
        """
        from kubegraft import tensorflow_setup  # noqa: F401 - quiets TensorFlow before it is imported

        import tensorflow as tf  # isort: skip

        tf.config.experimental.enable_tensor_float_32_execution(False)  # as when the export was proved
        try:
            for gpu in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(gpu, True)
            served = cls(tf.saved_model.load(str(directory)), _signature_documents(directory))
            served.ask([bytes(tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy())], "serve")
        except (OSError, ValueError, KeyError, TypeError, RequestError, tf.errors.OpError) as error:
            raise ModelError(
                f"`{directory}` must be a SavedModel with the signature 'serve' that takes {INPUT!r}. Received: "
                f"{brief(error)}. Give the output of `kubegraft export`."
            ) from error
        return served

    def ask(self, images: Sequence[bytes], signature: str) -> dict[str, list[Any]]:
        """Return each output of a signature: name -> a value for each image.

        Args:
            images: Bytes of JPEG, PNG or GIF files, at least one.
            signature: Name of a signature.

        Raises:
            RequestError: 400, if the signature is unknown or a file can't be used as an image; it names the first.
        """
        if signature not in self.saved_model.signatures:
            raise RequestError(400, f'Serving signature name: "{signature}" not found in signature def')
        function = self.saved_model.signatures[signature]
        sizes = [_num_pixels(encoded, index) for index, encoded in enumerate(images)]
        answers: dict[str, list[Any]] = {}
        for start, stop in _together(sizes):
            for name, values in _call(function, images[start:stop], start).items():
                answers.setdefault(name, []).extend(_plain(values))
        return answers


def _signature_documents(directory: Path) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    message = SavedModel.FromString((directory / _SAVED_MODEL_FILE).read_bytes())
    return {
        name: MessageToDict(
            signature, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for name, signature in message.meta_graphs[0].signature_def.items()
    }


def _num_pixels(encoded: bytes, index: int) -> int:
    """Return how large an image is before it is decoded: a small file may hold a huge picture."""
    from kubegraft.data.decode import NATIVE_FORMATS, sniff_format

    format_ = sniff_format(encoded[:12])
    if format_ not in NATIVE_FORMATS:
        found = f"a {format_.upper()}" if format_ else "bytes of none of these" if encoded else "no bytes"
        raise _unusable(index, f"{found}. Convert it to PNG" if format_ else found)
    try:
        num_pixels = read_header(encoded, format_)[1]
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise _unusable(index, brief(error)) from error
    if num_pixels > MAX_PIXELS:
        raise _unusable(index, f"{num_pixels / 1e6:.0f} million pixels, more than {MAX_PIXELS // 10**6}")
    return num_pixels


def _together(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ranges of images that may lie decoded in memory at once: as many pixels as one image may have."""
    start = num_pixels = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == _MOST_TOGETHER or num_pixels + size > MAX_PIXELS):
            yield start, index
            start, num_pixels = index, 0
        num_pixels += size
    yield start, len(sizes)


def _call(function: Any, images: Sequence[bytes], first: int) -> dict[str, Any]:
    """Ask TensorFlow about a batch; if it fails, ask about each image alone to find the one to blame."""
    import tensorflow as tf

    try:
        return dict(function(**{INPUT: tf.constant(images, tf.string)}))
    except tf.errors.InvalidArgumentError as error:
        if len(images) == 1:
            raise _unusable(first, brief(error)) from error
        for index, encoded in enumerate(images):
            _call(function, [encoded], first + index)
        raise


def _plain(values: Any) -> list[Any]:
    """Return a tensor as nested lists; a float32 as the shortest number that is read back as the same."""
    array = values.numpy()
    if array.dtype.kind == "f":
        array = array.astype(str).astype(float)
    return list(array.tolist())


def _unusable(index: int, received: str) -> RequestError:
    return RequestError(
        400, f"Image {index} must be a whole {_FORMATS} file. Received: {received}", instance=index
    )
