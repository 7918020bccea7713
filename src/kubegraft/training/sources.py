"""Where a batch's inputs come from: features already computed, or images decoded, resized and augmented."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from kubegraft.data.augmentation import augment_image
from kubegraft.data.decode import decode_any, decode_bytes
from kubegraft.data.resizing import resize, resize_into
from kubegraft.data.shards import SplitReader
from kubegraft.errors import DataError
from kubegraft.processors import usable_processors
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


class FixedSource(Source, Protocol):
    """A source whose examples are the same in every epoch."""

    @property
    def can_write(self) -> bool:
        """Whether `write` makes the very bits that `inputs` makes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input of one example."""

    def write(self, target: np.ndarray, number: int) -> None:
        """Write the input of an example into memory of the caller's, in the caller's thread.

        Args:
            target: `float32` of that shape.
            number: Of the example.
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

    @property
    def can_write(self) -> bool:
        """See `FixedSource`."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """See `FixedSource`."""
        return self.features.shape[1:]

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
            gathered = tf.numpy_function(gather, (index, partner, share), tf.float32, stateful=False)
            return tf.ensure_shape(gathered, shape)

        return steady(tf.data.Dataset.from_tensor_slices(parts).map(as_it_is(load)))

    def write(self, target: np.ndarray, number: int) -> None:
        """Write features; see `FixedSource`."""
        target[...] = self.features[number]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Examples that are encoded images in shards.

    Attributes:
        reader: Random access to the encoded images of one split.
        input_size: Side of the square that images are resized to, in pixels.
        transforms: Names of the random transforms, without mixup; empty for none.
        strength: Strength of the transforms, in [0, 1].
        num_views: 0 for images that are varied anew in every epoch. Otherwise each of so many views of an image is
            an example of its own, all first views before all second ones: the first is the image as it is, and
            each other a pure function of the image's bytes, the view's number and the transforms.
    """

    reader: SplitReader
    input_size: int
    transforms: Sequence[str] = ()
    strength: float = 0.5
    num_views: int = 0

    @property
    def labels(self) -> np.ndarray:
        """Labels of the examples, `int32[num_examples]`."""
        labels = self.reader.labels
        return np.tile(labels, self.num_views) if self.num_views else labels

    @property
    def can_write(self) -> bool:
        """See `FixedSource`; not for varied images, whose last bits depend on how TensorFlow runs the transforms."""
        return not self.transforms or self.num_views == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """See `FixedSource`."""
        return (self.input_size, self.input_size, 3)

    def inputs(self, batches: EpochBatches, rows: slice, columns: slice, batch_size: int) -> Any:
        """Return batches of images, `float32[batch_size, input_size, input_size, 3]` in [0, 255].

        Where the number of an example is -1 there is a black image, for which nothing is decoded.
        """
        index, partner, share, key = (
            array[rows, columns].reshape(-1)
            for array in (batches.index, batches.partner, batches.share, batches.key)
        )
        mixes, absent = bool(np.any(share != 1)), index < 0
        views, index, partner = self._seen(index, partner)
        seeds = self.reader.digests[index, :8].view("<i4") if self.num_views else np.stack([key, 0 * key], 1)

        def load(index: Any, partner: Any, share: Any, seed: Any, view: Any) -> Any:
            image = self._image(index, seed, view)
            if mixes:
                image = share * image + (1 - share) * self._image(partner, seed + tf.constant([0, 1]), view)
            return image

        def load_or_fill(absent: Any, *example: Any) -> Any:
            black = tf.zeros((self.input_size, self.input_size, 3))
            return tf.cond(absent, lambda: black, lambda: load(*example))

        examples = (index, partner, share, seeds.astype(np.int32), views)
        images = tf.data.Dataset.from_tensor_slices((absent, *examples) if absent.any() else examples).map(
            as_it_is(load_or_fill if absent.any() else load),
            num_parallel_calls=usable_processors(),
            deterministic=True,
        )
        return steady(images.batch(batch_size, drop_remainder=True))

    def write(self, target: np.ndarray, number: int) -> None:
        """Write an image `float32[input_size, input_size, 3]` in [0, 255]; see `FixedSource`.

        Raises:
            DataError: If a shard is damaged, or an image can't be decoded.
        """
        resize_into(target, self._decoded(number % len(self.reader.labels)))

    def _decoded(self, index: int) -> np.ndarray:
        encoded = self.reader.read(index)
        try:
            return decode_bytes(encoded)
        except (MemoryError, tf.errors.ResourceExhaustedError):
            raise
        except Exception as error:  # Pillow raises whatever its plugins raise on damaged bytes
            raise self._unreadable(error) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raise the DataError for an image that can't be read, where TensorFlow's threads only know their own errors.

        Raises:
            DataError: If a shard is damaged, or an image can't be decoded.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if self.reader.failure:
                raise self.reader.failure from error
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"The images of the `{self.reader.split}` split must be readable, as ingest found them. Received: "
            f"{getattr(error, 'message', error)}. Ingest the images again."
        )

    def _seen(self, index: np.ndarray, partner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the view of each example, and the numbers of its image and its partner's in the split."""
        if not self.num_views:
            return np.zeros(len(index), np.int32), index, partner
        num_images = len(self.reader.labels)
        return (index // num_images).astype(np.int32), index % num_images, partner % num_images

    def _image(self, index: Any, seed: Any, view: Any) -> Any:
        # With a state, as TensorFlow takes it to have by default, no two reads would run at a time.
        encoded = tf.numpy_function(self.reader.read, [index], tf.string, stateful=False)
        image = resize(decode_any(tf.ensure_shape(encoded, ())), self.input_size)
        if not self.transforms or self.num_views == 1:
            return image
        if not self.num_views:
            return augment_image(image, seed, tuple(self.transforms), self.strength)
        of_view = tf.random.experimental.stateless_fold_in(seed, view)
        return tf.cond(
            view > 0,
            lambda: augment_image(image, of_view, tuple(self.transforms), self.strength),
            lambda: image,
        )


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for `tf.data` that has no Python branches or loops on tensors, to be traced as it is.

    To look for some in it, and in all that it calls, takes TensorFlow seconds at the start of every process.
    """
    traced: Callable[..., Any] = tf.autograph.experimental.do_not_convert(function)
    return traced


def steady(batches: Any) -> Any:
    """Return a `tf.data.Dataset` that keeps two of its batches ready, with the threads that it was given.

    TensorFlow's own tuning is off: the thread that does it outlives the last batch by up to a minute on one core,
    and the next epoch waits for it.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(2).with_options(options)
