"""How good a classifier's answers are. Only numpy: no TensorFlow, no files.

`Answers` keeps four numbers an image instead of a row of probabilities, so that the memory of an evaluation
does not grow with the number of classes. `kubegraft.evaluation.evaluate` collects them batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kubegraft.errors import EvaluationError

TOP_K: Final = 5
_SUM_TOLERANCE: Final = 1e-3
_SMALLEST_PROBABILITY: Final = 1e-7  # what Keras clips to before a logarithm


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a classifier said about labelled images.

    Attributes:
        labels: True classes, `int64[images]`, in `[0, num_classes)`.
        predicted: Most probable classes, `int64[images]`; the first of equals.
        confidence: Probabilities of `predicted`, `float64[images]`.
        label_probability: Probabilities of `labels`, `float64[images]`.
        label_rank: How many classes were put before the true one, `int64[images]`; 0 is a correct answer.
        num_classes: Number of classes, at least 1.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    label_probability: NDArray[np.float64]
    label_rank: NDArray[np.int64]
    num_classes: int

    @classmethod
    def of(cls, probabilities: ArrayLike, labels: ArrayLike) -> Self:
        """Return the answers that a classifier's output holds.

        Args:
            probabilities: `float[images, classes]`, rows sum to 1 (tolerance 1e-3).
            labels: `int[images]`, values in `[0, classes)`.

        Raises:
            EvaluationError: If shapes disagree, a row is no probability distribution, or a label is no class.
        """
        rows, classes = _checked(np.asarray(probabilities, np.float64), np.asarray(labels))
        images = np.arange(len(classes))
        predicted = rows.argmax(axis=1)
        of_label = rows[images, classes]
        earlier = np.arange(rows.shape[1]) < classes[:, None]
        before = (rows > of_label[:, None]) | ((rows == of_label[:, None]) & earlier)
        return cls(classes, predicted, rows[images, predicted], of_label, before.sum(axis=1), rows.shape[1])

    @classmethod
    def joined(cls, batches: Iterable[Answers]) -> Self:
        """Return the answers of all batches in one.

        Raises:
            EvaluationError: If there is no image in them.
        """
        parts = list(batches)
        if not any(len(part) for part in parts):
            raise EvaluationError(
                "`labels` must hold at least one image. Received: 0 images. Evaluate on a split with images."
            )
        return cls(
            labels=np.concatenate([part.labels for part in parts]),
            predicted=np.concatenate([part.predicted for part in parts]),
            confidence=np.concatenate([part.confidence for part in parts]),
            label_probability=np.concatenate([part.label_probability for part in parts]),
            label_rank=np.concatenate([part.label_rank for part in parts]),
            num_classes=parts[0].num_classes,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were classified right, `bool[images]`."""
        return np.equal(self.predicted, self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class ClassScores:
    """Scores of each class, all `float64[classes]` in [0, 1], 0 where undefined, except `support`.

    Attributes:
        precision: Of the images called this class, the fraction that are. Undefined if none was.
        recall: Of the images of this class, the fraction called so. Undefined without images.
        f1: Harmonic mean of the two.
        support: Number of images of this class, `int64[classes]`.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]


def accuracy(answers: Answers) -> float:
    """Return the fraction of images whose most probable class is the true one, in [0, 1]."""
    return float(answers.correct.mean())


def top_k_accuracy(answers: Answers, k: int = TOP_K) -> float:
    """Return the fraction of images whose true class is among the `k` most probable.

    Args:
        answers: At least one image.
        k: At least 1; with no more than `k` classes the result is 1.

    Raises:
        EvaluationError: If `k` is below 1.
    """
    if k < 1:
        raise EvaluationError(f"`k` must be at least 1. Received: k={k!r}. Top-5 accuracy is k=5.")
    return float((answers.label_rank < k).mean())


def log_loss(answers: Answers) -> float:
    """Return the mean negative natural logarithm of the true class's probability, clipped at 1e-7."""
    return float(-np.log(np.maximum(answers.label_probability, _SMALLEST_PROBABILITY)).mean())


def confusion_matrix(answers: Answers) -> NDArray[np.int64]:
    """Return `int64[classes, classes]`: images of the row's true class, called the column's class."""
    cells = answers.labels * answers.num_classes + answers.predicted
    counts = np.bincount(cells, minlength=answers.num_classes**2)
    return counts.reshape(answers.num_classes, answers.num_classes)


def class_scores(matrix: NDArray[np.int64]) -> ClassScores:
    """Return precision, recall, F1 and support of each class.

    Args:
        matrix: What `confusion_matrix` returns.
    """
    hits, support, called = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return ClassScores(
        precision=ratio(hits, called),
        recall=ratio(hits, support),
        f1=ratio(2 * hits, support + called),
        support=support,
    )


def macro_f1(matrix: NDArray[np.int64]) -> float:
    """Return the mean F1 of the classes that have test images, each class counting the same.

    A class without test images has no recall, so it is left out rather than counted as 0. Images wrongly
    called such a class still cost their own class its recall.

    Args:
        matrix: What `confusion_matrix` returns; at least one image.
    """
    scores = class_scores(matrix)
    return float(scores.f1[scores.support > 0].mean())


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Return the quotient, elementwise, and 0 where the denominator is 0."""
    quotient = np.zeros(np.shape(numerator), np.float64)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _checked(
    rows: NDArray[np.float64], labels: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if rows.ndim != 2 or labels.ndim != 1 or len(rows) != len(labels) or rows.shape[1] < 1:
        raise EvaluationError(
            "`probabilities` must have the shape (images, classes) and `labels` the shape (images,). "
            f"Received: shapes {rows.shape} and {labels.shape}. Give one row and one label an image."
        )
    if not np.issubdtype(labels.dtype, np.integer) and len(labels):
        raise EvaluationError(
            f"`labels` must be whole numbers. Received: dtype={labels.dtype}. Give class indices."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < rows.shape[1]):
        raise EvaluationError(
            f"`labels` must be in [0, {rows.shape[1]}). Received: labels from {labels.min()} to "
            f"{labels.max()}. Give indices into the model's classes."
        )
    wrong = ~((np.abs(rows.sum(axis=1) - 1) <= _SUM_TOLERANCE) & (rows >= 0).all(axis=1))  # True for NaN
    if wrong.any():
        first = int(wrong.argmax())
        raise EvaluationError(
            "`probabilities` must be rows of numbers of at least 0 that sum to 1. Received: "
            f"row {first} with sum={rows[first].sum():.6g}, min={rows[first].min():.6g}. "
            "Give softmax outputs, not logits."
        )
    return rows, labels.astype(np.int64)
