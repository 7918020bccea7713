"""The surroundings in which a model is built: named and initialised the same each time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Give layers made inside the same automatic names and initial weights on every entry.

    Keras numbers unnamed layers over the whole process (`conv2d`, `conv2d_1`, ...) and draws the seed of
    an initialiser from Python's generator. Several backbones name few of their layers, so that a second
    model in one process would differ from the first by its names, and be saved as different bytes. Python's
    generator is not touched, and another thread that draws from it changes nothing here.

    Args:
        seed: Seed of the initial weights.
    """
    # Keras's public `clear_session` would also drop what other models of this process need.
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    names, usual = "object_name_uids", seed_generator.python_random
    counters = global_state.get_global_attribute(names)
    global_state.set_global_attribute(names, None)
    seed_generator.python_random = random.Random(seed)
    try:
        yield
    finally:
        seed_generator.python_random = usual
        global_state.set_global_attribute(names, counters)
