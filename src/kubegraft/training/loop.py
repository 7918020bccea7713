"""The one training loop: both phases, one device or many, from any source of inputs, resumable at any step.

Keras's `fit` drifts on an uneven last batch, clips per replica, and fails with several workers
(docs/adr/0008). Here a batch is a pure function of seed, epoch and step (`batches`), the loss is normalised
by the global number of real examples and summed over replicas, and gradients are summed before they are
clipped and applied; so losses agree on any number of devices and of processes. With several processes
(docs/adr/0017) the chief alone writes, and all stop, save and go on at the same step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from kubegraft.errors import DivergenceError, Interrupted
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting import metrics
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.training.batches import EpochBatches, epoch_batches
from kubegraft.training.checkpoints import load_checkpoint, save_checkpoint
from kubegraft.training.distribution import has_gpu, workers_of, xla_wanted
from kubegraft.training.history import History, rank, surely_better
from kubegraft.training.optimizer import GlobalAdamW, WarmUpCosine
from kubegraft.training.pace import Pace
from kubegraft.training.sources import Source
from kubegraft.training.steps import NUM_SUMS, RowSource, make_steps, replica_steps
from kubegraft.training.variables import digest_of_variables

# How `History.stopped` begins where the time ended training.
OUT_OF_TIME: Final = "time budget"
# An epoch on computed features takes a fraction of a second; a log wants fewer lines than that.
_NOTE_SECONDS: Final = 2.0
# Nor need more be safe than a second's work: writing to disk took as long as a head's whole epoch.
_SAVE_SECONDS: Final = 1.0


class Trainable(Protocol):
    """What the loop trains."""

    @property
    def variables(self) -> Sequence[Any]:
        """Trainable variables."""

    @property
    def rate_multipliers(self) -> Sequence[float]:
        """Factor on the learning rate of each."""

    @property
    def state(self) -> Sequence[Any]:
        """Other variables that training changes, such as the statistics of a head's batch norm."""

    def train_logits(self, inputs: Any, position: Any, seed: Any) -> Any:
        """Return `float32[batch, classes]` in training mode; dropout masks are keyed by `position` and `seed`."""

    def logits(self, inputs: Any) -> Any:
        """Return `float32[batch, classes]` in inference mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Numbers of one phase; all are resolved, none is automatic. See `config.TrainingConfig`."""

    phase: str
    num_classes: int
    batch_size: int
    num_epochs: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    label_smoothing: float
    gradient_clip_norm: float
    patience: int
    time_budget_seconds: float
    checkpoint_interval_seconds: float
    seed: int
    mixup_alpha: float = 0.0
    class_weights: np.ndarray | None = None
    epsilon: float = 1e-7
    average_decay: float = 0.0


def train(
    strategy: Any,
    trainable: Trainable,
    sources: tuple[Source, Source],
    config: LoopConfig,
    checkpoint_path: Path,
) -> History:
    """Train, and leave `trainable` with the weights of its best validation epoch, the start included.

    An epoch is better than another if its validation accuracy is higher, or equal at a lower validation loss. To
    replace the start it must not be luck besides; see `history.surely_better`.

    Args:
        strategy: A `tf.distribute` strategy; `trainable` was built in its scope.
        trainable: What to train; changed in place.
        sources: Training and validation split.
        config: Numbers of this phase.
        checkpoint_path: File to go on from if it exists, and to write.

    Returns:
        The history, also of epochs before an interruption.

    Raises:
        DivergenceError: If the loss is not finite.
        Interrupted: If a process was asked to stop; the checkpoint is written.
        PeerLost: If another worker can't be reached any more.
        TrainingError: If workers come to other weights than the chief.
    """
    with stopping_gracefully():
        return _Run(strategy, trainable, sources, config, checkpoint_path).run()


