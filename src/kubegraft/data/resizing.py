"""How images get the side that a network takes: bilinear, antialiased, in float32.

Where neither side shrinks, antialiasing changes nothing but the last bits, and TensorFlow takes three times as long
for it. There plain interpolation is enough, which NumPy does to the same bits, and into memory of the caller's.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import tensorflow as tf

_OF_THREAD = threading.local()


def resize(image: Any, size: int) -> Any:
    """Return an image of the network's side, as the model's own first layer makes it but for the last bits.

    Args:
        image: `uint8[height, width, 3]`, a tensor.
        size: Side in pixels.

    Returns:
        `float32[size, size, 3]`.
    """
    shape = (size, size)
    resized = tf.cond(
        tf.reduce_any(tf.shape(image)[:2] > size),
        lambda: tf.image.resize(image, shape, method="bilinear", antialias=True),
        lambda: tf.image.resize(image, shape, method="bilinear"),
    )
    return tf.ensure_shape(resized, (*shape, 3))


def resize_into(target: np.ndarray[Any, Any], image: np.ndarray[Any, Any]) -> None:
    """Write into `target` what `resize` returns, bit for bit.

    Args:
        target: `float32[size, size, 3]`, contiguous.
        image: `uint8[height, width, 3]`.
    """
    size = len(target)
    if max(image.shape[:2]) > size:
        target[...] = tf.image.resize(image, (size, size), method="bilinear", antialias=True)
    else:
        _enlarge(target, image)


def _enlarge(target: np.ndarray[Any, Any], image: np.ndarray[Any, Any]) -> None:
    """Interpolate between the four neighbours of each pixel, along rows first, as TensorFlow does."""
    height, width, channels = image.shape
    size = len(target)
    left, right, share = _neighbours(width, size, channels)
    upper, lower, share_down = _neighbours(height, size, 1)
    bytes_, first, wide, tall = _buffers(height, size, channels)
    rows = image.reshape(height, -1)
    np.take(rows, left, 1, out=bytes_, mode="clip")
    first[...] = bytes_
    np.take(rows, right, 1, out=bytes_, mode="clip")
    np.subtract(bytes_, first, out=wide)
    np.multiply(wide, share, out=wide)
    np.add(wide, first, out=wide)
    flat = target.reshape(size, -1)
    np.take(wide, upper, 0, out=tall, mode="clip")
    np.take(wide, lower, 0, out=flat, mode="clip")
    np.subtract(flat, tall, out=flat)
    np.multiply(flat, share_down[:, np.newaxis], out=flat)
    np.add(flat, tall, out=flat)


@functools.lru_cache(maxsize=256)
def _neighbours(length: int, size: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each place of `size` the places of its two neighbours of `length`, and the share of the second.

    Pixels are where their centres are. With several channels each has a place of its own.
    """
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * (np.float32(length) / np.float32(size))
    place -= np.float32(0.5)
    before = np.floor(place)
    first = np.maximum(before, 0).astype(np.intp)
    second = np.minimum(np.ceil(place), length - 1).astype(np.intp)
    offsets = np.arange(channels)
    return (
        (first[:, np.newaxis] * channels + offsets).ravel(),
        (second[:, np.newaxis] * channels + offsets).ravel(),
        np.repeat(place - before, channels),
    )


def _buffers(height: int, size: int, channels: int) -> tuple[np.ndarray, ...]:
    """Return memory that the calling thread uses again and again: to have fresh pages takes as long as the work."""
    shape = (height, size * channels)
    if getattr(_OF_THREAD, "shape", None) != (shape, size):
        _OF_THREAD.shape, _OF_THREAD.buffers = None, ()  # one thread does not hold two sizes
        _OF_THREAD.buffers = (
            np.empty(shape, np.uint8),
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty((size, shape[1]), np.float32),
        )
        _OF_THREAD.shape = shape, size
    buffers: tuple[np.ndarray, ...] = _OF_THREAD.buffers
    return buffers
