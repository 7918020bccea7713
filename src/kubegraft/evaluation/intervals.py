"""How far a test result could be off by the luck of which images are in the test split. Only numpy.

A bootstrap resample of n images is n draws with replacement. A metric that depends on an image only through
the cell of a table it falls into (a cell of the confusion matrix; right or wrong) therefore needs no images
at all: the cells' counts in a resample follow a multinomial distribution. That is the same distribution,
drawn at a cost that does not grow with the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kubegraft.errors import EvaluationError
from kubegraft.evaluation.metrics import TOP_K, Answers, confusion_matrix, ratio

_CHUNK_NUMBERS: Final = 4_000_000  # drawn at once: 32 MB


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


class Resampling(NamedTuple):
    """How intervals are drawn.

    Attributes:
        num_samples: Resamples behind each interval, at least 1.
        confidence_level: Coverage, in (0, 1).
        seed: Seed of the draws; the same seed gives the same intervals.
    """

    num_samples: int = 1000
    confidence_level: float = 0.95
    seed: int = 0


def accuracy_interval(answers: Answers, resampling: Resampling) -> Interval:
    """Return the bootstrap percentile interval of the accuracy."""
    return _fraction_interval(answers.correct, resampling)


def top_k_interval(answers: Answers, resampling: Resampling, k: int = TOP_K) -> Interval:
    """Return the bootstrap percentile interval of the top-k accuracy."""
    return _fraction_interval(answers.label_rank < k, resampling)


def macro_f1_interval(answers: Answers, resampling: Resampling) -> Interval:
    """Return the bootstrap percentile interval of the macro-F1.

    In each resample the mean is over the classes that have images in it, as `metrics.macro_f1` does.
    """
    matrix = confusion_matrix(answers)
    rows, columns = np.nonzero(matrix)  # cells in row order
    by_column = np.argsort(columns, kind="stable")
    row_starts, row_of = _runs(rows)
    column_starts, column_of = _runs(columns[by_column])

    def macro_f1s(cells: NDArray[np.int64]) -> NDArray[np.float64]:
        support, called, hits = (np.zeros((len(cells), answers.num_classes), np.int64) for _ in range(3))
        support[:, row_of] = np.add.reduceat(cells, row_starts, axis=1)
        called[:, column_of] = np.add.reduceat(cells[:, by_column], column_starts, axis=1)
        hits[:, rows[rows == columns]] = cells[:, rows == columns]
        f1 = ratio(2 * hits, support + called)
        present = support > 0
        return ratio(np.where(present, f1, 0).sum(axis=1), present.sum(axis=1))

    return _interval(matrix[rows, columns], macro_f1s, resampling, width=3 * answers.num_classes)


def accuracy_gain_interval(answers: Answers, reference: Answers, resampling: Resampling) -> Interval:
    """Return the paired bootstrap percentile interval of `accuracy(answers) - accuracy(reference)`.

    Paired: each resample takes the same images for both, so that images which are easy or hard for both
    do not blur the difference.

    Raises:
        EvaluationError: If the two are not about the same images.
    """
    if not np.array_equal(answers.labels, reference.labels):
        raise EvaluationError(
            "`reference` must answer the same images in the same order. Received: "
            f"{len(reference)} images for {len(answers)}, or other labels. Evaluate both on one dataset."
        )
    change = answers.correct.astype(np.int64) - reference.correct
    counts = np.array([(change == -1).sum(), (change == 0).sum(), (change == 1).sum()])
    return _interval(counts, lambda cells: (cells[:, 2] - cells[:, 0]) / len(answers), resampling)


def wilson_interval(
    successes: NDArray[np.int64], totals: NDArray[np.int64], confidence_level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both ends of the Wilson score interval of each fraction; (0, 1) where the total is 0.

    Unlike the bootstrap it does not shrink to nothing for a small class that was all right or all wrong.

    Source:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = NormalDist().inv_cdf(0.5 + confidence_level / 2)
    n = np.maximum(totals, 1).astype(np.float64)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    known = totals > 0
    return np.where(known, np.maximum(centre - half, 0), 0.0), np.where(
        known, np.minimum(centre + half, 1), 1.0
    )


def _fraction_interval(hits: NDArray[np.bool_], resampling: Resampling) -> Interval:
    counts = np.array([len(hits) - hits.sum(), hits.sum()])
    return _interval(counts, lambda cells: cells[:, 1] / len(hits), resampling)


def _interval(
    counts: NDArray[np.int64],
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    resampling: Resampling,
    width: int = 0,
) -> Interval:
    """Return the percentile interval of `statistic` over resamples of a table with these `counts`."""
    values = np.concatenate([statistic(cells) for cells in _resamples(counts, resampling, width)])
    tail = (1 - resampling.confidence_level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resamples(counts: NDArray[np.int64], resampling: Resampling, width: int) -> Iterator[NDArray[np.int64]]:
    """Yield `int64[some, cells]` until `num_samples` rows are drawn; `width` is what a row costs besides."""
    generator = np.random.default_rng(resampling.seed)
    total = int(counts.sum())
    chunk = max(_CHUNK_NUMBERS // (len(counts) + width), 1)
    for start in range(0, resampling.num_samples, chunk):
        size = min(chunk, resampling.num_samples - start)
        yield generator.multinomial(total, counts / total, size=size)


def _runs(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each run of equal values starts, and its value; `values` are sorted."""
    value, start = np.unique(values, return_index=True)
    return start, value
