"""Mean and variance of pooled features, in one pass over what may not fit in memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from kubegraft.errors import TrainingError

_CHUNK_ROWS: Final = 4096


def feature_moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of each feature, `float64[dim]`.

    Args:
        features: `float32[num_examples, dim]`, at least one example; may be memory-mapped.

    Raises:
        TrainingError: If a feature is not a finite number.
    """
    count, dim = features.shape
    total, squares = np.zeros(dim), np.zeros(dim)
    # Squares of differences from some example, not from 0: a large mean would swallow a small variance.
    pivot = np.asarray(features[0], np.float64)
    for start in range(0, count, _CHUNK_ROWS):
        chunk = np.asarray(features[start : start + _CHUNK_ROWS], np.float64)
        _require_finite(chunk, start)
        chunk = chunk - pivot
        total, squares = total + chunk.sum(0), squares + (chunk**2).sum(0)
    mean = total / count
    return pivot + mean, np.maximum(squares / count - mean**2, 0.0)


def _require_finite(chunk: np.ndarray, start: int) -> None:
    bad = np.flatnonzero(~np.isfinite(chunk).all(1))
    if len(bad):
        raise TrainingError(
            f"`features` must be finite numbers. Received: features[{start + bad[0]}] with "
            f"{int((~np.isfinite(chunk[bad[0]])).sum())} of {chunk.shape[1]} that are not, and {len(bad)} such "
            "examples nearby. The backbone's weights or this image overflow: use other weights, or "
            "mixed_precision='off'."
        )
