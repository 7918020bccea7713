"""Compiled steps over the batches of an epoch: from a stream, from rows of an array, or many from held features.

A step of a head on features is a fraction of a millisecond of matrix products; handing each batch from Python
to the graph costs several times that. So features that fit are held on the device, and one call of the graph
runs as many steps as take about a fifth of a second, gathering each batch itself. On a CPU rows of boundary
activations are copied faster than a stream's threads hand them on: those took a seventh of the time. All ways
compute the same.

With several workers each takes its columns of a global batch. What they must agree on at each step travels with the
gradients, in the same vector.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf

from kubegraft.training.batches import EpochBatches
from kubegraft.training.distribution import has_gpu, num_local_replicas, workers_of, xla_wanted
from kubegraft.training.sources import FeatureSource, Source, steady
from kubegraft.training.starvation import WatchedInput
from kubegraft.training.workers import ending_if_lost
from kubegraft.training.xla_on_cpu import clipped, tracing_for_xla_on_cpu

if TYPE_CHECKING:
    from kubegraft.training.loop import LoopConfig, Trainable
    from kubegraft.training.optimizer import GlobalAdamW

# Each device holds a copy of the features of both splits.
RESIDENT_BYTES: Final = 512 << 20
# A call of the graph can't be interrupted: long enough to forget its cost, short enough for signals.
_CALL_SECONDS: Final = 0.2

# Loss, correct answers and examples, summed over the real examples of a batch.
NUM_SUMS: Final = 3
# What workers tell one another at each training step (`float32`), and seconds that this one waited for the others.
NUM_TOLD: Final = 3
NUM_COLUMNS: Final = NUM_SUMS + NUM_TOLD + 1


@dataclass(frozen=True, slots=True)
class ReplicaStep:
    """One step of one replica.

    Attributes:
        compute: (inputs, numbers) of the replica, a seed and what this worker tells the others (None for a process
            that trains alone) -> `float32[num_columns]`.
        num_columns: `NUM_SUMS`, or `NUM_COLUMNS` of a training step with other workers.
    """

    compute: Callable[[tuple[Any, Any], Any, Any], Any]
    num_columns: int = NUM_SUMS

    @property
    def is_summed(self) -> bool:
        """Whether the sums are those over all replicas already."""
        return self.num_columns == NUM_COLUMNS


def _nothing_to_tell() -> None:
    return None


@runtime_checkable
class RowSource(Source, Protocol):
    """A source whose batches are rows of an array."""

    def prepare(self) -> None:
        """Make the array now, however long that takes: a step with other workers has a time limit."""

    def batch(self, batches: EpochBatches, step: int, columns: slice = slice(None)) -> Any:
        """Return the inputs of one global batch, or of some columns of it, as `Source.inputs` would."""


class Steps(Protocol):
    """A compiled step, bound to one split."""

    def run(
        self,
        batches: EpochBatches,
        first: int,
        seed: tuple[int, int],
        tell: Callable[[], np.ndarray | None] = _nothing_to_tell,
    ) -> Iterator[np.ndarray]:
        """Run the steps of an epoch from `first` on.

        Args:
            batches: The epoch.
            first: Number of the first step to run.
            seed: Seed of the run, and the number of the epoch's step 0 over all epochs; key the dropout masks.
            tell: Asked before each call of the graph what this worker tells the others in its steps,
                `float32[NUM_TOLD]`; None where there are no others.

        Yields:
            `float32[num_steps, 3]`: loss, correct answers and examples of each step since the last yield,
            summed over real examples and replicas; of an evaluation step with other workers only this one's. Of a
            training step with others `float32[num_steps, NUM_COLUMNS]`, with the sums of what all told, and how long
            this worker waited.
        """


def make_steps(
    strategy: Any, source: Source, batch_size: int, replica_step: ReplicaStep, *, compiled: bool = False
) -> Steps:
    """Return steps over a split, by the fastest way there is for it; `compiled` by XLA if that way can be."""
    if isinstance(source, FeatureSource) and source.features.nbytes <= RESIDENT_BYTES:
        return _ResidentSteps(strategy, source, batch_size, replica_step, compiled=compiled)
    # A GPU computes while the stream makes the next batch ready; on a CPU both would want the same processors.
    if isinstance(source, RowSource) and num_local_replicas(strategy) == 1 and not has_gpu():
        return _RowSteps(strategy, source, batch_size, replica_step)
    return _StreamedSteps(strategy, source, batch_size, replica_step)


def _compiled(strategy: Any, replica_step: ReplicaStep) -> Callable[..., np.ndarray]:
    """Return one step of all replicas, with their sums, as a graph."""
    workers = workers_of(strategy)

    @tf.function(autograph=False)
    def step(batch: Any, seed: Any, told: Any) -> Any:
        return _summed(strategy, replica_step, strategy.run(replica_step.compute, args=(batch, seed, told)))

    def run(batch: Any, seed: Any, told: np.ndarray | None) -> np.ndarray:
        with ending_if_lost(workers):
            sums: np.ndarray = step(batch, seed, None if told is None else tf.constant(told)).numpy()
        return sums

    return run


def _summed(strategy: Any, replica_step: ReplicaStep, results: Any) -> Any:
    """Return the sum over all replicas; over those of this process where the step or its caller sums the others."""
    if workers_of(strategy).alone:
        return strategy.reduce("SUM", results, axis=None)
    local = strategy.experimental_local_results(results)
    return local[0] if replica_step.is_summed else tf.add_n(local)


def _own_columns(strategy: Any, batch_size: int) -> slice:
    """Return this worker's part of a global batch."""
    workers = workers_of(strategy)
    width = batch_size // workers.num_workers
    return slice(workers.index * width, (workers.index + 1) * width)


