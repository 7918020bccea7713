"""A linear head on pooled features: logistic regression by L-BFGS, its weight decay chosen on validation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kubegraft.errors import Interrupted, TrainingError
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event
from kubegraft.training.checkpoints import load_checkpoint, save_checkpoint
from kubegraft.training.softmax_regression import SoftmaxRegression, Solution, loss_and_correct

if TYPE_CHECKING:
    from kubegraft.training.history import History
    from kubegraft.training.sources import FeatureSource

# From a head that hardly dares to answer to one that is nearly free; half a decade apart.
DECAYS: Final = tuple(float(f"{10.0**half:.3g}") for half in np.arange(1.0, -5.1, -0.5))
# Along the path an approximate optimum tells decays apart; the one that is kept is solved exactly.
_PATH_TOLERANCE: Final = 1e-4
# A weaker decay is not tried any more when this many in a row were no better, and the loss rose this much.
_PATIENCE: Final = 3
_CLEARLY_WORSE: Final = 1.1
_CHUNK_ROWS: Final = 8192
# Nothing is written for a path that is solved in less.
_SAVE_SECONDS: Final = 1.0
# Fewer have no spread to judge a difference by.
_FEWEST_FOLDS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """What a linear head is fitted to.

    Attributes:
        train: Training features and labels.
        validation: Validation features and labels.
        num_classes: Number of classes.
        mean: `float[dim]`, of the layer `standardise`.
        variance: `float[dim]`, of the layer `standardise`.
        label_smoothing: In [0, 1).
        class_weights: `float32[num_classes]`, or None for 1 each.
    """

    train: FeatureSource
    validation: FeatureSource
    num_classes: int
    mean: np.ndarray
    variance: np.ndarray
    label_smoothing: float = 0.0
    class_weights: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathPoint:
    """One decay of the path and what its optimum is worth."""

    solution: Solution
    validation_loss: float
    validation_accuracy: float
    seconds: float

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: accuracy, then loss."""
        return self.validation_accuracy, -self.validation_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFit:
    """The fitted head.

    Attributes:
        path: Decays that were tried, from strong to weak.
        best: Index in `path` of the head that is kept.
        stopped: Why the path ended.
    """

    path: Sequence[PathPoint]
    best: int
    stopped: str

    @property
    def chosen(self) -> PathPoint:
        """The head that is kept."""
        return self.path[self.best]

    @property
    def reason(self) -> str:
        """Why this decay was chosen, for the report."""
        strong, weak = (self.path[index].solution.decay for index in (0, -1))
        edge = "" if 0 < self.best < len(self.path) - 1 or len(self.path) == 1 else ", at the range's edge"
        return (
            f"best of {len(self.path)} from {strong:g} to {weak:g} on validation: accuracy "
            f"{self.chosen.validation_accuracy:.4f}, loss {self.chosen.validation_loss:.4f}{edge}"
        )


def fit_linear_head(
    problem: LinearProblem,
    *,
    decays: Sequence[float] = DECAYS,
    time_budget_seconds: float = 0.0,
    directory: Path | None = None,
) -> LinearFit:
    """Return the logistic regression whose weight decay is best on validation, at its optimum.

    The same input gives the same bits on one machine, interrupted or not, unless the time budget ends the path.

    Args:
        problem: Features, labels, and how examples count.
        decays: Factors of half the squared kernel to try, from strong to weak; each starts from the one before.
        time_budget_seconds: No further decay is tried after this time; 0 for no limit.
        directory: Keeps what is solved, about once a second, for an interrupted call to go on from; None keeps nothing.

    Raises:
        TrainingError: If a feature is not a finite number.
        Interrupted: If the process was asked to stop; the same call goes on.
    """
    with stopping_gracefully():
        started = time.monotonic()
        regression = _regression(problem)
        kept = _Kept(directory, regression.fingerprint)
        path: list[PathPoint] = []
        stopped = "all decays tried"
        for number, decay in enumerate(decays):
            start = path[-1].solution.coefficients if path else None
            point = kept.find(number, decay)
            if point is None:
                point = _measured(problem, regression.solve(decay, start, _PATH_TOLERANCE), started)
                kept.keep(number, point)
            else:
                started = time.monotonic() - point.seconds
            path.append(point)
            log_event("train_head", "decay", **shown(point))
            if metrics.wanted():
                best_accuracy = max(each.validation_accuracy for each in path)
                seen = {"epoch": len(path) - 1, **shown(point)}
                metrics.observe_epoch("train_head", len(decays), seen, best_accuracy)
            if reason := _reason_to_stop(path, time_budget_seconds, time.monotonic() - started):
                stopped = reason
                break
        best = max(range(len(path)), key=lambda index: (path[index].rank, -index))
        path[best] = _polished(problem, regression, path[best].solution, started)
    return LinearFit(path=path, best=best, stopped=stopped)


