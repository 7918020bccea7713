"""Settings that must be made before TensorFlow does anything; every stage that trains calls `setup` first."""

from __future__ import annotations

import os

# Keras reads its backend once, at import; a user's ~/.keras/keras.json must not turn kubegraft into JAX.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def setup(seed: int) -> None:
    """Make TensorFlow repeatable, and let it take GPU memory as it needs it.

    Args:
        seed: Seed of Python's, numpy's and TensorFlow's global generators.
    """
    import keras
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(seed)
