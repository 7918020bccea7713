"""The proof that an export answers like its model: a fresh process is asked about real images."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kubegraft.data.decode import NATIVE_FORMATS, decode_bytes, sniff_format
from kubegraft.data.manifest import Manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import ExportError

SCHEMA: Final = 1
_SCRIPT: Final = Path(__file__).with_name("fresh_answers.py")
_MOST_SECONDS: Final = 3600  # a process that hangs must not hang the stage for ever
_SPLITS: Final = ("test", "validation", "train")


@dataclass(frozen=True, slots=True)
class Exported:
    """What is to be proved.

    Attributes:
        saved_model: SavedModel directory, or None if it was not written.
        keras: `.keras` file, or None if it was not written.
        classes: Class names that the SavedModel must return.
    """

    saved_model: Path | None
    keras: Path | None
    classes: Sequence[str]


@dataclass(frozen=True, slots=True)
class RealImage:
    """An image of the dataset: its split, its bytes as TensorFlow can decode them, and its pixels."""

    split: str
    encoded: bytes
    sha256: str
    pixels: NDArray[np.uint8]


def choose_images(dataset_dir: Path, manifest: Manifest, num_images: int) -> list[RealImage]:
    """Return images spread over the test split, and over the other splits if it has too few.

    Raises:
        ExportError: If the dataset holds no images.
    """
    chosen: list[RealImage] = []
    for split in _SPLITS:
        with SplitReader(dataset_dir, manifest, split) as reader:
            count = min(num_images - len(chosen), len(reader))
            for index in np.linspace(0, len(reader) - 1, count).round().astype(int):
                chosen.append(_real_image(split, reader.read(int(index))))
    if not chosen:
        raise ExportError(
            "`dataset` must hold images to verify the export with. Received: 0 images. Ingest images first."
        )
    return chosen


def _real_image(split: str, encoded: bytes) -> RealImage:
    pixels = decode_bytes(encoded)
    return RealImage(split, served_bytes(encoded), hashlib.sha256(encoded).hexdigest(), pixels)


def served_bytes(encoded: bytes) -> bytes:
    """Return bytes that the SavedModel can decode: the same, or a PNG of the same pixels."""
    if sniff_format(encoded[:12]) in (*NATIVE_FORMATS, None):
        return encoded
    import tensorflow as tf

    return bytes(tf.io.encode_png(decode_bytes(encoded), compression=1).numpy())


def expected_answers(model: Any, images: Sequence[RealImage]) -> NDArray[np.float32]:
    """Return what the model itself answers, one image at a time: `float32[images, classes]`."""
    rows = [np.asarray(model(image.pixels[np.newaxis], training=False))[0] for image in images]
    return np.stack(rows).astype(np.float32)


def verify(
    exported: Exported,
    images: Sequence[RealImage],
    expected: Callable[[], NDArray[np.float32]],
    *,
    tolerance: float,
    scratch: Path,
) -> dict[str, Any]:
    """Ask a fresh process, compare, and return the contents of `verification.json`.

    Args:
        exported: What was written.
        images: At least one image.
        expected: Returns what the model answers, `float32[images, classes]`; called while the fresh process starts.
        tolerance: Largest difference allowed in any probability.
        scratch: Directory for the request and the answers.

    Raises:
        ExportError: If the export can't be loaded, does not answer, or answers differently.
    """
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_fresh_answers, exported, images, scratch)
        wanted = expected()
        answers = asked.result()
    ways = [name for name in answers if name.endswith(("_single", "_batch", "_default"))]
    differences = {way: _difference(answers[way], wanted) for way in ways}
    formats: dict[str, dict[str, float]] = {}
    for name in ("saved_model", "keras"):
        own = {way.removeprefix(f"{name}_"): gap for way, gap in differences.items() if way.startswith(name)}
        if own:
            formats[name] = {"max_difference": max(own.values()), **own}
    _require_alike(formats, tolerance)
    if exported.saved_model is not None:
        _require_names(answers, exported.classes)
    return {
        "schema": SCHEMA,
        "tolerance": tolerance,
        "num_images": len(images),
        "formats": formats,
        "tensorflow": str(answers["tensorflow_version"]),
        "images": [{"split": image.split, "sha256": image.sha256} for image in images],
    }


def _fresh_answers(exported: Exported, images: Sequence[RealImage], scratch: Path) -> dict[str, Any]:
    # A new place each time: a process that outlived a killed export may still write to the old one.
    place = Path(tempfile.mkdtemp(dir=scratch))
    request_path, answers_path = place / "request.npz", place / "answers.npz"
    request: dict[str, Any] = {
        "saved_model": str(exported.saved_model or ""),
        "keras": str(exported.keras or ""),
    }
    for index, image in enumerate(images):
        request[f"encoded_{index}"] = np.frombuffer(image.encoded, np.uint8)
        request[f"pixels_{index}"] = image.pixels
    np.savez(request_path, **request)
    command = [sys.executable, "-P", str(_SCRIPT), str(request_path), str(answers_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"The export must answer in a fresh process. Received: no answer in {_MOST_SECONDS} s. "
            "Export again on a machine that is less busy."
        ) from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise ExportError(
            f"The export must load and answer in a fresh process. Received: exit status {done.returncode}:\n"
            f"{last}\nNothing was published."
        )
    with np.load(answers_path, allow_pickle=False) as answers:
        return dict(answers)


def _difference(answers: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if answers.shape != expected.shape or not np.isfinite(answers).all():
        return float("inf")
    return float(np.abs(answers.astype(np.float64) - expected).max())


def _require_alike(formats: dict[str, dict[str, float]], tolerance: float) -> None:
    for name, gaps in formats.items():
        if not gaps["max_difference"] <= tolerance:
            raise ExportError(
                f"Every probability of the {name} export must be within `tolerance` of the model's. "
                f"Received: tolerance={tolerance!r}, difference={gaps['max_difference']:.3g}. "
                "Nothing was published. A difference much above 1e-5 is a defect; please report it."
            )


def _require_names(answers: dict[str, Any], classes: Sequence[str]) -> None:
    expected = [name.encode("utf-8", "surrogateescape") for name in classes]
    names, best = answers["class_names"], answers["saved_model_batch"].argmax(axis=1)
    if any(list(row) != expected for row in names) or [expected[index] for index in best] != list(
        answers["predicted_class"]
    ):
        raise ExportError(
            f"The SavedModel must name the classes as the model does. Received: {names[0].tolist()!r}. "
            "Nothing was published."
        )
