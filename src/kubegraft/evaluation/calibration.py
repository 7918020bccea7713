"""Whether a classifier is as often right as it says. Only numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kubegraft.errors import EvaluationError
from kubegraft.evaluation.metrics import Answers, ratio


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Images whose confidence lies in `(low, high]`; the first bin holds 0 too.

    Attributes:
        low: Lower edge, in [0, 1).
        high: Upper edge, in (0, 1].
        count: Number of images; 0 for an empty bin.
        confidence: Their mean confidence, 0 if empty.
        accuracy: The fraction of them classified right, 0 if empty.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability_bins(answers: Answers, num_bins: int = 15) -> tuple[ReliabilityBin, ...]:
    """Return accuracy beside confidence, in `num_bins` bins of equal width over [0, 1].

    Raises:
        EvaluationError: If `num_bins` is below 1.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    if num_bins < 1:
        raise EvaluationError(f"`num_bins` must be at least 1. Received: num_bins={num_bins!r}. 15 is usual.")
    edges = np.linspace(0, 1, num_bins + 1)
    which = np.clip(np.searchsorted(edges, answers.confidence, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(which, minlength=num_bins)
    confidence = ratio(np.bincount(which, answers.confidence, num_bins), counts)
    right = ratio(np.bincount(which, answers.correct, num_bins), counts)
    return tuple(
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            count=int(counts[i]),
            confidence=float(confidence[i]),
            accuracy=float(right[i]),
        )
        for i in range(num_bins)
    )


def expected_calibration_error(answers: Answers, num_bins: int = 15) -> float:
    """Return the gap between confidence and accuracy, averaged over confidence bins by their images.

    Bins are equal-width over [0, 1]; empty bins carry no weight.

    Args:
        answers: At least one image.
        num_bins: Number of bins, at least 1. 15 follows the source.

    Returns:
        A fraction in [0, 1]; 0.0 for a perfectly calibrated model.

    Raises:
        EvaluationError: If `num_bins` is below 1.

    Source:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3.
    """
    bins = reliability_bins(answers, num_bins)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in bins) / len(answers)
