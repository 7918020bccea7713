"""Weights that a backbone starts from: where they are, whether they can be had, and loading them safely.

Nothing in a weights file is run: arrays are read from HDF5 and compared with the backbone's own layer list,
and a `.keras` file whose description holds a Lambda or foreign code is refused although that is never made.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kubegraft.errors import StorageError, WeightsError, suggestion
from kubegraft.modeling import efficientnet_lite0
from kubegraft.modeling.imagenet import ImageNetFile, cache_dir, check_hash, fetched, require_reachable

if TYPE_CHECKING:
    from kubegraft.modeling.backbone import Backbone

IMAGENET: Final = "imagenet"
NONE: Final = "none"
_KEYWORDS: Final = (IMAGENET, NONE)
_SUFFIXES: Final = (".weights.h5", ".keras")
# Keras scales EfficientNet's pixels twice, once by a layer that exists only with its own ImageNet weights.
_EFFICIENTNET_MEAN: Final = (0.485, 0.456, 0.406)
_EFFICIENTNET_DEVIATION: Final = (0.229, 0.224, 0.225)


def weights_available(backbone: Backbone) -> str:
    """Return where this machine gets the backbone's ImageNet weights from.

    Returns:
        `packaged` (installed with kubegraft), `cached` (downloaded before), `download` (from the network
        when first used), or `none` (the package that holds them is not installed).
    """
    if backbone.imagenet is None:
        return "packaged" if efficientnet_lite0.packaged_path() else "none"
    sizes = backbone.imagenet.sizes or (backbone.native_input_size,)
    cached = any(backbone.imagenet.for_size(size).cache_path.exists() for size in sizes)
    return "cached" if cached else "download"


def weights_are_here(backbone: Backbone, weights: str, input_size: int) -> bool:
    """Return whether `load_weights` needs no network.

    Args:
        backbone: A backbone.
        weights: See `check_weights`.
        input_size: Side in pixels; published weights may depend on it.
    """
    from kubegraft.storage import is_remote

    if weights != IMAGENET or backbone.imagenet is None:
        return not is_remote(weights)
    return backbone.imagenet.for_size(input_size).cache_path.exists()


def check_weights(
    backbone: Backbone, weights: str, weights_sha256: str = "", *, input_size: int | None = None
) -> str:
    """Return a digest that names the weights, after a check that they can be had; before any work.

    Args:
        backbone: Backbone that will be built.
        weights: `imagenet`, `none`, or a path or URI of a `.weights.h5` or `.keras` file, or of the very file that
            Keras publishes for the backbone, under its own name.
        weights_sha256: Expected SHA-256 of that file; "" skips the check.
        input_size: Side in pixels; some backbones have other ImageNet weights for other sizes. None means
            the native size.

    Raises:
        WeightsError: If the file is missing, has another digest, or can't be downloaded from here.
    """
    if weights == NONE:
        return NONE
    if weights != IMAGENET:
        return _checked_digest(backbone, weights, weights_sha256)
    if backbone.imagenet is None:
        efficientnet_lite0.require_packaged()
        return efficientnet_lite0.WEIGHTS_SHA256
    file = backbone.imagenet.for_size(input_size or backbone.native_input_size)
    require_reachable(file)
    return hashlib.sha256(f"{file.url} {file.file_hash}".encode()).hexdigest()


def load_weights(backbone: Backbone, model: Any, weights: str, weights_sha256: str = "") -> None:
    """Set the weights of a new model of `backbone`.

    Args:
        backbone: What `model` was made from.
        model: Its model; `none` leaves its random weights.
        weights: See `check_weights`.
        weights_sha256: See `check_weights`.

    Raises:
        WeightsError: If the weights can't be had, or are another backbone's; shows how the layers differ.
    """
    if weights == NONE:
        pass
    elif weights != IMAGENET:
        _checked_digest(backbone, weights, weights_sha256)
        if _published_file(backbone, weights):
            _load_published(model, _local_path(weights))
        else:
            _load_file(model, _local_path(weights), weights)
    elif backbone.imagenet is None:
        efficientnet_lite0.load_packaged(model)
    else:
        _load_published(model, fetched(backbone.imagenet.for_size(model.input_shape[1])))
    if backbone.display_name.startswith("EfficientNetB"):
        published = _published_file(backbone, weights) is not None
        _settle_efficientnet_scaling(model, scaled=published or weights in _KEYWORDS)


def _load_published(model: Any, path: Path) -> None:
    try:
        model.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"`weights` must be the file that Keras published for {model.name}. Received: {path}: {error}. "
            "Fetch the file again; one in Keras's cache is downloaded anew once it is removed."
        ) from error


def _settle_efficientnet_scaling(model: Any, *, scaled: bool) -> None:
    """Give EfficientNet B0 to B4 the one pixel scaling that its ImageNet weights were trained with.

    Keras divides by sqrt(deviation) in an additional layer if and only if it loads ImageNet weights itself.
    kubegraft's graph is the same with all weights, so the variance of the layer before takes that factor:
    x / sqrt(deviation**3) = x / deviation / sqrt(deviation).

    Args:
        model: Model with its weights loaded.
        scaled: Whether the scaling is meant whatever the weights say; otherwise only where a file has
            Keras's own ImageNet values. A network that was trained without scaling keeps none.
    """
    layer = model.get_layer("normalization")
    _, variance, count = layer.get_weights()
    deviation = np.array(_EFFICIENTNET_DEVIATION, np.float32)
    if scaled or np.allclose(variance, deviation**2, atol=1e-6, rtol=0):
        layer.set_weights([np.array(_EFFICIENTNET_MEAN, np.float32), deviation**3, count])
    layer.finalize_state()


def _checked_digest(backbone: Backbone, weights: str, expected: str) -> str:
    from kubegraft.storage import sha256_of

    published = _published_file(backbone, weights)
    if published is None and not weights.endswith(_SUFFIXES):
        names = " or ".join(file.cache_path.name for file in _published_files(backbone))
        raise WeightsError(
            f"`weights` must be 'imagenet', 'none', or end with .weights.h5 or .keras. Received: "
            f"weights={weights!r}.{suggestion(weights, _KEYWORDS)} A file that Keras published itself "
            f"keeps its name{f', {names},' if names else ''} or belongs into {cache_dir()}."
        )
    path = _local_path(weights)
    if published is not None:
        check_hash(published, path)
    actual = sha256_of(path)
    if expected and actual != expected.lower():
        raise WeightsError(
            f"`weights_sha256` must be the SHA-256 of the weights file. Received: {expected.lower()}, but "
            f"{weights} has {actual}. Fetch the file again, or correct the digest."
        )
    return actual


def _published_file(backbone: Backbone, weights: str) -> ImageNetFile | None:
    """Return which of the backbone's published files a path or URI names, if it does."""
    name = weights.rsplit("/", 1)[-1]
    return next((file for file in _published_files(backbone) if file.cache_path.name == name), None)


