"""Which head: linear and hidden layers of several sizes, compared by cross-validation on training features.

The validation split takes no part: it chooses a weight decay or an epoch afterwards, and would flatter a head
that it had chosen too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.config import AUTO, HeadConfig
from kubegraft.modeling.classifier import HeadParts, build_head
from kubegraft.recipes import Choice
from kubegraft.reporting.events import log_event
from kubegraft.training.linear_head import DECAYS, LinearProblem, cross_validated_path
from kubegraft.training.loop import OUT_OF_TIME, LoopConfig, train
from kubegraft.training.sources import FeatureSource
from kubegraft.training.trainables import HeadOnFeatures

_NUM_FOLDS: Final = 5
_WIDTHS: Final = (128, 512)
_DROPOUTS: Final = (0.3, 0.5)
# More examples than these make no difference to which head is better, only to the time it takes to see.
_MOST_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What cross-validation says about one head.

    Attributes:
        head: `linear` or `mlp`.
        hidden_units: Units of each hidden layer.
        dropout: Fraction of hidden units dropped in training.
        accuracies: Accuracy on each held-out fold.
        loss: Mean loss on the held-out folds.
        seconds: Time that all folds took.
    """

    head: str
    hidden_units: tuple[int, ...] = ()
    dropout: float = 0.0
    accuracies: tuple[float, ...]
    loss: float
    seconds: float

    @property
    def name(self) -> str:
        """What it is, for people."""
        if self.head == "linear":
            return "linear"
        return f"mlp {'-'.join(map(str, self.hidden_units))}, dropout {self.dropout:g}"

    @property
    def accuracy(self) -> float:
        """Mean over the folds."""
        return float(np.mean(self.accuracies))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchData:
    """What is searched on.

    Attributes:
        train: Pooled features and labels of the training split.
        mean: `float[dim]`, of the layer `standardise`.
        variance: `float[dim]`, of the layer `standardise`.
        num_classes: Number of classes.
        class_weights: `float32[num_classes]`, or None for 1 each.
    """

    train: FeatureSource
    mean: np.ndarray
    variance: np.ndarray
    num_classes: int
    class_weights: np.ndarray | None


def search_head(
    strategy: Any, data: SearchData, config: HeadConfig, plan: LoopConfig, scratch: Path
) -> tuple[HeadConfig, tuple[Choice, ...]]:
    """Return `config` with the head that cross-validation prefers, and the reasons.

    The simplest head (linear first, then in the order tried) that is within one standard error of the best is
    preferred. What has not been tried, or not to its end, when `config.search_seconds` are over is left out; the linear
    head is always tried, on two folds at least.

    Args:
        strategy: A `tf.distribute` strategy.
        data: Training features.
        config: As the user gave it; its own head takes part.
        plan: How heads with hidden layers are trained.
        scratch: Directory for a checkpoint.

    Raises:
        Interrupted: If the process was asked to stop.
    """
    deadline = time.monotonic() + config.search_seconds
    data = _sampled(data, config.seed)
    folds = list(stratified_folds(data.train.labels, config.seed))
    scores = [_linear_score(data, config, folds, deadline)]
    log_event("head_search", "scored", head="linear", accuracy=scores[0].accuracy, loss=scores[0].loss)
    left_out = 0
    for units, dropout in _candidates(config):
        last = scores[-1].seconds if len(scores) > 1 else 0.0
        tried = dataclasses.replace(config, head="mlp", hidden_units=units, dropout=dropout)
        score = None
        if time.monotonic() + last < deadline:
            score = _mlp_score(strategy, data, tried, plan, folds, scratch, deadline)
        if score is None:
            left_out += 1
            continue
        scores.append(score)
        log_event("head_search", "scored", head=scores[-1].name, accuracy=scores[-1].accuracy)
    winner = preferred(scores)
    reason = _reason(scores, winner, left_out)
    chosen: dict[str, Any] = {"head": winner.head}
    if winner.head == "mlp":
        chosen |= {"hidden_units": winner.hidden_units, "dropout": winner.dropout}
    choices = tuple(Choice(name, value, reason) for name, value in chosen.items())
    return dataclasses.replace(config, **chosen), choices


def preferred(scores: Sequence[Score]) -> Score:
    """Return the first score that is within one standard error of the best, fold by fold."""
    best = max(scores, key=lambda score: (score.accuracy, -score.loss))
    for score in scores:
        differences = np.subtract(best.accuracies, score.accuracies)
        error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else 0.0
        if differences.mean() <= error:
            return score
    return best


