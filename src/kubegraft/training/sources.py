"""Where a batch's inputs come from: features already computed, or images decoded, resized and augmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from kubegraft.data.augmentation import augment_image
from kubegraft.data.decode import decode_any
from kubegraft.data.shards import SplitReader
from kubegraft.training.batches import EpochBatches


class Source(Protocol):
    """Inputs of one split's examples, by number."""

    @property
    def labels(self) -> np.ndarray:
        """Labels of the split, `int32[num_examples]`."""

    def inputs(self, batches: EpochBatches, rows: slice, columns: slice, batch_size: int) -> Any:
        """Return a `tf.data.Dataset` of input batches `float32[batch_size, ...]` for that part of an epoch.

        Args:
            batches: The epoch.
            rows: Steps to take.
            columns: Part of each global batch to take.
            batch_size: Examples in each batch that comes out; divides the width of `columns`.
        """


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """Examples that are arrays already.

    Attributes:
        features: `float32[num_examples, ...]`; may be memory-mapped.
        labels: `int32[num_examples]`.
    """

    features: np.ndarray
    labels: np.ndarray

    def inputs(self, batches: EpochBatches, rows: slice, columns: slice, batch_size: int) -> Any:
        """Return batches of features; see `Source`."""
        shape = (batch_size, *self.features.shape[1:])
        parts = tuple(
            array[rows, columns].reshape(-1, batch_size)
            for array in (batches.index, batches.partner, batches.share)
        )

        def gather(index: np.ndarray, partner: np.ndarray, share: np.ndarray) -> np.ndarray:
            own: np.ndarray = self.features[index]
            if np.all(share == 1):
                return own
            share = share.reshape(-1, *[1] * (own.ndim - 1))
            mixed: np.ndarray = share * own + (1 - share) * self.features[partner]
            return mixed

        def load(index: Any, partner: Any, share: Any) -> Any:
            return tf.ensure_shape(tf.numpy_function(gather, (index, partner, share), tf.float32), shape)

        return tf.data.Dataset.from_tensor_slices(parts).map(load).prefetch(tf.data.AUTOTUNE)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Examples that are encoded images in shards.

    Attributes:
        reader: Random access to the encoded images of one split.
        input_size: Side of the square that images are resized to, in pixels.
        transforms: Names of the random transforms, without mixup; empty for none.
        strength: Strength of the transforms, in [0, 1].
    """

    reader: SplitReader
    input_size: int
    transforms: Sequence[str] = ()
    strength: float = 0.5

    @property
    def labels(self) -> np.ndarray:
        """Labels of the split, `int32[num_examples]`."""
        return self.reader.labels

    def inputs(self, batches: EpochBatches, rows: slice, columns: slice, batch_size: int) -> Any:
        """Return batches of images, `float32[batch_size, input_size, input_size, 3]` in [0, 255]."""
        arrays = (batches.index, batches.partner, batches.share, batches.key)
        parts = tuple(array[rows, columns].reshape(-1) for array in arrays)
        mixes = bool(np.any(batches.share != 1))

        def load(index: Any, partner: Any, share: Any, key: Any) -> Any:
            image = self._image(index, key, 0)
            if mixes:
                image = share * image + (1 - share) * self._image(partner, key, 1)
            return image

        return (
            tf.data.Dataset.from_tensor_slices(parts)
            .map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .batch(batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def _image(self, index: Any, key: Any, salt: int) -> Any:
        encoded = tf.numpy_function(self.reader.read, [index], tf.string)
        image = resize(decode_any(tf.ensure_shape(encoded, ())), self.input_size)
        if not self.transforms:
            return image
        return augment_image(image, tf.stack([key, salt]), tuple(self.transforms), self.strength)


def resize(image: Any, size: int) -> Any:
    """Return `float32[size, size, 3]` for a `uint8[height, width, 3]` image, as the model's own first layer does."""
    resized = tf.image.resize(image, (size, size), method="bilinear", antialias=True)
    return tf.ensure_shape(resized, (size, size, 3))
