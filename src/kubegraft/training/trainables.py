"""What the loop can train: a head on features, or with the last blocks of its backbone, whole or from a cut on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import keras
import tensorflow as tf

from kubegraft.errors import ModelError
from kubegraft.training.xla_on_cpu import dense

if TYPE_CHECKING:
    from kubegraft.modeling.classifier import ClassifierParts, HeadParts
    from kubegraft.modeling.splitting import SplitBackbone

# Each input has a whole number below this, which decides whether it is dropped.
_NUMBERS: Final = 1 << 32


class HeadOnFeatures:
    """The head alone; its inputs are pooled features, `float32[batch, dim]`."""

    def __init__(self, parts: ClassifierParts | HeadParts) -> None:
        """Take the layers of a classifier's head, or of a head alone."""
        self._layers = parts.head_layers
        self.variables = [variable for layer in self._layers for variable in layer.trainable_variables]
        self.rate_multipliers: Sequence[float] = [1.0] * len(self.variables)
        self.state = _changing_state(self._layers)

    def train_logits(self, inputs: Any, position: Any, seed: Any) -> Any:
        """Return logits in training mode; see `loop.Trainable`."""
        for number, layer in enumerate(self._layers):
            if isinstance(layer, keras.layers.Dropout):
                salted = seed + tf.constant([number * 1_000_003, 0])
                inputs = _dropout(inputs, layer.rate, position, salted)
            elif isinstance(layer, keras.layers.Dense):
                inputs = dense(layer, inputs)
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

    def __init__(self, parts: ClassifierParts, multipliers: dict[str, float] | None = None) -> None:
        """Take the trainable variables as they are now.

        Args:
            parts: Parts of the classifier.
            multipliers: Variable path -> factor on the learning rate; 1 where it is missing.
        """
        self._parts = parts
        self._head = HeadOnFeatures(parts)
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
        multipliers: dict[str, float] | None = None,
    ) -> None:
        """Take the trainable variables behind the cut as they are now.

        Args:
            parts: Parts of the classifier.
            split: Its backbone, cut.
            multipliers: Variable path -> factor on the learning rate; 1 where it is missing.
        """
        self._whole = HeadOnBackbone(parts, multipliers)
        self._head = HeadOnFeatures(parts)
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
    """Return the smallest whole number that is kept: below it lies a share of `rate`, in [0, 1), of all up to 2**32."""
    return math.ceil(rate * _NUMBERS)


def _dropout(inputs: Any, rate: float, position: Any, seed: Any) -> Any:
    """Drop inputs by a mask that does not depend on the number of replicas.

    Keras's dropout draws the same mask on every replica and counts its draws. Here an input's number is a function
    of the run's seed, the step and its place in the global batch, whoever computes it.
    """
    if not rate:
        return inputs
    kept = _hashed(position, inputs.shape[-1], seed) >= first_kept(rate)
    return tf.where(kept, inputs / (1 - rate), tf.zeros_like(inputs))


def _hashed(position: Any, width: int, seed: Any) -> Any:
    """Return a number for each input, `uint32[batch, width]`, uniform in [0, 2**32).

    To draw each from TensorFlow's own generator, Philox, takes forty times as long under XLA, as long as a good part
    of a step's matrix products. It draws the keys; the inputs are counted and mixed with them. Whole numbers are the
    same with XLA and without.

    Source:
        Counters in place of a state: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". The mixing
        is the 32-bit finaliser of Appleby's MurmurHash3, with a key before it and another between its rounds.
    """
    first, second = tf.unstack(
        tf.random.stateless_uniform([2], tf.cast(seed, tf.int32), None, None, tf.uint32, alg="philox")
    )
    counter = tf.cast(position, tf.uint32)[:, None] * width + tf.cast(tf.range(width), tf.uint32)
    mixed = _folded(counter + first, 16) * 0x85EBCA6B
    mixed = (_folded(mixed, 13) ^ second) * 0xC2B2AE35
    return _folded(mixed, 16)


def _folded(numbers: Any, shift: int) -> Any:
    return numbers ^ tf.bitwise.right_shift(numbers, shift)


def _changing_state(layers: Sequence[Any]) -> list[Any]:
    return [
        variable
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    ]
