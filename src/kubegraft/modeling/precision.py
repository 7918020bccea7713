"""The number format that a model computes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from kubegraft.modeling.levels import FEATURES_LAYER, LEVEL_PREFIX

# Pixels keep their 256 levels, and what a loss or a user sees its precision, in any policy.
FLOAT32_LAYERS: Final = frozenset(
    {
        "image",
        "pixels",
        "preprocess",
        "resize",
        FEATURES_LAYER,
        "pool",
        "standardise",
        "logits",
        "probabilities",
    }
)


def with_policy(model: Any, policy: str) -> Any:
    """Return the model with its layers computing in `policy`; variables are float32 in all of them.

    Args:
        model: Classifier; it is returned itself if it computes so already.
        policy: Keras dtype policy.

    Returns:
        A model with the same weights and the same layers frozen. It shares nothing with `model`.
    """
    import keras

    config = keras.saving.serialize_keras_object(model)
    changed = [described for described in _layers(config) if _policy_name(described) not in (None, policy)]
    if not changed:
        return model
    for described in changed:
        described["config"]["dtype"]["config"]["name"] = policy
    copy = keras.saving.deserialize_keras_object(config)
    copy.set_weights(model.get_weights())
    return copy


def _layers(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for layer in described["config"].get("layers", ()):
        if "layers" in layer["config"]:
            yield from _layers(layer)
        elif not _is_float32(layer["config"].get("name", "")):
            yield layer


def _is_float32(name: str) -> bool:
    # An average of many numbers in half precision is wrong by more than they are.
    return name in FLOAT32_LAYERS or name.startswith(LEVEL_PREFIX)


def _policy_name(described: dict[str, Any]) -> str | None:
    """Return the name of a layer's policy, or None where it has none: operations, inputs."""
    dtype = described["config"].get("dtype")
    return str(dtype["config"]["name"]) if isinstance(dtype, dict) else None
