"""What a classifier says about every image of a split, in memory that does not grow with the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import tensorflow as tf

from kubegraft.data.decode import decode_any
from kubegraft.data.shards import SplitReader
from kubegraft.errors import DataError
from kubegraft.evaluation.metrics import Answers
from kubegraft.reporting.progress import Progress

_BATCH_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class InferenceSteps:
    """A classifier in inference mode, cut behind its first layer.

    Images of different sizes can't share a batch, so each is resized on its own, by the model's own layer,
    and everything behind that layer runs on batches.

    Attributes:
        resize: From `uint8[height, width, 3]` to `[input_size, input_size, 3]`.
        forward: From a batch of those to `float32[batch, classes]`, a `tf.function`.
        resized: Shape and dtype of one resized image.
    """

    resize: Callable[[Any], Any]
    forward: Callable[[Any], Any]
    resized: Any

    @classmethod
    def of(cls, model: Any) -> Self:
        """Cut a classifier of `kubegraft.modeling.classifier`; its weights stay shared."""
        import keras

        resized = model.get_layer("resize").output
        front, behind = keras.Model(model.input, resized), keras.Model(resized, model.output)
        shape = resized.shape[1:]
        batch = tf.TensorSpec([None, *shape], resized.dtype)

        def resize(image: Any) -> Any:
            return tf.ensure_shape(front(image[tf.newaxis], training=False)[0], shape)

        @tf.function(input_signature=[batch], autograph=False)
        def forward(images: Any) -> Any:
            return behind(images, training=False)

        return cls(resize, forward, tf.TensorSpec(shape, resized.dtype))


def answer_split(model: Any, reader: SplitReader) -> Answers:
    """Return the model's answers to every image, in inference mode and in the reader's order.

    Args:
        model: Classifier of `kubegraft.modeling.classifier`.
        reader: Split with at least one image.

    Raises:
        DataError: If an image can't be read or decoded.
        EvaluationError: If the model's outputs are no probabilities.
    """
    steps = InferenceSteps.of(model)
    failures: list[DataError] = []
    answers, position = [], 0
    try:
        with Progress("evaluate", len(reader), "images") as progress:
            for batch in _resized_batches(reader, steps, failures):
                probabilities = steps.forward(batch).numpy()
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


def _resized_batches(reader: SplitReader, steps: InferenceSteps, failures: list[DataError]) -> Any:
    def read(index: np.int64) -> bytes:
        try:
            return reader.read(int(index))
        except DataError as error:
            failures.append(error)
            raise

    def load(index: Any) -> Any:
        encoded = tf.ensure_shape(tf.numpy_function(read, [index], tf.string), ())
        return steps.resize(decode_any(encoded))

    images = tf.data.Dataset.range(len(reader)).map(load, tf.data.AUTOTUNE, deterministic=True)
    return images.batch(_BATCH_SIZE).prefetch(2)
