"""What a network computes, as a digest; the feature cache keeps its values under it."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import numpy as np

# What changes no value: whether a layer trains, and what the whole is called.
_IGNORED: Final = ("trainable", "build_config")


def network_digest(network: Any) -> str:
    """Return the SHA-256 of a network's layers, connections, number formats and weights: 64 hex digits.

    The same in every process. Which layers are trainable is no part of it: it changes no value in inference mode.

    Args:
        network: A functional Keras model, such as a backbone or what is before a cut.
    """
    described = {**_without_ignored(network.get_config()), "name": ""}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for variable in network.variables:
        value = np.ascontiguousarray(variable.numpy())
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _without_ignored(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_ignored(value) for name, value in config.items() if name not in _IGNORED}
    if isinstance(config, (list, tuple)):
        return [_without_ignored(value) for value in config]
    return config