class _RowSteps:
    """Batches are gathered from an array and handed to the one device there is, a call of the graph each."""

    def __init__(self, strategy: Any, source: RowSource, batch_size: int, replica_step: ReplicaStep) -> None:
        self._source, self._step = source, _compiled(strategy, replica_step)
        self._columns = _own_columns(strategy, batch_size)

    def run(
        self,
        batches: EpochBatches,
        first: int,
        seed: tuple[int, int],
        tell: Callable[[], np.ndarray | None] = _nothing_to_tell,
    ) -> Iterator[np.ndarray]:
        """Run one step a yield; see `Steps`."""
        arrays = _numbers(self._source, batches)
        for number in range(first, batches.num_steps):
            inputs = self._source.batch(batches, number, self._columns)
            numbers = tuple(tf.constant(array[number, self._columns]) for array in arrays)
            key = tf.constant([seed[0], seed[1] + number], tf.int32)
            yield self._step((inputs, numbers), key, tell())[None]


class _StreamedSteps:
    """Batches come from a `tf.data` pipeline, one call of the graph each."""

    def __init__(self, strategy: Any, source: Source, batch_size: int, replica_step: ReplicaStep) -> None:
        self._strategy, self._source, self._batch_size = strategy, source, batch_size
        self._step = _compiled(strategy, replica_step)
        self._input = WatchedInput(rows=isinstance(source, RowSource))

    def run(
        self,
        batches: EpochBatches,
        first: int,
        seed: tuple[int, int],
        tell: Callable[[], np.ndarray | None] = _nothing_to_tell,
    ) -> Iterator[np.ndarray]:
        """Run one step a yield; see `Steps`."""
        if first >= batches.num_steps:
            return
        for number, batch in enumerate(self._input.watch(self._distributed(batches, first)), first):
            key = tf.constant([seed[0], seed[1] + number], tf.int32)
            yield self._step(batch, key, tell())[None]

    def _distributed(self, batches: EpochBatches, first: int) -> Any:
        """Return an iterable over the batches from `first` on, split over this process's replicas."""
        source, per_replica = self._source, self._batch_size // self._strategy.num_replicas_in_sync
        rows, columns = slice(first, None), _own_columns(self._strategy, self._batch_size)
        numbers = tf.data.Dataset.from_tensor_slices(
            tuple(array[rows, columns].reshape(-1, per_replica) for array in _numbers(source, batches))
        )
        inputs = source.inputs(batches, rows, columns, per_replica)
        dataset = steady(tf.data.Dataset.zip((inputs, numbers)))
        # Where there is nothing to distribute, TensorFlow's way of it only adds copies and threads.
        if num_local_replicas(self._strategy) == 1 and not has_gpu():
            return dataset
        return self._strategy.distribute_datasets_from_function(lambda _: dataset)