class _Kept:
    """Points of a path in files of a directory; a path that is solved in a second writes none.

    What was solved on other features, by another engine for example, has other names.
    """

    def __init__(self, directory: Path | None, fingerprint: str) -> None:
        self._directory, self._name = directory, f"solved-{fingerprint[:16]}"
        self._waiting: dict[int, PathPoint] = {}
        self._saved = time.monotonic()

    def find(self, number: int, decay: float) -> PathPoint | None:
        """Return a point, or None if it is not there, damaged, or of another decay."""
        try:
            found = load_checkpoint(self._path(number)) if self._directory else None
        except TrainingError:
            return None
        if found is None or found[1]["decay"] != decay:
            return None
        values: dict[str, Any] = {**found[0], **found[1]}
        solution = Solution(**{each.name: values.pop(each.name) for each in fields(Solution)})
        return PathPoint(solution=solution, **values)

    def keep(self, number: int, point: PathPoint) -> None:
        """Keep a point, now or with the next ones."""
        self._waiting[number] = point
        if self._directory is None or time.monotonic() - self._saved < _SAVE_SECONDS:
            return
        try:
            for each, waiting in self._waiting.items():
                self._write(self._path(each), waiting)
        except OSError as error:  # a disk that is full, say: it costs the way back, not the result
            log_event("train_head", "not kept", reason=f"{type(error).__name__}: {error}")
            self._directory = None
        self._waiting.clear()
        self._saved = time.monotonic()

    def _write(self, path: Path, point: PathPoint) -> None:
        values = {**_values(point), **_values(point.solution)}
        del values["solution"]
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        numbers = {name: np.asarray(value).item() for name, value in values.items() if name not in arrays}
        save_checkpoint(path, arrays, numbers)

    def _path(self, number: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{self._name}-{number}.ckpt"


def _values(record: PathPoint | Solution) -> dict[str, Any]:
    """Return the fields of a record as they are: `asdict` would copy every array."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _polished(
    problem: LinearProblem, regression: SoftmaxRegression, near: Solution, started: float
) -> PathPoint:
    exact = _measured(
        problem, regression.solve(near.decay, near.coefficients, regression.finest_tolerance), started
    )
    log_event("train_head", "solved", **shown(exact))
    return exact


def _measured(problem: LinearProblem, solution: Solution, started: float) -> PathPoint:
    loss, accuracy = measure(problem, solution.kernel, solution.bias)
    return PathPoint(
        solution=solution,
        validation_loss=loss,
        validation_accuracy=accuracy,
        seconds=time.monotonic() - started,
    )


def measure(problem: LinearProblem, kernel: np.ndarray, bias: np.ndarray) -> tuple[float, float]:
    """Return mean loss and accuracy on validation of a linear head on standardised features."""
    source, scale = problem.validation, 1 / np.sqrt(problem.variance)
    loss = correct = 0.0
    for start in range(0, len(source.labels), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        inputs = (np.asarray(source.features[rows], np.float64) - problem.mean) * scale
        sums = loss_and_correct(inputs @ kernel + bias, source.labels[rows])
        loss, correct = loss + sums[0], correct + sums[1]
    return loss / len(source.labels), correct / len(source.labels)


def cross_validated_path(
    problems: Sequence[LinearProblem], decays: Sequence[float] = DECAYS, deadline: float = math.inf
) -> tuple[list[float], float]:
    """Return what the best decay is worth in cross-validation: accuracy on each fold, and mean loss.

    Args:
        problems: One for each fold; the held-out examples are its validation.
        decays: Factors to try, from strong to weak.
        deadline: On the monotonic clock, in seconds: after it no third or later fold is begun.
    """
    paths: list[list[tuple[float, float]]] = []
    with stopping_gracefully():
        for problem in problems:
            if len(paths) >= _FEWEST_FOLDS and time.monotonic() > deadline:
                break
            regression = _regression(problem)
            start: np.ndarray | None = None
            path: list[tuple[float, float]] = []
            for decay in decays:
                solution = regression.solve(decay, start, _PATH_TOLERANCE)
                path.append(measure(problem, solution.kernel, solution.bias))
                start = solution.coefficients
            paths.append(path)
    results = np.array(paths)  # [folds, decays, loss and accuracy]
    losses, accuracies = results[..., 0].mean(0), results[..., 1].mean(0)
    best = max(range(len(decays)), key=lambda index: (accuracies[index], -losses[index]))
    return results[:, best, 1].tolist(), float(losses[best])


def history_of(fit: LinearFit, start: tuple[float, float]) -> History:
    """Return the path as a history, a decay in the place of an epoch.

    Args:
        fit: What was fitted.
        start: Validation loss and accuracy of the head before.
    """
    from kubegraft.training.history import History

    return History(
        start={"validation_loss": start[0], "validation_accuracy": start[1]},
        epochs=[{"epoch": float(index), **shown(point)} for index, point in enumerate(fit.path)],
        best_epoch=fit.best,
        stopped=fit.stopped,
        solver="lbfgs",
    )


def _reason_to_stop(path: Sequence[PathPoint], budget: float, elapsed: float) -> str:
    if 0 < budget <= elapsed:
        return f"time budget of {budget:g} s used up"
    best = max(range(len(path)), key=lambda index: (path[index].rank, -index))
    lowest = min(point.validation_loss for point in path)
    if len(path) - 1 - best >= _PATIENCE and path[-1].validation_loss > _CLEARLY_WORSE * lowest:
        return "weaker decays are clearly worse on validation"
    return ""


def _regression(problem: LinearProblem) -> SoftmaxRegression:
    return SoftmaxRegression(
        problem.train.features,
        problem.train.labels,
        problem.num_classes,
        mean=problem.mean,
        variance=problem.variance,
        label_smoothing=problem.label_smoothing,
        class_weights=problem.class_weights,
        check=_stop_if_asked,
    )


def _stop_if_asked() -> None:
    if stop_requested():
        raise Interrupted(
            "`train_head` was asked to stop (SIGTERM) while it solved for the head. Start it again with the same "
            "arguments: the features are kept, and what takes longer than a second to solve."
        )


def shown(point: PathPoint) -> dict[str, float]:
    """Return the numbers of a point for the history and the log."""
    solution = point.solution
    return {
        "weight_decay": solution.decay,
        "train_loss": solution.train_loss,
        "train_accuracy": solution.train_accuracy,
        "validation_loss": point.validation_loss,
        "validation_accuracy": point.validation_accuracy,
        "num_iterations": float(solution.num_iterations),
        "gradient_norm": solution.gradient_norm,
        "converged": float(solution.converged),
        "seconds": round(point.seconds, 3),
    }
