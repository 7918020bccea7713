"""Keras's `.keras` archives: read without trust, written the same each time.

An archive is a zip of `config.json` (the model's description), `metadata.json` and `model.weights.h5`; ours
has `kubegraft.json` too, so that class names travel with the one file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kubegraft.errors import WeightsError

METADATA_MEMBER: Final = "kubegraft.json"
_CONFIG_MEMBER: Final = "config.json"
_WEIGHTS_MEMBER: Final = "model.weights.h5"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
# What a model of Keras's own layers is described with. A description may also name any function or class that
# Python can import; those, layers that hold code, and layers that read files are how harm hides in a model.
_ALLOWED_MODULES: Final = re.compile(
    r"keras|keras\.(layers|initializers|regularizers|constraints|models)"
    r"|keras\.src\.(models|layers|ops|applications)\..+"
)
_ALLOWED_IN_KERAS: Final = frozenset({"DTypePolicy", "Functional", "Model", "Sequential"})
_REFUSED_CLASSES: Final = frozenset(
    {"Lambda", "__lambda__", "function", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer"}
    | {"StringLookup", "IntegerLookup", "IndexLookup", "TextVectorization"}
)


def require_safe(path: Path) -> None:
    """Raise WeightsError if the description in a `.keras` file names anything but Keras's own layers."""
    with zipfile.ZipFile(path) as archive:
        if not {_CONFIG_MEMBER, _WEIGHTS_MEMBER} <= set(archive.namelist()):
            raise WeightsError(
                f"`{path.name}` must be a .keras file. Received: a zip without {_CONFIG_MEMBER} or {_WEIGHTS_MEMBER}. "
                "Write it with model.save('x.keras')."
            )
        config = json.loads(archive.read(_CONFIG_MEMBER))
    if isinstance(config, dict):
        config.pop("compile_config", None)  # never read, so that it may name anything
    for name, module in _objects(config):
        if not _is_harmless(name, module):
            raise WeightsError(
                f"`{path.name}` must describe its model by Keras's own layers only. Received: "
                f"{module}.{name}, which may run any code when it is loaded. Save the weights alone, with "
                "model.save_weights('x.weights.h5')."
            )


def _is_harmless(name: str, module: str | None) -> bool:
    if name in _REFUSED_CLASSES or (module == "keras" and name not in _ALLOWED_IN_KERAS):
        return False
    return module is None or _ALLOWED_MODULES.fullmatch(module) is not None


def _objects(config: Any) -> Iterator[tuple[str, str | None]]:
    """Yield (class name, module) of everything that a description would make."""
    if isinstance(config, Mapping):
        if "class_name" in config:
            yield str(config["class_name"]), config.get("module")
        for value in config.values():
            yield from _objects(value)
    elif isinstance(config, list):
        for value in config:
            yield from _objects(value)


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open the weights of a `.keras` file as HDF5, once its description is known to be harmless."""
    import h5py

    require_safe(path)
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(_WEIGHTS_MEMBER) as member,
        h5py.File(io.BytesIO(member.read()), "r") as file,
    ):
        yield file


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return what kubegraft wrote into a `.keras` file about its model, or None for a file of others."""
    with zipfile.ZipFile(path) as archive:
        if METADATA_MEMBER not in archive.namelist():
            return None
        metadata: dict[str, Any] = json.loads(archive.read(METADATA_MEMBER))
        return metadata


def rewrite(source: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    """Write a `.keras` file again with `metadata` and without times and addresses: the same model gives the same bytes.

    Args:
        source: File as Keras wrote it.
        target: File to write.
        metadata: JSON values.
    """
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in sorted(archive.namelist()):
            content = archive.read(name)
            if name in _STABLE:
                content = json.dumps(_STABLE[name](json.loads(content)), sort_keys=True).encode()
            copy.writestr(zipfile.ZipInfo(name, _EPOCH), content)
        described = json.dumps(metadata, indent=1, sort_keys=True, ensure_ascii=False)
        copy.writestr(zipfile.ZipInfo(METADATA_MEMBER, _EPOCH), described)


def _without_date(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, "date_saved": "1980-01-01@00:00:00"}


def _without_addresses(described: Any) -> Any:
    """Return a description without the memory addresses by which Keras tells that layers share a dtype policy."""
    if isinstance(described, dict):
        return {
            key: _without_addresses(value) for key, value in described.items() if key != "shared_object_id"
        }
    return [_without_addresses(value) for value in described] if isinstance(described, list) else described


_STABLE: Final = {"metadata.json": _without_date, _CONFIG_MEMBER: _without_addresses}
