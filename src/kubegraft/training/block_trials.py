"""How many blocks to unfreeze: deeper cuts are tried while they pay on validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kubegraft.reporting.events import log_event
from kubegraft.training.history import History, rank

# With fewer wrong answers on validation, which of two depths is better is a matter of luck.
FEWEST_ERRORS: Final = 10


@dataclass(frozen=True, slots=True)
class Trial:
    """One training with so many blocks unfrozen, from the model that came in.

    Attributes:
        num_blocks: Blocks that were unfrozen.
        history: What happened.
        weights: Weights of the whole model at its best epoch, the start included.
    """

    num_blocks: int
    history: History
    weights: Sequence[np.ndarray]

    @property
    def seconds(self) -> float:
        """Time spent on training and validation."""
        return self.history.epochs[-1]["seconds"] if self.history.epochs else 0.0

    def summary(self) -> dict[str, Any]:
        """Return what the metadata and the report say of the trial."""
        return {
            "num_blocks": self.num_blocks,
            "validation_accuracy": self.history.best["validation_accuracy"],
            "validation_loss": self.history.best["validation_loss"],
            "best_epoch": self.history.best_epoch,
            "num_epochs": len(self.history.epochs),
            "seconds": self.seconds,
            "stopped": self.history.stopped,
        }


def try_depths(
    depths: Sequence[int],
    run: Callable[[int, float], Trial],
    *,
    num_validation: int,
    time_budget_seconds: float,
) -> tuple[Trial, list[dict[str, Any]], str]:
    """Return the best trial, what to say of each, and why it ended there: "" where all were tried.

    The next depth is tried while the one before was better on validation than all before it and than the model
    that came in, answered so many images wrongly that a better one could be told from it, and left more time than
    it took.

    Args:
        depths: Numbers of blocks, from few to many; at least one.
        run: Number of blocks and seconds left (0 for no limit) to its trial.
        num_validation: Images that the trials are compared by.
        time_budget_seconds: Time for all trials together; 0 for no limit, so that the result does not depend
            on the machine's speed.
    """
    summaries: list[dict[str, Any]] = []
    best: Trial | None = None
    left = time_budget_seconds
    for depth in depths:
        trial = run(depth, left)
        summaries.append(trial.summary())
        if len(depths) > 1:
            log_event("fine_tune", "tried", **trial.summary())
        paid = trial.history.best_epoch >= 0 if best is None else _is_better(trial, best)
        if best is None or paid:
            best = trial
        left -= trial.seconds
        num_wrong = round((1 - trial.history.best["validation_accuracy"]) * num_validation)
        if not paid:
            return best, summaries, "the last trial did not pay"
        if num_wrong < FEWEST_ERRORS:
            return best, summaries, f"{num_wrong} wrong answers on validation can't tell a better one"
        if time_budget_seconds and left <= trial.seconds:
            return best, summaries, "the time budget leaves too little"
    if best is None:
        raise ValueError("depths must not be empty")
    return best, summaries, ""


def reason_of(summaries: Sequence[dict[str, Any]], depths: Sequence[int], ended: str) -> str:
    """Return why so many blocks are unfrozen, in one sentence."""
    tried = ", ".join(f"{row['num_blocks']} ({row['validation_accuracy']:.4f})" for row in summaries)
    untried = [str(depth) for depth in depths[len(summaries) :]]
    left = f"; {' and '.join(untried)} not tried, since {ended}" if untried else ""
    return f"best on validation of the numbers tried: {tried}{left}"


def _is_better(trial: Trial, other: Trial) -> bool:
    return rank(trial.history.best) > rank(other.history.best)
