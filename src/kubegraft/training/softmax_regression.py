"""Multinomial logistic regression on features, solved to its optimum; numpy and scipy alone.

With x standardised features, W the kernel, b the bias and q the targets (one-hot, perhaps smoothed):

    f(W, b) = 1/n sum_i w_i crossentropy(q_i, softmax(x_i W + b)) + decay/2 |W|^2

f is convex, so L-BFGS reaches the one optimum from anywhere. Features of a backbone are far from
independent, which makes plain L-BFGS slow. So the solver works in the features' principal axes, in which
the curvature of f is nearly diagonal, and scales each axis by it (docs/adr/0013).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kubegraft.errors import TrainingError

# Features of this many numbers are multiplied in float64 for a fine tolerance; larger ones, and coarse
# tolerances, make do with float32 and float64 sums between chunks, in half the time.
_FLOAT64_NUMBERS: Final = 8_000_000
# Below this much work a second BLAS thread costs more than it does, and much more on a busy machine.
_THREADED_NUMBERS: Final = 20_000_000
_COARSE_TOLERANCE: Final = 1e-4
# Axes along which training features vary less than this share of the largest are noise of the arithmetic.
_SMALLEST_AXIS: Final = 1e-10
_MOST_ITERATIONS: Final = 2000
_CORRECTIONS: Final = 10


@dataclass(frozen=True, slots=True)
class Solution:
    """The optimum for one decay.

    Attributes:
        kernel: `float64[dim, classes]`, for standardised features.
        bias: `float64[classes]`, of mean 0.
        decay: Factor of half the squared kernel.
        objective: Value of f.
        gradient_norm: Norm of the gradient of f with respect to kernel and bias.
        num_iterations: Steps of L-BFGS, each about one pass over the features.
        converged: Whether the tolerance was reached.
        train_loss: Mean loss over the examples, without class weights, smoothing and decay.
        train_accuracy: Fraction in [0, 1].
        coefficients: The solution as the solver holds it, to start another from.
    """

    kernel: np.ndarray
    bias: np.ndarray
    decay: float
    objective: float
    gradient_norm: float
    num_iterations: int
    converged: bool
    train_loss: float
    train_accuracy: float
    coefficients: np.ndarray


class SoftmaxRegression:
    """The training examples of one head, made ready for solving with any number of decays."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        *,
        mean: np.ndarray | None = None,
        variance: np.ndarray | None = None,
        label_smoothing: float = 0.0,
        class_weights: np.ndarray | None = None,
        resident_bytes: int = 1 << 30,
        chunk_rows: int = 8192,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Find the principal axes: three passes over the features at most.

        Args:
            features: `float32[num_examples, dim]`; may be memory-mapped.
            labels: `int[num_examples]`, values in `[0, num_classes)`.
            num_classes: Number of classes; some may have no example.
            mean: `float[dim]`, taken off the features; None for 0.
            variance: `float[dim]`, positive; its root divides the features. None for 1.
            label_smoothing: In [0, 1).
            class_weights: `float[num_classes]`, or None for 1 each.
            resident_bytes: Features that need no more memory than this are held; others are streamed in
                every pass.
            chunk_rows: Examples that are worked on at once.
            check: Called before each pass; may raise to end the work.

        Raises:
            TrainingError: If a feature is not a finite number.
        """
        self._features, self._labels, self._classes = features, np.asarray(labels), num_classes
        self._rows, self._check = chunk_rows, check
        self._mean = np.zeros(features.shape[1]) if mean is None else np.asarray(mean, np.float64)
        self._scale = 1 / np.sqrt(np.ones(features.shape[1]) if variance is None else variance)
        self._smoothing = label_smoothing
        weights = np.ones(num_classes) if class_weights is None else np.asarray(class_weights, np.float64)
        self._weights = weights[self._labels] / len(features)
        self._finest = np.float64 if features.size <= _FLOAT64_NUMBERS else np.float32
        self._dtype = self._finest
        self._num_threads = _cores() if features.size > _THREADED_NUMBERS else 1
        fits = features.size * np.dtype(self._dtype).itemsize <= resident_bytes
        self._require_finite()
        with blas_threads(self._num_threads):
            self._axes, self._curvature, self._resident = self._rotated(fits)
        self._copies = {self._dtype: self._resident}

    @property
    def finest_tolerance(self) -> float:
        """Smallest tolerance of `solve` that the arithmetic surely reaches."""
        return 1e-6 if self._finest is np.float64 else 3e-5

    @property
    def fingerprint(self) -> str:
        """What decides on the bits of a solution besides decay, start and tolerance: 64 hex digits."""
        found = hashlib.sha256(
            f"{self._axes.shape} {self._classes} {self._smoothing} {self._finest}".encode()
        )
        for each in (self._mean, self._scale, self._curvature, self._labels, self._weights):
            found.update(np.ascontiguousarray(each).tobytes())
        return found.hexdigest()

    def _use(self, dtype: Any) -> None:
        """Do what follows in this precision."""
        if dtype not in self._copies:
            held = self._copies[self._dtype]
            self._copies[dtype] = None if held is None else held.astype(dtype)
        self._dtype, self._resident = dtype, self._copies[dtype]

    def _rotated(self, fits: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return axes `[dim, rank]`, the mean square along each, and the features in them if they fit."""
        count, dim = self._features.shape
        if fits and count < dim:
            whole = self._standardised(slice(None), np.float64)
            squares, left = np.linalg.eigh(whole @ whole.T)
            kept = squares > _SMALLEST_AXIS * max(squares[-1], np.finfo(float).tiny)
            axes = whole.T @ (left[:, kept] / np.sqrt(squares[kept]))
            resident = (left[:, kept] * np.sqrt(squares[kept])).astype(self._dtype)
            return axes, squares[kept] / count, resident
        gram = np.zeros((dim, dim))
        for rows in self._chunks():
            chunk = self._standardised(rows, self._dtype)
            gram += chunk.T @ chunk
        squares, axes = np.linalg.eigh(gram)
        kept = squares > _SMALLEST_AXIS * max(squares[-1], np.finfo(float).tiny)
        axes = axes[:, kept]
        if not fits:
            return axes, squares[kept] / count, None
        narrow = axes.astype(self._dtype)
        resident = np.empty((count, narrow.shape[1]), self._dtype)
        for rows in self._chunks():
            resident[rows] = self._standardised(rows, self._dtype) @ narrow
        return axes, squares[kept] / count, resident

    def solve(self, decay: float, start: np.ndarray | None = None, tolerance: float = 1e-5) -> Solution:
        """Return the optimum for `decay`.

        Args:
            decay: Factor of half the squared kernel, positive.
            start: `coefficients` of another solution to start from, or None for 0.
            tolerance: Largest element of the gradient, in the scaled axes, at which the solver stops. In
                them the curvature is about 1, so that it is about the distance to the optimum too.
        """
        from scipy.optimize import minimize

        rank, classes = self._axes.shape[1], self._classes
        first = np.zeros((rank + 1, classes)) if start is None else start
        with blas_threads(self._num_threads):
            # Before anything else: what came before must not decide on the bits.
            self._use(np.float32 if tolerance >= _COARSE_TOLERANCE else self._finest)
            share = self._share_of_curvature(first)
            scales = np.full((rank + 1, 1), 1 / np.sqrt(share))
            scales[:-1, 0] = 1 / np.sqrt(share * self._curvature + decay)

            def scaled(vector: np.ndarray) -> tuple[float, np.ndarray]:
                self._check()
                value, gradient = self.objective(vector.reshape(rank + 1, classes) * scales, decay)
                return value, (gradient * scales).ravel()

            found = minimize(
                scaled,
                (first / scales).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={
                    "gtol": tolerance,
                    "ftol": 0.0,
                    "maxiter": _MOST_ITERATIONS,
                    "maxfun": 2 * _MOST_ITERATIONS,
                    "maxcor": _CORRECTIONS,
                },
            )
            return self._solution(found, found.x.reshape(rank + 1, classes) * scales, decay, tolerance)

    def _solution(self, found: Any, coefficients: np.ndarray, decay: float, tolerance: float) -> Solution:
        value, gradient = self.objective(coefficients, decay)
        loss, accuracy = self._measure(coefficients)
        if not np.isfinite(value):
            raise TrainingError(
                f"The loss must be a finite number. Received: loss={value!r} at weight decay {decay:g}. "
                "The features are too large: check the backbone's weights."
            )
        return Solution(
            kernel=self._axes @ coefficients[:-1],
            bias=coefficients[-1] - coefficients[-1].mean(),  # softmax does not see a common offset
            decay=decay,
            objective=value,
            gradient_norm=float(np.linalg.norm(gradient)),
            num_iterations=int(found.nit),
            converged=bool(np.abs(found.jac).max() <= tolerance),
            train_loss=loss,
            train_accuracy=accuracy,
            coefficients=coefficients,
        )

    def objective(self, coefficients: np.ndarray, decay: float) -> tuple[float, np.ndarray]:
        """Return f and its gradient at coefficients along the axes, `float64[rank + 1, classes]`, bias last."""
        kernel = coefficients[:-1]
        loss, transposed = 0.0, np.zeros((self._classes, self._width))
        bias_gradient = np.zeros(self._classes)
        for rows, inputs, logits in self._logits(coefficients):
            labels, weights = self._labels[rows], self._weights[rows]
            shifted, residual, total = _exponentials(logits)
            every = np.arange(len(labels))
            chosen = (1 - self._smoothing) * shifted[every, labels] + self._smoothing * shifted.mean(1)
            loss += float(np.dot(weights, (np.log(total) - chosen).astype(np.float64)))
            residual /= total[:, None]
            residual -= self._dtype(self._smoothing / self._classes)
            residual[every, labels] -= 1 - self._smoothing
            residual *= weights[:, None].astype(self._dtype)
            # This way round BLAS reads the features in the order in which they lie.
            transposed += np.ascontiguousarray(residual.T) @ inputs
            bias_gradient += residual.sum(0, dtype=np.float64)
        gradient = transposed.T if self._resident is not None else self._axes.T @ transposed.T
        value = loss + 0.5 * decay * float(np.square(kernel).sum())
        return value, np.vstack([gradient + decay * kernel, bias_gradient])

    def _measure(self, coefficients: np.ndarray) -> tuple[float, float]:
        loss = correct = 0.0
        for rows, _inputs, logits in self._logits(coefficients):
            sums = loss_and_correct(logits, self._labels[rows])
            loss, correct = loss + sums[0], correct + sums[1]
        return loss / len(self._labels), correct / len(self._labels)

    def _share_of_curvature(self, coefficients: np.ndarray) -> float:
        """Return the mean of p (1 - p), by which the features' squares count in the curvature of f."""
        total = 0.0
        for rows, _inputs, logits in self._logits(coefficients):
            _, probabilities, sums = _exponentials(logits)
            probabilities /= sums[:, None]
            total += float(np.dot(self._weights[rows], (probabilities * (1 - probabilities)).mean(1)))
        return max(total, 1e-6)

    @property
    def _width(self) -> int:
        return len(self._axes if self._resident is None else self._axes.T)

    def _logits(self, coefficients: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield rows, inputs and logits of each chunk."""
        kernel = coefficients[:-1] if self._resident is not None else self._axes @ coefficients[:-1]
        kernel, bias = kernel.astype(self._dtype), coefficients[-1].astype(self._dtype)
        for rows in self._chunks():
            held = self._resident
            inputs = self._standardised(rows, self._dtype) if held is None else held[rows]
            yield rows, inputs, inputs @ kernel + bias

    def _chunks(self) -> Iterator[slice]:
        count = len(self._features)
        return (slice(start, min(start + self._rows, count)) for start in range(0, count, self._rows))

    def _standardised(self, rows: slice, dtype: Any) -> np.ndarray:
        chunk: np.ndarray = np.array(self._features[rows], dtype)
        chunk -= self._mean.astype(dtype)
        chunk *= self._scale.astype(dtype)
        return chunk

    def _require_finite(self) -> None:
        for rows in self._chunks():
            if not np.isfinite(self._features[rows]).all():
                raise TrainingError(
                    "`features` must be finite numbers. Received: features that are not among examples "
                    f"{rows.start} to {rows.stop - 1}. Use other weights of the backbone, or mixed_precision='off'."
                )


def loss_and_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Return the summed cross-entropy in float64, and the number of right answers."""
    shifted, _, total = _exponentials(logits)
    losses = np.log(total) - shifted[np.arange(len(labels)), labels]
    return float(losses.sum(dtype=np.float64)), int((logits.argmax(1) == labels).sum())


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits less the largest of their row, their exponentials, and the sum of these over the row."""
    shifted = logits - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    return shifted, exponentials, exponentials.sum(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_threads(num_threads: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products use this many threads, so that equal input gives equal bits."""
    from threadpoolctl import threadpool_limits

    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(num_threads, user_api="blas")
    return limits
