"""ImageNet weights for a machine without internet: the very files that Keras publishes, under their own names.

`kubegraft run --weights .../weights/<backbone>/<file>` takes them as they are, and Keras finds them in its cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from kubegraft.bundling.index import BundledWeights
from kubegraft.errors import StorageError, WeightsError
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.imagenet import ImageNetFile, check_hash
from kubegraft.reporting.events import log_event
from kubegraft.storage import RETRY_WAITS_SECONDS, fetch_file, sha256_of

WEIGHTS_DIR: Final = "weights"


def collect_weights(
    backbones: Iterable[Backbone],
    directory: Path,
    *,
    retry_waits_seconds: Sequence[float] = RETRY_WAITS_SECONDS,
) -> tuple[BundledWeights, ...]:
    """Put the published weights of some backbones into the bundle `directory`, and return what is there.

    A file that is there, or in Keras's cache, is not fetched again where it has the hash that Keras states.

    Args:
        backbones: Those whose weights are wanted; one whose weights a package holds needs no file.
        directory: The bundle.
        retry_waits_seconds: How long to wait before each further try of a download.

    Raises:
        WeightsError: If a file can't be fetched, or is not the one that Keras published.
    """
    found = []
    for backbone in backbones:
        for file in backbone.imagenet.files if backbone.imagenet else ():
            path = directory / WEIGHTS_DIR / backbone.name / file.cache_path.name
            _collect(file, path, retry_waits_seconds)
            relative = path.relative_to(directory).as_posix()
            found.append(BundledWeights(backbone.name, relative, sha256_of(path), file.file_hash))
    return tuple(found)


def _collect(file: ImageNetFile, path: Path, retry_waits_seconds: Sequence[float]) -> None:
    if file.file_hash and _is(file, path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        if _is(file, file.cache_path):
            shutil.copyfile(file.cache_path, aside)
        else:
            log_event("bundle", "fetching", file=file.url)
            fetch_file(file.url, aside, retry_waits_seconds=retry_waits_seconds)
        check_hash(file, aside)
        aside.replace(path)
    except StorageError as error:
        raise WeightsError(
            f"The weights that Keras publishes must be reachable from here. Received: {file.url}: {error}"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _is(file: ImageNetFile, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        check_hash(file, path)
    except WeightsError:
        return False
    return True