def _published_files(backbone: Backbone) -> tuple[ImageNetFile, ...]:
    return backbone.imagenet.files if backbone.imagenet is not None else ()


def _local_path(weights: str) -> Path:
    from kubegraft import storage

    try:
        if storage.is_remote(weights):
            return _downloaded(weights)
        path = storage.local_path(weights)
    except StorageError as error:
        raise WeightsError(f"`weights` must be readable. Received: weights={weights!r}: {error}") from error
    if not path.is_file():
        raise WeightsError(
            f"`weights` must be an existing file. Received: weights={weights!r}. Check the path, or use 'imagenet'."
        )
    return path


@functools.cache
def _downloaded(uri: str) -> Path:
    """Return a local copy, made once a process, in a directory that goes when the process ends."""
    from kubegraft.storage import fetch_file

    path = Path(_temporary_directory().name) / hashlib.sha256(uri.encode()).hexdigest()[:16] / Path(uri).name
    fetch_file(uri, path)
    return path


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kubegraft-weights-")


def _load_file(model: Any, path: Path, source: str) -> None:
    import h5py

    from kubegraft.modeling.archive import open_weights
    from kubegraft.modeling.weight_layout import assign

    try:
        if path.name.endswith(".keras"):
            with open_weights(path) as file:
                assign(model, _backbone_group(file), source=source)
        else:
            with h5py.File(path, "r") as file:
                assign(model, _backbone_group(file), source=source)
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise WeightsError(
            f"`weights` must be a Keras weights file. Received: weights={source!r}: {error}. "
            "Write it with model.save_weights('x.weights.h5') or model.save('x.keras')."
        ) from error


def _backbone_group(file: Any) -> Any:
    """Return the group of a nested model named `backbone`, as in kubegraft's classifiers, else the file itself."""
    for name, group in file.get("layers", {}).items():
        if "vars" in group and group["vars"].attrs.get("name") == "backbone":
            return file[f"layers/{name}"]
    return file
