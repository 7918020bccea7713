"""The layer list of a Keras weights file, compared with a model's, and its values set into the model.

A `.weights.h5` file and the one inside a `.keras` file keep a layer's variables under
`layers/<class>_<number>/vars/<index>`, numbered by class in the order of the layers. kubegraft reads the
arrays itself: nothing of the file's own description of a model is ever made into objects.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from kubegraft.errors import WeightsError

_MAX_DIFF_LINES: Final = 24


def layers_with_weights(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path in the file, layer) for every layer of a functional model that has weights, nested ones too."""
    from keras.src.utils.naming import to_snake_case

    counts: dict[str, int] = {}
    for layer in model.layers:
        kind = to_snake_case(type(layer).__name__)
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        path = f"{prefix}layers/{kind}_{number}" if number else f"{prefix}layers/{kind}"
        if hasattr(layer, "layers"):
            yield from layers_with_weights(layer, f"{path}/")
        elif layer.weights:
            yield path, layer


def read_layout(group: Any) -> dict[str, tuple[str, list[Any]]]:
    """Return path -> (layer name, HDF5 datasets in order) of every layer under an open HDF5 group that has weights."""
    found: dict[str, tuple[str, list[Any]]] = {}

    def visit(path: str, item: Any) -> None:
        # Random layers keep the state of a generator, which is no weight.
        if path.endswith("/vars") and len(item) and not path.endswith("seed_generator/vars"):
            name = str(item.attrs.get("name", ""))
            found[path.removesuffix("/vars")] = (name, [item[key] for key in sorted(item, key=int)])

    group.visititems(visit)
    return found


def assign(model: Any, group: Any, *, source: str) -> None:
    """Set every weight of `model` from an open HDF5 group.

    Args:
        model: Functional model; changed only if all layers and shapes agree.
        group: HDF5 group of a model's weights.
        source: What to call the file in an error.

    Raises:
        WeightsError: If the layers or shapes differ, with the difference of the two layer lists.
    """
    expected, found = dict(layers_with_weights(model)), read_layout(group)
    ours = {path: [tuple(weight.shape) for weight in layer.weights] for path, layer in expected.items()}
    theirs = {path: [tuple(dataset.shape) for dataset in datasets] for path, (_, datasets) in found.items()}
    if ours != theirs:
        names = {path: layer.name for path, layer in expected.items()}
        raise _mismatch(
            model.name,
            source,
            _lines(ours, names),
            _lines(theirs, {path: name for path, (name, _) in found.items()}),
        )
    for path, layer in expected.items():
        layer.set_weights([np.asarray(dataset) for dataset in found[path][1]])


def _lines(layers: Mapping[str, list[tuple[int, ...]]], names: Mapping[str, str]) -> list[str]:
    # By path, not by name: names of unnamed layers count up over a process.
    return [f"{path} {shapes} ({names[path]})" for path, shapes in sorted(layers.items())]


def _mismatch(model_name: str, source: str, expected: list[str], found: list[str]) -> WeightsError:
    ours, theirs = ([line.rpartition(" (")[0] for line in lines] for lines in (expected, found))
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    lines = []
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag != "equal":
            lines += [f"- {line}" for line in expected[start:end]]
            lines += [f"+ {line}" for line in found[other_start:other_end]]
    shown = lines[:_MAX_DIFF_LINES]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - len(shown)} more")
    return WeightsError(
        f"`weights` must hold the layers of {model_name}, without a classifier. Received: {source} with "
        f"{len(found)} layers that have weights, where {model_name} has {len(expected)} (- missing, + unexpected):\n"
        + "\n".join(shown)
        + "\nChoose the backbone that the file was made from, or another file."
    )
