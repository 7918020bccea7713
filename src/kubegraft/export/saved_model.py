"""A SavedModel that takes the bytes of image files, for TensorFlow Serving or plain `tf.saved_model.load`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import tensorflow as tf

from kubegraft.data.decode import decode_image

SIGNATURES: Final = ("serve", "serving_default")


@dataclass(frozen=True, slots=True)
class _Steps:
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


def write_saved_model(model: Any, classes: Sequence[str], directory: Path) -> None:
    """Write a SavedModel with one function under the names `serve` and `serving_default`.

    It takes `image_bytes`, `string[batch]` of whole JPEG, PNG or GIF files of any size, and returns

        class_names       string[batch, classes], every row the same, in the order of the probabilities
        probabilities     float32[batch, classes]
        predicted_class   string[batch], the most probable

    Bytes that can't be decoded raise InvalidArgumentError. The graph holds TensorFlow's own operations only.

    Args:
        model: Classifier of `kubegraft.modeling.classifier`; it is exported in inference mode.
        classes: Class names.
        directory: Directory to make.
    """
    module = _served(model, classes)
    tf.saved_model.save(module, str(directory), signatures=dict.fromkeys(SIGNATURES, module.serve))


def _served(model: Any, classes: Sequence[str]) -> Any:
    steps = _Steps.of(model)
    names = tf.constant([name.encode("utf-8", "surrogateescape") for name in classes])

    def serve(image_bytes: Any) -> dict[str, Any]:
        images = tf.map_fn(
            lambda encoded: steps.resize(decode_image(encoded)),
            image_bytes,
            fn_output_signature=steps.resized,
        )
        probabilities = steps.forward(images)
        return {
            "class_names": tf.tile(names[tf.newaxis], [tf.shape(image_bytes)[0], 1]),
            "probabilities": probabilities,
            "predicted_class": tf.gather(names, tf.argmax(probabilities, axis=1)),
        }

    module = tf.Module(name="kubegraft")
    # The variables themselves, not the Keras model: loading must not look for Keras.
    module.model_variables = [variable.value for variable in model.variables]
    signature = [tf.TensorSpec([None], tf.string, name="image_bytes")]
    module.serve = tf.function(serve, input_signature=signature, autograph=False)
    return module