class _ResidentSteps:
    """Every device holds all features; one call of the graph runs many steps."""

    def __init__(
        self,
        strategy: Any,
        source: FeatureSource,
        batch_size: int,
        replica_step: ReplicaStep,
        *,
        compiled: bool = False,
    ) -> None:
        self._source, self._steps_a_call, self._workers = source, 1, workers_of(strategy)
        per_replica = batch_size // strategy.num_replicas_in_sync
        # In the scope, a variable's first value travels from the chief to the other workers, which have it.
        mirrored = self._workers.alone or num_local_replicas(strategy) > 1
        with strategy.scope() if mirrored else contextlib.nullcontext():
            features = tf.Variable(np.asarray(source.features), trainable=False, name="features")

        def replica(row: tuple[Any, ...], partner: Any, seed: Any, told: Any) -> Any:
            start = tf.distribute.get_replica_context().replica_id_in_sync_group * per_replica

            def own(array: Any) -> Any:
                return tf.slice(array, [start], [per_replica])

            index, *numbers = map(own, row)
            inputs = tf.gather(features, index)
            if partner is not None:
                share = tf.reshape(numbers[3], [-1, *[1] * (len(inputs.shape) - 1)])
                inputs = share * inputs + (1 - share) * tf.gather(features, own(partner))
            return replica_step.compute((inputs, tuple(numbers)), seed, told)

        form = tracing_for_xla_on_cpu if compiled and not has_gpu() else contextlib.nullcontext

        @tf.function(reduce_retracing=True, jit_compile=compiled, autograph=False)
        def steps(epoch: tuple[Any, ...], partner: Any, first: Any, last: Any, seed: Any, told: Any) -> Any:
            def body(step: Any, results: Any) -> tuple[Any, Any]:
                row = tuple(array[step] for array in epoch)
                mixed_in = None if partner is None else partner[step]
                key = seed + tf.stack([0, step])
                with form():
                    results_of_replicas = strategy.run(replica, args=(row, mixed_in, key, told))
                return step + 1, results.write(step, _summed(strategy, replica_step, results_of_replicas))

            # As long as the epoch, whatever part of it is run: XLA knows no lengths that change.
            shape, num_steps = [replica_step.num_columns], epoch[0].shape[0]
            loop = (first, tf.TensorArray(tf.float32, size=num_steps, element_shape=shape))
            done = tf.while_loop(lambda step, _: step < last, body, loop, parallel_iterations=1)
            return done[1].stack()

        self._steps = steps

    def run(
        self,
        batches: EpochBatches,
        first: int,
        seed: tuple[int, int],
        tell: Callable[[], np.ndarray | None] = _nothing_to_tell,
    ) -> Iterator[np.ndarray]:
        """Run many steps a yield; see `Steps`."""
        epoch = tuple(map(tf.constant, (batches.index, *_numbers(self._source, batches))))
        partner = tf.constant(batches.partner) if np.any(batches.share != 1) else None
        key = tf.constant(seed, tf.int32)
        while first < batches.num_steps:
            last = min(first + self._steps_a_call, batches.num_steps)
            started, told = time.monotonic(), tell()
            with ending_if_lost(self._workers):
                sums = self._steps(
                    epoch,
                    partner,
                    tf.constant(first),
                    tf.constant(last),
                    key,
                    None if told is None else tf.constant(told),
                ).numpy()[first:last]
            # Workers that took calls of different lengths would wait for one another for ever.
            self._adapt(float(self._workers.gather(np.array([time.monotonic() - started]))[0, 0]))
            first = last
            yield sums

    def _adapt(self, seconds: float) -> None:
        if seconds < _CALL_SECONDS / 2:
            self._steps_a_call *= 2
        elif seconds > 2 * _CALL_SECONDS:
            self._steps_a_call = max(1, self._steps_a_call // 2)


def _numbers(source: Source, batches: EpochBatches) -> tuple[np.ndarray, ...]:
    """Return what a step must know of each example beside its inputs; see `EpochBatches`."""
    return (
        batches.weight,
        batches.real,
        np.ascontiguousarray(batches.position),
        batches.share,
        source.labels[batches.index],
        source.labels[batches.partner],
    )


def replica_steps(
    trainable: Trainable, optimizer: GlobalAdamW, config: LoopConfig, *, alone: bool = True
) -> tuple[ReplicaStep, ReplicaStep]:
    """Return a training step and an evaluation step of one replica; `alone` where there are no other workers."""

    def losses(logits: Any, numbers: Any, smoothing: float) -> tuple[Any, Any]:
        share, label, partner = numbers[3][:, None], numbers[4], numbers[5]
        targets = share * tf.one_hot(label, config.num_classes)
        targets += (1 - share) * tf.one_hot(partner, config.num_classes)
        targets = targets * (1 - smoothing) + smoothing / config.num_classes
        loss = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        correct = tf.cast(tf.argmax(logits, -1, tf.int32) == tf.cast(label, tf.int32), tf.float32)
        real = numbers[1]
        return loss, tf.stack(
            [tf.reduce_sum(loss * real), tf.reduce_sum(correct * real), tf.reduce_sum(real)]
        )

    def differentiate(inputs: Any, numbers: Any, seed: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            logits = trainable.train_logits(inputs, numbers[2], seed)
            loss, sums = losses(logits, numbers, config.label_smoothing)
            weighted = tf.reduce_sum(loss * numbers[0])
        return sums, tape.gradient(weighted, [variable.value for variable in trainable.variables])

    # XLA knows no collectives of MirroredStrategy: the gradients' sum stays outside, and a head with statistics of its
    # own, which replicas share, is left alone.
    by_xla = xla_wanted() and not trainable.state
    compiled = tf.function(differentiate, jit_compile=True, autograph=False) if by_xla else differentiate

    def train(batch: tuple[Any, Any], seed: Any, told: Any) -> Any:
        inputs, numbers = batch
        sums, gradients = compiled(inputs, numbers, seed)
        if told is None:
            gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        else:
            gradients, sums = summed_with_others(gradients, sums, told)
        if config.gradient_clip_norm:
            gradients = clipped(gradients, config.gradient_clip_norm)
        optimizer.apply(gradients, list(trainable.variables))
        optimizer.update_averages(trainable.variables)
        return sums

    def evaluate(batch: tuple[Any, Any], seed: Any, told: Any) -> Any:
        inputs, numbers = batch
        return losses(trainable.logits(inputs), numbers, 0.0)[1]

    return ReplicaStep(train, NUM_SUMS if alone else NUM_COLUMNS), ReplicaStep(evaluate)


def _clock() -> Any:
    """Return the time in a graph, in seconds; TensorFlow refuses its own where results are to be repeatable."""
    return tf.ensure_shape(tf.numpy_function(time.perf_counter, [], tf.float64), [])


def summed_with_others(gradients: Sequence[Any], sums: Any, told: Any) -> tuple[list[Any], Any]:
    """Return gradients summed over all replicas of all workers, and the columns of the step's results.

    One vector holds all that travels, so that a step waits for the others once.

    Args:
        gradients: `float32`, of one replica.
        sums: `float32[NUM_SUMS]`, of one replica.
        told: `float32[NUM_TOLD]`, of this worker.
    """
    told = told / num_local_replicas(tf.distribute.get_strategy())
    flat = tf.concat([*(tf.reshape(each, [-1]) for each in gradients), sums, told], 0)
    with tf.control_dependencies([flat]):
        ready = _clock()
    total = tf.distribute.get_replica_context().all_reduce("SUM", flat)
    with tf.control_dependencies([total]):
        waited = tf.cast(_clock() - ready, tf.float32)
    sizes = [each.shape.num_elements() for each in gradients]
    *parts, rest = tf.split(total, [*sizes, NUM_SUMS + NUM_TOLD])
    shaped = [tf.reshape(part, each.shape) for part, each in zip(parts, gradients, strict=True)]
    return shaped, tf.concat([rest, waited[None]], 0)
