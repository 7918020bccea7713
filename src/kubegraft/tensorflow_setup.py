"""Settings that must be made before TensorFlow does anything; whoever needs TensorFlow imports this first.

It brings Keras along. Both together start and end in 1.7 s rather than 4.2 s this way (2 cores).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Final, NamedTuple

# Keras reads its backend once, at import; a user's ~/.keras/keras.json must not turn kubegraft into JAX.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Keras imports these if it finds them, for wrappers and plots that kubegraft has no use for. A program that
# wants them imports Keras before kubegraft.
_KERAS_EXTRAS: Final = ("sklearn", "matplotlib")


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hide what native code prints, unless the block fails; TensorFlow's start-up notes obey no log level."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as hidden, os.fdopen(os.dup(2), "wb") as kept:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            kept.write(hidden.read())
            raise
        finally:
            os.dup2(kept.fileno(), 2)


@contextlib.contextmanager
def _starting_fast() -> Iterator[None]:
    """Import without what is not needed, and without looking for garbage among modules, which stay."""
    hidden = [name for name in _KERAS_EXTRAS if "keras" not in sys.modules and name not in sys.modules]
    collects = gc.isenabled()
    gc.disable()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it says that it is not there
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.freeze()  # neither collections nor the process's end go through 3,000 modules again
        if collects:
            gc.enable()


with quiet_stderr(), _starting_fast():
    import tensorflow as tf


def setup(seed: int) -> None:
    """Make TensorFlow repeatable, and let it take GPU memory as it needs it.

    Args:
        seed: Seed of Python's, numpy's and TensorFlow's global generators.
    """
    import keras

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(seed)


class GpusFound(NamedTuple):
    """What TensorFlow sees; `cuda_build` says whether this build could see GPUs at all."""

    num_gpus: int
    cuda_build: bool
    version: str


def find_gpus() -> GpusFound:
    """Return how many physical GPUs there are. Logical devices, which a CPU can be cut into, don't count."""
    return GpusFound(
        num_gpus=len(tf.config.list_physical_devices("GPU")),
        cuda_build=bool(tf.sysconfig.get_build_info().get("is_cuda_build", False)),
        version=tf.__version__,
    )
