"""What an engine computes, how it is called, and what "equal" means between two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import tensorflow as tf

# Images `float32[batch, size, size, 3]` to rows `[batch, row_length]`, in TensorFlow.
Forward: TypeAlias = Callable[[Any], Any]
# Largest difference that is rounding: float32 sums of thousands of terms in another order differ by 1e-6 to 1e-5.
TOLERANCE: Final = 1e-4
# Images that are quickest together: their activations stay in the processor's cache.
IMAGES_AT_ONCE: Final = 4
# Below it float32 is subnormal, which engines may flush to 0; a random backbone can shrink its features so far.
_NOTHING: Final = 1e-30


class FrozenForward(Protocol):
    """The frozen part of a model, ready to run on this machine."""

    @property
    def name(self) -> str:
        """`litert` or `keras`."""

    @property
    def digest(self) -> str:
        """SHA-256 of the engine, its version and what it computes: equal digests give equal rows, bit for bit."""

    @property
    def batch_size(self) -> int:
        """Images to hand over at once; more only cost memory."""

    @property
    def num_workers(self) -> int:
        """Calls of `forward` that are worth making at the same time, from as many threads."""

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Return the rows of some images; may be called from several threads.

        Args:
            images: `float32[batch, size, size, 3]` in [0, 255].

        Returns:
            `float32[batch, row_length]`.
        """


class FrozenGraph:
    """A function of images, traced for any batch size.

    Attributes:
        input_size: Side of the images in pixels.
    """

    def __init__(self, forward: Forward, input_size: int, identity: str = "") -> None:
        """Trace `forward`.

        Args:
            forward: Images `float32[batch, size, size, 3]` to rows `[batch, row_length]`, in inference mode.
            input_size: Side of the images in pixels.
            identity: Digest of what `forward` computes, the same in every process; "" to take that of the traced
                graph, in which a process numbers its layers as they come.
        """
        self.input_size, self._identity = input_size, identity
        self._forward = forward  # a concrete function does not keep its variables alive

    @cached_property
    def traced(self) -> Any:
        """The concrete function; its one input is the images, its one output the rows.

        Made when it is needed: what is known of a graph by its identity takes no tracing, which lasts a second.
        """
        images = tf.TensorSpec([None, self.input_size, self.input_size, 3], tf.float32, name="images")
        forward = self._forward
        return tf.function(
            lambda pixels: tf.cast(forward(pixels), tf.float32), input_signature=[images], autograph=False
        ).get_concrete_function()

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(variable.dtype.size * variable.shape.num_elements() for variable in self.traced.variables)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph and of every weight that it reads."""
        if self._identity:
            return self._identity
        found = hashlib.sha256(self.traced.graph.as_graph_def().SerializeToString(deterministic=True))
        for variable in self.traced.variables:
            value = np.ascontiguousarray(variable.numpy())
            found.update(f"{value.dtype} {value.shape}".encode())
            found.update(value.tobytes())
        return found.hexdigest()


def relative_difference(rows: np.ndarray, expected: np.ndarray) -> float:
    """Return how far rows are from what they should be, at worst.

    For each row: the largest difference, as a share of the largest number of the expected row. A difference in
    a feature that is small beside the others counts as little as it does in what is computed from the row.

    Args:
        rows: `float32[batch, row_length]`.
        expected: The same shape, by the reference.

    Returns:
        A share, at least 0; infinite where one side is not finite and the other is not the same.
    """
    if np.array_equal(rows, expected, equal_nan=True):
        return 0.0
    if not (np.isfinite(rows).all() and np.isfinite(expected).all()):
        return float("inf")
    apart = np.abs(rows.astype(np.float64) - expected).max(axis=1)
    return float((apart / np.maximum(np.abs(expected).max(axis=1), _NOTHING)).max())
