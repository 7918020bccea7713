"""What a classifier says about every image of a split, in memory that does not grow with the split."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.data.decode import decode_any
from kubegraft.data.shards import SplitReader
from kubegraft.errors import DataError
from kubegraft.evaluation.metrics import Answers
from kubegraft.reporting.progress import Progress

_BATCH_SIZE: Final = 32


def answer_split(model: Any, reader: SplitReader, *, input_size: int) -> Answers:
    """Return the model's answers to every image, in inference mode and in the reader's order.

    Args:
        model: Classifier of `kubegraft.modeling.classifier`.
        reader: Split with at least one image.
        input_size: Side in pixels that the model resizes images to.

    Raises:
        DataError: If an image can't be read or decoded.
        EvaluationError: If the model's outputs are no probabilities.
    """
    forward = forward_resized(model, input_size)
    failures: list[DataError] = []
    answers, position = [], 0
    try:
        with Progress("evaluate", len(reader), "images") as progress:
            for batch in _resized_batches(reader, input_size, failures):
                probabilities = forward(batch).numpy()
                labels = reader.labels[position : position + len(probabilities)]
                answers.append(Answers.of(probabilities, labels))
                position += len(labels)
                progress.update(len(labels))
    except tf.errors.OpError as error:
        if failures:  # raised in a thread of tf.data, which knows TensorFlow's own errors only
            raise failures[0] from error
        raise DataError(
            f"The images of the `{reader.split}` split must be readable, as ingest found them. Received: "
            f"{error.message}. Ingest the images again."
        ) from error
    return Answers.joined(answers)


def forward_resized(model: Any, input_size: int) -> Any:
    """Return a compiled function from resized images to probabilities, in inference mode.

    Images of different sizes can't share a batch, so each is resized on its own, as the model's first layer
    would, and everything behind that layer runs on batches.

    Args:
        model: Classifier of `kubegraft.modeling.classifier`.
        input_size: Side in pixels that the model resizes images to.

    Returns:
        A `tf.function` from `float32[batch, input_size, input_size, 3]` to `float32[batch, classes]`.
    """
    import keras

    behind_resize = keras.Model(model.get_layer("resize").output, model.output)
    signature = tf.TensorSpec([None, input_size, input_size, 3], tf.float32)

    @tf.function(input_signature=[signature], autograph=False)  # type: ignore[untyped-decorator]
    def forward(images: Any) -> Any:
        return behind_resize(images, training=False)

    return forward


def resized(image: Any, input_size: int) -> Any:
    """Return `float32[input_size, input_size, 3]` of `uint8[height, width, 3]`, as the first layer does."""
    pixels = tf.image.resize(image, (input_size, input_size), method="bilinear", antialias=True)
    return tf.ensure_shape(pixels, (input_size, input_size, 3))


def _resized_batches(reader: SplitReader, input_size: int, failures: list[DataError]) -> Any:
    def read(index: np.int64) -> bytes:
        try:
            return reader.read(int(index))
        except DataError as error:
            failures.append(error)
            raise

    def load(index: Any) -> Any:
        encoded = tf.ensure_shape(tf.numpy_function(read, [index], tf.string), ())
        return resized(decode_any(encoded), input_size)

    images = tf.data.Dataset.range(len(reader)).map(load, tf.data.AUTOTUNE, deterministic=True)
    return images.batch(_BATCH_SIZE).prefetch(2)
