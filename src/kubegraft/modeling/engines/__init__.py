"""The frozen forward pass, in the fastest way that is proved to answer like Keras.

`choose_engine` takes what is to be computed as a TensorFlow function and returns a `FrozenForward`: LiteRT on
a CPU, Keras where LiteRT can't, differs or doesn't pay. `training.features` is the one that calls it.
"""

from kubegraft.modeling.engines.choice import ENGINE_VARIABLE, choose_engine, recallable
from kubegraft.modeling.engines.interface import (
    IMAGES_AT_ONCE,
    TOLERANCE,
    Forward,
    FrozenForward,
    FrozenGraph,
    relative_difference,
)

__all__ = [
    "ENGINE_VARIABLE",
    "IMAGES_AT_ONCE",
    "TOLERANCE",
    "Forward",
    "FrozenForward",
    "FrozenGraph",
    "choose_engine",
    "recallable",
    "relative_difference",
]