def stratified_folds(
    labels: np.ndarray, seed: int, num_folds: int = _NUM_FOLDS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield example numbers to train on and to hold out, every class spread evenly over the folds.

    Args:
        labels: `int[num_examples]`.
        seed: Seed of the run.
        num_folds: Number of folds; fewer if there are not two examples for each.
    """
    num_folds = max(2, min(num_folds, len(labels) // 2))
    generator = np.random.default_rng([seed, 5])
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[by_class] = np.arange(len(labels)) % num_folds
    for number in range(num_folds):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def _sampled(data: SearchData, seed: int) -> SearchData:
    features = data.train.features
    most = max(1, _MOST_BYTES // (features.shape[1] * features.itemsize))
    if len(features) <= most:
        return data
    rows = np.sort(np.random.default_rng([seed, 6]).permutation(len(features))[:most])
    return dataclasses.replace(data, train=FeatureSource(features[rows], data.train.labels[rows]))


def _candidates(config: HeadConfig) -> list[tuple[tuple[int, ...], float]]:
    """Return hidden layers and dropouts to try; the user's own first, and only the user's dropout if given."""
    dropouts = _DROPOUTS if config.dropout == AUTO else (config.dropout,)
    tried = [(tuple(config.hidden_units), dropouts[0])] if config.head == "mlp" else []
    tried += [((width,), dropout) for width in _WIDTHS for dropout in dropouts]
    return list(dict.fromkeys(tried))


def _linear_score(
    data: SearchData,
    config: HeadConfig,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    deadline: float,
) -> Score:
    started = time.monotonic()
    problems = [
        LinearProblem(
            train=_part(data, inside),
            validation=_part(data, outside),
            num_classes=data.num_classes,
            mean=np.zeros_like(data.mean),
            variance=np.ones_like(data.variance),
            label_smoothing=max(config.label_smoothing, 0.0),
            class_weights=data.class_weights,
        )
        for inside, outside in folds
    ]
    accuracies, loss = cross_validated_path(problems, DECAYS, deadline)
    return Score(head="linear", accuracies=tuple(accuracies), loss=loss, seconds=time.monotonic() - started)


def _mlp_score(
    strategy: Any,
    data: SearchData,
    config: HeadConfig,
    plan: LoopConfig,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    scratch: Path,
    deadline: float,
) -> Score | None:
    """Return what a head is worth, or None if the time was over before all its folds had all their epochs."""
    started = time.monotonic()
    # All epochs, and the last one counts: an epoch that the held-out fold had chosen would flatter this head.
    plan = dataclasses.replace(plan, phase="head_search", patience=plan.num_epochs + 1)
    checkpoint = scratch / "search.ckpt"
    results = []
    for inside, outside in folds:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        plan = dataclasses.replace(plan, time_budget_seconds=left)
        with strategy.scope():
            layers = build_head(data.train.features.shape[1], data.num_classes, config)
            trainable = HeadOnFeatures(HeadParts(layers))
        checkpoint.unlink(missing_ok=True)
        sources = (_part(data, inside), _part(data, outside))
        history = train(strategy, trainable, sources, plan, checkpoint)
        checkpoint.unlink(missing_ok=True)
        if history.stopped.startswith(OUT_OF_TIME):
            return None
        results.append(history.epochs[-1] if history.epochs else history.start)
    return Score(
        head="mlp",
        hidden_units=tuple(config.hidden_units),
        dropout=config.dropout,
        accuracies=tuple(result["validation_accuracy"] for result in results),
        loss=float(np.mean([result["validation_loss"] for result in results])),
        seconds=time.monotonic() - started,
    )


def _part(data: SearchData, rows: np.ndarray) -> FeatureSource:
    """Return some examples, standardised."""
    standardised = (data.train.features[rows] - data.mean) / np.sqrt(data.variance)
    return FeatureSource(standardised.astype(np.float32), data.train.labels[rows])


def _reason(scores: Sequence[Score], winner: Score, left_out: int) -> str:
    table = "; ".join(f"{score.name} {score.accuracy:.4f}" for score in scores)
    missing = f"; {left_out} more not tried to the end for lack of time" if left_out else ""
    return (
        f"{winner.name}: the simplest within one standard error of the best in {len(winner.accuracies)}-fold "
        f"cross-validation on the training split ({table}{missing})"
    )
