"""Pooled features of a split: the frozen backbone's forward pass, paid once per image in this stage."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.errors import Interrupted
from kubegraft.modeling.engines import Forward, FrozenForward, choose_engine
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.stage import write_atomically
from kubegraft.training.batches import epoch_batches
from kubegraft.training.sources import Source

_SAVE_SECONDS: Final = 5.0
# Real images to prove an engine with, and to time it.
_NUM_SAMPLES: Final = 8


def frozen_forward(strategy: Any, forward: Forward, source: Source) -> FrozenForward | Forward:
    """Return how a frozen pass is best computed on this machine.

    Args:
        strategy: A `tf.distribute` strategy.
        forward: Images `float32[batch, size, size, 3]` to rows `[batch, row_length]`.
        source: Images; the first few prove that an engine answers like Keras.

    Returns:
        An engine for a CPU; `forward` itself for GPUs or several replicas, where TensorFlow computes it.
    """
    if strategy.num_replicas_in_sync > 1 or tf.config.list_logical_devices("GPU"):
        log_event("engine", "tensorflow", reason=f"{strategy.num_replicas_in_sync} GPU or other replicas")
        return forward
    count = min(_NUM_SAMPLES, len(source.labels))
    batches = epoch_batches(source.labels, batch_size=count, seed=0, epoch=0, shuffle=False)
    images = next(iter(source.inputs(batches, slice(0, 1), slice(None), count)))
    return choose_engine(forward, images.numpy())


def extract_features(
    strategy: Any,
    forward: FrozenForward | Forward,
    source: Source,
    *,
    dim: int,
    batch_size: int,
    directory: Path,
    split: str,
) -> np.ndarray:
    """Return the features of every example of a split, computed once and kept in `directory`.

    Images are read, decoded and resized while earlier ones are computed. What an interrupted call had computed
    is kept and gone on from, by the same engine; another one starts anew.

    Args:
        strategy: A `tf.distribute` strategy; the batch is split over its replicas.
        forward: What `frozen_forward` returned, or a function `float32[batch, ...]` -> `[batch, dim]` for
            which an engine is chosen here.
        source: Inputs, in the order of the split.
        dim: Length of a feature vector.
        batch_size: Global batch size; a multiple of the number of replicas. An engine has its own.
        directory: Where the features are kept.
        split: Name of the split.

    Returns:
        `float32[num_examples, dim]`, memory-mapped and read-only.

    Raises:
        Interrupted: If the process was asked to stop; what was computed is kept.
    """
    num_examples = len(source.labels)
    if not hasattr(forward, "digest"):
        forward = frozen_forward(strategy, forward, source)
    engine: Any = forward if hasattr(forward, "digest") else None
    name = f"{split}-features-{engine.digest[:16]}" if engine else f"{split}-features"
    batch_size = engine.batch_size if engine else batch_size
    path, done_path = directory / f"{name}.npy", directory / f"{name}.done"
    num_done = int(done_path.read_text()) if done_path.exists() else 0
    done_steps = num_done // batch_size if num_done < num_examples else -(-num_examples // batch_size)
    if not num_done:
        np.lib.format.open_memmap(path, "w+", np.float32, (num_examples, dim)).flush()
    features = np.load(path, mmap_mode="r+")
    batches = epoch_batches(source.labels, batch_size=batch_size, seed=0, epoch=0, shuffle=False)
    computed = (_by_engine if engine else _on_replicas)(
        strategy, forward, source, batches, batch_size, done_steps
    )
    saved = time.monotonic()
    with (
        stopping_gracefully(),
        contextlib.closing(computed),
        Progress("features", total=num_examples, unit="images") as progress,
    ):
        progress.update(min(done_steps * batch_size, num_examples), split=split)
        for step, made in enumerate(computed, done_steps):
            start = step * batch_size
            rows = features[start : start + batch_size]
            rows[:] = made[: len(rows)]
            progress.update(len(rows))
            stopping = stop_requested()
            if stopping or time.monotonic() - saved > _SAVE_SECONDS or step + 1 == batches.num_steps:
                _save(features, path, done_path, start + len(rows))
                saved = time.monotonic()
            if stopping:
                raise Interrupted(
                    f"`features` was asked to stop (SIGTERM) and kept {start + len(rows)} of {num_examples} feature "
                    "vectors. Start it again with the same arguments to go on."
                )
    kept: np.ndarray = np.load(path, mmap_mode="r")
    return kept


def in_order(forward: FrozenForward, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the rows of batches in their order, computed by the engine's workers while later ones are decoded.

    At most two batches more than there are workers are held at a time.

    Args:
        forward: The engine.
        batches: `float32[batch, size, size, 3]` each; where they come from works in threads of its own.
    """
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    with ThreadPoolExecutor(forward.num_workers, thread_name_prefix="engine") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(forward.forward, batch))
                if len(waiting) > forward.num_workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _save(features: np.memmap, path: Path, done_path: Path, num_done: int) -> None:
    """Make sure the features are on disk before the count that says so is."""
    features.flush()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    write_atomically(done_path, str(num_done))


def _by_engine(
    _: Any, forward: Any, source: Source, batches: Any, batch_size: int, start_step: int
) -> Generator[np.ndarray, None, None]:
    if start_step < batches.num_steps:
        inputs = source.inputs(batches, slice(start_step, None), slice(None), batch_size)
        yield from in_order(forward, inputs.as_numpy_iterator())


def _on_replicas(
    strategy: Any, forward: Any, source: Source, batches: Any, batch_size: int, start_step: int
) -> Generator[np.ndarray, None, None]:
    compute = _compiled(strategy, forward)
    for batch in _distribute(strategy, source, batches, batch_size, start_step):
        yield compute(batch).numpy()


def _distribute(strategy: Any, source: Source, batches: Any, batch_size: int, start_step: int) -> Any:
    if start_step >= batches.num_steps:
        return ()
    per_replica = batch_size // strategy.num_replicas_in_sync
    return strategy.distribute_datasets_from_function(
        lambda _: source.inputs(batches, slice(start_step, None), slice(None), per_replica)
    )


def _compiled(strategy: Any, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def compute(batch: Any) -> Any:
        per_replica = strategy.run(forward, args=(batch,))
        return tf.concat(
            [tf.cast(part, tf.float32) for part in strategy.experimental_local_results(per_replica)], 0
        )

    compiled: Callable[[Any], Any] = tf.function(compute)
    return compiled
