"""Parts of a training step in the form in which XLA is fast on a CPU; `trainables` and `steps` call them.

`python -m benchmarks.head_loop` measures what they come to; ADR 13 has the numbers of each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Final

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

# With fewer, transposing takes longer than it saves.
_MIN_EXAMPLES: Final = 64

_tracing: ContextVar[bool] = ContextVar("_tracing", default=False)


@contextlib.contextmanager
def tracing_for_xla_on_cpu() -> Iterator[None]:
    """Trace what XLA is going to compile for a CPU: outside of this, the functions here do as TensorFlow does."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def dense(layer: Any, inputs: Any) -> Any:
    """Return what a `keras.layers.Dense` makes of `inputs`, `[batch, dim]`, in training.

    The gradient of its kernel is `transpose(inputs) @ upstream`. XLA makes one product of both, which reads its first
    operand across the rows again and again: at 256 examples 1.3 ms, where transposing once takes 0.04 and the product
    of what lies in order 0.8. A barrier keeps them apart.
    """
    examples = inputs.shape[0]
    pays = _tracing.get() and examples is not None and examples >= _MIN_EXAMPLES
    if not (pays and inputs.dtype == layer.compute_dtype == "float32" and layer.use_bias):
        return layer(inputs, training=True)
    return layer.activation(_product(inputs, layer.kernel.value) + layer.bias)


@tf.custom_gradient
def _product(inputs: Any, kernel: Any) -> Any:
    def gradient(upstream: Any) -> tuple[Any, Any]:
        (transposed,) = xla.optimization_barrier(tf.transpose(inputs))
        return tf.matmul(upstream, kernel, transpose_b=True), tf.matmul(transposed, upstream)

    return tf.matmul(inputs, kernel), gradient


def clipped(gradients: Sequence[Any], limit: float) -> list[Any]:
    """Return gradients scaled down to a global norm of at most `limit`; NaN if that norm is not finite."""
    if not _tracing.get():
        return list(tf.clip_by_global_norm(gradients, limit)[0])
    norm = tf.sqrt(tf.add_n([_sum_of_squares(each) for each in gradients]))
    scale = tf.where(tf.math.is_finite(norm), limit / tf.maximum(norm, limit), np.nan)
    return [each * scale for each in gradients]


def _sum_of_squares(gradient: Any) -> Any:
    """Return the sum of all squares: first of eight rows at a time, then of columns, then of what is left.

    XLA adds up one number after the other, unless it is told of sums that don't wait for one another: ten times as
    fast. It merges consecutive sums into one; the maximum between them, which changes nothing, prevents that.
    """
    rows, columns = math.prod(gradient.shape[:-1]), gradient.shape[-1]
    sums = tf.square(tf.reshape(gradient, [math.gcd(rows, 8), -1, columns]))
    for _ in range(2):
        sums = tf.maximum(tf.reduce_sum(sums, 0), 0)
    return tf.reduce_sum(sums)
