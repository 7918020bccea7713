"""The whole model: any image in, a probability for each class out; and its parts, which training calls.

image uint8[batch, any, any, 3] -> pixels (float32) -> resize -> backbone
    -> head (pool, standardise, ..., logits) -> probabilities

With `features: levels` the backbone also averages some earlier blocks, and returns a vector; see `levels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import keras
import numpy as np

from kubegraft.config import AUTO_NAME, FEATURES
from kubegraft.errors import ConfigError, ModelError
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.construction import repeatable
from kubegraft.modeling.levels import groups_of, with_levels
from kubegraft.modeling.model_files import LoadedClassifier, load_classifier, model_digest, save_classifier
from kubegraft.modeling.precision import with_policy

__all__ = [
    "ClassifierParts",
    "HeadOptions",
    "HeadParts",
    "LoadedClassifier",
    "build_classifier",
    "build_head",
    "load_classifier",
    "model_digest",
    "parts",
    "save_classifier",
]

_FEATURES: Final = tuple(each for each in FEATURES if each != AUTO_NAME)
# Below this share of the mean variance a feature counts as constant, and is only centred.
_CONSTANT_SHARE: Final = 1e-6
# No feature is scaled up by more than this share's root against the average one: what hardly varies in
# training may well do so elsewhere, and a head would be at the mercy of it.
_SMALLEST_SHARE: Final = 1e-2
# A random backbone may shrink its features to almost nothing; float32 ends at 1e-38, its reciprocal too.
_SMALLEST_VARIANCE: Final = 1e-30


class HeadOptions(Protocol):
    """The fields of `HeadConfig` that say what is built."""

    @property
    def head(self) -> str: ...  # noqa: D102
    @property
    def features(self) -> str: ...  # noqa: D102
    @property
    def hidden_units(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def batch_norm(self) -> bool: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102
    @property
    def weights_sha256(self) -> str: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class ClassifierParts:
    """The layers of a classifier, for calling one after the other.

    Attributes:
        resize: Pixels of any size, `float32[batch, height, width, 3]`, to the backbone's input size; 0 to 255.
        backbone: Those pixels to the last feature map, or to features of several levels; call it with
            `training=False`.
        pool: That to pooled features, `float32[batch, dim]`.
        head_layers: Pooled features to logits, in order: `standardise`, hidden layers, `logits`.
    """

    resize: Any
    backbone: Any
    pool: Any
    head_layers: tuple[Any, ...]

    @property
    def standardise(self) -> Any:
        """The layer that centres and scales the pooled features; it is never trained."""
        return self.head_layers[0]

    def set_standardisation(self, mean: np.ndarray, variance: np.ndarray) -> None:
        """Make the head see features of mean 0 and variance 1.

        A feature that is (almost) constant in training is centred only, and the variance of others counts as
        at least a hundredth of the average one: dividing by a tiny deviation would let a feature explode on
        the first image in which it isn't constant, and as soon as fine-tuning moves it. The average is that of
        its level: levels differ in scale.

        Args:
            mean: `float[dim]`, over the training split.
            variance: `float[dim]`, not negative.
        """
        ends = np.cumsum(groups_of(self.backbone))[:-1]
        levels = [_floored(level) for level in np.split(np.asarray(variance, np.float64), ends)]
        self.standardise.set_weights([np.asarray(mean, np.float32), np.concatenate(levels)])


def _floored(variance: np.ndarray) -> np.ndarray:
    constant = variance <= max(_CONSTANT_SHARE * variance.mean(), _SMALLEST_VARIANCE)
    return np.where(constant, 1.0, np.maximum(variance, _SMALLEST_SHARE * variance.mean()))


@dataclass(frozen=True, slots=True)
class HeadParts:
    """A head alone; its layers take standardised features.

    Attributes:
        head_layers: Standardised features to logits, in order.
    """

    head_layers: tuple[Any, ...]


def build_head(dim: int, num_classes: int, options: HeadOptions) -> tuple[Any, ...]:
    """Return the trainable layers of a head as `build_classifier` makes them, without a backbone.

    Args:
        dim: Length of a feature vector.
        num_classes: Number of classes.
        options: Head and seed.
    """
    with repeatable(options.seed + 1):
        features = outputs = keras.Input((dim,))
        _pool, _standardise, *layers = _head_layers((dim,), num_classes, options)
        for layer in layers:
            outputs = layer(outputs)
        keras.Model(features, outputs)
    return tuple(layers)


def build_classifier(
    backbone: Backbone,
    input_size: int,
    classes: Sequence[str],
    options: HeadOptions,
    *,
    policy: str = "float32",
) -> Any:
    """Return a classifier with a new head on a pretrained backbone.

    The layer `standardise` is a batch normalisation without scale and offset that is never trained: unlike
    Keras's `Normalization`, which keeps constants beside its variables, its mean and variance can be set
    at any time, live in the weights file, and are mirrored to every device.

    Args:
        backbone: What to build on.
        input_size: Side in pixels that images are resized to, bilinear and antialiased.
        classes: Class names, in the order of the probabilities.
        options: Head, weights and seed; a `HeadConfig` with its open values resolved.
        policy: Keras dtype policy, `float32`, `mixed_bfloat16` or `mixed_float16`. Pixels, pooled features,
            logits and probabilities are float32 in any case.

    Returns:
        A `keras.Model`, `uint8[batch, height, width, 3]` of any size to `float32[batch, classes]`.

    Raises:
        ConfigError: If the backbone does not take this size, or an option is still open.
        WeightsError: If the weights can't be had, or are another backbone's.
    """
    _check_options(classes, options)
    core = backbone.build(
        input_size, options.weights, weights_sha256=options.weights_sha256, seed=options.seed
    )
    core = _renamed(with_levels(core, backbone) if options.features == "levels" else core, "backbone")
    # Not the backbone's seed: its first layer and the head's would start alike.
    with repeatable(options.seed + 1):
        head = _head(core.output_shape[1:], len(classes), options)
        image = keras.Input((None, None, 3), dtype="uint8", name="image")
        # Resizing would round its result back to the uint8 of its input; training resizes in float32.
        pixels = keras.layers.Rescaling(1.0, dtype="float32", name="pixels")(image)
        resized = keras.layers.Resizing(
            input_size, input_size, antialias=True, dtype="float32", name="resize"
        )(pixels)
        logits = head(core(resized, training=False))
        probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
        model = keras.Model(image, probabilities, name="classifier")
    return with_policy(model, policy)


def parts(model: Any) -> ClassifierParts:
    """Return the parts of a classifier.

    Raises:
        ModelError: If `model` was not made by `build_classifier`.
    """
    names = {layer.name for layer in model.layers}
    if not {"resize", "backbone", "head"} <= names:
        raise ModelError(
            "`model` must be a classifier of kubegraft, with layers resize, backbone and head. Received: "
            f"layers {sorted(names)!r}. Use the output of `kubegraft train-head` or `kubegraft fine-tune`."
        )
    _input, pool, *head_layers = model.get_layer("head").layers
    return ClassifierParts(model.get_layer("resize"), model.get_layer("backbone"), pool, tuple(head_layers))


def _check_options(classes: Sequence[str], options: HeadOptions) -> None:
    if len(classes) < 2:
        raise ConfigError(f"`classes` must be at least two. Received: classes={list(classes)!r}.")
    if options.features not in _FEATURES:
        raise ConfigError(
            f"`features` must be one of {list(_FEATURES)!r} here. Received: features={options.features!r}. "
            "`kubegraft.recipes.resolve_head` chooses open values."
        )
    if not 0 <= options.dropout < 1:
        raise ConfigError(
            f"`dropout` must be in [0, 1) here. Received: dropout={options.dropout!r}. "
            "`kubegraft.recipes.resolve_head` chooses open values."
        )


def _renamed(model: Any, name: str) -> Any:
    return keras.Model(model.input, model.output, name=name)


def _head(feature_shape: tuple[int, ...], num_classes: int, options: HeadOptions) -> Any:
    feature_map = outputs = keras.Input(feature_shape, name="feature_map")
    for layer in _head_layers(feature_shape, num_classes, options):
        outputs = layer(outputs)
    return keras.Model(feature_map, outputs, name="head")


def _head_layers(feature_shape: tuple[int, ...], num_classes: int, options: HeadOptions) -> list[Any]:
    layers = keras.layers
    made: list[Any] = [
        layers.GlobalAveragePooling2D(dtype="float32", name="pool")
        if len(feature_shape) > 1
        # Levels are pooled where they are read.
        else layers.Activation("linear", dtype="float32", name="pool"),
        layers.BatchNormalization(
            center=False, scale=False, epsilon=0.0, trainable=False, dtype="float32", name="standardise"
        ),
    ]
    for number, units in enumerate(options.hidden_units if options.head == "mlp" else (), start=1):
        made.append(layers.Dense(units, activation="relu", name=f"hidden_{number}"))
        if options.batch_norm:
            made.append(layers.BatchNormalization(synchronized=True, name=f"hidden_{number}_norm"))
        made.append(layers.Dropout(options.dropout, name=f"hidden_{number}_dropout"))
    if options.head == "linear":
        made.append(layers.Dropout(options.dropout, name="dropout"))
    return [*made, layers.Dense(num_classes, dtype="float32", name="logits")]
