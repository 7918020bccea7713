"""One file that holds all a killed run needs to go on: arrays and the position, replaced atomically."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.errors import TrainingError
from kubegraft.training.workers import ALONE, Workers

_POSITION: Final = "position.json"


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], position: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` by these arrays and this JSON-serialisable position.

    A crash at any moment leaves either the old or the new checkpoint, whole.
    """
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_POSITION, json.dumps(position))
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def load_checkpoint(
    path: Path, workers: Workers = ALONE
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return arrays and position of the checkpoint at `path`, or None if there is none.

    The chief reads it and the others get it from there: a file that one machine has replaced may still be the old one
    on another.

    Raises:
        TrainingError: If the file is there but damaged.
    """
    found = _read(path) if workers.is_chief else None
    position = workers.share(found[1] if found else None)
    if position is None:
        return None
    return workers.spread(found[0] if found else None), position


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            position = json.loads(archive.read(_POSITION))
            arrays = {}
            for name in archive.namelist():
                if name != _POSITION:
                    with archive.open(name) as member:
                        arrays[name.removesuffix(".npy")] = np.lib.format.read_array(
                            member, allow_pickle=False
                        )
            return arrays, position
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise TrainingError(
            f"`checkpoint` must be a whole checkpoint file. Received: checkpoint={str(path)!r}, which can't be "
            f"read ({error}). Remove it to start this stage again."
        ) from error