class _Run:
    """State of one call of `train`; what of it must survive a crash goes through `_save` and `_resume`."""

    def __init__(
        self,
        strategy: Any,
        trainable: Trainable,
        sources: tuple[Source, Source],
        config: LoopConfig,
        checkpoint_path: Path,
    ) -> None:
        self.strategy, self.trainable, self.config = strategy, trainable, config
        self.train_source, self.validation_source = sources
        self.checkpoint_path = checkpoint_path
        self.workers = workers_of(strategy)
        self.pace = Pace(self.workers)
        self.num_steps = -(-len(self.train_source.labels) // config.batch_size)
        with strategy.scope():
            self.optimizer = self._make_optimizer()
        train_step, evaluation_step = replica_steps(
            trainable, self.optimizer, config, alone=self.workers.alone
        )
        # XLA knows no collectives; and what it is worth on a GPU is measured there.
        compiled = strategy.num_replicas_in_sync == 1 and xla_wanted(by_default=not has_gpu())
        self.train_steps = make_steps(
            strategy, self.train_source, config.batch_size, train_step, compiled=compiled
        )
        self.evaluation_steps = make_steps(
            strategy, self.validation_source, config.batch_size, evaluation_step
        )
        self.history = History()
        self.epoch = self.step = 0
        self.sums = np.zeros(3)
        self.elapsed_seconds = self.noted = self.saved = 0.0
        self.best_arrays: list[np.ndarray] = []

    def _make_optimizer(self) -> GlobalAdamW:
        num_steps = self.num_steps * self.config.num_epochs
        num_warmup_steps = math.ceil(num_steps * self.config.warmup_fraction)
        return GlobalAdamW(
            WarmUpCosine(self.config.learning_rate, num_steps, num_warmup_steps),
            variables=self.trainable.variables,
            rate_multipliers=self.trainable.rate_multipliers,
            weight_decay=self.config.weight_decay,
            epsilon=self.config.epsilon,
            average_decay=self.config.average_decay,
        )

    def run(self) -> History:
        if not self._resume():
            self._require_equal("weights before training")
            self.history.start = self._validate()
            self._keep_best()
        total = self.num_steps * self.config.num_epochs
        with Progress(
            self.config.phase, total, unit="step", images_per_unit=self.config.batch_size
        ) as progress:
            progress.resume(self.epoch * self.num_steps + self.step)
            while not self.history.stopped:
                if self.epoch >= self.config.num_epochs:
                    self.history.stopped = "all epochs done"
                    break
                self._train_epoch(progress)
        _assign(self._model_variables(), self.best_arrays)
        self._require_equal("weights after training")
        return self.history

    def _require_equal(self, what: str) -> None:
        if not self.workers.alone:
            self.workers.require_equal(digest_of_variables(self._model_variables()), what)

    def _train_epoch(self, progress: Progress) -> None:
        batches = self._epoch_batches(self.train_source, self.epoch, shuffle=True)
        seed = (self.config.seed, self.epoch * self.num_steps)
        self.pace.begin(self.elapsed_seconds)
        if isinstance(self.train_source, RowSource):
            self.train_source.prepare()
        for results in self.pace.watch(self.train_steps.run(batches, self.step, seed, self._tell)):
            for sums in results[:, :NUM_SUMS]:
                self.sums += self._checked(sums)
                self.step += 1
            told = self.pace.told(results, self._decisions)
            self.elapsed_seconds = told.elapsed_seconds
            progress.update(len(results), loss=self.sums[0] / self.sums[2])
            if told.stop:
                self._save()
                raise Interrupted(
                    f"`{self.config.phase}` was asked to stop (SIGTERM) and saved a checkpoint after step "
                    f"{self.step} of epoch {self.epoch}. Start it again with the same arguments to go on."
                )
            if told.save:
                self._save()
            if self._over_budget():
                break
        self._end_epoch(progress)

    def _decisions(self) -> tuple[bool, bool]:
        """Return whether to stop, and whether a checkpoint is due, as this process sees it."""
        due = time.monotonic() - self.saved > self.config.checkpoint_interval_seconds
        return stop_requested(), due

    def _tell(self) -> np.ndarray | None:
        return self.pace.tell(self._decisions)

    def _end_epoch(self, progress: Progress) -> None:
        result = {
            "epoch": self.epoch,
            "train_loss": self.sums[0] / self.sums[2],
            "train_accuracy": self.sums[1] / self.sums[2],
            **self._validate(),
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
            **self.pace.measures(),
        }
        self.history.epochs.append({name: float(value) for name, value in result.items()})
        if rank(result) > rank(self.history.best) and self._is_no_luck(result):
            self.history.best_epoch = self.epoch
            self._keep_best()
        self.elapsed_seconds = self.workers.share(self.pace.elapsed())
        self.history.epochs[-1]["seconds"] = round(self.elapsed_seconds, 3)
        if metrics.wanted():
            best = self.history.best["validation_accuracy"]
            metrics.observe_epoch(self.config.phase, self.config.num_epochs, self.history.epochs[-1], best)
        if time.monotonic() - self.noted > _NOTE_SECONDS:
            self.noted = time.monotonic()
            progress.note("epoch", of=self.config.num_epochs, **self.history.epochs[-1])
        self.history.stopped = self._reason_to_stop()
        self.epoch, self.step, self.sums = self.epoch + 1, 0, np.zeros(3)
        last = bool(self.history.stopped) or self.epoch >= self.config.num_epochs
        if last or time.monotonic() - self.saved > _SAVE_SECONDS:
            self._save()

    def _is_no_luck(self, result: dict[str, float]) -> bool:
        # Trained towards other targets than the labels, a model's loss on them says less.
        if self.config.label_smoothing or self.config.mixup_alpha:
            return True
        return surely_better(result, self.history.start, len(self.validation_source.labels))

    def _over_budget(self) -> bool:
        return 0 < self.config.time_budget_seconds <= self.elapsed_seconds

    def _reason_to_stop(self) -> str:
        if self._over_budget():
            return f"{OUT_OF_TIME} of {self.config.time_budget_seconds:g} s used up"
        if (
            self.epoch - self.history.highest_epoch >= self.config.patience
            and self.epoch + 1 < self.config.num_epochs
        ):
            return f"no better validation result in {self.config.patience} epochs"
        return ""

    def _validate(self) -> dict[str, float]:
        batches = self._epoch_batches(self.validation_source, 0, shuffle=False)
        sums = np.zeros(3)
        with self._averaged():
            for steps in self.evaluation_steps.run(batches, 0, (0, 0)):
                for step in steps:
                    sums += step
        sums = self._checked(self.workers.sums(sums))
        return {
            "validation_loss": float(sums[0] / sums[2]),
            "validation_accuracy": float(sums[1] / sums[2]),
        }

    def _epoch_batches(self, source: Source, epoch: int, *, shuffle: bool) -> EpochBatches:
        return epoch_batches(
            source.labels,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            shuffle=shuffle,
            class_weights=self.config.class_weights if shuffle else None,
            mixup_alpha=self.config.mixup_alpha if shuffle else 0.0,
        )

    def _checked(self, sums: np.ndarray) -> np.ndarray:
        if not math.isfinite(sums[0]):
            raise DivergenceError(
                f"The loss must be a finite number. Received: loss={sums[0]!r} in {self.config.phase}, epoch "
                f"{self.epoch}, step {self.step}. Lower `learning_rate` "
                f"(now {self.config.learning_rate:g}) or `gradient_clip_norm` "
                f"(now {self.config.gradient_clip_norm:g})."
            )
        return sums

    def _model_variables(self) -> list[Any]:
        return [*self.trainable.variables, *self.trainable.state]

    def _keep_best(self) -> None:
        with self._averaged():
            self.best_arrays = [variable.numpy() for variable in self._model_variables()]

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averages of the weights, where they are kept, in the weights' place."""
        averages = self.optimizer.averages
        weights = [variable.numpy() for variable in self.trainable.variables] if averages else []
        _assign(self.trainable.variables[: len(averages)], [average.numpy() for average in averages])
        try:
            yield
        finally:
            _assign(self.trainable.variables[: len(averages)], weights)

    def _save(self) -> None:
        self.saved = time.monotonic()
        self.pace.expect_pause()
        if not self.workers.is_chief:
            return
        arrays = {f"model_{i}": variable.numpy() for i, variable in enumerate(self._model_variables())}
        arrays |= {f"optimizer_{i}": variable.numpy() for i, variable in enumerate(self.optimizer.variables)}
        arrays |= {f"best_{i}": array for i, array in enumerate(self.best_arrays)}
        arrays["sums"] = self.sums
        position = {
            "epoch": self.epoch,
            "step": self.step,
            "batch_size": self.config.batch_size,
            "elapsed_seconds": self.elapsed_seconds,
            "history": asdict(self.history),
        }
        save_checkpoint(self.checkpoint_path, arrays, position)
        self.saved = time.monotonic()

    def _resume(self) -> bool:
        found = load_checkpoint(self.checkpoint_path, self.workers)
        if found is None:
            return False
        arrays, position = found
        if position["batch_size"] != self.config.batch_size:
            log_event(
                self.config.phase, "started over", reason="another number of devices needs other batches"
            )
            return False
        variables = self._model_variables()
        _assign(variables, [arrays[f"model_{i}"] for i in range(len(variables))])
        _assign(
            self.optimizer.variables, [arrays[f"optimizer_{i}"] for i in range(len(self.optimizer.variables))]
        )
        self.best_arrays = [arrays[f"best_{i}"] for i in range(len(variables))]
        self.sums = arrays["sums"]
        self.epoch, self.step = position["epoch"], position["step"]
        self.elapsed_seconds = position["elapsed_seconds"]
        self.history = History(**position["history"])
        log_event(self.config.phase, "continuing", epoch=self.epoch, step=self.step)
        return True


def _assign(variables: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
