"""What happened in training, and which of its validation results is better."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class History:
    """What happened, epoch by epoch; `best_epoch` is -1 while nothing beats the start.

    Attributes:
        start: Validation results before the first epoch.
        epochs: Results after each epoch; with the solver `lbfgs`, of each weight decay from strong to weak.
        best_epoch: Index in `epochs` of what is kept.
        stopped: Why it ended.
        solver: `adamw` or `lbfgs`.
    """

    start: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    stopped: str = ""
    solver: str = "adamw"

    @property
    def highest_epoch(self) -> int:
        """Index of the epoch with the best validation results, surely better than the start or not; -1 for none."""
        ranks = [rank(result) for result in (self.start, *self.epochs)]
        return ranks.index(max(ranks)) - 1

    @property
    def best(self) -> dict[str, float]:
        """Validation results of the model that is kept."""
        return self.start if self.best_epoch < 0 else self.epochs[self.best_epoch]


def rank(result: dict[str, float]) -> tuple[float, float]:
    """Return what validation results are compared by: accuracy, then loss."""
    loss = result["validation_loss"]
    return result["validation_accuracy"], -loss if math.isfinite(loss) else -math.inf


def surely_better(result: dict[str, float], start: dict[str, float], num_images: int) -> bool:
    """Whether validation results are better than those before training, by more than luck.

    One image more that is right is no proof where the loss has grown: the loss tells finer, and training on few
    images makes a model surer of its mistakes. So with a higher loss accuracy must gain more than a standard deviation
    of what would come by chance if both were equally good: the number of images on which two models differ is at
    most the sum of their mistakes, each for one or the other as a coin falls.

    Args:
        result: Validation results of an epoch.
        start: Those before the first epoch.
        num_images: Images in the validation split.
    """
    if rank(result) <= rank(start):
        return False
    if result["validation_loss"] <= start["validation_loss"] or not math.isfinite(start["validation_loss"]):
        return True
    mistakes = [(1 - each["validation_accuracy"]) * num_images for each in (start, result)]
    return mistakes[0] - mistakes[1] > math.sqrt(sum(mistakes))
