"""A SavedModel that takes the bytes of image files, for TensorFlow Serving or plain `tf.saved_model.load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tensorflow as tf

from kubegraft.data.decode import decode_image
from kubegraft.evaluation.inference import InferenceSteps

SIGNATURES: Final = ("serve", "serving_default")


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
    steps = InferenceSteps.of(model)
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
