"""What the loop can train: a head on features, or with the last blocks of its backbone, whole or from a cut on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import keras
import numpy as np
import tensorflow as tf

from kubegraft.errors import ModelError

if TYPE_CHECKING:
    from kubegraft.modeling.classifier import ClassifierParts, HeadParts
    from kubegraft.modeling.splitting import SplitBackbone

# How many numbers in [0, 1) TensorFlow draws a float32 from: as many as its mantissa has bits for.
_FRACTIONS: Final = 1 << 23


class HeadOnFeatures:
    """The head alone; its inputs are pooled features, `float32[batch, dim]`."""

    def __init__(self, parts: ClassifierParts | HeadParts, batch_size: int) -> None:
        """Take the head's layers.

        Args:
            parts: Parts of the classifier, or of a head alone.
            batch_size: Global batch size, over all replicas.
        """
        self._layers = parts.head_layers
        self._batch_size = batch_size
        self.variables = [variable for layer in self._layers for variable in layer.trainable_variables]
        self.rate_multipliers: Sequence[float] = [1.0] * len(self.variables)
        self.state = _changing_state(self._layers)

    def train_logits(self, inputs: Any, position: Any, seed: Any) -> Any:
        """Return logits in training mode; see `loop.Trainable`."""
        for number, layer in enumerate(self._layers):
            if isinstance(layer, keras.layers.Dropout):
                salted = seed + tf.constant([number * 1_000_003, 0])
                inputs = _dropout(inputs, layer.rate, position, salted, self._batch_size)
            else:
                inputs = layer(inputs, training=True)
        return tf.cast(inputs, tf.float32)

    def logits(self, inputs: Any) -> Any:
        """Return logits in inference mode; see `loop.Trainable`."""
        for layer in self._layers:
            inputs = layer(inputs, training=False)
        return tf.cast(inputs, tf.float32)


class HeadOnBackbone:
    """The head and whatever of the backbone is trainable; its inputs are resized images.

    The backbone always runs in inference mode: batch norm keeps its statistics, and dropout or stochastic
    depth inside the backbone stay off, in both phases.
    """

    def __init__(
        self, parts: ClassifierParts, batch_size: int, multipliers: dict[str, float] | None = None
    ) -> None:
        """Take the trainable variables as they are now.

        Args:
            parts: Parts of the classifier.
            batch_size: Global batch size, over all replicas.
            multipliers: Variable path -> factor on the learning rate; 1 where it is missing.
        """
        self._parts = parts
        self._head = HeadOnFeatures(parts, batch_size)
        self.variables = [*parts.backbone.trainable_variables, *self._head.variables]
        self.rate_multipliers: Sequence[float] = [
            (multipliers or {}).get(v.path, 1.0) for v in self.variables
        ]
        self.state = self._head.state

    def train_logits(self, inputs: Any, position: Any, seed: Any) -> Any:
        """Return logits in training mode; see `loop.Trainable`."""
        return self._head.train_logits(self.pooled(inputs), position, seed)

    def logits(self, inputs: Any) -> Any:
        """Return logits in inference mode; see `loop.Trainable`."""
        return self._head.logits(self.pooled(inputs))

    def pooled(self, inputs: Any) -> Any:
        """Return pooled features `float32[batch, dim]` of images `float32[batch, size, size, 3]`."""
        return self._parts.pool(self._parts.backbone(inputs, training=False))


class HeadOnSuffix:
    """The head and the blocks behind a cut; its inputs are boundary activations, `[batch, boundary.row_length]`.

    The same variables, rates, dropout masks and inference mode as `HeadOnBackbone` has with the blocks before
    the cut frozen, so that both take the same steps.
    """

    def __init__(
        self,
        parts: ClassifierParts,
        split: SplitBackbone,
        batch_size: int,
        multipliers: dict[str, float] | None = None,
    ) -> None:
        """Take the trainable variables behind the cut as they are now.

        Args:
            parts: Parts of the classifier.
            split: Its backbone, cut.
            batch_size: Global batch size, over all replicas.
            multipliers: Variable path -> factor on the learning rate; 1 where it is missing.
        """
        self._whole = HeadOnBackbone(parts, batch_size, multipliers)
        self._head = HeadOnFeatures(parts, batch_size)
        self._pool, self._split = parts.pool, split
        self.variables = self._whole.variables
        self.rate_multipliers = self._whole.rate_multipliers
        self.state = self._whole.state
        behind = {id(variable) for variable in split.suffix.variables}
        ahead = [v.path for v in parts.backbone.trainable_variables if id(v) not in behind]
        if ahead:
            raise ModelError(
                f"`split` must leave every trainable variable behind its cut. Received: {ahead[0]!r} before it. "
                "Cut before the first unfrozen block."
            )

    def train_logits(self, inputs: Any, position: Any, seed: Any) -> Any:
        """Return logits in training mode; see `loop.Trainable`."""
        return self._head.train_logits(self.pooled(inputs), position, seed)

    def logits(self, inputs: Any) -> Any:
        """Return logits in inference mode; see `loop.Trainable`."""
        return self._head.logits(self.pooled(inputs))

    def pooled(self, inputs: Any) -> Any:
        """Return pooled features `float32[batch, dim]` of boundary activations."""
        return self._pool(self._split.outputs(inputs))


def first_kept(rate: float) -> int:
    """Return the smallest of 2**23 equal steps in [0, 1) that `float32(rate)` is not above."""
    return math.ceil(float(np.float32(rate)) * _FRACTIONS)


def _dropout(inputs: Any, rate: float, position: Any, seed: Any, batch_size: int) -> Any:
    """Drop inputs by a mask that does not depend on the number of replicas.

    Keras's dropout draws the same mask on every replica and counts its draws. Here every replica draws the
    mask of the whole global batch, a function of the run's seed and the step, and takes its rows.
    """
    if not rate:
        return inputs
    # Of whole numbers: XLA makes other fractions of the same bits. TensorFlow takes these.
    bits = tf.random.stateless_uniform(
        [batch_size, inputs.shape[-1]], tf.cast(seed, tf.int32), None, None, tf.uint32, alg="philox"
    )
    fractions = tf.bitwise.bitwise_and(bits, tf.constant(_FRACTIONS - 1, tf.uint32))
    keep = tf.gather(tf.cast(fractions >= first_kept(rate), inputs.dtype), position)
    return inputs * keep / (1 - rate)


def _changing_state(layers: Sequence[Any]) -> list[Any]:
    return [
        variable
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    ]
